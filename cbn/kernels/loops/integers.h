/* integers.h: exact sums of integers, and their smallest and largest: a template for one integer type. Plain loops, of
 * which a compiler makes vectors; what they add up fits its type because they add up few at a time.
 *
 * Parameters, undefined again at the end:
 *   TYPE    the name, for symbols
 *   INT     the type of an element
 *   SUM     of some elements, and
 *   SQUARE  of some squares; 64 bits of squares are in two parts, which are `LOW_BITS` and the bits above
 *
 * The square of an element has 64 bits or fewer. A tile leaves rows of int64, `pitch` apart from sum_c on: S(x), the
 * lower and the higher part of S(x*x), in units of 2^32, the smallest and the largest.
 */
#define FEW 16384 /* elements of a run; a row of the partition has fewer rows than that */
#define LOW_BITS 0xffffffffu

typedef struct {
    int64_t sum;
    uint64_t low, high;
    INT min, max;
} LOOP(integers);

/* x*x, or its lower 32 bits. */
INLINE SQUARE LOOP(square)(INT x)
{
    if (sizeof(INT) == 4)
        return (SQUARE)((uint64_t)((int64_t)x * x) & LOW_BITS);
    return sizeof(INT) == 2 ? (SQUARE)((uint32_t)x * (uint32_t)x) : (SQUARE)((int)x * (int)x);
}

INLINE void LOOP(add_run)(const INT *restrict x, ptrdiff_t length, LOOP(integers) *k)
{
    INT min = k->min, max = k->max;
    for (ptrdiff_t begin = 0; begin < length; begin += FEW) {
        const ptrdiff_t end = begin + FEW < length ? begin + FEW : length;
        SUM sum = 0;
        SQUARE square = 0;
        uint64_t high = 0;
        for (ptrdiff_t i = begin; i < end; i++) {
            sum += x[i];
            square += LOOP(square)(x[i]);
            if (sizeof(INT) == 4)
                high += (uint64_t)((int64_t)x[i] * x[i]) >> 32;
            min = x[i] < min ? x[i] : min;
            max = x[i] > max ? x[i] : max;
        }
        k->sum += sum;
        k->low += square & LOW_BITS;
        k->high += high + ((uint64_t)square >> 32);
    }
    k->min = min, k->max = max;
}

INLINE void LOOP(store_integers)(const cbn_tile *r, ptrdiff_t c, const LOOP(integers) *k)
{
    int64_t *to = (int64_t *)r->sum_c + c;
    to[0] = k->sum;
    to[r->pitch] = (int64_t)(k->low & LOW_BITS);
    to[2 * r->pitch] = (int64_t)(k->high + (k->low >> 32));
    to[3 * r->pitch] = k->min;
    to[4 * r->pitch] = k->max;
}

TARGET static void LOOP(integer_runs)(const cbn_tile *m, const cbn_tile *r)
{
    (void)m;
    for (ptrdiff_t c = 0; c < r->n_channels; c++) {
        const INT *x = (const INT *)r->x.data + c * r->x.c;
        LOOP(integers) k = {.min = *x, .max = *x};
        for (ptrdiff_t n = 0; n < r->n_runs; n++)
            LOOP(add_run)(x + n * r->x.n, r->length, &k);
        LOOP(store_integers)(r, c, &k);
    }
}

#define MOST_COLUMNS (CBN_ROW_BYTES / sizeof(float)) /* of a row */
typedef struct {
    SUM sum[MOST_COLUMNS];
    SQUARE square[MOST_COLUMNS];
    uint64_t high[sizeof(INT) == 4 ? MOST_COLUMNS : 1];
    INT min[MOST_COLUMNS], max[MOST_COLUMNS];
} LOOP(integer_columns);

/* One row, or four. */
INLINE void LOOP(add_rows)(LOOP(integer_columns) *restrict k, const INT *restrict x, ptrdiff_t step, ptrdiff_t columns,
                           const int rows)
{
    for (ptrdiff_t j = 0; j < columns; j++) {
        SUM sum = 0;
        SQUARE square = 0;
        INT min = k->min[j], max = k->max[j];
        UNROLLED for (int row = 0; row < rows; row++) {
            const INT a = x[row * step + j];
            sum += a;
            square += LOOP(square)(a);
            if (sizeof(INT) == 4)
                k->high[j] += (uint64_t)((int64_t)a * a) >> 32;
            min = a < min ? a : min;
            max = a > max ? a : max;
        }
        k->sum[j] += sum;
        k->square[j] += square;
        k->min[j] = min, k->max[j] = max;
    }
}

TARGET static void LOOP(integer_rows)(const cbn_tile *m, const cbn_tile *r)
{
    const ptrdiff_t columns = r->copies * r->n_channels * r->length;
    LOOP(integer_columns) k;
    (void)m;
    memset(k.sum, 0, (size_t)columns * sizeof *k.sum);
    memset(k.square, 0, (size_t)columns * sizeof *k.square);
    if (sizeof(INT) == 4)
        memset(k.high, 0, sizeof k.high);
    memcpy(k.min, r->x.data, (size_t)columns * sizeof(INT));
    memcpy(k.max, r->x.data, (size_t)columns * sizeof(INT));
    ptrdiff_t n = 0;
    for (; n + 4 <= r->n_runs; n += 4)
        LOOP(add_rows)(&k, (const INT *)r->x.data + n * r->x.n, r->x.n, columns, 4);
    for (; n < r->n_runs; n++)
        LOOP(add_rows)(&k, (const INT *)r->x.data + n * r->x.n, r->x.n, columns, 1);
    for (ptrdiff_t c = 0; c < r->n_channels; c++) {
        LOOP(integers) of_c = {.min = k.min[c * r->length], .max = k.max[c * r->length]};
        for (ptrdiff_t copy = 0; copy < r->copies; copy++)
            for (ptrdiff_t i = 0; i < r->length; i++) {
                const ptrdiff_t j = (copy * r->n_channels + c) * r->length + i;
                of_c.sum += k.sum[j];
                of_c.low += k.square[j] & LOW_BITS;
                of_c.high += ((uint64_t)k.square[j] >> 32) + (sizeof(INT) == 4 ? k.high[j] : 0);
                of_c.min = k.min[j] < of_c.min ? k.min[j] : of_c.min;
                of_c.max = k.max[j] > of_c.max ? k.max[j] : of_c.max;
            }
        LOOP(store_integers)(r, c, &of_c);
    }
}

const cbn_loops LOOP(loops) = {.forward_runs = LOOP(integer_runs), .forward_rows = LOOP(integer_rows)};

#undef FEW
#undef LOW_BITS
#undef MOST_COLUMNS
#undef TYPE
#undef INT
#undef SUM
#undef SQUARE
