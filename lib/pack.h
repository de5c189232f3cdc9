/* pack.h: weights in the order in which the product kernels read them.
 *
 * A tensor of the model file is packed once, into *panels* of 64 outputs side by side for each k,
 * in its own type; a vector becomes plain f32. Shards are views of the whole. The kernels read a
 * panel 64 weights at a time: as f32 with load_scales and load_weight, or as whole numbers with
 * load_quad, for dot products of bytes.
 *
 *     struct weight *weight = pack_open(tensor);
 *     weight->panels = malloc(pack_bytes(weight)); // 0: a vector has none
 *     for (int i = 0; i < pack_panels(weight); i++)
 *         pack_panel(weight, i); // in any order, on any thread
 *     struct weight *shard = pack_view(weight, (struct slice){SLICE_ROWS, rank, n_shards});
 *     pack_read_row(weight, token, x);
 *     pack_close(shard); // frees no panels: they are the caller's
 *     pack_close(weight);
 *
 * What lies in 4 bytes of a row of the file lies in 4 bytes of the panel too, those of 64 outputs
 * side by side: packing is a transposition of 4-byte words, [row][word] to [word][64]. So there are
 * two k side by side in F16 and BF16, four in Q8_0, and eight in the low and high halves of the
 * bytes of a 4-bit type. What a block of such a type has besides (scales) stands before its words:
 *     Q8_0, 32 k     f16 d[64];                             weight = d * (byte - 128)
 *     Q4_0, 32 k     f16 d[64];                             weight = d * (bits - 8)
 *     Q4_K, 256 k    f16 d[64], m[64]; u8 s[8][64], t[8][64];  weight = d * s * bits - m * t
 *     Q6_K, 256 k    f16 d[64]; int8 s[16][64];             weight = d * s * (bits - 32)
 * Outputs past the last row, and an odd last k, are 0. Every type is exact in f32. */
#ifndef PACK_H
#define PACK_H
#include "../dynamo.h"
#include "simd.h"

enum {
    PANEL = 64,       /* outputs in a panel: 4 vectors, and 6 rows of them fill 24 registers */
    READ_AHEAD = 4096 /* bytes of a panel, when few rows share the reading of it */
};

/* A matrix, or a part of one: rows [first_row, first_row + n_rows) and columns alike of the packed
 * whole, `panels`, which the weight of the whole tensor owns. A vector is plain f32. */
struct weight {
    const struct tensor *tensor;
    enum tensor_type type;
    int first_row, n_rows, first_col, n_cols, cols; /* cols: of the whole */
    size_t panel_bytes;
    char *panels;  /* (rows / PANEL) panels */
    float *vector; /* (n_cols), padded with zeros */
    bool owner;
    struct weight *next; /* for the caller */
};

struct weight *pack_open(const struct tensor *tensor); /* NULL: no memory */
int pack_panels(const struct weight *weight);          /* 0: a vector */
size_t pack_bytes(const struct weight *weight);        /* of all panels */
void pack_panel(const struct weight *weight, int index);
struct weight *pack_view(const struct weight *whole, struct slice slice); /* NULL: no memory */
void pack_close(struct weight *weight);
void pack_read_row(const struct weight *weight, int row, float *out); /* out (cols) */

static inline size_t round_up(size_t value, size_t unit) {
    return (value + unit - 1) / unit * unit;
}

static inline int divide_up(int value, int unit) {
    return (value + unit - 1) / unit;
}

/* ---- blocks of k that share scales; for F32, F16 and BF16 one word is a block ---- */

struct pack_block {
    int n_k, n_part; /* of a block; of the parts of a block that have scales of their own */
    int bytes, payload, n_words; /* in the file: of a block; where its n_words 4-byte words begin */
    int header;                  /* in a panel: bytes before the words */
    int offset;                  /* of the whole numbers: 0 stands for minus this */
};

