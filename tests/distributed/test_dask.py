"""`cbn.dask`: values, chunks of every kind, the same bits on every scheduler, a worker that dies, xarray, refusals."""

import os
import signal
import time

import numpy as np
import pytest

import cbn
from tests.peers import peer

dask = peer("dask")
da = peer("dask.array")
import cbn.dask  # noqa: E402

CHUNKS = ((9, 6, 4, 5), (2, 3, 4, 5), (4, 6, 1, 2), (1, 1, 4, 5), ((2, 0, 7), (1, 5), 4, (3, 2)))


def array(rng, dtype="float32"):
    return (rng.standard_normal((9, 6, 4, 5)) * 3 + np.arange(6).reshape(6, 1, 1) * 100).astype(dtype)


def agree(found, expected, limit):
    scale = np.nanmax(np.abs(expected), initial=1)
    np.testing.assert_allclose(found, expected, rtol=limit, atol=limit * scale)


@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
@pytest.mark.parametrize("axis", [1, -1])
def test_moments_of_chunks(rng, chunks, axis):
    x = array(rng)
    x[0, 2, 1, 1] = np.nan
    for options in ({}, {"skipna": True, "extrema": True}):
        found = cbn.dask.moments(da.from_array(x, chunks=chunks), channel_axis=axis, **options)
        assert not isinstance(found, cbn.Moments)  # lazy
        found, expected = found.compute(), cbn.moments(x, channel_axis=axis, **options)
        for name in ("count", "mean", "m2"):
            agree(getattr(found, name), getattr(expected, name), 1e-12)
        assert (found.min is None) == (not options)
        for name in ("min", "max") if options else ():
            assert np.array_equal(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize("n", [1, 16, 17, 33, 257])
def test_every_chunk_is_merged(n):
    x = np.arange(2.0 * n).reshape(n, 2)
    m = cbn.dask.moments(da.from_array(x, chunks=(1, 2))).compute()
    assert (m.count == n).all()
    agree(m.mean, x.mean(0), 1e-12)


@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_batch_norm_of_chunks(rng, chunks, dtype):
    x = array(rng, dtype)
    bn = cbn.BatchNorm(6, activation="relu")
    bn.weight[:] = rng.uniform(0.5, 2, 6)
    bn.running_mean[:], bn.running_var[:] = np.arange(6) * 100, 9
    lazy = da.from_array(x, chunks=chunks)
    before = {name: a.copy() for name, a in bn.state_dict().items()}
    trained = cbn.dask.batch_norm(lazy, bn)
    assert (trained.shape, trained.dtype, trained.chunks) == (lazy.shape, lazy.dtype, lazy.chunks)
    trained = trained.compute()
    assert all(np.array_equal(a, before[name]) for name, a in bn.state_dict().items())
    later = cbn.dask.batch_norm(lazy, bn.eval())
    expected = bn(x)
    bn.running_mean[:] = 0  # after the call: it does not see that
    assert np.array_equal(later.compute(), expected)
    bn.running_mean[:] = before["running_mean"]
    limit = {"float32": 1e-6, "float64": 1e-12, "float16": 1e-3}[dtype]
    agree(trained, bn.train()(x), limit)


def test_standardize_of_chunks(rng):
    x = rng.integers(0, 255, (40, 7), np.uint8)
    m = cbn.moments(x)
    expected = cbn.standardize(x, m.mean, m.var(1), eps=0, clip=2, dtype="float64")
    for chunks in ((40, 7), (6, 2)):
        lazy = da.from_array(x, chunks=chunks)
        for given in (None, m, cbn.dask.moments(lazy)):
            found = cbn.dask.standardize(lazy, given, correction=1, eps=0, clip=2, dtype="float64")
            assert (found.dtype, found.chunks) == (np.float64, lazy.chunks)
            agree(found.compute(), expected, 1e-12)


def test_many_chunks_have_the_same_bits_on_every_scheduler(rng):
    x = rng.standard_normal((2000, 8)) + 1e6
    lazy = da.from_array(x, chunks=(4, 4))  # 1,000
    assert lazy.npartitions == 1000
    found = [cbn.dask.moments(lazy).compute(scheduler=s, num_workers=n) for s, n in
             (("synchronous", 1), ("threads", 2), ("threads", 8))]  # fmt: skip
    assert len({m.to_bytes() for m in found}) == 1
    agree(found[0].mean, x.mean(0), 1e-12)
    agree(found[0].m2, ((x - x.mean(0)) ** 2).sum(0), 1e-12)


def test_a_data_array_keeps_its_names(rng):
    xarray = peer("xarray")
    x = array(rng)
    named = xarray.DataArray(
        da.from_array(x, chunks=(3, 2, 4, 5)),
        dims=("time", "band", "y", "x"),
        coords={"band": list("abcdef")},
        attrs={"units": "K"},
    )
    bn = cbn.BatchNorm(6)
    for found, expected in (
        (cbn.dask.batch_norm(named, bn), bn(x)),
        (cbn.dask.standardize(named, channel_axis="band"),
         cbn.standardize(x, (m := cbn.moments(x)).mean, m.var(), channel_axis=1)),
    ):  # fmt: skip
        assert (found.dims, found.attrs, list(found.band.values)) == (named.dims, named.attrs, list("abcdef"))
        agree(found.values, expected, 1e-6)
    agree(cbn.dask.moments(named, channel_axis="band").compute().mean, cbn.moments(x).mean, 1e-12)


def test_refusals(rng):
    lazy = da.from_array(array(rng), chunks=3)
    unknown = lazy[lazy[:, 0, 0, 0] > 0]
    for call, kind, words in (
        (lambda: cbn.dask.moments(np.zeros((2, 2))), TypeError, "array must be a dask array, or a DataArray with one"),
        (
            lambda: cbn.dask.moments(lazy, channel_axis=4),
            ValueError,
            "channel_axis is 4, but the array has 4 dimensions",
        ),
        (lambda: cbn.dask.moments(lazy, channel_axis="band"), ValueError, "the array has no names of axes"),
        (lambda: cbn.dask.moments(lazy[0, 0, 0]), ValueError, "two or more dimensions, but got 1"),
        (lambda: cbn.dask.moments(lazy.astype(complex)), TypeError, "complex128"),
        (lambda: cbn.dask.moments(unknown), ValueError, r"compute_chunk_sizes\(\) finds them"),
        (lambda: cbn.dask.batch_norm(lazy, 3), TypeError, "bn must be a cbn.BatchNorm, not int"),
        (
            lambda: cbn.dask.batch_norm(lazy, cbn.BatchNorm(5)),
            ValueError,
            "the array has 6 channels, and the layer has 5",
        ),
        (lambda: cbn.dask.batch_norm(lazy.astype(int), cbn.BatchNorm(6)), TypeError, "the array has dtype int64"),
        (lambda: cbn.dask.standardize(lazy, eps=-1), ValueError, "eps"),
    ):
        with pytest.raises(kind, match=words):
            call()


def _slow(block):
    time.sleep(0.02)
    return block


def test_a_worker_that_dies_changes_nothing(rng):
    distributed = peer("distributed")
    x = rng.standard_normal((400, 6)) + 50
    lazy = da.from_array(x, chunks=(4, 3))
    expected = cbn.dask.moments(lazy).compute(scheduler="synchronous").to_bytes()
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, host="127.0.0.1"
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        future = client.compute(cbn.dask.moments(lazy.map_blocks(_slow, dtype=x.dtype)))
        time.sleep(0.5)
        assert not future.done()
        os.kill(client.run(os.getpid)[next(iter(client.scheduler_info()["workers"]))], signal.SIGKILL)
        assert future.result(timeout=60).to_bytes() == expected


def test_partial_fit_in_dask_mls_place(rng):
    """`examples/hosts/dask_ml_.py` against scikit-learn, whose partial_fit takes arrays."""
    preprocessing = peer("sklearn.preprocessing")
    from examples.hosts.dask_ml_ import StandardScaler

    x = rng.standard_normal((300, 7)) * 3 + np.arange(7) * 100
    x[:, 3] = 5
    x[7, 2] = np.nan
    for options in ({}, {"with_mean": False}, {"with_std": False}):
        ours, exact = StandardScaler(**options), preprocessing.StandardScaler(**options)
        for begin in (0, 100, 200):
            part = x[begin : begin + 100]
            assert ours.partial_fit(da.from_array(part, chunks=(13, 3))) is ours
            exact.partial_fit(part)
        assert ours.n_samples_seen_ == 300
        for name in ("mean_", "var_", "scale_") if not options else ():
            agree(getattr(ours, name), getattr(exact, name), 1e-12)
        z = ours.transform(da.from_array(x, chunks=(50, 4)))
        assert isinstance(z, da.Array)
        np.testing.assert_allclose(z.compute(), exact.transform(x), rtol=1e-9, atol=1e-9)
        with pytest.raises(ValueError, match="X has 5 features, and this scaler has seen 7"):
            ours.partial_fit(da.from_array(x[:, :5], chunks=50))
        again = ours.fit(da.from_array(x[:50], chunks=7))
        assert again.n_samples_seen_ == 50
        agree(again.moments_.mean, np.nanmean(x[:50], 0), 1e-12)
