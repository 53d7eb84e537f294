# coefficients.h for Cython: solve, and whether float32 arithmetic does.
cdef extern from "coefficients.h" nogil:
    enum:
        FORWARD_ROWS "CBN_FORWARD_ROWS"
        REREAD_ROWS "CBN_REREAD_ROWS"
        BACKWARD_ROWS "CBN_BACKWARD_ROWS"
    const double CBN_SMALL_FLOAT, CBN_SMALL_DOUBLE
    void inverse_std "cbn_inverse_std"(double *invstd, const double *m2, double n, double eps, Py_ssize_t first,
                                       Py_ssize_t end)
    void solve_forward "cbn_solve_forward"(double *coef, Py_ssize_t C, Py_ssize_t first, Py_ssize_t end,
                                           const double *mean, const double *invstd, const double *weight,
                                           const double *bias)
    void solve_backward "cbn_solve_backward"(double *coef, Py_ssize_t C, Py_ssize_t first, Py_ssize_t end,
                                             const double *mean, const double *invstd, const double *weight,
                                             const double *sum_dh, const double *sum_dh_xmu, double n)
    void solve_standard "cbn_solve_standard"(double *coef, Py_ssize_t C, const double *mean, const double *var,
                                             double eps, bint outside, bint zero_is_one)
    void mix_running "cbn_mix"(double *running_mean, double *running_var, const double *mean, const double *m2,
                               double n, double a, Py_ssize_t first, Py_ssize_t end)
    void renorm "cbn_renorm"(double *weight, double *bias, double *running_var, double *running_mean,
                             const double *mean, const double *invstd, double eps, double r_max, double d_max,
                             Py_ssize_t first, Py_ssize_t end)
    bint takes_float64 "cbn_takes_float64"(const double *coef, Py_ssize_t C, Py_ssize_t c, bint backward)
    bint all_fit "cbn_all_fit"(const double *coef, Py_ssize_t C, Py_ssize_t first, Py_ssize_t end, bint backward,
                               Py_ssize_t itemsize)
    double finite "cbn_finite"(double a)
    void solve_tangent "cbn_solve_tangent"(double *coef, Py_ssize_t C, Py_ssize_t first, Py_ssize_t end,
                                           const double *mean, const double *invstd, const double *weight,
                                           const double *weight_t, const double *bias_t, const double *sums,
                                           const double *shifts, double n)
    void solve_second "cbn_solve_second"(double *coef, double *dweight, Py_ssize_t C, Py_ssize_t first, Py_ssize_t end,
                                         const double *invstd, const double *weight, const double *ggG,
                                         const double *sums, const double *shifts, double n)
