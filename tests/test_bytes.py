"""8-bit input: dequantized and normalized in one pass."""

import copy
import pickle
from unittest import mock

import ml_dtypes
import numpy as np
import pytest

import cbn
from cbn import plan as plan_module
from cbn import reference
from cbn.functional import batch_norm
from cbn.kernels import engine

from .paths import LAYOUTS, LIMIT, agree, in_memory_order
from .test_guard_pages import guarded

BYTES = (np.uint8, np.int8)
OUTPUTS = (np.float32, ml_dtypes.bfloat16)


def drawn(rng, dtype, shape, order=None):
    info = np.iinfo(dtype)
    return in_memory_order(rng.integers(info.min, info.max, shape, dtype, endpoint=True), order)


def parameters(rng, n_channels):
    weight, bias, mean = rng.standard_normal((3, n_channels)).astype(np.float32)
    return mean, rng.uniform(0.5, 2, n_channels).astype(np.float32), weight, bias


def exact(x, arrays, scale, zero_point, axis=1):
    return reference.normalize(scale * (x.astype(np.float64) - zero_point), *arrays, channel_axis=axis)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("out_dtype", OUTPUTS)
@pytest.mark.parametrize("past", [False, True])
def test_values_of_8_bits(isa, parallel, rng, layout, dtype, out_dtype, past):
    shape, axis, order = LAYOUTS[layout]
    x, arrays = drawn(rng, dtype, shape, order), parameters(rng, shape[axis])
    engine.tune(nontemporal_bytes=0 if past else 1 << 40)
    for scale, zero_point in ((1 / 255, 0), (0.05, np.iinfo(dtype).max), (3.0, 7)):
        results = []
        for n_threads in (1, 3):
            with cbn.num_threads(n_threads):
                y = batch_norm(
                    x, *arrays, channel_axis=axis, x_scale=scale, x_zero_point=zero_point, out_dtype=out_dtype
                )
            results.append(y.tobytes())
        assert results[0] == results[1]
        assert y.dtype == out_dtype
        assert [s // y.itemsize for s in y.strides] == list(x.strides)
        agree(y, exact(x, arrays, scale, zero_point, axis % x.ndim), LIMIT[y.dtype])


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("shape", [(2, 3, 70001), (70, 9016), (9, 77, 49), (300, 1025), (33, 300)])
def test_borders(isa, parallel, rng, dtype, shape):
    x, arrays = drawn(rng, dtype, shape), parameters(rng, shape[1])
    for past in (0, 1 << 40):
        engine.tune(nontemporal_bytes=past)
        for out_dtype in OUTPUTS:
            for offset in (0, 3):
                out = np.empty(x.size + 3, out_dtype)[offset : offset + x.size].reshape(shape)
                assert batch_norm(x, *arrays, x_scale=0.02, out=out, out_dtype=out_dtype) is out
                agree(out, exact(x, arrays, 0.02, 0), LIMIT[out.dtype])


@pytest.mark.parametrize("dtype", BYTES)
def test_every_value(isa, dtype):
    info = np.iinfo(dtype)
    x = np.repeat(np.arange(info.min, info.max + 1).astype(dtype)[:, None], 5, 1)
    y = batch_norm(x, np.zeros(5), np.ones(5), eps=0, x_scale=0.25, x_zero_point=3)
    assert (y == (x.astype(np.float32) - 3) / 4).all()


@pytest.mark.parametrize("dtype", BYTES)
def test_coefficients_that_float32_cannot_hold(isa, rng, dtype):
    x = drawn(rng, dtype, (20, 4))
    ones = np.ones(4)
    cases = [
        (1e-42, 0 * ones, 1e-90 * ones),
        (1e-30, 1e4 * ones, ones),
        (1e-310, ones, ones),
        (1e-300, 1e20 * ones, ones),
    ]
    for scale, *arrays in cases:
        y = batch_norm(x, *arrays, eps=0, x_scale=scale)
        agree(y, exact(x, (*arrays, None, None, 0.0), scale, 0), 1e-6)


def test_activation_and_strides(rng):
    x, arrays = drawn(rng, np.uint8, (4, 6, 10)), parameters(rng, 6)
    y = batch_norm(x, *arrays, x_scale=1 / 255, activation="relu")
    agree(y, np.maximum(exact(x, arrays, 1 / 255, 0), 0), 1e-6)
    strided = np.repeat(x, 2, -1)[..., ::2]
    assert (batch_norm(strided, *arrays, x_scale=1 / 255, activation="relu") == y).all()
    out = np.empty((4, 6, 20), np.float32)[..., ::2]
    assert batch_norm(x, *arrays, x_scale=1 / 255, activation="relu", out=out) is out
    assert (out == y).all()
    memory = np.empty(y.size * 4, np.uint8)
    inside = memory[: x.size].reshape(x.shape)
    inside[...] = x
    there = memory.view(np.float32).reshape(x.shape)  # over its own input
    assert (batch_norm(inside, *arrays, x_scale=1 / 255, activation="relu", out=there) == y).all()
    assert batch_norm(x[:0], *arrays, x_scale=1.0).shape == (0, 6, 10)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("out_dtype", OUTPUTS)
@pytest.mark.parametrize("slope", [0, 0.25, 1])
def test_residual(isa, parallel, rng, dtype, out_dtype, layout, slope):
    """y = act(norm(x) + residual), of y's dtype; in any memory, over itself, and where float32 holds no coefficient."""
    shape, axis, order = LAYOUTS[layout]
    x, arrays = in_memory_order(drawn(rng, dtype, shape), order), parameters(rng, shape[axis])
    z = in_memory_order(rng.standard_normal(shape).astype(out_dtype), order)
    kwargs = {"channel_axis": axis, "x_scale": 0.02, "x_zero_point": 5, "activation": ("leaky_relu", slope)}
    expected = reference.activate(exact(x, arrays, 0.02, 5, axis % x.ndim), z, slope)
    for past in (0, 1 << 40):
        engine.tune(nontemporal_bytes=past)
        for n_threads in (1, 3):
            with cbn.num_threads(n_threads):
                y = batch_norm(x, *arrays, residual=z, out_dtype=out_dtype, **kwargs)
            agree(y, expected, LIMIT[y.dtype])
            for other in (np.asfortranarray(z), np.repeat(z, 2, -1)[..., ::2]):
                assert (batch_norm(x, *arrays, residual=other, out_dtype=out_dtype, **kwargs) == y).all()
            there = z.copy(order="K")
            assert batch_norm(x, *arrays, residual=there, out=there, out_dtype=out_dtype, **kwargs) is there
            assert (there == y).all()
            memory = np.empty(x.size + 5, out_dtype)
            moved, out = memory[5:].reshape(shape), memory[:-5].reshape(shape)
            moved[...] = z
            assert (batch_norm(x, *arrays, residual=moved, out=out, out_dtype=out_dtype, **kwargs) == y).all()
    arrays = *arrays[:2], arrays[2] * np.float32(1e-39), *arrays[3:]
    expected = reference.activate(exact(x, arrays, 0.02, 5, axis % x.ndim), z, slope)
    y = batch_norm(x, *arrays, residual=z, out_dtype=out_dtype, **kwargs)
    agree(y, expected, LIMIT[y.dtype])


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("shape", [(2, 3, 17), (9, 5, 49), (33, 7), (3, 130), (70, 1030), (64, 9, 129)])
def test_nothing_outside_an_8_bit_array_is_touched(isa, parallel, rng, dtype, shape, at_end):
    x = guarded(shape, dtype, at_end)
    x[...] = drawn(rng, dtype, shape)
    for out_dtype in OUTPUTS:
        y = guarded(shape, out_dtype, at_end)
        for past in (0, 1 << 40):
            engine.tune(nontemporal_bytes=past)
            for axis in {1, len(shape) - 1}:
                arrays = np.zeros(shape[axis]), np.ones(shape[axis])
                batch_norm(x, *arrays, channel_axis=axis, x_scale=1.0, out=y, out_dtype=out_dtype)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({}, TypeError, "input has dtype uint8, whose values need a scale: x_scale=1/255, for example"),
        ({"x_scale": 0}, ValueError, "x_scale must be finite and positive, but got 0.0"),
        ({"x_scale": np.inf}, ValueError, "x_scale must be finite and positive, but got inf"),
        ({"x_scale": "1"}, TypeError, "x_scale must be a number, not '1'"),
        ({"x_scale": 1, "x_zero_point": 0.5}, TypeError, "x_zero_point must be an integer, not 0.5"),
        ({"x_scale": 1, "x_zero_point": 256}, ValueError, "x_zero_point must be a value of uint8, but got 256"),
        ({"x_scale": 1, "x_zero_point": -1}, ValueError, "x_zero_point must be a value of uint8, but got -1"),
        ({"x_scale": 1, "out_dtype": np.float64}, TypeError, "out_dtype must be float32 or bfloat16"),
        ({"x_scale": 1, "out_dtype": "nonsense"}, TypeError, "out_dtype must be float32 or bfloat16"),
        ({"x_scale": 1, "out": np.zeros((4, 3))}, TypeError, "out has dtype '<f8'; expected '<f4', as out_dtype"),
        ({"x_scale": 1, "out": np.zeros((3, 4), "f4")}, ValueError, r"out has shape \(3, 4\); expected \(4, 3\)"),
        ({"x_scale": 1, "residual": np.zeros((4, 3))}, TypeError, "residual has dtype float64; expected float32, as"),
        ({"x_scale": 1, "residual": np.zeros((4, 3), "u1")}, TypeError, "residual has dtype uint8; expected float32"),
        ({"x_scale": 1, "residual": np.zeros((4, 2), "f4")}, ValueError, r"residual has shape \(4, 2\); expected"),
        ({"x_scale": 1, "channel_axis": 2}, ValueError, "channel_axis 2 is out of range"),
        ({"x_scale": 1, "momentum": 5}, ValueError, r"momentum must be in \[0, 1\]"),
        ({"x_scale": 1, "training": True}, TypeError, "x_scale is for evaluation with 8-bit input .*training with"),
    ],
)
def test_what_is_refused_of_8_bits(arguments, error, words):
    with pytest.raises(error, match=words):
        batch_norm(np.zeros((4, 3), np.uint8), np.zeros(3), np.ones(3), **arguments)


