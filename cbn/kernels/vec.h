/* vec.h: what a vector, a load and a store are, for one (ELEM, REAL) on one instruction set.
 *
 * The compiler's vector extension gives + - * on vectors, so that the loops read as their formulas and the
 * order of every sum stands in the source. Loads and stores are memcpy, which takes any address. Intrinsics are
 * there for a load or a store that converts (gcc 12 makes four instructions of the eight-lane
 * __builtin_convertvector where the processor has one) and for a store past the caches.
 *
 * Defines for loops.h: elem, real, vec, LANES, load, load_real, store, store_past, store_real, splat, last_lanes, total.
 */
#define elem LOOP(elem)
#define real LOOP(real)
#define vec LOOP(vec)
#define packed LOOP(packed)
#define load LOOP(load)
#define load_real LOOP(load_real)
#define convert LOOP(convert)
#define store LOOP(store)
#define store_past LOOP(store_past)
#define store_real LOOP(store_real)
#define splat LOOP(splat)
#define last_lanes LOOP(last_lanes)
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

INLINE packed convert(vec v)
{
#if defined(WIDENS) && VEC_BYTES == 64
    return (packed)_mm512_cvtpd_ps((__m512d)v);
#elif defined(WIDENS) && VEC_BYTES == 32
    return (packed)_mm256_cvtpd_ps((__m256d)v);
#else
    return __builtin_convertvector(v, packed);
#endif
}

INLINE void store(elem *p, vec v)
{
    packed e = convert(v);
    memcpy(p, &e, sizeof e);
}

/* A store that does not read the line from memory first, nor keep it in a cache; p is aligned to its size. */
INLINE void store_past(elem *p, vec v)
{
#if !defined(__x86_64__)
    store(p, v);
#elif VEC_BYTES == 64 && defined(WIDENS)
    _mm256_stream_si256((__m256i *)p, (__m256i)convert(v));
#elif VEC_BYTES == 64
    _mm512_stream_si512((__m512i *)p, (__m512i)convert(v));
#elif VEC_BYTES == 32 && defined(WIDENS)
    _mm_stream_si128((__m128i *)p, (__m128i)convert(v));
#elif VEC_BYTES == 32
    _mm256_stream_si256((__m256i *)p, (__m256i)convert(v));
#elif defined(WIDENS)
    store(p, v); /* there is no such store of 8 bytes from a vector */
#else
    _mm_stream_si128((__m128i *)p, (__m128i)convert(v));
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

/* v with all but its last n lanes zero, whatever they are. */
INLINE vec last_lanes(vec v, ptrdiff_t n)
{
    static const long long mask[] = {0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1};
    typedef long long bits __attribute__((vector_size(VEC_BYTES)));
    bits keep;
    memcpy(&keep, mask + 8 - LANES + n, sizeof keep);
    return (vec)((bits)v & keep);
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
