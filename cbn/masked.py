"""Batches of which not every value counts alike: masks, lengths, weights of samples.

Statistics and gradients are over what counts; what does not, gets 0 in y and dx, and is read into nothing. With the
weights w of the values of a channel, n = S(w), d = x - mean and r = invstd::

    mean = S(w*x)/n    var = S(w*d^2)/n    dbias = S(dy)    dweight = S(d*dy)*r        sums over w > 0
    dx   = (dy - w*S(dy)/n - w*d*S(d*dy)*r^2/n)*r*weight
"""

from __future__ import annotations

import numpy as np

from . import checks, steps
from .checks import NO_ACT, Array, Doubles
from .inputs import Input
from .kernels import arrays, passes
from .moments import Moments, measure
from .steps import Affine, Blend, Context, Epilogue, Gradients, Renorm, Special, copied_into

NO_BYTES = "mask, lengths and sample_weight need floating input, not 8-bit"


def per_channel(inp: Input, weights: Array) -> Doubles:
    """The sums over each channel of an array that broadcasts to the input."""
    shape = [1 if i == inp.axis and weights.shape[i] == 1 else n for i, n in enumerate(inp.x.shape)]
    rest = tuple(axis for axis in range(inp.x.ndim) if axis != inp.axis)
    return np.broadcast_to(np.broadcast_to(weights, shape).sum(axis=rest, dtype=np.float64), inp.n_channels)


def refuse_few(inp: Input, weights: Doubles, found: Moments) -> None:
    """PyTorch's error, for the channel of which the least counts."""
    if not inp.x.size:
        return
    wrong = (per_channel(inp, weights != 0) < 2) | ~(found.count > 1)
    if wrong.any():
        c = int(np.where(wrong, found.count, np.inf).argmin())
        raise checks.ArgumentError(
            f"Expected more than 1 value per channel when training, got weights that add up to {found.count[c]:g} in "
            f"channel {c}, input size {inp.x.shape}"
        )


def expanded(v: Doubles, inp: Input) -> Doubles:
    """Values per channel, in a shape that broadcasts to the input."""
    return v.reshape([-1 if i == inp.axis else 1 for i in range(inp.x.ndim)])


def blended(blend: Blend, affine: Affine, found: Moments, eps: float) -> tuple[Doubles, Doubles, Affine, Renorm | None]:
    """(mean, variance, affine, renorm) that normalize: a mixture with the running statistics, or renormalization."""
    mean, var = found.mean, found.var()
    if blend.renorm == steps.NO_RENORM:
        a, between = blend.mix, blend.mean - mean
        return (1 - a) * blend.mean + a * mean, (1 - a) * blend.var + a * var + a * (1 - a) * between**2, affine, None
    r_max, d_max = blend.renorm
    s = np.sqrt(blend.var + eps)
    r = np.clip(np.sqrt(var + eps) / s, 1 / r_max, r_max)
    d = np.clip((mean - blend.mean) / s, -d_max, d_max)
    weight = np.ones_like(mean) if affine.weight is None else affine.weight
    bias = d * weight if affine.bias is None else affine.bias + d * weight
    return mean, var, Affine(weight * r, bias), Renorm(r, d, affine)


def forward(inp: Input, context: Context, out: Array | None) -> Array:
    """y by the context's statistics, and 0 where nothing counts."""
    coef = steps.coefficients(context.mean, context.invstd, context.affine)
    overwrites = out is not None and arrays.overlaps(out, inp.x)
    y = steps.forward_fixed(inp, coef, context.epilogue, None if overwrites else out)
    np.copyto(y, 0, where=np.broadcast_to(context.special.weights == 0, y.shape))
    return copied_into(y, out)


def normalize(
    inp: Input,
    affine: Affine,
    eps: float,
    epilogue: Epilogue,
    out: Array | None,
    weights: Doubles,
    fixed: tuple[Doubles, Doubles] | None,
) -> tuple[Array, Moments | None]:
    """y and the moments of the batch, which normalize; or y by a `fixed` mean and invstd."""
    found = None
    if fixed is None:
        found = measure(inp, weights)
        refuse_few(inp, weights, found)
        fixed = found.mean, passes.inverse_std(found.var(), eps)
    context = Context(inp, affine, epilogue, found is not None, *fixed, special=Special(weights=weights))
    return forward(inp, context, out), found


def backward(dy: Array, context: Context, out: Array | None) -> Gradients:
    """Gradients, in float64 arithmetic, rounded to x's dtype."""
    inp, weights = context.inp, context.special.weights
    counts = np.broadcast_to(weights != 0, inp.x.shape)
    if not inp.x.size:
        zeros = np.zeros((2, inp.n_channels))
        dresidual = None if context.epilogue.residual is None else arrays.empty_like(inp.x)
        return Gradients(arrays.empty_like(inp.x) if out is None else out, dresidual, *zeros)
    with np.errstate(all="ignore"):
        dh = np.where(counts, dy, 0).astype(np.float64)
        _through_activation(dh, context)
        dh[~counts] = 0
        # The mean in the place of what does not count: no distance, whatever was there
        wide = Input(np.where(counts, inp.x, expanded(context.mean, inp)).astype(np.float64), inp.axis)
        sums, products, dweight = passes.grad_moments(wide.layout, dh, wide.x, context.mean, context.invstd)
        dx = _solved(dh, wide, context, sums, products)
        dx[~counts] = 0
        rounded = arrays.with_room(dx.astype, inp.x.dtype)
        dresidual = None if context.epilogue.residual is None else arrays.with_room(dh.astype, inp.x.dtype)
        renorm = context.special.renorm
        if renorm is not None:
            dweight = renorm.r * dweight + renorm.d * sums
    return Gradients(copied_into(rounded, out), dresidual, dweight, sums)


def _through_activation(dh: Array, context: Context) -> None:
    """Multiply by the slope of the activation, which the forward pass's own arithmetic decides."""
    act = context.epilogue.act
    if act == NO_ACT:
        return
    a = steps.before_activation(context)
    below = a <= 0
    dh[below] = dh[below] * act.slope if act.slope else 0
    dh[(a <= act.low) | (a >= act.high)] = 0


def _solved(dh: Array, wide: Input, context: Context, sums: Doubles, products: Doubles) -> Array:
    """dx by the formula above."""
    scale = context.invstd if context.affine.weight is None else passes.product(context.invstd, context.affine.weight)
    plain = dh * expanded(scale, wide)
    if not context.batch_statistics:
        return plain
    n = np.array(np.broadcast_to(np.asarray(context.count, np.float64), sums.shape))
    slope = products / n * context.invstd**2 * scale
    d = wide.x - expanded(context.mean, wide)
    return plain - context.special.weights * (expanded(sums / n * scale, wide) + d * expanded(slope, wide))
