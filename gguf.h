/* gguf.h: model files, read through one memory map and believed in nothing.
 *
 *     char error[GGUF_ERROR_LENGTH];
 *     struct gguf *file = gguf_open("model.gguf", error);
 *     struct model model;
 *     if (!file || !model_open(&model, file, error)) {
 *         fprintf(stderr, "dynamo: %s\n", error);
 *     }
 *     ... model.layers[3].attn_q->data ...
 *     model_close(&model);
 *     gguf_close(file);
 *
 * Owns the map and two tables sorted by name: keys and tensors. Names, strings and tensors are
 * never copied: they point into the map and live until gguf_close.
 * Data flow: map -> cursor (gguf_take) -> tables -> model_open, which compares them with the shape
 * that the architecture demands. Every number is checked (gguf_expect) before it is used, and a
 * count against the bytes that are left before anything of its size is allocated. The first thing
 * that is wrong is kept as one line; what follows reads zeros and stops.
 * Refuses: writing, big-endian files, and every model that the forward pass would get wrong.
 * Not thread-safe, except for reading the tensors. A file must not shrink while it is open.
 * Define GGUF_IMPLEMENTATION in one file, before including this. Read next: dynamo.c. */
#ifndef GGUF_H
#define GGUF_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { GGUF_ERROR_LENGTH = 512, MODEL_NAME_LENGTH = 64 };

/* Types of tensor elements; the numbers are GGUF's. */
enum tensor_type { TYPE_F32 = 0, TYPE_F16 = 1, TYPE_Q8_0 = 8, TYPE_BF16 = 30 };

/* Types of key values; the numbers are GGUF's. */
enum gguf_value_type {
    GGUF_U8,
    GGUF_I8,
    GGUF_U16,
    GGUF_I16,
    GGUF_U32,
    GGUF_I32,
    GGUF_F32,
    GGUF_BOOL,
    GGUF_STRING,
    GGUF_ARRAY,
    GGUF_U64,
    GGUF_I64,
    GGUF_F64
};

/* A string inside the mapped file: not ended by a zero byte. */
struct gguf_string {
    const char *data;
    size_t length;
};

/* An array value. `values` are the raw little-endian elements, at any alignment (memcpy them);
 * for an array of strings `strings` is used instead. */
struct gguf_array {
    enum gguf_value_type type;
    size_t count;
    const void *values;
    const struct gguf_string *strings;
};

/* A tensor: a matrix of `rows` rows (outputs) of `cols` contiguous elements (inputs); a vector
 * has one row. `data` points into the mapped file. */
struct tensor {
    struct gguf_string name;
    enum tensor_type type;
    int64_t rows, cols;
    size_t bytes;
    const void *data;
};

struct gguf; /* an open file: owns the map, the table of keys and the table of tensors */

/* Opens a GGUF v2/v3 file or a llama2.c v0 checkpoint, told apart by content; the latter appears
 * under the same keys (llama.*) and tensor names as a GGUF of architecture `llama`.
 * NULL: `error` holds one line: path, what was found, what was expected, a hint. */
struct gguf *gguf_open(const char *path, char error[GGUF_ERROR_LENGTH]);
void gguf_close(struct gguf *file);

/* Values by key. False: the key is not there, or has another type (integers of any width and sign
 * are accepted if the value fits; then a line lands in gguf_error, once). */
bool gguf_get_int(struct gguf *file, const char *key, int64_t *value);
bool gguf_get_float(struct gguf *file, const char *key, double *value);
bool gguf_get_bool(struct gguf *file, const char *key, bool *value);
bool gguf_get_string(struct gguf *file, const char *key, struct gguf_string *value);
bool gguf_get_array(struct gguf *file, const char *key, struct gguf_array *value);
const char *gguf_error(const struct gguf *file);  /* "" while no value had a wrong type */
bool gguf_is_checkpoint(const struct gguf *file); /* a llama2.c checkpoint: no tokenizer inside */
const struct tensor *gguf_tensor(const struct gguf *file, const char *name); /* NULL: not there */

/* ---- the model that a file describes ---- */

struct model_config {
    char architecture[MODEL_NAME_LENGTH]; /* llama, qwen2, qwen3 */
    char name[MODEL_NAME_LENGTH];         /* general.name, or "" */
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
    struct model_layer *layers;       /* n_layers */
};

/* Fills `model` from the file: every key, shape and type checked. False: `error` is one line. */
bool model_open(struct model *model, struct gguf *file, char error[GGUF_ERROR_LENGTH]);
void model_close(struct model *model);

#endif /* GGUF_H */

#ifdef GGUF_IMPLEMENTATION
#undef GGUF_IMPLEMENTATION

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "both formats are little-endian");

