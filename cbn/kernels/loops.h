/* loops.h: the eight loops. A template; it opens no thread, allocates nothing and knows no Python.
 *
 * Parameters, undefined again at the end:
 *   ELEM    the element in memory        float   float     double
 *   REAL    the arithmetic               float   double    double      (no other combination)
 *   TYPE    its name in the symbols      f32     f32_wide  f64
 *   WIDENS  defined where REAL is wider than ELEM
 *   SUMS    defined: the reductions too. They need REAL double: a float64 sum of float32 values is as good as
 *           exact, and shifted by a value of the channel it stays so whatever the mean is (below).
 *
 * Every formula is a macro over one element, so that a vector and the scalars of a tail share its text: with
 * one expression the compiler contracts both to the same fused operations, and an element gets the same bits
 * wherever it stands in a run.
 */
#include "vec.h"

#define UNROLL 4 /* independent accumulators: an addition takes 3 to 4 cycles, and one can start each cycle */
#define ROWS 8   /* rows read side by side: amortizes the accumulators' trip to L1, within the prefetchers' reach */

/* ---- apply -------------------------------------------------------------------------------------------
 *
 * y = (x - mean)*scale + offset, unfolded: x*scale + (offset - mean*scale) would lose all digits of a channel
 * whose mean is large beside its spread. In float32 the mean is carried as two floats, high + low, since one
 * cannot hold it: x - high is exact where x is near the mean (Sterbenz), and then low corrects the remainder.
 * In float64 low is zero; so it is where the mean is infinite, and mean - high would be NaN.
 */
#define LOW_PART(mean, high) ((high) - (high) == 0 ? (real)((mean) - (high)) : (real)0)
#define APPLY(x, high, low, scale, offset) ((((x) - (high)) - (low)) * (scale) + (offset))

TARGET static void LOOP(apply_first)(const void *x_ns, void *y_ns, ptrdiff_t n_runs, ptrdiff_t length,
                                     ptrdiff_t x_stride, ptrdiff_t y_stride, const double *coef_c,
                                     ptrdiff_t pitch)
{
    const real high = (real)coef_c[0], low = LOW_PART(coef_c[0], high);
    const real scale = (real)coef_c[pitch], offset = (real)coef_c[2 * pitch];
    const vec vhigh = splat(high), vlow = splat(low), vscale = splat(scale), voffset = splat(offset);
    for (ptrdiff_t n = 0; n < n_runs; n++) {
        const elem *x = (const elem *)x_ns + n * x_stride;
        elem *y = (elem *)y_ns + n * y_stride;
        ptrdiff_t i = 0;
        for (; i + UNROLL * LANES <= length; i += UNROLL * LANES) {
            vec v[UNROLL];
            for (int u = 0; u < UNROLL; u++)
                v[u] = load(x + i + u * LANES);
            for (int u = 0; u < UNROLL; u++)
                store(y + i + u * LANES, APPLY(v[u], vhigh, vlow, vscale, voffset));
        }
        for (; i + LANES <= length; i += LANES)
            store(y + i, APPLY(load(x + i), vhigh, vlow, vscale, voffset));
        for (; i < length; i++)
            y[i] = (elem)APPLY((real)x[i], high, low, scale, offset);
    }
}

TARGET static void LOOP(apply_last)(const void *x_nc, void *y_nc, ptrdiff_t rows, ptrdiff_t columns,
                                    ptrdiff_t x_stride, ptrdiff_t y_stride, const double *coef_c,
                                    ptrdiff_t pitch)
{
    real high[CBN_COLUMNS], low[CBN_COLUMNS], scale[CBN_COLUMNS], offset[CBN_COLUMNS];
    for (ptrdiff_t c = 0; c < columns; c++) {
        high[c] = (real)coef_c[c];
        low[c] = LOW_PART(coef_c[c], high[c]);
        scale[c] = (real)coef_c[pitch + c];
        offset[c] = (real)coef_c[2 * pitch + c];
    }
    for (ptrdiff_t n = 0; n < rows; n++) {
        const elem *x = (const elem *)x_nc + n * x_stride;
        elem *y = (elem *)y_nc + n * y_stride;
        ptrdiff_t c = 0;
        for (; c + LANES <= columns; c += LANES)
            store(y + c, APPLY(load(x + c), load_real(high + c), load_real(low + c), load_real(scale + c),
                               load_real(offset + c)));
        for (; c < columns; c++)
            y[c] = (elem)APPLY((real)x[c], high[c], low[c], scale[c], offset[c]);
    }
}

