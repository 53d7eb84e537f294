"""RunningMoments: the statistics of a stream, moved in place by one compiled step for each of its parts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, BinaryIO, SupportsIndex

import numpy as np
import numpy.typing as npt

from . import checks, entries, storage
from .checks import Array, ArrayLike, Doubles, Number
from .inputs import as_measured, as_weights
from .kernels import arrays, channels
from .kernels import running as compiled
from .memory import retried
from .moments import Moments, measure
from .scaling import Clip, ZeroVar, options, standardize_running

__all__ = ["RunningMoments"]

NAMES = ("count", "mean", "m2", "mean_low", "min", "max")  # rows of the state, as kernels/running.pyx knows them


class RunningMoments:
    """Count, mean and sum of squared distances of all values so far, for each feature of an observation.

    Parameters
    ----------
    shape : int or tuple of ints
        Shape of one observation. All leading axes of what comes in are reduced. Or, with `channel_axis`, the number of
        channels.
    channel_axis : int, optional
        The axis of the features in what comes in, for arrays with other axes behind it, such as images.
    skipna : bool
        Whether NaN are missing values, each for its feature.
    extrema : bool
        Whether to keep the smallest and the largest value of every feature.
    prior : (mean, var, count), optional
        Start as if `count` values with this mean and (biased) variance had been seen. They broadcast to `shape`.

    Attributes
    ----------
    count, mean : float64 ndarray
        Number of values (or sum of their weights) and mean of every feature, arrays of `shape`. They are copies, as all
        that is read.
    min, max : float64 ndarray or None
        Smallest and largest values; infinity and -infinity before there is one. None without `extrema`.

    See Also
    --------
    moments : the same for one array.
    Moments : what `moments` and the method of that name return.

    Notes
    -----
    ``running.update(x)`` is ``running.merge(cbn.moments(x))``, in one compiled step. Values are measured first. The
    merge that follows is one step for all other threads, signal handlers and exceptions: they see all of an update or
    nothing of it. What an update gives has the same bits with any number of threads.

    Examples
    --------
    >>> import numpy as np
    >>> import cbn
    >>> running = cbn.RunningMoments(2)
    >>> for x in ([[0.0, 1.0], [4.0, 1.0]], [[8.0, 4.0]]):
    ...     _ = running.update(np.array(x))
    >>> running.count, running.mean, running.var()
    (array([3., 3.]), array([4., 2.]), array([10.66666667,  2.        ]))
    """

    @retried
    def __init__(
        self,
        shape: SupportsIndex | tuple[SupportsIndex, ...],
        *,
        channel_axis: SupportsIndex | None = None,
        skipna: bool = False,
        extrema: bool = False,
        prior: tuple[ArrayLike | Number, ArrayLike | Number, ArrayLike | Number] | None = None,
    ) -> None:
        self._shape = _shape(shape)
        self._channel_axis: int | None = None
        if channel_axis is not None:
            if len(self._shape) != 1:
                raise ValueError(f"with channel_axis, shape must be a number of channels, not {self._shape}")
            self._channel_axis = checks.integer(channel_axis, "channel_axis", "an integer or None")
        self._skipna = checks.boolean(skipna, "skipna")
        self._extrema = checks.boolean(extrema, "extrema")
        self._prior = None if prior is None else _prior(prior, self._shape)
        self._state = self._first_state()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one observation."""
        return self._shape

    @property
    def channel_axis(self) -> int | None:
        """The axis of the features, or None for the last ones."""
        return self._channel_axis

    @property
    def skipna(self) -> bool:
        """Whether NaN are missing values."""
        return self._skipna

    @property
    def extrema(self) -> bool:
        """Whether smallest and largest values are kept."""
        return self._extrema

    @property
    def count(self) -> npt.NDArray[np.float64]:
        """Number of values, or sum of their weights."""
        return self._row(0)

    @property
    def mean(self) -> npt.NDArray[np.float64]:
        """Mean of all values."""
        return self._row(1)

    @property
    def min(self) -> npt.NDArray[np.float64] | Any:
        """Smallest values, or None."""
        return self._row(4) if self._extrema else None

    @property
    def max(self) -> npt.NDArray[np.float64] | Any:
        """Largest values, or None."""
        return self._row(5) if self._extrema else None

    def var(self, correction: Number = 0) -> npt.NDArray[np.float64]:
        """Variance ``m2 / (count - correction)``: biased with 0, unbiased with 1; NaN if count is too small."""
        count, _, m2 = self._rows()[:3]
        number = checks.number(correction, "correction", "a number")
        return compiled.variance(count, m2, number).reshape(self._shape)

    def std(self, correction: Number = 0) -> npt.NDArray[np.float64]:
        """Square root of the variance."""
        return np.sqrt(self.var(correction))

    def moments(self) -> Moments:
        """A snapshot as `Moments`, whose channels are the features in C order."""
        rows = self._rows()
        return Moments._of(*rows) if self._extrema else Moments._of(*rows[:4])

    def update(
        self, x: ArrayLike, *, mask: ArrayLike | None = None, weights: ArrayLike | None = None
    ) -> RunningMoments:
        """Take in more values, all or none.

        Parameters
        ----------
        x : array_like
            Observations, of shape ``(..., *shape)``: any number of leading axes, also none. With `channel_axis`, an
            array whose axis of that number has `shape` features. float32, float64, float16 or bfloat16, or bool, int8,
            uint8, int16, uint16 or int32. It may be empty.
        mask : bool array_like, optional
            True for the values that count, with the shape of the leading axes of x, for all features, or one that
            broadcasts to that of x.
        weights : (N,) array_like, optional
            Weights along the first axis, finite and not negative.

        Returns
        -------
        RunningMoments
            The object itself.

        Raises
        ------
        TypeError, ValueError
            For another dtype or shape, and as `cbn.moments` says. Nothing has changed then.
        """
        if mask is None and weights is None and self._channel_axis is None:
            if compiled.update(self._state, x, self._shape, self._skipna, self._extrema):
                return self
        self._merge(arrays.with_room(self._measured, x, mask, weights))
        return self

    def _measured(self, x: ArrayLike, mask: ArrayLike | None, weights: ArrayLike | None) -> Moments:
        if self._channel_axis is not None:
            inp = as_measured(x, self._channel_axis)
            if (inp.n_channels,) != self._shape:
                raise ValueError(
                    f"input has shape {inp.x.shape}; expected {self._shape[0]} features along axis {self._channel_axis}"
                )
            return measure(inp, as_weights(inp, mask, weights), self._skipna, self._extrema)
        a = checks.measured_array(x, "input")
        n_leading = a.ndim - len(self._shape)
        if n_leading < 0 or a.shape[n_leading:] != self._shape:
            expected = ", ".join(["...", *map(str, self._shape)])
            raise ValueError(f"input has shape {a.shape}; expected ({expected}), observations of shape {self._shape}")
        leading = a.shape[:n_leading] or (1,)
        features = (*leading, self._state.shape[1])
        if mask is not None:
            mask = checks.array(mask, "mask")
            if mask.shape == a.shape[:n_leading]:
                mask = mask.reshape(leading)
            elif _broadcasts(mask, a.shape):  # of single values
                mask = np.broadcast_to(mask, a.shape).reshape(features)
        inp = as_measured(a.reshape(features), -1)
        return measure(inp, as_weights(inp, mask, weights), self._skipna, self._extrema)

    def standardize(
        self,
        x: ArrayLike,
        *,
        eps: Number = 1e-8,
        clip: Clip = None,
        center: bool = True,
        zero_var: ZeroVar = "eps",
        out: Array | None = None,
        dtype: npt.DTypeLike | None = None,
    ) -> Array:
        """Standardize observations with the mean and the biased variance of all values so far.

        Parameters
        ----------
        x : array_like
            Observations, as for `update`.
        eps, clip, center, zero_var, out, dtype
            As for `cbn.standardize`.

        Returns
        -------
        ndarray
            The result with x's shape; `out` if given. A feature of which nothing has been seen is NaN.

        Raises
        ------
        TypeError, ValueError
            As `cbn.standardize`.

        Examples
        --------
        >>> import numpy as np
        >>> import cbn
        >>> running = cbn.RunningMoments(1).update(np.array([[0.0], [2.0]]))
        >>> running.standardize(np.array([[5.0], [1.0]]), clip=3)
        array([[3.],
               [0.]])
        """
        if len(self._shape) == 1 and (dtype is None or (isinstance(x, np.ndarray) and x.dtype == dtype)):
            axis = -1 if self._channel_axis is None else self._channel_axis
            y = compiled.standardize_running(self._state, x, axis, out, eps, zero_var, clip, center)
            if y is not None:
                return y
        how = options(eps, False, zero_var, clip, center)
        return standardize_running(self._state, x, self._shape, self._channel_axis, how, out, dtype)

    def merge(self, other: RunningMoments | Moments) -> RunningMoments:
        """Take in what another object has seen, and return this one.

        Parameters
        ----------
        other : RunningMoments or Moments
            Of as many features; with extremes, if this object keeps them.

        Raises
        ------
        TypeError, ValueError
            For anything else. Nothing has changed then.
        """
        if isinstance(other, RunningMoments):
            if other._shape != self._shape:
                raise ValueError(f"moments of shapes {self._shape} and {other._shape} cannot be merged")
            other = other.moments()
        elif not isinstance(other, Moments):
            raise TypeError(f"expected RunningMoments or Moments, not {type(other).__name__}")
        elif other.mean.size != self._state.shape[1]:
            raise ValueError(f"moments of {self._state.shape[1]} and of {other.mean.size} features cannot be merged")
        if self._extrema and other.min is None:
            raise ValueError("the other moments have no min and max, which this object keeps (extrema=True)")
        self._merge(other)
        return self

    def _merge(self, other: Moments) -> None:
        rows = [*other._rows]
        rows += [other.min, other.max] if self._extrema else [other.mean, other.mean]
        compiled.merge(self._state, np.array(rows), self._extrema)

    def reset(self) -> None:
        """Start again: from `prior`, if there is one."""
        self._replace(self._first_state())

    # ---- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, npt.NDArray[np.float64]]:
        """Copies of count, mean and m2, and with `extrema` of min and max, as arrays of `shape`.

        mean_low is what float64 does not hold of the mean.
        """
        rows = self._rows()
        return {name: rows[i].reshape(self._shape) for i, name in enumerate(self._names)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a `state_dict`, all of it or nothing.

        Raises
        ------
        TypeError
            If `state` is no mapping.
        ValueError
            If an entry but mean_low is missing, or one is unknown, of another shape or not finite, or if a count or m2
            is negative. One error lists all problems, and nothing has changed.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a mapping of names to arrays, not {type(state).__name__}")
        missing = [name for name in self._names if name not in state and name != "mean_low"]
        unexpected = [name for name in state if name not in self._names]
        problems = entries.differences(missing, unexpected)
        new = self._first_state()
        for i, name in enumerate(self._names):
            if name in state:
                try:
                    new[i] = _entry(name, state[name], self._shape, False).reshape(-1)
                except ValueError as error:
                    problems.append(str(error))
        if problems:
            raise checks.ArgumentError(f"cannot load the state into {self!r}: {'; '.join(problems)}")
        self._replace(new)

    def save(self, file: str | os.PathLike[str] | BinaryIO, *, allow_nonfinite: bool = False) -> None:
        """Write arguments and state to a file that `cbn.load` reads; see `BatchNorm.save`.

        A mean or m2 that is not finite is an error without `allow_nonfinite`.
        """
        rows = self._rows()
        content = {name: rows[i].reshape(self._shape) for i, name in enumerate(self._names)}
        header = {
            "class": "RunningMoments",
            "arguments": {
                "shape": list(self._shape),
                "channel_axis": self._channel_axis,
                "skipna": self._skipna,
                "extrema": self._extrema,
                "prior": None if self._prior is None else [row.tolist() for row in self._prior],
            },
        }
        storage.save_content(file, header, content, allow_nonfinite)

    @property
    def _names(self) -> tuple[str, ...]:
        return NAMES if self._extrema else NAMES[:4]

    def _first_state(self) -> Doubles:
        size = int(np.prod(self._shape))
        state = np.zeros((6, size))
        state[4], state[5] = np.inf, -np.inf
        if self._prior is not None:
            mean, var, count = self._prior
            state[0], state[1], state[2] = count.ravel(), mean.ravel(), (var * count).ravel()
        return state

    def _row(self, i: int) -> Doubles:
        """A copy of a row, as an array of `shape`."""
        row: Doubles = self._rows()[i]
        return row.reshape(self._shape)

    def _rows(self) -> Doubles:
        """A copy of the state, as it is at one moment."""
        flat: Doubles = channels.copies(self._state.reshape(-1))[0]
        return flat.reshape(self._state.shape)

    def _replace(self, state: Doubles) -> None:
        channels.replace([self._state.reshape(-1)], [state.reshape(-1)], ["state"])

    def __copy__(self) -> RunningMoments:
        return self.__deepcopy__({})

    def __deepcopy__(self, memo: dict[int, Any]) -> RunningMoments:
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__getstate__())
        return other

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_state": self._rows()}

    def __repr__(self) -> str:
        shape = self._shape[0] if len(self._shape) == 1 else self._shape
        arguments = [str(shape)]
        if self._channel_axis is not None:
            arguments.append(f"channel_axis={self._channel_axis}")
        arguments += [f"{name}=True" for name in ("skipna", "extrema") if getattr(self, name)]
        if self._prior is not None:
            arguments.append(f"prior=({', '.join(_short(row) for row in self._prior)})")
        return f"{type(self).__name__}({', '.join(arguments)})"


