"""Running statistics of lerobot (`RunningQuantileStats`, `get_feature_stats`) and of openpi (`RunningStats`).

The contract: `update` with any number of batches (..., C), then minimum, maximum, mean, biased standard deviation and
count of every feature; fewer than two vectors are an error. Quantiles, which the hosts take from histograms, are not
part of it. lerobot asks for the statistics of whole arrays too: those of images (N, C, H, W) per channel, or those of
vectors per feature, with N as the count.

Both hosts keep E[x] and E[x²] and subtract: the variance is E[x²] - E[x]², in float32 for images and float32 vectors.
"""

import numpy as np

import cbn
from examples.hosts.reading import readable


class RunningStats:
    """Statistics of batches (..., C)."""

    def __init__(self):
        self.running = None

    def update(self, batch):
        if self.running is None:
            self.running = cbn.RunningMoments(batch.shape[-1], extrema=True)
        self.running.update(readable(batch))

    def get_statistics(self):
        if self.running is None or self.running.count[0] < 2:
            raise ValueError("Cannot compute statistics for less than 2 vectors.")
        return statistics(self.running.moments(), self.running.count[:1])


def get_feature_stats(array, axis, keepdims):
    """Statistics of images over axis (0, 2, 3), or of vectors over axis 0."""
    if axis not in (0, (0,), (0, 2, 3)):
        raise ValueError(f"Unsupported axis configuration: {axis}")
    images = axis == (0, 2, 3)
    x = readable(array[:, np.newaxis] if array.ndim == 1 else array)
    stats = statistics(cbn.moments(x, channel_axis=1 if images else -1, extrema=True), [len(array)])
    shape = (1, -1, 1, 1) if images else (1, -1)[: array.ndim]
    return {name: a.reshape(shape) if keepdims and name != "count" else a for name, a in stats.items()}


def statistics(m, count):
    return {"min": m.min, "max": m.max, "mean": m.mean, "std": m.std(), "count": np.array(count, np.int64)}
