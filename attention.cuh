/* attention.cuh: softmax(q . k) . v over paged keys and values. The twin of attention.h.
 *
 * A *query* is one head of one token. The queries of a KV head's group see the same keys, so they
 * are the rows of one matrix, and a warp works on 16 or 32 of them: scores = q . k of two blocks of
 * tokens at a time, with a running softmax (FlashAttention-2, Dao 2023), then weights . v.
 *   prompt_attention      blocks of four warps with up to 128 queries of one sequence share the
 * keys that they copy to shared memory: bound by the tensor cores generated_attention   one query
 * token: its keys are cut into splits of fixed length, each read once, straight into registers, by
 * four warps; whoever ends last adds up the splits, in their order (Flash-Decoding, Dao et al.
 * 2023): by memory What a query gets does not depend on its neighbours: tokens are taken in steps
 * counted from token 0, and those after its own weigh 0.
 *
 * In a block (see block_bytes in dynamo.h) a head's keys are [16 tokens][head_dim], its values
 * [head_dim][16 tokens], bf16: then the k of both products are neighbours in memory. Tokens 4 quad
 * to 4 quad + 3 of a block belong to one lane in the scores, which is just how it needs them as
 * operand of the second product (token_of). HEAD: head_dim padded to 64, 128 or 256. */
#ifndef ATTENTION_CUH
#define ATTENTION_CUH
#include "pack.cuh"
#include "step.cuh"

enum {
    ATTENTION_WARPS = 4,
    STEP_TOKENS = 2 * BLOCK_TOKENS, /* of the running softmax */
    SPLIT_TOKENS = 256 /* short enough that one text fills the chip from 4k tokens on */
};

struct attention {
    const uint16_t *q; /* bf16 (n_rows, n_heads, head_dim) */
    uint16_t *out;     /* bf16 (n_rows, out_stride), heads at `places` */
    const uint16_t *kv;
    size_t block_elements, plane; /* of a block; from a key plane to its value plane */
    int layer, n_heads, n_kv_heads, head_dim, out_stride;
    float scale; /* log2(e) / sqrt(head_dim) */
    struct segments places;
    const struct step_header *step; /* device */
    float *partial; /* (n_splits, n_heads, head_dim + 2): weighted values, largest score, sum */
    int *arrived;   /* (n_sequences, n_kv_heads) splits that are done; 0 between steps */
};

/* Token of a block that is column `column` of score tile `tile` (8 columns each). */
DEVICE int token_of(int tile, int column) {
    return column / 2 * 4 + tile * 2 + column % 2;
}

/* Where the keys of a block begin; its values begin `plane` elements further. */
DEVICE const uint16_t *key_plane(const struct attention &a, const struct sequence &s, int block,
                                 int kv_head) {
    size_t first = (size_t)(a.layer * 2 * a.n_kv_heads + kv_head) * BLOCK_TOKENS * a.head_dim;
    const int *table = array_of<int>(a.step, a.step->table);
    return a.kv + (size_t)table[s.first_block + block] * a.block_elements + first;
}

/* Values of tokens [first, first + 4), without those from `end` on: rows that were never written
 * may hold NaN, which a weight of 0 does not hide. */
DEVICE uint2 values_before(uint2 v, int first, int end) {
    v.x &= first + 1 < end ? 0xffffffffu : first < end ? 0xffffu : 0u;
    v.y &= first + 3 < end ? 0xffffffffu : first + 2 < end ? 0xffffu : 0u;
    return v;
}

/* ---- the running softmax of a warp's 16 rows; a lane has parts of rows group and group + 8 ----
 */

struct softmax {
    float max[2], sum[2]; /* sum: of this lane's tokens */
};

/* scores (2 blocks x 2 tiles) become weights, packed as the operand of the second product; `output`
 * is scaled to the new maximum. visible: tokens of the step that each of the two rows sees. */
