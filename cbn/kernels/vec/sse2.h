/* sse2.h: what SSE2 does better than vec.h and sums.h. */
#define STORE_FENCE() _mm_sfence()

#define HAVE_STORE_NONTEMPORAL (!HALF && !WIDENS)
#if HAVE_STORE_NONTEMPORAL
INLINE void store_nontemporal(elem_out *p, vec v)
{
    _mm_stream_si128((__m128i *)p, (__m128i)v);
}
#endif

#define HAVE_ANY_NAN 1
INLINE int any_nan(vec v)
{
    return _mm_movemask_ps((__m128)(v != v)) != 0;
}

/* ---- sums.h ---- */

#define HAVE_ROOTS 1
#if SUMS
INLINE dvec roots(dvec v)
{
    return (dvec)_mm_sqrt_pd((__m128d)v);
}
#endif

#define HAVE_WIDENED (!ELEM_IS_DOUBLE)
#if SUMS && HAVE_WIDENED
INLINE dvec widened(rvec v)
{
    return (dvec)_mm_cvtps_pd((__m128)_mm_cvtsi64_si128((long long)v));
}

INLINE dvec_bits widened_bits(rvec_bits b)
{
    const __m128i two = _mm_cvtsi64_si128((long long)b);
    return (dvec_bits)_mm_unpacklo_epi32(two, two);
}

INLINE rvec narrowed(dvec v)
{
    return (rvec)_mm_cvtsi128_si64((__m128i)_mm_cvtpd_ps((__m128d)v));
}
#endif

#define HAVE_JOINED (!ELEM_IS_DOUBLE)
#if SUMS && HAVE_JOINED
INLINE vec joined(rvec low, rvec high)
{
    return (vec)_mm_set_epi64x((long long)high, (long long)low);
}
#endif

#define HAVE_LOWER_D 1
#if SUMS && HALF
INLINE dvec lower_d(vec v)
{
    return (dvec)_mm_cvtps_pd((__m128)v);
}

INLINE dvec upper_d(vec v)
{
    return (dvec)_mm_cvtps_pd(_mm_movehl_ps((__m128)v, (__m128)v));
}
#endif
