/* threads.c: before a region has more threads than were ever created, as many are created here, all at once, and
 * end. */
#if !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif
#include "threads.h"

#include <stddef.h>

int cbn_process_threads = 0;
_Thread_local cbn_thread cbn_here;
void (*cbn_open_region)(void);
size_t (*cbn_release_memory)(void);

#if !defined(_OPENMP)

int cbn_threads_for_region(int n)
{
    return n;
}

int cbn_threads_now(int n)
{
    return n;
}

void cbn_region_is_open(void)
{
}

#else

#include <ctype.h>
#include <fcntl.h>
#include <limits.h>
#include <omp.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>
#if defined(__linux__)
#include <sys/syscall.h>
#endif


enum { RETRY_SECONDS = 1 }; /* for so long a refusal holds: a trial at every call would cost more than threads bring */

/* Held from a trial until the region is open: what one thread has found to be free, another must not take. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_attr_t attributes; /* of a thread, as libgomp creates it */
static size_t stack_bytes;
static int forked_before; /* this process was forked, and did not exec, before cbn was loaded */

static void before_fork(void)
{
    pthread_mutex_lock(&lock);
}

static void after_fork_in_parent(void)
{
    pthread_mutex_unlock(&lock);
}

static void after_fork_in_child(void)
{
    /* The child has one thread, a copy of the one that called fork. */
    if (cbn_here.forked != CBN_POOL_LOST)
        cbn_here.forked = cbn_here.pool > 1 ? CBN_POOL_LOST : CBN_FORKED;
    cbn_here.proven = cbn_here.most = 0;
    pthread_mutex_unlock(&lock);
}

/* The stack of OpenMP's threads, if somebody asks for one: a number and B, K (where there is none), M or G. */
static size_t asked_stack_bytes(void)
{
    static const char *const names[] = {"OMP_STACKSIZE", "GOMP_STACKSIZE"};
    for (int i = 0; i < 2; i++) {
        const char *text = getenv(names[i]);
        char *end;
        if (!text)
            continue;
        const unsigned long n = strtoul(text, &end, 10);
        if (end == text)
            continue;
        while (isspace((unsigned char)*end))
            end++;
        const int unit = tolower((unsigned char)*end), shift = unit == 'b' ? 0 : unit == 'm' ? 20 : unit == 'g' ? 30 : 10;
        if (n <= SIZE_MAX >> shift)
            return (size_t)n << shift;
    }
    return 0;
}

/* Whether this process is a fork that has not called exec: PF_FORKNOEXEC among the flags, the ninth field of its
 * stat. */
static int is_a_fork(void)
{
    unsigned flags = 0;
#if defined(__linux__)
    char text[512], *end;
    const int file = open("/proc/self/stat", O_RDONLY | O_CLOEXEC);
    const ssize_t n = file < 0 ? 0 : read(file, text, sizeof text - 1);
    if (file >= 0)
        close(file);
    text[n > 0 ? n : 0] = 0;
    end = strrchr(text, ')'); /* the second field, which may hold anything */
    if (end)
        sscanf(end + 1, " %*c %*d %*d %*d %*d %*d %u", &flags);
#endif
    return (flags & 0x40) != 0;
}

__attribute__((constructor)) static void at_load(void)
{
    const size_t asked = asked_stack_bytes();
    forked_before = is_a_fork();
    pthread_attr_init(&attributes);
    if (asked)
        pthread_attr_setstacksize(&attributes, asked); /* where that is refused, libgomp takes the default too */
    pthread_attr_getstacksize(&attributes, &stack_bytes);
    pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

typedef struct {
    pthread_t thread;
    pthread_mutex_t *gate;
    long id; /* of the system */
} waiting;

static void *wait_at_gate(void *p)
{
    waiting *w = p;
#if defined(__linux__)
    w->id = syscall(SYS_gettid);
#endif
    pthread_mutex_lock(w->gate);
    pthread_mutex_unlock(w->gate);
    return NULL;
}

/* The system counts a thread for some time after it has been joined. */
static void wait_until_gone(const waiting *w)
{
#if defined(__linux__)
    const struct timespec pause = {0, 20000};
    for (int i = 0; i < 5000 && syscall(SYS_tgkill, (long)getpid(), w->id, 0) == 0; i++)
        nanosleep(&pause, NULL);
#else
    (void)w;
#endif
}

/* How many of n more threads can be created now, beside what OpenMP itself allocates for a region. */
static int can_start(int n)
{
    pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
    waiting *of = malloc((size_t)n * (sizeof *of + 1024));
    int k = 0;
    if (!of)
        return 0;
    pthread_mutex_lock(&gate);
    for (; k < n; k++) {
        of[k].gate = &gate;
        if (pthread_create(&of[k].thread, &attributes, wait_at_gate, of + k))
            break;
    }
    pthread_mutex_unlock(&gate);
    for (int i = 0; i < k; i++)
        pthread_join(of[i].thread, NULL);
    for (int i = 0; i < k; i++)
        wait_until_gone(of + i);
    free(of);
    return k;
}

/* Whether there is memory for the stacks of n threads that ended and are created again; a trial without threads. */
static int have_room(int n)
{
    const size_t size = (size_t)n * (stack_bytes + (1 << 16));
    void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED)
        return 0;
    munmap(p, size);
    return 1;
}