enum {
    GGUF_KEY_BYTES = 13,       /* the least that a key takes in a file */
    GGUF_TENSOR_BYTES = 32,    /* the least that the description of a tensor takes */
    GGUF_HEADER_NUMBERS = 7,   /* int32 at the start of a llama2.c checkpoint */
    GGUF_MAX_EXTENT = 1 << 30, /* of a dimension: two of them and a type stay below 2^63 */
    MODEL_REQUIRED = -1        /* in place of a default */
};

struct gguf_key {
    struct gguf_string name; /* first, as in struct tensor: gguf_compare_names */
    bool is_array;
    struct gguf_array value; /* a lone value is an array of one */
};

struct gguf {
    char path[200];                /* its end, where it is longer */
    char error[GGUF_ERROR_LENGTH]; /* the first thing that was wrong, or "" */
    char name[128];                /* of the key or tensor that the model needs now */
    struct gguf_string item;       /* the key or tensor at hand, for messages */
    const uint8_t *map;            /* (size) */
    size_t size, at;               /* [0, at) has been read, [at, size) has not */
    struct gguf_key *keys;         /* (n_keys) by name */
    struct tensor *tensors;        /* (n_tensors) by name */
    size_t n_keys, n_tensors;
    char (*names)[64]; /* (n_tensors) of a checkpoint, which has no names inside; else NULL */
};

static const struct {
    const char *name;
    size_t bytes; /* the least that one takes */
} gguf_values[] = {{"u8", 1},  {"i8", 1},  {"u16", 2},  {"i16", 2},    {"u32", 4},
                   {"i32", 4}, {"f32", 4}, {"bool", 1}, {"string", 8}, {"array", 0},
                   {"u64", 8}, {"i64", 8}, {"f64", 8}};

static const char *const gguf_types[] = {
    "F32",     "F16",   "Q4_0",   "Q4_1",  [6] = "Q5_0", "Q5_1",         "Q8_0",    "Q8_1",
    "Q2_K",    "Q3_K",  "Q4_K",   "Q5_K",  "Q6_K",       "Q8_K",         "IQ2_XXS", "IQ2_XS",
    "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ2_S",      "IQ4_XS",       "I8",      "I16",
    "I32",     "I64",   "F64",    "IQ1_M", "BF16",       [34] = "TQ1_0", "TQ2_0",   [39] = "MXFP4"};

/* Keeps the first failure. What a file calls itself must not control the terminal. */
__attribute__((format(printf, 3, 4))) static bool gguf_expect(struct gguf *file, bool condition,
                                                              const char *format, ...) {
    if (condition || file->error[0])
        return !file->error[0];
    int length = (int)(file->item.length < 80 ? file->item.length : 80);
    int used = snprintf(file->error, sizeof file->error, "%s: %.*s%s", file->path, length,
                        file->item.data, length ? ": " : "");
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(file->error + used, sizeof file->error - (size_t)used, format, arguments);
    va_end(arguments);
    for (char *c = file->error; *c; c++)
        *c = (unsigned char)*c < ' ' || *c == 127 ? '?' : *c;
    return false;
}

static struct gguf_string gguf_text(const char *text) {
    return (struct gguf_string){text, strlen(text)};
}

static bool gguf_equals(struct gguf_string string, const char *text) {
    return string.length == strlen(text) && !memcmp(string.data, text, string.length);
}

static int gguf_compare_names(const void *left_entry, const void *right_entry) {
    const struct gguf_string *left = left_entry, *right = right_entry;
    size_t shared = left->length < right->length ? left->length : right->length;
    int order = memcmp(left->data, right->data, shared);
    return order ? order : (left->length > right->length) - (left->length < right->length);
}

static int gguf_compare_places(const void *left_entry, const void *right_entry) {
    uintptr_t left = (uintptr_t)((const struct tensor *)left_entry)->data;
    uintptr_t right = (uintptr_t)((const struct tensor *)right_entry)->data;
    return (left > right) - (left < right);
}

/* Sorts a table whose entries begin with their names. */
static void gguf_sort(struct gguf *file, void *table, size_t count, size_t bytes_each) {
    qsort(table, count, bytes_each, gguf_compare_names);
    for (size_t i = 1; i < count; i++) {
        const char *entry = (const char *)table + i * bytes_each;
        file->item = *(const struct gguf_string *)entry;
        gguf_expect(file, gguf_compare_names(entry - bytes_each, entry) != 0, "is there twice");
    }
}

static void *gguf_allocate(struct gguf *file, size_t count, size_t bytes_each) {
    void *memory = calloc(count + 1, bytes_each); /* never empty: NULL is a failure */
    gguf_expect(file, memory, "out of memory");
    return memory;
}

/* ---- GGUF: after a failure all reads give zeros, so that only loops must look at `error` ---- */

static const void *gguf_take(struct gguf *file, size_t bytes) {
    static const uint8_t zeros[8];
    if (!gguf_expect(file, bytes <= file->size - file->at, "ends too early; is it complete?"))
        return zeros;
    file->at += bytes;
    return file->map + file->at - bytes;
}

