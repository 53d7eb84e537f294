/* prefetch.h: the one rule of what is fetched ahead of its use, and how far.
 *
 * Hardware prefetchers follow a long stream, and give up where a run ends; rows side by side are too many streams for
 * them.
 *
 *   runs  reduction        x; backward also dy and z: a piece, `run_distance` elements ahead in this run or in the next
 *         apply beside it  forward, z: a piece, AHEAD elements ahead; its x has been reduced before, and is in a cache
 *         apply alone      nothing: one stream, which the hardware follows
 *   rows  reduction        x; backward also dy: as many rows below as are read at once; below the last row the first
 *                          one of the tile to the right, which comes next
 *         apply beside it  nothing: its x is in a cache
 *         apply alone      x, dy, z, and y unless its stores are non-temporal: ROWS rows below
 *
 * A reduction is asked to fetch (`prefetch` of its tile), or the distance is 0.
 */
#define AHEAD MAX(1024, (ptrdiff_t)(4096 / sizeof(elem)))

#ifndef CBN_PREFETCH_H
#define CBN_PREFETCH_H
/* Into L2, not into L1. */
#define FETCH(p) __builtin_prefetch(p, 0, 2)
#define FETCH_TO_WRITE(p) __builtin_prefetch(p, 1, 2)
#endif

#if SUMS
/* Twice as far where nothing is stored; half as far for two arrays. */
INLINE ptrdiff_t LOOP(run_distance)(const cbn_tile *r, const int backward, const int applying)
{
    return !r->prefetch ? 0 : AHEAD * (applying ? 1 : 2) / (backward ? 2 : 1);
}

/* The piece that begins `distance` elements after the i-th of a run, or as many into the next run. */
INLINE void LOOP(fetch_piece)(const elem *run, const elem *next, ptrdiff_t i, ptrdiff_t distance, ptrdiff_t length)
{
    const elem *p = i + distance < length ? run + i + distance : next + i + distance - length;
    for (ptrdiff_t l = 0; l < PIECE; l += LINE_ELEMS)
        FETCH(p + l);
}

/* From an element to the one that is fetched for it. */
typedef struct {
    ptrdiff_t x, g;
} LOOP(distance);

/* Of a reduction that is at row n and reads `rows` rows at once. */
INLINE LOOP(distance) LOOP(row_distance)(const cbn_tile *r, ptrdiff_t n, const ptrdiff_t rows, ptrdiff_t n_rows,
                                         ptrdiff_t columns)
{
    if (!r->prefetch)
        return (LOOP(distance)){0, 0};
    const ptrdiff_t below = n + rows < n_rows ? rows : rows - n_rows, right = below == rows ? 0 : columns;
    return (LOOP(distance)){below * r->x.n + right, below * r->g.n + right};
}
#endif

/* ROWS rows below, of arrays with so many elements from row to row; NULL: no such array, or nothing to fetch of it. */
INLINE void LOOP(fetch_row)(const elem *x, ptrdiff_t x_n, const elem *g, ptrdiff_t g_n, const elem_out *z,
                            ptrdiff_t z_n, const elem_out *y, ptrdiff_t y_n)
{
    FETCH(x + ROWS * x_n);
    if (g)
        FETCH(g + ROWS * g_n);
    if (z)
        FETCH(z + ROWS * z_n);
    if (y)
        FETCH_TO_WRITE(y + ROWS * y_n);
}
