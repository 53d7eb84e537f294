"""`SyncBatchNorm` over the ranks of an MPI communicator, by mpi4py (extra `mpi`)."""

from __future__ import annotations

import atexit
import faulthandler
import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import checks, sync
from .checks import Doubles, Number

try:
    from mpi4py import MPI
except ImportError as error:
    raise ImportError('cbn.mpi needs mpi4py 4 or newer: pip install "cbn[distributed]"') from error
except RuntimeError as error:
    raise ImportError(f"mpi4py found no MPI, as the package mpich brings one: {error}") from error

__all__ = ["MissingRanksError", "SyncBatchNorm"]

CALL, HERE = 1, 2  # tags of a roll call: who is there, and an answer
SPIN = 1e-3  # seconds of waiting without sleep; most exchanges are done by then
NAP = 100e-6
GRACE = 1.0  # seconds for the answers to a roll call, and at most a quarter of the timeout
END = 3.0  # seconds for the end of MPI after ranks were missing

_EXCHANGE = MPI.Comm.Create_keyval()  # an attribute of a communicator, which ends with it: handles are used again
_ending: list[str] = []  # why `_end` is registered


class MissingRanksError(TimeoutError):
    """Some ranks have not come to an exchange in time.

    Attributes
    ----------
    ranks : tuple of int
        Those that did not answer.
    """

    def __init__(self, message: str, ranks: tuple[int, ...]) -> None:
        super().__init__(message)
        self.ranks = ranks


@dataclass
class _Gathering:
    """What is under way; holds the memory that MPI reads and writes."""

    request: Any
    mine: Doubles
    all: Doubles
    what: str


class Exchange:
    """A communicator of cbn's own, over the ranks of somebody's, so that no message meets one of theirs."""

    def __init__(self, comm: Any) -> None:
        self.comm = comm.Dup()
        self.broken = ""
        self.lost: list[_Gathering] = []  # MPI may still write to them

    def start(self, rows: Doubles, what: str) -> _Gathering:
        if self.broken:
            raise RuntimeError(f"{what} cannot exchange anything any more, since {self.broken}")
        mine = np.ascontiguousarray(rows, dtype=np.float64)
        gathering = _Gathering(None, mine, np.empty((self.comm.size, *mine.shape)), what)
        gathering.request = self.comm.Iallgather(mine, gathering.all)
        return gathering

    def finish(self, started: _Gathering, timeout: float | None) -> list[Doubles]:
        if timeout is None:
            started.request.Wait()
            return list(started.all)
        begin, grace = time.monotonic(), min(GRACE, timeout / 4)
        while not self._is_done(started):
            waited = time.monotonic() - begin
            if waited > timeout - grace:
                missing = self._roll_call(grace)
                if not self._is_done(started):
                    self._give_up(started, f"within {timeout:g} s", missing)
            elif waited > SPIN:
                self._answer()
                time.sleep(NAP)
            else:
                os.sched_yield()  # to a rank that shares this core
        return list(started.all)

    def _is_done(self, started: _Gathering) -> bool:
        try:
            return bool(started.request.Test())
        except MPI.Exception as error:  # of an MPI that notices dead ranks
            self._give_up(started, f"({error})", self._roll_call(GRACE))
            raise

    # ---- who is missing ----

    def _roll_call(self, seconds: float) -> set[int]:
        """The ranks that are not here: neither do they answer in so many seconds, nor have they called themselves."""
        me, missing = self.comm.rank, set(range(self.comm.size)) - {self.comm.rank}
        self._to_all(CALL, missing)
        end = time.monotonic() + seconds
        while time.monotonic() < end:  # to the end, as those who are missing may come yet
            missing -= self._received(HERE) | self._answer()
            time.sleep(NAP)
        return missing - {me}

    def _answer(self) -> set[int]:
        """Answer those that call; who calls is here."""
        callers = self._received(CALL)
        self._to_all(HERE, callers)
        return callers

    def _to_all(self, tag: int, ranks: set[int]) -> None:
        for rank in ranks:
            try:
                self.comm.Isend([b"", MPI.BYTE], rank, tag).Free()
            except MPI.Exception:  # it is dead
                continue

    def _received(self, tag: int) -> set[int]:
        found: set[int] = set()
        status = MPI.Status()
        try:
            while self.comm.Iprobe(MPI.ANY_SOURCE, tag, status):
                self.comm.Recv([bytearray(0), MPI.BYTE], status.Get_source(), tag)
                found.add(status.Get_source())
        except MPI.Exception:
            pass
        return found

    def _give_up(self, started: _Gathering, when: str, missing: set[int]) -> None:
        ranks = tuple(sorted(missing))
        who = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
        if not ranks:
            who = "some rank, which answers all the same,"
        came = f"{who} of {self.comm.size} did not come to {started.what} {when}"
        if not _ending:
            atexit.register(_end)
            _ending.append(came)
        self.broken = came
        self.lost.append(started)
        raise MissingRanksError(f"rank {self.comm.rank} waited in vain: {came}", ranks)


