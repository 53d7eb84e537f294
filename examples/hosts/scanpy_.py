"""scanpy's scale for dense arrays of cells by genes, with `return_mean_std`.

The contract: subtract every gene's mean, unless `zero_center` is False, divide by its unbiased standard deviation, or
by 1 if that is 0, and cut at ±max_value; without `zero_center` at max_value alone. Floats are scaled in place unless
`copy` is True, integers become float64.
"""

import numpy as np

import cbn
from examples.hosts.fast_array_utils_ import mean_var
from examples.hosts.reading import readable


def scale(x, *, zero_center=True, max_value=None, copy=False):
    """(scaled x, mean, standard deviation)."""
    mean, var = mean_var(x, axis=0, correction=1)
    integers = x.dtype.kind in "iub"
    scaled = cbn.standardize(
        readable(x),
        mean,
        var,
        eps=0,
        zero_var="one",
        center=zero_center,
        clip=None if max_value is None else (-max_value if zero_center else -np.inf, max_value),
        out=None if copy or integers else x,
        dtype=np.float64 if integers else None,
    )
    return scaled, mean, np.sqrt(np.where(var == 0, 1, var))
