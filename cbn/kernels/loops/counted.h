/* counted.h: forward reductions in which not every value counts alike: NaN may be missing, values may have weights, and
 * the smallest and largest of them are wanted.
 *
 * The sums are those of runs.h and rows.h, in the same order, of w*d and w*d*d: with weights of 1 and without NaN they
 * have the same bits (of 16-bit elements those of float64 sums). A value of weight 0 is read into nothing.
 */
#if SUMS

/* What is counted beside the sums, in the lanes of these. */
typedef struct {
    dvec count; /* with weights and `skipna`, the weights that count; else the NaN that would */
    dvec min, max;
} LOOP(count);

INLINE LOOP(count) LOOP(no_count)(void)
{
    return (LOOP(count)){{0}, splat_d(INFINITY), splat_d(-INFINITY)};
}

/* n elements from the i-th on; w are their weights. */
INLINE void LOOP(count_some)(const elem *x, ptrdiff_t i, ptrdiff_t n, dvec shift, const double *w, const int skipna,
                             dvec *sum, dvec *square, LOOP(count) *k, const int weighted)
{
    const dvec v = n == DLANES ? load_d(x + i) : load_first_d(x + i, n), one = splat_d(1);
    const dvec_bits nan = v != v;
    dvec d = v - shift, weight = one, inner = v;
    if (weighted) {
        weight = n == DLANES ? load_double(w + i) : load_first_doubles(w + i, n);
        const dvec_bits counts = weight != 0;
        d = (dvec)((dvec_bits)d & counts);
        inner = select_d(counts, v, splat_d(NAN));
        k->count += (dvec)((dvec_bits)(skipna ? weight : one) & counts & (skipna ? ~nan : nan));
    } else {
        k->count += (dvec)((dvec_bits)one & nan);
        if (n < DLANES) {
            d = first_lanes(d, n);
            inner = select_d((dvec_bits)first_lanes((dvec)(~(dvec_bits){0}), n), v, splat_d(NAN));
        }
    }
    if (skipna)
        d = (dvec)((dvec_bits)d & ~nan);
    const dvec wd = weighted ? weight * d : d;
    *sum += wd;
    *square += wd * d;
    k->min = smaller(inner, k->min);
    k->max = larger(inner, k->max);
}

/* ---- runs ---- */

/* Sums of a channel, and what is counted. */
typedef struct {
    LOOP(sums) sums;
    LOOP(totals) totals;
    LOOP(count) count[2];
} LOOP(counted);

/* Elements begin to end of a run. */
INLINE void LOOP(count_piece)(const elem *x, ptrdiff_t begin, ptrdiff_t end, dvec shift, const double *w,
                              const int skipna, LOOP(counted) *k, const int weighted)
{
    LOOP(sums) *s = &k->sums;
    ptrdiff_t i = begin;
    for (; OFTEN(i + UNROLL * DLANES <= end); i += UNROLL * DLANES)
        UNROLLED for (int u = 0; u < UNROLL; u++)
            LOOP(count_some)(x, i + u * DLANES, DLANES, shift, w, skipna, &s->sum[u], &s->square[u], &k->count[u % 2],
                             weighted);
    for (; i + DLANES <= end; i += DLANES)
        LOOP(count_some)(x, i, DLANES, shift, w, skipna, &s->sum[0], &s->square[0], &k->count[0], weighted);
    if (i < end)
        LOOP(count_some)(x, i, end - i, shift, w, skipna, &s->sum[1], &s->square[1], &k->count[1], weighted);
}

INLINE void LOOP(store_count)(const cbn_tile *r, ptrdiff_t c, const LOOP(count) *k)
{
    const dvec min = smaller(k[0].min, k[1].min), max = larger(k[0].max, k[1].max);
    double *count_c = r->count_c + c;
    count_c[CBN_COUNT * r->pitch] = total(k[0].count + k[1].count);
    count_c[CBN_MIN * r->pitch] = min[0];
    count_c[CBN_MAX * r->pitch] = max[0];
    for (ptrdiff_t i = 1; i < DLANES; i++) {
        count_c[CBN_MIN * r->pitch] = MIN(min[i], count_c[CBN_MIN * r->pitch]);
        count_c[CBN_MAX * r->pitch] = MAX(max[i], count_c[CBN_MAX * r->pitch]);
    }
}

