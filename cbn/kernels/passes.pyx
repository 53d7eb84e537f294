# The passes over arrays: measure, solve and apply, forward and backward, one after the other or fused into one call.
"""Compiled passes of cbn: numpy arrays in, threads and loops below. Internal; `cbn.functional` is the way in.

=========  ==================  ======================  ====================
           measure             solve                   apply
=========  ==================  ======================  ====================
forward    `moments`           `coefficients`          `apply`
fused      `normalize`: all three; one read of x where the pipeline runs
backward   `grad_moments`      `grad_coefficients`     `grad_apply`
fused      `gradients`: all three; one read of dy and x where the pipeline runs
second     `double_backward`, `tangent`: all three
=========  ==================  ======================  ====================

Every function trusts its arguments: arrays that are not empty, aligned, native, that `Input.can_walk`; what is per
channel is contiguous float64 (C,), and weight and bias may be None. `in_float64` asks for float64 arithmetic on smaller
elements.
"""
cimport cython
cimport numpy as cnp
from libc.stdlib cimport free, malloc

from .arrays cimport Input, Layout, act_of, doubles, element_of, is_plain, new_doubles
from .coefficients cimport (
    BACKWARD_ROWS,
    FORWARD_ROWS,
    REREAD_ROWS,
    all_fit,
    inverse_std as invert,
    solve_backward,
    solve_forward,
    solve_standard,
)
from .engine cimport (
    apply as run_apply,
    make_job,
    measure,
    set_coefficients,
    set_output,
    choose_stores,
    set_conversion,
)
from .job cimport (
    BF16,
    F16,
    F32,
    Blend,
    Element,
    Job,
    is_integer,
    set_count,
    set_epilogue,
    set_selection,
    vanishing,
)
from .kernels cimport CBN_2_ROWS, CBN_SECOND_SHIFTS, cbn_selection, cbn_view
from .partition cimport Extents
from .second cimport Second, run_second, second_doubles
from .statistics cimport cbn_merge_moments
from .scratch cimport (
    go_back_through,
    divide_measure,
    divide_scratch,
    measure_and_apply_with_memory,
    measure_doubles,
    scratch_doubles,
)

import operator

import numpy as np

cnp.import_array()


cdef Job job_of(Layout layout, cnp.ndarray x, bint in_float64):
    return make_job(&layout.extents, layout.view(x), element_of(x), cnp.PyArray_ITEMSIZE(x), in_float64)


cdef void follow_with(Job *job, Layout layout, cnp.ndarray residual, act) except *:
    """Let act(. + residual) follow the normalization."""
    cdef cbn_view z = job.z
    if residual is not None:
        z = layout.view(residual)
    set_epilogue(job, z, act_of(act))


cdef void write_to(Job *job, Layout layout, cnp.ndarray y):
    set_output(job, &layout.extents, layout.view(y), cnp.PyArray_ITEMSIZE(y))


cdef cnp.ndarray new_room(Job *job):
    """What `divide_scratch` divides; the caller keeps it until the job is done."""
    return new_doubles(scratch_doubles(job))


cdef int check_coefficients(cnp.ndarray coef, Py_ssize_t rows, Layout layout) except -1:
    if cnp.PyArray_NDIM(coef) != 2 or cnp.PyArray_DIM(coef, 0) != rows or cnp.PyArray_DIM(coef, 1) != layout.extents.C:
        raise ValueError(f"there are coefficients of shape {np.shape(coef)} for {layout.extents.C} channels")
    return 0


cdef cnp.ndarray new_coefficients(Py_ssize_t rows, Py_ssize_t C):
    cdef cnp.npy_intp shape[2]
    shape[0], shape[1] = rows, C
    return cnp.PyArray_SimpleNew(2, shape, cnp.NPY_DOUBLE)


# ---- forward ---------------------------------------------------------------------------------------------------

