/* vec.h: what a vector, a load and a store are, for one (ELEM, REAL) on one instruction set.
 *
 * The compiler's vector extension gives + - * on vectors, so that the loops read as their formulas and the
 * order of every sum stands in the source. Loads and stores are memcpy, which takes any address. Intrinsics are
 * there for a load or a store that converts (gcc 12 makes four instructions of the eight-lane
 * __builtin_convertvector where the processor has one), for a part of a vector and for a store past the caches.
 *
 * Defines for loops.h: elem, elem_out, real, vec, LANES, load, load_part, load_out, load_out_part, store, store_part,
 * store_past, store_two, blend, select, load_real, splat, quiet, any_nan;
 * with SUMS also dvec, DLANES, load_d, load_first_d, store_d, load_double, store_double, first_lanes, select_d, splat_d,
 * copy, total; rvec, load_r, load_first_r, store_r, select_r, widened, narrowed, widened_bits; of
 * 16-bit elements lower_d, upper_d, folded_d, add_four and, with HAS_BF16, add_rows, in_order.
 */
#define elem LOOP(elem)
#define elem_out LOOP(elem_out)
#define packed_out LOOP(packed_out)
#define real LOOP(real)
#define vec LOOP(vec)
#define packed LOOP(packed)
#define unpack LOOP(unpack)
#define pack LOOP(pack)
#define load LOOP(load)
#define lane_int LOOP(lane_int)
#define lane_bits LOOP(lane_bits)
#define some_lanes LOOP(some_lanes)
#define some_words LOOP(some_words)
#define blend LOOP(blend)
#define load_part LOOP(load_part)
#define load_out LOOP(load_out)
#define load_out_part LOOP(load_out_part)
#define any_nan LOOP(any_nan)
#define store LOOP(store)
#define store_part LOOP(store_part)
#define MASK(begin, end) ((1u << (end)) - (1u << (begin)))
#define store_nontemporal LOOP(store_nontemporal)
#define store_two LOOP(store_two)
#define rounded LOOP(rounded)
#define quiet LOOP(quiet)
#define load_real LOOP(load_real)
#define splat LOOP(splat)
#define select LOOP(select)
#define LANES ((ptrdiff_t)(VEC_BYTES / sizeof(REAL)))

typedef ELEM elem;
typedef OUT elem_out;
typedef REAL real;
typedef real vec __attribute__((vector_size(VEC_BYTES)));
typedef __typeof__(__builtin_choose_expr(sizeof(REAL) == 8, (int64_t)0, (int32_t)0)) lane_int;
typedef lane_int lane_bits __attribute__((vector_size(VEC_BYTES))); /* what holds in each lane: all bits, or none */
typedef elem packed __attribute__((vector_size(VEC_BYTES / sizeof(REAL) * sizeof(ELEM))));
typedef elem_out packed_out __attribute__((vector_size(VEC_BYTES / sizeof(REAL) * sizeof(OUT))));

#if HALF && VEC_BYTES >= 32
/* Four, eight or sixteen elements as float32. */
INLINE __m128 LOOP(floats_128)(__m128i e)
{
    return HALF == F16 ? _mm_cvtph_ps(e) : _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(e), 16));
}

INLINE __m256 LOOP(floats_256)(__m128i e)
{
    return HALF == F16 ? _mm256_cvtph_ps(e) : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(e), 16));
}
#endif

#if HALF && (WIDENS || (HALF == F16 && VEC_BYTES == 16))
/* One by one, where the processor has no instruction for it, or it is rare; not inlined, for it is long. */
TARGET static __attribute__((noinline)) vec LOOP(unpack_each)(packed e)
{
    vec v;
    for (ptrdiff_t i = 0; i < LANES; i++)
        v[i] = HALF == F16 ? cbn_from_f16(e[i]) : cbn_from_bf16(e[i]);
    return v;
}

TARGET static __attribute__((noinline)) packed LOOP(pack_each)(vec v)
{
    packed e;
    for (ptrdiff_t i = 0; i < LANES; i++)
        e[i] = HALF == F16 ? cbn_to_f16((float)v[i]) : cbn_to_bf16((float)v[i]);
    return e;
}
#elif HALF == BF16
typedef uint32_t LOOP(bits) __attribute__((vector_size(VEC_BYTES)));
#endif

