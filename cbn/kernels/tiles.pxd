# Tiles: a rectangle of the partition as the loops see it, with the pointers and the coefficients that belong to it.
from libc.math cimport fabs, sqrt
from libc.string cimport memset

from .coefficients cimport CBN_SMALL_DOUBLE, CBN_SMALL_FLOAT, takes_float64
from .job cimport F16, Job, channels_fit, counts_rows, loop_of
from .kernels cimport CBN_MEAN, CBN_SCALE, cbn_tile, cbn_view
from .partition cimport CACHE_LINE, Rectangle, ceil_div


cdef inline cbn_view moved(cbn_view v, Py_ssize_t itemsize, const Rectangle *r) noexcept nogil:
    if v.data != NULL:
        v.data += (r.c * v.c + r.n * v.n + r.s) * itemsize
    v.n *= r.copies
    return v


cdef inline cbn_view in_copy(const Job *job, cbn_view copy, const Rectangle *r) noexcept nogil:
    """Where a rectangle is in the copy of its tile."""
    copy.data += (r.n * copy.n + r.s) * job.itemsize
    copy.n *= r.copies
    return copy


cdef inline cbn_tile tile_of(const Job *job, const Rectangle *r) noexcept nogil:
    cdef cbn_tile t
    memset(&t, 0, sizeof(t))
    t.selection = job.selection
    t.run, t.channel, t.element = r.n, r.c, r.s
    t.n_runs, t.n_channels, t.length, t.copies = r.n_runs // r.copies, r.n_channels, r.length, r.copies
    t.pitch = job.reduction.C
    t.x, t.z = moved(job.x, job.itemsize, r), moved(job.z, job.y_itemsize, r)
    t.g = t.y = t.x    # unused views alias x, so that offsetting their pointers stays defined
    t.activated, t.act, t.vanishing = job.activated, job.act, job.vanishing
    if job.coef_c != NULL:
        t.coef_c = job.coef_c + r.c
    if job.forward_c != NULL:
        t.forward_c = job.forward_c + r.c
    return t


cdef inline cbn_tile tile_to_reduce(const Job *job, const Rectangle *r) noexcept nogil:
    """A rectangle for a reduction, which has its own place among the partial sums."""
    cdef cbn_tile t = tile_of(job, r)
    t.g, t.dh = moved(job.g, job.itemsize, r), moved(job.dh, job.itemsize, r)
    t.shift_c = job.shift_c + r.c
    t.sum_c = job.partial + job.partial_rows * r.block * t.pitch + r.c
    t.square_c = t.sum_c + t.pitch
    t.prefetch, t.sum_in_float64 = job.prefetch, job.sum_in_float64
    t.extremes = job.min_c != NULL
    if counts_rows(job):
        t.count_c, t.skipna, t.w = t.sum_c + 2 * t.pitch, job.skipna, job.weights
        if t.w.data != NULL:
            t.w.data += (r.c * t.w.c + r.n * t.w.n + r.s) * <Py_ssize_t>sizeof(double)
    return t


cdef inline cbn_tile tile_of_output(const Job *job, const Rectangle *r) noexcept nogil:
    """A rectangle to which coefficients are applied that nothing is known of."""
    cdef cbn_tile t = tile_of(job, r)
    t.g = moved(job.dh if job.backward and job.activated else job.g, job.itemsize, r)
    t.y = moved(job.y, job.y_itemsize, r)
    t.nontemporal, t.prefetch = job.nontemporal, job.prefetch
    if job.backward:
        t.z.data, t.activated = NULL, False    # dh has them in it
    return t


cdef inline bint brings_back(const cbn_tile *t) noexcept nogil:
    """Whether there is a residual or a slope, which can bring back what has overflowed."""
    return t.activated and (t.z.data != NULL or (t.act.slope != 0 and t.act.slope != 1))


cdef inline cbn_tile tile_to_apply(const Job *job, const Rectangle *r) noexcept nogil:
    """The same with coefficients."""
    cdef cbn_tile t = tile_of_output(job, r)
    if brings_back(&t):
        t.checked = may_overflow(job, r.c, r.c + r.n_channels)
    if job.itemsize == 8 and not (job.fits or channels_fit(job, r.c, r.c + r.n_channels)):
        t.activated = t.checked = True    # only to look at what comes out: no residual, and forward a slope of 1
    return t


