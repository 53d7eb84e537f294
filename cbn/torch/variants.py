"""Calls that only cbn has: masks, lengths, sample weights, ghost batches, sets of running statistics.

A layer of cbn's stands for one call. It shares the memory of the module's tensors: what it moves is the module's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..batchnorm import BatchNorm
from .autograd import DTYPES, OF_TENSORS, as_array, as_tensor, laid_out

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def options(**given: Any) -> dict[str, Any]:
    """The arguments that are given, tensors as arrays."""
    return {
        name: value.detach().cpu().numpy() if isinstance(value, Tensor) else value
        for name, value in given.items()
        if value is not None
    }


def batch_norm(module: Any, x: Tensor, residual: Tensor | None, given: dict[str, Any]) -> Tensor:
    """A call of a module with these options."""
    names = "mask, lengths, sample_weight, domain, ghost_batch_size and num_domains"
    parameters = [t for t in (module.weight, module.bias, module.running_mean, module.running_var) if t is not None]
    if torch.compiler.is_compiling() or type(x) not in OF_TENSORS or not x.is_cpu or x.dtype not in DTYPES:
        raise TypeError(f"{names} need a floating CPU tensor, and no graph, but got {type(x).__name__} on {x.device}")
    for t in parameters:
        if t.dtype is not DTYPES[x.dtype]:
            raise TypeError(f"{names} need parameters and statistics of {DTYPES[x.dtype]} beside {x.dtype}")
    return _Variant.apply(laid_out(x), module.weight, module.bias, residual, module, given)


def _layer(module: Any, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> BatchNorm:
    """A layer on the memory of a module's tensors."""
    layer = BatchNorm(
        module.num_features,
        module.eps,
        module.momentum,
        weight is not None,
        module.track_running_stats,
        dtype=str(dtype).removeprefix("torch."),
        activation=module.activation,
        ghost_batch_size=module.ghost_batch_size,
        num_domains=module.num_domains,
    )
    layer.train(module.training)
    layer.train_parameters = True  # so that evaluation has a backward too
    layer.weight, layer.bias = as_array(weight), as_array(bias)
    for name in STATISTICS:
        setattr(layer, name, as_array(getattr(module, name)))
    return layer


class _Variant(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        module: Any,
        given: dict[str, Any],
    ) -> Tensor | None:
        layer = _layer(module, weight, bias, DTYPES[x.dtype])
        y = layer(as_array(x), residual=as_array(residual), **given)
        ctx.context = layer._saved
        ctx.save_for_backward(x, weight, bias, residual)  # whose changes are noticed
        return as_tensor(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        _, weight, bias, residual = ctx.saved_tensors
        found = BatchNorm._differentiate(as_array(dy.contiguous()), ctx.context, True, None)
        return (
            as_tensor(found.dx),
            None if weight is None else as_tensor(found.dweight, weight.dtype),
            None if bias is None else as_tensor(found.dbias, bias.dtype),
            None if residual is None else as_tensor(found.dresidual),
            None,
            None,
        )
