# numpy's side of the passes: how an array lies in memory, which arrays a pass can read and write beside it, and the
# memory of what it returns. Everything here needs the GIL and opens no thread.
"""Layouts, inputs, outputs and their memory. Internal.

Every function trusts its arguments: arrays of a dtype that the loops read, aligned and native.
"""
cimport cython
cimport numpy as cnp
from libc.math cimport INFINITY
from cpython.object cimport PyTypeObject
from cpython.pycapsule cimport PyCapsule_New
from cpython.ref cimport Py_INCREF
from libc.string cimport memcpy

from .engine cimport set_memory_release
from .job cimport BF16, F16, F32, F64, I8, I16, I32, U8, U16, Element
from .kernels cimport cbn_act, cbn_view
from .partition cimport Extents, row_follows_row, run_follows_run

import numpy as np

cnp.import_array()


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
    size_t cbn_pool_release() noexcept

# numpy asks it for the data of an array, keeps it with the array, and gives the data back to it at the array's end.
cdef cnp.PyDataMem_Handler pool
memcpy(pool.name, b"cbn", 4)
pool.version = 1
pool.allocator.ctx = NULL
pool.allocator.malloc, pool.allocator.calloc = cbn_pool_malloc, cbn_pool_calloc
pool.allocator.realloc, pool.allocator.free = cbn_pool_realloc, cbn_pool_free
cdef object pool_capsule = PyCapsule_New(&pool, b"mem_handler", NULL)
cdef size_t pool_limit = 0
set_memory_release(cbn_pool_release)


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


cdef cnp.ndarray new_doubles(cnp.npy_intp n):
    """n float64 values; many, as the statistics of ghost batches are, in memory that others have left."""
    if pool_limit and n * <Py_ssize_t>sizeof(double) >= CBN_POOL_LEAST:
        before = cnp.PyDataMem_SetHandler(pool_capsule)
        try:
            return cnp.PyArray_SimpleNew(1, &n, cnp.NPY_DOUBLE)
        finally:
            cnp.PyDataMem_SetHandler(before)
    try:
        return cnp.PyArray_SimpleNew(1, &n, cnp.NPY_DOUBLE)
    except MemoryError:
        if not cbn_pool_release():
            raise
    return cnp.PyArray_SimpleNew(1, &n, cnp.NPY_DOUBLE)


cdef double *doubles(cnp.ndarray a, Py_ssize_t n) except? NULL:
    """The data of a contiguous float64 array of n elements, NULL for None."""
    if a is None:
        return NULL
    if a.size != n:
        raise ValueError(f"expected {n} values, not {a.size}: an array of the layer has been resized")
    return <double *>cnp.PyArray_DATA(a)


cdef char *take_memory(size_t n_bytes) noexcept nogil:
    """Memory of the pool, without the GIL; NULL where there is none, though the pool has given back what it kept."""
    cdef char *memory = <char *>cbn_pool_malloc(NULL, n_bytes)
    if memory == NULL and cbn_pool_release():
        memory = <char *>cbn_pool_malloc(NULL, n_bytes)
    return memory


cdef void give_memory(char *memory) noexcept nogil:
    cbn_pool_free(NULL, memory, 0)


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


