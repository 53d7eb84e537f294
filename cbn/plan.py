"""EvalPlan: a layer's evaluation, prepared for inputs of one shape and dtype."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import checks
from .checks import Array, ArrayLike, Doubles
from .inputs import Input, as_input, as_outputs
from .kernels import arrays, plans
from .quantized import Quantization, dequantizing, forward_quantized
from .steps import Epilogue, forward_fixed


class EvalPlan(plans.Planned):
    """A layer's evaluation, prepared for inputs of one shape and dtype; `BatchNorm.plan` makes it.

    Parameters
    ----------
    name : str
        Of the layer.
    coef : (3, C) ndarray of float64
        Mean, scale and offset. With `quantization`, for what the values of the input stand for.
    negative_slope : float
        Of the activation; 1 for none.
    inp : Input
        One such input; its values are not read.
    channel_axis : int
    ranks : tuple of int or None
        Numbers of dimensions that the layer accepts.
    quantization : (float, int) or None
        For inputs of 8 bits, scale and zero point.

    Attributes
    ----------
    shape : tuple of int
    dtype : numpy.dtype
    """

    def __init__(
        self,
        name: str,
        coef: Doubles,
        negative_slope: float,
        inp: Input,
        channel_axis: int,
        ranks: tuple[int, ...] | None,
        quantization: Quantization | None = None,
    ) -> None:
        self._name, self._coef, self._slope = name, coef, negative_slope
        self._shape, self._dtype, self._axis, self._ranks = inp.x.shape, inp.x.dtype, channel_axis, ranks
        self._quantization, self._y_dtype, self._in_float64 = quantization, inp.y_dtype, inp.in_float64
        self._prepare(inp)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the inputs."""
        return self._shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the inputs."""
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
        """Plan for inputs that lie in memory as this one does."""
        coef = self._coef if self._quantization is None else dequantizing(self._coef, self._quantization)
        if coef is not None and not self._has_plan(inp.x):
            inp.in_float64 = self._in_float64
            self._keep(plans.Plan.of(inp, inp.x, (), (), coef, self._slope), self._version)

    def forward(self, x: ArrayLike, *, out: Array | None = None, residual: ArrayLike | None = None) -> Array:
        """Normalize x; what a call does.

        Parameters
        ----------
        x : array_like
            Of the plan's shape and dtype. Any strides; those of the last call, or C order at first, are fastest.
        out : ndarray, optional
            Of the same shape, and of y's dtype; receives y. ``out=x`` works in place.
        residual : array_like, optional
            Of the same shape, and of y's dtype; added before the activation.

        Returns
        -------
        ndarray
            y, in x's order in memory.

        Raises
        ------
        TypeError, ValueError
            For an x, an `out` or a residual of another dtype or shape.
        """
        inp = self._input(x)
        if inp.x.dtype != self._dtype:
            raise TypeError(f"input has dtype {inp.x.dtype}; this plan is for {self._dtype}")
        if inp.x.shape != self._shape:
            raise ValueError(f"input has shape {inp.x.shape}; this plan is for {self._shape}")
        inp.in_float64 = self._in_float64
        given = out
        out, residual = as_outputs(inp, out, residual)
        epilogue = Epilogue(residual, self._slope)
        if self._quantization is None:
            y = forward_fixed(inp, self._coef, epilogue, out)
        else:
            y = forward_quantized(inp, self._coef, epilogue, out, self._quantization)
        self._prepare(inp)
        return y if given is None else given

    def __repr__(self) -> str:
        return f"<EvalPlan of {self._name} for {self._dtype} of shape {self._shape}>"


plans.plans_stand_for(EvalPlan)
