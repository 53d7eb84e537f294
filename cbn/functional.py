"""Batch normalization without state: check, allocate, call the passes.

The public functions are `batch_norm`, `native_batch_norm` and `native_batch_norm_backward`, named and ordered as
PyTorch's. What the layers share with them (`normalize_batch`, `normalize`, `gradients`) stands above them; `Input` is
compiled.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from . import checks
from .checks import Activation, Array, ArrayLike, Doubles, Number
from .kernels import channels, passes

__all__ = ["batch_norm", "native_batch_norm", "native_batch_norm_backward"]


def delivered(y: Array, out: Array | None) -> Array:
    """y, put into `out` if it was computed beside it."""
    if out is None or y is out:
        return y
    np.copyto(out, y)
    return out


def inverse_std(var: Array, eps: float) -> Doubles:
    """1/sqrt(var + eps) in float64; inf and NaN without a warning."""
    with np.errstate(all="ignore"):
        return 1 / np.sqrt(np.asarray(var, dtype=np.float64) + eps)


def normalize_batch(
    inp: passes.Input,
    weight: Doubles | None,
    bias: Doubles | None,
    eps: float,
    out: Array | None,
    residual: Array | None = None,
    negative_slope: float = 1,
) -> tuple[Array, Doubles, Doubles, Doubles]:
    """(y, mean, m2, invstd), normalized with the batch's own statistics; arguments are checked."""
    if inp.layout is None:
        y = passes.empty_like(inp.x) if out is None else out
        return y, np.zeros(inp.n_channels), np.zeros(inp.n_channels), np.zeros(inp.n_channels)
    y = inp.destination(out, inp.x, *(() if residual is None else (residual,)))
    mean, m2, invstd = passes.moments(inp.layout, inp.x, y, weight, bias, eps, inp.wide, residual, negative_slope)
    return delivered(y, out), mean, m2, invstd


def coefficients(mean: Array, var: Array, weight: Array | None, bias: Array | None, eps: float) -> Doubles:
    """(3, C): mean, scale and offset of the map that normalizes with the statistics given."""
    coef = np.empty((3, len(mean)))
    with np.errstate(all="ignore"):
        coef[0] = mean
        coef[1] = inverse_std(var, eps)
        if weight is not None:
            coef[1] *= weight
        coef[2] = 0 if bias is None else bias
    return coef


Quantization = tuple[float, int]  # scale, zero point
BYTES = (np.dtype(np.uint8), np.dtype(np.int8))


def quantized(
    x: ArrayLike,
    training: bool,
    channel_axis: SupportsIndex,
    ranks: tuple[int, ...] | None,
    scale: Any,
    zero_point: Any,
    out_dtype: Any,
) -> tuple[passes.Input, Quantization]:
    """An 8-bit input, and what its values stand for; checked but for its channels."""
    a = checks.array(x, "input").view()  # whose dtype nobody else can change
    if a.dtype not in BYTES or training:
        given = {"x_zero_point": zero_point, "out_dtype": out_dtype}
        name = next((name for name, value in given.items() if scale is None and value is not None), "x_scale")
        words = f"{'training' if training else 'evaluation'} with input of dtype {a.dtype}"
        raise TypeError(f"{name} is for evaluation with 8-bit input (uint8, int8), and this is {words}")
    scale, zero_point, dtype = checks.quantization(a, scale, zero_point, out_dtype)
    return passes.Input(a, channel_axis, ranks=ranks, y_dtype=dtype), (scale, zero_point)


def dequantizing(coef: Doubles, quantization: Quantization) -> Doubles | None:
    """Coefficients for 8-bit values in place of what they stand for; None where float32 cannot hold them.

    (scale*(x - zero_point) - mean)*invstd = (x - (zero_point + mean/scale))*(scale*invstd)
    """
    scale, zero_point = quantization
    coef = coef.copy()
    with np.errstate(all="ignore"):
        coef[0] = zero_point + coef[0] / scale
        coef[1] *= scale
    return coef if passes.fits_in_float32(coef) else None