def test_other_types_have_no_scale():
    for name, value in (("x_scale", 1.0), ("x_zero_point", 0), ("out_dtype", np.float32)):
        with pytest.raises(TypeError, match=f"{name} is for evaluation with 8-bit input .*of dtype float32"):
            batch_norm(np.zeros((4, 3), np.float32), np.zeros(3), np.ones(3), **{name: value})
    with pytest.raises(TypeError, match="input has dtype int16"):
        batch_norm(np.zeros((4, 3), np.int16), np.zeros(3), np.ones(3))
    with pytest.raises(TypeError, match="input is a masked array"):
        batch_norm(np.ma.zeros((4, 3), np.uint8), np.zeros(3), np.ones(3), x_scale=1)
    with pytest.raises(ValueError, match="running_mean should contain 3 elements not 4"):
        batch_norm(np.zeros((4, 3), np.uint8), np.zeros(4), np.ones(4), x_scale=1)


# ---- through a layer and a plan --------------------------------------------------------------------------------------


def evaluating(rng, n_channels, axis=1, **kwargs):
    bn = cbn.BatchNorm(n_channels, channel_axis=axis, **kwargs).eval()
    bn.running_mean[...], bn.running_var[...], bn.weight[...], bn.bias[...] = parameters(rng, n_channels)
    return bn


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("out_dtype", OUTPUTS)
@pytest.mark.parametrize("activation", [None, "relu", ("leaky_relu", 0.1)])
def test_layers_and_plans_give_the_bits_of_the_function(rng, layout, dtype, out_dtype, activation):
    shape, axis, order = LAYOUTS[layout]
    x = drawn(rng, dtype, shape, order)
    bn = evaluating(rng, shape[axis], axis, activation=activation)
    arrays = bn.running_mean, bn.running_var, bn.weight, bn.bias
    of_bytes = {"x_scale": 0.05, "x_zero_point": 7, "out_dtype": out_dtype}
    z = in_memory_order(rng.standard_normal(shape), order).astype(out_dtype)
    plan = bn.plan(shape, dtype, **of_bytes)
    for residual in (None, z, np.asfortranarray(z)):
        y = batch_norm(x, *arrays, channel_axis=axis, activation=activation, residual=residual, **of_bytes)
        assert y.dtype == out_dtype
        out = np.empty_like(y)
        for call in range(3):
            case = (residual is None, call)
            assert bn(x, residual=residual, **of_bytes).tobytes() == y.tobytes(), case
            assert plan(x, residual=residual).tobytes() == y.tobytes(), case
            assert plan(x, residual=residual).strides == y.strides, case
            assert bn(x, residual=residual, out=out, **of_bytes) is out
            assert out.tobytes() == y.tobytes(), case
            out[...] = 0
            assert plan(x, residual=residual, out=out) is out
            assert out.tobytes() == y.tobytes(), case
    expected = exact(x, arrays, 0.05, 7, axis % x.ndim) + np.asarray(z, np.float64)
    slope = {None: 1, "relu": 0}.get(activation, 0.1)
    agree(y, reference.activate(expected, None, slope), LIMIT[y.dtype])
    assert plan._plans <= 2
    assert bn._plans == 0
    for other in (copy.copy(plan), pickle.loads(pickle.dumps(plan))):
        assert other(x, residual=z).tobytes() == y.tobytes()


