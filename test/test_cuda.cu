/* test_cuda.cu: every op of the CUDA backend against float64, on random shapes.
 *
 * The same source is compiled by g++, which runs the kernels on the CPU (test/cuda_emu.h), and by
 * nvcc for a GPU (make gpu-test). Ops are driven through struct backend, so their launchers are
 * tested too. An op's inputs are written into the device's memory or read from there, so that an
 * error is found in the op that makes it; its outputs are NaN before. What a GPU leaves open, the
 * emulator does in another order each time: everything is run in several orders, and must give the
 * same bits. References are float64, of the same bf16 inputs; the sampler's twin is sampler.h.
 *
 *     test_cuda                      all tests, on shapes drawn from the clock
 *     test_cuda products 1234        those with this in their name, from the seed 1234 */
extern "C" {
#include "dynamo.h"
#include "sampler.h"
}
#include "ptx.cuh"

/* What the machine seems to be: the backend asks here, so that any can be played. */
static struct {
    int major;         /* of the chips; 0: as they are */
    int driver;        /* its version; -1: as it is */
    cudaError_t count; /* why there are no devices */
} pretended = {0, -1, cudaSuccess};

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
    return error;
}

#define cudaGetDeviceCount   pretended_count
#define cudaDriverGetVersion pretended_driver
#undef cudaGetDeviceProperties /* a macro in some versions of CUDA */
#define cudaGetDeviceProperties pretended_properties
#include "../kernels.cu"

#include "check.h"
#include "cuda_worker.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>

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

/* ---- packing ---- */

/* What a matrix holds of an element, and how exactly. */
static double packed_element(const struct tensor *tensor, int row, int k, double *allowed) {
    double value = element(tensor, row, k);
    const uint8_t *block = block_of(tensor, row, k);
    *allowed = 0.0;
    if (tensor->type == TYPE_F32)
        *allowed = 0x1p-16 * fabs(value); /* two bf16 */
    else if (tensor->type == TYPE_F16)
        value = rounded(value);
    else if (tensor->type == TYPE_Q4_K) /* computed in f32, and rounded */
        *allowed = 0x1.01p-8 * fabs(value) +
                   0x1p-22 * 1000 * (fabs(from_f16(block)) + fabs(from_f16(block + 2)));
    else if (tensor->type == TYPE_Q6_K)
        *allowed = 0x1.01p-8 * fabs(value);
    return value;
}

/* Segments as pack.cuh tells: eight shares of K, cut between multiples of `grain`; each begins
 * with a unit of its own where K is cut there. */
static void check_segments(struct check *check, const struct segments &s, int cols, int grain,
                           int rank, int count) {
    int n = K_SEGMENTS / count, units = 0;
    CHECK(s.n == n && s.unit[0] == 0, "%d segments", s.n);
    for (int i = 0; i <= n; i++) {
        int64_t steps = (cols + grain - 1) / grain;
        int k = (int)std::min<int64_t>((rank * n + i) * steps / K_SEGMENTS * grain, cols);
        CHECK(s.k[i] == k, "%d columns, shard %d of %d: segment %d begins at %d, not %d", cols,
              rank, count, i, s.k[i], k);
        if (i > 0 && s.k[i] > s.k[i - 1])
            units += (s.k[i] - 1) / UNIT - s.k[i - 1] / UNIT + 1;
        CHECK(s.unit[i] == units, "units before segment %d", i);
    }
}

/* All elements of a shard's part, and zeros where there is none. */
static void check_matrix(struct check *check, struct device *device, const struct tensor *tensor,
                         struct slice slice, const struct matrix &m) {
    int cols = (int)tensor->cols, rows = (int)tensor->rows;
    int first_row = 0, first_k = 0;
    if (slice.kind == SLICE_ROWS) {
        rows /= slice.count;
        first_row = slice.rank * rows;
    }
    if (slice.kind == SLICE_COLS) {
        check_segments(check, m.segments, cols, grain_of(device->config, cols), slice.rank,
                       slice.count);
        first_k = m.segments.k[0];
    } else {
        CHECK(m.segments.k[0] == 0 && m.segments.k[K_SEGMENTS] == cols, "all of K");
    }
    std::vector<float> got = elements(device, m);
    std::vector<int> places = places_of(m.segments);
    int width = m.n_units * UNIT;
    struct worst worst = {};
    for (int row = 0; row < m.n_tiles * TILE; row++) {
        std::vector<double> expected((size_t)width), allowed((size_t)width);
        for (size_t i = 0; i < places.size() && row < rows; i++)
            expected[places[i]] =
                packed_element(tensor, first_row + row, first_k + (int)i, &allowed[places[i]]);
        for (int i = 0; i < width; i++)
            compare(&worst, row, i, got[(size_t)row * width + i], expected[i], allowed[i]);
    }
    CHECK(m.n_outputs == rows && m.n_tiles == divide(rows, TILE), "%d outputs", m.n_outputs);
    CHECK_WORST(worst, "type %d, (%d, %d), slice %d, %d of %d", (int)tensor->type,
                (int)tensor->rows, cols, (int)slice.kind, slice.rank, slice.count);
}

/* A tensor, or a shard's part of one, on a device of a model for which it is `attn_output`, or
 * something else. */
static void check_packing(struct check *check, struct random *random, struct backend *backend,
                          enum tensor_type type) {
    static const int counts[] = {1, 2, 4, 8}, heads[] = {8, 16, 40, 64};
    struct model_config config = draw_config(random, 1, 8);
    int n_k = form_of(type).n_k, count = pick(random, counts);
    int rows = between(random, 1, 5) * count * between(random, 1, 3);
    config.head_dim = pick(random, heads);
    config.n_heads = 8 * between(random, 1, 2);
    int cols = n_k == 1 ? between(random, 1, 400) : n_k * between(random, 1, n_k > 32 ? 2 : 12);
    bool heads_fit = config.n_heads * config.head_dim % n_k == 0;
    enum slice_kind kind = (enum slice_kind)below(random, 3);
    if (kind == SLICE_COLS && heads_fit && below(random, 2))
        cols = config.n_heads * config.head_dim;
    else if (kind == SLICE_COLS)
        cols = divide(cols, 2 * count) * 2 * count;
    if (cols % n_k != 0)
        cols = divide(cols, n_k) * n_k;
    int rank = kind == SLICE_WHOLE ? 0 : below(random, count);
    count = kind == SLICE_WHOLE ? 1 : count;
    struct device wanted = wanted_device(&config, NULL, 0, 1, 1);
    config.rope_dim = 0;
    struct device *device = open_device(backend, &wanted, 1);
    struct tensor *tensor = make_tensor(random, type, rows + (rows == 1), cols, 0.1f, 0.0f);
    struct slice slice = {kind, rank, count};
    tensor->rows = tensor->rows / count * count;
    char error[GGUF_ERROR_LENGTH] = "";
    const struct weight *w = backend->upload(device, tensor, slice, error);
    CHECK(w != NULL, "%s", error);
    if (w)
        check_matrix(check, device, tensor, slice, w->matrix);
    CHECK(w == backend->upload(device, tensor, slice, error), "two uploads share one copy");
    close_device(device);
    backend->close(backend); /* its weights know the tensor */
    free_tensor(tensor);
}

static void packing(struct check *check) {
    struct random random = start("packing");
    for (int i = 0; i < (SLOWER ? 14 : 56); i++)
        check_packing(check, &random, open_backend(), all_types[i % N_TYPES]);
}

/* A tensor that repeats itself is packed as if it were written out. */
static void periodic_tensors(struct check *check) {
    struct random random = start("periodic");
    struct model_config config = draw_config(&random, 1, 1);
    config.rope_dim = 0;
    for (int i = 0; i < 2 * N_TYPES; i++) {
        enum tensor_type type = all_types[i % N_TYPES];
        struct form form = form_of(type);
        int cols = form.n_k * between(&random, 1, form.n_k > 1 ? 3 : 90);
        int rows = 2 * between(&random, 5, 40);
        struct tensor *whole = make_tensor(&random, type, rows, cols, 0.1f, 0.0f);
        size_t blocks = whole->bytes / (size_t)form.bytes;
        struct tensor repeated = *whole;
        repeated.period = (size_t)form.bytes * (size_t)between(&random, 1, (int)blocks + 5);
        uint8_t *data = (uint8_t *)whole->data;
        for (size_t at = repeated.period; at < whole->bytes; at++)
            data[at] = data[at - repeated.period];
        struct backend *backend = open_backend();
        struct device wanted = wanted_device(&config, NULL, 0, 1, 1);
        struct device *device = open_device(backend, &wanted, 1);
        struct slice slice = {below(&random, 2) ? SLICE_ROWS : SLICE_WHOLE, 0, 1};
        slice.count = slice.kind == SLICE_ROWS ? 2 : 1;
        slice.rank = slice.count - 1;
        char error[GGUF_ERROR_LENGTH] = "";
        const struct weight *one = backend->upload(device, whole, slice, error);
        const struct weight *other = backend->upload(device, &repeated, slice, error);
        CHECK(one && other && one != other, "%s", error);
        size_t n = (size_t)one->matrix.n_tiles * (size_t)one->matrix.n_units;
        size_t bytes = n * packed_bytes(one->matrix.type);
        CHECK(peek(device, one->matrix.packed, bytes) == peek(device, other->matrix.packed, bytes),
              "type %d, (%d, %d), period %zu of %zu", (int)type, rows, cols, repeated.period,
              whole->bytes);
        if (has_scales(one->matrix.type))
            CHECK(peek(device, one->matrix.scales, n * SCALE_BYTES) ==
                      peek(device, other->matrix.scales, n * SCALE_BYTES),
                  "scales of type %d", (int)type);
        close_device(device);
        backend->close(backend);
        free_tensor(whole);
    }
}

/* ---- products and norms ---- */

/* A matrix as products see it: numbers of quantized types are scaled, and then rounded to bf16. */
struct dense {
    int width, n_outputs;       /* width: its places */
    std::vector<float> w, high; /* high: what bf16 keeps of it */
};

static struct dense dense_of(struct device *device, const struct matrix &m) {
    struct dense dense = {m.n_units * UNIT, m.n_outputs, elements(device, m), {}};
    for (float &w : dense.w)
        w = has_scales(m.type) ? from_bf16(bf16_of(w)) : w;
    for (float w : dense.w)
        dense.high.push_back(from_bf16(bf16_of(w)));
    return dense;
}

