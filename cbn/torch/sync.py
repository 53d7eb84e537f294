"""`SyncBatchNorm` over the ranks of any process group on CPUs, as of gloo."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable

from .. import steps
from ..checks import NO_ACT
from ..inputs import as_gradient, as_input
from ..kernels import channels
from ..moments import Moments
from ..sync import merged_moments, merged_sums
from . import autograd
from .autograd import as_array, as_doubles, as_tensor, of_parameter


def gather(group: Any, rows: Any) -> list[Any]:
    """The rows of every rank, in the order of the ranks."""
    mine = torch.from_numpy(rows)
    parts = [torch.empty_like(mine) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(parts, mine, group=group)
    return [part.numpy() for part in parts]


class _SyncBatchNorm(torch.autograd.Function):
    """One call. Every rank makes one collective call in forward and one in backward, whatever its batch is."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        group: Any,
    ) -> Tensor | None:
        inp = as_input(as_array(x), 1)
        merged: list[Moments] = []

        def merge(found: Moments) -> Moments:
            merged.append(merged_moments(found, functools.partial(gather, group)))
            least = float(merged[0].count.min())
            if not least > 1:
                raise ValueError(
                    f"Expected more than 1 value per channel when training, got {least:g} on all ranks together"
                )
            return merged[0]

        affine = steps.Affine(*as_doubles(inp.n_channels, weight, bias))
        y, context = steps.forward_batch(inp, affine, eps, steps.NO_EPILOGUE, None, merge=merge)
        total = merged[0]
        if running_mean is not None:
            moving = [of_parameter(t) for t in (running_mean, running_var)]
            mean, var = map(as_array, moving)
            channels.move_running(mean, var, None, total.mean, total.m2, float(total.count[0]), momentum)
            for t, moved in zip((running_mean, running_var), moving, strict=True):
                if moved is not t:
                    t.copy_(moved)
        ctx.group, ctx.statistics = group, (context.mean, context.invstd, context.m2, context.count)
        ctx.save_for_backward(x, weight, bias)
        return as_tensor(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        inp = as_input(as_array(x), 1)
        affine = steps.Affine(*as_doubles(inp.n_channels, weight, bias))
        context = steps.Context(inp, affine, steps.NO_EPILOGUE, True, *ctx.statistics)
        dy = as_gradient(inp, as_array(dy))
        rows_of_all = functools.partial(gather, ctx.group)
        dx, _, dweight, dbias = steps.backward(
            dy, context, True, True, None, merge=lambda found: merged_sums(found, rows_of_all)
        )
        of_weight = None if weight is None else as_tensor(dweight, weight.dtype)
        return as_tensor(dx), of_weight, None if bias is None else as_tensor(dbias, bias.dtype), *(None,) * 5


class SyncBatchNorm(nn.SyncBatchNorm):
    """`torch.nn.SyncBatchNorm`, which also takes CPU tensors: batch norm over the batches of all ranks.

    PyTorch's refuses CPU tensors. Statistics are merged in the order of the ranks, so that batches may have any sizes,
    some none, and the running statistics have the same bits on every rank. Gradients of weight and bias are those of
    the rank's own batch, as PyTorch's are, for `DistributedDataParallel` to average.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, process_group, device, dtype
        As for `torch.nn.SyncBatchNorm`.
    """

    def forward(self, input: Tensor) -> Tensor:
        """As PyTorch's; without a process group, or in evaluation, as `BatchNorm2d`."""
        if not input.is_cpu:
            return super().forward(input)
        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        momentum = 0.0 if self.momentum is None else self.momentum
        tracks = self.training and self.track_running_stats
        if tracks and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        mean, var = self.running_mean, self.running_var
        batch = self.training or (mean is None and var is None)
        if self.training and not self.track_running_stats:
            mean = var = None
        synchronizes = self.training and distributed.is_available() and distributed.is_initialized()
        group = self.process_group or (distributed.group.WORLD if synchronizes else None)
        if not synchronizes or distributed.get_world_size(group) < 2:
            return autograd.batch_norm(
                input, mean, var, self.weight, self.bias, batch, momentum, self.eps, None, NO_ACT
            )
        return _SyncBatchNorm.apply(
            autograd.laid_out(input), self.weight, self.bias, mean, var, momentum, self.eps, group
        )