INLINE struct pack_block pack_block(enum tensor_type type) {
    switch (type) {
    case TYPE_F32: return (struct pack_block){1, 1, 4, 0, 1, 0, 0};
    case TYPE_F16:
    case TYPE_BF16: return (struct pack_block){2, 2, 4, 0, 1, 0, 0};
    case TYPE_Q8_0: return (struct pack_block){32, 32, 34, 2, 8, 2 * PANEL, 128};
    case TYPE_Q4_0: return (struct pack_block){32, 32, 18, 2, 4, 2 * PANEL, 8};
    case TYPE_Q4_K: return (struct pack_block){256, 32, 144, 16, 32, 20 * PANEL, 0};
    case TYPE_Q6_K: return (struct pack_block){256, 16, 210, 0, 48, 18 * PANEL, 32};
    }
    return (struct pack_block){1, 1, 0, 0, 0, 0, 0};
}

INLINE bool pack_quantized(enum tensor_type type) {
    return pack_block(type).header > 0;
}

INLINE size_t pack_part_bytes(enum tensor_type type) { /* of a panel: of a part of a block */
    struct pack_block form = pack_block(type);
    return (size_t)((form.header + form.n_words * 4 * PANEL) * form.n_part / form.n_k);
}

/* Asks for what lies READ_AHEAD bytes behind [at, at + bytes): panels are read in their order, and
 * the processor's own reading ahead ends with each page. Never faults. */
INLINE void read_ahead(const char *at, size_t bytes) {
    for (size_t line = 0; line < bytes; line += 64)
        __builtin_prefetch(at + READ_AHEAD + line);
}

INLINE const char *block_of(enum tensor_type type, const char *panel, unsigned k) {
    struct pack_block block = pack_block(type);
    unsigned bytes = (unsigned)(block.header + block.n_words * 4 * PANEL);
    return panel + (size_t)(k / (unsigned)block.n_k) * bytes;
}

INLINE ivec load_words(const char *words, unsigned word, int i) { /* vector i of the 4 of a word */
    return *(const ivec_any *)(const void *)(words +
                                             ((size_t)word * PANEL + (size_t)i * LANES) * 4);
}

/* Four k of 16 outputs as bytes, of a quantized type: [k + at, k + at + 4), where k begins a part
 * of a block and `at` is a multiple of 4. */
INLINE ivec load_quad(enum tensor_type type, const char *panel, unsigned k, unsigned at, int i) {
    struct pack_block form = pack_block(type);
    const char *words = block_of(type, panel, k) + form.header;
    unsigned quad = at / 4, half = k % 256 / 128, part = k % 128 / 32;
    if (type == TYPE_Q8_0)
        return load_words(words, quad, i);
    if (type == TYPE_Q4_0) /* 16 k in the low halves, then 16 in the high ones */
        return load_words(words, quad % 4, i) >> (quad / 4 * 4) & 0x0f0f0f0f;
    if (type == TYPE_Q4_K) /* 32 and 32 */
        return load_words(words, k % 256 / 64 * 8 + quad, i) >> (part % 2 * 4) & 0x0f0f0f0f;
    /* Q6_K, 128 k: 64 in the low halves of 16 words and 64 in the high ones; then, for every 32 k,
     * two bits more in each of 8 words */
    quad += k % 32 / 4;
    ivec low = load_words(words, half * 16 + part % 2 * 8 + quad, i) >> (part / 2 * 4) & 0x0f0f0f0f;
    ivec high = load_words(words, 32 + half * 8 + quad, i) >> (part * 2) & 0x03030303;
    return low | high << 4;
}

struct scales { /* of 64 outputs, for one part of a block: weight = scale * number - least */
    vec scale[4], least[4];
};

INLINE void load_scales(enum tensor_type type, const char *panel, unsigned k,
                        struct scales *scales) {
    const char *block = block_of(type, panel, k);
    unsigned part = k % (unsigned)pack_block(type).n_k / (unsigned)pack_block(type).n_part;
    for (int i = 0; i < 4 && pack_quantized(type); i++) {
        const uint16_t *halves = (const uint16_t *)(const void *)block + i * LANES;
        const char *bytes = block + part * PANEL + (unsigned)i * LANES;
        scales->scale[i] = widen_f16(halves);
        scales->least[i] = (vec){0};
        if (type == TYPE_Q4_K) {
            scales->scale[i] *= widen_int8(bytes + 4 * PANEL);
            scales->least[i] = widen_f16(halves + PANEL) * widen_int8(bytes + 12 * PANEL);
        } else if (type == TYPE_Q6_K) {
            scales->scale[i] *= widen_int8(bytes + 2 * PANEL);
        }
    }
}

