/* integers.h: exact sums of integers, their smallest and largest, and their conversion: a template for one integer type. Plain loops, of
 * which a compiler makes vectors. What they add up fits its type, since they add up few at a time: with the smallest
 * types that hold a few sums these loops go through twice as much memory as with 32 bits.
 *
 * Parameters, undefined again at the end:
 *   TYPE    the name, for symbols
 *   INT     the type of an element
 *   SUM     of a few elements
 *   SQUARE  the square of an element; of int32 its lower 32 bits
 *   MANY    sums of a tile for each column, and
 *   SQUARES of squares
 *
 * A tile leaves rows of int64, `pitch` apart from sum_c on: S(x), the lower 32 bits and the higher part of S(x*x), the
 * smallest and the largest.
 */
#define FEW 8      /* rows that are added up first */
#define WIDTH 1024 /* elements of a run that are like a row */
#define MOST_COLUMNS (CBN_ROW_BYTES / sizeof(float)) /* of a row */
#define IS_I32 (sizeof(INT) == 4)
#define LOW_BITS 0xffffffffu
#define HALF_BITS (4 * (int)sizeof(SQUARE))

typedef struct {
    MANY sum[MOST_COLUMNS];
    SQUARES square[MOST_COLUMNS];
    uint64_t high[IS_I32 ? MOST_COLUMNS : 1];
    INT min[MOST_COLUMNS], max[MOST_COLUMNS];
} LOOP(integer_columns);

/* `first` is some element of each column. */
INLINE void LOOP(begin_columns)(LOOP(integer_columns) *k, const INT *first, ptrdiff_t columns)
{
    memset(k->sum, 0, (size_t)columns * sizeof *k->sum);
    memset(k->square, 0, (size_t)columns * sizeof *k->square);
    memset(k->high, 0, (IS_I32 ? (size_t)columns : 1) * sizeof *k->high);
    memcpy(k->min, first, (size_t)columns * sizeof(INT));
    memcpy(k->max, first, (size_t)columns * sizeof(INT));
}

/* Some rows, FEW or one. */
INLINE void LOOP(add_rows)(LOOP(integer_columns) *restrict k, const INT *restrict x, ptrdiff_t step, ptrdiff_t columns,
                           const int rows, const int extremes)
{
    for (ptrdiff_t j = 0; j < columns; j++) {
        SUM sum = 0;
        SQUARE lower = 0, upper = 0; /* halves of squares, so that a few fit the type of one */
        uint64_t high = 0;
        INT min = k->min[j], max = k->max[j];
        UNROLLED for (int row = 0; row < rows; row++) {
            const INT a = x[row * step + j];
            sum = (SUM)(sum + a);
            const SQUARE square = IS_I32 ? (SQUARE)((int64_t)a * a) : (SQUARE)((SQUARE)a * (SQUARE)a);
            lower = (SQUARE)(lower + (square & ((1u << HALF_BITS) - 1)));
            upper = (SQUARE)(upper + (square >> HALF_BITS));
            if (IS_I32)
                high += (uint64_t)((int64_t)a * a) >> 32;
            if (extremes) {
                min = a < min ? a : min;
                max = a > max ? a : max;
            }
        }
        k->sum[j] += sum;
        k->square[j] += (SQUARES)lower + ((SQUARES)upper << HALF_BITS);
        if (IS_I32)
            k->high[j] += high;
        if (extremes) {
            k->min[j] = min;
            k->max[j] = max;
        }
    }
}

INLINE void LOOP(add_all_rows)(LOOP(integer_columns) *k, const INT *x, ptrdiff_t step, ptrdiff_t columns, ptrdiff_t rows,
                               const int extremes)
{
    for (; rows >= FEW; rows -= FEW, x += FEW * step)
        LOOP(add_rows)(k, x, step, columns, FEW, extremes);
    for (; rows > 0; rows--, x += step)
        LOOP(add_rows)(k, x, step, columns, 1, extremes);
}

/* A channel, from the columns of which it has `copies`, `step` apart, of `length` each. */
INLINE void LOOP(store_channel)(const LOOP(integer_columns) *k, const cbn_tile *r, ptrdiff_t c, ptrdiff_t first,
                                ptrdiff_t step, ptrdiff_t copies, ptrdiff_t length)
{
    int64_t sum = 0, *to = (int64_t *)r->sum_c + c;
    uint64_t low = 0, high = 0;
    INT min = k->min[first], max = k->max[first];
    for (ptrdiff_t copy = 0; copy < copies; copy++)
        for (ptrdiff_t j = first + copy * step; j < first + copy * step + length; j++) {
            sum += k->sum[j];
            low += k->square[j] & LOW_BITS;
            high += ((uint64_t)k->square[j] >> 32) + (IS_I32 ? k->high[j] : 0);
            min = k->min[j] < min ? k->min[j] : min;
            max = k->max[j] > max ? k->max[j] : max;
        }
    to[0] = sum;
    to[r->pitch] = (int64_t)(low & LOW_BITS);
    to[2 * r->pitch] = (int64_t)(high + (low >> 32));
    to[3 * r->pitch] = min;
    to[4 * r->pitch] = max;
}

