"""The specification of cbn in float64 numpy. It uses nothing else of the package.

Tests compare every kernel with these functions, over every instruction set, type, layout and number of threads. The
functions follow the formulas of Ioffe and Szegedy (2015), trust their inputs, and are not fast.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Doubles = npt.NDArray[np.float64]


def expand(v: npt.ArrayLike, x: Array, channel_axis: int) -> Doubles:
    """Reshape a (C,) vector so that it broadcasts along the channel axis of x."""
    shape = [1] * x.ndim
    shape[channel_axis] = -1
    return np.asarray(v, dtype=np.float64).reshape(shape)


def per_channel(x: Array, channel_axis: int) -> Doubles:
    """Return x as a (C, n) float64 array."""
    return np.moveaxis(np.asarray(x, dtype=np.float64), channel_axis, 0).reshape(x.shape[channel_axis], -1)


def moments(x: Array, channel_axis: int = 1) -> tuple[int, Doubles, Doubles]:
    """Return (n, mean, m2): values per channel, their mean, and the sum of squared distances from the mean."""
    x_cn = per_channel(x, channel_axis)
    n = x_cn.shape[1]
    if n == 0:
        return 0, np.zeros(len(x_cn)), np.zeros(len(x_cn))
    # The mean of x - x_0, not of x: exact for a constant channel, whatever its value.
    first = x_cn[:, :1]
    mean = first + (x_cn - first).mean(axis=1, keepdims=True)
    return n, mean[:, 0], ((x_cn - mean) ** 2).sum(axis=1)


def counted_moments(
    x: Array, weights: npt.ArrayLike = 1, skipna: bool = False, channel_axis: int = 1
) -> tuple[Doubles, Doubles, Doubles, Doubles, Doubles]:
    """Return (count, mean, m2, min, max) of every channel, where weights broadcast to x and count is their sum.

    A value of weight 0 does not count; with `skipna` NaN have weight 0. Where nothing counts: 0, 0, 0, inf, -inf.
    """
    x_cn = per_channel(x, channel_axis)
    w_cn = per_channel(np.broadcast_to(np.asarray(weights, np.float64), x.shape), channel_axis).copy()
    if skipna:
        w_cn[np.isnan(x_cn)] = 0
    rows = []
    for x_n, w_n in zip(x_cn, w_cn, strict=True):
        v, w = x_n[w_n != 0], w_n[w_n != 0]
        if not v.size:
            rows.append((0.0, 0.0, 0.0, np.inf, -np.inf))
            continue
        n = w.sum()
        with np.errstate(invalid="ignore"):
            mean = v[0] + (w * (v - v[0])).sum() / n
            rows.append((n, mean, (w * (v - mean) ** 2).sum(), v.min(), v.max()))
    count, mean, m2, least, largest = np.array(rows).reshape(-1, 5).T
    return count, mean, m2, least, largest


def normalize(
    x: Array,
    mean: Array,
    var: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    channel_axis: int = 1,
) -> Doubles:
    """Return y = (x - mean) / sqrt(var + eps) * weight + bias."""
    d = np.asarray(x, dtype=np.float64) - expand(mean, x, channel_axis)
    y = d * expand(1 / np.sqrt(np.asarray(var, dtype=np.float64) + eps), x, channel_axis)
    if weight is not None:
        y = y * expand(weight, x, channel_axis)
    if bias is not None:
        y = y + expand(bias, x, channel_axis)
    return y


def activate(
    a: Array,
    residual: Array | None = None,
    negative_slope: float = 1,
    low: float = -np.inf,
    high: float = np.inf,
) -> Doubles:
    """Return act(a + residual): the sum where it is positive or NaN, else the sum times the slope; 0 is ReLU.

    Then what is below `low` becomes `low`, and what is above `high` becomes `high`.
    """
    a = np.asarray(a, np.float64) if residual is None else a + np.asarray(residual, np.float64)
    return np.clip(np.where(a <= 0, a * negative_slope if negative_slope else 0.0, a), low, high)


def activate_backward(
    dy: Array,
    a: Array,
    residual: Array | None = None,
    negative_slope: float = 1,
    low: float = -np.inf,
    high: float = np.inf,
) -> Doubles:
    """Return the gradient of `activate` with respect to a, which is also that of the residual: 0 at the bounds."""
    a = np.asarray(a, np.float64) if residual is None else a + np.asarray(residual, np.float64)
    dy = np.asarray(dy, np.float64)
    dy = np.where(a <= 0, dy * negative_slope if negative_slope else 0.0, dy)
    return np.where((a <= low) | (a >= high), 0.0, dy)


def batch_norm(
    x: Array,
    running_mean: Array | None,
    running_var: Array | None,
    weight: Array | None = None,
    bias: Array | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    channel_axis: int = 1,
) -> tuple[Doubles, Array | None, Array | None]:
    """Return (y, running_mean, running_var) after one call; no argument changes."""
    if not training:
        assert running_mean is not None
        assert running_var is not None
        return normalize(x, running_mean, running_var, weight, bias, eps, channel_axis), running_mean, running_var
    n, mean, m2 = moments(x, channel_axis)
    if n and running_mean is not None:
        running_mean = (1 - momentum) * np.asarray(running_mean, np.float64) + momentum * mean
        running_var = (1 - momentum) * np.asarray(running_var, np.float64) + momentum * m2 / (n - 1)
    return normalize(x, mean, m2 / max(n, 1), weight, bias, eps, channel_axis), running_mean, running_var


def mixture(
    mean: Doubles, var: Doubles, running_mean: Doubles, running_var: Doubles, a: float
) -> tuple[Doubles, Doubles]:
    """Return mean and variance of (1 - a) parts of values with the running statistics and a parts of the batch."""
    between = a * (1 - a) * (running_mean - mean) ** 2
    return (1 - a) * running_mean + a * mean, (1 - a) * running_var + a * var + between


def renormalization(
    mean: Doubles,
    var: Doubles,
    running_mean: Doubles,
    running_var: Doubles,
    r_max: float,
    d_max: float,
    eps: float = 1e-5,
) -> tuple[Doubles, Doubles]:
    """Return r and d of batch renormalization: y = ((x - mean)/sqrt(var + eps)*r + d)*weight + bias."""
    s = np.sqrt(running_var + eps)
    r = np.clip(np.sqrt(var + eps) / s, 1 / r_max, r_max)
    return r, np.clip((mean - running_mean) / s, -d_max, d_max)


def counted_backward(
    dy: Array, x: Array, weights: npt.ArrayLike, weight: Array | None = None, eps: float = 1e-5, channel_axis: int = 1
) -> tuple[Doubles, Doubles, Doubles]:
    """Return (dx, dweight, dbias) through the statistics of a batch with weights, as `counted_moments` has them.

    dx = (dy - w*sum(dy)/n - w*d*sum(d*dy)*r^2/n)*r*weight, n = sum(w), the sums over w > 0. It is 0 where w is 0.
    """
    w = np.broadcast_to(np.asarray(weights, np.float64), x.shape)
    n, mean, m2, _, _ = counted_moments(x, w, False, channel_axis)
    dy = np.where(w > 0, dy, 0.0)
    d = np.where(w > 0, x - expand(mean, x, channel_axis), 0.0)
    r = 1 / np.sqrt(m2 / n + eps)
    dbias = per_channel(dy, channel_axis).sum(axis=1)
    product = per_channel(d * dy, channel_axis).sum(axis=1)
    dx = dy - w * (expand(dbias / n, x, channel_axis) + d * expand(product * r**2 / n, x, channel_axis))
    return dx * expand(r if weight is None else r * weight, x, channel_axis), product * r, dbias


def backward(
    dy: Array,
    x: Array,
    mean: Array,
    var: Array,
    weight: Array | None = None,
    eps: float = 1e-5,
    train: bool = True,
    channel_axis: int = 1,
) -> tuple[Doubles, Doubles, Doubles]:
    """Return (dx, dweight, dbias). mean and var are the batch's if `train`, else the running ones."""
    n = x.size // x.shape[channel_axis] if x.size else 0
    r = 1 / np.sqrt(np.asarray(var, dtype=np.float64) + eps)
    d = np.asarray(x, dtype=np.float64) - expand(mean, x, channel_axis)
    dbias = per_channel(dy, channel_axis).sum(axis=1)
    product = per_channel(d * dy, channel_axis).sum(axis=1)
    dx = np.asarray(dy, dtype=np.float64)
    if train and n:
        dx = dx - expand(dbias / n, x, channel_axis) - d * expand(product * r**2 / n, x, channel_axis)
    dx = dx * expand(r if weight is None else r * weight, x, channel_axis)
    return dx, product * r, dbias


