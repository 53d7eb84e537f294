/* threads.h: how many threads a parallel region can have. It decides; the region itself is `run` in engine.pyx.
 *
 * An OpenMP runtime ends the process where a thread cannot be created, and waits for ever in a forked child for threads
 * that only the parent has. Neither can be noticed afterwards, so both are found out before a region is opened.
 */
#ifndef CBN_THREADS_H
#define CBN_THREADS_H
#include <stddef.h>

enum { CBN_MOST_THREADS = 1024 }; /* that can be asked for */

/* What is known of a thread that opens parallel regions. libgomp keeps the threads of a region for the next one that
 * the same thread opens: each thread has a pool of its own. */
typedef struct {
    int asked;   /* threads that `num_threads` asks for; 0: nobody did */
    int pool;    /* of the last region, this one included; where the next has fewer, the others end. 0: no region yet */
    int proven;  /* so many could be created at once, under these bounds: */
    unsigned long proven_limit; /* of processes */
    long proven_user;
    int most;    /* fewer than were wanted, until `retry`; 0: no such bound */
    double retry;
    int forked;  /* one of the following */
    int opening; /* the lock is held until the region is open */
} cbn_thread;

enum {
    CBN_NOT_FORKED, /* or it has been found out that no pool was lost */
    CBN_FORKED,     /* this thread forked the process; other libraries may have opened regions in it before */
    CBN_POOL_LOST,  /* this thread's pool stayed in the parent: a region would wait for it */
};

extern int cbn_process_threads; /* that the process asks for; 0: nobody did */
extern _Thread_local cbn_thread cbn_here;

/* Opens a parallel region of two threads, by cbn_region_is_open; set before anything else is called. */
extern void (*cbn_open_region)(void);
/* Gives memory that nobody uses back to the system and returns how much, where a thread could not be created. */
extern size_t (*cbn_release_memory)(void);

/* How many threads, up to n, a region that is opened next can have; 1: open none. If it is more than this thread's
 * pool, the caller opens that region at once, and its first thread, the caller's own, calls cbn_region_is_open. */
int cbn_threads_for_region(int n);
void cbn_region_is_open(void);

/* How many, up to n, a region would have now, as far as that is known. */
int cbn_threads_now(int n);

#endif
