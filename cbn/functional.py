"""Batch normalization without state, with PyTorch's names and order of arguments.

`batch_norm`, `native_batch_norm` and `native_batch_norm_backward` normalize an array in one call.
`native_batch_norm_double_backward` and `batch_norm_jvp` differentiate the backward pass once more, and the forward pass
in forward mode. The five other functions, those of PyTorch's SyncBatchNorm, do the same as the first three in steps:
measure, merge, solve and apply. They are for a batch whose parts live in several processes or chunks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from . import checks, masked, steps
from .checks import Activation, Array, ArrayLike, Doubles, Number
from .inputs import Input, as_gradient, as_input, as_outputs, as_statistics
from .kernels import arrays, calls, channels, passes
from .quantized import BYTES, Quantization, forward_quantized, quantized
from .second import batch_norm_jvp, native_batch_norm_double_backward
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
    "batch_norm_jvp",
    "batch_norm_stats",
    "native_batch_norm",
    "native_batch_norm_backward",
    "native_batch_norm_double_backward",
]

ALL = (True, True, True)  # gradients of input, weight and bias


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
    mask: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
) -> Array:
    """Normalize every channel of an array.

    ``y = act((x - mean) / sqrt(var + eps) * weight + bias + residual)``. In training, mean and var are the batch's, and
    var is biased (1/n). In evaluation they are the running statistics.

    Parameters
    ----------
    x : array_like
        Input with two or more dimensions and any strides; float32, float64, float16 or bfloat16 (of ml_dtypes), and
        with `x_scale` also uint8 or int8.
    running_mean, running_var : (C,) ndarray or None
        Statistics for evaluation. In training both may be None; otherwise the function updates both in place, after all
        else has succeeded: ``running = (1 - momentum)*running + momentum*batch``, the variance with 1/(n - 1).
    weight, bias : (C,) array_like or None
        Scale and offset; None means ones and zeros. They may have any dtype that x may have, and so may running
        statistics that are only read.
    training : bool
        Whether to normalize with the batch's statistics.
    momentum : float in [0, 1]
        Weight of the new batch in the running statistics.
    eps : float
        Number added to the variance; positive in training.
    channel_axis : int
        Axis with the channels: 1 for NC, NCL, NCHW, NCDHW; -1 for NLC, NHWC.
    out : ndarray, optional
        Receives y; has x's shape and y's dtype. It may be x or the residual, or overlap them.
    activation : None, "relu", ("leaky_relu", slope) or ("clip", low, high)
        Activation of y, applied in the same pass. NaN stays NaN.
    residual : array_like, optional
        Added before the activation, in the same pass; has x's shape and y's dtype.
    x_scale : float, optional
        Scale of 8-bit input, in evaluation: x means ``x_scale * (x - x_zero_point)``. It is 1/255 for images.
    x_zero_point : int
        Zero point of 8-bit input, a value of x's dtype; 0 by default.
    out_dtype : float32 or bfloat16
        Type of y for 8-bit input; float32 by default.
    mask : bool array_like, optional
        True for the values that count: one for every value of all channels, with a shape that broadcasts to that of x
        without its channel axis, or else one that broadcasts to that of x. y is 0 for the others, and nothing reads
        them.
    lengths : (N,) array_like of int, optional
        How many values of each sample count, along the first axis after the samples'.
    sample_weight : (N,) array_like, optional
        How often each sample counts in the statistics: finite, not negative. n is the sum of the weights.

    Returns
    -------
    y : ndarray
        Output with x's shape, dtype and order in memory; `out` if given.

    Raises
    ------
    TypeError
        For another dtype, a masked array, or an `out` with another dtype.
    ValueError
        If shapes do not fit, eps or momentum is out of range, running statistics are missing, or a training batch has
        one value per channel. After an error nothing has changed.

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
    of_bytes = x_scale is not None or x_zero_point is not None or out_dtype is not None
    counting = mask is not None or lengths is not None or sample_weight is not None
    if not (of_bytes or counting):
        # Both lists in full: to pass a tuple of them takes a quarter of a small call
        if not training:
            y = calls.evaluate(
                x, weight, bias, running_mean, running_var, momentum, eps, channel_axis, out, activation, residual
            )
            if y is not None:
                return y
        else:
            done = calls.train(
                x, weight, bias, running_mean, running_var, momentum, eps, channel_axis, out, activation, residual
            )
            if done is not None:
                return done[0]
    act = checks.activation(activation)
    a = checks.array(x, "input")
    quantization: Quantization | None = None
    if (a.dtype in BYTES and not training) or any(given is not None for given in (x_scale, x_zero_point, out_dtype)):
        inp, quantization = quantized(a, training, channel_axis, None, x_scale, x_zero_point, out_dtype)
    elif a is not x and checks.native_input(a.dtype) is None:
        raise checks.dtype_error(a, x, "input", checks.INPUTS)
    else:
        inp = as_input(a, channel_axis)
    weights = masked.as_weights(inp, mask, lengths, sample_weight) if counting else None
    if weights is not None and quantization is not None:
        raise ValueError(masked.NO_BYTES)
    arrays_c = running_mean, running_var, weight, bias
    return _batch_norm(inp, arrays_c, training, momentum, eps, Epilogue(residual, act), out, quantization, weights)[0]


