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
 * wherever it stands in a run, however it is stored.
 */
#include "vec.h"

#define UNROLL 4 /* independent accumulators: an addition takes 3 to 4 cycles, and one can start each cycle */
#define ROWS 8   /* rows read side by side: amortizes the accumulators' trip to L1, within the prefetchers' reach */
#define LINE 64  /* bytes that memory and caches exchange */
#define LINE_ELEMS ((ptrdiff_t)(LINE / sizeof(elem)))
#define TO_LINE(p) ((ptrdiff_t)(-(uintptr_t)(p) % LINE / sizeof(elem))) /* elements from p to the next line */
/* Bring lines i + LINE_ELEMS*first, and every second one from there, of the `n` elements at p + i into L2. */
#define FETCH(p, i, n, first)                                                               \
    for (ptrdiff_t l_ = (first)*LINE_ELEMS; l_ < (n); l_ += 2 * LINE_ELEMS)                 \
    __builtin_prefetch((p) + (i) + l_, 0, 2)

#define COLUMNS (CBN_ROW_BYTES / sizeof(elem)) /* most columns of a row */
#define columns_of(t) ((t)->copies * (t)->n_channels * (t)->length)

/* A value of each channel as a value of each column; and back, by sums. */
TARGET static void LOOP(spread)(const cbn_tile *t, const double *value_c, real *column)
{
    for (ptrdiff_t k = 0; k < t->copies; k++)
        for (ptrdiff_t c = 0; c < t->n_channels; c++)
            for (ptrdiff_t i = 0; i < t->length; i++)
                *column++ = (real)value_c[c];
}

#ifdef SUMS
TARGET static void LOOP(fold)(const cbn_tile *t, const double *column, double *sum_c)
{
    memset(sum_c, 0, (size_t)t->n_channels * sizeof *sum_c);
    for (ptrdiff_t k = 0; k < t->copies; k++)
        for (ptrdiff_t c = 0; c < t->n_channels; c++)
            for (ptrdiff_t i = 0; i < t->length; i++)
                sum_c[c] += *column++;
}
#endif

/* ---- apply -------------------------------------------------------------------------------------------
 *
 * y = (x - mean)*scale + offset, unfolded: x*scale + (offset - mean*scale) would lose all digits of a channel
 * whose mean is large beside its spread. In float32 the mean is carried as two floats, high + low, since one
 * cannot hold it: x - high is exact where x is near the mean (Sterbenz), and then low corrects the remainder.
 * In float64 low is zero; so it is where the mean is infinite, and mean - high would be NaN.
 */
#define LOW_PART(mean, high) ((high) - (high) == 0 ? (real)((mean) - (high)) : (real)0)
#define APPLY(x, high, low, scale, offset) ((((x) - (high)) - (low)) * (scale) + (offset))

/* Body of a loop with both kinds of store; `past` is a constant, 1 for stores past the caches. */
#define PUT(p, v, past) ((past) ? store_past((p), (v)) : store((p), (v)))
#define BOTH_STORES(body, t)    \
    do {                        \
        if ((t)->stream) {      \
            body((t), 1);       \
            STORE_FENCE();      \
        } else {                \
            body((t), 0);       \
        }                       \
    } while (0)

INLINE void LOOP(apply_first_body)(const cbn_tile *t, const int past)
{
    for (ptrdiff_t n = 0; n < t->n_runs; n++)
        for (ptrdiff_t c = 0; c < t->n_channels; c++) {
            const elem *x = (const elem *)t->x.data + n * t->x.n + c * t->x.c;
            elem *y = (elem *)t->y.data + n * t->y.n + c * t->y.c;
            const double *coef = t->coef_c + c;
            const real high = (real)coef[0], low = LOW_PART(coef[0], high);
            const real scale = (real)coef[t->pitch], offset = (real)coef[2 * t->pitch];
            const vec vhigh = splat(high), vlow = splat(low), vscale = splat(scale), voffset = splat(offset);
            const ptrdiff_t length = t->length, head = past && TO_LINE(y) < length ? TO_LINE(y) : 0;
            ptrdiff_t i = 0;
            for (; i < head; i++)
                y[i] = (elem)APPLY((real)x[i], high, low, scale, offset);
            for (; i + UNROLL * LANES <= length; i += UNROLL * LANES) {
                vec v[UNROLL];
                FETCH(x + t->ahead, i, UNROLL * LANES, 1);
                for (int u = 0; u < UNROLL; u++)
                    v[u] = load(x + i + u * LANES);
                for (int u = 0; u < UNROLL; u++)
                    PUT(y + i + u * LANES, APPLY(v[u], vhigh, vlow, vscale, voffset), past);
            }
            for (; i + LANES <= length; i += LANES)
                store(y + i, APPLY(load(x + i), vhigh, vlow, vscale, voffset));
            for (; i < length; i++)
                y[i] = (elem)APPLY((real)x[i], high, low, scale, offset);
        }
}

