/* matmul.h: rows times a matrix of weights, in the types in which model files store them.
 *
 *     y[row][output] = sum over k of x[row][k] * W[output][k]
 *
 * Owns: the order in which weights lie in memory, the forms that rows take, and the kernels that
 * multiply the two. It knows nothing of threads: each function below computes its part alone, and
 * the caller hands the parts out. Panels and slabs are the caller's memory.
 *
 *     struct weight *weight = pack_open(tensor);               // a matrix; a vector becomes f32
 *     weight->panels = aligned_alloc(64, pack_bytes(weight));
 *     for (int i = 0; i < pack_panels(weight); i++)
 *         pack_panel(weight, i);                               // in any order, on any thread
 *     enum row_form form = dot_form(weight->type, false);      // FORM_F32: x is used as it is
 *     dot_convert(form, x, 0, weight->cols, rows);             // else each row is converted, once
 *     struct tile tile = {.panel = weight->panels + i * weight->panel_bytes,
 *                         .end = weight->cols, .form = form, .input = rows, .stride = row_bytes,
 *                         .out = y};
 *     panel_product(weight->type, tile, n_rows, slab);         // y (n_rows, PANEL): 64 outputs
 *     pack_close(weight);                                      // not the panels: they are yours
 *
 * How data flows: a matrix is packed once into *panels* of 64 outputs side by side for each k, in
 * its own type, so that a vector of 16 lanes holds 16 outputs and no sum runs across lanes. Shards
 * are views of the whole (pack_view). A kernel keeps 64 outputs of 1 to 6 rows in registers over
 * all of k. There are three, each compiled for every type and number of rows it can meet, and one
 * for a matrix unit:
 *     tile_product   in the vectors of simd.h, for all types, on any processor; rows are f32
 *     dot_bf16       weights in BF16 times rows rounded to bf16 (AVX-512 BF16: vdpbf16ps)
 *     dot_q8         quantized weights times blocks of 32 bytes with a scale (VNNI: vpdpbusd)
 *     amx_bf16       as dot_bf16, 16 rows at a time (AMX: tdpbf16ps); the sums have another order
 * All but the first are chosen while the program runs, and cost some precision: bf16 rows 2^-9 of
 * each element, Q8 rows 1/254 of a block's largest.
 *
 * Invariants: each output is one chain of sums over k, or over blocks of k, in order (in amx_bf16
 * of 32 k, the even and the odd of which are chains too). It does not depend on the other rows, on
 * their number or on slabs. A form of a row depends on that row alone; a block that a segment of K
 * cuts has zeros outside the segment.
 *
 * Read next: tile_product, the heart of it; then pool.h, and kernels.c, which hands out the parts.
 * Define MATMUL_IMPLEMENTATION in one file, before including this. */
#ifndef MATMUL_H
#define MATMUL_H
#include "amx.h"
#include "model.h"
#include "repack.h"
#include "simd.h"

enum {
    PANEL = 64,       /* outputs in a panel: 4 vectors */
    TILE_ROWS = 6,    /* rows that one call of a kernel computes: 24 registers of sums */
    DIRECT_ROWS = 24, /* up to so many rows read a panel as it is; more, once it is turned to f32 */
    SLAB = 256,       /* k of a panel that many rows use while it is in L2, as f32: 64 KiB */
    DOT_SLAB = 1024,  /* the like for the fast kernels, which read a panel in its stored type */
    ROW_CHUNK = 96,   /* rows of a caller's part: they pay for its slabs; 0.1 to 0.5 ms */
    READ_AHEAD = 4096, /* how far ahead, in bytes, a kernel asks for a panel that is in memory */
    AMX_SLAB = 256,    /* k of a panel that many rows of bf16 use while it is in L1: 32 KiB */
    Q8_BLOCK = 32      /* elements of a row that share a scale: as many as in Q8_0 and Q4_0 */
};

/* ---- weights ---- */

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
/* Those of one of the experts that a weight holds: of a matrix rows, of a vector elements. */
struct weight pack_expert(const struct weight *all, int expert, int n_rows);
void pack_close(struct weight *weight);
void pack_read_row(const struct weight *weight, int row, float *out); /* out (cols) */

/* ---- rows ---- */

/* What a kernel wants its rows to be. */
enum row_form { FORM_F32, FORM_BF16, FORM_Q8, N_FORMS };

struct q8_block { /* element = scale * q */
    int8_t q[Q8_BLOCK];
    int32_t sum[2];          /* of each half of q */
    float scale, scaled_sum; /* of all of q */
};

/* What the kernel for a type wants on this processor; plain: FORM_F32 always. */
enum row_form dot_form(enum tensor_type type, bool plain);
/* Bytes of k in [begin, end) of a row. */
size_t dot_form_bytes(enum row_form form, int begin, int end);
/* to = k in [begin, end) of a row, in any form but FORM_F32; from: element `begin` of the row. */
void dot_convert(enum row_form form, const float *from, int begin, int end, char *to);

/* ---- products ---- */

