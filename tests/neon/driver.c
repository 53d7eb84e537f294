/* driver.c: runs the loops of one instruction set over the cases of a file, beside what they should give.
 *
 *   driver <set> <file>
 *
 * tests/neon/__main__.py writes the file and reads the output: a line for each case, with the largest errors of y or
 * dx, of the statistics and of dh, relative to the largest number that was expected, and a digest of all bits that were
 * written. The statistics are the mean and m2, or backward S(dh) and S(dh*d).
 */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "half.h"
#include "kernels.h"

enum { NAME_LENGTH = 96 };

/* As the file has it; `kind` numbers the types of an element. */
typedef struct {
    char name[NAME_LENGTH], type[16];
    int64_t x_kind, y_kind, rows, backward, applies, reduces, activated, checked, residual, nontemporal, sum_in_float64;
    int64_t copying, n_runs, n_channels, length, copies;
    double negative_slope, vanishing;
} header;

typedef struct {
    header h;
    char *x, *dy, *z, *dh; /* dh is what backward apply reads */
    double *coef, *forward, *shift, *y_exact, *sum_exact, *square_exact, *dh_exact;
} test_case;

static const size_t sizes[] = {4, 8, 2, 2, 1, 1}; /* F32, F64, BF16, F16, U8, I8 */

static size_t elements(const header *h)
{
    return (size_t)(h->n_runs * h->n_channels * h->length * h->copies);
}

static double value_of(const char *p, size_t i, int64_t kind)
{
    if (kind == 0)
        return ((const float *)p)[i];
    if (kind == 1)
        return ((const double *)p)[i];
    const uint16_t e = ((const uint16_t *)p)[i];
    return kind == 2 ? cbn_from_bf16(e) : cbn_from_f16(e);
}

/* The largest difference, relative to the largest expected number; NaN where one is NaN. */
static double error_of(const char *p, const double *exact, size_t n, int64_t kind)
{
    double largest = 0, scale = 0;
    for (size_t i = 0; i < n; i++) {
        const double d = fabs(value_of(p, i, kind) - exact[i]);
        if (isnan(d))
            return NAN;
        largest = d > largest ? d : largest;
        scale = fabs(exact[i]) > scale ? fabs(exact[i]) : scale;
    }
    return scale > 0 ? largest / scale : largest;
}

static uint64_t digest(uint64_t hash, const void *p, size_t n)
{
    for (size_t i = 0; i < n; i++)
        hash = (hash ^ ((const unsigned char *)p)[i]) * 0x100000001b3;
    return hash;
}

/* Memory at no round address: what vectors of any set have to cope with. */
static char *output(size_t n, size_t size)
{
    char *p = malloc(n * size + 128);
    memset(p, 0xa5, n * size + 128);
    return (char *)(((uintptr_t)p + 63) / 64 * 64) + 3 * size;
}

static const cbn_loops *loops_of(const cbn_isa *isa, const char *type)
{
    const struct {
        const char *name;
        const cbn_loops *loops;
    } all[] = {{"f32", isa->f32}, {"f32_in_f64", isa->f32_in_f64}, {"f64", isa->f64}, {"bf16", isa->bf16},
               {"bf16_in_f64", isa->bf16_in_f64}, {"f16", isa->f16}, {"f16_in_f64", isa->f16_in_f64},
               {"u8_f32", isa->u8_f32}, {"u8_bf16", isa->u8_bf16}, {"i8_f32", isa->i8_f32}, {"i8_bf16", isa->i8_bf16}};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (!strcmp(all[i].name, type))
            return all[i].loops;
    fprintf(stderr, "no loops for %s\n", type);
    exit(2);
}