static uint64_t gguf_take_int(struct gguf *file, size_t bytes) {
    uint64_t value = 0;
    memcpy(&value, gguf_take(file, bytes), bytes);
    return value;
}

/* A count of things, which must have room in what is left of the file. */
static size_t gguf_take_count(struct gguf *file, size_t bytes_each) {
    uint64_t count = gguf_take_int(file, 8);
    size_t most = (file->size - file->at) / bytes_each;
    bool fits = gguf_expect(file, count <= most, "got %ju, but only %zu have room; is it complete?",
                            (uintmax_t)count, most);
    return fits ? (size_t)count : 0;
}

static struct gguf_string gguf_take_string(struct gguf *file) {
    size_t length = gguf_take_count(file, 1);
    return (struct gguf_string){gguf_take(file, length), length};
}

static void gguf_take_key(struct gguf *file, struct gguf_key *key) {
    file->item = gguf_text("a key");
    file->item = key->name = gguf_take_string(file);
    uint64_t type = gguf_take_int(file, 4);
    key->is_array = type == GGUF_ARRAY;
    type = key->is_array ? gguf_take_int(file, 4) : type;
    gguf_expect(file, type != GGUF_ARRAY, "arrays of arrays are not supported");
    if (!gguf_expect(file, type <= GGUF_F64, "got an unknown value type %ju", (uintmax_t)type))
        return;
    size_t bytes_each = gguf_values[type].bytes;
    size_t count = key->is_array ? gguf_take_count(file, bytes_each) : 1;
    key->value = (struct gguf_array){(enum gguf_value_type)type, count, NULL, NULL};
    if (type != GGUF_STRING) {
        key->value.values = gguf_take(file, count * bytes_each);
        return;
    }
    struct gguf_string *strings = gguf_allocate(file, count, sizeof *strings);
    for (size_t i = 0; i < count && !file->error[0]; i++)
        strings[i] = gguf_take_string(file);
    key->value.strings = strings;
}

/* Bytes of a row, or 0 for a type that no product knows. */
static size_t gguf_row_bytes(enum tensor_type type, uint64_t cols) {
    switch (type) {
    case TYPE_F32: return cols * 4;
    case TYPE_F16:
    case TYPE_BF16: return cols * 2;
    case TYPE_Q8_0: return cols / 32 * 34; /* an f16 scale and 32 int8 */
    default: return 0;
    }
}

/* Leaves `data` as if the data began where the file does: gguf_place_tensors moves it. */
static void gguf_take_tensor(struct gguf *file, struct tensor *tensor) {
    file->item = gguf_text("a tensor");
    file->item = tensor->name = gguf_take_string(file);
    uint64_t n_dims = gguf_take_int(file, 4), extents[4] = {1, 1, 1, 1};
    gguf_expect(file, n_dims >= 1 && n_dims <= 4, "got %ju dimensions", (uintmax_t)n_dims);
    for (size_t i = 0; i < n_dims && !file->error[0]; i++) {
        extents[i] = gguf_take_int(file, 8);
        gguf_expect(file, extents[i] >= 1 && extents[i] <= GGUF_MAX_EXTENT,
                    "dimension %zu: got %ju, expected 1 to 2^30", i, (uintmax_t)extents[i]);
    }
    gguf_expect(file, extents[2] == 1 && extents[3] == 1,
                "got %ju dimensions, expected 2; experts are not supported", (uintmax_t)n_dims);
    tensor->cols = (int64_t)extents[0];
    tensor->rows = (int64_t)extents[1];
    tensor->type = (enum tensor_type)gguf_take_int(file, 4);
    gguf_expect(file, tensor->type != TYPE_Q8_0 || tensor->cols % 32 == 0,
                "got %jd columns of Q8_0, expected a multiple of 32", (intmax_t)tensor->cols);
    tensor->bytes = gguf_row_bytes(tensor->type, extents[0]) * extents[1];
    uint64_t offset = gguf_take_int(file, 8);
    bool inside = gguf_expect(file, offset <= file->size, "begins beyond the end of the file");
    tensor->data = file->map + (inside ? offset : 0);
}

static void gguf_place_tensors(struct gguf *file, size_t alignment) {
    size_t start = (file->at + alignment - 1) / alignment * alignment, end = 0;
    qsort(file->tensors, file->n_tensors, sizeof *file->tensors, gguf_compare_places);
    for (size_t i = 0; i < file->n_tensors && !file->error[0]; i++) {
        struct tensor *tensor = &file->tensors[i];
        size_t offset = start + (size_t)((const uint8_t *)tensor->data - file->map);
        file->item = tensor->name;
        gguf_expect(file, offset % alignment == 0, "is not aligned to %zu bytes", alignment);
        gguf_expect(file, offset >= end, "overlaps another tensor");
        bool inside = offset <= file->size && tensor->bytes <= file->size - offset;
        end = offset + tensor->bytes;
        gguf_expect(file, inside, "ends at byte %zu, but the file has %zu; is it complete?", end,
                    file->size);
        tensor->data = file->map + (inside ? offset : 0);
    }
}

