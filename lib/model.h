/* model.h: which model a file holds, a GGUF file or a llama2.c v0 checkpoint, and its tensors.
 *
 *     struct model model;
 *     struct gguf *file = gguf_open("model.gguf", error);
 *     if (!file || !model_open(&model, file, error))
 *         fprintf(stderr, "dynamo: %s\n", error);
 *     ... model.layers[3][ATTN_Q]->data ...
 *     model_close(&model);
 *     gguf_close(file);
 *
 * Owns the list of layers. The weights stay in the file's map, which must outlive the model.
 * Data flow: keys, or a checkpoint's header -> config -> extents -> the table model_tensors: each
 * is found by name and compared, or, in a checkpoint, laid out behind the one before. A checkpoint
 * has no mark: it is what is not GGUF and has exactly the size that its header implies.
 * Refuses: every model that the forward pass would get wrong.
 * Define MODEL_IMPLEMENTATION in one file, before including this. Read next: dynamo.c. */
#ifndef MODEL_H
#define MODEL_H

#include "gguf.h"

struct model_config {
    const char *architecture; /* llama, qwen2, qwen3 */
    int n_layers, d_model, n_heads, n_kv_heads, head_dim, d_ff, vocab_size, context_length;
    int rope_dim;       /* leading elements of a head that rope turns: head_dim in all of these */
    bool rope_adjacent; /* pairs (2i, 2i+1), as in `llama`; else (i, i + head_dim / 2) */
    float rope_theta, norm_epsilon;
};

/* What a tensor is for. The model's own come first, and count as the first layer's. */
enum tensor_role {
    NO_ROLE = -1, /* not for the forward pass */
    TOKEN_EMBD,
    OUTPUT_NORM,
    OUTPUT,     /* TOKEN_EMBD's tensor again, where the two are tied */
    ROPE_FREQS, /* divisors of rope's frequencies, or absent */
    ATTN_NORM,  /* the first of each layer's */
    ATTN_Q,
    ATTN_K,
    ATTN_V,
    Q_BIAS, /* biases: qwen2 */
    K_BIAS,
    V_BIAS,
    ATTN_Q_NORM, /* norms over head_dim: qwen3 */
    ATTN_K_NORM,
    ATTN_OUTPUT,
    FFN_NORM,
    FFN_GATE,
    FFN_UP,
    FFN_DOWN,
    N_ROLES
};

enum slice_kind { SLICE_WHOLE, SLICE_ROWS, SLICE_COLS };

struct slice { /* which part of a tensor a shard holds: part `rank` of `count` equal ones */
    enum slice_kind kind;
    int rank, count;
};

/* A product whose K shards cut (SLICE_COLS) is summed in so many segments, combined by a binary
 * tree, so that every number of shards that divides it gives the same bits. */
enum { K_SEGMENTS = 8 };

/* Where segment `index` of a K of `cols` begins; all end at multiples of `unit`. */
static inline int segment_begin(int cols, int unit, int index) {
    int64_t n_units = (cols + unit - 1) / unit;
    int begin = (int)(index * n_units / K_SEGMENTS) * unit;
    return begin < cols ? begin : cols;
}

/* What rows and columns of a tensor count; DIM_CONTEXT is the last. */
enum extent {
    DIM_NONE,
    DIM_ONE,
    DIM_VOCAB,
    DIM_MODEL,
    DIM_Q,  /* n_heads * head_dim */
    DIM_KV, /* n_kv_heads * head_dim */
    DIM_FF,
    DIM_HEAD,
    DIM_ROPE, /* rope_dim / 2 */
    DIM_CONTEXT
};

/* What a file can be; a tied checkpoint ends before output.weight. Combined: who needs a tensor. */
enum {
    MODEL_LLAMA = 1,
    MODEL_QWEN2 = 2,
    MODEL_QWEN3 = 4,
    MODEL_TIED = 8, /* llama2.c checkpoints */
    MODEL_UNTIED = 16,
    MODEL_ALL = 31
};

/* One row for each tensor that a model can have: all that loading, sharding, counting and making
 * random models know of it. In the order of a llama2.c checkpoint, each for all layers. */
