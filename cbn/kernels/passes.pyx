# The four passes over both layouts: how an array lies, which range goes to which thread, what stays in the cache
# between two passes, and the order of every merge. The arithmetic of an element is in loops.h.
"""Compiled passes of cbn: numpy arrays in, threads and loops below. Internal; `cbn.functional` is the way in.

Every function here trusts its arguments: arrays aligned, native and of a `Layout` that fits them.
"""
cimport cython
cimport numpy as cnp
from cython.parallel cimport prange
from libc.math cimport fabs, isfinite, sqrt

import os

import numpy as np

cnp.import_array()

cdef extern from "kernels.h" nogil:
    ctypedef struct cbn_loops:
        void (*moments_first)(const void *, Py_ssize_t, Py_ssize_t, Py_ssize_t, double, double *) noexcept nogil
        void (*moments_last)(const void *, Py_ssize_t, Py_ssize_t, Py_ssize_t, const double *, double *,
                             double *) noexcept nogil
        void (*apply_first)(const void *, void *, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t, const double *,
                            Py_ssize_t) noexcept nogil
        void (*apply_last)(const void *, void *, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t, const double *,
                           Py_ssize_t) noexcept nogil
        void (*grad_moments_first)(const void *, const void *, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t,
                                   double, double *) noexcept nogil
        void (*grad_moments_last)(const void *, const void *, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t,
                                  const double *, double *, double *) noexcept nogil
        void (*grad_apply_first)(const void *, const void *, void *, Py_ssize_t, Py_ssize_t, Py_ssize_t,
                                 Py_ssize_t, Py_ssize_t, const double *, Py_ssize_t) noexcept nogil
        void (*grad_apply_last)(const void *, const void *, void *, Py_ssize_t, Py_ssize_t, Py_ssize_t,
                                Py_ssize_t, Py_ssize_t, const double *, Py_ssize_t) noexcept nogil
    ctypedef struct cbn_isa:
        const char *name
        cbn_loops f32, f32_wide, f64
    enum: CBN_COLUMNS
    const cbn_isa *cbn_built[]
    int cbn_highest()
    int cbn_process_threads
    int cbn_thread_threads

