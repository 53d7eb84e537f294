/* kernels.h: the table of loops that the passes call. It declares; it computes nothing.
 *
 * One grammar names every loop:  <pass>_<layout>_<type>_<isa>
 *
 *   pass    moments        per channel: S(d), S(d*d), d = x - shift            training forward, cbn.moments
 *           apply          y = (x - mean)*scale + offset                       training and eval forward
 *           grad_moments   per channel: S(g), S(g*d), d = x - mean             backward
 *           grad_apply     dx = (g - gmean - (x - mean)*slope)*scale           backward through batch statistics
 *   layout  first          N runs of S contiguous elements, all of one channel
 *           last           N rows of at most CBN_COLUMNS contiguous elements, one of each channel
 *   type    f32  f64       elements and arithmetic alike
 *           f32_wide       float32 elements, float64 arithmetic
 *   isa     baseline  avx2  avx512
 *
 * Sizes and strides count elements. Strides may be negative or zero; a run or a row is contiguous. Pointers
 * need the alignment of their element only. Output may be the input itself, element on element.
 *
 * Sums are of float64 whatever the elements are, so f32 and f32_wide share their sums.
 */
#ifndef CBN_KERNELS_H
#define CBN_KERNELS_H
#include <stddef.h>

enum { CBN_COLUMNS = 512 }; /* the coefficients of a row stay on the stack of a loop: at most 6 * 4 KB */

typedef struct {
    /* sums[0] = S(d), sums[1] = S(d*d) */
    void (*moments_first)(const void *x, ptrdiff_t n_runs, ptrdiff_t length, ptrdiff_t x_stride, double shift,
                          double *sums);
    /* sum_c[c] = S(d), square_c[c] = S(d*d), d = x - shift_c[c] */
    void (*moments_last)(const void *x, ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t x_stride,
                         const double *shift_c, double *sum_c, double *square_c);
    /* coef_c[0, pitch, 2*pitch] = mean, scale, offset of the first channel */
    void (*apply_first)(const void *x, void *y, ptrdiff_t n_runs, ptrdiff_t length, ptrdiff_t x_stride,
                        ptrdiff_t y_stride, const double *coef_c, ptrdiff_t pitch);
    void (*apply_last)(const void *x, void *y, ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t x_stride,
                       ptrdiff_t y_stride, const double *coef_c, ptrdiff_t pitch);
    /* sums[0] = S(g), sums[1] = S(g*d) */
    void (*grad_moments_first)(const void *g, const void *x, ptrdiff_t n_runs, ptrdiff_t length,
                               ptrdiff_t g_stride, ptrdiff_t x_stride, double mean, double *sums);
    void (*grad_moments_last)(const void *g, const void *x, ptrdiff_t rows, ptrdiff_t columns,
                              ptrdiff_t g_stride, ptrdiff_t x_stride, const double *mean_c, double *sum_c,
                              double *product_c);
    /* coef_c[0, pitch, 2*pitch, 3*pitch] = mean, scale, gmean, slope of the first channel */
    void (*grad_apply_first)(const void *g, const void *x, void *dx, ptrdiff_t n_runs, ptrdiff_t length,
                             ptrdiff_t g_stride, ptrdiff_t x_stride, ptrdiff_t dx_stride, const double *coef_c,
                             ptrdiff_t pitch);
    void (*grad_apply_last)(const void *g, const void *x, void *dx, ptrdiff_t rows, ptrdiff_t columns,
                            ptrdiff_t g_stride, ptrdiff_t x_stride, ptrdiff_t dx_stride, const double *coef_c,
                            ptrdiff_t pitch);
} cbn_loops; /* the eight loops of one element type */

typedef struct {
    const char *name;
    cbn_loops f32, f32_wide, f64;
} cbn_isa;

extern const cbn_isa cbn_baseline, cbn_avx2, cbn_avx512; /* the last two on x86-64 alone */

/* The sets that were built, lowest first, whether this processor has them or not; NULL ends the list. */
extern const cbn_isa *const cbn_built[];
/* The highest of them that this processor runs, as an index; those below it run too. */
int cbn_highest(void);

/* Threads asked for, by the process and by the calling thread; 0: nobody asked. */
extern int cbn_process_threads;
extern _Thread_local int cbn_thread_threads;

#endif
