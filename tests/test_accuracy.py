"""The accuracy that cbn promises: errors relative to the output's scale, constants, exact fills."""

import functools
import math

import numpy as np
import pytest

import cbn
from cbn import reference
from cbn.functional import native_batch_norm, native_batch_norm_backward

from .paths import HALVES, in_memory_order

DISTRIBUTIONS = {
    "N(0, 1)": (0, 1, 1),
    "N(1000, 1)": (1000, 1, 1),
    "N(1e4, 0.1)": (1e4, 0.1, 1),
    "N(1e6, 1)": (1e6, 1, 1),
    "N(0, 1) × 1e19": (0, 1, 1e19),
    "N(0, 1) × 1e-20": (0, 1, 1e-20),
    "N(3, 1) × 1e30": (3, 1, 1e30),
    "N(0, 1) × 1e37": (0, 1, 1e37),
    "N(-1000, 1) × 1e-30": (-1000, 1, 1e-30),
}
# shape, axis, order in memory; the last has several chunks a channel
SHAPES = [
    ((16, 6, 12, 12), 1, None),
    ((16, 6, 12, 12), 1, (0, 2, 3, 1)),
    ((512, 40), 1, None),
    ((2, 3, 90000), 1, None),
]


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize(("shape", "axis", "order"), SHAPES)
def test_float32_errors(isa, rng, name, shape, axis, order):
    mean, std, factor = DISTRIBUTIONS[name]
    x = in_memory_order(((rng.standard_normal(shape) * std + mean) * factor).astype(np.float32), order)
    dy = in_memory_order(rng.standard_normal(shape).astype(np.float32), order)
    weight, bias = rng.standard_normal((2, shape[axis])).astype(np.float32)
    n, exact_mean, m2 = reference.moments(x)
    y, *saved = native_batch_norm(x, weight, bias, None, None, True, 0.1, 1e-5)
    exact_y = reference.normalize(x, exact_mean, m2 / n, weight, bias)
    assert np.abs(y - exact_y).max() <= 1e-6 * np.abs(exact_y).max()
    gradients = native_batch_norm_backward(dy, x, weight, None, None, *saved, True, 1e-5)
    exact = reference.backward(dy, x, exact_mean, m2 / n, weight)
    for name_, gradient, exact_gradient in zip(("dx", "dweight", "dbias"), gradients, exact, strict=True):
        assert np.abs(gradient - exact_gradient).max() <= 1e-5 * np.abs(exact_gradient).max(), name_
    y = cbn.functional.batch_norm(x, exact_mean, m2 / n, weight, bias)
    assert np.abs(y - exact_y).max() <= 1e-6 * np.abs(exact_y).max()
    # Without a bias, which would hide the error of a small y
    y, *_ = native_batch_norm(x, weight, None, None, None, True, 0.1, 1e-5)
    exact_y = reference.normalize(x, exact_mean, m2 / n, weight)
    assert np.abs(y - exact_y).max() <= 1e-6 * np.abs(exact_y).max()


@pytest.mark.parametrize("mean", [0, 1000, 1e6])
def test_gradient_with_a_large_mean(rng, mean):
    """dy far from zero: its mean is carried as two floats too."""
    x = rng.standard_normal((64, 5, 50)).astype(np.float32)
    dy = (rng.standard_normal((64, 5, 50)) + mean).astype(np.float32)
    n, exact_mean, m2 = reference.moments(x)
    _, *saved = native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5)
    gradients = native_batch_norm_backward(dy, x, None, None, None, *saved, True, 1e-5)
    for gradient, exact in zip(gradients, reference.backward(dy, x, exact_mean, m2 / n), strict=True):
        assert np.abs(gradient - exact).max() <= 1e-6 * np.abs(exact).max()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [0.0, 3.3, -0.1, 1e7, 1e7 + 0.1, 1e10, 1e-30, 1e30])
@pytest.mark.parametrize(("shape", "axis", "order"), [*SHAPES, ((7, 3), 1, None), ((3, 1, 333), 1, None)])
def test_a_constant_channel_gives_exactly_the_bias(isa, dtype, value, shape, axis, order):
    x = in_memory_order(np.full(shape, value, dtype), order)
    bn = cbn.BatchNorm(shape[axis], dtype=dtype)
    bn.bias[:] = np.linspace(-1, 3, shape[axis])
    y = bn(x)
    assert np.array_equal(y, np.broadcast_to(reference.expand(bn.bias, x, axis), shape))
    assert np.array_equal(cbn.moments(x).mean, np.full(shape[axis], float(dtype(value))))
    assert not cbn.moments(x).m2.any()


