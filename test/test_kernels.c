/* test_kernels.c: every op of the CPU backend against a naive float64 reference, on random shapes.
 *
 * Each op is run on poisoned outputs; its inputs are read from the device's activations, so an
 * error is found in the op that makes it. Whole forward passes are then compared bit for bit
 * across batches, chunks, threads and shards; samplers with a brute-force definition. */
#include "../kernels.c"

#include "check.h"

enum { MAX_BLOCKS = 64 };

/* ---- random models ---- */

struct random {
    uint64_t state;
};

static uint32_t draw(struct random *random) { /* splitmix64 */
    uint64_t z = (random->state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (uint32_t)((z ^ (z >> 31)) >> 32);
}

static int below(struct random *random, int n) {
    return (int)(draw(random) % (uint32_t)n);
}

static float normal(struct random *random) { /* near enough to one */
    double sum = -6.0;
    for (int i = 0; i < 12; i++)
        sum += draw(random) * 0x1p-32;
    return (float)sum;
}

static uint16_t to_f16(float value) { /* of normal numbers, truncated */
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    int exponent = (int)(bits >> 23 & 255) - 112;
    uint32_t sign = bits >> 16 & 0x8000;
    return (uint16_t)(exponent < 1 ? sign : sign | (uint32_t)exponent << 10 | (bits >> 13 & 0x3ff));
}

static struct tensor *make_tensor(struct random *random, enum tensor_type type, int rows, int cols,
                                  float scale, float center) {
    struct tensor *tensor = calloc(1, sizeof *tensor);
    *tensor = (struct tensor){.name = {"t", 1}, .type = type, .rows = rows, .cols = cols};
    size_t n = (size_t)rows * (size_t)cols;
    struct pack_block form = pack_block(type);
    tensor->bytes = n / (size_t)form.n_k * (size_t)form.bytes + (n % (size_t)form.n_k) * 2;
    char *data = malloc(tensor->bytes);
    for (size_t i = 0; i < n && !pack_quantized(type); i++) {
        float value = center + scale * normal(random);
        uint16_t bits = type == TYPE_F16 ? to_f16(value) : to_bf16(value);
        if (type == TYPE_F32)
            memcpy(data + 4 * i, &value, 4);
        else
            memcpy(data + 2 * i, &bits, 2);
    }
    for (size_t at = 0; at < tensor->bytes && pack_quantized(type); at += (size_t)form.bytes) {
        /* where the f16 scales lie, and how large a number they multiply usually */
        size_t first = type == TYPE_Q6_K ? 208 : 0;
        float usual = type == TYPE_Q8_0   ? 70
                      : type == TYPE_Q4_0 ? 5
                      : type == TYPE_Q4_K ? 250
                                          : 1000;
        for (int i = 0; i < form.bytes; i++)
            data[at + (size_t)i] = (char)below(random, 256);
        uint16_t bits = to_f16(scale / usual * (1.0f + 0.3f * normal(random)));
        memcpy(data + at + first, &bits, 2);
        bits = to_f16(scale / 35 * (1.0f + 0.3f * normal(random)));
        if (type == TYPE_Q4_K)
            memcpy(data + at + 2, &bits, 2);
    }
    tensor->data = data;
    return tensor;
}

static void free_tensor(const struct tensor *tensor) {
    if (tensor) {
        free((void *)(uintptr_t)tensor->data);
        free((void *)(uintptr_t)tensor);
    }
}

static double from_f16(uint16_t half) {
    int exponent = half >> 10 & 31;
    double value =
        exponent ? ldexp(1024 + (half & 0x3ff), exponent - 25) : ldexp(half & 0x3ff, -24);
    return half & 0x8000 ? -value : value;
}

/* The formats as ggml's documentation of them says, element by element. */
static double element_q4_k(const char *block, int k) {
    const uint8_t *bytes = (const uint8_t *)block, *packed = bytes + 4;
    uint16_t d, m;
    memcpy(&d, bytes, 2);
    memcpy(&m, bytes + 2, 2);
    int j = k / 32, scale = packed[j] & 63, least = packed[j + 4] & 63;
    if (j >= 4) {
        scale = (packed[j + 4] & 0xf) | (packed[j - 4] >> 6) << 4;
        least = packed[j + 4] >> 4 | (packed[j] >> 6) << 4;
    }
    int bits = bytes[16 + k / 64 * 32 + k % 32] >> (k % 64 / 32 * 4) & 15;
    return from_f16(d) * scale * bits - from_f16(m) * least;
}

static double element_q6_k(const char *block, int k) {
    const uint8_t *bytes = (const uint8_t *)block;
    uint16_t d;
    memcpy(&d, bytes + 208, 2);
    int half = k / 128, quarter = k % 128 / 32, l = k % 32;
    int low = bytes[half * 64 + quarter % 2 * 32 + l] >> (quarter / 2 * 4) & 15;
    int high = bytes[128 + half * 32 + l] >> (quarter * 2) & 3;
    return from_f16(d) * (int8_t)bytes[192 + k / 16] * ((low | high << 4) - 32);
}

static double element(const struct tensor *tensor, int row, int col) {
    size_t i = (size_t)row * (size_t)tensor->cols + (size_t)col;
    const char *data = tensor->data;
    uint16_t half;
    uint32_t bits;
    float value;
    switch (tensor->type) {
    case TYPE_F32: memcpy(&value, data + 4 * i, 4); return (double)value;
    case TYPE_BF16:
        memcpy(&half, data + 2 * i, 2);
        bits = (uint32_t)half << 16;
        memcpy(&value, &bits, 4);
        return (double)value;
    case TYPE_F16: memcpy(&half, data + 2 * i, 2); return from_f16(half);
    case TYPE_Q8_0:
        memcpy(&half, data + i / 32 * 34, 2);
        return from_f16(half) * (double)(int8_t)data[i / 32 * 34 + 2 + i % 32];
    case TYPE_Q4_0:
        memcpy(&half, data + i / 32 * 18, 2);
        return from_f16(half) *
               ((((uint8_t)data[i / 32 * 18 + 2 + i % 16]) >> (i % 32 / 16 * 4) & 15) - 8);
    case TYPE_Q4_K: return element_q4_k(data + i / 256 * 144, (int)(i % 256));
    case TYPE_Q6_K: return element_q6_k(data + i / 256 * 210, (int)(i % 256));
    }
    return NAN;
}

struct model_under_test {
    struct model_config config;
    const struct tensor *layer[2][N_ROLES];
    const struct tensor *token_embd, *output_norm;
    float frequency[MAX_HEAD_DIM];
    int group;
};

static void make_layer(struct random *random, const struct model_config *config,
                       enum tensor_type type, const struct tensor **layer) {
    int d = config->d_model, q = config->n_heads * config->head_dim;
    int kv = config->n_kv_heads * config->head_dim;
    float scale = 1.0f / sqrtf((float)d);
    bool biased = draw(random) & 1, normed = draw(random) & 1;
    const struct tensor *made[N_ROLES] = {
        [ATTN_NORM] = make_tensor(random, TYPE_F32, 1, d, 0.2f, 1.0f),
        [ATTN_Q] = make_tensor(random, type, q, d, scale, 0),
        [ATTN_K] = make_tensor(random, type, kv, d, scale, 0),
        [ATTN_V] = make_tensor(random, type, kv, d, scale, 0),
        [Q_BIAS] = biased ? make_tensor(random, TYPE_F32, 1, q, 1, 0) : NULL,
        [K_BIAS] = biased ? make_tensor(random, TYPE_F32, 1, kv, 1, 0) : NULL,
        [V_BIAS] = biased ? make_tensor(random, TYPE_F32, 1, kv, 1, 0) : NULL,
        [ATTN_Q_NORM] = normed ? make_tensor(random, TYPE_F32, 1, config->head_dim, 0.2f, 1) : NULL,
        [ATTN_K_NORM] = normed ? make_tensor(random, TYPE_F32, 1, config->head_dim, 0.2f, 1) : NULL,
        [ATTN_OUTPUT] = make_tensor(random, type, d, q, scale, 0),
        [FFN_NORM] = make_tensor(random, TYPE_F32, 1, d, 0.2f, 1.0f),
        [FFN_GATE] = make_tensor(random, type, config->d_ff, d, scale, 0),
        [FFN_UP] = make_tensor(random, type, config->d_ff, d, scale, 0),
        [FFN_DOWN] = make_tensor(random, type, d, config->d_ff, scale, 0)};
    memcpy(layer, made, sizeof made);
}

static struct model_under_test *make_model(struct random *random, enum tensor_type type) {
    static const int dims[] = {8, 16, 48, 64, 80, 128}, groups[] = {1, 4, 7};
    struct model_under_test *model = calloc(1, sizeof *model);
    struct model_config *config = &model->config;
    bool blocks = pack_quantized(type); /* their columns come in blocks of 32 or 256 */
    bool large = pack_block(type).n_k == 256;
    model->group = groups[below(random, 3)];
    config->head_dim = dims[below(random, 6)];
    config->n_kv_heads = 4;
    config->n_heads = 4 * model->group;
    if (blocks && config->head_dim < 16)
        config->head_dim = 16;
    config->n_layers = 2;
    if (large) /* 4 or 16 heads of 64: blocks of 256 columns */
        config->n_heads = 4 * (model->group = 1 + below(random, 2) * 3);
    if (large)
        config->head_dim = 64;
    config->d_model = large ? 256 : blocks ? 96 : 60 + below(random, 60);
    config->d_ff = large ? 512 : blocks ? 352 : 8 * (20 + below(random, 30));
    config->vocab_size = 397;
    config->rope_dim = config->head_dim;
    config->rope_adjacent = draw(random) & 1;
    config->norm_epsilon = 1e-5f;
    for (int i = 0; i < config->rope_dim / 2; i++)
        model->frequency[i] = (float)pow(10000.0, -2.0 * i / config->rope_dim);
    for (int i = 0; i < config->n_layers; i++)
        make_layer(random, config, type, model->layer[i]);
    model->token_embd = make_tensor(random, type, config->vocab_size, config->d_model, 1, 0);
    model->output_norm = make_tensor(random, TYPE_F32, 1, config->d_model, 0.2f, 1.0f);
    return model;
}

static void free_model(struct model_under_test *model) {
    for (int i = 0; i < model->config.n_layers; i++)
        for (int role = ATTN_NORM; role < N_ROLES; role++)
            free_tensor(model->layer[i][role]);
    free_tensor(model->token_embd);
    free_tensor(model->output_norm);
    free(model);
}

/* ---- a worker: the shards that run a model ---- */

struct worker {
    struct backend *backend;
    int n_shards;
    struct device *shards[MAX_SHARDS];
    const struct weight *layers[MAX_SHARDS][2][N_ROLES];
};

static const struct weight *upload(struct device *device, const struct tensor *tensor,
                                   enum slice_kind kind) {
    char error[ERROR_LENGTH] = "";
    struct slice slice = {kind, device->rank, device->n_shards};
    return tensor ? device->backend->upload(device, tensor, slice, error) : NULL;
}

static void open_worker(struct worker *worker, struct backend *backend,
                        struct model_under_test *model, int n_shards, enum kv_type kv_type) {
    *worker = (struct worker){.backend = backend, .n_shards = n_shards};
    for (int i = 0; i < n_shards; i++) {
        char error[ERROR_LENGTH] = "";
        struct device wanted = {.config = &model->config,
                                .rope_frequency = model->frequency,
                                .rank = i,
                                .n_shards = n_shards,
                                .max_rows = 256,
                                .max_samples = 16,
                                .kv_type = kv_type};
        struct device *device = backend->device_open(backend, &wanted, error);
        if (!device) {
            printf("device_open: %s\n", error);
            abort();
        }
        size_t bytes = MAX_BLOCKS * block_bytes(&model->config, n_shards, kv_type);
        device->kv = backend->alloc(device, bytes, false);
        memset(device->kv, 0xff, bytes); /* NaN */
        for (int j = 0; j < model->config.n_layers; j++) {
            for (int k = 0; k < N_MODEL_TENSORS; k++) {
                int role = model_tensors[k].role;
                if (role >= ATTN_NORM)
                    worker->layers[i][j][role] =
                        upload(device, model->layer[j][role], model_tensors[k].slice);
            }
        }
        worker->layers[i][0][TOKEN_EMBD] = upload(device, model->token_embd, SLICE_WHOLE);
        worker->layers[i][0][OUTPUT_NORM] = upload(device, model->output_norm, SLICE_WHOLE);
        worker->layers[i][0][OUTPUT] = worker->layers[i][0][TOKEN_EMBD];
        worker->shards[i] = device;
    }
}

static void close_worker(struct worker *worker) {
    for (int i = 0; i < worker->n_shards; i++) {
        worker->backend->release(worker->shards[i], worker->shards[i]->kv, false);
        worker->backend->device_close(worker->shards[i]);
    }
}

#define ON_SHARDS(call)                                                                            \
    for (int shard = 0; shard < worker->n_shards; shard++) {                                       \
        struct device *device = worker->shards[shard];                                             \
        const struct weight *(*layers)[N_ROLES] = worker->layers[shard];                           \
        (void)layers;                                                                              \
        worker->backend->call;                                                                     \
    }

static void forward(struct worker *worker, const struct batch *batch, float *logits) {
    struct backend *backend = worker->backend;
    ON_SHARDS(step_begin(device, batch))
    ON_SHARDS(embed(device, layers[0][TOKEN_EMBD]))
    for (int i = 0; i < worker->shards[0]->config->n_layers; i++) {
        ON_SHARDS(norm_qkv(device, layers[i]))
        ON_SHARDS(rope_append(device, layers[i], i))
        ON_SHARDS(attention(device, i))
        ON_SHARDS(project_add(device, layers[i][ATTN_OUTPUT], INPUT_ATTENTION))
        backend->all_reduce_add(worker->shards, worker->n_shards);
        ON_SHARDS(norm_gate_up(device, layers[i]))
        ON_SHARDS(project_add(device, layers[i][FFN_DOWN], INPUT_FFN))
        backend->all_reduce_add(worker->shards, worker->n_shards);
    }
    backend->sample(worker->shards[0], worker->layers[0][0], logits);
    ON_SHARDS(step_end(device, batch->sampled))
}

/* ---- batches ---- */

struct test_batch {
    struct batch batch;
    int token[256], position[256], row_sequence[256], block_table[MAX_BLOCKS * 4];
    struct sequence sequence[16];
    int sample_row[16], sampled[16];
    struct sampling sampling[16];
};

static void batch_start(struct test_batch *test) {
    memset(test, 0, sizeof *test);
    test->batch = (struct batch){.token = test->token,
                                 .position = test->position,
                                 .row_sequence = test->row_sequence,
                                 .sequence = test->sequence,
                                 .block_table = test->block_table,
                                 .sample_row = test->sample_row,
                                 .sampling = test->sampling,
                                 .sampled = test->sampled};
}

/* Rows [start, end) of a text whose blocks are `blocks`; the last one is sampled. */
static void batch_add(struct test_batch *test, const int *text, const int *blocks, int start,
                      int end) {
    struct batch *batch = &test->batch;
    struct sequence *sequence = &test->sequence[batch->n_sequences];
    *sequence = (struct sequence){.first_row = batch->n_rows,
                                  .n_rows = end - start,
                                  .start = start,
                                  .first_block = batch->n_blocks,
                                  .n_blocks = blocks_of(end)};
    for (int i = start; i < end; i++) {
        test->token[batch->n_rows] = text[i];
        test->position[batch->n_rows] = i;
        test->row_sequence[batch->n_rows++] = batch->n_sequences;
    }
    memcpy(test->block_table + batch->n_blocks, blocks, sizeof(int) * (size_t)blocks_of(end));
    batch->n_blocks += blocks_of(end);
    test->sampling[batch->n_samples].top_p = 1.0f;
    test->sample_row[batch->n_samples++] = batch->n_rows - 1;
    batch->n_sequences++;
}

static void shuffled(struct random *random, int *slots, int n) {
    for (int i = 0; i < n; i++) {
        int j = below(random, i + 1);
        slots[i] = slots[j];
        slots[j] = i;
    }
}

/* ---- each op against float64 ---- */

static bool plain; /* the backends that are opened; fast paths round the rows of a product */

struct worst {
    double error;
    int row, col;
};

static void compare(struct worst *worst, int row, int col, double got, double expected,
                    double scale) {
    double error = fabs(got - expected) / scale;
    if (!(error <= worst->error))
        *worst = (struct worst){error == error ? error : INFINITY, row, col};
}

#define CHECK_WORST(worst, limit, what)                                                            \
    CHECK((worst).error < (limit), "%s: error %g at row %d, column %d", what, (worst).error,       \
          (worst).row, (worst).col)

static void poison(float *values, size_t rows, size_t stride, int n) { /* all but the padding */
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < (size_t)n; j++)
            values[i * stride + j] = NAN;
}

