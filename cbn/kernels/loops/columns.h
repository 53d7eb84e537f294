/* columns.h: what rows need for each column: factors, sums, coefficients of the forward pass; and how rows are reduced.
 *
 * A column is a place in a row. Column j belongs to channel j / length % n_channels, so several may share a channel.
 */
#define FLUSH_ROWS (ELEM_IS_DOUBLE ? 8 : 32) /* the additions of a float64 sum, forward; see `totals` in runs.h */
#define COLUMNS (CBN_ROW_BYTES / MAX(sizeof(elem), sizeof(float))) /* most columns of a row */
/* The length of an array with a value of each column. It has room for less than a cache line more, where a tile has to
 * begin and end with cache lines of y, and for less than another one before the first column, so that factors are
 * aligned where y is. It is not 4 KB, so that a store to one array delays no load from another (4 KB aliasing). */
#define ROOM (COLUMNS + 2 * LINE_ELEMS)

/* A value of each channel, made a value of each column in its place. */
#define SPREAD(t, value)                                                                                       \
    do {                                                                                                       \
        const ptrdiff_t width_ = (t)->n_channels * (t)->length, all_ = (t)->copies * width_;                   \
        for (ptrdiff_t c = (t)->n_channels - 1; c >= 0 && (t)->length > 1; c--) {                              \
            const __typeof__(*(value)) of_c_ = (value)[c];                                                     \
            for (ptrdiff_t i_ = 0; i_ < (t)->length; i_++)                                                     \
                (value)[c * (t)->length + i_] = of_c_;                                                         \
        }                                                                                                      \
        for (ptrdiff_t done_ = width_; done_ < all_; done_ *= 2) /* twice as many copies each time */          \
            memcpy((value) + done_, (value), (size_t)MIN(done_, all_ - done_) * sizeof *(value));              \
    } while (0)

#if SUMS
/* A value of each channel for each column, and zeros in the vector that the last one is in. */
INLINE void LOOP(spread)(const cbn_tile *t, const double *of_channel, double *of_column)
{
    const ptrdiff_t columns = t->copies * t->n_channels * t->length;
    memcpy(of_column, of_channel, (size_t)t->n_channels * sizeof *of_column);
    SPREAD(t, of_column);
    memset(of_column + columns, 0, (size_t)(-columns & (DLANES - 1)) * sizeof *of_column);
}

/* The sum of each channel, from the sums of its columns, which are used up. One half of the copies is added to the
 * other, as often as it takes, so that each sum takes few additions. */
INLINE void LOOP(fold)(const cbn_tile *t, double *column, double *sum_c)
{
    const ptrdiff_t width = t->n_channels * t->length;
    for (ptrdiff_t copies = t->copies, half; copies > 1; copies = half) {
        half = (copies + 1) / 2;
        const ptrdiff_t columns = (copies - half) * width;
        ptrdiff_t i = 0;
        for (; i + DLANES <= columns; i += DLANES)
            store_double(column + i, load_double(column + i) + load_double(column + half * width + i));
        for (; i < columns; i++)
            column[i] += column[half * width + i];
    }
    for (ptrdiff_t c = 0; c < t->n_channels && t->length == 1; c++)
        sum_c[c] = column[c];
    for (ptrdiff_t c = 0; c < t->n_channels && t->length > 1; c++, column += t->length) {
        dvec sum = {0};
        ptrdiff_t i = 0;
        for (; i + DLANES <= t->length; i += DLANES)
            sum += load_double(column + i);
        if (i < t->length)
            sum += first_lanes(load_double(column + i), t->length - i);
        sum_c[c] = total(sum);
    }
}
/* Elements from row to row. */
typedef struct {
    ptrdiff_t x, g, z, dh;
} LOOP(steps);

/* What a value of each channel becomes for each column. */
typedef struct {
    double shift[ROOM], sum[ROOM], square[ROOM];
    union {
        struct { /* forward: what `sum` and `square` are added to after some rows; or what float16 subtracts */
            double total_sum[ROOM], total_square[ROOM];
#if ELEM_IS_DOUBLE
            double sum_low[ROOM], square_low[ROOM];
#endif
        };
        real short_shift[ROOM];
        struct { /* backward: factors of the forward pass; coefficients of channels that took the loops in float64 */
            real of_forward[SLOPE][ROOM];
            int some_in_float64;
#if !ELEM_IS_DOUBLE
            lane_int in_float64[ROOM];
            double float64_scale[ROOM], float64_offset[ROOM];
#endif
        };
    };
} LOOP(columns);

