"""Checks of arguments that layers and functions share, with their messages. Nothing here computes or changes anything.

Messages are PyTorch's if PyTorch has one, so that a search for the text finds the known answer. Types are Python's:
ValueError for shapes and values, TypeError for dtypes and kinds of object. Where PyTorch raises RuntimeError, cbn
raises `ArgumentError`, which is a ValueError and a RuntimeError.
"""

import contextlib
import math
import numbers
import operator
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol, SupportsIndex, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T", covariant=True)


class SupportsArray(Protocol):
    """Objects that numpy reads through `__array__`: arrays, their scalars, tensors, data frames."""

    def __array__(self) -> npt.NDArray[Any]: ...


class Nested(Protocol[T]):
    """Nested lists and tuples of values. A str is excluded, because it contains nothing but str."""

    def __len__(self) -> int: ...
    def __contains__(self, value: object, /) -> bool: ...
    def __getitem__(self, index: int, /) -> "T | Nested[T]": ...
    def index(self, value: Any, /) -> int: ...


# As a result or an attribute, `Array | Any` is an array, or None (or a tuple) if the caller asked for that. The caller
# knows which, so that `bn.weight * 2` needs no assertion.
Array = npt.NDArray[Any]
Doubles = npt.NDArray[np.float64]
# numpy's own ArrayLike also accepts str and bytes, which hold no numbers.
ArrayLike: TypeAlias = SupportsArray | Nested[float | SupportsArray]
Number: TypeAlias = float | np.floating[Any] | np.integer[Any]
Activation = Literal["relu"] | tuple[Literal["leaky_relu"], Number] | tuple[Literal["clip"], Number, Number] | None


class Act(NamedTuple):
    """An activation as numbers: min(max(l(a), low), high), where l(a) = a*slope where a <= 0, else a."""

    slope: float = 1.0
    low: float = -math.inf
    high: float = math.inf


NO_ACT, RELU = Act(), Act(0.0)
FLOATS = (np.dtype(np.float32), np.dtype(np.float64))  # of parameters and statistics
INPUTS = "float32, float64, float16 or bfloat16 (of ml_dtypes)"
MEASURED = f"{INPUTS}, or bool, int8, uint8, int16, uint16 or int32"


class ArgumentError(ValueError, RuntimeError):
    """A ValueError that code written for PyTorch's RuntimeError catches too."""


def quantization(x: Array, scale: Any, zero_point: Any, out_dtype: Any) -> tuple[float, int, np.dtype[Any]]:
    """(scale, zero point, dtype of y) of an 8-bit array, whose values stand for scale*(x - zero_point)."""
    if scale is None:
        raise TypeError(f"input has dtype {x.dtype}, whose values need a scale: x_scale=1/255, for example")
    scale = number(scale, "x_scale", "a number")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"x_scale must be finite and positive, but got {scale}")
    zero_point = integer(0 if zero_point is None else zero_point, "x_zero_point", "an integer")
    info = np.iinfo(x.dtype)
    if not info.min <= zero_point <= info.max:
        raise ValueError(f"x_zero_point must be a value of {x.dtype}, but got {zero_point}")
    if out_dtype is None:
        return scale, zero_point, FLOATS[0]
    with contextlib.suppress(TypeError):
        found = dtype_of(out_dtype)
        if found == np.float32 or found.name == "bfloat16":
            return scale, zero_point, found.newbyteorder("=")
    raise TypeError(f"out_dtype must be float32 or bfloat16 (of ml_dtypes), not {out_dtype!r}")


def dtype_of(value: Any) -> np.dtype[Any]:
    """np.dtype(value), which knows bfloat16 by its name where ml_dtypes has been imported."""
    if isinstance(value, str) and value == "bfloat16":
        try:
            import ml_dtypes
        except ImportError as error:
            raise ImportError('bfloat16 needs the ml_dtypes package: pip install "cbn[bfloat16]"') from error
        value = ml_dtypes.bfloat16
    found: np.dtype[Any] = np.dtype(value)
    return found


