/* test_random.c: models of random weights: the shapes are the published ones, the numbers sensible
 * and always the same, and what looks like many gigabytes takes none. */
#define _GNU_SOURCE
#define GGUF_IMPLEMENTATION
#define MODEL_IMPLEMENTATION
#include "dynamo.h"
#include "../lib/model.h"
#define MATMUL_IMPLEMENTATION
#include "../lib/matmul.h"
#include "check.h"

#include <math.h>
#include <stdlib.h>

/* Every type, spelled in different ways. */
static const struct {
    const char *name;
    enum tensor_type type;
} types[] = {{"f32", TYPE_F32},   {"F16", TYPE_F16},   {"bf16", TYPE_BF16}, {"q8_0", TYPE_Q8_0},
             {"Q4_0", TYPE_Q4_0}, {"q4_K", TYPE_Q4_K}, {"Q6_K", TYPE_Q6_K}, {"mxfp4", TYPE_MXFP4}};

enum { N_TYPES = sizeof types / sizeof *types };

/* Sizes as those who trained the models give them; n_weights: without rope_freqs. */
static const struct fact {
    const char *name;
    bool tied, scaled;
    int64_t n_weights;
    struct model_config config;
} facts[] = {
    {"stories-15m",
     true,
     false,
     15191712,
     {.architecture = "llama", 6, 288, 6, 6, 48, 768, 32000, 2048, 48, true, 1e4f, 1e-5f}},
    {"stories-110m",
     true,
     false,
     109529856,
     {.architecture = "llama", 12, 768, 12, 12, 64, 2048, 32000, 2048, 64, true, 1e4f, 1e-5f}},
    {"tinyllama-1.1b",
     false,
     false,
     1100048384,
     {.architecture = "llama", 22, 2048, 32, 4, 64, 5632, 32000, 2048, 64, true, 1e4f, 1e-5f}},
    {"qwen3-0.6b",
     true,
     false,
     596049920,
     {.architecture = "qwen3", 28, 1024, 16, 8, 128, 3072, 151936, 40960, 128, false, 1e6f, 1e-6f}},
    {"llama-3.1-8b",
     false,
     true,
     8030261248,
     {.architecture = "llama",
      32,
      4096,
      32,
      8,
      128,
      14336,
      128256,
      131072,
      128,
      true,
      5e5f,
      1e-5f}},
    {"llama-3.1-70b",
     false,
     true,
     70553706496,
     {.architecture = "llama",
      80,
      8192,
      64,
      8,
      128,
      28672,
      128256,
      131072,
      128,
      true,
      5e5f,
      1e-5f}},
    {"llama-3.1-405b",
     false,
     true,
     405853388800,
     {.architecture = "llama",
      126,
      16384,
      128,
      8,
      128,
      53248,
      128256,
      131072,
      128,
      true,
      5e5f,
      1e-5f}},
    {"tiny-moe",
     false,
     false,
     2 * 512 * 128 + 128 + 2 * (2 * 128 + 2 * 32 + 128 * 768 + 16 * 128 + 3 * 16 * 96 * 128),
     {.architecture = "qwen3moe", 2, 128, 8, 4, 32, 96, 512, 2048, 32, false, 1e6f, 1e-6f, 16, 4}},
    {"qwen3-30b-a3b",
     false,
     false,
     30532122624,
     {.architecture = "qwen3moe",
      48,
      2048,
      32,
      4,
      128,
      768,
      151936,
      40960,
      128,
      false,
      1e6f,
      1e-6f,
      128,
      8}},
    {"gpt-oss-20b",
     false,
     false,
     20914757184,
     {.architecture = "gpt-oss",
      24,
      2880,
      64,
      8,
      64,
      2880,
      201088,
      131072,
      64,
      false,
      1.5e5f,
      1e-5f,
      32,
      4,
      .window = 128}},
    {"gpt-oss-120b",
     false,
     false,
     116829156672,
     {.architecture = "gpt-oss",
      36,
      2880,
      64,
      8,
      64,
      2880,
      201088,
      131072,
      64,
      false,
      1.5e5f,
      1e-5f,
      128,
      4,
      .window = 128}},
    {"gemma-3-4b",
     true,
     false,
     3880263168,
     {.architecture = "gemma3",
      34,
      2560,
      8,
      4,
      256,
      10240,
      262208,
      131072,
      256,
      false,
      1e6f,
      1e-6f,
      .window = 1024}},
};

enum { N_FACTS = sizeof facts / sizeof *facts };

