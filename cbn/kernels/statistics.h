/* statistics.h: merge: sums of channels made moments, in loops over channels that a compiler makes vectors of. */
#ifndef CBN_STATISTICS_H
#define CBN_STATISTICS_H
#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>

#include "wide.h"

CBN_LOOP void cbn_add_loop(double *restrict to, const double *restrict from, ptrdiff_t first, ptrdiff_t end)
{
    for (ptrdiff_t c = first; c < end; c++)
        to[c] += from[c];
}
CBN_OVER_CHANNELS(void, cbn_add,
                  (double *restrict to, const double *restrict from, ptrdiff_t first, ptrdiff_t end),
                  (to, from, first, end))

/* The means of eight values each of neighbouring channels. In pairs: of equal values 2x, 4x and 8x are exact, 3x is not. */
CBN_LOOP void cbn_means_of_eight_loop(double *restrict mean, const float *const *x, ptrdiff_t first, ptrdiff_t end)
{
    const float *a = x[0], *b = x[1], *c = x[2], *d = x[3], *e = x[4], *f = x[5], *g = x[6], *h = x[7];
    for (ptrdiff_t i = first; i < end; i++)
        mean[i] = ((((double)a[i] + b[i]) + ((double)c[i] + d[i])) + (((double)e[i] + f[i]) + ((double)g[i] + h[i]))) / 8;
}
CBN_OVER_CHANNELS(void, cbn_means_of_eight,
                  (double *restrict mean, const float *const *x, ptrdiff_t first, ptrdiff_t end),
                  (mean, x, first, end))

/* What float64 cannot hold of a + b, which is `sum`; 0 if that is not finite. */
static inline double cbn_lost(double a, double b, double sum)
{
    const double b_there = sum - a, lost = (a - (sum - b_there)) + (b - b_there);
    return fabs(lost) <= DBL_MAX ? lost : 0;
}

/* The lower part of the means that `cbn_moments_of_sums` makes of these sums: a mean has as many digits as S(d)/n, which
 * is not large beside the spread, and not just those that float64 has for it. So merges lose none. */
CBN_LOOP void cbn_lower_parts_loop(double *restrict low, const double *restrict sum, const double *restrict shift,
                                   double n, ptrdiff_t first, ptrdiff_t end)
{
    for (ptrdiff_t c = first; c < end; c++)
        low[c] = cbn_lost(shift[c], sum[c] / n, shift[c] + sum[c] / n);
}
CBN_OVER_CHANNELS(void, cbn_lower_parts,
                  (double *restrict low, const double *restrict sum, const double *restrict shift, double n,
                   ptrdiff_t first, ptrdiff_t end),
                  (low, sum, shift, n, first, end))

