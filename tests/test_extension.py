"""The example extension, which cimports cbn's passes: built as its author would build it, and called."""

import importlib.util
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import cbn
from cbn import reference
from cbn.kernels import engine, passes

from .paths import agree

SOURCE = Path(__file__).parents[1] / "examples" / "extension"
# setup.py as a user runs it where cbn is an editable install: a finder gives it, and no folder of sys.path has it
EDITABLE = f"""
import importlib.util, runpy, sys

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "cbn":
            return importlib.util.spec_from_file_location(name, {cbn.__file__!r})

sys.meta_path.insert(0, Finder)
sys.argv = ["setup.py", "-q", "build_ext", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    pytest.importorskip("Cython")
    folder = tmp_path_factory.mktemp("extension")
    for name in ("setup.py", "frames.pyx"):
        shutil.copy(SOURCE / name, folder)
    done = subprocess.run([sys.executable, "-c", EDITABLE], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (library,) = folder.glob("frames.*.so")
    spec = importlib.util.spec_from_file_location("frames", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("shape", [(5, 300, 7), (3, 9000, 64), (2, 70, 3000), (2, 1, 4)])
@pytest.mark.parametrize("threads", [1, 3])
def test_frames_are_normalized(frames, parallel, rng, shape, threads):
    x = (rng.standard_normal(shape) + 5).astype(np.float32)
    y = np.empty_like(x)
    with cbn.num_threads(threads):
        mean, var = frames.normalize_frames(x, y)
    moments = [reference.moments(frame) for frame in x]
    for frame, found, (n, frame_mean, m2) in zip(x, y, moments, strict=True):
        agree(found, reference.normalize(frame, frame_mean, m2 / n), 1e-6)
    agree(mean, np.mean([m[1] for m in moments], axis=0), 1e-12)
    agree(var, np.mean([m[2] / m[0] for m in moments], axis=0), 1e-12)
    same = x.copy()
    frames.normalize_frames(same, same)
    assert (same == y).all()


@pytest.mark.parametrize("shape", [(300, 7), (9000, 64), (70, 3000)])
def test_gradient(frames, parallel, rng, shape):
    x, dy = rng.standard_normal((2, *shape)).astype(np.float32)
    n, mean, m2 = reference.moments(x)
    engine.tune(l2_bytes=1 << 12, l3_bytes=1 << 24, nontemporal_bytes=0)  # the pipeline, which has copies of its own
    agree(frames.gradient(dy, x), reference.backward(dy, x, mean, m2 / n)[0], 1e-5)


def test_apply(frames, rng):
    x, coef = rng.standard_normal((50, 6)).astype(np.float32), rng.standard_normal((3, 6))
    expected = (x - coef[0]) * coef[1] + coef[2]
    frames.affine(x, coef)
    agree(x, expected, 1e-6)


def test_other_threads_run_meanwhile(frames):
    """Without the GIL: a Python thread counts while the extension works."""
    x = np.ones((400, 5000, 64), np.float32)
    counted, done = [0], threading.Event()

    def count():
        while not done.is_set():
            counted[0] += 1
            time.sleep(0)

    thread = threading.Thread(target=count)
    thread.start()
    try:
        before = counted[0]
        with cbn.num_threads(1):
            frames.normalize_frames(x, x)
        during = counted[0] - before
    finally:
        done.set()
        thread.join()
    assert during > 100


def test_what_passes_refuse(frames):
    with pytest.raises(ValueError, match="there are no frames"):
        frames.normalize_frames(np.zeros((0, 3, 4), np.float32), np.zeros((0, 3, 4), np.float32))
    with pytest.raises(ValueError, match=r"like is empty, of shape \(0, 4\)"):
        passes.Passes(np.zeros((0, 4)))
    for value in (None, [[1.0, 2.0]], np.ma.masked_less(np.zeros((2, 4)), 1)):
        with pytest.raises(TypeError, match=f"^like must be a numpy array, not {type(value).__name__}$"):
            passes.Passes(value)
    with pytest.raises(TypeError, match=r"like has dtype >f4; expected float32, .* in native byte order"):
        passes.Passes(np.zeros((2, 4), ">f4"))
    with pytest.raises(ValueError, match="like has 1 dimensions; expected 2 or more"):
        passes.Passes(np.zeros(4))
    with pytest.raises(TypeError, match="like has dtype int64"):
        passes.Passes(np.zeros((2, 4), np.int64))
    with pytest.raises(ValueError, match=r"like has strides \(64, 16\), which no loop reads: expected rows or runs"):
        passes.Passes(np.zeros((4, 8))[:, ::2])
    with pytest.raises(TypeError, match="argument"):
        passes.Passes.__new__(passes.Passes)
    with pytest.raises(ValueError, match="channel_axis 2 is out of range"):
        passes.Passes(np.zeros((4, 8)), channel_axis=2)
