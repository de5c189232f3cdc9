/* kernels.c: the CPU backend, every op of the forward pass in plain C.
 *
 * Owns: the ops, each a loop over the activations of a device. The device itself, its memory and
 * its weights are device.h's. Knows nothing of requests, of blocks beyond a step's block table, or
 * of other backends. It is also the specification of kernels.cu: where the two differ, this file
 * is right.
 *
 * How data flows: `upload` packs a matrix once into *panels* of 64 outputs side by side for each k.
 * One small product kernel (64 outputs x 1 to 6 rows, held in registers) reads panels, and serves
 * decode and prefill alike; processors that can multiply pairs of bf16 or quads of bytes have one
 * each. An op cuts its work into tiles, which the threads of the pool take one by one, those of
 * decoding devices first.
 *
 * Invariants:
 *   - Each output element is summed over k in one fixed order that depends on its own row alone,
 *     and every loop over elements works on whole, padded vectors: so the bits do not depend on
 *     the batch, on chunking, on the number of threads or of shards.
 *   - Activation rows are padded with zeros to PAD elements, which no op ever overwrites.
 *
 * Read next: device.h, pack.h, product.h, dot.h, append.h, attention.h, probe.h. */
#include "dynamo.h"

#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "device.h"
#define ATTENTION_IMPLEMENTATION
#include "attention.h"
#define PRODUCT_IMPLEMENTATION
#include "lib/product.h"
#define PROBE_IMPLEMENTATION
#include "lib/probe.h"
#define APPEND_IMPLEMENTATION
#include "append.h"
#define SAMPLER_IMPLEMENTATION
#include "lib/sampler.h"

enum {
    TILES_A_THREAD = 8, /* so that all end at about the same time */
    CHUNK_ROWS = 256,   /* of a step: enough for full tiles, and soon done */
    NORM_ROWS = 8,      /* rows of a tile of the cheap ops */
    MANY_ROWS = 64,     /* of a step that appends: then a tile takes the rows of a block, */
    FEW_ROWS = 4        /* else so many, that every thread gets some */
};

/* ---- products ---- */

enum product_kind { PRODUCT_STORE, PRODUCT_SILU, PRODUCT_SEGMENTS };

struct product { /* up to three matrices times the same rows */
    const struct cpu_device *device;
    enum product_kind kind;
    const struct weight *matrix[3], *bias[3]; /* bias: NULL, or (n_rows of the matrix) */
    float *out[3];                            /* (n_rows, out_stride) */
    size_t out_stride[3];
    int n_panels[3], first_tile[4]; /* panels of each matrix; tiles before it */
    const float *rows;              /* (n_rows, stride) the input as it is */
    size_t stride;
    const char *input[N_FORMS];   /* (n_rows) the same in the forms that the matrices want */
    size_t input_stride[N_FORMS]; /* bytes */
    int n_rows, chunk_rows, n_chunks;
    int unit, first_segment, n_segments; /* PRODUCT_SEGMENTS */
    bool add;                            /* out += */
};

static void finish_row(const struct product *product, int which, int row, int begin, int end,
                       const float *sums) {
    float *out = product->out[which] + (size_t)row * product->out_stride[which];
    const struct weight *bias = product->bias[which];
    for (int i = 0; i < end - begin; i += LANES) {
        int n = end - begin - i;
        vec value = load(sums + i);
        if (bias)
            value += load_part(bias->vector + begin + i, n);
        if (product->add)
            value += load_part(out + begin + i, n);
        store_part(out + begin + i, value, n);
    }
}

static void take_rows(const struct product *product, const struct weight *matrix, int row,
                      struct tile *tile) {
    tile->form = dot_form(matrix->type, product->device->cpu->plain);
    tile->stride = product->input_stride[tile->form];
    tile->input = product->input[tile->form] + (size_t)row * tile->stride;
}

/* The panel that tile `tile` computes. Threads take tiles in turn, and the processor reads ahead
 * where memory is read in order: so tiles that one thread is likely to take are neighbours. */
