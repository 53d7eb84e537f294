"""What a caller gives, as the passes take it: checked, in a form that the loops read. Nothing here computes."""

from __future__ import annotations

from typing import Any, SupportsIndex

import numpy as np

from . import checks
from .checks import Array, ArrayLike
from .kernels import arrays

Input = arrays.Input


def as_input(
    x: ArrayLike,
    channel_axis: SupportsIndex,
    name: str = "input",
    ranks: tuple[int, ...] | None = None,
    y_dtype: np.dtype[Any] | None = None,
) -> Input:
    """An array that the passes can read, or a refusal that calls it `name`.

    ranks: the numbers of dimensions that it may have; None: any from 2. y_dtype: of the output, for an x of 8 bits, of
    which the caller has made a view that nobody else can change.
    """
    a: Array | Any = arrays.plain_view(x) if y_dtype is None else x
    if a is None:
        a = arrays.with_room(checks.float_array, x, name)
    checks.rank(a, ranks)
    return Input(a, checks.axis_index(channel_axis, a.ndim), y_dtype)


def as_outputs(inp: Input, out: Array | None, residual: ArrayLike | None) -> tuple[Array | Any, Array | Any]:
    """`out` and `residual` as the loops can use them beside the input, or a refusal."""
    dtype = inp.x.dtype if inp.y_dtype is None else inp.y_dtype
    expected = "as the input" if inp.y_dtype is None else "as out_dtype"
    out = checks.output(out, inp.x.shape, dtype, expected)
    if residual is None:
        return out, None
    return out, inp.matched(arrays.with_room(checks.residual, residual, inp.x, dtype, expected))


def as_gradient(inp: Input, dy: ArrayLike) -> Array:
    """The gradient of y for this input, of any floating dtype, or a refusal."""
    a = arrays.with_room(checks.float_array, dy, "dy")
    if a.shape != inp.x.shape:
        raise ValueError(f"dy has shape {a.shape}; expected {inp.x.shape}, as the input")
    return a
