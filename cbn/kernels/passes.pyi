"""Types of the compiled passes; see passes.pyx."""

from typing import Any, SupportsIndex, final

import numpy as np
import numpy.typing as npt

from ..masked import Selection
from .arrays import Layout

_Array = npt.NDArray[Any]
_Doubles = npt.NDArray[np.float64]

def moments(
    layout: Layout,
    x: _Array,
    skipna: bool = False,
    weights: _Doubles | None = None,
    count: _Doubles | None = None,
    extrema: bool = False,
    selection: Selection | None = None,
) -> tuple[_Doubles, _Doubles, _Doubles, Any, Any]: ...
def merge_moments(
    a: tuple[_Doubles, _Doubles, _Doubles, _Doubles], b: tuple[_Doubles, _Doubles, _Doubles, _Doubles]
) -> tuple[_Doubles, _Doubles, _Doubles, _Doubles]: ...
def inverse_std(var: _Doubles, eps: float) -> _Doubles: ...
def product(a: _Doubles, b: _Doubles) -> _Doubles: ...
def coefficients(mean: _Doubles, invstd: _Doubles, weight: _Doubles | None, bias: _Doubles | None) -> _Doubles: ...
def fits_float32(coef: _Doubles) -> bool: ...
def apply(
    layout: Layout,
    x: _Array,
    y: _Array,
    coef: _Doubles,
    in_float64: bool = False,
    residual: _Array | None = None,
    act: tuple[float, float, float] | None = None,
    selection: Selection | None = None,
) -> None: ...
def convert(
    layout: Layout,
    x: _Array,
    y: _Array,
    coef: _Doubles,
    in_float64: bool = False,
    act: tuple[float, float, float] | None = None,
) -> None: ...
def standard_coefficients(
    mean: _Doubles | None, var: _Doubles, eps: float, outside: bool, zero_is_one: bool
) -> _Doubles: ...
def normalize(
    layout: Layout,
    x: _Array,
    y: _Array,
    weight: _Doubles | None,
    bias: _Doubles | None,
    eps: float,
    in_float64: bool = False,
    residual: _Array | None = None,
    act: tuple[float, float, float] | None = None,
    blend: tuple[_Doubles, _Doubles, float, float, float] | None = None,
    selection: Selection | None = None,
) -> tuple[_Doubles, _Doubles, _Doubles]: ...
def grad_moments(
    layout: Layout,
    dy: _Array,
    x: _Array,
    mean: _Doubles,
    invstd: _Doubles,
    weight: _Doubles | None = None,
    bias: _Doubles | None = None,
    in_float64: bool = False,
    residual: _Array | None = None,
    act: tuple[float, float, float] | None = None,
    dh: _Array | None = None,
    y_dtype: np.dtype[Any] | None = None,
    selection: Selection | None = None,
) -> tuple[_Doubles, _Doubles, _Doubles]: ...
def gradients(
    layout: Layout,
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
    y_dtype: np.dtype[Any] | None = None,
    selection: Selection | None = None,
) -> tuple[_Doubles, _Doubles, _Doubles]: ...
def grad_coefficients(
    mean: _Doubles,
    invstd: _Doubles,
    weight: _Doubles | None,
    sum_dh: _Doubles,
    sum_dh_xmu: _Doubles,
    count: _Doubles,
) -> _Doubles: ...
def grad_apply(
    layout: Layout,
    dh: _Array,
    x: _Array,
    dx: _Array,
    coef: _Doubles,
    in_float64: bool = False,
    selection: Any = None,
) -> None: ...
def double_backward(
    layout: Layout,
    ggI: _Array,
    dy: _Array,
    x: _Array,
    grad_dy: _Array,
    grad_x: _Array,
    mean: _Doubles,
    invstd: _Doubles,
    weight: _Doubles | None,
    ggG: _Doubles | None,
    ggB: _Doubles | None,
) -> _Doubles: ...
def tangent(
    layout: Layout,
    x_t: _Array,
    x: _Array,
    y_t: _Array,
    mean: _Doubles,
    invstd: _Doubles,
    weight: _Doubles | None,
    weight_t: _Doubles | None,
    bias_t: _Doubles | None,
    batch_statistics: bool,
) -> None: ...

@final
class Passes:
    def __init__(self, like: _Array, channel_axis: SupportsIndex = 1) -> None: ...
    @property
    def C(self) -> int: ...
    @property
    def count(self) -> int: ...
