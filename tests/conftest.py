"""What all tests share: instruction sets, layouts, and arrays that lie in memory as asked."""

import os
import subprocess
import sys
from pathlib import Path

try:
    import hypothesis  # noqa: F401
    import ml_dtypes  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"the tests need {error.name}: pip install -e '.[test]' in the checkout") from error
import numpy as np
import pytest

from cbn.kernels import engine


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
