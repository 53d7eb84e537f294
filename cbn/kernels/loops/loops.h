/* loops.h: the loops over runs and over rows. A template; it opens no thread, allocates nothing and knows no Python.
 *
 * Parameters: TYPE, a word of types.h, undefined again at the end; those of sets/set.h.
 *
 * Both directions, forward and backward, and every combination of map, reduction, kind of store and copy are one text
 * for a layout: `backward`, `mapping`, `reducing` are constants of an inlined body, `past` and `copying` are tested once
 * for some vectors. What a vector does not fill is a part of one, so an element gets the same bits wherever it stands in
 * a run, however it is stored.
 */
#include "vec/vec.h"

#define UNROLL 4   /* independent accumulators: an addition takes 3 to 4 cycles, and one can start each cycle */
#define PIECE (sizeof(elem) == 2 ? 256 : 64) /* elements of a run that are mapped, then reduced: reads and writes alternate
                                                faster than they queue; of 16-bit ones as many as are summed in float32 */
#define AHEAD MAX(1024, (ptrdiff_t)(4096 / sizeof(elem))) /* elements between what is fetched and what is read: runs end
                                                             where hardware prefetchers give up */
#define GROUP 32   /* channels whose accumulators wait in L1 */
#define ROWS 4     /* rows side by side: amortize the trip of factors and accumulators to L1 */
#define LONG 256   /* elements from which it pays to store whole lines */
#define LINE 64    /* bytes that memory and caches exchange */
#define LINE_ELEMS ((ptrdiff_t)(LINE / sizeof(elem_out)))
#define COLUMNS (CBN_ROW_BYTES / MAX(sizeof(elem), sizeof(float))) /* most columns of a row, */
#define ROOM (COLUMNS + 2 * LINE_ELEMS) /* and less than a line more where a tile is to begin and end with lines of y; and
                                           less than a line before the first, so that factors are aligned where y is; not
                                           4 KB, so that a store to one delays no load of another */
#define TO_LINE(p) ((ptrdiff_t)(-(uintptr_t)(p) % LINE / sizeof(elem_out))) /* elements from p to the next line */
#define RARE (WIDENS && HALF) /* values that only float64 holds, in 16 bits: no code for whole cache lines */
#define AT(v, i, j) ((elem *)(v).data + (i) * (v).n + (j) * (v).c)
#define Y_AT(v, i, j) ((elem_out *)(v).data + (i) * (v).n + (j) * (v).c)
#define UNLIKELY(condition) __builtin_expect((condition) != 0, 0)
#define OFTEN(condition) __builtin_expect_with_probability((condition) != 0, 1, 0.99)
#define NEXT(v) (c + 1 < last ? AT(v, n, c + 1) : AT(v, n + 1, first)) /* the run after that of n and c */
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

/* ---- formulas ----------------------------------------------------------------------------------------
 *
 * forward    y  = (x - mean)*scale + offset
 * backward   dx = (h - gmean)*scale - (x - mean)*slope,  slope = S(h*d)*invstd^2/n*scale, gmean = S(h)/n
 *
 * unfolded: x*scale + (offset - mean*scale) would lose all digits of a channel whose mean is large beside its spread.
 * float32 cannot hold a mean either, so it is two floats, mean = high + low: x - high is exact where x is near the
 * mean (Sterbenz), and low, a constant by the time it has been scaled, is part of the term that is added:
 *
 * forward    y  = (x - high)*scale + term                               term = offset - low*scale
 * backward   dx = (h - ghigh)*scale + ((x - high)*(-slope) + term)      term = low*slope - glow*scale
 *
 * These factors of a channel are numbered by an enum in instantiate.h.
 *
 * Nothing of this overflows where its result is finite: passes.pyx gives channels whose coefficients are too large for that
 * to the wide loops. A residual that is added, or a slope that shrinks, can bring a result back that has overflowed on its
 * way. Such values are seen by what is infinite or NaN, and computed again, in a larger range (`checked`).
 */
/* mean - high; zero in float64, and where the mean is not finite and the difference would be NaN. */
INLINE double LOOP(low_part)(double mean)
{
    const real high = (real)mean;
    return high - high == 0 ? mean - high : 0;
}

/* The factors of some channels, from their coefficients; out[i*out_pitch + c] is factor i of channel c. */
INLINE void LOOP(factors)(const double *coef_c, ptrdiff_t pitch, ptrdiff_t n_channels, real *out, ptrdiff_t out_pitch,
                          const int backward)
{
    const double *mean_c = coef_c + CBN_MEAN * pitch, *scale_c = coef_c + CBN_SCALE * pitch;
    const double *third_c = coef_c + (backward ? CBN_GRAD_MEAN : CBN_OFFSET) * pitch, *slope_c = coef_c + CBN_SLOPE * pitch;
    for (ptrdiff_t c = 0; c < n_channels; c++) {
        const double low = LOOP(low_part)(mean_c[c]), scale = scale_c[c], third = third_c[c];
        out[HIGH * out_pitch + c] = quiet((real)mean_c[c]);
        out[SCALE * out_pitch + c] = quiet((real)scale);
        if (backward) {
            const double slope = slope_c[c], glow = LOOP(low_part)(third);
            out[TERM * out_pitch + c] = quiet((real)((low != 0 ? low * slope : 0) - (glow != 0 ? glow * scale : 0)));
            out[SLOPE * out_pitch + c] = quiet((real)-slope);
            out[GHIGH * out_pitch + c] = quiet((real)third);
        } else
            out[TERM * out_pitch + c] = quiet((real)(low != 0 ? third - low * scale : third));
    }
}

INLINE vec LOOP(applied)(vec x, vec g, const vec *f, const int backward)
{
    if (backward)
        return (g - f[GHIGH]) * f[SCALE] + ((x - f[HIGH]) * f[SLOPE] + f[TERM]);
    return (x - f[HIGH]) * f[SCALE] + f[TERM];
}

/* What follows the normalization: act(a + z). */
typedef struct {
    int kind; /* PLAIN: nothing does; ACTIVATED; CHECKED: and what is infinite or NaN may have become so on its way */
    real negative_slope;
    real vanishing; /* the largest number that y's type takes for zero */
    double slope_d; /* negative_slope, for float64 */
} LOOP(activation);

INLINE LOOP(activation) LOOP(activation_of)(const cbn_tile *t)
{
    const int kind = !t->activated ? PLAIN : t->checked ? CHECKED : ACTIVATED;
    return (LOOP(activation)){kind, (real)t->negative_slope, (real)t->vanishing, t->negative_slope};
}

/* Lanes begin to end of y or dx from the i-th element on, before the activation; z may be NULL. Where `kind` is CHECKED
 * `seen` becomes NaN if a lane is infinite or NaN. */
INLINE vec LOOP(before)(const elem *x, const elem *g, const elem_out *z, ptrdiff_t i, ptrdiff_t begin, ptrdiff_t end,
                        const vec *f, const int kind, const int backward, vec *seen)
{
    const int all = begin == 0 && end == LANES;
    const vec dh = backward ? all ? load(g + i) : load_part(g + i, begin, end) : f[0];
    vec a = LOOP(applied)(all ? load(x + i) : load_part(x + i, begin, end), dh, f, backward);
    if (kind == PLAIN || (backward && !ELEM_IS_DOUBLE))
        return a;
    if (!backward && z)
        a += all ? load_out(z + i) : load_out_part(z + i, begin, end);
    if (kind == CHECKED)
        *seen += a * 0;
    return a;
}

/* The same after it. */
INLINE vec LOOP(unchecked)(const elem *x, const elem *g, const elem_out *z, ptrdiff_t i, ptrdiff_t begin, ptrdiff_t end,
                           const vec *f, LOOP(activation) act, const int kind, const int backward, vec *seen)
{
    const vec a = LOOP(before)(x, g, z, i, begin, end, f, kind, backward, seen);
    if (kind == PLAIN || backward)
        return a;
    return select(a <= 0, act.negative_slope != 0 ? a * act.negative_slope : (vec){0}, a);
}

/* A larger range; where long double is double, float64 has none. */
typedef __typeof__(__builtin_choose_expr(sizeof(REAL) == 8, (long double)0, (double)0)) LOOP(larger);

