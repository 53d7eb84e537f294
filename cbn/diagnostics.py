"""What is wrong with a layer: dead channels, values that are not finite, statistics far from those of a batch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from . import pictures
from .checks import Array, Doubles, channel_list
from .inputs import Input
from .moments import Moments, measure

__all__ = ["Report"]

CONSTANT = 1e-5  # a standard deviation of the output that is as good as 0
FAR_MEAN = 1.0  # distance of the means in standard deviations, from which a channel is far off
FAR_VAR = 4.0  # ratio of the variances, or its inverse, likewise
NOISE = 4.0  # standard errors of a batch that may come on top
SHOWN = 3  # of the channels that are furthest off
NOTICEABLE = 1e-3  # distance of a channel below which it is not shown: a mean 0.04 standard deviations off

Indices = Array  # of channels, in ascending order


@dataclass(frozen=True, eq=False, repr=False)
class Report:
    """What `BatchNorm.check` found, by channel.

    ``print(report)`` shows it as text, and ``report.ok`` is True if no channel is listed.

    Attributes
    ----------
    layer : str
        Class and number of channels.
    ok : bool
        Whether all that follows as a list of channels is empty, but for `furthest`.
    nonfinite : dict of str to int ndarray
        For each array of the layer with NaN or infinite values its name and their channels.
    constant_output : int ndarray
        Dead channels: the output in evaluation is the bias, whatever the input. Their `output_std` is below 1e-5,
        because the weight is (nearly) 0 or the variance is.
    low_var : int ndarray
        Channels whose running variance is from 0 to eps, so that eps decides how they are scaled.
    negative_var : int ndarray
        Channels with a negative running variance.
    output_std : (C,) float64 ndarray
        ``abs(weight)*sqrt(running_var/(running_var + eps))``: the standard deviation of the output, before residual and
        activation, for inputs with the running statistics; NaN for a negative variance. Without running statistics the
        absolute weight.
    running_mean, running_var : (C,) float64 ndarray or None
        Copies of the running statistics.
    batch : Moments or None
        Moments of the finite values of the batch, with extremes. This attribute and the following ones are None if no
        batch was given.
    nan_count, inf_count : (C,) int64 ndarray or None
        Number of NaN and of infinite values.
    nonfinite_input : int ndarray or None
        Channels that have such values.
    constant_input : int ndarray or None
        Channels with two or more values in the batch that are all the same.
    mean_shift : (C,) float64 ndarray or None
        ``(batch mean - running_mean)/sqrt(running_var + eps)``: the mean of the normalized batch, before weight and
        bias. NaN without values. This attribute and the following ones are None without running statistics too.
    var_ratio : (C,) float64 ndarray or None
        ``(batch variance + eps)/(running_var + eps)``. The batch's variance is unbiased or biased, as the layer's. NaN
        with fewer than two values.
    distance : (C,) float64 ndarray or None
        ``(var_ratio + mean_shift**2 - 1 - log(var_ratio))/2``, the Kullback-Leibler divergence between two normal
        distributions with these statistics: how far a channel is off, as one number.
    furthest : int ndarray or None
        All channels with a distance, the furthest first.
    far : int ndarray or None
        Channels with ``abs(mean_shift) > 1`` or a ``var_ratio`` above 4 or below 1/4. A small batch has wider bounds,
        by four standard errors of the statistics of n independent values: ``4/sqrt(n)`` for the mean, and
        ``4*sqrt(2/(n - 1)) + 16/(n - 1)`` for the logarithm of the ratio, whose distribution has a long tail for few
        values.

    Examples
    --------
    >>> import numpy as np
    >>> import cbn
    >>> bn = cbn.BatchNorm1d(3)
    >>> x = np.tile([[1.0, 6.0, 1.0], [-1.0, 4.0, -1.0]], (500, 1))
    >>> x[::100, 2] = np.nan
    >>> report = bn.check(x)
    >>> print(report)
    BatchNorm1d(3): 2 findings
      the input has 10 NaN and 0 infinite values: channel 2
      the batch is far from the running statistics: channel 1
      furthest: channel 1 (mean 5 std higher, variance x 1)
    >>> report.far, report.nan_count
    (array([1]), array([ 0,  0, 10]))
    """

    layer: str
    eps: float
    nonfinite: dict[str, Indices]
    constant_output: Indices
    low_var: Indices
    negative_var: Indices
    output_std: Doubles
    running_mean: Doubles | Any
    running_var: Doubles | Any
    batch: Moments | Any = None
    nan_count: Array | Any = None
    inf_count: Array | Any = None
    nonfinite_input: Indices | Any = None
    constant_input: Indices | Any = None
    mean_shift: Doubles | Any = None
    var_ratio: Doubles | Any = None
    distance: Doubles | Any = None
    furthest: Indices | Any = None
    far: Indices | Any = None

    @property
    def ok(self) -> bool:
        """Whether no channel is listed."""
        return not self._findings()

    def __repr__(self) -> str:
        return f"<Report of {self._headline()}>"

    def __str__(self) -> str:
        """All findings, each with at most ten channels, and the channels that are furthest off."""
        lines = [self._headline()]
        lines += [f"  {words}: {channel_list(indices)}" for words, indices in self._findings()]
        if offsets := [self._offset(c) for c in self._shown()]:
            lines.append(f"  furthest: {', '.join(offsets)}")
        return "\n".join(lines)

    def plot(self, file: str | os.PathLike[str] | BinaryIO) -> None:
        """Draw running statistics and batch, channel by channel.

        The upper panel has means and standard deviations, the lower one the distances and ratios between batch and
        running statistics (without a batch: the variances). More than 48 channels are in the order of their means.

        Parameters
        ----------
        file : str, path-like or binary file object
            Where the picture goes; the name's ending chooses its format, .png by default.

        Raises
        ------
        ImportError
            If matplotlib is missing.
        ValueError
            If there are neither running statistics nor a batch.
        """
        running = None if self.running_mean is None else (self.running_mean, self.running_var)
        batch = None if self.batch is None else (self.batch.mean, self.batch.var())
        if running is None and batch is None:
            raise ValueError(
                f"{self.layer} has no running statistics, and no batch was given: there is nothing to draw"
            )
        pictures.draw_statistics(
            file, self.layer, self.eps, running, batch, (self.mean_shift, self.var_ratio), self._marked()
        )

    # ---- text ------------------------------------------------------------------------------------------------------

    def _findings(self) -> list[tuple[str, Indices]]:
        """What is wrong, in words, and the channels."""
        found = [
            ("the output is constant", self.constant_output),
            (f"running_var is below eps = {self.eps:g}", self.low_var),
            ("running_var is negative", self.negative_var),
            *((f"{name} is not finite", indices) for name, indices in self.nonfinite.items()),
        ]
        if self.batch is not None:
            counts = f"{self.nan_count.sum()} NaN and {self.inf_count.sum()} infinite values"
            found.append((f"the input has {counts}", self.nonfinite_input))
            found.append(("the input is constant", self.constant_input))
        if self.far is not None:
            found.append(("the batch is far from the running statistics", self.far))
        return [(words, indices) for words, indices in found if indices.size]

    def _headline(self) -> str:
        n = len(self._findings())
        return f"{self.layer}: {'nothing found' if not n else '1 finding' if n == 1 else f'{n} findings'}"

    def _shown(self) -> list[int]:
        """The channels that are furthest off, unless nobody would notice that they are."""
        first = [] if self.furthest is None else self.furthest[:SHOWN]
        return [int(c) for c in first if self.distance[c] > NOTICEABLE]

    def _offset(self, c: int) -> str:
        shift = self.mean_shift[c]
        return (
            f"channel {c} (mean {abs(shift):.3g} std {'lower' if shift < 0 else 'higher'}, "
            f"variance x {self.var_ratio[c]:.3g})"
        )

    def _marked(self) -> Indices:
        """The channels that a picture names."""
        if self.furthest is None:
            return np.arange(0)
        return np.array([c for c in self.furthest[:SHOWN] if c in self.far], int)


def examine(
    layer: str, n_channels: int, eps: float, unbiased: bool, arrays: dict[str, Array], inp: Input | None
) -> Report:
    """The report of a layer with these (C,) arrays, for an input or none."""
    values = {name: a.astype(np.float64) for name, a in arrays.items()}
    none = np.arange(0)
    scale = np.abs(values.get("weight", np.ones(n_channels)))
    mean, var = values.get("running_mean"), values.get("running_var")
    if mean is None or var is None:
        mean = var = None
    low, negative = none, none
    if var is not None:
        low, negative = np.flatnonzero((var >= 0) & (var < eps)), np.flatnonzero(var < 0)
        with np.errstate(all="ignore"):
            scale = scale * np.sqrt(np.where(var == 0, 0, var / (var + eps)))
        scale[negative] = np.nan
    nonfinite = {name: np.flatnonzero(~np.isfinite(a)) for name, a in values.items()}
    return Report(
        layer=layer,
        eps=eps,
        nonfinite={name: indices for name, indices in nonfinite.items() if indices.size},
        constant_output=np.flatnonzero(scale < CONSTANT),
        low_var=low,
        negative_var=negative,
        output_std=scale,
        running_mean=mean,
        running_var=var,
        **({} if inp is None else _of_batch(inp, mean, var, eps, int(unbiased))),
    )


def _of_batch(inp: Input, mean: Doubles | None, var: Doubles | None, eps: float, correction: int) -> dict[str, Any]:
    """The part of a report that needs an input."""
    batch, nans, infinite = _measure_finite(inp)
    found: dict[str, Any] = {
        "batch": batch,
        "nan_count": nans,
        "inf_count": infinite,
        "nonfinite_input": np.flatnonzero(nans + infinite),
        "constant_input": np.flatnonzero((batch.count > 1) & (batch.min == batch.max)),
    }
    if mean is None or var is None:
        return found
    n = batch.count
    with np.errstate(all="ignore"):
        shift = np.where(n > 0, (batch.mean - mean) / np.sqrt(var + eps), np.nan)
        ratio = np.where(n > 1, (batch.var(correction) + eps) / (var + eps), np.nan)
        log = np.log(ratio)
        distance = (ratio + shift**2 - 1 - log) / 2
        far = np.abs(shift) > FAR_MEAN + NOISE / np.sqrt(n)
        far |= np.abs(log) > np.log(FAR_VAR) + NOISE * np.sqrt(2 / (n - 1)) + NOISE**2 / (n - 1)
    order = np.argsort(-distance, kind="stable")  # NaN last
    return found | {
        "mean_shift": shift,
        "var_ratio": ratio,
        "distance": distance,
        "furthest": order[~np.isnan(distance[order])],
        "far": np.flatnonzero(far),
    }


def _measure_finite(inp: Input) -> tuple[Moments, Array, Array]:
    """Moments of the finite values, with extremes; numbers of NaN and of infinite values."""
    found = measure(inp, extrema=True)
    none = np.zeros(found.mean.shape, np.int64)
    if np.all(np.isfinite(found.m2)):
        return found, none, none.copy()
    x = inp.x
    rest = tuple(axis for axis in range(x.ndim) if axis != inp.axis)
    nan, infinite = np.isnan(x), np.isinf(x)
    weights = (~(nan | infinite)).astype(np.float64)
    return measure(inp, weights, extrema=True), nan.sum(axis=rest), infinite.sum(axis=rest)
