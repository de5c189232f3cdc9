/* sampler.h: draws the next token from logits, on the CPU or on a GPU.
 *
 * What is drawn. Logits are divided by the temperature; those that are no number count as the least
 * one. Kept are the top_k largest (ties: lower ids), of these the smallest set whose share of them
 * reaches top_p, of these the ones of at least min_p times the largest probability; of these the
 * largest logit + g wins (ties: lower ids), g = -log(-log(u)), u from a counter-based generator
 * keyed by (seed, position of the new token, token id). Temperature 0: the largest logit wins.
 * So a draw does not depend on the batch, the machine or other draws. The two implementations
 * differ only where rounding decides which tokens reach top_p, or which of two equals is larger.
 *
 *     #define SAMPLER_IMPLEMENTATION                // in C
 *     float scaled[N_VOCAB];
 *     int list[N_VOCAB];
 *     struct sampling sampling = {.temperature = 0.8f, .top_p = 0.95f, .seed = 1};
 *     int token = sampler_draw(&sampling, position, logits, N_VOCAB, scaled, list);
 *
 *     #define SAMPLER_GPU_IMPLEMENTATION            // in CUDA, by one block of a kernel
 *     int token = sampler_draw_block(sampling, position, logits, n_vocab, keys, shared);
 *
 * Both keep no state and allocate nothing. */
#ifndef SAMPLER_H
#define SAMPLER_H
#include <stdbool.h>
#include <stdint.h>

#ifdef __CUDACC__ /* also on a GPU */
#define SAMPLER_INLINE static inline __host__ __device__
#else
#define SAMPLER_INLINE static inline
#endif

struct sampling {
    float temperature, top_p, min_p; /* top_p 1, min_p 0: off */
    int top_k;                       /* 0: off */
    uint64_t seed;
};

/* Whether top_k leaves any of n tokens out. */
SAMPLER_INLINE bool sampler_counts(const struct sampling *sampling, int n) {
    return sampling->top_k > 0 && sampling->top_k < n;
}

/* The token for `position`, of logits (n). scaled (n) and list (n) are overwritten. */
int sampler_draw(const struct sampling *sampling, int position, const float *logits, int n,
                 float *scaled, int *list);