static void reference_norm(const float *x, const struct tensor *weight, int n, double *out) {
    double squares = 0.0;
    for (int i = 0; i < n; i++)
        squares += (double)x[i] * (double)x[i];
    for (int i = 0; i < n; i++)
        out[i] = (double)x[i] / sqrt(squares / n + 1e-5) * (weight ? element(weight, 0, i) : 1.0);
}

/* size: the sum's error is compared with it, 1 + the root of the sum of squares */
static double dot(const struct tensor *matrix, int row, const double *input, double *size) {
    double sum = 0.0, squares = 0.0;
    for (int i = 0; i < (int)matrix->cols; i++) {
        double product = element(matrix, row, i) * input[i];
        sum += product;
        squares += product * product;
    }
    *size = 1.0 + sqrt(squares);
    return sum;
}

static void check_matrix(struct check *check, const char *what, const struct tensor *matrix,
                         const struct tensor *bias, const double *input, const float *got,
                         int row) {
    struct worst worst = {0};
    for (int i = 0; i < (int)matrix->rows; i++) {
        double size, expected = dot(matrix, i, input, &size);
        expected += bias ? element(bias, 0, i) : 0.0;
        compare(&worst, row, i, (double)got[i], expected, size);
    }
    CHECK_WORST(worst, plain ? 2e-5 : 6e-2, what);
}

