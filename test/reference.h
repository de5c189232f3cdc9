/* reference.h: the transformer in float64, as its papers have it: the specification of every op of
 * both backends, and of whole models.
 *
 * Written to be read beside the forward pass in dynamo.c: nothing is packed, batched, cut into
 * segments or blocks, or made fast. Elements are read from the file's bytes by code of its own, and
 * the random generator is its own too, so that a mistake in the product's is seen.
 *
 *     double *logits = malloc(n * vocab_size * sizeof *logits);
 *     ref_forward(&model, frequency, tokens, n, logits);      // after each of n tokens
 *     int next = ref_sample(&sampling, n, row, vocab_size);   // from one row of them, as float
 *
 * Shapes are (rows, columns), rows one after another. C that is also C++: kernels.cu is tested with
 * it too. Read next: ops.h. */
#ifndef REFERENCE_H
#define REFERENCE_H

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../dynamo.h"

static inline void *ref_allocate(size_t n, size_t bytes) { /* zeros; tests go no further without */
    void *memory = calloc(n > 0 ? n : 1, bytes);
    if (!memory) {
        printf("no memory for a test\n");
        abort();
    }
    return memory;
}

static inline double *ref_doubles(int rows, int cols) {
    return (double *)ref_allocate((size_t)rows * (size_t)cols, sizeof(double));
}

/* ---- the elements of a tensor, as ggml's documentation of its types says ---- */

static inline int ref_block_elements(enum tensor_type type) {
    bool small = type == TYPE_F32 || type == TYPE_F16 || type == TYPE_BF16;
    return small ? 1 : type == TYPE_Q4_K || type == TYPE_Q6_K ? 256 : 32;
}

static inline int ref_block_bytes(enum tensor_type type) {
    switch (type) {
    case TYPE_F32: return 4;
    case TYPE_F16:
    case TYPE_BF16: return 2;
    case TYPE_Q8_0: return 34;
    case TYPE_Q4_0: return 18;
    case TYPE_Q4_K: return 144;
    case TYPE_Q6_K: return 210;
    case TYPE_MXFP4: return 17;
    }
    return 0;
}

static inline double ref_f16(const uint8_t *bytes) {
    int half = bytes[0] | bytes[1] << 8, exponent = half >> 10 & 31;
    double value =
        exponent ? ldexp(1024 + (half & 0x3ff), exponent - 25) : ldexp(half & 0x3ff, -24);
    return half & 0x8000 ? -value : value;
}

static inline double ref_f32(const uint8_t *bytes, int shift) { /* bf16: the upper half of one */
    uint32_t bits = 0;
    float value;
    memcpy(&bits, bytes, shift ? 2 : 4);
    bits <<= shift;
    memcpy(&value, &bits, sizeof value);
    return (double)value;
}

/* d, m, then for each 32 elements a scale and a least value of 6 bits; those of the last four parts
 * have their upper two bits in the bytes of the first four. */
static inline double ref_q4_k(const uint8_t *block, int k) {
    const uint8_t *packed = block + 4;
    int j = k / 32, scale = packed[j] & 63, least = packed[j + 4] & 63;
    if (j >= 4) {
        scale = (packed[j + 4] & 15) | (packed[j - 4] >> 6) << 4;
        least = packed[j + 4] >> 4 | (packed[j] >> 6) << 4;
    }
    int number = block[16 + k / 64 * 32 + k % 32] >> (k % 64 / 32 * 4) & 15;
    return ref_f16(block) * scale * number - ref_f16(block + 2) * least;
}

/* The lower four bits of all, the upper two of all, then for each 16 elements a scale; d. */
static inline double ref_q6_k(const uint8_t *block, int k) {
    int half = k / 128, quarter = k % 128 / 32, l = k % 32;
    int low = block[half * 64 + quarter % 2 * 32 + l] >> (quarter / 2 * 4) & 15;
    int high = block[128 + half * 32 + l] >> (quarter * 2) & 3;
    return ref_f16(block + 208) * (int8_t)block[192 + k / 16] * ((low | high << 4) - 32);
}

