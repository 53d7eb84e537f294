"""Layers with several sets of running statistics: samples of different domains share weight and bias alone.

Row d of the statistics is that of domain d. A call for one domain is that of a layer which has this row as its own. A
call with samples of several domains normalizes those of each by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import checks, course
from .checks import Array
from .course import Options
from .inputs import Input
from .kernels import arrays
from .quantized import Quantization
from .steps import Affine, Context, Epilogue, Gradients, Special, copied_into


def one(layer: Any, d: int) -> Any:
    """A layer whose running statistics are row d of this one's: views, so what moves them moves the row."""
    layer.num_batches_skipped  # noqa: B018  makes the array, which all domains share
    other = layer.__copy__()
    rows = {f"_{name}": getattr(layer, name) for name in ("running_mean", "running_var")}
    counter = layer.num_batches_tracked
    other.__dict__.update({name: None if a is None else a[d] for name, a in rows.items()}, _num_domains=None)
    # Without dimensions, as an array and not a number: so it stays a view
    other.__dict__["_num_batches_tracked"] = None if counter is None else counter[d, ...]
    other._find_usual()
    return other


def checked(domain: Any, n_domains: int | None, n_samples: int) -> int | Array:
    """`domain` of a call: a number, or one for each sample."""
    if n_domains is None:
        if domain is not None:
            raise ValueError("domain is for layers with num_domains, and this one has none")
        return 0
    if domain is None:
        raise ValueError(f"the layer has num_domains={n_domains}: pass domain=, a number or one for each sample")
    if np.ndim(domain) == 0:
        d = checks.integer(domain, "domain", "an integer, or one for each sample")
        if not 0 <= d < n_domains:
            raise ValueError(f"domain must be from 0 to {n_domains - 1}, but got {d}")
        return d
    a = checks.array(domain, "domain")
    if a.dtype.kind not in "iu":
        raise TypeError(f"domain has dtype {a.dtype}; expected integers")
    if a.shape != (n_samples,):
        raise ValueError(f"domain has shape {a.shape}; expected ({n_samples},), one for each sample")
    wrong = np.flatnonzero((a < 0) | (a >= n_domains))
    if wrong.size:
        raise ValueError(f"domain must be from 0 to {n_domains - 1}, but got {a[wrong[0]]} for sample {wrong[0]}")
    return a


def groups(domain: Array) -> list[tuple[int, Array]]:
    """The domains of a call in ascending order, and the samples of each."""
    return [(int(d), np.flatnonzero(domain == d)) for d in np.unique(domain)]


def forward(
    layer: Any,
    inp: Input,
    out: Array | None,
    residual: Array | None,
    options: Options,
    quantization: Quantization | None,
    domain: Any,
) -> Array:
    """A forward of a layer with domains. All parts are normalized before anything moves."""
    axis = 0 if inp.axis else 1
    domain = checked(domain, layer.num_domains, inp.x.shape[axis])
    if not isinstance(domain, np.ndarray):
        of_domain = one(layer, domain)
        y = _normalize(of_domain, inp, out, residual, options, quantization)()
        layer._remember(of_domain._saved)
        return y
    parts, weights = [], options.weights
    for d, samples in groups(domain):
        part = Input(np.take(inp.x, samples, axis), inp.axis, inp.y_dtype)
        part.in_float64 = inp.in_float64
        of_residual = None if residual is None else np.take(residual, samples, axis)
        of_domain = one(layer, d)
        now = options if weights is None else options._replace(weights=weights.of(samples, inp))
        parts.append((samples, of_domain, _normalize(of_domain, part, None, of_residual, now, quantization)))
    y = arrays.empty_like(inp.x, inp.y_dtype) if out is None else out
    for samples, _, finish in parts:
        y[(slice(None),) * axis + (samples,)] = finish()
    saved = [(samples, of_domain._saved) for samples, of_domain, _ in parts]
    layer._remember(_context(inp, Epilogue(residual, layer._act), saved))
    return y


def _normalize(
    layer: Any,
    inp: Input,
    out: Array | None,
    residual: Array | None,
    options: Options,
    quantization: Quantization | None,
) -> Callable[[], Array]:
    """Normalize now; what is returned moves the statistics and gives y."""
    now = layer._read(inp, residual, quantization, options)
    y, context, moved = course.normalize(inp, now, layer._unbiased, out, quantization)

    def finish() -> Array:
        layer._finish(context, out, now.running, moved, now.course.remembers)
        return y

    return finish


def _context(inp: Input, epilogue: Epilogue, parts: list[tuple[Array, str | Context]]) -> str | Context:
    """What backward of all parts needs; a reason if one of them has none. The parts hold copies."""
    contexts = []
    for samples, part in parts:
        if isinstance(part, str):
            return part
        contexts.append((samples, part))
    affine = contexts[0][1] if contexts else None
    renorm = None if affine is None else affine.special.renorm
    of_all = Affine(None, None) if affine is None else affine.affine if renorm is None else renorm.affine
    none = np.zeros(inp.n_channels)
    return Context(inp, of_all, epilogue, True, none, none, none, special=Special(parts=contexts))


def backward(differentiate: Any, dy: Array, context: Context, want_sums: bool, out: Array | None) -> Gradients:
    """Gradients of a call with several domains: of the parameters those of all together."""
    inp, axis = context.inp, 0 if context.inp.axis else 1
    dx = arrays.empty_like(inp.x)
    dresidual = None if context.epilogue.residual is None else arrays.empty_like(inp.x)
    dweight, dbias = np.zeros((2, inp.n_channels))
    for samples, part in context.special.parts:
        at = (slice(None),) * axis + (samples,)
        found = differentiate(np.ascontiguousarray(dy[at]), part, want_sums, None)
        dx[at] = found.dx
        if dresidual is not None:
            dresidual[at] = found.dresidual
        with np.errstate(all="ignore"):
            dweight = dweight + (0 if found.dweight is None else found.dweight)
            dbias = dbias + (0 if found.dbias is None else found.dbias)
    return Gradients(copied_into(dx, out), dresidual, dweight, dbias)
