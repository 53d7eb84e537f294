"""Moments, batch normalization and standardization of dask arrays, chunk by chunk (extra `distributed`).

Everything is lazy. Arrays may be chunked along all axes, that of the channels too. Moments of chunks are merged in a
tree whose shape depends on the chunks alone, so that a result has the same bits on every scheduler and in every run.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import checks, scaling
from . import moments as measured
from .batchnorm import BatchNorm
from .blocks import Evaluation
from .checks import Array, Doubles, Number
from .moments import Moments
from .threads import num_threads

try:
    import dask
    import dask.array as da
except ImportError as error:
    raise ImportError('cbn.dask needs dask: pip install "cbn[distributed]"') from error

__all__ = ["batch_norm", "moments", "standardize"]

FAN_IN = 16  # moments that one task merges


def moments(array: Any, *, channel_axis: Any = 1, skipna: bool = False, extrema: bool = False, threads: int = 1) -> Any:
    """The moments of every channel of a dask array, as a delayed object.

    Parameters
    ----------
    array : dask.array.Array or xarray.DataArray
        Array with two or more dimensions, of a dtype that `cbn.moments` takes, chunked in any way.
    channel_axis : int or str
        Axis with the channels; of a DataArray also its name.
    skipna, extrema
        As for `cbn.moments`.
    threads : int
        Threads of one task, which runs beside as many others as the scheduler has workers.

    Returns
    -------
    dask.delayed.Delayed
        ``.compute()`` gives `cbn.Moments`.

    Raises
    ------
    TypeError, ValueError
        As `cbn.moments`, where dimensions and dtype tell.

    Examples
    --------
    >>> import dask.array as da
    >>> import cbn.dask
    >>> x = da.arange(12, chunks=6).reshape(6, 2).rechunk((4, 1)).astype("float64")
    >>> cbn.dask.moments(x).compute()
    Moments(count=array([6., 6.]), mean=array([5., 6.]), m2=array([70., 70.]))
    """
    a, axis = _checked(array, channel_axis)
    measured(np.empty((0,) * a.ndim, a.dtype), channel_axis=axis, skipna=skipna, extrema=extrema)  # which checks them
    measure = dask.delayed(_measure, pure=True)
    blocks = np.moveaxis(a.to_delayed(), axis, 0)
    of_channels = []
    for row in blocks.reshape(len(blocks), -1):
        parts = [measure(block, axis, skipna, extrema, threads) for block in row]
        while len(parts) > 1:
            merge = dask.delayed(Moments.merge, pure=True)
            parts = [merge(parts[i : i + FAN_IN]) for i in range(0, len(parts), FAN_IN)]
        of_channels += parts
    return of_channels[0] if len(of_channels) == 1 else dask.delayed(_side_by_side, pure=True)(of_channels)


def batch_norm(array: Any, bn: BatchNorm, *, threads: int = 1) -> Any:
    """y of a layer for a dask array, lazily; the layer stays as it is.

    In evaluation the running statistics normalize, as they are at this call; in training those of the whole array, so
    that chunks are read twice. ``bn.train()(x, moments=cbn.dask.moments(x).compute())`` also moves running statistics.

    Parameters
    ----------
    array : dask.array.Array or xarray.DataArray
        Chunked in any way.
    bn : cbn.BatchNorm
        A layer of any kind; its channel axis counts.
    threads : int
        Threads of one task.

    Returns
    -------
    dask.array.Array or xarray.DataArray
        y, with the shape, dtype and chunks of the array.

    Raises
    ------
    TypeError, ValueError
        If bn is no layer, or the array has another number of channels or a dtype that layers do not take.
    """
    a, axis = _checked(array, getattr(bn, "channel_axis", 1))
    layer = Evaluation.of(bn, a.shape, a.dtype)
    if layer.statistics is None:
        statistics = dask.delayed(_mean_and_var, pure=True)(moments(a, channel_axis=axis, threads=threads))
    else:
        statistics = layer.statistics
    found = a.map_blocks(_normalize, layer=layer, threads=threads, statistics=statistics, dtype=a.dtype, meta=a._meta)
    return _like(array, found)


def standardize(
    array: Any,
    moments: Any = None,
    *,
    channel_axis: Any = -1,
    correction: Number = 0,
    threads: int = 1,
    **options: Any,
) -> Any:
    """`cbn.standardize` of a dask array, lazily: (x - mean)/sqrt(var + eps) of every channel.

    Parameters
    ----------
    array : dask.array.Array or xarray.DataArray
        Chunked in any way.
    moments : Moments or delayed Moments, optional
        Statistics to standardize with; by default those of the array, for which chunks are read twice.
    channel_axis : int or str
        Axis with the channels; of a DataArray also its name.
    correction : float
        0 for the biased variance, 1 for the unbiased one.
    threads : int
        Threads of one task.
    **options
        eps, eps_outside, zero_var, clip, center, dtype: as for `cbn.standardize`.

    Returns
    -------
    dask.array.Array or xarray.DataArray
        With the shape and the chunks of the array.

    Raises
    ------
    TypeError, ValueError
        As `cbn.standardize`, where dimensions and dtype tell.
    """
    a, axis = _checked(array, channel_axis)
    none = np.zeros(0)
    meta = scaling.standardize(np.empty((0,) * a.ndim, a.dtype), none, none, channel_axis=axis, **options)
    if moments is None:
        moments = globals()["moments"](a, channel_axis=axis, threads=threads)
    statistics = dask.delayed(_mean_and_var, pure=True)(moments, correction)
    found = a.map_blocks(
        _standardize, axis=axis, threads=threads, statistics=statistics, options=options, dtype=meta.dtype, meta=meta
    )
    return _like(array, found)


# ---- what tasks do ---------------------------------------------------------------------------------------------------


def _measure(block: Array, axis: int, skipna: bool, extrema: bool, threads: int) -> Moments:
    with num_threads(threads):
        return measured(block, channel_axis=axis, skipna=skipna, extrema=extrema)


def _side_by_side(parts: list[Moments]) -> Moments:
    """The moments of neighbouring channels as one."""
    count, mean, m2, low = (np.concatenate(row) for row in zip(*(m._rows for m in parts), strict=True))
    if parts[0].min is None:
        return Moments._of(count, mean, m2, low)
    extremes = (np.concatenate([getattr(m, name) for m in parts]) for name in ("min", "max"))
    return Moments._of(count, mean, m2, low, *extremes)


def _mean_and_var(m: Moments, correction: Number = 0) -> tuple[Doubles, Doubles]:
    return m.mean, m.var(correction)


def _channels(block_info: Any, axis: int) -> slice:
    """Those of a block."""
    return slice(*block_info[0]["array-location"][axis])


def _normalize(block: Array, *, layer: Evaluation, threads: int, statistics: Any, block_info: Any = None) -> Array:
    with num_threads(threads):
        return layer(block, _channels(block_info, layer.axis), statistics)


def _standardize(
    block: Array, *, axis: int, threads: int, statistics: Any, options: Any, block_info: Any = None
) -> Array:
    own = _channels(block_info, axis)
    with num_threads(threads):
        return scaling.standardize(block, *(v[own] for v in statistics), channel_axis=axis, **options)


# ---- arguments -------------------------------------------------------------------------------------------------------


def _checked(array: Any, channel_axis: Any) -> tuple[Any, int]:
    """A dask array, and the axis of its channels."""
    names = getattr(array, "dims", None)  # of xarray
    a = array.data if names is not None else array
    if not isinstance(a, da.Array):
        raise TypeError(f"array must be a dask array, or a DataArray with one, not {type(a).__name__}")
    if isinstance(channel_axis, str):
        if names is None or channel_axis not in names:
            raise ValueError(f"channel_axis is {channel_axis!r}, but the array has {names or 'no names of axes'}")
        channel_axis = names.index(channel_axis)
    if a.ndim < 2:
        raise ValueError(f"expected an array with two or more dimensions, but got {a.ndim}")
    axis = checks.integer(channel_axis, "channel_axis", "an integer, or the name of an axis")
    if not -a.ndim <= axis < a.ndim:
        raise ValueError(f"channel_axis is {axis}, but the array has {a.ndim} dimensions")
    if any(np.isnan(size) for size in a.shape):
        raise ValueError("the array has chunks of unknown sizes: array.compute_chunk_sizes() finds them")
    return a, axis % a.ndim


def _like(array: Any, found: Any) -> Any:
    """A result as what was given: with the names of a DataArray."""
    return found if isinstance(array, da.Array) else array.copy(data=found)
