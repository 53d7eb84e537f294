/* instantiate.h: all loops of one instruction set, and its row of the table.
 *
 * Parameters, set by the including file:
 *   ISA        the set's name, last part of every symbol
 *   TARGET     the attribute that lets a function use the set's instructions
 *   VEC_BYTES  its vector's size: 16, 32 or 64
 *   HAS_BF16   defined: it converts and multiplies bfloat16
 *   BASE       defined: the set whose loops serve for types that have nothing to do with bfloat16
 *
 * Each inclusion of loops.h is a call of the template with (ELEM, OUT, REAL, TYPE, WIDENS, SUMS, FORWARD, ELEM_IS_DOUBLE, ELEM_HALF, ELEM_BYTE);
 * see there.
 */
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#define STORE_FENCE() _mm_sfence() /* what was stored past the caches is seen before what follows */
#else
#define STORE_FENCE() ((void)0)
#endif

#include "half.h"
#include "kernels.h"

#define PASTE_(a, b, c) a##_##b##_##c
#define PASTE(a, b, c) PASTE_(a, b, c)
#define LOOP(pass) PASTE(pass, TYPE, ISA)
/* Before a loop of a few vectors, which wait in registers: a call that it may make, rarely, does not keep it rolled up. */
#if defined(__clang__)
#define UNROLLED _Pragma("clang loop unroll(full)")
#else
#define UNROLLED _Pragma("GCC unroll 16")
#endif
#define INLINE TARGET static inline __attribute__((always_inline))

#if VEC_BYTES == 32
/* Lanes from begin to end: all bits, or none. */
INLINE __m128i four_lanes(ptrdiff_t begin, ptrdiff_t end)
{
    const __m128i lane = _mm_set_epi32(3, 2, 1, 0);
    return _mm_and_si128(_mm_cmpgt_epi32(lane, _mm_set1_epi32((int)begin - 1)),
                         _mm_cmpgt_epi32(_mm_set1_epi32((int)end), lane));
}
#endif

/* From first_64 + 8 - n on: n lanes of ones, then zeros. */
static const int64_t first_64[16] = {-1, -1, -1, -1, -1, -1, -1, -1};

#if VEC_BYTES == 64
/* The upper halves of the words of two vectors, as an index. */
static const uint16_t odd_words[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                       33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
#endif

/* What ELEM_HALF says of a 16-bit type. */
#define BF16 1
#define F16 2

/* What ELEM_BYTE says of an 8-bit type. */
#define U8 1
#define I8 2

/* The factors of a channel in the formulas of loops.h; forward has the first three. */
enum { HIGH, SCALE, TERM, SLOPE, GHIGH, ALL_FACTORS };
/* What becomes of a normalized value; see `activation` in loops.h. */
enum { PLAIN, ACTIVATED, CHECKED };
#define FACTORS(backward) ((backward) ? ALL_FACTORS : SLOPE)

#ifndef BASE
#define ELEM float
#define REAL float
#define TYPE f32
#define SUMS
#define ELEM_IS_DOUBLE 0
#define ELEM_HALF 0
#define ELEM_BYTE 0
#include "loops.h"

#define ELEM float
#define REAL double
#define TYPE f32_in_f64
#define WIDENS
#define ELEM_IS_DOUBLE 0
#define ELEM_HALF 0
#define ELEM_BYTE 0
#include "loops.h"

#define ELEM double
#define REAL double
#define TYPE f64
#define SUMS
#define ELEM_IS_DOUBLE 1
#define ELEM_HALF 0
#define ELEM_BYTE 0
#include "loops.h"

#define ELEM uint16_t
#define REAL double
#define TYPE bf16_in_f64
#define WIDENS
#define ELEM_IS_DOUBLE 0
#define ELEM_HALF BF16
#define ELEM_BYTE 0
#include "loops.h"

#define ELEM uint16_t
#define REAL float
#define TYPE f16
#define SUMS
#define ELEM_IS_DOUBLE 0
#define ELEM_HALF F16
#define ELEM_BYTE 0
#include "loops.h"

#define ELEM uint16_t
#define REAL double
#define TYPE f16_in_f64
#define WIDENS
#define ELEM_IS_DOUBLE 0
#define ELEM_HALF F16
#define ELEM_BYTE 0
#include "loops.h"

#define ELEM uint8_t
#define OUT float
#define REAL float
#define TYPE u8_f32
#define FORWARD
#define ELEM_IS_DOUBLE 0
#define ELEM_HALF 0
#define ELEM_BYTE U8
#include "loops.h"

#define ELEM int8_t
#define OUT float
#define REAL float
#define TYPE i8_f32
#define FORWARD
#define ELEM_IS_DOUBLE 0
#define ELEM_HALF 0
#define ELEM_BYTE I8
#include "loops.h"
#endif

#define ELEM uint16_t
#define REAL float
#define TYPE bf16
#define SUMS
#define ELEM_IS_DOUBLE 0
#define ELEM_HALF BF16
#define ELEM_BYTE 0
#include "loops.h"

#define ELEM uint8_t
#define OUT uint16_t
#define REAL float
#define TYPE u8_bf16
#define FORWARD
#define ELEM_IS_DOUBLE 0
#define ELEM_HALF BF16
#define ELEM_BYTE U8
#include "loops.h"

#define ELEM int8_t
#define OUT uint16_t
#define REAL float
#define TYPE i8_bf16
#define FORWARD
#define ELEM_IS_DOUBLE 0
#define ELEM_HALF BF16
#define ELEM_BYTE I8
#include "loops.h"

#ifdef BASE
#define IN(type) PASTE(loops, type, BASE)
extern const cbn_loops IN(f32), IN(f32_in_f64), IN(f64), IN(bf16_in_f64), IN(f16), IN(f16_in_f64), IN(u8_f32), IN(i8_f32);
#else
#define IN(type) OWN(type)
#endif
#define OWN(type) PASTE(loops, type, ISA)
#define TABLE_(isa) cbn_##isa
#define TABLE(isa) TABLE_(isa)
#define STRING_(s) #s
#define STRING(s) STRING_(s)

const cbn_isa TABLE(ISA) = {
    .name = STRING(ISA),
    .f32 = &IN(f32),
    .f32_in_f64 = &IN(f32_in_f64),
    .f64 = &IN(f64),
    .bf16 = &OWN(bf16),
    .bf16_in_f64 = &IN(bf16_in_f64),
    .f16 = &IN(f16),
    .f16_in_f64 = &IN(f16_in_f64),
    .u8_f32 = &IN(u8_f32),
    .u8_bf16 = &OWN(u8_bf16),
    .i8_f32 = &IN(i8_f32),
    .i8_bf16 = &OWN(i8_bf16),
};
