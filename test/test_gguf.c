/* test_gguf.c: model files, whole and broken.
 *
 * tiny.h writes a small model; a table of variants breaks it in one place each, and says what the
 * message must name. The map is replaced by a heap copy of exactly the file's size
 * and calloc by one that remembers its largest request, so that AddressSanitizer sees a read one
 * byte beyond the file and a hostile count shows. Facts about real files come from outside. */
#define _GNU_SOURCE /* memmem */
#include <fcntl.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include "check.h"
#include "tiny.h"

static size_t largest_request;   /* of calloc, in bytes */
static long requests_until_fail; /* calloc fails when this falls to 0 */

static void *exact_map(void *address, size_t size, int protection, int flags, int descriptor,
                       off_t offset) {
    (void)address, (void)protection, (void)flags;
    void *copy = malloc(size);
    return copy && pread(descriptor, copy, size, offset) == (ssize_t)size ? copy : MAP_FAILED;
}

static int exact_unmap(void *address, size_t size) {
    (void)size;
    free(address);
    return 0;
}

static void *watched_calloc(size_t count, size_t size) {
    largest_request = count * size > largest_request ? count * size : largest_request;
    return --requests_until_fail == 0 ? NULL : calloc(count, size);
}

static void *watched_realloc(void *memory, size_t size) {
    return --requests_until_fail == 0 ? NULL : realloc(memory, size);
}

#define mmap(...)    exact_map(__VA_ARGS__)
#define munmap(...)  exact_unmap(__VA_ARGS__)
#define calloc(...)  watched_calloc(__VA_ARGS__)
#define realloc(...) watched_realloc(__VA_ARGS__)
#define GGUF_IMPLEMENTATION
#define MODEL_IMPLEMENTATION
#include "../lib/model.h"
#undef mmap
#undef munmap
#undef calloc
#undef realloc

/* GGUF's other types of values. */
enum { GGUF_U8, GGUF_I8, GGUF_U16, GGUF_I16, GGUF_U64 = 10, GGUF_I64, GGUF_F64 };

/* ---- a model, and what can be wrong with it ---- */

/* A key of the model: a string if it has text, else a number of its type. */
struct key {
    const char *name;
    uint32_t type;
    double number;
    const char *text;
};

struct weight {
    const char *name;
    uint64_t dims[4];
    uint32_t type, n_dims; /* n_dims 0: 2, or 1 if dims[1] is 0 */
    uint64_t offset;       /* 0: behind the one before */
};

static const struct key base_keys[] = {
    {"general.architecture", GGUF_STRING, 0, "llama"},
    {"llama.block_count", GGUF_U32, 1, NULL},
    {"llama.embedding_length", GGUF_U32, 8, NULL},
    {"llama.feed_forward_length", GGUF_U32, 32, NULL},
    {"llama.context_length", GGUF_U32, 64, NULL},
    {"llama.attention.head_count", GGUF_U32, 2, NULL},
    {"llama.attention.head_count_kv", GGUF_U32, 1, NULL},
    {"llama.attention.layer_norm_rms_epsilon", GGUF_F32, 1e-5, NULL},
    {"tokenizer.ggml.tokens", GGUF_ARRAY, 5, "t"},
};

static const struct weight base_weights[] = {
    {.name = "token_embd.weight", .dims = {8, 5}},
    {.name = "blk.0.attn_norm.weight", .dims = {8}},
    {.name = "blk.0.attn_q.weight", .dims = {8, 8}},
    {.name = "blk.0.attn_k.weight", .dims = {8, 4}, .type = TYPE_F16},
    {.name = "blk.0.attn_v.weight", .dims = {8, 4}, .type = TYPE_BF16},
    {.name = "blk.0.attn_output.weight", .dims = {8, 8}},
    {.name = "blk.0.ffn_norm.weight", .dims = {8}},
    {.name = "blk.0.ffn_gate.weight", .dims = {8, 32}},
    {.name = "blk.0.ffn_up.weight", .dims = {8, 32}},
    {.name = "blk.0.ffn_down.weight", .dims = {32, 8}, .type = TYPE_Q8_0},
    {.name = "output_norm.weight", .dims = {8}},
};

enum { N_KEYS = sizeof base_keys / sizeof *base_keys };
enum { N_WEIGHTS = sizeof base_weights / sizeof *base_weights };

/* The base model, changed in one place: a key or tensor left out, replaced or added, or `patch`
 * (of patch_bytes bytes) written over the file at patch_at. */
struct variant {
    const char *expected; /* the message must contain it; NULL: the file is fine */
    const char *drop;
    struct key key;
    struct weight weight;
    struct key also;
    bool twice; /* the key or tensor is added even if there is one of its name */
    size_t patch_at, patch_bytes;
    uint64_t patch;
};

static void put_key(struct tiny *t, const struct key *key) {
    static const uint8_t sizes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    size_t size = key->type < sizeof sizes ? sizes[key->type] : 4;
    float single = (float)key->number;
    int64_t integer = (int64_t)key->number;
    if (key->type == GGUF_ARRAY) { /* of strings, or of i32 where there is no text */
        uint64_t n = (uint64_t)key->number;
        tiny_array(t, key->name, key->text ? GGUF_STRING : GGUF_I32, n);
        for (uint64_t i = 0; i < n; i++)
            key->text ? tiny_string(t, key->text) : tiny_put(t, &i, 4);
        return;
    }
    tiny_key(t, key->name, key->type);
    if (key->type == GGUF_STRING)
        tiny_string(t, key->text);
    else
        tiny_put(t,
                 key->type == GGUF_F32   ? (void *)&single
                 : key->type == GGUF_F64 ? (void *)&key->number
                                         : &integer,
                 size);
}

static void put_weight(struct tiny *t, const struct weight *weight) {
    uint64_t rows = weight->dims[1];
    uint32_t n_dims = weight->n_dims ? weight->n_dims : rows ? 2 : 1;
    uint64_t offset = weight->offset ? weight->offset : t->data;
    tiny_describe(t, weight->name, weight->dims, n_dims, weight->type, offset);
    if (!weight->offset)
        tiny_advance(t, tiny_data(weight->type, weight->dims[0] * (rows ? rows : 1)));
}

static bool same(const char *left, const char *right) {
    return left && right && !strcmp(left, right);
}

/* Returns the length of the header; the data ends where the file does, without padding. */
static size_t build(struct tiny *file, const struct variant *variant, uint32_t version) {
    const struct key *key = &variant->key;
    const struct weight *weight = &variant->weight;
    bool key_is_new = key->name != NULL, weight_is_new = weight->name != NULL;
    tiny_begin(file, version);
    for (int i = 0; i < N_KEYS; i++) {
        bool replaced = same(base_keys[i].name, key->name) && !variant->twice;
        key_is_new &= !replaced;
        if (!same(base_keys[i].name, variant->drop))
            put_key(file, replaced ? key : &base_keys[i]);
    }
    if (key_is_new)
        put_key(file, key);
    if (variant->also.name)
        put_key(file, &variant->also);
    for (int i = 0; i < N_WEIGHTS; i++) {
        bool replaced = same(base_weights[i].name, weight->name) && !variant->twice;
        weight_is_new &= !replaced;
        if (!same(base_weights[i].name, variant->drop))
            put_weight(file, replaced ? weight : &base_weights[i]);
    }
    if (weight_is_new)
        put_weight(file, weight);
    size_t header = file->size;
    tiny_end(file);
    memcpy(file->bytes + variant->patch_at, &variant->patch, variant->patch_bytes);
    return header;
}

