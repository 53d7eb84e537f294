/* vec.h: what a vector, a load and a store are, for one (ELEM, REAL) on one instruction set.
 *
 * The compiler's vector extension gives + - * on vectors, so that the loops read as their formulas and the
 * order of every sum stands in the source. Loads and stores are memcpy, which takes any address. Only a load or
 * a store that converts has intrinsics: gcc 12 makes four instructions of the eight-lane
 * __builtin_convertvector where the processor has one.
 *
 * Defines for loops.h: elem, real, vec, LANES, load, load_real, store, store_real, splat, total.
 */
#define elem LOOP(elem)
#define real LOOP(real)
#define vec LOOP(vec)
#define packed LOOP(packed)
#define load LOOP(load)
#define load_real LOOP(load_real)
#define store LOOP(store)
#define store_real LOOP(store_real)
#define splat LOOP(splat)
#define total LOOP(total)
#define LANES ((ptrdiff_t)(VEC_BYTES / sizeof(REAL)))

typedef ELEM elem;
typedef REAL real;
typedef real vec __attribute__((vector_size(VEC_BYTES)));
typedef elem packed __attribute__((vector_size(VEC_BYTES / sizeof(REAL) * sizeof(ELEM))));

INLINE vec load(const elem *p)
{
#if defined(WIDENS) && VEC_BYTES == 64
    return (vec)_mm512_cvtps_pd(_mm256_loadu_ps(p));
#elif defined(WIDENS) && VEC_BYTES == 32
    return (vec)_mm256_cvtps_pd(_mm_loadu_ps(p));
#else
    packed e;
    memcpy(&e, p, sizeof e);
    return __builtin_convertvector(e, vec);
#endif
}

INLINE void store(elem *p, vec v)
{
#if defined(WIDENS) && VEC_BYTES == 64
    _mm256_storeu_ps(p, _mm512_cvtpd_ps((__m512d)v));
#elif defined(WIDENS) && VEC_BYTES == 32
    _mm_storeu_ps(p, _mm256_cvtpd_ps((__m256d)v));
#else
    packed e = __builtin_convertvector(v, packed);
    memcpy(p, &e, sizeof e);
#endif
}

INLINE vec load_real(const real *p)
{
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE vec splat(real a)
{
    return a - (vec){0}; /* a - 0 keeps a, also the sign of a zero */
}

#ifdef SUMS
INLINE void store_real(real *p, vec v)
{
    memcpy(p, &v, sizeof v);
}

/* The sum of the lanes, halves first: a fixed order. */
INLINE real total(vec v)
{
    for (ptrdiff_t half = LANES / 2; half > 0; half /= 2)
        for (ptrdiff_t i = 0; i < half; i++)
            v[i] += v[i + half];
    return v[0];
}
#endif