struct model_tensor {
    const char *name; /* behind `blk.N.`, if each layer has one */
    bool layered;
    int role; /* enum tensor_role; -1: not for the forward pass */
    enum extent rows,
        cols;              /* a vector has DIM_ONE row, and is F32; DIM_NONE: refused, text would be
                             * wrong without it */
    unsigned required_by;  /* kinds of model; optional elsewhere, but in a checkpoint absent */
    enum slice_kind slice; /* how the shards of a worker cut it: a shard's heads are rows of q, k,
                             * v and columns of attn_output; its part of d_ff, likewise */
};
static const struct model_tensor model_tensors[] = {
    {"token_embd.weight", false, TOKEN_EMBD, DIM_VOCAB, DIM_MODEL, MODEL_ALL, SLICE_WHOLE},
    {"attn_norm.weight", true, ATTN_NORM, DIM_ONE, DIM_MODEL, MODEL_ALL, SLICE_WHOLE},
    {"attn_q.weight", true, ATTN_Q, DIM_Q, DIM_MODEL, MODEL_ALL, SLICE_ROWS},
    {"attn_k.weight", true, ATTN_K, DIM_KV, DIM_MODEL, MODEL_ALL, SLICE_ROWS},
    {"attn_v.weight", true, ATTN_V, DIM_KV, DIM_MODEL, MODEL_ALL, SLICE_ROWS},
    {"attn_output.weight", true, ATTN_OUTPUT, DIM_MODEL, DIM_Q, MODEL_ALL, SLICE_COLS},
    {"ffn_norm.weight", true, FFN_NORM, DIM_ONE, DIM_MODEL, MODEL_ALL, SLICE_WHOLE},
    {"ffn_gate.weight", true, FFN_GATE, DIM_FF, DIM_MODEL, MODEL_ALL, SLICE_ROWS},
    {"ffn_down.weight", true, FFN_DOWN, DIM_MODEL, DIM_FF, MODEL_ALL, SLICE_COLS},
    {"ffn_up.weight", true, FFN_UP, DIM_FF, DIM_MODEL, MODEL_ALL, SLICE_ROWS},
    {"output_norm.weight", false, OUTPUT_NORM, DIM_ONE, DIM_MODEL, MODEL_ALL, SLICE_WHOLE},
    {"rope_tables", false, NO_ROLE, DIM_CONTEXT, DIM_HEAD, MODEL_TIED | MODEL_UNTIED, SLICE_WHOLE},
    {"output.weight", false, OUTPUT, DIM_VOCAB, DIM_MODEL, MODEL_UNTIED, SLICE_WHOLE},
    {"rope_freqs.weight", false, ROPE_FREQS, DIM_ONE, DIM_ROPE, 0, SLICE_WHOLE},
    {"attn_q.bias", true, Q_BIAS, DIM_ONE, DIM_Q, MODEL_QWEN2, SLICE_ROWS},
    {"attn_k.bias", true, K_BIAS, DIM_ONE, DIM_KV, MODEL_QWEN2, SLICE_ROWS},
    {"attn_v.bias", true, V_BIAS, DIM_ONE, DIM_KV, MODEL_QWEN2, SLICE_ROWS},
    {"attn_q_norm.weight", true, ATTN_Q_NORM, DIM_ONE, DIM_HEAD, MODEL_QWEN3, SLICE_WHOLE},
    {"attn_k_norm.weight", true, ATTN_K_NORM, DIM_ONE, DIM_HEAD, MODEL_QWEN3, SLICE_WHOLE},
    {"attn_output.bias", true, NO_ROLE, DIM_NONE, DIM_NONE, 0, SLICE_WHOLE},
    {"ffn_gate.bias", true, NO_ROLE, DIM_NONE, DIM_NONE, 0, SLICE_WHOLE},
    {"ffn_up.bias", true, NO_ROLE, DIM_NONE, DIM_NONE, 0, SLICE_WHOLE},
    {"ffn_down.bias", true, NO_ROLE, DIM_NONE, DIM_NONE, 0, SLICE_WHOLE},
};
enum { N_MODEL_TENSORS = sizeof model_tensors / sizeof *model_tensors };

struct model {
    struct model_config config;
    const struct tensor *(*layers)[N_ROLES]; /* (n_layers) by role; absent ones are NULL */
    struct tensor *placed; /* of a llama2.c checkpoint, which lists none; else NULL */
};

bool random_named(const char *name); /* it begins with `random:` */
/* What a MODEL argument names: a file, all parts of a split one, or random weights. */
struct gguf *source_open(const char *name, char error[ERROR_LENGTH]);
/* Fills `model` from the file: every key, shape and type checked. False: `error` is one line. */
bool model_open(struct model *model, struct gguf *file, char error[ERROR_LENGTH]);
void model_close(struct model *model);

#endif /* MODEL_H */

#ifdef MODEL_IMPLEMENTATION
#undef MODEL_IMPLEMENTATION

#include <assert.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/mman.h>
#include <unistd.h>

enum { REQUIRED = -1 }; /* in place of a default */

/* Those that gguf.h knows the size of. */
#define MATRIX_TYPES "F32, F16, BF16, Q8_0, Q4_0, Q4_K or Q6_K"

/* The int32 that begin a checkpoint; vocab_size is negative if it is untied. */
static const char *const model_header[] = {
    "embedding_length",        "feed_forward_length", "block_count",   "attention.head_count",
    "attention.head_count_kv", "vocab_size",          "context_length"};

enum { N_HEADER = sizeof model_header / sizeof *model_header, HEADER_VOCAB = 5 };

struct model_reader {
    struct gguf *file;
    struct model_config *config;
    unsigned kind;            /* MODEL_LLAMA to MODEL_UNTIED */
    const uint8_t *bytes;     /* (size) of a checkpoint; NULL: GGUF */
    size_t size, at;          /* [0, at) has been laid out */
    int32_t header[N_HEADER]; /* of a checkpoint */
    struct tensor *placed;    /* the next to be laid out */
    int extents[DIM_CONTEXT + 1];
};