INLINE vec unpack(packed e)
{
#if BYTE && VEC_BYTES == 64
    return (vec)_mm512_cvtepi32_ps(X_KIND == U8 ? _mm512_cvtepu8_epi32((__m128i)e) : _mm512_cvtepi8_epi32((__m128i)e));
#elif BYTE && VEC_BYTES == 32
    const __m128i low = _mm_cvtsi64_si128((long long)e);
    return (vec)_mm256_cvtepi32_ps(X_KIND == U8 ? _mm256_cvtepu8_epi32(low) : _mm256_cvtepi8_epi32(low));
#elif BYTE
    vec v;
    for (ptrdiff_t i = 0; i < LANES; i++)
        v[i] = e[i];
    return v;
#elif HALF && (WIDENS || (HALF == F16 && VEC_BYTES == 16))
    return LOOP(unpack_each)(e);
#elif HALF == F16 && VEC_BYTES == 64
    return (vec)_mm512_cvtph_ps((__m256i)e);
#elif HALF == F16
    return (vec)_mm256_cvtph_ps((__m128i)e);
#elif HALF == BF16 && VEC_BYTES == 64
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)e), 16);
#elif HALF == BF16 && VEC_BYTES == 32
    return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)e), 16);
#elif HALF == BF16
    return (vec)(__builtin_convertvector(e, LOOP(bits)) << 16);
#elif WIDENS && VEC_BYTES == 64
    return (vec)_mm512_cvtps_pd((__m256)e);
#elif WIDENS && VEC_BYTES == 32
    return (vec)_mm256_cvtps_pd((__m128)e);
#else
    return __builtin_convertvector(e, vec);
#endif
}

#if BYTE
INLINE vec LOOP(unpack_out)(packed_out e)
{
#if HALF && VEC_BYTES == 64
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)e), 16);
#elif HALF && VEC_BYTES == 32
    return (vec)LOOP(floats_256)((__m128i)e);
#elif HALF
    return (vec)(__builtin_convertvector(e, LOOP(bits)) << 16);
#else
    return e;
#endif
}
#endif

#if HALF == BF16 && !WIDENS
/* The upper half of each lane is the bfloat16 nearest to it, ties to even. A NaN stays one: those that arithmetic gives are
 * quiet, and carry what came in with a 16-bit element or `quiet` factor, the lower half of which is zero. */
INLINE LOOP(bits) rounded(vec v)
{
    const LOOP(bits) b = (LOOP(bits))v;
#if VEC_BYTES == 64
    const __m512i up = _mm512_add_epi32((__m512i)b, _mm512_set1_epi32(0x7fff));
    return (LOOP(bits))_mm512_mask_add_epi32(up, _mm512_test_epi32_mask((__m512i)b, _mm512_set1_epi32(1 << 16)), up,
                                             _mm512_set1_epi32(1));
#else
    return b + 0x7fff + (b >> 16 & 1);
#endif
}
#endif

/* Rounded to nearest, ties to even. */
INLINE packed_out pack(vec v)
{
#if HALF && (WIDENS || (HALF == F16 && VEC_BYTES == 16))
    return LOOP(pack_each)(v);
#elif HALF == F16 && VEC_BYTES == 64
    return (packed_out)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif HALF == F16
    return (packed_out)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#elif HALF == BF16 && VEC_BYTES == 64
    return (packed_out)_mm512_cvtepi32_epi16((__m512i)(rounded(v) >> 16));
#elif HALF == BF16 && VEC_BYTES == 32
    const __m256i r = (__m256i)(rounded(v) >> 16), low = _mm256_packus_epi32(r, r); /* in both halves of a half */
    return (packed_out)_mm256_castsi256_si128(_mm256_permute4x64_epi64(low, 8));
#elif HALF == BF16
    return __builtin_convertvector(rounded(v) >> 16, packed_out);
#elif WIDENS && VEC_BYTES == 64
    return (packed_out)_mm512_cvtpd_ps((__m512d)v);
#elif WIDENS && VEC_BYTES == 32
    return (packed_out)_mm256_cvtpd_ps((__m256d)v);
#else
    return __builtin_convertvector(v, packed_out);
#endif
}

