# Whole calls of statistics: the state of a stream moved in place, and arrays standardized with given statistics.
"""Calls of `RunningMoments` and `standardize`, compiled. Internal; `cbn.running` and `cbn.scaling` are the ways in.

As in calls.pyx, a function answers for arguments of the kind that most calls have, and says so if it does not.
"""
cimport numpy as cnp
from libc.math cimport INFINITY, NAN
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from .arrays cimport NPY_HALF, doubles, element_of, empty_like, give_memory, is_usual, new_doubles, take_memory
from .calls cimport Prepared, copied, is_epsilon, is_per_channel, prepared_for, set_arrays
from .coefficients cimport FORWARD_ROWS, solve_standard
from .engine cimport SMALL, choose_and_apply, make_job, measure, set_coefficients
from .job cimport Job, is_integer, set_count
from .kernels cimport cbn_act, cbn_view
from .partition cimport Extents
from .scratch cimport divide_measure, measure_doubles
from .statistics cimport cbn_merge_moments, cbn_take_largest, cbn_take_smallest

import numpy as np

cnp.import_array()


# ---- statistics of an array ------------------------------------------------------------------------------------

def moments(x, channel_axis, skipna, extrema):
    """(count, mean, m2, low, min, max) of `passes.moments`, for an array of floats without gaps; or None."""
    cdef Prepared p = prepared_for(x, channel_axis)
    cdef Job job
    cdef cbn_view ones
    cdef Py_ssize_t c, C
    cdef double *count_c
    cdef double *room_c
    cdef cnp.ndarray count, mean, m2, low, least = None, largest = None
    if p is None or type(skipna) is not bool or type(extrema) is not bool:
        return None
    C = p.layout.extents.C
    count, mean, m2, low = new_doubles(C), new_doubles(C), new_doubles(C), new_doubles(C)
    job = p.job
    job.x.data = cnp.PyArray_BYTES(<cnp.ndarray>x)
    job.sum_c, job.square_c, job.low_c = doubles(mean, C), doubles(m2, C), doubles(low, C)
    count_c = doubles(count, C)
    for c in range(C):
        count_c[c] = <double>(job.reduction.N * job.reduction.S)
    if skipna or extrema:
        ones.data, ones.n, ones.c = NULL, 0, 0
        set_count(&job, skipna, ones)
        job.count_c = count_c
    if extrema:
        least, largest = new_doubles(C), new_doubles(C)
        job.min_c, job.max_c = doubles(least, C), doubles(largest, C)
    # Of the pool if it is large: of many channels with few values, new memory costs more than the passes
    room_c = <double *>take_memory(measure_doubles(&job) * sizeof(double))
    if room_c == NULL:
        return None
    divide_measure(&job, room_c)
    if job.n_bytes < SMALL:
        measure(&job)
    else:
        with nogil:
            measure(&job)
    give_memory(<char *>room_c)
    return count, mean, m2, low, least, largest


def variance(cnp.ndarray count, cnp.ndarray m2, double correction):
    """m2/(count - correction) of contiguous float64 values, NaN where that is not positive."""
    cdef Py_ssize_t c, C = cnp.PyArray_SIZE(m2)
    cdef cnp.ndarray var = new_doubles(C)
    cdef double n
    cdef double *count_c = doubles(count, C)
    cdef double *m2_c = doubles(m2, C)
    cdef double *var_c = doubles(var, C)
    for c in range(C):
        n = count_c[c] - correction
        var_c[c] = m2_c[c] / n if n > 0 else NAN
    return var


# ---- statistics of a stream ------------------------------------------------------------------------------------

cdef enum:    # rows of the state of `RunningMoments`
    COUNT_ROW, MEAN_ROW, M2_ROW, LOW_ROW, MIN_ROW, MAX_ROW, RUNNING_ROWS


cdef bint is_state(cnp.ndarray state, Py_ssize_t C) noexcept:
    return cnp.PyArray_NDIM(state) == 2 and cnp.PyArray_DIM(state, 0) == RUNNING_ROWS \
        and cnp.PyArray_DIM(state, 1) == C and cnp.PyArray_TYPE(state) == cnp.NPY_DOUBLE \
        and cnp.PyArray_ISCARRAY(state)