static void check_norm_qkv(struct check *check, struct cpu_device *device,
                           const struct tensor *const *layer, const struct weight *const *weights) {
    const struct model_config *config = device->device.config;
    size_t rows = (size_t)device->batch->n_rows;
    double input[1024];
    poison(device->q, rows, device->q_stride, config->n_heads * config->head_dim);
    poison(device->k, rows, device->kv_stride, config->n_kv_heads * config->head_dim);
    poison(device->v, rows, device->kv_stride, config->n_kv_heads * config->head_dim);
    poison(device->h, rows, device->x_stride, config->d_model);
    cpu_norm_qkv(&device->device, weights);
    for (size_t row = 0; row < rows; row += 5) {
        reference_norm(device->x + row * device->x_stride, layer[ATTN_NORM], config->d_model,
                       input);
        check_matrix(check, "q", layer[ATTN_Q], layer[Q_BIAS], input,
                     device->q + row * device->q_stride, (int)row);
        check_matrix(check, "k", layer[ATTN_K], layer[K_BIAS], input,
                     device->k + row * device->kv_stride, (int)row);
        check_matrix(check, "v", layer[ATTN_V], layer[V_BIAS], input,
                     device->v + row * device->kv_stride, (int)row);
    }
}

static void reference_rope(const struct model_under_test *model, const float *head,
                           const struct tensor *norm, int position, double *out) {
    const struct model_config *config = &model->config;
    double normed[MAX_HEAD_DIM];
    int half = config->rope_dim / 2;
    for (int i = 0; i < config->head_dim; i++)
        normed[i] = (double)head[i];
    if (norm)
        reference_norm(head, norm, config->head_dim, normed);
    for (int i = 0; i < half; i++) {
        int a = config->rope_adjacent ? 2 * i : i, b = config->rope_adjacent ? 2 * i + 1 : i + half;
        double angle = position * (double)model->frequency[i];
        out[a] = normed[a] * cos(angle) - normed[b] * sin(angle);
        out[b] = normed[a] * sin(angle) + normed[b] * cos(angle);
    }
}

