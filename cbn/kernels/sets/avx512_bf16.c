/* avx512_bf16.c: the loops of bfloat16 for AVX-512 with instructions for that type; the other types have those of avx512. */
#define ISA avx512_bf16
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")))
#define VEC_BYTES 64
#define HAS_BF16
#define BASE avx512
#include "set.h"
