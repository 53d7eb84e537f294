/* selected.c: passes of which not everything counts, or counts alike (loops/masked.h), and activations with bounds,
 * beside plain loops in float64.
 *
 * What does not count is NaN, which must reach nothing. A selection is of the array, and the tile begins in it one run,
 * one channel and some elements later.
 */
#include "arrays.h"

enum { ELEMENT = 3, MORE = 5 }; /* where the tile begins in a run of the mask; elements that this has more */
static const double EPS = 1e-5;

typedef struct {
    const char *name;
    int x_kind, y_kind, sums;
} element_type;
static const element_type types[] = {{"f32", F32, F32, 1}, {"f64", F64, F64, 1}, {"bf16", BF16, BF16, 1},
                                     {"f16", F16, F16, 1}, {"f32_in_f64", F32, F32, 0},
                                     {"bf16_in_f64", BF16, BF16, 0}, {"f16_in_f64", F16, F16, 0},
                                     {"u8_f32", U8, F32, 0}, {"u8_bf16", U8, BF16, 0}, {"i8_f32", I8, F32, 0},
                                     {"i8_bf16", I8, BF16, 0}};

/* Runs with more additions than a sum takes; rows that are short of a cache line, that go out by pages, and whose lines
 * begin alike or not. */
static const shape shapes[] = {{0, 3, 1, 5, 301}, {0, 5, 1, 2, 13}, {0, 2, 1, 3, 1100}, {1, 23, 1, 37, 1},
                               {1, 9, 1, 300, 1}, {1, 13, 1, 272, 1}};
/* Rows that are joined, or that are runs: nothing is selected of them. */
static const shape joined[] = {{1, 6, 3, 5, 3}, {1, 35, 2, 16, 2}};

typedef struct {
    const char *name;
    int activated, residual;
    cbn_act act;
} activation;
static const activation activations[] = {
    {"plain", 0, 0, {1, -INFINITY, INFINITY}},
    {"residual relu", 1, 1, {0, -INFINITY, INFINITY}},
    {"leaky", 1, 0, {0.1, -INFINITY, INFINITY}},
    {"clip", 1, 0, {1, -0.7, 0.8}},
    {"residual clip", 1, 1, {1, 0, 0.9}},
    {"clip above", 1, 0, {1, -INFINITY, 0.6}},
};

typedef struct {
    const char *name;
    int selects, mask, lengths, weights;
} choice;
enum { OF_CHANNELS = 1, SHARED = 2 }; /* a mask for each channel, or one for all */
static const choice choices[] = {
    {"all", 0, 0, 0, 0},
    {"mask", 1, OF_CHANNELS, 0, 0},
    {"shared mask", 1, SHARED, 0, 0},
    {"lengths", 1, 0, 1, 0},
    {"mask and lengths", 1, OF_CHANNELS, 1, 0},
    {"weights", 1, 0, 0, 1},
    {"mask and weights", 1, OF_CHANNELS, 0, 1},
    {"lengths and weights", 1, 0, 1, 1},
    {"rows", 1, 0, 0, 0},
};

typedef struct {
    const element_type *type;
    const shape *s;
    const activation *act;
    const choice *choice;
    int backward, applies, reduces, nontemporal, copying;
    char *x, *dy, *z, *read; /* `read` is what backward apply reads */
    cbn_selection selection;
    unsigned char *counts;                                      /* of each element */
    double *weight_n;                                           /* of each run */
    double *count, *mean, *m2, *scale, *shift, *coef, *forward; /* of each channel */
    double *y, *dh, *sum, *square;                              /* what is expected */
} pass;

/* ---- what counts ---- */

static void make_mask(pass *p, uint64_t *state)
{
    const shape *s = p->s;
    cbn_view *mask = &p->selection.mask;
    const ptrdiff_t run = s->rows ? 1 : s->length + MORE, channels = p->choice->mask == SHARED ? 1 : s->n_channels + 1;
    const size_t n = (size_t)((s->n_runs + 1) * channels * run);
    *mask = (cbn_view){output(n, 1), channels * run, p->choice->mask == SHARED ? 0 : run};
    for (size_t i = 0; i < n; i++)
        mask->data[i] = uniform(state) < 0.3 ? -1 : 0;
}

