"""Layers from ONNX models: scopes, versions of the operator, refusals; against ONNX's own evaluation."""

import warnings

import numpy as np
import pytest

import cbn

from . import peer

onnx = peer("onnx")

from onnx import numpy_helper  # noqa: E402
from onnx.parser import parse_model  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402


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
        assert list(layers) == ["first", "y/else_branch/y2", "y/then_branch/y2"]
    first, second = layers["first"], layers["y/then_branch/y2"]
    assert (first.eps, first.momentum, second.eps, second.momentum) == (0.01, 0.1, 1e-5, 0.2)
    np.testing.assert_array_equal(first.weight, values["s1"])
    np.testing.assert_array_equal(second.running_var, values["v2"])
    x = np.random.default_rng(2).normal(size=(4, 3)).astype(np.float32)
    (y,) = ReferenceEvaluator(model).run(None, {"x": x, "c": np.array(True)})
    np.testing.assert_allclose(second(first(x)), y, rtol=1e-5, atol=1e-6)


def test_from_onnx_refuses(tmp_path):
    model, _ = small_model()
    del model.graph.initializer[:]
    with pytest.raises(ValueError, match=r"'first' has B 'b1', mean 'm1', var 'v1' that the model does not store"):
        cbn.from_onnx(model)
    with pytest.raises(TypeError, match=r"model must be an onnx.ModelProto, a path or bytes, not int"):
        cbn.from_onnx(3)


# ---- what is a model, and what is none -------------------------------------------------------------------------------


def test_what_is_no_model_is_a_value_error(tmp_path):
    junk = tmp_path / "junk.onnx"
    junk.write_bytes(b"\x08\xff junk")
    for source, words in (
        (b"junk", "the bytes are no ONNX model"),
        (b"PK\x03\x04" * 50, "the bytes are no ONNX model"),
        (junk, r"junk\.onnx' is no ONNX model"),
        (b"", "the model has no graph"),
        (onnx.ModelProto(), "the model has no graph"),
    ):
        with pytest.raises(ValueError, match=words):
            cbn.from_onnx(source)
    with pytest.raises(FileNotFoundError):
        cbn.from_onnx(tmp_path / "absent.onnx")


def test_a_model_without_batch_norms_says_why():
    model = parse_model('<ir_version: 8, opset_import: ["": 17]> g (float[N,3] x) => (float[N,3] y) { y = Relu(x) }')
    with pytest.warns(UserWarning, match=r"no BatchNormalization node\. Exporters fold.*optimize=False.*PRESERVE"):
        assert cbn.from_onnx(model) == {}


STORED = "float[3] s = {1, 2, 3}, float[3] b = {4, 5, 6}, float[3] m = {0, 1, 2}, float[3] v = {1, 0.5, 2}"


def parsed(nodes, opset=17, more="", stored="", inputs=""):
    """A model of these nodes from x to y, with tensors s, b, m, v."""
    return parse_model(
        f'<ir_version: 8, opset_import: ["": {opset}, "local": 1]> '
        f"g (float[N,3] x{inputs}) => (float[N,3] y) <{STORED}{stored}> {{ {nodes} }} {more}"
    )


# ---- keys ------------------------------------------------------------------------------------------------------------


FUNCTIONS = """
<domain: "local", opset_import: ["": 17]>
inner (x, s) => (y) {
  y = BatchNormalization<epsilon = 0.25>(x, s, s, s, s)
}
<domain: "local", opset_import: ["": 17, "local": 1]>
norm <eps> (x, s) => (y) {
  one = Constant<value = float[3] {1, 1, 1}>()
  two = Add(one, one)
  t = Mul(s, two)
  h = BatchNormalization<epsilon: float = @eps>(x, t, one, t, two)
  y = local.inner(h, t)
}
"""


def test_calls_of_functions_have_layers_of_their_own():
    model = parsed("h = local.norm<eps = 0.5>(x, s) y = local.norm<eps = 0.125>(h, b)", more=FUNCTIONS)
    layers = cbn.from_onnx(model)
    assert list(layers) == ["h/h", "h/y/y", "y/h", "y/y/y"]
    assert [bn.eps for bn in layers.values()] == [0.5, 0.25, 0.125, 0.25]
    np.testing.assert_array_equal(layers["h/y/y"].weight, [2, 4, 6])
    np.testing.assert_array_equal(layers["y/h"].weight, [8, 10, 12])
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    (expected,) = ReferenceEvaluator(model).run(None, {"x": x})
    y = x
    for bn in layers.values():
        y = bn(y)
    np.testing.assert_allclose(y, expected, rtol=1e-4)