/* The value, or the default where there is none; `least` once anything was wrong. */
static double model_check(struct gguf *file, bool found, double value, double fallback,
                          double least, double most) {
    value = found ? value : fallback;
    gguf_expect(file, found || fallback != REQUIRED, "is missing");
    gguf_expect(file, value >= least && value <= most,
                least < most ? "got %.10g, expected %.10g to %.10g" : "got %.10g, expected %.10g",
                value, least, most);
    return gguf_error(file)[0] ? least : value;
}

static const char *model_key(struct model_reader *reader, const char *key) {
    return gguf_about(reader->file, "%s.%s", reader->config->architecture, key);
}

static int model_int(struct model_reader *reader, const char *key, int fallback, int least,
                     int most) {
    int64_t value = 0;
    bool found = gguf_get_int(reader->file, model_key(reader, key), &value);
    for (size_t i = 0; i < N_HEADER && reader->bytes && !found; i++) {
        found = !strcmp(key, model_header[i]);
        value = reader->header[i];
    }
    return (int)model_check(reader->file, found, (double)value, fallback, least, most);
}

static float model_float(struct model_reader *reader, const char *key, double fallback,
                         double least, double most) {
    double value = 0;
    bool found = gguf_get_float(reader->file, model_key(reader, key), &value);
    return (float)model_check(reader->file, found, value, fallback, least, most);
}

static void model_read_kind(struct model_reader *reader, struct model_config *config) {
    static const char *const architectures[] = {"llama", "qwen2", "qwen3"};
    struct gguf *file = reader->file;
    struct gguf_string name = {"nothing", 7};
    gguf_get_string(file, gguf_about(file, "general.architecture"), &name);
    config->architecture = architectures[0];
    for (unsigned i = 0; i < 3; i++)
        if (gguf_equals(name, architectures[i])) {
            config->architecture = architectures[i];
            reader->kind = 1u << i;
        }
    reader->bytes = gguf_raw(file, &reader->size);
    if (reader->bytes) {
        reader->at = reader->size < sizeof reader->header ? 0 : sizeof reader->header;
        memcpy(reader->header, reader->bytes, reader->at);
        int32_t *vocab_size = &reader->header[HEADER_VOCAB];
        reader->kind = *vocab_size < 0 ? MODEL_UNTIED : MODEL_TIED;
        *vocab_size = *vocab_size < -INT32_MAX ? 0 : abs(*vocab_size);
    }
    gguf_expect(file, reader->kind, "got %.*s, expected llama, qwen2 or qwen3",
                (int)(name.length < 64 ? name.length : 64), name.data);
}

static void model_read_rope(struct model_reader *reader, struct model_config *config) {
    struct gguf_string scaling = {"linear", 6}; /* the format's default, by a factor of 1 */
    int head_dim = config->head_dim;
    config->rope_adjacent = !(reader->kind & (MODEL_QWEN2 | MODEL_QWEN3));
    config->rope_dim = model_int(reader, "rope.dimension_count", head_dim, 2, head_dim);
    gguf_expect(reader->file, config->rope_dim % 2 == 0, "got an odd number, %d", config->rope_dim);
    config->rope_theta = model_float(reader, "rope.freq_base", 10000, 1, 1e12);
    gguf_get_string(reader->file, model_key(reader, "rope.scaling.type"), &scaling);
    bool linear = gguf_equals(scaling, "linear");
    gguf_expect(reader->file, linear || gguf_equals(scaling, "none"), "got %.*s, expected none",
                (int)(scaling.length < 64 ? scaling.length : 64), scaling.data);
    if (linear) {
        model_float(reader, "rope.scaling.factor", 1, 1, 1);
        model_float(reader, "rope.scale_linear", 1, 1, 1);
    }
}

static void model_read_config(struct model_reader *reader, struct model_config *config) {
    struct gguf *file = reader->file;
    config->n_layers = model_int(reader, "block_count", REQUIRED, 1, 1024);
    config->d_model = model_int(reader, "embedding_length", REQUIRED, 1, 1 << 20);
    config->d_ff = model_int(reader, "feed_forward_length", REQUIRED, 1, 1 << 20);
    config->context_length = model_int(reader, "context_length", REQUIRED, 1, 1 << 24);
    int n_heads = model_int(reader, "attention.head_count", REQUIRED, 1, 1 << 16);
    int n_kv_heads = model_int(reader, "attention.head_count_kv", n_heads, 1, n_heads);
    gguf_expect(file, n_heads % n_kv_heads == 0, "got %d, expected a divisor of head_count, %d",
                n_kv_heads, n_heads);
    int head_dim = model_int(reader, "attention.key_length", config->d_model / n_heads, 2, 512);
    model_int(reader, "attention.value_length", head_dim, head_dim, head_dim);
    config->n_heads = n_heads;
    config->n_kv_heads = n_kv_heads;
    config->head_dim = head_dim;
    config->norm_epsilon = model_float(reader, "attention.layer_norm_rms_epsilon",
                                       reader->bytes ? 1e-5 : REQUIRED, 0, 1);
    model_read_rope(reader, config);
    model_int(reader, "attention.sliding_window", 0, 0, 0);
    model_int(reader, "expert_count", 0, 0, 0);
    const struct tensor *embedding = gguf_tensor(file, "token_embd.weight");
    int64_t n_tokens = embedding ? embedding->rows : reader->header[HEADER_VOCAB];
    struct gguf_array tokens = {.count = (size_t)n_tokens};
    gguf_about(file, "token_embd.weight");
    config->vocab_size = (int)model_check(file, n_tokens, (double)n_tokens, REQUIRED, 1, 1 << 24);
    gguf_get_array(file, "tokenizer.ggml.tokens", &tokens);
    gguf_expect(file, tokens.count == (size_t)n_tokens, "got %zu tokens and an embedding of %jd",
                tokens.count, (intmax_t)n_tokens);
}

