"""Types of the compiled calls of the functions; see calls.pyx."""

from typing import Any, final

import numpy as np
import numpy.typing as npt

from .arrays import Input

_Array = npt.NDArray[Any]
_Doubles = npt.NDArray[np.float64]

@final
class Prepared: ...

def evaluate(
    x: object,
    weight: object,
    bias: object,
    running_mean: object,
    running_var: object,
    momentum: object,
    eps: object,
    channel_axis: object,
    out: object,
    activation: object,
    residual: object,
) -> _Array | None: ...
def train(
    x: object,
    weight: object,
    bias: object,
    running_mean: object,
    running_var: object,
    momentum: object,
    eps: object,
    channel_axis: object,
    out: object,
    activation: object,
    residual: object,
) -> tuple[_Array, _Doubles, _Doubles] | None: ...
def gradients(
    dy: object,
    x: object,
    weight: object,
    save_mean: object,
    save_invstd: object,
    channel_axis: object,
    out: object,
) -> tuple[_Array, _Array, _Array] | None: ...
def train_layer(
    x: object,
    arrays_c: tuple[object, object, object, object, object],
    n_channels: int,
    is_double: bool,
    eps: object,
    channel_axis: object,
    ranks: tuple[int, ...] | None,
    out: object,
    residual: object,
    act: tuple[float, float, float],
) -> tuple[_Array, Input, _Doubles | None, _Doubles | None, _Doubles, _Doubles, _Doubles] | None: ...
def layer_gradients(
    dy: object, inp: Input, weight: _Doubles | None, mean: _Doubles, invstd: _Doubles, out: object
) -> tuple[_Array, _Doubles, _Doubles] | None: ...