/* The same, where a lane is infinite or NaN: in the larger range. Rare, so not inlined. */
TARGET static __attribute__((noinline, cold)) vec LOOP(checked)(const elem *x, const elem *g, const elem_out *z,
                                                                ptrdiff_t i, ptrdiff_t begin, ptrdiff_t end,
                                                                const vec *f, const LOOP(activation) *act,
                                                                const int backward)
{
    const vec x_ = load_part(x + i, begin, end), g_ = backward ? load_part(g + i, begin, end) : x_;
    const vec z_ = !backward && z ? load_out_part(z + i, begin, end) : (vec){0};
    const vec a = LOOP(applied)(x_, g_, f, backward) + z_;
    vec seen = {0}, y = LOOP(unchecked)(x, g, z, i, begin, end, f, *act, CHECKED, backward, &seen);
    for (ptrdiff_t k = 0; k < LANES; k++) {
        const LOOP(larger) d = (LOOP(larger))x_[k] - f[HIGH][k], scale = f[SCALE][k], term = f[TERM][k];
        const LOOP(larger) b = backward ? ((LOOP(larger))g_[k] - f[GHIGH][k]) * scale + (d * f[SLOPE][k] + term)
                                        : d * scale + term + z_[k];
        if (a[k] - a[k] == 0)
            continue;
        y[k] = (real)(backward || !(b <= 0) ? b : act->slope_d != 0 ? b * act->slope_d : 0);
    }
    return y;
}

/* v, or what `checked` makes of it where `seen` says so. Copies, since what another function sees is in memory. */
INLINE vec LOOP(check)(vec v, vec seen, const elem *x, const elem *g, const elem_out *z, ptrdiff_t i, ptrdiff_t begin,
                       ptrdiff_t end, const vec *f, LOOP(activation) act, const int kind, const int backward)
{
    if (kind != CHECKED || (backward && !ELEM_IS_DOUBLE) || __builtin_expect(!any_nan(seen), 1))
        return v;
    vec factors[ALL_FACTORS] = {{0}};
    const LOOP(activation) copy = act;
    for (int k = 0; k < FACTORS(backward); k++)
        factors[k] = f[k];
    return LOOP(checked)(x, g, z, i, begin, end, factors, &copy, backward);
}

/* Lanes begin to end. */
INLINE vec LOOP(value)(const elem *x, const elem *g, const elem_out *z, ptrdiff_t i, ptrdiff_t begin, ptrdiff_t end,
                       const vec *f, LOOP(activation) act, const int kind, const int backward)
{
    vec seen = {0};
    const vec v = LOOP(unchecked)(x, g, z, i, begin, end, f, act, kind, backward, &seen);
    return LOOP(check)(v, seen, x, g, z, i, begin, end, f, act, kind, backward);
}

/* Whether no y = fma(d, scale, term) is subnormal, so that the processor may convert it to bfloat16. Where d*scale is less
 * than half of term, y is more than 1e-20/2. Else it is a multiple of the last places of d and scale, 2^-48 of d*scale at
 * least, so 2^-48*1e-20/2 > 2^-116, or zero. */
INLINE int LOOP(stays_normal)(const cbn_tile *m, real term, LOOP(activation) act, const int backward)
{
    const int selects = act.kind == PLAIN || act.negative_slope == 0;
#if HAVE_PACK_NORMAL
    return !backward && !m->z.data && selects && (term >= 1e-20f || term <= -1e-20f);
#else
    (void)m, (void)term, (void)backward, (void)selects;
    return 0;
#endif
}

#if SUMS
/* S(d) and S(d*d) of d = x - shift, from which m2 = S(d*d) - S(d)^2/n. The subtraction costs log2(S(d*d)/m2) =
 * log2(1 + (shift - mean)^2/var) bits. The shift is the mean of a few values of the channel, so that a constant one
 * gives d = 0 and its mean exactly; where it is too far off (`channels_to_redo` in passes.pyx), the reduction is done again
 * with the mean as shift.
 * Backward, S(h) and S(h*d). */
INLINE void LOOP(add)(dvec *sum, dvec *square, dvec d, dvec dh, const int backward)
{
    *sum += backward ? dh : d;
    *square += backward ? dh * d : d * d;
}

/* What a reduction reads, and where it puts that: runs, or rows. */
typedef struct {
    const elem *x, *g, *z;
    elem *x_copy, *dh;
} LOOP(source);

/* The input of the activation, lanes 0 to end from the i-th element on. It is computed again instead of being kept since
 * the forward pass, by the very code of the forward map, so that y was positive where this is larger than `vanishing`. */
INLINE vec LOOP(input)(const elem *x, const elem_out *z, ptrdiff_t i, ptrdiff_t end, const vec *f, const int kind)
{
    const LOOP(activation) none = {.kind = CHECKED, .negative_slope = 1, .slope_d = 1};
    vec seen = {0};
    const vec a = LOOP(before)(x, NULL, z, i, 0, end, f, kind, 0, &seen);
    return LOOP(check)(a, seen, x, NULL, z, i, 0, end, f, none, kind, 0);
}

/* The same of a channel that took the wide loops, n <= DLANES lanes. */
INLINE rvec LOOP(input_in_float64)(LOOP(source) p, ptrdiff_t i, ptrdiff_t n, dvec mean, dvec scale, dvec offset)
{
    const dvec z = !p.z ? (dvec){0} : n == DLANES ? load_d(p.z + i) : load_first_d(p.z + i, n);
    const dvec d = (n == DLANES ? load_d(p.x + i) : load_first_d(p.x + i, n)) - mean;
    dvec a = d * scale + offset;
    if (p.z)
        a += z;
    for (ptrdiff_t k = 0; p.z && k < DLANES; k++)
        if (a[k] != a[k])
            a[k] = (double)((long double)d[k] * scale[k] + offset[k] + z[k]);
    return narrowed(a);
}

/* h = g*act'(a) of n elements, also put into h. */
INLINE dvec LOOP(masked)(LOOP(source) p, ptrdiff_t i, ptrdiff_t n, const real *input, LOOP(activation) act)
{
    const rvec g = n == DLANES ? load_r(p.g + i) : load_first_r(p.g + i, n);
    rvec a;
    memcpy(&a, input, sizeof a);
    if (act.slope_d == 0) {
        const rvec dh = select_r(a <= act.vanishing, (rvec){0}, g);
        store_r(p.dh + i, dh, n);
        return widened(dh);
    }
    const dvec g_d = widened(g), dh = select_d(widened_bits(a <= act.vanishing), g_d * act.slope_d, g_d);
    store_d(p.dh + i, dh, n);
    return dh;
}
#endif

/* ---- runs: elements of one channel ---------------------------------------------------------------------- */

/* Elements begin to end of a run; with `past` these are whole lines. */
INLINE void LOOP(apply_piece)(const elem *x, const elem *g, const elem_out *z, elem_out *y, ptrdiff_t begin, ptrdiff_t end,
                            const vec *f, LOOP(activation) act, const int kind, const int backward, const int nontemporal,
                            const int normal)
{
    ptrdiff_t i = begin;
    for (; i + UNROLL * LANES <= end; i += UNROLL * LANES) {
        vec v[UNROLL], seen = {0};
        UNROLLED for (int u = 0; u < UNROLL; u++)
            v[u] = LOOP(unchecked)(x, g, z, i + u * LANES, 0, LANES, f, act, kind, backward, &seen);
        if (kind == CHECKED && UNLIKELY(any_nan(seen)))
            for (int u = 0; u < UNROLL; u++)
                v[u] = LOOP(check)(v[u], seen, x, g, z, i + u * LANES, 0, LANES, f, act, kind, backward);
        for (int u = 0; u < UNROLL; u += 2)
            store_two(y + i + u * LANES, v + u, nontemporal, normal);
    }
    for (; i + LANES <= end; i += LANES) {
        const vec v = LOOP(value)(x, g, z, i, 0, LANES, f, act, kind, backward);
        if (nontemporal)
            store_nontemporal(y + i, v);
        else
            store(y + i, v);
    }
    if (i < end)
        store_part(y + i, LOOP(value)(x, g, z, i, 0, end - i, f, act, kind, backward), 0, end - i);
}

/* A line that two runs share waits here for the second one: a store of a part would read it from memory first. It waits
 * in registers. In memory the two parts could not be loaded as one until they are in L1, which they reach behind all
 * stores past the caches: 66 cycles a line (Zen 4). */
typedef struct {
    vec value[LINE_ELEMS / LANES];
    elem_out *line;  /* where it belongs; NULL: none waits */
    ptrdiff_t begin, end; /* what of it is there */
} LOOP(shared);

