"""Every test and doctest starts, and leaves the process, with nothing asked about threads or instruction sets."""

import importlib.util

import pytest

from cbn.kernels import engine

# Their doctests need these packages
OPTIONAL = {"sklearn": "cbn/sklearn.py", "torch": "cbn/torch", "mpi4py": "cbn/mpi.py", "dask": "cbn/dask.py"}
collect_ignore = [path for name, path in OPTIONAL.items() if not importlib.util.find_spec(name)]


@pytest.fixture(autouse=True)
def _process_state():
    here, process = engine.asked_threads()
    isa = engine.isa()
    knobs = engine.tune(bytes_per_thread=1)  # parallel regions for small arrays too
    engine.tune(**knobs)
    yield
    engine.ask_threads(here=here, process=process)
    engine.use_isa(isa)
    engine.tune(**knobs)
