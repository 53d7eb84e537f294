"""The work of a call around the passes, forward and backward, and the context of backward.

A layer or a function checks its arguments (`cbn.inputs`), calls one step, and keeps or returns its results. Through the
statistics of the batch a step is one fused pass. With a `merge`, as for the statistics of several ranks, it calls a
pass for each of measure, solve and apply, with the merge after measure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from .checks import NO_ACT, Act, Array, Doubles
from .inputs import Input
from .kernels import arrays, passes
from .masked import Selection, Weights, scaled, select
from .moments import GradMoments, Moments, measure


class Affine(NamedTuple):
    """Weight and bias, per channel, in float64; None for ones or zeros."""

    weight: Doubles | Any
    bias: Doubles | Any


class Epilogue(NamedTuple):
    """Residual and activation after the normalization: act(a + residual)."""

    residual: Array | Any = None
    act: Act = NO_ACT


class Gradients(NamedTuple):
    """Gradients of input and residual, and per channel of weight and bias; None if not wanted."""

    dx: Array | Any
    dresidual: Array | Any
    dweight: Doubles | Any
    dbias: Doubles | Any


NO_EPILOGUE = Epilogue()

NO_RENORM = (0.0, 0.0)


class Blend(NamedTuple):
    """Statistics from the batch's and the running ones: a mixture, or (r_max, d_max) of batch renormalization."""

    mean: Doubles
    var: Doubles
    mix: float = 0.0
    renorm: tuple[float, float] = NO_RENORM


Merge = Callable[[Moments], Moments]
GradMerge = Callable[[GradMoments], GradMoments]


class Renorm(NamedTuple):
    """What batch renormalization did: y = ((x - mean)*invstd*r + d)*weight + bias with this weight and bias."""

    r: Doubles
    d: Doubles
    affine: Affine


class Special(NamedTuple):
    """What is not so in most contexts."""

    renorm: Renorm | None = None  # then `affine` has r and d in it
    of_others: bool = False  # the statistics are given ones, and stand for more than this batch
    weights: Weights | None = None  # how much the values count; None: all alike
    selection: Selection | None = None  # the same for the passes
    merge: GradMerge | None = None  # what adds the backward sums of all parts of the batch
    ghost: int = 0  # samples of a slice that was normalized by itself: mean, m2 and invstd have a row for each
    parts: Sequence[tuple[Array, Context]] = ()  # samples that were normalized by themselves; then no statistics


PLAIN = Special()


@dataclass(slots=True)
class Context:
    """The context of one forward for backward: input and residual by reference, per-channel arrays as copies.

    With `batch_statistics` mean, m2 and invstd are the statistics that normalized, over `count` values of each channel:
    those of the batch, with a `merge` of all parts, or given ones. Otherwise mean and invstd are those of the running
    statistics.
    """

    inp: Input
    affine: Affine
    epilogue: Epilogue
    batch_statistics: bool
    mean: Doubles
    invstd: Doubles
    m2: Doubles | Any = None
    count: float | Doubles = 0
    digests: tuple[bytes | None, bytes | None] | None = None  # of input and residual, if they are checked
    special: Special = PLAIN

    @property
    def moments(self) -> Moments:
        """The batch statistics that normalized."""
        return Moments._of(self.count, self.mean, self.m2)

    @property
    def read(self) -> list[Array]:
        """The arrays that backward reads, element by element."""
        residual, act = self.epilogue
        return [self.inp.x] if residual is None or act == NO_ACT else [self.inp.x, residual]

    def is_overwritten_by(self, out: Array | None) -> bool:
        """Whether a write to `out` changes what backward reads."""
        if out is None:
            return False
        residual, act = self.epilogue
        return arrays.overlaps(self.inp.x, out) or (
            residual is not None and act != NO_ACT and arrays.overlaps(residual, out)
        )


def copied_into(y: Array, out: Array | None) -> Array:
    """`out` with y in it, copied if y was computed elsewhere; y without an `out`."""
    if out is None or y is out:
        return y
    np.copyto(out, y)
    return out


# ---- forward ---------------------------------------------------------------------------------------------------------


