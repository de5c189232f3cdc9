/* test_kernels.c: the CPU backend. How ops.h reaches into it, and what it alone has: fast paths for
 * rounded rows, a pool of threads that many workers share.
 *
 * Tests of ops.h take the variants in turn: both kinds of kernels (`plain`, and what this processor
 * can do), keys and values in f32 and in bf16. Read next: ops.h. */
#define _GNU_SOURCE
#include "amx_twin.h"

#include "../kernels.c"

#include "check.h"

enum {
    ORDERS = 1,   /* threads take tiles in another order in any case */
    VARIANTS = 6, /* 1: bf16 keys and values; 2: plain; 4: no matrix unit */
    LOGITS_KEPT = 64,
    MXFP4 = 1,
    DRAWS = 8,
    TEXT_DRAWS = SANITIZED ? 9 : 48, /* every type, in every variant */
    CROWD_SHARDS = 4,
    SHARD_ROWS = 250,
    MOST_ROWS = 700,
    COPIES = 300,
    COPIES_LATE = 1,
    PARTS_SHARED = 0
};
#define SAMPLER_SLACK 1e-4 /* its weights and their sums are f32 */
#include "ops.h"

/* ---- how ops.h reaches into the backend ---- */

static struct backend *open_backend(int variant, uint64_t order) {
    char error[ERROR_LENGTH] = "";
    struct backend_options options = {
        .n_threads = 1 + (int)(order % 4), .copy_delay_seed = order, .plain = variant & 2};
    struct backend *backend = cpu_backend_open(&options, error);
    need(backend, error);
    if (variant & 4)
        ((struct cpu_backend *)backend)->amx = false;
    else
        ((struct cpu_backend *)backend)->amx |= twin_on && !options.plain;
    return backend;
}

static enum kv_type kv_type_of(int variant) {
    return variant & 1 ? KV_BF16 : KV_F32;
}

static void set_order(uint64_t order) {
    (void)order;
}

static struct cpu_device *cpu_of(struct device *device) {
    return (struct cpu_device *)device;
}

/* Where rows of an activation lie. */
static struct plane plane_of(struct device *device, enum activation a) {
    const struct cpu_device *d = cpu_of(device);
    const struct plane planes[N_ACTIVATIONS] = {[A_X] = d->x,          [A_H] = d->h,
                                                [A_RAW_Q] = d->q,      [A_RAW_K] = d->k,
                                                [A_RAW_V] = d->v,      [A_Q] = d->q,
                                                [A_FFN] = d->ffn,      [A_ATTENTION] = d->attention,
                                                [A_TURN] = d->turn[0], [A_LOGITS] = d->logits};
    return planes[a];
}

static void poke(struct device *device, enum activation a, const float *values, int n_rows) {
    size_t width = (size_t)width_of(device, a);
    for (int row = 0; row < rows_of(device, a); row++)
        for (size_t i = 0; i < width; i++)
            row_of(plane_of(device, a), row)[i] =
                row < n_rows ? values[(size_t)row * width + i] : NAN;
}

/* An element's cosine stands at its own place of a row of angles, its sine rope_dim behind that. */
static void peek(struct check *check, struct device *device, enum activation a, float *values,
                 int n_rows) {
    const struct model_config *config = device->config;
    struct plane plane = plane_of(device, a);
    size_t width = (size_t)width_of(device, a), strange = 0;
    for (int row = 0; row < n_rows; row++, values += width) {
        const float *from = row_of(plane, row);
        for (size_t i = width; i < plane.stride && a != A_TURN; i++)
            strange += from[i] != 0.0f;
        memcpy(values, from, width * sizeof *values);
        for (int i = 0; i < config->rope_dim / 2 && a == A_TURN; i++) {
            int first = config->rope_adjacent ? 2 * i : i;
            int second = first + (config->rope_adjacent ? 1 : config->rope_dim / 2);
            values[2 * i] = from[first];
            values[2 * i + 1] = from[config->rope_dim + second];
            CHECK(from[second] == from[first] &&
                      from[config->rope_dim + first] == -values[2 * i + 1],
                  "both elements of pair %d turn by one angle", i);
        }
    }
    CHECK(strange == 0, "%zu elements that pad rows of activation %d are not 0", strange, (int)a);
}

