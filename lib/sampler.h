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
 *     sampler_select     a digit of the least key that is kept; SAMPLER_SELECTS times
 *     sampler_race       the largest logit + g of those kept
 * Tokens are in order by a *key*, the larger the sooner: the logit in an order-preserving form,
 * then the complement of the id, so that no two are alike. Which keys top_k and top_p keep is then
 * one question, asked twice: which is the largest key such that the tokens from it on count, or
 * weigh, at least `amount`? It is answered by digits of 11 bits, the highest first, with a
 * histogram for each of the keys that have the digits before it. All blocks of a row add to it, and
 * the last one to arrive finds the digit; those left after SAMPLER_SELECTS, of top_k and top_p
 * together, it finds alone. Three digits are the logit; two more tell equal ones apart.
 *
 * Sums are of whole numbers, weights in units of 2^-40, and the best is by a total order: a token
 * depends neither on the number of parts nor on the order of blocks. */
typedef unsigned long long sampler_key; /* 64 bits, as the atomic functions call them */

enum {
    SAMPLER_THREADS = 512,
    SAMPLER_GROUP = 4 * SAMPLER_THREADS, /* tokens: a part is a multiple of it */
    SAMPLER_AHEAD = 3,                   /* groups on their way */
    SAMPLER_SELECTS = 5,
    SAMPLER_ID_BITS = 23, /* of a key of 55 */
    SAMPLER_IDS = 1 << SAMPLER_ID_BITS,
    SAMPLER_DIGITS = 5,
    SAMPLER_BITS = 11, /* of a digit */
    SAMPLER_BUCKETS = 1 << SAMPLER_BITS,
    SAMPLER_EACH = SAMPLER_BUCKETS / SAMPLER_THREADS,
    SAMPLER_WARPS = SAMPLER_THREADS / 32,
    SAMPLER_SHARED = (SAMPLER_BUCKETS + SAMPLER_WARPS + 3) * 8 /* bytes: histogram, sums, found */
};

/* The digit to find: of top_k FIND_COUNT to FIND_COUNT + 4, of top_p FIND_WEIGHT to …, of which the
 * first three sum weights; the logit is known then, and equals are counted. */
enum { FIND_FIRST, FIND_COUNT, FIND_WEIGHT = FIND_COUNT + SAMPLER_DIGITS, FIND_NOTHING = 100 };
#define SAMPLER_MOST (~0ull >> (64 - 32 - SAMPLER_ID_BITS)) /* key */

struct selection {
    int step;                /* one of these */
    sampler_key least, most; /* the key wanted lies between them; nothing left to find: least */
    sampler_key amount;      /* wanted of them */
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
    float max;           /* the largest scaled logit: set here */
};

/* ---- keys and weights ---- */

DEVICE float finite(float value) { /* NaN: the least; + 0: there is one zero */
    return fminf(fmaxf(value, -FLT_MAX), FLT_MAX) + 0.0f;
}

DEVICE sampler_key make_key(float scaled, int token) {
    uint32_t bits = __float_as_uint(scaled), id = SAMPLER_IDS - 1 - (uint32_t)token;
    bits ^= bits >> 31 ? 0xffffffffu : 0x80000000u;
    return (sampler_key)bits << SAMPLER_ID_BITS | id;
}

DEVICE int token_of_key(sampler_key key) {
    return (int)(~(uint32_t)key & (SAMPLER_IDS - 1));
}

DEVICE float scaled_of_key(sampler_key key) {
    uint32_t bits = (uint32_t)(key >> SAMPLER_ID_BITS);
    return __uint_as_float(bits >> 31 ? bits ^ 0x80000000u : ~bits);
}

DEVICE sampler_key weight_of(const struct draw &d, float scaled) { /* in units of 2^-40 */
    return (sampler_key)(expf(scaled - d.max) * 1099511627776.0f);
}

/* Finds the maximum. False: the largest logit wins without a race. */
DEVICE bool find_max(struct draw *d) {
    float largest = scaled_of_key(d->row->largest), t = d->sampling.temperature;
    d->max = finite(largest / t);
    return t > 0.0f && fmaxf(fabsf(largest), fabsf(d->max)) < FLT_MAX;
}

/* Keys, and the logits that may have them: most others are told without a division. */
struct range {
    sampler_key least, most;
    float low, high;
};

