/* tiny.h: GGUF files in memory: a writer, and complete models of 20 kB, for tests of what a model
 * file can do to the program.
 *
 *     struct tiny tiny;
 *     tiny_make(&tiny, (struct tiny_shape){.architecture = "llama", .type = TINY_F32});
 *     ... tiny.bytes[0, tiny.size), tiny.fields[0, tiny.n_fields): where each number stands ...
 *
 *     tiny_begin(&tiny, 3);                               // or a file of one's own:
 *     tiny_int(&tiny, "llama.block_count", 1);            // first all keys,
 *     tiny_tensor(&tiny, "output.weight", 5, 8, TINY_F16); // then all tensors
 *     tiny_end(&tiny);
 *
 * A model has a layer, 8 columns, every tensor that its architecture needs, and a vocabulary of all
 * bytes, two merged tokens, and special tokens of the chat templates. Read next: test_hostile.c. */
#ifndef TINY_H
#define TINY_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum { TINY_BYTES = 128 << 10, TINY_FIELDS = 512 };
enum { TINY_D = 8, TINY_VOCAB = 268, TINY_CONTEXT = 64, TINY_ALIGNMENT = 32 };

/* Types of tensors as GGUF numbers them; of ffn_down, for the larger blocks it has 256 columns. */
enum { TINY_F32 = 0, TINY_F16 = 1, TINY_Q4_0 = 2, TINY_Q8_0 = 8 };
enum { TINY_Q4_K = 12, TINY_Q6_K = 14, TINY_BF16 = 30 };

/* Types of values. */
enum { TINY_U32 = 4, TINY_I32 = 5, TINY_REAL = 6, TINY_STRING = 8, TINY_ARRAY = 9 };

/* A count is of tensors, keys, elements or dimensions; a name stands for its first byte. */
enum tiny_kind {
    FIELD_COUNT,
    FIELD_LENGTH,
    FIELD_KEY_TYPE,
    FIELD_VALUE,
    FIELD_EXTENT,
    FIELD_TENSOR_TYPE,
    FIELD_OFFSET,
    FIELD_NAME
};

struct tiny_field {
    size_t at;
    int bytes;
    enum tiny_kind kind;
    const char *name; /* of the key or tensor */
};

struct tiny {
    uint8_t bytes[TINY_BYTES];
    size_t size; /* more than there is room for: it does not fit */
    struct tiny_field fields[TINY_FIELDS];
    int n_fields;
    uint64_t n_keys, n_tensors, data; /* data: bytes of tensors so far */
    const char *name;                 /* of the key or tensor that is written */
};

static inline void tiny_put(struct tiny *t, const void *bytes, size_t n) {
    if (t->size + n <= sizeof t->bytes)
        memcpy(t->bytes + t->size, bytes, n);
    t->size += n;
}

static inline void tiny_field(struct tiny *t, enum tiny_kind kind, uint64_t value, int bytes) {
    if (t->n_fields < TINY_FIELDS)
        t->fields[t->n_fields++] = (struct tiny_field){t->size, bytes, kind, t->name};
    tiny_put(t, &value, (size_t)bytes);
}

/* A text that no field stands for. */
static inline void tiny_raw(struct tiny *t, const char *text, size_t length) {
    uint64_t n = length;
    tiny_put(t, &n, 8);
    tiny_put(t, text, length);
}

static inline void tiny_string(struct tiny *t, const char *text) {
    tiny_field(t, FIELD_LENGTH, strlen(text), 8);
    tiny_put(t, text, strlen(text));
}

static inline void tiny_name(struct tiny *t, const char *name) {
    t->name = name;
    tiny_string(t, name);
    if (t->n_fields < TINY_FIELDS)
        t->fields[t->n_fields++] =
            (struct tiny_field){t->size - strlen(name), (int)strlen(name), FIELD_NAME, name};
}

/* A key of a type; its value follows. */
static inline void tiny_key(struct tiny *t, const char *name, uint32_t type) {
    t->n_keys++;
    tiny_name(t, name);
    tiny_field(t, FIELD_KEY_TYPE, type, 4);
}

static inline void tiny_int(struct tiny *t, const char *name, uint32_t value) {
    tiny_key(t, name, TINY_U32);
    tiny_field(t, FIELD_VALUE, value, 4);
}

static inline void tiny_text(struct tiny *t, const char *name, const char *text) {
    tiny_key(t, name, TINY_STRING);
    tiny_string(t, text);
}

static inline void tiny_array(struct tiny *t, const char *name, uint32_t type, uint64_t count) {
    tiny_key(t, name, TINY_ARRAY);
    tiny_field(t, FIELD_KEY_TYPE, type, 4);
    tiny_field(t, FIELD_COUNT, count, 8);
}

