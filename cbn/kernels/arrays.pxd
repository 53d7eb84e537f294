# Arrays as the passes take them: for the other compiled modules.
cimport numpy as cnp

from .job cimport Element
from .kernels cimport cbn_act, cbn_view
from .partition cimport Extents

cdef extern from "numpy/ndarraytypes.h":
    enum: NPY_HALF

cdef enum:
    MAXDIMS = 64   # numpy's own limit


# Arrays that are read alike: one type, shape and strides.
cdef struct Kind:
    int n_axes, type_num
    Py_ssize_t shape[MAXDIMS]
    Py_ssize_t strides[MAXDIMS]
    Py_ssize_t extent    # bytes from the first element to the end of the last; -1 where a stride is negative


cdef inline Kind kind_of(cnp.ndarray a) noexcept:
    cdef Kind kind
    cdef int axis
    kind.n_axes, kind.type_num, kind.extent = cnp.PyArray_NDIM(a), cnp.PyArray_TYPE(a), cnp.PyArray_ITEMSIZE(a)
    for axis in range(kind.n_axes):
        kind.shape[axis], kind.strides[axis] = cnp.PyArray_DIM(a, axis), cnp.PyArray_STRIDE(a, axis)
        if kind.strides[axis] < 0:
            kind.extent = -1
        elif kind.extent >= 0:
            kind.extent += (kind.shape[axis] - 1) * kind.strides[axis]
    return kind


cdef inline bint is_usual(cnp.ndarray a) noexcept:
    return cnp.PyArray_ISALIGNED(a) and cnp.PyArray_ISNOTSWAPPED(a)


cdef inline bint is_of(const Kind *kind, cnp.ndarray a) noexcept:
    """Whether an array is of this kind, aligned and native."""
    cdef int axis
    if cnp.PyArray_NDIM(a) != kind.n_axes or cnp.PyArray_TYPE(a) != kind.type_num or not is_usual(a):
        return False
    for axis in range(kind.n_axes):
        if cnp.PyArray_DIM(a, axis) != kind.shape[axis] or cnp.PyArray_STRIDE(a, axis) != kind.strides[axis]:
            return False
    return True


cdef inline bint overlap_partly(cnp.ndarray a, cnp.ndarray b, Py_ssize_t extent, bint alike) noexcept:
    """Whether two arrays, neither longer than `extent`, may share memory: but not element by element, if `alike`."""
    cdef char *of_a = cnp.PyArray_BYTES(a)
    cdef char *of_b = cnp.PyArray_BYTES(b)
    return not (of_a == of_b and alike) and of_a < of_b + extent and of_b < of_a + extent


cdef class Layout:
    cdef Extents extents
    cdef int channel_axis, n_axes, n_outer
    cdef int axes[MAXDIMS]    # without the channel's and those of length 1, slowest first; outer group, then inner

    cdef bint joined(self, cnp.ndarray x, int begin, int end, Py_ssize_t *stride) noexcept
    cdef cbn_view view(self, cnp.ndarray x) noexcept


cdef class Input:
    cdef readonly cnp.ndarray x
    cdef readonly Layout layout
    cdef readonly int axis
    cdef readonly Py_ssize_t n_channels
    cdef readonly object y_dtype
    cdef public bint in_float64


cdef Element element_of(cnp.ndarray a) noexcept
cpdef bint is_plain(cnp.ndarray a) noexcept
cpdef cnp.ndarray empty_like(cnp.ndarray x, dtype=*)
cdef cnp.ndarray view_of(cnp.ndarray x)
cdef cnp.ndarray phantom_like(cnp.ndarray x, dtype)
cdef cnp.ndarray new_doubles(cnp.npy_intp n)
cdef double *doubles(cnp.ndarray a, Py_ssize_t n) except? NULL
cdef char *take_memory(size_t n_bytes) noexcept nogil
cdef void give_memory(char *memory) noexcept nogil
cdef cbn_act act_of(act) except *
