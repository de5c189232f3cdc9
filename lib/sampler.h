/* sampler.h: draws the next token from logits, on the CPU or on a GPU.
 *
 * What is drawn. Logits are divided by the temperature; those that are no number count as the least
 * one. Kept are the top_k largest (ties: lower ids), of these the smallest set whose share of them
 * reaches top_p, of these the ones of at least min_p times the largest probability; of these the
 * largest logit + g wins (ties: lower ids), g = -log(-log(u)), u from a counter-based generator
 * keyed by (seed, position of the new token, token id). Temperature 0, or so low that the largest
 * quotient overflows: the largest logit wins.
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
 *     sampler_maximum(draw); sampler_select(draw, last); sampler_race(draw, &token);
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
    if (!(sampling->temperature > 0.0f) || fabsf(max) >= FLT_MAX) {
        int token = 0;
        max = sampler_temper(logits, scaled, n, 1.0f);
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

/* A row is drawn by blocks that each have a part of its vocabulary, in a few kernels:
 *     sampler_maximum    the largest logit
 *     sampler_select     one digit of the least key that is kept; SAMPLER_SELECTS times
 *     sampler_race       the largest logit + g of the kept ones
 * Tokens are in order by a *key*, the larger the sooner: the logit in an order-preserving form,
 * then the complement of the id, so that no two are alike. Which keys top_k and top_p keep is then
 * one question, asked twice: which is the largest key such that the tokens from it on count, or
 * weigh, at least `amount`? It is answered by digits of 11 bits, the highest first, with a
 * histogram for each, of the keys that have the digits found before. All blocks of a row add to it,
 * and the last one to arrive finds the digit; what is left after SAMPLER_SELECTS digits it finds
 * alone. Three digits are the logit; the others tell equal ones apart, and are seldom needed.
 *
 * Sums are of whole numbers, weights in units of 2^-40, and the best of many is by a total order:
 * so a token depends neither on the number of parts nor on the order of blocks. */
typedef unsigned long long sampler_key; /* 64 bits, as the atomic functions call them */

enum {
    SAMPLER_THREADS = 512,
    SAMPLER_GROUP = 4 * SAMPLER_THREADS, /* tokens: a part is a multiple of it */
    SAMPLER_AHEAD = 4,                   /* groups on their way */
    SAMPLER_PARTS = 64,                  /* of a row, at most */
    SAMPLER_SELECTS = 3,
    SAMPLER_DIGITS = 5, /* of a key: 32 bits of a logit, 23 of an id */
    SAMPLER_DONE = 2 * SAMPLER_DIGITS + 1,
    SAMPLER_BITS = 11,
    SAMPLER_BUCKETS = 1 << SAMPLER_BITS,
    SAMPLER_ID_BITS = 23,
    SAMPLER_SHARED = (SAMPLER_BUCKETS + SAMPLER_THREADS / 32 + 3) * 8 /* bytes */
};

struct selection {
    /* the digit that is next: of top_k 1 to 5, of top_p 6 to 10; 0: not begun */
    int step;
    sampler_key least;  /* tokens from this key on are kept by what is done */
    sampler_key prefix; /* the digits found */
    sampler_key amount; /* in number or weight, of the keys with this prefix */
};

struct sampler_row { /* what kernels hand on; zero before and after a draw */
    sampler_key largest;
    struct selection selection;
    int arrived; /* blocks */
    sampler_key sums[SAMPLER_BUCKETS];
    sampler_key best[SAMPLER_PARTS], winner[SAMPLER_PARTS]; /* of each part; these may be left */
};

struct draw { /* one block's work; all threads have the same */
    struct sampling sampling;
    int position;
    const float *logits; /* 16-byte aligned */
    int n, first, end;   /* tokens; the block's */
    int part, n_parts;
    struct sampler_row *row;
    sampler_key *shared; /* SAMPLER_SHARED bytes */
};

/* ---- logits, keys and weights ---- */

DEVICE float divisor_of(const struct draw &d) {
    return d.sampling.temperature > 0.0f ? d.sampling.temperature : 1.0f;
}

DEVICE float scaled_logit(float logit, float divisor) {             /* + 0: there is one zero */
    return fminf(fmaxf(logit / divisor, -FLT_MAX), FLT_MAX) + 0.0f; /* fmaxf(NaN, x) is x */
}

