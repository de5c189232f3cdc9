/* test_cuda.cu: the CUDA backend. How ops.h reaches into it, and what it alone has: packed
 * matrices, recorded steps, machines without a usable GPU, faults.
 *
 * The same source is compiled by g++, which runs the kernels on the CPU (test/cuda_emu.h), and by
 * nvcc for a GPU (make gpu-test). Ops are driven through struct backend, so their launchers are
 * tested too. What a GPU leaves open, the emulator does in another order each time: each op is run
 * in several orders, and must give the same bits. Read next: ops.h. */
extern "C" {
#include "dynamo.h"
}
#include "lib/gpu.h"

/* What the machine seems to be: the backend asks here, so that any can be played. */
static struct {
    int major;         /* of the chips; 0: as they are */
    int driver;        /* its version; -1: as it is */
    cudaError_t count; /* why there are no devices */
    size_t shared;     /* bytes of shared memory that a block can have; 0: as they are */
} pretended = {0, -1, cudaSuccess, 0};

static cudaError_t pretended_count(int *n) {
    return pretended.count != cudaSuccess ? pretended.count : cudaGetDeviceCount(n);
}

static cudaError_t pretended_driver(int *version) {
    cudaError_t error = cudaDriverGetVersion(version);
    *version = pretended.driver >= 0 ? pretended.driver : *version;
    return error;
}

static cudaError_t pretended_properties(cudaDeviceProp *properties, int device) {
    cudaError_t error = cudaGetDeviceProperties(properties, device);
    properties->major = pretended.major > 0 ? pretended.major : properties->major;
    size_t *shared = &properties->sharedMemPerBlockOptin;
    *shared = pretended.shared > 0 && pretended.shared < *shared ? pretended.shared : *shared;
    return error;
}

#define cudaGetDeviceCount   pretended_count
#define cudaDriverGetVersion pretended_driver
#undef cudaGetDeviceProperties /* a macro in some versions of CUDA */
#define cudaGetDeviceProperties pretended_properties
#include "../kernels.cu"

#ifdef CUDA_EMULATED
enum { EMULATED = 1 };
#else
enum { EMULATED = 0 };
#endif

#include "check.h"

enum {
    ORDERS = SANITIZED ? 2 : 3,
    VARIANTS = 1,
    LOGITS_KEPT = LOGIT_ROWS,
    MXFP4 = 1,
    DRAWS = 2,
    TEXT_DRAWS = 2,
    CROWD_SHARDS = 1,
    SHARD_ROWS = CHAIN_ROWS,
    MOST_ROWS = 2 * ROW_TILE,
    COPIES = 2 * GPU_TICKETS + 300,
    COPIES_LATE = EMULATED,
    PARTS_SHARED = 1
};
#define SAMPLER_SLACK 1e-6
#include "ops.h"

#include <algorithm>
#include <vector>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
extern "C" const char *__asan_default_options(void) { /* what is too large is no room, as usual */
    return "allocator_may_return_null=1";
}
#endif

/* ---- how ops.h reaches into the backend ---- */

static void need_success(cudaError_t error, const char *call) {
    need(error == cudaSuccess, call);
}

static struct backend *open_backend_of(const struct backend_options *options) {
    char error[ERROR_LENGTH] = "";
    struct backend *backend = cuda_backend_open(options, error);
    need(backend != NULL, error);
    return backend;
}

static struct backend *open_backend(int, uint64_t order) {
    struct backend_options options = {};
    options.copy_delay_seed = order;
    return open_backend_of(&options);
}

static enum kv_type kv_type_of(int) {
    return KV_BF16;
}

static void set_order(uint64_t order) {
    emu_seed(order);
}

static struct cuda_device *cuda_of(struct device *device) {
    return (struct cuda_device *)device;
}

template <typename T> static std::vector<T> load(struct device *device, const T *from, size_t n) {
    std::vector<T> values(n);
    need_success(cudaSetDevice(device->index), "cudaSetDevice");
    need_success(cudaStreamSynchronize(cuda_of(device)->streams[STREAM_COMPUTE]),
                 "cudaStreamSynchronize");
    need_success(cudaMemcpy(values.data(), from, n * sizeof(T), cudaMemcpyDefault), "cudaMemcpy");
    return values;
}