/* Writes a file that the caller unlinks. */
static void write_bytes(struct check *check, char path[32], const void *data, size_t size) {
    strcpy(path, "/tmp/test_gguf_XXXXXX");
    int descriptor = mkstemp(path);
    CHECK(descriptor >= 0 && write(descriptor, data, size) == (ssize_t)size, "cannot write");
    close(descriptor);
}

/* Opens a model from bytes[0, size). Leaves the line in `error`; "" where it opened. */
static void try_open(struct check *check, const void *data, size_t size, char *error) {
    char path[32];
    struct model model;
    write_bytes(check, path, data, size);
    if (model_open(&model, path, error)) {
        CHECK(model.layers[0][ATTN_Q]->rows == 8, "an open model must be the model");
        model_close(&model);
    }
    unlink(path);
    CHECK(!error[0] || !strncmp(error, path, strlen(path)), "the file is not named: %s", error);
    CHECK(!strchr(error, '\n'), "more than one line: %s", error);
}

#define KEY(...)                .key = {__VA_ARGS__}
#define WEIGHT(text, ...)       .weight = {.name = (text), .dims = __VA_ARGS__}
#define PATCH(at, bytes, value) .patch_at = (at), .patch_bytes = (bytes), .patch = (value)

static const struct variant variants[] = {
    {.expected = NULL},
    {NULL, WEIGHT("unused", {8}, .type = 16)},
    {"unused: got 8 columns, expected a multiple of 256", WEIGHT("unused", {8}, .type = 12)},
    {"attn_k.weight: got (4, 8), expected (8, 8)", .drop = "llama.attention.head_count_kv"},
    {NULL, KEY("llama.rope.scaling.type", GGUF_STRING, 0, "none")},
    {NULL, KEY("llama.rope.scaling.type", GGUF_STRING, 0, "linear")},
    {NULL, KEY("llama.block_count", GGUF_I64, 1, NULL)},
    {NULL, KEY("llama.block_count", GGUF_U8, 1, NULL)},
    {NULL, KEY("llama.rope.freq_base", GGUF_F64, 5e5, NULL)},
    {NULL, WEIGHT("blk.0.attn_q.weight", {8, 8, 1, 1}, .n_dims = 4)},
    {NULL, WEIGHT("output.weight", {8, 5}, .type = TYPE_F16)},
    {"big-endian file again", PATCH(4, 4, 0x03000000)},
    {"version 1", PATCH(4, 4, 1)},
    {"version 0", PATCH(4, 4, 0)},
    {"version 4", PATCH(4, 4, 4)},
    {"not GGUF, and was read as a llama2.c checkpoint", PATCH(0, 4, 0x46554746)},
    {"complete?", PATCH(8, 8, UINT64_MAX)},
    {"complete?", PATCH(8, 8, 1ull << 58)},
    {"complete?", PATCH(8, 8, 400)},
    {"complete?", PATCH(16, 8, UINT64_MAX)},
    {"complete?", PATCH(16, 8, 1ull << 60)},
    {"complete?", PATCH(16, 8, 1000)},
    {"a key: ", PATCH(24, 8, UINT64_MAX)},
    {"a key: ", PATCH(24, 8, 1ull << 40)},
    {"general.architecture: ", PATCH(52, 4, 13)},
    {"general.architecture: ", PATCH(52, 4, 9)},
    {"general.architecture: ", PATCH(56, 8, UINT64_MAX - 7)},
    {"general.architecture: got ?lama", PATCH(64, 1, '\n')},
    {"k: got an unknown value type 99", KEY("k", 99, 0, NULL)},
    {"llama.block_count: is there twice", KEY("llama.block_count", GGUF_U32, 1, NULL),
     .twice = true},
    {"output_norm.weight: is there twice", WEIGHT("output_norm.weight", {8}), .twice = true},
    {"general.alignment: got 0", KEY("general.alignment", GGUF_U32, 0, NULL)},
    {"general.alignment: got 24", KEY("general.alignment", GGUF_U32, 24, NULL)},
    {"general.alignment: got -32", KEY("general.alignment", GGUF_I32, -32, NULL)},
    {"general.alignment: got 1", KEY("general.alignment", GGUF_U32, 1, NULL)},
    {"general.alignment: got string", KEY("general.alignment", GGUF_STRING, 0, "32")},
    {"attn_norm.weight: begins at byte 160 of the data, expected a multiple of 64",
     KEY("general.alignment", GGUF_U32, 64, NULL)},
    {"general.architecture: got gpt2", KEY("general.architecture", GGUF_STRING, 0, "gpt2")},
    {"general.architecture: got u32", KEY("general.architecture", GGUF_U32, 1, NULL)},
    {"general.architecture", .drop = "general.architecture"},
    {"llama.block_count: is missing", .drop = "llama.block_count"},
    {"llama.embedding_length: is missing", .drop = "llama.embedding_length"},
    {"llama.feed_forward_length: is missing", .drop = "llama.feed_forward_length"},
    {"llama.context_length: is missing", .drop = "llama.context_length"},
    {"llama.attention.head_count: is missing", .drop = "llama.attention.head_count"},
    {"rms_epsilon: is missing", .drop = "llama.attention.layer_norm_rms_epsilon"},
    {"rms_epsilon: got", KEY("llama.attention.layer_norm_rms_epsilon", GGUF_F32, NAN, NULL)},
    {"rms_epsilon: got", KEY("llama.attention.layer_norm_rms_epsilon", GGUF_F32, -1, NULL)},
    {"llama.block_count: got 0", KEY("llama.block_count", GGUF_U32, 0, NULL)},
    {"llama.block_count: got -1", KEY("llama.block_count", GGUF_I32, -1, NULL)},
    {"llama.block_count: got 4294967295", KEY("llama.block_count", GGUF_U32, 4294967295, NULL)},
    {"blk.1.attn_norm.weight: is missing; block_count says 2",
     KEY("llama.block_count", GGUF_U32, 2, NULL)},
    {"llama.embedding_length: got 0", KEY("llama.embedding_length", GGUF_U32, 0, NULL)},
    {"token_embd.weight: got (5, 8), expected (5, 16)",
     KEY("llama.embedding_length", GGUF_U32, 16, NULL)},
    {"ffn_gate.weight: got (32, 8), expected (64, 8)",
     KEY("llama.feed_forward_length", GGUF_U32, 64, NULL)},
    {"context_length: got 99999999", KEY("llama.context_length", GGUF_U32, 99999999, NULL)},
    {"head_count: got 0", KEY("llama.attention.head_count", GGUF_U32, 0, NULL)},
    {"head_count: got an array of i32", KEY("llama.attention.head_count", GGUF_ARRAY, 1, NULL)},
    {"head_count_kv: got an array", KEY("llama.attention.head_count_kv", GGUF_ARRAY, 1, NULL)},
    {"length: got an array", KEY("llama.feed_forward_length", GGUF_ARRAY, 1, NULL)},
    {"head_count_kv: got 4", KEY("llama.attention.head_count_kv", GGUF_U32, 4, NULL)},
    {"head_count_kv: got 2, expected a divisor of head_count, 3",
     .drop = "llama.attention.head_count", KEY("llama.attention.head_count_kv", GGUF_U32, 2, NULL),
     .also = {"llama.attention.head_count", GGUF_U32, 3, NULL}},
    {"key_length: got 1024", KEY("llama.attention.key_length", GGUF_U32, 1024, NULL)},
    {"blk.0.attn_q.weight: got (8, 8), expected (16, 8)",
     KEY("llama.attention.key_length", GGUF_U32, 8, NULL)},
    {"value_length: got 8", KEY("llama.attention.value_length", GGUF_U32, 8, NULL)},
    {"dimension_count: got an odd number, 3", KEY("llama.rope.dimension_count", GGUF_U32, 3, NULL)},
    {"dimension_count: got 6", KEY("llama.rope.dimension_count", GGUF_U32, 6, NULL)},
    {"freq_base: got inf", KEY("llama.rope.freq_base", GGUF_F32, INFINITY, NULL)},
    {"freq_base: got 0", KEY("llama.rope.freq_base", GGUF_F32, 0, NULL)},
    {"freq_base: got u32", KEY("llama.rope.freq_base", GGUF_U32, 10000, NULL)},
    {NULL, KEY("llama.rope.scaling.type", GGUF_STRING, 0, "yarn")},
    {"rope.freq_base_swa: got 5000, expected 10000",
     KEY("llama.rope.freq_base_swa", GGUF_F32, 5000, NULL)},
    {"ffn_gate.weight: got one row, which is not supported",
     KEY("llama.feed_forward_length", GGUF_U32, 1, NULL), WEIGHT("blk.0.ffn_gate.weight", {8, 1})},
    {"rope.scaling.type: got longrope, expected none, linear or yarn",
     KEY("llama.rope.scaling.type", GGUF_STRING, 0, "longrope")},
    {"rope.scaling.factor: got 0.5", KEY("llama.rope.scaling.factor", GGUF_F32, 0.5, NULL)},
    {"expert_used_count: is missing", KEY("llama.expert_count", GGUF_U32, 8, NULL)},
    {"expert_group_count: got 4, expected 0 to 1",
     KEY("llama.expert_group_count", GGUF_U32, 4, NULL)},
    {"expert_count: got 1025", KEY("llama.expert_count", GGUF_U32, 1025, NULL)},
    {"tokenizer.ggml.tokens: got 4", KEY("tokenizer.ggml.tokens", GGUF_ARRAY, 4, "t")},
    {"token_embd.weight: is missing", .drop = "token_embd.weight"},
    {"blk.0.attn_norm.weight: is missing", .drop = "blk.0.attn_norm.weight"},
    {"blk.0.attn_q.weight: is missing", .drop = "blk.0.attn_q.weight"},
    {"blk.0.ffn_down.weight: is missing", .drop = "blk.0.ffn_down.weight"},
    {"output_norm.weight: is missing", .drop = "output_norm.weight"},
    {"output_norm.weight: got F16, expected F32",
     WEIGHT("output_norm.weight", {8}, .type = TYPE_F16)},
    {"output_norm.weight: got (1, 9), expected (1, 8)", WEIGHT("output_norm.weight", {9})},
    {"attn_k.weight: got (3, 8), expected (4, 8)", WEIGHT("blk.0.attn_k.weight", {8, 3})},
    {"output.weight: got (4, 8), expected (5, 8)", WEIGHT("output.weight", {8, 4})},
    {"attn_q.weight: got 8 columns, expected a multiple of 256",
     WEIGHT("blk.0.attn_q.weight", {8, 8}, .type = STORED_Q5_K)},
    {"attn_q.weight: got a type unknown here, which is not read; take a file of Q8_0 or Q4_K_M",
     WEIGHT("blk.0.attn_q.weight", {8, 8}, .type = 77)},
    {"attn_q.weight: got IQ2_XS, which is not read; take a file of Q8_0 or Q4_K_M",
     WEIGHT("blk.0.attn_q.weight", {8, 8}, .type = 17)},
    {"attn_q.weight: got TQ2_0, which is not read; take a file of Q8_0 or Q4_K_M",
     WEIGHT("blk.0.attn_q.weight", {8, 8}, .type = 35)},
    {"attn_q.weight: got type 4 (in early files MXFP4), which is not read; take a newer file",
     WEIGHT("blk.0.attn_q.weight", {8, 8}, .type = 4)},
    {NULL, WEIGHT("blk.0.ffn_down.weight", {32, 8}, .type = STORED_Q4_1)},
    {NULL, WEIGHT("blk.0.ffn_down.weight", {32, 8}, .type = STORED_IQ4_NL)},
    {"output_norm.weight: got Q5_0, expected F32",
     WEIGHT("output_norm.weight", {32}, .type = STORED_Q5_0)},
    {"blk.0.attn_norm.bias: is not supported in a llama of 1 layers",
     WEIGHT("blk.0.attn_norm.bias", {8})},
    {"output_norm.bias: is not supported", WEIGHT("output_norm.bias", {8})},
    {"output.bias: is not supported", WEIGHT("output.bias", {5})},
    {"blk.0.attn_q.scale: is not supported", WEIGHT("blk.0.attn_q.scale", {1})},
    {"blk.0.attn_sinks.weight: is not supported", WEIGHT("blk.0.attn_sinks.weight", {2})},
    {"position_embd.weight: is not supported", WEIGHT("position_embd.weight", {8, 64})},
    {"blk.1.attn_norm.weight: is not supported in a llama of 1 layers",
     WEIGHT("blk.1.attn_norm.weight", {8})},
    {NULL, WEIGHT("v.patch_embd.weight", {8})},
    {"attention.causal: got false", KEY("llama.attention.causal", GGUF_BOOL, 0, NULL)},
    {NULL, KEY("llama.attention.causal", GGUF_BOOL, 1, NULL)},
    {"logit_scale: got 8, which is not supported", KEY("llama.logit_scale", GGUF_F32, 8, NULL)},
    {NULL, KEY("llama.logit_scale", GGUF_F32, 1, NULL)},
    {"softcapping: got 30", KEY("llama.final_logit_softcapping", GGUF_F32, 30, NULL)},
    {"attention.scale: got 0.125", KEY("llama.attention.scale", GGUF_F32, 0.125, NULL)},
    {"attn_q.weight: got 8 columns", WEIGHT("blk.0.attn_q.weight", {8, 8}, .type = TYPE_Q8_0)},
    {"attn_q.weight: got 2 dimensions, (1, 8, 0)", WEIGHT("blk.0.attn_q.weight", {0, 8})},
    {"attn_q.weight: got 2 dimensions, (1, 0, 8)", WEIGHT("blk.0.attn_q.weight", {8}, .n_dims = 2)},
    {"attn_q.weight: got 4 dim", WEIGHT("blk.0.attn_q.weight", {8, 4, 1, 2}, .n_dims = 4)},
    {"attn_q.weight: got 3 dimensions, (1073741824, 2, 8)",
     WEIGHT("blk.0.attn_q.weight", {8, 2, 1 << 30}, .n_dims = 3)},
    {"attn_q.weight: got 5 dim", WEIGHT("blk.0.attn_q.weight", {8, 8, 1, 1}, .n_dims = 5)},
    {"t.x: got 2 dimensions, (1, 1, 18446744073709551615)",
     WEIGHT("t.x", {UINT64_MAX, 1}, .offset = 32)},
    {"t.x: got 2 dimensions, (1, 4611686018427387904, 1073741824)",
     WEIGHT("t.x", {1ull << 30, 1ull << 62}, .offset = 32)},
    {": incomplete: 4,384 of 4,611,686,018,427,393,152 bytes",
     WEIGHT("t.x", {1 << 30, 1 << 30}, .offset = 4096)},
    {"t.x: begins at byte 18446744073709551584", WEIGHT("t.x", {8}, .offset = UINT64_MAX - 31)},
    {": incomplete: 4,352 of 1,049,728 bytes", WEIGHT("t.x", {8}, .offset = 1 << 20)},
    {"t.x: begins at byte 33", WEIGHT("t.x", {8}, .offset = 33)},
    {"t.x: begins at byte 64", WEIGHT("t.x", {8}, .offset = 64)},
    {"ffn_up.weight: begins at byte 32", WEIGHT("blk.0.ffn_up.weight", {8, 32}, .offset = 32)},
    {"rope_freqs.weight: entry 0 is 0", WEIGHT("rope_freqs.weight", {2})},
    {"rope_freqs.weight: got (1, 3), expected (1, 2)", WEIGHT("rope_freqs.weight", {3})},
    {NULL, KEY("split.count", GGUF_U16, 1, NULL)},
    {"split.count: got string, expected an integer", KEY("split.count", GGUF_STRING, 0, "2")},
    {"split.tensors.count: is missing", KEY("split.count", GGUF_U16, 3, NULL)},
    {"attn_sinks.weight: is not supported", WEIGHT("blk.0.attn_sinks.weight", {8})},
    {"ffn_up_exps.weight: is not supported", WEIGHT("blk.0.ffn_up_exps.weight", {8})},
    {"attn_q.bias: got (1, 4), expected (1, 8)", WEIGHT("blk.0.attn_q.bias", {4})},
};

