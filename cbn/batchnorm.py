"""The layers: forward and backward, in training and in evaluation.

This module decides what a call reads from the layer, what it changes and what it remembers. `cbn.state` holds the
layer's arguments, arrays and modes; `cbn.steps` normalizes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from . import checks, course, digests, domains, ghost, masked, quantized, steps, storage
from .attributes import accepted_dtype
from .checks import Array, ArrayLike, Doubles, Number
from .course import Options, Snapshot
from .inputs import Input, as_gradient, as_input, as_outputs
from .kernels import arrays, calls, channels, passes, plans
from .moments import Moments
from .plan import EvalPlan
from .population import Population
from .quantized import Quantization
from .steps import PLAIN, Affine, Context, Epilogue

__all__ = ["BatchNorm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]

AFTER_EVAL = (
    "the last forward was in evaluation mode, which keeps nothing for backward. To train through fixed statistics, "
    "call freeze() and stay in training mode; or use cbn.functional.native_batch_norm_backward(..., train=False)"
)
OVERWRITTEN = (
    "the input or the residual of the last forward has been overwritten (out=), and without it there is no gradient"
)


_LEARNING = threading.Lock()  # of `BatchNorm._first`
os.register_at_fork(after_in_child=_LEARNING._at_fork_reinit)  # type: ignore[attr-defined]


class BatchNorm(Population):
    """Batch normalization over any input of two or more dimensions.

    A layer computes ``y = (x - mean) / sqrt(var + eps) * weight + bias`` per channel. In training mode mean and var are
    the mean and the biased variance of the batch, and the running statistics move towards them. In evaluation mode
    they are the running statistics.

    Parameters
    ----------
    num_features : int or None
        C, the number of channels. None: the first call, or the first state, tells.
    eps : float
        Number added to the variance.
    momentum : float in [0, 1] or None
        Weight of the new batch in the running statistics. None means a plain average over all batches.
    affine : bool
        Whether the layer has a weight and a bias.
    track_running_stats : bool
        Whether the layer has running statistics. Without them evaluation uses the batch's statistics too.
    bias : bool
        Whether an affine layer has a bias.
    dtype : float32 or float64
        Type of parameters and statistics. The output has the input's type, which may also be float16 or bfloat16 (of
        ml_dtypes).
    channel_axis : int
        Axis with the channels: 1 for NC, NCL, NCHW, NCDHW; -1 for NLC, NHWC; or any other.
    running_var : {"unbiased", "biased"}
        Variance that the layer tracks: with 1/(n - 1), as PyTorch, or with 1/n, as Keras and ONNX.
    activation : None, "relu", ("leaky_relu", slope) or ("clip", low, high)
        Activation of the output, applied in the same pass, after the residual of the call.
    nonfinite : {"propagate", "skip", "raise"}
        What a NaN or an infinity in a batch does to the running statistics. "propagate": they become NaN, as in
        PyTorch. "skip": those of its channel stay, and `num_batches_skipped` counts it; the output is as always.
        "raise": an error that names the channels, and nothing has changed.
    on_single : {"error", "running", "zero"}
        What a training call with one value per channel does. "error": it is refused, as in PyTorch. "running": the
        running statistics normalize. "zero": the normalized value is 0, so y is the bias, and dx is 0. In both nothing
        moves.
    ghost_batch_size : int or None
        Samples of a ghost batch: in training each slice of so many samples is normalized by itself [2]_. The last may
        be shorter; if it had one value per channel, it joins the one before. The running statistics move once, by the
        whole batch's.
    renorm : (r_max, d_max), function or None
        Batch renormalization in training [1]_: ``y = ((x - mean)/s_batch*r + d)*weight + bias``, with ``r =
        s_batch/s`` between 1/r_max and r_max and ``d = (mean - running_mean)/s`` between -d_max and d_max, where
        ``s_batch = sqrt(var + eps)`` and ``s = sqrt(running_var + eps)``, before they move. r and d are constants in
        backward. A function gets num_batches_tracked and returns the pair, to widen the bounds step by step.

    num_domains : int or None
        D, for D sets of running statistics: running_mean and running_var are (D, C), num_batches_tracked is (D,),
        and every call says by ``domain=`` which of them is meant. Weight and bias are shared.

    Attributes
    ----------
    use_batch_stats, update_running_stats, train_parameters : bool or None
        Switches; None lets the mode decide. Whether a call normalizes with the batch's statistics; whether it moves the
        running ones; and whether `backward` adds to `weight_grad` and `bias_grad` (True also lets a forward in
        evaluation mode remember its input for `backward`).
    num_batches_skipped : (C,) int64 ndarray or None
        Batches that left a channel's running statistics alone, with ``nonfinite="skip"``.
    weight, bias, weight_grad, bias_grad, running_mean, running_var : (C,) ndarray or None
        None if switched off. Any (C,) array may be assigned; the layer keeps one of its own dtype by reference.
    num_batches_tracked : 0-d int64 ndarray or None
        Number of training batches in the running statistics.
    training, frozen : bool
        The mode.

    Raises
    ------
    TypeError, ValueError
        If an argument has a wrong type or is out of range.

    Notes
    -----
    Many threads may use one layer: evaluation is exact, and the updates of a training call are atomic. `backward`
    belongs to the layer's last training forward, so threads that train need one layer each.

    References
    ----------
    .. [1] S. Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models", NIPS
       2017. There running deviations are averaged, here variances.
    .. [2] E. Hoffer, I. Hubara and D. Soudry, "Train longer, generalize better: closing the generalization gap in large
       batch training of neural networks", NIPS 2017, algorithm 1.

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

    _merges_gradients = False  # whether `backward` has the sums of all parts of a batch (cbn/sync.py)

    # ---- passes ----------------------------------------------------------------------------------------------------

    def forward(
        self,
        x: ArrayLike,
        *,
        out: Array | None = None,
        residual: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        lengths: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
        update_stats: bool | None = None,
        moments: Moments | None = None,
        mix: Number | None = None,
        domain: SupportsIndex | ArrayLike | None = None,
        x_scale: Number | None = None,
        x_zero_point: SupportsIndex | None = None,
        out_dtype: npt.DTypeLike | None = None,
    ) -> Array:
        """Normalize x in the current mode, add the residual, apply the activation.

        Parameters
        ----------
        x : array_like
            Input of a floating dtype, with a number of dimensions that the class accepts. In training mode the layer
            remembers it by reference for `backward`.
        out : ndarray, optional
            Receives y; has x's shape and y's dtype. ``out=x`` works in place.
        residual : array_like, optional
            Added to the normalized x; has x's shape and y's dtype. In training mode the layer remembers it like x.
        mask : bool array_like, optional
            True for the values that count: one for every value of all channels, with a shape that broadcasts to that of
            x without its channel axis, or else one that broadcasts to that of x. What does not count gets 0 in y and
            dx, and is read into nothing.
        lengths : (N,) array_like of int, optional
            How many values of each sample count, along the first axis after the samples'.
        sample_weight : (N,) array_like, optional
            How often each sample counts in the statistics: finite, not negative. n is the sum of the weights.
        update_stats : bool, optional
            Whether this call moves the running statistics; None lets the switch of the layer decide. False is for a
            second forward of the same batch, as under checkpointing.
        moments : Moments, optional
            Statistics that normalize in the place of the batch's, and that the running ones move by, where the call
            uses the batch's: x is read once. `backward` goes through them if they stand for this batch alone.
        mix : float in [0, 1], optional
            In evaluation, the weight of the batch's statistics in a mixture with the running ones, for test-time
            adaptation. Nothing is written.
        domain : int or (N,) array_like of int
            Which of the `num_domains` sets of running statistics is meant, for all samples or for each. The samples of
            a domain are normalized by themselves.
        x_scale, x_zero_point, out_dtype
            Quantization of uint8 or int8 input in evaluation mode, as in `cbn.functional.batch_norm`.

        Returns
        -------
        ndarray
            y, with x's shape, dtype (or `out_dtype`) and order in memory.

        Raises
        ------
        TypeError, ValueError
            As `cbn.functional.batch_norm`, and for another number of dimensions or channels. Neither the layer nor
            `out` has changed then.
        """
        of_bytes = x_scale is not None or x_zero_point is not None or out_dtype is not None
        counting = mask is not None or lengths is not None or sample_weight is not None
        special = counting or of_bytes or update_stats is not None or moments is not None or mix is not None
        special = special or domain is not None
        if self.training and self._usual and not special:
            y = self._train(x, out, residual)
            if y is not None:
                return y
        if self._num_features is None:
            given_options: dict[str, Any] = {
                "mask": mask,
                "lengths": lengths,
                "sample_weight": sample_weight,
                "mix": mix,
            }
            given_options |= {"update_stats": update_stats, "moments": moments, "domain": domain}
            return self._first(x, out=out, residual=residual, **given_options)
        inp, quantization = self._input(x, x_scale, x_zero_point, out_dtype)
        weights = masked.as_weights(inp, mask, lengths, sample_weight) if counting else None
        options = course.checked(update_stats, moments, mix, weights)
        given, (out, residual) = out, as_outputs(inp, out, residual)
        if domain is not None or self._num_domains is not None:
            y = domains.forward(self, inp, out, residual, options, quantization, domain)
            return y if given is None else given
        now = self._read(inp, residual, quantization, options)
        y, context, moved = course.normalize(inp, now, self._unbiased, out, quantization)
        if now.course.remembers or moved is not None:
            self._finish(context, out, now.running, moved, now.course.remembers)
        else:
            self._remember(AFTER_EVAL)
            if not now.course.batch_statistics and quantization is None and not mix and not self._has_plan(x):
                coef = steps.coefficients(context.mean, context.invstd, now.affine)
                plan = plans.Plan.of(inp, x, now.sources, now.values, coef, now.epilogue.act)
                self._keep(plan, now.version)
        return y if given is None else given

    def _first(self, x: ArrayLike, **options: Any) -> Array:
        """A forward of a layer that does not know its number of channels: it learns that if the forward succeeds."""
        with _LEARNING:
            if self._num_features is None:
                a = as_input(x, self._channel_axis, ranks=self._ranks)
                other = self.__copy__()
                other._learn(a.n_channels, *other._wanted)
                other._find_usual()
                y = other.forward(x, **options)
                self.__dict__.update(other.__dict__)
                return y
        return self.forward(x, **options)

    def _train(self, x: ArrayLike, out: Array | None, residual: ArrayLike | None) -> Array | None:
        """A forward with the statistics of the batch, compiled, for arguments as most calls have them; else None."""
        tracked = self.track_running_stats
        affine_c = self.weight, self.bias
        running = (self.running_mean, self.running_var, self.num_batches_tracked) if tracked else None
        act = self._act
        arrays_c = affine_c + (running or (None, None, None))
        n, wide = self._num_features or 0, self._dtype.itemsize == 8
        done = calls.train_layer(x, arrays_c, n, wide, self._eps, self._channel_axis, self._ranks, out, residual, act)
        if done is None:
            return None
        y, inp, weight, bias, mean, m2, invstd = done
        epilogue = steps.NO_EPILOGUE if residual is None and act == checks.NO_ACT else Epilogue(residual, act)
        context = Context(inp, Affine(weight, bias), epilogue, True, mean, invstd, m2, inp.count)
        # As `_finish`, without what this layer has not
        if digests.checking:
            digests.note(context)
        saved: str | Context = OVERWRITTEN if out is not None and context.is_overwritten_by(out) else context
        if running is None:
            self._remember(saved)
            return y
        to_mean, to_var, counter = running
        momentum = 0.0 if self._momentum is None and counter is None else self._momentum
        channels.move_running(
            to_mean, to_var, counter, mean, m2, inp.count, momentum, self._unbiased, None, self.__dict__, saved
        )
        return y

    def _input(
        self, x: ArrayLike, x_scale: Any, x_zero_point: Any, out_dtype: Any
    ) -> tuple[Input, Quantization | None]:
        """x for the passes, and the quantization of an 8-bit x."""
        quantization = None
        if x_scale is None and x_zero_point is None and out_dtype is None:
            inp = as_input(x, self._channel_axis, ranks=self._ranks)
        else:
            of_bytes = x_scale, x_zero_point, out_dtype
            inp, quantization = quantized.quantized(x, self.training, self._channel_axis, self._ranks, *of_bytes)
        inp.promote_for(self._dtype)
        return inp, quantization

    def _read(
        self, inp: Input, residual: Array | None, quantization: Quantization | None, options: Options
    ) -> Snapshot:
        """What a forward of this input reads of the layer, checked."""
        version = self._version  # before anything that a plan would stand for is read
        epilogue = Epilogue(residual, self._act)
        now = course.decide(self, inp, options, quantization is not None)
        sources = running_mean, running_var, _, _ = self.running_mean, self.running_var, self.weight, self.bias
        if not now.batch_statistics:
            checks.buffers_for_eval(running_mean, running_var)
        elif now.tracked:
            checks.buffers_for_batch(running_mean, running_var)
        self._check_channels(inp, running_mean, now.batch_statistics and not now.tracked)
        eps = checks.epsilon_for(self._eps, now.batch_statistics)
        values = self._doubles(sources)
        counter = self.num_batches_tracked
        if now.single and self.on_single == "error":
            checks.more_than_one_value(inp.x, inp.n_channels)
        if now.tracked:
            names = "running_mean", "running_var", "num_batches_tracked"
            channels.check_writable((running_mean, running_var, counter), names)
        renorm = None if self._renorm is None else course.renorm_of(self, now)
        size = self._ghost_batch_size if self.training and self._ghost_batch_size is not None else 0
        affine = Affine(values[2], values[3])
        return Snapshot(
            version, now, options, eps, affine, epilogue, sources, values, counter, self.nonfinite, renorm, size
        )

    def _finish(
        self,
        context: Context,
        out: Array | None,
        running: tuple[Any, Any, Any] | None,
        moved: course.Move | None,
        remembers: bool = True,
    ) -> None:
        """Keep the context for backward and move the running statistics, at one moment.

        running: mean, variance and counter as far as there are; `moved`: what they move by. None if they stay.
        """
        saved: str | Context = context if remembers else AFTER_EVAL
        if remembers and digests.checking:
            digests.note(context)
        if context.special.of_others and not self._merges_gradients:
            saved = course.OF_OTHERS if remembers else saved
        elif remembers and out is not None and context.is_overwritten_by(out):
            saved = OVERWRITTEN
        if running is None or moved is None:
            self._remember(saved)
            return
        momentum = 0.0 if self._momentum is None and running[2] is None else self._momentum
        mean, m2, count, unbiased = moved
        skipped = self.num_batches_skipped if self.nonfinite == "skip" else None
        channels.move_running(
            *running, mean, m2, count, momentum, unbiased, None, self.__dict__, saved, skipped=skipped
        )

    def _remember(self, saved: str | Context) -> None:
        """Keep the context for backward, without an assignment, which would drop the plan."""
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
            Shape of the inputs, batch included.
        dtype : float32, float64, float16 or bfloat16; with `x_scale` uint8 or int8
            Type of the inputs.
        x_scale, x_zero_point, out_dtype
            Quantization of 8-bit inputs, as in `cbn.functional.batch_norm`.

        Returns
        -------
        EvalPlan
            ``plan(x, out=y)`` returns bit for bit what the layer in evaluation mode would return now. The plan is a
            snapshot: later changes of the layer do not reach it. Any number of threads may call it at once.

        Raises
        ------
        TypeError, ValueError
            As a call with such an input in evaluation mode; and for a layer without running statistics.

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
        if self.use_batch_stats:
            raise ValueError("a plan normalizes with the running statistics, but use_batch_stats is True")
        example = arrays.with_room(np.empty, sizes, wanted)
        inp = as_input(example, self._channel_axis, ranks=self._ranks, y_dtype=y_dtype)
        inp.promote_for(self._dtype)
        self._check_channels(inp, self.running_mean, False)
        name, act = f"{type(self).__name__}({self._num_features})", self._act
        return EvalPlan(name, self._coefficients(), act, inp, self._channel_axis, self._ranks, quantization)

    def _check_channels(self, inp: Input, mean: Array | None, untracked: bool) -> None:
        """Refuse an input with another number of channels. PyTorch's message names the array that it compares first."""
        n = self.num_features
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

    def backward(self, dy: ArrayLike, *, out: Array | None = None) -> Array | Any:
        """Gradient with respect to the input of the last training forward.

        `backward` **adds** the gradients of weight and bias to `weight_grad` and `bias_grad`, unless these are None.

        Parameters
        ----------
        dy : array_like
            Gradient of y; has y's shape.
        out : ndarray, optional
            Receives dx; has x's shape and dtype. It may be dy or x.

        Returns
        -------
        ndarray, or tuple of two
            dx, with x's dtype and order in memory; after a forward with a residual (dx, dresidual).

        Raises
        ------
        RuntimeError
            Before any forward in training mode; after a forward in evaluation mode; if the forward overwrote its input;
            and if the input has changed since, with `cbn.set_check_inputs`.
        TypeError, ValueError
            If dy or `out` does not fit.
        """
        if isinstance(self._saved, str):
            raise RuntimeError(self._saved)
        context = self._saved
        inp = context.inp
        digests.compare(context)
        dy = as_gradient(inp, dy)
        given, out = out, checks.output(out, inp.x.shape, inp.x.dtype)
        renorm = context.special.renorm
        weight, bias = context.affine if renorm is None else renorm.affine
        trains = self.train_parameters is not False
        weight_grad = self.weight_grad if trains and weight is not None else None
        bias_grad = self.bias_grad if trains and bias is not None else None
        want_sums = weight_grad is not None or bias_grad is not None
        channels.check_writable((weight_grad, bias_grad), ("weight_grad", "bias_grad"))
        if out is not None and context.is_overwritten_by(out):
            self._remember(OVERWRITTEN)  # before the pass, since an exception in it may leave x half overwritten
        try:
            dx, dresidual, dweight, dbias = self._differentiate(dy, context, want_sums, out)
        except MemoryError:  # before the pass
            self._remember(context)
            raise
        channels.add((weight_grad, bias_grad), (dweight, dbias), ("weight_grad", "bias_grad"))
        dx = dx if given is None else given
        return dx if context.epilogue.residual is None else (dx, dresidual)

    @staticmethod
    def _differentiate(dy: Array, context: Context, want_sums: bool, out: Array | None) -> steps.Gradients:
        """`steps.backward`; a compiled call for arguments as most calls have them."""
        special = context.special
        if special is not PLAIN:
            if special.parts:
                return domains.backward(BatchNorm._differentiate, dy, context, want_sums, out)
            if special.ghost:
                return ghost.backward(dy, context, out)
        elif context.batch_statistics and context.epilogue is steps.NO_EPILOGUE:
            weight, mean, invstd = context.affine.weight, context.mean, context.invstd
            done = calls.layer_gradients(dy, context.inp, weight, mean, invstd, out)
            if done is not None:
                dx, dweight, dbias = done
                return steps.Gradients(dx, None, dweight, dbias)
        return steps.backward(dy, context, True, want_sums, out, special.merge)

    def _coefficients(self) -> Doubles:
        """(3, C): the current mean, scale and offset of evaluation."""
        self._expect_one_domain("a plan, or a folded weight,")
        checks.buffers_for_eval(self.running_mean, self.running_var)
        mean, var, weight, bias = self._doubles((self.running_mean, self.running_var, self.weight, self.bias))
        return passes.coefficients(mean, passes.inverse_std(var, self._eps), weight, bias)


plans.plans_stand_for(BatchNorm, "_ranks")

# What an evaluation depends on.
_EVALUATION = (
    *(
        "forward",
        "__call__",
        "__getattribute__",
        "__getattr__",
        "_coefficients",
        "eps",
        "activation",
        "use_batch_stats",
    ),
    *("weight", "bias", "running_mean", "running_var", "num_features", "channel_axis"),
)


def _definition(cls: type, name: str) -> Any:
    """The entry of a class under this name, descriptors included; None if it has none."""
    return next((vars(c)[name] for c in cls.__mro__ if name in vars(c)), None)


_OWN = {name: _definition(BatchNorm, name) for name in _EVALUATION}


def refuse_overrides(layer: BatchNorm, what: str) -> None:
    """Refuse a layer whose evaluation a subclass, a mixin, a patch or an attribute overrides."""
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