/* The same of all channels, whose columns are one each, in some copies. */
INLINE void LOOP(store_columns)(const LOOP(integer_columns) *restrict k, const cbn_tile *r)
{
    const ptrdiff_t width = r->n_channels, pitch = r->pitch;
    int64_t *restrict sum = (int64_t *)r->sum_c, *restrict low = sum + pitch, *restrict high = sum + 2 * pitch;
    int64_t *restrict min = sum + 3 * pitch, *restrict max = sum + 4 * pitch;
    for (ptrdiff_t copy = 0; copy < r->copies; copy++)
        for (ptrdiff_t c = 0, j = copy * width; c < width; c++, j++) {
            sum[c] = (copy ? sum[c] : 0) + k->sum[j];
            low[c] = (copy ? low[c] : 0) + (int64_t)(k->square[j] & LOW_BITS);
            high[c] = (copy ? high[c] : 0) + (int64_t)(((uint64_t)k->square[j] >> 32) + (IS_I32 ? k->high[j] : 0));
            min[c] = copy && min[c] < k->min[j] ? min[c] : k->min[j];
            max[c] = copy && max[c] > k->max[j] ? max[c] : k->max[j];
        }
    for (ptrdiff_t c = 0; c < width; c++) {
        high[c] += low[c] >> 32;
        low[c] &= LOW_BITS;
    }
}

INLINE void LOOP(some_integer_runs)(const cbn_tile *r, const int extremes)
{
    LOOP(integer_columns) k;
    const ptrdiff_t columns = r->length < WIDTH ? r->length : WIDTH, rows = r->length / columns;
    const ptrdiff_t rest = r->length - rows * columns;
    for (ptrdiff_t c = 0; c < r->n_channels; c++) {
        const INT *x = (const INT *)r->x.data + c * r->x.c;
        LOOP(begin_columns)(&k, x, columns);
        for (ptrdiff_t n = 0; n < r->n_runs; n++, x += r->x.n) {
            LOOP(add_all_rows)(&k, x, columns, columns, rows, extremes);
            LOOP(add_rows)(&k, x + rows * columns, columns, rest, 1, extremes);
        }
        LOOP(store_channel)(&k, r, c, 0, columns, 1, columns);
    }
}

INLINE void LOOP(some_integer_rows)(const cbn_tile *r, const int extremes)
{
    const ptrdiff_t width = r->n_channels * r->length, columns = r->copies * width;
    LOOP(integer_columns) k;
    LOOP(begin_columns)(&k, (const INT *)r->x.data, columns);
    LOOP(add_all_rows)(&k, (const INT *)r->x.data, r->x.n, columns, r->n_runs, extremes);
    if (r->length == 1)
        LOOP(store_columns)(&k, r);
    for (ptrdiff_t c = 0; c < r->n_channels && r->length > 1; c++)
        LOOP(store_channel)(&k, r, c, c * r->length, width, r->copies, r->length);
}

#define INTEGERS(layout)                                                                                              \
    TARGET static void LOOP(integer_##layout)(const cbn_tile *m, const cbn_tile *r)                                \
    {                                                                                                              \
        (void)m;                                                                                                   \
        if (r->extremes)                                                                                           \
            LOOP(some_integer_##layout)(r, 1);                                                                     \
        else                                                                                                       \
            LOOP(some_integer_##layout)(r, 0);                                                                     \
    }
INTEGERS(runs)
INTEGERS(rows)

TARGET static void LOOP(widen)(const void *from, void *to, ptrdiff_t n)
{
    const INT *restrict x = from;
    float *restrict r = to;
    for (ptrdiff_t i = 0; i < n; i++)
        r[i] = (float)x[i];
}

TARGET static void LOOP(widen_f64)(const void *from, void *to, ptrdiff_t n)
{
    const INT *restrict x = from;
    double *restrict r = to;
    for (ptrdiff_t i = 0; i < n; i++)
        r[i] = x[i];
}

const cbn_loops LOOP(loops) = {
    .forward_runs = LOOP(integer_runs),
    .forward_rows = LOOP(integer_rows),
    .widen = LOOP(widen),
    .widen_f64 = LOOP(widen_f64),
};

#undef INTEGERS
#undef FEW
#undef WIDTH
#undef MOST_COLUMNS
#undef IS_I32
#undef LOW_BITS
#undef HALF_BITS
#undef TYPE
#undef INT
#undef SUM
#undef SQUARE
#undef MANY
#undef SQUARES