def _centered(t: Array, channel_axis: int) -> Doubles:
    """Return t - S(t)/n of every channel, as (C, n). Where S(d) is 0, S(t*d) is S((t - S(t)/n)*d), with more digits."""
    t_cn = per_channel(t, channel_axis)
    return t_cn - _mean(t_cn)


def _mean(t_cn: Doubles) -> Doubles:
    mean: Doubles = t_cn.mean(axis=1, keepdims=True)
    return mean


def double_backward(
    ggI: Array | None,
    ggG: Array | None,
    ggB: Array | None,
    dy: Array,
    x: Array,
    mean: Array,
    var: Array,
    weight: Array | None = None,
    eps: float = 1e-5,
    train: bool = True,
    channel_axis: int = 1,
) -> tuple[Doubles, Doubles, Doubles]:
    """Return the gradients of dy, x and weight, where ggI, ggG, ggB are those of `backward`'s dx, dweight and dbias.

    mean and var are the batch's if `train`, else the running ones. None is zeros; for the weight it is ones.
    """
    n_channels = x.shape[channel_axis]
    shape = np.moveaxis(x, channel_axis, 0).shape

    def given(a: Array | None, otherwise: float) -> Doubles:
        return np.full((n_channels, 1), otherwise) if a is None else np.asarray(a, np.float64).reshape(-1, 1)

    w, gamma = given(weight, 1), given(ggG, 0)
    r = 1 / np.sqrt(np.asarray(var, np.float64) + eps).reshape(-1, 1)
    d = per_channel(np.asarray(x, np.float64) - expand(mean, x, channel_axis), channel_axis)
    v_full = np.zeros(x.shape) if ggI is None else np.asarray(ggI, np.float64)
    grad_dy = jvp(v_full, ggG, ggB, x, mean, var, weight, eps, train, channel_axis)
    if train and x.size:
        g, v = _centered(dy, channel_axis), _centered(v_full, channel_axis)
        # S(g*v) of these is S(dy*ggI) - S(dy)*S(ggI)/n
        of_d = 3 * r**2 * _mean(g * d) * _mean(v * d) - _mean(g * v)
        p = r * (g - d * r**2 * _mean(g * d))
        grad_x = w * r**3 * (d * of_d - _mean(v * d) * g - _mean(g * d) * v) + gamma * p
        grad_weight = (v * p).sum(axis=1)
    else:
        g, v = per_channel(dy, channel_axis), per_channel(v_full, channel_axis)
        grad_x = gamma * r * g
        grad_weight = (v * g * r).sum(axis=1)
    return grad_dy, np.moveaxis(grad_x.reshape(shape), 0, channel_axis), grad_weight