static int walk(int tile, int n_panels, int n_threads) {
    int own = n_panels / n_threads;
    return tile < own * n_threads ? tile % n_threads * own + tile / n_threads : tile;
}

/* One panel (of gate and of up, for PRODUCT_SILU) times one chunk of rows. */
static void product_tile(const void *argument, int index, struct scratch *scratch) {
    const struct product *product = argument;
    int which = 0;
    while (index >= product->first_tile[which + 1])
        which++;
    index -= product->first_tile[which];
    const struct weight *matrix = product->matrix[which];
    int at = index / product->n_chunks;
    if (product->n_chunks == 1) /* else neighbouring tiles share a panel, which is better still */
        at = walk(at, product->n_panels[which], product->device->cpu->pool.n_threads);
    int panel = matrix->first_row / PANEL + at;
    int row = index % product->n_chunks * product->chunk_rows;
    int n_rows = product->n_rows - row;
    n_rows = n_rows < product->chunk_rows ? n_rows : product->chunk_rows;
    size_t offset = (size_t)panel * matrix->panel_bytes;
    struct tile tile = {.panel = matrix->panels + offset,
                        .end = matrix->cols,
                        .out = scratch->tile[0],
                        .ahead = true};
    take_rows(product, matrix, row, &tile);
    if (product->kind == PRODUCT_SEGMENTS) {
        segment_product(matrix, product->unit, product->first_segment, product->n_segments, tile,
                        n_rows, scratch->slab, scratch->tile + 1);
    } else {
        panel_product(matrix->type, tile, n_rows, scratch->slab);
    }
    if (product->kind == PRODUCT_SILU) {
        const struct weight *up = product->matrix[1];
        tile.panel = up->panels + (size_t)panel * up->panel_bytes;
        tile.out = scratch->tile[1];
        take_rows(product, up, row, &tile);
        panel_product(up->type, tile, n_rows, scratch->slab);
        silu_multiply(scratch->tile[0], scratch->tile[1], n_rows * PANEL);
    }
    /* a shard may start and end inside a panel */
    int begin = panel * PANEL - matrix->first_row, end = begin + PANEL;
    int from = begin < 0 ? -begin : 0;
    end = end < matrix->n_rows ? end : matrix->n_rows;
    for (int i = 0; i < n_rows; i++)
        finish_row(product, which, row + i, begin + from, end, scratch->tile[0] + i * PANEL + from);
}

struct conversion {
    const struct product *product;
    enum row_form form;
};

/* Rows into a form, segment by segment where K is cut. */
static void convert_tile(const void *argument, int tile, struct scratch *scratch) {
    const struct conversion *conversion = argument;
    const struct product *product = conversion->product;
    const struct weight *matrix = product->matrix[0];
    (void)scratch;
    int n_segments = product->kind == PRODUCT_SEGMENTS ? product->n_segments : 1;
    int end_row =
        (tile + 1) * NORM_ROWS < product->n_rows ? (tile + 1) * NORM_ROWS : product->n_rows;
    for (int row = tile * NORM_ROWS; row < end_row; row++) {
        const float *from = product->rows + (size_t)row * product->stride;
        char *to = product->device->converted[conversion->form] +
                   (size_t)row * product->input_stride[conversion->form];
        for (int i = 0; i < n_segments; i++) {
            int segment = product->first_segment + i, begin = 0, end = matrix->cols;
            if (product->kind == PRODUCT_SEGMENTS) {
                begin = segment_begin(matrix->cols, product->unit, segment);
                end = segment_begin(matrix->cols, product->unit, segment + 1);
            }
            dot_convert(conversion->form, from, begin, end, to);
            from += end - begin;
            to += dot_form_bytes(conversion->form, begin, end);
        }
    }
}

