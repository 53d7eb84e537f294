# A batch in slices along its samples, each normalized by itself, as ghost batches are: one job a slice. Small slices go
# to the threads as they are, large ones one after the other to all threads: no bit depends on it.
"""Passes over the slices of a batch. Internal."""
cimport numpy as cnp
from libc.stdlib cimport free, malloc

from .arrays cimport Layout, act_of, doubles, element_of, new_doubles
from .coefficients cimport REREAD_ROWS
from .engine cimport choose_stores, make_job, run, set_output, threads_for
from .job cimport Job, set_epilogue
from .scratch cimport divide_scratch, go_back_through, measure_and_apply_as_chosen, scratch_doubles
from .statistics cimport cbn_merge_moments

import numpy as np

cnp.import_array()

cdef enum:
    MANY = 4    # slices of each thread: fewer, and one may have much more to do than another

cdef struct Steps:    # bytes from a slice to the next one
    Py_ssize_t x, y, z, g, dh

# What `run` hands to its threads in the place of a job
cdef struct Slices:
    Job whole             # the first one; all have as many samples,
    Job rest              # but for this, the last one
    Py_ssize_t n
    Steps steps
    double *room_c        # scratch of each thread
    Py_ssize_t room
    double *mean_c        # (n, C) each, of the slices
    double *square_c      # forward m2; backward S(dh*(x - mean))
    double *invstd_c
    double *sum_c         # backward S(dh)


cdef void go_to(Job *job, const Steps *steps, Py_ssize_t k) noexcept nogil:
    """The k-th slice."""
    job.x.data += k * steps.x
    job.y.data += k * steps.y
    job.g.data += k * steps.g
    if job.z.data != NULL:
        job.z.data += k * steps.z
    if job.dh.data != NULL:
        job.dh.data += k * steps.dh


cdef void slice_items(Job *of, Py_ssize_t begin, Py_ssize_t end, int thread) noexcept nogil:
    cdef Slices *s = <Slices *>of
    cdef Py_ssize_t k, C = s.whole.reduction.C
    cdef double *room_c = s.room_c + thread * s.room
    cdef Job job
    for k in range(begin, end):
        job = s.whole if k < s.n - 1 else s.rest
        go_to(&job, &s.steps, k)
        divide_scratch(&job, room_c)
        job.square_c, job.invstd_c = s.square_c + k * C, s.invstd_c + k * C
        if job.backward:
            job.sum_c, job.shift_c = s.sum_c + k * C, s.mean_c + k * C
            if job.activated:
                go_back_through(&job, room_c + s.room - REREAD_ROWS * C)
        else:
            job.sum_c = s.mean_c + k * C
        measure_and_apply_as_chosen(&job)


cdef void run_slices(Slices *s, Py_ssize_t n_bytes) noexcept nogil:
    """n_bytes: of the whole batch."""
    cdef int threads = threads_for(n_bytes * (3 if s.whole.backward else 2), s.n)
    if s.n < MANY * threads:
        threads = 1
    s.whole.alone = s.rest.alone = threads > 1
    choose_stores_of_all(&s.whole, n_bytes)
    choose_stores_of_all(&s.rest, n_bytes)
    run(slice_items, <Job *>s, s.n, threads)


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
    s.steps.x, s.steps.y = step_of(x, axis, size), step_of(y, axis, size)
    s.steps.z, s.steps.g, s.steps.dh = step_of(residual, axis, size), s.steps.x, 0
    return s


cdef double *new_room(Slices *s, Py_ssize_t more, int threads) except NULL:
    """Scratch for each thread."""
    cdef double *room_c
    s.room = max(scratch_doubles(&s.whole), scratch_doubles(&s.rest)) + more
    room_c = <double *>malloc(threads * s.room * sizeof(double))
    if room_c == NULL:
        raise MemoryError()
    s.room_c = room_c
    return room_c


cdef void set_parameters(Slices *s, double *weight_c, double *bias_c, double eps) noexcept:
    s.whole.weight_c = s.rest.weight_c = weight_c
    s.whole.bias_c = s.rest.bias_c = bias_c
    s.whole.eps = s.rest.eps = eps


