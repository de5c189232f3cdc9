/* product.cuh: rows times packed matrices on the tensor cores. The twin of product.h.
 *
 * A row takes the one kernel or the other by its role alone, so its bits do not depend on the
 * batch: generated_product   tokens that were generated: bound by reading the weights. A block of
 *                       K_SEGMENTS warps has 1 or 2 tiles of outputs and up to 64 rows; each warp
 *                       sums its segment of K, and the sums are added as a binary tree.
 *   prompt_product      rows of prompts: bound by multiplying. A block has 256 rows and 128
 *                       outputs, and each sum is one chain over all of K. Where shards cut K, a
 *                       shard goes on with the sums of the one before it: the same chain.
 * Both do their part of what follows a product: bias, silu(gate) * up, or adding to the residual.
 *
 * Rows are bf16 (n_rows, input_stride), outputs f32, but for the FFN's, which are the next input.
 */
#ifndef PRODUCT_CUH
#define PRODUCT_CUH
#include "pack.cuh"

enum epilogue { STORE, ADD, SILU }; /* out = sum + bias | out += sum | ffn = silu(gate) * up */

enum {
    THREADS = 256,   /* of a block, unless said otherwise */
    SUM_STRIDE = 20, /* floats: a row of 16 sums; 20 keeps the lanes in different banks */
    MAX_COLUMNS = 8, /* groups of 8 generated rows a block has at most */
    ROW_TILE = 256,  /* rows of a block of prompt_product: with 128 outputs, 85 products a byte */
    OUTPUT_TILE = 128,
    WARP_ROWS = 64, /* a warp's 64 x 64 sums fill 128 registers */
    STAGES = 4,     /* units under way in shared memory: 3 x 24 KB cover the latency of L2 */
    ROW_BAND = 8    /* row tiles that blocks of one time share, so that weights stay in L2 */
};

struct product {
    struct matrix matrix[3]; /* of like K; SILU: gate and up */
    float *out[3];           /* (n_rows, out_stride) */
    const float *bias[3];    /* (n_outputs), or NULL */
    int n_matrices, out_stride;
    const uint16_t *input;      /* bf16 (n_rows, input_stride) */
    const uint16_t *input_low;  /* the same: what bf16 leaves out of it; counts for F32 alone */
    int input_stride, n_passes; /* n_passes: see struct pass */
    const int *n_generated; /* device: generated_product has rows [0, *n_generated - n_before) */
    int n_before;
    int first_row, n_rows; /* prompt_product's */
    const float *initial;  /* (n_rows, out_stride) where its chains begin; NULL: at 0 */
    uint16_t *ffn;         /* SILU: bf16 (n_rows, ffn_stride) */
    int ffn_stride;
    struct segments ffn_places; /* the K of ffn_down */
};

/* One pass over a unit. F32 weights take three: high part of weights . high part of the input,
 * low . high, and high . low where the input has a low part; all others one. */
struct pass {
    int unit;
    bool low_weight, low_input;
};

template <int TYPE> DEVICE struct pass find_pass(const struct product &p, int index) {
    struct pass pass = {index, false, false};
    if (TYPE == PACKED_F32 || TYPE == PACKED_MIXED) {
        pass.unit = index / p.n_passes;
        pass.low_weight = index % p.n_passes == 1;
        pass.low_input = index % p.n_passes == 2;
    }
    return pass;
}

template <int TYPE> DEVICE int count_passes(const struct product &p) {
    return TYPE == PACKED_F32 || TYPE == PACKED_MIXED ? p.n_passes : 1;
}

DEVICE float silu(float x) {
    return x / (1.0f + __expf(-x));
}

/* What is done with the sums of a row and of two outputs, the first even; `up` for SILU alone. */
template <int EPILOGUE>
DEVICE void finish(const struct product &p, int which, int row, int output, const float sum[2],
                   const float up[2]) {
    int n = p.matrix[which].n_outputs - output;
    if (n <= 0)
        return;
    if (EPILOGUE == SILU) { /* segments begin at an even k: both lie side by side */
        uint16_t *to = p.ffn + (size_t)row * p.ffn_stride + place(p.ffn_places, output);
        *reinterpret_cast<uint32_t *>(to) = pack_bf16(silu(sum[0]) * up[0], silu(sum[1]) * up[1]);
        return;
    }
    float *out = p.out[which] + (size_t)row * p.out_stride + output;
    const float *bias = p.bias[which];
#pragma unroll
    for (int i = 0; i < 2; i++)
        if (i < n)
            out[i] = sum[i] + (EPILOGUE == ADD ? out[i] : bias ? bias[output + i] : 0.0f);
}

