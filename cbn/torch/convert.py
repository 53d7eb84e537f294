"""Swap the batch norms of a model for cbn's, and back; and say which were swapped."""

from __future__ import annotations

import math
import operator
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from .. import checks
from ..checks import Act, Activation
from .modules import BatchNorm1d, BatchNorm2d, BatchNorm3d, _BatchNorm, of_cbn
from .sync import SyncBatchNorm

SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
}
RELUS = (torch.relu, torch.relu_, torch.nn.functional.relu, torch.nn.functional.relu_)
ADDS = (operator.add, operator.iadd, torch.add)


class Line(NamedTuple):
    """One batch norm of a model."""

    name: str
    module: nn.Module
    state: str  # "cbn", "cbn, with relu", "left"
    why: str  # if it is left


class Report(list[Line]):
    """The batch norms of a model in their order; as text, a table."""

    def __str__(self) -> str:
        rows = [(line.name or "(the model)", type(line.module).__name__, line.state, line.why) for line in self]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)] if rows else []
        lines = ["  ".join(f"{c:{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        taken = sum(line.state != "left" for line in self)
        return "\n".join([*lines, f"{taken} of {len(self)} batch norms by cbn"])


def report(model: nn.Module) -> Report:
    """Which batch norms of a model are cbn's, what follows them in the same pass, and which are not and why.

    Parameters
    ----------
    model : torch.nn.Module
        A model, converted or not.

    Returns
    -------
    Report
        A list of (name, module, state, why); as text, a table.
    """
    found = Report()
    for name, module in model.named_modules():
        if isinstance(module, (*of_cbn, SyncBatchNorm)):
            found.append(Line(name, module, _state(module), ""))
        elif isinstance(module, nn.modules.batchnorm._NormBase):
            found.append(Line(name, module, "left", _why(module)))
    return found


def _state(module: nn.Module) -> str:
    fused = getattr(module, "activation", None)
    residual = "residual and " if getattr(module, "takes_residual", False) else ""
    return "cbn" if fused is None else f"cbn, with {residual}{fused}"


def _why(module: nn.Module) -> str:
    """Why a batch norm is not swapped."""
    kind = type(module)
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "lazy: convert after the first forward"
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return "an instance norm"
    if kind in SWAPS or _parametrized(module) in SWAPS:
        return "not converted"
    return f"{kind.__module__}.{kind.__qualname__} is a class of its own, whose forward may be another"


def _parametrized(module: nn.Module) -> type[nn.Module] | None:
    """The class that a module had before `torch.nn.utils.parametrize` gave it one of its own."""
    return type(module).__bases__[0] if nn.utils.parametrize.is_parametrized(module) else None


def _swap(module: nn.Module, kinds: dict[type[nn.Module], type[nn.Module]]) -> bool:
    """Give a module another class. So its parameters, hooks and places in the model stay as they are."""
    if type(module) in kinds:
        module.__class__ = kinds[type(module)]
        return True
    before = _parametrized(module)
    if before in kinds:
        type(module).__bases__ = (kinds[before],)
        return True
    return False


def convert(module: nn.Module, *, fuse: bool = False) -> nn.Module:
    """Let cbn compute every batch norm of a model, in place.

    Parameters
    ----------
    module : torch.nn.Module
        A model, or one batch norm. Its batch norms get another class and keep all that they hold: parameters, buffers,
        hooks, mode. Subclasses of PyTorch's batch norms are left alone, and so are lazy modules, which have no class
        yet; `report` names them.
    fuse : bool
        Whether batch norms compute a ReLU, or an addition and a ReLU, that follows them alone, in the same pass. The
        model has to be one that `torch.fx` can trace.

    Returns
    -------
    torch.nn.Module
        `module`; with `fuse` a `torch.fx.GraphModule` that shares its modules.

    Examples
    --------
    >>> import torch
    >>> import cbn.torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
    >>> print(cbn.torch.report(cbn.torch.convert(model)))
    1  BatchNorm2d  cbn
    1 of 1 batch norms by cbn
    """
    for part in module.modules():
        _swap(part, SWAPS)
    if not fuse:
        return module
    try:
        return _fuse(module)
    except Exception as error:  # whatever the model's code raises for what stands in the place of tensors
        warnings.warn(f"torch.fx cannot trace the model, so nothing is fused: {error}", stacklevel=2)
        return module


def revert(module: nn.Module) -> nn.Module:
    """Give every batch norm of a model back to PyTorch, in place; the opposite of `convert`.

    Parameters
    ----------
    module : torch.nn.Module
        A model. What batch norms took in by `convert` becomes operations of the graph again. One that was made with
        an activation, ghost batches or domains, which PyTorch's has not, stays cbn's.

    Returns
    -------
    torch.nn.Module
        `module`.
    """
    if isinstance(module, fx.GraphModule):
        _unfuse(module)
    back = {ours: theirs for theirs, ours in SWAPS.items()}
    for part in module.modules():
        own = (getattr(part, name, None) for name in ("activation", "ghost_batch_size", "num_domains"))
        if all(value is None for value in own) and _swap(part, back):
            for name in ("_channels", "activation", "takes_residual"):
                part.__dict__.pop(name, None)
    return module


# ---- fusion ----------------------------------------------------------------------------------------------------------


def _hooked(module: nn.Module) -> bool:
    """Whether something looks at what a module returns, which fusion would change."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _activation_of(node: fx.Node, modules: dict[str, nn.Module]) -> Activation:
    """The activation that a node computes, as cbn writes it; None for another operation."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        if _hooked(module):
            return None
        if type(module) is nn.ReLU:
            return "relu"
        if type(module) is nn.LeakyReLU:
            return ("leaky_relu", module.negative_slope)
        if type(module) in (nn.ReLU6, nn.Hardtanh):
            return ("clip", float(module.min_val), float(module.max_val))
        return None
    functions, methods = ("call_function", RELUS), ("call_method", ("relu", "relu_"))
    return "relu" if any(node.op == op and node.target in targets for op, targets in (functions, methods)) else None


def _is_add(node: fx.Node) -> bool:
    plain = len(node.args) == 2 and not node.kwargs and all(isinstance(a, fx.Node) for a in node.args)
    called = (node.op == "call_function" and node.target in ADDS) or (
        node.op == "call_method" and node.target in ("add", "add_")
    )
    return plain and called


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _comes_before(node: fx.Node, other: fx.Node) -> bool:
    """Whether one node is computed before another."""
    return next(each for each in node.graph.nodes if each in (node, other)) is node


def _norms(traced: fx.GraphModule) -> Iterator[tuple[fx.Node, _BatchNorm]]:
    """The calls of batch norms that the model calls once."""
    modules = dict(traced.named_modules())
    called = [node for node in traced.graph.nodes if node.op == "call_module"]
    times = Counter(id(modules[str(node.target)]) for node in called)
    for node in called:
        norm = modules[str(node.target)]
        if isinstance(norm, of_cbn) and times[id(norm)] == 1:
            yield node, norm


def _fuse(model: nn.Module) -> fx.GraphModule:
    """A graph of the model in which batch norms have taken in what follows them."""
    traced = fx.symbolic_trace(model)
    modules = dict(traced.named_modules())
    for node, norm in list(_norms(traced)):
        follower, add, residual = _only_user(node), None, None
        if norm.activation is not None or _hooked(norm) or follower is None:
            continue
        if _is_add(follower):
            add = follower
            residual = add.args[1] if add.args[0] is node else add.args[0]
            follower = _only_user(add)
            # The call may move behind the residual if nothing else reads, and could change, what it reads
            if residual is node or not (_comes_before(residual, node) or _only_user(node.args[0]) is node):
                continue
        found = None if follower is None else _activation_of(follower, modules)
        if follower is None or found is None:
            continue
        norm.activation = found
        follower.replace_all_uses_with(node)
        traced.graph.erase_node(follower)
        if add is not None:
            norm.takes_residual = True
            add.prepend(node)
            node.args = (*node.args, residual)
            traced.graph.erase_node(add)
    traced.delete_all_unused_submodules()
    traced.graph.lint()
    traced.recompile()
    return traced


def _operations(residual: Any, act: Act) -> Iterator[tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Functions of PyTorch's that add a residual and apply an activation, with their arguments behind the first."""
    if residual is not None:
        yield operator.add, (residual,)
    if act.slope == 0:
        yield torch.relu, ()
    elif act.slope != 1:
        yield nn.functional.leaky_relu, (act.slope,)
    if (act.low, act.high) != (-math.inf, math.inf):
        yield nn.functional.hardtanh, (act.low, act.high)


def _unfuse(traced: fx.GraphModule) -> None:
    """Make operations of the graph again of what the batch norms took in."""
    for node, norm in list(_norms(traced)):
        if norm.activation is None:
            continue
        users, act, residual = list(node.users), checks.activation(norm.activation), None
        norm.activation, norm.takes_residual = None, False
        if len(node.args) > 1:
            node.args, residual = node.args[:1], node.args[1]
        last = node
        for function, arguments in _operations(residual, act):
            with traced.graph.inserting_after(last):
                last = traced.graph.call_function(function, (last, *arguments))
        for user in users:
            user.replace_input_with(node, last)
    traced.recompile()
