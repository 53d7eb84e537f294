"""Batch norm of tensors: which calls the kernels take, and gradients of first and second order.

A call that the kernels take shares the memory of its tensors. What backward needs belongs to the call: x, weight and
residual are saved tensors, so that PyTorch's version counters see a change in place, and saved-tensor hooks and
checkpoints work; statistics are float64 arrays. All other calls go to PyTorch.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from .. import functional, steps
from ..checks import NO_ACT, Act
from ..inputs import as_gradient, as_input
from ..kernels import channels, passes

SHORT = (torch.float16, torch.bfloat16)
OF_TENSORS = (Tensor, Parameter)  # other classes, as of fake tensors, have ways of their own
# Of x, and of the parameters beside it; PyTorch also takes parameters of x's own 16 bits, which are converted
DTYPES = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}
NO_GRADIENTS = (None,) * 7
OfChannels: TypeAlias = "tuple[Tensor | None, ...]"  # weight, bias, running mean, running variance
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    act: Act = NO_ACT,
    cache: dict[str, Any] | None = None,
) -> Tensor:
    """`torch.nn.functional.batch_norm` on cbn's kernels, if they take the call; act(. + residual) in the same pass.

    cache: of a module, which keeps what was found of its parameters.
    """
    of_channels = (weight, bias, running_mean, running_var)
    momentum = momentum if training else 0.0
    if not training and running_mean is None:
        return by_pytorch(x, of_channels, training, momentum, eps, residual, act)  # which says so
    if torch.compiler.is_compiling():
        if not (are_taken(of_channels, x) and is_taken(x, n_channels(of_channels), residual, training, momentum, eps)):
            return by_pytorch(x, of_channels, training, momentum, eps, residual, act)
        return library.normalize(laid_out(x), of_channels, residual, training, momentum, eps, act)
    if is_transformed(x) or (residual is not None and is_transformed(residual)):
        return by_pytorch(x, of_channels, training, momentum, eps, residual, act)
    found: Channels | None = None if cache is None else cache.get("_channels")
    if found is None or not found.is_of(of_channels, x):
        taken = (
            type(x) in OF_TENSORS
            and x.dtype in DTYPES
            and x.dim() > 1
            and are_taken(of_channels, x)
            and not any(t is not None and is_transformed(t) for t in of_channels)
        )
        found = Channels(of_channels, x) if taken else None
        if cache is not None:
            cache["_channels"] = found
    if found is None or not is_taken(x, found.n_channels, residual, training, momentum, eps):
        return by_pytorch(x, of_channels, training, momentum, eps, residual, act)
    x = laid_out(x)
    forward_mode = forward_ad._current_level >= 0
    if forward_mode and (residual is not None or act != NO_ACT):
        return followed(batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps), residual, act)
    differentiable = forward_mode or (
        torch.is_grad_enabled()
        and (
            x.requires_grad
            or (weight is not None and weight.requires_grad)
            or (bias is not None and bias.requires_grad)
            or (residual is not None and residual.requires_grad)
        )
    )
    call = Call(found, training, momentum, eps, act)
    if differentiable:
        return _BatchNorm.call(x, weight, bias, residual, call)
    return _forward(x, residual, call)[0]


def by_pytorch(
    x: Tensor,
    of_channels: OfChannels,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    act: Act,
) -> Tensor:
    """The same by PyTorch's operators."""
    weight, bias, mean, var = of_channels
    return followed(torch.nn.functional.batch_norm(x, mean, var, weight, bias, training, momentum, eps), residual, act)


# ---- which calls the kernels take; what is wrong with others, PyTorch says -------------------------------------------


