"""Every test and doctest starts, and leaves the process, with nothing asked about threads or instruction sets."""

import pytest

from cbn.kernels import passes


@pytest.fixture(autouse=True)
def _process_state():
    here, process = passes.asked_threads()
    isa = passes.isa()
    knobs = passes.tune(bytes_per_thread=1)  # parallel regions for small arrays too
    passes.tune(**knobs)
    yield
    passes.ask_threads(here=here, process=process)
    passes.use_isa(isa)
    passes.tune(**knobs)