cdef void merge_rows(double *to, const double *other, Py_ssize_t C, bint extrema) noexcept nogil:
    cbn_merge_moments(to, to + MEAN_ROW * C, to + LOW_ROW * C, to + M2_ROW * C, other, other + MEAN_ROW * C,
                      other + LOW_ROW * C, other + M2_ROW * C, 0, C)
    if extrema:
        cbn_take_smallest(to + MIN_ROW * C, other + MIN_ROW * C, 0, C)
        cbn_take_largest(to + MAX_ROW * C, other + MAX_ROW * C, 0, C)


def merge(cnp.ndarray state, cnp.ndarray other, bint extrema):
    """Merge the moments of `other` into `state`, (6, C) each, as one step towards all other threads."""
    cdef Py_ssize_t C = cnp.PyArray_DIM(state, 1)
    if not is_state(state, C) or not is_state(other, C):
        raise ValueError(f"states of shapes {np.shape(state)} and {np.shape(other)}")
    merge_rows(<double *>cnp.PyArray_DATA(state), <double *>cnp.PyArray_DATA(other), C, extrema)


cdef bint set_observations(Job *job, cnp.ndarray x, tuple shape, Py_ssize_t C) noexcept:
    """A job that reduces the leading axes of contiguous observations of this shape; False for another array."""
    cdef Extents e
    cdef cbn_view view
    cdef int i, n_axes = <int>len(shape), leading = cnp.PyArray_NDIM(x) - n_axes
    if leading < 0 or not cnp.PyArray_IS_C_CONTIGUOUS(x) or not is_usual(x) or not is_measured(x):
        return False
    for i in range(n_axes):
        if cnp.PyArray_DIM(x, leading + i) != <Py_ssize_t>shape[i]:
            return False
    e.C, e.N, e.S = C, cnp.PyArray_SIZE(x) // C, 1
    e.rows = C > 1 or e.N == 1
    view.data, view.n, view.c = cnp.PyArray_BYTES(x), C, 1
    if not e.rows:    # as `Layout` has one channel
        e.N, e.S = 1, e.N
    job[0] = make_job(&e, view, element_of(x), cnp.PyArray_ITEMSIZE(x), False)
    return True


cdef bint is_measured(cnp.ndarray x) noexcept:
    """Whether it is of a type that the loops measure, and that numpy numbers."""
    cdef int n = cnp.PyArray_TYPE(x)
    return n == cnp.NPY_FLOAT or n == cnp.NPY_DOUBLE or n == NPY_HALF or n == cnp.NPY_UBYTE or n == cnp.NPY_BYTE \
        or n == cnp.NPY_USHORT or n == cnp.NPY_SHORT or n == cnp.NPY_INT or n == cnp.NPY_BOOL


def update(cnp.ndarray state, x, tuple shape, bint skipna, bint extrema):
    """Measure x, observations of `shape` along any leading axes, and merge that into `state` (6, C); or return False.

    The merge is one step towards all other threads, signal handlers and exceptions.
    """
    cdef Py_ssize_t c, C = cnp.PyArray_DIM(state, 1)
    cdef Job job
    cdef cbn_view ones
    cdef double *room_c
    if type(x) is not cnp.ndarray or not is_state(state, C):
        return False
    if cnp.PyArray_SIZE(<cnp.ndarray>x) == 0 or not set_observations(&job, x, shape, C):
        return False
    if not is_integer(&job) and (skipna or extrema):
        ones.data, ones.n, ones.c = NULL, 0, 0
        set_count(&job, skipna, ones)
    room_c = <double *>malloc((RUNNING_ROWS * C + measure_doubles(&job)) * sizeof(double))
    if room_c == NULL:
        return False
    for c in range(C):
        room_c[c] = <double>(job.reduction.N * job.reduction.S)
    if job.counts:
        job.count_c = room_c
    job.sum_c, job.square_c, job.low_c = room_c + MEAN_ROW * C, room_c + M2_ROW * C, room_c + LOW_ROW * C
    if extrema:
        job.min_c, job.max_c = room_c + MIN_ROW * C, room_c + MAX_ROW * C
    divide_measure(&job, room_c + RUNNING_ROWS * C)
    if job.n_bytes < SMALL:
        measure(&job)
    else:
        with nogil:
            measure(&job)
    merge_rows(<double *>cnp.PyArray_DATA(state), room_c, C, extrema)
    free(room_c)
    return True


