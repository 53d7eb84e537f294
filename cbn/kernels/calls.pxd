# What a whole call needs of its arguments: for the other modules with such calls.
cimport numpy as cnp

from .arrays cimport Input, Kind, Layout
from .job cimport Job
from .kernels cimport cbn_act


cdef class Prepared:
    cdef Job job                  # with y at x
    cdef Layout layout
    cdef Py_ssize_t generation    # of the engine's settings
    cdef Kind kind
    cdef int channel_axis

    @staticmethod
    cdef Prepared of(cnp.ndarray x, int channel_axis)
    cdef bint takes(self, object a) noexcept
    cdef bint overlap(self, cnp.ndarray a, cnp.ndarray b) noexcept
    cdef Input input_of(self, cnp.ndarray x, bint is_double)
    cdef bint covers(self, cnp.ndarray a, cnp.ndarray of_channels) noexcept


cdef Prepared prepared_for(object x, object channel_axis)
cdef bint is_per_channel(object a, Py_ssize_t C, bint written) noexcept
cdef bint is_epsilon(object eps, bint batch_statistics) noexcept
cdef double *copied(double *room_c, object a, Py_ssize_t C) noexcept
cdef bint set_arrays(Prepared p, Job *job, cnp.ndarray x, object out, object residual, cbn_act act) noexcept
