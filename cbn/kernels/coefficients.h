/* coefficients.h: solve: what a channel's statistics make of its coefficients, and whether float32 arithmetic does for
 * them. Loops over channels that a compiler makes vectors of: where channels have few values, they are half of a call.
 *
 * An array of coefficients is (n, C), contiguous float64; kernels.h names its rows, but for CBN_BOUND. Row i of channel
 * c is coef[i*C + c]. What else is per channel is C values; weight NULL is ones, bias NULL zeros.
 */
#ifndef CBN_COEFFICIENTS_H
#define CBN_COEFFICIENTS_H
#include <float.h>
#include <math.h>
#include <string.h>

#include "kernels.h"
#include "statistics.h"
#include "wide.h"

enum {
    CBN_BOUND = 4, /* backward, for the engine alone: what (x - mean)*slope and the lower parts can add */
    CBN_FORWARD_ROWS = 3,
    CBN_REREAD_ROWS = 4, /* forward, as backward reads them again */
    CBN_BACKWARD_ROWS = 5,
};

/* Before a loop whose arrays are apart: more of them than the compiler would compare. */
#if defined(__clang__)
#define CBN_APART _Pragma("clang loop vectorize(assume_safety)")
#else
#define CBN_APART _Pragma("GCC ivdep")
#endif

/* ---- solve ---- */

/* 1/sqrt(m2/n + eps) of some channels, which may take the place of m2. */
CBN_LOOP void cbn_inverse_std_loop(double *invstd, const double *m2, double n, double eps, ptrdiff_t first,
                                   ptrdiff_t end)
{
    for (ptrdiff_t c = first; c < end; c++)
        invstd[c] = 1 / sqrt(m2[c] / n + eps);
}
CBN_OVER_CHANNELS(void, cbn_inverse_std,
                  (double *invstd, const double *m2, double n, double eps, ptrdiff_t first, ptrdiff_t end),
                  (invstd, m2, n, eps, first, end))

/* What both directions have: mean, and scale = invstd*weight. */
static inline void cbn_solve_both(double *coef, ptrdiff_t C, ptrdiff_t first, ptrdiff_t end, const double *mean,
                                  const double *invstd, const double *weight)
{
    const size_t n_bytes = (size_t)(end - first) * sizeof *coef;
    double *scale = coef + CBN_SCALE * C;
    memcpy(coef + CBN_MEAN * C + first, mean + first, n_bytes);
    if (weight)
        for (ptrdiff_t c = first; c < end; c++)
            scale[c] = invstd[c] * weight[c];
    else
        memcpy(scale + first, invstd + first, n_bytes);
}

/* y = (x - mean)*invstd*weight + bias */
CBN_LOOP void cbn_solve_forward_loop(double *coef, ptrdiff_t C, ptrdiff_t first, ptrdiff_t end, const double *mean,
                                     const double *invstd, const double *weight, const double *bias)
{
    const size_t n_bytes = (size_t)(end - first) * sizeof *coef;
    cbn_solve_both(coef, C, first, end, mean, invstd, weight);
    if (bias)
        memcpy(coef + CBN_OFFSET * C + first, bias + first, n_bytes);
    else
        memset(coef + CBN_OFFSET * C + first, 0, n_bytes);
}
CBN_OVER_CHANNELS(void, cbn_solve_forward,
                  (double *coef, ptrdiff_t C, ptrdiff_t first, ptrdiff_t end, const double *mean,
                   const double *invstd, const double *weight, const double *bias),
                  (coef, C, first, end, mean, invstd, weight, bias))

/* y = (x - mean)*s, s = 1/sqrt(var + eps); or 1/(sqrt(var) + eps) if eps is `outside`. Where the variance is 0 it is 1 if
 * `zero_is_one`. mean NULL: y = x*s, and offset -0 keeps the sign of a zero. */
CBN_WIDE void cbn_solve_standard(double *coef, ptrdiff_t C, const double *mean, const double *var, double eps,
                                      int outside, int zero_is_one)
{
    double *scale = coef + CBN_SCALE * C, *offset = coef + CBN_OFFSET * C;
    if (mean)
        memcpy(coef + CBN_MEAN * C, mean, (size_t)C * sizeof *coef);
    else
        memset(coef + CBN_MEAN * C, 0, (size_t)C * sizeof *coef);
    for (ptrdiff_t c = 0; c < C; c++)
        offset[c] = mean ? 0 : -0.0;
    if (outside)
        CBN_APART for (ptrdiff_t c = 0; c < C; c++)
            scale[c] = 1 / (sqrt(var[c]) + eps);
    else
        CBN_APART for (ptrdiff_t c = 0; c < C; c++)
            scale[c] = 1 / sqrt(var[c] + eps);
    for (ptrdiff_t c = 0; zero_is_one && c < C; c++)
        scale[c] = var[c] == 0 ? 1 : scale[c];
}

