"""Derivatives of the derivatives: the gradient of a backward pass, and the forward pass in forward mode.

`batch_norm_jvp` applies the derivative J of a forward pass, its backward pass applies J^T, and so the gradient of dy is
J again. `cbn.functional` exports both functions.
"""

from __future__ import annotations

from typing import Any, NamedTuple, SupportsIndex

import numpy as np

from . import checks
from .checks import Array, ArrayLike, Doubles, Number
from .inputs import Input, as_gradient, as_input, as_statistics
from .kernels import arrays, channels, passes
from .steps import widened


class Point(NamedTuple):
    """Where a forward pass is differentiated, and along what: all per channel, in float64; None for ones or zeros."""

    batch_statistics: bool
    mean: Doubles
    invstd: Doubles
    weight: Doubles | Any
    weight_t: Doubles | Any  # or ggG
    bias_t: Doubles | Any  # or ggB


def _point(
    inp: Input,
    train: bool,
    eps: Number,
    statistics: tuple[Any, Any, Any, Any],
    weight: ArrayLike | None,
    others: dict[str, ArrayLike | None],
) -> Point:
    """The checked arguments per channel, and whether these ask for float64 arithmetic.

    statistics: running mean and variance, saved mean and invstd. others: what becomes weight_t and bias_t, by name.
    """
    n, x = inp.n_channels, inp.x
    weight = checks.per_channel(weight, "weight", n, x=x)
    given = [checks.per_channel(a, name, n, x=x) for name, a in others.items()]
    epsilon = checks.epsilon_for(eps, train)
    mean, invstd = as_statistics(inp, train, *statistics)
    inp.promote_for(weight, *given, *(() if train else (mean, invstd)))
    mean, invstd, *rest = channels.as_doubles(n, mean, invstd, weight, *given)
    if not train:
        invstd = passes.inverse_std(invstd, epsilon)
    return Point(bool(train), mean, invstd, *rest)


def _zeros(inp: Input) -> Array:
    return arrays.with_room(np.zeros_like, inp.x, subok=False)


def _with_dtype(inp: Input, *given: Array | Any) -> tuple[Input, list[Array | Any]]:
    """Arrays of one dtype that the loops can walk beside x: x's own, or float64 for all if one has another."""
    dtype = inp.x.dtype
    if any(a is not None and a.dtype != dtype for a in given):
        dtype = np.dtype(np.float64)
        inp = widened(inp, dtype)
    return inp, [
        None if a is None else inp.matched(arrays.with_room(a.astype, dtype, order="K", copy=False)) for a in given
    ]


def _rounded(a: Array, dtype: np.dtype[Any]) -> Array:
    with np.errstate(all="ignore"):
        return arrays.with_room(a.astype, dtype, order="K", copy=False)


def _tangent(inp: Input, x_t: Array | Any, at: Point) -> Array:
    """The derivative of y along x_t, which may be None, and along the point's tangents."""
    y_t = arrays.empty_like(inp.x)
    zeros = np.zeros(inp.n_channels)
    if x_t is not None and (at.batch_statistics or at.weight_t is not None):
        passes.tangent(inp.layout, x_t, inp.x, y_t, *at[1:], at.batch_statistics)
    elif x_t is not None:
        # Offset -0 keeps the sign of a zero
        coef = passes.coefficients(zeros, at.invstd, at.weight, -zeros if at.bias_t is None else at.bias_t)
        passes.apply(inp.layout, x_t, y_t, coef, inp.in_float64)
    elif at.weight_t is not None:
        coef = passes.coefficients(at.mean, at.invstd, at.weight_t, at.bias_t)
        passes.apply(inp.layout, inp.x, y_t, coef, inp.in_float64)
    else:
        shape = [-1 if axis == inp.axis else 1 for axis in range(y_t.ndim)]
        with np.errstate(all="ignore"):
            y_t[...] = (zeros if at.bias_t is None else at.bias_t).reshape(shape)
    return y_t


