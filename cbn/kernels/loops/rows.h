/* rows.h: rows, which are contiguous elements, one of each channel in turn: factors and sums are vectors.
 *
 * A tile is walked a few rows at a time, and these a cache line of columns at a time. What each column needs, a factor
 * or a sum, lies in arrays that L1 holds.
 */
/* ---- apply, a few rows ---- */

/* Columns begin to end of some rows, less than a cache line. */
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

/* Where a row of a tile begins, and the elements to the next one. Copied out of the tile: the compiler assumes that any
 * store may have changed what is behind a pointer. */
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

INLINE void LOOP(store_lines)(elem_out *y, ptrdiff_t step, ptrdiff_t height, vec (*v)[LINE_ELEMS / LANES],
                              const int nontemporal, const int normal)
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

/* A cache line of columns of some rows. */
INLINE void LOOP(apply_line)(LOOP(row_of) at, ptrdiff_t height, ptrdiff_t j, real (*factors)[ROOM],
                           LOOP(activation) act, const int kind, const int backward, const int nontemporal,
                           const int fetching, const int normal)
{
    vec f[LINE_ELEMS / LANES][ALL_FACTORS] = {{{0}}};
    for (int v = 0; v < LINE_ELEMS / LANES; v++)
        for (int i = 0; i < FACTORS(backward); i++)
            f[v][i] = load_real(factors[i] + j + v * LANES);
    /* All rows are loaded, then stored: with rows 4 KB apart a load would wait for the store to another row. */
    vec out[ROWS][LINE_ELEMS / LANES], seen = {0};
    for (ptrdiff_t row = 0; row < height; row++) {
        const elem *x = at.x + row * at.x_n + j, *g = at.g + row * at.g_n + j;
        const elem_out *z = at.z ? at.z + row * at.z_n + j : NULL;
        if (fetching)
            LOOP(fetch_row)(x, at.x_n, backward ? g : NULL, at.g_n, z, at.z_n,
                            nontemporal ? NULL : at.y + row * at.y_n + j, at.y_n);
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

/* ---- apply, a tile ---- */

/* Whether columns are better taken from the last to the first. A load waits for every earlier store that is not done
 * and has the same offset in its page, as if it were to the same address (4 KB aliasing). Rows are often whole pages
 * apart, and two arrays that have been allocated one after the other 16 bytes off: with stores of four rows 16 bytes
 * ahead of the loads, apply took 2.5 times as long (Zen 4). Stores that keep behind the loads delay nothing. */
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

/* Whether a row may end with the head of the next one, as nothing lies between them. Otherwise the cache line that
 * they share would be stored in two parts, each of which reads it from memory first. The last row is then one of its
 * own. */
INLINE int LOOP(wraps)(const cbn_tile *m, ptrdiff_t columns, const int backward)
{
    return !m->selection && m->skip == 0 && columns % LINE_ELEMS == 0 && m->y.n == columns && m->x.n == columns &&
           (!backward || m->g.n == columns) && (!m->z.data || m->z.n == columns);
}

/* What is applied to a tile, and how. */
typedef struct {
    LOOP(activation) act;
    real (*factors)[ROOM];
    ptrdiff_t columns, skip, head; /* whole cache lines begin at `head` */
    int nontemporal, fetching, normal, wraps;
    double weight; /* of the rows that the factors are for (masked.h) */
} LOOP(apply_rows);

/* The factors of all columns, for rows of this weight (masked.h). */
INLINE void LOOP(set_factors)(LOOP(apply_rows) *a, const cbn_tile *m, double weight, const int backward)
{
    LOOP(factors)(m->coef_c, m->pitch, m->n_channels, a->factors[0], ROOM, weight, backward);
    a->normal = 1;
    a->weight = weight;
    for (ptrdiff_t c = 0; c < m->n_channels; c++)
        a->normal &= LOOP(stays_normal)(m, a->factors[TERM][c], a->act, backward);
    for (int i = 0; i < FACTORS(backward); i++) {
        SPREAD(m, a->factors[i]);
        if (a->wraps)
            memcpy(a->factors[i] + a->columns, a->factors[i], (size_t)a->head * sizeof(real));
    }
}

/* What does not depend on coefficients; factors will be in `room`. */
INLINE void LOOP(begin_apply_rows)(LOOP(apply_rows) *a, const cbn_tile *m, real (*room)[ROOM], const int backward,
                                   const int reducing, const ptrdiff_t rows)
{
    a->nontemporal = m->nontemporal;
    a->fetching = m->prefetch && !reducing;
    a->columns = m->copies * m->n_channels * m->length - m->drop;
    a->skip = a->head = m->skip;
    if (RARE)
        a->head = a->columns;
    else if (a->nontemporal || a->columns >= LONG)
        a->head = MIN(a->skip + TO_LINE((elem_out *)m->y.data + a->skip), a->columns);
    /* A vector of factors is aligned where a cache line of y begins */
    a->factors = (void *)(room[0] + (-a->head & (LINE_ELEMS - 1)));
    a->wraps = a->nontemporal && !reducing && !RARE && rows > 1 && LOOP(wraps)(m, a->columns, backward);
}

/* A cache line of columns, or what is left of one, of the `height` rows from the n-th on; `at` is the first of them. */
INLINE void LOOP(apply_columns)(const LOOP(apply_rows) *a, const cbn_tile *m, LOOP(row_of) at, ptrdiff_t n,
                                ptrdiff_t height, ptrdiff_t j, ptrdiff_t end, const int bare, const int backward,
                                const ptrdiff_t rows)
{
    const LOOP(activation) act = a->act;
    real(*factors)[ROOM] = a->factors;
    const int nontemporal = a->nontemporal, fetching = a->fetching, normal = a->normal;
    if (RARE || j + LINE_ELEMS > end) {
        if (j < end)
            LOOP(apply_part)(m, n, height, j, end, factors, act, backward);
        return;
    }
    if (bare)
        at.z = NULL;
    /* A body each: the bare one has no branches */
    if (height == rows && bare)
        LOOP(apply_line)(at, rows, j, factors, act, PLAIN, backward, nontemporal, fetching, normal);
    else if (height == rows && !backward && act.kind == ACTIVATED)
        LOOP(apply_line)(at, rows, j, factors, act, ACTIVATED, backward, nontemporal, fetching, normal);
    else if (height == rows)
        LOOP(apply_line)(at, rows, j, factors, act, CHECKED, backward, nontemporal, fetching, normal);
    else if (bare)
        for (ptrdiff_t row = n; row < n + height; row++) {
            LOOP(apply_line)(at, 1, j, factors, act, PLAIN, backward, nontemporal, 0, normal);
            at.x += at.x_n;
            at.g += at.g_n;
            at.y += at.y_n;
        }
    else
        for (ptrdiff_t row = n; row < n + height; row++)
            LOOP(apply_line)(LOOP(row_at)(m, row), 1, j, factors, act, act.kind, backward, nontemporal, 0, normal);
}

/* Whole cache lines of some rows that are as far apart in all arrays, for arrays that stay in the caches. Row after row,
 * as factors are in L1, and lines of three arrays from rows 4 KB apart would not all fit the same sets of it; and with
 * one distance, as the compiler has few registers for more. */
INLINE void LOOP(apply_across)(LOOP(row_of) at, ptrdiff_t height, ptrdiff_t begin, ptrdiff_t end,
                               real (*factors)[ROOM], const int backward)
{
    for (ptrdiff_t row = 0; row < height; row++) {
        const elem *x = at.x + row * at.y_n, *g = at.g + row * at.y_n;
        elem_out *y = at.y + row * at.y_n;
        for (ptrdiff_t j = begin; j < end; j += LINE_ELEMS) {
            vec out[LINE_ELEMS / LANES], f[ALL_FACTORS] = {{0}}, seen;
            UNROLLED for (int v = 0; v < LINE_ELEMS / LANES; v++) {
                for (int i = 0; i < FACTORS(backward); i++)
                    f[i] = load_real(factors[i] + j + v * LANES);
                out[v] = LOOP(before)(x, g, NULL, j + v * LANES, 0, LANES, f, PLAIN, backward, &seen);
            }
            UNROLLED for (int v = 0; v < LINE_ELEMS / LANES; v++)
                store(y + j + v * LANES, out[v]);
        }
    }
}

/* ---- where not every value counts ---- */

/* How many rows from the n-th on go together: they have weight 0; or, of these `rows` at most, others, which are one if
 * they have to be the `same`. Those of weight 0 may be `between`. */
INLINE ptrdiff_t LOOP(rows_alike)(const cbn_tile *t, ptrdiff_t n, ptrdiff_t rows, const int same, const int between,
                                  double *weight)
{
    const double *w = t->selection->weight_n + t->run + n;
    const ptrdiff_t left = t->n_runs - n, most = w[0] == 0 ? left : MIN(rows, left);
    ptrdiff_t height = 1;
    *weight = w[0];
    if (between && left >= rows) { /* no branch for each row: where masks are random, none is foreseen */
        double largest = 0;
        int alike = 1;
        for (ptrdiff_t i = 0; i < rows; i++)
            largest = MAX(largest, w[i]);
        for (ptrdiff_t i = 0; i < rows; i++)
            alike &= (w[i] == 0) | (w[i] == largest) | !same;
        if (largest > 0 && alike) {
            *weight = largest;
            return rows;
        }
    }
    while (height < most && (same ? w[height] == w[0] : (w[height] == 0) == (w[0] == 0)))
        height++;
    return height;
}

/* Columns begin to end of some rows of y. */
INLINE void LOOP(zero_rows)(cbn_view y, ptrdiff_t n, ptrdiff_t height, ptrdiff_t begin, ptrdiff_t end,
                            const int nontemporal)
{
    for (ptrdiff_t row = n; row < n + height; row++) {
        elem_out *p = Y_AT(y, row, 0) + begin;
        const ptrdiff_t n = end - begin, head = nontemporal ? MIN(TO_LINE(p), n) : n;
        const ptrdiff_t whole = head + (n - head) / LINE_ELEMS * LINE_ELEMS;
        LOOP(zero)(p, head);
        for (ptrdiff_t i = head; i < whole; i += LANES)
            store_nontemporal(p + i, (vec){0});
        LOOP(zero)(p + whole, n - whole);
    }
}

/* Zeros in what does not count of some rows that go together: rows as a whole, or columns of them. */
INLINE void LOOP(zero_between)(const cbn_tile *m, ptrdiff_t n, ptrdiff_t height, ptrdiff_t begin, ptrdiff_t end)
{
    for (ptrdiff_t row = n; row < n + height; row++)
        if (m->selection->weight_n[m->run + row] == 0)
            LOOP(zero_rows)(m->y, row, 1, begin, end, 0);
    for (ptrdiff_t row = n; m->selection->mask.data && row < n + height; row++) {
        const int8_t *mask = LOOP(counting_of)(m, row, 0).mask;
        elem_out *y = Y_AT(m->y, row, 0);
        for (ptrdiff_t j = begin; j < end; j++)
            y[j] = mask[j] ? y[j] : 0;
    }
}

/* Where the n-th row does not count: skips the rows up to the next one that does. Else finds how many, of `rows`, go
 * together, and sets the factors for their weight. */
INLINE int LOOP(skip_rows)(LOOP(apply_rows) *a, const cbn_tile *m, const cbn_tile *r, ptrdiff_t n, ptrdiff_t *height,
                           ptrdiff_t rows, ptrdiff_t columns, const int plain, const int backward, const int applying,
                         const int paged)
{
    double weight;
    *height = LOOP(rows_alike)(applying ? m : r, n, rows, applying && backward, paged, &weight);
    if (weight == 0 && applying)
        LOOP(zero_rows)(m->y, n, *height, a->skip, a->columns, a->nontemporal);
    else if (weight == 0 && !plain && r->activated)
        LOOP(zero_rows)(r->dh, n, *height, 0, columns, 0);
    else if (weight != 0 && applying && backward && weight != a->weight)
        LOOP(set_factors)(a, m, weight, backward);
    return weight == 0;
}

/* Rows of y that lie one behind the other and go past the caches, of which some are zeros: they come into being on a
 * page that L1 holds, and go from there to y by whole cache lines. Where a row ends amid a line, its neighbour would
 * otherwise store the rest of it. The page is small, since reads and writes alternate faster than they queue, and
 * begins with what the last line of the page before had of its own. */
#define PAGE (4096 / (ptrdiff_t)sizeof(elem_out)) /* elements */
typedef struct {
    cbn_tile tile; /* whose y is the page; the rows from `first` to n_runs are on it */
    elem_out *y;
    ptrdiff_t first, columns;
    ptrdiff_t foreign, before; /* elements of the first line: of nobody, of rows before */
    elem_out *room; /* in `space`, where stores keep just behind the loads of x: see `downwards` */
    char space[PAGE * sizeof(elem_out) + CACHE_LINE + 4096] __attribute__((aligned(CACHE_LINE)));
} LOOP(page);

INLINE int LOOP(is_paged)(const cbn_tile *m)
{
    const ptrdiff_t columns = m->copies * m->n_channels * m->length;
    return !BYTE && !RARE && m->selection && m->nontemporal && m->skip == 0 && m->drop == 0 && m->y.n == columns &&
           columns <= PAGE / ROWS;
}

/* Of a tile with so many rows: those that are done go out, and the page is for the next ones. */
INLINE void LOOP(turn_page)(LOOP(page) *p, ptrdiff_t n_runs)
{
    const ptrdiff_t done = p->tile.n_runs, n = p->before + (done - p->first) * p->columns;
    elem_out *y = p->y + p->first * p->columns - p->before; /* where a line begins */
    ptrdiff_t i = 0;
    if (p->foreign && n >= LINE_ELEMS) {
        i = LINE_ELEMS;
        memcpy(y + p->foreign, p->room + p->foreign, (size_t)(i - p->foreign) * sizeof(elem_out));
        p->foreign = 0;
    }
    for (; i + LINE_ELEMS <= n; i += LINE_ELEMS)
        for (ptrdiff_t k = i; k < i + LINE_ELEMS; k += LANES)
            store_nontemporal(y + k, load_out(p->room + k));
    if (done == n_runs)
        memcpy(y + i + p->foreign, p->room + i + p->foreign, (size_t)(n - i - p->foreign) * sizeof(elem_out));
    char rest[CACHE_LINE];
    const uintptr_t x = (uintptr_t)AT(p->tile.x, done, 0);
    memcpy(rest, p->room + i, CACHE_LINE);
    p->room = (elem_out *)(p->space + (x - (uintptr_t)p->space) % 4096 / CACHE_LINE * CACHE_LINE);
    memcpy(p->room, rest, CACHE_LINE);
    p->before = n - i;
    p->first = done;
    p->tile.n_runs = MIN(done + PAGE / p->columns, n_runs);
    p->tile.y.data = (char *)((uintptr_t)(p->room + p->before) - (uintptr_t)(done * p->columns) * sizeof(elem_out));
}

INLINE const cbn_tile *LOOP(open_page)(LOOP(page) *p, const cbn_tile *m)
{
    p->tile = *m;
    p->tile.nontemporal = 0;
    p->y = (elem_out *)m->y.data;
    p->columns = m->y.n;
    p->foreign = p->before = -TO_LINE(p->y) & (LINE_ELEMS - 1);
    p->first = p->tile.n_runs = 0;
    p->room = memset(p->space, 0, CACHE_LINE);
    LOOP(turn_page)(p, m->n_runs);
    return &p->tile;
}

#if SUMS
/* Backward, some rows for a reduction in a tile of their own: copies with zeros in what does not count. */
typedef struct {
    cbn_tile tile;
    elem x[ROWS][ROOM], g[ROWS][ROOM];
} LOOP(copies);

INLINE const cbn_tile *LOOP(copy_rows)(LOOP(copies) *to, const cbn_tile *r, ptrdiff_t n, ptrdiff_t height)
{
    to->tile = *r;
    to->tile.x = (cbn_view){(char *)to->x[0], ROOM, 1};
    to->tile.g = (cbn_view){(char *)to->g[0], ROOM, 1};
    to->tile.dh.data = (char *)AT(r->dh, n, 0);
    to->tile.z.data = r->z.data ? (char *)AT(r->z, n, 0) : NULL;
    for (ptrdiff_t row = 0; row < height; row++) {
        const int8_t *mask = LOOP(counting_of)(r, n + row, 0).mask;
        LOOP(copy_counted)(to->x[row], AT(r->x, n + row, 0), r->n_channels, mask, 0);
        LOOP(copy_counted)(to->g[row], AT(r->g, n + row, 0), r->n_channels, mask, 0);
    }
    return &to->tile;
}
#endif

/* ---- both ---- */

/* Whether `rows_across` is for these. */
INLINE int LOOP(go_across)(const cbn_tile *m, const cbn_tile *r, const int plain, const int backward,
                           const int applying, const int reducing)
{
    const int bare = plain || (backward && !ELEM_IS_DOUBLE), in_float64 = backward || !HALF;
    if (!bare || RARE || BYTE || (applying ? m : r)->selection)
        return 0;
    if (applying && (m->nontemporal || (m->prefetch && !reducing) || m->x.n != m->y.n || (backward && m->g.n != m->y.n)))
        return 0;
    return !reducing || (plain && !r->prefetch && (in_float64 || r->sum_in_float64) && (!backward || r->x.n == r->g.n));
}

/* Rows of arrays that stay in the caches, where every value counts and no activation follows. */
INLINE void LOOP(rows_across)(const cbn_tile *m, const cbn_tile *r, const int backward, const int applying,
                              const int reducing, const ptrdiff_t rows)
{
    const LOOP(activation) none = {.kind = PLAIN};
    const ptrdiff_t n_runs = applying ? m->n_runs : r->n_runs;
    real room[ALL_FACTORS][ROOM] __attribute__((aligned(CACHE_LINE)));
    LOOP(apply_rows) a = {.act = none};
    if (applying) {
        LOOP(begin_apply_rows)(&a, m, room, backward, reducing, rows);
        LOOP(set_factors)(&a, m, 1, backward);
    }
    const ptrdiff_t whole = a.columns - (a.columns - a.head) % LINE_ELEMS;
#if SUMS
    LOOP(columns) of_column __attribute__((aligned(CACHE_LINE)));
    const LOOP(steps) step = reducing ? (LOOP(steps)){r->x.n, r->g.n, 0, 0} : (LOOP(steps)){0, 0, 0, 0};
    const ptrdiff_t columns = reducing ? r->copies * r->n_channels * r->length : 0;
    const ptrdiff_t whole_r = columns - columns % LINE_ELEMS;
    if (reducing)
        LOOP(begin_reduce_rows)(&of_column, r, columns, none, backward);
#endif
    for (ptrdiff_t n = 0, height = 0; n < n_runs; n += height) {
        height = MIN(rows, n_runs - n);
        if (applying) {
            LOOP(apply_part)(m, n, height, a.skip, a.head, a.factors, none, backward);
            LOOP(apply_across)(LOOP(row_at)(m, n), height, a.head, whole, a.factors, backward);
            LOOP(apply_part)(m, n, height, whole, a.columns, a.factors, none, backward);
        }
#if SUMS
        if (reducing) {
            const LOOP(source) p = LOOP(row_source)(r, n, none, backward);
            const LOOP(turn) turn = LOOP(turn_of)(n, height, n_runs, !backward);
            if (height == rows)
                LOOP(reduce_across)(p, step.x, rows, whole_r, &of_column, turn, backward);
            else
                LOOP(reduce_across)(p, step.x, height, whole_r, &of_column, turn, backward);
            if (whole_r < columns)
                LOOP(reduce_part)(r, n, height, whole_r, columns, &of_column, none, turn, backward);
        }
#endif
    }
#if SUMS
    if (reducing)
        LOOP(end_reduce_rows)(&of_column, r, columns, n_runs > 0, !backward);
#endif
}

INLINE void LOOP(rows_by_lines)(const cbn_tile *m, const cbn_tile *r, const int plain, const int backward,
                                const int applying, const int reducing, const ptrdiff_t rows)
{
    /* Backward, apply may be CHECKED for float64 elements alone */
    const int bare = plain || (backward && !ELEM_IS_DOUBLE);
    const ptrdiff_t n_runs = applying ? m->n_runs : r->n_runs;
    const int paged = applying && !reducing && LOOP(is_paged)(m);
    LOOP(page) page;
    if (paged)
        m = LOOP(open_page)(&page, m);
    const int down = applying && LOOP(downwards)(m, reducing ? r : NULL, backward);
    real room[ALL_FACTORS][ROOM] __attribute__((aligned(CACHE_LINE)));
    LOOP(apply_rows) a = {.act = bare ? (LOOP(activation)){.kind = PLAIN} : LOOP(activation_of)(applying ? m : r)};
    if (applying) {
        LOOP(begin_apply_rows)(&a, m, room, backward, reducing, rows);
        LOOP(set_factors)(&a, m, 1, backward);
    }
    ptrdiff_t columns = a.columns;
#if SUMS
    LOOP(columns) of_column __attribute__((aligned(CACHE_LINE)));
    const LOOP(activation) act_r = plain ? (LOOP(activation)){.kind = PLAIN} : LOOP(activation_of)(reducing ? r : m);
    LOOP(steps) step = reducing ? (LOOP(steps)){r->x.n, r->g.n, r->z.n, r->dh.n} : (LOOP(steps)){0, 0, 0, 0};
    const int sum_in_float64 = backward || !HALF || (reducing && r->sum_in_float64);
    const int flushing = !backward && sum_in_float64;
    const ptrdiff_t r_columns = reducing ? r->copies * r->n_channels * r->length : 0;
    if (reducing)
        LOOP(begin_reduce_rows)(&of_column, r, r_columns, act_r, backward);
    columns = MAX(columns, r_columns);
#endif
    const cbn_selection *selection = BYTE ? NULL : (applying ? m : r)->selection;
    int begun = 0; /* the sums */
    (void)begun;
    for (ptrdiff_t n = 0, height = 0; n < n_runs; n += height) {
        const int wrapped = a.wraps && n < n_runs - 1;
        if (paged && n == m->n_runs)
            LOOP(turn_page)(&page, n_runs);
        height = MIN(rows, wrapped ? n_runs - 1 - n : (paged ? m->n_runs : n_runs) - n);
        if (selection && LOOP(skip_rows)(&a, m, r, n, &height, rows, columns, plain, backward, applying, paged))
            continue;
        const ptrdiff_t end = a.columns + (wrapped ? a.head : 0);
        if (a.nontemporal && rows == 1 && !RARE)
            a.head = MIN(TO_LINE(Y_AT(m->y, n, 0)), a.columns);
        if (applying && (!a.wraps || n == 0))
            LOOP(apply_part)(m, n, a.wraps ? 1 : height, a.skip, a.head, a.factors, a.act, backward);
        const LOOP(row_of) at = LOOP(row_at)(applying ? m : r, n);
#if SUMS
        const cbn_tile *of_rows = reducing ? r : m; /* where row `at_n` is row n of the tile */
        ptrdiff_t at_n = n;
        LOOP(copies) copies;
        if (reducing && backward && selection && selection->mask.data) {
            of_rows = LOOP(copy_rows)(&copies, r, n, height);
            step.x = step.g = ROOM;
            at_n = 0;
        }
        const LOOP(source) source = LOOP(row_source)(of_rows, at_n, act_r, backward);
        LOOP(turn) turn = LOOP(turn_of)(n, height, n_runs, flushing);
        turn.begin = selection ? !begun : turn.begin;
        begun = 1;
        const LOOP(distance) ahead = LOOP(row_distance)(reducing ? r : m, n, rows, n_runs, r_columns);
#endif
        for (ptrdiff_t k = 0; k < columns; k += LINE_ELEMS) {
            const ptrdiff_t j = down ? (columns - 1) / LINE_ELEMS * LINE_ELEMS - k : k;
            if (applying)
                LOOP(apply_columns)(&a, m, at, n, height, a.head + j, end, bare, backward, rows);
#if SUMS
            if (reducing)
                LOOP(reduce_columns)(&of_column, of_rows, source, step, at_n, height, j, r_columns, ahead, act_r, turn,
                                     plain, backward, sum_in_float64, rows);
#endif
        }
        if (applying && selection)
            LOOP(zero_between)(m, n, height, a.skip, a.columns);
    }
    if (paged)
        LOOP(turn_page)(&page, n_runs);
#if SUMS
    if (reducing)
        LOOP(end_reduce_rows)(&of_column, r, r_columns, begun, flushing);
#endif
}

INLINE void LOOP(rows)(const cbn_tile *m, const cbn_tile *r, const int plain, const int backward, const int applying,
                       const int reducing, const ptrdiff_t rows)
{
    if (LOOP(go_across)(m, r, plain, backward, applying, reducing))
        LOOP(rows_across)(m, r, backward, applying, reducing, rows);
    else
        LOOP(rows_by_lines)(m, r, plain, backward, applying, reducing, rows);
}