# ---- standardize -----------------------------------------------------------------------------------------------

cdef struct Standard:    # what `standardize` is asked for, but its statistics
    double eps
    bint outside, zero_is_one, centered
    cbn_act clip


cdef cnp.ndarray standardized(Prepared p, cnp.ndarray x, object out, const Standard *how, double *room_c):
    """y, from the mean and the variance that are behind the coefficients in `room_c`; None for another `out`."""
    cdef Job job
    cdef cnp.ndarray y
    cdef Py_ssize_t C = p.layout.extents.C
    cdef double *mean_c = room_c + FORWARD_ROWS * C
    if not set_arrays(p, &job, x, out, None, how.clip):
        return None
    y = empty_like(x) if out is None else out
    solve_standard(room_c, C, mean_c if how.centered else NULL, mean_c + C, how.eps, how.outside, how.zero_is_one)
    job.y.data = cnp.PyArray_BYTES(y)
    set_coefficients(&job, room_c)
    choose_and_apply(&job)
    return y


cdef bint find_standard(Standard *how, eps, eps_outside, zero_var, clip, center) noexcept:
    """Whether the options are of the kind that most calls have; then what they are."""
    how.clip.slope, how.clip.low, how.clip.high = 1, -INFINITY, INFINITY
    if not is_epsilon(eps, False) or type(eps_outside) is not bool or type(center) is not bool \
            or type(zero_var) is not str:
        return False
    how.eps, how.outside, how.centered = eps, eps_outside, center
    how.zero_is_one = <str>zero_var == "one"
    if not how.zero_is_one and <str>zero_var != "eps":
        return False
    if clip is None:
        return True
    if type(clip) is float or type(clip) is int:
        how.clip.high = clip
        how.clip.low = -how.clip.high
    elif type(clip) is tuple and len(<tuple>clip) == 2 and type((<tuple>clip)[0]) is float \
            and type((<tuple>clip)[1]) is float:
        how.clip.low, how.clip.high = <tuple>clip
    else:
        return False
    return how.clip.low <= how.clip.high


def standardize(x, mean, var, channel_axis, out, eps, eps_outside, zero_var, clip, center):
    """y of `cbn.standardize` for an x of y's dtype, or None."""
    cdef Prepared p = prepared_for(x, channel_axis)
    cdef Standard how
    cdef Py_ssize_t c, C
    cdef double *room_c
    cdef double *var_c
    if p is None or mean is None or var is None or not find_standard(&how, eps, eps_outside, zero_var, clip, center):
        return None
    C = p.layout.extents.C
    if not is_per_channel(mean, C, False) or not is_per_channel(var, C, False):
        return None
    room_c = <double *>malloc((FORWARD_ROWS + 2) * C * sizeof(double))
    if room_c == NULL:
        return None
    try:
        copied(room_c + FORWARD_ROWS * C, mean, C)
        var_c = copied(room_c + (FORWARD_ROWS + 1) * C, var, C)
        for c in range(C):
            if var_c[c] < 0:
                return None
        return standardized(p, x, out, &how, room_c)
    finally:
        free(room_c)


def standardize_running(cnp.ndarray state, x, channel_axis, out, eps, zero_var, clip, center):
    """The same with the mean and the biased variance of the state of `RunningMoments`."""
    cdef Prepared p = prepared_for(x, channel_axis)
    cdef Standard how
    cdef Py_ssize_t c, C = cnp.PyArray_DIM(state, 1)
    cdef double *room_c
    cdef double *rows_c = <double *>cnp.PyArray_DATA(state)
    if p is None or p.layout.extents.C != C or not is_state(state, C) \
            or not find_standard(&how, eps, False, zero_var, clip, center):
        return None
    room_c = <double *>malloc((FORWARD_ROWS + 2) * C * sizeof(double))
    if room_c == NULL:
        return None
    try:
        memcpy(room_c + FORWARD_ROWS * C, rows_c + MEAN_ROW * C, C * sizeof(double))
        for c in range(C):
            room_c[(FORWARD_ROWS + 1) * C + c] = rows_c[M2_ROW * C + c] / rows_c[c]
        return standardized(p, x, out, &how, room_c)
    finally:
        free(room_c)
