/* instantiate.h: all loops of one instruction set, and its row of the table.
 *
 * Parameters, set by the including file:
 *   ISA        the set's name, last part of every symbol
 *   TARGET     the attribute that lets a function use the set's instructions
 *   VEC_BYTES  its vector's size: 16, 32 or 64
 *
 * Each inclusion of loops.h is a call of the template with (ELEM, REAL, TYPE, WIDENS, SUMS); see there.
 */
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#define STORE_FENCE() _mm_sfence() /* what was stored past the caches is seen before what follows */
#else
#define STORE_FENCE() ((void)0)
#endif

#include "kernels.h"

#define PASTE_(a, b, c) a##_##b##_##c
#define PASTE(a, b, c) PASTE_(a, b, c)
#define LOOP(pass) PASTE(pass, TYPE, ISA)
#define INLINE TARGET static inline __attribute__((always_inline))

#define ELEM float
#define REAL float
#define TYPE f32
#include "loops.h"

#define ELEM float
#define REAL double
#define TYPE f32_wide
#define WIDENS
#define SUMS
#include "loops.h"

#define ELEM double
#define REAL double
#define TYPE f64
#define SUMS
#include "loops.h"

#define NAMED(type, pass) PASTE(pass, type, ISA)
/* maps: the type of the element-wise loops; sums: the type of the reductions. */
#define LOOPS(maps, sums)                                                                  \
    {                                                                                      \
        NAMED(sums, moments_first), NAMED(sums, moments_last),                             \
        NAMED(maps, apply_first), NAMED(maps, apply_last),                                 \
        NAMED(sums, grad_moments_first), NAMED(sums, grad_moments_last),                   \
        NAMED(maps, grad_apply_first), NAMED(maps, grad_apply_last),                       \
    }
#define TABLE_(isa) cbn_##isa
#define TABLE(isa) TABLE_(isa)
#define STRING_(s) #s
#define STRING(s) STRING_(s)

const cbn_isa TABLE(ISA) = {
    .name = STRING(ISA),
    .f32 = LOOPS(f32, f32_wide),
    .f32_wide = LOOPS(f32_wide, f32_wide),
    .f64 = LOOPS(f64, f64),
};