cdef extern from *:
    """
    #include <float.h>
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
    const double FLT_MIN, FLT_MAX


# ---- instruction sets ------------------------------------------------------------------------------------------

cdef const cbn_isa *active = NULL


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
    global active
    before = isa()
    names = available()
    if name is None:
        name = names[-1]
    if name not in names:
        reason = "is not available on this processor" if name in built() else "is not known"
        raise ValueError(f"CBN_ISA: instruction set {name!r} {reason}; available: {', '.join(names)}")
    active = cbn_built[names.index(name)]
    return before


def isa():
    """Name of the instruction set in use."""
    return None if active == NULL else active.name.decode()


use_isa(os.environ.get("CBN_ISA") or None)


# ---- threads ---------------------------------------------------------------------------------------------------

cdef int cgroup_threads = 0   # the quota of the control group in whole processors; 0: none
cdef bint forked = False      # a forked child: the parent's OpenMP threads do not exist here, waiting hangs

# Below this much memory a thread (some 20 us), opening a parallel region costs more than it saves; and where other
# threads are busy, as those of a BLAS that spin after a matrix product, it can cost a scheduler slice of milliseconds.
cdef Py_ssize_t BYTES_PER_THREAD = 1 << 19


cdef int thread_limit() noexcept nogil:
    cdef int n
    if forked:
        return 1
    if cbn_thread_threads > 0:
        return cbn_thread_threads
    if cbn_process_threads > 0:
        return cbn_process_threads
    n = min(omp_get_max_threads(), omp_get_num_procs())
    if cgroup_threads > 0:
        n = min(n, cgroup_threads)
    return max(n, 1)


cdef int threads_for(Py_ssize_t n_bytes, Py_ssize_t items) noexcept nogil:
    """Threads for a pass over n_bytes that falls into so many items. No result depends on it."""
    cdef Py_ssize_t n = min(n_bytes // BYTES_PER_THREAD, items)
    if n <= 1:
        return 1
    return <int>min(n, <Py_ssize_t>thread_limit())


def get_threads():
    return thread_limit()


def asked_threads():
    """(asked for by the calling thread, by the process), 0 where nobody asked."""
    return cbn_thread_threads, cbn_process_threads


def ask_threads(here=None, process=None):
    global cbn_thread_threads, cbn_process_threads
    if here is not None:
        cbn_thread_threads = here
    if process is not None:
        cbn_process_threads = process


def set_cgroup_threads(int n):
    global cgroup_threads
    cgroup_threads = n


def after_fork_in_child():
    global forked
    forked = True


def build_info():
    """What show_config prints about the build."""
    return {
        "compiler": CBN_COMPILER.decode(),
        "openmp": CBN_OPENMP,
        "openmp_max_threads": omp_get_max_threads(),
        "openmp_num_procs": omp_get_num_procs(),
        "cgroup_threads": cgroup_threads,
        "forked": bool(forked),
    }


def set_bytes_per_thread(Py_ssize_t n_bytes):
    """For tests: n_bytes = 1 opens a parallel region for any array of two items; returns the value before."""
    global BYTES_PER_THREAD
    before = BYTES_PER_THREAD
    BYTES_PER_THREAD = n_bytes
    return before


# ---- layouts ---------------------------------------------------------------------------------------------------

cdef enum:
    MAXDIMS = 64   # numpy's own limit


cdef bint strides_are_whole(cnp.ndarray x) noexcept:
    """Whether every stride is a number of elements: on some processors doubles are aligned to half their size."""
    cdef int axis
    for axis in range(x.ndim):
        if x.strides[axis] % cnp.PyArray_ITEMSIZE(x):
            return False
    return True


@cython.final
cdef class Layout:
    """How an array lies in memory, as the loops see it.

    first   N runs of S contiguous elements for each of C channels
    last    N rows of C contiguous elements, one of each channel (S is 1)

    The axes other than the channel's are taken in the order in which they lie in memory and joined where they
    can be: all of them into the rows of `last`, or into an outer group (N) and an inner one (S) of `first`.
    """
    cdef readonly bint last
    cdef readonly Py_ssize_t C, N, S
    cdef int channel_axis, n_axes, n_outer
    cdef int axes[MAXDIMS]    # without the channel's and those of length 1, slowest first; outer group, then inner

    @property
    def count(self):
        """Values per channel."""
        return self.N * self.S

    @staticmethod
    def of(cnp.ndarray x, int channel_axis):
        """The layout of x, or None if no loop reads it as it lies."""
        cdef Layout self = Layout()
        cdef Py_ssize_t stride = 0, size = cnp.PyArray_ITEMSIZE(x)
        cdef int axis, i
        if not strides_are_whole(x):
            return None
        self.channel_axis = channel_axis
        self.C = x.shape[channel_axis]
        for axis in range(x.ndim):
            if axis == channel_axis or x.shape[axis] == 1:
                continue
            i = self.n_axes    # insertion: larger strides first, equal ones in the order of the axes
            while i > 0 and abs(x.strides[self.axes[i - 1]]) < abs(x.strides[axis]):
                self.axes[i] = self.axes[i - 1]
                i -= 1
            self.axes[i] = axis
            self.n_axes += 1
        self.N = self.S = 1
        for i in range(self.n_axes):
            self.N *= x.shape[self.axes[i]]
        # Rows of channels. A single channel is better a run, if its values are contiguous.
        if (self.C == 1 or x.strides[channel_axis] == size) and self._joined(x, 0, self.n_axes, &stride):
            if (self.C > 1 or self.N == 1 or stride != size) and (self.N == 1 or abs(stride) >= self.C * size):
                self.last = True
                self.n_outer = self.n_axes
                return self
        # Runs: the longest contiguous group of the fastest axes, and all others in one.
        self.n_outer = self.n_axes
        while self.n_outer > 0 and self._joined(x, self.n_outer - 1, self.n_axes, &stride) and stride == size:
            self.n_outer -= 1
            self.S *= x.shape[self.axes[self.n_outer]]
            self.N //= x.shape[self.axes[self.n_outer]]
        if self.S == 1 or not self._joined(x, 0, self.n_outer, &stride):
            return None
        # Where runs overlap, as in sliding windows or a broadcast axis, no output can lie as the input does.
        extent = self.S * size
        for step, length in sorted([(abs(stride), self.N), (abs(x.strides[channel_axis]), self.C)]):
            if length > 1:
                if step < extent:
                    return None
                extent = step * length
        return self

    cdef bint _joined(self, cnp.ndarray x, int begin, int end, Py_ssize_t *stride) noexcept:
        """Whether axes[begin:end] are one axis in memory, and its stride in bytes (0 for no axis)."""
        cdef int i
        for i in range(begin, end - 1):
            if x.strides[self.axes[i]] != x.strides[self.axes[i + 1]] * x.shape[self.axes[i + 1]]:
                return False
        stride[0] = x.strides[self.axes[end - 1]] if end > begin else 0
        return True

    def fits(self, cnp.ndarray y):
        """Whether y, of the same shape, is runs or rows of the same axes (its strides may differ)."""
        cdef Py_ssize_t stride
        if not strides_are_whole(y):
            return False
        if self.last:
            return (self.C == 1 or y.strides[self.channel_axis] == cnp.PyArray_ITEMSIZE(y)) \
                and self._joined(y, 0, self.n_axes, &stride)
        return self._joined(y, self.n_outer, self.n_axes, &stride) and stride == cnp.PyArray_ITEMSIZE(y) \
            and self._joined(y, 0, self.n_outer, &stride)

    cdef View view(self, cnp.ndarray x):
        """Where the loops find x: its address, and its strides in elements."""
        cdef View v
        cdef Py_ssize_t stride = 0
        self._joined(x, 0, self.n_outer, &stride)
        v.data = <char *>cnp.PyArray_DATA(x)
        v.n = stride // cnp.PyArray_ITEMSIZE(x)
        v.c = 1 if self.last else x.strides[self.channel_axis] // cnp.PyArray_ITEMSIZE(x)
        return v

    def __repr__(self):
        kind = f"last: {self.N} rows" if self.last else f"first: {self.N} runs of {self.S}"
        return f"<Layout channels {kind}, {self.C} channels>"


cdef struct View:
    char *data
    Py_ssize_t n    # from run to run, or row to row, in elements
    Py_ssize_t c    # from channel to channel


# ---- partition -------------------------------------------------------------------------------------------------
#
# A job falls into items; an item is a rectangle that one call of a loop does. Reductions leave one partial sum an
# item, and these are added in the order of the items, so the bits of a sum depend on the partition: it is made
# from the shape alone, never from the number of threads or the size of a cache.

cdef Py_ssize_t CHUNK = 1 << 16        # elements of one item, first
cdef Py_ssize_t COLUMNS = CBN_COLUMNS  # columns of one item, last
cdef Py_ssize_t MIN_ROWS = 64          # rows of one item, last: fewer, and the partial sums are a traffic of their own
cdef Py_ssize_t LAST_ITEMS = 256       # items that suffice, last: enough for any number of threads

cdef struct Job:
    const cbn_loops *narrow     # arithmetic in the type of the elements
    const cbn_loops *wide       # and in float64, for coefficients that float32 cannot hold
    bint last
    bint all_wide               # every channel takes `wide`
    bint backward               # reductions of g and x, not of x alone
    bint batch_statistics       # backward through them
    Py_ssize_t C, N, S, itemsize
    Py_ssize_t blocks           # items of one channel (first), of one column tile (last)
    Py_ssize_t tiles            # column tiles (last); channels (first)
    Py_ssize_t step             # runs or elements of a block (first), rows (last)
    View x, y, g                # y is dx in backward
    double eps
    double *weight_c            # C, or NULL: ones
    double *bias_c              # C, or NULL: zeros
    double *shift_c             # what the reductions subtract: a value of the channel, or its mean
    double *partial             # (blocks, 2, C) for last, (C, blocks, 2) for first
    char *again                 # C: whether the channel is reduced a second time
    double *sum_c
    double *square_c            # S(d*d), or S(g*d)
    double *coef_c              # (4, C): see kernels.h


cdef struct Rectangle:
    Py_ssize_t c, n_channels
    Py_ssize_t n, n_runs
    Py_ssize_t s, length


ctypedef void (*Work)(Job *job, Py_ssize_t item) noexcept nogil


cdef Job make_job(Layout layout, cnp.ndarray x, bint wide):
    cdef Job job
    job.last = layout.last
    job.C, job.N, job.S = layout.C, layout.N, layout.S
    job.itemsize = cnp.PyArray_ITEMSIZE(x)
    job.all_wide = wide or cnp.PyArray_ITEMSIZE(x) == 8
    job.backward = job.batch_statistics = False
    job.x = job.y = job.g = layout.view(x)
    job.again = NULL
    job.weight_c = job.bias_c = job.shift_c = job.partial = job.sum_c = job.square_c = job.coef_c = NULL
    job.eps = 0
    if cnp.PyArray_ITEMSIZE(x) == 4:
        job.narrow, job.wide = &active.f32, &active.f32_wide
    else:
        job.narrow = job.wide = &active.f64
    if job.last:
        job.tiles = ceil_div(job.C, COLUMNS)
        job.step = max(MIN_ROWS, ceil_div(job.N, max(1, LAST_ITEMS // job.tiles)))
        job.blocks = ceil_div(job.N, job.step)
    else:
        job.tiles = job.C
        if job.S >= CHUNK:
            job.step = CHUNK
            job.blocks = job.N * ceil_div(job.S, CHUNK)
        else:
            job.step = CHUNK // job.S
            job.blocks = ceil_div(job.N, job.step)
    return job


cdef inline Py_ssize_t ceil_div(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b


cdef Rectangle rectangle(Job *job, Py_ssize_t item) noexcept nogil:
    cdef Rectangle r
    cdef Py_ssize_t block, pieces
    if job.last:
        block = item // job.tiles
        r.c = item % job.tiles * COLUMNS
        r.n_channels = min(COLUMNS, job.C - r.c)
        r.n = block * job.step
        r.n_runs = min(job.step, job.N - r.n)
        r.s, r.length = 0, 1
        return r
    block = item % job.blocks
    r.c, r.n_channels = item // job.blocks, 1
    if job.S >= CHUNK:
        pieces = ceil_div(job.S, CHUNK)
        r.n, r.n_runs = block // pieces, 1
        r.s = block % pieces * CHUNK
        r.length = min(CHUNK, job.S - r.s)
    else:
        r.n = block * job.step
        r.n_runs = min(job.step, job.N - r.n)
        r.s, r.length = 0, job.S
    return r


cdef inline char *at(Job *job, View v, Rectangle r) noexcept nogil:
    return v.data + (r.c * v.c + r.n * v.n + r.s) * job.itemsize


cdef void run(Work work, Job *job, Py_ssize_t items, int arrays) noexcept nogil:
    """work(job, item) for all items: the one parallel region of the library. `arrays`: how many it goes through."""
    cdef Py_ssize_t item
    cdef int threads = threads_for(arrays * job.C * job.N * job.S * job.itemsize, items)
    if threads == 1:
        for item in range(items):
            work(job, item)
    else:
        for item in prange(items, num_threads=threads, schedule="static"):
            work(job, item)


# ---- work on one item ------------------------------------------------------------------------------------------

cdef void reduce_item(Job *job, Py_ssize_t item) noexcept nogil:
    """moments or grad_moments of one rectangle, into its own place among the partial sums."""
    cdef Rectangle r = rectangle(job, item)
    cdef double *out
    if job.last:
        out = job.partial + (r.n // job.step * 2) * job.C + r.c
        if job.backward:
            job.wide.grad_moments_last(at(job, job.g, r), at(job, job.x, r), r.n_runs, r.n_channels, job.g.n,
                                       job.x.n, job.shift_c + r.c, out, out + job.C)
        else:
            job.wide.moments_last(at(job, job.x, r), r.n_runs, r.n_channels, job.x.n, job.shift_c + r.c, out,
                                  out + job.C)
    else:
        out = job.partial + item * 2
        if job.backward:
            job.wide.grad_moments_first(at(job, job.g, r), at(job, job.x, r), r.n_runs, r.length, job.g.n, job.x.n,
                                        job.shift_c[r.c], out)
        else:
            job.wide.moments_first(at(job, job.x, r), r.n_runs, r.length, job.x.n, job.shift_c[r.c], out)


cdef bint digits_are_lost(Job *job, Py_ssize_t c) noexcept nogil:
    """Whether m2 = S(d*d) - S(d)^2/n has lost more than ten bits, as where the channel's first value lies far out.

    Then the mean is the shift of a second reduction. It is the data that decides, so the bits do not depend on the
    partition of the work; and the channel's own data, so they do not depend on its neighbours.
    """
    cdef double n = <double>(job.N * job.S)
    cdef double d = job.sum_c[c] - job.shift_c[c]
    if job.backward or not n * d * d > 1024 * job.square_c[c] or not isfinite(job.sum_c[c]):
        return False
    job.shift_c[c] = job.sum_c[c]
    return True


cdef void settle(Job *job, Py_ssize_t c) noexcept nogil:
    """Merge a channel's partial sums, in the order of its blocks, and make its coefficients from them."""
    cdef Py_ssize_t k
    cdef double n = <double>(job.N * job.S)
    cdef double s = 0, q = 0, invstd, w
    for k in range(job.blocks):
        if job.last:
            s += job.partial[2 * k * job.C + c]
            q += job.partial[(2 * k + 1) * job.C + c]
        else:
            s += job.partial[(c * job.blocks + k) * 2]
            q += job.partial[(c * job.blocks + k) * 2 + 1]
    if job.backward:
        job.sum_c[c], job.square_c[c] = s, q
        if job.batch_statistics:
            # coef_c[C + c] holds invstd until here
            invstd = job.coef_c[job.C + c]
            w = 1 if job.weight_c == NULL else job.weight_c[c]
            job.coef_c[job.C + c] = invstd * w
            job.coef_c[2 * job.C + c] = s / n
            job.coef_c[3 * job.C + c] = q / n * invstd * invstd
        return
    # m2 = S(d*d) - S(d)^2/n. Rounding can take it below zero; where S(d*d) overflows it is inf and not inf - inf.
    job.sum_c[c] = job.shift_c[c] + s / n
    job.square_c[c] = q if isfinite(s) and not isfinite(q) else q - s * (s / n)
    if job.square_c[c] < 0:
        job.square_c[c] = 0
    if job.coef_c != NULL:
        w = 1 if job.weight_c == NULL else job.weight_c[c]
        job.coef_c[c] = job.sum_c[c]
        job.coef_c[job.C + c] = w / sqrt(job.square_c[c] / n + job.eps)
        job.coef_c[2 * job.C + c] = 0 if job.bias_c == NULL else job.bias_c[c]


