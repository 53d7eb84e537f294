"""The verbs of batch normalization one by one: measure, merge, solve and apply, forward and backward.

`batch_norm` and its gradient do all four in one call. The functions here are for data in parts, which live in several
ranks or chunks. Names and order of arguments are from PyTorch's SyncBatchNorm. `cbn.functional` exports all of them.
"""

from __future__ import annotations

from typing import Any, SupportsIndex

import numpy as np

from . import checks, steps
from .checks import Activation, Array, ArrayLike, Doubles, Number
from .inputs import Input, as_gradient, as_input, as_outputs
from .kernels import channels, passes
from .moments import GradMoments, Moments, measure
from .steps import NO_EPILOGUE, Affine, Context, Epilogue


def batch_norm_stats(x: ArrayLike, eps: Number, *, channel_axis: SupportsIndex = 1) -> tuple[Doubles, Doubles]:
    """Measure mean and 1/sqrt(var + eps) of every channel of one part of a batch.

    Parameters
    ----------
    x : array_like
        Part of the batch, as for `batch_norm`; it may be empty.
    eps : float
        Positive number added to the biased variance (1/n).
    channel_axis : int
        Axis with the channels.

    Returns
    -------
    mean, invstd : (C,) float64 ndarray
        Zeros for an empty part.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm`, except that a part may have one value per channel.

    Examples
    --------
    Two processes have one part of a batch each, and normalize it like the whole batch:

    >>> import numpy as np
    >>> from cbn.functional import batch_norm_stats, batch_norm_gather_stats_with_counts, batch_norm_elemt
    >>> parts = [np.array([[0.0], [2.0]]), np.array([[7.0]])]
    >>> stats = [batch_norm_stats(x, 1e-5) for x in parts]
    >>> mean, invstd = batch_norm_gather_stats_with_counts(
    ...     None, [m for m, _ in stats], [r for _, r in stats], None, None, 0.1, 1e-5, [len(x) for x in parts])
    >>> mean
    array([3.])
    >>> [batch_norm_elemt(x, None, None, mean, invstd, 1e-5).round(4) for x in parts]
    [array([[-1.019 ],
           [-0.3397]]), array([[1.3587]])]
    """
    inp = as_input(x, channel_axis)
    epsilon = checks.epsilon_for(eps, True)
    found = measure(inp)
    if inp.layout is None:
        return found.mean, np.zeros(inp.n_channels)
    return found.mean, passes.inverse_std(found.var(), epsilon)


def batch_norm_gather_stats_with_counts(
    x: ArrayLike | None,
    mean: ArrayLike,
    invstd: ArrayLike,
    running_mean: Array | None,
    running_var: Array | None,
    momentum: Number,
    eps: Number,
    counts: ArrayLike,
) -> tuple[Doubles, Doubles]:
    """Merge the statistics of the parts of a batch, in the order given, and move the running statistics.

    The running statistics move once, by the whole batch, as in `batch_norm`. The function recovers the variances from
    invstd and eps, with a relative error of about 1e-16*(1 + eps/var); `cbn.Moments` merges without that loss.

    Parameters
    ----------
    x : array_like or None
        Ignored; it keeps PyTorch's order of arguments.
    mean, invstd : (K, C) array_like
        Statistics of K parts, from `batch_norm_stats`.
    running_mean, running_var : (C,) ndarray or None
        Running statistics, updated in place after all else has succeeded; both or none.
    momentum : float in [0, 1]
        Weight of the new batch in the running statistics.
    eps : float
        The eps of `batch_norm_stats`.
    counts : (K,) array_like
        Values per channel of each part; 0 for an empty part, whose statistics are ignored.

    Returns
    -------
    mean, invstd : (C,) float64 ndarray
        Mean and 1/sqrt(var + eps) of the batch. If all parts are empty they are zeros, and the running statistics do
        not move.

    Raises
    ------
    TypeError, ValueError
        If shapes do not fit, a count is negative, or all parts together have one value per channel. Nothing has changed
        then.

    References
    ----------
    .. [1] T. F. Chan, G. H. Golub and R. J. LeVeque, "Updating formulae and a pairwise algorithm for computing sample
       variances", 1979.

    Examples
    --------
    >>> import numpy as np
    >>> from cbn.functional import batch_norm_gather_stats_with_counts
    >>> running_mean, running_var = np.zeros(1), np.ones(1)
    >>> batch_norm_gather_stats_with_counts(
    ...     None, [[1.0], [7.0]], [[1.0], [0.0]], running_mean, running_var, 0.5, 0.0, [2, 0])
    (array([1.]), array([1.]))
    >>> running_mean, running_var
    (array([0.5]), array([1.5]))
    """
    means, invstds = checks.doubles(mean, "mean"), checks.doubles(invstd, "invstd")
    if means.ndim != 2 or not len(means):
        raise ValueError(f"mean has shape {means.shape}; expected (K, C), one row for each part")
    if invstds.shape != means.shape:
        raise ValueError(f"invstd has shape {invstds.shape}; expected {means.shape}, as mean")
    n_parts, n_channels = means.shape
    values = _counts(counts, "counts")
    if values.shape != (n_parts,):
        raise ValueError(f"counts has shape {values.shape}; expected ({n_parts},), one for each part")
    fraction = checks.momentum_fraction(momentum)
    checks.buffers_for_batch(running_mean, running_var)
    running_mean = checks.per_channel(running_mean, "running_mean", n_channels, written=True)
    running_var = checks.per_channel(running_var, "running_var", n_channels, written=True)
    epsilon = checks.epsilon(eps)
    count = float(values.sum())
    if count == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got counts {values.tolist()}")
    if count == 0:
        return np.zeros(n_channels), np.zeros(n_channels)
    with np.errstate(all="ignore"):
        m2 = np.maximum(1 / (invstds * invstds) - epsilon, 0) * values[:, None]
    parts = [Moments._of(n, *of_part) for n, *of_part in zip(values, means, m2, strict=True) if n]
    merged = Moments.merge(parts)
    if running_mean is not None:
        channels.move_running(running_mean, running_var, None, merged.mean, merged.m2, count, fraction)
    return merged.mean, passes.inverse_std(merged.var(), epsilon)