/* The next tensor of a checkpoint; NULL: so many bytes are not left. */
static struct tensor *model_place(struct model_reader *reader, const char *name, int rows,
                                  int cols) {
    size_t bytes = (size_t)rows * (size_t)cols * sizeof(float);
    if (bytes > reader->size - reader->at)
        return NULL;
    *reader->placed = (struct tensor){.name = {name, strlen(name)},
                                      .type = TYPE_F32,
                                      .rows = rows,
                                      .cols = cols,
                                      .bytes = bytes,
                                      .data = reader->bytes + reader->at};
    reader->at += bytes;
    return reader->placed++;
}

static const struct tensor *model_find(struct model_reader *reader,
                                       const struct model_tensor *wanted, int layer) {
    struct gguf *file = reader->file;
    int rows = reader->extents[wanted->rows], cols = reader->extents[wanted->cols];
    bool required = wanted->required_by & reader->kind;
    const char *name = wanted->layered ? gguf_about(file, "blk.%d.%s", layer, wanted->name)
                                       : gguf_about(file, "%s", wanted->name);
    const struct tensor *tensor = required && reader->bytes
                                      ? model_place(reader, wanted->name, rows, cols)
                                      : gguf_tensor(file, name);
    gguf_expect(file, tensor || !required, "is missing; is the file complete?");
    if (!tensor)
        return NULL;
    gguf_expect(file, wanted->rows != DIM_NONE, "is not supported");
    bool typed = wanted->rows == DIM_ONE ? tensor->type == TYPE_F32 : tensor->bytes > 0;
    gguf_expect(file, typed && tensor->rows == rows && tensor->cols == cols,
                "got %s (%jd, %jd), expected %s (%d, %d)", gguf_type_name(tensor->type),
                (intmax_t)tensor->rows, (intmax_t)tensor->cols,
                wanted->rows == DIM_ONE ? "F32" : MATRIX_TYPES, rows, cols);
    return tensor;
}

static void model_read_tensors(struct model_reader *reader, struct model *model) {
    const struct model_config *config = &model->config;
    struct gguf *file = reader->file;
    size_t n_layers = (size_t)config->n_layers;
    int q_rows = config->n_heads * config->head_dim;
    int kv_rows = config->n_kv_heads * config->head_dim;
    const int extents[] = {0,
                           1,
                           config->vocab_size,
                           config->d_model,
                           q_rows,
                           kv_rows,
                           config->d_ff,
                           config->head_dim,
                           config->rope_dim / 2,
                           config->context_length};
    memcpy(reader->extents, extents, sizeof reader->extents);
    model->layers = calloc(n_layers, sizeof *model->layers);
    if (reader->bytes)
        reader->placed = model->placed =
            calloc((n_layers + 1) * N_MODEL_TENSORS, sizeof *model->placed);
    gguf_expect(file, model->layers && (model->placed || !reader->bytes), "out of memory");
    for (size_t i = 0; i < N_MODEL_TENSORS; i++) {
        const struct model_tensor *wanted = &model_tensors[i];
        size_t copies = wanted->layered ? n_layers : 1;
        for (size_t layer = 0; layer < copies && !gguf_error(file)[0]; layer++) {
            const struct tensor *tensor = model_find(reader, wanted, (int)layer);
            if (wanted->role != NO_ROLE)
                model->layers[layer][wanted->role] = tensor;
        }
    }
    gguf_expect(file, !reader->bytes || reader->at == reader->size,
                "got %zu bytes behind the last tensor, expected none", reader->size - reader->at);
    if (gguf_error(file)[0])
        return;
    const struct tensor **own = model->layers[0];
    if (!own[OUTPUT])
        own[OUTPUT] = own[TOKEN_EMBD];
    gguf_about(file, "rope_freqs.weight");
    for (int i = 0; i < config->rope_dim / 2 && own[ROPE_FREQS]; i++) {
        float divisor = ((const float *)own[ROPE_FREQS]->data)[i];
        gguf_expect(file, isfinite(divisor) && divisor > 0, "entry %d is %g", i, (double)divisor);
    }
}

