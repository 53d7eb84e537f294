/* counted.h: forward reductions in which not every value counts alike: NaN may be missing, values may have weights, and
 * the smallest and largest of them are wanted.
 *
 * The sums are those of runs.h and rows.h, in the same order, of w*d and w*d*d: with weights of 1 and without NaN they
 * have the same bits (of 16-bit elements those of float64 sums). A value of weight 0 is read into nothing.
 */
#if SUMS

/* What a body does, as constant bits. Sums alone are left where the memory's speed leaves them: so there are bodies for
 * the extremes alone, and for NaN that are missing alone. */
#ifndef CBN_LOOPS_COUNTED_H
#define CBN_LOOPS_COUNTED_H
enum { COUNTING = 1, EXTREMES = 2, SKIPPING = 4, WEIGHING = 8 };
#endif

/* What is counted beside the sums, in as many lanes. */
typedef struct {
    dvec count; /* with `skipna` the weights of what counts, else how many NaN do */
    rvec min, max;
} LOOP(count);

INLINE LOOP(count) LOOP(no_count)(void)
{
    const rvec zero = {0};
    return (LOOP(count)){{0}, zero + (real)INFINITY, zero - (real)INFINITY};
}

/* The weights of n elements from the i-th on. */
INLINE dvec LOOP(weights)(const double *w, ptrdiff_t i, ptrdiff_t n)
{
    return n == DLANES ? load_double(w + i) : load_first_doubles(w + i, n);
}

/* n elements from the i-th on, of such weights, which are 0 beyond the n-th. */
INLINE void LOOP(count_some)(const elem *x, ptrdiff_t i, ptrdiff_t n, dvec shift, dvec weight, dvec *sum, dvec *square,
                             LOOP(count) *k, const int what)
{
    const rvec r = n == DLANES ? load_r(x + i) : load_first_r(x + i, n);
    const dvec v = widened(r);
    const dvec_bits number = v == v, all = ~(dvec_bits){0};
    dvec d = v - shift;
    dvec_bits counts = all;
    if (what & WEIGHING)
        counts = weight != 0;
    else if (n < DLANES)
        counts = (dvec_bits)first_lanes((dvec)all, n);
    if (what & EXTREMES) {
        rvec inner = r;
        if (n < DLANES || (what & WEIGHING))
            inner = narrowed(select_d(counts, v, splat_d(NAN)));
        k->min = smaller(inner, k->min);
        k->max = larger(inner, k->max);
    }
    if ((what & COUNTING) && !(what & SKIPPING))
        k->count += (dvec)((dvec_bits)splat_d(1) & counts & ~number);
    if (what & SKIPPING)
        counts &= number;
    if ((what & COUNTING) && (what & SKIPPING))
        k->count += (dvec)((dvec_bits)(what & WEIGHING ? weight : splat_d(1)) & counts);
    if (n < DLANES || (what & (WEIGHING | SKIPPING)))
        d = (dvec)((dvec_bits)d & counts);
    const dvec wd = what & WEIGHING ? weight * d : d;
    *sum += wd;
    *square += wd * d;
}

/* ---- runs ---- */

/* Elements begin to end of a run. */
INLINE void LOOP(count_piece)(const elem *x, ptrdiff_t begin, ptrdiff_t end, dvec shift, const double *w,
                              LOOP(sums) *s, LOOP(count) *k, const int what)
{
    ptrdiff_t i = begin;
    for (; OFTEN(i + UNROLL * DLANES <= end); i += UNROLL * DLANES)
        UNROLLED for (int u = 0; u < UNROLL; u++)
            LOOP(count_some)(x, i + u * DLANES, DLANES, shift,
                             what & WEIGHING ? LOOP(weights)(w, i + u * DLANES, DLANES) : shift, &s->sum[u],
                             &s->square[u], &k[u % 2], what);
    for (; i + DLANES <= end; i += DLANES)
        LOOP(count_some)(x, i, DLANES, shift, what & WEIGHING ? LOOP(weights)(w, i, DLANES) : shift, &s->sum[0],
                         &s->square[0], &k[0], what);
    if (i < end)
        LOOP(count_some)(x, i, end - i, shift, what & WEIGHING ? LOOP(weights)(w, i, end - i) : shift, &s->sum[1],
                         &s->square[1], &k[1], what);
}

