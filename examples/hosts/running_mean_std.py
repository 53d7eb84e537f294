"""RunningMeanStd of gymnasium and stable-baselines3: mean, variance and count of a stream of batches.

The contract of both: start with mean 0, variance 1 and a count of `epsilon`; every update merges the batch's mean,
biased variance and length. The first axis is the batch's. gymnasium gives mean and variance the dtype of its
observations, mostly float32; here they are always float64.
"""

import numpy as np

import cbn
from examples.hosts.reading import readable


def statistic(read):
    """A property that is read as a copy and assigned as a whole."""

    def assign(self, value):
        state = {"mean": self.mean, "var": self.var, "count": self.count}
        self.__setstate__(state | {read.__name__: value})

    return property(read, assign)


class RunningMeanStd:
    """Mean, variance and count of what came in, which `cbn.RunningMoments` keeps."""

    def __init__(self, epsilon=1e-4, shape=(), dtype=np.float64):
        # A count of 0 has no variance, but the hosts' variance is 1 until the first update
        self.running = cbn.RunningMoments(shape, prior=(0, 1, epsilon or np.finfo(np.float64).tiny))

    @statistic
    def mean(self):
        return self.running.mean

    @statistic
    def var(self):
        return self.running.var()

    @statistic
    def count(self):
        return float(self.running.count.flat[0])

    def update(self, x):
        """Merge a batch."""
        if np.ndim(x) == len(self.running.shape) + 1:
            self.running.update(readable(x))
        else:  # without an axis of its own the batch is the first one, and its statistics broadcast
            self.update_from_moments(np.mean(x, axis=0), np.var(x, axis=0), len(x))

    def update_from_moments(self, batch_mean, batch_var, batch_count):
        """Merge a batch of which the statistics are known."""
        mean, var = (np.broadcast_to(a, self.running.shape).ravel() for a in (batch_mean, batch_var))
        self.running.merge(cbn.Moments(batch_count, mean, var * batch_count))

    def combine(self, other):
        """Merge what another object has seen, the host's own too."""
        self.update_from_moments(other.mean, other.var, other.count)

    def normalize(self, x, epsilon, clip=None, center=True):
        """(x - mean)/sqrt(var + epsilon), cut at ±clip: float32, as both hosts return it."""
        x = readable(x)
        dtype = None if x.dtype == np.float32 else np.float32  # the compiled call takes no dtype
        return self.running.standardize(x, eps=epsilon, clip=clip, center=center, dtype=dtype)

    def copy(self):
        """Another object with the same statistics."""
        other = type(self).__new__(type(self))
        other.running = cbn.RunningMoments(self.running.shape).merge(self.running)
        return other

    def __setstate__(self, state):
        """Take over a pickle, one of the hosts' own classes too: they keep mean, var and count."""
        if "running" in state:
            self.__dict__.update(state)
        else:
            prior = state["mean"], state["var"], state["count"]
            self.running = cbn.RunningMoments(np.shape(state["mean"]), prior=prior)
