"""Arrays as cbn reads them; what all hosts share."""

import numpy as np


def readable(x):
    """The array itself, or float64 of the integers that cbn does not read: 64 bits, numpy's default, and uint32."""
    x = np.asarray(x)
    return x.astype(np.float64) if x.dtype.kind in "iu" and not np.can_cast(x.dtype, np.int32) else x
