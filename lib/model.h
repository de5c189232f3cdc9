/* model.h: a model: what MODEL names is opened, and its tensors are found, checked, or made.
 *
 *     struct model model;
 *     if (!model_open(&model, "model.gguf", error))
 *         fprintf(stderr, "dynamo: %s\n", error);
 *     ... model.layers[3][ATTN_Q]->data ...
 *     model_close(&model);
 *
 * MODEL is a GGUF file, whole or any of its parts; a llama2.c v0 checkpoint; or `random:NAME:TYPE`,
 * random weights of a known shape. A checkpoint has no mark: it is what is not GGUF and has exactly
 * the size that its header implies.
 * Owns the file, the list of layers, and what tensors there are besides those of the file. Weights
 * stay in the file's map.
 * Data flow: keys, a checkpoint's header or a row of random_shapes -> config -> the table
 * model_tensors: each is found by name and compared; in a checkpoint it is laid out behind the one
 * before; random ones are laid out over a tile of random weights.
 * Refuses: every model that the forward pass would get wrong.
 * Define MODEL_IMPLEMENTATION in one file, before including this (gguf.h's is needed, too).
 * Read next: dynamo.c. */
#ifndef MODEL_H
#define MODEL_H

#if defined MODEL_IMPLEMENTATION && !defined _GNU_SOURCE
#define _GNU_SOURCE /* memfd_create; too late behind a header of the system */
#endif
#include "gguf.h"

enum gate_function {
    ACTIVATE_SILU,   /* silu(gate) * up */
    ACTIVATE_GELU,   /* gelu(gate) * up, by tanh */
    ACTIVATE_CLAMPED /* gpt-oss: g * sigmoid(1.702 g) * (u + 1), g = min(gate, 7), |u| <= 7 */
};

struct model_config {
    const char *architecture; /* llama, qwen2, qwen3, qwen3moe, gpt-oss, gemma3 */
    int n_layers, d_model, n_heads, n_kv_heads, head_dim, d_ff, vocab_size, context_length;
    int rope_dim;       /* leading elements of a head that rope turns: head_dim in all of these */
    bool rope_adjacent; /* pairs (2i, 2i+1), as in `llama`; else (i, i + head_dim / 2) */
    float rope_theta, norm_epsilon;
    /* of some models alone; 0 is what the others do */
    int n_experts, n_used; /* of a layer, d_ff each; and of a row, those of the largest logits */
    bool share_of_all;     /* a row's experts are weighted by softmax over all, not over its own */
    enum gate_function activation;
    int window, window_period;              /* see model_window */
    bool post_norm;                         /* what attention and FFN add to x is normed before */
    float embedding_scale, attention_scale; /* 0: 1; 1 / sqrt(head_dim) */
    float theta_windowed;                   /* of layers that have a window; 0: rope_theta */
    float rope_scale;          /* positions are divided by it, in layers that see all; 0: 1 */
    float rope_magnitude;      /* cosine and sine are multiplied by it; 0: 1 */
    float yarn_low, yarn_high; /* YaRN: the pairs between which rope_scale sets in; high 0: all */
};

/* The tokens that a query of a layer sees at most, its own among them. Each window_period-th layer
 * sees all; 0: none does. */
static inline int model_window(const struct model_config *config, int layer) {
    bool all = config->window_period > 0 && (layer + 1) % config->window_period == 0;
    return config->window > 0 && !all ? config->window : INT32_MAX;
}

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
    Q_BIAS, /* biases: qwen2, gpt-oss */
    K_BIAS,
    V_BIAS,
    ATTN_Q_NORM, /* norms over head_dim: qwen3 */
    ATTN_K_NORM,
    ATTN_SINKS, /* a logit of each head that no value goes with: gpt-oss */
    ATTN_OUTPUT,
    ATTN_OUTPUT_BIAS,
    ATTN_POST_NORM, /* gemma3 */
    FFN_NORM,
    FFN_GATE, /* these six: absent where there are experts */
    FFN_UP,
    FFN_DOWN,
    FFN_GATE_BIAS,
    FFN_UP_BIAS,
    FFN_DOWN_BIAS,
    ROUTER,
    ROUTER_BIAS,
    GATE_EXPERTS, /* the rows of all experts, one expert after another */
    UP_EXPERTS,
    DOWN_EXPERTS,
    GATE_EXPERTS_BIAS,
    UP_EXPERTS_BIAS,
    DOWN_EXPERTS_BIAS,
    FFN_POST_NORM, /* gemma3 */
    N_ROLES
};

/* The tensors of a layer that are multiplied together with that of a role, itself among them: q, k
 * and v; gate and up. In this order, NULL behind the last. */
static inline void model_together(const struct tensor *const *layer, int role,
                                  const struct tensor *together[4]) {
    static const struct {
        int first, last;
    } all[] = {{ATTN_Q, ATTN_V}, {FFN_GATE, FFN_UP}, {GATE_EXPERTS, UP_EXPERTS}};
    int first = role, last = role;
    for (int i = 0; i < 3; i++)
        if (role >= all[i].first && role <= all[i].last) {
            first = all[i].first;
            last = all[i].last;
        }
    for (int i = first; i <= last; i++)
        together[i - first] = layer[i];
    together[last - first + 1] = NULL;
}

enum slice_kind {
    SLICE_WHOLE,
    SLICE_ROWS,
    SLICE_COLS,
    SLICE_EXPERTS /* some of the experts, whole ones: those of expert_group */
};

enum { MODEL_MOST_USED = 16 }; /* experts of a row */

struct slice { /* which part of a tensor a shard holds: part `rank` of `count` equal ones */
    enum slice_kind kind;
    int rank, count;
};

/* A product whose K shards cut (SLICE_COLS) is summed in so many segments, combined by a binary
 * tree, so that every number of shards that divides it gives the same bits. */
enum { K_SEGMENTS = 8 };

/* So are the experts of a row: a shard has those of as many groups as it would have segments. Cut
 * in this way, an expert's rows are not, and neither are the blocks of its weights. */
static inline int expert_group(const struct model_config *config, int expert) {
    return expert * K_SEGMENTS / config->n_experts;
}

/* Where segment `index` of a K of `cols` begins; all end at multiples of `unit`. */
static inline int segment_begin(int cols, int unit, int index) {
    int64_t n_units = (cols + unit - 1) / unit;
    int begin = (int)(index * n_units / K_SEGMENTS) * unit;
    return begin < cols ? begin : cols;
}

/* What rows and columns of a tensor count. */
enum extent {
    DIM_ONE,
    DIM_VOCAB,
    DIM_MODEL,
    DIM_Q,  /* n_heads * head_dim */
    DIM_KV, /* n_kv_heads * head_dim */
    DIM_FF,
    DIM_HEAD,
    DIM_HEADS,
    DIM_ROPE, /* rope_dim / 2 */
    DIM_CONTEXT,
    DIM_EXPERTS,
    DIM_EXPERTS_FF, /* n_experts * d_ff */
    DIM_EXPERTS_MODEL
};