/* ---- grad_apply --------------------------------------------------------------------------------------
 *
 * dx = (g - gmean - d*slope)*scale,  d = x - mean, slope = S(g*d)*invstd^2/n, gmean = S(g)/n
 *
 * with both means carried as two floats. The low part of gmean is a constant by the time it has been scaled, so
 * it rides on the last multiplication: rest = -low(gmean)*scale.
 */
#define GRAD_APPLY(g, x, high, low, scale, gmean, slope, rest) \
    ((((g) - (gmean)) - (((x) - (high)) - (low)) * (slope)) * (scale) + (rest))

TARGET static void LOOP(grad_apply_first)(const void *g_ns, const void *x_ns, void *dx_ns, ptrdiff_t n_runs,
                                          ptrdiff_t length, ptrdiff_t g_stride, ptrdiff_t x_stride,
                                          ptrdiff_t dx_stride, const double *coef_c, ptrdiff_t pitch)
{
    const real high = (real)coef_c[0], low = LOW_PART(coef_c[0], high);
    const real scale = (real)coef_c[pitch], gmean = (real)coef_c[2 * pitch], slope = (real)coef_c[3 * pitch];
    const real rest = (real)(-LOW_PART(coef_c[2 * pitch], gmean) * coef_c[pitch]);
    const vec vhigh = splat(high), vlow = splat(low), vscale = splat(scale), vgmean = splat(gmean);
    const vec vslope = splat(slope), vrest = splat(rest);
    for (ptrdiff_t n = 0; n < n_runs; n++) {
        const elem *g = (const elem *)g_ns + n * g_stride;
        const elem *x = (const elem *)x_ns + n * x_stride;
        elem *dx = (elem *)dx_ns + n * dx_stride;
        ptrdiff_t i = 0;
        for (; i + UNROLL * LANES <= length; i += UNROLL * LANES) {
            vec v[UNROLL];
            for (int u = 0; u < UNROLL; u++)
                v[u] = GRAD_APPLY(load(g + i + u * LANES), load(x + i + u * LANES), vhigh, vlow, vscale, vgmean,
                                  vslope, vrest);
            for (int u = 0; u < UNROLL; u++)
                store(dx + i + u * LANES, v[u]);
        }
        for (; i + LANES <= length; i += LANES)
            store(dx + i,
                  GRAD_APPLY(load(g + i), load(x + i), vhigh, vlow, vscale, vgmean, vslope, vrest));
        for (; i < length; i++)
            dx[i] = (elem)GRAD_APPLY((real)g[i], (real)x[i], high, low, scale, gmean, slope, rest);
    }
}

