/* few.h: few rows: measure, merge, solve and apply, in one loop over blocks of columns.
 *
 * What is done for a channel, and not for an element, is most of such a call: of 8 rows of 1024 channels, three
 * quarters, where loops over all channels read and write what another loop has written. Here it goes from a register to
 * the next. The formulas are those of statistics.h and coefficients.h, in the same order, and so are the bits.
 */
#if SUMS && !HALF
#define SMALL (ELEM_IS_DOUBLE ? CBN_SMALL_DOUBLE : CBN_SMALL_FLOAT)
#define BLOCK (8 * LINE_ELEMS) /* columns that go from step to step: so many are independent of each other */

/* a*b, rounded before anything is added to it. On x86-64 loops over channels have no fused multiply-add (wide.h); on
 * other processors they have what the loops here have. */
INLINE dvec LOOP(product)(dvec a, dvec b)
{
    dvec ab = a * b;
#if defined(__x86_64__)
    __asm__("" : "+v"(ab));
#endif
    return ab;
}

INLINE dvec LOOP(size)(dvec a)
{
    return select_d(a < 0, -a, a);
}

INLINE dvec_bits LOOP(finite)(dvec a)
{
    return a - a == 0;
}

/* Values of n <= DLANES channels. */
INLINE dvec LOOP(load_channels)(const double *p, ptrdiff_t n)
{
    return n == DLANES ? load_double(p) : load_first_doubles(p, n);
}

INLINE void LOOP(store_channels)(double *p, dvec v, ptrdiff_t n)
{
    if (n == DLANES)
        store_double(p, v);
    else
        for (ptrdiff_t i = 0; i < n; i++)
            p[i] = v[i];
}

/* The number of values, and 1/n where that is exact, else 0. */
typedef struct {
    double n, inverse;
} LOOP(divisor);

INLINE LOOP(divisor) LOOP(divisor_of)(ptrdiff_t n)
{
    return (LOOP(divisor)){(double)n, (n & (n - 1)) == 0 ? 1 / (double)n : 0};
}

INLINE dvec LOOP(divided)(dvec a, LOOP(divisor) by)
{
    return by.inverse != 0 ? a * by.inverse : a / by.n;
}

enum { LOOP(SAMPLES) = 8 };

/* `position` of statistics.pxd: rows from all over. */
INLINE void LOOP(find_samples)(const cbn_tile *r, const elem **sample)
{
    for (ptrdiff_t k = 0; k < LOOP(SAMPLES); k++)
        sample[k] = AT(r->x, ((k | 1) * r->n_runs / LOOP(SAMPLES) + (k & 1)) % r->n_runs, 0);
}

/* `choose_shifts` of statistics.pxd for the n columns from the j-th on. */
INLINE dvec LOOP(shift_of_samples)(const elem *const *sample, ptrdiff_t j, ptrdiff_t n)
{
    dvec v[LOOP(SAMPLES)];
    UNROLLED for (int k = 0; k < LOOP(SAMPLES); k++)
        v[k] = LOOP(load_some)(sample[k] + j, n);
    const dvec mean = (((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]))) / LOOP(SAMPLES);
    return select_d(LOOP(finite)(mean), mean, select_d(LOOP(finite)(v[0]), v[0], (dvec){0}));
}

/* Moments of the n columns from the j-th on, from their sums. Where the shift was too far from the mean, which is the
 * new shift then, they are to be reduced again; returns whether some are. */