struct sum {
    double value, size; /* size: the sum of the magnitudes */
};

/* Row `row` of an input, with what bf16 left out of it (low, may be empty), times an output. */
static struct sum multiply(const struct dense &m, const std::vector<uint16_t> &input,
                           const std::vector<uint16_t> &low, int stride, int row, int output) {
    struct sum sum = {};
    const float *w = &m.w[(size_t)output * m.width], *high = &m.high[(size_t)output * m.width];
    for (int i = 0; i < m.width; i++) {
        size_t at = (size_t)row * stride + i;
        double product = (double)w[i] * from_bf16(input[at]);
        sum.size += fabs(product);
        sum.value += product + (low.empty() ? 0.0 : (double)high[i] * from_bf16(low[at]));
    }
    return sum;
}

static double allowed_of(struct sum sum, double added) { /* of an f32 accumulation */
    return 1e-5 * (sum.size + fabs(added)) + 1e-30;
}

/* The inputs of a step's products, as the device has them. */
struct inputs {
    std::vector<uint16_t> high, low;
    int stride;
};

static struct inputs normed_inputs(struct device *device) {
    struct cuda_device *d = cuda_of(device);
    size_t n = d->padded_rows * (size_t)d->h_stride;
    struct inputs inputs = {peek(device, d->h, n), {}, d->h_stride};
    if (d->h_low)
        inputs.low = peek(device, d->h_low, n);
    return inputs;
}

/* h of `rows` (indices of x) against rmsnorm(x) * weight. */
static void check_norm(struct check *check, struct device *device, const struct tensor *weight,
                       const std::vector<float> &x, const std::vector<int> &rows) {
    const struct model_config *c = device->config;
    int x_stride = cuda_of(device)->x_stride;
    struct inputs h = normed_inputs(device);
    struct worst worst = {}, worst_low = {};
    for (size_t row = 0; row < rows.size(); row++) {
        const float *from = &x[(size_t)rows[row] * x_stride];
        double squares = 0.0;
        for (int i = 0; i < c->d_model; i++)
            squares += (double)from[i] * from[i];
        double scale = 1.0 / sqrt(squares / c->d_model + c->norm_epsilon);
        for (int i = 0; i < c->d_model; i++) {
            double expected = from[i] * scale * element(weight, 0, i);
            size_t at = row * h.stride + i;
            double high = from_bf16(h.high[at]), size = fabs(expected) + 1e-30;
            compare(&worst, (int)row, i, high, expected, 0x1.01p-8 * size);
            if (!h.low.empty())
                compare(&worst_low, (int)row, i, high + from_bf16(h.low[at]), expected,
                        0x1.2p-16 * size);
        }
    }
    CHECK_WORST(worst, "norm of %d rows of %d", (int)rows.size(), c->d_model);
    CHECK_WORST(worst_low, "norm of %d rows of %d, with the low parts", (int)rows.size(),
                c->d_model);
}

static void poison_h(struct device *device) {
    struct cuda_device *d = cuda_of(device);
    poison(device, d->h, d->padded_rows, d->h_stride, device->config->d_model);
    if (d->h_low)
        poison(device, d->h_low, d->padded_rows, d->h_stride, device->config->d_model);
}

struct part { /* one matrix of a product, and where its outputs begin in a row */
    const struct weight *weight, *bias;
    int first;
};

/* Outputs (rows, stride) against the product, plus bias, plus what was there before (or empty). */
static void check_outputs(struct check *check, const char *what, struct device *device,
                          std::vector<struct part> parts, struct inputs inputs, int n_rows,
                          const std::vector<float> &got, int stride,
                          const std::vector<float> &before) {
    struct worst worst = {};
    bool low = false;
    for (const struct part &part : parts)
        low |= part.weight->matrix.type == PACKED_F32;
    if (!low)
        inputs.low.clear();
    for (const struct part &part : parts) {
        struct dense m = dense_of(device, part.weight->matrix);
        std::vector<float> bias((size_t)m.n_outputs);
        if (part.bias)
            bias = peek(device, (const float *)part.bias->vector, bias.size());
        for (int row = 0; row < n_rows; row++) {
            for (int i = 0; i < m.n_outputs; i++) {
                struct sum sum = multiply(m, inputs.high, inputs.low, inputs.stride, row, i);
                size_t at = (size_t)row * stride + part.first + i;
                double added = bias[i] + (before.empty() ? 0.0 : (double)before[at]);
                compare(&worst, row, part.first + i, got[at], sum.value + added,
                        allowed_of(sum, added));
            }
        }
    }
    CHECK_WORST(worst, "%s: type %d, %d rows of %d", what, parts[0].weight->matrix.type, n_rows,
                inputs.stride);
}

static void check_norm_qkv(struct check *check, struct worker *worker,
                           const struct test_model *model, const std::vector<float> &x) {
    struct device *device = worker->shards[0];
    struct cuda_device *d = cuda_of(device);
    const struct layer_weights *l = &worker->layers[0][0];
    size_t n = (size_t)device->max_rows * d->qkv_stride;
    std::vector<float> qkv = in_orders(
        check, "norm_qkv",
        [&] {
            poison_h(device);
            poison(device, d->qkv, (size_t)device->max_rows, d->qkv_stride, d->qkv_stride);
            worker->backend->norm_qkv(device, l);
        },
        [&] { return peek(device, d->qkv, n); });
    std::vector<int> rows;
    for (int row = 0; row < d->n_rows; row++)
        rows.push_back(row);
    check_norm(check, device, model->layers[0].attn_norm, x, rows);
    int q = l->attn_q->matrix.n_outputs, kv = l->attn_k->matrix.n_outputs;
    check_outputs(
        check, "norm_qkv", device,
        {{l->attn_q, l->q_bias, 0}, {l->attn_k, l->k_bias, q}, {l->attn_v, l->v_bias, q + kv}},
        normed_inputs(device), d->n_rows, qkv, d->qkv_stride, {});
    for (size_t i = (size_t)d->n_rows * d->qkv_stride; i < n; i++)
        CHECK(qkv[i] != qkv[i], "norm_qkv wrote behind the last row");
}

static void check_project(struct check *check, struct worker *worker, const struct weight *weight,
                          enum product_input input, struct random *random) {
    struct device *device = worker->shards[0];
    struct cuda_device *d = cuda_of(device);
    bool attends = input == INPUT_ATTENTION;
    int stride = attends ? d->attention_stride : d->ffn_stride;
    uint16_t *to = attends ? d->attention : d->ffn;
    std::vector<int> places = places_of(attends ? d->attention_places : d->ffn_places);
    std::vector<uint16_t> values =
        at_places(places, d->padded_rows, stride, [&](size_t row, size_t) {
            return (int)row < d->n_rows ? bf16_of(normal(random)) : (uint16_t)0xffff;
        });
    poke(device, to, values);
    size_t n = (size_t)device->max_rows * d->x_stride;
    std::vector<float> before = peek(device, d->x, n);
    std::vector<float> x = in_orders(
        check, "project_add",
        [&] {
            poke(device, d->x, before);
            worker->backend->project_add(device, weight, input);
        },
        [&] { return peek(device, d->x, n); });
    check_outputs(check, attends ? "attn_output" : "ffn_down", device, {{weight, NULL, 0}},
                  {values, {}, stride}, d->n_rows, x, d->x_stride, before);
    for (size_t i = (size_t)d->n_rows * d->x_stride; i < n; i++)
        CHECK(!memcmp(&x[i], &before[i], sizeof x[i]), "project_add wrote behind the last row");
}

static void check_gate_up(struct check *check, struct worker *worker,
                          const struct test_model *model, const std::vector<float> &x) {
    struct device *device = worker->shards[0];
    struct cuda_device *d = cuda_of(device);
    const struct layer_weights *l = &worker->layers[0][0];
    std::vector<int> places = places_of(d->ffn_places), rows;
    std::vector<uint16_t> nans = at_places(
        places, d->padded_rows, d->ffn_stride, [](size_t, size_t) { return (uint16_t)0xffff; });
    std::vector<uint16_t> ffn = in_orders(
        check, "norm_gate_up",
        [&] {
            poison_h(device);
            poke(device, d->ffn, nans);
            worker->backend->norm_gate_up(device, l);
        },
        [&] { return peek(device, d->ffn, nans.size()); });
    for (int row = 0; row < d->n_rows; row++)
        rows.push_back(row);
    check_norm(check, device, model->layers[0].ffn_norm, x, rows);
    struct inputs h = normed_inputs(device);
    if (l->ffn_gate->matrix.type != PACKED_F32 && l->ffn_up->matrix.type != PACKED_F32)
        h.low.clear();
    struct dense gate = dense_of(device, l->ffn_gate->matrix);
    struct dense up = dense_of(device, l->ffn_up->matrix);
    struct worst worst = {};
    for (int row = 0; row < d->n_rows; row++) {
        std::vector<double> expected((size_t)d->ffn_stride), allowed((size_t)d->ffn_stride);
        for (int i = 0; i < gate.n_outputs; i++) {
            struct sum g = multiply(gate, h.high, h.low, h.stride, row, i);
            struct sum u = multiply(up, h.high, h.low, h.stride, row, i);
            double silu = g.value / (1.0 + exp(-g.value));
            expected[places[i]] = silu * u.value;
            allowed[places[i]] = 1.1 * allowed_of(g, 0.0) * fabs(u.value) +
                                 fabs(silu) * allowed_of(u, 0.0) + 0x1.02p-8 * fabs(silu * u.value);
        }
        for (int i = 0; i < d->ffn_stride; i++)
            compare(&worst, row, i, from_bf16(ffn[(size_t)row * d->ffn_stride + i]), expected[i],
                    allowed[i]);
    }
    CHECK_WORST(worst, "norm_gate_up: type %d, %d rows, %d of %d", l->ffn_gate->matrix.type,
                d->n_rows, d->d_ff, device->config->d_model);
}