template <int HEAD>
DEVICE void softmax_step(float scores[2][2][4], const int visible[2], float scale, int quad,
                         struct softmax *state, float output[HEAD / 8][4], uint32_t weights[2][4]) {
    float factor[2];
#pragma unroll
    for (int row = 0; row < 2; row++) {
        float largest = state->max[row];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float &score = scores[i / 4][i / 2 % 2][row * 2 + i % 2];
            if (i / 4 * BLOCK_TOKENS + quad * 4 + i % 4 >= visible[row])
                score = -INFINITY;
            largest = fmaxf(largest, score);
        }
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
        factor[row] = exp2_approx((state->max[row] - largest) * scale);
        if (largest == -INFINITY) /* it sees no token yet */
            factor[row] = 1.0f;
        state->max[row] = largest;
        state->sum[row] *= factor[row];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float &score = scores[i / 4][i / 2 % 2][row * 2 + i % 2];
            score = score == -INFINITY ? 0.0f : exp2_approx((score - largest) * scale);
            state->sum[row] += score;
        }
    }
    if (__any_sync(0xffffffffu, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
        for (int i = 0; i < HEAD / 8 * 4; i++)
            output[i / 4][i % 4] *= factor[i % 4 / 2];
    }
#pragma unroll
    for (int i = 0; i < 8; i++) { /* register: row i % 2, tile i % 4 / 2 */
        const float *pair = &scores[i / 4][i % 4 / 2][i % 2 * 2];
        weights[i / 4][i % 4] = pack_bf16(pair[0], pair[1]);
    }
}

DEVICE void softmax_end(struct softmax *state) { /* the sums of all lanes of a row */
#pragma unroll
    for (int row = 0; row < 2; row++) {
        state->sum[row] += __shfl_xor_sync(0xffffffffu, state->sum[row], 1);
        state->sum[row] += __shfl_xor_sync(0xffffffffu, state->sum[row], 2);
    }
}

/* ---- prompts ---- */

/* Queries of a block, and steps of keys and values under way: fewer where heads are long. */
static constexpr __host__ __device__ int query_tile(int head) {
    return ATTENTION_WARPS * (head > 128 ? 16 : 32);
}

static constexpr __host__ __device__ int kv_stages(int head) {
    return head > 128 ? 2 : 3;
}

static constexpr size_t prompt_attention_shared(int head) {
    return (size_t)head * 2 * (size_t)(query_tile(head) + kv_stages(head) * 2 * STEP_TOKENS);
}

/* The queries of one block: [first, last] of those of a sequence and KV head, which are numbered
 * token by token, and for each token the heads of the group. */
struct queries {
    struct sequence s;
    int first, last, kv_head, group;
};

DEVICE struct queries find_queries(const struct attention &a, int tile_queries) {
    struct queries q;
    const int2 item = array_of<int2>(a.step, a.step->prompt_items)[blockIdx.x / a.n_kv_heads];
    q.s = array_of<struct sequence>(a.step, a.step->sequences)[item.x];
    q.kv_head = (int)blockIdx.x % a.n_kv_heads;
    q.group = a.n_heads / a.n_kv_heads;
    q.first = item.y;
    int end = q.s.n_rows * q.group;
    q.last = (q.first + tile_queries < end ? q.first + tile_queries : end) - 1;
    return q;
}

/* Rows of 32 elements, unit by unit: a lane's 16 bytes of eight lanes are 128 in a row. */
DEVICE uint8_t *unit_row(uint8_t *tile, int n_rows, int unit, int row) {
    return tile + (size_t)(unit * n_rows + row) * 64;
}

/* Starts the copies of the keys and values of a step (2 blocks) into shared memory: keys by units,
 * values as they lie. What is past the text's end, or past head_dim, is 0. */
template <int HEAD>
DEVICE void load_kv(const struct attention &a, const struct sequence &s, int kv_head, int step,
                    uint8_t *stage) {
    constexpr int KEY_CHUNKS = STEP_TOKENS * HEAD / 8, VALUE_CHUNKS = HEAD * 2 * 2;
    for (int i = (int)threadIdx.x; i < KEY_CHUNKS + VALUE_CHUNKS; i += ATTENTION_WARPS * WARP) {
        bool key = i < KEY_CHUNKS;
        int at = key ? i : i - KEY_CHUNKS;
        int row = at / 4 % STEP_TOKENS, dim = at / 4 / STEP_TOKENS * UNIT + at % 4 * 8;
        int block = step * 2 + (key ? row / BLOCK_TOKENS : at / (HEAD * 2));
        int offset = row % BLOCK_TOKENS * a.head_dim + dim;
        if (!key) {
            dim = at / 2 % HEAD;
            offset = dim * BLOCK_TOKENS + at % 2 * 8;
        }
        bool there = block < s.n_blocks && dim < a.head_dim;
        const uint16_t *from = key_plane(a, s, there ? block : 0, kv_head);
        from += there ? offset + (key ? 0 : (int)a.plane) : 0;
        copy_async16(stage + i * 16, from, there);
    }
    copy_async_commit();
}

