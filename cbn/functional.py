"""Batch normalization without state, under PyTorch's names and in its order of arguments: check, one step, return.

`batch_norm`, `native_batch_norm` and `native_batch_norm_backward` normalize an array. The five verbs below them do the
same step by step, for data in parts: statistics, their merge, normalization; backward sums, and the gradient.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
import numpy.typing as npt

from . import checks, steps
from .checks import Activation, Array, ArrayLike, Doubles, Number
from .inputs import Input, as_gradient, as_input, as_outputs
from .kernels import arrays, channels, passes
from .moments import GradMoments, Moments, measure
from .quantized import BYTES, Quantization, forward_quantized, quantized
from .steps import NO_EPILOGUE, Affine, Context, Epilogue

__all__ = [
    "batch_norm",
    "batch_norm_backward_elemt",
    "batch_norm_backward_reduce",
    "batch_norm_elemt",
    "batch_norm_gather_stats_with_counts",
    "batch_norm_stats",
    "native_batch_norm",
    "native_batch_norm_backward",
]


class Running(NamedTuple):
    """Running statistics as the caller gave them."""

    mean: Array | Any
    var: Array | Any


def batch_norm(
    x: ArrayLike,
    running_mean: Array | None,
    running_var: Array | None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    training: bool = False,
    momentum: Number = 0.1,
    eps: Number = 1e-5,
    *,
    channel_axis: SupportsIndex = 1,
    out: Array | None = None,
    activation: Activation = None,
    residual: ArrayLike | None = None,
    x_scale: Number | None = None,
    x_zero_point: SupportsIndex | None = None,
    out_dtype: npt.DTypeLike | None = None,
) -> Array:
    """Normalize every channel of an array.

    ``y = act((x - mean) / sqrt(var + eps) * weight + bias + residual)``, with mean and var those of the batch if
    `training` (var with 1/n), else the running ones.

    Parameters
    ----------
    x : array_like
        Two or more dimensions; float32, float64, float16 or bfloat16 (of ml_dtypes); any strides. With `x_scale` also
        uint8 or int8.
    running_mean, running_var : (C,) ndarray or None
        Read if not `training`. If `training`, both None or both arrays that are updated in place, after all else has
        succeeded: ``running = (1 - momentum)*running + momentum*batch``, the variance with 1/(n - 1).
    weight, bias : (C,) array_like or None
        None means ones and zeros. Of any dtype that x may have, as are running statistics that are only read.
    training : bool
        Whether to use the batch's statistics.
    momentum : float in [0, 1]
        Weight of the new batch.
    eps : float
        Added to the variance; positive when training.
    channel_axis : int
        The axis with the channels: 1 for NC, NCL, NCHW, NCDHW, -1 for NLC, NHWC.
    out : ndarray, optional
        Of x's shape, and of y's dtype; receives y. It may be x or the residual, or overlap them.
    activation : None, "relu" or ("leaky_relu", slope)
        What y goes through, in the same pass. NaN stays NaN.
    residual : array_like, optional
        Of x's shape, and of y's dtype; added before the activation, in the same pass.
    x_scale : float, optional
        For 8-bit input, which stands for ``x_scale * (x - x_zero_point)``: 1/255 for images. Evaluation alone.
    x_zero_point : int
        A value of x's dtype; 0 by default.
    out_dtype : float32 or bfloat16
        Of y, for 8-bit input; float32 by default.

    Returns
    -------
    y : ndarray
        Of x's shape and dtype, in x's order in memory; `out` if given.

    Raises
    ------
    TypeError
        For another dtype, a masked array, an `out` of another dtype.
    ValueError
        For shapes that do not fit, eps or momentum out of range, absent running statistics, and one value per
        channel when training. Whatever is raised, nothing has been changed.

    References
    ----------
    .. [1] S. Ioffe and C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
       Covariate Shift", ICML 2015, algorithm 1.

    Examples
    --------
    >>> import numpy as np
    >>> import cbn
    >>> x = np.array([[0.0, 1.0], [4.0, 1.0]], dtype=np.float32)
    >>> mean, var = np.zeros(2), np.ones(2)
    >>> cbn.functional.batch_norm(x, mean, var, training=True)
    array([[-0.99999875,  0.        ],
           [ 0.99999875,  0.        ]], dtype=float32)
    >>> mean, var
    (array([0.2, 0.1]), array([1.7, 0.9]))
    """
    slope = checks.negative_slope(activation)
    a = checks.array(x, "input")
    quantization: Quantization | None = None
    if (a.dtype in BYTES and not training) or any(given is not None for given in (x_scale, x_zero_point, out_dtype)):
        inp, quantization = quantized(a, training, channel_axis, None, x_scale, x_zero_point, out_dtype)
    elif a is not x and checks.native_input(a.dtype) is None:
        raise checks.dtype_error(a, x, "input", checks.INPUTS)
    else:
        inp = as_input(a, channel_axis)
    affine, running = Affine(weight, bias), Running(running_mean, running_var)
    return _batch_norm(inp, affine, running, training, momentum, eps, Epilogue(residual, slope), out, quantization)[0]


def _batch_norm(
    inp: Input,
    affine: Affine,
    running: Running,
    training: bool,
    momentum: Number,
    eps: Number,
    epilogue: Epilogue,
    out: Array | None,
    quantization: Quantization | None = None,
) -> tuple[Array, Doubles, Doubles]:
    """(y, save_mean, save_invstd): both functions that users call. All but the input is as the caller gave it."""
    given = out
    out, residual = as_outputs(inp, out, epilogue.residual)
    epilogue = Epilogue(residual, epilogue.negative_slope)
    fraction = checks.momentum_fraction(momentum)
    (checks.buffers_for_batch if training else checks.buffers_for_eval)(*running)
    running, affine = _per_channel(inp, running, affine, updated=bool(training))
    epsilon = checks.epsilon_for(eps, training)
    statistics = () if training else running
    inp.promote_for(*[a.dtype for a in (*affine, *statistics) if a is not None])
    mean, var, weight, bias = channels.as_doubles(inp.n_channels, *running, *affine)
    affine = Affine(weight, bias)
    if not training:
        coef = steps.coefficients(mean, passes.inverse_std(var, epsilon), affine)
        if quantization is None:
            y = steps.forward_fixed(inp, coef, epilogue, out)
        else:
            y = forward_quantized(inp, coef, epilogue, out, quantization)
        return y if given is None else given, np.empty(0), np.empty(0)
    checks.more_than_one_value(inp.x, inp.n_channels)
    y, context = steps.forward_batch(inp, affine, epsilon, epilogue, out)
    if running.mean is not None and inp.layout is not None:
        # Those of the moment, which other threads may have moved; not where y has been written over them
        written = out is not None and any(arrays.overlaps(out, a) for a in running)
        old = (mean, var) if written else None
        channels.move_running(*running, None, context.mean, context.m2, inp.count, fraction, old=old)
    return y if given is None else given, context.mean, context.invstd


def _per_channel(inp: Input, running: Running, affine: Affine, *, updated: bool) -> tuple[Running, Affine]:
    """The four per-channel arguments, checked in PyTorch's order."""
    n, x = inp.n_channels, inp.x
    mean = checks.per_channel(running.mean, "running_mean", n, written=updated, x=x)
    var = checks.per_channel(running.var, "running_var", n, written=updated, x=x)
    weight = checks.per_channel(affine.weight, "weight", n, x=x)
    return Running(mean, var), Affine(weight, checks.per_channel(affine.bias, "bias", n, x=x))