static void gguf_parse(struct gguf *file) {
    file->at = 4;
    uint32_t version = (uint32_t)gguf_take_int(file, 4);
    bool swapped = version > 0xffff;
    gguf_expect(file, version == 2 || version == 3,
                "got %s GGUF version %u, expected little-endian 2 or 3; convert it again",
                swapped ? "big-endian" : "little-endian",
                swapped ? __builtin_bswap32(version) : version);
    size_t n_tensors = gguf_take_count(file, GGUF_TENSOR_BYTES);
    size_t n_keys = gguf_take_count(file, GGUF_KEY_BYTES);
    file->keys = gguf_allocate(file, n_keys, sizeof *file->keys);
    for (; file->n_keys < n_keys && !file->error[0]; file->n_keys++)
        gguf_take_key(file, &file->keys[file->n_keys]);
    file->tensors = gguf_allocate(file, n_tensors, sizeof *file->tensors);
    for (; file->n_tensors < n_tensors && !file->error[0]; file->n_tensors++)
        gguf_take_tensor(file, &file->tensors[file->n_tensors]);
    if (file->error[0])
        return;
    int64_t alignment = 32;
    gguf_sort(file, file->keys, n_keys, sizeof *file->keys);
    gguf_get_int(file, "general.alignment", &alignment);
    file->item = gguf_text("general.alignment");
    if (gguf_expect(
            file, alignment >= 8 && alignment <= GGUF_MAX_EXTENT && !(alignment & (alignment - 1)),
            "got %jd, expected a power of two from 8 on", (intmax_t)alignment)) {
        gguf_place_tensors(file, (size_t)alignment);
        gguf_sort(file, file->tensors, n_tensors, sizeof *file->tensors);
    }
}

/* ---- llama2.c checkpoints: seven int32, then f32 matrices in a fixed order ---- */

struct gguf_run {
    const char *name; /* after `blk.N.`, if layered; NULL: not a tensor that we need */
    int64_t copies, rows, cols;
    bool layered;
};

static void gguf_add_run(struct gguf *file, const struct gguf_run *run) {
    size_t bytes = (size_t)(run->rows * run->cols) * sizeof(float);
    for (int64_t i = 0; i < run->copies; i++) {
        struct tensor *tensor = &file->tensors[file->n_tensors];
        const void *data = gguf_take(file, bytes);
        if (run->name) {
            char *name = file->names[file->n_tensors++];
            int used = run->layered ? snprintf(name, sizeof *file->names, "blk.%d.", (int)i) : 0;
            snprintf(name + used, sizeof *file->names - (size_t)used, "%s", run->name);
            *tensor = (struct tensor){gguf_text(name), TYPE_F32, run->rows, run->cols, bytes, data};
        }
    }
}

/* The header's numbers are the values: only the names are ours. */
static void gguf_add_header_keys(struct gguf *file) {
    static const char *const names[GGUF_HEADER_NUMBERS] = {
        "llama.embedding_length",     "llama.feed_forward_length",     "llama.block_count",
        "llama.attention.head_count", "llama.attention.head_count_kv", "llama2c.vocab_size",
        "llama.context_length"};
    static const struct gguf_string llama = {"llama", 5};
    static const float epsilon = 1e-5f;
    file->n_keys = 2;
    file->keys[0].name = gguf_text("general.architecture");
    file->keys[0].value = (struct gguf_array){GGUF_STRING, 1, NULL, &llama};
    file->keys[1].name = gguf_text("llama.attention.layer_norm_rms_epsilon");
    file->keys[1].value = (struct gguf_array){GGUF_F32, 1, &epsilon, NULL};
    for (size_t i = 0; i < GGUF_HEADER_NUMBERS; i++) {
        struct gguf_key *key = &file->keys[file->n_keys++];
        key->name = gguf_text(names[i]);
        key->value = (struct gguf_array){GGUF_I32, 1, file->map + i * sizeof(int32_t), NULL};
    }
}