/* The input in each form that one of the matrices wants. */
static void convert_rows(struct cpu_device *device, struct product *product, int n_matrices) {
    product->input[FORM_F32] = (const char *)product->rows;
    product->input_stride[FORM_F32] = product->stride * sizeof(float);
    for (int i = 0; i < n_matrices; i++) {
        enum row_form form = dot_form(product->matrix[i]->type, device->cpu->plain);
        if (product->input[form])
            continue;
        struct conversion conversion = {product, form};
        product->input[form] = device->converted[form];
        product->input_stride[form] = device->converted_stride[form];
        parallel_for(device, divide_up(product->n_rows, NORM_ROWS), convert_tile, &conversion);
    }
}

/* n_matrices side by side, but for PRODUCT_SILU, which makes one of two. */
static void run_product(struct cpu_device *device, struct product *product, int n_matrices) {
    int n_chunks = divide_up(product->n_rows, ROW_CHUNK);
    if (n_chunks == 0)
        return;
    product->device = device;
    convert_rows(device, product, product->kind == PRODUCT_SILU ? 2 : n_matrices);
    int rows = (int)round_up((size_t)divide_up(product->n_rows, n_chunks), TILE_ROWS);
    product->chunk_rows = rows;
    product->n_chunks = divide_up(product->n_rows, rows);
    int n_tiles = 0;
    for (int i = 0; i < n_matrices; i++) {
        const struct weight *matrix = product->matrix[i];
        int first = matrix->first_row / PANEL;
        product->n_panels[i] = divide_up(matrix->first_row + matrix->n_rows, PANEL) - first;
        n_tiles += product->n_panels[i] * product->n_chunks;
        product->first_tile[i + 1] = n_tiles;
    }
    parallel_for(device, n_tiles, product_tile, product);
}

/* ---- cheap ops over rows ---- */

/* out = x / sqrt(mean(x^2) + epsilon) * weight, over n elements */
static void rmsnorm(float *out, const float *x, const float *weight, int n, float epsilon) {
    vec squares = {0};
    for (int i = 0; i < n; i += LANES) {
        vec value = load_part(x + i, n - i);
        squares += value * value;
    }
    float scale = 1.0f / sqrtf(sum_lanes(squares) / (float)n + epsilon);
    for (int i = 0; i < n; i += LANES) {
        vec value = load_part(x + i, n - i) * scale * load_part(weight + i, n - i);
        store_part(out + i, value, n - i);
    }
}

struct row_job {
    struct cpu_device *device;
    const struct weight *weight;
    const struct weight *const *layer;
    const int *rows; /* (n_rows) row of x that each row is made from; NULL: its own */
    struct cpu_device **shards;
    int n_rows, n_shards, layer_index, tile_rows;
    void (*run)(const struct row_job *job, int row);
};

static void row_tile(const void *argument, int tile, struct scratch *scratch) {
    const struct row_job *job = argument;
    (void)scratch;
    int end = (tile + 1) * NORM_ROWS < job->n_rows ? (tile + 1) * NORM_ROWS : job->n_rows;
    for (int row = tile * NORM_ROWS; row < end; row++)
        job->run(job, row);
}

static void for_rows(const struct row_job *job) {
    int n_tiles = divide_up(job->n_rows, NORM_ROWS);
    if (n_tiles > 0)
        parallel_for(job->device, n_tiles, row_tile, job);
}

static void norm_row(const struct row_job *job, int row) {
    struct cpu_device *device = job->device;
    size_t from = (size_t)(job->rows ? job->rows[row] : row);
    rmsnorm(device->h + (size_t)row * device->x_stride, device->x + from * device->x_stride,
            job->weight->vector, device->device.config->d_model,
            device->device.config->norm_epsilon);
}

static void norm_rows(struct cpu_device *device, const struct weight *weight, const int *rows,
                      int n_rows) {
    struct row_job job = {
        .device = device, .weight = weight, .rows = rows, .n_rows = n_rows, .run = norm_row};
    for_rows(&job);
}

static void embed_row(const struct row_job *job, int row) {
    struct cpu_device *device = job->device;
    pack_read_row(job->weight, device->batch->token[row],
                  device->x + (size_t)row * device->x_stride);
}

static void cpu_embed(struct device *base, const struct weight *token_embd) {
    struct cpu_device *device = (struct cpu_device *)base;
    struct row_job job = {
        .device = device, .weight = token_embd, .n_rows = device->batch->n_rows, .run = embed_row};
    for_rows(&job);
}

