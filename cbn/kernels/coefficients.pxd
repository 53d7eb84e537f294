# Solve: what a channel's statistics make of its coefficients, and whether float32 arithmetic does for them.
#
# An array of coefficients is (n, C), contiguous float64; kernels.h names its rows, but for BOUND below. Row i of
# channel c is coef[i*C + c].
from libc.math cimport fabs, isfinite, sqrt

from .kernels cimport CBN_GRAD_MEAN, CBN_MEAN, CBN_OFFSET, CBN_SCALE, CBN_SLOPE

cdef extern from *:
    """
    #include <float.h>
    /* A quarter of a unit in the last place of the largest values: added to one of them, less does not overflow */
    #define CBN_SMALL_FLOAT 0x1p102
    #define CBN_SMALL_DOUBLE 0x1p969
    """
    const double FLT_MIN, FLT_MAX, FLT_EPSILON, CBN_SMALL_FLOAT, CBN_SMALL_DOUBLE

cdef enum:
    BOUND = 4                # backward, for the engine alone: what (x - mean)*slope and the lower parts can add
    FORWARD_ROWS = 3
    REREAD_ROWS = 4          # forward, as backward reads them again
    BACKWARD_ROWS = 5


cdef inline double lower_part(double mean, double scale) noexcept nogil:
    """A bound of what the lower one of the two floats that are a mean contributes (loops/formulas.h)."""
    return fabs(mean * scale) * (FLT_EPSILON / 2)


cdef inline void solve_forward(double *coef, Py_ssize_t C, Py_ssize_t c, double mean, double invstd, double weight,
                               double bias) noexcept nogil:
    """y = (x - mean)*invstd*weight + bias"""
    coef[CBN_MEAN * C + c] = mean
    coef[CBN_SCALE * C + c] = invstd * weight
    coef[CBN_OFFSET * C + c] = bias


cdef inline void solve_backward(double *coef, Py_ssize_t C, Py_ssize_t c, double mean, double invstd, double weight,
                                double sum_dh, double sum_dh_xmu, double n) noexcept nogil:
    """dx = (dh - S(dh)/n - (x - mean)*S(dh*(x - mean))*invstd^2/n)*invstd*weight

    The bound goes by |x - mean| <= sqrt(n)/invstd, which holds for x among the n values that mean and invstd are of.
    """
    cdef double scale = invstd * weight, grad_mean = sum_dh / n, slope = sum_dh_xmu / n * invstd * invstd * scale
    coef[CBN_MEAN * C + c] = mean
    coef[CBN_SCALE * C + c] = scale
    coef[CBN_GRAD_MEAN * C + c] = grad_mean
    coef[CBN_SLOPE * C + c] = slope
    coef[BOUND * C + c] = fabs(sum_dh_xmu * invstd * scale) / sqrt(n) \
        + lower_part(mean, slope) + lower_part(grad_mean, scale)


cdef inline bint fits_float32(double mean, double scale, double third, double slope, double added) noexcept nogil:
    """Whether float32 arithmetic does for a channel: it holds the coefficients, and nothing overflows on the way to an
    element of y or dx that does not.

    A factor that is not zero must be a normal number, or it has lost digits. What is subtracted from x and from the
    gradient (`mean`, and backward `third`) must be small beside the largest values, and so must what is added to a
    product: the offset (forward `third`), and what `added` bounds. Bitwise, for a loop without branches.
    """
    return (fabs(mean) < CBN_SMALL_FLOAT) & (fabs(third) + added < CBN_SMALL_FLOAT) \
        & ((scale == 0) | ((fabs(scale) >= FLT_MIN) & (fabs(scale) <= FLT_MAX))) \
        & ((slope == 0) | ((fabs(slope) >= FLT_MIN) & (fabs(slope) <= FLT_MAX)))


cdef inline double finite(double a) noexcept nogil:
    return a if isfinite(a) else 0


cdef inline bint takes_float64(double mean, double scale, double third, double slope, double added) noexcept nogil:
    """Whether a channel of smaller elements needs float64 arithmetic. Infinities and NaN are such in every type."""
    return not fits_float32(finite(mean), finite(scale), finite(third), finite(slope), finite(added))


cdef inline bint forward_takes_float64(double mean, double scale, double offset) noexcept nogil:
    return takes_float64(mean, scale, offset, 0, lower_part(mean, scale))


cdef inline bint channel_takes_float64(const double *coef, Py_ssize_t C, Py_ssize_t c, bint backward) noexcept nogil:
    if backward:
        return takes_float64(coef[CBN_MEAN * C + c], coef[CBN_SCALE * C + c], coef[CBN_GRAD_MEAN * C + c],
                             coef[CBN_SLOPE * C + c], coef[BOUND * C + c])
    return forward_takes_float64(coef[CBN_MEAN * C + c], coef[CBN_SCALE * C + c], coef[CBN_OFFSET * C + c])


cdef inline bint all_fit(const double *coef, Py_ssize_t C, Py_ssize_t first, Py_ssize_t end, bint backward,
                         Py_ssize_t itemsize) noexcept nogil:
    """Whether none of these channels needs float64 arithmetic; of float64 elements, whether none can overflow.

    A NaN counts as no.
    """
    cdef Py_ssize_t c
    cdef const double *mean = coef + CBN_MEAN * C
    cdef const double *scale = coef + CBN_SCALE * C
    cdef const double *third = coef + (CBN_GRAD_MEAN if backward else CBN_OFFSET) * C
    cdef const double *slope = coef + CBN_SLOPE * C if backward else NULL
    cdef const double *bound = coef + BOUND * C if backward else NULL
    cdef bint fit = True
    if backward and itemsize == 8:
        for c in range(first, end):
            fit &= (fabs(mean[c]) < CBN_SMALL_DOUBLE) & (fabs(third[c]) + bound[c] < CBN_SMALL_DOUBLE)
    elif itemsize == 8:
        for c in range(first, end):
            fit &= (fabs(mean[c]) < CBN_SMALL_DOUBLE) & (fabs(third[c]) < CBN_SMALL_DOUBLE)
    elif backward:
        for c in range(first, end):
            fit &= fits_float32(mean[c], scale[c], third[c], slope[c], bound[c])
    else:
        for c in range(first, end):
            fit &= fits_float32(mean[c], scale[c], third[c], 0, lower_part(mean[c], scale[c]))
    return fit