def test_a_plan_of_8_bits_is_used(rng):
    x = drawn(rng, np.uint8, (4, 5, 6))
    plan = evaluating(rng, 5).plan(x.shape, np.uint8, x_scale=1 / 255)
    y = plan(x)
    with mock.patch.object(plan_module, "as_input", side_effect=AssertionError("the plan was not used")):
        assert plan(x).tobytes() == y.tobytes()
        assert plan(x, out=np.empty_like(y), residual=np.zeros_like(y)).tobytes() == y.tobytes()
    # Over its own input
    memory = np.empty(y.nbytes, np.uint8)
    inside = memory[: x.size].reshape(x.shape)
    inside[...] = x
    assert plan(inside, out=memory.view(np.float32).reshape(x.shape)).tobytes() == y.tobytes()


@pytest.mark.parametrize("dtype", BYTES)
def test_a_plan_whose_coefficients_float32_cannot_hold(rng, dtype):
    x = drawn(rng, dtype, (20, 4))
    bn = evaluating(rng, 4, dtype=np.float64)
    bn.running_mean[...], bn.running_var[...] = 1e20, 1
    plan = bn.plan(x.shape, dtype, x_scale=1e-300)
    expected = batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, x_scale=1e-300)
    for _ in range(2):
        assert plan(x).tobytes() == bn(x, x_scale=1e-300).tobytes() == expected.tobytes()


