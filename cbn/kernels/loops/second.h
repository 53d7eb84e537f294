/* second.h: second derivatives: the sums that they need, and the elements that these sums make.
 *
 * Of three arrays: x, g = dy, and z, which is ggI (the gradient of dx) or the tangent of x.
 *
 *   reduction  S(g'), S(z'), S(g'*z'), S(g'*d), S(z'*d)     d = x - mean, g' = g - g0, z' = z - z0
 *   apply      y  = (z - zmean)*scale + ((x - mean)*slope + offset)
 *              dh = (z - zmean)*of_z + ((g - gmean)*slope + ((x - mean)*of_x + term))
 *
 * y is the gradient of dy, or the tangent of y. dh is the gradient of x, which forward mode does not have. g0 and z0 are
 * near the channel's values, so that the covariance of g and z, S(g'*z') - S(g')*S(z')/n, loses no digits where both are large
 * beside their spread. Nor does S(g*d), which is S(g'*d), since S(d) is 0 but for the rounding of the mean.
 *
 * All arithmetic is float64, whatever the elements are: memory leaves the time for it, and no product of three arrays
 * leaves its range. A sum of products has one order, so that where the compiler fuses a multiplication and an addition
 * the bits of an element do not depend on its place.
 */
#if SUMS

/* Where the inputs are, and the elements from row to row. Copied out of the tile: the compiler assumes that any store
 * may have changed what is behind a pointer. */
typedef struct {
    const elem *x, *g, *z;
    ptrdiff_t x_n, g_n, z_n;
} LOOP(three);

INLINE LOOP(three) LOOP(three_at)(const cbn_tile *t, ptrdiff_t n, ptrdiff_t c)
{
    return (LOOP(three)){AT(t->x, n, c), AT(t->g, n, c), AT(t->z, n, c), t->x.n, t->g.n, t->z.n};
}

INLINE void LOOP(next_row)(LOOP(three) *p)
{
    p->x += p->x_n;
    p->g += p->g_n;
    p->z += p->z_n;
}

/* Those `rows` rows below. */
INLINE void LOOP(fetch_three)(LOOP(three) p, ptrdiff_t j, const ptrdiff_t rows)
{
    FETCH(p.x + rows * p.x_n + j);
    FETCH(p.g + rows * p.g_n + j);
    FETCH(p.z + rows * p.z_n + j);
}

/* n elements from p on. */
INLINE dvec LOOP(load_some)(const elem *p, ptrdiff_t n)
{
    return n == DLANES ? load_d(p) : load_first_d(p, n);
}

/* ---- reduction ---- */

/* n elements from the i-th on. */
INLINE void LOOP(add_second)(LOOP(three) p, ptrdiff_t i, ptrdiff_t n, const dvec *shift, dvec *sum)
{
    dvec d = LOOP(load_some)(p.x + i, n) - shift[CBN_SHIFT_MEAN];
    dvec g = LOOP(load_some)(p.g + i, n) - shift[CBN_SHIFT_G], z = LOOP(load_some)(p.z + i, n) - shift[CBN_SHIFT_Z];
    if (n < DLANES) {
        d = first_lanes(d, n);
        g = first_lanes(g, n);
        z = first_lanes(z, n);
    }
    sum[CBN_SUM_G] += g;
    sum[CBN_SUM_Z] += z;
    sum[CBN_SUM_GZ] += g * z;
    sum[CBN_SUM_GD] += g * d;
    sum[CBN_SUM_ZD] += z * d;
}

/* Elements begin to end of a run, to either of two sums. */
INLINE void LOOP(reduce_second_piece)(LOOP(three) p, ptrdiff_t begin, ptrdiff_t end, const dvec *shift,
                                      dvec (*sum)[CBN_SECOND_SUMS])
{
    ptrdiff_t i = begin;
    for (; i + 2 * DLANES <= end; i += 2 * DLANES)
        UNROLLED for (int u = 0; u < 2; u++)
            LOOP(add_second)(p, i + u * DLANES, DLANES, shift, sum[u]);
    for (; i + DLANES <= end; i += DLANES)
        LOOP(add_second)(p, i, DLANES, shift, sum[0]);
    if (i < end)
        LOOP(add_second)(p, i, end - i, shift, sum[1]);
}

