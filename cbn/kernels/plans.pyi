"""Types of the compiled module of plans; see plans.pyx."""

from typing import Any, ParamSpec, Protocol, TypeVar, final

import numpy as np
import numpy.typing as npt

from .arrays import Input

_P = ParamSpec("_P")
_R = TypeVar("_R", covariant=True)
_Array = npt.NDArray[Any]
_Doubles = npt.NDArray[np.float64]

@final
class Plan:
    @staticmethod
    def of(
        inp: Input,
        x: object,
        sources: tuple[_Array | None, ...],
        values: tuple[_Doubles | None, ...],
        coef: _Doubles,
        act: tuple[float, float, float] | None = None,
    ) -> Plan | None: ...

def plans_stand_for(cls: type, *others: str) -> None: ...

class _HasForward(Protocol[_P, _R]):
    def forward(self, *args: _P.args, **kwargs: _P.kwargs) -> _R: ...

class Planned:
    @property
    def _version(self) -> int: ...
    @property
    def _plans(self) -> int: ...
    # What is called is the forward of the object's own class. (__setattr__ is left out: with it, any attribute goes.)
    def __call__(self: _HasForward[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R: ...
    def _has_plan(self, x: object) -> bool: ...
    def _keep(self, plan: Plan | None, version: int) -> None: ...