INLINE void LOOP(deliver)(LOOP(shared) *s)
{
    UNROLLED for (int v = 0; v < LINE_ELEMS / LANES; v++) {
        if (!s->line)
            return;
        const ptrdiff_t begin = MAX(s->begin - v * LANES, 0), end = MIN(s->end - v * LANES, LANES);
        if (s->begin == 0 && s->end == LINE_ELEMS)
            store_nontemporal(s->line + v * LANES, s->value[v]);
        else if (begin < end)
            store_part(s->line + v * LANES, s->value[v], begin, end);
    }
    s->line = NULL;
}

/* Less than a line of a run, elements begin to end. */
INLINE void LOOP(apply_shared)(const elem *x, const elem *g, const elem_out *z, elem_out *y, ptrdiff_t begin, ptrdiff_t end,
                             const vec *f, LOOP(activation) act, LOOP(shared) *s, const int kind, const int backward)
{
    const ptrdiff_t at = (ptrdiff_t)((uintptr_t)(y + begin) % LINE / sizeof(elem_out));
    if (begin == end)
        return;
    if (s->line != y + begin - at || s->end != at) {
        LOOP(deliver)(s);
        s->line = y + begin - at;
        s->begin = at;
    }
    s->end = at + end - begin;
    UNROLLED for (int v = 0; v < LINE_ELEMS / LANES; v++) {
        const ptrdiff_t from = MAX(at - v * LANES, 0), to = MIN(s->end - v * LANES, LANES);
        if (from < to)
            s->value[v] = blend(LOOP(value)(x, g, z, begin - at + v * LANES, from, to, f, act, kind, backward),
                                s->value[v], from, to);
    }
    if (s->end == LINE_ELEMS)
        LOOP(deliver)(s);
}

#if SUMS
typedef struct {
    dvec sum[UNROLL], square[UNROLL];
} LOOP(sums);

/* Forward, a sum that is added to often has rounding errors that add up: equal numbers are all rounded to the same side.
 * So float64 sums have a few additions each, and are then added to others: those of rows to totals, of float64 elements
 * exactly, but for the lower half of what is lost; those of runs to parts, and some of these exactly. */
typedef struct {
    dvec part_sum, part_square, sum, sum_low, square, square_low;
} LOOP(totals);

/* Elements of a run: so many additions. Of smaller elements more, which their own rounding hides; it takes time. */
#define FLUSH ((ELEM_IS_DOUBLE ? 8 : 256) * UNROLL * DLANES)
#define PARTS 8 /* so often, and exactly */
#define FLUSH_ROWS (ELEM_IS_DOUBLE ? 8 : 32)

INLINE void LOOP(add_exactly)(dvec *sum, dvec *low, dvec a)
{
    const dvec before = *sum, after = before + a, added = after - before;
    *low += (before - (after - added)) + (a - added);
    *sum = after;
}

/* Both parts as one; an infinite sum has a lower part that is NaN. */
INLINE dvec LOOP(in_one)(dvec sum, dvec low)
{
    return select_d(low == low, sum + low, sum);
}

INLINE void LOOP(flush)(LOOP(sums) *s, LOOP(totals) *t, const int exactly)
{
    t->part_sum += (s->sum[0] + s->sum[1]) + (s->sum[2] + s->sum[3]);
    t->part_square += (s->square[0] + s->square[1]) + (s->square[2] + s->square[3]);
    for (int u = 0; u < UNROLL; u++)
        s->sum[u] = s->square[u] = (dvec){0};
    if (!exactly)
        return;
    LOOP(add_exactly)(&t->sum, &t->sum_low, t->part_sum);
    LOOP(add_exactly)(&t->square, &t->square_low, t->part_square);
    t->part_sum = t->part_square = (dvec){0};
}

/* n elements from the i-th on. */
INLINE void LOOP(reduce_some)(LOOP(source) p, ptrdiff_t i, ptrdiff_t n, dvec shift, const real *input,
                              LOOP(activation) act, dvec *sum, dvec *square, const int activated, const int backward,
                              const int copying)
{
    dvec d = (n == DLANES ? load_d(p.x + i) : load_first_d(p.x + i, n)) - shift, dh = d;
    if (copying)
        copy(p.x_copy + i, p.x + i, n);
    if (backward && activated)
        dh = LOOP(masked)(p, i, n, input, act);
    else if (backward) {
        dh = n == DLANES ? load_d(p.g + i) : load_first_d(p.g + i, n);
        if (copying)
            copy(p.dh + i, p.g + i, n);
    }
    if (n < DLANES)
        d = first_lanes(d, n);
    LOOP(add)(sum, square, d, dh, backward);
}

#if HALF
/* Forward, 16-bit elements: d = x - shift and the sums of a few d and d*d are of float32, whose 24 bits are many more than
 * the 8 or 11 of x. Where they leave its range, which bfloat16 shares, the caller asks for an `exact` reduction.
 *
 * Of bfloat16 d is x, so that the processor's products of pairs will do. S(x*x) - S(x)^2/n costs digits where the mean is
 * large beside the spread. But then x lies between mean/2 and 2*mean, and x*x is a multiple of mean^2/2^18: a sum of 32 up
 * to 64*mean^2 is exact, and a larger one takes a spread that costs nothing. A value further off, that ends this, adds
 * mean^2/4 or more to m2, beside which a rounding of such a sum is less than 2^-16. */

/* Vectors whose sums are of float32: as many as `loops.h` allows bfloat16, of float16 fewer for its digits. */
#define SHORT (HALF == F16 ? 8 : 16)

/* Elements begin to end, SHORT vectors at most. */
INLINE void LOOP(reduce_short)(LOOP(source) p, ptrdiff_t begin, ptrdiff_t end, vec shift, LOOP(sums) *s,
                               const int copying)
{
    vec sum[2] = {{0}}, square[2] = {{0}};
    ptrdiff_t i = begin;
    for (; i + 4 * LANES <= end; i += 4 * LANES) {
        if (copying)
            memcpy(p.x_copy + i, p.x + i, 4 * LANES * sizeof(elem));
        add_four(p.x + i, 4 * LANES, shift, sum, square);
    }
    if (i < end)
        add_four(p.x + i, end - i, shift, sum, square);
    for (; copying && i < end; i += DLANES)
        copy(p.x_copy + i, p.x + i, MIN(end - i, DLANES));
    s->sum[0] += folded_d(sum[0] + sum[1]);
    s->square[0] += folded_d(square[0] + square[1]);
}
#endif

/* What the forward pass did to a channel: its factors, or where that was a wide one its coefficients. */
typedef struct {
    vec factors[SLOPE];
    int in_float64;
    dvec scale, offset;
} LOOP(forward);

/* The inputs of the activation of elements begin to end. */
INLINE void LOOP(inputs)(LOOP(source) p, ptrdiff_t begin, ptrdiff_t end, dvec mean, const LOOP(forward) *f, real *input)
{
    if (!ELEM_IS_DOUBLE && UNLIKELY(f->in_float64)) {
        for (ptrdiff_t i = begin; i < end; i += DLANES) {
            const rvec a = LOOP(input_in_float64)(p, i, MIN(end - i, DLANES), mean, f->scale, f->offset);
            memcpy(input + i - begin, &a, sizeof a);
        }
        return;
    }
    /* What has overflowed has the right sign, but for a sum with a residual, and for an x - mean of float64 elements */
    for (ptrdiff_t i = begin; i < end; i += LANES) {
        const ptrdiff_t n = MIN(end - i, LANES);
        vec a;
        if (n == LANES && (ELEM_IS_DOUBLE || p.z))
            a = LOOP(input)(p.x, p.z, i, LANES, f->factors, CHECKED);
        else if (n == LANES)
            a = LOOP(input)(p.x, NULL, i, LANES, f->factors, ACTIVATED);
        else
            a = LOOP(input)(p.x, p.z, i, n, f->factors, CHECKED);
        memcpy(input + i - begin, &a, sizeof a);
    }
}

INLINE void LOOP(reduce_piece)(LOOP(source) p, ptrdiff_t begin, ptrdiff_t end, dvec shift,
                               const LOOP(forward) *f, LOOP(activation) act, LOOP(sums) *s, const int activated,
                               const int backward, const int copying, const int sum_in_float64)
{
    real input[PIECE + LANES];
    if (backward && activated)
        LOOP(inputs)(p, begin, end, shift, f, input);
    ptrdiff_t i = begin;
#if HALF
    if (!backward && !sum_in_float64) {
        const vec shift_ = splat((real)shift[0]);
        for (; i + SHORT * LANES <= end; i += SHORT * LANES)
            LOOP(reduce_short)(p, i, i + SHORT * LANES, shift_, s, copying);
        if (i < end)
            LOOP(reduce_short)(p, i, end, shift_, s, copying);
        return;
    }
#else
    (void)sum_in_float64;
#endif
    /* Often, so that the compiler gives its registers to these sums */
    for (; OFTEN(i + UNROLL * DLANES <= end); i += UNROLL * DLANES)
        UNROLLED for (int u = 0; u < UNROLL; u++)
            LOOP(reduce_some)(p, i + u * DLANES, DLANES, shift, input + i - begin + u * DLANES, act, &s->sum[u],
                              &s->square[u], activated, backward, copying);
    for (; i + DLANES <= end; i += DLANES)
        LOOP(reduce_some)(p, i, DLANES, shift, input + i - begin, act, &s->sum[0], &s->square[0], activated, backward,
                          copying);
    if (i < end)
        LOOP(reduce_some)(p, i, end - i, shift, input + i - begin, act, &s->sum[1], &s->square[1], activated, backward,
                          copying);
}
#endif

