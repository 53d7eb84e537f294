/* pool.h: memory of large outputs, used again. What numpy calls for the arrays that arrays.empty_like makes.
 *
 * A new block of 100 MB costs more in page faults than a pass over it. A block that is given back stays here, up to
 * a limit in all, for the next output of about its size.
 */
#ifndef CBN_POOL_H
#define CBN_POOL_H
#include <stddef.h>

enum { CBN_POOL_LEAST = 1 << 20 }; /* bytes; the C library itself keeps smaller blocks */

void *cbn_pool_malloc(void *ctx, size_t size);
void *cbn_pool_calloc(void *ctx, size_t n, size_t size);
void *cbn_pool_realloc(void *ctx, void *p, size_t size);
void cbn_pool_free(void *ctx, void *p, size_t size);

void cbn_pool_limit(size_t bytes); /* keep at most so many bytes that nobody uses; 0: none */
size_t cbn_pool_kept(void);        /* so many are kept now */
size_t cbn_pool_release(void);     /* give these back to the system; returns how many they were */

#endif