DEVICE uint32_t ordered(float value) { /* as an integer of like order */
    uint32_t bits = __float_as_uint(value);
    return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

DEVICE sampler_key make_key(float scaled, int token) {
    const sampler_key id = ((1u << SAMPLER_ID_BITS) - 1) - (uint32_t)token;
    return (sampler_key)ordered(scaled) << SAMPLER_ID_BITS | id;
}

DEVICE int token_of_key(sampler_key key) {
    return (int)(~(uint32_t)key & ((1u << SAMPLER_ID_BITS) - 1));
}

DEVICE float scaled_of_key(sampler_key key) {
    uint32_t bits = (uint32_t)(key >> SAMPLER_ID_BITS);
    return __uint_as_float(bits >> 31 ? bits ^ 0x80000000u : ~bits);
}

DEVICE sampler_key weight_of(float scaled, float max) { /* in units of 2^-40 */
    return (sampler_key)(expf(scaled - max) * 1099511627776.0f);
}

DEVICE float max_of(const struct draw &d) { /* the largest scaled logit */
    return scaled_logit(scaled_of_key(d.row->largest), divisor_of(d));
}

DEVICE bool takes_largest(const struct draw &d, float max) {
    return !(d.sampling.temperature > 0.0f) || fabsf(max) >= FLT_MAX ||
           fabsf(scaled_of_key(d.row->largest)) >= FLT_MAX;
}

/* ---- what the threads of a block do together ---- */

DEVICE sampler_key warp_sum(sampler_key value) {
    for (int step = 16; step > 0; step /= 2)
        value += __shfl_xor_sync(0xffffffffu, value, step);
    return value;
}

/* The largest of all threads' values, in every thread. */
DEVICE sampler_key block_max(const struct draw &d, sampler_key value) {
    for (int step = 16; step > 0; step /= 2) {
        sampler_key other = __shfl_xor_sync(0xffffffffu, value, step);
        value = other > value ? other : value;
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0)
        d.shared[threadIdx.x / 32] = value;
    __syncthreads();
    for (int i = 0; i < SAMPLER_THREADS / 32; i++)
        value = d.shared[i] > value ? d.shared[i] : value;
    return value;
}

/* Whether it is the last block of the row to arrive: it sees what the others wrote. */
DEVICE bool last_to_arrive(const struct draw &d) {
    int *last = reinterpret_cast<int *>(d.shared + SAMPLER_BUCKETS);
    __syncthreads();
    if (threadIdx.x == 0) {
        *last = add_ordered(&d.row->arrived, 1) == d.n_parts - 1;
        if (*last)
            d.row->arrived = 0;
    }
    __syncthreads();
    return *last != 0;
}

/* Calls visit(token, logit) for the tokens from `first` on, by whole warps: also for some that are
 * not before `end`. */
template <typename Visit>
DEVICE void visit_tokens(const struct draw &d, int first, int end, Visit visit) {
    float4 ahead[SAMPLER_AHEAD + 1] = {};
    int own = 4 * (int)threadIdx.x;
#pragma unroll
    for (int i = 0; i < SAMPLER_AHEAD; i++)
        if (first + i * SAMPLER_GROUP + own < end)
            ahead[i] =
                *reinterpret_cast<const float4 *>(d.logits + first + i * SAMPLER_GROUP + own);
#pragma unroll 1
    for (int at = first; at < end; at += SAMPLER_GROUP) {
        int later = at + SAMPLER_AHEAD * SAMPLER_GROUP + own;
        if (later < end)
            ahead[SAMPLER_AHEAD] = *reinterpret_cast<const float4 *>(d.logits + later);
        const float logits[4] = {ahead[0].x, ahead[0].y, ahead[0].z, ahead[0].w};
#pragma unroll
        for (int i = 0; i < 4; i++)
            visit(at + own + i, logits[i]);
#pragma unroll
        for (int i = 0; i < SAMPLER_AHEAD; i++)
            ahead[i] = ahead[i + 1];
    }
}

/* ---- the largest logit ---- */

DEVICE void sampler_maximum(const struct draw &d) {
    sampler_key largest = 0;
    visit_tokens(d, d.first, d.end, [&](int token, float logit) {
        sampler_key key = token < d.end ? make_key(scaled_logit(logit, 1.0f), token) : 0;
        largest = key > largest ? key : largest;
    });
    largest = block_max(d, largest);
    if (threadIdx.x == 0)
        atomicMax(&d.row->largest, largest);
}

/* ---- what top_k and top_p keep ---- */

/* Keys, and the logits that may have them: most others are told without a division. */
struct range {
    sampler_key least, most;
    float least_logit, most_logit;
};

DEVICE struct range make_range(sampler_key least, sampler_key most, float divisor) {
    float low = fmaxf(scaled_of_key(least), -FLT_MAX), high = fminf(scaled_of_key(most), FLT_MAX);
    float low_logit = low * divisor, high_logit = high * divisor;
    low_logit -= 1e-6f * fabsf(low_logit) + 1e-44f * (divisor + 1.0f);
    high_logit += 1e-6f * fabsf(high_logit) + 1e-44f * (divisor + 1.0f);
    return {least, most, low > -FLT_MAX ? low_logit : -INFINITY,
            high < FLT_MAX ? high_logit : INFINITY};
}

DEVICE bool within(const struct range &range, float logit, int token, float divisor,
                   float *scaled) {
    if (logit < range.least_logit || logit > range.most_logit)
        return false;
    *scaled = scaled_logit(logit, divisor);
    sampler_key key = make_key(*scaled, token);
    return key >= range.least && key <= range.most;
}

DEVICE int digit_of_step(int step) { /* 0 to 4 */
    return (step - 1) % SAMPLER_DIGITS;
}

DEVICE int shift_of_step(int step) {
    return SAMPLER_BITS * (SAMPLER_DIGITS - 1 - digit_of_step(step));
}

/* A 64-bit sum in shared memory, whose atomics are of 32 bits. */
DEVICE void add_shared(sampler_key *sum, sampler_key value) {
    unsigned *word = reinterpret_cast<unsigned *>(sum);
    unsigned low = (unsigned)value, high = (unsigned)(value >> 32);
    if (atomicAdd(word, low) > ~low)
        high++;
    if (high > 0)
        atomicAdd(word + 1, high);
}

/* Sums weights of a warp's tokens. If all that are `in` have one digit, they are added up first:
 * equal logits would wait for each other. */
DEVICE void add_weights(sampler_key *sums, int digit, sampler_key weight, bool in) {
    unsigned some = __ballot_sync(0xffffffffu, in);
    if (some == 0)
        return;
    int one = __shfl_sync(0xffffffffu, digit, __ffs((int)some) - 1);
    if (__all_sync(0xffffffffu, !in || digit == one)) {
        weight = warp_sum(in ? weight : 0);
        digit = one;
        in = threadIdx.x % 32 == 0;
    }
    if (in)
        add_shared(&sums[digit], weight);
}

/* The histogram of the next digit, in shared memory, of tokens [first, end). The first two digits
 * of top_p are summed by weight; after the third the logit is known, so they need only be counted. */
DEVICE void count_tokens(const struct draw &d, const struct selection &s, float max, int first,
                         int end) {
    const int shift = shift_of_step(s.step);
    const bool by_weight = s.step == SAMPLER_DIGITS + 1 || s.step == SAMPLER_DIGITS + 2;
    const sampler_key least = s.prefix > s.least ? s.prefix : s.least;
    const sampler_key most = s.prefix | (((sampler_key)SAMPLER_BUCKETS << shift) - 1);
    const float divisor = divisor_of(d);
    const struct range range = make_range(least, most, divisor);
    for (int i = (int)threadIdx.x; i < SAMPLER_BUCKETS; i += SAMPLER_THREADS)
        d.shared[i] = 0;
    __syncthreads();
    visit_tokens(d, first, end, [&](int token, float logit) {
        float scaled = 0.0f;
        bool in = token < end && within(range, logit, token, divisor, &scaled);
        int digit = (int)(make_key(scaled, token) >> shift & (SAMPLER_BUCKETS - 1));
        if (by_weight)
            add_weights(d.shared, digit, in ? weight_of(scaled, max) : 0, in);
        else if (in)
            atomicAdd(reinterpret_cast<unsigned *>(&d.shared[digit]), 1u);
    });
    __syncthreads();
}

/* Sums of the buckets from the highest on, of thread i's 4 and of those before them. */
DEVICE sampler_key sum_before(const struct draw &d, sampler_key own, sampler_key *total) {
    sampler_key *sums = d.shared + SAMPLER_BUCKETS, before = own;
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    for (int step = 1; step < 32; step *= 2) {
        sampler_key other = __shfl_up_sync(0xffffffffu, before, (unsigned)step);
        before += lane >= step ? other : 0;
    }
    if (lane == 31)
        sums[warp] = before;
    __syncthreads();
    *total = 0;
    for (int i = 0; i < SAMPLER_THREADS / 32; i++) {
        before += i < warp ? sums[i] : 0;
        *total += sums[i];
    }
    return before - own;
}

/* The next digit of the selection, from its histogram. */
DEVICE void find_digit(const struct draw &d, struct selection *s, float max) {
    enum { EACH = SAMPLER_BUCKETS / SAMPLER_THREADS };
    sampler_key *found = d.shared + SAMPLER_BUCKETS + SAMPLER_THREADS / 32, own[EACH], sum = 0;
    const int shift = shift_of_step(s->step), top = SAMPLER_BUCKETS - 1 - (int)threadIdx.x * EACH;
    const bool weigh = s->step == SAMPLER_DIGITS + 3; /* counts of known logits */
    for (int i = 0; i < EACH; i++) {
        sampler_key key = s->prefix | (sampler_key)(top - i) << shift;
        own[i] = d.shared[top - i] * (weigh ? weight_of(scaled_of_key(key), max) : 1);
        sum += own[i];
    }
    sampler_key total, before = sum_before(d, sum, &total), amount = s->amount;
    if (s->step == 1)
        amount = (sampler_key)d.sampling.top_k;
    if (s->step == SAMPLER_DIGITS + 1) {
        amount = (sampler_key)ceil((double)d.sampling.top_p * (double)total);
        amount = amount > 0 ? amount : 1;
    }
    if (before < amount && amount <= before + sum) { /* one thread */
        int i = 0;
        for (; before + own[i] < amount; i++)
            before += own[i];
        found[0] = (sampler_key)(top - i);
        found[1] = amount - before;
        found[2] = d.shared[top - i];
        if (weigh) { /* from now on they are counted */
            sampler_key weight = own[i] / found[2];
            found[1] = (found[1] + weight - 1) / weight;
        }
    }
    __syncthreads();
    bool all = found[1] == found[2] && (s->step <= SAMPLER_DIGITS || digit_of_step(s->step) >= 2);
    s->prefix |= found[0] << shift;
    s->amount = found[1];
    s->step++;
    if (all || shift == 0) {
        bool next = s->step <= SAMPLER_DIGITS + 1 && d.sampling.top_p < 1.0f;
        sampler_key least = s->prefix > s->least ? s->prefix : s->least;
        *s = {next ? SAMPLER_DIGITS + 1 : SAMPLER_DONE, least, 0, 0};
    }
}

/* The row's next digit. `last`: all that are left. */
DEVICE void sampler_select(const struct draw &d, bool last) {
    struct selection s = d.row->selection;
    float max = max_of(d);
    if (s.step == 0)
        s.step = sampler_counts(&d.sampling, d.n) ? 1
                 : d.sampling.top_p < 1.0f        ? SAMPLER_DIGITS + 1
                                                  : SAMPLER_DONE;
    if (s.step == SAMPLER_DONE || takes_largest(d, max))
        return;
    count_tokens(d, s, max, d.first, d.end);
    for (int i = (int)threadIdx.x; i < SAMPLER_BUCKETS; i += SAMPLER_THREADS)
        if (d.shared[i] > 0)
            atomicAdd(&d.row->sums[i], d.shared[i]);
    if (!last_to_arrive(d))
        return;
    for (int i = (int)threadIdx.x; i < SAMPLER_BUCKETS; i += SAMPLER_THREADS) {
        d.shared[i] = d.row->sums[i];
        d.row->sums[i] = 0;
    }
    __syncthreads();
    find_digit(d, &s, max);
    while (last && s.step != SAMPLER_DONE) {
        bool near = shift_of_step(s.step) == 0; /* ids with the last digit alone to find */
        int first = near ? token_of_key(s.prefix | (SAMPLER_BUCKETS - 1)) : 0;
        count_tokens(d, s, max, first,
                     near && first + SAMPLER_BUCKETS < d.n ? first + SAMPLER_BUCKETS : d.n);
        find_digit(d, &s, max);
    }
    if (threadIdx.x == 0)
        d.row->selection = s;
}

/* ---- the race ---- */

/* g to 1e-4, without the slow exact logarithms. */
DEVICE float rough_noise(uint32_t word) {
    float u = ((float)word + 0.5f) * 0x1p-32f, rest = ((float)~word + 0.5f) * 0x1p-32f;
    float series = rest * (1.0f + rest * (0.5f + rest * (1.0f / 3.0f + rest * 0.25f)));
    float slow = word < 0xe0000000u ? log2_approx(u) * -0.69314718f : series; /* -log(u) */
    return log2_approx(slow) * -0.69314718f;
}

struct runner { /* the larger order wins, then the larger id, which is the lower token's */
    sampler_key order, id;
};

DEVICE struct runner make_runner(const struct draw &d, float scaled, int token) {
    double value = (double)scaled - log(-log(sampler_uniform(d.sampling.seed, d.position, token)));
    long long bits;
    memcpy(&bits, &value, sizeof bits);
    return {(sampler_key)bits ^ (bits < 0 ? ~0ull : 1ull << 63), (sampler_key) ~(uint32_t)token};
}

DEVICE struct runner better(const struct runner &a, const struct runner &b) {
    return a.order > b.order || (a.order == b.order && a.id > b.id) ? a : b;
}

DEVICE struct runner block_best(const struct draw &d, const struct runner &own) {
    sampler_key order = block_max(d, own.order);
    return {order, block_max(d, own.order == order ? own.id : 0)};
}

/* The least key that top_k, top_p and min_p keep. */
DEVICE sampler_key least_kept(const struct draw &d, float max) {
    sampler_key least = d.row->selection.least;
    if (!(d.sampling.min_p > 0.0f))
        return least;
    double exact = (double)max + log((double)d.sampling.min_p);
    float rounded = (float)exact;
    sampler_key floor = (sampler_key)ordered(rounded) + ((double)rounded < exact);
    return floor << SAMPLER_ID_BITS > least ? floor << SAMPLER_ID_BITS : least;
}

/* The best of the block's part: first roughly, then exactly those that may be it. */
DEVICE struct runner part_best(const struct draw &d, float max) {
    const float divisor = divisor_of(d);
    const struct range kept = make_range(least_kept(d, max), ~0ull, divisor);
    float best = -INFINITY, second = -INFINITY, best_scaled = 0.0f, scaled;
    int token_of_best = 0;
    visit_tokens(d, d.first, d.end, [&](int token, float logit) {
        if (token >= d.end || !within(kept, logit, token, divisor, &scaled))
            return;
        float value = scaled + rough_noise(sampler_word(d.sampling.seed, d.position, token));
        second = fmaxf(second, fminf(best, value));
        token_of_best = value > best ? token : token_of_best;
        best_scaled = value > best ? scaled : best_scaled;
        best = fmaxf(best, value);
    });
    float most = scaled_of_key(block_max(d, make_key(best, 0)));
    float enough = most - 5e-4f - 1e-6f * fabsf(most);
    struct runner runner = {0, 0};
    if (best > -INFINITY && best >= enough)
        runner = make_runner(d, best_scaled, token_of_best);
    if (second > -INFINITY && second >= enough) /* seldom: try all that this thread has */
        for (int at = d.first + 4 * (int)threadIdx.x; at < d.end; at += SAMPLER_GROUP)
            for (int token = at; token < at + 4 && token < d.end; token++)
                if (within(kept, d.logits[token], token, divisor, &scaled))
                    runner = better(runner, make_runner(d, scaled, token));
    return block_best(d, runner);
}

/* The last block of the row stores the token. */
DEVICE void sampler_race(const struct draw &d, int *drawn) {
    struct sampler_row *row = d.row;
    const float max = max_of(d);
    const bool race = !takes_largest(d, max);
    struct runner best = {0, 0};
    if (race)
        best = part_best(d, max);
    if (threadIdx.x == 0) {
        row->best[d.part] = best.order;
        row->winner[d.part] = best.id;
    }
    if (!last_to_arrive(d))
        return;
    best = {0, 0};
    if ((int)threadIdx.x < d.n_parts)
        best = {row->best[threadIdx.x], row->winner[threadIdx.x]};
    best = block_best(d, best);
    if (threadIdx.x == 0) {
        *drawn = race ? (int)~(uint32_t)best.id : token_of_key(row->largest);
        row->largest = 0;
        row->selection = {};
    }
}
#endif /* SAMPLER_GPU_IMPLEMENTATION */