/* False after a failed check. */
static bool open_model(struct check *check, const char *shape, const char *type,
                       struct model *model) {
    char name[64], error[ERROR_LENGTH];
    snprintf(name, sizeof name, "random:%s%s%s", shape, *type ? ":" : "", type);
    bool ok = model_open(model, name, error);
    CHECK(ok, "%s: %s", name, error);
    return ok;
}

/* ---- shapes ---- */

static void shapes_are_as_published(struct check *check) {
    for (size_t i = 0; i < N_FACTS; i++) {
        const struct fact *fact = &facts[i];
        const struct model_config *want = &fact->config;
        struct model model;
        if (!open_model(check, fact->name, "", &model))
            continue;
        const struct model_config *got = &model.config;
        const struct tensor *const *own = model.layers[0];
        CHECK(!strcmp(got->architecture, want->architecture), "got %s", got->architecture);
        CHECK(got->n_layers == want->n_layers && got->d_model == want->d_model &&
                  got->n_heads == want->n_heads && got->n_kv_heads == want->n_kv_heads &&
                  got->head_dim == want->head_dim && got->d_ff == want->d_ff &&
                  got->vocab_size == want->vocab_size &&
                  got->context_length == want->context_length && got->rope_dim == want->rope_dim,
              "%s: wrong shape", fact->name);
        CHECK(got->rope_theta == want->rope_theta && got->norm_epsilon == want->norm_epsilon &&
                  got->rope_adjacent == want->rope_adjacent,
              "%s: theta %g, epsilon %g", fact->name, (double)got->rope_theta,
              (double)got->norm_epsilon);
        CHECK((own[OUTPUT] == own[TOKEN_EMBD]) == fact->tied, "%s: tied", fact->name);
        CHECK(!own[ROPE_FREQS] == !fact->scaled, "%s: rope_freqs", fact->name);
        bool normed = !strncmp(want->architecture, "qwen3", 5) || want->architecture[1] == 'e';
        CHECK(!own[ATTN_Q_NORM] == !normed, "%s: norms", fact->name);
        CHECK(got->n_experts == want->n_experts && got->n_used == want->n_used &&
                  got->window == want->window,
              "%s: experts, window", fact->name);
        int64_t n_weights = own[ROPE_FREQS] ? -own[ROPE_FREQS]->cols : 0;
        for (int j = 0; j < model.n_placed; j++)
            n_weights += model.placed[j].rows * model.placed[j].cols;
        CHECK(n_weights == fact->n_weights, "%s: got %jd weights, expected %jd", fact->name,
              (intmax_t)n_weights, (intmax_t)fact->n_weights);
        CHECK(own[TOKEN_EMBD]->type == TYPE_BF16, "%s: not BF16 by default", fact->name);
        model_close(&model);
    }
}

/* A byte of a matrix is the byte one period before, wherever the matrix begins in the tile. */
static void check_period(struct check *check, const struct tensor *tensor) {
    const uint8_t *data = tensor->data;
    const char *name = tensor->name.data;
    int length = (int)tensor->name.length;
    CHECK(tensor->period == 0 || tensor->period < tensor->bytes, "%.*s", length, name);
    if (tensor->rows == 1) {
        CHECK(tensor->type == TYPE_F32 && tensor->period == 0, "%.*s", length, name);
        return;
    }
    size_t last = tensor->bytes - 1, middle = tensor->bytes / 2;
    const size_t places[] = {0, 1, 4097, middle, last};
    for (size_t i = 0; i < 5 && tensor->period; i++) {
        size_t at = places[i] < tensor->period ? places[i] + tensor->period : places[i];
        if (at <= last)
            CHECK(data[at] == data[at % tensor->period], "%.*s: byte %zu", length, name, at);
    }
}

static void every_type_opens(struct check *check) {
    for (size_t at = 0; at < N_FACTS * N_TYPES; at++) {
        size_t i = at / N_TYPES, j = at % N_TYPES;
        struct model model;
        const struct model_config *config = &facts[i].config;
        int elements = gguf_block(types[j].type).elements;
        if (config->d_model % elements || config->d_ff % elements)
            continue; /* refuses_the_rest */
        if (types[j].type == TYPE_MXFP4 && config->n_experts == 0)
            continue; /* the same */
        if (facts[i].n_weights > 100000000000 && types[j].type != TYPE_Q8_0)
            continue; /* the largest once */
        if (!open_model(check, facts[i].name, types[j].name, &model))
            continue;
        size_t n_repeating = 0;
        for (int k = 0; k < model.n_placed; k++) {
            const struct tensor *tensor = &model.placed[k];
            check_period(check, tensor);
            bool expert = strstr(tensor->name.data, "_exps");
            CHECK(tensor->rows == 1 || tensor->type == types[j].type ||
                      (types[j].type == TYPE_MXFP4 && !expert && tensor->type == TYPE_BF16),
                  "%s %s: tensor %d", facts[i].name, types[j].name, k);
            n_repeating += tensor->period > 0;
        }
        CHECK(n_repeating > 0 || facts[i].n_weights < 200000000, "%s %s: nothing repeats",
              facts[i].name, types[j].name);
        model_close(&model);
    }
}