/* Element i of a block as floats: keys lie (dim, 16), values (16, dim). */
static void copy_kv(struct device *device, int slot, float *out, const float *in) {
    size_t dim = (size_t)device->config->head_dim, plane = BLOCK_TOKENS * dim;
    size_t n = block_elements(device), heads = (size_t)cpu_of(device)->n_kv_heads;
    size_t padded = (size_t)(BLOCK_TOKENS * kv_head_dim(device->config, device->kv_type));
    float *as_f32 = (float *)device->kv + (size_t)slot * n;
    uint16_t *as_bf16 = (uint16_t *)device->kv + (size_t)slot * n / plane * padded;
    for (size_t i = 0; i < n; i++) {
        bool value = i / plane / heads % 2;
        size_t token = i % plane / dim, at = i / plane * padded;
        at += value ? i % plane : i % dim * BLOCK_TOKENS + token;
        if (device->kv_type == KV_F32 && in)
            as_f32[at] = in[i];
        else if (in)
            as_bf16[at] = in[i] == in[i] ? bf16_of(in[i]) : 0xffff;
        if (out)
            out[i] = device->kv_type == KV_F32 ? as_f32[at]
                                               : (float)ref_f32((const uint8_t *)&as_bf16[at], 16);
    }
}

static void poke_block(struct device *device, int slot, const float *values) {
    copy_kv(device, slot, NULL, values);
}

static void scale_normed(struct device *device, float *values) { /* they are scaled */
    (void)device, (void)values;
}

static void peek_block(struct device *device, int slot, float *values) {
    copy_kv(device, slot, values, NULL);
}

static void poison_kv(struct device *device, size_t bytes) {
    memset(device->kv, 0xff, bytes);
}

static void read_weight(struct check *check, struct device *device, const struct weight *weight,
                        float *values) {
    (void)device;
    CHECK(weight->first_row + weight->n_rows <= weight->tensor->rows &&
              weight->first_col + weight->n_cols <= weight->cols,
          "a part of a matrix lies within it");
    float *row = floats((size_t)weight->cols);
    for (int i = 0; i < weight->n_rows; i++, values += weight->n_cols) {
        pack_read_row(weight, weight->first_row + i, row);
        memcpy(values, row + weight->first_col, (size_t)weight->n_cols * sizeof *values);
    }
    free(row);
}

/* Every type is exact in f32. */
static double kept_element(enum tensor_type type, double value, double largest, double *allowed) {
    (void)type;
    (void)largest;
    *allowed = 0.0;
    return value;
}

static double multiplied(enum tensor_type type, double kept) {
    (void)type;
    return kept;
}

/* Fast paths round the rows that they multiply: to bf16, or to bytes with a scale for 32. */
static struct slack product_slack(const struct device *device, enum tensor_type type) {
    enum row_form form = dot_form(type, ((const struct cpu_device *)device)->cpu->plain);
    return (struct slack){3e-6, form == FORM_F32 ? 0.0 : form == FORM_BF16 ? 1e-2 : 6e-2};
}

static struct slack attention_slack(const struct device *device) {
    (void)device;
    return (struct slack){1e-5, 0.0};
}

static double activation_error(enum activation a) {
    (void)a;
    return 3e-6;
}

static double kv_error(const struct device *device) {
    return device->kv_type == KV_BF16 ? 0x1.01p-8 : 3e-6;
}

static double model_error(const struct device *device, enum tensor_type type) {
    double spread = product_slack(device, type).spread;
    return spread > 2e-2 ? spread : spread > 0.0 || device->kv_type == KV_BF16 ? 2e-2 : 1e-4;
}