cdef inline bint fits_float32(double mean, double scale, double term, double slope) noexcept nogil:
    """Whether float32 holds the coefficients of a channel, so that nothing that can be represented is lost.

    A mean below 2^102 is less than half a unit in the last place of float32's largest value, so x - mean cannot
    overflow for any finite x. A factor that is not zero must be a normal number, or it has lost digits; a term that
    is added must not overflow. Bitwise, for a loop without branches.
    """
    return (fabs(mean) < 5e30) & (fabs(term) <= FLT_MAX) \
        & ((scale == 0) | ((fabs(scale) >= FLT_MIN) & (fabs(scale) <= FLT_MAX))) \
        & ((slope == 0) | ((fabs(slope) >= FLT_MIN) & (fabs(slope) <= FLT_MAX)))


cdef bint needs_wide(Job *job, Py_ssize_t c) noexcept nogil:
    """Whether the channel takes float64 arithmetic. Coefficients that are not finite are so in every type."""
    cdef double mean = job.coef_c[c], scale = job.coef_c[job.C + c], term = job.coef_c[2 * job.C + c]
    cdef double slope = job.coef_c[3 * job.C + c] if job.backward else 0
    return not fits_float32(mean if isfinite(mean) else 0, scale if isfinite(scale) else 0,
                            term if isfinite(term) else 0, slope if isfinite(slope) else 0)