/* Which matrix a block works on, and its first tile there, if a block takes `tiles` of them. */
template <int EPILOGUE>
DEVICE int find_tile(const struct product &p, int block, int tiles, int *which) {
    *which = 0;
    while (EPILOGUE != SILU && *which + 1 < p.n_matrices) {
        int n_blocks = (p.matrix[*which].n_tiles + tiles - 1) / tiles;
        if (block < n_blocks)
            break;
        block -= n_blocks;
        ++*which;
    }
    return block * tiles;
}

/* ---- generated tokens ---- */

/* Tiles of outputs that a block takes: more, where many rows would be read again for each. */
static constexpr __host__ __device__ int tiles_a_block(int columns) {
    return columns > 2 ? 2 : 1;
}

/* The fragment that one pass wants of a tile; of a matrix that has no low part: 0. */
template <int TYPE>
DEVICE void matrix_fragment(const struct matrix &m, int tile, const struct pass &pass, int lane,
                            struct fragment<TYPE> *f) {
    int type = TYPE == PACKED_MIXED ? m.type : TYPE;
    if (pass.low_weight && type != PACKED_F32) {
        *f = {};
        return;
    }
    size_t index = (size_t)tile * m.n_units + pass.unit;
    load_fragment<TYPE, true>(m.packed + index * packed_bytes(type) + pass.low_weight * PART_BYTES,
                              m.scales + index * SCALE_BYTES, type, lane, f);
}

/* The tree that sums K_SEGMENTS segments; those that another shard has are 0 here. */
DEVICE float tree_sum(const float *sums, int n_segments, int stride) {
    float value[K_SEGMENTS];
#pragma unroll
    for (int i = 0; i < K_SEGMENTS; i++)
        value[i] = i < n_segments ? sums[i * stride] : 0.0f;
#pragma unroll
    for (int n = K_SEGMENTS; n > 1; n /= 2)
#pragma unroll
        for (int i = 0; i < n / 2; i++)
            value[i] = value[2 * i] + value[2 * i + 1];
    return value[0];
}

/* What a block of generated_product has: SLOTS tiles, of SILU each of gate and of up, its rows, and
 * for each warp its passes [at, end) over the units of its segment. */
template <int TYPE, int EPILOGUE, int COLUMNS> struct generated_block {
    static constexpr int KINDS = EPILOGUE == SILU ? 2 : 1, TILES = tiles_a_block(COLUMNS);
    static constexpr int SLOTS = TILES * KINDS, ROWS = 8 * COLUMNS;
    static constexpr int AHEAD = SLOTS < 4 ? 4 / SLOTS : 1; /* units in registers while they come */
    int which, first_tile, first_row, warp, lane, at, end;
    struct fragment<TYPE> next[AHEAD][SLOTS];
    float sum[SLOTS][COLUMNS][4];
};

template <int TYPE, int EPILOGUE, int COLUMNS>
DEVICE void fetch_weights(const struct product &p, int from,
                          struct generated_block<TYPE, EPILOGUE, COLUMNS> *b) {
#pragma unroll
    for (int i = 0; i < b->AHEAD * b->SLOTS; i++) {
        int at = from + i / b->SLOTS, slot = i % b->SLOTS;
        const struct matrix &m = p.matrix[b->which + slot % b->KINDS];
        int tile = b->first_tile + slot / b->KINDS;
        tile = tile < m.n_tiles ? tile : m.n_tiles - 1;
        if (at < b->end)
            matrix_fragment<TYPE>(m, tile, find_pass<TYPE>(p, at), b->lane,
                                  &b->next[i / b->SLOTS][slot]);
    }
}

/* The sums of a warp's segment: the weights are the 16-row operand and the rows the 8-column one,
 * so one row and 64 take the same instructions. */