INLINE dvec_bits LOOP(moments_of_columns)(LOOP(columns) *k, ptrdiff_t j, LOOP(divisor) by, dvec *mean, dvec *m2)
{
    dvec sum = load_double(k->total_sum + j), square = load_double(k->total_square + j);
    const dvec shift = load_double(k->shift + j);
#if ELEM_IS_DOUBLE
    sum = LOOP(in_one)(sum, load_double(k->sum_low + j));
    square = LOOP(in_one)(square, load_double(k->square_low + j));
#endif
    const dvec part = LOOP(divided)(sum, by), left = square - LOOP(product)(sum, part);
    *m2 = select_d((square > DBL_MAX) & LOOP(finite)(sum), square, left);
    *m2 = select_d(*m2 < 0, (dvec){0}, *m2);
    *mean = shift + part;
    const dvec d = *mean - shift;
    const dvec_bits far = (d * (by.n * d) > (ELEM_IS_DOUBLE ? 2.0 : 4.0) * *m2) & LOOP(finite)(*mean) & (d != 0);
    store_double(k->shift + j, select_d(far, *mean, shift));
    return far;
}

/* `takes_float64` of coefficients.h, or for float64 elements whether something may overflow. */
INLINE dvec_bits LOOP(misfit)(dvec mean, dvec scale, dvec third, dvec slope, dvec added)
{
    const dvec a = LOOP(size)(scale), b = LOOP(size)(slope);
    const dvec_bits holds = (LOOP(size)(mean) < SMALL) & (LOOP(size)(third) + added < SMALL);
    if (ELEM_IS_DOUBLE)
        return ~holds;
    return ~(holds & ((a == 0) | ((a >= FLT_MIN) & (a <= FLT_MAX))) & ((b == 0) | ((b >= FLT_MIN) & (b <= FLT_MAX))));
}

/* What low parts of two floats add, at most. */
INLINE dvec LOOP(lower_part)(dvec mean, dvec scale)
{
    return ELEM_IS_DOUBLE ? (dvec){0} : LOOP(size)(LOOP(product)(mean, scale)) * (FLT_EPSILON / 2);
}

/* mean - high; see `low_part` in formulas.h. */
INLINE dvec LOOP(low_of)(dvec mean)
{
    const dvec high = widened(narrowed(mean));
    return select_d(LOOP(finite)(high), mean - high, (dvec){0});
}

INLINE void LOOP(set_factor)(real *factor, dvec v)
{
    const rvec rounded = narrowed(v);
    memcpy(factor, &rounded, sizeof rounded);
}

/* Of lanes that hold, or do not, those that are channels. */
INLINE dvec_bits LOOP(of_channels)(dvec_bits lanes, ptrdiff_t n)
{
    return n == DLANES ? lanes : (dvec_bits)first_lanes((dvec)lanes, n);
}

/* Statistics and factors of the n columns from the j-th on; returns which have to be reduced again. */
INLINE dvec_bits LOOP(solve_columns)(LOOP(columns) *k, const cbn_tile *r, const cbn_solve *s, ptrdiff_t j, ptrdiff_t n,
                                     LOOP(divisor) by, real (*factors)[ROOM], dvec_bits *misfits)
{
    dvec mean, m2;
    const dvec_bits far = LOOP(moments_of_columns)(k, j, by, &mean, &m2);
    const dvec invstd = 1 / roots(LOOP(divided)(m2, by) + s->eps);
    const dvec scale = s->weight_c ? invstd * LOOP(load_channels)(s->weight_c + j, n) : invstd;
    const dvec offset = s->bias_c ? LOOP(load_channels)(s->bias_c + j, n) : (dvec){0};
    const dvec low = LOOP(low_of)(mean);
    LOOP(store_channels)(r->sum_c + j, mean, n);
    LOOP(store_channels)(r->square_c + j, m2, n);
    LOOP(store_channels)(s->invstd_c + j, invstd, n);
    LOOP(set_factor)(factors[HIGH] + j, mean);
    LOOP(set_factor)(factors[SCALE] + j, scale);
    LOOP(set_factor)(factors[TERM] + j, select_d(low != 0, offset - low * scale, offset));
    *misfits |= LOOP(of_channels)(LOOP(misfit)(mean, scale, offset, (dvec){0}, LOOP(lower_part)(mean, scale)), n);
    return LOOP(of_channels)(far, n);
}

