/* stream.h: coefficients applied to runs, where nothing is reduced beside it.
 *
 * Where run follows run in memory, an image is one stream, whose factors change on the way: a vector that ends a
 * channel and begins the next one takes the factors of both, each in its lanes. So nothing is stored in parts but the
 * ends of the stream. With a masked store, or two, at the ends of every run, one core wrote runs of 14x14 at half the
 * memory's speed (Zen 5).
 */

/* Elements begin to end of a run; `nontemporal`: these are whole cache lines. */
INLINE void LOOP(apply_piece)(const elem *x, const elem *g, const elem_out *z, elem_out *y, ptrdiff_t begin,
                              ptrdiff_t end, const vec *f, LOOP(activation) act, const int8_t *mask, const int kind,
                              const int backward, const int nontemporal, const int normal)
{
    ptrdiff_t i = begin;
    for (; i + UNROLL * LANES <= end; i += UNROLL * LANES) {
        vec v[UNROLL], seen = {0};
        UNROLLED for (int u = 0; u < UNROLL; u++)
            v[u] = LOOP(unchecked)(x, g, z, i + u * LANES, 0, LANES, f, act, kind, backward, &seen);
        if (kind == CHECKED && UNLIKELY(any_nan(seen)))
            for (int u = 0; u < UNROLL; u++)
                v[u] = LOOP(check)(v[u], seen, x, g, z, i + u * LANES, 0, LANES, f, act, kind, backward);
        if (mask)
            UNROLLED for (int u = 0; u < UNROLL; u++)
                v[u] = LOOP(counted)(v[u], mask, i + u * LANES, 0, LANES);
        for (int u = 0; u < UNROLL; u += 2)
            store_two(y + i + u * LANES, v + u, nontemporal, normal);
    }
    for (; i + LANES <= end; i += LANES) {
        const vec v = LOOP(counted)(LOOP(value)(x, g, z, i, 0, LANES, f, act, kind, backward), mask, i, 0, LANES);
        if (nontemporal)
            store_nontemporal(y + i, v);
        else
            store(y + i, v);
    }
    if (i < end)
        store_part(y + i,
                   LOOP(counted)(LOOP(value)(x, g, z, i, 0, end - i, f, act, kind, backward), mask, i, 0, end - i), 0,
                   end - i);
}

/* Whether run follows run in all arrays of a tile, or image follows image: `step` elements, from one to the next. A
 * run is not shorter than a cache line: no vector has elements of three channels, and the first run reaches one. */
INLINE int LOOP(follow)(const cbn_tile *m, ptrdiff_t x, ptrdiff_t g, ptrdiff_t z, ptrdiff_t y, ptrdiff_t step,
                        const int backward)
{
    return m->length >= LINE_ELEMS && x == step && y == step && (!backward || g == step) && (!m->z.data || z == step);
}

/* Some vectors from the i-th element of a run on; i is negative, and the elements up to 0 belong to the run before. */
INLINE void LOOP(apply_border)(const elem *x, const elem *g, const elem_out *z, elem_out *y, ptrdiff_t i, const vec *f,
                               const vec *before, LOOP(activation) act, const int kind, const int backward,
                               const int nontemporal, const int vectors)
{
    vec v[UNROLL], both[ALL_FACTORS];
    UNROLLED for (int u = 0; u < vectors; u++) {
        for (int j = 0; j < FACTORS(backward); j++)
            both[j] = blend(f[j], before[j], -i - u * LANES, LANES);
        v[u] = LOOP(value)(x, g, z, i + u * LANES, 0, LANES, both, act, kind, backward);
    }
    UNROLLED for (int u = 0; u < vectors; u++)
        if (nontemporal)
            store_nontemporal(y + i + u * LANES, v[u]);
        else
            store(y + i + u * LANES, v[u]);
}

