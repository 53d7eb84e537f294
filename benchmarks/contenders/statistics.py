"""Statistics of channels: cbn, libraries, and what users write by hand.

fast-array-utils and stable-baselines3 are their formulas in numpy, as they have them. gymnasium updates by the formula
of stable-baselines3.

A formula that loses digits gives no wrong result: the error may be as large as its bound, and the report shows the
error. At the large shapes some bounds exceed the variance. There the small shapes vouch for the code, which is the
same.
"""

import numpy as np

from .base import CLIP, EPS, RESULTS, Contender
from .ours import Cbn
from .plain import Numpy
from .pytorch import Torch

FLOAT32, FLOAT64 = 2.0**-24, 2.0**-53  # largest relative errors of a rounding
CANCELLATION = 1e6  # mean**2/variance of the floats in `Data`; that of the bytes is 3


def method(op):
    """The name of an operation's method."""
    return op.replace("+", "_")


def two_passes(additions, rounding):
    """Bounds of the relative errors of mean and variance, for sums of so many additions in a row.

    Four more roundings make the terms and the results. The square of the mean's error is added to the variance.
    """
    error = (additions + 4) * rounding
    return {"mean": error, "var": error + CANCELLATION * error**2}


class Statistics(Contender):
    """What they share: an operation is a method that returns its results, in the order of RESULTS."""

    dtypes = ("float32",)
    threaded = False
    tables_only = False  # whether it takes two axes and no more

    @classmethod
    def supports(cls, case):
        return (
            case.group == "statistics"
            and hasattr(cls, method(case.op))
            and case.dtype in cls.dtypes
            and (case.threads == 1 or cls.threaded)
            and (len(case.shape) == 2 or not cls.tables_only)
        )

    def __init__(self, case, data):
        super().__init__(case, data)
        self.x = data.x
        self.axes = tuple(i for i in range(len(case.shape)) if i != 1)
        self.run = getattr(self, method(case.op))
        # numpy adds row after row, or the values of a run in pairs of blocks, 16 additions and one for each doubling
        additions = case.shape[0] + (64 if case.layout == "first" else 0)
        self.tolerances = {"min": 0, "max": 0, **self.bounds(additions)}

    def results(self):
        found = self.run()
        found = found if isinstance(found, tuple) else (found,)
        return {name: np.asarray(a) for name, a in zip(RESULTS.get(self.case.op, ("y",)), found, strict=True)}


class CbnStatistics(Statistics):
    """Its functions, and the running moments."""

    name, version = Cbn.name, Cbn.version
    dtypes = ("float32", "uint8")
    threaded = True

    def __init__(self, case, data):
        super().__init__(case, data)
        import cbn

        self.cbn, self.running = cbn, cbn.RunningMoments(case.shape[1])

    def bounds(self, additions):
        return {"mean": 1e-12, "var": 1e-12}  # float64 sums of x - shift: at most 5e-13, docs/numerics.md

    def moments(self, **kwargs):
        m = self.cbn.moments(self.x, **kwargs)
        return m.mean, m.var()

    def moments_extrema(self):
        m = self.cbn.moments(self.x, extrema=True)
        return m.mean, m.var(), m.min, m.max

    def moments_skipna(self):
        return self.moments(skipna=True)

    def update(self):
        self.running.update(self.x)

    def standardize_clip(self):
        return self.cbn.standardize(self.x, self.data.mean, self.data.var, eps=EPS, clip=CLIP)

    def results(self):
        if self.case.op != "update":
            return super().results()
        return {"mean": self.running.mean, "var": self.running.var()}


class NumpyStatistics(Statistics):
    """The methods of an array: float32 sums of floats, float64 sums of bytes."""

    name, version = Numpy.name, Numpy.version
    dtypes = ("float32", "uint8")

    def bounds(self, additions):
        return two_passes(additions, FLOAT64 if self.case.dtype == "uint8" else FLOAT32)

    def moments(self):
        return self.x.mean(self.axes), self.x.var(self.axes)

    def moments_extrema(self):
        return (*self.moments(), self.x.min(self.axes), self.x.max(self.axes))

    def moments_skipna(self):
        return np.nanmean(self.x, self.axes), np.nanvar(self.x, self.axes)


class TorchStatistics(Statistics):
    """`var_mean`, which takes floats alone, `amin` and `amax`."""

    name, version = Torch.name, Torch.version
    dtypes = ("float32", "uint8")
    threaded = True

    def __init__(self, case, data):
        super().__init__(case, data)
        import torch

        torch.set_num_threads(case.threads)
        self.torch, self.x = torch, torch.from_numpy(data.x)

    def bounds(self, additions):
        return {"mean": 2 * FLOAT32, "var": 2 * FLOAT32}  # Welford's formula in float64, rounded to float32

    def moments(self):
        var, mean = self.torch.var_mean(self.x.float(), self.axes, correction=0)
        return mean, var

    def moments_extrema(self):
        return (*self.moments(), self.x.amin(self.axes), self.x.amax(self.axes))


class ScikitLearn(Statistics):
    """The formula of its StandardScaler: float64 sums in two passes, and NaN left out wherever there are any."""

    name = "scikit-learn"
    tables_only = True

    @classmethod
    def version(cls):
        import sklearn

        return sklearn.__version__

    def __init__(self, case, data):
        super().__init__(case, data)
        from sklearn.utils.extmath import _incremental_mean_and_var

        self.formula = _incremental_mean_and_var

    def bounds(self, additions):
        return two_passes(additions, FLOAT64)

    def moments(self):
        return self.formula(self.x, 0.0, 0.0, np.zeros(self.x.shape[1], np.int64))[:2]

    moments_skipna = moments


class FastArrayUtils(Statistics):
    """E[x^2] - E[x]^2, as scanpy uses it: float64 means, of squares that are float32 like x."""

    name = "fast-array-utils"
    tables_only = True

    @classmethod
    def version(cls):
        return ""

    def bounds(self, additions):
        mean = (additions + 4) * FLOAT64
        return {"mean": mean, "var": CANCELLATION * (FLOAT32 + 3 * mean)}

    def moments(self):
        mean = self.x.mean(0, dtype=np.float64)
        return mean, (self.x**2).mean(0, dtype=np.float64) - mean**2


class StableBaselines3(Statistics):
    """Its RunningMeanStd and its VecNormalize."""

    name = "stable-baselines3"
    tables_only = True

    @classmethod
    def version(cls):
        return ""

    def __init__(self, case, data):
        super().__init__(case, data)
        # Theirs begins with 1e-4 values of mean 0. Without them only rounding can differ from float64.
        self.mean, self.var, self.count = 0.0, 1.0, 0

    bounds = NumpyStatistics.bounds

    def update(self):
        batch_mean, batch_var, batch_count = np.mean(self.x, axis=0), np.var(self.x, axis=0), self.x.shape[0]
        delta = batch_mean - self.mean
        count = self.count + batch_count
        m2 = self.var * self.count + batch_var * batch_count + np.square(delta) * self.count * batch_count / count
        self.mean = self.mean + delta * batch_count / count
        self.var, self.count = m2 / count, count
        return self.mean, self.var

    def standardize_clip(self):
        d = self.data
        return np.clip((d.x - d.mean) / np.sqrt(d.var + EPS), -CLIP, CLIP).astype(np.float32)