static double kv_at(const struct cpu_device *device, int slot, int layer, int value, int head,
                    int token, int i) { /* the layout of dynamo.h, spelt out */
    const struct model_config *config = device->device.config;
    size_t at = (size_t)slot * (size_t)config->n_layers + (size_t)layer;
    at = (at * 2 + (size_t)value) * (size_t)config->n_kv_heads + (size_t)head;
    at = at * BLOCK_TOKENS * (size_t)config->head_dim; /* keys (dim, 16), values (16, dim) */
    at += (size_t)(value ? token * config->head_dim + i : i * BLOCK_TOKENS + token);
    if (device->device.kv_type == KV_F32)
        return (double)((const float *)device->device.kv)[at];
    uint32_t bits = (uint32_t)((const uint16_t *)device->device.kv)[at] << 16;
    float result;
    memcpy(&result, &bits, 4);
    return (double)result;
}

static void check_rope(struct check *check, struct cpu_device *device,
                       const struct model_under_test *model, int layer,
                       const struct weight *const *weights) {
    const struct model_config *config = &model->config;
    const struct batch *batch = device->batch;
    size_t n = (size_t)batch->n_rows, dim = (size_t)config->head_dim;
    float *q = malloc(n * device->q_stride * 4), *k = malloc(n * device->kv_stride * 4);
    memcpy(q, device->q, n * device->q_stride * 4);
    memcpy(k, device->k, n * device->kv_stride * 4);
    cpu_rope_append(&device->device, weights, layer);
    double coarse = device->device.kv_type == KV_F32 ? 1e-5 : 4e-3, expected[MAX_HEAD_DIM];
    struct worst worst_q = {0}, worst_k = {0}, worst_v = {0};
    for (size_t row = 0; row < n; row++) {
        const struct sequence *sequence = &batch->sequence[batch->row_sequence[row]];
        int position = batch->position[row], token = position % 16;
        int slot = batch->block_table[sequence->first_block + position / 16];
        for (int head = 0; head < config->n_heads; head++) {
            size_t at = row * device->q_stride + (size_t)head * dim;
            reference_rope(model, q + at, model->layer[layer][ATTN_Q_NORM], position, expected);
            for (int i = 0; i < (int)dim; i++)
                compare(&worst_q, (int)row, i, (double)device->q[at + (size_t)i], expected[i], 4);
        }
        for (int head = 0; head < config->n_kv_heads; head++) {
            size_t at = row * device->kv_stride + (size_t)head * dim;
            reference_rope(model, k + at, model->layer[layer][ATTN_K_NORM], position, expected);
            for (int i = 0; i < (int)dim; i++) {
                double v = (double)device->v[at + (size_t)i];
                compare(&worst_k, (int)row, i, kv_at(device, slot, layer, 0, head, token, i),
                        expected[i], 1 + fabs(expected[i]));
                compare(&worst_v, (int)row, i, kv_at(device, slot, layer, 1, head, token, i), v,
                        1 + fabs(v));
            }
        }
    }
    CHECK_WORST(worst_q, 1e-5, "rope q");
    CHECK_WORST(worst_k, coarse, "rope k");
    CHECK_WORST(worst_v, coarse, "append v");
    free(q);
    free(k);
}

static void reference_attention(const struct cpu_device *device, int layer, int row, int head,
                                double *out) {
    const struct model_config *config = device->device.config;
    const struct batch *batch = device->batch;
    const struct sequence *sequence = &batch->sequence[batch->row_sequence[row]];
    const int *table = batch->block_table + sequence->first_block;
    const float *q = device->q + (size_t)row * device->q_stride + (size_t)(head * config->head_dim);
    int kv_head = head / (config->n_heads / config->n_kv_heads), n = batch->position[row] + 1;
    double score[1024], max = -INFINITY, sum = 0.0;
    memset(out, 0, sizeof *out * MAX_HEAD_DIM);
    for (int t = 0; t < n; t++) {
        score[t] = 0.0;
        for (int i = 0; i < config->head_dim; i++)
            score[t] += (double)q[i] * kv_at(device, table[t / 16], layer, 0, kv_head, t % 16, i);
        score[t] /= sqrt(config->head_dim);
        max = score[t] > max ? score[t] : max;
    }
    for (int t = 0; t < n; t++)
        sum += exp(score[t] - max);
    for (int t = 0; t < n; t++) {
        for (int i = 0; i < config->head_dim; i++) {
            out[i] += exp(score[t] - max) / sum *
                      kv_at(device, table[t / 16], layer, 1, kv_head, t % 16, i);
        }
    }
}

static void check_attention(struct check *check, struct cpu_device *device, int layer) {
    const struct model_config *config = device->device.config;
    int dim = config->head_dim;
    poison(device->attention, (size_t)device->batch->n_rows, device->q_stride,
           config->n_heads * dim);
    cpu_attention(&device->device, layer);
    struct worst worst = {0};
    for (int row = 0; row < device->batch->n_rows; row++) {
        for (int head = row % 3; head < config->n_heads; head += 3) {
            double expected[MAX_HEAD_DIM];
            reference_attention(device, layer, row, head, expected);
            const float *got = device->attention + (size_t)row * device->q_stride;
            for (int i = 0; i < dim; i++) {
                compare(&worst, row, head * dim + i, (double)got[head * dim + i], expected[i],
                        1.0 + fabs(expected[i]));
            }
        }
    }
    CHECK_WORST(worst, 2e-5, "attention");
}

static void check_project(struct check *check, struct cpu_device *device,
                          const struct tensor *tensor, const struct weight *weight, bool attends) {
    size_t n = (size_t)device->batch->n_rows, stride = device->x_stride;
    size_t input_stride = attends ? device->q_stride : device->ffn_stride;
    float *before_add = malloc(n * stride * 4);
    memcpy(before_add, device->x, n * stride * 4);
    cpu_project_add(&device->device, weight, attends ? INPUT_ATTENTION : INPUT_FFN);
    struct worst worst = {0};
    for (size_t row = 0; row < n; row += 7) {
        double input[8192];
        for (int i = 0; i < (int)tensor->cols; i++) {
            const float *from = attends ? device->attention : device->ffn;
            input[i] = (double)from[row * input_stride + (size_t)i];
        }
        for (int i = 0; i < (int)tensor->rows; i++) {
            size_t at = row * stride + (size_t)i;
            double size, expected = dot(tensor, i, input, &size) + (double)before_add[at];
            compare(&worst, (int)row, i, (double)device->x[at], expected, size);
        }
    }
    CHECK_WORST(worst, plain ? 2e-5 : 6e-2, attends ? "attn_output" : "ffn_down");
    free(before_add);
}