template <int TYPE, int EPILOGUE, int COLUMNS>
DEVICE void multiply_segment(const struct product &p,
                             struct generated_block<TYPE, EPILOGUE, COLUMNS> *b) {
    constexpr int AHEAD = b->AHEAD, SLOTS = b->SLOTS;
    size_t first = (size_t)(b->first_row + b->lane / 4) * p.input_stride + b->lane % 4 * 8;
    for (; b->at < b->end; b->at += AHEAD) {
        struct fragment<TYPE> now[AHEAD][SLOTS];
#pragma unroll
        for (int i = 0; i < AHEAD * SLOTS; i++)
            now[i / SLOTS][i % SLOTS] = b->next[i / SLOTS][i % SLOTS];
        fetch_weights(p, b->at + AHEAD, b);
#pragma unroll
        for (int ahead = 0; ahead < AHEAD; ahead++) {
            if (b->at + ahead >= b->end)
                break;
            const struct pass pass = find_pass<TYPE>(p, b->at + ahead);
            const uint16_t *input = (pass.low_input ? p.input_low : p.input) + first;
            uint32_t a[SLOTS][2][4];
#pragma unroll
            for (int slot = 0; slot < SLOTS; slot++)
                unpack<TYPE>(now[ahead][slot], a[slot]);
#pragma unroll
            for (int column = 0; column < COLUMNS; column++) {
                uint4 x = load16(input + (size_t)column * 8 * p.input_stride + pass.unit * UNIT);
                uint32_t low[2] = {x.x, x.y}, high[2] = {x.z, x.w};
#pragma unroll
                for (int slot = 0; slot < SLOTS; slot++) {
                    mma_bf16(b->sum[slot][column], a[slot][0], low);
                    mma_bf16(b->sum[slot][column], a[slot][1], high);
                }
            }
        }
    }
}

/* Adds the segments of one of the block's tiles, and finishes its outputs. */
template <int TYPE, int EPILOGUE, int COLUMNS>
DEVICE void finish_tile(const struct product &p,
                        const struct generated_block<TYPE, EPILOGUE, COLUMNS> &b, int tile,
                        int n_rows, float *sums) {
    int n_segments = (int)blockDim.x / WARP, stride = b.ROWS * SUM_STRIDE;
#pragma unroll
    for (int i = 0; i < b.KINDS * COLUMNS * 4; i++) { /* element i % 4: row 2 quad + i % 2 */
        int kind = i / (COLUMNS * 4), column = i / 4 % COLUMNS;
        int row = column * 8 + b.lane % 4 * 2 + i % 2, output = b.lane / 4 + i % 4 / 2 * 8;
        sums[(kind * n_segments + b.warp) * stride + row * SUM_STRIDE + output] =
            b.sum[tile * b.KINDS + kind][column][i % 4];
    }
    __syncthreads();
    for (int i = (int)threadIdx.x * 2; i < b.ROWS * TILE; i += (int)blockDim.x * 2) {
        int row = i / TILE, output = (b.first_tile + tile) * TILE + i % TILE;
        float value[2][2] = {};
        for (int j = 0; j < 2 * b.KINDS; j++) {
            const float *from = sums + j / 2 * n_segments * stride + row * SUM_STRIDE;
            value[j / 2][j % 2] = tree_sum(from + i % TILE + j % 2, n_segments, stride);
        }
        if (b.first_row + row < n_rows)
            finish<EPILOGUE>(p, b.which, b.first_row + row, output, value[0], value[1]);
    }
    __syncthreads();
}

/* out (row, output) = sum over k of input (row, k) * matrix (output, k), rows [0, n_generated).
 * Grid: (blocks of tiles, blocks of 8 * COLUMNS rows); a warp per segment of K. Shared: (kinds,
 * segments, 8 * COLUMNS rows, SUM_STRIDE) floats. Bound by memory. */
template <int TYPE, int EPILOGUE, int COLUMNS>
__global__ void __launch_bounds__(THREADS) generated_product_kernel(const struct product p) {
    DYNAMIC_SHARED(float, sums);
    struct generated_block<TYPE, EPILOGUE, COLUMNS> b;
    b.first_tile = find_tile<EPILOGUE>(p, (int)blockIdx.x, b.TILES, &b.which);
    b.first_row = (int)blockIdx.y * b.ROWS;
    b.warp = (int)threadIdx.x / WARP;
    b.lane = (int)threadIdx.x % WARP;
    const struct segments &segments = p.matrix[b.which].segments;
    b.at = segments.unit[b.warp] * count_passes<TYPE>(p);
    b.end = segments.unit[b.warp + 1] * count_passes<TYPE>(p);
#pragma unroll
    for (int i = 0; i < b.SLOTS * COLUMNS * 4; i++)
        b.sum[i / 4 / COLUMNS][i / 4 % COLUMNS][i % 4] = 0.0f;
    fetch_weights(p, b.at, &b); /* they do not depend on the kernel before */
    grid_wait();
    grid_launch_dependents();
    int n_rows = *p.n_generated - p.n_before;
    if (b.first_row >= n_rows)
        return;
    multiply_segment(p, &b);
#pragma unroll
    for (int tile = 0; tile < b.TILES; tile++)
        finish_tile(p, b, tile, n_rows, sums);
}

