/* ops.h: what every backend must do, op by op: one suite of tests for test_kernels.c (CPU) and
 * test_cuda.cu (GPUs, and the emulator).
 *
 * An op's inputs are written into the device, its outputs are NaN before, and its results are
 * compared with float64 of the inputs that it read (reference.h), so an error is found in the op
 * that makes it, and the worst element is named. Whole models are compared with reference.h too.
 * Then the promise that matters most, bit for bit: a row depends on its own text and role alone,
 * not on what else is in the batch, on chunks, blocks, threads or shards. Shapes are drawn from the
 * clock; a failure is repeated with the seed that was printed:
 *
 *     build/native/test_kernels                     all tests
 *     build/native/test_kernels products 1234       those with this in their name, from a seed
 *
 * A test file includes its backend as text, says in an enum what the backend is like, includes
 * this, and defines the functions that know the backend's memory: all below as far as "random
 * numbers". Nothing behind that knows a backend from inside. C that is also C++. */
#ifndef OPS_H
#define OPS_H

#include <sched.h>
#include <time.h>

#include "check.h"
#include "reference.h"

/* ---- what a backend's test file defines ---- */

/* What the ops leave for each other, as floats (n_rows, width), whatever the device makes of it. */
enum activation {
    A_X, /* (d_model) the residual stream */
    A_H, /* (d_model) the input of q, k, v, gate, up and logits */
    A_RAW_Q,
    A_RAW_K,
    A_RAW_V,     /* (heads * head_dim) as the products leave them */
    A_Q,         /* (heads * head_dim) normed and turned; may be A_RAW_Q's place */
    A_ATTENTION, /* (heads * head_dim) */
    A_FFN,       /* (d_ff) */
    A_LOGITS,    /* (vocab_size), a row for each sample, the first LOGITS_KEPT */
    A_TURN,      /* (rope_dim) cosine and sine of each pair */
    N_ACTIVATIONS
};

/* Errors that are allowed of a sum: of the sum of its terms' magnitudes, as f32 leaves them, and of
 * the root of the sum of their squares, where terms were rounded before. */
struct slack {
    double magnitudes, spread;
};

/* Beside these, in an enum before this header is included:
 *     ORDERS         in which each op is run, for it must give the same bits in all
 *     VARIANTS       of the backend: its fast paths, its types of keys and values
 *     LOGITS_KEPT    rows of logits that the device holds at a time
 *     DRAWS          of a test that is not told otherwise
 *     TEXT_DRAWS     of the tests for equal bits
 *     CROWD_SHARDS   shards at most that a text is told on beside others
 *     SHARD_ROWS     rows of a step that shards add up in more than one piece
 *     MOST_ROWS      rows of a product that fill more than one of its largest pieces
 *     COPIES         of a stream that are more than it can hold at once
 *     MXFP4          1: it multiplies that type
 *     COPIES_LATE    1: a copy is not done as soon as it is ordered
 *     PARTS_SHARED   1: a shard's part of a tensor that is uploaded twice is one copy
 * and #define SAMPLER_SLACK, by which sums of weights may be off. */
static struct backend *open_backend(int variant, uint64_t order);
static enum kv_type kv_type_of(int variant);
/* Another order of threads from now on, where there is a choice. */
static void set_order(uint64_t order);
/* The first n_rows rows; all others become NaN. What pads rows becomes what ops may find there. */
static void poke(struct device *device, enum activation a, const float *values, int n_rows);
/* Also checks that nobody has written to what pads rows. */
static void peek(struct check *check, struct device *device, enum activation a, float *values,
                 int n_rows);
/* A KV block as floats, (n_layers, {k, v}, heads of the shard, BLOCK_TOKENS, head_dim). */
static void poke_block(struct device *device, int slot, const float *values);
/* The scales of rows whose norm a backend leaves for the product behind it. */
static void scale_normed(struct device *device, float *values);
static void peek_block(struct device *device, int slot, float *values);
static void poison_kv(struct device *device, size_t bytes); /* all NaN */
/* The elements of a shard's part of a matrix; checks what else stands in the packed form. */
static void read_weight(struct check *check, struct device *device, const struct weight *weight,
                        float *values);
/* What is kept of a file's element, and how far the device may be from that: of its own size, and
 * of the largest element of the tensor. */
static double kept_element(enum tensor_type type, double value, double largest, double *allowed);
static double multiplied(enum tensor_type type, double kept); /* what a product makes of it */
static struct slack product_slack(const struct device *device, enum tensor_type type);
static struct slack attention_slack(const struct device *device);
/* Relative error of what is kept in an activation, or in a block. */
static double activation_error(enum activation a);
static double kv_error(const struct device *device);
/* The experts (n_rows, n_used) that norm_route has chosen last. */
static void read_choice(struct device *device, int *chosen, int n_rows);
/* Error of all logits of a whole model, beside their root mean square. */
static double model_error(const struct device *device, enum tensor_type type);
static void draw_rows(struct device *device, int n); /* n tokens, from the logits that are there */
static void check_idle(struct check *check, struct device *device); /* what holds between ops */

/* ---- random numbers ---- */

enum { N_TYPES = 7 + MXFP4 };
static const enum tensor_type all_types[8] = {TYPE_F32,  TYPE_F16,  TYPE_BF16, TYPE_Q8_0,
                                              TYPE_Q4_0, TYPE_Q4_K, TYPE_Q6_K, TYPE_MXFP4};

static uint64_t seed; /* of this run */

struct random {
    uint64_t state;
};

static struct random start(const char *name) { /* each test draws for itself */
    struct random random = {seed};
    for (; *name; name++)
        random.state = random.state * 31 + (unsigned char)*name;
    return random;
}

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

static float normal(struct random *random) { /* near enough to one */
    double sum = -6.0;
    for (int i = 0; i < 12; i++)
        sum += word(random) * 0x1p-32;
    return (float)sum;
}

#define COUNT(list)        ((int)(sizeof(list) / sizeof *(list)))
#define PICK(random, list) ((list)[below(random, COUNT(list))])

static void shuffle(struct random *random, int *list, int n) { /* 0 to n - 1 */
    for (int i = 0; i < n; i++) {
        int j = below(random, i + 1);
        list[i] = list[j];
        list[j] = i;
    }
}

static int min_of(int a, int b) {
    return a < b ? a : b;
}

static size_t nth(int row, int width, int col) {
    return (size_t)row * (size_t)width + (size_t)col;
}

static float *floats(size_t n) {
    return (float *)ref_allocate(n, sizeof(float));
}

static float *random_floats(struct random *random, size_t n) {
    float *values = floats(n);
    for (size_t i = 0; i < n; i++)
        values[i] = normal(random);
    return values;
}

static bool same_bits(const float *a, const float *b, size_t n) { /* of NaNs too */
    return !memcmp(a, b, n * sizeof *a);
}

/* ---- tensors and models ---- */