class Channels:
    """Parameters and statistics that the kernels take beside x, and their memory as arrays, until another call."""

    __slots__ = ("arrays", "dtype", "n_channels", "pointers", "tensors")

    def __init__(self, of_channels: OfChannels, x: Tensor) -> None:
        self.tensors, self.dtype, self.n_channels = of_channels, x.dtype, n_channels(of_channels)
        self.pointers = pointers(of_channels)
        short = any(t is not None and t.dtype in SHORT for t in of_channels)
        # Those of 16 bits are converted in every call
        self.arrays = None if short else tuple(None if t is None else as_array(t.detach()) for t in of_channels)

    def is_of(self, of_channels: OfChannels, x: Tensor) -> bool:
        """Whether these are still the tensors, with the memory that they had."""
        weight, bias, mean, var = self.tensors
        return (
            of_channels[0] is weight
            and of_channels[1] is bias
            and of_channels[2] is mean
            and of_channels[3] is var
            and x.dtype is self.dtype
            and self.pointers == pointers(of_channels)
        )


class Call(NamedTuple):
    """What a call has beside tensors that may have gradients."""

    channels: Channels
    training: bool
    momentum: float
    eps: float
    act: Act


def pointers(of_channels: OfChannels) -> tuple[int, ...]:
    """Where tensors have their memory: it moves where `data` is assigned, and so does the type."""
    return tuple([0 if t is None else t.data_ptr() for t in of_channels])


def n_channels(of_channels: OfChannels) -> int | None:
    """None without parameters and statistics."""
    return next((t.shape[0] for t in of_channels if t is not None and t.dim() == 1), None)


def are_taken(of_channels: OfChannels, x: Tensor) -> bool:
    """Whether the kernels take these parameters and statistics."""
    first = next((t for t in of_channels if t is not None), None)
    dtype = x.dtype if first is not None and first.dtype is x.dtype else DTYPES.get(x.dtype)
    return (of_channels[2] is None) == (of_channels[3] is None) and all(
        t is None
        or (type(t) in OF_TENSORS and t.is_cpu and t.dtype is dtype and t.shape == x.shape[1:2] and t.is_contiguous())
        for t in of_channels
    )


def is_taken(
    x: Tensor, n_channels: int | None, residual: Tensor | None, training: bool, momentum: float, eps: float
) -> bool:
    """Whether the kernels take x and the options, beside parameters and statistics that they take."""
    shape = x.shape
    return (
        type(x) in OF_TENSORS
        and x.is_cpu
        and x.layout is torch.strided
        and 0 not in shape
        and (n_channels is None or shape[1] == n_channels)
        and (residual is None or is_beside(residual, x))
        and (x.numel() > shape[1] and eps > 0 and 0 <= momentum <= 1 if training else eps >= 0)
    )


def is_beside(residual: Tensor, x: Tensor) -> bool:
    """Whether the kernels take the residual."""
    return type(residual) in OF_TENSORS and residual.is_cpu and residual.dtype is x.dtype and residual.shape == x.shape


def is_transformed(x: Tensor) -> bool:
    """Whether something looks at PyTorch's operators, which a call of the kernels is not; or x is not what it holds."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._functorch.is_functorch_wrapped_tensor(x)  # left over from a transform
        or torch._C._get_tracing_state() is not None
        or x.is_neg()  # as the imaginary part of a conjugate
    )


def laid_out(x: Tensor) -> Tensor:
    """x, or a copy where PyTorch's own batch norm makes one."""
    if x.is_contiguous() or (x.dim() in FORMATS and x.is_contiguous(memory_format=FORMATS[x.dim()])):
        return x
    return x.contiguous()


def followed(y: Tensor, residual: Tensor | None, act: Act) -> Tensor:
    """act(y + residual) by PyTorch's operators."""
    if residual is not None:
        y = y + residual
    if act == NO_ACT:
        return y
    slope, low, high = act
    y = y if slope == 1 else torch.relu(y) if slope == 0 else torch.nn.functional.leaky_relu(y, slope)
    return y if (low, high) == (-np.inf, np.inf) else y.clamp(low, high)


# ---- arrays and tensors ----------------------------------------------------------------------------------------------


def as_array(t: Tensor | None) -> Any:
    """The memory of a tensor as an array; grad mode must be off if it requires grad."""
    if t is None:
        return None
    if t.dtype is torch.bfloat16:
        import ml_dtypes

        return t.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return t.numpy()


