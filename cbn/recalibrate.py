"""recalibrate: the running statistics of layers, replaced by the statistics of all inputs that reach them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np

from . import checks
from .batchnorm import BatchNorm
from .checks import Array, ArrayLike, Doubles
from .course import Options, Snapshot
from .inputs import Input
from .kernels import arrays, channels
from .masked import Weights, select
from .moments import Moments, measure
from .population import HOOKS
from .progress import bar_on_terminal

__all__ = ["Recalibration", "recalibrate"]

# What a layer normalizes with while it is recorded: the statistics of the batch, whatever it is set to
PLAINLY = {
    **{"_training": True, "_track_running_stats": False, "_use_batch_stats": None, "_update_running_stats": None},
    **{"_nonfinite": "propagate", "_ghost_batch_size": None, "_renorm": None},
}
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True, eq=False, repr=False)
class Recalibration:
    """The statistics of all inputs of a layer, and how far they may be off.

    Attributes
    ----------
    layer : str
        Class and number of channels.
    moments : Moments
        Count, mean and m2 of all values.
    batches : int
        Number of batches that reached the layer.
    mean_error, var_error : (C,) float64 ndarray
        Standard errors of the running mean and the running variance; NaN with one batch.
    relative_mean_error, relative_var_error : (C,) float64 ndarray
        The same in units of the standard deviation and of the variance: 0.01 is one percent. 0 for a constant channel.

    Notes
    -----
    The values of a batch depend on each other (pixels of an image, images of a class), so the batch is the unit: B
    batches of n_i values each are taken as drawn independently. The mean M and the variance V are weighted means of
    a_i, the means of x and of (x - M)^2 over each batch, with weights w_i = n_i/N and N = sum(n_i). The standard error
    of a weighted mean A, as a ratio of two sums over batches (Cochran, "Sampling techniques", 1977, chapter 6), is::

        error^2 = B/(B - 1) * sum(w_i^2 * (a_i - A)^2)

    For batches of one size it is the sample variance of the a_i, divided by B. That M is itself an estimate adds
    nothing of this order. `var_error` is scaled as the running variance is: by N/(N - 1) if that is unbiased. Empty
    batches do not count.

    The errors fall with the square root of the number of batches: four times as many batches halve them.
    """

    layer: str
    moments: Moments
    batches: int
    mean_error: Doubles
    var_error: Doubles

    @property
    def relative_mean_error(self) -> Doubles:
        """`mean_error` divided by the standard deviation."""
        return _relative(self.mean_error, self.moments.std())

    @property
    def relative_var_error(self) -> Doubles:
        """`var_error` divided by the variance."""
        return _relative(self.var_error, self.moments.var())

    def __repr__(self) -> str:
        n = self.moments.count
        values = f"{n.max():g}" if np.all(n == n[0]) else f"{n.min():g} to {n.max():g}"
        batches = "1 batch" if self.batches == 1 else f"{self.batches} batches"
        head = f"Recalibration of {self.layer}: {batches}, {values} values per channel"
        if self.batches == 1:
            return f"{head}; one batch has no standard errors"
        rows = [
            f"  {name:<16} {np.median(error):>8.2g} {error.max():>8.2g}   in channel {int(error.argmax())}"
            for name, error in (("mean / std", self.relative_mean_error), ("variance", self.relative_var_error))
        ]
        return "\n".join([head, f"  {'standard error':<16} {'median':>8} {'worst':>8}", *rows])


@overload
def recalibrate(
    layers: BatchNorm,
    batches: Iterable[Any],
    *,
    forward: Callable[[Any], object] | None = None,
    progress: bool = True,
) -> Recalibration: ...
@overload
def recalibrate(
    layers: Sequence[BatchNorm],
    batches: Iterable[Any],
    *,
    forward: Callable[[Any], object] | None = None,
    progress: bool = True,
) -> list[Recalibration]: ...
def recalibrate(
    layers: BatchNorm | Sequence[BatchNorm],
    batches: Iterable[Any],
    *,
    forward: Callable[[Any], object] | None = None,
    progress: bool = True,
) -> Recalibration | list[Recalibration]:
    """Replace running statistics by the statistics of all inputs of the layers, as if these were one array.

    Running statistics are averages over the last training batches, of a network that changed meanwhile. Evaluation is
    better with those of the final network: after training, after averaging weights, for data of another domain.

    Parameters
    ----------
    layers : BatchNorm, or list or tuple of them
        The layers to recalibrate, in any mode.
    batches : iterable
        Without `forward` inputs of the layer; with `forward` whatever that takes. Batches may differ in size, and an
        iterator is consumed.
    forward : callable, optional
        ``forward(batch)`` runs the model, which calls the layers. Meanwhile these layers normalize with the statistics
        of the batch, as in training, whatever their mode is, so each of them gets the inputs that it would get in
        training. A layer that is called several times takes all its inputs. What `forward` returns is ignored.
    progress : bool
        Whether to show a progress bar on stderr, where that is a terminal and tqdm is installed.

    Returns
    -------
    Recalibration, or list of them
        One for each layer: moments, number of batches and standard errors.

    Raises
    ------
    TypeError, ValueError
        For anything but layers, for a layer twice, without running statistics or with read-only ones; for inputs that a
        layer refuses (with `forward` also batches of one value per channel, as in training) or that are not finite; if
        there are no batches, or none reached a layer.
    RuntimeError
        If one of the layers is being recalibrated already.

    See Also
    --------
    BatchNorm.set_running_moments : for statistics that come from elsewhere.
    moments : the statistics of one array.

    Notes
    -----
    `running_mean` and `running_var` (unbiased or biased, as the layer tracks it) become those of all values, merged
    exactly, and `num_batches_tracked` becomes the number of batches that were not empty. A plain average over batches,
    as of PyTorch's ``update_bn``, gives a small last batch the weight of a full one, and lacks the part of the variance
    that lies between the batches.

    All layers change at one moment, at the end. Until then, and after an exception, also from a signal handler, they
    have their statistics, modes and what they remember for `backward`. While it runs, calls of these layers from other
    threads are recorded as well.

    Examples
    --------
    >>> import numpy as np
    >>> import cbn
    >>> x = np.random.default_rng(0).normal(3, 2, (1000, 4))
    >>> bn = cbn.BatchNorm1d(4, dtype=np.float64)
    >>> cbn.recalibrate(bn, np.split(x, [300, 600, 900]))
    Recalibration of BatchNorm1d(4): 4 batches, 1000 values per channel
      standard error     median    worst
      mean / std          0.025    0.034   in channel 1
      variance            0.039     0.06   in channel 0
    >>> np.allclose(bn.running_var, x.var(axis=0, ddof=1), rtol=1e-12)
    True

    Two layers of a network:

    >>> first, second = cbn.BatchNorm1d(4, activation="relu"), cbn.BatchNorm1d(4)
    >>> found = cbn.recalibrate([first, second], np.split(x, 4), forward=lambda batch: second(first(batch) ** 2))
    >>> [one.batches for one in found]
    [4, 4]
    """
    single = isinstance(layers, BatchNorm)
    found = _checked_layers(layers)
    if forward is None:
        if len(found) > 1:
            raise TypeError("several layers need forward=, which calls them with a batch")
        if hasattr(batches, "__array__"):
            raise TypeError("batches must be an iterable of inputs, not an array; a list of it, [x], is one batch")
    elif not callable(forward):
        raise TypeError(f"forward must be callable, not {type(forward).__name__}")
    if isinstance(batches, (str, bytes)) or not isinstance(batches, Iterable):
        raise TypeError(f"batches must be an iterable of inputs, not {type(batches).__name__}")
    bar = bar_on_terminal(checks.boolean(progress, "progress"), batches, desc="recalibrate", unit="batch")
    shown = batches if bar is None else bar
    recorders = [_Recorder(layer, f"layers[{i}], {layer!r}") for i, layer in enumerate(found)]
    if forward is None:
        _measure(recorders[0], shown)
    else:
        _run(recorders, shown, forward)
    results = _replace(recorders)
    return results[0] if single else results


def _checked_layers(layers: Any) -> list[BatchNorm]:
    """The layers, fit to be recalibrated, before any data is read."""
    found = [layers] if isinstance(layers, BatchNorm) else layers
    if not isinstance(found, (list, tuple)):
        raise TypeError(f"layers must be a layer of cbn or a list of layers, not {type(layers).__name__}")
    if not found:
        raise ValueError("layers is empty")
    for i, layer in enumerate(found):
        if not isinstance(layer, BatchNorm):
            raise TypeError(f"layers[{i}] must be a layer of cbn, not {type(layer).__name__}")
        first = next(j for j, other in enumerate(found) if other is layer)
        if first != i:
            raise ValueError(f"layers[{i}] is layers[{first}]: {layer!r}")
        layer._expect_statistics()
        channels.check_writable(tuple(getattr(layer, name) for name in STATISTICS), STATISTICS)
        if not HOOKS.isdisjoint(vars(layer)):
            raise RuntimeError(f"layers[{i}], {layer!r}, is being recalibrated already")
    return list(found)


def _measure(recorder: _Recorder, batches: Iterable[ArrayLike]) -> None:
    """Record batches that are inputs of the layer."""
    n = 0
    for n, x in enumerate(batches, 1):
        recorder.parts.append(arrays.with_room(lambda x=x: measure(recorder.layer._measurable(x))))
        recorder.end_batch(n - 1)
    _expect_batches(n)


def _run(recorders: list[_Recorder], batches: Iterable[Any], forward: Callable[[Any], object]) -> None:
    """Record what reaches the layers while `forward` takes the batches."""
    try:
        _record(recorders, batches, forward)
    finally:  # once more: a signal handler may have raised in the clean-up of `_record`, or just before it
        _stop(recorders)


def _record(recorders: list[_Recorder], batches: Iterable[Any], forward: Callable[[Any], object]) -> None:
    try:
        for recorder in recorders:
            recorder.start()
        n = 0
        for n, batch in enumerate(batches, 1):
            forward(batch)
            for recorder in recorders:
                recorder.end_batch(n - 1)
    finally:
        _stop(recorders)
    _expect_batches(n)


def _stop(recorders: list[_Recorder]) -> None:
    for recorder in recorders:
        recorder.stop()


def _expect_batches(n: int) -> None:
    if n == 0:
        raise ValueError("batches is empty, so there is nothing to measure; an iterator may have been used up")


def _replace(recorders: list[_Recorder]) -> list[Recalibration]:
    """Give all layers their statistics at one moment."""
    results, targets, values = [], [], []
    for recorder in recorders:
        layer = recorder.layer
        if recorder.total is None:
            raise ValueError(f"no batch reached {recorder.name}")
        try:
            new = layer._statistics_of(recorder.total)
        except ValueError as error:
            raise ValueError(f"{recorder.name}: {error}") from None
        targets += [getattr(layer, name) for name in STATISTICS]
        values += [*new, np.array(recorder.spread.batches)]
        results.append(recorder.result())
    names = [name if len(recorders) == 1 else f"{r.name}: {name}" for r in recorders for name in STATISTICS]
    channels.replace(targets, values, names)
    return results


# ---- recording -------------------------------------------------------------------------------------------------------


class _Spread:
    """Sums over batches for the standard errors of `Recalibration`, without the batches.

    With a and b, mean and variance of the first batch, and n, m and m2 of each batch: u = sum(x - a) = n*(m - a), and
    v = sum((x - a)^2 - b) = m2 + u*(m - a) - n*b. Then, with M and V of all batches and D = M - a::

        sum(x - M)         = u - n*D
        sum((x - M)^2 - V) = v - 2*D*u + n*(D^2 + b - V)

    `sums` has the products of n, u and v, from which sums of the squares follow. As u and v are small, few digits
    cancel.
    """

    def __init__(self) -> None:
        self.batches = 0
        self.center: tuple[Doubles, Doubles] | None = None
        self.sums: Doubles | float = 0.0  # (6, C)

    def add(self, batch: Moments) -> None:
        n = batch.count
        if self.center is None:
            self.center = batch.mean, batch.m2 / n
        a, b = self.center
        with np.errstate(all="ignore"):
            u = n * (batch.mean - a)
            v = batch.m2 + u * (batch.mean - a) - n * b
            self.sums = self.sums + np.array([n * n, n * u, n * v, u * u, u * v, v * v])
        self.batches += 1

    def errors(self, total: Moments) -> tuple[Doubles, Doubles]:
        """Standard errors of the mean and of the biased variance."""
        assert self.center is not None
        if self.batches == 1:
            return np.full(total.mean.shape, np.nan), np.full(total.mean.shape, np.nan)
        a, b = self.center
        nn, nu, nv, uu, uv, vv = np.asarray(self.sums)
        with np.errstate(all="ignore"):
            d = total.mean - a
            k = d * d + b - total.var()
            of_mean = uu - 2 * d * nu + d * d * nn
            of_var = vv + 4 * d * d * uu + k * k * nn - 4 * d * uv + 2 * k * nv - 4 * d * k * nu
            scale = self.batches / (self.batches - 1) / total.count**2
            return np.sqrt(scale * of_mean.clip(0)), np.sqrt(scale * of_var.clip(0))


@dataclass
class _Recorder:
    """Moments of the inputs of one layer."""

    layer: BatchNorm
    name: str  # for errors
    parts: list[Moments] = field(default_factory=list)  # of the current batch
    total: Moments | None = None
    spread: _Spread = field(default_factory=_Spread)

    def start(self) -> None:
        """Let calls of the layer come here."""
        hooks = {"_train": _decline, "_read": self._read, "_finish": _decline}
        assert hooks.keys() == HOOKS
        vars(self.layer).update(hooks)

    def stop(self) -> None:
        """Undo `start`."""
        for name in HOOKS:
            vars(self.layer).pop(name, None)

    def _read(self, inp: Input, residual: Array | None, quantization: Any, options: Options) -> Snapshot:
        """`BatchNorm._read` of a copy of the layer in training mode that tracks nothing; the input is recorded."""
        if quantization is not None:
            raise ValueError(f"{self.name}: 8-bit input cannot be recorded; expected floats")
        one = copy.copy(self.layer)
        vars(one).update(PLAINLY)
        now = one._read(inp, residual, None, Options(weights=options.weights))
        self.parts.append(arrays.with_room(_measured, inp, options.weights))
        return now

    def end_batch(self, i: int) -> None:
        """Merge the inputs of batch i into the total, as one unit of the standard errors."""
        parts, self.parts = self.parts, []
        parts = [part for part in parts if part.count[0] > 0]
        if not parts:
            return
        batch = Moments.merge(parts)
        bad = np.flatnonzero(~np.isfinite(batch.m2))
        if bad.size:
            raise ValueError(f"{self.name}: an input of batch {i} is not finite in {checks.channel_list(bad)}")
        self.total = batch if self.total is None else self.total + batch
        self.spread.add(batch)

    def result(self) -> Recalibration:
        layer, total = self.layer, self.total
        assert total is not None
        name = f"{type(layer).__name__}({layer.num_features})"
        mean_error, var_error = self.spread.errors(total)
        n = total.count
        return Recalibration(name, total, self.spread.batches, mean_error, var_error * (n / (n - layer._correction)))


def _measured(inp: Input, weights: Weights | None) -> Moments:
    if weights is None or inp.layout is None:
        return measure(inp)
    inp, selection = select(inp, weights)
    return measure(inp, selection=selection)


def _decline(*arguments: Any) -> None:
    """No compiled training, and nothing to finish."""


def _relative(error: Doubles, scale: Doubles) -> Doubles:
    """error/scale, and 0 for 0/0."""
    with np.errstate(all="ignore"):
        found: Doubles = np.where(error == 0, 0.0, error / scale)
    return found
