/* attention.h: softmax(q . k) . v of some queries over the paged keys and values of one head.
 *
 * Tokens are taken 64 at a time, in order from token 0, with a running softmax (Milakov and
 * Gimelshein 2018, and FlashAttention, Dao et al. 2022). Nothing is gathered: a block keeps its
 * keys as [head_dim][16 tokens] and its values as [16 tokens][head_dim], so that the lanes of a
 * vector are tokens in the one product and elements of the output in the other.
 *
 *     struct kv_view view = {.type = KV_F32, .dim = 64, .kv = kv, .block_elements = n,
 *                            .key = offset, .value = offset, .table = blocks};
 *     append_write(&view, position, 1, k, v, dim);     // append.h: each token once
 *     ... scratch.query (n, ATTENTION_STRIDE), times 1 / sqrt(dim) ...
 *     attention_rows(&view, n, position, &scratch);    // position[n] ascend
 *     ... scratch.output (n, ATTENTION_STRIDE) ...
 *
 * Invariant: what a query sees does not depend on its neighbours: each score is one chain over dim,
 * each output one chain over tokens, and a chunk's tokens beyond a query's own have the weight 0.
 * Rows of a block that were never written may hold anything. It knows nothing of threads. */
#ifndef ATTENTION_H
#define ATTENTION_H
#include "dynamo.h"
#include "lib/simd.h"
#include <stdalign.h>

enum {
    QUERIES = 48, /* queries of a call at most */
    CHUNK = 64,   /* tokens whose scores are computed at a time */
    CHUNK_BLOCKS = CHUNK / BLOCK_TOKENS,
    MAX_HEAD_DIM = 256, /* sizes the scratch of a thread */
    ATTENTION_ROWS = 6, /* queries that one call of a kernel computes: 24 registers of sums */
    ATTENTION_STRIDE = MAX_HEAD_DIM + LANES /* not 2^n, which would alias in the L1 cache */
};

struct kv_view { /* the keys and values of one sequence, layer and head */
    enum kv_type type;
    int dim;
    void *kv;
    size_t block_elements, key, value; /* of a block; where the head's planes begin in it */
    size_t next_key;                   /* where the keys lie that will be read after these */
    const int *table;                  /* (blocks of the sequence) slots */
};

struct softmax { /* of one query, over the tokens seen so far */
    float max;
    vec sum; /* lane by lane; lanes are added at the end */
};

struct attention_scratch {
    alignas(64) float query[QUERIES * ATTENTION_STRIDE];
    alignas(64) float output[QUERIES * ATTENTION_STRIDE];
    alignas(64) float scores[QUERIES * CHUNK];
    struct softmax state[QUERIES];
};

void attention_rows(const struct kv_view *view, int n, const int *position,
                    struct attention_scratch *scratch);
#endif /* ATTENTION_H */
#ifdef ATTENTION_IMPLEMENTATION
#undef ATTENTION_IMPLEMENTATION
#include <math.h>

struct chunk { /* the blocks of up to 64 tokens, and what is made of them */
    const char *key[CHUNK_BLOCKS], *value[CHUNK_BLOCKS], *next_key[CHUNK_BLOCKS];
    bool ahead;            /* the planes come from memory: ask for those that are read next */
    int dim, n_tokens, at; /* at: first of the output elements */
    const float *input;    /* queries, or weights of tokens */
    float *output;         /* scores, or outputs */
};

INLINE vec kv_load(enum kv_type type, const char *plane, size_t at) {
    return type == KV_F32 ? load((const float *)(const void *)plane + at)
                          : widen_bf16((const uint16_t *)(const void *)plane + at);
}

/* Asks for a line of the plane that is read next, while the same line of this one is used. */
INLINE void fetch_line(enum kv_type type, const char *plane, size_t at) {
    __builtin_prefetch(plane + at * kv_element_bytes(type));
}

static vec kv_load_part(enum kv_type type, const char *plane, size_t at, int n) {
    float values[LANES] = {0};
    uint16_t halves[LANES] = {0};
    if (type == KV_F32) {
        memcpy(values, plane + at * sizeof *values, sizeof *values * (size_t)n);
        return load(values);
    }
    memcpy(halves, plane + at * sizeof *halves, sizeof *halves * (size_t)n);
    return widen_bf16(halves);
}

