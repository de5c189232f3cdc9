/* model.h: which model a file holds, a GGUF file or a llama2.c v0 checkpoint, and its tensors.
 *
 *     struct model model;
 *     struct gguf *file = gguf_open("model.gguf", error);
 *     if (!file || !model_open(&model, file, error))
 *         fprintf(stderr, "dynamo: %s\n", error);
 *     ... model.layers[3].attn_q->data ...
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

/* One layer's tensors. Optional ones are NULL: biases (qwen2), q/k norms (qwen3). */
struct model_layer {
    const struct tensor *attn_norm;                 /* (d_model) */
    const struct tensor *attn_q;                    /* (n_heads * head_dim, d_model) */
    const struct tensor *attn_k, *attn_v;           /* (n_kv_heads * head_dim, d_model) */
    const struct tensor *q_bias, *k_bias, *v_bias;  /* (n_heads * head_dim), (n_kv_heads * ...) */
    const struct tensor *attn_q_norm, *attn_k_norm; /* (head_dim) */
    const struct tensor *attn_output;               /* (d_model, n_heads * head_dim) */
    const struct tensor *ffn_norm;                  /* (d_model) */
    const struct tensor *ffn_gate, *ffn_up;         /* (d_ff, d_model) */
    const struct tensor *ffn_down;                  /* (d_model, d_ff) */
};

struct model {
    struct model_config config;
    const struct tensor *token_embd;  /* (vocab_size, d_model) */
    const struct tensor *output_norm; /* (d_model) */
    const struct tensor *output;      /* (vocab_size, d_model); token_embd again where tied */
    const struct tensor *rope_freqs;  /* (rope_dim / 2) divisors of the frequencies, or NULL */
    struct model_layer *layers;       /* (n_layers) */
    struct tensor *placed;            /* of a llama2.c checkpoint, which lists none; else NULL */
    const struct tensor *rope_tables; /* a checkpoint's, obsolete */
};

/* Fills `model` from the file: every key, shape and type checked. False: `error` is one line. */
bool model_open(struct model *model, struct gguf *file, char error[GGUF_ERROR_LENGTH]);
void model_close(struct model *model);

#endif /* MODEL_H */

#ifdef MODEL_IMPLEMENTATION
#undef MODEL_IMPLEMENTATION

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What a file can be; a tied checkpoint ends before output.weight. Combined: who needs a tensor. */
enum { LLAMA = 1, QWEN2 = 2, QWEN3 = 4, TIED = 8, UNTIED = 16, ALL = 31 };
enum { REQUIRED = -1 }; /* in place of a default */

/* What rows and columns count; CONTEXT is the last. */
enum extent { NONE, ONE, VOCAB, D_MODEL, Q_ROWS, KV_ROWS, D_FF, HEAD_DIM, ROPE_PAIRS, CONTEXT };

/* Those that gguf.h knows the size of. */
#define MATRIX_TYPES "F32, F16, BF16, Q8_0, Q4_0, Q4_K or Q6_K"

#define IN_MODEL(field) false, offsetof(struct model, field)
#define IN_LAYER(field) true, offsetof(struct model_layer, field)

/* In a checkpoint's order, each for all layers. Those of one row are F32 everywhere. */
static const struct model_tensor {
    const char *name; /* behind `blk.N.`, if layered */
    bool layered;
    size_t field; /* offset in struct model or struct model_layer */
    enum extent rows, cols;
    unsigned required_by; /* optional elsewhere, but in a checkpoint absent */
} model_tensors[] = {
    {"token_embd.weight", IN_MODEL(token_embd), VOCAB, D_MODEL, ALL},
    {"attn_norm.weight", IN_LAYER(attn_norm), ONE, D_MODEL, ALL},
    {"attn_q.weight", IN_LAYER(attn_q), Q_ROWS, D_MODEL, ALL},
    {"attn_k.weight", IN_LAYER(attn_k), KV_ROWS, D_MODEL, ALL},
    {"attn_v.weight", IN_LAYER(attn_v), KV_ROWS, D_MODEL, ALL},
    {"attn_output.weight", IN_LAYER(attn_output), D_MODEL, Q_ROWS, ALL},
    {"ffn_norm.weight", IN_LAYER(ffn_norm), ONE, D_MODEL, ALL},
    {"ffn_gate.weight", IN_LAYER(ffn_gate), D_FF, D_MODEL, ALL},
    {"ffn_down.weight", IN_LAYER(ffn_down), D_MODEL, D_FF, ALL},
    {"ffn_up.weight", IN_LAYER(ffn_up), D_FF, D_MODEL, ALL},
    {"output_norm.weight", IN_MODEL(output_norm), ONE, D_MODEL, ALL},
    {"rope_tables", IN_MODEL(rope_tables), CONTEXT, HEAD_DIM, TIED | UNTIED},
    {"output.weight", IN_MODEL(output), VOCAB, D_MODEL, UNTIED},
    {"rope_freqs.weight", IN_MODEL(rope_freqs), ONE, ROPE_PAIRS, 0},
    {"attn_q.bias", IN_LAYER(q_bias), ONE, Q_ROWS, QWEN2},
    {"attn_k.bias", IN_LAYER(k_bias), ONE, KV_ROWS, QWEN2},
    {"attn_v.bias", IN_LAYER(v_bias), ONE, KV_ROWS, QWEN2},
    {"attn_q_norm.weight", IN_LAYER(attn_q_norm), ONE, HEAD_DIM, QWEN3},
    {"attn_k_norm.weight", IN_LAYER(attn_k_norm), ONE, HEAD_DIM, QWEN3},
    {"attn_output.bias", IN_LAYER(attn_output), NONE, NONE, 0}, /* refused: text would be wrong */
    {"ffn_gate.bias", IN_LAYER(ffn_gate), NONE, NONE, 0},
    {"ffn_up.bias", IN_LAYER(ffn_up), NONE, NONE, 0},
    {"ffn_down.bias", IN_LAYER(ffn_down), NONE, NONE, 0},
};

