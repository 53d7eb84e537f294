"""Results that exist though what they are made from does not: a product or a sum beyond the range of the elements."""

import ml_dtypes
import numpy as np
import pytest

import cbn
from cbn import reference
from cbn.functional import batch_norm, native_batch_norm, native_batch_norm_backward
from cbn.kernels import engine

from .paths import INPUT_DTYPES, KNOBS, LARGE_RANGE, PARAMETERS, ROUNDING, in_memory_order

LARGEST = {dtype: float(ml_dtypes.finfo(dtype).max) for dtype in INPUT_DTYPES}
UNIT = {np.dtype(np.float32): 1e-6, np.dtype(np.float64): 1e-15, **ROUNDING}
SHAPES = {
    "rows": ((37, 21), 1, None),
    "runs": ((3, 5, 141), 1, None),
    "short runs": ((9, 20, 15), 1, None),
    "NHWC": ((2, 5, 11, 13), 1, (0, 2, 3, 1)),
}


def wide(a):
    """As a type of a larger range than any element's."""
    return np.asarray(a).astype(np.float64).astype(np.longdouble)


def exact(x, mean, var, weight, bias, residual, slope, axis=1):
    """(y, size of the terms it is a sum of) of an evaluation with eps=0; nothing overflows."""
    shape = [-1 if i == axis else 1 for i in range(x.ndim)]
    mean, var, weight, bias = (wide(a).reshape(shape) for a in (mean, var, weight, bias))
    a = (wide(x) - mean) / np.sqrt(var) * weight
    size = (np.abs(wide(x)) + np.abs(mean)) / np.sqrt(var) * np.abs(weight) + np.abs(bias)
    a = a + bias
    if residual is not None:
        a = a + wide(residual)
        size = size + np.abs(wide(residual))
    return np.where(a <= 0, a * np.longdouble(slope), a), np.where(a <= 0, size * abs(np.longdouble(slope)), size)


def agrees(y, of_exact):
    """Finite where the exact value is, and as near as its terms allow; infinite where that is too large."""
    value, size = of_exact
    finfo, allowed = ml_dtypes.finfo(y.dtype), UNIT[y.dtype] * size
    got = wide(y)
    near = np.abs(got - value) <= allowed + float(finfo.smallest_normal)
    beyond = (np.abs(value) + allowed >= float(finfo.max)) & np.isinf(got) & (np.sign(got) == np.sign(value))
    return near | beyond


def large(rng, dtype, shape, axis, order):
    """Values and coefficients of all sizes, up to the largest ones; (x, z, mean, var, weight, bias)."""
    top = np.log10(LARGEST[dtype])
    n = shape[axis]

    def values(shape, least):
        return rng.choice([-1, 1], shape) * 10.0 ** rng.uniform(least, top, shape)

    x, z = (in_memory_order(values(shape, top - 3).astype(dtype), order) for _ in range(2))
    parameters = PARAMETERS[dtype]
    mean, weight, bias = (
        values(n, top - 20),
        rng.standard_normal(n) * 10.0 ** rng.uniform(-3, 3, n),
        values(n, top - 40),
    )
    mean[1::3], bias[::2] = 0, 0
    var = 10.0 ** rng.uniform(-4, 4, n)
    return x, z, *(a.astype(parameters) for a in (mean, var, weight, bias))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(40, 3), (3, 3, 50)])
