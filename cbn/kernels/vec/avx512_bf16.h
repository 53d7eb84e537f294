/* avx512_bf16.h: what the bfloat16 instructions do better than avx512.h. They multiply pairs of numbers, and add the
 * two products to a float32 sum. */
#define HAVE_PACK_NORMAL (HALF == BF16 && !WIDENS)
#if HAVE_PACK_NORMAL
INLINE __m512i LOOP(pack_normal)(const vec *v)
{
    return (__m512i)_mm512_cvtne2ps_pbh((__m512)v[1], (__m512)v[0]);
}
#endif

#define HAVE_ADD_FOUR (HALF == BF16)
#define HAVE_ADD_ROWS (HALF == BF16)
#if SUMS && HALF == BF16
INLINE void add_four(const elem *p, ptrdiff_t n, vec shift, vec *sum, vec *square)
{
    const __m512i ones = _mm512_set1_epi16(0x3f80);
    (void)shift;
    for (int k = 0; k < 2; k++) {
        const ptrdiff_t left = n - k * 2 * LANES;
        const __mmask32 some = left >= 2 * LANES ? ~0u : left > 0 ? (1u << left) - 1 : 0;
        const __m512i x = n == 4 * LANES ? _mm512_loadu_si512(p + k * 2 * LANES)
                                         : _mm512_maskz_loadu_epi16(some, p + k * 2 * LANES);
        sum[k] = (vec)_mm512_dpbf16_ps((__m512)sum[k], (__m512bh)x, (__m512bh)ones);
        square[k] = (vec)_mm512_dpbf16_ps((__m512)square[k], (__m512bh)x, (__m512bh)x);
    }
}

/* sum += x and square += x*x of a cache line of each of two rows; b may be NULL. The columns of the sums are in an
 * order that `in_order` ends. */
INLINE void LOOP(add_rows)(const elem *a, const elem *b, vec *sum, vec *square)
{
    const __m512i ones = _mm512_set1_epi16(0x3f80), x = _mm512_loadu_si512(a);
    const __m512i below = b ? _mm512_loadu_si512(b) : _mm512_setzero_si512();
    const __m512i pairs[2] = {_mm512_unpacklo_epi16(x, below), _mm512_unpackhi_epi16(x, below)};
    for (int k = 0; k < 2; k++) {
        sum[k] = (vec)_mm512_dpbf16_ps((__m512)sum[k], (__m512bh)pairs[k], (__m512bh)ones);
        square[k] = (vec)_mm512_dpbf16_ps((__m512)square[k], (__m512bh)pairs[k], (__m512bh)pairs[k]);
    }
}

/* Four columns of the first, four of the second, and so on, as two vectors of columns. */
INLINE void LOOP(in_order)(vec *v)
{
    const __m512i left = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i right = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    const __m512d a = (__m512d)v[0], b = (__m512d)v[1];
    v[0] = (vec)_mm512_permutex2var_pd(a, left, b);
    v[1] = (vec)_mm512_permutex2var_pd(a, right, b);
}
#endif

#include "avx512.h"