def normalize(tuple cut, cnp.ndarray x, cnp.ndarray y, cnp.ndarray weight, cnp.ndarray bias, double eps,
              bint in_float64=False, cnp.ndarray residual=None, act=None):
    """(mean, m2, invstd), each (n, C), of the slices, and y of them all; see `passes.normalize`.

    cut: (layout of a slice, layout of the last one, axis of the samples, samples of a slice, slices n).
    """
    cdef Slices s = slices_of(cut, x, y, in_float64, residual, act)
    cdef Py_ssize_t C = s.whole.reduction.C, n_bytes = cnp.PyArray_NBYTES(x)
    cdef cnp.ndarray mean = new_doubles(s.n * C), m2 = new_doubles(s.n * C), invstd = new_doubles(s.n * C)
    set_parameters(&s, doubles(weight, C), doubles(bias, C), eps)
    s.mean_c, s.square_c, s.invstd_c = doubles(mean, s.n * C), doubles(m2, s.n * C), doubles(invstd, s.n * C)
    new_room(&s, 0, threads_for(n_bytes * 2, s.n))
    with nogil:
        run_slices(&s, n_bytes)
    free(s.room_c)
    return mean.reshape(s.n, C), m2.reshape(s.n, C), invstd.reshape(s.n, C)


def gradients(tuple cut, cnp.ndarray dy, cnp.ndarray x, cnp.ndarray dx, cnp.ndarray mean, cnp.ndarray invstd,
              cnp.ndarray weight=None, cnp.ndarray bias=None, bint in_float64=False, cnp.ndarray residual=None,
              act=None, cnp.ndarray dh=None, bint keeps_dh=False):
    """(S(dh), S(dh*(x - mean)), dweight), the first two (n, C), the last summed; dx of all; see `passes.gradients`."""
    cdef Slices s = slices_of(cut, x, dx, in_float64, None if dh is None else residual, None if dh is None else act)
    cdef Py_ssize_t k, c, C = s.whole.reduction.C, n_bytes = cnp.PyArray_NBYTES(x)
    cdef Layout whole = cut[0]
    cdef Job *job
    cdef int i
    cdef cnp.ndarray sums = new_doubles(s.n * C), products = new_doubles(s.n * C), dweight = np.zeros(C)
    cdef double *dweight_c = doubles(dweight, C)
    set_parameters(&s, doubles(weight, C), doubles(bias, C), 0)
    for i in range(2):
        job = &s.rest if i else &s.whole
        job.backward = True
        job.g = whole.view(dy)
        if dh is not None:
            job.dh, job.keeps_dh = whole.view(dh), keeps_dh
    s.steps.g, s.steps.dh = step_of(dy, cut[2], cut[3]), step_of(dh, cut[2], cut[3])
    s.mean_c, s.invstd_c = doubles(mean, s.n * C), doubles(invstd, s.n * C)
    s.sum_c, s.square_c = doubles(sums, s.n * C), doubles(products, s.n * C)
    new_room(&s, REREAD_ROWS * C, threads_for(n_bytes * 3, s.n))
    with nogil:
        run_slices(&s, n_bytes)
    free(s.room_c)
    for k in range(s.n):
        for c in range(C):
            dweight_c[c] += s.square_c[k * C + c] * s.invstd_c[k * C + c]
    return sums.reshape(s.n, C), products.reshape(s.n, C), dweight


def merged(cnp.ndarray mean, cnp.ndarray m2, double size, double rest):
    """(count, mean, m2) of all slices together, merged in their order; the last one has `rest` values per channel."""
    cdef Py_ssize_t k, c, n = cnp.PyArray_DIM(mean, 0), C = cnp.PyArray_DIM(mean, 1)
    cdef cnp.ndarray room = np.zeros((6, C))
    cdef double *room_c = doubles(room, 6 * C)
    cdef double *mean_c = doubles(mean, n * C)
    cdef double *m2_c = doubles(m2, n * C)
    for k in range(n):
        for c in range(C):
            room_c[4 * C + c] = size if k < n - 1 else rest
        cbn_merge_moments(room_c, room_c + C, room_c + 2 * C, room_c + 3 * C, room_c + 4 * C, mean_c + k * C,
                          room_c + 5 * C, m2_c + k * C, 0, C)
    return room[0], room[1], room[3]