static struct tiny built; /* the file of the test at hand */

static void refuses_variants(struct check *check) {
    for (size_t i = 0; i < sizeof variants / sizeof *variants; i++) {
        char error[ERROR_LENGTH];
        build(&built, &variants[i], 2 + i % 2);
        largest_request = 0;
        try_open(check, built.bytes, built.size, error);
        const char *expected = variants[i].expected;
        CHECK(expected ? strstr(error, expected) != NULL : !error[0],
              "variant %zu: got `%s`, not `%s`", i, error, expected ? expected : "");
        CHECK(largest_request < 1 << 20, "variant %zu asked for %zu bytes", i, largest_request);
    }
}

/* What is not a model is called by its name, and a cut file tells how much of it there is. */
static void names_other_formats(struct check *check) {
    static const struct {
        const char *bytes;
        size_t size;
        const char *expected;
    } files[] = {
#define BEGINS(text, is) {text, sizeof(text) - 1, is}
        BEGINS("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 132\n",
               "Git LFS"),
        BEGINS("<!DOCTYPE html><html lang=\"en\"><body>Not found</body></html>", "of the web"),
        BEGINS("<html>\n<head><title>404</title></head></html>", "of the web"),
        BEGINS("<?xml version=\"1.0\"?><Error>AccessDenied</Error>", "of the web"),
        BEGINS("PK\3\4\0\0\10\10\0\0\0\0\0\0\0\0\0\0\0\0archive/data.pkl", "a zip archive"),
        BEGINS("\x80\2\x8a\nl\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.\x80\2M\xe9\3.", "a pickle"),
        BEGINS("\x3e\0\0\0\0\0\0\0{\"__metadata__\":{\"format\":\"pt\"}}", "safetensors"),
        BEGINS("Invalid username or password.", "is text, not a model: Invalid username or"),
        BEGINS("{\n  \"architectures\": [\"LlamaForCausalLM\"]\n}\n", "is text, not a model: {"),
        BEGINS("tjgg\3\0\0\0\0\x7d\0\0\0\x10\0\0", "the format before GGUF")};
#undef BEGINS
    char error[ERROR_LENGTH];
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        try_open(check, files[i].bytes, files[i].size, error);
        CHECK(strstr(error, files[i].expected) && !strstr(error, "llama2.c") &&
                  !strstr(error, "split"),
              "format %zu: got `%s`, not `%s`", i, error, files[i].expected);
    }
    static uint8_t bytes[1 << 18]; /* more than either file has */
    static const char *const paths[] = {"test/data/ref/llama-tied-f32.gguf",
                                        "test/data/ref/llama-tied-f32.bin"};
    static const char *const expected[] = {": incomplete: 100,000 of 139,712 bytes",
                                           ": incomplete: 100,000 of 154,396 bytes"};
    for (size_t i = 0; i < 2; i++) {
        FILE *file = fopen(paths[i], "rb");
        CHECK(file && fread(bytes, 1, sizeof bytes, file) > 100000, "cannot read %s", paths[i]);
        fclose(file);
        try_open(check, bytes, 100000, error);
        CHECK(strstr(error, expected[i]), "got `%s`, not `%s`", error, expected[i]);
    }
}