/* What a model can be. Combined: who needs a tensor. */
enum {
    MODEL_LLAMA = 1,
    MODEL_QWEN2 = 2,
    MODEL_QWEN3 = 4,
    MODEL_QWEN3MOE = 8,
    MODEL_GPT_OSS = 16,
    MODEL_GEMMA3 = 32,
    MODEL_DENSE = 64,    /* a feed-forward part in each layer */
    MODEL_EXPERTS = 128, /* several, of which each row takes a few */
    MODEL_TIED = 256,    /* its output is its embedding: known of checkpoints and random weights */
    MODEL_UNTIED = 512,  /* it is not: likewise */
    MODEL_SCALED = 1024, /* rope as in Llama 3.1: known of random weights */
    MODEL_ALL = 2047,
    MODEL_BIASED = MODEL_LLAMA | MODEL_QWEN2 | MODEL_QWEN3 | MODEL_QWEN3MOE, /* may be */
    MODEL_QK_NORM = MODEL_QWEN3 | MODEL_QWEN3MOE | MODEL_GEMMA3,
    MODEL_QKV_BIAS = MODEL_QWEN2 | MODEL_GPT_OSS
};

/* One row for each tensor that a model can have: all that loading, sharding, counting and making
 * random models know of it. In the order of a llama2.c checkpoint, each for all layers. In a model
 * that neither column names it is refused, for its text would be wrong. */
struct model_tensor {
    const char *name;       /* behind `blk.N.`, if each layer has one */
    int role;               /* enum tensor_role */
    enum extent rows, cols; /* DIM_ONE row: vectors, F32 */
    unsigned required_by;   /* kinds of model */
    unsigned optional_in;   /* … that may lack it, as checkpoints do */
    enum slice_kind slice;  /* a shard has rows of q, k, v, gate, up; columns of output and down */
};
static const struct model_tensor model_tensors[] = {
    {"token_embd.weight", TOKEN_EMBD, DIM_VOCAB, DIM_MODEL, MODEL_ALL, 0, SLICE_WHOLE},
    {"attn_norm.weight", ATTN_NORM, DIM_ONE, DIM_MODEL, MODEL_ALL, 0, SLICE_WHOLE},
    {"attn_q.weight", ATTN_Q, DIM_Q, DIM_MODEL, MODEL_ALL, 0, SLICE_ROWS},
    {"attn_k.weight", ATTN_K, DIM_KV, DIM_MODEL, MODEL_ALL, 0, SLICE_ROWS},
    {"attn_v.weight", ATTN_V, DIM_KV, DIM_MODEL, MODEL_ALL, 0, SLICE_ROWS},
    {"attn_output.weight", ATTN_OUTPUT, DIM_MODEL, DIM_Q, MODEL_ALL, 0, SLICE_COLS},
    {"ffn_norm.weight", FFN_NORM, DIM_ONE, DIM_MODEL, MODEL_ALL, 0, SLICE_WHOLE},
    {"ffn_gate.weight", FFN_GATE, DIM_FF, DIM_MODEL, MODEL_DENSE, 0, SLICE_ROWS},
    {"ffn_down.weight", FFN_DOWN, DIM_MODEL, DIM_FF, MODEL_DENSE, 0, SLICE_COLS},
    {"ffn_up.weight", FFN_UP, DIM_FF, DIM_MODEL, MODEL_DENSE, 0, SLICE_ROWS},
    {"output_norm.weight", OUTPUT_NORM, DIM_ONE, DIM_MODEL, MODEL_ALL, 0, SLICE_WHOLE},
    {"rope_tables", NO_ROLE, DIM_CONTEXT, DIM_HEAD, MODEL_TIED | MODEL_UNTIED, 0, SLICE_WHOLE},
    {"output.weight", OUTPUT, DIM_VOCAB, DIM_MODEL, MODEL_UNTIED, MODEL_ALL, SLICE_WHOLE},
    {"rope_freqs.weight", ROPE_FREQS, DIM_ONE, DIM_ROPE, MODEL_SCALED, MODEL_ALL, SLICE_WHOLE},
    {"attn_q.bias", Q_BIAS, DIM_ONE, DIM_Q, MODEL_QKV_BIAS, MODEL_ALL, SLICE_ROWS},
    {"attn_k.bias", K_BIAS, DIM_ONE, DIM_KV, MODEL_QKV_BIAS, MODEL_ALL, SLICE_ROWS},
    {"attn_v.bias", V_BIAS, DIM_ONE, DIM_KV, MODEL_QKV_BIAS, MODEL_ALL, SLICE_ROWS},
    {"attn_q_norm.weight", ATTN_Q_NORM, DIM_ONE, DIM_HEAD, MODEL_QK_NORM, MODEL_ALL, SLICE_WHOLE},
    {"attn_k_norm.weight", ATTN_K_NORM, DIM_ONE, DIM_HEAD, MODEL_QK_NORM, MODEL_ALL, SLICE_WHOLE},
    {"attn_output.bias", ATTN_OUTPUT_BIAS, DIM_ONE, DIM_MODEL, MODEL_GPT_OSS, MODEL_BIASED,
     SLICE_WHOLE},
    {"attn_sinks.weight", ATTN_SINKS, DIM_ONE, DIM_HEADS, MODEL_GPT_OSS, 0, SLICE_ROWS},
    {"post_attention_norm.weight", ATTN_POST_NORM, DIM_ONE, DIM_MODEL, MODEL_GEMMA3, 0,
     SLICE_WHOLE},
    {"post_ffw_norm.weight", FFN_POST_NORM, DIM_ONE, DIM_MODEL, MODEL_GEMMA3, 0, SLICE_WHOLE},
    {"ffn_gate.bias", FFN_GATE_BIAS, DIM_ONE, DIM_FF, 0, MODEL_BIASED, SLICE_ROWS},
    {"ffn_up.bias", FFN_UP_BIAS, DIM_ONE, DIM_FF, 0, MODEL_BIASED, SLICE_ROWS},
    {"ffn_down.bias", FFN_DOWN_BIAS, DIM_ONE, DIM_MODEL, 0, MODEL_BIASED, SLICE_WHOLE},
    {"ffn_gate_inp.weight", ROUTER, DIM_EXPERTS, DIM_MODEL, MODEL_EXPERTS, 0, SLICE_WHOLE},
    {"ffn_gate_inp.bias", ROUTER_BIAS, DIM_ONE, DIM_EXPERTS, MODEL_GPT_OSS, 0, SLICE_WHOLE},
    {"ffn_gate_exps.weight", GATE_EXPERTS, DIM_EXPERTS_FF, DIM_MODEL, MODEL_EXPERTS, 0,
     SLICE_EXPERTS},
    {"ffn_up_exps.weight", UP_EXPERTS, DIM_EXPERTS_FF, DIM_MODEL, MODEL_EXPERTS, 0, SLICE_EXPERTS},
    {"ffn_down_exps.weight", DOWN_EXPERTS, DIM_EXPERTS_MODEL, DIM_FF, MODEL_EXPERTS, 0,
     SLICE_EXPERTS},
    {"ffn_gate_exps.bias", GATE_EXPERTS_BIAS, DIM_ONE, DIM_EXPERTS_FF, MODEL_GPT_OSS, 0,
     SLICE_EXPERTS},
    {"ffn_up_exps.bias", UP_EXPERTS_BIAS, DIM_ONE, DIM_EXPERTS_FF, MODEL_GPT_OSS, 0, SLICE_EXPERTS},
    {"ffn_down_exps.bias", DOWN_EXPERTS_BIAS, DIM_ONE, DIM_EXPERTS_MODEL, MODEL_GPT_OSS, 0,
     SLICE_EXPERTS},
};
enum { N_MODEL_TENSORS = sizeof model_tensors / sizeof *model_tensors };

