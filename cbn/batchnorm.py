"""The layers: parameters, running statistics, train and eval state, forward and backward.

What normalizes is in `cbn.steps`; what is here is what a layer remembers and when it may change.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, Literal, NamedTuple, SupportsIndex, TypeVar

import numpy as np
import numpy.typing as npt

from . import checks, quantized, steps, storage
from . import state as state_entries
from .attributes import ChannelArray, Counter, Flag, accepted_dtype
from .checks import Activation, Array, ArrayLike, Doubles, Number
from .inputs import Input, as_gradient, as_input, as_outputs
from .kernels import arrays, channels, passes, plans
from .memory import retried
from .plan import EvalPlan
from .quantized import Quantization
from .steps import Affine, Context, Epilogue

__all__ = ["BatchNorm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]

Layer = TypeVar("Layer", bound="BatchNorm")

NO_FORWARD = "there is nothing to go back through: call the layer in training mode first"
AFTER_EVAL = (
    "the last forward was in evaluation mode, which keeps nothing for backward. To train through fixed statistics, "
    "call freeze() and stay in training mode; or use cbn.functional.native_batch_norm_backward(..., train=False)"
)
MODIFIED = (
    "one of the variables needed for gradient computation has been modified by an inplace operation: the {} of the "
    "last forward. Pass a copy to the layer, or change it after backward()"
)
OVERWRITTEN = (
    "the input or the residual of the last forward has been overwritten (out=), and without it there is no gradient"
)


_checks_inputs = False


def set_check_inputs(check: bool) -> bool:
    """Whether layers notice that an input was changed between forward and backward; returns what was set before.

    A training forward remembers its input and its residual by reference, so `backward` computes a wrong gradient where
    they have been written to in between. With the check a forward keeps a digest of their bytes and `backward` raises a
    RuntimeError if it has changed. It is off by default: it reads both once more, at about 1 GB/s.

    Parameters
    ----------
    check : bool
        For all layers of the process, from their next forward on.

    Returns
    -------
    bool

    Examples
    --------
    >>> import numpy as np
    >>> import cbn
    >>> before = cbn.set_check_inputs(True)
    >>> bn, x = cbn.BatchNorm1d(2), np.eye(2, dtype=np.float32)
    >>> y = bn(x)
    >>> x += 1
    >>> bn.backward(y)
    Traceback (most recent call last):
    ...
    RuntimeError: one of the variables needed for gradient computation has been modified by an inplace operation: the input of the last forward. Pass a copy to the layer, or change it after backward()
    >>> cbn.set_check_inputs(before)
    True
    """  # noqa: E501
    global _checks_inputs
    before, _checks_inputs = _checks_inputs, checks.boolean(check, "check")
    return before


def digest(a: Array | None) -> bytes | None:
    """A digest of an array's values."""
    if a is None:
        return None
    import hashlib  # 3 ms, which an import of cbn need not take

    return hashlib.blake2b(np.ascontiguousarray(a).reshape(-1).view(np.uint8).data, digest_size=16).digest()


def shortest(value: float) -> str:
    """A number as it was given: a float32, which files of ONNX and TensorFlow hold, by the digits of float32."""
    with np.errstate(over="ignore"):
        narrow = np.float32(value)
    return f"np.float32({narrow!s})" if float(f"{value:.9g}") != value == float(narrow) else repr(value)


class Snapshot(NamedTuple):
    """What one call reads of a layer: its mode and attributes, and copies of its arrays, all of one moment."""

    training: bool
    batch_statistics: bool  # the batch's normalize, else the running ones
    tracked: bool  # the batch moves the running ones
    eps: float
    sources: tuple[Array | None, ...]  # running mean and variance, weight and bias themselves,
    values: tuple[Doubles | Any, ...]  # and as float64
    counter: Array | None

    @property
    def affine(self) -> Affine:
        return Affine(self.values[2], self.values[3])


