"""Moments of what counts: masks, weights, missing values, extremes; exact sums of integers."""

import sys
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cbn
from cbn import reference
from cbn.kernels import engine

from .paths import INPUT_DTYPES, KNOBS, LAYOUTS, PATH_SHAPES, THREADS, agree, in_memory_order

INTEGERS = (np.bool_, np.int8, np.uint8, np.int16, np.uint16, np.int32)
OPTIONS = {
    "extrema": {"extrema": True},
    "skipna": {"skipna": True},
    "skipna, extrema": {"skipna": True, "extrema": True},
    "weights": {"weights": True},
    "weights, extrema": {"weights": True, "extrema": True},
    "mask": {"mask": "positions"},
    "mask of values, skipna, extrema": {"mask": "values", "skipna": True, "extrema": True},
    "weights, mask, skipna": {"weights": True, "mask": "positions", "skipna": True},
    "all": {"weights": True, "mask": "values", "skipna": True, "extrema": True},
}


def case_of(rng, shape, axis, options):
    """The arguments of `moments`, and the weights of all values, for an array of this shape."""
    axis %= len(shape)
    samples = 1 if axis == 0 else 0
    arguments = {name: options[name] for name in ("skipna", "extrema") if name in options}
    every = np.ones(shape)
    if options.get("weights"):
        weights = rng.random(shape[samples]) * 3
        weights[rng.random(weights.size) < 0.2] = 0
        arguments["weights"] = weights
        every = every * weights.reshape([-1 if i == samples else 1 for i in range(len(shape))])
    if "mask" in options:
        positions = tuple(size for i, size in enumerate(shape) if i != axis)
        mask = rng.random(shape if options["mask"] == "values" else positions) < 0.7
        arguments["mask"] = mask
        every = every * (mask if mask.ndim == len(shape) else np.expand_dims(mask, axis))
    return arguments, every


def check(found, x, every, arguments, axis, limit, *case):
    skipna = arguments.get("skipna", False)
    count, mean, m2, least, largest = reference.counted_moments(x, every, skipna, axis)
    for name, exact in (("count", count), ("mean", mean), ("m2", m2)):
        value = getattr(found, name)
        assert np.array_equal(np.isnan(value), np.isnan(exact)), (name, *case)
        agree(np.nan_to_num(value), np.nan_to_num(exact), limit, name, *case)
    if arguments.get("extrema"):
        assert np.array_equal(found.min, least, equal_nan=True), case
        assert np.array_equal(found.max, largest, equal_nan=True), case
    else:
        assert found.min is None
        assert found.max is None


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", INPUT_DTYPES)
def test_values(isa, rng, dtype, layout, name):
    """Against float64 in numpy, with and without NaN."""
    shape, axis, order = LAYOUTS[layout]
    x = in_memory_order((rng.standard_normal(shape) * 2 + 50).astype(dtype), order)
    for some_nan in (False, True):
        if some_nan:
            x[rng.random(shape) < 0.1] = np.nan
        arguments, every = case_of(rng, shape, axis, OPTIONS[name])
        check(cbn.moments(x, channel_axis=axis, **arguments), x, every, arguments, axis, 1e-13, isa, layout, name)


@pytest.mark.parametrize("name", ["skipna, extrema", "weights", "all"])
@pytest.mark.parametrize("shape", PATH_SHAPES.values(), ids=PATH_SHAPES)
def test_paths(isa, parallel, rng, shape, name):
    """Every path through the kernels, with the same bits on any number of threads."""
    x = (rng.standard_normal(shape) + 3).astype(np.float32)
    if "skipna" in OPTIONS[name]:
        x[rng.random(shape) < 0.1] = np.nan
    arguments, every = case_of(rng, shape, 1, OPTIONS[name])
    first = None
    for knobs in KNOBS.values():
        engine.tune(**knobs)
        for threads in THREADS:
            with cbn.num_threads(threads):
                found = cbn.moments(x, **arguments)
            first = first or found
            for row in ("count", "mean", "m2", "min", "max"):
                assert np.array_equal(getattr(found, row), getattr(first, row)), (row, threads, knobs)
    check(first, x, every, arguments, 1, 1e-13, isa, shape, name)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ones_and_numbers_change_no_bit(isa, rng, dtype):
    """A mask or weights of ones, `extrema`, and `skipna` without NaN leave the bits of mean and m2."""
    for shape in PATH_SHAPES.values():
        x = (rng.standard_normal(shape) + 3).astype(dtype)
        plain = cbn.moments(x)
        for arguments in (
            {"extrema": True},
            {"skipna": True},
            {"skipna": True, "extrema": True},
            {"weights": np.ones(shape[0])},
            {"mask": np.ones(shape, bool), "skipna": True},
        ):
            found = cbn.moments(x, **arguments)
            assert np.array_equal(found.mean, plain.mean), (shape, arguments)
            assert np.array_equal(found.m2, plain.m2), (shape, arguments)


