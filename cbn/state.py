"""The state of a layer: arguments, arrays and modes, and how they are read, saved and copied."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, Literal, SupportsIndex, TypeVar

import numpy as np
import numpy.typing as npt

from . import checks, entries, storage
from .attributes import ChannelArray, Choice, Counter, Flag, StatisticsArray, Switch, accepted_dtype
from .checks import Activation, Array, Doubles, Number
from .kernels import channels, plans
from .memory import retried
from .steps import Context

Layer = TypeVar("Layer", bound="State")

SWITCHES = ("use_batch_stats", "update_running_stats", "train_parameters")
CONTROLS = storage.OPTIONAL
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # which have a row for each domain
NO_FORWARD = "there is nothing to go back through: call the layer in training mode first"


def shortest(value: float) -> str:
    """A number as the user wrote it; a float32, as ONNX and TensorFlow files hold, with the digits of float32."""
    if np.isinf(value):
        return f"float('{value}')"
    with np.errstate(over="ignore"):
        narrow = np.float32(value)
    return f"np.float32({narrow!s})" if float(f"{value:.9g}") != value == float(narrow) else repr(value)


def _flat(a: Array | None) -> Array | Any:
    """An array of one dimension or none, for the compiled reads and writes; its own memory."""
    return a if a is None or a.ndim < 2 else a.reshape(-1)


Renorm = tuple[float, float] | Callable[[int], tuple[float, float]] | None


class State(plans.Planned):
    """Base of the layers. `cbn.batchnorm.BatchNorm` documents arguments and attributes."""

    _ranks: tuple[int, ...] | None = None  # numbers of dimensions that the class accepts; None: 2 or more

    weight: ChannelArray = ChannelArray()
    bias: ChannelArray = ChannelArray()
    weight_grad: ChannelArray = ChannelArray()
    bias_grad: ChannelArray = ChannelArray()
    running_mean: StatisticsArray = StatisticsArray()
    running_var: StatisticsArray = StatisticsArray()
    num_batches_tracked: Counter = Counter()
    training: Flag = Flag()
    affine: Flag = Flag()
    track_running_stats: Flag = Flag()
    use_batch_stats: Switch = Switch()
    update_running_stats: Switch = Switch()
    train_parameters: Switch = Switch()
    nonfinite: Choice = Choice("propagate", "skip", "raise")
    on_single: Choice = Choice("error", "running", "zero")

    @retried
    def __init__(
        self,
        num_features: SupportsIndex | None,
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
        nonfinite: Literal["propagate", "skip", "raise"] = "propagate",
        on_single: Literal["error", "running", "zero"] = "error",
        ghost_batch_size: SupportsIndex | None = None,
        renorm: Renorm = None,
        num_domains: SupportsIndex | None = None,
    ) -> None:
        self.activation = activation
        if not isinstance(running_var, str) or running_var not in ("unbiased", "biased"):
            raise ValueError(f"running_var must be 'unbiased' or 'biased', not {running_var!r}")
        self._dtype = accepted_dtype(dtype, checks.native_float, "float32 or float64")
        self._num_features: int | None = None
        self._num_domains = None if num_domains is None else checks.integer(num_domains, "num_domains", "a number")
        if self._num_domains is not None and self._num_domains < 1:
            raise ValueError(f"num_domains must be 1 or more, but got {num_domains}")
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
        self._saved: str | Context = NO_FORWARD
        self.use_batch_stats = self.update_running_stats = self.train_parameters = None
        self.nonfinite, self.on_single, self.renorm = nonfinite, on_single, renorm
        self.ghost_batch_size = ghost_batch_size
        for name in self._array_names:
            setattr(self, name, None)
        self._skipped: npt.NDArray[np.int64] | None = None  # `num_batches_skipped`, once there are any
        wanted = affine, affine and bias, track_running_stats
        if num_features is None:
            self._wanted = wanted
        else:
            self._learn(checks.integer(num_features, "num_features", "a number of channels"), *wanted)
        self._find_usual()

    def _learn(self, num_features: int, weight: bool, bias: bool, running: bool) -> None:
        """Make the arrays of so many channels."""
        if num_features < 1:
            raise ValueError(f"num_features must be 1 or more, but got {num_features}")
        self._num_features = num_features
        shape, dtype = self._shape_of("weight"), self._dtype
        self.weight = np.ones(shape, dtype) if weight else None
        self.bias = np.zeros(shape, dtype) if bias else None
        self.weight_grad = np.zeros(shape, dtype) if weight else None
        self.bias_grad = np.zeros(shape, dtype) if bias else None
        shape = self._shape_of("running_mean")
        self.running_mean = np.zeros(shape, dtype) if running else None
        self.running_var = np.ones(shape, dtype) if running else None
        self.num_batches_tracked = np.zeros(shape[:-1], np.int64) if running else None

    def _shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of an array of the layer."""
        domains = () if self._num_domains is None or name not in STATISTICS else (self._num_domains,)
        return domains if name == "num_batches_tracked" else (*domains, self.num_features)

    def _expect_one_domain(self, what: str) -> None:
        """Refuse a layer with domains where one set of statistics is needed."""
        if self._num_domains is not None:
            raise ValueError(
                f"{what} needs one set of running statistics, and the layer has num_domains={self._num_domains}: "
                "copy a row of each into a layer without domains"
            )

    def _find_usual(self) -> None:
        """Note whether a training call is that of most layers, which `BatchNorm._train` compiles."""
        usual = CONTROLS | dict.fromkeys(SWITCHES)
        now = self.__dict__
        controls = all(now.get("_" + name) == value for name, value in usual.items())
        self._usual = controls and now.get("_num_features") is not None

    @property
    def num_features(self) -> int | Any:
        """Number of channels; None until the first call, if the layer was made so."""
        return self._num_features

    @property
    def num_domains(self) -> int | None:
        """Number of sets of running statistics; None: one, without an axis of its own."""
        return self._num_domains

    @property
    def num_batches_skipped(self) -> npt.NDArray[np.int64] | Any:
        """(C,): training batches that left a channel's running statistics alone, with ``nonfinite="skip"``."""
        if self._skipped is None and self.nonfinite == "skip" and self._num_features is not None:
            self.__dict__["_skipped"] = np.zeros(self._num_features, np.int64)
        return self._skipped

    @property
    def ghost_batch_size(self) -> int | None:
        """Samples of a slice that training normalizes by itself; None: the whole batch."""
        return self._ghost_batch_size

    @ghost_batch_size.setter
    def ghost_batch_size(self, value: SupportsIndex | None) -> None:
        size = None if value is None else checks.integer(value, "ghost_batch_size", "None or a number of samples")
        if size is not None and size < 1:
            raise ValueError(f"ghost_batch_size must be 1 or more, but got {size}")
        self._ghost_batch_size = size
        self._find_usual()

    @property
    def renorm(self) -> Renorm:
        """Batch renormalization: None, (r_max, d_max), or a function of num_batches_tracked that returns these."""
        return self._renorm

    @renorm.setter
    def renorm(self, value: Renorm) -> None:
        self._renorm: Renorm = value if callable(value) else checks.renorm(value)
        self._find_usual()

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of parameters and statistics."""
        return self._dtype

    @property
    def channel_axis(self) -> int:
        """The axis with the channels."""
        return self._channel_axis

    @property
    def eps(self) -> float:
        """Number added to the variance."""
        return self._eps

    @eps.setter
    def eps(self, value: Number) -> None:
        self._eps = checks.epsilon(value)

    @property
    def momentum(self) -> float | Any:
        """Weight of the new batch in the running statistics; None: a plain average."""
        return self._momentum

    @momentum.setter
    def momentum(self, value: Number | None) -> None:
        self._momentum = None if value is None else checks.momentum_fraction(value)

    @property
    def activation(self) -> Activation:
        """Activation after the normalization: None, "relu", ("leaky_relu", slope) or ("clip", low, high)."""
        return self._activation

    @activation.setter
    def activation(self, value: Activation) -> None:
        self._act = checks.activation(value)
        self._activation: Activation = value
        if isinstance(value, (tuple, list)):
            slope, low, high = self._act
            self._activation = ("clip", low, high) if value[0] == "clip" else ("leaky_relu", slope)

    # ---- modes -----------------------------------------------------------------------------------------------------

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
        """Whether the layer normalizes with its running statistics and keeps them, in both modes."""
        return self.use_batch_stats is False and self.update_running_stats is False

    def freeze(self: Layer) -> Layer:
        """Normalize with the running statistics and keep them, in training mode too; returns the layer.

        `train()` does not undo it. In training mode a frozen layer remembers its input, so gradients flow through it.
        It sets the switches ``use_batch_stats`` and ``update_running_stats`` to False.
        """
        checks.buffers_for_eval(self.running_mean, self.running_var)
        self.use_batch_stats = self.update_running_stats = False
        return self

    def unfreeze(self: Layer) -> Layer:
        """Undo `freeze`: let both switches follow the mode again; returns the layer."""
        self.use_batch_stats = self.update_running_stats = None
        return self

    # ---- parameters ------------------------------------------------------------------------------------------------

    @retried
    def _fill(self, **values: float) -> None:
        """Fill those of the arrays that are not None with numbers, in place; all or none."""
        arrays = {name: getattr(self, name) for name in values}
        new = [None if a is None else np.full(a.shape, values[name], a.dtype) for name, a in arrays.items()]
        channels.replace([_flat(a) for a in arrays.values()], [_flat(a) for a in new], list(arrays))

    def zero_grad(self) -> None:
        """Fill the gradients with zeros, in place."""
        self._fill(weight_grad=0, bias_grad=0)

    def reset_running_stats(self) -> None:
        """Set the running mean to 0, the variance to 1 and the counter to 0, in place."""
        self._fill(running_mean=0, running_var=1, num_batches_tracked=0)

    def reset_parameters(self) -> None:
        """Set the weight to 1 and the bias to 0, and reset the running statistics, in place."""
        self._fill(weight=1, bias=0, running_mean=0, running_var=1, num_batches_tracked=0)

    def parameters(self) -> Iterator[Array]:
        """Iterate over the weight and the bias, unless they are None."""
        return iter([a for a in (self.weight, self.bias) if a is not None])

    # ---- state dict ------------------------------------------------------------------------------------------------

    _state_names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    _array_names = (*_state_names, "weight_grad", "bias_grad")

    def state_dict(self) -> dict[str, Array]:
        """Return copies of all parameters and statistics that are not None, under PyTorch's names.

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
            State dict of cbn or PyTorch, with any floating dtype. Without num_batches_tracked the layer keeps its own.
        strict : bool
            Whether missing and unexpected entries are errors. Wrong shapes and values always are.
        prefix : str
            Start of the layer's keys in the state of a whole model, as "layer1.0.bn1.". Entries with another start are
            ignored.

        Returns
        -------
        (missing_keys, unexpected_keys) : tuple of lists
            The keys, with the prefix.

        Raises
        ------
        TypeError
            If `state` is no mapping or `prefix` no string.
        ValueError
            If an entry does not fit. One error lists all problems, and the layer has not changed.

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
        if self._num_features is None:
            return self._first_state(state, strict, prefix)
        own = {name: a for name in self._state_names if (a := getattr(self, name)) is not None}
        required = [name for name in own if name != "num_batches_tracked"]
        missing = [prefix + name for name in required if prefix + name not in state]
        keys = {prefix + name for name in own}
        within = [key for key in state if isinstance(key, str) and key.startswith(prefix)] if prefix else state
        unexpected = [key for key in within if key not in keys]
        problems = entries.differences(missing, unexpected) if strict else []
        new = {}
        for name, target in own.items():
            if prefix + name in state:
                try:
                    value = state[prefix + name]
                    new[name] = entries.entry(name, value, self._shape_of(name), target.dtype, prefix=prefix)
                except ValueError as error:
                    problems.append(str(error))
                if not target.flags.writeable:
                    problems.append(f"the layer's {name} is read-only")
        if problems:
            absent = strict and missing and len(missing) == len(required)
            hint = entries.hint(state, required, (self._num_features,)) if absent else ""
            raise checks.ArgumentError(
                f"cannot load the state into {type(self).__name__}({self._num_features}): {'; '.join(problems)}{hint}"
            )
        channels.replace([_flat(own[name]) for name in new], [_flat(a) for a in new.values()], list(new))
        return missing, unexpected

    def _first_state(self: State, state: Mapping[str, Any], strict: bool, prefix: str) -> tuple[list[str], list[str]]:
        """`load_state_dict` of a layer that does not know its number of channels: the state does."""
        other = self.__copy__()
        named = [(name, np.shape(state[key])) for name in self._state_names if (key := prefix + name) in state]
        channels = [shape[-1] for name, shape in named if shape and name != "num_batches_tracked"]
        if not channels:
            raise checks.ArgumentError(
                f"cannot load the state into {type(self).__name__}(None): num_features is not known, and the state "
                f"has no array of channels under {prefix + 'weight'!r} or {prefix + 'running_mean'!r}"
            )
        other._learn(int(channels[0]), *other._wanted)
        other._find_usual()
        found = other.load_state_dict(state, strict, prefix=prefix)
        self.__dict__.update(other.__dict__)
        return found

    def save(
        self,
        file: str | os.PathLike[str] | BinaryIO,
        *,
        allow_nonfinite: bool = False,
        allow_negative_var: bool = False,
    ) -> None:
        """Write class, arguments, arrays and mode to a file that `cbn.load` reads.

        Parameters
        ----------
        file : str, path-like or binary file object
            The name chooses the format: safetensors if it ends with .safetensors (which needs the package of that
            name), else numpy's .npz. `save` replaces a regular file as a whole or not at all, and keeps its mode and
            owner. A symbolic link stays a link; other hard links keep the old content. `save` writes to a pipe or a
            device. A file object need not be seekable; it is neither flushed nor closed.
        allow_nonfinite : bool
            Whether the file may contain NaN and infinities.
        allow_negative_var : bool
            Whether the file may contain running variances below zero whose sum with eps is positive. Rounding left such
            variances in some converted models, which evaluate all the same. `cbn.load` needs the same switch.

        Raises
        ------
        ValueError
            If an array is not finite, or a running variance negative.
        TypeError
            If `file` is neither a path nor a file object that takes bytes.
        OSError
            If the file cannot be written.
        ImportError
            If the safetensors package is missing and the format needs it.
        """
        if self._num_features is None:
            raise ValueError("num_features is not known before the first call, so there is nothing to save")
        storage.save(self, file, allow_nonfinite=allow_nonfinite, allow_negative_var=allow_negative_var)

    def _doubles(self, arrays: tuple[Array | None, ...]) -> tuple[Doubles | Any, ...]:
        """Float64 copies of (C,) arrays of the layer, all taken at one moment."""
        try:
            return channels.as_doubles(self.num_features, *arrays)
        except ValueError as error:
            raise self._unfit() or error from None

    def _snapshot(self, names: tuple[str, ...]) -> dict[str, Array]:
        """Copies of the arrays that are not None, all taken at one moment."""
        if error := self._unfit():
            raise error
        arrays = channels.copies(*[_flat(getattr(self, name)) for name in names])
        return {name: a.reshape(self._shape_of(name)) for name, a in zip(names, arrays, strict=True) if a is not None}

    def _unfit(self) -> ValueError | None:
        """The error for an array whose shape or dtype was assigned in place, unseen by the layer; None if all fit."""
        for name in self._array_names:
            a, shape = getattr(self, name), self._shape_of(name)
            expected = f"{shape} floats"
            if name == "num_batches_tracked":
                fits = a is None or (a.shape == shape and a.dtype.kind in "iu")
                expected = f"{shape} integers" if shape else "an integer"
            else:
                fits = a is None or (a.shape == shape and checks.native_input(a.dtype) is not None)
            if not fits:
                return ValueError(f"{name} has become an array of {a.dtype} of shape {a.shape}; expected {expected}")
        return None

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
        # Copies of the arrays too: pickle writes them later, and must not see half an update
        return attributes | {"_" + name: a for name, a in self._snapshot(self._array_names).items()}

    def __repr__(self) -> str:
        """PyTorch's repr, other arguments that are not at their default, and the calls that set the mode: Python can
        evaluate it. Then the arrays that are missing or additional.
        """
        has_bias = self.affine and (self._wanted[1] if self._num_features is None else self.bias is not None)
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
            word, *numbers = self._activation
            arguments["activation"] = f"({word!r}, {', '.join(shortest(float(number)) for number in numbers)})"
        for name in ("nonfinite", "on_single"):
            if (chosen := getattr(self, name)) != CONTROLS[name]:
                arguments[name] = repr(chosen)
        for name in ("ghost_batch_size", "renorm", "num_domains"):
            if (value := getattr(self, name)) is not None:
                arguments[name] = repr(value)
        given = ", ".join([str(self._num_features), *(f"{name}={value}" for name, value in arguments.items())])
        mode = ".freeze()" * self.frozen + ".eval()" * (not self.training)
        switches = {name: getattr(self, name) for name in SWITCHES}
        set_to = ", ".join(f"{name}={on}" for name, on in switches.items() if on is not None)
        if self.frozen and self.train_parameters is None:
            set_to = ""
        expected = {"weight": self.affine, "bias": has_bias}
        expected |= {name + "_grad": getattr(self, name) is not None for name in expected}
        expected |= dict.fromkeys(("running_mean", "running_var", "num_batches_tracked"), self.track_running_stats)
        there = {name: getattr(self, name) is not None for name in expected}
        without = ", ".join(name for name in expected if expected[name] and not there[name])
        added = ", ".join(name for name in expected if there[name] and not expected[name] and "_grad" not in name)
        return (
            f"{type(self).__name__}({given}){mode}"
            + (f" with {set_to}" if set_to else "")
            + (f" without {without}" if without else "")
            + (f" with {added}" if added else "")
        )
