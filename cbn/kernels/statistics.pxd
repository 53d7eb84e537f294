# Measure and merge: what a reduction subtracts, how its partial sums become the statistics of a channel, and which
# channels have to be reduced again. A channel's own data decides all of it, so the bits of a channel depend on no other
# channel and on no number of threads.
from libc.math cimport NAN, isfinite, isnan
from libc.stdint cimport uint16_t
from libc.string cimport memcpy

from .coefficients cimport finite, inverse_std, mix_running, renorm, solve_backward, solve_forward
from .job cimport BF16, F16, F32, F64, Blend, Job, count, counts_rows, is_integer
from .kernels cimport CBN_COUNT, CBN_MAX, CBN_MIN, cbn_selection
from .partition cimport n_partials

cdef extern from "half.h" nogil:
    float cbn_from_f16(uint16_t e)
    float cbn_from_bf16(uint16_t e)
    uint16_t cbn_to_f16(float a)
    uint16_t cbn_to_bf16(float a)
    float cbn_with_digits_of_f16(float a)
    float cbn_finite_f16(uint16_t e)

cdef extern from "statistics.h" nogil:
    void cbn_means_of_eight(double *mean, const float *const *x, Py_ssize_t first, Py_ssize_t end)
    void cbn_add(double *to, const double *other, Py_ssize_t first, Py_ssize_t end)
    void cbn_moments_of_sums(double *sum, double *square, const double *shift, double n, Py_ssize_t first,
                             Py_ssize_t end)
    void cbn_lower_parts(double *low, const double *sum, const double *shift, double n, Py_ssize_t first,
                         Py_ssize_t end)
    void cbn_merge_moments(double *count_a, double *mean_a, double *low_a, double *m2_a, const double *count_b,
                           const double *mean_b, const double *low_b, const double *m2_b, Py_ssize_t first,
                           Py_ssize_t end)
    void cbn_add_slice(double *sum, double *square, double *m2_sum, const double *reference, const double *mean,
                       const double *m2, Py_ssize_t first, Py_ssize_t end)
    void cbn_moments_of_slices(double *sum, double *square, double *m2_sum, const double *reference, double n,
                               double size, Py_ssize_t first, Py_ssize_t end)
    void cbn_add_products(double *to, const double *a, const double *b, Py_ssize_t first, Py_ssize_t end)
    void cbn_take_smallest(double *to, const double *other, Py_ssize_t first, Py_ssize_t end)
    void cbn_take_largest(double *to, const double *other, Py_ssize_t first, Py_ssize_t end)
    void cbn_take_smaller(double *to, const double *other, Py_ssize_t first, Py_ssize_t end)
    void cbn_take_larger(double *to, const double *other, Py_ssize_t first, Py_ssize_t end)
    void cbn_merge_integers(double *to, const double *other, Py_ssize_t pitch, Py_ssize_t first, Py_ssize_t end)
    void cbn_moments_of_integers(double *mean, double *low, double *m2, double *least, double *largest,
                                 const double *sums,
                                 Py_ssize_t pitch, Py_ssize_t n, const double *count, Py_ssize_t first, Py_ssize_t end)
    bint cbn_some_far(const double *mean, const double *m2, const double *shift, double n, double times,
                      Py_ssize_t first, Py_ssize_t end)

cdef extern from *:
    """
    #define cbn_fetch(p) __builtin_prefetch(p)
    """
    void cbn_fetch(const void *p) nogil

cdef extern from *:
    """
    #define CBN_NO_OVERFLOW 1e290   /* no sum of smaller values overflows */
    """
    const double NO_OVERFLOW "CBN_NO_OVERFLOW"

cdef enum:
    SAMPLES = 8
    ENOUGH_SAMPLES = 4    # of a channel of which not every value counts; else there are
    MORE_SAMPLES = 40
    MANY_VALUES = 1024    # of a channel of bfloat16: from here on the rounding of float32 sums averages out

cdef enum:    # reductions that are still to be done
    IN_OWN_TYPE = 1         # of the channels that are not marked for float64 sums
    IN_FLOAT64 = 2    # and of those that are