/* scores[row][64] = query[row] . key[token]: 16 tokens a vector */
INLINE void score_kernel(enum kv_type type, int n_rows, const struct chunk *chunk) {
    vec sum[ATTENTION_ROWS][CHUNK_BLOCKS];
#pragma GCC unroll 6
    for (int row = 0; row < n_rows; row++)
        for (int i = 0; i < CHUNK_BLOCKS; i++)
            sum[row][i] = (vec){0};
    for (size_t d = 0; d < (size_t)chunk->dim; d++) {
        vec keys[CHUNK_BLOCKS];
        for (int i = 0; i < CHUNK_BLOCKS; i++)
            keys[i] = kv_load(type, chunk->key[i], d * BLOCK_TOKENS);
        for (int i = 0; i < CHUNK_BLOCKS && chunk->ahead; i++)
            fetch_line(type, chunk->value[i], d * BLOCK_TOKENS);
        for (int row = 0; row < n_rows; row++) {
            float factor = chunk->input[(size_t)row * ATTENTION_STRIDE + d];
            for (int i = 0; i < CHUNK_BLOCKS; i++)
                sum[row][i] += factor * keys[i];
        }
    }
    for (int row = 0; row < n_rows; row++)
        for (int i = 0; i < CHUNK_BLOCKS; i++)
            store(chunk->output + row * CHUNK + i * LANES, sum[row][i]);
}

/* output[row][at + 16 * n_vectors] += weight[row][token] * value[token] */
INLINE void value_kernel(enum kv_type type, int n_rows, int n_vectors, const struct chunk *chunk) {
    vec sum[ATTENTION_ROWS][4];
#pragma GCC unroll 6
    for (int row = 0; row < n_rows; row++)
        for (int i = 0; i < n_vectors; i++)
            sum[row][i] = load(chunk->output + row * ATTENTION_STRIDE + chunk->at + i * LANES);
    int left = chunk->dim - chunk->at;
    for (int token = 0; token < chunk->n_tokens; token++) {
        const char *plane = chunk->value[token / BLOCK_TOKENS];
        size_t at = (size_t)(token % BLOCK_TOKENS * chunk->dim + chunk->at);
        vec values[4];
        for (int i = 0; i < n_vectors; i++)
            values[i] = n_vectors > 1 || left >= LANES
                            ? kv_load(type, plane, at + (size_t)i * LANES)
                            : kv_load_part(type, plane, at, left);
        for (int i = 0; i < n_vectors && chunk->ahead; i++)
            fetch_line(type, chunk->next_key[token / BLOCK_TOKENS], at + (size_t)i * LANES);
        for (int row = 0; row < n_rows; row++) {
            float factor = chunk->input[row * CHUNK + token];
            for (int i = 0; i < n_vectors; i++)
                sum[row][i] += factor * values[i];
        }
    }
    for (int row = 0; row < n_rows; row++)
        for (int i = 0; i < n_vectors; i++)
            store(chunk->output + row * ATTENTION_STRIDE + chunk->at + i * LANES, sum[row][i]);
}

