"""Memory: the sizes of the processor's caches, and the output memory that cbn keeps.

The page faults of a new 100 MB array cost more than the pass that fills it. cbn therefore keeps the memory of a dead
output of a megabyte or more for the next output of about its size, up to CBN_CACHE_BYTES in all (an eighth of the
memory by default; 0: none). The array owns its memory like any other, and may outlive the layer. A call of cbn that
finds too little memory gives the kept memory back and tries again.
"""

import contextlib
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

from .kernels import arrays, engine
from .kernels.arrays import empty_cache

__all__ = ["empty_cache"]

L2_BYTES, L3_BYTES = 1 << 20, 1 << 23  # if the system does not say: small for today's processors
SHARE = 8  # cbn keeps at most 1/SHARE of the memory for outputs

P = ParamSpec("P")
T = TypeVar("T")


def retried(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function that changes nothing until it has its memory: after a MemoryError cbn frees what it keeps and
    calls it again.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return arrays.with_room(function, *args, **kwargs)

    return call


def parsed_size(text: str) -> int:
    """Bytes of "48K", "1024K", "32M"."""
    text = text.strip()
    return int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]] if text[-1] in "KMG" else int(text)


def cpu_count(cpu_list: str) -> int:
    """Number of processors in "0-3,8"."""
    ranges = [part.split("-") for part in cpu_list.strip().split(",")]
    return sum(int(r[-1]) - int(r[0]) + 1 for r in ranges)


def cache_sizes(root: str | Path = "/sys/devices/system/cpu/cpu0/cache") -> tuple[int, int]:
    """(L2 of one core, L3 of all) in bytes, from the system; defaults for what it does not say."""
    sizes = {2: L2_BYTES, 3: L3_BYTES}
    for index in sorted(Path(root).glob("index*")):
        with contextlib.suppress(OSError, ValueError, KeyError, IndexError):
            level = int((index / "level").read_text())
            size, cpus = parsed_size((index / "size").read_text()), cpu_count((index / "shared_cpu_list").read_text())
            if level in sizes and (index / "type").read_text().strip() != "Instruction" and size > 0:
                copies = -(-(os.cpu_count() or 1) // cpus) if level == 3 else 1
                sizes[level] = size * copies if level == 3 else size // cpus if cpus > 2 else size
    return sizes[2], sizes[3]


def memory_bytes(cgroup: str | Path = "/sys/fs/cgroup") -> int:
    """Bytes of memory that the process may use: the machine's, or its control group's limit."""
    limits = [1 << 33]
    with contextlib.suppress(OSError, ValueError):
        limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            limits.append(int(Path(cgroup, name).read_text()))
    return min(limits)


def explain() -> str:
    """The line of show_config on output memory."""
    kept, limit = arrays.cache_state()
    why = "CBN_CACHE_BYTES" if os.environ.get("CBN_CACHE_BYTES") else f"1/{SHARE} of the memory"
    return f"{kept / 1e6:.0f} MB kept, at most {limit / 1e6:.0f} MB ({why})"


def _at_import() -> None:
    l2, l3 = cache_sizes()
    # Arrays that fill three quarters of a shared cache do not stay in it: docs/performance.md has what was measured.
    engine.tune(l2_bytes=l2, l3_bytes=l3, nontemporal_bytes=l3 * 3 // 4)
    limit = memory_bytes() // SHARE
    if asked := os.environ.get("CBN_CACHE_BYTES"):
        if not asked.isascii() or not asked.isdigit():
            raise ValueError(f"CBN_CACHE_BYTES must be a number of bytes, 0 or more, not {asked!r}")
        limit = int(asked) if len(asked) < 19 else 1 << 62
    arrays.set_cache_limit(limit)


_at_import()