def moments(Layout layout, cnp.ndarray x, bint skipna=False, cnp.ndarray weights=None, cnp.ndarray count=None,
            bint extrema=False, selection=None):
    """(mean, m2 = S((x - mean)^2), low, min, max) of every channel; min and max are None without `extrema`.

    The mean is mean + low, of which float64 holds the first.

    x may be integers of 8 or 16 bits, or int32: then the sums are exact, and those of `count` values of each channel if
    there is one, where zeros stand for the others. Of floats, with `skipna` NaN are missing, and
    `count` (C,) gets the number of what counts; or `weights`, of (N, S) or (N, C, S) contiguous values as `Layout`
    orders them, weigh the values, and `count` has their sums, or gets those of what is not missing. A `selection`
    (cbn.masked) takes the place of these.
    """
    cdef cbn_selection selected
    cdef Job job = job_of(layout, x, False)
    cdef Py_ssize_t C = layout.extents.C
    cdef cnp.ndarray mean = new_doubles(C), m2 = new_doubles(C), low = new_doubles(C)
    cdef cnp.ndarray room, least = None, largest = None
    if not is_integer(&job) and (skipna or extrema or weights is not None):
        count = new_doubles(C) if count is None else count
        set_count(&job, skipna, weights_view(layout, weights))
    job.count_c = doubles(count, C)
    if selection is not None:
        selected = selection_of(layout, selection)
        set_selection(&job, &layout.extents, &selected, doubles(selection[3], C))
    if extrema:
        least, largest = new_doubles(C), new_doubles(C)
    room = new_doubles(measure_doubles(&job))
    job.sum_c, job.square_c = doubles(mean, C), doubles(m2, C)
    job.low_c = doubles(low, C)
    job.min_c, job.max_c = doubles(least, C), doubles(largest, C)
    divide_measure(&job, doubles(room, room.size))
    with nogil:
        measure(&job)
    return mean, m2, low, least, largest


def merge_moments(tuple a, tuple b):
    """(count, mean, m2, low) of both together, from the same of each, contiguous float64 (C,)."""
    cdef Py_ssize_t C = a[0].size
    count, mean, m2, low = [each.copy() for each in a]
    cbn_merge_moments(doubles(count, C), doubles(mean, C), doubles(low, C), doubles(m2, C), doubles(b[0], C),
                      doubles(b[1], C), doubles(b[3], C), doubles(b[2], C), 0, C)
    return count, mean, m2, low


cdef cbn_view weights_view(Layout layout, cnp.ndarray weights) except *:
    """Weights of every value, or of those of any channel."""
    cdef cbn_view w
    cdef const Extents *e = &layout.extents
    w.data, w.n, w.c = NULL, e.S, 0
    if weights is None:
        return w
    if cnp.PyArray_SIZE(weights) != e.N * e.S:
        w.n, w.c = e.C * e.S, e.S
    w.data = <char *>doubles(weights, e.N * (e.S if w.c == 0 else w.n))
    return w


cdef cbn_selection selection_of(Layout layout, given) except *:
    """`cbn.masked.Selection`, for as long as it lives."""
    cdef cbn_selection s
    cdef const Extents *e = &layout.extents
    cdef cnp.ndarray mask = given[0], lengths = given[1], weights = given[2]
    s.mask.data, s.length_n, s.weight_n = NULL, NULL, doubles(weights, e.N)
    s.mask.n, s.mask.c = e.S, 0
    s.all = mask is None and given[4] == e.N * e.S
    if mask is not None:
        if e.rows:
            s.mask.n, s.mask.c = e.C, 1
        elif cnp.PyArray_SIZE(mask) != e.N * e.S:
            s.mask.n, s.mask.c = e.C * e.S, e.S
        if mask.dtype != np.int8 or cnp.PyArray_SIZE(mask) != e.N * s.mask.n or not cnp.PyArray_IS_C_CONTIGUOUS(mask):
            raise ValueError(f"there is a mask of {mask.dtype} and shape {np.shape(mask)} for {layout!r}")
        s.mask.data = <char *>cnp.PyArray_DATA(mask)
    if lengths is not None:
        if lengths.dtype != np.intp or cnp.PyArray_SIZE(lengths) != e.N or not cnp.PyArray_IS_C_CONTIGUOUS(lengths):
            raise ValueError(f"there are lengths of {lengths.dtype} and shape {np.shape(lengths)} for {layout!r}")
        s.length_n = <const Py_ssize_t *>cnp.PyArray_DATA(lengths)
    return s


