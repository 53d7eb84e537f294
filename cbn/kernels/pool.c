/* pool.c: a list of free blocks, oldest first, under a lock that is held for a few instructions. */
#include "pool.h"

#include <stdatomic.h>
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

/* In front of the data. */
typedef struct {
    void *block;
    size_t capacity; /* bytes of data; 0: too small to be kept */
} header;

static header *kept[MOST_BLOCKS];
static int n_kept;
static size_t kept_bytes, limit_bytes;
static atomic_flag lock = ATOMIC_FLAG_INIT;

static void acquire(void)
{
    while (atomic_flag_test_and_set_explicit(&lock, memory_order_acquire))
        ;
}

static void release(void)
{
    atomic_flag_clear_explicit(&lock, memory_order_release);
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

static void *new_block(size_t size, int zeroed)
{
    const size_t alignment = size >= 2 * HUGE_PAGE ? HUGE_PAGE : ALIGNMENT;
    if (size > SIZE_MAX / 2)
        return NULL;
    const size_t whole = (size + ALIGNMENT + alignment - 1) / alignment * alignment;
    header *h = aligned_alloc(alignment, whole);
    if (!h)
        return NULL;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (alignment == HUGE_PAGE)
        madvise(h, whole, MADV_HUGEPAGE);
#endif
    if (zeroed)
        memset(h, 0, whole);
    h->block = h;
    h->capacity = size >= CBN_POOL_LEAST ? whole - ALIGNMENT : 0;
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
            if (kept[i]->capacity >= size && kept[i]->capacity - size <= size / 4 + HUGE_PAGE &&
                (best < 0 || kept[i]->capacity < kept[best]->capacity))
                best = i;
        if (best >= 0)
            h = take_out(best);
        release();
    }
    return h ? data_of(h) : new_block(size, 0);
}

void *cbn_pool_calloc(void *ctx, size_t n, size_t size)
{
    (void)ctx;
    if (size && n > SIZE_MAX / size)
        return NULL;
    return new_block(n * size, 1);
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
    const int keep = h->capacity && h->capacity <= limit_bytes;
    if (keep) {
        kept[n_kept++] = h;
        kept_bytes += h->capacity;
        n = over_limit(out);
    }
    release();
    if (!keep)
        free(h->block);
    while (n)
        free(out[--n]->block);
}

void *cbn_pool_realloc(void *ctx, void *p, size_t size)
{
    if (!p)
        return cbn_pool_malloc(ctx, size);
    header *h = header_of(p);
    if (h->capacity >= size && size >= CBN_POOL_LEAST)
        return p;
    /* numpy does not say how large the array was: a small block's size is not recorded either, so move at most that */
    void *q = realloc(h->block, size + ALIGNMENT);
    if (!q)
        return NULL;
    h = q;
    h->block = h;
    h->capacity = size >= CBN_POOL_LEAST ? size : 0;
    return data_of(h);
}

void cbn_pool_limit(size_t bytes)
{
    header *out[MOST_BLOCKS];
    acquire();
    limit_bytes = bytes;
    int n = over_limit(out);
    release();
    while (n)
        free(out[--n]->block);
}

size_t cbn_pool_kept(void)
{
    acquire();
    const size_t bytes = kept_bytes;
    release();
    return bytes;
}