INLINE vec load(const elem *p)
{
    packed e;
    memcpy(&e, p, sizeof e);
    return unpack(e);
}

INLINE void store(elem_out *p, vec v)
{
    packed_out e = pack(v);
    memcpy(p, &e, sizeof e);
}

#if HALF && !BYTE && VEC_BYTES == 32
/* Elements from begin to end <= 4. Put together in a register: what is stored in parts cannot be loaded as a whole until
 * it is in L1. */
INLINE long long some_words(const elem *p, ptrdiff_t begin, ptrdiff_t end)
{
    uint64_t words = 0;
    for (ptrdiff_t i = begin; i < end; i++)
        words |= (uint64_t)p[i] << 16 * i;
    return (long long)words;
}
#endif

/* Lane by lane a where the condition, a comparison of vectors, holds, else b. */
INLINE vec select(lane_bits condition, vec a, vec b)
{
    return (vec)(((lane_bits)a & condition) | ((lane_bits)b & ~condition));
}

/* Lanes from begin to end. */
INLINE lane_bits some_lanes(ptrdiff_t begin, ptrdiff_t end)
{
    lane_bits lane;
    for (int i = 0; i < LANES; i++)
        lane[i] = i;
    return (lane >= (lane_int)begin) & (lane < (lane_int)end);
}

/* Lanes from begin to end of a, the others of b. */
INLINE vec blend(vec a, vec b, ptrdiff_t begin, ptrdiff_t end)
{
    return select(some_lanes(begin, end), a, b);
}

/* Elements from begin to end <= LANES in their lanes, and zeros; no other is read, or written. */
INLINE vec load_part(const elem *p, ptrdiff_t begin, ptrdiff_t end)
{
#if VEC_BYTES == 64 && HALF && !BYTE && !WIDENS
    return unpack((packed)_mm256_maskz_loadu_epi16((__mmask16)MASK(begin, end), p));
#elif VEC_BYTES == 64 && ELEM_IS_DOUBLE
    return (vec)_mm512_maskz_loadu_pd((__mmask8)MASK(begin, end), p);
#elif VEC_BYTES == 64 && WIDENS && !HALF
    return unpack((packed)_mm256_maskz_loadu_ps((__mmask8)MASK(begin, end), p));
#elif VEC_BYTES == 64 && !HALF && !BYTE
    return (vec)_mm512_maskz_loadu_ps((__mmask16)MASK(begin, end), p);
#elif VEC_BYTES == 32 && ELEM_IS_DOUBLE
    return (vec)_mm256_maskload_pd(p, (__m256i)some_lanes(begin, end));
#elif VEC_BYTES == 32 && WIDENS && !HALF
    return unpack((packed)_mm_maskload_ps(p, four_lanes(begin, end)));
#elif VEC_BYTES == 32 && !HALF && !BYTE
    return (vec)_mm256_maskload_ps(p, (__m256i)some_lanes(begin, end));
#elif VEC_BYTES == 32 && HALF && !BYTE && !WIDENS
    return unpack((packed)_mm_set_epi64x(some_words(p + 4, begin > 4 ? begin - 4 : 0, end - 4),
                                         some_words(p, begin, end < 4 ? end : 4)));
#else
    packed e = {0};
    for (ptrdiff_t i = begin; i < end; i++)
        e[i] = p[i];
    return unpack(e);
#endif
}

/* The same of elements of y's type, as those of a residual are. */
INLINE vec load_out(const elem_out *p)
{
#if BYTE
    packed_out e;
    memcpy(&e, p, sizeof e);
    return LOOP(unpack_out)(e);
#else
    return load(p);
#endif
}

INLINE vec load_out_part(const elem_out *p, ptrdiff_t begin, ptrdiff_t end)
{
#if BYTE
    packed_out e = {0};
    for (ptrdiff_t i = begin; i < end; i++)
        e[i] = p[i];
    return LOOP(unpack_out)(e);
#else
    return load_part(p, begin, end);
#endif
}

