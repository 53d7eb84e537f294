/* others.c: forward reductions that count (loops/counted.h), second derivatives (loops/second.h) and few rows at once
 * (loops/few.h), beside plain loops in float64.
 */
#include "arrays.h"

#define COUNT_OF(array) (sizeof(array) / sizeof *(array))
static const double EPS = 1e-5;

typedef struct {
    const char *name;
    int kind;
} element_type;
static const element_type types[] = {{"f32", F32}, {"f64", F64}, {"bf16", BF16}, {"f16", F16}};

/* As in selected.c; and rows that are joined, or short runs that are rows. */
static const shape shapes[] = {{0, 3, 1, 5, 301}, {0, 5, 1, 2, 13},   {0, 2, 1, 3, 1100}, {1, 75, 1, 37, 1},
                               {1, 9, 1, 300, 1}, {1, 13, 1, 272, 1}, {1, 6, 3, 5, 3},    {1, 35, 2, 16, 2}};

static uint64_t seed_of(const shape *s, int kind)
{
    return (uint64_t)(elements_of(s) + (size_t)kind);
}

/* ---- reductions that count ---- */

typedef struct {
    const char *name;
    int weighs, skipna, extremes;
} counting;
enum { OF_ELEMENTS = 1, OF_ROWS = 2 }; /* a weight for each element, or one for all channels */
static const counting countings[] = {
    {"weights", OF_ELEMENTS, 0, 0},
    {"row weights", OF_ROWS, 0, 0},
    {"weights skipna", OF_ELEMENTS, 1, 1},
    {"row weights skipna", OF_ROWS, 1, 1},
    {"weights extremes", OF_ELEMENTS, 0, 1},
    {"row weights extremes", OF_ROWS, 0, 1},
    {"skipna extremes", 0, 1, 1},
    {"skipna", 0, 1, 0},
    {"extremes", 0, 0, 1},
};

/* Where the weight of an element is: of all its channels the same, or its own. */
static size_t weight_at(const shape *s, const counting *k, size_t i)
{
    const size_t length = (size_t)s->length, image = length * (size_t)s->n_channels;
    return k->weighs == OF_ROWS ? i / image * length + i % length : i;
}

/* What is expected of each channel. */
typedef struct {
    double *weight, *mean, *m2, *counted;
} counts;

/* The smallest and the largest are of what counts, NaN apart; the count is that of weights, or of NaN. */
static counts count_plainly(const shape *s, const counting *k, const char *x, int kind, const double *w)
{
    const size_t n = elements_of(s), C = (size_t)s->n_channels;
    counts e = {doubles(C), doubles(C), doubles(C), doubles(CBN_COUNT_ROWS * C)};
    for (size_t c = 0; c < C; c++) {
        e.counted[CBN_MIN * C + c] = INFINITY;
        e.counted[CBN_MAX * C + c] = -INFINITY;
    }
    for (int turn = 0; turn < 2; turn++) {
        for (size_t i = 0; i < n; i++) {
            const size_t c = channel_of(s, i);
            const double v = value_of(x, i, kind), weight = w ? w[weight_at(s, k, i)] : 1;
            if (weight == 0 || (k->skipna && isnan(v)))
                continue;
            if (turn == 1) {
                e.m2[c] += weight * (v - e.mean[c]) * (v - e.mean[c]);
                continue;
            }
            e.weight[c] += weight;
            e.mean[c] += weight * v;
            e.counted[CBN_COUNT * C + c] += k->skipna ? weight : isnan(v);
            e.counted[CBN_MIN * C + c] = fmin(e.counted[CBN_MIN * C + c], v);
            e.counted[CBN_MAX * C + c] = fmax(e.counted[CBN_MAX * C + c], v);
        }
        for (size_t c = 0; turn == 0 && c < C; c++)
            e.mean[c] /= e.weight[c];
    }
    return e;
}

/* Weights from 0 to 2, whose sums are exact; some elements are NaN, unless no loop is asked for them. The first run
 * counts in any case. */