def jvp(
    x_t: Array | None,
    weight_t: Array | None,
    bias_t: Array | None,
    x: Array,
    mean: Array,
    var: Array,
    weight: Array | None = None,
    eps: float = 1e-5,
    train: bool = True,
    channel_axis: int = 1,
) -> Doubles:
    """Return the derivative of `normalize` along x_t, weight_t and bias_t; through mean and var too if `train`."""
    r = 1 / np.sqrt(np.asarray(var, np.float64) + eps)
    d = np.asarray(x, np.float64) - expand(mean, x, channel_axis)
    y_t = np.zeros(x.shape) if x_t is None else np.asarray(x_t, np.float64)
    if x_t is not None and train and x.size:
        t, d_cn = _centered(x_t, channel_axis), per_channel(d, channel_axis)
        t = t - d_cn * r.reshape(-1, 1) ** 2 * _mean(t * d_cn)
        y_t = np.moveaxis(t.reshape(np.moveaxis(x, channel_axis, 0).shape), 0, channel_axis)
    y_t = y_t * expand(r, x, channel_axis)
    if weight is not None:
        y_t = y_t * expand(weight, x, channel_axis)
    if weight_t is not None:
        y_t = y_t + d * expand(np.asarray(weight_t, np.float64) * r, x, channel_axis)
    if bias_t is not None:
        y_t = y_t + expand(bias_t, x, channel_axis)
    return y_t
