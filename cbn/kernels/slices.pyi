"""Types of the compiled passes over slices; see slices.pyx."""

from typing import Any

import numpy as np
import numpy.typing as npt

from .arrays import Layout

_Array = npt.NDArray[Any]
_Doubles = npt.NDArray[np.float64]
_Cut = tuple[Layout, Layout, int, int, int]

def normalize(
    cut: _Cut,
    x: _Array,
    y: _Array,
    weight: _Doubles | None,
    bias: _Doubles | None,
    eps: float,
    count: float,
    in_float64: bool = False,
    residual: _Array | None = None,
    act: tuple[float, float, float] | None = None,
) -> tuple[_Doubles, _Doubles, _Doubles, _Doubles]: ...
def gradients(
    cut: _Cut,
    dy: _Array,
    x: _Array,
    dx: _Array,
    mean: _Doubles,
    invstd: _Doubles,
    weight: _Doubles | None = None,
    bias: _Doubles | None = None,
    in_float64: bool = False,
    residual: _Array | None = None,
    act: tuple[float, float, float] | None = None,
    dh: _Array | None = None,
    keeps_dh: bool = False,
) -> tuple[_Doubles, _Doubles]: ...
