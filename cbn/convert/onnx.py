"""Layers from the nodes of ONNX models, including subgraphs and the model's own functions."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..batchnorm import BatchNorm
from ..checks import Array
from .common import ARRAYS, layer_of, missing_package, weight_of_new

# All attributes of the operator in any version; another attribute could mean anything.
ATTRIBUTES = {"epsilon", "momentum", "training_mode", "is_test", "spatial", "consumed_inputs"}
INPUTS = ("scale", "B", "mean", "var")
RANDOM = {
    *("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"),
    *("Multinomial", "Bernoulli", "Dropout"),
}
NO_NODES = (
    "the model has no BatchNormalization node. Exporters fold batch norms into the convolutions before them; "
    "torch.onnx.export keeps them with optimize=False or, where dynamo=False, with "
    "training=torch.onnx.TrainingMode.PRESERVE and do_constant_folding=False; onnxsim with --skip-fuse-bn"
)


def from_onnx(model: Any, *, skip: bool = False) -> dict[str, BatchNorm]:
    """Convert the batch norms of an ONNX model.

    Parameters
    ----------
    model : onnx.ModelProto, path or bytes
        Model, path of its file, or content of the file.
    skip : bool
        Whether to skip nodes that cannot be converted, with a warning that lists them. Otherwise they are an error.

    Returns
    -------
    dict of str to BatchNorm
        Layers in the model's order. The key is the name of the node, or of its output if the node has no name. In
        subgraphs and in functions of the model a path precedes the name: "if_1/then_branch/bn", "call_1/bn". Each
        call of a function has layers of its own. A repeated name gets "#2", "#3".

        The layers take inputs of any rank with channels in axis 1, and have 1 - momentum and the biased variance of
        ONNX. A layer is in training mode if its node trains: with `training_mode`; from opset 7 to 13 with more than
        one output; before opset 7 without `is_test`. Otherwise it is in evaluation mode.

    Raises
    ------
    ImportError
        If the onnx package is missing.
    TypeError
        For another kind of object.
    ValueError
        If `model` is no ONNX model. For nodes whose parameters are not stored in the model, do not fit together or are
        per element (`spatial=0` of old models with parameters that are not (C,)), and for nodes with a domain or an
        attribute unknown to ONNX. One error lists all nodes.

    Warns
    -----
    UserWarning
        For skipped nodes, and for a model without batch norms, which an exporter may have folded.

    Examples
    --------
    >>> import cbn
    >>> cbn.from_onnx("resnet50.onnx")["bn_conv1"]  # doctest: +SKIP
    BatchNorm(64, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True,
    running_var='biased').eval()
    """
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise missing_package("from_onnx", "onnx", "onnx") from error
    model = _loaded(model)
    layers: dict[str, BatchNorm] = {}
    problems: dict[str, str] = {}
    for path, node, scope in _batch_norms(model.graph, _Scope.of_model(model)):
        key, n = path, 1
        while key in layers or key in problems:
            n += 1
            key = f"{path}#{n}"
        try:
            layers[key] = _from_node(node, scope)
        except (TypeError, ValueError, RecursionError) as error:
            problems[key] = str(error)
    if problems:
        words = "; ".join(f"{key!r} {problem}" for key, problem in problems.items())
        of = f"{len(problems)} of the model's {len(problems) + len(layers)} batch norms"
        if not skip:
            raise ValueError(f"{of} cannot be converted (skip=True leaves them out): {words}")
        warnings.warn(f"{of} are left out: {words}", UserWarning, stacklevel=2)
    elif not layers:
        warnings.warn(NO_NODES, UserWarning, stacklevel=2)
    return layers


def _loaded(model: Any) -> Any:
    """The model, read from a path or bytes if needed."""
    import onnx

    if isinstance(model, onnx.ModelProto):
        words = "the model"
    elif isinstance(model, (str, os.PathLike, bytes)):
        words = "the bytes are" if isinstance(model, bytes) else f"{os.fspath(model)!r} is"
        try:
            model = onnx.load_from_string(model) if isinstance(model, bytes) else onnx.load(model)
        except OSError:
            raise
        except Exception as error:  # protobuf's errors, and those of onnx.load's text formats
            raise ValueError(f"{words} no ONNX model ({error})") from error
        words = "the model"
    else:
        raise TypeError(f"model must be an onnx.ModelProto, a path or bytes, not {type(model).__name__}")
    if not model.HasField("graph"):
        raise ValueError(f"{words} has no graph: it is no ONNX model, or an empty one")
    return model


class _Scope:
    """The names in the body of a graph or a function, and the values that it computes from stored tensors alone.

    `arguments` are the inputs: scope and name of the caller's value for a function, None for an input of the model.
    `attributes` are the attributes of the call, to which nodes of a function may refer. `dynamic` are the names whose
    values depend on the model's inputs or on random numbers.
    """

    def __init__(
        self,
        body: Any,
        opsets: Mapping[str, int],
        functions: Mapping[tuple[str, str, str], Any],
        arguments: Mapping[str, tuple[_Scope, str] | None],
        attributes: Mapping[str, Any],
        outer: _Scope | None = None,
        calls: tuple[Any, ...] = (),
    ) -> None:
        self.opsets, self.functions, self.arguments = opsets, functions, arguments
        self.attributes, self.outer, self.calls = attributes, outer, calls
        self.tensors = {tensor.name: tensor for tensor in getattr(body, "initializer", ())}
        self.nodes = {name: node for node in body.node for name in node.output if name}
        self.dynamic = {name for name, source in arguments.items() if source is None} - self.tensors.keys()
        for node in body.node:  # in order, so one walk finds all
            if node.op_type in RANDOM or not self.dynamic.isdisjoint(node.input):
                self.dynamic.update(filter(None, node.output))
        self.found: dict[str, Array | None] = {}

    @classmethod
    def of_model(cls, model: Any) -> _Scope:
        functions = {(_domain(f), f.name, getattr(f, "overload", "")): f for f in model.functions}
        inputs = {i.name: None for i in model.graph.input}
        return cls(model.graph, _opsets(model), functions, inputs, {})

    def of_subgraph(self, graph: Any) -> _Scope:
        inputs = {i.name: None for i in graph.input}
        return _Scope(graph, self.opsets, self.functions, inputs, self.attributes, self, self.calls)

    def function_of(self, node: Any) -> Any:
        """The model's function that a node calls, or None."""
        return self.functions.get((_domain(node), node.op_type, getattr(node, "overload", "")))

    def of_call(self, node: Any) -> _Scope:
        function, called = self.function_of(node), (_domain(node), node.op_type)
        if called in self.calls:
            raise ValueError(f"the model's function {node.op_type!r} calls itself")
        given = [*node.input, *[""] * len(function.input)]
        arguments = {name: (self, actual) for name, actual in zip(function.input, given, strict=False)}
        attributes = {a.name: a for a in (*getattr(function, "attribute_proto", ()), *node.attribute)}
        opsets = {**self.opsets, **_opsets(function)}
        return _Scope(function, opsets, self.functions, arguments, attributes, calls=(*self.calls, called))

    def resolved(self, node: Any) -> Any:
        """The node with references to the call's attributes resolved."""
        if not any(a.ref_attr_name for a in node.attribute):
            return node
        other = type(node)()
        other.CopyFrom(node)
        del other.attribute[:]
        for a in node.attribute:
            value = self.attributes.get(a.ref_attr_name) if a.ref_attr_name else a
            if value is not None:
                added = other.attribute.add()
                added.CopyFrom(value)
                added.name = a.name
        return other

    def value(self, name: str) -> Array | None:
        """The value of a name, or None if it depends on an input of the model."""
        if name in self.dynamic:
            return None
        if name not in self.found:
            self.found[name] = None  # meanwhile, so that a cycle in the graph has no value
            try:
                self.found[name] = self._value(name)
            except ValueError:
                del self.found[name]
                raise
        return self.found[name]

    def _value(self, name: str) -> Array | None:
        from onnx import numpy_helper

        if name in self.tensors:
            tensor = self.tensors[name]
            if tensor.data_location == tensor.EXTERNAL:
                file = next((e.value for e in tensor.external_data if e.key == "location"), "another file")
                raise ValueError(f"has the values of {name!r} in {file}; pass the model's path")
            return np.asarray(numpy_helper.to_array(tensor))
        if name in self.arguments:
            source = self.arguments[name]
            return source[0].value(source[1]) if source and source[1] else None
        if name in self.nodes:
            return self._computed(self.resolved(self.nodes[name]), name)
        return self.outer.value(name) if self.outer else None

    def _computed(self, node: Any, name: str) -> Array | None:
        """An output of a node with constant inputs, from ONNX's reference implementation."""
        from onnx import helper
        from onnx.reference import ReferenceEvaluator

        function = self.function_of(node)
        if function is not None:
            return self.of_call(node).value(function.output[list(node.output).index(name)])
        values = {key: self.value(key) for key in node.input if key}
        if any(value is None for value in values.values()):
            return None
        empty = helper.make_empty_tensor_value_info
        graph = helper.make_graph([node], "constant", [empty(key) for key in values], [empty(name)])
        try:
            (result,) = ReferenceEvaluator(graph, opsets=dict(self.opsets)).run(None, values)
        except Exception as error:
            raise ValueError(f"has {name!r} from a {node.op_type} node that cannot be computed ({error})") from error
        return np.asarray(result)