static void read_choice(struct device *device, int *chosen, int n_rows) {
    memcpy(chosen, ((struct cpu_device *)device)->chosen,
           sizeof *chosen * (size_t)(n_rows * device->config->n_used));
}

static void draw_rows(struct device *device, int n) {
    draw_tokens((struct cpu_device *)device, 0, n);
}

static void check_idle(struct check *check, struct device *device) {
    (void)check;
    (void)device;
}

/* ---- fast paths: exactly the products of what the rows are rounded to ---- */

static double converted(enum row_form form, const char *row, int begin, int k) {
    if (form == FORM_BF16)
        return ref_f32((const uint8_t *)row + (k - begin) * 2, 16);
    const struct q8_block *block = (const struct q8_block *)(const void *)row;
    block += k / Q8_BLOCK - begin / Q8_BLOCK;
    return (double)block->scale * block->q[k % Q8_BLOCK];
}

enum { DOT_ROWS = 70, DOT_COLS = 1280, DOT_STRIDE = 2 * DOT_COLS + 64 };

/* A product with AVX-512; of bf16 with the matrix unit (or its twin, where there is none) too, and
 * with the twin, which has the bits of the unit. A row alone has those that it has among others. */
static void check_dot(struct check *check, struct random *random, const struct weight *weight,
                      int n_rows) {
    static float out[3][DOT_ROWS * PANEL];
    static alignas(64) char rows[DOT_ROWS * DOT_STRIDE];
    enum row_form form = dot_form(weight->type, false);
    int cols = weight->cols, begin = below(random, cols / 2 - 40) * 2;
    int end = begin + 2 + below(random, (cols - begin) / 2) * 2;
    float from[DOT_COLS], alone[PANEL];
    double most = form == FORM_BF16 ? 0x1p-8 : 1.0 / 253;
    for (int row = 0; row < n_rows; row++) {
        double largest = 0.0;
        for (int k = begin; k < end; k++) {
            from[k] = normal(random) * (k / 32 % 3 ? 1.0f : 30.0f);
            largest = fabs((double)from[k]) > largest ? fabs((double)from[k]) : largest;
        }
        dot_convert(form, from + begin, begin, end, rows + row * DOT_STRIDE);
        for (int k = begin; k < end; k++) {
            double error =
                fabs((double)from[k] - converted(form, rows + row * DOT_STRIDE, begin, k));
            CHECK(error <= largest * most, "element %d: %g", k, error);
        }
    }
    struct tile tile = {.panel = weight->panels,
                        .begin = begin,
                        .end = end,
                        .form = form,
                        .input = rows,
                        .stride = DOT_STRIDE,
                        .out = out[0]};
    bool unit = amx_ready(), twin_was_on = twin_on;
    int n_ways = form != FORM_BF16 ? 1 : unit ? 3 : twin_on ? 2 : 1;
    for (int way = 0; way < n_ways; way++) {
        twin_on = twin_was_on || way == 2;
        tile.out = out[way];
        tile.amx = way > 0;
        panel_product(weight->type, tile, n_rows, NULL);
        tile.out = alone;
        tile.input = rows + (n_rows - 1) * DOT_STRIDE;
        panel_product(weight->type, tile, 1, NULL);
        tile.input = rows;
        CHECK(same_bits(alone, out[way] + (n_rows - 1) * PANEL, PANEL),
              "type %d, %d rows, k %d to %d: way %d", (int)weight->type, n_rows, begin, end, way);
        CHECK(way < 2 || same_bits(out[way], out[way - 1], nth(n_rows, PANEL, 0)),
              "type %d, %d rows, k %d to %d: way %d", (int)weight->type, n_rows, begin, end, way);
    }
    twin_on = twin_was_on;
    for (int row = 0; row < n_rows; row++) {
        for (int i = 0; i < weight->n_rows; i++) {
            double sum = 0.0, size = 1e-3;
            for (int k = begin; k < end; k++) {
                double product = ref_element(weight->tensor, i, k) *
                                 converted(form, rows + row * DOT_STRIDE, begin, k);
                sum += product;
                size += fabs(product);
            }
            for (int way = 0; way < n_ways; way++) {
                double error = fabs((double)out[way][row * PANEL + i] - sum) / size;
                /* numbers of Q4_K are differences, of which a sum of two may leave little */
                CHECK(error < (weight->type == TYPE_Q4_K ? 2e-5 : 3e-6),
                      "type %d, %d rows, k %d to %d: error %g at %d, %d", (int)weight->type, n_rows,
                      begin, end, error, row, i);
            }
        }
    }
}