/* scores of 16 queries and the 32 tokens of a step, of which `keys` begin the stage. */
template <int HEAD>
DEVICE void stage_scores(const uint8_t *queries, const uint8_t *keys, int n_queries, int lane,
                         float scores[2][2][4]) {
#pragma unroll 2
    for (int unit = 0; unit < HEAD / UNIT; unit++) { /* 2: more would not fit the registers */
        const uint8_t *from = queries + (unit * n_queries + lane / 4) * 64 + lane % 4 * 16;
        uint4 upper = load16(from), lower = load16(from + 8 * 64);
        const uint32_t first[4] = {upper.x, lower.x, upper.y, lower.y};
        const uint32_t second[4] = {upper.z, lower.z, upper.w, lower.w};
#pragma unroll
        for (int i = 0; i < 4; i++) { /* block i / 2, tile i % 2 */
            int token = i / 2 * BLOCK_TOKENS + token_of(i % 2, lane / 4);
            uint4 key = load16(keys + (unit * STEP_TOKENS + token) * 64 + lane % 4 * 16);
            const uint32_t low[2] = {key.x, key.y}, high[2] = {key.z, key.w};
            mma_bf16(scores[i / 2][i % 2], first, low);
            mma_bf16(scores[i / 2][i % 2], second, high);
        }
    }
}

/* Starts the copies of the queries, unit by unit; those past the last, and past head_dim, are 0. */
template <int HEAD>
DEVICE void load_queries(const struct attention &a, const struct queries &q, uint8_t *tile) {
    constexpr int N = query_tile(HEAD);
    for (int i = (int)threadIdx.x; i < N * HEAD / 8; i += ATTENTION_WARPS * WARP) {
        int query = q.first + i / 4 % N, dim = i / 4 / N * UNIT + i % 4 * 8;
        bool there = dim < a.head_dim && query <= q.last;
        query = there ? query : q.first;
        size_t row = (size_t)(q.s.first_row + query / q.group) * a.n_heads;
        row += q.kv_head * q.group + query % q.group;
        copy_async16(tile + i * 16, a.q + row * a.head_dim + (there ? dim : 0), there);
    }
}

/* output (16 queries from `first`) += weights . values of a step; tokens from `end` on are none. */
template <int HEAD, int ROW_TILES>
DEVICE void stage_values(const uint8_t *values, int lane, int end,
                         const uint32_t weights[ROW_TILES][2][4],
                         float output[ROW_TILES][HEAD / 8][4]) {
    values += lane / 4 * 32 + lane % 4 * 8;
#pragma unroll
    for (int n = 0; n < 2 * HEAD / 8; n++) { /* block n % 2, 8 elements of the output */
        uint2 v = load8(values + (n % 2 * HEAD + n / 2 * 8) * 32);
        if (end < STEP_TOKENS)
            v = values_before(v, n % 2 * BLOCK_TOKENS + lane % 4 * 4, end);
        const uint32_t b[2] = {v.x, v.y};
#pragma unroll
        for (int i = 0; i < ROW_TILES; i++)
            mma_bf16(output[i][n / 2], weights[i][n % 2], b);
    }
}

/* Writes 16 queries from `first` on, divided by the sums of their weights. */
template <int HEAD>
DEVICE void store_queries(const struct attention &a, const struct queries &q, int first, int lane,
                          struct softmax *state, const float output[HEAD / 8][4]) {
    softmax_end(state);
#pragma unroll
    for (int row = 0; row < 2; row++) {
        int query = first + row * 8 + lane / 4;
        if (query > q.last)
            continue;
        int head = q.kv_head * q.group + query % q.group;
        uint16_t *out = a.out + (size_t)(q.s.first_row + query / q.group) * a.out_stride +
                        place(a.places, head * a.head_dim) + lane % 4 * 2;
        float factor = 1.0f / state->sum[row];
#pragma unroll
        for (int n = 0; n < HEAD / 8; n++)
            if (n * 8 < a.head_dim)
                *reinterpret_cast<uint32_t *>(out + n * 8) =
                    pack_bf16(output[n][row * 2] * factor, output[n][row * 2 + 1] * factor);
    }
}

/* out = softmax(q . k) . v for rows of prompts. Grid: items x KV heads, long texts first; a block
 * has query_tile(HEAD) queries, a warp 16 or 32 of them. Shared: the queries, and kv_stages(HEAD)
 * steps of keys and values. Bound by the tensor cores. */