static void turn_row(const struct row_job *job, int row) { /* the angles of a position */
    const struct device *device = &job->device->device;
    append_angles(job->device->turn + (size_t)(row * 2 * device->config->rope_dim), device->config,
                  device->rope_frequency, job->device->batch->position[row]);
}

/* A head's keys and values in the blocks of a sequence: (n_layers, {k, v}, heads, 16 * dim).
 * next: the next head's are read after these. */
static struct kv_view kv_view(const struct cpu_device *device, const struct sequence *sequence,
                              int layer, int head, bool next) {
    const struct model_config *config = device->device.config;
    enum kv_type type = device->device.kv_type;
    size_t block = block_bytes(config, device->device.n_shards, type) / kv_element_bytes(type);
    size_t plane = (size_t)BLOCK_TOKENS * (size_t)config->head_dim;
    size_t key = ((size_t)(layer * 2) * (size_t)device->n_kv_heads + (size_t)head) * plane;
    return (struct kv_view){.type = type,
                            .dim = config->head_dim,
                            .kv = device->device.kv,
                            .block_elements = block,
                            .key = key,
                            .value = key + (size_t)device->n_kv_heads * plane,
                            .next_key = next ? key + plane : key,
                            .table = device->batch->block_table + sequence->first_block};
}

static void turn_heads(const struct cpu_device *device, const struct weight *norm, float *heads,
                       int n_heads, int row) {
    const struct model_config *config = device->device.config;
    const float *turn = device->turn + (size_t)(row * 2 * config->rope_dim);
    for (int head = 0; head < n_heads; head++, heads += config->head_dim) {
        if (norm)
            rmsnorm(heads, heads, norm->vector, config->head_dim, config->norm_epsilon);
        append_turn(heads, turn, config);
    }
}

/* Rows that stand in one block are written together. */
static void append_rows(const struct row_job *job, int row, int end) {
    const struct cpu_device *device = job->device;
    const struct batch *batch = device->batch;
    while (row < end) {
        const struct sequence *sequence = &batch->sequence[batch->row_sequence[row]];
        int position = batch->position[row], n = BLOCK_TOKENS - position % BLOCK_TOKENS;
        int left = sequence->first_row + sequence->n_rows - row;
        left = left < end - row ? left : end - row;
        n = n < left ? n : left;
        size_t at = (size_t)row * device->kv_stride;
        for (int head = 0; head < device->n_kv_heads; head++) {
            struct kv_view view = kv_view(device, sequence, job->layer_index, head, false);
            append_write(&view, position, n, device->k + at, device->v + at, device->kv_stride);
            at += (size_t)view.dim;
        }
        row += n;
    }
}

static void append_tile(const void *argument, int tile, struct scratch *scratch) {
    const struct row_job *job = argument;
    const struct cpu_device *device = job->device;
    (void)scratch;
    int first = tile * job->tile_rows, end = first + job->tile_rows;
    end = end < job->n_rows ? end : job->n_rows;
    for (int row = first; row < end; row++) {
        turn_heads(device, job->layer[ATTN_Q_NORM], device->q + (size_t)row * device->q_stride,
                   device->n_heads, row);
        turn_heads(device, job->layer[ATTN_K_NORM], device->k + (size_t)row * device->kv_stride,
                   device->n_kv_heads, row);
    }
    append_rows(job, first, end);
}

static void cpu_rope_append(struct device *base, const struct weight *const *layer,
                            int layer_index) {
    struct cpu_device *device = (struct cpu_device *)base;
    int n_rows = device->batch->n_rows;
    struct row_job job = {.device = device,
                          .layer = layer,
                          .layer_index = layer_index,
                          .n_rows = n_rows,
                          .tile_rows = n_rows > MANY_ROWS ? BLOCK_TOKENS : FEW_ROWS};
    parallel_for(device, divide_up(n_rows, job.tile_rows), append_tile, &job);
}