def _counts(counts: ArrayLike | Number, name: str) -> Doubles:
    """Counts as float64 numbers that are not negative."""
    values = checks.doubles(counts, name)
    if not np.all((values >= 0) & np.isfinite(values)):
        raise ValueError(f"{name} must be finite and not negative, but got {values.tolist()}")
    return values


def _statistics(inp: Input, mean: ArrayLike, invstd: ArrayLike, *others: Array | None) -> tuple[Any, ...]:
    """Float64 copies of mean and invstd, and of other per-channel arrays, which are checked already."""
    given = []
    for a, name in ((mean, "mean"), (invstd, "invstd")):
        given.append(checks.per_channel(a, name, inp.n_channels, x=inp.x))
        if given[-1] is None:
            raise TypeError(f"{name} must be an array, not None")
    return channels.as_doubles(inp.n_channels, *given, *others)


def batch_norm_elemt(
    x: ArrayLike,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    mean: ArrayLike,
    invstd: ArrayLike,
    eps: Number,
    *,
    channel_axis: SupportsIndex = 1,
    out: Array | None = None,
    activation: Activation = None,
    residual: ArrayLike | None = None,
) -> Array:
    """Solve and apply: ``y = act((x - mean)*invstd*weight + bias + residual)`` with given statistics.

    Parameters
    ----------
    x, weight, bias, channel_axis, out, activation, residual
        As for `batch_norm`.
    mean, invstd : (C,) array_like
        Statistics from `batch_norm_gather_stats_with_counts`, or from `batch_norm_stats` for a batch in one part.
    eps : float
        Ignored, since invstd contains it; it keeps PyTorch's order of arguments.

    Returns
    -------
    y : ndarray
        Output with x's shape, dtype and order in memory; `out` if given.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm`.

    Examples
    --------
    >>> import numpy as np
    >>> import cbn
    >>> cbn.functional.batch_norm_elemt(np.array([[1.0, 2.0]]), None, None, [1.0, 1.0], [2.0, 2.0], 1e-5)
    array([[0., 2.]])
    """
    act = checks.activation(activation)
    inp = as_input(x, channel_axis)
    given, (out, residual) = out, as_outputs(inp, out, residual)
    weight = checks.per_channel(weight, "weight", inp.n_channels, x=inp.x)
    bias = checks.per_channel(bias, "bias", inp.n_channels, x=inp.x)
    inp.promote_for(weight, bias)
    means, invstds, *affine = _statistics(inp, mean, invstd, weight, bias)
    coef = steps.coefficients(means, invstds, Affine(*affine))
    y = steps.forward_fixed(inp, coef, Epilogue(residual, act), out)
    return y if given is None else given