INLINE void LOOP(stream)(const cbn_tile *m, LOOP(activation) act, const int kind, const int backward)
{
    /* Out of the tile, which any store may have changed, as the compiler sees it */
    const ptrdiff_t length = m->length, n_channels = m->n_channels, n_runs = m->n_runs, all = n_channels * length;
    const ptrdiff_t x_c = m->x.c, g_c = m->g.c, z_c = m->z.c, y_c = m->y.c;
    const int nontemporal = m->nontemporal, aligning = nontemporal || length >= LONG;
    const int runs_follow = n_channels == 1 || LOOP(follow)(m, x_c, g_c, z_c, y_c, length, backward);
    const int images_follow = runs_follow && LOOP(follow)(m, m->x.n, m->g.n, m->z.n, m->y.n, all, backward);
    /* Vectors at a time: the fewer, the more branches depend on where a run ends */
    const ptrdiff_t step = length >= UNROLL * LANES ? UNROLL : 1;
    real factors[ALL_FACTORS][GROUP];
    vec f[ALL_FACTORS] = {{0}}, before[ALL_FACTORS] = {{0}}; /* of this run and of the one before it */
    ptrdiff_t i = 0; /* the first element that is not done; negative: in the run before */
    for (ptrdiff_t n = 0; n < n_runs; n++) {
        const elem *x = AT(m->x, n, 0), *g = AT(m->g, n, 0);
        const elem_out *z = m->z.data ? Y_AT(m->z, n, 0) : NULL;
        elem_out *y = Y_AT(m->y, n, 0);
        for (ptrdiff_t c = 0; c < n_channels; c++, x += x_c, g += g_c, z = z ? z + z_c : NULL, y += y_c) {
            const ptrdiff_t k = c % GROUP;
            const int goes_on = c > 0 ? runs_follow : n > 0 && images_follow;
            const int ends = c < n_channels - 1 ? !runs_follow : n == n_runs - 1 || !images_follow;
            if (k == 0 && (n == 0 || n_channels > GROUP))
                LOOP(factors)(m->coef_c + c, m->pitch, MIN(GROUP, n_channels - c), factors[0], GROUP, 1, backward);
            for (int j = 0; j < FACTORS(backward); j++)
                f[j] = splat(factors[j][k]);
            const int normal = LOOP(stays_normal)(m, factors[TERM][k], act, backward);
            if (!goes_on) {
                i = aligning ? MIN(TO_LINE(y), length) : 0;
                if (i)
                    LOOP(apply_piece)(x, g, z, y, 0, i, f, act, NULL, kind, backward, 0, normal);
            } else if (i < 0 && step == UNROLL) {
                LOOP(apply_border)(x, g, z, y, i, f, before, act, kind, backward, nontemporal, UNROLL);
                i += UNROLL * LANES;
            } else if (i < 0) {
                LOOP(apply_border)(x, g, z, y, i, f, before, act, kind, backward, nontemporal, 1);
                i += LANES;
            }
            const ptrdiff_t end = ends ? length : i + ((length - i) & -(step * LANES));
            LOOP(apply_piece)(x, g, z, y, i, end, f, act, NULL, kind, backward, nontemporal, normal);
            i = end - length;
            for (int j = 0; j < FACTORS(backward); j++)
                before[j] = f[j];
        }
    }
}

/* A body each: the bare one has no branches. */
INLINE void LOOP(apply_runs)(const cbn_tile *m, const int bare, const int backward)
{
    const LOOP(activation) act = bare ? (LOOP(activation)){.kind = PLAIN} : LOOP(activation_of)(m);
    if (bare)
        LOOP(stream)(m, act, PLAIN, backward);
    else if (!backward && act.kind == ACTIVATED)
        LOOP(stream)(m, act, ACTIVATED, backward);
    else
        LOOP(stream)(m, act, CHECKED, backward);
}

/* ---- where not every value counts ---- */

#if !BYTE
/* Elements begin to end of a run, of which those from k.end on do not count: by whole cache lines, if `nontemporal`. */
TARGET static __attribute__((noinline)) void LOOP(apply_end)(const elem *x, const elem *g, const elem_out *z,
                                                             elem_out *y, ptrdiff_t begin, ptrdiff_t end, const vec *f,
                                                             const LOOP(activation) *act, LOOP(counting) k,
                                                             const int backward, const int nontemporal)
{
    for (ptrdiff_t i = begin; i < end; i += LANES) {
        const ptrdiff_t lanes = MIN(end - i, LANES), some = MIN(k.end - i, lanes);
        vec v = {0};
        if (some > 0)
            v = LOOP(counted)(LOOP(value)(x, g, z, i, 0, some, f, *act, act->kind, backward), k.mask, i, 0, some);
        if (some < lanes)
            v = some > 0 ? blend(v, (vec){0}, 0, some) : (vec){0};
        if (lanes < LANES)
            store_part(y + i, v, 0, lanes);
        else if (nontemporal)
            store_nontemporal(y + i, v);
        else
            store(y + i, v);
    }
}