#define ATTENTION_KERNEL(type, rows)                                                               \
    static void score_##type##_##rows(const struct chunk *chunk) {                                 \
        score_kernel(KV_##type, rows, chunk);                                                      \
    }                                                                                              \
    static void value_##type##_##rows(const struct chunk *chunk) {                                 \
        if (chunk->dim - chunk->at >= 4 * LANES)                                                   \
            value_kernel(KV_##type, rows, 4, chunk);                                               \
        else                                                                                       \
            value_kernel(KV_##type, rows, 1, chunk);                                               \
    }
#define ATTENTION_KERNELS(type)                                                                    \
    ATTENTION_KERNEL(type, 1)                                                                      \
    ATTENTION_KERNEL(type, 2)                                                                      \
    ATTENTION_KERNEL(type, 3)                                                                      \
    ATTENTION_KERNEL(type, 4)                                                                      \
    ATTENTION_KERNEL(type, 5)                                                                      \
    ATTENTION_KERNEL(type, 6)
#define ATTENTION_TABLE(kernel, type)                                                              \
    {                                                                                              \
        kernel##_##type##_1, kernel##_##type##_2, kernel##_##type##_3, kernel##_##type##_4,        \
            kernel##_##type##_5, kernel##_##type##_6                                               \
    }

ATTENTION_KERNELS(F32)
ATTENTION_KERNELS(BF16)

typedef void attention_kernel(const struct chunk *chunk);
static attention_kernel *const score_kernels[][ATTENTION_ROWS] = {
    [KV_F32] = ATTENTION_TABLE(score, F32), [KV_BF16] = ATTENTION_TABLE(score, BF16)};
static attention_kernel *const value_kernels[][ATTENTION_ROWS] = {
    [KV_F32] = ATTENTION_TABLE(value, F32), [KV_BF16] = ATTENTION_TABLE(value, BF16)};

/* scores (64) become exp(score - max) of the first `visible` of them, and 0. A larger maximum than
 * before scales what is there of the output, which is padded to whole vectors. */
static void softmax_chunk(float *scores, int visible, struct softmax *state, float *output,
                          int padded) {
    const ivec count = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const vec zero = {0}, none = zero - INFINITY;
    vec value[CHUNK / LANES], largest = none;
    for (int i = 0; i < CHUNK / LANES; i++) {
        value[i] = select_vec(count + i * LANES < visible, load(scores + i * LANES), none);
        largest = max_vec(value[i], largest);
    }
    float max = max_lanes(largest);
    if (max > state->max) {
        vec scale = exp_vec(zero + (state->max - max));
        state->max = max;
        state->sum *= scale;
        for (int at = 0; at < padded; at += LANES)
            store(output + at, load(output + at) * scale);
    }
    for (int i = 0; i < CHUNK / LANES; i++) {
        vec part = exp_vec(value[i] - state->max);
        store(scores + i * LANES, part);
        state->sum += part;
    }
}

/* Where the planes at `offset` of a chunk's blocks begin. A chunk that the text does not fill has
 * its last block several times; what it gives there has the weight 0. */
static void find_planes(const struct kv_view *view, int start, int end, size_t offset,
                        const char *plane[CHUNK_BLOCKS]) {
    int last = (end - 1) / BLOCK_TOKENS;
    for (int i = 0; i < CHUNK_BLOCKS; i++) {
        int block = start / BLOCK_TOKENS + i < last ? start / BLOCK_TOKENS + i : last;
        size_t at = (size_t)view->table[block] * view->block_elements + offset;
        plane[i] = (const char *)view->kv + at * kv_element_bytes(view->type);
    }
}

/* Adds a chunk, which begins at token `start`, to queries [first, n): those that see of it. */
static void attention_chunk(const struct kv_view *view, struct chunk *chunk, int start, int first,
                            int n, const int *position, struct attention_scratch *scratch) {
    int padded = (view->dim + LANES - 1) / LANES * LANES, n_tokens = chunk->n_tokens;
    for (int rows; first < n; first += rows) {
        rows = n - first < ATTENTION_ROWS ? n - first : ATTENTION_ROWS;
        float *scores = scratch->scores + first * CHUNK;
        float *output = scratch->output + first * ATTENTION_STRIDE;
        chunk->input = scratch->query + first * ATTENTION_STRIDE;
        chunk->output = scores;
        score_kernels[view->type][rows - 1](chunk);
        for (int i = 0; i < rows; i++) {
            softmax_chunk(scores + i * CHUNK, position[first + i] - start + 1,
                          &scratch->state[first + i], output + i * ATTENTION_STRIDE, padded);
        }
        int seen = position[first + rows - 1] - start + 1; /* by the last of them */
        chunk->n_tokens = seen < n_tokens ? seen : n_tokens;
        chunk->input = scores;
        chunk->output = output;
        for (chunk->at = 0; chunk->at < view->dim;
             chunk->at += view->dim - chunk->at >= 4 * LANES ? 4 * LANES : LANES)
            value_kernels[view->type][rows - 1](chunk);
        chunk->ahead = false; /* the next queries find them in a cache */
    }
}

void attention_rows(const struct kv_view *view, int n, const int *position,
                    struct attention_scratch *scratch) {
    int padded = (view->dim + LANES - 1) / LANES * LANES, end = position[n - 1] + 1, first = 0;
    for (int i = 0; i < n; i++) {
        scratch->state[i] = (struct softmax){.max = -INFINITY};
        memset(scratch->output + i * ATTENTION_STRIDE, 0, sizeof(float) * (size_t)padded);
    }
    for (int start = 0; start < end; start += CHUNK) {
        int next = start + CHUNK, left = end - start;
        struct chunk chunk = {.dim = view->dim, .n_tokens = left < CHUNK ? left : CHUNK};
        chunk.ahead = true;
        find_planes(view, start, end, view->key, chunk.key);
        find_planes(view, start, end, view->value, chunk.value);
        if (next < end)
            find_planes(view, next, end, view->key, chunk.next_key);
        else
            find_planes(view, 0, end, view->next_key, chunk.next_key);
        while (position[first] < start)
            first++;
        attention_chunk(view, &chunk, start, first, n, position, scratch);
    }
    for (int i = 0; i < n; i++) {
        float sum = sum_lanes(scratch->state[i].sum);
        float *output = scratch->output + i * ATTENTION_STRIDE;
        for (int at = 0; at < padded; at += LANES)
            store(output + at, (load(output + at) + 0.0f) / sum); /* + 0: never -0 */
    }
}
#endif /* ATTENTION_IMPLEMENTATION */
