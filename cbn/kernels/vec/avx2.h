/* avx2.h: what AVX2 with FMA and F16C does better than vec.h and sums.h. */
#define STORE_FENCE() _mm_sfence()

#ifndef CBN_VEC_AVX2_H
#define CBN_VEC_AVX2_H
/* Lanes from begin to end: all bits, or none. */
INLINE __m128i four_lanes(ptrdiff_t begin, ptrdiff_t end)
{
    const __m128i lane = _mm_set_epi32(3, 2, 1, 0);
    return _mm_and_si128(_mm_cmpgt_epi32(lane, _mm_set1_epi32((int)begin - 1)),
                         _mm_cmpgt_epi32(_mm_set1_epi32((int)end), lane));
}
#endif

#if HALF
/* Four or eight 16-bit numbers as float32. */
INLINE __m128 LOOP(floats_128)(__m128i e)
{
    return HALF == F16 ? _mm_cvtph_ps(e) : _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(e), 16));
}

INLINE __m256 LOOP(floats_256)(__m128i e)
{
    return HALF == F16 ? _mm256_cvtph_ps(e) : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(e), 16));
}
#endif

/* ---- vec.h ---- */

#define HAVE_UNPACK (X_KIND != REAL_KIND && !(WIDENS && HALF))
#if HAVE_UNPACK
INLINE vec unpack(packed e)
{
#if BYTE
    const __m128i low = _mm_cvtsi64_si128((long long)e);
    return (vec)_mm256_cvtepi32_ps(X_KIND == U8 ? _mm256_cvtepu8_epi32(low) : _mm256_cvtepi8_epi32(low));
#elif HALF
    return (vec)LOOP(floats_256)((__m128i)e);
#else
    return (vec)_mm256_cvtps_pd((__m128)e);
#endif
}
#endif

#define HAVE_UNPACK_OUT (BYTE && HALF)
#if HAVE_UNPACK_OUT
INLINE vec unpack_out(packed_out e)
{
    return (vec)LOOP(floats_256)((__m128i)e);
}
#endif

/* Of two operands of which one is NaN, the processor takes the second. */
#define HAVE_CLAMPED 1
INLINE vec clamped(vec v, vec low, vec high)
{
#if REAL_KIND == F64
    return (vec)_mm256_min_pd((__m256d)high, _mm256_max_pd((__m256d)low, (__m256d)v));
#else
    return (vec)_mm256_min_ps((__m256)high, _mm256_max_ps((__m256)low, (__m256)v));
#endif
}

#define HAVE_LANES_OF 1
INLINE lane_bits lanes_of(const int8_t *p)
{
#if REAL_KIND == F64
    int bytes;
    memcpy(&bytes, p, sizeof bytes);
    return (lane_bits)_mm256_cvtepi8_epi64(_mm_cvtsi32_si128(bytes));
#else
    return (lane_bits)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p));
#endif
}

#define HAVE_PACK (Y_KIND != REAL_KIND && !(WIDENS && HALF))
#if HAVE_PACK
INLINE packed_out pack(vec v)
{
#if HALF == F16
    return (packed_out)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#elif HALF
    const __m256i r = (__m256i)(rounded(v) >> 16), low = _mm256_packus_epi32(r, r); /* twice in each 128 bits */
    return (packed_out)_mm256_castsi256_si128(_mm256_permute4x64_epi64(low, 8));
#else
    return (packed_out)_mm256_cvtpd_ps((__m256d)v);
#endif
}
#endif

#if HALF && !BYTE
/* Elements from begin to end <= 4. Put together in a register: store forwarding cannot merge the parts that a loop
 * would store, so a load of the whole would wait until they are in L1. */
INLINE long long LOOP(some_words)(const elem *p, ptrdiff_t begin, ptrdiff_t end)
{
    uint64_t words = 0;
    for (ptrdiff_t i = begin; i < end; i++)
        words |= (uint64_t)p[i] << 16 * i;
    return (long long)words;
}
#endif

#define HAVE_LOAD_PART (!BYTE && !(WIDENS && HALF))
#if HAVE_LOAD_PART
INLINE vec load_part(const elem *p, ptrdiff_t begin, ptrdiff_t end)
{
#if ELEM_IS_DOUBLE
    return (vec)_mm256_maskload_pd(p, (__m256i)some_lanes(begin, end));
#elif WIDENS
    return unpack((packed)_mm_maskload_ps(p, four_lanes(begin, end)));
#elif HALF
    return unpack((packed)_mm_set_epi64x(LOOP(some_words)(p + 4, begin > 4 ? begin - 4 : 0, end - 4),
                                         LOOP(some_words)(p, begin, end < 4 ? end : 4)));
#else
    return (vec)_mm256_maskload_ps(p, (__m256i)some_lanes(begin, end));
#endif
}
#endif

