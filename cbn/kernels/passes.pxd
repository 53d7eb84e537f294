# What C and Cython extensions may cimport: the passes over memory of their own, without the GIL (examples/extension).

cdef class Passes:
    cdef void *job                  # what does not change from call to call
    cdef object room                # statistics and coefficients of the call that runs,
    cdef double *room_c             # and where they are
    cdef readonly Py_ssize_t C      # channels
    cdef readonly Py_ssize_t count  # values of each

    cdef void moments(self, const void *x, double *mean_c, double *m2_c) noexcept nogil
    cdef void apply(self, const void *x, void *y, const double *coef_c) noexcept nogil
    cdef void normalize(self, const void *x, void *y, const double *weight_c, const double *bias_c, double eps,
                        double *mean_c, double *m2_c, double *invstd_c) noexcept nogil
    cdef void backward(self, const void *dy, const void *x, void *dx, const double *weight_c, const double *mean_c,
                       const double *invstd_c, double *sum_c, double *product_c) noexcept nogil
