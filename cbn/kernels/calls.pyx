# Whole calls of the functions, compiled: what most calls are like is recognized here, and done without Python code.
"""Calls of the functions on plain arrays. Internal; `cbn.functional` is the way in.

Each function here answers for arguments of the kind that most calls have, and returns None for all others, which Python
code then checks, converts or refuses. The kind: x, out, residual and dy are ndarrays of one type that the loops read,
native, aligned, with the same strides and no gaps; what is per channel is contiguous float32 or float64 (C,); numbers
are Python's floats, and in range; no two arrays overlap but as one and the same. A call does what Python code would do,
to the last bit.

What is derived from type, shape and strides alone (layout, partition, loops) is kept for the calls that follow, in a
table that needs no Python object to be looked up in.
"""
cimport cython
cimport numpy as cnp
from libc.math cimport isfinite, sqrt
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from .arrays cimport MAXDIMS, Layout, element_of, empty_like, is_plain, new_doubles
from .channels cimport move_running
from .coefficients cimport FORWARD_ROWS, solve_forward
from .engine cimport (
    SMALL,
    apply,
    apply_here,
    generation,
    make_job,
    set_coefficients,
    set_epilogue,
    set_output,
    stores_nontemporal,
)
from .job cimport Job
from .kernels cimport cbn_view
from .scratch cimport divide_scratch, measure_and_apply_with_memory, scratch_doubles

cnp.import_array()

cdef enum:
    KEPT = 64    # kinds of array in the table, a power of two


# ---- what a kind of array needs --------------------------------------------------------------------------------

@cython.final
cdef class Prepared:
    """What the passes need for arrays of one type, shape, strides and channel axis, whatever their values."""
    cdef Job job                  # with y at x
    cdef Layout layout
    cdef Py_ssize_t generation    # of the engine's settings
    cdef Py_ssize_t extent        # bytes from the first element to the end of the last
    cdef int n_axes, type_num, channel_axis
    cdef Py_ssize_t shape[MAXDIMS]
    cdef Py_ssize_t strides[MAXDIMS]

    @staticmethod
    cdef Prepared of(cnp.ndarray x, int channel_axis):
        """None for an array that is empty or has gaps, of another type, or that no loop reads as it lies."""
        cdef Prepared self
        cdef Layout layout
        cdef cbn_view view
        cdef int axis, own_axis = channel_axis + cnp.PyArray_NDIM(x) if channel_axis < 0 else channel_axis
        if not 0 <= own_axis < cnp.PyArray_NDIM(x) or cnp.PyArray_NDIM(x) < 2 or cnp.PyArray_SIZE(x) == 0 \
                or not (is_plain(x) or (x.dtype.name == "bfloat16" and is_usual(x))):
            return None
        layout = Layout.of(x, own_axis)
        if layout is None:
            return None
        self = Prepared()
        self.n_axes, self.type_num, self.channel_axis = cnp.PyArray_NDIM(x), cnp.PyArray_TYPE(x), channel_axis
        self.extent = cnp.PyArray_ITEMSIZE(x)
        for axis in range(self.n_axes):
            self.shape[axis], self.strides[axis] = cnp.PyArray_DIM(x, axis), cnp.PyArray_STRIDE(x, axis)
            if self.strides[axis] < 0:
                return None
            self.extent += (self.shape[axis] - 1) * self.strides[axis]
        if self.extent != cnp.PyArray_NBYTES(x):    # a new array has no gaps, so its strides would be others
            return None
        self.layout, self.generation = layout, generation
        view = layout.view(x)
        self.job = make_job(&layout.extents, view, element_of(x), cnp.PyArray_ITEMSIZE(x), False)
        set_output(&self.job, &layout.extents, view, cnp.PyArray_ITEMSIZE(x))
        return self

    cdef bint is_for(self, cnp.ndarray a) noexcept:
        """Whether an array is of this kind."""
        cdef int axis
        if cnp.PyArray_NDIM(a) != self.n_axes or cnp.PyArray_TYPE(a) != self.type_num or not is_usual(a):
            return False
        for axis in range(self.n_axes):
            if cnp.PyArray_DIM(a, axis) != self.shape[axis] or cnp.PyArray_STRIDE(a, axis) != self.strides[axis]:
                return False
        return True

    cdef bint takes(self, object a) noexcept:
        """Whether something is an array of this kind."""
        return type(a) is cnp.ndarray and self.is_for(<cnp.ndarray>a)

    cdef bint overlap_partly(self, cnp.ndarray a, cnp.ndarray b) noexcept:
        """Whether two arrays of this kind share memory, but are not one and the same."""
        cdef char *of_a = cnp.PyArray_BYTES(a)
        cdef char *of_b = cnp.PyArray_BYTES(b)
        return of_a != of_b and of_a < of_b + self.extent and of_b < of_a + self.extent

    cdef bint covers(self, cnp.ndarray a, cnp.ndarray of_channels) noexcept:
        """Whether an array of this kind may overlap one that is contiguous, or None."""
        if of_channels is None:
            return False
        return cnp.PyArray_BYTES(a) < cnp.PyArray_BYTES(of_channels) + cnp.PyArray_NBYTES(of_channels) \
            and cnp.PyArray_BYTES(of_channels) < cnp.PyArray_BYTES(a) + self.extent


