# A batch in slices along its samples, each normalized by itself, as ghost batches are: one job a slice. Neighbours are
# a group, which adds up what is wanted of the whole batch while it is in a cache. Small slices go to the threads group
# by group, large ones one after the other to all threads: no bit depends on it.
"""Passes over the slices of a batch. Internal."""
cimport numpy as cnp
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from .arrays cimport Layout, act_of, doubles, element_of, new_doubles
from .coefficients cimport REREAD_ROWS
from .engine cimport choose_stores, make_job, run, set_output, threads_for
from .job cimport Job, set_epilogue
from .partition cimport ceil_div
from .scratch cimport divide_scratch, go_back_through, measure_and_apply_as_chosen, scratch_doubles
from .statistics cimport cbn_add, cbn_add_products, cbn_add_slice, cbn_merge_moments, cbn_moments_of_slices

import numpy as np

cnp.import_array()

cdef enum:
    GROUPS = 32    # at most, so many threads can have slices of their own;
    VALUES = 256   # of each channel of a group, at least: fewer, and to merge the groups is work of its own
    SUMS = 3       # rows of C sums of a group: forward those of `cbn_add_slice`; backward S(dh) and dweight
    OWN_ROWS = 2 + REREAD_ROWS    # of a thread: what a slice leaves, and the forward pass as backward reads it again

cdef struct Steps:    # bytes from a slice to the next one
    Py_ssize_t x, y, z, g, dh

# What `run` hands to its threads in the place of a job
cdef struct Slices:
    Job whole             # the first one; all have as many samples,
    Job rest              # but for this, the last one
    Py_ssize_t n
    Py_ssize_t group      # slices of a group
    Steps steps
    double *room_c        # scratch of each thread
    Py_ssize_t room
    double *mean_c        # (n, C) each, of the slices
    double *invstd_c
    double *sums          # (groups, SUMS, C); forward, one more
    double *m2_of_last    # forward, C


cdef void go_to(Job *job, const Steps *steps, Py_ssize_t k) noexcept nogil:
    """The k-th slice."""
    job.x.data += k * steps.x
    job.y.data += k * steps.y
    job.g.data += k * steps.g
    if job.z.data != NULL:
        job.z.data += k * steps.z
    if job.dh.data != NULL:
        job.dh.data += k * steps.dh


cdef Py_ssize_t n_groups(const Slices *s) noexcept nogil:
    return ceil_div(s.n, s.group)


cdef void slice_items(Job *of, Py_ssize_t begin, Py_ssize_t end, int thread) noexcept nogil:
    """Groups of slices."""
    cdef Slices *s = <Slices *>of
    cdef Py_ssize_t k, i, C = s.whole.reduction.C
    cdef double *room_c = s.room_c + thread * s.room
    cdef double *mine_c = room_c + s.room - OWN_ROWS * C
    cdef double *sums
    cdef Job job
    for i in range(begin, end):
        sums = s.sums + i * SUMS * C
        memset(sums, 0, SUMS * C * sizeof(double))
        for k in range(i * s.group, min(s.n, (i + 1) * s.group)):
            job = s.whole if k < s.n - 1 else s.rest
            go_to(&job, &s.steps, k)
            divide_scratch(&job, room_c)
            job.invstd_c, job.square_c = s.invstd_c + k * C, mine_c
            if job.backward:
                job.shift_c, job.sum_c = s.mean_c + k * C, mine_c + C
                if job.activated:
                    go_back_through(&job, mine_c + 2 * C)
            else:
                job.sum_c = s.mean_c + k * C
            measure_and_apply_as_chosen(&job)
            if job.backward:
                cbn_add(sums, job.sum_c, 0, C)
                cbn_add_products(sums + C, job.square_c, job.invstd_c, 0, C)
            elif k < s.n - 1:
                cbn_add_slice(sums, sums + C, sums + 2 * C, s.mean_c + i * s.group * C, job.sum_c, mine_c, 0, C)
            else:
                memcpy(s.m2_of_last, mine_c, C * sizeof(double))