def test_parameters_that_a_function_computes():
    make = """
<domain: "local", opset_import: ["": 17]>
make (a) => (c, d) { c = Add(a, a) d = Mul(a, a) }
"""
    layers = cbn.from_onnx(parsed("p, q = local.make(s) y = BatchNormalization(x, p, q, m, v)", more=make))
    np.testing.assert_array_equal(layers["y"].weight, [2, 4, 6])
    np.testing.assert_array_equal(layers["y"].bias, [1, 4, 9])


@pytest.mark.parametrize("opset", [11, 17])
def test_parameters_are_computed_by_the_models_version_of_an_operator(opset):
    axes = "<axes = [1]>(w)" if opset == 11 else "(w, axes)"  # an attribute before opset 13, an input since
    stored = ", float[3,1] w = {7, 8, 9}, int64[1] axes = {1}"
    layers = cbn.from_onnx(parsed(f"t = Squeeze{axes} y = BatchNormalization(x, t, b, m, v)", opset, stored=stored))
    np.testing.assert_array_equal(layers["y"].weight, [7, 8, 9])


def test_bodies_of_branches_loops_and_scans():
    body = "i = BatchNormalization(x, s, b, m, v)"
    model = parsed(
        f"""
        h = If (c) <then_branch = t () => (float[N,3] i) {{ {body} }},
            else_branch = e () => (float[N,3] i) {{ {body} }}>
        k = Loop (n, c, h) <body = l (int64 j, bool go, float[N,3] h0) => (bool go1, float[N,3] h1) {{
            go1 = Identity(go) h1 = BatchNormalization(h0, s, b, m, v) }}>
        y = Scan <num_scan_inputs = 1, body = p (float[3] r) => (float[3] r1) {{
            o = Unsqueeze(r, zero) r0 = BatchNormalization(o, s, b, m, v) r1 = Squeeze(r0, zero) }}> (k)
        """,
        inputs=", bool c, int64 n",
        stored=", int64[1] zero = {0}",
    )
    assert sorted(cbn.from_onnx(model)) == ["h/else_branch/i", "h/then_branch/i", "k/body/h1", "y/body/r0"]


def test_what_depends_on_a_loop_is_not_stored():
    model = parsed(
        """y, last = Loop (n, c, x, s) <body = l (int64 j, bool go, float[N,3] h0, float[3] t0) =>
        (bool go1, float[N,3] h1, float[3] t1) {
            go1 = Identity(go) t1 = Add(t0, t0) h1 = BatchNormalization(h0, t0, b, m, v) }>""",
        inputs=", bool c, int64 n",
    )
    with pytest.raises(ValueError, match="'y/body/h1' has scale 't0' that the model does not store"):
        cbn.from_onnx(model)


def test_names_that_are_there_already():
    model = parsed("h = BatchNormalization(x, s, b, m, v) k = BatchNormalization(h, b, b, m, v) y = Relu(k)")
    for node in model.graph.node:
        node.name = "bn"
    layers = cbn.from_onnx(model)
    assert list(layers) == ["bn", "bn#2"]
    np.testing.assert_array_equal(layers["bn#2"].weight, [4, 5, 6])


def test_a_function_that_calls_itself():
    loop = '<domain: "local", opset_import: ["": 17, "local": 1]> f (x) => (y) { y = local.f(x) }'
    with pytest.raises(ValueError, match="the model's function 'f' calls itself"):
        cbn.from_onnx(parsed("h = local.f(x) y = BatchNormalization(h, s, b, m, v)", more=loop))
    with pytest.raises(ValueError, match="the model's function 'f' calls itself"):
        cbn.from_onnx(parsed("y = BatchNormalization(x, t, b, m, v) t = local.f(s)", more=loop))


# ---- modes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("opset", "attributes", "outputs", "training"),
    [
        (1, "<is_test = 1>", "y", False),
        (1, "", "y", True),
        (6, "<is_test = 1>", "y", False),
        (6, "<is_test = 0>", "y", True),
        (6, "", "y", True),
        (7, "", "y", False),
        (7, "", "y, m1, v1, m2, v2", True),
        (9, "", "y, m1, v1", True),
        (13, "", "y", False),
        (13, "", "y, m1, v1, m2, v2", True),
        (14, "", "y", False),
        (14, "<training_mode = 1>", "y", True),
        (15, "<training_mode = 1>", "y, m1, v1", True),
        (15, "<training_mode = 0>", "y", False),
    ],
)
def test_training_nodes_of_every_version(opset, attributes, outputs, training):
    model = parsed(f"{outputs} = BatchNormalization{attributes}(x, s, b, m, v)", opset)
    bn = cbn.from_onnx(model)["y"]
    assert bn.training is training
    if (opset == 6 and not training) or opset >= 14:  # what ONNX's own evaluation has
        x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
        np.testing.assert_allclose(bn(x), ReferenceEvaluator(model).run(None, {"x": x})[0], atol=1e-5)