TARGET static void LOOP(apply_first)(const cbn_tile *t)
{
    BOTH_STORES(LOOP(apply_first_body), t);
}

INLINE void LOOP(apply_last_body)(const cbn_tile *t, const int past)
{
    real high[COLUMNS], low[COLUMNS], scale[COLUMNS], offset[COLUMNS];
    double low_c[COLUMNS];
    for (ptrdiff_t c = 0; c < t->n_channels; c++)
        low_c[c] = LOW_PART(t->coef_c[c], (real)t->coef_c[c]);
    LOOP(spread)(t, t->coef_c, high);
    LOOP(spread)(t, low_c, low);
    LOOP(spread)(t, t->coef_c + t->pitch, scale);
    LOOP(spread)(t, t->coef_c + 2 * t->pitch, offset);
    const ptrdiff_t columns = columns_of(t);
    for (ptrdiff_t n = 0; n < t->n_runs; n++) {
        const elem *x = (const elem *)t->x.data + n * t->x.n;
        elem *y = (elem *)t->y.data + n * t->y.n;
        const ptrdiff_t head = past && TO_LINE(y) < columns ? TO_LINE(y) : 0;
        ptrdiff_t c = 0;
        for (; c < head; c++)
            y[c] = (elem)APPLY((real)x[c], high[c], low[c], scale[c], offset[c]);
        for (; c + LANES <= columns; c += LANES) {
            if (c & LINE_ELEMS)
                __builtin_prefetch(x + c + t->ahead, 0, 2);
            PUT(y + c, APPLY(load(x + c), load_real(high + c), load_real(low + c), load_real(scale + c),
                             load_real(offset + c)), past);
        }
        for (; c < columns; c++)
            y[c] = (elem)APPLY((real)x[c], high[c], low[c], scale[c], offset[c]);
    }
}

