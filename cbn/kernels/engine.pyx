# The engine runs a Job on threads. The instruction set in use, the numbers of threads and the knobs are here, and
# nowhere else. The engine knows no array: it is given pointers and strides.
"""Instruction sets, threads, knobs, and the order of the work. Internal."""
from cython.parallel cimport prange
from libc.math cimport INFINITY
from libc.stdlib cimport labs

from .at_once cimport few_rows, goes_at_once
from .conversion cimport convert_rows, convert_runs, convert_with
from .job cimport BF16, F16, F32, F64, U8, Element, Job, channels_fit, count, is_integer, loop_of, sums_of, vanishing
from .kernels cimport CBN_COUNT_ROWS, cbn_built, cbn_highest, cbn_loop, cbn_tile, cbn_view
from .partition cimport (
    CACHE_LINE,
    LONG_RUN,
    MEDIUM_RUN,
    Extents,
    Grid,
    Rectangle,
    ceil_div,
    coarsen,
    item_of,
    most_items,
    n_items,
    n_partials,
    reads_rows,
    rectangle,
    row_follows_row,
    rows_grid,
    run_follows_run,
    runs_grid,
    share,
)
from .statistics cimport (
    IN_FLOAT64,
    IN_OWN_TYPE,
    choose_counted_shifts,
    choose_shifts,
    fetch_samples,
    merge,
    solve,
)
from .tiles cimport apply_tile, in_copy, tile_to_apply, tile_to_reduce, to_cache_lines

import os

cdef extern from "threads.h" nogil:
    ctypedef struct cbn_thread:
        int asked, pool, forked
    enum: CBN_MOST_THREADS, CBN_POOL_LOST
    int cbn_process_threads
    cbn_thread cbn_here
    void (*cbn_open_region)() noexcept nogil
    size_t (*cbn_release_memory)() noexcept nogil
    int cbn_threads_for_region(int n)
    void cbn_region_is_open()
    int cbn_threads_now(int n)

cdef extern from *:
    """
    #ifdef _OPENMP
    #include <omp.h>
    #define CBN_OPENMP _OPENMP
    #else
    #define CBN_OPENMP 0
    #define omp_get_max_threads() 1
    #define omp_get_num_procs() 1
    #endif
    #if defined(__clang__)
    #define CBN_COMPILER "clang " __clang_version__
    #else
    #define CBN_COMPILER "gcc " __VERSION__
    #endif
    """
    int CBN_OPENMP
    const char *CBN_COMPILER
    int omp_get_max_threads() nogil
    int omp_get_num_procs() nogil


# ---- instruction sets ------------------------------------------------------------------------------------------

active = NULL
generation = 0


def built():
    """Names of the instruction sets in this build, lowest first."""
    names = []
    cdef int i = 0
    while cbn_built[i] != NULL:
        names.append(cbn_built[i].name.decode())
        i += 1
    return names


def available():
    """Names of the instruction sets that this processor can run, lowest first."""
    return built()[:cbn_highest() + 1]


def use_isa(name=None):
    """Choose the instruction set by name, the highest by default; return the name of the one before.

    For the whole process, from the next call on. `CBN_ISA` calls this at import; tests and the self-check call it
    to go through all sets in one process.
    """
    global active, generation
    before = isa()
    names = available()
    if name is None:
        name = names[-1]
    if name not in names:
        reason = "is not available on this processor" if name in built() else "is not known"
        raise ValueError(f"CBN_ISA: instruction set {name!r} {reason}; available: {', '.join(names)}")
    active = cbn_built[names.index(name)]
    generation += 1
    return before


def isa():
    """Name of the instruction set in use."""
    return None if active == NULL else active.name.decode()


use_isa(os.environ.get("CBN_ISA") or None)


# ---- threads ---------------------------------------------------------------------------------------------------

cdef int cgroup_threads = 0   # the quota of the control group in whole processors; 0: none
MAX_THREADS = CBN_MOST_THREADS

# Below this much traffic a thread (some 6 us), opening a parallel region costs more than it saves; and where other
# threads are busy, as those of a BLAS that spin after a matrix product, it can cost a scheduler slice of milliseconds.
cdef Py_ssize_t bytes_per_thread = 1 << 18