/* Windows that are none, that some layers have, and YaRN's keys: in place of what is usual. */
static void config_follows_keys(struct check *check) {
    static const struct {
        struct variant keys;
        int window, period;
        double magnitude;
    } cases[] = {{{KEY("llama.attention.sliding_window", GGUF_U32, 64, NULL)}, 0, 0, 1},
                 {{KEY("llama.attention.sliding_window", GGUF_U32, 63, NULL)}, 63, 0, 1},
                 {{KEY("llama.attention.sliding_window", GGUF_U32, 8, NULL),
                   .also = {"llama.attention.sliding_window_pattern", GGUF_U32, 4, NULL}},
                  8,
                  4,
                  1},
                 {{KEY("llama.rope.scaling.attn_factor", GGUF_F32, 0.5, NULL)}, 0, 0, 0.5},
                 {{KEY("llama.rope.scaling.type", GGUF_STRING, 0, "yarn"),
                   .also = {"llama.rope.scaling.factor", GGUF_F32, 32, NULL}},
                  0,
                  0,
                  1.3465736},
                 {{KEY("llama.rope.scaling.type", GGUF_STRING, 0, "yarn"),
                   .also = {"llama.rope.scaling.yarn_attn_factor", GGUF_F32, 0.75, NULL}},
                  0,
                  0,
                  0.75}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char error[ERROR_LENGTH], path[32];
        struct model model;
        build(&built, &cases[i].keys, 3);
        write_bytes(check, path, built.bytes, built.size);
        bool ok = model_open(&model, path, error);
        CHECK(ok, "case %zu: %s", i, error);
        if (ok)
            CHECK(model.config.window == cases[i].window &&
                      model.config.window_period == cases[i].period &&
                      fabs((double)model.config.rope_magnitude - cases[i].magnitude) < 1e-6,
                  "case %zu: window %d, of %d layers all but one; magnitude %g", i,
                  model.config.window, model.config.window_period,
                  (double)model.config.rope_magnitude);
        model_close(&model);
        unlink(path);
    }
}