INLINE void LOOP(reduce_second_runs)(const cbn_tile *r)
{
    const ptrdiff_t length = r->length, n_runs = r->n_runs, distance = r->prefetch ? AHEAD : 0;
    for (ptrdiff_t c = 0; c < r->n_channels; c++) {
        LOOP(three) p = LOOP(three_at)(r, 0, c);
        dvec shift[CBN_SECOND_SHIFTS], sum[2][CBN_SECOND_SUMS] = {{{0}}};
        for (int k = 0; k < CBN_SECOND_SHIFTS; k++)
            shift[k] = splat_d(r->shift_c[k * r->pitch + c]);
        for (ptrdiff_t n = 0; n < n_runs; n++) {
            LOOP(three) next = p;
            LOOP(next_row)(&next);
            if (n == n_runs - 1)
                next = LOOP(three_at)(r, 0, c + 1);
            for (ptrdiff_t i = 0; i < length; i += PIECE) {
                if (distance && i + PIECE <= length) {
                    LOOP(fetch_piece)(p.x, next.x, i, distance, length);
                    LOOP(fetch_piece)(p.g, next.g, i, distance, length);
                    LOOP(fetch_piece)(p.z, next.z, i, distance, length);
                }
                LOOP(reduce_second_piece)(p, i, MIN(i + PIECE, length), shift, sum);
            }
            p = next;
        }
        for (int k = 0; k < CBN_SECOND_SUMS; k++)
            r->sum_c[k * r->pitch + c] = total(sum[0][k] + sum[1][k]);
    }
}

/* What each column subtracts, and its sums. */
typedef struct {
    double shifts[CBN_SECOND_SHIFTS][ROOM], sums[CBN_SECOND_SUMS][ROOM];
} LOOP(second_columns);

/* Two vectors of columns from the j-th on, or n < DLANES columns, of some rows. Two, so that a cache line is read while
 * it is in L1: rows are often 4 KB apart, and those of three arrays do not fit the same sets. */
INLINE void LOOP(reduce_second_columns)(LOOP(second_columns) *k, LOOP(three) p, ptrdiff_t height, ptrdiff_t j,
                                        ptrdiff_t n, const int vectors, const int fetching)
{
    dvec shift[2][CBN_SECOND_SHIFTS], sum[2][CBN_SECOND_SUMS];
    UNROLLED for (int v = 0; v < vectors; v++) {
        for (int i = 0; i < CBN_SECOND_SHIFTS; i++)
            shift[v][i] = load_double(k->shifts[i] + j + v * DLANES);
        for (int i = 0; i < CBN_SECOND_SUMS; i++)
            sum[v][i] = load_double(k->sums[i] + j + v * DLANES);
    }
    for (ptrdiff_t row = 0; row < height; row++, LOOP(next_row)(&p)) {
        if (fetching)
            LOOP(fetch_three)(p, j, ROWS);
        UNROLLED for (int v = 0; v < vectors; v++)
            LOOP(add_second)(p, j + v * DLANES, n, shift[v], sum[v]);
    }
    UNROLLED for (int v = 0; v < vectors; v++)
        for (int i = 0; i < CBN_SECOND_SUMS; i++)
            store_double(k->sums[i] + j + v * DLANES, sum[v][i]);
}

INLINE void LOOP(reduce_second_rows)(const cbn_tile *r)
{
    const ptrdiff_t columns = r->copies * r->n_channels * r->length, n_runs = r->n_runs;
    LOOP(second_columns) k __attribute__((aligned(CACHE_LINE)));
    for (int i = 0; i < CBN_SECOND_SHIFTS; i++)
        LOOP(spread)(r, r->shift_c + i * r->pitch, k.shifts[i]);
    for (int i = 0; i < CBN_SECOND_SUMS; i++)
        memset(k.sums[i], 0, (size_t)(columns + DLANES) * sizeof(double));
    for (ptrdiff_t n = 0; n < n_runs; n += ROWS) {
        const LOOP(three) p = LOOP(three_at)(r, n, 0);
        const ptrdiff_t height = MIN(ROWS, n_runs - n);
        const int fetching = r->prefetch && n + 2 * ROWS <= n_runs;
        ptrdiff_t j = 0;
        for (; j + 2 * DLANES <= columns; j += 2 * DLANES)
            if (fetching && (LINE_ELEMS <= 2 * DLANES || j % LINE_ELEMS == 0))
                LOOP(reduce_second_columns)(&k, p, ROWS, j, DLANES, 2, 1);
            else
                LOOP(reduce_second_columns)(&k, p, height, j, DLANES, 2, 0);
        for (; j < columns; j += DLANES)
            if (j + DLANES <= columns)
                LOOP(reduce_second_columns)(&k, p, height, j, DLANES, 1, 0);
            else
                LOOP(reduce_second_columns)(&k, p, height, j, columns - j, 1, 0);
    }
    for (int i = 0; i < CBN_SECOND_SUMS; i++)
        LOOP(fold)(r, k.sums[i], r->sum_c + i * r->pitch);
}