/* The same backward. */
INLINE void LOOP(solve_gradients)(const LOOP(columns) *k, const cbn_tile *r, const cbn_solve *s, ptrdiff_t j,
                                  ptrdiff_t n, LOOP(divisor) by, real (*factors)[ROOM], dvec_bits *misfits)
{
    const dvec sum = load_double(k->sum + j), product = load_double(k->square + j), mean = load_double(k->shift + j);
    const dvec invstd = LOOP(load_channels)(s->invstd_c + j, n);
    const dvec scale = s->weight_c ? invstd * LOOP(load_channels)(s->weight_c + j, n) : invstd;
    const dvec gmean = LOOP(divided)(sum, by), slope = LOOP(divided)(product, by) * invstd * invstd * scale;
    const dvec low = LOOP(low_of)(mean), glow = LOOP(low_of)(gmean);
    const dvec of_low = select_d(low != 0, LOOP(product)(low, slope), (dvec){0});
    const dvec of_glow = select_d(glow != 0, LOOP(product)(glow, scale), (dvec){0});
    const dvec bound = LOOP(size)(product * invstd * scale) / sqrt(by.n);
    LOOP(store_channels)(r->sum_c + j, sum, n);
    LOOP(store_channels)(r->square_c + j, product, n);
    LOOP(set_factor)(factors[HIGH] + j, mean);
    LOOP(set_factor)(factors[SCALE] + j, scale);
    LOOP(set_factor)(factors[TERM] + j, of_low - of_glow);
    LOOP(set_factor)(factors[SLOPE] + j, -slope);
    LOOP(set_factor)(factors[GHIGH] + j, gmean);
    const dvec added = bound + LOOP(lower_part)(mean, slope) + LOOP(lower_part)(gmean, scale);
    *misfits |= LOOP(of_channels)(LOOP(misfit)(mean, scale, gmean, slope, added), n);
}

/* Columns begin to end of all rows: their sums. */
INLINE void LOOP(reduce_block)(const cbn_tile *r, LOOP(columns) *k, ptrdiff_t begin, ptrdiff_t end,
                               LOOP(activation) act, LOOP(distance) ahead, const int plain, const int backward)
{
    const ptrdiff_t n_runs = r->n_runs, rows = backward ? ROWS : 2 * ROWS;
    const LOOP(steps) step = {r->x.n, r->g.n, r->z.n, r->dh.n};
    for (ptrdiff_t n = 0, height; n < n_runs; n += height) {
        height = MIN(rows, n_runs - n);
        const LOOP(turn) turn = LOOP(turn_of)(n, height, n_runs, !backward);
        const LOOP(source) source = LOOP(row_source)(r, n, act, backward);
        for (ptrdiff_t j = begin; j < end; j += LINE_ELEMS)
            LOOP(reduce_columns)(k, r, source, step, n, height, j, end, ahead, act, turn, plain, backward, 1, rows);
    }
}

/* Columns begin to end of all rows: whole cache lines of y, but for the first columns and the last. */
INLINE void LOOP(apply_block)(const LOOP(apply_rows) *a, const cbn_tile *m, ptrdiff_t begin, ptrdiff_t end,
                              const int bare, const int backward)
{
    const ptrdiff_t n_runs = m->n_runs, head = MAX(begin, a->head), columns = a->columns;
    for (ptrdiff_t n = 0, height; n < n_runs; n += height) {
        const int wrapped = a->wraps && n < n_runs - 1;
        const LOOP(row_of) at = LOOP(row_at)(m, n);
        height = MIN(ROWS, wrapped ? n_runs - 1 - n : n_runs - n);
        if (begin < head && (n == 0 || !a->wraps))
            LOOP(apply_part)(m, n, a->wraps ? 1 : height, begin, head, a->factors, a->act, backward);
        for (ptrdiff_t j = head; j < end; j += LINE_ELEMS)
            LOOP(apply_columns)(a, m, at, n, height, j, wrapped ? columns + a->head : columns, bare, backward, ROWS);
    }
}