/* Whether the sums begin with these rows; whether they end with them, and go to the totals, which may hold others. */
typedef struct {
    int begin, end, more;
} LOOP(turn);

INLINE LOOP(turn) LOOP(turn_of)(ptrdiff_t n, ptrdiff_t height, ptrdiff_t n_runs, const int flushing)
{
    if (!flushing)
        return (LOOP(turn)){n == 0, 0, 0};
    return (LOOP(turn)){n % FLUSH_ROWS == 0, (n + height) % FLUSH_ROWS == 0 || n + height == n_runs, n >= FLUSH_ROWS};
}

INLINE void LOOP(load_sums)(const LOOP(columns) *k, ptrdiff_t j, LOOP(turn) turn, dvec *sum, dvec *square)
{
    *sum = turn.begin ? (dvec){0} : load_double(k->sum + j);
    *square = turn.begin ? (dvec){0} : load_double(k->square + j);
}

/* Adds to a total, which holds others if there are `more`; exactly for float64 elements. */
INLINE void LOOP(add_to_total)(double *total, double *low, const int more, dvec sum)
{
#if ELEM_IS_DOUBLE
    dvec t = more ? load_double(total) : (dvec){0}, t_low = more ? load_double(low) : (dvec){0};
    LOOP(add_exactly)(&t, &t_low, sum);
    store_double(total, t);
    store_double(low, t_low);
#else
    (void)low;
    store_double(total, more ? load_double(total) + sum : sum);
#endif
}

/* Ends an exact total: both parts as one. */
INLINE void LOOP(take_low)(double *total, const double *low)
{
    store_double(total, LOOP(in_one)(load_double(total), load_double(low)));
}

INLINE void LOOP(store_sums)(LOOP(columns) *k, ptrdiff_t j, LOOP(turn) turn, dvec sum, dvec square)
{
    if (!turn.end) {
        store_double(k->sum + j, sum);
        store_double(k->square + j, square);
        return;
    }
#if ELEM_IS_DOUBLE
    LOOP(add_to_total)(k->total_sum + j, k->sum_low + j, turn.more, sum);
    LOOP(add_to_total)(k->total_square + j, k->square_low + j, turn.more, square);
#else
    LOOP(add_to_total)(k->total_sum + j, NULL, turn.more, sum);
    LOOP(add_to_total)(k->total_square + j, NULL, turn.more, square);
#endif
}

/* The inputs of the activation, n <= LANES columns from the j-th on. */
INLINE void LOOP(inputs_of_columns)(LOOP(source) p, ptrdiff_t j, ptrdiff_t n, const LOOP(columns) *k, const vec *f,
                                    const int kind, real *input)
{
    const vec a = LOOP(input)(p.x, p.z, j, n, f, kind);
    memcpy(input, &a, sizeof a);
#if !ELEM_IS_DOUBLE
    for (ptrdiff_t i = 0; UNLIKELY(k->some_in_float64) && i < n; i += DLANES) {
        rvec narrow;
        rvec_bits in_float64;
        memcpy(&narrow, input + i, sizeof narrow);
        memcpy(&in_float64, k->in_float64 + j + i, sizeof in_float64);
        const dvec mean = load_double(k->shift + j + i), scale = load_double(k->float64_scale + j + i);
        const dvec offset = load_double(k->float64_offset + j + i);
        const rvec better = LOOP(input_in_float64)(p, j + i, MIN(n - i, DLANES), mean, scale, offset);
        narrow = select_r(in_float64, better, narrow);
        memcpy(input + i, &narrow, sizeof narrow);
    }
#else
    (void)k;
#endif
}

