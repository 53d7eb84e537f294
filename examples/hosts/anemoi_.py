"""The statistics collector of anemoi-datasets: minimum, maximum, mean and standard deviation of every variable.

The contract: `update` with any number of arrays (n, variables, ...), in which NaN are missing; `merge` makes a new
collector of two; `statistics` has NaN for a variable of which nothing was seen. Collectors are pickled by one process
and merged by another. anemoi-datasets copies the array as float64 and walks the variables one by one.
"""

import copy

import numpy as np

import cbn
from examples.hosts.reading import readable


class Collector:
    """Statistics of named variables."""

    def __init__(self, column_names):
        self.column_names = column_names
        self.running = cbn.RunningMoments(len(column_names), channel_axis=1, skipna=True, extrema=True)

    def update(self, data):
        self.running.update(readable(data))

    def merge(self, other):
        if self.column_names != other.column_names:
            raise ValueError("Cannot merge collectors with different column names")
        result = copy.deepcopy(self)
        result.running.merge(other.running)
        return result

    def statistics(self):
        m = self.running.moments()
        found = {"mean": m.mean, "minimum": m.min, "maximum": m.max, "stdev": m.std()}
        return {name: np.where(m.count > 0, a, np.nan) for name, a in found.items()}