@pytest.mark.parametrize("dtype", INPUT_DTYPES)
def test_constants_are_exact(isa, dtype):
    for value in (3.3, 1e4, -7.0):
        x = np.full((301, 64), value, dtype)
        x[::3, 5] = np.nan
        for arguments in ({"skipna": True}, {"mask": ~np.isnan(x), "weights": np.linspace(0, 2, 301)}):
            m = cbn.moments(x, extrema=True, **arguments)
            for found in (m.mean, m.min, m.max):
                assert (found == float(dtype(value))).all()
            assert not m.m2.any()


def test_a_shift_is_found_where_most_is_missing(isa, rng):
    """Far from zero, so that a bad shift would show."""
    x = rng.standard_normal((500, 40)) + 1e8
    x[rng.random(x.shape) < 0.97] = np.nan
    m = cbn.moments(x, skipna=True)
    count, mean, m2, *_ = reference.counted_moments(x, 1, True)
    assert np.array_equal(m.count, count)
    np.testing.assert_allclose(m.mean, mean, rtol=1e-15)
    np.testing.assert_allclose(m.m2, m2, rtol=1e-7)


@pytest.mark.parametrize("shape", [(200, 5), (2, 5, 300)])
def test_infinities_are_values_and_nan_is_not_one(isa, shape):
    n = np.prod(shape) // 5
    channels = np.zeros((5, n), np.float32)
    channels[0, 0], channels[0, -1] = np.inf, -np.inf
    channels[1, n // 2] = np.nan
    channels[2, 0], channels[2, -1], channels[2, n // 2] = np.inf, -np.inf, np.nan
    channels[3, 0] = np.inf
    x = channels.T.copy() if len(shape) == 2 else channels.reshape(5, 2, 300).transpose(1, 0, 2).copy()
    for dtype in INPUT_DTYPES:
        m = cbn.moments(x.astype(dtype), extrema=True)
        assert np.array_equal(m.min, [-np.inf, np.nan, np.nan, 0, 0], equal_nan=True), dtype
        assert np.array_equal(m.max, [np.inf, np.nan, np.nan, np.inf, 0], equal_nan=True), dtype
        assert np.array_equal(np.isnan(m.mean), [True, True, True, False, False]), dtype
        m = cbn.moments(x.astype(dtype), extrema=True, skipna=True)
        assert np.array_equal(m.min, [-np.inf, 0, -np.inf, 0, 0]), dtype
        assert m.mean[3] == np.inf
    # A float64 sum that overflows both ways is no NaN
    x = np.zeros(shape)
    x[0, 0] = 1.7e308
    x[-1, 0] = -1.7e308
    x[1:, 0] = -1.7e308
    assert not np.isnan(cbn.moments(x, extrema=True).min).any()


def test_nothing_counts():
    x = np.full((4, 2), np.nan, np.float32)
    for m in (
        cbn.moments(x, skipna=True, extrema=True),
        cbn.moments(x, mask=np.zeros(4, bool), extrema=True),
        cbn.moments(x, weights=np.zeros(4), extrema=True),
        cbn.moments(np.empty((0, 2)), extrema=True),
        cbn.moments(np.zeros((4, 2), np.uint8), mask=np.zeros((4, 2), bool), extrema=True),
    ):
        assert not m.count.any()
        assert not m.mean.any()
        assert np.isnan(m.var()).all()
        assert (m.min == np.inf).all()
        assert (m.max == -np.inf).all()
        some = cbn.moments(np.ones((3, 2)), extrema=True)
        for merged in (m + some, some + m):
            assert np.array_equal(merged.mean, [1, 1])
            assert np.array_equal(merged.min, [1, 1])


def exact_moments(values):
    n = len(values)
    total, squares = sum(values), sum(v * v for v in values)
    return n, float(Fraction(total, n)), float(Fraction(n * squares - total * total, n))


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_integers_are_exact(isa, parallel, rng, layout, dtype):
    """Mean and m2 are the exact quotients, rounded once, also at the ends of the range."""
    shape, axis, order = LAYOUTS[layout]
    ends = (0, 1) if dtype is np.bool_ else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    for low, high in (ends, (ends[1], ends[1]), (ends[0], ends[0])):
        x = in_memory_order(rng.integers(low, high, shape, endpoint=True).astype(dtype), order)
        for mask in (None, rng.random(np.delete(shape, axis)) < 0.7, rng.random(shape) < 0.7):
            m = cbn.moments(x, channel_axis=axis, mask=mask, extrema=True)
            counts = np.ones(shape, bool)
            if mask is not None:
                counts &= mask if mask.ndim == x.ndim else np.expand_dims(mask, axis % x.ndim)
            for c in range(shape[axis]):
                values = [int(v) for v in np.take(x, c, axis)[np.take(counts, c, axis)]]
                if values:
                    assert (m.count[c], m.mean[c], m.m2[c]) == exact_moments(values), (c, low, high)
                    assert (m.min[c], m.max[c]) == (min(values), max(values))


@pytest.mark.parametrize("dtype", INTEGERS)
def test_many_integers(isa, parallel, dtype):
    """More of the largest values than the kernels' small sums hold: what they add to is larger."""
    largest = 1 if dtype is np.bool_ else np.iinfo(dtype).min or np.iinfo(dtype).max
    for shape, axis in (((3, 2, 200_000), 1), ((600_000, 2), 1), ((70_000, 2, 9), 1), ((1, 1_200_000), 0)):
        x = np.full(shape, largest, dtype)
        x.reshape(-1)[::2] = 0
        for threads in (1, 3):
            with cbn.num_threads(threads):
                m = cbn.moments(x, channel_axis=axis, extrema=True)
            for c in range(shape[axis]):
                some = np.take(x, c, axis)
                ones = int(np.count_nonzero(some))
                total, n = ones * int(largest), some.size
                assert m.mean[c] == float(Fraction(total, n))
                assert m.m2[c] == float(Fraction(n * ones * int(largest) ** 2 - total**2, n))


def test_more_int32_than_64_bits_hold_the_sum_of(monkeypatch, rng):
    monkeypatch.setattr(sys.modules["cbn.moments"], "MOST_INT32", 50)
    x = rng.integers(-9, 9, (300, 2, 3), dtype=np.int32)
    for mask in (None, rng.random(x.shape) < 0.5):
        check(
            cbn.moments(x, mask=mask, extrema=True), x, 1 if mask is None else mask, {"extrema": True}, 1, 1e-14, mask
        )


def test_integers_in_any_memory(rng):
    x = rng.integers(0, 255, (40, 6, 5), dtype=np.uint8)
    for a in (x[::2, ::-1, 1:], x.transpose(2, 1, 0), np.broadcast_to(x[:, :, :1], x.shape), x.astype(">u2")):
        found, exact = cbn.moments(a, extrema=True), reference.counted_moments(a)
        for name, value in zip(("count", "mean", "m2", "min", "max"), exact, strict=True):
            np.testing.assert_allclose(getattr(found, name), value, rtol=1e-13)


def test_weighted_integers_are_as_float64(rng):
    x, weights = rng.integers(-9, 9, (30, 4), dtype=np.int16), rng.random(30)
    found, exact = cbn.moments(x, weights=weights), cbn.moments(x.astype(float), weights=weights)
    assert np.array_equal(found.m2, exact.m2)


def test_masks_broadcast(rng):
    x = rng.standard_normal((6, 3, 5))
    for mask in (
        rng.random(5) < 0.5,
        rng.random((6, 1)) < 0.5,
        rng.random((6, 1, 1)) < 0.5,
        rng.random((6, 3, 1)) < 0.5,
        rng.random((1, 3, 1)) < 0.5,
        np.array(False),
    ):
        target = (6, 5) if mask.ndim < 3 else x.shape
        every = np.broadcast_to(mask, target)
        every = every if every.ndim == 3 else every[:, None]
        check(cbn.moments(x, mask=mask), x, every, {}, 1, 1e-14, mask.shape)


def test_refusals():
    x = np.zeros((6, 3, 5), np.float32)
    for arguments, error, words in (
        ({"mask": np.ones(6)}, TypeError, "mask has dtype float64; expected bool"),
        (
            {"mask": np.ones(7, bool)},
            ValueError,
            r"mask has shape \(7,\), which broadcasts neither to \(6, 5\), the input",
        ),
        ({"mask": None, "weights": np.ones(3)}, ValueError, r"weights has shape \(3,\); expected \(6,\)"),
        ({"weights": [1, 1, 1, 1, 1, np.nan]}, ValueError, "weights must be finite and not negative, but got nan"),
        ({"weights": [1, 1, 1, 1, 1, -2]}, ValueError, "not negative, but got -2"),
        ({"weights": [1, 1, 1, 1, 1, np.inf]}, ValueError, "weights must be finite and not negative, but got inf"),
        ({"weights": [1j] * 6}, TypeError, "weights has dtype complex128; expected numbers"),
        ({"skipna": 1}, TypeError, "skipna must be a bool, not 1"),
        ({"extrema": None}, TypeError, "extrema must be a bool, not None"),
    ):
        with pytest.raises(error, match=words):
            cbn.moments(x, **arguments)
    for dtype in (np.int64, np.uint32):
        with pytest.raises(TypeError, match=f"input has dtype {np.dtype(dtype)}; expected .* int16, uint16 or int32"):
            cbn.moments(x.astype(dtype))
    with pytest.raises(TypeError, match="input has dtype complex64; expected float32"):
        cbn.moments(x.astype(np.complex64))


NUMBERS = st.one_of(st.floats(-1e6, 1e6, width=32), st.just(float("nan")), st.integers(-3, 3).map(float))


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 3),
    st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS, st.sampled_from([0.0, 0.5, 1.0, 3.0])), min_size=1, max_size=20),
    st.data(),
)
def test_streams_against_exact_rationals(n_features, rows, data):
    """Any split of any stream with NaN and weights, against rational arithmetic on the same numbers."""
    x = np.array([row[:n_features] for row in rows], np.float32)
    weights = np.array([row[3] for row in rows])
    running = cbn.RunningMoments(n_features, skipna=True, extrema=True)
    begin = 0
    while begin < len(x):
        end = data.draw(st.integers(begin + 1, len(x)))
        part = x[begin:end].astype(data.draw(st.sampled_from([np.float32, np.float64])))
        running.update(part, weights=weights[begin:end])
        begin = end
    for c in range(n_features):
        pairs = [
            (Fraction(float(v)), Fraction(float(w)))
            for v, w in zip(x[:, c], weights, strict=True)
            if w and not np.isnan(v)
        ]
        n = sum(w for _, w in pairs)
        assert running.count[c] == float(n)
        if not pairs:
            continue
        mean = sum(w * v for v, w in pairs) / n
        m2 = sum(w * (v - mean) ** 2 for v, w in pairs)
        scale = max(abs(v) for v, _ in pairs)
        assert abs(running.mean[c] - float(mean)) <= 4e-15 * float(scale) * (1 + len(rows) / 8)
        # Relative to m2, and to the roundings of the means of parts
        bound = 1e-14 * float(m2) + float(n) * (1e-15 * float(scale)) ** 2 * len(rows) + 1e-300
        assert abs(running._rows()[2][c] - float(m2)) <= bound, (float(m2), running._rows()[2][c])
        assert running.min[c] == float(min(v for v, _ in pairs))
        assert running.max[c] == float(max(v for v, _ in pairs))


def test_bfloat16_beyond_the_short_sums(rng):
    x = (rng.standard_normal((400, 9)) * 1e-30).astype(ml_dtypes.bfloat16)
    m = cbn.moments(x, extrema=True)
    assert np.array_equal(m.max, x.astype(float).max(axis=0))
    np.testing.assert_allclose(m.var(), x.astype(float).var(axis=0), rtol=1e-12)