def inverse_std(cnp.ndarray var, double eps):
    """1/sqrt(var + eps) of contiguous float64 values; infinities and NaN without a warning."""
    cdef Py_ssize_t C = cnp.PyArray_SIZE(var)
    cdef cnp.ndarray invstd = new_doubles(C)
    invert(doubles(invstd, C), doubles(var, C), 1, eps, 0, C)
    return invstd


def product(cnp.ndarray a, cnp.ndarray b):
    """a*b of contiguous float64 values; infinities and NaN without a warning."""
    cdef Py_ssize_t c, C = cnp.PyArray_SIZE(a)
    cdef double *of_a = doubles(a, C)
    cdef double *of_b = doubles(b, C)
    cdef cnp.ndarray ab = new_doubles(C)
    for c in range(C):
        (<double *>cnp.PyArray_DATA(ab))[c] = of_a[c] * of_b[c]
    return ab


def coefficients(cnp.ndarray mean, cnp.ndarray invstd, cnp.ndarray weight, cnp.ndarray bias):
    """(3, C): mean, scale = invstd*weight and offset = bias."""
    cdef Py_ssize_t C = cnp.PyArray_SIZE(mean)
    cdef cnp.ndarray coef = new_coefficients(FORWARD_ROWS, C)
    solve_forward(<double *>cnp.PyArray_DATA(coef), C, 0, C, doubles(mean, C), doubles(invstd, C), doubles(weight, C),
                  doubles(bias, C))
    return coef


def fits_float32(cnp.ndarray coef):
    """Whether float32 holds all of these coefficients."""
    cdef Py_ssize_t C = cnp.PyArray_DIM(coef, 1)
    return all_fit(doubles(coef, FORWARD_ROWS * C), C, 0, C, False, 4)


def apply(Layout layout, cnp.ndarray x, cnp.ndarray y, cnp.ndarray coef, bint in_float64=False,
          cnp.ndarray residual=None, act=None, selection=None):
    """y = act((x - mean)*scale + offset + residual) with these `coefficients`; 0 outside a `selection` (cbn.masked).

    x may be uint8 or int8: then y and the residual are float32 or bfloat16, and coef `fits_float32`.
    """
    cdef cbn_selection selected
    cdef Job job = job_of(layout, x, in_float64)
    if selection is not None:
        selected = selection_of(layout, selection)
        set_selection(&job, &layout.extents, &selected, doubles(selection[3], layout.extents.C))
    check_coefficients(coef, FORWARD_ROWS, layout)
    set_coefficients(&job, <double *>cnp.PyArray_DATA(coef))
    follow_with(&job, layout, residual, act)
    write_to(&job, layout, y)
    with nogil:
        run_apply(&job)


def convert(Layout layout, cnp.ndarray x, cnp.ndarray y, cnp.ndarray coef, bint in_float64=False, act=None):
    """`apply` for an x of any type that `moments` takes and a y of any floating one, without a residual."""
    cdef Job job = job_of(layout, x, in_float64)
    cdef Element element = element_of(y)
    check_coefficients(coef, FORWARD_ROWS, layout)
    set_epilogue(&job, job.z, act_of(act))
    set_conversion(&job, &layout.extents, layout.view(y), element, cnp.PyArray_ITEMSIZE(y))
    set_coefficients(&job, <double *>cnp.PyArray_DATA(coef))
    with nogil:
        run_apply(&job)


def standard_coefficients(cnp.ndarray mean, cnp.ndarray var, double eps, bint outside, bint zero_is_one):
    """(3, C): mean (or zeros for None), scale = 1/sqrt(var + eps) or as the other two say, and no offset."""
    cdef Py_ssize_t C = cnp.PyArray_SIZE(var)
    cdef cnp.ndarray coef = new_coefficients(FORWARD_ROWS, C)
    solve_standard(<double *>cnp.PyArray_DATA(coef), C, doubles(mean, C), doubles(var, C), eps, outside, zero_is_one)
    return coef


