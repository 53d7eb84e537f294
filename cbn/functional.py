"""Batch normalization without state, under PyTorch's names and in its order of arguments: check, one step, return.

`batch_norm`, `native_batch_norm` and `native_batch_norm_backward` normalize an array. The five verbs of `cbn.verbs`,
which are here too, do the same step by step, for data in parts.
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
from .quantized import BYTES, Quantization, forward_quantized, quantized
from .steps import NO_EPILOGUE, Affine, Context, Epilogue
from .verbs import (
    batch_norm_backward_elemt,
    batch_norm_backward_reduce,
    batch_norm_elemt,
    batch_norm_gather_stats_with_counts,
    batch_norm_stats,
)

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
    dtype = checks.gradient_dtype(inp.x, weight)
    return (
        dx if out is None else out,
        channels.rounded(dweight, dtype) if want_dweight else None,
        channels.rounded(dbias, dtype) if want_dbias else None,
    )