static void check_logits(struct check *check, struct worker *worker, const struct test_model *model,
                         const std::vector<float> &x, const std::vector<int> &rows) {
    struct device *device = worker->shards[0];
    struct cuda_device *d = cuda_of(device);
    size_t n = rows.size() * (size_t)d->logits_stride;
    if (rows.empty())
        return;
    std::vector<float> logits = in_orders(
        check, "norm_logits",
        [&] {
            poison_h(device);
            poison(device, d->logits, rows.size(), d->logits_stride, d->logits_stride);
            worker->backend->norm_logits(device, &worker->weights[0]);
        },
        [&] { return peek(device, d->logits, n); });
    check_norm(check, device, model->output_norm, x, rows);
    check_outputs(check, "norm_logits", device, {{worker->weights[0].output, NULL, 0}},
                  normed_inputs(device), (int)rows.size(), logits, d->logits_stride, {});
    size_t width = (size_t)model->config.vocab_size;
    std::vector<float> host(rows.size() * width, NAN);
    worker->backend->read_logits(device, host.data()); /* it computes them again */
    for (size_t i = 0; i < rows.size(); i++)
        CHECK(!memcmp(&host[i * width], &logits[i * d->logits_stride], width * sizeof(float)),
              "read_logits: row %zu", i);
}

/* All products of a layer, for so many rows of either kind. */
static void check_products(struct check *check, struct random *random,
                           const struct test_model *model, int n_generated, int n_prompt) {
    int n_rows = n_generated + n_prompt;
    struct worker worker = open_worker(open_backend(), model, 1, n_rows + below(random, 9));
    struct device *device = worker.shards[0];
    struct cuda_device *d = cuda_of(device);
    struct test_batch batch;
    std::vector<int> text((size_t)n_rows + 1), rows;
    std::vector<int> slots = shuffled(random, KV_BLOCKS);
    for (int i = 0; i < n_generated; i++)
        add_text(&batch, text.data(), slots.data(), 0, 1, true);
    for (int done = 0; done < n_prompt;) {
        int n = between(random, 1, n_prompt - done);
        add_text(&batch, text.data(), slots.data(), 0, n, false);
        done += n;
    }
    for (int i = n_rows < 2 ? 1 : between(random, 1, std::min<int>(n_rows - 1, LOGIT_ROWS));
         i < n_rows; i++)
        if (rows.size() < LOGIT_ROWS)
            rows.push_back(below(random, n_rows));
    for (int row : rows)
        add_sample(&batch, row, {});
    worker.backend->step_begin(device, seal(&batch));
    need(!d->recording, "a step that is not recorded");
    std::vector<float> x((size_t)device->max_rows * d->x_stride);
    for (int row = 0; row < device->max_rows; row++)
        for (int i = 0; i < d->x_stride; i++)
            x[(size_t)row * d->x_stride + i] =
                row < n_rows ? normal(random) * (float)(1 << row % 5) : NAN;
    poke(device, d->x, x);
    check_norm_qkv(check, &worker, model, x);
    check_gate_up(check, &worker, model, x);
    check_logits(check, &worker, model, x, rows);
    check_project(check, &worker, worker.layers[0][0].attn_output, INPUT_ATTENTION, random);
    check_project(check, &worker, worker.layers[0][0].ffn_down, INPUT_FFN, random);
    worker.backend->step_end(device, NULL);
    close_worker(&worker);
}

static void products_of(struct check *check, const char *name, enum tensor_type type) {
    static const int generated[] = {0, 1, 3, 8, 9, 16, 17, 32, 33, 64, 65, 70};
    static const int prompt[] = {0, 1, 30, 64, 130};
    struct random random = start(name);
    for (int i = 0; i < (SLOWER ? 1 : 2); i++) {
        int n_k = form_of(type).n_k;
        struct model_config config = draw_config(&random, n_k, 1);
        struct test_model *model = make_model(&random, config, like_types(type));
        int n_generated = pick(&random, generated), n_prompt = pick(&random, prompt);
        if (n_generated + n_prompt == 0)
            n_generated = n_prompt = 5;
        check_products(check, &random, model, n_generated, n_prompt);
        free_model(model);
    }
}

static void products_f32(struct check *check) {
    products_of(check, "f32", TYPE_F32);
}

static void products_f16(struct check *check) {
    products_of(check, "f16", TYPE_F16);
}

static void products_bf16(struct check *check) {
    products_of(check, "bf16", TYPE_BF16);
}

static void products_q8_0(struct check *check) {
    products_of(check, "q8_0", TYPE_Q8_0);
}

static void products_q4_0(struct check *check) {
    products_of(check, "q4_0", TYPE_Q4_0);
}

static void products_q4_k(struct check *check) {
    products_of(check, "q4_k", TYPE_Q4_K);
}

static void products_q6_k(struct check *check) {
    products_of(check, "q6_k", TYPE_Q6_K);
}

static void products_of_mixed_types(struct check *check) {
    static const enum tensor_type types[] = {TYPE_F32, TYPE_BF16, TYPE_F16, TYPE_Q8_0, TYPE_Q4_0};
    struct random random = start("mixed");
    for (int i = 0; i < (SLOWER ? 1 : 3); i++) {
        struct types mixed = like_types(TYPE_F32);
        mixed.k = pick(&random, types);
        mixed.v = pick(&random, types);
        mixed.up = i % 2 ? TYPE_F32 : TYPE_Q4_0;
        mixed.gate = i % 2 ? pick(&random, types) : TYPE_Q8_0;
        mixed.down = pick(&random, types);
        struct test_model *model = make_model(&random, draw_config(&random, 32, 1), mixed);
        check_products(check, &random, model, between(&random, 1, 40), between(&random, 1, 70));
        free_model(model);
    }
}

/* More row tiles than a band has, and more than one block of outputs. */
static void products_of_many_rows(struct check *check) {
    struct random random = start("many rows");
    struct model_config config = draw_config(&random, 1, 1);
    config.n_kv_heads = config.n_heads = 1;
    config.head_dim = config.rope_dim = 8;
    config.d_ff = between(&random, 20, 31);
    config.d_model = between(&random, 129, 140);
    struct test_model *model = make_model(&random, config, like_types(TYPE_BF16));
    int rows = SLOWER ? 300 : ROW_BAND * ROW_TILE + between(&random, 1, 40);
    struct worker worker = open_worker(open_backend(), model, 1, rows + 3);
    struct test_batch batch;
    std::vector<int> text((size_t)rows), slots = shuffled(&random, KV_BLOCKS);
    for (int i = 0; i < 3; i++)
        add_text(&batch, text.data(), slots.data(), 0, 1, true);
    for (int done = 0; done < rows; done += 1000)
        add_text(&batch, text.data(), slots.data(), 0, std::min(rows - done, 1000), false);
    worker.backend->step_begin(worker.shards[0], seal(&batch));
    check_project(check, &worker, worker.layers[0][0].ffn_down, INPUT_FFN, &random);
    worker.backend->step_end(worker.shards[0], NULL);
    close_worker(&worker);
    free_model(model);
}

/* ---- embedding and rope ---- */

static void embedding(struct check *check) {
    struct random random = start("embedding");
    for (enum tensor_type type : all_types) {
        struct model_config config = draw_config(&random, form_of(type).n_k, 1);
        struct test_model *model = make_model(&random, config, like_types(type));
        int n = between(&random, 1, 30), pairs = config.rope_dim / 2;
        struct worker worker = open_worker(open_backend(), model, 1, n + 2);
        struct device *device = worker.shards[0];
        struct cuda_device *d = cuda_of(device);
        struct test_batch batch;
        std::vector<int> text((size_t)n), slots((size_t)n);
        add_text(&batch, text.data(), slots.data(), 0, n, false);
        for (int i = 0; i < n; i++) {
            batch.token[i] = below(&random, config.vocab_size);
            batch.position[i] = below(&random, 1 << between(&random, 1, 20));
        }
        worker.backend->step_begin(device, seal(&batch));
        size_t n_turns = (size_t)n * (size_t)pairs;
        std::vector<float> x = in_orders(
            check, "embed",
            [&] {
                poison(device, d->x, (size_t)n + 2, d->x_stride, d->x_stride);
                poison(device, (float *)d->turn, (size_t)n + 2, 2 * pairs, 2 * pairs);
                worker.backend->embed(device, worker.weights[0].token_embd);
            },
            [&] { return peek(device, d->x, ((size_t)n + 2) * d->x_stride); });
        const struct matrix &m = worker.weights[0].token_embd->matrix;
        std::vector<float> table = elements(device, m),
                           turn = peek(device, (float *)d->turn, 2 * n_turns);
        struct worst worst = {};
        for (int row = 0; row < n; row++) {
            CHECK(!memcmp(&x[(size_t)row * d->x_stride],
                          &table[(size_t)batch.token[row] * m.n_units * UNIT],
                          (size_t)config.d_model * sizeof(float)),
                  "embed: type %d, token %d", (int)type, batch.token[row]);
            for (int i = 0; i < pairs; i++) {
                double angle = (double)batch.position[row] * (double)model->frequency[i];
                const float *got = &turn[2 * ((size_t)row * pairs + i)];
                compare(&worst, row, i, got[0], cos(angle), 1e-7);
                compare(&worst, row, i, got[1], sin(angle), 1e-7);
            }
        }
        for (size_t i = (size_t)n * d->x_stride; i < x.size(); i++)
            CHECK(x[i] != x[i], "embed wrote behind the last row");
        CHECK_WORST(worst, "angles of %d pairs", pairs);
        worker.backend->step_end(device, NULL);
        close_worker(&worker);
        free_model(model);
    }
}

/* Texts with blocks of their own, in random order: generated tokens, then parts of prompts. */
static void add_texts(struct test_batch *batch, struct random *random, int n_generated,
                      int n_prompts, int longest) {
    std::vector<int> slots = shuffled(random, KV_BLOCKS), text((size_t)longest + 64);
    size_t used = 0;
    for (int i = 0; i < n_generated + n_prompts; i++) {
        bool generated = i < n_generated;
        int begin = between(random, 0, longest - 1);
        int end = generated ? begin + 1 : between(random, begin + 1, longest);
        if (!generated && below(random, 2))
            begin = 0;
        if (used + (size_t)blocks_of(end) > KV_BLOCKS)
            break;
        add_text(batch, text.data(), &slots[used], begin, end, generated);
        used += (size_t)blocks_of(end);
    }
}