/* What --verbose tells of a file that opens. */
static void notes_what_is_unused(struct check *check) {
    static const struct variant variant = {
        WEIGHT("blk.0.ffn_down.weight", {32, 8}, .type = STORED_Q4_1),
        KEY("llama.pooling_type", GGUF_U32, 3, NULL),
        .also = {"llama.vocab_size", GGUF_U32, 5, NULL}};
    char error[ERROR_LENGTH], path[32], *text = NULL;
    size_t length;
    struct model model;
    build(&built, &variant, 3);
    write_bytes(check, path, built.bytes, built.size);
    CHECK(model_open(&model, path, error), "%s", error);
    FILE *memory = open_memstream(&text, &length);
    model_notes(&model, memory);
    fclose(memory);
    static const char expected[] = "dynamo: llama.pooling_type is not used\n"
                                   "dynamo: Q4_1 is kept as Q8_0: 0.0 MB become 0.0\n";
    CHECK(strcmp(text, expected) == 0, "got `%s`", text);
    model_close(&model);
    unlink(path);
    free(text);
}

/* Every prefix is refused: the data ends with the file. */
static void refuses_prefixes(struct check *check) {
    char error[ERROR_LENGTH];
    build(&built, &variants[0], 3);
    for (size_t size = 0; size < built.size; size++) {
        try_open(check, built.bytes, size, error);
        CHECK(error[0], "a prefix of %zu of %zu bytes opened", size, built.size);
    }
}

static void survives_mutations(struct check *check) {
    static const uint8_t flips[] = {0x01, 0x80, 0xff, 0x20, 0x08};
    char error[ERROR_LENGTH];
    size_t header = build(&built, &variants[0], 3);
    for (size_t i = 0; i < header * sizeof flips; i++) {
        uint8_t *byte = &built.bytes[i / sizeof flips], kept = *byte;
        *byte ^= flips[i % sizeof flips];
        largest_request = 0;
        try_open(check, built.bytes, built.size, error);
        CHECK(largest_request < 1 << 20, "byte %zu: asked for %zu", i / sizeof flips,
              largest_request);
        *byte = kept;
    }
}

/* Each allocation in turn fails, until none does. */
static void check_memory(struct check *check, const char *path, long least) {
    char error[ERROR_LENGTH] = "none yet";
    long allowed = 0;
    while (error[0] && allowed < 1000) {
        struct model model;
        requests_until_fail = ++allowed;
        if (model_open(&model, path, error))
            model_close(&model);
        CHECK(!error[0] || strstr(error, "out of memory"), "got %s", error);
    }
    requests_until_fail = 0;
    CHECK(allowed > least && !error[0], "only %ld allocations failed", allowed - 1);
}

static void survives_lack_of_memory(struct check *check) {
    char path[32];
    build(&built, &variants[0], 3);
    write_bytes(check, path, built.bytes, built.size);
    check_memory(check, path, 5);
    unlink(path);
}

/* ---- facts ---- */

static void reads_values(struct check *check) {
    static const struct key keys[] = {
        {"i", GGUF_F32, 0.5, NULL},   {"j", GGUF_F64, 1e300, NULL},
        {"k", GGUF_BOOL, 1, NULL},    {"l", GGUF_STRING, 0, "text"},
        {"m", GGUF_ARRAY, 3, NULL},   {"n", GGUF_ARRAY, 2, "word"}, /* not in the order of names */
        {"a", GGUF_U8, 200, NULL},    {"b", GGUF_I8, -100, NULL},
        {"c", GGUF_U16, 60000, NULL}, {"d", GGUF_I16, -30000, NULL},
        {"e", GGUF_U32, 4e9, NULL},   {"f", GGUF_I32, -2e9, NULL},
        {"g", GGUF_I64, -9e15, NULL}, {"h", GGUF_U64, 9e15, NULL}};
    char error[ERROR_LENGTH], path[32];
    tiny_begin(&built, 3);
    for (size_t i = 0; i < 14; i++)
        put_key(&built, &keys[i]);
    tiny_key(&built, "huge", GGUF_U64);
    tiny_put(&built, &(uint64_t){UINT64_MAX}, 8);
    tiny_end(&built);
    write_bytes(check, path, built.bytes, built.size);
    struct gguf *file = gguf_open(path, error);
    unlink(path);
    CHECK(file, "%s", error);
    if (!file)
        return;
    int64_t integer = 0;
    double real = 0;
    bool truth = false;
    struct gguf_string text = {"", 0};
    struct gguf_array array = {GGUF_U32, 0, NULL, NULL};
    for (size_t i = 6; i < 14; i++) {
        CHECK(gguf_get_int(file, keys[i].name, &integer) && (double)integer == keys[i].number,
              "%s: got %jd", keys[i].name, (intmax_t)integer);
    }
    CHECK(gguf_get_float(file, "i", &real) && real == 0.5, "got %g", real);
    CHECK(gguf_get_float(file, "j", &real) && real == 1e300, "got %g", real);
    CHECK(gguf_get_bool(file, "k", &truth) && truth, "got false");
    CHECK(gguf_get_string(file, "l", &text) && gguf_equals(text, "text"), "wrong text");
    CHECK(gguf_get_array(file, "m", &array) && array.type == GGUF_I32 && array.count == 3 &&
              !memcmp(array.values, (int32_t[]){0, 1, 2}, 12),
          "wrong array");
    CHECK(gguf_get_array(file, "n", &array) && array.count == 2 &&
              gguf_equals(array.strings[1], "word"),
          "wrong strings");
    CHECK(!gguf_get_int(file, "absent", &integer) && !gguf_error(file)[0], "absent is no error");
    CHECK(!gguf_get_int(file, "huge", &integer) && strstr(gguf_error(file), "huge"), "no error");
    CHECK(!gguf_get_int(file, "l", &integer) && strstr(gguf_error(file), "huge"), "not once");
    gguf_close(file);
}