def array(x: Any, name: str) -> Array:
    """x as an array of any dtype; x itself if it is one. The error for other objects names their type."""
    if type(x) is np.ndarray:
        return x
    unmasked(x, name)
    try:
        a = np.asanyarray(x)
    except MemoryError:
        raise
    except Exception as error:
        if "inhomogeneous" in str(error):
            raise ValueError(f"{name} is a {type(x).__name__} whose parts differ in shape; expected an array") from None
        if getattr(x, "requires_grad", False):
            raise TypeError(
                f"{name} is a {type(x).__name__} that requires grad; expected {variable(name)}.detach()"
            ) from None
        hint = f"; expected {variable(name)}.float(), for example" if "ScalarType BFloat16" in str(error) else ""
        raise TypeError(
            f"{name} is a {type(x).__name__}, which numpy cannot read as an array: {error}{hint}"
        ) from error
    unmasked(a, name)
    if a.ndim == 0 and (a.dtype == object or isinstance(x, (str, bytes))):
        raise TypeError(f"{name} must be an array, not {'None' if x is None else type(x).__name__}{maker(x, name)}")
    return np.asarray(a)


def variable(name: str) -> str:
    """The likely name of the argument in the caller's code."""
    return "x" if name == "input" else name


def maker(x: Any, name: str) -> str:
    """Advice for an object that holds an array which numpy does not read."""
    if callable(getattr(x, "toarray", None)):
        return f"; {variable(name)}.toarray() makes one"
    if callable(getattr(x, "__dlpack__", None)) and not isinstance(x, np.ndarray):
        return f"; numpy.from_dlpack({variable(name)}) makes one"
    return ""


def dtype_error(a: Array, x: Any, name: str, expected: str) -> TypeError:
    """The error for the dtype of a, which was made from x. It advises a conversion only if that keeps the values."""
    words = f"{name} has dtype {a.dtype}; expected {expected}"
    if a.ndim and np.can_cast(a.dtype, np.float32, "same_kind"):
        target = "numpy.float64" if a.dtype.kind == "f" and a.dtype.itemsize > 8 else "numpy.float32"
        given = variable(name)
        words += f", as in {given}.astype({target})" if x is a else f", as in numpy.asarray({given}, {target})"
        if name == "input" and a.dtype in (np.uint8, np.int8):
            words += "; evaluation takes it as it is, with x_scale=1/255, for example"
    elif a.dtype == object:
        strange = [v for v in a.flat if not isinstance(v, numbers.Number)]
        words += f"; it holds objects that are no numbers, such as {reprlib.repr(strange[0])}" if strange else ""
    elif a.dtype == np.dtype("V2"):
        words += "; if numpy.load has read it, it may be bfloat16: x.view(ml_dtypes.bfloat16)"
    elif a.dtype.names:
        words += f"; it is structured, with fields {', '.join(a.dtype.names)}"
    return TypeError(words)


def shape(value: Any) -> tuple[int, ...]:
    """A shape as a tuple of ints, small enough for an array."""
    words = f"shape must be a sequence of integers, as x.shape is, not {reprlib.repr(value)}"
    if isinstance(value, (str, bytes, Mapping)) or not hasattr(value, "__getitem__"):
        raise TypeError(words)
    try:
        sizes = tuple(integer(size, "a size", "an integer") for size in value)
    except TypeError:
        raise TypeError(words) from None
    if min(sizes, default=0) < 0:
        raise ValueError(f"shape must not have negative sizes, but got {sizes}")
    if math.prod(filter(None, sizes)) >= 1 << 60:
        raise ValueError(f"shape {sizes} has more elements than memory can have")
    return sizes


