"""Properties over drawn shapes, axes, strides and views: whatever comes, the reference agrees."""

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cbn
from cbn import reference
from cbn.functional import native_batch_norm, native_batch_norm_backward

from .paths import agree

settings.register_profile("cbn", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.load_profile("cbn")


@st.composite
def views(draw, min_side=1, max_side=7):
    """A float array seen through any order of axes, steps, reversals and broadcasts; and a channel axis."""
    rank = draw(st.integers(2, 5))
    shape = draw(st.lists(st.integers(min_side, max_side), min_size=rank, max_size=rank))
    steps = draw(st.lists(st.sampled_from([1, 1, 1, 2, 3, -1, -2]), min_size=rank, max_size=rank))
    order = draw(st.permutations(range(rank)))
    dtype = draw(st.sampled_from([np.float32, np.float64, np.dtype(">f4"), np.dtype(">f8")]))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    full = [max(1, n * abs(s)) for n, s in zip(shape, steps, strict=True)]
    base = (rng.standard_normal([full[i] for i in order]) * 3 + 7).astype(dtype).transpose(np.argsort(order))
    view = base[tuple(slice(None, None, s) for s in steps)][tuple(slice(n) for n in shape)]
    if draw(st.booleans()) and min_side:
        axis = draw(st.integers(0, rank - 1))
        view = np.broadcast_to(view[(slice(None),) * axis + (slice(1),)], shape)
    return view, draw(st.integers(-rank, rank - 1)), seed


def compare(x, axis, seed, out):
    axis_index = axis % x.ndim
    rng = np.random.default_rng(seed)
    weight, bias = rng.standard_normal((2, x.shape[axis]))
    weight, bias = weight.astype(x.dtype), bias.astype(x.dtype)
    n, mean, m2 = reference.moments(x, axis_index)
    limit = 1e-6 if x.dtype.itemsize == 4 else 1e-12
    y, *saved = native_batch_norm(x, weight, bias, None, None, True, 0.1, 1e-5, channel_axis=axis, out=out)
    assert y.dtype == x.dtype.newbyteorder("=")
    agree(y, reference.normalize(x, mean, m2 / n, weight, bias, channel_axis=axis_index), limit)
    dy = rng.standard_normal(x.shape).astype(y.dtype)
    dx, dweight, dbias = native_batch_norm_backward(
        dy, x, weight, None, None, *saved, True, 1e-5, channel_axis=axis, out=None if out is None else dy
    )
    dy = np.random.default_rng(seed)
    dy.standard_normal((2, x.shape[axis]))
    dy = dy.standard_normal(x.shape).astype(y.dtype)
    exact = reference.backward(dy, x, mean, m2 / n, weight, channel_axis=axis_index)
    # A gradient through few values is what rounding leaves of large terms: measure it by these.
    scale = (np.abs(dy).max() + 1) * (np.abs(weight).max() + 1) / np.sqrt((m2 / n).min() + 1e-5) * n
    for a, e in zip((dx, dweight, dbias), exact, strict=True):
        assert np.abs(a - e).max() <= 10 * limit * scale
    y = cbn.functional.batch_norm(x, mean, m2 / n, weight, bias, channel_axis=axis)
    agree(y, reference.normalize(x, mean, m2 / n, weight, bias, channel_axis=axis_index), limit)
    return y


@settings(max_examples=400)
@given(views(), st.booleans())
def test_any_view(drawn, with_out):
    x, axis, seed = drawn
    if x.size == x.shape[axis]:
        return
    before = x.copy()
    compare(x, axis, seed, np.full(x.shape, np.nan, x.dtype.newbyteorder("=")) if with_out else None)
    assert np.array_equal(x, before)


@settings(max_examples=100)
@given(views(min_side=0, max_side=2), st.booleans())
def test_empty_arrays(drawn, training):
    x, axis, _ = drawn
    if x.size:
        return
    n_channels = x.shape[axis]
    mean, var = np.full(n_channels, 2.0), np.full(n_channels, 3.0)
    y, *saved = native_batch_norm(x, None, None, mean, var, training, 0.1, 1e-5, channel_axis=axis)
    assert y.shape == x.shape
    assert (mean == 2).all()
    assert (var == 3).all()
    dx, dweight, dbias = native_batch_norm_backward(
        x, x, None, mean, var, *(saved if training else (None, None)), training, 1e-5, channel_axis=axis
    )
    assert dx.shape == x.shape
    assert not dweight.any()
    assert not dbias.any()
    assert np.array_equal(cbn.moments(x, channel_axis=axis).count, np.zeros(n_channels))


@settings(max_examples=100)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=6), st.integers(0, 2**32 - 1), st.floats(-1e6, 1e6))
def test_moments_merge_in_any_parts(lengths, seed, offset):
    x = np.random.default_rng(seed).standard_normal((sum(lengths), 3)) + offset
    parts = [cbn.moments(p) for p in np.split(x, np.cumsum(lengths)[:-1])]
    merged, whole = cbn.Moments.merge(parts), cbn.moments(x)
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(merged.m2, whole.m2, rtol=1e-8, atol=1e-8)
