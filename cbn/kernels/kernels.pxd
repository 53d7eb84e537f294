# kernels.h for Cython; the header says what everything means.

cdef extern from "kernels.h" nogil:
    enum: CBN_ROW_BYTES
    enum: CBN_COUNT, CBN_MIN, CBN_MAX, CBN_COUNT_ROWS
    enum: CBN_MEAN, CBN_SCALE, CBN_OFFSET, CBN_IN_FLOAT64, CBN_GRAD_MEAN, CBN_SLOPE
    enum: CBN_SUM_G, CBN_SUM_Z, CBN_SUM_GZ, CBN_SUM_GD, CBN_SUM_ZD, CBN_SECOND_SUMS
    enum: CBN_SHIFT_MEAN, CBN_SHIFT_G, CBN_SHIFT_Z, CBN_SECOND_SHIFTS
    enum: CBN_2_ROWS
    ctypedef struct cbn_view:
        char *data
        Py_ssize_t n, c
    ctypedef struct cbn_act:
        double slope, low, high
    ctypedef struct cbn_selection:
        cbn_view mask
        const Py_ssize_t *length_n
        const double *weight_n
        bint all
    ctypedef struct cbn_tile:
        cbn_view x, g, z, y
        bint activated, checked
        cbn_act act
        double vanishing
        Py_ssize_t n_runs, n_channels, length, copies, skip, drop
        const double *coef_c
        const double *forward_c
        Py_ssize_t pitch
        bint nontemporal, prefetch, sum_in_float64
        const double *shift_c
        double *sum_c
        double *square_c
        double *count_c
        cbn_view w
        bint skipna, extremes
        const cbn_selection *selection
        Py_ssize_t run, channel, element
        cbn_view x_copy, dh
    ctypedef void (*cbn_loop)(const cbn_tile *apply, const cbn_tile *reduction) noexcept nogil
    ctypedef struct cbn_solve:
        const double *weight_c
        const double *bias_c
        double *invstd_c
        double eps
        Py_ssize_t next
    ctypedef bint (*cbn_at_once)(const cbn_tile *apply, const cbn_tile *reduction,
                                 const cbn_solve *solve) noexcept nogil
    ctypedef void (*cbn_conversion)(const void *source, void *to, Py_ssize_t n) noexcept nogil
    ctypedef struct cbn_loops:
        cbn_loop forward_runs, forward_rows, backward_runs, backward_rows
        cbn_loop second_runs, second_rows
        cbn_at_once forward_at_once, backward_at_once
        cbn_conversion widen, widen_f64, narrow
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
        const cbn_loops *sums_u8
        const cbn_loops *sums_i8
        const cbn_loops *sums_u16
        const cbn_loops *sums_i16
        const cbn_loops *sums_i32
    const cbn_isa *cbn_built[]
    int cbn_highest()
