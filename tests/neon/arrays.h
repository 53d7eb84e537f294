/* arrays.h: what the files of the driver share: elements of every type, their errors, the loops of a type.
 */
#ifndef CBN_NEON_ARRAYS_H
#define CBN_NEON_ARRAYS_H
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "half.h"
#include "kernels.h"

enum { F32, F64, BF16, F16, U8, I8 }; /* as tests/neon/__main__.py numbers them */

static inline size_t size_of(int64_t kind)
{
    static const size_t sizes[] = {4, 8, 2, 2, 1, 1};
    return sizes[kind];
}

static inline double value_of(const char *p, size_t i, int64_t kind)
{
    if (kind == F32)
        return ((const float *)p)[i];
    if (kind == F64)
        return ((const double *)p)[i];
    if (kind == U8 || kind == I8)
        return kind == U8 ? ((const uint8_t *)p)[i] : ((const int8_t *)p)[i];
    const uint16_t e = ((const uint16_t *)p)[i];
    return kind == BF16 ? cbn_from_bf16(e) : cbn_from_f16(e);
}

static inline void set_value(char *p, size_t i, int64_t kind, double v)
{
    if (kind == F32)
        ((float *)p)[i] = (float)v;
    else if (kind == F64)
        ((double *)p)[i] = v;
    else if (kind == U8 || kind == I8)
        p[i] = (char)(int)v;
    else
        ((uint16_t *)p)[i] = kind == BF16 ? cbn_to_bf16((float)v) : cbn_to_f16((float)v);
}

/* The largest difference, relative to the largest expected number; NaN where one is NaN, but not where both are. */
static inline double error_of(const char *p, const double *exact, size_t n, int64_t kind)
{
    double largest = 0, scale = 0;
    for (size_t i = 0; i < n; i++) {
        const double v = value_of(p, i, kind), d = v == exact[i] ? 0 : fabs(v - exact[i]);
        if (isnan(v) && isnan(exact[i]))
            continue;
        if (isnan(d))
            return NAN;
        largest = d > largest ? d : largest;
        scale = fabs(exact[i]) > scale ? fabs(exact[i]) : scale;
    }
    return scale > 0 ? largest / scale : largest;
}

/* The larger one of two errors; NaN where one is, which fmax would drop. */
static inline double worse(double a, double b)
{
    return isnan(a) || a > b ? a : b;
}

#define NO_DIGEST 0xcbf29ce484222325 /* of nothing */

static inline uint64_t digest(uint64_t hash, const void *p, size_t n)
{
    for (size_t i = 0; i < n; i++)
        hash = (hash ^ ((const unsigned char *)p)[i]) * 0x100000001b3;
    return hash;
}

/* Memory at no round address: what vectors of any set have to cope with. It lives until the next `forget`. */
char *output(size_t n, size_t size);
double *doubles(size_t n); /* zeros */
void forget(void);

static inline const cbn_loops *loops_of(const cbn_isa *isa, const char *type)
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

/* Of n_runs runs or rows: element i is of channel i / length % n_channels, as kernels.h says. */
typedef struct {
    int rows;
    ptrdiff_t n_runs, copies, n_channels, length;
} shape;

static inline size_t elements_of(const shape *s)
{
    return (size_t)(s->n_runs * s->copies * s->n_channels * s->length);
}

static inline size_t channel_of(const shape *s, size_t i)
{
    return i / (size_t)s->length % (size_t)s->n_channels;
}

/* The run, or the row of a tile. */
static inline size_t run_of(const shape *s, size_t i)
{
    return i / (size_t)(s->copies * s->n_channels * s->length);
}

static inline cbn_view view_of(const shape *s, char *data)
{
    return (cbn_view){data, s->copies * s->n_channels * s->length, s->length};
}

/* Between -1 and 1; the same numbers on every machine. */
static inline double uniform(uint64_t *state)
{
    *state = *state * 6364136223846793005 + 1442695040888963407;
    return (double)(int32_t)(*state >> 32) * 0x1p-31;
}

/* n elements about a center; of 8 bits, integers from 0 to 100. */
static inline char *random_elements(uint64_t *state, size_t n, int kind, double center, double spread)
{
    char *p = output(n, size_of(kind));
    for (size_t i = 0; i < n; i++) {
        const double a = uniform(state) + uniform(state) + uniform(state);
        set_value(p, i, kind, kind == U8 || kind == I8 ? 50 + 16 * a : center + spread * a);
    }
    return p;
}

static inline double *random_doubles(uint64_t *state, size_t n, double center, double spread)
{
    return (double *)random_elements(state, n, F64, center, spread);
}

/* The name of a case, to which its caller adds. */
static inline size_t begin_name(char *name, size_t size, const char *type, const shape *s, const char *direction)
{
    return (size_t)snprintf(name, size, "%s %s %tdx%tdx%tdx%td %s", type, s->rows ? "rows" : "runs", s->n_runs,
                            s->copies, s->n_channels, s->length, direction);
}

/* The line of a case: the errors of y or dx, of two statistics and of dh, and a digest of what was written. */
static inline void print_case(const char *name, const double *errors, uint64_t hash)
{
    printf("%s|%.3e|%.3e|%.3e|%.3e|%016llx\n", name, errors[0], errors[1], errors[2], errors[3],
           (unsigned long long)hash);
}

void run_selected(const cbn_isa *isa); /* selected.c */
void run_others(const cbn_isa *isa);   /* others.c */

#endif
