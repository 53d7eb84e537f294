/* formulas.h: the arithmetic of an element: its factors, y and dx, the activation and its gradient, what is summed.
 *
 * forward    y  = (x - mean)*scale + offset
 * backward   dx = (dh - gmean)*scale - (x - mean)*slope,  slope = S(dh*d)*invstd^2/n*scale, gmean = S(dh)/n
 *
 * The subtraction comes first: x*scale + (offset - mean*scale) would lose all digits of a channel whose mean is large
 * beside its spread (cancellation). float32 cannot hold such a mean either, so two floats do: mean = high + low. The
 * difference x - high is exact where x is near the mean (Sterbenz), and low, a constant by the time it has been scaled,
 * is part of the term that is added:
 *
 * forward    y  = (x - high)*scale + term                               term = offset - low*scale
 * backward   dx = (dh - ghigh)*scale + ((x - high)*(-slope) + term)     term = low*slope - glow*scale
 *
 * None of this overflows where its result is finite: the engine gives channels whose coefficients are too large for
 * that to the loops in float64. But a residual, or a slope that shrinks, can bring a value back that has overflowed on
 * its way. Such a value is infinite or NaN before the activation, and is computed again with a larger range
 * (`checked`).
 */
#ifndef CBN_FORMULAS_H
#define CBN_FORMULAS_H
/* The factors of a channel; forward has the first three. */
enum { HIGH, SCALE, TERM, SLOPE, GHIGH, ALL_FACTORS };
#define FACTORS(backward) ((backward) ? ALL_FACTORS : SLOPE)
/* What follows the normalization: nothing; act(a + z); the same with bounds, or where a value may have overflowed on its
 * way. */
enum { PLAIN, ACTIVATED, CHECKED };
#endif

/* ---- factors ---- */

/* mean - high; zero in float64, and where the mean is not finite and the difference would be NaN. */
INLINE double LOOP(low_part)(double mean)
{
    const real high = (real)mean;
    return high - high == 0 ? mean - high : 0;
}

/* The factors of some channels, from their coefficients; out[i*out_pitch + c] is factor i of channel c. `weight` is
 * that of the values (masked.h). */
INLINE void LOOP(factors)(const double *coef_c, ptrdiff_t pitch, ptrdiff_t n_channels, real *out, ptrdiff_t out_pitch,
                          const double weight, const int backward)
{
    const double *mean_c = coef_c + CBN_MEAN * pitch, *scale_c = coef_c + CBN_SCALE * pitch;
    const double *third_c = coef_c + (backward ? CBN_GRAD_MEAN : CBN_OFFSET) * pitch;
    const double *slope_c = coef_c + CBN_SLOPE * pitch;
    for (ptrdiff_t c = 0; c < n_channels; c++) {
        const double low = LOOP(low_part)(mean_c[c]), scale = scale_c[c];
        const double third = backward ? third_c[c] * weight : third_c[c];
        out[HIGH * out_pitch + c] = quiet((real)mean_c[c]);
        out[SCALE * out_pitch + c] = quiet((real)scale);
        if (backward) {
            const double slope = slope_c[c] * weight, glow = LOOP(low_part)(third);
            out[TERM * out_pitch + c] = quiet((real)((low != 0 ? low * slope : 0) - (glow != 0 ? glow * scale : 0)));
            out[SLOPE * out_pitch + c] = quiet((real)-slope);
            out[GHIGH * out_pitch + c] = quiet((real)third);
        } else
            out[TERM * out_pitch + c] = quiet((real)(low != 0 ? third - low * scale : third));
    }
}

/* ---- apply ---- */

INLINE vec LOOP(applied)(vec x, vec g, const vec *f, const int backward)
{
    if (backward)
        return (g - f[GHIGH]) * f[SCALE] + ((x - f[HIGH]) * f[SLOPE] + f[TERM]);
    return (x - f[HIGH]) * f[SCALE] + f[TERM];
}

typedef struct {
    int kind; /* PLAIN, ACTIVATED or CHECKED */
    real slope;
    real vanishing; /* the largest number that y's type takes for zero */
    double slope_d; /* slope, for float64 */
    /* Of CHECKED alone, so that other activations do not look: whether it recomputes, and whether there are bounds, and a
     * slope of 1 */
    int checks, clips;
    real low, high;
} LOOP(activation);

INLINE LOOP(activation) LOOP(activation_of)(const cbn_tile *t)
{
    const int clips = t->act.low > -INFINITY || t->act.high < INFINITY;
    const int kind = !t->activated ? PLAIN : t->checked || clips ? CHECKED : ACTIVATED;
    return (LOOP(activation)){.kind = kind,
                              .slope = (real)t->act.slope,
                              .vanishing = (real)(clips ? 0 : t->vanishing), /* with bounds, of `between` */
                              .slope_d = clips ? 0 : t->act.slope,
                              .checks = t->checked,
                              .clips = clips,
                              .low = (real)t->act.low,
                              .high = (real)t->act.high};
}

/* Lanes begin to end of y or dx from the i-th element on, before the activation; z may be NULL. If `kind` is CHECKED,
 * `seen` becomes NaN where a lane is infinite or NaN. */
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