static void make_selection(pass *p, uint64_t *state)
{
    const shape *s = p->s;
    const choice *of = p->choice;
    const size_t runs = (size_t)s->n_runs;
    double *weight_n = (double *)output(runs + 1, sizeof *weight_n);
    ptrdiff_t *length_n = (ptrdiff_t *)output(runs + 1, sizeof *length_n);
    p->selection = (cbn_selection){.mask = {NULL, 0, 0}};
    for (size_t n = 0; n <= runs; n++) {
        const double a = uniform(state);
        weight_n[n] = of->weights ? 0.5 + 0.25 * (double)(n % 5) : 1;
        if (s->rows && a > 0.3)
            weight_n[n] = 0;
        /* The first runs end early, amid a vector, or before the tile; the last one does not */
        length_n[n] = of->mask ? (n % 2 ? s->length + MORE : 0) : (ptrdiff_t)((1 + a) / 2 * (double)s->length);
        if (n == runs)
            length_n[n] = s->length + MORE;
        else if (n == 1 && !of->mask)
            length_n[n] = ELEMENT - 1;
    }
    weight_n[runs] = 1.5; /* so something counts */
    if (of->mask)
        make_mask(p, state);
    if (of->lengths)
        p->selection.length_n = length_n;
    if (of->weights || s->rows)
        p->selection.weight_n = weight_n;
}

static int does_count(const pass *p, size_t i)
{
    const shape *s = p->s;
    const cbn_selection *of = &p->selection;
    const ptrdiff_t n = (ptrdiff_t)run_of(s, i) + 1, c = (ptrdiff_t)channel_of(s, i) + 1;
    const ptrdiff_t k = s->rows ? 0 : (ptrdiff_t)i % s->length + ELEMENT;
    if (!p->choice->selects)
        return 1;
    if (of->weight_n && of->weight_n[n] == 0)
        return 0;
    if (of->length_n && k >= of->length_n[n])
        return 0;
    return !of->mask.data || of->mask.data[n * of->mask.n + c * of->mask.c + k];
}

/* ---- plain loops ---- */

/* Inputs, what counts of them, and the moments of that. */
static void fill(pass *p, uint64_t *state)
{
    const shape *s = p->s;
    const size_t n = elements_of(s), channels = (size_t)s->n_channels;
    p->x = random_elements(state, n, p->type->x_kind, 1.5, 1.7);
    p->dy = random_elements(state, n, p->type->x_kind, 0.1, 1);
    p->z = random_elements(state, n, p->type->y_kind, 0, 1);
    p->counts = (unsigned char *)output(n, 1);
    p->weight_n = doubles((size_t)s->n_runs);
    p->count = doubles(channels), p->mean = doubles(channels), p->m2 = doubles(channels);
    for (size_t k = 0; k < (size_t)s->n_runs; k++)
        p->weight_n[k] = p->choice->selects && p->selection.weight_n ? p->selection.weight_n[k + 1] : 1;
    for (size_t i = 0; i < n; i++) {
        p->counts[i] = (unsigned char)does_count(p, i);
        if (!p->counts[i]) {
            set_value(p->x, i, p->type->x_kind, NAN);
            set_value(p->dy, i, p->type->x_kind, NAN);
            set_value(p->z, i, p->type->y_kind, NAN);
            continue;
        }
        p->count[channel_of(s, i)] += p->weight_n[run_of(s, i)];
        p->mean[channel_of(s, i)] += p->weight_n[run_of(s, i)] * value_of(p->x, i, p->type->x_kind);
    }
    for (size_t c = 0; c < channels; c++)
        p->mean[c] /= p->count[c];
    for (size_t i = 0; i < n; i++) {
        const double d = value_of(p->x, i, p->type->x_kind) - p->mean[channel_of(s, i)];
        if (p->counts[i])
            p->m2[channel_of(s, i)] += p->weight_n[run_of(s, i)] * d * d;
    }
}

