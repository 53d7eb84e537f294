/* select.c: which instruction sets were built and which of them this processor runs. */
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "kernels.h"

const cbn_isa *const cbn_built[] = {
    &cbn_baseline,
#if defined(__x86_64__)
    &cbn_avx2,
    &cbn_avx512,
    &cbn_avx512_bf16,
#elif defined(__aarch64__)
    &cbn_neon,
#endif
    NULL,
};

int cbn_highest(void)
{
#if defined(__x86_64__)
    /* Each rung asks for just what its file's TARGET names. The builtin looks at the operating system's support for the
     * registers too; f16c and avx512bf16 need no others, and are names that it does not know in every compiler. */
    unsigned a, b, c, d;
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
        !(__get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C))
        return 0;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
        return 1;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && a & bit_AVX512BF16 ? 3 : 2;
#elif defined(__aarch64__)
    return 1; /* part of the architecture */
#else
    return 0;
#endif
}