def test_what_layers_and_plans_refuse(rng):
    bn = evaluating(rng, 3)
    x, wide = np.zeros((4, 3), np.uint8), np.zeros((4, 3), np.float32)
    with pytest.raises(
        TypeError, match=r"input has dtype uint8; expected .*evaluation takes it as it is, with x_scale="
    ):
        bn(x)
    with pytest.raises(
        TypeError, match=r"x_scale is for evaluation with 8-bit input .*evaluation with input of dtype f"
    ):
        bn(wide, x_scale=1)
    with pytest.raises(TypeError, match="out_dtype is for evaluation with 8-bit input"):
        bn(wide, out_dtype=np.float32)
    with pytest.raises(TypeError, match="input has dtype uint8, whose values need a scale"):
        bn(x, x_zero_point=1)
    with pytest.raises(ValueError, match="running_mean should contain 2 elements not 3"):
        bn(x[:, :2], x_scale=1)
    with pytest.raises(ValueError, match=r"expected 4D input \(got 2D input\)"):
        cbn.BatchNorm2d(3).eval()(x, x_scale=1)
    with pytest.raises(ValueError, match="running_mean must be defined in evaluation mode"):
        cbn.BatchNorm1d(3, track_running_stats=False).eval()(x, x_scale=1)
    for layer in (bn.train(), bn.freeze()):
        before = layer.state_dict()
        with pytest.raises(TypeError, match=r"x_scale is for evaluation .*training with input of dtype uint8"):
            layer(x, x_scale=1)
        assert all(np.array_equal(before[name], a) for name, a in layer.state_dict().items())
    bn.unfreeze().eval()
    with pytest.raises(TypeError, match="dtype must be uint8 or int8, with x_scale, not float32"):
        bn.plan((4, 3), x_scale=1)
    with pytest.raises(TypeError, match="bfloat16; or uint8 or int8, with x_scale, not uint8"):
        bn.plan((4, 3), np.uint8)
    with pytest.raises(ValueError, match=r"x_scale must be finite and positive, but got 0.0"):
        bn.plan((4, 3), np.uint8, x_scale=0)
    plan = bn.plan((4, 3), np.uint8, x_scale=1)
    with pytest.raises(TypeError, match="input has dtype float32; this plan is for uint8"):
        plan(wide)
    with pytest.raises(ValueError, match=r"input has shape \(2, 3\); this plan is for \(4, 3\)"):
        plan(x[:2])
    with pytest.raises(TypeError, match=r"out has dtype '.u1'; expected '<f4', as out_dtype"):
        plan(x, out=x.copy())