INLINE void store_part(elem_out *p, vec v, ptrdiff_t begin, ptrdiff_t end)
{
#if VEC_BYTES == 64 && HALF && !WIDENS
    _mm256_mask_storeu_epi16(p, (__mmask16)MASK(begin, end), (__m256i)pack(v));
#elif VEC_BYTES == 64 && ELEM_IS_DOUBLE
    _mm512_mask_storeu_pd(p, (__mmask8)MASK(begin, end), (__m512d)v);
#elif VEC_BYTES == 64 && WIDENS && !HALF
    _mm256_mask_storeu_ps(p, (__mmask8)MASK(begin, end), (__m256)pack(v));
#elif VEC_BYTES == 64 && !HALF
    _mm512_mask_storeu_ps(p, (__mmask16)MASK(begin, end), (__m512)v);
#elif VEC_BYTES == 32 && ELEM_IS_DOUBLE
    _mm256_maskstore_pd(p, (__m256i)some_lanes(begin, end), (__m256d)v);
#elif VEC_BYTES == 32 && WIDENS && !HALF
    _mm_maskstore_ps(p, four_lanes(begin, end), (__m128)pack(v));
#elif VEC_BYTES == 32 && !HALF
    _mm256_maskstore_ps(p, (__m256i)some_lanes(begin, end), (__m256)v);
#else
    packed_out e = pack(v);
    for (ptrdiff_t i = begin; i < end; i++)
        p[i] = e[i];
#endif
}

/* A store that does not read the line from memory first, nor keep it in a cache; p is aligned to its size. */
INLINE void store_nontemporal(elem_out *p, vec v)
{
#if !defined(__x86_64__) || (HALF && (VEC_BYTES == 16 || WIDENS))
    store(p, v); /* of 8 bytes or less there is no such store from a vector */
#elif HALF && VEC_BYTES == 64
    _mm256_stream_si256((__m256i *)p, (__m256i)pack(v));
#elif HALF
    _mm_stream_si128((__m128i *)p, (__m128i)pack(v));
#elif VEC_BYTES == 64 && WIDENS
    _mm256_stream_si256((__m256i *)p, (__m256i)pack(v));
#elif VEC_BYTES == 64
    _mm512_stream_si512((__m512i *)p, (__m512i)v);
#elif VEC_BYTES == 32 && WIDENS
    _mm_stream_si128((__m128i *)p, (__m128i)pack(v));
#elif VEC_BYTES == 32
    _mm256_stream_si256((__m256i *)p, (__m256i)v);
#elif WIDENS
    store(p, v);
#else
    _mm_stream_si128((__m128i *)p, (__m128i)v);
#endif
}

/* Two vectors, side by side. `normal`: no value is subnormal, which the processor's conversion to bfloat16 takes for 0. */
INLINE void store_two(elem_out *p, const vec *v, const int nontemporal, const int normal)
{
    (void)normal;
#if HALF == BF16 && VEC_BYTES == 64 && !WIDENS
    __m512i both;
#ifdef HAS_BF16
    if (normal)
        both = (__m512i)_mm512_cvtne2ps_pbh((__m512)v[1], (__m512)v[0]);
    else
#endif
        /* The upper halves of both */
        both = _mm512_permutex2var_epi16((__m512i)rounded(v[0]), _mm512_loadu_si512(odd_words), (__m512i)rounded(v[1]));
    if (nontemporal)
        _mm512_stream_si512((__m512i *)p, both);
    else
        _mm512_storeu_si512(p, both);
#else
    for (int i = 0; i < 2; i++)
        if (nontemporal)
            store_nontemporal(p + i * LANES, v[i]);
        else
            store(p + i * LANES, v[i]);
#endif
}