/* S(d) becomes the mean, S(d*d) becomes m2 = S(d*d) - S(d)^2/n, d = x - shift. */
CBN_LOOP void cbn_moments_of_sums_loop(double *restrict sum, double *restrict square, const double *restrict shift,
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
CBN_OVER_CHANNELS(void, cbn_moments_of_sums,
                  (double *restrict sum, double *restrict square, const double *restrict shift, double n,
                   ptrdiff_t first, ptrdiff_t end),
                  (sum, square, shift, n, first, end))

/* Whether n*(mean - shift)^2 is more than so many times m2 in some channel. */
CBN_LOOP int cbn_some_far_loop(const double *mean, const double *m2, const double *shift, double n, double times,
                               ptrdiff_t first, ptrdiff_t end)
{
    int some = 0;
    for (ptrdiff_t c = first; c < end; c++) {
        const double d = mean[c] - shift[c];
        some |= d * (n * d) > times * m2[c];
    }
    return some != 0;
}
CBN_OVER_CHANNELS(int, cbn_some_far,
                  (const double *mean, const double *m2, const double *shift, double n, double times, ptrdiff_t first,
                   ptrdiff_t end),
                  (mean, m2, shift, n, times, first, end))

/* Merge the moments b of some channels into a: Chan, Golub and LeVeque's formula. The mean of the larger side moves
 * less. An infinite mean has no distance to another: the plain average gives the mean of all values. If one side is
 * empty the other passes unchanged, whatever the empty side's mean is. A mean is two numbers, mean + low: the distance
 * of two means that are large beside it would lose digits else, and m2 with it. */
CBN_LOOP void cbn_merge_moments_loop(double *restrict count_a, double *restrict mean_a, double *restrict low_a,
                                     double *restrict m2_a, const double *restrict count_b,
                                     const double *restrict mean_b, const double *restrict low_b,
                                     const double *restrict m2_b, ptrdiff_t first, ptrdiff_t end)
{
    for (ptrdiff_t c = first; c < end; c++) {
        const double na = count_a[c], nb = count_b[c], n = na + nb, a = mean_a[c], b = mean_b[c];
        const int a_is_larger = na >= nb;
        const double base = a_is_larger ? a : b, base_low = a_is_larger ? low_a[c] : low_b[c];
        const double rest = a_is_larger ? b : a, rest_low = a_is_larger ? low_b[c] : low_a[c];
        const double n_rest = a_is_larger ? nb : na, share = n > 0 ? n_rest / n : 0;
        const double delta = (rest - base) + (rest_low - base_low), move = base_low + delta * share;
        const int finite = fabs(delta) <= DBL_MAX;
        const double mean = finite ? base + move : (a * na + b * nb) / n;
        const double low = finite ? cbn_lost(base, move, mean) : 0;
        const double m2 = m2_a[c] + m2_b[c] + delta * delta * (n - n_rest) * share;
        count_a[c] = n;
        mean_a[c] = nb == 0 ? a : na == 0 ? b : mean;
        low_a[c] = nb == 0 ? low_a[c] : na == 0 ? low_b[c] : low;
        m2_a[c] = nb == 0 ? m2_a[c] : na == 0 ? m2_b[c] : m2;
    }
}
CBN_OVER_CHANNELS(void, cbn_merge_moments,
                  (double *restrict count_a, double *restrict mean_a, double *restrict low_a, double *restrict m2_a,
                   const double *restrict count_b, const double *restrict mean_b, const double *restrict low_b,
                   const double *restrict m2_b, ptrdiff_t first, ptrdiff_t end),
                  (count_a, mean_a, low_a, m2_a, count_b, mean_b, low_b, m2_b, first, end))

/* ---- slices: moments of parts that have as many values each ---- */

/* A mean that others are subtracted from. */
static inline double cbn_reference(double mean)
{
    return fabs(mean) <= DBL_MAX ? mean : 0;
}

/* One slice more: S(d), S(d*d) and S(m2), d = mean - reference. The reference is one of the means, so that S(d*d) is not
 * large beside their spread. */
CBN_LOOP void cbn_add_slice_loop(double *restrict sum, double *restrict square, double *restrict m2_sum,
                                 const double *restrict reference, const double *restrict mean,
                                 const double *restrict m2, ptrdiff_t first, ptrdiff_t end)
{
    for (ptrdiff_t c = first; c < end; c++) {
        const double d = mean[c] - cbn_reference(reference[c]);
        sum[c] += d;
        square[c] += d * d;
        m2_sum[c] += m2[c];
    }
}
CBN_OVER_CHANNELS(void, cbn_add_slice,
                  (double *restrict sum, double *restrict square, double *restrict m2_sum,
                   const double *restrict reference, const double *restrict mean, const double *restrict m2,
                   ptrdiff_t first, ptrdiff_t end),
                  (sum, square, m2_sum, reference, mean, m2, first, end))

/* Those sums of n slices of `size` values become mean, low and m2 of them all: within the slices, and between. */
CBN_LOOP void cbn_moments_of_slices_loop(double *restrict sum, double *restrict square, double *restrict m2_sum,
                                         const double *restrict reference, double n, double size, ptrdiff_t first,
                                         ptrdiff_t end)
{
    for (ptrdiff_t c = first; c < end; c++) {
        const double base = cbn_reference(reference[c]), move = sum[c] / n, mean = base + move;
        const double q = square[c], left = q > DBL_MAX ? q : q - sum[c] * move;
        m2_sum[c] += size * (left < 0 ? 0 : left);
        square[c] = cbn_lost(base, move, mean);
        sum[c] = mean;
    }
}
CBN_OVER_CHANNELS(void, cbn_moments_of_slices,
                  (double *restrict sum, double *restrict square, double *restrict m2_sum,
                   const double *restrict reference, double n, double size, ptrdiff_t first, ptrdiff_t end),
                  (sum, square, m2_sum, reference, n, size, first, end))

CBN_LOOP void cbn_add_products_loop(double *restrict to, const double *restrict a, const double *restrict b,
                                    ptrdiff_t first, ptrdiff_t end)
{
    for (ptrdiff_t c = first; c < end; c++)
        to[c] += a[c] * b[c];
}
CBN_OVER_CHANNELS(void, cbn_add_products,
                  (double *restrict to, const double *restrict a, const double *restrict b, ptrdiff_t first,
                   ptrdiff_t end),
                  (to, a, b, first, end))

/* ---- what is counted ---- */

static inline void cbn_take_smaller(double *restrict to, const double *restrict from, ptrdiff_t first, ptrdiff_t end)
{
    for (ptrdiff_t c = first; c < end; c++)
        to[c] = from[c] < to[c] ? from[c] : to[c];
}

static inline void cbn_take_larger(double *restrict to, const double *restrict from, ptrdiff_t first, ptrdiff_t end)
{
    for (ptrdiff_t c = first; c < end; c++)
        to[c] = from[c] > to[c] ? from[c] : to[c];
}

/* The same, of extremes: NaN is the smallest, and the largest, as numpy has it. */
static inline void cbn_take_smallest(double *restrict to, const double *restrict from, ptrdiff_t first, ptrdiff_t end)
{
    for (ptrdiff_t c = first; c < end; c++)
        to[c] = from[c] < to[c] || from[c] != from[c] ? from[c] : to[c];
}

static inline void cbn_take_largest(double *restrict to, const double *restrict from, ptrdiff_t first, ptrdiff_t end)
{
    for (ptrdiff_t c = first; c < end; c++)
        to[c] = from[c] > to[c] || from[c] != from[c] ? from[c] : to[c];
}

/* ---- integers: exact sums, as loops/integers.h leaves them ---- */

__extension__ typedef unsigned __int128 cbn_uint128;

static inline void cbn_merge_integers(double *restrict to_, const double *restrict from_, ptrdiff_t pitch,
                                      ptrdiff_t first, ptrdiff_t end)
{
    int64_t *restrict to = (int64_t *)to_;
    const int64_t *restrict from = (const int64_t *)from_;
    for (ptrdiff_t c = first; c < end; c++) {
        const int64_t low = to[pitch + c] + from[pitch + c];
        const int64_t min = from[3 * pitch + c], max = from[4 * pitch + c];
        to[c] += from[c];
        to[pitch + c] = low & 0xffffffff;
        to[2 * pitch + c] += from[2 * pitch + c] + (low >> 32);
        to[3 * pitch + c] = min < to[3 * pitch + c] ? min : to[3 * pitch + c];
        to[4 * pitch + c] = max > to[4 * pitch + c] ? max : to[4 * pitch + c];
    }
}

/* a/n, rounded once; n < 2^63. The quotient of a, shifted as far as it goes, has 63 bits or more: what is cut off is in
 * none of the 54 that decide, so that one bit stands for it. */
static inline double cbn_quotient(cbn_uint128 a, uint64_t n)
{
    int shift = 0;
    if (a == 0)
        return 0;
    shift = ((uint64_t)(a >> 64) ? __builtin_clzll((uint64_t)(a >> 64)) : 64 + __builtin_clzll((uint64_t)a)) - 1;
    if (shift < 0) /* too many bits for a shift, which are enough */
        return (double)(a / n | (a % n != 0));
    a <<= shift;
    return ldexp((double)(a / n | (a % n != 0)), -shift);
}

/* mean = S/n and m2 = Q - S^2/n of exact S = S(x), Q = S(x*x), each rounded once. With S = q*n + r and r^2 = p*n + t the
 * latter is Q - q*(q*n + 2*r) - p - t/n, whose parts are integers that 128 bits hold. */
static inline void cbn_moments_of_integers(double *mean, double *low, double *m2, double *least, double *largest, const double *sums_,
                                           ptrdiff_t pitch, ptrdiff_t of_all, const double *count, ptrdiff_t first,
                                           ptrdiff_t end)
{
    const int64_t *sums = (const int64_t *)sums_;
    for (ptrdiff_t c = first; c < end; c++) {
        const uint64_t n = count ? (uint64_t)count[c] : (uint64_t)of_all;
        if (n == 0) {
            mean[c] = m2[c] = 0;
            if (low)
                low[c] = 0;
            continue;
        }
        const int64_t sum = sums[c];
        const uint64_t size = sum < 0 ? 0 - (uint64_t)sum : (uint64_t)sum, q = size / n, r = size % n;
        const cbn_uint128 squares =
            ((cbn_uint128)(uint64_t)sums[2 * pitch + c] << 32) + (uint64_t)sums[pitch + c];
        const cbn_uint128 r2 = (cbn_uint128)r * r, whole = squares - q * ((cbn_uint128)q * n + 2 * (cbn_uint128)r) - r2 / n;
        const uint64_t t = (uint64_t)(r2 % n);
        const double of_size = cbn_quotient(size, n);
        mean[c] = sum < 0 ? -of_size : of_size;
        if (low) {
            const double lost = cbn_lost((double)q, (double)r / (double)n, (double)q + (double)r / (double)n);
            const double rounded = (double)q + (double)r / (double)n - of_size; /* 0, or a unit in the last place */
            low[c] = sum < 0 ? -(lost + rounded) : lost + rounded;
        }
        if (t == 0)
            m2[c] = (double)whole;
        else if (whole >> 63)
            m2[c] = (double)((whole - 1) | 1);
        else
            m2[c] = cbn_quotient((whole - 1) * n + (n - t), n);
        if (least) {
            least[c] = (double)sums[3 * pitch + c];
            largest[c] = (double)sums[4 * pitch + c];
        }
    }
}

#endif