def native_batch_norm(
    x: ArrayLike,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    running_mean: Array | None,
    running_var: Array | None,
    training: bool,
    momentum: Number,
    eps: Number,
    *,
    channel_axis: SupportsIndex = 1,
    out: Array | None = None,
) -> tuple[Array, Doubles, Doubles]:
    """`batch_norm` that also returns what the backward pass needs.

    Parameters
    ----------
    x, weight, bias, running_mean, running_var, training, momentum, eps, channel_axis
        As for `batch_norm`.
    out : ndarray, optional
        Receives y alone.

    Returns
    -------
    y : ndarray
    save_mean, save_invstd : (C,) ndarray of float64
        Mean and 1/sqrt(var + eps) of the batch; of shape (0,) if not `training`; zeros for an empty batch.
        They are float64 whatever x is: with the mean rounded to float32, the gradient of the weight on
        values around 10^6 would be off by most of its size.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm`.

    Examples
    --------
    >>> import numpy as np
    >>> import cbn
    >>> x = np.array([[0.0], [4.0]])
    >>> y, mean, invstd = cbn.functional.native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5)
    >>> mean, invstd
    (array([2.]), array([0.49999938]))
    """
    inp, affine, running = as_input(x, channel_axis), Affine(weight, bias), Running(running_mean, running_var)
    return _batch_norm(inp, affine, running, training, momentum, eps, NO_EPILOGUE, out)