cdef int thread_limit() noexcept nogil:
    cdef int n
    if cbn_here.forked == CBN_POOL_LOST:
        return 1
    if cbn_here.asked > 0:
        return cbn_here.asked
    if cbn_process_threads > 0:
        return cbn_process_threads
    n = min(omp_get_max_threads(), omp_get_num_procs(), CBN_MOST_THREADS)
    if cgroup_threads > 0:
        n = min(n, cgroup_threads)
    return max(n, 1)


cdef int threads_of(const Job *job, Py_ssize_t n_bytes, const Grid *g) noexcept nogil:
    """Threads for a pass of a job."""
    return 1 if job.alone else threads_for(n_bytes, most_items(g, job.itemsize))


cdef int threads_for(Py_ssize_t n_bytes, Py_ssize_t items) noexcept nogil:
    """Threads for a pass over n_bytes that falls into so many items. No result depends on it."""
    cdef Py_ssize_t n = min(n_bytes // bytes_per_thread, items)
    if n <= 1:
        return 1
    return <int>min(n, <Py_ssize_t>thread_limit())


def get_threads():
    cdef int n
    with nogil:
        n = cbn_threads_now(thread_limit())
    return n


def asked_threads():
    """(asked for by the calling thread, by the process), 0 where nobody asked."""
    return cbn_here.asked, cbn_process_threads


def ask_threads(here=None, process=None):
    global cbn_process_threads
    if here is not None:
        cbn_here.asked = here
    if process is not None:
        cbn_process_threads = process


def set_cgroup_threads(int n):
    global cgroup_threads
    cgroup_threads = n


cdef void nothing(Job *job, Py_ssize_t begin, Py_ssize_t end, int thread) noexcept nogil:
    pass


cdef void region_of_two() noexcept nogil:
    run(nothing, NULL, 2, 2)


cbn_open_region = region_of_two


cdef size_t no_memory() noexcept nogil:
    return 0


cbn_release_memory = no_memory


cdef void set_memory_release(size_t (*release)() noexcept nogil) noexcept:
    """What gives memory back to the system where a thread cannot be created without it."""
    global cbn_release_memory
    cbn_release_memory = release


def build_info():
    """What show_config prints about the build, and about the threads of the calling one."""
    return {
        "compiler": CBN_COMPILER.decode(),
        "openmp": CBN_OPENMP,
        "openmp_max_threads": omp_get_max_threads(),
        "openmp_num_procs": omp_get_num_procs(),
        "cgroup_threads": cgroup_threads,
        "pool_lost": cbn_here.forked == CBN_POOL_LOST,
        "threads_wanted": thread_limit(),
    }


# ---- knobs: no result depends on them --------------------------------------------------------------------------

# Sizes of the caches, for one core and for all; set from the system's at import (cbn/memory.py).
cdef Py_ssize_t l2_bytes = 1 << 20
cdef Py_ssize_t l3_bytes = 1 << 23
cdef Py_ssize_t nontemporal_bytes = 1 << 23    # a call that goes through so much memory stores past the caches
cdef bint prefetch = True


def tune(**knobs):
    """Change knobs of the passes, for the system's caches, for tests and for benchmarks; returns their values before.

    No result depends on any of them.

    bytes_per_thread   memory traffic from which another thread is worth its start; 1: for any two items
    nontemporal_bytes  size of all arrays of a call from which its stores are non-temporal, unless in place (twice that
                       for apply alone to runs), from which the pipeline copies runs, and from which loops fetch ahead;
                       0: always
    l2_bytes           cache of one core; 0 and l3_bytes=0: two passes always, never channel by channel
    l3_bytes           cache of all cores
    prefetch           whether loops fetch what comes next, where the arrays of a call leave the caches
    """
    global bytes_per_thread, nontemporal_bytes, l2_bytes, l3_bytes, prefetch, generation
    before = {"bytes_per_thread": bytes_per_thread, "nontemporal_bytes": nontemporal_bytes, "l2_bytes": l2_bytes,
              "l3_bytes": l3_bytes, "prefetch": prefetch}
    for name in knobs:
        if name not in before:
            raise TypeError(f"no knob {name!r}; there are {', '.join(before)}")
    new = before | knobs
    bytes_per_thread, nontemporal_bytes = new["bytes_per_thread"], new["nontemporal_bytes"]
    l2_bytes, l3_bytes, prefetch = new["l2_bytes"], new["l3_bytes"], new["prefetch"]
    generation += 1
    return before


# ---- jobs ------------------------------------------------------------------------------------------------------

cdef Job make_job(const Extents *e, cbn_view x, Element element, Py_ssize_t itemsize, bint in_float64) noexcept nogil:
    cdef Job job
    job.element, job.itemsize, job.y_itemsize = element, itemsize, itemsize
    job.n_bytes = e.C * e.N * e.S * itemsize
    job.in_float64 = in_float64 or element == F64
    job.backward = job.nontemporal = job.prefetch = job.alone = job.fused = False
    job.copy = NULL
    job.x = job.y = job.g = x
    job.activated = job.keeps_dh = job.sum_in_float64 = job.fits = False
    job.act.slope, job.act.low, job.act.high = 1, -INFINITY, INFINITY
    job.z.data = job.dh.data = NULL
    job.weight_c = job.bias_c = job.shift_c = job.partial = job.sum_c = NULL
    job.square_c = job.invstd_c = job.coef_c = job.forward_c = job.sums_in_float64_c = NULL
    job.counts = job.skipna = False
    job.selection = NULL
    job.weights.data = NULL
    job.blend = NULL
    job.count_c = job.low_c = job.min_c = job.max_c = NULL
    job.partial_rows = 2
    job.widen = job.narrow = NULL
    job.eps = 0
    job.vanishing = vanishing(element)
    if element == F64:
        job.loops = job.loops_in_float64 = active.f64
    elif element == F32:
        job.loops, job.loops_in_float64 = active.f32, active.f32_in_f64
    elif element == F16:
        job.loops, job.loops_in_float64 = active.f16, active.f16_in_f64
    elif element == BF16:
        job.loops, job.loops_in_float64 = active.bf16, active.bf16_in_f64
    else:
        job.loops = job.loops_in_float64 = sums_of(active, element)    # to apply, `set_output` chooses others
        job.partial_rows = 2 + CBN_COUNT_ROWS
    job.reduction = rows_grid(e, itemsize, row_follows_row(e, x)) if reads_rows(e, x, itemsize) else runs_grid(e, True)
    if is_integer(&job):
        coarsen(&job.reduction)
    return job


cdef void set_coefficients(Job *job, double *coef_c) noexcept nogil:
    """Let `apply` have these, which stay as they are."""
    job.coef_c = coef_c
    job.fits = channels_fit(job, 0, job.reduction.C)


cdef void set_output(Job *job, const Extents *e, cbn_view y, Py_ssize_t itemsize) noexcept nogil:
    """Where `apply` writes, and its partition, which decides no bit: an element depends on nothing but itself."""
    cdef bint joins
    job.y = y
    if job.itemsize == 1:
        job.y_itemsize = itemsize
        job.n_bytes = e.C * e.N * e.S * itemsize
        if job.element == U8:
            job.loops = active.u8_f32 if itemsize == 4 else active.u8_bf16
        else:
            job.loops = active.i8_f32 if itemsize == 4 else active.i8_bf16
        job.loops_in_float64 = job.loops    # callers keep coefficients away that need float64
    joins = run_follows_run(e, y) and (job.reduction.copies == 1 or row_follows_row(e, y))
    job.fused = joins or not job.reduction.rows
    if job.fused and (job.reduction.rows or labs(job.x.c) > labs(job.x.n)):
        job.apply = job.reduction
    elif e.rows:
        job.apply = rows_grid(e, job.itemsize, False)
    else:
        job.apply = runs_grid(e, False)
    choose_stores(job)


cdef Py_ssize_t traffic(const Job *job) noexcept nogil:
    return (3 if job.backward or job.z.data != NULL else 2) * job.n_bytes


cdef bint leaves_the_caches(const Job *job) noexcept nogil:
    """Whether the output would not stay in a cache with what the call reads."""
    return traffic(job) >= nontemporal_bytes


cdef void choose_stores(Job *job) noexcept nogil:
    """Whether stores go past the caches: where the output would not stay there, and is not at the place of an input.

    Where columns of rows do not count, they are stored twice (loops/rows.h).

    A pass that goes through memory in order, apply alone to runs, may have twice the traffic: a reader of y that has as
    many threads and goes in order too finds much of it still there. Measured, docs/performance.md.
    """
    cdef char *g = job.g.data if job.dh.data == NULL else job.dh.data
    cdef bint in_order = job.sum_c == NULL and not job.apply.rows
    choose_prefetch(job)
    job.nontemporal = (traffic(job) // 2 if in_order else traffic(job)) >= nontemporal_bytes \
        and not (job.apply.rows and job.selection != NULL and job.selection.mask.data != NULL) \
        and job.y.data != job.x.data and job.y.data != g and job.y.data != job.z.data


cdef void choose_prefetch(Job *job) noexcept nogil:
    """Whether loops fetch ahead: not in a cache, where it is only in the way.

    There the hardware's own prefetchers do, and rows are often 4 KB apart: those that are read, written and fetched do
    not fit the same sets of L1.
    """
    job.prefetch = prefetch and leaves_the_caches(job)


# ---- running a job: no result depends on the order of the work, or on who does it ------------------------------

cdef void run(Work work, Job *job, Py_ssize_t items, int threads) noexcept nogil:
    """work(job, begin, end, thread) for neighbouring items each: the one parallel region of the library."""
    cdef int thread
    if threads > 1 and threads > cbn_here.pool:
        threads = cbn_threads_for_region(threads)
    if threads == 1:
        work(job, 0, items, 0)
    else:
        for thread in prange(threads, num_threads=threads, schedule="static", chunksize=1):
            if thread == 0:
                cbn_region_is_open()
            work(job, items * thread // threads, items * (thread + 1) // threads, thread)


cdef void reduce_items(Job *job, Py_ssize_t begin, Py_ssize_t end, int thread) noexcept nogil:
    cdef Py_ssize_t item
    cdef Rectangle r
    cdef cbn_tile t
    for item in range(begin, end):
        r = rectangle(&job.reduction, item)
        t = tile_to_reduce(job, &r)
        loop_of(job, job.loops, job.reduction.rows)(NULL, &t)


cdef void apply_items(Job *job, Py_ssize_t begin, Py_ssize_t end, int thread) noexcept nogil:
    """The last item first: apply starts with what the reduction before it has left in the cache."""
    cdef Py_ssize_t item
    cdef Rectangle r
    cdef cbn_tile t
    for item in range(end - 1, begin - 1, -1):
        r = rectangle(&job.apply, item)
        t = tile_to_apply(job, &r)
        if job.apply.rows:
            to_cache_lines(job, &t, r.c == 0, r.c + r.n_channels == job.apply.C)
        apply_tile(job, &t, job.apply.rows)


cdef void set_conversion(Job *job, const Extents *e, cbn_view y, Element element, Py_ssize_t itemsize) noexcept nogil:
    """Let `apply` write a y of another type than x."""
    convert_with(job, active, e, y, element, itemsize)


cdef void convert_items(Job *job, Py_ssize_t begin, Py_ssize_t end, int thread) noexcept nogil:
    """`apply_items` between types, by way of a buffer."""
    cdef Py_ssize_t item
    cdef Rectangle r
    for item in range(begin, end):
        r = rectangle(&job.apply, item)
        if job.apply.rows:
            convert_rows(job, &r)
        else:
            convert_runs(job, &r)


cdef void choose_tiles(Job *job, int arrays) noexcept nogil:
    """Whether reduction and apply go through tiles of whole channels, one after the other, and how large these are.

    The reduction reads so many arrays. They do where two tiles or more are left to each thread, there are several
    threads or the arrays are more than a quarter of a core's L2, and a tile stays in the cache: in half of L2, or in a
    quarter of the core's share of L3. Then several channels of runs are joined in a tile, for the prefetchers of the
    hardware: up to twice L2.
    """
    cdef Grid *g = &job.reduction
    cdef Py_ssize_t n_bytes = arrays * job.n_bytes, channel_bytes = n_bytes // g.C
    cdef int threads = threads_of(job, (2 * arrays + 1) * job.n_bytes, g)
    cdef Py_ssize_t cache = max(l2_bytes // 2, l3_bytes // 4 // threads)
    job.threads = threads
    job.copying = not g.rows and leaves_the_caches(job)
    job.fused = job.fused and (n_bytes > l2_bytes // 4 or threads > 1) and g.group * channel_bytes <= cache
    if not job.fused:
        return
    if not g.rows:
        g.group = max(1, min(ceil_div(LONG_RUN, g.S), 2 * l2_bytes // channel_bytes, g.C // (8 * threads)))
        g.tiles = ceil_div(g.C, g.group)
    job.fused = g.tiles >= 2 * threads
    # Runs of the copy share no cache line, so that a store to one delays no load of the next; nor are its rows a power
    # of two apart
    job.copy_c = g.S if g.rows \
        else ceil_div(g.S * job.itemsize, CACHE_LINE) * CACHE_LINE // job.itemsize + CACHE_LINE // job.itemsize
    job.copy_n = g.group * job.copy_c + 4 * CACHE_LINE // job.itemsize
    job.copy_bytes = ceil_div(arrays * g.N * job.copy_n * job.itemsize, CACHE_LINE) * CACHE_LINE


cdef Py_ssize_t copies_bytes(const Job *job) noexcept nogil:
    """Memory that the pipeline needs for copies of its tiles; 0: none."""
    return job.threads * job.copy_bytes + CACHE_LINE if job.fused and job.copying else 0


cdef void set_copies(Job *job, char *memory) noexcept nogil:
    """Let the pipeline have that memory; without it, reduction and apply are two passes."""
    if memory == NULL:
        job.fused = False
        return
    job.copy = memory + (-<Py_ssize_t>memory & (CACHE_LINE - 1))
    if not job.keeps_dh:
        job.dh.data = NULL    # the copies have dh
        choose_stores(job)


cdef void reduce_tile_again(Job *job, Py_ssize_t tile, cbn_view x_copy, int todo) noexcept nogil:
    """The reductions that are left of a tile, in a job of its own: other threads have theirs."""
    cdef Job again = job[0]
    cdef Py_ssize_t k
    cdef Rectangle r
    cdef cbn_tile reduction
    cdef cbn_loop loop = loop_of(job, job.loops, job.reduction.rows)
    while todo:
        again.sum_in_float64 = not todo & IN_OWN_TYPE
        for k in range(n_partials(&job.reduction)):
            r = rectangle(&job.reduction, item_of(&job.reduction, tile, k))
            reduction = tile_to_reduce(&again, &r)
            if job.copying:
                reduction.x = in_copy(job, x_copy, &r)
            loop(NULL, &reduction)
        todo = merge(&again, todo, r.c, r.c + r.n_channels)


cdef void pipeline(Job *job, Py_ssize_t begin, Py_ssize_t end, int thread) noexcept nogil:
    """Reduce and apply tile by tile, all values of some channels: memory is read once, not twice.

    While coefficients are applied to one tile the next one is reduced, so that reads and writes of memory overlap.
    Where the arrays leave the caches, the reduction puts the elements of runs (and dy, or dh in its place) into a copy
    that stays in the cache. Apply reads them from there, and those of the next tile take their place. The copy is
    contiguous, which the tile is not: cache lines that are a large power of two apart share few sets of a cache.
    """
    cdef Py_ssize_t tile, k, blocks = n_partials(&job.reduction)
    cdef Rectangle r, before
    cdef cbn_tile reduction, applied
    cdef cbn_view x_copy, g_copy
    cdef int todo
    cdef bint together, fit = True, fit_before = True    # whether the channels of the last tiles take `job.loops`
    cdef cbn_loop loop = loop_of(job, job.loops, job.reduction.rows)
    x_copy.n, x_copy.c = job.copy_n, job.copy_c
    x_copy.data = job.copy + thread * job.copy_bytes
    g_copy = x_copy
    g_copy.data += x_copy.n * job.reduction.N * job.itemsize
    for tile in range(begin, end + 1):
        # Apply and the next reduction can be one call only if the tile before took `job.loops` too: the two tiles
        # share a cache line, which the later one writes. In a cache, one after the other is faster for short runs
        together = begin < tile < end and fit and (fit_before or job.copying) \
            and (job.copying or (job.reduction.rows and job.selection == NULL)
                 or (not job.reduction.rows and job.reduction.piece >= MEDIUM_RUN))
        fit_before = fit
        for k in range(blocks):
            if tile > begin:
                before = rectangle(&job.reduction, item_of(&job.reduction, tile - 1, k))
                applied = tile_to_apply(job, &before)
                if job.copying:
                    applied.x = in_copy(job, x_copy, &before)
                    if not job.keeps_dh:
                        applied.g = in_copy(job, g_copy, &before)
                elif job.reduction.rows:
                    to_cache_lines(job, &applied, tile - 1 == begin, tile == end)
                if not together:
                    apply_tile(job, &applied, job.reduction.rows)
            if tile < end:
                r = rectangle(&job.reduction, item_of(&job.reduction, tile, k))
                if k == 0 and not job.backward:
                    if job.counts:
                        choose_counted_shifts(job, r.c, r.c + r.n_channels)
                    else:
                        choose_shifts(job, r.c, r.c + r.n_channels)
                    if tile + 1 < end and job.prefetch:
                        fetch_samples(job, r.c + r.n_channels, min(r.c + 2 * r.n_channels, job.reduction.C))
                reduction = tile_to_reduce(job, &r)
                if job.copying:
                    reduction.x_copy = in_copy(job, x_copy, &r)
                    if not job.keeps_dh:
                        reduction.dh = in_copy(job, g_copy, &r)
                loop(&applied if together else NULL, &reduction)
        if tile == end:
            return
        todo = merge(job, first_reduction(job), r.c, r.c + r.n_channels)
        if todo:
            reduce_tile_again(job, tile, x_copy, todo)
        solve(job, r.c, r.c + r.n_channels)
        fit = job.element == F64 or (not job.in_float64 and channels_fit(job, r.c, r.c + r.n_channels))


cdef int first_reduction(const Job *job) noexcept nogil:
    """Which of the two a measurement begins with: 16-bit elements that are counted have float64 sums."""
    return IN_FLOAT64 if job.counts and not job.backward and job.itemsize == 2 else IN_OWN_TYPE


cdef void measure(Job *job) noexcept nogil:
    """Moments of all channels, or backward sums; once more with better shifts or float64 sums where that is needed."""
    cdef int threads = threads_of(job, job.n_bytes * (2 if job.backward else 1), &job.reduction)
    cdef int todo = first_reduction(job)
    cdef Py_ssize_t c
    share(&job.reduction, job.itemsize, threads)
    choose_prefetch(job)
    if job.counts and not job.backward:
        for c in range(job.reduction.C):
            if job.weights.data == NULL and job.selection == NULL:
                job.count_c[c] = count(job)
        choose_counted_shifts(job, 0, job.reduction.C)
    elif not job.backward and not is_integer(job):
        choose_shifts(job, 0, job.reduction.C)
    while todo:
        job.sum_in_float64 = not todo & IN_OWN_TYPE
        run(reduce_items, job, n_items(&job.reduction), threads)
        todo = merge(job, todo, 0, job.reduction.C)


cdef void apply(Job *job) noexcept nogil:
    cdef Py_ssize_t arrays = 3 if job.backward else 2
    cdef int threads = threads_of(job, arrays * job.n_bytes, &job.apply)
    share(&job.apply, job.itemsize, threads)
    run(apply_items if job.widen == NULL else convert_items, job, n_items(&job.apply), threads)


cdef void apply_here(Job *job) noexcept nogil:
    """On the calling thread alone."""
    apply_items(job, 0, n_items(&job.apply), 0)


cdef void measure_and_apply(Job *job) noexcept nogil:
    """Measure, merge, solve and apply: few rows at once, as a pipeline, or in two passes."""
    cdef int threads
    if goes_at_once(job):
        threads = threads_of(job, traffic(job), &job.reduction)
        share(&job.reduction, job.itemsize, threads)
        run(few_rows, job, job.reduction.tiles, threads)
    elif job.fused:
        job.sum_in_float64 = not first_reduction(job) & IN_OWN_TYPE
        run(pipeline, job, job.reduction.tiles, job.threads)
    else:
        measure(job)
        solve(job, 0, job.reduction.C)
        job.fits = channels_fit(job, 0, job.reduction.C)
        apply(job)
