# Second derivatives: measure and apply over three arrays, x, g = dy and z = ggI. In the job z has the place of the
# residual, and dh, the gradient of x, that of dy times the slope of an activation.
from libc.string cimport memcpy

from .engine cimport run, threads_for
from .job cimport Job
from .kernels cimport CBN_SECOND_SUMS, CBN_SHIFT_G, CBN_SHIFT_MEAN, CBN_SHIFT_Z, cbn_loop, cbn_tile, cbn_view
from .partition cimport Rectangle, most_items, n_items, n_partials, rectangle, share
from .statistics cimport cbn_add, choose_shifts
from .tiles cimport moved, tile_to_apply, tile_to_reduce


cdef inline cbn_loop second_loop(const Job *job, bint rows) noexcept nogil:
    return job.loops.second_rows if rows else job.loops.second_runs


cdef inline Py_ssize_t second_doubles(const Job *job) noexcept nogil:
    """How many float64 values `measure_second` takes for partial sums, which begin with those of the whole."""
    return job.reduction.C * CBN_SECOND_SUMS * n_partials(&job.reduction)


cdef inline void measure_second_items(Job *job, Py_ssize_t begin, Py_ssize_t end, int thread) noexcept nogil:
    cdef Py_ssize_t item
    cdef Rectangle r
    cdef cbn_tile t
    for item in range(begin, end):
        r = rectangle(&job.reduction, item)
        t = tile_to_reduce(job, &r)
        second_loop(job, job.reduction.rows)(NULL, &t)


cdef inline void apply_second_items(Job *job, Py_ssize_t begin, Py_ssize_t end, int thread) noexcept nogil:
    """The last item first: apply starts with what the reduction before it has left in the cache."""
    cdef Py_ssize_t item
    cdef Rectangle r
    cdef cbn_tile t
    for item in range(end - 1, begin - 1, -1):
        r = rectangle(&job.apply, item)
        t = tile_to_apply(job, &r)
        t.dh = moved(job.dh, job.itemsize, &r)
        second_loop(job, job.apply.rows)(&t, NULL)


cdef inline void shifts_of(const Job *job, cbn_view v, double *shift_c, double *memory) noexcept nogil:
    """A value near those of each channel, as forward reductions subtract; `memory` holds C values."""
    cdef Job other = job[0]
    other.x, other.shift_c, other.sums_in_float64_c = v, shift_c, memory
    choose_shifts(&other, 0, job.reduction.C)


cdef inline void measure_second(Job *job, const double *mean_c, double *shifts_c) noexcept nogil:
    """The five sums of all channels, at the beginning of job.partial; shifts_c (CBN_SECOND_SHIFTS, C) are made.

    Partial sums are added in an order that their number alone decides.
    """
    cdef Py_ssize_t k, half, C = job.reduction.C, all_rows = CBN_SECOND_SUMS * C, blocks = n_partials(&job.reduction)
    cdef int threads = threads_for(3 * job.n_bytes, most_items(&job.reduction, job.itemsize))
    shifts_of(job, job.g, shifts_c + CBN_SHIFT_G * C, shifts_c)
    shifts_of(job, job.z, shifts_c + CBN_SHIFT_Z * C, shifts_c)
    memcpy(shifts_c + CBN_SHIFT_MEAN * C, mean_c, C * sizeof(double))
    job.shift_c = shifts_c
    job.partial_rows = CBN_SECOND_SUMS
    share(&job.reduction, job.itemsize, threads)
    run(measure_second_items, job, n_items(&job.reduction), threads)
    while blocks > 1:    # one half to the other: so that each has few additions
        half = (blocks + 1) // 2
        for k in range(blocks - half):
            cbn_add(job.partial + all_rows * k, job.partial + all_rows * (k + half), 0, all_rows)
        blocks = half


cdef inline void apply_second(Job *job, double *coef_c) noexcept nogil:
    """y, and dh if it is there, with coefficients of CBN_2_ROWS."""
    cdef Py_ssize_t arrays = 3 if job.dh.data == NULL else 5
    cdef int threads = threads_for(arrays * job.n_bytes, most_items(&job.apply, job.itemsize))
    job.coef_c = coef_c
    job.fits = True    # the arithmetic is float64
    share(&job.apply, job.itemsize, threads)
    run(apply_second_items, job, n_items(&job.apply), threads)
