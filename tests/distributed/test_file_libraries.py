"""`cbn.outofcore` with zarr and h5py: values, chunks and shards, memory, work that was killed."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

import cbn
import cbn.outofcore
from cbn import work
from tests.peers import peer

h5py = peer("h5py")
zarr = peer("zarr")

SHAPE = (60, 8, 20, 24)
KINDS = ["zarr", "zarr shards", "h5py contiguous", "h5py chunks", "h5py gzip"]


def array_of(kind, path, shape, dtype="float32", x=None):
    """A new array of a library; and, for h5py, its file."""
    chunks = (7, 8, 10, 24)
    if kind.startswith("zarr"):
        shards = (14, 8, 20, 24) if "shards" in kind else None
        a = zarr.create_array(str(path), shape=shape, chunks=chunks, shards=shards, dtype=dtype, overwrite=True)
    else:
        options = {"contiguous": {}, "chunks": {"chunks": chunks}, "gzip": {"chunks": chunks, "compression": "gzip"}}
        a = h5py.File(path, "w").create_dataset("x", shape, dtype, **options[kind.split()[1]])
    if x is not None:
        a[...] = x
    return a


def opened(kind, path, mode):
    return zarr.open_array(str(path), mode=mode) if kind == "zarr" else h5py.File(path, mode)["x"]


@pytest.fixture
def x(rng):
    return (rng.standard_normal(SHAPE) * 3 + np.arange(8).reshape(8, 1, 1) * 50).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("memory", [1.5e6, 10e6])
def test_values(tmp_path, x, kind, memory):
    source, bn = array_of(kind, tmp_path / "x", SHAPE, x=x), cbn.BatchNorm(8)
    m, exact = cbn.outofcore.moments(source, memory=memory, extrema=True), cbn.moments(x, extrema=True)
    for name in ("count", "mean", "m2", "min", "max"):
        np.testing.assert_allclose(getattr(m, name), getattr(exact, name), rtol=1e-12, err_msg=name)
    bn.set_running_moments(m)
    expected = bn.eval()(x)
    memory *= 2
    for target in KINDS:
        out = array_of(target, tmp_path / target, SHAPE)
        assert cbn.outofcore.batch_norm(source, bn, out=out, memory=memory) is out
        assert np.array_equal(out[...], expected), target
        if target.startswith("h5py"):
            out.file.close()
    cbn.outofcore.batch_norm(source, bn, out=tmp_path / "y.npy", memory=memory)
    assert np.array_equal(np.load(tmp_path / "y.npy"), expected)
    cbn.outofcore.batch_norm(source, bn, out=source, memory=memory)
    assert np.array_equal(source[...], expected)


def test_a_standardized_array_of_bytes(tmp_path, x):
    x = x.clip(0, 255).astype(np.uint8)
    source = array_of("zarr", tmp_path / "x", SHAPE, "uint8", x)
    out = array_of("h5py gzip", tmp_path / "y", SHAPE, "float16")
    cbn.outofcore.standardize(source, out=out, channel_axis=1)
    m = cbn.moments(x)
    np.testing.assert_allclose(out[...], cbn.standardize(x, m.mean, m.var(), channel_axis=1, dtype="float16"), 2e-3)


def test_refusals(tmp_path, x):
    da = peer("dask.array")
    source, bn = array_of("zarr", tmp_path / "x", SHAPE, x=x), cbn.BatchNorm(8).eval()
    with pytest.raises(ValueError, match=r"the smallest block .* of chunks of \(7, 8, 10, 24\), and takes 215,040"):
        cbn.outofcore.moments(source, memory=1e5)
    with pytest.raises(TypeError, match=r"array is lazy, .*: cbn\.dask has the same functions"):
        cbn.outofcore.moments(da.from_array(x, chunks=(7, 8, 10, 24)))
    with pytest.raises(TypeError, match="out is lazy"):
        cbn.outofcore.batch_norm(x, bn, out=da.zeros(SHAPE, chunks=7))
    for other in (source, zarr.open_array(str(tmp_path / "x"))):
        with pytest.raises(ValueError, match="work in place can have no state"):
            cbn.outofcore.batch_norm(source, bn, out=other, state=tmp_path / "state")
    held = array_of("h5py chunks", tmp_path / "h", SHAPE, x=x)
    with pytest.raises(ValueError, match="work in place can have no state"):
        cbn.outofcore.batch_norm(held, bn, out=held.file["x"], state=tmp_path / "state")
    assert not (tmp_path / "state").exists()
    assert np.array_equal(source[...], x)


# ---- memory, and the end of a process --------------------------------------------------------------------------------

BEGIN = """
import os, signal
import numpy as np
import cbn, cbn.outofcore, cbn.work
from tests.distributed.test_file_libraries import opened
bn = cbn.BatchNorm(16)
def peak():  # getrusage has the parent's memory in it
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))
"""


def run(folder, program):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, "-c", BEGIN + program],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def large(folder, kind, n=250):
    """An array of 66 MB in chunks of 1 MB, and empty ones beside it."""
    arrays = []
    for name in "xyz":
        if kind == "zarr":
            shape, chunks = (n, 16, 64, 64), (4, 16, 64, 64)
            arrays.append(zarr.create_array(str(folder / name), shape=shape, chunks=chunks, dtype="float32"))
        else:
            options = {"chunks": (4, 16, 64, 64)} if kind == "h5py chunks" else {}
            arrays.append(h5py.File(folder / name, "w").create_dataset("x", (n, 16, 64, 64), "float32", **options))
    rng = np.random.default_rng(0)
    for i in range(0, n, 25):
        arrays[0][i : i + 25] = rng.standard_normal((25, 16, 64, 64))
    for a in arrays if kind != "zarr" else []:
        a.file.close()


@pytest.mark.parametrize("kind", ["zarr", "h5py chunks", "h5py contiguous"])
def test_resident_memory_is_bounded(tmp_path, kind):
    large(tmp_path, kind)
    done = run(
        tmp_path,
        f"""
