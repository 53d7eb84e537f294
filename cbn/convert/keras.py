"""Layers from Keras."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from ..batchnorm import BatchNorm
from .common import base_of, kind_of, layer_of, refuse_overrides, weight_of_new

ALONE = "cbn does not do; for evaluation alone copy its weights into a layer without"
PACKAGES = ("keras", "tf_keras", "tensorflow")
READ = (
    *("gamma", "beta", "moving_mean", "moving_variance", "scale", "center"),
    *("axis", "epsilon", "momentum", "trainable"),
)
HARMLESS = (
    *("build", "quantize", "get_config", "from_config", "get_build_config", "build_from_config"),
    *("compute_output_shape", "compute_output_spec", "compute_mask", "add_weight"),
    *("save_own_variables", "load_own_variables", "get_weights", "set_weights"),
    *("extra_repr", "_get_name"),
)


def from_keras(layer: Any, *, running_var: Literal["unbiased", "biased"] | None = None) -> BatchNorm:
    """Convert a Keras BatchNormalization, to evaluation mode.

    Parameters
    ----------
    layer : keras.layers.BatchNormalization
        Built layer, which has its variables; any backend.
    running_var : {"biased", "unbiased"}, optional
        Variance that the layer tracks in training. By default it is biased, except for a layer of Keras 2 with
        TensorFlow's fused kernel (`layer.fused`), which tracks the unbiased variance.

    Returns
    -------
    BatchNorm
        Layer for inputs of any rank, with Keras' axis as `channel_axis` and with 1 - momentum; frozen if the Keras
        layer is not `trainable`, which means the same.

    Raises
    ------
    TypeError
        For another kind of object, and for a subclass or an instance that redefines `call` or what `call` uses.
    ValueError
        For a layer that is not built, that normalizes over several axes, or that does not train with the batch's
        statistics alone: `renorm`, `virtual_batch_size`, `synchronized`.

    Notes
    -----
    Masks belong to a call and are not converted; initializers, regularizers and constraints belong to an optimizer's
    step. A Keras layer with a 16-bit dtype policy converts its input to that type. cbn does not convert: give it the
    input that the layer gets in its model.

    Examples
    --------
    >>> import cbn
    >>> import keras  # doctest: +SKIP
    >>> layer = keras.layers.BatchNormalization()  # doctest: +SKIP
    >>> layer.build((None, 8, 8, 3))  # doctest: +SKIP
    >>> cbn.from_keras(layer)  # doctest: +SKIP
    BatchNorm(3, eps=0.001, momentum=0.01, affine=True, bias=True, track_running_stats=True, channel_axis=-1,
    running_var='biased').eval()
    """
    if running_var not in (None, "unbiased", "biased"):
        raise ValueError(f"running_var must be 'unbiased', 'biased' or None, not {running_var!r}")
    base = base_of(layer, ("BatchNormalization", "BatchNormalizationBase", "SyncBatchNormalization"), PACKAGES)
    if base is None:
        raise TypeError(f"expected keras.layers.BatchNormalization, not {kind_of(layer)}")
    refuse_overrides(layer, base, "call", READ, HARMLESS)
    if base.__name__ == "SyncBatchNormalization" or getattr(layer, "synchronized", False):
        raise ValueError(f"the Keras layer takes its statistics from all replicas (synchronized), which {ALONE}")
    if getattr(layer, "renorm", False):
        raise ValueError(f"the Keras layer trains by batch renormalization (renorm=True), which {ALONE}")
    if getattr(layer, "virtual_batch_size", None) is not None:
        raise ValueError(f"the Keras layer trains by parts of a batch (virtual_batch_size), which {ALONE}")
    if getattr(layer, "adjustment", None) is not None:
        raise ValueError("the Keras layer has an adjustment, which may change its values")
    if not layer.built:
        raise ValueError("the Keras layer has no variables before it is built: call it once, or its build()")
    axes = np.atleast_1d(layer.axis)  # Keras 2 keeps a list
    if axes.size != 1:
        raise ValueError(f"the Keras layer normalizes over the axes {axes.tolist()}; expected one")
    if running_var is None:
        running_var = "unbiased" if getattr(layer, "fused", False) else "biased"
    variables = {
        "weight": layer.gamma if layer.scale else None,
        "bias": layer.beta if layer.center else None,
        "running_mean": layer.moving_mean,
        "running_var": layer.moving_variance,
    }
    bn = layer_of(
        BatchNorm,
        {name: None if variable is None else np.asarray(variable.numpy()) for name, variable in variables.items()},
        names={"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"},
        eps=layer.epsilon,
        momentum=weight_of_new(layer.momentum, "the Keras layer's momentum"),
        channel_axis=int(axes[0]),
        biased=running_var == "biased",
    )
    return bn if layer.trainable else bn.freeze()
