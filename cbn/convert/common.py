"""Parts of all converters: a layer from arrays, the other convention of momentum, and checks for overrides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from .. import checks
from ..batchnorm import BatchNorm
from ..checks import Activation, Array

ARRAYS = ("weight", "bias", "running_mean", "running_var")


def layer_of(
    cls: type[BatchNorm],
    arrays: Mapping[str, Array | None],
    *,
    eps: float,
    momentum: float | None,
    names: Mapping[str, str] | None = None,
    n: int | None = None,
    channel_axis: int = 1,
    biased: bool = False,
    activation: Activation = None,
    training: bool = False,
    track: bool = True,
    counter: Array | int | None = 0,
) -> BatchNorm:
    """A layer with copies of these arrays (None stays None); a float64 layer if one of them is float64.

    `names` are the names of the arrays in errors. `n` is the number of channels if the arrays do not decide it.
    `counter` is num_batches_tracked, or None.
    """
    called = {name: (names or {}).get(name, name) for name in ARRAYS}
    there = {name: _parameter(a, called[name]) for name in ARRAYS if (a := arrays.get(name)) is not None}
    shape = Counter(a.shape for a in there.values()).most_common(1)[0][0] if n is None else (n,)
    if len(shape) != 1:
        name, a = next(iter(there.items()))
        raise ValueError(f"{called[name]} has shape {a.shape}; expected one value for each channel: (C,)")
    for name, a in there.items():
        if a.shape != shape:
            raise ValueError(f"{called[name]} has shape {a.shape}; expected {shape}")
    wide = any(a.dtype == np.float64 for a in there.values())
    layer = cls(
        shape[0],
        eps,
        momentum,
        dtype=np.float64 if wide else np.float32,
        channel_axis=channel_axis,
        running_var="biased" if biased else "unbiased",
        activation=activation,
        affine="weight" in there or "bias" in there,
    )
    for name in ARRAYS:
        if name in there:
            getattr(layer, name)[...] = there[name]
        else:
            setattr(layer, name, None)
    if "weight" not in there:
        layer.weight_grad = None
    if "bias" not in there:
        layer.bias_grad = None
    layer.track_running_stats = track and ("running_mean" in there or "running_var" in there)
    if counter is None or not ("running_mean" in there or "running_var" in there):
        layer.num_batches_tracked = None
    elif layer.num_batches_tracked is not None:
        layer.num_batches_tracked[...] = counter
    return layer.train(training)


def _parameter(a: Array, name: str) -> Array:
    """A parameter as float32 or float64; smaller types become float32."""
    if a.dtype.kind == "f" and a.dtype.itemsize in (4, 8):
        return a
    if (a.dtype.kind == "f" and a.dtype.itemsize == 2) or a.dtype.name.startswith(("bfloat16", "float8", "float4")):
        return a.astype(np.float32)
    raise TypeError(f"{name} has dtype {a.dtype}; expected a floating type of at most 64 bits")


def weight_of_new(momentum: float, name: str) -> float:
    """The weight of the new batch, 1 - momentum, without the rounding error of 1 - 0.99."""
    momentum = checks.number(momentum, name, "a number in [0, 1]")
    if not 0 <= momentum <= 1:
        raise ValueError(f"{name} must be in [0, 1] (the weight of the old statistics), but got {momentum}")
    return round(1 - momentum, 12)


def base_of(a: Any, names: Iterable[str], packages: Iterable[str]) -> type | None:
    """The class with one of these names and packages in the MRO of an object; None if there is none."""
    names, packages = set(names), set(packages)
    return next((c for c in type(a).__mro__ if c.__name__ in names and c.__module__.split(".")[0] in packages), None)


def refuse_start(decay: float, count: int, system: str) -> None:
    """Refuse debiased averages of few batches: the next batch would weigh (1 - decay)/(1 - decay**(count + 1))."""
    if decay >= 1:
        raise ValueError(f"with a weight of {decay} for the old statistics {system} has none: it divides them by zero")
    left = decay ** (count + 1)
    if left > 2.0**-24 * (1 - left):  # below that float32 has no other digits
        raise ValueError(
            f"the layer has seen {count} batches, and {system} corrects its averages for their start: the next batch "
            f"would weigh {(1 - decay) / (1 - left):.3g} there, and {1 - decay:.3g} here. For evaluation alone pass "
            "frozen=True"
        )


def listed(names: Iterable[str]) -> str:
    """Names for an error message."""
    return ", ".join(repr(name) for name in sorted(names)) or "none"


def one_of(found: Iterable[str], name: str | None) -> str:
    """The requested name, or the only one."""
    found = list(found)
    if name is None and len(found) == 1:
        return found[0]
    if name is None:
        raise ValueError(f"name one of {listed(found)}" if found else "there are no statistics of a batch norm")
    if name not in found:
        raise ValueError(f"there is no batch norm {name!r}; there are {listed(found)}")
    return name


def switched(
    own: Mapping[str, Any],
    flags: Mapping[str, bool | None],
    name: str,
    there: Iterable[str],
    prefix: str,
    hint: str = "",
) -> dict[str, bool]:
    """Which parameters a module has. A flag that contradicts is an error; so are no parameters without a flag."""
    for key, flag in flags.items():
        if flag is not None and flag != (key in own):
            raise ValueError(f"{prefix}{key} is {flag}, but {name!r} has {'a' if key in own else 'no'} {key}")
    if not any(key in own for key in flags) and None in flags.values():
        no = ", ".join(f"{prefix}{key}=False" for key in flags)
        raise ValueError(
            f"there are no parameters {name!r}; there are {listed(there)}{hint}. For a module without any pass {no}"
        )
    return {key: key in own for key in flags}


# Special methods that change what a call computes; a subclass may redefine other special methods.
MEANT = {"__call__", "__getattribute__", "__getattr__", "__getitem__", "__contains__"}


def overrides(a: Any, base: type, call: str, read: Iterable[str], harmless: Iterable[str]) -> list[str]:
    """Names that an object's class redefines, and functions that the object has as attributes.

    `call` is the method that computes; a patch may have replaced it in the base too. `read` are attributes that a
    subclass may turn into properties.
    """
    found = []
    read, harmless = set(read), set(harmless)
    cls = type(a)
    for c in cls.__mro__[: cls.__mro__.index(base)]:
        for name, value in vars(c).items():
            special = name.startswith("__") and name.endswith("__")
            if name in harmless or (special and name not in MEANT):
                continue
            if hasattr(base, name) or (name in read and hasattr(type(value), "__get__")) or name in MEANT:
                found.append(name)
    for name in vars(a):
        if name not in harmless and callable(getattr(cls, name, None)):
            found.append(name)
    if not found:
        root = (getattr(getattr(base, call), "__module__", None) or "").split(".")[0]
        if root != base.__module__.split(".")[0]:
            found.append(call)
    return sorted(set(found))


def refuse_overrides(a: Any, base: type, call: str, read: Iterable[str], harmless: Iterable[str]) -> None:
    """Refuse an object that may compute other values than its base."""
    found = overrides(a, base, call, read, harmless)
    if found:
        kind = f"{type(a).__module__}.{type(a).__qualname__}"
        raise TypeError(
            f"{kind} redefines {', '.join(found)} of {base.__name__}, so its values may be others; "
            f"convert a plain {base.__name__} with its parameters if that does not matter"
        )


def kind_of(a: Any) -> str:
    """An object's class with its module, for errors."""
    return f"{type(a).__module__}.{type(a).__qualname__}"


def missing_package(function: str, package: str, extra: str) -> ImportError:
    """The error of a function that needs a missing package."""
    return ImportError(f'{function} needs the {package} package: pip install "cbn[{extra}]"')
