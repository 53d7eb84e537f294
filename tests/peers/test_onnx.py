"""ONNX: the nine cases of its backend tests, whole models with cbn inside, layers from models."""

import warnings
from pathlib import Path

import numpy as np
import pytest

from . import peer

onnx = peer("onnx")

from onnx import numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402
from onnx.reference.op_run import OpRun  # noqa: E402

import cbn  # noqa: E402


def node_cases():
    """(name, model, [(inputs, outputs)]) of the operator's own cases, which the package makes when asked."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other operators' cases overflow on purpose
        from onnx.backend.test.loader import load_model_tests

        cases = load_model_tests(kind="node")
    return [(c.name, c.model, c.data_sets) for c in cases if c.name.startswith("test_batchnorm_")]


def tensors(folder, pattern):
    paths = sorted(folder.glob(pattern), key=lambda p: int(p.stem.rsplit("_", 1)[1]))
    return [numpy_helper.to_array(onnx.TensorProto.FromString(p.read_bytes())) for p in paths]


def converted_cases():
    """The same of PyTorch's exports, which the package keeps as files."""
    root = Path(onnx.__file__).parent / "backend" / "test" / "data" / "pytorch-converted"
    for folder in sorted(root.glob("test_BatchNorm*")):
        data = [(tensors(d, "input_*.pb"), tensors(d, "output_*.pb")) for d in sorted(folder.glob("test_data_set_*"))]
        yield folder.name, onnx.load(folder / "model.onnx"), data


CASES = [*node_cases(), *converted_cases()]


def run(node, x, scale, bias, mean, var):
    """A BatchNormalization node as a layer: ONNX weighs the old statistics, and tracks the biased variance."""
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    bn = cbn.BatchNorm(
        len(scale),
        eps=attributes.get("epsilon", 1e-5),
        momentum=1 - attributes.get("momentum", 0.9),
        running_var="biased",
    )
    bn.load_state_dict({"weight": scale, "bias": bias, "running_mean": mean, "running_var": var})
    bn.train(bool(attributes.get("training_mode", 0)))
    return [bn(x), bn.running_mean, bn.running_var]


def test_there_are_nine_cases():
    assert len(CASES) == 9


@pytest.mark.parametrize(("name", "model", "data_sets"), CASES, ids=[name for name, *_ in CASES])
def test_case(name, model, data_sets, isa):
    assert data_sets
    for inputs, outputs in data_sets:
        values = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
        values.update(zip([i.name for i in model.graph.input if i.name not in values], inputs, strict=True))
        for node in model.graph.node:
            assert node.op_type == "BatchNormalization"
            results = run(node, *(values[name] for name in node.input))
            values.update(zip(node.output, results, strict=False))
        for output, expected in zip(model.graph.output, outputs, strict=True):
            # the tolerances of ONNX's own runner
            np.testing.assert_allclose(values[output.name], expected, rtol=1e-3, atol=1e-7)


# ---- whole models --------------------------------------------------------------------------------------------------


class BatchNormalization(OpRun):
    """The operator, by cbn; each call is compared with float64."""

    op_domain = ""
    calls = 0

    def _run(self, x, scale, bias, mean, var, epsilon=1e-5, **_):
        type(self).calls += 1
        y = cbn.functional.batch_norm(x, mean, var, scale, bias, eps=epsilon)
        exact = cbn.reference.normalize(x, mean, var, scale, bias, epsilon)
        assert np.abs(y - exact).max() <= 1e-6 * np.abs(exact).max()
        return (y,)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "n_calls"), [("light_resnet50", 53), ("light_densenet121", 121)])
def test_whole_models_with_cbn_inside(name, n_calls):
    path = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light" / f"{name}.onnx"
    BatchNormalization.calls = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the models' weights are made up, and old
        session = ReferenceEvaluator(str(path), new_ops=[BatchNormalization])
        graph = onnx.load(path).graph
        stored = {tensor.name for tensor in graph.initializer}
        (info,) = [i for i in graph.input if i.name not in stored]
        shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
        x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        session.run(None, {info.name: x})
    assert BatchNormalization.calls == n_calls


@pytest.mark.parametrize(("name", "n_layers"), [("light_resnet50", 53), ("light_densenet121", 121)])
def test_from_onnx_finds_every_node(name, n_layers):
    path = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light" / f"{name}.onnx"
    layers = cbn.from_onnx(path)
    assert len(layers) == n_layers
    for bn in layers.values():
        assert (bn.training, bn.running_var.shape) == (False, (bn.num_features,))


def small_model(**attributes):
    """Two nodes, one of them in a branch of an If, with parameters stored as initializers and as a Constant."""
    rng = np.random.default_rng(1)
    values = {f"{name}{i}": rng.uniform(0.5, 2, 3).astype(np.float32) for name in "sbmv" for i in (1, 2)}
    tensor = onnx.helper.make_tensor_value_info
    constant = onnx.helper.make_node("Constant", [], ["s1"], value=numpy_helper.from_array(values["s1"], "s1"))
    first = onnx.helper.make_node(
        "BatchNormalization", ["x", "s1", "b1", "m1", "v1"], ["h"], name="first", **attributes
    )
    second = onnx.helper.make_node("BatchNormalization", ["h", "s2", "b2", "m2", "v2"], ["y2"], momentum=0.8)
    branches = {
        f"{which}_branch": onnx.helper.make_graph([second], which, [], [tensor("y2", onnx.TensorProto.FLOAT, None)])
        for which in ("then", "else")
    }
    chosen = onnx.helper.make_node("If", ["c"], ["y"], **branches)
    stored = [numpy_helper.from_array(v, k) for k, v in values.items() if k != "s1"]
    inputs = [tensor("x", onnx.TensorProto.FLOAT, [None, 3]), tensor("c", onnx.TensorProto.BOOL, [])]
    outputs = [tensor("y", onnx.TensorProto.FLOAT, None)]
    graph = onnx.helper.make_graph([constant, first, chosen], "g", inputs, outputs, initializer=stored)
    return onnx.helper.make_model(graph), values


def test_from_onnx(tmp_path):
    model, values = small_model(epsilon=0.01)
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    for source in (model, path, str(path), model.SerializeToString()):
        layers = cbn.from_onnx(source)
        assert list(layers)[:2] == ["first", "y2"]
    first, second = layers["first"], layers["y2"]
    assert (first.eps, first.momentum, second.eps, second.momentum) == (0.01, 0.1, 1e-5, 0.2)
    np.testing.assert_array_equal(first.weight, values["s1"])
    np.testing.assert_array_equal(second.running_var, values["v2"])
    x = np.random.default_rng(2).normal(size=(4, 3)).astype(np.float32)
    (y,) = ReferenceEvaluator(model).run(None, {"x": x, "c": np.array(True)})
    np.testing.assert_allclose(second(first(x)), y, rtol=1e-5, atol=1e-6)


def test_from_onnx_refuses(tmp_path):
    model, _ = small_model()
    del model.graph.initializer[:]
    with pytest.raises(ValueError, match=r"the parameters \['b1', 'm1', 'v1'\] of the node 'first' are not stored"):
        cbn.from_onnx(model)
    model, _ = small_model(spatial=0)
    with pytest.raises(ValueError, match="the node 'first' has spatial=0, statistics for each element"):
        cbn.from_onnx(model)
    with pytest.raises(TypeError, match=r"model must be an onnx.ModelProto, a path or bytes, not int"):
        cbn.from_onnx(3)