/* Fetch what a piece will be that begins `ahead` elements behind the i-th of a run, or within the next run. */
INLINE void LOOP(fetch)(const elem *run, const elem *next, ptrdiff_t i, ptrdiff_t ahead, ptrdiff_t length)
{
    const elem *p = i + ahead < length ? run + i + ahead : next + i + ahead - length;
    for (ptrdiff_t l = 0; l < PIECE; l += LINE_ELEMS)
        __builtin_prefetch(p + l, 0, 2);
}

INLINE void LOOP(runs)(const cbn_tile *m, const cbn_tile *r, const int plain, const int backward, const int applying,
                        const int reducing)
{
    const int nontemporal = applying && m->nontemporal, copying = reducing && r->x_copy.data;
    const ptrdiff_t length = applying ? m->length : r->length, n_runs = applying ? m->n_runs : r->n_runs;
    const ptrdiff_t m_channels = applying ? m->n_channels : 0, r_channels = reducing ? r->n_channels : 0;
    const ptrdiff_t n_channels = MAX(m_channels, r_channels), group = GROUP;
    const ptrdiff_t piece = reducing ? PIECE : length;
    real factors[ALL_FACTORS][GROUP];
    LOOP(shared) shared = {.line = NULL};
    /* Of a map backward only that of float64 elements may be CHECKED */
    const int bare = plain || (backward && !ELEM_IS_DOUBLE);
    const LOOP(activation) act = bare ? (LOOP(activation)){PLAIN} : LOOP(activation_of)(applying ? m : r);
#if SUMS
    const LOOP(activation) act_r = plain ? (LOOP(activation)){PLAIN} : LOOP(activation_of)(reducing ? r : m);
    /* Twice as far where nothing is stored; half as far for two arrays */
    const ptrdiff_t ahead = !reducing || !r->prefetch ? 0 : AHEAD * (applying ? 1 : 2) / (backward ? 2 : 1);
    LOOP(sums) sums[GROUP];
    LOOP(totals) totals[GROUP];
    const int flushing = reducing && !backward && (!HALF || r->sum_in_float64) && n_runs * length > FLUSH;
    real of_forward[SLOPE][GROUP]; /* factors of the forward pass */
#endif
    for (ptrdiff_t first = 0; first < n_channels; first += group) {
        const ptrdiff_t last = MIN(first + group, n_channels);
        if (applying)
            LOOP(factors)(m->coef_c + first, m->pitch, MIN(last, m_channels) - first, factors[0], GROUP, backward);
#if SUMS
        if (reducing && backward && act_r.kind != PLAIN)
            LOOP(factors)(r->forward_c + first, r->pitch, MIN(last, r_channels) - first, of_forward[0], GROUP, 0);
#endif
        for (ptrdiff_t n = 0; n < n_runs; n++)
            for (ptrdiff_t c = first; c < last; c++) {
                const int applies = applying && c < m_channels;
                const elem *mx = NULL, *mg = NULL;
                const elem_out *mz = NULL;
                elem_out *y = NULL;
                vec f[ALL_FACTORS] = {{0}};
                ptrdiff_t head = 0, whole = length; /* whole lines lie between these */
                ptrdiff_t next_flush = PTRDIFF_MAX; /* elements of the run until then */
                int normal = 0;
                if (applies) {
                    mx = AT(m->x, n, c), mg = AT(m->g, n, c), y = Y_AT(m->y, n, c);
                    mz = m->z.data ? Y_AT(m->z, n, c) : NULL;
                    for (int i = 0; i < FACTORS(backward); i++)
                        f[i] = splat(factors[i][c - first]);
                    normal = LOOP(stays_normal)(m, factors[TERM][c - first], act, backward);
                    if (nontemporal || length >= LONG)
                        head = MIN(TO_LINE(y), length);
                    if (nontemporal) {
                        whole = head + (length - head) / LINE_ELEMS * LINE_ELEMS;
                        LOOP(apply_shared)(mx, mg, mz, y, 0, head, f, act, &shared, act.kind, backward);
                    } else
                        LOOP(apply_piece)(mx, mg, mz, y, 0, head, f, act, act.kind, backward, 0, normal);
                }
#if SUMS
                const int reduces = reducing && c < r_channels;
                const elem *x_next = NULL, *g_next = NULL, *z_next = NULL;
                LOOP(source) p = {NULL, NULL, NULL, NULL, NULL};
                LOOP(sums) s;
                dvec shift = {0};
                LOOP(forward) f_r = {.in_float64 = 0};
                const elem *mz_next = mz ? NEXT(m->z) : NULL;
                if (reduces) {
                    p.x = AT(r->x, n, c), p.g = AT(r->g, n, c);
                    x_next = NEXT(r->x);
                    g_next = NEXT(r->g);
                    if (copying)
                        p.x_copy = AT(r->x_copy, n, c);
                    if (backward && (copying || act_r.kind != PLAIN))
                        p.dh = AT(r->dh, n, c);
                    if (backward && act_r.kind != PLAIN) {
                        p.z = r->z.data ? AT(r->z, n, c) : NULL;
                        z_next = p.z ? NEXT(r->z) : NULL;
                        for (int i = 0; i < SLOPE; i++)
                            f_r.factors[i] = splat(of_forward[i][c - first]);
                        f_r.in_float64 = r->forward_c[CBN_IN_FLOAT64 * r->pitch + c] != 0;
                        f_r.scale = splat_d(r->forward_c[CBN_SCALE * r->pitch + c]);
                        f_r.offset = splat_d(r->forward_c[CBN_OFFSET * r->pitch + c]);
                    }
                    for (int u = 0; u < UNROLL; u++) {
                        s.sum[u] = n ? sums[c - first].sum[u] : (dvec){0};
                        s.square[u] = n ? sums[c - first].square[u] : (dvec){0};
                    }
                    shift = splat_d(r->shift_c[c]);
                    next_flush = flushing ? FLUSH - n * length % FLUSH : PTRDIFF_MAX;
                    if (flushing && n == 0)
                        totals[c - first] = (LOOP(totals)){{0}, {0}, {0}, {0}, {0}, {0}};
                }
#endif
                for (ptrdiff_t i = 0; i < length;) {
                    /* A loop of its own, else the compiler keeps the sums in memory */
                    for (const ptrdiff_t stop = MIN(length, next_flush); i < stop; i += piece) {
#if SUMS
                    if (reducing && !backward && mz)
                        LOOP(fetch)(mz, mz_next, i, AHEAD, length);
#endif
                    /* A body each: that of plain maps has no branches */
                    if (applies && bare)
                        LOOP(apply_piece)(mx, mg, mz, y, MIN(head + i, whole), MIN(head + i + piece, whole), f, act,
                                        PLAIN, backward, nontemporal, normal);
                    else if (applies && !backward && act.kind == ACTIVATED)
                        LOOP(apply_piece)(mx, mg, mz, y, MIN(head + i, whole), MIN(head + i + piece, whole), f, act,
                                        ACTIVATED, backward, nontemporal, normal);
                    else if (applies)
                        LOOP(apply_piece)(mx, mg, mz, y, MIN(head + i, whole), MIN(head + i + piece, whole), f, act,
                                        CHECKED, backward, nontemporal, normal);
                    /* What is left, once, before the copy of what is reduced takes its place. */
                    if (applies && nontemporal && head + i + piece >= whole && (i == 0 || head + i < whole))
                        LOOP(apply_shared)(mx, mg, mz, y, whole, length, f, act, &shared, act.kind, backward);
#if SUMS
                    if (reduces) {
                        if (ahead)
                            LOOP(fetch)(p.x, x_next, i, ahead, length);
                        if (ahead && backward)
                            LOOP(fetch)(p.g, g_next, i, ahead, length);
                        if (ahead && backward && p.z)
                            LOOP(fetch)(p.z, z_next, i, ahead, length);
                        if (backward && !plain && (!ELEM_IS_DOUBLE || act_r.kind != PLAIN))
                            LOOP(reduce_piece)(p, i, MIN(i + piece, length), shift, &f_r, act_r, &s, 1, backward,
                                               copying, r->sum_in_float64);
                        else
                            LOOP(reduce_piece)(p, i, MIN(i + piece, length), shift, &f_r, act_r, &s, 0, backward,
                                               copying, r->sum_in_float64);
                    }
#else
                    (void)copying;
#endif
                    }
#if SUMS
                    if (reduces && MIN(i, length) >= next_flush) {
                        LOOP(flush)(&s, &totals[c - first], (n * length + next_flush) % (PARTS * FLUSH) == 0);
                        next_flush += FLUSH;
                    }
#endif
                }
#if SUMS
                if (reduces && n < n_runs - 1)
                    sums[c - first] = s;
                else if (reduces && flushing) {
                    LOOP(totals) *t = &totals[c - first];
                    LOOP(flush)(&s, t, 1);
                    r->sum_c[c] = total(LOOP(in_one)(t->sum, t->sum_low));
                    r->square_c[c] = total(LOOP(in_one)(t->square, t->square_low));
                } else if (reduces) {
                    r->sum_c[c] = total((s.sum[0] + s.sum[1]) + (s.sum[2] + s.sum[3]));
                    r->square_c[c] = total((s.square[0] + s.square[1]) + (s.square[2] + s.square[3]));
                }
#endif
            }
    }
    LOOP(deliver)(&shared);
}

