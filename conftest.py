"""Every test and doctest starts, and leaves the process, with nothing asked about threads or instruction sets."""

import importlib.util

import pytest

from cbn.kernels import engine

# Its doctests need scikit-learn
collect_ignore = [] if importlib.util.find_spec("sklearn") else ["cbn/sklearn.py"]


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
