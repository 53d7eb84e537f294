/* kernels.h: the table of loops that the engine calls. It declares; it computes nothing.
 *
 * One grammar names every loop:  <direction>_<layout>_<type>_<isa>
 *
 *   direction  forward   reduction: per channel S(d), S(d*d), d = x - shift
 *                        apply:     y = act((x - mean)*scale + offset + z)
 *              backward  reduction: per channel S(dh), S(dh*d), d = x - mean,
 *                                   dh = dy*act'((x - mean)*scale + offset + z)
 *                        apply:     dx = (dh - grad_mean)*scale - (x - mean)*slope
 *              second    of x, g = dy and z = ggI (loops/second.h)
 *                        reduction: per channel S(g'), S(z'), S(g'*z'), S(g'*d), S(z'*d), d = x - mean
 *                        apply:     y = (z - zmean)*scale + (x - mean)*slope + offset, and the gradient of x
 *   layout     runs      contiguous elements of one channel: coefficients are scalars
 *              rows      contiguous elements, one of each channel of the tile in turn: coefficients are vectors
 *   type       f32  f64  elements and arithmetic alike; float64 sums
 *              bf16 f16  16-bit elements, float32 arithmetic; forward, float32 sums of a few elements feed float64 sums
 *                        (second: float64 arithmetic and float64 sums for every type)
 *              f32_in_f64  bf16_in_f64  f16_in_f64  float64 arithmetic on them: apply alone
 *              u8_f32  u8_bf16  i8_f32  i8_bf16  8-bit input, float32 arithmetic, y of another type: forward apply
 *              sums_u8  sums_i8  sums_u16  sums_i16  sums_i32  integers: forward reduction, exact (integers.h)
 *   isa        baseline  avx2  avx512  avx512_bf16  neon
 *
 * act(a) = min(max(l(a), low), high), where l(a) = a where a > 0 or NaN, else a*slope: slope 0 is ReLU, 1 with infinite
 * bounds no activation. NaN stays. Without z and act, dh is dy itself.
 *
 * Of few rows of f32 and f64 there is a loop that does all at once (loops/few.h).
 *
 * A loop applies coefficients to one tile, or reduces one, or does both at once: it writes some channels while it
 * reads those that come next, so that memory is written and read at the same time. Sizes and strides count elements. Strides may be
 * negative or zero; a run or a row is contiguous. Pointers need the alignment of their element only. Output may be the
 * input itself, element on element.
 */
#ifndef CBN_KERNELS_H
#define CBN_KERNELS_H
#include <stddef.h>

/* A quarter of a unit in the last place of the largest values: added to one of them, less does not overflow */
#define CBN_SMALL_FLOAT 0x1p102
#define CBN_SMALL_DOUBLE 0x1p969

enum { CBN_ROW_BYTES = 4096 }; /* the longest row: its coefficients stay on the stack of a loop, and in L1 */

/* Rows of an array of coefficients (n, C). The third and fourth differ in meaning: forward, backward. */
enum {
    CBN_MEAN,
    CBN_SCALE,
    CBN_OFFSET,        /* forward */
    CBN_IN_FLOAT64,    /* forward, as backward reads it again: whether float32 arithmetic did not do */
    CBN_GRAD_MEAN = 2, /* backward: S(dh)/n */
    CBN_SLOPE,         /* backward: S(dh*d)*invstd^2/n*scale, what x - mean is multiplied by */
};

/* Second derivatives: rows of the sums, of g' = g - g0, z' = z - z0 and d = x - mean; */
enum { CBN_SUM_G, CBN_SUM_Z, CBN_SUM_GZ, CBN_SUM_GD, CBN_SUM_ZD, CBN_SECOND_SUMS };
/* of what the reduction subtracts: mean, g0 and z0; */
enum { CBN_SHIFT_MEAN, CBN_SHIFT_G, CBN_SHIFT_Z, CBN_SECOND_SHIFTS };
/* and of the coefficients, of which y takes the first five. */
enum {
    CBN_2_MEAN,
    CBN_2_ZMEAN,
    CBN_2_SCALE,  /* of z - zmean in y */
    CBN_2_SLOPE,  /* of x - mean in y, and of g - gmean in the gradient of x: second derivatives are symmetric */
    CBN_2_OFFSET,
    CBN_2_GMEAN,
    CBN_2_OF_X,   /* of x - mean in the gradient of x */
    CBN_2_OF_Z,   /* of z - zmean in the gradient of x */
    CBN_2_TERM,   /* added to it: what float64 cannot hold of gmean and zmean, multiplied */
    CBN_2_ROWS,
};

/* Where an array is: its first element; elements from run to run (or row to row), and from channel to channel. */
typedef struct {
    char *data;
    ptrdiff_t n, c;
} cbn_view;

/* An activation. It has a slope other than 1, or bounds that are not both infinite, or neither. */
typedef struct {
    double slope, low, high;
} cbn_act;

/* Which values of an array count, and how much; of all its runs or rows. */
typedef struct {
    cbn_view mask;             /* bytes, -1 for what counts and 0 for what does not; data NULL: all counts */
    const ptrdiff_t *length_n; /* runs: so many elements count of each, from its beginning on; NULL: all.
                                * With a mask it is 0 or all */
    const double *weight_n;    /* of each run or row; a row of weight 0 does not count, and no run has it; NULL: ones */
    int all;                   /* everything counts, only the weights differ: forward, apply goes as without */
} cbn_selection;

