# How a pass falls into items for the threads. Arithmetic on shapes alone: no array, no Python.
#
# An item is a rectangle of runs (or rows) and channels that one thread does. A reduction leaves one partial sum per
# block, and these are added in the order of the blocks. So the bits of a sum depend on blocks and pieces, which are
# made from shape, dtype and layout alone; only how many channels an item has may follow threads and caches.
from .kernels cimport CBN_ROW_BYTES, cbn_view

cdef enum:
    CHUNK = 1 << 16       # elements of one item
    SHORT_RUN = 512       # bytes: below, runs side by side are better read as rows, if there are
    SHORT_RUN_ROWS = 8    # so many of them
    MIN_VALUES = 256      # rows of the array in one item: fewer, and the partial sums are a traffic of their own
    MIN_ROWS = 96         # rows of several joined: fewer, and to add up their columns is work of its own
    MAX_ROWS = 512        # of one item: more, and their sums have more additions each than is good for their digits
    ROW_ITEMS = 256       # items that suffice for any number of threads
    INTEGER_ITEMS = 64    # items of integers that suffice
    INTEGER_WIDTH = 1024       # elements of a run that are one row (loops/integers.h)
    MAX_INTEGER_ROWS = 16384   # 32 bits hold the sum of four times as many squares of 8 bits
    MEDIUM_RUN = 512      # elements
    LONG_RUN = 12500      # elements
    CACHE_LINE = 64       # bytes

# What an array is to the passes: N runs of S contiguous elements for each of C channels; or N rows of C, and S is 1.
cdef struct Extents:
    bint rows
    Py_ssize_t C, N, S

cdef struct Grid:
    bint rows             # else runs
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


cdef inline bint row_follows_row(const Extents *e, cbn_view v) noexcept nogil:
    """Whether rows, or images, lie one behind the other, without a gap."""
    return e.N == 1 or v.n == e.C * e.S


cdef inline bint run_follows_run(const Extents *e, cbn_view v) noexcept nogil:
    """Whether the channels of an image do."""
    return e.rows or e.C == 1 or v.c == e.S


cdef inline Py_ssize_t things_a_line(Py_ssize_t n_bytes) noexcept nogil:
    """How many things of n_bytes end with a cache line."""
    cdef Py_ssize_t k = CACHE_LINE
    while k > 1 and k // 2 * n_bytes % CACHE_LINE == 0:
        k //= 2
    return k


cdef inline Py_ssize_t filling_lines(Py_ssize_t n, Py_ssize_t n_bytes) noexcept nogil:
    """The largest number up to n of things of n_bytes that end with a cache line; n if there is none."""
    cdef Py_ssize_t k = things_a_line(n_bytes)
    return n - n % k if n >= k else n


cdef inline Grid rows_grid(const Extents *e, Py_ssize_t size, bint joined) noexcept nogil:
    """Rows of the channels, each S times; `joined`: row follows on row, so that several may be one."""
    cdef Grid g
    cdef Py_ssize_t row = e.C * e.S, columns = CBN_ROW_BYTES // max(size, 4), rows, items
    g.rows, g.channels_outer = True, False
    g.C, g.N, g.S = e.C, e.N, e.S
    g.group = e.C if row <= columns else filling_lines((columns - g.S) // g.S, g.S * size)
    g.tiles = ceil_div(g.C, g.group)
    g.copies = filling_lines(min(columns // row, g.N), row * size) if joined and row <= columns // 2 else 1
    rows = max(1, g.N // g.copies)
    items = min(max(1, ROW_ITEMS // g.tiles), rows // max(MIN_ROWS, MIN_VALUES // g.copies))
    g.step = min(MAX_ROWS, ceil_div(rows, max(1, items))) * g.copies
    g.whole = g.N - g.N % g.copies
    g.blocks = ceil_div(g.whole, g.step) + (g.whole < g.N)
    g.piece, g.pieces = g.S, 1
    return g


cdef inline Grid runs_grid(const Extents *e, bint channels_outer) noexcept nogil:
    """Runs, an item of one channel or of a few whole ones; or of neighbours in memory, channel after channel."""
    cdef Grid g
    g.rows, g.channels_outer, g.copies = False, channels_outer, 1
    g.C, g.N, g.S = e.C, e.N, e.S
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


cdef inline bint reads_rows(const Extents *e, cbn_view x, Py_ssize_t size) noexcept nogil:
    """Whether a reduction reads x as rows: runs so short, and so many, that C*S columns are better."""
    return e.rows or (e.S * size < SHORT_RUN and e.N >= SHORT_RUN_ROWS and run_follows_run(e, x))


cdef inline Py_ssize_t n_items(const Grid *g) noexcept nogil:
    return g.tiles * g.blocks * g.pieces


cdef inline Py_ssize_t most_items(const Grid *g, Py_ssize_t itemsize) noexcept nogil:
    """Items that `share` could make: of single channels, or of columns that are whole cache lines."""
    cdef Py_ssize_t tiles = g.C
    if g.rows:
        tiles = g.tiles if g.copies > 1 else max(g.tiles, g.C // things_a_line(g.S * itemsize))
    return tiles * g.blocks * g.pieces


cdef inline void share(Grid *g, Py_ssize_t itemsize, int threads) noexcept nogil:
    """Let every thread have as many items as any other, of fewer channels each. Many items need no care.

    A tile of columns ends with a cache line, or with the row: 16-bit sums of a part of a line have other bits.
    """
    cdef Py_ssize_t of_tile = g.blocks * g.pieces, items = n_items(g), group, k = things_a_line(g.S * itemsize)
    if threads == 1 or g.copies > 1 or items >= 8 * threads:
        return
    items = ceil_div(items, threads) * threads
    group = ceil_div(g.C, ceil_div(items, of_tile))
    if g.rows:
        group = ceil_div(group, k) * k
    g.group = min(g.group, group)
    g.tiles = ceil_div(g.C, g.group)


cdef inline void coarsen(Grid *g) noexcept nogil:
    """Larger items, for integers: no partition changes exact sums, and each item leaves some to store and to merge."""
    cdef Py_ssize_t rows = g.step // g.copies if g.rows else g.step * (2 + g.piece // INTEGER_WIDTH)
    while n_items(g) > INTEGER_ITEMS and g.blocks > 1 and rows < MAX_INTEGER_ROWS:
        rows *= 2
        g.step *= 2
        g.blocks = ceil_div(g.whole, g.step) + (g.whole < g.N)


cdef inline Py_ssize_t n_partials(const Grid *g) noexcept nogil:
    """Partial sums of a channel."""
    return g.blocks * g.pieces


cdef inline Rectangle rectangle(const Grid *g, Py_ssize_t item) noexcept nogil:
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


cdef inline Py_ssize_t item_of(const Grid *g, Py_ssize_t tile, Py_ssize_t block) noexcept nogil:
    """The item that is a block, or a piece of one, of some channels."""
    return tile * g.blocks * g.pieces + block if g.channels_outer else block * g.tiles + tile