cdef void map_item(Job *job, Py_ssize_t item) noexcept nogil:
    """apply or grad_apply of one rectangle, in pieces of neighbouring channels that take the same arithmetic."""
    cdef Rectangle r = rectangle(job, item)
    cdef Py_ssize_t c, end = r.c + r.n_channels
    cdef bint narrow = True, wide
    if job.all_wide:
        map_rectangle(job, job.wide, r)
        return
    for c in range(r.c, end):
        narrow &= fits_float32(job.coef_c[c], job.coef_c[job.C + c], job.coef_c[2 * job.C + c],
                               job.coef_c[3 * job.C + c] if job.backward else 0)
    if narrow:
        map_rectangle(job, job.narrow, r)
        return
    while r.c < end:
        wide = needs_wide(job, r.c)
        r.n_channels = 1
        while r.c + r.n_channels < end and needs_wide(job, r.c + r.n_channels) == wide:
            r.n_channels += 1
        map_rectangle(job, job.wide if wide else job.narrow, r)
        r.c += r.n_channels


cdef void map_rectangle(Job *job, const cbn_loops *loops, Rectangle r) noexcept nogil:
    cdef const double *coef_c = job.coef_c + r.c
    if job.backward and job.last:
        loops.grad_apply_last(at(job, job.g, r), at(job, job.x, r), at(job, job.y, r), r.n_runs, r.n_channels,
                              job.g.n, job.x.n, job.y.n, coef_c, job.C)
    elif job.backward:
        loops.grad_apply_first(at(job, job.g, r), at(job, job.x, r), at(job, job.y, r), r.n_runs, r.length,
                               job.g.n, job.x.n, job.y.n, coef_c, job.C)
    elif job.last:
        loops.apply_last(at(job, job.x, r), at(job, job.y, r), r.n_runs, r.n_channels, job.x.n, job.y.n, coef_c,
                         job.C)
    else:
        loops.apply_first(at(job, job.x, r), at(job, job.y, r), r.n_runs, r.length, job.x.n, job.y.n, coef_c, job.C)