/* ---- apply ---- */

/* Elements of both outputs, rounded to the arithmetic of other loops. */
typedef struct {
    rvec y, dh;
} LOOP(both_r);

typedef struct {
    vec y, dh;
} LOOP(both_v);

/* n <= DLANES elements from the i-th on; `both`: of dh too. */
INLINE LOOP(both_r) LOOP(apply_second)(LOOP(three) p, ptrdiff_t i, ptrdiff_t n, const dvec *f, const int both)
{
    const dvec d = LOOP(load_some)(p.x + i, n) - f[CBN_2_MEAN], z = LOOP(load_some)(p.z + i, n) - f[CBN_2_ZMEAN];
    LOOP(both_r) out = {narrowed(z * f[CBN_2_SCALE] + (d * f[CBN_2_SLOPE] + f[CBN_2_OFFSET])), {0}};
    if (both) {
        const dvec g = LOOP(load_some)(p.g + i, n) - f[CBN_2_GMEAN];
        out.dh = narrowed(z * f[CBN_2_OF_Z] + (g * f[CBN_2_SLOPE] + (d * f[CBN_2_OF_X] + f[CBN_2_TERM])));
    }
    return out;
}

/* n <= LANES elements, with the factors `low` of the first half of a vector and `high` of the second. */
INLINE LOOP(both_v) LOOP(apply_vector)(LOOP(three) p, ptrdiff_t i, ptrdiff_t n, const dvec *low, const dvec *high,
                                       const int both)
{
    const LOOP(both_r) a = LOOP(apply_second)(p, i, MIN(n, DLANES), low, both);
    LOOP(both_r) b = {{0}, {0}};
    if (n > DLANES)
        b = LOOP(apply_second)(p, i + DLANES, n - DLANES, high, both);
    return (LOOP(both_v)){joined(a.y, b.y), joined(a.dh, b.dh)};
}

/* The first n lanes of the outputs, where they belong; past the caches if `nontemporal`. */
INLINE void LOOP(store_both)(elem *y, elem *dh, LOOP(both_v) v, ptrdiff_t n, const int both, const int nontemporal)
{
    if (n < LANES) {
        store_part(y, v.y, 0, n);
        if (both)
            store_part(dh, v.dh, 0, n);
    } else if (nontemporal) {
        store_nontemporal(y, v.y);
        if (both)
            store_nontemporal(dh, v.dh);
    } else {
        store(y, v.y);
        if (both)
            store(dh, v.dh);
    }
}

/* Whether whole cache lines of both outputs can go past the caches: lines of both begin at the same elements, and so do
 * those of all rows. */
INLINE int LOOP(passes_caches)(const cbn_tile *m, const int both, const int rows)
{
    const int alike = !both || (TO_LINE(m->dh.data) == TO_LINE(m->y.data) && m->dh.n == m->y.n && m->dh.c == m->y.c);
    return m->nontemporal && alike && (!rows || m->y.n * (ptrdiff_t)sizeof(elem) % CACHE_LINE == 0);
}

/* Elements begin to end of a run. */
INLINE void LOOP(apply_second_piece)(LOOP(three) p, ptrdiff_t begin, ptrdiff_t end, const dvec *f, elem *y, elem *dh,
                                     const int both, const int nontemporal)
{
    ptrdiff_t i = begin;
    for (; i + LANES <= end; i += LANES)
        LOOP(store_both)(y + i, both ? dh + i : dh, LOOP(apply_vector)(p, i, LANES, f, f, both), LANES, both,
                         nontemporal);
    if (i < end)
        LOOP(store_both)(y + i, both ? dh + i : dh, LOOP(apply_vector)(p, i, end - i, f, f, both), end - i, both, 0);
}

