/* cuda_worker.h: random models on CUDA devices, for test_cuda.cu.
 *
 * Tensors of every file type with what their elements are, as ggml's documentation of them says;
 * models of random shapes; batches; the shards that run a model; and the memory of devices, which
 * tests read, write and poison. Included behind kernels.cu.
 *
 *     struct random random = {seed};
 *     struct test_model *model = make_model(&random, config, type);
 *     struct worker worker = open_worker(open_backend(1), model, 1, 100);
 *     struct test_batch batch;
 *     add_text(&batch, …);
 *     worker.backend->step_begin(&worker.shards[0]->device, seal(&batch));
 *     …
 *     close_worker(&worker);
 *     free_model(model); */
#ifndef CUDA_WORKER_H
#define CUDA_WORKER_H

#include <math.h>

#include <algorithm>
#include <vector>

#include "check.h"

enum { N_TYPES = 7, KV_BLOCKS = 160 };

static const enum tensor_type all_types[N_TYPES] = {TYPE_F32,  TYPE_F16,  TYPE_BF16, TYPE_Q8_0,
                                                    TYPE_Q4_0, TYPE_Q4_K, TYPE_Q6_K};

/* ---- random numbers ---- */

struct random {
    uint64_t state;
};

static uint32_t word(struct random *random) { /* splitmix64 */
    uint64_t z = (random->state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (uint32_t)((z ^ (z >> 31)) >> 32);
}

static int below(struct random *random, int n) {
    return (int)(word(random) % (uint32_t)n);
}

static int between(struct random *random, int least, int most) {
    return least + below(random, most - least + 1);
}

template <typename T, int N> static T pick(struct random *random, const T (&values)[N]) {
    return values[below(random, N)];
}

static float normal(struct random *random) { /* near enough to one */
    double sum = -6.0;
    for (int i = 0; i < 12; i++)
        sum += word(random) * 0x1p-32;
    return (float)sum;
}

static std::vector<int> shuffled(struct random *random, int n) { /* of 0 to n - 1 */
    std::vector<int> list((size_t)n);
    for (int i = 0; i < n; i++) {
        int j = below(random, i + 1);
        list[i] = list[j];
        list[j] = i;
    }
    return list;
}

/* ---- numbers of 16 bits ---- */

static uint16_t bf16_of(float value) { /* to nearest even; of numbers */
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static float from_bf16(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static double rounded(double value) { /* to bf16; of what a float holds */
    return from_bf16(bf16_of((float)value));
}

static uint16_t f16_of(float value) { /* of normal numbers, truncated */
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    int exponent = (int)(bits >> 23 & 255) - 112;
    uint32_t sign = bits >> 16 & 0x8000;
    return (uint16_t)(exponent < 1 ? sign : sign | (uint32_t)exponent << 10 | (bits >> 13 & 0x3ff));
}

static double from_f16(const uint8_t *bytes) {
    int half = bytes[0] | bytes[1] << 8, exponent = half >> 10 & 31;
    double value =
        exponent ? ldexp(1024 + (half & 0x3ff), exponent - 25) : ldexp(half & 0x3ff, -24);
    return half & 0x8000 ? -value : value;
}

/* ---- tensors ---- */

struct form { /* so many elements lie in so many bytes */
    int n_k, bytes;
};

static struct form form_of(enum tensor_type type) {
    switch (type) {
    case TYPE_F32: return {1, 4};
    case TYPE_F16:
    case TYPE_BF16: return {1, 2};
    case TYPE_Q8_0: return {32, 34};
    case TYPE_Q4_0: return {32, 18};
    case TYPE_Q4_K: return {256, 144};
    case TYPE_Q6_K: return {256, 210};
    }
    return {0, 0};
}

/* A block of a quantized type: random numbers, and f16 scales that make elements of about `scale`.
 */
static void make_block(struct random *random, enum tensor_type type, float scale, uint8_t *block) {
    for (int i = 0; i < form_of(type).bytes; i++)
        block[i] = (uint8_t)below(random, 256);
    float usual = type == TYPE_Q8_0   ? 70.0f
                  : type == TYPE_Q4_0 ? 5.0f
                  : type == TYPE_Q4_K ? 250.0f
                                      : 1000.0f;
    uint16_t bits = f16_of(scale / usual * (1.0f + 0.3f * normal(random)));
    memcpy(block + (type == TYPE_Q6_K ? 208 : 0), &bits, 2);
    bits = f16_of(scale / 35.0f * (1.0f + 0.3f * normal(random)));
    if (type == TYPE_Q4_K)
        memcpy(block + 2, &bits, 2);
}

static struct tensor *make_tensor(struct random *random, enum tensor_type type, int rows, int cols,
                                  float scale, float center) {
    struct tensor *tensor = (struct tensor *)calloc(1, sizeof *tensor);
    struct form form = form_of(type);
    size_t n = (size_t)rows * (size_t)cols / (size_t)form.n_k;
    tensor->name = {"t", 1};
    tensor->type = type;
    tensor->rows = rows;
    tensor->cols = cols;
    tensor->bytes = n * (size_t)form.bytes;
    uint8_t *data = (uint8_t *)malloc(tensor->bytes);
    for (size_t i = 0; i < n; i++) {
        uint8_t *block = data + i * (size_t)form.bytes;
        if (form.n_k > 1) {
            make_block(random, type, scale, block);
            continue;
        }
        float value = center + scale * normal(random);
        uint16_t half = type == TYPE_F16 ? f16_of(value) : bf16_of(value);
        memcpy(block, type == TYPE_F32 ? (void *)&value : (void *)&half, (size_t)form.bytes);
    }
    tensor->data = data;
    return tensor;
}

static void free_tensor(const struct tensor *tensor) {
    if (tensor)
        free((void *)tensor->data);
    free((void *)tensor);
}

static double element_q4_k(const uint8_t *block, int k) {
    const uint8_t *packed = block + 4;
    int j = k / 32, scale = packed[j] & 63, least = packed[j + 4] & 63;
    if (j >= 4) {
        scale = (packed[j + 4] & 0xf) | (packed[j - 4] >> 6) << 4;
        least = packed[j + 4] >> 4 | (packed[j] >> 6) << 4;
    }
    int number = block[16 + k / 64 * 32 + k % 32] >> (k % 64 / 32 * 4) & 15;
    return from_f16(block) * scale * number - from_f16(block + 2) * least;
}

static double element_q6_k(const uint8_t *block, int k) {
    int half = k / 128, quarter = k % 128 / 32, l = k % 32;
    int low = block[half * 64 + quarter % 2 * 32 + l] >> (quarter / 2 * 4) & 15;
    int high = block[128 + half * 32 + l] >> (quarter * 2) & 3;
    return from_f16(block + 208) * (int8_t)block[192 + k / 16] * ((low | high << 4) - 32);
}

/* The block that holds an element. */
static const uint8_t *block_of(const struct tensor *tensor, int row, int col) {
    size_t i = (size_t)row * (size_t)tensor->cols + (size_t)col;
    struct form form = form_of(tensor->type);
    size_t at = i / (size_t)form.n_k * (size_t)form.bytes;
    return (const uint8_t *)tensor->data + (tensor->period > 0 ? at % tensor->period : at);
}

static double element(const struct tensor *tensor, int row, int col) {
    const uint8_t *block = block_of(tensor, row, col);
    int k = col % form_of(tensor->type).n_k;
    uint16_t half;
    float value;
    switch (tensor->type) {
    case TYPE_F32: memcpy(&value, block, 4); return value;
    case TYPE_BF16: memcpy(&half, block, 2); return from_bf16(half);
    case TYPE_F16: return from_f16(block);
    case TYPE_Q8_0: return from_f16(block) * (int8_t)block[2 + k];
    case TYPE_Q4_0: return from_f16(block) * ((block[2 + k % 16] >> (k / 16 * 4) & 15) - 8);
    case TYPE_Q4_K: return element_q4_k(block, k);
    case TYPE_Q6_K: return element_q6_k(block, k);
    }
    return NAN;
}

/* ---- models ---- */

struct test_model {
    struct model_config config;
    const struct tensor *layers[2][N_ROLES];
    const struct tensor *token_embd, *output_norm;
    std::vector<const struct tensor *> tensors; /* all of them */
    float frequency[128];
};

struct types { /* of a model's matrices */
    enum tensor_type q, k, v, output, gate, up, down, embedding;
};

static struct types like_types(enum tensor_type type) {
    return {type, type, type, type, type, type, type, type};
}

/* A random shape for `shards` or fewer, of rows that blocks of n_k elements fill. */
static struct model_config draw_config(struct random *random, int n_k, int shards) {
    static const int groups[] = {1, 1, 2, 4, 7}, heads[] = {8, 16, 24, 48, 64, 80};
    struct model_config c = {};
    c.n_layers = 2;
    do {
        c.n_kv_heads = shards > 1 ? shards : between(random, 1, 3);
        c.head_dim = pick(random, heads);
        c.n_heads = c.n_kv_heads * pick(random, groups);
    } while (c.n_heads * c.head_dim % n_k != 0 || c.n_heads * c.head_dim > 800);
    c.d_model = n_k > 1 ? n_k * between(random, 1, n_k > 32 ? 1 : 5) : between(random, 30, 170);
    c.d_ff = n_k > 1 ? n_k * between(random, 1, n_k > 32 ? 2 : 9) : between(random, 20, 300);
    int step = shards > 1 ? 2 * shards : 1;
    c.d_ff = (c.d_ff + step - 1) / step * step;
    c.vocab_size = between(random, 50, 300);
    c.rope_dim = below(random, 4) > 0 ? c.head_dim : c.head_dim / 2;
    c.rope_adjacent = below(random, 2) > 0;
    c.norm_epsilon = 1e-5f;
    return c;
}

static const struct tensor *add_tensor(struct test_model *model, struct random *random,
                                       enum tensor_type type, int rows, int cols, float scale,
                                       float center) {
    model->tensors.push_back(make_tensor(random, type, rows, cols, scale, center));
    return model->tensors.back();
}

static void make_layer(struct random *random, struct test_model *model, struct types types,
                       const struct tensor **l) {
    const struct model_config *c = &model->config;
    int d = c->d_model, q = c->n_heads * c->head_dim, kv = c->n_kv_heads * c->head_dim;
    float scale = 1.0f / sqrtf((float)d);
    auto matrix = [&](enum tensor_type type, int rows, int cols) {
        return add_tensor(model, random, type, rows, cols, scale, 0.0f);
    };
    auto vector = [&](int n, float spread, float center) {
        return add_tensor(model, random, TYPE_F32, 1, n, spread, center);
    };
    l[ATTN_NORM] = vector(d, 0.2f, 1.0f);
    l[ATTN_Q] = matrix(types.q, q, d);
    l[ATTN_K] = matrix(types.k, kv, d);
    l[ATTN_V] = matrix(types.v, kv, d);
    if (below(random, 2)) {
        l[Q_BIAS] = vector(q, 1.0f, 0.0f);
        l[K_BIAS] = vector(kv, 1.0f, 0.0f);
        l[V_BIAS] = vector(kv, 1.0f, 0.0f);
    }
    if (below(random, 2)) {
        l[ATTN_Q_NORM] = vector(c->head_dim, 0.2f, 1.0f);
        l[ATTN_K_NORM] = vector(c->head_dim, 0.2f, 1.0f);
    }
    l[ATTN_OUTPUT] = matrix(types.output, d, q);
    l[FFN_NORM] = vector(d, 0.2f, 1.0f);
    l[FFN_GATE] = matrix(types.gate, c->d_ff, d);
    l[FFN_UP] = matrix(types.up, c->d_ff, d);
    l[FFN_DOWN] = matrix(types.down, d, c->d_ff);
}

static struct test_model *make_model(struct random *random, struct model_config config,
                                     struct types types) {
    struct test_model *model = new test_model();
    model->config = config;
    for (int i = 0; i < config.rope_dim / 2; i++)
        model->frequency[i] = (float)pow(10000.0, -2.0 * i / config.rope_dim);
    for (int i = 0; i < config.n_layers; i++)
        make_layer(random, model, types, model->layers[i]);
    model->token_embd =
        add_tensor(model, random, types.embedding, config.vocab_size, config.d_model, 1.0f, 0.0f);
    model->output_norm = add_tensor(model, random, TYPE_F32, 1, config.d_model, 0.2f, 1.0f);
    return model;
}

static void free_model(struct test_model *model) {
    for (const struct tensor *tensor : model->tensors)
        free_tensor(tensor);
    delete model;
}

/* ---- workers ---- */

struct worker {
    struct backend *backend;
    int n_shards;
    struct device *shards[MAX_SHARDS];
    const struct weight *layers[MAX_SHARDS][2][N_ROLES];
};

static void need(bool condition, const char *what) { /* of the tests themselves */
    if (!condition) {
        printf("test_cuda: %s\n", what);
        fflush(stdout);
        abort();
    }
}

static void need_success(cudaError_t error, const char *call) {
    need(error == cudaSuccess, call);
}

static struct backend *open_backend(void (*lost)(void *) = NULL) {
    char error[ERROR_LENGTH] = "";
    struct backend_options options = {};
    options.lost = lost;
    struct backend *backend = cuda_backend_open(&options, error);
    need(backend != NULL, error);
    return backend;
}

static struct cuda_device *cuda_of(struct device *device) {
    return (struct cuda_device *)device;
}

/* What a device is asked to be; the shards of a worker lie on all GPUs in turn. */
static struct device wanted_device(const struct model_config *config, const float *frequency,
                                   int rank, int n_shards, int max_rows) {
    struct device wanted = {};
    wanted.config = config;
    wanted.rope_frequency = frequency;
    wanted.rank = rank;
    wanted.n_shards = n_shards;
    wanted.max_rows = wanted.max_samples = max_rows;
    wanted.kv_type = KV_BF16;
    return wanted;
}

static const struct weight *upload(struct device *device, const struct tensor *tensor,
                                   enum slice_kind kind) {
    char error[ERROR_LENGTH] = "";
    struct slice slice = {kind, device->rank, device->n_shards};
    const struct weight *weight =
        tensor ? device->backend->upload(device, tensor, slice, error) : NULL;
    need(weight || !tensor, error);
    return weight;
}

static void upload_layer(struct device *device, const struct tensor *const *from,
                         const struct weight **to) {
    for (int i = 0; i < N_MODEL_TENSORS; i++) {
        int role = model_tensors[i].role;
        if (role >= ATTN_NORM)
            to[role] = upload(device, from[role], model_tensors[i].slice);
    }
}

/* A device without weights. */
static struct device *open_device(struct backend *backend, const struct device *wanted,
                                  int kv_blocks) {
    char error[ERROR_LENGTH] = "";
    struct device *device = backend->device_open(backend, wanted, error);
    need(device != NULL, error);
    size_t bytes = (size_t)kv_blocks * block_bytes(device->config, device->n_shards, KV_BF16);
    device->kv = backend->alloc(device, bytes, false);
    need(device->kv != NULL, "no memory for keys and values");
    cudaStream_t stream = cuda_of(device)->streams[STREAM_COMPUTE];
    need_success(cudaMemsetAsync(device->kv, 0xff, bytes, stream), "cudaMemsetAsync"); /* NaN */
    return device;
}

static struct worker open_worker(struct backend *backend, const struct test_model *model,
                                 int n_shards, int max_rows) {
    struct worker worker = {};
    worker.backend = backend;
    worker.n_shards = n_shards;
    for (int i = 0; i < n_shards; i++) {
        struct device wanted =
            wanted_device(&model->config, model->frequency, i, n_shards, max_rows);
        wanted.index = i % backend->n_gpus;
        struct device *device = open_device(backend, &wanted, KV_BLOCKS);
        for (int j = 0; j < model->config.n_layers; j++)
            upload_layer(device, model->layers[j], worker.layers[i][j]);
        worker.layers[i][0][TOKEN_EMBD] = upload(device, model->token_embd, SLICE_WHOLE);
        worker.layers[i][0][OUTPUT_NORM] = upload(device, model->output_norm, SLICE_WHOLE);
        worker.layers[i][0][OUTPUT] = worker.layers[i][0][TOKEN_EMBD];
        worker.shards[i] = device;
    }
    return worker;
}

static void close_device(struct device *device) {
    device->backend->release(device, device->kv, false);
    device->backend->device_close(device);
}

static void close_worker(struct worker *worker) { /* and its backend */
    for (int i = 0; i < worker->n_shards; i++)
        close_device(worker->shards[i]);
    worker->backend->close(worker->backend);
}

/* ---- memory of devices ---- */

template <typename T> static std::vector<T> peek(struct device *device, const T *from, size_t n) {
    struct cuda_device *d = cuda_of(device);
    std::vector<T> values(n);
    need_success(cudaSetDevice(device->index), "cudaSetDevice");
    need_success(cudaStreamSynchronize(d->streams[STREAM_COMPUTE]), "cudaStreamSynchronize");
    need_success(cudaMemcpy(values.data(), from, n * sizeof(T), cudaMemcpyDefault), "cudaMemcpy");
    return values;
}

template <typename T> static void poke(struct device *device, T *to, const std::vector<T> &values) {
    struct cuda_device *d = cuda_of(device);
    need_success(cudaSetDevice(device->index), "cudaSetDevice");
    need_success(cudaStreamSynchronize(d->streams[STREAM_COMPUTE]), "cudaStreamSynchronize");
    need_success(cudaMemcpy(to, values.data(), values.size() * sizeof(T), cudaMemcpyDefault),
                 "cudaMemcpy");
    need_success(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
}

static uint16_t poison_of(uint16_t) {
    return 0xffff;
}

static float poison_of(float) {
    return NAN;
}

/* NaN in the first `cols` elements of rows. */
template <typename T>
static void poison(struct device *device, T *to, size_t rows, int stride, int cols) {
    std::vector<T> values(rows * (size_t)stride);
    for (size_t row = 0; row < rows; row++)
        for (int i = 0; i < cols; i++)
            values[row * (size_t)stride + i] = poison_of(T());
    poke(device, to, values);
}

/* Where each k of an input's own part lies in its row: see kernels.cu. */
static std::vector<int> places_of(const struct segments &s) {
    std::vector<int> places;
    for (int i = 0; i < s.n; i++)
        for (int k = s.k[i]; k < s.k[i + 1]; k++)
            places.push_back(s.unit[i] * UNIT + k - s.k[i] / UNIT * UNIT);
    return places;
}

/* Rows of an input with gaps: what `value` says of a row and k at its places, 0 in the gaps. */
template <typename Value>
static std::vector<uint16_t> at_places(const std::vector<int> &places, size_t rows, int stride,
                                       Value value) {
    std::vector<uint16_t> values(rows * (size_t)stride);
    for (size_t row = 0; row < rows; row++)
        for (size_t k = 0; k < places.size(); k++)
            values[row * (size_t)stride + places[k]] = value(row, k);
    return values;
}

__global__ void elements_kernel(const struct matrix m, float *out) {
    grid_wait();
    int n = m.n_units * UNIT;
    for (int k = (int)threadIdx.x; k < n; k += (int)blockDim.x)
        out[(size_t)blockIdx.x * n + k] = matrix_element(m, (int)blockIdx.x, k);
}

/* All elements of a packed matrix, with its gaps and the rest of its last tile. */
static std::vector<float> elements(struct device *device, const struct matrix &m) {
    struct cuda_device *d = enter(device, "testing");
    size_t n = (size_t)m.n_tiles * TILE * (size_t)m.n_units * UNIT;
    float *out = (float *)device->backend->alloc(device, n * sizeof(float), false);
    need(out != NULL, "no memory for the elements of a matrix");
    launch(d, "elements_kernel", elements_kernel, grid_of(m.n_tiles * TILE), THREADS, 0, m, out);
    std::vector<float> values = peek(device, out, n);
    device->backend->release(device, out, false);
    return values;
}

/* ---- batches ---- */

struct test_batch {
    struct batch batch;
    std::vector<int> token, position, row_sequence, table, sample_row, sampled;
    std::vector<struct sequence> sequence;
    std::vector<struct sampling> sampling;
};

/* Rows [start, end) of a text whose blocks are `slots`: of a prompt, or one generated token. */
static void add_text(struct test_batch *b, const int *text, const int *slots, int start, int end,
                     bool generated) {
    struct sequence s = {(int)b->token.size(), end - start,    start,
                         (int)b->table.size(), blocks_of(end), generated};
    for (int i = start; i < end; i++) {
        b->token.push_back(text[i]);
        b->position.push_back(i);
        b->row_sequence.push_back((int)b->sequence.size());
    }
    b->table.insert(b->table.end(), slots, slots + s.n_blocks);
    b->sequence.push_back(s);
}

static void add_sample(struct test_batch *b, int row, struct sampling sampling) {
    b->sample_row.push_back(row);
    b->sampling.push_back(sampling);
}

static const struct batch *seal(struct test_batch *b) { /* it points into itself */
    b->sampled.assign(b->sample_row.size() + 1, -1);
    b->batch.n_rows = (int)b->token.size();
    b->batch.n_sequences = (int)b->sequence.size();
    b->batch.n_samples = (int)b->sample_row.size();
    b->batch.n_blocks = (int)b->table.size();
    b->batch.token = b->token.data();
    b->batch.position = b->position.data();
    b->batch.row_sequence = b->row_sequence.data();
    b->batch.sequence = b->sequence.data();
    b->batch.block_table = b->table.data();
    b->batch.sample_row = b->sample_row.data();
    b->batch.sampling = b->sampling.data();
    b->batch.sampled = b->sampled.data();
    return &b->batch;
}

/* One forward pass, as dynamo.c has it. False: it was a recording. */
static bool forward(struct worker *worker, const struct batch *batch) {
    struct backend *backend = worker->backend;
    int n = worker->n_shards;
    bool record = true;
    for (int s = 0; s < n; s++)
        record = backend->step_begin(worker->shards[s], batch) && record;
    for (int s = 0; s < n && record; s++)
        backend->embed(worker->shards[s], worker->layers[s][0][TOKEN_EMBD]);
    for (int layer = 0; layer < worker->shards[0]->config->n_layers && record; layer++) {
        for (int s = 0; s < n; s++) {
            backend->norm_qkv(worker->shards[s], worker->layers[s][layer]);
            backend->rope_append(worker->shards[s], worker->layers[s][layer], layer);
            backend->attention(worker->shards[s], layer);
            backend->project_add(worker->shards[s], worker->layers[s][layer][ATTN_OUTPUT],
                                 INPUT_ATTENTION);
        }
        if (n > 1)
            backend->all_reduce_add(worker->shards, n);
        for (int s = 0; s < n; s++) {
            backend->norm_gate_up(worker->shards[s], worker->layers[s][layer]);
            backend->project_add(worker->shards[s], worker->layers[s][layer][FFN_DOWN], INPUT_FFN);
        }
        if (n > 1)
            backend->all_reduce_add(worker->shards, n);
    }
    if (record && batch->n_samples > 0)
        backend->sample(worker->shards[0], worker->layers[0][0], NULL);
    for (int s = 0; s < n; s++)
        backend->step_end(worker->shards[s], s == 0 ? batch->sampled : NULL);
    return record;
}

/* ---- what tests share ---- */

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
enum { SLOWER = 1 }; /* a sanitizer watches: fewer draws */

extern "C" const char *__asan_default_options(void) { /* what is too large is no room, as usual */
    return "allocator_may_return_null=1";
}

extern "C" const char *__tsan_default_options(void) {
    return "allocator_may_return_null=1";
}
#else
enum { SLOWER = 0 };
#endif

enum { ORDERS = 3 }; /* of threads, in which everything is run */

static uint64_t seed; /* of this run */

static struct random start(const char *name) { /* each test draws for itself */
    struct random random = {seed};
    for (; *name; name++)
        random.state = random.state * 31 + (unsigned char)*name;
    return random;
}

/* Runs `act` in several orders. `read` gives what came out: the same bits each time. */
template <typename Act, typename Read>
static auto in_orders(struct check *check, const char *what, Act act, Read read) {
    decltype(read()) first;
    for (int order = 1; order <= ORDERS; order++) {
        emu_seed((uint64_t)order);
        act();
        auto again = read();
        if (order == 1)
            first = again;
        CHECK(!memcmp(first.data(), again.data(), first.size() * sizeof first[0]),
              "%s: other bits in order %d", what, order);
    }
    return first;
}

struct worst { /* error, in units of what is allowed: above 1 is wrong */
    double error;
    int row, col;
};

static void compare(struct worst *worst, int row, int col, double got, double expected,
                    double allowed) {
    double error = got == expected ? 0.0 : fabs(got - expected) / allowed;
    if (!(error <= worst->error))
        *worst = {error == error ? error : INFINITY, row, col};
}

#define CHECK_WORST(worst, ...)                                                                    \
    do {                                                                                           \
        char message[300];                                                                         \
        snprintf(message, sizeof message, __VA_ARGS__);                                            \
        CHECK((worst).error <= 1.0, "%s: %g times the error allowed at row %d, column %d",         \
              message, (worst).error, (worst).row, (worst).col);                                   \
    } while (0)
#endif /* CUDA_WORKER_H */
