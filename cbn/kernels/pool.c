/* pool.c: a list of free blocks, oldest first, under a lock that is held for a few instructions. */
#include "pool.h"

#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

enum {
    ALIGNMENT = 64,        /* of the data: a line, so that no run of it begins within one */
    HUGE_PAGE = 1 << 21,   /* from twice this size on a block asks for huge pages, as numpy's own do */
    MOST_BLOCKS = 64,
};

/* In front of the data, and where the block begins. */
typedef struct {
    size_t capacity; /* bytes of data */
} header;

static header *kept[MOST_BLOCKS];
static int n_kept;
static size_t kept_bytes, limit_bytes;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void acquire(void)
{
    pthread_mutex_lock(&lock);
}

static void release(void)
{
    pthread_mutex_unlock(&lock);
}

/* A forked child has no thread that could release a lock which another thread held at the fork. */
__attribute__((constructor)) static void hold_across_forks(void)
{
    pthread_atfork(acquire, release, release);
}

static header *header_of(void *p)
{
    return (header *)((char *)p - ALIGNMENT);
}

static void *data_of(header *h)
{
    return (char *)h + ALIGNMENT;
}

static header *take_out(int i)
{
    header *h = kept[i];
    kept_bytes -= h->capacity;
    n_kept--;
    memmove(kept + i, kept + i + 1, (size_t)(n_kept - i) * sizeof *kept);
    return h;
}

/* How much larger than asked for a block may be, to be used all the same. */
static int fits(const header *h, size_t size)
{
    return h->capacity >= size && h->capacity - size <= size / 4 + HUGE_PAGE;
}

static void *new_block(size_t size)
{
    const size_t alignment = size >= 2 * HUGE_PAGE ? HUGE_PAGE : ALIGNMENT;
    if (size > PTRDIFF_MAX - ALIGNMENT - HUGE_PAGE)
        return NULL;
    const size_t whole = (size + ALIGNMENT + alignment - 1) / alignment * alignment;
    header *h = aligned_alloc(alignment, whole);
    if (!h && cbn_pool_release())
        h = aligned_alloc(alignment, whole);
    if (!h)
        return NULL;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (alignment == HUGE_PAGE)
        madvise(h, whole, MADV_HUGEPAGE);
#endif
    h->capacity = whole - ALIGNMENT;
    return data_of(h);
}

void *cbn_pool_malloc(void *ctx, size_t size)
{
    (void)ctx;
    int best = -1;
    header *h = NULL;
    if (size >= CBN_POOL_LEAST) {
        acquire();
        /* The smallest that is large enough, and not much too large; of equals the one used last. */
        for (int i = n_kept - 1; i >= 0; i--)
            if (fits(kept[i], size) && (best < 0 || kept[i]->capacity < kept[best]->capacity))
                best = i;
        if (best >= 0)
            h = take_out(best);
        release();
    }
    return h ? data_of(h) : new_block(size);
}

void *cbn_pool_calloc(void *ctx, size_t n, size_t size)
{
    if (size && n > SIZE_MAX / size)
        return NULL;
    void *p = cbn_pool_malloc(ctx, n * size);
    return p ? memset(p, 0, n * size) : NULL;
}

/* What is over the limit, oldest first; the caller holds the lock, and frees what this returns without it. */
static int over_limit(header *out[])
{
    int n = 0;
    while (n_kept && (kept_bytes > limit_bytes || n_kept == MOST_BLOCKS))
        out[n++] = take_out(0);
    return n;
}

void cbn_pool_free(void *ctx, void *p, size_t size)
{
    (void)ctx, (void)size;
    if (!p)
        return;
    header *h = header_of(p), *out[MOST_BLOCKS];
    int n = 0;
    acquire();
    const int keep = h->capacity >= CBN_POOL_LEAST && h->capacity <= limit_bytes;
    if (keep) {
        kept[n_kept++] = h;
        kept_bytes += h->capacity;
        n = over_limit(out);
    }
    release();
    if (!keep)
        free(h);
    while (n)
        free(out[--n]);
}

/* The C library's realloc keeps neither the alignment nor the huge pages, so what does not fit moves. */
void *cbn_pool_realloc(void *ctx, void *p, size_t size)
{
    if (!p)
        return cbn_pool_malloc(ctx, size);
    header *h = header_of(p);
    if (fits(h, size))
        return p;
    void *q = cbn_pool_malloc(ctx, size);
    if (!q)
        return h->capacity >= size ? p : NULL;
    memcpy(q, p, size < h->capacity ? size : h->capacity);
    cbn_pool_free(ctx, p, h->capacity);
    return q;
}

void cbn_pool_limit(size_t bytes)
{
    header *out[MOST_BLOCKS];
    acquire();
    limit_bytes = bytes;
    int n = over_limit(out);
    release();
    while (n)
        free(out[--n]);
}

size_t cbn_pool_release(void)
{
    header *out[MOST_BLOCKS];
    int n = 0;
    acquire();
    const size_t bytes = kept_bytes;
    while (n_kept)
        out[n++] = take_out(0);
    release();
    while (n)
        free(out[--n]);
    return bytes;
}

size_t cbn_pool_kept(void)
{
    acquire();
    const size_t bytes = kept_bytes;
    release();
    return bytes;
}
