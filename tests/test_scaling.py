"""standardize: values for all pairs of types, options, clips, outputs, refusals."""

import ml_dtypes
import numpy as np
import pytest

import cbn
from cbn.kernels import engine

from .paths import KNOBS, LAYOUTS, PATH_SHAPES, THREADS, agree, in_memory_order

INPUTS = (
    np.float32,
    np.float64,
    np.float16,
    ml_dtypes.bfloat16,
    bool,
    np.int8,
    np.uint8,
    np.int16,
    np.uint16,
    np.int32,
)
OUTPUTS = (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)
ROUNDING = {np.float32: 4e-7, np.float64: 1e-15, np.float16: 2**-11 * 1.01, ml_dtypes.bfloat16: 2**-8 * 1.01}
OPTIONS = (
    {},
    {"clip": 1.5},
    {"clip": (-1.0, 0.5), "zero_var": "one", "eps": 0},
    {"eps_outside": True, "eps": 0.1},
    {"center": False, "eps": 0.01},
)


def values(rng, dtype, shape):
    if np.dtype(dtype).kind in "biu":
        info = (0, 1) if dtype is bool else (np.iinfo(dtype).min, min(np.iinfo(dtype).max, 1 << 30))
        return rng.integers(*info, shape, endpoint=True).astype(dtype)
    return (rng.standard_normal(shape) * 3 + 10).astype(dtype)


def exact(x, mean, var, axis, eps=1e-8, eps_outside=False, zero_var="eps", clip=None, center=True):
    """The same in float64, by the formulas of the docstring."""
    shape = [1] * x.ndim
    shape[axis] = -1
    divisor = np.sqrt(var) + eps if eps_outside else np.sqrt(var + eps)
    if zero_var == "one":
        divisor = np.where(var == 0, 1, divisor)
    y = (x.astype(np.float64) - (mean.reshape(shape) if center else 0)) / divisor.reshape(shape)
    return y if clip is None else np.clip(y, *(clip if isinstance(clip, tuple) else (-clip, clip)))


def statistics(rng, x, axis):
    """Not quite those of x, with a variance of 0."""
    rest = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    a = x.astype(np.float64)
    mean, var = a.mean(axis=rest) + 0.1, a.var(axis=rest) * 1.1 + 0.01
    return mean, var


@pytest.mark.parametrize("dtype", INPUTS)
@pytest.mark.parametrize("to", OUTPUTS)
def test_all_pairs_of_types(isa, parallel, rng, dtype, to):
    for shape, axis, order in LAYOUTS.values():
        x = in_memory_order(values(rng, dtype, shape), order)
        mean, var = statistics(rng, x, axis)
        for options in OPTIONS:
            y = cbn.standardize(x, mean, var, channel_axis=axis, dtype=to, **options)
            assert y.dtype == to
            agree(y, exact(x, mean, var, axis, **options), ROUNDING[to], isa, shape, options)
            if dtype == to:
                assert y.strides == x.strides


@pytest.mark.parametrize(("dtype", "to"), [(np.float32,) * 2, (np.uint8, np.float32), (np.int16, np.float16)])
@pytest.mark.parametrize("shape", PATH_SHAPES.values(), ids=PATH_SHAPES)
def test_paths(isa, parallel, rng, shape, dtype, to):
    """The same bits by every path, on any number of threads, in place and with an `out`."""
    x = values(rng, dtype, shape)
    mean, var = statistics(rng, x, 1)
    first = cbn.standardize(x, mean, var, channel_axis=1, clip=1.0, dtype=to)
    agree(first, exact(x, mean, var, 1, clip=1.0), ROUNDING[to])
    for knobs in KNOBS.values():
        engine.tune(**knobs)
        for threads in THREADS:
            out = np.empty(shape, to)
            with cbn.num_threads(threads):
                assert cbn.standardize(x, mean, var, channel_axis=1, clip=1.0, out=out) is out
            assert out.tobytes() == first.tobytes(), (threads, knobs)
    if dtype == to:
        assert cbn.standardize(x, mean, var, channel_axis=1, clip=1.0, out=x) is x
        assert x.tobytes() == first.tobytes()