static void cpu_norm_qkv(struct device *base, const struct weight *const *layer) {
    struct cpu_device *device = (struct cpu_device *)base;
    norm_rows(device, layer[ATTN_NORM], NULL, device->batch->n_rows);
    struct product product = {
        .matrix = {layer[ATTN_Q], layer[ATTN_K], layer[ATTN_V]},
        .bias = {layer[Q_BIAS], layer[K_BIAS], layer[V_BIAS]},
        .out = {device->q, device->k, device->v},
        .out_stride = {device->q_stride, device->kv_stride, device->kv_stride},
        .rows = device->h,
        .stride = device->x_stride,
        .n_rows = device->batch->n_rows};
    run_product(device, &product, 3);
}

static void cpu_norm_gate_up(struct device *base, const struct weight *const *layer) {
    struct cpu_device *device = (struct cpu_device *)base;
    norm_rows(device, layer[FFN_NORM], NULL, device->batch->n_rows);
    struct product product = {.kind = PRODUCT_SILU,
                              .matrix = {layer[FFN_GATE], layer[FFN_UP]},
                              .out = {device->ffn},
                              .out_stride = {device->ffn_stride},
                              .rows = device->h,
                              .stride = device->x_stride,
                              .n_rows = device->batch->n_rows};
    run_product(device, &product, 1);
}

/* Segments end between heads, or at an even k: where any number of shards cuts the matrix. */
static void cpu_project_add(struct device *base, const struct weight *matrix,
                            enum product_input input) {
    struct cpu_device *device = (struct cpu_device *)base;
    bool attends = input == INPUT_ATTENTION;
    int n_segments = K_SEGMENTS / base->n_shards;
    struct product product = {.kind = PRODUCT_SEGMENTS,
                              .matrix = {matrix},
                              .out = {base->n_shards == 1 ? device->x : device->partial},
                              .out_stride = {device->x_stride},
                              .rows = attends ? device->attention : device->ffn,
                              .stride = attends ? device->q_stride : device->ffn_stride,
                              .n_rows = device->batch->n_rows,
                              .unit = attends ? base->config->head_dim : 2,
                              .first_segment = base->rank * n_segments,
                              .n_segments = n_segments,
                              .add = base->n_shards == 1};
    run_product(device, &product, 1);
}

static void reduce_row(const struct row_job *job, int row) {
    size_t at = (size_t)row * job->device->x_stride;
    for (int i = 0; i < job->device->device.config->d_model; i += LANES, at += LANES) {
        vec sum[MAX_SHARDS];
        for (int shard = 0; shard < job->n_shards; shard++)
            sum[shard] = load(job->shards[shard]->partial + at);
        for (int n = job->n_shards; n > 1; n /= 2)
            for (int j = 0; j < n / 2; j++)
                sum[j] = sum[2 * j] + sum[2 * j + 1];
        vec total = load(job->device->x + at) + sum[0];
        for (int shard = 0; shard < job->n_shards; shard++)
            store(job->shards[shard]->x + at, total);
    }
}

static void cpu_all_reduce_add(struct device **shards, int n_shards) {
    struct cpu_device *device = (struct cpu_device *)shards[0];
    if (n_shards == 1)
        return; /* project_add has done it */
    struct row_job job = {.device = device,
                          .shards = (struct cpu_device **)shards,
                          .n_shards = n_shards,
                          .n_rows = device->batch->n_rows,
                          .run = reduce_row};
    for_rows(&job);
}

/* ---- attention ---- */

struct attention_job {
    const struct cpu_device *device;
    int layer, heads, n_head_groups; /* heads: that a tile takes */
};

