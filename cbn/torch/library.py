"""The operators `torch.ops.cbn`: what `torch.compile` and `torch.export` put into their graphs.

They are functional, as autograd registrations have to be: the running statistics are moved by PyTorch's operators, from
the mean and m2 that the forward returns. Eager calls go without them, which is faster (`autograd.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import steps
from ..checks import Act
from ..inputs import Input, as_gradient, as_input
from ..kernels import passes
from .autograd import as_array, as_doubles, as_tensor


@torch.library.custom_op("cbn::batch_norm", mutates_args=())
def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
    slope: float,
    low: float,
    high: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, mean, invstd, m2) of a batch, or y by the running statistics, and these; the last three are float64."""
    epilogue = steps.Epilogue(as_array(residual), Act(slope, low, high))
    inp = as_input(as_array(x.detach()), 1)
    weight_c, bias_c, mean, var = _doubles(inp, weight, bias, running_mean, running_var)
    if training:
        y, context = steps.forward_batch(inp, steps.Affine(weight_c, bias_c), eps, epilogue, None)
        return as_tensor(y), *(torch.from_numpy(a) for a in (context.mean, context.invstd, context.m2))
    invstd = passes.inverse_std(var, eps)
    y = steps.forward_fixed(inp, passes.coefficients(mean, invstd, weight_c, bias_c), epilogue, None)
    return as_tensor(y), torch.from_numpy(mean), torch.from_numpy(invstd), torch.from_numpy(var)


def _doubles(inp: Input, *of_channels: Tensor | None) -> tuple[Any, ...]:
    return as_doubles(inp.n_channels, *(None if t is None else t.detach() for t in of_channels))


@batch_norm.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, ...]:
    of_channel = [torch.empty(x.shape[1:2], dtype=torch.float64, device=x.device) for _ in range(3)]
    return torch.empty_like(x), *of_channel


@torch.library.custom_op("cbn::batch_norm_backward", mutates_args=())
def batch_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    slope: float,
    low: float,
    high: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dresidual, dweight, dbias); dresidual is empty without a residual, the last two are float64."""
    inp = as_input(as_array(x.detach()), 1)
    affine = steps.Affine(*_doubles(inp, weight, bias))
    epilogue = steps.Epilogue(as_array(residual), Act(slope, low, high))
    context = steps.Context(inp, affine, epilogue, training, mean.numpy(), invstd.numpy(), None, inp.count)
    found = steps.backward(as_gradient(inp, as_array(dy)), context, True, True, None)
    dresidual = x.new_empty(0) if residual is None else as_tensor(found.dresidual)
    return as_tensor(found.dx), dresidual, as_tensor(found.dweight), as_tensor(found.dbias)


@batch_norm_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, mean: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    dresidual = x.new_empty(0) if residual is None else torch.empty_like(x)
    return torch.empty_like(x), dresidual, torch.empty_like(mean), torch.empty_like(mean)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, residual, _, _, ctx.training, _, *ctx.act = inputs
    _, mean, invstd, _ = output
    ctx.save_for_backward(x, weight, bias, residual, mean, invstd)


def _differentiate(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, residual, mean, invstd = ctx.saved_tensors
    found = batch_norm_backward(dy, x, weight, bias, residual, mean, invstd, ctx.training, *ctx.act)
    dx, dresidual, dweight, dbias = found
    return (
        dx,
        None if weight is None else dweight.to(weight.dtype),
        None if bias is None else dbias.to(bias.dtype),
        None if residual is None else dresidual,
        *(None,) * 7,
    )


batch_norm.register_autograd(_differentiate, setup_context=_keep)


def normalize(
    x: Tensor,
    of_channels: tuple[Tensor | None, ...],
    residual: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    act: Act,
) -> Tensor:
    """`autograd.batch_norm` in a graph, for a call that the kernels take."""
    weight, bias, running_mean, running_var = of_channels
    y, mean, _, m2 = batch_norm(x, weight, bias, residual, running_mean, running_var, training, eps, *act)
    if training and running_mean is not None and running_var is not None:
        count = x.numel() // x.shape[1]
        with torch.no_grad():  # in float64, as the kernels do
            for running, batch in ((running_mean, mean), (running_var, m2 / (count - 1))):
                running.copy_((1 - momentum) * running.double() + momentum * batch)
    return y
