"""Evaluation that repeats: what is prepared once must be what the layer would compute now, whatever has changed."""

import copy
import itertools
import pickle
import threading
import warnings
from unittest import mock

import ml_dtypes
import numpy as np
import pytest

import cbn
from cbn import batchnorm
from cbn.inputs import as_input
from cbn.kernels import engine, plans

from .paths import DTYPES, LAYOUTS, in_memory_order


def trained(rng, n_channels, dtype=np.float32, axis=1):
    bn = cbn.BatchNorm(n_channels, dtype=dtype, channel_axis=axis).eval()
    bn.weight[...], bn.bias[...], bn.running_mean[...] = rng.standard_normal((3, n_channels))
    bn.running_var[...] = rng.uniform(0.5, 2, n_channels)
    return bn


def fresh(bn, x):
    """What a layer without a past computes."""
    return cbn.functional.batch_norm(
        x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps, channel_axis=bn.channel_axis
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer_dtype", DTYPES)
def test_the_second_call_has_the_bits_of_the_first(isa, parallel, rng, layout, dtype, layer_dtype):
    shape, axis, order = LAYOUTS[layout]
    bn = trained(rng, shape[axis], layer_dtype, axis)
    x = in_memory_order(rng.standard_normal(shape).astype(dtype), order)
    first = bn(x)
    out = np.empty_like(x)
    for y in (bn(x), bn(x, out=out), bn(x)):
        assert y.tobytes() == first.tobytes() == fresh(bn, x).tobytes()
        assert y.strides == x.strides
        assert y.dtype == dtype
    assert bn(x, out=out) is out
    other = x + 1
    assert bn(other).tobytes() == fresh(bn, other).tobytes()
    assert bn(other, out=other) is other, "in place"
    assert other.tobytes() == fresh(bn, x + 1).tobytes()


def change_one_value(bn):
    bn.weight[-1] = 7


def change_through_a_view(bn):
    bn.running_mean[1:3] += 1


def change_by_a_bit(bn):
    bn.running_var.view(np.int32)[0] ^= 1


def change_the_sign_of_a_zero(bn):
    bn.bias[0] = -bn.bias[0]


CHANGES = {
    "one value": change_one_value,
    "through a view": change_through_a_view,
    "one bit": change_by_a_bit,
    "the sign of a zero": change_the_sign_of_a_zero,
    "eps": lambda bn: setattr(bn, "eps", 0.5),
    "another array": lambda bn: setattr(bn, "bias", np.arange(5, dtype=np.float32)),
    "no weight": lambda bn: setattr(bn, "weight", None),
    "a loaded state": lambda bn: bn.load_state_dict(trained(np.random.default_rng(9), 5).state_dict()),
    "reset": lambda bn: bn.reset_running_stats(),
    "training": lambda bn: (bn.train()(np.ones((4, 5), np.float32)), bn.eval()),
    "NaN": lambda bn: bn.running_mean.fill(np.nan),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_is_noticed(rng, change):
    bn = trained(rng, 5)
    bn.bias[0] = 0.0
    x = rng.standard_normal((3, 5)).astype(np.float32)
    x[0, 0] = bn.running_mean[0]  # y is the bias there: shows the sign of a zero
    for _ in range(3):
        before = bn(x)
    change(bn)
    for _ in range(3):
        y = bn(x)
        assert y.tobytes() == fresh(bn, x).tobytes()
        assert y.tobytes() != before.tobytes()


def test_a_training_forward_is_no_evaluation(rng):
    bn = trained(rng, 5)
    x = rng.standard_normal((30, 5)).astype(np.float32)
    for _ in range(3):
        evaluated = bn(x)
    bn.train()
    assert not np.array_equal(bn(x), evaluated)
    bn.backward(x)
    bn.eval()
    for _ in range(3):
        bn(x)
        with pytest.raises(RuntimeError, match="evaluation mode"):
            bn.backward(x)
    bn.train().freeze()
    bn(x)
    assert bn.backward(x).shape == x.shape


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        (lambda x: {"x": x[:, :4]}, ValueError, "running_mean should contain 4 elements not 5"),
        (lambda x: {"x": x.astype(np.int32)}, TypeError, "dtype int32"),
        (lambda x: {"x": np.ma.masked_array(x)}, TypeError, "masked"),
        (lambda x: {"x": x[0]}, ValueError, "1D input"),
        (lambda x: {"x": x, "out": np.empty_like(x[:2])}, ValueError, "out has shape"),
        (lambda x: {"x": x, "out": np.empty(x.shape)}, TypeError, "out has dtype"),
        (lambda x: {"x": x, "out": np.broadcast_to(np.float32(0), x.shape)}, ValueError, "read-only"),
        (lambda x: {"x": x, "out": [1]}, TypeError, "numpy array, not list"),
        (lambda x: {"x": x, "mask": x}, TypeError, "mask"),
        (lambda x: {"x": x, "nothing": x}, TypeError, "nothing"),
    ],
)
def test_bad_arguments_after_good_ones(rng, bad, error, words):
    bn = trained(rng, 5)
    x = rng.standard_normal((3, 5)).astype(np.float32)
    bn(x), bn(x)
    arguments = bad(x)
    with pytest.raises(error, match=words):
        bn(arguments.pop("x"), **arguments)
    assert bn(x).tobytes() == fresh(bn, x).tobytes()


