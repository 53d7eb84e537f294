"""The course of a layer's call: which statistics normalize, whether the running ones move, what is kept for backward.

Mode, switches and the options of the call decide it, once, before anything is computed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from . import checks, ghost, masked, quantized, steps
from .checks import Array, Doubles
from .inputs import Input
from .kernels import arrays, passes
from .masked import Selection, Weights
from .moments import Moments, measure
from .quantized import Quantization
from .steps import Affine, Blend, Context, Epilogue, Special

OF_OTHERS = (
    "the moments of the last forward stand for more than its batch, whose gradient needs the sums of all parts: "
    "cbn.functional.batch_norm_backward_reduce and batch_norm_backward_elemt make it"
)


class NonFiniteError(ValueError, FloatingPointError):
    """A ValueError that code which expects numpy's FloatingPointError catches too."""


class Options(NamedTuple):
    """What a call asks for beside the mode."""

    update_stats: bool | None = None
    moments: Moments | None = None
    mix: float | None = None
    weights: Weights | None = None


class Course(NamedTuple):
    """What a call does."""

    remembers: bool  # keep what backward reads
    batch_statistics: bool  # normalize with the batch's statistics, or given ones; else with the running ones
    tracked: bool  # move the running statistics
    single: bool  # there is one value per channel, and `on_single` allows it


class Snapshot(NamedTuple):
    """Attributes and copies of the arrays of a layer, as one call reads them at one moment, and what it does."""

    version: int  # of the layer's attributes
    course: Course
    options: Options
    eps: float
    affine: Affine
    epilogue: Epilogue
    sources: tuple[Array | None, ...]  # running mean, running variance, weight and bias themselves
    values: tuple[Doubles | Any, ...]  # float64 copies of them
    counter: Array | None
    nonfinite: str
    renorm: tuple[float, float] | None  # (r_max, d_max)
    ghost: int  # samples of a ghost batch; 0: none

    @property
    def running(self) -> tuple[Array | None, Array | None, Array | None]:
        """What moves."""
        return self.sources[0], self.sources[1], self.counter


# Mean, m2 and count that the running statistics move by, and whether the variance divides by count - 1
Move = tuple[Doubles, Doubles, float, bool]


def checked(update_stats: Any = None, moments: Any = None, mix: Any = None, weights: Any = None) -> Options:
    """The options of a call."""
    if update_stats is not None:
        update_stats = checks.boolean(update_stats, "update_stats, if not None,")
    if moments is not None and not isinstance(moments, Moments):
        raise TypeError(f"moments must be cbn.Moments, not {type(moments).__name__}")
    if mix is not None:
        mix = checks.mix(mix)
        if moments is not None:
            raise ValueError("mix takes the batch's statistics, and moments takes their place: pass one of them")
    return Options(update_stats, moments, mix, weights)


def decide(layer: Any, inp: Input, options: Options, of_bytes: bool) -> Course:
    """What a call does now."""
    without = layer.running_mean is None and layer.running_var is None
    batch, moves = layer.use_batch_stats, options.update_stats
    if of_bytes and batch:
        raise ValueError("8-bit input is normalized with the running statistics, but use_batch_stats is True")
    if batch is None:
        batch = not of_bytes and (layer.training or without)
    if moves is None:
        moves = layer.update_running_stats
    if moves and without:
        name = "update_running_stats" if options.update_stats is None else "update_stats"
        raise ValueError(f"{name} is True, but the layer has no running statistics")
    if moves is None:
        moves = layer.training and layer.track_running_stats
    if options.mix is not None:
        if batch or moves:
            raise ValueError("mix is for evaluation: this call normalizes with the batch's statistics, or moves others")
        if of_bytes:
            raise ValueError("mix needs floating input, not 8-bit")
    if options.moments is not None and not batch:
        raise ValueError("moments take the place of the batch's statistics, but this call uses the running ones")
    single = (batch or moves) and options.moments is None and inp.x.size == inp.n_channels > 0
    single = single and options.weights is None  # with weights, the values that count are counted
    if single and layer.on_single != "error":
        batch = batch and layer.on_single == "zero"
        moves = False
    return Course(layer.training or layer.train_parameters is True, batch, moves, single)