/* A mixture of the running statistics and the batch's, in the place of the running ones: as if a of the values came from
 * the batch. var = (1 - a)*running_var + a*m2/n + a*(1 - a)*(running_mean - mean)^2. */
CBN_LOOP void cbn_mix_loop(double *running_mean, double *running_var, const double *mean, const double *m2, double n,
                           double a, ptrdiff_t first, ptrdiff_t end)
{
    for (ptrdiff_t c = first; c < end; c++) {
        const double between = running_mean[c] - mean[c];
        running_var[c] = (1 - a) * running_var[c] + a * (m2[c] / n) + a * (1 - a) * between * between;
        running_mean[c] = (1 - a) * running_mean[c] + a * mean[c];
    }
}
CBN_OVER_CHANNELS(void, cbn_mix,
                  (double *running_mean, double *running_var, const double *mean, const double *m2, double n,
                   double a, ptrdiff_t first, ptrdiff_t end),
                  (running_mean, running_var, mean, m2, n, a, first, end))

/* Batch renormalization (Ioffe 2017): y = ((x - mean)*invstd*r + d)*weight + bias, with s = sqrt(running_var + eps), r =
 * 1/(invstd*s) between 1/r_max and r_max, d = (mean - running_mean)/s between -d_max and d_max. r and d come in the place
 * of the running variance and mean; weight and bias become those of (x - mean)*invstd. */
CBN_LOOP void cbn_renorm_loop(double *weight, double *bias, double *running_var, double *running_mean,
                              const double *mean, const double *invstd, double eps, double r_max, double d_max,
                              ptrdiff_t first, ptrdiff_t end)
{
    for (ptrdiff_t c = first; c < end; c++) {
        const double s = sqrt(running_var[c] + eps);
        double r = 1 / (invstd[c] * s), d = (mean[c] - running_mean[c]) / s;
        r = r < 1 / r_max ? 1 / r_max : r > r_max ? r_max : r; /* NaN stays */
        d = d < -d_max ? -d_max : d > d_max ? d_max : d;
        bias[c] += weight[c] * d;
        weight[c] *= r;
        running_var[c] = r;
        running_mean[c] = d;
    }
}
CBN_OVER_CHANNELS(void, cbn_renorm,
                  (double *weight, double *bias, double *running_var, double *running_mean, const double *mean,
                   const double *invstd, double eps, double r_max, double d_max, ptrdiff_t first, ptrdiff_t end),
                  (weight, bias, running_var, running_mean, mean, invstd, eps, r_max, d_max, first, end))

/* A bound of what the lower one of the two floats that are a mean contributes (loops/formulas.h). */
static inline double cbn_lower_part(double mean, double scale)
{
    return fabs(mean * scale) * (FLT_EPSILON / 2);
}

/* dx = (dh - S(dh)/n - (x - mean)*S(dh*(x - mean))*invstd^2/n)*invstd*weight
 *
 * The bound goes by |x - mean| <= sqrt(n)/invstd, which holds for x among the n values that mean and invstd are of. */
CBN_LOOP void cbn_solve_backward_loop(double *coef, ptrdiff_t C, ptrdiff_t first, ptrdiff_t end, const double *mean,
                                      const double *invstd, const double *weight, const double *sum_dh,
                                      const double *sum_dh_xmu, double n)
{
    const double root = sqrt(n);
    const double *scale = coef + CBN_SCALE * C;
    double *grad_mean = coef + CBN_GRAD_MEAN * C;
    double *slope = coef + CBN_SLOPE * C, *bound = coef + CBN_BOUND * C;
    cbn_solve_both(coef, C, first, end, mean, invstd, weight);
    CBN_APART for (ptrdiff_t c = first; c < end; c++) {
        grad_mean[c] = sum_dh[c] / n;
        slope[c] = sum_dh_xmu[c] / n * invstd[c] * invstd[c] * scale[c];
        bound[c] = fabs(sum_dh_xmu[c] * invstd[c] * scale[c]) / root + cbn_lower_part(mean[c], slope[c]) +
                   cbn_lower_part(grad_mean[c], scale[c]);
    }
}
CBN_OVER_CHANNELS(void, cbn_solve_backward,
                  (double *coef, ptrdiff_t C, ptrdiff_t first, ptrdiff_t end, const double *mean,
                   const double *invstd, const double *weight, const double *sum_dh, const double *sum_dh_xmu,
                   double n),
                  (coef, C, first, end, mean, invstd, weight, sum_dh, sum_dh_xmu, n))

