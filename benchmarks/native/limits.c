/* limits.c: what the memory of this machine can do, for the same arrays that the contenders use.
 *
 * read: sum an array. scale: y = a*x + b with plain or with streaming stores; in place with y = x. Threads take equal
 * parts, from SERIAL values on: below, waking a thread costs more than it saves. Built on demand.
 */
#include <immintrin.h>
#include <stddef.h>

#define SERIAL (1 << 17)

static float sink;

__attribute__((target("avx2,fma"))) static void read_part(const float *x, ptrdiff_t n, float *out)
{
    __m256 s[8];
    for (int u = 0; u < 8; u++)
        s[u] = _mm256_setzero_ps();
    for (ptrdiff_t i = 0; i + 64 <= n; i += 64)
        for (int u = 0; u < 8; u++)
            s[u] = _mm256_add_ps(s[u], _mm256_loadu_ps(x + i + 8 * u));
    for (int u = 1; u < 8; u++)
        s[0] = _mm256_add_ps(s[0], s[u]);
    *out = _mm256_cvtss_f32(s[0]);
}

__attribute__((target("avx2,fma"))) static void scale_part(const float *x, float *y, ptrdiff_t n, int stream)
{
    const __m256 a = _mm256_set1_ps(0.5f), b = _mm256_set1_ps(0.25f);
    ptrdiff_t i = 0;
    for (; i < n && ((size_t)(y + i) & 31); i++)
        y[i] = 0.5f * x[i] + 0.25f;
    if (stream)
        for (; i + 32 <= n; i += 32)
            for (int u = 0; u < 4; u++)
                _mm256_stream_ps(y + i + 8 * u, _mm256_fmadd_ps(_mm256_loadu_ps(x + i + 8 * u), a, b));
    else
        for (; i + 32 <= n; i += 32)
            for (int u = 0; u < 4; u++)
                _mm256_store_ps(y + i + 8 * u, _mm256_fmadd_ps(_mm256_loadu_ps(x + i + 8 * u), a, b));
    for (; i < n; i++)
        y[i] = 0.5f * x[i] + 0.25f;
    _mm_sfence();
}

static ptrdiff_t cut(ptrdiff_t n, int part, int parts)
{
    return part == parts ? n : n / parts * part / 64 * 64;
}

void limit_read(const float *x, ptrdiff_t n, int threads)
{
    float total = 0;
    if (n < SERIAL)
        threads = 1;
#pragma omp parallel for num_threads(threads) if (n >= SERIAL) reduction(+ : total)
    for (int t = 0; t < threads; t++) {
        float part;
        read_part(x + cut(n, t, threads), cut(n, t + 1, threads) - cut(n, t, threads), &part);
        total += part;
    }
    sink = total;
}

void limit_scale(const float *x, float *y, ptrdiff_t n, int threads, int stream)
{
    if (n < SERIAL)
        threads = 1;
#pragma omp parallel for num_threads(threads) if (n >= SERIAL)
    for (int t = 0; t < threads; t++)
        scale_part(x + cut(n, t, threads), y + cut(n, t, threads), cut(n, t + 1, threads) - cut(n, t, threads), stream);
}
