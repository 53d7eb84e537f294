"""Nothing outside an array is read or written: pages that must not be touched stand before and behind it."""

import ctypes
import mmap
import sys

import numpy as np
import pytest

import cbn
from cbn.functional import batch_norm, native_batch_norm, native_batch_norm_backward
from cbn.kernels import engine

from .paths import INPUT_DTYPES, PARAMETERS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mprotect as Linux has it")

# Runs and rows whose ends lie at every place in a vector, a line, a tile; each also with channels last
SHAPES = [(2, 3, 17), (9, 5, 49), (33, 7), (40, 70), (3, 130), (5, 3, 200), (12, 40, 7, 7), (70, 1030), (1, 5, 33),
          (64, 9, 129), (300, 3)]  # fmt: skip
PIPELINE, TWO_PASSES = {"l2_bytes": 1 << 15, "l3_bytes": 0}, {"l2_bytes": 0, "l3_bytes": 0}
PATHS = [
    PIPELINE | {"nontemporal_bytes": 0},
    PIPELINE | {"nontemporal_bytes": 1 << 40},
    TWO_PASSES | {"nontemporal_bytes": 0},
]


def guarded(shape, dtype, at_end):
    """An array at one end of memory of its own, between two pages that end the process when they are touched."""
    size, page = int(np.prod(shape)) * np.dtype(dtype).itemsize, mmap.PAGESIZE
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 2) * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    mprotect = ctypes.CDLL(None).mprotect
    for guard in (address, address + (pages + 1) * page):
        assert mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0
    begin = page + (pages * page - size if at_end else 0)
    return np.frombuffer(memory, np.uint8, size, begin).view(dtype).reshape(shape)


@pytest.mark.parametrize("dtype", INPUT_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("at_end", [False, True])
def test_nothing_outside_an_array_is_touched(isa, parallel, rng, dtype, shape, at_end):
    x, y, g, z = (guarded(shape, dtype, at_end) for _ in range(4))
    x[...], g[...], z[...] = rng.standard_normal((3, *shape)).astype(dtype)
    for knobs in PATHS:
        engine.tune(**knobs)
        for axis in {1, len(shape) - 1}:
            mean, var = np.zeros(shape[axis]), np.ones(shape[axis])
            for parameters in {np.float64, PARAMETERS[dtype]}:
                batch_norm(x, mean.astype(parameters), var.astype(parameters), out=y, channel_axis=axis)
            if x.size > shape[axis]:
                _, *saved = native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5, out=y, channel_axis=axis)
                native_batch_norm_backward(g, x, None, None, None, *saved, True, 1e-5, out=y, channel_axis=axis)
                fused = cbn.BatchNorm(shape[axis], channel_axis=axis, activation="relu")
                fused(x, residual=z, out=y)
                fused.backward(g, out=y)