INLINE void LOOP(store_count)(const cbn_tile *r, ptrdiff_t c, const LOOP(count) *k)
{
    const dvec min = widened(smaller(k[0].min, k[1].min)), max = widened(larger(k[0].max, k[1].max));
    double least = INFINITY, largest = -INFINITY;
    for (ptrdiff_t i = 0; i < DLANES; i++) {
        least = MIN(min[i], least);
        largest = MAX(max[i], largest);
    }
    double *count_c = r->count_c + c;
    count_c[CBN_COUNT * r->pitch] = total(k[0].count + k[1].count);
    count_c[CBN_MIN * r->pitch] = least;
    count_c[CBN_MAX * r->pitch] = largest;
}

INLINE void LOOP(count_runs)(const cbn_tile *r, const int what)
{
    const ptrdiff_t length = r->length, n_runs = r->n_runs;
    const int flushing = n_runs * length > FLUSH;
    LOOP(sums) sums[GROUP]; /* those that wait for the next run of their channel */
    LOOP(totals) totals[GROUP];
    LOOP(count) counts[GROUP][2];
    for (ptrdiff_t first = 0; first < r->n_channels; first += GROUP) {
        const ptrdiff_t last = MIN(first + GROUP, r->n_channels);
        for (ptrdiff_t n = 0; n < n_runs; n++)
            for (ptrdiff_t c = first; c < last; c++) {
                const LOOP(place) at = {n, c, first, last};
                const elem *x = AT(r->x, n, c), *next = LOOP(next_run)(r->x, at);
                const double *w = what & WEIGHING ? (const double *)r->w.data + n * r->w.n + c * r->w.c : NULL;
                const dvec shift = splat_d(r->shift_c[c]);
                const ptrdiff_t distance = LOOP(run_distance)(r, 0, 0);
                ptrdiff_t next_flush = flushing ? FLUSH - n * length % FLUSH : PTRDIFF_MAX;
                LOOP(sums) s;
                LOOP(count) k[2] = {LOOP(no_count)(), LOOP(no_count)()};
                LOOP(begin_sums)(&s, &sums[c - first], n);
                if (n == 0)
                    totals[c - first] = (LOOP(totals)){{0}, {0}, {0}, {0}, {0}, {0}};
                else
                    k[0] = counts[c - first][0], k[1] = counts[c - first][1];
                for (ptrdiff_t i = 0; i < length;) {
                    /* A loop of its own, else the compiler keeps the sums in memory */
                    for (const ptrdiff_t stop = MIN(length, next_flush); i < stop; i += PIECE) {
                        if (distance)
                            LOOP(fetch_piece)(x, next, i, distance, length);
                        LOOP(count_piece)(x, i, MIN(i + PIECE, length), shift, w, &s, k, what);
                    }
                    if (MIN(i, length) >= next_flush) {
                        LOOP(flush)(&s, &totals[c - first], (n * length + next_flush) % (PARTS * FLUSH) == 0, NULL);
                        next_flush += FLUSH;
                    }
                }
                counts[c - first][0] = k[0], counts[c - first][1] = k[1];
                LOOP(end_reduction)(r, c, &s, &sums[c - first], &totals[c - first], n < n_runs - 1, flushing);
                if (n == n_runs - 1)
                    LOOP(store_count)(r, c, counts[c - first]);
            }
    }
}

/* ---- rows ---- */

/* The same of each column. */
typedef struct {
    LOOP(columns) sums;
    double count[ROOM], weight[ROOM];
    real min[ROOM], max[ROOM];
} LOOP(counted_columns);

/* Columns from the j-th on, `vectors` of them or a part of one, of some rows. Their weights are w, if each row has one,
 * else k->weight. */