/* The same for a cache line of some rows. */
INLINE void LOOP(inputs_of_line)(LOOP(source) p, LOOP(steps) step, ptrdiff_t height, ptrdiff_t j,
                                 const LOOP(columns) *k, const int kind, real (*input)[LINE_ELEMS])
{
    UNROLLED for (int v = 0; v < LINE_ELEMS / LANES; v++) {
        const ptrdiff_t at = j + v * LANES;
        const vec f[SLOPE] = {load_real(k->of_forward[HIGH] + at), load_real(k->of_forward[SCALE] + at),
                              load_real(k->of_forward[TERM] + at)};
        LOOP(source) of_row = p;
        for (ptrdiff_t row = 0; row < height; row++) {
            LOOP(inputs_of_columns)(of_row, at, LANES, k, f, kind, input[row] + v * LANES);
            of_row.x += step.x;
            of_row.z = p.z ? of_row.z + step.z : NULL;
        }
    }
}

/* What the reduction behind an activation needs of the forward pass. */
INLINE void LOOP(spread_forward)(const cbn_tile *r, LOOP(columns) *k)
{
    const ptrdiff_t columns = r->copies * r->n_channels * r->length;
    LOOP(factors)(r->forward_c, r->pitch, r->n_channels, k->of_forward[0], ROOM, 1, 0);
    for (int i = 0; i < SLOPE; i++) {
        SPREAD(r, k->of_forward[i]);
        memset(k->of_forward[i] + columns, 0, LINE_ELEMS * sizeof(real));
    }
    k->some_in_float64 = 0;
#if !ELEM_IS_DOUBLE
    for (ptrdiff_t c = 0; c < r->n_channels; c++) {
        k->in_float64[c] = -(r->forward_c[CBN_IN_FLOAT64 * r->pitch + c] != 0);
        k->some_in_float64 |= k->in_float64[c];
    }
    if (k->some_in_float64) {
        SPREAD(r, k->in_float64);
        LOOP(spread)(r, r->forward_c + CBN_SCALE * r->pitch, k->float64_scale);
        LOOP(spread)(r, r->forward_c + CBN_OFFSET * r->pitch, k->float64_offset);
    }
#endif
}

INLINE LOOP(source) LOOP(row_source)(const cbn_tile *r, ptrdiff_t row, LOOP(activation) act, const int backward)
{
    LOOP(source) p = {AT(r->x, row, 0), AT(r->g, row, 0), NULL, NULL, NULL};
    if (backward && act.kind != PLAIN) {
        p.dh = AT(r->dh, row, 0);
        p.z = r->z.data ? AT(r->z, row, 0) : NULL;
    }
    return p;
}

#if HALF && HAVE_ADD_ROWS
/* Forward, 16-bit elements: a cache line of some rows, whose float32 sums are added to `sum` and `square`. See
 * `reduce_short`. */
INLINE void LOOP(reduce_line_short)(LOOP(source) p, ptrdiff_t step, ptrdiff_t height, ptrdiff_t j, ptrdiff_t ahead,
                                    const LOOP(columns) *k, dvec *sum, dvec *square)
{
    vec s[2] = {{0}}, q[2] = {{0}};
    (void)k;
    for (ptrdiff_t row = 0; row < height; row += 2) {
        const elem *x = p.x + row * step + j, *below = row + 1 < height ? x + step : NULL;
        FETCH(x + ahead);
        if (below)
            FETCH(below + ahead);
        LOOP(add_rows)(x, below, s, q);
    }
    LOOP(in_order)(s);
    LOOP(in_order)(q);
    for (int v = 0; v < LINE_ELEMS / LANES; v++) {
        sum[2 * v] += lower_d(s[v]);
        sum[2 * v + 1] += upper_d(s[v]);
        square[2 * v] += lower_d(q[v]);
        square[2 * v + 1] += upper_d(q[v]);
    }
}
#elif HALF
INLINE void LOOP(reduce_line_short)(LOOP(source) p, ptrdiff_t step, ptrdiff_t height, ptrdiff_t j, ptrdiff_t ahead,
                                    const LOOP(columns) *k, dvec *sum, dvec *square)
{
    for (ptrdiff_t block = 0; block < height; block += ROWS)
        for (int v = 0; v < LINE_ELEMS / LANES; v++) {
            const vec short_shift = HALF == F16 ? load_real(k->short_shift + j + v * LANES) : (vec){0};
            vec s = {0}, q = {0};
            for (ptrdiff_t row = block; row < MIN(block + ROWS, height); row++) {
                const elem *x = p.x + row * step + j + v * LANES;
                if (v == 0)
                    FETCH(x + ahead);
                const vec d = HALF == BF16 ? load(x) : load(x) - short_shift;
                s += d;
                q += d * d;
            }
            sum[2 * v] += lower_d(s);
            sum[2 * v + 1] += upper_d(s);
            square[2 * v] += lower_d(q);
            square[2 * v + 1] += upper_d(q);
        }
}
#endif

