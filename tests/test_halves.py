"""float16 and bfloat16: conversions of every value, rounding, statistics and gradients in float32 and float64."""

import ml_dtypes
import numpy as np
import pytest

import cbn
from cbn import reference
from cbn.functional import batch_norm, native_batch_norm, native_batch_norm_backward
from cbn.kernels import engine

from .paths import HALVES, LAYOUTS, ROUNDING, STATISTICS_LIMIT, agree, in_memory_order

pytestmark = pytest.mark.parametrize("dtype", HALVES)


def every_value(dtype):
    return np.arange(1 << 16, dtype=np.uint16).view(dtype)


def bits(a):
    """Its bits, with one NaN for all."""
    found = a.view(np.uint16).copy()
    found[np.isnan(a.astype(np.float32))] = 0xFFFF
    return found


def normalized(x, scale=1.0, dtype=np.float32, **kwargs):
    """x*scale, by a batch norm with one channel for each layout: runs, rows, and all by float64."""
    arrays = [np.full(1, value, dtype) for value in (0, 1, scale, -0.0)]
    return batch_norm(x, *arrays, eps=0, **kwargs)


@pytest.mark.parametrize("parameters", [np.float32, np.float64])
def test_every_value_there_and_back(isa, dtype, parameters):
    """NaN, infinities, subnormals and signed zeros included, in runs and in rows, at any place in a vector."""
    x = every_value(dtype)
    with np.errstate(all="ignore"):
        for start in (0, 1, 7):
            runs = x[start:].reshape(1, 1, -1)
            assert np.array_equal(bits(normalized(runs, dtype=parameters)), bits(runs))
        rows = np.stack([x, x[::-1]])
        arrays = [np.full(1 << 16, value, parameters) for value in (0, 1, 1, -0.0)]
        assert np.array_equal(bits(batch_norm(rows, *arrays, eps=0)), bits(rows))


