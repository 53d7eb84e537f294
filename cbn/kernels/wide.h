/* wide.h: functions that are loops over channels. Where gcc can choose at run time they are there twice, and on
 * processors with AVX2 their vectors hold four float64 instead of two. AVX2 has no fused multiply-add by itself, so the
 * bits are the same. Few channels go through the loop in place: a call takes as long as they do. */
#ifndef CBN_WIDE_H
#define CBN_WIDE_H
#include <stddef.h> /* which defines __GLIBC__, whose loader does the choosing */

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && defined(__OPTIMIZE__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define CBN_WIDE __attribute__((target_clones("avx2", "default"), unused)) static
#else
#define CBN_WIDE static inline
#endif

enum { CBN_FEW_CHANNELS = 32 };

/* Defines `name` by the loop `name##_loop`, a CBN_LOOP with parameters `first` and `end`. */
#define CBN_LOOP static inline __attribute__((always_inline))
#define CBN_OVER_CHANNELS(type, name, parameters, arguments)                                              \
    CBN_WIDE type name##_wide parameters                                                                  \
    {                                                                                                     \
        return name##_loop arguments;                                                                     \
    }                                                                                                     \
    static inline type name parameters                                                                    \
    {                                                                                                     \
        return end - first < CBN_FEW_CHANNELS ? name##_loop arguments : name##_wide arguments;            \
    }

#endif
