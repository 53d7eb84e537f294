"""Ghost batches: a batch in slices of some samples, each normalized by itself (Hoffer, Hubara and Soudry 2017).

All slices are one compiled call. Where that does not fit, as for a gradient of another type, they are a step each.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import checks, steps
from .checks import Array
from .inputs import Input
from .kernels import arrays, slices
from .kernels.arrays import Layout
from .moments import Moments
from .steps import Affine, Context, Epilogue, Gradients, Special, copied_into

Cut = tuple[Layout, Layout, int, int, int]  # see kernels/slices.pyx


def _count(inp: Input, size: int) -> int:
    """How many slices. The last one may be shorter; one value per channel joins the slice before."""
    n: int = inp.x.shape[_axis(inp)]
    slices, rest = divmod(n, size)
    joins = slices == 0 or rest == 0 or (rest == 1 and inp.count == n)
    return max(slices, 1) if joins else slices + 1


def bounds(inp: Input, size: int) -> list[slice]:
    """The slices of the samples."""
    edges = [k * size for k in range(_count(inp, size))]
    return [slice(a, b) for a, b in zip(edges, [*edges[1:], inp.x.shape[_axis(inp)]], strict=True)]


def _axis(inp: Input) -> int:
    """The axis of the samples."""
    return 0 if inp.axis else 1


def _at(inp: Input, part: slice) -> tuple[slice, ...]:
    return (slice(None),) * _axis(inp) + (part,)


def _cut(inp: Input, size: int, *others: Array | None) -> Cut | None:
    """The slices for the compiled call; None if it cannot go through one of the arrays."""
    n, axis = _count(inp, size), _axis(inp)
    last = (n - 1) * size
    layouts = []
    for part in (slice(0, size if n > 1 else None), slice(last, None)):
        at = _at(inp, part)
        one = Input(inp.x[at], inp.axis)
        if one.layout is None or not np.may_share_memory(one.x, inp.x[at]):
            return None
        if not all(one.layout.fits(a[at]) for a in others if a is not None):
            return None
        layouts.append(one.layout)
    return layouts[0], layouts[1], axis, size, n


def forward(
    inp: Input, affine: Affine, eps: float, epilogue: Epilogue, out: Array | None, size: int
) -> tuple[Array, Context, Moments]:
    """y, the context of backward, and the moments of the whole batch."""
    n = inp.x.shape[_axis(inp)]
    least = min(size, n - (_count(inp, size) - 1) * size) * (inp.count // n)
    if least < 2:
        raise checks.ArgumentError(
            f"Expected more than 1 value per channel when training, got {least} in a ghost batch: input size "
            f"{inp.x.shape}, ghost_batch_size {size}"
        )
    residual, act = epilogue
    y = inp.output(out, inp.x) if residual is None else inp.output(out, inp.x, residual)
    cut = _cut(inp, size, y, residual)
    if cut is not None:
        of_x = inp.x, y, affine.weight, affine.bias, eps, inp.count, inp.in_float64
        mean, invstd, *merged = slices.normalize(cut, *of_x, residual, act)
        whole = Moments._of(inp.count, *merged)
    else:
        mean, invstd, whole = _forward_parts(inp, affine, eps, epilogue, y, bounds(inp, size))
    context = Context(inp, affine, epilogue, True, mean, invstd, None, inp.count, special=Special(ghost=size))
    return copied_into(y, out), context, whole


def _forward_parts(
    inp: Input, affine: Affine, eps: float, epilogue: Epilogue, y: Array, parts: list[slice]
) -> tuple[Any, Any, Moments]:
    rows, moments = [], []
    for part in parts:
        at = _at(inp, part)
        one, of_part = _part(inp, at), None if epilogue.residual is None else epilogue.residual[at]
        _, context = steps.forward_batch(one, affine, eps, Epilogue(of_part, epilogue.act), y[at])
        rows.append((context.mean, context.invstd))
        moments.append(context.moments)
    mean, invstd = (np.array(column) for column in zip(*rows, strict=True))
    return mean, invstd, Moments.merge(moments)


def _part(inp: Input, at: tuple[slice, ...]) -> Input:
    one = Input(inp.x[at], inp.axis)
    one.in_float64 = inp.in_float64
    return one


def backward(dy: Array, context: Context, out: Array | None) -> Gradients:
    """Gradients of `forward`: of the parameters those of all slices together."""
    inp, act = context.inp, context.epilogue.act
    dtype = inp.x.dtype
    if dy.dtype != dtype or (dtype.itemsize == 2 and act.slope not in (0, 1)):
        return _backward_parts(dy, context, out)
    dy, residual, dx, dh, dresidual = steps.gradient_arrays(dy, context, out)
    cut = _cut(inp, context.special.ghost, dy, residual, dx, dh)
    if cut is None:
        return _backward_parts(dy, context, out)
    of_forward = context.mean, context.invstd, *context.affine, inp.in_float64, residual, act, dh
    dweight, dbias = slices.gradients(cut, dy, inp.x, dx, *of_forward, dresidual is not None)
    return Gradients(copied_into(dx, out), dresidual, dweight, dbias)


def _backward_parts(dy: Array, context: Context, out: Array | None) -> Gradients:
    inp, (residual, act) = context.inp, context.epilogue
    dx = arrays.empty_like(inp.x)  # what `out` overlaps is read slice by slice
    dresidual = None if residual is None else arrays.empty_like(inp.x)
    dweight, dbias = np.zeros((2, inp.n_channels))
    for k, part in enumerate(bounds(inp, context.special.ghost)):
        at = _at(inp, part)
        epilogue = Epilogue(None if residual is None else residual[at], act)
        one = Context(_part(inp, at), context.affine, epilogue, True, context.mean[k], context.invstd[k])
        found = steps.backward(dy[at], one, True, True, dx[at])
        with np.errstate(all="ignore"):
            dweight += found.dweight
            dbias += found.dbias
        if dresidual is not None:
            dresidual[at] = found.dresidual
    return Gradients(copied_into(dx, out), dresidual, dweight, dbias)