static void check_gate_up(struct check *check, struct cpu_device *device,
                          const struct tensor *const *layer, const struct weight *const *weights) {
    const struct model_config *config = device->device.config;
    size_t n = (size_t)device->batch->n_rows;
    poison(device->ffn, n, device->ffn_stride, config->d_ff);
    cpu_norm_gate_up(&device->device, weights);
    struct worst worst = {0};
    for (size_t row = 0; row < n; row += 7) {
        double input[1024];
        reference_norm(device->x + row * device->x_stride, layer[FFN_NORM], config->d_model, input);
        for (int i = 0; i < config->d_ff; i++) {
            double gate_size, up_size, gate = dot(layer[FFN_GATE], i, input, &gate_size);
            double expected = gate / (1 + exp(-gate)) * dot(layer[FFN_UP], i, input, &up_size);
            compare(&worst, (int)row, i, (double)device->ffn[row * device->ffn_stride + (size_t)i],
                    expected, gate_size * up_size);
        }
    }
    CHECK_WORST(worst, plain ? 4e-5 : 1e-1, "gate_up");
}

static void check_logits(struct check *check, struct cpu_device *device,
                         const struct model_under_test *model,
                         const struct weight *const *weights) {
    int n = device->batch->n_samples, vocab = model->config.vocab_size;
    poison(device->logits, (size_t)n, (size_t)vocab, vocab);
    float *logits = malloc((size_t)n * (size_t)vocab * 4);
    cpu_sample(&device->device, weights, logits);
    for (int i = 0; i < n; i++) {
        double input[1024];
        reference_norm(device->x + (size_t)device->batch->sample_row[i] * device->x_stride,
                       model->output_norm, model->config.d_model, input);
        check_matrix(check, "logits", model->token_embd, NULL, input, logits + i * vocab, i);
    }
    free(logits);
}

static void check_step(struct check *check, struct worker *worker,
                       const struct model_under_test *model, const struct batch *batch) {
    struct cpu_device *device = (struct cpu_device *)worker->shards[0];
    CHECK(cpu_step_begin(&device->device, batch), "it replays nothing");
    poison(device->x, (size_t)batch->n_rows, device->x_stride, model->config.d_model);
    cpu_embed(&device->device, worker->layers[0][0][TOKEN_EMBD]);
    for (int row = 0; row < batch->n_rows; row++) {
        for (int i = 0; i < model->config.d_model; i++) {
            double got = (double)device->x[(size_t)row * device->x_stride + (size_t)i];
            CHECK(got == element(model->token_embd, batch->token[row], i), "row %d, %d", row, i);
        }
    }
    for (int i = 0; i < model->config.n_layers; i++) {
        const struct tensor *const *layer = model->layer[i];
        const struct weight *const *weights = worker->layers[0][i];
        check_norm_qkv(check, device, layer, weights);
        check_rope(check, device, model, i, weights);
        check_attention(check, device, i);
        check_project(check, device, layer[ATTN_OUTPUT], weights[ATTN_OUTPUT], true);
        check_gate_up(check, device, layer, weights);
        check_project(check, device, layer[FFN_DOWN], weights[FFN_DOWN], false);
    }
    check_logits(check, device, model, worker->layers[0][0]);
    cpu_step_end(&device->device, batch->sampled);
}

static struct backend *open_backend(int n_threads, uint64_t seed) {
    char error[ERROR_LENGTH];
    struct backend_options options = {
        .n_threads = n_threads, .copy_delay_seed = seed, .plain = plain};
    return cpu_backend_open(&options, error);
}

static void check_ops(struct check *check, enum tensor_type type, enum kv_type kv_type,
                      uint64_t seed) {
    struct random random = {seed};
    struct model_under_test *model = make_model(&random, type);
    struct backend *backend = open_backend(2, 0);
    struct worker worker;
    open_worker(&worker, backend, model, 1, kv_type);
    int slots[MAX_BLOCKS], text[256];
    shuffled(&random, slots, MAX_BLOCKS);
    for (int i = 0; i < 256; i++)
        text[i] = below(&random, model->config.vocab_size);
    struct test_batch test;
    int half = 20 + below(&random, 60); /* a prompt in two steps, beside two short ones */
    batch_start(&test);
    batch_add(&test, text, slots, 0, half);
    batch_add(&test, text + 7, slots + 20, 0, 1 + below(&random, 40));
    check_step(check, &worker, model, &test.batch);
    int end = test.sequence[1].n_rows;
    batch_start(&test);
    batch_add(&test, text + 7, slots + 20, end, end + 1);
    batch_add(&test, text, slots, half, half + 1 + below(&random, 70));
    batch_add(&test, text + 31, slots + 40, 0, 3);
    check_step(check, &worker, model, &test.batch);
    close_worker(&worker);
    backend->close(backend);
    free_model(model);
}

static void check_type(struct check *check, enum tensor_type type, uint64_t seed, int n) {
    for (int i = 0; i < 2 * n; i++) {
        plain = i < n;
        check_ops(check, type, i % 2 ? KV_F32 : KV_BF16, seed + (uint64_t)(i % n));
    }
    plain = false;
}

static void ops_f32(struct check *check) {
    check_type(check, TYPE_F32, 1, 5);
}

static void ops_f16(struct check *check) {
    check_type(check, TYPE_F16, 11, 2);
}

static void ops_bf16(struct check *check) {
    check_type(check, TYPE_BF16, 21, 4);
}

static void ops_q8_0(struct check *check) {
    check_type(check, TYPE_Q8_0, 31, 3);
}

static void ops_q4_0(struct check *check) {
    check_type(check, TYPE_Q4_0, 34, 3);
}

static void ops_q4_k(struct check *check) {
    check_type(check, TYPE_Q4_K, 37, 2);
}

static void ops_q6_k(struct check *check) {
    check_type(check, TYPE_Q6_K, 39, 2);
}

/* ---- fast paths: exactly the products of what the rows are rounded to ---- */

static double rounded(enum row_form form, const char *row, int begin, int k) {
    if (form == FORM_BF16) {
        uint32_t bits = (uint32_t)((const uint16_t *)(const void *)row)[k - begin] << 16;
        float value;
        memcpy(&value, &bits, 4);
        return (double)value;
    }
    const struct q8_block *block = (const struct q8_block *)(const void *)row;
    block += k / Q8_BLOCK - begin / Q8_BLOCK;
    return (double)block->scale * block->q[k % Q8_BLOCK];
}