cdef Blend blend_of(tuple given, Py_ssize_t C) except *:
    cdef Blend b
    b.mean_c, b.var_c = doubles(given[0], C), doubles(given[1], C)
    b.mix, b.r_max, b.d_max = given[2], given[3], given[4]
    return b


def normalize(Layout layout, cnp.ndarray x, cnp.ndarray y, cnp.ndarray weight, cnp.ndarray bias, double eps,
              bint in_float64=False, cnp.ndarray residual=None, act=None, tuple blend=None, selection=None):
    """(mean, m2, invstd) of the batch, and y = act((x - mean)*invstd*weight + bias + residual).

    With a `blend`, (running mean, running variance, mix, r_max, d_max), not of the batch alone, as coefficients.h has
    it. The two arrays are written over: with `mix`, where r_max is 0, by the mean and the variance that normalize, and
    invstd belongs to these; else by d and r, and weight and bias by those of y.

    With a `selection` (cbn.masked) of what counts; the rest of y is 0.
    """
    cdef Job job = job_of(layout, x, in_float64)
    cdef Blend of_blend
    cdef cbn_selection selected
    cdef Py_ssize_t C = layout.extents.C
    if selection is not None:
        selected = selection_of(layout, selection)
        set_selection(&job, &layout.extents, &selected, doubles(selection[3], C))
    mean, m2, invstd = new_doubles(C), new_doubles(C), new_doubles(C)
    room = new_room(&job)
    divide_scratch(&job, doubles(room, room.size))
    job.sum_c, job.square_c, job.invstd_c = doubles(mean, C), doubles(m2, C), doubles(invstd, C)
    job.weight_c, job.bias_c, job.eps = doubles(weight, C), doubles(bias, C), eps
    if blend is not None:
        of_blend = blend_of(blend, C)
        job.blend = &of_blend
    follow_with(&job, layout, residual, act)
    write_to(&job, layout, y)
    with nogil:
        measure_and_apply_with_memory(&job)
    return mean, m2, invstd


# ---- backward --------------------------------------------------------------------------------------------------

cdef tuple backward(Layout layout, cnp.ndarray dy, cnp.ndarray x, cnp.ndarray dx, cnp.ndarray mean, cnp.ndarray invstd,
                    cnp.ndarray weight, cnp.ndarray bias, bint in_float64, cnp.ndarray residual, act,
                    cnp.ndarray dh, bint keeps_dh, y_dtype, selection):
    cdef cbn_selection selected
    cdef Job job = job_of(layout, x, in_float64)
    cdef Py_ssize_t c, C = layout.extents.C
    cdef cnp.ndarray forward
    cdef double *dweight_c
    # Before the pass, which may overwrite x: nothing behind it takes memory
    sums, products, dweight = new_doubles(C), new_doubles(C), new_doubles(C)
    dweight_c = doubles(dweight, C)
    job.backward = True
    if selection is not None:
        selected = selection_of(layout, selection)
        set_selection(&job, &layout.extents, &selected, doubles(selection[3], C))
    room = new_room(&job)
    divide_scratch(&job, doubles(room, room.size))
    job.shift_c, job.invstd_c = doubles(mean, C), doubles(invstd, C)
    job.weight_c, job.bias_c = doubles(weight, C), doubles(bias, C)
    job.sum_c, job.square_c = doubles(sums, C), doubles(products, C)
    job.g = layout.view(dy)
    if dh is not None:
        follow_with(&job, layout, residual, act)
        job.dh, job.keeps_dh = layout.view(dh), keeps_dh
        if y_dtype is not None:
            job.vanishing = vanishing(F32 if y_dtype.itemsize > 2 else F16 if y_dtype == np.float16 else BF16)
        forward = new_coefficients(REREAD_ROWS, C)
        go_back_through(&job, <double *>cnp.PyArray_DATA(forward))
    if dx is not None:
        write_to(&job, layout, dx)
    with nogil:
        if dx is not None:
            measure_and_apply_with_memory(&job)
        else:
            measure(&job)
        for c in range(C):
            dweight_c[c] = job.square_c[c] * job.invstd_c[c]
    return sums, products, dweight


