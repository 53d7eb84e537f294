/* driver.c: runs the loops of one instruction set over the cases of a file, beside what they should give; and over
 * those of selected.c and others.c, which need no file.
 *
 *   driver <set> <file>
 *
 * tests/neon/__main__.py writes the file and reads the output: a line for each case, with the largest errors of y or
 * dx, of the statistics and of dh, relative to the largest number that was expected, and a digest of all bits that were
 * written. The statistics are the mean and m2, or backward S(dh) and S(dh*d).
 */
#include "arrays.h"

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

static void *memory[64];
static size_t n_memory;

static void *remembered(void *p)
{
    if (!p || n_memory == sizeof memory / sizeof *memory) {
        fprintf(stderr, "a case has too many arrays, or too large ones\n");
        exit(2);
    }
    return memory[n_memory++] = p;
}

char *output(size_t n, size_t size)
{
    char *p = memset(remembered(malloc(n * size + 128)), 0xa5, n * size + 128);
    return (char *)(((uintptr_t)p + 63) / 64 * 64) + 3 * size;
}

double *doubles(size_t n)
{
    return remembered(calloc(n, sizeof(double)));
}

void forget(void)
{
    while (n_memory)
        free(memory[--n_memory]);
}

static size_t elements(const header *h)
{
    return (size_t)(h->n_runs * h->n_channels * h->length * h->copies);
}

static void run(const cbn_isa *isa, const test_case *t)
{
    const header *h = &t->h;
    const size_t n = elements(h), c = (size_t)h->n_channels, x_size = size_of(h->x_kind), y_size = size_of(h->y_kind);
    char *y = output(n, y_size), *dh = output(n, x_size), *x_copy = output(n, x_size);
    double *sum = doubles(c), *square = doubles(c);
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
    uint64_t hash = NO_DIGEST;
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
    print_case(h->name, errors, hash);
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
        const size_t x_size = size_of(t.h.x_kind), y_size = size_of(t.h.y_kind);
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
        forget();
    }
    run_selected(isa);
    run_others(isa);
    return 0;
}