TARGET static void LOOP(apply_last)(const cbn_tile *t)
{
    BOTH_STORES(LOOP(apply_last_body), t);
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

INLINE void LOOP(grad_apply_first_body)(const cbn_tile *t, const int past)
{
    for (ptrdiff_t n = 0; n < t->n_runs; n++)
        for (ptrdiff_t c = 0; c < t->n_channels; c++) {
            const elem *x = (const elem *)t->x.data + n * t->x.n + c * t->x.c;
            const elem *g = (const elem *)t->g.data + n * t->g.n + c * t->g.c;
            elem *dx = (elem *)t->y.data + n * t->y.n + c * t->y.c;
            const double *coef = t->coef_c + c;
            const real high = (real)coef[0], low = LOW_PART(coef[0], high);
            const real scale = (real)coef[t->pitch], gmean = (real)coef[2 * t->pitch];
            const real slope = (real)coef[3 * t->pitch];
            const real rest = (real)(-LOW_PART(coef[2 * t->pitch], gmean) * coef[t->pitch]);
            const vec vhigh = splat(high), vlow = splat(low), vscale = splat(scale), vgmean = splat(gmean);
            const vec vslope = splat(slope), vrest = splat(rest);
            const ptrdiff_t length = t->length, head = past && TO_LINE(dx) < length ? TO_LINE(dx) : 0;
            ptrdiff_t i = 0;
            for (; i < head; i++)
                dx[i] = (elem)GRAD_APPLY((real)g[i], (real)x[i], high, low, scale, gmean, slope, rest);
            for (; i + UNROLL * LANES <= length; i += UNROLL * LANES) {
                vec v[UNROLL];
                FETCH(x + t->ahead, i, UNROLL * LANES, 1);
                FETCH(g + t->ahead, i, UNROLL * LANES, 1);
                for (int u = 0; u < UNROLL; u++)
                    v[u] = GRAD_APPLY(load(g + i + u * LANES), load(x + i + u * LANES), vhigh, vlow, vscale,
                                      vgmean, vslope, vrest);
                for (int u = 0; u < UNROLL; u++)
                    PUT(dx + i + u * LANES, v[u], past);
            }
            for (; i + LANES <= length; i += LANES)
                store(dx + i,
                      GRAD_APPLY(load(g + i), load(x + i), vhigh, vlow, vscale, vgmean, vslope, vrest));
            for (; i < length; i++)
                dx[i] = (elem)GRAD_APPLY((real)g[i], (real)x[i], high, low, scale, gmean, slope, rest);
        }
}

TARGET static void LOOP(grad_apply_first)(const cbn_tile *t)
{
    BOTH_STORES(LOOP(grad_apply_first_body), t);
}

INLINE void LOOP(grad_apply_last_body)(const cbn_tile *t, const int past)
{
    real high[COLUMNS], low[COLUMNS], scale[COLUMNS];
    real gmean[COLUMNS], slope[COLUMNS], rest[COLUMNS];
    double low_c[COLUMNS], rest_c[COLUMNS];
    const double *scale_c = t->coef_c + t->pitch, *gmean_c = scale_c + t->pitch;
    for (ptrdiff_t c = 0; c < t->n_channels; c++) {
        low_c[c] = LOW_PART(t->coef_c[c], (real)t->coef_c[c]);
        rest_c[c] = -LOW_PART(gmean_c[c], (real)gmean_c[c]) * scale_c[c];
    }
    LOOP(spread)(t, t->coef_c, high);
    LOOP(spread)(t, low_c, low);
    LOOP(spread)(t, scale_c, scale);
    LOOP(spread)(t, gmean_c, gmean);
    LOOP(spread)(t, gmean_c + t->pitch, slope);
    LOOP(spread)(t, rest_c, rest);
    const ptrdiff_t columns = columns_of(t);
    for (ptrdiff_t n = 0; n < t->n_runs; n++) {
        const elem *x = (const elem *)t->x.data + n * t->x.n;
        const elem *g = (const elem *)t->g.data + n * t->g.n;
        elem *dx = (elem *)t->y.data + n * t->y.n;
        const ptrdiff_t head = past && TO_LINE(dx) < columns ? TO_LINE(dx) : 0;
        ptrdiff_t c = 0;
        for (; c < head; c++)
            dx[c] = (elem)GRAD_APPLY((real)g[c], (real)x[c], high[c], low[c], scale[c], gmean[c], slope[c], rest[c]);
        for (; c + LANES <= columns; c += LANES) {
            if (c & LINE_ELEMS) {
                __builtin_prefetch(x + c + t->ahead, 0, 2);
                __builtin_prefetch(g + c + t->ahead, 0, 2);
            }
            PUT(dx + c, GRAD_APPLY(load(g + c), load(x + c), load_real(high + c), load_real(low + c),
                                   load_real(scale + c), load_real(gmean + c), load_real(slope + c),
                                   load_real(rest + c)), past);
        }
        for (; c < columns; c++)
            dx[c] = (elem)GRAD_APPLY((real)g[c], (real)x[c], high[c], low[c], scale[c], gmean[c], slope[c], rest[c]);
    }
}

TARGET static void LOOP(grad_apply_last)(const cbn_tile *t)
{
    BOTH_STORES(LOOP(grad_apply_last_body), t);
}

#ifdef SUMS
/* ---- moments -----------------------------------------------------------------------------------------
 *
 * S(d) and S(d*d) of d = x - shift, from which m2 = S(d*d) - S(d)^2/n. The subtraction costs log2(S(d*d)/m2) =
 * log2(1 + (shift - mean)^2/var) bits. The shift is a value of the channel, so that a constant one gives d = 0 and
 * its mean exactly; where that value lies far out, the pass is done again with the mean as shift (passes.pyx).
 */
#define ADD_MOMENTS(sum, square, d) \
    do {                            \
        __typeof__(sum) d_ = (d);   \
        (sum) += d_;                \
        (square) += d_ * d_;        \
    } while (0)

TARGET static void LOOP(moments_first)(const cbn_tile *t)
{
    for (ptrdiff_t c = 0; c < t->n_channels; c++) {
        const real shift = t->shift_c[c];
        const vec vshift = splat(shift);
        const ptrdiff_t length = t->length;
        vec sum[UNROLL] = {{0}}, square[UNROLL] = {{0}};
        real tail_sum = 0, tail_square = 0;
        for (ptrdiff_t n = 0; n < t->n_runs; n++) {
            const elem *x = (const elem *)t->x.data + n * t->x.n + c * t->x.c;
            ptrdiff_t i = 0;
            for (; i + UNROLL * LANES <= length; i += UNROLL * LANES) {
                FETCH(x + t->ahead, i, UNROLL * LANES, 0);
                for (int u = 0; u < UNROLL; u++)
                    ADD_MOMENTS(sum[u], square[u], load(x + i + u * LANES) - vshift);
            }
            for (; i + LANES <= length; i += LANES)
                ADD_MOMENTS(sum[0], square[0], load(x + i) - vshift);
            if (i < length && length >= LANES)
                ADD_MOMENTS(sum[1], square[1], last_lanes(load(x + length - LANES) - vshift, length - i));
            else
                for (; i < length; i++)
                    ADD_MOMENTS(tail_sum, tail_square, (real)x[i] - shift);
        }
        t->sum_c[c] = total((sum[0] + sum[1]) + (sum[2] + sum[3])) + tail_sum;
        t->square_c[c] = total((square[0] + square[1]) + (square[2] + square[3])) + tail_square;
    }
}

TARGET static void LOOP(moments_last)(const cbn_tile *t)
{
    real shift[COLUMNS], sum[COLUMNS], square[COLUMNS];
    const ptrdiff_t columns = columns_of(t);
    LOOP(spread)(t, t->shift_c, shift);
    memset(sum, 0, (size_t)columns * sizeof *sum);
    memset(square, 0, (size_t)columns * sizeof *square);
    for (ptrdiff_t n = 0; n < t->n_runs; n += ROWS) {
        const elem *x = (const elem *)t->x.data + n * t->x.n;
        const ptrdiff_t height = t->n_runs - n < ROWS ? t->n_runs - n : ROWS;
        ptrdiff_t c = 0;
        for (; c + LANES <= columns; c += LANES) {
            const vec vshift = load_real(shift + c);
            vec vsum = load_real(sum + c), vsquare = load_real(square + c);
            if (c % (2 * LINE_ELEMS) == 0)
                for (ptrdiff_t r = 0; r < height; r++)
                    __builtin_prefetch(x + r * t->x.n + c + t->ahead, 0, 2);
            for (ptrdiff_t r = 0; r < height; r++)
                ADD_MOMENTS(vsum, vsquare, load(x + r * t->x.n + c) - vshift);
            store_real(sum + c, vsum);
            store_real(square + c, vsquare);
        }
        for (; c < columns; c++)
            for (ptrdiff_t r = 0; r < height; r++)
                ADD_MOMENTS(sum[c], square[c], (real)x[r * t->x.n + c] - shift[c]);
    }
    LOOP(fold)(t, sum, t->sum_c);
    LOOP(fold)(t, square, t->square_c);
}

/* ---- grad_moments ------------------------------------------------------------------------------------ */
#define ADD_GRAD_MOMENTS(sum, product, g, d) \
    do {                                     \
        __typeof__(sum) g_ = (g);            \
        (sum) += g_;                         \
        (product) += g_ * (d);               \
    } while (0)

TARGET static void LOOP(grad_moments_first)(const cbn_tile *t)
{
    for (ptrdiff_t c = 0; c < t->n_channels; c++) {
        const real mean = t->shift_c[c];
        const vec vmean = splat(mean);
        const ptrdiff_t length = t->length;
        vec sum[UNROLL] = {{0}}, product[UNROLL] = {{0}};
        real tail_sum = 0, tail_product = 0;
        for (ptrdiff_t n = 0; n < t->n_runs; n++) {
            const elem *x = (const elem *)t->x.data + n * t->x.n + c * t->x.c;
            const elem *g = (const elem *)t->g.data + n * t->g.n + c * t->g.c;
            ptrdiff_t i = 0;
            for (; i + UNROLL * LANES <= length; i += UNROLL * LANES) {
                FETCH(x + t->ahead, i, UNROLL * LANES, 0);
                FETCH(g + t->ahead, i, UNROLL * LANES, 0);
                for (int u = 0; u < UNROLL; u++)
                    ADD_GRAD_MOMENTS(sum[u], product[u], load(g + i + u * LANES), load(x + i + u * LANES) - vmean);
            }
            for (; i + LANES <= length; i += LANES)
                ADD_GRAD_MOMENTS(sum[0], product[0], load(g + i), load(x + i) - vmean);
            if (i < length && length >= LANES) {
                const ptrdiff_t n_last = length - i, last = length - LANES;
                ADD_GRAD_MOMENTS(sum[1], product[1], last_lanes(load(g + last), n_last),
                                 last_lanes(load(x + last) - vmean, n_last));
            } else
                for (; i < length; i++)
                    ADD_GRAD_MOMENTS(tail_sum, tail_product, (real)g[i], (real)x[i] - mean);
        }
        t->sum_c[c] = total((sum[0] + sum[1]) + (sum[2] + sum[3])) + tail_sum;
        t->square_c[c] = total((product[0] + product[1]) + (product[2] + product[3])) + tail_product;
    }
}

TARGET static void LOOP(grad_moments_last)(const cbn_tile *t)
{
    real mean[COLUMNS], sum[COLUMNS], product[COLUMNS];
    const ptrdiff_t columns = columns_of(t);
    LOOP(spread)(t, t->shift_c, mean);
    memset(sum, 0, (size_t)columns * sizeof *sum);
    memset(product, 0, (size_t)columns * sizeof *product);
    for (ptrdiff_t n = 0; n < t->n_runs; n += ROWS) {
        const elem *x = (const elem *)t->x.data + n * t->x.n;
        const elem *g = (const elem *)t->g.data + n * t->g.n;
        const ptrdiff_t height = t->n_runs - n < ROWS ? t->n_runs - n : ROWS;
        ptrdiff_t c = 0;
        for (; c + LANES <= columns; c += LANES) {
            const vec vmean = load_real(mean + c);
            vec vsum = load_real(sum + c), vproduct = load_real(product + c);
            if (c % (2 * LINE_ELEMS) == 0)
                for (ptrdiff_t r = 0; r < height; r++) {
                    __builtin_prefetch(x + r * t->x.n + c + t->ahead, 0, 2);
                    __builtin_prefetch(g + r * t->g.n + c + t->ahead, 0, 2);
                }
            for (ptrdiff_t r = 0; r < height; r++)
                ADD_GRAD_MOMENTS(vsum, vproduct, load(g + r * t->g.n + c), load(x + r * t->x.n + c) - vmean);
            store_real(sum + c, vsum);
            store_real(product + c, vproduct);
        }
        for (; c < columns; c++)
            for (ptrdiff_t r = 0; r < height; r++)
                ADD_GRAD_MOMENTS(sum[c], product[c], (real)g[r * t->g.n + c], (real)x[r * t->x.n + c] - mean[c]);
    }
    LOOP(fold)(t, sum, t->sum_c);
    LOOP(fold)(t, product, t->square_c);
}
#undef ADD_MOMENTS
#undef ADD_GRAD_MOMENTS
#endif

#undef LOW_PART
#undef APPLY
#undef GRAD_APPLY
#undef PUT
#undef BOTH_STORES
#undef UNROLL
#undef ROWS
#undef LINE
#undef LINE_ELEMS
#undef TO_LINE
#undef FETCH
#undef COLUMNS
#undef columns_of
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
#undef convert
#undef store
#undef store_past
#undef store_real
#undef splat
#undef last_lanes
#undef total
#undef LANES