/* Where an element of a key (value 0) or value (1) lies: the layout of dynamo.h, spelt out. */
static size_t kv_at(const struct model_config *c, int slot, int layer, int value, int head,
                    int token, int i) {
    size_t at = (size_t)slot * c->n_layers + layer;
    at = (at * 2 + value) * c->n_kv_heads + head;
    at = at * BLOCK_TOKENS * c->head_dim; /* keys (16, dim), values (dim, 16) */
    return at + (size_t)(value ? i * BLOCK_TOKENS + token : token * c->head_dim + i);
}

static size_t kv_elements(const struct model_config *c) {
    return KV_BLOCKS * block_bytes(c, 1, KV_BF16) / sizeof(uint16_t);
}

/* A head of q or k, normed if there is a norm, and turned. */
static std::vector<double> reference_rope(const struct model_config *c, const float *frequency,
                                          const float *head, const struct tensor *norm,
                                          int position) {
    std::vector<double> in(head, head + c->head_dim);
    double squares = 0.0;
    for (double value : in)
        squares += value * value;
    for (int i = 0; i < c->head_dim && norm; i++)
        in[i] = in[i] / sqrt(squares / c->head_dim + c->norm_epsilon) * element(norm, 0, i);
    std::vector<double> out = in;
    for (int i = 0; i < c->rope_dim / 2; i++) {
        int a = c->rope_adjacent ? 2 * i : i;
        int b = c->rope_adjacent ? a + 1 : a + c->rope_dim / 2;
        double angle = position * (double)frequency[i];
        out[a] = in[a] * cos(angle) - in[b] * sin(angle);
        out[b] = in[a] * sin(angle) + in[b] * cos(angle);
    }
    return out;
}

struct rope_case {
    struct model_config config;
    float frequency[128];
    const struct tensor *q_norm, *k_norm; /* or NULL */
    struct device *device;
    struct test_batch batch;
    std::vector<float> qkv;
};

/* q as the device has it, and keys and values in their blocks, where nothing else has changed. */
static void check_rope(struct check *check, const struct rope_case &r, int layer,
                       const std::vector<uint16_t> &q, const std::vector<uint16_t> &kv) {
    const struct model_config *c = &r.config;
    int stride = cuda_of(r.device)->qkv_stride;
    std::vector<bool> written(kv.size());
    struct worst worst_q = {}, worst_kv = {};
    for (int row = 0; row < (int)r.batch.token.size(); row++) {
        const struct sequence &s = r.batch.sequence[r.batch.row_sequence[row]];
        int position = r.batch.position[row];
        int slot = r.batch.table[s.first_block + position / BLOCK_TOKENS];
        for (int head = 0; head < c->n_heads + 2 * c->n_kv_heads; head++) {
            const float *from = &r.qkv[(size_t)row * stride + (size_t)head * c->head_dim];
            int kv_head = head - c->n_heads, value = kv_head >= c->n_kv_heads;
            const struct tensor *norm = kv_head < 0 ? r.q_norm : r.k_norm;
            std::vector<double> expected(from, from + c->head_dim);
            if (!value)
                expected = reference_rope(c, r.frequency, from, norm, position);
            for (int i = 0; i < c->head_dim; i++) {
                size_t at = kv_at(c, slot, layer, value, kv_head - value * c->n_kv_heads,
                                  position % BLOCK_TOKENS, i);
                if (kv_head < 0)
                    at = ((size_t)row * c->n_heads + head) * c->head_dim + i;
                else
                    written[at] = true;
                compare(kv_head < 0 ? &worst_q : &worst_kv, row, head * c->head_dim + i,
                        from_bf16(kv_head < 0 ? q[at] : kv[at]), expected[i],
                        0x1.01p-8 * fabs(expected[i]) + 3e-6);
            }
        }
    }
    size_t strange = 0;
    while (strange < kv.size() && (written[strange] || kv[strange] == 0xffff))
        strange++;
    CHECK(strange == kv.size(), "rope_append wrote to element %zu, which has no token", strange);
    CHECK_WORST(worst_q, "q of heads of %d, %d turned", c->head_dim, c->rope_dim);
    CHECK_WORST(worst_kv, "k and v of heads of %d, %d turned", c->head_dim, c->rope_dim);
}

static void run_rope(struct check *check, struct random *random, struct rope_case *r) {
    struct device *device = r->device;
    struct cuda_device *d = cuda_of(device);
    int n = (int)r->batch.token.size(), pairs = r->config.rope_dim / 2, layer = below(random, 2);
    struct layer_weights weights = {};
    weights.attn_q_norm = upload(device, r->q_norm, SLICE_WHOLE);
    weights.attn_k_norm = upload(device, r->k_norm, SLICE_WHOLE);
    device->backend->step_begin(device, seal(&r->batch));
    std::vector<float2> turn;
    for (int row = 0; row < n; row++)
        for (int i = 0; i < pairs; i++) {
            double angle = (double)r->batch.position[row] * (double)r->frequency[i];
            turn.push_back(make_float2((float)cos(angle), (float)sin(angle)));
        }
    r->qkv.resize((size_t)n * d->qkv_stride);
    for (float &value : r->qkv)
        value = normal(random);
    poke(device, d->turn, turn);
    poke(device, d->qkv, r->qkv);
    size_t n_q = (size_t)n * r->config.n_heads * r->config.head_dim;
    std::vector<uint16_t> nans(kv_elements(&r->config), 0xffff);
    std::vector<uint16_t> both = in_orders(
        check, "rope_append",
        [&] {
            poke(device, (uint16_t *)device->kv, nans);
            poke(device, d->q, std::vector<uint16_t>(n_q, 0xffff));
            device->backend->rope_append(device, &weights, layer);
        },
        [&] {
            std::vector<uint16_t> out = peek(device, d->q, n_q);
            std::vector<uint16_t> kv = peek(device, (uint16_t *)device->kv, nans.size());
            out.insert(out.end(), kv.begin(), kv.end());
            return out;
        });
    std::vector<uint16_t> q(both.begin(), both.begin() + (ptrdiff_t)n_q);
    check_rope(check, *r, layer, q,
               std::vector<uint16_t>(both.begin() + (ptrdiff_t)n_q, both.end()));
    device->backend->step_end(device, NULL);
}

static void rope(struct check *check) {
    static const int heads[] = {8, 16, 24, 40, 64, 80, 96, 128, 136, 192, 256};
    struct random random = start("rope");
    for (int i = 0; i < (SLOWER ? 3 : 11); i++) {
        struct rope_case r = {};
        r.config = draw_config(&random, 1, 1);
        r.config.head_dim = SLOWER ? pick(&random, heads) : heads[i];
        r.config.n_heads = r.config.n_kv_heads * between(&random, 1, 5);
        r.config.rope_dim = 2 * (below(&random, 3) ? r.config.head_dim / 2
                                                   : between(&random, 1, r.config.head_dim / 2));
        r.config.norm_epsilon = below(&random, 2) ? 1e-5f : 0.1f;
        for (int j = 0; j < r.config.rope_dim / 2; j++)
            r.frequency[j] = (float)pow(10000.0, -2.0 * j / r.config.rope_dim);
        if (below(&random, 2))
            r.q_norm = make_tensor(&random, TYPE_F32, 1, r.config.head_dim, 0.2f, 1.0f);
        if (below(&random, 2))
            r.k_norm = make_tensor(&random, TYPE_F32, 1, r.config.head_dim, 0.2f, 1.0f);
        add_texts(&r.batch, &random, between(&random, 0, 9), between(&random, 1, 4), 70);
        struct device wanted = wanted_device(&r.config, r.frequency, 0, 1, 400);
        r.device = open_device(open_backend(), &wanted, KV_BLOCKS);
        struct backend *backend = r.device->backend;
        run_rope(check, &random, &r);
        close_device(r.device);
        backend->close(backend);
        free_tensor(r.q_norm);
        free_tensor(r.k_norm);
    }
}

/* ---- attention ---- */

/* Random keys and values where the batch's texts have them, and NaN everywhere else. */
static std::vector<uint16_t> random_kv(struct random *random, const struct model_config *c,
                                       const struct test_batch &batch, int layer) {
    std::vector<uint16_t> kv(kv_elements(c), 0xffff);
    for (const struct sequence &s : batch.sequence)
        for (int t = 0; t < s.start + s.n_rows; t++)
            for (int at = 0; at < 2 * c->n_kv_heads * c->head_dim; at++) {
                int value = at % 2, head = at / 2 % c->n_kv_heads, i = at / 2 / c->n_kv_heads;
                int slot = batch.table[s.first_block + t / BLOCK_TOKENS];
                kv[kv_at(c, slot, layer, value, head, t % BLOCK_TOKENS, i)] =
                    bf16_of(normal(random));
            }
    return kv;
}

/* softmax(q . k) . v for one row and head: out, and how exact it can be if weights are bf16. */
static void reference_attention(const struct model_config *c, const struct test_batch &batch,
                                int layer, int row, int head, const std::vector<uint16_t> &kv,
                                const uint16_t *q, std::vector<double> *out,
                                std::vector<double> *allowed) {
    const struct sequence &s = batch.sequence[batch.row_sequence[row]];
    int kv_head = head / (c->n_heads / c->n_kv_heads), n = batch.position[row] + 1;
    std::vector<double> weight((size_t)n), squares((size_t)c->head_dim);
    double largest = -INFINITY, sum = 0.0;
    auto at = [&](int value, int t, int i) {
        int slot = batch.table[s.first_block + t / BLOCK_TOKENS];
        return (double)from_bf16(kv[kv_at(c, slot, layer, value, kv_head, t % BLOCK_TOKENS, i)]);
    };
    for (int t = 0; t < n; t++) {
        for (int i = 0; i < c->head_dim; i++)
            weight[t] += from_bf16(q[i]) * at(0, t, i);
        weight[t] /= sqrt(c->head_dim);
        largest = std::max(largest, weight[t]);
    }
    for (double &w : weight) {
        w = exp(w - largest);
        sum += w;
    }
    out->assign((size_t)c->head_dim, 0.0);
    allowed->assign((size_t)c->head_dim, 0.0);
    for (int t = 0; t < n; t++)
        for (int i = 0; i < c->head_dim; i++) {
            double part = weight[t] / sum * at(1, t, i);
            (*out)[i] += part;
            squares[i] += part * part;
            (*allowed)[i] += 1e-4 * fabs(part);
        }
    for (int i = 0; i < c->head_dim; i++)
        (*allowed)[i] += 0x1p-8 * (3.0 * sqrt(squares[i]) + 1.01 * fabs((*out)[i]));
}

