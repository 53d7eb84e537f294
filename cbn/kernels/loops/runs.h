/* runs.h: runs that are reduced, which are contiguous elements of one channel: its sums stay in registers.
 *
 * A run goes in pieces: of each piece, coefficients are applied to one tile and then another is reduced, so that memory
 * is written and read at the same time.
 */
#if SUMS

/* ---- apply, beside a reduction ---- */

/* A cache line that two runs share waits here for the second one: a store of a part would read the line from memory
 * first. It waits in registers. Store forwarding cannot merge two partial stores, so a load from memory would wait
 * until both had drained from the store buffer, behind all non-temporal stores: 66 cycles a cache line (Zen 4). */
typedef struct {
    vec value[LINE_ELEMS / LANES];
    elem_out *line;       /* where it belongs; NULL: none waits */
    ptrdiff_t begin, end; /* the elements of it that are there */
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

/* Elements begin to end of a run, less than a cache line. */
INLINE void LOOP(apply_shared)(const elem *x, const elem *g, const elem_out *z, elem_out *y, ptrdiff_t begin,
                               ptrdiff_t end, const vec *f, LOOP(activation) act, LOOP(counting) k, LOOP(shared) *s,
                               const int kind, const int backward, const int selects)
{
    const ptrdiff_t at = (ptrdiff_t)((uintptr_t)(y + begin) % CACHE_LINE / sizeof(elem_out));
    if (begin == end)
        return;
    if (s->line != y + begin - at || s->end != at) {
        LOOP(deliver)(s);
        s->line = y + begin - at;
        s->begin = at;
    }
    s->end = at + end - begin;
    UNROLLED for (int v = 0; v < LINE_ELEMS / LANES; v++) {
        const ptrdiff_t from = MAX(at - v * LANES, 0), to = MIN(s->end - v * LANES, LANES), i = begin - at + v * LANES;
        const ptrdiff_t stop = selects ? MIN(to, k.end - i) : to;
        vec value = {0};
        if (from >= to)
            continue;
        if (!selects || from < stop)
            value = LOOP(value)(x, g, z, i, from, stop, f, act, kind, backward);
        if (selects && k.mask)
            value = LOOP(counted)(value, k.mask, i, from, to);
        if (selects && stop < to)
            value = blend(value, (vec){0}, from, stop);
        s->value[v] = blend(value, s->value[v], from, to);
    }
    if (s->end == LINE_ELEMS)
        LOOP(deliver)(s);
}

/* A run that coefficients are applied to. */
typedef struct {
    const elem *x, *g;
    const elem_out *z;
    elem_out *y;
    vec f[ALL_FACTORS];
    ptrdiff_t head, whole; /* whole cache lines lie between these */
    int normal;
    LOOP(counting) k;
} LOOP(apply_run);

/* Sets it up, and applies to the elements before the first whole cache line. */
INLINE void LOOP(begin_apply)(LOOP(apply_run) *a, const cbn_tile *m, ptrdiff_t n, ptrdiff_t c,
                              const real (*factors)[GROUP], ptrdiff_t column, LOOP(activation) act,
                              LOOP(shared) *shared, const int backward, const int nontemporal, const int selects)
{
    const ptrdiff_t length = m->length;
    if (selects)
        a->k = LOOP(counting_of)(m, n, c);
    a->x = AT(m->x, n, c), a->g = AT(m->g, n, c), a->y = Y_AT(m->y, n, c);
    a->z = m->z.data ? Y_AT(m->z, n, c) : NULL;
    for (int i = 0; i < FACTORS(backward); i++)
        a->f[i] = splat(factors[i][column]);
    if (selects && backward && m->selection->weight_n)
        LOOP(weigh)(a->f, m, n, c);
    a->normal = LOOP(stays_normal)(m, factors[TERM][column], act, backward);
    if (nontemporal || (!selects && length >= LONG))
        a->head = MIN(TO_LINE(a->y), length);
    if (nontemporal) {
        a->whole = a->head + (length - a->head) / LINE_ELEMS * LINE_ELEMS;
        LOOP(apply_shared)(a->x, a->g, a->z, a->y, 0, a->head, a->f, act, a->k, shared, act.kind, backward, selects);
    } else if (!selects)
        LOOP(apply_piece)(a->x, a->g, a->z, a->y, 0, a->head, a->f, act, NULL, act.kind, backward, 0, a->normal);
}

/* The piece that begins i elements behind `head`; `bare`: nothing follows the normalization. */
INLINE void LOOP(apply_at)(const LOOP(apply_run) *a, ptrdiff_t i, ptrdiff_t length, LOOP(activation) act,
                           LOOP(shared) *shared, const int bare, const int backward, const int nontemporal,
                           const int selects)
{
    const ptrdiff_t begin = MIN(a->head + i, a->whole), end = MIN(a->head + i + PIECE, a->whole);
    /* A body each: the bare one has no branches */
    if (selects)
        LOOP(apply_counted)(a->x, a->g, a->z, a->y, begin, end, a->f, act, a->k, backward, nontemporal, a->normal);
    else if (bare)
        LOOP(apply_piece)(a->x, a->g, a->z, a->y, begin, end, a->f, act, NULL, PLAIN, backward, nontemporal,
                          a->normal);
    else if (!backward && act.kind == ACTIVATED)
        LOOP(apply_piece)(a->x, a->g, a->z, a->y, begin, end, a->f, act, NULL, ACTIVATED, backward, nontemporal,
                          a->normal);
    else
        LOOP(apply_piece)(a->x, a->g, a->z, a->y, begin, end, a->f, act, NULL, CHECKED, backward, nontemporal,
                          a->normal);
    /* What is left, once, before the copy of what is reduced takes its place */
    if (nontemporal && a->head + i + PIECE >= a->whole && (i == 0 || a->head + i < a->whole))
        LOOP(apply_shared)(a->x, a->g, a->z, a->y, a->whole, length, a->f, act, a->k, shared, act.kind, backward,
                           selects);
}

/* ---- reduction ---- */

typedef struct {
    dvec sum[UNROLL], square[UNROLL];
} LOOP(sums);

/* Forward, a sum that is added to often has rounding errors that add up: equal numbers are all rounded to the same
 * side. So float64 sums take a few additions each, and are then added to others: those of rows to totals, exactly for
 * float64 elements, but for the lower half of what is lost; those of runs to parts, and some of these exactly. */
typedef struct {
    dvec part_sum, part_square, sum, sum_low, square, square_low;
} LOOP(totals);

/* Elements of a run: the additions of a sum. More of them for smaller elements, whose own rounding hides them; it takes
 * time. */
#define FLUSH ((ELEM_IS_DOUBLE ? 8 : 256) * UNROLL * DLANES)
#define PARTS 8 /* sums to a part, which is then added exactly */

INLINE void LOOP(flush)(LOOP(sums) *s, LOOP(totals) *t, const int exactly, const double *weight)
{
    const dvec sum = (s->sum[0] + s->sum[1]) + (s->sum[2] + s->sum[3]);
    const dvec square = (s->square[0] + s->square[1]) + (s->square[2] + s->square[3]);
    t->part_sum += weight ? sum * *weight : sum;
    t->part_square += weight ? square * *weight : square;
    for (int u = 0; u < UNROLL; u++)
        s->sum[u] = s->square[u] = (dvec){0};
    if (!exactly)
        return;
    LOOP(add_exactly)(&t->sum, &t->sum_low, t->part_sum);
    LOOP(add_exactly)(&t->square, &t->square_low, t->part_square);
    t->part_sum = t->part_square = (dvec){0};
}

#if HALF
/* Forward, 16-bit elements: d = x - shift and the sums of a few d and d*d are float32, whose 24 bits are many more
 * than the 8 or 11 of x. Where they leave its range, which bfloat16 shares, the caller asks for float64 sums
 * (`sum_in_float64`).
 *
 * For bfloat16 d is x, so that the processor's products of pairs will do. S(x*x) - S(x)^2/n suffers cancellation where
 * the mean is large beside the spread. But then x lies between mean/2 and 2*mean, and x*x is a multiple of
 * mean^2/2^18: a sum of 32 up to 64*mean^2 is exact, and a larger one takes a spread that costs nothing. A value
 * further off, which ends this, adds at least mean^2/4 to m2: beside that, a rounding of such a sum is below 2^-16. */

/* Vectors whose elements are summed in float32. 16 of them, folded into half a vector, are the sums of 32 from above;
 * fewer for float16, whose mantissa is longer. */
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

/* What the forward pass did to a channel: its factors, or where it took float64 its coefficients. */
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
    /* An input that has overflowed has the right sign, except for a sum with a residual, and for float64 x - mean */
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

INLINE void LOOP(reduce_piece)(LOOP(source) p, ptrdiff_t begin, ptrdiff_t end, dvec shift, const LOOP(forward) *f,
                               LOOP(activation) act, LOOP(sums) *s, const int activated, const int backward,
                               const int copying, const int sum_in_float64)
{
    real input[PIECE + LANES];
    if (backward && activated)
        LOOP(inputs)(p, begin, end, shift, f, input);
    if (backward && activated && UNLIKELY(act.clips))
        LOOP(between)(input, end - begin, act);
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

/* Run n of channel c, of the channels first to last whose runs take turns. */
typedef struct {
    ptrdiff_t n, c, first, last;
} LOOP(place);

/* The run that comes after it. */
INLINE const elem *LOOP(next_run)(cbn_view v, LOOP(place) at)
{
    return at.c + 1 < at.last ? AT(v, at.n, at.c + 1) : AT(v, at.n + 1, at.first);
}

/* A run that is reduced; its sums are apart, and stay in registers. */
typedef struct {
    LOOP(source) p, ahead, next; /* of `ahead` and `next` what is fetched */
    ptrdiff_t distance;          /* how far ahead, in elements of `ahead` */
    dvec shift;
    LOOP(forward) f;
} LOOP(reduced_run);

INLINE void LOOP(begin_reduction)(LOOP(reduced_run) *b, const cbn_tile *r, LOOP(place) at,
                                  const real (*of_forward)[GROUP], LOOP(activation) act, ptrdiff_t distance,
                                  const int backward, const int copying)
{
    b->p.x = AT(r->x, at.n, at.c), b->p.g = AT(r->g, at.n, at.c);
    b->ahead = b->p;
    b->next.x = LOOP(next_run)(r->x, at);
    b->next.g = LOOP(next_run)(r->g, at);
    b->distance = distance;
    if (copying)
        b->p.x_copy = AT(r->x_copy, at.n, at.c);
    if (backward && (copying || act.kind != PLAIN))
        b->p.dh = AT(r->dh, at.n, at.c);
    if (backward && act.kind != PLAIN) {
        b->p.z = r->z.data ? AT(r->z, at.n, at.c) : NULL;
        b->ahead.z = b->p.z;
        b->next.z = b->p.z ? LOOP(next_run)(r->z, at) : NULL;
        for (int i = 0; i < SLOPE; i++)
            b->f.factors[i] = splat(of_forward[i][at.c - at.first]);
        b->f.in_float64 = r->forward_c[CBN_IN_FLOAT64 * r->pitch + at.c] != 0;
        b->f.scale = splat_d(r->forward_c[CBN_SCALE * r->pitch + at.c]);
        b->f.offset = splat_d(r->forward_c[CBN_OFFSET * r->pitch + at.c]);
    }
    b->shift = splat_d(r->shift_c[at.c]);
}

/* Fetch ahead by what counts: that many elements may be several runs, of which `count` elements count each. */
INLINE void LOOP(look_ahead)(LOOP(reduced_run) *b, const cbn_tile *r, LOOP(place) at, ptrdiff_t count)
{
    LOOP(place) to = at;
    if (!count)
        return;
    to.c += b->distance / count;
    while (to.c >= to.last)
        to.c -= to.last - to.first, to.n++;
    b->distance %= count;
    b->ahead.x = AT(r->x, to.n, to.c), b->ahead.g = AT(r->g, to.n, to.c);
    b->next.x = LOOP(next_run)(r->x, to), b->next.g = LOOP(next_run)(r->g, to);
    if (b->p.z)
        b->ahead.z = AT(r->z, to.n, to.c), b->next.z = LOOP(next_run)(r->z, to);
}

/* What a later piece needs, for the one that begins at i. */
INLINE void LOOP(fetch_for)(const LOOP(reduced_run) *b, ptrdiff_t i, ptrdiff_t length, const int backward)
{
    LOOP(fetch_piece)(b->ahead.x, b->next.x, i, b->distance, length);
    if (backward)
        LOOP(fetch_piece)(b->ahead.g, b->next.g, i, b->distance, length);
    if (backward && b->p.z)
        LOOP(fetch_piece)(b->ahead.z, b->next.z, i, b->distance, length);
}

/* The piece that begins at i. */
INLINE void LOOP(reduce_at)(const LOOP(reduced_run) *b, ptrdiff_t i, ptrdiff_t length, LOOP(activation) act,
                            LOOP(sums) *s, const int fetching, const int plain, const int backward, const int copying,
                            const int sum_in_float64)
{
    if (fetching)
        LOOP(fetch_for)(b, i, length, backward);
    const ptrdiff_t end = MIN(i + PIECE, length);
    if (backward && !plain && (!ELEM_IS_DOUBLE || act.kind != PLAIN))
        LOOP(reduce_piece)(b->p, i, end, b->shift, &b->f, act, s, 1, backward, copying, sum_in_float64);
    else
        LOOP(reduce_piece)(b->p, i, end, b->shift, &b->f, act, s, 0, backward, copying, sum_in_float64);
}

/* The same where not every value counts: of those that do, in a copy. */
INLINE void LOOP(reduce_counted)(const LOOP(reduced_run) *b, LOOP(counting) k, ptrdiff_t i, ptrdiff_t length,
                                 LOOP(activation) act, LOOP(sums) *s, const int fetching, const int backward,
                                 const int copying, const int sum_in_float64)
{
    const int activated = backward && act.kind != PLAIN;
    const ptrdiff_t n = MIN(i + PIECE, length) - i, stop = MIN(MAX(k.end, i), i + n);
    elem x[PIECE], g[PIECE];
    if (activated)
        LOOP(zero)(b->p.dh + stop, i + n - stop);
    if (stop == i)
        return;
    if (fetching)
        LOOP(fetch_for)(b, i, k.end, backward);
    if (!k.mask) {
        LOOP(reduce_at)(b, i, stop, act, s, 0, !activated, backward, copying, sum_in_float64);
        return;
    }
    const int8_t *mask = k.mask + i;
    LOOP(source) p = {copying ? b->p.x_copy + i : x, copying && backward && !activated ? b->p.dh + i : g, NULL, NULL,
                      NULL};
    LOOP(copy_counted)((elem *)p.x, b->p.x + i, n, mask, backward ? 0 : LOOP(as_element)(b->shift[0]));
    if (backward)
        LOOP(copy_counted)((elem *)p.g, b->p.g + i, n, mask, 0);
    if (activated) {
        p.z = b->p.z ? b->p.z + i : NULL;
        p.dh = b->p.dh + i;
        LOOP(reduce_piece)(p, 0, n, b->shift, &b->f, act, s, 1, backward, 0, sum_in_float64);
    } else
        LOOP(reduce_piece)(p, 0, n, b->shift, &b->f, act, s, 0, backward, 0, sum_in_float64);
}

/* The sums of a channel, which wait since its run before the n-th. */
INLINE void LOOP(begin_sums)(LOOP(sums) *s, const LOOP(sums) *waiting, ptrdiff_t n)
{
    for (int u = 0; u < UNROLL; u++) {
        s->sum[u] = n ? waiting->sum[u] : (dvec){0};
        s->square[u] = n ? waiting->square[u] : (dvec){0};
    }
}

/* The sums of a channel that wait for its next run, or end with this one. */
INLINE void LOOP(end_reduction)(const cbn_tile *r, ptrdiff_t c, LOOP(sums) *s, LOOP(sums) *waiting, LOOP(totals) *t,
                                const int more, const int flushing)
{
    if (more)
        *waiting = *s;
    else if (flushing) {
        LOOP(flush)(s, t, 1, NULL);
        r->sum_c[c] = total(LOOP(in_one)(t->sum, t->sum_low));
        r->square_c[c] = total(LOOP(in_one)(t->square, t->square_low));
    } else {
        r->sum_c[c] = total((s->sum[0] + s->sum[1]) + (s->sum[2] + s->sum[3]));
        r->square_c[c] = total((s->square[0] + s->square[1]) + (s->square[2] + s->square[3]));
    }
}

/* A reduction alone, of runs that are in a cache: channel by channel, without what `runs` keeps for pieces, copies and
 * prefetches. Of 49 values a channel, that took two thirds of the time. The order of the additions is the same. */
INLINE void LOOP(reduce_channels)(const cbn_tile *r, LOOP(activation) act, const int backward)
{
    const LOOP(forward) none = {.in_float64 = 0};
    const ptrdiff_t length = r->length, n_channels = r->n_channels, n_runs = r->n_runs;
    const cbn_view x = r->x, g = r->g;
    const double *shift_c = r->shift_c;
    double *sum_c = r->sum_c, *square_c = r->square_c;
    const int sum_in_float64 = r->sum_in_float64;
    for (ptrdiff_t c = 0; c < n_channels; c++) {
        const dvec shift = splat_d(shift_c[c]);
        LOOP(source) p = {AT(x, 0, c), AT(g, 0, c), NULL, NULL, NULL};
        LOOP(sums) s = {{{0}}, {{0}}};
        for (ptrdiff_t n = 0; n < n_runs; n++, p.x += x.n, p.g += g.n)
            LOOP(reduce_piece)(p, 0, length, shift, &none, act, &s, 0, backward, 0, sum_in_float64);
        sum_c[c] = total((s.sum[0] + s.sum[1]) + (s.sum[2] + s.sum[3]));
        square_c[c] = total((s.square[0] + s.square[1]) + (s.square[2] + s.square[3]));
    }
}

/* Whether that will do. */
INLINE int LOOP(is_simple)(const cbn_tile *r, const int backward)
{
    const int flushing = !backward && (!HALF || r->sum_in_float64) && r->n_runs * r->length > FLUSH;
    return !r->activated && !r->x_copy.data && !r->prefetch && !flushing;
}

/* ---- both ---- */

INLINE void LOOP(runs)(const cbn_tile *m, const cbn_tile *r, const int plain, const int backward, const int applying,
                       const int selects)
{
    const int nontemporal = applying && m->nontemporal, copying = r->x_copy.data != NULL;
    const ptrdiff_t length = r->length, n_runs = r->n_runs;
    const ptrdiff_t m_channels = applying ? m->n_channels : 0, r_channels = r->n_channels;
    const ptrdiff_t n_channels = MAX(m_channels, r_channels);
    const ptrdiff_t distance = LOOP(run_distance)(r, backward, applying);
    real factors[ALL_FACTORS][GROUP], of_forward[SLOPE][GROUP]; /* of apply, and of the forward pass */
    LOOP(sums) sums[GROUP];
    LOOP(totals) totals[GROUP];
    LOOP(shared) shared = {.line = NULL};
    /* Backward, apply may be CHECKED for float64 elements alone */
    const int bare = plain || (backward && !ELEM_IS_DOUBLE);
    const LOOP(activation) act = bare ? (LOOP(activation)){.kind = PLAIN} : LOOP(activation_of)(applying ? m : r);
    const double *weight_n = selects && !backward ? r->selection->weight_n : NULL;
    const LOOP(activation) act_r = plain ? (LOOP(activation)){.kind = PLAIN} : LOOP(activation_of)(r);
    /* At the end of each run too, if it has a weight of its own */
    const int flushing = weight_n || (!backward && (!HALF || r->sum_in_float64) && n_runs * length > FLUSH);
    for (ptrdiff_t first = 0; first < n_channels; first += GROUP) {
        const ptrdiff_t last = MIN(first + GROUP, n_channels);
        if (applying)
            LOOP(factors)(m->coef_c + first, m->pitch, MIN(last, m_channels) - first, factors[0], GROUP, 1, backward);
        if (backward && act_r.kind != PLAIN)
            LOOP(factors)(r->forward_c + first, r->pitch, MIN(last, r_channels) - first, of_forward[0], GROUP, 1, 0);
        for (ptrdiff_t n = 0; n < n_runs; n++)
            for (ptrdiff_t c = first; c < last; c++) {
                const int applies = applying && c < m_channels, reduces = c < r_channels;
                const LOOP(place) at = {n, c, first, last};
                LOOP(apply_run) a = {.whole = length};
                LOOP(reduced_run) b = {.f.in_float64 = 0};
                LOOP(counting) k = {NULL, length};
                const double *weight = weight_n ? &weight_n[n + r->run] : NULL;
                const ptrdiff_t before = weight ? 0 : n * length; /* elements since the sums began, at most */
                LOOP(sums) s;
                ptrdiff_t next_flush = PTRDIFF_MAX; /* elements of the run until then */
                if (applies)
                    LOOP(begin_apply)(&a, m, n, c, factors, c - first, act, &shared, backward, nontemporal, selects);
                const elem *z_next = a.z ? LOOP(next_run)(m->z, at) : NULL;
                if (selects)
                    LOOP(begin_sums)(&s, NULL, 0);
                if (reduces) {
                    LOOP(begin_reduction)(&b, r, at, of_forward, act_r, distance, backward, copying);
                    LOOP(begin_sums)(&s, &sums[c - first], weight ? 0 : n);
                    if (selects) {
                        k = LOOP(counting_of)(r, n, c);
                        LOOP(look_ahead)(&b, r, at, k.end);
                    }
                    next_flush = flushing ? FLUSH - before % FLUSH : PTRDIFF_MAX;
                    if (flushing && n == 0)
                        totals[c - first] = (LOOP(totals)){{0}, {0}, {0}, {0}, {0}, {0}};
                }
                for (ptrdiff_t i = 0; i < length;) {
                    /* A loop of its own, else the compiler keeps the sums in memory */
                    for (const ptrdiff_t stop = MIN(length, next_flush); i < stop; i += PIECE) {
                        if (!backward && a.z)
                            LOOP(fetch_piece)(a.z, z_next, i, AHEAD, length);
                        if (applies)
                            LOOP(apply_at)(&a, i, length, act, &shared, bare, backward, nontemporal, selects);
                        if (reduces && selects)
                            LOOP(reduce_counted)(&b, k, i, length, act_r, &s, distance != 0, backward, copying,
                                                 r->sum_in_float64);
                        else if (reduces)
                            LOOP(reduce_at)(&b, i, length, act_r, &s, distance != 0, plain, backward, copying,
                                            r->sum_in_float64);
                    }
                    if (reduces && MIN(i, length) >= next_flush) {
                        LOOP(flush)(&s, &totals[c - first], (before + next_flush) % (PARTS * FLUSH) == 0, weight);
                        next_flush += FLUSH;
                    }
                }
                if (reduces && weight)
                    LOOP(flush)(&s, &totals[c - first], n % PARTS == PARTS - 1, weight);
                if (reduces && (!weight || n == n_runs - 1))
                    LOOP(end_reduction)(r, c, &s, &sums[c - first], &totals[c - first], n < n_runs - 1, flushing);
            }
    }
    LOOP(deliver)(&shared);
}

/* The same with a selection, in a function of its own: the others have no branches for it. */
#define SELECTED_RUNS(direction, backward)                                                                         \
    TARGET static __attribute__((noinline)) void LOOP(direction##_selected_runs)(const cbn_tile *m,                \
                                                                                  const cbn_tile *r)               \
    {                                                                                                              \
        LOOP(runs)(m, r, 0, backward, m != NULL, 1);                                                               \
    }
SELECTED_RUNS(forward, 0)
SELECTED_RUNS(backward, 1)
#undef SELECTED_RUNS
#endif