/* out[row][64] (+)= sum over k in [begin, end) of input[row][k] * weight[k][64] */
struct tile {
    const char *panel;
    int begin, end;     /* k of the panel; begin is even */
    enum row_form form; /* of the rows: dot_form of the panel's type, or FORM_F32 */
    const char *input;  /* (rows) the first column is k = begin */
    size_t stride;      /* bytes from row to row */
    float *out;         /* (rows, PANEL) */
    bool add, ahead;    /* ahead: the panel comes from memory */
    bool amx;           /* the matrix unit (amx.h) takes FORM_BF16; for a text: always, or never */
};

/* Of any number of rows: out = input . weights. slab (SLAB, PANEL) is overwritten. */
void panel_product(enum tensor_type type, struct tile tile, int n_rows, float *slab);
/* Sums segments [first, first + count) of K, a power of two of them, as a binary tree. The input
 * has them one behind the other, each converted on its own. spare: a tile for each level. */
void segment_product(const struct weight *matrix, int unit, int first, int count, struct tile tile,
                     int n_rows, float *slab, float (*spare)[ROW_CHUNK * PANEL]);

/* ---- what a processor can do ---- */

/* Multiplies and adds as the kernel of a form does, and nothing else, so that the time of it is a
 * limit. Returns the number of operations, two a multiply-add. sink (LANES): what is computed, and
 * nobody wants. */
double dot_busy(enum row_form form, bool amx, float *sink);

/* ---- for the caller's arithmetic too ---- */

/* kernel(n_rows, ...), 1 to TILE_ROWS rows, a constant: one is compiled for each number. */
#define WITH_ROWS(n_rows, kernel, ...)                                                             \
    do {                                                                                           \
        switch (n_rows) {                                                                          \
        case 1: kernel(1, __VA_ARGS__); break;                                                     \
        case 2: kernel(2, __VA_ARGS__); break;                                                     \
        case 3: kernel(3, __VA_ARGS__); break;                                                     \
        case 4: kernel(4, __VA_ARGS__); break;                                                     \
        case 5: kernel(5, __VA_ARGS__); break;                                                     \
        case 6: kernel(6, __VA_ARGS__); break;                                                     \
        }                                                                                          \
    } while (0)

static inline size_t round_up(size_t value, size_t unit) {
    return (value + unit - 1) / unit * unit;
}

static inline int smaller(int a, int b) {
    return a < b ? a : b;
}

static inline int divide_up(int value, int unit) {
    return (value + unit - 1) / unit;
}
#endif /* MATMUL_H */
#ifdef MATMUL_IMPLEMENTATION
#undef MATMUL_IMPLEMENTATION
#include <stdlib.h>
#include <string.h>

/* ---- weights: blocks of k that share scales, and how a panel holds them ---- */

/* What lies in 4 bytes of a row of the file lies in 4 bytes of the panel too, those of 64 outputs
 * side by side: packing is a transposition of 4-byte words, [row][word] to [word][64]. So there are
 * two k side by side in F16 and BF16, four in Q8_0, and eight in the low and high halves of the
 * bytes of a 4-bit type. What a block of such a type has besides (scales) stands before its words:
 *     Q8_0, 32 k     f16 d[64];                                weight = d * (byte - 128)
 *     Q4_0, 32 k     f16 d[64];                                weight = d * (bits - 8)
 *     Q4_K, 256 k    f16 d[64], m[64]; u8 s[8][64], t[8][64];  weight = d * s * bits - m * t
 *     Q6_K, 256 k    f16 d[64]; int8 s[16][64];                weight = d * s * (bits - 32)
 *     MXFP4, 32 k    u8 e[64];                                 weight = 2^(e - 128) * number
 * where bits of MXFP4 stand for twice a number of 0, 0.5, 1, 1.5, 2, 3, 4, 6, and its sign.
 * Outputs past the last row, and an odd last k, are 0. Every type is exact in f32. For F32, F16 and
 * BF16 one word is a block. */

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
    case TYPE_MXFP4: return (struct pack_block){32, 32, 17, 1, 4, PANEL, 12};
    }
    return (struct pack_block){1, 1, 0, 0, 0, 0, 0};
}

INLINE bool pack_quantized(enum tensor_type type) {
    return pack_block(type).header > 0;
}

INLINE size_t pack_part_bytes(enum tensor_type type) { /* of a panel: of a part of a block */
    struct pack_block layout = pack_block(type);
    return (size_t)((layout.header + layout.n_words * 4 * PANEL) * layout.n_part / layout.n_k);
}

/* Asks for what lies READ_AHEAD bytes behind [at, at + bytes): panels are read in their order, and
 * the processor's own reading ahead ends with each page. Never faults. */
INLINE void read_ahead(const char *at, size_t bytes) {
    for (size_t line = 0; line < bytes; line += 64)
        __builtin_prefetch(at + READ_AHEAD + line);
}

INLINE const char *block_of(enum tensor_type type, const char *panel, unsigned k) {
    struct pack_block layout = pack_block(type);
    unsigned bytes = (unsigned)(layout.header + layout.n_words * 4 * PANEL);
    return panel + (size_t)(k / (unsigned)layout.n_k) * bytes;
}

INLINE ivec load_words(const char *words, unsigned word, int i) { /* vector i of the 4 of a word */
    words += ((size_t)word * PANEL + (size_t)i * LANES) * 4;
    return *(const ivec_any *)(const void *)words;
}

/* The low four bits of each of 64 bytes, of MXFP4, become twice the number that they stand for,
 * plus 12. */