TARGET static void LOOP(grad_apply_last)(const void *g_nc, const void *x_nc, void *dx_nc, ptrdiff_t rows,
                                         ptrdiff_t columns, ptrdiff_t g_stride, ptrdiff_t x_stride,
                                         ptrdiff_t dx_stride, const double *coef_c, ptrdiff_t pitch)
{
    real high[CBN_COLUMNS], low[CBN_COLUMNS], scale[CBN_COLUMNS];
    real gmean[CBN_COLUMNS], slope[CBN_COLUMNS], rest[CBN_COLUMNS];
    for (ptrdiff_t c = 0; c < columns; c++) {
        high[c] = (real)coef_c[c];
        low[c] = LOW_PART(coef_c[c], high[c]);
        scale[c] = (real)coef_c[pitch + c];
        gmean[c] = (real)coef_c[2 * pitch + c];
        slope[c] = (real)coef_c[3 * pitch + c];
        rest[c] = (real)(-LOW_PART(coef_c[2 * pitch + c], gmean[c]) * coef_c[pitch + c]);
    }
    for (ptrdiff_t n = 0; n < rows; n++) {
        const elem *g = (const elem *)g_nc + n * g_stride;
        const elem *x = (const elem *)x_nc + n * x_stride;
        elem *dx = (elem *)dx_nc + n * dx_stride;
        ptrdiff_t c = 0;
        for (; c + LANES <= columns; c += LANES)
            store(dx + c, GRAD_APPLY(load(g + c), load(x + c), load_real(high + c), load_real(low + c),
                                     load_real(scale + c), load_real(gmean + c), load_real(slope + c),
                                     load_real(rest + c)));
        for (; c < columns; c++)
            dx[c] = (elem)GRAD_APPLY((real)g[c], (real)x[c], high[c], low[c], scale[c], gmean[c], slope[c], rest[c]);
    }
}

#ifdef SUMS
/* ---- moments -----------------------------------------------------------------------------------------
 *
 * S(d) and S(d*d) of d = x - shift, from which m2 = S(d*d) - S(d)^2/n. The subtraction costs log2(S(d*d)/m2) =
 * log2(1 + (shift - mean)^2/var) bits. The shift is a value of the channel, so that a constant one gives d = 0 and
 * its mean exactly; where that value lies far out, the pass is done again with the mean as shift (passes.pyx).
 */
#define MOMENTS(sum, square, x, shift)        \
    do {                                      \
        __typeof__(sum) d = (x) - (shift);    \
        (sum) += d;                           \
        (square) += d * d;                    \
    } while (0)

TARGET static void LOOP(moments_first)(const void *x_ns, ptrdiff_t n_runs, ptrdiff_t length, ptrdiff_t x_stride,
                                       double shift, double *sums)
{
    const vec vshift = splat(shift);
    vec sum[UNROLL] = {{0}}, square[UNROLL] = {{0}};
    real tail_sum = 0, tail_square = 0;
    for (ptrdiff_t n = 0; n < n_runs; n++) {
        const elem *x = (const elem *)x_ns + n * x_stride;
        ptrdiff_t i = 0;
        for (; i + UNROLL * LANES <= length; i += UNROLL * LANES)
            for (int u = 0; u < UNROLL; u++)
                MOMENTS(sum[u], square[u], load(x + i + u * LANES), vshift);
        for (; i + LANES <= length; i += LANES)
            MOMENTS(sum[0], square[0], load(x + i), vshift);
        for (; i < length; i++)
            MOMENTS(tail_sum, tail_square, (real)x[i], shift);
    }
    sums[0] = total((sum[0] + sum[1]) + (sum[2] + sum[3])) + tail_sum;
    sums[1] = total((square[0] + square[1]) + (square[2] + square[3])) + tail_square;
}

TARGET static void LOOP(moments_last)(const void *x_nc, ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t x_stride,
                                      const double *shift_c, double *sum_c, double *square_c)
{
    memset(sum_c, 0, (size_t)columns * sizeof *sum_c);
    memset(square_c, 0, (size_t)columns * sizeof *square_c);
    for (ptrdiff_t n = 0; n < rows; n += ROWS) {
        const elem *x = (const elem *)x_nc + n * x_stride;
        const ptrdiff_t height = rows - n < ROWS ? rows - n : ROWS;
        ptrdiff_t c = 0;
        for (; c + LANES <= columns; c += LANES) {
            const vec shift = load_real(shift_c + c);
            vec sum = load_real(sum_c + c), square = load_real(square_c + c);
            for (ptrdiff_t r = 0; r < height; r++)
                MOMENTS(sum, square, load(x + r * x_stride + c), shift);
            store_real(sum_c + c, sum);
            store_real(square_c + c, square);
        }
        for (; c < columns; c++)
            for (ptrdiff_t r = 0; r < height; r++)
                MOMENTS(sum_c[c], square_c[c], (real)x[r * x_stride + c], shift_c[c]);
    }
}