/* A power of two, then the lower four bits of 16 elements beside those of 16 more. */
static inline double ref_mxfp4(const uint8_t *block, int k) {
    static const double numbers[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
    int bits = block[1 + k % 16] >> (k / 16 * 4) & 15;
    return ldexp(bits & 8 ? -numbers[bits & 7] : numbers[bits], block[0] - 127);
}

static inline double ref_element(const struct tensor *tensor, int row, int col) {
    size_t i = (size_t)row * (size_t)tensor->cols + (size_t)col;
    size_t n_k = (size_t)ref_block_elements(tensor->type);
    size_t at = i / n_k * (size_t)ref_block_bytes(tensor->type);
    const uint8_t *block =
        (const uint8_t *)tensor->data + (tensor->period > 0 ? at % tensor->period : at);
    int k = (int)(i % n_k);
    switch (tensor->type) {
    case TYPE_F32: return ref_f32(block, 0);
    case TYPE_BF16: return ref_f32(block, 16);
    case TYPE_F16: return ref_f16(block);
    case TYPE_Q8_0: return ref_f16(block) * (int8_t)block[2 + k];
    case TYPE_Q4_0: return ref_f16(block) * ((block[2 + k % 16] >> (k / 16 * 4) & 15) - 8);
    case TYPE_Q4_K: return ref_q4_k(block, k);
    case TYPE_Q6_K: return ref_q6_k(block, k);
    case TYPE_MXFP4: return ref_mxfp4(block, k);
    }
    return NAN;
}

/* ---- the pieces of a layer ---- */

/* x / sqrt(mean(x^2) + epsilon) * weight (Zhang and Sennrich 2019); out may be x. */
static inline void ref_norm(const double *x, const struct tensor *weight, int n, double epsilon,
                            double *out) {
    double squares = 0.0;
    for (int i = 0; i < n; i++)
        squares += x[i] * x[i];
    for (int i = 0; i < n; i++)
        out[i] = x[i] / sqrt(squares / n + epsilon) * ref_element(weight, 0, i);
}

/* out (n, rows) += matrix . x + bias, for each row of x (n, columns of the matrix); bias may be
 * NULL. Of a matrix, and a bias, of several experts: those of one, of `rows` rows each. */
static inline void ref_expert_product(const struct tensor *matrix, const struct tensor *bias,
                                      int expert, int rows, const double *x, int n, double *out) {
    int cols = (int)matrix->cols;
    double *w = ref_doubles(1, cols);
    for (int output = 0; output < rows; output++) {
        for (int k = 0; k < cols; k++)
            w[k] = ref_element(matrix, expert * rows + output, k);
        for (int i = 0; i < n; i++) {
            double sum = bias ? ref_element(bias, 0, expert * rows + output) : 0.0;
            for (int k = 0; k < cols; k++)
                sum += w[k] * x[(size_t)i * (size_t)cols + (size_t)k];
            out[(size_t)i * (size_t)rows + (size_t)output] += sum;
        }
    }
    free(w);
}

static inline void ref_product(const struct tensor *matrix, const struct tensor *bias,
                               const double *x, int n, double *out) {
    ref_expert_product(matrix, bias, 0, (int)matrix->rows, x, n, out);
}

/* Turns pairs of a head's first rope_dim elements by position * frequency (Su et al. 2021). */
static inline void ref_turn(const struct model_config *config, const float *frequency, int position,
                            double *head) {
    int half = config->rope_dim / 2;
    for (int i = 0; i < half; i++) {
        double *a = config->rope_adjacent ? head + 2 * i : head + i;
        double *b = config->rope_adjacent ? a + 1 : a + half;
        double angle = position * (double)frequency[i];
        double size = config->rope_magnitude > 0 ? (double)config->rope_magnitude : 1.0;
        double turned = (*a * cos(angle) - *b * sin(angle)) * size;
        *b = (*a * sin(angle) + *b * cos(angle)) * size;
        *a = turned;
    }
}

/* A head of q or k, on its way into attention: normed where the model does that, and turned. */
static inline void ref_head(const struct model_config *config, const struct tensor *norm,
                            const float *frequency, int position, double *head) {
    if (norm)
        ref_norm(head, norm, config->head_dim, (double)config->norm_epsilon, head);
    ref_turn(config, frequency, position, head);
}

/* weight (n) = softmax(q . keys * scale), out (dim) = the sum of values by weight (Vaswani et al.
 * 2017). Keys and values of a token are `stride` behind those of the token before. sink: a score
 * more, of a token whose value is 0; -INFINITY: none. */
static inline void ref_attention_with(const double *q, const double *keys, const double *values,
                                      int n, int dim, int stride, double scale, double sink,
                                      double *weight, double *out) {
    double largest = sink, sum = 0.0;
    memset(out, 0, sizeof *out * (size_t)dim);
    for (int t = 0; t < n; t++) {
        weight[t] = 0.0;
        for (int i = 0; i < dim; i++)
            weight[t] += q[i] * keys[(size_t)t * (size_t)stride + (size_t)i] * scale;
        largest = weight[t] > largest ? weight[t] : largest;
    }
    sum = exp(sink - largest);
    for (int t = 0; t < n; t++)
        sum += weight[t] = exp(weight[t] - largest);
    for (int t = 0; t < n; t++) {
        weight[t] /= sum;
        for (int i = 0; i < dim; i++)
            out[i] += weight[t] * values[(size_t)t * (size_t)stride + (size_t)i];
    }
}

static inline void ref_attention(const double *q, const double *keys, const double *values, int n,
                                 int dim, int stride, double *weight, double *out) {
    ref_attention_with(q, keys, values, n, dim, stride, 1 / sqrt(dim), -INFINITY, weight, out);
}

static inline double ref_silu(double x) { /* Hendrycks and Gimpel 2016 */
    return x / (1.0 + exp(-x));
}

static inline double ref_activation(enum gate_function activation, double gate, double up) {
    const double pi = 3.14159265358979323846;
    if (activation == ACTIVATE_GELU) /* by tanh: the same paper */
        return 0.5 * gate * (1 + tanh(sqrt(2 / pi) * (gate + 0.044715 * gate * gate * gate))) * up;
    if (activation == ACTIVATE_SILU)
        return ref_silu(gate) * up;
    gate = gate > 7 ? 7 : gate;
    up = up > 7 ? 7 : up < -7 ? -7 : up;
    return gate / (1.0 + exp(-1.702 * gate)) * (up + 1);
}

/* ---- the model ---- */

/* x (n, d) += parts, normed before if there is a norm. */
static inline void ref_add(const struct model_config *c, const struct tensor *norm, double *parts,
                           int n, double *x) {
    for (int i = 0; i < n && norm; i++)
        ref_norm(parts + i * c->d_model, norm, c->d_model, (double)c->norm_epsilon,
                 parts + i * c->d_model);
    for (int i = 0; i < n * c->d_model; i++)
        x[i] += parts[i];
}

/* x (n, d_model) += attn_output . attention(q, k, v of rmsnorm(x)) */
static inline void ref_attention_layer(const struct model_config *c,
                                       const struct tensor *const *layer, int index,
                                       const float *frequency, int n, double *x) {
    int d = c->d_model, dim = c->head_dim, group = c->n_heads / c->n_kv_heads;
    int q_cols = c->n_heads * dim, kv_cols = c->n_kv_heads * dim, window = model_window(c, index);
    double scale = c->attention_scale > 0 ? (double)c->attention_scale : 1 / sqrt(dim);
    double *h = ref_doubles(n, d), *weight = ref_doubles(1, n), *mixed = ref_doubles(n, q_cols);
    double *q = ref_doubles(n, q_cols), *k = ref_doubles(n, kv_cols), *v = ref_doubles(n, kv_cols);
    double *out = ref_doubles(n, d);
    if (c->theta_windowed > 0 && window < INT32_MAX)
        frequency += c->rope_dim / 2;
    for (int i = 0; i < n; i++)
        ref_norm(x + i * d, layer[ATTN_NORM], d, (double)c->norm_epsilon, h + i * d);
    ref_product(layer[ATTN_Q], layer[Q_BIAS], h, n, q);
    ref_product(layer[ATTN_K], layer[K_BIAS], h, n, k);
    ref_product(layer[ATTN_V], layer[V_BIAS], h, n, v);
    for (int i = 0; i < n; i++) {
        for (int head = 0; head < c->n_heads; head++)
            ref_head(c, layer[ATTN_Q_NORM], frequency, i, q + i * q_cols + head * dim);
        for (int head = 0; head < c->n_kv_heads; head++)
            ref_head(c, layer[ATTN_K_NORM], frequency, i, k + i * kv_cols + head * dim);
    }
    for (int i = 0; i < n; i++) /* a token sees those before it in its window, and itself */
        for (int head = 0; head < c->n_heads; head++) {
            int first = i < window ? 0 : i - window + 1;
            int at = i * q_cols + head * dim, kv = first * kv_cols + head / group * dim;
            double sink = layer[ATTN_SINKS] ? ref_element(layer[ATTN_SINKS], 0, head) : -INFINITY;
            ref_attention_with(q + at, k + kv, v + kv, i + 1 - first, dim, kv_cols, scale, sink,
                               weight, mixed + at);
        }
    ref_product(layer[ATTN_OUTPUT], layer[ATTN_OUTPUT_BIAS], mixed, n, out);
    ref_add(c, layer[ATTN_POST_NORM], out, n, x);
    free(h);
    free(weight);
    free(mixed);
    free(q);
    free(k);
    free(v);
    free(out);
}

/* What a reader may want of the router's choices, each (n_layers, n), or NULL. */
struct ref_choices {
    const int *chosen;  /* (n_layers, n, n_used) experts that are taken, whatever the logits say */
    const bool *turned; /* the first that is not preferred is taken for the last that is */
    double *gap;        /* see ref_choose */
};

/* share (n_experts) of each expert in one row h (d_model), 0 of those that are not taken (Shazeer
 * et al. 2017): of the n_used with the largest logits, or as `chosen` or `turned` say. Returns by
 * how much the least of those that are taken is preferred to the first that is not, as a share of
 * how far logits are apart: less than 0 where others are taken than the logits say. */
static inline double ref_choose(const struct model_config *c, const struct tensor *const *layer,
                                const double *h, const int *chosen, bool turned, double *share) {
    double *logits = ref_doubles(1, c->n_experts), last = INFINITY, next = -INFINITY, sum = 0;
    double most = -INFINITY, least = INFINITY;
    ref_product(layer[ROUTER], layer[ROUTER_BIAS], h, 1, logits);
    for (int e = 0; e < c->n_experts; e++) {
        int before = 0; /* experts that are preferred */
        for (int i = 0; i < c->n_experts; i++)
            before += logits[i] > logits[e] || (logits[i] == logits[e] && i < e);
        before -= turned && before == c->n_used ? 1 : turned && before == c->n_used - 1 ? -1 : 0;
        bool taken = !chosen && before < c->n_used;
        for (int i = 0; i < c->n_used && chosen; i++)
            taken = taken || chosen[i] == e;
        share[e] = taken ? exp(logits[e]) : 0;
        most = fmax(most, logits[e]);
        least = fmin(least, logits[e]);
        last = taken ? fmin(last, logits[e]) : last;
        next = taken ? next : fmax(next, logits[e]);
        sum += c->share_of_all ? exp(logits[e]) : share[e];
    }
    for (int e = 0; e < c->n_experts; e++)
        share[e] /= sum;
    free(logits);
    return (last - next) / (most - least);
}

/* out (d_model) += the experts' outputs of one row h (d_model), by their shares (n_experts). */
static inline void ref_experts(const struct model_config *c, const struct tensor *const *layer,
                               const double *h, const double *share, double *out) {
    double *gate = ref_doubles(1, c->d_ff), *up = ref_doubles(1, c->d_ff);
    double *down = ref_doubles(1, c->d_model);
    for (int e = 0; e < c->n_experts; e++) {
        if (share[e] == 0)
            continue;
        memset(gate, 0, sizeof *gate * (size_t)c->d_ff);
        memset(up, 0, sizeof *up * (size_t)c->d_ff);
        memset(down, 0, sizeof *down * (size_t)c->d_model);
        ref_expert_product(layer[GATE_EXPERTS], layer[GATE_EXPERTS_BIAS], e, c->d_ff, h, 1, gate);
        ref_expert_product(layer[UP_EXPERTS], layer[UP_EXPERTS_BIAS], e, c->d_ff, h, 1, up);
        for (int i = 0; i < c->d_ff; i++)
            up[i] = ref_activation(c->activation, gate[i], up[i]);
        ref_expert_product(layer[DOWN_EXPERTS], layer[DOWN_EXPERTS_BIAS], e, c->d_model, up, 1,
                           down);
        for (int i = 0; i < c->d_model; i++)
            out[i] += share[e] * down[i];
    }
    free(gate);
    free(up);
    free(down);
}

/* x (n, d_model) += ffn_down . (activation(ffn_gate . h) * (ffn_up . h)), h = rmsnorm(x): SwiGLU
 * and its kin (Shazeer 2020); or experts of that form. */
static inline void ref_ffn_layer(const struct model_config *c, const struct tensor *const *layer,
                                 int index, struct ref_choices choices, int n, double *x) {
    int d = c->d_model;
    double *h = ref_doubles(n, d), *gate = ref_doubles(n, c->d_ff), *up = ref_doubles(n, c->d_ff);
    double *out = ref_doubles(n, d);
    for (int i = 0; i < n; i++)
        ref_norm(x + i * d, layer[FFN_NORM], d, (double)c->norm_epsilon, h + i * d);
    if (c->n_experts > 0) {
        double *share = ref_doubles(1, c->n_experts);
        for (int i = 0, at = index * n; i < n; i++, at++) {
            const int *chosen = choices.chosen ? choices.chosen + at * c->n_used : NULL;
            double gap = ref_choose(c, layer, h + i * d, chosen,
                                    choices.turned && choices.turned[at], share);
            ref_experts(c, layer, h + i * d, share, out + i * d);
            if (choices.gap)
                choices.gap[at] = gap;
        }
        free(share);
    } else {
        ref_product(layer[FFN_GATE], layer[FFN_GATE_BIAS], h, n, gate);
        ref_product(layer[FFN_UP], layer[FFN_UP_BIAS], h, n, up);
        for (int i = 0; i < n * c->d_ff; i++)
            up[i] = ref_activation(c->activation, gate[i], up[i]);
        ref_product(layer[FFN_DOWN], layer[FFN_DOWN_BIAS], up, n, out);
    }
    ref_add(c, layer[FFN_POST_NORM], out, n, x);
    free(h);
    free(gate);
    free(up);
    free(out);
}

/* Radians per position of each pair (rope_dim / 2) that rope turns; behind them those of layers
 * with a window. YaRN: Peng et al. 2023. */
static inline void ref_frequencies(const struct model *model, float *frequency) {
    const struct model_config *c = &model->config;
    const struct tensor *divisors = model->layers[0][ROPE_FREQS];
    int n = c->rope_dim / 2;
    for (int i = 0; i < n; i++) {
        double divisor = divisors ? ref_element(divisors, 0, i) : 1.0;
        double own = pow((double)c->rope_theta, -2.0 * i / c->rope_dim) / divisor;
        double scaled = c->rope_scale > 0 ? own / (double)c->rope_scale : own, ramp = 1;
        if (c->yarn_high > 0)
            ramp = (i - (double)c->yarn_low) / ((double)c->yarn_high - (double)c->yarn_low);
        ramp = ramp < 0 ? 0 : ramp > 1 ? 1 : ramp;
        frequency[i] = (float)(scaled * ramp + own * (1 - ramp));
        if (c->theta_windowed > 0)
            frequency[n + i] = (float)pow((double)c->theta_windowed, -2.0 * i / c->rope_dim);
    }
}

/* Logits (n, vocab_size) after each of n tokens; see ref_frequencies. */
static inline void ref_forward_with(const struct model *model, const float *frequency,
                                    const int *tokens, int n, struct ref_choices choices,
                                    double *logits) {
    const struct model_config *c = &model->config;
    const struct tensor *const *own = model->layers[0];
    int d = c->d_model;
    double *x = ref_doubles(n, d);
    for (int i = 0; i < n * d; i++)
        x[i] = ref_element(own[TOKEN_EMBD], tokens[i / d], i % d) *
               (c->embedding_scale > 0 ? (double)c->embedding_scale : 1.0);
    for (int layer = 0; layer < c->n_layers; layer++) {
        ref_attention_layer(c, model->layers[layer], layer, frequency, n, x);
        ref_ffn_layer(c, model->layers[layer], layer, choices, n, x);
    }
    for (int i = 0; i < n; i++)
        ref_norm(x + i * d, own[OUTPUT_NORM], d, (double)c->norm_epsilon, x + i * d);
    memset(logits, 0, sizeof *logits * (size_t)n * (size_t)c->vocab_size);
    ref_product(own[OUTPUT], NULL, x, n, logits);
    free(x);
}

static inline void ref_forward(const struct model *model, const float *frequency, const int *tokens,
                               int n, double *logits) {
    struct ref_choices as_preferred = {NULL, NULL, NULL};
    ref_forward_with(model, frequency, tokens, n, as_preferred, logits);
}

/* ---- sampling ---- */

/* Philox4x32-10 (Salmon et al. 2011): 4 random words of a counter and a key, in its place. */
static inline void ref_philox(uint32_t c[4], uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; round++, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u) {
        uint64_t a = (uint64_t)c[0] * 0xD2511F53u, b = (uint64_t)c[2] * 0xCD9E8D57u;
        uint32_t next[4] = {(uint32_t)(b >> 32) ^ c[1] ^ key0, (uint32_t)b,
                            (uint32_t)(a >> 32) ^ c[3] ^ key1, (uint32_t)a};
        memcpy(c, next, sizeof next);
    }
}