class BatchNorm(plans.Planned):
    """Batch normalization over any input of two or more dimensions.

    In training: ``y = (x - mean) / sqrt(var + eps) * weight + bias`` per channel, with the mean and the biased variance
    of the batch, which also move the running statistics. In evaluation: the same with the running statistics.

    Parameters
    ----------
    num_features : int
        C, the number of channels.
    eps : float
        Added to the variance.
    momentum : float in [0, 1] or None
        Weight of the new batch in the running statistics; None: a plain average over all batches.
    affine : bool
        Whether there are a weight and a bias.
    track_running_stats : bool
        Whether there are running statistics; without them evaluation uses the batch's too.
    bias : bool
        Whether an affine layer has a bias.
    dtype : float32 or float64
        Of parameters and statistics. The output has the input's, which may be float16 or bfloat16 (of ml_dtypes) too.
    channel_axis : int
        1 for NC, NCL, NCHW, NCDHW; -1 for NLC, NHWC; any other axis.
    running_var : {"unbiased", "biased"}
        The variance that is tracked: with 1/(n - 1), as PyTorch, or 1/n, as Keras and ONNX.
    activation : None, "relu" or ("leaky_relu", slope)
        What the output goes through, after the residual of the call, in the same pass; backward too.

    Attributes
    ----------
    weight, bias, weight_grad, bias_grad, running_mean, running_var : (C,) ndarray or None
        None where switched off. A (C,) array may be assigned, and is kept by reference if of the layer's dtype.
    num_batches_tracked : 0-d int64 ndarray or None
    training, frozen : bool

    Raises
    ------
    TypeError, ValueError
        For arguments out of range.

    Notes
    -----
    One layer may be used by many threads: evaluation is exact, the updates of a training call are atomic. `backward`
    belongs to the layer's last training forward, so threads that train want a layer each.

    Examples
    --------
    >>> import numpy as np
    >>> import cbn
    >>> bn = cbn.BatchNorm(2)
    >>> bn(np.array([[0.0, 1.0], [4.0, 1.0]], dtype=np.float32))
    array([[-0.99999875,  0.        ],
           [ 0.99999875,  0.        ]], dtype=float32)
    >>> bn.running_var
    array([1.7, 0.9], dtype=float32)
    >>> bn.eval()(np.array([[1.0, 1.0]], dtype=np.float32))
    array([[0.61357015, 0.948678  ]], dtype=float32)
    """

    _ranks: tuple[int, ...] | None = None  # numbers of dimensions that the class accepts; None: any from 2

    weight: ChannelArray = ChannelArray()
    bias: ChannelArray = ChannelArray()
    weight_grad: ChannelArray = ChannelArray()
    bias_grad: ChannelArray = ChannelArray()
    running_mean: ChannelArray = ChannelArray()
    running_var: ChannelArray = ChannelArray()
    num_batches_tracked: Counter = Counter()
    training: Flag = Flag()
    affine: Flag = Flag()
    track_running_stats: Flag = Flag()

    @retried
    def __init__(
        self,
        num_features: SupportsIndex,
        eps: Number = 1e-5,
        momentum: Number | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        bias: bool = True,
        dtype: npt.DTypeLike = np.float32,
        channel_axis: SupportsIndex = 1,
        running_var: Literal["unbiased", "biased"] = "unbiased",
        activation: Activation = None,
    ) -> None:
        self.activation = activation
        if not isinstance(running_var, str) or running_var not in ("unbiased", "biased"):
            raise ValueError(f"running_var must be 'unbiased' or 'biased', not {running_var!r}")
        self._dtype = accepted_dtype(dtype, checks.native_float, "float32 or float64")
        self._num_features = checks.integer(num_features, "num_features", "a number of channels")
        if self._num_features < 1:
            raise ValueError(f"num_features must be 1 or more, but got {num_features}")
        self._channel_axis = checks.integer(channel_axis, "channel_axis", "an integer")
        if self._ranks is not None:
            widest = max(self._ranks)
            if not -widest <= self._channel_axis < widest:
                raise ValueError(f"channel_axis {channel_axis} is out of range for an input of {widest} dimensions")
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        self._unbiased = running_var == "unbiased"
        self.training = True
        self._frozen = False
        self._saved: str | Context = NO_FORWARD
        shape = (self._num_features,)
        self.weight = np.ones(shape, self._dtype) if affine else None
        self.bias = np.zeros(shape, self._dtype) if affine and bias else None
        self.weight_grad = np.zeros(shape, self._dtype) if affine else None
        self.bias_grad = np.zeros(shape, self._dtype) if affine and bias else None
        self.running_mean = np.zeros(shape, self._dtype) if track_running_stats else None
        self.running_var = np.ones(shape, self._dtype) if track_running_stats else None
        self.num_batches_tracked = np.zeros((), np.int64) if track_running_stats else None

    @property
    def num_features(self) -> int:
        """Number of channels."""
        return self._num_features

    @property
    def dtype(self) -> np.dtype[Any]:
        """dtype of parameters and statistics."""
        return self._dtype

    @property
    def channel_axis(self) -> int:
        """The axis with the channels."""
        return self._channel_axis

    @property
    def eps(self) -> float:
        """What is added to the variance."""
        return self._eps

    @eps.setter
    def eps(self, value: Number) -> None:
        self._eps = checks.epsilon(value)

    @property
    def momentum(self) -> float | Any:
        """Weight of the new batch; None: a plain average."""
        return self._momentum

    @momentum.setter
    def momentum(self, value: Number | None) -> None:
        self._momentum = None if value is None else checks.momentum_fraction(value)

    @property
    def activation(self) -> Activation:
        """What follows the normalization: None, "relu" or ("leaky_relu", slope)."""
        return self._activation

    @activation.setter
    def activation(self, value: Activation) -> None:
        slope = checks.negative_slope(value)
        self._activation: Activation = ("leaky_relu", slope) if isinstance(value, (tuple, list)) else value

    # ---- state -----------------------------------------------------------------------------------------------------

    def train(self: Layer, mode: bool | np.bool_ = True) -> Layer:
        """Switch to training mode, or to evaluation with ``mode=False``; returns the layer."""
        if not isinstance(mode, (bool, np.bool_)):
            raise ValueError("training mode is expected to be boolean")
        self.training = bool(mode)
        return self

    def eval(self: Layer) -> Layer:
        """Switch to evaluation mode; returns the layer."""
        return self.train(False)

    @property
    def frozen(self) -> bool:
        """Whether the running statistics normalize, and stay as they are, whatever the mode."""
        return self._frozen

    def freeze(self: Layer) -> Layer:
        """Normalize with the running statistics and keep them, in training mode too; returns the layer.

        It survives `train()`. In training mode a frozen layer remembers its input, so that gradients flow through it.
        """
        checks.buffers_for_eval(self.running_mean, self.running_var)
        self._frozen = True
        return self

    def unfreeze(self: Layer) -> Layer:
        """Undo `freeze`; returns the layer."""
        self._frozen = False
        return self

    # ---- passes ----------------------------------------------------------------------------------------------------

    def forward(
        self,
        x: ArrayLike,
        *,
        out: Array | None = None,
        residual: ArrayLike | None = None,
        x_scale: Number | None = None,
        x_zero_point: SupportsIndex | None = None,
        out_dtype: npt.DTypeLike | None = None,
    ) -> Array:
        """Normalize x in the current mode, add the residual, apply the activation.

        Parameters
        ----------
        x : array_like
            Of the class's number of dimensions, of any floating dtype. In training mode it is remembered, by reference,
            for `backward`.
        out : ndarray, optional
            Of x's shape and y's dtype; receives y. ``out=x`` works in place.
        residual : array_like, optional
            Of x's shape and y's dtype; in training mode it is remembered as x is.
        x_scale, x_zero_point, out_dtype
            For an x of uint8 or int8 in evaluation mode, as in `cbn.functional.batch_norm`.

        Returns
        -------
        ndarray
            y, of x's shape and dtype (or `out_dtype`), in x's order in memory.

        Raises
        ------
        TypeError, ValueError
            As `cbn.functional.batch_norm`, and for another number of dimensions or channels. The layer and `out` are
            then as they were.
        """
        inp, quantization = self._input(x, x_scale, x_zero_point, out_dtype)
        given, (out, residual) = out, as_outputs(inp, out, residual)
        version = self._version  # before anything that a plan would stand for is read
        epilogue = Epilogue(residual, checks.negative_slope(self._activation))
        now = self._read(inp, quantization)
        if now.batch_statistics:
            y, context = steps.forward_batch(inp, now.affine, now.eps, epilogue, out)
        else:
            mean, var, *affine = now.values
            invstd = passes.inverse_std(var, now.eps)
            coef = passes.coefficients(mean, invstd, *affine)
            if quantization is None:
                y = steps.forward_fixed(inp, coef, epilogue, out)
            else:
                y = quantized.forward_quantized(inp, coef, epilogue, out, quantization)
        if not now.training:
            self._remember(AFTER_EVAL)
            if not now.batch_statistics and quantization is None and not self._has_plan(x):
                plan = plans.Plan.of(inp, x, now.sources, now.values, coef, epilogue.negative_slope)
                self._keep(plan, version)
        else:
            if not now.batch_statistics:
                context = Context(inp, now.affine, epilogue, False, mean, invstd)
            self._finish_training(context, now, out)
        return y if given is None else given

    def _input(
        self, x: ArrayLike, x_scale: Any, x_zero_point: Any, out_dtype: Any
    ) -> tuple[Input, Quantization | None]:
        """x for the passes; of 8 bits, also what its values stand for."""
        quantization = None
        if x_scale is None and x_zero_point is None and out_dtype is None:
            inp = as_input(x, self._channel_axis, ranks=self._ranks)
        else:
            of_bytes = x_scale, x_zero_point, out_dtype
            inp, quantization = quantized.quantized(x, self.training, self._channel_axis, self._ranks, *of_bytes)
        inp.promote_for(self._dtype)
        return inp, quantization

    def _read(self, inp: Input, quantization: Quantization | None) -> Snapshot:
        """What a forward of this input reads of the layer, checked."""
        training, frozen = self.training, self._frozen
        sources = running_mean, running_var, _, _ = self.running_mean, self.running_var, self.weight, self.bias
        batch_statistics = not frozen and (training or (running_mean is None and running_var is None))
        if quantization is not None:
            batch_statistics = False
        tracked = training and self.track_running_stats and not frozen
        if not batch_statistics:
            checks.buffers_for_eval(running_mean, running_var)
        elif tracked:
            checks.buffers_for_batch(running_mean, running_var)
        self._check_channels(inp, running_mean, batch_statistics and not tracked)
        eps = checks.epsilon_for(self._eps, batch_statistics)
        values = self._doubles(sources)
        counter = self.num_batches_tracked
        if batch_statistics:
            checks.more_than_one_value(inp.x, inp.n_channels)
            if tracked:
                self._check_writable(running_mean=running_mean, running_var=running_var, num_batches_tracked=counter)
        return Snapshot(training, batch_statistics, tracked, eps, sources, values, counter)

    def _finish_training(self, context: Context, now: Snapshot, out: Array | None) -> None:
        """Remember what backward needs, and move the running statistics, at one moment."""
        saved: str | Context = context
        if _checks_inputs:
            context.digests = digest(context.inp.x), digest(context.epilogue.residual)
        if out is not None and any(arrays.overlaps(a, out) for a in context.read):
            saved = OVERWRITTEN
        if now.batch_statistics and now.tracked and context.inp.layout is not None:
            momentum = 0.0 if self._momentum is None and now.counter is None else self._momentum
            running_mean, running_var, *_ = now.sources
            statistics = context.mean, context.m2, context.inp.count
            channels.move_running(
                running_mean, running_var, now.counter, *statistics, momentum, self._unbiased,
                attributes=self.__dict__, saved=saved,
            )  # fmt: skip
        else:
            self._remember(saved)

    def _remember(self, saved: str | Context) -> None:
        """Keep what backward needs, and the plan, which an assignment would drop: evaluation does not read it."""
        self.__dict__["_saved"] = saved

    def plan(
        self,
        shape: Sequence[SupportsIndex],
        dtype: npt.DTypeLike = np.float32,
        *,
        x_scale: Number | None = None,
        x_zero_point: SupportsIndex | None = None,
        out_dtype: npt.DTypeLike | None = None,
    ) -> EvalPlan:
        """Prepare the evaluation of inputs of one shape and dtype, for the lowest latency.

        Parameters
        ----------
        shape : sequence of int
            Of the inputs, batch included.
        dtype : float32, float64, float16 or bfloat16; with `x_scale` uint8 or int8
            Of the inputs.
        x_scale, x_zero_point, out_dtype
            For inputs of 8 bits, as in `cbn.functional.batch_norm`.

        Returns
        -------
        EvalPlan
            Called as ``plan(x, out=y)`` it returns what the layer in evaluation mode would return now, bit for bit. It
            is a snapshot: later changes of the layer do not reach it. Any number of threads may call it at once.

        Raises
        ------
        TypeError, ValueError
            As a call with such an input in evaluation mode; and for a layer without running statistics, which
            evaluates by those of the batch.

        Examples
        --------
        >>> import numpy as np
        >>> import cbn
        >>> plan = cbn.BatchNorm1d(3, eps=0).plan((2, 3), np.float64)
        >>> plan(np.ones((2, 3)))
        array([[1., 1., 1.],
               [1., 1., 1.]])
        >>> plan
        <EvalPlan of BatchNorm1d(3) for float64 of shape (2, 3)>
        """
        of_bytes = any(given is not None for given in (x_scale, x_zero_point, out_dtype))
        expected = "uint8 or int8, with x_scale"
        if not of_bytes:
            expected = f"float32, float64, float16 or bfloat16; or {expected}"
        wanted = accepted_dtype(dtype, checks.native_bytes if of_bytes else checks.native_input, expected)
        sizes, quantization, y_dtype = checks.shape(shape), None, None
        if of_bytes:
            one = np.empty(1, wanted)
            scale, zero_point, y_dtype = checks.quantization(one, x_scale, x_zero_point, out_dtype)
            quantization = scale, zero_point
        refuse_overrides(self, "a plan")
        example = arrays.with_room(np.empty, sizes, wanted)
        inp = as_input(example, self._channel_axis, ranks=self._ranks, y_dtype=y_dtype)
        inp.promote_for(self._dtype)
        self._check_channels(inp, self.running_mean, False)
        name, slope = f"{type(self).__name__}({self._num_features})", checks.negative_slope(self._activation)
        return EvalPlan(name, self._coefficients(), slope, inp, self._channel_axis, self._ranks, quantization)

    def _check_channels(self, inp: Input, mean: Array | None, untracked: bool) -> None:
        """Refuse an input with another number of channels, in PyTorch's words for what is compared with it first."""
        n = self._num_features
        if inp.n_channels == n:
            return
        if mean is not None and not untracked:
            name = "running_mean"
        elif self.weight is not None or self.bias is not None:
            name = "bias" if self.weight is None else "weight"
        else:
            words = (
                f"num_features is {n}, but axis {inp.axis} of the input, of size {inp.x.shape}, has {inp.n_channels}"
            )
            raise checks.ArgumentError(words + checks.other_axis(inp.x, n))
        words = f"{name} should contain {inp.n_channels} elements not {n}"
        raise checks.ArgumentError(words + checks.other_axis(inp.x, n))

    @staticmethod
    def _check_writable(**arrays: Array | None) -> None:
        for name, a in arrays.items():
            if a is not None and not a.flags.writeable:
                raise ValueError(f"{name} is read-only, but has to be updated")

    def backward(self, dy: ArrayLike, *, out: Array | None = None) -> Array | Any:
        """Gradient with respect to the input of the last training forward.

        The gradients of weight and bias are **added** to `weight_grad` and `bias_grad`, except where those are None.

        Parameters
        ----------
        dy : array_like
            Gradient of y, of its shape.
        out : ndarray, optional
            Of x's shape and dtype; receives dx. It may be dy or x.

        Returns
        -------
        ndarray, or tuple of two
            dx, of x's dtype, in x's order in memory; after a forward with a residual (dx, dresidual), alike.

        Raises
        ------
        RuntimeError
            Before any forward in training mode, after one in evaluation mode, where the forward overwrote its input,
            and where the input has been changed since, if `cbn.set_check_inputs` was asked to notice.
        TypeError, ValueError
            For a dy or an `out` that does not fit.
        """
        if isinstance(self._saved, str):
            raise RuntimeError(self._saved)
        context = self._saved
        inp = context.inp
        if context.digests is not None:
            read = (inp.x, context.epilogue.residual)
            for name, a, before in zip(("input", "residual"), read, context.digests, strict=True):
                if digest(a) != before:
                    raise RuntimeError(MODIFIED.format(name))
        dy = as_gradient(inp, dy)
        given, out = out, checks.output(out, inp.x.shape, inp.x.dtype)
        weight_grad = None if context.affine.weight is None else self.weight_grad
        bias_grad = None if self.bias is None else self.bias_grad
        want_sums = weight_grad is not None or bias_grad is not None
        self._check_writable(weight_grad=weight_grad, bias_grad=bias_grad)
        if out is not None and any(arrays.overlaps(a, out) for a in context.read):
            self._remember(OVERWRITTEN)  # before the pass: an exception behind it must not leave an input that is none
        try:
            dx, dresidual, dweight, dbias = steps.backward(dy, context, True, want_sums, out)
        except MemoryError:  # before the pass
            self._remember(context)
            raise
        channels.add((weight_grad, bias_grad), (dweight, dbias), ("weight_grad", "bias_grad"))
        dx = dx if given is None else given
        return dx if context.epilogue.residual is None else (dx, dresidual)

    # ---- parameters ------------------------------------------------------------------------------------------------

    @retried
    def _fill(self, **values: float) -> None:
        """Fill arrays that are there with numbers, in place; all or none."""
        arrays = {name: getattr(self, name) for name in values}
        new = [None if a is None else np.full(a.shape, values[name], a.dtype) for name, a in arrays.items()]
        channels.replace(list(arrays.values()), new, list(arrays))

    def zero_grad(self) -> None:
        """Fill the gradients with zeros, in place."""
        self._fill(weight_grad=0, bias_grad=0)

    def reset_running_stats(self) -> None:
        """Running mean 0, variance 1, no batches counted; in place."""
        self._fill(running_mean=0, running_var=1, num_batches_tracked=0)

    def reset_parameters(self) -> None:
        """Weight 1, bias 0, and `reset_running_stats`; in place."""
        self._fill(weight=1, bias=0, running_mean=0, running_var=1, num_batches_tracked=0)

    def parameters(self) -> Iterator[Array]:
        """Iterate over the weight and the bias, where there are any."""
        return iter([a for a in (self.weight, self.bias) if a is not None])

    # ---- state dict ------------------------------------------------------------------------------------------------

    _state_names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    _array_names = (*_state_names, "weight_grad", "bias_grad")

    def state_dict(self) -> dict[str, Array]:
        """Copies of all parameters and statistics under PyTorch's names, without those that are None.

        Examples
        --------
        >>> import cbn
        >>> list(cbn.BatchNorm1d(3, affine=False).state_dict())
        ['running_mean', 'running_var', 'num_batches_tracked']
        """
        return self._snapshot(self._state_names)

    @retried
    def load_state_dict(
        self, state: Mapping[str, Any], strict: bool = True, *, prefix: str = ""
    ) -> tuple[list[str], list[str]]:
        """Copy parameters and statistics into the layer's arrays, all or none.

        Parameters
        ----------
        state : mapping
            From `state_dict` or from PyTorch's, of any floating dtype. A missing num_batches_tracked keeps the layer's.
        strict : bool
            Whether missing and unexpected entries are errors; wrong shapes and values always are.
        prefix : str
            What the layer's entries begin with in the state of a whole model, as in "layer1.0.bn1."; entries that
            begin otherwise are not looked at.

        Returns
        -------
        (missing_keys, unexpected_keys) : tuple of lists
            With the prefix.

        Raises
        ------
        TypeError
            If state is no mapping or prefix no string.
        ValueError
            One error that lists everything that is wrong; the layer is then as it was.

        Examples
        --------
        >>> import cbn
        >>> state = {"bn1." + name: array for name, array in cbn.BatchNorm1d(3).state_dict().items()}
        >>> cbn.BatchNorm1d(3).load_state_dict({**state, "fc.weight": 0}, prefix="bn1.")
        ([], [])
        """
        if not isinstance(state, Mapping):
            advice = "; its state_dict() is one" if callable(getattr(state, "state_dict", None)) else ""
            raise TypeError(f"state must be a mapping of names to arrays, not {type(state).__name__}{advice}")
        if not isinstance(prefix, str):
            raise TypeError(f"prefix must be a string, not {type(prefix).__name__}")
        own = {name: a for name in self._state_names if (a := getattr(self, name)) is not None}
        required = [name for name in own if name != "num_batches_tracked"]
        missing = [prefix + name for name in required if prefix + name not in state]
        keys = {prefix + name for name in own}
        within = [key for key in state if isinstance(key, str) and key.startswith(prefix)] if prefix else state
        unexpected = [key for key in within if key not in keys]
        problems = state_entries.differences(missing, unexpected) if strict else []
        new = {}
        for name, target in own.items():
            if prefix + name in state:
                try:
                    value = state[prefix + name]
                    new[name] = state_entries.entry(name, value, target.shape, target.dtype, prefix=prefix)
                except ValueError as error:
                    problems.append(str(error))
                if not target.flags.writeable:
                    problems.append(f"the layer's {name} is read-only")
        if problems:
            absent = strict and missing and len(missing) == len(required)
            hint = state_entries.hint(state, required, (self._num_features,)) if absent else ""
            raise checks.ArgumentError(
                f"cannot load the state into {type(self).__name__}({self._num_features}): {'; '.join(problems)}{hint}"
            )
        channels.replace([own[name] for name in new], list(new.values()), list(new))
        return missing, unexpected

    def save(
        self,
        file: str | os.PathLike[str] | BinaryIO,
        *,
        allow_nonfinite: bool = False,
        allow_negative_var: bool = False,
    ) -> None:
        """Write the layer to a file that `cbn.load` reads: class, arguments, arrays, mode.

        Parameters
        ----------
        file : str, path-like or binary file object
            Its name chooses the format: safetensors where it ends with .safetensors, for which the package of that name
            is needed, else numpy's .npz. A regular file is replaced as a whole, or not at all, and keeps its mode and
            its owner; a link stays a link, but other hard links keep the old content. A pipe or a device is written
            to. A file object need not be one that can be sought; it is neither flushed nor closed.
        allow_nonfinite : bool
            Whether NaN and infinities may be written.
        allow_negative_var : bool
            Whether running variances below zero may be written, while their sum with eps is positive: rounding left
            such in some converted models, which evaluate all the same. `cbn.load` needs the same switch.

        Raises
        ------
        ValueError
            If an array is not finite, or a running variance negative.
        TypeError
            For what is neither a path nor a file object that takes bytes.
        OSError
            If the file cannot be written.
        ImportError
            For the safetensors format, without the package of that name.
        """
        storage.save(self, file, allow_nonfinite=allow_nonfinite, allow_negative_var=allow_negative_var)

    def _doubles(self, arrays: tuple[Array | None, ...]) -> tuple[Doubles | Any, ...]:
        """Float64 copies of (C,) arrays of the layer, all of the same moment."""
        try:
            return channels.as_doubles(self._num_features, *arrays)
        except ValueError as error:
            raise self._unfit() or error from None

    def _snapshot(self, names: tuple[str, ...]) -> dict[str, Array]:
        """Copies of the arrays that are there, all of the same moment."""
        if error := self._unfit():
            raise error
        arrays = channels.copies(*[getattr(self, name) for name in names])
        return {name: a for name, a in zip(names, arrays, strict=True) if a is not None}

    def _unfit(self) -> ValueError | None:
        """The error of an array whose shape or dtype has been assigned to in place, past the layer."""
        for name in self._array_names:
            a, expected = getattr(self, name), f"({self._num_features},) floats"
            if name == "num_batches_tracked":
                fits, expected = a is None or (a.shape == () and a.dtype.kind in "iu"), "an integer"
            else:
                fits = a is None or (a.shape == (self._num_features,) and checks.native_input(a.dtype) is not None)
            if not fits:
                return ValueError(f"{name} has become an array of {a.dtype} of shape {a.shape}; expected {expected}")
        return None

    def _coefficients(self) -> Doubles:
        """(3, C): mean, scale and offset of evaluation now."""
        checks.buffers_for_eval(self.running_mean, self.running_var)
        mean, var, weight, bias = self._doubles((self.running_mean, self.running_var, self.weight, self.bias))
        return passes.coefficients(mean, passes.inverse_std(var, self._eps), weight, bias)

    def __copy__(self: Layer) -> Layer:
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__, _saved=NO_FORWARD)
        return other

    def __deepcopy__(self: Layer, memo: dict[int, Any]) -> Layer:
        other = self.__copy__()
        memo[id(self)] = other
        own = {"_" + name for name in self._array_names}
        for name, value in self.__getstate__().items():
            other.__dict__[name] = value if name in own else copy.deepcopy(value, memo)
        return other

    def __getstate__(self) -> dict[str, Any]:
        attributes = self.__dict__ | {"_saved": NO_FORWARD}
        # The arrays too: a pickle that is written later must not see half an update
        return attributes | {"_" + name: a for name, a in self._snapshot(self._array_names).items()}

    def __repr__(self) -> str:
        """PyTorch's; then what is not at its default, and the calls that lead to the mode, so that it can be evaluated;
        then which arrays are there, or not, against what that says.
        """
        has_bias = self.affine and self.bias is not None
        arguments: dict[str, Any] = {
            "eps": shortest(self._eps),
            "momentum": None if self._momentum is None else shortest(self._momentum),
            "affine": self.affine,
            "bias": has_bias,
            "track_running_stats": self.track_running_stats,
        }
        if self._dtype != np.float32:
            arguments["dtype"] = repr(self._dtype.name)
        if self._channel_axis != 1:
            arguments["channel_axis"] = self._channel_axis
        if not self._unbiased:
            arguments["running_var"] = "'biased'"
        if isinstance(self._activation, str):
            arguments["activation"] = repr(self._activation)
        elif self._activation is not None:
            arguments["activation"] = f"('leaky_relu', {shortest(float(self._activation[1]))})"
        given = ", ".join([str(self._num_features), *(f"{name}={value}" for name, value in arguments.items())])
        mode = ".freeze()" * self._frozen + ".eval()" * (not self.training)
        expected = {"weight": self.affine, "bias": has_bias}
        expected |= {name + "_grad": getattr(self, name) is not None for name in expected}
        expected |= dict.fromkeys(("running_mean", "running_var", "num_batches_tracked"), self.track_running_stats)
        there = {name: getattr(self, name) is not None for name in expected}
        without = ", ".join(name for name in expected if expected[name] and not there[name])
        added = ", ".join(name for name in expected if there[name] and not expected[name] and "_grad" not in name)
        return (
            f"{type(self).__name__}({given}){mode}"
            + (f" without {without}" if without else "")
            + (f" with {added}" if added else "")
        )