static void run(const cbn_isa *isa, const test_case *t)
{
    const header *h = &t->h;
    const size_t n = elements(h), c = (size_t)h->n_channels, x_size = sizes[h->x_kind], y_size = sizes[h->y_kind];
    char *y = output(n, y_size), *dh = output(n, x_size), *x_copy = output(n, x_size);
    double *sum = calloc(c, sizeof *sum), *square = calloc(c, sizeof *square);
    const ptrdiff_t n_step = (ptrdiff_t)(n / (size_t)h->n_runs), c_step = h->length;
#define VIEW(data) {(char *)(data), n_step, c_step}
    const cbn_view none = {NULL, n_step, c_step};
    cbn_tile apply = {
        .x = VIEW(t->x), .g = VIEW(h->backward ? t->dh : t->x), .z = none, .y = VIEW(y),
        .activated = h->activated && (!h->backward || h->y_kind == 1), /* as the engine does */
        .checked = (int)h->checked, .act = {h->negative_slope, -INFINITY, INFINITY}, .vanishing = h->vanishing,
        .n_runs = h->n_runs, .n_channels = h->n_channels, .length = h->length, .copies = h->copies,
        .coef_c = t->coef, .pitch = h->n_channels, .forward_c = t->forward, .nontemporal = (int)h->nontemporal,
        .x_copy = none, .dh = none,
    };
    cbn_tile reduction = apply;
    reduction.activated = (int)h->activated;
    if (h->residual && !h->backward)
        apply.z.data = t->z;
    if (h->residual && h->backward)
        reduction.z.data = t->z;
    reduction.g.data = h->backward ? t->dy : t->x;
    reduction.prefetch = 1;
    reduction.sum_in_float64 = (int)h->sum_in_float64;
    reduction.shift_c = t->shift;
    reduction.sum_c = sum;
    reduction.square_c = square;
    reduction.x_copy.data = h->copying ? x_copy : NULL;
    reduction.dh.data = h->backward ? dh : NULL;
    const cbn_loops *loops = loops_of(isa, h->type);
    const cbn_loop loop = h->rows ? h->backward ? loops->backward_rows : loops->forward_rows
                                  : h->backward ? loops->backward_runs : loops->forward_runs;
    loop(h->applies ? &apply : NULL, h->reduces ? &reduction : NULL);

    double errors[4] = {0, 0, 0, 0};
    uint64_t hash = 0xcbf29ce484222325;
    if (h->applies) {
        errors[0] = error_of(y, t->y_exact, n, h->y_kind);
        hash = digest(hash, y, n * y_size);
    }
    if (h->reduces) {
        hash = digest(digest(hash, sum, c * sizeof *sum), square, c * sizeof *square);
        for (size_t i = 0; i < c && !h->backward; i++) {
            square[i] -= sum[i] * sum[i] / (double)(n / c);
            sum[i] = t->shift[i] + sum[i] / (double)(n / c);
        }
        errors[1] = error_of((char *)sum, t->sum_exact, c, 1);
        errors[2] = error_of((char *)square, t->square_exact, c, 1);
    }
    if (h->reduces && h->backward && (h->activated || h->copying)) {
        errors[3] = error_of(dh, t->dh_exact, n, h->x_kind);
        hash = digest(hash, dh, n * x_size);
    }
    if (h->reduces && h->copying && memcmp(x_copy, t->x, n * x_size))
        errors[3] = NAN;
    printf("%s|%.3e|%.3e|%.3e|%.3e|%016llx\n", h->name, errors[0], errors[1], errors[2], errors[3],
           (unsigned long long)hash);
}

/* The next array of the file. */
static void *array(FILE *file, size_t n, size_t size)
{
    char *p = output(n, size);
    if (fread(p, size, n, file) != n) {
        fprintf(stderr, "the file is too short\n");
        exit(2);
    }
    return p;
}

#if defined(BASELINE_ALONE) /* without select.c, and the sets that it lists */
const cbn_isa *const cbn_built[] = {&cbn_baseline, NULL};
#endif

int main(int argc, char **argv)
{
    const cbn_isa *isa = NULL;
    for (int i = 0; argc == 3 && cbn_built[i]; i++)
        if (!strcmp(cbn_built[i]->name, argv[1]))
            isa = cbn_built[i];
    FILE *file = isa ? fopen(argv[2], "rb") : NULL;
    if (!file) {
        fprintf(stderr, "usage: driver <set that was built> <file>\n");
        return 2;
    }
    test_case t;
    while (fread(&t.h, sizeof t.h, 1, file) == 1) {
        const size_t n = elements(&t.h), c = (size_t)t.h.n_channels;
        const size_t x_size = sizes[t.h.x_kind], y_size = sizes[t.h.y_kind];
        t.x = array(file, n, x_size);
        t.dy = array(file, n, x_size);
        t.z = array(file, n, y_size);
        t.dh = array(file, n, x_size);
        t.coef = array(file, 4 * c, sizeof(double));
        t.forward = array(file, 4 * c, sizeof(double));
        t.shift = array(file, c, sizeof(double));
        t.y_exact = array(file, n, sizeof(double));
        t.sum_exact = array(file, c, sizeof(double));
        t.square_exact = array(file, c, sizeof(double));
        t.dh_exact = array(file, n, sizeof(double));
        run(isa, &t);
    }
    return 0;
}
