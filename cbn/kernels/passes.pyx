# Maps and reductions over both layouts: how an array lies, which range goes to which thread, what stays in the cache
# in between, and the order of every merge. The arithmetic of an element is in loops.h.
"""Compiled passes of cbn: numpy arrays in, threads and loops below. Internal; `cbn.functional` is the way in.

Every function here trusts its arguments: arrays aligned, native and of a `Layout` that fits them.
"""
cimport cython
cimport numpy as cnp
from cpython.dict cimport PyDict_Size
from cpython.object cimport PyObject_GenericSetAttr, PyTypeObject
from cpython.pycapsule cimport PyCapsule_New
from cpython.ref cimport Py_INCREF
from cython.parallel cimport prange
from libc.math cimport fabs, isfinite, sqrt
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy

import inspect
import os
import types

import numpy as np

from .. import checks

cnp.import_array()

cdef extern from "kernels.h" nogil:
    ctypedef struct cbn_view:
        char *data
        Py_ssize_t n, c
    ctypedef struct cbn_tile:
        cbn_view x, g, z, y
        bint activated, checked
        double negative_slope, vanishing
        Py_ssize_t n_runs, n_channels, length, copies, skip, drop
        const double *coef_c
        const double *forward_c
        Py_ssize_t pitch
        bint nontemporal, prefetch, sum_in_float64
        const double *shift_c
        double *sum_c
        double *square_c
        cbn_view x_copy, dh
    ctypedef void (*cbn_loop)(const cbn_tile *apply, const cbn_tile *reduction) noexcept nogil
    ctypedef struct cbn_loops:
        cbn_loop forward_runs, forward_rows, backward_runs, backward_rows
    ctypedef struct cbn_isa:
        const char *name
        const cbn_loops *f32
        const cbn_loops *f32_in_f64
        const cbn_loops *f64
        const cbn_loops *bf16
        const cbn_loops *bf16_in_f64
        const cbn_loops *f16
        const cbn_loops *f16_in_f64
        const cbn_loops *u8_f32
        const cbn_loops *u8_bf16
        const cbn_loops *i8_f32
        const cbn_loops *i8_bf16
    enum: CBN_ROW_BYTES
    enum: CBN_MEAN, CBN_SCALE, CBN_OFFSET, CBN_IN_FLOAT64, CBN_GRAD_MEAN, CBN_SLOPE
    const cbn_isa *cbn_built[]
    int cbn_highest()

cdef extern from "threads.h" nogil:
    ctypedef struct cbn_thread:
        int asked, pool, forked
    enum: CBN_MOST_THREADS, CBN_POOL_LOST
    int cbn_process_threads
    cbn_thread cbn_here
    void (*cbn_open_region)() noexcept nogil
    int cbn_threads_for_region(int n)
    void cbn_region_is_open()
    int cbn_threads_now(int n)

cdef extern from "numpy/ndarraytypes.h":
    enum: NPY_HALF

cdef extern from "half.h" nogil:
    float cbn_with_digits_of_f16(float a)
    float cbn_finite_f16(cnp.npy_uint16 e)

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
    /* A quarter of a unit in the last place of the largest values: added to one of them, less does not overflow */
    #define CBN_SMALL_FLOAT 0x1p102
    #define cbn_fetch(p) __builtin_prefetch(p)
    #define CBN_SMALL_DOUBLE 0x1p969
    """
    int CBN_OPENMP
    void cbn_fetch(const void *p) nogil
    const char *CBN_COMPILER
    int omp_get_max_threads() nogil
    int omp_get_num_procs() nogil
    const double FLT_MIN, FLT_MAX, FLT_EPSILON, CBN_SMALL_FLOAT, CBN_SMALL_DOUBLE


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
MAX_THREADS = CBN_MOST_THREADS

# Below this much memory a thread (some 10 us), opening a parallel region costs more than it saves; and where other
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


def tune(**knobs):
    """Change knobs of the passes, for the system's caches, for tests and for benchmarks; returns their values before.

    No result depends on any of them.

    bytes_per_thread   memory from which another thread is worth its start; 1: for any two items
    nontemporal_bytes       size of all arrays of a call from which it stores past the caches; 0: always
    l2_bytes           cache of one core; 0 and l3_bytes=0: two passes always, never channel by channel
    l3_bytes           cache of all cores
    prefetch           whether the next channels are fetched while the present ones are computed
    """
    global bytes_per_thread, nontemporal_bytes, l2_bytes, l3_bytes, prefetch
    before = {"bytes_per_thread": bytes_per_thread, "nontemporal_bytes": nontemporal_bytes, "l2_bytes": l2_bytes,
              "l3_bytes": l3_bytes, "prefetch": prefetch}
    for name in knobs:
        if name not in before:
            raise TypeError(f"no knob {name!r}; there are {', '.join(before)}")
    new = before | knobs
    bytes_per_thread, nontemporal_bytes = new["bytes_per_thread"], new["nontemporal_bytes"]
    l2_bytes, l3_bytes, prefetch = new["l2_bytes"], new["l3_bytes"], new["prefetch"]
    return before


# ---- memory ----------------------------------------------------------------------------------------------------

cdef extern from "numpy/arrayobject.h":
    cnp.ndarray PyArray_NewLikeArray(cnp.ndarray prototype, cnp.NPY_ORDER order, void *descr, int subok)
    cnp.ndarray PyArray_View(cnp.ndarray a, void *descr, void *type)
    cnp.ndarray PyArray_NewFromDescr(PyTypeObject *subtype, cnp.dtype descr, int nd, cnp.npy_intp *dims,
                                     cnp.npy_intp *strides, void *data, int flags, void *obj)

cdef extern from "pool.h" nogil:
    enum: CBN_POOL_LEAST
    void *cbn_pool_malloc(void *ctx, size_t size)
    void *cbn_pool_calloc(void *ctx, size_t n, size_t size)
    void *cbn_pool_realloc(void *ctx, void *p, size_t size)
    void cbn_pool_free(void *ctx, void *p, size_t size)
    void cbn_pool_limit(size_t n_bytes)
    size_t cbn_pool_kept()
    size_t cbn_pool_release()

# numpy asks it for the data of an array, keeps it with the array, and gives the data back to it at the array's end.
cdef cnp.PyDataMem_Handler pool
memcpy(pool.name, b"cbn", 4)
pool.version = 1
pool.allocator.ctx = NULL
pool.allocator.malloc, pool.allocator.calloc = cbn_pool_malloc, cbn_pool_calloc
pool.allocator.realloc, pool.allocator.free = cbn_pool_realloc, cbn_pool_free
cdef object pool_capsule = PyCapsule_New(&pool, b"mem_handler", NULL)
cdef size_t pool_limit = 0


def with_room(make, *args, **kwargs):
    """make(...), and once more where memory was short while cbn kept some that nobody used: what allocates much."""
    try:
        return make(*args, **kwargs)
    except MemoryError:
        if not cbn_pool_release():
            raise
    return make(*args, **kwargs)


cdef cnp.ndarray new_like(cnp.ndarray x, dtype):
    cdef void *descr = NULL
    if dtype is not None:
        Py_INCREF(dtype)    # numpy keeps it
        descr = <void *>dtype
    return PyArray_NewLikeArray(x, cnp.NPY_KEEPORDER, descr, 0)


cpdef cnp.ndarray empty_like(cnp.ndarray x, dtype=None):
    """A new array of x's shape, order in memory and dtype, or another one; a large one in memory that one has left."""
    cdef Py_ssize_t n_bytes = cnp.PyArray_NBYTES(x)
    if dtype is not None:
        n_bytes = cnp.PyArray_SIZE(x) * dtype.itemsize
    if pool_limit == 0 or n_bytes < CBN_POOL_LEAST:
        try:
            return new_like(x, dtype)
        except MemoryError:
            if not cbn_pool_release():
                raise
        return new_like(x, dtype)
    before = cnp.PyDataMem_SetHandler(pool_capsule)
    try:
        return new_like(x, dtype)
    finally:
        cnp.PyDataMem_SetHandler(before)


def set_cache_limit(size_t n_bytes):
    """Keep at most so many bytes of outputs that nobody uses any more; returns the limit before."""
    global pool_limit
    before = pool_limit
    pool_limit = n_bytes
    cbn_pool_limit(n_bytes)
    return before


def cache_state():
    """(bytes kept now, at most)."""
    return cbn_pool_kept(), pool_limit


def empty_cache():
    """Give the memory of past outputs that cbn keeps for future ones back to the system.

    Examples
    --------
    >>> import cbn
    >>> cbn.empty_cache()
    """
    cbn_pool_release()


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
        cdef Py_ssize_t run = self.S * size, of_n = abs(stride), of_c = abs(x.strides[channel_axis])
        if (self.N > 1 and of_n < run) or (self.C > 1 and of_c < run) \
                or (self.N > 1 and self.C > 1 and max(of_n, of_c) < (of_n * self.N if of_n < of_c else of_c * self.C)):
            return None
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

    cdef cbn_view view(self, cnp.ndarray x):
        """Where the loops find x: its address, and its strides in elements."""
        cdef cbn_view v
        cdef Py_ssize_t stride = 0
        self._joined(x, 0, self.n_outer, &stride)
        v.data = <char *>cnp.PyArray_DATA(x)
        v.n = stride // cnp.PyArray_ITEMSIZE(x)
        v.c = 1 if self.last else x.strides[self.channel_axis] // cnp.PyArray_ITEMSIZE(x)
        return v

    def __repr__(self):
        kind = f"last: {self.N} rows" if self.last else f"first: {self.N} runs of {self.S}"
        return f"<Layout channels {kind}, {self.C} channels>"


# ---- arguments -------------------------------------------------------------------------------------------------