INLINE void LOOP(apply_second_runs)(const cbn_tile *m, const int both)
{
    const ptrdiff_t length = m->length;
    const int nontemporal = LOOP(passes_caches)(m, both, 0), n_factors = both ? CBN_2_ROWS : CBN_2_GMEAN;
    for (ptrdiff_t n = 0; n < m->n_runs; n++)
        for (ptrdiff_t c = 0; c < m->n_channels; c++) {
            const LOOP(three) p = LOOP(three_at)(m, n, c);
            elem *y = AT(m->y, n, c), *dh = both ? AT(m->dh, n, c) : NULL;
            const ptrdiff_t head = nontemporal ? MIN(TO_LINE(y), length) : 0;
            const ptrdiff_t whole = nontemporal ? head + (length - head) / LINE_ELEMS * LINE_ELEMS : 0;
            dvec f[CBN_2_ROWS];
            for (int k = 0; k < n_factors; k++)
                f[k] = splat_d(m->coef_c[k * m->pitch + c]);
            if (nontemporal) {
                LOOP(apply_second_piece)(p, 0, head, f, y, dh, both, 0);
                LOOP(apply_second_piece)(p, head, whole, f, y, dh, both, 1);
            }
            LOOP(apply_second_piece)(p, whole, length, f, y, dh, both, 0);
        }
}

/* Where a row of the outputs begins, and the elements to the next one. */
typedef struct {
    elem *y, *dh;
    ptrdiff_t y_n, dh_n;
} LOOP(outputs);

/* n <= DLANES columns of a row from the j-th on. */
INLINE LOOP(both_r) LOOP(apply_columns_of)(LOOP(three) p, ptrdiff_t j, ptrdiff_t n, const double (*factors)[ROOM],
                                           const int both)
{
    dvec f[CBN_2_ROWS];
    for (int k = 0; k < (both ? CBN_2_ROWS : CBN_2_GMEAN); k++)
        f[k] = load_double(factors[k] + j);
    return LOOP(apply_second)(p, j, n, f, both);
}

/* n <= LANES of them. */
INLINE LOOP(both_v) LOOP(apply_vector_of)(LOOP(three) p, ptrdiff_t j, ptrdiff_t n, const double (*factors)[ROOM],
                                          const int both)
{
    const LOOP(both_r) low = LOOP(apply_columns_of)(p, j, MIN(n, DLANES), factors, both);
    LOOP(both_r) high = {{0}, {0}};
    if (n > DLANES)
        high = LOOP(apply_columns_of)(p, j + DLANES, n - DLANES, factors, both);
    return (LOOP(both_v)){joined(low.y, high.y), joined(low.dh, high.dh)};
}

/* A cache line of columns of some rows. All rows are loaded, then stored: with rows 4 KB apart a load would wait for
 * the store to another row. */
INLINE void LOOP(apply_second_line)(LOOP(three) p, LOOP(outputs) to, const ptrdiff_t rows, ptrdiff_t j,
                                    const double (*factors)[ROOM], const int both, const int nontemporal,
                                    const int fetching)
{
    LOOP(both_v) out[ROWS][LINE_ELEMS / LANES];
    UNROLLED for (ptrdiff_t row = 0; row < rows; row++) {
        if (fetching)
            LOOP(fetch_three)(p, j, ROWS);
        UNROLLED for (int v = 0; v < LINE_ELEMS / LANES; v++)
            out[row][v] = LOOP(apply_vector_of)(p, j + v * LANES, LANES, factors, both);
        LOOP(next_row)(&p);
    }
    UNROLLED for (ptrdiff_t row = 0; row < rows; row++) {
        elem *y = to.y + row * to.y_n + j, *dh = both ? to.dh + row * to.dh_n + j : NULL;
        UNROLLED for (int v = 0; v < LINE_ELEMS / LANES; v++)
            LOOP(store_both)(y + v * LANES, both ? dh + v * LANES : dh, out[row][v], LANES, both, nontemporal);
    }
}

/* The same of the last rows, one by one. */
INLINE void LOOP(apply_second_rest)(LOOP(three) p, LOOP(outputs) to, ptrdiff_t height, ptrdiff_t j,
                                    const double (*factors)[ROOM], const int both, const int nontemporal)
{
    for (ptrdiff_t row = 0; row < height; row++, LOOP(next_row)(&p), to.y += to.y_n) {
        LOOP(apply_second_line)(p, to, 1, j, factors, both, nontemporal, 0);
        to.dh = both ? to.dh + to.dh_n : NULL;
    }
}