static void gguf_parse_checkpoint(struct gguf *file) {
    int32_t header[GGUF_HEADER_NUMBERS] = {0};
    memcpy(header, file->map, file->size < sizeof header ? 0 : sizeof header);
    int64_t dim = header[0], ffn = header[1], layers = header[2], heads = header[3];
    int64_t kv_heads = header[4], context = header[6];
    int64_t vocab = header[5] < 0 ? -(int64_t)header[5] : header[5];
    bool sane = dim > 0 && dim <= 1 << 20 && ffn > 0 && ffn <= 1 << 20 && layers > 0 &&
                layers <= 1024 && heads > 0 && dim % heads == 0 && kv_heads > 0 &&
                kv_heads <= heads && vocab > 0 && vocab <= 1 << 24 && context > 0 &&
                context <= 1 << 24;
    if (!gguf_expect(file, sane, "is neither a GGUF file nor a llama2.c checkpoint"))
        return;
    int64_t head_dim = dim / heads, kv_dim = head_dim * kv_heads;
    const struct gguf_run runs[] = {
        {"token_embd.weight", 1, vocab, dim, false},
        {"attn_norm.weight", layers, 1, dim, true},
        {"attn_q.weight", layers, dim, dim, true},
        {"attn_k.weight", layers, kv_dim, dim, true},
        {"attn_v.weight", layers, kv_dim, dim, true},
        {"attn_output.weight", layers, dim, dim, true},
        {"ffn_norm.weight", layers, 1, dim, true},
        {"ffn_gate.weight", layers, ffn, dim, true},
        {"ffn_down.weight", layers, dim, ffn, true},
        {"ffn_up.weight", layers, ffn, dim, true},
        {"output_norm.weight", 1, 1, dim, false},
        {NULL, 2, context, head_dim / 2, false}, /* rope tables, obsolete */
        {"output.weight", header[5] < 0, vocab, dim, false},
    };
    size_t n_runs = sizeof runs / sizeof *runs, n_tensors = 0, expected = sizeof header;
    for (size_t i = 0; i < n_runs; i++) {
        expected += (size_t)(runs[i].copies * runs[i].rows * runs[i].cols) * sizeof(float);
        n_tensors += (size_t)runs[i].copies;
    }
    if (!gguf_expect(file, file->size == expected,
                     "is not GGUF; as a llama2.c checkpoint it would have %zu bytes, not %zu",
                     expected, file->size))
        return;
    file->names = gguf_allocate(file, n_tensors, sizeof *file->names);
    file->tensors = gguf_allocate(file, n_tensors, sizeof *file->tensors);
    file->keys = gguf_allocate(file, GGUF_HEADER_NUMBERS + 2, sizeof *file->keys);
    if (file->error[0])
        return;
    gguf_add_header_keys(file);
    file->at = sizeof header;
    for (size_t i = 0; i < n_runs; i++)
        gguf_add_run(file, &runs[i]);
    gguf_sort(file, file->keys, file->n_keys, sizeof *file->keys);
    gguf_sort(file, file->tensors, file->n_tensors, sizeof *file->tensors);
}

/* ---- values by key ---- */

static const struct gguf_array *gguf_find(struct gguf *file, const char *name, bool is_array,
                                          unsigned types, const char *expected) {
    struct gguf_string wanted = gguf_text(name);
    const struct gguf_key *key =
        bsearch(&wanted, file->keys, file->n_keys, sizeof *file->keys, gguf_compare_names);
    if (!key)
        return NULL;
    bool fits = key->is_array == is_array && types >> key->value.type & 1;
    file->item = key->name;
    gguf_expect(file, fits, "got %s%s, expected %s", key->is_array ? "an array of " : "",
                gguf_values[key->value.type].name, expected);
    return fits ? &key->value : NULL;
}

bool gguf_get_int(struct gguf *file, const char *key, int64_t *value) {
    unsigned integers = 1 << GGUF_U8 | 1 << GGUF_I8 | 1 << GGUF_U16 | 1 << GGUF_I16 |
                        1 << GGUF_U32 | 1 << GGUF_I32 | 1 << GGUF_U64 | 1 << GGUF_I64;
    const struct gguf_array *found = gguf_find(file, key, false, integers, "an integer");
    if (!found)
        return false;
    uint64_t bits = 0;
    size_t bytes = gguf_values[found->type].bytes;
    memcpy(&bits, found->values, bytes);
    bool is_signed = found->type % 2; /* as GGUF numbers them */
    bool fits = is_signed || bits <= INT64_MAX;
    gguf_expect(file, fits, "got %ju, expected at most 2^63 - 1", (uintmax_t)bits);
    if (fits) {
        size_t unused = 64 - 8 * bytes;
        *value = is_signed ? (int64_t)(bits << unused) >> unused : (int64_t)bits;
    }
    return fits;
}

bool gguf_get_float(struct gguf *file, const char *key, double *value) {
    const struct gguf_array *found =
        gguf_find(file, key, false, 1 << GGUF_F32 | 1 << GGUF_F64, "a float");
    float single = 0;
    if (found && found->type == GGUF_F32) {
        memcpy(&single, found->values, sizeof single);
        *value = (double)single;
    } else if (found) {
        memcpy(value, found->values, sizeof *value);
    }
    return found;
}

bool gguf_get_bool(struct gguf *file, const char *key, bool *value) {
    const struct gguf_array *found = gguf_find(file, key, false, 1 << GGUF_BOOL, "a bool");
    if (found)
        *value = *(const uint8_t *)found->values != 0;
    return found;
}

