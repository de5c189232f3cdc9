/* append.h: new keys and values on their way into the blocks: turned by their positions (RoPE, Su
 * et al. 2021), and written where attention.h reads them.
 *
 *     append_angles(turn, config, frequency, position);   // turn (2 * rope_dim), once a row
 *     append_turn(head, turn, config);                    // for each head of q and k
 *     append_write(&view, position, n, k, v, stride);     // n rows of one head, in one block
 *
 * A block keeps keys as [head_dim][16 tokens]: sixteen rows are transposed in registers, and fewer
 * are written one by one. Invariant: what is written for a row depends on that row alone. */
#ifndef APPEND_H
#define APPEND_H
#include "attention.h"

/* turn: for each element its cosine, then for each element its sine, with the sign it is added. */
void append_angles(float *turn, const struct model_config *config, const float *frequency,
                   int position);
void append_turn(float *head, const float *turn, const struct model_config *config);
/* Rows k and v (n, stride) of tokens [position, position + n), which are all in one block. */
void append_write(const struct kv_view *view, int position, int n, const float *k, const float *v,
                  size_t stride);
#endif /* APPEND_H */
#ifdef APPEND_IMPLEMENTATION
#undef APPEND_IMPLEMENTATION
#include <math.h>

void append_angles(float *turn, const struct model_config *config, const float *frequency,
                   int position) {
    int n = config->rope_dim / 2, step = config->rope_adjacent ? 2 : 1;
    int partner = config->rope_adjacent ? 1 : n;
    for (int i = 0; i < n; i++) {
        double angle = (double)position * (double)frequency[i];
        float *cosine = turn + i * step, *sine = cosine + config->rope_dim;
        cosine[0] = cosine[partner] = (float)cos(angle);
        sine[partner] = (float)sin(angle);
        sine[0] = -sine[partner];
    }
}

/* Pairs (a, b) become (a cos - b sin, b cos + a sin). */
void append_turn(float *head, const float *turn, const struct model_config *config) {
    int dim = config->rope_dim, n = dim / 2;
    const float *sine = turn + dim;
    for (int i = 0; i < dim && config->rope_adjacent; i += LANES) {
        vec own = load_part(head + i, dim - i);
        vec other =
            __builtin_shufflevector(own, own, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
        own = own * load_part(turn + i, dim - i) + other * load_part(sine + i, dim - i);
        store_part(head + i, own, dim - i);
    }
    for (int i = 0; i < n && !config->rope_adjacent; i += LANES) {
        vec a = load_part(head + i, n - i), b = load_part(head + n + i, n - i);
        vec cosine = load_part(turn + i, n - i);
        store_part(head + i, a * cosine + b * load_part(sine + i, n - i), n - i);
        store_part(head + n + i, b * cosine + a * load_part(sine + n + i, n - i), n - i);
    }
}

static void append_store(enum kv_type type, char *to, vec value, int count) {
    if (type == KV_F32) {
        store_part((float *)(void *)to, value, count);
        return;
    }
    half_vec halves = narrow_bf16((ivec)value);
    memcpy(to, &halves, sizeof(uint16_t) * (size_t)(count < LANES ? count : LANES));
}

/* One row's keys: an element goes into each line of the plane. */
static void append_key(enum kv_type type, char *key, const float *k, int dim) {
    for (size_t i = 0; i < (size_t)dim; i++)
        if (type == KV_F32)
            ((float *)(void *)key)[i * BLOCK_TOKENS] = k[i];
        else
            ((uint16_t *)(void *)key)[i * BLOCK_TOKENS] = to_bf16(k[i]);
}

/* A block's keys, 16 elements at a time. */
static void append_keys(enum kv_type type, char *key, const float *k, size_t stride, int dim) {
    for (int at = 0; at < dim; at += LANES) {
        vec rows[LANES];
        for (int row = 0; row < LANES; row++)
            rows[row] = load_part(k + (size_t)row * stride + at, dim - at);
        transpose(rows);
        for (int i = 0; i < LANES && i < dim - at; i++)
            append_store(type, key + (size_t)(at + i) * LANES * kv_element_bytes(type), rows[i],
                         LANES);
    }
}

void append_write(const struct kv_view *view, int position, int n, const float *k, const float *v,
                  size_t stride) {
    size_t element = kv_element_bytes(view->type), token = (size_t)(position % BLOCK_TOKENS);
    char *block = (char *)view->kv +
                  (size_t)view->table[position / BLOCK_TOKENS] * view->block_elements * element;
    char *key = block + (view->key + token) * element;
    char *value = block + (view->value + token * (size_t)view->dim) * element;
    if (n == BLOCK_TOKENS)
        append_keys(view->type, key, k, stride, view->dim);
    for (int row = 0; row < n; row++) {
        if (n < BLOCK_TOKENS)
            append_key(view->type, key + (size_t)row * element, k + (size_t)row * stride,
                       view->dim);
        for (int at = 0; at < view->dim; at += LANES)
            append_store(view->type, value + (size_t)(row * view->dim + at) * element,
                         load(v + (size_t)row * stride + at), view->dim - at);
    }
}
#endif /* APPEND_IMPLEMENTATION */