/* Attention of a batch, some rows and heads of it compared. */
static void check_attention(struct check *check, struct random *random,
                            const struct model_config *c, struct test_batch *batch) {
    struct device wanted = wanted_device(c, NULL, 0, 1, (int)batch->token.size() + 1);
    struct device *device = open_device(open_backend(), &wanted, KV_BLOCKS);
    struct backend *backend = device->backend;
    struct cuda_device *d = cuda_of(device);
    int layer = below(random, 2), n = (int)batch->token.size();
    std::vector<uint16_t> kv = random_kv(random, c, *batch, layer);
    std::vector<uint16_t> q((size_t)n * c->n_heads * c->head_dim);
    for (size_t i = 0, head = 0; head < (size_t)n * c->n_heads; head++) {
        static const float widths[] = {0.2f, 1.0f, 5.0f}; /* even and peaked weights */
        for (float width = pick(random, widths); i < (head + 1) * c->head_dim; i++)
            q[i] = bf16_of(width * normal(random));
    }
    std::vector<int> places = places_of(d->attention_places);
    std::vector<uint16_t> nans = at_places(places, d->padded_rows, d->attention_stride,
                                           [](size_t, size_t) { return (uint16_t)0xffff; });
    backend->step_begin(device, seal(batch));
    poke(device, d->q, q);
    poke(device, (uint16_t *)device->kv, kv);
    std::vector<uint16_t> got = in_orders(
        check, "attention",
        [&] {
            poke(device, d->attention, nans);
            backend->attention(device, layer);
        },
        [&] { return peek(device, d->attention, nans.size()); });
    struct worst worst = {};
    for (int i = 0; i < (SLOWER ? 40 : 150); i++) {
        std::vector<double> expected, allowed;
        int row = below(random, n), head = below(random, c->n_heads);
        reference_attention(c, *batch, layer, row, head, kv,
                            &q[((size_t)row * c->n_heads + head) * c->head_dim], &expected,
                            &allowed);
        for (int j = 0; j < c->head_dim; j++) {
            size_t at = (size_t)row * d->attention_stride + places[head * c->head_dim + j];
            compare(&worst, row, head * c->head_dim + j, from_bf16(got[at]), expected[j],
                    allowed[j]);
        }
    }
    CHECK_WORST(worst, "attention: %d rows, %d heads of %d, %d for keys", n, c->n_heads,
                c->head_dim, c->n_kv_heads);
    for (int row = 0; row < n; row++)
        for (int place : places)
            CHECK(got[(size_t)row * d->attention_stride + place] != 0xffff,
                  "attention: nothing at row %d, %d", row, place);
    CHECK(std::equal(got.begin() + (ptrdiff_t)n * d->attention_stride, got.end(),
                     nans.begin() + (ptrdiff_t)n * d->attention_stride),
          "attention wrote behind the last row");
    for (int counter : peek(device, d->arrived, (size_t)device->max_rows * d->n_heads))
        CHECK(counter == 0, "a counter of splits is %d after the step", counter);
    backend->step_end(device, NULL);
    close_device(device);
    backend->close(backend);
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
    struct random random = start("heads");
    for (int i = 0; i < (SLOWER ? 4 : 12); i++) {
        int head_dim =
            8 * between(&random, i % 3 < 2 ? i % 3 * 8 + 1 : 17, i % 3 < 2 ? i % 3 * 8 + 8 : 32);
        struct model_config c = attention_config(&random, head_dim, groups[i % 5]);
        struct test_batch batch;
        add_texts(&batch, &random, between(&random, 0, 6), between(&random, 0, 3) + (i % 2), 90);
        if (batch.token.empty())
            add_texts(&batch, &random, 1, 1, 40);
        check_attention(check, &random, &c, &batch);
    }
}

/* Texts of several splits, at and beside their ends; a prompt far into its text. */
static void attention_of_long_texts(struct check *check) {
    static const int lengths[] = {255, 256, 257, 511, 512, 513, 1023, 1024, 1025, 1279, 1500};
    struct random random = start("long texts");
    for (int i = 0; i < (SLOWER ? 1 : 4); i++) {
        struct model_config c = attention_config(&random, i % 2 ? 64 : 128, i % 2 ? 4 : 1);
        std::vector<int> slots = shuffled(&random, KV_BLOCKS), text(2000);
        int length = pick(&random, lengths), other = between(&random, 1, 600);
        struct test_batch batch;
        add_text(&batch, text.data(), &slots[0], other - 1, other, true);
        add_text(&batch, text.data(), &slots[50], length - 1, length, true);
        add_text(&batch, text.data(), &slots[146], 0, between(&random, 1, 40), false);
        check_attention(check, &random, &c, &batch);
        struct test_batch prompt;
        int begin = between(&random, 1, 700);
        add_text(&prompt, text.data(), &slots[10], begin, begin + between(&random, 1, 70), false);
        check_attention(check, &random, &c, &prompt);
    }
}

/* ---- the same bits, however the work is cut ---- */

static struct sampling warm(uint64_t seed_of_draw) {
    struct sampling sampling = {0.9f, 0.95f, 0.0f, 0, seed_of_draw};
    return sampling;
}

struct story { /* a text: [0, n_prompt) is a prompt, the rest is generated */
    std::vector<int> text;
    int n_prompt;
};

static struct story draw_story(struct random *random, int n_prompt, int n_generated, int vocab) {
    struct story story = {{}, n_prompt};
    for (int i = 0; i < n_prompt + n_generated; i++)
        story.text.push_back(below(random, vocab));
    return story;
}

/* Others that share a step: `generated` come first. Their blocks may hold anything. */
static void add_crowd(struct test_batch *batch, struct random *random, const struct story &story,
                      const std::vector<int> &slots, int n, bool generated) {
    for (int i = 0; i < n; i++) {
        int length = (int)story.text.size(), begin = below(random, length);
        int rows = generated ? 1 : between(random, 1, length - begin);
        int first = below(random, (int)slots.size() - blocks_of(length));
        add_text(batch, story.text.data(), &slots[(size_t)first], begin, begin + rows, generated);
    }
}

/* Tells a story in steps of up to `chunk` prompt tokens among up to `crowd` others. Returns the
 * logits of each step's last own row, and the tokens drawn. */
static std::vector<float> tell(struct worker *worker, struct random *random,
                               const struct story &story, int chunk, int crowd) {
    struct cuda_device *d = cuda_of(worker->shards[0]);
    int vocab = d->device.config->vocab_size, end = (int)story.text.size();
    std::vector<int> slots = shuffled(random, KV_BLOCKS);
    size_t own = (size_t)blocks_of(end); /* the first are the story's */
    std::vector<int> others(slots.begin() + (ptrdiff_t)own, slots.end());
    std::vector<float> told;
    for (int at = 0; at < end;) {
        bool generated = at >= story.n_prompt;
        int next = generated ? at + 1 : std::min(story.n_prompt, at + between(random, 1, chunk));
        int n = below(random, crowd + 1), before = below(random, n + 1);
        struct test_batch batch;
        add_crowd(&batch, random, story, others, before, true);
        if (!generated)
            add_crowd(&batch, random, story, others, (n - before) / 4, false);
        int row = (int)batch.token.size() + next - at - 1;
        add_text(&batch, story.text.data(), slots.data(), at, next, generated);
        add_crowd(&batch, random, story, others, generated ? n - before : (n - before) / 8,
                  generated);
        int sample = 0, n_rows = (int)batch.token.size();
        for (int i = 0; i < n_rows; i++)
            if (i == row || (n_rows <= LOGIT_ROWS && generated)) {
                sample = i == row ? (int)batch.sample_row.size() : sample;
                add_sample(&batch, i, warm(7));
            }
        forward(worker, seal(&batch));
        std::vector<float> logits =
            peek(&d->device, d->logits + (size_t)sample * d->logits_stride, (size_t)vocab);
        if (generated || next == story.n_prompt) {
            told.insert(told.end(), logits.begin(), logits.end());
            told.push_back((float)batch.sampled[sample]);
        }
        at = next;
    }
    return told;
}

static bool same_bits(const std::vector<float> &a, const std::vector<float> &b) {
    return a.size() == b.size() && !memcmp(a.data(), b.data(), a.size() * sizeof a[0]);
}

/* A row's bits depend on its role and its own text alone. */
static void rows_alone_and_in_crowds(struct check *check) {
    struct random random = start("crowds");
    for (int i = 0; i < (SLOWER ? 1 : 2); i++) {
        enum tensor_type type = i == 0 ? TYPE_F32 : pick(&random, all_types);
        struct model_config config = draw_config(&random, form_of(type).n_k, 1);
        struct test_model *model = make_model(&random, config, like_types(type));
        struct worker worker = open_worker(open_backend(), model, 1, 600);
        struct story story =
            draw_story(&random, between(&random, 2, SLOWER ? 20 : 40), 4, config.vocab_size);
        std::vector<float> alone = tell(&worker, &random, story, 100, 0);
        for (float value : alone)
            CHECK(value == value, "logits are numbers");
        static const int cuts[][2] = {{9, 3}, {100, 12}, {30, 80}}; /* chunk, crowd */
        for (const int *cut : cuts) {
            emu_seed(word(&random));
            std::vector<float> told = tell(&worker, &random, story, cut[0], cut[1]);
            CHECK(same_bits(told, alone), "type %d, %d tokens: chunks of %d among %d", (int)type,
                  (int)story.text.size(), cut[0], cut[1]);
        }
        close_worker(&worker);
        free_model(model);
    }
}

/* Steps with prompts of several pieces (CHAIN_ROWS) and more generated rows than shards add up at
 * once. Returns x and the logits after each. */
