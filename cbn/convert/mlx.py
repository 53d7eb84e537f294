"""Layers from MLX."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..batchnorm import BatchNorm
from ..checks import Array
from .common import ARRAYS, base_of, kind_of, layer_of, refuse_overrides

READ = ("num_features", "eps", "momentum", "track_running_stats", "training")
HARMLESS = (
    *("_extra_repr", "freeze", "unfreeze", "_no_grad", "load_weights", "save_weights", "update", "parameters"),
    *("trainable_parameters", "_validate_keys"),
)


def from_mlx(layer: Any) -> BatchNorm:
    """Convert an MLX BatchNorm, in its mode.

    Parameters
    ----------
    layer : mlx.nn.BatchNorm
        Layer with any floating dtype; float16 and bfloat16 parameters become float32.

    Returns
    -------
    BatchNorm
        Layer for inputs with channels in the last axis. One training step of a new mlx.nn.BatchNorm shows which
        variance it tracks: the unbiased one since MLX 0.32.1, the biased one before.

    Raises
    ------
    TypeError
        For another kind of object, and for a subclass or an instance that redefines ``__call__`` or what
        ``__call__`` uses.
    ValueError
        If arrays do not fit together, or the momentum is outside [0, 1].

    Examples
    --------
    >>> import cbn
    >>> import mlx.nn as nn  # doctest: +SKIP
    >>> cbn.from_mlx(nn.BatchNorm(3)).channel_axis  # doctest: +SKIP
    -1
    """
    base = base_of(layer, ["BatchNorm"], ["mlx"])
    if base is None:
        raise TypeError(f"expected mlx.nn.BatchNorm, not {kind_of(layer)}")
    refuse_overrides(layer, base, "__call__", READ, HARMLESS)
    tracked = layer.track_running_stats
    missing = [name for name in ("running_mean", "running_var") if tracked and name not in layer]
    if missing:
        raise ValueError(f"the MLX layer has track_running_stats, but no {missing[0]}")
    # Without track_running_stats MLX evaluates with the batch's statistics, even if it has running ones
    used = ARRAYS if tracked else ARRAYS[:2]
    return layer_of(
        BatchNorm,
        {name: _from_mlx_array(layer[name]) for name in used if name in layer},
        n=layer.num_features,
        eps=layer.eps,
        momentum=layer.momentum,
        channel_axis=-1,
        biased=not _tracks_unbiased(base),
        training=layer.training,
    )


def _from_mlx_array(a: Any) -> Array:
    """The values of an MLX array; types that numpy lacks become float32."""
    import mlx.core as mx

    return np.array(a.astype(mx.float32) if a.dtype in (mx.float16, mx.bfloat16) else a)


def _tracks_unbiased(cls: Any) -> bool:
    """Whether this version tracks the unbiased variance: for the values 0 and 2 it is 2, else 1."""
    import mlx.core as mx

    probe = cls(1, momentum=1.0)
    probe(mx.array([[0.0], [2.0]]))
    return float(probe.running_var.item()) > 1.5
