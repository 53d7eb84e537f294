/* statistics.h: merge: sums of channels made moments, in loops over channels that a compiler makes vectors of. */
#ifndef CBN_STATISTICS_H
#define CBN_STATISTICS_H
#include <float.h>
#include <math.h>
#include <stddef.h>

static inline void cbn_add(double *restrict to, const double *restrict from, ptrdiff_t first, ptrdiff_t end)
{
    for (ptrdiff_t c = first; c < end; c++)
        to[c] += from[c];
}

/* S(d) becomes the mean, S(d*d) becomes m2 = S(d*d) - S(d)^2/n, d = x - shift. */
static inline void cbn_moments_of_sums(double *restrict sum, double *restrict square, const double *restrict shift,
                                       double n, ptrdiff_t first, ptrdiff_t end)
{
    for (ptrdiff_t c = first; c < end; c++) {
        const double s = sum[c], q = square[c], mean = s / n, m2 = q - s * mean;
        /* Where S(d*d) overflows m2 is inf and not inf - inf. Rounding can take it below zero */
        const double left = ((fabs(q) > DBL_MAX) & (fabs(s) <= DBL_MAX)) ? q : m2;
        sum[c] = shift[c] + mean;
        square[c] = left < 0 ? 0 : left;
    }
}

/* Whether n*(mean - shift)^2 is more than so many times m2 in some channel. */
static inline int cbn_some_far(const double *mean, const double *m2, const double *shift, double n, double times,
                               ptrdiff_t first, ptrdiff_t end)
{
    int some = 0;
    for (ptrdiff_t c = first; c < end; c++) {
        const double d = mean[c] - shift[c];
        some |= d * (n * d) > times * m2[c];
    }
    return some != 0;
}

#endif