static std::vector<float> step_shards(struct check *check, struct random random,
                                      struct worker *worker, int n_rows) {
    struct cuda_device *d = cuda_of(worker->shards[0]);
    std::vector<int> slots = shuffled(&random, KV_BLOCKS), text((size_t)n_rows + 60);
    std::vector<float> out;
    int texts = between(&random, 30, 44), rows = n_rows - texts;
    for (int &token : text)
        token = below(&random, d->device.config->vocab_size);
    for (int step = 0; step < 2; step++) {
        struct test_batch batch;
        for (int i = 0; i < (step ? texts : 4); i++) /* of these four have a token before */
            add_text(&batch, &text[i], &slots[i], i < 4 ? step : 0, i < 4 ? step + 1 : 1, step > 0);
        int begin = step ? rows : 0, end = step ? rows + 11 : rows;
        add_text(&batch, text.data(), &slots[texts], begin, end, false);
        for (int i = 0; i < 9; i++)
            add_sample(&batch, below(&random, (int)batch.token.size()), warm(word(&random)));
        forward(worker, seal(&batch));
        size_t n = batch.token.size() * (size_t)d->x_stride;
        std::vector<float> x = peek(&d->device, d->x, n);
        std::vector<float> logits = peek(&d->device, d->logits, 9 * (size_t)d->logits_stride);
        for (int s = 1; s < worker->n_shards; s++)
            CHECK(same_bits(x, peek(worker->shards[s], cuda_of(worker->shards[s])->x, n)),
                  "step %d: x of shard %d of %d", step, s, worker->n_shards);
        out.insert(out.end(), x.begin(), x.end());
        out.insert(out.end(), logits.begin(), logits.end());
        for (int i = 0; i < 9; i++)
            out.push_back((float)batch.sampled[i]);
    }
    return out;
}

static void shards(struct check *check) {
    struct random random = start("shards");
    for (int i = 0; i < (SLOWER ? 1 : 2); i++) {
        enum tensor_type type = all_types[(int)(seed % N_TYPES + i) % N_TYPES];
        struct model_config config = draw_config(&random, form_of(type).n_k, 8);
        int step = form_of(type).n_k > 16 ? form_of(type).n_k : 16;
        config.d_ff = divide(config.d_ff, step) * step;
        config.n_layers = 1;
        struct test_model *model = make_model(&random, config, like_types(type));
        int n_rows = between(&random, CHAIN_ROWS + 50, CHAIN_ROWS + 80);
        std::vector<float> one;
        struct random same = random; /* draws for each number of shards */
        for (int n_shards = 1; n_shards <= MAX_SHARDS; n_shards *= SLOWER ? 8 : 2) {
            emu_seed(word(&random));
            struct worker worker = open_worker(open_backend(), model, n_shards, n_rows);
            std::vector<float> bits = step_shards(check, same, &worker, n_rows);
            one = n_shards == 1 ? bits : one;
            CHECK(same_bits(bits, one), "type %d, d_ff %d, %d heads of %d: %d shards", (int)type,
                  config.d_ff, config.n_heads, config.head_dim, n_shards);
            close_worker(&worker);
        }
        for (float value : one)
            CHECK(value == value, "x and logits are numbers");
        free_model(model);
    }
}

/* ---- recorded steps ---- */

/* Which elements of the keys and values a batch of generated rows writes. */
static std::vector<bool> own_elements(const struct model_config *c,
                                      const struct test_batch &batch) {
    std::vector<bool> own(kv_elements(c));
    for (const struct sequence &s : batch.sequence)
        for (int layer = 0; layer < c->n_layers; layer++)
            for (int at = 0; at < 2 * c->n_kv_heads * c->head_dim; at++)
                own[kv_at(c, batch.table[s.first_block + s.start / BLOCK_TOKENS], layer, at % 2,
                          at / 2 % c->n_kv_heads, s.start % BLOCK_TOKENS, at / 2 / c->n_kv_heads)] =
                    true;
    return own;
}

/* Generated rows of texts up to `longest`, all of them sampled: a step that is recorded. */
static void add_decode(struct test_batch *batch, struct random *random, int n, int longest,
                       int vocab) {
    std::vector<int> slots = shuffled(random, KV_BLOCKS), text((size_t)longest + 40);
    int used = 0;
    for (int i = 0; i < n; i++) {
        int length = i == 0 ? longest : between(random, 1, BLOCK_TOKENS);
        text[length - 1] = below(random, vocab);
        need(used + blocks_of(length) <= KV_BLOCKS, "blocks for all texts");
        add_text(batch, text.data(), &slots[used], length - 1, length, true);
        used += blocks_of(length);
        add_sample(batch, i, warm(word(random)));
    }
}

struct decoded {
    bool ran; /* false: replayed */
    std::vector<float> logits;
    std::vector<uint16_t> kv;
};

static struct decoded decode(struct worker *worker, struct test_batch *batch,
                             const std::vector<uint16_t> &kv) {
    struct device *device = worker->shards[0];
    struct cuda_device *d = cuda_of(device);
    poke(device, (uint16_t *)device->kv, kv);
    bool ran = forward(worker, seal(batch));
    size_t n = batch->token.size() * (size_t)d->logits_stride;
    return {ran, peek(device, d->logits, n), peek(device, (uint16_t *)device->kv, kv.size())};
}

/* Steps of other sizes and lengths on one device, each against a device that has recorded nothing.
 */
static void recorded_steps(struct check *check) {
    struct random random = start("recorded");
    struct model_config config = draw_config(&random, 1, 1);
    struct test_model *model = make_model(&random, config, like_types(TYPE_BF16));
    struct worker worker = open_worker(open_backend(), model, 1, 70);
    struct cuda_device *d = cuda_of(worker.shards[0]);
    static const int rows[] = {8, 1, 5, 24, 13, 9, 3, 8, 40, 6};
    int replays = 0, growths = 0;
    for (int i = 0; i < (SLOWER ? 5 : 10); i++) {
        struct test_batch batch;
        /* more rows, and a text of several splits, need more room: what was recorded is void */
        add_decode(&batch, &random, rows[i], i == 3 ? 1900 : between(&random, 1, 200),
                   config.vocab_size);
        std::vector<uint16_t> kv(kv_elements(&config));
        for (uint16_t &element : kv)
            element = bf16_of(normal(&random));
        emu_seed(word(&random));
        size_t step_bytes = d->step_bytes, capacity = d->split_capacity;
        struct decoded got = decode(&worker, &batch, kv);
        std::vector<int> sampled = batch.sampled;
        replays += !got.ran;
        growths += i > 0 && d->step_bytes > step_bytes && d->split_capacity > capacity;
        struct worker fresh = open_worker(open_backend(), model, 1, 70);
        struct decoded expected = decode(&fresh, &batch, kv);
        close_worker(&fresh);
        CHECK(expected.ran, "a device's first step is no replay");
        CHECK(same_bits(got.logits, expected.logits) && got.kv == expected.kv &&
                  sampled == batch.sampled,
              "step %d of %d rows, %s", i, rows[i], got.ran ? "recorded" : "replayed");
        std::vector<bool> own = own_elements(&config, batch);
        size_t strange = 0;
        while (strange < kv.size() && (own[strange] || got.kv[strange] == kv[strange]))
            strange++;
        CHECK(strange == kv.size(), "step %d of %d rows wrote to element %zu of others' blocks", i,
              rows[i], strange);
    }
    CHECK(replays >= 2 && growths >= 1, "%d replays, %d growths", replays, growths);
    close_worker(&worker);
    free_model(model);
}

/* Tokens drawn for rows [first, end) of a prompt that is only embedded, and their logits. */
static std::vector<int> draw_samples(struct worker *worker, const std::vector<int> &text,
                                     const std::vector<struct sampling> &sampling, int first,
                                     int end, std::vector<float> *logits) {
    struct device *device = worker->shards[0];
    struct test_batch batch;
    std::vector<int> slots(KV_BLOCKS);
    add_text(&batch, text.data(), slots.data(), 0, (int)text.size(), false);
    for (int i = first; i < end; i++)
        add_sample(&batch, i, sampling[i]);
    logits->resize((size_t)(end - first) * (size_t)device->config->vocab_size);
    worker->backend->step_begin(device, seal(&batch));
    worker->backend->embed(device, worker->weights[0].token_embd);
    worker->backend->norm_logits(device, &worker->weights[0]);
    worker->backend->read_logits(device, logits->data());
    worker->backend->sample(device);
    worker->backend->step_end(device, batch.batch.sampled);
    batch.sampled.pop_back();
    return batch.sampled;
}

/* More samples than logits are kept of: they are computed in pieces. */
static void many_samples(struct check *check) {
    struct random random = start("many samples");
    struct model_config config = draw_config(&random, 1, 1);
    struct test_model *model = make_model(&random, config, like_types(TYPE_BF16));
    int n = LOGIT_ROWS + between(&random, 1, LOGIT_ROWS + 20), vocab = config.vocab_size;
    struct worker worker = open_worker(open_backend(), model, 1, n);
    std::vector<int> text((size_t)n);
    std::vector<struct sampling> sampling;
    for (int &token : text) {
        token = below(&random, vocab);
        sampling.push_back(warm(word(&random)));
    }
    std::vector<float> logits, some;
    std::vector<int> sampled = draw_samples(&worker, text, sampling, 0, n, &logits);
    for (int first = 0, end; first < n; first = end) {
        end = between(&random, first + 1, std::min<int>(n, first + LOGIT_ROWS));
        std::vector<int> alone = draw_samples(&worker, text, sampling, first, end, &some);
        CHECK(!memcmp(&logits[(size_t)first * vocab], some.data(), some.size() * sizeof(float)),
              "logits of samples %d to %d of %d", first, end, n);
        CHECK(std::equal(alone.begin(), alone.end(), sampled.begin() + first),
              "samples %d to %d of %d", first, end, n);
    }
    close_worker(&worker);
    free_model(model);
}

/* ---- sampling ---- */

static float tempered(float logit, float temperature) { /* what is no number is the least one */
    float value = logit / (temperature > 0.0f ? temperature : 1.0f);
    return value >= -FLT_MAX ? std::min(value, FLT_MAX) : -FLT_MAX;
}

static double noisy(const struct sampling &sampling, int position, int token, float scaled) {
    uint32_t words[4] = {(uint32_t)position, (uint32_t)token, 0, 0};
    philox(words, (uint32_t)sampling.seed, (uint32_t)(sampling.seed >> 32));
    return scaled - log(-log(((double)words[0] + 0.5) * 0x1p-32));
}