static double *prepare_count(const shape *s, const counting *k, char *x, int kind, uint64_t *state)
{
    const size_t n = elements_of(s);
    const int has_nan = k->skipna || (k->weighs && k->extremes);
    double *w = k->weighs ? (double *)output(n, sizeof *w) : NULL;
    for (size_t i = 0; i < n; i++) {
        const double a = uniform(state), b = uniform(state);
        if (w)
            w[weight_at(s, k, i)] = run_of(s, i) == 0 ? 1 : fmax(0, floor(4 * a)) / 2;
        if (has_nan && run_of(s, i) > 0 && b < -0.7 && (k->skipna || channel_of(s, i) == 0))
            set_value(x, i, kind, NAN);
    }
    return w;
}

static cbn_view weights_view(const shape *s, const counting *k, double *w)
{
    if (k->weighs == OF_ROWS)
        return (cbn_view){(char *)w, s->length, 0};
    /* Of joined rows the elements from image to image, not from row to row */
    return (cbn_view){(char *)w, s->n_channels * s->length, s->length};
}

static void compare_counts(const shape *s, const counting *k, const counts *e, const double *shift, double *sum,
                           double *square, const double *counted, double *errors, uint64_t *hash)
{
    const size_t C = (size_t)s->n_channels;
    const int count = k->skipna || (k->weighs && k->extremes);
    for (size_t c = 0; c < C; c++) {
        sum[c] = isnan(sum[c]) ? NAN : sum[c]; /* processors differ in its sign */
        square[c] = isnan(square[c]) ? NAN : square[c];
    }
    *hash = digest(digest(*hash, sum, C * sizeof *sum), square, C * sizeof *square);
    for (size_t c = 0; c < C; c++) {
        square[c] -= sum[c] * sum[c] / e->weight[c];
        sum[c] = shift[c] + sum[c] / e->weight[c];
    }
    errors[1] = error_of((char *)sum, e->mean, C, F64);
    errors[2] = error_of((char *)square, e->m2, C, F64);
    for (size_t row = count ? CBN_COUNT : CBN_MIN; row < (k->extremes ? CBN_COUNT_ROWS : CBN_MIN); row++) {
        *hash = digest(*hash, counted + row * C, C * sizeof *counted);
        errors[3] = worse(errors[3], error_of((const char *)(counted + row * C), e->counted + row * C, C, F64));
    }
}

static void run_count(const cbn_isa *isa, const element_type *type, const shape *s, const counting *k)
{
    uint64_t state = seed_of(s, type->kind), hash = NO_DIGEST;
    const size_t C = (size_t)s->n_channels;
    char name[160], *x = random_elements(&state, elements_of(s), type->kind, 1.5, 1.7);
    double *w = prepare_count(s, k, x, type->kind, &state), errors[4] = {0, 0, 0, 0};
    const counts e = count_plainly(s, k, x, type->kind, w);
    double *sum = doubles(C), *square = doubles(C), *shift = doubles(C);
    double *counted = (double *)output(CBN_COUNT_ROWS * C, sizeof *counted);
    for (size_t c = 0; c < C; c++)
        shift[c] = 1.25 + 0.25 * (double)(c % 3);
    const cbn_view none = view_of(s, NULL);
    const cbn_tile t = {
        .x = view_of(s, x), .g = view_of(s, x), .y = view_of(s, x), .z = none, .x_copy = none, .dh = none,
        .w = weights_view(s, k, w), .act = {1, -INFINITY, INFINITY}, .n_runs = s->n_runs,
        .n_channels = s->n_channels, .length = s->length, .copies = s->copies, .pitch = s->n_channels, .prefetch = 1,
        .sum_in_float64 = type->kind == BF16 || type->kind == F16, .shift_c = shift, .sum_c = sum,
        .square_c = square, .count_c = counted, .skipna = k->skipna, .extremes = k->extremes,
    };
    const cbn_loops *loops = loops_of(isa, type->name);
    (s->rows ? loops->forward_rows : loops->forward_runs)(NULL, &t);
    compare_counts(s, k, &e, shift, sum, square, counted, errors, &hash);
    const size_t n = begin_name(name, sizeof name, type->name, s, "forward");
    snprintf(name + n, sizeof name - n, " counted %s", k->name);
    print_case(name, errors, hash);
    forget();
}

