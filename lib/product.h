/* product.h: rows times a panel of packed weights, the heart of the arithmetic.
 *
 * One kernel, tile_product, keeps 64 outputs of 1 to 6 rows in registers over all of k. It is
 * compiled for each type and number of rows. The functions below put larger products together.
 *
 *     struct tile tile = {.panel = weight->panels, .end = weight->cols, .input = x,
 *                         .stride = x_stride, .out = out};
 *     panel_product(weight->type, tile, n_rows, slab); // outputs 0 to 63 of each row of x
 *
 * Invariant: each output is one chain of sums over k, which does not depend on the other rows, on
 * their number or on slabs. It knows nothing of threads: a call computes a tile on its own. */
#ifndef PRODUCT_H
#define PRODUCT_H
#include "dot.h"
#include "pack.h"

enum {
    TILE_ROWS = 6,    /* rows that one call of the kernel computes at most */
    DIRECT_ROWS = 24, /* up to so many rows read a panel in its stored type */
    SLAB = 256,       /* k of a panel that are kept as f32 in L2 while many rows use them */
    DOT_SLAB = 1024,  /* the same for fast paths, which read them in the stored type */
    ROW_CHUNK = 96    /* rows of a product's tile: they pay for its slabs; 0.1 to 0.5 ms */
};

/* out[row][64] (+)= sum over k in [begin, end) of input[row][k] * weight[k][64] */
struct tile {
    const char *panel;
    int begin, end;     /* k of the panel; begin is even */
    enum row_form form; /* of the rows: dot_form of the panel's type, or FORM_F32 */
    const char *input;  /* (rows) the first column is k = begin */
    size_t stride;      /* bytes from row to row */
    float *out;         /* (rows, PANEL) */
    bool add, ahead;    /* ahead: the panel comes from memory */
};

/* Any number of rows, in groups of like size. */
void tile_rows(enum tensor_type type, struct tile tile, int n_rows);
/* The same for long k: out = input . weights. slab (SLAB, PANEL) is overwritten. */
void panel_product(enum tensor_type type, struct tile tile, int n_rows, float *slab);
/* Sums segments [first, first + count) of K, a power of two of them, as a binary tree. The input
 * has them one behind the other, each converted on its own. spare: a tile for each level. */
void segment_product(const struct weight *matrix, int unit, int first, int count, struct tile tile,
                     int n_rows, float *slab, float (*spare)[ROW_CHUNK * PANEL]);
void silu_multiply(float *gate, const float *up, int count); /* gate = silu(gate) * up */
#endif                                                       /* PRODUCT_H */
#ifdef PRODUCT_IMPLEMENTATION
#undef PRODUCT_IMPLEMENTATION
#define DOT_IMPLEMENTATION
#include "dot.h"

/* The heart of this file: n_rows x 4 sums stay in registers over all of k. `type` and `n_rows` are
 * constants where it is inlined; each sum is one chain over k, whatever they are. */
INLINE void tile_product(enum tensor_type type, int n_rows, const struct tile *tile) {
    vec sum[TILE_ROWS][4];
#pragma GCC unroll 6
    for (int row = 0; row < n_rows; row++)
        for (int i = 0; i < 4; i++)
            sum[row][i] = tile->add ? load(tile->out + row * PANEL + i * LANES) : (vec){0};
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
    for (int row = 0; row < n_rows; row++)
        for (int i = 0; i < 4; i++)
            store(tile->out + row * PANEL + i * LANES, sum[row][i]);
}

#define TILE_KERNEL(type, rows)                                                                    \
    static void tile_##type##_##rows(const struct tile *tile) {                                    \
        tile_product(TYPE_##type, rows, tile);                                                     \
    }
#define TILE_KERNELS(type)                                                                         \
    TILE_KERNEL(type, 1)                                                                           \
    TILE_KERNEL(type, 2)                                                                           \
    TILE_KERNEL(type, 3)                                                                           \
    TILE_KERNEL(type, 4)                                                                           \
    TILE_KERNEL(type, 5)                                                                           \
    TILE_KERNEL(type, 6)                                                                           \
    static void (*const tile_##type[])(const struct tile *) = {tile_##type##_1, tile_##type##_2,   \
                                                               tile_##type##_3, tile_##type##_4,   \
                                                               tile_##type##_5, tile_##type##_6};

TILE_KERNELS(F32)
TILE_KERNELS(F16)
TILE_KERNELS(BF16)
TILE_KERNELS(Q8_0)
TILE_KERNELS(Q4_0)
TILE_KERNELS(Q4_K)
TILE_KERNELS(Q6_K)

static void plain_tile(enum tensor_type type, int n_rows, const struct tile *tile) {
    switch (type) {
    case TYPE_F32: tile_F32[n_rows - 1](tile); return;
    case TYPE_F16: tile_F16[n_rows - 1](tile); return;
    case TYPE_BF16: tile_BF16[n_rows - 1](tile); return;
    case TYPE_Q8_0: tile_Q8_0[n_rows - 1](tile); return;
    case TYPE_Q4_0: tile_Q4_0[n_rows - 1](tile); return;
    case TYPE_Q4_K: tile_Q4_K[n_rows - 1](tile); return;
    case TYPE_Q6_K: tile_Q6_K[n_rows - 1](tile); return;
    }
}

void tile_rows(enum tensor_type type, struct tile tile, int n_rows) {
    for (int groups = divide_up(n_rows, TILE_ROWS); groups > 0; groups--) {
        int n = divide_up(n_rows, groups);
        if (tile.form == FORM_F32)
            plain_tile(type, n, &tile);
        else
            dot_tile(type, n, &tile);
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
    }
}

/* Many rows keep their sums in `out` from slab to slab of the panel, which the plain kernel first
 * turns into f32: the same bits. */
void panel_product(enum tensor_type type, struct tile tile, int n_rows, float *slab) {
    int begin = tile.begin, end = tile.end, slab_k = tile.form == FORM_F32 ? SLAB : DOT_SLAB;
    const char *panel = tile.panel;
    if (begin >= end) {
        memset(tile.out, 0, sizeof(float) * (size_t)n_rows * PANEL);
    } else if (n_rows <= TILE_ROWS) {
        tile_rows(type, tile, n_rows);
        return;
    }
    for (int k = begin; k < end;) {
        int next = (k / slab_k + 1) * slab_k < end ? (k / slab_k + 1) * slab_k : end;
        tile.begin = k;
        tile.end = next;
        tile.add = k > begin;
        if (type == TYPE_F32 || tile.form != FORM_F32 || n_rows <= DIRECT_ROWS) {
            tile_rows(type, tile, n_rows);
        } else {
            widen(type, panel, k, next + (next & 1), slab);
            tile.panel = (const char *)slab;
            tile.ahead = false;
            tile.end = next - k;
            tile.begin = 0;
            tile_rows(TYPE_F32, tile, n_rows);
        }
        tile.panel = panel;
        tile.input += dot_form_bytes(tile.form, k, next);
        k = next;
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

void silu_multiply(float *gate, const float *up, int count) {
    for (int i = 0; i < count; i += LANES) {
        vec value = load(gate + i);
        store(gate + i, value / (exp_vec(-value) + 1.0f) * load(up + i));
    }
}
#endif /* PRODUCT_IMPLEMENTATION */
