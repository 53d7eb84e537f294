"""StandardScaler: scikit-learn's, with cbn's passes for dense arrays and scikit-learn's own methods for all else."""

from __future__ import annotations

from typing import Any

import numpy as np

from .checks import Array, Doubles
from .inputs import as_input, as_outputs
from .moments import Moments, moments
from .steps import NO_EPILOGUE, forward_fixed

try:
    import sklearn.preprocessing
    from sklearn import get_config
    from sklearn.base import _fit_context
    from sklearn.preprocessing._data import _handle_zeros_in_scale, _is_constant_feature
    from sklearn.utils import check_array
    from sklearn.utils.validation import FLOAT_DTYPES, _check_sample_weight, check_is_fitted, validate_data
except ImportError as error:
    raise ImportError('cbn.sklearn needs scikit-learn 1.6 or newer: pip install "cbn[sklearn]"') from error

__all__ = ["StandardScaler"]


class StandardScaler(sklearn.preprocessing.StandardScaler):  # type: ignore[misc]
    """`sklearn.preprocessing.StandardScaler` on all threads, a subclass with the same parameters and attributes.

    Dense data that scikit-learn's checks leave or make float32 or float64 is measured in one read by `cbn.moments`, and
    scaled in one more read and one write. For everything else scikit-learn's own method runs: sparse data, float16,
    other array libraries, negative weights, callbacks, and whatever it refuses, with its errors.

    Parameters
    ----------
    copy : bool
        Whether `transform` and `inverse_transform` leave their input as it is; if not, they work in place if they can.
    with_mean : bool
        Whether to subtract the mean.
    with_std : bool
        Whether to divide by the standard deviation.

    Attributes
    ----------
    mean_, var_, scale_ : (n_features,) float64 ndarray or None
        Mean, biased variance, and what the data is divided by: the standard deviation, or 1 for a feature that is
        constant but for rounding.
    n_samples_seen_ : int, float or (n_features,) ndarray
        Number of values, or sum of their weights; an array if features differ, as they do with NaN.
    n_features_in_ : int
        Number of features.
    feature_names_in_ : (n_features,) ndarray
        Names of the features, if all are strings.

    See Also
    --------
    cbn.moments, cbn.standardize : the same work for arrays with any axes and types.

    Notes
    -----
    ``y = (x - mean_)*(1/scale_)``. The statistics are float64 for both types, and the kernels subtract the float64 mean
    before they round. scikit-learn 1.8 and later round the mean to x's type first, which costs float32 data digits
    where the mean is large beside the standard deviation.

    Values differ from scikit-learn's by rounding, except in three cases. A batch in which a feature has only NaN leaves
    that feature's statistics unchanged; in scikit-learn they stay NaN from then on. A `partial_fit` without weights
    keeps the fractional part of an earlier sum of weights, which scikit-learn cuts off. Where an all-NaN feature or an
    overflow makes scikit-learn warn, no warning comes.

    Examples
    --------
    >>> import numpy as np
    >>> from cbn.sklearn import StandardScaler
    >>> scaler = StandardScaler().fit(np.array([[0.0, 2.0], [0.0, 2.0], [2.0, 2.0], [2.0, np.nan]]))
    >>> scaler.mean_, scaler.scale_
    (array([1., 2.]), array([1., 1.]))
    >>> scaler.transform(np.array([[4.0, np.nan]], dtype=np.float32))
    array([[ 3., nan]], dtype=float32)
    """

    mean_: Any
    var_: Any
    scale_: Any
    n_samples_seen_: Any

    @_fit_context(prefer_skip_nested_validation=True)  # type: ignore[untyped-decorator]
    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """Add a batch to the statistics.

        Parameters
        ----------
        X : (n_samples, n_features) array_like or sparse matrix
            The batch.
        y : None
            Ignored.
        sample_weight : (n_samples,) array_like or float, optional
            Weights of the samples.

        Returns
        -------
        StandardScaler
            The object itself.

        Raises
        ------
        TypeError, ValueError
            As scikit-learn's method, for the same input.
        """
        batch = _measured(X, sample_weight) if self._is_measured_here() else None
        if batch is None:
            return super().partial_fit(X, y, sample_weight)
        first = not hasattr(self, "n_samples_seen_")
        validate_data(self, X, reset=first, skip_check_array=True)
        total = batch if first else self._seen() + batch
        some = total.count > 0
        self.mean_ = np.where(some, total.mean, np.nan)
        self.n_samples_seen_ = _samples(total.count, sample_weight is not None)
        self.var_ = total.var() if self.with_std else None
        self.scale_ = None
        if self.with_std:
            constant = _is_constant_feature(self.var_, self.mean_, self.n_samples_seen_)
            self.scale_ = _handle_zeros_in_scale(np.sqrt(self.var_), copy=False, constant_mask=constant)
        return self

    def transform(self, X: Any, copy: bool | None = None) -> Any:
        """Subtract the mean and divide by the scale.

        Parameters
        ----------
        X : (n_samples, n_features) array_like or sparse matrix
            What to scale.
        copy : bool, optional
            In place of the parameter of that name.

        Returns
        -------
        (n_samples, n_features) ndarray or sparse matrix
            The result with X's type, float64 for an X that is not floating.

        Raises
        ------
        TypeError, ValueError
            As scikit-learn's method, for the same input.
        """
        check_is_fitted(self)
        mean = self.mean_ if self.with_mean else 0.0
        scale = self.scale_ if self.with_std else 1.0
        x, out = _checked(X, self.copy if copy is None else copy)
        if x is None or not _are_of_features(x, mean, scale):
            return super().transform(X, copy)
        validate_data(self, X, reset=False, skip_check_array=True)
        return _applied(x, out, mean, 1 / scale, -0.0)

    def inverse_transform(self, X: Any, copy: bool | None = None) -> Any:
        """Multiply by the scale and add the mean.

        Parameters
        ----------
        X : (n_samples, n_features) array_like or sparse matrix
            What to scale back.
        copy : bool, optional
            In place of the parameter of that name.

        Returns
        -------
        (n_samples, n_features) ndarray or sparse matrix
            The result with X's type, float64 for an X that is not floating.

        Raises
        ------
        TypeError, ValueError
            As scikit-learn's method, for the same input.
        """
        check_is_fitted(self)
        mean = self.mean_ if self.with_mean else -0.0
        scale = self.scale_ if self.with_std else 1.0
        x, out = _checked(X, self.copy if copy is None else copy)
        if x is None or not _are_of_features(x, mean, scale):
            return super().inverse_transform(X, copy)
        return _applied(x, out, 0.0, scale, mean)

    def _is_measured_here(self) -> bool:
        """Whether there is something to measure that continues what has been seen, and no callback wants to know."""
        if not (self.with_mean or self.with_std) or hasattr(self, "_skl_callbacks"):
            return False
        needed = ["mean_"] + ["var_"] * self.with_std
        return not hasattr(self, "n_samples_seen_") or all(isinstance(getattr(self, n), np.ndarray) for n in needed)

    def _seen(self) -> Moments:
        """The statistics so far. Rounding in scikit-learn's own sums can make a variance negative."""
        m2 = self.var_ * self.n_samples_seen_ if self.with_std else np.zeros_like(self.mean_)
        return Moments(self.n_samples_seen_, self.mean_, np.maximum(m2, 0.0))