/* A cache line of columns of some rows. */
INLINE void LOOP(reduce_line)(LOOP(source) p, LOOP(steps) step, ptrdiff_t height, ptrdiff_t j, LOOP(distance) ahead,
                              LOOP(columns) *k, LOOP(activation) act, const int activated, LOOP(turn) turn,
                              const int backward, const int sum_in_float64)
{
    dvec shift[LINE_ELEMS / DLANES], sum[LINE_ELEMS / DLANES], square[LINE_ELEMS / DLANES];
    real input[ROWS][LINE_ELEMS]; /* backward goes through so many at most */
    if (backward && activated && (ELEM_IS_DOUBLE || p.z))
        LOOP(inputs_of_line)(p, step, height, j, k, CHECKED, input);
    else if (backward && activated)
        LOOP(inputs_of_line)(p, step, height, j, k, ACTIVATED, input);
    if (backward && activated && UNLIKELY(act.clips))
        LOOP(between)(input[0], height * LINE_ELEMS, act);
    for (int v = 0; v < LINE_ELEMS / DLANES; v++) {
        shift[v] = load_double(k->shift + j + v * DLANES);
        LOOP(load_sums)(k, j + v * DLANES, turn, &sum[v], &square[v]);
    }
#if HALF
    if (!sum_in_float64)
        LOOP(reduce_line_short)(p, step.x, height, j, ahead.x, k, sum, square);
#endif
    for (ptrdiff_t row = 0; sum_in_float64 && row < height; row++) {
        FETCH(p.x + j + ahead.x);
        if (backward)
            FETCH(p.g + j + ahead.g);
        for (int v = 0; v < LINE_ELEMS / DLANES; v++)
            LOOP(reduce_some)(p, j + v * DLANES, DLANES, shift[v], input[backward ? row : 0] + v * DLANES, act, &sum[v],
                              &square[v], activated, backward, 0);
        p.x += step.x;
        p.g += step.g;
        if (backward && activated) {
            p.dh += step.dh;
            p.z = p.z ? p.z + step.z : NULL;
        }
    }
    for (int v = 0; v < LINE_ELEMS / DLANES; v++)
        LOOP(store_sums)(k, j + v * DLANES, turn, sum[v], square[v]);
}

/* Whole cache lines of some rows that are as far apart in both arrays: the same where no activation follows and nothing
 * is fetched. With one distance, as the compiler has few registers for more. */
INLINE void LOOP(reduce_across)(LOOP(source) p, ptrdiff_t step, const ptrdiff_t height, ptrdiff_t columns,
                                LOOP(columns) *k, LOOP(turn) turn, const int backward)
{
    for (ptrdiff_t j = 0; j < columns; j += LINE_ELEMS) {
        const elem *x = p.x + j, *g = p.g + j;
        dvec sum[LINE_ELEMS / DLANES], square[LINE_ELEMS / DLANES];
        UNROLLED for (int v = 0; v < LINE_ELEMS / DLANES; v++)
            LOOP(load_sums)(k, j + v * DLANES, turn, &sum[v], &square[v]);
        UNROLLED for (ptrdiff_t row = 0; row < height; row++)
            UNROLLED for (int v = 0; v < LINE_ELEMS / DLANES; v++)
                LOOP(reduce_some)((LOOP(source)){x + row * step, g + row * step, NULL, NULL, NULL}, v * DLANES, DLANES,
                                  load_double(k->shift + j + v * DLANES), NULL, (LOOP(activation)){.kind = PLAIN},
                                  &sum[v], &square[v], 0, backward, 0);
        UNROLLED for (int v = 0; v < LINE_ELEMS / DLANES; v++)
            LOOP(store_sums)(k, j + v * DLANES, turn, sum[v], square[v]);
    }
}

