/* set.h: all loops of one instruction set, and its row of the table.
 *
 * Parameters, set by the including file:
 *   ISA        the set's name, the last part of every symbol
 *   TARGET     the attribute that lets a function use the set's instructions
 *   VEC_BYTES  the size of its vectors, a power of 2 from 16 to 64
 *   VEC_HEADER what its instructions do better than vec/vec.h, see there; undefined: nothing. The intrinsics are
 *              included before, since vec.h has macros for some common words
 *   BASE       defined: the set whose loops serve for types without bfloat16 arithmetic
 */
#include <float.h>
#include <stdint.h>
#include <string.h>

#include "half.h"
#include "kernels.h"

#define PASTE_(a, b, c) a##_##b##_##c
#define PASTE(a, b, c) PASTE_(a, b, c)
#define LOOP(pass) PASTE(pass, TYPE, ISA)
/* Before a loop of a few vectors, which wait in registers: a call that it may make, rarely, does not keep it rolled
 * up. */
#if defined(__clang__)
#define UNROLLED _Pragma("clang loop unroll(full)")
#else
#define UNROLLED _Pragma("GCC unroll 16")
#endif
#define INLINE TARGET static inline __attribute__((always_inline))

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