template <int HEAD>
__global__ void __launch_bounds__(ATTENTION_WARPS *WARP)
    prompt_attention_kernel(const struct attention a) {
    constexpr int N = query_tile(HEAD), ROW_TILES = N / ATTENTION_WARPS / 16;
    constexpr int STAGES_AHEAD = kv_stages(HEAD) - 1, STAGE = 2 * STEP_TOKENS * HEAD * 2;
    DYNAMIC_SHARED(uint8_t, shared);
    uint8_t *stages = shared + N * HEAD * 2;
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;
    grid_wait();
    grid_launch_dependents();
    const struct queries q = find_queries(a, N);
    int n_steps = (q.s.start + q.last / q.group) / STEP_TOKENS + 1;
    load_queries<HEAD>(a, q, shared); /* of one group with the first step */
    for (int i = 0; i < STAGES_AHEAD; i++)
        if (i < n_steps)
            load_kv<HEAD>(a, q.s, q.kv_head, i, stages + i * STAGE);
        else
            copy_async_commit();
    float output[ROW_TILES][HEAD / 8][4] = {};
    struct softmax state[ROW_TILES];
    int position[ROW_TILES][2], first = warp * ROW_TILES * 16;
#pragma unroll
    for (int i = 0; i < ROW_TILES * 2; i++) {
        int query = q.first + first + i / 2 * 16 + i % 2 * 8 + lane / 4;
        position[i / 2][i % 2] = q.s.start + (query < q.last ? query : q.last) / q.group;
        state[i / 2].max[i % 2] = -INFINITY;
        state[i / 2].sum[i % 2] = 0.0f;
    }
    for (int step = 0; step < n_steps; step++) {
        copy_async_wait<STAGES_AHEAD - 1>();
        __syncthreads(); /* the step has arrived for all, and all are done with the oldest */
        int ahead = step + STAGES_AHEAD, begin = step * STEP_TOKENS;
        if (ahead < n_steps)
            load_kv<HEAD>(a, q.s, q.kv_head, ahead, stages + ahead % (STAGES_AHEAD + 1) * STAGE);
        else
            copy_async_commit(); /* an empty group: the count of younger ones stays right */
        const uint8_t *keys = stages + step % (STAGES_AHEAD + 1) * STAGE;
        uint32_t weights[ROW_TILES][2][4];
#pragma unroll
        for (int i = 0; i < ROW_TILES; i++) {
            float scores[2][2][4] = {};
            const int visible[2] = {position[i][0] - begin + 1, position[i][1] - begin + 1};
            stage_scores<HEAD>(shared + (first + i * 16) * 64, keys, N, lane, scores);
            softmax_step<HEAD>(scores, visible, a.scale, lane % 4, &state[i], output[i],
                               weights[i]);
        }
        stage_values<HEAD, ROW_TILES>(keys + STAGE / 2, lane, q.s.start + q.s.n_rows - begin,
                                      weights, output);
    }
#pragma unroll
    for (int i = 0; i < ROW_TILES; i++)
        store_queries<HEAD>(a, q, q.first + first + i * 16, lane, &state[i], output[i]);
}

/* ---- generated tokens ---- */

static constexpr size_t generated_attention_shared(int head) {
    return sizeof(float) * (ATTENTION_WARPS * 16 * (size_t)(head + 2) + 4);
}

/* The part of one block: a split, a KV head, and up to 16 heads of its group. */
struct split {
    struct sequence s;
    int kv_head, first_head, n_heads; /* n_heads: 1 to 16 */
    int index, n_tokens;              /* of the split, of the text */
    int item, chunk, n_sequence;      /* its place in the list, in the group; the sequence's */
};

DEVICE struct split find_split(const struct attention &a, int index, int n_chunks) {
    struct split p;
    int group = a.n_heads / a.n_kv_heads;
    p.chunk = index % n_chunks;
    p.kv_head = index / n_chunks % a.n_kv_heads;
    p.item = index / n_chunks / a.n_kv_heads;
    const int2 item = array_of<int2>(a.step, a.step->splits)[p.item];
    p.n_sequence = item.x;
    p.s = array_of<struct sequence>(a.step, a.step->sequences)[item.x];
    p.first_head = p.kv_head * group + p.chunk * 16;
    p.n_heads = group - p.chunk * 16 < 16 ? group - p.chunk * 16 : 16;
    p.index = item.y;
    p.n_tokens = p.s.start + 1;
    return p;
}

