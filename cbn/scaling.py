"""standardize: arrays made to have mean 0 and variance 1 with given statistics, from any type to any floating type."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, SupportsIndex

import numpy as np
import numpy.typing as npt

from . import checks
from .checks import NO_ACT, Act, Array, ArrayLike, Doubles, Number
from .inputs import Input
from .kernels import channels, passes, running
from .steps import copied_into

__all__ = ["standardize"]

Clip = Number | tuple[Number, Number] | None
ZeroVar = Literal["eps", "one"]


class Options(NamedTuple):
    """How to standardize, checked: in the order in which the compiled calls take it."""

    eps: float
    outside: bool
    zero_is_one: bool
    centered: bool
    clip: Act


def standardize(
    x: ArrayLike,
    mean: ArrayLike | Number,
    var: ArrayLike | Number,
    *,
    channel_axis: SupportsIndex = -1,
    eps: Number = 1e-8,
    eps_outside: bool = False,
    zero_var: ZeroVar = "eps",
    clip: Clip = None,
    center: bool = True,
    out: Array | None = None,
    dtype: npt.DTypeLike | None = None,
) -> Array:
    """Subtract the mean and divide by the standard deviation, in one read of x and one write.

    Parameters
    ----------
    x : array_like
        Array with any number of dimensions, at least one, and any strides; float32, float64, float16 or bfloat16, or
        bool, int8, uint8, int16, uint16 or int32.
    mean, var : (C,) array_like or float
        Mean and variance of every channel; one number is for all. The variance must not be negative.
    channel_axis : int
        Axis with the channels.
    eps : float
        Number added to the variance, or to the standard deviation. It may be 0.
    eps_outside : bool
        Whether to add eps to the standard deviation, outside of the root.
    zero_var : "eps" or "one"
        What to divide by where the variance is 0: what eps makes of it, or 1.
    clip : float or (float, float), optional
        Bounds of the result: c for -c and c, or both. NaN stays.
    center : bool
        Whether to subtract the mean.
    out : ndarray, optional
        Receives the result; has x's shape. ``out=x`` works in place.
    dtype : dtype, optional
        float32, float64, float16 or bfloat16 of the result; that of `out` by default, without one x's own, or float32
        for integers (float64 for int32).

    Returns
    -------
    ndarray
        The result with x's shape and order in memory; `out` if given.

    Raises
    ------
    TypeError, ValueError
        For another dtype or shape, a negative variance, an eps that is negative or not finite, and bounds that are not
        in order. Nothing has changed then.

    Notes
    -----
    y = (x - mean)*s, clipped, with::

        s = 1/sqrt(var + eps)         or 1/(sqrt(var) + eps) with `eps_outside`
        s = 1                         where var is 0, with zero_var="one"

    The subtraction comes first, as in a layer. The arithmetic is float32 if that holds all numbers of both types, else
    float64, for a channel or for all.

    Examples
    --------
    >>> import numpy as np
    >>> import cbn
    >>> x = np.array([[0, 255], [2, 255]], dtype=np.uint8)
    >>> m = cbn.moments(x)
    >>> cbn.standardize(x, m.mean, m.var(), eps=0, zero_var="one")
    array([[-1.,  0.],
           [ 1.,  0.]], dtype=float32)
    """
    if dtype is None or (isinstance(x, np.ndarray) and x.dtype == dtype):
        y = running.standardize(x, mean, var, channel_axis, out, eps, eps_outside, zero_var, clip, center)
        if y is not None:
            return y
    how = options(eps, eps_outside, zero_var, clip, center)
    a = checks.measured_array(x, "input")
    if a.ndim == 0:
        raise ValueError("expected at least 1D input (got 0D input)")
    axis = checks.axis_index(channel_axis, a.ndim)
    means, variances = (_per_channel(value, name, a.shape[axis]) for name, value in (("mean", mean), ("var", var)))
    return standardized(a, means, variances, axis, how, out, dtype)


def options(eps: Any, eps_outside: Any, zero_var: Any, clip: Any, center: Any) -> Options:
    """The arguments that are not arrays, checked."""
    if zero_var not in ("eps", "one"):
        raise ValueError(f"zero_var must be 'eps' or 'one', not {zero_var!r}")
    act = NO_ACT
    if isinstance(clip, (tuple, list)) and len(clip) == 2:
        act = Act(1.0, *checks.bounds(clip[0], clip[1], "clip"))
    elif clip is not None:
        bound = checks.number(clip, "clip", "a number, (low, high) or None")
        if not bound >= 0:
            raise ValueError(f"clip must not be negative, but got {bound}")
        act = Act(1.0, -bound, bound)
    outside, centered = checks.boolean(eps_outside, "eps_outside"), checks.boolean(center, "center")
    return Options(checks.epsilon(eps), outside, zero_var == "one", centered, act)


def _per_channel(value: Any, name: str, n_channels: int) -> Doubles:
    """A statistic as (C,) float64 values."""
    a = checks.doubles(value, name)
    if a.shape not in ((), (n_channels,)):
        raise ValueError(
            f"{name} has shape {a.shape}; expected ({n_channels},), the channels of the input, or one number"
        )
    if name == "var" and np.any(a < 0):
        raise ValueError(f"var must not be negative, but got {a[a < 0].flat[0]}")
    return np.array(np.broadcast_to(a, n_channels))


def standardized(
    a: Array, mean: Doubles, var: Doubles, axis: int, how: Options, out: Array | None, dtype: npt.DTypeLike | None
) -> Array:
    """`standardize` of an array that has been checked, by statistics that have been."""
    y_dtype = _result_dtype(a.dtype, out, dtype)
    given, shape = out, a.shape
    out = checks.output(out, shape, y_dtype, "as dtype" if dtype is not None else "as the result")
    if a.ndim == 1:
        a, axis, out = a.reshape(1, -1), 1, None if out is None else out.reshape(1, -1)
    inp = Input(a.view(np.uint8) if a.dtype == np.bool_ else a, axis, None if a.dtype == y_dtype else y_dtype)
    if inp.layout is None:
        return np.empty(shape, y_dtype) if given is None else given
    coef = passes.standard_coefficients(mean if how.centered else None, var, *how[:3])
    y = inp.output(out, inp.x)
    of_bytes = inp.x.dtype.itemsize == 1 and (y_dtype == np.float32 or y_dtype.name == "bfloat16")
    if inp.y_dtype is None or (of_bytes and passes.fits_float32(coef)):
        passes.apply(inp.layout, inp.x, y, coef, False, None, how.clip)
    else:
        passes.convert(inp.layout, inp.x, y, coef, False, how.clip)
    y = copied_into(y, out)
    return y.reshape(shape) if given is None else given


def _result_dtype(x: np.dtype[Any], out: Array | None, dtype: npt.DTypeLike | None) -> np.dtype[Any]:
    wanted: Any = dtype
    if wanted is None and isinstance(out, np.ndarray):
        wanted = out.dtype
    if wanted is None:
        if x.kind not in "biu":
            return x
        return np.dtype(np.float64 if x.itemsize == 4 else np.float32)
    try:
        found = checks.dtype_of(wanted)
    except TypeError:
        found = np.dtype(object)
    native = checks.native_input(found)
    if native is None:
        if dtype is None:
            raise TypeError(f"out has dtype {wanted}; expected {checks.INPUTS}")
        raise TypeError(f"dtype must be {checks.INPUTS}, not {wanted!r}")
    return native


def standardize_running(
    state: Doubles, x: ArrayLike, shape: tuple[int, ...], channel_axis: int | None, how: Options, out: Any, dtype: Any
) -> Array:
    """`standardize` by the state of `RunningMoments`, for observations of `shape` or an array with a channel axis."""
    a = checks.measured_array(x, "input")
    rows = channels.copies(state.reshape(-1))[0].reshape(state.shape)
    with np.errstate(all="ignore"):
        mean, var = rows[1], rows[2] / rows[0]
    if channel_axis is not None:
        axis = checks.axis_index(channel_axis, a.ndim)
        if a.shape[axis : axis + 1] != shape:
            raise ValueError(f"input has shape {a.shape}; expected {shape[0]} features along axis {channel_axis}")
        return standardized(a, mean, var, axis, how, out, dtype)
    n_leading = a.ndim - len(shape)
    if n_leading < 0 or a.shape[n_leading:] != shape:
        expected = ", ".join(["...", *map(str, shape)])
        raise ValueError(f"input has shape {a.shape}; expected ({expected}), observations of shape {shape}")
    flat = (*a.shape[:n_leading], mean.size)
    target = checks.output(out, a.shape, _result_dtype(a.dtype, out, dtype), "as the result")
    if target is not None and target.flags.c_contiguous:
        standardized(a.reshape(flat), mean, var, len(flat) - 1, how, target.reshape(flat), dtype)
        return out  # type: ignore[no-any-return]
    y = standardized(
        a.reshape(flat), mean, var, len(flat) - 1, how, None, dtype or (target if target is None else target.dtype)
    )
    y = y.reshape(a.shape)
    return y if out is None else copied_into(y, out)