/* ---- rows: elements of all channels ---------------------------------------------------------------------- */

/* A value of each channel, made a value of each column in its place. */
#define SPREAD(t, value)                                                                                       \
    do {                                                                                                       \
        const ptrdiff_t wide_ = (t)->n_channels * (t)->length, all_ = (t)->copies * wide_;                     \
        for (ptrdiff_t c = (t)->n_channels - 1; c >= 0 && (t)->length > 1; c--) {                              \
            const __typeof__(*(value)) of_c_ = (value)[c];                                                     \
            for (ptrdiff_t i_ = 0; i_ < (t)->length; i_++)                                                     \
                (value)[c * (t)->length + i_] = of_c_;                                                         \
        }                                                                                                      \
        for (ptrdiff_t there_ = wide_; there_ < all_; there_ *= 2) /* twice as many copies each time */        \
            memcpy((value) + there_, (value), (size_t)MIN(there_, all_ - there_) * sizeof *(value));           \
    } while (0)

#if SUMS
/* A value of each channel for each column, and zeros in the vector that the last one is in. */
INLINE void LOOP(spread)(const cbn_tile *t, const double *of_channel, double *of_column)
{
    const ptrdiff_t columns = t->copies * t->n_channels * t->length;
    memcpy(of_column, of_channel, (size_t)t->n_channels * sizeof *of_column);
    SPREAD(t, of_column);
    memset(of_column + columns, 0, (size_t)(-columns & (DLANES - 1)) * sizeof *of_column);
}

/* The sum of each column as that of each channel; the columns are used up. Of copies one half is added to the other, as often
 * as it takes: few additions for each. */
INLINE void LOOP(fold)(const cbn_tile *t, double *column, double *sum_c)
{
    const ptrdiff_t width = t->n_channels * t->length;
    for (ptrdiff_t copies = t->copies, half; copies > 1; copies = half) {
        half = (copies + 1) / 2;
        const ptrdiff_t columns = (copies - half) * width;
        ptrdiff_t i = 0;
        for (; i + DLANES <= columns; i += DLANES)
            store_double(column + i, load_double(column + i) + load_double(column + half * width + i));
        for (; i < columns; i++)
            column[i] += column[half * width + i];
    }
    for (ptrdiff_t c = 0; c < t->n_channels && t->length == 1; c++)
        sum_c[c] = column[c];
    for (ptrdiff_t c = 0; c < t->n_channels && t->length > 1; c++, column += t->length) {
        dvec sum = {0};
        ptrdiff_t i = 0;
        for (; i + DLANES <= t->length; i += DLANES)
            sum += load_double(column + i);
        if (i < t->length)
            sum += first_lanes(load_double(column + i), t->length - i);
        sum_c[c] = total(sum);
    }
}
#endif

/* Columns begin to end of some rows, less than a line. */
INLINE void LOOP(apply_part)(const cbn_tile *m, ptrdiff_t n, ptrdiff_t height, ptrdiff_t begin, ptrdiff_t end,
                           real (*factors)[ROOM], LOOP(activation) act, const int backward)
{
    for (ptrdiff_t j = begin; j < end; j += LANES) {
        const ptrdiff_t lanes = MIN(end - j, LANES);
        vec f[ALL_FACTORS] = {{0}};
        for (int i = 0; i < FACTORS(backward); i++)
            f[i] = load_real(factors[i] + j);
        for (ptrdiff_t row = n; row < n + height; row++) {
            const elem *x = AT(m->x, row, 0), *g = AT(m->g, row, 0);
            const elem_out *z = m->z.data ? Y_AT(m->z, row, 0) : NULL;
            elem_out *y = Y_AT(m->y, row, 0);
            if (lanes == LANES)
                store(y + j, LOOP(value)(x, g, z, j, 0, LANES, f, act, act.kind, backward));
            else
                store_part(y + j, LOOP(value)(x, g, z, j, 0, lanes, f, act, act.kind, backward), 0, lanes);
        }
    }
}

/* Where a row of a tile begins, and how far away the next one. Copied out of the tile: of what is behind its pointer the
 * compiler believes that every store may have changed it. */
typedef struct {
    const elem *x, *g;
    const elem_out *z;
    elem_out *y;
    ptrdiff_t x_n, g_n, z_n, y_n;
} LOOP(row_of);

INLINE LOOP(row_of) LOOP(row_at)(const cbn_tile *m, ptrdiff_t n)
{
    return (LOOP(row_of)){AT(m->x, n, 0), AT(m->g, n, 0), m->z.data ? Y_AT(m->z, n, 0) : NULL, Y_AT(m->y, n, 0),
                          m->x.n, m->g.n, m->z.n, m->y.n};
}

INLINE void LOOP(store_lines)(elem_out *y, ptrdiff_t step, ptrdiff_t height, vec (*v)[LINE_ELEMS / LANES], const int nontemporal,
                              const int normal)
{
    for (ptrdiff_t row = 0; row < height; row++, y += step)
        if (LINE_ELEMS / LANES % 2 == 0)
            for (int i = 0; i < LINE_ELEMS / LANES; i += 2)
                store_two(y + i * LANES, v[row] + i, nontemporal, normal);
        else if (nontemporal)
            store_nontemporal(y, v[row][0]);
        else
            store(y, v[row][0]);
}

/* One line of columns of some rows. */
INLINE void LOOP(apply_line)(LOOP(row_of) at, ptrdiff_t height, ptrdiff_t j, real (*factors)[ROOM],
                           LOOP(activation) act, const int kind, const int backward, const int nontemporal,
                           const int fetching, const int normal)
{
    vec f[LINE_ELEMS / LANES][ALL_FACTORS] = {{{0}}};
    for (int v = 0; v < LINE_ELEMS / LANES; v++)
        for (int i = 0; i < FACTORS(backward); i++)
            f[v][i] = load_real(factors[i] + j + v * LANES);
    /* All rows are loaded, then stored: on rows 4 KB apart a load would wait for a store to another row before it. */
    vec out[ROWS][LINE_ELEMS / LANES], seen = {0};
    for (ptrdiff_t row = 0; row < height; row++) {
        const elem *x = at.x + row * at.x_n + j, *g = at.g + row * at.g_n + j;
        const elem_out *z = at.z ? at.z + row * at.z_n + j : NULL;
        if (fetching) {
            __builtin_prefetch(x + ROWS * at.x_n, 0, 2);
            if (backward)
                __builtin_prefetch(g + ROWS * at.g_n, 0, 2);
            if (z)
                __builtin_prefetch(z + ROWS * at.z_n, 0, 2);
            if (!nontemporal)
                __builtin_prefetch(at.y + (row + ROWS) * at.y_n + j, 1, 2);
        }
        UNROLLED for (int v = 0; v < LINE_ELEMS / LANES; v++)
            out[row][v] = LOOP(unchecked)(x, g, z, v * LANES, 0, LANES, f[v], act, kind, backward, &seen);
    }
    if (kind == CHECKED && UNLIKELY(any_nan(seen)))
        for (ptrdiff_t row = 0; row < height; row++)
            for (int v = 0; v < LINE_ELEMS / LANES; v++)
                out[row][v] = LOOP(check)(out[row][v], seen, at.x + row * at.x_n + j, at.g + row * at.g_n + j,
                                          at.z ? at.z + row * at.z_n + j : NULL, v * LANES, 0, LANES, f[v], act,
                                          kind, backward);
    /* Constants, so that each body has one kind of store. */
    if (nontemporal && normal)
        LOOP(store_lines)(at.y + j, at.y_n, height, out, 1, 1);
    else if (nontemporal)
        LOOP(store_lines)(at.y + j, at.y_n, height, out, 1, 0);
    else
        LOOP(store_lines)(at.y + j, at.y_n, height, out, 0, normal);
}