static inline bool model_layered(const struct model_tensor *entry) { /* each layer has one */
    return entry->role >= ATTN_NORM;
}

struct model {
    struct model_config config;
    const struct tensor *(*layers)[N_ROLES]; /* (n_layers) by role; absent ones are NULL */
    struct gguf *file;                       /* NULL: random weights */
    bool is_checkpoint;    /* llama2.c's, which has its tokenizer in a file beside it */
    struct tensor *placed; /* (n_placed) those that no file lists */
    void *random;          /* (random_bytes) random weights; else NULL */
    size_t random_bytes;
    int n_placed;
};

/* Opens what `name` names: every key, shape and type is checked. False: `error` is one line. */
bool model_open(struct model *model, const char *name, char error[ERROR_LENGTH]);
void model_close(struct model *model);
/* A line each: which types are kept as others, which keys and tensors change nothing here. */
void model_notes(const struct model *model, FILE *to);
bool model_is_random(const char *name); /* it begins with `random:` */

static inline enum tensor_type model_main_type(const struct model *model) { /* of most weights */
    const struct tensor *gate = model->layers[0][FFN_GATE];
    return (gate ? gate : model->layers[0][GATE_EXPERTS])->type;
}

#endif /* MODEL_H */

#ifdef MODEL_IMPLEMENTATION
#undef MODEL_IMPLEMENTATION

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/mman.h>
#include <unistd.h>

enum { REQUIRED = -1 }; /* in place of a default */

/* The int32 that begin a checkpoint; vocab_size is negative if it is untied. */
static const char *const model_header[] = {
    "embedding_length",        "feed_forward_length", "block_count",   "attention.head_count",
    "attention.head_count_kv", "vocab_size",          "context_length"};

enum { N_HEADER = sizeof model_header / sizeof *model_header, HEADER_VOCAB = 5 };

static const char *const model_architectures[] = {"llama",   "qwen2", "qwen3", "qwen3moe",
                                                  "gpt-oss", "gemma3"}; /* bit i of a kind */

/* What no key tells. */
static void model_set_family(struct model_config *config, unsigned kind) {
    config->rope_adjacent = !strcmp(config->architecture, "llama");
    if (kind & MODEL_GPT_OSS) {
        config->activation = ACTIVATE_CLAMPED;
        config->window_period = 2;
    }
    if (kind & MODEL_GEMMA3) {
        config->activation = ACTIVATE_GELU;
        config->window_period = 6;
        config->post_norm = true;
        config->embedding_scale = sqrtf((float)config->d_model);
        if (config->n_layers == 62) /* the 27B */
            config->attention_scale = 1 / sqrtf((float)config->d_model / (float)config->n_heads);
    }
}

/* ---- tensors, as the table has them ---- */

static int model_extent(const struct model_config *config, enum extent extent) {
    const int extents[] = {[DIM_ONE] = 1,
                           [DIM_VOCAB] = config->vocab_size,
                           [DIM_MODEL] = config->d_model,
                           [DIM_Q] = config->n_heads * config->head_dim,
                           [DIM_KV] = config->n_kv_heads * config->head_dim,
                           [DIM_FF] = config->d_ff,
                           [DIM_HEAD] = config->head_dim,
                           [DIM_HEADS] = config->n_heads,
                           [DIM_EXPERTS] = config->n_experts,
                           [DIM_EXPERTS_FF] = config->n_experts * config->d_ff,
                           [DIM_EXPERTS_MODEL] = config->n_experts * config->d_model,
                           [DIM_ROPE] = config->rope_dim / 2,
                           [DIM_CONTEXT] = config->context_length};
    return extents[extent];
}

/* Room for what the config says. */
static bool model_reserve(struct model *model) {
    size_t n_layers = (size_t)model->config.n_layers;
    model->layers = calloc(n_layers, sizeof *model->layers);
    model->placed = calloc((n_layers + 1) * N_MODEL_TENSORS, sizeof *model->placed);
    return model->layers && model->placed;
}

/* A tensor that no file lists: it has the shape that the config gives it. */
static struct tensor *model_place(struct model *model, const struct model_tensor *entry,
                                  enum tensor_type type, const void *data) {
    int rows = model_extent(&model->config, entry->rows);
    int cols = model_extent(&model->config, entry->cols);
    struct gguf_block block = gguf_block(type);
    struct tensor *tensor = &model->placed[model->n_placed++];
    size_t bytes = (size_t)rows * (size_t)(cols / block.elements) * block.bytes;
    struct gguf_string name = {entry->name, strlen(entry->name)};
    *tensor = (struct tensor){
        .name = name, .type = type, .rows = rows, .cols = cols, .bytes = bytes, .data = data};
    return tensor;
}

/* ---- files ---- */

