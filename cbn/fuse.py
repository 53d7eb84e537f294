"""Folding batch norms into the linear layers and convolutions beside them: numpy arrays in, numpy arrays out.

In evaluation a batch norm is ``y = x*scale + offset`` per channel, with scale = weight/sqrt(running_var + eps) and
offset = bias - running_mean*scale. The linear layer beside it can absorb both. The functions compute in float64 and
round once, to the type of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from . import checks
from .batchnorm import BatchNorm, refuse_overrides
from .checks import Array, ArrayLike, Doubles
from .kernels import arrays

__all__ = ["fuse_bn_linear", "fuse_conv_bn", "fuse_linear_bn"]

# The smallest normal number of each type that weights may have.
TINY = {"float16": 2.0**-14, "bfloat16": 2.0**-126, "float32": 2.0**-126, "float64": 2.0**-1022}


def fuse_linear_bn(
    weight: ArrayLike,
    bias: ArrayLike | None,
    bn: BatchNorm,
    *,
    flush_subnormals: bool = False,
    return_error: bool = False,
) -> tuple[Array, ...]:
    """Fold a batch norm into the linear layer before it: bn(x @ weight.T + bias) = x @ folded.T + folded_bias.

    Parameters
    ----------
    weight : (out_features, in_features) array_like
        Weight in float16, bfloat16 (of ml_dtypes), float32 or float64.
    bias : (out_features,) array_like or None
        Bias; None means zeros.
    bn : BatchNorm
        Layer with out_features channels, in evaluation mode or frozen.
    flush_subnormals : bool
        Whether folded values below the type's smallest normal number become 0. Arithmetic with subnormals is slow on
        many processors.
    return_error : bool
        Whether to return the rounding error too.

    Returns
    -------
    folded, folded_bias : ndarray
        Folded weight and bias, with weight's dtype.
    error : (out_features,) float64 ndarray
        With `return_error`: the largest change of each output by rounding (and flushing), for inputs in [-1, 1].

    Raises
    ------
    TypeError
        For a dtype that no layer has.
    ValueError
        If shapes do not fit; for a layer in training mode, without running statistics or with an activation; and if a
        folded value, which the message names, is beyond the dtype's range.

    References
    ----------
    .. [1] B. Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
       Inference", CVPR 2018, equation 14.

    Examples
    --------
    >>> import numpy as np
    >>> import cbn
    >>> bn = cbn.BatchNorm1d(2, eps=0).eval()
    >>> bn.running_mean[:], bn.running_var[:] = [1, 2], [4, 16]
    >>> cbn.fuse_linear_bn(np.ones((2, 3), np.float32), None, bn)
    (array([[0.5 , 0.5 , 0.5 ],
           [0.25, 0.25, 0.25]], dtype=float32), array([-0.5, -0.5], dtype=float32))
    """
    w, b = _arrays(weight, bias, 2, 2, "a linear layer's is (out_features, in_features)")
    return arrays.with_room(_after, w, b, bn, 1, False, flush_subnormals, return_error)


def fuse_conv_bn(
    weight: ArrayLike,
    bias: ArrayLike | None,
    bn: BatchNorm,
    *,
    transpose: bool = False,
    groups: int = 1,
    flush_subnormals: bool = False,
    return_error: bool = False,
) -> tuple[Array, ...]:
    """Fold a batch norm into the convolution before it; `fuse_linear_bn` does it for a linear layer.

    Parameters
    ----------
    weight : array_like
        Weight in PyTorch's layout: (out_channels, in_channels/groups, ...), transposed
        (in_channels, out_channels/groups, ...), with one or more spatial dimensions.
    bias : (out_channels,) array_like or None
        Bias; None means zeros.
    bn : BatchNorm
        Layer with out_channels channels, in evaluation mode or frozen.
    transpose : bool
        Whether the convolution is transposed.
    groups : int
        Groups of the convolution.
    flush_subnormals, return_error
        As for `fuse_linear_bn`.

    Returns
    -------
    folded, folded_bias[, error]
        As `fuse_linear_bn`. Stride, padding and dilation do not change.

    Raises
    ------
    TypeError, ValueError
        As `fuse_linear_bn`, and if groups do not divide the channels.

    Examples
    --------
    >>> import numpy as np
    >>> import cbn
    >>> bn = cbn.BatchNorm2d(4, eps=0).eval()
    >>> bn.running_var[:] = [1, 4, 16, 64]
    >>> weight, bias = cbn.fuse_conv_bn(np.ones((2, 2, 1, 1)), None, bn, transpose=True, groups=2)
    >>> weight[:, :, 0, 0]
    array([[1.   , 0.5  ],
           [0.25 , 0.125]])
    """
    words = "a convolution's is (out_channels, in_channels/groups, ...)"
    if transpose:
        words = "a transposed convolution's is (in_channels, out_channels/groups, ...)"
    w, b = _arrays(weight, bias, 3, 64, words)
    return arrays.with_room(_after, w, b, bn, groups, transpose, flush_subnormals, return_error)


def fuse_bn_linear(
    bn: BatchNorm,
    weight: ArrayLike,
    bias: ArrayLike | None,
    *,
    padding: int | Sequence[int] | str | None = None,
    groups: int = 1,
    flush_subnormals: bool = False,
    return_error: bool = False,
) -> tuple[Array, ...]:
    """Fold a batch norm into the linear layer or convolution after it: bn(x) @ weight.T + bias = x @ folded.T + ...

    Parameters
    ----------
    bn : BatchNorm
        Layer with in_features channels, in evaluation mode or frozen.
    weight : array_like
        Weight (out_features, in_features), or (out_channels, in_channels/groups, ...) of a convolution.
    bias : (out_features,) array_like or None
        Bias; None means zeros.
    padding : int, sequence of int or str
        Padding of a convolution, required for one. Only a convolution without padding can be folded.
    groups : int
        Groups of a convolution.
    flush_subnormals, return_error
        As for `fuse_linear_bn`.

    Returns
    -------
    folded, folded_bias[, error]
        As `fuse_linear_bn`.

    Raises
    ------
    TypeError, ValueError
        As `fuse_linear_bn`, and for a convolution with padding. Its zeros come after the batch norm; folded, they would
        come before it, and the outputs at the border would change.

    Examples
    --------
    >>> import numpy as np
    >>> import cbn
    >>> bn = cbn.BatchNorm1d(2, eps=0).eval()
    >>> bn.running_mean[:], bn.running_var[:] = [1, 2], [4, 16]
    >>> cbn.fuse_bn_linear(bn, np.ones((1, 2), np.float32), None)
    (array([[0.5 , 0.25]], dtype=float32), array([-1.], dtype=float32))
    """
    w, b = _arrays(weight, bias, 2, 64, "a linear layer's is (out_features, in_features)")
    if w.ndim > 2 and padding is None:
        raise ValueError(f"weight has shape {w.shape}, a convolution's: say how it pads; padding=0 if it does not")
    if padding not in (None, "valid") and (isinstance(padding, str) or np.any(np.asarray(padding) != 0)):
        raise ValueError(
            f"a batch norm before a convolution with padding={padding!r} cannot be folded into it: the zeros around "
            "the input stand behind the batch norm, and would then stand before it"
        )
    return arrays.with_room(_before, bn, w, b, groups, flush_subnormals, return_error)


# ---- steps -----------------------------------------------------------------------------------------------------------


def _arrays(
    weight: ArrayLike, bias: ArrayLike | None, least: int, most: int, words: str
) -> tuple[Array, Doubles | None]:
    """The weight, with `least` to `most` dimensions, and the float64 bias; both have a dtype that layers have."""
    checked: dict[str, Array] = {}
    for name, value in {"weight": weight, "bias": bias}.items():
        if value is None and name == "bias":
            continue
        a = checks.array(value, name)
        if a.dtype.name not in TINY:
            raise checks.dtype_error(a, value, name, "float16, bfloat16, float32 or float64")
        checked[name] = a
    w = checked["weight"]
    if not least <= w.ndim <= most or not w.size:
        raise ValueError(f"weight has shape {w.shape}; {words}")
    return w, None if bias is None else checked["bias"].astype(np.float64)


def _groups(groups: int, n_channels: int, name: str) -> int:
    groups = checks.integer(groups, "groups", "a number of groups")
    if groups < 1 or n_channels % groups:
        raise ValueError(f"groups is {groups}, which does not divide {name}, {n_channels}")
    return groups


def _coefficients(bn: BatchNorm, n_channels: int, name: str) -> Doubles:
    """(3, C): mean, scale and offset of a layer in evaluation, for a neighbour with `n_channels`."""
    if not isinstance(bn, BatchNorm):
        raise TypeError(f"bn must be a layer of cbn, not {type(bn).__name__}; cbn.from_torch makes one of PyTorch's")
    refuse_overrides(bn, "a folded weight")
    if bn.num_features != n_channels:
        raise ValueError(f"bn has {bn.num_features} channels, and there are {n_channels} {name}")
    if bn.training and bn.use_batch_stats is None:
        raise ValueError("bn is in training mode, where its statistics are the batch's: call eval() or freeze() first")
    if bn.use_batch_stats:
        raise ValueError("bn normalizes with the batch's statistics, as use_batch_stats is True")
    if bn.activation is not None:
        raise ValueError(
            f"the layer has an activation, {bn.activation!r}, which no weight can hold: "
            "set bn.activation = None, and apply it to the output of the folded layer"
        )
    coef = bn._coefficients()
    bad = np.flatnonzero(~np.isfinite(coef).all(axis=0))
    if bad.size:
        raise ValueError(f"bn has no finite scale and offset in channel {bad[0]}")
    return coef


def _after(
    w: Array, b: Doubles | None, bn: BatchNorm, groups: int, transpose: bool, flush: bool, return_error: bool
) -> tuple[Array, ...]:
    """A batch norm folded into the layer before it."""
    transpose = checks.boolean(transpose, "transpose")
    groups = _groups(groups, len(w), "in_channels" if transpose else "out_channels")
    n_out = w.shape[1] * groups if transpose else len(w)
    mean, scale, offset = _coefficients(bn, n_out, f"outputs of weight {w.shape}")
    if b is not None and b.shape != (n_out,):
        raise ValueError(f"bias has shape {b.shape}; expected ({n_out},)")
    rows = _rows_of_outputs(w.astype(np.float64), groups, transpose)
    with np.errstate(over="ignore"):
        folded, folded_bias = rows * scale[:, None], ((0 if b is None else b) - mean) * scale + offset
    return _rounded(folded, folded_bias, w, groups, transpose, flush, return_error)


def _before(
    bn: BatchNorm, w: Array, b: Doubles | None, groups: int, flush: bool, return_error: bool
) -> tuple[Array, ...]:
    """A batch norm folded into the layer after it."""
    groups = _groups(groups, len(w), "out_channels")
    n_in = w.shape[1] * groups
    mean, scale, offset = _coefficients(bn, n_in, f"in_channels of weight {w.shape}")
    if b is not None and b.shape != (len(w),):
        raise ValueError(f"bias has shape {b.shape}; expected ({len(w)},)")
    # Input channel i of a group is channel i of the rows of that group.
    shape = (groups, 1, w.shape[1], 1)
    grouped = w.astype(np.float64).reshape(groups, len(w) // groups, w.shape[1], -1)
    with np.errstate(all="ignore"):
        folded = grouped * scale.reshape(shape)
        moved = (grouped * offset.reshape(shape) - folded * mean.reshape(shape)).reshape(len(w), -1).sum(axis=1)
    folded_bias = moved if b is None else b + moved
    return _rounded(folded.reshape(len(w), -1), folded_bias, w, 1, False, flush, return_error)


def _rows_of_outputs(w: Array, groups: int, transpose: bool) -> Array:
    """Weights as a matrix with a row for each output channel.

    A transposed convolution has shape (in_channels, out_channels/groups, ...), with the inputs of a group side by side.
    """
    if transpose:
        w = w.reshape(groups, len(w) // groups, *w.shape[1:]).swapaxes(1, 2)
        return w.reshape(groups * w.shape[1], -1)
    return w.reshape(len(w), -1)


def _as_weight(rows: Array, w: Array, groups: int, transpose: bool) -> Array:
    """The inverse of `_rows_of_outputs`: rows in the shape of w."""
    if transpose:
        rows = rows.reshape(groups, w.shape[1], len(w) // groups, *w.shape[2:]).swapaxes(1, 2)
    return np.ascontiguousarray(rows.reshape(w.shape))


def _rounded(
    rows: Doubles, bias: Doubles, w: Array, groups: int, transpose: bool, flush: bool, return_error: bool
) -> tuple[Array, ...]:
    """Folded weights in w's type and shape, the bias in w's type, and the rounding error if asked for."""
    native = w.dtype.newbyteorder("=")
    results = []
    for exact, name in ((rows, "weight"), (bias, "bias")):
        with np.errstate(over="ignore", under="ignore"):
            value = exact.astype(native)
        if checks.boolean(flush, "flush_subnormals"):
            value[np.abs(exact) < TINY[native.name]] = 0
        bad = np.argwhere(np.isfinite(exact) & ~np.isfinite(value.astype(np.float64)))
        if bad.size:
            largest = float(np.abs(exact[tuple(bad[0])]))
            raise ValueError(f"the folded {name} of output {bad[0][0]} is {largest:.3g}, beyond the range of {native}")
        results.append(value)
    folded = _as_weight(results[0], w, groups, transpose)
    if not checks.boolean(return_error, "return_error"):
        return folded, results[1]
    moved = [np.abs(value.astype(np.float64) - exact) for value, exact in zip(results, (rows, bias), strict=True)]
    return folded, results[1], moved[0].sum(axis=1) + moved[1]