bool model_open(struct model *model, struct gguf *file, char error[ERROR_LENGTH]) {
    *model = (struct model){0};
    struct model_reader reader = {.file = file, .config = &model->config};
    model_read_kind(&reader, &model->config);
    model_read_config(&reader, &model->config);
    model_read_tensors(&reader, model);
    const char *hint =
        reader.bytes ? "; it is not GGUF, and was read as a llama2.c checkpoint" : "";
    bool ok = !gguf_error(file)[0];
    (void)fail(error, "%.440s%s", gguf_error(file), ok ? "" : hint);
    if (!ok)
        model_close(model);
    return ok;
}

void model_close(struct model *model) {
    free(model->layers);
    free(model->placed);
    *model = (struct model){0};
}

/* ---- random weights ----
 *
 * Makes what looks like a GGUF file of the shape that the name stands for, in milliseconds and at
 * any size, since its matrices are one *tile* of random weights, mapped again and again:
 *
 *     in memory that has no file name:  | header, vectors | tile |
 *     address range:                    | header, vectors | tile | tile | tile | ... | part |
 *
 * Whoever reads the range, gguf.h first, sees a whole file, and every check of a file is made. The
 * matrices lie one behind the other, a gap apart, so that each begins at another place of the tile:
 * those of equal shapes are not equal. Rows repeat where a matrix is larger than the tile (struct
 * tensor: period). The same name gives the same weights, everywhere and always.
 * Sizes are such that activations neither vanish nor explode: matrices have a mean of 0 and a
 * standard deviation of about 0.02, norms are 1. There is no tokenizer: what runs is --ids. */

enum {
    RANDOM_PAGE = 1 << 16, /* a multiple of every page size, so that weights do not depend on it */
    RANDOM_TILE = 1 << 24, /* about so many bytes: few enough to make, and many to repeat */
    RANDOM_HEADER = 1 << 17, /* more than the header of 80 layers takes */
    RANDOM_ALIGNMENT = 32
};

#define RANDOM_DEVIATION 0.02

struct random_shape {
    const char *name, *architecture;
    int n_layers, d_model, n_heads, n_kv_heads, head_dim, d_ff, vocab_size, context_length;
    double theta, epsilon;
    bool tied, scaled; /* scaled: rope as in Llama 3.1 */
};

static const struct random_shape random_shapes[] = {
    {"stories-15m", "llama", 6, 288, 6, 6, 48, 768, 32000, 2048, 1e4, 1e-5, true, false},
    {"stories-110m", "llama", 12, 768, 12, 12, 64, 2048, 32000, 2048, 1e4, 1e-5, true, false},
    {"tinyllama-1.1b", "llama", 22, 2048, 32, 4, 64, 5632, 32000, 2048, 1e4, 1e-5, false, false},
    {"qwen3-0.6b", "qwen3", 28, 1024, 16, 8, 128, 3072, 151936, 40960, 1e6, 1e-6, true, false},
    {"llama-3.1-8b", "llama", 32, 4096, 32, 8, 128, 14336, 128256, 131072, 5e5, 1e-5, false, true},
    {"llama-3.1-70b", "llama", 80, 8192, 64, 8, 128, 28672, 128256, 131072, 5e5, 1e-5, false, true},
};

/* Where the scale of a block lies, and the standard deviation of a weight divided by that scale if
 * all other bytes are random. No scale: each weight is a number of its own. */
static const struct random_type {
    enum tensor_type type;
    size_t scale_at;
    double spread;
} random_types[] = {{TYPE_F32, 0, 0},      {TYPE_F16, 0, 0},     {TYPE_BF16, 0, 0},
                    {TYPE_Q8_0, 0, 73.9},  {TYPE_Q4_0, 0, 4.61}, {TYPE_Q4_K, 0, 168},
                    {TYPE_Q6_K, 208, 1366}};

enum {
    RANDOM_SHAPES = sizeof random_shapes / sizeof *random_shapes,
    RANDOM_TYPES = sizeof random_types / sizeof *random_types
};

struct random_file {
    const struct random_shape *shape;
    const struct random_type *type;
    struct gguf_block block; /* of the type */
    uint8_t *header;         /* [0, size) is written, of RANDOM_HEADER */
    size_t size;
    uint64_t n_keys, n_tensors;
    size_t data, tile;        /* bytes of the file before the vectors, and before the matrices */
    size_t vectors, matrices; /* bytes that they take */
    size_t period;            /* of the tile */
};

static size_t random_round_up(size_t value, size_t unit) {
    return (value + unit - 1) / unit * unit;
}

/* ---- what a name stands for ---- */

static bool random_equal(const char *text, size_t length, const char *name) {
    return strlen(name) == length && strncasecmp(text, name, length) == 0;
}

bool random_named(const char *name) {
    return strncmp(name, "random:", 7) == 0;
}