struct model_reader {
    struct gguf *file;
    struct model_config *config;
    unsigned kind;            /* MODEL_LLAMA to MODEL_UNTIED */
    const uint8_t *bytes;     /* (size) of a checkpoint; NULL: GGUF */
    size_t size, at;          /* [0, at) has been laid out */
    int32_t header[N_HEADER]; /* of a checkpoint */
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

/* What is neither GGUF nor a checkpoint, by how it begins. */
static void model_refuse_format(struct gguf *file) {
    static const char web[] = "a page of the web, not a model; was the download refused?";
    static const struct {
        size_t at;
        const char *begin, *is;
    } formats[] = {
        {0, "version https://git-lfs", "a Git LFS pointer, not the file; run git lfs pull"},
        {0, "<!doctype", web},
        {0, "<html", web},
        {0, "<?xml", web},
        {0, "PK\3\4", "a zip archive, such as PyTorch writes; convert it to GGUF"},
        {0, "\x80\2\x8a\n", "a pickle, such as PyTorch wrote; convert it to GGUF"},
        {8, "{\"", "a safetensors file; convert it to GGUF"},
        {0, "tjgg", "in the format before GGUF; convert it again"}};
    size_t size;
    const char *bytes = gguf_raw(file, &size);
    gguf_about(file, "%s", "");
    for (size_t i = 0; i < sizeof formats / sizeof *formats && bytes; i++) {
        size_t at = formats[i].at, length = strlen(formats[i].begin);
        bool found = size >= at + length && !strncasecmp(bytes + at, formats[i].begin, length);
        gguf_expect(file, !found, "is %s", formats[i].is);
    }
    /* a server's refusal, say: in a checkpoint there are zeros */
    size_t most = size < 64 ? size : 64, n = 0;
    for (uint8_t c; bytes && n < most; n++)
        if ((c = (uint8_t)bytes[n]) >= 0xF5 || (c < ' ' && (c < '\t' || c > '\r')))
            break;
    gguf_expect(file, !bytes || n < most, "is text, not a model: %.*s", (int)n, bytes);
}

static void model_read_kind(struct model_reader *reader, struct model_config *config) {
    struct gguf *file = reader->file;
    struct gguf_string name = {"nothing", 7};
    gguf_get_string(file, gguf_about(file, "general.architecture"), &name);
    config->architecture = model_architectures[0]; /* a checkpoint's */
    for (unsigned i = 0; i < sizeof model_architectures / sizeof *model_architectures; i++)
        if (gguf_equals(name, model_architectures[i])) {
            config->architecture = model_architectures[i];
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
    gguf_expect(file, reader->kind,
                "got %.*s, expected llama, qwen2, qwen3, qwen3moe, gpt-oss or gemma3",
                gguf_shown(name), name.data);
}

/* YaRN (Peng et al. 2023): pairs that turn more than `fast` times within the context that the model
 * was trained on first stay as they are, those that turn less than `slow` times are slowed down. */
static void model_read_yarn(struct model_reader *reader, struct model_config *config) {
    int context = model_int(reader, "rope.scaling.original_context_length", config->context_length,
                            1, 1 << 24);
    float fast = model_float(reader, "rope.scaling.yarn_beta_fast", 32, 1e-3, 1e6);
    float slow = model_float(reader, "rope.scaling.yarn_beta_slow", 1, 1e-3, 1e6);
    double theta = (double)model_float(reader, "rope.freq_base", 10000, 1.001, 1e12); /* > 1 here */
    double turns[] = {(double)fast, (double)slow}, pair[2], n = config->rope_dim;
    for (int i = 0; i < 2; i++) {
        pair[i] = n * log(context / (turns[i] * 2 * M_PI)) / (2 * log(theta));
        if (!(reader->kind & MODEL_GPT_OSS)) /* which alone does not round */
            pair[i] = i == 0 ? floor(pair[i]) : ceil(pair[i]);
    }
    config->yarn_low = (float)fmax(pair[0], 0);
    config->yarn_high = (float)fmax(fmin(pair[1], n - 1), (double)config->yarn_low + 0.001);
    model_float(reader, "rope.scaling.yarn_ext_factor", 1, 1, 1);
    model_float(reader, "rope.scaling.yarn_log_multiplier", 0, 0, 0);
    double usual = 1 + 0.1 * log((double)config->rope_scale); /* unless the original had another */
    config->rope_magnitude *=
        model_float(reader, "rope.scaling.yarn_attn_factor", usual, 1e-3, 1e3);
}

static void model_read_rope(struct model_reader *reader, struct model_config *config) {
    struct gguf_string scaling = {"linear", 6}; /* the format's default, by a factor of 1 */
    int head_dim = config->head_dim;
    config->rope_dim = model_int(reader, "rope.dimension_count", head_dim, 2, head_dim);
    gguf_expect(reader->file, config->rope_dim % 2 == 0, "got an odd number, %d", config->rope_dim);
    config->rope_theta = model_float(reader, "rope.freq_base", 10000, 1, 1e12);
    bool own = reader->kind & MODEL_GEMMA3; /* a base of layers with a window */
    double theta = (double)config->rope_theta, least = own ? 1 : theta, most = own ? 1e12 : theta;
    float windowed = model_float(reader, "rope.freq_base_swa", own ? 10000 : theta, least, most);
    config->theta_windowed = own ? windowed : 0;
    gguf_get_string(reader->file, model_key(reader, "rope.scaling.type"), &scaling);
    bool yarn = gguf_equals(scaling, "yarn"), none = gguf_equals(scaling, "none");
    gguf_expect(reader->file, none || yarn || gguf_equals(scaling, "linear"),
                "got %.*s, expected none, linear or yarn", gguf_shown(scaling), scaling.data);
    float old = model_float(reader, "rope.scale_linear", 1, 1, 1e6); /* another name */
    config->rope_scale = model_float(reader, "rope.scaling.factor", (double)old, 1, 1e6);
    config->rope_scale = none ? 1 : config->rope_scale;
    config->rope_magnitude = model_float(reader, "rope.scaling.attn_factor", 1, 1e-3, 1e3);
    if (yarn)
        model_read_yarn(reader, config);
}

static void model_read_experts(struct model_reader *reader, struct model_config *config) {
    bool always = reader->kind & (MODEL_QWEN3MOE | MODEL_GPT_OSS), normed = true;
    config->n_experts = model_int(reader, "expert_count", always ? REQUIRED : 0, always, 1024);
    reader->kind |= config->n_experts > 0 ? MODEL_EXPERTS : MODEL_DENSE;
    model_int(reader, "expert_group_count", 1, 0, 1);
    if (config->n_experts == 0)
        return;
    int most = config->n_experts < MODEL_MOST_USED ? config->n_experts : MODEL_MOST_USED;
    config->n_used = model_int(reader, "expert_used_count", REQUIRED, 1, most);
    config->d_ff = model_int(reader, "expert_feed_forward_length", config->d_ff, 1, 1 << 20);
    gguf_expect(reader->file, config->d_ff <= (1 << 30) / config->n_experts, "is too large");
    gguf_get_bool(reader->file, model_key(reader, "expert_weights_norm"), &normed);
    config->share_of_all = !normed;
    int gate = reader->kind & MODEL_GPT_OSS ? 3 : 1; /* softmax: of those chosen; of all */
    model_int(reader, "expert_gating_func", gate, gate, gate);
    model_int(reader, "expert_shared_count", 0, 0, 0);
}

static void model_read_attention(struct model_reader *reader, struct model_config *config) {
    /* of the others nothing tells which layers have one; those that are published have none */
    bool windows = reader->kind & (MODEL_LLAMA | MODEL_GPT_OSS | MODEL_GEMMA3);
    int window = windows ? model_int(reader, "attention.sliding_window", 0, 0, INT32_MAX) : 0;
    if (window >= config->context_length) /* it hides nothing, but may have a rope of its own */
        window = reader->kind & MODEL_GEMMA3 ? config->context_length : 0;
    config->window = window;
    config->window_period =
        model_int(reader, "attention.sliding_window_pattern", config->window_period, 0, 1024);
}

/* What other models have, and would change the text: absent, 0, or what changes nothing. */
static void model_refuse_keys(struct model_reader *reader) {
    static const struct {
        const char *key;
        double neutral;
    } keys[] = {{"attention.scale", 0},          {"attention.clamp_kqv", 0},
                {"attention.max_alibi_bias", 0}, {"attn_logit_softcapping", 0},
                {"final_logit_softcapping", 0},  {"logit_scale", 1},
                {"embedding_scale", 1},          {"residual_scale", 1},
                {"attention.output_scale", 1},   {"attention.temperature_scale", 0},
                {"expert_weights_scale", 1}};
    bool causal = true;
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        double value = 0;
        gguf_get_float(reader->file, model_key(reader, keys[i].key), &value);
        gguf_expect(reader->file, value == 0 || value == keys[i].neutral,
                    "got %.10g, which is not supported", value);
    }
    gguf_get_bool(reader->file, model_key(reader, "attention.causal"), &causal);
    gguf_expect(reader->file, causal, "got false: it is no model that writes text");
}

static void model_read_config(struct model_reader *reader, struct model_config *config) {
    struct gguf *file = reader->file;
    config->n_layers = model_int(reader, "block_count", REQUIRED, 1, 1024);
    config->d_model = model_int(reader, "embedding_length", REQUIRED, 1, 1 << 20);
    config->d_ff = model_int(reader, "feed_forward_length", REQUIRED, 1, 1 << 20);
    config->context_length = model_int(reader, "context_length", REQUIRED, 1, 1 << 24);
    model_int(reader, "vocab_size", 0, 0, INT32_MAX); /* the embedding's rows count */
    int n_heads = model_int(reader, "attention.head_count", REQUIRED, 1, 1 << 16);
    int n_kv_heads = model_int(reader, "attention.head_count_kv", n_heads, 1, n_heads);
    gguf_expect(file, n_heads % n_kv_heads == 0, "got %d, expected a divisor of head_count, %d",
                n_kv_heads, n_heads);
    int head_dim = model_int(reader, "attention.key_length", config->d_model / n_heads, 2, 512);
    model_int(reader, "attention.value_length", head_dim, head_dim, head_dim);
    config->n_heads = n_heads;
    config->n_kv_heads = n_kv_heads;
    config->head_dim = head_dim;
    model_set_family(config, reader->kind);
    config->norm_epsilon = model_float(reader, "attention.layer_norm_rms_epsilon",
                                       reader->bytes ? 1e-5 : REQUIRED, 0, 1);
    model_read_rope(reader, config);
    model_read_attention(reader, config);
    model_read_experts(reader, config);
    model_refuse_keys(reader);
    const struct tensor *embedding = gguf_tensor(file, "token_embd.weight");
    int64_t n_tokens = embedding ? embedding->rows : reader->header[HEADER_VOCAB];
    struct gguf_array tokens = {.count = (size_t)n_tokens};
    gguf_about(file, "token_embd.weight");
    config->vocab_size = (int)model_check(file, n_tokens, (double)n_tokens, REQUIRED, 1, 1 << 24);
    gguf_get_array(file, "tokenizer.ggml.tokens", &tokens);
    gguf_expect(file, tokens.count == (size_t)n_tokens, "got %zu tokens and an embedding of %jd",
                tokens.count, (intmax_t)n_tokens);
}

/* In gpt-oss the norm before the experts is named as gemma3's behind attention is. */
static const char *model_name(const struct model_reader *reader, const struct model_tensor *entry) {
    bool other = reader->kind & MODEL_GPT_OSS && entry->role == FFN_NORM;
    return other ? "post_attention_norm.weight" : entry->name;
}

/* The tensor of a file, or NULL: there is none, or something is wrong. */
static const struct tensor *model_find(struct model_reader *reader, struct model *model,
                                       const struct model_tensor *entry, int layer) {
    struct gguf *file = reader->file;
    int rows = model_extent(&model->config, entry->rows);
    int cols = model_extent(&model->config, entry->cols);
    bool required = entry->required_by & reader->kind, is_vector = entry->rows == DIM_ONE;
    const char *own = model_name(reader, entry);
    const char *name = model_layered(entry) ? gguf_about(file, "blk.%d.%s", layer, own)
                                            : gguf_about(file, "%s", own);
    const struct tensor *tensor;
    if (required && reader->bytes) { /* the next of a checkpoint */
        tensor = model_place(model, entry, TYPE_F32, reader->bytes + reader->at);
        reader->at += tensor->bytes; /* whether the file has so many is looked at behind the last */
    } else {
        tensor = gguf_tensor(file, name);
    }
    gguf_expect(file, tensor || !required || !model_layered(entry),
                "is missing; block_count says %d", model->config.n_layers);
    gguf_expect(file, tensor || !required, "is missing; is the file complete?");
    if (!required && !(entry->optional_in & reader->kind)) {
        bool known = reader->kind & MODEL_GPT_OSS && entry->role == ATTN_POST_NORM;
        gguf_expect(file, !tensor || known, "is not supported");
        return NULL;
    }
    if (!tensor)
        return NULL;
    bool typed =
        is_vector ? tensor->type == TYPE_F32 : tensor->bytes > 0 && tensor->type != TYPE_FP8;
    if (is_vector && typed && tensor->rows > 1 && tensor->rows * tensor->cols == cols &&
        entry->cols >= DIM_EXPERTS_FF) /* those of all experts count as one */
        tensor = model_place(model, entry, TYPE_F32, tensor->data);
    int type = tensor->stored ? tensor->stored : (int)tensor->type;
    const char *type_name = gguf_type_name((enum tensor_type)type);
    gguf_expect(file, typed || !is_vector, "got %s, expected F32", type_name);
    gguf_expect(file, typed, "got %s, which is not read; take a %s", type_name,
                type == GGUF_EARLY_MXFP4 ? "newer file" : "file of Q8_0 or Q4_K_M");
    gguf_expect(file, tensor->rows == rows && tensor->cols == cols,
                "got (%jd, %jd), expected (%d, %d)", (intmax_t)tensor->rows, (intmax_t)tensor->cols,
                rows, cols);
    gguf_expect(file, is_vector || rows > 1 || entry->role == NO_ROLE,
                "got one row, which is not supported");
    return tensor;
}

static bool model_begins(struct gguf_string name, const char *prefix) {
    size_t length = strlen(prefix);
    return name.length > length && !memcmp(name.data, prefix, length);
}

/* Tensors of the text model that nobody has asked for: with them the text would be another one. */
static void model_refuse_unused(struct model_reader *reader) {
    static const char *const prefixes[] = {"blk.", "output", "token_", "position_", "rope_"};
    const struct tensor *tensor;
    for (size_t at = 0; (tensor = gguf_each_tensor(reader->file, &at));) {
        gguf_about(reader->file, "%.*s", gguf_shown(tensor->name), tensor->name.data);
        for (size_t i = 0; i < sizeof prefixes / sizeof *prefixes && !tensor->asked; i++)
            gguf_expect(reader->file, !model_begins(tensor->name, prefixes[i]),
                        "is not supported in a %s of %d layers", reader->config->architecture,
                        reader->config->n_layers);
    }
}

static void model_read_tensors(struct model_reader *reader, struct model *model) {
    struct gguf *file = reader->file;
    gguf_expect(file, model_reserve(model), "out of memory");
    for (size_t i = 0; i < N_MODEL_TENSORS; i++) {
        const struct model_tensor *entry = &model_tensors[i];
        int copies = model_layered(entry) ? model->config.n_layers : 1;
        for (int layer = 0; layer < copies && !gguf_error(file)[0]; layer++) {
            const struct tensor *tensor = model_find(reader, model, entry, layer);
            if (entry->role != NO_ROLE)
                model->layers[layer][entry->role] = tensor;
        }
    }
    gguf_about(file, "%s", "");
    gguf_expect_complete(file, reader->at);
    gguf_expect(file, !reader->bytes || reader->at == reader->size,
                "got %zu bytes behind the last tensor, expected none", reader->size - reader->at);
    model_refuse_unused(reader);
    if (gguf_error(file)[0])
        return;
    const struct tensor *divisors = model->layers[0][ROPE_FREQS];
    gguf_about(file, "rope_freqs.weight");
    for (int i = 0; i < model->config.rope_dim / 2 && divisors; i++) {
        float divisor = ((const float *)divisors->data)[i];
        gguf_expect(file, isfinite(divisor) && divisor > 0, "entry %d is %g", i, (double)divisor);
    }
}

static bool model_read(struct model *model, const char *path, char *error) {
    model->file = gguf_open(path, error);
    if (!model->file)
        return false;
    struct model_reader reader = {.file = model->file, .config = &model->config};
    model_refuse_format(model->file);
    bool known = *gguf_error(model->file) != 0;
    model_read_kind(&reader, &model->config);
    model_read_config(&reader, &model->config);
    model_read_tensors(&reader, model);
    model->is_checkpoint = reader.bytes && !known;
    const char *hint =
        model->is_checkpoint ? "; it is not GGUF, and was read as a llama2.c checkpoint" : "";
    const char *wrong = gguf_error(model->file);
    (void)fail(error, "%.440s%s", wrong, *wrong ? hint : "");
    return !*wrong;
}

/* ---- notes ---- */

static void model_note_unused(struct gguf_string name, FILE *to) {
    char line[ERROR_LENGTH];
    (void)fail(line, "%.*s is not used", gguf_shown(name), name.data);
    (void)fprintf(to, "dynamo: %s\n", line);
}

void model_notes(const struct model *model, FILE *to) {
    size_t before[32] = {0}, after[32] = {0}, at = 0; /* bytes, by stored type */
    const struct tensor *tensor;
    const struct gguf_string *key;
    while (model->file && (tensor = gguf_each_tensor(model->file, &at))) {
        before[tensor->stored] += tensor->stored_bytes;
        after[tensor->stored] += tensor->bytes;
        if (!tensor->asked)
            model_note_unused(tensor->name, to);
    }
    for (at = 0; model->file && (key = gguf_unasked_key(model->file, &at));)
        if (model_begins(*key, model->config.architecture))
            model_note_unused(*key, to);
    for (int i = 1; i < 32; i++)
        if (after[i] > 0)
            (void)fprintf(to, "dynamo: %s is kept as Q8_0: %.1f MB become %.1f\n",
                          gguf_type_name((enum tensor_type)i), 1e-6 * (double)before[i],
                          1e-6 * (double)after[i]);
}

/* ---- random weights ----
 *
 * Models for measuring without a file, in milliseconds and at any size, since their matrices are
 * one *tile* of random weights, mapped again and again:
 *
 *     in memory that has no file name:  | vectors | tile |
 *     address range:                    | vectors | tile | tile | tile | ... | part |
 *
 * (and the same again for experts of another type).
 *
 * The matrices lie one behind the other, a gap apart, so that each begins at another place of the
 * tile: those of equal shapes are not equal. Rows repeat where a matrix is larger than the tile
 * (struct tensor: period). The same name gives the same weights, everywhere and always.
 * Sizes are such that activations neither vanish nor explode: matrices have a mean of 0 and a
 * standard deviation of about 0.02, biases and sinks too, norms are 1. There is no tokenizer: what
 * runs is --ids. */

enum {
    RANDOM_PAGE = 1 << 16, /* a multiple of every page size, so that weights do not depend on it */
    RANDOM_TILE = 1 << 24, /* about so many bytes: few enough to make, and many to repeat */
    RANDOM_ONES = 4096,    /* where the vector that is all norms begins, behind rope's divisors */
    RANDOM_GRAIN = 32      /* a matrix takes a multiple of so many blocks, and as many are a gap */
};

#define RANDOM_DEVIATION 0.02

/* What the two sizes of gpt-oss have in common: YaRN by 32 from 4096 tokens. */
#define GPT_OSS                                                                                    \
    .window = 128, .rope_scale = 32, .rope_magnitude = 1.3465736f, .yarn_low = 8.0927791f,         \
    .yarn_high = 17.398025f

struct random_shape {
    const char *name;
    unsigned kind; /* MODEL_LLAMA to MODEL_SCALED, without MODEL_DENSE and MODEL_EXPERTS */
    struct model_config config;
};

/* Of the config, in its order: layers, d_model, heads, kv heads, head_dim, d_ff, vocabulary,
 * context; theta, epsilon; experts, and those of a row, and what else only some models have; as
 * those who trained the models give them. All of a head is turned. tiny-moe is for tests. */
/* clang-format off */
static const struct random_shape random_shapes[] = {
    {"stories-15m", MODEL_LLAMA | MODEL_TIED,
     {.n_layers = 6, 288, 6, 6, 48, 768, 32000, 2048, .rope_theta = 1e4f, 1e-5f}},
    {"stories-110m", MODEL_LLAMA | MODEL_TIED,
     {.n_layers = 12, 768, 12, 12, 64, 2048, 32000, 2048, .rope_theta = 1e4f, 1e-5f}},
    {"tinyllama-1.1b", MODEL_LLAMA | MODEL_UNTIED,
     {.n_layers = 22, 2048, 32, 4, 64, 5632, 32000, 2048, .rope_theta = 1e4f, 1e-5f}},
    {"qwen3-0.6b", MODEL_QWEN3 | MODEL_TIED,
     {.n_layers = 28, 1024, 16, 8, 128, 3072, 151936, 40960, .rope_theta = 1e6f, 1e-6f}},
    {"llama-3.1-8b", MODEL_LLAMA | MODEL_UNTIED | MODEL_SCALED,
     {.n_layers = 32, 4096, 32, 8, 128, 14336, 128256, 131072, .rope_theta = 5e5f, 1e-5f}},
    {"llama-3.1-70b", MODEL_LLAMA | MODEL_UNTIED | MODEL_SCALED,
     {.n_layers = 80, 8192, 64, 8, 128, 28672, 128256, 131072, .rope_theta = 5e5f, 1e-5f}},
    {"llama-3.1-405b", MODEL_LLAMA | MODEL_UNTIED | MODEL_SCALED,
     {.n_layers = 126, 16384, 128, 8, 128, 53248, 128256, 131072, .rope_theta = 5e5f, 1e-5f}},
    {"tiny-moe", MODEL_QWEN3MOE | MODEL_UNTIED,
     {.n_layers = 2, 128, 8, 4, 32, 96, 512, 2048, .rope_theta = 1e6f, 1e-6f, 16, 4}},
    {"qwen3-30b-a3b", MODEL_QWEN3MOE | MODEL_UNTIED,
     {.n_layers = 48, 2048, 32, 4, 128, 768, 151936, 40960, .rope_theta = 1e6f, 1e-6f, 128, 8}},
    {"gpt-oss-20b", MODEL_GPT_OSS | MODEL_UNTIED,
     {.n_layers = 24, 2880, 64, 8, 64, 2880, 201088, 131072, .rope_theta = 1.5e5f, 1e-5f, 32, 4,
      GPT_OSS}},
    {"gpt-oss-120b", MODEL_GPT_OSS | MODEL_UNTIED,
     {.n_layers = 36, 2880, 64, 8, 64, 2880, 201088, 131072, .rope_theta = 1.5e5f, 1e-5f, 128, 4,
      GPT_OSS}},
    {"gemma-3-4b", MODEL_GEMMA3 | MODEL_TIED,
     {.n_layers = 34, 2560, 8, 4, 256, 10240, 262208, 131072, .rope_theta = 1e6f, 1e-6f,
      .window = 1024, .theta_windowed = 1e4f, .rope_scale = 8}},
};
/* clang-format on */

/* Where the scale of a block lies, and the standard deviation of a weight divided by that scale if
 * all other bytes are random. No scale: each weight is a number of its own. */
static const struct random_type {
    enum tensor_type type;
    size_t scale_at;
    double spread;
} random_types[] = {{TYPE_F32, 0, 0},       {TYPE_F16, 0, 0},     {TYPE_BF16, 0, 0},
                    {TYPE_Q8_0, 0, 73.9},   {TYPE_Q4_0, 0, 4.61}, {TYPE_Q4_K, 0, 168},
                    {TYPE_Q6_K, 208, 1366}, {TYPE_MXFP4, 0, 0},   {TYPE_FP8, 0, 0}};

enum {
    RANDOM_SHAPES = sizeof random_shapes / sizeof *random_shapes,
    RANDOM_TYPES = sizeof random_types / sizeof *random_types
};

struct random_tile { /* and the matrices that lie over it */
    const struct random_type *type;
    struct gguf_block block; /* of the type */
    size_t held, period;     /* bytes before the tile, and of it */
    size_t end;              /* of all matrices, if they began at 0 */
};

struct random_weights {
    const struct random_shape *shape;
    unsigned kind;               /* of the shape, with MODEL_DENSE or MODEL_EXPERTS */
    struct random_tile tiles[2]; /* the second: of experts in MXFP4, whose model is else in BF16 */
    int n_tiles;
    size_t small, vectors; /* bytes before biases and sinks, and of all vectors */
};

/* ---- what a name stands for ---- */

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
    fail_clean(error);
}