INLINE void LOOP(count_columns)(LOOP(counted_columns) *k, const elem *x, ptrdiff_t step, ptrdiff_t height, ptrdiff_t j,
                                ptrdiff_t end, ptrdiff_t ahead, LOOP(turn) turn, const double *w, const int what,
                                const int vectors)
{
    dvec shift[LINE_ELEMS / DLANES], sum[LINE_ELEMS / DLANES], square[LINE_ELEMS / DLANES];
    LOOP(count) count[LINE_ELEMS / DLANES];
    UNROLLED for (int v = 0; v < vectors; v++) {
        const ptrdiff_t at = j + v * DLANES;
        shift[v] = load_double(k->sums.shift + at);
        LOOP(load_sums)(&k->sums, at, turn, &sum[v], &square[v]);
        if (what & COUNTING)
            count[v].count = load_double(k->count + at);
        if (what & EXTREMES) {
            memcpy(&count[v].min, k->min + at, sizeof count[v].min);
            memcpy(&count[v].max, k->max + at, sizeof count[v].max);
        }
    }
    for (ptrdiff_t row = 0; row < height; row++, x += step) {
        if (vectors > 1)
            FETCH(x + j + ahead);
        UNROLLED for (int v = 0; v < vectors; v++) {
            const ptrdiff_t n = vectors > 1 ? DLANES : MIN(end - j, DLANES);
            dvec weight = shift[v];
            if (what & WEIGHING) {
                weight = w ? splat_d(w[row]) : load_double(k->weight + j + v * DLANES);
                if (n < DLANES)
                    weight = first_lanes(weight, n);
            }
            LOOP(count_some)(x, j + v * DLANES, n, shift[v], weight, &sum[v], &square[v], &count[v], what);
        }
    }
    UNROLLED for (int v = 0; v < vectors; v++) {
        const ptrdiff_t at = j + v * DLANES;
        LOOP(store_sums)(&k->sums, at, turn, sum[v], square[v]);
        if (what & COUNTING)
            store_double(k->count + at, count[v].count);
        if (what & EXTREMES) {
            memcpy(k->min + at, &count[v].min, sizeof count[v].min);
            memcpy(k->max + at, &count[v].max, sizeof count[v].max);
        }
    }
}

/* The weight of each column of row n. */
INLINE void LOOP(weights_of_row)(const cbn_tile *r, ptrdiff_t n, double *weight)
{
    if (r->selection) {
        const int8_t *mask = LOOP(counting_of)(r, n, 0).mask;
        const double w = ((const double *)r->w.data)[n];
        for (ptrdiff_t c = 0; c < r->n_channels; c++)
            weight[c] = mask[c] ? w : 0;
        return;
    }
    for (ptrdiff_t copy = 0; copy < r->copies; copy++) {
        const double *w = (const double *)r->w.data + (n * r->copies + copy) * r->w.n;
        if (r->w.c == 0 && r->length == 1) {
            /* By vectors, which may begin the next copy: it comes after */
            for (ptrdiff_t c = 0; c < r->n_channels; c += DLANES)
                store_double(weight + c, splat_d(*w));
            weight += r->n_channels;
            continue;
        }
        for (ptrdiff_t c = 0; c < r->n_channels; c++, w += r->w.c, weight += r->length)
            for (ptrdiff_t i = 0; i < r->length; i++)
                weight[i] = w[i];
    }
}

/* The smallest of each channel, of the smallest of its columns, which are used up; or the largest. */
INLINE void LOOP(fold_extremes)(const cbn_tile *r, real *restrict column, double *of_channel, const int largest)
{
    const ptrdiff_t width = r->n_channels * r->length;
    for (ptrdiff_t copy = 1; copy < r->copies; copy++) {
        const real *restrict other = column + copy * width;
        for (ptrdiff_t i = 0; i < width; i++)
            column[i] = largest ? MAX(other[i], column[i]) : MIN(other[i], column[i]);
    }
    for (ptrdiff_t c = 0; c < r->n_channels; c++, column += r->length) {
        real v = *column;
        for (ptrdiff_t i = 1; i < r->length; i++)
            v = largest ? MAX(column[i], v) : MIN(column[i], v);
        of_channel[c] = v;
    }
}