cdef void whole_channel(Job *job, Py_ssize_t c) noexcept nogil:
    """Reduce, settle and map one channel while it stays in the cache: memory is read once, not twice."""
    cdef Py_ssize_t k
    for k in range(job.blocks):
        reduce_item(job, c * job.blocks + k)
    settle(job, c)
    if digits_are_lost(job, c):
        for k in range(job.blocks):
            reduce_item(job, c * job.blocks + k)
        settle(job, c)
    for k in range(job.blocks):
        map_item(job, c * job.blocks + k)


cdef void reduce(Job *job) noexcept nogil:
    """Statistics of all channels; those that lost digits once more, with a better shift."""
    cdef int arrays = 2 if job.backward else 1
    cdef Py_ssize_t c, n_again = 0
    run(reduce_item, job, job.tiles * job.blocks, arrays)
    for c in range(job.C):
        settle(job, c)
        job.again[c] = digits_are_lost(job, c)
        n_again += job.again[c]
    if n_again == 0:
        return
    run(reduce_item, job, job.tiles * job.blocks, arrays)
    for c in range(job.C):
        if job.again[c]:
            settle(job, c)


cdef Py_ssize_t CACHE = 1 << 19    # bytes of one channel that stay in L2 between two passes


cdef void reduce_and_map(Job *job) noexcept nogil:
    """Statistics, then the map that needs them. The order of the work is chosen here; no result depends on it."""
    cdef int arrays = 2 if job.backward else 1
    if not job.last and arrays * job.N * job.S * job.itemsize <= CACHE \
            and job.C >= threads_for(arrays * job.C * job.N * job.S * job.itemsize, job.C * job.blocks):
        run(whole_channel, job, job.C, arrays)
        return
    reduce(job)
    run(map_item, job, job.tiles * job.blocks, arrays + 1)