static bool random_parse(struct random_weights *r, const char *name, char *error) {
    const char *shape = strchr(name, ':') + 1;
    size_t length = strcspn(shape, ":");
    const char *types[2] = {shape[length] ? shape + length + 1 : "BF16"};
    r->n_tiles = strcasecmp(types[0], "MXFP4") == 0 ? 2 : 1;
    if (r->n_tiles == 2) {
        types[1] = types[0];
        types[0] = "BF16";
    }
    for (size_t i = 0; i < RANDOM_SHAPES; i++)
        if (strlen(random_shapes[i].name) == length &&
            strncasecmp(shape, random_shapes[i].name, length) == 0)
            r->shape = &random_shapes[i];
    for (size_t i = 0; i < RANDOM_TYPES; i++)
        for (int t = 0; t < r->n_tiles; t++)
            if (strcasecmp(types[t], gguf_type_name(random_types[i].type)) == 0)
                r->tiles[t].type = &random_types[i];
    if (!r->shape || !r->tiles[0].type) {
        random_list(name, error);
        return false;
    }
    const struct model_config *config = &r->shape->config;
    r->kind = r->shape->kind | (config->n_experts > 0 ? MODEL_EXPERTS : MODEL_DENSE);
    if (r->n_tiles == 2 && config->n_experts == 0)
        return fail(error, "%s: MXFP4 is for experts, and this model has none", name);
    const int cols[] = {config->d_model, config->d_ff, config->n_heads * config->head_dim};
    for (int t = 0; t < r->n_tiles; t++) {
        struct gguf_block block = r->tiles[t].block = gguf_block(r->tiles[t].type->type);
        for (int i = 0; i < (t == 0 ? 3 : 2); i++)
            if (cols[i] % block.elements) /* blocks do not reach beyond a row */
                return fail(error,
                            "%s: got matrices of %d columns, expected a multiple of %d, the block "
                            "of %s; no file could have it either",
                            name, cols[i], block.elements, gguf_type_name(r->tiles[t].type->type));
    }
    return true;
}