def _double_backward(inp: Input, ggI: Array | Any, dy: Array, at: Point) -> tuple[Array, Array, Doubles]:
    """Gradients of dy, x and weight, for arrays of one dtype."""
    zeros = np.zeros(inp.n_channels)
    if ggI is not None and at.batch_statistics:
        grad_dy, grad_x = arrays.empty_like(inp.x), arrays.empty_like(inp.x)
        return grad_dy, grad_x, passes.double_backward(inp.layout, ggI, dy, inp.x, grad_dy, grad_x, *at[1:])
    grad_dy, grad_weight = _tangent(inp, ggI, at), zeros
    if ggI is not None:
        # S(ggI*dy)*invstd, as the gradient of a weight, whose x - mean is ggI
        grad_weight = passes.grad_moments(inp.layout, dy, ggI, zeros, at.invstd)[2]
    if at.weight_t is None:
        return grad_dy, _zeros(inp), grad_weight
    grad_x = arrays.empty_like(inp.x)
    if at.batch_statistics:
        # dweight depends on x as y does on the weight: the backward pass itself, with another weight
        passes.gradients(inp.layout, dy, inp.x, grad_x, at.mean, at.invstd, at.weight_t)
    else:
        coef = passes.coefficients(zeros, at.invstd, at.weight_t, -zeros)
        passes.apply(inp.layout, dy, grad_x, coef, inp.in_float64)
    return grad_dy, grad_x, grad_weight


def native_batch_norm_double_backward(
    ggI: ArrayLike | None,
    ggG: ArrayLike | None,
    ggB: ArrayLike | None,
    dy: ArrayLike,
    x: ArrayLike,
    weight: ArrayLike | None,
    running_mean: ArrayLike | None,
    running_var: ArrayLike | None,
    save_mean: ArrayLike | None,
    save_invstd: ArrayLike | None,
    train: bool,
    eps: Number,
    *,
    channel_axis: SupportsIndex = 1,
) -> tuple[Array, Array, Array | Any]:
    """Gradients of `native_batch_norm_backward` with respect to dy, x and weight.

    A loss that depends on dx, dweight and dbias, as a gradient penalty does, has the gradients ggI, ggG and ggB with
    respect to them. This is the backward pass through them. With d = x - mean, r = 1/sqrt(var + eps), w = weight, S the
    sum, n the number of values per channel and P(t) = r*(t - S(t)/n - d*r^2*S(d*t)/n)::

        grad_dy     = w*P(ggI) + ggG*d*r + ggB                                         if train
        grad_x      = w*r^3/n*(d*A - S(ggI*d)*(dy - S(dy)/n) - S(dy*d)*(ggI - S(ggI)/n)) + ggG*P(dy)
        A           = S(ggI)*S(dy)/n - S(ggI*dy) + 3*r^2*S(dy*d)*S(ggI*d)/n
        grad_weight = S(ggI*P(dy))

        grad_dy     = w*ggI*r + ggG*d*r + ggB                                          else
        grad_x      = ggG*r*dy
        grad_weight = S(ggI*dy)*r

    These are the formulas of PyTorch's ``batchnorm_double_backward`` [1]_. An activation behind the normalization masks
    dy, and grad_dy in the same way: for ReLU pass ``dy*(y > 0)``, and multiply grad_dy by ``y > 0``.

    Parameters
    ----------
    ggI : array_like or None
        Gradient of dx; has x's shape. None means zeros, here and below.
    ggG, ggB : (C,) array_like or None
        Gradients of dweight and dbias.
    dy, x, weight, running_mean, running_var, save_mean, save_invstd, train, eps, channel_axis
        As for `native_batch_norm_backward`.

    Returns
    -------
    grad_dy : ndarray
        Gradient of dy, with dy's dtype and x's order in memory.
    grad_x : ndarray
        Gradient of x, with x's dtype and order in memory.
    grad_weight : (C,) ndarray or None
        Gradient of the weight, with its dtype; None without a weight. PyTorch's function returns the same three as
        (grad_x, grad_weight, grad_dy).

    Raises
    ------
    TypeError, ValueError
        As `native_batch_norm_backward`.

    Notes
    -----
    With all three gradients given and through batch statistics, two passes read ggI, dy and x once each. Sums and
    arithmetic are float64 for every dtype; arrays of several dtypes are taken as float64.

    References
    ----------
    .. [1] PyTorch, ``torch/csrc/autograd/FunctionsManual.cpp``.

    Examples
    --------
    A penalty S(dx^2)/2 has the gradient ggI = dx:

    >>> import numpy as np
    >>> from cbn.functional import (
    ...     native_batch_norm, native_batch_norm_backward, native_batch_norm_double_backward)
    >>> x, dy = np.array([[0.0], [1.0], [5.0]]), np.array([[1.0], [0.0], [0.0]])
    >>> weight = np.array([2.0])
    >>> _, *saved = native_batch_norm(x, weight, None, None, None, True, 0.1, 1e-5)
    >>> dx, _, _ = native_batch_norm_backward(dy, x, weight, None, None, *saved, True, 1e-5)
    >>> grad_dy, grad_x, grad_weight = native_batch_norm_double_backward(
    ...     dx, None, None, dy, x, weight, None, None, *saved, True, 1e-5)
    >>> grad_dy.round(4)
    array([[ 0.3265],
           [-0.4082],
           [ 0.0816]])
    >>> np.allclose(grad_weight, (dx * dx).sum() / weight)
    True
    """
    inp = as_input(x, channel_axis)
    dy = as_gradient(inp, dy)
    v: Array | Any = None if ggI is None else as_gradient(inp, ggI, "ggI")
    weight = checks.per_channel(weight, "weight", inp.n_channels, x=inp.x)
    at = _point(inp, train, eps, (running_mean, running_var, save_mean, save_invstd), weight, {"ggG": ggG, "ggB": ggB})
    dtype = None if weight is None else checks.gradient_dtype(inp.x, weight)
    if inp.layout is None:
        grad_dy, grad_x, grad_weight = _zeros(inp), _zeros(inp), np.zeros(inp.n_channels)
    else:
        alike, (g, v) = _with_dtype(inp, dy, v)
        grad_dy, grad_x, grad_weight = _double_backward(alike, v, g, at)
    return (
        _rounded(grad_dy, dy.dtype),
        _rounded(grad_x, inp.x.dtype),
        None if dtype is None else channels.rounded(grad_weight, dtype),
    )