def test_other_inputs_after_a_plan(rng):
    """Another order in memory, byte order, alignment, overlap, a subclass, a list: each by its own way."""
    bn = trained(rng, 5)
    x = rng.standard_normal((4, 5)).astype(np.float32)
    expected = fresh(bn, x)
    bn(x), bn(x)
    unaligned = np.frombuffer(b"x" + x.tobytes(), np.float32, offset=1).reshape(x.shape)
    for other in (np.asfortranarray(x), x.astype(">f4"), unaligned, x[::-1][::-1], x.tolist()):
        np.testing.assert_allclose(bn(other), expected, rtol=1e-5, atol=1e-6)

    class Sub(np.ndarray):
        pass

    assert type(bn(x.view(Sub))) is np.ndarray
    memory = np.zeros(25, np.float32)
    memory[:20] = x.ravel()
    bn(memory[:20].reshape(4, 5), out=memory[1:21].reshape(4, 5))
    assert memory[1:21].tobytes() == expected.tobytes(), "as if the input had been copied first"


def test_what_a_subclass_redefines_is_asked_each_time(rng):
    class Doubled(cbn.BatchNorm):
        def forward(self, x, **kwargs):
            return 2 * super().forward(x, **kwargs)

    class Moving(cbn.BatchNorm):
        calls = 0

        @property
        def weight(self):
            self.calls += 1
            return np.full(5, self.calls, np.float32)

        @weight.setter
        def weight(self, value):
            pass

    x = rng.standard_normal((3, 5)).astype(np.float32)
    doubled, moving, plain = Doubled(5).eval(), Moving(5).eval(), cbn.BatchNorm(5).eval()
    for _ in range(3):
        assert np.array_equal(doubled(x), 2 * plain(x))
        assert not np.array_equal(moving(x), moving(x))
    plain.forward = lambda x: "mine"
    assert plain(x) == "mine"


def test_copies_have_plans_of_their_own(rng):
    bn = trained(rng, 5)
    x = rng.standard_normal((3, 5)).astype(np.float32)
    before = bn(x)
    bn(x)
    others = [copy.copy(bn), copy.deepcopy(bn), pickle.loads(pickle.dumps(bn))]
    bn.bias = bn.bias + 1
    for other in others:
        assert other(x).tobytes() == before.tobytes()
        assert other(x).tobytes() == before.tobytes()
    assert bn(x).tobytes() != before.tobytes()


