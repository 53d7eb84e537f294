"""The running statistics of a layer as Moments: read, set, and compared with a batch.

Running statistics have no count, so they cannot be merged. Moments can: `running_moments` says for how many values the
statistics stand, and `set_running_moments` takes the result of a merge.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np

from . import checks, diagnostics
from .checks import Array, ArrayLike, Number
from .inputs import Input, as_input
from .kernels import channels
from .memory import retried
from .moments import Moments
from .state import State

Layer = TypeVar("Layer", bound="Population")

# Methods through which `BatchNorm.forward` reads the layer and changes it. `cbn.recalibrate` hides them, while it
# records, by attributes of the instance. Every way to call the layer is recorded then (the layer, its forward, a bound
# method that was taken before), calls otherwise cost nothing, and an attribute also keeps a plan from answering.
HOOKS = frozenset(("_train", "_read", "_finish"))


class Population(State):
    """Base of the layers between their state and their passes."""

    @retried
    def running_moments(self, count: ArrayLike | Number) -> Moments:
        """The running statistics as Moments of `count` values, which merge with those of other layers.

        Parameters
        ----------
        count : number or (C,) array_like
            Number of values per channel for which the statistics stand: more than 0, or more than 1 if the layer
            tracks the unbiased variance.

        Returns
        -------
        Moments
            In float64, with ``mean = running_mean`` and the m2 that gives ``running_var`` back::

                m2 = running_var*(count - 1)    # running_var="unbiased"
                m2 = running_var*count          # running_var="biased"

        Raises
        ------
        TypeError, ValueError
            If `count` is no number, has another shape, is too small or not finite; if the layer has no running
            statistics, or if one is not finite or a variance negative.

        See Also
        --------
        set_running_moments : the way back.

        Examples
        --------
        Two clients have trained with data of one variance and of different means. An average of their variances would
        be 1. The variance of all data has a term for the distance between the clients as well:

        >>> import numpy as np
        >>> import cbn
        >>> clients = [cbn.BatchNorm1d(1, running_var="biased") for _ in range(2)]
        >>> clients[0].running_mean[:], clients[1].running_mean[:] = 0, 4
        >>> total = cbn.Moments.merge([client.running_moments(n) for client, n in zip(clients, [300, 100])])
        >>> total.mean, total.var()  # 1 + 4**2 * 300*100/400**2
        (array([1.]), array([4.]))
        >>> server = cbn.BatchNorm1d(1, running_var="biased")
        >>> server.set_running_moments(total)
        >>> server.running_mean, server.running_var
        (array([1.], dtype=float32), array([4.], dtype=float32))
        """
        self._expect_statistics()
        least = self._correction
        n = checks.doubles(count, "count")
        if n.shape not in ((), (self._num_features,)):
            raise ValueError(f"count has shape {n.shape}; expected ({self._num_features},) or one number")
        if not np.all((n > least) & np.isfinite(n)):
            wrong = np.ravel(n)[~((n > least) & np.isfinite(n)).ravel()][0]
            raise ValueError(f"count must be finite and more than {least}{self._reason()}, but got {wrong:g}")
        mean, var = self._doubles((self.running_mean, self.running_var))
        for name, values in (("running_mean", mean), ("running_var", var)):
            if (bad := np.flatnonzero(~np.isfinite(values))).size:
                raise ValueError(f"{name} is not finite in {checks.channel_list(bad)}")
        if (bad := np.flatnonzero(var < 0)).size:
            raise ValueError(f"running_var is negative in {checks.channel_list(bad)}")
        return Moments(n, mean, var * (n - least))

    @retried
    def set_running_moments(self, m: Moments) -> None:
        """Set the running statistics to those of `m`, in place, both or none. The counter stays.

        Parameters
        ----------
        m : Moments
            Of C channels. Their mean becomes the running mean, and their variance, as the layer tracks it, the running
            variance: ``m2/(count - 1)`` if unbiased, ``m2/count`` if biased.

        Raises
        ------
        TypeError
            If `m` are no Moments.
        ValueError
            For another number of channels, for a count that is too small for the variance, for statistics that are not
            finite (in float32, if that is the layer's dtype), and for a layer without running statistics or with
            read-only ones. Nothing has changed then.

        See Also
        --------
        running_moments : the running statistics as Moments, with an example.
        recalibrate : the statistics of all inputs of a data set.
        """
        self._expect_statistics()
        new = self._statistics_of(m)
        channels.replace((self.running_mean, self.running_var), new, ("running_mean", "running_var"))

    def check(self, x: ArrayLike | None = None) -> diagnostics.Report:
        """Look for channels that are dead, not finite or far from a batch; nothing changes.

        Parameters
        ----------
        x : array_like, optional
            A batch as the layer's input, to compare its statistics with the running ones.

        Returns
        -------
        cbn.diagnostics.Report
            ``print(report)`` shows what was found, ``report.ok`` is True if that is nothing, attributes have the
            channels, and ``report.plot("check.png")`` draws them.

        Raises
        ------
        TypeError, ValueError
            For an input that the layer would refuse.

        Examples
        --------
        >>> import numpy as np
        >>> import cbn
        >>> bn = cbn.BatchNorm1d(3)
        >>> bn.check().ok
        True
        >>> bn.weight[1] = 0
        >>> bn.running_var[2] = np.nan
        >>> print(bn.check())
        BatchNorm1d(3): 2 findings
          the output is constant: channel 1
          running_var is not finite: channel 2
        """
        self._expect_one_domain("a check")
        inp = None if x is None else self._measurable(x)
        names = [name for name in self._array_names if name != "num_batches_tracked"]
        name = f"{type(self).__name__}({self._num_features})"
        return diagnostics.examine(
            name, self.num_features, self._eps, self._unbiased, self._snapshot(tuple(names)), inp
        )

    def __copy__(self: Layer) -> Layer:
        """A copy of the layer that records nothing."""
        other = super().__copy__()
        for name in HOOKS:
            vars(other).pop(name, None)
        return other

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name not in HOOKS}

    # ---- what they share -------------------------------------------------------------------------------------------

    @property
    def _correction(self) -> int:
        """What the layer's variance subtracts from a count."""
        return int(self._unbiased)

    def _reason(self) -> str:
        """Why a count of one is too small; nothing if it is not."""
        return ", because the layer tracks the unbiased variance m2/(count - 1)" if self._unbiased else ""

    def _expect_statistics(self) -> None:
        """Refuse a layer without running statistics or with several sets of them, or with an array resized in place."""
        self._expect_one_domain("this")
        missing = [name for name in ("running_mean", "running_var") if getattr(self, name) is None]
        if missing:
            raise ValueError(f"{type(self).__name__}({self._num_features}) has no {' and no '.join(missing)}")
        if error := self._unfit():
            raise error

    def _statistics_of(self, m: Moments) -> tuple[Array, Array]:
        """New running mean and variance, checked, of the dtypes of the present ones."""
        if not isinstance(m, Moments):
            advice = "; its moments() are" if callable(getattr(m, "moments", None)) else ""
            raise TypeError(f"expected Moments, not {type(m).__name__}{advice}")
        if m.mean.shape != (self._num_features,):
            raise ValueError(f"the moments have {m.mean.size} channels; expected {self._num_features}")
        least = self._correction
        wrong = np.flatnonzero(~((m.count > least) & np.isfinite(m.count)))
        if wrong.size:
            words = f"count must be finite and more than {least}{self._reason()}, but is {m.count[wrong[0]]:g}"
            raise ValueError(f"{words} in {checks.channel_list(wrong)}")
        new = []
        for name, values in (("mean", m.mean), ("variance", m.var(least))):
            if (bad := np.flatnonzero(~np.isfinite(values))).size:
                raise ValueError(f"the {name} of the moments is not finite in {checks.channel_list(bad)}")
            new.append(channels.rounded(values, self._dtype))
            if (bad := np.flatnonzero(~np.isfinite(new[-1]))).size:
                words = f"the {name} of the moments, {values[bad[0]]:g} in {checks.channel_list(bad)}"
                raise ValueError(f"{words}, is beyond the range of {self._dtype}")
        return new[0], new[1]

    def _measurable(self, x: ArrayLike) -> Input:
        """x as an input that the passes can measure, or the error of a call with it."""
        inp = as_input(x, self._channel_axis, ranks=self._ranks)
        if inp.n_channels != self._num_features:
            words = f"input of shape {inp.x.shape} has {inp.n_channels} channels along axis {inp.axis}"
            hint = checks.other_axis(inp.x, self.num_features)
            raise checks.ArgumentError(f"{words}; expected {self._num_features}{hint}")
        return inp