def forward_batch(
    inp: Input,
    affine: Affine,
    eps: float,
    epilogue: Epilogue,
    out: Array | None,
    merge: Merge | None = None,
    blend: Blend | None = None,
    selection: Selection | None = None,
) -> tuple[Array, Context]:
    """y, normalized with the statistics of the batch: merged if there is a `merge`, blended if there is a `blend`."""
    if merge is not None:
        return _forward_merged(inp, affine, eps, epilogue, out, merge)
    if inp.layout is None:
        y = arrays.empty_like(inp.x) if out is None else out
        mean, m2, invstd = np.zeros((3, inp.n_channels))
        return y, Context(inp, affine, epilogue, True, mean, invstd, m2)
    residual, act = epilogue
    if selection is not None and residual is not None:
        residual = inp.matched(residual)  # x may be a copy of its own
    y = inp.output(out, inp.x) if residual is None else inp.output(out, inp.x, residual)
    used, running = affine, None
    if blend is not None:  # the pass writes over what it gets
        weight, bias = affine
        used = Affine(
            np.ones(inp.n_channels) if weight is None else weight.copy(),
            np.zeros(inp.n_channels) if bias is None else bias.copy(),
        )
        running = blend.mean.copy(), blend.var.copy(), blend.mix, *blend.renorm
    mean, m2, invstd = passes.normalize(
        inp.layout, inp.x, y, used.weight, used.bias, eps, inp.in_float64, residual, act, running, selection
    )
    count = inp.count if selection is None else selection.counts
    context = Context(inp, used, epilogue, True, mean, invstd, m2, count)
    if running is not None and running[3:] != NO_RENORM:
        context.special = Special(Renorm(running[1], running[0], affine))
    return copied_into(y, out), context


def forward_given(
    inp: Input,
    affine: Affine,
    invstd: Doubles,
    moments: Moments,
    epilogue: Epilogue,
    out: Array | None,
    selection: Selection | None = None,
) -> tuple[Array, Context]:
    """y, normalized with statistics that were made before, as with those of the batch."""
    y = forward_fixed(inp, coefficients(moments.mean, invstd, affine), epilogue, out, selection)
    return y, Context(inp, affine, epilogue, True, moments.mean, invstd, moments.m2, moments.count)


def _forward_merged(
    inp: Input, affine: Affine, eps: float, epilogue: Epilogue, out: Array | None, merge: Merge
) -> tuple[Array, Context]:
    merged = merge(measure(inp))
    invstd = passes.inverse_std(merged.var(), eps)
    if inp.layout is None:
        invstd[merged.count == 0] = 0
        return forward_fixed(inp, None, epilogue, out), Context(
            inp, affine, epilogue, True, merged.mean, invstd, merged.m2, merged.count
        )
    y = forward_fixed(inp, coefficients(merged.mean, invstd, affine), epilogue, out)
    return y, Context(inp, affine, epilogue, True, merged.mean, invstd, merged.m2, merged.count)


def coefficients(mean: Doubles, invstd: Doubles, affine: Affine) -> Doubles:
    """(3, C): mean, scale and offset for `forward_fixed`."""
    return passes.coefficients(mean, invstd, affine.weight, affine.bias)


def forward_fixed(
    inp: Input, coef: Doubles | Any, epilogue: Epilogue, out: Array | None, selection: Selection | None = None
) -> Array:
    """y, normalized with these coefficients."""
    if inp.layout is None:
        return arrays.empty_like(inp.x, inp.y_dtype) if out is None else out
    residual, act = epilogue
    if selection is not None and residual is not None:
        residual = inp.matched(residual)  # x may be a copy of its own
    y = inp.output(out, inp.x) if residual is None else inp.output(out, inp.x, residual)
    passes.apply(inp.layout, inp.x, y, coef, inp.in_float64, residual, act, selection)
    return copied_into(y, out)


# ---- backward --------------------------------------------------------------------------------------------------------


def backward(
    dy: Array,
    context: Context,
    want_dx: bool,
    want_sums: bool,
    out: Array | None,
    merge: GradMerge | None = None,
) -> Gradients:
    """Gradients of a forward pass. dweight and dbias may be None unless `want_sums`; a `merge` does not change them.

    If dy's dtype differs from x's, both become float64; for 16-bit elements and a leaky slope, float32.
    """
    found = _backward_any(dy, context, want_dx, want_sums, out, merge)
    renorm = context.special.renorm
    if renorm is None or found.dweight is None:
        return found
    with np.errstate(all="ignore"):  # r and d are constants
        return found._replace(dweight=renorm.r * found.dweight + renorm.d * found.dbias)


