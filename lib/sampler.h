/* sampler.h: draws the next token from logits.
 *
 * What is drawn is defined at `sample` in dynamo.h: temperature, then top_k, top_p and min_p, then
 * the largest scaled logit + Gumbel noise. The noise of a token is a function of the seed, the
 * position and the token alone, so a draw does not depend on the batch, the machine or other draws.
 *
 *     float scaled[N_VOCAB];
 *     int list[N_VOCAB];
 *     struct sampling sampling = {.temperature = 0.8f, .top_p = 0.95f, .seed = 1};
 *     int token = sampler_draw(&sampling, position, logits, N_VOCAB, scaled, list);
 *
 * It keeps no state and allocates nothing. Logits that are no number count as the least one. */
#ifndef SAMPLER_H
#define SAMPLER_H
#include "../dynamo.h"

/* Philox4x32-10 (Salmon et al. 2011): 4 random words of a counter and a key, in its place. */
void philox(uint32_t counter[4], uint32_t key0, uint32_t key1);

/* The token for `position`, of logits (n). scaled (n) and list (n) are overwritten. */
int sampler_draw(const struct sampling *sampling, int position, const float *logits, int n,
                 float *scaled, int *list);
#endif /* SAMPLER_H */
#ifdef SAMPLER_IMPLEMENTATION
#undef SAMPLER_IMPLEMENTATION
#include <float.h>
#include <math.h>

#include "simd.h"

void philox(uint32_t counter[4], uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; round++) {
        uint64_t first = (uint64_t)counter[0] * 0xD2511F53u;
        uint64_t second = (uint64_t)counter[2] * 0xCD9E8D57u;
        counter[0] = (uint32_t)(second >> 32) ^ counter[1] ^ key0;
        counter[1] = (uint32_t)second;
        counter[2] = (uint32_t)(first >> 32) ^ counter[3] ^ key1;
        counter[3] = (uint32_t)first;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}

static double sampler_uniform(uint64_t seed, int position, int token) { /* in (0, 1) */
    uint32_t counter[4] = {(uint32_t)position, (uint32_t)token, 0, 0};
    philox(counter, (uint32_t)seed, (uint32_t)(seed >> 32));
    return ((double)counter[0] + 0.5) * 0x1p-32;
}

/* scaled = logits / temperature, all finite: NaN becomes the least number. Returns the largest. */
static float sampler_temper(const float *logits, float *scaled, int n, float temperature) {
    float divisor = temperature > 0.0f ? temperature : 1.0f;
    const vec zero = {0}, low = zero - FLT_MAX, high = zero + FLT_MAX;
    vec largest = low;
    for (int i = 0; i < n; i += LANES) {
        vec value = max_vec(load_part(logits + i, n - i) / divisor, low);
        value = select_vec(value < high, value, high);
        store_part(scaled + i, value, n - i);
        if (n - i >= LANES)
            largest = max_vec(value, largest);
    }
    float max = max_lanes(largest);
    for (int i = n / LANES * LANES; i < n; i++)
        max = scaled[i] > max ? scaled[i] : max;
    return max;
}

static bool sampler_before(const float *scaled, int a, int b) { /* the order of candidates */
    return scaled[a] > scaled[b] || (scaled[a] == scaled[b] && a < b);
}

static void sampler_sift_down(const float *scaled, int *heap, int count, int at) {
    for (int child = 2 * at + 1; child < count; child = 2 * at + 1) {
        if (child + 1 < count && sampler_before(scaled, heap[child + 1], heap[child]))
            child++;
        if (!sampler_before(scaled, heap[child], heap[at]))
            return;
        int token = heap[at];
        heap[at] = heap[child];
        heap[child] = token;
        at = child;
    }
}

static double sampler_weight_of(float scaled,
                                float max) { /* e^(scaled - max), the same everywhere */
    return (double)exp_vec((vec){0} + (scaled - max))[0];
}

