"""show_config and the self-check."""

import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from . import checks, memory, reference, threads
from .functional import native_batch_norm, native_batch_norm_backward
from .kernels import engine

__all__ = ["show_config"]

__version__ = "0.1.0"


def openmp_runtime() -> list[str]:
    """Paths of the OpenMP runtimes in this process. More than one of them compete for the processors."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            paths = {line.split(maxsplit=5)[-1].strip() for line in maps if "/" in line}
    except OSError:
        return []
    return sorted(p for p in paths if os.path.basename(p).startswith(("libgomp", "libomp", "libiomp")))


class _Symbol(ctypes.Structure):
    """`Dl_info` of dlfcn.h."""

    _fields_ = [
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    ]


def openmp_of(library: str) -> str:
    """Path of the OpenMP runtime that a loaded library calls; empty if there is none, or no way to find out."""
    symbol = _Symbol()
    try:
        function = ctypes.cast(ctypes.CDLL(library).omp_get_max_threads, ctypes.c_void_p)
        found = ctypes.CDLL(None).dladdr(function, ctypes.byref(symbol))
    except (AttributeError, OSError, TypeError):
        return ""
    return os.path.realpath(os.fsdecode(symbol.file)) if found and symbol.file else ""


def config() -> dict[str, str]:
    """The lines of show_config, as a dict of strings."""
    info = engine.build_info()
    runtimes = openmp_runtime()
    openmp = "none: built with CBN_WITHOUT_OPENMP"
    if info["openmp"]:
        openmp = f"{info['openmp']}, {', '.join(runtimes) or 'runtime not found'}"
        if len(runtimes) > 1:
            openmp += " (more than one: parallel calls of different libraries will slow each other down)"
    knobs = engine.tune()
    why = "CBN_ISA" if os.environ.get("CBN_ISA") else "the highest available"
    return {
        "cbn": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "numpy": np.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "compiler": info["compiler"],
        "OpenMP": openmp,
        "instruction sets": f"built {', '.join(engine.built())}; available {', '.join(engine.available())}",
        "in use": f"{engine.isa()} ({why})",
        "threads": f"{threads.get_num_threads()} ({threads.explain()})",
        "caches": f"L2 {knobs['l2_bytes'] >> 10} KB a core, L3 {knobs['l3_bytes'] >> 20} MB",
        "output memory": memory.explain(),
    }


def show_config() -> None:
    """Print versions, compiler, OpenMP runtime, instruction sets, threads and memory, with the reason for each choice.

    Examples
    --------
    >>> import cbn
    >>> cbn.show_config()  # doctest: +ELLIPSIS
    cbn              ...
    """
    for name, value in config().items():
        print(f"{name:16} {value}")


def self_check(report: Callable[[str], object] = print) -> bool:
    """Compare the kernels of every available instruction set with `cbn.reference`; True if all agree.

    The check goes through every type, both layouts, whole vectors and tails, one thread and three, forward and
    backward, on data with a mean that is large beside its spread. Errors are relative to the largest exact value.
    """
    rng = np.random.default_rng(0)
    good = True
    before = engine.isa()
    region = engine.tune(bytes_per_thread=1)
    try:
        for isa in engine.available():
            engine.use_isa(isa)
            for dtype, limit in _types():
                for layout, shape, axis in (("first", (7, 5, 113), 1), ("last", (211, 37), 1)):
                    # 16-bit types have only a few values in 1000 ± 1
                    x = (rng.standard_normal(shape) + (10 if dtype.itemsize == 2 else 1000)).astype(dtype)
                    dy = rng.standard_normal(shape).astype(dtype)
                    weight, bias = rng.standard_normal((2, shape[axis])).astype(checks.parameter_dtype(dtype))
                    worst = 0.0
                    for n in (1, 3):
                        with threads.num_threads(n):
                            worst = max(worst, _largest_error(x, dy, weight, bias))
                    good &= worst <= limit
                    verdict = "ok" if worst <= limit else f"WRONG, more than {limit:.0e}"
                    report(f"{isa:11} {dtype.name:8} channels {layout:5}  largest error {worst:.1e}  {verdict}")
    finally:
        engine.use_isa(before)
        engine.tune(**region)
    return good


def unchecked() -> list[str]:
    """What `self_check` cannot check here, with the reasons."""
    lines = [f"{isa}, which this processor does not have" for isa in engine.built() if isa not in engine.available()]
    if not any(dtype.name == "bfloat16" for dtype, _ in _types()):
        lines.append("bfloat16, as ml_dtypes is not installed: pip install 'cbn[bfloat16]'")
    if not engine.build_info()["openmp"]:
        lines.append("several threads, as this is a build without OpenMP")
    return lines


def _types() -> list[tuple[np.dtype[Any], float]]:
    """Input types with the largest error allowed; bfloat16 if ml_dtypes is installed."""
    types: list[tuple[np.dtype[Any], float]] = [
        (np.dtype(np.float32), 1e-6),
        (np.dtype(np.float64), 1e-12),
        (np.dtype(np.float16), 2**-11),
    ]
    with contextlib.suppress(ImportError):
        from ml_dtypes import bfloat16

        types.append((np.dtype(bfloat16), 2**-8))
    return types


def _largest_error(x: reference.Array, dy: reference.Array, weight: reference.Array, bias: reference.Array) -> float:
    n, exact_mean, exact_m2 = reference.moments(x)
    y, mean, invstd = native_batch_norm(x, weight, bias, None, None, True, 0.1, 1e-5)
    pairs = [(y, reference.normalize(x, exact_mean, exact_m2 / n, weight, bias))]
    gradients = native_batch_norm_backward(dy, x, weight, None, None, mean, invstd, True, 1e-5)
    exact = reference.backward(dy, x, exact_mean, exact_m2 / n, weight)
    pairs += zip(gradients, exact, strict=True)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)