static void refuses_the_rest(struct check *check) {
    static const char all[] =
        "random:NAME:TYPE (default BF16); NAME: stories-15m, stories-110m, tinyllama-1.1b, "
        "qwen3-0.6b, llama-3.1-8b, llama-3.1-70b, llama-3.1-405b, tiny-moe, qwen3-30b-a3b, "
        "gpt-oss-20b, gpt-oss-120b, gemma-3-4b; TYPE: F32, F16, BF16, Q8_0, Q4_0, Q4_K, Q6_K, "
        "MXFP4, FP8";
    static const char *const cases[][2] = {
        {"random:", all},
        {"random::", all},
        {"random:stories", all},
        {"random:stories-15m:", all},
        {"random:stories-15m:q5_1", all},
        {"random:stories-15m:f32:", all},
        {"random::f32", all},
        {"random:a\nb", "random:a?b: expected"},
        {"random:stories-15m:q4_k", "288 columns, expected a multiple of 256, the block of Q4_K"},
        {"random:stories-15m:q6_k", "288 columns, expected a multiple of 256, the block of Q6_K"},
        {"random:stories-15m:mxfp4", "MXFP4 is for experts, and this model has none"},
        {"random", "No such file"}};
    char error[ERROR_LENGTH], name[1024];
    struct model model;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        CHECK(!model_open(&model, cases[i][0], error) && strstr(error, cases[i][1]), "%s: got `%s`",
              cases[i][0], error);
        CHECK(!strncmp(error, "random", 6) && !strchr(error, '\n'), "got `%s`", error);
    }
    memset(name, 'x', sizeof name);
    memcpy(name, "random:", 7);
    name[sizeof name - 1] = 0;
    CHECK(!model_open(&model, name, error) && strstr(error, all), "a long name: got `%s`", error);
}

/* ---- weights ---- */

static uint64_t hash(const void *data, size_t bytes) { /* FNV-1a */
    uint64_t value = 0xcbf29ce484222325u;
    for (size_t i = 0; i < bytes; i++)
        value = (value ^ ((const uint8_t *)data)[i]) * 0x100000001b3u;
    return value;
}

/* What was measured with a model today must be the same model tomorrow: each type; and, of an
 * untied model and of another architecture, the matrices that lie last. */
static void weights_are_always_the_same(struct check *check) {
    static const struct {
        const char *shape, *type;
        int layer, role;
        uint64_t hash; /* of 4 MiB at most */
    } cases[] = {{"stories-110m", "f32", 5, ATTN_Q, 0xd54196c70b48497a},
                 {"stories-110m", "f16", 5, ATTN_Q, 0xe8acaeec6a02b9be},
                 {"stories-110m", "bf16", 5, ATTN_Q, 0x4a9fcb90dcd338e6},
                 {"stories-110m", "q8_0", 5, ATTN_Q, 0x22990862e8c979d9},
                 {"stories-110m", "q4_0", 5, ATTN_Q, 0x7ad183bbf255806d},
                 {"stories-110m", "q4_k", 5, ATTN_Q, 0xd9f47506da1b060b},
                 {"stories-110m", "q6_k", 5, ATTN_Q, 0x22ba1c1cee17a52c},
                 {"llama-3.1-8b", "q8_0", 0, OUTPUT, 0xae3cce07bcfadc84},
                 {"qwen3-0.6b", "q4_k", 27, FFN_DOWN, 0x8c034fed6e28486c}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct model models[2];
        for (int j = 0; j < 2; j++)
            if (!open_model(check, cases[i].shape, cases[i].type, &models[j]))
                return;
        const struct tensor *a = models[0].layers[cases[i].layer][cases[i].role];
        const struct tensor *b = models[1].layers[cases[i].layer][cases[i].role];
        size_t bytes = a->bytes < 4 << 20 ? a->bytes : 4 << 20;
        CHECK(a->bytes == b->bytes && !memcmp(a->data, b->data, bytes), "case %zu: differs", i);
        uint64_t got = hash(a->data, bytes);
        CHECK(got == cases[i].hash, "case %zu: got 0x%jx", i, (uintmax_t)got);
        for (int j = 0; j < 2; j++)
            model_close(&models[j]);
    }
}

