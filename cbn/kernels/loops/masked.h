/* masked.h: passes in which not every value counts, or counts alike (`selection` of a tile).
 *
 * What does not count gets 0 in y and dx, and what it holds, also a NaN, reaches nothing: reductions read the shift in
 * its place, and a gradient of 0. A run of weight w adds w*S(d) and w*S(d*d) to the sums of its channel, and backward
 *
 *     dx = (dh - w*grad_mean)*scale - (x - mean)*w*slope
 *
 * since w stands in the statistics and not in y. Engine and callers see to it that the shift is an element.
 */

/* What counts of a run: the elements whose byte is -1; without a mask, those before `end`. */
typedef struct {
    const int8_t *mask;
    ptrdiff_t end;
} LOOP(counting);

INLINE LOOP(counting) LOOP(counting_of)(const cbn_tile *t, ptrdiff_t n, ptrdiff_t c)
{
    const cbn_selection *s = t->selection;
    LOOP(counting) k = {NULL, t->length};
    n += t->run, c += t->channel;
    if (s->mask.data)
        k.mask = (const int8_t *)s->mask.data + n * s->mask.n + c * s->mask.c + t->element;
    if (s->length_n)
        k.end = MAX(0, MIN(s->length_n[n] - t->element, t->length));
    return k;
}

/* Those of lanes begin to end that count, and zeros; the lanes are elements of a run from the i-th on. */
INLINE vec LOOP(counted)(vec v, const int8_t *mask, ptrdiff_t i, ptrdiff_t begin, ptrdiff_t end)
{
    int8_t bytes[LANES] = {0};
    if (!mask)
        return v;
    if (begin == 0 && end == LANES)
        return (vec)((lane_bits)v & lanes_of(mask + i));
    for (ptrdiff_t lane = begin; lane < end; lane++)
        bytes[lane] = mask[i + lane];
    return (vec)((lane_bits)v & lanes_of(bytes));
}

/* n zeros. No memset, which takes as long to begin as a piece takes. */
INLINE void LOOP(zero)(elem_out *y, ptrdiff_t n)
{
    ptrdiff_t i = 0;
    for (; i + LANES <= n; i += LANES)
        store(y + i, (vec){0});
    if (i < n)
        store_part(y + i, (vec){0}, 0, n - i);
}

#if SUMS
/* n elements; where they do not count `otherwise`. */
INLINE void LOOP(copy_counted)(elem *restrict to, const elem *restrict from, ptrdiff_t n, const int8_t *restrict mask,
                               elem otherwise)
{
    ptrdiff_t i = 0;
#if !HALF
    for (; i + LANES <= n; i += LANES)
        store(to + i, select(lanes_of(mask + i), load(from + i), splat(otherwise)));
#endif
    for (; i < n; i++)
        to[i] = mask[i] ? from[i] : otherwise;
}

/* A shift as an element, which it is. */
INLINE elem LOOP(as_element)(double shift)
{
#if HALF
    return HALF == F16 ? cbn_to_f16((float)shift) : cbn_to_bf16((float)shift);
#else
    return (elem)shift;
#endif
}
#endif