def native_batch_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    weight: ArrayLike | None,
    running_mean: ArrayLike | None,
    running_var: ArrayLike | None,
    save_mean: ArrayLike | None,
    save_invstd: ArrayLike | None,
    train: bool,
    eps: Number,
    output_mask: Iterable[bool] = (True, True, True),
    *,
    channel_axis: SupportsIndex = 1,
    out: Array | None = None,
) -> tuple[Array | Any, Array | Any, Array | Any]:
    """Gradients of a batch normalization with respect to its input, weight and bias.

    With d = x - mean, r = 1/sqrt(var + eps), w = weight, S the sum and n the number of values per channel::

        dbias   = S(dy)
        dweight = S(d*dy)*r
        dx      = (dy - S(dy)/n - d*S(d*dy)*r^2/n)*r*w     if train
        dx      = dy*r*w                                   else, with the running mean and variance

    Parameters
    ----------
    dy : array_like
        Gradient of y, of x's shape.
    x : array_like
        The input of the forward.
    weight : (C,) array_like or None
    running_mean, running_var : (C,) array_like or None
        Needed if not `train`.
    save_mean, save_invstd : (C,) array_like or None
        From `native_batch_norm`; needed if `train`.
    train : bool
    eps : float
    output_mask : three bools
        Which of dx, dweight, dbias to compute; the others are None.
    channel_axis : int
    out : ndarray, optional
        Of x's shape and dtype; receives dx. It may be dy or x.

    Returns
    -------
    dx : ndarray
        Of x's dtype, in x's order in memory.
    dweight, dbias : (C,) ndarray
        Of the dtype of weight, or without one of x, float32 at least.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm`; also where `out` is given and dx is masked out.

    Examples
    --------
    >>> import numpy as np
    >>> from cbn.functional import native_batch_norm, native_batch_norm_backward
    >>> x = np.array([[0.0], [1.0], [5.0]])
    >>> y, mean, invstd = native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5)
    >>> dy = np.array([[1.0], [0.0], [0.0]])
    >>> dx, dweight, dbias = native_batch_norm_backward(dy, x, None, None, None, mean, invstd, True, 1e-5)
    >>> dx.round(4)
    array([[ 0.1763],
           [-0.2204],
           [ 0.0441]])
    >>> dbias
    array([1.])
    """
    inp = as_input(x, channel_axis)
    if not isinstance(output_mask, Iterable):
        raise TypeError(f"output_mask must be three bools, for dx, dweight and dbias, not {output_mask!r}")
    mask = [checks.boolean(wanted, "an element of output_mask") for wanted in output_mask]
    if len(mask) != 3:
        raise ValueError(f"output_mask must have three elements, for dx, dweight and dbias, not {len(mask)}")
    want_dx, want_dweight, want_dbias = mask
    written = checks.output(out, inp.x.shape, inp.x.dtype)
    if out is not None and not want_dx:
        raise ValueError("out was given, but output_mask leaves out dx")
    dy = as_gradient(inp, dy)
    weight = checks.per_channel(weight, "weight", inp.n_channels, x=inp.x)
    epsilon = checks.epsilon_for(eps, train)
    if train:
        mean = checks.per_channel(save_mean, "save_mean", inp.n_channels, x=inp.x)
        invstd = checks.per_channel(save_invstd, "save_invstd", inp.n_channels, x=inp.x)
        if mean is None or invstd is None:
            raise checks.ArgumentError("save_mean and save_invstd must be defined in training mode")
    else:
        checks.buffers_for_eval(running_mean, running_var)
        mean = checks.per_channel(running_mean, "running_mean", inp.n_channels, x=inp.x)
        invstd = checks.per_channel(running_var, "running_var", inp.n_channels, x=inp.x)
    inp.promote_for(*[a.dtype for a in (weight, *(() if train else (mean, invstd))) if a is not None])
    mean, invstd, scale = channels.as_doubles(inp.n_channels, mean, invstd, weight)
    if not train:
        invstd = passes.inverse_std(invstd, epsilon)
    context = Context(inp, Affine(scale, None), NO_EPILOGUE, bool(train), mean, invstd)
    dx, _, dweight, dbias = steps.backward(dy, context, want_dx, want_dweight or want_dbias, written)
    dtype = _parameter_dtype(inp, weight)
    return (
        dx if out is None else out,
        channels.rounded(dweight, dtype) if want_dweight else None,
        channels.rounded(dbias, dtype) if want_dbias else None,
    )


def _parameter_dtype(inp: Input, weight: Array | None) -> np.dtype[Any]:
    """Of the gradients of weight and bias."""
    return checks.parameter_dtype(inp.x.dtype) if weight is None else weight.dtype.newbyteorder("=")


# ---- the verbs by themselves -----------------------------------------------------------------------------------------


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
    dtype = _parameter_dtype(inp, weight)
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
    if any(a is None for a in sums):
        raise TypeError("sum_dy and sum_dy_xmu must be arrays, not None")
    n = float(_counts(count, "count").sum())
    if n == 0 and inp.layout is not None:
        raise ValueError("count is 0, and x has values")
    means, invstds, scale, *totals = _statistics(inp, mean, invstd, weight, *sums)
    context = Context(inp, Affine(scale, None), NO_EPILOGUE, True, means, invstds)
    total = GradMoments(np.full(inp.n_channels, n), *totals)
    dx = steps.apply_gradients(dy, context, total, out)
    return dx if given is None else given