static void opens_real_files(struct check *check) {
    static const struct {
        const char *path, *model, *token, *refused;
        size_t n_tokens, token_at;
    } facts[] = {{"test/data/vocab-gpt-2.gguf", "gpt2", "<|endoftext|>",
                  "general.architecture: got gpt2", 50257, 50256},
                 {"test/data/vocab-llama-spm.gguf", "llama", "</s>",
                  "token_embd.weight: is missing", 32000, 2}};
    char error[ERROR_LENGTH];
    struct model model;
    for (size_t i = 0; i < 2; i++) {
        struct gguf *file = gguf_open(facts[i].path, error);
        struct gguf_string kind;
        struct gguf_array tokens;
        CHECK(file && gguf_get_string(file, "tokenizer.ggml.model", &kind) &&
                  gguf_equals(kind, facts[i].model),
              "%s", error);
        CHECK(file && gguf_get_array(file, "tokenizer.ggml.tokens", &tokens) &&
                  tokens.count == facts[i].n_tokens &&
                  gguf_equals(tokens.strings[facts[i].token_at], facts[i].token),
              "wrong tokens");
        gguf_close(file);
        CHECK(!model_open(&model, facts[i].path, error) && strstr(error, facts[i].refused), "%s",
              error);
    }
    static const char *const refused[][2] = {
        {"test/data", "folder"}, {"test/absent.gguf", "No such file"}, {"/dev/null", "regular"}};
    for (size_t i = 0; i < 3; i++)
        CHECK(!gguf_open(refused[i][0], error) && strstr(error, refused[i][1]), "%s", error);
    struct gguf *file = gguf_open("test/data/aidreams_tokenizer.bin", error);
    CHECK(file && !gguf_tensor(file, "token_embd.weight"), "%s", error);
    gguf_close(file);
    CHECK(!model_open(&model, "test/data/aidreams_tokenizer.bin", error) &&
              strstr(error, "not GGUF"),
          "%s", error);
}

/* The shapes are those that test/make_reference.py asked the original implementations for. */
static void opens_architectures(struct check *check) {
    static const struct {
        const char *path, *architecture, *needs;
        int d_model, n_heads, n_kv_heads, head_dim, d_ff, vocab_size;
        bool tied;
        enum tensor_type type;
    } facts[] = {
        {"qwen2-f16", "qwen2", "attn_v.bias", 112, 14, 2, 8, 64, 331, true, TYPE_F16},
        {"qwen2-q8_0", "qwen2", "attn_q.bias", 64, 4, 4, 16, 96, 307, false, TYPE_Q8_0},
        {"qwen3-f32", "qwen3", "attn_q_norm.weight", 48, 4, 1, 24, 100, 331, true, TYPE_F32},
        {"qwen3-q8_0", "qwen3", "attn_k_norm.weight", 64, 16, 4, 16, 256, 397, false, TYPE_Q8_0},
        {"llama31-bf16", "llama", "attn_q.weight", 64, 8, 4, 16, 96, 331, true, TYPE_BF16}};
    for (size_t i = 0; i < sizeof facts / sizeof *facts; i++) {
        char error[ERROR_LENGTH], path[64], name[64];
        snprintf(path, sizeof path, "test/data/ref/%s.gguf", facts[i].path);
        snprintf(name, sizeof name, "blk.1.%s", facts[i].needs);
        struct model model = {0};
        if (!model_open(&model, path, error)) {
            CHECK(false, "%s", error);
            continue;
        }
        const struct model_config *config = &model.config;
        const struct tensor *const *layer = model.layers[1];
        bool qwen2 = same(facts[i].architecture, "qwen2");
        bool qwen3 = same(facts[i].architecture, "qwen3");
        CHECK(same(config->architecture, facts[i].architecture), "got %s", config->architecture);
        CHECK(config->d_model == facts[i].d_model && config->n_heads == facts[i].n_heads &&
                  config->n_kv_heads == facts[i].n_kv_heads &&
                  config->head_dim == facts[i].head_dim && config->d_ff == facts[i].d_ff &&
                  config->vocab_size == facts[i].vocab_size && config->n_layers == 2 &&
                  config->context_length == 512 && config->rope_dim == config->head_dim,
              "%s: wrong shape", path);
        CHECK(config->rope_theta == (qwen2 || qwen3 ? 1e6f : 5e5f), "%g",
              (double)config->rope_theta);
        CHECK(config->norm_epsilon == (qwen2 || qwen3 ? 1e-6f : 1e-5f), "%g",
              (double)config->norm_epsilon);
        CHECK(config->rope_adjacent == !(qwen2 || qwen3), "%s: wrong pairs", path);
        CHECK(!layer[Q_BIAS] == !qwen2 && !layer[K_BIAS] == !qwen2 && !layer[V_BIAS] == !qwen2,
              "%s: biases", path);
        CHECK(!layer[ATTN_Q_NORM] == !qwen3 && !layer[ATTN_K_NORM] == !qwen3, "%s: norms", path);
        CHECK(!model.layers[0][ROPE_FREQS] == (qwen2 || qwen3), "%s: rope_freqs", path);
        CHECK((model.layers[0][OUTPUT] == model.layers[0][TOKEN_EMBD]) == facts[i].tied, "%s: tied",
              path);
        CHECK(layer[ATTN_Q]->type == facts[i].type, "%s: type %d", path, layer[ATTN_Q]->type);
        size_t size = model.file->size;
        uint8_t *copy = malloc(size), *found;
        memcpy(copy, model.file->map, size);
        found = memmem(copy, size, name, strlen(name));
        CHECK(found, "%s is not there", name);
        if (found)
            found[strlen(name) - 1] = '_';
        model_close(&model);
        try_open(check, copy, size, error);
        CHECK(strstr(error, name) && strstr(error, "is missing"), "got `%s`", error);
        free(copy);
    }
}