static void check_dot(struct check *check, struct random *random, const struct weight *weight,
                      int n_rows) {
    enum row_form form = dot_form(weight->type, false);
    int cols = weight->cols, begin = below(random, cols / 2 - 40) * 2;
    int end = begin + 2 + below(random, (cols - begin) / 2) * 2;
    char *rows = calloc(6, 16384);
    float *from = malloc(6 * 2048 * sizeof *from), out[6 * PANEL];
    double most = form == FORM_BF16 ? 0x1p-8 : 1.0 / 253;
    for (int row = 0; row < n_rows; row++) {
        double largest = 0.0;
        for (int k = begin; k < end; k++) {
            from[k] = normal(random) * (k / 32 % 3 ? 1.0f : 30.0f);
            largest = fabs((double)from[k]) > largest ? fabs((double)from[k]) : largest;
        }
        dot_convert(form, from + begin, begin, end, rows + row * 16384);
        for (int k = begin; k < end; k++) {
            double error = fabs((double)from[k] - rounded(form, rows + row * 16384, begin, k));
            CHECK(error <= largest * most, "element %d: %g", k, error);
        }
    }
    struct tile tile = {.panel = weight->panels,
                        .begin = begin,
                        .end = end,
                        .form = form,
                        .input = rows,
                        .stride = 16384,
                        .out = out};
    tile_rows(weight->type, tile, n_rows);
    for (int row = 0; row < n_rows; row++) {
        for (int i = 0; i < weight->n_rows; i++) {
            double sum = 0.0, size = 1e-3;
            for (int k = begin; k < end; k++) {
                double product =
                    element(weight->tensor, i, k) * rounded(form, rows + row * 16384, begin, k);
                sum += product;
                size += fabs(product);
            }
            double error = fabs((double)out[row * PANEL + i] - sum) / size;
            CHECK(error < 3e-6, "type %d, %d rows, k %d to %d: error %g at %d, %d",
                  (int)weight->type, n_rows, begin, end, error, row, i);
        }
    }
    free(from);
    free(rows);
}

static void fast_paths(struct check *check) {
    static const enum tensor_type types[] = {TYPE_BF16, TYPE_Q8_0, TYPE_Q4_0, TYPE_Q4_K, TYPE_Q6_K};
    struct random random = {77};
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        CHECK(dot_form(types[i], true) == FORM_F32, "plain is plain");
        if (dot_form(types[i], false) == FORM_F32)
            continue; /* this processor has none; the plain kernels are tested above */
        struct tensor *tensor = make_tensor(&random, types[i], 50, 512, 0.1f, 0);
        struct weight *weight = pack_open(tensor);
        weight->panels = aligned_alloc(64, pack_bytes(weight));
        pack_panel(weight, 0);
        for (int n_rows = 1; n_rows <= 6; n_rows++)
            for (int repeat = 0; repeat < 5; repeat++)
                check_dot(check, &random, weight, n_rows);
        free(weight->panels);
        pack_close(weight);
        free_tensor(tensor);
    }
}

/* ---- the same bits, however the work is cut ---- */

enum { TEXT_LENGTH = 100 };

/* Logits of the last row of a text, prefilled in chunks of `chunk`, beside `beside` other texts. */
static void run_text(struct worker *worker, const int *text, int chunk, int beside, float *logits) {
    struct random random = {(uint64_t)(chunk * 10 + beside)};
    int slots[MAX_BLOCKS];
    shuffled(&random, slots, MAX_BLOCKS);
    int vocab = worker->shards[0]->config->vocab_size;
    float *all = malloc(sizeof(float) * (size_t)(16 * vocab));
    struct test_batch test;
    for (int start = 0; start < TEXT_LENGTH; start += chunk) {
        int end = start + chunk < TEXT_LENGTH ? start + chunk : TEXT_LENGTH;
        batch_start(&test);
        for (int i = 0; i < beside; i++)
            batch_add(&test, text + i + 1, slots + 10 + 2 * i, 0, 1 + (i * 7 + start) % 20);
        batch_add(&test, text, slots, start, end);
        forward(worker, &test.batch, all);
        memcpy(logits, all + beside * vocab, sizeof(float) * (size_t)vocab);
    }
    free(all);
}

static void check_bits(struct check *check, enum tensor_type type, enum kv_type kv, uint64_t seed) {
    struct random random = {seed};
    struct model_under_test *model = make_model(&random, type);
    int text[TEXT_LENGTH + 32];
    for (int i = 0; i < TEXT_LENGTH + 32; i++)
        text[i] = below(&random, model->config.vocab_size);
    size_t bytes = sizeof(float) * (size_t)model->config.vocab_size;
    float *expected = NULL, *logits = malloc(bytes);
    static const int cuts[][4] = {
        /* threads, shards, chunk, texts beside */
        {1, 1, TEXT_LENGTH, 0}, {2, 1, 1, 0}, {2, 1, 7, 3},  {3, 1, 33, 8},
        {4, 2, TEXT_LENGTH, 1}, {2, 2, 9, 0}, {4, 4, 40, 2}, {1, 4, 2, 1}};
    for (size_t i = 0; i < sizeof cuts / sizeof *cuts; i++) {
        struct backend *backend = open_backend(cuts[i][0], 0);
        struct worker worker;
        open_worker(&worker, backend, model, cuts[i][1], kv);
        run_text(&worker, text, cuts[i][2], cuts[i][3], logits);
        if (!expected)
            expected = memcpy(malloc(bytes), logits, bytes);
        CHECK(memcmp(logits, expected, bytes) == 0,
              "type %d, seed %d: %d threads, %d shards, %d %d", (int)type, (int)seed, cuts[i][0],
              cuts[i][1], cuts[i][2], cuts[i][3]);
        CHECK(logits[0] == logits[0], "logits are numbers");
        close_worker(&worker);
        backend->close(backend);
    }
    free(expected);
    free(logits);
    free_model(model);
}

static void same_bits(struct check *check) {
    static const enum tensor_type types[] = {TYPE_F32,  TYPE_BF16, TYPE_F16, TYPE_Q8_0,
                                             TYPE_Q4_0, TYPE_Q4_K, TYPE_Q6_K};
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        check_bits(check, types[i], KV_F32, 41 + 2 * i);
        check_bits(check, types[i], KV_BF16, 42 + 2 * i);
        plain = true;
        check_bits(check, types[i], i % 2 ? KV_F32 : KV_BF16, 60 + i);
        plain = false;
    }
}

/* ---- sampling ---- */

