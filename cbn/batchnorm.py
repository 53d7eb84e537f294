"""The layers: forward and backward, in training and in evaluation.

What a layer is (arguments, arrays, modes) is in `cbn.state`, what normalizes in `cbn.steps`. Here is what a call reads
of the layer, what it changes, and what it remembers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
import numpy.typing as npt

from . import checks, quantized, steps, storage
from .attributes import accepted_dtype
from .checks import Array, ArrayLike, Doubles, Number
from .inputs import Input, as_gradient, as_input, as_outputs
from .kernels import arrays, channels, passes, plans
from .plan import EvalPlan
from .quantized import Quantization
from .state import State
from .steps import Affine, Context, Epilogue

__all__ = ["BatchNorm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]

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


class Snapshot(NamedTuple):
    """What one call reads of a layer, all of one moment."""

    version: int  # of the layer's attributes
    training: bool
    batch_statistics: bool  # the batch's normalize, else the running ones
    tracked: bool  # the batch moves the running ones
    eps: float
    affine: Affine
    epilogue: Epilogue
    sources: tuple[Array | None, ...]  # running mean and variance, weight and bias themselves,
    values: tuple[Doubles | Any, ...]  # and as float64
    counter: Array | None


class BatchNorm(State):
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
        now = self._read(inp, residual, quantization)
        if now.batch_statistics:
            y, context = steps.forward_batch(inp, now.affine, now.eps, now.epilogue, out)
        else:
            y, context = self._forward_fixed(inp, now, out, quantization)
        if now.training:
            self._finish_training(context, now, out)
        else:
            self._remember(AFTER_EVAL)
            if not now.batch_statistics and quantization is None and not self._has_plan(x):
                coef = steps.coefficients(context.mean, context.invstd, now.affine)
                plan = plans.Plan.of(inp, x, now.sources, now.values, coef, now.epilogue.negative_slope)
                self._keep(plan, now.version)
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

    @staticmethod
    def _forward_fixed(
        inp: Input, now: Snapshot, out: Array | None, quantization: Quantization | None
    ) -> tuple[Array, Context]:
        """y, normalized with the running statistics."""
        mean, var, *_ = now.values
        context = Context(inp, now.affine, now.epilogue, False, mean, passes.inverse_std(var, now.eps))
        coef = steps.coefficients(mean, context.invstd, now.affine)
        if quantization is None:
            return steps.forward_fixed(inp, coef, now.epilogue, out), context
        return quantized.forward_quantized(inp, coef, now.epilogue, out, quantization), context

    def _read(self, inp: Input, residual: Array | None, quantization: Quantization | None) -> Snapshot:
        """What a forward of this input reads of the layer, checked."""
        version = self._version  # before anything that a plan would stand for is read
        epilogue = Epilogue(residual, checks.negative_slope(self._activation))
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
        affine = Affine(values[2], values[3])
        return Snapshot(version, training, batch_statistics, tracked, eps, affine, epilogue, sources, values, counter)

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

    def _coefficients(self) -> Doubles:
        """(3, C): mean, scale and offset of evaluation now."""
        checks.buffers_for_eval(self.running_mean, self.running_var)
        mean, var, weight, bias = self._doubles((self.running_mean, self.running_var, self.weight, self.bias))
        return passes.coefficients(mean, passes.inverse_std(var, self._eps), weight, bias)


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
