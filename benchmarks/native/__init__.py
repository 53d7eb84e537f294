"""The C drivers of the benchmarks, compiled on demand into benchmarks/out; they are no part of cbn."""

import ctypes
import os
import shlex
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
BUILD = HERE.parent / "out" / "native"


def driver(name, *libraries):
    """The driver `name`.c, loaded; OSError with the compiler's words where it cannot be built."""
    source, target = HERE / f"{name}.c", BUILD / f"{name}.so"
    if not target.exists() or target.stat().st_mtime < source.stat().st_mtime:
        BUILD.mkdir(parents=True, exist_ok=True)
        # Into a file of this process's own, then renamed: several workers may build at once
        temporary = target.with_suffix(f".{os.getpid()}")
        command = [*shlex.split(os.environ.get("CC", "cc")), "-O2", "-shared", "-fPIC", "-fopenmp", str(source)]
        command += ["-o", str(temporary), *(f"-l{lib}" for lib in libraries)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise OSError(f"no C compiler: {error}") from None
        if done.returncode:
            reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
            raise OSError(f"{source.name} cannot be compiled: {reason}")
        temporary.rename(target)
    return ctypes.CDLL(str(target))