def as_tensor(a: Any, dtype: torch.dtype | None = None) -> Tensor | None:
    """The memory of an array as a tensor, converted if it has another dtype."""
    if a is None:
        return None
    if a.itemsize != 2 or a.dtype.char == "e":
        t = torch.from_numpy(a)
    else:
        t = torch.from_numpy(a.view(np.uint16)).view(torch.bfloat16)
    return t if dtype is None or t.dtype is dtype else t.to(dtype)


def of_parameter(t: Tensor | None) -> Tensor | None:
    """A tensor, or that of a parameter of 16 bits as float32, which the functions take."""
    return t.float() if t is not None and t.dtype in SHORT and t.dim() == 1 else t


def as_doubles(n_channels: int, *of_channels: Tensor | None) -> tuple[Any, ...]:
    """Float64 arrays of parameters and statistics; None for None."""
    return channels.as_doubles(n_channels, *(as_array(of_parameter(t)) for t in of_channels))


# ---- passes ----------------------------------------------------------------------------------------------------------


def _forward(x: Tensor, residual: Tensor | None, call: Call) -> tuple[Any, Any, Any]:
    """y, and mean and invstd of the batch; moves the running statistics."""
    channels, training, momentum, eps, act = call
    found = channels.arrays
    given = channels.tensors
    if found is None:
        given = tuple(of_parameter(t) for t in channels.tensors)
        found = tuple(as_array(t) for t in given)
    weight, bias, mean, var = found
    if residual is None and act == NO_ACT:
        done = functional.native_batch_norm(as_array(x), weight, bias, mean, var, training, momentum, eps)
    else:
        epilogue = steps.Epilogue(as_array(residual), act)
        inp = as_input(as_array(x), 1)
        done = functional._batch_norm(inp, (mean, var, weight, bias), training, momentum, eps, epilogue, None)
    if training and channels.arrays is None:
        for t, moved in zip(channels.tensors[2:], given[2:], strict=True):
            if t is not None:
                t.copy_(moved)
    y, save_mean, save_invstd = done
    return as_tensor(y), save_mean, save_invstd


class _BatchNorm(torch.autograd.Function):
    """One call: y, and its gradients."""

    @classmethod
    def call(cls, *args: Any) -> Any:
        """`apply` without a third of its time: it asks for transforms and what they left, as `is_transformed` has."""
        return super(torch.autograd.Function, cls).apply(*args)

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, call: Call
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.training, ctx.eps, ctx.act = call.training, call.eps, call.act
        running = (None, None) if call.training else as_doubles(x.shape[1], *call.channels.tensors[2:])
        y, mean, invstd = _forward(x, residual, call)
        ctx.statistics = (None, None, mean, invstd) if call.training else (*running, None, None)
        ctx.save_for_backward(x, weight, bias, residual)
        if forward_ad._current_level >= 0:
            ctx.save_for_forward(x, weight, bias, residual)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return NO_GRADIENTS[:5]
        x, weight, bias, residual = ctx.saved_tensors
        fused, differentiable, dresidual = residual is not None or ctx.act != NO_ACT, torch.is_grad_enabled(), None
        if fused and not differentiable:
            return (*_fused_gradients(ctx, dy, x, weight, bias, residual), None)
        if fused:
            dy = dy * _slopes(ctx, x, weight, bias, residual)
            dresidual = dy if residual is not None else None
        call = _Gradients.apply if differentiable else _gradients
        dx, dweight, dbias = call(dy, x, weight, ctx.statistics, ctx.training, ctx.eps, ctx.needs_input_grad[:3])
        if bias is not None and dbias is not None and dbias.dtype is not bias.dtype:
            dbias = dbias.to(bias.dtype)
        return (dx, dweight, dbias, dresidual, None)

    @staticmethod
    def jvp(ctx: Any, x_t: Tensor | None, weight_t: Tensor | None, bias_t: Tensor | None, *_: None) -> Tensor | None:
        x, weight, bias, _ = ctx.saved_tensors
        given = [as_array(of_parameter(t)) for t in (x_t, weight_t, bias_t, x, weight, bias)]
        arguments: tuple[Any, ...] = (*given, *ctx.statistics, ctx.training, ctx.eps)
        return as_tensor(functional.batch_norm_jvp(*arguments), x.dtype)


