/* avx2.c: the loops for AVX2 with FMA and the conversions of float16. */
#define ISA avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define VEC_BYTES 32
#include "set.h"