INLINE void LOOP(count_rows)(const cbn_tile *r, const int what)
{
    const ptrdiff_t columns = r->copies * r->n_channels * r->length, all_rows = FLUSH_ROWS;
    /* Whether each row has one weight, one behind the other */
    const int of_rows = what & WEIGHING && r->copies == 1 && r->length == 1 && r->w.c == 0 && r->w.n == 1 &&
                        !(r->selection && r->selection->mask.data);
    const ptrdiff_t rows = what & WEIGHING && !of_rows ? 1 : all_rows;
    const LOOP(activation) plain = {.kind = PLAIN};
    LOOP(counted_columns) k __attribute__((aligned(CACHE_LINE)));
    LOOP(begin_reduce_rows)(&k.sums, r, columns, plain, 0);
    for (ptrdiff_t j = 0; (what & (COUNTING | EXTREMES)) && j < columns + LINE_ELEMS; j++) {
        k.count[j] = 0;
        k.min[j] = (real)INFINITY;
        k.max[j] = (real)-INFINITY;
    }
    ptrdiff_t height = 0;
    for (ptrdiff_t n = 0; n < r->n_runs; n += height) {
        height = MIN(rows, r->n_runs - n);
        const elem *x = AT(r->x, n, 0);
        const LOOP(turn) turn = LOOP(turn_of)(n, height, r->n_runs, 1);
        const ptrdiff_t ahead = LOOP(row_distance)(r, n, rows, r->n_runs, columns).x;
        const double *w = of_rows ? (const double *)r->w.data + n : NULL;
        if (what & WEIGHING && !of_rows)
            LOOP(weights_of_row)(r, n, k.weight);
        ptrdiff_t j = 0;
        for (; j + LINE_ELEMS <= columns; j += LINE_ELEMS)
            if (height == all_rows)
                LOOP(count_columns)(&k, x, r->x.n, all_rows, j, columns, ahead, turn, w, what, LINE_ELEMS / DLANES);
            else
                LOOP(count_columns)(&k, x, r->x.n, height, j, columns, ahead, turn, w, what, LINE_ELEMS / DLANES);
        for (; j < columns; j += DLANES)
            LOOP(count_columns)(&k, x, r->x.n, height, j, columns, 0, turn, w, what, 1);
    }
    LOOP(end_reduce_rows)(&k.sums, r, columns, 1, 1);
    if (what & COUNTING)
        LOOP(fold)(r, k.count, r->count_c + CBN_COUNT * r->pitch);
    if (what & EXTREMES) {
        LOOP(fold_extremes)(r, k.min, r->count_c + CBN_MIN * r->pitch, 0);
        LOOP(fold_extremes)(r, k.max, r->count_c + CBN_MAX * r->pitch, 1);
    }
}

#define COUNT(layout)                                                                                              \
    TARGET static __attribute__((noinline)) void LOOP(count_##layout##_of)(const cbn_tile *r)                      \
    {                                                                                                              \
        if (r->w.data && r->skipna)                                                                                \
            LOOP(count_##layout)(r, COUNTING | EXTREMES | SKIPPING | WEIGHING);                                    \
        else if (r->w.data && !r->extremes)                                                                        \
            LOOP(count_##layout)(r, WEIGHING);                                                                     \
        else if (r->w.data)                                                                                        \
            LOOP(count_##layout)(r, COUNTING | EXTREMES | WEIGHING);                                               \
        else if (r->skipna && r->extremes)                                                                         \
            LOOP(count_##layout)(r, COUNTING | EXTREMES | SKIPPING);                                               \
        else if (r->skipna)                                                                                        \
            LOOP(count_##layout)(r, COUNTING | SKIPPING);                                                          \
        else                                                                                                       \
            LOOP(count_##layout)(r, EXTREMES);                                                                     \
    }
COUNT(runs)
COUNT(rows)
#undef COUNT
#endif
