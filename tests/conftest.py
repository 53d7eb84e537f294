"""What all tests share: instruction sets, layouts, and arrays that lie in memory as asked."""

import os
import subprocess
import sys
from pathlib import Path

try:
    import hypothesis  # noqa: F401
    import ml_dtypes
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"the tests need {error.name}: pip install -e '.[test]' in the checkout") from error
import numpy as np
import pytest

from cbn.kernels import engine

DTYPES = (np.float32, np.float64)  # of parameters
HALVES = (np.float16, ml_dtypes.bfloat16)
INPUT_DTYPES = (*DTYPES, *HALVES)
LARGE_RANGE = (*DTYPES, ml_dtypes.bfloat16)  # that hold 1e36
PARAMETERS = {half: np.float32 for half in HALVES} | {dtype: dtype for dtype in DTYPES}  # that go with inputs
# Largest error allowed, relative to the largest value of the exact result; for 16 bits half a unit in the last place.
ROUNDING = {np.dtype(np.float16): 2**-11, np.dtype(ml_dtypes.bfloat16): 2**-8}
LIMIT = {np.dtype(np.float32): 1e-6, np.dtype(np.float64): 1e-12, **ROUNDING}
# Statistics: sums are of float64, but for those of a few 16-bit elements, which are of float32.
STATISTICS_LIMIT = {np.dtype(t): 1e-12 for t in DTYPES} | {np.dtype(t): 1e-6 for t in HALVES}
GRADIENT_LIMIT = {np.dtype(np.float32): 1e-5, np.dtype(np.float64): 1e-11, **ROUNDING}

# name -> (shape, channel axis, order of the axes in memory)
LAYOUTS = {
    "NC": ((37, 19), 1, None),
    "NCL": ((5, 7, 67), 1, None),
    "NLC": ((5, 67, 7), -1, None),
    "NCHW": ((3, 5, 9, 11), 1, None),
    "NHWC": ((3, 9, 11, 21), -1, None),
    "NCHW as NHWC": ((3, 21, 9, 11), 1, (0, 2, 3, 1)),
    "NCDHW": ((2, 3, 4, 5, 7), 1, None),
    "CN": ((6, 131), 0, None),
    "CNHW in memory": ((3, 5, 9, 11), 1, (1, 0, 2, 3)),
    "C=1": ((50, 1), 1, None),
    "C=600": ((70, 600), 1, None),
}


def in_memory_order(x, order):
    """x with its axes lying in memory in this order, slowest first."""
    if order is None:
        return np.ascontiguousarray(x)
    return np.ascontiguousarray(x.transpose(order)).transpose(np.argsort(order))


def error(actual, exact):
    """Largest difference relative to the largest value of the exact result."""
    actual, exact = np.asarray(actual, np.float64), np.asarray(exact, np.float64)
    assert actual.shape == exact.shape
    scale = np.abs(exact).max() or 1.0
    return np.abs(actual - exact).max() / scale


def closed_pipe(*arguments):
    """`python -m` with these arguments, into a pipe that nobody reads any more; what it wrote elsewhere."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return subprocess.run(
            [sys.executable, "-m", *arguments], cwd=Path(__file__).parents[1], env=environment,
            stdout=writer, stderr=subprocess.PIPE, text=True, timeout=300,
        )  # fmt: skip
    finally:
        os.close(writer)


def pytest_collection_modifyitems(items):
    """Of the tests with avx512_bf16, whose loops for these types are avx512's, leave those of the others."""
    items[:] = [item for item in items if not repeats(getattr(item, "callspec", None))]


def repeats(callspec):
    return (
        callspec is not None
        and callspec.params.get("isa") == "avx512_bf16"
        and callspec.params.get("dtype") in (np.float32, np.float64, np.float16)
    )


@pytest.fixture(params=engine.available())
def isa(request):
    """Each instruction set of this processor in turn."""
    engine.use_isa(request.param)
    return request.param


@pytest.fixture
def parallel():
    """Parallel regions however small the array is."""
    engine.tune(bytes_per_thread=1)


@pytest.fixture
def rng():
    return np.random.default_rng(20150211)  # the day batch normalization was published
