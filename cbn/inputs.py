"""Arguments of a call, checked and in the form that the passes read. Nothing here computes."""

from __future__ import annotations

from typing import Any, SupportsIndex

import numpy as np

from . import checks
from .checks import Array, ArrayLike, Doubles
from .kernels import arrays

Input = arrays.Input


def as_input(
    x: ArrayLike,
    channel_axis: SupportsIndex,
    name: str = "input",
    ranks: tuple[int, ...] | None = None,
    y_dtype: np.dtype[Any] | None = None,
) -> Input:
    """x as an array that the passes can read, or an error that calls it `name`.

    ranks: the accepted numbers of dimensions; None: 2 or more. y_dtype: the output's dtype for an 8-bit x, which must
    be a view of the caller's own.
    """
    a: Array | Any = arrays.plain_view(x) if y_dtype is None else x
    if a is None:
        a = arrays.with_room(checks.float_array, x, name)
    checks.rank(a, ranks)
    return Input(a, checks.axis_index(channel_axis, a.ndim), y_dtype)


def as_measured(x: ArrayLike, channel_axis: SupportsIndex) -> Input:
    """x as an array that `moments` can read, integers too, or an error."""
    a: Array | Any = arrays.plain_view(x)
    if a is None:
        a = arrays.with_room(checks.measured_array, x, "input")
    checks.rank(a, None)
    return Input(a, checks.axis_index(channel_axis, a.ndim))


def as_weights(
    inp: Input,
    mask: ArrayLike | None,
    weights: ArrayLike | None,
) -> Doubles | Any:
    """`mask` and `weights` as one float64 array that broadcasts to the input; None if they are all ones.

    Where one weight is for all channels, the array has length 1 along their axis.
    """
    of: Doubles | Any = None
    if weights is not None:
        of = checks.sample_weights(weights, inp.x.shape, inp.axis)
        if np.all(of == 1):
            of = None
    if mask is not None:
        counts = checks.mask(mask, inp.x.shape, inp.axis)
        if not counts.all():
            of = arrays.with_room(counts.astype, np.float64) if of is None else np.where(counts, of, 0.0)
    return of


def as_outputs(inp: Input, out: Array | None, residual: ArrayLike | None) -> tuple[Array | Any, Array | Any]:
    """`out` and `residual` in a form that the loops can use with this input, or an error."""
    dtype = inp.x.dtype if inp.y_dtype is None else inp.y_dtype
    expected = "as the input" if inp.y_dtype is None else "as out_dtype"
    out = checks.output(out, inp.x.shape, dtype, expected)
    if residual is None:
        return out, None
    return out, inp.matched(arrays.with_room(checks.residual, residual, inp.x, dtype, expected))


def as_gradient(inp: Input, dy: ArrayLike, name: str = "dy") -> Array:
    """The gradient of y for this input, with any floating dtype, or an error that calls it `name`."""
    a: Array | Any = arrays.plain_view(dy)
    if a is None:
        a = arrays.with_room(checks.float_array, dy, name)
    if a.shape != inp.x.shape:
        raise ValueError(f"{name} has shape {a.shape}; expected {inp.x.shape}, as the input")
    return a


def as_statistics(
    inp: Input,
    train: bool,
    running_mean: ArrayLike | None,
    running_var: ArrayLike | None,
    save_mean: ArrayLike | None,
    save_invstd: ArrayLike | None,
) -> tuple[Array, Array]:
    """The statistics of a forward pass: the saved mean and invstd if `train`, else the running mean and variance."""
    if train:
        mean = checks.per_channel(save_mean, "save_mean", inp.n_channels, x=inp.x)
        invstd = checks.per_channel(save_invstd, "save_invstd", inp.n_channels, x=inp.x)
        if mean is None or invstd is None:
            raise checks.ArgumentError("save_mean and save_invstd must be defined in training mode")
        return mean, invstd
    checks.buffers_for_eval(running_mean, running_var)
    return (
        checks.per_channel(running_mean, "running_mean", inp.n_channels, x=inp.x),
        checks.per_channel(running_var, "running_var", inp.n_channels, x=inp.x),
    )