def other_axis(x: Array, n_channels: int) -> str:
    """An addition to PyTorch's message if another axis of x has that number of channels; else nothing."""
    if n_channels not in x.shape:
        return ""
    axis = x.ndim - 1 - x.shape[::-1].index(n_channels)
    meant = -1 if axis == x.ndim - 1 else axis
    return f"; input has shape {x.shape}, whose axis {axis} has {n_channels}: channel_axis={meant}?"


def native_float(dtype: np.dtype[Any]) -> np.dtype[Any] | None:
    """The dtype in native byte order if it is float32 or float64, else None."""
    return next((f for f in FLOATS if dtype.kind == "f" and dtype.itemsize == f.itemsize), None)


def native_input(dtype: np.dtype[Any]) -> np.dtype[Any] | None:
    """The dtype in native byte order if it is float16, bfloat16 of ml_dtypes, float32 or float64, else None."""
    if dtype.itemsize == 2 and (dtype.kind == "f" or dtype.name == "bfloat16"):
        return dtype.newbyteorder("=")
    return native_float(dtype)


def native_measured(dtype: np.dtype[Any]) -> np.dtype[Any] | None:
    """The dtype in native byte order if `moments` takes it, else None."""
    if dtype.kind == "b" or (dtype.kind in "iu" and (dtype.itemsize <= 2 or dtype == np.int32)):
        return dtype.newbyteorder("=")
    return native_input(dtype)


def native_bytes(dtype: np.dtype[Any]) -> np.dtype[Any] | None:
    """The dtype if it is an 8-bit integer, else None."""
    return dtype if dtype.kind in "iu" and dtype.itemsize == 1 else None


def parameter_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype of parameters for inputs of this dtype: the same, but at least float32."""
    return FLOATS[0] if dtype.itemsize == 2 else dtype


def gradient_dtype(x: Array, weight: Array | None) -> np.dtype[Any]:
    """The dtype of the gradients of weight and bias: weight's, or without a weight that of parameters for x."""
    return parameter_dtype(x.dtype) if weight is None else weight.dtype.newbyteorder("=")


def integer(value: Any, name: str, expected: str) -> int:
    """value as a 64-bit int; bools and other types are refused."""
    if not isinstance(value, (bool, np.bool_)):
        try:
            found = operator.index(value)
        except TypeError:
            pass
        else:
            if not -(1 << 63) <= found < 1 << 63:
                raise ValueError(f"{name} must be {expected} of 64 bits, but got one of {found.bit_length()}")
            return found
    raise TypeError(f"{name} must be {expected}, not {value!r}")


