"""Statistics over the parts of a batch that several processes hold: what every engine needs, and what it has to bring.

An engine gathers: every process gives rows, (k, C) float64, and gets those of all, in an order that is the same
everywhere. All then merge them in this order, so that results have the same bits on every process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from . import course, masked
from .batchnorm import BatchNorm
from .checks import Array, ArrayLike, Doubles
from .moments import GradMoments, Moments, measure
from .steps import Context

Gather = Callable[[Doubles], list[Doubles]]


class Engine(Protocol):
    """What `SyncBatchNorm` asks of its engine: a gathering that starts and ends in two calls."""

    def start(self, rows: Doubles, what: str) -> Any:
        """Send the rows of this process, for what the words say; the result is for `finish`."""

    def finish(self, started: Any) -> list[Doubles]:
        """The rows of all processes, in their order."""


def merged_moments(found: Moments, gather: Gather) -> Moments:
    """The moments of all parts, merged in their order."""
    return Moments.merge(Moments._of(*rows) for rows in gather(np.stack(found._rows)))


def merged_sums(found: GradMoments, gather: Gather) -> GradMoments:
    """The backward sums of all parts, added in their order."""
    parts = [GradMoments(*rows) for rows in gather(np.stack([found.count, found.sum_dh, found.sum_dh_xmu]))]
    return sum(parts[1:], parts[0])


@dataclass
class Started:
    """A forward pass between `start_forward` and `finish_forward`."""

    x: ArrayLike
    options: dict[str, Any]
    gathering: Any = None  # None: nothing is gathered
    finished: bool = False


class SyncBatchNorm(BatchNorm):
    """A layer whose batch is in parts; `cbn.mpi.SyncBatchNorm` and others say where."""

    engine: Engine | None = None
    label: str
    _merges_gradients = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for name in ("ghost_batch_size", "renorm", "num_domains"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} is for a batch of one process, and SyncBatchNorm has none of it")
        super().__init__(*args, **kwargs)
        self.label = f"{type(self).__name__}({self._num_features})"

    def start_forward(
        self,
        x: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        lengths: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
        moments: Moments | None = None,
        update_stats: bool | None = None,
        **options: Any,
    ) -> Started:
        """Measure x and send its moments, so that several layers' exchanges are under way at the same time.

        Parameters
        ----------
        x, **options
            As for `forward`.

        Returns
        -------
        Started
            For `finish_forward`. All processes finish their passes in the same order.
        """
        counting = {"mask": mask, "lengths": lengths, "sample_weight": sample_weight}
        options |= {name: value for name, value in counting.items() if value is not None}
        options |= {"moments": moments} if update_stats is None else {"moments": moments, "update_stats": update_stats}
        started = Started(x, options)
        if self.engine is None or moments is not None or not self._synchronizes(options):
            return started
        inp, _ = self._input(x, None, None, None)
        if self._num_features is not None:
            self._check_channels(inp, self.running_mean, False)
        weights, selection = masked.as_weights(inp, mask, lengths, sample_weight), None
        if weights is not None and inp.layout is not None:
            inp, selection = masked.select(inp, weights)
        found = measure(inp, selection=selection)
        started.gathering = self.engine.start(np.stack(found._rows), f"the forward pass of {self.label}")
        return started

    def finish_forward(self, started: Started) -> Array:
        """Wait for the moments of all processes, and normalize with them.

        Parameters
        ----------
        started : Started
            From `start_forward`.

        Returns
        -------
        ndarray
            y, of this process's part.
        """
        if started.finished:
            raise RuntimeError("this forward pass is finished already")
        started.finished = True
        options = started.options
        if started.gathering is not None:
            assert self.engine is not None
            parts = self.engine.finish(started.gathering)
            options = options | {"moments": Moments.merge(Moments._of(*rows) for rows in parts)}
        y = super().forward(started.x, **options)
        saved = self._saved
        if isinstance(saved, Context) and self.engine is not None and started.gathering is not None:
            merge = functools.partial(_gathered_sums, self.engine, f"the backward pass of {self.label}")
            saved.special = saved.special._replace(merge=merge)
        elif isinstance(saved, Context) and saved.special.of_others:
            self._remember(course.OF_OTHERS)
        return y

    def forward(self, x: ArrayLike, **options: Any) -> Array:
        """As `BatchNorm.forward`, in training with the statistics of all processes' batches together.

        A part may have any size, one sample or none; all processes make the same calls in the same order. Evaluation,
        and a call that is given `moments`, exchange nothing.
        """
        return self.finish_forward(self.start_forward(x, **options))

    def _synchronizes(self, options: dict[str, Any]) -> bool:
        """Whether a call normalizes with the statistics of all parts."""
        moves = options.get("update_stats")
        if moves is None:
            moves = self.update_running_stats
        if self.training and self.use_batch_stats is False and moves is not False and self.running_mean is not None:
            raise ValueError(
                "use_batch_stats is False, so SyncBatchNorm exchanges nothing and would move the running statistics "
                "of each process by its own batch; update_running_stats=False leaves them"
            )
        return self.training and self.use_batch_stats is not False and options.get("mix") is None

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"engine": None}


def _gathered_sums(engine: Engine, what: str, found: GradMoments) -> GradMoments:
    return merged_sums(found, lambda rows: engine.finish(engine.start(rows, what)))
