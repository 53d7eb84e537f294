/* avx512_bf16.c: the bfloat16 loops for AVX-512 with bfloat16 instructions; other types have those of avx512. */
#include <immintrin.h>
#define ISA avx512_bf16
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")))
#define VEC_BYTES 64
#define BASE avx512
#define VEC_HEADER "vec/avx512_bf16.h"
#include "set.h"
