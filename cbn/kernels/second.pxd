# Second derivatives: measure, solve and apply over three arrays, x, g = dy and z = ggI. In the job z has the place of
# the residual, and dh, the gradient of x, that of dy times the slope of an activation.
from libc.string cimport memcpy

from .coefficients cimport solve_second, solve_tangent
from .engine cimport choose_tiles, run, threads_for
from .job cimport Job, count
from .kernels cimport CBN_SECOND_SUMS, CBN_SHIFT_G, CBN_SHIFT_MEAN, CBN_SHIFT_Z, cbn_loop, cbn_tile, cbn_view
from .partition cimport Rectangle, item_of, most_items, n_items, n_partials, rectangle, share
from .statistics cimport cbn_add, choose_shifts
from .tiles cimport moved, tile_to_apply, tile_to_reduce

# What `run` hands to its threads in the place of a job
cdef struct Second:
    Job job               # partial begins with the sums of the whole; shift_c is (CBN_SECOND_SHIFTS, C)
    bint measures         # through the statistics of the batch
    double *mean_c
    double *invstd_c
    double *weight_c      # NULL: ones
    double *weight_t_c    # NULL: zeros
    double *bias_t_c      # NULL: zeros
    double *dweight_c     # made, if there is a dh
    double *memory_c      # C


cdef inline cbn_loop second_loop(const Job *job, bint rows) noexcept nogil:
    return job.loops.second_rows if rows else job.loops.second_runs


cdef inline Py_ssize_t second_doubles(const Job *job) noexcept nogil:
    """How many float64 values the partial sums are."""
    return job.reduction.C * CBN_SECOND_SUMS * n_partials(&job.reduction)


cdef inline void measure_second_item(Job *job, Py_ssize_t item) noexcept nogil:
    cdef Rectangle r = rectangle(&job.reduction, item)
    cdef cbn_tile t = tile_to_reduce(job, &r)
    second_loop(job, job.reduction.rows)(NULL, &t)


cdef inline void apply_second_item(Job *job, const Rectangle *r, bint rows) noexcept nogil:
    cdef cbn_tile t = tile_to_apply(job, r)
    t.dh = moved(job.dh, job.itemsize, r)
    second_loop(job, rows)(&t, NULL)


cdef inline void shifts_of(const Second *s, cbn_view v, double *shift_c, Py_ssize_t first,
                           Py_ssize_t end) noexcept nogil:
    """A value near those of each channel, as forward reductions subtract."""
    cdef Job other = s.job
    other.x, other.shift_c, other.sums_in_float64_c = v, shift_c, s.memory_c
    choose_shifts(&other, first, end)


cdef inline void begin_second(Second *s, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    """What the reduction of some channels subtracts."""
    cdef Py_ssize_t C = s.job.reduction.C
    cdef double *shifts_c = s.job.shift_c
    shifts_of(s, s.job.g, shifts_c + CBN_SHIFT_G * C, first, end)
    shifts_of(s, s.job.z, shifts_c + CBN_SHIFT_Z * C, first, end)
    memcpy(shifts_c + CBN_SHIFT_MEAN * C + first, s.mean_c + first, (end - first) * sizeof(double))


cdef inline void end_second(Second *s, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    """Merge and solve: partial sums are added in an order that their number alone decides."""
    cdef Job *job = &s.job
    cdef Py_ssize_t i, k, half, C = job.reduction.C, all_rows = CBN_SECOND_SUMS * C, blocks = n_partials(&job.reduction)
    cdef double *sums = job.partial if s.measures else NULL
    while s.measures and blocks > 1:    # one half to the other: so that each has few additions
        half = (blocks + 1) // 2
        for k in range(blocks - half):
            for i in range(CBN_SECOND_SUMS):
                cbn_add(sums + all_rows * k + i * C, sums + all_rows * (k + half) + i * C, first, end)
        blocks = half
    solve_tangent(job.coef_c, C, first, end, s.mean_c, s.invstd_c, s.weight_c, s.weight_t_c, s.bias_t_c, sums,
                  job.shift_c, count(job))
    if job.dh.data != NULL:
        solve_second(job.coef_c, s.dweight_c, C, first, end, s.invstd_c, s.weight_c, s.weight_t_c, sums, job.shift_c,
                     count(job))


cdef inline void measure_second_items(Job *job, Py_ssize_t begin, Py_ssize_t end, int thread) noexcept nogil:
    cdef Py_ssize_t item
    for item in range(begin, end):
        measure_second_item(job, item)


cdef inline void apply_second_items(Job *job, Py_ssize_t begin, Py_ssize_t end, int thread) noexcept nogil:
    """The last item first: apply starts with what the reduction before it has left in the cache."""
    cdef Py_ssize_t item
    cdef Rectangle r
    for item in range(end - 1, begin - 1, -1):
        r = rectangle(&job.apply, item)
        apply_second_item(job, &r, job.apply.rows)


cdef inline void second_tiles(Job *of, Py_ssize_t begin, Py_ssize_t end, int thread) noexcept nogil:
    """All values of some channels, one tile after the other, so that memory is read once."""
    cdef Second *s = <Second *>of
    cdef Job *job = &s.job
    cdef Py_ssize_t tile, k, blocks = n_partials(&job.reduction)
    cdef Rectangle r
    for tile in range(begin, end):
        r = rectangle(&job.reduction, item_of(&job.reduction, tile, 0))
        begin_second(s, r.c, r.c + r.n_channels)
        for k in range(blocks):
            measure_second_item(job, item_of(&job.reduction, tile, k))
        end_second(s, r.c, r.c + r.n_channels)
        for k in range(blocks - 1, -1, -1):
            r = rectangle(&job.reduction, item_of(&job.reduction, tile, k))
            apply_second_item(job, &r, job.reduction.rows)


cdef inline void run_second(Second *s) noexcept nogil:
    """y, and dh and dweight if there is a dh: tile by tile, or in two passes."""
    cdef Job *job = &s.job
    cdef Py_ssize_t n_bytes = job.n_bytes * (3 if job.dh.data == NULL else 5), C = job.reduction.C
    cdef int threads
    job.fits = True    # the arithmetic is float64
    job.partial_rows = CBN_SECOND_SUMS
    if s.measures:
        choose_tiles(job, 3)
    if s.measures and job.fused:
        run(second_tiles, <Job *>s, job.reduction.tiles, job.threads)
        return
    if s.measures:
        threads = threads_for(3 * job.n_bytes, most_items(&job.reduction, job.itemsize))
        share(&job.reduction, job.itemsize, threads)
        begin_second(s, 0, C)
        run(measure_second_items, job, n_items(&job.reduction), threads)
    end_second(s, 0, C)
    threads = threads_for(n_bytes, most_items(&job.apply, job.itemsize))
    share(&job.apply, job.itemsize, threads)
    run(apply_second_items, job, n_items(&job.apply), threads)
