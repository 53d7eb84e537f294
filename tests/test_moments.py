"""Moments: values, the exact merge, refusals."""

import numpy as np
import pytest

import cbn
from cbn import Moments, reference

from .paths import DTYPES, LAYOUTS, agree, in_memory_order


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_of_moments(isa, rng, layout, dtype):
    shape, axis, order = LAYOUTS[layout]
    x = in_memory_order((rng.standard_normal(shape) + 100).astype(dtype), order)
    m = cbn.moments(x, channel_axis=axis)
    n, mean, m2 = reference.moments(x, axis % x.ndim)
    assert np.array_equal(m.count, np.full(shape[axis], n))
    agree(m.mean, mean, 1e-14)
    agree(m.m2, m2, 1e-11)
    assert m.count.dtype == m.mean.dtype == m.m2.dtype == np.float64
    values = np.moveaxis(x.astype(np.float64), axis, 0).reshape(shape[axis], -1)
    np.testing.assert_allclose(m.var(), values.var(axis=1), rtol=1e-11)
    np.testing.assert_allclose(m.var(1), values.var(axis=1, ddof=1), rtol=1e-11)


def test_merge_is_the_moments_of_the_whole(rng):
    x = rng.standard_normal((100, 4)) + np.array([0, 1e3, 1e6, -5])
    parts = [cbn.moments(p) for p in np.split(x, [1, 10, 10, 50])]
    whole = cbn.moments(x)
    for merged in (Moments.merge(parts), sum(parts[1:], parts[0]), parts[0] + Moments.merge(parts[1:])):
        assert np.array_equal(merged.count, whole.count)
        np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-14, atol=1e-14)
        np.testing.assert_allclose(merged.m2, whole.m2, rtol=1e-9)


def test_merge_with_nothing():
    some = Moments(3, [1.0, 2.0], [4.0, 5.0])
    for merged in (some + Moments(0, [7.0, np.nan], [0, 0]), Moments(0, [7.0, np.nan], [0, 0]) + some):
        assert np.array_equal(merged.mean, some.mean)
        assert np.array_equal(merged.m2, some.m2)
    empty = cbn.moments(np.empty((0, 2), np.float32))
    assert np.array_equal(empty.count, [0, 0])
    assert np.isnan(empty.var()).all()
    assert np.array_equal((empty + empty).count, [0, 0])


def test_merge_of_infinite_means():
    """As the mean of all values would be."""
    a, b = Moments(2, [np.inf, 1.0], [np.nan, 0.0]), Moments(4, [-3.0, 1.0], [1.0, 0.0])
    for merged in (a + a, a + b, b + a):
        assert np.array_equal(merged.mean, [np.inf, 1.0])
        assert np.isnan(merged.m2[0])
    assert np.isnan((a + Moments(2, [-np.inf, 1.0], [np.nan, 0.0])).mean[0])


def test_variance_of_too_few():
    m = Moments(np.array([1.0, 2.0]), [0.0, 0.0], [0.0, 2.0])
    assert np.array_equal(m.var(1), [np.nan, 2.0], equal_nan=True)


def test_merge_gives_the_training_statistics(rng):
    """The one currency: moments of parts, merged, are those that a layer tracks."""
    x = rng.standard_normal((20, 3, 7)).astype(np.float32)
    bn = cbn.BatchNorm1d(3, momentum=1, dtype=np.float64)
    bn(x)
    m = cbn.moments(x[:9]) + cbn.moments(x[9:])
    np.testing.assert_allclose(bn.running_mean, m.mean, rtol=1e-12)
    np.testing.assert_allclose(bn.running_var, m.var(1), rtol=1e-12)


def test_what_moments_refuse():
    for arguments, words in (
        ((1, 1.0, 1.0), r"mean has shape \(\)"),
        ((1, [1.0], [1.0, 2.0]), r"m2 has shape \(2,\); expected \(1,\)"),
        (([1, 2, 3], [1.0], [1.0]), r"count has shape \(3,\)"),
        ((-1, [1.0], [1.0]), "count must not be negative"),
        ((np.nan, [1.0], [1.0]), "count must not be negative"),
        ((1, [1.0], [-1e-300]), "m2 must not be negative"),
    ):
        with pytest.raises(ValueError, match=words):
            Moments(*arguments)
    with pytest.raises(ValueError, match="moments of 1 and of 2 channels"):
        Moments(1, [0.0], [0.0]) + Moments(1, [0.0, 0.0], [0.0, 0.0])
    with pytest.raises(ValueError, match="no moments to merge"):
        Moments.merge([])
    with pytest.raises(TypeError):
        Moments(1, [0.0], [0.0]) + 1
    with pytest.raises(TypeError, match="expected Moments, not int"):
        Moments.merge([1])
    with pytest.raises(AttributeError):
        Moments(1, [0.0], [0.0]).mean = 1


