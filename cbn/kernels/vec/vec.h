/* vec.h: what a vector, a load and a store are, for one TYPE on one instruction set.
 *
 * The compiler's vector extension gives + - * on vectors, so that the loops read as their formulas and the order of
 * every sum stands in the source. Loads and stores are memcpy, which takes any address. Here and in sums.h is every
 * primitive for vectors of any size. The set's header, VEC_HEADER, has those that its instructions do better: for a
 * primitive `load_part` it defines HAVE_LOAD_PART, a condition on the type, and the function where that holds. These
 * are conversions (gcc 12 makes four instructions of the eight-lane __builtin_convertvector where the processor has
 * one), parts of a vector, and non-temporal stores.
 *
 * For the loops: elem, elem_out, real, vec, LANES, load, load_part, load_out, load_out_part, store, store_part,
 * store_nontemporal, store_two, STORE_FENCE, blend, select, clamped, lanes_of, load_real, splat, quiet, any_nan; with
 * SUMS those of sums.h.
 */
#define elem LOOP(elem)
#define elem_out LOOP(elem_out)
#define real LOOP(real)
#define vec LOOP(vec)
#define vec_bits LOOP(vec_bits)
#define lane_int LOOP(lane_int)
#define lane_bits LOOP(lane_bits)
#define packed LOOP(packed)
#define packed_out LOOP(packed_out)
#define unpack LOOP(unpack)
#define unpack_out LOOP(unpack_out)
#define rounded LOOP(rounded)
#define pack LOOP(pack)
#define load LOOP(load)
#define load_part LOOP(load_part)
#define load_out LOOP(load_out)
#define load_out_part LOOP(load_out_part)
#define store LOOP(store)
#define store_part LOOP(store_part)
#define store_nontemporal LOOP(store_nontemporal)
#define store_two LOOP(store_two)
#define select LOOP(select)
#define clamped LOOP(clamped)
#define lanes_of LOOP(lanes_of)
#define some_lanes LOOP(some_lanes)
#define blend LOOP(blend)
#define load_real LOOP(load_real)
#define splat LOOP(splat)
#define quiet LOOP(quiet)
#define any_nan LOOP(any_nan)
/* Those of sums.h, which the set's header may define */
#define dvec LOOP(dvec)
#define dvec_bits LOOP(dvec_bits)
#define rvec LOOP(rvec)
#define rvec_bits LOOP(rvec_bits)
#define packed_r LOOP(packed_r)
#define load_r LOOP(load_r)
#define load_first_r LOOP(load_first_r)
#define widened LOOP(widened)
#define widened_bits LOOP(widened_bits)
#define joined LOOP(joined)
#define narrowed LOOP(narrowed)
#define select_r LOOP(select_r)
#define load_d LOOP(load_d)
#define load_first_d LOOP(load_first_d)
#define load_double LOOP(load_double)
#define store_double LOOP(store_double)
#define splat_d LOOP(splat_d)
#define roots LOOP(roots)
#define first_lanes LOOP(first_lanes)
#define select_d LOOP(select_d)
#define smaller LOOP(smaller)
#define larger LOOP(larger)
#define load_first_doubles LOOP(load_first_doubles)
#define total LOOP(total)
#define pack_d LOOP(pack_d)
#define pack_r LOOP(pack_r)
#define store_d LOOP(store_d)
#define store_r LOOP(store_r)
#define copy LOOP(copy)
#define lower_d LOOP(lower_d)
#define upper_d LOOP(upper_d)
#define folded_d LOOP(folded_d)
#define load_two LOOP(load_two)
#define add_four LOOP(add_four)
#define LANES ((ptrdiff_t)(VEC_BYTES / sizeof(REAL)))
#define DLANES ((ptrdiff_t)(VEC_BYTES / sizeof(double)))

typedef ELEM elem;
typedef OUT elem_out;
typedef REAL real;
typedef __typeof__(__builtin_choose_expr(sizeof(REAL) == 8, (int64_t)0, (int32_t)0)) lane_int;
typedef __typeof__(__builtin_choose_expr(sizeof(REAL) == 8, (uint64_t)0, (uint32_t)0)) LOOP(lane_word);
typedef real vec __attribute__((vector_size(VEC_BYTES)));
typedef LOOP(lane_word) vec_bits __attribute__((vector_size(VEC_BYTES))); /* its bits */
typedef lane_int lane_bits __attribute__((vector_size(VEC_BYTES))); /* what holds in each lane: all bits, or none */
typedef elem packed __attribute__((vector_size(VEC_BYTES / sizeof(REAL) * sizeof(ELEM))));
typedef elem_out packed_out __attribute__((vector_size(VEC_BYTES / sizeof(REAL) * sizeof(OUT))));

#if SUMS
/* Of reductions: float64 lanes; as many elements, in the arithmetic of apply and in memory. */
typedef double dvec __attribute__((vector_size(VEC_BYTES)));
typedef int64_t dvec_bits __attribute__((vector_size(VEC_BYTES)));
typedef real rvec __attribute__((vector_size(DLANES * sizeof(real))));
typedef lane_int rvec_bits __attribute__((vector_size(DLANES * sizeof(real))));
typedef elem packed_r __attribute__((vector_size(DLANES * sizeof(elem))));
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

#if HALF == BF16 && !WIDENS
/* The upper half of each lane is the bfloat16 nearest to it, ties to even. A NaN stays one: arithmetic makes quiet ones
 * alone, which carry what came in with a 16-bit element or a `quiet` factor, and the lower half of those is zero. */