@pytest.mark.parametrize("parameters", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [1 + 2**-9, 1 + 2**-11, 1.5 * 2**-9, 0.5, 2.0**-12, 1 + 2**-8 + 2**-9, 700.0])
def test_results_are_rounded_to_the_nearest_and_ties_to_even(isa, dtype, scale, parameters):
    """Products that float32 holds exactly, so that what is seen is their rounding; overflow to infinity too."""
    x = every_value(dtype)
    with np.errstate(all="ignore"):
        exact = x.astype(np.float64) * scale
        held = (exact.astype(np.float32) == exact) | np.isnan(exact)
        assert held.sum() > 60000
        runs = normalized(x.reshape(1, 1, -1), scale, parameters).ravel()
        assert np.array_equal(bits(runs[held]), bits(exact.astype(dtype)[held]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_against_the_reference(isa, parallel, rng, dtype, layout):
    shape, axis, order = LAYOUTS[layout]
    x = in_memory_order((3 + 2 * rng.standard_normal(shape)).astype(dtype), order)
    dy = in_memory_order(rng.standard_normal(shape).astype(dtype), order)
    weight, bias, running_mean, running_var = rng.uniform(0.5, 2, (4, shape[axis])).astype(np.float32)
    n, mean, m2 = reference.moments(x, axis)
    running = running_mean.copy(), running_var.copy()
    y, save_mean, save_invstd = native_batch_norm(x, weight, bias, *running, True, 0.1, 1e-5, channel_axis=axis)
    assert (y.dtype, y.strides, save_mean.dtype) == (dtype, x.strides, np.float64)
    agree(y, reference.normalize(x, mean, m2 / n, weight, bias, channel_axis=axis), ROUNDING[y.dtype])
    np.testing.assert_allclose(save_mean, mean, rtol=STATISTICS_LIMIT[x.dtype])
    np.testing.assert_allclose(save_invstd, 1 / np.sqrt(m2 / n + 1e-5), rtol=STATISTICS_LIMIT[x.dtype])
    np.testing.assert_allclose(running[1], 0.9 * running_var + 0.1 * m2 / (n - 1), rtol=1e-6)
    dx, dweight, dbias = native_batch_norm_backward(
        dy, x, weight, None, None, save_mean, save_invstd, True, 1e-5, channel_axis=axis
    )
    exact = reference.backward(dy, x, mean, m2 / n, weight, channel_axis=axis)
    assert (dx.dtype, dweight.dtype, dbias.dtype) == (dtype, np.float32, np.float32)
    agree(dx, exact[0], ROUNDING[dx.dtype])
    np.testing.assert_allclose(dweight, exact[1], atol=1e-6 * np.abs(exact[1]).max())
    np.testing.assert_allclose(dbias, exact[2], atol=1e-6 * np.abs(exact[2]).max())
    evaluated = batch_norm(x, running_mean, running_var, weight, bias, channel_axis=axis)
    exact_y = reference.normalize(x, running_mean, running_var, weight, bias, channel_axis=axis)
    agree(evaluated, exact_y, ROUNDING[y.dtype])


def test_the_largest_values(isa, dtype):
    """Values near the largest, of opposite signs: their difference is beyond what the type holds, and float32."""
    largest = 60000.0 if dtype is np.float16 else 3e38
    x = np.array([[-largest], [largest], [largest / 3]], dtype)
    y = batch_norm(x, None, None, training=True)
    n, mean, m2 = reference.moments(x)
    agree(y, reference.normalize(x, mean, m2 / n), ROUNDING[y.dtype])


def test_layers(rng, dtype):
    bn = cbn.BatchNorm2d(5)
    x = rng.standard_normal((4, 5, 6, 7)).astype(dtype)
    y = bn(x)
    assert y.dtype == bn.backward(y).dtype == dtype
    assert bn.weight_grad.dtype == bn.running_mean.dtype == np.float32
    first, second = bn.eval()(x), bn(x)
    assert first.tobytes() == second.tobytes() == bn.plan(x.shape, dtype)(x).tobytes()
    assert bn(x, out=x) is x
    assert x.tobytes() == first.tobytes()


def test_other_byte_order_and_mixed_types(rng, dtype):
    bn = cbn.BatchNorm1d(3)
    x = rng.standard_normal((8, 3)).astype(dtype)
    y = bn(x)
    assert bn.backward(y.astype(np.float32)).dtype == dtype
    assert bn.backward(y.astype(ml_dtypes.bfloat16 if dtype is np.float16 else np.float16)).dtype == dtype
    if dtype is np.float16:
        assert np.array_equal(cbn.BatchNorm1d(3)(x.astype(">f2")), y)
    wide = cbn.BatchNorm1d(3, dtype=np.float64)
    agree(wide(x), y, ROUNDING[x.dtype])
    assert cbn.moments(x).mean.dtype == np.float64


def test_constants_give_exactly_the_bias(isa, dtype):
    for value in (3.3, 60000.0, 1e-7):
        x = np.full((6, 2, 50), value, dtype)
        assert np.array_equal(
            batch_norm(x, None, None, None, np.array([0.5, -1], np.float32), training=True)[:, 0], np.full((6, 50), 0.5)
        )


@pytest.mark.parametrize("spread", [1, 0.3, 0.1, 0.03, 0.01, 0.002])
def test_a_spread_small_beside_the_mean(isa, rng, dtype, spread):
    """Down to neighbouring values; a mean at the end of a binade, so that x*x has most digits; a few values far out."""
    x = rng.standard_normal((3000, 12)) * spread
    x += rng.choice([1, 1.4, 1.99, 2], 12)
    x[7:40:9] *= 1e-2
    x = x.astype(dtype)
    for a, axis in ((x, 1), (np.ascontiguousarray(x.T), 0)):
        found = cbn.moments(a, channel_axis=axis)
        _, mean, m2 = reference.moments(a, axis)
        np.testing.assert_allclose(found.mean, mean, rtol=1e-6, atol=0)
        np.testing.assert_allclose(found.m2, m2, rtol=2e-6, atol=0)


def test_one_value_of_millions_differs(isa, dtype):
    """By a unit in its last place: what float64 sums of x*x would not see."""
    n = 1_000_003
    x = np.ones((2, n), dtype)
    x[0, 5] += np.finfo(np.float32).eps * (2**13 if dtype == np.float16 else 2**16)
    unit = float(x[0, 5]) - 1
    assert 0 < unit <= 2**-7
    assert list(cbn.moments(x, channel_axis=0).m2) == pytest.approx([unit**2 * (1 - 1 / n), 0], rel=1e-9, abs=0)


@pytest.mark.parametrize("layout", ["NCL", "NLC"])
def test_what_follows_may_be_subnormal(isa, dtype, layout):
    """Where the normalized values cannot be; a conversion that takes subnormal numbers for zero would show."""
    smallest = np.finfo(np.float32).smallest_normal if dtype != np.float16 else 2**-14
    bias = np.full(40, 2.0**-60 if dtype != np.float16 else 2**-12, np.float32)
    shape, axis = ((1, 40, 203), 1) if layout == "NCL" else ((1, 203, 40), 2)
    arrays = np.zeros_like(bias), np.ones_like(bias), None, bias
    x = np.full(shape, -bias[0]).astype(dtype)
    z = np.resize(np.arange(-101, 102) * smallest / 128, shape).astype(dtype)
    assert np.count_nonzero(z) == 40 * 202
    assert batch_norm(x, *arrays, eps=0, channel_axis=axis, residual=z).tobytes() == z.tobytes()
    rectified = batch_norm(x, *arrays, eps=0, channel_axis=axis, residual=z, activation="relu")
    assert (rectified == np.maximum(z, 0)).all()
    slope = float(smallest / 8 / bias[0])
    y = batch_norm(2 * x, *arrays, eps=0, channel_axis=axis, activation=("leaky_relu", slope))
    assert (y < 0).all()
    assert (y == np.array(-smallest / 8, dtype)).all()


@pytest.mark.parametrize("shape", [(40, 9, 300), (3000, 9), (90, 200, 9, 5)])
@pytest.mark.parametrize("path", ["two passes", "pipeline", "pipeline, past the caches"])
def test_sums_that_leave_the_range_of_float32(isa, parallel, rng, dtype, shape, path):
    """Channels whose squares float32 holds not at all, beside others that keep the bits they have without them."""
    engine.tune(
        **({"l2_bytes": 0, "l3_bytes": 0} if path == "two passes" else {"l2_bytes": 1 << 12, "l3_bytes": 1 << 24})
    )
    engine.tune(nontemporal_bytes=0 if path == "pipeline, past the caches" else 1 << 40)
    plain = rng.standard_normal(shape).astype(dtype)
    x = plain.copy()
    # float16 stays within that range; the same has to hold for its own largest and smallest numbers
    halves = dtype == np.float16
    scales = {1: 1e3, 3: 1e-3, 4: 1e-6, 6: 1e4} if halves else {1: 1e30, 3: 1e-24, 4: 1e-30, 6: 4e37}
    for c, scale in scales.items():
        x[:, c] *= scale
    x[:, 5] = 0
    x[0, 7].flat[0] = 1e4  # far out: two reductions
    x[0, 1].flat[0] = 65504 if halves else 3e38
    n, mean, m2 = reference.moments(x)
    eps = 1e-80
    y, save_mean, save_invstd = native_batch_norm(x, None, None, None, None, True, 0.1, eps)
    with np.errstate(all="ignore"):
        assert (np.abs(save_mean - mean) <= 1e-6 * (np.sqrt(m2 / n) + np.abs(mean))).all()
        np.testing.assert_allclose(save_invstd, 1 / np.sqrt(m2 / n + eps), rtol=1e-6)
    for c in range(9):
        exact = reference.normalize(x[:, c : c + 1], mean[c : c + 1], m2[c : c + 1] / n, eps=eps)
        agree(y[:, c : c + 1], exact, ROUNDING[y.dtype])
    of_plain = native_batch_norm(plain, None, None, None, None, True, 0.1, eps)
    for a, b in zip((y, save_mean, save_invstd), of_plain, strict=True):
        for c in (0, 2, 8):
            assert (a[:, c] == b[:, c]).all() if a.ndim > 1 else a[c] == b[c]


def test_squares_that_vanish_in_float32(isa, dtype):
    """A sum that cancels exactly must not hide them; a constant channel stays one."""
    tiny = 6e-8 if dtype == np.float16 else 1e-25
    x = np.zeros((1, 3, 192), dtype)
    x[0, 0] = np.array([0, tiny, -tiny] * 64)
    x[0, 1] = tiny
    for a, axis in ((x, 1), (np.ascontiguousarray(np.moveaxis(x, 1, 2)), 2)):
        m2 = cbn.moments(a, channel_axis=axis).m2
        np.testing.assert_allclose(m2, reference.moments(a, axis)[2], rtol=1e-6, atol=0)
        assert m2[0] > 0
        assert (m2[1:] == 0).all()


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)])
@pytest.mark.parametrize("x_dtype", [np.float32, *HALVES])
def test_parameters_of_16_bits(rng, dtype, x_dtype, order):
    """They are read as the float32 that they stand for; gradients have their dtype."""
    x, dy = rng.standard_normal((2, 6, 5, 4)).astype(x_dtype)
    mean, var, weight, bias = (a[order] for a in np.abs(rng.standard_normal((4, 5))).astype(dtype))
    wide = [a.astype(np.float32) for a in (mean, var, weight, bias)]
    expected = batch_norm(x, *wide)
    assert batch_norm(x, mean, var, weight, bias).tobytes() == expected.tobytes()
    assert batch_norm(x, mean.astype(">f2") if dtype == np.float16 else mean, *wide[1:]).tobytes() == expected.tobytes()
    y, save_mean, save_invstd = native_batch_norm(x, weight, bias, None, None, True, 0.1, 1e-5)
    assert y.tobytes() == native_batch_norm(x, *wide[2:], None, None, True, 0.1, 1e-5)[0].tobytes()
    for train in (True, False):
        found, exact = (
            native_batch_norm_backward(dy, x, w, m, v, save_mean, save_invstd, train, 1e-5)
            for w, m, v in ((weight, mean, var), (wide[2], *wide[:2]))
        )
        assert found[0].tobytes() == exact[0].tobytes()
        for a, b in zip(found[1:], exact[1:], strict=True):
            assert a.dtype == dtype
            agree(a, b, ROUNDING[np.dtype(dtype)])
    with pytest.raises(TypeError, match=r"running_mean has dtype .*; expected float32 or float64"):
        batch_norm(x, mean, var, training=True)
    layer = cbn.BatchNorm(5)
    layer.weight = weight
    assert layer.weight.dtype == np.float32
    assert np.array_equal(layer.weight, wide[2])