/* Queries of one sequence and one KV head: (row, head of the group), flattened. */
static void attend(const struct attention_job *job, const struct sequence *sequence, int first,
                   int head, bool next, struct attention_scratch *scratch) {
    const struct cpu_device *device = job->device;
    int dim = device->device.config->head_dim, group = device->n_heads / device->n_kv_heads;
    int n = sequence->n_rows * group - first < QUERIES ? sequence->n_rows * group - first : QUERIES;
    int position[QUERIES] = {0};
    size_t at[QUERIES];
    float scale = 1.0f / sqrtf((float)dim);
    for (int i = 0; i < n; i++) {
        int row = (first + i) / group, own_head = head * group + (first + i) % group;
        position[i] = sequence->start + row;
        at[i] = (size_t)(sequence->first_row + row) * device->q_stride + (size_t)(own_head * dim);
        for (int j = 0; j < dim; j++)
            scratch->query[i * ATTENTION_STRIDE + j] = device->q[at[i] + (size_t)j] * scale;
    }
    struct kv_view view = kv_view(device, sequence, job->layer, head, next);
    attention_rows(&view, n, position, scratch);
    for (int i = 0; i < n; i++)
        memcpy(device->attention + at[i], scratch->output + i * ATTENTION_STRIDE,
               sizeof(float) * (size_t)dim);
}

/* A thread takes neighbouring heads: their keys are neighbours in a block, and being read ahead. */
static void attention_tile(const void *argument, int index, struct scratch *scratch) {
    const struct attention_job *job = argument;
    const struct cpu_device *device = job->device;
    const struct batch *batch = device->batch;
    int which = 0, head = index % job->n_head_groups * job->heads;
    int last = head + job->heads < device->n_kv_heads ? head + job->heads : device->n_kv_heads;
    index =
        device->first_tile[batch->n_sequences] - 1 - index / job->n_head_groups; /* long first */
    while (index >= device->first_tile[which + 1])
        which++;
    int first = (index - device->first_tile[which]) * QUERIES;
    for (; head < last; head++)
        attend(job, &batch->sequence[which], first, head, head + 1 < last, &scratch->attention);
}

static void cpu_attention(struct device *base, int layer_index) {
    struct cpu_device *device = (struct cpu_device *)base;
    int n_tiles = device->first_tile[device->batch->n_sequences], n_heads = device->n_kv_heads;
    int enough = TILES_A_THREAD * device->cpu->pool.n_threads;
    int heads = n_tiles * n_heads / enough < n_heads ? n_tiles * n_heads / enough : n_heads;
    struct attention_job job = {device, layer_index, heads > 1 ? heads : 1, 0};
    job.n_head_groups = divide_up(n_heads, job.heads);
    if (n_tiles > 0)
        parallel_for(device, n_tiles * job.n_head_groups, attention_tile, &job);
}

/* ---- sampling ---- */

/* Of samples [first, first + n) of the step, n <= LOGIT_ROWS. */
static void compute_logits(struct cpu_device *device, const struct weight *const *weights,
                           int first, int n) {
    norm_rows(device, weights[OUTPUT_NORM], device->batch->sample_row + first, n);
    struct product product = {.matrix = {weights[OUTPUT]},
                              .out = {device->logits},
                              .out_stride = {(size_t)device->device.config->vocab_size},
                              .rows = device->h,
                              .stride = device->x_stride,
                              .n_rows = n};
    run_product(device, &product, 1);
}

struct draw_job {
    const struct cpu_device *device;
    int first;
};

static void draw_tile(const void *argument, int index, struct scratch *scratch) {
    const struct draw_job *job = argument;
    const struct cpu_device *device = job->device;
    const struct batch *batch = device->batch;
    (void)scratch;
    int n = device->device.config->vocab_size, sample = job->first + index;
    size_t at = (size_t)index * (size_t)n;
    int position = batch->position[batch->sample_row[sample]] + 1;
    device->sampled[sample] = sampler_draw(&batch->sampling[sample], position, device->logits + at,
                                           n, device->scaled + at, device->candidates + at);
}

/* The tokens of samples [first, first + n), of which the logits are there. */
static void draw_tokens(struct cpu_device *device, int first, int n) {
    const struct draw_job job = {device, first};
    parallel_for(device, n, draw_tile, &job);
}