/* A factor; if it is NaN, one whose lower half is zero, see `rounded`. */
INLINE real quiet(real a)
{
    return HALF && a != a ? (real)NAN : a;
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

/* Whether a lane is NaN. */
INLINE int any_nan(vec v)
{
#if VEC_BYTES == 64 && (WIDENS || ELEM_IS_DOUBLE)
    return _mm512_cmp_pd_mask((__m512d)v, (__m512d)v, _CMP_UNORD_Q) != 0;
#elif VEC_BYTES == 64
    return _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q) != 0;
#elif VEC_BYTES == 32 && (WIDENS || ELEM_IS_DOUBLE)
    return _mm256_movemask_pd((__m256d)(v != v)) != 0;
#elif VEC_BYTES == 32
    return _mm256_movemask_ps((__m256)(v != v)) != 0;
#elif defined(__x86_64__)
    return _mm_movemask_ps((__m128)(v != v)) != 0;
#else
    typedef uint64_t words __attribute__((vector_size(VEC_BYTES)));
    const words some = (words)(v != v);
    return (some[0] | some[1]) != 0;
#endif
}

#if SUMS
#define dvec LOOP(dvec)
#define load_d LOOP(load_d)
#define load_first_d LOOP(load_first_d)
#define rvec LOOP(rvec)
#define rvec_bits LOOP(rvec_bits)
#define load_r LOOP(load_r)
#define load_first_r LOOP(load_first_r)
#define store_r LOOP(store_r)
#define select_r LOOP(select_r)
#define widened LOOP(widened)
#define narrowed LOOP(narrowed)
#define widened_bits LOOP(widened_bits)
#define load_double LOOP(load_double)
#define store_double LOOP(store_double)
#define splat_d LOOP(splat_d)
#define lower_d LOOP(lower_d)
#define upper_d LOOP(upper_d)
#define folded_d LOOP(folded_d)
#define load_two LOOP(load_two)
#define add_four LOOP(add_four)
#define add_rows LOOP(add_rows)
#define in_order LOOP(in_order)
#define select_d LOOP(select_d)
#define store_d LOOP(store_d)
#define copy LOOP(copy)
#define first_lanes LOOP(first_lanes)
#define total LOOP(total)
#define DLANES ((ptrdiff_t)(VEC_BYTES / sizeof(double)))

typedef double dvec __attribute__((vector_size(VEC_BYTES)));

/* As many elements in the arithmetic of the maps, and what holds in each. */
typedef real rvec __attribute__((vector_size(DLANES * sizeof(real))));
typedef lane_int rvec_bits __attribute__((vector_size(DLANES * sizeof(real))));
typedef int64_t LOOP(dvec_bits) __attribute__((vector_size(VEC_BYTES)));

INLINE rvec load_r(const elem *p)
{
#if ELEM_IS_DOUBLE
    return load(p);
#elif HALF && VEC_BYTES == 64
    return (rvec)LOOP(floats_256)(_mm_loadu_si128((const __m128i *)p));
#elif HALF && VEC_BYTES == 32
    return (rvec)LOOP(floats_128)(_mm_loadl_epi64((const __m128i *)p));
#elif HALF
    return (rvec){HALF == F16 ? cbn_from_f16(p[0]) : cbn_from_bf16(p[0]),
                  HALF == F16 ? cbn_from_f16(p[1]) : cbn_from_bf16(p[1])};
#else
    rvec v;
    memcpy(&v, p, sizeof v);
    return v;
#endif
}

/* The first n < DLANES elements, and zeros. */
INLINE rvec load_first_r(const elem *p, ptrdiff_t n)
{
#if ELEM_IS_DOUBLE
    return load_part(p, 0, n);
#elif HALF && VEC_BYTES == 64
    return (rvec)LOOP(floats_256)(_mm_maskz_loadu_epi16((__mmask8)((1u << n) - 1), p));
#elif HALF && VEC_BYTES == 32
    return (rvec)LOOP(floats_128)(_mm_cvtsi64_si128(some_words(p, 0, n)));
#elif HALF
    return (rvec){n == 0 ? 0 : HALF == F16 ? cbn_from_f16(p[0]) : cbn_from_bf16(p[0]), 0};
#elif VEC_BYTES == 64
    return (rvec)_mm256_maskz_loadu_ps((__mmask8)((1u << n) - 1), p);
#elif VEC_BYTES == 32
    return (rvec)_mm_maskload_ps(p, four_lanes(0, n));
#else
    return (rvec){n > 0 ? p[0] : 0, 0};
#endif
}