def batch_norm_backward_reduce(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    invstd: ArrayLike,
    weight: ArrayLike | None,
    input_g: bool = True,
    weight_g: bool = True,
    bias_g: bool = True,
    *,
    channel_axis: SupportsIndex = 1,
) -> tuple[Doubles | Any, Doubles | Any, Array | Any, Array | Any]:
    """Measure the sums of one part of a batch that backward needs.

    Parameters
    ----------
    dy, x, weight, channel_axis
        As for `native_batch_norm_backward`; x may be empty.
    mean, invstd : (C,) array_like
        Statistics of the whole batch.
    input_g, weight_g, bias_g : bool
        Which results to return; the others are None.

    Returns
    -------
    sum_dy, sum_dy_xmu : (C,) float64 ndarray
        S(dy) and S(dy*(x - mean)). Add those of all parts for `batch_norm_backward_elemt`.
    dweight, dbias : (C,) ndarray
        Gradients of this part: S(dy*(x - mean))*invstd and S(dy), with the dtype of weight; without a weight the dtype
        of x, but at least float32.

    Raises
    ------
    TypeError, ValueError
        As `native_batch_norm_backward`.

    Examples
    --------
    >>> import numpy as np
    >>> import cbn
    >>> x, dy = np.array([[1.0], [3.0]]), np.array([[1.0], [0.0]])
    >>> cbn.functional.batch_norm_backward_reduce(dy, x, [2.0], [1.0], None)
    (array([1.]), array([-1.]), array([-1.]), array([1.]))
    """
    wanted = [
        checks.boolean(flag, name) for flag, name in ((input_g, "input_g"), (weight_g, "weight_g"), (bias_g, "bias_g"))
    ]
    inp = as_input(x, channel_axis)
    dy = as_gradient(inp, dy)
    weight = checks.per_channel(weight, "weight", inp.n_channels, x=inp.x)
    means, invstds = _statistics(inp, mean, invstd)
    sums = steps.measure_gradients(dy, Context(inp, Affine(None, None), NO_EPILOGUE, True, means, invstds))
    dtype = checks.gradient_dtype(inp.x, weight)
    return (
        sums.sum_dh if wanted[0] else None,
        sums.sum_dh_xmu if wanted[0] else None,
        channels.rounded(passes.product(sums.sum_dh_xmu, invstds), dtype) if wanted[1] else None,
        channels.rounded(sums.sum_dh, dtype) if wanted[2] else None,
    )


def batch_norm_backward_elemt(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    invstd: ArrayLike,
    weight: ArrayLike | None,
    sum_dy: ArrayLike,
    sum_dy_xmu: ArrayLike,
    count: ArrayLike | Number,
    *,
    channel_axis: SupportsIndex = 1,
    out: Array | None = None,
) -> Array:
    """Solve and apply, backward: dx of one part of a batch, from the sums of all parts.

    ``dx = (dy - sum_dy/n - (x - mean)*sum_dy_xmu*invstd^2/n)*invstd*weight``

    Parameters
    ----------
    dy, x, weight, channel_axis, out
        As for `native_batch_norm_backward`.
    mean, invstd : (C,) array_like
        Statistics of the whole batch, this part included.
    sum_dy, sum_dy_xmu : (C,) array_like
        Sums over all parts, from `batch_norm_backward_reduce`.
    count : float or (K,) array_like
        Values per channel, n, of the whole batch or of each part.

    Returns
    -------
    dx : ndarray
        Gradient of x, with x's dtype and order in memory.

    Raises
    ------
    TypeError, ValueError
        As `native_batch_norm_backward`.

    Examples
    --------
    >>> import numpy as np
    >>> import cbn
    >>> x, dy = np.array([[1.0], [3.0]]), np.array([[1.0], [0.0]])
    >>> cbn.functional.batch_norm_backward_elemt(dy, x, [2.0], [1.0], None, [1.0], [-0.5], 2)
    array([[ 0.25],
           [-0.25]])
    """
    inp = as_input(x, channel_axis)
    given, out = out, checks.output(out, inp.x.shape, inp.x.dtype)
    dy = as_gradient(inp, dy)
    weight = checks.per_channel(weight, "weight", inp.n_channels, x=inp.x)
    inp.promote_for(weight)
    sums = [
        checks.per_channel(a, name, inp.n_channels, x=inp.x)
        for a, name in ((sum_dy, "sum_dy"), (sum_dy_xmu, "sum_dy_xmu"))
    ]
    for a, name in zip(sums, ("sum_dy", "sum_dy_xmu"), strict=True):
        if a is None:
            raise TypeError(f"{name} must be an array, not None")
    n = float(_counts(count, "count").sum())
    if n == 0 and inp.layout is not None:
        raise ValueError("count is 0, and x has values")
    means, invstds, scale, *totals = _statistics(inp, mean, invstd, weight, *sums)
    context = Context(inp, Affine(scale, None), NO_EPILOGUE, True, means, invstds)
    total = GradMoments(np.full(inp.n_channels, n), *totals)
    dx = steps.apply_gradients(dy, context, total, out)
    return dx if given is None else given
