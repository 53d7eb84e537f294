"""Moments, batch normalization and standardization of arrays larger than memory, block by block, from file to file.

An array is an .npy file by its path, a `numpy.memmap`, a dataset of h5py, an array of zarr, or anything with shape,
dtype and slices. How it is cut into blocks depends on its shape, its chunks and `memory` alone. So a result has the
same bits in every run, one that was interrupted included.
"""

from __future__ import annotations

import math
from typing import Any, SupportsIndex

import numpy as np

from . import checks, course, scaling
from . import moments as measured
from .blocks import Evaluation, source_of
from .checks import Array, Number
from .moments import Moments
from .running import RunningMoments
from .work import Path, Work, digest

__all__ = ["batch_norm", "moments", "standardize", "update"]

MEMORY = 256 << 20  # bytes


def moments(
    array: Any,
    *,
    channel_axis: SupportsIndex = 1,
    skipna: bool = False,
    extrema: bool = False,
    memory: Number = MEMORY,
    state: Path | None = None,
    progress: bool = True,
) -> Moments:
    """The moments of every channel of an array larger than memory.

    Parameters
    ----------
    array : path or array
        Path of an .npy file, or an array as numpy, h5py or zarr have it, with two or more dimensions and a dtype that
        `cbn.moments` takes.
    channel_axis, skipna, extrema
        As for `cbn.moments`.
    memory : int
        Bytes by which the resident memory of the process may grow. A block is much smaller, unless chunks are large.
    state : path, optional
        File that says how far the work has come, until it is done. Where it exists, work goes on from there.
    progress : bool
        Whether to show a progress bar on stderr, where that is a terminal and tqdm is installed.

    Returns
    -------
    Moments
        Those of the blocks, merged in their order.

    Raises
    ------
    TypeError, ValueError
        As `cbn.moments`; if a chunk does not fit into `memory`, or if `state` is of other work: of an array with
        another shape, dtype or date, other options, another `memory`.

    Examples
    --------
    >>> import numpy as np
    >>> import cbn.outofcore
    >>> x = np.arange(12.0).reshape(6, 2)
    >>> cbn.outofcore.moments(x)
    Moments(count=array([6., 6.]), mean=array([5., 6.]), m2=array([70., 70.]))
    """
    source = source_of(array)
    axis = checks.axis_index(channel_axis, len(source.shape))
    options: dict[str, Any] = {
        "channel_axis": axis,
        "skipna": checks.boolean(skipna, "skipna"),
        "extrema": checks.boolean(extrema, "extrema"),
    }
    measured(source.nothing((axis,)), **options)  # which checks the array
    with Work("moments", source, None, memory, state, progress, options) as work:
        return _moments(work, **options)


def update(
    running: RunningMoments,
    array: Any,
    *,
    memory: Number = MEMORY,
    state: Path | None = None,
    progress: bool = True,
) -> RunningMoments:
    """`cbn.RunningMoments.update` with the observations of an array larger than memory, all or none.

    Parameters
    ----------
    running : RunningMoments
        It changes at the end, by one merge.
    array, memory, state, progress
        As for `moments`. The shape of the array is as for `cbn.RunningMoments.update`.

    Returns
    -------
    RunningMoments
        `running` itself.

    Raises
    ------
    TypeError, ValueError
        As `cbn.RunningMoments.update` and `moments`.

    Examples
    --------
    >>> import numpy as np
    >>> import cbn.outofcore
    >>> running = cbn.outofcore.update(cbn.RunningMoments(2), np.arange(12.0).reshape(6, 2))
    >>> running.mean
    array([5., 6.])
    """
    if not isinstance(running, RunningMoments):
        raise TypeError(f"running must be cbn.RunningMoments, not {type(running).__name__}")
    source = source_of(array)
    ndim = len(source.shape)
    if running.channel_axis is None:
        whole = tuple(range(max(ndim - len(running.shape), 0), ndim))
    else:
        whole = (checks.axis_index(running.channel_axis, ndim),)

    def measure(block: Array) -> Moments:
        return running._measured(block, None, None)

    none = measure(source.nothing(whole))  # which checks the shape
    settings = {name: getattr(running, name) for name in ("shape", "channel_axis", "skipna", "extrema")}
    with Work("update", source, None, memory, state, progress, settings, whole=whole) as work:
        found = work.measure(measure, none, None)
    return running.merge(found)


