# Job: all that one call of a pass is, in C. The engine runs it; passes.pyx and plans.pyx fill it in from arrays.
from libc.math cimport INFINITY

from .coefficients cimport all_fit
from .kernels cimport CBN_COUNT_ROWS, cbn_act, cbn_conversion, cbn_isa, cbn_loop, cbn_loops, cbn_selection, cbn_view
from .partition cimport Extents, Grid, rows_grid, runs_grid

cdef enum Element:    # what an array holds
    F32, F64, F16, BF16, U8, I8, U16, I16, I32

cdef struct Blend:              # statistics of the batch and running ones for solve, see coefficients.h
    double mix                  # the weight of the batch's; or batch renormalization, if r_max is not 0
    double r_max, d_max
    double *mean_c              # C, the running mean; then the mean that normalized, or d
    double *var_c               # C, the running variance; then r

cdef struct Job:
    const cbn_loops *loops               # arithmetic in the type of the elements; 16-bit ones in float32
    const cbn_loops *loops_in_float64    # for coefficients that float32 cannot hold
    bint in_float64             # every channel takes these
    bint backward               # reductions of dy and x, not of x alone
    bint nontemporal            # apply stores past the caches
    bint prefetch               # loops fetch what comes next
    bint alone                  # on the calling thread, which is one of a parallel region
    bint fused                  # reduction and apply go tile by tile, as a pipeline (before `choose_tiles`: may do so)
    Element element             # of x
    Py_ssize_t itemsize
    Py_ssize_t y_itemsize       # another one for 8-bit input
    Py_ssize_t n_bytes          # of one array, the larger one
    Grid reduction, apply
    cbn_view x, y, g            # y is dx in backward, g is dy
    cbn_view z                  # residual; data NULL: none
    cbn_view dh                 # backward, activated: dy times the slope of the activation
    bint keeps_dh               # whether somebody asks for it
    bint sum_in_float64         # which reduction this is, see kernels.h
    double *sums_in_float64_c   # whether the sums of a channel are float64 (bfloat16)
    bint activated              # what is normalized goes through act(. + z)
    cbn_act act
    double vanishing            # the largest number that the type of y takes for zero
    int threads                 # of the pipeline,
    char *copy                  # a copy of a tile for each of them,
    Py_ssize_t copy_bytes       # of this size
    Py_ssize_t copy_n, copy_c   # and with these strides
    bint copying                # apply reads the copy
    # Apply from and to other types than the arithmetic's, which `element` is
    cbn_conversion widen        # NULL: none
    cbn_conversion narrow
    Py_ssize_t x_itemsize
    double eps
    double *weight_c            # C, or NULL: ones
    double *bias_c              # C, or NULL: zeros
    double *shift_c             # what the reductions subtract: the mean of eight values, or of all; bfloat16: 0
    Py_ssize_t partial_rows     # 2, and CBN_COUNT_ROWS more of a reduction that counts
    double *partial             # (blocks*pieces, partial_rows, C)
    double *sum_c               # forward: S(d), then the mean; backward: S(dh)
    double *square_c            # forward: S(d*d), then m2; backward: S(dh*(x - mean))
    double *invstd_c            # forward: made, with coef_c; backward: given
    double *coef_c              # (FORWARD_ROWS or BACKWARD_ROWS, C)
    bint fits                   # whether all coefficients are known to fit, see `all_fit`
    double *forward_c           # backward, activated: (4, C), see kernels.h
    Blend *blend                # forward; NULL: the statistics of the batch normalize
    bint counts                 # not every value counts alike: count_c has what does
    const cbn_selection *selection    # in a pass that normalizes, what; NULL: all
    # In a forward reduction alone, if it counts
    bint skipna                 # NaN does not count
    cbn_view weights            # float64, contiguous along a run, and their sums are in count_c; data NULL: ones
    double *count_c             # C, what counts of each channel; NULL: N*S
    double *low_c               # C, the lower parts of the means; or NULL
    double *min_c               # C, or NULL
    double *max_c


cdef inline double count(const Job *job) noexcept nogil:
    """Values of a channel."""
    return <double>(job.reduction.N * job.reduction.S)


cdef inline bint counts_rows(const Job *job) noexcept nogil:
    """Whether the reduction is that of loops/counted.h, with more partial sums."""
    return job.counts and job.partial_rows > 2


cdef inline bint is_identity(cbn_act act) noexcept nogil:
    return act.slope == 1 and act.low == -INFINITY and act.high == INFINITY


cdef inline bint is_integer(const Job *job) noexcept nogil:
    return job.element >= U8


cdef inline bint channels_fit(const Job *job, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    return all_fit(job.coef_c, job.reduction.C, first, end, job.backward, job.itemsize)


cdef inline const cbn_loops *sums_of(const cbn_isa *isa, Element integer) noexcept nogil:
    """The loops that reduce integers."""
    if integer == U8 or integer == I8:
        return isa.sums_u8 if integer == U8 else isa.sums_i8
    if integer == U16 or integer == I16:
        return isa.sums_u16 if integer == U16 else isa.sums_i16
    return isa.sums_i32


cdef inline cbn_loop loop_of(const Job *job, const cbn_loops *loops, bint rows) noexcept nogil:
    if job.backward:
        return loops.backward_rows if rows else loops.backward_runs
    return loops.forward_rows if rows else loops.forward_runs


# ---- parts of a job ----

cdef inline double vanishing(Element element) noexcept nogil:
    """The largest value that rounds to zero in a 16-bit type, half of its smallest one; 0 for the others."""
    if element == F16:
        return 2.0 ** -25
    return 2.0 ** -134 if element == BF16 else 0


cdef inline void set_count(Job *job, bint skipna, cbn_view weights) noexcept nogil:
    """Let a forward reduction of floats count. It needs a count_c, with the sums of the weights if there are any."""
    job.counts, job.skipna, job.weights = True, skipna, weights
    job.partial_rows = 2 + CBN_COUNT_ROWS


cdef inline void set_selection(Job *job, const Extents *e, const cbn_selection *selection,
                               double *count_c) noexcept nogil:
    """Let a pass that normalizes, forward unless `job.backward`, leave out what does not count.

    count_c has the sums of the weights of what does. No rows are joined, nor short runs of neighbouring channels: a
    selection is of the runs, or rows, of the array. Rows have weights in any case.
    """
    job.counts, job.selection, job.count_c = True, selection, count_c
    job.reduction = rows_grid(e, job.itemsize, False) if e.rows else runs_grid(e, True)
    if e.rows and not job.backward:
        job.weights.data, job.weights.n, job.weights.c = <char *>selection.weight_n, 1, 0
        job.partial_rows = 2 + CBN_COUNT_ROWS


cdef inline void set_epilogue(Job *job, cbn_view z, cbn_act act) noexcept nogil:
    """Let act(. + z) follow the normalization; z.data may be NULL."""
    job.activated = z.data != NULL or not is_identity(act)
    job.act = act
    job.z = z