def grad_moments(Layout layout, cnp.ndarray dy, cnp.ndarray x, cnp.ndarray mean, cnp.ndarray invstd,
                 cnp.ndarray weight=None, cnp.ndarray bias=None, bint in_float64=False, cnp.ndarray residual=None,
                 act=None, cnp.ndarray dh=None, y_dtype=None, selection=None):
    """(S(dh), S(dh*(x - mean)), S(dh*(x - mean))*invstd) of every channel: dbias, dweight/invstd, dweight.

    Without `dh` the forward pass had no activation, and dh is dy. Else act(. + residual) followed its normalization
    with mean, invstd, weight and bias, and dh = dy times the slope of act is put there; `dh` may be dy. `y_dtype` is
    that of the forward pass where x is a wider copy of its input. The sums are over a `selection` (cbn.masked), and the
    rest of dh is 0.
    """
    return backward(layout, dy, x, None, mean, invstd, weight, bias, in_float64, residual, act, dh, True,
                    y_dtype, selection)


def gradients(Layout layout, cnp.ndarray dy, cnp.ndarray x, cnp.ndarray dx, cnp.ndarray mean, cnp.ndarray invstd,
              cnp.ndarray weight=None, cnp.ndarray bias=None, bint in_float64=False, cnp.ndarray residual=None,
              act=None, cnp.ndarray dh=None, bint keeps_dh=False, y_dtype=None, selection=None):
    """`grad_moments`, and dx through the statistics of the batch. `dh` may be dx; it is filled if `keeps_dh`."""
    return backward(layout, dy, x, dx, mean, invstd, weight, bias, in_float64, residual, act, dh, keeps_dh,
                    y_dtype, selection)


def grad_coefficients(cnp.ndarray mean, cnp.ndarray invstd, cnp.ndarray weight, cnp.ndarray sum_dh,
                      cnp.ndarray sum_dh_xmu, cnp.ndarray count):
    """(5, C) for `grad_apply`, from sums over `count` values of each channel; coefficients.h has the rows."""
    cdef Py_ssize_t c, C = cnp.PyArray_SIZE(mean)
    cdef cnp.ndarray coef = new_coefficients(BACKWARD_ROWS, C)
    cdef double *coef_c = <double *>cnp.PyArray_DATA(coef)
    cdef double *mean_c = doubles(mean, C)
    cdef double *invstd_c = doubles(invstd, C)
    cdef double *weight_c = doubles(weight, C)
    cdef double *sum_c = doubles(sum_dh, C)
    cdef double *product_c = doubles(sum_dh_xmu, C)
    cdef double *count_c = doubles(count, C)
    for c in range(C):
        solve_backward(coef_c, C, c, c + 1, mean_c, invstd_c, weight_c, sum_c, product_c, count_c[c])
    return coef


def grad_apply(Layout layout, cnp.ndarray dh, cnp.ndarray x, cnp.ndarray dx, cnp.ndarray coef, bint in_float64=False,
               selection=None):
    """dx = (dh - grad_mean)*scale - (x - mean)*slope with these `grad_coefficients`; 0 outside a `selection`."""
    cdef cbn_selection selected
    cdef Job job = job_of(layout, x, in_float64)
    if selection is not None:
        selected = selection_of(layout, selection)
        set_selection(&job, &layout.extents, &selected, doubles(selection[3], layout.extents.C))
    check_coefficients(coef, BACKWARD_ROWS, layout)
    job.backward = True
    job.g = layout.view(dh)
    set_coefficients(&job, <double *>cnp.PyArray_DATA(coef))
    write_to(&job, layout, dx)
    with nogil:
        run_apply(&job)


# ---- second derivatives ------------------------------------------------------------------------------------------

