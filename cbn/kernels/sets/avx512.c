/* avx512.c: the loops for AVX-512 with the byte, doubleword and vector-length extensions. */
#include <immintrin.h>
#define ISA avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define VEC_BYTES 64
#define VEC_HEADER "vec/avx512.h"
#include "set.h"
