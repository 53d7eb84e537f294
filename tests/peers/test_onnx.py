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