/* 16 weights of k as f32, vector i of 4. `scales`: of k's part of a block. */
INLINE vec load_weight(enum tensor_type type, const char *panel, unsigned k, int i,
                       const struct scales *scales) {
    if (type == TYPE_F32)
        return (vec)load_words(panel, k, i);
    if (type == TYPE_BF16) {
        ivec pair = load_words(panel, k / 2, i);
        return (vec)(k & 1 ? pair & (int32_t)0xffff0000 : pair << 16);
    }
    if (type == TYPE_F16)
        return widen_f16_words(load_words(panel, k / 2, i) >> (k % 2 * 16));
    unsigned at = k % (unsigned)pack_block(type).n_part;
    ivec bytes = load_quad(type, panel, k - at, at & ~3u, i) >> (k % 4 * 8) & 0xff;
    vec number = __builtin_convertvector(bytes - pack_block(type).offset, vec);
    return type == TYPE_Q4_K ? number * scales->scale[i] - scales->least[i]
                             : number * scales->scale[i];
}

INLINE int part_end(enum tensor_type type, int k, int end) { /* where the scales change */
    int next = (k / pack_block(type).n_part + 1) * pack_block(type).n_part;
    return pack_quantized(type) && next < end ? next : end;
}
#endif /* PACK_H */
#ifdef PACK_IMPLEMENTATION
#undef PACK_IMPLEMENTATION
#include <stdlib.h>

/* to[word][64] = from[row][word], for n_rows rows that lie `stride` bytes apart and have n_words
 * words, the last of which ends where the row does, after `bytes`. */
static void pack_words(const char *from, size_t stride, int n_rows, size_t bytes, char *to) {
    for (int first = 0; first < PANEL; first += LANES) { /* few rows at a time are read ahead */
        for (size_t at = 0; at < bytes; at += 4 * LANES) {
            size_t left = bytes - at < 4 * LANES ? bytes - at : 4 * LANES;
            vec rows[LANES] = {{0}};
            for (int i = 0; i < LANES && first + i < n_rows; i++)
                rows[i] = load_bytes(from + (size_t)(first + i) * stride + at, left);
            transpose(rows);
            for (size_t i = 0; i < (left + 3) / 4; i++)
                memcpy(to + ((at / 4 + i) * PANEL + (size_t)first) * 4, &rows[i], 4 * LANES);
        }
    }
}

/* The scales of one block of one row, which come before the words of a panel. `to`: its column. */
static void pack_header(enum tensor_type type, const uint8_t *from, char *to, int row) {
    uint8_t *bytes = (uint8_t *)to;
    const uint8_t *d = from + (type == TYPE_Q6_K ? 208 : 0);
    memcpy(bytes + row * 2, d, 2);
    if (type == TYPE_Q6_K) {
        for (int part = 0; part < 16; part++)
            bytes[(2 + part) * PANEL + row] = from[192 + part];
    } else if (type == TYPE_Q4_K) {
        memcpy(bytes + 2 * PANEL + row * 2, from + 2, 2);
        const uint8_t *packed = from + 4;
        for (int part = 0; part < 8; part++) {
            int scale, least;
            gguf_q4_k_scales(packed, part, &scale, &least);
            bytes[(4 + part) * PANEL + row] = (uint8_t)scale;
            bytes[(12 + part) * PANEL + row] = (uint8_t)least;
        }
    }
}

static size_t pack_row_bytes(const struct weight *weight) { /* in the file */
    struct pack_block form = pack_block(weight->type);
    return (size_t)weight->cols * (size_t)form.bytes / (size_t)form.n_k;
}

static void pack_quantized_panel(const struct weight *weight, const char *from, int n_rows,
                                 char *panel) {
    struct pack_block form = pack_block(weight->type);
    size_t payload = (size_t)form.n_words * 4, stride = pack_row_bytes(weight);
    for (int k = 0; k < weight->cols; k += form.n_k, from += form.bytes) {
        for (int row = 0; row < n_rows; row++)
            pack_header(weight->type, (const uint8_t *)from + (size_t)row * stride, panel, row);
        panel += form.header;
        pack_words(from + form.payload, stride, n_rows, payload, panel);
        for (size_t i = 0; i < payload * PANEL && weight->type == TYPE_Q8_0; i++)
            panel[i] = (char)(panel[i] ^ 0x80);
        panel += payload * PANEL;
    }
}