def batch_norm(
    array: Any,
    bn: Any,
    *,
    out: Any,
    memory: Number = MEMORY,
    state: Path | None = None,
    progress: bool = True,
) -> Any:
    """y of a layer for an array larger than memory; the layer stays as it is.

    In evaluation the running statistics normalize, as they are at this call; in training those of the whole array,
    which is read twice. `BatchNorm.set_running_moments` makes what `moments` finds the running statistics.

    Parameters
    ----------
    array : path or array
        Path of an .npy file, or an array as numpy, h5py or zarr have it.
    bn : cbn.BatchNorm
        A layer of any kind; its channel axis counts.
    out : path or array
        Path of an .npy file to make, or an array with the shape and dtype of the array. A file that is made has another
        name, which ends with ``.part``, until it is whole. With the array itself as ``out`` work is done in place, and
        cannot have a `state`.
    memory, state, progress
        As for `moments`. A state is written when what it says has reached the disk, as far as the library of `out` sees
        to that.

    Returns
    -------
    array
        `out`; of a path its file, as a memmap.

    Raises
    ------
    TypeError, ValueError
        As `moments`; if bn is no layer, or has another number of channels, or `out` another shape or dtype, or overlaps
        the array without being it.
    FileNotFoundError
        If there is a `state`, but not the file that it speaks of.

    Examples
    --------
    >>> import numpy as np
    >>> import cbn.outofcore
    >>> x = np.array([[0.0, 2.0], [4.0, 2.0]])
    >>> cbn.outofcore.batch_norm(x, cbn.BatchNorm1d(2, eps=0).eval(), out=np.empty((2, 2)))
    array([[0., 2.],
           [4., 2.]])
    """
    source = source_of(array)
    layer = Evaluation.of(bn, source.shape, source.dtype)
    axis, statistics = layer.axis, layer.statistics
    settings = {"channel_axis": axis, "layer": digest(layer.affine, statistics, layer.eps, layer.act, layer.dtype)}
    target = out, checks.native_input(source.dtype)
    with Work("batch_norm", source, target, memory, state, progress, settings, measures=statistics is None) as work:
        if statistics is None:
            found = _moments(work, axis)
            if math.prod(source.shape) > 0:
                course.refuse_nonfinite(found, bn.nonfinite)
                course.check_moments(found, source.shape[axis])
            statistics = found.mean, found.var()
        work.apply(lambda block, channels, y: layer(block, channels, statistics, y), axis)
    return work.result


def standardize(
    array: Any,
    moments: Moments | None = None,
    *,
    out: Any,
    channel_axis: SupportsIndex = -1,
    correction: Number = 0,
    memory: Number = MEMORY,
    state: Path | None = None,
    progress: bool = True,
    **options: Any,
) -> Any:
    """`cbn.standardize` of an array larger than memory: (x - mean)/sqrt(var + eps) of every channel.

    Parameters
    ----------
    array : path or array
        Path of an .npy file, or an array as numpy, h5py or zarr have it.
    moments : Moments, optional
        Statistics to standardize with; by default those of the array, which is read twice then.
    out : path or array
        As for `batch_norm`. Its dtype is that of the result, where none is asked for.
    channel_axis : int
        Axis with the channels.
    correction : float
        0 for the biased variance, 1 for the unbiased one.
    memory, state, progress
        As for `moments`.
    **options
        eps, eps_outside, zero_var, clip, center, dtype: as for `cbn.standardize`.

    Returns
    -------
    array
        `out`; of a path its file, as a memmap.

    Raises
    ------
    TypeError, ValueError, FileNotFoundError
        As `cbn.standardize` and `batch_norm`.

    Examples
    --------
    >>> import numpy as np
    >>> import cbn.outofcore
    >>> x = np.array([[0, 7], [2, 7]], dtype=np.uint8)
    >>> cbn.outofcore.standardize(x, eps=0, zero_var="one", out=np.empty((2, 2), np.float32))
    array([[-1.,  0.],
           [ 1.,  0.]], dtype=float32)
    """
    source = source_of(array)
    axis = checks.axis_index(channel_axis, len(source.shape))
    if moments is not None and not isinstance(moments, Moments):
        raise TypeError(f"moments must be cbn.Moments, not {type(moments).__name__}")
    if moments is not None and moments.mean.size != source.shape[axis]:
        raise ValueError(
            f"moments are of {moments.mean.size} channels; expected {source.shape[axis]}, as the array has"
        )
    if options.get("dtype") is None:
        options["dtype"] = getattr(out, "dtype", None)
    zeros = np.zeros(source.shape[axis])
    dtype = scaling.standardize(source.nothing((axis,)), zeros, zeros, channel_axis=axis, **options).dtype
    given = None if moments is None else moments.to_bytes()
    how = {"eps": 1e-8, "eps_outside": False, "zero_var": "eps", "clip": None, "center": True} | options
    del how["dtype"]
    correction = checks.number(correction, "correction", "a number")
    settings = {
        "channel_axis": axis,
        "correction": correction,
        "moments": digest(given),
        "options": repr(scaling.options(**how)),
    }
    settings["result"] = str(dtype)
    with Work("standardize", source, (out, dtype), memory, state, progress, settings, measures=not given) as work:
        if moments is None:
            moments = _moments(work, axis)
        mean, var = moments.mean, moments.var(correction)

        def apply(block: Array, channels: slice, y: Array) -> None:
            scaling.standardize(block, mean[channels], var[channels], channel_axis=axis, out=y, **options)

        work.apply(apply, axis)
    return work.result


def _moments(work: Work, channel_axis: int, **options: Any) -> Moments:
    """Those of all channels of the work's array."""

    def measure(block: Array) -> Moments:
        return measured(block, channel_axis=channel_axis, **options)

    return work.measure(measure, measure(work.source.nothing((channel_axis,))), channel_axis)
