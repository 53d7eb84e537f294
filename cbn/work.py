"""Work on an array in blocks: how large they are, the loop over them, and a state from which it goes on.

An array is read once to measure it, or to apply something to it, or for both, one after the other.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from . import checks, storage
from .blocks import Blocks, InMemory, Mapped, Slices, cut, positions, target_of
from .checks import Array, Number
from .moments import Moments
from .progress import bar_on_terminal
from .threads import num_threads

BLOCK = 8 << 20  # bytes of a block of numpy's arrays, which stays in the caches between reading, arithmetic and writing
PAUSE = 0.5  # seconds from a record of the state to the next
FORMAT = "cbn.outofcore 1"
PHASES = ("measured", "applied")

Path = str | os.PathLike[str]


class Work:
    """A call: its array, where results go, and how far it has come."""

    def __init__(
        self,
        name: str,
        source: Blocks,
        out: tuple[Any, Any] | None,  # and its dtype
        memory: Number,
        state: Path | None,
        progress: bool,
        settings: dict[str, Any],
        *,
        measures: bool = True,
        whole: Sequence[int] = (),
    ) -> None:
        memory = int(checks.number(memory, "memory", "a number of bytes"))
        shown = checks.boolean(progress, "progress")
        path = None if state is None else os.path.realpath(os.fspath(state))
        record = None if path is None else _read(path)
        self.source, self.target, self.result = source, None, None
        if out is not None:
            if path is not None and isinstance(out[0], (str, os.PathLike)) and os.path.realpath(out[0]) == path:
                raise ValueError("state and out are the same file")
            self.target = target_of(out[0], source, out[1], record is not None)
        try:
            in_place = self.target is not None and self.target.is_same(source)
            if in_place and path is not None:
                raise ValueError(
                    "work in place can have no state: after an interruption it would not be known what is done"
                )
            self.size = _size_of_blocks(source, self.target, memory, whole)
            array = {"shape": source.shape, "dtype": str(source.dtype), "modified": source.modified}
            work = {"format": FORMAT, "work": name, **array, "memory": memory, "block": self.size, **settings}
            self.journal = None if path is None else Journal(path, work, record, self.target)
        except BaseException:
            self._abandon(record is not None)
            raise
        n_reads = measures + (out is not None)
        n_bytes = n_reads * source.dtype.itemsize * math.prod(source.shape)
        self.bar = bar_on_terminal(shown, desc=name, total=n_bytes, unit="B", unit_scale=True)

    def __enter__(self) -> Work:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self.bar is not None:
            self.bar.close()
        try:
            if self.journal is not None:
                self.journal.close(kind is None)
            if kind is None and self.target is not None:
                self.result = self.target.finish()
        finally:
            self._abandon(self.journal is not None and os.path.exists(self.journal.path))

    def _abandon(self, resumable: bool) -> None:
        if self.target is not None:
            self.target.abandon(resumable)

    def measure(self, measure: Callable[[Array], Moments], none: Moments, axis: int | None) -> Moments:
        """The moments of all blocks, merged with `none` in their order; axis: that of the channels, where it is cut."""
        known = None if self.journal is None else self.journal.moments
        total = (none if known is None else known())._copy()

        def merge(at: Slices) -> None:
            total._merge(measure(self.source.read(at)), slice(None) if axis is None else at[axis])

        self._each("measured", merge, total._copy)
        return total

    def apply(self, apply: Callable[[Array, slice, Array], object], axis: int) -> None:
        """Let `apply` write the result of each block, from the block, its channels and memory for it."""
        target = self.target
        assert target is not None

        def write(at: Slices) -> None:
            y = target.room(at)
            with num_threads(1):  # which is faster than files are, and leaves the other cores to them
                apply(self.source.read(at), at[axis], y)
            target.write(at, y)
            target.give_back(at)

        self._each("applied", write)

    def _each(self, phase: str, do: Callable[[Slices], None], moments: Callable[[], Moments] | None = None) -> None:
        """Every block, from where an interrupted run came to."""
        source, journal = self.source, self.journal
        done = 0 if journal is None else journal.done[phase]
        blocks: Iterator[Slices | None] = positions(source.shape, self.size, source.order)
        for i, (at, following) in enumerate(itertools.pairwise(itertools.chain(blocks, [None])), 1):
            assert at is not None
            if following is not None and i >= done:
                source.prefetch(following)
            if i > done:
                do(at)
                source.give_back(at)
                if journal is not None:
                    journal.reached(phase, i, moments)
            if self.bar is not None:
                self.bar.update(source.dtype.itemsize * math.prod(s.stop - s.start for s in at))


def _size_of_blocks(source: Blocks, target: Blocks | None, memory: int, whole: Sequence[int]) -> tuple[int, ...]:
    """The shape of the blocks: of whole chunks, so that none is read twice, or written by two blocks."""
    units, itemsize = source.units, source.dtype.itemsize
    per_value = itemsize * (source.copies + (not source.dtype.isnative))
    in_memory = isinstance(source, InMemory)
    if target is not None:
        units = tuple(math.lcm(a, b) for a, b in zip(units, target.units, strict=True))
        itemsize, in_memory = max(itemsize, target.dtype.itemsize), in_memory and isinstance(target, InMemory)
        per_value += target.dtype.itemsize * target.copies
    limit = memory // per_value
    size = cut(source.shape, source.order, units, whole, min(limit, BLOCK // itemsize) if in_memory else limit)
    needed = per_value * math.prod(size)
    if isinstance(source, Mapped):
        needed = max(needed, source.span(tuple(slice(0, n) for n in size)))
    if needed > memory:
        raise ValueError(
            f"memory is {memory:,} bytes, but the smallest block of the array has shape {size}, of chunks of {units}, "
            f"and takes {needed:,}"
        )
    return size


# ---- the state -------------------------------------------------------------------------------------------------------


class Journal:
    """The state file: it says how far the work has come, a little behind, when that much is on the disk.

    Threads write it, one at a time, since the disk takes its time.
    """

    def __init__(self, path: str, work: dict[str, Any], record: dict[str, Any] | None, target: Blocks | None) -> None:
        work = json.loads(json.dumps(work))  # where tuples are lists
        if record is not None:
            _refuse_other(path, record["work"], work)
        self.path, self.work, self.target = path, work, target
        self.done = {phase: 0 if record is None else record[phase] for phase in PHASES}
        self.moments: Callable[[], Moments] | None = None
        if record is not None and record["moments"] is not None:
            found = Moments.from_bytes(base64.b64decode(record["moments"]), allow_nonfinite=True)
            self.moments = lambda: found
        self.thread: threading.Thread | None = None
        self.written = -math.inf
        self.error: BaseException | None = None

    def reached(self, phase: str, n_blocks: int, moments: Callable[[], Moments] | None) -> None:
        """So many blocks are done."""
        self.done[phase] = n_blocks
        if moments is not None:
            self.moments = moments
        if time.monotonic() < self.written + PAUSE or (self.thread is not None and self.thread.is_alive()):
            return
        if self.error is not None:
            raise self.error
        if self.target is not None:
            self.target.flush()
        self.thread = threading.Thread(target=self._write, args=(self._record(),), name="cbn.outofcore")
        self.thread.start()

    def close(self, complete: bool) -> None:
        """Remove the state if the work is complete, else write how far it came."""
        if self.thread is not None:
            self.thread.join()
        if not complete:
            with contextlib.suppress(Exception):  # of a write: the last record stays
                if self.target is not None:
                    self.target.flush()
                self._write(self._record())
            return
        if self.error is not None:
            raise self.error
        if self.target is not None:
            self.target.flush()
            self.target.sync()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)

    def _record(self) -> bytes:
        moments = None if self.moments is None else base64.b64encode(self.moments().to_bytes()).decode()
        return json.dumps({"work": self.work, **self.done, "moments": moments}, indent=1).encode()

    def _write(self, record: bytes) -> None:
        try:
            if self.target is not None:
                self.target.sync()
            storage.replace(self.path, record)
        except BaseException as error:
            self.error = error
        self.written = time.monotonic()


def _read(path: str) -> dict[str, Any] | None:
    """The record in a state file; None if there is no file."""
    try:
        with open(path, "rb") as file:
            record = json.load(file)
        right = record["work"]["format"] == FORMAT and all(type(record[phase]) is int for phase in PHASES)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        right = False
    if not right:
        raise ValueError(
            f"state is {path!r}, which is there and is no state of cbn.outofcore: remove it, or name another"
        )
    return record  # type: ignore[no-any-return]


def _refuse_other(path: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    """An error for a state of other work, which names what differs."""
    differ = [
        f"{name} was {before.get(name)}, and is {value}" for name, value in now.items() if before.get(name) != value
    ]
    if differ:
        raise ValueError(f"state is {path!r}, of other work: {'; '.join(differ)}; remove it to begin anew")


def digest(*values: Any) -> str:
    """What tells values from others, arrays in full."""
    found = hashlib.sha256()
    for value in values:
        for part in value if isinstance(value, tuple) else (value,):
            found.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
    return found.hexdigest()[:16]