#if SUMS
/* Elements from row to row. */
typedef struct {
    ptrdiff_t x, g, z, dh;
} LOOP(steps);

/* What a value of each channel becomes for each column. */
typedef struct {
    double shift[ROOM], sum[ROOM], square[ROOM];
    union {
        struct { /* forward: what `sum` and `square` are added to after some rows, or what float16 subtracts */
            double total_sum[ROOM], total_square[ROOM];
#if ELEM_IS_DOUBLE
            double sum_low[ROOM], square_low[ROOM];
#endif
        };
        real short_shift[ROOM];
        struct { /* backward: factors of the forward pass, and coefficients of the channels that took the wide loops */
            real of_forward[SLOPE][ROOM];
            int some_in_float64;
#if !ELEM_IS_DOUBLE
            lane_int in_float64[ROOM];
            double float64_scale[ROOM], float64_offset[ROOM];
#endif
        };
    };
} LOOP(columns);

/* Of some rows, whether the sums begin with them; and whether they end, and go to the totals, which may hold others. */
typedef struct {
    int begin, end, more;
} LOOP(turn);

INLINE LOOP(turn) LOOP(turn_of)(ptrdiff_t n, ptrdiff_t height, ptrdiff_t n_runs, const int flushing)
{
    if (!flushing)
        return (LOOP(turn)){n == 0, 0, 0};
    return (LOOP(turn)){n % FLUSH_ROWS == 0, (n + height) % FLUSH_ROWS == 0 || n + height == n_runs, n >= FLUSH_ROWS};
}

INLINE void LOOP(load_sums)(const LOOP(columns) *k, ptrdiff_t j, LOOP(turn) turn, dvec *sum, dvec *square)
{
    *sum = turn.begin ? (dvec){0} : load_double(k->sum + j);
    *square = turn.begin ? (dvec){0} : load_double(k->square + j);
}

/* Adds to a total, which holds others if there are `more`; of float64 exactly. */
INLINE void LOOP(add_to_total)(double *total, double *low, const int more, dvec sum)
{
#if ELEM_IS_DOUBLE
    dvec t = more ? load_double(total) : (dvec){0}, t_low = more ? load_double(low) : (dvec){0};
    LOOP(add_exactly)(&t, &t_low, sum);
    store_double(total, t);
    store_double(low, t_low);
#else
    (void)low;
    store_double(total, more ? load_double(total) + sum : sum);
#endif
}

/* Ends a total of float64: both parts as one. */
INLINE void LOOP(take_low)(double *total, const double *low)
{
    store_double(total, LOOP(in_one)(load_double(total), load_double(low)));
}

INLINE void LOOP(store_sums)(LOOP(columns) *k, ptrdiff_t j, LOOP(turn) turn, dvec sum, dvec square)
{
    if (!turn.end) {
        store_double(k->sum + j, sum);
        store_double(k->square + j, square);
        return;
    }
#if ELEM_IS_DOUBLE
    LOOP(add_to_total)(k->total_sum + j, k->sum_low + j, turn.more, sum);
    LOOP(add_to_total)(k->total_square + j, k->square_low + j, turn.more, square);
#else
    LOOP(add_to_total)(k->total_sum + j, NULL, turn.more, sum);
    LOOP(add_to_total)(k->total_square + j, NULL, turn.more, square);
#endif
}

/* The inputs of the activation, n <= LANES columns from the j-th on. */
INLINE void LOOP(inputs_of_columns)(LOOP(source) p, ptrdiff_t j, ptrdiff_t n, const LOOP(columns) *k, const vec *f,
                                    const int kind, real *input)
{
    const vec a = LOOP(input)(p.x, p.z, j, n, f, kind);
    memcpy(input, &a, sizeof a);
#if !ELEM_IS_DOUBLE
    for (ptrdiff_t i = 0; UNLIKELY(k->some_in_float64) && i < n; i += DLANES) {
        rvec narrow;
        rvec_bits in_float64;
        memcpy(&narrow, input + i, sizeof narrow);
        memcpy(&in_float64, k->in_float64 + j + i, sizeof in_float64);
        const dvec mean = load_double(k->shift + j + i), scale = load_double(k->float64_scale + j + i);
        const dvec offset = load_double(k->float64_offset + j + i);
        narrow = select_r(in_float64, LOOP(input_in_float64)(p, j + i, MIN(n - i, DLANES), mean, scale, offset), narrow);
        memcpy(input + i, &narrow, sizeof narrow);
    }
#else
    (void)k;
#endif
}

/* The same of a line of some rows. */
INLINE void LOOP(inputs_of_line)(LOOP(source) p, LOOP(steps) step, ptrdiff_t height, ptrdiff_t j, const LOOP(columns) *k,
                                 const int kind, real (*input)[LINE_ELEMS])
{
    UNROLLED for (int v = 0; v < LINE_ELEMS / LANES; v++) {
        const ptrdiff_t at = j + v * LANES;
        const vec f[SLOPE] = {load_real(k->of_forward[HIGH] + at), load_real(k->of_forward[SCALE] + at),
                              load_real(k->of_forward[TERM] + at)};
        LOOP(source) of_row = p;
        for (ptrdiff_t row = 0; row < height; row++) {
            LOOP(inputs_of_columns)(of_row, at, LANES, k, f, kind, input[row] + v * LANES);
            of_row.x += step.x;
            of_row.z = p.z ? of_row.z + step.z : NULL;
        }
    }
}

/* What a reduction that is activated needs of the forward pass. */
INLINE void LOOP(spread_forward)(const cbn_tile *r, LOOP(columns) *k)
{
    const ptrdiff_t columns = r->copies * r->n_channels * r->length;
    LOOP(factors)(r->forward_c, r->pitch, r->n_channels, k->of_forward[0], ROOM, 0);
    for (int i = 0; i < SLOPE; i++) {
        SPREAD(r, k->of_forward[i]);
        memset(k->of_forward[i] + columns, 0, LINE_ELEMS * sizeof(real));
    }
    k->some_in_float64 = 0;
#if !ELEM_IS_DOUBLE
    for (ptrdiff_t c = 0; c < r->n_channels; c++) {
        k->in_float64[c] = -(r->forward_c[CBN_IN_FLOAT64 * r->pitch + c] != 0);
        k->some_in_float64 |= k->in_float64[c];
    }
    if (k->some_in_float64) {
        SPREAD(r, k->in_float64);
        LOOP(spread)(r, r->forward_c + CBN_SCALE * r->pitch, k->float64_scale);
        LOOP(spread)(r, r->forward_c + CBN_OFFSET * r->pitch, k->float64_offset);
    }
#endif
}

INLINE LOOP(source) LOOP(row_source)(const cbn_tile *r, ptrdiff_t row, LOOP(activation) act, const int backward)
{
    LOOP(source) p = {AT(r->x, row, 0), AT(r->g, row, 0), NULL, NULL, NULL};
    if (backward && act.kind != PLAIN) {
        p.dh = AT(r->dh, row, 0);
        p.z = r->z.data ? AT(r->z, row, 0) : NULL;
    }
    return p;
}