def _backward_any(
    dy: Array, context: Context, want_dx: bool, want_sums: bool, out: Array | None, merge: GradMerge | None
) -> Gradients:
    inp = context.inp
    if inp.layout is None:
        zeros = np.zeros((2, inp.n_channels))
        if merge is not None:
            merge(_grad_moments(inp, *zeros))
        dx = (arrays.empty_like(inp.x) if out is None else out) if want_dx else None
        return Gradients(dx, None if context.epilogue.residual is None else arrays.empty_like(inp.x), *zeros)
    dtype = inp.x.dtype
    if dy.dtype != dtype:
        return _backward_wider(dy, context, want_dx, want_sums, out, merge, np.dtype(np.float64))
    if dtype.itemsize == 2 and context.epilogue.act.slope not in (0, 1):
        # dy*slope, which is kept in between, has more digits than 16 bits hold
        return _backward_wider(dy, context, want_dx, want_sums, out, merge, np.dtype(np.float32))
    return _backward(dy, context, want_dx, want_sums, out, merge, None)


def _backward_wider(
    dy: Array,
    context: Context,
    want_dx: bool,
    want_sums: bool,
    out: Array | None,
    merge: GradMerge | None,
    work: np.dtype[Any],
) -> Gradients:
    """`backward` on copies of its arrays in a larger type, with rounded results."""
    inp, (residual, act) = context.inp, context.epilogue
    dtype = inp.x.dtype
    wider, special = widened(inp, work), context.special
    if special.weights is not None:  # the copy may have other runs
        wider, selection = select(wider, special.weights)
        special = special._replace(selection=selection)
    dh = arrays.with_room(dy.astype, work)
    if dy.dtype != dtype and act != NO_ACT:
        # The passes would decide in float64 what the forward pass decided in its own arithmetic
        with np.errstate(all="ignore"):
            a = before_activation(context)
            below = a <= 0
            dh[below] = dh[below] * act.slope if act.slope else 0
            dh[(a <= act.low) | (a >= act.high)] = 0
        act = NO_ACT
    wider_residual = None if residual is None else arrays.with_room(residual.astype, work, copy=False)
    wide = replace(context, inp=wider, epilogue=Epilogue(wider_residual, act), special=special)
    dx, dresidual, dweight, dbias = _backward(dh, wide, want_dx, want_sums, None, merge, dtype)
    with np.errstate(all="ignore"):
        if want_dx:
            dx = copied_into(arrays.with_room(dx.astype, dtype, order="K"), out)
        if residual is not None:
            dresidual = arrays.with_room(dresidual.astype, dtype, order="K")
    return Gradients(dx, dresidual, dweight, dbias)


def widened(inp: Input, dtype: np.dtype[Any]) -> Input:
    """An input with a copy of x in this dtype; inp itself if x has it."""
    if inp.x.dtype == dtype:
        return inp
    wider = Input(arrays.with_room(inp.x.astype, dtype, order="K"), inp.axis)
    wider.in_float64 = inp.in_float64
    return wider


def before_activation(context: Context) -> Array:
    """The input of a forward pass's activation, in the arithmetic of that pass, rounded to x's dtype."""
    residual = context.epilogue.residual
    epilogue = Epilogue(None if residual is None else context.inp.matched(residual))
    return forward_fixed(context.inp, coefficients(context.mean, context.invstd, context.affine), epilogue, None)


def _backward(
    dy: Array,
    context: Context,
    want_dx: bool,
    want_sums: bool,
    out: Array | None,
    merge: GradMerge | None,
    y_dtype: np.dtype[Any] | None,
) -> Gradients:
    """`backward` for dy and x with one dtype. `y_dtype` is the forward pass's if they are copies in a larger type."""
    inp, act, selection = context.inp, context.epilogue.act, context.special.selection
    if selection is not None and context.batch_statistics:
        selection = scaled(selection._replace(counts=np.array(np.broadcast_to(context.count, inp.n_channels), float)))
    dy, residual, dx, dh, dresidual = gradient_arrays(dy, context, out, want_dx)
    forward = context.mean, context.invstd, *context.affine, inp.in_float64, residual, act, dh
    sums: Doubles | Any = None
    products: Doubles | Any = None
    dweight: Doubles | Any = None
    if dx is not None and context.batch_statistics and merge is None:
        keeps_dh = dresidual is not None
        sums, products, dweight = passes.gradients(inp.layout, dy, inp.x, dx, *forward, keeps_dh, y_dtype, selection)
    elif want_sums or dh is not None or (context.batch_statistics and dx is not None):
        sums, products, dweight = passes.grad_moments(inp.layout, dy, inp.x, *forward, y_dtype, selection)
    if dx is not None:
        if not context.batch_statistics:
            _scale(dy if dh is None else dh, context, dx, selection)
        elif merge is not None:
            total = merge(_grad_moments(inp, sums, products))
            _solve_and_apply(dy if dh is None else dh, context, total, dx, selection)
        dx = copied_into(dx, out)
    return Gradients(dx, dresidual, dweight, sums)


