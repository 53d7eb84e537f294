"""The number of threads, which this module alone decides.

It is the number that the calling thread asked for (`num_threads`), else the number that the process asked for
(`set_num_threads`, or CBN_NUM_THREADS), else OpenMP's own number. A number that was asked for is used as it is.
OpenMP's number is read at each call and bounded by the processors that the process may use: its affinity, and its
control group's quota, which OpenMP runtimes ignore. The number travels with each parallel region, so nothing in the
host program changes. If the threads cannot be created, or in a forked child, a region has fewer (kernels/threads.c).
"""

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

from . import checks
from .kernels import engine

__all__ = ["get_num_threads", "num_threads", "set_num_threads"]

environment = 0  # threads from CBN_NUM_THREADS; 0: not set


def checked(n: int | None, name: str = "n") -> int:
    """n as a number of threads, 0 for None."""
    if n is None:
        return 0
    n = checks.integer(n, name, "a number of threads or None")
    if not 1 <= n <= engine.MAX_THREADS:
        raise ValueError(f"{name} must be a number of threads from 1 to {engine.MAX_THREADS}, but got {n}")
    return n


def set_num_threads(n: int | None) -> None:
    """Use n threads in this process, from the next call on. n may exceed the number of processors.

    Parameters
    ----------
    n : int or None
        Number from 1 to 1024. None restores the default, which is CBN_NUM_THREADS if it is set.

    Raises
    ------
    TypeError, ValueError
        If n is not such a number.

    Examples
    --------
    >>> import cbn
    >>> cbn.set_num_threads(2)
    >>> cbn.get_num_threads()
    2
    """
    engine.ask_threads(process=checked(n) or environment)


def get_num_threads() -> int:
    """Return the number of threads that a large call from this thread would use now, as far as that is known.

    That call finds out whether the system creates so many. If it does not, this number is smaller from then on, until a
    call finds more; one call a second tries.
    """
    return engine.get_threads()


def num_threads(n: int | None) -> contextlib.AbstractContextManager[None]:
    """Use n threads for the calls of this thread inside the `with` block.

    Parameters
    ----------
    n : int or None
        Number from 1 to 1024. None means the number of the process, also inside another such block.

    Raises
    ------
    TypeError, ValueError
        If n is not such a number.

    Examples
    --------
    >>> import cbn
    >>> with cbn.num_threads(1):
    ...     cbn.get_num_threads()
    1
    """
    return _num_threads(checked(n))


@contextlib.contextmanager
def _num_threads(n: int) -> Iterator[None]:
    before, _ = engine.asked_threads()
    engine.ask_threads(here=n)
    try:
        yield
    finally:
        engine.ask_threads(here=before)


def cgroup_quota(root: str | Path = "/sys/fs/cgroup", own: str | Path = "/proc/self/cgroup") -> int:
    """Processors that the control group's quota allows, rounded up; 0 without a quota.

    Version 2 keeps "max 100000" or "150000 100000" in cpu.max of the process's group and of every group above it;
    version 1 has two files. A container sees its own group at the root.
    """
    root = Path(root)
    folders = [root]
    with contextlib.suppress(OSError):
        for line in Path(own).read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            base = root if not controllers else root / "cpu"
            if not controllers or "cpu" in controllers.split(","):
                parts = [p for p in path.split("/") if p not in ("", "..")]
                folders += [base.joinpath(*parts[:i]) for i in range(len(parts) + 1)]
    limits = []
    for folder in folders:
        for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
            with contextlib.suppress(OSError, ValueError):
                quota, period = " ".join(Path(folder, name).read_text() for name in names).split()
                if quota not in ("max", "-1"):
                    limits.append(math.ceil(int(quota) / int(period)))
    return max(1, min(limits)) if limits else 0


def explain() -> str:
    """The reason for the number of `get_num_threads`."""
    n = engine.get_threads()
    here, process = engine.asked_threads()
    info = engine.build_info()
    if info["pool_lost"]:
        return "forked child: the OpenMP threads of this thread stayed in the parent; new threads have their own"
    if not info["openmp"]:
        return "built without OpenMP"
    if n < info["threads_wanted"]:
        return f"of {info['threads_wanted']} no more could be created"
    if here:
        return "num_threads()"
    if process:
        return "CBN_NUM_THREADS" if process == environment else "set_num_threads()"
    bounds = f"OpenMP {info['openmp_max_threads']}, affinity {info['openmp_num_procs']}"
    return bounds + (f", quota {info['cgroup_threads']}" if info["cgroup_threads"] else "")


def _at_import() -> None:
    global environment
    engine.set_cgroup_threads(cgroup_quota())
    if asked := os.environ.get("CBN_NUM_THREADS", "").strip():
        if not (asked.isascii() and asked.isdigit() and len(asked) < 20 and 1 <= int(asked) <= engine.MAX_THREADS):
            raise ValueError(
                f"CBN_NUM_THREADS must be a number of threads from 1 to {engine.MAX_THREADS}, not {asked!r}"
            )
        environment = int(asked)
    engine.ask_threads(process=environment)


_at_import()
