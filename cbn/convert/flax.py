"""Layers from Flax: variables of Linen models, states and modules of NNX."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..batchnorm import BatchNorm
from ..checks import Array
from .common import base_of, kind_of, layer_of, listed, one_of, refuse_overrides, switched, weight_of_new

NAMES = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
READ = (
    *("mean", "var", "scale", "bias", "momentum", "epsilon", "axis", "axis_name", "axis_index_groups"),
    *("use_running_average", "use_scale", "use_bias", "dtype", "promote_dtype", "num_features"),
)
HARMLESS = ("_pytree__is_pytree", "_pytree__nodes", "_abc_impl")


def from_flax(
    variables: Any,
    *,
    name: str | None = None,
    params: str | None = None,
    momentum: float | None = None,
    epsilon: float | None = None,
    axis: int | None = None,
    use_scale: bool | None = None,
    use_bias: bool | None = None,
) -> BatchNorm:
    """Convert a batch norm of Flax, from the variables of a model or from a module of flax.nnx.

    Parameters
    ----------
    variables : mapping, flax.nnx.State, or flax.nnx.Module
        Variables of a Linen model, as `init` returns them ("batch_stats" with mean and var, "params" with scale and
        bias), an nnx.State or its ``nnx.to_pure_dict``, an nnx.BatchNorm, or an nnx.Module that contains one.
    name : str, optional
        Path of the batch norm, with slashes: "Block_0/BatchNorm_1". It may be omitted if there is only one.
    params : str, optional
        Path of scale and bias in "params", if it differs from `name`.
    momentum, epsilon, axis : optional
        Arguments of a Linen module, which its variables do not contain. The defaults are Flax's: 0.99, 1e-5 and -1.
        momentum is Flax's, the weight of the old statistics. An nnx.Module has its own, so they must be omitted.
    use_scale, use_bias : bool, optional
        Further arguments of a Linen module. By default the variables decide. A module with neither scale nor bias needs
        both arguments, as False.

    Returns
    -------
    BatchNorm
        Layer for inputs of any rank, with the biased variance that Flax tracks; in the mode of an nnx.Module
        (`use_running_average`), else in evaluation mode.

    Raises
    ------
    TypeError
        For another kind of object, and for a subclass of nnx.BatchNorm that redefines ``__call__``.
    ValueError
        If the name or the parameters do not exist, or there are several batch norms and no name; the message lists the
        names. For statistics of more than one axis, and for a module with `axis_name`, whose statistics belong to
        several devices.

    Notes
    -----
    Masks belong to a call and are not converted. The variables of a Linen module do not tell whether it has an
    `axis_name`. cbn computes in float32 or float64, while a module with a 16-bit `dtype` rounds its inputs.

    Examples
    --------
    >>> import numpy as np
    >>> import cbn
    >>> variables = {"params": {"scale": np.ones(3), "bias": np.zeros(3)},
    ...              "batch_stats": {"mean": np.zeros(3), "var": np.ones(3)}}
    >>> cbn.from_flax(variables)  # doctest: +NORMALIZE_WHITESPACE
    BatchNorm(3, eps=1e-05, momentum=0.01, affine=True, bias=True, track_running_stats=True, dtype='float64',
    channel_axis=-1, running_var='biased').eval()
    """
    given = {
        "params": params,
        "momentum": momentum,
        "epsilon": epsilon,
        "axis": axis,
        "use_scale": use_scale,
        "use_bias": use_bias,
    }
    if base_of(variables, ["Module", "Pytree", "Object"], ["flax"]) is not None and _is_nnx(variables):
        extra = [key for key, value in given.items() if value is not None]
        if extra:
            raise ValueError(f"the module has its own {', '.join(extra)}; leave the argument out")
        return _from_module(variables, name)
    if not isinstance(variables, Mapping):
        hint = "; pass its variables" if base_of(variables, ["Module"], ["flax"]) is not None else ""
        raise TypeError(
            "variables must be a mapping with batch_stats and params, an nnx.State or an nnx.Module, "
            f"not {kind_of(variables)}{hint}"
        )
    linen = isinstance(variables.get("batch_stats"), Mapping)
    statistics = {path: node for path, node in _nodes(variables["batch_stats"] if linen else variables)
                  if {"mean", "var"} <= node.keys()}  # fmt: skip
    parameters = dict(_nodes(variables.get("params", {}) if linen else variables))
    if not statistics:
        raise ValueError(
            'there is no batch norm in the variables: expected "batch_stats" with mean and var, as init of a Flax '
            "model gives, or an nnx.State"
        )
    name = one_of(statistics, name)
    own = {key: a for key, a in parameters.get(name if params is None else params, {}).items() if a is not None}
    if params is not None and params not in parameters:
        raise ValueError(f"there are no parameters {params!r}; there are {listed(parameters)}")
    unknown = sorted((own.keys() | statistics[name].keys()) - set(NAMES.values()))
    if unknown:
        raise ValueError(f"{name!r} has {', '.join(unknown)}, so it is no BatchNorm of Flax")
    with_some = [path for path, node in parameters.items() if {"scale", "bias"} & node.keys()]
    hint = " (params= takes their path)" if linen else ""
    present = switched(own, {"scale": use_scale, "bias": use_bias}, name, with_some, "use_", hint)
    arrays = {
        "weight": own["scale"] if present["scale"] else None,
        "bias": own["bias"] if present["bias"] else None,
        "running_mean": statistics[name]["mean"],
        "running_var": statistics[name]["var"],
    }
    return _layer(
        arrays,
        epsilon=1e-5 if epsilon is None else epsilon,
        momentum=0.99 if momentum is None else momentum,
        axis=-1 if axis is None else axis,
    )


def _is_nnx(module: Any) -> bool:
    return any(c.__module__.startswith("flax.nnx") for c in type(module).__mro__)


def _from_module(module: Any, name: str | None) -> BatchNorm:
    """The layer of an nnx.BatchNorm, or of the nnx.BatchNorm with this name in a module."""
    from flax import nnx

    found = {"/".join(map(str, path)): node for path, node in nnx.iter_graph(module) if isinstance(node, nnx.BatchNorm)}
    if not found:
        raise TypeError(f"expected an nnx.BatchNorm or a module that has some, not {kind_of(module)}")
    layer: Any = found[one_of(found, name)]
    refuse_overrides(layer, nnx.BatchNorm, "__call__", READ, HARMLESS)
    if layer.axis_name is not None or layer.axis_index_groups is not None:
        raise ValueError(
            f"the module takes its statistics from all devices of axis_name={layer.axis_name!r}, which cbn does not "
            "do; for evaluation alone pass nnx.state(module)"
        )
    if not getattr(getattr(layer, "promote_dtype", None), "__module__", "flax").startswith("flax"):
        raise ValueError("the module has a promote_dtype of its own, which may change its values")
    arrays = {key: getattr(layer, theirs) for key, theirs in NAMES.items()}
    bn = _layer(arrays, epsilon=layer.epsilon, momentum=layer.momentum, axis=layer.axis)
    return bn.train(layer.use_running_average is False)


def _layer(arrays: Mapping[str, Any], *, epsilon: float, momentum: float, axis: Any) -> BatchNorm:
    if np.size(axis) != 1:
        raise ValueError(f"axis is {axis!r}, statistics of several axes; expected one")
    return layer_of(
        BatchNorm,
        {key: None if a is None else _values(a) for key, a in arrays.items()},
        names=NAMES,
        eps=epsilon,
        momentum=weight_of_new(momentum, "momentum"),
        channel_axis=int(np.reshape(axis, ())),
        biased=True,
    )


def _values(a: Any) -> Array:
    """The array of a leaf: an NNX variable, a Linen box, or an array."""
    if hasattr(a, "unbox"):
        a = a.unbox()
    if _is_nnx(a):
        a = a[...] if hasattr(type(a), "__getitem__") else a.value  # in a state before Flax 0.12
    return np.asarray(a)


def _nodes(tree: Mapping[Any, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(path, leaves) of every mapping with leaves."""
    leaves = {str(key): value for key, value in tree.items() if not isinstance(value, Mapping)}
    if leaves:
        yield path, leaves
    for key, below in tree.items():
        if isinstance(below, Mapping):
            yield from _nodes(below, f"{path}/{key}" if path else str(key))
