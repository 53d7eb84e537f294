/* onednn.c: batch normalization by oneDNN 2.x (Debian's libdnnl-dev), behind five functions for ctypes.
 *
 * The library's C interface. A context is one primitive in one memory format; data comes in as plain NCHW or NHWC and
 * is reordered outside of what is timed. Built on demand by benchmarks/native.py.
 */
#include <dnnl.h>
#include <stdlib.h>

typedef struct {
    dnnl_engine_t engine;
    dnnl_stream_t stream;
    dnnl_memory_desc_t plain, format;
    dnnl_primitive_t primitive;
    dnnl_memory_t src, dst, diff_dst, diff_src, mean, variance, scale_shift, diff_scale_shift;
    int op; /* 0 eval, 1 train, 2 backward */
} context;

#define TRY(call)                      \
    do {                               \
        dnnl_status_t status = (call); \
        if (status != dnnl_success)    \
            return (int)status;        \
    } while (0)

static int memory(context *c, const dnnl_memory_desc_t *desc, dnnl_memory_t *out)
{
    TRY(dnnl_memory_create(out, desc, c->engine, DNNL_MEMORY_ALLOCATE));
    return 0;
}

/* format: 0 nchw, 1 nhwc, 2 nChw8c, 3 nChw16c; plain: what fill and fetch speak, 0 nchw, 1 nhwc */
int onednn_create(context **out, int op, int format, int plain, int64_t n, int64_t ch, int64_t h, int64_t w, float eps)
{
    static const dnnl_format_tag_t tags[] = {dnnl_nchw, dnnl_nhwc, dnnl_nChw8c, dnnl_nChw16c};
    const dnnl_dims_t dims = {n, ch, h, w}, pair = {2, ch}, one = {ch};
    context *c = *out = calloc(1, sizeof *c);
    c->op = op;
    TRY(dnnl_engine_create(&c->engine, dnnl_cpu, 0));
    TRY(dnnl_stream_create(&c->stream, c->engine, dnnl_stream_default_flags));
    TRY(dnnl_memory_desc_init_by_tag(&c->plain, 4, dims, dnnl_f32, tags[plain]));
    TRY(dnnl_memory_desc_init_by_tag(&c->format, 4, dims, dnnl_f32, tags[format]));
    dnnl_memory_desc_t scale_md, stat_md;
    TRY(dnnl_memory_desc_init_by_tag(&scale_md, 2, pair, dnnl_f32, dnnl_nc));
    TRY(dnnl_memory_desc_init_by_tag(&stat_md, 1, one, dnnl_f32, dnnl_x));
    dnnl_batch_normalization_desc_t forward, backward;
    dnnl_primitive_desc_t hint, desc;
    const unsigned flags = dnnl_use_scaleshift | (op == 0 ? dnnl_use_global_stats : 0);
    TRY(dnnl_batch_normalization_forward_desc_init(
        &forward, op == 0 ? dnnl_forward_inference : dnnl_forward_training, &c->format, eps, flags));
    TRY(dnnl_primitive_desc_create(&hint, &forward, NULL, c->engine, NULL));
    desc = hint;
    if (op == 2) {
        TRY(dnnl_batch_normalization_backward_desc_init(&backward, dnnl_backward, &c->format, &c->format, eps, flags));
        TRY(dnnl_primitive_desc_create(&desc, &backward, NULL, c->engine, hint));
    }
    TRY(dnnl_primitive_create(&c->primitive, desc));
    TRY(memory(c, &c->format, &c->src));
    TRY(memory(c, &c->format, op == 2 ? &c->diff_src : &c->dst));
    if (op == 2)
        TRY(memory(c, &c->format, &c->diff_dst));
    TRY(memory(c, &stat_md, &c->mean));
    TRY(memory(c, &stat_md, &c->variance));
    TRY(memory(c, &scale_md, &c->scale_shift));
    TRY(memory(c, &scale_md, &c->diff_scale_shift));
    return 0;
}

static dnnl_memory_t slot(context *c, int which)
{
    dnnl_memory_t all[] = {c->src, c->op == 2 ? c->diff_src : c->dst, c->diff_dst,
                           c->mean, c->variance, c->scale_shift, c->diff_scale_shift};
    return all[which];
}

/* which: 0 src, 1 result, 2 diff_dst, 3 mean, 4 variance, 5 scale and shift, 6 their gradients */
int onednn_fill(context *c, int which, void *data, int back)
{
    dnnl_memory_t target = slot(c, which), plain;
    const dnnl_memory_desc_t *desc;
    TRY(dnnl_memory_get_memory_desc(target, &desc));
    TRY(dnnl_memory_create(&plain, which < 3 ? &c->plain : desc, c->engine, data));
    dnnl_memory_t from = back ? target : plain, to = back ? plain : target;
    const dnnl_memory_desc_t *from_md, *to_md;
    TRY(dnnl_memory_get_memory_desc(from, &from_md));
    TRY(dnnl_memory_get_memory_desc(to, &to_md));
    dnnl_primitive_desc_t desc_reorder;
    dnnl_primitive_t reorder;
    TRY(dnnl_reorder_primitive_desc_create(&desc_reorder, from_md, c->engine, to_md, c->engine, NULL));
    TRY(dnnl_primitive_create(&reorder, desc_reorder));
    dnnl_exec_arg_t args[] = {{DNNL_ARG_FROM, from}, {DNNL_ARG_TO, to}};
    TRY(dnnl_primitive_execute(reorder, c->stream, 2, args));
    TRY(dnnl_stream_wait(c->stream));
    dnnl_primitive_destroy(reorder);
    dnnl_primitive_desc_destroy(desc_reorder);
    dnnl_memory_destroy(plain);
    return 0;
}

int onednn_run(context *c)
{
    dnnl_exec_arg_t args[8] = {{DNNL_ARG_SRC, c->src},
                               {DNNL_ARG_MEAN, c->mean},
                               {DNNL_ARG_VARIANCE, c->variance},
                               {DNNL_ARG_SCALE_SHIFT, c->scale_shift}};
    int n = 4;
    if (c->op == 2) {
        args[n++] = (dnnl_exec_arg_t){DNNL_ARG_DIFF_DST, c->diff_dst};
        args[n++] = (dnnl_exec_arg_t){DNNL_ARG_DIFF_SRC, c->diff_src};
        args[n++] = (dnnl_exec_arg_t){DNNL_ARG_DIFF_SCALE_SHIFT, c->diff_scale_shift};
    } else
        args[n++] = (dnnl_exec_arg_t){DNNL_ARG_DST, c->dst};
    TRY(dnnl_primitive_execute(c->primitive, c->stream, n, args));
    TRY(dnnl_stream_wait(c->stream));
    return 0;
}

void onednn_destroy(context *c)
{
    dnnl_memory_t all[] = {c->src, c->dst, c->diff_dst, c->diff_src, c->mean, c->variance, c->scale_shift,
                           c->diff_scale_shift};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (all[i])
            dnnl_memory_destroy(all[i]);
    if (c->primitive)
        dnnl_primitive_destroy(c->primitive);
    free(c);
}

void onednn_version(int *version)
{
    const dnnl_version_t *v = dnnl_version();
    version[0] = v->major, version[1] = v->minor, version[2] = v->patch;
}