/* ---- where tensors lie ---- */

/* Places the tensor of a role, if this model has one. `data` is left as if its tile's address range
 * began at 0. */
static void random_place(struct random_weights *r, struct model *model, int role, int layer) {
    const struct model_tensor *entry = model_tensors;
    while (entry->role != role)
        entry++;
    if (!(entry->required_by & r->kind))
        return;
    bool is_vector = entry->rows == DIM_ONE, is_norm = strstr(entry->name, "norm");
    struct random_tile *tile = &r->tiles[role >= GATE_EXPERTS && r->n_tiles == 2];
    size_t at = role == ROPE_FREQS ? 0 : is_norm ? RANDOM_ONES : is_vector ? r->small : tile->end;
    enum tensor_type type = is_vector ? TYPE_F32 : tile->type->type;
    struct tensor *tensor = model_place(model, entry, type, (const void *)(uintptr_t)at);
    model->layers[layer][role] = tensor;
    if (is_vector)
        return;
    size_t gap = (size_t)tile->block.bytes * RANDOM_GRAIN;
    tile->end += (tensor->bytes + gap - 1) / gap * gap + gap;
    tensor->period = tensor->bytes > tile->period ? tile->period : 0;
}

static size_t random_pages(size_t bytes) {
    return (bytes + RANDOM_PAGE - 1) / RANDOM_PAGE * RANDOM_PAGE;
}

