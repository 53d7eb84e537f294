"""Moments: count, mean and sum of squared distances per channel, which merge exactly."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from . import checks
from .checks import ArrayLike, Doubles, Number
from .inputs import Input, as_measured, as_weights
from .kernels import arrays, passes, running
from .masked import Selection

__all__ = ["Moments", "moments"]

MOST_INT32 = 1 << 32  # values of int32 whose sum 64 bits hold
# Of moments as bytes, all little-endian: magic, version, whether there are extremes, 0, channels, CRC-32 of the rows.
# Then the rows, float64: count, mean, m2, what float64 lacks of the mean, and min and max
HEAD = struct.Struct("<4sBBHQI")
MAGIC, VERSION = b"cbnM", 1


@dataclass(frozen=True, eq=False, repr=False)
class Moments:
    """Count, mean and sum of squared distances of every channel: statistics that merge.

    ``a + b``, `merge` and ``sum`` of a list merge the statistics of several parts of the data.

    Parameters
    ----------
    count : array_like
        Values per channel, or the sum of their weights; one number is for all channels.
    mean : (C,) array_like
        Mean of every channel.
    m2 : (C,) array_like
        ``sum((x - mean)**2)`` of every channel.
    min, max : (C,) array_like, optional
        Smallest and largest value of every channel: both or neither.

    Attributes
    ----------
    count, mean, m2 : (C,) float64 ndarray
        The same, as arrays.
    min, max : (C,) float64 ndarray or None
        The same. A channel without values has infinity as its smallest and -infinity as its largest one.

    Notes
    -----
    Moments merge without their data (Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing
    sample variances", 1979), with delta = mean_b - mean_a and n = n_a + n_b::

        mean = mean_a + delta*n_b/n
        m2   = m2_a + m2_b + delta^2*n_a*n_b/n

    A mean that was measured keeps the digits that float64 does not hold, so that the distance of two means, and with it
    the variance, loses none. Extremes survive a merge if both sides have them.

    Examples
    --------
    >>> import numpy as np
    >>> import cbn
    >>> x = np.array([[0.0, 1.0], [4.0, 1.0], [8.0, 4.0]])
    >>> cbn.moments(x[:2]) + cbn.moments(x[2:])
    Moments(count=array([3., 3.]), mean=array([4., 2.]), m2=array([32.,  6.]))
    >>> sum([cbn.moments(x[:1]), cbn.moments(x[1:2]), cbn.moments(x[2:])]).var()
    array([10.66666667,  2.        ])
    """

    count: npt.NDArray[np.float64]
    mean: npt.NDArray[np.float64]
    m2: npt.NDArray[np.float64]
    min: npt.NDArray[np.float64] | Any
    max: npt.NDArray[np.float64] | Any
    _low: npt.NDArray[np.float64]

    def __init__(
        self,
        count: ArrayLike | Number,
        mean: ArrayLike,
        m2: ArrayLike,
        min: ArrayLike | None = None,
        max: ArrayLike | None = None,
    ) -> None:
        mean = checks.doubles(mean, "mean")
        if mean.ndim != 1:
            raise ValueError(f"mean has shape {mean.shape}; expected (C,)")
        m2 = checks.doubles(m2, "m2")
        if m2.shape != mean.shape:
            raise ValueError(f"m2 has shape {m2.shape}; expected {mean.shape}, as mean")
        count = checks.doubles(count, "count")
        if count.shape not in ((), mean.shape):
            raise ValueError(f"count has shape {count.shape}; expected {mean.shape}, as mean, or one number")
        if not np.all(count >= 0):
            raise ValueError("count must not be negative")
        if np.any(m2 < 0):
            raise ValueError("m2 must not be negative")
        if (min is None) != (max is None):
            raise ValueError("min and max must either both be None or neither be None")
        extremes = []
        for name, value in (("min", min), ("max", max)):
            extreme = None if value is None else checks.doubles(value, name)
            if extreme is not None and extreme.shape != mean.shape:
                raise ValueError(f"{name} has shape {extreme.shape}; expected {mean.shape}, as mean")
            extremes.append(extreme)
        self._set(np.array(np.broadcast_to(count, mean.shape)), mean, m2, np.zeros(mean.shape), *extremes)

    def _set(self, count: Doubles, mean: Doubles, m2: Doubles, low: Doubles, min: Any, max: Any) -> None:
        self.__dict__.update(count=count, mean=mean, m2=m2, _low=low, min=min, max=max)  # of a frozen object

    @classmethod
    def _of(
        cls,
        count: float | Doubles,
        mean: Doubles,
        m2: Doubles,
        low: Doubles | None = None,
        min: Doubles | Any = None,
        max: Doubles | Any = None,
    ) -> Moments:
        """Moments from arrays of our own, without checks and copies; `low` is what float64 lacks of the mean."""
        self = cls.__new__(cls)
        if not isinstance(count, np.ndarray):
            count = np.full(mean.shape, float(count))
        self._set(count, mean, m2, np.zeros(mean.shape) if low is None else low, min, max)
        return self

    @property
    def _rows(self) -> tuple[Doubles, Doubles, Doubles, Doubles]:
        return self.count, self.mean, self.m2, self._low

    def __repr__(self) -> str:
        parts = [f"count={self.count!r}", f"mean={self.mean!r}", f"m2={self.m2!r}"]
        if self.min is not None:
            parts += [f"min={self.min!r}", f"max={self.max!r}"]
        return f"{type(self).__name__}({', '.join(parts)})"

    def to_bytes(self) -> bytes:
        """All of it as bytes, for a file, a message or a collector; equal moments give equal bytes.

        Returns
        -------
        bytes
            20 bytes, and 32 for each channel, or 48 with extremes. `from_bytes` reads them on any machine.

        Examples
        --------
        >>> import numpy as np
        >>> import cbn
        >>> m = cbn.moments(np.array([[0.0, 1.0], [4.0, 1.0]]))
        >>> cbn.Moments.from_bytes(m.to_bytes())
        Moments(count=array([2., 2.]), mean=array([2., 1.]), m2=array([8., 0.]))
        """
        rows = [*self._rows] if self.min is None else [*self._rows, self.min, self.max]
        content = np.stack(rows).astype("<f8").tobytes()
        return HEAD.pack(MAGIC, VERSION, self.min is not None, 0, self.mean.size, zlib.crc32(content)) + content

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview, *, allow_nonfinite: bool = False) -> Moments:
        """The moments that `to_bytes` made bytes of; runs no code of theirs, and believes nothing.

        Parameters
        ----------
        data : bytes-like
            From `to_bytes`, of this or an older version.
        allow_nonfinite : bool
            Whether count, mean and m2 may be NaN or infinite, as those of data with NaN are. One such part spoils all
            that it is merged with.

        Returns
        -------
        Moments

        Raises
        ------
        TypeError
            If data is not bytes-like.
        ValueError
            If the bytes are cut, longer, damaged or of a newer version, or are not the moments of any data: a negative
            count or m2, extremes between which the mean is not.
        """
        try:
            view = memoryview(data).cast("B")
        except TypeError:
            raise TypeError(f"data must be bytes-like and contiguous, not {type(data).__name__}") from None
        if view.nbytes < HEAD.size or bytes(view[:4]) != MAGIC:
            raise ValueError(f"the {view.nbytes} bytes do not begin as those of Moments.to_bytes do")
        _, version, extremes, zero, n_channels, crc = HEAD.unpack_from(view)
        if version != VERSION or extremes > 1 or zero != 0:
            raise ValueError(f"these are moments of version {version}, and this version of cbn reads {VERSION}")
        expected = HEAD.size + (6 if extremes else 4) * 8 * n_channels
        if view.nbytes != expected:
            raise ValueError(f"moments of {n_channels} channels have {expected} bytes, but there are {view.nbytes}")
        content = view[HEAD.size :]
        if zlib.crc32(content) != crc:
            raise ValueError("the bytes are damaged: their checksum is another one")
        rows = np.frombuffer(content, "<f8").reshape(6 if extremes else 4, n_channels).astype(np.float64)
        found = cls._of(*(row.copy() for row in rows))
        _refuse_impossible(found, checks.boolean(allow_nonfinite, "allow_nonfinite"))
        return found

    def var(self, correction: Number = 0) -> npt.NDArray[np.float64]:
        """Variance ``m2 / (count - correction)``: biased with 0, unbiased with 1; NaN if count is too small."""
        return running.variance(self.count, self.m2, checks.number(correction, "correction", "a number"))

    def std(self, correction: Number = 0) -> npt.NDArray[np.float64]:
        """Square root of the variance."""
        return np.sqrt(self.var(correction))

    def __radd__(self, other: Any) -> Moments:
        """Add 0, with which the sum of a list begins."""
        return self if type(other) is int and other == 0 else NotImplemented

    def __add__(self, other: Moments) -> Moments:
        if not isinstance(other, Moments):
            return NotImplemented
        if other.mean.shape != self.mean.shape:
            raise ValueError(f"moments of {self.mean.size} and of {other.mean.size} channels cannot be merged")
        merged = passes.merge_moments(self._rows, other._rows)
        if self.min is None or other.min is None:
            return Moments._of(*merged)
        return Moments._of(*merged, np.minimum(self.min, other.min), np.maximum(self.max, other.max))

    def _with_part(self, other: Moments, channels: slice) -> Moments:
        """Merged with what some of the channels have elsewhere; neither changes."""
        count, mean, m2, low = rows = [row.copy() for row in self._rows]
        extremes = () if self.min is None else (self.min.copy(), self.max.copy())
        own = (count[channels], mean[channels], m2[channels], low[channels])
        for row, new in zip(rows, passes.merge_moments(own, other._rows), strict=True):
            row[channels] = new
        for row, new, better in zip(extremes, (other.min, other.max), (np.minimum, np.maximum), strict=False):
            row[channels] = better(row[channels], new)
        return Moments._of(*rows, *extremes)

    @classmethod
    def merge(cls, parts: Iterable[Moments]) -> Moments:
        """Merge any number of moments, at least one, in the order given."""
        if isinstance(parts, Moments) or not isinstance(parts, Iterable):
            raise TypeError(f"parts must be several Moments, as a list has them, not {type(parts).__name__}")
        parts = list(parts)
        if not parts:
            raise ValueError("there are no moments to merge")
        for part in parts:
            if not isinstance(part, Moments):
                raise TypeError(f"expected Moments, not {type(part).__name__}")
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total


def _refuse_impossible(m: Moments, allow_nonfinite: bool) -> None:
    """Refuse what no data have. NaN compares as False, so what is asked for is what would be wrong."""
    finite = np.isfinite(m.count) & np.isfinite(m.mean) & np.isfinite(m.m2)
    with np.errstate(invalid="ignore"):
        wrong = {
            "a negative count": m.count < 0,
            "a negative m2": m.m2 < 0,
            "a mean with more digits than it can have": finite & ~(m.mean + m._low == m.mean),
        }
        if m.min is not None:
            rounding = 1e-12 * (np.abs(m.min) + np.abs(m.max))
            inside = (m.min - rounding <= m.mean) & (m.mean <= m.max + rounding)
            wrong["a mean outside of min and max"] = finite & (m.count > 0) & ~inside
    if not allow_nonfinite:
        wrong["a value that is not finite (allow_nonfinite=True takes it)"] = ~finite
    for what, bad in wrong.items():
        if bad.any():
            raise ValueError(f"the bytes hold {what} in {checks.channel_list(np.flatnonzero(bad))}")


@dataclass(frozen=True, eq=False)
class GradMoments:
    """Sums for a gradient through batch statistics. Those of several parts add up.

    They are S(dh) and S(dh*(x - mean)) over `count` values of each channel. dh is the gradient of the activation's
    input, and mean is the mean of all parts, which normalized.

    Attributes
    ----------
    count, sum_dh, sum_dh_xmu : (C,) float64 ndarray
    """

    count: npt.NDArray[np.float64]
    sum_dh: npt.NDArray[np.float64]
    sum_dh_xmu: npt.NDArray[np.float64]

    def __add__(self, other: GradMoments) -> GradMoments:
        if not isinstance(other, GradMoments):
            return NotImplemented
        with np.errstate(all="ignore"):
            return GradMoments(self.count + other.count, self.sum_dh + other.sum_dh, self.sum_dh_xmu + other.sum_dh_xmu)


def moments(
    x: ArrayLike,
    *,
    channel_axis: SupportsIndex = 1,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    skipna: bool = False,
    extrema: bool = False,
) -> Moments:
    """Measure every channel of an array in one pass.

    Parameters
    ----------
    x : array_like
        Array with two or more dimensions and any strides; float32, float64, float16 or bfloat16, or bool, int8, uint8,
        int16, uint16 or int32. It may be empty.
    channel_axis : int
        Axis with the channels.
    mask : bool array_like, optional
        True for the values that count: one for every value of all channels, with a shape that broadcasts to that of x
        without its channel axis, or else one that broadcasts to that of x.
    weights : (N,) array_like, optional
        Weights of the samples, finite and not negative. Samples lie along the first axis of x, or the second one if the
        channels have the first. Integers with weights other than 1 are copied as float64.
    skipna : bool
        Whether NaN are missing values, each in its channel. Infinities are values.
    extrema : bool
        Whether to find the smallest and the largest value of every channel too.

    Returns
    -------
    Moments
        Count, mean and m2, in float64 for every type of x, and with `extrema` min and max.

    Raises
    ------
    TypeError, ValueError
        For another dtype, fewer dimensions, an axis out of range, a mask that is not bool or does not broadcast, and
        for weights of another shape, negative or not finite ones.

    See Also
    --------
    cbn.outofcore.moments : of an array larger than memory.
    RunningMoments : of a stream.

    Notes
    -----
    With weights w (1, or 0 where the mask is False or, with `skipna`, x is NaN) of the values x of a channel::

        count = sum(w)
        mean  = sum(w*x)/count
        m2    = sum(w*(x - mean)^2)

    A value of weight 0 is not read into any result. Without `skipna` a NaN makes mean, m2, min and max NaN, as numpy
    has it. Where nothing counts, mean and m2 are 0, min is infinity and max is -infinity, which merges right.
    Sums of integers are exact: without weights, mean and m2 are the exact quotients, rounded once. What the sums of
    floats are, and a bound of their error, is in the page Numerics.

    Examples
    --------
    >>> import numpy as np
    >>> import cbn
    >>> cbn.moments(np.array([[1.0, 2.0, 6.0]]), channel_axis=0)
    Moments(count=array([3.]), mean=array([3.]), m2=array([14.]))
    >>> x = np.array([[1.0, 5.0], [np.nan, 7.0], [3.0, 0.0]])
    >>> m = cbn.moments(x, mask=[True, True, False], skipna=True, extrema=True)
    >>> m.count, m.mean, m.max
    (array([1., 2.]), array([1., 6.]), array([1., 7.]))
    """
    if mask is None and weights is None:
        found = running.moments(x, channel_axis, skipna, extrema)
        if found is not None:
            return Moments._of(*found)
    inp = as_measured(x, channel_axis)
    return measure(
        inp, as_weights(inp, mask, weights), checks.boolean(skipna, "skipna"), checks.boolean(extrema, "extrema")
    )


def measure(
    inp: Input,
    weights: Doubles | Any = None,
    skipna: bool = False,
    extrema: bool = False,
    selection: Selection | None = None,
) -> Moments:
    """The moments of a checked input; `weights` as `as_weights` makes them, or a `selection` of floats."""
    shape = (inp.n_channels,)
    if inp.layout is None:
        extremes = (np.full(shape, np.inf), np.full(shape, -np.inf)) if extrema else (None, None)
        return Moments._of(0, *np.zeros((3, *shape)), *extremes)
    if selection is not None:
        return Moments._of(selection.counts, *passes.moments(inp.layout, inp.x, selection=selection))
    integers = inp.x.dtype.kind in "biu"
    if inp.x.dtype == np.int32 and inp.count > MOST_INT32:
        return _measure_halves(inp, weights, extrema)
    if integers and weights is not None:
        return _measure_weighted_integers(inp, weights, extrema)
    count: Doubles | Any = None
    of_values: Doubles | Any = None
    if weights is not None:
        count, of_values = _ordered(inp, weights)
    elif skipna and not integers:
        count = np.empty(shape)
    if count is None and not extrema:
        return Moments._of(inp.count, *passes.moments(inp.layout, inp.x))
    found = passes.moments(inp.layout, inp.x, skipna, of_values, count, extrema)
    return Moments._of(inp.count if count is None else count, *found)


def _measure_halves(inp: Input, weights: Doubles | Any, extrema: bool) -> Moments:
    """Both halves of an array by themselves, merged."""
    sizes = [0 if axis == inp.axis else size for axis, size in enumerate(inp.x.shape)]
    axis = int(np.argmax(sizes))
    full = None if weights is None else np.broadcast_to(weights, np.broadcast_shapes(weights.shape, inp.x.shape))
    halves = []
    for part in (slice(None, sizes[axis] // 2), slice(sizes[axis] // 2, None)):
        at = (slice(None),) * axis + (part,)
        halves.append(measure(Input(inp.x[at], inp.axis), None if full is None else full[at], False, extrema))
    return halves[0] + halves[1]


def _ordered(inp: Input, weights: Doubles) -> tuple[Doubles, Doubles]:
    """The sums of the weights of every channel, and the weights in the order of the layout."""
    per_channel = weights.shape[inp.axis] != 1
    shape = [1 if axis == inp.axis and not per_channel else size for axis, size in enumerate(inp.x.shape)]
    rest = tuple(axis for axis in range(inp.x.ndim) if axis != inp.axis)
    full = np.broadcast_to(weights, shape)
    count = full.sum(axis=rest)
    in_memory = inp.layout.order
    order = [axis for axis in rest if axis not in in_memory] + in_memory
    return np.array(np.broadcast_to(count, inp.n_channels)), np.ascontiguousarray(full.transpose(order)).reshape(-1)


def _measure_weighted_integers(inp: Input, weights: Doubles, extrema: bool) -> Moments:
    """Exact sums if the weights are 0 and 1, of x with zeros in the place of what does not count; else as float64."""
    if not np.all((weights == 0) | (weights == 1)):
        return measure(Input(arrays.with_room(inp.x.astype, np.float64), inp.axis), weights, False, extrema)
    counts = np.broadcast_to(weights != 0, inp.x.shape)
    rest = tuple(axis for axis in range(inp.x.ndim) if axis != inp.axis)
    some = Input(arrays.with_room(np.where, counts, inp.x, inp.x.dtype.type(0)), inp.axis)
    count = counts.sum(axis=rest, dtype=np.float64)
    found = passes.moments(some.layout, some.x, count=count)[:3]
    if not extrema:
        return Moments._of(count, *found)
    info = (0, 1) if inp.x.dtype == np.bool_ else (np.iinfo(inp.x.dtype).min, np.iinfo(inp.x.dtype).max)
    least = inp.x.min(axis=rest, where=counts, initial=info[1]).astype(np.float64)
    largest = inp.x.max(axis=rest, where=counts, initial=info[0]).astype(np.float64)
    least[count == 0], largest[count == 0] = np.inf, -np.inf
    return Moments._of(count, *found, least, largest)
