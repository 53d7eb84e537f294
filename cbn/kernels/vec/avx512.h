/* avx512.h: what AVX-512 with the byte, doubleword and vector-length extensions does better than vec.h and sums.h.
 *
 * HAVE_PACK_NORMAL: the set that includes this has an instruction that rounds two vectors to bfloat16, `pack_normal`,
 * and takes a subnormal number for 0.
 */
#define STORE_FENCE() _mm_sfence()

#ifndef CBN_VEC_AVX512_H
#define CBN_VEC_AVX512_H
#define MASK(begin, end) ((1u << (end)) - (1u << (begin)))

/* The upper halves of the words of two vectors, as an index. */
static const uint16_t odd_words[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                       33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
#endif

/* ---- vec.h ---- */

#define HAVE_UNPACK (X_KIND != REAL_KIND && !(WIDENS && HALF))
#if HAVE_UNPACK
INLINE vec unpack(packed e)
{
#if BYTE
    return (vec)_mm512_cvtepi32_ps(X_KIND == U8 ? _mm512_cvtepu8_epi32((__m128i)e) : _mm512_cvtepi8_epi32((__m128i)e));
#elif HALF == F16
    return (vec)_mm512_cvtph_ps((__m256i)e);
#elif HALF
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)e), 16);
#else
    return (vec)_mm512_cvtps_pd((__m256)e);
#endif
}
#endif

#define HAVE_UNPACK_OUT (BYTE && HALF)
#if HAVE_UNPACK_OUT
INLINE vec unpack_out(packed_out e)
{
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)e), 16);
}
#endif

#define HAVE_ROUNDED 1
#if HALF == BF16 && !WIDENS
INLINE vec_bits rounded(vec v)
{
    const __m512i b = (__m512i)v, up = _mm512_add_epi32(b, _mm512_set1_epi32(0x7fff));
    const __mmask16 odd = _mm512_test_epi32_mask(b, _mm512_set1_epi32(1 << 16));
    return (vec_bits)_mm512_mask_add_epi32(up, odd, up, _mm512_set1_epi32(1));
}
#endif

/* Of two operands of which one is NaN, the processor takes the second. */
#define HAVE_CLAMPED 1
INLINE vec clamped(vec v, vec low, vec high)
{
#if REAL_KIND == F64
    return (vec)_mm512_min_pd((__m512d)high, _mm512_max_pd((__m512d)low, (__m512d)v));
#else
    return (vec)_mm512_min_ps((__m512)high, _mm512_max_ps((__m512)low, (__m512)v));
#endif
}

#define HAVE_LANES_OF 1
INLINE lane_bits lanes_of(const int8_t *p)
{
#if REAL_KIND == F64
    return (lane_bits)_mm512_cvtepi8_epi64(_mm_loadl_epi64((const __m128i *)p));
#else
    return (lane_bits)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p));
#endif
}

#define HAVE_PACK (Y_KIND != REAL_KIND && !(WIDENS && HALF))
#if HAVE_PACK
INLINE packed_out pack(vec v)
{
#if HALF == F16
    return (packed_out)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif HALF
    return (packed_out)_mm512_cvtepi32_epi16((__m512i)(rounded(v) >> 16));
#else
    return (packed_out)_mm512_cvtpd_ps((__m512d)v);
#endif
}
#endif

#define HAVE_LOAD_PART (!BYTE && !(WIDENS && HALF))
#if HAVE_LOAD_PART
INLINE vec load_part(const elem *p, ptrdiff_t begin, ptrdiff_t end)
{
#if HALF
    return unpack((packed)_mm256_maskz_loadu_epi16((__mmask16)MASK(begin, end), p));
#elif ELEM_IS_DOUBLE
    return (vec)_mm512_maskz_loadu_pd((__mmask8)MASK(begin, end), p);
#elif WIDENS
    return unpack((packed)_mm256_maskz_loadu_ps((__mmask8)MASK(begin, end), p));
#else
    return (vec)_mm512_maskz_loadu_ps((__mmask16)MASK(begin, end), p);
#endif
}
#endif

#define HAVE_STORE_PART (!(WIDENS && HALF))
#if HAVE_STORE_PART
INLINE void store_part(elem_out *p, vec v, ptrdiff_t begin, ptrdiff_t end)
{
#if HALF
    _mm256_mask_storeu_epi16(p, (__mmask16)MASK(begin, end), (__m256i)pack(v));
#elif ELEM_IS_DOUBLE
    _mm512_mask_storeu_pd(p, (__mmask8)MASK(begin, end), (__m512d)v);
#elif WIDENS
    _mm256_mask_storeu_ps(p, (__mmask8)MASK(begin, end), (__m256)pack(v));
#else
    _mm512_mask_storeu_ps(p, (__mmask16)MASK(begin, end), (__m512)v);
#endif
}
#endif

#define HAVE_STORE_NONTEMPORAL (!(WIDENS && HALF))
#if HAVE_STORE_NONTEMPORAL
INLINE void store_nontemporal(elem_out *p, vec v)
{
#if Y_KIND != REAL_KIND
    _mm256_stream_si256((__m256i *)p, (__m256i)pack(v));
#else
    _mm512_stream_si512((__m512i *)p, (__m512i)v);
#endif
}
#endif

