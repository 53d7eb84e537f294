"""Types of the compiled reads and writes of arrays per channel; see channels.pyx."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_Array = npt.NDArray[Any]
_Doubles = npt.NDArray[np.float64]

def as_doubles(n: int, *arrays: _Array | None) -> tuple[_Doubles | Any, ...]: ...
def rounded(values: _Doubles, dtype: np.dtype[Any]) -> _Array: ...
def copies(*arrays: _Array | None) -> tuple[_Array | Any, ...]: ...
def check_writable(arrays: tuple[_Array | None, ...], names: tuple[str, ...]) -> None: ...
def replace(targets: Sequence[_Array | None], values: Sequence[_Array | None], names: Sequence[str]) -> None: ...
def add(targets: Sequence[_Array | None], values: Sequence[_Doubles | None], names: Sequence[str]) -> None: ...
def move_running(
    mean: _Array | None,
    var: _Array | None,
    counter: _Array | None,
    batch_mean: _Doubles,
    batch_m2: _Doubles,
    count: float,
    momentum: float | None,
    unbiased: bool = True,
    old: tuple[_Doubles, _Doubles] | None = None,
    attributes: dict[str, Any] | None = None,
    saved: object = None,
    skipped: npt.NDArray[np.int64] | None = None,
) -> object: ...