bool gguf_get_string(struct gguf *file, const char *key, struct gguf_string *value) {
    const struct gguf_array *found = gguf_find(file, key, false, 1 << GGUF_STRING, "a string");
    if (found)
        *value = found->strings[0];
    return found;
}

bool gguf_get_array(struct gguf *file, const char *key, struct gguf_array *value) {
    const struct gguf_array *found = gguf_find(file, key, true, ~0u, "an array");
    if (found)
        *value = *found;
    return found;
}

/* ---- opening ---- */

static void gguf_map(struct gguf *file, const char *path) {
    struct stat status;
    /* O_NONBLOCK: opening a pipe without a writer must not hang. */
    int descriptor = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    bool open_ok = descriptor >= 0 && fstat(descriptor, &status) == 0;
    if (gguf_expect(file, open_ok, "%s", strerror(errno)) &&
        gguf_expect(file, !S_ISDIR(status.st_mode), "is a folder; name the file inside") &&
        gguf_expect(file, S_ISREG(status.st_mode), "is not a regular file") &&
        gguf_expect(file, status.st_size > 0, "is empty")) {
        size_t size = (size_t)status.st_size;
        void *map = mmap(NULL, size, PROT_READ, MAP_PRIVATE, descriptor, 0);
        if (gguf_expect(file, map != MAP_FAILED, "cannot be mapped: %s", strerror(errno))) {
            file->map = map;
            file->size = size;
        }
    }
    if (descriptor >= 0)
        close(descriptor);
}

void gguf_close(struct gguf *file) {
    if (!file)
        return;
    for (size_t i = 0; i < file->n_keys && !file->names; i++)
        free((void *)file->keys[i].value.strings);
    if (file->map)
        munmap((void *)file->map, file->size);
    free(file->keys);
    free(file->tensors);
    free(file->names);
    free(file);
}

struct gguf *gguf_open(const char *path, char error[GGUF_ERROR_LENGTH]) {
    struct gguf *file = calloc(1, sizeof *file);
    if (!file) {
        snprintf(error, GGUF_ERROR_LENGTH, "out of memory");
        return NULL;
    }
    size_t length = strlen(path), most = sizeof file->path - 1;
    memcpy(file->path, path + (length > most ? length - most : 0), length > most ? most : length);
    file->item = gguf_text("");
    gguf_map(file, path);
    if (file->size >= 4 && !memcmp(file->map, "GGUF", 4))
        gguf_parse(file);
    else if (file->map)
        gguf_parse_checkpoint(file);
    snprintf(error, GGUF_ERROR_LENGTH, "%s", file->error);
    if (!file->error[0])
        return file;
    gguf_close(file);
    return NULL;
}

bool gguf_is_checkpoint(const struct gguf *file) {
    return file->names;
}

const char *gguf_error(const struct gguf *file) {
    return file->error;
}

const struct tensor *gguf_tensor(const struct gguf *file, const char *name) {
    struct gguf_string wanted = gguf_text(name);
    return bsearch(&wanted, file->tensors, file->n_tensors, sizeof *file->tensors,
                   gguf_compare_names);
}

/* ---- the model ---- */

/* Values of the keys of the file's architecture; what cannot be had is `least`, with an error. */
static int model_int(struct gguf *file, const struct model_config *config, const char *key,
                     int64_t fallback, int64_t least, int64_t most) {
    int64_t value = fallback;
    snprintf(file->name, sizeof file->name, "%s.%s", config->architecture, key);
    bool found = gguf_get_int(file, file->name, &value);
    file->item = gguf_text(file->name);
    gguf_expect(file, found || fallback != MODEL_REQUIRED, "is missing");
    gguf_expect(file, value >= least && value <= most, "got %jd, expected %jd to %jd",
                (intmax_t)value, (intmax_t)least, (intmax_t)most);
    return (int)(file->error[0] ? least : value);
}

static float model_float(struct gguf *file, const struct model_config *config, const char *key,
                         double fallback, double least, double most) {
    double value = fallback;
    snprintf(file->name, sizeof file->name, "%s.%s", config->architecture, key);
    bool found = gguf_get_float(file, file->name, &value);
    file->item = gguf_text(file->name);
    gguf_expect(file, found || fallback != MODEL_REQUIRED, "is missing");
    gguf_expect(file, value >= least && value <= most, "got %g, expected %g to %g", value, least,
                most);
    return (float)(file->error[0] ? least : value);
}

static const struct tensor *model_find(struct gguf *file, int layer, const char *name) {
    int used = layer < 0 ? 0 : snprintf(file->name, sizeof file->name, "blk.%d.", layer);
    snprintf(file->name + used, sizeof file->name - (size_t)used, "%s", name);
    file->item = gguf_text(file->name);
    return gguf_tensor(file, file->name);
}