INLINE int LOOP(any_rows_at_once)(const cbn_tile *m, const cbn_tile *r, const cbn_solve *s, const int plain,
                                  const int backward)
{
    /* Backward, apply may be CHECKED for float64 elements alone */
    const int bare = plain || backward;
    const LOOP(divisor) by = LOOP(divisor_of)(r->n_runs);
    const LOOP(activation) act_r = plain ? (LOOP(activation)){.kind = PLAIN} : LOOP(activation_of)(r);
    const elem *sample[LOOP(SAMPLES)];
    real room[ALL_FACTORS][ROOM] __attribute__((aligned(CACHE_LINE)));
    LOOP(columns) of_column __attribute__((aligned(CACHE_LINE)));
    LOOP(apply_rows) a = {.act = bare ? (LOOP(activation)){.kind = PLAIN} : LOOP(activation_of)(m)};
    LOOP(begin_apply_rows)(&a, m, room, backward, 0, ROWS);
    a.fetching = 0;
    ptrdiff_t applied = 0;
    dvec_bits misfits = {0}, again;
    LOOP(find_samples)(r, sample);
    if (backward && !plain)
        LOOP(spread_forward)(r, &of_column);
    for (ptrdiff_t begin = 0, end, whole; begin < a.columns; begin = end, applied = whole) {
        end = MIN(begin + BLOCK, a.columns);
        const ptrdiff_t next = !r->prefetch ? 0 : end < a.columns ? end - begin : s->next - begin;
        for (ptrdiff_t j = begin; j < end; j += DLANES) {
            const ptrdiff_t n = MIN(end - j, DLANES);
            store_double(of_column.shift + j, backward ? LOOP(load_channels)(r->shift_c + j, n)
                                                       : LOOP(shift_of_samples)(sample, j, n));
        }
        do {
            LOOP(reduce_block)(r, &of_column, begin, end, act_r, (LOOP(distance)){next, next}, plain, backward);
            again = (dvec_bits){0};
            for (ptrdiff_t j = begin; j < end; j += DLANES) {
                const ptrdiff_t n = MIN(end - j, DLANES);
                if (backward)
                    LOOP(solve_gradients)(&of_column, r, s, j, n, by, a.factors, &misfits);
                else
                    again |= LOOP(solve_columns)(&of_column, r, s, j, n, by, a.factors, &misfits);
            }
        } while (!backward && UNLIKELY(any_nan((vec)again)));
        whole = end < a.columns ? a.head + (end - a.head) / LINE_ELEMS * LINE_ELEMS : end;
        for (int i = 0; a.wraps && end == a.columns && i < FACTORS(backward); i++)
            memcpy(a.factors[i] + a.columns, a.factors[i], (size_t)a.head * sizeof(real));
        LOOP(apply_block)(&a, m, applied, whole, bare, backward);
    }
    if (m->nontemporal)
        STORE_FENCE();
    return !any_nan((vec)misfits);
}

#define AT_ONCE(name, plain, backward)                                                                             \
    TARGET static __attribute__((noinline)) int LOOP(name)(const cbn_tile *m, const cbn_tile *r, const cbn_solve *s) \
    {                                                                                                              \
        return LOOP(any_rows_at_once)(m, r, s, plain, backward);                                                   \
    }
AT_ONCE(forward_at_once_plain, 1, 0)
AT_ONCE(forward_at_once_activated, 0, 0)
AT_ONCE(backward_at_once_plain, 1, 1)
AT_ONCE(backward_at_once_activated, 0, 1)
#undef AT_ONCE

static int LOOP(forward_at_once)(const cbn_tile *m, const cbn_tile *r, const cbn_solve *s)
{
    return m->activated ? LOOP(forward_at_once_activated)(m, r, s) : LOOP(forward_at_once_plain)(m, r, s);
}

static int LOOP(backward_at_once)(const cbn_tile *m, const cbn_tile *r, const cbn_solve *s)
{
    return r->activated ? LOOP(backward_at_once_activated)(m, r, s) : LOOP(backward_at_once_plain)(m, r, s);
}
#undef SMALL
#undef BLOCK
#endif