def _samples(count: Doubles, weighted: bool) -> Any:
    """n_samples_seen_: integers without weights, as documented, and one number if the features agree."""
    found: Array = count
    if not weighted and np.all(count == np.floor(count)):
        found = count.astype(np.int64)
    return found[0] if np.all(found == found[0]) else found


def _measured(X: Any, sample_weight: Any) -> Moments | None:
    """The moments of a batch, or None if scikit-learn has to measure or refuse it."""
    x = _as_dense(X)
    if x is None:
        return None
    weights = None
    if sample_weight is not None:
        try:
            weights = _check_sample_weight(sample_weight, x, dtype=x.dtype)
        except (TypeError, ValueError):
            return None
        # Moments have no negative weights, and they do not read where scikit-learn looks for infinities
        if not np.all(weights >= 0) or np.any(np.isinf(x[weights == 0])):
            return None
    found = moments(x, channel_axis=1, weights=weights, skipna=True)
    return found if _is_finite(found) else None


def _checked(X: Any, copy: bool) -> tuple[Array | None, Array | None]:
    """X as a dense array and the array to write to, None for a new one; or None for both if scikit-learn has to act."""
    x = _as_dense(X, force_writeable=not copy)
    if x is None or _may_have_infinities(x):
        return None, None
    own = isinstance(X, np.ndarray) and not np.may_share_memory(x, X)  # converted: nobody else sees it
    return x, x if own or not copy else None


def _as_dense(X: Any, **how: Any) -> Array | None:
    """X as scikit-learn's checks make it, if that is a dense array for the passes; None too if they refuse it.

    Its own methods check again. So they raise their own errors, in their own order, and before anything has changed.
    """
    try:
        x = check_array(X, accept_sparse=True, dtype=FLOAT_DTYPES, ensure_all_finite=False, **how)
    except (TypeError, ValueError):
        return None
    return x if isinstance(x, np.ndarray) and x.dtype in (np.float32, np.float64) else None


def _may_have_infinities(x: Array) -> bool:
    """Whether x has infinities, which scikit-learn refuses, or finite values whose mean overflows.

    scikit-learn looks for infinities with a sum on one thread, and with a second read if that is NaN, which can take
    longer than the scaling. A dot product reads x on all threads of the BLAS. It is finite unless x has NaN, infinities
    or very large values. Only these cost another read, by `cbn.moments`.
    """
    if get_config()["assume_finite"]:
        return False
    if x.flags.forc:
        values = x.ravel(order="K")
        with np.errstate(all="ignore"):
            if np.isfinite(values @ values):
                return False
    return not _is_finite(moments(x, channel_axis=1, skipna=True))


def _is_finite(found: Moments) -> bool:
    """Whether what was measured has no infinities: one makes the mean of its feature infinite or NaN."""
    return bool(np.all(np.isfinite(found.mean)))


def _are_of_features(x: Array, *values: Any) -> bool:
    """Whether all values are numbers or arrays with one number for each feature, as fitting makes them."""
    return all(isinstance(a, float) or (isinstance(a, np.ndarray) and a.shape == x.shape[1:]) for a in values)


def _applied(x: Array, out: Array | None, mean: Any, scale: Any, offset: Any) -> Array:
    """(x - mean)*scale + offset in one pass."""
    inp = as_input(x, 1)
    coef = np.empty((3, inp.n_channels))
    coef[0], coef[1], coef[2] = mean, scale, offset
    y = forward_fixed(inp, coef, NO_EPILOGUE, as_outputs(inp, out, None)[0])
    return y if out is None else out