def test_the_dtype_of_the_result(rng):
    for dtype in INPUTS:
        x = values(rng, dtype, (4, 3))
        kind = np.dtype(dtype).kind
        default = np.float64 if dtype is np.int32 else np.float32 if kind in "biu" else dtype
        assert cbn.standardize(x, 0, 1).dtype == default
        assert cbn.standardize(x, 0, 1, out=np.empty((4, 3))).dtype == np.float64
    assert cbn.standardize(np.zeros((4, 3)), 0, 1, dtype="bfloat16").dtype == ml_dtypes.bfloat16
    assert cbn.standardize(np.zeros((4, 3)), 0, 1, dtype=">f4").dtype.isnative


def test_shapes_and_numbers(rng):
    x = rng.standard_normal((4, 3))
    agree(cbn.standardize(x, 1, 4, eps=0), (x - 1) / 2, 1e-15)
    agree(cbn.standardize(x[0], [1, 2, 3], 4, eps=0), (x[0] - [1, 2, 3]) / 2, 1e-15)
    agree(cbn.standardize(x.tolist(), 0, [1, 4, 9], eps=0), x / [1, 2, 3], 1e-15)
    for shape in ((0, 3), (4, 0), (0,)):
        assert cbn.standardize(np.zeros(shape), 0, 1).shape == shape
    agree(cbn.standardize(x[::2, ::-1], [1, 2, 3], 1, eps=0), x[::2, ::-1] - [1, 2, 3], 1e-15)
    out = np.zeros((3, 4)).T
    cbn.standardize(x, 1, 1, eps=0, out=out)
    agree(out, x - 1, 1e-15)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_special_values(isa, dtype):
    x = np.array([[np.nan, np.inf, -np.inf, -0.0, 5.0]], dtype)
    y = cbn.standardize(x, 0, 1, eps=0, clip=2)
    assert np.array_equal(y, [[np.nan, 2, -2, 0, 2]], equal_nan=True)
    y = cbn.standardize(x, 7, 1, eps=0, center=False)
    assert np.array_equal(np.signbit(y), [[False, False, True, True, False]])
    constant = np.full((5, 2), 3.3, dtype)
    assert not cbn.standardize(constant, constant[0].astype(float), 0, zero_var="one").any()
    assert np.isnan(cbn.standardize(constant, 0, np.nan)).all()
    # A variance that float32 cannot hold: float64 arithmetic
    tiny, huge = np.array([[1e-30, 1e30]], dtype), np.array([1e-60, 1e60])
    agree(cbn.standardize(tiny, 0, huge, eps=0), [[1, 1]], 1e-6)


def test_overlapping_outputs(rng):
    memory = rng.standard_normal(40).astype(np.float32)
    x, out = memory[:36].reshape(9, 4), memory[4:].reshape(9, 4)
    expected = cbn.standardize(x.copy(), 1, 4)
    assert cbn.standardize(x, 1, 4, out=out) is out
    assert np.array_equal(out, expected)
    wide = np.zeros(40)
    narrow = wide.view(np.float32)[:20].reshape(5, 4)
    narrow[...] = rng.standard_normal((5, 4))
    expected = cbn.standardize(narrow.copy(), 1, 4, dtype=np.float64)
    assert np.array_equal(cbn.standardize(narrow, 1, 4, out=wide[:20].reshape(5, 4)), expected)


@pytest.mark.parametrize("dtype", INPUTS)
def test_of_running_moments(rng, dtype):
    """By the statistics of a stream, for observations of any shape and for images."""
    x = values(rng, dtype, (6, 5, 2, 3))
    for shape, axis in (((2, 3), None), (3, -1), (5, 1)):
        running = cbn.RunningMoments(shape, channel_axis=axis).update(x)
        for part in (x, x[0], x[:0]) if axis is None else (x,):
            for options in ({}, {"clip": 1.0}, {"center": False, "zero_var": "one", "eps": 0}):
                y = running.standardize(part, dtype=np.float64, **options)
                m = running.moments()
                if axis is None:
                    flat = part.reshape(*part.shape[:-2], 6)
                    expected = exact(flat, m.mean, m.var(), -1, **options).reshape(part.shape)
                else:
                    expected = exact(part, m.mean, m.var(), axis, **options)
                assert y.shape == part.shape
                if part.size:
                    agree(y, expected, 1e-14, shape, options)
                out = np.empty(part.shape)
                assert running.standardize(part, out=out, **options) is out
                assert np.array_equal(out, y)
    running = cbn.RunningMoments(()).update(x)
    agree(
        running.standardize(x, dtype=np.float64),
        exact(x.reshape(-1, 1), running.mean, running.var(), 1).reshape(x.shape),
        1e-14,
    )
    assert np.isnan(cbn.RunningMoments(3).standardize(np.zeros((2, 3)))).all()