def boolean(value: Any, name: str) -> bool:
    """value as a bool; anything else is refused."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be a bool, not {value!r}")
    return bool(value)


def unmasked(a: Any, name: str) -> None:
    """Refuse a masked array, or a list of masked arrays: cbn would ignore the mask."""
    if type(a) in (list, tuple):
        for part in a[:0] if a and isinstance(a[0], (float, int)) else a:  # not number by number
            unmasked(part, name)
    elif isinstance(a, np.ma.MaskedArray):
        raise TypeError(
            f"{name} is a masked array, which cbn does not support: its mask would be ignored. "
            "Expected a plain float32 or float64 array, for example x.filled(0)"
        )


def float_array(x: ArrayLike, name: str) -> Array:
    """x as an aligned floating array in native byte order, copied only if needed."""
    return _readable(array(x, name), x, name, native_input, INPUTS)


def _readable(
    given: Array, x: Any, name: str, native: Callable[[np.dtype[Any]], np.dtype[Any] | None], expected: str
) -> Array:
    """What was made of x, aligned and of the dtype that `native` makes of its own; None is an error."""
    # A view of our own: the caller may change shape or dtype of the array object in place
    a = given.view()
    dtype = native(a.dtype)
    if dtype is None:
        raise dtype_error(given, x, name, expected)
    return a if a.flags.aligned and a.dtype.isnative else a.astype(dtype, order="K", copy=True)


def measured_array(x: ArrayLike, name: str) -> Array:
    """x as an aligned array of floats or of integers that `moments` adds up exactly, in native byte order."""
    return _readable(array(x, name), x, name, native_measured, MEASURED)


def mask(a: ArrayLike, shape: tuple[int, ...], axis: int) -> Array:
    """A bool mask with the dimensions of an input, of length 1 along the channel axis if it is for all channels."""
    found = array(a, "mask")
    if found.dtype != np.bool_:
        raise TypeError(f"mask has dtype {found.dtype}; expected bool, True for the values that count")
    without = shape[:axis] + shape[axis + 1 :]
    for target, of_all in ((without, True), (shape, False)):
        try:
            counts = np.broadcast_to(found, target)
        except ValueError:
            continue
        if of_all:
            return np.expand_dims(counts, axis)
        if found.ndim == len(shape) and found.shape[axis] == 1:
            return np.take(counts, [0], axis)
        return counts
    raise ValueError(
        f"mask has shape {found.shape}, which broadcasts neither to {without}, the input without its channels, nor to "
        f"{shape}, the input"
    )


def sample_weights(a: ArrayLike, shape: tuple[int, ...], axis: int, name: str = "weights") -> Doubles:
    """Weights (N,) of samples, with the dimensions of an input; samples lie along its first axis but the channels'."""
    samples = 1 if axis == 0 else 0
    found = doubles(a, name)
    if found.shape != (shape[samples],):
        raise ValueError(f"{name} has shape {found.shape}; expected ({shape[samples]},), one for each sample")
    if not np.all((found >= 0) & np.isfinite(found)):
        wrong = found[~((found >= 0) & np.isfinite(found))][0]
        raise ValueError(f"{name} must be finite and not negative, but got {wrong}")
    return found.reshape([-1 if i == samples else 1 for i in range(len(shape))])


def lengths(a: ArrayLike, shape: tuple[int, ...], axis: int) -> tuple[Array, int]:
    """How many values of each sample count, along the first axis after the samples', and that axis."""
    rest = [i for i in range(len(shape)) if i != axis]
    if len(rest) < 2:
        raise ValueError(f"lengths are for inputs with an axis after the samples, and input has shape {shape}")
    samples, along = rest[:2]
    found = array(a, "lengths")
    if found.dtype.kind not in "iu":
        raise TypeError(f"lengths has dtype {found.dtype}; expected integers")
    if found.shape != (shape[samples],):
        raise ValueError(f"lengths has shape {found.shape}; expected ({shape[samples]},), one for each sample")
    wrong = np.flatnonzero((found < 0) | (found > shape[along]))
    if wrong.size:
        raise ValueError(f"lengths must be from 0 to {shape[along]}, but got {found[wrong[0]]} for sample {wrong[0]}")
    return found.astype(np.intp), along


def doubles(x: Any, name: str) -> Doubles:
    """A copy of numbers as float64."""
    a = array(x, name)
    if not np.can_cast(a.dtype, np.float64, "same_kind"):
        raise dtype_error(a, x, name, "numbers")
    return np.array(a, dtype=np.float64)


def axis_index(channel_axis: SupportsIndex, ndim: int) -> int:
    """The channel axis as an index from 0."""
    if type(channel_axis) is int and -ndim <= channel_axis < ndim:
        return channel_axis % ndim  # the common case
    axis = integer(channel_axis, "channel_axis", "an integer")
    if not -ndim <= axis < ndim:
        raise ValueError(f"channel_axis {axis} is out of range for an input of {ndim} dimensions")
    return axis % ndim


def rank(x: Array, ranks: tuple[int, ...] | None) -> None:
    """Refuse an input whose number of dimensions is not in `ranks`; None: 2 or more."""
    if ranks is None:
        if x.ndim < 2:
            raise ValueError(f"expected at least 2D input (got {x.ndim}D input)")
    elif x.ndim not in ranks:
        expected = " or ".join(f"{r}D" for r in ranks)
        raise ValueError(f"expected {expected} input (got {x.ndim}D input)")


