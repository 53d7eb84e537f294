/* set.h: all loops of one instruction set, and its row of the table.
 *
 * Parameters, set by the including file:
 *   ISA        the set's name, the last part of every symbol
 *   TARGET     the attribute that lets a function use the set's instructions
 *   VEC_BYTES  its vector's size: 16, 32 or 64
 *   HAS_BF16   defined: it converts and multiplies bfloat16
 *   BASE       defined: the set whose loops serve for types without bfloat16 arithmetic
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

/* The factors of a channel in the formulas of loops.h; forward has the first three. */
enum { HIGH, SCALE, TERM, SLOPE, GHIGH, ALL_FACTORS };
/* What becomes of a normalized value; see `activation` in loops.h. */
enum { PLAIN, ACTIVATED, CHECKED };
#define FACTORS(backward) ((backward) ? ALL_FACTORS : SLOPE)

#include "types.h"

/* The set's row of the table. */
#define OWN(type) .type = &PASTE(loops, type, ISA),
#ifdef BASE
#define SHARED(type) .type = &PASTE(loops, type, BASE),
#define DECLARE(type) extern const cbn_loops PASTE(loops, type, BASE);
#define NOTHING(type)
TYPES(DECLARE, NOTHING)
#else
#define SHARED(type) OWN(type)
#endif
#define TABLE_(isa) cbn_##isa
#define TABLE(isa) TABLE_(isa)
#define STRING_(s) #s
#define STRING(s) STRING_(s)

const cbn_isa TABLE(ISA) = {.name = STRING(ISA), TYPES(SHARED, OWN)};
