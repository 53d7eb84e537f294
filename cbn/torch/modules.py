"""`BatchNorm1d`, `BatchNorm2d` and `BatchNorm3d`: PyTorch's modules on cbn's kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from .. import checks
from ..checks import Activation
from . import autograd


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    """What the modules share: PyTorch's forward, with the normalization by cbn.

    A module of PyTorch's that gets this class (`convert`) has no attributes of its own here: they have defaults.
    """

    activation: Activation = None
    takes_residual = False  # for reports: whether a graph gives it one

    def __init__(self, *args: Any, activation: Activation = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        checks.activation(activation)
        if activation is not None:
            self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """As PyTorch's; with a `residual` of the input's shape and type, which is added before the activation."""
        if isinstance(input, fx.Proxy) and self is not input.tracer.root:  # a leaf, as PyTorch's modules are
            given = (input,) if residual is None else (input, residual)
            return input.tracer.create_proxy("call_module", input.tracer.path_of_module(self), given, {})
        self._check_input_dim(input)
        momentum, training, tracks = self.momentum, self.training, self.track_running_stats
        parameters, buffers = self._parameters, self._buffers  # without the search of `__getattr__`
        weight = parameters["weight"] if "weight" in parameters else self.weight
        bias = parameters["bias"] if "bias" in parameters else self.bias
        mean, var, counter = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
        if training and tracks and counter is not None:
            counter.add_(1)
            if momentum is None:
                momentum = 1.0 / float(counter)
        batch = training or (mean is None and var is None)
        if training and not tracks:
            mean = var = None
        act = checks.NO_ACT if self.activation is None else checks.activation(self.activation)
        momentum = 0.0 if momentum is None else momentum
        return autograd.batch_norm(
            input, mean, var, weight, bias, batch, momentum, self.eps, residual, act, self.__dict__
        )

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles hold: not what was found of the parameters."""
        state = self.__dict__.copy()
        state.pop("_channels", None)
        return state

    def extra_repr(self) -> str:
        """PyTorch's, and the activation."""
        return str(super().extra_repr()) + ("" if self.activation is None else f", activation={self.activation!r}")


_ACTIVATION = """
    Parameters
    ----------
    activation : None, "relu", ("leaky_relu", slope) or ("clip", low, high)
        Applied to y, after a `residual` that the call gets, in the same pass.
"""


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    __doc__ = f"`torch.nn.BatchNorm1d` on cbn's kernels; what they do not take, PyTorch computes.\n{_ACTIVATION}"


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    __doc__ = f"`torch.nn.BatchNorm2d` on cbn's kernels; what they do not take, PyTorch computes.\n{_ACTIVATION}"


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    __doc__ = f"`torch.nn.BatchNorm3d` on cbn's kernels; what they do not take, PyTorch computes.\n{_ACTIVATION}"


of_cbn = (BatchNorm1d, BatchNorm2d, BatchNorm3d)