/* ---- second derivatives ---- */

typedef struct {
    const element_type *type;
    const shape *s;
    char *x, *g, *z;
    double *shift, *coef; /* rows of them */
} second;

static double second_value(const second *p, const char *array, size_t i, double minus)
{
    return value_of(array, i, p->type->kind) - minus;
}

static cbn_tile second_tile(const second *p)
{
    const shape *s = p->s;
    const cbn_view none = view_of(s, NULL);
    return (cbn_tile){
        .x = view_of(s, p->x), .g = view_of(s, p->g), .z = view_of(s, p->z), .y = view_of(s, p->x), .dh = none,
        .x_copy = none, .w = none, .act = {1, -INFINITY, INFINITY}, .n_runs = s->n_runs,
        .n_channels = s->n_channels, .length = s->length, .copies = s->copies, .pitch = s->n_channels,
        .coef_c = p->coef, .shift_c = p->shift, .prefetch = 1,
    };
}

static void print_second(const second *p, const char *what, const double *errors, uint64_t hash)
{
    char name[160];
    const size_t n = begin_name(name, sizeof name, p->type->name, p->s, "second");
    snprintf(name + n, sizeof name - n, " %s", what);
    print_case(name, errors, hash);
}

static void reduce_second(const cbn_loop loop, const second *p)
{
    const size_t C = (size_t)p->s->n_channels;
    double *sums = doubles(CBN_SECOND_SUMS * C), *exact = doubles(CBN_SECOND_SUMS * C), errors[4] = {0, 0, 0, 0};
    cbn_tile t = second_tile(p);
    for (size_t i = 0; i < elements_of(p->s); i++) {
        const size_t c = channel_of(p->s, i);
        const double d = second_value(p, p->x, i, p->shift[CBN_SHIFT_MEAN * C + c]);
        const double g = second_value(p, p->g, i, p->shift[CBN_SHIFT_G * C + c]);
        const double z = second_value(p, p->z, i, p->shift[CBN_SHIFT_Z * C + c]);
        exact[CBN_SUM_G * C + c] += g;
        exact[CBN_SUM_Z * C + c] += z;
        exact[CBN_SUM_GZ * C + c] += g * z;
        exact[CBN_SUM_GD * C + c] += g * d;
        exact[CBN_SUM_ZD * C + c] += z * d;
    }
    t.sum_c = sums;
    loop(NULL, &t);
    for (size_t k = 0; k < CBN_SECOND_SUMS; k++) { /* of the sums of one array, and of products */
        const int products = k >= CBN_SUM_GZ;
        errors[1 + products] = worse(errors[1 + products], error_of((char *)(sums + k * C), exact + k * C, C, F64));
    }
    print_second(p, "reduction", errors, digest(NO_DIGEST, sums, CBN_SECOND_SUMS * C * sizeof *sums));
}