cdef inline double shift_for_loops(const Job *job, double shift) noexcept nogil:
    """A shift as the loops have it: of 16-bit elements a float32, for float16 with no more digits than its own numbers.

    Then most differences from it and their squares are exact. It is at most std further from the mean, since values on
    both sides of it are no nearer to each other. With a selection it is an element, for that reason too: it takes the
    place of those that do not count.
    """
    if job.selection != NULL and job.element != F64:
        if job.element == F32:
            return <float>shift
        return cbn_from_f16(cbn_to_f16(<float>shift)) if job.element == F16 \
            else cbn_from_bf16(cbn_to_bf16(<float>shift))
    if job.itemsize == 2:
        return cbn_with_digits_of_f16(<float>shift) if job.element == F16 else <float>shift
    return shift


cdef inline Py_ssize_t position(const Job *job, Py_ssize_t k) noexcept nogil:
    """Which value of a channel is sample k: pairs of neighbours, mostly in one cache line."""
    cdef Py_ssize_t n = job.reduction.N * job.reduction.S
    return ((k | 1) * n // SAMPLES + (k & 1)) % n


cdef inline Py_ssize_t sample(Job *job, Py_ssize_t k) noexcept nogil:
    """Where that is, in elements from a channel's first one."""
    cdef Py_ssize_t i = position(job, k)
    return i // job.reduction.S * job.x.n + i % job.reduction.S


cdef inline void fetch_samples(Job *job, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    """Ahead of time: each is in another page, and nothing else goes on while `choose_shifts` waits for them."""
    cdef Py_ssize_t c, k, at
    for k in range(0, SAMPLES, 2):
        at = sample(job, k)
        for c in range(first, end):
            cbn_fetch(job.x.data + (at + c * job.x.c) * job.itemsize)


cdef inline double value_at(const Job *job, Py_ssize_t i) noexcept nogil:
    """Element i of x, a float."""
    if job.element == F32:
        return (<float *>job.x.data)[i]
    if job.element == F64:
        return (<double *>job.x.data)[i]
    if job.element == F16:
        return cbn_from_f16((<uint16_t *>job.x.data)[i])
    return cbn_from_bf16((<uint16_t *>job.x.data)[i])


cdef inline bint is_selected(const cbn_selection *s, Py_ssize_t n, Py_ssize_t c, Py_ssize_t i) noexcept nogil:
    """Whether element i of run n of a channel counts."""
    if s.weight_n != NULL and s.weight_n[n] == 0:
        return False
    if s.length_n != NULL and i >= s.length_n[n]:
        return False
    return s.mask.data == NULL or s.mask.data[n * s.mask.n + c * s.mask.c + i] != 0


cdef inline double shift_of(const Job *job, Py_ssize_t c) noexcept nogil:
    """A shift for a channel of which not every value counts: from those of the samples that do.

    It is that of `choose_shifts` if all of them do. If few do, there are more samples.
    """
    cdef Py_ssize_t k, at, found = 0, n = job.reduction.N * job.reduction.S
    cdef double v, first = 0, sum_of_differences = 0
    cdef double values[SAMPLES]
    cdef double *w = <double *>job.weights.data
    for k in range(MORE_SAMPLES):
        if k == SAMPLES and found == SAMPLES:
            return pairwise_mean(values, first)
        if k >= SAMPLES and found >= ENOUGH_SAMPLES:
            break
        at = position(job, k) if k < SAMPLES else (2 * k + 1) * n // (2 * MORE_SAMPLES)
        if job.selection != NULL and not is_selected(job.selection, at // job.reduction.S, c, at % job.reduction.S):
            continue
        if w != NULL and w[at // job.reduction.S * job.weights.n + at % job.reduction.S + c * job.weights.c] == 0:
            continue
        v = value_at(job, at // job.reduction.S * job.x.n + at % job.reduction.S + c * job.x.c)
        if not isfinite(v):
            continue
        if found == 0:
            first = v
        if k < SAMPLES:
            values[k] = v
        sum_of_differences += v - first
        found += 1
    return finite(first + sum_of_differences / max(found, 1))


cdef inline double pairwise_mean(const double *x, double otherwise) noexcept nogil:
    cdef double mean = ((x[0] + x[1]) + (x[2] + x[3]) + ((x[4] + x[5]) + (x[6] + x[7]))) / SAMPLES
    return mean if isfinite(mean) else otherwise


cdef inline void choose_shifts(Job *job, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    """The shifts of some channels: the mean of a few values from all over each.

    So it is near the mean of all, and exactly the value of a constant channel. Zero for bfloat16. Where a value is not
    finite, the first one, or zero; float16 counts such values as zero.
    """
    cdef Py_ssize_t c, k
    cdef Py_ssize_t at[SAMPLES]
    cdef double *x8
    cdef float *x4
    cdef uint16_t *x2
    cdef const float *rows[SAMPLES]
    for k in range(SAMPLES):
        at[k] = sample(job, k)
    for c in range(first, end):
        job.sums_in_float64_c[c] = False
    # In pairs: of equal values 2x, 4x and 8x are exact, 3x is not
    if job.itemsize == 8:
        for c in range(first, end):
            x8 = <double *>job.x.data + c * job.x.c
            job.shift_c[c] = ((x8[at[0]] + x8[at[1]]) + (x8[at[2]] + x8[at[3]])
                              + ((x8[at[4]] + x8[at[5]]) + (x8[at[6]] + x8[at[7]]))) / SAMPLES
            if not isfinite(job.shift_c[c]):
                job.shift_c[c] = shift_of(job, c) if job.counts else finite(x8[at[0]])
    elif job.itemsize == 4 and job.x.c == 1:
        for k in range(SAMPLES):
            rows[k] = <float *>job.x.data + at[k]
        cbn_means_of_eight(job.shift_c, rows, first, end)
        for c in range(first, end):
            if not isfinite(job.shift_c[c]):
                job.shift_c[c] = shift_of(job, c) if job.counts else finite(rows[0][c])
    elif job.itemsize == 4:
        for c in range(first, end):
            x4 = <float *>job.x.data + c * job.x.c
            job.shift_c[c] = ((<double>x4[at[0]] + x4[at[1]]) + (<double>x4[at[2]] + x4[at[3]])
                              + ((<double>x4[at[4]] + x4[at[5]]) + (<double>x4[at[6]] + x4[at[7]]))) / SAMPLES
            if not isfinite(job.shift_c[c]):
                job.shift_c[c] = shift_of(job, c) if job.counts else finite(x4[at[0]])
    elif job.element == F16:
        for c in range(first, end):
            x2 = <uint16_t *>job.x.data + c * job.x.c
            job.shift_c[c] = cbn_with_digits_of_f16((
                (cbn_finite_f16(x2[at[0]]) + cbn_finite_f16(x2[at[1]]))
                + (cbn_finite_f16(x2[at[2]]) + cbn_finite_f16(x2[at[3]]))
                + ((cbn_finite_f16(x2[at[4]]) + cbn_finite_f16(x2[at[5]]))
                   + (cbn_finite_f16(x2[at[6]]) + cbn_finite_f16(x2[at[7]])))) / SAMPLES)
    else:
        for c in range(first, end):
            job.shift_c[c] = 0    # the loops add up x itself


cdef inline void choose_counted_shifts(Job *job, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    """`choose_shifts` where not every value counts alike."""
    cdef Py_ssize_t c
    if job.weights.data == NULL and job.selection == NULL and job.itemsize > 2:
        choose_shifts(job, first, end)
        return
    for c in range(first, end):
        job.sums_in_float64_c[c] = job.itemsize == 2
        job.shift_c[c] = shift_for_loops(job, shift_of(job, c))


cdef inline void merge_two(Job *job, double *to, double *other, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    cdef Py_ssize_t C = job.reduction.C
    if is_integer(job):
        cbn_merge_integers(to, other, C, first, end)
        return
    cbn_add(to, other, first, end)
    cbn_add(to + C, other + C, first, end)
    if counts_rows(job):
        to, other = to + 2 * C, other + 2 * C
        cbn_add(to + CBN_COUNT * C, other + CBN_COUNT * C, first, end)
        cbn_take_smaller(to + CBN_MIN * C, other + CBN_MIN * C, first, end)
        cbn_take_larger(to + CBN_MAX * C, other + CBN_MAX * C, first, end)


cdef inline bint has_nan(const Job *job, double least, double largest, Py_ssize_t c) noexcept nogil:
    """Whether there is a NaN in a channel whose sum is NaN, and not just infinities or an overflow of both signs."""
    cdef Py_ssize_t i
    if least > -NO_OVERFLOW and largest < NO_OVERFLOW:
        return True
    for i in range(job.reduction.N * job.reduction.S):
        if isnan(value_at(job, i // job.reduction.S * job.x.n + i % job.reduction.S + c * job.x.c)):
            return True
    return False


cdef inline void take_counts(Job *job, const double *sums, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    """How much counts of some channels, and the extremes of that: NaN where there is one, unless it is missing."""
    cdef Py_ssize_t c, C = job.reduction.C
    cdef const double *counted = sums + 2 * C
    cdef bint is_nan
    for c in range(first, end):
        if job.skipna:
            job.count_c[c] = counted[CBN_COUNT * C + c]
        if job.min_c != NULL:
            is_nan = False
            if not job.skipna and job.weights.data != NULL:
                is_nan = counted[CBN_COUNT * C + c] > 0
            elif not job.skipna and isnan(sums[c]):
                is_nan = has_nan(job, counted[CBN_MIN * C + c], counted[CBN_MAX * C + c], c)
            job.min_c[c] = NAN if is_nan else counted[CBN_MIN * C + c]
            job.max_c[c] = NAN if is_nan else counted[CBN_MAX * C + c]


cdef inline void merge_partials(Job *job, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    """Merge the partial sums of some channels, in an order that their number alone decides.

    Takes only the channels of this pass: those marked for float64 if `job.sum_in_float64`, the others if not.
    """
    cdef Py_ssize_t c, k, half, blocks = n_partials(&job.reduction)
    cdef Py_ssize_t C = job.reduction.C, all_rows = job.partial_rows * C
    cdef double *sums = job.partial
    while blocks > 1:    # one half to the other: so that each has few additions
        half = (blocks + 1) // 2
        for k in range(blocks - half):
            merge_two(job, sums + all_rows * k, sums + all_rows * (k + half), first, end)
        blocks = half
    if is_integer(job):
        cbn_moments_of_integers(job.sum_c, job.low_c, job.square_c, job.min_c, job.max_c, sums, C,
                                job.reduction.N * job.reduction.S, job.count_c, first, end)
        return
    if counts_rows(job):
        take_counts(job, sums, first, end)
    if job.backward or job.element != BF16:
        memcpy(job.sum_c + first, sums + first, (end - first) * sizeof(double))
        memcpy(job.square_c + first, sums + C + first, (end - first) * sizeof(double))
        return
    for c in range(first, end):
        if job.sums_in_float64_c[c] == job.sum_in_float64:
            job.sum_c[c], job.square_c[c] = sums[c], sums[C + c]


cdef inline void make_moments(Job *job, double n, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    if job.low_c != NULL:
        cbn_lower_parts(job.low_c, job.sum_c, job.shift_c, n, first, end)
    cbn_moments_of_sums(job.sum_c, job.square_c, job.shift_c, n, first, end)


cdef inline bint moments_from_sums(Job *job, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    """Make mean and m2 of what `merge_partials` took, in the place of the sums.

    Returns whether some channels are now marked for float64 sums: bfloat16 ones that may have left float32's range.
    """
    cdef bint left = False
    cdef Py_ssize_t c
    if job.counts:
        for c in range(first, end):
            if job.count_c[c] > 0:
                make_moments(job, job.count_c[c], c, c + 1)
            else:
                job.sum_c[c] = job.square_c[c] = 0
                if job.low_c != NULL:
                    job.low_c[c] = 0
        return False
    if job.element != BF16:
        make_moments(job, count(job), first, end)
        return False
    for c in range(first, end):
        if job.sums_in_float64_c[c] != job.sum_in_float64:
            continue
        # All squares of float16 are within that range; of bfloat16 those of a channel that is constant, or seems to be
        # because they are too small, are looked at again
        if not job.sum_in_float64 and not 1e-20 <= job.square_c[c] < 1e300:
            job.sums_in_float64_c[c] = left = True
        make_moments(job, count(job), c, c + 1)
    return left


cdef inline void solve(Job *job, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    """Make the coefficients of some channels from their statistics: moments, or backward the sums of gradients."""
    cdef Py_ssize_t c, C = job.reduction.C
    if job.backward:
        if job.counts:
            for c in range(first, end):
                solve_backward(job.coef_c, C, c, c + 1, job.shift_c, job.invstd_c, job.weight_c, job.sum_c,
                               job.square_c, job.count_c[c])
        else:
            solve_backward(job.coef_c, C, first, end, job.shift_c, job.invstd_c, job.weight_c, job.sum_c,
                           job.square_c, count(job))
    else:
        if job.counts:
            for c in range(first, end):
                inverse_std(job.invstd_c, job.square_c, job.count_c[c], job.eps, c, c + 1)
        else:
            inverse_std(job.invstd_c, job.square_c, count(job), job.eps, first, end)
        if job.blend != NULL:
            solve_blend(job, first, end)
        else:
            solve_forward(job.coef_c, C, first, end, job.sum_c, job.invstd_c, job.weight_c, job.bias_c)


cdef inline void solve_blend(Job *job, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    """The same from the statistics of the batch and the running ones."""
    cdef Blend *b = job.blend
    cdef Py_ssize_t c
    cdef double *mean_c = job.sum_c
    if b.r_max != 0:
        renorm(job.weight_c, job.bias_c, b.var_c, b.mean_c, job.sum_c, job.invstd_c, job.eps, b.r_max, b.d_max, first,
               end)
    else:
        if job.counts:
            for c in range(first, end):
                mix_running(b.mean_c, b.var_c, job.sum_c, job.square_c, job.count_c[c], b.mix, c, c + 1)
        else:
            mix_running(b.mean_c, b.var_c, job.sum_c, job.square_c, count(job), b.mix, first, end)
        inverse_std(job.invstd_c, b.var_c, 1, job.eps, first, end)
        mean_c = b.mean_c
    solve_forward(job.coef_c, job.reduction.C, first, end, mean_c, job.invstd_c, job.weight_c, job.bias_c)


cdef inline int channels_to_redo(Job *job, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    """Find the channels in which m2 = S(d*d) - S(d)^2/n has lost digits to cancellation, and give them a better shift.

    The test is the distance of the shift from the mean: more than 2*std; for float64 elements, whose sums have no
    digits to spare, more than 1.4*std, which 6e-5 of channels with normal values exceed.

    bfloat16 has no shift. Its sums are as good as exact where the mean is large beside the spread (loops/runs.h), up to
    2^15*std, where float64 loses digits, as if a few of millions of values differ. Where the mean is not large, float32
    loses some; the rounding of many values averages out.

    The new shift is the mean, for a second reduction (of bfloat16 in float64). The other channels keep what they have:
    the second reduction finds the same values for them.
    """
    cdef Py_ssize_t c
    cdef double n = count(job), d, shift, times = 2 if job.itemsize == 8 else 4
    cdef int lost = 0
    cdef bint bfloat16 = job.element == BF16, far
    if not bfloat16 and not job.counts and not cbn_some_far(job.sum_c, job.square_c, job.shift_c, n, times, first, end):
        return 0
    for c in range(first, end):
        if job.counts:
            n = job.count_c[c]
        d = job.sum_c[c] - job.shift_c[c]
        d *= n * d    # n*(mean - shift)^2 = m2*R, R = ((mean - shift)/std)^2
        if bfloat16 and not job.sums_in_float64_c[c]:
            far = d > 1073741824.0 * job.square_c[c] or (
                n < MANY_VALUES and d > job.square_c[c] and d < 64 * job.square_c[c])
        else:
            far = d > times * job.square_c[c]
        if not far or not isfinite(job.sum_c[c]):
            continue
        shift = shift_for_loops(job, job.sum_c[c])
        if shift != job.shift_c[c]:    # else nothing would change
            job.shift_c[c] = shift
            job.sums_in_float64_c[c] = job.sums_in_float64_c[c] or bfloat16
            lost |= IN_FLOAT64 if job.sums_in_float64_c[c] else IN_OWN_TYPE
    return lost


cdef inline int merge(Job *job, int todo, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    """Make moments (backward: sums) of some channels that were reduced; returns the reductions that are left."""
    cdef int left
    merge_partials(job, first, end)
    if job.backward or is_integer(job):
        return 0
    left = IN_FLOAT64 * moments_from_sums(job, first, end) | (todo & IN_FLOAT64 if todo & IN_OWN_TYPE else 0)
    return left if left else channels_to_redo(job, first, end)