#define HAVE_STORE_TWO (HALF == BF16 && !WIDENS)
#if HAVE_STORE_TWO
INLINE void store_two(elem_out *p, const vec *v, const int nontemporal, const int normal)
{
    __m512i both;
#if HAVE_PACK_NORMAL
    if (normal)
        both = LOOP(pack_normal)(v);
    else
#else
    (void)normal;
#endif
        /* The upper halves of both */
        both = _mm512_permutex2var_epi16((__m512i)rounded(v[0]), _mm512_loadu_si512(odd_words), (__m512i)rounded(v[1]));
    if (nontemporal)
        _mm512_stream_si512((__m512i *)p, both);
    else
        _mm512_storeu_si512(p, both);
}
#endif

#define HAVE_ANY_NAN 1
INLINE int any_nan(vec v)
{
#if REAL_KIND == F64
    return _mm512_cmp_pd_mask((__m512d)v, (__m512d)v, _CMP_UNORD_Q) != 0;
#else
    return _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q) != 0;
#endif
}

/* ---- sums.h ---- */

#if SUMS && HALF
/* Eight 16-bit numbers as float32. */
INLINE __m256 LOOP(floats_256)(__m128i e)
{
    return HALF == F16 ? _mm256_cvtph_ps(e) : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(e), 16));
}
#endif

#define HAVE_LOAD_R HALF
#if SUMS && HAVE_LOAD_R
INLINE rvec load_r(const elem *p)
{
    return (rvec)LOOP(floats_256)(_mm_loadu_si128((const __m128i *)p));
}
#endif

#define HAVE_LOAD_FIRST_R (!ELEM_IS_DOUBLE)
#if SUMS && HAVE_LOAD_FIRST_R
INLINE rvec load_first_r(const elem *p, ptrdiff_t n)
{
#if HALF
    return (rvec)LOOP(floats_256)(_mm_maskz_loadu_epi16((__mmask8)MASK(0, n), p));
#else
    return (rvec)_mm256_maskz_loadu_ps((__mmask8)MASK(0, n), p);
#endif
}
#endif

#define HAVE_WIDENED (!ELEM_IS_DOUBLE)
#if SUMS && HAVE_WIDENED
INLINE dvec widened(rvec v)
{
    return (dvec)_mm512_cvtps_pd((__m256)v);
}

INLINE dvec_bits widened_bits(rvec_bits b)
{
    return (dvec_bits)_mm512_cvtepi32_epi64((__m256i)b);
}

INLINE rvec narrowed(dvec v)
{
    return (rvec)_mm512_cvtpd_ps((__m512d)v);
}
#endif

#define HAVE_JOINED (!ELEM_IS_DOUBLE)
#if SUMS && HAVE_JOINED
INLINE vec joined(rvec low, rvec high)
{
    return (vec)_mm512_insertf64x4(_mm512_castpd256_pd512((__m256d)low), (__m256d)high, 1);
}
#endif

#define HAVE_LOWER_D 1
#define HAVE_FOLDED_D 1
#if SUMS && HALF
INLINE dvec lower_d(vec v)
{
    return (dvec)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v));
}

INLINE dvec upper_d(vec v)
{
    return (dvec)_mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512)v), 1)));
}

INLINE dvec folded_d(vec v)
{
    const __m512 up = _mm512_shuffle_f32x4((__m512)v, (__m512)v, 0xee);
    return (dvec)_mm512_cvtps_pd(_mm512_castps512_ps256(_mm512_add_ps((__m512)v, up)));
}
#endif

#define HAVE_LOAD_TWO (HALF == BF16)
#if SUMS && HAVE_LOAD_TWO
INLINE void load_two(const elem *p, vec *v)
{
    const __m512i both = _mm512_loadu_si512(p);
    v[0] = (vec)_mm512_slli_epi32(both, 16);
    v[1] = (vec)_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000));
}
#endif

#define HAVE_ROOTS 1
#if SUMS
INLINE dvec roots(dvec v)
{
    return (dvec)_mm512_sqrt_pd((__m512d)v);
}
#endif

#define HAVE_SMALLER 1
#if SUMS
INLINE rvec smaller(rvec a, rvec b)
{
#if ELEM_IS_DOUBLE
    return (rvec)_mm512_min_pd((__m512d)a, (__m512d)b);
#else
    return (rvec)_mm256_min_ps((__m256)a, (__m256)b);
#endif
}

INLINE rvec larger(rvec a, rvec b)
{
#if ELEM_IS_DOUBLE
    return (rvec)_mm512_max_pd((__m512d)a, (__m512d)b);
#else
    return (rvec)_mm256_max_ps((__m256)a, (__m256)b);
#endif
}
#endif

#define HAVE_PACK_D (HALF == F16)
#if SUMS && HAVE_PACK_D
INLINE packed_r pack_r(rvec v)
{
    const __m128i bits = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
    packed_r e;
    memcpy(&e, &bits, sizeof e);
    return e;
}

INLINE packed_r pack_d(dvec v)
{
    return pack_r(narrowed(v));
}
#endif