DEVICE struct range make_range(const struct draw &d, sampler_key least, sampler_key most) {
    float t = d.sampling.temperature, low = scaled_of_key(least), high = scaled_of_key(most);
    struct range range = {least, most, -INFINITY, INFINITY};
    if (low > -FLT_MAX) /* and not NaN: not a key of any logit */
        range.low = low * t - 1e-6f * fabsf(low * t) - 1e-44f * (t + 1.0f);
    if (high < FLT_MAX)
        range.high = high * t + 1e-6f * fabsf(high * t) + 1e-44f * (t + 1.0f);
    return range;
}

/* The token's key, or 0 where it is not in the range. */
DEVICE sampler_key key_within(const struct draw &d, const struct range &r, int token, float logit) {
    if (logit < r.low || logit > r.high)
        return 0;
    sampler_key key = make_key(finite(logit / d.sampling.temperature), token);
    return key >= r.least && key <= r.most ? key : 0;
}

/* ---- what the threads of a block do together ---- */

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
    for (int i = 0; i < SAMPLER_WARPS; i++)
        value = d.shared[i] > value ? d.shared[i] : value;
    return value;
}

/* Whether it is the last block of the row to arrive: it sees what the others wrote. */
DEVICE bool last_to_arrive(const struct draw &d) {
    __syncthreads();
    if (threadIdx.x == 0) {
        int before = add_ordered(&d.row->arrived, 1);
        d.shared[SAMPLER_BUCKETS] = before == d.n_parts - 1;
        if (before == d.n_parts - 1)
            d.row->arrived = 0;
    }
    __syncthreads();
    return d.shared[SAMPLER_BUCKETS] != 0;
}

/* Calls visit(token, logit) for tokens [first, end) in parts of 4; those in flight are loaded. */
template <typename Visit>
DEVICE void visit_tokens(const struct draw &d, int first, int end, Visit visit) {
    auto load = [&](int token) {
        return token < end ? *reinterpret_cast<const float4 *>(d.logits + token)
                           : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    };
    float4 ahead[SAMPLER_AHEAD];
    first += 4 * (int)threadIdx.x;
#pragma unroll
    for (int i = 0; i < SAMPLER_AHEAD; i++)
        ahead[i] = load(first + i * SAMPLER_GROUP);
#pragma unroll 1
    for (; first < end; first += SAMPLER_GROUP) {
        float4 now = ahead[0];
#pragma unroll
        for (int i = 1; i < SAMPLER_AHEAD; i++)
            ahead[i - 1] = ahead[i];
        ahead[SAMPLER_AHEAD - 1] = load(first + SAMPLER_AHEAD * SAMPLER_GROUP);
#pragma unroll 1
        for (int token = first; token < first + 4 && token < end; token++) {
            visit(token, now.x);
            now = make_float4(now.y, now.z, now.w, 0.0f);
        }
    }
}

DEVICE void sampler_maximum(const struct draw &d) {
    sampler_key largest = 0;
    visit_tokens(d, d.first, d.end, [&](int token, float logit) {
        sampler_key key = make_key(finite(logit), token);
        largest = key > largest ? key : largest;
    });
    largest = block_max(d, largest);
    if (threadIdx.x == 0)
        atomicMax(&d.row->largest, largest);
}

/* ---- what top_k and top_p keep ---- */

DEVICE int shift_of(const struct selection &s) { /* of the next digit */
    return SAMPLER_BITS * (SAMPLER_DIGITS - 1 - (s.step - FIND_COUNT) % SAMPLER_DIGITS);
}

/* Adds to a sum in shared memory, whose atomics are of 32 bits. */
DEVICE void add_shared(sampler_key *sum, sampler_key value) {
    unsigned *word = reinterpret_cast<unsigned *>(sum), high = (unsigned)(value >> 32);
    if (value > 0 && atomicAdd(word, (unsigned)value) > ~(unsigned)value)
        high++;
    if (high > 0)
        atomicAdd(word + 1, high);
}

/* The histogram of the next digit, in shared memory, of tokens [first, end). A thread sums those in
 * a row that have the same digit: if all had, they would wait for each other. */