/* All that there is, in one line. */
static void random_list(const char *name, char *error) {
    size_t room = ERROR_LENGTH;
    size_t used = (size_t)snprintf(
        error, room,
        "%.100s: expected random:NAME or random:NAME:TYPE (default BF16); NAME:", name);
    for (size_t i = 0; i < RANDOM_SHAPES; i++)
        used += (size_t)snprintf(error + used, room - used, "%s %s", i > 0 ? "," : "",
                                 random_shapes[i].name);
    used += (size_t)snprintf(error + used, room - used, "; TYPE:");
    for (size_t i = 0; i < RANDOM_TYPES; i++)
        used += (size_t)snprintf(error + used, room - used, "%s %s", i > 0 ? "," : "",
                                 gguf_type_name(random_types[i].type));
    for (char *c = error; *c; c++)
        *c = (unsigned char)*c < ' ' || *c == 127 ? '?' : *c;
}

/* Blocks do not reach beyond a row: all numbers of columns must be multiples of theirs. */
static bool random_fits(const struct random_file *file, const char *name, char *error) {
    const struct random_shape *shape = file->shape;
    const int cols[] = {shape->d_model, shape->n_heads * shape->head_dim, shape->d_ff};
    for (size_t i = 0; i < 3; i++) {
        if (cols[i] % file->block.elements) {
            return fail(
                error,
                "%s: got matrices of %d columns, expected a multiple of %d, the block of %s; "
                "no file could have it either",
                name, cols[i], file->block.elements, gguf_type_name(file->type->type));
        }
    }
    return true;
}

static bool random_parse(struct random_file *file, const char *name, char *error) {
    const char *shape = strchr(name, ':') + 1, *colon = strchr(shape, ':');
    const char *type = colon ? colon + 1 : "BF16";
    size_t length = colon ? (size_t)(colon - shape) : strlen(shape);
    for (size_t i = 0; i < RANDOM_SHAPES; i++)
        if (random_equal(shape, length, random_shapes[i].name))
            file->shape = &random_shapes[i];
    for (size_t i = 0; i < RANDOM_TYPES; i++)
        if (random_equal(type, strlen(type), gguf_type_name(random_types[i].type)))
            file->type = &random_types[i];
    if (!file->shape || !file->type) {
        random_list(name, error);
        return false;
    }
    file->block = gguf_block(file->type->type);
    return random_fits(file, name, error);
}

/* ---- the header ---- */

static void random_put(struct random_file *file, const void *bytes, size_t n) {
    assert(n <= RANDOM_HEADER - file->size);
    memcpy(file->header + file->size, bytes, n);
    file->size += n;
}

static void random_put_int(struct random_file *file, uint64_t value, size_t bytes) {
    random_put(file, &value, bytes);
}

static void random_put_text(struct random_file *file, const char *text) {
    random_put_int(file, strlen(text), 8);
    random_put(file, text, strlen(text));
}

static void random_put_key(struct random_file *file, const char *key, enum gguf_value_type type) {
    random_put_text(file, key);
    random_put_int(file, type, 4);
    file->n_keys++;
}

/* A number, by its key behind the architecture. */
static void random_number(struct random_file *file, const char *key, enum gguf_value_type type,
                          double value) {
    char name[64];
    float real = (float)value;
    snprintf(name, sizeof name, "%s.%s", file->shape->architecture, key);
    random_put_key(file, name, type);
    if (type == GGUF_F32)
        random_put(file, &real, 4);
    else
        random_put_int(file, (uint64_t)value, 4);
}

static void random_put_keys(struct random_file *file) {
    const struct random_shape *shape = file->shape;
    random_put_key(file, "general.architecture", GGUF_STRING);
    random_put_text(file, shape->architecture);
    random_put_key(file, "general.name", GGUF_STRING);
    random_put_text(file, shape->name);
    random_number(file, "block_count", GGUF_U32, shape->n_layers);
    random_number(file, "context_length", GGUF_U32, shape->context_length);
    random_number(file, "embedding_length", GGUF_U32, shape->d_model);
    random_number(file, "feed_forward_length", GGUF_U32, shape->d_ff);
    random_number(file, "attention.head_count", GGUF_U32, shape->n_heads);
    random_number(file, "attention.head_count_kv", GGUF_U32, shape->n_kv_heads);
    random_number(file, "attention.key_length", GGUF_U32, shape->head_dim);
    random_number(file, "attention.value_length", GGUF_U32, shape->head_dim);
    random_number(file, "attention.layer_norm_rms_epsilon", GGUF_F32, shape->epsilon);
    random_number(file, "rope.freq_base", GGUF_F32, shape->theta);
}

static void random_put_name(struct random_file *file, int layer, const char *name) {
    char full[64];
    snprintf(full, sizeof full, "blk.%d.%s", layer, name);
    random_put_text(file, layer < 0 ? name : full);
    file->n_tensors++;
}

/* A tensor of a layer; of the model, if that is -1. */
static void random_vector(struct random_file *file, int layer, const char *name, int n) {
    random_put_name(file, layer, name);
    random_put_int(file, 1, 4);
    random_put_int(file, (uint64_t)n, 8);
    random_put_int(file, TYPE_F32, 4);
    random_put_int(file, file->vectors, 8);
    file->vectors += random_round_up((size_t)n * sizeof(float), RANDOM_ALIGNMENT);
}

