"""Entries of state dicts and files: checks, conversions, and hints for entries that are elsewhere."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from . import checks
from .checks import Array


def array(value: Any, name: str) -> Array:
    """value as an array, or a ValueError that names it. It reads PyTorch tensors without importing PyTorch."""
    try:
        checks.unmasked(value, name)
        if callable(getattr(value, "detach", None)) and callable(getattr(value, "cpu", None)):
            value = value.detach().cpu()
        try:
            return np.asarray(value)
        except TypeError:  # a bfloat16 or 8-bit tensor, which numpy cannot read
            if not callable(getattr(value, "float", None)) or not value.is_floating_point():
                raise
            return np.asarray(value.float())
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} cannot be read as an array ({error})") from None


def entry(
    name: str,
    value: Any,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    *,
    prefix: str = "",
    allow_nonfinite: bool = False,
    eps: float | None = None,
) -> Array:
    """A copy of one entry with this shape and dtype, or a ValueError that names it, prefix included.

    With `eps` a negative variance is accepted if its sum with eps is positive.
    """
    key = prefix + name
    a = array(value, key)
    integers = a.dtype.kind in "iu"
    if a.dtype.kind == "O":
        kind = "an array of objects" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
        raise ValueError(f"{key} is {kind}, which numpy does not read as numbers{checks.maker(value, key)}")
    if not (integers or a.dtype.kind == "f" or a.dtype.name.startswith(("bfloat", "float"))):  # ml_dtypes' are "V"
        raise ValueError(f"{key} has dtype {a.dtype}; expected {dtype}")
    if a.shape != shape:
        raise ValueError(f"{key} has shape {a.shape}; expected {shape}")
    if dtype.kind == "i":  # the counter, which is a float in a bfloat16 state
        for count in a.ravel() if integers else a.ravel().astype(np.float64):
            number = int(count) if integers else float(count)
            if not (abs(number) < 2**63 and number == int(number)):
                raise ValueError(f"{key} is {number}; expected an integer of 64 bits")
    with np.errstate(all="ignore"):
        a = a.astype(dtype)
    if not allow_nonfinite and not np.all(np.isfinite(a)):
        raise ValueError(f"{key} is not finite")
    if name == "num_batches_tracked" and np.any(a < 0):
        raise ValueError(f"{key} is negative: {a}")
    if name == "running_var" and np.any(a < 0):
        i = int(np.nanargmin(a))
        least, channel = a.ravel()[i], i % shape[-1]
        if eps is None:
            raise ValueError(
                f"{key} is negative: {least!s} in channel {channel} "
                "(save and load accept it with allow_negative_var=True)"
            )
        if float(least) + eps <= 0:
            raise ValueError(
                f"{key} is negative: {least!s} in channel {channel}, and not positive even with eps, {eps}"
            )
    return a


def differences(missing: list[str], unexpected: list[Any], most: int = 20) -> list[str]:
    """The problems of a strict load, in PyTorch's words."""
    problems = []
    for kind, keys in (("missing", missing), ("unexpected", unexpected)):
        if keys:
            listed = ", ".join(f"{kind} entry {key!r}" for key in keys[:most])
            more = f" and {len(keys) - most} more" if len(keys) > most else ""
            problems.append(f"{listed}{more} ({kind.capitalize()} key(s) in state_dict)")
    return problems


def hint(state: Mapping[Any, Any], names: Sequence[str], shape: tuple[int, ...]) -> str:
    """A hint where else in `state` the entries `names` of a layer seem to be; empty if nowhere."""
    if found := _prefixes(state, names, shape):
        return f"; the state has such entries with {_listed(found)}"
    for key, inner in state.items():
        if not isinstance(inner, Mapping):
            continue
        found = _prefixes(inner, names, shape)
        if found or any(name in inner for name in names):
            return f"; the entries seem to be in state[{key!r}]" + (f", with {_listed(found)}" if found else "")
    return ""


def _prefixes(state: Mapping[Any, Any], names: Sequence[str], shape: tuple[int, ...]) -> list[str]:
    """The prefixes of all `names` in `state`; if some entries have this shape, their prefixes alone."""
    first, *others = names
    ends = [key.removesuffix(first) for key in state if isinstance(key, str) and key.endswith(first) and key != first]
    found = [prefix for prefix in ends if all(prefix + name in state for name in others)]
    return [prefix for prefix in found if getattr(state[prefix + first], "shape", None) == shape] or found


def _listed(prefixes: list[str], most: int = 3) -> str:
    more = len(prefixes) - most
    return " or ".join(f"prefix={p!r}" for p in prefixes[:most]) + (f" and {more} more" if more > 0 else "")