/* Coefficients of the forward pass, and shifts that are elements. */
static void solve_forward(pass *p, uint64_t *state)
{
    const size_t C = (size_t)p->s->n_channels;
    p->scale = doubles(C), p->shift = doubles(C), p->forward = doubles(4 * C);
    for (size_t c = 0; c < C; c++) {
        char element[8];
        p->scale[c] = (c % 3 ? 1 : -1) * (1 + uniform(state) / 2) / sqrt(p->m2[c] / p->count[c] + EPS);
        p->forward[CBN_MEAN * C + c] = p->mean[c];
        p->forward[CBN_SCALE * C + c] = p->scale[c];
        p->forward[CBN_OFFSET * C + c] = uniform(state);
        set_value(element, 0, p->type->x_kind, p->mean[c] + 0.1);
        p->shift[c] = p->backward ? p->mean[c] : value_of(element, 0, p->type->x_kind);
    }
    p->coef = p->forward;
}

/* y and dh, and of a dh that is rounded to its type `read`. */
static void activate(pass *p)
{
    const size_t n = elements_of(p->s), C = (size_t)p->s->n_channels;
    const cbn_act act = p->act->act;
    p->y = doubles(n), p->dh = doubles(n);
    p->read = output(n, size_of(p->type->x_kind));
    for (size_t i = 0; i < n; i++) {
        const size_t c = channel_of(p->s, i);
        double a = (value_of(p->x, i, p->type->x_kind) - p->mean[c]) * p->scale[c] + p->forward[CBN_OFFSET * C + c];
        double slope = 1;
        if (p->act->residual)
            a += value_of(p->z, i, p->type->y_kind);
        if (!(a > 0))
            slope = act.slope;
        if (p->counts[i])
            p->y[i] = fmin(fmax(a * slope, act.low), act.high);
        if (a <= act.low || a >= act.high)
            slope = 0;
        if (p->counts[i])
            p->dh[i] = value_of(p->dy, i, p->type->x_kind) * slope;
        set_value(p->read, i, p->type->x_kind, p->dh[i]);
    }
}

/* The sums of dh, which have no weights, the coefficients that they make, and dx in the place of y. */
static void differentiate(pass *p)
{
    const size_t n = elements_of(p->s), C = (size_t)p->s->n_channels;
    p->sum = doubles(C), p->square = doubles(C), p->coef = doubles(4 * C);
    for (size_t i = 0; i < n; i++) {
        const size_t c = channel_of(p->s, i);
        if (!p->counts[i])
            continue;
        p->sum[c] += p->dh[i];
        p->square[c] += p->dh[i] * (value_of(p->x, i, p->type->x_kind) - p->mean[c]);
    }
    for (size_t c = 0; c < C; c++) {
        const double var = p->m2[c] / p->count[c] + EPS;
        p->coef[CBN_MEAN * C + c] = p->mean[c];
        p->coef[CBN_SCALE * C + c] = p->scale[c];
        p->coef[CBN_GRAD_MEAN * C + c] = p->sum[c] / p->count[c];
        p->coef[CBN_SLOPE * C + c] = p->square[c] / p->count[c] / var * p->scale[c];
    }
    for (size_t i = 0; i < n; i++) {
        const size_t c = channel_of(p->s, i);
        const double w = p->weight_n[run_of(p->s, i)], d = value_of(p->x, i, p->type->x_kind) - p->mean[c];
        const double dh = value_of(p->act->activated ? p->read : p->dy, i, p->type->x_kind);
        p->y[i] = 0;
        if (p->counts[i])
            p->y[i] = (dh - w * p->coef[CBN_GRAD_MEAN * C + c]) * p->scale[c] - d * w * p->coef[CBN_SLOPE * C + c];
    }
}

/* ---- the loops ---- */

