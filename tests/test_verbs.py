"""The verbs by themselves, and steps with a merge between: parts of a batch give what the whole batch gives."""

import itertools
import re

import ml_dtypes
import numpy as np
import pytest

import cbn
from cbn import checks, reference, steps
from cbn.functional import (
    batch_norm,
    batch_norm_backward_elemt,
    batch_norm_backward_reduce,
    batch_norm_elemt,
    batch_norm_gather_stats_with_counts,
    batch_norm_stats,
    native_batch_norm,
    native_batch_norm_backward,
)
from cbn.inputs import as_input
from cbn.moments import GradMoments

from .paths import GRADIENT_LIMIT, INPUT_DTYPES, LAYOUTS, LIMIT, PARAMETERS, agree, in_memory_order

# Sums of 16-bit elements are float32 for a few of them, so those of parts and of the whole differ by its rounding
STATISTICS = {np.dtype(np.float32): 1e-13, np.dtype(np.float64): 1e-13}
MERGED = {np.dtype(np.float32): 2e-15, np.dtype(np.float64): 2e-15}  # what docs/numerics.md says of one call
HALF = 2.0**-23


def split(x, axis):
    """Six uneven parts along an axis that is not the channels', among them empty ones and one sample alone."""
    along = 1 if axis % x.ndim == 0 else 0
    n = x.shape[along]
    cuts = [0, 0, 1, max(1, n // 3), n - 1, n, n]
    at = [slice(None)] * x.ndim
    parts = []
    for begin, end in itertools.pairwise(cuts):
        at[along] = slice(begin, end)
        parts.append(tuple(at))
    return parts


def ulps(found, exact):
    """Largest difference in units of the last place, those near zero in units of an element of middling size."""
    exact = exact.astype(np.float64)
    bits = {"float32": 23, "float64": 52, "float16": 10, "bfloat16": 7}[found.dtype.name]
    size = np.maximum(np.abs(exact), np.sqrt(np.mean(exact * exact)))
    unit = 2.0 ** (np.floor(np.log2(np.maximum(size, 1e-300))) - bits)
    return np.max(np.abs(found.astype(np.float64) - exact) / unit, initial=0)


def same_to_the_last_place(found, exact):
    """To one unit; float64, which the statistics are handed over in too, to some of the largest value."""
    if found.dtype == np.float64:
        agree(found, exact, 1e-15)
    else:
        assert ulps(found, exact) <= 1


def arrays(rng, dtype, layout):
    shape, axis, order = LAYOUTS[layout]
    x = in_memory_order((2 * rng.standard_normal(shape) + 3).astype(dtype), order)
    dy = in_memory_order(rng.standard_normal(shape).astype(dtype), order)
    weight, bias = rng.standard_normal((2, shape[axis])).astype(PARAMETERS[dtype])
    return x, dy, weight, bias, axis


def joined(parts, x, of_part):
    whole = np.empty_like(x)
    for at in parts:
        whole[at] = of_part(at)
    return whole


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", INPUT_DTYPES)
def test_parts_together_are_the_whole_batch(isa, rng, dtype, layout):
    x, dy, weight, bias, axis = arrays(rng, dtype, layout)
    n_channels, parts = x.shape[axis], split(x, axis)
    limit = STATISTICS.get(x.dtype, HALF)
    running, expected_running = (np.stack([np.zeros(n_channels), np.ones(n_channels)]) for _ in range(2))
    y, save_mean, save_invstd = native_batch_norm(
        x, weight, bias, *expected_running, True, 0.1, 1e-5, channel_axis=axis
    )
    expected = native_batch_norm_backward(
        dy, x, weight, None, None, save_mean, save_invstd, True, 1e-5, channel_axis=axis
    )
    stats = [batch_norm_stats(x[at], 1e-5, channel_axis=axis) for at in parts]
    counts = [x[at].size // n_channels for at in parts]
    mean, invstd = batch_norm_gather_stats_with_counts(None, *zip(*stats, strict=True), *running, 0.1, 1e-5, counts)
    agree(mean, save_mean, limit)
    agree(invstd, save_invstd, limit)
    agree(running, expected_running, limit)
    found = joined(parts, x, lambda at: batch_norm_elemt(x[at], weight, bias, mean, invstd, 1e-5, channel_axis=axis))
    same_to_the_last_place(found, y)
    agree(found, reference.normalize(x, *batch_statistics(x, axis), weight, bias, 1e-5, axis % x.ndim), LIMIT[x.dtype])
    sums = [batch_norm_backward_reduce(dy[at], x[at], mean, invstd, weight, channel_axis=axis) for at in parts]
    sum_dy, sum_dy_xmu, dweight, dbias = (sum(of_part[i] for of_part in sums) for i in range(4))
    agree(dweight, expected[1], 4 * GRADIENT_LIMIT[np.dtype(PARAMETERS[dtype])])
    agree(dbias, expected[2], 4 * GRADIENT_LIMIT[np.dtype(PARAMETERS[dtype])])
    for count in (counts, sum(counts)):
        dx = joined(
            parts, x,
            lambda at, n=count: batch_norm_backward_elemt(
                dy[at], x[at], mean, invstd, weight, sum_dy, sum_dy_xmu, n, channel_axis=axis
            ),
        )  # fmt: skip
        same_to_the_last_place(dx, expected[0])


def batch_statistics(x, axis):
    n, mean, m2 = reference.moments(x, axis % x.ndim)
    return mean, m2 / n


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", INPUT_DTYPES)
def test_moments_of_parts_merge_without_a_loss(isa, rng, dtype, layout):
    x, _, _, _, axis = arrays(rng, dtype, layout)
    merged = cbn.Moments.merge([cbn.moments(x[at], channel_axis=axis) for at in split(x, axis)])
    n, mean, m2 = reference.moments(x.astype(np.longdouble), axis % x.ndim)
    limit = MERGED.get(x.dtype, HALF)
    agree(merged.mean, mean, limit)
    agree(merged.m2, m2, limit)
    assert set(merged.count) == {n}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", INPUT_DTYPES)
@pytest.mark.parametrize("slope", [1, 0, 0.25])
@pytest.mark.parametrize("with_residual", [False, True])
def test_steps_with_a_merge_between_are_the_fused_pass(rng, dtype, layout, slope, with_residual):
    """The four verbs where somebody stands between, the fused pass where nobody does."""
    x, dy, weight, bias, axis = arrays(rng, dtype, layout)
    z = in_memory_order(rng.standard_normal(x.shape).astype(dtype), LAYOUTS[layout][2]) if with_residual else None
    inp = as_input(x, axis)
    affine = steps.Affine(weight.astype(np.float64), bias.astype(np.float64))
    epilogue = steps.Epilogue(z, checks.Act(slope))
    y, context = steps.forward_batch(inp, affine, 1e-5, epilogue, None)
    found_y, found_context = steps.forward_batch(inp, affine, 1e-5, epilogue, None, merge=lambda moments: moments)
    assert ulps(found_y, y) <= 1
    agree(found_context.mean, context.mean, 1e-15)
    assert set(np.broadcast_to(found_context.count, inp.n_channels)) == {inp.count}
    expected = steps.backward(dy, context, True, True, None)
    found = steps.backward(dy, context, True, True, None, merge=lambda sums: sums)
    case = dtype, layout, slope, with_residual
    assert ulps(found.dx, expected.dx) <= 1, case
    for name in ("dresidual", "dweight", "dbias"):
        assert (getattr(found, name) is None) == (getattr(expected, name) is None), case
        if getattr(found, name) is not None:
            assert np.array_equal(getattr(found, name), getattr(expected, name)), (name, case)


def test_a_merge_over_two_parts_one_of_them_empty(rng):
    """As two ranks would call it, one of which has no data: the merge is called on both, and both have its result."""
    x, dy = rng.standard_normal((2, 6, 3))
    parts = [slice(0, 6), slice(6, 6)]
    inputs = [as_input(x[at], 1) for at in parts]
    affine = steps.Affine(None, None)
    total = cbn.Moments.merge([cbn.moments(x[at]) for at in parts])
    called = []

    def merge(moments):
        called.append(moments.count[0])
        return total

    y, context = steps.forward_batch(steps_input := inputs[0], affine, 1e-5, steps.NO_EPILOGUE, None, merge=merge)
    empty, empty_context = steps.forward_batch(inputs[1], affine, 1e-5, steps.NO_EPILOGUE, None, merge=merge)
    assert called == [6, 0]
    assert empty.shape == (0, 3)
    assert np.array_equal(context.invstd, empty_context.invstd)
    expected, whole = steps.forward_batch(steps_input, affine, 1e-5, steps.NO_EPILOGUE, None)
    agree(y, expected, 1e-15)
    sums = steps.measure_gradients(dy, whole) + steps.measure_gradients(dy[:0], empty_context)
    assert isinstance(sums, GradMoments)
    called.clear()

    def merge_gradients(part):
        called.append(part.count[0])
        return sums

    dx, _, dweight, _ = steps.backward(dy, context, True, True, None, merge=merge_gradients)
    nothing, _, no_dweight, _ = steps.backward(dy[:0], empty_context, True, True, None, merge=merge_gradients)
    assert called == [6, 0]
    assert nothing.shape == (0, 3)
    assert not no_dweight.any()
    exact = steps.backward(dy, whole, True, True, None)
    agree(dx, exact.dx, 1e-15)
    agree(dweight, exact.dweight, 1e-15)


def test_out_activation_residual_and_a_dy_of_another_dtype(rng):
    x, z, dy = rng.standard_normal((3, 4, 5, 6)).astype(np.float32)
    mean, invstd = batch_norm_stats(x, 1e-5)
    out = np.empty_like(x)
    y = batch_norm_elemt(x, None, None, mean, invstd, 1e-5, out=out, activation="relu", residual=z)
    assert y is out
    agree(y, batch_norm(x, None, None, training=True, activation="relu", residual=z), 1e-7)
    sums = batch_norm_backward_reduce(dy.astype(np.float64), x, mean, invstd, None)
    dx = batch_norm_backward_elemt(dy.astype(np.float64), x, mean, invstd, None, *sums[:2], 24, out=out)
    assert dx is out
    expected = native_batch_norm_backward(dy.astype(np.float64), x, None, None, None, mean, invstd, True, 1e-5)
    assert np.array_equal(dx, expected[0])
    assert np.array_equal(sums[2], expected[1])
    assert [s is None for s in batch_norm_backward_reduce(dy, x, mean, invstd, None, False, True, False)] == [
        True, True, False, True,
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_gradients_beyond_float32_are_computed_in_float64(isa, rng, dtype):
    """Coefficients that float32 cannot hold, or products that would overflow in it: those of the fused pass."""
    x = rng.standard_normal((40, 12)).astype(dtype)
    x[:, ::3] *= 1e36
    x[:, 1::3] *= dtype(1e-30)
    dy = rng.standard_normal(x.shape).astype(dtype)
    y, mean, invstd = native_batch_norm(x, None, None, None, None, True, 0.1, 1e-300)
    expected = native_batch_norm_backward(dy, x, None, None, None, mean, invstd, True, 1e-300)[0]
    sums = batch_norm_backward_reduce(dy, x, mean, invstd, None)
    found = batch_norm_backward_elemt(dy, x, mean, invstd, None, *sums[:2], len(x))
    assert np.isfinite(expected.astype(np.float64)).all()
    assert np.array_equal(found, expected)
    assert np.array_equal(batch_norm_elemt(x, None, None, mean, invstd, 1e-300), y)


def test_empty_parts_alone_change_nothing():
    x = np.zeros((0, 3), np.float32)
    mean, invstd = batch_norm_stats(x, 1e-5)
    assert not mean.any()
    assert not invstd.any()
    running = np.ones((2, 3))
    found = batch_norm_gather_stats_with_counts(None, [mean], [invstd], *running, 0.1, 1e-5, [0])
    assert not np.any(found)
    assert (running == 1).all()
    assert batch_norm_elemt(x, None, None, mean, invstd, 1e-5).shape == (0, 3)
    assert batch_norm_backward_elemt(x, x, mean, invstd, None, mean, mean, 0).shape == (0, 3)


REFUSED = {
    "one row": ("mean has shape (3,); expected (K, C), one row for each part", {"mean": np.zeros(3)}),
    "no part": ("mean has shape (0, 3); expected (K, C), one row for each part", {"mean": np.zeros((0, 3))}),
    "invstd": ("invstd has shape (2, 4); expected (2, 3), as mean", {"invstd": np.zeros((2, 4))}),
    "counts": ("counts has shape (3,); expected (2,), one for each part", {"counts": [1, 2, 3]}),
    "negative": ("counts must be finite and not negative, but got [5.0, -1.0]", {"counts": [5, -1]}),
    "one value": ("Expected more than 1 value per channel when training, got counts [1.0, 0.0]", {"counts": [1, 0]}),
    "momentum": ("momentum must be", {"momentum": 2}),
    "eps": ("eps must be", {"eps": -1}),
    "channels": ("running_mean should contain 3 elements not 2", {"running_mean": np.zeros(2)}),
    "one of two": ("running_mean and running_var must either both be None or neither", {"running_var": None}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_gather_refuses(case):
    words, changed = REFUSED[case]
    arguments = {
        "x": None, "mean": np.zeros((2, 3)), "invstd": np.ones((2, 3)), "running_mean": np.zeros(3),
        "running_var": np.ones(3), "momentum": 0.1, "eps": 1e-5, "counts": [2, 3],
    } | changed  # fmt: skip
    before = [None if a is None else a.copy() for a in (arguments["running_mean"], arguments["running_var"])]
    with pytest.raises(ValueError, match=re.escape(words)):
        batch_norm_gather_stats_with_counts(**arguments)
    for a, old in zip((arguments["running_mean"], arguments["running_var"]), before, strict=True):
        assert a is None or np.array_equal(a, old)


def test_what_the_others_refuse():
    x, v = np.ones((2, 3), np.float32), np.ones(3)
    for call, error, words in (
        (lambda: batch_norm_stats(x, 0.0), ValueError, "eps must be positive"),
        (lambda: batch_norm_elemt(x, None, None, v[:2], v, 1e-5), ValueError, "mean should contain 3 elements not 2"),
        (lambda: batch_norm_elemt(x, None, None, None, v, 1e-5), TypeError, "mean must be an array, not None"),
        (lambda: batch_norm_elemt(x, None, None, v, None, 1e-5), TypeError, "invstd must be an array, not None"),
        (lambda: batch_norm_backward_reduce(x[:1], x, v, v, None), ValueError, "dy has shape (1, 3); expected (2, 3)"),
        (lambda: batch_norm_backward_reduce(x, x, v, v, None, 1), TypeError, "input_g must be"),
        (lambda: batch_norm_backward_elemt(x, x, v, v, None, v, v, 0), ValueError, "count is 0, and x has values"),
        (lambda: batch_norm_backward_elemt(x, x, v, v, None, v, v, [-1]), ValueError, "count must be finite and not"),
        (
            lambda: batch_norm_backward_elemt(x, x, v, v, None, None, v, 2),
            TypeError,
            "sum_dy must be an array, not None",
        ),
        (lambda: batch_norm_backward_elemt(x, x, v, v, None, v, v, 2, out=v), TypeError, "out has dtype"),
    ):
        with pytest.raises(error) as caught:
            call()
        assert words in str(caught.value)


def test_a_channel_that_is_infinite_or_nan_is_so_in_parts_too():
    x = np.array([[1.0, np.nan], [2.0, 3.0], [4.0, 5.0]], np.float32)
    stats = [batch_norm_stats(x[:1], 1e-5), batch_norm_stats(x[1:], 1e-5)]
    mean, invstd = batch_norm_gather_stats_with_counts(None, *zip(*stats, strict=True), None, None, 0.1, 1e-5, [1, 2])
    assert np.isnan(mean[1])
    assert np.isnan(invstd[1])
    agree(mean[:1], [7 / 3], 1e-15)
