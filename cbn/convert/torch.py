"""Layers from PyTorch modules, and state dicts for PyTorch."""

from __future__ import annotations

import sys
from typing import Any

from .. import batchnorm
from ..batchnorm import BatchNorm
from ..checks import Activation, Array
from .common import ARRAYS, base_of, kind_of, layer_of, missing_package, refuse_overrides

# PyTorch's classes, and cbn's classes for the same ranks.
CLASSES = {
    "BatchNorm1d": batchnorm.BatchNorm1d,
    "BatchNorm2d": batchnorm.BatchNorm2d,
    "BatchNorm3d": batchnorm.BatchNorm3d,
    "SyncBatchNorm": BatchNorm,
}
# Known classes of other packages, by module and name: a batch norm, then `drop` and `act` if they exist.
TIMM = {
    (module, name)
    for module in ("timm.layers.norm_act", "timm.models.layers.norm_act")
    for name in ("BatchNormAct2d", "SyncBatchNormAct", "FrozenBatchNormAct2d")
}
FROZEN = {
    ("torchvision.ops.misc", "FrozenBatchNorm2d"),
    ("detectron2.layers.batch_norm", "FrozenBatchNorm2d"),
    ("timm.layers.norm_act", "FrozenBatchNormAct2d"),
    ("timm.models.layers.norm_act", "FrozenBatchNormAct2d"),
}
SEQUENCES = {
    ("torch.nn.modules.container", "Sequential"),
    ("torch.ao.nn.intrinsic.modules.fused", "BNReLU2d"),
    ("torch.ao.nn.intrinsic.modules.fused", "BNReLU3d"),
}
READ = (*ARRAYS, "num_batches_tracked", "num_features", "eps", "momentum", "track_running_stats", "training")
HARMLESS = (
    *("extra_repr", "_get_name", "reset_parameters", "reset_running_stats", "_version", "dump_patches"),
    *("state_dict", "load_state_dict", "_load_from_state_dict", "_save_to_state_dict"),
    *("get_extra_state", "set_extra_state"),
    *("to", "cpu", "cuda", "half", "float", "double", "bfloat16", "_apply", "zero_grad", "requires_grad_"),
)
HOOKS = ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks")


def from_torch(module: Any) -> BatchNorm:
    """Convert a PyTorch batch norm: arguments, parameters, statistics, mode.

    Parameters
    ----------
    module : torch.nn.BatchNorm1d, BatchNorm2d, BatchNorm3d or SyncBatchNorm
        Module on any device, with any floating dtype; float16 and bfloat16 parameters become float32. Subclasses are
        accepted if they do not redefine the computation. So are known classes with a batch norm and an activation: a
        torch.nn.Sequential of a batch norm and ReLU, LeakyReLU or Identity, torch.ao's BNReLU2d and BNReLU3d, timm's
        BatchNormAct2d, the FrozenBatchNorm2d of torchvision and detectron2; and any of these after torch.compile.

    Returns
    -------
    BatchNorm1d, BatchNorm2d, BatchNorm3d, or for SyncBatchNorm BatchNorm
        Layer with copies of the module's arrays, in the module's mode; frozen for a frozen class.

    Raises
    ------
    TypeError
        For another kind of object, and for a subclass or an instance that redefines `forward` or what `forward` calls.
    ValueError
        For a lazy module without an input so far; for a module with hooks (its own or global ones), with parametrized
        weights, or on the meta device; for a SyncBatchNorm among several processes; for another activation.

    Notes
    -----
    The function ignores hooks of tensors and the `requires_grad` of parameters.

    Examples
    --------
    >>> import cbn
    >>> import torch  # doctest: +SKIP
    >>> cbn.from_torch(torch.nn.BatchNorm2d(3).eval())  # doctest: +SKIP
    BatchNorm2d(3, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True).eval()
    """
    kind = _known(module)
    if kind == ("torch._dynamo.eval_frame", "OptimizedModule"):
        _refuse_hooks(module)
        return from_torch(module._orig_mod)
    if kind in SEQUENCES:
        return _from_sequence(module)
    if kind in FROZEN:
        return _from_frozen(module, _after(module))
    base = base_of(module, CLASSES, ["torch"])
    if base is not None and base.__module__ == "torch.nn.modules.batchnorm":
        activation: Activation = None
        if kind in TIMM:
            activation = _after(module)
        else:
            _refuse_parametrized(module)
            refuse_overrides(module, base, "forward", READ, HARMLESS)
        return _from_batch_norm(module, CLASSES[base.__name__], activation)
    if any(c.__name__.startswith("LazyBatchNorm") for c in type(module).__mro__):
        raise ValueError(f"{type(module).__name__} has no parameters before its first input")
    hint = ""
    if kind[1] in ("DataParallel", "DistributedDataParallel"):
        hint = "; pass its .module"
    raise TypeError(f"expected a batch norm of torch.nn, not {kind_of(module)}{hint}")