/* ---- solve, second derivatives ----
 *
 * r = invstd, w = weight, d = x - mean; gbar and zbar are the means of g and z over the n values of a channel, p and q
 * those of g*d*r and z*d*r, and cov is that of (g - gbar)*(z - zbar).
 */

/* A coefficient; of NaN one that stays NaN when it is rounded to any type, see `quiet` in vec/vec.h. */
static inline double cbn_quiet(double a)
{
    return a != a ? NAN : a;
}

/* low*factor, where a mean that is not finite has no lower part and the factor may be infinite */
static inline double cbn_low_term(double low, double factor)
{
    return low != 0 ? low * factor : 0;
}

/* The derivative of y along the tangents z, weight_t and bias_t, of which the last two may be NULL for zeros. That of
 * the mean is zbar, that of r is -r^2*q, so
 *
 *     y_t = (z - zbar)*w*r + d*r*(weight_t - w*r*q) + bias_t
 *
 * sums NULL: through statistics that do not depend on x, with zbar and q of 0. With z = ggI, weight_t = ggG and
 * bias_t = ggB it is the gradient of dy, since dx, dweight and dbias are linear in dy. */
static inline void cbn_solve_tangent(double *coef, ptrdiff_t C, ptrdiff_t first, ptrdiff_t end, const double *mean,
                                     const double *invstd, const double *weight, const double *weight_t,
                                     const double *bias_t, const double *sums, const double *shifts, double n)
{
    for (ptrdiff_t c = first; c < end; c++) {
        const double r = invstd[c], scale = weight ? weight[c] * r : r;
        const double z0 = sums ? shifts[CBN_SHIFT_Z * C + c] : 0, z = sums ? sums[CBN_SUM_Z * C + c] / n : 0;
        const double q = sums ? sums[CBN_SUM_ZD * C + c] / n * r : 0, zlow = cbn_lost(z0, z, z0 + z);
        coef[CBN_2_MEAN * C + c] = cbn_quiet(mean[c]);
        coef[CBN_2_ZMEAN * C + c] = cbn_quiet(z0 + z);
        coef[CBN_2_SCALE * C + c] = cbn_quiet(scale);
        coef[CBN_2_SLOPE * C + c] = cbn_quiet(r * ((weight_t ? weight_t[c] : 0) - scale * q));
        coef[CBN_2_OFFSET * C + c] = cbn_quiet((bias_t ? bias_t[c] : 0) - cbn_low_term(zlow, scale));
    }
}

/* The other coefficients, of the gradient of x, after those of its tangent; and the gradient of the weight, which is
 * S(z*P(g)) = n*r*(cov - p*q):
 *
 *     grad_x = d*r*(w*r^2*(3*p*q - cov) - ggG*r*p) + (g - gbar)*r*(ggG - w*r*q) - (z - zbar)*w*r^2*p
 *
 * r goes to each mean of products first, so that no product is larger than it has to be. */
static inline void cbn_solve_second(double *coef, double *dweight, ptrdiff_t C, ptrdiff_t first, ptrdiff_t end,
                                    const double *invstd, const double *weight, const double *ggG, const double *sums,
                                    const double *shifts, double n)
{
    for (ptrdiff_t c = first; c < end; c++) {
        const double r = invstd[c], w = weight ? weight[c] : 1, gamma = ggG ? ggG[c] : 0;
        const double g0 = shifts[CBN_SHIFT_G * C + c], z0 = shifts[CBN_SHIFT_Z * C + c];
        const double g = sums[CBN_SUM_G * C + c] / n, z = sums[CBN_SUM_Z * C + c] / n;
        const double p = sums[CBN_SUM_GD * C + c] / n * r, q = sums[CBN_SUM_ZD * C + c] / n * r;
        const double cov = sums[CBN_SUM_GZ * C + c] / n - g * z, of_z = -w * r * (r * p);
        const double of_glow = cbn_low_term(cbn_lost(g0, g, g0 + g), coef[CBN_2_SLOPE * C + c]);
        coef[CBN_2_GMEAN * C + c] = cbn_quiet(g0 + g);
        coef[CBN_2_OF_X * C + c] = cbn_quiet(r * (r * (w * (r * (3 * p * q - cov)) - gamma * p)));
        coef[CBN_2_OF_Z * C + c] = cbn_quiet(of_z);
        coef[CBN_2_TERM * C + c] = cbn_quiet(-of_glow - cbn_low_term(cbn_lost(z0, z, z0 + z), of_z));
        dweight[c] = n * r * (cov - p * q);
    }
}