/* Columns begin to end, less than a cache line; what lies beyond the end is room. */
INLINE void LOOP(reduce_part)(const cbn_tile *r, ptrdiff_t n, ptrdiff_t height, ptrdiff_t begin, ptrdiff_t end,
                              LOOP(columns) *k, LOOP(activation) act, LOOP(turn) turn, const int backward)
{
    for (ptrdiff_t j = begin; j < end; j += DLANES) {
        const ptrdiff_t lanes = MIN(end - j, DLANES);
        const dvec shift = load_double(k->shift + j);
        real input[LANES] = {0};
        vec f[SLOPE] = {{0}};
        for (int i = 0; backward && act.kind != PLAIN && i < SLOPE; i++)
            f[i] = load_real(k->of_forward[i] + j);
        dvec sum, square;
        LOOP(load_sums)(k, j, turn, &sum, &square);
        for (ptrdiff_t row = n; row < n + height; row++) {
            const LOOP(source) p = LOOP(row_source)(r, row, act, backward);
            if (backward && act.kind != PLAIN)
                LOOP(inputs_of_columns)(p, j, lanes, k, f, CHECKED, input);
            if (act.clips)
                LOOP(between)(input, LANES, act);
            if (lanes == DLANES)
                LOOP(reduce_some)(p, j, DLANES, shift, input, act, &sum, &square, act.kind != PLAIN, backward, 0);
            else
                LOOP(reduce_some)(p, j, lanes, shift, input, act, &sum, &square, act.kind != PLAIN, backward, 0);
        }
        LOOP(store_sums)(k, j, turn, sum, square);
    }
}

/* What each column needs at the beginning of a reduction. */
INLINE void LOOP(begin_reduce_rows)(LOOP(columns) *k, const cbn_tile *r, ptrdiff_t columns, LOOP(activation) act,
                                    const int backward)
{
    LOOP(spread)(r, r->shift_c, k->shift);
    for (ptrdiff_t j = 0; HALF == F16 && !backward && j < columns; j++)
        k->short_shift[j] = (real)k->shift[j];
    if (backward && act.kind != PLAIN)
        LOOP(spread_forward)(r, k);
}

/* A cache line of columns, or what is left of one, of the `height` rows from the n-th on; `p` is the first of them. */
INLINE void LOOP(reduce_columns)(LOOP(columns) *k, const cbn_tile *r, LOOP(source) p, LOOP(steps) step, ptrdiff_t n,
                                 ptrdiff_t height, ptrdiff_t j, ptrdiff_t columns, LOOP(distance) ahead,
                                 LOOP(activation) act, LOOP(turn) turn, const int plain, const int backward,
                                 const int sum_in_float64, const ptrdiff_t rows)
{
    if (j + LINE_ELEMS > columns) {
        if (j < columns)
            LOOP(reduce_part)(r, n, height, j, columns, k, act, turn, backward);
        return;
    }
    if (height == rows && backward && !plain && (!ELEM_IS_DOUBLE || act.kind != PLAIN))
        LOOP(reduce_line)(p, step, rows, j, ahead, k, act, 1, turn, backward, sum_in_float64);
    else if (height == rows)
        LOOP(reduce_line)(p, step, rows, j, ahead, k, act, 0, turn, backward, sum_in_float64);
    else
        LOOP(reduce_line)(p, step, height, j, ahead, k, act, act.kind != PLAIN, turn, backward, sum_in_float64);
}

/* The sum of each channel; zeros, if no row has `begun` them. */
INLINE void LOOP(end_reduce_rows)(LOOP(columns) *k, const cbn_tile *r, ptrdiff_t columns, int begun, const int flushing)
{
    for (ptrdiff_t j = 0; !begun && j < columns; j++)
        k->sum[j] = k->square[j] = 0;
#if ELEM_IS_DOUBLE
    for (ptrdiff_t j = 0; flushing && j < columns; j += DLANES) {
        LOOP(take_low)(k->total_sum + j, k->sum_low + j);
        LOOP(take_low)(k->total_square + j, k->square_low + j);
    }
#endif
    LOOP(fold)(r, flushing ? k->total_sum : k->sum, r->sum_c);
    LOOP(fold)(r, flushing ? k->total_square : k->square, r->square_c);
}
#endif