def _domain(a: Any) -> str:
    """The domain of a node, a function or an opset; that of ONNX has two names."""
    return "" if a.domain == "ai.onnx" else str(a.domain)


def _opsets(a: Any) -> dict[str, int]:
    """The versions of the operators that a model or a function uses, by domain."""
    return {_domain(o): o.version for o in a.opset_import}


def _batch_norms(body: Any, scope: _Scope, prefix: str = "") -> Iterator[tuple[str, Any, _Scope]]:
    """(path, node, scope) of every BatchNormalization in a graph or function, its subgraphs and its calls."""
    for node in body.node:
        path = prefix + (node.name or next(filter(None, node.output), node.op_type))
        node = scope.resolved(node)
        function = scope.function_of(node)
        # ONNX Runtime's training graphs have its own BatchNormInternal
        if node.op_type in ("BatchNormalization", "BatchNormInternal") and (function is None or not _domain(node)):
            yield path, node, scope
        elif function is not None:
            yield from _batch_norms(function, scope.of_call(node), f"{path}/")
        for attribute in node.attribute:
            below = f"{path}/{attribute.name}/"
            if attribute.type == attribute.GRAPH:
                yield from _batch_norms(attribute.g, scope.of_subgraph(attribute.g), below)
            for i, graph in enumerate(attribute.graphs):
                yield from _batch_norms(graph, scope.of_subgraph(graph), f"{below}{i}/")