INLINE vec_bits rounded(vec v);
#endif

#ifdef VEC_HEADER
#include VEC_HEADER
#endif

#ifndef STORE_FENCE
#define STORE_FENCE() ((void)0) /* non-temporal stores are seen before what follows */
#endif

/* ---- elements and lanes ---- */

/* No less than low, no more than high; NaN stays. */
#if !HAVE_CLAMPED
INLINE vec clamped(vec v, vec low, vec high)
{
    const vec raised = select(v < low, low, v);
    return select(raised > high, high, raised);
}
#endif

#define ONE_BY_ONE (HALF && (WIDENS || HALF == F16)) /* no instruction, or it is rare; not inlined, for it is long */

#if !HAVE_UNPACK
#if ONE_BY_ONE
TARGET static __attribute__((noinline)) vec unpack(packed e)
{
    vec v;
    for (ptrdiff_t i = 0; i < LANES; i++)
        v[i] = HALF == F16 ? cbn_from_f16(e[i]) : cbn_from_bf16(e[i]);
    return v;
}
#else
INLINE vec unpack(packed e)
{
#if BYTE
    vec v;
    for (ptrdiff_t i = 0; i < LANES; i++)
        v[i] = e[i];
    return v;
#elif HALF
    return (vec)(__builtin_convertvector(e, vec_bits) << 16);
#else
    return __builtin_convertvector(e, vec);
#endif
}
#endif
#endif

#if BYTE && !HAVE_UNPACK_OUT
/* The same of an element of y. */
INLINE vec unpack_out(packed_out e)
{
#if HALF
    return (vec)(__builtin_convertvector(e, vec_bits) << 16);
#else
    return e;
#endif
}
#endif

#if HALF == BF16 && !WIDENS && !HAVE_ROUNDED
INLINE vec_bits rounded(vec v)
{
    const vec_bits b = (vec_bits)v;
    return b + 0x7fff + (b >> 16 & 1);
}
#endif

/* Rounded to nearest, ties to even. */
#if !HAVE_PACK
#if ONE_BY_ONE
TARGET static __attribute__((noinline)) packed_out pack(vec v)
{
    packed_out e;
    for (ptrdiff_t i = 0; i < LANES; i++)
        e[i] = HALF == F16 ? cbn_to_f16((float)v[i]) : cbn_to_bf16((float)v[i]);
    return e;
}
#else
INLINE packed_out pack(vec v)
{
#if HALF
    return __builtin_convertvector(rounded(v) >> 16, packed_out);
#else
    return __builtin_convertvector(v, packed_out);
#endif
}
#endif
#endif

/* ---- loads and stores ---- */

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

/* Elements from begin to end <= LANES in their lanes, and zeros; no other is read, or written. */
#if !HAVE_LOAD_PART
INLINE vec load_part(const elem *p, ptrdiff_t begin, ptrdiff_t end)
{
    packed e = {0};
    for (ptrdiff_t i = begin; i < end; i++)
        e[i] = p[i];
    return unpack(e);
}
#endif

#if !HAVE_STORE_PART
INLINE void store_part(elem_out *p, vec v, ptrdiff_t begin, ptrdiff_t end)
{
    packed_out e = pack(v);
    for (ptrdiff_t i = begin; i < end; i++)
        p[i] = e[i];
}
#endif

/* Loads of elements of y's type, as a residual has them. */
INLINE vec load_out(const elem_out *p)
{
#if BYTE
    packed_out e;
    memcpy(&e, p, sizeof e);
    return unpack_out(e);
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
    return unpack_out(e);
#else
    return load_part(p, begin, end);
#endif
}

/* A store that neither reads the cache line from memory first nor keeps it in a cache; p is aligned to its size. Where
 * a vector's elements are 8 bytes or fewer the processor has none. */
#if !HAVE_STORE_NONTEMPORAL
INLINE void store_nontemporal(elem_out *p, vec v)
{
    store(p, v);
}
#endif

/* Two vectors, side by side. `normal`: no value is subnormal, so that `pack_normal` of the set may convert them. */
#if !HAVE_STORE_TWO
INLINE void store_two(elem_out *p, const vec *v, const int nontemporal, const int normal)
{
    (void)normal;
    for (int i = 0; i < 2; i++)
        if (nontemporal)
            store_nontemporal(p + i * LANES, v[i]);
        else
            store(p + i * LANES, v[i]);
}
#endif

/* ---- lanes ---- */

/* Lanes from begin to end of a, the others of b. */
INLINE vec blend(vec a, vec b, ptrdiff_t begin, ptrdiff_t end)
{
    return select(some_lanes(begin, end), a, b);
}

/* What holds in each lane, from a byte of each that is -1 or 0. */
#if !HAVE_LANES_OF
INLINE lane_bits lanes_of(const int8_t *p)
{
    lane_bits lanes = {0};
    for (int i = 0; i < LANES; i++)
        lanes[i] = p[i];
    return lanes;
}
#endif

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

/* A factor; if it is NaN, one whose lower half is zero, see `rounded`. */
INLINE real quiet(real a)
{
    return HALF && a != a ? (real)NAN : a;
}

/* Whether a lane is NaN. */
#if !HAVE_ANY_NAN
INLINE int any_nan(vec v)
{
    const lane_bits nan = v != v;
    lane_int some = 0;
    for (int i = 0; i < LANES; i++)
        some |= nan[i];
    return some != 0;
}
#endif

#if SUMS
#include "sums.h"
#endif
