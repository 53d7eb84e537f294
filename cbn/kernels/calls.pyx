# Whole calls of functions and layers, compiled: what most calls are like is recognized here and done without Python.
"""Calls of functions and layers on plain arrays. Internal; `cbn.functional` and `cbn.batchnorm` are the ways in.

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
from libc.math cimport INFINITY, isfinite
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from .arrays cimport (
    MAXDIMS,
    Input,
    Layout,
    act_of,
    element_of,
    empty_like,
    is_of,
    is_plain,
    is_usual,
    kind_of,
    new_doubles,
    overlap_partly,
    view_of,
)
from .channels cimport move_running
from .coefficients cimport FORWARD_ROWS, inverse_std, solve_forward
from .engine cimport (
    SMALL,
    choose_and_apply,
    generation,
    make_job,
    set_coefficients,
    set_output,
)
from .job cimport Job, is_identity, set_epilogue
from .kernels cimport cbn_act, cbn_view
from .scratch cimport divide_scratch, measure_and_apply_with_memory, scratch_doubles

cnp.import_array()

cdef enum:
    KEPT = 64    # kinds of array in the table, a power of two


# ---- what a kind of array needs --------------------------------------------------------------------------------

@cython.final
cdef class Prepared:
    """What the passes need for arrays of one type, shape, strides and channel axis, whatever their values."""
    @staticmethod
    cdef Prepared of(cnp.ndarray x, int channel_axis):
        """None for an array that is empty or has gaps, of another type, or that no loop reads as it lies."""
        cdef Prepared self
        cdef Layout layout
        cdef cbn_view view
        cdef int own_axis = channel_axis + cnp.PyArray_NDIM(x) if channel_axis < 0 else channel_axis
        if not 0 <= own_axis < cnp.PyArray_NDIM(x) or cnp.PyArray_NDIM(x) < 2 or cnp.PyArray_SIZE(x) == 0 \
                or not (is_plain(x) or (x.dtype.name == "bfloat16" and is_usual(x))):
            return None
        layout = Layout.of(x, own_axis)
        if layout is None:
            return None
        self = Prepared()
        self.kind, self.channel_axis = kind_of(x), channel_axis
        if self.kind.extent != cnp.PyArray_NBYTES(x):    # a new array has no gaps, so its strides would be others
            return None
        self.layout, self.generation = layout, generation
        view = layout.view(x)
        self.job = make_job(&layout.extents, view, element_of(x), cnp.PyArray_ITEMSIZE(x), False)
        set_output(&self.job, &layout.extents, view, cnp.PyArray_ITEMSIZE(x))
        return self

    cdef bint takes(self, object a) noexcept:
        """Whether something is an array of this kind."""
        return type(a) is cnp.ndarray and is_of(&self.kind, <cnp.ndarray>a)

    cdef bint overlap(self, cnp.ndarray a, cnp.ndarray b) noexcept:
        """Whether two arrays of this kind share memory, but are not one and the same."""
        return overlap_partly(a, b, self.kind.extent, True)

    cdef Input input_of(self, cnp.ndarray x, bint is_double):
        """An array of this kind as other code reads it. The view is for whoever reshapes x in place."""
        cdef Input inp = Input.__new__(Input)
        inp.x, inp.layout, inp.axis = view_of(x), self.layout, self.layout.channel_axis
        inp.n_channels = self.layout.extents.C
        inp.in_float64 = is_double and self.kind.type_num != cnp.NPY_DOUBLE
        return inp

    cdef bint covers(self, cnp.ndarray a, cnp.ndarray of_channels) noexcept:
        """Whether an array of this kind may overlap one that is contiguous, or None."""
        if of_channels is None:
            return False
        return cnp.PyArray_BYTES(a) < cnp.PyArray_BYTES(of_channels) + cnp.PyArray_NBYTES(of_channels) \
            and cnp.PyArray_BYTES(of_channels) < cnp.PyArray_BYTES(a) + self.kind.extent


cdef list kept = [None] * KEPT


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
    if found is None or found.generation != generation or found.channel_axis != wanted or not is_of(&found.kind, a):
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


cdef bint find_act(object activation, cbn_act *act) noexcept:
    """Whether the activation is None, "relu" or ("clip", low, high) of floats; then what it is."""
    act[0].slope, act[0].low, act[0].high = 1, -INFINITY, INFINITY
    if activation is None:
        return True
    if type(activation) is str:
        act[0].slope = 0
        return <str>activation == "relu"
    if type(activation) is not tuple or len(<tuple>activation) != 3:
        return False
    name, low, high = <tuple>activation
    if type(name) is not str or <str>name != "clip" or type(low) is not float or type(high) is not float:
        return False
    act[0].low, act[0].high = low, high
    return act[0].low <= act[0].high


cdef bint is_wider(Prepared p, object a) noexcept:
    """Whether parameters ask for float64 arithmetic."""
    return a is not None and cnp.PyArray_TYPE(<cnp.ndarray>a) == cnp.NPY_DOUBLE and p.kind.type_num != cnp.NPY_DOUBLE


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


cdef bint set_arrays(Prepared p, Job *job, cnp.ndarray x, object out, object residual, cbn_act act) noexcept:
    """Let the job read x and residual; False if `out` or residual is not for it."""
    cdef cbn_view z
    job[0] = p.job
    job.x.data = job.g.data = cnp.PyArray_BYTES(x)
    if out is not None and (not p.takes(out) or not cnp.PyArray_ISWRITEABLE(<cnp.ndarray>out)
                            or p.overlap(x, <cnp.ndarray>out)):
        return False
    if residual is not None:
        if not p.takes(residual) or (out is not None and p.overlap(<cnp.ndarray>residual, <cnp.ndarray>out)):
            return False
        z = job.x
        z.data = cnp.PyArray_BYTES(<cnp.ndarray>residual)
        set_epilogue(job, z, act)
    elif not is_identity(act):
        set_epilogue(job, job.z, act)
    return True


# ---- forward ---------------------------------------------------------------------------------------------------

def evaluate(x, weight, bias, running_mean, running_var, momentum, eps, channel_axis, out, activation, residual):
    """y of `functional.batch_norm` in evaluation, or None."""
    cdef Prepared p = prepared_for(x, channel_axis)
    cdef Job job
    cdef Py_ssize_t C
    cdef cbn_act act
    cdef double epsilon
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
            and is_epsilon(eps, False) and is_momentum(momentum) and find_act(activation, &act)
            and set_arrays(p, &job, x, out, residual, act)):
        return None
    y = empty_like(x) if out is None else out
    room_c = <double *>malloc((FORWARD_ROWS + 4) * C * sizeof(double))
    if room_c == NULL:
        return None
    epsilon = eps
    mean_c, invstd_c = copied(room_c + 3 * C, running_mean, C), copied(room_c + 4 * C, running_var, C)
    weight_c, bias_c = copied(room_c + 5 * C, weight, C), copied(room_c + 6 * C, bias, C)
    inverse_std(invstd_c, invstd_c, 1, epsilon, 0, C)
    solve_forward(room_c, C, 0, C, mean_c, invstd_c, weight_c, bias_c)
    job.in_float64 |= is_wider(p, running_mean) or is_wider(p, running_var) or is_wider(p, weight) or is_wider(p, bias)
    job.y.data = cnp.PyArray_BYTES(y)
    set_coefficients(&job, room_c)
    choose_and_apply(&job)
    free(room_c)
    return y


cdef cnp.ndarray normalized(Prepared p, cnp.ndarray x, object weight, object bias, double eps, object out,
                            object residual, cbn_act act, bint wide, cnp.ndarray mean, cnp.ndarray m2,
                            cnp.ndarray invstd, double *weight_c, double *bias_c):
    """y and the batch's statistics; None, and nothing has changed, for an output or residual that is not for x.

    weight_c and bias_c get float64 copies of weight and bias.
    """
    cdef Job job
    cdef cnp.ndarray y
    cdef double *room_c
    if not set_arrays(p, &job, x, out, residual, act):
        return None
    y = empty_like(x) if out is None else out
    room_c = <double *>malloc(scratch_doubles(&job) * sizeof(double))
    if room_c == NULL:
        return None
    divide_scratch(&job, room_c)
    job.weight_c, job.bias_c = copied(weight_c, weight, job.reduction.C), copied(bias_c, bias, job.reduction.C)
    job.sum_c, job.square_c = <double *>cnp.PyArray_DATA(mean), <double *>cnp.PyArray_DATA(m2)
    job.invstd_c, job.eps = <double *>cnp.PyArray_DATA(invstd), eps
    job.in_float64 |= wide
    job.y.data = cnp.PyArray_BYTES(y)
    if job.n_bytes < SMALL:
        measure_and_apply_with_memory(&job)
    else:
        with nogil:
            measure_and_apply_with_memory(&job)
    free(room_c)
    return y


cdef bint is_batch(Prepared p, object weight, object bias, object running_mean, object running_var,
                   object eps) noexcept:
    """Whether x has values enough to train with, and parameters and statistics are of the usual kind."""
    cdef Py_ssize_t C = p.layout.extents.C
    return p.layout.extents.N * p.layout.extents.S > 1 and is_epsilon(eps, True) \
        and is_per_channel(weight, C, False) and is_per_channel(bias, C, False) \
        and is_per_channel(running_mean, C, True) and is_per_channel(running_var, C, True) \
        and (running_mean is None) == (running_var is None)


def train(x, weight, bias, running_mean, running_var, momentum, eps, channel_axis, out, activation, residual):
    """(y, mean, invstd) of `functional.native_batch_norm` in training, after the running statistics moved; or None."""
    cdef Prepared p = prepared_for(x, channel_axis)
    cdef Py_ssize_t C
    cdef cbn_act act
    cdef double *affine_c
    cdef cnp.ndarray y, mean, invstd, m2
    if p is None or not is_batch(p, weight, bias, running_mean, running_var, eps) or not is_momentum(momentum) \
            or not find_act(activation, &act):
        return None
    if type(out) is cnp.ndarray and (p.covers(out, running_mean) or p.covers(out, running_var)):
        return None
    C = p.layout.extents.C
    mean, invstd, m2 = new_doubles(C), new_doubles(C), new_doubles(C)
    affine_c = <double *>malloc(2 * C * sizeof(double))
    if affine_c == NULL:
        return None
    try:
        y = normalized(p, x, weight, bias, eps, out, residual, act, is_wider(p, weight) or is_wider(p, bias), mean,
                       m2, invstd, affine_c, affine_c + C)
    finally:
        free(affine_c)
    if y is None:
        return None
    if running_mean is not None:
        move_running(running_mean, running_var, None, mean, m2, p.layout.count, momentum)
    return y, mean, invstd


def train_layer(x, tuple arrays_c, Py_ssize_t n_channels, bint is_double, eps, channel_axis, tuple ranks, out, residual,
                act):
    """(y, input, weight, bias, mean, m2, invstd) of a layer's forward in training, in float64; or None.

    arrays_c: weight, bias, running mean, running variance and counter, the last three None if they stay.
    """
    cdef Prepared p = prepared_for(x, channel_axis)
    cdef Py_ssize_t C
    cdef cnp.ndarray y, mean, invstd, m2, weight_c = None, bias_c = None
    cdef object weight, bias, running_mean, running_var, counter
    weight, bias, running_mean, running_var, counter = arrays_c
    if p is None or p.layout.extents.C != n_channels or (ranks is not None and p.kind.n_axes not in ranks) \
            or not is_batch(p, weight, bias, running_mean, running_var, eps) or not is_counter(counter):
        return None
    C = n_channels
    mean, invstd, m2 = new_doubles(C), new_doubles(C), new_doubles(C)
    if weight is not None:
        weight_c = new_doubles(C)
    if bias is not None:
        bias_c = new_doubles(C)
    y = normalized(p, x, weight, bias, eps, out, residual, act_of(act),
                   is_double and p.kind.type_num != cnp.NPY_DOUBLE, mean, m2, invstd,
                   NULL if weight_c is None else <double *>cnp.PyArray_DATA(weight_c),
                   NULL if bias_c is None else <double *>cnp.PyArray_DATA(bias_c))
    if y is None:
        return None
    return y, p.input_of(x, is_double), weight_c, bias_c, mean, m2, invstd


cdef bint is_counter(object counter) noexcept:
    """Whether it is None, or an int64 number that can be written to."""
    if counter is None:
        return True
    return type(counter) is cnp.ndarray and cnp.PyArray_SIZE(<cnp.ndarray>counter) == 1 \
        and cnp.PyArray_TYPE(<cnp.ndarray>counter) == cnp.NPY_INT64 and cnp.PyArray_ISCARRAY(<cnp.ndarray>counter)


# ---- backward --------------------------------------------------------------------------------------------------

cdef cnp.ndarray differentiated(Prepared p, cnp.ndarray dy, cnp.ndarray x, object weight, cnp.ndarray mean,
                                cnp.ndarray invstd, object out, bint wide, double *dweight_c, double *dbias_c):
    """dx and the gradients of weight and bias; None, and nothing has changed, for an output that is not for x."""
    cdef Job job
    cdef Py_ssize_t c, C = p.layout.extents.C
    cdef cnp.ndarray dx
    cdef double *room_c
    if not set_arrays(p, &job, x, out, None, p.job.act) or (out is not None and p.overlap(dy, out)):
        return None
    dx = empty_like(x) if out is None else out
    room_c = <double *>malloc((scratch_doubles(&job) + 3 * C) * sizeof(double))
    if room_c == NULL:
        return None
    divide_scratch(&job, room_c + 3 * C)
    job.backward = True
    job.g.data, job.y.data = cnp.PyArray_BYTES(dy), cnp.PyArray_BYTES(dx)
    job.shift_c, job.invstd_c = copied(room_c, mean, C), copied(room_c + C, invstd, C)
    job.weight_c = copied(room_c + 2 * C, weight, C)
    job.sum_c, job.square_c = dbias_c, dweight_c
    job.in_float64 |= wide
    if job.n_bytes < SMALL:
        measure_and_apply_with_memory(&job)
    else:
        with nogil:
            measure_and_apply_with_memory(&job)
    for c in range(C):
        dweight_c[c] *= job.invstd_c[c]
    free(room_c)
    return dx


def gradients(dy, x, weight, save_mean, save_invstd, channel_axis, out):
    """(dx, dweight, dbias) of `functional.native_batch_norm_backward` through the statistics of the batch; or None."""
    cdef Prepared p = prepared_for(x, channel_axis)
    cdef Py_ssize_t C
    cdef double *sums_c
    cdef cnp.ndarray dx, dweight, dbias
    if p is None or save_mean is None or save_invstd is None or not p.takes(dy):
        return None
    C = p.layout.extents.C
    if not (is_per_channel(save_mean, C, False) and is_per_channel(save_invstd, C, False)
            and is_per_channel(weight, C, False)):
        return None
    dweight, dbias = new_gradient(C, p, weight), new_gradient(C, p, weight)
    sums_c = <double *>malloc(2 * C * sizeof(double))
    if sums_c == NULL:
        return None
    try:
        dx = differentiated(p, dy, x, weight, save_mean, save_invstd, out, is_wider(p, weight), sums_c, sums_c + C)
        if dx is None:
            return None
        round_into(dweight, sums_c, C)
        round_into(dbias, sums_c + C, C)
    finally:
        free(sums_c)
    return dx, dweight, dbias


def layer_gradients(dy, Input inp, weight, cnp.ndarray mean, cnp.ndarray invstd, out):
    """(dx, dweight, dbias), in float64, of a layer's backward through the statistics of a batch; or None.

    weight, mean and invstd are those of the context: contiguous float64.
    """
    cdef Prepared p = prepared_for(inp.x, inp.axis)
    cdef cnp.ndarray dx, dweight, dbias
    if p is None or not p.takes(dy):
        return None
    dweight, dbias = new_doubles(p.layout.extents.C), new_doubles(p.layout.extents.C)
    dx = differentiated(p, dy, inp.x, weight, mean, invstd, out, inp.in_float64, <double *>cnp.PyArray_DATA(dweight),
                        <double *>cnp.PyArray_DATA(dbias))
    return None if dx is None else (dx, dweight, dbias)


cdef cnp.ndarray new_gradient(cnp.npy_intp C, Prepared p, object weight):
    """Memory for the gradient of a parameter: of weight's type, or without one of x's, but at least float32."""
    cdef int type_num = p.kind.type_num if weight is None else cnp.PyArray_TYPE(<cnp.ndarray>weight)
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