def test_refusals(rng):
    x = np.zeros((2, 3))
    running = cbn.RunningMoments((2, 3)).update(rng.standard_normal((9, 2, 3)))
    for call, error, words in (
        (lambda: cbn.standardize(3.0, 1, 1), ValueError, "expected at least 1D input"),
        (lambda: cbn.standardize(x, [1, 2], 1), ValueError, r"mean has shape \(2,\); expected \(3,\)"),
        (lambda: cbn.standardize(x, 1, [[1, 2, 3]]), ValueError, r"var has shape \(1, 3\)"),
        (lambda: cbn.standardize(x, 1, [1, -2.5, 3]), ValueError, "var must not be negative, but got -2.5"),
        (lambda: cbn.standardize(x, np.zeros(3), -np.ones(3)), ValueError, "var must not be negative, but got -1"),
        (lambda: cbn.standardize(x, "a", 1), TypeError, "mean must be an array, not str"),
        (lambda: cbn.standardize(x, 1, 1, eps=-1), ValueError, "eps must be"),
        (lambda: cbn.standardize(x, 1, 1, eps=np.nan), ValueError, "eps must be"),
        (lambda: cbn.standardize(x, 1, 1, eps_outside=1), TypeError, "eps_outside must be a bool, not 1"),
        (lambda: cbn.standardize(x, 1, 1, center=None), TypeError, "center must be a bool, not None"),
        (lambda: cbn.standardize(x, 1, 1, zero_var=1), ValueError, "zero_var must be 'eps' or 'one', not 1"),
        (lambda: cbn.standardize(x, 1, 1, clip=-1), ValueError, "clip must not be negative, but got -1.0"),
        (lambda: cbn.standardize(x, 1, 1, clip=(1, 0)), ValueError, "the bounds of clip must be in order"),
        (
            lambda: cbn.standardize(x, 1, 1, clip="a"),
            TypeError,
            r"clip must be a number, \(low, high\) or None, not 'a'",
        ),
        (lambda: cbn.standardize(x, 1, 1, channel_axis=2), ValueError, "channel_axis 2 is out of range"),
        (lambda: cbn.standardize(x, 1, 1, dtype=int), TypeError, "dtype must be float32, float64, float16 or bfloat16"),
        (lambda: cbn.standardize(x, 1, 1, dtype="nonsense"), TypeError, "dtype must be float32"),
        (
            lambda: cbn.standardize(x, 1, 1, out=np.zeros((2, 3), int)),
            TypeError,
            "out has dtype int64; expected float32",
        ),
        (
            lambda: cbn.standardize(x, 1, 1, out=np.zeros((2, 4))),
            ValueError,
            r"out has shape \(2, 4\); expected \(2, 3\)",
        ),
        (
            lambda: cbn.standardize(x, 1, 1, out=np.zeros((2, 3)), dtype="f4"),
            TypeError,
            "out has dtype '<f8'; expected '<f4'",
        ),
        (lambda: cbn.standardize(x, 1, 1, out=[1]), TypeError, "out must be a numpy array, not list"),
        (lambda: cbn.standardize(x.astype(np.int64), 1, 1), TypeError, "input has dtype int64; expected"),
        (lambda: running.standardize(np.zeros((4, 3))), ValueError, r"shape \(4, 3\); expected \(..., 2, 3\)"),
        (lambda: running.standardize(x, clip=-1), ValueError, "clip must not be negative"),
        (lambda: cbn.RunningMoments(4, channel_axis=1).standardize(x), ValueError, "expected 4 features along axis 1"),
    ):
        with pytest.raises(error, match=words):
            call()