static uint16_t bf16_of(float value) { /* to nearest even; of numbers */
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static double rounded(double value) { /* to bf16; of what a float holds */
    uint16_t half = bf16_of((float)value);
    return ref_f32((const uint8_t *)&half, 16);
}

static uint16_t f16_of(float value) { /* of normal numbers, truncated */
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    int exponent = (int)(bits >> 23 & 255) - 112;
    uint32_t sign = bits >> 16 & 0x8000;
    return (uint16_t)(exponent < 1 ? sign : sign | (uint32_t)exponent << 10 | (bits >> 13 & 0x3ff));
}

/* A block of a quantized type: any numbers, and f16 scales that make elements of about `scale`. */
static void make_block(struct random *random, enum tensor_type type, float scale, uint8_t *block) {
    for (int i = 0; i < ref_block_bytes(type); i++)
        block[i] = (uint8_t)below(random, 256);
    if (type == TYPE_MXFP4) {
        block[0] = (uint8_t)(126 + (int)floor(log2((double)scale / 3)) + below(random, 3));
        return;
    }
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
    struct tensor *tensor = (struct tensor *)ref_allocate(1, sizeof *tensor);
    size_t size = (size_t)ref_block_bytes(type);
    size_t n = (size_t)rows * (size_t)cols / (size_t)ref_block_elements(type);
    uint8_t *data = (uint8_t *)ref_allocate(n, size);
    for (size_t i = 0; i < n; i++) {
        if (ref_block_elements(type) > 1) {
            make_block(random, type, scale, data + i * size);
            continue;
        }
        float value = center + scale * normal(random);
        uint16_t half = type == TYPE_F16 ? f16_of(value) : bf16_of(value);
        memcpy(data + i * size, type == TYPE_F32 ? (void *)&value : (void *)&half, size);
    }
    tensor->name.data = "t";
    tensor->name.length = 1;
    tensor->type = type;
    tensor->rows = rows;
    tensor->cols = cols;
    tensor->bytes = n * size;
    tensor->data = data;
    return tensor;
}

static void free_tensor(const struct tensor *tensor) {
    if (tensor)
        free((void *)(uintptr_t)tensor->data);
    free((void *)(uintptr_t)tensor);
}

enum { TEST_LAYERS = 2, MOST_PAIRS = 128 };

struct test_model {
    struct model model;
    const struct tensor *tensors[TEST_LAYERS][N_ROLES];
    float frequency[2 * MOST_PAIRS];
};

/* A random shape for `shards` or fewer, of rows that blocks of n_k elements fill. */
static struct model_config draw_config(struct random *random, int n_k, int shards) {
    static const int groups[] = {1, 1, 2, 4, 7}, heads[] = {8, 16, 24, 48, 64, 80, 128};
    struct model_config c;
    memset(&c, 0, sizeof c);
    c.n_layers = TEST_LAYERS;
    do {
        c.n_kv_heads = shards > 1 ? shards : between(random, 1, 3);
        c.head_dim = PICK(random, heads);
        c.n_heads = c.n_kv_heads * PICK(random, groups);
    } while (c.n_heads * c.head_dim % n_k != 0 || c.n_heads * c.head_dim > 800);
    c.d_model = n_k > 1 ? n_k * between(random, 1, n_k > 32 ? 1 : 5) : between(random, 30, 170);
    c.d_ff = n_k > 1 ? n_k * between(random, 1, n_k > 32 ? 2 : 11) : between(random, 20, 350);
    int step = shards > 1 ? (2 * shards > n_k ? 2 * shards : n_k) : 1;
    c.d_ff = (c.d_ff + step - 1) / step * step;
    c.vocab_size = between(random, 50, 400);
    c.rope_theta = 10000.0f;
    c.rope_dim = below(random, 4) > 0 ? c.head_dim : c.head_dim / 2;
    c.rope_adjacent = below(random, 2) > 0;
    c.norm_epsilon = below(random, 2) ? 1e-5f : 0.1f;
    return c;
}

enum { PLAIN, EXPERTS, GPT_OSS_LIKE, WINDOWED, GEMMA_LIKE, N_KINDS };

/* The same of a kind of model that has more. */
static struct model_config draw_kind(struct random *random, int n_k, int shards, int kind) {
    struct model_config c = draw_config(random, n_k, shards);
    if (kind == EXPERTS || kind == GPT_OSS_LIKE) {
        c.n_experts = between(random, 6, 20);
        c.n_used = between(random, 1, 5);
        c.share_of_all = below(random, 2);
    }
    if (kind == GPT_OSS_LIKE || kind == WINDOWED) {
        c.activation = ACTIVATE_CLAMPED;
        c.rope_scale = 32.0f;
        c.rope_magnitude = 1.3f;
        c.yarn_low = 1.0f;
        c.yarn_high = 5.0f;
    }
    if (kind == GEMMA_LIKE) {
        c.activation = ACTIVATE_GELU;
        c.post_norm = true;
        c.embedding_scale = 3.0f;
        c.attention_scale = 0.2f;
        c.theta_windowed = 100.0f;
        c.rope_scale = 8.0f;
    }
    if (kind >= GPT_OSS_LIKE) {
        c.window = between(random, 1, 20);
        c.window_period = 2;
    }
    return c;
}

static int extent_of(const struct model_config *c, enum extent extent) {
    switch (extent) {
    case DIM_VOCAB: return c->vocab_size;
    case DIM_MODEL: return c->d_model;
    case DIM_Q: return c->n_heads * c->head_dim;
    case DIM_KV: return c->n_kv_heads * c->head_dim;
    case DIM_FF: return c->d_ff;
    case DIM_HEAD: return c->head_dim;
    case DIM_HEADS: return c->n_heads;
    case DIM_EXPERTS: return c->n_experts;
    case DIM_EXPERTS_FF: return c->n_experts * c->d_ff;
    case DIM_EXPERTS_MODEL: return c->n_experts * c->d_model;
    default: return 1;
    }
}

/* Whether a model of this shape can have a tensor. */
static bool has_tensor(const struct model_config *c, int role) {
    if (role == NO_ROLE || role == ROPE_FREQS)
        return false;
    if (role == ATTN_POST_NORM || role == FFN_POST_NORM)
        return c->post_norm;
    if (role == ATTN_SINKS)
        return c->window > 0 && !c->post_norm;
    if (role == ATTN_OUTPUT_BIAS || (role >= FFN_GATE_BIAS && role <= FFN_DOWN_BIAS))
        return c->activation == ACTIVATE_CLAMPED && (role == ATTN_OUTPUT_BIAS || c->n_experts == 0);
    if (role >= FFN_GATE && role <= FFN_DOWN)
        return c->n_experts == 0;
    return role < ROUTER || c->n_experts > 0;
}

/* Every tensor of the table; of those that some models lack, half. types: of the matrices, by
 * their roles. */
static struct test_model *make_model(struct random *random, struct model_config config,
                                     const enum tensor_type types[N_ROLES]) {
    struct test_model *m = (struct test_model *)ref_allocate(1, sizeof *m);
    m->model.config = config;
    m->model.layers = m->tensors;
    ref_frequencies(&m->model, m->frequency);
    for (int i = 0; i < N_MODEL_TENSORS; i++) {
        const struct model_tensor *t = &model_tensors[i];
        int role = t->role, rows = extent_of(&config, t->rows), cols = extent_of(&config, t->cols);
        bool vector = t->rows == DIM_ONE, bias = vector && !strstr(t->name, "norm");
        for (int layer = 0; layer < (model_layered(t) ? config.n_layers : 1); layer++) {
            bool usual = (t->required_by & (MODEL_LLAMA | MODEL_DENSE | MODEL_EXPERTS)) ||
                         role == ATTN_POST_NORM || role == FFN_POST_NORM;
            if (!has_tensor(&config, role) || (!usual && below(random, 2)) ||
                m->tensors[layer][role])
                continue;
            /* as in files: what is chosen hangs on less than a smaller type keeps */
            bool f32 = vector || role == ROUTER;
            float scale = 1.0f / sqrtf((float)config.d_model);
            scale = vector ? (bias ? 1.0f : 0.2f) : role == TOKEN_EMBD ? 1.0f : scale;
            m->tensors[layer][role] = make_tensor(random, f32 ? TYPE_F32 : types[role], rows, cols,
                                                  scale, vector && !bias ? 1.0f : 0.0f);
        }
    }
    if (!m->tensors[0][OUTPUT])
        m->tensors[0][OUTPUT] = m->tensors[0][TOKEN_EMBD];
    return m;
}

static struct test_model *make_model_of(struct random *random, struct model_config config,
                                        enum tensor_type type) {
    enum tensor_type types[N_ROLES];
    for (int role = 0; role < N_ROLES; role++)
        types[role] = type;
    return make_model(random, config, types);
}

static void free_model(struct test_model *m) {
    if (m->tensors[0][OUTPUT] == m->tensors[0][TOKEN_EMBD])
        m->tensors[0][OUTPUT] = NULL;
    for (int layer = 0; layer < TEST_LAYERS; layer++)
        for (int role = 0; role < N_ROLES; role++)
            free_tensor(m->tensors[layer][role]);
    free(m);
}

/* ---- a worker: the devices that run a model ---- */

enum { KV_BLOCKS = 160 };

struct worker {
    struct backend *backend;
    int n_shards;
    struct device *shards[MAX_SHARDS];
    const struct weight *weights[MAX_SHARDS][TEST_LAYERS][N_ROLES];
};

static void need(bool condition, const char *what) { /* without which tests have no meaning */
    if (!condition) {
        printf("%s\n", what);
        fflush(stdout);
        abort();
    }
}

static int width_of(const struct device *device, enum activation a) {
    const struct model_config *c = device->config;
    int n = device->n_shards, q = c->n_heads / n * c->head_dim,
        kv = c->n_kv_heads / n * c->head_dim;
    const int widths[N_ACTIVATIONS] = {c->d_model,  c->d_model,    q,          kv, kv, q, q,
                                       c->d_ff / n, c->vocab_size, c->rope_dim};
    return widths[a];
}

static int rows_of(const struct device *device, enum activation a) {
    int logits = device->rank > 0 ? 0 : min_of(device->max_samples, LOGITS_KEPT);
    return a == A_LOGITS ? logits : device->max_rows;
}

/* What a device is asked to be; the shards of a worker lie on all GPUs in turn. */
static struct device wanted_device(const struct backend *backend, const struct model_config *config,
                                   const float *frequency, int max_rows, enum kv_type kv_type) {
    struct device wanted;
    memset(&wanted, 0, sizeof wanted);
    wanted.backend = (struct backend *)(uintptr_t)backend;
    wanted.config = config;
    wanted.rope_frequency = frequency;
    wanted.n_shards = 1;
    wanted.max_rows = wanted.max_samples = max_rows;
    wanted.kv_type = kv_type;
    return wanted;
}

/* A device without weights, all NaN. */
static struct device *open_device(struct backend *backend, const struct device *wanted,
                                  int kv_blocks) {
    char error[ERROR_LENGTH] = "";
    struct device *device = backend->device_open(backend, wanted, error);
    need(device != NULL, error);
    size_t bytes =
        (size_t)kv_blocks * block_bytes(device->config, device->n_shards, device->kv_type);
    device->kv = backend->alloc(device, bytes);
    need(device->kv != NULL, "no memory for keys and values");
    poison_kv(device, bytes);
    for (int a = 0; a < N_ACTIVATIONS; a++)
        poke(device, (enum activation)a, NULL, 0);
    return device;
}

static void close_device(struct device *device) {
    device->backend->release(device, device->kv);
    device->backend->device_close(device);
}

/* A device with a backend of its own, for what needs no weights. */
static struct device *open_alone(const struct model_config *config, int max_rows) {
    struct backend *backend = open_backend(0, (uint64_t)max_rows);
    struct device wanted = wanted_device(backend, config, NULL, max_rows, kv_type_of(0));
    return open_device(backend, &wanted, 1);
}

static void close_alone(struct device *device) {
    struct backend *backend = device->backend;
    close_device(device);
    backend->close(backend);
}

static const struct weight *upload(struct device *device, const struct tensor *tensor,
                                   const struct tensor *const *together, struct slice slice) {
    char error[ERROR_LENGTH] = "";
    const struct weight *weight =
        tensor ? device->backend->upload(device, tensor, together, slice, error) : NULL;
    need(weight || !tensor, error);
    return weight;
}

static struct worker *open_worker_on(struct backend *backend, int variant,
                                     const struct test_model *m, int n_shards, int max_rows) {
    struct worker *worker = (struct worker *)ref_allocate(1, sizeof *worker);
    worker->backend = backend;
    worker->n_shards = n_shards;
    for (int i = 0; i < n_shards; i++) {
        struct device wanted =
            wanted_device(backend, &m->model.config, m->frequency, max_rows, kv_type_of(variant));
        wanted.index = backend->n_gpus > 0 ? i % backend->n_gpus : i;
        wanted.rank = i;
        wanted.n_shards = n_shards;
        worker->shards[i] = open_device(backend, &wanted, KV_BLOCKS);
        for (int j = 0; j < N_MODEL_TENSORS; j++) {
            int role = model_tensors[j].role;
            struct slice slice = {model_tensors[j].slice, i, n_shards};
            for (int layer = 0; layer < m->model.config.n_layers && role != NO_ROLE; layer++) {
                const struct tensor *together[4];
                if (worker->weights[i][layer][role])
                    continue;
                model_together(m->tensors[layer], role, together);
                worker->weights[i][layer][role] =
                    upload(worker->shards[i], m->tensors[layer][role], together, slice);
            }
        }
    }
    return worker;
}

static void close_devices(struct worker *worker) {
    for (int i = 0; i < worker->n_shards; i++)
        close_device(worker->shards[i]);
    free(worker);
}

/* With a backend of its own. */
static struct worker *open_worker(int variant, uint64_t order, const struct test_model *m,
                                  int n_shards, int max_rows) {
    return open_worker_on(open_backend(variant, order), variant, m, n_shards, max_rows);
}

static void close_worker(struct worker *worker) { /* and its backend */
    struct backend *backend = worker->backend;
    close_devices(worker);
    backend->close(backend);
}

/* ---- batches ---- */

enum { MOST_BATCH_ROWS = 5000, MOST_SEQUENCES = 600, MOST_TABLE = 8192, MOST_LENGTH = 2048 };

struct test_batch { /* points into itself: it stays where it is */
    struct batch batch;
    int token[MOST_BATCH_ROWS], position[MOST_BATCH_ROWS], row_sequence[MOST_BATCH_ROWS];
    int table[MOST_TABLE], sample_row[MOST_SEQUENCES], sampled[MOST_SEQUENCES];
    struct sequence sequence[MOST_SEQUENCES];
    struct sampling sampling[MOST_SEQUENCES];
};

static struct batch *start_batch(struct test_batch *b) {
    memset(b, 0, sizeof *b);
    b->batch.token = b->token;
    b->batch.position = b->position;
    b->batch.row_sequence = b->row_sequence;
    b->batch.sequence = b->sequence;
    b->batch.block_table = b->table;
    b->batch.sample_row = b->sample_row;
    b->batch.sampling = b->sampling;
    b->batch.sampled = b->sampled;
    return &b->batch;
}

/* Rows [begin, end) of a text whose blocks are `slots`: of a prompt, or one generated token. */
static void add_text(struct batch *b, const int *text, const int *slots, int begin, int end,
                     bool generated) {
    int blocks = blocks_of(end), n = end - begin;
    need(b->n_rows + n <= MOST_BATCH_ROWS && b->n_blocks + blocks <= MOST_TABLE &&
             b->n_sequences < MOST_SEQUENCES,
         "a batch is too large");
    struct sequence s = {b->n_rows, n, begin, b->n_blocks, blocks, generated};
    for (int i = begin; i < end; i++) {
        b->token[b->n_rows] = text[i];
        b->position[b->n_rows] = i;
        b->row_sequence[b->n_rows++] = b->n_sequences;
    }
    memcpy(b->block_table + b->n_blocks, slots, sizeof *slots * (size_t)blocks);
    b->n_blocks += blocks;
    b->sequence[b->n_sequences++] = s;
}

static void add_sample(struct batch *b, int row, struct sampling sampling) {
    b->sample_row[b->n_samples] = row;
    b->sampling[b->n_samples++] = sampling;
}

static struct sampling warm(uint64_t seed_of_draw) {
    struct sampling sampling = {0.9f, 0.95f, 0.0f, 0, seed_of_draw};
    return sampling;
}

/* Texts with blocks of their own, in random order: generated tokens, then parts of prompts. */
static void add_texts(struct batch *b, struct random *random, int n_generated, int n_prompts,
                      int longest) {
    int slots[KV_BLOCKS], text[MOST_LENGTH] = {0}, used = 0;
    shuffle(random, slots, KV_BLOCKS);
    for (int i = 0; i < n_generated + n_prompts; i++) {
        bool generated = i < n_generated;
        int begin = below(random, longest);
        int end = generated ? begin + 1 : between(random, begin + 1, longest);
        if (!generated && below(random, 2))
            begin = 0;
        if (used + blocks_of(end) > KV_BLOCKS)
            break;
        add_text(b, text, slots + used, begin, end, generated);
        used += blocks_of(end);
    }
}

/* ---- ops ---- */

static void reduce_layer(struct worker *worker, int layer, int post_norm) {
    const struct weight *norm[MAX_SHARDS];
    for (int s = 0; s < worker->n_shards; s++)
        norm[s] = worker->weights[s][layer][post_norm];
    if (worker->n_shards > 1 || norm[0])
        worker->backend->all_reduce_add(worker->shards, worker->n_shards, norm[0] ? norm : NULL);
}

/* One forward pass, as dynamo.c has it. False: it was a recording. chosen: NULL, or where the
 * experts of the first text's rows go, those of the next layer `stride` behind. */
static bool forward_choosing(struct worker *worker, const struct batch *batch, int *chosen,
                             int stride) {
    struct backend *backend = worker->backend;
    int n = worker->n_shards;
    bool record = true;
    for (int s = 0; s < n; s++)
        record = backend->step_begin(worker->shards[s], batch) && record;
    for (int s = 0; s < n && record; s++)
        backend->embed(worker->shards[s], worker->weights[s][0][TOKEN_EMBD]);
    for (int layer = 0; layer < worker->shards[0]->config->n_layers && record; layer++) {
        for (int s = 0; s < n; s++) {
            const struct weight *const *l = worker->weights[s][layer];
            backend->norm_qkv(worker->shards[s], l);
            backend->rope_append(worker->shards[s], l, layer);
            backend->attention(worker->shards[s], l, layer);
            if (l[ATTN_OUTPUT_BIAS])
                backend->add_bias(worker->shards[s], l[ATTN_OUTPUT_BIAS]);
            backend->project_add(worker->shards[s], l[ATTN_OUTPUT], INPUT_ATTENTION);
        }
        reduce_layer(worker, layer, ATTN_POST_NORM);
        for (int s = 0; s < n; s++) {
            const struct weight *const *l = worker->weights[s][layer];
            if (l[ROUTER]) {
                backend->norm_route(worker->shards[s], l);
                backend->expert_gate_up(worker->shards[s], l);
                backend->expert_down_add(worker->shards[s], l);
                if (chosen)
                    read_choice(worker->shards[s], chosen + layer * stride,
                                batch->sequence[0].n_rows);
                continue;
            }
            backend->norm_gate_up(worker->shards[s], l);
            if (l[FFN_DOWN_BIAS])
                backend->add_bias(worker->shards[s], l[FFN_DOWN_BIAS]);
            backend->project_add(worker->shards[s], l[FFN_DOWN], INPUT_FFN);
        }
        reduce_layer(worker, layer, FFN_POST_NORM);
    }
    if (record && batch->n_samples > 0)
        backend->sample(worker->shards[0], worker->weights[0][0], NULL);
    for (int s = 0; s < n; s++)
        backend->step_end(worker->shards[s], s == 0 ? batch->sampled : NULL);
    return record;
}

static bool forward(struct worker *worker, const struct batch *batch) {
    return forward_choosing(worker, batch, NULL, 0);
}

enum op {
    OP_EMBED,
    OP_NORM_QKV,
    OP_ROPE,
    OP_ATTENTION,
    OP_OUTPUT,
    OP_GATE_UP,
    OP_DOWN,
    OP_LOGITS,
    OP_EXPERTS
};
static const char *const op_names[] = {"embed",     "norm_qkv",    "rope_append",
                                       "attention", "attn_output", "norm_gate_up",
                                       "ffn_down",  "sample",      "experts"};

/* One op on a worker of one shard, within a step. Inputs: all rows of the device, so that rows
 * which the step does not have are known too; outputs: NULL before it was run. */
struct trial;

struct mask {           /* of attention, where it is more than the op has */
    int window;         /* tokens that are seen at most; 0: all */
    const float *sinks; /* (n_heads) scores of a token without a value; NULL: none */
    void (*attend)(const struct trial *t);
};

struct trial {
    struct check *check;
    const struct mask *mask; /* NULL: the op itself */
    struct worker *worker;
    struct device *device;
    const struct batch *batch;
    struct test_model *m;
    int layer;
    float *in[N_ACTIVATIONS], *out[N_ACTIVATIONS]; /* (rows_of, width_of) */
    float *kv; /* (KV_BLOCKS, block) after rope_append; NULL: not looked at */
};

/* Opens a worker for a model, which are closed with the trial, and begins a step. */
static void open_trial(struct trial *t, struct check *check, int variant, struct test_model *m,
                       const struct batch *batch, int max_rows) {
    memset(t, 0, sizeof *t);
    t->check = check;
    t->worker = open_worker(variant, (uint64_t)max_rows, m, 1, max_rows);
    t->device = t->worker->shards[0];
    t->m = m;
    t->batch = batch;
    CHECK(t->worker->backend->step_begin(t->device, batch), "a step that replays nothing");
}

static void forget(float **values) {
    for (int a = 0; a < N_ACTIVATIONS; a++) {
        free(values[a]);
        values[a] = NULL;
    }
}

static void close_trial(struct trial *t) {
    t->worker->backend->step_end(t->device, NULL);
    forget(t->in);
    forget(t->out);
    free(t->kv);
    close_worker(t->worker);
    free_model(t->m);
}

static void give(struct trial *t, enum activation a, struct random *random) {
    size_t n = (size_t)rows_of(t->device, a) * (size_t)width_of(t->device, a);
    free(t->in[a]);
    t->in[a] = random_floats(random, n);
    for (size_t i = 0; i < n; i++) /* where the device keeps bf16, numbers that it holds */
        t->in[a][i] =
            activation_error(a) > 1e-4 ? (float)rounded((double)t->in[a][i]) : t->in[a][i];
}

static void call_op(const struct trial *t, enum op op) {
    struct backend *backend = t->worker->backend;
    const struct weight *const *l = t->worker->weights[0][t->layer];
    switch (op) {
    case OP_EMBED: backend->embed(t->device, l[TOKEN_EMBD]); break;
    case OP_NORM_QKV: backend->norm_qkv(t->device, l); break;
    case OP_ROPE: backend->rope_append(t->device, l, t->layer); break;
    case OP_ATTENTION:
        if (t->mask)
            t->mask->attend(t);
        else
            backend->attention(t->device, l, t->layer);
        break;
    case OP_OUTPUT: backend->project_add(t->device, l[ATTN_OUTPUT], INPUT_ATTENTION); break;
    case OP_GATE_UP: backend->norm_gate_up(t->device, l); break;
    case OP_DOWN: backend->project_add(t->device, l[FFN_DOWN], INPUT_FFN); break;
    case OP_EXPERTS:
        backend->norm_route(t->device, l);
        backend->expert_gate_up(t->device, l);
        backend->expert_down_add(t->device, l);
        break;
    case OP_LOGITS: backend->sample(t->device, t->worker->weights[0][0], NULL); break;
    }
}

static size_t block_elements(const struct device *device) { /* without what pads heads */
    const struct model_config *c = device->config;
    return nth(2 * c->n_layers * (c->n_kv_heads / device->n_shards), BLOCK_TOKENS * c->head_dim, 0);
}

static float *read_kv(struct device *device) {
    size_t n = block_elements(device);
    float *kv = floats(KV_BLOCKS * n);
    for (int slot = 0; slot < KV_BLOCKS; slot++)
        peek_block(device, slot, kv + (size_t)slot * n);
    return kv;
}

/* Runs an op in each order, from the same inputs and NaN; it must give the same bits each time.
 * `outputs`: a bit for each activation that it writes. */
static void run_op(struct trial *t, enum op op, unsigned outputs) {
    struct check *check = t->check;
    struct device *device = t->device;
    size_t kv_floats = KV_BLOCKS * block_elements(device);
    forget(t->out);
    for (int order = 1; order <= ORDERS; order++) {
        set_order((uint64_t)order);
        for (int a = 0; a < N_ACTIVATIONS; a++)
            if (t->in[a] || outputs >> a & 1)
                poke(device, (enum activation)a, NULL, 0);
        for (int a = 0; a < N_ACTIVATIONS; a++)
            if (t->in[a])
                poke(device, (enum activation)a, t->in[a], rows_of(device, (enum activation)a));
        if (op == OP_ROPE)
            poison_kv(device,
                      KV_BLOCKS * block_bytes(device->config, device->n_shards, device->kv_type));
        call_op(t, op);
        check_idle(check, device);
        for (int a = 0; a < N_ACTIVATIONS; a++) {
            size_t n = (size_t)rows_of(device, (enum activation)a) *
                       (size_t)width_of(device, (enum activation)a);
            float *values = outputs >> a & 1 ? floats(n) : NULL, *first = t->out[a];
            if (values)
                peek(check, device, (enum activation)a, values,
                     rows_of(device, (enum activation)a));
            if (values && a == A_H && op != OP_LOGITS)
                scale_normed(device, values);
            if (values && first)
                CHECK(same_bits(first, values, n), "%s: other bits in order %d", op_names[op],
                      order);
            t->out[a] = first ? first : values;
            free(first ? values : NULL);
        }
        float *kv = op == OP_ROPE ? read_kv(device) : NULL;
        if (kv && t->kv)
            CHECK(same_bits(kv, t->kv, kv_floats), "rope_append: other blocks in order %d", order);
        free(t->kv);
        t->kv = kv;
    }
}

/* ---- comparing ---- */

struct worst { /* error, in units of what is allowed: above 1 is wrong */
    double error;
    int row, col;
};

static void compare(struct worst *worst, int row, int col, double got, double expected,
                    double allowed) {
    double error = got == expected ? 0.0 : fabs(got - expected) / allowed;
    if (!(error <= worst->error)) {
        worst->error = error == error ? error : INFINITY;
        worst->row = row;
        worst->col = col;
    }
}

#define CHECK_WORST(worst, ...)                                                                    \
    do {                                                                                           \
        char message[300];                                                                         \
        snprintf(message, sizeof message, __VA_ARGS__);                                            \
        CHECK((worst).error <= 1.0, "%s: %g times the error allowed at row %d, column %d",         \
              message, (worst).error, (worst).row, (worst).col);                                   \
    } while (0)

/* Rows from `n_rows` on, of which the step knows nothing, are as they were: NaN, or the input. */
static void check_rest(struct trial *t, enum activation a, int n_rows) {
    struct check *check = t->check;
    int rows = rows_of(t->device, a), width = width_of(t->device, a);
    size_t at = nth(n_rows, width, 0), end = nth(rows, width, 0);
    while (at < end && (t->in[a] ? same_bits(&t->out[a][at], &t->in[a][at], 1)
                                 : t->out[a][at] != t->out[a][at]))
        at++;
    CHECK(at >= end, "activation %d was written in row %zu, behind the last of %d", (int)a,
          at / (size_t)width, n_rows);
}

/* h of the rows of x, or of those that sample, against float64. */
static void check_norm(struct trial *t, enum op op, const struct tensor *weight, bool samples) {
    struct check *check = t->check;
    const struct model_config *c = t->device->config;
    int n = samples ? t->batch->n_samples : t->batch->n_rows, d = c->d_model;
    double *expected = ref_doubles(1, d);
    struct worst worst = {0, 0, 0};
    for (int row = 0; row < n; row++) {
        const float *x = t->in[A_X] + nth(samples ? t->batch->sample_row[row] : row, d, 0);
        for (int i = 0; i < d; i++)
            expected[i] = (double)x[i];
        ref_norm(expected, weight, d, (double)c->norm_epsilon, expected);
        for (int i = 0; i < d; i++)
            compare(&worst, row, i, (double)t->out[A_H][nth(row, d, i)], expected[i],
                    activation_error(A_H) * fabs(expected[i]) + 1e-30);
    }
    CHECK_WORST(worst, "%s: the norm of %d rows of %d", op_names[op], n, d);
    free(expected);
}

/* Rows of an input times outputs of a matrix: the sum, and what errors are compared with. */
struct sum {
    double value, magnitudes, squares;
};

static struct sum sum_of(const double *w, const float *input, int n) {
    struct sum sum = {0, 0, 0};
    for (int k = 0; k < n; k++) {
        double product = w[k] * (double)input[k];
        sum.value += product;
        sum.magnitudes += fabs(product);
        sum.squares += product * product;
    }
    return sum;
}

static double allowed_of(struct slack slack, struct sum sum, double added) {
    return slack.magnitudes * (sum.magnitudes + fabs(added)) + slack.spread * sqrt(sum.squares) +
           1e-30;
}

/* A matrix as the device multiplies by it. */
static double *dense(struct trial *t, const struct weight *weight, const struct tensor *tensor) {
    size_t n = (size_t)tensor->rows * (size_t)tensor->cols;
    float *kept = floats(n);
    double *w = ref_doubles((int)tensor->rows, (int)tensor->cols);
    read_weight(t->check, t->device, weight, kept);
    for (size_t i = 0; i < n; i++)
        w[i] = multiplied(tensor->type, (double)kept[i]);
    free(kept);
    return w;
}

/* Rounding of what several matrices multiply at once is that of the coarsest of them. */
static struct slack coarsest(const struct device *device, const struct tensor *const *l,
                             const int *roles, int n) {
    struct slack all = product_slack(device, l[roles[0]]->type);
    for (int i = 1; i < n; i++) {
        struct slack one = product_slack(device, l[roles[i]]->type);
        all.magnitudes = fmax(all.magnitudes, one.magnitudes);
        all.spread = fmax(all.spread, one.spread);
    }
    return all;
}

/* out = matrix . input + bias, + what was in `out` before if it was an input too. */
static void check_product(struct trial *t, enum op op, int role, const struct tensor *bias,
                          const float *input, int n_rows, enum activation out, struct slack slack) {
    struct check *check = t->check;
    const struct tensor *tensor = t->m->tensors[t->layer][role];
    int cols = (int)tensor->cols, width = (int)tensor->rows;
    double *w = dense(t, t->worker->weights[0][t->layer][role], tensor);
    struct worst worst = {0, 0, 0};
    for (int row = 0; row < n_rows; row++)
        for (int i = 0; i < width; i++) {
            struct sum sum = sum_of(w + nth(i, cols, 0), input + nth(row, cols, 0), cols);
            double added = bias ? ref_element(bias, 0, i) : 0.0;
            added += t->in[out] ? (double)t->in[out][nth(row, width, i)] : 0.0;
            compare(&worst, row, i, (double)t->out[out][nth(row, width, i)], sum.value + added,
                    allowed_of(slack, sum, added));
        }
    CHECK_WORST(worst, "%s, role %d: type %d, %d rows of %d", op_names[op], role, (int)tensor->type,
                n_rows, cols);
    check_rest(t, out, n_rows);
    free(w);
}

/* ---- each op ---- */

static void check_norm_qkv(struct trial *t) {
    static const int roles[] = {ATTN_Q, ATTN_K, ATTN_V}, biases[] = {Q_BIAS, K_BIAS, V_BIAS};
    const struct tensor *const *l = t->m->tensors[t->layer];
    struct slack slack = coarsest(t->device, l, roles, 3);
    run_op(t, OP_NORM_QKV, 1 << A_H | 1 << A_RAW_Q | 1 << A_RAW_K | 1 << A_RAW_V);
    check_norm(t, OP_NORM_QKV, l[ATTN_NORM], false);
    for (int i = 0; i < 3; i++)
        check_product(t, OP_NORM_QKV, roles[i], l[biases[i]], t->out[A_H], t->batch->n_rows,
                      (enum activation)(A_RAW_Q + i), slack);
    if (t->batch->n_rows == 0)
        return;
    struct check *check = t->check;
    float was = t->in[A_X][0];
    t->in[A_X][0] = 1e20f; /* whose square is no f32 */
    run_op(t, OP_NORM_QKV, 1 << A_RAW_Q);
    CHECK(isnan(t->out[A_RAW_Q][0]), "a row whose squares overflow: %g",
          (double)t->out[A_RAW_Q][0]);
    t->in[A_X][0] = was;
}

static void check_gate_up(struct trial *t) {
    static const int roles[] = {FFN_GATE, FFN_UP};
    struct check *check = t->check;
    const struct tensor *const *l = t->m->tensors[t->layer];
    const struct weight *const *weights = t->worker->weights[0][t->layer];
    int d = t->device->config->d_model, d_ff = t->device->config->d_ff;
    struct slack slack = coarsest(t->device, l, roles, 2);
    run_op(t, OP_GATE_UP, 1 << A_H | 1 << A_FFN);
    check_norm(t, OP_GATE_UP, l[FFN_NORM], false);
    double *gate = dense(t, weights[FFN_GATE], l[FFN_GATE]);
    double *up = dense(t, weights[FFN_UP], l[FFN_UP]);
    struct worst worst = {0, 0, 0};
    for (int row = 0; row < t->batch->n_rows; row++)
        for (int i = 0; i < d_ff; i++) {
            struct sum g = sum_of(gate + nth(i, d, 0), t->out[A_H] + nth(row, d, 0), d);
            struct sum u = sum_of(up + nth(i, d, 0), t->out[A_H] + nth(row, d, 0), d);
            double off_g = 1.1 * allowed_of(slack, g, 0.0), off_u = allowed_of(slack, u, 0.0);
            double silu = ref_silu(g.value), expected = silu * u.value;
            compare(&worst, row, i, (double)t->out[A_FFN][nth(row, d_ff, i)], expected,
                    off_g * (fabs(u.value) + off_u) + fabs(silu) * off_u +
                        activation_error(A_FFN) * fabs(expected));
        }
    CHECK_WORST(worst, "norm_gate_up: type %d, %d rows, %d of %d", (int)l[FFN_GATE]->type,
                t->batch->n_rows, d_ff, d);
    check_rest(t, A_FFN, t->batch->n_rows);
    free(gate);
    free(up);
}

/* x += matrix . input */
static void check_project(struct trial *t, struct random *random, enum op op) {
    enum activation input = op == OP_DOWN ? A_FFN : A_ATTENTION;
    int role = op == OP_DOWN ? FFN_DOWN : ATTN_OUTPUT, n = t->batch->n_rows;
    size_t all = nth(rows_of(t->device, input), width_of(t->device, input), 0);
    give(t, input, random);
    for (size_t i = nth(n, width_of(t->device, input), 0); i < all; i++)
        t->in[input][i] = NAN; /* rows that there are not */
    run_op(t, op, 1 << A_X);
    check_product(t, op, role, NULL, t->in[input], n, A_X,
                  product_slack(t->device, t->m->tensors[t->layer][role]->type));
}

static void check_logits(struct trial *t) {
    struct check *check = t->check;
    const struct tensor *const *own = t->m->tensors[0];
    int n = t->batch->n_samples, vocab = t->device->config->vocab_size;
    t->layer = 0;
    run_op(t, OP_LOGITS, 1 << A_H | 1 << A_LOGITS);
    check_norm(t, OP_LOGITS, own[OUTPUT_NORM], true);
    check_product(t, OP_LOGITS, OUTPUT, NULL, t->out[A_H], n, A_LOGITS,
                  product_slack(t->device, own[OUTPUT]->type));
    float *host = floats(nth(n, vocab, 0));
    t->worker->backend->sample(t->device, t->worker->weights[0][0], host);
    run_op(t, OP_LOGITS, 1 << A_LOGITS); /* which waits for the device */
    CHECK(same_bits(host, t->out[A_LOGITS], nth(n, vocab, 0)), "logits that were read, %d rows", n);
    free(host);
}

/* Where an element of a key (value 0) or value (1) stands in what read_kv gives. */
static size_t kv_at(const struct device *device, int slot, int layer, int value, int head,
                    int token, int i) {
    const struct model_config *c = device->config;
    int heads = c->n_kv_heads / device->n_shards;
    size_t plane = ((size_t)layer * 2 + (size_t)value) * (size_t)heads + (size_t)head;
    return (size_t)slot * block_elements(device) +
           (plane * BLOCK_TOKENS + (size_t)token) * (size_t)c->head_dim + (size_t)i;
}

static int slot_of(const struct batch *b, int row, int position) {
    return b->block_table[b->sequence[b->row_sequence[row]].first_block + position / BLOCK_TOKENS];
}

/* One head of a row of q (value -1), k (0) or v (1), as rope_append leaves it. */
static void check_head(const struct trial *t, int row, int value, int head, bool *written,
                       struct worst *worst) {
    const struct model_config *c = t->device->config;
    const struct tensor *const *l = t->m->tensors[t->layer];
    int dim = c->head_dim, position = t->batch->position[row];
    enum activation raw = (enum activation)(A_RAW_Q + 1 + value);
    size_t from = nth(row, width_of(t->device, raw), head * dim);
    double *expected = ref_doubles(1, dim);
    for (int i = 0; i < dim; i++)
        expected[i] = (double)t->in[raw][from + (size_t)i];
    if (value < 1)
        ref_head(c, l[value < 0 ? ATTN_Q_NORM : ATTN_K_NORM], t->m->frequency, position, expected);
    for (int i = 0; i < dim; i++) {
        double error = value < 0 ? activation_error(A_Q) : kv_error(t->device);
        double got = value < 0 ? (double)t->out[A_Q][from + (size_t)i] : 0.0;
        if (value >= 0) {
            size_t at = kv_at(t->device, slot_of(t->batch, row, position), t->layer, value, head,
                              position % BLOCK_TOKENS, i);
            got = (double)t->kv[at];
            written[at] = true;
        }
        compare(worst, row, head * dim + i, got, expected[i], error * fabs(expected[i]) + 3e-6);
    }
    free(expected);
}

/* q, and keys and values in their blocks, where nothing else has changed. */
static void check_rope(struct trial *t) {
    struct check *check = t->check;
    const struct model_config *c = t->device->config;
    size_t n = KV_BLOCKS * block_elements(t->device), strange = 0;
    bool *written = (bool *)ref_allocate(n, sizeof *written);
    struct worst worst_q = {0, 0, 0}, worst_kv = {0, 0, 0};
    run_op(t, OP_ROPE, 1 << A_Q);
    for (int row = 0; row < t->batch->n_rows; row++) {
        for (int head = 0; head < c->n_heads; head++)
            check_head(t, row, -1, head, written, &worst_q);
        for (int head = 0; head < 2 * c->n_kv_heads; head++)
            check_head(t, row, head % 2, head / 2, written, &worst_kv);
    }
    while (strange < n && (written[strange] || t->kv[strange] != t->kv[strange]))
        strange++;
    CHECK(strange == n, "rope_append wrote to element %zu, which has no token", strange);
    CHECK_WORST(worst_q, "q of heads of %d, %d turned", c->head_dim, c->rope_dim);
    CHECK_WORST(worst_kv, "k and v of heads of %d, %d turned", c->head_dim, c->rope_dim);
    free(written);
}

/* Random keys and values where the batch's texts have them, and NaN everywhere else. */
static float *give_kv(struct trial *t, struct random *random) {
    const struct model_config *c = t->device->config;
    size_t block = block_elements(t->device), n = KV_BLOCKS * block;
    float *kv = floats(n);
    for (size_t i = 0; i < n; i++)
        kv[i] = NAN;
    for (int row = 0; row < t->batch->n_rows; row++)
        for (int at = 0, last = t->batch->position[row]; at <= last; at++) {
            int slot = slot_of(t->batch, row, at), token = at % BLOCK_TOKENS;
            size_t first = kv_at(t->device, slot, t->layer, 0, 0, token, 0);
            if (kv[first] == kv[first])
                continue; /* a row before this one has made it */
            for (int i = 0; i < 2 * c->n_kv_heads * c->head_dim; i++)
                kv[kv_at(t->device, slot, t->layer, i % 2, i / 2 % c->n_kv_heads, token,
                         i / 2 / c->n_kv_heads)] = (float)rounded((double)normal(random));
        }
    for (int slot = 0; slot < KV_BLOCKS; slot++)
        poke_block(t->device, slot, kv + (size_t)slot * block);
    return kv;
}

/* One row and head of attention; error allowed is that of a sum of weighted values. A sink is a
 * token more, whose key gives its score, and whose value is 0. */
static void check_attended(const struct trial *t, const float *kv, int row, int head,
                           struct worst *worst) {
    const struct model_config *c = t->device->config;
    int dim = c->head_dim, end = t->batch->position[row] + 1, n = end;
    if (t->mask && t->mask->window > 0)
        n = min_of(n, t->mask->window);
    int kv_head = head / (c->n_heads / c->n_kv_heads), q_cols = c->n_heads * dim;
    double *q = ref_doubles(1, dim), *weight = ref_doubles(1, n + 1), *out = ref_doubles(1, dim);
    double *keys = ref_doubles(n + 1, dim), *values = ref_doubles(n + 1, dim), square = 0.0;
    struct slack slack = attention_slack(t->device);
    for (int i = 0; i < dim; i++) {
        q[i] = (double)t->in[A_Q][nth(row, q_cols, head * dim + i)];
        square += q[i] * q[i];
    }
    for (int i = 0; i < n * dim; i++) {
        int at = end - n + i / dim, slot = slot_of(t->batch, row, at), token = at % BLOCK_TOKENS;
        keys[i] = (double)kv[kv_at(t->device, slot, t->layer, 0, kv_head, token, i % dim)];
        values[i] = (double)kv[kv_at(t->device, slot, t->layer, 1, kv_head, token, i % dim)];
    }
    bool sinks = t->mask && t->mask->sinks;
    for (int i = 0; i < dim && sinks; i++)
        keys[n * dim + i] = q[i] * sqrt(dim) / square * (double)t->mask->sinks[head];
    ref_attention(q, keys, values, n + sinks, dim, dim, weight, out);
    for (int i = 0; i < dim; i++) {
        struct sum sum = {0, 0, 0};
        for (int at = 0; at < n; at++) {
            double part = weight[at] * values[nth(at, dim, i)];
            sum.magnitudes += fabs(part);
            sum.squares += part * part;
        }
        compare(worst, row, head * dim + i,
                (double)t->out[A_ATTENTION][nth(row, q_cols, head * dim + i)], out[i],
                allowed_of(slack, sum, 0.0) + activation_error(A_ATTENTION) * fabs(out[i]));
    }
    free(q);
    free(weight);
    free(out);
    free(keys);
    free(values);
}

/* Attention of a batch, some rows and heads of it compared. */
static void check_attention(struct check *check, struct random *random,
                            const struct model_config *config, const struct batch *batch,
                            int variant, const struct mask *mask) {
    struct trial t;
    open_trial(&t, check, variant, make_model_of(random, *config, TYPE_F32), batch,
               batch->n_rows + 1);
    t.mask = mask;
    t.layer = below(random, TEST_LAYERS);
    give(&t, A_Q, random);
    int q_cols = width_of(t.device, A_Q), dim = config->head_dim;
    for (int i = 0; i < batch->n_rows * config->n_heads; i++) {
        static const float widths[] = {0.25f, 1.0f, 4.0f}; /* even and peaked weights */
        float width = PICK(random, widths);
        for (int j = 0; j < dim; j++)
            t.in[A_Q][i * dim + j] *= width;
    }
    float *kv = give_kv(&t, random);
    run_op(&t, OP_ATTENTION, 1 << A_ATTENTION);
    struct worst worst = {0, 0, 0};
    for (int i = 0; i < (SANITIZED ? 40 : 150); i++)
        check_attended(&t, kv, below(random, batch->n_rows), below(random, config->n_heads),
                       &worst);
    CHECK_WORST(worst, "attention: %d rows, %d heads of %d, %d for keys", batch->n_rows,
                config->n_heads, dim, config->n_kv_heads);
    int missing = 0;
    for (int i = 0; i < batch->n_rows * q_cols; i++)
        missing += t.out[A_ATTENTION][i] != t.out[A_ATTENTION][i];
    CHECK(missing == 0, "attention left out %d elements", missing);
    check_rest(&t, A_ATTENTION, batch->n_rows);
    free(kv);
    close_trial(&t);
}

/* ---- tests of single ops ---- */

/* A tensor, or a shard's part of one, on a device of a model for which it is `attn_output`, or
 * something else. */
static void check_weight(struct check *check, struct random *random, enum tensor_type type) {
    static const int counts[] = {1, 2, 4, 8}, heads[] = {8, 16, 40, 64};
    struct model_config config = draw_config(random, 1, 8);
    int n_k = ref_block_elements(type), count = PICK(random, counts), first_row = 0, first_col = 0;
    config.head_dim = PICK(random, heads);
    config.n_heads = 8 * between(random, 1, 2);
    config.rope_dim = 0;
    int rows = between(random, 2, 5) * count * between(random, 1, 3);
    int cols = n_k == 1 ? between(random, 1, 400) : n_k * between(random, 1, n_k > 32 ? 2 : 12);
    struct slice slice = {(enum slice_kind)below(random, 3), 0, 1};
    if (slice.kind == SLICE_COLS && config.n_heads * config.head_dim % n_k == 0 && below(random, 2))
        cols = config.n_heads * config.head_dim;
    else if (slice.kind == SLICE_COLS)
        cols = (cols + 2 * count - 1) / (2 * count) * 2 * count;
    if (slice.kind != SLICE_WHOLE) {
        slice.rank = below(random, count);
        slice.count = count;
    }
    struct device *device = open_alone(&config, 1);
    struct tensor *tensor = make_tensor(random, type, rows, cols, 0.1f, 0.0f);
    const struct weight *weight = upload(device, tensor, NULL, slice);
    CHECK(weight == upload(device, tensor, NULL, slice) ||
              !(slice.kind == SLICE_WHOLE || PARTS_SHARED),
          "two uploads share one copy");
    double largest = 0.0;
    for (int i = 0; i < rows * cols; i++)
        largest = fmax(largest, fabs(ref_element(tensor, i / cols, i % cols)));
    if (slice.kind == SLICE_ROWS)
        first_row = slice.rank * (rows /= slice.count);
    if (slice.kind == SLICE_COLS)
        first_col = slice.rank * (cols /= slice.count);
    float *got = floats(nth(rows, cols, 0));
    read_weight(check, device, weight, got);
    struct worst worst = {0, 0, 0};
    for (int row = 0; row < rows; row++)
        for (int col = 0; col < cols; col++) {
            double allowed = 0.0, value = ref_element(tensor, first_row + row, first_col + col);
            double expected = kept_element(type, value, largest, &allowed);
            compare(&worst, row, col, (double)got[nth(row, cols, col)], expected, allowed);
        }
    CHECK_WORST(worst, "type %d, (%d, %d), slice %d, %d of %d", (int)type, (int)tensor->rows,
                (int)tensor->cols, (int)slice.kind, slice.rank, slice.count);
    close_alone(device); /* its backend's weights know the tensor */
    free_tensor(tensor);
    free(got);
}

static void weights(struct check *check) {
    struct random random = start("weights");
    for (int i = 0; i < (SANITIZED ? 14 : 56); i++)
        check_weight(check, &random, all_types[i % N_TYPES]);
}

/* How far a weight may be from what the file says, if Q8_0 takes the place of a stored type: there
 * is the same number with the same scale, or with one rounded to f16 (IQ4_XS), or a multiple of
 * 1/127 of the largest of 32. */
static double repacked_error(int stored, const float *part, int i) {
    double largest = 0.0, least_scale = 0x1p-25; /* half of the least f16 */
    for (int j = 0; j < 32; j++)
        largest = fmax(largest, fabs((double)part[j]));
    if (stored == STORED_Q5_0 || stored == STORED_IQ4_NL)
        return 0.0;
    if (stored == STORED_IQ4_XS)
        return fmax(0x1p-11 * fabs((double)part[i]), 127 * least_scale);
    return 0.501 * largest / 127 + 127 * least_scale;
}

/* Blocks of types that no kernel multiplies, as another program decodes them (make_types.py). */
static void stored_types(struct check *check) {
    struct random random = start("stored");
    FILE *file = fopen("test/data/types.bin", "rb");
    CHECK(file, "test/data/types.bin: cannot be read; is this the repository's root?");
    uint32_t head[2]; /* type and number of weights */
    int n_types = 0;
    for (; file && fread(head, sizeof head, 1, file) == 1 && head[1] == 1024; n_types++) {
        static const int block_bytes[24] = {0, 0,   0, 20, 0, 0, 22, 24, 0,  0, 84, 110,
                                            0, 176, 0, 0,  0, 0, 0,  0,  18, 0, 0,  136};
        int n_k = head[0] > 8 && head[0] != STORED_IQ4_NL ? 256 : 32, bytes = block_bytes[head[0]];
        int rows = 1 << between(&random, 1, 2), cols = (int)head[1] / rows;
        struct tensor *tensor = make_tensor(&random, TYPE_Q8_0, rows, cols, 1.0f, 0.0f);
        tensor->stored = (int)head[0];
        tensor->stored_bytes = head[1] / (size_t)n_k * (size_t)bytes;
        float *expected = floats(head[1]), *got = floats(head[1]);
        CHECK(fread((void *)(uintptr_t)tensor->data, tensor->stored_bytes, 1, file) == 1 &&
                  fread(expected, sizeof *expected, head[1], file) == head[1],
              "types.bin ends too early");
        struct model_config config = draw_config(&random, 1, 1);
        config.rope_dim = 0;
        struct device *device = open_alone(&config, 1);
        struct slice slice = {SLICE_WHOLE, 0, 1}, half = {SLICE_ROWS, 1, 2};
        slice = below(&random, 2) ? half : slice;
        read_weight(check, device, upload(device, tensor, NULL, slice), got);
        struct worst worst = {0, 0, 0};
        const float *from = expected + slice.rank * (rows /= slice.count) * cols;
        for (int i = 0; i < rows * cols; i++)
            compare(&worst, i / cols, i % cols, (double)got[i], (double)from[i],
                    repacked_error(tensor->stored, from + i / 32 * 32, i % 32));
        CHECK_WORST(worst, "stored type %d, (%d, %d)", tensor->stored, rows, cols);
        close_alone(device);
        free_tensor(tensor);
        free(expected);
        free(got);
    }
    CHECK(n_types == 8, "%d types in types.bin", n_types);
    if (file)
        fclose(file);
}

/* A tensor that repeats itself is kept as if it were written out. */
static void periodic_tensors(struct check *check) {
    struct random random = start("periodic");
    struct model_config config = draw_config(&random, 1, 1);
    config.rope_dim = 0;
    for (int i = 0; i < 2 * N_TYPES; i++) {
        enum tensor_type type = all_types[i % N_TYPES];
        int n_k = ref_block_elements(type), bytes = ref_block_bytes(type);
        int cols = n_k * between(&random, 1, n_k > 1 ? 3 : 90), rows = 2 * between(&random, 5, 40);
        struct tensor *whole = make_tensor(&random, type, rows, cols, 0.1f, 0.0f);
        int n_blocks = rows * cols / n_k;
        struct tensor repeated = *whole;
        repeated.period = (size_t)bytes * (size_t)between(&random, 1, n_blocks + 5);
        uint8_t *data = (uint8_t *)(uintptr_t)whole->data;
        for (size_t at = repeated.period; at < whole->bytes; at++)
            data[at] = data[at - repeated.period];
        struct device *device = open_alone(&config, 1);
        struct slice slice = {SLICE_WHOLE, 0, 1}, half = {SLICE_ROWS, 1, 2};
        slice = below(&random, 2) ? half : slice;
        const struct weight *one = upload(device, whole, NULL, slice);
        const struct weight *other = upload(device, &repeated, NULL, slice);
        size_t n = nth(rows / slice.count, cols, 0);
        float *a = floats(n), *b = floats(n);
        read_weight(check, device, one, a);
        read_weight(check, device, other, b);
        CHECK(one != other && same_bits(a, b, n), "type %d, (%d, %d), period %zu of %zu", (int)type,
              rows, cols, repeated.period, whole->bytes);
        close_alone(device);
        free_tensor(whole);
        free(a);
        free(b);
    }
}

static void embedding(struct check *check) {
    static struct test_batch test;
    struct random random = start("embedding");
    for (int type = 0; type < N_TYPES; type++) {
        struct model_config config = draw_config(&random, ref_block_elements(all_types[type]), 1);
        struct test_model *m = make_model_of(&random, config, all_types[type]);
        int n = between(&random, 1, 30), text[30] = {0}, slots[2] = {0};
        int d = config.d_model, vocab = config.vocab_size, turn_dim = config.rope_dim;
        struct batch *batch = start_batch(&test);
        add_text(batch, text, slots, 0, n, false);
        for (int i = 0; i < n; i++) {
            batch->token[i] = below(&random, vocab);
            batch->position[i] = below(&random, 1 << between(&random, 1, 20));
        }
        struct trial t;
        open_trial(&t, check, type % VARIANTS, m, batch, n + 2);
        run_op(&t, OP_EMBED, 1 << A_X);
        float *table = floats(nth(vocab, d, 0)), *turn = floats(nth(n, turn_dim, 0));
        read_weight(check, t.device, t.worker->weights[0][0][TOKEN_EMBD], table);
        peek(check, t.device, A_TURN, turn, n);
        struct worst worst = {0, 0, 0};
        for (int row = 0; row < n; row++) {
            CHECK(same_bits(&t.out[A_X][nth(row, d, 0)], &table[nth(batch->token[row], d, 0)],
                            (size_t)d),
                  "type %d, token %d", type, batch->token[row]);
            for (int i = 0; i < turn_dim / 2; i++) {
                double angle = (double)batch->position[row] * (double)m->frequency[i];
                const float *got = &turn[nth(row, turn_dim, 2 * i)];
                compare(&worst, row, i, (double)got[0], cos(angle), 1e-7);
                compare(&worst, row, i, (double)got[1], sin(angle), 1e-7);
            }
        }
        check_rest(&t, A_X, n);
        CHECK_WORST(worst, "angles of %d pairs", turn_dim / 2);
        free(table);
        free(turn);
        close_trial(&t);
    }
}

/* Rows that sample: some, but never all, for such a step may be recorded. */
static void add_some_samples(struct batch *batch, struct random *random) {
    int n = batch->n_rows;
    if (n < 2)
        return;
    for (int i = between(random, 1, min_of(n - 1, LOGITS_KEPT)); i < n; i++)
        if (batch->n_samples < LOGITS_KEPT)
            add_sample(batch, below(random, n), warm(1));
}

/* All products of a layer, for so many rows of either kind. */
static void check_products(struct check *check, struct random *random, struct test_model *m,
                           int n_generated, int n_prompt, int variant) {
    static struct test_batch test;
    int n_rows = n_generated + n_prompt, d = m->model.config.d_model;
    int text[MOST_LENGTH] = {0}, slots[KV_BLOCKS] = {0};
    struct batch *batch = start_batch(&test);
    for (int i = 0; i < n_generated; i++)
        add_text(batch, text, slots, 0, 1, true);
    for (int done = 0, n; done < n_prompt; done += n) {
        n = between(random, 1, n_prompt - done);
        add_text(batch, text, slots, 0, n, false);
    }
    add_some_samples(batch, random);
    struct trial t;
    open_trial(&t, check, variant, m, batch, n_rows + below(random, 9));
    t.layer = below(random, TEST_LAYERS);
    give(&t, A_X, random);
    for (int row = 0; row < t.device->max_rows; row++)
        for (int i = 0; i < d; i++) {
            float *x = &t.in[A_X][nth(row, d, i)];
            *x = row < n_rows ? *x * (float)(1 << row % 5) : NAN;
        }
    check_norm_qkv(&t);
    check_gate_up(&t);
    give(&t, A_X, random);
    check_project(&t, random, OP_OUTPUT);
    check_project(&t, random, OP_DOWN);
    if (batch->n_samples > 0)
        check_logits(&t);
    close_trial(&t);
}

static void products_of(struct check *check, const char *name, enum tensor_type type) {
    static const int generated[] = {0, 1, 3, 8, 9, 16, 17, 32, 33, 64, 65, 70};
    static const int prompt[] = {0, 1, 30, 64, 130};
    struct random random = start(name);
    for (int i = 0; i < (SANITIZED ? 1 : DRAWS); i++) {
        struct model_config config = draw_config(&random, ref_block_elements(type), 1);
        int n_generated = PICK(&random, generated), n_prompt = PICK(&random, prompt);
        if (n_generated + n_prompt == 0)
            n_generated = n_prompt = 5;
        check_products(check, &random, make_model_of(&random, config, type), n_generated, n_prompt,
                       i % VARIANTS);
    }
}

#define PRODUCTS(name, type)                                                                       \
    static void products_##name(struct check *check) {                                             \
        products_of(check, #name, type);                                                           \
    }
PRODUCTS(f32, TYPE_F32)
PRODUCTS(f16, TYPE_F16)
PRODUCTS(bf16, TYPE_BF16)
PRODUCTS(q8_0, TYPE_Q8_0)
PRODUCTS(q4_0, TYPE_Q4_0)
PRODUCTS(q4_k, TYPE_Q4_K)
PRODUCTS(q6_k, TYPE_Q6_K)
PRODUCTS(mxfp4, MXFP4 ? TYPE_MXFP4 : TYPE_F32)

static void products_of_mixed_types(struct check *check) {
    static const enum tensor_type some[] = {TYPE_F32, TYPE_BF16, TYPE_F16, TYPE_Q8_0, TYPE_Q4_0};
    struct random random = start("mixed");
    for (int i = 0; i < (SANITIZED ? 1 : 3); i++) {
        enum tensor_type types[N_ROLES];
        for (int role = 0; role < N_ROLES; role++)
            types[role] = PICK(&random, some);
        types[FFN_UP] = i % 2 ? TYPE_F32 : TYPE_Q4_0;
        types[FFN_GATE] = i % 2 ? types[FFN_GATE] : TYPE_Q8_0;
        struct test_model *m = make_model(&random, draw_config(&random, 32, 1), types);
        check_products(check, &random, m, between(&random, 1, 40), between(&random, 1, 70),
                       i % VARIANTS);
    }
}

/* x += what the experts of each row make of it. */
/* What is kept of the matrices of all experts, (n_experts * rows, columns); *rounded_too: not
 * just what the file has. */
static double *kept_matrix(const struct tensor *tensor, bool *rounded_too) {
    int rows = (int)tensor->rows, cols = (int)tensor->cols;
    double *w = ref_doubles(rows, cols), off, largest = 0;
    for (int i = 0; i < rows * cols; i++) {
        double value = ref_element(tensor, i / cols, i % cols);
        w[i] = multiplied(tensor->type, kept_element(tensor->type, value, largest, &off));
        *rounded_too = *rounded_too || off > 0;
    }
    return w;
}

struct expert_matrices { /* gate, up, down: what is kept of them, and by what sums may be off */
    double *w[3];
    const struct tensor *bias[3];
    struct slack slack;
    double input; /* by what their inputs may be off */
};

/* expected, allowed (d_model) += what one expert makes of a row h, by its share. */
static void add_expert(const struct model_config *c, const struct expert_matrices *m, int expert,
                       double share, const float *h, double *expected, double *allowed) {
    int d = c->d_model, d_ff = c->d_ff;
    float *ffn = floats((size_t)d_ff);
    double *off = ref_doubles(1, d_ff);
    for (int i = 0; i < d_ff; i++) {
        double value[2], error[2], best;
        for (int j = 0; j < 2; j++) {
            double bias = m->bias[j] ? ref_element(m->bias[j], 0, expert * d_ff + i) : 0.0;
            struct sum sum = sum_of(m->w[j] + nth(expert * d_ff + i, d, 0), h, d);
            value[j] = sum.value + bias;
            error[j] = allowed_of(m->slack, sum, bias) + m->input * sqrt(sum.squares);
        }
        best = ref_activation(c->activation, value[0], value[1]);
        ffn[i] = (float)best;
        for (int corner = 0; corner < 4; corner++) {
            double other =
                ref_activation(c->activation, value[0] + (corner & 1 ? 1 : -1) * error[0],
                               value[1] + (corner & 2 ? 1 : -1) * error[1]);
            off[i] = fmax(off[i], 1.1 * fabs(other - best));
        }
        off[i] += activation_error(A_FFN) * fabs(best);
    }
    for (int i = 0; i < d; i++) {
        const double *w = m->w[2] + nth(expert * d + i, d_ff, 0);
        double bias = m->bias[2] ? ref_element(m->bias[2], 0, expert * d + i) : 0.0, squares = 0;
        struct sum sum = sum_of(w, ffn, d_ff);
        for (int k = 0; k < d_ff; k++)
            squares += w[k] * w[k] * off[k] * off[k];
        expected[i] += share * (sum.value + bias);
        allowed[i] += share * (allowed_of(m->slack, sum, bias) + sqrt(squares) +
                               1e-4 * fabs(sum.value + bias)); /* 1e-4: of the share */
    }
    free(ffn);
    free(off);
}

/* The experts are those that the device has chosen, which are preferred but for rounding. */
static void check_experts(struct check *check, struct random *random, enum tensor_type type,
                          int n_generated, int n_prompt, int kind) {
    static const int roles[] = {GATE_EXPERTS, UP_EXPERTS, DOWN_EXPERTS};
    static struct test_batch test;
    struct model_config c = draw_kind(random, ref_block_elements(type), 1, kind);
    int n = n_generated + n_prompt, d = c.d_model, text[MOST_LENGTH] = {0}, slots[KV_BLOCKS] = {0};
    struct batch *batch = start_batch(&test);
    for (int i = 0; i < n_generated; i++)
        add_text(batch, text, slots, 0, 1, true);
    if (n_prompt > 0)
        add_text(batch, text, slots, 0, n_prompt, false);
    struct trial t;
    open_trial(&t, check, 0, make_model_of(random, c, type), batch, n + 3);
    t.layer = below(random, TEST_LAYERS);
    give(&t, A_X, random);
    run_op(&t, OP_EXPERTS, 1 << A_X);
    const struct tensor *const *l = t.m->tensors[t.layer];
    int *chosen = (int *)ref_allocate((size_t)(n * c.n_used), sizeof *chosen);
    read_choice(t.device, chosen, n);
    struct expert_matrices m = {
        {NULL}, {NULL}, product_slack(t.device, type), activation_error(A_H)};
    bool rounded_too = false;
    for (int i = 0; i < 3; i++) {
        m.w[i] = kept_matrix(l[roles[i]], &rounded_too);
        m.bias[i] = l[roles[i] + GATE_EXPERTS_BIAS - GATE_EXPERTS];
    }
    m.slack.spread += rounded_too ? 3 * 0x1p-9 : 0.0;
    double *x = ref_doubles(1, d), *expected = ref_doubles(1, d), *allowed = ref_doubles(1, d);
    double *share = ref_doubles(1, c.n_experts), least_gap = INFINITY;
    float *h = floats((size_t)d);
    struct worst worst = {0, 0, 0};
    for (int row = 0; row < n; row++) {
        const float *in = t.in[A_X] + nth(row, d, 0);
        for (int i = 0; i < d; i++) {
            expected[i] = (double)in[i];
            allowed[i] = 1e-6 * fabs(expected[i]);
        }
        ref_norm(expected, l[FFN_NORM], d, (double)c.norm_epsilon, x);
        least_gap = fmin(least_gap, ref_choose(&c, l, x, chosen + row * c.n_used, false, share));
        for (int i = 0; i < d; i++)
            h[i] = (float)(activation_error(A_H) > 1e-4 ? rounded(x[i]) : x[i]);
        for (int e = 0; e < c.n_experts; e++)
            if (share[e] > 0)
                add_expert(&c, &m, e, share[e], h, expected, allowed);
        for (int i = 0; i < d; i++)
            compare(&worst, row, i, (double)t.out[A_X][nth(row, d, i)], expected[i], allowed[i]);
    }
    CHECK(least_gap > -1e-5, "an expert that others are preferred to by %g", -least_gap);
    CHECK_WORST(worst, "experts: type %d, %d of %d, %d rows", (int)type, c.n_used, c.n_experts, n);
    check_rest(&t, A_X, n);
    for (int i = 0; i < 3; i++)
        free(m.w[i]);
    free(chosen);
    free(x);
    free(expected);
    free(allowed);
    free(share);
    free(h);
    close_trial(&t);
}

static void experts(struct check *check) {
    static const int generated[] = {0, 1, 3, 8, 33, 64, 70}, prompt[] = {0, 1, 30, 200};
    struct random random = start("experts");
    for (int i = 0; i < (SANITIZED ? 3 : 2 * N_TYPES); i++) {
        int n_generated = PICK(&random, generated), n_prompt = PICK(&random, prompt);
        check_experts(check, &random, all_types[(seed + (uint64_t)i) % N_TYPES],
                      n_generated + n_prompt > 0 ? n_generated : 1, n_prompt,
                      i % 2 ? EXPERTS : GPT_OSS_LIKE);
    }
}

/* More rows than a piece of the largest product has, and more than one block of outputs. */
static void products_of_many_rows(struct check *check) {
    static struct test_batch test;
    struct random random = start("many rows");
    struct model_config config = draw_config(&random, 1, 1);
    config.n_kv_heads = config.n_heads = 1;
    config.head_dim = config.rope_dim = 8;
    config.d_ff = between(&random, 20, 31);
    config.d_model = between(&random, 129, 140);
    int rows = SANITIZED ? 300 : MOST_ROWS + between(&random, 1, 40);
    int text[1000] = {0}, slots[KV_BLOCKS] = {0};
    struct batch *batch = start_batch(&test);
    for (int i = 0; i < 3; i++)
        add_text(batch, text, slots, 0, 1, true);
    for (int done = 0; done < rows; done += 1000)
        add_text(batch, text, slots, 0, min_of(rows - done, 1000), false);
    struct trial t;
    open_trial(&t, check, 0, make_model_of(&random, config, TYPE_BF16), batch, rows + 3);
    give(&t, A_X, &random);
    check_project(&t, &random, OP_DOWN);
    close_trial(&t);
}

static void rope(struct check *check) {
    static const int heads[] = {8, 16, 24, 40, 64, 80, 96, 128, 136, 192, 256};
    static struct test_batch test;
    struct random random = start("rope");
    for (int i = 0; i < (SANITIZED ? 3 : COUNT(heads)); i++) {
        struct model_config c = draw_config(&random, 1, 1);
        c.head_dim = SANITIZED ? PICK(&random, heads) : heads[i];
        c.n_heads = c.n_kv_heads * between(&random, 1, 5);
        c.rope_dim = 2 * (below(&random, 3) ? c.head_dim / 2 : between(&random, 1, c.head_dim / 2));
        struct batch *batch = start_batch(&test);
        add_texts(batch, &random, between(&random, 0, 9), between(&random, 1, 4), 70);
        struct trial t;
        open_trial(&t, check, i % VARIANTS, make_model_of(&random, c, TYPE_F32), batch,
                   batch->n_rows + 3);
        run_op(&t, OP_EMBED, 1 << A_X); /* it makes the angles */
        t.layer = below(&random, TEST_LAYERS);
        for (int a = A_RAW_Q; a <= A_RAW_V; a++)
            give(&t, (enum activation)a, &random);
        check_rope(&t);
        close_trial(&t);
    }
}

static struct model_config attention_config(struct random *random, int head_dim, int group) {
    struct model_config c = draw_config(random, 1, 1);
    c.head_dim = head_dim;
    c.rope_dim = 0;
    c.n_kv_heads = group > 4 ? 1 : between(random, 1, 2);
    c.n_heads = group * c.n_kv_heads;
    return c;
}

static void attention_of_all_heads(struct check *check) {
    static const int groups[] = {1, 4, 7, 8, 20};
    static struct test_batch test;
    struct random random = start("heads");
    for (int i = 0; i < (SANITIZED ? 4 : 12); i++) {
        int third = i % 3, least = third < 2 ? third * 8 + 1 : 17,
            most = third < 2 ? third * 8 + 8 : 32;
        struct model_config c =
            attention_config(&random, 8 * between(&random, least, most), groups[i % 5]);
        struct batch *batch = start_batch(&test);
        add_texts(batch, &random, between(&random, 0, 6), between(&random, 0, 3) + (i % 2), 90);
        if (batch->n_rows == 0)
            add_texts(batch, &random, 1, 1, 40);
        check_attention(check, &random, &c, batch, i % VARIANTS, NULL);
    }
}

/* Texts of several splits, at and beside their ends; a prompt far into its text. */
static void attention_of_long_texts(struct check *check) {
    static const int lengths[] = {255, 256, 257, 511, 512, 513, 1023, 1024, 1025, 1279, 1500};
    static struct test_batch test;
    struct random random = start("long texts");
    for (int i = 0; i < (SANITIZED ? 1 : 4); i++) {
        struct model_config c = attention_config(&random, i % 2 ? 64 : 128, i % 2 ? 4 : 1);
        int slots[KV_BLOCKS], text[MOST_LENGTH] = {0};
        int length = PICK(&random, lengths), other = between(&random, 1, 600);
        shuffle(&random, slots, KV_BLOCKS);
        struct batch *batch = start_batch(&test);
        add_text(batch, text, slots, other - 1, other, true);
        add_text(batch, text, slots + 50, length - 1, length, true);
        add_text(batch, text, slots + 146, 0, between(&random, 1, 40), false);
        check_attention(check, &random, &c, batch, i % VARIANTS, NULL);
        int begin = between(&random, 1, 700);
        batch = start_batch(&test);
        add_text(batch, text, slots + 10, begin, begin + between(&random, 1, 70), false);
        check_attention(check, &random, &c, batch, i % VARIANTS, NULL);
    }
}

/* ---- whole models ---- */

/* How far a row may be off beside all rows of a model: rounding that moves what a row attends to
 * is found in few rows, and in those is several times the usual. */
enum { AT_WORST = 4 };

/* A prompt and what follows it, a token a step, in blocks anywhere: logits of each against
 * reference.h, with the experts that were chosen, which are preferred but for rounding. */
static void check_whole(struct check *check, struct random *random, enum tensor_type type,
                        int variant, int kind) {
    static struct test_batch test;
    struct model_config config = draw_kind(random, ref_block_elements(type), 1, kind);
    struct test_model *m = make_model_of(random, config, type);
    int n = between(random, 18, 40), prompt = between(random, 1, n - 1), vocab = config.vocab_size;
    int text[40], slots[KV_BLOCKS];
    for (int i = 0; i < n; i++)
        text[i] = below(random, vocab);
    shuffle(random, slots, KV_BLOCKS);
    double *expected = ref_doubles(n, vocab), largest = 0.0, squares = 0.0, errors = 0.0;
    double *gap = ref_doubles(TEST_LAYERS, n), least_gap = INFINITY;
    int *chosen = (int *)ref_allocate((size_t)(TEST_LAYERS * n * config.n_used), sizeof *chosen);
    float *got = floats(nth(n, vocab, 0));
    struct worker *worker = open_worker(variant, word(random), m, 1, n + 1);
    for (int at = 0, end = prompt; at < n; at = end++) {
        struct batch *batch = start_batch(&test);
        add_text(batch, text, slots, at, end, at >= prompt);
        for (int row = 0; row < end - at; row++)
            add_sample(batch, row, warm(1));
        if (config.n_experts > 0) /* beside a prompt no step is recorded: then its choice is seen */
            add_text(batch, text, slots + KV_BLOCKS - 1, 0, 1, false);
        forward_choosing(worker, batch, chosen + at * config.n_used, n * config.n_used);
        peek(check, worker->shards[0], A_LOGITS, got + nth(at, vocab, 0), end - at);
    }
    struct ref_choices choices = {config.n_experts > 0 ? chosen : NULL, NULL, gap};
    ref_forward_with(&m->model, m->frequency, text, n, choices, expected);
    for (int i = 0; i < TEST_LAYERS * n && config.n_experts > 0; i++)
        least_gap = fmin(least_gap, gap[i]);
    double limit = model_error(worker->shards[0], type);
    CHECK(least_gap > -AT_WORST * limit, "an expert that others are preferred to by %g",
          -least_gap);
    struct worst worst = {0, 0, 0};
    for (int i = 0; i < n * vocab; i++) {
        double error = (double)got[i] - expected[i];
        largest = fmax(largest, fabs(expected[i]));
        squares += expected[i] * expected[i];
        errors += error * error;
    }
    for (int i = 0; i < n * vocab; i++)
        compare(&worst, i / vocab, i % vocab, (double)got[i], expected[i],
                AT_WORST * limit * largest);
    CHECK(sqrt(errors / squares) < limit, "kind %d, type %d: logits are off by %g, allowed is %g",
          kind, (int)type, sqrt(errors / squares), limit);
    CHECK_WORST(worst, "logits: kind %d, type %d, %d tokens, %d of them a prompt", kind, (int)type,
                n, prompt);
    close_worker(worker);
    free_model(m);
    free(expected);
    free(gap);
    free(chosen);
    free(got);
}

static void whole_models(struct check *check) {
    struct random random = start("whole");
    for (int i = 0; i < (SANITIZED ? 2 : N_TYPES * (DRAWS > 2 ? 2 : 1)); i++)
        check_whole(check, &random, all_types[(seed + (uint64_t)i) % N_TYPES], i % VARIANTS, PLAIN);
}

static void whole_kinds(struct check *check) {
    struct random random = start("kinds");
    for (int kind = EXPERTS; kind < N_KINDS; kind++)
        for (int i = 0; i < (SANITIZED ? 1 : 2); i++)
            check_whole(check, &random, all_types[(seed + (uint64_t)(kind * 3 + i)) % N_TYPES],
                        i % VARIANTS, kind);
}

/* ---- the same bits, however the work is cut ---- */

struct story { /* a text: [0, n_prompt) is a prompt, the rest is generated */
    int text[128];
    int n_prompt, length;
};

static struct story draw_story(struct random *random, int n_prompt, int n_generated, int vocab) {
    struct story story;
    story.n_prompt = n_prompt;
    story.length = n_prompt + n_generated;
    for (int i = 0; i < story.length; i++)
        story.text[i] = below(random, vocab);
    return story;
}

/* Others that share a step, with blocks of their own, slots[*used] and on, that may hold anything.
 * Generated ones come first in a step. */
static void add_crowd(struct batch *batch, struct random *random, const struct story *story,
                      const int *slots, int *used, int n, bool generated) {
    for (int i = 0; i < n; i++) {
        int most = below(random, 2) ? story->length : min_of(story->length, BLOCK_TOKENS);
        int begin = below(random, most);
        int end = generated ? begin + 1 : between(random, begin + 1, story->length);
        if (*used + blocks_of(end) > KV_BLOCKS)
            break;
        add_text(batch, story->text, slots + *used, begin, end, generated);
        *used += blocks_of(end);
    }
}

/* Tells a story in steps of up to `chunk` prompt tokens among up to `crowd` others. `told`: the
 * logits of each step's last own row, and the token drawn, (story->length, vocab_size + 1). */
static void tell(struct check *check, struct worker *worker, struct random *random,
                 const struct story *story, int chunk, int crowd, float *told) {
    struct test_batch *test = (struct test_batch *)ref_allocate(1, sizeof *test);
    int vocab = worker->shards[0]->config->vocab_size, slots[KV_BLOCKS];
    float *logits = floats(nth(LOGITS_KEPT, vocab, 0));
    shuffle(random, slots, KV_BLOCKS);
    for (int at = 0, next; at < story->length; at = next) {
        bool generated = at >= story->n_prompt;
        next = generated ? at + 1 : min_of(story->n_prompt, at + between(random, 1, chunk));
        int n = below(random, crowd + 1), before = below(random, n + 1), sample = 0;
        int used = blocks_of(story->length); /* the first blocks are the story's */
        struct batch *batch = start_batch(test);
        add_crowd(batch, random, story, slots, &used, before, true);
        if (!generated)
            add_crowd(batch, random, story, slots, &used, (n - before) / 4, false);
        int row = batch->n_rows + next - at - 1;
        add_text(batch, story->text, slots, at, next, generated);
        add_crowd(batch, random, story, slots, &used, generated ? n - before : (n - before) / 8,
                  generated);
        for (int i = 0; i < batch->n_rows; i++)
            if (i == row || (batch->n_rows <= LOGITS_KEPT && generated)) {
                sample = i == row ? batch->n_samples : sample;
                add_sample(batch, i, warm(7));
            }
        forward(worker, batch);
        peek(check, worker->shards[0], A_LOGITS, logits, sample + 1);
        if (!generated && next < story->n_prompt)
            continue;
        memcpy(told, logits + nth(sample, vocab, 0), sizeof *told * (size_t)vocab);
        told[vocab] = (float)batch->sampled[sample];
        told += vocab + 1;
    }
    free(logits);
    free(test);
}

/* A row's bits depend on its role and its own text alone. */
static void check_told(struct check *check, struct random *random, enum tensor_type type,
                       int variant, int kind) {
    static const int cuts[][3] = {{9, 3, 1}, {100, 12, 2}, {30, 80, 4}}; /* chunk, crowd, shards */
    struct model_config config =
        draw_kind(random, ref_block_elements(type), CROWD_SHARDS > 1 ? CROWD_SHARDS : 1, kind);
    struct test_model *m = make_model_of(random, config, type);
    struct story story =
        draw_story(random, between(random, 2, SANITIZED ? 20 : 40), 4, config.vocab_size);
    size_t n = nth(5, config.vocab_size + 1, 0);
    float *alone = floats(n), *told = floats(n);
    struct worker *worker = open_worker(variant, 0, m, 1, 600);
    tell(check, worker, random, &story, 100, 0, alone);
    close_worker(worker);
    for (size_t i = 0; i < n; i++)
        CHECK(alone[i] == alone[i], "logits are numbers");
    for (int i = 0; i < COUNT(cuts); i++) {
        worker = open_worker(variant, word(random), m, min_of(cuts[i][2], CROWD_SHARDS), 600);
        tell(check, worker, random, &story, cuts[i][0], cuts[i][1], told);
        CHECK(same_bits(told, alone, n),
              "kind %d, type %d, variant %d, %d tokens: chunks of %d among %d", kind, (int)type,
              variant, story.length, cuts[i][0], cuts[i][1]);
        close_worker(worker);
    }
    free_model(m);
    free(alone);
    free(told);
}

/* Generated tokens that are computed again, all in one step, as those of a worker that failed are:
 * each reads what those before it write in that step, and has the bits that it had alone. */
static void generated_rows_again(struct check *check) {
    enum { ROUNDS = SANITIZED ? 1 : 6 };
    static struct test_batch test;
    struct random random = start("again");
    struct test_model *m = make_model_of(&random, draw_kind(&random, 1, 1, PLAIN), TYPE_BF16);
    int vocab = m->model.config.vocab_size, slots[KV_BLOCKS];
    for (int i = 0; i < ROUNDS; i++) {
        struct story story =
            draw_story(&random, between(&random, 1, 20), between(&random, 20, 60), vocab);
        float *alone = floats(nth(story.length - story.n_prompt + 1, vocab + 1, 0));
        float *again = floats((size_t)vocab);
        struct worker *worker = open_worker(0, 0, m, 1, 100);
        tell(check, worker, &random, &story, 100, 0, alone);
        close_worker(worker);
        worker = open_worker(0, word(&random), m, 1, 100);
        shuffle(&random, slots, KV_BLOCKS);
        struct batch *batch = start_batch(&test);
        add_text(batch, story.text, slots, 0, story.n_prompt, false);
        forward(worker, batch);
        batch = start_batch(&test);
        for (int at = story.n_prompt; at < story.length; at++)
            add_text(batch, story.text, slots, at, at + 1, true);
        add_sample(batch, batch->n_rows - 1, warm(7));
        forward(worker, batch);
        peek(check, worker->shards[0], A_LOGITS, again, 1);
        CHECK(same_bits(again, alone + nth(batch->n_rows, vocab + 1, 0), (size_t)vocab),
              "%d tokens behind %d", batch->n_rows, story.n_prompt);
        close_worker(worker);
        free(alone);
        free(again);
    }
    free_model(m);
}

static void rows_alone_and_in_crowds(struct check *check) {
    struct random random = start("crowds");
    for (int i = 0; i < (SANITIZED ? (TEXT_DRAWS + 2) / 3 : TEXT_DRAWS); i++)
        check_told(check, &random, all_types[(seed + (uint64_t)i) % N_TYPES],
                   (int)((seed + (uint64_t)i) / N_TYPES % VARIANTS), PLAIN);
}

static void kinds_alone_and_in_crowds(struct check *check) {
    struct random random = start("kinds in crowds");
    for (int kind = EXPERTS + (SANITIZED ? (int)(seed % 2) : 0); kind < N_KINDS;
         kind += SANITIZED ? 2 : 1)
        check_told(check, &random, all_types[(seed + (uint64_t)kind) % N_TYPES], 0, kind);
}

/* Generated rows by themselves, so many at a time as products have a form for, and more. */
static void check_counts(struct check *check, struct random *random, enum tensor_type type,
                         int variant, int kind) {
    static const int most[] = {80, 64, 32, 16, 8, 0};
    static struct test_batch test;
    struct test_model *m =
        make_model_of(random, draw_kind(random, ref_block_elements(type), 1, kind), type);
    int d = m->model.config.d_model, vocab = m->model.config.vocab_size, text[80], slots[80];
    float *x[2] = {floats(nth(80, d, 0)), floats(nth(80, d, 0))};
    float *logits[2] = {floats(nth(80, vocab, 0)), floats(nth(80, vocab, 0))};
    struct worker *worker = open_worker(variant, word(random), m, 1, 80);
    shuffle(random, slots, 80);
    for (int i = 0; i < 80; i++)
        text[i] = below(random, vocab);
    for (int i = 0; i < COUNT(most) - 1; i++) {
        int n = between(random, most[i + 1] + 1, most[i]), n_samples = min_of(n, LOGITS_KEPT);
        struct batch *batch = start_batch(&test);
        for (int row = 0; row < n; row++)
            add_text(batch, text + row, slots + row, 0, 1, true);
        for (int row = 0; row < n_samples; row++)
            add_sample(batch, row, warm(1));
        forward(worker, batch);
        peek(check, worker->shards[0], A_X, x[i > 0], n);
        peek(check, worker->shards[0], A_LOGITS, logits[i > 0], n_samples);
        CHECK(i == 0 || (same_bits(x[1], x[0], nth(n, d, 0)) &&
                         same_bits(logits[1], logits[0], nth(n_samples, vocab, 0))),
              "kind %d, type %d, variant %d: %d rows, as among more", kind, (int)type, variant, n);
    }
    for (int i = 0; i < 2; i++) {
        free(x[i]);
        free(logits[i]);
    }
    close_worker(worker);
    free_model(m);
}

static void any_number_of_rows(struct check *check) {
    struct random random = start("counts");
    for (int i = SANITIZED ? (int)(seed % 4) : 0; i < N_TYPES; i += SANITIZED ? 4 : 1)
        check_counts(check, &random, all_types[i], i % VARIANTS, i > 0 ? i % N_KINDS : EXPERTS);
}

enum { SHARD_SAMPLES = 9 };

/* Steps with prompts of several pieces and more generated rows than shards add up at once. Returns
 * x and the logits after each, and the tokens drawn. */
static float *step_shards(struct check *check, struct random random, struct worker *worker,
                          int n_rows, size_t *n) {
    static struct test_batch test;
    struct device *device = worker->shards[0];
    int slots[KV_BLOCKS], text[MOST_LENGTH], d = device->config->d_model;
    int texts = between(&random, 30, 44), rows = n_rows - texts, vocab = device->config->vocab_size;
    float *out = floats(2 * (nth(n_rows, d, 0) + nth(SHARD_SAMPLES, vocab + 1, 0)));
    float *other = floats(nth(n_rows, d, 0));
    shuffle(&random, slots, KV_BLOCKS);
    for (int i = 0; i < n_rows + 60; i++)
        text[i] = below(&random, vocab);
    *n = 0;
    for (int step = 0; step < 2; step++) {
        struct batch *batch = start_batch(&test);
        for (int i = 0; i < (step ? texts : 4); i++) /* of these four have a token before */
            add_text(batch, &text[i], &slots[i], i < 4 ? step : 0, i < 4 ? step + 1 : 1, step > 0);
        add_text(batch, text, &slots[texts], step ? rows : 0, step ? rows + 11 : rows, false);
        for (int i = 0; i < SHARD_SAMPLES; i++)
            add_sample(batch, below(&random, batch->n_rows), warm(word(&random)));
        forward(worker, batch);
        peek(check, device, A_X, out + *n, batch->n_rows);
        for (int s = 1; s < worker->n_shards; s++) {
            peek(check, worker->shards[s], A_X, other, batch->n_rows);
            CHECK(same_bits(other, out + *n, nth(batch->n_rows, d, 0)),
                  "step %d: x of shard %d of %d", step, s, worker->n_shards);
        }
        *n += nth(batch->n_rows, d, 0);
        peek(check, device, A_LOGITS, out + *n, SHARD_SAMPLES);
        *n += nth(SHARD_SAMPLES, vocab, 0);
        for (int i = 0; i < SHARD_SAMPLES; i++)
            out[(*n)++] = (float)batch->sampled[i];
    }
    free(other);
    return out;
}

static void shards(struct check *check) {
    static const int kinds[] = {PLAIN, EXPERTS, GPT_OSS_LIKE, WINDOWED, GEMMA_LIKE};
    struct random random = start("shards");
    for (int i = 0; i < (SANITIZED ? 1 : COUNT(kinds)); i++) {
        enum tensor_type type = all_types[(seed + (uint64_t)i) % N_TYPES];
        struct model_config config =
            draw_kind(&random, ref_block_elements(type), MAX_SHARDS, kinds[i]);
        config.n_layers = 1;
        struct test_model *m = make_model_of(&random, config, type);
        int n_rows = between(&random, SHARD_ROWS + 50, SHARD_ROWS + 80);
        float *one = NULL;
        struct random same = random; /* draws for each number of shards */
        for (int n_shards = 1; n_shards <= MAX_SHARDS; n_shards *= SANITIZED ? MAX_SHARDS : 2) {
            size_t n;
            struct worker *worker = open_worker(i % VARIANTS, word(&random), m, n_shards, n_rows);
            float *bits = step_shards(check, same, worker, n_rows, &n);
            CHECK(!one || same_bits(bits, one, n),
                  "kind %d, type %d, d_ff %d, %d heads of %d: %d shards", kinds[i], (int)type,
                  config.d_ff, config.n_heads, config.head_dim, n_shards);
            for (size_t at = 0; at < n; at++)
                CHECK(bits[at] == bits[at], "x and logits are numbers");
            free(one);
            one = bits;
            close_worker(worker);
        }
        free(one);
        free_model(m);
    }
}

/* Tokens drawn for rows [first, end) of a prompt that is only embedded, and their logits; of some
 * also what is likeliest: top (MOST_SEQUENCES). */
static void draw_samples(struct worker *worker, const int *text, int n,
                         const struct sampling *sampling, int first, int end, float *logits,
                         int *sampled, struct sampler_top *top) {
    static struct test_batch test;
    static struct sampler_top *asked[MOST_SEQUENCES];
    int slots[KV_BLOCKS] = {0};
    struct batch *batch = start_batch(&test);
    add_text(batch, text, slots, 0, n, false);
    for (int i = first; i < end; i++)
        add_sample(batch, i, sampling[i]);
    for (int i = 0; i < end - first; i++)
        asked[i] = (first + i) % 3 > 0 ? &top[i] : NULL;
    batch->top = asked;
    worker->backend->step_begin(worker->shards[0], batch);
    worker->backend->embed(worker->shards[0], worker->weights[0][0][TOKEN_EMBD]);
    worker->backend->sample(worker->shards[0], worker->weights[0][0], logits);
    worker->backend->step_end(worker->shards[0], sampled);
}

/* The log-probabilities that were told of a token, of the logits (n) that it was drawn by. */
static void check_top(struct check *check, const float *logits, int n, int token,
                      const struct sampler_top *top) {
    double sum = 0;
    for (int i = 0; i < n; i++)
        sum += exp((double)logits[i]);
    CHECK(fabs((double)logits[token] - log(sum) - (double)top->own) < 1e-4, "own %g, of %g",
          (double)top->own, (double)logits[token] - log(sum));
    CHECK(top->n == min_of(n, SAMPLER_TOP), "%d likeliest", top->n);
    for (int k = 0; k < top->n; k++) {
        int larger = 0;
        for (int i = 0; i < n; i++)
            larger += logits[i] > logits[top->token[k]];
        CHECK(larger <= k, "likeliest %d: %d are more", k, larger);
        double wrong = (double)logits[top->token[k]] - log(sum) - (double)top->logprob[k];
        CHECK(fabs(wrong) < 1e-4, "likeliest %d: wrong by %g", k, wrong);
    }
}

/* More samples than logits are kept of: they are computed in pieces, and are the same alone. */
static void many_samples(struct check *check) {
    struct random random = start("many samples");
    struct model_config config = draw_config(&random, 1, 1);
    struct test_model *m = make_model_of(&random, config, TYPE_BF16);
    int n = LOGITS_KEPT + between(&random, 1, LOGITS_KEPT + 20), vocab = config.vocab_size;
    int text[MOST_SEQUENCES] = {0}, sampled[MOST_SEQUENCES], alone[MOST_SEQUENCES];
    static struct sampling sampling[MOST_SEQUENCES];
    static struct sampler_top top[MOST_SEQUENCES];
    struct worker *worker = open_worker(0, 0, m, 1, n);
    for (int i = 0; i < n; i++) {
        text[i] = below(&random, vocab);
        sampling[i] = warm(word(&random));
    }
    float *logits = floats(nth(n, vocab, 0)), *some = floats(nth(n, vocab, 0));
    draw_samples(worker, text, n, sampling, 0, n, logits, sampled, top);
    for (int i = 0; i < n; i++)
        if (i % 3 > 0)
            check_top(check, logits + nth(i, vocab, 0), vocab, sampled[i], &top[i]);
    for (int first = 0, end; first < n; first = end) {
        end = between(&random, first + 1, min_of(n, first + LOGITS_KEPT));
        draw_samples(worker, text, n, sampling, first, end, some, alone, top);
        CHECK(same_bits(logits + nth(first, vocab, 0), some, nth(end - first, vocab, 0)),
              "logits of samples %d to %d of %d", first, end, n);
        CHECK(!memcmp(alone, sampled + first, sizeof *alone * (size_t)(end - first)),
              "samples %d to %d of %d", first, end, n);
    }
    close_worker(worker);
    free_model(m);
    free(logits);
    free(some);
}

/* ---- sampling ---- */

enum { LOGIT_KINDS = 11 };

static float draw_logit(struct random *random, int kind, int token, float width) {
    static const float odd[] = {-INFINITY, 3e38f, -3e38f, 1e-40f, INFINITY, NAN, -NAN};
    float value = width * normal(random), rounded;
    switch (kind) {
    case 1: return floorf(value); /* ties are common */
    case 2: return below(random, 4) ? value : odd[below(random, 4)];
    case 3: return odd[below(random, 3)]; /* nothing else than these */
    case 4: return 1.0f;
    case 5: return token % 2 ? -INFINITY : (float)token;
    case 6: return token % 3 ? width : 0.0f;
    case 7: return width * (1.0f + 1e-6f * (float)below(random, 5)); /* few, close together */
    case 8: /* to bf16's 8 bits or so: ties are common */
        rounded = 65537.0f * value;
        return rounded - (rounded - value);
    case 9: return below(random, 300) ? value : odd[between(random, 4, 6)]; /* there is no token */
    default: return value;
    }
}

static struct sampling draw_sampling(struct random *random, int n) {
    static const float temperatures[] = {0.0f, 1e-45f, 1e-38f, 1e-37f, 1e-3f,
                                         0.5f, 0.8f,   1.0f,   3.0f};
    static const float tops[] = {0.0f, 1e-6f, 0.1f, 0.5f, 0.95f, 0.999999f, 1.0f, 1.0f};
    static const float least[] = {0.0f, 0.0f, 0.05f, 1.0f};
    const int counts[] = {0, 0, 1, 2, n / 3, n - 1, n, n + 1, 1000};
    struct sampling sampling = {PICK(random, temperatures), PICK(random, tops), PICK(random, least),
                                PICK(random, counts), (uint64_t)word(random) << 32 | word(random)};
    return sampling;
}

/* Draws of n_rows rows of logits. Returns how many are not the definition's: where rounding decides
 * whether a token is among those that reach top_p, another may be right too. */
static int check_draws(struct check *check, struct random *random, struct device *device,
                       int n_rows, int kind) {
    static struct test_batch test;
    int n = device->config->vocab_size, different = 0;
    int text[1] = {0}, slots[1] = {0}, first[MOST_SEQUENCES];
    float *logits = floats(nth(n_rows, n, 0));
    struct batch *batch = start_batch(&test);
    for (int i = 0; i < n_rows; i++) {
        float width = (float)between(random, 1, 7);
        for (int j = 0; j < n; j++)
            logits[nth(i, n, j)] = draw_logit(random, kind, j, width);
        add_text(batch, text, slots, 0, 1, false);
        batch->position[i] = below(random, 1 << 20);
        add_sample(batch, i, draw_sampling(random, n));
    }
    for (int order = 1; order <= ORDERS; order++) {
        set_order((uint64_t)order);
        device->backend->step_begin(device, batch);
        poke(device, A_LOGITS, logits, n_rows);
        draw_rows(device, n_rows);
        device->backend->step_end(device, batch->sampled);
        if (order == 1)
            memcpy(first, batch->sampled, sizeof *first * (size_t)n_rows);
        CHECK(!memcmp(first, batch->sampled, sizeof *first * (size_t)n_rows),
              "other draws in order %d", order);
    }
    for (int i = 0; i < n_rows; i++) {
        const struct sampling *s = &batch->sampling[i];
        bool may;
        int token = first[i],
            expected = ref_sample_within(s, batch->position[i] + 1, logits + nth(i, n, 0), n,
                                         SAMPLER_SLACK, token, &may);
        different += token != expected;
        CHECK(token == expected || (token >= 0 && token < n && may),
              "%d of %d, expected %d: kind %d, t %g, p %g, min_p %g, k %d, seed %llu", token, n,
              expected, kind, (double)s->temperature, (double)s->top_p, (double)s->min_p, s->top_k,
              (unsigned long long)s->seed);
    }
    batch->n_samples = 1; /* the last row alone */
    batch->sample_row[0] = n_rows - 1;
    batch->sampling[0] = batch->sampling[n_rows - 1];
    device->backend->step_begin(device, batch);
    poke(device, A_LOGITS, logits + nth(n_rows - 1, n, 0), 1);
    draw_rows(device, 1);
    device->backend->step_end(device, batch->sampled);
    CHECK(batch->sampled[0] == first[n_rows - 1], "alone %d, with others %d", batch->sampled[0],
          first[n_rows - 1]);
    check_idle(check, device);
    free(logits);
    return different;
}

static void sampling(struct check *check) {
    struct random random = start("sampling");
    const int sizes[] = {1, 2, 300, between(&random, 3, 1100), 4097, 33000};
    int all = 0, different = 0;
    for (int i = 0; i < COUNT(sizes); i++) {
        bool large = sizes[i] > 2000;
        int repeats = SANITIZED ? 1 : large ? LOGIT_KINDS : 4 * DRAWS;
        int n_rows = large ? 4 : LOGITS_KEPT;
        struct model_config config = draw_config(&random, 1, 1);
        config.rope_dim = 0;
        config.vocab_size = sizes[i];
        struct device *device = open_alone(&config, LOGITS_KEPT);
        for (int j = 0; j < repeats; j++, all += n_rows)
            different += check_draws(check, &random, device, n_rows,
                                     large ? j : below(&random, LOGIT_KINDS));
        close_alone(device);
    }
    /* rounding may decide, and hardly ever does: of 49,344 draws on the CPU it did in none */
    CHECK(different <= 1 + all / 2000, "%d of %d draws are not the definition's", different, all);
}

/* ---- copies ---- */

static void wait_for(struct device *device, enum stream stream, uint64_t ticket) {
    while (!device->backend->copy_done(device, stream, ticket))
        sched_yield();
}

enum { PIECE = 40 }; /* bytes of a copy */

/* Pieces, a random part of each as rows, from one place to the next, on two streams at once of the
 * device that fetches. */
static void copy_pieces(struct check *check, struct random *random, struct device *by, uint8_t *to,
                        const uint8_t *from) {
    struct backend *backend = by->backend;
    const enum stream streams[] = {STREAM_TRANSFER,
                                   below(random, 2) ? STREAM_PAGE_OUT : STREAM_PAGE_IN};
    int *order = (int *)ref_allocate(COPIES, sizeof *order);
    uint64_t first[2] = {0, 0}, last[2] = {0, 0}, half[2] = {0, 0};
    shuffle(random, order, COPIES);
    for (int i = 0; i < COPIES; i++) {
        size_t at = (size_t)order[i] * PIECE, rows = order[i] % 3 == 0 ? 4 : 1;
        struct copy2d copy = {to + at, from + at, PIECE / rows, PIECE / rows, PIECE / rows, rows};
        int which = i % 2;
        uint64_t ticket = backend->copy(by, streams[which], &copy);
        CHECK(i < 2 || ticket == last[which] + 1, "ticket %llu", (unsigned long long)ticket);
        first[which] = i < 2 ? ticket : first[which];
        half[which] = i < COPIES / 2 ? ticket : half[which];
        last[which] = ticket;
    }
    CHECK(!COPIES_LATE || !backend->copy_done(by, streams[0], last[0]) ||
              !backend->copy_done(by, streams[1], last[1]),
          "a copy is not done as soon as it is ordered");
    for (int which = 0; which < 2; which++) {
        wait_for(by, streams[which], half[which]);
        CHECK(backend->copy_done(by, streams[which], first[which]), "copies end in their order");
        wait_for(by, streams[which], last[which]);
    }
    free(order);
}

/* Runs of bytes with a pitch, to the device and back: nothing beside them is touched. */
static void check_pitches(struct check *check, struct random *random, struct device *device,
                          uint8_t *host, uint8_t *on_device) {
    struct backend *backend = device->backend;
    size_t width = (size_t)between(random, 1, 60), height = (size_t)between(random, 1, 30);
    size_t pitch = width + (size_t)below(random, 20), other = width + (size_t)below(random, 20);
    uint8_t before[8000];
    for (size_t i = 0; i < sizeof before; i++)
        host[i] = before[i] = (uint8_t)word(random);
    struct copy2d up = {on_device, host, other, pitch, width, height};
    struct copy2d down = {host + 4000, on_device, pitch, other, width, height};
    wait_for(device, STREAM_PAGE_IN, backend->copy(device, STREAM_PAGE_IN, &up));
    wait_for(device, STREAM_PAGE_OUT, backend->copy(device, STREAM_PAGE_OUT, &down));
    bool right = true;
    for (size_t i = 0; i < sizeof before; i++) {
        size_t at = i - 4000;
        bool copied = i >= 4000 && at / pitch < height && at % pitch < width;
        right &= host[i] == before[copied ? at : i];
    }
    CHECK(right, "%zu runs of %zu bytes, %zu and %zu apart", height, width, pitch, other);
}

/* From host memory over two devices and back. */
static void copies(struct check *check) {
    struct random random = start("copies");
    struct model_config config = draw_config(&random, 1, 1);
    config.rope_dim = 0;
    struct backend *backend = open_backend(0, 1 + word(&random));
    struct device *devices[2];
    uint8_t *memory[4]; /* of the host, of device 0, of device 1, of the host */
    size_t bytes = 64 * 2048;
    for (int i = 0; i < 2; i++) {
        struct device wanted = wanted_device(backend, &config, NULL, 1, kv_type_of(0));
        wanted.index = backend->n_gpus > 0 ? i % backend->n_gpus : i;
        devices[i] = open_device(backend, &wanted, 1);
        memory[3 * i] = (uint8_t *)host_alloc(bytes);
        memory[1 + i] = (uint8_t *)backend->alloc(devices[i], bytes);
        need(memory[3 * i] && memory[1 + i], "memory for copies");
        need(!backend->pin || backend->pin(devices[i], memory[3 * i], bytes), "pinned memory");
    }
    for (int i = 0; i < COPIES * PIECE; i++)
        memory[0][i] = (uint8_t)word(&random);
    for (int i = 0; i < 3; i++)
        copy_pieces(check, &random, devices[i > 0], memory[i + 1], memory[i]);
    CHECK(!memcmp(memory[0], memory[3], COPIES * PIECE), "bytes went through four places");
    for (int i = 0; i < 20; i++)
        check_pitches(check, &random, devices[i % 2], memory[i % 2 * 3], memory[1 + i % 2]);
    CHECK(!backend->alloc(devices[0], (size_t)1 << 60), "more than there is");
    CHECK(!host_alloc((size_t)1 << 60), "more than there is");
    CHECK(backend->free_memory(devices[0]) > bytes, "some memory is free");
    check_idle(check, devices[0]); /* no room is no fault */
    for (int i = 0; i < 2; i++) {
        if (backend->unpin)
            backend->unpin(devices[i], memory[3 * i]);
        free(memory[3 * i]);
        backend->release(devices[i], memory[1 + i]);
        close_device(devices[i]);
    }
    backend->close(backend);
}

/* ---- refusals: one line that says what to do ---- */

/* A device that is refused, with these words. */
static void check_refusal(struct check *check, struct backend *backend, const struct device *wanted,
                          const char *words) {
    char error[ERROR_LENGTH] = "";
    struct device *device = backend->device_open(backend, wanted, error);
    CHECK(!device, "a device that should be refused: %s", words);
    CHECK(strstr(error, words) && !strchr(error, '\n'), "%s", error);
    if (device)
        backend->device_close(device);
}

/* Numbers of shards that the heads, or the feed-forward part, do not allow. */
static void refused_shards(struct check *check) {
    static const struct {
        int heads, d_ff, most; /* as many shards as `most`, if a power of two */
    } shapes[] = {{1680, 3360, 8}, {12, 3360, 4}, {18, 3360, 2}, {1680, 8, 4}};
    struct random random = start("refused");
    struct backend *backend = open_backend(0, 0);
    for (int i = 0; i < COUNT(shapes); i++)
        for (int n_shards = 0; n_shards <= 16; n_shards++) {
            struct model_config config = draw_config(&random, 1, 1);
            config.n_heads = config.n_kv_heads = shapes[i].heads;
            config.head_dim = 8;
            config.rope_dim = 0;
            config.d_ff = shapes[i].d_ff;
            struct device wanted = wanted_device(backend, &config, NULL, 4, kv_type_of(0));
            wanted.n_shards = n_shards;
            if (n_shards < 1 || n_shards > shapes[i].most || (n_shards & (n_shards - 1)))
                check_refusal(check, backend, &wanted, "a worker of");
            else
                close_device(open_device(backend, &wanted, 1));
        }
    struct model_config uneven = draw_config(&random, 1, 4); /* 4 divides 100 */
    uneven.d_ff = 100;
    struct device wanted = wanted_device(backend, &uneven, NULL, 4, kv_type_of(0));
    wanted.n_shards = 4;
    check_refusal(check, backend, &wanted,
                  "got 100 rows of the feed-forward part, expected a multiple of 8");
    backend->close(backend);
}

/* ---- the table ---- */

/* Tests of this file, in the order in which they are run. */
#define OP_TESTS                                                                                   \
    {"weights", weights}, {"stored_types", stored_types}, {"periodic_tensors", periodic_tensors},  \
        {"products_f32", products_f32}, {"products_f16", products_f16},                            \
        {"products_bf16", products_bf16}, {"products_q8_0", products_q8_0},                        \
        {"products_q4_0", products_q4_0}, {"products_q4_k", products_q4_k},                        \
        {"products_q6_k", products_q6_k}, {"products_mxfp4", products_mxfp4},                      \
        {"products_of_mixed_types", products_of_mixed_types},                                      \
        {"products_of_many_rows", products_of_many_rows}, {"embedding", embedding},                \
        {"rope", rope}, {"experts", experts}, {"whole_kinds", whole_kinds},                        \
        {"kinds_alone_and_in_crowds", kinds_alone_and_in_crowds},                                  \
        {"attention_of_all_heads", attention_of_all_heads},                                        \
        {"attention_of_long_texts", attention_of_long_texts}, {"whole_models", whole_models},      \
        {"rows_alone_and_in_crowds", rows_alone_and_in_crowds},                                    \
        {"generated_rows_again", generated_rows_again},                                            \
        {"any_number_of_rows", any_number_of_rows}, {"shards", shards},                            \
        {"many_samples", many_samples}, {"sampling", sampling}, {"copies", copies}, {              \
        "refused_shards", refused_shards                                                           \
    }

/* Takes the seed from the command line or the clock, and runs the tests. */
static int run_tests(const struct test *tests, size_t n_tests, int argc, char **argv) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    seed = argc > 2 ? strtoull(argv[2], NULL, 10)
                    : ((uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000) % 1000000000;
    printf("  seed %llu\n", (unsigned long long)seed);
    return check_run(tests, n_tests, argc, argv);
}
#endif /* OPS_H */
