"""Calls that compiled code answers by itself: the same bits as through Python code, and which calls it leaves to it."""

import itertools

import ml_dtypes
import numpy as np
import pytest

import cbn
from cbn import functional as f
from cbn.kernels import calls, engine

from .paths import INPUT_DTYPES, LAYOUTS, PARAMETERS, in_memory_order

EPS, MOMENTUM = 1e-5, 0.1
SLOW_EPS = np.float64(EPS)  # no float of Python's own, so that Python code takes the call


class Arrays:
    """Arguments of a call, the same each time."""

    def __init__(self, layout="NCHW", dtype=np.float32, parameters=None, seed=0):
        shape, self.axis, order = LAYOUTS[layout]
        rng = np.random.default_rng(seed)
        n_channels = shape[self.axis]
        self.x, self.dy, self.residual = (
            in_memory_order(rng.standard_normal(shape).astype(dtype), order) for _ in range(3)
        )
        self.out = np.zeros_like(self.x)
        parameters = parameters or PARAMETERS[dtype]
        self.weight, self.bias, self.mean = rng.standard_normal((3, n_channels)).astype(parameters)
        self.var = rng.uniform(0.5, 2, n_channels).astype(parameters)

    def given(self, **changes):
        """Arguments of `calls.evaluate` and `calls.train`."""
        return {"x": self.x, "weight": self.weight, "bias": self.bias, "running_mean": self.mean,
                "running_var": self.var, "momentum": MOMENTUM, "eps": EPS, "channel_axis": self.axis, "out": None,
                "activation": None, "residual": None, **changes}  # fmt: skip

    def backward(self, **changes):
        """Arguments of `calls.gradients`."""
        mean, invstd = np.float64(self.mean), np.float64(1 / np.sqrt(self.var))
        return {"dy": self.dy, "x": self.x, "weight": self.weight, "save_mean": mean, "save_invstd": invstd,
                "channel_axis": self.axis, "out": None, **changes}  # fmt: skip


def assert_same(found, expected, case):
    """The same bits, dtypes and strides."""
    for a, b in zip(found, expected, strict=True):
        assert (a.dtype, a.shape, a.strides) == (b.dtype, b.shape, b.strides), case
        assert a.tobytes() == b.tobytes(), case


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", INPUT_DTYPES, ids=lambda t: t.__name__)
@pytest.mark.parametrize("parameters", [np.float32, np.float64], ids=lambda t: t.__name__)
def test_forward_gives_the_bits_of_python_code(layout, dtype, parameters):
    for training, activation, with_residual, with_out, affine in itertools.product(
        (False, True), (None, "relu"), (False, True), (False, True), (False, True)
    ):
        results = []
        for eps in (EPS, SLOW_EPS):
            a = Arrays(layout, dtype, parameters)
            out, residual = a.out if with_out else None, a.residual if with_residual else None
            affine_c = (a.weight, a.bias) if affine else (None, None)
            y = f.batch_norm(
                a.x, a.mean, a.var, *affine_c, training, MOMENTUM, eps, channel_axis=a.axis, out=out,
                activation=activation, residual=residual,
            )  # fmt: skip
            assert (y is out) == with_out
            results.append((y, a.mean, a.var))
        case = layout, dtype, parameters, training, activation, with_residual, with_out, affine
        assert_same(*results, case)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", INPUT_DTYPES, ids=lambda t: t.__name__)
def test_native_forms_give_the_bits_of_python_code(layout, dtype):
    for parameters, where, tracked in itertools.product(
        (np.float32, np.float64, None), ("new", "out", "in place"), (True, False)
    ):
        results = []
        for eps, mask in ((EPS, f.ALL), (SLOW_EPS, [True, True, True])):
            a = Arrays(layout, dtype, parameters)
            weight, bias = (None, None) if parameters is None else (a.weight, a.bias)
            buffers = (a.mean, a.var) if tracked else (None, None)
            x = a.x.copy(order="K")
            out = {"new": None, "out": a.out, "in place": a.x}[where]
            done = f.native_batch_norm(a.x, weight, bias, *buffers, True, MOMENTUM, eps, channel_axis=a.axis, out=out)
            out = {"new": None, "out": np.empty_like(a.dy), "in place": a.dy}[where]
            gradients = f.native_batch_norm_backward(
                a.dy, x, weight, None, None, *done[1:], True, eps, mask, channel_axis=a.axis, out=out
            )
            results.append((*done, *gradients, a.mean, a.var))
        assert_same(*results, (layout, dtype, parameters, where, tracked))


@pytest.mark.parametrize("dtype", INPUT_DTYPES, ids=lambda t: t.__name__)
def test_usual_calls_are_answered(dtype):
    """Else the tests above would compare Python code with itself."""
    for layout in LAYOUTS:
        a = Arrays(layout, dtype)
        for changes in ({}, {"out": a.out}, {"out": a.x}, {"residual": a.residual, "activation": "relu"},
                        {"weight": None, "bias": None}, {"channel_axis": a.axis % a.x.ndim}):  # fmt: skip
            assert calls.evaluate(**a.given(**changes)) is not None, (layout, changes)
            assert calls.train(**a.given(**changes)) is not None, (layout, changes)
        for changes in ({}, {"out": a.dy}, {"out": a.x}, {"weight": None}):
            assert calls.gradients(**a.backward(**changes)) is not None, (layout, changes)