def _short(a: Doubles) -> str:
    """A prior's part as its user may have written it."""
    if a.size and np.all(a == a.flat[0]):
        return f"{float(a.flat[0])!r}"
    return np.array2string(a, threshold=4, separator=", ")


def _broadcasts(a: npt.NDArray[Any], shape: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(a.shape, shape) == shape
    except ValueError:
        return False


def _shape(shape: Any) -> tuple[int, ...]:
    if isinstance(shape, (tuple, list)):
        found = checks.shape(shape)
    else:
        found = (checks.integer(shape, "shape", "an integer or a tuple of integers"),)
    if any(size < 1 for size in found):
        raise ValueError(f"shape must have sizes of 1 or more, but got {shape}")
    return found


def _prior(prior: Any, shape: tuple[int, ...]) -> tuple[Doubles, Doubles, Doubles]:
    """(mean, var, count) of `shape`, checked."""
    if not isinstance(prior, (tuple, list)) or len(prior) != 3:
        raise TypeError(f"prior must be (mean, var, count), not {prior!r}")
    found = []
    for name, value in zip(("mean", "var", "count"), prior, strict=True):
        a = checks.doubles(value, f"prior's {name}")
        if not _broadcasts(a, shape):
            raise ValueError(f"prior's {name} has shape {a.shape}, which does not broadcast to {shape}")
        if not np.all(np.isfinite(a)) or (name != "mean" and np.any(a < 0)):
            raise ValueError(f"prior's {name} must be finite{'' if name == 'mean' else ' and not negative'}")
        found.append(np.array(np.broadcast_to(a, shape)))
    return found[0], found[1], found[2]


def _entry(name: str, value: Any, shape: tuple[int, ...], allow_nonfinite: bool) -> Doubles:
    """One entry of a state, checked. Extremes are infinite where nothing has been seen."""
    extreme = name in ("min", "max")
    a = entries.entry(name, value, shape, np.dtype(np.float64), allow_nonfinite=allow_nonfinite or extreme)
    if name in ("count", "m2") and np.any(a < 0):
        raise ValueError(f"{name} is negative")
    return a


def _build(arguments: Any, content: storage.Arrays, allow_nonfinite: bool) -> RunningMoments:
    """An object from the header and the arrays of a file."""
    storage.expect_keys("arguments", arguments, ("shape", "channel_axis", "skipna", "extrema", "prior"))
    prior = arguments["prior"]
    running = RunningMoments(**{**arguments, "prior": None if prior is None else tuple(prior)})
    content.expect({name: (running.shape, "float64") for name in running._names})
    state = running._first_state()
    for name, a in content.read():
        state[NAMES.index(name)] = _entry(name, a, running.shape, allow_nonfinite).reshape(-1)
    running._replace(state)
    return running


storage.BUILDERS["RunningMoments"] = _build
