"""Arrays larger than memory: values, bits, blocks by chunks and by the memory asked for, interruption, refusals."""

import functools
import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import cbn
import cbn.outofcore
from cbn import blocks, work
from cbn.blocks import Mapped, cut, positions

from .paths import LAYOUTS, LIMIT, in_memory_order

SHAPE = (30, 6, 10, 12)


class Chunked:
    """As h5py and zarr have it: slices are copied, chunks are read and written as a whole. It counts both."""

    def __init__(self, array, chunks):
        self.held, self.shape, self.dtype, self.chunks = array, array.shape, array.dtype, chunks
        self.read, self.written, self.largest = [], [], 0
        self.fail_at = None

    def _chunks(self, at):
        assert all(s.start % n == 0 for s, n in zip(at, self.chunks, strict=True)), at
        assert all(
            s.stop % n == 0 or s.stop == m for s, n, m in zip(at, self.chunks, self.shape, strict=True)
        ), at  # fmt: skip
        corners = [range(s.start // n, -(-s.stop // n)) for s, n in zip(at, self.chunks, strict=True)]
        return [tuple(c) for c in np.stack(np.meshgrid(*corners, indexing="ij"), -1).reshape(-1, len(at))]

    def __getitem__(self, at):
        if self.fail_at is not None and len(self.read) >= self.fail_at:
            raise OSError("the disk is gone")
        self.read += self._chunks(at)
        found = self.held[at].copy()
        self.largest = max(self.largest, found.nbytes)
        return found

    def __setitem__(self, at, value):
        self.written += self._chunks(at)
        self.held[at] = value


@pytest.fixture
def x(rng):
    return (rng.standard_normal(SHAPE) * 3 + np.arange(6).reshape(6, 1, 1) * 50).astype(np.float32)


def layer(rng, n_channels=6, **options):
    bn = cbn.BatchNorm(n_channels, activation="relu", **options)
    bn.weight[:], bn.bias[:] = rng.uniform(0.5, 2, n_channels), rng.standard_normal(n_channels)
    bn.running_mean[:], bn.running_var[:] = rng.standard_normal(n_channels), rng.uniform(1, 9, n_channels)
    return bn.eval()


def file_of(x, path, fortran=False):
    held = np.lib.format.open_memmap(path, "w+", x.dtype, x.shape, fortran_order=fortran)
    held[...] = x
    held.flush()
    return path


def parts(folder):
    """Files that are not whole."""
    return list(folder.glob("*.part"))


def agree(found, expected, limit, case=""):
    scale = np.abs(expected).max(initial=1)
    np.testing.assert_allclose(found, expected, rtol=limit, atol=limit * scale, err_msg=str(case))


# ---- blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
@pytest.mark.parametrize("units", [(1, 1, 1), (2, 3, 4), (7, 5, 9), (1, 5, 1)])
@pytest.mark.parametrize("whole", [(), (2,), (0, 1)])
def test_blocks_cover_every_value_once(order, units, whole):
    shape = (7, 5, 9)
    for limit in (1, 3, 12, 45, 100, 315, 1000):
        size = cut(shape, order, units, whole, limit)
        smallest = np.prod([shape[a] if a in whole else units[a] for a in range(3)])
        assert np.prod(size) <= max(limit, smallest), (size, limit)
        assert limit < 315 or size == shape
        seen = np.zeros(shape, int)
        for at in positions(shape, size, order):
            seen[at] += 1
            for s, unit, n in zip(at, units, shape, strict=True):
                assert s.start % unit == 0, (at, size)
                assert s.stop == n or s.stop % unit == 0, (at, size)
        assert (seen == 1).all(), (size, limit)


def test_blocks_are_contiguous_where_they_can_be():
    assert cut((100, 64, 56, 56), (0, 1, 2, 3), (1,) * 4, (), 64 * 56 * 56 * 3 + 5) == (3, 64, 56, 56)
    assert cut((100, 64, 56, 56), (0, 1, 2, 3), (1,) * 4, (), 56 * 56 * 10) == (1, 10, 56, 56)
    assert cut((100, 64), (1, 0), (1, 1), (), 250) == (100, 2)


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.uint8, np.int32, ">f4"])
@pytest.mark.parametrize("fortran", [False, True])
@pytest.mark.parametrize("axis", [1, -1])
def test_moments_of_files(rng, tmp_path, x, dtype, fortran, axis):
    x = (x if np.dtype(dtype).kind == "f" else x.clip(0, 255)).astype(dtype)
    path = file_of(x, tmp_path / "x.npy", fortran)
    expected = cbn.moments(x, channel_axis=axis, extrema=True)
    for memory in (300, 5000, 40_000, 1 << 28):
        for array in (path, str(path), np.load(path, mmap_mode="r"), x, Chunked(x, (7, 2, 10, 4))):
            if isinstance(array, Chunked) and memory < 40_000:
                continue
            found = cbn.outofcore.moments(array, channel_axis=axis, extrema=True, memory=memory)
            for name in ("count", "mean", "m2", "min", "max"):
                agree(getattr(found, name), getattr(expected, name), 1e-12, (memory, type(array), name))
            if memory == 1 << 28:  # one block, whose order in memory counts
                own = np.asfortranarray(x) if fortran and array is not x and not isinstance(array, Chunked) else x
                one = cbn.moments(own, channel_axis=axis, extrema=True)
                assert found.to_bytes() == one.to_bytes(), (type(array), found, one)