/* y, and with `both` the gradient of x. */
static void apply_second(const cbn_loop loop, const second *p, int both, int nontemporal)
{
    const size_t n = elements_of(p->s), C = (size_t)p->s->n_channels, size = size_of(p->type->kind);
    char *y = output(n, size), *dh = output(n, size);
    double *exact_y = doubles(n), *exact_dh = doubles(n), errors[4] = {0, 0, 0, 0};
    cbn_tile t = second_tile(p);
    for (size_t i = 0; i < n; i++) {
        const double *coef = p->coef + channel_of(p->s, i);
        const double d = second_value(p, p->x, i, coef[CBN_2_MEAN * C]);
        const double g = second_value(p, p->g, i, coef[CBN_2_GMEAN * C]);
        const double z = second_value(p, p->z, i, coef[CBN_2_ZMEAN * C]);
        exact_y[i] = z * coef[CBN_2_SCALE * C] + d * coef[CBN_2_SLOPE * C] + coef[CBN_2_OFFSET * C];
        exact_dh[i] = z * coef[CBN_2_OF_Z * C] + g * coef[CBN_2_SLOPE * C] + d * coef[CBN_2_OF_X * C] +
                      coef[CBN_2_TERM * C];
    }
    t.y.data = y;
    t.dh.data = both ? dh : NULL;
    t.nontemporal = nontemporal;
    loop(&t, NULL);
    errors[0] = error_of(y, exact_y, n, p->type->kind);
    if (both)
        errors[3] = error_of(dh, exact_dh, n, p->type->kind);
    const char *const names[] = {"tangent", "apply", "tangent nontemporal", "apply nontemporal"};
    print_second(p, names[both + 2 * nontemporal], errors, digest(digest(NO_DIGEST, y, n * size), dh, n * size));
}

static void run_second(const cbn_isa *isa, const element_type *type, const shape *s)
{
    uint64_t state = seed_of(s, type->kind);
    const size_t n = elements_of(s), C = (size_t)s->n_channels;
    const cbn_loops *loops = loops_of(isa, type->name);
    const cbn_loop loop = s->rows ? loops->second_rows : loops->second_runs;
    const second p = {
        .type = type, .s = s, .x = random_elements(&state, n, type->kind, 1.5, 1.7),
        .g = random_elements(&state, n, type->kind, 0.1, 1), .z = random_elements(&state, n, type->kind, -0.5, 1),
        .shift = random_doubles(&state, CBN_SECOND_SHIFTS * C, 0.7, 0.5),
        .coef = random_doubles(&state, CBN_2_ROWS * C, 0.3, 0.4),
    };
    reduce_second(loop, &p);
    for (int k = 0; k < 4; k++)
        apply_second(loop, &p, k % 2, k / 2);
    forget();
}

/* ---- few rows at once ---- */

enum { FAR_ROWS = 64 };
/* Rows that are a part of a vector, of several blocks of columns, whole cache lines; and more of them than the engine
 * gives, of which the samples lie so far off that the sums are made again. */
static const shape few_shapes[] = {{1, 3, 1, 5, 1},    {1, 7, 1, 37, 1},  {1, 32, 1, 150, 1},
                                   {1, 21, 1, 300, 1}, {1, 9, 1, 272, 1}, {1, FAR_ROWS, 1, 77, 1}};
typedef struct {
    const char *name;
    int activated, residual, parameters; /* a weight and a bias */
    int misfits; /* a scale that float32 does not hold as a normal number: coefficients are to be applied again */
    cbn_act act;
} few_case;
static const few_case few_cases[] = {
    {"plain", 0, 0, 1, 0, {1, -INFINITY, INFINITY}},
    {"bare", 0, 0, 0, 0, {1, -INFINITY, INFINITY}},
    {"misfit", 0, 0, 1, 1, {1, -INFINITY, INFINITY}},
    {"relu", 1, 0, 1, 0, {0, -INFINITY, INFINITY}},
    {"residual leaky", 1, 1, 1, 0, {0.1, -INFINITY, INFINITY}},
    {"clip", 1, 0, 0, 0, {1, -0.7, 0.8}},
    {"residual clip", 1, 1, 1, 0, {1, 0, 0.9}},
};

typedef struct {
    const element_type *type;
    const shape *s;
    const few_case *of;
    int backward, nontemporal;
    char *x, *dy, *z;
    double *weight, *bias;
    double *mean, *m2, *invstd, *y, *dh, *sum, *product; /* what is expected */
    double *forward;
} few;

static double few_value(const few *p, const char *array, size_t i)
{
    return value_of(array, i, p->type->kind);
}