class Sub(np.ndarray):
    """A subclass, whose methods may be anything."""


UNUSUAL = {
    "x": lambda a: [a.x.tolist(), a.x.view(Sub), a.x.byteswap().view(a.x.dtype.newbyteorder()), a.x[:, :, ::2], a.x[:0],
                    a.x[:, :, ::-1], np.ma.masked_array(a.x), a.x.astype(np.int32), None],
    "weight": lambda a: [a.weight[:-1], a.weight.tolist(), a.weight.view(Sub), np.repeat(a.weight, 2)[::2],
                         a.weight.astype(np.float16), a.weight.astype(a.weight.dtype.newbyteorder()),
                         a.weight.reshape(1, -1)],
    "running_mean": lambda a: [None, a.mean.astype(np.int64), a.mean.astype(np.float16)],
    "momentum": lambda a: [1, None, -0.1, 1.1, np.nan, np.float32(0.5), True],
    "eps": lambda a: [0, -1e-5, np.nan, np.inf, SLOW_EPS],
    "channel_axis": lambda a: [4, -5, True, np.int64(1), 1.0, 1 << 70],
    "out": lambda a: [a.out.astype(np.float64), a.out[:1], a.out.view(Sub), read_only(a.out), transposed(a.out),
                      overlapping(a.x)],
    "activation": lambda a: ["tanh", ("leaky_relu", 0.1), 3],
    "residual": lambda a: [a.residual.astype(np.float64), a.residual[:1], transposed(a.residual)],
}  # fmt: skip


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


def transposed(a):
    """An array of the same shape that lies otherwise."""
    return np.ascontiguousarray(a.T).T


def overlapping(x):
    """An array like x that overlaps it in part."""
    room = np.zeros(x.size + 1, x.dtype)
    room[:-1] = x.ravel()
    Arrays.moved = room[:-1].reshape(x.shape)
    return room[1:].reshape(x.shape)


@pytest.mark.parametrize("name", UNUSUAL)
def test_other_calls_are_left_to_python_code(name):
    """And nothing has changed then."""
    a = Arrays()
    for value in UNUSUAL[name](a):
        changes = {name: value}
        if name == "out" and np.shares_memory(value, Arrays.moved):
            changes["x"] = Arrays.moved
        before = [b.copy() for b in (a.x, a.out, a.mean, a.var)]
        evaluates = name == "eps" and value == 0 and type(value) is float
        assert evaluates or calls.evaluate(**a.given(**changes)) is None, value
        assert calls.train(**a.given(**changes)) is None, value
        if name in ("x", "weight", "channel_axis", "out"):
            assert calls.gradients(**a.backward(**changes)) is None, value
        assert all(map(np.array_equal, before, (a.x, a.out, a.mean, a.var)))


def test_training_calls_that_are_left_to_python_code():
    a = Arrays()
    one = np.zeros((1, 5), np.float32)
    for changes in ({"running_mean": None}, {"running_mean": read_only(a.mean)}, {"eps": 0.0}, {"x": one}):
        assert calls.train(**a.given(**changes)) is None, changes
    x = np.zeros((4, 5), np.float32)
    assert calls.train(**a.given(x=x, out=x, running_mean=x[0])) is None  # the output would be written over it
    for changes in ({"save_mean": None}, {"save_invstd": None}, {"dy": a.dy.astype(np.float64)}, {"dy": a.dy[:1]}):
        assert calls.gradients(**a.backward(**changes)) is None, changes


def test_many_kinds_of_arrays_in_turn():
    """More than the table holds, each with the result that it has by itself."""
    kinds = [(n, c, s, dtype) for n in (1, 2, 3) for c in (3, 5) for s in range(1, 9) for dtype in INPUT_DTYPES]
    assert len(kinds) > 2 * 64
    expected = {}
    for turn in range(3):
        for kind in kinds:
            n, c, s, dtype = kind
            x = np.random.default_rng(1).standard_normal((n, c, s)).astype(dtype)
            mean, var = np.linspace(-1, 1, c), np.linspace(0.5, 2, c)
            y = f.batch_norm(x, mean, var).astype(np.float64)
            exact = (x.astype(np.float64) - mean[:, None]) / np.sqrt(var[:, None] + EPS)
            limit = {np.float32: 1e-6, np.float64: 1e-14, np.float16: 2**-10, ml_dtypes.bfloat16: 2**-7}[dtype]
            np.testing.assert_allclose(y, exact, limit, limit, err_msg=str(kind))
            assert turn == 0 or np.array_equal(y, expected[kind])
            expected[kind] = y