x, y = opened({kind!r}, "x", "r"), opened({kind!r}, "y", "r+")
cbn.outofcore.batch_norm(x[:8], bn, out="warm.npy")
y[:4] = x[:4]
before = peak()
cbn.outofcore.batch_norm(x, bn, out=y, memory=30e6)
print(peak() - before)
""",
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 30e6, done.stdout


@pytest.mark.parametrize("kind", ["zarr", "h5py contiguous"])
def test_killed_work_goes_on(tmp_path, kind):
    """Not of h5py's chunks: HDF5 does not promise that a file is whole whose process was killed while it grew."""
    large(tmp_path, kind)
    program = """
cbn.work.PAUSE = 0.0
from cbn.blocks import Blocks
n, read = [0], Blocks.read
def counted(self, at):
    n[0] += 1
    if n[0] == {kill_at}:
        os.kill(os.getpid(), signal.SIGKILL)
    import time
    time.sleep(0.01)
    return read(self, at)
Blocks.read = counted
x, y = opened({kind!r}, "x", "r"), opened({kind!r}, {out!r}, "r+")
cbn.outofcore.batch_norm(x, bn, out=y, memory=10e6, state="state")
print(n[0])
"""
    whole = run(tmp_path, program.format(kind=kind, kill_at=0, out="z"))
    assert whole.returncode == 0, whole.stderr
    n, done = int(whole.stdout), 0
    for kill_at in (n // 3, n // 2):
        killed = run(tmp_path, program.format(kind=kind, kill_at=kill_at, out="y"))
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        record = json.loads((tmp_path / "state").read_text())
        assert record["measured"] + record["applied"] > done
        done = record["measured"] + record["applied"]
    last = run(tmp_path, program.format(kind=kind, kill_at=0, out="y"))
    assert last.returncode == 0, last.stderr
    assert int(last.stdout) == n - done
    found, expected = (opened(kind, tmp_path / name, "r")[...] for name in "yz")
    assert np.array_equal(found, expected)


def test_states_are_written_meanwhile(tmp_path, x, monkeypatch):
    monkeypatch.setattr(work, "PAUSE", -1)
    source, bn = array_of("zarr", tmp_path / "x", SHAPE, x=x), cbn.BatchNorm(8).eval()
    out = array_of("h5py chunks", tmp_path / "y", SHAPE)
    cbn.outofcore.batch_norm(source, bn, out=out, state=tmp_path / "state", memory=1e6)
    assert np.array_equal(out[...], bn(x))
    assert not (tmp_path / "state").exists()