static cbn_tile tile_of(const pass *p, char *y)
{
    const shape *s = p->s;
    const cbn_view none = view_of(s, NULL);
    const int half = p->type->x_kind == BF16 || p->type->x_kind == F16;
    return (cbn_tile){
        .x = view_of(s, p->x), .g = view_of(s, p->x), .z = none, .y = view_of(s, y), .x_copy = none, .dh = none,
        .w = none, .activated = p->act->activated, .checked = p->act->residual,
        .act = p->act->act, .vanishing = p->type->y_kind == F16 ? 0x1p-25 : p->type->y_kind == BF16 ? 0x1p-134 : 0,
        .n_runs = s->n_runs, .n_channels = s->n_channels, .length = s->length, .copies = s->copies,
        .coef_c = p->coef, .forward_c = p->forward, .pitch = s->n_channels, .shift_c = p->shift,
        .selection = p->choice->selects ? &p->selection : NULL, .run = 1, .channel = 1,
        .element = s->rows ? 0 : ELEMENT, .nontemporal = p->nontemporal,
        .sum_in_float64 = half && !p->backward, /* as the engine does where not everything counts */
    };
}

/* Errors of the sums, forward as moments. */
static void compare_sums(const pass *p, double *sum, double *square, double *errors)
{
    const size_t C = (size_t)p->s->n_channels;
    for (size_t c = 0; c < C && !p->backward; c++) {
        square[c] -= sum[c] * sum[c] / p->count[c];
        sum[c] = p->shift[c] + sum[c] / p->count[c];
    }
    errors[1] = error_of((char *)sum, p->backward ? p->sum : p->mean, C, F64);
    errors[2] = error_of((char *)square, p->backward ? p->square : p->m2, C, F64);
}

/* Of a dh, where it is that of an activation or counts: what does not is not copied. And whether a copy of x is one. */
static double error_of_copies(const pass *p, char *dh, const char *x_copy)
{
    const size_t n = elements_of(p->s);
    const int64_t kind = p->type->x_kind;
    for (size_t i = 0; i < n; i++) {
        if (p->copying && p->counts[i] && value_of(x_copy, i, kind) != value_of(p->x, i, kind))
            return NAN;
        if (!p->act->activated && !p->counts[i])
            set_value(dh, i, kind, 0);
    }
    return p->backward && (p->act->activated || p->copying) ? error_of(dh, p->dh, n, kind) : 0;
}

static void print_pass(const pass *p, const double *errors, uint64_t hash)
{
    char name[160];
    const size_t n = begin_name(name, sizeof name, p->type->name, p->s, p->backward ? "backward" : "forward");
    snprintf(name + n, sizeof name - n, " %s of %s %s%s%s", p->act->name, p->choice->name,
             p->applies && p->reduces ? "both" : p->applies ? "apply" : "reduction",
             p->nontemporal ? " nontemporal" : "", p->copying ? " copying" : "");
    print_case(name, errors, hash);
}