DEVICE void count_tokens(const struct draw &d, const struct selection &s, int first, int end) {
    const int shift = shift_of(s);
    const bool weigh = s.step >= FIND_WEIGHT && s.step < FIND_WEIGHT + 3;
    const sampler_key heavy = weigh ? make_key(d.max - 28.0f, SAMPLER_IDS - 1) : 0; /* or 0 units */
    const struct range range = make_range(d, heavy > s.least ? heavy : s.least, s.most);
    int digit = 0;
    sampler_key sum = 0;
    for (int i = (int)threadIdx.x; i < SAMPLER_BUCKETS; i += SAMPLER_THREADS)
        d.shared[i] = 0;
    __syncthreads();
    visit_tokens(d, first, end, [&](int token, float logit) {
        sampler_key key = key_within(d, range, token, logit);
        if (key == 0)
            return;
        int next = (int)(key >> shift & (SAMPLER_BUCKETS - 1));
        if (next != digit) {
            add_shared(&d.shared[digit], sum);
            digit = next;
            sum = 0;
        }
        sum += weigh ? weight_of(d, scaled_of_key(key)) : 1;
    });
    add_shared(&d.shared[digit], sum);
    __syncthreads();
}

/* The digit, from its histogram. A thread has some buckets, those before it the higher ones. */
DEVICE void find_digit(const struct draw &d, struct selection *s) {
    sampler_key *sums = d.shared + SAMPLER_BUCKETS, *found = sums + SAMPLER_WARPS;
    const int shift = shift_of(*s), top = SAMPLER_BUCKETS - 1 - (int)threadIdx.x * SAMPLER_EACH;
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    sampler_key own = 0, total = 0, amount = s->amount;
    for (int i = 0; i < SAMPLER_EACH; i++)
        own += d.shared[top - i];
    sampler_key before = own; /* of those before it and its own, at first */
    for (int step = 1; step < 32; step *= 2) {
        sampler_key other = __shfl_up_sync(0xffffffffu, before, step);
        before += lane >= step ? other : 0;
    }
    if (lane == 31)
        sums[warp] = before;
    __syncthreads();
    for (int i = 0; i < SAMPLER_WARPS; total += sums[i++])
        before += i < warp ? sums[i] : 0;
    before -= own;
    if (s->step == FIND_WEIGHT)
        amount = (sampler_key)fmax(ceil((double)d.sampling.top_p * (double)total), 1.0);
    if (before < amount && amount <= before + own) { /* one thread */
        int digit = top;
        for (; before + d.shared[digit] < amount; digit--)
            before += d.shared[digit];
        found[0] = ((s->most >> shift >> SAMPLER_BITS << SAMPLER_BITS) + digit) << shift;
        found[1] = amount - before;
        found[2] = d.shared[digit];
        if (s->step == FIND_WEIGHT + 2) { /* from here on they are counted */
            sampler_key weight = weight_of(d, scaled_of_key(found[0]));
            found[1] = (found[1] + weight - 1) / weight;
            found[2] /= weight;
        }
    }
    __syncthreads();
    s->least = found[0] > s->least ? found[0] : s->least;
    s->most = found[0] + ((sampler_key)1 << shift) - 1;
    s->amount = found[1];
    s->step++;
    if (shift == 0 || found[1] == found[2]) { /* all of them */
        bool next = s->step <= FIND_WEIGHT && d.sampling.top_p < 1.0f;
        *s = {next ? FIND_WEIGHT : FIND_NOTHING, s->least, SAMPLER_MOST, 0};
    }
}

/* The histogram of the row out of those of its blocks, for the last one to arrive; else false. */
DEVICE bool gather_sums(const struct draw &d) {
    for (int i = (int)threadIdx.x; i < SAMPLER_BUCKETS; i += SAMPLER_THREADS)
        if (d.shared[i] > 0)
            atomicAdd(&d.row->sums[i], d.shared[i]);
    if (!last_to_arrive(d))
        return false;
#pragma unroll SAMPLER_EACH
    for (int i = (int)threadIdx.x; i < SAMPLER_BUCKETS; i += SAMPLER_THREADS) {
        d.shared[i] = d.row->sums[i];
        d.row->sums[i] = 0;
    }
    __syncthreads();
    return true;
}