#define HAVE_STORE_PART (!HALF)
#if HAVE_STORE_PART
INLINE void store_part(elem_out *p, vec v, ptrdiff_t begin, ptrdiff_t end)
{
#if ELEM_IS_DOUBLE
    _mm256_maskstore_pd(p, (__m256i)some_lanes(begin, end), (__m256d)v);
#elif WIDENS
    _mm_maskstore_ps(p, four_lanes(begin, end), (__m128)pack(v));
#else
    _mm256_maskstore_ps(p, (__m256i)some_lanes(begin, end), (__m256)v);
#endif
}
#endif

#define HAVE_STORE_NONTEMPORAL (!(WIDENS && HALF))
#if HAVE_STORE_NONTEMPORAL
INLINE void store_nontemporal(elem_out *p, vec v)
{
#if Y_KIND != REAL_KIND
    _mm_stream_si128((__m128i *)p, (__m128i)pack(v));
#else
    _mm256_stream_si256((__m256i *)p, (__m256i)v);
#endif
}
#endif

#define HAVE_ANY_NAN 1
INLINE int any_nan(vec v)
{
#if REAL_KIND == F64
    return _mm256_movemask_pd((__m256d)(v != v)) != 0;
#else
    return _mm256_movemask_ps((__m256)(v != v)) != 0;
#endif
}

/* ---- sums.h ---- */

#define HAVE_LOAD_R HALF
#if SUMS && HAVE_LOAD_R
INLINE rvec load_r(const elem *p)
{
    return (rvec)LOOP(floats_128)(_mm_loadl_epi64((const __m128i *)p));
}
#endif

#define HAVE_LOAD_FIRST_R (!ELEM_IS_DOUBLE)
#if SUMS && HAVE_LOAD_FIRST_R
INLINE rvec load_first_r(const elem *p, ptrdiff_t n)
{
#if HALF
    return (rvec)LOOP(floats_128)(_mm_cvtsi64_si128(LOOP(some_words)(p, 0, n)));
#else
    return (rvec)_mm_maskload_ps(p, four_lanes(0, n));
#endif
}
#endif

#define HAVE_WIDENED (!ELEM_IS_DOUBLE)
#if SUMS && HAVE_WIDENED
INLINE dvec widened(rvec v)
{
    return (dvec)_mm256_cvtps_pd((__m128)v);
}

INLINE dvec_bits widened_bits(rvec_bits b)
{
    return (dvec_bits)_mm256_cvtepi32_epi64((__m128i)b);
}

INLINE rvec narrowed(dvec v)
{
    return (rvec)_mm256_cvtpd_ps((__m256d)v);
}
#endif

#define HAVE_JOINED (!ELEM_IS_DOUBLE)
#if SUMS && HAVE_JOINED
INLINE vec joined(rvec low, rvec high)
{
    return (vec)_mm256_insertf128_ps(_mm256_castps128_ps256((__m128)low), (__m128)high, 1);
}
#endif

#define HAVE_LOWER_D 1
#if SUMS && HALF
INLINE dvec lower_d(vec v)
{
    return (dvec)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v));
}

INLINE dvec upper_d(vec v)
{
    return (dvec)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1));
}
#endif

#define HAVE_SELECT_D 1
#if SUMS
INLINE dvec select_d(dvec_bits condition, dvec a, dvec b)
{
    return (dvec)_mm256_blendv_pd((__m256d)b, (__m256d)a, (__m256d)condition);
}
#endif

#define HAVE_ROOTS 1
#if SUMS
INLINE dvec roots(dvec v)
{
    return (dvec)_mm256_sqrt_pd((__m256d)v);
}
#endif

#define HAVE_SMALLER 1
#if SUMS
INLINE rvec smaller(rvec a, rvec b)
{
#if ELEM_IS_DOUBLE
    return (rvec)_mm256_min_pd((__m256d)a, (__m256d)b);
#else
    return (rvec)_mm_min_ps((__m128)a, (__m128)b);
#endif
}

INLINE rvec larger(rvec a, rvec b)
{
#if ELEM_IS_DOUBLE
    return (rvec)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
    return (rvec)_mm_max_ps((__m128)a, (__m128)b);
#endif
}
#endif

#define HAVE_PACK_D (HALF == F16)
#if SUMS && HAVE_PACK_D
INLINE packed_r pack_r(rvec v)
{
    const __m128i bits = _mm_cvtps_ph((__m128)v, _MM_FROUND_TO_NEAREST_INT);
    packed_r e;
    memcpy(&e, &bits, sizeof e);
    return e;
}

INLINE packed_r pack_d(dvec v)
{
    return pack_r(narrowed(v));
}
#endif