cdef list kept = [None] * KEPT


cdef bint is_usual(cnp.ndarray a) noexcept:
    return cnp.PyArray_ISALIGNED(a) and cnp.PyArray_ISNOTSWAPPED(a)


cdef Prepared prepared_for(object x, object channel_axis):
    """What is kept for arrays like x, or made now; None if this file does not answer for x."""
    cdef Prepared found
    cdef cnp.ndarray a
    cdef size_t h
    cdef int axis, wanted
    if type(x) is not cnp.ndarray or type(channel_axis) is not int or not -MAXDIMS <= channel_axis < MAXDIMS:
        return None
    a, wanted = x, channel_axis
    h = cnp.PyArray_TYPE(a) + 31 * (wanted + MAXDIMS)
    for axis in range(cnp.PyArray_NDIM(a)):
        h = (h ^ <size_t>cnp.PyArray_DIM(a, axis)) * 1000003 + <size_t>cnp.PyArray_STRIDE(a, axis)
    h = (h ^ h >> 15 ^ h >> 32) % KEPT
    found = <Prepared>kept[h]
    if found is None or found.generation != generation or found.channel_axis != wanted or not found.is_for(a):
        found = Prepared.of(a, wanted)
        if found is not None:
            kept[h] = found
    return found


# ---- arguments -------------------------------------------------------------------------------------------------

cdef bint is_per_channel(object a, Py_ssize_t C, bint written) noexcept:
    """Whether it is None, or a contiguous float32 or float64 array (C,)."""
    cdef cnp.ndarray v
    if a is None:
        return True
    if type(a) is not cnp.ndarray:
        return False
    v = <cnp.ndarray>a
    return cnp.PyArray_NDIM(v) == 1 and cnp.PyArray_DIM(v, 0) == C and cnp.PyArray_ISCARRAY_RO(v) \
        and (cnp.PyArray_TYPE(v) == cnp.NPY_FLOAT or cnp.PyArray_TYPE(v) == cnp.NPY_DOUBLE) \
        and (not written or cnp.PyArray_ISWRITEABLE(v))


cdef bint is_epsilon(object eps, bint batch_statistics) noexcept:
    if type(eps) is not float or not isfinite(<double>eps):
        return False
    return <double>eps > 0 or (<double>eps == 0 and not batch_statistics)


cdef bint is_momentum(object momentum) noexcept:
    return type(momentum) is float and 0 <= <double>momentum <= 1


cdef bint slope_of(object activation, double *slope) noexcept:
    """Whether the activation is None or "relu", and its factor for negative values."""
    slope[0] = 1
    if activation is None:
        return True
    slope[0] = 0
    return type(activation) is str and <str>activation == "relu"


cdef bint is_wider(Prepared p, object a) noexcept:
    """Whether parameters ask for float64 arithmetic."""
    return a is not None and cnp.PyArray_TYPE(<cnp.ndarray>a) == cnp.NPY_DOUBLE and p.type_num != cnp.NPY_DOUBLE


cdef double *copied(double *room_c, object a, Py_ssize_t C) noexcept:
    """Float64 copies of values per channel; NULL for None."""
    cdef Py_ssize_t c
    cdef float *of
    if a is None:
        return NULL
    if cnp.PyArray_TYPE(<cnp.ndarray>a) == cnp.NPY_DOUBLE:
        memcpy(room_c, cnp.PyArray_DATA(<cnp.ndarray>a), C * sizeof(double))
    else:
        of = <float *>cnp.PyArray_DATA(<cnp.ndarray>a)
        for c in range(C):
            room_c[c] = of[c]
    return room_c