/* The same model in both formats, tied and untied: the very same numbers under the same names. */
static void formats_agree(struct check *check) {
    static const char *const paths[][2] = {
        {"test/data/ref/llama-mha-f32.bin", "test/data/ref/llama-mha-f32.gguf"},
        {"test/data/ref/llama-tied-f32.bin", "test/data/ref/llama-tied-f32.gguf"}};
    for (size_t i = 0; i < 2; i++) {
        char error[ERROR_LENGTH];
        struct model models[2] = {0};
        bool ok = true;
        for (size_t j = 0; j < 2; j++)
            ok = ok && model_open(&models[j], paths[i][j], error);
        CHECK(ok, "%s", error);
        CHECK(ok && models[0].is_checkpoint && !models[1].is_checkpoint,
              "which is the checkpoint?");
        CHECK(ok && (models[0].layers[0][OUTPUT] == models[0].layers[0][TOKEN_EMBD]) == (i == 1),
              "wrongly tied");
        int n_layers = ok ? models[0].config.n_layers : 0;
        CHECK(n_layers == 2 && models[1].config.n_layers == 2, "got %d layers", n_layers);
        for (int at = 0; at < n_layers * N_ROLES; at++) {
            const struct tensor *tensors[2];
            for (size_t j = 0; j < 2; j++)
                tensors[j] = models[j].layers[at / N_ROLES][at % N_ROLES];
            CHECK(!tensors[0] == !tensors[1] &&
                      (!tensors[0] ||
                       (tensors[0]->rows == tensors[1]->rows &&
                        tensors[0]->cols == tensors[1]->cols &&
                        tensors[0]->bytes == tensors[1]->bytes &&
                        !memcmp(tensors[0]->data, tensors[1]->data, tensors[0]->bytes))),
                  "%s: tensor %d differs", paths[i][0], at);
        }
        for (size_t j = 0; j < 2; j++)
            model_close(&models[j]);
    }
}

/* The file's header says 64, 172, 4 layers, 8 and 4 heads, 512 tokens, tied, 512 positions. */
static void opens_checkpoint(struct check *check) {
    char error[ERROR_LENGTH];
    struct model model;
    if (!model_open(&model, "test/data/aidreams260K.bin", error)) {
        CHECK(false, "%s", error);
        return;
    }
    struct gguf *file = model.file;
    size_t size = 0;
    CHECK(gguf_raw(file, &size) && size == file->size, "%zu bytes", size);
    int32_t header[7];
    memcpy(header, file->map, sizeof header);
    CHECK(model.config.d_model == header[0] && model.config.d_ff == header[1] &&
              model.config.n_layers == header[2] && model.config.n_heads == header[3] &&
              model.config.n_kv_heads == header[4] && model.config.vocab_size == header[5] &&
              model.config.context_length == header[6],
          "differs from the header");
    CHECK(model.config.rope_adjacent && model.layers[0][OUTPUT] == model.layers[0][TOKEN_EMBD],
          "adjacent pairs, tied");
    int64_t d = header[0], layers = header[2], kv = d / header[3] * header[4];
    int64_t at = header[5] * d + layers * (d + d * d) + 2 * kv * d; /* wk of layer 2 */
    const float *floats = (const float *)(const void *)(file->map + sizeof header);
    CHECK(model.layers[2][ATTN_K]->data == floats + at, "attn_k of layer 2 lies elsewhere");
    at = header[5] * d + layers * (2 * d + 2 * d * d + 2 * kv * d + 3 * header[1] * d);
    CHECK(model.layers[0][OUTPUT_NORM]->data == floats + at, "output_norm lies elsewhere");
    CHECK(file->size == 28 + (size_t)(at + d + header[6] * (d / header[3])) * 4, "wrong size");
    uint8_t *copy = malloc(file->size + 1);
    memcpy(copy, file->map, file->size);
    model_close(&model);
    for (size_t cut = 0; cut < size + 2; cut += cut < 30 ? 1 : 9973) {
        try_open(check, copy, cut == size ? size + 1 : cut, error);
        CHECK(error[0], "opened at %zu bytes", cut);
    }
    for (size_t i = 0; i < 28 * 3; i++) {
        copy[i / 3] ^= (uint8_t[]){0x80, 0xff, 0x01}[i % 3];
        try_open(check, copy, size, error);
        CHECK(error[0], "opened with byte %zu changed", i / 3);
        memcpy(copy, header, sizeof header);
    }
    free(copy);
}

/* ---- files in parts ---- */

enum { N_PARTS = 3 };

/* A split model, changed in one part. Numbers are added to what is right. */
struct split_case {
    const char *expected; /* the message must contain it; NULL: it opens */
    int named, at;        /* the part that is opened; the one that is changed, or -1: all */
    int no, count, total, first, last;
    const char *drop;           /* this key is not there */
    const char *key, *text;     /* this one is, too */
    int cut;                    /* bytes that are missing at its end; -1: there is no file */
    bool two_bytes, plain_name; /* the file has only so many, or is named like a whole model */
    bool no_first;              /* the first part has no tensors */
};

/* A key as it was read. */
static void put_read_key(struct tiny *to, const struct gguf_key *key) {
    const struct gguf_array *value = &key->value;
    char name[64];
    snprintf(name, sizeof name, "%.*s", (int)key->name.length, key->name.data);
    if (key->is_array)
        tiny_array(to, name, value->type, value->count);
    else
        tiny_key(to, name, value->type);
    for (size_t i = 0; i < value->count && value->strings; i++)
        tiny_raw(to, value->strings[i].data, value->strings[i].length);
    if (!value->strings)
        tiny_put(to, value->values, value->count * gguf_values[value->type].bytes);
}

/* The keys of a part, with all of `from` if it is part 0; tensors [first, last); their data. */
static void build_part(struct tiny *to, const struct gguf *from, int part,
                       const struct split_case *split) {
    bool changed = split->at == part || split->at < 0;
    size_t first = from->n_tensors * (size_t)part / N_PARTS;
    size_t last = from->n_tensors * (size_t)(part + 1) / N_PARTS;
    first = split->no_first && part <= 1 ? 0 : first + (size_t)(changed ? split->first : 0);
    last = split->no_first && part == 0 ? 0 : last + (size_t)(changed ? split->last : 0);
    const struct key keys[] = {
        {"split.no", GGUF_U16, part + (changed ? split->no : 0), NULL},
        {"split.count", GGUF_I32, N_PARTS + (changed ? split->count : 0), NULL},
        {"split.tensors.count", GGUF_I32, (double)from->n_tensors + (changed ? split->total : 0),
         NULL},
        {changed ? split->key : NULL, GGUF_STRING, 0, split->text}};
    tiny_begin(to, 3);
    for (size_t i = 0; i < from->n_keys && part == 0; i++)
        put_read_key(to, &from->keys[i]);
    for (size_t i = 0; i < 4; i++)
        if (keys[i].name && !(changed && same(keys[i].name, split->drop)))
            put_key(to, &keys[i]);
    for (size_t i = first; i < last; i++) {
        const struct tensor *tensor = &from->tensors[i];
        char name[64];
        snprintf(name, sizeof name, "%.*s", (int)tensor->name.length, tensor->name.data);
        tiny_tensor(to, name, (uint64_t)tensor->rows, (uint64_t)tensor->cols, tensor->type);
    }
    size_t at = tiny_end(to);
    for (size_t i = first; i < last; i++) {
        memcpy(to->bytes + at, from->tensors[i].data, from->tensors[i].bytes);
        to->size = at + from->tensors[i].bytes; /* without padding at the end */
        at += (from->tensors[i].bytes + 31) / 32 * 32;
    }
}