def test_an_instruction_set_chosen_later_is_used(rng):
    bn = trained(rng, 5)
    x = rng.standard_normal((3, 5)).astype(np.float32)
    for isa in engine.available():
        engine.use_isa(isa)
        assert bn(x).tobytes() == fresh(bn, x).tobytes()
        assert bn(x).tobytes() == fresh(bn, x).tobytes()


def test_many_threads_while_one_writes(rng):
    """Each result is one of the states that the layer was in."""
    n_channels = 300
    bn = trained(rng, n_channels)
    states = [trained(np.random.default_rng(i), n_channels).state_dict() for i in range(2)]
    x = rng.standard_normal((2, n_channels)).astype(np.float32)
    expected = set()
    for state in states:
        bn.load_state_dict(state)
        expected.add(fresh(bn, x).tobytes())
    stop, wrong = threading.Event(), []

    def read():
        while not stop.is_set():
            if bn(x).tobytes() not in expected:
                wrong.append(1)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for i in range(300):
        bn.load_state_dict(states[i % 2])
    stop.set()
    for reader in readers:
        reader.join()
    assert not wrong


# ---- plans that are asked for --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer_dtype", DTYPES)
def test_a_plan_has_the_bits_of_the_layer(isa, parallel, rng, layout, dtype, layer_dtype):
    shape, axis, order = LAYOUTS[layout]
    bn = trained(rng, shape[axis], layer_dtype, axis)
    x = in_memory_order(rng.standard_normal(shape).astype(dtype), order)
    plan = bn.plan(shape, dtype)
    out, other = np.empty_like(x), 1 if axis == 0 else 0
    reversed_y = np.flip(plan(np.flip(x, other)), other)
    for y in (plan(x), plan(x), plan(x, out=out), plan(np.ascontiguousarray(x)), reversed_y):
        assert y.tobytes() == bn(x).tobytes()
    assert plan(x, out=out) is out
    assert plan(x).strides == x.strides
    assert plan(x, out=x) is x


def test_a_plan_is_a_snapshot(rng):
    bn = trained(rng, 5)
    x = rng.standard_normal((4, 5)).astype(np.float32)
    plan, before = bn.plan(x.shape), bn(x)
    bn.weight += 1
    bn.running_mean = None
    bn.train()
    assert np.array_equal(plan(x), before)


def test_a_plan_survives_another_instruction_set(rng):
    bn = trained(rng, 70)
    x = rng.standard_normal((40, 70)).astype(np.float32)
    plan = bn.plan(x.shape)
    plan(x)
    for isa in engine.available():
        before = engine.use_isa(isa)
        try:
            assert plan(x).tobytes() == fresh(bn, x).tobytes()
        finally:
            engine.use_isa(before)