struct ref_choice { /* a token that could be drawn */
    float scaled;   /* logit / temperature */
    int token;
};

static inline int ref_by_rank(const void *a, const void *b) { /* of equals the lower id */
    const struct ref_choice *first = (const struct ref_choice *)a;
    const struct ref_choice *second = (const struct ref_choice *)b;
    return first->scaled > second->scaled   ? -1
           : first->scaled < second->scaled ? 1
                                            : first->token - second->token;
}

static inline double ref_noisy(const struct sampling *sampling, int position,
                               struct ref_choice choice, double max) {
    uint32_t words[4] = {(uint32_t)position, (uint32_t)choice.token, 0, 0};
    ref_philox(words, (uint32_t)sampling->seed, (uint32_t)(sampling->seed >> 32));
    return (double)choice.scaled - max - log(-log(((double)words[0] + 0.5) * 0x1p-32));
}

/* The token for `position`, by the definition in lib/sampler.h: the draw of a full sort, or -1.
 * Sums of weights decide who is among those that reach
 * top_p: `slack` is what they may be off by, in shares of the whole, and *may whether with such
 * sums `token` could be drawn too. */
static inline int ref_sample_within(const struct sampling *sampling, int position,
                                    const float *logits, int n, double slack, int token,
                                    bool *may) {
    struct ref_choice *order = (struct ref_choice *)ref_allocate((size_t)n, sizeof *order);
    int kept = sampling->top_k > 0 && sampling->top_k < n ? sampling->top_k : n;
    float divisor = sampling->temperature, largest_logit = -INFINITY;
    *may = false;
    for (int i = 0; i < n && largest_logit == largest_logit; i++)
        largest_logit = logits[i] <= largest_logit ? largest_logit : logits[i]; /* or NaN */
    if (!(fabsf(largest_logit) <= FLT_MAX)) {
        free(order);
        return -1;
    }
    for (bool again = true; again; divisor = 1.0f) { /* again: the largest overflows */
        for (int i = 0; i < n; i++) {
            order[i].scaled = logits[i] / (divisor >= FLT_MIN ? divisor : 1.0f);
            order[i].token = i;
        }
        qsort(order, (size_t)n, sizeof *order, ref_by_rank);
        bool largest = divisor < FLT_MIN || fabsf(order[0].scaled) > FLT_MAX;
        kept = largest ? 1 : kept;
        again = largest && divisor != 1.0f;
    }
    double max = (double)order[0].scaled, total = 0.0, before = 0.0;
    for (int i = 0; i < kept; i++)
        total += exp((double)order[i].scaled - max);
    double least = sampling->min_p > 0.0f ? max + log((double)sampling->min_p) : -INFINITY;
    double enough = sampling->top_p < 1.0f ? (double)sampling->top_p * total : INFINITY;
    double best = -INFINITY, best_sure = -INFINITY, value_of_token = -INFINITY;
    int winner = order[0].token, winner_sure = n;
    for (int i = 0; i < kept && (i == 0 || before < enough + slack * total); i++) {
        bool within = i == 0 || before < enough, sure = i == 0 || before < enough - slack * total;
        before += exp((double)order[i].scaled - max);
        if ((double)order[i].scaled < least)
            continue;
        double value = ref_noisy(sampling, position, order[i], max);
        int id = order[i].token;
        if (id == token)
            value_of_token = value;
        if (within && (value > best || (value == best && id < winner))) {
            best = value;
            winner = id;
        }
        if (sure && (value > best_sure || (value == best_sure && id < winner_sure))) {
            best_sure = value;
            winner_sure = id;
        }
    }
    free(order);
    *may =
        value_of_token > best_sure - 1e-10 && (value_of_token != best_sure || token <= winner_sure);
    return winner;
}

static inline int ref_sample(const struct sampling *sampling, int position, const float *logits,
                             int n) {
    bool may;
    return ref_sample_within(sampling, position, logits, n, 0.0, -1, &may);
}
#endif /* REFERENCE_H */