/* The tile is an odd number of units, so that few matrices are a multiple of it and their heads not
 * all alike. The order of the matrices stays: a name's weights depend on it. */
static void random_lay_out(struct random_weights *r, struct model *model) {
    const struct model_config *config = &model->config;
    size_t biases = (size_t)(config->n_experts > 0 ? config->n_experts : 1) *
                    (size_t)(config->d_model > config->d_ff ? config->d_model : config->d_ff);
    size_t heads = (size_t)(config->n_heads * config->head_dim);
    r->small = RANDOM_ONES + (size_t)config->d_model * sizeof(float);
    r->vectors = random_pages(r->small + (biases > heads ? biases : heads) * sizeof(float));
    for (int i = 0; i < r->n_tiles; i++) {
        struct random_tile *tile = &r->tiles[i];
        size_t odd = tile->block.bytes;
        while (odd % 2 == 0)
            odd /= 2;
        size_t unit = odd * RANDOM_PAGE;
        tile->period = (RANDOM_TILE / unit | 1) * unit; /* of whole blocks and whole pages */
        tile->held = i > 0 ? r->tiles[0].held + r->tiles[0].period : r->vectors;
    }
    random_place(r, model, TOKEN_EMBD, 0);
    for (int layer = 0; layer < config->n_layers; layer++)
        for (int role = ATTN_NORM; role < N_ROLES; role++)
            random_place(r, model, role, layer);
    for (int role = OUTPUT_NORM; role <= ROPE_FREQS; role++)
        random_place(r, model, role, 0);
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

/* Random bits, as many as the type has, become a number from -deviation * sqrt(3) to as much. */
static void random_weight(enum tensor_type type, size_t bytes, uint8_t *weight) {
    int32_t bits = 0;
    memcpy((uint8_t *)&bits + 4 - bytes, weight, bytes);
    float value = (float)bits * 0x1p-31f * (float)(RANDOM_DEVIATION * sqrt(3));
    uint16_t half = random_half(value);
    memcpy(weight, type == TYPE_F16 ? (uint8_t *)&half : (uint8_t *)&value + 4 - bytes, bytes);
}

/* The random bytes of a block stay, but for its scales, which are made such that the mean is 0. */
static void random_scale(const struct random_type *type, uint8_t *block) {
    uint16_t bits, half;
    if (type->type == TYPE_MXFP4) { /* 2^-8 or, for 11 blocks of 16, 2^-7 */
        block[0] = (uint8_t)(119 + (block[0] % 16 > 4));
        return;
    }
    memcpy(&bits, block + type->scale_at, 2);
    float scale = (float)(RANDOM_DEVIATION / type->spread * (0.75 + bits * 0x1p-17));
    if (type->type == TYPE_Q4_0 && bits & 1) /* from -8 to 7: the mean is not 0 */
        scale = -scale;
    half = random_half(scale);
    memcpy(block + type->scale_at, &half, 2);
    if (type->type == TYPE_Q4_K) { /* weight = d * s * bits - m * t: s = t, and m = 7.5 d */
        half = random_half(scale * 7.5f);
        memcpy(block + 2, &half, 2);
        memcpy(block + 8, block + 4, 4); /* s and t of six bits: gguf_q4_k_scales */
        for (int i = 12; i < 16; i++)
            block[i] = (uint8_t)((block[i] & 15) * 17);
    }
}

/* What a frequency of Llama 3.1 is divided by: 1 if its wave is much shorter than the 8192 tokens
 * that the model was trained on first, 8 if it is longer, and something between. */
static float random_rope(double theta, int pair, int rope_dim) {
    double wave = 2 * M_PI * pow(theta, 2.0 * pair / rope_dim), waves = 8192 / wave;
    double share = (waves - 1) / (4 - 1);
    share = share < 0 ? 0 : share > 1 ? 1 : share;
    return (float)(1 / (share + (1 - share) / 8));
}

/* Writes vectors and tiles. */
static void random_write(const struct random_weights *r, uint8_t *to) {
    const struct model_config *config = &r->shape->config;
    for (int i = 0; i < config->head_dim / 2; i++) /* without scaling none is read */
        ((float *)to)[i] = random_rope(config->rope_theta, i, config->head_dim);
    for (size_t at = RANDOM_ONES; at < r->small; at += sizeof(float))
        *(float *)(to + at) = 1;
    for (size_t at = r->small; at < r->vectors; at += sizeof(float)) {
        uint64_t bits = random_bits(at);
        memcpy(to + at, &bits, sizeof(float));
        random_weight(TYPE_F32, sizeof(float), to + at);
    }
    for (int i = 0; i < r->n_tiles; i++) {
        const struct random_tile *tile = &r->tiles[i];
        uint8_t *start = to + tile->held;
        for (size_t at = 0; at < tile->period; at += 8) {
            uint64_t bits = random_bits(at / 8);
            memcpy(start + at, &bits, 8);
        }
        for (size_t at = 0; at < tile->period; at += tile->block.bytes)
            if (tile->block.elements == 1)
                random_weight(tile->type->type, tile->block.bytes, start + at);
            else
                random_scale(tile->type, start + at);
    }
}

/* ---- the address range ---- */

/* Maps it into the model: the vectors, then each tile as often as its matrices need it. False:
 * errno. */
static bool random_map(const struct random_weights *r, struct model *model, int memory) {
    const struct random_tile *last = &r->tiles[r->n_tiles - 1];
    size_t held = last->held + last->period;
    if (memory < 0 || ftruncate(memory, (off_t)held) != 0)
        return false;
    uint8_t *writable = mmap(NULL, held, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
    if (writable == MAP_FAILED)
        return false;
    random_write(r, writable);
    munmap(writable, held);
    uint8_t *range = mmap(NULL, model->random_bytes, PROT_NONE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (range == MAP_FAILED)
        return false;
    model->random = range;
    bool ok = mmap(range, r->vectors, PROT_READ, MAP_SHARED | MAP_FIXED, memory, 0) != MAP_FAILED;
    range += r->vectors;
    for (int i = 0; i < r->n_tiles && ok; i++) {
        const struct random_tile *tile = &r->tiles[i];
        for (size_t at = 0, bytes; at < tile->end && ok; at += bytes) { /* over what is reserved */
            bytes = tile->period < tile->end - at ? tile->period : tile->end - at;
            ok = mmap(range + at, bytes, PROT_READ, MAP_SHARED | MAP_FIXED, memory,
                      (off_t)tile->held) != MAP_FAILED;
        }
        range += random_pages(tile->end);
    }
    return ok;
}

static bool random_open(struct model *model, const char *name, char *error) {
    struct random_weights r = {0};
    if (!random_parse(&r, name, error))
        return false;
    model->config = r.shape->config;
    model->config.architecture = model_architectures[__builtin_ctz(r.kind)];
    model->config.rope_dim = model->config.head_dim;
    model_set_family(&model->config, r.kind);
    if (!model_reserve(model))
        return fail(error, "%.100s: out of memory", name);
    random_lay_out(&r, model);
    model->random_bytes = r.vectors + random_pages(r.tiles[0].end) + random_pages(r.tiles[1].end);
    int memory = memfd_create(name, MFD_CLOEXEC);
    bool ok = random_map(&r, model, memory);
    *error = 0;
    if (!ok)
        (void)fail(error, "%.100s: %zu bytes cannot be mapped: %s", name, model->random_bytes,
                   strerror(errno));
    if (memory >= 0)
        close(memory);
    for (int i = 0; i < model->n_placed && ok; i++) {
        struct tensor *tensor = &model->placed[i];
        size_t before = tensor->rows == 1 ? 0 : r.vectors;
        if (r.n_tiles == 2 && tensor->type == TYPE_MXFP4)
            before += random_pages(r.tiles[0].end);
        tensor->data = (uint8_t *)model->random + before + (uintptr_t)tensor->data;
    }
    return ok;
}

/* ---- opening and closing ---- */

bool model_is_random(const char *name) {
    return strncmp(name, "random:", 7) == 0;
}

bool model_open(struct model *model, const char *name, char error[ERROR_LENGTH]) {
    *model = (struct model){0};
    bool ok =
        model_is_random(name) ? random_open(model, name, error) : model_read(model, name, error);
    if (!ok) {
        model_close(model);
        return false;
    }
    const struct tensor **own = model->layers[0];
    if (!own[OUTPUT])
        own[OUTPUT] = own[TOKEN_EMBD];
    return true;
}

void model_close(struct model *model) {
    free(model->layers);
    free(model->placed);
    if (model->random)
        munmap(model->random, model->random_bytes);
    gguf_close(model->file);
    *model = (struct model){0};
}

#endif /* MODEL_IMPLEMENTATION */
