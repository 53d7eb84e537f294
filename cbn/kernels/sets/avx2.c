/* avx2.c: the loops for AVX2 with FMA and the float16 conversions. */
#include <immintrin.h>
#define ISA avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define VEC_BYTES 32
#define VEC_HEADER "vec/avx2.h"
#include "set.h"
