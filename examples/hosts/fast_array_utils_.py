"""fast-array-utils' mean_var for dense arrays.

The contract: float64 mean and variance along axis 0, 1 or both, the sum of squared distances divided by n - correction,
or by n if n is 1. fast-array-utils takes the mean square less the squared mean, and squares in the type of x.
"""

import numpy as np

import cbn
from examples.hosts.reading import readable


def mean_var(x, /, *, axis=None, correction=0):
    """(mean, variance): arrays, or two numbers for all of x."""
    whole = axis is None
    m = cbn.moments(readable(x[np.newaxis] if whole else x), channel_axis=0 if whole else 1 - axis)
    found = m.mean, m.var(correction if m.count[0] != 1 else 0)
    return tuple(a[0] for a in found) if whole else found