def gradient_arrays(
    dy: Array, context: Context, out: Array | None, want_dx: bool = True
) -> tuple[Array, Array | Any, Array | Any, Array | Any, Array | Any]:
    """(dy, residual, dx, dh, dresidual) as the passes can walk them; dh is None without an activation."""
    inp, (residual, act) = context.inp, context.epilogue
    dy = inp.matched(dy)
    residual = None if residual is None else inp.matched(residual)
    dx = inp.output(out, dy, *context.read) if want_dx else None
    # The reduction stores dh in dresidual, or in dx unless that overlaps x, which apply reads again
    dh = dresidual = None
    if act != NO_ACT:
        if residual is not None:
            dh = dresidual = arrays.empty_like(inp.x)
        elif dx is not None and inp.can_walk(dx) and not arrays.overlaps(dx, inp.x):
            dh = dx
        else:
            dh = arrays.empty_like(inp.x)
    elif residual is not None:
        selection = context.special.selection
        dresidual = arrays.with_room(dy.copy, order="K") if selection is None else _selected(dy, inp, selection)
    return dy, residual, dx, dh, dresidual


def _scale(dh: Array, context: Context, dx: Array, selection: Selection | None) -> None:
    """dx = dh*scale, for statistics that do not depend on x."""
    inp = context.inp
    zeros = np.zeros(inp.n_channels)
    # Mean 0, and offset -0, which keeps the sign of a zero
    coef = passes.coefficients(zeros, context.invstd, context.affine.weight, -zeros)
    passes.apply(inp.layout, dh, dx, coef, inp.in_float64, selection=selection)


def _selected(dy: Array, inp: Input, selection: Selection) -> Array:
    """dy, and 0 where nothing counts."""
    zeros = np.zeros(inp.n_channels)
    found = arrays.empty_like(inp.x)
    passes.apply(inp.layout, dy, found, np.array([zeros, zeros + 1, -zeros]), selection=selection)
    return found


def _solve_and_apply(
    dh: Array, context: Context, total: GradMoments, dx: Array, selection: Selection | None = None
) -> None:
    """dx through batch statistics, from the sums of all parts; a `selection` is scaled, with the count of all parts."""
    inp = context.inp
    sums = total.sum_dh, total.sum_dh_xmu, total.count if selection is None else selection.counts
    coef = passes.grad_coefficients(context.mean, context.invstd, context.affine.weight, *sums)
    passes.grad_apply(inp.layout, dh, inp.x, dx, coef, inp.in_float64, selection)


def _grad_moments(inp: Input, sums: Doubles, products: Doubles) -> GradMoments:
    return GradMoments(np.full(inp.n_channels, float(inp.count)), sums, products)


# ---- backward without an epilogue, in two steps ----------------------------------------------------------------------


def measure_gradients(dy: Array, context: Context) -> GradMoments:
    """The backward sums of this part of a batch."""
    inp = context.inp
    if inp.layout is None:
        return _grad_moments(inp, *np.zeros((2, inp.n_channels)))
    if dy.dtype != inp.x.dtype:
        inp, dy = widened(inp, np.dtype(np.float64)), arrays.with_room(dy.astype, np.float64)
    return _grad_moments(
        inp, *passes.grad_moments(inp.layout, inp.matched(dy), inp.x, context.mean, context.invstd)[:2]
    )


def apply_gradients(dy: Array, context: Context, total: GradMoments, out: Array | None) -> Array:
    """dx of this part of a batch, from the sums of all parts."""
    inp = context.inp
    dtype = inp.x.dtype
    if inp.layout is None:
        return arrays.empty_like(inp.x) if out is None else out
    if dy.dtype != dtype:
        wide = replace(context, inp=widened(inp, np.dtype(np.float64)))
        dx = apply_gradients(arrays.with_room(dy.astype, np.float64), wide, total, None)
        with np.errstate(all="ignore"):
            return copied_into(arrays.with_room(dx.astype, dtype, order="K"), out)
    dy = inp.matched(dy)
    dx = inp.output(out, dy, inp.x)
    _solve_and_apply(dy, context, total, dx)
    return copied_into(dx, out)