# ---- layouts ---------------------------------------------------------------------------------------------------

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

    runs    N runs of S contiguous elements for each of C channels
    rows    N rows of C contiguous elements, one of each channel (S is 1)

    The axes other than the channel's are taken in the order in which they lie in memory and joined where they
    can be: all of them into rows, or into an outer group (N) and an inner one (S) of runs.
    """
    @property
    def rows(self):
        """Whether it is rows, else runs."""
        return self.extents.rows

    @property
    def C(self):
        """Channels."""
        return self.extents.C

    @property
    def N(self):
        """Runs of a channel, or rows."""
        return self.extents.N

    @property
    def S(self):
        """Elements of a run."""
        return self.extents.S

    @property
    def count(self):
        """Values per channel."""
        return self.extents.N * self.extents.S

    @staticmethod
    def of(cnp.ndarray x, int channel_axis):
        """The layout of x, or None if no loop reads it as it lies."""
        cdef Layout self = Layout()
        cdef Extents *e = &self.extents
        cdef Py_ssize_t stride = 0, size = cnp.PyArray_ITEMSIZE(x)
        cdef int axis, i
        if not strides_are_whole(x):
            return None
        self.channel_axis = channel_axis
        e.C = x.shape[channel_axis]
        for axis in range(x.ndim):
            if axis == channel_axis or x.shape[axis] == 1:
                continue
            i = self.n_axes    # insertion: larger strides first, equal ones in the order of the axes
            while i > 0 and abs(x.strides[self.axes[i - 1]]) < abs(x.strides[axis]):
                self.axes[i] = self.axes[i - 1]
                i -= 1
            self.axes[i] = axis
            self.n_axes += 1
        e.rows = False
        e.N = e.S = 1
        for i in range(self.n_axes):
            e.N *= x.shape[self.axes[i]]
        # A single channel is better a run, if its values are contiguous.
        if (e.C == 1 or x.strides[channel_axis] == size) and self.joined(x, 0, self.n_axes, &stride):
            if (e.C > 1 or e.N == 1 or stride != size) and (e.N == 1 or abs(stride) >= e.C * size):
                e.rows = True
                self.n_outer = self.n_axes
                return self
        # Runs: the longest contiguous group of the fastest axes, and all others in one.
        self.n_outer = self.n_axes
        while self.n_outer > 0 and self.joined(x, self.n_outer - 1, self.n_axes, &stride) and stride == size:
            self.n_outer -= 1
            e.S *= x.shape[self.axes[self.n_outer]]
            e.N //= x.shape[self.axes[self.n_outer]]
        if e.S == 1 or not self.joined(x, 0, self.n_outer, &stride):
            return None
        # Where runs overlap, as in sliding windows or a broadcast axis, no output can lie as the input does.
        cdef Py_ssize_t run = e.S * size, of_n = abs(stride), of_c = abs(x.strides[channel_axis])
        if (e.N > 1 and of_n < run) or (e.C > 1 and of_c < run) \
                or (e.N > 1 and e.C > 1 and max(of_n, of_c) < (of_n * e.N if of_n < of_c else of_c * e.C)):
            return None
        return self

    cdef bint joined(self, cnp.ndarray x, int begin, int end, Py_ssize_t *stride) noexcept:
        """Whether axes[begin:end] are one axis in memory, and its stride in bytes (0 for no axis)."""
        cdef int i
        for i in range(begin, end - 1):
            if x.strides[self.axes[i]] != x.strides[self.axes[i + 1]] * x.shape[self.axes[i + 1]]:
                return False
        stride[0] = x.strides[self.axes[end - 1]] if end > begin else 0
        return True

    @property
    def order(self):
        """The axes of the array as the loops go through them: those of N, the channel's, those of S."""
        cdef int i
        axes = [self.axes[i] for i in range(self.n_axes)]
        axes.insert(self.n_outer, self.channel_axis)
        return axes

    def fits(self, cnp.ndarray y):
        """Whether y, of the same shape, is runs or rows of the same axes (its strides may differ)."""
        cdef Py_ssize_t stride
        if not strides_are_whole(y):
            return False
        if self.extents.rows:
            return (self.extents.C == 1 or y.strides[self.channel_axis] == cnp.PyArray_ITEMSIZE(y)) \
                and self.joined(y, 0, self.n_axes, &stride)
        return self.joined(y, self.n_outer, self.n_axes, &stride) and stride == cnp.PyArray_ITEMSIZE(y) \
            and self.joined(y, 0, self.n_outer, &stride)

    cdef cbn_view view(self, cnp.ndarray x) noexcept:
        """Where the loops find x: its address, and its strides in elements."""
        cdef cbn_view v
        cdef Py_ssize_t stride = 0
        self.joined(x, 0, self.n_outer, &stride)
        v.data = <char *>cnp.PyArray_DATA(x)
        v.n = stride // cnp.PyArray_ITEMSIZE(x)
        v.c = 1 if self.extents.rows else x.strides[self.channel_axis] // cnp.PyArray_ITEMSIZE(x)
        return v

    def __repr__(self):
        kind = f"{self.N} rows" if self.rows else f"{self.N} runs of {self.S}"
        return f"<Layout {kind}, {self.C} channels>"


# ---- arguments -------------------------------------------------------------------------------------------------