def to_torch_state(bn: BatchNorm) -> dict[str, Any]:
    """Return a layer's `state_dict` as PyTorch tensors, for `load_state_dict` of a PyTorch module.

    Parameters
    ----------
    bn : BatchNorm
        Layer of cbn.

    Returns
    -------
    dict of str to torch.Tensor
        Copies of all arrays that are not None.

    Raises
    ------
    TypeError
        If `bn` is no layer of cbn.
    ImportError
        If PyTorch is missing.

    Examples
    --------
    >>> import cbn
    >>> import torch  # doctest: +SKIP
    >>> torch.nn.BatchNorm2d(3).load_state_dict(cbn.to_torch_state(cbn.BatchNorm2d(3)))  # doctest: +SKIP
    <All keys matched successfully>
    """
    if not isinstance(bn, BatchNorm):
        raise TypeError(f"bn must be a layer of cbn, not {type(bn).__name__}")
    try:
        import torch
    except ImportError as error:
        raise missing_package("to_torch_state", "torch", "torch") from error
    bn._expect_one_domain("PyTorch's layer")
    return {name: torch.from_numpy(a) for name, a in bn.state_dict().items()}


# ---- kinds of modules ------------------------------------------------------------------------------------------------


def _known(module: Any) -> tuple[str, str]:
    """Module and name of the class, for the tables of known classes."""
    return type(module).__module__, type(module).__qualname__


def _from_batch_norm(module: Any, cls: type[BatchNorm], activation: Activation) -> BatchNorm:
    """The layer of a plain instance of a torch.nn class."""
    _refuse_hooks(module)
    if cls is BatchNorm:
        _refuse_processes(module)
    return layer_of(
        cls,
        {name: _from_tensor(getattr(module, name), name) for name in ARRAYS},
        n=module.num_features,
        eps=module.eps,
        momentum=module.momentum,
        activation=activation,
        training=module.training,
        track=module.track_running_stats,
        counter=_from_tensor(module.num_batches_tracked, "num_batches_tracked"),
    )


def _from_frozen(module: Any, activation: Activation) -> BatchNorm:
    """The frozen layer of a module that normalizes with its buffers in both modes."""
    _refuse_hooks(module)
    arrays = {name: _from_tensor(getattr(module, name), name) for name in ARRAYS}
    layer = layer_of(
        batchnorm.BatchNorm2d,
        arrays,
        eps=module.eps,
        momentum=0.1,
        activation=activation,
        training=module.training,
    )
    return layer.freeze()


def _from_sequence(module: Any) -> BatchNorm:
    """The layer of a batch norm and an optional activation."""
    _refuse_patched(module)
    _refuse_hooks(module)
    parts = list(module.children())
    if not 1 <= len(parts) <= 2:
        raise TypeError(f"expected a {kind_of(module)} of a batch norm and an activation, not of {len(parts)} modules")
    layer = from_torch(parts[0])
    if len(parts) == 2:
        activation = _activation(parts[1])
        if activation is not None and layer.activation is not None:
            raise ValueError(f"{kind_of(parts[0])} has an activation already; a second one is not supported")
        layer.activation = layer.activation if activation is None else activation
    return layer