static void few_moments(few *p)
{
    const size_t n = elements_of(p->s), C = (size_t)p->s->n_channels;
    const double rows = (double)p->s->n_runs;
    p->mean = doubles(C), p->m2 = doubles(C), p->invstd = doubles(C), p->forward = doubles(4 * C);
    for (size_t i = 0; i < n; i++)
        p->mean[i % C] += few_value(p, p->x, i) / rows;
    for (size_t i = 0; i < n; i++)
        p->m2[i % C] += (few_value(p, p->x, i) - p->mean[i % C]) * (few_value(p, p->x, i) - p->mean[i % C]);
    for (size_t c = 0; c < C; c++) {
        p->invstd[c] = 1 / sqrt(p->m2[c] / rows + EPS);
        p->forward[CBN_MEAN * C + c] = p->mean[c];
        p->forward[CBN_SCALE * C + c] = p->invstd[c] * (p->weight ? p->weight[c] : 1);
        p->forward[CBN_OFFSET * C + c] = p->bias ? p->bias[c] : 0;
    }
}

/* y and dh, then backward dx in the place of y. */
static void few_outputs(few *p)
{
    const size_t n = elements_of(p->s), C = (size_t)p->s->n_channels;
    const double rows = (double)p->s->n_runs, *scale = p->forward + CBN_SCALE * C;
    const cbn_act act = p->of->act;
    p->y = doubles(n), p->dh = doubles(n), p->sum = doubles(C), p->product = doubles(C);
    for (size_t i = 0; i < n; i++) {
        const double d = few_value(p, p->x, i) - p->mean[i % C];
        const double a = d * scale[i % C] + p->forward[CBN_OFFSET * C + i % C] + (p->z ? few_value(p, p->z, i) : 0);
        const double slope = a > 0 ? 1 : act.slope;
        p->y[i] = fmin(fmax(a * slope, act.low), act.high);
        p->dh[i] = few_value(p, p->dy, i) * (a <= act.low || a >= act.high ? 0 : slope);
        p->sum[i % C] += p->dh[i];
        p->product[i % C] += p->dh[i] * d;
    }
    for (size_t i = 0; p->backward && i < n; i++) {
        const size_t c = i % C;
        const double d = few_value(p, p->x, i) - p->mean[c];
        p->y[i] = (p->dh[i] - p->sum[c] / rows - d * p->product[c] / rows * p->invstd[c] * p->invstd[c]) * scale[c];
    }
}

static void few_inputs(few *p)
{
    uint64_t state = seed_of(p->s, p->type->kind);
    const size_t n = elements_of(p->s), C = (size_t)p->s->n_channels;
    p->x = random_elements(&state, n, p->type->kind, 1.5, 1.7);
    p->dy = random_elements(&state, n, p->type->kind, 0.1, 1);
    p->z = p->of->residual ? random_elements(&state, n, p->type->kind, 0, 1) : NULL;
    p->weight = p->of->parameters ? random_doubles(&state, C, 1, 0.3) : NULL;
    p->bias = p->of->parameters ? random_doubles(&state, C, 0, 0.3) : NULL;
    if (p->of->misfits)
        p->weight[C - 1] = 0x1p-130;
    /* `find_samples` of few.h: neighbours, at the odd multiples of an eighth */
    for (size_t i = 0; p->s->n_runs == FAR_ROWS && i < n; i++)
        if (i / C % 16 == 8 || i / C % 16 == 9)
            set_value(p->x, i, p->type->kind, few_value(p, p->x, i) + 50);
    few_moments(p);
    few_outputs(p);
}