@pytest.mark.parametrize("order", [None, (0, 2, 3, 1)])
def test_pairs_around_a_representable_mean_are_exact(isa, rng, order):
    """oneDNN's fill: values in pairs m - k/8, m + k/8, for which mean and variance can be exact, and must be."""
    for mean in (0.0, 1.0, -32.0, 1024.0):
        k = rng.integers(1, 64, (8, 3, 6, 5)) / 8
        x = np.empty((8, 3, 6, 10), np.float32)
        x[..., 0::2], x[..., 1::2] = mean - k, mean + k
        x = in_memory_order(x, order)
        m = cbn.moments(x)
        assert np.array_equal(m.mean, np.full(3, mean))
        assert np.array_equal(m.m2, 2 * (k**2).sum(axis=(0, 2, 3)))


def outlier(rng, n, place):
    x = rng.standard_normal(n)
    x[place] = 31
    return x


# Values whose order, or whose equality, makes a sum lose digits: name -> n values
ORDERS = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "an outlier first": lambda rng, n: outlier(rng, n, 0),
    "an outlier last": lambda rng, n: outlier(rng, n, -1),
    "outliers where a shift is sampled": lambda rng, n: outlier(rng, n, np.arange(8) * n // 8),
    "ascending": lambda rng, n: np.sort(rng.standard_normal(n)),
    "descending": lambda rng, n: np.sort(rng.standard_normal(n))[::-1],
    "alternating": lambda rng, n: np.where(np.arange(n) % 2, 0.3, -0.3),
    "alternating, shifted": lambda rng, n: np.where(np.arange(n) % 2, 1 / 3, -1 / 3) + 5.1,
    "two levels": lambda rng, n: np.where(np.arange(n) < n // 2, 1.1, 2.3),
    "a walk": lambda rng, n: np.cumsum(rng.standard_normal(n)),
    "lognormal": lambda rng, n: np.exp(rng.standard_normal(n)),
    "sparse": lambda rng, n: np.where(rng.random(n) < 0.05, rng.standard_normal(n), 0),
    "rectified": lambda rng, n: np.maximum(rng.standard_normal(n) - 1, 0),
}


# Nearly all values are equal, so that their additions are rounded alike
SPARSE = {
    "1 %": lambda rng, n: np.where(rng.random(n) < 0.01, rng.standard_normal(n), 0),
    "one value, and a few far off": lambda rng, n: np.where(rng.random(n) < 0.02, 10 * rng.standard_normal(n), 0.7),
    "rectified": lambda rng, n: np.maximum(rng.standard_normal(n) - 2, 0),
}


@functools.cache
def exact_moments(order, n, seed=1):
    """(n values, mean as two float64, m2), by exact sums of long double."""
    x = (ORDERS | SPARSE)[order](np.random.default_rng(seed), n)
    high = math.fsum(x) / n
    low = math.fsum([*x.tolist(), *[-high] * n]) / n
    square = (x.astype(np.longdouble) - high - low) ** 2
    rounded = square.astype(np.float64)
    return x, high, low, np.longdouble(math.fsum(rounded)) + math.fsum((square - rounded).astype(np.float64))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", [(100, 1), (20_000, 1), (1, 2, 20_000), (600, 2, 49), (20_000, 3), (6, 1, 200_000)])
def test_no_order_of_the_values_costs_digits(isa, order, shape):
    """Mean, variance and y of float64 are within 2e-15 of the exact ones, relative to the spread."""
    n = math.prod(shape) // shape[1]
    x_n, high, low, m2 = exact_moments(order, n)
    x = np.repeat(x_n.reshape(shape[0], 1, *shape[2:]), shape[1], 1)
    found, y = cbn.moments(x), native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5)[0]
    std = float(np.sqrt(m2 / n))
    assert np.abs((found.mean - high) - low).max() <= 2e-15 * max(std, abs(high) / 4), (found.mean, high)
    assert np.abs(found.m2 - m2).max() <= 2e-15 * m2, (found.m2, m2)
    exact = (((x_n.astype(np.longdouble) - high) - low) / np.sqrt(m2 / n + np.longdouble(1e-5))).reshape(x[:, :1].shape)
    # A mean that is large beside the spread has the digits of a float64 number, no more
    assert np.abs(y - exact).max() <= 2e-15 * np.abs(exact).max() * max(1, abs(high) / std / 4)


