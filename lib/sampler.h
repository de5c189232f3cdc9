/* sampler.h: draws the next token from logits, on the CPU or on a GPU.
 *
 * What is drawn. Logits are divided by the temperature. Kept are the top_k largest (ties: lower
 * ids), of these the smallest set whose share of them reaches top_p, of these the ones of at least
 * min_p times the largest probability; of these the largest logit + g wins (ties: lower ids), g =
 * -log(-log(u)), u from a counter-based generator keyed by (seed, position of the new token, token
 * id). Temperature 0, less than the least normal number (FLT_MIN), or so low that the largest
 * quotient overflows: the largest logit wins. No token, -1, has a row of which one is NaN, or the
 * largest infinite: it has no probabilities. Others may be -INFINITY, and are never drawn.
 * So a draw does not depend on the batch, the machine or other draws. The two implementations
 * differ only where rounding decides which tokens reach top_p, or which of two equals is larger.
 *
 *     #define SAMPLER_IMPLEMENTATION                // in C
 *     float scaled[N_VOCAB];
 *     int list[N_VOCAB];
 *     struct sampling sampling = {.temperature = 0.8f, .top_p = 0.95f, .seed = 1};
 *     int token = sampler_draw(&sampling, position, logits, N_VOCAB, scaled, list);
 *
 *     #define SAMPLER_GPU_IMPLEMENTATION            // in CUDA, by a few kernels: see below
 *     struct draw draw = {...};                     // what a block has of a row
 *     sampler_maximum(draw); sampler_select(draw, step); sampler_race(draw, &token);
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

/* The token for `position`, of logits (n), or -1. scaled (n) and list (n) are overwritten. */
int sampler_draw(const struct sampling *sampling, int position, const float *logits, int n,
                 float *scaled, int *list);

/* How likely a token was: log-probabilities by the logits as they are, of it and of the likeliest
 * (ties: lower ids), the first one first. In C alone. */
enum { SAMPLER_TOP = 20 };
struct sampler_top {
    float own, logprob[SAMPLER_TOP]; /* (n) */
    int token[SAMPLER_TOP], n;
};
void sampler_top(const float *logits, int n, int token, struct sampler_top *top);

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

SAMPLER_INLINE uint32_t sampler_word(uint64_t seed, int position, int token) {
    uint32_t counter[4] = {(uint32_t)position, (uint32_t)token, 0, 0};
    philox(counter, (uint32_t)seed, (uint32_t)(seed >> 32));
    return counter[0];
}

SAMPLER_INLINE double sampler_uniform(uint64_t seed, int position, int token) { /* in (0, 1) */
    return ((double)sampler_word(seed, position, token) + 0.5) * 0x1p-32;
}
#endif /* SAMPLER_H */
#ifdef SAMPLER_IMPLEMENTATION
#undef SAMPLER_IMPLEMENTATION
#include <float.h>
#include <math.h>
#include <string.h>

#include "simd.h"

