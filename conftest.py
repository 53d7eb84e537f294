"""Every test and doctest starts, and leaves the process, with nothing asked about threads or instruction sets."""

import pytest

from cbn.kernels import passes


@pytest.fixture(autouse=True)
def _process_state():
    here, process = passes.asked_threads()
    isa = passes.isa()
    bytes_per_thread = passes.set_bytes_per_thread(1)  # parallel regions for small arrays too
    passes.set_bytes_per_thread(bytes_per_thread)
    yield
    passes.ask_threads(here=here, process=process)
    passes.use_isa(isa)
    passes.set_bytes_per_thread(bytes_per_thread)