void pack_panel(const struct weight *weight, int index) {
    char *panel = weight->panels + (size_t)index * weight->panel_bytes;
    int first = index * PANEL, n = weight->n_rows - first < PANEL ? weight->n_rows - first : PANEL;
    size_t stride = pack_row_bytes(weight);
    const char *from = (const char *)weight->tensor->data + (size_t)first * stride;
    if (pack_quantized(weight->type)) {
        if (n < PANEL)
            memset(panel, 0, weight->panel_bytes);
        pack_quantized_panel(weight, from, n, panel);
    } else {
        if (weight->cols & 1) /* the next k is read, though as 0 */
            memset(panel + weight->panel_bytes - 4 * PANEL, 0, 4 * PANEL);
        pack_words(from, stride, n, stride, panel);
    }
}

static bool pack_vector(struct weight *weight) {
    const struct tensor *tensor = weight->tensor;
    size_t padded = round_up((size_t)weight->cols, LANES);
    weight->vector = calloc(padded, sizeof(float));
    if (!weight->vector)
        return false;
    for (int i = 0; i < weight->cols; i++) {
        if (tensor->type == TYPE_F32) {
            memcpy(&weight->vector[i], (const float *)tensor->data + i, sizeof(float));
        } else {
            uint16_t bits[LANES] = {((const uint16_t *)tensor->data)[i]};
            weight->vector[i] = tensor->type == TYPE_F16 ? widen_f16(bits)[0] : widen_bf16(bits)[0];
        }
    }
    return true;
}

struct weight *pack_open(const struct tensor *tensor) {
    struct weight *weight = malloc(sizeof *weight);
    if (!weight)
        return NULL;
    *weight = (struct weight){.tensor = tensor, .type = tensor->type, .owner = true};
    weight->n_rows = (int)tensor->rows;
    weight->n_cols = weight->cols = (int)tensor->cols;
    struct pack_block form = pack_block(tensor->type);
    if (weight->n_rows > 1 || pack_quantized(tensor->type)) {
        size_t n_k = round_up((size_t)weight->cols, 2); /* kernels take two k at a time */
        weight->panel_bytes =
            n_k / (size_t)form.n_k * (size_t)(form.header + form.n_words * 4 * PANEL);
    } else if (!pack_vector(weight)) {
        free(weight);
        return NULL;
    }
    return weight;
}

int pack_panels(const struct weight *weight) {
    return weight->vector ? 0 : divide_up(weight->n_rows, PANEL);
}

size_t pack_bytes(const struct weight *weight) {
    return (size_t)pack_panels(weight) * weight->panel_bytes;
}

struct weight *pack_view(const struct weight *whole, struct slice slice) {
    struct weight *view = malloc(sizeof *view);
    if (!view)
        return NULL;
    *view = *whole;
    bool columns = slice.kind == SLICE_COLS || view->vector;
    int *first = columns ? &view->first_col : &view->first_row;
    int *count = columns ? &view->n_cols : &view->n_rows;
    *count /= slice.count;
    *first = slice.rank * *count;
    if (view->vector)
        view->vector += *first;
    view->owner = false;
    return view;
}

void pack_close(struct weight *weight) {
    if (weight->owner)
        free(weight->vector);
    free(weight);
}

void pack_read_row(const struct weight *weight, int row, float *out) {
    const char *panel = weight->panels + (size_t)(row / PANEL) * weight->panel_bytes;
    int i = row % PANEL / LANES, lane = row % LANES;
    for (int k = 0; k < weight->cols;) {
        int end = part_end(weight->type, k, weight->cols);
        struct scales scales;
        load_scales(weight->type, panel, (unsigned)k, &scales);
        for (; k < end; k++)
            out[k] = load_weight(weight->type, panel, (unsigned)k, i, &scales)[lane];
    }
}
#endif /* PACK_IMPLEMENTATION */