def test_running_statistics_of_a_training_node():
    model = parsed("y, m1, v1 = BatchNormalization<training_mode = 1, momentum = 0.75>(x, s, b, m, v)")
    for name in ("m1", "v1"):
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [3]))
    bn = cbn.from_onnx(model)["y"]
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    y, mean, var = ReferenceEvaluator(model).run(None, {"x": x})
    np.testing.assert_allclose(bn(x), y, atol=1e-5)
    np.testing.assert_allclose(bn.running_mean, mean, rtol=1e-5)
    np.testing.assert_allclose(bn.running_var, var, rtol=1e-5)


# ---- parameters ------------------------------------------------------------------------------------------------------


def test_spatial_0_with_parameters_of_channels():
    """As MXNet writes it."""
    bn = cbn.from_onnx(parsed("y = BatchNormalization<spatial = 0, epsilon = 2e-5>(x, s, b, m, v)", 8))["y"]
    assert (bn.num_features, bn.eps) == (3, 2e-5)
    stored = "".join(f", float[3,1] {name}1 = {{1, 2, 3}}" for name in "sbmv")
    model = parsed("y = BatchNormalization<spatial = 0>(x, s1, b1, m1, v1)", 8, stored=stored)
    with pytest.raises(ValueError, match=r"'y' has spatial=0, statistics for each element \(3, 1\), which cbn"):
        cbn.from_onnx(model)


@pytest.mark.parametrize("wrong", ["s", "b", "m", "v"])
def test_the_parameter_that_is_wrong_is_blamed(wrong):
    names = [f"{name}4" if name == wrong else name for name in "sbmv"]
    what = {"s": "scale", "b": "B", "m": "mean", "v": "var"}[wrong]
    model = parsed(f"y = BatchNormalization(x, {', '.join(names)})", stored=f", float[4] {wrong}4 = {{1, 1, 1, 1}}")
    with pytest.raises(ValueError, match=rf"'y' {what} '{wrong}4' has shape \(4,\); expected \(3,\)"):
        cbn.from_onnx(model)


@pytest.mark.parametrize(
    ("parameters", "statistics", "expected"),
    [
        ("FLOAT16", "FLOAT", np.float32),
        ("FLOAT16", "FLOAT16", np.float32),
        ("BFLOAT16", "FLOAT", np.float32),
        ("BFLOAT16", "BFLOAT16", np.float32),
        ("FLOAT", "DOUBLE", np.float64),
        ("FLOAT16", "DOUBLE", np.float64),
    ],
)
def test_types_of_parameters(parameters, statistics, expected):
    model = parsed("y = BatchNormalization(x, s, b, m, v)")
    values = {}
    for tensor in model.graph.initializer:
        values[tensor.name] = numpy_helper.to_array(tensor)
        kind = getattr(onnx.TensorProto, parameters if tensor.name in "sb" else statistics)
        tensor.CopyFrom(onnx.helper.make_tensor(tensor.name, kind, [3], values[tensor.name]))
    bn = cbn.from_onnx(model)["y"]
    assert bn.dtype == expected
    np.testing.assert_array_equal(bn.running_var, values["v"])
    np.testing.assert_array_equal(bn.weight, values["s"])


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ("y = BatchNormalization(x, i, b, m, v)", "'y' scale 'i' has dtype int64"),
        ("t = RandomNormal<shape = [3]>() y = BatchNormalization(x, t, b, m, v)", "has scale 't' that the model does"),
        ("t = Shape(x) y = BatchNormalization(x, t, b, m, v)", "has scale 't' that the model does not store"),
        ("t = other.Op(s) y = BatchNormalization(x, t, b, m, v)", "has 't' from a Op node that cannot be computed"),
        ("t = Add(y, s) y = BatchNormalization(x, t, b, m, v)", "has scale 't' that the model does not store"),
        ("y = BatchNormalization(x, s, b)", "has mean '', var '' that the model does not store"),
        ("y = other.BatchNormalization(x, s, b, m, v)", "is of the domain 'other', whose BatchNormalization is unk"),
        ("y = other.BatchNormInternal(x, s, b, m, v)", "is of the domain 'other', whose BatchNormInternal is unknown"),
        ("y = BatchNormalization<axis = 2>(x, s, b, m, v)", "has the attribute 'axis', which ONNX's operator has not"),
        ("y = BatchNormalization<momentum = 1.5>(x, s, b, m, v)", r"momentum must be in \[0, 1\].*, but got 1\.5"),
        ("y = BatchNormalization<epsilon = -1.0>(x, s, b, m, v)", r"eps must be finite and non-negative"),
    ],
)
def test_nodes_that_cannot_be_converted(nodes, words):
    with pytest.raises(ValueError, match=rf"1 of the model's 1 batch norms cannot be converted \(skip=True.*{words}"):
        cbn.from_onnx(parsed(nodes, stored=", int64[3] i = {1, 2, 3}"))


