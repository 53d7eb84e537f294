"""RunningMoments: updates, merges, atomicity, state and files, refusals."""

import copy
import io
import os
import pickle
import signal
import threading
import warnings

import ml_dtypes
import numpy as np
import pytest

import cbn
from cbn import RunningMoments

from .paths import THREADS

MEASURED = (np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.uint8, np.int16, np.int32, np.bool_)
ARGUMENTS = [{}, {"extrema": True}, {"skipna": True}, {"skipna": True, "extrema": True}]


def rows(running):
    found = [running.count, running.mean, running.var() * running.count]
    return found + ([running.min, running.max] if running.extrema else [])


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize("dtype", MEASURED)
def test_an_update_is_the_merge_of_moments(rng, dtype, arguments):
    """To the last bit, for any leading axes and memory order, in the compiled step and in Python's."""
    running, merged = RunningMoments((2, 3), **arguments), RunningMoments((2, 3), **arguments)
    for leading in ((), (1,), (5,), (4, 7), (0,), (300,)):
        for transposed in (False, True):
            x = (rng.standard_normal((*leading, 2, 3)) * 3 + 5).astype(dtype)
            if transposed:
                x = np.ascontiguousarray(x.T).T
            if arguments.get("skipna") and np.dtype(dtype).kind not in "biu":
                x[rng.random(x.shape) < 0.2] = np.nan
            assert running.update(x) is running
            flat = np.ascontiguousarray(x).reshape(-1, 6)
            merged.merge(cbn.moments(flat, **arguments))
            assert np.array_equal(running._rows(), merged._rows()), (leading, transposed)


def test_an_update_of_images(rng):
    running = RunningMoments(3, channel_axis=1, extrema=True)
    parts = [rng.integers(0, 255, (n, 3, 9, 8), dtype=np.uint8) for n in (4, 1, 6)]
    for x in parts:
        running.update(x)
    whole = np.concatenate(parts).astype(float)
    np.testing.assert_allclose(running.mean, whole.mean(axis=(0, 2, 3)), rtol=1e-14)
    np.testing.assert_allclose(running.var(), whole.var(axis=(0, 2, 3)), rtol=1e-13)
    assert np.array_equal(running.max, whole.max(axis=(0, 2, 3)))
    assert running.count[0] == whole.size / 3


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_merges_are_the_statistics_of_one_array(rng, dtype):
    x = (rng.standard_normal((5000, 7)) * [1, 5, 1, 0.1, 1, 9, 1] + [0, 3, 1000, 1e4, 1e6, 0, 7]).astype(dtype)
    whole = cbn.moments(x)
    running = RunningMoments(7)
    for part in np.array_split(x, 37):
        running.update(part)
    np.testing.assert_allclose(running.mean, whole.mean, rtol=1e-15, atol=1e-15)
    np.testing.assert_allclose(running.var(), whole.var(), rtol=2e-15)


def test_threads_change_no_bit(parallel, rng):
    x = rng.standard_normal((3000, 50)).astype(np.float32)
    first = None
    for threads in THREADS:
        with cbn.num_threads(threads):
            found = RunningMoments(50, extrema=True, skipna=True).update(x)._rows()
        first = found if first is None else first
        assert np.array_equal(found, first), threads


def test_masks_and_weights(rng):
    x, weights = rng.standard_normal((20, 4, 3)), rng.random(20)
    for mask in (None, rng.random((20, 4)) < 0.5, rng.random((20, 4, 3)) < 0.5, rng.random((20, 1)) < 0.5):
        of_values = None if mask is None else np.expand_dims(mask, -1) if mask.ndim == 2 else mask
        every = np.broadcast_to(weights[:, None, None] * (1 if of_values is None else of_values), x.shape)
        running = RunningMoments(3).update(x, mask=mask, weights=weights)
        count, mean, m2, *_ = cbn.reference.counted_moments(x, every, False, 2)
        for found, exact in zip(rows(running), (count, mean, m2), strict=True):
            np.testing.assert_allclose(found, exact, rtol=1e-13, atol=1e-15)
    single = RunningMoments(3)
    single.update(np.ones(3), mask=np.array(False)).update(np.ones(3), mask=np.array([True, False, True]))
    assert np.array_equal(single.count, [1, 0, 1])