cdef bint set_arrays(Prepared p, Job *job, cnp.ndarray x, object out, object residual, double slope) noexcept:
    """Let the job read x and residual; False if `out` or residual is not for it."""
    cdef cbn_view z
    job[0] = p.job
    job.x.data = job.g.data = cnp.PyArray_BYTES(x)
    if out is not None and (not p.takes(out) or not cnp.PyArray_ISWRITEABLE(<cnp.ndarray>out)
                            or p.overlap_partly(x, <cnp.ndarray>out)):
        return False
    if residual is not None:
        if not p.takes(residual) or (out is not None and p.overlap_partly(<cnp.ndarray>residual, <cnp.ndarray>out)):
            return False
        z = job.x
        z.data = cnp.PyArray_BYTES(<cnp.ndarray>residual)
        set_epilogue(job, z, slope)
    elif slope != 1:
        set_epilogue(job, job.z, slope)
    return True


# ---- forward ---------------------------------------------------------------------------------------------------

def evaluate(x, weight, bias, running_mean, running_var, momentum, eps, channel_axis, out, activation, residual):
    """y of `functional.batch_norm` in evaluation, or None."""
    cdef Prepared p = prepared_for(x, channel_axis)
    cdef Job job
    cdef Py_ssize_t c, C
    cdef double slope, epsilon
    cdef double *room_c
    cdef double *mean_c
    cdef double *invstd_c
    cdef double *weight_c
    cdef double *bias_c
    cdef cnp.ndarray y
    if p is None or running_mean is None or running_var is None:
        return None
    C = p.layout.extents.C
    if not (is_per_channel(running_mean, C, False) and is_per_channel(running_var, C, False)
            and is_per_channel(weight, C, False) and is_per_channel(bias, C, False)
            and is_epsilon(eps, False) and is_momentum(momentum) and slope_of(activation, &slope)
            and set_arrays(p, &job, x, out, residual, slope)):
        return None
    y = empty_like(x) if out is None else out
    room_c = <double *>malloc((FORWARD_ROWS + 4) * C * sizeof(double))
    if room_c == NULL:
        return None
    epsilon = eps
    mean_c, invstd_c = copied(room_c + 3 * C, running_mean, C), copied(room_c + 4 * C, running_var, C)
    weight_c, bias_c = copied(room_c + 5 * C, weight, C), copied(room_c + 6 * C, bias, C)
    for c in range(C):
        invstd_c[c] = 1 / sqrt(invstd_c[c] + epsilon)
    for c in range(C):
        solve_forward(room_c, C, c, mean_c[c], invstd_c[c], 1 if weight_c == NULL else weight_c[c],
                      0 if bias_c == NULL else bias_c[c])
    job.in_float64 |= is_wider(p, running_mean) or is_wider(p, running_var) or is_wider(p, weight) or is_wider(p, bias)
    job.y.data = cnp.PyArray_BYTES(y)
    set_coefficients(&job, room_c)
    job.nontemporal = stores_nontemporal(&job)
    if job.n_bytes < SMALL:
        apply_here(&job)
    else:
        with nogil:
            apply(&job)
    free(room_c)
    return y