cdef void run_slices(Slices *s, Py_ssize_t n_bytes) noexcept nogil:
    """n_bytes: of the whole batch. Threads have groups of their own, unless too many would wait for the last one and a
    slice is enough for all of them."""
    cdef Py_ssize_t traffic = n_bytes * (3 if s.whole.backward else 2), groups = n_groups(s)
    cdef int threads = threads_for(traffic, groups), of_slice = threads_for(traffic // s.n, s.whole.reduction.C)
    if of_slice >= threads and 4 * (ceil_div(groups, threads) * threads - groups) > groups:
        threads = 1
    s.whole.alone = s.rest.alone = threads > 1
    choose_stores_of_all(&s.whole, n_bytes)
    choose_stores_of_all(&s.rest, n_bytes)
    run(slice_items, <Job *>s, groups, threads)


cdef void make_slice(Job *job, Layout layout, cnp.ndarray x, cnp.ndarray y, bint in_float64, cnp.ndarray residual,
                     act) except *:
    """A job for a slice of this layout at the start of the arrays."""
    job[0] = make_job(&layout.extents, layout.view(x), element_of(x), cnp.PyArray_ITEMSIZE(x), in_float64)
    set_epilogue(job, job.z if residual is None else layout.view(residual), act_of(act))
    set_output(job, &layout.extents, layout.view(y), cnp.PyArray_ITEMSIZE(y))


cdef void choose_stores_of_all(Job *job, Py_ssize_t n_bytes) noexcept nogil:
    """As for the whole batch: all of it is written before anybody reads it."""
    cdef Py_ssize_t of_slice = job.n_bytes
    job.n_bytes = n_bytes
    choose_stores(job)
    job.n_bytes = of_slice


cdef Py_ssize_t step_of(cnp.ndarray a, int axis, Py_ssize_t size) except? -1:
    return 0 if a is None else cnp.PyArray_STRIDE(a, axis) * size


cdef Slices slices_of(tuple cut, cnp.ndarray x, cnp.ndarray y, bint in_float64, cnp.ndarray residual, act) except *:
    """cut: layouts of a slice and of the last one, the axis of the samples, how many a slice has, how many slices."""
    cdef Slices s
    cdef Layout whole = cut[0], rest = cut[1]
    cdef int axis = cut[2]
    cdef Py_ssize_t size = cut[3]
    s.n = cut[4]
    make_slice(&s.whole, whole, x, y, in_float64, residual, act)
    make_slice(&s.rest, rest, x, y, in_float64, residual, act)
    s.group = max(ceil_div(s.n, GROUPS), ceil_div(VALUES, s.whole.reduction.N * s.whole.reduction.S))
    s.steps.x, s.steps.y = step_of(x, axis, size), step_of(y, axis, size)
    s.steps.z, s.steps.g, s.steps.dh = step_of(residual, axis, size), s.steps.x, 0
    return s


cdef void set_parameters(Slices *s, double *weight_c, double *bias_c, double eps) noexcept:
    s.whole.weight_c = s.rest.weight_c = weight_c
    s.whole.bias_c = s.rest.bias_c = bias_c
    s.whole.eps = s.rest.eps = eps


cdef int run_all(Slices *s, Py_ssize_t n_bytes) except -1:
    """With scratch for each thread."""
    cdef int threads = threads_for(n_bytes * 3, s.n)
    s.room = max(scratch_doubles(&s.whole), scratch_doubles(&s.rest)) + OWN_ROWS * s.whole.reduction.C
    s.room_c = <double *>malloc(threads * s.room * sizeof(double))
    if s.room_c == NULL:
        raise MemoryError()
    with nogil:
        run_slices(s, n_bytes)
    free(s.room_c)
    return 0


def normalize(tuple cut, cnp.ndarray x, cnp.ndarray y, cnp.ndarray weight, cnp.ndarray bias, double eps,
              double count, bint in_float64=False, cnp.ndarray residual=None, act=None):
    """(mean, invstd) of the slices, each (n, C), then (mean, m2) of them together; and y. See `passes.normalize`.

    cut: (layout of a slice, layout of the last one, axis of the samples, samples of a slice, slices n).
    count: values of a channel.
    """
    cdef Slices s = slices_of(cut, x, y, in_float64, residual, act)
    cdef Py_ssize_t C = s.whole.reduction.C
    cdef cnp.ndarray mean = new_doubles(s.n * C), invstd = new_doubles(s.n * C), m2_of_last = new_doubles(C)
    cdef cnp.ndarray sums = new_doubles((n_groups(&s) + 1) * SUMS * C), whole = np.zeros((5, C))
    set_parameters(&s, doubles(weight, C), doubles(bias, C), eps)
    s.mean_c, s.invstd_c = doubles(mean, s.n * C), doubles(invstd, s.n * C)
    s.sums, s.m2_of_last = doubles(sums, sums.size), doubles(m2_of_last, C)
    run_all(&s, cnp.PyArray_NBYTES(x))
    merge_groups(&s, count, doubles(whole, 5 * C))
    return mean.reshape(s.n, C), invstd.reshape(s.n, C), whole[0], whole[1]


cdef void merge_groups(Slices *s, double count, double *whole_c) noexcept:
    """(mean, m2) of all slices together; whole_c is (5, C), of zeros.

    Groups are as many slices as any other, and so are slices of them all, but for the last group and the last slice.
    """
    cdef Py_ssize_t i, alike = (s.n - 1) // s.group, rest = (s.n - 1) % s.group, C = s.whole.reduction.C
    cdef double size = s.whole.reduction.N * s.whole.reduction.S
    cdef double *first = s.sums
    cdef double *sums
    for i in range(alike + (rest > 0)):
        sums = s.sums + i * SUMS * C
        cbn_moments_of_slices(sums, sums + C, sums + 2 * C, s.mean_c + i * s.group * C, s.group if i < alike else rest,
                              size, 0, C)
    if alike > 1:
        first = s.sums + n_groups(s) * SUMS * C
        memset(first, 0, SUMS * C * sizeof(double))
        for i in range(alike):
            sums = s.sums + i * SUMS * C
            cbn_add_slice(first, first + C, first + 2 * C, s.sums, sums, sums + 2 * C, 0, C)
        cbn_moments_of_slices(first, first + C, first + 2 * C, s.sums, alike, s.group * size, 0, C)
    if alike:
        merge_part(whole_c, alike * s.group * size, first, first + C, first + 2 * C, C)
    if rest:
        sums = s.sums + alike * SUMS * C
        merge_part(whole_c, rest * size, sums, sums + C, sums + 2 * C, C)
    memset(s.sums, 0, C * sizeof(double))
    merge_part(whole_c, count - (s.n - 1) * size, s.mean_c + (s.n - 1) * C, s.sums, s.m2_of_last, C)


cdef void merge_part(double *whole_c, double count, double *mean_c, double *low_c, double *m2_c,
                     Py_ssize_t C) noexcept:
    """whole_c: (mean, m2, low, count, room for a count)."""
    cdef Py_ssize_t c
    for c in range(C):
        whole_c[4 * C + c] = count
    cbn_merge_moments(whole_c + 3 * C, whole_c, whole_c + 2 * C, whole_c + C, whole_c + 4 * C, mean_c, low_c, m2_c, 0,
                      C)


def gradients(tuple cut, cnp.ndarray dy, cnp.ndarray x, cnp.ndarray dx, cnp.ndarray mean, cnp.ndarray invstd,
              cnp.ndarray weight=None, cnp.ndarray bias=None, bint in_float64=False, cnp.ndarray residual=None,
              act=None, cnp.ndarray dh=None, bint keeps_dh=False):
    """(dweight, dbias) of all slices together; and dx. See `passes.gradients`."""
    cdef Slices s = slices_of(cut, x, dx, in_float64, None if dh is None else residual, None if dh is None else act)
    cdef Py_ssize_t i, C = s.whole.reduction.C
    cdef Layout whole = cut[0]
    cdef Job *job
    cdef cnp.ndarray sums = new_doubles(n_groups(&s) * SUMS * C), total = np.zeros((2, C))
    set_parameters(&s, doubles(weight, C), doubles(bias, C), 0)
    for i in range(2):
        job = &s.rest if i else &s.whole
        job.backward = True
        job.g = whole.view(dy)
        if dh is not None:
            job.dh, job.keeps_dh = whole.view(dh), keeps_dh
    s.steps.g, s.steps.dh = step_of(dy, cut[2], cut[3]), step_of(dh, cut[2], cut[3])
    s.mean_c, s.invstd_c = doubles(mean, s.n * C), doubles(invstd, s.n * C)
    s.sums = doubles(sums, sums.size)
    run_all(&s, cnp.PyArray_NBYTES(x))
    for i in range(n_groups(&s)):
        cbn_add(doubles(total, 2 * C), s.sums + i * SUMS * C, 0, 2 * C)
    return total[1], total[0]