def _end() -> None:
    """End MPI, which may wait for dead ranks for ever, and hold Python's lock: a C thread ends the process then."""
    with open(os.devnull, "w") as nowhere:
        faulthandler.dump_traceback_later(END, exit=True, file=nowhere)
        MPI.Finalize()
        faulthandler.cancel_dump_traceback_later()


class _Engine:
    """The exchange of a layer, with its timeout."""

    def __init__(self, exchange: Exchange, timeout: float | None) -> None:
        self.exchange, self.timeout = exchange, timeout

    def start(self, rows: Doubles, what: str) -> _Gathering:
        return self.exchange.start(rows, what)

    def finish(self, started: _Gathering) -> list[Doubles]:
        return self.exchange.finish(started, self.timeout)


def _exchange_of(comm: Any) -> Exchange:
    """The exchange over a communicator's ranks. The first call of this is collective."""
    exchange = comm.Get_attr(_EXCHANGE)
    if exchange is None:
        exchange = Exchange(comm)
        comm.Set_attr(_EXCHANGE, exchange)
    return exchange  # type: ignore[no-any-return]


class SyncBatchNorm(sync.SyncBatchNorm):
    """Batch normalization over the batches of all ranks of an MPI communicator.

    In training the statistics are those of all ranks' values, merged in the order of the ranks, so that outputs do not
    depend on how a batch is divided, and running statistics have the same bits on every rank. A rank may have any
    number of samples, one or none. Each call exchanges once in forward (count, mean and m2 of every channel) and once
    in backward (count and two sums). Gradients of weight and bias are those of the rank's own batch, for the optimizer
    to add up. Evaluation exchanges nothing.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, ...
        As for `cbn.BatchNorm`, but for ``ghost_batch_size``, ``renorm`` and ``num_domains``.
    comm : mpi4py.MPI.Comm, optional
        COMM_WORLD by default. All its ranks make the layer, as cbn duplicates the communicator.
    timeout : float, optional
        Seconds that a rank waits for the others; None: for ever.
    name : str, optional
        Of the layer, in errors.

    Raises
    ------
    MissingRanksError
        If ranks have not come within `timeout`. The exchange is of no use after it.

    Notes
    -----
    A rank that raises does not come to the next exchange, and the others wait for it. With a `timeout` they then ask
    all ranks whether they are there, in the last quarter of it, and name those that do not answer.

    Examples
    --------
    Run by ``mpiexec -n 2 python train.py``, with a part of the batch on each rank::

        bn = cbn.mpi.SyncBatchNorm(64, timeout=60)
        y = bn(x)
        dx = bn.backward(dy)
    """

    def __init__(
        self,
        *args: Any,
        comm: Any = None,
        timeout: Number | None = None,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        comm = MPI.COMM_WORLD if comm is None else comm
        if not isinstance(comm, MPI.Intracomm) or comm == MPI.COMM_NULL:
            raise TypeError(f"comm must be an mpi4py.MPI.Intracomm, not {type(comm).__name__}")
        if timeout is not None:
            timeout = checks.number(timeout, "timeout", "seconds, or None")
            if not timeout > 0:
                raise ValueError(f"timeout must be positive, or None, but got {timeout:g}")
        if name is not None:
            self.label = f"{name!r}"
        self.engine = _Engine(_exchange_of(comm), timeout) if comm.size > 1 else None