@cython.final
cdef class Input:
    """An array that the passes can read, with its channel axis and its layout in memory.

    Parameters
    ----------
    x : array_like
        Any rank from 2 on (or one of `ranks`), of any dtype in `checks.native_input`, any strides and byte order.
    channel_axis : int
    name : str
        What an error calls it.
    ranks : tuple of int, optional
    y_dtype : dtype, optional
        Of the output, for an x of 8 bits.

    Attributes
    ----------
    x : ndarray
        A view of x, or a copy that keeps its order in memory if no loop reads it as it lies.
    y_dtype : dtype or None
        None for x's own.
    layout : Layout or None
        None for an empty array.
    wide : bool
        Whether float64 parameters ask for float64 arithmetic on an array of another dtype; see `meets`.
    """
    cdef readonly cnp.ndarray x
    cdef readonly Layout layout
    cdef readonly int axis
    cdef readonly Py_ssize_t n_channels
    cdef readonly object y_dtype
    cdef public bint wide

    def __init__(self, x, channel_axis, name="input", ranks=None, y_dtype=None):
        cdef cnp.ndarray a
        self.y_dtype = y_dtype
        if type(x) is cnp.ndarray and (is_plain_float(x) or y_dtype is not None):
            a = PyArray_View(x, NULL, NULL)    # what the caller does to the shape of his does not change it
        else:
            a = with_room(checks.float_array, x, name)
        checks.rank(a, ranks)
        self.axis = checks.axis_index(channel_axis, a.ndim)
        self.n_channels = a.shape[self.axis]
        if cnp.PyArray_SIZE(a):
            self.layout = Layout.of(a, self.axis)
            if self.layout is None:
                a = with_room(a.copy, order="K")
                self.layout = Layout.of(a, self.axis)
        self.x = a

    @property
    def count(self):
        """Values per channel; 0 for an empty array, whatever is empty about it."""
        return 0 if self.layout is None else self.layout.count

    def meets(self, *dtypes):
        """Compute in the widest of these dtypes and x's own; in float32 at least."""
        own = max(cnp.PyArray_ITEMSIZE(self.x), 4)
        self.wide = any([dtype.itemsize > own for dtype in dtypes])

    def has_beside(self, cnp.ndarray a):
        """Whether a reduction can go through a, of the same shape, beside x: what joins in x joins in a."""
        cdef cbn_view in_x, in_a
        if not cnp.PyArray_ISALIGNED(a) or not self.layout.fits(a):
            return False
        in_x, in_a = self.layout.view(self.x), self.layout.view(a)
        return run_follows_run(self.layout, in_a) >= run_follows_run(self.layout, in_x) \
            and row_follows_row(self.layout, in_a) >= row_follows_row(self.layout, in_x)

    def lies_as(self, cnp.ndarray a):
        """a itself if the loops can go through it beside x, else a copy that lies as x does."""
        if self.layout is None or self.has_beside(a):
            return a
        copy = with_room(np.empty_like, self.x, dtype=a.dtype, subok=False)
        copy[...] = a
        return copy

    def destination(self, cnp.ndarray out, *read):
        """Where a pass may write: `out`, if it lies as x does and no array that is read overlaps it in part."""
        if out is None or self.layout is None or not (cnp.PyArray_ISALIGNED(out) and self.layout.fits(out)):
            return empty_like(self.x, self.y_dtype)
        for a in read:
            if overlaps(a, out) and not is_same_memory(a, out):
                return empty_like(self.x, self.y_dtype)
        return out


cdef bint is_plain_float(cnp.ndarray a) noexcept:
    """Whether the loops read it as it is, but for its strides. (The types of ml_dtypes have no constant numbers.)"""
    cdef int type_num = cnp.PyArray_TYPE(a)
    return (type_num == cnp.NPY_FLOAT or type_num == cnp.NPY_DOUBLE or type_num == NPY_HALF) \
        and cnp.PyArray_ISALIGNED(a) and cnp.PyArray_ISNOTSWAPPED(a)


cdef void extent(cnp.ndarray a, Py_ssize_t *begin, Py_ssize_t *end) noexcept:
    """The addresses between which an array that is not empty lies."""
    cdef int axis
    cdef Py_ssize_t reach
    begin[0] = end[0] = <Py_ssize_t>cnp.PyArray_DATA(a)
    end[0] += cnp.PyArray_ITEMSIZE(a)
    for axis in range(a.ndim):
        reach = (a.shape[axis] - 1) * a.strides[axis]
        if reach > 0:
            end[0] += reach
        else:
            begin[0] += reach


cdef bint is_same_memory(cnp.ndarray a, cnp.ndarray b):
    """Whether element by element two arrays of one shape are the same memory."""
    return cnp.PyArray_DATA(a) == cnp.PyArray_DATA(b) and a.ndim == b.ndim \
        and all([a.shape[axis] == b.shape[axis] and a.strides[axis] == b.strides[axis] for axis in range(a.ndim)])


def overlaps(cnp.ndarray a, cnp.ndarray b):
    """Whether two arrays share memory; when in doubt, yes."""
    cdef Py_ssize_t begin_a, end_a, begin_b, end_b
    if cnp.PyArray_SIZE(a) == 0 or cnp.PyArray_SIZE(b) == 0:
        return False
    extent(a, &begin_a, &end_a)
    extent(b, &begin_b, &end_b)
    if end_a <= begin_b or end_b <= begin_a:
        return False
    try:
        return np.shares_memory(a, b, max_work=100_000)
    except np.exceptions.TooHardError:
        return True


# ---- partition -------------------------------------------------------------------------------------------------
#
# A pass falls into items; an item is a rectangle of runs (or rows) and channels that one thread does. Reductions leave
# one partial sum a block, and these are added in the order of the blocks, so the bits of a sum depend on the partition:
# it is made from shape, dtype and layout alone, never from the number of threads or the size of a cache.

cdef enum:
    CHUNK = 1 << 16       # elements of one item
    SHORT_RUN = 512       # bytes: below, runs side by side are better read as rows, if there are
    SHORT_RUN_ROWS = 8    # so many of them
    MIN_VALUES = 256      # rows of one item: fewer, and the partial sums are a traffic of their own
    MIN_ROWS = 96         # rows of several joined: fewer, and to add up their columns is work of its own
    MAX_ROWS = 512        # of one item: more, and their sums have more additions each than is good for their digits
    ROW_ITEMS = 256       # items that suffice for any number of threads
    LONG_RUN = 12500      # elements
    SMALL = 1 << 14       # bytes of an array whose map takes no longer than to hand the GIL over
    LINE = 64             # bytes

cdef struct Grid:
    bint last             # rows; else runs
    bint channels_outer   # the order of the items: channel by channel, else as x lies in memory
    Py_ssize_t C, N, S
    Py_ssize_t group      # channels of an item
    Py_ssize_t tiles      # groups
    Py_ssize_t step       # runs of a block, or rows of the array
    Py_ssize_t copies     # rows of the array that are one row of a tile
    Py_ssize_t whole      # runs, or rows that fill a multiple of `copies`; what remains is a block of its own
    Py_ssize_t blocks     # blocks of runs; each of them falls into
    Py_ssize_t piece      # elements of a run: a long one falls into
    Py_ssize_t pieces     # pieces


cdef struct Rectangle:
    Py_ssize_t c, n_channels
    Py_ssize_t n, n_runs      # of the array
    Py_ssize_t s, length
    Py_ssize_t copies
    Py_ssize_t block          # its place among the partial sums


