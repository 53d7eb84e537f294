"""Layers from Haiku's parameters and state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..batchnorm import BatchNorm
from ..checks import Array
from .common import layer_of, listed, one_of, refuse_start, switched, weight_of_new

FORMATS = {"channels_last": -1, "N...C": -1, "channels_first": 1, "NC...": 1}
NAMES = {"weight": "scale", "bias": "offset", "running_mean": "mean_ema", "running_var": "var_ema"}
MEAN, VAR = "/~/mean_ema", "/~/var_ema"


def from_haiku(
    params: Mapping[str, Mapping[str, Any]],
    state: Mapping[str, Mapping[str, Any]],
    *,
    decay_rate: float,
    name: str | None = None,
    eps: float = 1e-5,
    data_format: str = "channels_last",
    create_scale: bool | None = None,
    create_offset: bool | None = None,
    frozen: bool = False,
) -> BatchNorm:
    """Convert a batch norm of a Haiku model, from its parameters and its state, to evaluation mode.

    Parameters
    ----------
    params, state : mapping of module names to mappings
        Results of `init` or `apply` of ``haiku.transform_with_state``.
    decay_rate : float in [0, 1]
        Argument of the module: the weight of the old statistics.
    name : str, optional
        Name of the module: "res_net50/~/initial_batchnorm". It may be omitted if there is only one.
    eps, data_format
        Arguments of the module, which its state does not contain. The defaults are Haiku's.
    create_scale, create_offset : bool, optional
        Arguments of the module. By default `params` decides. A module with neither scale nor offset needs both
        arguments, as False.
    frozen : bool
        Whether to freeze the layer for evaluation, so that both modes normalize with the running statistics. A module
        with few batches can be converted only frozen.

    Returns
    -------
    BatchNorm
        Layer for inputs of any rank, with Haiku's debiased averages and biased variance.

    Raises
    ------
    TypeError
        If `params` or `state` is no mapping.
    ValueError
        If the name or the parameters do not exist, or there are several modules and no name; the message lists the
        names. For a layer that would train otherwise than in Haiku (see the notes).

    Notes
    -----
    Haiku divides its averages by ``1 - decay_rate**n`` after n batches, so the next batch weighs
    ``(1 - decay_rate) / (1 - decay_rate**(n + 1))``. In cbn it weighs ``1 - decay_rate``. If the two weights differ in
    float32, for n below some ``17 / (1 - decay_rate)``, training would differ too. The state does not tell whether the
    module has a `cross_replica_axis`, or gets its scale at each call.

    Examples
    --------
    >>> import numpy as np
    >>> import cbn
    >>> average = {"counter": 5000, "hidden": np.ones((1, 3)), "average": np.ones((1, 3))}
    >>> params = {"batch_norm": {"scale": np.ones((1, 3)), "offset": np.zeros((1, 3))}}
    >>> state = {"batch_norm/~/mean_ema": average, "batch_norm/~/var_ema": average}
    >>> cbn.from_haiku(params, state, decay_rate=0.99).momentum
    0.01
    """
    for tree, word in ((params, "params"), (state, "state")):
        if not isinstance(tree, Mapping):
            raise TypeError(f"{word} must be a mapping of module names to mappings, not {type(tree).__name__}")
    if not isinstance(data_format, str) or data_format not in FORMATS:
        raise ValueError(f"data_format must be one of {listed(FORMATS)}, not {data_format!r}")
    momentum = weight_of_new(decay_rate, "decay_rate")
    found = [key.removesuffix(MEAN) for key in state if key.endswith(MEAN) and key.removesuffix(MEAN) + VAR in state]
    name = one_of(found, name)
    own = params.get(name, {})
    flags = {"scale": create_scale, "offset": create_offset}
    there = sorted(key for key, value in params.items() if {"scale", "offset"} & set(value))
    present = switched(own, flags, name, there, "create_")
    mean_ema, var_ema = state[name + MEAN], state[name + VAR]
    arrays = {
        "weight": own["scale"] if present["scale"] else None,
        "bias": own["offset"] if present["offset"] else None,
        "running_mean": mean_ema["average"],
        "running_var": var_ema["average"],
    }
    axis = FORMATS[data_format]
    flat = {key: None if a is None else _per_channel(a, NAMES[key], axis, data_format) for key, a in arrays.items()}
    count = int(np.asarray(mean_ema["counter"]))
    _refuse_other_decay(var_ema, decay_rate, count)
    if not frozen:
        refuse_start(decay_rate, count, "Haiku")
    bn = layer_of(
        BatchNorm,
        flat,
        names=NAMES,
        eps=eps,
        momentum=momentum,
        channel_axis=axis,
        biased=True,
        counter=max(count, 0),
    )
    return bn.freeze() if frozen else bn


def _per_channel(a: Any, name: str, axis: int, data_format: str) -> Array:
    """The values of an array (1, ..., C, ..., 1) along its channel axis."""
    a = np.asarray(a)
    if a.ndim < 2 or a.size != a.shape[axis]:
        raise ValueError(f"{name} has shape {a.shape}; with {data_format!r} only axis {axis} may be longer than 1")
    return a.reshape(-1)  # type: ignore[no-any-return]


def _refuse_other_decay(ema: Mapping[str, Any], decay_rate: float, count: int) -> None:
    """Refuse a decay_rate that contradicts the state: the ratio of hidden value and average depends on it."""
    average, hidden = np.asarray(ema["average"]), np.asarray(ema.get("hidden", ema["average"]))
    share = 1 - decay_rate**count
    if "hidden" in ema and not np.allclose(hidden, average * share, rtol=0.02, atol=1e-30):
        raise ValueError(
            f"decay_rate={decay_rate} is not that of the module: after {count} batches hidden would be {share:.3g} "
            "of average"
        )