def renorm_of(layer: Any, course: Course) -> tuple[float, float] | None:
    """The bounds of batch renormalization for a call; None where there is none."""
    if layer.renorm is not None and layer.ghost_batch_size is not None:
        raise ValueError("renorm corrects the statistics of the whole batch, and ghost_batch_size cuts it: one of them")
    if layer.renorm is None or not (layer.training and course.batch_statistics) or course.single:
        return None
    if layer.running_mean is None or layer.running_var is None:
        raise ValueError("renorm needs running statistics, and the layer has none")
    if not callable(layer.renorm):
        return layer.renorm  # type: ignore[no-any-return]
    if layer.num_batches_tracked is None:
        raise ValueError("renorm is a function of num_batches_tracked, which the layer has not")
    return checks.renorm(layer.renorm(int(layer.num_batches_tracked)))


def normalize(
    inp: Input, now: Snapshot, unbiased: bool, out: Array | None, quantization: Quantization | None
) -> tuple[Array, Context, Move | None]:
    """y, the context of backward, and what the running statistics move by; None if by nothing."""
    course, (_, given, mix, weights) = now.course, now.options
    in_slices = course.batch_statistics and now.ghost and given is None and not course.single and inp.layout is not None
    selection: Selection | None = None
    moved: Moments | None
    if weights is not None and quantization is not None:
        raise ValueError(masked.NO_BYTES)
    if weights is not None and in_slices:
        return _weighted_slices(inp, now, unbiased, out)
    if weights is not None and inp.layout is not None:
        given_inp = inp
        inp, selection = masked.select(inp, weights)
        if out is None and inp is not given_inp:
            out = arrays.empty_like(given_inp.x)
        if given is None and (course.batch_statistics or course.tracked):
            masked.refuse_few(inp, selection)
    if in_slices:
        if now.nonfinite == "raise":
            refuse_nonfinite(measure(inp), now.nonfinite)
        y, context, whole = ghost.forward(inp, now.affine, now.eps, now.epilogue, out, now.ghost)
        return y, context, _move(whole, unbiased) if course.tracked else None
    if course.batch_statistics:
        y, context = _batch(inp, now, given, out, selection)
        moved = context.moments if given is None else given
        counts = given is not None or inp.layout is not None
    else:
        counts = course.tracked and inp.count > 0
        moved = measure(inp, selection=selection) if course.tracked else None  # before the pass, which may overwrite x
        if moved is not None:
            refuse_nonfinite(moved, now.nonfinite)
        if mix:
            y, context = _mixed(inp, now, mix, out, selection)
        else:
            y, context = _fixed(inp, now, out, quantization, selection)
    if selection is not None:
        context.special = context.special._replace(weights=weights, selection=selection)
    return y, context, _move(moved, unbiased) if moved is not None and course.tracked and counts else None


def _weighted_slices(
    inp: Input, now: Snapshot, unbiased: bool, out: Array | None
) -> tuple[Array, Context, Move | None]:
    """The same of ghost batches where not every value counts alike, one by one."""
    axis, weights, residual = 0 if inp.axis else 1, now.options.weights, now.epilogue.residual
    assert weights is not None
    selected, selection = masked.select(inp, weights)
    whole = measure(selected, selection=selection) if now.course.tracked else None
    y, parts = np.empty_like(inp.x), []
    for part in ghost.bounds(inp, now.ghost):
        at = (slice(None),) * axis + (part,)
        one = Input(inp.x[at], inp.axis)
        one.in_float64 = inp.in_float64
        epilogue = Epilogue(None if residual is None else residual[at], now.epilogue.act)
        options = now.options._replace(weights=weights.of(part, inp))
        y[at], context, _ = normalize(
            one, now._replace(ghost=0, epilogue=epilogue, options=options), unbiased, None, None
        )
        parts.append((np.arange(part.start, part.stop), context))
    none = np.zeros(inp.n_channels)
    context = Context(inp, now.affine, now.epilogue, True, none, none, none, special=Special(parts=parts))
    return steps.copied_into(y, out), context, None if whole is None else _move(whole, unbiased)


