"""Activation and residual: y = act(norm(x) + residual) in one pass, and its gradients."""

import copy

import numpy as np
import pytest

import cbn
from cbn import reference
from cbn.functional import batch_norm
from cbn.kernels import engine

from .paths import (
    GRADIENT_LIMIT,
    INPUT_DTYPES,
    KNOBS,
    LARGE_RANGE,
    LAYOUTS,
    LIMIT,
    PARAMETERS,
    PATH_SHAPES,
    agree,
    error,
    in_memory_order,
)

# What the argument is, and (slope, low, high) of the specification
ACTIVATIONS = {
    "none": (None, (1.0,)),
    "relu": ("relu", (0.0,)),
    "leaky": (("leaky_relu", 0.125), (0.125,)),
    "clip": (("clip", -0.75, 0.5), (1.0, -0.75, 0.5)),
}


def layer(rng, dtype, n_channels, **kwargs):
    bn = cbn.BatchNorm(n_channels, dtype=PARAMETERS[dtype], **kwargs)
    bn.weight[...], bn.bias[...], bn.running_mean[...] = rng.standard_normal((3, n_channels))
    bn.running_var[...] = rng.uniform(0.5, 2, n_channels)
    return bn


def expected(bn, x, dy, residual, act, axis):
    """(y, dx, dresidual, dweight, dbias) by the specification, in the layer's mode."""
    mean, var = bn.running_mean, bn.running_var
    if bn.training and not bn.frozen:
        n, mean, m2 = reference.moments(x, axis)
        var = m2 / n
    a = reference.normalize(x, mean, var, bn.weight, bn.bias, bn.eps, axis)
    h = reference.activate_backward(dy, a, residual, *act)
    gradients = reference.backward(h, x, mean, var, bn.weight, bn.eps, not bn.frozen, axis)
    return reference.activate(a, residual, *act), gradients[0], h, *gradients[1:]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", INPUT_DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
def test_activation_and_residual_forward_and_backward(isa, parallel, rng, dtype, layout, activation, with_residual):
    shape, axis, order = LAYOUTS[layout]
    activation, act = ACTIVATIONS[activation]
    x, dy, z = (in_memory_order(rng.standard_normal(shape).astype(dtype), order) for _ in range(3))
    residual = z if with_residual else None
    for mode in ("train", "frozen", "eval"):
        results = []
        for n_threads in (1, 3):
            bn = layer(np.random.default_rng(1), dtype, shape[axis], activation=activation, channel_axis=axis)
            if mode == "frozen":
                bn.freeze()
            bn.train(mode != "eval")
            exact = expected(bn, x, dy, residual, act, axis % x.ndim)
            with cbn.num_threads(n_threads):
                y = bn(x, residual=residual)
                found = (y,)
                if mode != "eval":
                    dx = bn.backward(dy)
                    dx, dresidual = dx if with_residual else (dx, None)
                    found = (y, dx, dresidual, bn.weight_grad, bn.bias_grad)
            results.append([None if a is None else a.tobytes("A") for a in found])
        assert results[0] == results[1], "the bits depend on the number of threads"
        assert y.strides == x.strides
        agree(y, exact[0], LIMIT[x.dtype])
        for got, want in zip(found[1:], exact[1:], strict=False):
            if got is not None:
                agree(got, want, GRADIENT_LIMIT[x.dtype])
                assert got.dtype == (x.dtype if got.ndim > 1 else bn.dtype)