def test_an_operator_that_the_model_defines_once_more():
    model = parsed("y = BatchNormalization(x, s, b, m, v)")
    node = onnx.helper.make_node("Identity", ["a"], ["c"])
    opset = [onnx.helper.make_opsetid("", 17)]
    model.functions.append(onnx.helper.make_function("", "BatchNormalization", list("abdef"), ["c"], [node], opset))
    with pytest.raises(ValueError, match="is an operator of ONNX that the model defines once more, as a function"):
        cbn.from_onnx(model)


def test_one_bad_node_does_not_hide_the_good_ones():
    model = parsed(
        "h = BatchNormalization(x, s, b, m, v) k = BatchNormalization(h, four, b, m, v) "
        "l = BatchNormalization(k, x, b, m, v) y = BatchNormalization(l, b, b, m, v)",
        stored=", float[4] four = {1, 1, 1, 1}",
    )
    bad = r"'k' scale 'four' has shape \(4,\); expected \(3,\); 'l' has scale 'x' that the model does not store"
    with pytest.raises(ValueError, match=rf"2 of the model's 4 batch norms cannot be .*skip=True leaves them.*{bad}"):
        cbn.from_onnx(model)
    with pytest.warns(UserWarning, match=f"2 of the model's 4 batch norms are left out: {bad}"):
        layers = cbn.from_onnx(model, skip=True)
    assert list(layers) == ["h", "y"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(cbn.from_onnx(parsed("y = BatchNormalization(x, s, b, m, v)"), skip=True)) == ["y"]


def test_values_in_another_file(tmp_path):
    model = parsed("y = BatchNormalization(x, s, b, m, v)")
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
    path = tmp_path / "m.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    np.testing.assert_array_equal(cbn.from_onnx(path)["y"].weight, [1, 2, 3])
    with pytest.raises(ValueError, match=r"has the values of 's' in weights\.bin; pass the model's path"):
        cbn.from_onnx(path.read_bytes())


def test_parameters_that_the_input_decides_after_many_nodes():
    """A chain that is longer than Python's stack."""
    chain = " ".join(f"t{i + 1} = Relu(t{i})" for i in range(2000))
    first, last = "t0 = ReduceMean<axes = [0], keepdims = 0>(x)", "y = BatchNormalization(x, t2000, b, m, v)"
    model = parsed(f"{first} {chain} {last}", 13)
    with pytest.raises(ValueError, match="'y' has scale 't2000' that the model does not store"):
        cbn.from_onnx(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:torch")
def test_the_options_that_keep_batch_norms_keep_them(tmp_path, rng):
    """Those of PyTorch's older exporter; the newer one needs another package."""
    torch = peer("torch")
    net = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3, momentum=0.25)).eval()
    net[1].running_var.uniform_(0.5, 2)
    x, path = torch.from_numpy(rng.normal(size=(2, 2, 4, 4)).astype(np.float32)), tmp_path / "net.onnx"
    torch.onnx.export(net, (x,), path, dynamo=False)
    with pytest.warns(UserWarning, match="has no BatchNormalization node"):
        assert cbn.from_onnx(path) == {}
    kept = {"training": torch.onnx.TrainingMode.PRESERVE, "do_constant_folding": False}
    torch.onnx.export(net, (x,), path, dynamo=False, **kept)
    (bn,) = cbn.from_onnx(path).values()
    assert (bn.momentum, bn.training) == (0.25, False)
    with torch.no_grad():
        np.testing.assert_allclose(bn(net[0](x).numpy()), net(x).numpy(), atol=1e-5)