static const struct tensor *model_tensor(struct gguf *file, int layer, const char *name,
                                         int64_t rows, int64_t cols) {
    const struct tensor *tensor = model_find(file, layer, name);
    if (gguf_expect(file, tensor, "is missing")) {
        size_t type = tensor->type, n_types = sizeof gguf_types / sizeof *gguf_types;
        const char *label = type < n_types && gguf_types[type] ? gguf_types[type] : "unknown";
        gguf_expect(file, tensor->bytes > 0,
                    "type %s (%zu) is not supported; F32, F16, BF16 and Q8_0 are", label, type);
        gguf_expect(file, tensor->rows == rows && tensor->cols == cols,
                    "got (%jd, %jd), expected (%jd, %jd)", (intmax_t)tensor->rows,
                    (intmax_t)tensor->cols, (intmax_t)rows, (intmax_t)cols);
    }
    return tensor;
}

/* A norm, a bias or frequencies; NULL if it is not there and need not be. */
static const struct tensor *model_vector(struct gguf *file, int layer, const char *name,
                                         int64_t cols, bool required) {
    if (!required && !model_find(file, layer, name))
        return NULL;
    const struct tensor *vector = model_tensor(file, layer, name, 1, cols);
    gguf_expect(file, vector && vector->type == TYPE_F32, "expected a vector of type F32");
    return vector;
}

static void model_read_names(struct gguf *file, struct model_config *config) {
    static const char *const architectures[] = {"llama", "qwen2", "qwen3"};
    struct gguf_string architecture = gguf_text("(missing)"), name = gguf_text("");
    gguf_get_string(file, "general.architecture", &architecture);
    gguf_get_string(file, "general.name", &name);
    for (size_t i = 0; i < sizeof architectures / sizeof *architectures; i++)
        if (gguf_equals(architecture, architectures[i]))
            snprintf(config->architecture, sizeof config->architecture, "%s", architectures[i]);
    file->item = gguf_text("general.architecture");
    gguf_expect(file, config->architecture[0], "got %.*s, expected llama, qwen2 or qwen3",
                architecture.length < 64 ? (int)architecture.length : 64, architecture.data);
    for (size_t i = 0; i < name.length && i < sizeof config->name - 1; i++)
        config->name[i] = (unsigned char)name.data[i] < ' ' ? '?' : name.data[i];
}

static void model_read_rope(struct gguf *file, struct model_config *config) {
    struct gguf_string scaling = gguf_text("linear"); /* the format's default, by a factor of 1 */
    config->rope_adjacent = !strcmp(config->architecture, "llama");
    config->rope_dim =
        model_int(file, config, "rope.dimension_count", config->head_dim, 2, config->head_dim);
    gguf_expect(file, config->rope_dim % 2 == 0, "got %d, expected an even number",
                config->rope_dim);
    config->rope_theta = model_float(file, config, "rope.freq_base", 10000, 1, 1e12);
    snprintf(file->name, sizeof file->name, "%s.rope.scaling.type", config->architecture);
    gguf_get_string(file, file->name, &scaling);
    file->item = gguf_text(file->name);
    gguf_expect(file, gguf_equals(scaling, "none") || gguf_equals(scaling, "linear"),
                "got %.*s, expected none", scaling.length < 64 ? (int)scaling.length : 64,
                scaling.data);
    if (gguf_equals(scaling, "linear")) {
        model_float(file, config, "rope.scaling.factor", 1, 1, 1);
        model_float(file, config, "rope.scale_linear", 1, 1, 1);
    }
}

static void model_read_config(struct gguf *file, struct model_config *config) {
    const struct tensor *embedding = gguf_tensor(file, "token_embd.weight");
    config->n_layers = model_int(file, config, "block_count", MODEL_REQUIRED, 1, 1024);
    config->d_model = model_int(file, config, "embedding_length", MODEL_REQUIRED, 1, 1 << 20);
    config->d_ff = model_int(file, config, "feed_forward_length", MODEL_REQUIRED, 1, 1 << 20);
    config->context_length = model_int(file, config, "context_length", MODEL_REQUIRED, 1, 1 << 24);
    config->n_heads = model_int(file, config, "attention.head_count", MODEL_REQUIRED, 1, 1 << 16);
    config->n_kv_heads =
        model_int(file, config, "attention.head_count_kv", config->n_heads, 1, config->n_heads);
    gguf_expect(file, config->n_heads % config->n_kv_heads == 0,
                "got %d, expected a divisor of head_count, %d", config->n_kv_heads,
                config->n_heads);
    config->head_dim =
        model_int(file, config, "attention.key_length", config->d_model / config->n_heads, 2, 512);
    model_int(file, config, "attention.value_length", config->head_dim, config->head_dim,
              config->head_dim);
    config->norm_epsilon =
        model_float(file, config, "attention.layer_norm_rms_epsilon", MODEL_REQUIRED, 0, 1);
    model_read_rope(file, config);
    gguf_expect(file, model_int(file, config, "attention.sliding_window", 0, 0, INT_MAX) == 0,
                "sliding windows are not supported");
    gguf_expect(file, model_int(file, config, "expert_count", 0, 0, INT_MAX) == 0,
                "mixtures of experts are not supported");
    struct gguf_array tokens;
    file->item = gguf_text("token_embd.weight");
    bool sane = embedding && embedding->rows <= 1 << 24;
    gguf_expect(file, sane, embedding ? "more than 2^24 rows" : "is missing");
    config->vocab_size = sane ? (int)embedding->rows : 1;
    if (gguf_get_array(file, "tokenizer.ggml.tokens", &tokens)) {
        gguf_expect(file, tokens.count == (size_t)config->vocab_size,
                    "got %zu tokens, expected %d, the rows of token_embd.weight", tokens.count,
                    config->vocab_size);
    }
}