def output(
    out: Array | None, shape: tuple[int, ...], dtype: np.dtype[Any], expected: str = "as the input"
) -> Array | Any:
    """Refuse an `out` that is not a writable array of exactly this shape and dtype; None passes.

    Returns a view: a subclass may misstate its shape, and the caller's object may change its own.
    """
    if out is None:
        return None
    if type(out) is np.ndarray:
        view = out.view()
        if view.dtype is dtype and view.shape == shape and view.flags.writeable:
            return view  # the common case
    if not isinstance(out, np.ndarray) or isinstance(out, np.ma.MaskedArray):
        raise TypeError(f"out must be a numpy array, not {type(out).__name__}")
    out = np.ndarray.view(out, np.ndarray)
    if out.dtype != dtype or not out.dtype.isnative:
        raise TypeError(f"out has dtype {out.dtype.str!r}; expected {dtype.str!r}, {expected} ({dtype})")
    if out.shape != shape:
        raise ValueError(f"out has shape {out.shape}; expected {shape}, as the input")
    if not out.flags.writeable:
        raise ValueError("out is read-only")
    return out


def per_channel(
    a: ArrayLike | None, name: str, n_channels: int, *, written: bool = False, x: Array | None = None
) -> Array | Any:
    """Refuse a parameter or statistic that is no (C,) float array; None passes. Returns it as an array.

    It may be a 16-bit array if it is only read, because the caller computes with float64 copies.
    """
    if a is None:
        return None
    if type(a) is np.ndarray and a.shape == (n_channels,) and a.dtype in FLOATS and (not written or a.flags.writeable):
        return a  # the common case
    unmasked(a, name)
    if written and not isinstance(a, np.ndarray):
        raise TypeError(f"{name} is updated in place and must be a numpy array, not {type(a).__name__}")
    given, a = a, array(a, name)
    if (native_float if written else native_input)(a.dtype) is None:
        raise dtype_error(a, given, name, "float32 or float64" if written else INPUTS)
    if a.size != n_channels:
        hint = "" if x is None else other_axis(x, a.size)
        raise ArgumentError(f"{name} should contain {n_channels} elements not {a.size}{hint}")
    if a.ndim != 1:
        raise ValueError(f"{name} has shape {a.shape}; expected ({n_channels},)")
    if written and not a.flags.writeable:
        raise ValueError(f"{name} is read-only, but has to be updated")
    return a


def buffers_for_batch(running_mean: ArrayLike | None, running_var: ArrayLike | None) -> None:
    """Refuse one running buffer without the other, for a call that uses batch statistics."""
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")


def buffers_for_eval(running_mean: ArrayLike | None, running_var: ArrayLike | None) -> None:
    """Refuse a call that normalizes with running statistics if there are none."""
    if running_mean is None:
        raise ArgumentError("running_mean must be defined in evaluation mode")
    if running_var is None:
        raise ArgumentError("running_var must be defined in evaluation mode")


def number(value: Any, name: str, expected: str) -> float:
    """value as a float; bools and other types are refused."""
    if type(value) is float:
        return value  # the common case
    if isinstance(value, (bool, np.bool_, str, bytes)) or (hasattr(value, "ndim") and value.ndim):
        raise TypeError(f"{name} must be {expected}, not {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be {expected} that float64 holds, but got one beyond 1.8e308") from None
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be {expected}, not {value!r}") from None


def epsilon(eps: Number) -> float:
    """eps as a finite float that is not negative."""
    eps = number(eps, "eps", "a number")
    if not math.isfinite(eps) or eps < 0:
        raise ValueError(f"eps must be finite and non-negative, but got {eps}")
    return eps


