/* sums.h: the primitives of reductions, whose sums are float64 vectors whatever the elements are.
 *
 * For the loops: dvec, DLANES, load_d, load_first_d, store_d, load_double, store_double, first_lanes, select_d,
 * smaller, larger, load_first_doubles, splat_d, roots, copy, total; rvec, load_r, load_first_r, store_r, select_r, widened,
 * narrowed, widened_bits, joined; of 16-bit elements lower_d, upper_d, folded_d, add_four and, where a set has them,
 * add_rows and in_order. The types are in vec.h.
 */
#ifndef CBN_VEC_SUMS_H
#define CBN_VEC_SUMS_H
/* From first_64 + 8 - n on: n lanes of ones, then zeros. */
static const int64_t first_64[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
#endif

/* ---- as many elements as a float64 vector has lanes, in the arithmetic of apply ---- */

#if !HAVE_LOAD_R
INLINE rvec load_r(const elem *p)
{
    rvec v = {0};
#if HALF
    UNROLLED for (ptrdiff_t i = 0; i < DLANES; i++)
        v[i] = HALF == F16 ? cbn_from_f16(p[i]) : cbn_from_bf16(p[i]);
#else
    memcpy(&v, p, sizeof v);
#endif
    return v;
}
#endif

/* The first n < DLANES elements, and zeros. */
#if !HAVE_LOAD_FIRST_R
INLINE rvec load_first_r(const elem *p, ptrdiff_t n)
{
#if ELEM_IS_DOUBLE
    return load_part(p, 0, n);
#else
    rvec v = {0};
    for (ptrdiff_t i = 0; i < n; i++)
        v[i] = HALF == F16 ? cbn_from_f16((uint16_t)p[i]) : HALF == BF16 ? cbn_from_bf16((uint16_t)p[i]) : (float)p[i];
    return v;
#endif
}
#endif

#if !HAVE_WIDENED
INLINE dvec widened(rvec v)
{
    return __builtin_convertvector(v, dvec);
}

INLINE dvec_bits widened_bits(rvec_bits b)
{
    return __builtin_convertvector(b, dvec_bits);
}

INLINE rvec narrowed(dvec v)
{
    return __builtin_convertvector(v, rvec);
}
#endif

/* A vector for apply, of two halves; where elements are float64 the first one is all of it. */
#if !HAVE_JOINED
INLINE vec joined(rvec low, rvec high)
{
    vec v;
    if (sizeof v > sizeof low)
        memcpy((char *)&v + sizeof v / 2, &high, sizeof v / 2);
    memcpy(&v, &low, sizeof low);
    return v;
}
#endif

INLINE rvec select_r(rvec_bits condition, rvec a, rvec b)
{
    return (rvec)(((rvec_bits)a & condition) | ((rvec_bits)b & ~condition));
}

/* ---- float64 lanes ---- */

/* Elements as float64. */
INLINE dvec load_d(const elem *p)
{
    return widened(load_r(p));
}

/* The first n < DLANES elements as float64, and zeros. */
INLINE dvec load_first_d(const elem *p, ptrdiff_t n)
{
    return widened(load_first_r(p, n));
}

INLINE dvec load_double(const double *p)
{
    dvec v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store_double(double *p, dvec v)
{
    memcpy(p, &v, sizeof v);
}

INLINE dvec splat_d(double a)
{
    return a - (dvec){0};
}

#if !HAVE_ROOTS
INLINE dvec roots(dvec v)
{
    for (ptrdiff_t i = 0; i < DLANES; i++)
        v[i] = sqrt(v[i]);
    return v;
}
#endif

/* v with all but its first n < DLANES lanes zero, whatever they are. */
INLINE dvec first_lanes(dvec v, ptrdiff_t n)
{
    dvec_bits keep;
    memcpy(&keep, first_64 + 8 - n, sizeof keep);
    return (dvec)((dvec_bits)v & keep);
}

#if !HAVE_SELECT_D
INLINE dvec select_d(dvec_bits condition, dvec a, dvec b)
{
    return (dvec)(((dvec_bits)a & condition) | ((dvec_bits)b & ~condition));
}
#endif

/* Lane by lane a where it is smaller (or larger) than b, else b: also where a is NaN. */
#if !HAVE_SMALLER
INLINE rvec smaller(rvec a, rvec b)
{
    return select_r(a < b, a, b);
}

INLINE rvec larger(rvec a, rvec b)
{
    return select_r(a > b, a, b);
}
#endif

/* The first n < DLANES values, and zeros; no other is read. */
INLINE dvec load_first_doubles(const double *p, ptrdiff_t n)
{
    dvec v = {0};
    for (ptrdiff_t i = 0; i < n; i++)
        v[i] = p[i];
    return v;
}

/* The sum of the lanes, halves first: a fixed order. */
INLINE double total(dvec v)
{
    for (ptrdiff_t half = DLANES / 2; half > 0; half /= 2)
        for (ptrdiff_t i = 0; i < half; i++)
            v[i] += v[i + half];
    return v[0];
}

/* ---- back to elements ---- */

#if !HAVE_PACK_D
/* Lanes rounded to elements. */
INLINE packed_r pack_d(dvec v)
{
#if HALF == F16
    packed_r e;
    for (ptrdiff_t i = 0; i < DLANES; i++)
        e[i] = cbn_to_f16((float)v[i]);
    return e;
#elif HALF
    typedef float floats __attribute__((vector_size(DLANES * sizeof(float))));
    typedef uint32_t words __attribute__((vector_size(DLANES * sizeof(float))));
    const floats f = __builtin_convertvector(v, floats);
    const words bits = (words)f, nan = (words)(f != f);
    const words nearest = ((bits + 0x7fff + (bits >> 16 & 1)) & ~nan) | ((bits | 1 << 22) & nan);
    return __builtin_convertvector(nearest >> 16, packed_r);
#else
    return __builtin_convertvector(v, packed_r);
#endif
}

/* The same of lanes that elements hold exactly. */
INLINE packed_r pack_r(rvec v)
{
#if HALF == F16
    packed_r e;
    for (ptrdiff_t i = 0; i < DLANES; i++)
        e[i] = cbn_to_f16(v[i]);
    return e;
#elif HALF
    typedef uint32_t words __attribute__((vector_size(DLANES * sizeof(float))));
    return __builtin_convertvector((words)v >> 16, packed_r);
#else
    return v;
#endif
}
#endif

INLINE void LOOP(store_packed)(elem *p, packed_r e, ptrdiff_t n)
{
    if (n == DLANES)
        memcpy(p, &e, sizeof e);
    else
        for (ptrdiff_t i = 0; i < n; i++)
            p[i] = e[i];
}

/* The first n lanes as elements. */
INLINE void store_d(elem *p, dvec v, ptrdiff_t n)
{
    LOOP(store_packed)(p, pack_d(v), n);
}

INLINE void store_r(elem *p, rvec v, ptrdiff_t n)
{
    LOOP(store_packed)(p, pack_r(v), n);
}

INLINE void copy(elem *to, const elem *from, ptrdiff_t n)
{
    if (n == DLANES)
        memcpy(to, from, DLANES * sizeof *to);
    else
        for (ptrdiff_t i = 0; i < n; i++)
            to[i] = from[i];
}

/* ---- short float32 sums of 16-bit elements ---- */

#if HALF
#if !HAVE_LOWER_D
/* Lanes of the lower and of the upper half. */
INLINE dvec lower_d(vec v)
{
    rvec low;
    memcpy(&low, &v, sizeof low);
    return widened(low);
}

INLINE dvec upper_d(vec v)
{
    rvec high;
    memcpy(&high, (const char *)&v + sizeof high, sizeof high);
    return widened(high);
}
#endif

/* The sum of both. A set may add before it converts: of short float32 sums, see `reduce_short`. */
#if !HAVE_FOLDED_D
INLINE dvec folded_d(vec v)
{
    return lower_d(v) + upper_d(v);
}
#endif

/* The elements of two vectors in some order. */
#if !HAVE_LOAD_TWO
INLINE void load_two(const elem *p, vec *v)
{
    v[0] = load(p);
    v[1] = load(p + LANES);
}
#endif

/* sum += d and square += d*d of n <= 4*LANES elements, to either of two. d = x - shift; of bfloat16 it is x, see
 * `reduce_short`. */
#if !HAVE_ADD_FOUR
INLINE void add_four(const elem *p, ptrdiff_t n, vec shift, vec *sum, vec *square)
{
    for (ptrdiff_t i = 0; i < n; i += 2 * LANES) {
        const ptrdiff_t left[2] = {n - i, n - i - LANES}; /* negative: none */
        vec x[2] = {{0}};
        if (n == 4 * LANES)
            load_two(p + i, x);
        for (int k = 0; k < 2 && left[k] > 0; k++) {
            if (n < 4 * LANES)
                x[k] = left[k] >= LANES ? load(p + i + k * LANES) : load_part(p + i + k * LANES, 0, left[k]);
            vec d = HALF == BF16 ? x[k] : x[k] - shift;
            if (HALF != BF16 && left[k] < LANES)
                d = blend(d, (vec){0}, 0, left[k]);
            sum[k] += d;
            square[k] += d * d;
        }
    }
}
#endif
#endif