# ---- entries ---------------------------------------------------------------------------------------------------

cdef double *doubles(cnp.ndarray a, Py_ssize_t n) except? NULL:
    """The data of a contiguous float64 array of n elements, NULL for None."""
    if a is None:
        return NULL
    if a.size != n:
        raise ValueError(f"expected {n} values, not {a.size}: an array of the layer has been resized")
    return <double *>cnp.PyArray_DATA(a)


cdef first_values(Layout layout, cnp.ndarray x):
    """One value of each channel as float64, zero where it is not finite: the shift of the moments."""
    cdef View v = layout.view(x)
    cdef Py_ssize_t c
    shift = np.empty(layout.C)
    cdef double *shift_c = doubles(shift, layout.C)
    for c in range(layout.C):
        if cnp.PyArray_ITEMSIZE(x) == 4:
            shift_c[c] = (<float *>v.data)[c * v.c]
        else:
            shift_c[c] = (<double *>v.data)[c * v.c]
        if not isfinite(shift_c[c]):
            shift_c[c] = 0
    return shift


def moments(Layout layout, cnp.ndarray x, cnp.ndarray y=None, cnp.ndarray weight=None, cnp.ndarray bias=None,
            double eps=0, bint wide=False):
    """(mean, m2) of every channel; with y, also y = (x - mean)/sqrt(m2/n + eps)*weight + bias.

    weight and bias are contiguous float64 (C,) or None. No array may be empty.
    """
    cdef Job job = make_job(layout, x, wide)
    cdef Py_ssize_t C = layout.C
    shift, mean, m2, again = first_values(layout, x), np.empty(C), np.empty(C), np.empty(C, np.int8)
    partial = np.empty(2 * job.blocks * C)
    coef = None if y is None else np.empty((3, C))
    job.shift_c, job.partial, job.coef_c = doubles(shift, C), doubles(partial, partial.size), doubles(coef, 3 * C)
    job.sum_c, job.square_c, job.again = doubles(mean, C), doubles(m2, C), cnp.PyArray_BYTES(again)
    job.weight_c, job.bias_c, job.eps = doubles(weight, C), doubles(bias, C), eps
    cdef bint forward = y is not None
    if forward:
        job.y = layout.view(y)
    with nogil:
        if forward:
            reduce_and_map(&job)
        else:
            reduce(&job)
    return mean, m2