/* What coefficients are applied to, or what is reduced. The two of a loop that does both have one n_runs and length. */
typedef struct {
    cbn_view x, g; /* input; backward: gradient of the output, dy for a reduction and dh for apply */
    cbn_view z;    /* residual, of y's type; data NULL: none. Second: ggI, or the tangent of x */
    cbn_view y;    /* apply: y, or dx */
    int activated; /* forward apply, backward reduction: there is a z, or an act. Backward apply: for float64 elements
                      alone, and then with `checked` */
    int checked;   /* apply that is activated: what is infinite or NaN before the act is computed again, with a larger
                      range */
    cbn_act act;
    double vanishing; /* backward reduction: the largest number that the type of y takes for zero, where act' is the
                         slope */
    ptrdiff_t n_runs, n_channels;
    /* runs: elements of a run.
     * rows: a row is `copies` times its channels, each `length` times in a row: element j is of channel
     * j / length % n_channels. So rows of few channels join, and short runs of many channels are a row too. */
    ptrdiff_t length, copies;
    ptrdiff_t skip, drop;      /* rows, apply: columns of the first and of the last channel that are not of this tile */
    const double *coef_c;      /* apply: row i of the coefficients begins at i*pitch */
    const double *forward_c;   /* backward reduction that is activated: the same of the forward pass */
    ptrdiff_t pitch;
    int nontemporal;           /* apply: non-temporal stores */
    int prefetch;              /* fetch what comes next */
    int sum_in_float64;        /* forward reduction of bfloat16: no float32 sums, whose range is too small */
    const double *shift_c;     /* reduction: shift, or mean; of bfloat16, unless `sum_in_float64`, zeros.
                                * Second: rows of three shifts */
    double *sum_c, *square_c;  /* reduction: S(d) and S(d*d), or S(dh) and S(dh*d). Second: rows from sum_c on */
    double *count_c;           /* forward reduction in which not every value counts alike: rows of what is counted */
    cbn_view w;                /* the same: float64 weights, contiguous along a run; data NULL: ones */
    int skipna;                /* the same: NaN does not count */
    int extremes;              /* the same, and of integers: the smallest and the largest are wanted */
    const cbn_selection *selection; /* NULL: all values count alike */
    ptrdiff_t run, channel, element; /* with a selection: where the tile begins in the array */
    cbn_view x_copy;           /* runs, reduction: where to put what it reads; data NULL: nowhere, no apply beside it */
    cbn_view dh;               /* backward reduction: where to put dh, if there is an x_copy or if it is activated.
                                * Second, apply: where to put the gradient of x; data NULL: it is not wanted */
} cbn_tile;

typedef void (*cbn_loop)(const cbn_tile *apply, const cbn_tile *reduction); /* either may be NULL */

/* What is between the two where all rows of a tile are one call (loops/few.h). */
typedef struct {
    const double *weight_c, *bias_c; /* NULL: ones, zeros */
    double *invstd_c;                /* forward: made; backward: given */
    double eps;
    ptrdiff_t next; /* elements from this tile to the one that comes after it, for both inputs */
} cbn_solve;

/* Moments, or backward the sums, have the place of the sums of a reduction. Returns whether float32 arithmetic does for
 * all channels (of float64 elements, whether nothing overflows); if not, coefficients are to be applied again. */
typedef int (*cbn_at_once)(const cbn_tile *apply, const cbn_tile *reduction, const cbn_solve *solve);

/* Rows of what a reduction counts beside its sums, `pitch` apart. */
enum {
    CBN_COUNT, /* with `skipna` the weights of what counts, else how many NaN do. Not for weights or `extremes` alone */
    CBN_MIN,
    CBN_MAX,
    CBN_COUNT_ROWS,
};

/* n elements, one behind the other, as numbers of another type. */
typedef void (*cbn_conversion)(const void *from, void *to, ptrdiff_t n);

/* Of one element type. */
typedef struct {
    cbn_loop forward_runs, forward_rows, backward_runs, backward_rows;
    cbn_loop second_runs, second_rows; /* of types that have reductions; one of the two arguments is NULL */
    cbn_at_once forward_at_once, backward_at_once; /* few rows, of float32 and float64 alone */
    cbn_conversion widen;  /* to the type of the arithmetic; of integers (sums_*) to float32 */
    cbn_conversion widen_f64; /* of integers alone: to float64 */
    cbn_conversion narrow; /* from the type of the arithmetic to y's, rounded to nearest; not of integers */
} cbn_loops;

typedef struct {
    const char *name;
    const cbn_loops *f32, *f32_in_f64, *f64, *bf16, *bf16_in_f64, *f16, *f16_in_f64;
    const cbn_loops *u8_f32, *u8_bf16, *i8_f32, *i8_bf16;
    const cbn_loops *sums_u8, *sums_i8, *sums_u16, *sums_i16, *sums_i32;
} cbn_isa;

extern const cbn_isa cbn_baseline;
extern const cbn_isa cbn_avx2, cbn_avx512, cbn_avx512_bf16; /* x86-64 */
extern const cbn_isa cbn_neon;                              /* aarch64 */

/* The sets that were built, lowest first, whether this processor has them or not; NULL ends the list. */
extern const cbn_isa *const cbn_built[];
/* The highest of them that this processor runs, as an index; those below it run too. */
int cbn_highest(void);

#endif
