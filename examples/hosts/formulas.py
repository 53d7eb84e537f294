"""The hosts' own formulas in numpy, by their contracts: what cbn is compared with where a host is not installed.

Not the hosts' code, and no more of it than is compared. Types, passes and cancellation are theirs.
"""

import numpy as np


class RunningMeanStd:
    """gymnasium's and stable-baselines3's: two reads of a batch in its own type, merged with what was before."""

    def __init__(self, epsilon=1e-4, shape=(), dtype=np.float64):
        self.mean, self.var, self.count = np.zeros(shape, dtype), np.ones(shape, dtype), epsilon

    def update(self, x):
        self.update_from_moments(np.mean(x, axis=0), np.var(x, axis=0), len(x))

    def update_from_moments(self, batch_mean, batch_var, batch_count):
        n = self.count + batch_count
        delta = batch_mean - self.mean
        m2 = self.var * self.count + batch_var * batch_count + delta**2 * self.count * batch_count / n
        self.mean, self.var, self.count = self.mean + delta * batch_count / n, m2 / n, n

    def normalize(self, x, epsilon, clip=None, center=True):
        y = (x - self.mean if center else x) / np.sqrt(self.var + epsilon)
        return (y if clip is None else np.clip(y, -clip, clip)).astype(np.float32)


def mean_var(x, /, *, axis=None, correction=0):
    """fast-array-utils': squares in the type of x, sums in float64, E[x²] - E[x]²."""
    mean = np.mean(x, axis=axis, dtype=np.float64)
    var = np.mean(np.square(x), axis=axis, dtype=np.float64) - mean**2
    n = x.size if axis is None else x.shape[axis]
    return mean, var * (n / (n - correction)) if n != 1 else var


def scale(x, *, zero_center=True, max_value=None, copy=False):
    """scanpy's: the mean and variance above, then three passes in the type of x."""
    x = x.astype(np.float64) if x.dtype.kind in "iub" else x.copy() if copy else x
    mean, var = mean_var(x, axis=0, correction=1)
    std = np.sqrt(var)
    std[std == 0] = 1
    if zero_center:
        x -= mean
    x /= std
    if max_value is not None:
        np.clip(x, -max_value if zero_center else -np.inf, max_value, out=x)
    return x, mean, std


class RunningStats:
    """lerobot's and openpi's: E[x] and E[x²] in the type of the first batch, or float32 of 8-bit and 16-bit integers.

    lerobot converts the batch, openpi squares 8-bit integers as they are, and the squares wrap around; here they are
    lerobot's.
    """

    def __init__(self):
        self.count = 0

    def update(self, batch):
        x = batch.reshape(-1, batch.shape[-1])
        x = x.astype(np.result_type(x.dtype, np.float32), copy=False)
        new = x.mean(axis=0), np.mean(x**2, axis=0), x.min(axis=0), x.max(axis=0)
        if self.count == 0:
            self.mean, self.square, self.min, self.max = new
        self.count += len(x)
        self.mean += (new[0] - self.mean) * (len(x) / self.count)
        self.square += (new[1] - self.square) * (len(x) / self.count)
        self.min, self.max = np.minimum(self.min, new[2]), np.maximum(self.max, new[3])

    def get_statistics(self):
        std = np.sqrt(np.maximum(0, self.square - self.mean**2))
        return {"min": self.min, "max": self.max, "mean": self.mean, "std": std, "count": np.array([self.count])}


def get_feature_stats(array, axis, keepdims):
    """lerobot's, of images over axis (0, 2, 3) with all axes kept: a transposed copy, then the sums above."""
    stats = RunningStats()
    stats.update(array.transpose(0, 2, 3, 1))
    found = {name: a.reshape(1, -1, 1, 1) for name, a in stats.get_statistics().items()}
    return found | {"count": np.array([len(array)])}


class Collector:
    """anemoi-datasets': each variable copied without its NaN, then two reads in float64."""

    def __init__(self, column_names):
        n = len(column_names)
        self.count, self.mean, self.m2 = np.zeros(n), np.zeros(n), np.zeros(n)
        self.min, self.max = np.full(n, np.inf), np.full(n, -np.inf)

    def update(self, data):
        data = data.astype(np.float64)
        valid = ~np.isnan(data)
        for c in range(data.shape[1]):
            x = data[:, c][valid[:, c]]
            if x.size:
                n, mean = self.count[c] + x.size, np.mean(x)
                delta = mean - self.mean[c]
                self.m2[c] += np.sum((x - mean) ** 2) + delta**2 * self.count[c] * x.size / n
                self.mean[c] = (self.count[c] * self.mean[c] + x.size * mean) / n
                self.count[c] = n
                self.min[c], self.max[c] = min(self.min[c], x.min()), max(self.max[c], x.max())

    def statistics(self):
        with np.errstate(invalid="ignore"):
            std = np.sqrt(self.m2 / self.count)
        found = {"mean": self.mean, "minimum": self.min, "maximum": self.max, "stdev": std}
        return {name: np.where(self.count > 0, a, np.nan) for name, a in found.items()}