INLINE void LOOP(reduce_line)(LOOP(source) p, LOOP(steps) step, ptrdiff_t height, ptrdiff_t j, ptrdiff_t ahead_x,
                              ptrdiff_t ahead_g, LOOP(columns) *k, LOOP(activation) act, const int activated,
                              LOOP(turn) turn, const int backward, const int sum_in_float64)
{
    dvec shift[LINE_ELEMS / DLANES], sum[LINE_ELEMS / DLANES], square[LINE_ELEMS / DLANES];
    real input[ROWS][LINE_ELEMS]; /* backward goes through so many at most */
    if (backward && activated && (ELEM_IS_DOUBLE || p.z))
        LOOP(inputs_of_line)(p, step, height, j, k, CHECKED, input);
    else if (backward && activated)
        LOOP(inputs_of_line)(p, step, height, j, k, ACTIVATED, input);
    for (int v = 0; v < LINE_ELEMS / DLANES; v++) {
        shift[v] = load_double(k->shift + j + v * DLANES);
        LOOP(load_sums)(k, j + v * DLANES, turn, &sum[v], &square[v]);
    }
#if HALF && HAVE_ADD_ROWS
    if (!sum_in_float64) {
        vec s[2] = {{0}}, q[2] = {{0}};
        for (ptrdiff_t row = 0; row < height; row += 2) {
            const elem *x = p.x + row * step.x + j, *below = row + 1 < height ? x + step.x : NULL;
            __builtin_prefetch(x + ahead_x, 0, 2);
            if (below)
                __builtin_prefetch(below + ahead_x, 0, 2);
            LOOP(add_rows)(x, below, s, q);
        }
        LOOP(in_order)(s);
        LOOP(in_order)(q);
        for (int v = 0; v < LINE_ELEMS / LANES; v++) {
            sum[2 * v] += lower_d(s[v]);
            sum[2 * v + 1] += upper_d(s[v]);
            square[2 * v] += lower_d(q[v]);
            square[2 * v + 1] += upper_d(q[v]);
        }
    }
#elif HALF
    if (!sum_in_float64)
        for (ptrdiff_t block = 0; block < height; block += ROWS)
            for (int v = 0; v < LINE_ELEMS / LANES; v++) {
                const vec short_shift = HALF == F16 ? load_real(k->short_shift + j + v * LANES) : (vec){0};
                vec s = {0}, q = {0};
                for (ptrdiff_t row = block; row < MIN(block + ROWS, height); row++) {
                    const elem *x = p.x + row * step.x + j + v * LANES;
                    if (v == 0)
                        __builtin_prefetch(x + ahead_x, 0, 2);
                    const vec d = HALF == BF16 ? load(x) : load(x) - short_shift;
                    s += d;
                    q += d * d;
                }
                sum[2 * v] += lower_d(s);
                sum[2 * v + 1] += upper_d(s);
                square[2 * v] += lower_d(q);
                square[2 * v + 1] += upper_d(q);
            }
#endif
    for (ptrdiff_t row = 0; sum_in_float64 && row < height; row++) {
        __builtin_prefetch(p.x + j + ahead_x, 0, 2);
        if (backward)
            __builtin_prefetch(p.g + j + ahead_g, 0, 2);
        for (int v = 0; v < LINE_ELEMS / DLANES; v++)
            LOOP(reduce_some)(p, j + v * DLANES, DLANES, shift[v], input[backward ? row : 0] + v * DLANES, act, &sum[v],
                              &square[v], activated, backward, 0);
        p.x += step.x;
        p.g += step.g;
        if (backward && activated) {
            p.dh += step.dh;
            p.z = p.z ? p.z + step.z : NULL;
        }
    }
    for (int v = 0; v < LINE_ELEMS / DLANES; v++)
        LOOP(store_sums)(k, j + v * DLANES, turn, sum[v], square[v]);
}

/* Columns begin to end, less than a line; what lies beyond the end is room. */
INLINE void LOOP(reduce_part)(const cbn_tile *r, ptrdiff_t n, ptrdiff_t height, ptrdiff_t begin, ptrdiff_t end,
                              LOOP(columns) *k, LOOP(activation) act, LOOP(turn) turn, const int backward)
{
    for (ptrdiff_t j = begin; j < end; j += DLANES) {
        const ptrdiff_t lanes = MIN(end - j, DLANES);
        const dvec shift = load_double(k->shift + j);
        real input[LANES] = {0};
        vec f[SLOPE] = {{0}};
        for (int i = 0; backward && act.kind != PLAIN && i < SLOPE; i++)
            f[i] = load_real(k->of_forward[i] + j);
        dvec sum, square;
        LOOP(load_sums)(k, j, turn, &sum, &square);
        for (ptrdiff_t row = n; row < n + height; row++) {
            const LOOP(source) p = LOOP(row_source)(r, row, act, backward);
            if (backward && act.kind != PLAIN)
                LOOP(inputs_of_columns)(p, j, lanes, k, f, CHECKED, input);
            if (lanes == DLANES)
                LOOP(reduce_some)(p, j, DLANES, shift, input, act, &sum, &square, act.kind != PLAIN, backward, 0);
            else
                LOOP(reduce_some)(p, j, lanes, shift, input, act, &sum, &square, act.kind != PLAIN, backward, 0);
        }
        LOOP(store_sums)(k, j, turn, sum, square);
    }
}
#endif

/* Whether columns are better taken from the last to the first. A load waits for every store before it that is not done
 * and has the same place in its page of 4 KB, as if it were to the same address. Rows are often whole pages apart, and
 * two arrays that have been allocated one after the other 16 bytes off: with stores of four rows 16 bytes ahead of the
 * loads a map took 2.5 times as long (Zen 4). Stores that keep behind the loads delay nothing. */
INLINE int LOOP(downwards)(const cbn_tile *m, const cbn_tile *r, const int backward)
{
    const uintptr_t page = 4096;
    const cbn_tile *tiles[2] = {m, r};
    uintptr_t up = page, down = page; /* bytes from a load to the next store in that direction */
    for (int i = 0; i < 2; i++)
        for (int a = 0; a < 3; a++)
            if (tiles[i] && (a == 0 || (a == 1 ? backward : tiles[i]->z.data != NULL))) {
                const char *data = a == 0 ? tiles[i]->x.data : a == 1 ? tiles[i]->g.data : tiles[i]->z.data;
                const uintptr_t d = (uintptr_t)(m->y.data - data) % page;
                up = d > 0 && d < up ? d : up;
                down = d > 0 && page - d < down ? page - d : down;
            }
    return up < down;
}