INLINE void LOOP(count_runs)(const cbn_tile *r, const int skipna, const int weighted)
{
    const ptrdiff_t length = r->length, n_runs = r->n_runs;
    const int flushing = n_runs * length > FLUSH;
    LOOP(counted) waiting[GROUP];
    for (ptrdiff_t first = 0; first < r->n_channels; first += GROUP) {
        const ptrdiff_t last = MIN(first + GROUP, r->n_channels);
        for (ptrdiff_t n = 0; n < n_runs; n++)
            for (ptrdiff_t c = first; c < last; c++) {
                const elem *x = AT(r->x, n, c);
                const double *w = weighted ? (const double *)r->w.data + n * r->w.n + c * r->w.c : NULL;
                const dvec shift = splat_d(r->shift_c[c]);
                ptrdiff_t next_flush = flushing ? FLUSH - n * length % FLUSH : PTRDIFF_MAX;
                LOOP(counted) k = {.count = {LOOP(no_count)(), LOOP(no_count)()}};
                if (n)
                    k = waiting[c - first];
                for (ptrdiff_t i = 0; i < length;) {
                    const ptrdiff_t stop = MIN(length, next_flush);
                    LOOP(count_piece)(x, i, stop, shift, w, skipna, &k, weighted);
                    i = stop;
                    if (i == next_flush) {
                        LOOP(flush)(&k.sums, &k.totals, (n * length + next_flush) % (PARTS * FLUSH) == 0);
                        next_flush += FLUSH;
                    }
                }
                if (n < n_runs - 1)
                    waiting[c - first] = k;
                else {
                    LOOP(end_reduction)(r, c, &k.sums, NULL, &k.totals, 0, flushing);
                    LOOP(store_count)(r, c, k.count);
                }
            }
    }
}

/* ---- rows ---- */

/* The same of each column. */
typedef struct {
    LOOP(columns) sums;
    double count[ROOM], min[ROOM], max[ROOM], weight[ROOM];
} LOOP(counted_columns);

/* Columns from the j-th on, `vectors` of them or a part of one, of some rows. */
INLINE void LOOP(count_columns)(LOOP(counted_columns) *k, const elem *x, ptrdiff_t step, ptrdiff_t height, ptrdiff_t j,
                                ptrdiff_t end, ptrdiff_t ahead, LOOP(turn) turn, const int skipna, const int weighted,
                                const int vectors)
{
    dvec shift[LINE_ELEMS / DLANES], sum[LINE_ELEMS / DLANES], square[LINE_ELEMS / DLANES];
    LOOP(count) count[LINE_ELEMS / DLANES];
    UNROLLED for (int v = 0; v < vectors; v++) {
        const ptrdiff_t at = j + v * DLANES;
        shift[v] = load_double(k->sums.shift + at);
        LOOP(load_sums)(&k->sums, at, turn, &sum[v], &square[v]);
        count[v] = (LOOP(count)){load_double(k->count + at), load_double(k->min + at), load_double(k->max + at)};
    }
    for (ptrdiff_t row = 0; row < height; row++, x += step) {
        if (vectors > 1)
            FETCH(x + j + ahead);
        UNROLLED for (int v = 0; v < vectors; v++)
            LOOP(count_some)(x, j + v * DLANES, vectors > 1 ? DLANES : MIN(end - j, DLANES), shift[v], k->weight, skipna,
                             &sum[v], &square[v], &count[v], weighted);
    }
    UNROLLED for (int v = 0; v < vectors; v++) {
        const ptrdiff_t at = j + v * DLANES;
        LOOP(store_sums)(&k->sums, at, turn, sum[v], square[v]);
        store_double(k->count + at, count[v].count);
        store_double(k->min + at, count[v].min);
        store_double(k->max + at, count[v].max);
    }
}