/* scaled = logits / divisor. Returns the largest, or NaN, if one is that. */
static float sampler_temper(const float *logits, float *scaled, int n, float divisor) {
    vec largest = (vec){0} - INFINITY, sum = {0}; /* sum: NaN, if one is */
    for (int i = 0; i < n; i += LANES) {
        vec value = load_part(logits + i, n - i) / divisor;
        store_part(scaled + i, value, n - i);
        if (n - i >= LANES)
            largest = max_vec(value, largest);
        sum += select_vec(value == value, (vec){0}, value);
    }
    float max = max_lanes(largest) + sum_lanes(sum);
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
    float least = by_count || !(share > 0.0) ? -INFINITY : max + (float)log(share);
    int count = 0;
    for (int i = 0; i < n; i++) {
        list[count] = i;
        count += scaled[i] >= least;
    }
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

/* The largest scaled - max + g of `n` tokens (of the list, or all). -log(u) >= 1 - u rules out most
 * without a logarithm: token wins only if -log(u) < e^(scaled - max - best). */
static int sampler_race(const struct sampling *sampling, int position, const float *scaled,
                        float max, const int *list, int n) {
    double least = sampling->min_p > 0.0f ? (double)max + log((double)sampling->min_p) : -INFINITY;
    double best = -INFINITY, scale = INFINITY; /* scale: e^-best, a bit more */
    int winner = list ? list[n - 1] : 0;
    for (int i = 0; i < n; i++) {
        int token = list ? list[i] : i;
        if ((double)scaled[token] < least)
            continue;
        double u = sampler_uniform(sampling->seed, position, token);
        if (1.0 - u > sampler_weight_of(scaled[token], max) * scale)
            continue;
        double value = (double)scaled[token] - (double)max - log(-log(u));
        if (value > best || (value == best && token < winner)) {
            best = value;
            winner = token;
            scale = exp(-best) * 1.001 + 1e-300;
        }
    }
    return winner;
}

int sampler_draw(const struct sampling *sampling, int position, const float *logits, int n,
                 float *scaled, int *list) {
    bool races = sampling->temperature >= FLT_MIN;
    float max = sampler_temper(logits, scaled, n, races ? sampling->temperature : 1.0f);
    if (!races || !isfinite(max)) {
        int token = 0;
        max = sampler_temper(logits, scaled, n, 1.0f);
        while (token < n - 1 && scaled[token] != max)
            token++;
        return isfinite(max) ? token : -1;
    }
    const int *kept = NULL;
    if (sampler_counts(sampling, n) || sampling->top_p < 1.0f) {
        n = sampler_keep_top(sampling, scaled, max, list, n);
        kept = list;
    }
    return sampler_race(sampling, position, scaled, max, kept, n);
}

void sampler_top(const float *logits, int n, int token, struct sampler_top *top) {
    double sum = 0;
    top->n = n < SAMPLER_TOP ? n : SAMPLER_TOP;
    for (int i = 0, count = 0; i < n; i++) {
        int at = count < top->n ? count++ : top->n; /* where it belongs; behind all: nowhere */
        for (; at > 0 && logits[i] > logits[top->token[at - 1]]; at--)
            if (at < top->n)
                top->token[at] = top->token[at - 1];
        if (at < top->n)
            top->token[at] = i;
    }
    float max = logits[top->token[0]];
    for (int i = 0; i < n; i++)
        sum += exp((double)logits[i] - (double)max);
    for (int i = 0; i < top->n; i++)
        top->logprob[i] = (float)((double)logits[top->token[i]] - (double)max - log(sum));
    top->own = (float)((double)logits[token] - (double)max - log(sum));
}
#endif /* SAMPLER_IMPLEMENTATION */
#ifdef SAMPLER_GPU_IMPLEMENTATION
#undef SAMPLER_GPU_IMPLEMENTATION
#include <float.h>

#include "gpu.h"

/* A row is drawn by blocks that each have a part of its vocabulary, in SAMPLER_STAGES kernels:
 *     the largest logit; the least key that top_k keeps, by digits; that top_p keeps; the race
 * Tokens are in order by a *key*, the larger the sooner: the logit in an order-preserving form,
 * then the complement of the id, so that no two are alike. Which keys top_k and top_p keep is then
 * one question, asked twice: which is the largest key such that the tokens from it on count, or
 * weigh, at least `amount`? It is answered by digits of 11 bits, the highest first: all blocks of
 * a row add to a histogram of the keys that have the digits found before, and the last one to
 * arrive finds the next. Three digits are the logit; two more tell equal ones apart. A kernel that
 * has nothing to find returns at once.
 *
 * Sums are of whole numbers, weights in units of 2^-40, and the best is by a total order: a token
 * depends neither on the number of parts nor on the order of blocks. */
typedef unsigned long long sampler_key; /* 64 bits, as the atomic functions call them */

enum {
    SAMPLER_THREADS = 512,
    SAMPLER_GROUP = 4 * SAMPLER_THREADS, /* tokens: a part is a multiple of it */
    SAMPLER_ID_BITS = 23,                /* of a key of 55 */
    SAMPLER_IDS = 1 << SAMPLER_ID_BITS,
    SAMPLER_DIGITS = 5,
    SAMPLER_BITS = 11, /* of a digit */
    SAMPLER_BUCKETS = 1 << SAMPLER_BITS,
    SAMPLER_STAGES = 2 * SAMPLER_DIGITS + 2,
    SAMPLER_SHARED = 2 * SAMPLER_BUCKETS * 8 /* bytes: see gather_sums */
};

struct selection {
    sampler_key least, most; /* the key wanted lies between them */
    sampler_key amount;      /* wanted of them; 0: all, so it is `least` */
};

struct sampler_row { /* what kernels hand on; zero before and after a draw */
    sampler_key largest, winner;
    struct selection selection;
    int arrived; /* blocks */
    sampler_key sums[SAMPLER_BUCKETS];
};

struct draw { /* one block's work; all threads have the same */
    struct sampling sampling;
    int position;
    const float *logits;        /* 16-byte aligned */
    int n, first, end, n_parts; /* tokens; the block's */
    struct sampler_row *row;
    sampler_key *shared; /* SAMPLER_SHARED bytes */
    float max;           /* the largest scaled logit: see find_max */
};

/* ---- keys and weights ---- */

DEVICE sampler_key make_key(float value, int token) {     /* + 0: there is one zero */
    value = value == value ? value + 0.0f : fabsf(value); /* NaN: the largest of all */
    uint32_t bits = __float_as_uint(value), id = SAMPLER_IDS - 1 - (uint32_t)token;
    bits ^= bits >> 31 ? 0xffffffffu : 0x80000000u;
    return (sampler_key)bits << SAMPLER_ID_BITS | id;
}

DEVICE float value_of_key(sampler_key key) {
    uint32_t bits = (uint32_t)(key >> SAMPLER_ID_BITS);
    return __uint_as_float(bits >> 31 ? bits ^ 0x80000000u : ~bits);
}

/* Finds the maximum. False: the largest logit wins without a race, or there is no token. */
DEVICE bool find_max(struct draw *d) {
    d->max = value_of_key(d->row->largest) / d->sampling.temperature;
    return d->sampling.temperature >= FLT_MIN && fabsf(d->max) <= FLT_MAX;
}

/* ---- what the threads of a block do together ---- */

/* Calls visit(token, logit) for the block's tokens; the next ones are on their way meanwhile. */
template <typename Visit> DEVICE void visit_tokens(const struct draw &d, Visit visit) {
    const float4 *logits = reinterpret_cast<const float4 *>(d.logits);
    auto load = [&](int token) { return logits[(token < d.end ? token : d.end - 1) / 4]; };
    int first = d.first + 4 * (int)threadIdx.x;
#pragma unroll 1
    for (float4 next = load(first); first < d.end; first += SAMPLER_GROUP) {
        float4 now = next;
        next = load(first + SAMPLER_GROUP);
#pragma unroll 1
        for (int token = first; token < first + 4 && token < d.end; token++) {
            visit(token, now.x);
            now = make_float4(now.y, now.z, now.w, 0.0f);
        }
    }
}

/* Raises *most to the largest of all threads' keys. */
DEVICE void raise_key(sampler_key *most, sampler_key key) {
    for (int step = 16; step > 0; step /= 2) {
        sampler_key other = __shfl_xor_sync(0xffffffffu, key, step);
        key = other > key ? other : key;
    }
    if (threadIdx.x % 32 == 0)
        atomicMax(most, key);
}

/* Whether it is the last block of the row to arrive: it sees what the others wrote. */
DEVICE bool last_to_arrive(const struct draw &d) {
    __syncthreads();
    if (threadIdx.x == 0) {
        d.shared[0] = add_ordered(&d.row->arrived, 1) == d.n_parts - 1;
        if (d.shared[0])
            d.row->arrived = 0;
    }
    __syncthreads();
    return d.shared[0] != 0;
}

DEVICE void sampler_maximum(const struct draw &d) {
    sampler_key largest = 0;
    visit_tokens(d, [&](int token, float logit) {
        sampler_key key = make_key(logit, token);
        largest = key > largest ? key : largest;
    });
    raise_key(&d.row->largest, largest);
}

/* ---- what top_k and top_p keep ---- */

/* Adds to a sum in shared memory, whose atomics are of 32 bits. */
DEVICE void add_shared(sampler_key *sum, sampler_key value) {
    unsigned *word = reinterpret_cast<unsigned *>(sum), high = (unsigned)(value >> 32);
    if (value > 0 && atomicAdd(word, (unsigned)value) > ~(unsigned)value)
        high++;
    if (high > 0)
        atomicAdd(word + 1, high);
}

/* The histogram of a digit of the block's tokens, which count 1 or weigh e^(scaled - max). A thread
 * sums those in a row that have the same digit: if all had, they would wait for each other. */
DEVICE void count_tokens(const struct draw &d, const struct selection &s, int shift, bool counts) {
    sampler_key *sums = d.shared + SAMPLER_BUCKETS, sum = 0;
    int digit = 0;
    for (int i = (int)threadIdx.x; i < SAMPLER_BUCKETS; i += SAMPLER_THREADS)
        sums[i] = 0;
    __syncthreads();
    visit_tokens(d, [&](int token, float logit) {
        sampler_key key = make_key(logit / d.sampling.temperature, token);
        if (key < s.least || key > s.most)
            return;
        int next = (int)(key >> shift & (SAMPLER_BUCKETS - 1));
        if (next != digit) {
            add_shared(&sums[digit], sum);
            digit = next;
            sum = 0;
        }
        sum += counts ? 1 : (sampler_key)(expf(value_of_key(key) - d.max) * 0x1p40f);
    });
    add_shared(&sums[digit], sum);
    __syncthreads();
}

/* For the last block to arrive, else false: the histogram of the row out of those of its blocks,
 * and above it, as a tree, sums of two: [1] all, [i] that of [2 i] and [2 i + 1]. */
DEVICE bool gather_sums(const struct draw &d) {
    sampler_key *tree = d.shared, *sums = tree + SAMPLER_BUCKETS;
    for (int i = (int)threadIdx.x; i < SAMPLER_BUCKETS; i += SAMPLER_THREADS)
        if (sums[i] > 0)
            atomicAdd(&d.row->sums[i], sums[i]);
    if (!last_to_arrive(d))
        return false;
#pragma unroll
    for (int i = 0; i < SAMPLER_BUCKETS; i += SAMPLER_THREADS) {
        sums[i + threadIdx.x] = d.row->sums[i + threadIdx.x];
        d.row->sums[i + threadIdx.x] = 0;
    }
    __syncthreads();
    for (int width = SAMPLER_BUCKETS / 2; width > 0; width /= 2) {
        for (int i = width + (int)threadIdx.x; i < 2 * width; i += SAMPLER_THREADS)
            tree[i] = tree[2 * i] + tree[2 * i + 1];
        __syncthreads();
    }
    return true;
}

/* A digit of the least key that top_k (steps 0 to 4) or top_p (5 to 9) keeps. */
DEVICE void sampler_select(struct draw d, int step) {
    const bool counts = step < SAMPLER_DIGITS;
    const int shift = SAMPLER_BITS * (SAMPLER_DIGITS - 1 - step % SAMPLER_DIGITS);
    if (counts ? !sampler_counts(&d.sampling, d.n) : !(d.sampling.top_p < 1.0f))
        return;
    struct selection s = d.row->selection;
    if (step % SAMPLER_DIGITS == 0)
        s = {s.least, ~0ull, counts ? (sampler_key)d.sampling.top_k : 1};
    if (!find_max(&d) || s.amount == 0)
        return;
    count_tokens(d, s, shift, counts);
    if (!gather_sums(d) || threadIdx.x > 0)
        return;
    if (step == SAMPLER_DIGITS)
        s.amount = (sampler_key)fmax(ceil((double)d.sampling.top_p * (double)d.shared[1]), 1.0);
    int at = 1;
    while (at < SAMPLER_BUCKETS) {
        at = 2 * at + 1; /* the higher half */
        if (d.shared[at] < s.amount)
            s.amount -= d.shared[at--];
    }
    sampler_key digits = (s.least >> (shift + SAMPLER_BITS) << SAMPLER_BITS) + at - SAMPLER_BUCKETS;
    sampler_key least = digits << shift, most = ((digits + 1) << shift) - 1;
    d.row->selection = {least > s.least ? least : s.least, most,
                        d.shared[at] == s.amount ? 0 : s.amount};
}

/* ---- the race ---- */

/* The thread's best, if it may win: a key with scaled - max + g + 8, in units of 2^-36, in place of
 * the logit. Most are ruled out as in C. `best`, of the block so far, is also plus 8, and the bits
 * of a float: above 0 they are in order. It begins below what the largest logit has with any g. */
DEVICE sampler_key best_of_thread(const struct draw &d) {
    const double enough = (double)d.max + log((double)d.sampling.min_p); /* 0: none */
    const sampler_key least = d.row->selection.least;
    unsigned *best = reinterpret_cast<unsigned *>(d.shared);
    sampler_key winner = 0;
    if (threadIdx.x == 0)
        *best = __float_as_uint(4.0f);
    __syncthreads();
    visit_tokens(d, [&](int token, float logit) {
        sampler_key key = make_key(logit / d.sampling.temperature, token);
        if (key < least)
            return;
        uint32_t word = sampler_word(d.sampling.seed, d.position, token);
        float scaled = value_of_key(key), best_now = __uint_as_float(*(volatile unsigned *)best);
        float most = 1.001f * expf(scaled - d.max - (best_now - 8.0f));
        if ((float)~word * 0x1p-32f > most || (double)scaled < enough)
            return;
        double g = -log(-log(sampler_uniform(d.sampling.seed, d.position, token)));
        double value = fmax((double)scaled - (double)d.max + g + 8.0, 0.0);
        key = (sampler_key)(value * 0x1p36) << SAMPLER_ID_BITS | (key & (SAMPLER_IDS - 1));
        winner = key > winner ? key : winner;
        atomicMax(best, __float_as_uint((float)value));
    });
    return winner;
}

/* The last block of the row stores the token. */
DEVICE void sampler_race(struct draw d, int *drawn) {
    if (find_max(&d))
        raise_key(&d.row->winner, best_of_thread(d));
    if (last_to_arrive(d) && threadIdx.x == 0) {
        sampler_key key = d.row->winner > 0 ? d.row->winner : d.row->largest;
        bool some = fabsf(value_of_key(d.row->largest)) <= FLT_MAX;
        *drawn = some ? SAMPLER_IDS - 1 - (int)(key & (SAMPLER_IDS - 1)) : -1;
        d.row->largest = d.row->winner = 0;
        d.row->selection = {};
    }
}
#endif /* SAMPLER_GPU_IMPLEMENTATION */
