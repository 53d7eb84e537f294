/* kernels.h: the table of loops that the passes call. It declares; it computes nothing.
 *
 * One grammar names every loop:  <pass>_<layout>_<type>_<isa>
 *
 *   pass    moments        per channel: S(d), S(d*d), d = x - shift            training forward, cbn.moments
 *           apply          y = (x - mean)*scale + offset                       training and eval forward
 *           grad_moments   per channel: S(g), S(g*d), d = x - mean             backward
 *           grad_apply     dx = (g - gmean - (x - mean)*slope)*scale           backward through batch statistics
 *   layout  first          runs of contiguous elements, each of one channel: coefficients are scalars
 *           last           rows of contiguous elements, of all channels of the tile: coefficients are vectors
 *   type    f32  f64       elements and arithmetic alike
 *           f32_wide       float32 elements, float64 arithmetic
 *   isa     baseline  avx2  avx512
 *
 * Every loop goes through one tile. Sizes and strides count elements. Strides may be negative or zero; a run or a row is
 * contiguous. Pointers need the alignment of their element only. Output may be the input itself, element on element.
 *
 * Sums are of float64 whatever the elements are, so f32 and f32_wide share their sums.
 */
#ifndef CBN_KERNELS_H
#define CBN_KERNELS_H
#include <stddef.h>

enum { CBN_ROW_BYTES = 4096 }; /* the longest row: its coefficients stay on the stack of a loop, and in L1 */

/* Where an array is: its first element, and the elements from run to run (or row to row) and from channel to channel. */
typedef struct {
    char *data;
    ptrdiff_t n, c;
} cbn_view;

typedef struct {
    cbn_view x, g, y; /* input; gradient of the output, in the backward passes; y or dx */
    ptrdiff_t n_runs, n_channels;
    /* first: elements of a run.
     * last: a row is `copies` times its channels, each `length` times in a row: element j is of channel
     * j / length % n_channels. So rows of few channels join, and short runs of many channels are a row too. */
    ptrdiff_t length, copies;
    const double *shift_c;    /* reductions: shift, or mean */
    double *sum_c, *square_c; /* reductions: S(d) and S(d*d), or S(g) and S(g*d) */
    const double *coef_c;     /* maps: [0, pitch, 2*pitch, 3*pitch]: mean, scale, offset; or mean, scale, gmean, slope */
    ptrdiff_t pitch;
    ptrdiff_t ahead; /* from x, and from g, to what this thread reads after this tile: reductions bring every second
                        line of it into the cache, maps the others; 0: nothing */
    int stream;      /* maps: store past the caches */
} cbn_tile;

typedef void cbn_loop(const cbn_tile *tile);

typedef struct {
    cbn_loop *moments_first, *moments_last;
    cbn_loop *apply_first, *apply_last;
    cbn_loop *grad_moments_first, *grad_moments_last;
    cbn_loop *grad_apply_first, *grad_apply_last;
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