template <typename T> static void save(struct device *device, T *to, const std::vector<T> &values) {
    need_success(cudaSetDevice(device->index), "cudaSetDevice");
    need_success(cudaStreamSynchronize(cuda_of(device)->streams[STREAM_COMPUTE]),
                 "cudaStreamSynchronize");
    need_success(cudaMemcpy(to, values.data(), values.size() * sizeof(T), cudaMemcpyDefault),
                 "cudaMemcpy");
    need_success(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
}

static void put(float *to, float value) {
    *to = value;
}

static void put(uint16_t *to, float value) { /* as bf16 */
    *to = value == value ? bf16_of(value) : 0xffff;
}

static float get(float value) {
    return value;
}

static float get(uint16_t half) {
    return (float)ref_f32((const uint8_t *)&half, 16);
}

/* Where each k of an input's own part lies in its row: see "segments". */
static std::vector<int> places_of(const struct segments &s) {
    std::vector<int> places;
    for (int i = 0; i < s.n; i++)
        for (int k = s.k[i]; k < s.k[i + 1]; k++)
            places.push_back(s.unit[i] * UNIT + k - s.k[i] / UNIT * UNIT);
    return places;
}

/* An activation in the device's memory: rows, and the places of its elements in each. What else is
 * in a row pads it, or, where several share it, is theirs. planes: the row's 64 k are apart. */
template <typename T> struct rows {
    T *at;
    size_t n;
    int stride;
    std::vector<int> places;
    bool shared, planes;
    T pad;
    size_t index(size_t row, int k) const {
        size_t chunk = ((size_t)(k / UNIT) * n + row) * 8 + ((k / 8 % 8) ^ (row % 8));
        return planes ? chunk * 8 + k % 8 : row * stride + k;
    }
};

template <typename T>
static void poke_rows(struct device *device, const struct rows<T> &r, const float *values,
                      int n_rows) {
    size_t width = r.places.size();
    std::vector<T> all(r.n * (size_t)r.stride, r.pad);
    if (r.shared)
        all = load(device, r.at, all.size());
    for (size_t row = 0; row < r.n; row++)
        for (size_t i = 0; i < width; i++)
            put(&all[r.index(row, r.places[i])],
                row < (size_t)n_rows ? values[row * width + i] : NAN);
    save(device, r.at, all);
}

template <typename T>
static void peek_rows(struct check *check, struct device *device, const struct rows<T> &r,
                      float *values, int n_rows) {
    size_t width = r.places.size(), strange = 0;
    std::vector<T> all = load(device, r.at, r.n * r.stride);
    for (size_t row = 0; row < (size_t)n_rows; row++) {
        for (size_t i = 0; i < width; i++) {
            T *element = &all[r.index(row, r.places[i])];
            values[row * width + i] = get(*element);
            *element = r.pad;
        }
        for (int i = 0; i < r.stride && !r.shared; i++) {
            float value = get(all[r.index(row, i)]), pad = get(r.pad);
            strange += value != pad && (value == value || pad == pad);
        }
    }
    CHECK(strange == 0, "%zu elements that pad rows were written", strange);
}

static std::vector<int> count_from(int first, int n) {
    std::vector<int> list;
    for (int i = 0; i < n; i++)
        list.push_back(first + i);
    return list;
}

/* Calls `act` with the rows of an activation. The inputs of products have gaps of 0; they are read
 * in whole tiles of rows, more than a step has. */
template <typename Act> static void with_rows(struct device *device, enum activation a, Act act) {
    struct cuda_device *d = cuda_of(device);
    int width = width_of(device, a), q = width_of(device, A_Q), kv = width_of(device, A_RAW_K);
    size_t n = (size_t)rows_of(device, a);
    std::vector<int> all = count_from(0, width);
    auto f32 = [&](float *at, int stride, float pad) {
        act(rows<float>{at, n, stride, all, false, false, pad});
    };
    auto part = [&](int first) {
        act(rows<float>{d->qkv, n, d->qkv_stride, count_from(first, width), true, false, 0.0f});
    };
    auto input = [&](const struct planes &p, const std::vector<int> &places) {
        int stride = divide(places.empty() ? 1 : places.back() + 1, UNIT) * UNIT;
        act(rows<uint16_t>{(uint16_t *)p.bytes, (size_t)p.n_rows, stride, places, false, true, 0});
    };
    std::vector<int> padded; /* heads of q */
    int dim = device->config->head_dim, head = kv_head_dim(device->config, KV_BF16);
    for (int i = 0; i < q; i++)
        padded.push_back(i / dim * head + i % dim);
    switch (a) {
    case A_X: return f32(d->x, d->x_stride, 0.0f);
    case A_H: return input(d->h, all);
    case A_RAW_Q: return part(0);
    case A_RAW_K: return part(q);
    case A_RAW_V: return part(q + kv);
    case A_Q: return act(rows<uint16_t>{d->q, n, d->n_heads * head, padded, false, false, 0});
    case A_ATTENTION: return input(d->attention, places_of(d->attention_places));
    case A_FFN: return input(d->ffn, places_of(d->ffn_places));
    case A_LOGITS: return f32(d->logits, d->logits_stride, NAN);
    default: return f32((float *)d->turn, width, NAN);
    }
}

static void poke(struct device *device, enum activation a, const float *values, int n_rows) {
    with_rows(
        device, a, [&](const auto &rows) { poke_rows(device, rows, values, n_rows); });
}

static void peek(struct check *check, struct device *device, enum activation a, float *values,
                 int n_rows) {
    with_rows(
        device, a, [&](const auto &rows) { peek_rows(check, device, rows, values, n_rows); });
}

static void scale_normed(struct device *device, float *values) {
    const struct normed n = normed_of(cuda_of(device));
    size_t n_rows = (size_t)cuda_of(device)->n_generated, stride = (size_t)n.n_tiles;
    std::vector<float> squares = load(device, n.squares, n_rows * stride);
    for (size_t row = 0; row < n_rows; row++) {
        double sum = 0.0;
        for (int i = 0; i < n.n_tiles; i++)
            sum += (double)squares[row * stride + (size_t)i];
        float scale = (float)(1.0 / sqrt(sum / (double)n.width + (double)n.epsilon));
        for (size_t i = 0; i < (size_t)n.width; i++)
            values[row * (size_t)n.width + i] *= scale;
    }
}

/* Calls `act` with each element of a block, and with its index in what ops.h has, or SIZE_MAX where
 * it pads a head. */
template <typename Act> static void each_element(const struct device *device, Act act) {
    size_t dim = (size_t)device->config->head_dim, head = kv_head_dim(device->config, KV_BF16);
    size_t n_heads = block_elements(device) / dim / BLOCK_TOKENS;
    for (size_t i = 0; i < n_heads * BLOCK_TOKENS * head; i++) {
        size_t row = i / head, k = i % head, token = row % BLOCK_TOKENS;
        size_t chunk = (k / 64 * BLOCK_TOKENS + token) * 8 + ((k / 8 % 8) ^ (token % 8));
        act(row / BLOCK_TOKENS * BLOCK_TOKENS * head + chunk * 8 + k % 8,
            k < dim ? row * dim + k : SIZE_MAX, row * dim);
    }
}

static void poke_block(struct device *device, int slot, const float *values) {
    size_t n = block_bytes(device->config, device->n_shards, KV_BF16) / sizeof(uint16_t);
    std::vector<uint16_t> block(n);
    each_element(device, [&](size_t at, size_t i, size_t first) {
        float first_one = values[first]; /* a row that is none is NaN to its end */
        put(&block[at], i < SIZE_MAX ? values[i] : first_one == first_one ? 0.0f : NAN);
    });
    save(device, (uint16_t *)device->kv + (size_t)slot * n, block);
}

static void peek_block(struct device *device, int slot, float *values) {
    size_t n = block_bytes(device->config, device->n_shards, KV_BF16) / sizeof(uint16_t);
    std::vector<uint16_t> block = load(device, (uint16_t *)device->kv + (size_t)slot * n, n);
    each_element(device, [&](size_t at, size_t i, size_t first) {
        float value = get(block[at]);
        if (i < SIZE_MAX)
            values[i] = value;
        else
            need(value == 0.0f || values[first] != values[first], "zeros pad what was written");
    });
}

static void poison_kv(struct device *device, size_t bytes) {
    cudaStream_t stream = cuda_of(device)->streams[STREAM_COMPUTE];
    need_success(cudaSetDevice(device->index), "cudaSetDevice");
    need_success(cudaMemsetAsync(device->kv, 0xff, bytes, stream), "cudaMemsetAsync");
}

/* What a matrix keeps of an element: F32 and F16 become bf16. */
static double kept_element(enum tensor_type type, double value, double largest, double *allowed) {
    *allowed = 0.0;
    if (type == TYPE_Q4_K || type == TYPE_Q6_K) /* computed in f32, and rounded */
        *allowed = 0x1.01p-8 * fabs(value) + (type == TYPE_Q4_K ? 0x1p-19 * largest : 0.0);
    return type == TYPE_F16 || type == TYPE_F32 ? rounded(value) : value;
}

static double multiplied(enum tensor_type type, double kept) {
    (void)type;
    return kept;
}

/* Of prompts, quantized numbers are multiplied as bf16. */
static struct slack product_slack(const struct device *, enum tensor_type type) {
    return {1e-5, type == TYPE_Q8_0 || type == TYPE_Q4_0 ? 6 * 0x1p-9 : 0.0};
}

static struct slack attention_slack(const struct device *) { /* weights are bf16 */
    return {1e-4, 3 * 0x1p-8};
}

static double activation_error(enum activation a) {
    bool f32 = a == A_X || a == A_LOGITS || a == A_TURN || (a >= A_RAW_Q && a <= A_RAW_V);
    return f32 ? 3e-6 : 0x1.02p-8;
}

static double kv_error(const struct device *) {
    return 0x1.01p-8;
}

static double model_error(const struct device *, enum tensor_type) {
    return 2e-2;
}

static void read_choice(struct device *device, int *chosen, int n_rows) {
    std::vector<int> all =
        load(device, cuda_of(device)->chosen, (size_t)(n_rows * device->config->n_used));
    std::copy(all.begin(), all.end(), chosen);
}

static void draw_rows(struct device *device, int n) {
    draw_tokens(cuda_of(device), 0, n);
}

static void check_idle(struct check *check, struct device *device) {
    struct cuda_device *d = cuda_of(device);
    for (int counter :
         load(device, d->blocks_done, (size_t)d->card->properties.multiProcessorCount))
        CHECK(counter == 0, "a counter of sums is %d after an op", counter);
    for (int counter : load(device, d->arrived, (size_t)device->max_rows * d->n_heads))
        CHECK(counter == 0, "a counter of splits is %d after an op", counter);
    int rows = device->rank > 0 ? 0 : min_of(device->max_samples, LOGIT_ROWS);
    for (const struct sampler_row &row : load(device, d->sampler_rows, (size_t)rows)) {
        int left = row.largest > 0 || row.winner > 0 || row.selection.least > 0 ||
                   row.selection.most > 0 || row.selection.amount > 0 || row.arrived;
        for (sampler_key sum : row.sums)
            left += sum > 0;
        CHECK(!left, "%d of a sampler's words are not 0 after a draw", left);
    }
    CHECK(cudaGetLastError() == cudaSuccess, "no call has failed");
}

/* ---- packed matrices ---- */

__global__ void elements_kernel(const struct matrix m, float *out) {
    grid_wait();
    int n = m.n_units * UNIT;
    for (int k = (int)threadIdx.x; k < n; k += (int)blockDim.x)
        out[(size_t)blockIdx.x * n + k] = matrix_element(m, (int)blockIdx.x, k);
}

/* All elements of a packed matrix, with its gaps and the rest of its last tile. */
static std::vector<float> elements(struct device *device, const struct matrix &m) {
    struct cuda_device *d = enter(device, "testing");
    size_t n = (size_t)m.n_panels * PANEL * (size_t)m.n_units * UNIT;
    float *out = (float *)device->backend->alloc(device, n * sizeof(float));
    need(out != NULL, "no memory for the elements of a matrix");
    launch(d, "elements_kernel", elements_kernel, m.n_panels * PANEL, THREADS, 0, m, out);
    std::vector<float> values = load(device, out, n);
    device->backend->release(device, out);
    return values;
}

/* Eight shares of K, cut where shards may cut it between multiples of `grain`; each then begins
 * with a unit of its own. */
static void check_segments(struct check *check, const struct device *device,
                           const struct weight *weight) {
    const struct segments &s = weight->matrix.segments;
    int cols = (int)weight->tensor->cols, units = 0;
    bool cut = weight->slice.kind == SLICE_COLS;
    int n = K_SEGMENTS / (cut ? weight->slice.count : 1), first = cut ? weight->slice.rank * n : 0;
    int grain = cut ? grain_of(device->config, cols) : UNIT;
    CHECK(s.n == n && s.unit[0] == 0, "%d segments", s.n);
    for (int i = 0; i <= n; i++) {
        int64_t steps = (cols + grain - 1) / grain;
        int k = min_of((int)((first + i) * steps / K_SEGMENTS * grain), cols);
        CHECK(s.k[i] == k, "%d columns, %d of %d: segment %d begins at %d, not %d", cols,
              weight->slice.rank, weight->slice.count, i, s.k[i], k);
        if (i > 0 && s.k[i] > s.k[i - 1])
            units += (s.k[i] - 1) / UNIT - s.k[i - 1] / UNIT + 1;
        CHECK(s.unit[i] == units, "units before segment %d", i);
    }
}

static void read_weight(struct check *check, struct device *device, const struct weight *weight,
                        float *values) {
    const struct matrix &m = weight->matrix;
    std::vector<float> all = elements(device, m);
    size_t width = (size_t)m.n_units * UNIT, strange = 0;
    int n = (int)weight->tensor->rows;
    n /= weight->slice.kind == SLICE_ROWS ? weight->slice.count : 1;
    std::vector<bool> own(all.size() / width); /* rows of this part, and of the last panel's rest */
    for (size_t i = 0; i < own.size(); i++)
        own[i] = !m.paired && (int)i >= m.n_outputs;
    for (int row = 0; row < n; row++) { /* of a pair: 8 of gate, 8 of up, in turns */
        size_t at = (weight->first_half + row / 8 * (m.paired ? 2 : 1)) * 8 + row % 8;
        own[at] = true;
        for (int place : places_of(m.segments)) {
            *values++ = all[at * width + place];
            all[at * width + place] = 0.0f;
        }
    }
    for (size_t i = 0; i < all.size(); i++)
        strange += all[i] != 0.0f && own[i / width];
    CHECK(strange == 0, "%zu elements of a matrix that are none are not 0", strange);
    check_segments(check, device, weight);
}

/* ---- masks of attention ---- */

static void attend(const struct trial *t) {
    struct cuda_device *d = enter(t->device, "testing");
    struct attention a = attention_of(d, NULL, t->layer);
    size_t n = (size_t)t->device->config->n_heads;
    float *sinks = (float *)t->device->backend->alloc(t->device, n * sizeof(float));
    need(sinks != NULL, "no memory for sinks");
    if (t->mask->sinks) {
        save(t->device, sinks, std::vector<float>(t->mask->sinks, t->mask->sinks + n));
        a.sinks = sinks;
    }
    a.window = t->mask->window > 0 ? t->mask->window : a.window;
    launch_attention(d, a);
    need_success(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    t->device->backend->release(t->device, sinks);
}

/* Windows shorter and longer than texts, steps and splits; sinks that are much and little; chips
 * with less shared memory. */
static void masks_of_attention(struct check *check) {
    static const int windows[] = {0, 1, 2, 15, 16, 17, 100, 128, 129, 256, 300, 1000};
    static const int groups[] = {1, 4, 7, 12}, heads[] = {40, 64, 128, 200};
    static const size_t shared[] = {0, 163 << 10, 99 << 10};
    static struct test_batch test;
    struct random random = start("masks");
    for (int i = 0; i < (SANITIZED ? 3 : 12); i++) {
        struct model_config c = attention_config(&random, PICK(&random, heads), groups[i % 4]);
        int slots[KV_BLOCKS], text[MOST_LENGTH] = {0}, length = between(&random, 1, 900);
        int begin = between(&random, 0, 500), own = blocks_of(length);
        struct batch *batch = start_batch(&test);
        shuffle(&random, slots, KV_BLOCKS);
        add_text(batch, text, slots, length - 1, length, true);
        add_text(batch, text, slots + own, 0, between(&random, 1, 40), false);
        add_text(batch, text, slots + own + 3, begin, begin + between(&random, 1, 70), false);
        float *sinks = random_floats(&random, (size_t)c.n_heads);
        for (int head = 0; head < c.n_heads; head++)
            sinks[head] *= 4.0f;
        struct mask mask = {i == 0 ? 0 : PICK(&random, windows), i % 3 < 2 ? sinks : NULL, attend};
        pretended.shared = PICK(&random, shared);
        check_attention(check, &random, &c, batch, 0, &mask);
        free(sinks);
    }
    pretended.shared = 0;
}

/* ---- recorded steps ---- */

/* Generated rows, all sampled: a step that is recorded. The first n_long are of texts as long as
 * `longest`, which share all blocks but the last. */
static void add_decode(struct batch *batch, struct random *random, int n, int n_long, int longest,
                       int vocab) {
    int slots[KV_BLOCKS], table[KV_BLOCKS], text[MOST_LENGTH] = {0};
    int own = blocks_of(longest) - 1; /* the next block that nobody has */
    shuffle(random, slots, KV_BLOCKS);
    for (int i = 0; i < n; i++) {
        int length = i < n_long ? longest : between(random, 1, BLOCK_TOKENS);
        memcpy(table, slots, sizeof table);
        need(own < KV_BLOCKS, "blocks for all texts");
        table[blocks_of(length) - 1] = slots[own++];
        text[length - 1] = below(random, vocab);
        add_text(batch, text, table, length - 1, length, true);
        add_sample(batch, i, warm(word(random)));
    }
}

/* A step without ops whose lists need much room, but no splits. */
static void make_room(struct worker *worker) {
    static struct test_batch test;
    static int text[2001], slots[KV_BLOCKS];
    struct batch *batch = start_batch(&test);
    for (int i = 0; i < 30; i++)
        add_text(batch, text, slots, 2000, 2001, false);
    worker->backend->step_begin(worker->shards[0], batch);
    worker->backend->step_end(worker->shards[0], NULL);
}

struct decoded {
    bool ran; /* false: replayed */
    std::vector<float> logits, kv;
    std::vector<int> sampled;
};

static struct decoded decode(struct check *check, struct worker *worker, const struct batch *batch,
                             const std::vector<float> &kv) {
    struct device *device = worker->shards[0];
    size_t block = block_elements(device);
    struct decoded out;
    for (int slot = 0; slot < KV_BLOCKS; slot++)
        poke_block(device, slot, &kv[slot * block]);
    out.ran = forward(worker, batch);
    out.logits.resize(nth(batch->n_rows, device->config->vocab_size, 0));
    peek(check, device, A_LOGITS, out.logits.data(), batch->n_rows);
    float *after = read_kv(device);
    out.kv.assign(after, after + kv.size());
    free(after);
    out.sampled.assign(batch->sampled, batch->sampled + batch->n_samples);
    return out;
}

/* Blocks hold what they held, but for the rows of this batch. */
static void check_others(struct check *check, const struct device *device,
                         const struct batch *batch, std::vector<float> before,
                         const std::vector<float> &after) {
    const struct model_config *c = device->config;
    for (int row = 0; row < batch->n_rows; row++)
        for (int i = 0; i < c->n_layers * 2 * c->n_kv_heads * c->head_dim; i++) {
            int position = batch->position[row], rest = i / c->head_dim;
            size_t at =
                kv_at(device, slot_of(batch, row, position), rest / 2 / c->n_kv_heads, rest % 2,
                      rest / 2 % c->n_kv_heads, position % BLOCK_TOKENS, i % c->head_dim);
            before[at] = after[at];
        }
    CHECK(before == after, "a step of %d rows wrote to others' blocks", batch->n_rows);
}

/* Steps of other sizes and lengths on one device, each against a device that has recorded nothing.
 */
static void recorded_steps(struct check *check) {
    /* rows of each step, and how many are of a long text: more rows and splits need more room, and
     * what was recorded is void; after make_room it is the splits alone that need it */
    static const int rows[][2] = {{8, 0}, {1, 1}, {5, 2},   {24, 1}, {13, 0},
                                  {9, 0}, {3, 1}, {12, 12}, {6, 6},  {40, 1}};
    static struct test_batch test;
    struct random random = start("recorded");
    struct model_config config = draw_config(&random, 1, 1);
    struct test_model *m = make_model_of(&random, config, TYPE_BF16);
    struct worker *worker = open_worker(0, 0, m, 1, 70);
    struct cuda_device *d = cuda_of(worker->shards[0]);
    int replays = 0, growths = 0;
    for (int i = 0; i < COUNT(rows); i++) {
        bool grows = i == 3 || i == 7;
        struct batch *batch = start_batch(&test);
        if (i == 6)
            make_room(worker);
        add_decode(batch, &random, rows[i][0], rows[i][1], grows ? 1792 : between(&random, 1, 500),
                   config.vocab_size);
        std::vector<float> kv(KV_BLOCKS * block_elements(worker->shards[0]));
        for (float &element : kv)
            element = (float)rounded(normal(&random));
        set_order(word(&random));
        size_t step_bytes = d->step_bytes, capacity = d->split_capacity;
        struct decoded got = decode(check, worker, batch, kv);
        replays += !got.ran;
        growths += i == 3 && d->step_bytes > step_bytes && d->split_capacity > capacity;
        growths += i == 7 && d->step_bytes == step_bytes && d->split_capacity > capacity;
        struct worker *fresh = open_worker(0, 0, m, 1, 70);
        struct decoded expected = decode(check, fresh, batch, kv);
        CHECK(expected.ran, "a device's first step is no replay");
        CHECK(got.logits == expected.logits && got.kv == expected.kv &&
                  got.sampled == expected.sampled,
              "step %d of %d rows, %s", i, rows[i][0], got.ran ? "recorded" : "replayed");
        check_others(check, worker->shards[0], batch, kv, got.kv);
        close_worker(fresh);
    }
    CHECK(replays >= 2 && growths == 2, "%d replays, %d growths", replays, growths);
    close_worker(worker);
    free_model(m);
}

/* A chain of layers, again and again: kernels overlap, and whoever reads too early or writes too
 * early gives other bits now and then. */
static void chains(struct check *check) {
    static const int rows[] = {1, 24, 64};
    static struct test_batch test;
    struct random random = start("chains");
    for (enum tensor_type type : {TYPE_BF16, TYPE_Q8_0}) {
        if (SANITIZED && type == TYPE_Q8_0)
            break;
        struct model_config config = draw_config(&random, 32, 1);
        struct test_model *m = make_model_of(&random, config, type);
        struct worker *worker = open_worker(0, 0, m, 1, 70);
        for (int n : rows) {
            struct batch *batch = start_batch(&test);
            add_decode(batch, &random, n, 0, between(&random, 1, 300), config.vocab_size);
            std::vector<float> kv(KV_BLOCKS * block_elements(worker->shards[0]));
            for (float &element : kv)
                element = (float)rounded(normal(&random));
            struct decoded expected = decode(check, worker, batch, kv);
            for (int i = 0; i < (SANITIZED ? 1 : EMULATED ? 2 : 100); i++) {
                set_order(word(&random));
                struct decoded got = decode(check, worker, batch, kv);
                CHECK(got.logits == expected.logits && got.sampled == expected.sampled,
                      "run %d of %d rows, type %d", i, n, (int)type);
            }
        }
        close_worker(worker);
        free_model(m);
    }
}

/* ---- refusals: one line that says what to do ---- */

static void refused_devices(struct check *check) {
    static const int dims[] = {4, 20, 250, 257, 264, 512};
    struct random random = start("refused");
    struct model_config config = draw_config(&random, 1, 1);
    config.rope_dim = 0;
    struct backend *backend = open_backend(0, 0);
    const struct device good = wanted_device(backend, &config, NULL, 4, KV_BF16);
    struct device wanted = good;
    wanted.index = backend->n_gpus;
    check_refusal(check, backend, &wanted, "there are");
    wanted.index = -1;
    check_refusal(check, backend, &wanted, "got device -1");
    wanted = good;
    wanted.kv_type = KV_F32;
    check_refusal(check, backend, &wanted, "--kv-type");
    for (int dim : dims) {
        config.head_dim = dim;
        check_refusal(check, backend, &good, "multiples of 8 up to 256");
    }
    config.head_dim = 8;
    pretended.major = 7;
    check_refusal(check, backend, &good, "expected 8.0 or newer");
    pretended.major = 0;
    close_device(open_device(backend, &good, 1)); /* nothing of that is left */
    backend->close(backend);
}

static void no_gpu(struct check *check) {
    static const struct {
        cudaError_t count;
        int driver;
        const char *words;
    } cases[] = {{cudaErrorInsufficientDriver, 11080, "the driver knows CUDA 11.8"},
                 {cudaErrorInsufficientDriver, 0, "no driver is installed"},
                 {cudaErrorNoDevice, 13000, "no GPU: "}};
    for (const auto &machine : cases) {
        char error[ERROR_LENGTH] = "";
        struct backend_options options = {};
        pretended.count = machine.count;
        pretended.driver = machine.driver;
        struct backend *backend = cuda_backend_open(&options, error);
        CHECK(!backend && strstr(error, machine.words) && !strchr(error, '\n'), "%s", error);
    }
    pretended.count = cudaSuccess;
    pretended.driver = -1;
    CHECK(cudaGetLastError() == cudaSuccess, "no GPU is no fault");
}

/* Memory that is not pinned, or cannot be, is copied all the same. */
static void memory_that_stays_pageable(struct check *check) {
    struct random random = start("pageable");
    struct model_config config = draw_config(&random, 1, 1);
    config.rope_dim = 0;
    struct device *device = open_alone(&config, 4);
    struct backend *backend = device->backend;
    char *host = (char *)host_alloc(100), *there = (char *)backend->alloc(device, 100);
    memset(host, 7, 100);
#ifdef CUDA_EMULATED
    emu_fail("cudaHostRegister", 0);
    CHECK(!backend->pin(device, host, 100), "it is refused once");
#endif
    for (int pinned = 0; pinned < 2; pinned++) {
        CHECK(!pinned || backend->pin(device, host, 100), "it is not pinned");
        struct copy2d in = {there, host, 100, 100, 100, 1}, out = {host, there, 100, 100, 100, 1};
        wait_for(device, STREAM_PAGE_IN, backend->copy(device, STREAM_PAGE_IN, &in));
        memset(host, 8, 100);
        wait_for(device, STREAM_PAGE_OUT, backend->copy(device, STREAM_PAGE_OUT, &out));
        CHECK(host[0] == 7 && host[99] == 7, "got %d, %d", host[0], host[99]);
    }
    backend->unpin(device, host);
    backend->release(device, there);
    free(host);
    close_alone(device);
}

#ifdef CUDA_EMULATED
/* ---- what only an emulated machine can be made to do ---- */

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

enum { GPUS = 4, MEMORY = 256 << 20, PROCESSORS = 4 };

static size_t free_bytes() {
    size_t available = 0, total = 0;
    need_success(cudaSetDevice(0), "cudaSetDevice");
    need_success(cudaMemGetInfo(&available, &total), "cudaMemGetInfo");
    return available;
}

/* Opens a worker of one shard as dynamo.c does, until something fails: false, and why. */
static bool try_worker(struct backend *backend, const struct test_model *m, char *error) {
    struct device wanted = wanted_device(backend, &m->model.config, m->frequency, 40, KV_BF16);
    struct device *device = backend->device_open(backend, &wanted, error);
    if (!device)
        return false;
    bool ok = true;
    for (const struct tensor *const(&layer)[N_ROLES] : m->tensors)
        for (int role = 0; role < N_ROLES; role++) {
            const struct tensor *together[4];
            model_together(layer, role, together);
            ok = ok && (!layer[role] ||
                        backend->upload(device, layer[role], together, {SLICE_WHOLE, 0, 1}, error));
        }
    void *kv = ok ? backend->alloc(device, 1000) : NULL;
    if (ok && !kv)
        snprintf(error, ERROR_LENGTH, "no room for blocks");
    ok = ok && kv;
    backend->release(device, kv);
    backend->device_close(device);
    return ok;
}

/* Every allocation of a worker fails once: there is a message each time, and nothing is left. */
static void memory_that_is_missing(struct check *check) {
    struct random random = start("memory");
    struct test_model *model = make_model_of(&random, draw_config(&random, 32, 1), TYPE_Q8_0);
    static const char *const calls[] = {"cudaMalloc", "cudaHostAlloc"};
    size_t before = free_bytes();
    for (const char *call : calls) {
        bool ok = false;
        int after = 0;
        for (; !ok && after < 200; after++) {
            char error[ERROR_LENGTH] = "";
            struct backend *backend = open_backend(0, 0);
            emu_fail(call, after);
            ok = try_worker(backend, model, error);
            CHECK(ok || (error[0] && !strchr(error, '\n')), "%s %d: %s", call, after, error);
            backend->close(backend);
            CHECK(free_bytes() == before, "%s %d: %zu bytes are left behind", call, after,
                  before - free_bytes());
        }
        CHECK(ok && after > 3, "%s failed %d times", call, after - 1);
        emu_devices(GPUS, MEMORY, PROCESSORS);
    }
    free_model(model);
}

static void models_that_do_not_fit(struct check *check) {
    struct random random = start("too large");
    char error[ERROR_LENGTH] = "";
    emu_devices(1, 20 << 20, PROCESSORS);
    struct model_config config = draw_config(&random, 1, 1);
    config.rope_dim = 0;
    struct backend *backend = open_backend(0, 0);
    struct device wanted = wanted_device(backend, &config, NULL, 4, KV_BF16);
    struct device *device = open_device(backend, &wanted, 1);
    struct tensor *small = make_tensor(&random, TYPE_BF16, 100, 100, 1.0f, 0.0f);
    struct tensor *large = make_tensor(&random, TYPE_BF16, 1200, 10000, 1.0f, 0.0f);
    struct slice whole = {SLICE_WHOLE, 0, 1};

    CHECK(!backend->upload(device, large, NULL, whole, error), "24 MB of 20");
    int left = 0, total = 0, needed = 0;
    CHECK(sscanf(error, "t: device 0 (%*[^)]) has %d MB left of %d and needs %d for this tensor",
                 &left, &total, &needed) == 3,
          "%s", error);
    CHECK(left > 10 && left < 20 && total == 20 && needed == 23 && strstr(error, "smaller type"),
          "%s", error);
    CHECK(backend->upload(device, small, NULL, whole, error), "%s", error);
    wanted.max_rows = 1000000;
    check_refusal(check, backend, &wanted, "lower --chunk or --max-batch");
    close_device(device);
    backend->close(backend);
    CHECK(free_bytes() == 20 << 20, "memory is left behind");
    free_tensor(small);
    free_tensor(large);
    emu_devices(GPUS, MEMORY, PROCESSORS);
}

/* Runs `act` in a child process. Returns its status, 128 + N for signal N, and what it wrote. */
template <typename Act> static int in_child(Act act, char *text, size_t size) {
    FILE *file = tmpfile();
    need(file != NULL, "a temporary file");
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        dup2(fileno(file), STDERR_FILENO);
        act();
        _exit(0);
    }
    int status = -1;
    waitpid(child, &status, 0);
    rewind(file);
    text[fread(text, 1, size - 1, file)] = 0;
    fclose(file);
    return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

static void tell_of_loss(void *) {
    fprintf(stderr, "the requests are lost\n");
}

/* Steps and copies on a worker, so that each kind of call is made. */
static void work(struct worker *worker, struct random *random) {
    struct device *device = worker->shards[0];
    struct story story = draw_story(random, 5, 3, device->config->vocab_size);
    struct check check = {0, 0};
    tell(&check, worker, random, &story, 10, 0, floats(nth(4, device->config->vocab_size + 1, 0)));
    uint8_t *host = (uint8_t *)host_alloc(1000);
    need(worker->backend->pin(device, host, 1000), "pinned memory");
    struct copy2d copy = {host, device->kv, 10, 10, 10, 10},
                  rows = {host, device->kv, 20, 10, 5, 9};
    wait_for(device, STREAM_PAGE_OUT, worker->backend->copy(device, STREAM_PAGE_OUT, &copy));
    wait_for(device, STREAM_PAGE_OUT, worker->backend->copy(device, STREAM_PAGE_OUT, &rows));
}

/* A call fails in the middle: one line says where and what, and the requests that are lost. */
static void faults(struct check *check) {
    static const struct {
        const char *call, *doing;
        int n_shards;
    } cases[] = {{"cudaLaunchKernelEx", "computing a step", 1},
                 {"cudaMemcpyAsync", "computing a step", 1},
                 {"cudaStreamSynchronize", "ending a step", 1},
                 {"cudaStreamBeginCapture", "computing a step", 1},
                 {"cudaStreamEndCapture", "ending a step", 1},
                 {"cudaGraphInstantiate", "ending a step", 1},
                 {"cudaGraphLaunch", "ending a step", 1},
                 {"cudaMemcpy2DAsync", "paging out", 1},
                 {"cudaEventRecord", "paging out", 1},
                 {"cudaEventQuery", "polling a copy", 1},
                 {"cudaMemcpyPeerAsync", "adding up shards", 2},
                 {"cudaStreamWaitEvent", "adding up shards", 2}};
    struct random random = start("faults");
    struct test_model *model = make_model_of(&random, draw_config(&random, 1, 2), TYPE_BF16);
    for (const auto &fault : cases) {
        char text[2000], where[100] = "", call[100] = "", why[100] = "", doing[100] = "";
        int line = 0, device = -1;
        int status = in_child(
            [&] {
                struct backend_options options = {};
                options.lost = tell_of_loss;
                struct worker *worker =
                    open_worker_on(open_backend_of(&options), 0, model, fault.n_shards, 60);
                emu_fail(fault.call, 0);
                work(worker, &random);
            },
            text, sizeof text);
        int found =
            sscanf(text, "dynamo: %99[^:]:%d: device %d (%*[^)]): %99[^:]: %99[^,], while %99[^\n]",
                   where, &line, &device, call, why, doing);
        CHECK(status == 128 + SIGABRT && found == 6, "%s: status %d: %s", fault.call, status, text);
        bool launches = !strcmp(fault.call, "cudaLaunchKernelEx");
        CHECK((strstr(where, ".cu") || strstr(where, "lib/gpu.h")) && line > 0 && device >= 0 &&
                  device < fault.n_shards &&
                  !strcmp(call, launches ? "embed_kernel" : fault.call) &&
                  !strcmp(doing, fault.doing),
              "%s", text);
        const char *rest = strchr(text, '\n');
        CHECK(rest && !strcmp(rest, "\nthe requests are lost\n"), "%s", text);
    }
    free_model(model);
}
#endif

/* ---- launches ---- */

/* Two threads, each with a device of its own on one GPU, launch one kernel with more and with less
 * shared memory: what it may have belongs to the kernel, not to who launches it. So who launches it
 * with less takes nothing from it. */
struct launcher {
    struct gpu gpu;
    int bytes;
    bool lost;
};

__global__ void store_last_kernel(int bytes) {
    DYNAMIC_SHARED(char, shared);
    grid_wait();
    if (threadIdx.x == 0)
        shared[bytes - 1] = 1;
}

static void give_up(void *launcher) {
    ((struct launcher *)launcher)->lost = true;
    pthread_exit(NULL);
}

static void *launch_often(void *argument) {
    struct launcher *l = (struct launcher *)argument;
    gpu_enter(&l->gpu, "launching");
    for (int i = 0; i < (EMULATED ? 200 : 5000); i++) {
        gpu_launch(&l->gpu, "store_last_kernel", store_last_kernel, 1, WARP, (size_t)l->bytes,
                   l->bytes);
        GPU_TRY(&l->gpu, cudaStreamSynchronize(l->gpu.stream));
    }
    return NULL;
}

static void launches_of_two_threads(struct check *check) {
    cudaDeviceProp properties;
    struct launcher launchers[2] = {};
    pthread_t threads[2];
    CHECK(cudaGetDeviceProperties(&properties, 0) == cudaSuccess, "no properties");
    for (int i = 0; i < 2; i++) {
        struct launcher *l = &launchers[i];
        l->gpu.program = "test_cuda";
        l->gpu.properties = &properties;
        l->gpu.lost = give_up;
        l->gpu.context = l;
        l->bytes = (i + 1) * 49 << 10;
        CHECK(cudaStreamCreateWithPriority(&l->gpu.stream, cudaStreamNonBlocking, 0) == cudaSuccess,
              "no stream");
    }
    gpu_enter(&launchers[0].gpu, "launching");
    for (int i = 1; i >= 0; i--)
        gpu_launch(&launchers[i].gpu, "store_last_kernel", store_last_kernel, 1, WARP,
                   (size_t)launchers[i].bytes, launchers[i].bytes);
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(1);
    config.blockDim = dim3(WARP);
    config.dynamicSmemBytes = (size_t)launchers[1].bytes;
    config.stream = launchers[1].gpu.stream;
    emu_next_kernel("store_last_kernel");
    CHECK(cudaLaunchKernelEx(&config, store_last_kernel, launchers[1].bytes) == cudaSuccess,
          "who had less has taken it");
    for (int i = 0; i < 2; i++)
        CHECK(!pthread_create(&threads[i], NULL, launch_often, &launchers[i]), "no thread");
    for (int i = 0; i < 2; i++) {
        (void)pthread_join(threads[i], NULL);
        (void)cudaStreamDestroy(launchers[i].gpu.stream);
        CHECK(!launchers[i].lost, "%d KB: a launch failed", launchers[i].bytes >> 10);
    }
}

int main(int argc, char **argv) {
    static const struct test tests[] = {
        OP_TESTS,
        {"masks_of_attention", masks_of_attention},
        {"recorded_steps", recorded_steps},
        {"chains", chains},
        {"memory_that_stays_pageable", memory_that_stays_pageable},
        {"refused_devices", refused_devices},
        {"no_gpu", no_gpu},
        {"launches_of_two_threads", launches_of_two_threads},
#ifdef CUDA_EMULATED
        {"memory_that_is_missing", memory_that_is_missing},
        {"models_that_do_not_fit", models_that_do_not_fit},
        {"faults", faults},
#endif
    };
    char error[ERROR_LENGTH] = "";
    struct backend_options options = {};
    struct backend *backend = cuda_backend_open(&options, error);
    if (!backend) {
        printf("test_cuda: %s\n", error);
        return 1;
    }
    backend->close(backend);
    return run_tests(tests, sizeof tests / sizeof *tests, argc, argv);
}
