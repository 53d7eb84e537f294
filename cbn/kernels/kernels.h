/* kernels.h: the table of loops that the passes call. It declares; it computes nothing.
 *
 * One grammar names every loop:  <direction>_<layout>_<type>_<isa>
 *
 *   direction  forward   reduction: per channel S(d), S(d*d), d = x - shift
 *                        map:       y = act((x - mean)*scale + offset + z)
 *              backward  reduction: per channel S(h), S(h*d), d = x - mean, h = g*act'((x - mean)*scale + offset + z)
 *                        map:       dx = (h - gmean - (x - mean)*slope)*scale
 *   layout     first     runs of contiguous elements, each of one channel: coefficients are scalars
 *              last      rows of contiguous elements, of all channels of the tile: coefficients are vectors
 *   type       f32  f64  elements and arithmetic alike; sums are of float64
 *              bf16 f16  16-bit elements, float32 arithmetic; forward sums of a few are of float32, the rest of float64
 *              f32_wide  bf16_wide  f16_wide  float64 arithmetic on them: maps alone
 *              u8_f32  u8_bf16  i8_f32  i8_bf16  8-bit input, float32 arithmetic, y of another type: forward maps alone
 *   isa        baseline  avx2  avx512  avx512_bf16
 *
 * act(a) = a where a > 0 or NaN, else a*negative_slope: 0 is ReLU, 1 no activation. Without z and act, h is g itself.
 *
 * A loop maps one tile, or reduces one, or does both at once: map some channels and reduce those that come next, so
 * that memory is written and read at the same time. Sizes and strides count elements. Strides may be negative or zero; a
 * run or a row is contiguous. Pointers need the alignment of their element only. Output may be the input itself, element
 * on element.
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

/* What a map goes through, or a reduction; where a loop does both, the two agree in n_runs, length and copies. */
typedef struct {
    cbn_view x, g; /* input; backward: gradient of the output, g for a reduction and h for a map */
    cbn_view z;    /* residual, of y's type; data NULL: none */
    cbn_view y;    /* map: y, or dx */
    int activated; /* forward map, backward reduction: there is a z, or an act */
    int checked;   /* map that is activated, of float64 elements also backward: what is infinite or NaN before the act is
                      computed again, with a larger range */
    double negative_slope;
    double vanishing; /* backward reduction: the largest number that the type of y takes for zero; there act' is the slope */
    ptrdiff_t n_runs, n_channels;
    /* first: elements of a run.
     * last: a row is `copies` times its channels, each `length` times in a row: element j is of channel
     * j / length % n_channels. So rows of few channels join, and short runs of many channels are a row too. */
    ptrdiff_t length, copies;
    ptrdiff_t skip, drop;      /* last, map: columns of the first and of the last channel that are not of this tile */
    const double *coef_c;      /* [0, pitch, 2*pitch, ...]: forward map: mean, scale, offset; backward: mean, scale, gmean,
                                  slope */
    const double *forward_c;   /* the same, backward reduction that is activated: mean, scale, offset of the forward map, and
                                  whether that was a wide one */
    ptrdiff_t pitch;
    int stream;                /* map: store past the caches */
    int prefetch;              /* reduction: fetch what comes next */
    int exact;                 /* forward reduction of 16-bit elements: no sums of float32, whose range is too small */
    const double *shift_c;     /* reduction: shift, or mean; of bfloat16, if not `exact`, zeros */
    double *sum_c, *square_c;  /* reduction: S(d) and S(d*d), or S(g) and S(g*d) */
    cbn_view x_copy;           /* first, reduction: where to put what it reads; data NULL: nowhere, and no map beside it */
    cbn_view h;                /* backward reduction: where to put h, if there is an x_copy or if it is activated */
} cbn_tile;

typedef void (*cbn_loop)(const cbn_tile *map, const cbn_tile *reduction); /* either may be NULL */

typedef struct {
    cbn_loop forward_first, forward_last, backward_first, backward_last;
} cbn_loops; /* of one element type */

typedef struct {
    const char *name;
    const cbn_loops *f32, *f32_wide, *f64, *bf16, *bf16_wide, *f16, *f16_wide;
    const cbn_loops *u8_f32, *u8_bf16, *i8_f32, *i8_bf16;
} cbn_isa;

extern const cbn_isa cbn_baseline, cbn_avx2, cbn_avx512, cbn_avx512_bf16; /* all but the first on x86-64 alone */

/* The sets that were built, lowest first, whether this processor has them or not; NULL ends the list. */
extern const cbn_isa *const cbn_built[];
/* The highest of them that this processor runs, as an index; those below it run too. */
int cbn_highest(void);

#endif