def test_a_prior_is_what_was_seen_before():
    """As gymnasium and stable-baselines3 start: mean 0, variance 1, count 1e-4."""
    x = np.array([[1.0, 4.0], [3.0, 4.0]])
    running = RunningMoments(2, prior=(0, 1, 1e-4)).update(x)
    n = 2 + 1e-4
    mean = x.sum(axis=0) / n
    m2 = 1e-4 + x.var(axis=0) * 2 + x.mean(axis=0) ** 2 * 2 * 1e-4 / n
    np.testing.assert_allclose(running.mean, mean, rtol=1e-15)
    np.testing.assert_allclose(running.var(), m2 / n, rtol=1e-14)
    running.reset()
    assert np.array_equal(running.var(), [1, 1])
    assert running.count[0] == 1e-4
    vectors = RunningMoments((2, 2), prior=(np.arange(4).reshape(2, 2), [1, 2], 3))
    assert np.array_equal(vectors.mean, [[0, 1], [2, 3]])
    assert np.array_equal(vectors.var(), [[1, 2], [1, 2]])


def test_before_anything_is_seen():
    running = RunningMoments((), extrema=True)
    assert running.count.shape == running.mean.shape == running.var().shape == ()
    assert np.isnan(running.var())
    assert (running.min, running.max) == (np.inf, -np.inf)
    running.update(3.0).update([1.0, 2.0])
    assert (running.count, running.mean, running.min, running.max) == (3, 2, 1, 3)


def test_what_is_read_is_a_snapshot(rng):
    running = RunningMoments(2, extrema=True).update(rng.standard_normal((5, 2)))
    moments, mean = running.moments(), running.mean
    running.update(rng.standard_normal((5, 2)) + 9)
    assert not np.array_equal(moments.mean, running.mean)
    assert np.array_equal(moments.mean, mean)
    mean[...] = 99
    assert not (running.mean == 99).any()
    assert np.array_equal((moments + moments).count, [10, 10])


def test_copies_pickles_and_files(rng, tmp_path):
    for arguments in ({}, {"extrema": True, "skipna": True}, {"prior": (0, [1.0, 2.0], 1e-4)}, {"channel_axis": 1}):
        running = RunningMoments(2, **arguments)
        x = rng.standard_normal((6, 2))
        running.update(x)
        for path in ("moments.npz", "moments.safetensors"):
            running.save(tmp_path / path)
        others = [copy.copy(running), copy.deepcopy(running), pickle.loads(pickle.dumps(running))]
        others += [cbn.load(tmp_path / "moments.npz"), cbn.load(tmp_path / "moments.safetensors")]
        fresh = RunningMoments(2, **arguments)
        fresh.load_state_dict(running.state_dict())
        for other in (*others, fresh):
            assert repr(other) == repr(running)
            assert np.array_equal(other._rows(), running._rows())
            other.update(x)
            assert not np.array_equal(other._rows(), running._rows())
            other.reset()
            assert np.array_equal(other._rows(), RunningMoments(2, **arguments)._rows())


def test_an_empty_stream_survives_a_file():
    file = io.BytesIO()
    RunningMoments((2, 2), extrema=True).save(file)
    assert (cbn.load(io.BytesIO(file.getvalue())).min == np.inf).all()


def test_files_that_are_refused(rng):
    running = RunningMoments(2).update(np.array([[np.nan, 1.0]]))
    file = io.BytesIO()
    with pytest.raises(ValueError, match="mean is not finite"):
        running.save(file)
    assert not file.getvalue()
    running.save(file, allow_nonfinite=True)
    with pytest.raises(ValueError, match="mean is not finite"):
        cbn.load(io.BytesIO(file.getvalue()))
    assert np.isnan(cbn.load(io.BytesIO(file.getvalue()), allow_nonfinite=True).mean[0])
    good = io.BytesIO()
    RunningMoments(2).save(good)
    for old, new in (
        (b'"shape": [2]', b'"shape": [3]'),
        (b'"skipna"', b'"skipnb"'),
        (b'"extrema": f', b'"extrema": t'),
    ):
        content = good.getvalue()
        old, new = ("".join(chr(b) for b in part).encode("utf-32-le") for part in (old, new))
        assert content.count(old) == 1
        with pytest.raises(ValueError, match="is not a layer"):
            cbn.load(io.BytesIO(content.replace(old, new)))


def test_a_state_is_taken_over_whole_or_not_at_all(rng):
    running = RunningMoments(2, extrema=True).update(rng.standard_normal((5, 2)))
    before, good = running._rows(), running.state_dict()
    for state, words in (
        ({**good, "mean": [1.0]}, r"mean has shape \(1,\); expected \(2,\)"),
        ({**good, "m2": [1.0, -1.0], "count": [-1, 2]}, "count is negative; m2 is negative"),
        ({**good, "mean": [1.0, np.inf]}, "mean is not finite"),
        ({**good, "std": 1}, "unexpected entry 'std'"),
        ({"mean": good["mean"]}, "missing entry 'count', missing entry 'm2'"),
        ({**good, "mean_low": [np.nan, 1.0]}, "mean_low is not finite"),
    ):
        with pytest.raises(ValueError, match=words):
            running.load_state_dict(state)
        assert np.array_equal(running._rows(), before)
    with pytest.raises(TypeError, match="state must be a mapping"):
        running.load_state_dict([1])


