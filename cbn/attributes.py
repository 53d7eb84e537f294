"""Attributes of a layer that check, and if needed convert, what is assigned to them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Protocol, overload

import numpy as np

from . import checks
from .checks import Array
from .kernels import arrays


class HasChannels(Protocol):
    """The part of a layer that the attributes use."""

    @property
    def num_features(self) -> int: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    @property
    def num_domains(self) -> int | None: ...


class ChannelArray:
    """Attribute with a (C,) array of the layer's dtype, or None if it is switched off."""

    name: str
    key: str

    def __set_name__(self, owner: type[Any], name: str) -> None:
        self.name, self.key = name, "_" + name

    @overload
    def __get__(self, layer: None, owner: type[Any]) -> ChannelArray: ...
    @overload
    def __get__(self, layer: HasChannels, owner: type[Any] | None = None) -> Array | Any: ...
    def __get__(self, layer: HasChannels | None, owner: type[Any] | None = None) -> ChannelArray | Array | Any:
        return self if layer is None else layer.__dict__[self.key]

    def __set__(self, layer: HasChannels, value: Array | None) -> None:
        layer.__dict__[self.key] = arrays.with_room(self.checked, layer, value)

    def checked(self, layer: HasChannels, value: Array | None) -> Array | None:
        if value is None:
            return None
        if not isinstance(value, np.ndarray):
            raise TypeError(f"{self.name} must be a numpy array or None, not {type(value).__name__}")
        if layer.num_features is None:
            raise ValueError(f"num_features is not known before the first call, so {self.name} has no shape yet")
        if value.shape != (layer.num_features,):
            raise ValueError(f"{self.name} has shape {value.shape}; expected ({layer.num_features},)")
        value = checks.per_channel(value, self.name, layer.num_features)
        return value if value.dtype == layer.dtype else value.astype(layer.dtype)


class StatisticsArray(ChannelArray):
    """The same, with a row for each domain where a layer has domains."""

    def checked(self, layer: HasChannels, value: Array | None) -> Array | None:
        n, d = layer.num_features, layer.num_domains
        if d is None or value is None or n is None:
            return super().checked(layer, value)
        if not isinstance(value, np.ndarray):
            raise TypeError(f"{self.name} must be a numpy array or None, not {type(value).__name__}")
        if value.shape != (d, n):
            raise ValueError(f"{self.name} has shape {value.shape}; expected {(d, n)}, a row for each domain")
        value = checks.per_channel(value.reshape(-1), self.name, d * n).reshape(d, n)
        return np.ascontiguousarray(value, layer.dtype)


class Counter(ChannelArray):
    """Attribute num_batches_tracked: an int64 array without dimensions, or one number for each domain, or None."""

    def checked(self, layer: HasChannels, value: Array | None) -> Array | None:
        if value is None:
            return None
        if isinstance(value, np.ndarray) and type(value) is not np.ndarray:
            value = np.ndarray.view(value, np.ndarray)  # a subclass may misstate its shape or dtype
        shape = () if layer.num_domains is None else (layer.num_domains,)
        if not isinstance(value, np.ndarray) or value.shape != shape or value.dtype.kind not in "iu":
            kind = f"of shape {shape}" if shape else "without dimensions"
            raise TypeError(f"{self.name} must be an integer array {kind}, or None, not {value!r}")
        if value.size and not 0 <= int(value.min()) <= int(value.max()) < 1 << 63:
            raise ValueError(f"{self.name} must be an integer from 0 to 2^63 - 1, but got {value}")
        return value if value.dtype == np.int64 else value.astype(np.int64)


class Flag:
    """Attribute that accepts bools alone."""

    name: str
    key: str

    def __set_name__(self, owner: type, name: str) -> None:
        self.name, self.key = name, "_" + name

    def __get__(self, layer: Any, owner: type | None = None) -> bool:
        return self if layer is None else layer.__dict__[self.key]  # type: ignore[return-value]

    def __set__(self, layer: Any, value: bool) -> None:
        layer.__dict__[self.key] = checks.boolean(value, self.name)


class Switch:
    """Attribute that accepts None, for what the mode says, and bools."""

    name: str
    key: str

    def __set_name__(self, owner: type, name: str) -> None:
        self.name, self.key = name, "_" + name

    def __get__(self, layer: Any, owner: type | None = None) -> bool | None:
        return self if layer is None else layer.__dict__[self.key]  # type: ignore[return-value]

    def __set__(self, layer: Any, value: bool | None) -> None:
        layer.__dict__[self.key] = None if value is None else checks.boolean(value, f"{self.name}, if not None,")
        layer._find_usual()


class Choice:
    """Attribute that accepts some words."""

    name: str
    key: str

    def __init__(self, *words: str) -> None:
        self.words = words

    def __set_name__(self, owner: type, name: str) -> None:
        self.name, self.key = name, "_" + name

    def __get__(self, layer: Any, owner: type | None = None) -> str:
        return self if layer is None else layer.__dict__[self.key]  # type: ignore[return-value]

    def __set__(self, layer: Any, value: str) -> None:
        if not isinstance(value, str) or value not in self.words:
            raise ValueError(
                f"{self.name} must be {', '.join(map(repr, self.words[:-1]))} or {self.words[-1]!r}, not {value!r}"
            )
        layer.__dict__[self.key] = value
        layer._find_usual()


def accepted_dtype(dtype: Any, native: Callable[[np.dtype[Any]], np.dtype[Any] | None], expected: str) -> np.dtype[Any]:
    """A dtype that `native` accepts. None, which numpy reads as float64, is refused."""
    words = repr(dtype)
    if dtype is not None:
        with contextlib.suppress(TypeError):
            found = checks.dtype_of(dtype)
            words = str(found)
            if accepted := native(found):
                return accepted
    raise TypeError(f"dtype must be {expected}, not {words}")
