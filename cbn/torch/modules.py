"""`BatchNorm1d`, `BatchNorm2d` and `BatchNorm3d`: PyTorch's modules on cbn's kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from .. import checks
from ..batchnorm import BatchNorm
from ..checks import Activation
from . import autograd, variants


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    """What the modules share: PyTorch's forward, with the normalization by cbn.

    A module of PyTorch's that gets this class (`convert`) has no attributes of its own here: they have defaults.
    """

    activation: Activation = None
    ghost_batch_size: int | None = None
    num_domains: int | None = None
    takes_residual = False  # for reports: whether a graph gives it one

    def __init__(
        self,
        *args: Any,
        activation: Activation = None,
        ghost_batch_size: int | None = None,
        num_domains: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        options = {"activation": activation, "ghost_batch_size": ghost_batch_size, "num_domains": num_domains}
        BatchNorm(self.num_features, **options)  # type: ignore[arg-type]  # which checks them
        self.__dict__.update({name: value for name, value in options.items() if value is not None})
        if num_domains is not None and self.track_running_stats:
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                of_one = getattr(self, name)
                self.register_buffer(name, of_one.expand(num_domains, *of_one.shape).clone())

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        *,
        mask: Any = None,
        lengths: Any = None,
        sample_weight: Any = None,
        domain: Any = None,
    ) -> Tensor:
        """As PyTorch's, and what cbn's layers take.

        Parameters
        ----------
        input : Tensor
            As PyTorch's module takes it.
        residual : Tensor, optional
            Added before the activation; has the input's shape and type.
        mask, lengths, sample_weight, domain : optional
            As `cbn.BatchNorm` takes them; tensors too. They need float32 or float64 parameters and CPU tensors, and
            have no second derivative.

        Returns
        -------
        Tensor
            y, with the input's shape and type.
        """
        if isinstance(input, fx.Proxy) and self is not input.tracer.root:  # a leaf, as PyTorch's modules are
            given = (input,) if residual is None else (input, residual)
            return input.tracer.create_proxy("call_module", input.tracer.path_of_module(self), given, {})
        self._check_input_dim(input)
        if (
            not (mask is None and lengths is None and sample_weight is None and domain is None)
            or self.num_domains is not None
            or (self.training and self.ghost_batch_size is not None)
        ):
            options = variants.options(mask=mask, lengths=lengths, sample_weight=sample_weight, domain=domain)
            return variants.batch_norm(self, input, residual, options)
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
        """PyTorch's, and what is not at its default."""
        names = ("activation", "ghost_batch_size", "num_domains")
        own = [f", {name}={getattr(self, name)!r}" for name in names if getattr(self, name) is not None]
        return str(super().extra_repr()) + "".join(own)


_ARGUMENTS = """
    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, device, dtype
        As for PyTorch's.
    activation : None, "relu", ("leaky_relu", slope) or ("clip", low, high)
        Applied to y, after a `residual` that the call gets, in the same pass.
    ghost_batch_size : int, optional
        In training each slice of so many samples is normalized by itself, as in `cbn.BatchNorm`.
    num_domains : int, optional
        Sets of running statistics, of which a call names one with ``domain=``, as in `cbn.BatchNorm`.
"""


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    __doc__ = f"`torch.nn.BatchNorm1d` on cbn's kernels; what they do not take, PyTorch computes.\n{_ARGUMENTS}"


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    __doc__ = f"`torch.nn.BatchNorm2d` on cbn's kernels; what they do not take, PyTorch computes.\n{_ARGUMENTS}"


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    __doc__ = f"`torch.nn.BatchNorm3d` on cbn's kernels; what they do not take, PyTorch computes.\n{_ARGUMENTS}"


of_cbn = (BatchNorm1d, BatchNorm2d, BatchNorm3d)
