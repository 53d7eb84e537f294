"""The contenders: how each system does each operation, on arrays that it may lay out as it likes beforehand.

A contender is a class with `name`, `version()` (ImportError or OSError where it is absent), `supports(case)`, and a
constructor that takes (case, data) and prepares everything that is not the operation itself. `run()` is what is timed;
`results()` gives, after a run, what it computed, as numpy arrays of the case's shape, to be compared with float64.

Like is compared with like: with memory "out" a contender writes to memory that it was given before; with "called" it is
called as its users call it and allocates.
"""

from .base import EPS, Contender, Data
from .limits import LIMITS, LimitScale, LimitStream
from .onednn import OneDnnBlocked8, OneDnnBlocked16, OneDnnLast, OneDnnPlain
from .ours import OURS, Cbn
from .plain import Numpy
from .pytorch import Torch
from .runtimes import Jax, OnnxRuntime, OpenVino

__all__ = ["ALL", "EPS", "LIMITS", "OURS", "PEERS", "Cbn", "Contender", "Data", "LimitScale", "LimitStream", "Numpy"]

PEERS = (Numpy, Torch, OneDnnPlain, OneDnnLast, OneDnnBlocked8, OneDnnBlocked16, OnnxRuntime, OpenVino, Jax)
ALL = {c.name: c for c in (*OURS, *PEERS, *LIMITS)}
