"""Evaluation of 8-bit input: x means scale*(x - zero_point)."""

from __future__ import annotations

from typing import Any, SupportsIndex

import numpy as np

from . import checks
from .checks import Array, ArrayLike, Doubles
from .inputs import Input, as_input
from .kernels import arrays, passes
from .steps import Epilogue, copied_into, forward_fixed

Quantization = tuple[float, int]  # scale, zero point
BYTES = (np.dtype(np.uint8), np.dtype(np.int8))


def quantized(
    x: ArrayLike,
    training: bool,
    channel_axis: SupportsIndex,
    ranks: tuple[int, ...] | None,
    scale: Any,
    zero_point: Any,
    out_dtype: Any,
) -> tuple[Input, Quantization]:
    """An 8-bit input and its quantization. The number of channels is not checked."""
    a = checks.array(x, "input").view()  # the caller may change the dtype of the array object
    if a.dtype not in BYTES or training:
        given = {"x_zero_point": zero_point, "out_dtype": out_dtype}
        name = next((name for name, value in given.items() if scale is None and value is not None), "x_scale")
        words = f"{'training' if training else 'evaluation'} with input of dtype {a.dtype}"
        raise TypeError(f"{name} is for evaluation with 8-bit input (uint8, int8), and this is {words}")
    scale, zero_point, dtype = checks.quantization(a, scale, zero_point, out_dtype)
    return as_input(a, channel_axis, ranks=ranks, y_dtype=dtype), (scale, zero_point)


def dequantizing(coef: Doubles, quantization: Quantization) -> Doubles | None:
    """Coefficients for quantized values, from those for dequantized ones; None if float32 cannot hold them.

    (scale*(x - zero_point) - mean)*invstd = (x - (zero_point + mean/scale))*(scale*invstd)
    """
    scale, zero_point = quantization
    coef = coef.copy()
    with np.errstate(all="ignore"):
        coef[0] = zero_point + coef[0] / scale
        coef[1] *= scale
    return coef if passes.fits_float32(coef) else None


def forward_quantized(
    inp: Input, coef: Doubles, epilogue: Epilogue, out: Array | None, quantization: Quantization
) -> Array:
    """y of an 8-bit input, from the coefficients for dequantized values."""
    if inp.layout is None:
        return forward_fixed(inp, coef, epilogue, out)
    folded = dequantizing(coef, quantization)
    if folded is None:
        return copied_into(arrays.with_room(_in_float64, inp, coef, epilogue, quantization), out)
    return forward_fixed(inp, folded, epilogue, out)


def _in_float64(inp: Input, coef: Doubles, epilogue: Epilogue, quantization: Quantization) -> Array:
    """The same in float64, for coefficients that float32 cannot hold."""
    scale, zero_point = quantization
    values = Input(scale * (inp.x.astype(np.float64) - zero_point), inp.axis)
    residual, act = epilogue
    z = None if residual is None else values.matched(residual.astype(np.float64))
    with np.errstate(all="ignore"):
        return forward_fixed(values, coef, Epilogue(z, act), None).astype(inp.y_dtype)