def test_refusals(rng):
    running = RunningMoments((2, 3), extrema=True).update(rng.standard_normal((4, 2, 3)))
    before = running._rows()
    x = np.zeros((4, 2, 3))
    for call, error, words in (
        (lambda: running.update(np.zeros((4, 3, 2))), ValueError, r"shape \(4, 3, 2\); expected \(..., 2, 3\)"),
        (lambda: running.update(np.zeros(3)), ValueError, r"shape \(3,\); expected"),
        (lambda: running.update(x.astype(np.int64)), TypeError, "dtype int64; expected"),
        (lambda: running.update(np.ma.array(x)), TypeError, "masked array"),
        (lambda: running.update(None), TypeError, "input must be an array, not None"),
        (lambda: running.update(x, mask=np.ones(3, bool)[:, None, None, None]), ValueError, "mask has shape"),
        (lambda: running.update(x, weights=[1, 2]), ValueError, r"weights has shape \(2,\); expected \(4,\)"),
        (lambda: running.merge(1), TypeError, "expected RunningMoments or Moments, not int"),
        (lambda: running.merge(RunningMoments(6)), ValueError, r"moments of shapes \(2, 3\) and \(6,\)"),
        (lambda: running.merge(cbn.moments(np.zeros((2, 5)))), ValueError, "moments of 6 and of 5 features"),
        (lambda: running.merge(cbn.moments(np.zeros((2, 6)))), ValueError, "have no min and max"),
        (lambda: RunningMoments(0), ValueError, "shape must have sizes of 1 or more, but got 0"),
        (lambda: RunningMoments(2.5), TypeError, "shape must be an integer or a tuple of integers, not 2.5"),
        (lambda: RunningMoments((2, -1)), ValueError, "shape must not have negative sizes"),
        (lambda: RunningMoments((2, 2), channel_axis=1), ValueError, "shape must be a number of channels"),
        (lambda: RunningMoments(2, prior=(0, 1)), TypeError, r"prior must be \(mean, var, count\)"),
        (lambda: RunningMoments(2, prior=(0, -1, 1)), ValueError, "prior's var must be finite and not negative"),
        (lambda: RunningMoments(2, prior=([0, 1, 2], 1, 1)), ValueError, r"prior's mean has shape \(3,\)"),
        (lambda: RunningMoments(2, channel_axis=0).update(x), ValueError, "expected 2 features along axis 0"),
    ):
        with pytest.raises(error, match=words):
            call()
        assert np.array_equal(running._rows(), before)


def test_updates_of_many_threads_are_all_there(rng):
    """Some of them large enough to go without the GIL."""
    running = RunningMoments(40, extrema=True)
    parts = [rng.standard_normal((n, 40)) for n in (3, 2000, 17)]
    torn = []

    def update():
        for i in range(60):
            running.update(parts[i % 3])

    def read():
        for _ in range(300):
            m = running.moments()
            if not (m.count == m.count[0]).all():
                torn.append(m.count)

    threads = [threading.Thread(target=f) for f in (update, update, update, read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not torn
    assert (running.count == 3 * 20 * (3 + 2000 + 17)).all()
    whole = np.concatenate(parts)
    np.testing.assert_allclose(running.mean, whole.mean(axis=0), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(running.var(), whole.var(axis=0), rtol=1e-12)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timer")
def test_a_signal_sees_all_of_an_update(rng):
    running = RunningMoments(200)
    seen = []
    old = signal.signal(signal.SIGALRM, lambda *_: seen.append(np.unique(running.count).size))
    signal.setitimer(signal.ITIMER_REAL, 1e-3, 1e-3)
    try:
        x = rng.standard_normal((50, 200))
        while len(seen) < 20:
            running.update(x)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert set(seen) == {1}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_after_a_fork(rng):
    running = RunningMoments(3).update(rng.standard_normal((500, 3)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a package of another test may dislike forks
        pid = os.fork()
    if pid == 0:
        running.update(np.ones((50_000, 3), np.float32))
        os._exit(0 if running.count[0] == 50_500 else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert running.count[0] == 500
