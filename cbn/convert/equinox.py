"""Layers from Equinox."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..batchnorm import BatchNorm
from ..checks import Array
from .common import base_of, kind_of, layer_of, refuse_overrides, refuse_start, weight_of_new

READ = ("weight", "bias", "inference", "input_size", "eps", "momentum", "mode", "channelwise_affine")
HARMLESS = ("__abstractmethods__", "_abc_impl")


def from_equinox(layer: Any, state: Any, *, frozen: bool = False) -> BatchNorm:
    """Convert an Equinox BatchNorm with its part of a model's state.

    Parameters
    ----------
    layer : equinox.nn.BatchNorm
        Layer with ``mode="batch"``, or with any mode if `frozen`.
    state : equinox.nn.State
        State of the model or of the layer.
    frozen : bool
        Whether to freeze the layer for evaluation, so that both modes normalize with the running statistics. A layer
        with ``mode="ema"`` or with few batches can be converted only frozen.

    Returns
    -------
    BatchNorm
        Layer for inputs of any rank with channels in axis 1, as Equinox' layer under a `vmap` over axis 0; `inference`
        decides the mode.

    Raises
    ------
    TypeError
        For another kind of object, and for a subclass that redefines ``__call__``.
    ValueError
        For the state of another model, and for a layer that would train otherwise than in Equinox (see the notes).

    Notes
    -----
    Equinox keeps hidden averages that start at 0, and divides them by ``1 - momentum**n`` after n batches. The
    converted layer has the quotients. The next batch then weighs ``(1 - momentum) / (1 - momentum**(n + 1))`` in
    Equinox and ``1 - momentum`` in cbn. If the two weights differ in float32, for n below some ``17 / (1 - momentum)``,
    training would differ too. A layer with ``mode="ema"`` normalizes with the running statistics in training, too.

    Examples
    --------
    >>> import cbn
    >>> import equinox as eqx  # doctest: +SKIP
    >>> layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", mode="batch")  # doctest: +SKIP
    >>> cbn.from_equinox(layer, state, frozen=True).frozen  # doctest: +SKIP
    True
    """
    base = base_of(layer, ["BatchNorm"], ["equinox"])
    if base is None:
        raise TypeError(f"expected equinox.nn.BatchNorm, not {kind_of(layer)}")
    if base_of(state, ["State"], ["equinox"]) is None:
        raise TypeError(f"state must be an equinox.nn.State, not {kind_of(state)}")
    refuse_overrides(layer, base, "__call__", READ, HARMLESS)
    momentum = weight_of_new(layer.momentum, "the Equinox layer's momentum")
    if getattr(layer, "mode", "ema") == "batch":
        statistics = _entry(state, layer.batch_state_index)
        count = int(_entry(state, layer.batch_counter))
        if not frozen:
            refuse_start(layer.momentum, count, "Equinox")
        share = 1 - layer.momentum**count if count else 1.0
    else:
        if not frozen:
            raise ValueError(
                'the Equinox layer has mode="ema": in training it normalizes with the running statistics, which cbn '
                "does not do; for evaluation alone pass frozen=True"
            )
        prefix = "ema_" if hasattr(layer, "mode") else ""  # Equinox before 0.13 has this mode alone
        if _entry(state, getattr(layer, f"{prefix}first_time_index")):
            raise ValueError("the Equinox layer has seen no batch, and without one it has no statistics")
        statistics, count, share = _entry(state, getattr(layer, f"{prefix}state_index")), 0, 1.0
    mean, var = (np.asarray(a) for a in statistics)
    arrays = {
        "weight": None if layer.weight is None else np.asarray(layer.weight),
        "bias": None if layer.bias is None else np.asarray(layer.bias),
        "running_mean": _shared(mean, share),
        "running_var": _shared(var, share),
    }
    bn = layer_of(
        BatchNorm,
        arrays,
        n=layer.input_size,
        eps=layer.eps,
        momentum=momentum,
        biased=True,
        training=not layer.inference,
        counter=count,
    )
    return bn.freeze() if frozen else bn


def _entry(state: Any, index: Any) -> Any:
    """A layer's entry of the state."""
    try:
        return state.get(index)
    except KeyError:
        raise ValueError("the state has no entry for this layer; pass the state that was made with it") from None


def _shared(a: Array, share: float) -> Array:
    """A debiased average, from its hidden value and the total weight of its batches."""
    return (a.astype(np.float64) / share).astype(a.dtype if a.dtype == np.float64 else np.float32)