def _from_node(node: Any, scope: _Scope) -> BatchNorm:
    """The layer of a BatchNormalization node; errors say what the node has or is, after its name."""
    import onnx

    if _domain(node):
        raise ValueError(f"is of the domain {node.domain!r}, whose {node.op_type} is unknown")
    if scope.function_of(node) is not None:
        raise ValueError("is an operator of ONNX that the model defines once more, as a function")
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    unknown = sorted(attributes.keys() - ATTRIBUTES)
    if unknown:
        raise ValueError(f"has the attribute {unknown[0]!r}, which ONNX's operator has not")
    names = [*node.input[1:5], *[""] * (5 - len(node.input))][:4]
    values = [scope.value(name) if name else None for name in names]
    absent = [f"{what} {name!r}" for what, name, value in zip(INPUTS, names, values, strict=True) if value is None]
    if absent:
        raise ValueError(f"has {', '.join(absent)} that the model does not store")
    if attributes.get("spatial", 1) != 1:
        shapes = {a.shape for a in values if a is not None and a.ndim != 1}
        if shapes:
            raise ValueError(f"has spatial=0, statistics for each element {shapes.pop()}, which cbn does not do")
    return layer_of(
        BatchNorm,
        dict(zip(ARRAYS, values, strict=True)),
        names={ours: f"{what} {name!r}" for ours, what, name in zip(ARRAYS, INPUTS, names, strict=True)},
        eps=_decimal(attributes.get("epsilon", 1e-5)),
        momentum=weight_of_new(_decimal(attributes.get("momentum", 0.9)), "momentum"),
        biased=True,
        training=_trains(node, attributes, scope.opsets.get("", 1)),
    )


def _trains(node: Any, attributes: Mapping[str, Any], version: int) -> bool:
    """Whether a node normalizes with the batch's statistics; the operator's versions have three ways to say it."""
    if version >= 14:
        return bool(attributes.get("training_mode", 0))
    if version >= 7:
        return any(node.output[1:])
    return not attributes.get("is_test", 0)


def _decimal(attribute: float) -> float:
    """The decimal number of a float32 attribute, since ONNX stores 1e-5 as 9.999999747378752e-06."""
    return float(str(np.float32(attribute)))