def test_a_slope_or_a_residual_brings_it_back(isa, dtype, shape):
    zeros, ones = np.zeros(3, np.float32), np.ones(3, np.float32)
    x = np.full(shape, -1e38, dtype)
    y = batch_norm(x, zeros, 0.01 * ones, eps=0, activation=("leaky_relu", 0.01))
    np.testing.assert_allclose(y.astype(np.float64), -1e37, rtol=2 * UNIT[x.dtype])
    x = np.full(shape, 3e38, dtype)
    for activation in (None, "relu", ("leaky_relu", 0.5)):
        y = batch_norm(x, zeros, 0.25 * ones, eps=0, residual=-x, activation=activation)
        assert (y == x).all()
    y = batch_norm(-x, zeros, 0.25 * ones, eps=0, residual=x, activation=("leaky_relu", 0.5))
    np.testing.assert_allclose(y.astype(np.float64), -1.5e38, rtol=4 * UNIT[x.dtype])


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", INPUT_DTYPES)
@pytest.mark.parametrize("slope", [0, 0.001, 1, -30])
def test_values_of_all_sizes(isa, parallel, rng, dtype, name, slope):
    shape, axis, order = SHAPES[name]
    x, z, *arrays = large(rng, dtype, shape, axis, order)
    activation = ("leaky_relu", slope)
    for residual in (None, z, -x):
        of_exact = exact(x, *arrays, residual, slope)
        y = batch_norm(x, *arrays, eps=0, residual=residual, activation=activation)
        right = agrees(y, of_exact)
        assert right.all(), (x[~right][:3], y[~right][:3], of_exact[0][~right][:3])
        in_place = x.copy(order="K")
        batch_norm(in_place, *arrays, eps=0, residual=residual, activation=activation, out=in_place)
        assert in_place.tobytes() == y.tobytes()
        if residual is not None:
            there = residual.copy(order="K")
            batch_norm(x, *arrays, eps=0, residual=there, activation=activation, out=there)
            assert there.tobytes() == y.tobytes()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", LARGE_RANGE)
def test_how_it_is_done_decides_no_bit(isa, parallel, rng, dtype, name):
    """Whether such a value stands in a vector or in the rest of a run, and how it is stored."""
    shape, axis, order = SHAPES[name]
    x, z, *arrays = large(rng, dtype, shape, axis, order)
    kwargs = {"eps": 0, "activation": ("leaky_relu", 0.01)}
    expected = None
    for knobs in KNOBS.values():
        engine.tune(**{"nontemporal_bytes": 1 << 40, "prefetch": True} | knobs)
        y = batch_norm(x, *arrays, residual=z, **kwargs)
        expected = expected or y.tobytes()
        assert y.tobytes() == expected
    for c in range(shape[axis]):
        some = [a[c : c + 1] for a in arrays]
        column, of_z = (np.ascontiguousarray(a[:, c : c + 1]) for a in (x, z))
        alone = batch_norm(column, *some, residual=of_z, **kwargs)
        assert alone.tobytes() == np.ascontiguousarray(y[:, c : c + 1]).tobytes()
        one = batch_norm(column.reshape(-1, 1), *some, residual=of_z.reshape(-1, 1), **kwargs)
        assert one.tobytes() == alone.tobytes()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(6, 2), (2, 2, 3)])
def test_a_mean_that_float32_does_not_hold(isa, dtype, shape):
    """What its lower half contributes is too large for float32: no infinity less an infinity."""
    mean = np.full(2, 1e30)
    near = np.array(1e30, dtype)
    x = np.full(shape, near)
    x[0] = near * np.array(1.5, dtype)
    y = batch_norm(x, mean.astype(np.float32).astype(np.float64) + 1e22, np.full(2, 1e-60), eps=0)
    assert (y[0] == np.inf).all()
    assert not np.isnan(y.astype(np.float32)).any()


@pytest.mark.parametrize("slope", [None, 0, 0.25])
def test_float64_at_its_largest(isa, rng, slope):
    """Differences, products and sums beyond 1.8e308."""
    x = np.array([[1.5e308, -1.7e308, 1e307, 0.0, -1e308]] * 9)
    for mean, var, bias in (
        (-1.5e308, 1e300, 0.0),
        (1e308, 1e10, 1e304),
        (1.0, 1e-2, -1e306),
        (-1.7e308, 1.0, 1.7e308),
    ):
        arrays = np.full(5, mean), np.full(5, var), np.ones(5), np.full(5, bias)
        for z in (None, np.full_like(x, 1.7e308), -x):
            activation = None if slope is None else ("leaky_relu", slope)
            for a, of_z, axis in ((x, z, 1), (x.T.copy(), None if z is None else z.T.copy(), 0)):
                y = batch_norm(a, *arrays, eps=0, residual=of_z, activation=activation, channel_axis=axis)
                of_exact = exact(a, *arrays, of_z, 1 if slope is None else slope, axis)
                right = agrees(y, of_exact)
                assert right.all(), (mean, z is None, a[~right][:3], y[~right][:3], of_exact[0][~right][:3])