INLINE ivec mxfp4_numbers(ivec bits) {
#ifdef __AVX512BW__
    const __m512i numbers = _mm512_broadcast_i32x4(
        _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
#ifdef __AVX512VBMI__ /* looks at six bits, for which the table is there four times */
    return (ivec)_mm512_permutexvar_epi8((__m512i)bits, numbers);
#endif
    return (ivec)_mm512_shuffle_epi8(numbers, (__m512i)(bits & 0x0f0f0f0f));
#else /* a sign, two bits of exponent, one of mantissa; nothing is carried between bytes */
    const ivec ones = (ivec){0} + 0x01010101;
    ivec sign = (bits >> 3 & ones) * 255, high = (bits >> 2 & ones) * 255;
    ivec large = ones * 4 + (bits & ones) * 2; /* if the exponent is 2; twice that if it is 3 */
    large += large & (bits >> 1 & ones) * 255;
    ivec number = (large & high) | (bits & ones * 3 & ~high);
    return ((ones * 12 + number) & ~sign) | ((ones * 12 - number) & sign);
#endif
}

/* Four k of 16 outputs as bytes, of a quantized type: [k + at, k + at + 4), where k begins a part
 * of a block and `at` is a multiple of 4. */
INLINE ivec load_quad(enum tensor_type type, const char *panel, unsigned k, unsigned at, int i) {
    struct pack_block layout = pack_block(type);
    const char *words = block_of(type, panel, k) + layout.header;
    unsigned quad = at / 4, half = k % 256 / 128, part = k % 128 / 32;
    if (type == TYPE_Q8_0)
        return load_words(words, quad, i);
    if (type == TYPE_Q4_0 || type == TYPE_MXFP4) { /* 16 k in the low halves, 16 in the high ones */
        ivec bits = load_words(words, quad % 4, i) >> (quad / 4 * 4);
        return type == TYPE_Q4_0 ? bits & 0x0f0f0f0f : mxfp4_numbers(bits);
    }
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
        scales->least[i] = (vec){0};
        if (type == TYPE_MXFP4) { /* half a power of two; the two least are no normal numbers */
            ivec power = widen_uint8(bytes);
            scales->scale[i] = select_vec(power < 2, (vec)(((ivec){0} + 0x200000) << power),
                                          (vec)((power - 1) << 23));
            continue;
        }
        scales->scale[i] = widen_f16(halves);
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
    int n_part = pack_block(type).n_part;
    return pack_quantized(type) ? smaller((k / n_part + 1) * n_part, end) : end;
}

/* to[word][64] = from[row][word], for n_rows rows of `bytes` bytes that lie `stride` bytes apart.
 * What the last word of a row lacks is 0. */
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
    if (type == TYPE_MXFP4) {
        bytes[row] = *from;
        return;
    }
    memcpy(bytes + row * 2, d, 2);
    if (type == TYPE_Q6_K) {
        for (int part = 0; part < 16; part++)
            bytes[(2 + part) * PANEL + row] = from[192 + part];
    } else if (type == TYPE_Q4_K) {
        memcpy(bytes + 2 * PANEL + row * 2, from + 2, 2);
        for (int part = 0; part < 8; part++) {
            int scale, least;
            gguf_q4_k_scales(from + 4, part, &scale, &least);
            bytes[(4 + part) * PANEL + row] = (uint8_t)scale;
            bytes[(12 + part) * PANEL + row] = (uint8_t)least;
        }
    }
}

/* n_blocks of each row, whose rows lie `stride` bytes apart. Returns the end in the panel. */
static char *pack_blocks(enum tensor_type type, const char *from, size_t stride, int n_blocks,
                         int n_rows, char *panel) {
    struct pack_block layout = pack_block(type);
    size_t payload = (size_t)layout.n_words * 4;
    for (int block = 0; block < n_blocks; block++, from += layout.bytes) {
        for (int row = 0; row < n_rows; row++)
            pack_header(type, (const uint8_t *)from + (size_t)row * stride, panel, row);
        panel += layout.header;
        pack_words(from + layout.payload, stride, n_rows, payload, panel);
        for (size_t i = 0; i < payload * PANEL && type == TYPE_Q8_0; i++)
            panel[i] = (char)(panel[i] ^ 0x80);
        panel += payload * PANEL;
    }
    return panel;
}

/* The same of a type that no kernel multiplies: a block of each row at a time becomes Q8_0. */
static void pack_stored(const struct tensor *tensor, int first, int n_rows, char *panel) {
    uint8_t rows[PANEL][REPACK_MAX_BYTES];
    int elements = repack_elements(tensor->stored), n_blocks = (int)tensor->cols / elements;
    size_t stride = tensor->stored_bytes / (size_t)tensor->rows;
    const uint8_t *from = (const uint8_t *)tensor->data + (size_t)first * stride;
    for (int block = 0; block < n_blocks; block++, from += stride / (size_t)n_blocks) {
        for (int row = 0; row < n_rows; row++)
            repack_block(tensor->stored, from + (size_t)row * stride, rows[row]);
        panel = pack_blocks(TYPE_Q8_0, (const char *)rows, sizeof rows[0], elements / REPACK_PART,
                            n_rows, panel);
    }
}

