# The engine's C side: fill in a Job, then run it without the GIL.
from .job cimport Element, Job
from .kernels cimport cbn_isa, cbn_view
from .partition cimport Extents

cdef enum:
    SMALL = 1 << 14       # bytes of an array: below, releasing the GIL costs more than `apply_here` takes

cdef const cbn_isa *active    # the instruction set in use
cdef Py_ssize_t generation    # counts the changes of instruction set and knobs: what jobs were made with

# The items begin to end of a job, by a thread
ctypedef void (*Work)(Job *job, Py_ssize_t begin, Py_ssize_t end, int thread) noexcept nogil

cdef int threads_for(Py_ssize_t n_bytes, Py_ssize_t items) noexcept nogil
cdef void run(Work work, Job *job, Py_ssize_t items, int threads) noexcept nogil
cdef Job make_job(const Extents *e, cbn_view x, Element element, Py_ssize_t itemsize, bint in_float64) noexcept nogil
cdef void set_coefficients(Job *job, double *coef_c) noexcept nogil
cdef void set_output(Job *job, const Extents *e, cbn_view y, Py_ssize_t itemsize) noexcept nogil
cdef void set_conversion(Job *job, const Extents *e, cbn_view y, Element element, Py_ssize_t itemsize) noexcept nogil
cdef void choose_stores(Job *job) noexcept nogil
cdef void choose_tiles(Job *job, int arrays) noexcept nogil
cdef Py_ssize_t copies_bytes(const Job *job) noexcept nogil
cdef void set_copies(Job *job, char *memory) noexcept nogil
cdef void measure(Job *job) noexcept nogil
cdef void apply(Job *job) noexcept nogil
cdef void apply_here(Job *job) noexcept nogil
cdef void measure_and_apply(Job *job) noexcept nogil
cdef void set_memory_release(size_t (*release)() noexcept nogil) noexcept


cdef inline void choose_and_apply(Job *job) noexcept:
    """One pass with the stores that pay; a small array keeps the GIL and its thread."""
    choose_stores(job)
    if job.n_bytes < SMALL:
        apply_here(job)
    else:
        with nogil:
            apply(job)