def apply(Layout layout, cnp.ndarray x, cnp.ndarray y, cnp.ndarray coef, bint wide=False):
    """y = (x - mean)*scale + offset, coef (3, C) contiguous float64: mean, scale, offset."""
    cdef Job job = make_job(layout, x, wide)
    job.coef_c = doubles(coef, 3 * layout.C)
    job.y = layout.view(y)
    with nogil:
        run(map_item, &job, job.tiles * job.blocks, 2)


def grad_moments(Layout layout, cnp.ndarray g, cnp.ndarray x, cnp.ndarray mean, cnp.ndarray dx=None,
                 cnp.ndarray invstd=None, cnp.ndarray weight=None, bint wide=False):
    """(S(g), S(g*(x - mean))) of every channel; with dx, also the gradient through the batch statistics.

    mean, invstd and weight are contiguous float64 (C,); weight may be None. No array may be empty.
    """
    cdef Job job = make_job(layout, x, wide)
    cdef Py_ssize_t C = layout.C
    sums, products, again = np.empty(C), np.empty(C), np.empty(C, np.int8)
    partial = np.empty(2 * job.blocks * C)
    coef = None if dx is None else np.stack([mean, invstd, mean, mean])   # the last two: room
    job.backward, job.batch_statistics = True, dx is not None
    job.shift_c, job.partial, job.coef_c = doubles(mean, C), doubles(partial, partial.size), doubles(coef, 4 * C)
    job.sum_c, job.square_c, job.again = doubles(sums, C), doubles(products, C), cnp.PyArray_BYTES(again)
    job.weight_c = doubles(weight, C)
    job.g = layout.view(g)
    if dx is not None:
        job.y = layout.view(dx)
    with nogil:
        if job.batch_statistics:
            reduce_and_map(&job)
        else:
            reduce(&job)
    return sums, products