def batch_norm_jvp(
    x_t: ArrayLike | None,
    weight_t: ArrayLike | None,
    bias_t: ArrayLike | None,
    x: ArrayLike,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    running_mean: ArrayLike | None,
    running_var: ArrayLike | None,
    save_mean: ArrayLike | None,
    save_invstd: ArrayLike | None,
    train: bool,
    eps: Number,
    *,
    channel_axis: SupportsIndex = 1,
) -> Array:
    """Tangent of the output of `native_batch_norm`, from those of its input, weight and bias: forward mode.

    With d = x - mean, r = 1/sqrt(var + eps), w = weight, S the sum and n the number of values per channel::

        y_t = w*((x_t - S(x_t)/n)*r - d*r^3*S(d*x_t)/n) + weight_t*d*r + bias_t       if train
        y_t = w*x_t*r + weight_t*d*r + bias_t                                         else

    since mean has the tangent S(x_t)/n and r has -r^3*S(d*x_t)/n: PyTorch's ``batch_norm_jvp`` [1]_. Running statistics
    have no tangent. An activation behind the normalization multiplies y_t by its slope: by ``y > 0`` for ReLU.

    Parameters
    ----------
    x_t : array_like or None
        Tangent of x, of its shape. None means zeros, here and below.
    weight_t, bias_t : (C,) array_like or None
        Tangents of weight and bias.
    x, weight, running_mean, running_var, save_mean, save_invstd, train, eps, channel_axis
        As for `native_batch_norm_backward`.
    bias : (C,) array_like or None
        Bias of the forward. No result depends on it.

    Returns
    -------
    y_t : ndarray
        Tangent of y, with x's dtype and order in memory.

    Raises
    ------
    TypeError, ValueError
        As `native_batch_norm_backward`.

    References
    ----------
    .. [1] PyTorch, ``torch/csrc/autograd/FunctionsManual.cpp``.

    Examples
    --------
    If all values move together the output stays, and if their spread grows it changes by as little as eps counts:

    >>> import numpy as np
    >>> from cbn.functional import batch_norm_jvp, native_batch_norm
    >>> x = np.array([[0.0], [1.0], [5.0]])
    >>> y, *saved = native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5)
    >>> moved = batch_norm_jvp(np.ones((3, 1)), None, None, x, None, None, None, None, *saved, True, 1e-5)
    >>> bool(abs(moved).max() < 1e-15)
    True
    >>> spread = batch_norm_jvp(x, None, None, x, None, None, None, None, *saved, True, 1e-5)
    >>> bool(abs(spread).max() < 1e-5)
    True
    >>> batch_norm_jvp(None, [1.0], [0.5], x, None, None, None, None, *saved, True, 1e-5).round(4)
    array([[-0.4258],
           [ 0.0371],
           [ 1.8887]])
    """
    inp = as_input(x, channel_axis)
    z: Array | Any = None if x_t is None else as_gradient(inp, x_t, "x_t")
    checks.per_channel(bias, "bias", inp.n_channels, x=inp.x)
    at = _point(
        inp, train, eps, (running_mean, running_var, save_mean, save_invstd), weight,
        {"weight_t": weight_t, "bias_t": bias_t},
    )  # fmt: skip
    if inp.layout is None:
        return _zeros(inp)
    alike, (z,) = _with_dtype(inp, z)
    return _rounded(_tangent(alike, z, at), inp.x.dtype)
