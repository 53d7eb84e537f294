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
from typing import Any, NamedTuple

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
        memory = _bytes(memory)
        shown = checks.boolean(progress, "progress")
        path = None if state is None else os.path.realpath(os.fspath(state))
        record = None if path is None else _read(path)
        self.source, self.target, self.result = source, None, None
        if out is not None:
            if path is not None and isinstance(out[0], (str, os.PathLike)) and os.path.realpath(out[0]) == path:
                raise ValueError("state and out are the same file")
            begun = None if record is None else record["work"].get("out", {})
            self.target = target_of(out[0], source, out[1], begun)
        try:
            self._refuse_state_in_memory(path)
            self.size = _size_of_blocks(source, self.target, memory, whole)
            about = {} if self.target is None else {"out": self.target.identity}
            array: dict[str, Any] = {"shape": source.shape, "dtype": str(source.dtype), "array": source.identity}
            if not (self.target is not None and self.target.is_in_file_of(source)):
                array["modified"] = source.modified
            work = {"format": FORMAT, "work": name, **array, **about, "memory": memory, "block": self.size, **settings}
            n_blocks = math.prod(-(-n // max(size, 1)) for n, size in zip(source.shape, self.size, strict=True))
            self.journal = Journal(path, work, record, self.target, n_blocks)
        except BaseException:
            self._abandon(record is not None)
            raise
        n_reads = measures + (out is not None)
        n_bytes = n_reads * source.dtype.itemsize * math.prod(source.shape)
        self.bar = bar_on_terminal(shown, desc=name, total=n_bytes, unit="B", unit_scale=True)

    def _refuse_state_in_memory(self, path: str | None) -> None:
        if self.target is None:
            return
        if self.target.is_same(self.source) and path is not None:
            raise ValueError(
                "work in place can have no state: after an interruption it would not be known what is done"
            )
        if path is not None and self.target.identity is None:
            raise ValueError("with a state, out must be a file: an array in memory ends with the process")

    def __enter__(self) -> Work:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self.bar is not None:
            self.bar.close()
        try:
            self.journal.close(kind is None)
            if kind is None and self.target is not None:
                self.result = self.target.finish()
        finally:
            self._abandon(self.journal.path is not None and os.path.exists(self.journal.path))

    def _abandon(self, resumable: bool) -> None:
        if self.target is not None:
            self.target.abandon(resumable)

    def measure(self, measure: Callable[[Array], Moments], none: Moments, axis: int | None) -> Moments:
        """The moments of all blocks, merged with `none` in their order; axis: that of the channels, where it is cut."""
        journal = self.journal
        if journal.progress.moments is None:
            journal.progress = journal.progress._replace(moments=none)

        def merge(i: int, at: Slices) -> Progress:
            part, total = measure(self.source.read(at)), journal.progress.moments
            assert total is not None
            return Progress(i, 0, total._with_part(part, slice(None) if axis is None else at[axis]))

        self._each(journal.progress.measured, merge)
        total = journal.progress.moments
        assert total is not None
        return total

    def apply(self, apply: Callable[[Array, slice, Array], object], axis: int) -> None:
        """Let `apply` write the result of each block, from the block, its channels and memory for it."""
        target = self.target
        assert target is not None

        def write(i: int, at: Slices) -> Progress:
            y = target.room(at)
            with num_threads(1):  # which is faster than files are, and leaves the other cores to them
                apply(self.source.read(at), at[axis], y)
            target.write(at, y)
            target.give_back(at)
            return self.journal.progress._replace(applied=i)

        self._each(self.journal.progress.applied, write)

    def _each(self, done: int, do: Callable[[int, Slices], Progress]) -> None:
        """Every block after the first `done`, from where an interrupted run came to."""
        source = self.source
        blocks: Iterator[Slices | None] = positions(source.shape, self.size, source.order)
        for i, (at, following) in enumerate(itertools.pairwise(itertools.chain(blocks, [None])), 1):
            assert at is not None
            if following is not None and i >= done:
                source.prefetch(following)
            if i > done:
                self.journal.progress = do(i, at)  # one assignment: an interruption finds all of a block or nothing
                source.give_back(at)
                self.journal.write()
            if self.bar is not None:
                self.bar.update(source.dtype.itemsize * math.prod(s.stop - s.start for s in at))


def _bytes(memory: Any) -> int:
    found = checks.number(memory, "memory", "a number of bytes")
    if not 1 <= found < math.inf:
        raise ValueError(f"memory must be a number of bytes, 1 or more, but got {found:g}")
    return int(found)


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
    limit = min(limit, BLOCK // itemsize) if in_memory else limit
    size = cut(source.shape, source.order, units, whole, limit)
    while limit > 1 and _span(source, size) > memory:  # of an array with gaps
        limit //= 2
        size = cut(source.shape, source.order, units, whole, limit)
    needed = max(per_value * math.prod(size), _span(source, size))
    if needed > memory:
        raise ValueError(
            f"memory is {memory:,} bytes, but the smallest block of the array has shape {size}, of chunks of {units}, "
            f"and takes {needed:,}"
        )
    return size


def _span(source: Blocks, size: Sequence[int]) -> int:
    """Bytes of memory that a block of a memmap may bring in."""
    return source.span(tuple(slice(0, n) for n in size)) if isinstance(source, Mapped) else 0


# ---- the state -------------------------------------------------------------------------------------------------------


class Progress(NamedTuple):
    """How far work has come: blocks measured and applied, and the moments of those that are measured."""

    measured: int
    applied: int
    moments: Moments | None


class Journal:
    """The state file: it says how far the work has come, a little behind, when that much is on the disk.

    Threads write it, one at a time, since the disk takes its time. Without a path there is no file.
    """

    def __init__(
        self,
        path: str | None,
        work: dict[str, Any],
        record: dict[str, Any] | None,
        target: Blocks | None,
        n_blocks: int,
    ) -> None:
        self.path, self.work, self.target = path, json.loads(json.dumps(work)), target  # where tuples are lists
        self.progress = Progress(0, 0, None)
        if path is not None and record is not None:
            _refuse_other(path, record["work"], self.work)
            self.progress = _progress(path, record, n_blocks)
        self.thread: threading.Thread | None = None
        self.written = -math.inf
        self.error: BaseException | None = None

    def write(self) -> None:
        """Write the progress, if the last record is old enough and written."""
        if self.path is None or time.monotonic() < self.written + PAUSE:
            return
        if self.thread is not None and self.thread.is_alive():
            return
        if self.error is not None:
            raise self.error
        progress = self.progress
        if self.target is not None:
            self.target.flush()
        thread = threading.Thread(target=self._write, args=(progress,), name="cbn.outofcore")
        thread.start()
        self.thread = thread

    def close(self, complete: bool) -> None:
        """Remove the state if the work is complete, else write how far it came."""
        if self.thread is not None:
            self.thread.join()
        if not complete:
            if self.path is not None:
                with contextlib.suppress(Exception):  # of a write: the last record stays
                    if self.target is not None:
                        self.target.flush()
                    self._write(self.progress)
            return
        if self.path is None:
            return
        if self.error is not None:
            raise self.error
        if self.target is not None:
            self.target.flush()
            self.target.sync()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)

    def _write(self, progress: Progress) -> None:
        try:
            if self.target is not None:
                self.target.sync()
            found = progress.moments
            record = progress._asdict() | {
                "moments": None if found is None else base64.b64encode(found.to_bytes()).decode()
            }
            assert self.path is not None
            storage.replace(self.path, json.dumps({"work": self.work, **record}, indent=1).encode())
        except BaseException as error:
            self.error = error
        self.written = time.monotonic()


def _progress(path: str, record: dict[str, Any], n_blocks: int) -> Progress:
    """That of a record, or an error."""
    try:
        measured, applied, moments = (record[name] for name in Progress._fields)
        if not (0 <= measured <= n_blocks and 0 <= applied <= n_blocks) or (measured > 0 and moments is None):
            raise ValueError(f"{measured} and {applied} of {n_blocks} blocks")
        if moments is not None:
            moments = Moments.from_bytes(base64.b64decode(moments, validate=True), allow_nonfinite=True)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"state is {path!r}, which is damaged ({error}): remove it to begin anew") from None
    return Progress(measured, applied, moments)


def _read(path: str) -> dict[str, Any] | None:
    """The record in a state file; None if there is no file."""
    try:
        with open(path, "rb") as file:
            record = json.load(file)
        right = record["work"]["format"] == FORMAT and all(type(record[name]) is int for name in Progress._fields[:2])
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