def test_one_plan_from_many_threads(rng):
    bn = trained(rng, 16)
    inputs = [rng.standard_normal((8, 16, 30, 30)).astype(np.float32) for _ in range(8)]
    expected = [bn(x) for x in inputs]
    plan, wrong = bn.plan(inputs[0].shape), []

    def serve(x, y):
        out = np.empty_like(x)
        wrong.extend(1 for _ in range(50) if not np.array_equal(plan(x, out=out), y))

    threads = [threading.Thread(target=serve, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


COPIES = {"copy": copy.copy, "deepcopy": copy.deepcopy} | {
    f"pickle {p}": lambda plan, p=p: pickle.loads(pickle.dumps(plan, p)) for p in range(pickle.HIGHEST_PROTOCOL + 1)
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("layer_dtype", DTYPES)
def test_plans_are_copied(rng, duplicate, dtype, layer_dtype):
    bn = trained(rng, 5, layer_dtype, -1)
    bn.activation = ("leaky_relu", 0.25)
    x = rng.standard_normal((2, 3, 5)).astype(dtype)
    plan = bn.plan(x.shape, dtype)
    other = duplicate(plan)
    bn.weight += 1
    assert type(other) is type(plan)
    assert repr(other) == repr(plan)
    assert other(x).tobytes() == plan(x).tobytes()
    assert other._plans == 1
    with pytest.raises(ValueError, match="this plan is for"):
        other(x[:1])
    assert duplicate(cbn.BatchNorm1d(3).plan((0, 3)))(np.empty((0, 3), np.float32)).shape == (0, 3)


def test_an_empty_batch_has_a_plan():
    assert cbn.BatchNorm1d(3).plan((0, 3))(np.empty((0, 3), np.float32)).shape == (0, 3)


def test_what_a_plan_refuses():
    bn = cbn.BatchNorm2d(3)
    with pytest.raises(ValueError, match=r"expected 4D input \(got 2D input\)"):
        bn.plan((2, 3))
    with pytest.raises(ValueError, match="running_mean should contain 4 elements not 3"):
        bn.plan((2, 4, 5, 5))
    with pytest.raises(
        TypeError,
        match="dtype must be float32, float64, float16 or bfloat16; or uint8 or int8, with x_scale, not int64",
    ):
        bn.plan((2, 3, 5, 5), np.int64)
    with pytest.raises(ValueError, match="running_mean must be defined in evaluation mode"):
        cbn.BatchNorm2d(3, track_running_stats=False).plan((2, 3, 5, 5))
    plan = bn.plan((2, 3, 5, 5))
    x = np.zeros((2, 3, 5, 5), np.float32)
    with pytest.raises(TypeError, match="input has dtype float64; this plan is for float32"):
        plan(x.astype(float))
    with pytest.raises(ValueError, match=r"input has shape \(1, 3, 5, 5\); this plan is for \(2, 3, 5, 5\)"):
        plan(x[:1])
    with pytest.raises(ValueError, match=r"out has shape \(2, 3, 5\)"):
        plan(x, out=x[..., 0])


# ---- the invariant of a plan: what it stands for is not overridden, at the moment of the call ------------------------


class Doubling:
    def forward(self, x, **kwargs):
        return 2 * super().forward(x, **kwargs)


def doubled(self, x, **kwargs):
    return 2 * cbn.BatchNorm.__dict__["forward"](self, x, **kwargs)


def test_a_mixin_before_the_layer_is_called(rng):
    class Double(Doubling, cbn.BatchNorm2d):
        pass

    x = rng.standard_normal((2, 3, 4, 4)).astype(np.float32)
    bn = Double(3).eval()
    expected = 2 * cbn.BatchNorm2d(3).eval()(x)
    for call in range(5):
        assert np.array_equal(bn(x), expected), f"call {call}"
    assert bn._plans == 0


class Scaled(cbn.BatchNorm1d):
    weight = property(lambda self: np.full(5, 3, np.float32), lambda self, value: None)


class Logging(cbn.BatchNorm1d):
    def __getattribute__(self, name):
        if name == "running_mean":
            return np.full(5, 2, np.float32)
        return super().__getattribute__(name)


class Quiet(cbn.BatchNorm1d):
    """Assignments that cbn does not see."""

    def __setattr__(self, name, value):
        if name == "eps":
            self.__dict__["_eps"] = value
        else:
            super().__setattr__(name, value)


@pytest.mark.parametrize("cls", [Scaled, Logging, Quiet])
def test_attributes_that_a_subclass_overrides_are_read(rng, cls):
    x = rng.standard_normal((4, 5)).astype(np.float32)
    bn = cls(5).eval()
    for eps in (1e-5, 0.5):
        bn.eps = eps
        expected = cbn.functional.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=eps)
        for call in range(4):
            assert np.array_equal(bn(x), expected), f"call {call}, eps {eps}"


PATCHES = {
    "the class": lambda: mock.patch.object(cbn.BatchNorm1d, "forward", doubled),
    "its base": lambda: mock.patch.object(cbn.BatchNorm, "forward", doubled),
    "a method that forward calls": lambda: mock.patch.object(
        cbn.BatchNorm, "_check_channels", side_effect=RuntimeError("checked"), autospec=True
    ),
    "an attribute": lambda: mock.patch.object(
        cbn.BatchNorm1d, "weight", property(lambda self: np.full(5, 2, np.float32)), create=True
    ),
}


def outcome(call):
    try:
        return call().tobytes()
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize("patch", PATCHES.values(), ids=PATCHES)
def test_a_patch_works_after_the_plan_and_ends(rng, patch):
    x = rng.standard_normal((4, 5)).astype(np.float32)
    bn = cbn.BatchNorm1d(5).eval()
    y = [bn(x) for _ in range(3)][-1]
    assert bn._plans == 1
    with patch():
        patched = [outcome(lambda: bn(x)) for _ in range(4)]
        assert len(set(patched)) == 1, patched
        assert patched[0] != y.tobytes()
    assert all(np.array_equal(bn(x), y) for _ in range(4))


def test_a_base_class_that_changes_later(rng):
    class Mixin:
        pass

    class Layer(Mixin, cbn.BatchNorm1d):
        pass

    x = rng.standard_normal((4, 5)).astype(np.float32)
    bn = Layer(5).eval()
    y = [bn(x) for _ in range(3)][-1]
    Mixin.forward = lambda self, x, **kwargs: 2 * cbn.BatchNorm1d.forward(self, x, **kwargs)
    assert all(np.array_equal(bn(x), 2 * y) for _ in range(3))
    del Mixin.forward
    assert all(np.array_equal(bn(x), y) for _ in range(3))


def test_an_instance_or_its_class_that_changes_later(rng):
    x = rng.standard_normal((4, 5)).astype(np.float32)
    bn = cbn.BatchNorm1d(5).eval()
    y = [bn(x) for _ in range(3)][-1]
    bn.forward = lambda x: 3 * y
    assert all(np.array_equal(bn(x), 3 * y) for _ in range(3))
    del bn.forward
    assert all(np.array_equal(bn(x), y) for _ in range(3))
    vars(bn)["forward"] = lambda x: 4 * y
    assert all(np.array_equal(bn(x), 4 * y) for _ in range(3))
    del vars(bn)["forward"]
    assert all(np.array_equal(bn(x), y) for _ in range(3))

    class Double(Doubling, cbn.BatchNorm1d):
        pass

    bn.__class__ = Double
    assert all(np.array_equal(bn(x), 2 * y) for _ in range(3))


def test_subclasses_that_override_nothing_have_plans(rng):
    class Named(cbn.BatchNorm1d):
        def __init__(self, n, name):
            super().__init__(n)
            self.name = name

        def describe(self):
            return self.name

    x = rng.standard_normal((4, 5)).astype(np.float32)
    bn = Named(5, "first").eval()
    for _ in range(4):
        bn(x)
    assert bn._plans == 1


def test_an_eval_plan_that_is_overridden(rng):
    x = rng.standard_normal((4, 5)).astype(np.float32)
    plan = cbn.BatchNorm1d(5).plan(x.shape)
    y = plan(x)
    with mock.patch.object(type(plan), "forward", return_value="patched"):
        assert plan(x) == "patched"
    assert np.array_equal(plan(x), y)


# ---- how many plans are made -----------------------------------------------------------------------------------------

INPUTS = {
    "contiguous": lambda x: x,
    "sliced": lambda x: np.repeat(x, 2, axis=0)[::2],
    "sliced channels": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "NHWC memory": lambda x: np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
}
CONVERTED = {
    "list": lambda x: x.tolist(),
    "byte order": lambda x: x.astype(">f4"),
    "subclass": lambda x: x.view(type("Sub", (np.ndarray,), {})),
    "reversed": lambda x: x[::-1],
    "part of rows": lambda x: np.pad(x, ((0, 0), (0, 0), (0, 0), (0, 3)))[..., :-3],
    "every other pixel": lambda x: np.repeat(x, 2, axis=3)[..., ::2],
}


@pytest.mark.parametrize("how", INPUTS)
def test_one_plan_is_made_and_used(rng, how):
    x = INPUTS[how](rng.standard_normal((4, 5, 6, 3)).astype(np.float32))
    bn = trained(rng, 5)
    y = fresh(bn, x)
    out = np.empty_like(y)
    for call in range(4):
        assert bn(x).tobytes() == y.tobytes(), f"call {call}"
        assert bn(x, out=out) is out
        assert out.tobytes() == y.tobytes(), f"call {call}"
        assert bn(x).strides == y.strides
        assert bn._plans == 1, f"call {call}"
    with mock.patch.object(batchnorm, "as_input", side_effect=AssertionError("no plan was used")):
        assert bn(x).tobytes() == y.tobytes()
        bn(x, out=out)
    assert bn(x, out=x) is x, "in place"
    assert x.tobytes() == y.tobytes()
    assert bn._plans == 1


@pytest.mark.parametrize("how", CONVERTED)
def test_no_plan_is_made_for_what_is_converted_at_each_call(rng, how):
    x = rng.standard_normal((4, 5, 6, 3)).astype(np.float32)
    bn = trained(rng, 5)
    for _ in range(4):
        bn(CONVERTED[how](x))
    assert bn._plans == 0


def test_a_residual_that_lies_otherwise_makes_no_more_plans(rng):
    x = rng.standard_normal((4, 5, 6, 3)).astype(np.float32)
    z = INPUTS["NHWC memory"](x)
    bn = trained(rng, 5)
    for _ in range(4):
        bn(x, residual=z)
        bn(x)
    assert bn._plans == 1


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 7), (3, 5, 1, 4), (1, 5, 4, 1)])
def test_the_output_of_a_plan_lies_as_the_first(rng, shape):
    for order in itertools.permutations(range(len(shape))):
        for step in (1, 2):
            x = in_memory_order(np.repeat(rng.standard_normal(shape).astype(np.float32), step, axis=0), order)[::step]
            bn = trained(rng, 5)
            first = bn(x)
            for y in (bn(x), bn(x, out=np.empty_like(x)), np.empty_like(x)):
                differing = [y.strides[i] != first.strides[i] for i, n in enumerate(shape) if n > 1]
                assert not any(differing), (shape, order, step)
            assert bn(x, out=np.empty_like(x)).tobytes() == first.tobytes()