/* Can `token` be drawn, by the definition in dynamo.h? Where rounding decides whether a token is
 * among those that reach top_p, both answers are right. `slack`: of sums of weights. */
static bool can_be_drawn(const struct sampling &sampling, int position, const float *logits, int n,
                         int token, double slack) {
    std::vector<float> scaled((size_t)n);
    std::vector<int> order((size_t)n);
    for (int i = 0; i < n; i++) {
        scaled[i] = tempered(logits[i], sampling.temperature);
        order[i] = i;
    }
    std::stable_sort(order.begin(), order.end(),
                     [&](int a, int b) { return scaled[a] > scaled[b]; });
    if (!(sampling.temperature > 0.0f))
        return token == order[0];
    int kept = sampling.top_k > 0 && sampling.top_k < n ? sampling.top_k : n;
    double max = scaled[order[0]], total = 0.0, before = 0.0;
    for (int i = 0; i < kept; i++)
        total += exp(scaled[order[i]] - max);
    double least = sampling.min_p > 0.0f ? max + log((double)sampling.min_p) : -INFINITY;
    double enough = sampling.top_p < 1.0f ? sampling.top_p * total : INFINITY;
    double best = -INFINITY; /* of those that are kept for sure */
    bool possible = false;
    int best_token = n;
    for (int i = 0; i < kept && (i == 0 || before < enough + slack * total); i++) {
        int id = order[i];
        bool sure = i == 0 || before < enough - slack * total;
        before += exp(scaled[id] - max);
        if (scaled[id] < least)
            continue;
        possible |= id == token;
        double value = noisy(sampling, position, id, scaled[id]);
        if (sure && (value > best || (value == best && id < best_token))) {
            best = value;
            best_token = id;
        }
    }
    double value = noisy(sampling, position, token, scaled[token]);
    if (value == best) /* of equals the lower id */
        return possible && token <= best_token;
    return possible && value > best - 1e-12 * fabs(best);
}

static float draw_logit(struct random *random, int kind, float width) {
    float value = width * normal(random);
    static const float odd[] = {NAN, INFINITY, -INFINITY, 3e38f, -3e38f, 1e-40f};
    if (kind == 1) /* ties are common */
        return floorf(value);
    if (kind == 2 && below(random, 4) == 0)
        return pick(random, odd);
    if (kind == 3) /* nothing else than these */
        return odd[below(random, 3)];
    return kind == 4 ? 1.0f : value;
}

static struct sampling draw_sampling(struct random *random, int n) {
    static const float temperatures[] = {0.0f, 1e-3f, 0.5f, 0.8f, 1.0f, 3.0f};
    static const float tops[] = {0.0f, 1e-6f, 0.1f, 0.5f, 0.95f, 0.999999f, 1.0f, 1.0f};
    static const float least[] = {0.0f, 0.0f, 0.05f, 1.0f};
    const int counts[] = {0, 0, 1, 2, n / 3, n - 1, n, n + 1, 1000};
    struct sampling sampling = {pick(random, temperatures), pick(random, tops), pick(random, least),
                                pick(random, counts), (uint64_t)word(random) << 32 | word(random)};
    return sampling;
}

struct draws { /* how many, and in how many the device and its twin do not agree */
    int all, different;
};

static void check_sampler(struct check *check, struct random *random, struct device *device,
                          int n_rows, struct draws *draws) {
    struct cuda_device *d = cuda_of(device);
    int n = device->config->vocab_size, kind = below(random, 7);
    std::vector<float> logits((size_t)n_rows * d->logits_stride, NAN), scaled((size_t)n);
    std::vector<int> list((size_t)n), text(1), slots(1);
    struct test_batch batch;
    for (int i = 0; i < n_rows; i++) {
        float width = (float)between(random, 1, 7);
        for (int j = 0; j < n; j++)
            logits[(size_t)i * d->logits_stride + j] = draw_logit(random, kind, width);
        add_text(&batch, text.data(), slots.data(), 0, 1, false);
        batch.position[i] = below(random, 1 << 20);
        add_sample(&batch, i, draw_sampling(random, n));
    }
    std::vector<int> sampled = in_orders(
        check, "sample",
        [&] {
            device->backend->step_begin(device, seal(&batch));
            poke(device, d->logits, logits);
            device->backend->sample(device);
            device->backend->step_end(device, batch.batch.sampled);
        },
        [&] { return batch.sampled; });
    for (int i = 0; i < n_rows; i++) {
        const struct sampling &s = batch.sampling[i];
        const float *row = &logits[(size_t)i * d->logits_stride];
        int position = batch.position[i] + 1, token = sampled[i];
        int twin = sampler_draw(&s, position, row, n, scaled.data(), list.data());
        draws->all++;
        draws->different += token != twin;
        bool right = token >= 0 && token < n && can_be_drawn(s, position, row, n, token, 1e-6) &&
                     (token == twin || can_be_drawn(s, position, row, n, twin, 1e-4));
        CHECK(right, "%d of %d, the twin %d: kind %d, t %g, p %g, min_p %g, k %d, seed %llu", token,
              n, twin, kind, (double)s.temperature, (double)s.top_p, (double)s.min_p, s.top_k,
              (unsigned long long)s.seed);
    }
}

static void sampling(struct check *check) {
    struct random random = start("sampling");
    const int sizes[] = {1, 2, 300, between(&random, 3, 1100), 33000};
    struct draws draws = {};
    for (int n : sizes) {
        struct model_config config = draw_config(&random, 1, 1);
        config.rope_dim = 0;
        config.vocab_size = n;
        struct device wanted = wanted_device(&config, NULL, 0, 1, LOGIT_ROWS);
        struct device *device = open_device(open_backend(), &wanted, 1);
        struct backend *backend = device->backend;
        for (int i = 0; i < (SLOWER ? 1 : n > 2000 ? 2 : 7); i++)
            check_sampler(check, &random, device, n > 2000 ? 4 : LOGIT_ROWS, &draws);
        close_device(device);
        backend->close(backend);
    }
    CHECK(draws.different * 200 <= draws.all, "%d of %d draws are not the twin's", draws.different,
          draws.all);
}

/* ---- copies ---- */

struct place {             /* `bytes` of memory that a copy can have to do with */
    struct device *device; /* NULL: pinned host memory */
    uint8_t *memory;
};

static void wait_for(struct device *device, enum stream stream, uint64_t ticket) {
    while (!device->backend->copy_done(device, stream, ticket))
        continue;
}

/* Pieces of 40 bytes, a random part of each copied, two places further along a chain of places: the
 * next copy of a piece is ordered when the one before is reported, on the device that fetches. */
static void check_copies(struct check *check, struct random *random, struct device **devices,
                         const struct place *chain, int n_places) {
    enum { PIECE = 40, PIECES_COPIED = RING + 300 };
    struct backend *backend = devices[0]->backend;
    std::vector<uint8_t> from(PIECE * PIECES_COPIED), to(from.size());
    for (uint8_t &byte : from)
        byte = (uint8_t)word(random);
    memcpy(chain[0].memory, from.data(), from.size());
    enum stream stream = (enum stream)between(random, STREAM_PAGE_OUT, STREAM_TRANSFER);
    bool late = false;
    for (int i = 1; i < n_places; i++) {
        struct device *by = chain[i].device ? chain[i].device : chain[i - 1].device;
        std::vector<uint64_t> tickets;
        for (int piece : shuffled(random, PIECES_COPIED)) {
            struct copy2d copy = {chain[i].memory + piece * PIECE,
                                  chain[i - 1].memory + piece * PIECE,
                                  PIECE,
                                  PIECE,
                                  PIECE,
                                  1};
            if (piece % 3 == 0) /* four rows of ten bytes */
                copy = {copy.to, copy.from, 10, 10, 10, 4};
            tickets.push_back(backend->copy(by, stream, &copy));
            CHECK(tickets.size() == 1 || tickets.back() == tickets[tickets.size() - 2] + 1,
                  "ticket %llu", (unsigned long long)tickets.back());
        }
        late |= !backend->copy_done(by, stream, tickets.back());
        wait_for(by, stream, tickets[tickets.size() / 2]);
        CHECK(backend->copy_done(by, stream, tickets[0]), "copies end in their order");
        wait_for(by, stream, tickets.back());
    }
    memcpy(to.data(), chain[n_places - 1].memory, to.size());
    CHECK(from == to, "bytes went through %d places", n_places);
#ifdef CUDA_EMULATED
    CHECK(late, "a copy is not done as soon as it is ordered");
#else
    (void)late;
#endif
}

/* Runs of bytes with a pitch, to the device and back: nothing beside them is touched. */
static void check_pitches(struct check *check, struct random *random, struct device *device,
                          uint8_t *host, uint8_t *on_device) {
    struct backend *backend = device->backend;
    size_t width = (size_t)between(random, 1, 60), height = (size_t)between(random, 1, 30);
    size_t pitch = width + (size_t)below(random, 20), other = width + (size_t)below(random, 20);
    for (size_t i = 0; i < 8000; i++)
        host[i] = (uint8_t)word(random);
    std::vector<uint8_t> before(host, host + 8000);
    struct copy2d up = {on_device, host, other, pitch, width, height};
    struct copy2d down = {host + 4000, on_device, pitch, other, width, height};
    wait_for(device, STREAM_PAGE_IN, backend->copy(device, STREAM_PAGE_IN, &up));
    wait_for(device, STREAM_PAGE_OUT, backend->copy(device, STREAM_PAGE_OUT, &down));
    bool right = true;
    for (size_t i = 0; i < 8000; i++) {
        size_t at = i - 4000;
        bool copied = i >= 4000 && at / pitch < height && at % pitch < width;
        right &= host[i] == before[copied ? at : i];
    }
    CHECK(right, "%zu runs of %zu bytes, %zu and %zu apart", height, width, pitch, other);
}