static void random_matrix(struct random_file *file, int layer, const char *name, int rows,
                          int cols) {
    size_t unit = (size_t)file->block.bytes * RANDOM_ALIGNMENT;
    size_t bytes = (size_t)rows * (size_t)(cols / file->block.elements) * file->block.bytes;
    random_put_name(file, layer, name);
    random_put_int(file, 2, 4);
    random_put_int(file, (uint64_t)cols, 8);
    random_put_int(file, (uint64_t)rows, 8);
    random_put_int(file, file->type->type, 4);
    random_put_int(file, file->tile - file->data + file->matrices, 8);
    file->matrices += random_round_up(bytes, unit) + unit; /* whole blocks, and the gap */
}

static void random_put_tensors(struct random_file *file) {
    const struct random_shape *shape = file->shape;
    int d_model = shape->d_model, d_ff = shape->d_ff, head_dim = shape->head_dim;
    int q_rows = shape->n_heads * head_dim, kv_rows = shape->n_kv_heads * head_dim;
    if (shape->scaled)
        random_vector(file, -1, "rope_freqs.weight", head_dim / 2); /* first: random_write */
    random_vector(file, -1, "output_norm.weight", d_model);
    for (int i = 0; i < shape->n_layers; i++) {
        random_vector(file, i, "attn_norm.weight", d_model);
        random_vector(file, i, "ffn_norm.weight", d_model);
        if (strcmp(shape->architecture, "qwen3") == 0) {
            random_vector(file, i, "attn_q_norm.weight", head_dim);
            random_vector(file, i, "attn_k_norm.weight", head_dim);
        }
    }
    random_matrix(file, -1, "token_embd.weight", shape->vocab_size, d_model);
    for (int i = 0; i < shape->n_layers; i++) {
        random_matrix(file, i, "attn_q.weight", q_rows, d_model);
        random_matrix(file, i, "attn_k.weight", kv_rows, d_model);
        random_matrix(file, i, "attn_v.weight", kv_rows, d_model);
        random_matrix(file, i, "attn_output.weight", d_model, q_rows);
        random_matrix(file, i, "ffn_gate.weight", d_ff, d_model);
        random_matrix(file, i, "ffn_up.weight", d_ff, d_model);
        random_matrix(file, i, "ffn_down.weight", d_model, d_ff);
    }
    if (!shape->tied)
        random_matrix(file, -1, "output.weight", shape->vocab_size, d_model);
}

static void random_put_header(struct random_file *file) {
    uint64_t n_keys = file->n_keys, n_tensors = file->n_tensors;
    file->size = file->vectors = file->matrices = file->n_keys = file->n_tensors = 0;
    random_put(file, "GGUF\3\0\0\0", 8);
    random_put_int(file, n_tensors, 8);
    random_put_int(file, n_keys, 8);
    random_put_keys(file);
    random_put_tensors(file);
}

/* The header is written twice: where the tile begins depends on how long it is. The tile is an odd
 * number of units, so that few matrices are a multiple of it and their heads not all alike. */
static void random_plan(struct random_file *file) {
    size_t odd = file->block.bytes;
    while (odd % 2 == 0)
        odd /= 2;
    size_t unit = odd * RANDOM_PAGE;
    file->period = (RANDOM_TILE / unit | 1) * unit; /* of whole blocks and whole pages */
    random_put_header(file);
    file->data = random_round_up(file->size, RANDOM_ALIGNMENT);
    file->tile = random_round_up(file->data + file->vectors, RANDOM_PAGE);
    random_put_header(file);
}

/* ---- weights ---- */

/* SplitMix64 (Steele, Lea and Flood 2014): 64 random bits for each n. */
static uint64_t random_bits(uint64_t n) {
    uint64_t bits = (n + 1) * 0x9e3779b97f4a7c15u;
    bits = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9u;
    bits = (bits ^ bits >> 27) * 0x94d049bb133111ebu;
    return bits ^ bits >> 31;
}

/* Rounded towards 0; less than 65536. The factor turns one format's exponent into the other's. */
static uint16_t random_half(float value) {
    float small = fabsf(value) * 0x1p-112f;
    uint32_t bits;
    memcpy(&bits, &small, 4);
    return (uint16_t)(bits >> 13 | (value < 0 ? 0x8000u : 0));
}

/* Random bits become a number from -deviation * sqrt(3) to as much, of the type's size. */
static void random_weight(enum tensor_type type, uint8_t *weight) {
    const float largest = (float)(RANDOM_DEVIATION * sqrt(3));
    int32_t wide;
    int16_t narrow;
    float value;
    if (type == TYPE_F32) {
        memcpy(&wide, weight, 4);
        value = (float)wide * 0x1p-31f * largest;
        memcpy(weight, &value, 4);
        return;
    }
    memcpy(&narrow, weight, 2);
    value = (float)narrow * 0x1p-15f * largest;
    uint16_t half = random_half(value);
    memcpy(weight, type == TYPE_F16 ? (uint8_t *)&half : (uint8_t *)&value + 2, 2);
}