@pytest.mark.parametrize("shape", PATH_SHAPES.values(), ids=PATH_SHAPES)
@pytest.mark.parametrize("dtype", LARGE_RANGE)
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", [("leaky_relu", 0.5), ("clip", -1.0, 0.5)], ids=["leaky", "clip"])
def test_every_path_gives_the_same_bits_with_an_activation(isa, parallel, rng, dtype, shape, with_residual, activation):
    x, dy, z = rng.standard_normal((3, *shape)).astype(dtype)
    x[:, 3::4] *= 1e36  # channels that take float64 arithmetic
    z[:, 3::4] *= 1e36

    def results(offset, **kwargs):
        bn = layer(np.random.default_rng(1), dtype, shape[1], activation=activation)
        memory = np.empty(2 * x.size + 128, dtype)
        y, dx = (memory[i : i + x.size].reshape(shape) for i in (offset, x.size + 64 + offset))
        residual = z if with_residual else None
        bn(x, out=y, residual=residual)
        found = bn.backward(dy, out=dx)
        dresidual = found[1] if with_residual else dx
        return [a.tobytes() for a in (y, dx, dresidual, bn.weight_grad, bn.bias_grad)]

    engine.tune(bytes_per_thread=1 << 40, **KNOBS["two passes"])
    first = results(0)
    for name, knobs in KNOBS.items():
        engine.tune(bytes_per_thread=1, **{"nontemporal_bytes": 1 << 40, "prefetch": True} | knobs)
        for n_threads, offset in ((1, 0), (2, 3)):
            with cbn.num_threads(n_threads):
                assert results(offset) == first, (name, n_threads)