/* What `n` elements take; of a type that is not known here, something. */
static inline uint64_t tiny_data(uint32_t type, uint64_t n) {
    static const struct {
        uint32_t elements, bytes;
    } blocks[] = {[TINY_F32] = {1, 4},    [TINY_F16] = {1, 2},      [TINY_Q4_0] = {32, 18},
                  [TINY_Q8_0] = {32, 34}, [TINY_Q4_K] = {256, 144}, [TINY_Q6_K] = {256, 210},
                  [TINY_BF16] = {1, 2},   [3] = {32, 20},           [6] = {32, 22},
                  [7] = {32, 24},         [10] = {256, 84},         [11] = {256, 110},
                  [13] = {256, 176},      [20] = {32, 18},          [23] = {256, 136}};
    bool known = type < sizeof blocks / sizeof *blocks && blocks[type].bytes > 0;
    return known ? n / blocks[type].elements * blocks[type].bytes : n * 2;
}

/* A description of any kind: columns and rows first. Says nothing of where the next one lies. */
static inline void tiny_describe(struct tiny *t, const char *name, const uint64_t *dims,
                                 uint32_t n_dims, uint32_t type, uint64_t offset) {
    t->n_tensors++;
    tiny_name(t, name);
    tiny_field(t, FIELD_COUNT, n_dims, 4);
    for (uint32_t i = 0; i < n_dims && i < 4; i++)
        tiny_field(t, FIELD_EXTENT, dims[i], 8);
    tiny_field(t, FIELD_TENSOR_TYPE, type, 4);
    tiny_field(t, FIELD_OFFSET, offset, 8);
}

static inline void tiny_advance(struct tiny *t, uint64_t bytes) {
    t->data += (bytes + TINY_ALIGNMENT - 1) / TINY_ALIGNMENT * TINY_ALIGNMENT;
}

/* A tensor behind the one before; no rows: a vector. */
static inline void tiny_tensor(struct tiny *t, const char *name, uint64_t rows, uint64_t cols,
                               uint32_t type) {
    tiny_describe(t, name, (uint64_t[]){cols, rows}, rows ? 2 : 1, type, t->data);
    tiny_advance(t, tiny_data(type, cols * (rows ? rows : 1)));
}

static inline void tiny_begin(struct tiny *t, uint32_t version) {
    memset(t, 0, sizeof *t);
    tiny_put(t, "GGUF", 4);
    tiny_put(t, &version, 4);
    t->name = "the file";
    tiny_field(t, FIELD_COUNT, 0, 8);
    tiny_field(t, FIELD_COUNT, 0, 8);
}

/* Data are zeros. Returns where they begin; 0: the file does not fit. */
static inline size_t tiny_end(struct tiny *t) {
    memcpy(t->bytes + 8, &t->n_tensors, 8);
    memcpy(t->bytes + 16, &t->n_keys, 8);
    size_t start = (t->size + TINY_ALIGNMENT - 1) / TINY_ALIGNMENT * TINY_ALIGNMENT;
    if (start + t->data > sizeof t->bytes)
        return 0;
    t->size = t->data ? start + t->data : t->size;
    return start;
}

/* ---- complete models ---- */

struct tiny_shape {
    const char *architecture; /* llama, qwen2, qwen3 */
    uint32_t type;            /* of ffn_down */
    const char *chat;         /* the chat template; NULL: none */
};

