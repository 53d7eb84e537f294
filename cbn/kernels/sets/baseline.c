/* baseline.c: the loops for what every processor of the architecture has: SSE2 on x86-64, vectors of 16 bytes
 * elsewhere. */
#define ISA baseline
#define TARGET
#define VEC_BYTES 16
#if defined(__x86_64__)
#include <immintrin.h>
#define VEC_HEADER "vec/sse2.h"
#endif
#include "set.h"