INLINE void LOOP(rows)(const cbn_tile *m, const cbn_tile *r, const int plain, const int backward, const int applying,
                       const int reducing, const ptrdiff_t rows)
{
    const int nontemporal = applying && m->nontemporal;
    /* Of a map backward only that of float64 elements may be CHECKED */
    const int bare = plain || (backward && !ELEM_IS_DOUBLE);
    const LOOP(activation) act = bare ? (LOOP(activation)){PLAIN} : LOOP(activation_of)(applying ? m : r);
    real room[ALL_FACTORS][ROOM] __attribute__((aligned(LINE)));
    const ptrdiff_t n_runs = applying ? m->n_runs : r->n_runs;
    const ptrdiff_t m_columns = applying ? m->copies * m->n_channels * m->length - m->drop : 0;
    const ptrdiff_t skip = applying ? m->skip : 0;
    ptrdiff_t head = skip;
    if (RARE)
        head = m_columns;
    else if (nontemporal || (applying && m_columns >= LONG))
        head = MIN(skip + TO_LINE((elem_out *)m->y.data + skip), m_columns);
    /* Where a line of y begins, a vector of factors is aligned too. */
    real(*factors)[ROOM] = (void *)(room[0] + (-head & (LINE_ELEMS - 1)));
    ptrdiff_t columns = m_columns;
    const int down = applying && LOOP(downwards)(m, reducing ? r : NULL, backward);
    int normal = 1;
    if (applying) {
        LOOP(factors)(m->coef_c, m->pitch, m->n_channels, factors[0], ROOM, backward);
        for (ptrdiff_t c = 0; c < m->n_channels; c++)
            normal &= LOOP(stays_normal)(m, factors[TERM][c], act, backward);
        for (int i = 0; i < FACTORS(backward); i++)
            SPREAD(m, factors[i]);
    }
#if SUMS
    LOOP(columns) of_column __attribute__((aligned(LINE)));
    const LOOP(activation) act_r = plain ? (LOOP(activation)){PLAIN} : LOOP(activation_of)(reducing ? r : m);
    const LOOP(steps) step = {reducing ? r->x.n : 0, reducing ? r->g.n : 0, reducing ? r->z.n : 0, reducing ? r->dh.n : 0};
    const int sum_in_float64 = backward || !HALF || (reducing && r->sum_in_float64);
    const ptrdiff_t r_columns = reducing ? r->copies * r->n_channels * r->length : 0;
    if (reducing) {
        columns = MAX(columns, r_columns);
        LOOP(spread)(r, r->shift_c, of_column.shift);
        for (ptrdiff_t j = 0; HALF == F16 && !backward && j < r_columns; j++)
            of_column.short_shift[j] = (real)of_column.shift[j];
        if (backward && act_r.kind != PLAIN)
            LOOP(spread_forward)(r, &of_column);
    }
    const int flushing = !backward && sum_in_float64;
#endif
    /* A row may end with the head of the next one where nothing lies between them: else the line that they share would be
     * stored in two parts, each of which reads it from memory first. The last row is then one of its own. */
    const int wraps = nontemporal && !reducing && !RARE && rows > 1 && skip == 0 && m_columns % LINE_ELEMS == 0 &&
                      m->y.n == m_columns && m->x.n == m_columns && (!backward || m->g.n == m_columns) &&
                      (!m->z.data || m->z.n == m_columns);
    for (int i = 0; wraps && i < FACTORS(backward); i++)
        memcpy(factors[i] + m_columns, factors[i], (size_t)head * sizeof(real));
    ptrdiff_t height = 0;
    for (ptrdiff_t n = 0; n < n_runs; n += height) {
        const int last_row = n == n_runs - 1;
        height = MIN(rows, wraps && !last_row ? n_runs - 1 - n : n_runs - n);
        const ptrdiff_t end = m_columns + (wraps && !last_row ? head : 0);
        if (nontemporal && rows == 1 && !RARE)
            head = MIN(TO_LINE(Y_AT(m->y, n, 0)), m_columns);
        if (!wraps || n == 0)
            LOOP(apply_part)(m, n, wraps ? 1 : height, skip, head, factors, act, backward);
        const LOOP(row_of) at = LOOP(row_at)(applying ? m : r, n);
        LOOP(row_of) without_z = at;
        without_z.z = NULL;
#if SUMS
        const LOOP(source) source = LOOP(row_source)(reducing ? r : m, n, act_r, backward);
        const LOOP(turn) turn = LOOP(turn_of)(n, height, n_runs, flushing);
        /* Rows to come: of this tile, or the first of the next one. */
        ptrdiff_t ahead_x = 0, ahead_g = 0;
        if (reducing && r->prefetch) {
            const ptrdiff_t below = n + rows < n_runs ? rows : rows - n_runs, right = below == rows ? 0 : r_columns;
            ahead_x = below * r->x.n + right;
            ahead_g = below * r->g.n + right;
        }
#endif
        for (ptrdiff_t k = 0; k < columns; k += LINE_ELEMS) {
            const ptrdiff_t j = down ? (columns - 1) / LINE_ELEMS * LINE_ELEMS - k : k;
            if (applying && !RARE && head + j + LINE_ELEMS <= end) {
                /* A body each: that of plain maps has no branches */
                if (height == rows && bare)
                    LOOP(apply_line)(without_z, rows, head + j, factors, act, PLAIN, backward, nontemporal, !reducing, normal);
                else if (height == rows && !backward && act.kind == ACTIVATED)
                    LOOP(apply_line)(at, rows, head + j, factors, act, ACTIVATED, backward, nontemporal, !reducing, normal);
                else if (height == rows)
                    LOOP(apply_line)(at, rows, head + j, factors, act, CHECKED, backward, nontemporal, !reducing, normal);
                else if (bare) {
                    LOOP(row_of) one = without_z;
                    for (ptrdiff_t row = n; row < n + height; row++) {
                        LOOP(apply_line)(one, 1, head + j, factors, act, PLAIN, backward, nontemporal, 0, normal);
                        one.x += one.x_n;
                        one.g += one.g_n;
                        one.y += one.y_n;
                    }
                } else
                    for (ptrdiff_t row = n; row < n + height; row++)
                        LOOP(apply_line)(LOOP(row_at)(m, row), 1, head + j, factors, act, act.kind, backward, nontemporal, 0,
                                       normal);
            }
            else if (applying && head + j < end)
                LOOP(apply_part)(m, n, height, head + j, end, factors, act, backward);
#if SUMS
            if (reducing && j + LINE_ELEMS <= r_columns) {
                if (height == rows && backward && !plain && (!ELEM_IS_DOUBLE || act_r.kind != PLAIN))
                    LOOP(reduce_line)(source, step, rows, j, ahead_x, ahead_g, &of_column, act_r, 1, turn, backward,
                                      sum_in_float64);
                else if (height == rows)
                    LOOP(reduce_line)(source, step, rows, j, ahead_x, ahead_g, &of_column, act_r, 0, turn, backward,
                                      sum_in_float64);
                else
                    LOOP(reduce_line)(source, step, height, j, ahead_x, ahead_g, &of_column, act_r,
                                      act_r.kind != PLAIN, turn, backward, sum_in_float64);
            }
            else if (reducing && j < r_columns)
                LOOP(reduce_part)(r, n, height, j, r_columns, &of_column, act_r, turn, backward);
#endif
        }
    }
#if SUMS
    if (reducing) {
#if ELEM_IS_DOUBLE
        for (ptrdiff_t j = 0; flushing && j < r_columns; j += DLANES) {
            LOOP(take_low)(of_column.total_sum + j, of_column.sum_low + j);
            LOOP(take_low)(of_column.total_square + j, of_column.square_low + j);
        }
#endif
        LOOP(fold)(r, flushing ? of_column.total_sum : of_column.sum, r->sum_c);
        LOOP(fold)(r, flushing ? of_column.total_square : of_column.square, r->square_c);
    }
#endif
}

/* ---- entries: the constants of the bodies ------------------------------------------------------------ */

INLINE void LOOP(any_runs)(const cbn_tile *m, const cbn_tile *r, const int plain, const int backward)
{
#if SUMS
    if (m && r)
        LOOP(runs)(m, r, plain, backward, 1, 1);
    else if (r && (plain || backward))
        LOOP(runs)(m, r, plain, backward, 0, 1);
    else if (plain || !backward || ELEM_IS_DOUBLE)
#endif
        LOOP(runs)(m, r, plain, backward, 1, 0);
    if (m && m->nontemporal)
        STORE_FENCE();
}

INLINE void LOOP(any_rows)(const cbn_tile *m, const cbn_tile *r, const int plain, const int backward)
{
    /* Whether rows of y begin alike in their lines. */
    const int together = m && (!m->nontemporal || m->y.n * (ptrdiff_t)sizeof(elem_out) % LINE == 0);
#if SUMS
    if (together && r && !backward && !HALF) { /* else factors and sums do not fit L1: one after the other is faster */
        LOOP(rows)(m, r, plain, backward, 1, 1, ROWS);
        r = NULL;
    } else
#endif
    if (together)
        LOOP(rows)(m, r, plain, backward, 1, 0, ROWS);
    else if (m)
        LOOP(rows)(m, r, plain, backward, 1, 0, 1);
    if (m && m->nontemporal)
        STORE_FENCE();
#if SUMS
    if (r)
        LOOP(rows)(m, r, plain, backward, 0, 1, backward ? ROWS : 2 * ROWS); /* half the trips of the accumulators */
#endif
}

/* Two functions each: what goes through no activation has more registers alone. */
#define ENTRY(name, layout, plain, backward)                                                                       \
    TARGET static __attribute__((noinline)) void LOOP(name)(const cbn_tile *m, const cbn_tile *r)                  \
    {                                                                                                              \
        LOOP(any_##layout)(m, r, plain, backward);                                                                 \
    }
#if WIDENS
/* Rare, and maps alone: one function does, with what a map of this direction may have. */
#define ENTRIES(direction, layout, backward) ENTRY(direction##_##layout, layout, backward, backward)
#else
#define ENTRIES(direction, layout, backward)                                                                       \
    ENTRY(direction##_##layout##_plain, layout, 1, backward)                                                       \
    ENTRY(direction##_##layout##_activated, layout, 0, backward)                                                   \
    static void LOOP(direction##_##layout)(const cbn_tile *m, const cbn_tile *r)                                   \
    {                                                                                                              \
        if ((m && m->activated) || (backward && r && r->activated))                                                \
            LOOP(direction##_##layout##_activated)(m, r);                                                          \
        else                                                                                                       \
            LOOP(direction##_##layout##_plain)(m, r);                                                              \
    }
#endif

ENTRIES(forward, runs, 0)
ENTRIES(forward, rows, 0)
#if !BYTE
ENTRIES(backward, runs, 1)
ENTRIES(backward, rows, 1)
#endif

const cbn_loops LOOP(loops) = {
    .forward_runs = LOOP(forward_runs),
    .forward_rows = LOOP(forward_rows),
#if !BYTE
    .backward_runs = LOOP(backward_runs),
    .backward_rows = LOOP(backward_rows),
#endif
};

#undef ENTRIES
#undef TYPE
