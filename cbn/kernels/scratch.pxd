# Memory of one call: what the passes keep per channel, and the copies of the pipeline.
from .arrays cimport give_memory, take_memory
from .coefficients cimport BACKWARD_ROWS, solve_forward, takes_float64
from .engine cimport choose_stores, choose_tiles, copies_bytes, measure_and_apply, set_copies
from .job cimport Job
from .kernels cimport CBN_IN_FLOAT64
from .partition cimport n_partials


cdef inline Py_ssize_t scratch_doubles(const Job *job) noexcept nogil:
    """How many float64 values `divide_scratch` divides."""
    return job.reduction.C * (2 + BACKWARD_ROWS + job.partial_rows * n_partials(&job.reduction))


cdef inline void divide_scratch(Job *job, double *room_c) noexcept nogil:
    """Memory of a call that measures: (2 + BACKWARD_ROWS + partial_rows*partials, C)."""
    cdef Py_ssize_t C = job.reduction.C
    job.shift_c, job.sums_in_float64_c, job.coef_c = room_c, room_c + C, room_c + 2 * C
    job.partial = job.coef_c + BACKWARD_ROWS * C


cdef inline Py_ssize_t measure_doubles(const Job *job) noexcept nogil:
    """The same of a call that measures, and applies nothing."""
    return job.reduction.C * (2 + job.partial_rows * n_partials(&job.reduction))


cdef inline void divide_measure(Job *job, double *room_c) noexcept nogil:
    cdef Py_ssize_t C = job.reduction.C
    job.shift_c, job.sums_in_float64_c, job.partial = room_c, room_c + C, room_c + 2 * C


cdef inline void go_back_through(Job *job, double *forward_c) noexcept nogil:
    """Let the reduction multiply dy by the slope of the activation: it computes again what the activation was given."""
    cdef Py_ssize_t c, C = job.reduction.C
    job.forward_c = forward_c
    solve_forward(forward_c, C, 0, C, job.shift_c, job.invstd_c, job.weight_c, job.bias_c)
    for c in range(C):
        forward_c[CBN_IN_FLOAT64 * C + c] = job.in_float64 or takes_float64(forward_c, C, c, False)


cdef inline void measure_and_apply_with_memory(Job *job) noexcept nogil:
    """`measure_and_apply` with memory of the pool for the pipeline; where there is none, in two passes."""
    choose_stores(job)
    measure_and_apply_as_chosen(job)


cdef inline void measure_and_apply_as_chosen(Job *job) noexcept nogil:
    cdef char *memory = NULL
    choose_tiles(job, 2 if job.backward else 1)
    if copies_bytes(job):
        memory = take_memory(copies_bytes(job))
        set_copies(job, memory)
    measure_and_apply(job)
    give_memory(memory)
