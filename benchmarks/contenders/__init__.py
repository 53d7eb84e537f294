"""The contenders: how each system does each operation, on arrays that it may lay out as it likes beforehand.

A contender is a class with `name`, `version()` (ImportError or OSError where it is absent), `supports(case)`, and a
constructor that takes (case, data) and prepares everything that is not the operation itself. `run()` is what is timed;
`results()` gives, after a run, what it computed, as numpy arrays of the case's shape, to be compared with float64.

Like is compared with like: with memory "out" a contender writes to memory that it was given before; with "called" it is
called as its users call it and allocates.
"""

from .base import CLIP, EPS, RESULTS, Contender, Data
from .limits import LIMITS, LimitRead, LimitScale, LimitStream
from .modules import CbnFused, CbnModule, CompiledModule, TorchModule, exact_step
from .onednn import OneDnnBlocked8, OneDnnBlocked16, OneDnnLast, OneDnnPlain
from .ours import Cbn, CbnLayers, CbnNonTemporal, CbnPlain
from .plain import Numpy
from .pytorch import Torch
from .runtimes import Jax, OnnxRuntime, OpenVino
from .statistics import CbnStatistics, FastArrayUtils, NumpyStatistics, ScikitLearn, StableBaselines3, TorchStatistics
from .variants import Loop, Plain, Variant, exact, names_of

__all__ = ["ALL", "CLIP", "EPS", "LIMITS", "OURS", "PEERS", "RESULTS", "Cbn", "Contender", "Data", "LimitRead",
           "LimitScale", "LimitStream", "Numpy", "exact", "exact_step", "names_of", "of"]  # fmt: skip

OURS = (Cbn, CbnLayers, CbnPlain, CbnNonTemporal, Variant, Loop, CbnFused)
PEERS = (Numpy, Torch, CompiledModule, OneDnnPlain, OneDnnLast, OneDnnBlocked8, OneDnnBlocked16, OnnxRuntime,
         OpenVino, Jax, ScikitLearn, FastArrayUtils, StableBaselines3)  # fmt: skip
ALL = {c.name: c for c in (*OURS, *PEERS, *LIMITS)}
OTHERS = {  # classes under the same names
    "statistics": {c.name: c for c in (CbnStatistics, NumpyStatistics, TorchStatistics)},
    "variants": {Plain.name: Plain},
    "modules": {c.name: c for c in (CbnModule, TorchModule)},
    "steps": {c.name: c for c in (CbnModule, TorchModule)},
}


def of(name, case):
    """The class that takes part in a case under this name: some have another one for a group."""
    return OTHERS.get(case.group, {}).get(name, ALL[name])