/* The operand of 16 heads, straight from memory. */
template <int HEAD>
DEVICE void load_heads(const struct attention &a, const struct split &p, int lane,
                       uint32_t q[HEAD / UNIT][2][4]) {
    const uint16_t *from = a.q + ((size_t)p.s.first_row * a.n_heads + p.first_head) * a.head_dim;
#pragma unroll
    for (int i = 0; i < HEAD / UNIT * 2; i++) { /* unit i / 2; head group, or group + 8 */
        int dim = i / 2 * UNIT + lane % 4 * 8, head = lane / 4 + i % 2 * 8;
        uint4 x = make_uint4(0, 0, 0, 0);
        if (head < p.n_heads && dim < a.head_dim)
            x = load16(from + head * a.head_dim + dim);
        q[i / 2][0][i % 2] = x.x;
        q[i / 2][0][i % 2 + 2] = x.y;
        q[i / 2][1][i % 2] = x.z;
        q[i / 2][1][i % 2 + 2] = x.w;
    }
}

/* One warp's part of a split: blocks [block, end). */
template <int HEAD>
DEVICE void attend_blocks(const struct attention &a, const struct split &p,
                          const uint32_t q[HEAD / UNIT][2][4], int block, int end, int lane,
                          struct softmax *state, float output[HEAD / 8][4]) {
    for (; block < end; block += 2) {
        float scores[2][2][4] = {};
        const uint16_t *plane[2] = {
            key_plane(a, p.s, block, p.kv_head),
            key_plane(a, p.s, block + 1 < end ? block + 1 : block, p.kv_head)};
        uint32_t weights[2][4];
#pragma unroll
        for (int i = 0; i < 4 * HEAD / UNIT; i++) { /* block and tile of unit i / 4 */
            int dim = i / 4 * UNIT + lane % 4 * 8, block_of = i / 2 % 2, tile = i % 2;
            const uint16_t *key = plane[block_of] + token_of(tile, lane / 4) * a.head_dim;
            uint4 k = dim < a.head_dim ? load16(key + dim) : make_uint4(0, 0, 0, 0);
            const uint32_t low[2] = {k.x, k.y}, high[2] = {k.z, k.w};
            mma_bf16(scores[block_of][tile], q[i / 4][0], low);
            mma_bf16(scores[block_of][tile], q[i / 4][1], high);
        }
        int seen = p.n_tokens - block * BLOCK_TOKENS;
        if (block + 1 >= end && seen > BLOCK_TOKENS)
            seen = BLOCK_TOKENS; /* the second block is the first once more, and weighs 0 */
        const int visible[2] = {seen, seen};
        softmax_step<HEAD>(scores, visible, a.scale, lane % 4, state, output, weights);
        __syncwarp(); /* moves no load across: keys and values would not both fit the registers */
#pragma unroll
        for (int n = 0; n < 2 * HEAD / 8; n++) {
            int dim = n / 2 * 8 + lane / 4, token = lane % 4 * 4;
            uint2 v = make_uint2(0, 0);
            if (dim < a.head_dim)
                v = load8(plane[n % 2] + a.plane + dim * BLOCK_TOKENS + token);
            if (seen < STEP_TOKENS)
                v = values_before(v, n % 2 * BLOCK_TOKENS + token, seen);
            const uint32_t b[2] = {v.x, v.y};
            mma_bf16(output[n / 2], weights[n % 2], b);
        }
    }
}

/* A warp's sums for 16 heads into shared memory: (head, head_dim values, largest score, sum). */
template <int HEAD>
DEVICE void store_part(const struct attention &a, const struct softmax &state, int lane,
                       const float output[HEAD / 8][4], float *parts) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float *to = parts + (lane / 4 + i * 8) * (a.head_dim + 2);
#pragma unroll
        for (int n = 0; n < HEAD / 8; n++)
            if (n * 8 < a.head_dim) {
                to[n * 8 + lane % 4 * 2] = output[n][i * 2];
                to[n * 8 + lane % 4 * 2 + 1] = output[n][i * 2 + 1];
            }
        if (lane % 4 == 0) {
            to[a.head_dim] = state.max[i];
            to[a.head_dim + 1] = state.sum[i];
        }
    }
}

/* Adds up `n` parts of each head of p, part_stride floats apart, in their order. Where they are all
 * there is, their quotient is the output; else they become one part more, at `to`. */
