"""Batches of which not every value counts alike: masks, lengths, weights of samples.

Statistics and gradients are over what counts; what does not, gets 0 in y and dx, and is read into nothing. With the
weights w of the values of a channel, n = S(w), d = x - mean and r = invstd::

    mean = S(w*x)/n    var = S(w*d^2)/n    dbias = S(dy)    dweight = S(d*dy)*r        sums over w > 0
    dx   = (dy - w*S(dy)/n - w*d*S(d*dy)*r^2/n)*r*weight
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from . import checks
from .checks import Array, ArrayLike, Doubles
from .inputs import Input
from .kernels import arrays

NO_BYTES = "mask, lengths and sample_weight need floating input, not 8-bit"


class Weights(NamedTuple):
    """What the values of an input count, as a caller gives it, checked."""

    mask: Array | None  # bool, with the input's dimensions, of length 1 along those that it is the same for
    lengths: Array | None  # (N,)
    sample_weight: Doubles | None  # (N,)

    def of(self, samples: Any, inp: Input) -> Weights:
        """Those of some samples of an input: a slice, or indices."""
        axis = 0 if inp.axis else 1
        mask, lengths, sample_weight = self
        if mask is not None and mask.shape[axis] > 1:
            mask = mask[(slice(None),) * axis + (samples,)]
        return Weights(
            mask,
            None if lengths is None else lengths[samples],
            None if sample_weight is None else sample_weight[samples],
        )


class Selection(NamedTuple):
    """What the values count, as the passes go through them, N runs of S or N rows: `cbn_selection` of kernels.h."""

    mask: Array | None  # int8, -1 or 0: (N, S), (N, C, S) or of rows (N, C)
    lengths: Array | None  # intp (N,)
    weights: Doubles | None  # (N,)
    counts: Doubles  # (C,), the sums of the weights
    values: Array | int  # how many values have one


def as_weights(
    inp: Input, mask: ArrayLike | None, lengths: ArrayLike | None, sample_weight: ArrayLike | None
) -> Weights | None:
    """Checked arguments of a call; None if every value counts once."""
    shape, axis = inp.x.shape, inp.axis
    of_values = None if mask is None else checks.mask(mask, shape, axis)
    of_samples, along = None, None
    if lengths is not None:
        of_samples, along = checks.lengths(lengths, shape, axis)
    weights = None if sample_weight is None else checks.sample_weights(sample_weight, shape, axis, "sample_weight")
    if of_values is not None and of_values.all():
        of_values = None
    if of_samples is not None and along is not None and (of_samples == shape[along]).all():
        of_samples = None
    if weights is not None and (weights == 1).all():
        weights = None
    if of_values is None and of_samples is None and weights is None:
        return None
    return Weights(of_values, of_samples, None if weights is None else weights.ravel())


def select(inp: Input, weights: Weights) -> tuple[Input, Selection]:
    """What counts, for the passes, and the input: in a copy, if samples of other weights share a run."""
    axis, sample = inp.axis, weights.sample_weight
    rest = [i for i in range(inp.x.ndim) if i != axis]
    order = inp.layout.order
    k = order.index(axis)
    outer, inner = order[:k], order[k + 1 :]
    if sample is not None and rest[0] in inner and not np.isin(sample, (0, 1)).all():
        places = [rest[0], axis, *rest[1:]]
        copy = arrays.with_room(np.ascontiguousarray, inp.x.transpose(places)).transpose(np.argsort(places))
        apart = Input(copy, axis)
        apart.in_float64 = inp.in_float64
        return select(apart, weights)
    if inp.layout.rows:
        return inp, _of_rows(inp, weights, rest, outer)
    return inp, _of_runs(inp, weights, rest, outer, inner)


def _along(v: Array, i: int, n_axes: int) -> Array:
    """Values along axis i, in a shape that broadcasts to that of the input."""
    return v.reshape([-1 if k == i else 1 for k in range(n_axes)])


def _counts(inp: Input, weights: Weights, rest: list[int], sample: bool) -> Array | Any:
    """A bool array that broadcasts to the input: mask and lengths, and if `sample` whether the sample has a weight."""
    n = inp.x.ndim
    counts: Any = True if weights.mask is None else weights.mask
    if weights.lengths is not None:
        place = _along(np.arange(inp.x.shape[rest[1]]), rest[1], n)
        counts = counts & (place < _along(weights.lengths, rest[0], n))
    if sample and weights.sample_weight is not None:
        counts = counts & _along(weights.sample_weight != 0, rest[0], n)
    return counts


def _of_rows(inp: Input, weights: Weights, rest: list[int], outer: list[int]) -> Selection:
    """Of rows: a weight each; and a mask, if it is not the same for all channels."""
    n, shape = inp.x.ndim, inp.x.shape
    of_channels = weights.mask is not None and weights.mask.shape[inp.axis] > 1
    counts = _counts(inp, weights._replace(mask=None) if of_channels else weights, rest, False)
    if weights.sample_weight is not None:
        counts = counts * _along(weights.sample_weight, rest[0], n)
    each = np.broadcast_to(counts, [1 if i == inp.axis else size for i, size in enumerate(shape)])
    of_row = np.array(each.transpose([*outer, *(i for i in range(n) if i not in outer)]), dtype=np.float64).ravel()
    if not of_channels or weights.mask is None:
        count = np.full(inp.n_channels, of_row.sum())
        return Selection(None, None, of_row, count, int(np.count_nonzero(of_row)))
    order = [*outer, inp.axis]
    full = np.broadcast_to(weights.mask, shape).transpose([*order, *(i for i in range(n) if i not in order)])
    mask, _ = arrays.mask_bytes(full.reshape(of_row.size, inp.n_channels))
    mask[of_row == 0] = 0
    return Selection(mask, None, of_row, of_row @ (mask != 0), -mask.sum(axis=0, dtype=np.intp))


def _of_runs(inp: Input, weights: Weights, rest: list[int], outer: list[int], inner: list[int]) -> Selection:
    """Of runs: a weight and a length each, or a mask."""
    n, shape, layout, sample = inp.x.ndim, inp.x.shape, inp.layout, weights.sample_weight
    others = [i for i in range(n) if i not in outer and i not in inner and i != inp.axis]  # of length 1

    def of_runs(v: Any) -> Array:
        """Values that are the same along a run, (N,)."""
        each = np.broadcast_to(v, [size if i in outer else 1 for i, size in enumerate(shape)])
        return each.transpose([*outer, *inner, inp.axis, *others]).reshape(layout.N)

    of_run = None if sample is None or rest[0] in inner else of_runs(_along(sample, rest[0], n)).astype(np.float64)
    starts = weights.lengths is None or not inner or (inner[0] == rest[1] and rest[0] not in inner)
    if weights.mask is None and starts and (of_run is not None or sample is None):
        lengths = np.full(layout.N, layout.S, np.intp)
        if weights.lengths is not None and inner and inner[0] == rest[1]:
            lengths = of_runs(_along(weights.lengths, rest[0], n)).astype(np.intp) * (layout.S // shape[rest[1]])
        elif weights.lengths is not None:
            lengths[~of_runs(_counts(inp, weights, rest, False))] = 0
        if of_run is not None:
            lengths[of_run == 0] = 0
        count = float(lengths.sum() if of_run is None else lengths @ of_run)
        return Selection(None, lengths, of_run, np.full(inp.n_channels, count), int(lengths.sum()))
    counts = _counts(inp, weights, rest, True)
    of_channels = counts.shape[inp.axis] > 1
    full = np.broadcast_to(counts, [1 if i == inp.axis and not of_channels else size for i, size in enumerate(shape)])
    ordered = full.transpose([*outer, inp.axis, *inner, *others])
    mask, found = arrays.mask_bytes(ordered.reshape(-1, layout.S))
    found = found.reshape(layout.N, -1)  # how many count of each run
    whole = None if of_run is None else np.where(of_run == 0, 0, layout.S).astype(np.intp)
    values = found.sum(axis=0)
    counts_c = np.broadcast_to(values if of_run is None else of_run @ found, inp.n_channels)
    return Selection(mask, whole, of_run, np.array(counts_c, np.float64), values)


def refuse_few(inp: Input, found: Selection) -> None:
    """PyTorch's error, for the channel of which the least counts."""
    wrong = (np.asarray(found.values) < 2) | ~(found.counts > 1)
    if wrong.any():
        c = int(np.where(wrong, found.counts, np.inf).argmin())
        raise checks.ArgumentError(
            f"Expected more than 1 value per channel when training, got weights that add up to {found.counts[c]:g} in "
            f"channel {c}, input size {inp.x.shape}"
        )


def scaled(found: Selection) -> Selection:
    """The same with weights up to 1, times a power of 2: no coefficient of a run is larger than that of its channel."""
    if found.weights is None:
        return found
    factor = 2.0 ** -math.frexp(float(found.weights.max(initial=0)))[1]
    return found._replace(weights=found.weights * factor, counts=found.counts * factor)
