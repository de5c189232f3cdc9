/* random.h: models of random weights, for measuring without a file: `random:llama-3.1-8b:q8_0`.
 *
 *     struct gguf *file = random_open("random:tinyllama-1.1b:q4_k", error);
 *     ... as with gguf_open ...
 *     gguf_close(file);
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
 * standard deviation of about 0.02, norms are 1. There is no tokenizer: what runs is --ids.
 * Define RANDOM_IMPLEMENTATION in one file, before including this. Read next: model.h. */
#ifndef RANDOM_H
#define RANDOM_H

#include "gguf.h"

bool random_named(const char *name); /* it begins with `random:` */
/* NULL: `error` is one line. */
struct gguf *random_open(const char *name, char error[ERROR_LENGTH]);

#endif /* RANDOM_H */

#ifdef RANDOM_IMPLEMENTATION
#undef RANDOM_IMPLEMENTATION

#include <assert.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/mman.h>
#include <unistd.h>

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
        memcpy(block + 8, block + 4, 4); /* s and t of six bits: see pack_header in matmul.h */
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

#endif /* RANDOM_IMPLEMENTATION */
