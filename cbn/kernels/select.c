/* select.c: which instruction sets were built and which of them this processor runs. */
#include "kernels.h"

const cbn_isa *const cbn_built[] = {
    &cbn_baseline,
#if defined(__x86_64__)
    &cbn_avx2,
    &cbn_avx512,
    &cbn_avx512_bf16,
#endif
    NULL,
};

int cbn_highest(void)
{
#if defined(__x86_64__)
    /* Each rung asks for just what its file's TARGET names; the builtin looks at the operating system's
     * support for the registers too. */
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
        return 0;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
        return 1;
    return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
#else
    return 0;
#endif
}

int cbn_process_threads = 0;
_Thread_local int cbn_thread_threads = 0;
