"""The paths through the kernels: element types, layouts, shapes, knobs; and what a result is compared with."""

import ml_dtypes
import numpy as np

DTYPES = (np.float32, np.float64)  # of parameters
HALVES = (np.float16, ml_dtypes.bfloat16)
INPUT_DTYPES = (*DTYPES, *HALVES)
LARGE_RANGE = (*DTYPES, ml_dtypes.bfloat16)  # that hold 1e36
PARAMETERS = {half: np.float32 for half in HALVES} | {dtype: dtype for dtype in DTYPES}  # that go with inputs
# Largest error allowed, relative to the largest value of the exact result; for 16 bits half a unit in the last place.
ROUNDING = {np.dtype(np.float16): 2**-11, np.dtype(ml_dtypes.bfloat16): 2**-8}
LIMIT = {np.dtype(np.float32): 1e-6, np.dtype(np.float64): 1e-12, **ROUNDING}
# Statistics: float64 sums, except for float32 sums of a few 16-bit elements.
STATISTICS_LIMIT = {np.dtype(t): 1e-12 for t in DTYPES} | {np.dtype(t): 1e-6 for t in HALVES}
GRADIENT_LIMIT = {np.dtype(np.float32): 1e-5, np.dtype(np.float64): 1e-11, **ROUNDING}

# name -> (shape, channel axis, order of the axes in memory)
LAYOUTS = {
    "NC": ((37, 19), 1, None),
    "NCL": ((5, 7, 67), 1, None),
    "NLC": ((5, 67, 7), -1, None),
    "NCHW": ((3, 5, 9, 11), 1, None),
    "NHWC": ((3, 9, 11, 21), -1, None),
    "NCHW as NHWC": ((3, 21, 9, 11), 1, (0, 2, 3, 1)),
    "NCDHW": ((2, 3, 4, 5, 7), 1, None),
    "CN": ((6, 131), 0, None),
    "CNHW in memory": ((3, 5, 9, 11), 1, (1, 0, 2, 3)),
    "C=1": ((50, 1), 1, None),
    "C=600": ((70, 600), 1, None),
}


def in_memory_order(x, order):
    """x with its axes lying in memory in this order, slowest first."""
    if order is None:
        return np.ascontiguousarray(x)
    return np.ascontiguousarray(x.transpose(order)).transpose(np.argsort(order))


THREADS = (1, 2, 3, 8)

PIPELINE = {"l2_bytes": 1 << 12, "l3_bytes": 1 << 24}
KNOBS = {
    "two passes": {"l2_bytes": 0, "l3_bytes": 0},
    "two passes, past the caches": {"l2_bytes": 0, "l3_bytes": 0, "nontemporal_bytes": 0},
    "pipeline": PIPELINE,
    "pipeline, past the caches": PIPELINE | {"nontemporal_bytes": 0},
    "pipeline, nothing fetched": PIPELINE | {"nontemporal_bytes": 0, "prefetch": False},
    "pipeline of small tiles": {"l2_bytes": 1 << 15, "l3_bytes": 0, "nontemporal_bytes": 0},
}
PATH_SHAPES = {
    "runs": (3, 40, 300),
    "runs of whole lines": (3, 40, 256),
    "long runs": (2, 33, 1500),
    "runs of several blocks": (70, 5, 1100),
    "runs, each two pieces": (2, 5, 70001),
    "short runs": (3, 77, 13),
    "rows of short runs": (9, 96, 49),
    "rows of short runs, not of whole lines": (9, 77, 49),
    "rows of very short runs": (300, 77, 4),
    "rows": (300, 40),
    "rows of whole lines": (301, 64),
    "wide rows of whole lines": (23, 1024),
    "rows, tiles of columns": (37, 9001),
    "rows not of whole lines": (37, 9016),
}


def error(actual, exact):
    """Largest difference relative to the largest value of the exact result."""
    actual, exact = np.asarray(actual, np.float64), np.asarray(exact, np.float64)
    assert actual.shape == exact.shape
    scale = np.abs(exact).max() or 1.0
    return np.abs(actual - exact).max() / scale


def agree(found, exact, limit, *case):
    """Fail unless `error` is at most `limit`; then say where it is largest, and in which case."""
    worst = error(found, exact)
    if worst <= limit:
        return
    found, exact = np.asarray(found), np.asarray(exact, np.float64)
    with np.errstate(all="ignore"):
        difference = np.abs(found.astype(np.float64) - exact)
    i = np.unravel_index(np.argmax(np.where(np.isnan(difference), np.inf, difference)), exact.shape)
    raise AssertionError(
        f"error {worst:.3g}, more than {limit:.3g}, of {found.dtype} {found.shape}: "
        f"found {found[i]!s} at {tuple(map(int, i))}, exactly {exact[i]!s}; case {case}"
    )