void pack_panel(const struct weight *weight, int index) {
    char *panel = weight->panels + (size_t)index * weight->panel_bytes;
    int first = index * PANEL, n = smaller(weight->n_rows - first, PANEL);
    size_t stride = weight->tensor->bytes / (size_t)weight->tensor->rows;
    const char *from = (const char *)weight->tensor->data + (size_t)first * stride;
    if (pack_quantized(weight->type) && n < PANEL)
        memset(panel, 0, weight->panel_bytes);
    if (weight->tensor->stored) {
        pack_stored(weight->tensor, first, n, panel);
    } else if (pack_quantized(weight->type)) {
        pack_blocks(weight->type, from, stride, weight->cols / pack_block(weight->type).n_k, n,
                    panel);
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
    if (weight->n_rows > 1 || pack_quantized(tensor->type)) {
        size_t n_k = round_up((size_t)weight->cols, 2); /* kernels take two k at a time */
        weight->panel_bytes =
            n_k / (size_t)pack_block(tensor->type).n_part * pack_part_bytes(tensor->type);
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
    view->owner = false;
    if (slice.kind == SLICE_EXPERTS) /* who needs one takes it: pack_expert */
        return view;
    bool columns = slice.kind == SLICE_COLS || view->vector;
    int *first = columns ? &view->first_col : &view->first_row;
    int *count = columns ? &view->n_cols : &view->n_rows;
    *count /= slice.count;
    *first = slice.rank * *count;
    if (view->vector)
        view->vector += *first;
    return view;
}

struct weight pack_expert(const struct weight *all, int expert, int n_rows) {
    struct weight part = *all;
    if (part.vector) {
        part.vector += expert * n_rows;
        part.n_cols = n_rows;
    } else {
        part.first_row = expert * n_rows;
        part.n_rows = n_rows;
    }
    return part;
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

/* ---- the plain kernel ---- */

/* n_rows x n_vectors sums, from vector `first` of a panel's 4. In kernels all loops over rows and
 * vectors are unrolled, or the sums would not stay in registers. */
INLINE void load_sums(const struct tile *tile, int n_rows, int first, int n_vectors,
                      vec sum[TILE_ROWS][4]) {
#pragma GCC unroll 6
    for (int row = 0; row < n_rows; row++)
#pragma GCC unroll 4
        for (int i = 0; i < n_vectors; i++)
            sum[row][i] =
                tile->add ? load(tile->out + row * PANEL + (first + i) * LANES) : (vec){0};
}

INLINE void store_sums(const struct tile *tile, int n_rows, int first, int n_vectors,
                       vec sum[TILE_ROWS][4]) {
#pragma GCC unroll 6
    for (int row = 0; row < n_rows; row++)
#pragma GCC unroll 4
        for (int i = 0; i < n_vectors; i++)
            store(tile->out + row * PANEL + (first + i) * LANES, sum[row][i]);
}

/* The heart of this file: n_rows x 4 sums stay in registers over all of k. `type` and `n_rows` are
 * constants where it is inlined; each sum is one chain over k, whatever they are. */
INLINE void tile_product(int n_rows, enum tensor_type type, const struct tile *tile) {
    vec sum[TILE_ROWS][4];
    load_sums(tile, n_rows, 0, 4, sum);
    const float *input = (const float *)(const void *)tile->input;
    size_t stride = tile->stride / sizeof(float);
    for (int k = tile->begin; k < tile->end;) {
        int end = part_end(type, k, tile->end);
        struct scales scales;
        load_scales(type, tile->panel, (unsigned)k, &scales);
        for (; k < end; k += 2, input += 2) {
            if (tile->ahead && !pack_quantized(type)) /* of two k: one or two blocks */
                read_ahead(block_of(type, tile->panel, (unsigned)k),
                           2 / (size_t)pack_block(type).n_k * pack_part_bytes(type));
            for (int odd = 0; odd < 2; odd++) {
                vec weights[4];
                for (int i = 0; i < 4; i++)
                    weights[i] = load_weight(type, tile->panel, (unsigned)(k + odd), i, &scales);
                for (int row = 0; row < n_rows; row++) {
                    float factor = input[(size_t)row * stride + (size_t)odd];
                    for (int i = 0; i < 4; i++)
                        sum[row][i] += factor * weights[i];
                }
            }
        }
    }
    store_sums(tile, n_rows, 0, 4, sum);
}

/* A function for each type, with a kernel for each number of rows: all in one would take the
 * compiler minutes. `...`: the instructions that it may use. */
#define KERNELS(name, kernel, type, ...)                                                           \
    static NOINLINE __VA_ARGS__ void name(int n_rows, const struct tile *tile) {                   \
        WITH_ROWS(n_rows, kernel, type, tile);                                                     \
    }

KERNELS(tile_f32, tile_product, TYPE_F32)
KERNELS(tile_f16, tile_product, TYPE_F16)
KERNELS(tile_bf16, tile_product, TYPE_BF16)
KERNELS(tile_q8_0, tile_product, TYPE_Q8_0)
KERNELS(tile_q4_0, tile_product, TYPE_Q4_0)
KERNELS(tile_q4_k, tile_product, TYPE_Q4_K)
KERNELS(tile_q6_k, tile_product, TYPE_Q6_K)
KERNELS(tile_mxfp4, tile_product, TYPE_MXFP4)

typedef void tile_kernel(int n_rows, const struct tile *tile);
static tile_kernel *const plain_tiles[] = {
    [TYPE_F32] = tile_f32,   [TYPE_F16] = tile_f16,    [TYPE_BF16] = tile_bf16,
    [TYPE_Q8_0] = tile_q8_0, [TYPE_Q4_0] = tile_q4_0,  [TYPE_Q4_K] = tile_q4_k,
    [TYPE_Q6_K] = tile_q6_k, [TYPE_MXFP4] = tile_mxfp4};

/* ---- rows in their forms, and the kernels that want them so ---- */

size_t dot_form_bytes(enum row_form form, int begin, int end) {
    if (form == FORM_Q8)
        return (size_t)(divide_up(end, Q8_BLOCK) - begin / Q8_BLOCK) * sizeof(struct q8_block);
    return (size_t)(end - begin) * (form == FORM_BF16 ? 2 : 4);
}

enum row_form dot_form(enum tensor_type type, bool plain) {
#if defined(__x86_64__)
    bool wide = !plain && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    if (wide && type == TYPE_BF16 && __builtin_cpu_supports("avx512bf16"))
        return FORM_BF16;
    if (wide && pack_quantized(type) && __builtin_cpu_supports("avx512vnni"))
        return FORM_Q8;
#endif
    (void)type, (void)plain;
    return FORM_F32;
}

static void dot_convert_block(const float *from, int count, struct q8_block *to, int at) {
    float part[Q8_BLOCK] = {0};
    memcpy(part + at, from, sizeof(float) * (size_t)count);
    vec half[2] = {load(part), load(part + LANES)};
    float largest = max_lanes(max_vec(max_vec(half[0], -half[0]), max_vec(half[1], -half[1])));
    float factor = largest > 0.0f ? 127.0f / largest : 0.0f;
    to->scale = largest / 127.0f;
    for (int i = 0; i < 2; i++) {
        vec rounded = half[i] * factor + 12582912.0f; /* 1.5 * 2^23: rounds to a whole number */
        ivec whole = __builtin_convertvector(rounded - 12582912.0f, ivec);
        byte_vec bytes = __builtin_convertvector(whole, byte_vec);
        memcpy(to->q + i * LANES, &bytes, sizeof bytes);
        float sum = sum_lanes(rounded - 12582912.0f); /* exact: less than 2^24 */
        to->sum[i] = sum == sum ? (int32_t)sum : 0;
        to->scale = sum == sum ? to->scale : sum; /* of NaN or infinity all becomes NaN */
    }
    to->scaled_sum = to->scale * (float)(to->sum[0] + to->sum[1]);
}

static void dot_convert_q8(const float *from, int begin, int end, char *to) {
    struct q8_block *block = (struct q8_block *)(void *)to;
    for (int k = begin, next; k < end; k = next, block++) {
        next = smaller((k / Q8_BLOCK + 1) * Q8_BLOCK, end);
        dot_convert_block(from + (k - begin), next - k, block, k % Q8_BLOCK);
    }
}

#if defined(__x86_64__)
#include <immintrin.h>

#define DOT      __attribute__((target("avx512f,avx512bw,avx512vl")))
#define DOT_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define DOT_Q8   __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))

/* To nearest, ties to even; what is below the normal numbers becomes 0. An odd last element gets a
 * zero beside it: weights are multiplied in pairs, and what stood there might be no number. */
static DOT_BF16 void dot_convert_bf16(const float *from, int count, char *to) {
    for (int k = 0; k < count; k += LANES) {
        int n = smaller(count - k, LANES);
        __m256bh halves = _mm512_cvtneps_pbh((__m512)load_part(from + k, n));
        if (n == LANES)
            memcpy(to + k * 2, &halves, sizeof halves);
        else
            memcpy(to + k * 2, &halves, sizeof(uint16_t) * (size_t)(n + n % 2));
    }
}

/* Each instruction adds two products to each of 16 sums. */
INLINE DOT_BF16 void dot_bf16(int n_rows, enum tensor_type type, const struct tile *tile) {
    (void)type; /* BF16 */
    vec sum[TILE_ROWS][4];
    load_sums(tile, n_rows, 0, 4, sum);
    const char *input = tile->input;
    for (int k = tile->begin; k < tile->end; k += 2, input += 4) {
        __m512bh weights[4];
        if (tile->ahead)
            read_ahead(tile->panel + (size_t)k * 2 * PANEL, 4 * PANEL);
        for (int i = 0; i < 4; i++)
            weights[i] = (__m512bh)load_words(tile->panel, (unsigned)k / 2, i);
        for (int row = 0; row < n_rows; row++) {
            int32_t pair;
            memcpy(&pair, input + (size_t)row * tile->stride, sizeof pair);
            for (int i = 0; i < 4; i++)
                sum[row][i] =
                    _mm512_dpbf16_ps(sum[row][i], weights[i], (__m512bh)_mm512_set1_epi32(pair));
        }
    }
    store_sums(tile, n_rows, 0, 4, sum);
}

/* A part of a block that begins at k times rows whose blocks begin at `block`, `stride` bytes
 * apart. Sums begin with what the offset of the weights' numbers makes of a row, -offset * the sum
 * of its bytes; each instruction adds four products to each of 16 sums. */
INLINE DOT_Q8 void dot_q8_multiply(enum tensor_type type, int n_rows, int first, int n_vectors,
                                   const char *panel, const char *block, size_t stride, unsigned k,
                                   __m512i whole[TILE_ROWS][4]) {
    const char *quads = block + k % Q8_BLOCK;
    const char *sums = block + Q8_BLOCK + k % Q8_BLOCK / 16 * sizeof(int32_t);
#pragma GCC unroll 6
    for (int row = 0; row < n_rows; row++) {
        const int32_t *sum = (const int32_t *)(const void *)(sums + (size_t)row * stride);
        int32_t all = pack_block(type).n_part == Q8_BLOCK ? sum[0] + sum[1] : sum[0];
#pragma GCC unroll 4
        for (int i = 0; i < n_vectors; i++)
            whole[row][i] = _mm512_set1_epi32(-pack_block(type).offset * all);
    }
#pragma GCC unroll 8
    for (unsigned at = 0; at < (unsigned)pack_block(type).n_part; at += 4) {
        __m512i weights[4];
#pragma GCC unroll 4
        for (int i = 0; i < n_vectors; i++) {
            weights[i] = (__m512i)load_quad(type, panel, k, at, first + i);
            __asm__("" : "+v"(weights[i])); /* gcc 12 would load them again for each row */
        }
#pragma GCC unroll 6
        for (int row = 0; row < n_rows; row++) {
            int32_t quad;
            memcpy(&quad, quads + (size_t)row * stride + at, sizeof quad);
#pragma GCC unroll 4
            for (int i = 0; i < n_vectors; i++)
                whole[row][i] =
                    _mm512_dpbusd_epi32(whole[row][i], weights[i], _mm512_set1_epi32(quad));
        }
    }
}

/* Adds one row's whole numbers of that part to its sums, scaled. */
INLINE DOT_Q8 void dot_q8_scale(enum tensor_type type, int first, int n_vectors,
                                const struct scales *scales, const char *row,
                                const __m512i whole[4], vec sum[4]) {
    const struct q8_block *block = (const struct q8_block *)(const void *)row;
    __m512 scale = _mm512_set1_ps(block->scale), total = _mm512_set1_ps(block->scaled_sum);
#pragma GCC unroll 4
    for (int i = 0; i < n_vectors; i++) {
        __m512 both = _mm512_mul_ps((__m512)scales->scale[first + i], scale);
        sum[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole[i]), both, sum[i]);
        if (type == TYPE_Q4_K)
            sum[i] = _mm512_fnmadd_ps((__m512)scales->least[first + i], total, sum[i]);
    }
}

INLINE DOT_Q8 void dot_q8_part(enum tensor_type type, int n_rows, int first, int n_vectors,
                               const struct tile *tile) {
    const unsigned n_part = (unsigned)pack_block(type).n_part, end = (unsigned)tile->end;
    const size_t bytes = pack_part_bytes(type), stride = tile->stride;
    const char *block = tile->input;
    vec sum[TILE_ROWS][4];
    load_sums(tile, n_rows, first, n_vectors, sum);
    for (unsigned k = (unsigned)tile->begin / n_part * n_part; k < end; k += n_part) {
        struct scales scales;
        __m512i whole[TILE_ROWS][4];
        if (tile->ahead && first == 0)
            read_ahead(tile->panel + k / n_part * bytes, bytes);
        load_scales(type, tile->panel, k, &scales);
        dot_q8_multiply(type, n_rows, first, n_vectors, tile->panel, block, stride, k, whole);
#pragma GCC unroll 6
        for (int row = 0; row < n_rows; row++)
            dot_q8_scale(type, first, n_vectors, &scales, block + (size_t)row * stride, whole[row],
                         sum[row]);
        if ((k + n_part) % Q8_BLOCK == 0)
            block += sizeof(struct q8_block);
    }
    store_sums(tile, n_rows, first, n_vectors, sum);
}

/* More than 3 rows: half a panel at a time, so that the sums of both kinds fit into registers. */
INLINE DOT_Q8 void dot_q8(int n_rows, enum tensor_type type, const struct tile *tile) {
    if (n_rows > 3) {
        dot_q8_part(type, n_rows, 0, 2, tile);
        dot_q8_part(type, n_rows, 2, 2, tile);
    } else {
        dot_q8_part(type, n_rows, 0, 4, tile);
    }
}

KERNELS(dot_tile_bf16, dot_bf16, TYPE_BF16, DOT_BF16)
KERNELS(dot_tile_q8_0, dot_q8, TYPE_Q8_0, DOT_Q8)
KERNELS(dot_tile_q4_0, dot_q8, TYPE_Q4_0, DOT_Q8)
KERNELS(dot_tile_q4_k, dot_q8, TYPE_Q4_K, DOT_Q8)
KERNELS(dot_tile_q6_k, dot_q8, TYPE_Q6_K, DOT_Q8)
KERNELS(dot_tile_mxfp4, dot_q8, TYPE_MXFP4, DOT_Q8)

static tile_kernel *const dot_tiles[] = {
    [TYPE_BF16] = dot_tile_bf16, [TYPE_Q8_0] = dot_tile_q8_0, [TYPE_Q4_0] = dot_tile_q4_0,
    [TYPE_Q4_K] = dot_tile_q4_k, [TYPE_Q6_K] = dot_tile_q6_k, [TYPE_MXFP4] = dot_tile_mxfp4};
#else /* other processors: the plain kernel alone, so nothing is ever converted to bf16 */
#define dot_tiles plain_tiles
static void dot_convert_bf16(const float *from, int count, char *to) {
    (void)from, (void)count, (void)to;
}
#endif

void dot_convert(enum row_form form, const float *from, int begin, int end, char *to) {
    if (form == FORM_BF16)
        dot_convert_bf16(from, end - begin, to);
    else
        dot_convert_q8(from, begin, end, to);
}

/* ---- the matrix unit (amx.h) ---- */

#ifdef AMX
/* The sums of 64 outputs for up to 16 rows. k in [begin, end) are whole tiles, or a part of one. */
INLINE AMX void amx_sums(const struct tile *tile) {
    const size_t line = 4 * PANEL, stride = tile->stride; /* line: of the panel and of `out` */
    const char *input = tile->input, *words = tile->panel + (size_t)tile->begin / 2 * line;
    amx_load_sums(!tile->add, (const char *)tile->out, line);
    for (int k = tile->begin; k < tile->end; k += AMX_K) {
        if (tile->ahead)
            read_ahead(words, AMX_K / 2 * line);
        amx_load(4, input, stride);
        amx_load(5, words, line);
        amx_dot(0, 4, 5);
        amx_load(6, words + 64, line);
        amx_dot(1, 4, 6);
        amx_load(7, words + 128, line);
        amx_dot(2, 4, 7);
        amx_load(5, words + 192, line);
        amx_dot(3, 4, 5);
        input += 2 * AMX_K;
        words += AMX_K / 2 * line;
    }
    amx_store_sums((char *)tile->out, line);
}

/* Any number of rows. Tiles begin at multiples of 32 k, wherever `tile` does. */
static NOINLINE AMX void amx_bf16(int n_rows, struct tile tile) {
    const int end = tile.end;
    for (int k = tile.begin, shape = 0; k < end; k = tile.begin) {
        int slab = (k / AMX_SLAB + 1) * AMX_SLAB, n_k = smaller(AMX_K - k % AMX_K, end - k);
        tile.end = n_k < AMX_K ? k + n_k : slab < end ? slab : end / AMX_K * AMX_K;
        struct tile part = tile;
        for (int row = 0; row < n_rows; row += AMX_ROWS) {
            int rows = smaller(n_rows - row, AMX_ROWS);
            if (shape != rows * AMX_K + n_k) /* it takes as long as 13 tiles */
                amx_configure(rows, divide_up(n_k, 2));
            shape = rows * AMX_K + n_k;
            amx_sums(&part);
            part.input += AMX_ROWS * tile.stride;
            part.out += AMX_ROWS * PANEL;
            part.ahead = false;
        }
        tile.input += (size_t)(tile.end - k) * 2;
        tile.begin = tile.end;
        tile.add = true;
    }
    amx_release();
}
#endif

/* ---- larger products ---- */

/* Any number of rows, in groups of like size. */
static void tile_rows(enum tensor_type type, struct tile tile, int n_rows) {
#ifdef AMX
    if (tile.amx && tile.form == FORM_BF16) {
        amx_bf16(n_rows, tile);
        return;
    }
#endif
    for (int groups = divide_up(n_rows, TILE_ROWS); groups > 0; groups--) {
        int n = divide_up(n_rows, groups);
        (tile.form == FORM_F32 ? plain_tiles : dot_tiles)[type](n, &tile);
        tile.ahead = false; /* the next rows find it in a cache */
        tile.input += (size_t)n * tile.stride;
        tile.out += n * PANEL;
        n_rows -= n;
    }
}

INLINE void widen_as(enum tensor_type type, const char *panel, int begin, int end, float *slab) {
    for (int k = begin; k < end;) {
        int stop = part_end(type, k, end);
        struct scales scales;
        load_scales(type, panel, (unsigned)k, &scales);
        for (; k < stop; k++, slab += PANEL)
            for (int i = 0; i < 4; i++)
                store(slab + i * LANES, load_weight(type, panel, (unsigned)k, i, &scales));
    }
}

static void widen(enum tensor_type type, const char *panel, int begin, int end, float *slab) {
    switch (type) {
    case TYPE_F32: return; /* needs it not */
    case TYPE_F16: widen_as(TYPE_F16, panel, begin, end, slab); return;
    case TYPE_BF16: widen_as(TYPE_BF16, panel, begin, end, slab); return;
    case TYPE_Q8_0: widen_as(TYPE_Q8_0, panel, begin, end, slab); return;
    case TYPE_Q4_0: widen_as(TYPE_Q4_0, panel, begin, end, slab); return;
    case TYPE_Q4_K: widen_as(TYPE_Q4_K, panel, begin, end, slab); return;
    case TYPE_Q6_K: widen_as(TYPE_Q6_K, panel, begin, end, slab); return;
    case TYPE_MXFP4: widen_as(TYPE_MXFP4, panel, begin, end, slab); return;
    }
}

/* Many rows keep their sums in `out` from slab to slab of the panel, which the plain kernel first
 * turns into f32: the same bits. */
void panel_product(enum tensor_type type, struct tile tile, int n_rows, float *slab) {
    const int begin = tile.begin, end = tile.end;
    const int slab_k = n_rows <= TILE_ROWS ? end : tile.form == FORM_F32 ? SLAB : DOT_SLAB;
    if (begin >= end)
        memset(tile.out, 0, sizeof(float) * (size_t)n_rows * PANEL);
    for (int k = begin, next; k < end; k = next) {
        next = smaller((k / slab_k + 1) * slab_k, end);
        struct tile part = tile;
        part.begin = k;
        part.end = next;
        part.add = k > begin;
        if (type == TYPE_F32 || tile.form != FORM_F32 || n_rows <= DIRECT_ROWS) {
            tile_rows(type, part, n_rows);
        } else {
            widen(type, tile.panel, k, next + (next & 1), slab);
            part.panel = (const char *)slab;
            part.ahead = false;
            part.begin = 0;
            part.end = next - k;
            tile_rows(TYPE_F32, part, n_rows);
        }
        tile.input += dot_form_bytes(tile.form, k, next);
    }
}

void segment_product(const struct weight *matrix, int unit, int first, int count, struct tile tile,
                     int n_rows, float *slab, float (*spare)[ROW_CHUNK * PANEL]) {
    if (count == 1) {
        tile.begin = segment_begin(matrix->cols, unit, first);
        tile.end = segment_begin(matrix->cols, unit, first + 1);
        panel_product(matrix->type, tile, n_rows, slab);
        return;
    }
    int half = count / 2;
    segment_product(matrix, unit, first, half, tile, n_rows, slab, spare);
    for (int i = first; i < first + half; i++)
        tile.input += dot_form_bytes(tile.form, segment_begin(matrix->cols, unit, i),
                                     segment_begin(matrix->cols, unit, i + 1));
    float *sum = tile.out;
    tile.out = *spare;
    segment_product(matrix, unit, first + half, half, tile, n_rows, slab, spare + 1);
    for (int i = 0; i < n_rows * PANEL; i += LANES)
        store(sum + i, load(sum + i) + load(tile.out + i));
}

/* ---- what a processor can do ---- */

enum {
    BUSY_STEPS = 10000, /* a few hundred microseconds */
    BUSY_SUMS = 24      /* side by side, as many as a kernel has: each waits for the one before */
};

static void busy_f32(float *sink) {
    vec sum[BUSY_SUMS], factor = (vec){0} + 0.999f;
    for (int i = 0; i < BUSY_SUMS; i++)
        sum[i] = factor * (float)i;
    for (int k = 0; k < BUSY_STEPS; k++) {
#pragma GCC unroll 24
        for (int i = 0; i < BUSY_SUMS; i++)
            sum[i] = sum[i] * factor + factor;
    }
    for (int i = 1; i < BUSY_SUMS; i++)
        sum[0] += sum[i];
    store(sink, sum[0]);
}

#if defined(__x86_64__)
/* In assembler: gcc 12 copies sums of these instructions to and fro. */
static DOT void busy_dot(bool bf16, float *sink) {
    __m512i sum[BUSY_SUMS], factor = _mm512_set1_epi32(0x3c003c00);
#pragma GCC unroll 24
    for (int i = 0; i < BUSY_SUMS; i++)
        sum[i] = _mm512_set1_epi32(0x3c003c00 + i);
    for (int k = 0; k < BUSY_STEPS; k++)
#pragma GCC unroll 24
        for (int i = 0; i < BUSY_SUMS; i++)
            if (bf16)
                __asm__("vdpbf16ps %1, %1, %0" : "+v"(sum[i]) : "v"(factor));
            else
                __asm__("vpdpbusd %1, %1, %0" : "+v"(sum[i]) : "v"(factor));
#pragma GCC unroll 24
    for (int i = 1; i < BUSY_SUMS; i++)
        sum[0] = _mm512_add_epi32(sum[0], sum[i]);
    _mm512_storeu_ps(sink, _mm512_cvtepi32_ps(sum[0]));
}
#endif

#ifdef AMX
static AMX void busy_amx(void) { /* as many products of tiles as the others do of vectors */
    amx_configure(AMX_ROWS, AMX_K / 2);
    for (int k = 0; k < BUSY_STEPS * BUSY_SUMS; k += 4) {
        amx_dot(0, 4, 5);
        amx_dot(1, 4, 6);
        amx_dot(2, 4, 7);
        amx_dot(3, 4, 5);
    }
    amx_release();
}
#endif

double dot_busy(enum row_form form, bool amx, float *sink) {
    int products = form == FORM_Q8 ? 4 : form == FORM_F32 ? 1 : amx ? AMX_ROWS * AMX_K : 2;
    if (form == FORM_F32)
        busy_f32(sink);
#ifdef AMX
    else if (form == FORM_BF16 && amx)
        busy_amx();
#endif
#if defined(__x86_64__)
    else
        busy_dot(form == FORM_BF16, sink);
#endif
    return 2.0 * BUSY_STEPS * BUSY_SUMS * LANES * products; /* products: of a lane */
}
#endif /* MATMUL_IMPLEMENTATION */