def check_output(inp: passes.Input, out: Array | None, residual: ArrayLike | None) -> tuple[Array | Any, Array | Any]:
    """Refuse an output or a residual that does not fit the input; returns both as the loops can use them."""
    dtype = inp.x.dtype if inp.y_dtype is None else inp.y_dtype
    expected = "as the input" if inp.y_dtype is None else "as out_dtype"
    out = checks.output(out, inp.x.shape, dtype, expected)
    if residual is None:
        return out, None
    return out, inp.lies_as(passes.with_room(checks.residual, residual, inp.x, dtype, expected))


def normalize(
    inp: passes.Input,
    coef: Doubles,
    out: Array | None,
    residual: Array | None = None,
    negative_slope: float = 1,
    quantization: Quantization | None = None,
) -> Array:
    """The array normalized with the `coefficients` given; arguments are checked."""
    if inp.layout is None:
        return inp.destination(None) if out is None else out
    if quantization is not None:
        folded = dequantizing(coef, quantization)
        if folded is None:
            return delivered(
                passes.with_room(normalize_dequantized, inp, coef, residual, negative_slope, quantization), out
            )
        coef = folded
    y = inp.destination(out, inp.x, *(() if residual is None else (residual,)))
    passes.apply(inp.layout, inp.x, y, coef, inp.wide, residual, negative_slope)
    return delivered(y, out)


def normalize_dequantized(
    inp: passes.Input, coef: Doubles, residual: Array | None, negative_slope: float, quantization: Quantization
) -> Array:
    """8-bit input normalized in float64, where float32 cannot hold the coefficients."""
    scale, zero_point = quantization
    wide = passes.Input(scale * (inp.x.astype(np.float64) - zero_point), inp.axis)
    z = None if residual is None else wide.lies_as(residual.astype(np.float64))
    with np.errstate(all="ignore"):
        return normalize(wide, coef, None, z, negative_slope).astype(inp.y_dtype)


@dataclass(slots=True)
class Forward:
    """What backward needs of a forward pass: input and residual by reference, what it read per channel as copies.

    mean and invstd are those of the batch, with `batch_statistics`; else the running ones.
    """

    inp: passes.Input
    weight: Doubles | None
    bias: Doubles | None
    mean: Doubles
    invstd: Doubles
    batch_statistics: bool
    residual: Array | None = None
    negative_slope: float = 1
    digests: tuple[bytes | None, bytes | None] | None = None  # of input and residual, where they are to be checked

    @property
    def read(self) -> list[Array]:
        """The arrays that backward reads, element by element."""
        return [self.inp.x] if self.residual is None or self.negative_slope == 1 else [self.inp.x, self.residual]


def before_activation(forward: Forward) -> Array:
    """What the activation of a forward pass was given, in its own arithmetic, rounded to its dtype."""
    with np.errstate(all="ignore"):
        scale = forward.invstd if forward.weight is None else forward.invstd * forward.weight
    bias = np.zeros_like(scale) if forward.bias is None else forward.bias
    coef = np.stack([forward.mean, scale, bias])
    residual = None if forward.residual is None else forward.inp.lies_as(forward.residual)
    return normalize(forward.inp, coef, None, residual)


