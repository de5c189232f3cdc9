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

/* Fills `model` from the file: every key, shape and type checked. False: `error` is one line. */
bool model_open(struct model *model, struct gguf *file, char error[ERROR_LENGTH]);
void model_close(struct model *model);

#endif /* MODEL_H */

#ifdef MODEL_IMPLEMENTATION
#undef MODEL_IMPLEMENTATION

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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

#endif /* MODEL_IMPLEMENTATION */
