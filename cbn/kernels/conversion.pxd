# Apply from and to other types than the arithmetic's: some elements at a time, by way of a buffer that stays in L1. So
# memory is read once and written once, and there need not be a loop for every pair of types.
from .job cimport F16, F32, F64, I32, Element, Job, is_integer
from .kernels cimport cbn_conversion, cbn_isa, cbn_tile, cbn_view
from .partition cimport Extents, Rectangle, rows_grid, runs_grid
from .tiles cimport apply_tile, tile_of

cdef enum:
    CONVERTED = 4096           # float64 values that are converted at once: they stay in L1
    CONVERTED_COLUMNS = 256


cdef inline cbn_conversion widening(const Job *job, const cbn_isa *isa, bint wide) noexcept nogil:
    if is_integer(job):
        return job.loops.widen_f64 if wide else job.loops.widen
    if job.element == F64:
        return isa.f64.widen
    return job.loops_in_float64.widen if wide else job.loops.widen


cdef inline cbn_conversion narrowing(const cbn_isa *isa, Element y, bint wide) noexcept nogil:
    if y == F64:
        return isa.f64.narrow
    if y == F32:
        return isa.f32_in_f64.narrow if wide else isa.f32.narrow
    if y == F16:
        return isa.f16_in_f64.narrow if wide else isa.f16.narrow
    return isa.bf16_in_f64.narrow if wide else isa.bf16.narrow


cdef inline void convert_with(Job *job, const cbn_isa *isa, const Extents *e, cbn_view y, Element y_element,
                              Py_ssize_t y_itemsize) noexcept nogil:
    """Let `apply` write y, of another type than x, with float32 arithmetic if that holds both, else float64's."""
    cdef bint wide = job.in_float64 or y_element == F64 or job.element == F64 or job.element == I32
    job.widen = widening(job, isa, wide)
    job.narrow = narrowing(isa, y_element, wide)
    job.x_itemsize, job.y_itemsize, job.y = job.itemsize, y_itemsize, y
    job.n_bytes = e.C * e.N * e.S * max(job.x_itemsize, y_itemsize)
    job.element, job.itemsize, job.in_float64 = F64 if wide else F32, 8 if wide else 4, wide
    job.loops = isa.f64 if wide else isa.f32
    job.loops_in_float64 = isa.f64 if wide else isa.f32_in_f64
    job.apply = rows_grid(e, job.itemsize, False) if e.rows else runs_grid(e, False)
    job.nontemporal = job.prefetch = False


cdef inline void convert_some(cbn_conversion convert, const char *source, Py_ssize_t source_step, char *to,
                              Py_ssize_t to_step, Py_ssize_t runs, Py_ssize_t length, bint joined) noexcept nogil:
    """Runs or rows, at once if they are `joined`, one behind the other on both sides."""
    cdef Py_ssize_t k
    if joined:
        convert(source, to, runs * length)
        return
    for k in range(runs):
        convert(source + k * source_step, to + k * to_step, length)


cdef inline void convert_rows(Job *job, const Rectangle *r) noexcept nogil:
    """As many rows at once as the buffer holds of some columns: the loops set up factors for each column each time."""
    cdef double buffer[CONVERTED]
    cdef Py_ssize_t c = r.c, n, rows, columns, most, last = r.c + r.n_channels, end = r.n + r.n_runs
    cdef cbn_tile t = tile_of(job, r)
    t.x.data, t.x.c = <char *>buffer, 1
    while c < last:
        columns = t.n_channels = t.x.n = min(CONVERTED_COLUMNS, last - c)
        t.y = t.g = t.x
        t.coef_c = job.coef_c + c
        most = CONVERTED * <Py_ssize_t>sizeof(double) // (columns * job.itemsize)
        n = r.n
        while n < end:
            rows = t.n_runs = min(most, end - n)
            convert_some(job.widen, job.x.data + (n * job.x.n + c) * job.x_itemsize, job.x.n * job.x_itemsize,
                         <char *>buffer, columns * job.itemsize, rows, columns, job.x.n == columns)
            apply_tile(job, &t, True)
            convert_some(job.narrow, <char *>buffer, columns * job.itemsize,
                         job.y.data + (n * job.y.n + c) * job.y_itemsize, job.y.n * job.y_itemsize, rows, columns,
                         job.y.n == columns)
            n += rows
        c += columns


cdef inline void convert_runs(Job *job, const Rectangle *r) noexcept nogil:
    """As many runs at once as the buffer holds, or a part of one."""
    cdef double buffer[CONVERTED]
    cdef Py_ssize_t n, c, s, runs, length, room = CONVERTED * <Py_ssize_t>sizeof(double) // job.itemsize
    cdef Py_ssize_t last = r.c + r.n_channels, end = r.s + r.length
    cdef Py_ssize_t most = max(1, room // r.length), at_once = min(room, r.length)
    cdef cbn_tile t = tile_of(job, r)
    t.n_runs = 1
    for n in range(r.n, r.n + r.n_runs):
        c = r.c
        while c < last:
            runs = t.n_channels = min(most, last - c)
            t.coef_c = job.coef_c + c
            s = r.s
            while s < end:
                length = t.length = min(at_once, end - s)
                t.x.data, t.x.n, t.x.c = <char *>buffer, 0, length
                t.y = t.g = t.x
                convert_some(job.widen, job.x.data + (c * job.x.c + n * job.x.n + s) * job.x_itemsize,
                             job.x.c * job.x_itemsize, <char *>buffer, length * job.itemsize, runs, length,
                             job.x.c == length)
                apply_tile(job, &t, False)
                convert_some(job.narrow, <char *>buffer, length * job.itemsize,
                             job.y.data + (c * job.y.c + n * job.y.n + s) * job.y_itemsize, job.y.c * job.y_itemsize,
                             runs, length, job.y.c == length)
                s += length
            c += runs