def _batch_norm(
    inp: Input,
    arrays_c: tuple[Any, Any, Any, Any],
    training: bool,
    momentum: Number,
    eps: Number,
    epilogue: Epilogue,
    out: Array | None,
    quantization: Quantization | None = None,
    weights: masked.Weights | None = None,
) -> tuple[Array, Doubles, Doubles]:
    """(y, save_mean, save_invstd) for both public functions. Only the input has been checked.

    arrays_c: running mean, running variance, weight and bias, as the caller gave them.
    """
    given = out
    out, residual = as_outputs(inp, out, epilogue.residual)
    if residual is not None:
        epilogue = Epilogue(residual, epilogue.act)
    fraction = checks.momentum_fraction(momentum)
    running_mean, running_var, weight, bias = arrays_c
    (checks.buffers_for_batch if training else checks.buffers_for_eval)(running_mean, running_var)
    x, n = inp.x, inp.n_channels
    running_mean = checks.per_channel(running_mean, "running_mean", n, written=bool(training), x=x)
    running_var = checks.per_channel(running_var, "running_var", n, written=bool(training), x=x)
    weight = checks.per_channel(weight, "weight", n, x=x)
    bias = checks.per_channel(bias, "bias", n, x=x)
    epsilon = checks.epsilon_for(eps, training)
    mean, var, *affine = channels.as_doubles(n, running_mean, running_var, weight, bias)
    selection: masked.Selection | None = None
    if weights is not None and inp.layout is not None:
        inp, selection = masked.select(inp, weights)
        if out is None and inp.x is not x:
            out = arrays.empty_like(x)
    if not training:
        inp.promote_for(running_mean, running_var, weight, bias)
        coef = passes.coefficients(mean, passes.inverse_std(var, epsilon), *affine)
        if quantization is None:
            y = steps.forward_fixed(inp, coef, epilogue, out, selection)
        else:
            y = forward_quantized(inp, coef, epilogue, out, quantization)
        return y if given is None else given, np.empty(0), np.empty(0)
    inp.promote_for(weight, bias)
    if selection is None:
        checks.more_than_one_value(x, n)
    else:
        masked.refuse_few(inp, selection)
    y, context = steps.forward_batch(inp, Affine(*affine), epsilon, epilogue, out, selection=selection)
    if running_mean is not None and inp.layout is not None:
        # The current ones, which other threads may have moved; the copies if y was written over them
        written = out is not None and (arrays.overlaps(out, running_mean) or arrays.overlaps(out, running_var))
        old = (mean, var) if written else None
        moved: tuple[Doubles, Doubles, float, bool] = context.mean, context.m2, inp.count, True
        if selection is not None:
            moved = context.mean, context.moments.var(1), 1.0, False
        channels.move_running(running_mean, running_var, None, *moved[:3], fraction, moved[3], old)
    return y if given is None else given, context.mean, context.invstd


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
    """Normalize as `batch_norm`, and return the statistics that the backward pass needs.

    Parameters
    ----------
    x, weight, bias, running_mean, running_var, training, momentum, eps, channel_axis
        As for `batch_norm`.
    out : ndarray, optional
        Receives y alone.

    Returns
    -------
    y : ndarray
        Output, as from `batch_norm`.
    save_mean, save_invstd : (C,) float64 ndarray
        Mean and 1/sqrt(var + eps) of the batch; shape (0,) in evaluation; zeros for an empty batch. They are float64
        for every type of x: with the mean rounded to float32, the gradient of the weight on values around 10^6 would be
        off by most of its size.

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
    if training:
        done = calls.train(x, weight, bias, running_mean, running_var, momentum, eps, channel_axis, out, None, None)
        if done is not None:
            return done
    else:
        y = calls.evaluate(x, weight, bias, running_mean, running_var, momentum, eps, channel_axis, out, None, None)
        if y is not None:
            return y, np.empty(0), np.empty(0)
    inp, arrays_c = as_input(x, channel_axis), (running_mean, running_var, weight, bias)
    return _batch_norm(inp, arrays_c, training, momentum, eps, NO_EPILOGUE, out)


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
    output_mask: Iterable[bool] = ALL,
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
        Gradient of y; has y's shape.
    x : array_like
        Input of the forward.
    weight : (C,) array_like or None
        Weight of the forward.
    running_mean, running_var : (C,) array_like or None
        Statistics of the forward if `train` is False.
    save_mean, save_invstd : (C,) array_like or None
        Statistics from `native_batch_norm` if `train` is True.
    train : bool
        Whether the forward normalized with the batch's statistics.
    eps : float
        Number added to the variance in the forward.
    output_mask : three bools
        Which of dx, dweight, dbias to compute; the others are None.
    channel_axis : int
        Axis with the channels.
    out : ndarray, optional
        Receives dx; has x's shape and dtype. It may be dy or x.

    Returns
    -------
    dx : ndarray
        Gradient of x, with x's dtype and order in memory.
    dweight, dbias : (C,) ndarray
        Gradients of weight and bias, with the dtype of weight; without a weight the dtype of x, but at least float32.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm`; also if `out` is given and dx is masked out.

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
    if train is True and output_mask is ALL and type(eps) is float and eps > 0:
        done = calls.gradients(dy, x, weight, save_mean, save_invstd, channel_axis, out)
        if done is not None:
            return done
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
    mean, invstd = as_statistics(inp, train, running_mean, running_var, save_mean, save_invstd)
    inp.promote_for(weight, *(() if train else (mean, invstd)))
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