static void cpu_sample(struct device *base, const struct weight *const *weights, float *logits) {
    struct cpu_device *device = (struct cpu_device *)base;
    size_t vocab = (size_t)base->config->vocab_size;
    int n_samples = device->batch->n_samples;
    for (int first = 0; first < n_samples; first += LOGIT_ROWS) {
        int n = n_samples - first < LOGIT_ROWS ? n_samples - first : LOGIT_ROWS;
        compute_logits(device, weights, first, n);
        if (logits)
            memcpy(logits + (size_t)first * vocab, device->logits,
                   (size_t)n * vocab * sizeof *logits);
        draw_tokens(device, first, n);
    }
}

/* ---- a step ---- */

static bool cpu_step_begin(struct device *base, const struct batch *batch) {
    struct cpu_device *device = (struct cpu_device *)base;
    assert(batch->n_rows <= base->max_rows && batch->n_samples <= base->max_samples);
    if (base->rank == 0) /* one thread drives all shards of a worker */
        pool_enter(&device->cpu->pool);
    device->batch = batch;
    int group = device->n_heads / device->n_kv_heads;
    for (int i = 0; i < batch->n_sequences; i++) {
        device->first_tile[i + 1] =
            device->first_tile[i] + divide_up(batch->sequence[i].n_rows * group, QUERIES);
    }
    struct row_job job = {.device = device, .n_rows = batch->n_rows, .run = turn_row};
    for_rows(&job);
    return true;
}

static void cpu_step_end(struct device *base, int *sampled) {
    struct cpu_device *device = (struct cpu_device *)base;
    if (sampled && base->rank == 0)
        memcpy(sampled, device->sampled, sizeof *sampled * (size_t)device->batch->n_samples);
    device->batch = NULL;
    if (base->rank == 0)
        pool_leave(&device->cpu->pool);
}

/* ---- the backend ---- */

static void cpu_close(struct backend *backend) {
    struct cpu_backend *cpu = (struct cpu_backend *)backend;
    pool_close(&cpu->pool);
    copier_close(&cpu->copier);
    while (cpu->weights) {
        struct weight *weight = cpu->weights;
        cpu->weights = weight->next;
        if (weight->owner)
            free(weight->panels);
        pack_close(weight);
    }
    free(cpu);
}

static const struct backend operations = {
    .name = "cpu",
    .close = cpu_close,
    .device_open = cpu_device_open,
    .device_close = cpu_device_close,
    .alloc = cpu_alloc,
    .release = cpu_release,
    .free_memory = cpu_free_memory,
    .upload = cpu_upload,
    .limits = cpu_limits,
    .copy = cpu_copy,
    .copy_done = cpu_copy_done,
    .step_begin = cpu_step_begin,
    .embed = cpu_embed,
    .norm_qkv = cpu_norm_qkv,
    .rope_append = cpu_rope_append,
    .attention = cpu_attention,
    .project_add = cpu_project_add,
    .norm_gate_up = cpu_norm_gate_up,
    .all_reduce_add = cpu_all_reduce_add,
    .sample = cpu_sample,
    .step_end = cpu_step_end,
    .kv_type = KV_F32,
    .chunk = CHUNK_ROWS,
};

struct backend *cpu_backend_open(const struct backend_options *options, char *error) {
    struct cpu_backend *cpu = aligned_alloc(128, round_up(sizeof *cpu, 128));
    if (!cpu) {
        (void)fail(error, "no memory for the CPU backend");
        return NULL;
    }
    memset(cpu, 0, sizeof *cpu);
    cpu->backend = operations;
    cpu->plain = options->plain;
    pthread_mutex_init(&cpu->upload_mutex, NULL);
    if (!copier_open(&cpu->copier, options->copy_delay_seed)) {
        (void)fail(error, "the copier thread of the CPU backend did not start");
        free(cpu);
        return NULL;
    }
    int n_threads = options->n_threads > 1 ? options->n_threads : 1;
    int n_started = pool_open(&cpu->pool, n_threads, sizeof(struct scratch));
    if (n_started < n_threads) {
        (void)fail(error, "%d threads: only %d did start", n_threads, n_started);
        cpu_close(&cpu->backend);
        return NULL;
    }
    return &cpu->backend;
}