static inline size_t generated_product_shared(int kinds, int n_segments, int columns) {
    return sizeof(float) * (size_t)(kinds * n_segments * 8 * columns * SUM_STRIDE);
}

/* ---- prompts ---- */

enum {
    STAGE_ROWS = ROW_TILE * UNIT * 2,                    /* bytes of the rows of a stage */
    STAGE_SLOTS = OUTPUT_TILE / TILE,                    /* its tiles of weights */
    STAGE_BYTES = STAGE_ROWS + STAGE_SLOTS * PART_BYTES, /* scales fit where bf16 would be */
    PROMPT_SHARED = STAGES * STAGE_BYTES
};

/* Which matrix and tile stands in slot (0 to 7) of a block. SILU: a warp's four are two tiles of
 * gate and the same two of up, so that it has both sums of an output. */
template <int EPILOGUE> DEVICE int slot_tile(int first_tile, int slot, int *kind) {
    *kind = EPILOGUE == SILU ? slot % 4 / 2 : 0;
    return first_tile + (EPILOGUE == SILU ? slot / 4 * 2 + slot % 2 : slot);
}

/* Starts the copies of one unit of a block's rows and weights into a stage. Rows are 64 bytes side
 * by side: a fragment is 16 of them, and eight lanes read 128 bytes in a row. */
template <int TYPE, int EPILOGUE>
DEVICE void load_stage(const struct product &p, int which, int first_tile, int first_row, int at,
                       uint8_t *stage) {
    const struct pass pass = find_pass<TYPE>(p, at);
    const uint16_t *input = (pass.low_input ? p.input_low : p.input) + pass.unit * UNIT;
    for (int i = (int)threadIdx.x; i < ROW_TILE * 4; i += THREADS) {
        int row = first_row + i / 4, last = p.first_row + p.n_rows - 1;
        const uint16_t *from = input + (size_t)(row < last ? row : last) * p.input_stride;
        copy_async16(stage + i * 16, from + i % 4 * 8, row <= last);
    }
    constexpr int A_SLOT = TYPE == PACKED_Q8 ? 34 : TYPE == PACKED_Q4 ? 18 : 64; /* with scales */
    stage += STAGE_ROWS;
    for (int i = (int)threadIdx.x; i < STAGE_SLOTS * A_SLOT; i += THREADS) {
        int slot = i / A_SLOT, byte = i % A_SLOT * 16, kind;
        int tile = slot_tile<EPILOGUE>(first_tile, slot, &kind);
        const struct matrix &m = p.matrix[which + kind];
        int type = TYPE == PACKED_MIXED ? m.type : TYPE, bytes = (int)packed_bytes(type);
        size_t index = (size_t)(tile < m.n_tiles ? tile : 0) * m.n_units + pass.unit;
        const uint8_t *from = m.packed + index * bytes + pass.low_weight * PART_BYTES + byte;
        if (has_scales(type) && byte >= bytes)
            from = m.scales + index * SCALE_BYTES + (byte - bytes) % SCALE_BYTES;
        bool there = tile < m.n_tiles && (type == PACKED_F32 || !pass.low_weight);
        copy_async16(stage + slot * PART_BYTES + byte, there ? from : m.packed, there);
    }
    copy_async_commit();
}

/* sum (4 x 16 rows, 4 x 2 x 8 outputs) += one unit of a warp's rows and slots. */
template <int TYPE>
DEVICE void multiply_stage(const uint8_t *stage, const int types[2], int warp, int lane,
                           float sum[4][8][4]) {
    const uint8_t *rows = stage + (warp / 2 * WARP_ROWS + lane / 4) * 64 + lane % 4 * 16;
    const uint8_t *weights = stage + STAGE_ROWS + warp % 2 * 4 * PART_BYTES;
    uint32_t x[4][2][4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint4 upper = load16(rows + i * 16 * 64), lower = load16(rows + (i * 16 + 8) * 64);
        const uint32_t both[2][4] = {{upper.x, lower.x, upper.y, lower.y},
                                     {upper.z, lower.z, upper.w, lower.w}};
#pragma unroll
        for (int j = 0; j < 8; j++)
            x[i][j / 4][j % 4] = both[j / 4][j % 4];
    }
#pragma unroll
    for (int slot = 0; slot < 4; slot++) {
        struct fragment<TYPE> f;
        uint32_t w[2][4];
        const uint8_t *numbers = weights + slot * PART_BYTES;
        int type = TYPE == PACKED_MIXED ? types[slot / 2] : TYPE;
        load_fragment<TYPE, false>(numbers, numbers + packed_bytes(type), type, lane, &f);
        unpack<TYPE>(f, w);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint32_t low[2] = {w[half][0], w[half][2]}, high[2] = {w[half][1], w[half][3]};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                mma_bf16(sum[i][slot * 2], x[i][half], low);
                mma_bf16(sum[i][slot * 2 + 1], x[i][half], high);
            }
        }
    }
}