def _after(module: Any) -> Activation:
    """The activation of a known class with attributes `drop` and `act`."""
    _refuse_patched(module)
    drop = getattr(module, "drop", None)
    if drop is not None and _known(drop) != ("torch.nn.modules.linear", "Identity"):
        raise ValueError(f"{kind_of(module)} has a drop layer, {kind_of(drop)}; only none or Identity is supported")
    return _activation(getattr(module, "act", None))


def _activation(module: Any) -> Activation:
    """An activation module as an `activation` argument."""
    if module is None:
        return None
    _refuse_patched(module)
    _refuse_hooks(module)
    kind = _known(module)
    if kind == ("torch.nn.modules.linear", "Identity"):
        return None
    if kind == ("torch.nn.modules.activation", "ReLU"):
        return "relu"
    if kind == ("torch.nn.modules.activation", "LeakyReLU"):
        return ("leaky_relu", float(module.negative_slope))
    if kind in (("torch.nn.modules.activation", "Hardtanh"), ("torch.nn.modules.activation", "ReLU6")):
        return ("clip", float(module.min_val), float(module.max_val))
    raise ValueError(
        f"the activation {kind_of(module)} is not supported; only ReLU, LeakyReLU, ReLU6, Hardtanh and Identity are"
    )


# ---- refusals --------------------------------------------------------------------------------------------------------


def _refuse_hooks(module: Any) -> None:
    """Refuse hooks, which may change values and gradients: the module's own and, if PyTorch is loaded, global ones."""
    everybody = sys.modules.get("torch.nn.modules.module")
    for name in HOOKS:
        own = getattr(module, f"_{name}", None)
        if own:
            hook = next(iter(own.values()))
            word = getattr(hook, "__name__", None) or type(hook).__name__
            raise ValueError(
                f"{kind_of(module)} has a hook that may change its values, {word} in {name}; remove it first, by its "
                "handle's remove() or by what torch.nn.utils has for it (prune.remove, remove_spectral_norm)"
            )
        if getattr(everybody, f"_global_{name}", None):
            raise ValueError(f"a hook of all modules (in torch.nn.modules.module._global_{name}) may change values")


def _refuse_patched(module: Any) -> None:
    """Refuse an instance that hides a method of its class with an attribute, and a class with a replaced forward."""
    kind = type(module)
    if (getattr(kind.forward, "__module__", None) or "").split(".")[0] != kind.__module__.split(".")[0]:
        raise TypeError(f"the forward of {kind_of(module)} has been replaced, so its values may be others")
    names = [name for name in getattr(module, "__dict__", ()) if callable(getattr(type(module), name, None))]
    if names:
        raise TypeError(f"{kind_of(module)} has a {names[0]} of its own as an attribute, so its values may be others")


def _refuse_parametrized(module: Any) -> None:
    names = list(getattr(module, "parametrizations", None) or ())
    if names:
        raise ValueError(
            f"{names[0]} is parametrized; call "
            f'torch.nn.utils.parametrize.remove_parametrizations(module, "{names[0]}") first'
        )


def _refuse_processes(module: Any) -> None:
    """Refuse a SyncBatchNorm among several processes, since it normalizes their batches together."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        n = distributed.get_world_size(module.process_group)
        if n > 1:
            raise ValueError(
                f"this SyncBatchNorm takes its statistics from {n} processes, which cbn does not do; for evaluation "
                "alone: bn = cbn.BatchNorm(module.num_features); bn.load_state_dict(module.state_dict())"
            )


def _from_tensor(tensor: Any, name: str) -> Array | None:
    """The values of a tensor; types that numpy lacks become float32."""
    if tensor is None:
        return None
    if tensor.is_meta:
        raise ValueError(f"{name} is on the meta device, where tensors have no values")
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.element_size() < 4 else tensor).numpy().copy()  # type: ignore[no-any-return]