def _gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    statistics: tuple[Any, ...],
    training: bool,
    eps: float,
    wants: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dweight and dbias of the plain call; None where they are not wanted."""
    given = (as_array(dy), as_array(x), as_array(of_parameter(weight)))
    arguments: tuple[Any, ...] = (*given, *statistics, training, eps)
    if not all(wants):
        arguments += (wants,)
    dx, dweight, dbias = functional.native_batch_norm_backward(*arguments)
    dtype = None if weight is None else weight.dtype
    return as_tensor(dx), as_tensor(dweight, dtype), as_tensor(dbias, dtype)


class _Gradients(torch.autograd.Function):
    """`_gradients` with gradients of its own, for a backward pass whose result is differentiated."""

    @staticmethod
    def forward(
        ctx: Any,
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        statistics: tuple[Any, ...],
        training: bool,
        eps: float,
        wants: tuple[bool, ...],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.given = statistics, training, eps
        ctx.save_for_backward(dy, x, weight)
        return _gradients(dy, x, weight, statistics, training, eps, wants)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ggI: Tensor | None, ggG: Tensor | None, ggB: Tensor | None) -> tuple[Tensor | None, ...]:
        if ggI is None and ggG is None and ggB is None:
            return NO_GRADIENTS
        dy, x, weight = ctx.saved_tensors
        statistics, training, eps = ctx.given
        given = [as_array(t) for t in (ggI, of_parameter(ggG), of_parameter(ggB), dy, x, of_parameter(weight))]
        arguments: tuple[Any, ...] = (*given, *statistics, training, eps)
        found = functional.native_batch_norm_double_backward(*arguments)
        dtypes = dy.dtype, x.dtype, None if weight is None else weight.dtype
        grads = (as_tensor(a, dtype) for a, dtype in zip(found, dtypes, strict=True))
        return (*grads, None, None, None, None)


def _context(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> steps.Context:
    """The context of the fused passes."""
    inp = as_input(as_array(x), 1)
    running_mean, running_var, mean, invstd = ctx.statistics
    if not ctx.training:
        mean, invstd = running_mean, passes.inverse_std(running_var, ctx.eps)
    affine = steps.Affine(*as_doubles(inp.n_channels, weight, bias))
    epilogue = steps.Epilogue(as_array(residual), ctx.act)
    return steps.Context(inp, affine, epilogue, ctx.training, mean, invstd, None, inp.count)


def _fused_gradients(
    ctx: Any, dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> tuple[Tensor | None, ...]:
    """dx, dweight, dbias and dresidual through residual and activation, in the same passes."""
    context, wants = _context(ctx, x, weight, bias, residual), ctx.needs_input_grad
    found = steps.backward(as_gradient(context.inp, as_array(dy)), context, wants[0], wants[1] or wants[2], None)
    return (
        as_tensor(found.dx) if wants[0] else None,
        as_tensor(found.dweight, weight.dtype) if weight is not None and wants[1] else None,
        as_tensor(found.dbias, bias.dtype) if bias is not None and wants[2] else None,
        as_tensor(found.dresidual) if wants[3] else None,
    )


def _slopes(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """The derivative of the activation at every value, which is constant in pieces."""
    with torch.no_grad():
        a = torch.from_numpy(np.asarray(steps.before_activation(_context(ctx, x, weight, bias, residual)), np.float64))
        slope, low, high = ctx.act
        slopes = torch.full_like(a, slope).masked_fill(a > 0, 1)
        return slopes.masked_fill((a <= low) | (a >= high), 0).to(x.dtype)


from . import library  # noqa: E402  at the end, as it uses what is above