cdef object second(Layout layout, cnp.ndarray z, cnp.ndarray g, cnp.ndarray x, cnp.ndarray y, cnp.ndarray grad_x,
                   cnp.ndarray mean, cnp.ndarray invstd, cnp.ndarray weight, cnp.ndarray weight_t, cnp.ndarray bias_t,
                   bint measures):
    """Fill y, and grad_x if it is there; the gradient of the weight, or None without a grad_x."""
    cdef Second s
    cdef Py_ssize_t C = layout.extents.C
    cdef cnp.ndarray coef = new_coefficients(CBN_2_ROWS, C), shifts = new_coefficients(CBN_SECOND_SHIFTS, C)
    cdef cnp.ndarray dweight = new_doubles(C), memory = new_doubles(C), partial
    s.job = job_of(layout, x, False)
    s.job.g, s.job.z = layout.view(g), layout.view(z)
    write_to(&s.job, layout, y)
    if grad_x is not None:
        s.job.dh = layout.view(grad_x)
    partial = new_doubles(second_doubles(&s.job) if measures else 0)
    s.measures = measures
    s.job.partial, s.job.coef_c = <double *>cnp.PyArray_DATA(partial), <double *>cnp.PyArray_DATA(coef)
    s.job.shift_c = <double *>cnp.PyArray_DATA(shifts)
    s.mean_c, s.invstd_c, s.weight_c = doubles(mean, C), doubles(invstd, C), doubles(weight, C)
    s.weight_t_c, s.bias_t_c = doubles(weight_t, C), doubles(bias_t, C)
    s.dweight_c, s.memory_c = doubles(dweight, C), doubles(memory, C)
    with nogil:
        run_second(&s)
    return None if grad_x is None else dweight


def double_backward(Layout layout, cnp.ndarray ggI, cnp.ndarray dy, cnp.ndarray x, cnp.ndarray grad_dy,
                    cnp.ndarray grad_x, cnp.ndarray mean, cnp.ndarray invstd, cnp.ndarray weight, cnp.ndarray ggG,
                    cnp.ndarray ggB):
    """Fill grad_dy and grad_x through the statistics of the batch; returns the gradient of the weight.

    ggI, dy, x and both outputs have one dtype, and no output overlaps another array. ggG and ggB may be None for zeros.
    coefficients.h has the formulas.
    """
    return second(layout, ggI, dy, x, grad_dy, grad_x, mean, invstd, weight, ggG, ggB, True)


def tangent(Layout layout, cnp.ndarray x_t, cnp.ndarray x, cnp.ndarray y_t, cnp.ndarray mean, cnp.ndarray invstd,
            cnp.ndarray weight, cnp.ndarray weight_t, cnp.ndarray bias_t, bint batch_statistics):
    """Fill y_t with the derivative of y along x_t, weight_t and bias_t, of which the last two may be None for zeros.

    The bits are those of the grad_dy of `double_backward`. y_t overlaps no other array.
    """
    second(layout, x_t, x_t, x, y_t, None, mean, invstd, weight, weight_t, bias_t, batch_statistics)


# ---- C and Cython extensions -----------------------------------------------------------------------------------

cdef Input input_like(like, channel_axis):
    """The array that the pointers will be to, checked."""
    cdef int axis
    if not isinstance(like, np.ndarray) or isinstance(like, np.ma.MaskedArray):
        raise TypeError(f"like must be a numpy array, not {type(like).__name__}")
    a = np.asarray(like)
    if not (is_plain(a) or (a.dtype.name == "bfloat16" and cnp.PyArray_ISALIGNED(a))):
        expected = "float32, float64, float16 or bfloat16 (of ml_dtypes), aligned and in native byte order"
        raise TypeError(f"like has dtype {a.dtype}; expected {expected}")
    if a.ndim < 2:
        raise ValueError(f"like has {a.ndim} dimensions; expected 2 or more")
    axis = operator.index(channel_axis)
    if not -a.ndim <= axis < a.ndim:
        raise ValueError(f"channel_axis {axis} is out of range for an array of {a.ndim} dimensions")
    inp = Input(a, axis % a.ndim)
    if inp.layout is None:
        raise ValueError(f"like is empty, of shape {a.shape}")
    if cnp.PyArray_DATA(inp.x) != cnp.PyArray_DATA(a):
        raise ValueError(f"like has strides {a.strides}, which no loop reads: expected rows or runs")
    return inp