def test_moments_of_views_of_a_file(tmp_path, x):
    file_of(x, tmp_path / "x.npy")
    held = np.load(tmp_path / "x.npy", mmap_mode="r")
    for name, view in {
        "part": held[5:21], "transposed": held.transpose(2, 1, 3, 0), "every other": held[::2], "backwards": held[::-1],
        "channels": held[:, 2:5], "offset": np.memmap(tmp_path / "x.npy", x.dtype, "r", 128 + 4 * 720, (29, 6, 10, 12)),
    }.items():  # fmt: skip
        found = cbn.outofcore.moments(view, memory=30_000)
        expected = cbn.moments(np.array(view))
        agree(found.mean, expected.mean, 1e-12, name)
        agree(found.m2, expected.m2, 1e-12, name)


def test_missing_values(x, tmp_path):
    x[3, 2, 1, 1] = x[20, 5] = np.nan
    path = file_of(x, tmp_path / "x.npy")
    found = cbn.outofcore.moments(path, skipna=True, memory=10_000)
    expected = cbn.moments(x, skipna=True)
    assert np.array_equal(found.count, expected.count)
    agree(found.mean, expected.mean, 1e-12)
    assert np.isnan(cbn.outofcore.moments(path, memory=10_000).mean[[2, 5]]).all()


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_evaluation_has_the_bits_of_the_layer(rng, tmp_path, name, dtype):
    shape, axis, order = LAYOUTS[name]
    x = in_memory_order((rng.standard_normal(shape) * 3 + 1).astype(dtype), order)
    bn = layer(rng, shape[axis], channel_axis=axis)
    expected = bn(x)
    for fortran in (False, True):
        path = file_of(x, tmp_path / "x.npy", fortran)
        for memory in (500, 3000, 1 << 28):
            for out in (tmp_path / "y.npy", np.empty_like(x), file_of(x * 0, tmp_path / "out.npy")):
                given = np.load(out, mmap_mode="r+") if str(out).endswith("out.npy") else out
                y = cbn.outofcore.batch_norm(path, bn, out=given, memory=memory)
                assert y is given or isinstance(y, np.memmap)
                assert np.array_equal(y, expected), (memory, fortran, type(out))
                if given is not out:
                    assert np.array_equal(np.load(out), expected), (memory, fortran)
        assert np.load(tmp_path / "y.npy", mmap_mode="r").flags.f_contiguous == (fortran or shape[-1] == 1)
    y = cbn.outofcore.batch_norm(x, bn, out=np.empty_like(x), memory=500)
    assert np.array_equal(y, expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_training_normalizes_with_the_whole_array(rng, tmp_path, x, dtype):
    x = x.astype(dtype)
    bn = layer(rng).train()
    before = {name: a.copy() for name, a in bn.state_dict().items()}
    y = cbn.outofcore.batch_norm(file_of(x, tmp_path / "x.npy"), bn, out=tmp_path / "y.npy", memory=10_000)
    assert all(np.array_equal(a, before[name]) for name, a in bn.state_dict().items())
    exact = x.astype(np.float64)
    mean, var = exact.mean((0, 2, 3), keepdims=True), exact.var((0, 2, 3), keepdims=True)
    exact = (exact - mean) / np.sqrt(var + bn.eps) * bn.weight.reshape(6, 1, 1) + bn.bias.reshape(6, 1, 1)
    agree(y, exact.clip(0), LIMIT[np.dtype(dtype)])


def test_standardize(rng, tmp_path):
    x = rng.integers(0, 255, (400, 7), np.uint8)
    path, m = file_of(x, tmp_path / "x.npy"), cbn.moments(x)
    for options in ({}, {"eps": 0, "clip": 2, "dtype": "float64"}, {"center": False, "zero_var": "one"}):
        for correction in (0, 1):
            expected = cbn.standardize(x, m.mean, m.var(correction), **options)
            for moments in (None, m):
                y = cbn.outofcore.standardize(
                    path, moments, out=tmp_path / "y.npy", correction=correction, memory=2000, **options
                )
                assert y.dtype == expected.dtype
                agree(y, expected, 1e-6 if y.dtype == np.float32 else 1e-12, (options, moments))
                assert moments is None or np.array_equal(y, expected)
    halves = np.empty(x.shape, np.float16)
    assert cbn.outofcore.standardize(path, m, out=halves) is halves
    assert np.array_equal(halves, cbn.standardize(x, m.mean, m.var(), dtype=np.float16))


def test_update_of_running_moments(rng, tmp_path):
    x = (rng.standard_normal((50, 8, 3, 4)) * 2 + 5).astype(np.float32)
    x[4, 4] = np.nan
    for fortran in (False, True):
        path = file_of(x, tmp_path / "x.npy", fortran)
        for shape, options in (
            (4, {}), ((3, 4), {"extrema": True}), (8, {"channel_axis": 1, "skipna": True}),
            (50, {"channel_axis": 0}), ((8, 3, 4), {"skipna": True, "extrema": True}),
        ):  # fmt: skip
            running, one = (cbn.RunningMoments(shape, prior=(1, 2, 3), **options) for _ in range(2))
            whole_axes = shape == (3, 4) or shape == (8, 3, 4) or shape == 50
            memory = 1 << 20 if fortran or whole_axes else 6000
            assert cbn.outofcore.update(running, path, memory=memory) is running
            one.update(x)
            for name in ("count", "mean", *(("min", "max") if one.extrema else ())):
                np.testing.assert_allclose(
                    getattr(running, name), getattr(one, name), rtol=1e-12, err_msg=f"{shape} {name}"
                )
            np.testing.assert_allclose(running.var(), one.var(), rtol=1e-11)


def test_arrays_without_values(tmp_path):
    for shape in ((0, 3), (4, 3, 0)):
        x = np.empty(shape, np.float32)
        m = cbn.outofcore.moments(x)
        assert (m.count == 0).all()
        assert m.mean.size == 3
        for bn in (cbn.BatchNorm(3), cbn.BatchNorm(3).eval()):
            assert cbn.outofcore.batch_norm(x, bn, out=tmp_path / "y.npy").shape == shape
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        cbn.outofcore.batch_norm(np.ones((1, 3)), cbn.BatchNorm(3), out=np.ones((1, 3)))


def test_in_place(rng, tmp_path, x):
    path, bn = file_of(x, tmp_path / "x.npy"), layer(rng)
    expected = bn(x)
    held = np.load(path, mmap_mode="r+")
    assert cbn.outofcore.batch_norm(held, bn, out=held, memory=9000) is held
    assert np.array_equal(np.load(path), expected)
    file_of(x, path)
    cbn.outofcore.batch_norm(np.load(path, mmap_mode="r"), bn, out=np.load(path, mmap_mode="r+"), memory=9000)
    assert np.array_equal(np.load(path), expected)
    own, chunked = x.copy(), Chunked(x.copy(), (4, 6, 10, 12))
    assert np.array_equal(cbn.outofcore.batch_norm(own, bn, out=own, memory=9000), expected)
    assert np.array_equal(cbn.outofcore.batch_norm(chunked, bn, out=chunked).held, expected)


@pytest.mark.parametrize("chunks", [(7, 2, 10, 4), (30, 6, 10, 12), (1, 6, 5, 12), (30, 1, 10, 12)])
def test_every_chunk_is_read_and_written_once(rng, x, chunks):
    bn = layer(rng)
    memory = max(60_000, 8 * 4 * np.prod(chunks))
    source, out = Chunked(x, chunks), Chunked(np.empty_like(x), chunks)
    cbn.outofcore.batch_norm(source, bn, out=out, memory=memory)
    assert np.array_equal(out.held, bn(x))
    for seen in (source.read, out.written):
        assert len(seen) == len(set(seen)) == np.prod([-(-n // c) for n, c in zip(x.shape, chunks, strict=True)])
    assert source.largest * 3 * 2 <= memory
    other = Chunked(np.empty_like(x), (4, 3, 10, 12))  # of which no chunk may be written by two blocks
    source.chunks = (2, 2, 10, 12)
    cbn.outofcore.batch_norm(source, bn, out=other, memory=1 << 20)
    assert np.array_equal(other.held, bn(x))
    assert len(other.written) == len(set(other.written))


def test_a_memmap_that_has_no_file_any_more(rng, tmp_path, x):
    """It is written in memory then."""
    bn = layer(rng)
    file_of(x, tmp_path / "x.npy")
    held = np.load(file_of(x * 0, tmp_path / "y.npy"), mmap_mode="r+")
    os.unlink(tmp_path / "y.npy")
    other = file_of(x * 0 + 5, tmp_path / "y.npy")  # another file of this name
    cbn.outofcore.batch_norm(tmp_path / "x.npy", bn, out=held, memory=9000)
    assert np.array_equal(held, bn(x))
    assert (np.load(other) == 5).all()
    assert not Mapped(held, held).is_file(other)


# ---- memory ----------------------------------------------------------------------------------------------------------

GROWTH = """
import numpy as np
import cbn, cbn.outofcore
bn = cbn.BatchNorm2d(16)
def peak():  # getrusage has the parent's memory in it
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))
x = np.zeros((8, 16, 8, 8), np.float32)
cbn.outofcore.batch_norm(x, bn, out="warm.npy")  # what is loaded once
before = peak()
{work}
print(peak() - before)
"""


@pytest.mark.parametrize(
    "work",
    [
        'cbn.outofcore.batch_norm("x.npy", bn, out="y.npy", memory=20e6)',
        'cbn.outofcore.batch_norm("x.npy", bn, out="y.npy", memory=20e6, state="s.json")',
        'x = np.load("x.npy", mmap_mode="r+"); cbn.outofcore.standardize(x, out=x, channel_axis=1, memory=20e6)',
        'cbn.outofcore.moments("x.npy", memory=20e6, extrema=True)',
        'cbn.outofcore.update(cbn.RunningMoments(64), "x.npy", memory=20e6)',
    ],
)
def test_resident_memory_is_bounded(tmp_path, work):
    held = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (500, 16, 64, 64))  # 131 MB
    held[:] = np.arange(64)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", GROWTH.format(work=work)], cwd=tmp_path, env=environment, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 20e6, done.stdout


# ---- interruption ----------------------------------------------------------------------------------------------------


@pytest.fixture
def eager(monkeypatch):
    """The state is written after each block."""
    monkeypatch.setattr(work, "PAUSE", -1)


def calls(rng, x):
    """What can be interrupted: from a source and an out, with a state."""
    bn = layer(rng)
    return {
        "moments": lambda a, out, **o: cbn.outofcore.moments(a, extrema=True, memory=40_000, **o).to_bytes(),
        "update": lambda a, out, **o: cbn.outofcore.update(cbn.RunningMoments(12), a, memory=40_000, **o)._rows(),
        "eval": lambda a, out, **o: np.array(cbn.outofcore.batch_norm(a, bn, out=out, memory=60_000, **o)),
        "train": lambda a, out, **o: np.array(
            cbn.outofcore.batch_norm(a, cbn.BatchNorm(6, eps=0.1), out=out, memory=60_000, **o)
        ),
        "standardize": lambda a, out, **o: np.array(
            cbn.outofcore.standardize(a, out=out, channel_axis=1, memory=60_000, **o)
        ),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "fail_at"),
    [(name, at) for name in ("moments", "update", "eval") for at in (0, 1, 4, 9)]
    + [(name, at) for name in ("train", "standardize") for at in (1, 9, 10, 14)],  # which read twice
)
def test_what_was_interrupted_goes_on(rng, tmp_path, eager, x, name, fail_at):
    call, state, out = calls(rng, x)[name], tmp_path / "state.json", tmp_path / "y.npy"
    chunks = (3, 6, 10, 12)
    whole = Chunked(x, chunks)
    expected = call(whole, tmp_path / "whole.npy")
    source = Chunked(x, chunks)
    source.fail_at = fail_at
    with pytest.raises(OSError, match="the disk is gone"):
        call(source, out, state=state)
    assert state.exists()
    assert not out.exists()
    assert state.stat().st_size < 2000
    assert sum(json.loads(state.read_text())[phase] for phase in ("measured", "applied")) == fail_at
    source.fail_at = None
    found = call(source, out, state=state)
    assert found == expected if isinstance(found, bytes) else np.array_equal(found, expected)
    assert len(source.read) == len(whole.read)  # nothing twice
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["whole.npy", "y.npy"] if name in ("eval", "train", "standardize") else []
    )


KILLED = """
import os, signal, sys
import numpy as np
import cbn, cbn.outofcore, cbn.work
cbn.work.PAUSE = 0.0
from cbn.blocks import Mapped
n, read = [0], Mapped.read
def slow(self, at):
    n[0] += 1
    if n[0] == {kill_at}:
        os.kill(os.getpid(), signal.SIGKILL)
    if {kill_at} > 0:
        import time
        time.sleep(0.01)
    return read(self, at)
Mapped.read = slow
bn = cbn.BatchNorm2d(16)
cbn.outofcore.batch_norm("x.npy", bn, out="y.npy", memory=2e6, state="state.json")
print(n[0])
"""


def test_killed_work_goes_on(tmp_path):
    x = np.random.default_rng(0).standard_normal((150, 16, 64, 32)).astype(np.float32)
    file_of(x, tmp_path / "x.npy")
    cbn.outofcore.batch_norm(tmp_path / "x.npy", cbn.BatchNorm2d(16), out=tmp_path / "whole.npy", memory=2e6)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = []
    for kill_at in (15, 40, 30, 0):
        run = subprocess.run(
            [sys.executable, "-c", KILLED.format(kill_at=kill_at)], cwd=tmp_path, env=environment,
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        if kill_at:
            assert run.returncode == -signal.SIGKILL, run.stderr
            assert not (tmp_path / "y.npy").exists()
            record = json.loads((tmp_path / "state.json").read_text())
            done.append(record["measured"] + record["applied"])
    assert run.returncode == 0, run.stderr
    assert 0 < done[0] < done[1] < done[2]
    n_blocks = 2 * -(-150 * 16 * 64 * 32 * 4 // (2e6 / 4 // (4 * 16 * 64 * 32) * (4 * 16 * 64 * 32)))
    assert int(run.stdout) <= n_blocks - done[2], (run.stdout, done)
    assert (tmp_path / "y.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
    assert not (tmp_path / "state.json").exists()


@pytest.mark.parametrize("fail_at", [0, 1, 2, 5, 7])
def test_a_write_that_fails_is_not_taken_as_done(rng, tmp_path, monkeypatch, eager, x, fail_at):
    """As of a full disk; it fails while the next block is made, or the one after it."""
    bn, n, write = layer(rng), [0], blocks._write_all

    def failing(*args):
        n[0] += 1
        if n[0] == fail_at + 1:
            raise OSError(28, "No space left on device")
        write(*args)

    monkeypatch.setattr(blocks, "_write_all", failing)
    call = functools.partial(cbn.outofcore.batch_norm, x, bn, out=tmp_path / "y.npy", memory=40_000)
    with pytest.raises(OSError, match="No space left"):
        call(state=tmp_path / "state")
    assert not (tmp_path / "y.npy").exists()
    assert (tmp_path / "state").exists() == bool(parts(tmp_path))
    assert np.array_equal(call(state=tmp_path / "state"), bn(x))
    n[0] = 0
    with pytest.raises(OSError, match="No space left"):
        call()
    assert [p.name for p in tmp_path.iterdir()] == ["y.npy"]


def begun(call):
    """Whether a call was interrupted, by a source that fails."""
    with pytest.raises(OSError, match="the disk is gone"):
        call()


def test_a_state_knows_its_arrays(rng, tmp_path, eager, x):
    """Of one shape and dtype, in one file or several."""
    state, bn, source = tmp_path / "state", layer(rng), Chunked(x, (3, 6, 10, 12))
    run = functools.partial(cbn.outofcore.batch_norm, bn=bn, memory=60_000, state=state)
    outs = [np.load(file_of(x * 0, tmp_path / f"{i}.npy"), mmap_mode="r+") for i in range(2)]
    source.fail_at = 4
    begun(lambda: run(source, out=outs[0]))
    source.fail_at = None
    for other in (outs[1], tmp_path / "path.npy"):
        with pytest.raises(ValueError, match=r"out (was|is) "):
            run(source, out=other)
    assert np.array_equal(run(source, out=outs[0]), bn(x))
    with pytest.raises(ValueError, match="an array in memory ends with the process"):
        run(source, out=np.empty_like(x))

    twice = np.load(file_of(np.concatenate([x, x + 50]), tmp_path / "twice.npy"), mmap_mode="r")
    read, n = Mapped.read, [0]

    def failing(self, at):
        n[0] += 1
        if n[0] == 5:
            raise OSError("the disk is gone")
        return read(self, at)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mapped, "read", failing)
        begun(lambda: cbn.outofcore.moments(twice[:30], memory=20_000, state=state))
    with pytest.raises(ValueError, match=r"array was .*'place': 128, .* and is .*'place': 86528"):
        cbn.outofcore.moments(twice[30:], memory=20_000, state=state)
    agree(cbn.outofcore.moments(twice[:30], memory=20_000, state=state).mean, cbn.moments(x).mean, 1e-12)


def test_a_state_knows_the_channel_axis(rng, tmp_path, eager):
    x = rng.standard_normal((40, 8, 8)).astype(np.float32)
    source, state = Chunked(x, (4, 8, 8)), tmp_path / "state"
    source.fail_at = 3
    begun(lambda: cbn.outofcore.batch_norm(
        source, cbn.BatchNorm(8, channel_axis=1), out=tmp_path / "y.npy", memory=8000, state=state))  # fmt: skip
    with pytest.raises(ValueError, match="channel_axis was 1, and is 2"):
        cbn.outofcore.batch_norm(
            source, cbn.BatchNorm(8, channel_axis=2), out=tmp_path / "y.npy", memory=8000, state=state
        )


@pytest.mark.parametrize("interrupted", ["give_back", "prefetch"])
def test_an_interruption_anywhere_counts_a_block_once(tmp_path, monkeypatch, x, interrupted):
    path, n, before = file_of(x, tmp_path / "x.npy"), [0], getattr(Mapped, interrupted)

    def interrupting(self, at):
        n[0] += 1
        if n[0] == 3:
            raise KeyboardInterrupt
        before(self, at)

    monkeypatch.setattr(Mapped, interrupted, interrupting)
    with pytest.raises(KeyboardInterrupt):
        cbn.outofcore.moments(path, memory=20_000, state=tmp_path / "state")
    found = cbn.outofcore.moments(path, memory=20_000, state=tmp_path / "state")
    assert found.to_bytes() == cbn.outofcore.moments(path, memory=20_000).to_bytes()


def test_the_same_options_in_other_words(rng, tmp_path, eager, x):
    source, state, m = Chunked(x, (3, 6, 10, 12)), tmp_path / "state", cbn.moments(x)
    run = functools.partial(cbn.outofcore.standardize, source, m, channel_axis=1, memory=80_000, state=state)
    source.fail_at = 3
    begun(lambda: run(out=tmp_path / "y.npy", dtype="float32", eps=1e-5, clip=3))
    source.fail_at = None
    with pytest.raises(ValueError, match="options was "):
        run(out=tmp_path / "y.npy", dtype="float32", eps=1e-5, clip=4)
    y = run(out=tmp_path / "y.npy", clip=3.0, eps=np.float64(1e-5), dtype=np.float32)
    assert np.array_equal(y, cbn.standardize(x, m.mean, m.var(), channel_axis=1, eps=1e-5, clip=3))


def test_a_damaged_state(tmp_path, eager, x):
    source, state = Chunked(x, (3, 6, 10, 12)), tmp_path / "state"
    source.fail_at = 3
    begun(lambda: cbn.outofcore.moments(source, memory=40_000, state=state))
    source.fail_at, record = None, json.loads(state.read_text())
    for change in ({"measured": 999}, {"measured": -3}, {"moments": None}, {"moments": "?"}, {"moments": "AAAA"}):
        state.write_text(json.dumps(record | change))
        with pytest.raises(ValueError, match=re.escape(f"state is '{state}', which is damaged")):
            cbn.outofcore.moments(source, memory=40_000, state=state)
    state.write_text(json.dumps({"work": record["work"], "measured": 3}))
    with pytest.raises(ValueError, match="which is there and is no state"):
        cbn.outofcore.moments(source, memory=40_000, state=state)


def test_16_bit_floats_without_a_name_in_files(rng, tmp_path, eager, x):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    source, bn = Chunked(x.astype(ml_dtypes.bfloat16), (3, 6, 10, 12)), layer(rng)
    source.fail_at = 3
    run = functools.partial(cbn.outofcore.batch_norm, source, bn, out=tmp_path / "y.npy", memory=40_000)
    begun(lambda: run(state=tmp_path / "state"))
    source.fail_at = None
    y = run(state=tmp_path / "state")
    assert y.dtype == ml_dtypes.bfloat16
    assert np.array_equal(y, bn(source.held))


def test_arrays_with_gaps(rng, tmp_path, x):
    """Of a source smaller blocks are read; results go to the file run by run, and the rest of it stays."""
    bn = layer(rng, 3)
    held = np.load(file_of(x, tmp_path / "x.npy"), mmap_mode="r")
    for view in (held[::3, ::2], held[:, 1:4, :, ::2], held[:, ::-2], held[:, :3, 0, 0], np.asarray(held)[5:, :3]):
        for memory in (12_000, 60_000):
            target = np.load(file_of(np.full((40, 5, 12, 25), 7, np.float32), tmp_path / "y.npy"), mmap_mode="r+")
            n, _, *rest = view.shape
            out = target[:n, 1:4][(..., *(slice(0, 2 * m, 2) for m in rest))] if len(rest) == 1 else target[:n, 1:4]
            out = out[(slice(None), slice(None), *(slice(m) for m in rest))] if rest else out[:, :, 0, 0]
            assert cbn.outofcore.batch_norm(view, bn, out=out, memory=memory) is out
            expected = bn(np.array(view))
            assert np.array_equal(out, expected), (view.shape, memory)
            target.flush()
            assert np.count_nonzero(np.load(tmp_path / "y.npy") != 7) == np.count_nonzero(expected != 7)


def test_what_is_for_batches_is_refused(rng, x):
    y = np.empty_like(x)
    for option, value in (("ghost_batch_size", 5), ("renorm", (3.0, 5.0))):
        bn = cbn.BatchNorm(6, **{option: value})
        with pytest.raises(ValueError, match=f"bn has {option}, which is for batches"):
            cbn.outofcore.batch_norm(x, bn, out=y)
        assert np.array_equal(cbn.outofcore.batch_norm(x, bn.eval(), out=y), bn(x))
    x[3, 2] = np.nan
    with pytest.raises(ValueError, match="not finite in channel 2"):
        cbn.outofcore.batch_norm(x, cbn.BatchNorm(6, nonfinite="raise"), out=y)

    class Other(cbn.BatchNorm):
        def forward(self, x, **options):
            return x

    with pytest.raises(TypeError, match="Other has a forward of its own"):
        cbn.outofcore.batch_norm(x, Other(6), out=y)


def test_a_link_stays_a_link(rng, tmp_path, x):
    (tmp_path / "link.npy").symlink_to(tmp_path / "y.npy")
    bn = layer(rng)
    cbn.outofcore.batch_norm(x, bn, out=tmp_path / "link.npy")
    assert (tmp_path / "link.npy").is_symlink()
    assert np.array_equal(np.load(tmp_path / "y.npy"), bn(x))


def test_without_a_state_nothing_is_left_of_a_file(rng, tmp_path, x):
    source = Chunked(x, (3, 6, 10, 12))
    source.fail_at = 4
    with pytest.raises(OSError, match="the disk is gone"):
        cbn.outofcore.batch_norm(source, layer(rng), out=tmp_path / "y.npy", memory=60_000)
    assert list(tmp_path.iterdir()) == []


def test_a_state_is_of_one_work(rng, tmp_path, eager, x):
    path, state, bn = file_of(x, tmp_path / "x.npy"), tmp_path / "state.json", layer(rng)
    source = Chunked(x, (3, 6, 10, 12))

    def interrupted(**options):
        source.fail_at, source.read = 4, []
        with pytest.raises(OSError, match="the disk is gone"):
            cbn.outofcore.batch_norm(source, bn, out=tmp_path / "y.npy", state=state, **options)
        source.fail_at = None

    interrupted(memory=60_000)
    before, (part,) = state.read_bytes(), parts(tmp_path)

    def refused(words, array=source, layer=bn, out=tmp_path / "y.npy", memory=60_000):
        with pytest.raises(ValueError, match=re.escape(words)):
            cbn.outofcore.batch_norm(array, layer, out=out, state=state, memory=memory)
        assert state.read_bytes() == before
        assert parts(tmp_path) == [part]

    refused("of other work: memory was 60000, and is 70000", memory=70_000)
    other = Chunked(x[:15], (3, 6, 10, 12))
    refused("out has shape (30, 6, 10, 12); expected (15, 6, 10, 12)", array=other)
    refused(
        "shape was [30, 6, 10, 12], and is [15, 6, 10, 12]",
        array=other,
        out=Chunked(np.empty_like(x[:15]), (3, 6, 10, 12)),
        memory=80_000,
    )
    changed = layer(rng)
    changed.running_mean[2] += 1
    refused("layer was ", layer=changed)
    refused("block was [3, 6, 10, 12], and is ", array=x)
    with pytest.raises(ValueError, match=r"work was batch_norm, and is standardize"):
        cbn.outofcore.standardize(source, out=Chunked(x * 0, (3, 6, 10, 12)), memory=80_000, state=state)
    part.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=re.escape(str(part))):
        cbn.outofcore.batch_norm(source, bn, out=tmp_path / "y.npy", state=state, memory=60_000)
    (tmp_path / "elsewhere").rename(part)
    y = cbn.outofcore.batch_norm(source, bn, out=tmp_path / "y.npy", state=state, memory=60_000)
    assert np.array_equal(y, bn(x))

    # a file that was written since
    held = np.load(path, mmap_mode="r+")
    out = Chunked(np.empty_like(x), (3, 6, 10, 12))
    out.__class__ = type("Failing", (Chunked,), {"__setitem__": lambda self, at, value: 1 / 0})
    with pytest.raises(ZeroDivisionError):
        cbn.outofcore.batch_norm(path, bn, out=out, state=state, memory=60_000)
    time.sleep(0.01)
    held[0] = 1
    held.flush()
    os.utime(path)
    with pytest.raises(ValueError, match="modified was "):
        cbn.outofcore.batch_norm(path, bn, out=out, state=state, memory=60_000)


def test_a_state_that_cannot_be_written(rng, tmp_path, eager, x):
    source = Chunked(x, (3, 6, 10, 12))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        cbn.outofcore.moments(source, memory=60_000, state=tmp_path / "nowhere" / "state")


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_refusals(rng, tmp_path, x):
    bn, path = layer(rng), file_of(x, tmp_path / "x.npy")
    run, y = cbn.outofcore.batch_norm, np.zeros_like(x)

    def refused(error, words, call, *arguments, **options):
        before = sorted(p.name for p in tmp_path.iterdir())
        with pytest.raises(error, match=re.escape(words)):
            call(*arguments, **options)
        assert sorted(p.name for p in tmp_path.iterdir()) == before

    refused(TypeError, "bn must be a cbn.BatchNorm, not int", run, path, 3, out=y)
    refused(ValueError, "the array has 6 channels, and the layer has 5", run, path, cbn.BatchNorm(5), out=y)
    refused(ValueError, "and the layer does not know yet how many", run, path, cbn.BatchNorm(None), out=y)
    refused(ValueError, "bn has 2 sets of statistics", run, path, cbn.BatchNorm(6, num_domains=2), out=y)
    refused(TypeError, "the array has dtype int8; expected float32", run, x.astype(np.int8), bn, out=y)
    refused(TypeError, "array must be the path of an .npy file, or an array", run, [1, 2], bn, out=y)
    refused(TypeError, "out must be the path of an .npy file, or an array", run, path, bn, out=None)
    refused(ValueError, "out is 'y.zarr'; a path ends with .npy", run, path, bn, out="y.zarr")
    refused(ValueError, "out has shape (3,); expected (30, 6, 10, 12)", run, path, bn, out=np.empty(3, np.float32))
    refused(TypeError, "out has dtype float64; expected float32", run, path, bn, out=y.astype(np.float64))
    refused(ValueError, "out is read-only", run, path, bn, out=np.load(path, mmap_mode="r"))
    refused(ValueError, "out is the file of the array", run, path, bn, out=path)
    refused(ValueError, "out is the file of the array", run, np.load(path, mmap_mode="r"), bn, out=str(path))
    refused(FileNotFoundError, "none.npy", run, tmp_path / "none.npy", bn, out=y)
    np.savez(tmp_path / "z.npz", x=x)
    refused(ValueError, "an archive: pass one of its arrays", run, tmp_path / "z.npz", bn, out=y)
    (tmp_path / "text").write_text("text")
    refused(ValueError, "which is no .npy file", run, tmp_path / "text", bn, out=y)
    refused(ValueError, 'a memmap of mode "c"', run, np.load(path, mmap_mode="c"), bn, out=y)
    refused(TypeError, "masked array", run, np.ma.array(x), bn, out=y)
    (tmp_path / "folder.npy").mkdir()
    refused(IsADirectoryError, "folder.npy", run, path, bn, out=tmp_path / "folder.npy")
    refused(TypeError, "memory must be a number of bytes, not '1 GB'", run, path, bn, out=y, memory="1 GB")
    refused(ValueError, "memory must be a number of bytes, 1 or more, but got nan", run, path, bn, out=y, memory=np.nan)
    refused(ValueError, "1 or more, but got inf", run, path, bn, out=y, memory=np.inf)
    refused(ValueError, "memory is 3 bytes, but the smallest block", run, path, bn, out=y, memory=3)
    refused(
        ValueError,
        "of chunks of (3, 6, 10, 10), and takes 36,000",
        run,
        Chunked(x, (3, 6, 10, 10)),
        bn,
        out=y,
        memory=20_000,
    )
    refused(TypeError, "progress must be a bool, not 1", run, path, bn, out=y, progress=1)
    refused(ValueError, "out overlaps the array", run, x[1:], bn, out=x[:-1])
    held = np.load(path, mmap_mode="r+")
    refused(ValueError, "out overlaps the array", run, held[1:], bn, out=np.load(path, mmap_mode="r+")[:-1])
    refused(ValueError, "work in place can have no state", run, held, bn, out=held, state=tmp_path / "s")
    refused(
        ValueError, "state and out are the same file", run, path, bn, out=tmp_path / "s.npy", state=tmp_path / "s.npy"
    )
    refused(ValueError, "is there and is no state", run, path, bn, out=tmp_path / "y.npy", state=path)
    refused(TypeError, "moments must be cbn.Moments", cbn.outofcore.standardize, path, 3, out=y, channel_axis=1)
    refused(
        ValueError, "moments are of 6 channels; expected 12", cbn.outofcore.standardize, path, cbn.moments(x), out=y
    )
    refused(TypeError, "unexpected keyword", cbn.outofcore.standardize, path, out=y, epsilon=1)
    refused(TypeError, "running must be cbn.RunningMoments", cbn.outofcore.update, 3, path)
    refused(ValueError, "expected (..., 5)", cbn.outofcore.update, cbn.RunningMoments(5), path)
    refused(ValueError, "channel_axis 4 is out of range", cbn.outofcore.moments, path, channel_axis=4)
    refused(TypeError, "skipna must be a bool", cbn.outofcore.moments, path, skipna=1)
    assert np.array_equal(np.load(path), x)


def test_an_update_is_whole_or_not_at_all(x):
    running = cbn.RunningMoments(12).update(x)
    before, source = running._rows(), Chunked(x, (3, 6, 10, 12))
    source.fail_at = 4
    with pytest.raises(OSError, match="the disk is gone"):
        cbn.outofcore.update(running, source, memory=60_000)
    assert np.array_equal(running._rows(), before)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal(rng, monkeypatch, x):
    pytest.importorskip("tqdm")
    for options, shown in (({}, True), ({"progress": False}, False)):
        stream = Terminal()
        monkeypatch.setattr(sys, "stderr", stream)
        cbn.outofcore.batch_norm(x, cbn.BatchNorm(6), out=np.empty_like(x), memory=20_000, **options)
        assert ("batch_norm: 100%" in stream.getvalue()) == shown
        assert ("173k/173k" in stream.getvalue()) == shown  # read twice


def test_the_benchmark_checks_its_contenders(tmp_path):
    from benchmarks import outofcore

    assert outofcore.make(tmp_path, 1) == 64 * 4 * 64 * 56 * 56
    for name in outofcore.CONTENDERS:
        seconds, peak = outofcore.one_turn(tmp_path, name)
        assert seconds > 0
        assert peak is None or 2e7 < peak < 5e8
        outofcore.check(tmp_path, name)
        (tmp_path / "y.npy").unlink(missing_ok=True)
    outofcore.one_turn(tmp_path, "evaluation")
    np.load(tmp_path / "y.npy", mmap_mode="r+")[21] += 1
    with pytest.raises(RuntimeError, match="evaluation: y is wrong from sample 21 on"):
        outofcore.check(tmp_path, "evaluation")