def gradients(
    dy: Array,
    forward: Forward,
    want_dx: bool,
    want_sums: bool,
    out: Array | None,
    y_dtype: np.dtype[Any] | None = None,
) -> tuple[Array | Any, Array | Any, Doubles | Any, Doubles | Any]:
    """(dx or None, dresidual or None, S(h), S(h*(x - mean))*invstd) per channel, h = dy*act'; all is checked.

    The sums are None unless wanted. Where dy's dtype differs from x's, both are taken as float64. act' is decided as
    the forward pass decided, in its arithmetic; `y_dtype` is its dtype where `forward` has wider copies of its arrays.
    """
    inp, residual = forward.inp, forward.residual
    n_channels = inp.n_channels
    if inp.layout is None:
        dx = (passes.empty_like(inp.x) if out is None else out) if want_dx else None
        return dx, None if residual is None else passes.empty_like(inp.x), np.zeros(n_channels), np.zeros(n_channels)
    dtype, work = inp.x.dtype, inp.x.dtype
    if dy.dtype != dtype:
        work = np.dtype(np.float64)
    elif dtype.itemsize == 2 and forward.negative_slope not in (0, 1):
        work = np.dtype(np.float32)  # h = dy*slope, which is kept in between, has more digits than 16 bits hold
    if work != dtype or dy.dtype != dtype:
        wider = passes.Input(passes.with_room(inp.x.astype, work, order="K", copy=False), inp.axis)
        wider.wide = inp.wide
        dh, slope, z = passes.with_room(dy.astype, work), forward.negative_slope, residual
        if dy.dtype != dtype and slope != 1:
            # Not the kernels' affair: they would decide in float64
            with np.errstate(all="ignore"):
                below = before_activation(forward) <= 0
                dh[below] = dh[below] * slope if slope else 0
            slope = 1
        wider_residual = None if z is None else passes.with_room(z.astype, work, copy=False)
        forward = replace(forward, inp=wider, negative_slope=slope, residual=wider_residual)
        dx, dresidual, sums, products = gradients(dh, forward, want_dx, want_sums, None, dtype)
        with np.errstate(all="ignore"):
            if want_dx:
                dx = delivered(passes.with_room(dx.astype, dtype, order="K"), out)
            if residual is not None:
                dresidual = passes.with_room(dresidual.astype, dtype, order="K")
        return dx, dresidual, sums, products
    dy = inp.lies_as(dy)
    residual = None if residual is None else inp.lies_as(residual)
    dx = inp.destination(out, dy, *forward.read) if want_dx else None
    mean, invstd, weight, bias = forward.mean, forward.invstd, forward.weight, forward.bias
    # The pass that finds the sums leaves h in the memory of dresidual; or of dx, unless it has to read x once more
    h = dresidual = None
    if forward.negative_slope != 1:
        if residual is not None:
            h = dresidual = passes.empty_like(inp.x)
        elif dx is not None and inp.has_beside(dx) and not passes.overlaps(dx, inp.x):
            h = dx
        else:
            h = passes.empty_like(inp.x)
    elif residual is not None:
        dresidual = passes.with_room(dy.copy, order="K")
    sums = products = None
    if want_sums or h is not None or (forward.batch_statistics and want_dx):
        through = dx if forward.batch_statistics else None
        activation: tuple[Any, ...] = ()
        if h is not None:
            activation = (bias, residual, forward.negative_slope, h, dresidual is not None, y_dtype)
        sums, products = passes.grad_moments(
            inp.layout, dy, inp.x, mean, invstd, through, weight, inp.wide, *activation
        )
    if dx is not None and not forward.batch_statistics:
        # dx = h*scale: apply with mean 0, and with offset -0, which keeps the sign of a zero
        with np.errstate(all="ignore"):
            scale = invstd if weight is None else invstd * weight
        coef = np.stack([np.zeros(n_channels), scale, np.full(n_channels, -0.0)])
        passes.apply(inp.layout, dy if h is None else h, dx, coef, inp.wide)
    return (None if dx is None else delivered(dx, out)), dresidual, sums, products


def check_parameters(
    x: Array,
    n: int,
    running_mean: ArrayLike | None,
    running_var: ArrayLike | None,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    *,
    updated: bool,
) -> tuple[Array | Any, Array | Any, Array | Any, Array | Any]:
    """The four per-channel arguments for the n channels of x, checked in PyTorch's order."""
    return (
        checks.per_channel(running_mean, "running_mean", n, written=updated, x=x),
        checks.per_channel(running_var, "running_var", n, written=updated, x=x),
        checks.per_channel(weight, "weight", n, x=x),
        checks.per_channel(bias, "bias", n, x=x),
    )


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
    arrays = (weight, bias, running_mean, running_var)
    a = checks.array(x, "input")
    quantization: Quantization | None = None
    if (a.dtype in BYTES and not training) or any(given is not None for given in (x_scale, x_zero_point, out_dtype)):
        inp, quantization = quantized(a, training, channel_axis, None, x_scale, x_zero_point, out_dtype)
    elif a is not x and checks.native_input(a.dtype) is None:
        raise checks.dtype_error(a, x, "input", checks.INPUTS)
    else:
        inp = passes.Input(a, channel_axis)
    return _batch_norm(inp, *arrays, training, momentum, eps, out, residual, slope, quantization)[0]