/* The random bytes of a block stay, but for its scales, which are made such that the mean is 0. */
static void random_scale(const struct random_type *type, uint8_t *block) {
    uint16_t bits, half;
    memcpy(&bits, block + type->scale_at, 2);
    float scale = (float)(RANDOM_DEVIATION / type->spread * (0.75 + bits * 0x1p-17));
    if (type->type == TYPE_Q4_0 && bits & 1) /* from -8 to 7: the mean is not 0 */
        scale = -scale;
    half = random_half(scale);
    memcpy(block + type->scale_at, &half, 2);
    if (type->type == TYPE_Q4_K) { /* weight = d * s * bits - m * t: s = t, and m = 7.5 d */
        half = random_half(scale * 7.5f);
        memcpy(block + 2, &half, 2);
        memcpy(block + 8, block + 4, 4); /* s and t of six bits: see pack_header in pack.h */
        for (int i = 12; i < 16; i++)
            block[i] = (uint8_t)((block[i] & 15) * 17);
    }
}

/* What a frequency of Llama 3.1 is divided by: 1 if its wave is much shorter than the 8192 tokens
 * that the model was trained on first, 8 if it is longer, and something between. */
static float random_rope(double theta, int pair, int head_dim) {
    double wave = 2 * M_PI * pow(theta, 2.0 * pair / head_dim), waves = 8192 / wave;
    double share = (waves - 1) / (4 - 1);
    share = share < 0 ? 0 : share > 1 ? 1 : share;
    return (float)(1 / (share + (1 - share) / 8));
}

/* Writes header, vectors and tile into the memory that stands for the file. */
static void random_write(const struct random_file *file, uint8_t *to) {
    const struct random_shape *shape = file->shape;
    size_t bytes = file->block.bytes;
    const float one = 1;
    memcpy(to, file->header, file->size);
    for (size_t at = 0; at < file->vectors; at += sizeof one)
        memcpy(to + file->data + at, &one, sizeof one);
    for (int i = 0; i < shape->head_dim / 2 && shape->scaled; i++) {
        float divisor = random_rope(shape->theta, i, shape->head_dim);
        memcpy(to + file->data + (size_t)i * sizeof divisor, &divisor, sizeof divisor);
    }
    to += file->tile;
    for (size_t at = 0; at < file->period; at += 8) {
        uint64_t bits = random_bits(at / 8);
        memcpy(to + at, &bits, 8);
    }
    for (size_t at = 0; at < file->period; at += bytes)
        if (file->block.elements == 1)
            random_weight(file->type->type, to + at);
        else
            random_scale(file->type, to + at);
}

/* ---- the address range ---- */

/* Maps [from, from + bytes) of the memory at `range + at`, over what is reserved there. */
static bool random_place(uint8_t *range, size_t at, size_t bytes, int memory, size_t from) {
    return mmap(range + at, bytes, PROT_READ, MAP_SHARED | MAP_FIXED, memory, (off_t)from) !=
           MAP_FAILED;
}

/* NULL: errno. */
static uint8_t *random_map(const struct random_file *file, int memory, size_t size) {
    size_t held = file->tile + file->period;
    if (memory < 0 || ftruncate(memory, (off_t)held) != 0)
        return NULL;
    uint8_t *writable = mmap(NULL, held, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
    if (writable == MAP_FAILED)
        return NULL;
    random_write(file, writable);
    munmap(writable, held);
    uint8_t *range =
        mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (range == MAP_FAILED)
        return NULL;
    bool ok = random_place(range, 0, file->tile, memory, 0);
    for (size_t at = file->tile; at < size && ok; at += file->period) {
        size_t left = size - at;
        ok = random_place(range, at, left < file->period ? left : file->period, memory, file->tile);
    }
    if (ok)
        return range;
    int why = errno;
    munmap(range, size);
    errno = why;
    return NULL;
}

struct gguf *random_open(const char *name, char error[ERROR_LENGTH]) {
    struct random_file file = {.header = calloc(1, RANDOM_HEADER)};
    uint8_t *range = NULL;
    size_t size = 0;
    (void)fail(error, "%.100s: out of memory", name);
    if (file.header && random_parse(&file, name, error)) {
        random_plan(&file);
        size = file.tile + file.matrices;
        int memory = memfd_create(name, MFD_CLOEXEC);
        range = random_map(&file, memory, size);
        (void)fail(error, "%.100s: %zu bytes cannot be mapped: %s", name, size, strerror(errno));
        if (memory >= 0)
            close(memory);
    }
    free(file.header);
    return range ? gguf_open_map(name, range, size, file.period, error) : NULL;
}

struct gguf *source_open(const char *name, char error[ERROR_LENGTH]) {
    return random_named(name) ? random_open(name, error) : source_parts(name, error);
}

#endif /* MODEL_IMPLEMENTATION */
