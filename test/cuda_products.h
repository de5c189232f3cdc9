/* cuda_products.h: how the CUDA backend packs matrices, and its products and norms. Part of
 * test_cuda.cu.
 *
 * A packed matrix is compared with the file's elements, one by one. Products are compared with
 * float64 sums of what the device multiplies: the packed matrix, and the bf16 input that it reads.
 */
#ifndef CUDA_PRODUCTS_H
#define CUDA_PRODUCTS_H
#include "cuda_worker.h"

/* ---- packing ---- */

/* What a matrix holds of an element, and how exactly. */
static double packed_element(const struct tensor *tensor, int row, int k, double *allowed) {
    double value = element(tensor, row, k);
    const uint8_t *block = block_of(tensor, row, k);
    *allowed = 0.0;
    if (tensor->type == TYPE_F32 || tensor->type == TYPE_F16)
        value = rounded(value);
    else if (tensor->type == TYPE_Q4_K) /* computed in f32, and rounded */
        *allowed = 0x1.01p-8 * fabs(value) +
                   0x1p-22 * 1000 * (fabs(from_f16(block)) + fabs(from_f16(block + 2)));
    else if (tensor->type == TYPE_Q6_K)
        *allowed = 0x1.01p-8 * fabs(value);
    return value;
}

/* Segments as kernels.cu tells: eight shares of K, cut between multiples of `grain`; each begins
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
    char error[ERROR_LENGTH] = "";
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
        char error[ERROR_LENGTH] = "";
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
    int width, n_outputs; /* width: its places */
    std::vector<float> w;
};

static struct dense dense_of(struct device *device, const struct matrix &m) {
    struct dense dense = {m.n_units * UNIT, m.n_outputs, elements(device, m)};
    for (float &w : dense.w)
        w = has_scales(m.type) ? from_bf16(bf16_of(w)) : w;
    return dense;
}

struct sum {
    double value, size; /* size: the sum of the magnitudes */
};

/* Row `row` of an input times an output. */
static struct sum multiply(const struct dense &m, const std::vector<uint16_t> &input, int stride,
                           int row, int output) {
    struct sum sum = {};
    const float *w = &m.w[(size_t)output * m.width];
    for (int i = 0; i < m.width; i++) {
        size_t at = (size_t)row * stride + i;
        double product = (double)w[i] * from_bf16(input[at]);
        sum.size += fabs(product);
        sum.value += product;
    }
    return sum;
}

static double allowed_of(struct sum sum, double added) { /* of an f32 accumulation */
    return 1e-5 * (sum.size + fabs(added)) + 1e-30;
}

/* The inputs of a step's products, as the device has them. */
struct inputs {
    std::vector<uint16_t> rows;
    int stride;
};

static struct inputs normed_inputs(struct device *device) {
    struct cuda_device *d = cuda_of(device);
    size_t n = d->padded_rows * (size_t)d->h_stride;
    return {peek(device, d->h, n), d->h_stride};
}

/* h of `rows` (indices of x) against rmsnorm(x) * weight. */
static void check_norm(struct check *check, struct device *device, const struct tensor *weight,
                       const std::vector<float> &x, const std::vector<int> &rows) {
    const struct model_config *c = device->config;
    int x_stride = cuda_of(device)->x_stride;
    struct inputs h = normed_inputs(device);
    struct worst worst = {};
    for (size_t row = 0; row < rows.size(); row++) {
        const float *from = &x[(size_t)rows[row] * x_stride];
        double squares = 0.0;
        for (int i = 0; i < c->d_model; i++)
            squares += (double)from[i] * from[i];
        double scale = 1.0 / sqrt(squares / c->d_model + c->norm_epsilon);
        for (int i = 0; i < c->d_model; i++) {
            double expected = from[i] * scale * element(weight, 0, i);
            size_t at = row * h.stride + i;
            compare(&worst, (int)row, i, from_bf16(h.rows[at]), expected,
                    0x1.01p-8 * (fabs(expected) + 1e-30));
        }
    }
    CHECK_WORST(worst, "norm of %d rows of %d", (int)rows.size(), c->d_model);
}

static void poison_h(struct device *device) {
    struct cuda_device *d = cuda_of(device);
    poison(device, d->h, d->padded_rows, d->h_stride, device->config->d_model);
}

struct part { /* one matrix of a product, and where its outputs begin in a row */
    const struct weight *weight, *bias;
    int first;
};

/* Outputs (rows, stride) against the product, plus bias, plus what was there before: NaN where an
 * op only writes. What lies behind a row's last output is as before. */
static void check_outputs(struct check *check, const char *what, struct device *device,
                          std::vector<struct part> parts, struct inputs inputs, int n_rows,
                          const std::vector<float> &got, int stride,
                          const std::vector<float> &before) {
    struct worst worst = {};
    bool adds = before[0] == before[0];
    for (const struct part &part : parts) {
        struct dense m = dense_of(device, part.weight->matrix);
        std::vector<float> bias((size_t)m.n_outputs);
        if (part.bias)
            bias = peek(device, (const float *)part.bias->vector, bias.size());
        for (int row = 0; row < n_rows; row++) {
            for (int i = 0; i < m.n_outputs; i++) {
                struct sum sum = multiply(m, inputs.rows, inputs.stride, row, i);
                size_t at = (size_t)row * stride + part.first + i;
                double added = bias[i] + (adds ? (double)before[at] : 0.0);
                compare(&worst, row, part.first + i, got[at], sum.value + added,
                        allowed_of(sum, added));
            }
        }
    }
    CHECK_WORST(worst, "%s: type %d, %d rows of %d", what, parts[0].weight->matrix.type, n_rows,
                inputs.stride);
    size_t width = (size_t)parts.back().first + parts.back().weight->matrix.n_outputs, at = 0;
    while (at < got.size() && ((at / stride < (size_t)n_rows && at % stride < width) ||
                               !memcmp(&got[at], &before[at], sizeof got[at])))
        at++;
    CHECK(at == got.size(), "%s wrote to row %zu, column %zu, which is none", what, at / stride,
          at % stride);
}