/* Elements begin to end of a run. */
INLINE void LOOP(apply_counted)(const elem *x, const elem *g, const elem_out *z, elem_out *y, ptrdiff_t begin,
                                ptrdiff_t end, const vec *f, LOOP(activation) act, LOOP(counting) k, const int backward,
                                const int nontemporal, const int normal)
{
    if (UNLIKELY(begin >= k.end)) {
        for (; begin < end && nontemporal; begin += LANES)
            store_nontemporal(y + begin, (vec){0});
        if (begin < end)
            LOOP(zero)(y + begin, end - begin);
    } else if (UNLIKELY(end > k.end)) {
        /* Copies, since what another function sees is in memory */
        vec factors[ALL_FACTORS] = {{0}};
        const LOOP(activation) copy = act;
        for (int i = 0; i < FACTORS(backward); i++)
            factors[i] = f[i];
        LOOP(apply_end)(x, g, z, y, begin, end, factors, &copy, k, backward, nontemporal);
    } else if (act.kind == PLAIN)
        LOOP(apply_piece)(x, g, z, y, begin, end, f, act, k.mask, PLAIN, backward, nontemporal, normal);
    else if (!backward && act.kind == ACTIVATED)
        LOOP(apply_piece)(x, g, z, y, begin, end, f, act, k.mask, ACTIVATED, backward, nontemporal, normal);
    else if (!backward || ELEM_IS_DOUBLE)
        LOOP(apply_piece)(x, g, z, y, begin, end, f, act, k.mask, CHECKED, backward, nontemporal, normal);
}

/* The factors of run n of channel c, where runs have weights. */
INLINE void LOOP(weigh)(vec *f, const cbn_tile *m, ptrdiff_t n, ptrdiff_t c)
{
    real factors[ALL_FACTORS][1];
    LOOP(factors)(m->coef_c + c, m->pitch, 1, factors[0], 1, m->selection->weight_n[n + m->run], 1);
    for (int i = 0; i < ALL_FACTORS; i++)
        f[i] = splat(factors[i][0]);
}

/* Run by run: where an image is one stream, a vector would have elements of two runs that end differently. */
INLINE void LOOP(apply_selected)(const cbn_tile *m, const int backward)
{
    const LOOP(activation) act = LOOP(activation_of)(m);
    const ptrdiff_t length = m->length, n_channels = m->n_channels;
    const int nontemporal = m->nontemporal;
    real factors[ALL_FACTORS][GROUP];
    vec f[ALL_FACTORS] = {{0}};
    for (ptrdiff_t n = 0; n < m->n_runs; n++)
        for (ptrdiff_t c = 0; c < n_channels; c++) {
            const elem *x = AT(m->x, n, c), *g = AT(m->g, n, c);
            const elem_out *z = m->z.data ? Y_AT(m->z, n, c) : NULL;
            elem_out *y = Y_AT(m->y, n, c);
            const LOOP(counting) k = LOOP(counting_of)(m, n, c);
            if (c % GROUP == 0 && (n == 0 || n_channels > GROUP))
                LOOP(factors)(m->coef_c + c, m->pitch, MIN(GROUP, n_channels - c), factors[0], GROUP, 1, backward);
            for (int j = 0; j < FACTORS(backward); j++)
                f[j] = splat(factors[j][c % GROUP]);
            if (backward && m->selection->weight_n)
                LOOP(weigh)(f, m, n, c);
            const int normal = LOOP(stays_normal)(m, factors[TERM][c % GROUP], act, backward);
            const ptrdiff_t head = nontemporal ? MIN(TO_LINE(y), length) : 0;
            const ptrdiff_t whole = nontemporal ? head + (length - head) / LINE_ELEMS * LINE_ELEMS : length;
            for (ptrdiff_t i = 0, end; i < length; i = end) {
                end = i < head ? head : i < whole ? MIN(i + PIECE, whole) : length;
                LOOP(apply_counted)(x, g, z, y, i, end, f, act, k, backward, nontemporal && i >= head && i < whole,
                                    normal);
            }
        }
}

/* In functions of their own: others have no branches for it. */
TARGET static __attribute__((noinline)) void LOOP(forward_selected)(const cbn_tile *m)
{
    LOOP(apply_selected)(m, 0);
}

TARGET static __attribute__((noinline)) void LOOP(backward_selected)(const cbn_tile *m)
{
    LOOP(apply_selected)(m, 1);
}
#endif