/* ---- a forked child ------------------------------------------------------------------------------------------- */

#if defined(__linux__)
static int has_value(int key)
{
    return pthread_getspecific((pthread_key_t)key) != NULL;
}

static void *find_mark(void *p)
{
    int *mark = p, n = 0;
    char before[PTHREAD_KEYS_MAX];
    free(malloc(1)); /* an allocator may have a mark of its own */
    for (int key = 0; key < PTHREAD_KEYS_MAX; key++)
        before[key] = (char)has_value(key);
    cbn_here.pool = 2; /* both have been proven */
    cbn_open_region();
    for (int key = 0; key < PTHREAD_KEYS_MAX; key++)
        if (has_value(key) && !before[key]) {
            *mark = key;
            n++;
        }
    if (n != 1)
        *mark = -1;
    return NULL;
}
#endif

/* Whether this thread has opened a region before the fork, by whatever library: the runtime does not tell. But it marks
 * a thread that does, to be called when it ends, with a value that belongs to the thread (pthread_setspecific). Which
 * mark that is shows in a new thread, which surely has no pool, and opens a region. Returns 0 where it could not be
 * tried. */
static int find_out(void)
{
    int mark = -1;
#if defined(__linux__)
    pthread_t thread;
    if (can_start(2) < 2 || pthread_create(&thread, &attributes, find_mark, &mark))
        return 0;
    pthread_join(thread, NULL);
    cbn_here.forked = mark >= 0 && !has_value(mark) ? CBN_NOT_FORKED : CBN_POOL_LOST;
#else
    cbn_here.forked = CBN_POOL_LOST;
#endif
    return 1;
}

/* Where cbn was loaded in a child, the copy of the thread that forked is the child's first one. */
static void see_fork(void)
{
#if defined(__linux__)
    if (forked_before && !cbn_here.pool && cbn_here.forked == CBN_NOT_FORKED && syscall(SYS_gettid) == getpid()) {
        cbn_here.forked = CBN_FORKED;
        forked_before = 0; /* it is asked once: afterwards the thread has a pool, or a lost one */
    }
#endif
}

/* ---- what a region asks --------------------------------------------------------------------------------------- */

static int bounded(int n)
{
    if (!cbn_here.most || n <= cbn_here.most)
        return n;
    if (now() < cbn_here.retry)
        return cbn_here.most;
    cbn_here.most = 0;
    return n;
}

static int at_most(int n)
{
    cbn_here.most = n;
    cbn_here.retry = now() + RETRY_SECONDS;
    return n;
}

/* What bounds the number of threads, as far as it can be asked for cheaply: whether a proof still holds. */
static void bounds_now(cbn_thread *of)
{
    struct rlimit limit = {0, 0};
#if defined(RLIMIT_NPROC)
    getrlimit(RLIMIT_NPROC, &limit);
#endif
    of->proven_limit = (unsigned long)limit.rlim_cur;
    of->proven_user = (long)geteuid();
}

static int is_proven(int n)
{
    cbn_thread now = {0};
    bounds_now(&now);
    return n <= cbn_here.proven && now.proven_limit == cbn_here.proven_limit && now.proven_user == cbn_here.proven_user;
}

/* The part of cbn_threads_for_region that needs the lock. */
static int more_than(int have, int n)
{
    see_fork();
    if (cbn_here.forked == CBN_FORKED && !find_out())
        return at_most(1);
    if (cbn_here.forked == CBN_POOL_LOST)
        return 1;
    if (is_proven(n) && have_room(n - have))
        return n;
    int k = can_start(n - have);
    if (k < n - have && cbn_release_memory())
        k = can_start(n - have);
    if (k < n - have) /* half: what the process does next wants memory too */
        return at_most(have + k / 2);
    cbn_here.proven = n;
    bounds_now(&cbn_here);
    return n;
}

int cbn_threads_for_region(int n)
{
    int have = cbn_here.pool > 1 ? cbn_here.pool : 1;
    n = bounded(n);
    if (n > omp_get_thread_limit())
        n = omp_get_thread_limit();
    if (omp_get_level() > 0) {
        if (omp_get_active_level() >= omp_get_max_active_levels())
            return 1;
        have = 1; /* nested regions have no pool */
    }
    if (n <= have)
        return n;
    pthread_mutex_lock(&lock);
    n = more_than(have, n);
    cbn_here.opening = n > have;
    if (!cbn_here.opening)
        pthread_mutex_unlock(&lock);
    return n;
}

void cbn_region_is_open(void)
{
    if (omp_get_level() == 1 && omp_get_num_threads() > 1)
        cbn_here.pool = omp_get_num_threads();
    if (cbn_here.opening) {
        cbn_here.opening = 0;
        pthread_mutex_unlock(&lock);
    }
}

int cbn_threads_now(int n)
{
    see_fork();
    if (n > 1 && cbn_here.forked == CBN_FORKED) {
        pthread_mutex_lock(&lock);
        if (!find_out())
            at_most(1);
        pthread_mutex_unlock(&lock);
    }
    if (cbn_here.forked == CBN_POOL_LOST)
        return 1;
    return cbn_here.most && n > cbn_here.most ? cbn_here.most : n;
}

#endif