static void compare_few(const few *p, const cbn_tile *apply, const cbn_tile *reduction, const double *invstd, int fits)
{
    const size_t n = elements_of(p->s), C = (size_t)p->s->n_channels, size = size_of(p->type->kind);
    char name[160];
    uint64_t hash = digest(NO_DIGEST, apply->y.data, n * size);
    hash = digest(digest(hash, reduction->sum_c, C * sizeof(double)), reduction->square_c, C * sizeof(double));
    hash = digest(digest(hash, invstd, C * sizeof(double)), reduction->dh.data, p->backward ? n * size : 0);
    double errors[4] = {
        error_of(apply->y.data, p->y, n, p->type->kind),
        error_of((char *)reduction->sum_c, p->backward ? p->sum : p->mean, C, F64),
        error_of((char *)reduction->square_c, p->backward ? p->product : p->m2, C, F64),
        p->backward && p->of->activated ? error_of(reduction->dh.data, p->dh, n, p->type->kind) : 0,
    };
    errors[2] = worse(errors[2], error_of((const char *)invstd, p->invstd, C, F64));
    if (fits != !(p->of->misfits && p->type->kind == F32))
        errors[0] = NAN;
    const size_t end = begin_name(name, sizeof name, p->type->name, p->s, p->backward ? "backward" : "forward");
    snprintf(name + end, sizeof name - end, " %s at once%s", p->of->name, p->nontemporal ? " nontemporal" : "");
    print_case(name, errors, hash);
}

static void run_few(const cbn_isa *isa, few *p)
{
    const shape *s = p->s;
    const size_t n = elements_of(s), C = (size_t)s->n_channels, size = size_of(p->type->kind);
    const cbn_view none = view_of(s, NULL);
    char *y = output(n, size), *dh = output(n, size);
    double *invstd = doubles(C);
    cbn_tile reduction = {
        .x = view_of(s, p->x), .g = view_of(s, p->backward ? p->dy : p->x), .z = view_of(s, p->z),
        .y = view_of(s, p->x), .x_copy = none, .w = none, .dh = view_of(s, p->backward ? dh : NULL),
        .activated = p->of->activated, .act = p->of->act, .n_runs = s->n_runs, .n_channels = s->n_channels,
        .length = 1, .copies = 1, .forward_c = p->forward, .pitch = s->n_channels, .prefetch = 1,
        .shift_c = p->mean, .sum_c = doubles(C), .square_c = doubles(C),
    };
    cbn_tile apply = reduction;
    apply.y.data = y;
    apply.nontemporal = p->nontemporal;
    if (p->backward) {
        apply.g.data = p->of->activated ? dh : p->dy;
        apply.z.data = NULL, apply.activated = 0;
    }
    apply.checked = p->of->residual && !p->backward;
    if (p->backward)
        memcpy(invstd, p->invstd, C * sizeof *invstd);
    const cbn_solve solve = {.weight_c = p->weight, .bias_c = p->bias, .invstd_c = invstd, .eps = EPS,
                             .next = s->n_channels};
    const cbn_loops *loops = loops_of(isa, p->type->name);
    const int fits = (p->backward ? loops->backward_at_once : loops->forward_at_once)(&apply, &reduction, &solve);
    compare_few(p, &apply, &reduction, invstd, fits);
}

static void run_few_of(const cbn_isa *isa, const element_type *type, const shape *s)
{
    const int whole_lines = elements_of(s) / (size_t)s->n_runs * size_of(type->kind) % 64 == 0;
    for (size_t i = 0; i < COUNT_OF(few_cases); i++)
        for (int backward = 0; backward < 2; backward++) {
            few p = {.type = type, .s = s, .of = &few_cases[i], .backward = backward};
            few_inputs(&p);
            for (p.nontemporal = 0; p.nontemporal <= whole_lines; p.nontemporal++) /* as the engine */
                run_few(isa, &p);
            forget();
        }
}

void run_others(const cbn_isa *isa)
{
    for (size_t t = 0; t < COUNT_OF(types); t++) {
        for (size_t i = 0; i < COUNT_OF(shapes); i++) {
            for (size_t k = 0; k < COUNT_OF(countings); k++)
                run_count(isa, &types[t], &shapes[i], &countings[k]);
            run_second(isa, &types[t], &shapes[i]);
        }
        for (size_t i = 0; (types[t].kind == F32 || types[t].kind == F64) && i < COUNT_OF(few_shapes); i++)
            run_few_of(isa, &types[t], &few_shapes[i]);
    }
}