cdef inline bint may_overflow(const Job *job, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    """Whether a normalized value of some channels may be too large for the arithmetic of the forward pass.

    By the batch's own statistics it is not larger than sqrt(n)*weight + bias, where weight and bias are those of batch
    renormalization too; by others, and where the values have weights, anything, unless x is float16.
    """
    cdef Py_ssize_t c, C = job.reduction.C
    cdef double *scale = job.coef_c + CBN_SCALE * C
    cdef double limit = CBN_SMALL_DOUBLE if job.itemsize == 8 else CBN_SMALL_FLOAT
    cdef double root = sqrt(<double>(job.reduction.N * job.reduction.S))
    cdef bint may = False, weighs = job.selection != NULL and job.selection.weight_n != NULL
    if job.invstd_c != NULL and not weighs and (job.blend == NULL or job.blend.r_max != 0):
        for c in range(first, end):
            may |= not fabs(scale[c]) * root < limit * job.invstd_c[c]
    elif job.element == F16:
        for c in range(first, end):
            may |= not (65504 + fabs(job.coef_c[CBN_MEAN * C + c])) * fabs(scale[c]) < limit
    else:
        may = True
    return may


cdef inline void to_cache_lines(const Job *job, cbn_tile *t, bint first, bint last) noexcept nogil:
    """Let a tile of columns begin and end where cache lines of y do, so that no line is stored in parts.

    A line that two tiles share belongs to the later one: a tile takes the line that it shares with the tile before it,
    unless it is the `first` one, and leaves the line that it shares with the next, unless it is the `last` one.
    """
    cdef Py_ssize_t width = t.n_channels * t.length * job.y_itemsize, lead, channels, before
    if not t.nontemporal or t.copies > 1 or t.y.n * job.y_itemsize % CACHE_LINE:
        return
    lead = 0 if first else <Py_ssize_t>t.y.data % CACHE_LINE // job.y_itemsize
    channels = ceil_div(lead, t.length)
    t.drop = 0 if last else <Py_ssize_t>(t.y.data + width) % CACHE_LINE // job.y_itemsize
    t.skip = channels * t.length - lead
    t.n_channels += channels
    t.coef_c -= channels
    t.channel -= channels
    before = channels * t.length
    t.x.data -= before * job.itemsize
    t.g.data -= before * job.itemsize
    t.y.data -= before * job.y_itemsize
    if t.z.data != NULL:
        t.z.data -= before * job.y_itemsize


cdef inline void apply_tile(const Job *job, cbn_tile *t, bint rows) noexcept nogil:
    """Apply coefficients to a tile: all of it, or pieces of neighbouring channels that take the same arithmetic."""
    cdef Py_ssize_t first = t.coef_c - job.coef_c, c = first, end = first + t.n_channels, n
    cdef Py_ssize_t width = t.n_channels * t.length, C = job.reduction.C
    cdef bint in_float64
    cdef cbn_tile part
    if t.selection != NULL and t.selection.all and not job.backward:
        t.selection = NULL
    if job.in_float64 or job.fits or channels_fit(job, first, end):
        loop_of(job, job.loops_in_float64 if job.in_float64 else job.loops, rows)(t, NULL)
        return
    while c < end:
        in_float64 = takes_float64(job.coef_c, C, c, job.backward)
        n = 1
        while c + n < end and takes_float64(job.coef_c, C, c + n, job.backward) == in_float64:
            n += 1
        part = t[0]
        part.skip = part.drop = 0    # what is written twice gets the same bits
        part.n_channels = n
        part.coef_c += c - first
        part.channel += c - first
        part.copies = 1
        # A row of several copies is as many rows
        part.n_runs *= t.copies
        if t.copies > 1:
            part.x.n = part.g.n = part.y.n = part.z.n = width
        if rows:
            part.x.c = part.g.c = part.y.c = part.z.c = t.length
        if part.z.data != NULL:
            part.z.data += (c - first) * part.z.c * job.y_itemsize
        part.x.data += (c - first) * part.x.c * job.itemsize
        part.g.data += (c - first) * part.g.c * job.itemsize
        part.y.data += (c - first) * part.y.c * job.y_itemsize
        loop_of(job, job.loops_in_float64 if in_float64 else job.loops, rows)(&part, NULL)
        c += n
