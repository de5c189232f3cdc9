/* sampler.cuh: draws the next tokens on the GPU, so that no logits leave it. The twin of sampler.h.
 *
 * What is drawn is defined at `sample` in dynamo.h. One block draws one token. Tokens are in order
 * by a *key* of 64 bits, the larger the sooner: the logit in an order-preserving form, then the
 * complement of the id, so that no two are alike. Which keys top_k and top_p keep is then one
 * question, asked twice: which is the largest key such that the tokens from it on count, or weigh,
 * at least so much? `find_key` answers it by its 8 bits digits, the highest first, with a histogram
 * for each. Weights are whole numbers of 2^-40: their sums do not depend on the order of additions.
 * Before, tokens so improbable that top_p cannot keep them are left out, which leaves few. */
#ifndef SAMPLER_CUH
#define SAMPLER_CUH
#include "step.cuh"

#include <float.h>

enum { SAMPLER_THREADS = 512, SAMPLER_WARPS = SAMPLER_THREADS / 32, DIGITS = 256 };

enum { SAMPLER_SHARED = (DIGITS + 2) * 8 /* bytes */ };

typedef unsigned long long key_type; /* 64 bits, as the atomic functions call them */

struct sampler {
    const float *logits;            /* (n_samples, stride) */
    int stride, vocab_size, first;  /* first: of the samples at hand */
    const struct step_header *step; /* device */
    key_type *keys;                 /* (n_samples, vocab_size) of tokens that are still possible */
    int *sampled;                   /* (all samples) out */
};

struct draw { /* one block's work; all threads have the same */
    const float *logits;
    key_type *keys, *shared; /* shared: DIGITS sums, and some more words */
    int n_vocab, n_keys;
    float temperature, max; /* of the largest logit / temperature */
};

/* Logits that are no number count as the least one. */
DEVICE float scaled_logit(const struct draw &d, int token) {
    float value = d.logits[token] / d.temperature;
    return fminf(fmaxf(value, -FLT_MAX), FLT_MAX); /* fmaxf(NaN, x) is x */
}

DEVICE key_type make_key(float scaled, int token) {
    uint32_t bits = __float_as_uint(scaled);
    bits ^= bits >> 31 ? 0xffffffffu : 0x80000000u;
    return (key_type)bits << 32 | (uint32_t)~token;
}

DEVICE int token_of_key(key_type key) {
    return (int)~(uint32_t)key;
}

DEVICE float scaled_of_key(key_type key) {
    uint32_t bits = (uint32_t)(key >> 32);
    return __uint_as_float(bits >> 31 ? bits ^ 0x80000000u : ~bits);
}

DEVICE key_type weight_of(const struct draw &d, float scaled) { /* in units of 2^-40 */
    return (key_type)(expf(scaled - d.max) * 1099511627776.0f);
}

/* The largest of all threads' values, and the sum, in every thread. */
DEVICE key_type block_max(key_type value, key_type *shared) {
    __syncthreads();
    if (threadIdx.x == 0)
        shared[0] = 0;
    __syncthreads();
    atomicMax(&shared[0], value);
    __syncthreads();
    return shared[0];
}

