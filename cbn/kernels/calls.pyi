"""Types of the compiled calls of the functions; see calls.pyx."""

from typing import Any, final

import numpy as np
import numpy.typing as npt

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