static void model_read_layer(struct gguf *file, const struct model_config *config, int i,
                             struct model_layer *layer) {
    bool biased = !strcmp(config->architecture, "qwen2");
    bool normed = !strcmp(config->architecture, "qwen3");
    int d_model = config->d_model, d_ff = config->d_ff, head_dim = config->head_dim;
    int q_rows = config->n_heads * head_dim, kv_rows = config->n_kv_heads * head_dim;
    layer->attn_norm = model_vector(file, i, "attn_norm.weight", d_model, true);
    layer->attn_q = model_tensor(file, i, "attn_q.weight", q_rows, d_model);
    layer->attn_k = model_tensor(file, i, "attn_k.weight", kv_rows, d_model);
    layer->attn_v = model_tensor(file, i, "attn_v.weight", kv_rows, d_model);
    layer->q_bias = model_vector(file, i, "attn_q.bias", q_rows, biased);
    layer->k_bias = model_vector(file, i, "attn_k.bias", kv_rows, biased);
    layer->v_bias = model_vector(file, i, "attn_v.bias", kv_rows, biased);
    layer->attn_q_norm = model_vector(file, i, "attn_q_norm.weight", head_dim, normed);
    layer->attn_k_norm = model_vector(file, i, "attn_k_norm.weight", head_dim, normed);
    layer->attn_output = model_tensor(file, i, "attn_output.weight", d_model, q_rows);
    layer->ffn_norm = model_vector(file, i, "ffn_norm.weight", d_model, true);
    layer->ffn_gate = model_tensor(file, i, "ffn_gate.weight", d_ff, d_model);
    layer->ffn_up = model_tensor(file, i, "ffn_up.weight", d_ff, d_model);
    layer->ffn_down = model_tensor(file, i, "ffn_down.weight", d_model, d_ff);
    static const char *const biases[] = {"attn_output.bias", "ffn_gate.bias", "ffn_up.bias",
                                         "ffn_down.bias"};
    for (size_t j = 0; j < 4; j++) /* to leave one out in silence would give wrong text */
        gguf_expect(file, !model_find(file, i, biases[j]), "is not supported");
}

static void model_read_tensors(struct gguf *file, struct model *model) {
    const struct model_config *config = &model->config;
    model->token_embd =
        model_tensor(file, -1, "token_embd.weight", config->vocab_size, config->d_model);
    model->output_norm = model_vector(file, -1, "output_norm.weight", config->d_model, true);
    model->output = model->token_embd;
    if (model_find(file, -1, "output.weight")) {
        model->output =
            model_tensor(file, -1, "output.weight", config->vocab_size, config->d_model);
    }
    for (int i = 0; i < config->n_layers && !file->error[0]; i++)
        model_read_layer(file, config, i, &model->layers[i]);
    int n_pairs = config->rope_dim / 2;
    model->rope_freqs = model_vector(file, -1, "rope_freqs.weight", n_pairs, false);
    for (int i = 0; i < n_pairs && model->rope_freqs && !file->error[0]; i++) {
        float divisor = ((const float *)model->rope_freqs->data)[i];
        gguf_expect(file, isfinite(divisor) && divisor > 0, "entry %d is %g", i, (double)divisor);
    }
}

bool model_open(struct model *model, struct gguf *file, char error[GGUF_ERROR_LENGTH]) {
    *model = (struct model){0};
    file->item = gguf_text("");
    gguf_expect(file, file->n_tensors > 0, "has no tensors: a vocabulary without a model");
    model_read_names(file, &model->config);
    model_read_config(file, &model->config);
    model->layers = gguf_allocate(file, (size_t)model->config.n_layers, sizeof *model->layers);
    model_read_tensors(file, model);
    snprintf(error, GGUF_ERROR_LENGTH, "%s", file->error);
    if (file->error[0]) {
        model_close(model);
        return false;
    }
    return true;
}

void model_close(struct model *model) {
    free(model->layers);
    *model = (struct model){0};
}

#endif /* GGUF_IMPLEMENTATION */