DEVICE void merge_parts(const struct attention &a, const struct split &p, const float *parts,
                        size_t part_stride, int n, float *to) {
    int width = a.head_dim + 2;
    for (int i = (int)threadIdx.x; i < p.n_heads * a.head_dim; i += ATTENTION_WARPS * WARP) {
        int head = i / a.head_dim, dim = i % a.head_dim;
        const float *own = parts + head * width;
        float value = 0.0f, sum = 0.0f, largest = -INFINITY;
        for (int j = 0; j < n; j++)
            largest = fmaxf(largest, own[j * part_stride + a.head_dim]);
        for (int j = 0; j < n; j++) {
            const float *part = own + j * part_stride;
            if (part[a.head_dim] == -INFINITY) /* it saw nothing */
                continue;
            float factor = exp2_approx((part[a.head_dim] - largest) * a.scale);
            value += part[dim] * factor;
            sum += part[a.head_dim + 1] * factor;
        }
        if (to) {
            to[head * width + dim] = value;
            if (dim == 0) {
                to[head * width + a.head_dim] = largest;
                to[head * width + a.head_dim + 1] = sum;
            }
        } else {
            uint16_t *out = a.out + (size_t)p.s.first_row * a.out_stride;
            out[place(a.places, (p.first_head + head) * a.head_dim) + dim] =
                (uint16_t)pack_bf16(value / sum, 0.0f);
        }
    }
}

/* True in all threads of the block that is the last of `n` to arrive; it then sees what the others
 * wrote before. The counter is 0 again afterwards. */
DEVICE bool arrive(int *counter, int n, int *shared) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        *shared = atomicAdd(counter, 1) == n - 1;
        if (*shared)
            *counter = 0;
    }
    __syncthreads();
    __threadfence();
    return *shared;
}

/* out = softmax(q . k) . v for generated tokens: blocks go through the list of splits, KV heads and
 * groups of 16 heads, so a grid of fixed size serves any batch. Shared: the parts of the warps, and
 * an int. Bound by reading keys and values. */
template <int HEAD>
__global__ void __launch_bounds__(ATTENTION_WARPS *WARP, HEAD > 128 ? 1 : 2)
    generated_attention_kernel(const struct attention a) {
    DYNAMIC_SHARED(float, parts);
    constexpr int A_WARP = SPLIT_TOKENS / BLOCK_TOKENS / ATTENTION_WARPS;
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP, width = a.head_dim + 2;
    int n_chunks = (a.n_heads / a.n_kv_heads + 15) / 16;
    grid_wait();
    grid_launch_dependents();
    int n = a.step->n_splits * a.n_kv_heads * n_chunks;
    for (int index = (int)blockIdx.x; index < n; index += (int)gridDim.x) {
        const struct split p = find_split(a, index, n_chunks);
        uint32_t q[HEAD / UNIT][2][4];
        load_heads<HEAD>(a, p, lane, q);
        int n_blocks = (p.n_tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
        int block = p.index * A_WARP * ATTENTION_WARPS + warp * A_WARP;
        int end = block + A_WARP < n_blocks ? block + A_WARP : n_blocks;
        float output[HEAD / 8][4] = {};
        struct softmax state = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
        attend_blocks<HEAD>(a, p, q, block, end, lane, &state, output);
        softmax_end(&state);
        store_part<HEAD>(a, state, lane, output, parts + warp * 16 * width);
        __syncthreads();
        int n_splits = (p.n_tokens + SPLIT_TOKENS - 1) / SPLIT_TOKENS;
        size_t item_stride = (size_t)a.n_heads * width;
        float *partial = a.partial + p.item * item_stride + (size_t)p.first_head * width;
        merge_parts(a, p, parts, 16 * width, ATTENTION_WARPS, n_splits > 1 ? partial : NULL);
        if (n_splits > 1) {
            int *counter = a.arrived + (p.n_sequence * a.n_kv_heads + p.kv_head) * n_chunks;
            int *shared = reinterpret_cast<int *>(parts + ATTENTION_WARPS * 16 * (HEAD + 2));
            if (arrive(counter + p.chunk, n_splits, shared)) /* splits are neighbours */
                merge_parts(a, p, partial - p.index * item_stride, item_stride, n_splits, NULL);
        }
        __syncthreads(); /* `parts` is free again */
    }
}
#endif /* ATTENTION_CUH */