/* Columns begin to end of some rows, less than a cache line. */
INLINE void LOOP(apply_second_part)(LOOP(three) p, LOOP(outputs) to, ptrdiff_t height, ptrdiff_t begin, ptrdiff_t end,
                                    const double (*factors)[ROOM], const int both)
{
    for (ptrdiff_t row = 0; row < height; row++, LOOP(next_row)(&p))
        for (ptrdiff_t j = begin; j < end; j += LANES) {
            const ptrdiff_t n = MIN(end - j, LANES);
            const LOOP(both_v) v = LOOP(apply_vector_of)(p, j, n, factors, both);
            LOOP(store_both)(to.y + row * to.y_n + j, both ? to.dh + row * to.dh_n + j : NULL, v, n, both, 0);
        }
}

INLINE void LOOP(apply_second_rows)(const cbn_tile *m, const int both)
{
    const ptrdiff_t columns = m->copies * m->n_channels * m->length;
    const int nontemporal = LOOP(passes_caches)(m, both, 1);
    const int down = LOOP(downwards)(m, NULL, both);
    const ptrdiff_t head = nontemporal ? MIN(TO_LINE(m->y.data), columns) : 0;
    const ptrdiff_t whole = head + (columns - head) / LINE_ELEMS * LINE_ELEMS;
    double factors[CBN_2_ROWS][ROOM] __attribute__((aligned(CACHE_LINE)));
    for (int k = 0; k < (both ? CBN_2_ROWS : CBN_2_GMEAN); k++)
        LOOP(spread)(m, m->coef_c + k * m->pitch, factors[k]);
    for (ptrdiff_t n = 0; n < m->n_runs; n += ROWS) {
        const LOOP(three) p = LOOP(three_at)(m, n, 0);
        const LOOP(outputs) to = {AT(m->y, n, 0), both ? AT(m->dh, n, 0) : NULL, m->y.n, m->dh.n};
        const ptrdiff_t height = MIN(ROWS, m->n_runs - n);
        const int fetching = m->prefetch && n + 2 * ROWS <= m->n_runs;
        LOOP(apply_second_part)(p, to, height, 0, head, factors, both);
        for (ptrdiff_t k = head; k < whole; k += LINE_ELEMS) {
            const ptrdiff_t j = down ? head + whole - LINE_ELEMS - k : k;
            if (height < ROWS)
                LOOP(apply_second_rest)(p, to, height, j, factors, both, nontemporal);
            else if (nontemporal)
                LOOP(apply_second_line)(p, to, ROWS, j, factors, both, 1, fetching);
            else
                LOOP(apply_second_line)(p, to, ROWS, j, factors, both, 0, fetching);
        }
        LOOP(apply_second_part)(p, to, height, whole, columns, factors, both);
    }
}

/* ---- entries ---- */

#define SECOND_ENTRY(name, body)                                                                                   \
    TARGET static __attribute__((noinline)) void LOOP(name)(const cbn_tile *t)                                     \
    {                                                                                                              \
        body;                                                                                                      \
    }
#define SECOND(layout)                                                                                             \
    SECOND_ENTRY(measure_second_##layout, LOOP(reduce_second_##layout)(t))                                         \
    SECOND_ENTRY(both_of_##layout, LOOP(apply_second_##layout)(t, 1))                                              \
    SECOND_ENTRY(tangent_of_##layout, LOOP(apply_second_##layout)(t, 0))                                           \
    TARGET static void LOOP(second_##layout)(const cbn_tile *m, const cbn_tile *r)                                 \
    {                                                                                                              \
        if (r)                                                                                                     \
            LOOP(measure_second_##layout)(r);                                                                      \
        else if (m->dh.data)                                                                                       \
            LOOP(both_of_##layout)(m);                                                                             \
        else                                                                                                       \
            LOOP(tangent_of_##layout)(m);                                                                          \
        if (m && m->nontemporal)                                                                                   \
            STORE_FENCE();                                                                                         \
    }
SECOND(runs)
SECOND(rows)
#undef SECOND
#undef SECOND_ENTRY
#endif
