"""dask-ml's StandardScaler for dask arrays and dask data frames, with the `partial_fit` that raises there.

The contract: mean and biased variance of every column, NaN left out; the scale is the square root of the variance, or
1 where that is 0; transforms are lazy. `fit` begins anew, and `partial_fit` adds to what has been seen, as the one of
scikit-learn does.
"""

import numpy as np

import cbn.dask

try:
    from dask_ml.preprocessing import StandardScaler as Theirs
except ImportError:
    from sklearn.preprocessing import StandardScaler as Theirs  # which dask-ml's is a subclass of


class StandardScaler(Theirs):
    """The scaler with cbn's moments and arithmetic."""

    def fit(self, X, y=None):
        for name in ("n_samples_seen_", "mean_", "var_", "scale_"):
            vars(self).pop(name, None)
        return self.partial_fit(X)

    def partial_fit(self, X, y=None):
        X = _array(X)
        found = cbn.dask.moments(X, skipna=True).compute()
        if not hasattr(self, "n_samples_seen_"):
            self.n_samples_seen_, self.n_features_in_ = 0, X.shape[1]
        elif X.shape[1] != self.n_features_in_:
            raise ValueError(f"X has {X.shape[1]} features, and this scaler has seen {self.n_features_in_}")
        else:
            found = self.moments_ + found
        self.moments_ = found
        self.n_samples_seen_ += X.shape[0]
        if self.with_mean:
            self.mean_ = np.where(found.count > 0, found.mean, np.nan)
        if self.with_std:
            self.var_ = found.var()
            self.scale_ = np.sqrt(np.where(self.var_ == 0, 1, self.var_))
        return self

    def transform(self, X, y=None, copy=None):
        if not self.with_std:
            return _array(X) - self.mean_ if self.with_mean else X
        how = {"eps": 0, "zero_var": "one", "center": self.with_mean}
        return cbn.dask.standardize(_array(X), self.moments_, channel_axis=1, **how)


def _array(X):
    """A dask array, whose chunks have known sizes."""
    return X.to_dask_array(lengths=True) if hasattr(X, "to_dask_array") else X