static void check_norm_qkv(struct check *check, struct worker *worker,
                           const struct test_model *model, const std::vector<float> &x) {
    struct device *device = worker->shards[0];
    struct cuda_device *d = cuda_of(device);
    const struct weight *const *l = worker->layers[0][0];
    size_t n = (size_t)device->max_rows * d->qkv_stride;
    const std::vector<float> nans(n, NAN);
    std::vector<float> qkv = in_orders(
        check, "norm_qkv",
        [&] {
            poison_h(device);
            poke(device, d->qkv, nans);
            worker->backend->norm_qkv(device, l);
        },
        [&] { return peek(device, d->qkv, n); });
    std::vector<int> rows;
    for (int row = 0; row < d->n_rows; row++)
        rows.push_back(row);
    check_norm(check, device, model->layers[0][ATTN_NORM], x, rows);
    int q = l[ATTN_Q]->matrix.n_outputs, kv = l[ATTN_K]->matrix.n_outputs;
    check_outputs(
        check, "norm_qkv", device,
        {{l[ATTN_Q], l[Q_BIAS], 0}, {l[ATTN_K], l[K_BIAS], q}, {l[ATTN_V], l[V_BIAS], q + kv}},
        normed_inputs(device), d->n_rows, qkv, d->qkv_stride, nans);
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
                  {values, stride}, d->n_rows, x, d->x_stride, before);
}

static void check_gate_up(struct check *check, struct worker *worker,
                          const struct test_model *model, const std::vector<float> &x) {
    struct device *device = worker->shards[0];
    struct cuda_device *d = cuda_of(device);
    const struct weight *const *l = worker->layers[0][0];
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
    check_norm(check, device, model->layers[0][FFN_NORM], x, rows);
    struct inputs h = normed_inputs(device);
    struct dense gate = dense_of(device, l[FFN_GATE]->matrix);
    struct dense up = dense_of(device, l[FFN_UP]->matrix);
    struct worst worst = {};
    for (int row = 0; row < d->n_rows; row++) {
        std::vector<double> expected((size_t)d->ffn_stride), allowed((size_t)d->ffn_stride);
        for (int i = 0; i < gate.n_outputs; i++) {
            struct sum g = multiply(gate, h.rows, h.stride, row, i);
            struct sum u = multiply(up, h.rows, h.stride, row, i);
            double silu = g.value / (1.0 + exp(-g.value));
            expected[places[i]] = silu * u.value;
            allowed[places[i]] = 1.1 * allowed_of(g, 0.0) * fabs(u.value) +
                                 fabs(silu) * allowed_of(u, 0.0) + 0x1.02p-8 * fabs(silu * u.value);
        }
        for (int i = 0; i < d->ffn_stride; i++)
            compare(&worst, row, i, from_bf16(ffn[(size_t)row * d->ffn_stride + i]), expected[i],
                    allowed[i]);
    }
    CHECK_WORST(worst, "norm_gate_up: type %d, %d rows, %d of %d", l[FFN_GATE]->matrix.type,
                d->n_rows, d->d_ff, device->config->d_model);
}

static void check_logits(struct check *check, struct worker *worker, const struct test_model *model,
                         const std::vector<float> &x, const std::vector<int> &rows) {
    struct device *device = worker->shards[0];
    struct cuda_device *d = cuda_of(device);
    size_t n = rows.size() * (size_t)d->logits_stride;
    const std::vector<float> nans(n, NAN);
    if (rows.empty())
        return;
    std::vector<float> logits = in_orders(
        check, "sample",
        [&] {
            poison_h(device);
            poke(device, d->logits, nans);
            worker->backend->sample(device, worker->layers[0][0], NULL);
        },
        [&] { return peek(device, d->logits, n); });
    check_norm(check, device, model->output_norm, x, rows);
    check_outputs(check, "logits", device, {{worker->layers[0][0][OUTPUT], NULL, 0}},
                  normed_inputs(device), (int)rows.size(), logits, d->logits_stride, nans);
    size_t width = (size_t)model->config.vocab_size;
    std::vector<float> host(rows.size() * width, NAN);
    worker->backend->sample(device, worker->layers[0][0], host.data());
    need_success(cudaStreamSynchronize(d->streams[STREAM_COMPUTE]), "cudaStreamSynchronize");
    for (size_t i = 0; i < rows.size(); i++)
        CHECK(!memcmp(&host[i * width], &logits[i * d->logits_stride], width * sizeof(float)),
              "logits on the host: row %zu", i);
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
            x[(size_t)row * d->x_stride + i] = row < n_rows && i < model->config.d_model
                                                   ? normal(random) * (float)(1 << row % 5)
                                                   : NAN;
    poke(device, d->x, x);
    check_norm_qkv(check, &worker, model, x);
    check_gate_up(check, &worker, model, x);
    check_logits(check, &worker, model, x, rows);
    check_project(check, &worker, worker.layers[0][0][ATTN_OUTPUT], INPUT_ATTENTION, random);
    check_project(check, &worker, worker.layers[0][0][FFN_DOWN], INPUT_FFN, random);
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
    check_project(check, &worker, worker.layers[0][0][FFN_DOWN], INPUT_FFN, &random);
    worker.backend->step_end(worker.shards[0], NULL);
    close_worker(&worker);
    free_model(model);
}
#endif /* CUDA_PRODUCTS_H */