def few_rows(rng, kind, n, n_channels, dtype):
    """Rows whose channels need a second reduction, or float64 arithmetic, or are constant, or are not finite."""
    x = (rng.standard_normal((n, n_channels + 3)) * 2 + 3).astype(dtype)[:, 3:]
    tiny, huge = np.finfo(dtype).tiny, np.finfo(dtype).max
    if kind == "far":
        x += (1000 * rng.standard_normal(n_channels)).astype(dtype)
        x[0] += dtype(1e6)
    elif kind == "constant":
        x[:], x[:, ::3] = dtype(1.1), 0
    elif kind == "special":
        x[rng.integers(n), :9], x[rng.integers(n), 5:20] = np.inf, np.nan
    elif kind == "range":
        x[:, 3], x[:, n_channels // 2], x[:, 9] = x[:, 3] * tiny, 100 * tiny, x[:, 9] * (huge / 100)
    return x


@pytest.mark.parametrize("n", [2, 3, 8, 17, 31, 32])
@pytest.mark.parametrize("n_channels", [513, 777, 1024, 2100])
@pytest.mark.parametrize("kind", ["usual", "far", "constant", "special", "range"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_few_rows_have_the_bits_of_the_other_loops(isa, rng, n, n_channels, kind, dtype):
    """In place, the loop for few rows does not run."""
    knobs = engine.tune(nontemporal_bytes=n % 2 << 40, bytes_per_thread=1 << 14)
    activation, act = list(ACTIVATIONS.values())[(n + n_channels) % 4]
    bn = layer(rng, dtype, n_channels, activation=activation)
    bn.weight[:4] = 1e-42, 1e37, 0, -1
    x, z = few_rows(rng, kind, n, n_channels, dtype), rng.standard_normal((n, n_channels)).astype(dtype)
    z = z if n_channels % 2 else None
    dy = rng.standard_normal((n, n_channels)).astype(dtype)
    room = np.empty(n * n_channels + 16, dtype)
    found = []
    with np.errstate(all="ignore"), cbn.num_threads(1 + n % 3):
        try:
            for y in (None, room[5 : 5 + dy.size].reshape(dy.shape), x.copy()):
                one, in_place = copy.deepcopy(bn), y is not None and y.base is not room
                read = y if in_place else x
                y = one(read, residual=z, out=y)
                # Backward reads x: what has been overwritten comes from a new forward
                if in_place:
                    one(x, residual=z, update_stats=False)
                dx = one.backward(dy, out=dy.copy() if in_place else None)
                found.append([y, *(dx if z is not None else (dx,)), *one.state_dict().values()])
                found[-1] += [one.weight_grad, one.bias_grad]
        finally:
            engine.tune(**knobs)
    for other in found[:2]:
        for a, b in zip(other, found[2], strict=True):
            np.testing.assert_array_equal(a, b)
    if kind == "usual" and dtype == np.float64:
        y, *_ = expected(bn, x, dy, z, act, 1)
        np.testing.assert_allclose(found[0][0][:, 2:], y[:, 2:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(8, 3, 128, 128), (4, 1, 256, 256), (8, 2, 128, 128), (32, 31, 32, 32)])
@pytest.mark.parametrize("activation", ["relu", "leaky", "clip"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_few_channels_of_much(rng, shape, activation, dtype):
    """As many threads as channels or more: too few tiles for the pipeline, with the caches that the system has."""
    activation, act = ACTIVATIONS[activation]
    x, dy = rng.standard_normal((2, *shape)).astype(dtype)
    for n_threads in (1, 2, 16):
        bn = layer(np.random.default_rng(1), dtype, shape[1], activation=activation)
        with cbn.num_threads(n_threads):
            y, dx = bn(x), bn.backward(dy)
    exact = expected(bn, x, dy, None, act, 1)
    agree(y, exact[0], LIMIT[x.dtype])
    agree(dx, exact[1], GRADIENT_LIMIT[x.dtype])


@pytest.mark.parametrize(
    ("slope", "weight", "bias", "dy"), [(1e4, 1e-4, -10, 10), (0.01, 100, -1000, 2e-6), (1000, 0.5, -3, 100)]
)
@pytest.mark.parametrize("frozen", [False, True])
def test_what_a_slope_makes_of_float16_gradients(rng, slope, weight, bias, dy, frozen):
    """Between mask and map dy*slope is neither infinite nor zero, whatever float16 would make of it."""
    x = rng.standard_normal((64, 1)).astype(np.float16)
    g = (dy * rng.uniform(0.5, 1, x.shape)).astype(np.float16)
    bn = cbn.BatchNorm(1, activation=("leaky_relu", slope))
    bn.weight[...], bn.bias[...] = weight, bias
    if frozen:
        bn.freeze()
    exact = expected(bn, x, g, None, (slope,), 1)
    bn(x)
    np.testing.assert_allclose(bn.backward(g), exact[1], rtol=2e-3, atol=2e-3 * np.abs(exact[1]).max() + 6e-8)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float64_parameters(isa, parallel, rng, layout):
    """float64 arithmetic on float32 input: all channels, or those alone whose coefficients float32 cannot hold."""
    shape, axis, order = LAYOUTS[layout]
    x, dy, z = (in_memory_order(rng.standard_normal(shape).astype(np.float32), order) for _ in range(3))
    wide = layer(rng, np.float64, shape[axis], activation="relu", channel_axis=axis)
    some = layer(rng, np.float32, shape[axis], activation="relu", channel_axis=axis)
    some.weight[::3] = 1e-39
    some.bias[::3] = 1e-40
    for bn in (wide, some):
        exact = expected(bn, x, dy, z if bn is wide else None, (0.0,), axis % x.ndim)
        y = bn(x, residual=z if bn is wide else None)
        found = bn.backward(dy)
        dx = found[0] if bn is wide else found
        for got, want in ((y, exact[0]), (dx, exact[1]), (bn.weight_grad, exact[3]), (bn.bias_grad, exact[4])):
            agree(got, want, 1e-5)
        if bn is some:
            channels = np.moveaxis(y, axis, 0)[::3], np.moveaxis(exact[0], axis % x.ndim, 0)[::3]
            assert error(*channels) <= 1e-5


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(4, 3, 17), (40, 19)])
def test_special_values(isa, dtype, shape):
    """NaN passes, infinities and the sign of zero are those of a comparison, whatever the slope."""
    x = np.ones(shape, dtype)
    x[0, 0], x[1, 0], x[2, 0] = np.nan, np.inf, -np.inf
    zeros, ones = np.zeros(shape[1]), np.ones(shape[1])
    relu = batch_norm(x, zeros, ones, eps=0, activation="relu")
    leaky = batch_norm(x, zeros, ones, eps=0, activation=("leaky_relu", 0.5))
    for y in (relu, leaky):
        assert np.isnan(y[0, 0]).all()
        assert (y[1, 0] == np.inf).all()
        assert (y[3] == 1).all()
    assert (relu[2, 0] == 0).all()
    assert (leaky[2, 0] == -np.inf).all()
    assert (batch_norm(-x, zeros, ones, eps=0, activation=("leaky_relu", -2.0))[3] == 2).all()


def test_relu_is_a_leaky_relu_without_slope(rng):
    x = rng.standard_normal((20, 5)).astype(np.float32)
    arguments = (x, np.zeros(5), np.ones(5))
    relu = batch_norm(*arguments, activation="relu")
    assert (batch_norm(*arguments, activation=("leaky_relu", 0)) == relu).all()
    plain = batch_norm(*arguments)
    assert (batch_norm(*arguments, activation=("leaky_relu", 1)) == plain).all()
    assert (np.maximum(plain, 0) == relu).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_differences(rng, activation, frozen):
    """Central differences of a sum of y, in every input: x, residual, weight, bias."""
    activation, _ = ACTIVATIONS[activation]
    x, z, dy = rng.standard_normal((3, 6, 4, 3))
    bn = layer(rng, np.float64, 4, activation=activation)
    if frozen:
        bn.freeze()

    def loss():
        return (bn(x, residual=z) * dy).sum()

    loss()
    dx, dz = bn.backward(dy)
    for a, gradient in ((x, dx), (z, dz), (bn.weight, bn.weight_grad), (bn.bias, bn.bias_grad)):
        for i in range(a.size):
            kept, step = a.flat[i], 1e-6
            a.flat[i] = kept + step
            above = loss()
            a.flat[i] = kept - step
            difference = (above - loss()) / (2 * step)
            a.flat[i] = kept
            assert difference == pytest.approx(gradient.flat[i], rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", INPUT_DTYPES)
def test_memory_that_is_shared(isa, rng, dtype, last):
    """out may be x or the residual, the residual may be x; what overlaps in part is computed beside it."""
    shape = (9, 33, 20)
    axis = -1 if last else 1
    x, z, dy = rng.standard_normal((3, *shape)).astype(dtype)
    bn = layer(rng, dtype, shape[axis], activation="relu", channel_axis=axis)
    y, of_itself = bn(x, residual=z), bn(x, residual=x)
    for out in ("x", "residual"):
        copies = {"x": x.copy(), "residual": z.copy()}
        assert (bn(copies["x"], residual=copies["residual"], out=copies[out]) == y).all()
        with pytest.raises(RuntimeError, match="the input or the residual of the last forward has been overwritten"):
            bn.backward(dy)
    copy = x.copy()
    assert (bn(copy, residual=copy, out=copy) == of_itself).all()
    memory = np.empty(x.size + 5, dtype)
    z_there, out = memory[5:].reshape(shape), memory[:-5].reshape(shape)
    z_there[...] = z
    assert (bn(x, residual=z_there, out=out) == y).all()
    # backward
    bn(x, residual=z)
    dx, dz = bn.backward(dy)
    alone = cbn.BatchNorm(shape[axis], activation="relu", channel_axis=axis, dtype=bn.dtype)
    alone(x)
    dx_alone = alone.backward(dy)
    for make_out in (np.copy, lambda a: a):
        dy_there = dy.copy()
        alone(x)
        assert (alone.backward(dy_there, out=make_out(dy_there)) == dx_alone).all()
    x_there, z_there = x.copy(), z.copy()
    alone(x_there)
    assert (alone.backward(dy, out=x_there) == dx_alone).all()
    x_there[...] = x
    bn(x_there, residual=z_there)
    found = bn.backward(dy, out=z_there)
    assert found[0] is z_there
    assert (found[0] == dx).all()
    assert (found[1] == dz).all()
    with pytest.raises(RuntimeError, match="overwritten"):
        bn.backward(dy)


def test_strided_arrays(rng):
    """A residual or an output that lies otherwise than x."""
    x, z, dy = rng.standard_normal((3, 4, 6, 10)).astype(np.float32)
    bn = layer(rng, np.float32, 6, activation="relu")
    y = bn(x, residual=z)
    dx, dz = bn.backward(dy)
    for change in (np.asfortranarray, lambda a: np.repeat(a, 2, -1)[..., ::2], lambda a: np.repeat(a, 2, 0)[::2]):
        assert (bn(change(x), residual=z) == y).all()
        assert (bn(x, residual=change(z), out=change(np.empty_like(x))) == y).all()
        found = bn.backward(change(dy), out=change(np.empty_like(x)))
        assert (found[0] == dx).all()
        assert (found[1] == dz).all()


def test_a_gradient_of_another_dtype(rng):
    x, z, dy = rng.standard_normal((3, 8, 3)).astype(np.float32)
    bn = layer(rng, np.float32, 3, activation="relu")
    bn(x, residual=z)
    dx, dz = bn.backward(dy)
    wide = bn.backward(dy.astype(np.float64))
    for a, b in zip((dx, dz), wide, strict=True):
        assert b.dtype == np.float32
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_an_empty_batch():
    bn = cbn.BatchNorm(3, activation="relu")
    x = np.zeros((0, 3), np.float32)
    assert bn(x, residual=x).shape == (0, 3)
    assert [a.shape for a in bn.backward(x)] == [(0, 3), (0, 3)]


def test_backward_may_be_called_again(rng):
    x, z, dy = rng.standard_normal((3, 8, 3)).astype(np.float32)
    bn = layer(rng, np.float32, 3, activation="relu")
    bn(x, residual=z)
    first, second = bn.backward(dy), bn.backward(dy)
    assert all((a == b).all() for a, b in zip(first, second, strict=True))
    dz = first[1]
    dz[...] = 7
    assert (dy != 7).all()


def test_without_activation_the_gradient_of_the_residual_is_a_copy(rng):
    x, z, dy = rng.standard_normal((3, 8, 3)).astype(np.float32)
    bn = layer(rng, np.float32, 3)
    bn(x, residual=z, out=z)  # not needed again
    dx, dz = bn.backward(dy)
    assert (dz == dy).all()
    assert not np.shares_memory(dz, dy)
    bn(x)
    assert (bn.backward(dy) == dx).all()


@pytest.mark.parametrize("dtype", INPUT_DTYPES)
def test_plans(rng, dtype):
    x, z = rng.standard_normal((2, 9, 33)).astype(dtype)
    for activation, _ in ACTIVATIONS.values():
        bn = layer(rng, dtype, 33, activation=activation).eval()
        plan = bn.plan((9, 33), dtype)
        for residual in (None, z):
            y = bn.forward(x, residual=residual)
            bn(x)  # the call's own plan
            for call in (bn, plan):
                assert (call(x, residual=residual) == y).all()
                copy = x.copy()
                assert call(copy, residual=residual, out=copy) is copy
                assert (copy == y).all()
        there = z.copy()
        assert (plan(x, residual=there, out=there) == y).all()
        assert (plan(x, residual=np.asfortranarray(z)) == y).all()
        with pytest.raises(ValueError, match=r"residual has shape \(9, 32\); expected \(9, 33\), as the input"):
            plan(x, residual=z[:, :-1])
        with pytest.raises(TypeError, match="residual has dtype int64"):
            plan(x, residual=np.zeros(x.shape, np.int64))


@pytest.mark.parametrize(
    ("activation", "error", "words"),
    [
        ("gelu", ValueError, r"must be None, 'relu', \('leaky_relu', slope\) or \('clip', low, high\), not 'gelu'"),
        (("relu", 1), ValueError, r"not \('relu', 1\)"),
        (("leaky_relu",), ValueError, r"not \('leaky_relu',\)"),
        (("leaky_relu", np.nan), ValueError, "the slope of leaky_relu must be finite, in float32 too, but got nan"),
        (("leaky_relu", 1e39), ValueError, r"the slope of leaky_relu must be finite, in float32 too, but got 1e\+39"),
        ((np.arange(2), 3), ValueError, "activation must be None, 'relu', "),
        (("clip", 1), ValueError, r"not \('clip', 1\)"),
        (("clip", 1, -1), ValueError, "the bounds of clip must be in order, low <= high, but got 1.0 and -1.0"),
        (("clip", np.nan, 1), ValueError, "the bounds of clip must be in order"),
        (("clip", None, 1), TypeError, "the lower bound of clip must be a number, not None"),
        (("leaky_relu", "0.1"), TypeError, "the slope of leaky_relu must be a number, not '0.1'"),
        (("leaky_relu", True), TypeError, "the slope of leaky_relu must be a number, not True"),
        (np.tanh, TypeError, "activation must be None, 'relu', "),
        (1, TypeError, "not 1"),
    ],
)
def test_other_activations_are_refused(activation, error, words):
    x = np.ones((2, 3), np.float32)
    for call in (
        lambda: cbn.BatchNorm(3, activation=activation),
        lambda: setattr(cbn.BatchNorm(3), "activation", activation),
        lambda: batch_norm(x, np.zeros(3), np.ones(3), activation=activation),
    ):
        with pytest.raises(error, match=words):
            call()


@pytest.mark.parametrize(
    ("residual", "error", "words"),
    [
        (np.zeros((2, 4), np.float32), ValueError, r"residual has shape \(2, 4\); expected \(2, 3\), as the input"),
        (np.zeros((1, 3), np.float32), ValueError, r"residual has shape \(1, 3\)"),
        (np.zeros((2, 3)), TypeError, "residual has dtype float64; expected float32, as the input"),
        (np.zeros((2, 3), int), TypeError, "residual has dtype int64"),
        (np.ma.zeros((2, 3), np.float32), TypeError, "residual is a masked array"),
    ],
)
def test_other_residuals_are_refused(residual, error, words):
    x = np.ones((2, 3), np.float32)
    bn, out = cbn.BatchNorm(3), np.full((2, 3), 7, np.float32)
    state = bn.state_dict()
    for call in (
        lambda: bn(x, residual=residual, out=out),
        lambda: bn.train(False)(x, residual=residual, out=out),
        lambda: batch_norm(x, np.zeros(3), np.ones(3), residual=residual, out=out),
    ):
        with pytest.raises(error, match=words):
            call()
    assert (out == 7).all()
    assert all((a == state[name]).all() for name, a in bn.state_dict().items())


def test_the_activation_is_an_attribute(tmp_path, rng):
    bn = cbn.BatchNorm1d(3, activation=["leaky_relu", 1])
    assert bn.activation == ("leaky_relu", 1.0)
    bn.activation = "relu"
    x = rng.standard_normal((4, 3)).astype(np.float32)
    y = bn.eval()(x)
    assert (y >= 0).all()
    bn.activation = ("leaky_relu", 0.5)  # drops the plan of the call before
    assert (bn(x) < 0).any()
    pytest.importorskip("safetensors", reason="safetensors is not installed: pip install -e '.[test]'")
    for name in ("layer.npz", "layer.safetensors"):
        bn.save(tmp_path / name)
        again = cbn.load(tmp_path / name)
        assert again.activation == ("leaky_relu", 0.5)
        assert (again(x) == bn(x)).all()


def test_folding_refuses_an_activation():
    bn = cbn.BatchNorm(3, activation="relu").eval()
    for call in (
        lambda: cbn.fuse_linear_bn(np.ones((3, 2)), None, bn),
        lambda: cbn.fuse_conv_bn(np.ones((3, 2, 1, 1)), None, bn),
        lambda: cbn.fuse_bn_linear(bn, np.ones((2, 3)), None),
    ):
        with pytest.raises(ValueError, match="the layer has an activation, 'relu', which no weight can hold"):
            call()


def decision_case(rng, dtype, layout, slope, parameters):
    """A layer and its input, channels of which have tiny values, values around 0, and float64 arithmetic."""
    shape, axis, order = LAYOUTS[layout]
    x = in_memory_order((3 + 2 * rng.standard_normal(shape)).astype(dtype), order)
    bn = layer(rng, parameters, shape[axis], activation=("leaky_relu", slope), channel_axis=axis)
    smallest = {2: 2**-24 if dtype is np.float16 else 2**-133, 4: 2**-149, 8: 5e-324}[np.dtype(dtype).itemsize]
    bn.weight[::4] = max(smallest, float(np.finfo(bn.dtype).smallest_subnormal)) * 3
    bn.weight[1::4] *= 1e-3
    bn.bias[::4] = 0
    bn.bias[1::4] = 0
    return bn, x


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", INPUT_DTYPES)
@pytest.mark.parametrize(("slope", "wide"), [(0, False), (0.25, False), (0, True), (-2, True)])
def test_the_gradient_passes_where_y_is_positive(isa, parallel, rng, dtype, layout, slope, wide):
    """And nowhere else, as far as the forward pass itself can tell: by its own plain result."""
    parameters = np.float64 if wide else PARAMETERS[dtype]
    bn, x = decision_case(rng, dtype, layout, slope, parameters)
    plain = cbn.BatchNorm(bn.num_features, channel_axis=bn.channel_axis, dtype=parameters)
    plain.weight[...], plain.bias[...] = bn.weight, bn.bias
    norm, ones = plain(x), np.ones_like(x)
    for frozen in (False, True):
        if frozen:
            bn.freeze()
            bn.running_mean[...], bn.running_var[...] = plain.running_mean, plain.running_var
        for residual in (-norm, rng.standard_normal(x.shape).astype(dtype)):
            plain.train(not frozen)
            positive = plain(x, residual=residual) > 0
            y = bn(x, residual=residual)
            if slope >= 0:
                assert ((y > 0) == positive).all()
            for dy in (ones, ones.astype(np.float64)):
                h = bn.backward(dy)[1]
                wrong = np.argwhere(h != np.where(positive, 1, slope).astype(dtype))
                assert not len(wrong), (frozen, dy.dtype, len(wrong), wrong[:3])


@pytest.mark.parametrize("dtype", INPUT_DTYPES)
@pytest.mark.parametrize("shape", [(4, 3, 70), (70, 3)])
def test_a_residual_that_cancels_everything_stops_all_gradients(isa, rng, dtype, shape):
    """As in PyTorch, whose gradient of ReLU is 0 where y is."""
    x = rng.standard_normal(shape).astype(dtype)
    bn, plain = cbn.BatchNorm(3, activation="relu"), cbn.BatchNorm(3)
    norm = plain(x)
    a = plain(x, residual=-norm)
    y = bn(x, residual=-norm)
    dx, dz = bn.backward(np.ones_like(x))
    assert ((dz == 1) == (a > 0)).all()
    assert ((y > 0) == (a > 0)).all()
    if dtype in (np.float32, np.float64):
        assert not y.any()
        assert not dx.any()
        assert not bn.weight_grad.any()


@pytest.mark.parametrize("slope", [0, 0.25])
def test_the_sums_are_those_of_the_masked_gradient(isa, rng, slope):
    """Without a residual too, where nobody sees the mask: by S(h) and S(h*(x - mean))."""
    for dtype in INPUT_DTYPES:
        for layout in ("NCHW", "NHWC", "NC"):
            bn, x = decision_case(rng, dtype, layout, slope, PARAMETERS[dtype])
            plain = cbn.BatchNorm(bn.num_features, channel_axis=bn.channel_axis, dtype=bn.dtype)
            plain.weight[...], plain.bias[...] = bn.weight, bn.bias
            dy = (1 + rng.integers(0, 8, x.shape)).astype(dtype)  # so that sums are exact
            h = np.where(plain(x) > 0, dy.astype(np.float64), slope * dy.astype(np.float64))
            bn(x)
            bn.backward(dy)
            axis = bn.channel_axis % x.ndim
            exact = reference.per_channel(h, axis).sum(axis=1)
            assert (bn.bias_grad == exact.astype(bn.bias_grad.dtype)).all(), (dtype, layout)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bounds", [(0.0, 6.0), (-1.0, 1.0), (-np.inf, 0.5), (0.25, np.inf), (0.5, 0.5)])
def test_clip_is_hardtanh(isa, rng, dtype, bounds):
    """NaN stays, infinities become bounds, and the gradient is 0 at the bounds and beyond."""
    x = (rng.standard_normal((3, 5, 40)) * 4).astype(dtype)
    x[0, 0, :4] = np.nan, np.inf, -np.inf, bounds[0]
    zeros, ones = np.zeros(5), np.ones(5)
    y = batch_norm(x, zeros, ones, eps=0, activation=("clip", *bounds))
    assert np.array_equal(y, np.clip(x, *np.array(bounds, dtype)), equal_nan=True)
    bn = cbn.BatchNorm(5, eps=0, activation=("clip", *bounds)).freeze()
    dy = rng.standard_normal(x.shape).astype(dtype)
    bn(x)
    assert np.array_equal(bn.backward(dy), np.where((x <= bounds[0]) | (x >= bounds[1]), 0, dy).astype(dtype))
    assert bn.activation == ("clip", *bounds)
    assert repr(eval(repr(bn), {"BatchNorm": cbn.BatchNorm})) == repr(bn)


def test_clip_where_a_residual_brings_back_what_overflowed(isa):
    """Before the clip, in the larger range: not the bound of the side where it was on its way."""
    for dtype, large in ((np.float32, 3e38), (np.float64, 1.7e308)):
        for shape in ((2, 3, 40), (40, 3)):
            x, z = np.full(shape, large, dtype), np.full(shape, -large, dtype)
            y = batch_norm(
                x, np.zeros(3), np.full(3, 0.25), eps=0, residual=z, activation=("clip", -1.0, large / 2)
            )  # 2*large - large
            assert (y == dtype(large / 2)).all()
            y = batch_norm(x, np.zeros(3), np.full(3, 0.25), eps=0, residual=z, activation=("clip", -1.0, np.inf))
            np.testing.assert_allclose(y, large, rtol=1e-6)


def test_clip_of_torch():
    torch = pytest.importorskip("torch")
    for module, expected in ((torch.nn.ReLU6(), (0.0, 6.0)), (torch.nn.Hardtanh(-2, 3), (-2.0, 3.0))):
        bn = cbn.from_torch(torch.nn.Sequential(torch.nn.BatchNorm1d(3), module))
        assert bn.activation == ("clip", *expected)
        x = torch.randn(64, 3, dtype=torch.float64, requires_grad=True)
        model = torch.nn.Sequential(torch.nn.BatchNorm1d(3, dtype=torch.float64), module)
        with torch.enable_grad():  # the benchmarks' peer switches it off
            y = model(x * 5 + 2)
            y.backward(dy := torch.randn_like(y))
        bn = cbn.from_torch(model.train())
        agree(bn(x.detach().numpy() * 5 + 2), y.detach().numpy(), 1e-12)
        agree(bn.backward(dy.numpy()) * 5, x.grad.numpy(), 1e-11)


def test_clip_with_a_gradient_of_another_type(rng):
    """What the forward pass decided in its own arithmetic, for a gradient that goes through float64."""
    x, dy = rng.standard_normal((40, 3)).astype(np.float32), rng.standard_normal((40, 3))
    bn = layer(rng, np.float32, 3, activation=("clip", -0.75, 0.5))
    exact = expected(bn, x, dy, None, (1.0, -0.75, 0.5), 1)
    bn(x)
    agree(bn.backward(dy), exact[1], GRADIENT_LIMIT[x.dtype])