cdef inline Py_ssize_t ceil_div(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b


cdef Py_ssize_t filling_lines(Py_ssize_t n, Py_ssize_t n_bytes) noexcept nogil:
    """The largest number up to n of things of n_bytes that end with a line of memory; n if there is none."""
    cdef Py_ssize_t k = LINE
    while k > 1 and k // 2 * n_bytes % LINE == 0:
        k //= 2
    return n - n % k if n >= k else n


cdef Grid rows_grid(Layout layout, Py_ssize_t size, bint joined):
    """Rows of the channels, each S times; `joined`: row follows on row, so that several may be one."""
    cdef Grid g
    cdef Py_ssize_t row = layout.C * layout.S, columns = CBN_ROW_BYTES // max(size, 4), rows, items
    g.last, g.channels_outer = True, False
    g.C, g.N, g.S = layout.C, layout.N, layout.S
    g.group = layout.C if row <= columns else filling_lines((columns - g.S) // g.S, g.S * size)
    g.tiles = ceil_div(g.C, g.group)
    g.copies = filling_lines(min(columns // row, g.N), row * size) if joined and row <= columns // 2 else 1
    rows = max(1, g.N // g.copies)
    items = min(max(1, ROW_ITEMS // g.tiles), rows // max(MIN_ROWS, MIN_VALUES // g.copies))
    g.step = min(MAX_ROWS, ceil_div(rows, max(1, items))) * g.copies
    g.whole = g.N - g.N % g.copies
    g.blocks = ceil_div(g.whole, g.step) + (g.whole < g.N)
    g.piece, g.pieces = g.S, 1
    return g


cdef Grid runs_grid(Layout layout, bint channels_outer):
    """Runs, an item of one channel or of a few whole ones; or of neighbours in memory, channel after channel."""
    cdef Grid g
    g.last, g.channels_outer, g.copies = False, channels_outer, 1
    g.C, g.N, g.S = layout.C, layout.N, layout.S
    g.piece = min(g.S, CHUNK)
    g.pieces = ceil_div(g.S, g.piece)
    if channels_outer:
        g.step = min(g.N, CHUNK // g.piece)
        g.group = min(g.C, max(1, CHUNK // (g.N * g.S)))
    else:
        g.group = min(g.C, CHUNK // g.piece)
        g.step = min(g.N, max(1, CHUNK // (g.C * g.S)))
    g.whole = g.N
    g.tiles = ceil_div(g.C, g.group)
    g.blocks = ceil_div(g.N, g.step)
    return g


cdef inline Py_ssize_t n_items(Grid *g) noexcept nogil:
    return g.tiles * g.blocks * g.pieces


cdef Rectangle rectangle(Grid *g, Py_ssize_t item) noexcept nogil:
    cdef Rectangle r
    cdef Py_ssize_t block, tile, piece = item % g.pieces
    item //= g.pieces
    if g.channels_outer:
        block, tile = item % g.blocks, item // g.blocks
    else:
        block, tile = item // g.tiles, item % g.tiles
    r.block = block * g.pieces + piece
    r.c = tile * g.group
    r.n_channels = min(g.group, g.C - r.c)
    r.n = block * g.step
    r.copies = g.copies
    if r.n < g.whole:
        r.n_runs = min(g.step, g.whole - r.n)
    else:
        r.n = g.whole
        r.n_runs = r.copies = g.N - g.whole
    r.s = piece * g.piece
    r.length = min(g.piece, g.S - r.s)
    return r


cdef inline Py_ssize_t item_of(Grid *g, Py_ssize_t tile, Py_ssize_t block) noexcept nogil:
    """The item that is a block, or a piece of one, of some channels."""
    return tile * g.blocks * g.pieces + block if g.channels_outer else block * g.tiles + tile


# ---- a call of a pass ------------------------------------------------------------------------------------------

cdef struct Job:
    const cbn_loops *narrow     # arithmetic in the type of the elements
    const cbn_loops *wide       # and in float64, for coefficients that float32 cannot hold
    bint all_wide               # every channel takes `wide`
    bint backward               # reductions of g and x, not of x alone
    bint batch_statistics       # backward through them
    bint nontemporal                 # the map stores past the caches
    bint fused                  # reduction and map go through the same tiles, as a pipeline
    int type_num                # of numpy; that of bfloat16 is made when ml_dtypes is imported
    Py_ssize_t itemsize
    Py_ssize_t y_itemsize       # another one for 8-bit input
    Py_ssize_t n_bytes          # of one array, the larger one
    Grid reduction, map
    cbn_view x, y, g            # y is dx in backward
    cbn_view z                  # residual; data NULL: none
    cbn_view dh                 # backward, activated: g times the slope of the activation
    bint sum_in_float64                 # which reduction this is, see kernels.h
    double *in_float64_c             # whether a channel takes it
    bint keeps_dh                # whether somebody asks for h
    bint activated              # what is normalized goes through act(. + z)
    double negative_slope
    double vanishing            # the largest number that the type of y takes for zero
    int threads                 # of the pipeline,
    char *copy                  # a copy of a tile for each of them,
    Py_ssize_t copy_bytes       # of this size
    Py_ssize_t copy_n, copy_c   # and with these strides
    bint copying                # what the tile's map will read
    double eps
    double *weight_c            # C, or NULL: ones
    double *bias_c              # C, or NULL: zeros
    double *shift_c             # what the reductions subtract: a value of the channel, or its mean
    double *partial             # (blocks*pieces, 2, C)
    double *sum_c
    double *square_c            # S(d*d), or S(g*d)
    double *invstd_c            # forward: made, with coef_c; backward: given
    double *coef_c              # (3 or 4, C): see kernels.h
    bint fits                   # whether all coefficients are known to fit, see `all_fit`
    double *forward_c           # (4, C): see there; backward, activated


ctypedef void (*Work)(Job *job, Py_ssize_t begin, Py_ssize_t end, int thread) noexcept nogil


cdef bint row_follows_row(Layout layout, cbn_view v) noexcept nogil:
    """Whether rows, or images, lie one behind the other, without a gap."""
    return layout.N == 1 or v.n == layout.C * layout.S


cdef bint run_follows_run(Layout layout, cbn_view v) noexcept nogil:
    """Whether the channels of an image do."""
    return layout.last or layout.C == 1 or v.c == layout.S


cdef double vanishing(Py_ssize_t itemsize, int type_num) noexcept nogil:
    """The largest float32, or float64 for that, that becomes zero as an element of a type: half of its smallest one."""
    if itemsize > 2:
        return 0
    return 2.0 ** -25 if type_num == NPY_HALF else 2.0 ** -134


cdef Job make_job(Layout layout, cnp.ndarray x, bint wide):
    cdef Job job
    cdef bint rows
    job.itemsize = cnp.PyArray_ITEMSIZE(x)
    job.y_itemsize = job.itemsize
    job.n_bytes = layout.C * layout.N * layout.S * job.itemsize
    job.all_wide = wide or job.itemsize == 8
    job.backward = job.batch_statistics = job.nontemporal = job.fused = False
    job.copy = NULL
    job.x = job.y = job.g = layout.view(x)
    job.activated = job.keeps_dh = job.sum_in_float64 = job.fits = False
    job.negative_slope = 1
    job.z.data = job.dh.data = NULL
    job.weight_c = job.bias_c = job.shift_c = job.partial = job.sum_c = NULL
    job.square_c = job.invstd_c = job.coef_c = job.forward_c = job.in_float64_c = NULL
    job.eps = 0
    job.type_num = cnp.PyArray_TYPE(x)
    job.vanishing = vanishing(job.itemsize, job.type_num)
    if job.itemsize == 8:
        job.narrow = job.wide = active.f64
    elif job.itemsize == 4:
        job.narrow, job.wide = active.f32, active.f32_in_f64
    elif job.type_num == NPY_HALF:
        job.narrow, job.wide = active.f16, active.f16_in_f64
    else:
        job.narrow, job.wide = active.bf16, active.bf16_in_f64
    rows = layout.last or (
        layout.S * job.itemsize < SHORT_RUN and layout.N >= SHORT_RUN_ROWS and run_follows_run(layout, job.x))
    job.reduction = rows_grid(layout, job.itemsize, row_follows_row(layout, job.x)) if rows \
        else runs_grid(layout, True)
    return job


cdef void activate(Job *job, Layout layout, cnp.ndarray z, double negative_slope) noexcept:
    """Let act(. + z) follow the normalization; z may be None, and a slope of 1 is no activation."""
    job.activated = z is not None or negative_slope != 1
    job.negative_slope = negative_slope
    if z is not None:
        job.z = layout.view(z)


cdef bint leaves_the_caches(Job *job) noexcept nogil:
    """Whether the output would not stay in a cache with what the call reads."""
    return (3 if job.backward or job.z.data != NULL else 2) * job.n_bytes >= nontemporal_bytes


cdef bint stores_nontemporal(Job *job) noexcept nogil:
    """Whether the output goes past the caches: where it would not stay there, and is not at the place of an input."""
    cdef char *g = job.g.data if job.dh.data == NULL else job.dh.data
    return leaves_the_caches(job) \
        and job.y.data != job.x.data and job.y.data != g and job.y.data != job.z.data


cdef void write_to(Job *job, Layout layout, cnp.ndarray y) noexcept:
    """The map's output, and a partition for the map, which decides no bit: an element depends on nothing but itself."""
    cdef bint joins
    job.y = layout.view(y)
    if job.itemsize == 1:
        job.y_itemsize = cnp.PyArray_ITEMSIZE(y)
        job.n_bytes *= job.y_itemsize
        if job.type_num == cnp.NPY_UBYTE:
            job.narrow = active.u8_f32 if job.y_itemsize == 4 else active.u8_bf16
        else:
            job.narrow = active.i8_f32 if job.y_itemsize == 4 else active.i8_bf16
        job.wide = job.narrow    # `apply` is not called where that would lose anything
    joins = run_follows_run(layout, job.y) and (job.reduction.copies == 1 or row_follows_row(layout, job.y))
    job.fused = joins or not job.reduction.last
    if job.fused and (job.reduction.last or abs(job.x.c) > abs(job.x.n)):
        job.map = job.reduction
    elif layout.last:
        job.map = rows_grid(layout, job.itemsize, False)
    else:
        job.map = runs_grid(layout, False)
    job.nontemporal = stores_nontemporal(job)


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


# ---- work on some items ----------------------------------------------------------------------------------------

cdef inline cbn_view moved(cbn_view v, Py_ssize_t itemsize, Rectangle *r) noexcept nogil:
    if v.data != NULL:
        v.data += (r.c * v.c + r.n * v.n + r.s) * itemsize
    v.n *= r.copies
    return v


cdef inline cbn_tile tile_of(Job *job, Rectangle *r) noexcept nogil:
    cdef cbn_tile t
    t.n_runs, t.n_channels, t.length, t.copies = r.n_runs // r.copies, r.n_channels, r.length, r.copies
    t.pitch = job.reduction.C
    t.skip = t.drop = 0
    t.x, t.z = moved(job.x, job.itemsize, r), moved(job.z, job.y_itemsize, r)
    t.g = t.y = t.x    # where they have no meaning, a place that there is
    t.activated, t.negative_slope, t.vanishing = job.activated, job.negative_slope, job.vanishing
    t.checked = False
    t.x_copy.data = t.dh.data = NULL
    if job.coef_c != NULL:
        t.coef_c = job.coef_c + r.c
    if job.forward_c != NULL:
        t.forward_c = job.forward_c + r.c
    return t


cdef inline cbn_loop loop_of(Job *job, const cbn_loops *loops, bint rows) noexcept nogil:
    if job.backward:
        return loops.backward_rows if rows else loops.backward_runs
    return loops.forward_rows if rows else loops.forward_runs


cdef inline cbn_tile tile_to_reduce(Job *job, Rectangle *r) noexcept nogil:
    """A rectangle for a reduction, which has its own place among the partial sums."""
    cdef cbn_tile t = tile_of(job, r)
    t.g, t.dh = moved(job.g, job.itemsize, r), moved(job.dh, job.itemsize, r)
    t.shift_c = job.shift_c + r.c
    t.sum_c = job.partial + 2 * r.block * t.pitch + r.c
    t.square_c = t.sum_c + t.pitch
    t.prefetch, t.sum_in_float64 = prefetch, job.sum_in_float64
    return t


cdef inline cbn_tile tile_to_map(Job *job, Rectangle *r) noexcept nogil:
    """A rectangle for a map."""
    cdef cbn_tile t = tile_of(job, r)
    t.g = moved(job.dh if job.backward and job.activated else job.g, job.itemsize, r)
    t.y = moved(job.y, job.y_itemsize, r)
    t.nontemporal = job.nontemporal
    if job.backward:
        t.z.data, t.activated = NULL, False    # are in h
    # A residual or a slope can bring back what has overflowed
    if t.activated and (t.z.data != NULL or (t.negative_slope != 0 and t.negative_slope != 1)):
        t.checked = may_overflow(job, r.c, r.c + r.n_channels)
    if job.itemsize == 8 and not (job.fits or all_fit(job, r.c, r.c + r.n_channels)):
        t.activated = t.checked = True    # without a residual, and with a slope of 1, nothing else
    return t


cdef void to_whole_lines(Job *job, cbn_tile *t, bint first, bint last) noexcept nogil:
    """Let a tile of columns begin and end where lines of y do.

    The line that it shares with the tile before is its own, unless it is the `first` one, and that which it shares with
    the next is not, unless it is the `last` one: so no line is stored in parts.
    """
    cdef Py_ssize_t width = t.n_channels * t.length * job.y_itemsize, lead, channels, before
    if not t.nontemporal or t.copies > 1 or t.y.n * job.y_itemsize % LINE:
        return
    lead = 0 if first else <Py_ssize_t>t.y.data % LINE // job.y_itemsize
    channels = ceil_div(lead, t.length)
    t.drop = 0 if last else <Py_ssize_t>(t.y.data + width) % LINE // job.y_itemsize
    t.skip = channels * t.length - lead
    t.n_channels += channels
    t.coef_c -= channels
    before = channels * t.length
    t.x.data -= before * job.itemsize
    t.g.data -= before * job.itemsize
    t.y.data -= before * job.y_itemsize
    if t.z.data != NULL:
        t.z.data -= before * job.y_itemsize


cdef void reduce_items(Job *job, Py_ssize_t begin, Py_ssize_t end, int thread) noexcept nogil:
    cdef Py_ssize_t item
    cdef Rectangle r
    cdef cbn_tile t
    for item in range(begin, end):
        r = rectangle(&job.reduction, item)
        t = tile_to_reduce(job, &r)
        loop_of(job, job.narrow, job.reduction.last)(NULL, &t)


cdef void map_items(Job *job, Py_ssize_t begin, Py_ssize_t end, int thread) noexcept nogil:
    """Backwards: a map starts with what the reduction before it has left in the cache."""
    cdef Py_ssize_t item
    cdef Rectangle r
    cdef cbn_tile t
    for item in range(end - 1, begin - 1, -1):
        r = rectangle(&job.map, item)
        t = tile_to_map(job, &r)
        if job.map.last:
            to_whole_lines(job, &t, r.c == 0, r.c + r.n_channels == job.map.C)
        map_tile(job, &t, job.map.last)


cdef void map_tile(Job *job, cbn_tile *t, bint last) noexcept nogil:
    """Map a tile: all of it, or pieces of neighbouring channels that take the same arithmetic."""
    cdef Py_ssize_t first = t.coef_c - job.coef_c, c = first, end = first + t.n_channels, n
    cdef Py_ssize_t width = t.n_channels * t.length
    cdef bint wide
    cdef cbn_tile part
    if job.all_wide or job.fits or all_fit(job, first, end):
        loop_of(job, job.wide if job.all_wide else job.narrow, last)(t, NULL)
        return
    while c < end:
        wide = needs_wide(job, c)
        n = 1
        while c + n < end and needs_wide(job, c + n) == wide:
            n += 1
        part = t[0]
        part.skip = part.drop = 0    # what is mapped twice gets the same bits
        part.n_channels = n
        part.coef_c += c - first
        part.copies = 1
        # A row of several copies is as many rows
        part.n_runs *= t.copies
        if t.copies > 1:
            part.x.n = part.g.n = part.y.n = part.z.n = width
        if last:
            part.x.c = part.g.c = part.y.c = part.z.c = t.length
        if part.z.data != NULL:
            part.z.data += (c - first) * part.z.c * job.y_itemsize
        part.x.data += (c - first) * part.x.c * job.itemsize
        part.g.data += (c - first) * part.g.c * job.itemsize
        part.y.data += (c - first) * part.y.c * job.y_itemsize
        loop_of(job, job.wide if wide else job.narrow, last)(&part, NULL)
        c += n


cdef void pipeline(Job *job, Py_ssize_t begin, Py_ssize_t end, int thread) noexcept nogil:
    """Reduce and map some tiles, all channels' values of each at once: memory is read once, not twice.

    While a tile is mapped the next one is reduced, so that reading and writing of memory overlap. Where the arrays
    leave the caches, the elements of runs, or h in place of g, go into a copy that stays in the cache; from there the
    map takes them, and those of the next tile take their place. The copy is contiguous, which the tile is not: lines
    that are a large power of two apart share few places of a cache.
    """
    cdef Py_ssize_t tile, k, blocks = job.reduction.blocks * job.reduction.pieces
    cdef Rectangle r, before
    cdef cbn_tile reduction, map
    cdef cbn_view x_copy, g_copy
    cdef int todo
    cdef Job again
    cdef bint together, narrow = True, narrow_before = True    # whether the last tiles' channels all fit
    cdef cbn_loop loop = loop_of(job, job.narrow, job.reduction.last)
    x_copy.n, x_copy.c = job.copy_n, job.copy_c
    x_copy.data = job.copy + thread * job.copy_bytes
    g_copy = x_copy
    g_copy.data += x_copy.n * job.reduction.N * job.itemsize
    for tile in range(begin, end + 1):
        # A map begins with what it shares with the tile before
        together = begin < tile < end and narrow and (narrow_before or job.copying)
        narrow_before = narrow
        for k in range(blocks):
            if tile > begin:
                before = rectangle(&job.reduction, item_of(&job.reduction, tile - 1, k))
                map = tile_to_map(job, &before)
                if job.copying:
                    map.x = copied(job, x_copy, &before)
                    if not job.keeps_dh:
                        map.g = copied(job, g_copy, &before)
                elif job.reduction.last:
                    to_whole_lines(job, &map, tile - 1 == begin, tile == end)
                if not together:
                    map_tile(job, &map, job.reduction.last)
            if tile < end:
                r = rectangle(&job.reduction, item_of(&job.reduction, tile, k))
                if k == 0 and not job.backward:
                    choose_shifts(job, r.c, r.c + r.n_channels)
                    if tile + 1 < end and prefetch:
                        fetch_samples(job, r.c + r.n_channels, min(r.c + 2 * r.n_channels, job.reduction.C))
                reduction = tile_to_reduce(job, &r)
                if job.copying:
                    reduction.x_copy = copied(job, x_copy, &r)
                    if not job.keeps_dh:
                        reduction.dh = copied(job, g_copy, &r)
                loop(&map if together else NULL, &reduction)
        if tile == end:
            return
        r = rectangle(&job.reduction, item_of(&job.reduction, tile, 0))
        todo = next_to_do(job, PLAIN, r.c, r.c + r.n_channels)
        while todo:
            # A job of its own: other threads have theirs
            again = job[0]
            again.sum_in_float64 = not todo & PLAIN
            for k in range(blocks):
                r = rectangle(&job.reduction, item_of(&job.reduction, tile, k))
                reduction = tile_to_reduce(&again, &r)
                if job.copying:
                    reduction.x = copied(job, x_copy, &r)
                loop(NULL, &reduction)
            todo = next_to_do(&again, todo, r.c, r.c + r.n_channels)
        solve(job, r.c, r.c + r.n_channels)
        narrow = job.itemsize == 8 or (not job.all_wide and all_fit(job, r.c, r.c + r.n_channels))


cdef int next_to_do(Job *job, int todo, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    """What is left to do after one of these reductions of some channels, the plain one first."""
    cdef int left
    merge_partials(job, first, end)
    if job.backward:
        return 0
    left = IN_FLOAT64 * moments_from_sums(job, first, end) | (todo & IN_FLOAT64 if todo & PLAIN else 0)
    return left if left else channels_to_redo(job, first, end)


cdef inline cbn_view copied(Job *job, cbn_view copy, Rectangle *r) noexcept nogil:
    """Where a rectangle is in the copy of its tile."""
    copy.data += (r.n * copy.n + r.s) * job.itemsize
    copy.n *= r.copies
    return copy


cdef enum:
    SAMPLES = 8
    MANY_VALUES = 1024    # of a channel of bfloat16: from here on the rounding of float32 sums averages out


cdef inline double loops_shift(Job *job, double shift) noexcept nogil:
    """A shift as the loops have it: of 16-bit elements a float32, for float16 with no more digits than its own numbers.

    Then most differences from it and their squares are exact. It is at most std further from the mean, since values on
    both sides of it are no nearer to each other.
    """
    if job.itemsize == 2:
        return cbn_with_digits_of_f16(<float>shift) if job.type_num == NPY_HALF else <float>shift
    return shift


cdef inline Py_ssize_t sample(Job *job, Py_ssize_t k) noexcept nogil:
    """Where one of them is, in elements from a channel's first one: pairs of neighbours, mostly in one cache line."""
    cdef Py_ssize_t n = job.reduction.N * job.reduction.S, i = ((k | 1) * n // SAMPLES + (k & 1)) % n
    return i // job.reduction.S * job.x.n + i % job.reduction.S


cdef void fetch_samples(Job *job, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    """Ahead of time: each is in another page, and nothing else goes on while `choose_shifts` waits for them."""
    cdef Py_ssize_t c, k, at
    for k in range(0, SAMPLES, 2):
        at = sample(job, k)
        for c in range(first, end):
            cbn_fetch(job.x.data + (at + c * job.x.c) * job.itemsize)


cdef void choose_shifts(Job *job, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    """The shifts of some channels: the mean of a few values from all over each.

    So it is near the mean of all, and exactly the value of a constant channel. Zero for bfloat16, and where neither the
    mean nor the first of these values is finite.
    """
    cdef Py_ssize_t c, k
    cdef Py_ssize_t at[SAMPLES]
    cdef double *x8
    cdef float *x4
    cdef cnp.npy_uint16 *x2
    for k in range(SAMPLES):
        at[k] = sample(job, k)
    for c in range(first, end):
        job.in_float64_c[c] = False
    # Pairs, since three times a value may be rounded
    if job.itemsize == 8:
        for c in range(first, end):
            x8 = <double *>job.x.data + c * job.x.c
            job.shift_c[c] = ((x8[at[0]] + x8[at[1]]) + (x8[at[2]] + x8[at[3]])
                              + ((x8[at[4]] + x8[at[5]]) + (x8[at[6]] + x8[at[7]]))) / SAMPLES
            if not isfinite(job.shift_c[c]):
                job.shift_c[c] = finite(x8[at[0]])
    elif job.itemsize == 4:
        for c in range(first, end):
            x4 = <float *>job.x.data + c * job.x.c
            job.shift_c[c] = ((<double>x4[at[0]] + x4[at[1]]) + (<double>x4[at[2]] + x4[at[3]])
                              + ((<double>x4[at[4]] + x4[at[5]]) + (<double>x4[at[6]] + x4[at[7]]))) / SAMPLES
            if not isfinite(job.shift_c[c]):
                job.shift_c[c] = finite(x4[at[0]])
    elif job.type_num == NPY_HALF:
        for c in range(first, end):
            x2 = <cnp.npy_uint16 *>job.x.data + c * job.x.c
            job.shift_c[c] = cbn_with_digits_of_f16((
                (cbn_finite_f16(x2[at[0]]) + cbn_finite_f16(x2[at[1]]))
                + (cbn_finite_f16(x2[at[2]]) + cbn_finite_f16(x2[at[3]]))
                + ((cbn_finite_f16(x2[at[4]]) + cbn_finite_f16(x2[at[5]]))
                   + (cbn_finite_f16(x2[at[6]]) + cbn_finite_f16(x2[at[7]])))) / SAMPLES)
    else:
        for c in range(first, end):
            job.shift_c[c] = 0    # the loops add up x itself


cdef inline double count_of(Job *job, Py_ssize_t c) noexcept nogil:
    """Values of a channel."""
    return <double>(job.reduction.N * job.reduction.S)


cdef void merge_partials(Job *job, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    """Merge the partial sums of some channels, in an order that their number alone decides.

    Takes only the channels of this pass: those marked for float64 if `job.sum_in_float64`, the others if not.
    """
    cdef Py_ssize_t c, k, half, C = job.reduction.C, blocks = job.reduction.blocks * job.reduction.pieces
    cdef double *sums = job.partial
    cdef double *others
    while blocks > 1:    # one half to the other: so that each has few additions
        half = (blocks + 1) // 2
        for k in range(blocks - half):
            sums = job.partial + 2 * C * k
            others = sums + 2 * C * half
            for c in range(first, end):
                sums[c] += others[c]
                sums[C + c] += others[C + c]
        blocks = half
    sums = job.partial
    for c in range(first, end):
        if job.backward or job.in_float64_c[c] == job.sum_in_float64:
            job.sum_c[c], job.square_c[c] = sums[c], sums[C + c]


cdef bint moments_from_sums(Job *job, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    """Make mean and m2 = S(d*d) - S(d)^2/n of what `merge_partials` took, in the place of the sums.

    Returns whether some channels are now marked for float64: 16-bit elements whose sums may have left float32's range.
    """
    cdef bint left = False
    cdef Py_ssize_t c
    cdef double n, s
    for c in range(first, end):
        if job.in_float64_c[c] != job.sum_in_float64:
            continue
        n, s = count_of(job, c), job.sum_c[c]
        # All squares of float16 are within that range; of bfloat16 those of a channel that is constant, or seems to be
        # because they are too small, are looked at again
        if job.itemsize == 2 and job.type_num != NPY_HALF and not job.sum_in_float64 \
                and not 1e-20 <= job.square_c[c] < 1e300:
            job.in_float64_c[c] = left = True
        job.sum_c[c] = job.shift_c[c] + s / n
        # Rounding can take m2 below zero; where S(d*d) overflows it is inf and not inf - inf
        if isfinite(job.square_c[c]) or not isfinite(s):
            job.square_c[c] -= s * (s / n)
        if job.square_c[c] < 0:
            job.square_c[c] = 0
    return left


cdef void solve(Job *job, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    """Make the coefficients of some channels from their statistics: moments, or backward the sums of gradients."""
    cdef Py_ssize_t c, C = job.reduction.C
    cdef double n, w, invstd
    cdef double *coef = job.coef_c
    for c in range(first, end):
        n, w = count_of(job, c), 1 if job.weight_c == NULL else job.weight_c[c]
        if job.backward:
            invstd = job.invstd_c[c]
            coef[CBN_MEAN * C + c] = job.shift_c[c]
            coef[CBN_SCALE * C + c] = invstd * w
            coef[CBN_GRAD_MEAN * C + c] = job.sum_c[c] / n
            coef[CBN_SLOPE * C + c] = job.square_c[c] / n * invstd * invstd * (invstd * w)
        else:
            job.invstd_c[c] = 1 / sqrt(job.square_c[c] / n + job.eps)
            coef[CBN_MEAN * C + c] = job.sum_c[c]
            coef[CBN_SCALE * C + c] = job.invstd_c[c] * w
            coef[CBN_OFFSET * C + c] = 0 if job.bias_c == NULL else job.bias_c[c]


cdef enum:
    PLAIN = 1     # reductions that are to be done: of the channels that are not marked for float64,
    IN_FLOAT64 = 2    # and of those that are


cdef int channels_to_redo(Job *job, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    """Which channels have lost digits of m2 = S(d*d) - S(d)^2/n, their shift being more than 2*std from their mean.

    Of float64 elements, whose sums have no digits to spare, more than 1.4*std: 6e-5 of channels with normal values.

    bfloat16 has no shift. Its sums are as good as exact where the mean is large beside the spread (loops.h), up to
    2^15*std, where float64 loses digits, as if a few of millions of values differ. Where the mean is not large, float32
    loses some; with many values their number hides it.

    Then the mean becomes its shift, for a second reduction, of bfloat16 an exact one; where that finds the same values
    for the other channels, which keep theirs, nothing changes. It is the channel's own data that decides, so the bits
    depend neither on the partition of the work nor on its neighbours.
    """
    cdef Py_ssize_t c
    cdef double n = <double>(job.reduction.N * job.reduction.S), d, shift
    cdef int lost = 0
    cdef bint bfloat16 = job.itemsize == 2 and job.type_num != NPY_HALF, far
    for c in range(first, end):
        d = job.sum_c[c] - job.shift_c[c]
        d *= n * d    # n*R, R = ((mean - shift)/std)^2
        if bfloat16 and not job.in_float64_c[c]:
            far = d > 1073741824.0 * job.square_c[c] or (
                n < MANY_VALUES and d > job.square_c[c] and d < 64 * job.square_c[c])
        else:
            far = d > (2 if job.itemsize == 8 else 4) * job.square_c[c]
        if not far or not isfinite(job.sum_c[c]):
            continue
        shift = loops_shift(job, job.sum_c[c])
        if shift != job.shift_c[c]:    # else nothing would change
            job.shift_c[c] = shift
            job.in_float64_c[c] = job.in_float64_c[c] or bfloat16
            lost |= IN_FLOAT64 if job.in_float64_c[c] else PLAIN
    return lost


cdef inline bint fits_float32(double mean, double scale, double third, double slope, double added) noexcept nogil:
    """Whether float32 arithmetic does for a channel: it holds the coefficients, and nothing overflows on the way to an
    element of y or dx that does not.

    A factor that is not zero must be a normal number, or it has lost digits. What x and the gradient are subtracted
    from, `mean` and `third` (gmean; forward the offset), must be small beside the largest values, and so must be what a
    product is added to: the offset, and what `added` bounds. Bitwise, for a loop without branches.
    """
    return (fabs(mean) < CBN_SMALL_FLOAT) & (fabs(third) + added < CBN_SMALL_FLOAT) \
        & ((scale == 0) | ((fabs(scale) >= FLT_MIN) & (fabs(scale) <= FLT_MAX))) \
        & ((slope == 0) | ((fabs(slope) >= FLT_MIN) & (fabs(slope) <= FLT_MAX)))


cdef inline double lower_part(double mean, double scale) noexcept nogil:
    """A bound of what the lower one of the two floats that are a mean contributes (loops.h)."""
    return fabs(mean * scale) * (FLT_EPSILON / 2)


cdef inline double finite(double a) noexcept nogil:
    return a if isfinite(a) else 0


cdef bint takes_float64(double mean, double scale, double third, double slope, double added) noexcept nogil:
    """Whether a channel does, whose elements are smaller. Coefficients that are not finite are so in every type."""
    return not fits_float32(finite(mean), finite(scale), finite(third), finite(slope), finite(added))


cdef bint forward_takes_float64(double mean, double scale, double offset) noexcept nogil:
    return takes_float64(mean, scale, offset, 0, lower_part(mean, scale))


cdef inline double slope_of(Job *job, Py_ssize_t c) noexcept nogil:
    """Backward: what x - mean is multiplied by."""
    return job.coef_c[CBN_SLOPE * job.reduction.C + c]


cdef inline double added_of(Job *job, Py_ssize_t c) noexcept nogil:
    """A bound of (x - mean)*slope and of lower parts; |x - mean| <= sqrt(n)/invstd, slope = S(h*d)*invstd^2/n*scale."""
    cdef double scale = job.coef_c[job.reduction.C + c], root = sqrt(<double>(job.reduction.N * job.reduction.S))
    return fabs(job.square_c[c] * job.invstd_c[c] * scale) / root \
        + lower_part(job.coef_c[c], slope_of(job, c)) + lower_part(job.coef_c[2 * job.reduction.C + c], scale)


cdef bint needs_wide(Job *job, Py_ssize_t c) noexcept nogil:
    cdef Py_ssize_t C = job.reduction.C
    cdef double mean = job.coef_c[c], scale = job.coef_c[C + c], third = job.coef_c[2 * C + c]
    if job.backward:
        return takes_float64(mean, scale, third, slope_of(job, c), added_of(job, c))
    return forward_takes_float64(mean, scale, third)


cdef bint all_fit(Job *job, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    """Whether the narrow loops may do some channels, those of float64 elements without a check of what comes out."""
    cdef Py_ssize_t c, C = job.reduction.C
    cdef double *mean = job.coef_c
    cdef double *scale = mean + C
    cdef double *third = scale + C
    cdef bint fit = True
    if job.backward and job.itemsize == 8:
        for c in range(first, end):
            fit &= (fabs(mean[c]) < CBN_SMALL_DOUBLE) & (fabs(third[c]) + added_of(job, c) < CBN_SMALL_DOUBLE)
    elif job.itemsize == 8:
        for c in range(first, end):
            fit &= (fabs(mean[c]) < CBN_SMALL_DOUBLE) & (fabs(third[c]) < CBN_SMALL_DOUBLE)
    elif job.backward:
        for c in range(first, end):
            fit &= fits_float32(mean[c], scale[c], third[c], slope_of(job, c), added_of(job, c))
    else:
        for c in range(first, end):
            fit &= fits_float32(mean[c], scale[c], third[c], 0, lower_part(mean[c], scale[c]))
    return fit


cdef void map_with(Job *job, cnp.ndarray coef) noexcept:
    """Let the map have these coefficients, contiguous float64 (3, C), which stay as they are."""
    job.coef_c = <double *>cnp.PyArray_DATA(coef)
    job.fits = all_fit(job, 0, job.reduction.C)


cdef bint may_overflow(Job *job, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    """Whether a normalized value of some channels may be too large for the forward map's arithmetic.

    By the batch's own statistics it is not larger than sqrt(n)*weight + bias; by others anything, unless x is small.
    """
    cdef Py_ssize_t c, C = job.reduction.C
    cdef double *scale = job.coef_c + C
    cdef double limit = CBN_SMALL_DOUBLE if job.itemsize == 8 else CBN_SMALL_FLOAT
    cdef double root = sqrt(<double>(job.reduction.N * job.reduction.S))
    cdef bint may = False
    if job.invstd_c != NULL:
        for c in range(first, end):
            may |= not fabs(scale[c]) * root < limit * job.invstd_c[c]
    elif job.itemsize == 2 and job.type_num == NPY_HALF:
        for c in range(first, end):
            may |= not (65504 + fabs(job.coef_c[c])) * fabs(scale[c]) < limit
    else:
        may = True
    return may


# ---- order of the work: no result depends on it ----------------------------------------------------------------

# Sizes of the caches, for one core and for all; set from the system's at import (config.py).
cdef Py_ssize_t l2_bytes = 1 << 20
cdef Py_ssize_t l3_bytes = 1 << 23
cdef Py_ssize_t nontemporal_bytes = 1 << 23    # a call that goes through so much memory stores past the caches
cdef bint prefetch = True


cdef void reduce(Job *job) noexcept nogil:
    """Statistics of all channels; once more with better shifts, or in float64 throughout, where that is needed."""
    cdef int threads = threads_for(job.n_bytes * (2 if job.backward else 1), n_items(&job.reduction))
    if not job.backward:
        choose_shifts(job, 0, job.reduction.C)
    cdef int todo = PLAIN
    while todo:
        job.sum_in_float64 = not todo & PLAIN
        run(reduce_items, job, n_items(&job.reduction), threads)
        todo = next_to_do(job, todo, 0, job.reduction.C)
    if job.coef_c != NULL and (not job.backward or job.batch_statistics):
        solve(job, 0, job.reduction.C)


cdef void choose_tiles(Job *job) noexcept nogil:
    """Whether reduction and map go through tiles of whole channels, one after the other, and how large these are.

    They do where two tiles or more are left to each thread, the array is more than a quarter of a core's L2, and a tile
    stays in the cache: in half of L2, or of the core's share of L3. Runs are joined to longer ones of several channels,
    for the prefetchers of the hardware, as far as that allows.
    """
    cdef Grid *g = &job.reduction
    cdef Py_ssize_t arrays = 2 if job.backward else 1, n_bytes = arrays * job.n_bytes, channel_bytes = n_bytes // g.C
    cdef int threads = threads_for(n_bytes, g.tiles)
    cdef Py_ssize_t cache = max(l2_bytes // 2, l3_bytes // 4 // threads)
    job.threads = threads
    job.copying = not g.last and leaves_the_caches(job)
    job.fused = job.fused and n_bytes > l2_bytes // 4 and g.group * channel_bytes <= cache
    if not job.fused:
        return
    if not g.last:
        g.group = max(1, min(ceil_div(LONG_RUN, g.S), 2 * l2_bytes // channel_bytes, g.C // (8 * threads)))
        g.tiles = ceil_div(g.C, g.group)
    job.fused = g.tiles >= 2 * threads
    # Runs of the copy share no line, so that what is stored to one delays no load of the next; nor are its rows a power
    # of two apart
    job.copy_c = g.S if g.last else ceil_div(g.S * job.itemsize, LINE) * LINE // job.itemsize + LINE // job.itemsize
    job.copy_n = g.group * job.copy_c + 4 * LINE // job.itemsize
    job.copy_bytes = ceil_div(arrays * g.N * job.copy_n * job.itemsize, LINE) * LINE
    if job.fused and job.copying and not job.keeps_dh:
        job.dh.data = NULL
        job.nontemporal = stores_nontemporal(job)


cdef void reduce_and_map(Job *job) noexcept nogil:
    """Statistics, then the map that needs them."""
    if job.fused:
        run(pipeline, job, job.reduction.tiles, job.threads)
    else:
        reduce(job)
        run(map_items, job, n_items(&job.map), threads_for(job.n_bytes * (3 if job.backward else 2), n_items(&job.map)))


# ---- entries ---------------------------------------------------------------------------------------------------

cdef double *doubles(cnp.ndarray a, Py_ssize_t n) except? NULL:
    """The data of a contiguous float64 array of n elements, NULL for None."""
    if a is None:
        return NULL
    if a.size != n:
        raise ValueError(f"expected {n} values, not {a.size}: an array of the layer has been resized")
    return <double *>cnp.PyArray_DATA(a)


cdef cnp.ndarray new_doubles(cnp.npy_intp n):
    try:
        return cnp.PyArray_SimpleNew(1, &n, cnp.NPY_DOUBLE)
    except MemoryError:
        if not cbn_pool_release():
            raise
    return cnp.PyArray_SimpleNew(1, &n, cnp.NPY_DOUBLE)


cdef room_for(Job *job):
    """The memory of the pipeline's copies; whoever calls keeps it until the job is done."""
    if not (job.fused and job.copying):
        return None
    room = with_room(np.empty, job.threads * job.copy_bytes + LINE, np.int8)
    job.copy = cnp.PyArray_BYTES(room)
    job.copy += -<Py_ssize_t>job.copy & (LINE - 1)
    return room


def moments(Layout layout, cnp.ndarray x, cnp.ndarray y=None, cnp.ndarray weight=None, cnp.ndarray bias=None,
            double eps=0, bint wide=False, cnp.ndarray residual=None, double negative_slope=1):
    """(mean, m2, None) of every channel; with y, (mean, m2, invstd), and y = act(norm(x)*weight + bias + residual).

    weight and bias are contiguous float64 (C,) or None. No array may be empty.
    """
    cdef Job job = make_job(layout, x, wide)
    cdef Py_ssize_t C = layout.C
    cdef bint forward = y is not None
    mean, m2 = new_doubles(C), new_doubles(C)
    invstd = new_doubles(C) if forward else None
    room = new_doubles(C * (5 + 2 * job.reduction.blocks * job.reduction.pieces))
    job.sum_c, job.square_c, job.invstd_c = doubles(mean, C), doubles(m2, C), doubles(invstd, C)
    job.weight_c, job.bias_c, job.eps = doubles(weight, C), doubles(bias, C), eps
    job.shift_c = doubles(room, room.size)
    job.in_float64_c, job.partial = job.shift_c + 4 * C, job.shift_c + 5 * C
    if forward:
        job.coef_c = job.shift_c + C
        activate(&job, layout, residual, negative_slope)
        write_to(&job, layout, y)
        choose_tiles(&job)
        _copies = room_for(&job)
    with nogil:
        if forward:
            reduce_and_map(&job)
        else:
            reduce(&job)
    return mean, m2, invstd


def fits_in_float32(cnp.ndarray coef):
    """Whether float32 holds mean, scale and offset of every channel; coef (3, C) contiguous float64."""
    cdef Job job
    job.backward, job.itemsize = False, 1
    job.reduction.C = cnp.PyArray_DIM(coef, 1)
    job.coef_c = doubles(coef, 3 * job.reduction.C)
    return all_fit(&job, 0, job.reduction.C)


cdef int check_coefficients(cnp.ndarray coef, Layout layout) except -1:
    if cnp.PyArray_SIZE(coef) != 3 * layout.C:
        raise ValueError(f"there are coefficients of shape {np.shape(coef)} for {layout.C} channels")
    return 0


def apply(Layout layout, cnp.ndarray x, cnp.ndarray y, cnp.ndarray coef, bint wide=False, cnp.ndarray residual=None,
          double negative_slope=1):
    """y = act((x - mean)*scale + offset + residual), coef (3, C) contiguous float64: mean, scale, offset.

    x may be of uint8 or int8: then y and the residual are float32 or bfloat16, and coef `fits_in_float32`.
    """
    cdef Job job = make_job(layout, x, wide)
    check_coefficients(coef, layout)
    map_with(&job, coef)
    activate(&job, layout, residual, negative_slope)
    write_to(&job, layout, y)
    with nogil:
        run(map_items, &job, n_items(&job.map), threads_for(2 * job.n_bytes, n_items(&job.map)))


def grad_moments(Layout layout, cnp.ndarray g, cnp.ndarray x, cnp.ndarray mean, cnp.ndarray invstd,
                 cnp.ndarray dx=None, cnp.ndarray weight=None, bint wide=False, cnp.ndarray bias=None,
                 cnp.ndarray residual=None, double negative_slope=1, cnp.ndarray h=None, bint keeps_h=False,
                 y_dtype=None):
    """(S(g), S(g*(x - mean))*invstd) of every channel; with dx, also the gradient through the batch statistics.

    mean, invstd, weight and bias are contiguous float64 (C,); weight and bias may be None. No array may be empty.
    With h, what was normalized went through act(. + residual), and h = g times the slope of act takes the place of g.
    It may be dx, or g; it need not be written where dx is wanted, unless `keeps_h`. `y_dtype` is that of the forward
    pass, where x is a wider copy of its input.
    """
    cdef Job job = make_job(layout, x, wide)
    cdef Py_ssize_t c, C = layout.C
    sums, products = new_doubles(C), new_doubles(C)
    room = new_doubles(C * (8 + 2 * job.reduction.blocks * job.reduction.pieces))
    job.backward, job.batch_statistics = True, dx is not None
    job.shift_c, job.weight_c, job.invstd_c = doubles(mean, C), doubles(weight, C), doubles(invstd, C)
    job.sum_c, job.square_c = doubles(sums, C), doubles(products, C)
    job.coef_c = doubles(room, room.size)
    job.partial = job.coef_c + 8 * C
    job.g = layout.view(g)
    if h is not None:
        activate(&job, layout, residual, negative_slope)
        job.dh, job.keeps_dh = layout.view(h), keeps_h or dx is None
        job.bias_c = doubles(bias, C)
        if y_dtype is not None:
            job.vanishing = vanishing(y_dtype.itemsize, y_dtype.num)
        job.forward_c = job.coef_c + 4 * C
        for c in range(C):
            job.forward_c[c] = job.shift_c[c]
            job.forward_c[C + c] = job.invstd_c[c] * (1 if weight is None else job.weight_c[c])
            job.forward_c[2 * C + c] = 0 if bias is None else job.bias_c[c]
            job.forward_c[3 * C + c] = job.all_wide or forward_takes_float64(
                job.forward_c[c], job.forward_c[C + c], job.forward_c[2 * C + c])
    if dx is not None:
        write_to(&job, layout, dx)
        choose_tiles(&job)
        _copies = room_for(&job)
    with nogil:
        if job.batch_statistics:
            reduce_and_map(&job)
        else:
            reduce(&job)
        for c in range(C):
            job.square_c[c] *= job.invstd_c[c]
    return sums, products


cdef extern from *:
    """
    /* What CPython's cache of attributes goes by: a new number after each change of the type or of a base; 0: none. */
    #if PY_VERSION_HEX < 0x030c0000
    #define TYPE_VERSION(self) \
        (PyType_HasFeature(Py_TYPE(self), Py_TPFLAGS_VALID_VERSION_TAG) ? Py_TYPE(self)->tp_version_tag : 0)
    #else
    #define TYPE_VERSION(self) (Py_TYPE(self)->tp_version_tag)
    #endif
    """
    unsigned int TYPE_VERSION(object self)
    object PyObject_GenericGetDict(object self, void *context)
    int delete_attribute "PyObject_GenericSetAttr"(object self, object name, void *none) except -1


class _CallSignature:
    """`inspect.signature` of an instance is that of its forward; of a class that of its constructor, as ever."""
    def __get__(self, instance, owner=None):
        if instance is None:
            raise AttributeError("__signature__")
        called = owner.__call__ if owner.__call__ is not Planned.__call__ else None    # one of the user's own
        return inspect.signature(instance.forward if called is None else types.MethodType(called, instance))


# ---- calls that repeat -----------------------------------------------------------------------------------------

cdef bint usable(cnp.ndarray a, Py_ssize_t C, int type_num) noexcept:
    """Whether `a` is a contiguous (C,) array of this type."""
    return cnp.PyArray_NDIM(a) == 1 and cnp.PyArray_DIM(a, 0) == C and cnp.PyArray_TYPE(a) == type_num \
        and cnp.PyArray_ISCARRAY_RO(a)


cdef cnp.ndarray phantom_like(cnp.ndarray x, dtype):
    """An array with the strides of `empty_like(x, dtype)` and no memory of its own: nobody may read or write it."""
    cdef cnp.npy_intp strides[MAXDIMS]
    cdef cnp.npy_intp stride = dtype.itemsize
    cdef list axes = list(range(x.ndim))    # slowest first
    if cnp.PyArray_IS_F_CONTIGUOUS(x) and not cnp.PyArray_IS_C_CONTIGUOUS(x):
        axes.reverse()
    elif not cnp.PyArray_IS_C_CONTIGUOUS(x):
        axes.sort(key=lambda axis: -abs(x.strides[axis]))
    for axis in reversed(axes):
        strides[axis] = stride
        stride *= x.shape[axis]
    Py_INCREF(dtype)    # numpy keeps it
    return PyArray_NewFromDescr(
        <PyTypeObject *>np.ndarray, dtype, x.ndim, cnp.PyArray_DIMS(x), strides, cnp.PyArray_DATA(x), 0, NULL)


@cython.final
cdef class Plan:
    """An evaluation of inputs of one type, shape and strides, with all prepared that does not depend on their values.

    The coefficients are those of arrays that others may write to at any time, so at each call the bytes of the arrays
    are compared with the bytes that the coefficients were made from: a fraction of what making them costs, and no
    change can be missed.
    """
    cdef Job job
    cdef int n_axes, type_num
    cdef Py_ssize_t shape[MAXDIMS]
    cdef Py_ssize_t strides[MAXDIMS]
    cdef int y_type_num
    cdef object y_dtype            # None for x's own
    cdef Py_ssize_t y_strides[MAXDIMS]    # of the output that a call makes itself, for which `job` is
    cdef bint alike                # whether type and strides are x's
    cdef Py_ssize_t extent         # bytes from the first to the end of the last, of the longer one
    cdef const cbn_isa *isa
    cdef tuple sources              # running mean and variance, weight, bias, as far as there are
    cdef int source_types[4]
    cdef cnp.ndarray seen           # their bytes
    cdef cnp.ndarray coef
    cdef Layout layout

    @staticmethod
    def of(Input inp, x, tuple sources, tuple values, cnp.ndarray coef, double negative_slope=1):
        """The plan for arguments like x, of which inp was made, or None where it could not be used.

        sources: running mean and variance, weight, bias, or None for those that are not there; values: contiguous
        float64 copies of them, from which coef, (3, C), was made. Without sources the plan keeps to coef.
        """
        cdef Plan self
        cdef Layout layout = inp.layout
        cdef cnp.ndarray a, y
        cdef int axis
        if layout is None or type(x) is not np.ndarray or cnp.PyArray_DATA(x) != cnp.PyArray_DATA(inp.x):
            return None    # of an array that has to be converted or copied at each call
        a = x
        for axis in range(a.ndim):
            if a.strides[axis] < 0:
                return None
        self = Plan()
        self.layout, self.coef = layout, coef
        self.sources = tuple([source for source in sources if source is not None])
        y = phantom_like(a, a.dtype if inp.y_dtype is None else inp.y_dtype)
        self.n_axes, self.type_num = cnp.PyArray_NDIM(a), cnp.PyArray_TYPE(a)
        self.y_dtype, self.y_type_num = inp.y_dtype, cnp.PyArray_TYPE(y)
        self.extent = cnp.PyArray_ITEMSIZE(a)
        self.alike = self.type_num == self.y_type_num
        for axis in range(self.n_axes):
            self.shape[axis], self.strides[axis], self.y_strides[axis] = a.shape[axis], a.strides[axis], y.strides[axis]
            self.extent += (a.shape[axis] - 1) * a.strides[axis]
            self.alike &= y.strides[axis] == a.strides[axis]
        self.extent = max(self.extent, cnp.PyArray_NBYTES(y))
        self.job = make_job(layout, a, inp.wide)
        check_coefficients(coef, layout)
        map_with(&self.job, coef)
        activate(&self.job, layout, None, negative_slope)
        write_to(&self.job, layout, y)
        self.isa = active
        # From here on no Python code: what is seen must be what the values were made from
        self.seen = np.empty(len(self.sources) * layout.C * sizeof(double), np.uint8)
        return self if self.see(tuple([value for value in values if value is not None])) else None

    cdef bint see(self, tuple values) noexcept:
        """Keep the bytes of the sources; False unless they are float arrays with just these values."""
        cdef cnp.ndarray a
        cdef Py_ssize_t c, C = self.layout.C
        cdef double *value
        cdef char *seen = cnp.PyArray_BYTES(self.seen)
        cdef int i
        for i in range(len(self.sources)):
            a = <cnp.ndarray>self.sources[i]
            self.source_types[i] = cnp.PyArray_TYPE(a)
            value = <double *>cnp.PyArray_DATA(<cnp.ndarray>values[i])
            if usable(a, C, cnp.NPY_DOUBLE):
                if memcmp(cnp.PyArray_DATA(a), value, C * sizeof(double)):
                    return False
            elif usable(a, C, cnp.NPY_FLOAT):
                for c in range(C):
                    if not (<float *>cnp.PyArray_DATA(a))[c] == value[c] and value[c] == value[c]:
                        return False
            else:
                return False
            memcpy(seen, cnp.PyArray_DATA(a), C * cnp.PyArray_ITEMSIZE(a))
            seen += C * cnp.PyArray_ITEMSIZE(a)
        return True

    cdef bint is_current(self) noexcept:
        """Whether the arrays hold what they held."""
        cdef int i
        cdef Py_ssize_t C = self.layout.C
        cdef char *seen = cnp.PyArray_BYTES(self.seen)
        cdef cnp.ndarray a
        for i in range(len(self.sources)):
            a = <cnp.ndarray>self.sources[i]
            if not usable(a, C, self.source_types[i]) \
                    or memcmp(cnp.PyArray_DATA(a), seen, C * cnp.PyArray_ITEMSIZE(a)):
                return False
            seen += C * cnp.PyArray_ITEMSIZE(a)
        return True

    cdef bint fits(self, cnp.ndarray a, int type_num, Py_ssize_t *strides) noexcept:
        cdef int axis
        if cnp.PyArray_NDIM(a) != self.n_axes or cnp.PyArray_TYPE(a) != type_num \
                or not cnp.PyArray_ISALIGNED(a) or not cnp.PyArray_ISNOTSWAPPED(a):
            return False
        for axis in range(self.n_axes):
            if cnp.PyArray_DIM(a, axis) != self.shape[axis] or cnp.PyArray_STRIDE(a, axis) != strides[axis]:
                return False
        return True

    cdef cnp.ndarray run(self, object x, object out, object residual):
        """y, or None if this plan is not for this call."""
        cdef Job job
        cdef cnp.ndarray y
        cdef int threads
        cdef bint like_x
        if self.isa != active or type(x) is not cnp.ndarray or not self.fits(x, self.type_num, self.strides) \
                or not self.is_current():
            return None
        if residual is not None and (type(residual) is not cnp.ndarray
                                     or not self.fits(residual, self.y_type_num, self.y_strides)):
            return None
        job = self.job
        if out is None:
            y = empty_like(x, self.y_dtype)
        else:
            if type(out) is not cnp.ndarray:
                return None
            y = out
            like_x = self.fits(y, self.type_num, self.strides)
            if not cnp.PyArray_ISWRITEABLE(y) or not (like_x or self.fits(y, self.y_type_num, self.y_strides)) \
                    or self.overlaps_partly(x, y, like_x) \
                    or (residual is not None and self.overlaps_partly(residual, y, self.alike or not like_x)):
                return None
            if like_x and not self.alike:
                if self.y_dtype is not None:
                    return None    # refused by forward
                write_to(&job, self.layout, y)    # in place, with the gaps of x
        job.x.data = job.g.data = cnp.PyArray_BYTES(x)
        job.y.data = cnp.PyArray_BYTES(y)
        if residual is not None:
            activate(&job, self.layout, residual, job.negative_slope)
        job.nontemporal = stores_nontemporal(&job)
        if job.n_bytes < SMALL:
            map_items(&job, 0, n_items(&job.map), 0)
            return y
        threads = threads_for(2 * job.n_bytes, n_items(&job.map))
        with nogil:
            run(map_items, &job, n_items(&job.map), threads)
        return y

    cdef bint overlaps_partly(self, cnp.ndarray a, cnp.ndarray b, bint alike) noexcept:
        """Whether two arrays, neither longer than x, may share memory, but not element by element."""
        cdef char *of_a = cnp.PyArray_BYTES(a)
        cdef char *of_b = cnp.PyArray_BYTES(b)
        return not (of_a == of_b and alike) and of_a < of_b + self.extent and of_b < of_a + self.extent


cdef list planned_classes = []    # (class, {name: attribute}) for which plans stand


cdef object class_attribute(type cls, str name):
    """What the MRO has under this name, as it is there; None for nothing."""
    for base in cls.__mro__:
        if name in vars(base):
            return vars(base)[name]
    return None


def plans_stand_for(cls, *others):
    """Let plans answer for `forward` of a class while nothing overrides what it defines now, but for `others`."""
    names = [name for name in vars(cls) if not name.startswith("__") and name not in others]
    names += ["__getattribute__", "__getattr__", "__setattr__", "__delattr__"]
    planned_classes.append((cls, {name: class_attribute(cls, name) for name in names}))


cdef object attributes_of(object self):
    return PyObject_GenericGetDict(self, NULL)


@cython.auto_pickle(False)
cdef class Planned:
    """Base of the layers: a call that repeats goes through its plan, every other one through `forward`.

    The invariant of a plan: it returns the bits that `forward` would return now. It stands for `forward` as cbn defines
    it and for all that this reads, so it is used only while

    * class: no class of the MRO overrides anything that cbn's class defined when it was imported, be it by a subclass,
      a mixin or a patch. This is looked up when a plan is kept; from then on the type's version tag is compared, which
      CPython changes when the type or one of its bases is changed, and which another class does not have.
    * instance: its `__dict__` has no entry that hides something of the class. An assignment and a deletion drop the
      plan, and the number of entries is compared, since one can be added without an assignment. (Not noticed is what is
      written into `__dict__` itself in the place of another entry: assign, or make a copy of the layer.)
    * attributes: nothing has been assigned since the plan was made (`_version`).
    * arrays: running statistics, weight and bias are of the type, and hold the bytes, that the coefficients were made
      from.
    * arguments: x, out and residual have the type, shape and strides that it was made for; x and out do not overlap in
      part.
    * the instruction set in use is the one that it was made for.
    """
    cdef Plan plan
    cdef unsigned int type_version    # of the type that the plan was kept for
    cdef Py_ssize_t n_attributes      # and entries of the instance's __dict__
    cdef readonly Py_ssize_t _version    # how often something has been assigned
    cdef readonly Py_ssize_t _plans      # kept so far

    def __call__(self, *args, **kwargs):
        """`forward`, which a subclass may override."""
        cdef object y
        cdef Plan plan = self.plan
        if plan is not None and len(args) == 1:
            if not self.is_as_kept():
                self.plan = y = None
            elif not kwargs:
                y = plan.run(args[0], None, None)
            elif len(kwargs) == 1 and "out" in kwargs:
                y = plan.run(args[0], kwargs["out"], None)
            elif len(kwargs) == ("out" in kwargs) + ("residual" in kwargs):
                y = plan.run(args[0], kwargs.get("out"), kwargs.get("residual"))
            else:
                y = None
            if y is not None:
                return y
        return self.forward(*args, **kwargs)

    cdef bint is_as_kept(self):
        """Whether class and instance have what they had when the plan was kept."""
        return TYPE_VERSION(self) == self.type_version and PyDict_Size(attributes_of(self)) == self.n_attributes

    def __setattr__(self, name, value):
        """Whatever is assigned to a layer may change what it computes, so its plan is dropped."""
        self.plan = None
        self._version += 1
        PyObject_GenericSetAttr(self, name, value)

    def __delattr__(self, name):
        """As an assignment."""
        self.plan = None
        self._version += 1
        delete_attribute(self, name, NULL)

    def __reduce_ex__(self, protocol):
        """Protocols 0 and 1 know no classes that are compiled: what protocol 2 does serves them too."""
        return object.__reduce_ex__(self, max(protocol, 2))

    def _has_plan(self, x):
        """Whether the plan is for inputs like x, and still holds."""
        cdef Plan plan = self.plan
        return plan is not None and type(x) is np.ndarray and self.is_as_kept() and plan.isa == active \
            and plan.fits(x, plan.type_num, plan.strides) and plan.is_current()

    def _keep(self, Plan plan, Py_ssize_t version):
        """Use this plan, if there is one, for calls like the last one, where the invariant allows it.

        version: `_version` when the layer's attributes were read.
        """
        cdef dict attributes = attributes_of(self)
        cdef type cls = type(self)
        cdef unsigned int type_version
        if plan is None or version != self._version:
            return
        cls.forward    # CPython gives the type a version now if it has none
        type_version = TYPE_VERSION(self)
        defined = next((defined for base, defined in planned_classes if base in cls.__mro__), None)
        if defined is None or not defined.keys().isdisjoint(attributes):
            return
        if type_version != self.type_version \
                and any([class_attribute(cls, name) is not value for name, value in defined.items()]):
            return
        # CPython runs out of versions after some thousand changes of a class
        if type_version != 0 and type_version == TYPE_VERSION(self):
            self.type_version, self.n_attributes = type_version, len(attributes)
            self._plans += 1
            self.plan = plan

    __signature__ = _CallSignature()


# ---- for compiled tools ----------------------------------------------------------------------------------------

@cython.final
cdef class Passes:
    """The passes over arrays of one dtype, shape and strides, for compiled code: C pointers in, no GIL, no exception.

    A tool cimports the class (passes.pxd), makes one with the GIL, and calls its C methods without. Pointers are to the
    first element; per channel, everything is contiguous float64. Threads are cbn's, see `cbn.set_num_threads`. `apply`
    may be called from many threads at once; the others keep their sums in the object, so that a thread has its own.

        moments    mean_c and m2_c = S((x - mean)^2) of every channel of x
        apply      y = (x - mean)*scale + offset, coef_c (3, C): mean, scale, offset. y may be x
        normalize  training: mean_c, m2_c, invstd_c = 1/sqrt(m2/count + eps) of x, y = (x - mean)*invstd*weight + bias;
                   weight_c and bias_c may be NULL. y may be x
        backward   dx through the statistics of the batch, sum_c = S(dy), product_c = S(dy*(x - mean))*invstd: the
                   gradients of bias and weight; weight_c may be NULL. dx may be dy or x

    Parameters
    ----------
    like : ndarray
        What the pointers will be to: its dtype, shape and strides count, its values do not.
    channel_axis : int

    Attributes
    ----------
    C, count : int
        Channels, and values of each.

    Raises
    ------
    TypeError, ValueError
        For what a layer would refuse, for an empty array, and for strides that would need a copy.
    """
    def __cinit__(self, like, channel_axis=1):
        a = checks.array(like, "like")
        inp = Input(a, channel_axis, "like")
        if inp.layout is None:
            raise ValueError(f"like is empty, of shape {a.shape}")
        if cnp.PyArray_DATA(inp.x) != cnp.PyArray_DATA(a):
            raise ValueError(f"like has strides {a.strides}, which no loop reads: expected rows or runs")
        self.job = <Job *>malloc(sizeof(Job))
        if self.job == NULL:
            raise MemoryError()
        self.job[0] = make_job(inp.layout, inp.x, False)
        self.layout, self.C, self.count = inp.layout, inp.layout.C, inp.layout.count
        self.room = new_doubles(self.C * (5 + 2 * self.job.reduction.blocks * self.job.reduction.pieces))
        self.job.coef_c = doubles(self.room, self.room.size)
        write_to(self.job, inp.layout, inp.x)

    def __dealloc__(self):
        free(self.job)

    cdef void moments(self, const void *x, double *mean_c, double *m2_c) noexcept nogil:
        cdef Job job = self.job[0]
        job.x.data = <char *>x
        job.shift_c, job.in_float64_c, job.partial = job.coef_c, job.coef_c + self.C, job.coef_c + 5 * self.C
        job.coef_c = NULL
        job.sum_c, job.square_c = mean_c, m2_c
        reduce(&job)

    cdef void apply(self, const void *x, void *y, const double *coef_c) noexcept nogil:
        cdef Job job = self.job[0]
        job.x.data = job.g.data = <char *>x
        job.y.data = <char *>y
        job.coef_c = <double *>coef_c
        job.nontemporal = stores_nontemporal(&job)
        run(map_items, &job, n_items(&job.map), threads_for(2 * job.n_bytes, n_items(&job.map)))

    cdef void normalize(self, const void *x, void *y, const double *weight_c, const double *bias_c, double eps,
                        double *mean_c, double *m2_c, double *invstd_c) noexcept nogil:
        cdef Job job = self.job[0]
        job.x.data = job.g.data = <char *>x
        job.y.data = <char *>y
        job.shift_c, job.in_float64_c = job.coef_c + 3 * self.C, job.coef_c + 4 * self.C
        job.partial = job.coef_c + 5 * self.C
        job.weight_c, job.bias_c, job.eps = <double *>weight_c, <double *>bias_c, eps
        job.sum_c, job.square_c, job.invstd_c = mean_c, m2_c, invstd_c
        with_copies(&job)

    cdef void backward(self, const void *dy, const void *x, void *dx, const double *weight_c, const double *mean_c,
                       const double *invstd_c, double *sum_c, double *product_c) noexcept nogil:
        cdef Job job = self.job[0]
        cdef Py_ssize_t c
        job.backward = job.batch_statistics = True
        job.x.data, job.g.data, job.y.data = <char *>x, <char *>dy, <char *>dx
        job.partial = job.coef_c + 5 * self.C
        job.shift_c, job.invstd_c, job.weight_c = <double *>mean_c, <double *>invstd_c, <double *>weight_c
        job.sum_c, job.square_c = sum_c, product_c
        with_copies(&job)
        for c in range(self.C):
            product_c[c] *= invstd_c[c]


cdef void with_copies(Job *job) noexcept nogil:
    """`reduce_and_map` with memory of its own for the pipeline; where there is none, in two passes."""
    cdef char *room = NULL
    job.nontemporal = stores_nontemporal(job)
    choose_tiles(job)
    if job.fused:
        room = <char *>cbn_pool_malloc(NULL, job.threads * job.copy_bytes)
        job.fused = room != NULL
        job.copy = room
    reduce_and_map(job)
    cbn_pool_free(NULL, room, 0)