enum { N_TENSORS = sizeof model_tensors / sizeof *model_tensors };

/* The int32 that begin a checkpoint; vocab_size is negative if it is untied. */
static const char *const model_header[] = {
    "embedding_length",        "feed_forward_length", "block_count",   "attention.head_count",
    "attention.head_count_kv", "vocab_size",          "context_length"};

enum { N_HEADER = sizeof model_header / sizeof *model_header, HEADER_VOCAB = 5 };

struct model_reader {
    struct gguf *file;
    struct model_config *config;
    unsigned kind;            /* LLAMA to UNTIED */
    const uint8_t *bytes;     /* (size) of a checkpoint; NULL: GGUF */
    size_t size, at;          /* [0, at) has been laid out */
    int32_t header[N_HEADER]; /* of a checkpoint */
    struct tensor *placed;    /* the next to be laid out */
    int extents[CONTEXT + 1];
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
        reader->kind = *vocab_size < 0 ? UNTIED : TIED;
        *vocab_size = *vocab_size < -INT32_MAX ? 0 : abs(*vocab_size);
    }
    gguf_expect(file, reader->kind, "got %.*s, expected llama, qwen2 or qwen3",
                (int)(name.length < 64 ? name.length : 64), name.data);
}

static void model_read_rope(struct model_reader *reader, struct model_config *config) {
    struct gguf_string scaling = {"linear", 6}; /* the format's default, by a factor of 1 */
    int head_dim = config->head_dim;
    config->rope_adjacent = !(reader->kind & (QWEN2 | QWEN3));
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
    gguf_expect(file, wanted->rows != NONE, "is not supported");
    bool typed = wanted->rows == ONE ? tensor->type == TYPE_F32 : tensor->bytes > 0;
    gguf_expect(file, typed && tensor->rows == rows && tensor->cols == cols,
                "got %s (%jd, %jd), expected %s (%d, %d)", gguf_type_name(tensor->type),
                (intmax_t)tensor->rows, (intmax_t)tensor->cols,
                wanted->rows == ONE ? "F32" : MATRIX_TYPES, rows, cols);
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
        reader->placed = model->placed = calloc((n_layers + 1) * N_TENSORS, sizeof *model->placed);
    gguf_expect(file, model->layers && (model->placed || !reader->bytes), "out of memory");
    for (size_t i = 0; i < N_TENSORS; i++) {
        const struct model_tensor *wanted = &model_tensors[i];
        size_t copies = wanted->layered ? n_layers : 1;
        for (size_t layer = 0; layer < copies && !gguf_error(file)[0]; layer++) {
            char *owner = wanted->layered ? (char *)&model->layers[layer] : (char *)model;
            const struct tensor *tensor = model_find(reader, wanted, (int)layer);
            if (tensor)
                *(const struct tensor **)(void *)(owner + wanted->field) = tensor;
        }
    }
    gguf_expect(file, !reader->bytes || reader->at == reader->size,
                "got %zu bytes behind the last tensor, expected none", reader->size - reader->at);
    if (!model->output)
        model->output = model->token_embd;
    gguf_about(file, "rope_freqs.weight");
    for (int i = 0; i < config->rope_dim / 2 && model->rope_freqs && !gguf_error(file)[0]; i++) {
        float divisor = ((const float *)model->rope_freqs->data)[i];
        gguf_expect(file, isfinite(divisor) && divisor > 0, "entry %d is %g", i, (double)divisor);
    }
}

bool model_open(struct model *model, struct gguf *file, char error[GGUF_ERROR_LENGTH]) {
    *model = (struct model){0};
    struct model_reader reader = {.file = file, .config = &model->config};
    model_read_kind(&reader, &model->config);
    model_read_config(&reader, &model->config);
    model_read_tensors(&reader, model);
    const char *hint =
        reader.bytes ? "; it is not GGUF, and was read as a llama2.c checkpoint" : "";
    bool ok = !gguf_error(file)[0];
    snprintf(error, GGUF_ERROR_LENGTH, "%.440s%s", gguf_error(file), ok ? "" : hint);
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