def _batch_norm(
    inp: passes.Input,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    running_mean: Array | None,
    running_var: Array | None,
    training: bool,
    momentum: Number,
    eps: Number,
    out: Array | None,
    residual: ArrayLike | None = None,
    negative_slope: float = 1,
    quantization: Quantization | None = None,
) -> tuple[Array, Doubles, Doubles]:
    """(y, save_mean, save_invstd): both functions that users call."""
    given = out
    out, residual = check_output(inp, out, residual)
    fraction = checks.momentum_fraction(momentum)
    if training:
        checks.buffers_for_batch(running_mean, running_var)
    else:
        checks.buffers_for_eval(running_mean, running_var)
    running_mean, running_var, weight, bias = check_parameters(
        inp.x, inp.n_channels, running_mean, running_var, weight, bias, updated=bool(training)
    )
    epsilon = checks.epsilon_for(eps, training)
    statistics = () if training else (running_mean, running_var)
    inp.meets(*[a.dtype for a in (weight, bias, *statistics) if a is not None])
    old_mean, old_var, weight, bias = channels.as_doubles(inp.n_channels, running_mean, running_var, weight, bias)
    if not training:
        coef = coefficients(old_mean, old_var, weight, bias, epsilon)
        y = normalize(inp, coef, out, residual, negative_slope, quantization)
        return y if given is None else given, np.empty(0), np.empty(0)
    checks.more_than_one_value(inp.x, inp.n_channels)
    y, mean, m2, invstd = normalize_batch(inp, weight, bias, epsilon, out, residual, negative_slope)
    if running_mean is not None and inp.layout is not None:
        # Those of the moment, which other threads may have moved; not where y has been written over them
        written = out is not None and (passes.overlaps(out, running_mean) or passes.overlaps(out, running_var))
        old = (old_mean, old_var) if written else None
        channels.move_running(running_mean, running_var, None, mean, m2, inp.count, fraction, old=old)
    return y if given is None else given, mean, invstd


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
    inp = passes.Input(x, channel_axis)
    return _batch_norm(inp, weight, bias, running_mean, running_var, training, momentum, eps, out)


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
    inp = passes.Input(x, channel_axis)
    if not isinstance(output_mask, Iterable):
        raise TypeError(f"output_mask must be three bools, for dx, dweight and dbias, not {output_mask!r}")
    mask = [checks.boolean(wanted, "an element of output_mask") for wanted in output_mask]
    if len(mask) != 3:
        raise ValueError(f"output_mask must have three elements, for dx, dweight and dbias, not {len(mask)}")
    want_dx, want_dweight, want_dbias = mask
    written = checks.output(out, inp.x.shape, inp.x.dtype)
    if out is not None and not want_dx:
        raise ValueError("out was given, but output_mask leaves out dx")
    dy = passes.with_room(checks.float_array, dy, "dy")
    if dy.shape != inp.x.shape:
        raise ValueError(f"dy has shape {dy.shape}; expected {inp.x.shape}, as the input")
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
    inp.meets(*[a.dtype for a in (weight, *(() if train else (mean, invstd))) if a is not None])
    mean, invstd, scale = channels.as_doubles(inp.n_channels, mean, invstd, weight)
    forward = Forward(inp, scale, None, mean, invstd if train else inverse_std(invstd, epsilon), train)
    dx, _, dbias, dweight = gradients(dy, forward, want_dx, want_dweight or want_dbias, written)
    dtype = checks.parameter_dtype(inp.x.dtype) if weight is None else weight.dtype.newbyteorder("=")
    return (
        dx if out is None else out,
        channels.rounded(dweight, dtype) if want_dweight else None,
        channels.rounded(dbias, dtype) if want_dbias else None,
    )