static void fast_paths(struct check *check) {
    static const enum tensor_type types[] = {TYPE_BF16, TYPE_Q8_0, TYPE_Q4_0,
                                             TYPE_Q4_K, TYPE_Q6_K, TYPE_MXFP4};
    struct random random = start("fast paths");
    for (int i = 0; i < COUNT(types); i++) {
        CHECK(dot_form(types[i], true) == FORM_F32, "plain is plain");
        if (dot_form(types[i], false) == FORM_F32)
            continue; /* this processor has none; the plain kernels are tested above */
        struct tensor *tensor = make_tensor(&random, types[i], 50, DOT_COLS, 0.1f, 0);
        struct weight *weight = pack_open(tensor);
        weight->panels = aligned_alloc(64, pack_bytes(weight));
        pack_panel(weight, 0);
        for (int n_rows = 1; n_rows <= 6; n_rows++)
            for (int repeat = 0; repeat < 5; repeat++)
                check_dot(check, &random, weight,
                          repeat < 4 ? n_rows : below(&random, DOT_ROWS) + 1);
        free(weight->panels);
        pack_close(weight);
        free_tensor(tensor);
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
        memcpy(counter, vectors[i], sizeof counter);
        ref_philox(counter, vectors[i][4], vectors[i][5]);
        CHECK(memcmp(counter, vectors[i] + 6, sizeof counter) == 0, "reference.h, vector %d", i);
    }
}

/* Draws are distributed as the weights are: a chi-square test, of the same draws each time. */
static void sampler_distribution(struct check *check) {
    enum { TRIALS = 20032, LIKELY = 20, VOCAB = 397 };
    static struct test_batch test;
    static float logits[LOGITS_KEPT * VOCAB];
    struct random random = {53};
    struct model_config config = draw_config(&random, 1, 1);
    config.vocab_size = VOCAB;
    config.rope_dim = 0;
    struct device *device = open_alone(&config, LOGITS_KEPT);
    double p[VOCAB], sum = 0.0, chi = 0.0, rest = 1.0;
    int count[VOCAB] = {0}, bins = 0, others = TRIALS, text[1] = {0}, slots[1] = {0};
    for (int j = 0; j < VOCAB; j++) {
        float value = 2.0f * normal(&random);
        p[j] = exp((double)value);
        sum += p[j];
        for (int i = 0; i < LOGITS_KEPT; i++)
            logits[i * VOCAB + j] = value;
    }
    for (int first = 0; first < TRIALS; first += LOGITS_KEPT) {
        struct batch *batch = start_batch(&test);
        for (int i = 0; i < LOGITS_KEPT; i++) {
            add_text(batch, text, slots, 0, 1, false);
            batch->position[i] = first + i;
            add_sample(batch, i, (struct sampling){1.0f, 1.0f, 0.0f, 0, 7});
        }
        cpu_step_begin(device, batch);
        poke(device, A_LOGITS, logits, LOGITS_KEPT);
        draw_rows(device, LOGITS_KEPT);
        cpu_step_end(device, batch->sampled);
        for (int i = 0; i < LOGITS_KEPT; i++)
            count[batch->sampled[i]]++;
    }
    for (int j = 0; j < VOCAB; j++) {
        double expected = p[j] / sum * TRIALS;
        if (expected >= LIKELY) {
            chi += (count[j] - expected) * (count[j] - expected) / expected;
            rest -= p[j] / sum;
            others -= count[j];
            bins++;
        }
    }
    chi += (others - rest * TRIALS) * (others - rest * TRIALS) / (rest * TRIALS);
    CHECK(bins > 30 && chi < bins + 5 * sqrt(2.0 * bins), "chi-square %g of %d bins", chi, bins);
    close_alone(device);
}