/* Writes all parts into a folder; path: of the part that is to be opened. */
static void write_parts(struct check *check, const char *folder, const struct gguf *from,
                        const struct split_case *split, char path[64]) {
    for (int part = 0; part < N_PARTS; part++) {
        char name[64];
        bool changed = split->at == part;
        bool plain = changed && split->plain_name;
        snprintf(name, sizeof name, plain ? "%s/m.gguf" : "%s/m-%05d-of-%05d.gguf", folder,
                 part + 1, N_PARTS);
        if (part == split->named)
            strcpy(path, name);
        unlink(name);
        build_part(&built, from, part, split);
        if (changed && split->cut < 0)
            continue;
        size_t size = changed && split->two_bytes ? 2 : built.size;
        size -= (size_t)(changed ? split->cut : 0);
        FILE *file = fopen(name, "wb");
        CHECK(file && fwrite(built.bytes, 1, size, file) == size, "cannot write %s", name);
        fclose(file);
    }
}

static void check_same_tensors(struct check *check, const struct gguf *whole,
                               const struct gguf *split) {
    CHECK(split->n_tensors == whole->n_tensors, "got %zu tensors", split->n_tensors);
    for (size_t i = 0; i < whole->n_tensors; i++) {
        const struct tensor *expected = &whole->tensors[i];
        char name[64];
        snprintf(name, sizeof name, "%.*s", (int)expected->name.length, expected->name.data);
        const struct tensor *got = gguf_tensor(split, name);
        CHECK(got && got->type == expected->type && got->rows == expected->rows &&
                  got->cols == expected->cols && got->bytes == expected->bytes &&
                  got->period == 0 && !memcmp(got->data, expected->data, expected->bytes),
              "%s differs", name);
    }
}

#define SECOND "m-00002-of-00003.gguf: "
#define FIRST  "m-00001-of-00003.gguf: "

static const struct split_case splits[] = {
    {.expected = NULL},
    {NULL, .named = 1},
    {NULL, .named = 2},
    {NULL, .no_first = true},
    {NULL, .at = 1, .key = "general.architecture", .text = "llama"},
    {SECOND "No such file or directory; it is part 2 of 3", .at = 1, .cut = -1},
    {FIRST "No such file or directory; it is part 1 of 3", .named = 2, .cut = -1},
    {SECOND "split.no: got 2, expected 1; is it of another model?", .at = 1, .no = 1},
    {SECOND "split.no: got 2, expected a name that ends in -00003-of-00003.gguf", .named = 1,
     .at = 1, .no = 1},
    {FIRST "split.no: got 1, expected a name that ends in -00002-of-00003.gguf", .no = 1},
    {FIRST "split.no: got 1, expected 0; is it", .named = 1, .no = 1},
    {FIRST "split.no: got 9, expected 0 to 2", .no = 9},
    {"m.gguf: split.no: got 0, expected a name that ends in -00001-of-00003", .plain_name = true},
    {SECOND "split.count: got 4, expected 3; is it", .at = 1, .count = 1},
    {SECOND "split.count: got 1, expected 3; is it", .at = 1, .count = -2},
    {FIRST "split.no: got 0, expected a name that ends in -00001-of-00004.gguf", .count = 1},
    {FIRST "split.count: got 0, expected 1 to 99999", .count = -3},
    {FIRST "split.count: got -1, expected 1 to 99999", .count = -4},
    {FIRST "split.count: got 100000, expected 1 to 99999", .count = 99997},
    {SECOND "split.tensors.count: got 22, expected 21; is it", .at = 1, .total = 1},
    {FIRST "split.tensors.count: got 22, but the parts hold 21", .at = -1, .total = 1},
    {FIRST "split.tensors.count: got -1, but the parts hold 21", .at = -1, .total = -22},
    {FIRST "split.tensors.count: got 21, but the parts hold 20", .at = 1, .last = -1},
    {SECOND "blk.0.ffn_gate.weight: is there twice", .at = 1, .first = -1},
    {"m-00003-of-00003.gguf: blk.1.ffn_down.weight: is there twice", .at = 1, .last = 1},
    {SECOND "split.no: is missing", .at = 1, .drop = "split.no"},
    {SECOND "split.count: is missing", .at = 1, .drop = "split.count"},
    {SECOND "split.tensors.count: is missing", .at = 1, .drop = "split.tensors.count"},
    {FIRST "split.no: is missing", .drop = "split.no"},
    {FIRST "split.tensors.count: is missing", .drop = "split.tensors.count"},
    {FIRST "split.count: is missing", .named = 2, .drop = "split.count"},
    {FIRST "token_embd.weight: is missing", .drop = "split.count"},
    {FIRST "token_embd.weight: is missing", .count = -2},
    {SECOND "general.architecture: got qwen2, expected llama; is it of another model?", .at = 1,
     .key = "general.architecture", .text = "qwen2"},
    {"m-00003-of-00003.gguf: ", .at = 2, .cut = 1},
    {SECOND "split.count: is missing", .at = 1, .two_bytes = true},
};

static void parts_are_one_model(struct check *check) {
    char folder[] = "/tmp/test_gguf_XXXXXX", error[ERROR_LENGTH], path[64], name[64];
    CHECK(mkdtemp(folder), "cannot make %s", folder);
    struct gguf *whole = gguf_open("test/data/ref/llama-q8_0.gguf", error);
    CHECK(whole, "%s", error);
    for (size_t i = 0; i < sizeof splits / sizeof *splits && whole; i++) {
        const char *expected = splits[i].expected;
        write_parts(check, folder, whole, &splits[i], path);
        struct model model;
        if (model_open(&model, path, error)) {
            check_same_tensors(check, whole, model.file);
            model_close(&model);
        }
        CHECK(expected ? strstr(error, expected) != NULL : !error[0],
              "split %zu: got `%s`, not `%s`", i, error, expected ? expected : "");
        CHECK(!strchr(error, '\n'), "more than one line: %s", error);
    }
    write_parts(check, folder, whole, &splits[2], path);
    check_memory(check, path, 15);
    gguf_close(whole);
    for (int part = 0; part <= N_PARTS; part++) {
        snprintf(name, sizeof name, part < N_PARTS ? "%s/m-%05d-of-%05d.gguf" : "%s/m.gguf", folder,
                 part + 1, N_PARTS);
        unlink(name);
    }
    CHECK(rmdir(folder) == 0, "cannot remove %s", folder);
}

int main(int argc, char **argv) {
    static const struct test tests[] = {{"values", reads_values},
                                        {"real files", opens_real_files},
                                        {"checkpoint", opens_checkpoint},
                                        {"architectures", opens_architectures},
                                        {"formats agree", formats_agree},
                                        {"parts", parts_are_one_model},
                                        {"other formats", names_other_formats},
                                        {"config", config_follows_keys},
                                        {"notes", notes_what_is_unused},
                                        {"variants", refuses_variants},
                                        {"prefixes", refuses_prefixes},
                                        {"mutations", survives_mutations},
                                        {"memory", survives_lack_of_memory}};
    return check_run(tests, sizeof tests / sizeof *tests, argc, argv);
}
