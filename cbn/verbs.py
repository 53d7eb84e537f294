"""The verbs of batch normalization by themselves: measure, merge, solve and apply, forward and backward.

They are what `batch_norm` and its gradient do in one go, for data in parts: several ranks, chunks, or producers of
statistics stand between them. Names and order of arguments are those of PyTorch's SyncBatchNorm; all are in
`cbn.functional`.
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
    """Measure: mean and 1/sqrt(var + eps) of every channel of one part of a batch.

    Parameters
    ----------
    x : array_like
        As for `batch_norm`; it may be empty.
    eps : float
        Added to the variance, which has 1/n; positive.
    channel_axis : int

    Returns
    -------
    mean, invstd : (C,) ndarray of float64
        Zeros for an empty part.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm`, but for one value per channel: a part may have one.

    Examples
    --------
    Two parts of a batch, as two processes have them, normalized as the whole batch would be:

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
    """Merge: mean and 1/sqrt(var + eps) of a batch from those of its parts, in the order given.

    The running statistics move as in `batch_norm`, once, by the whole batch. invstd and eps give the variance back to
    about 1e-16*(1 + eps/var); `cbn.Moments` merges without that loss.

    Parameters
    ----------
    x : array_like or None
        Not read; it is there for PyTorch's order of arguments.
    mean, invstd : (K, C) array_like
        From `batch_norm_stats`, of K parts.
    running_mean, running_var : (C,) ndarray or None
        Updated in place after all else has succeeded; both or none.
    momentum : float in [0, 1]
    eps : float
        That which `batch_norm_stats` was given.
    counts : (K,) array_like
        Values per channel of each part; 0 for an empty one, whose statistics are not read.

    Returns
    -------
    mean, invstd : (C,) ndarray of float64
        Zeros where all parts are empty; then the running statistics stay.

    Raises
    ------
    TypeError, ValueError
        For shapes that do not fit, negative counts, and one value per channel in all. Nothing has been changed.

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
    """Numbers of values, as float64, that are not negative."""
    values = checks.doubles(counts, name)
    if not np.all((values >= 0) & np.isfinite(values)):
        raise ValueError(f"{name} must be finite and not negative, but got {values.tolist()}")
    return values


def _statistics(inp: Input, mean: ArrayLike, invstd: ArrayLike, *others: Array | None) -> tuple[Any, ...]:
    """Float64 copies of mean, invstd and other per-channel arrays that have been checked."""
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
    """Solve and apply: ``y = act((x - mean)*invstd*weight + bias + residual)``, with the statistics given.

    Parameters
    ----------
    x, weight, bias, channel_axis, out, activation, residual
        As for `batch_norm`.
    mean, invstd : (C,) array_like
        From `batch_norm_gather_stats_with_counts`, or from `batch_norm_stats` for a batch in one part.
    eps : float
        Not read, since invstd has it in it; it is there for PyTorch's order of arguments.

    Returns
    -------
    y : ndarray
        Of x's shape and dtype, in x's order in memory; `out` if given.

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
    slope = checks.negative_slope(activation)
    inp = as_input(x, channel_axis)
    given, (out, residual) = out, as_outputs(inp, out, residual)
    weight = checks.per_channel(weight, "weight", inp.n_channels, x=inp.x)
    bias = checks.per_channel(bias, "bias", inp.n_channels, x=inp.x)
    inp.promote_for(*[a.dtype for a in (weight, bias) if a is not None])
    means, invstds, *affine = _statistics(inp, mean, invstd, weight, bias)
    coef = steps.coefficients(means, invstds, Affine(*affine))
    y = steps.forward_fixed(inp, coef, Epilogue(residual, slope), out)
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
    """Measure, backward: the sums of one part of a batch.

    Parameters
    ----------
    dy, x, weight, channel_axis
        As for `native_batch_norm_backward`; x may be empty.
    mean, invstd : (C,) array_like
        Of the whole batch.
    input_g, weight_g, bias_g : bool
        Which results are wanted; the others are None.

    Returns
    -------
    sum_dy, sum_dy_xmu : (C,) ndarray of float64
        S(dy) and S(dy*(x - mean)). The sums of all parts are what `batch_norm_backward_elemt` takes.
    dweight, dbias : (C,) ndarray
        This part's own: S(dy*(x - mean))*invstd and S(dy), of weight's dtype; without one of x's, float32 at least.

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
        Of the whole batch, this part included.
    sum_dy, sum_dy_xmu : (C,) array_like
        Sums over all parts of what `batch_norm_backward_reduce` returns.
    count : float or (K,) array_like
        n, the values per channel of the whole batch; or of each part.

    Returns
    -------
    dx : ndarray
        Of x's dtype, in x's order in memory.

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
    inp.promote_for(*[a.dtype for a in (weight,) if a is not None])
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