plans.plans_stand_for(BatchNorm, "_ranks")

# What an evaluation goes by.
_EVALUATION = (
    *("forward", "__call__", "__getattribute__", "__getattr__", "_coefficients", "eps", "activation"),
    *("weight", "bias", "running_mean", "running_var", "num_features", "channel_axis"),
)


def _definition(cls: type, name: str) -> Any:
    """What a class has under this name, as it is there; None for nothing."""
    return next((vars(c)[name] for c in cls.__mro__ if name in vars(c)), None)


_OWN = {name: _definition(BatchNorm, name) for name in _EVALUATION}


def refuse_overrides(layer: BatchNorm, what: str) -> None:
    """Refuse a layer that evaluates otherwise than cbn defines, by its class, a mixin, a patch or an attribute."""
    for name, own in _OWN.items():
        if name in vars(layer) or _definition(type(layer), name) is not own:
            raise TypeError(f"{type(layer).__name__} has a {name} of its own, which {what} would not follow")


class BatchNorm1d(BatchNorm):
    """Batch normalization over (N, C) or (N, C, L); see `BatchNorm` for arguments, attributes and members.

    Examples
    --------
    >>> import numpy as np
    >>> import cbn
    >>> bn = cbn.BatchNorm1d(64)
    >>> bn
    BatchNorm1d(64, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    >>> bn(np.zeros((8, 64, 100), np.float32)).shape
    (8, 64, 100)
    >>> cbn.BatchNorm1d(64, channel_axis=-1)(np.zeros((8, 100, 64), np.float32)).shape
    (8, 100, 64)
    """

    _ranks = (2, 3)


class BatchNorm2d(BatchNorm):
    """Batch normalization over (N, C, H, W); see `BatchNorm` for arguments, attributes and members.

    Examples
    --------
    >>> import numpy as np
    >>> import cbn
    >>> cbn.BatchNorm2d(3)(np.zeros((2, 3, 8, 8), np.float32)).shape
    (2, 3, 8, 8)
    """

    _ranks = (4,)


class BatchNorm3d(BatchNorm):
    """Batch normalization over (N, C, D, H, W); see `BatchNorm` for arguments, attributes and members.

    Examples
    --------
    >>> import numpy as np
    >>> import cbn
    >>> cbn.BatchNorm3d(3)(np.zeros((2, 3, 4, 8, 8), np.float32)).shape
    (2, 3, 4, 8, 8)
    """

    _ranks = (5,)


storage.CLASSES.update({c.__name__: c for c in (BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d)})