static double sampler_sum_of_weights(const float *scaled, int n, float max) {
    vec sum = {0};
    for (int i = 0; i < n; i += LANES) {
        vec value = exp_vec(load_part(scaled + i, n - i) - max);
        if (n - i < LANES)
            for (int lane = n - i; lane < LANES; lane++)
                value[lane] = 0.0f;
        sum += value;
    }
    return (double)sum_lanes(sum);
}

/* Leaves what top_k and top_p keep at the end of `list` (n): largest last. Returns how many. The
 * heap shrinks from the front as the kept ones are popped to the back. */
static int sampler_keep_top(const struct sampling *sampling, const float *scaled, float max,
                            int *list, int n) {
    bool by_count = sampling->top_k > 0 && sampling->top_k < n;
    double total = sampler_sum_of_weights(scaled, n, max);
    /* tokens this improbable make up less than what top_p leaves out, all together */
    double share = 0.5 * (1.0 - (double)sampling->top_p) * total / n;
    float least = by_count || !(share > 0.0) ? -FLT_MAX : max + (float)log(share);
    int count = 0;
    for (int i = 0; i < n; i++) {
        list[count] = i;
        count += scaled[i] >= least;
    }
    if (count == 0) /* no logit is a number */
        list[count++] = 0;
    for (int i = count / 2 - 1; i >= 0; i--)
        sampler_sift_down(scaled, list, count, i);
    int limit = by_count && sampling->top_k < count ? sampling->top_k : count, kept = 0;
    double sum = 0.0;
    while (kept < limit && (by_count || kept == 0 || sum < (double)sampling->top_p * total)) {
        int token = list[0];
        list[0] = list[count - 1 - kept];
        list[count - 1 - kept++] = token;
        sampler_sift_down(scaled, list, count - kept, 0);
        sum += sampler_weight_of(scaled[token], max);
    }
    if (by_count && sampling->top_p < 1.0f) { /* of these, by their share of their own sum */
        double enough = (double)sampling->top_p * sum;
        sum = 0.0;
        for (limit = kept, kept = 0; kept < limit && (kept == 0 || sum < enough); kept++)
            sum += sampler_weight_of(scaled[list[count - 1 - kept]], max);
    }
    memmove(list, list + count - kept, sizeof *list * (size_t)kept);
    return kept;
}

/* The largest scaled + g of `n` tokens (of the list, or all). -log(u) >= 1 - u rules out most
 * without a logarithm: token wins only if -log(u) < e^(scaled - best). */
static int sampler_race(const struct sampling *sampling, int position, const float *scaled,
                        float max, const int *list, int n) {
    double least = sampling->min_p > 0.0f ? (double)max + log((double)sampling->min_p) : -INFINITY;
    double best = -INFINITY, scale = INFINITY; /* scale: e^(max - best), a bit more */
    int winner = list ? list[n - 1] : 0;
    for (int i = 0; i < n; i++) {
        int token = list ? list[i] : i;
        if ((double)scaled[token] < least)
            continue;
        double u = sampler_uniform(sampling->seed, position, token);
        if (1.0 - u > sampler_weight_of(scaled[token], max) * scale)
            continue;
        double value = (double)scaled[token] - log(-log(u));
        if (value > best || (value == best && token < winner)) {
            best = value;
            winner = token;
            scale = exp((double)max - best) * 1.001 + 1e-300;
        }
    }
    return winner;
}

int sampler_draw(const struct sampling *sampling, int position, const float *logits, int n,
                 float *scaled, int *list) {
    float max = sampler_temper(logits, scaled, n, sampling->temperature);
    if (!(sampling->temperature > 0.0f)) {
        int token = 0;
        while (token < n - 1 && scaled[token] != max)
            token++;
        return token;
    }
    const int *kept = NULL;
    if ((sampling->top_k > 0 && sampling->top_k < n) || sampling->top_p < 1.0f) {
        n = sampler_keep_top(sampling, scaled, max, list, n);
        kept = list;
    }
    return sampler_race(sampling, position, scaled, max, kept, n);
}
#endif /* SAMPLER_IMPLEMENTATION */
