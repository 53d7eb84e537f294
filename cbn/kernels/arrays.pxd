# Arrays as the passes take them: for the other compiled modules.
cimport numpy as cnp

from .job cimport Element
from .kernels cimport cbn_view
from .partition cimport Extents

cdef enum:
    MAXDIMS = 64   # numpy's own limit


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