DEVICE key_type block_sum(key_type value, key_type *shared) {
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
DEVICE void count_digits(const struct draw &d, key_type least, key_type prefix, int shift,
                         bool by_weight) {
    key_type sum = 0;
    int digit = 0;
    for (int i = (int)threadIdx.x; i < d.n_keys; i += SAMPLER_THREADS) {
        key_type key = d.keys[i];
        if (key < least || (shift < 56 && key >> (shift + 8) != prefix >> (shift + 8)))
            continue;
        int own = (int)(key >> shift & (DIGITS - 1));
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
DEVICE key_type find_key(const struct draw &d, key_type least, key_type amount, bool by_weight) {
    key_type prefix = 0, *digit = d.shared + DIGITS, *wanted = digit + 1;
    for (int shift = 56; shift >= 0; shift -= 8) {
        __syncthreads();
        for (int i = (int)threadIdx.x; i < DIGITS; i += SAMPLER_THREADS)
            d.shared[i] = 0;
        __syncthreads();
        count_digits(d, least, prefix, shift, by_weight);
        __syncthreads();
        if (threadIdx.x == 0) {
            int i = DIGITS - 1;
            for (; i > 0 && d.shared[i] < amount; i--)
                amount -= d.shared[i];
            *digit = (key_type)i;
            *wanted = amount;
        }
        __syncthreads();
        prefix |= *digit << shift;
        amount = *wanted;
    }
    return prefix;
}

/* Lists the tokens that top_k and top_p may keep, as keys. `total`: the weight of all tokens. */
DEVICE void list_keys(struct draw *d, const struct sampling &sampling, key_type total) {
    bool by_count = sampling.top_k > 0 && sampling.top_k < d->n_vocab;
    /* all tokens this improbable together are less than what top_p leaves out */
    float share = 0.5f * (1.0f - sampling.top_p) * (float)total / (float)d->n_vocab;
    key_type cut = by_count || !(share >= 1.0f) ? 0 : (key_type)share;
    key_type *count = d->shared;
    __syncthreads();
    if (threadIdx.x == 0)
        *count = 0;
    __syncthreads();
    for (int first = 0; first < d->n_vocab; first += SAMPLER_THREADS) {
        int token = first + (int)threadIdx.x, lane = (int)threadIdx.x % 32;
        float scaled = token < d->n_vocab ? scaled_logit(*d, token) : 0.0f;
        bool kept = token < d->n_vocab && (cut == 0 || weight_of(*d, scaled) >= cut);
        unsigned warp = __ballot_sync(0xffffffffu, kept);
        key_type at = lane == 0 ? atomicAdd(count, (key_type)__popc(warp)) : 0;
        at = __shfl_sync(0xffffffffu, at, 0) + __popc(warp & ((1u << lane) - 1));
        if (kept)
            d->keys[at] = make_key(scaled, token);
    }
    __syncthreads();
    d->n_keys = (int)*count;
    __syncthreads();
}

/* The least key that top_k and top_p keep. */
DEVICE key_type least_kept(const struct draw &d, const struct sampling &sampling, key_type total) {
    key_type least = 0, weight = 0;
    if (sampling.top_k > 0 && sampling.top_k < d.n_vocab) {
        least = find_key(d, 0, (key_type)sampling.top_k, false);
        for (int i = (int)threadIdx.x; i < d.n_keys; i += SAMPLER_THREADS)
            if (d.keys[i] >= least)
                weight += weight_of(d, scaled_of_key(d.keys[i]));
        total = block_sum(weight, d.shared); /* top_p is a share of these */
    }
    if (sampling.top_p >= 1.0f)
        return least;
    key_type amount = (key_type)ceil((double)sampling.top_p * (double)total);
    return find_key(d, least, amount > 0 ? amount : 1, true);
}

/* Philox4x32-10 (Salmon et al. 2011), its first word: uniform in (0, 1). */
DEVICE double uniform(uint64_t seed, int position, int token) {
    uint32_t counter[4] = {(uint32_t)position, (uint32_t)token, 0, 0};
    uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    for (int round = 0; round < 10; round++) {
        uint64_t first = (uint64_t)counter[0] * 0xD2511F53u;
        uint64_t second = (uint64_t)counter[2] * 0xCD9E8D57u;
        counter[0] = (uint32_t)(second >> 32) ^ counter[1] ^ key[0];
        counter[1] = (uint32_t)second;
        counter[2] = (uint32_t)(first >> 32) ^ counter[3] ^ key[1];
        counter[3] = (uint32_t)first;
        key[0] += 0x9E3779B9u;
        key[1] += 0xBB67AE85u;
    }
    return ((double)counter[0] + 0.5) * 0x1p-32;
}

/* The token of the largest logit + Gumbel noise among those kept: as a key, of the noisy logit. */
DEVICE int race(const struct draw &d, const struct sampling &sampling, int position, key_type least,
                bool listed) {
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
        double u = uniform(sampling.seed, position, token);
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
    key_type order = (key_type)bits ^ (bits < 0 ? ~0ull : 1ull << 63);
    key_type most = block_max(order, d.shared);
    key_type id = block_max(order == most ? (key_type)(uint32_t)~winner : 0, d.shared);
    return (int)~(uint32_t)id;
}

/* sampled[i] = the token drawn from row i of the logits. One block a row: its passes over the
 * vocabulary read from L2. Shared: DIGITS + 2 words. Bound by latency, some 50 us. */
__global__ void __launch_bounds__(SAMPLER_THREADS) sample_kernel(const struct sampler s) {
    DYNAMIC_SHARED(key_type, shared);
    grid_wait();
    grid_launch_dependents();
    int sample = s.first + (int)blockIdx.x;
    if (sample >= s.step->n_samples)
        return;
    const struct sampling sampling = array_of<struct sampling>(s.step, s.step->sampling)[sample];
    int row = array_of<int>(s.step, s.step->sample_row)[sample];
    int position = array_of<int>(s.step, s.step->position)[row] + 1;
    struct draw d = {s.logits + (size_t)blockIdx.x * s.stride,
                     s.keys + (size_t)blockIdx.x * s.vocab_size,
                     shared,
                     s.vocab_size,
                     0,
                     sampling.temperature > 0.0f ? sampling.temperature : 1.0f,
                     0.0f};
    key_type largest = 0, weight = 0, least = 0;
    for (int i = (int)threadIdx.x; i < d.n_vocab; i += SAMPLER_THREADS) {
        key_type key = make_key(scaled_logit(d, i), i);
        largest = key > largest ? key : largest;
    }
    largest = block_max(largest, shared);
    d.max = scaled_of_key(largest);
    int token = token_of_key(largest);
    if (sampling.temperature > 0.0f) {
        bool listed = sampling.top_p < 1.0f || (sampling.top_k > 0 && sampling.top_k < d.n_vocab);
        if (listed) {
            for (int i = (int)threadIdx.x; i < d.n_vocab; i += SAMPLER_THREADS)
                weight += weight_of(d, scaled_logit(d, i));
            weight = block_sum(weight, shared);
            list_keys(&d, sampling, weight);
            least = least_kept(d, sampling, weight);
        }
        token = race(d, sampling, position, least, listed);
    }
    if (threadIdx.x == 0)
        s.sampled[sample] = token;
}
#endif /* SAMPLER_CUH */
