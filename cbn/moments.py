"""Moments: count, mean and sum of squared distances per channel, which merge exactly."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from . import checks
from .checks import ArrayLike, Doubles, Number
from .inputs import Input, as_input
from .kernels import passes

__all__ = ["Moments", "moments"]


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and sum of squared distances of every channel: statistics that merge.

    ``a + b``, `merge` and ``sum`` of a list merge the statistics of several parts of the data.

    Parameters
    ----------
    count : array_like
        Values per channel; one number is for all channels.
    mean : (C,) array_like
        Mean of every channel.
    m2 : (C,) array_like
        ``sum((x - mean)**2)`` of every channel.

    Attributes
    ----------
    count, mean, m2 : (C,) float64 ndarray
        The same, as arrays.

    Notes
    -----
    Moments merge without their data (Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing
    sample variances", 1979), with delta = mean_b - mean_a and n = n_a + n_b::

        mean = mean_a + delta*n_b/n
        m2   = m2_a + m2_b + delta^2*n_a*n_b/n

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

    def __init__(self, count: ArrayLike | Number, mean: ArrayLike, m2: ArrayLike) -> None:
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
        for name, value in (("count", np.array(np.broadcast_to(count, mean.shape))), ("mean", mean), ("m2", m2)):
            object.__setattr__(self, name, value)

    @classmethod
    def _of(cls, count: float | Doubles, mean: Doubles, m2: Doubles) -> Moments:
        """Moments from arrays of our own, without checks and copies."""
        self = cls.__new__(cls)
        if not isinstance(count, np.ndarray):
            count = np.full(mean.shape, float(count))
        for name, value in (("count", count), ("mean", mean), ("m2", m2)):
            object.__setattr__(self, name, value)
        return self

    def var(self, correction: Number = 0) -> npt.NDArray[np.float64]:
        """Variance ``m2 / (count - correction)``: biased with 0, unbiased with 1; NaN if count is too small."""
        n = self.count - correction
        with np.errstate(all="ignore"):
            return np.where(n > 0, self.m2 / n, np.nan)

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
        n = self.count + other.count
        with np.errstate(all="ignore"):
            # The mean of the larger side moves less. An infinite mean has no distance to another: the plain average
            # gives the mean of all values.
            larger = self.count >= other.count
            base, rest = np.where(larger, self.mean, other.mean), np.where(larger, other.mean, self.mean)
            n_rest = np.where(larger, other.count, self.count)
            share = np.where(n > 0, n_rest / n, 0.0)
            delta = rest - base
            plain = (self.mean * self.count + other.mean * other.count) / n
            mean = np.where(np.isfinite(delta), base + delta * share, plain)
            m2 = self.m2 + other.m2 + delta * delta * (n - n_rest) * share
        # If one side is empty the other passes unchanged, whatever the empty side's mean is.
        mean = np.where(other.count == 0, self.mean, np.where(self.count == 0, other.mean, mean))
        m2 = np.where(other.count == 0, self.m2, np.where(self.count == 0, other.m2, m2))
        return Moments(n, mean, m2)

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


def moments(x: ArrayLike, *, channel_axis: SupportsIndex = 1) -> Moments:
    """Measure every channel of an array.

    Parameters
    ----------
    x : array_like
        Array with two or more dimensions and any strides; float32, float64, float16 or bfloat16. It may be empty.
    channel_axis : int
        Axis with the channels.

    Returns
    -------
    Moments
        Count, mean and m2, in float64 for every type of x.

    Raises
    ------
    TypeError, ValueError
        For another dtype, fewer dimensions, or an axis out of range.

    Examples
    --------
    >>> import numpy as np
    >>> import cbn
    >>> cbn.moments(np.array([[1.0, 2.0, 6.0]]), channel_axis=0)
    Moments(count=array([3.]), mean=array([3.]), m2=array([14.]))
    """
    return measure(as_input(x, channel_axis))


def measure(inp: Input) -> Moments:
    """The moments of a checked input."""
    if inp.layout is None:
        return Moments._of(0, *np.zeros((2, inp.n_channels)))
    return Moments._of(inp.count, *passes.moments(inp.layout, inp.x))