@pytest.mark.parametrize("order", SPARSE)
@pytest.mark.parametrize("shape", [(1, 1, 1000), (1000, 24)])
def test_no_number_of_equal_values_costs_digits(isa, order, shape):
    """The shift may be more than a standard deviation off, which multiplies errors: the largest of many samples."""
    errors = {}
    for seed in range(100):
        x_n, _, _, m2 = exact_moments(order, 1000, seed)
        x = np.repeat(x_n.reshape(shape[0], 1, *shape[2:]), shape[1], 1)
        if m2:
            errors[seed] = float(np.abs(cbn.moments(x).m2 - m2).max() / m2)
    worst = max(errors, key=errors.get)
    assert errors[worst] <= 2e-15, (worst, errors[worst])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("ratio", [0, 0.5, 1, 2, 4, 8, 30, 300])  # of mean and standard deviation
@pytest.mark.parametrize("shape", [(64, 40), (3, 5, 37), (32, 16, 14, 14), (4, 4, 40_000), (20_000, 6)])
def test_statistics_of_16_bits_have_all_digits_of_float32(isa, rng, dtype, ratio, shape):
    """The variance is within a unit in the last place of float32, the mean within one of the spread's."""
    for values in (rng.standard_normal(shape), np.sort(rng.standard_normal(shape), axis=0), rng.choice([-1, 1], shape)):
        x = (values + ratio).astype(dtype)
        n, mean, m2 = reference.moments(x)
        found = cbn.moments(x)
        assert (np.abs(found.m2 - m2) <= 2**-23 * m2).all(), (found.m2, m2)
        assert (np.abs(found.mean - mean) <= 2**-23 * np.sqrt(m2 / n) + 2**-50 * np.abs(mean)).all()


def test_an_outlier_in_first_place_costs_no_accuracy(isa, rng):
    """The shift comes from a few values: the farther one of them lies out, the larger is the variance that it makes."""
    x = rng.standard_normal((4, 3, 5000)).astype(np.float32)
    x[0, :, 0] = 1e6
    n, mean, m2 = reference.moments(x)
    found = cbn.moments(x)
    assert np.abs(found.mean - mean).max() < 1e-12 * np.sqrt(m2 / n).min()
    np.testing.assert_allclose(found.m2, m2, rtol=1e-10)


@pytest.mark.parametrize("shape", [(100_000, 1), (1, 1, 100_000), (300, 2, 333), (20_000, 5)])
@pytest.mark.parametrize("first", [1e3, -1e7, 1e12])
def test_float64_keeps_its_digits_with_an_outlier_in_first_place(isa, rng, shape, first):
    """The pass is done again with the mean as shift; channels without an outlier keep the bits that they had."""
    x = rng.standard_normal(shape)
    spoiled = x.copy()
    spoiled[(0, 0) if len(shape) == 2 else (0, 0, 0)] = first
    _, mean, m2 = reference.moments(np.roll(spoiled, 1, axis=-1 if len(shape) == 3 else 0))
    m = cbn.moments(spoiled)
    np.testing.assert_allclose(m.m2, m2, rtol=1e-12)
    n = m.count[0]
    assert (np.abs(m.mean - mean) <= 1e-13 * np.sqrt(m2 / n)).all()
    y, save_mean, _ = native_batch_norm(spoiled, None, None, None, None, True, 0.1, 1e-5)
    assert np.array_equal(save_mean, m.mean)
    exact = reference.normalize(spoiled, mean, m2 / n)
    assert np.abs(y - exact).max() <= 1e-12 * np.abs(exact).max()
    clean = cbn.moments(x)
    assert np.array_equal(clean.m2[1:], m.m2[1:])


def test_layer_of_a_million_stays_exact_over_modes(rng):
    bn = cbn.BatchNorm2d(4)
    x = (rng.standard_normal((8, 4, 16, 16)) + 1e6).astype(np.float32)
    y = bn(x)
    n, mean, m2 = reference.moments(x)
    assert np.abs(y - reference.normalize(x, mean, m2 / n)).max() < 1e-6 * np.abs(y).max()
    dx = bn.backward(y)
    exact = reference.backward(y, x, mean, m2 / n)
    # dx is what rounding leaves of y itself: compare it with the scale of y
    assert np.abs(dx - exact[0]).max() < 1e-6
    assert np.abs(bn.weight_grad - exact[1]).max() < 1e-6 * np.abs(exact[1]).max()
