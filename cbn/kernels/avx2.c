/* avx2.c: the loops for AVX2 with FMA. */
#define ISA avx2
#define TARGET __attribute__((target("avx2,fma")))
#define VEC_BYTES 32
#include "instantiate.h"