static const char *const tiny_special[] = {
    "<s>",        "</s>",    "<|im_start|>",        "<|im_end|>",
    "[INST]",     "[/INST]", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<unk>"};

/* A byte as the vocabulary spells it: <0x41>, or a printable character. */
static inline size_t tiny_spell(bool byte_level, int byte, char out[8]) {
    if (!byte_level)
        return (size_t)snprintf(out, 8, "<0x%02X>", (unsigned)byte);
    bool plain = (byte > 32 && byte < 127) || (byte > 160 && byte != 173);
    int code = plain ? byte : byte <= 32 ? 256 + byte : byte < 161 ? 162 + byte : 323;
    if (code < 128)
        out[0] = (char)code;
    else {
        out[0] = (char)(0xC0 | code >> 6);
        out[1] = (char)(0x80 | (code & 63));
    }
    return code < 128 ? 1 : 2;
}

static inline void tiny_vocabulary(struct tiny *t, bool byte_level) {
    char spelling[8];
    tiny_text(t, "tokenizer.ggml.model", byte_level ? "gpt2" : "llama");
    if (byte_level) {
        tiny_text(t, "tokenizer.ggml.pre", "qwen2");
        tiny_array(t, "tokenizer.ggml.merges", TINY_STRING, 2);
        tiny_raw(t, "a b", 3);
        tiny_raw(t, "ab c", 4);
    }
    tiny_array(t, "tokenizer.ggml.tokens", TINY_STRING, TINY_VOCAB);
    for (int i = 0; i < 10; i++)
        tiny_raw(t, tiny_special[i], strlen(tiny_special[i]));
    for (int i = 0; i < 256; i++) {
        size_t length = tiny_spell(byte_level, i, spelling);
        tiny_raw(t, spelling, length);
    }
    tiny_raw(t, "ab", 2);
    tiny_raw(t, "abc", 3);
    tiny_array(t, "tokenizer.ggml.token_type", TINY_I32, TINY_VOCAB);
    for (int i = 0; i < TINY_VOCAB; i++)
        tiny_put(t, &(int32_t){i == 9 ? 2 : i < 9 ? 3 : i < 266 && !byte_level ? 6 : 1}, 4);
    tiny_array(t, "tokenizer.ggml.scores", TINY_REAL, TINY_VOCAB);
    for (int i = 0; i < TINY_VOCAB; i++)
        tiny_put(t, &(float){-(float)i}, 4);
    tiny_int(t, "tokenizer.ggml.bos_token_id", 0);
    tiny_int(t, "tokenizer.ggml.eos_token_id", 1);
}

static inline void tiny_keys(struct tiny *t, const struct tiny_shape *shape, uint32_t d_ff) {
    static char names[8][64]; /* kept by the fields */
    static const char *const numbers[] = {"block_count",          "embedding_length",
                                          "feed_forward_length",  "context_length",
                                          "attention.head_count", "attention.head_count_kv"};
    const uint32_t values[] = {1, TINY_D, d_ff, TINY_CONTEXT, 2, 1};
    tiny_text(t, "general.architecture", shape->architecture);
    for (int i = 0; i < 6; i++) {
        snprintf(names[i], sizeof names[i], "%s.%s", shape->architecture, numbers[i]);
        tiny_int(t, names[i], values[i]);
    }
    snprintf(names[6], sizeof names[6], "%s.attention.layer_norm_rms_epsilon", shape->architecture);
    uint32_t bits;
    memcpy(&bits, &(float){1e-5f}, 4);
    tiny_key(t, names[6], TINY_REAL);
    tiny_field(t, FIELD_VALUE, bits, 4);
    tiny_int(t, "general.alignment", TINY_ALIGNMENT);
    if (shape->chat)
        tiny_text(t, "tokenizer.chat_template", shape->chat);
}

static inline void tiny_tensors(struct tiny *t, const struct tiny_shape *shape, uint32_t d_ff) {
    enum { D = TINY_D };
    tiny_tensor(t, "token_embd.weight", TINY_VOCAB, D, TINY_F32);
    tiny_tensor(t, "blk.0.attn_norm.weight", 0, D, TINY_F32);
    tiny_tensor(t, "blk.0.attn_q.weight", D, D, TINY_F16);
    tiny_tensor(t, "blk.0.attn_k.weight", D / 2, D, TINY_BF16);
    tiny_tensor(t, "blk.0.attn_v.weight", D / 2, D, TINY_F32);
    tiny_tensor(t, "blk.0.attn_output.weight", D, D, TINY_BF16);
    tiny_tensor(t, "blk.0.ffn_norm.weight", 0, D, TINY_F32);
    tiny_tensor(t, "blk.0.ffn_gate.weight", d_ff, D, TINY_F16);
    tiny_tensor(t, "blk.0.ffn_up.weight", d_ff, D, TINY_F16);
    tiny_tensor(t, "blk.0.ffn_down.weight", D, d_ff, shape->type);
    tiny_tensor(t, "output_norm.weight", 0, D, TINY_F32);
    if (strcmp(shape->architecture, "qwen2") == 0) {
        tiny_tensor(t, "blk.0.attn_q.bias", 0, D, TINY_F32);
        tiny_tensor(t, "blk.0.attn_k.bias", 0, D / 2, TINY_F32);
        tiny_tensor(t, "blk.0.attn_v.bias", 0, D / 2, TINY_F32);
    }
    if (strcmp(shape->architecture, "qwen3") == 0) {
        tiny_tensor(t, "blk.0.attn_q_norm.weight", 0, D / 2, TINY_F32);
        tiny_tensor(t, "blk.0.attn_k_norm.weight", 0, D / 2, TINY_F32);
    }
}

/* False: it does not fit. */
static inline bool tiny_make(struct tiny *t, struct tiny_shape shape) {
    bool wide = shape.type == TINY_Q4_K || shape.type == TINY_Q6_K;
    uint32_t d_ff = wide ? 256 : 32;
    tiny_begin(t, 3);
    tiny_keys(t, &shape, d_ff);
    tiny_vocabulary(t, strcmp(shape.architecture, "llama") != 0);
    tiny_tensors(t, &shape, d_ff);
    size_t start = tiny_end(t);
    for (size_t i = 0; i < t->data && start; i++) /* small numbers of any type */
        t->bytes[start + i] = (uint8_t)(i % 2 ? 0x3C - i % 7 : i * 37);
    return start > 0;
}

#endif