/* ---- devices ---- */

static void memory_that_there_is_not(struct check *check) {
    struct backend *backend = open_backend(0, 0);
    struct device device = {.backend = backend};
    CHECK(!backend->alloc(&device, SIZE_MAX), "more memory than there is");
    CHECK(!host_alloc(SIZE_MAX - 70), "more memory than there is");
    CHECK(backend->free_memory(&device) > 1000000, "some memory is free");
    backend->close(backend);
}

struct driver {
    struct check check;
    struct worker *worker;
    pthread_t thread;
    const struct story *story;
    float *told;
};

static void *drive(void *argument) {
    struct driver *driver = argument;
    struct random random = {(uint64_t)(uintptr_t)driver};
    for (int i = 0; i < 3; i++)
        tell(&driver->check, driver->worker, &random, driver->story, 20 + i, 3, driver->told);
    return NULL;
}

/* Workers that share the pool, at once, more of them than it has threads. */
static void many_workers(struct check *check) {
    enum { DRIVERS = 6 };
    struct random random = start("workers");
    struct test_model *m = make_model_of(&random, draw_config(&random, 1, 2), TYPE_F32);
    struct story story = draw_story(&random, 60, 4, m->model.config.vocab_size);
    size_t n = nth(5, m->model.config.vocab_size + 1, 0);
    for (int n_threads = 1; n_threads <= 4; n_threads++) {
        struct backend *backend = open_backend(0, (uint64_t)n_threads - 1);
        struct driver drivers[DRIVERS];
        for (int i = 0; i < DRIVERS; i++) {
            struct driver *driver = &drivers[i];
            *driver = (struct driver){.story = &story, .told = floats(n)};
            driver->worker = open_worker_on(backend, 0, m, i % 3 ? 1 : 2, 300);
            for (int shard = 0; shard < driver->worker->n_shards; shard++) {
                struct cpu_device *device = cpu_of(driver->worker->shards[shard]);
                device->device.urgent = i & 1;
                atomic_store(&device->job->urgent, i & 1);
            }
        }
        for (int i = 0; i < DRIVERS; i++)
            need(!pthread_create(&drivers[i].thread, NULL, drive, &drivers[i]), "a thread");
        for (int i = 0; i < DRIVERS; i++)
            pthread_join(drivers[i].thread, NULL);
        for (int i = 0; i < DRIVERS; i++) {
            check->failed += drivers[i].check.failed;
            CHECK(same_bits(drivers[i].told, drivers[0].told, n), "worker %d", i);
        }
        for (int i = 0; i < DRIVERS; i++) {
            close_devices(drivers[i].worker);
            free(drivers[i].told);
        }
        int awake = atomic_load(&((struct cpu_backend *)backend)->pool.active);
        CHECK(awake >= 0 && awake < n_threads, "%d threads still counted", awake);
        backend->close(backend);
    }
    free_model(m);
}

int main(int argc, char **argv) {
    static const struct test tests[] = {OP_TESTS,
                                        {"fast_paths", fast_paths},
                                        {"philox_vectors", philox_vectors},
                                        {"sampler_distribution", sampler_distribution},
                                        {"memory_that_there_is_not", memory_that_there_is_not},
                                        {"many_workers", many_workers}};
#ifdef AMX
    twin_on = !amx_ready();
#endif
    return run_tests(tests, sizeof tests / sizeof *tests, argc, argv);
}
