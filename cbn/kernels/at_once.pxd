# Few rows: measure, merge, solve and apply in one loop (loops/few.h), for a tile of channels after the other.
from libc.math cimport fabs, sqrt

from .coefficients cimport CBN_SMALL_DOUBLE, CBN_SMALL_FLOAT, solve_backward, solve_forward
from .job cimport F32, F64, Job, count
from .kernels cimport cbn_solve, cbn_tile
from .partition cimport CACHE_LINE, Rectangle, n_partials, rectangle
from .tiles cimport apply_tile, brings_back, tile_of_output, tile_to_apply, tile_to_reduce

cdef enum:
    FEW_ROWS = 32    # of more, merge and solve are a small part of a call; backward, of 64, it took 5 % longer


cdef inline bint goes_at_once(const Job *job) noexcept nogil:
    """Whether all rows of a call are so few that a loop goes through all of them for each cache line of columns.

    Not in place, since coefficients may have to be applied again.
    """
    cdef char *g = job.g.data if job.dh.data == NULL else job.dh.data
    return job.reduction.rows and job.reduction.N <= FEW_ROWS and job.reduction.S == 1 and job.reduction.copies == 1 \
        and n_partials(&job.reduction) == 1 and (job.element == F64 or (job.element == F32 and not job.in_float64)) \
        and not job.counts and job.blend == NULL \
        and (not job.nontemporal or job.y.n * job.y_itemsize % CACHE_LINE == 0) \
        and job.y.data != job.x.data and job.y.data != g and job.y.data != job.z.data


cdef inline bint large_weights(const Job *job, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    """`may_overflow` of tiles.pxd before there are coefficients."""
    cdef Py_ssize_t c
    cdef double root = sqrt(count(job)), limit = CBN_SMALL_DOUBLE if job.itemsize == 8 else CBN_SMALL_FLOAT
    cdef bint large = False
    if job.weight_c == NULL:
        return not root < limit
    for c in range(first, end):
        large |= not fabs(job.weight_c[c]) * root < limit
    return large


cdef inline void solve_and_apply_again(Job *job, const Rectangle *r, cbn_tile *t) noexcept nogil:
    """From statistics, where float32 arithmetic does not do."""
    cdef Py_ssize_t C = job.reduction.C, end = r.c + r.n_channels
    if job.backward:
        solve_backward(job.coef_c, C, r.c, end, job.shift_c, job.invstd_c, job.weight_c, job.sum_c, job.square_c,
                       count(job))
    else:
        solve_forward(job.coef_c, C, r.c, end, job.sum_c, job.invstd_c, job.weight_c, job.bias_c)
    t[0] = tile_to_apply(job, r)
    apply_tile(job, t, True)


cdef inline void few_rows(Job *job, Py_ssize_t begin, Py_ssize_t end, int thread) noexcept nogil:
    cdef Py_ssize_t item
    cdef Rectangle r
    cdef cbn_tile reduction, applied
    cdef cbn_solve s
    s.eps = job.eps
    for item in range(begin, end):
        r = rectangle(&job.reduction, item)
        reduction = tile_to_reduce(job, &r)
        reduction.sum_c, reduction.square_c = job.sum_c + r.c, job.square_c + r.c
        applied = tile_of_output(job, &r)
        if brings_back(&applied):
            applied.checked = large_weights(job, r.c, r.c + r.n_channels)
        s.weight_c = job.weight_c + r.c if job.weight_c != NULL else NULL
        s.bias_c = job.bias_c + r.c if job.bias_c != NULL else NULL
        s.invstd_c = job.invstd_c + r.c
        # The next tile is to the right, or, of slices, below
        s.next = r.n_channels if r.c + r.n_channels < job.reduction.C else job.reduction.N * job.x.n - r.c
        if not (job.loops.backward_at_once if job.backward else job.loops.forward_at_once)(&applied, &reduction, &s):
            solve_and_apply_again(job, &r, &applied)