/* Philox4x32-10 (Salmon et al. 2011): 4 random words of a counter and a key, in its place. */
SAMPLER_INLINE void philox(uint32_t counter[4], uint32_t key0, uint32_t key1) {
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

SAMPLER_INLINE double sampler_uniform(uint64_t seed, int position, int token) { /* in (0, 1) */
    uint32_t counter[4] = {(uint32_t)position, (uint32_t)token, 0, 0};
    philox(counter, (uint32_t)seed, (uint32_t)(seed >> 32));
    return ((double)counter[0] + 0.5) * 0x1p-32;
}
#endif /* SAMPLER_H */
#ifdef SAMPLER_IMPLEMENTATION
#undef SAMPLER_IMPLEMENTATION
#include <float.h>
#include <math.h>
#include <string.h>

#include "simd.h"

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

/* e^(scaled - max), the same on every machine */
static double sampler_weight_of(float scaled, float max) {
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
    bool by_count = sampler_counts(sampling, n);
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
        limit = kept;
        for (kept = 0; kept < limit && (kept == 0 || sum < enough); kept++)
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
    if (sampler_counts(sampling, n) || sampling->top_p < 1.0f) {
        n = sampler_keep_top(sampling, scaled, max, list, n);
        kept = list;
    }
    return sampler_race(sampling, position, scaled, max, kept, n);
}
#endif /* SAMPLER_IMPLEMENTATION */
#ifdef SAMPLER_GPU_IMPLEMENTATION
#undef SAMPLER_GPU_IMPLEMENTATION
#include <float.h>

#include "gpu.h"

/* Tokens are in order by a *key* of 64 bits, the larger the sooner: the logit in an
 * order-preserving form, then the complement of the id, so that no two are alike. Which keys top_k
 * and top_p keep is then one question, asked twice: which is the largest key such that the tokens
 * from it on count, or weigh, at least so much? `find_key` answers it by its 8 bits digits, the
 * highest first, with a histogram for each. Weights are whole numbers of 2^-40: their sums do not
 * depend on the order of additions. Before, tokens so improbable that top_p cannot keep them are
 * left out, which leaves few. */
typedef unsigned long long sampler_key; /* 64 bits, as the atomic functions call them */

enum {
    SAMPLER_THREADS = 512,
    SAMPLER_DIGITS = 256,
    SAMPLER_SHARED = (SAMPLER_DIGITS + 2) * 8 /* bytes: sums, and two words more */
};

struct draw { /* one block's work; all threads have the same */
    const float *logits;
    sampler_key *keys, *shared; /* (n_keys), room for n_vocab; SAMPLER_SHARED bytes */
    int n_vocab, n_keys;
    float temperature, max; /* of the largest logit / temperature */
};

/* Logits that are no number count as the least one. */
DEVICE float scaled_logit(const struct draw &d, int token) {
    float value = d.logits[token] / d.temperature;
    return fminf(fmaxf(value, -FLT_MAX), FLT_MAX); /* fmaxf(NaN, x) is x */
}

DEVICE sampler_key make_key(float scaled, int token) {
    uint32_t bits = __float_as_uint(scaled);
    bits ^= bits >> 31 ? 0xffffffffu : 0x80000000u;
    return (sampler_key)bits << 32 | (uint32_t)~token;
}

DEVICE int token_of_key(sampler_key key) {
    return (int)~(uint32_t)key;
}

DEVICE float scaled_of_key(sampler_key key) {
    uint32_t bits = (uint32_t)(key >> 32);
    return __uint_as_float(bits >> 31 ? bits ^ 0x80000000u : ~bits);
}

DEVICE sampler_key weight_of(const struct draw &d, float scaled) { /* in units of 2^-40 */
    return (sampler_key)(expf(scaled - d.max) * 1099511627776.0f);
}

/* The largest of all threads' values, in every thread. */
DEVICE sampler_key block_max(sampler_key value, sampler_key *shared) {
    __syncthreads();
    if (threadIdx.x == 0)
        shared[0] = 0;
    __syncthreads();
    atomicMax(&shared[0], value);
    __syncthreads();
    return shared[0];
}

/* Their sum, in every thread. */
DEVICE sampler_key block_sum(sampler_key value, sampler_key *shared) {
    for (int step = 16; step > 0; step /= 2)
        value += __shfl_xor_sync(0xffffffffu, value, step);
    __syncthreads();
    if (threadIdx.x == 0)
        shared[0] = 0;
    __syncthreads();
    if (threadIdx.x % 32 == 0)
        atomicAdd(&shared[0], value);
    __syncthreads();
    return shared[0];
}

/* Adds to the histogram of the digit at `shift`: keys that have the digits before it of `prefix`.
 * A thread adds up what is of one digit before it adds to the histogram: the first digits of most
 * keys are alike, and all threads would wait for one sum. */
DEVICE void count_digits(const struct draw &d, sampler_key least, sampler_key prefix, int shift,
                         bool by_weight) {
    sampler_key sum = 0;
    int digit = 0;
    for (int i = (int)threadIdx.x; i < d.n_keys; i += SAMPLER_THREADS) {
        sampler_key key = d.keys[i];
        if (key < least || (shift < 56 && key >> (shift + 8) != prefix >> (shift + 8)))
            continue;
        int own = (int)(key >> shift & (SAMPLER_DIGITS - 1));
        if (own != digit && sum > 0) {
            atomicAdd(&d.shared[digit], sum);
            sum = 0;
        }
        digit = own;
        sum += by_weight ? weight_of(d, scaled_of_key(key)) : 1;
    }
    if (sum > 0)
        atomicAdd(&d.shared[digit], sum);
}

/* The largest key of which the keys from it on, down to `least` at most, are `amount` together: in
 * number, or by weight. Shared: a histogram of one digit, the digit found, what is still wanted. */
DEVICE sampler_key find_key(const struct draw &d, sampler_key least, sampler_key amount,
                            bool by_weight) {
    sampler_key prefix = 0, *digit = d.shared + SAMPLER_DIGITS, *wanted = digit + 1;
    for (int shift = 56; shift >= 0; shift -= 8) {
        __syncthreads();
        for (int i = (int)threadIdx.x; i < SAMPLER_DIGITS; i += SAMPLER_THREADS)
            d.shared[i] = 0;
        __syncthreads();
        count_digits(d, least, prefix, shift, by_weight);
        __syncthreads();
        if (threadIdx.x == 0) {
            int i = SAMPLER_DIGITS - 1;
            for (; i > 0 && d.shared[i] < amount; i--)
                amount -= d.shared[i];
            *digit = (sampler_key)i;
            *wanted = amount;
        }
        __syncthreads();
        prefix |= *digit << shift;
        amount = *wanted;
    }
    return prefix;
}

/* Lists the tokens that top_k and top_p may keep, as keys. `total`: the weight of all tokens. */
DEVICE void list_keys(struct draw *d, const struct sampling &sampling, sampler_key total) {
    bool by_count = sampler_counts(&sampling, d->n_vocab);
    /* all tokens this improbable together are less than what top_p leaves out */
    float share = 0.5f * (1.0f - sampling.top_p) * (float)total / (float)d->n_vocab;
    sampler_key cut = by_count || !(share >= 1.0f) ? 0 : (sampler_key)share;
    sampler_key *count = d->shared;
    __syncthreads();
    if (threadIdx.x == 0)
        *count = 0;
    __syncthreads();
    for (int first = 0; first < d->n_vocab; first += SAMPLER_THREADS) {
        int token = first + (int)threadIdx.x, lane = (int)threadIdx.x % 32;
        float scaled = token < d->n_vocab ? scaled_logit(*d, token) : 0.0f;
        bool kept = token < d->n_vocab && (cut == 0 || weight_of(*d, scaled) >= cut);
        unsigned warp = __ballot_sync(0xffffffffu, kept);
        sampler_key at = lane == 0 ? atomicAdd(count, (sampler_key)__popc(warp)) : 0;
        at = __shfl_sync(0xffffffffu, at, 0) + __popc(warp & ((1u << lane) - 1));
        if (kept)
            d->keys[at] = make_key(scaled, token);
    }
    __syncthreads();
    d->n_keys = (int)*count;
    __syncthreads();
}

/* The least key that top_k and top_p keep. */
DEVICE sampler_key least_kept(const struct draw &d, const struct sampling &sampling,
                              sampler_key total) {
    sampler_key least = 0, weight = 0;
    if (sampler_counts(&sampling, d.n_vocab)) {
        least = find_key(d, 0, (sampler_key)sampling.top_k, false);
        for (int i = (int)threadIdx.x; i < d.n_keys; i += SAMPLER_THREADS)
            if (d.keys[i] >= least)
                weight += weight_of(d, scaled_of_key(d.keys[i]));
        total = block_sum(weight, d.shared); /* top_p is a share of these */
    }
    if (sampling.top_p >= 1.0f)
        return least;
    sampler_key amount = (sampler_key)ceil((double)sampling.top_p * (double)total);
    return find_key(d, least, amount > 0 ? amount : 1, true);
}

/* The token of the largest logit + Gumbel noise among those kept. */
DEVICE int race(const struct draw &d, const struct sampling &sampling, int position,
                sampler_key least, bool listed) {
    double floor = sampling.min_p > 0.0f ? (double)d.max + log((double)sampling.min_p) : -INFINITY;
    double best = -INFINITY;
    int winner = 0, n = listed ? d.n_keys : d.n_vocab;
    for (int i = (int)threadIdx.x; i < n; i += SAMPLER_THREADS) {
        if (listed && d.keys[i] < least)
            continue;
        int token = listed ? token_of_key(d.keys[i]) : i;
        double scaled = scaled_logit(d, token);
        if (scaled < floor)
            continue;
        double u = sampler_uniform(sampling.seed, position, token);
        if (scaled - log(1.0 - u) < best) /* no logarithm of a logarithm for who cannot win */
            continue;
        double value = scaled - log(-log(u));
        if (value > best || (value == best && token < winner)) {
            best = value;
            winner = token;
        }
    }
    /* the best of all threads: first by value, then by the lower id; as integers of like order */
    long long bits;
    memcpy(&bits, &best, sizeof bits);
    sampler_key order = (sampler_key)bits ^ (bits < 0 ? ~0ull : 1ull << 63);
    sampler_key most = block_max(order, d.shared);
    sampler_key id = block_max(order == most ? (sampler_key)(uint32_t)~winner : 0, d.shared);
    return (int)~(uint32_t)id;
}

/* The token for `position`, of logits (n). All SAMPLER_THREADS threads of a block call it and get
 * it; keys (n) and shared memory (SAMPLER_SHARED bytes) are overwritten. */
DEVICE int sampler_draw_block(const struct sampling &sampling, int position, const float *logits,
                              int n, sampler_key *keys, sampler_key *shared) {
    float temperature = sampling.temperature > 0.0f ? sampling.temperature : 1.0f;
    struct draw d = {logits, keys, shared, n, 0, temperature, 0.0f};
    sampler_key largest = 0, weight = 0, least = 0;
    for (int i = (int)threadIdx.x; i < d.n_vocab; i += SAMPLER_THREADS) {
        sampler_key key = make_key(scaled_logit(d, i), i);
        largest = key > largest ? key : largest;
    }
    largest = block_max(largest, shared);
    d.max = scaled_of_key(largest);
    int token = token_of_key(largest);
    if (sampling.temperature > 0.0f) {
        bool listed = sampler_counts(&sampling, n) || sampling.top_p < 1.0f;
        if (listed) {
            for (int i = (int)threadIdx.x; i < d.n_vocab; i += SAMPLER_THREADS)
                weight += weight_of(d, scaled_logit(d, i));
            weight = block_sum(weight, shared);
            list_keys(&d, sampling, weight);
            least = least_kept(d, sampling, weight);
        }
        token = race(d, sampling, position, least, listed);
    }
    return token;
}
#endif /* SAMPLER_GPU_IMPLEMENTATION */