/* The same after the activation. */
INLINE vec LOOP(unchecked)(const elem *x, const elem *g, const elem_out *z, ptrdiff_t i, ptrdiff_t begin, ptrdiff_t end,
                           const vec *f, LOOP(activation) act, const int kind, const int backward, vec *seen)
{
    const vec a = LOOP(before)(x, g, z, i, begin, end, f, kind, backward, seen);
    if (kind == PLAIN || backward)
        return a;
    if (kind == CHECKED && act.clips)
        return clamped(a, splat(act.low), splat(act.high));
    return select(a <= 0, act.slope != 0 ? a * act.slope : (vec){0}, a);
}

/* A larger range; where long double is double, float64 has none. */
typedef __typeof__(__builtin_choose_expr(sizeof(REAL) == 8, (long double)0, (double)0)) LOOP(larger);

/* The same, with the larger range where a lane is infinite or NaN. Rare, so not inlined. */
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
        if (act->clips && !backward)
            y[k] = b < act->low ? act->low : b > act->high ? act->high : (real)b;
        else
            y[k] = (real)(backward || !(b <= 0) ? b : act->slope_d != 0 ? b * act->slope_d : 0);
    }
    return y;
}

/* v, or what `checked` makes of it where `seen` says so. It gets copies, since what another function sees is in
 * memory. */
INLINE vec LOOP(check)(vec v, vec seen, const elem *x, const elem *g, const elem_out *z, ptrdiff_t i, ptrdiff_t begin,
                       ptrdiff_t end, const vec *f, LOOP(activation) act, const int kind, const int backward)
{
    if (kind != CHECKED || !act.checks || (backward && !ELEM_IS_DOUBLE) || __builtin_expect(!any_nan(seen), 1))
        return v;
    vec factors[ALL_FACTORS] = {{0}};
    const LOOP(activation) copy = act;
    for (int k = 0; k < FACTORS(backward); k++)
        factors[k] = f[k];
    return LOOP(checked)(x, g, z, i, begin, end, factors, &copy, backward);
}

/* Lanes begin to end of y or dx. */
INLINE vec LOOP(value)(const elem *x, const elem *g, const elem_out *z, ptrdiff_t i, ptrdiff_t begin, ptrdiff_t end,
                       const vec *f, LOOP(activation) act, const int kind, const int backward)
{
    vec seen = {0};
    const vec v = LOOP(unchecked)(x, g, z, i, begin, end, f, act, kind, backward, &seen);
    return LOOP(check)(v, seen, x, g, z, i, begin, end, f, act, kind, backward);
}

/* Whether no y = fma(d, scale, term) is subnormal, so that `pack_normal` may convert it to bfloat16. Where d*scale is
 * less than half of term, y is more than 1e-20/2. Otherwise y is zero or a multiple of the last places of d and scale,
 * which is 2^-48 of d*scale at least: 2^-48*1e-20/2 > 2^-116. */
INLINE int LOOP(stays_normal)(const cbn_tile *m, real term, LOOP(activation) act, const int backward)
{
#if HAVE_PACK_NORMAL
    const int selects = act.kind == PLAIN || act.slope == 0;
    return !backward && !m->z.data && selects && (term >= 1e-20f || term <= -1e-20f);
#else
    (void)m, (void)term, (void)act, (void)backward;
    return 0;
#endif
}

/* ---- reduction ---- */

#if SUMS
/* Forward, S(d) and S(d*d) of d = x - shift, from which m2 = S(d*d) - S(d)^2/n. Cancellation costs log2(S(d*d)/m2) =
 * log2(1 + (shift - mean)^2/var) bits. The shift is the mean of a few values of the channel, so that a constant
 * channel gives d = 0 and exactly its mean; where it is too far off (`channels_to_redo` in statistics.pxd), the channel is
 * reduced again with its mean as shift. Backward, S(dh) and S(dh*d). */
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

/* The input of the activation, lanes 0 to end from the i-th element on. It is computed again rather than kept since the
 * forward pass, by the very code of the forward apply: y was positive exactly where this is larger than `vanishing`. */
INLINE vec LOOP(input)(const elem *x, const elem_out *z, ptrdiff_t i, ptrdiff_t end, const vec *f, const int kind)
{
    const LOOP(activation) none = {.kind = CHECKED, .slope = 1, .slope_d = 1, .checks = 1};
    vec seen = {0};
    const vec a = LOOP(before)(x, NULL, z, i, 0, end, f, kind, 0, &seen);
    return LOOP(check)(a, seen, x, NULL, z, i, 0, end, f, none, kind, 0);
}

/* The same for a channel that took the loops in float64, n <= DLANES lanes. */
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

/* 1 for each of n inputs between the bounds, else 0: so what follows compares as it does for ReLU. Not there, where a
 * second comparison takes a twentieth of the pass. A NaN is no input below or above a bound. */
INLINE void LOOP(between)(real *input, ptrdiff_t n, LOOP(activation) act)
{
    for (ptrdiff_t i = 0; i < n; i++)
        input[i] = (real)(!(input[i] <= act.low) && !(input[i] >= act.high));
}

/* The masked gradient dh = dy*act'(a) of n elements; it is also stored. */
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

/* sum + low += a, exactly but for the rounding of low. */
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
#endif