@cython.final
cdef class Input:
    """An array that the passes can read, with its channel axis and its layout in memory.

    Parameters
    ----------
    x : ndarray
        Of two or more dimensions, of a dtype that the loops read, aligned and native; any strides. The caller has made
        it, since nobody else may change its shape in place.
    axis : int
        The axis with the channels, from 0 on.
    y_dtype : dtype, optional
        Of the output, for an x of 8 bits.

    Attributes
    ----------
    x : ndarray
        x, or a copy that keeps its order in memory if no loop reads it as it lies.
    y_dtype : dtype or None
        None for x's own.
    layout : Layout or None
        None for an empty array.
    in_float64 : bool
        Whether float64 parameters ask for float64 arithmetic on an array of another dtype; see `promote_for`.
    """
    def __init__(self, cnp.ndarray x, int axis, y_dtype=None):
        if not 0 <= axis < x.ndim:
            raise ValueError(f"axis {axis} is out of range for an array of {x.ndim} dimensions")
        self.x = x
        self.axis = axis
        self.n_channels = self.x.shape[axis]
        self.y_dtype = y_dtype
        if cnp.PyArray_SIZE(x):
            self.layout = Layout.of(self.x, axis)
            if self.layout is None:
                self.x = with_room(self.x.copy, order="K")
                self.layout = Layout.of(self.x, axis)

    @property
    def count(self):
        """Values per channel; 0 for an empty array, whatever is empty about it."""
        return 0 if self.layout is None else self.layout.count

    def promote_for(self, *parameters):
        """Compute in the widest dtype of these arrays and x, in float32 at least; a dtype will do, and None is none."""
        cdef Py_ssize_t own = max(cnp.PyArray_ITEMSIZE(self.x), 4)
        for a in parameters:
            if a is not None and <Py_ssize_t>a.itemsize > own:
                self.in_float64 = True

    def can_walk(self, cnp.ndarray a):
        """Whether the loops can go through `a`, of the same shape, with x's partition."""
        cdef cbn_view in_x, in_a
        cdef const Extents *e = &self.layout.extents
        if not cnp.PyArray_ISALIGNED(a) or not self.layout.fits(a):
            return False
        in_x, in_a = self.layout.view(self.x), self.layout.view(a)
        return run_follows_run(e, in_a) >= run_follows_run(e, in_x) \
            and row_follows_row(e, in_a) >= row_follows_row(e, in_x)

    def matched(self, cnp.ndarray a):
        """a itself if the loops can walk it beside x, else a copy that lies as x does."""
        if self.layout is None or self.can_walk(a):
            return a
        copy = with_room(np.empty_like, self.x, dtype=a.dtype, subok=False)
        copy[...] = a
        return copy

    def output(self, cnp.ndarray out, *read):
        """Where a pass may write: `out`, if it lies as x does and no array that is read overlaps it in part."""
        if out is None or self.layout is None or not (cnp.PyArray_ISALIGNED(out) and self.layout.fits(out)):
            return empty_like(self.x, self.y_dtype)
        for a in read:
            if overlaps(a, out) and not is_same_memory(a, out):
                return empty_like(self.x, self.y_dtype)
        return out


cdef cbn_act act_of(act) except *:
    """An activation, (slope, low, high); None for none."""
    cdef cbn_act a
    if act is None:
        a.slope, a.low, a.high = 1, -INFINITY, INFINITY
    else:
        a.slope, a.low, a.high = act
    return a


cdef Element element_of(cnp.ndarray a) noexcept:
    """What the loops take an array for. (The types of ml_dtypes have no constant numbers.)"""
    cdef int type_num = cnp.PyArray_TYPE(a)
    if type_num == cnp.NPY_FLOAT:
        return F32
    if type_num == cnp.NPY_DOUBLE:
        return F64
    if type_num == NPY_HALF:
        return F16
    if type_num == cnp.NPY_UBYTE or type_num == cnp.NPY_BOOL:
        return U8
    if type_num == cnp.NPY_BYTE:
        return I8
    if type_num == cnp.NPY_USHORT:
        return U16
    if type_num == cnp.NPY_SHORT:
        return I16
    return I32 if type_num == cnp.NPY_INT else BF16


cpdef bint is_plain(cnp.ndarray a) noexcept:
    """Whether it is float32, float64 or float16, aligned and native: the loops read it, but for its strides."""
    cdef int type_num = cnp.PyArray_TYPE(a)
    return (type_num == cnp.NPY_FLOAT or type_num == cnp.NPY_DOUBLE or type_num == NPY_HALF) \
        and cnp.PyArray_ISALIGNED(a) and cnp.PyArray_ISNOTSWAPPED(a)


def plain_view(x):
    """A view that nobody else can reshape, of what `is_plain`; else None."""
    if type(x) is cnp.ndarray and is_plain(x):
        return view_of(x)
    return None


cdef cnp.ndarray view_of(cnp.ndarray x):
    return PyArray_View(x, NULL, NULL)


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


def mask_bytes(counts):
    """A bool array of two dimensions as bytes, -1 for True, and how many are True of each row."""
    cdef cnp.ndarray given = np.ascontiguousarray(counts).view(np.uint8)
    cdef Py_ssize_t i, j, n = cnp.PyArray_DIM(given, 0), length = cnp.PyArray_DIM(given, 1)
    cdef cnp.ndarray mask = np.empty((n, length), np.int8), found = np.empty(n, np.intp)
    cdef const unsigned char *of_given
    cdef signed char *of_mask
    cdef unsigned int total
    for i in range(n):
        of_given = <const unsigned char *>cnp.PyArray_DATA(given) + i * length
        of_mask = <signed char *>cnp.PyArray_DATA(mask) + i * length
        total = 0    # a run is shorter than 2^32
        for j in range(length):
            of_mask[j] = -<signed char>of_given[j]
            total += of_given[j]
        (<Py_ssize_t *>cnp.PyArray_DATA(found))[i] = total
    return mask, found