INLINE dvec widened(rvec v)
{
#if ELEM_IS_DOUBLE
    return v;
#elif VEC_BYTES == 64
    return (dvec)_mm512_cvtps_pd((__m256)v);
#elif VEC_BYTES == 32
    return (dvec)_mm256_cvtps_pd((__m128)v);
#else
    return (dvec){v[0], v[1]};
#endif
}

INLINE rvec narrowed(dvec v)
{
#if ELEM_IS_DOUBLE
    return v;
#elif VEC_BYTES == 64
    return (rvec)_mm512_cvtpd_ps((__m512d)v);
#elif VEC_BYTES == 32
    return (rvec)_mm256_cvtpd_ps((__m256d)v);
#else
    return (rvec){(real)v[0], (real)v[1]};
#endif
}

INLINE LOOP(dvec_bits) widened_bits(rvec_bits b)
{
#if ELEM_IS_DOUBLE
    return (LOOP(dvec_bits))b;
#elif VEC_BYTES == 64
    return (LOOP(dvec_bits))_mm512_cvtepi32_epi64((__m256i)b);
#elif VEC_BYTES == 32
    return (LOOP(dvec_bits))_mm256_cvtepi32_epi64((__m128i)b);
#else
    return (LOOP(dvec_bits)){b[0], b[1]};
#endif
}

INLINE rvec select_r(rvec_bits condition, rvec a, rvec b)
{
    return (rvec)(((rvec_bits)a & condition) | ((rvec_bits)b & ~condition));
}

/* Elements as float64. */
INLINE dvec load_d(const elem *p)
{
    return widened(load_r(p));
}

#if HALF
/* Lanes of the lower and of the upper half. */
INLINE dvec lower_d(vec v)
{
#if VEC_BYTES == 64
    return (dvec)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v));
#elif VEC_BYTES == 32
    return (dvec)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v));
#else
    return (dvec){v[0], v[1]};
#endif
}

INLINE dvec upper_d(vec v)
{
#if VEC_BYTES == 64
    return (dvec)_mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512)v), 1)));
#elif VEC_BYTES == 32
    return (dvec)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1));
#else
    return (dvec){v[2], v[3]};
#endif
}

/* The sum of both. */
INLINE dvec folded_d(vec v)
{
#if VEC_BYTES == 64
    const __m512 up = _mm512_shuffle_f32x4((__m512)v, (__m512)v, 0xee);
    return (dvec)_mm512_cvtps_pd(_mm512_castps512_ps256(_mm512_add_ps((__m512)v, up)));
#else
    return lower_d(v) + upper_d(v);
#endif
}

/* The elements of two vectors in some order. */
INLINE void load_two(const elem *p, vec *v)
{
#if HALF == BF16 && VEC_BYTES == 64
    const __m512i both = _mm512_loadu_si512(p);
    v[0] = (vec)_mm512_slli_epi32(both, 16);
    v[1] = (vec)_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000));
#else
    v[0] = load(p);
    v[1] = load(p + LANES);
#endif
}

/* sum += d and square += d*d of n <= 4*LANES elements, to either of two. d = x - shift; of bfloat16 it is x, see loops.h. */
INLINE void add_four(const elem *p, ptrdiff_t n, vec shift, vec *sum, vec *square)
{
#ifdef HAS_BF16
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
#else
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
#endif
}

#ifdef HAS_BF16
/* The same of a line of each of two rows; b may be NULL. The sums are in the order that `in_order` ends. */
INLINE void add_rows(const elem *a, const elem *b, vec *sum, vec *square)
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
INLINE void in_order(vec *v)
{
    const __m512i left = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), right = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    const __m512d a = (__m512d)v[0], b = (__m512d)v[1];
    v[0] = (vec)_mm512_permutex2var_pd(a, left, b);
    v[1] = (vec)_mm512_permutex2var_pd(a, right, b);
}
#endif
#endif

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