def epsilon_for(eps: Number, batch_statistics: bool) -> float:
    """eps as a float; batch statistics, whose variance may be 0, need a positive one."""
    value = number(eps, "eps", "a number")
    if batch_statistics and value <= 0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {value}")
    if value < 0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {value}")
    return epsilon(value)


def momentum_fraction(momentum: Number) -> float:
    """momentum as a float in [0, 1]."""
    momentum = number(momentum, "momentum", "a number in [0, 1]")
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be in [0, 1] (the weight of the new batch), but got {momentum}")
    return momentum


def activation(value: Any) -> Act:
    """An activation as numbers."""
    if value is None:
        return NO_ACT
    if isinstance(value, str) and value == "relu":
        return RELU
    expected = "None, 'relu', ('leaky_relu', slope) or ('clip', low, high)"
    named = isinstance(value, (tuple, list)) and len(value) > 1 and isinstance(value[0], str)
    if named and value[0] == "leaky_relu" and len(value) == 2:
        slope = number(value[1], "the slope of leaky_relu", "a number")
        if not abs(slope) <= float(np.finfo(np.float32).max):
            raise ValueError(f"the slope of leaky_relu must be finite, in float32 too, but got {slope}")
        return Act(slope)
    if named and value[0] == "clip" and len(value) == 3:
        return Act(1.0, *bounds(value[1], value[2], "clip"))
    error = ValueError if isinstance(value, (str, tuple, list)) else TypeError
    raise error(f"activation must be {expected}, not {value!r}")


def renorm(value: Any) -> tuple[float, float] | None:
    """The bounds (r_max, d_max) of batch renormalization."""
    if value is None:
        return None
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"renorm must be None, a pair (r_max, d_max) or a function that returns one, not {value!r}")
    r_max, d_max = number(value[0], "r_max of renorm", "a number"), number(value[1], "d_max of renorm", "a number")
    if not (r_max >= 1 and d_max >= 0):
        raise ValueError(f"renorm must have r_max >= 1 and d_max >= 0, but got {r_max} and {d_max}")
    return r_max, d_max


def mix(value: Any) -> float:
    """The weight of the batch in a mixture of statistics."""
    a = number(value, "mix", "a number")
    if not 0 <= a <= 1:
        raise ValueError(f"mix must be between 0 and 1, but got {a}")
    return a


def bounds(low: Any, high: Any, name: str) -> tuple[float, float]:
    """The bounds of a clip as floats; they may be infinite."""
    low, high = (
        number(low, f"the lower bound of {name}", "a number"),
        number(high, f"the upper bound of {name}", "a number"),
    )
    if not low <= high:
        raise ValueError(f"the bounds of {name} must be in order, low <= high, but got {low} and {high}")
    return low, high


def residual(a: ArrayLike | None, x: Array, dtype: np.dtype[Any], expected: str = "as the input") -> Array | Any:
    """Refuse a residual of another shape than x or another dtype than this one; None passes."""
    if a is None:
        return None
    a = float_array(a, "residual")
    if a.dtype != dtype:
        raise TypeError(f"residual has dtype {a.dtype}; expected {dtype}, {expected}")
    if a.shape != x.shape:
        raise ValueError(f"residual has shape {a.shape}; expected {x.shape}, as the input")
    return a


def more_than_one_value(x: Array, n_channels: int) -> None:
    """Refuse a batch with one value per channel: its variance is 0, and its output is the bias."""
    if x.size == n_channels and n_channels:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")


def channel_list(indices: Array, most: int = 10) -> str:
    """Channels by index, as in "channels 3, 5 and 9"; of more than `most` the first ones and how many follow."""
    numbers = [str(i) for i in indices[:most]]
    rest = len(indices) - most
    if rest > 0:
        return f"channels {', '.join(numbers)} and {rest} more"
    if len(numbers) == 1:
        return f"channel {numbers[0]}"
    return f"channels {', '.join(numbers[:-1])} and {numbers[-1]}"