/* ---- grad_moments ------------------------------------------------------------------------------------ */
#define GRAD_MOMENTS(sum, product, g, x, mean) \
    do {                                       \
        __typeof__(sum) g_ = (g);              \
        (sum) += g_;                           \
        (product) += g_ * ((x) - (mean));      \
    } while (0)

TARGET static void LOOP(grad_moments_first)(const void *g_ns, const void *x_ns, ptrdiff_t n_runs,
                                            ptrdiff_t length, ptrdiff_t g_stride, ptrdiff_t x_stride,
                                            double mean, double *sums)
{
    const vec vmean = splat(mean);
    vec sum[UNROLL] = {{0}}, product[UNROLL] = {{0}};
    real tail_sum = 0, tail_product = 0;
    for (ptrdiff_t n = 0; n < n_runs; n++) {
        const elem *g = (const elem *)g_ns + n * g_stride;
        const elem *x = (const elem *)x_ns + n * x_stride;
        ptrdiff_t i = 0;
        for (; i + UNROLL * LANES <= length; i += UNROLL * LANES)
            for (int u = 0; u < UNROLL; u++)
                GRAD_MOMENTS(sum[u], product[u], load(g + i + u * LANES), load(x + i + u * LANES), vmean);
        for (; i + LANES <= length; i += LANES)
            GRAD_MOMENTS(sum[0], product[0], load(g + i), load(x + i), vmean);
        for (; i < length; i++)
            GRAD_MOMENTS(tail_sum, tail_product, (real)g[i], (real)x[i], mean);
    }
    sums[0] = total((sum[0] + sum[1]) + (sum[2] + sum[3])) + tail_sum;
    sums[1] = total((product[0] + product[1]) + (product[2] + product[3])) + tail_product;
}

TARGET static void LOOP(grad_moments_last)(const void *g_nc, const void *x_nc, ptrdiff_t rows, ptrdiff_t columns,
                                           ptrdiff_t g_stride, ptrdiff_t x_stride, const double *mean_c,
                                           double *sum_c, double *product_c)
{
    memset(sum_c, 0, (size_t)columns * sizeof *sum_c);
    memset(product_c, 0, (size_t)columns * sizeof *product_c);
    for (ptrdiff_t n = 0; n < rows; n += ROWS) {
        const elem *g = (const elem *)g_nc + n * g_stride;
        const elem *x = (const elem *)x_nc + n * x_stride;
        const ptrdiff_t height = rows - n < ROWS ? rows - n : ROWS;
        ptrdiff_t c = 0;
        for (; c + LANES <= columns; c += LANES) {
            const vec mean = load_real(mean_c + c);
            vec sum = load_real(sum_c + c), product = load_real(product_c + c);
            for (ptrdiff_t r = 0; r < height; r++)
                GRAD_MOMENTS(sum, product, load(g + r * g_stride + c), load(x + r * x_stride + c), mean);
            store_real(sum_c + c, sum);
            store_real(product_c + c, product);
        }
        for (; c < columns; c++)
            for (ptrdiff_t r = 0; r < height; r++)
                GRAD_MOMENTS(sum_c[c], product_c[c], (real)g[r * g_stride + c], (real)x[r * x_stride + c],
                             mean_c[c]);
    }
}
#undef MOMENTS
#undef GRAD_MOMENTS
#endif

#undef LOW_PART
#undef APPLY
#undef GRAD_APPLY
#undef UNROLL
#undef ROWS
#undef ELEM
#undef REAL
#undef TYPE
#undef SUMS
#undef WIDENS
#undef elem
#undef real
#undef vec
#undef packed
#undef load
#undef load_real
#undef store
#undef store_real
#undef splat
#undef total
#undef LANES
