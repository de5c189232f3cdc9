/* pack.h: weights in the order in which the product kernel reads them.
 *
 * A tensor of the model file is packed once, into *panels* of 64 outputs side by side for each k,
 * in its own type; a vector becomes plain f32. Shards are views of the whole. The kernel reads a
 * panel 64 weights at a time, as f32, with load_scales and load_weights.
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
 * A panel holds, for 64 outputs (those past the last row are 0):
 *     F32, F16   [k][64]
 *     BF16       [k / 2][64][2]: also what a dot product of bf16 pairs wants
 *     Q8_0       [k / 32] { f16 scale[64]; int8 [32][64] }
 * An odd k is padded with zeros. Every type is exact in f32. */
#ifndef PACK_H
#define PACK_H
#include "dynamo.h"
#include "vector.h"

enum {
    PANEL = 64,    /* outputs in a panel: 4 vectors, and 6 rows of them fill 24 registers */
    Q8_BLOCK = 32, /* k that share a scale */
    Q8_PANEL_BYTES = PANEL * (2 + Q8_BLOCK)
};

/* A matrix, or a part of one: rows [first_row, first_row + n_rows) and columns alike of the packed
 * whole, `panels`, which the weight of the whole tensor owns. A vector is plain f32. */
struct weight {
    const struct tensor *tensor;
    enum tensor_type type;
    int first_row, n_rows, first_col, n_cols, cols; /* cols: of the whole */
    size_t panel_bytes;
    char *panels;  /* (rows / PANEL) panels; see below */
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

INLINE const char *q8_block(const char *panel, int k) {
    return panel + (size_t)(k / Q8_BLOCK) * Q8_PANEL_BYTES;
}

/* 64 weights of k as f32: vectors 0 to 3. `scale`: of k's block, for Q8_0. All types are exact. */
INLINE void load_weights(enum tensor_type type, const char *panel, int k, const vec scale[4],
                         vec out[4]) {
    size_t at = (size_t)k * PANEL;
    for (size_t i = 0; i < 4; i++) {
        if (type == TYPE_F32) {
            out[i] = load((const float *)(const void *)panel + at + i * LANES);
        } else if (type == TYPE_BF16) {
            const uint16_t *pairs = (const uint16_t *)(const void *)panel + (at & ~(size_t)PANEL);
            ivec pair = *(const ivec_any *)(const void *)(pairs + i * 2 * LANES);
            ivec value = k & 1 ? pair & (int32_t)0xffff0000 : pair << 16;
            out[i] = (vec)value;
        } else if (type == TYPE_F16) {
            out[i] = widen_f16((const uint16_t *)(const void *)panel + at + i * LANES);
        } else {
            const char *bytes = q8_block(panel, k) + 2 * PANEL + k % Q8_BLOCK * PANEL;
            out[i] = widen_int8(bytes + i * LANES) * scale[i];
        }
    }
}

INLINE void load_scales(enum tensor_type type, const char *panel, int k, vec scale[4]) {
    for (size_t i = 0; i < 4 && type == TYPE_Q8_0; i++)
        scale[i] = widen_f16((const uint16_t *)(const void *)q8_block(panel, k) + i * LANES);
}

INLINE int block_end(enum tensor_type type, int k, int end) { /* where the scale changes */
    int next = (k / Q8_BLOCK + 1) * Q8_BLOCK;
    return type == TYPE_Q8_0 && next < end ? next : end;
}
#endif /* PACK_H */
#ifdef PACK_IMPLEMENTATION
#undef PACK_IMPLEMENTATION
#include <stdlib.h>

static size_t pack_panel_bytes(enum tensor_type type, int cols) {
    size_t n_k = round_up((size_t)cols, 2);
    switch (type) {
    case TYPE_F32: return n_k * PANEL * 4;
    case TYPE_F16:
    case TYPE_BF16: return n_k * PANEL * 2;
    case TYPE_Q8_0: return (size_t)cols / Q8_BLOCK * Q8_PANEL_BYTES;
    }
    return 0;
}

static void pack_q8(const struct weight *weight, int first, int n, char *panel) {
    size_t n_blocks = (size_t)weight->cols / Q8_BLOCK, bytes = 2 + Q8_BLOCK;
    for (size_t block = 0; block < n_blocks; block++, panel += Q8_PANEL_BYTES) {
        for (int row = 0; row < n; row++) {
            const char *from = (const char *)weight->tensor->data +
                               ((size_t)(first + row) * n_blocks + block) * bytes;
            memcpy(panel + row * 2, from, 2);
            for (int k = 0; k < Q8_BLOCK; k++)
                panel[2 * PANEL + k * PANEL + row] = from[2 + k];
        }
    }
}

void pack_panel(const struct weight *weight, int index) {
    char *panel = weight->panels + (size_t)index * weight->panel_bytes;
    int first = index * PANEL, n = weight->n_rows - first < PANEL ? weight->n_rows - first : PANEL;
    size_t cols = (size_t)weight->cols;
    if (n < PANEL || (cols & 1))
        memset(panel, 0, weight->panel_bytes);
    if (weight->type == TYPE_Q8_0) {
        pack_q8(weight, first, n, panel);
        return;
    }
    size_t pair = weight->type == TYPE_BF16 ? 2 : 1;
    for (size_t start = 0; start < cols; start += 32) { /* so the panel's lines stay in L1 */
        size_t end = start + 32 < cols ? start + 32 : cols;
        for (size_t row = 0; row < (size_t)n; row++) {
            size_t from = ((size_t)first + row) * cols;
            for (size_t k = start; k < end; k++) {
                size_t to = (k / pair * PANEL + row) * pair + k % pair;
                if (weight->type == TYPE_F32) {
                    ((float *)(void *)panel)[to] = ((const float *)weight->tensor->data)[from + k];
                } else {
                    ((uint16_t *)(void *)panel)[to] =
                        ((const uint16_t *)weight->tensor->data)[from + k];
                }
            }
        }
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
    if (weight->n_rows > 1 || tensor->type == TYPE_Q8_0) {
        weight->panel_bytes = pack_panel_bytes(tensor->type, weight->cols);
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
    for (int k = 0; k < weight->cols; k++) {
        vec scale[4], weights[4];
        load_scales(weight->type, panel, k, scale);
        load_weights(weight->type, panel, k, scale, weights);
        out[k] = weights[row % PANEL / LANES][row % LANES];
    }
}
#endif /* PACK_IMPLEMENTATION */
