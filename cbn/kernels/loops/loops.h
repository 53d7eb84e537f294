/* loops.h: the loops over runs and over rows, for one TYPE. A template; it opens no thread, allocates nothing and
 * knows no Python.
 *
 * Parameters: TYPE, a word of types.h, which is undefined again at the end; those of sets/set.h.
 *
 * One text for a layout is both directions and every combination of apply, reduction, kind of store and copy.
 * Constants of an inlined body, which the entries below set:
 *
 *   backward             the direction
 *   applying, reducing   what the call does; both at once for runs, and forward for rows of 32 and 64 bits
 *   plain                no activation and no residual
 *   rows                 rows alone: how many are side by side. ROWS; 2*ROWS in a forward reduction; 1 where cache
 *                        lines of y begin at different columns
 *
 * `nontemporal` and `copying` are tested once for some vectors. A tail is a masked vector with the same expression, so
 * the bits of an element depend neither on its position in a run nor on how it is stored.
 */
#include "vec/vec.h"

#define UNROLL 4 /* independent accumulators: an addition takes 3 to 4 cycles, and one can start each cycle */
/* Elements of a run to which coefficients are applied before as many are reduced: reads and writes alternate faster
 * than they queue. Of 16-bit elements, as many as are summed in float32. */
#define PIECE (sizeof(elem) == 2 ? 256 : 64)
#define GROUP 32 /* channels whose accumulators wait in L1 */
#define ROWS 4 /* rows side by side, which share the loads of factors and accumulators from L1 */
#define LONG 256 /* elements from which it pays to store whole cache lines */
#define CACHE_LINE 64
#define LINE_ELEMS ((ptrdiff_t)(CACHE_LINE / sizeof(elem_out)))
#define TO_LINE(p) ((ptrdiff_t)(-(uintptr_t)(p) % CACHE_LINE / sizeof(elem_out))) /* elements from p to a cache line */
#define RARE (WIDENS && HALF) /* numbers that only float64 holds, in 16 bits: no code for whole cache lines */
#define AT(v, i, j) ((elem *)(v).data + (i) * (v).n + (j) * (v).c)
#define Y_AT(v, i, j) ((elem_out *)(v).data + (i) * (v).n + (j) * (v).c)
#define UNLIKELY(condition) __builtin_expect((condition) != 0, 0)
#define OFTEN(condition) __builtin_expect_with_probability((condition) != 0, 1, 0.99)
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

#include "formulas.h"
#include "prefetch.h"
#include "masked.h"
#include "stream.h"
#include "runs.h"
#include "columns.h"
#include "rows.h"
#include "counted.h"
#include "second.h"
#include "few.h"

/* ---- entries: the constants of the bodies ------------------------------------------------------------ */

INLINE void LOOP(selected_runs)(const cbn_tile *m, const cbn_tile *r, const int backward)
{
#if BYTE
    (void)m, (void)r, (void)backward;
#else
    (void)r;
#if SUMS
    if (r && backward)
        LOOP(backward_selected_runs)(m, r);
    else if (r)
        LOOP(forward_selected_runs)(m, r);
    else
#endif
        if (backward)
        LOOP(backward_selected)(m);
    else
        LOOP(forward_selected)(m);
#endif
}

INLINE void LOOP(any_runs)(const cbn_tile *m, const cbn_tile *r, const int plain, const int backward)
{
    /* Backward, apply may be CHECKED for float64 elements alone */
    const int bare = plain || (backward && !ELEM_IS_DOUBLE);
    (void)r;
    if (!BYTE && (m ? m : r)->selection)
        LOOP(selected_runs)(m, r, backward);
    else
#if SUMS
        if (m && r)
        LOOP(runs)(m, r, plain, backward, 1, 0);
    else if (r && !backward && r->count_c)
        LOOP(count_runs_of)(r);
    else if (r && plain && LOOP(is_simple)(r, backward))
        LOOP(reduce_channels)(r, (LOOP(activation)){.kind = PLAIN}, backward);
    else if (r)
        LOOP(runs)(m, r, plain, backward, 0, 0);
    else
#endif
        LOOP(apply_runs)(m, bare, backward);
    if (m && m->nontemporal)
        STORE_FENCE();
}

INLINE void LOOP(any_rows)(const cbn_tile *m, const cbn_tile *r, const int plain, const int backward)
{
    /* Whether rows of y begin alike in their cache lines. */
    const int together =
        m && (!m->nontemporal || m->y.n * (ptrdiff_t)sizeof(elem_out) % CACHE_LINE == 0 || LOOP(is_paged)(m));
#if SUMS
    if (together && r && !backward && !HALF && !m->selection) { /* else factors and sums do not fit L1: one after the other is faster */
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
    if (r && !backward && r->count_c)
        LOOP(count_rows_of)(r);
    else if (r)
        LOOP(rows)(m, r, plain, backward, 0, 1, backward ? ROWS : 2 * ROWS); /* half the trips of the accumulators */
#endif
}

/* Two functions each: without an activation there are more registers. */
#define ENTRY(name, layout, plain, backward)                                                                       \
    TARGET static __attribute__((noinline)) void LOOP(name)(const cbn_tile *m, const cbn_tile *r)                  \
    {                                                                                                              \
        LOOP(any_##layout)(m, r, plain, backward);                                                                 \
    }
#if WIDENS
/* Rare, and apply alone: one function, with what apply may have in this direction. */
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

/* ---- conversions, for arrays whose type the other loops do not have on both sides ----------------------------- */

TARGET static void LOOP(widen)(const void *from, void *to, ptrdiff_t n)
{
    const elem *x = from;
    real *r = to;
    ptrdiff_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const vec v = load(x + i);
        memcpy(r + i, &v, sizeof v);
    }
    if (i < n) {
        const vec v = load_part(x + i, 0, n - i);
        memcpy(r + i, &v, (size_t)(n - i) * sizeof(real));
    }
}

TARGET static void LOOP(narrow)(const void *from, void *to, ptrdiff_t n)
{
    const real *r = from;
    elem_out *y = to;
    ptrdiff_t i = 0;
    for (; i + LANES <= n; i += LANES)
        store(y + i, load_real(r + i));
    if (i < n) {
        vec v = {0};
        memcpy(&v, r + i, (size_t)(n - i) * sizeof(real));
        store_part(y + i, v, 0, n - i);
    }
}

const cbn_loops LOOP(loops) = {
    .widen = LOOP(widen),
    .narrow = LOOP(narrow),
    .forward_runs = LOOP(forward_runs),
    .forward_rows = LOOP(forward_rows),
#if !BYTE
    .backward_runs = LOOP(backward_runs),
    .backward_rows = LOOP(backward_rows),
#endif
#if SUMS
    .second_runs = LOOP(second_runs),
    .second_rows = LOOP(second_rows),
#endif
#if SUMS && !HALF
    .forward_at_once = LOOP(forward_at_once),
    .backward_at_once = LOOP(backward_at_once),
#endif
};

#undef ENTRIES
#undef TYPE