def test_plans_are_made_again_when_arrays_have_changed(rng):
    x = rng.standard_normal((4, 5)).astype(np.float32)
    bn = trained(rng, 5)
    for k in range(3):
        bn.weight[...] = k
        for _ in range(3):
            assert bn(x).tobytes() == fresh(bn, x).tobytes()
        assert bn._plans == k + 1


def test_an_output_that_begins_where_x_begins_and_lies_otherwise(rng):
    base = rng.standard_normal((8, 5)).astype(np.float32)
    x, bn = base[::2], trained(rng, 5)
    y = fresh(bn, x)
    for _ in range(3):
        bn(x)
    out = base[:4]
    assert bn(x, out=out) is out
    assert out.tobytes() == y.tobytes()


def test_a_dtype_assigned_in_place_is_noticed(rng):
    x = rng.standard_normal((4, 5)).astype(np.float32)
    for name in ("weight", "running_var"):
        bn = trained(rng, 5)
        for _ in range(3):
            bn(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # numpy 2.5 discourages it
            getattr(bn, name).dtype = np.int32
        with pytest.raises(
            ValueError, match=rf"{name} has become an array of int32 of shape \(5,\); expected \(5,\) floats"
        ):
            bn(x)


def overriding():
    """Layers that evaluate otherwise than cbn defines, by the way in which they do."""

    class Mixin:
        def forward(self, x, **kwargs):
            return 2 * super().forward(x, **kwargs)

    class Mixed(Mixin, cbn.BatchNorm1d):
        pass

    class Calling(cbn.BatchNorm1d):
        def __call__(self, x, **kwargs):
            return 2 * super().__call__(x, **kwargs)

    class Weighted(cbn.BatchNorm1d):
        weight = property(lambda self: np.full(3, 5, np.float32), lambda self, value: None)

    yield "forward", Mixed(3)
    yield "__call__", Calling(3)
    yield "weight", Weighted(3)
    bn = cbn.BatchNorm1d(3)
    bn.forward = lambda x: x
    yield "forward", bn
    with mock.patch.object(cbn.BatchNorm1d, "forward", lambda self, x: x):
        yield "forward", cbn.BatchNorm1d(3)


@pytest.mark.parametrize("i", range(5))
def test_what_stands_for_an_overridden_evaluation_is_refused(i):
    """A plan and folded weights would go on without the override."""
    for k, (name, bn) in enumerate(overriding()):
        if k == i:
            bn.eval()
            words = rf"{type(bn).__name__} has a {name} of its own, which {{}} would not follow"
            with pytest.raises(TypeError, match=words.format("a plan")):
                bn.plan((2, 3))
            with pytest.raises(TypeError, match=words.format("a folded weight")):
                cbn.fuse_linear_bn(np.eye(3), None, bn)


def test_a_subclass_that_evaluates_as_its_base_has_plans():
    class Named(cbn.BatchNorm1d):
        def train(self, mode=True):
            return super().train(mode)

        def describe(self):
            return "named"

    x = np.ones((2, 3), np.float32)
    bn = Named(3).eval()
    assert np.array_equal(bn.plan((2, 3))(x), bn(x))


def test_a_deleted_attribute_drops_the_plan(rng):
    """So that another one, which overrides something, cannot take its place unnoticed."""
    x = rng.standard_normal((2, 3)).astype(np.float32)
    bn = cbn.BatchNorm1d(3).eval()
    bn.note = 1
    for _ in range(3):
        bn(x)
    del bn.note
    vars(bn)["forward"] = lambda x: 7
    assert bn(x) == 7
    del bn.forward
    assert np.array_equal(bn(x), cbn.BatchNorm1d(3).eval()(x))
    with pytest.raises(AttributeError):
        del bn.note


def test_shape_and_dtype_of_a_plan_cannot_be_assigned():
    plan = cbn.BatchNorm1d(3).plan((2, 3))
    for name, value in (("shape", (2, 1 << 22)), ("dtype", np.dtype(np.float64))):
        with pytest.raises(AttributeError):
            setattr(plan, name, value)
    assert (plan.shape, plan.dtype) == ((2, 3), np.float32)
    vars(plan)["_shape"] = (2, 1 << 22)  # nobody's business, and still no crash
    with pytest.raises(ValueError, match=r"coefficients of shape \(3, 3\) for 4194304 channels"):
        plan(np.ones((2, 1 << 22), np.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_plan_is_kept_for_values_that_the_arrays_do_not_have(dtype):
    """As where another thread repairs a statistic while an evaluation reads it: a NaN is equal to nothing but a NaN."""
    x = np.ones((4, 3), dtype)
    for source, value, kept in ((1, 1, True), (1, np.nan, False), (np.nan, 1, False), (np.nan, np.nan, True)):
        sources = (np.full(3, source, dtype), np.ones(3, dtype), None, None)
        values = (np.full(3, float(value)), np.ones(3), None, None)
        coef = np.array([values[0], values[1], np.zeros(3)])
        plan = plans.Plan.of(as_input(x, 1), x, sources, values, coef)
        assert (plan is not None) == kept, (source, value)