static void call(const cbn_isa *isa, const pass *p)
{
    const shape *s = p->s;
    const size_t n = elements_of(s), C = (size_t)s->n_channels;
    const size_t x_size = size_of(p->type->x_kind), y_size = size_of(p->type->y_kind);
    char *y = output(n, y_size), *dh = output(n, x_size), *x_copy = output(n, x_size);
    double *sum = doubles(C), *square = doubles(C), *counted = doubles(CBN_COUNT_ROWS * C), errors[4] = {0, 0, 0, 0};
    cbn_tile apply = tile_of(p, y), reduction = apply;
    apply.activated = p->act->activated && !p->backward;
    if (p->act->residual && !p->backward)
        apply.z.data = p->z;
    if (p->backward)
        apply.g.data = p->act->activated ? p->read : p->dy;
    reduction.g.data = p->backward ? p->dy : p->x;
    reduction.z.data = p->act->residual && p->backward ? p->z : NULL;
    reduction.sum_c = sum, reduction.square_c = square;
    reduction.prefetch = 1;
    reduction.x_copy.data = p->copying ? x_copy : NULL;
    reduction.dh.data = p->backward ? dh : NULL;
    if (s->rows && !p->backward && p->choice->selects) { /* rows that have weights are counted */
        reduction.w = (cbn_view){(char *)(p->selection.weight_n + 1), 1, 0};
        reduction.count_c = counted;
    }
    const cbn_loops *loops = loops_of(isa, p->type->name);
    const cbn_loop loop = s->rows ? p->backward ? loops->backward_rows : loops->forward_rows
                                  : p->backward ? loops->backward_runs : loops->forward_runs;
    loop(p->applies ? &apply : NULL, p->reduces ? &reduction : NULL);

    uint64_t hash = NO_DIGEST;
    if (p->applies) {
        hash = digest(hash, y, n * y_size);
        errors[0] = error_of(y, p->y, n, p->type->y_kind);
    }
    if (p->reduces) {
        hash = digest(digest(hash, sum, C * sizeof *sum), square, C * sizeof *square);
        hash = digest(hash, dh, p->backward ? n * x_size : 0);
        compare_sums(p, sum, square, errors);
        errors[3] = error_of_copies(p, dh, x_copy);
    }
    print_pass(p, errors, hash);
}

/* ---- cases ---- */

/* Apply, a reduction, and what has both: with and without what else an engine asks for. */
static void run_pass(const cbn_isa *isa, pass *p)
{
    /* As in the engine: rows that have a mask do not go past the caches, and of a selection rows are not both */
    const int may_pass = !(p->s->rows && p->choice->mask), both = !p->s->rows || !p->choice->selects;
    p->applies = 1, p->reduces = p->nontemporal = p->copying = 0;
    call(isa, p);
    p->nontemporal = 1;
    if (may_pass)
        call(isa, p);
    /* Forward a reduction knows no activation, and the file has those of everything */
    if (!p->type->sums || (!p->backward && (p->act->activated || !p->choice->selects)))
        return;
    p->applies = p->nontemporal = 0, p->reduces = 1;
    call(isa, p);
    p->applies = 1;
    if (both)
        call(isa, p);
    p->nontemporal = 1, p->copying = !p->s->rows;
    if (both)
        call(isa, p);
}

static void run_shape(const cbn_isa *isa, const element_type *type, const shape *s, const choice *of,
                      const activation *act)
{
    const int bytes = type->x_kind == U8 || type->x_kind == I8, clips = act->act.high < INFINITY;
    for (int backward = 0; backward <= !bytes; backward++) {
        uint64_t state = (uint64_t)(elements_of(s) + (size_t)type->x_kind);
        pass p = {.type = type, .s = s, .act = act, .choice = of, .backward = backward};
        if (of->selects)
            make_selection(&p, &state);
        else if (!clips) /* the file has those */
            return;
        fill(&p, &state);
        solve_forward(&p, &state);
        activate(&p);
        if (backward)
            differentiate(&p);
        run_pass(isa, &p);
        forget();
    }
}

/* Whether there is such a selection: 8 bits have none, rows have no lengths but always weights. */
static int applies_to(const choice *of, const element_type *type, const shape *s)
{
    if (!of->selects)
        return 1;
    if (type->x_kind == U8 || type->x_kind == I8)
        return 0;
    return s->rows ? !of->lengths && of->mask != SHARED : of->mask || of->lengths || of->weights;
}

void run_selected(const cbn_isa *isa)
{
    for (size_t t = 0; t < sizeof types / sizeof *types; t++)
        for (size_t a = 0; a < sizeof activations / sizeof *activations; a++) {
            for (size_t k = 0; k < sizeof choices / sizeof *choices; k++)
                for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
                    if (applies_to(&choices[k], &types[t], &shapes[i]))
                        run_shape(isa, &types[t], &shapes[i], &choices[k], &activations[a]);
            for (size_t i = 0; i < sizeof joined / sizeof *joined; i++)
                run_shape(isa, &types[t], &joined[i], &choices[0], &activations[a]);
        }
}