@cython.final
cdef class Passes:
    """The passes over arrays of one dtype, shape and strides, for C and Cython: C pointers in, no GIL, no exception.

    An extension cimports the class (passes.pxd), makes one with the GIL, and calls its C methods without. Pointers are
    to the first element; per channel, everything is contiguous float64. Threads are cbn's, see `cbn.set_num_threads`.
    `apply` may be called from many threads at once; the others keep their sums in the object, so a thread has its own.

        moments    mean_c and m2_c = S((x - mean)^2) of every channel of x
        apply      y = (x - mean)*scale + offset, coef_c (3, C): mean, scale, offset. y may be x
        normalize  training: mean_c, m2_c, invstd_c = 1/sqrt(m2/count + eps) of x, y = (x - mean)*invstd*weight + bias;
                   weight_c and bias_c may be NULL. y may be x
        backward   dx through the statistics of the batch, sum_c = S(dy), product_c = S(dy*(x - mean))*invstd: the
                   gradients of bias and weight; weight_c may be NULL. dx may be dy or x

    Parameters
    ----------
    like : ndarray
        What the pointers will be to: its dtype, shape and strides count, its values do not.
    channel_axis : int

    Attributes
    ----------
    C, count : int
        Channels, and values of each.

    Raises
    ------
    TypeError, ValueError
        For another dtype, less than two dimensions, an axis out of range, an empty array, and for strides or an
        alignment that would need a copy.
    """
    def __cinit__(self, like, channel_axis=1):
        cdef Job *job
        cdef Layout layout
        cdef Input inp = input_like(like, channel_axis)
        layout = inp.layout
        job = <Job *>malloc(sizeof(Job))
        self.job = job
        if job == NULL:
            raise MemoryError()
        job[0] = job_of(layout, inp.x, False)
        write_to(job, layout, inp.x)
        self.C, self.count = layout.extents.C, layout.count
        self.room = new_room(job)
        self.room_c = doubles(self.room, self.room.size)

    def __dealloc__(self):
        free(self.job)

    cdef void moments(self, const void *x, double *mean_c, double *m2_c) noexcept nogil:
        cdef Job job = (<Job *>self.job)[0]
        job.x.data = <char *>x
        job.sum_c, job.square_c = mean_c, m2_c
        divide_scratch(&job, self.room_c)
        measure(&job)

    cdef void apply(self, const void *x, void *y, const double *coef_c) noexcept nogil:
        cdef Job job = (<Job *>self.job)[0]
        job.x.data = job.g.data = <char *>x
        job.y.data = <char *>y
        job.coef_c = <double *>coef_c
        choose_stores(&job)
        run_apply(&job)

    cdef void normalize(self, const void *x, void *y, const double *weight_c, const double *bias_c, double eps,
                        double *mean_c, double *m2_c, double *invstd_c) noexcept nogil:
        cdef Job job = (<Job *>self.job)[0]
        job.x.data = job.g.data = <char *>x
        job.y.data = <char *>y
        divide_scratch(&job, self.room_c)
        job.weight_c, job.bias_c, job.eps = <double *>weight_c, <double *>bias_c, eps
        job.sum_c, job.square_c, job.invstd_c = mean_c, m2_c, invstd_c
        measure_and_apply_with_memory(&job)

    cdef void backward(self, const void *dy, const void *x, void *dx, const double *weight_c, const double *mean_c,
                       const double *invstd_c, double *sum_c, double *product_c) noexcept nogil:
        cdef Job job = (<Job *>self.job)[0]
        cdef Py_ssize_t c
        job.backward = True
        job.x.data, job.g.data, job.y.data = <char *>x, <char *>dy, <char *>dx
        divide_scratch(&job, self.room_c)
        job.shift_c, job.invstd_c, job.weight_c = <double *>mean_c, <double *>invstd_c, <double *>weight_c
        job.sum_c, job.square_c = sum_c, product_c
        measure_and_apply_with_memory(&job)
        for c in range(self.C):
            product_c[c] *= invstd_c[c]