static void philox_vectors(struct check *check) { /* Random123, kat_vectors */
    static const uint32_t vectors[3][10] = {
        {0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
        {~0u, ~0u, ~0u, ~0u, ~0u, ~0u, 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd},
        {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0, 0xd16cfe09,
         0x94fdcceb, 0x5001e420, 0x24126ea1}};
    for (int i = 0; i < 3; i++) {
        uint32_t counter[4];
        memcpy(counter, vectors[i], sizeof counter);
        philox(counter, vectors[i][4], vectors[i][5]);
        CHECK(memcmp(counter, vectors[i] + 6, sizeof counter) == 0, "vector %d: %08x", i,
              counter[0]);
    }
}

static const float *sort_by;

static int by_rank(const void *a, const void *b) {
    int first = *(const int *)a, second = *(const int *)b;
    float x = sort_by[first], y = sort_by[second];
    return x > y ? -1 : x < y ? 1 : first - second;
}

/* The definition in lib/sampler.h, by a full sort. */
static int brute_force(const float *logits, int n, const struct sampling *sampling, int position) {
    int order[512], kept = sampling->top_k > 0 && sampling->top_k < n ? sampling->top_k : n;
    double p[512], sum = 0.0, reached = 0.0, best = -INFINITY;
    for (int i = 0; i < n; i++)
        order[i] = i;
    sort_by = logits;
    qsort(order, (size_t)n, sizeof *order, by_rank);
    if (sampling->temperature <= 0.0f)
        return order[0];
    for (int i = 0; i < kept; i++) {
        p[i] = exp((double)((logits[order[i]] - logits[order[0]]) / sampling->temperature));
        sum += p[i];
    }
    int nucleus = 0;
    while (nucleus < kept && (nucleus == 0 || reached < (double)sampling->top_p * sum))
        reached += p[nucleus++];
    nucleus = sampling->top_p < 1.0f ? nucleus : kept;
    int winner = -1;
    for (int i = 0; i < nucleus && p[i] >= (double)sampling->min_p; i++) {
        uint32_t word[4] = {(uint32_t)position, (uint32_t)order[i], 0, 0};
        philox(word, (uint32_t)sampling->seed, (uint32_t)(sampling->seed >> 32));
        double u = (word[0] + 0.5) / 4294967296.0;
        double value = (double)(logits[order[i]] / sampling->temperature) - log(-log(u));
        if (value > best) {
            best = value;
            winner = order[i];
        }
    }
    return winner;
}

struct sampler {
    struct backend *backend;
    struct worker worker;
    struct model_under_test *model;
};

static void open_sampler(struct sampler *sampler) {
    struct random random = {51};
    sampler->backend = open_backend(2, 0);
    sampler->model = make_model(&random, TYPE_F32);
    open_worker(&sampler->worker, sampler->backend, sampler->model, 1, KV_F32);
}

static void close_sampler(struct sampler *sampler) {
    close_worker(&sampler->worker);
    sampler->backend->close(sampler->backend);
    free_model(sampler->model);
}

/* Samples n rows of logits, for positions of their own. */
static void sample_rows(struct sampler *sampler, const float *logits, int n, const int *position,
                        const struct sampling *sampling, int *sampled) {
    struct cpu_device *device = (struct cpu_device *)sampler->worker.shards[0];
    struct test_batch test;
    int text[1] = {0}, blocks[1] = {0};
    batch_start(&test);
    for (int i = 0; i < n; i++) {
        batch_add(&test, text, blocks, 0, 1);
        test.sampling[i] = sampling[i];
        test.position[i] = position[i] - 1;
    }
    cpu_step_begin(&device->device, &test.batch);
    memcpy(device->logits, logits, sizeof(float) * 397 * (size_t)n);
    draw_tokens(device, 0, n);
    cpu_step_end(&device->device, sampled);
}

static void sampler_definition(struct check *check) {
    struct sampler sampler;
    open_sampler(&sampler);
    struct random random = {52};
    static float logits[16 * 397];
    for (int round = 0; round < 60; round++) {
        struct sampling sampling[16];
        int position[16], sampled[16], alone;
        for (int i = 0; i < 16; i++) {
            static const float temperatures[] = {0, 0.5f, 0.8f, 1, 2},
                               tops[] = {0.1f, 0.5f, 0.95f, 1};
            sampling[i] = (struct sampling){
                temperatures[below(&random, 5)], tops[below(&random, 4)],
                draw(&random) & 1 ? 0.05f : 0.0f, draw(&random) & 1 ? 1 + below(&random, 400) : 0,
                (uint64_t)draw(&random) << 32 | draw(&random)};
            position[i] = 1 + below(&random, 1000000);
            float width = (float)(1 + below(&random, 6));
            for (int j = 0; j < 397; j++) { /* ties are common */
                float value = width * normal(&random);
                logits[i * 397 + j] = round % 3 ? value : floorf(value);
            }
        }
        sample_rows(&sampler, logits, 16, position, sampling, sampled);
        for (int i = 0; i < 16; i++) {
            int expected = brute_force(logits + i * 397, 397, &sampling[i], position[i]);
            CHECK(sampled[i] == expected, "got %d, expected %d: t %g, p %g, min_p %g, k %d",
                  sampled[i], expected, (double)sampling[i].temperature, (double)sampling[i].top_p,
                  (double)sampling[i].min_p, sampling[i].top_k);
        }
        sample_rows(&sampler, logits + 5 * 397, 1, position + 5, sampling + 5, &alone);
        CHECK(alone == sampled[5], "alone %d, in a batch %d", alone, sampled[5]);
    }
    close_sampler(&sampler);
}

static void sampler_distribution(struct check *check) {
    enum { DRAWS = 20000, LIKELY = 20 };
    struct sampler sampler;
    open_sampler(&sampler);
    struct random random = {53};
    static float logits[16 * 397];
    double p[397], sum = 0.0, chi = 0.0, rest = 1.0;
    int count[397] = {0}, bins = 0, others = DRAWS;
    for (int j = 0; j < 397; j++) {
        float value = 2.0f * normal(&random);
        p[j] = exp((double)value);
        sum += p[j];
        for (int i = 0; i < 16; i++)
            logits[i * 397 + j] = value;
    }
    for (int first = 0; first < DRAWS; first += 16) {
        struct sampling sampling[16];
        int position[16], sampled[16];
        for (int i = 0; i < 16; i++) {
            sampling[i] = (struct sampling){1.0f, 1.0f, 0.0f, 0, 7};
            position[i] = first + i + 1;
        }
        sample_rows(&sampler, logits, 16, position, sampling, sampled);
        for (int i = 0; i < 16; i++)
            count[sampled[i]]++;
    }
    for (int j = 0; j < 397; j++) {
        double expected = p[j] / sum * DRAWS;
        if (expected >= LIKELY) {
            chi += (count[j] - expected) * (count[j] - expected) / expected;
            rest -= p[j] / sum;
            others -= count[j];
            bins++;
        }
    }
    chi += (others - rest * DRAWS) * (others - rest * DRAWS) / (rest * DRAWS);
    CHECK(bins > 30 && chi < bins + 5 * sqrt(2.0 * bins), "chi-square %g of %d bins", chi, bins);
    close_sampler(&sampler);
}

static void sampler_odd_logits(struct check *check) {
    struct sampler sampler;
    open_sampler(&sampler);
    static float logits[397];
    int position = 5, sampled = -1;
    for (int kind = 0; kind < 24; kind++) {
        for (int j = 0; j < 397; j++) {
            float odd = kind % 3 == 0 ? NAN : kind % 3 == 1 ? INFINITY : -INFINITY;
            logits[j] = kind < 12 || j % 2 ? odd : (float)j;
        }
        struct sampling sampling = {kind & 1 ? 0.7f : 0.0f, kind & 2 ? 0.9f : 1.0f, 0.0f,
                                    kind & 4 ? 10 : 0, 3};
        sample_rows(&sampler, logits, 1, &position, &sampling, &sampled);
        CHECK(sampled >= 0 && sampled < 397, "kind %d: token %d", kind, sampled);
        if (kind >= 12 && kind % 3 != 1)
            CHECK(sampled % 2 == 0, "kind %d: a token without a probability", kind);
        if (kind >= 12 && kind % 3 != 1 && !(kind & 1))
            CHECK(sampled == 396, "the largest number, not %d", sampled);
    }
    close_sampler(&sampler);
}

/* ---- copies ---- */

static void copies(struct check *check) {
    for (uint64_t seed = 0; seed < 3; seed++) {
        struct backend *backend = open_backend(2, seed);
        struct random random = {61};
        struct model_under_test *model = make_model(&random, TYPE_F32);
        struct worker worker;
        open_worker(&worker, backend, model, 1, KV_F32);
        struct device *device = worker.shards[0];
        char from[64 * 40], to[2][64 * 48];
        for (size_t i = 0; i < sizeof from; i++)
            from[i] = (char)draw(&random);
        memset(to, 0, sizeof to);
        bool was_in_flight = false;
        uint64_t tickets[2][64];
        for (size_t i = 0; i < 64; i++) { /* on two streams, rows of 5 runs of 7 bytes */
            for (size_t j = 0; j < 2; j++) {
                struct copy2d copy = {to[j] + i * 48, from + i * 40, 9, 8, 7, 5};
                enum stream stream = j ? STREAM_PAGE_OUT : STREAM_TRANSFER;
                tickets[j][i] = backend->copy(device, stream, &copy);
                was_in_flight |= !backend->copy_done(device, stream, tickets[j][i]);
            }
        }
        CHECK(was_in_flight || seed == 0, "a delayed copy is not done at once");
        for (size_t i = 64; i-- > 0;) {
            for (size_t j = 0; j < 2; j++) {
                enum stream stream = j ? STREAM_PAGE_OUT : STREAM_TRANSFER;
                while (!backend->copy_done(device, stream, tickets[j][i]))
                    sched_yield();
                bool same = true;
                for (size_t row = 0; row < 5; row++) {
                    same &= !memcmp(to[j] + i * 48 + row * 9, from + i * 40 + row * 8, 7);
                    same &= to[j][i * 48 + row * 9 + 7] == 0 && to[j][i * 48 + row * 9 + 8] == 0;
                }
                CHECK(same, "copy %zu of stream %zu", i, j);
                CHECK(backend->copy_done(device, stream, tickets[j][0]), "in order");
            }
        }
        CHECK(!backend->alloc(device, SIZE_MAX, false), "more memory than there is");
        CHECK(!backend->alloc(device, SIZE_MAX - 70, true), "more memory than there is");
        CHECK(backend->free_memory(device, true) > 1000000, "some memory is free");
        close_worker(&worker);
        backend->close(backend);
        free_model(model);
    }
}

/* ---- devices ---- */

static void refusals(struct check *check) {
    struct random random = {71};
    struct backend *backend = open_backend(1, 0);
    struct model_under_test *model = make_model(&random, TYPE_F32);
    for (int n_shards = 0; n_shards < 12; n_shards++) {
        char error[ERROR_LENGTH] = "";
        struct device wanted = {.config = &model->config,
                                .rope_frequency = model->frequency,
                                .n_shards = n_shards,
                                .max_rows = 8,
                                .max_samples = 1};
        struct device *device = backend->device_open(backend, &wanted, error);
        bool fits = n_shards == 1 || n_shards == 2 || n_shards == 4;
        CHECK((device != NULL) == fits, "%d shards of 4 key-value heads", n_shards);
        CHECK(fits || (strstr(error, "got") && !strchr(error, '\n')), "%s", error);
        if (device)
            backend->device_close(device);
    }
    backend->close(backend);
    free_model(model);
}

struct driver {
    struct worker worker;
    pthread_t thread;
    const int *text;
    float *logits;
};

static void *drive(void *argument) {
    struct driver *driver = argument;
    for (int i = 0; i < 3; i++)
        run_text(&driver->worker, driver->text, 20 + i, 2, driver->logits);
    return NULL;
}

static void many_devices(struct check *check) { /* at once, more threads than the pool has */
    enum { DRIVERS = 6 };
    struct random random = {81};
    struct model_under_test *model = make_model(&random, TYPE_F32);
    int text[TEXT_LENGTH + 32];
    for (int i = 0; i < TEXT_LENGTH + 32; i++)
        text[i] = below(&random, model->config.vocab_size);
    size_t bytes = sizeof(float) * (size_t)model->config.vocab_size;
    for (int n_threads = 1; n_threads <= 4; n_threads++) {
        struct backend *backend = open_backend(n_threads, 0);
        struct driver drivers[DRIVERS];
        for (int i = 0; i < DRIVERS; i++) {
            open_worker(&drivers[i].worker, backend, model, i % 3 ? 1 : 2, KV_F32);
            for (int shard = 0; shard < drivers[i].worker.n_shards; shard++) {
                struct cpu_device *device = (struct cpu_device *)drivers[i].worker.shards[shard];
                device->device.urgent = i & 1;
                atomic_store(&device->job->urgent, i & 1);
            }
            drivers[i].text = text;
            drivers[i].logits = malloc(bytes);
        }
        for (int i = 0; i < DRIVERS; i++)
            CHECK(!pthread_create(&drivers[i].thread, NULL, drive, &drivers[i]), "a thread");
        for (int i = 0; i < DRIVERS; i++) {
            pthread_join(drivers[i].thread, NULL);
            CHECK(!memcmp(drivers[i].logits, drivers[0].logits, bytes), "driver %d", i);
        }
        for (int i = 0; i < DRIVERS; i++) {
            close_worker(&drivers[i].worker);
            free(drivers[i].logits);
        }
        int helpers = n_threads - 1,
            awake = atomic_load(&((struct cpu_backend *)backend)->pool.active);
        CHECK(awake >= 0 && awake <= helpers, "%d threads still counted", awake);
        backend->close(backend);
    }
    free_model(model);
}

int main(int argc, char **argv) {
    static const struct test tests[] = {
        {"ops_f32", ops_f32},
        {"ops_f16", ops_f16},
        {"ops_bf16", ops_bf16},
        {"ops_q8_0", ops_q8_0},
        {"ops_q4_0", ops_q4_0},
        {"ops_q4_k", ops_q4_k},
        {"ops_q6_k", ops_q6_k},
        {"fast_paths", fast_paths},
        {"same_bits", same_bits},
        {"philox_vectors", philox_vectors},
        {"sampler_definition", sampler_definition},
        {"sampler_distribution", sampler_distribution},
        {"sampler_odd_logits", sampler_odd_logits},
        {"copies", copies},
        {"refusals", refusals},
        {"many_devices", many_devices},
    };
    return check_run(tests, sizeof tests / sizeof *tests, argc, argv);
}
