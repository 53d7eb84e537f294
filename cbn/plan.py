"""EvalPlan: a layer's evaluation, prepared for inputs of one shape and dtype."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import checks
from .checks import Act, Array, ArrayLike, Doubles
from .inputs import Input, as_input, as_outputs
from .kernels import arrays, plans
from .quantized import Quantization, dequantizing, forward_quantized
from .steps import Epilogue, forward_fixed


class EvalPlan(plans.Planned):
    """A layer's evaluation, prepared for inputs of one shape and dtype. `BatchNorm.plan` makes it.

    Parameters
    ----------
    name : str
        Name of the layer.
    coef : (3, C) float64 ndarray
        Mean, scale and offset. With `quantization` they are for dequantized values.
    act : Act
        Activation.
    inp : Input
        An example input; the plan does not read its values.
    channel_axis : int
        Axis with the channels.
    ranks : tuple of int or None
        Numbers of dimensions that the layer accepts.
    quantization : (float, int) or None
        Scale and zero point of 8-bit inputs.
    """

    def __init__(
        self,
        name: str,
        coef: Doubles,
        act: Act,
        inp: Input,
        channel_axis: int,
        ranks: tuple[int, ...] | None,
        quantization: Quantization | None = None,
    ) -> None:
        self._name, self._coef, self._act = name, coef, act
        self._shape, self._dtype, self._axis, self._ranks = inp.x.shape, inp.x.dtype, channel_axis, ranks
        self._quantization, self._y_dtype, self._in_float64 = quantization, inp.y_dtype, inp.in_float64
        self._prepare(inp)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the inputs."""
        return self._shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the inputs."""
        return self._dtype

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        self.__dict__.update(attributes)
        self._prepare(self._input(arrays.with_room(np.empty, self._shape, self._dtype)))

    def _input(self, x: ArrayLike) -> Input:
        if self._y_dtype is not None:
            x = checks.array(x, "input").view()
            if x.dtype != self._dtype:
                raise TypeError(f"input has dtype {x.dtype}; this plan is for {self._dtype}")
        return as_input(x, self._axis, ranks=self._ranks, y_dtype=self._y_dtype)

    def _prepare(self, inp: Input) -> None:
        """Prepare the plan for inputs with the strides of this one."""
        coef = self._coef if self._quantization is None else dequantizing(self._coef, self._quantization)
        if coef is not None and not self._has_plan(inp.x):
            inp.in_float64 = self._in_float64
            self._keep(plans.Plan.of(inp, inp.x, (), (), coef, self._act), self._version)

    def forward(self, x: ArrayLike, *, out: Array | None = None, residual: ArrayLike | None = None) -> Array:
        """Normalize x. A call of the plan does the same.

        Parameters
        ----------
        x : array_like
            Input with the plan's shape and dtype, and any strides. The strides of the last call (at first C order) are
            fastest.
        out : ndarray, optional
            Receives y; has the same shape and y's dtype. ``out=x`` works in place.
        residual : array_like, optional
            Added before the activation; has the same shape and y's dtype.

        Returns
        -------
        ndarray
            y, with x's order in memory.

        Raises
        ------
        TypeError, ValueError
            If x, `out` or the residual has another dtype or shape.
        """
        inp = self._input(x)
        if inp.x.dtype != self._dtype:
            raise TypeError(f"input has dtype {inp.x.dtype}; this plan is for {self._dtype}")
        if inp.x.shape != self._shape:
            raise ValueError(f"input has shape {inp.x.shape}; this plan is for {self._shape}")
        inp.in_float64 = self._in_float64
        given = out
        out, residual = as_outputs(inp, out, residual)
        epilogue = Epilogue(residual, self._act)
        if self._quantization is None:
            y = forward_fixed(inp, self._coef, epilogue, out)
        else:
            y = forward_quantized(inp, self._coef, epilogue, out, self._quantization)
        self._prepare(inp)
        return y if given is None else given

    def __repr__(self) -> str:
        return f"<EvalPlan of {self._name} for {self._dtype} of shape {self._shape}>"


plans.plans_stand_for(EvalPlan)