/* ---- does float32 do? ---- */

/* Whether a factor is zero or a normal number; other ones have lost digits. */
static inline int cbn_is_factor(double a)
{
    return (a == 0) | ((fabs(a) >= FLT_MIN) & (fabs(a) <= FLT_MAX));
}

/* Whether float32 arithmetic does for a channel: it holds the coefficients, and nothing overflows on the way to an
 * element of y or dx that does not.
 *
 * What is subtracted from x and from the gradient (`mean`, and backward `third`) must be small beside the largest
 * values, and so must what is added to a product: the offset (forward `third`), and what `added` bounds. Bitwise, for a
 * loop without branches. */
static inline int cbn_fits_float32(double mean, double scale, double third, double slope, double added)
{
    return (fabs(mean) < CBN_SMALL_FLOAT) & (fabs(third) + added < CBN_SMALL_FLOAT) & cbn_is_factor(scale) &
           cbn_is_factor(slope);
}

static inline double cbn_finite(double a)
{
    return isfinite(a) ? a : 0;
}

/* Whether a channel of smaller elements needs float64 arithmetic. Infinities and NaN are such in every type. */
static inline int cbn_takes_float64(const double *coef, ptrdiff_t C, ptrdiff_t c, int backward)
{
    const double mean = coef[CBN_MEAN * C + c], scale = coef[CBN_SCALE * C + c];
    const double third = coef[(backward ? CBN_GRAD_MEAN : CBN_OFFSET) * C + c];
    const double slope = backward ? coef[CBN_SLOPE * C + c] : 0;
    const double added = backward ? coef[CBN_BOUND * C + c] : cbn_lower_part(mean, scale);
    return !cbn_fits_float32(cbn_finite(mean), cbn_finite(scale), cbn_finite(third), cbn_finite(slope),
                             cbn_finite(added));
}

/* Whether none of some channels needs float64 arithmetic; of float64 elements, whether none can overflow. A NaN counts
 * as no. */
CBN_LOOP int cbn_all_fit_loop(const double *coef, ptrdiff_t C, ptrdiff_t first, ptrdiff_t end, int backward,
                              ptrdiff_t itemsize)
{
    const double *mean = coef + CBN_MEAN * C, *scale = coef + CBN_SCALE * C;
    const double *third = coef + (backward ? CBN_GRAD_MEAN : CBN_OFFSET) * C;
    const double *slope = coef + CBN_SLOPE * C, *bound = coef + CBN_BOUND * C;
    int fit = 1;
    if (backward && itemsize == 8)
        for (ptrdiff_t c = first; c < end; c++)
            fit &= (fabs(mean[c]) < CBN_SMALL_DOUBLE) & (fabs(third[c]) + bound[c] < CBN_SMALL_DOUBLE);
    else if (itemsize == 8)
        for (ptrdiff_t c = first; c < end; c++)
            fit &= (fabs(mean[c]) < CBN_SMALL_DOUBLE) & (fabs(third[c]) < CBN_SMALL_DOUBLE);
    else if (backward)
        for (ptrdiff_t c = first; c < end; c++)
            fit &= cbn_fits_float32(mean[c], scale[c], third[c], slope[c], bound[c]);
    else
        for (ptrdiff_t c = first; c < end; c++)
            fit &= cbn_fits_float32(mean[c], scale[c], third[c], 0, cbn_lower_part(mean[c], scale[c]));
    return fit;
}
CBN_OVER_CHANNELS(int, cbn_all_fit,
                  (const double *coef, ptrdiff_t C, ptrdiff_t first, ptrdiff_t end, int backward, ptrdiff_t itemsize),
                  (coef, C, first, end, backward, itemsize))

#endif