def train(x, weight, bias, running_mean, running_var, momentum, eps, channel_axis, out, activation, residual):
    """(y, mean, invstd) of `functional.native_batch_norm` in training, after the running statistics moved; or None."""
    cdef Prepared p = prepared_for(x, channel_axis)
    cdef Job job
    cdef Py_ssize_t C, count
    cdef double slope
    cdef double *room_c
    cdef cnp.ndarray y, mean, invstd, m2
    if p is None or (running_mean is None) != (running_var is None):
        return None
    C, count = p.layout.extents.C, p.layout.extents.N * p.layout.extents.S
    if not (is_per_channel(running_mean, C, True) and is_per_channel(running_var, C, True)
            and is_per_channel(weight, C, False) and is_per_channel(bias, C, False)
            and count > 1 and is_epsilon(eps, True) and is_momentum(momentum) and slope_of(activation, &slope)
            and set_arrays(p, &job, x, out, residual, slope)):
        return None
    if out is not None and (p.covers(out, running_mean) or p.covers(out, running_var)):
        return None
    mean, invstd, m2 = new_doubles(C), new_doubles(C), new_doubles(C)
    y = empty_like(x) if out is None else out
    room_c = <double *>malloc((scratch_doubles(&job) + 2 * C) * sizeof(double))
    if room_c == NULL:
        return None
    job.weight_c, job.bias_c = copied(room_c, weight, C), copied(room_c + C, bias, C)
    divide_scratch(&job, room_c + 2 * C)
    job.sum_c, job.square_c = <double *>cnp.PyArray_DATA(mean), <double *>cnp.PyArray_DATA(m2)
    job.invstd_c, job.eps = <double *>cnp.PyArray_DATA(invstd), eps
    job.in_float64 |= is_wider(p, weight) or is_wider(p, bias)
    job.y.data = cnp.PyArray_BYTES(y)
    if job.n_bytes < SMALL:
        measure_and_apply_with_memory(&job)
    else:
        with nogil:
            measure_and_apply_with_memory(&job)
    free(room_c)
    if running_mean is not None:
        move_running(running_mean, running_var, None, mean, m2, count, momentum)
    return y, mean, invstd


# ---- backward --------------------------------------------------------------------------------------------------

def gradients(dy, x, weight, save_mean, save_invstd, channel_axis, out):
    """(dx, dweight, dbias) of `functional.native_batch_norm_backward` through the statistics of the batch; or None."""
    cdef Prepared p = prepared_for(x, channel_axis)
    cdef Job job
    cdef Py_ssize_t c, C
    cdef double *room_c
    cdef cnp.ndarray dx, dweight, dbias
    if p is None or save_mean is None or save_invstd is None or not p.takes(dy):
        return None
    C = p.layout.extents.C
    if not (is_per_channel(save_mean, C, False) and is_per_channel(save_invstd, C, False)
            and is_per_channel(weight, C, False) and set_arrays(p, &job, x, out, None, 1)):
        return None
    if out is not None and p.overlap_partly(dy, out):
        return None
    dx = empty_like(x) if out is None else out
    dweight, dbias = new_gradient(C, p, weight), new_gradient(C, p, weight)
    room_c = <double *>malloc((scratch_doubles(&job) + 5 * C) * sizeof(double))
    if room_c == NULL:
        return None
    divide_scratch(&job, room_c + 5 * C)
    job.backward = True
    job.g.data, job.y.data = cnp.PyArray_BYTES(<cnp.ndarray>dy), cnp.PyArray_BYTES(dx)
    job.shift_c, job.invstd_c = copied(room_c, save_mean, C), copied(room_c + C, save_invstd, C)
    job.weight_c = copied(room_c + 2 * C, weight, C)
    job.sum_c, job.square_c = room_c + 3 * C, room_c + 4 * C
    job.in_float64 |= is_wider(p, weight)
    if job.n_bytes < SMALL:
        measure_and_apply_with_memory(&job)
    else:
        with nogil:
            measure_and_apply_with_memory(&job)
    for c in range(C):
        job.square_c[c] *= job.invstd_c[c]
    round_into(dbias, job.sum_c, C)
    round_into(dweight, job.square_c, C)
    free(room_c)
    return dx, dweight, dbias


cdef cnp.ndarray new_gradient(cnp.npy_intp C, Prepared p, object weight):
    """Memory for the gradient of a parameter: of weight's type, or without one of x's, but at least float32."""
    cdef int type_num = p.type_num if weight is None else cnp.PyArray_TYPE(<cnp.ndarray>weight)
    return cnp.PyArray_SimpleNew(1, &C, cnp.NPY_DOUBLE if type_num == cnp.NPY_DOUBLE else cnp.NPY_FLOAT)


cdef void round_into(cnp.ndarray a, const double *values, Py_ssize_t C) noexcept:
    """What overflows becomes infinite."""
    cdef Py_ssize_t c
    cdef float *to
    if cnp.PyArray_TYPE(a) == cnp.NPY_DOUBLE:
        memcpy(cnp.PyArray_DATA(a), values, C * sizeof(double))
    else:
        to = <float *>cnp.PyArray_DATA(a)
        for c in range(C):
            to[c] = <float>values[c]
