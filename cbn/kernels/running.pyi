"""Types of the compiled calls of statistics; see running.pyx."""

from typing import Any

import numpy as np
import numpy.typing as npt

_Array = npt.NDArray[Any]
_Doubles = npt.NDArray[np.float64]

def moments(
    x: object, channel_axis: object, skipna: object, extrema: object
) -> tuple[_Doubles, _Doubles, _Doubles, _Doubles, Any, Any] | None: ...
def variance(count: _Doubles, m2: _Doubles, correction: float) -> _Doubles: ...
def merge(state: _Doubles, other: _Doubles, extrema: bool) -> None: ...
def update(state: _Doubles, x: object, shape: tuple[int, ...], skipna: bool, extrema: bool) -> bool: ...
def standardize(
    x: object,
    mean: object,
    var: object,
    channel_axis: object,
    out: object,
    eps: object,
    eps_outside: object,
    zero_var: object,
    clip: object,
    center: object,
) -> _Array | None: ...
def standardize_running(
    state: _Doubles,
    x: object,
    channel_axis: object,
    out: object,
    eps: object,
    zero_var: object,
    clip: object,
    center: object,
) -> _Array | None: ...