/* The weight of each column of row n. */
INLINE void LOOP(weights_of_row)(const cbn_tile *r, ptrdiff_t n, double *weight)
{
    for (ptrdiff_t copy = 0; copy < r->copies; copy++) {
        const double *w = (const double *)r->w.data + (n * r->copies + copy) * r->w.n;
        for (ptrdiff_t c = 0; c < r->n_channels; c++, w += r->w.c, weight += r->length)
            for (ptrdiff_t i = 0; i < r->length; i++)
                weight[i] = w[i];
    }
}

/* The smallest of each channel, of the smallest of its columns; or the largest. */
INLINE void LOOP(fold_extremes)(const cbn_tile *r, const double *of_column, double *of_channel, const int largest)
{
    for (ptrdiff_t c = 0; c < r->n_channels; c++)
        of_channel[c] = largest ? -INFINITY : INFINITY;
    for (ptrdiff_t copy = 0; copy < r->copies; copy++)
        for (ptrdiff_t c = 0; c < r->n_channels; c++, of_column += r->length)
            for (ptrdiff_t i = 0; i < r->length; i++)
                of_channel[c] = largest ? MAX(of_column[i], of_channel[c]) : MIN(of_column[i], of_channel[c]);
}

INLINE void LOOP(count_rows)(const cbn_tile *r, const int skipna, const int weighted)
{
    const ptrdiff_t columns = r->copies * r->n_channels * r->length, rows = weighted ? 1 : 2 * ROWS;
    const LOOP(activation) plain = {.kind = PLAIN};
    LOOP(counted_columns) k __attribute__((aligned(CACHE_LINE)));
    LOOP(begin_reduce_rows)(&k.sums, r, columns, plain, 0);
    for (ptrdiff_t j = 0; j < columns; j += DLANES) {
        store_double(k.count + j, (dvec){0});
        store_double(k.min + j, splat_d(INFINITY));
        store_double(k.max + j, splat_d(-INFINITY));
    }
    ptrdiff_t height = 0;
    for (ptrdiff_t n = 0; n < r->n_runs; n += height) {
        height = MIN(rows, r->n_runs - n);
        const elem *x = AT(r->x, n, 0);
        const LOOP(turn) turn = LOOP(turn_of)(n, height, r->n_runs, 1);
        const ptrdiff_t ahead = LOOP(row_distance)(r, n, rows, r->n_runs, columns).x;
        if (weighted)
            LOOP(weights_of_row)(r, n, k.weight);
        ptrdiff_t j = 0;
        for (; j + LINE_ELEMS <= columns; j += LINE_ELEMS)
            if (height == 2 * ROWS)
                LOOP(count_columns)(&k, x, r->x.n, 2 * ROWS, j, columns, ahead, turn, skipna, weighted,
                                    LINE_ELEMS / DLANES);
            else
                LOOP(count_columns)(&k, x, r->x.n, height, j, columns, ahead, turn, skipna, weighted,
                                    LINE_ELEMS / DLANES);
        for (; j < columns; j += DLANES)
            LOOP(count_columns)(&k, x, r->x.n, height, j, columns, 0, turn, skipna, weighted, 1);
    }
    LOOP(end_reduce_rows)(&k.sums, r, columns, 1);
    LOOP(fold)(r, k.count, r->count_c + CBN_COUNT * r->pitch);
    LOOP(fold_extremes)(r, k.min, r->count_c + CBN_MIN * r->pitch, 0);
    LOOP(fold_extremes)(r, k.max, r->count_c + CBN_MAX * r->pitch, 1);
}

/* A body each: `skipna` is a constant where there are no weights. */
#define COUNT(layout)                                                                                              \
    TARGET static __attribute__((noinline)) void LOOP(count_##layout##_of)(const cbn_tile *r)                      \
    {                                                                                                              \
        if (r->w.data)                                                                                             \
            LOOP(count_##layout)(r, r->skipna, 1);                                                                 \
        else if (r->skipna)                                                                                        \
            LOOP(count_##layout)(r, 1, 0);                                                                         \
        else                                                                                                       \
            LOOP(count_##layout)(r, 0, 0);                                                                         \
    }
COUNT(runs)
COUNT(rows)
#undef COUNT
#endif