def test_a_moment_owns_its_arrays():
    mean = np.zeros(2)
    m = Moments(1, mean, [1.0, 1.0])
    mean[:] = 5
    assert not m.mean.any()


def test_a_sum_of_a_list_and_the_standard_deviation(rng):
    parts = [rng.standard_normal((n, 3)) for n in (4, 1, 7)]
    merged, whole = sum(cbn.moments(x) for x in parts), cbn.moments(np.concatenate(parts))
    agree(merged.mean, whole.mean, 1e-14)
    agree(merged.m2, whole.m2, 1e-14)
    for correction in (0, 1):
        agree(whole.std(correction), np.concatenate(parts).std(axis=0, ddof=correction), 1e-14)
    assert np.isnan(cbn.moments(parts[1]).std(1)).all()
    with pytest.raises(TypeError):
        1 + whole


# ---- as bytes --------------------------------------------------------------------------------------------------------


def rows_of(m):
    return [m.count, m.mean, m.m2, m._low, *([] if m.min is None else [m.min, m.max])]


@pytest.mark.parametrize("extrema", [False, True])
def test_bytes_hold_every_bit_of_moments(rng, extrema):
    x = (rng.standard_normal((200, 3)) + np.array([0, 1e8, -3])).astype(np.float32)
    parts = [cbn.moments(p, extrema=extrema) for p in np.split(x, [1, 7, 7, 90])]  # one is empty
    for m in (*parts, sum(parts), cbn.moments(x[:, :0], extrema=extrema)):
        data = m.to_bytes()
        assert len(data) == 20 + (48 if extrema else 32) * m.mean.size
        for given in (data, bytearray(data), memoryview(data)):
            read = Moments.from_bytes(given)
            assert [a.tobytes() for a in rows_of(read)] == [a.tobytes() for a in rows_of(m)]
            assert read.to_bytes() == data
        (read + m).mean.sum()  # a whole object
        assert read.count.flags.writeable
        assert read.count.flags.owndata


def test_collected_bytes_merge_as_their_moments(rng):
    x = rng.standard_normal((64, 5)) + 1e6
    parts = [cbn.moments(p, extrema=True) for p in np.split(x, [3, 20])]
    merged = Moments.merge(Moments.from_bytes(m.to_bytes()) for m in parts)
    assert merged.to_bytes() == Moments.merge(parts).to_bytes()


def test_bytes_of_moments_that_are_not_finite(rng):
    x = rng.standard_normal((4, 3))
    x[1, 1] = np.nan
    data = cbn.moments(x).to_bytes()
    with pytest.raises(ValueError, match=r"not finite \(allow_nonfinite=True takes it\) in channel 1"):
        Moments.from_bytes(data)
    assert np.isnan(Moments.from_bytes(data, allow_nonfinite=True).mean).tolist() == [False, True, False]


def test_hostile_bytes_are_refused(rng):
    m = cbn.moments(rng.standard_normal((9, 4)), extrema=True)
    good = m.to_bytes()
    for data, words in (
        (b"", "the 0 bytes do not begin as those of Moments.to_bytes do"),
        (b"PK" + good[2:], "do not begin"),
        (good[:19], "do not begin"),
        (good[:-1], "moments of 4 channels have 212 bytes, but there are 211"),
        (good + b"\0", "but there are 213"),
        (good[:4] + b"\2" + good[5:], "version 2, and this version of cbn reads 1"),
        (good[:5] + b"\2" + good[6:], "version 1"),
        (good[:8] + b"\xff" * 8 + good[16:], "channels have"),
        (good[:40] + bytes([good[40] ^ 1]) + good[41:], "damaged"),
    ):
        with pytest.raises(ValueError, match=words):
            Moments.from_bytes(data)
    for data in (None, "text", 3, np.arange(8)[::2]):
        with pytest.raises(TypeError, match="data must be bytes-like and contiguous, not"):
            Moments.from_bytes(data)
    for name, value, words in (
        ("count", -1.0, "a negative count in channel 2"),
        ("m2", -1e-300, "a negative m2 in channel 2"),
        ("mean", 1e9, "a mean outside of min and max in channel 2"),
        ("_low", 1.0, "a mean with more digits than it can have in channel 2"),
        ("m2", np.inf, "not finite"),
    ):
        rows = {key: getattr(m, key).copy() for key in ("count", "mean", "m2", "_low", "min", "max")}
        rows[name][2] = value
        with pytest.raises(ValueError, match=words):
            Moments.from_bytes(Moments._of(*rows.values()).to_bytes())
    for byte in range(len(good)):  # no bit may pass unseen
        for bit in range(8):
            data = bytearray(good)
            data[byte] ^= 1 << bit
            with pytest.raises(ValueError, match=r"bytes|version"):
                Moments.from_bytes(data)
