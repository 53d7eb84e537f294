"""Layers from other systems: their parameters, and what each means by eps, momentum and running variance.

No system is imported here before it is asked for, and most not even then: what is read are attributes and arrays.

=================  =======  ========================  ================  ====================
system             eps      momentum                  running variance  mode of the layer
=================  =======  ========================  ================  ====================
PyTorch            its own  the same                  unbiased          the module's
Keras 3            its own  1 - momentum              biased            evaluation
ONNX               its own  1 - momentum              biased            training_mode's
Flax               given    1 - momentum              biased            evaluation
=================  =======  ========================  ================  ====================
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from .. import batchnorm
from ..batchnorm import BatchNorm
from ..checks import Array
from .flax import from_flax
from .keras import from_keras
from .torch import from_torch, to_torch_state

__all__ = ["from_flax", "from_keras", "from_onnx", "from_torch", "to_torch_state"]

# PyTorch's classes and those of cbn that accept the same ranks.


def from_onnx(model: Any) -> dict[str, BatchNorm]:
    """The batch norms of an ONNX model.

    Parameters
    ----------
    model : onnx.ModelProto, path or bytes
        A model, its file, or the file's content.

    Returns
    -------
    dict of str to BatchNorm
        By the name of the node, or of its output where it has none, in the model's order, those of subgraphs
        included. The layers take inputs of any rank with channels in axis 1, have 1 - momentum and the biased
        variance of ONNX, and are in evaluation mode, or in training mode for a node with `training_mode`.

    Raises
    ------
    ImportError
        Without the onnx package.
    ValueError
        Where a node's parameters are not stored in the model, or are per element (`spatial=0` of old models).

    Examples
    --------
    >>> import cbn
    >>> cbn.from_onnx("resnet50.onnx")["bn_conv1"]  # doctest: +SKIP
    BatchNorm(64, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    """
    import onnx

    if isinstance(model, (str, os.PathLike)):
        model = onnx.load(model)
    elif isinstance(model, bytes):
        model = onnx.load_from_string(model)
    elif not isinstance(model, onnx.ModelProto):
        raise TypeError(f"model must be an onnx.ModelProto, a path or bytes, not {type(model).__name__}")
    layers: dict[str, BatchNorm] = {}
    for node, constants in _onnx_nodes(model.graph):
        name = node.output[0] if not node.name or node.name in layers else node.name
        layers[name] = _from_node(node, name, constants)
    return layers


# ---- steps -----------------------------------------------------------------------------------------------------------


def _layer(
    cls: type[BatchNorm],
    n: int,
    arrays: Mapping[str, Array | None],
    *,
    eps: float,
    momentum: float | None,
    channel_axis: int = 1,
    biased: bool = False,
    training: bool = False,
    counter: Array | None = None,
) -> BatchNorm:
    """A layer with copies of these arrays; None for those that it has not. float64 if one of them is."""
    there = {name: a for name, a in arrays.items() if a is not None}
    for name, a in there.items():
        if a.shape != (n,):
            raise ValueError(f"{name} has shape {a.shape}; expected ({n},)")
    wide = any(a.dtype == np.float64 for a in there.values())
    layer = cls(
        n,
        eps,
        momentum,
        affine="weight" in there or "bias" in there,
        track_running_stats="running_mean" in there,
        bias="bias" in there,
        dtype=np.float64 if wide else np.float32,
        channel_axis=channel_axis,
        running_var="biased" if biased else "unbiased",
    )
    if "weight" not in there:
        layer.weight = layer.weight_grad = None
    for name, a in there.items():
        getattr(layer, name)[...] = a
    if counter is not None and layer.num_batches_tracked is not None:
        layer.num_batches_tracked[...] = counter
    return layer.train(training)


def _of_the_new(momentum: float) -> float:
    """The weight of the new batch, from that of the old statistics, without the last digits that 1 - 0.99 leaves."""
    return round(1 - momentum, 12)


class _Constants:
    """What a graph computes from its stored tensors alone, by name: initializers, and nodes on nothing but these."""

    def __init__(self, graph: Any, outer: _Constants | None = None) -> None:
        self.outer = outer
        self.tensors = {tensor.name: tensor for tensor in graph.initializer}
        self.nodes = {name: node for node in graph.node for name in node.output}

    def __call__(self, name: str) -> Array | None:
        """The value, or None if it depends on an input of the model."""
        from onnx import numpy_helper
        from onnx.reference import ReferenceEvaluator

        if name in self.tensors:
            return np.asarray(numpy_helper.to_array(self.tensors[name]))
        node = self.nodes.get(name)
        if node is None:
            return self.outer(name) if self.outer else None
        values = {key: self(key) for key in node.input}
        if any(value is None for value in values.values()):
            return None
        results: Any = ReferenceEvaluator(node).run(None, values)
        return np.asarray(results[list(node.output).index(name)])


def _onnx_nodes(graph: Any, outer: _Constants | None = None) -> Iterator[tuple[Any, _Constants]]:
    """(node, constants) of every BatchNormalization of a graph and its subgraphs."""
    constants = _Constants(graph, outer)
    for node in graph.node:
        if node.op_type == "BatchNormalization" and node.domain in ("", "ai.onnx"):
            yield node, constants
        for attribute in node.attribute:
            for subgraph in (attribute.g, *attribute.graphs):
                yield from _onnx_nodes(subgraph, constants)


def _from_node(node: Any, name: str, constants: _Constants) -> BatchNorm:
    """The layer of a BatchNormalization node."""
    import onnx

    values = [constants(tensor) for tensor in node.input[1:5]]
    absent = [tensor for tensor, value in zip(node.input[1:5], values, strict=True) if value is None]
    if absent or len(values) < 4:
        raise ValueError(f"the parameters {absent} of the node {name!r} are not stored in the model")
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    if attributes.get("spatial", 1) != 1:
        raise ValueError(f"the node {name!r} has spatial=0, statistics for each element, which cbn does not do")
    arrays = {
        key: a if a.dtype == np.float64 else a.astype(np.float32)  # float16 and bfloat16 go with float32 parameters
        for key, a in zip(("weight", "bias", "running_mean", "running_var"), values, strict=True)
        if a is not None
    }
    return _layer(
        BatchNorm,
        arrays["running_mean"].size,
        arrays,
        eps=_decimal(attributes.get("epsilon", 1e-5)),
        momentum=_of_the_new(_decimal(attributes.get("momentum", 0.9))),
        biased=True,
        training=bool(attributes.get("training_mode", 0)),
    )


def _decimal(attribute: float) -> float:
    """The number that was written: ONNX keeps attributes in float32, 1e-5 as 9.999999747378752e-06."""
    return float(str(np.float32(attribute)))