def _fixed(
    inp: Input, now: Snapshot, out: Array | None, quantization: Quantization | None, selection: Selection | None
) -> tuple[Array, Context]:
    """y, normalized with the running statistics."""
    mean, var, *_ = now.values
    context = Context(inp, now.affine, now.epilogue, False, mean, passes.inverse_std(var, now.eps))
    coef = steps.coefficients(mean, context.invstd, now.affine)
    if quantization is None:
        return steps.forward_fixed(inp, coef, now.epilogue, out, selection), context
    return quantized.forward_quantized(inp, coef, now.epilogue, out, quantization), context


def _mixed(
    inp: Input, now: Snapshot, mix: float, out: Array | None, selection: Selection | None
) -> tuple[Array, Context]:
    """y, normalized with a mixture of the running statistics and the batch's."""
    mean, var, *_ = now.values
    blend = Blend(mean, var, mix)
    return steps.forward_batch(inp, now.affine, now.eps, now.epilogue, out, blend=blend, selection=selection)


def _batch(
    inp: Input, now: Snapshot, given: Moments | None, out: Array | None, selection: Selection | None
) -> tuple[Array, Context]:
    """y, normalized with the batch's statistics, or given ones."""
    if given is not None:
        check_moments(given, inp.n_channels)
    elif now.nonfinite == "raise" or now.course.single:
        given = measure(inp, selection=selection)
    if given is not None:
        refuse_nonfinite(given, now.nonfinite)
    if now.renorm is not None:
        if now.options.moments is not None:
            raise ValueError("renorm corrects the batch's statistics, and moments takes their place: pass one of them")
        mean, var, *_ = now.values
        blend = Blend(mean, var, renorm=now.renorm)
        return steps.forward_batch(inp, now.affine, now.eps, now.epilogue, out, blend=blend, selection=selection)
    if given is None:
        return steps.forward_batch(inp, now.affine, now.eps, now.epilogue, out, selection=selection)
    # One value is its own mean: y is the bias, and 0 as invstd gives no gradient
    invstd = np.zeros(inp.n_channels) if now.course.single else passes.inverse_std(given.var(), now.eps)
    y, context = steps.forward_given(inp, now.affine, invstd, given, now.epilogue, out, selection)
    counts = inp.count if selection is None else selection.counts
    if not (given.count == counts).all():  # sums of weights may differ in their last digits
        context.special = Special(of_others=bool((np.abs(given.count - counts) > 1e-12 * given.count).any()))
    return y, context


def check_moments(given: Moments, n_channels: int) -> None:
    if given.mean.size != n_channels:
        raise ValueError(f"moments are of {given.mean.size} channels; expected {n_channels}, as the input has")
    if n_channels and not given.count.min() > 1:
        c = int(given.count.argmin())
        raise checks.ArgumentError(
            f"Expected more than 1 value per channel when training, got moments with count {given.count[c]:g} "
            f"in channel {c}"
        )


def refuse_nonfinite(found: Moments, nonfinite: str) -> None:
    if nonfinite != "raise":
        return
    bad = np.flatnonzero(~(np.isfinite(found.mean) & np.isfinite(found.m2)))
    if bad.size:
        raise NonFiniteError(f'the batch is not finite in {checks.channel_list(bad)}, and nonfinite is "raise"')


def _move(m: Moments, unbiased: bool) -> Move:
    count = float(m.count[0]) if m.count.size else 0.0
    if (m.count == count).all():
        return m.mean, m.m2, count, unbiased
    return m.mean, m.var(int(unbiased)), 1.0, False  # each channel's own