/* The row's next digit. `rest`: then all that are left, by the last block alone. */
DEVICE void sampler_select(struct draw d, bool rest) {
    struct selection s = d.row->selection;
    if (s.step == FIND_FIRST)
        s = {sampler_counts(&d.sampling, d.n) ? FIND_COUNT
             : d.sampling.top_p < 1.0f        ? FIND_WEIGHT
                                              : FIND_NOTHING,
             0, SAMPLER_MOST, (sampler_key)d.sampling.top_k};
    if (!find_max(&d) || s.step == FIND_NOTHING)
        return;
    for (bool alone = false; !alone || (rest && s.step != FIND_NOTHING); alone = true) {
        int first = alone ? 0 : d.first, end = alone ? d.n : d.end;
        if (alone && shift_of(s) == 0) { /* ids that differ in the last digit */
            first = token_of_key(s.most);
            end = first + SAMPLER_BUCKETS < end ? first + SAMPLER_BUCKETS : end;
        }
        count_tokens(d, s, first, end);
        if (!alone && !gather_sums(d))
            return;
        find_digit(d, &s);
    }
    if (threadIdx.x == 0)
        d.row->selection = s;
}

/* ---- the race ---- */

/* g to 1e-4, without exact logarithms. */
DEVICE float rough_noise(uint32_t word) {
    float u = ((float)word + 0.5f) * 0x1p-32f, rest = ((float)~word + 0.5f) * 0x1p-32f;
    float series = rest * (1.0f + rest * (0.5f + rest * (1.0f / 3.0f + rest * 0.25f)));
    float wait = word < 0xe0000000u ? log2_approx(u) * -0.69314718f : series; /* -log(u) */
    return log2_approx(wait) * -0.69314718f;
}

/* In the race: scaled - max + g, in units of 2^-36 from -8 on, in the place of a key's logit. The
 * winner is above -4, for so is the largest. */
DEVICE sampler_key race_key(const struct draw &d, sampler_key key) {
    int token = token_of_key(key);
    double g = -log(-log(sampler_uniform(d.sampling.seed, d.position, token)));
    double value = (double)scaled_of_key(key) - (double)d.max + g;
    sampler_key units = value > -8.0 ? (sampler_key)((value + 8.0) * 0x1p36) : 0;
    return units << SAMPLER_ID_BITS | (key & (SAMPLER_IDS - 1));
}

/* The least key that top_k, top_p and min_p keep. */
DEVICE sampler_key least_kept(const struct draw &d) {
    sampler_key least = d.row->selection.least;
    if (!(d.sampling.min_p > 0.0f))
        return least;
    double exact = (double)d.max + log((double)d.sampling.min_p);
    sampler_key bits = make_key((float)exact, 0) >> SAMPLER_ID_BITS;
    bits += (double)(float)exact < exact;
    return bits << SAMPLER_ID_BITS > least ? bits << SAMPLER_ID_BITS : least;
}

/* The best of the block's part: roughly first, then exactly those that may be it. */
DEVICE sampler_key best_of_part(const struct draw &d) {
    const struct range kept = make_range(d, least_kept(d), SAMPLER_MOST);
    float best = -INFINITY, second = -INFINITY;
    sampler_key best_key = 0, winner = 0;
    visit_tokens(d, d.first, d.end, [&](int token, float logit) {
        sampler_key key = key_within(d, kept, token, logit);
        if (key == 0)
            return;
        float noise = rough_noise(sampler_word(d.sampling.seed, d.position, token));
        float value = scaled_of_key(key) - d.max + noise;
        second = fmaxf(second, fminf(best, value));
        best_key = value > best ? key : best_key;
        best = fmaxf(best, value);
    });
    float enough = scaled_of_key(block_max(d, make_key(best, 0))) - 1e-3f;
    if (best_key > 0 && best >= enough)
        for (int at = d.first + 4 * (int)threadIdx.x; at < d.end; at += SAMPLER_GROUP)
            for (int token = at; token < at + 4 && token < d.end; token++) {
                sampler_key key = key_within(d, kept, token, d.logits[token]);
                if (key > 0 && (key == best_key || second >= enough)) {
                    key = race_key(d, key);
                    winner = key > winner ? key : winner;
                }
            }
    return block_max(d, winner);
}

/* The last block of the row stores the token. */
DEVICE void sampler_race(struct draw d, int *drawn) {
    if (find_max(&d)) {
        sampler_key winner = best_of_part(d);
        if (threadIdx.x == 0)
            atomicMax(&d.row->winner, winner);
    }
    if (last_to_arrive(d) && threadIdx.x == 0) {
        *drawn = token_of_key(d.row->winner > 0 ? d.row->winner : d.row->largest);
        d.row->largest = d.row->winner = 0;
        d.row->selection = {};
    }
}
#endif /* SAMPLER_GPU_IMPLEMENTATION */