def test_a_changed_instruction_set_is_used():
    """What was prepared for one is not used with another: the bits are those of a process that has always had it."""
    a = Arrays("NC")
    before = engine.isa()
    found = {}
    try:
        for name in (*engine.available(), *engine.available()):
            engine.use_isa(name)
            y = f.batch_norm(a.x, a.mean, a.var, a.weight, a.bias, channel_axis=a.axis)
            slow = f.batch_norm(a.x, a.mean, a.var, a.weight, a.bias, False, 0.1, SLOW_EPS, channel_axis=a.axis)
            assert np.array_equal(y, slow), name
            assert np.array_equal(found.setdefault(name, y), y), name
    finally:
        engine.use_isa(before)


def layer_steps(dtype, layout, parameters, activation, with_residual, where, seed=3, **settings):
    """Everything that two training steps of a layer leave: outputs, gradients, statistics."""
    a = Arrays(layout, dtype)
    bn = cbn.BatchNorm(len(a.weight), dtype=parameters, channel_axis=a.axis, activation=activation, **settings)
    for name in ("weight", "bias"):
        if getattr(bn, name) is not None:
            getattr(bn, name)[...] = getattr(a, name)
    found = []
    for x in (a.x, a.dy):
        y = bn(x, out={"new": None, "out": a.out}[where], residual=a.residual if with_residual else None)
        found.append(y.copy(order="K"))
        dx = bn.backward(a.residual, out={"new": None, "out": np.zeros_like(x)}[where])
        found += list(dx) if isinstance(dx, tuple) else [dx]
    state = (bn.weight_grad, bn.bias_grad, bn.running_mean, bn.running_var, bn.num_batches_tracked)
    return found + [b for b in state if b is not None]


SETTINGS = {
    "usual": {},
    "plain average": {"momentum": None},
    "biased": {"running_var": "biased"},
    "without parameters": {"affine": False},
    "without bias": {"bias": False},
    "without statistics": {"track_running_stats": False},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("dtype", INPUT_DTYPES, ids=lambda t: t.__name__)
def test_layers_give_the_bits_of_python_code(dtype, settings, monkeypatch):
    cases = list(itertools.product(("NC", "NCHW", "NCHW as NHWC", "CNHW in memory"), (np.float32, np.float64),
                                   (None, "relu"), (False, True), ("new", "out")))  # fmt: skip
    compiled = [layer_steps(dtype, *case, **SETTINGS[settings]) for case in cases]
    monkeypatch.setattr(calls, "train_layer", lambda *arguments: None)
    monkeypatch.setattr(calls, "layer_gradients", lambda *arguments: None)
    for case, found in zip(cases, compiled, strict=True):
        assert_same(found, layer_steps(dtype, *case, **SETTINGS[settings]), case)


def test_usual_calls_of_layers_are_answered(monkeypatch):
    """Else the test above would compare Python code with itself."""
    answered = []
    for name in ("train_layer", "layer_gradients"):
        function = getattr(calls, name)

        def watched(*arguments, function=function, name=name):
            done = function(*arguments)
            answered.append((name, done is not None))
            return done

        monkeypatch.setattr(calls, name, watched)
    for settings in SETTINGS.values():
        layer_steps(np.float32, "NCHW", np.float32, None, False, "out", **settings)
    assert set(answered) == {("train_layer", True), ("layer_gradients", True)}


def test_a_layer_follows_what_changes_between_its_calls():
    a = Arrays()
    bn = cbn.BatchNorm2d(5)
    y = bn(a.x).copy()
    bn.weight[...] = 2
    assert np.array_equal(bn(a.x), 2 * y)
    bn.activation = "relu"
    assert np.array_equal(bn(a.x), 2 * np.maximum(y, 0))
    before = bn.running_mean.copy()
    bn.track_running_stats = False
    bn(a.x)
    assert np.array_equal(bn.running_mean, before)
    bn.track_running_stats = True
    bn.running_mean.flags.writeable = False
    with pytest.raises(ValueError, match="running_mean is read-only, but has to be updated"):
        bn(a.x)
    bn.running_mean = np.zeros(5, np.float32)
    bn.num_batches_tracked.flags.writeable = False
    counted = int(bn.num_batches_tracked)
    with pytest.raises(ValueError, match="num_batches_tracked is read-only, but has to be updated"):
        bn(a.x)
    assert not bn.running_mean.any()
    assert int(bn.num_batches_tracked) == counted
    for x, words in (
        (a.x[0], "expected 4D input"),
        (a.x[:, :4], "running_mean should contain 4 elements not 5"),
        (a.x[:1, :, :1, :1], "Expected more than 1 value per channel"),
    ):
        with pytest.raises(ValueError, match=words):
            bn(x)


def test_a_layer_goes_back_through_what_its_own_call_saw():
    """The context has copies of the parameters, and a view of x that nobody reshapes."""
    a = Arrays()
    bn = cbn.BatchNorm2d(5)
    bn.weight[...] = a.weight
    x = a.x.copy()
    bn(x)
    bn.weight[...] = 0
    x.shape = (3, 5, 99)
    dx = bn.backward(a.dy)
    other = cbn.BatchNorm2d(5)
    other.weight[...] = a.weight
    other(a.x)
    assert np.array_equal(dx, other.backward(a.dy))
    bn(x.reshape(a.x.shape), out=x.reshape(a.x.shape))
    with pytest.raises(RuntimeError, match="overwritten"):
        bn.backward(a.dy)