def test_infinities_stay_what_they_are(isa):
    x = np.array([[np.inf, -np.inf, np.nan, 3e38, 3e38]] * 9, np.float32)
    z = np.array([[1, 1, 1, -np.inf, np.inf]] * 9, np.float32)
    y = batch_norm(x, np.zeros(5), np.full(5, 0.25), eps=0, residual=z)
    assert np.array_equal(y, np.array([[np.inf, -np.inf, np.nan, -np.inf, np.inf]] * 9), equal_nan=True)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(9, 5), (2, 5, 70)])
def test_the_gradient_decides_as_such_a_result_does(isa, rng, dtype, shape):
    x = np.full(shape, 3e38, dtype)
    z = rng.choice([-np.inf, -3e38, 3e38, np.inf], shape).astype(dtype)
    bn = cbn.BatchNorm(5, eps=0, activation="relu").freeze()
    bn.running_var[...] = 0.25
    y = bn(x, residual=z)
    _, dz = bn.backward(np.ones_like(x))
    assert (y == np.where(z == -np.inf, 0, np.where(z < 0, x, np.inf)).astype(dtype)).all()
    assert (dz == (y > 0)).all()


@pytest.mark.parametrize("dtype", LARGE_RANGE)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("path", ["two passes", "pipeline", "pipeline, past the caches"])
def test_gradients_whose_parts_are_too_large(isa, parallel, rng, dtype, name, path):
    """dx = (dy - S(dy)/n - ...)*scale of a dy that is a multiple of y, and of one far from zero."""
    engine.tune(**{"nontemporal_bytes": 1 << 40} | KNOBS[path])
    shape, axis, order = SHAPES[name]
    x = in_memory_order(rng.uniform(-1, 1, shape).astype(dtype), order)
    weight = np.full(shape[axis], 10, PARAMETERS[dtype])
    size = LARGEST[dtype] / (4 if dtype is not np.float64 else 1e4)
    n, mean, m2 = reference.moments(x, axis)
    _, *saved = native_batch_norm(x, weight, None, None, None, True, 0.1, 1e-5)
    for dy in (size * wide(x), size * np.ones_like(wide(x)), size * (wide(x) ** 2 - 0.3)):
        dy = in_memory_order(dy.astype(np.float64).astype(dtype), order)
        dx, *_ = native_batch_norm_backward(dy, x, weight, None, None, *saved, True, 1e-5)
        scaled = dy.astype(np.float64) / size
        exact_dx = reference.backward(scaled, x, mean, m2 / n, weight, 1e-5)[0] * (size / LARGEST[dtype])
        got = wide(dx) / np.longdouble(LARGEST[dtype])
        terms = 10 * np.abs(scaled).max() * (size / LARGEST[dtype]) / np.sqrt((m2 / n).min())
        inside = np.abs(exact_dx) < 0.99
        assert inside.any()
        assert (np.abs(got - exact_dx)[inside] <= 4 * UNIT[x.dtype] * terms).all()
        assert np.isinf(dx.astype(np.float64)[np.abs(exact_dx) > 1.01]).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
@pytest.mark.parametrize("out_dtype", [np.float32, ml_dtypes.bfloat16])
def test_8_bit_input(isa, dtype, out_dtype):
    x = np.full((6, 3, 41), 100, dtype)
    zeros, ones = np.zeros(3, np.float32), np.ones(3, np.float32)
    kwargs = {"eps": 0, "x_scale": 3e36, "out_dtype": out_dtype}
    y = batch_norm(x, 6e38 * ones.astype(np.float64), 0.01 * ones, activation=("leaky_relu", 0.01), **kwargs)
    np.testing.assert_allclose(y.astype(np.float64), -3e37, rtol=2 * UNIT[y.dtype])
    y = batch_norm(x, zeros, 0.25 * ones, residual=np.full(x.shape, -3e38, out_dtype), **kwargs)
    np.testing.assert_allclose(y.astype(np.float64), 3e38, rtol=4 * UNIT[y.dtype])