static int by_data(const void *a, const void *b) {
    return memcmp((*(const struct tensor *const *)a)->data,
                  (*(const struct tensor *const *)b)->data, 512);
}

static void matrices_differ(struct check *check) {
    static const char *const cases[][2] = {{"llama-3.1-8b", "bf16"},   {"llama-3.1-70b", "q8_0"},
                                           {"llama-3.1-8b", "q6_k"},   {"qwen3-0.6b", "f32"},
                                           {"tinyllama-1.1b", "q4_k"}, {"stories-15m", "q4_0"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct model model;
        if (!open_model(check, cases[i][0], cases[i][1], &model))
            continue;
        const struct tensor **matrices = calloc((size_t)model.n_placed, sizeof *matrices);
        size_t n = 0;
        for (int j = 0; j < model.n_placed; j++)
            if (model.placed[j].rows > 1)
                matrices[n++] = &model.placed[j];
        qsort(matrices, n, sizeof *matrices, by_data);
        for (size_t j = 1; j < n; j++)
            CHECK(by_data(&matrices[j - 1], &matrices[j]) != 0, "%s %s: %td and %td begin alike",
                  cases[i][0], cases[i][1], matrices[j] - model.placed,
                  matrices[j - 1] - model.placed);
        CHECK(n > 40, "got %zu matrices", n);
        free(matrices);
        model_close(&model);
    }
}

/* Read as the CPU backend reads them, the first 64 rows of a matrix. */
static void weights_have_sensible_sizes(struct check *check) {
    for (size_t i = 0; i < N_TYPES; i++) {
        struct model model;
        bool experts = types[i].type == TYPE_MXFP4;
        if (!open_model(check, experts ? "gpt-oss-20b" : "tinyllama-1.1b", types[i].name, &model))
            continue;
        struct tensor rows = *model.layers[3][experts ? DOWN_EXPERTS : FFN_DOWN];
        rows.bytes = rows.bytes / (size_t)rows.rows * PANEL;
        rows.rows = PANEL;
        struct weight *weight = pack_open(&rows);
        float *row = calloc((size_t)rows.cols, sizeof *row);
        weight->panels = aligned_alloc(64, round_up(pack_bytes(weight), 64));
        pack_panel(weight, 0);
        double sum = 0, squares = 0, largest = 0, n = PANEL * (double)rows.cols;
        for (int r = 0; r < PANEL; r++) {
            pack_read_row(weight, r, row);
            double row_sum = 0;
            for (int64_t c = 0; c < rows.cols; c++) {
                row_sum += (double)row[c];
                squares += (double)row[c] * (double)row[c];
                largest = fabs((double)row[c]) > largest ? fabs((double)row[c]) : largest;
            }
            sum += row_sum;
        }
        double deviation = sqrt(squares / n);
        CHECK(deviation > 0.018 && deviation < 0.022, "%s: deviation %g", types[i].name, deviation);
        CHECK(fabs(sum / n) < 5 * deviation / sqrt(n) * sqrt(32), "%s: mean %g", types[i].name,
              sum / n);
        CHECK(largest > 0.03 && largest < 0.2, "%s: largest %g", types[i].name, largest);
        free(row);
        free(weight->panels);
        pack_close(weight);
        model_close(&model);
    }
}

/* Norms are 1. Of Llama 3.1's 64 frequencies the first 29 keep their size, those from 35 on are
 * divided by 8, and those between by more and more: its config says so, with wave lengths of 2048
 * and 8192 tokens as limits. All of it again after the pages were given back. */
static void vectors_are_exact(struct check *check) {
    struct model model;
    if (!open_model(check, "llama-3.1-70b", "q8_0", &model))
        return;
    for (int turn = 0; turn < 2; turn++) {
        const float *divisor = model.layers[0][ROPE_FREQS]->data;
        CHECK(model.layers[0][ROPE_FREQS]->cols == 64, "got %jd",
              (intmax_t)model.layers[0][ROPE_FREQS]->cols);
        for (int i = 0; i < 64; i++) {
            CHECK(i > 28 || divisor[i] == 1, "divisor %d: %g", i, (double)divisor[i]);
            CHECK(i < 35 || divisor[i] == 8, "divisor %d: %g", i, (double)divisor[i]);
            CHECK(i <= 28 || i >= 36 || divisor[i] > divisor[i - 1] || divisor[i] == 8,
                  "divisor %d: %g", i, (double)divisor[i]);
        }
        for (int i = 0; i < model.config.n_layers; i++) {
            const float *norms[] = {model.layers[i][ATTN_NORM]->data,
                                    model.layers[i][FFN_NORM]->data,
                                    model.layers[0][OUTPUT_NORM]->data};
            for (int j = 0; j < 3; j++)
                for (int k = 0; k < model.config.d_model; k++)
                    if (norms[j][k] != 1)
                        CHECK(false, "layer %d, norm %d: entry %d is %g", i, j, k,
                              (double)norms[j][k]);
        }
        const struct tensor *matrix = model.layers[79][FFN_UP];
        uint64_t before = hash(matrix->data, 100000);
        for (int i = 0; i < model.n_placed; i++)
            gguf_release(&model.placed[i]);
        CHECK(hash(matrix->data, 100000) == before, "other weights after their release");
    }
    model_close(&model);
}

/* Biases and sinks are small, not alike, and as often above 0 as below. */
static void biases_are_small(struct check *check) {
    static const int roles[] = {Q_BIAS, ATTN_OUTPUT_BIAS, ATTN_SINKS, ROUTER_BIAS,
                                DOWN_EXPERTS_BIAS};
    struct model model;
    if (!open_model(check, "gpt-oss-20b", "mxfp4", &model))
        return;
    for (int i = 0; i < 5; i++) {
        const struct tensor *bias = model.layers[1][roles[i]];
        int n = bias ? (int)bias->cols : 0, n_above = 0, n_alike = 0;
        CHECK(n >= 32, "role %d: %d entries", roles[i], n);
        for (int k = 0; k < n; k++) {
            float value = ((const float *)bias->data)[k];
            CHECK(fabsf(value) < 0.035f, "role %d: entry %d is %g", roles[i], k, (double)value);
            n_above += value > 0;
            n_alike += k > 0 && value == ((const float *)bias->data)[k - 1];
        }
        CHECK(n_alike == 0 && 4 * n_above > n && 4 * n_above < 3 * n,
              "role %d: of %d entries %d above 0, %d as the one before", roles[i], n, n_above,
              n_alike);
    }
    model_close(&model);
}

/* ---- memory ---- */

static size_t memory_of(const char *field) { /* of this process, in KiB */
    char line[256];
    size_t value = 0, length = strlen(field);
    FILE *file = fopen("/proc/self/status", "r");
    while (file && fgets(line, sizeof line, file))
        if (strncmp(line, field, length) == 0)
            value = strtoul(line + length, NULL, 10);
    if (file)
        fclose(file);
    return value;
}

#if defined(__SANITIZE_THREAD__)
enum { SHADOWED = 1 }; /* ThreadSanitizer keeps memory for each byte that was read */
#else
enum { SHADOWED = 0 };
#endif

static void large_models_take_no_memory(struct check *check) {
    struct model model;
    size_t resident = memory_of("VmRSS:"), mapped = memory_of("VmSize:");
    CHECK(resident > 0 && mapped > 0, "/proc/self/status cannot be read");
    if (!open_model(check, "llama-3.1-70b", "q8_0", &model))
        return;
    CHECK(memory_of("VmSize:") - mapped > 70553706496 / 1024, "where is it?");
    CHECK(memory_of("VmRSS:") - resident < 32 << 10, "takes %zu KiB",
          memory_of("VmRSS:") - resident);
    const struct tensor *output = model.layers[0][OUTPUT]; /* more than a gigabyte */
    size_t sum = 0, anonymous = memory_of("RssAnon:");
    for (size_t at = 0; at < output->bytes; at += SHADOWED ? 1 << 24 : 4096)
        sum += ((const uint8_t *)output->data)[at];
    CHECK(sum > 0 && output->bytes > 1 << 30, "got %zu bytes", output->bytes);
    CHECK(memory_of("RssAnon:") < anonymous + (8 << 10), "reading takes memory");
    gguf_release(output);
    size_t left = memory_of("VmRSS:") - resident;
    CHECK(left < 64 << 10, "%zu KiB are left after the release", left);
    model_close(&model);
    CHECK(memory_of("VmSize:") < mapped + (64 << 10), "still mapped");
}

int main(int argc, char **argv) {
    static const struct test tests[] = {{"memory", large_models_take_no_memory},
                                        {"shapes", shapes_are_as_published},
                                        {"types", every_type_opens},
                                        {"refusals", refuses_the_rest},
                                        {"always the same", weights_are_always_the_same},
                                        {"matrices differ", matrices_differ},
                                        {"sizes", weights_have_sensible_sizes},
                                        {"vectors", vectors_are_exact},
                                        {"biases", biases_are_small}};
    return check_run(tests, sizeof tests / sizeof *tests, argc, argv);
}