static void copies(struct check *check) {
    struct random random = start("copies");
    struct model_config config = draw_config(&random, 1, 1);
    config.rope_dim = 0;
    struct backend *backend = open_backend();
    struct device *devices[2];
    uint8_t *memory[4];
    size_t bytes = 64 * 2048;
    for (int i = 0; i < 2; i++) {
        struct device wanted = wanted_device(&config, NULL, 0, 1, 1);
        wanted.index = i % backend->n_gpus;
        devices[i] = open_device(backend, &wanted, 1);
        memory[i] = (uint8_t *)backend->alloc(devices[i], bytes, false);
        memory[2 + i] = (uint8_t *)backend->alloc(devices[i], bytes, true);
        need(memory[i] && memory[2 + i], "memory for copies");
    }
    const struct place chain[] = {
        {NULL, memory[2]}, {devices[0], memory[0]}, {devices[1], memory[1]}, {NULL, memory[3]}};
    check_copies(check, &random, devices, chain, 4);
    for (int i = 0; i < 20; i++)
        check_pitches(check, &random, devices[i % 2], memory[2 + i % 2], memory[i % 2]);
    for (int pinned = 0; pinned < 2; pinned++) {
        CHECK(!backend->alloc(devices[0], (size_t)1 << 60, pinned), "more than there is");
        CHECK(backend->free_memory(devices[0], pinned) > bytes, "some memory is free");
    }
    CHECK(cudaGetLastError() == cudaSuccess, "no room is no fault");
    for (int i = 0; i < 2; i++) {
        backend->release(devices[i], memory[i], false);
        backend->release(devices[i], memory[2 + i], true);
        close_device(devices[i]);
    }
    backend->close(backend);
}

/* ---- refusals: one line that says what to do ---- */

/* The message with which a device is refused. */
static const char *refusal(struct check *check, struct backend *backend,
                           const struct device *wanted) {
    static char error[GGUF_ERROR_LENGTH];
    error[0] = 0;
    struct device *device = backend->device_open(backend, wanted, error);
    CHECK(!device, "a device that should be refused");
    CHECK(error[0] && !strchr(error, '\n'), "one line: %s", error);
    if (device)
        backend->device_close(device);
    return error;
}

#define CHECK_REFUSAL(words, wanted)                                                               \
    do {                                                                                           \
        const char *message = refusal(check, backend, wanted);                                     \
        CHECK(strstr(message, words), "%s", message);                                              \
    } while (0)

static void refused_devices(struct check *check) {
    struct random random = start("refused");
    struct model_config config = draw_config(&random, 1, 8);
    config.rope_dim = 0;
    struct backend *backend = open_backend();
    const struct device good = wanted_device(&config, NULL, 0, 1, 4);
    struct device wanted = good;
    wanted.index = backend->n_gpus;
    CHECK_REFUSAL("there are", &wanted);
    wanted.index = -1;
    CHECK_REFUSAL("got device -1", &wanted);
    wanted = good;
    wanted.kv_type = KV_F32;
    CHECK_REFUSAL("--kv-type", &wanted);
    for (int n_shards = 0; n_shards <= 16; n_shards++) {
        struct model_config odd = config;
        odd.n_heads = odd.n_kv_heads = n_shards == 4 ? 18 : 3 * 5 * 7 * 16; /* 4: not of these */
        odd.head_dim = 8;
        odd.d_ff = n_shards == 8 ? 8 : 3 * 5 * 7 * 32; /* 8: one row each is not enough */
        wanted = wanted_device(&odd, NULL, 0, n_shards, 4);
        if (n_shards != 1 && n_shards != 2)
            CHECK_REFUSAL("--tp", &wanted);
    }
    wanted = good;
    static const int dims[] = {4, 20, 250, 257, 264, 512};
    for (int dim : dims) {
        config.head_dim = dim;
        CHECK_REFUSAL("multiples of 8 up to 256", &wanted);
    }
    config.head_dim = 8;
    pretended.major = 7;
    CHECK_REFUSAL("expected 8.0 or newer", &wanted);
    pretended.major = 0;
    close_device(open_device(backend, &wanted, 1)); /* nothing of that is left */
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
        char error[GGUF_ERROR_LENGTH] = "";
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

#ifdef CUDA_EMULATED
/* ---- what only an emulated machine can be made to do ---- */

enum { GPUS = 4, MEMORY = 256 << 20, PROCESSORS = 4 };

static size_t free_bytes() {
    size_t available = 0, total = 0;
    need_success(cudaSetDevice(0), "cudaSetDevice");
    need_success(cudaMemGetInfo(&available, &total), "cudaMemGetInfo");
    return available;
}

/* Opens a worker of one shard as engine.h does, until something fails: false, and why. */
static bool try_worker(struct backend *backend, const struct test_model *model, char *error) {
    struct device wanted = wanted_device(&model->config, model->frequency, 0, 1, 40);
    struct device *device = backend->device_open(backend, &wanted, error);
    if (!device)
        return false;
    bool ok = true;
    for (const struct tensor *tensor : model->tensors) {
        struct slice slice = {SLICE_WHOLE, 0, 1};
        ok = ok && backend->upload(device, tensor, slice, error);
    }
    void *kv = ok ? backend->alloc(device, 1000, false) : NULL;
    void *host = ok ? backend->alloc(device, 1000, true) : NULL;
    if (ok && !(kv && host))
        snprintf(error, GGUF_ERROR_LENGTH, "no room for blocks");
    ok = ok && kv && host;
    backend->release(device, kv, false);
    backend->release(device, host, true);
    backend->device_close(device);
    return ok;
}

/* Every allocation of a worker fails once: there is a message each time, and nothing is left. */
static void memory_that_is_missing(struct check *check) {
    struct random random = start("memory");
    struct test_model *model =
        make_model(&random, draw_config(&random, 32, 1), like_types(TYPE_Q8_0));
    static const char *const calls[] = {"cudaMalloc", "cudaHostAlloc"};
    size_t before = free_bytes();
    for (const char *call : calls) {
        bool ok = false;
        int after = 0;
        for (; !ok && after < 200; after++) {
            char error[GGUF_ERROR_LENGTH] = "";
            struct backend *backend = open_backend();
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
    char error[GGUF_ERROR_LENGTH] = "";
    emu_devices(1, 20 << 20, PROCESSORS);
    struct model_config config = draw_config(&random, 1, 1);
    config.rope_dim = 0;
    struct backend *backend = open_backend();
    struct device wanted = wanted_device(&config, NULL, 0, 1, 4);
    struct device *device = open_device(backend, &wanted, 1);
    struct tensor *small = make_tensor(&random, TYPE_BF16, 100, 100, 1.0f, 0.0f);
    struct tensor *large = make_tensor(&random, TYPE_BF16, 1200, 10000, 1.0f, 0.0f);
    struct slice whole = {SLICE_WHOLE, 0, 1};
    CHECK(!backend->upload(device, large, whole, error), "24 MB of 20");
    int left = 0, total = 0, needed = 0;
    CHECK(sscanf(error, "t: device 0 (%*[^)]) has %d MB left of %d and needs %d for this tensor",
                 &left, &total, &needed) == 3,
          "%s", error);
    CHECK(left > 10 && left < 20 && total == 20 && needed == 23 && strstr(error, "smaller type"),
          "%s", error);
    CHECK(backend->upload(device, small, whole, error), "%s", error);
    wanted.max_rows = 1000000;
    CHECK_REFUSAL("lower --chunk or --max-batch", &wanted);
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
    tell(worker, random, story, 10, 0);
    uint8_t *host = (uint8_t *)worker->backend->alloc(device, 1000, true);
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
    struct test_model *model =
        make_model(&random, draw_config(&random, 1, 2), like_types(TYPE_BF16));
    for (const auto &fault : cases) {
        char text[2000], where[100] = "", call[100] = "", why[100] = "", doing[100] = "";
        struct worker worker = open_worker(open_backend(tell_of_loss), model, fault.n_shards, 60);
        int line = 0, device = -1;
        int status = in_child(
            [&] {
                emu_fail(fault.call, 0);
                work(&worker, &random);
            },
            text, sizeof text);
        int found =
            sscanf(text, "dynamo: %99[^:]:%d: device %d (%*[^)]): %99[^:]: %99[^,], while %99[^\n]",
                   where, &line, &device, call, why, doing);
        CHECK(status == 128 + SIGABRT && found == 6, "%s: status %d: %s", fault.call, status, text);
        bool launches = !strcmp(fault.call, "cudaLaunchKernelEx");
        CHECK(strstr(where, ".cu") && line > 0 && device >= 0 && device < fault.n_shards &&
                  !strcmp(call, launches ? "embed_kernel" : fault.call) &&
                  !strcmp(doing, fault.doing),
              "%s", text);
        const char *rest = strchr(text, '\n');
        CHECK(rest && !strcmp(rest, "\nthe requests are lost\n"), "%s", text);
        close_worker(&worker);
    }
    free_model(model);
}
#endif

int main(int argc, char **argv) {
    static const struct test tests[] = {
        {"packing", packing},
        {"periodic_tensors", periodic_tensors},
        {"products_f32", products_f32},
        {"products_f16", products_f16},
        {"products_bf16", products_bf16},
        {"products_q8_0", products_q8_0},
        {"products_q4_0", products_q4_0},
        {"products_q4_k", products_q4_k},
        {"products_q6_k", products_q6_k},
        {"products_of_mixed_types", products_of_mixed_types},
        {"products_of_many_rows", products_of_many_rows},
        {"embedding", embedding},
        {"rope", rope},
        {"attention_of_all_heads", attention_of_all_heads},
        {"attention_of_long_texts", attention_of_long_texts},
        {"rows_alone_and_in_crowds", rows_alone_and_in_crowds},
        {"shards", shards},
        {"recorded_steps", recorded_steps},
        {"many_samples", many_samples},
        {"sampling", sampling},
        {"copies", copies},
        {"refused_devices", refused_devices},
        {"no_gpu", no_gpu},
#ifdef CUDA_EMULATED
        {"memory_that_is_missing", memory_that_is_missing},
        {"models_that_do_not_fit", models_that_do_not_fit},
        {"faults", faults},
#endif
    };
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    seed = argc > 2 ? strtoull(argv[2], NULL, 10)
                    : ((uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000) % 1000000000;
    char error[GGUF_ERROR_LENGTH] = "";
    struct backend_options options = {};
    struct backend *backend = cuda_backend_open(&options, error);
    if (!backend) {
        printf("test_cuda: %s\n", error);
        return 1;
    }
    backend->close(backend);
    printf("  seed %llu\n", (unsigned long long)seed);
    return check_run(tests, sizeof tests / sizeof *tests, argc, argv);
}