/* out (row, output) = sum over k, in order, of rows [first_row, first_row + n_rows). Grid: row
 * tiles x blocks of outputs, in bands. 8 warps: 4 along the rows, 2 along the outputs. The rows are
 * the 16-row operand. Shared: STAGES x 24 KB. Bound by the tensor cores. */
template <int TYPE, int EPILOGUE>
__global__ void __launch_bounds__(THREADS, 1)
    prompt_product_kernel(const struct product p, int n_blocks) {
    DYNAMIC_SHARED(uint8_t, stages);
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;
    int n_row_tiles = (p.n_rows + ROW_TILE - 1) / ROW_TILE, in_band = ROW_BAND * n_blocks;
    int first = (int)blockIdx.x / in_band * ROW_BAND, at = (int)blockIdx.x % in_band;
    int height = n_row_tiles - first < ROW_BAND ? n_row_tiles - first : ROW_BAND;
    int first_row = p.first_row + (first + at % height) * ROW_TILE, which;
    int first_tile =
        find_tile<EPILOGUE>(p, at / height, STAGE_SLOTS / (EPILOGUE == SILU ? 2 : 1), &which);
    int end_row = p.first_row + p.n_rows;
    int n = p.matrix[which].n_units * count_passes<TYPE>(p); /* stages to come */
    const int types[2] = {p.matrix[which].type, p.matrix[which + (EPILOGUE == SILU)].type};
    float sum[4][8][4] = {};
    grid_wait();
    grid_launch_dependents();
    for (int i = 0; i < STAGES - 1; i++)
        if (i < n)
            load_stage<TYPE, EPILOGUE>(p, which, first_tile, first_row, i,
                                       stages + i * STAGE_BYTES);
        else
            copy_async_commit();
    /* act(i, j, c, row, output): sum[i][j][c] and [c + 1] are those of a row and two outputs */
    auto for_pairs = [&](auto act) {
#pragma unroll
        for (int pair = 0; pair < 4 * 8 * 2; pair++) {
            int i = pair / 16, j = pair / 2 % 8, kind;
            int tile = slot_tile<EPILOGUE>(first_tile, warp % 2 * 4 + j / 2, &kind);
            int row = first_row + warp / 2 * WARP_ROWS + i * 16 + lane / 4 + pair % 2 * 8;
            int output = tile * TILE + j % 2 * 8 + lane % 4 * 2;
            if (row < end_row && kind == 0)
                act(i, j, pair % 2 * 2, row, output);
        }
    };
    if (p.initial)
        for_pairs([&](int i, int j, int c, int row, int output) {
            for (int k = 0; k < 2; k++)
                if (output + k < p.matrix[which].n_outputs)
                    sum[i][j][c + k] = p.initial[(size_t)row * p.out_stride + output + k];
        });
    for (int i = 0; i < n; i++) {
        copy_async_wait<STAGES - 2>();
        __syncthreads(); /* the stage has arrived for all, and all are done with the oldest */
        int ahead = i + STAGES - 1;
        if (ahead < n)
            load_stage<TYPE, EPILOGUE>(p, which, first_tile, first_row, ahead,
                                       stages + ahead % STAGES * STAGE_BYTES);
        else
            copy_async_commit(); /* an empty group: the count of younger ones stays right */
        multiply_stage<TYPE>(stages + i % STAGES * STAGE_BYTES, types, warp, lane, sum);
    }
    for_pairs([&](int i, int j, int c, int row, int output) {
        finish<EPILOGUE>(p, which, row, output, &sum[i][j][c], &sum[i][(j + 4) % 8][c]);
    });
}
#endif /* PRODUCT_CUH */