/* v with all but its first n < DLANES lanes zero, whatever they are. */
INLINE dvec first_lanes(dvec v, ptrdiff_t n)
{
    typedef long long bits __attribute__((vector_size(VEC_BYTES)));
    bits keep;
    memcpy(&keep, first_64 + 8 - n, sizeof keep);
    return (dvec)((bits)v & keep);
}

/* The first n < DLANES elements as float64, and zeros. */
INLINE dvec load_first_d(const elem *p, ptrdiff_t n)
{
    return widened(load_first_r(p, n));
}

INLINE dvec select_d(LOOP(dvec_bits) condition, dvec a, dvec b)
{
#if VEC_BYTES == 32
    return (dvec)_mm256_blendv_pd((__m256d)b, (__m256d)a, (__m256d)condition);
#else
    return (dvec)(((LOOP(dvec_bits))a & condition) | ((LOOP(dvec_bits))b & ~condition));
#endif
}

/* The first n lanes as elements. */
INLINE void store_d(elem *p, dvec v, ptrdiff_t n)
{
    typedef elem some __attribute__((vector_size(DLANES * sizeof(elem))));
#if HALF == F16
    some e;
#if VEC_BYTES == 64
    const __m128i bits = _mm256_cvtps_ph(_mm512_cvtpd_ps((__m512d)v), _MM_FROUND_TO_NEAREST_INT);
    memcpy(&e, &bits, sizeof e);
#elif VEC_BYTES == 32
    const __m128i bits = _mm_cvtps_ph(_mm256_cvtpd_ps((__m256d)v), _MM_FROUND_TO_NEAREST_INT);
    memcpy(&e, &bits, sizeof e);
#else
    for (ptrdiff_t i = 0; i < DLANES; i++)
        e[i] = cbn_to_f16((float)v[i]);
#endif
#elif HALF
    typedef float floats __attribute__((vector_size(DLANES * sizeof(float))));
    typedef uint32_t words __attribute__((vector_size(DLANES * sizeof(float))));
    const floats f = __builtin_convertvector(v, floats);
    const words bits = (words)f, nan = (words)(f != f);
    const words rounded = ((bits + 0x7fff + (bits >> 16 & 1)) & ~nan) | ((bits | 1 << 22) & nan);
    const some e = __builtin_convertvector(rounded >> 16, some);
#else
    const some e = __builtin_convertvector(v, some);
#endif
    if (n == DLANES)
        memcpy(p, &e, sizeof e);
    else
        for (ptrdiff_t i = 0; i < n; i++)
            p[i] = e[i];
}

/* The same of lanes that elements hold exactly. */
INLINE void store_r(elem *p, rvec v, ptrdiff_t n)
{
    typedef elem some __attribute__((vector_size(DLANES * sizeof(elem))));
    some e;
#if HALF == F16 && VEC_BYTES == 64
    const __m128i bits = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
    memcpy(&e, &bits, sizeof e);
#elif HALF == F16 && VEC_BYTES == 32
    const __m128i bits = _mm_cvtps_ph((__m128)v, _MM_FROUND_TO_NEAREST_INT);
    memcpy(&e, &bits, sizeof e);
#elif HALF == F16
    for (ptrdiff_t i = 0; i < DLANES; i++)
        e[i] = cbn_to_f16(v[i]);
#elif HALF
    typedef uint32_t words __attribute__((vector_size(DLANES * sizeof(float))));
    e = __builtin_convertvector((words)v >> 16, some);
#else
    e = v;
#endif
    if (n == DLANES)
        memcpy(p, &e, sizeof e);
    else
        for (ptrdiff_t i = 0; i < n; i++)
            p[i] = e[i];
}

INLINE void copy(elem *to, const elem *from, ptrdiff_t n)
{
    if (n == DLANES)
        memcpy(to, from, DLANES * sizeof *to);
    else
        for (ptrdiff_t i = 0; i < n; i++)
            to[i] = from[i];
}

/* The sum of the lanes, halves first: a fixed order. */
INLINE double total(dvec v)
{
    for (ptrdiff_t half = DLANES / 2; half > 0; half /= 2)
        for (ptrdiff_t i = 0; i < half; i++)
            v[i] += v[i + half];
    return v[0];
}
#endif
