/* kernels.c: the CPU backend, every op of the forward pass in plain C.
 *
 * Owns: a pool of threads, the packed weights, the activations of each device, and a copier
 * thread. Knows nothing of requests, of blocks beyond a step's block table, or of other backends.
 * It is also the specification of kernels.cu: where the two differ, this file is right.
 *
 * How data flows: `upload` packs a matrix once into *panels* of 64 outputs side by side for each k.
 * One small product kernel (64 outputs x 1 to 6 rows, held in registers) reads panels, and serves
 * decode, prefill and, on keys and values gathered into panels, attention too. An op cuts its work
 * into tiles, which the threads of the pool take one by one, those of decoding devices first.
 *
 * Invariants:
 *   - Each output element is summed over k in one fixed order that depends on its own row alone,
 *     and every loop over elements works on whole, padded vectors: so the bits do not depend on
 *     the batch, on chunking, on the number of threads or of shards.
 *   - Activation rows are padded with zeros to PAD elements, which no op ever overwrites.
 *   - A tile is run once; a job's fields are read only by who holds one of its tiles.
 *
 * Read next: `tile_product`, then `attention_tile`, then `parallel_for`. */
#include "dynamo.h"

#include <assert.h>
#include <float.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdalign.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#pragma GCC diagnostic ignored "-Wpsabi" /* vectors are passed between inlined functions only */

enum {
    LANES = 16,           /* floats in a vector */
    PANEL = 64,           /* outputs in a panel: 4 vectors, and 6 rows of them fill 24 registers */
    TILE_ROWS = 6,        /* rows that one call of the product kernel computes at most */
    DIRECT_ROWS = 12,     /* up to so many rows read a panel in its stored type */
    SLAB = 256,           /* k of a panel that are kept as f32 in L2 while many rows use them */
    ROW_CHUNK = 96,       /* rows of a product's tile: they pay for its slabs; 0.1 to 0.5 ms */
    QUERIES = 48,         /* queries of an attention tile */
    CHUNK = 64,           /* tokens whose scores are computed at a time: a panel of keys */
    MAX_HEAD_DIM = 256,   /* sizes the scratch of a thread */
    NORM_ROWS = 8,        /* rows of a tile of the cheap ops */
    PAD = 16,             /* activation rows are padded so; one more breaks strides of 2^n */
    Q8_BLOCK = 32,        /* k that share a scale */
    SPINS = 3000,         /* pauses (about 50 us) before an idle helper sleeps */
    YIELD_SPINS = 20000,  /* pauses before a waiting thread suspects that it is in the way */
    HUGE_PAGE = 2 << 20,  /* bytes: fewer misses of the TLB */
    MAX_COPY_DELAY = 2000 /* microseconds */
};
enum { Q8_PANEL_BYTES = PANEL * (2 + Q8_BLOCK), MAX_SLOTS = MAX_WORKERS * MAX_SHARDS };

/* ---- vectors ---- */

#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(64)));
typedef int32_t ivec __attribute__((vector_size(64)));
typedef float vec_any __attribute__((vector_size(64), aligned(4), may_alias)); /* unaligned */
typedef int32_t ivec_any __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t half_vec __attribute__((vector_size(32), aligned(2), may_alias));
typedef int16_t short_vec __attribute__((vector_size(32)));
typedef int8_t byte_vec __attribute__((vector_size(16), aligned(1), may_alias));

INLINE vec load(const float *from) {
    return *(const vec_any *)from;
}

INLINE void store(float *to, vec value) {
    *(vec_any *)to = value;
}

INLINE vec load_part(const float *from, int count) { /* missing elements are 0 */
    vec value = {0};
    if (count >= LANES)
        return load(from);
    memcpy(&value, from, sizeof(float) * (size_t)count);
    return value;
}

INLINE void store_part(float *to, vec value, int count) {
    if (count >= LANES)
        store(to, value);
    else
        memcpy(to, &value, sizeof(float) * (size_t)count);
}

INLINE vec select_vec(ivec mask, vec yes, vec no) {
    return (vec)((mask & (ivec)yes) | (~mask & (ivec)no));
}

INLINE vec max_vec(vec a, vec b) {
    return select_vec(a > b, a, b);
}

INLINE float sum_lanes(vec value) {
    float lanes[LANES];
    store(lanes, value);
    for (int step = LANES / 2; step > 0; step /= 2)
        for (int i = 0; i < step; i++)
            lanes[i] += lanes[i + step];
    return lanes[0];
}

INLINE float max_lanes(vec value) {
    float lanes[LANES];
    store(lanes, value);
    for (int step = LANES / 2; step > 0; step /= 2)
        for (int i = 0; i < step; i++)
            lanes[i] = lanes[i] > lanes[i + step] ? lanes[i] : lanes[i + step];
    return lanes[0];
}

/* e^x to 2 ulp (the polynomial of the Cephes library); 0 below -87, no more than e^88. */
INLINE vec exp_vec(vec x) {
    const vec zero = {0};
    const vec low = zero - 87.0f, high = zero + 88.0f;
    vec inside = -max_vec(-max_vec(x, low), -high);
    vec shifted = inside * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: rounds to a whole number */
    vec whole = shifted - 12582912.0f;
    vec rest = inside - whole * 0.693359375f;
    rest = rest + whole * 2.12194440e-4f;
    vec sum = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * (rest * rest) + rest + 1.0f;
    ivec power = __builtin_convertvector(whole, ivec) << 23;
    return select_vec(x < low, zero, (vec)((ivec)sum + power));
}

INLINE vec widen_bf16(const uint16_t *from) {
    return (vec)(__builtin_convertvector(*(const half_vec *)from, ivec) << 16);
}

/* One instruction where there is one: compilers take the general forms apart. Both are exact, but
 * for infinities and NaN, which no weight is. */
INLINE vec widen_f16(const uint16_t *from) {
#ifdef __AVX512F__
    return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)from));
#else
    ivec bits = __builtin_convertvector(*(const half_vec *)from, ivec);
    vec magnitude = (vec)((bits & 0x7fff) << 13) * 0x1p112f;
    return (vec)((ivec)magnitude | ((bits & 0x8000) << 16));
#endif
}

INLINE vec widen_int8(const char *from) {
#ifdef __AVX512F__
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)from)));
#else
    short_vec half = __builtin_convertvector(*(const byte_vec *)(const void *)from, short_vec);
    return __builtin_convertvector(__builtin_convertvector(half, ivec), vec);
#endif
}

static uint16_t to_bf16(float value) { /* to nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value)
        return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE void interleave(const vec from[LANES], vec to[LANES]) { /* row i with row i + 8 */
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        vec a = from[i], b = from[i + 8];
        to[2 * i] =
            __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        to[2 * i + 1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29,
                                                14, 30, 15, 31);
    }
}

INLINE void transpose(vec rows[LANES]) { /* four rounds turn a 16 x 16 matrix */
    vec next[LANES];
    interleave(rows, next);
    interleave(next, rows);
    interleave(rows, next);
    interleave(next, rows);
}

static size_t round_up(size_t value, size_t unit) {
    return (value + unit - 1) / unit * unit;
}

static int divide_up(int value, int unit) {
    return (value + unit - 1) / unit;
}

/* ---- types ---- */

/* A matrix, or a part of one: rows [first_row, first_row + n_rows) and columns alike of the packed
 * whole, `panels`, which the weight of the whole tensor owns. A vector is plain f32. */
struct weight {
    const struct tensor *tensor;
    enum tensor_type type;
    int first_row, n_rows, first_col, n_cols, cols; /* cols: of the whole */
    size_t panel_bytes;
    char *panels;  /* (rows / PANEL) panels; see pack_panel */
    float *vector; /* (n_cols), padded with zeros */
    bool owner;
    struct weight *next;
};

struct scratch { /* of one thread */
    alignas(64) float slab[SLAB * PANEL];
    float tile[5][ROW_CHUNK * PANEL];
    float query[QUERIES * MAX_HEAD_DIM], key[MAX_HEAD_DIM * PANEL];
    float value[MAX_HEAD_DIM / PANEL][CHUNK * PANEL];
    float output[MAX_HEAD_DIM / PANEL][QUERIES * PANEL];
};

typedef void tile_function(const void *argument, int tile, struct scratch *scratch);

/* What one device asks of the pool. `left` tiles are not yet taken, `done` are finished. */
struct job {
    alignas(128) atomic_int left;
    atomic_bool urgent;
    tile_function *run;
    const void *argument;
    int n_tiles;
    alignas(128) atomic_int done;
};

struct copy_order {
    struct cpu_device *device;
    enum stream stream;
    struct copy2d copy;
    struct copy_order *next;
};

struct cpu_backend {
    struct backend backend;
    /* the pool */
    struct job jobs[MAX_SLOTS];
    bool slot_used[MAX_SLOTS]; /* under `mutex` */
    atomic_int n_slots;        /* slots [n_slots, MAX_SLOTS) were never used */
    int n_threads, n_helpers;
    atomic_int active, sleepers; /* threads inside a step and awake helpers; sleeping helpers */
    atomic_bool stop;
    pthread_mutex_t mutex, pool_mutex, upload_mutex;
    pthread_cond_t wake;
    pthread_t *helpers; /* (n_helpers) */
    struct weight *weights;
    /* the copier */
    pthread_t copier;
    pthread_mutex_t copy_mutex;
    pthread_cond_t copy_wake, copy_idle;
    struct copy_order *first_copy; /* the running one stays in the list */
    uint64_t copy_delay_seed;
};

struct cpu_device {
    struct device device;
    struct cpu_backend *cpu;
    struct job *job;
    struct scratch *scratch; /* of the thread that drives it */
    const struct batch *batch;
    int n_heads, n_kv_heads, d_ff; /* of this shard */
    size_t x_stride, q_stride, kv_stride, ffn_stride;
    float *x, *h, *partial;       /* (max_rows, x_stride); h: the normed rows */
    float *q, *attention, *k, *v; /* (max_rows, q_stride), k, v (max_rows, kv_stride) */
    float *ffn;                   /* (max_rows, ffn_stride) */
    float *turn;                  /* (max_rows, rope_dim / 2, {cos, sin}) */
    float *logits;                /* (max_samples, vocab_size) */
    float *scaled;                /* (max_samples, vocab_size) logits / temperature */
    int *candidates;              /* (max_samples, vocab_size) of the sampler */
    int *sampled;                 /* (max_samples) */
    int *first_tile;              /* (max_rows + 1) attention tiles of a head before a sequence */
    atomic_uint_fast64_t copies[N_STREAMS], copied[N_STREAMS];
};

/* ---- the pool ---- */

static void pause_thread(int spins) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
    if (spins > YIELD_SPINS)
        sched_yield();
}

static bool run_tile(struct job *job, struct scratch *scratch) {
    int left = atomic_load_explicit(&job->left, memory_order_relaxed);
    do {
        if (left == 0)
            return false;
    } while (!atomic_compare_exchange_weak_explicit(&job->left, &left, left - 1,
                                                    memory_order_acquire, memory_order_relaxed));
    job->run(job->argument, job->n_tiles - left, scratch);
    atomic_fetch_add_explicit(&job->done, 1, memory_order_release);
    return true;
}

static bool run_any(struct cpu_backend *cpu, bool urgent, struct scratch *scratch) {
    int n_slots = atomic_load_explicit(&cpu->n_slots, memory_order_relaxed);
    for (int i = 0; i < n_slots; i++) {
        struct job *job = &cpu->jobs[i];
        if (atomic_load_explicit(&job->urgent, memory_order_relaxed) == urgent &&
            run_tile(job, scratch))
            return true;
    }
    return false;
}

static bool work_waits(struct cpu_backend *cpu) {
    int n_slots = atomic_load(&cpu->n_slots);
    for (int i = 0; i < n_slots; i++)
        if (atomic_load(&cpu->jobs[i].left) > 0)
            return true;
    return false;
}

/* Moves the count of active threads by `step` if it lies on that side of the limit. */
static bool change_active(struct cpu_backend *cpu, int step) {
    int active = atomic_load(&cpu->active);
    do {
        if (step > 0 ? active >= cpu->n_threads : active <= cpu->n_threads)
            return false;
    } while (!atomic_compare_exchange_weak(&cpu->active, &active, active + step));
    return true;
}

/* A helper that is not counted as active sleeps until there is work and room for it. */
static void park(struct cpu_backend *cpu) {
    pthread_mutex_lock(&cpu->pool_mutex);
    atomic_fetch_add(&cpu->sleepers, 1);
    while (!atomic_load(&cpu->stop) && !(work_waits(cpu) && change_active(cpu, 1)))
        pthread_cond_wait(&cpu->wake, &cpu->pool_mutex);
    atomic_fetch_sub(&cpu->sleepers, 1);
    pthread_mutex_unlock(&cpu->pool_mutex);
}

static void *helper_main(void *argument) {
    struct cpu_backend *cpu = argument;
    struct scratch *scratch = aligned_alloc(64, round_up(sizeof *scratch, 64));
    assert(scratch);
    park(cpu);
    for (int spins = 0; !atomic_load_explicit(&cpu->stop, memory_order_relaxed);) {
        if (change_active(cpu, -1)) {
            park(cpu);
        } else if (run_any(cpu, true, scratch) || run_any(cpu, false, scratch)) {
            spins = 0;
        } else if (++spins < SPINS) {
            pause_thread(spins);
        } else {
            atomic_fetch_sub(&cpu->active, 1);
            park(cpu);
            spins = 0;
        }
    }
    free(scratch);
    return NULL;
}

static void wake_helpers(struct cpu_backend *cpu, int n_wanted) {
    int sleepers = atomic_load(&cpu->sleepers);
    int room = cpu->n_threads - atomic_load(&cpu->active);
    if (sleepers == 0 || room <= 0)
        return;
    pthread_mutex_lock(&cpu->pool_mutex);
    for (int i = 0; i < n_wanted && i < room && i < sleepers; i++)
        pthread_cond_signal(&cpu->wake);
    pthread_mutex_unlock(&cpu->pool_mutex);
}

/* Runs tiles [0, n_tiles) on all threads; returns when all are done. A prefilling device's thread
 * takes decode tiles in between: they are short, and someone waits for them. */
static void parallel_for(struct cpu_device *device, int n_tiles, tile_function *run,
                         const void *argument) {
    struct cpu_backend *cpu = device->cpu;
    struct job *job = device->job;
    if (n_tiles == 1) {
        run(argument, 0, device->scratch);
        return;
    }
    bool urgent = device->device.urgent;
    job->run = run;
    job->argument = argument;
    job->n_tiles = n_tiles;
    atomic_store_explicit(&job->done, 0, memory_order_relaxed);
    atomic_store(&job->left, n_tiles);
    wake_helpers(cpu, n_tiles - 1);
    while ((!urgent && run_any(cpu, true, device->scratch)) || run_tile(job, device->scratch)) {
    }
    int spins = 0;
    while (atomic_load_explicit(&job->done, memory_order_acquire) < n_tiles)
        if (urgent || !run_any(cpu, true, device->scratch))
            pause_thread(spins++);
}

/* ---- weights ---- */

/* A panel holds, for 64 outputs (those past the last row are 0):
 *     F32, F16   [k][64]
 *     BF16       [k / 2][64][2]: also what a dot product of bf16 pairs wants
 *     Q8_0       [k / 32] { f16 scale[64]; int8 [32][64] }
 * An odd k is padded with zeros. */
static size_t panel_bytes(enum tensor_type type, int cols) {
    size_t n_k = round_up((size_t)cols, 2);
    switch (type) {
    case TYPE_F32: return n_k * PANEL * 4;
    case TYPE_F16:
    case TYPE_BF16: return n_k * PANEL * 2;
    case TYPE_Q8_0: return (size_t)cols / Q8_BLOCK * Q8_PANEL_BYTES;
    }
    return 0;
}

INLINE const char *q8_block(const char *panel, int k) {
    return panel + (size_t)(k / Q8_BLOCK) * Q8_PANEL_BYTES;
}

/* 64 weights of k as f32: vectors 0 to 3. `scale`: of k's block, for Q8_0. All types are exact. */
INLINE void load_weights(enum tensor_type type, const char *panel, int k, const vec scale[4],
                         vec out[4]) {
    size_t at = (size_t)k * PANEL;
    for (size_t i = 0; i < 4; i++) {
        if (type == TYPE_F32) {
            out[i] = load((const float *)(const void *)panel + at + i * LANES);
        } else if (type == TYPE_BF16) {
            const uint16_t *pairs = (const uint16_t *)(const void *)panel + (at & ~(size_t)PANEL);
            ivec pair = *(const ivec_any *)(const void *)(pairs + i * 2 * LANES);
            ivec value = k & 1 ? pair & (int32_t)0xffff0000 : pair << 16;
            out[i] = (vec)value;
        } else if (type == TYPE_F16) {
            out[i] = widen_f16((const uint16_t *)(const void *)panel + at + i * LANES);
        } else {
            const char *bytes = q8_block(panel, k) + 2 * PANEL + k % Q8_BLOCK * PANEL;
            out[i] = widen_int8(bytes + i * LANES) * scale[i];
        }
    }
}

INLINE void load_scales(enum tensor_type type, const char *panel, int k, vec scale[4]) {
    for (size_t i = 0; i < 4 && type == TYPE_Q8_0; i++)
        scale[i] = widen_f16((const uint16_t *)(const void *)q8_block(panel, k) + i * LANES);
}

INLINE int block_end(enum tensor_type type, int k, int end) { /* where the scale changes */
    int next = (k / Q8_BLOCK + 1) * Q8_BLOCK;
    return type == TYPE_Q8_0 && next < end ? next : end;
}

struct pack_job {
    const struct weight *weight;
    int rows;
};

static void pack_q8(const struct weight *weight, int first, int n, char *panel) {
    size_t n_blocks = (size_t)weight->cols / Q8_BLOCK, bytes = 2 + Q8_BLOCK;
    for (size_t block = 0; block < n_blocks; block++, panel += Q8_PANEL_BYTES) {
        for (int row = 0; row < n; row++) {
            const char *from = (const char *)weight->tensor->data +
                               ((size_t)(first + row) * n_blocks + block) * bytes;
            memcpy(panel + row * 2, from, 2);
            for (int k = 0; k < Q8_BLOCK; k++)
                panel[2 * PANEL + k * PANEL + row] = from[2 + k];
        }
    }
}

static void pack_panel(const void *argument, int index, struct scratch *scratch) {
    const struct pack_job *job = argument;
    const struct weight *weight = job->weight;
    (void)scratch;
    char *panel = weight->panels + (size_t)index * weight->panel_bytes;
    int first = index * PANEL, n = job->rows - first < PANEL ? job->rows - first : PANEL;
    size_t cols = (size_t)weight->cols;
    if (n < PANEL || (cols & 1))
        memset(panel, 0, weight->panel_bytes);
    if (weight->type == TYPE_Q8_0) {
        pack_q8(weight, first, n, panel);
        return;
    }
    size_t pair = weight->type == TYPE_BF16 ? 2 : 1;
    for (size_t start = 0; start < cols; start += 32) { /* so the panel's lines stay in L1 */
        size_t end = start + 32 < cols ? start + 32 : cols;
        for (size_t row = 0; row < (size_t)n; row++) {
            size_t from = ((size_t)first + row) * cols;
            for (size_t k = start; k < end; k++) {
                size_t to = (k / pair * PANEL + row) * pair + k % pair;
                if (weight->type == TYPE_F32) {
                    ((float *)(void *)panel)[to] = ((const float *)weight->tensor->data)[from + k];
                } else {
                    ((uint16_t *)(void *)panel)[to] =
                        ((const uint16_t *)weight->tensor->data)[from + k];
                }
            }
        }
    }
}

static bool fill_vector(struct weight *weight) {
    const struct tensor *tensor = weight->tensor;
    size_t padded = round_up((size_t)weight->cols, PAD);
    weight->vector = calloc(padded, sizeof(float));
    if (!weight->vector)
        return false;
    for (int i = 0; i < weight->cols; i++) {
        if (tensor->type == TYPE_F32) {
            memcpy(&weight->vector[i], (const float *)tensor->data + i, sizeof(float));
        } else {
            uint16_t bits[LANES] = {((const uint16_t *)tensor->data)[i]};
            weight->vector[i] = tensor->type == TYPE_F16 ? widen_f16(bits)[0] : widen_bf16(bits)[0];
        }
    }
    return true;
}

static struct weight *pack(struct cpu_device *device, const struct tensor *tensor) {
    struct weight *weight = calloc(1, sizeof *weight);
    if (!weight)
        return NULL;
    *weight = (struct weight){.tensor = tensor, .type = tensor->type, .owner = true};
    weight->n_rows = (int)tensor->rows;
    weight->n_cols = weight->cols = (int)tensor->cols;
    if (tensor->rows == 1 && tensor->type != TYPE_Q8_0) {
        if (!fill_vector(weight)) {
            free(weight);
            return NULL;
        }
        return weight;
    }
    int n_panels = divide_up(weight->n_rows, PANEL);
    weight->panel_bytes = panel_bytes(tensor->type, weight->cols);
    weight->panels = device->device.backend->alloc(&device->device,
                                                   (size_t)n_panels * weight->panel_bytes, false);
    if (!weight->panels) {
        free(weight);
        return NULL;
    }
    struct pack_job job = {weight, weight->n_rows};
    atomic_fetch_add(&device->cpu->active, 1);
    parallel_for(device, n_panels, pack_panel, &job);
    atomic_fetch_sub(&device->cpu->active, 1);
    return weight;
}

static struct weight *add_weight(struct cpu_backend *cpu, struct weight *weight) {
    if (weight) {
        weight->next = cpu->weights;
        cpu->weights = weight;
    }
    return weight;
}

static void cut(struct weight *view, struct slice slice) {
    bool columns = slice.kind == SLICE_COLS || view->vector;
    int *first = columns ? &view->first_col : &view->first_row;
    int *count = columns ? &view->n_cols : &view->n_rows;
    *count /= slice.count;
    *first = slice.rank * *count;
    if (view->vector)
        view->vector += *first;
    view->owner = false;
}

static const struct weight *cpu_upload(struct device *base, const struct tensor *tensor,
                                       struct slice slice, char *error) {
    struct cpu_device *device = (struct cpu_device *)base;
    struct cpu_backend *cpu = device->cpu;
    pthread_mutex_lock(&cpu->upload_mutex);
    struct weight *weight = cpu->weights;
    while (weight && !(weight->owner && weight->tensor == tensor))
        weight = weight->next;
    if (!weight)
        weight = add_weight(cpu, pack(device, tensor));
    if (weight && slice.kind != SLICE_WHOLE) {
        struct weight *view = malloc(sizeof *view);
        if (view) {
            *view = *weight;
            cut(view, slice);
        }
        weight = add_weight(cpu, view);
    }
    pthread_mutex_unlock(&cpu->upload_mutex);
    if (!weight) {
        snprintf(error, GGUF_ERROR_LENGTH, "%.*s: no memory for %zu bytes of weights",
                 (int)tensor->name.length, tensor->name.data, tensor->bytes);
    }
    return weight;
}

/* ---- products ---- */

/* out[row][64] (+)= sum over k in [begin, end) of input[row][k] * weight[k][64] */
struct tile {
    const char *panel;
    int begin, end;     /* k of the panel; begin is even */
    const float *input; /* (rows, stride), the first column is k = begin */
    size_t stride;
    float *out; /* (rows, PANEL) */
    bool add;
};

/* The heart of this file: n_rows x 4 sums stay in registers over all of k. `type` and `n_rows` are
 * constants where it is inlined; each sum is one chain over k, whatever they are. */
INLINE void tile_product(enum tensor_type type, int n_rows, const struct tile *tile) {
    vec sum[TILE_ROWS][4];
#pragma GCC unroll 6
    for (int row = 0; row < n_rows; row++)
        for (int i = 0; i < 4; i++)
            sum[row][i] = tile->add ? load(tile->out + row * PANEL + i * LANES) : (vec){0};
    const float *input = tile->input;
    const char *panel = tile->panel;
    size_t stride = tile->stride;
    for (int k = tile->begin; k < tile->end;) {
        int end = block_end(type, k, tile->end);
        vec scale[4], weights[4];
        load_scales(type, panel, k, scale);
        for (; k < end; k += 2, input += 2) {
            for (int odd = 0; odd < 2; odd++) {
                load_weights(type, panel, k + odd, scale, weights);
                for (int row = 0; row < n_rows; row++) {
                    float factor = input[(size_t)row * stride + (size_t)odd];
                    for (int i = 0; i < 4; i++)
                        sum[row][i] += factor * weights[i];
                }
            }
        }
    }
    for (int row = 0; row < n_rows; row++)
        for (int i = 0; i < 4; i++)
            store(tile->out + row * PANEL + i * LANES, sum[row][i]);
}

#define TILE_KERNEL(type, rows)                                                                    \
    static void tile_##type##_##rows(const struct tile *tile) {                                    \
        tile_product(TYPE_##type, rows, tile);                                                     \
    }
#define TILE_KERNELS(type)                                                                         \
    TILE_KERNEL(type, 1)                                                                           \
    TILE_KERNEL(type, 2)                                                                           \
    TILE_KERNEL(type, 3)                                                                           \
    TILE_KERNEL(type, 4)                                                                           \
    TILE_KERNEL(type, 5)                                                                           \
    TILE_KERNEL(type, 6)                                                                           \
    static void (*const tile_##type[])(const struct tile *) = {tile_##type##_1, tile_##type##_2,   \
                                                               tile_##type##_3, tile_##type##_4,   \
                                                               tile_##type##_5, tile_##type##_6};

TILE_KERNELS(F32)
TILE_KERNELS(F16)
TILE_KERNELS(BF16)
TILE_KERNELS(Q8_0)

/* The tile for any number of rows, in groups of like size. */
static void tile_rows(enum tensor_type type, struct tile tile, int n_rows) {
    void (*const *kernels)(const struct tile *) = type == TYPE_F32    ? tile_F32
                                                  : type == TYPE_F16  ? tile_F16
                                                  : type == TYPE_BF16 ? tile_BF16
                                                                      : tile_Q8_0;
    for (int groups = divide_up(n_rows, TILE_ROWS); groups > 0; groups--) {
        int n = divide_up(n_rows, groups);
        kernels[n - 1](&tile);
        tile.input += (size_t)n * tile.stride;
        tile.out += n * PANEL;
        n_rows -= n;
    }
}

INLINE void widen_as(enum tensor_type type, const char *panel, int begin, int end, float *slab) {
    for (int k = begin; k < end;) {
        int stop = block_end(type, k, end);
        vec scale[4], weights[4];
        load_scales(type, panel, k, scale);
        for (; k < stop; k++, slab += PANEL) {
            load_weights(type, panel, k, scale, weights);
            for (int i = 0; i < 4; i++)
                store(slab + i * LANES, weights[i]);
        }
    }
}

static void widen(enum tensor_type type, const char *panel, int begin, int end, float *slab) {
    if (type == TYPE_BF16)
        widen_as(TYPE_BF16, panel, begin, end, slab);
    else if (type == TYPE_F16)
        widen_as(TYPE_F16, panel, begin, end, slab);
    else
        widen_as(TYPE_Q8_0, panel, begin, end, slab);
}

/* out (n_rows, PANEL) = input . weights over k in [begin, end) of a panel. Many rows first turn a
 * slab of the panel into f32, and keep their sums in `out` from slab to slab: the same bits. */
static void panel_product(enum tensor_type type, struct tile tile, int n_rows,
                          struct scratch *scratch) {
    int begin = tile.begin, end = tile.end;
    const char *panel = tile.panel;
    if (begin >= end) {
        memset(tile.out, 0, sizeof(float) * (size_t)n_rows * PANEL);
    } else if (n_rows <= TILE_ROWS) {
        tile_rows(type, tile, n_rows);
        return;
    }
    for (int k = begin; k < end; k += SLAB) {
        tile.begin = k;
        tile.end = k + SLAB < end ? k + SLAB : end;
        tile.add = k > begin;
        if (type == TYPE_F32 || n_rows <= DIRECT_ROWS) {
            tile_rows(type, tile, n_rows);
        } else {
            widen(type, panel, tile.begin, tile.end + (tile.end & 1), scratch->slab);
            tile.panel = (const char *)scratch->slab;
            tile.end -= tile.begin;
            tile.begin = 0;
            tile_rows(TYPE_F32, tile, n_rows);
        }
        tile.input += SLAB;
    }
}

/* Sums segments [first, first + count) of K, a power of two of them, as a binary tree. */
static void segment_product(const struct weight *matrix, int unit, int first, int count,
                            struct tile tile, int n_rows, struct scratch *scratch, int depth) {
    if (count > 1) {
        int half = count / 2;
        segment_product(matrix, unit, first, half, tile, n_rows, scratch, depth);
        float *sum = tile.out;
        tile.out = scratch->tile[depth + 1];
        segment_product(matrix, unit, first + half, half, tile, n_rows, scratch, depth + 1);
        for (int i = 0; i < n_rows * PANEL; i += LANES)
            store(sum + i, load(sum + i) + load(tile.out + i));
        return;
    }
    int64_t n_units = divide_up(matrix->cols, unit);
    tile.begin = (int)(first * n_units / K_SEGMENTS) * unit;
    tile.end = (int)((first + 1) * n_units / K_SEGMENTS) * unit;
    tile.end = tile.end < matrix->cols ? tile.end : matrix->cols;
    tile.input += tile.begin - matrix->first_col;
    panel_product(matrix->type, tile, n_rows, scratch);
}

enum product_kind { PRODUCT_STORE, PRODUCT_SILU, PRODUCT_SEGMENTS };

struct product { /* up to three matrices times the same rows */
    enum product_kind kind;
    const struct weight *matrix[3], *bias[3]; /* bias: NULL, or (n_rows of the matrix) */
    float *out[3];                            /* (n_rows, out_stride) */
    size_t out_stride[3];
    int first_tile[4];  /* tiles before each matrix */
    const float *input; /* (n_rows, stride) */
    size_t stride;
    int n_rows, chunk_rows, n_chunks;
    int unit, first_segment, n_segments; /* PRODUCT_SEGMENTS */
    bool add;                            /* out += */
};

static void finish_row(const struct product *product, int which, int row, int begin, int end,
                       const float *sums) {
    float *out = product->out[which] + (size_t)row * product->out_stride[which];
    const struct weight *bias = product->bias[which];
    for (int i = 0; i < end - begin; i += LANES) {
        int n = end - begin - i;
        vec value = load(sums + i);
        if (bias)
            value += load_part(bias->vector + begin + i, n);
        if (product->add)
            value += load_part(out + begin + i, n);
        store_part(out + begin + i, value, n);
    }
}

static void silu_multiply(float *gate, const float *up, int count) { /* gate = silu(gate) * up */
    for (int i = 0; i < count; i += LANES) {
        vec value = load(gate + i);
        store(gate + i, value / (exp_vec(-value) + 1.0f) * load(up + i));
    }
}

/* One panel (of gate and of up, for PRODUCT_SILU) times one chunk of rows. */
static void product_tile(const void *argument, int index, struct scratch *scratch) {
    const struct product *product = argument;
    int which = 0;
    while (index >= product->first_tile[which + 1])
        which++;
    index -= product->first_tile[which];
    const struct weight *matrix = product->matrix[which];
    int panel = matrix->first_row / PANEL + index / product->n_chunks;
    int row = index % product->n_chunks * product->chunk_rows;
    int n_rows = product->n_rows - row;
    n_rows = n_rows < product->chunk_rows ? n_rows : product->chunk_rows;
    size_t offset = (size_t)panel * matrix->panel_bytes;
    struct tile tile = {.panel = matrix->panels + offset,
                        .end = matrix->cols,
                        .input = product->input + (size_t)row * product->stride,
                        .stride = product->stride,
                        .out = scratch->tile[0]};
    if (product->kind == PRODUCT_SEGMENTS) {
        segment_product(matrix, product->unit, product->first_segment, product->n_segments, tile,
                        n_rows, scratch, 0);
    } else {
        panel_product(matrix->type, tile, n_rows, scratch);
    }
    if (product->kind == PRODUCT_SILU) {
        const struct weight *up = product->matrix[1];
        tile.panel = up->panels + (size_t)panel * up->panel_bytes;
        tile.out = scratch->tile[1];
        panel_product(up->type, tile, n_rows, scratch);
        silu_multiply(scratch->tile[0], scratch->tile[1], n_rows * PANEL);
    }
    /* a shard may start and end inside a panel */
    int begin = panel * PANEL - matrix->first_row, end = begin + PANEL;
    int from = begin < 0 ? -begin : 0;
    end = end < matrix->n_rows ? end : matrix->n_rows;
    for (int i = 0; i < n_rows; i++)
        finish_row(product, which, row + i, begin + from, end, scratch->tile[0] + i * PANEL + from);
}

static void run_product(struct cpu_device *device, struct product *product, int n_matrices) {
    int n_chunks = divide_up(product->n_rows, ROW_CHUNK);
    if (n_chunks == 0)
        return;
    int rows = (int)round_up((size_t)divide_up(product->n_rows, n_chunks), TILE_ROWS);
    product->chunk_rows = rows;
    product->n_chunks = divide_up(product->n_rows, rows);
    int n_tiles = 0;
    for (int i = 0; i < n_matrices; i++) {
        const struct weight *matrix = product->matrix[i];
        int first = matrix->first_row / PANEL;
        n_tiles +=
            (divide_up(matrix->first_row + matrix->n_rows, PANEL) - first) * product->n_chunks;
        product->first_tile[i + 1] = n_tiles;
    }
    parallel_for(device, n_tiles, product_tile, product);
}

/* ---- cheap ops over rows ---- */

/* out = x / sqrt(mean(x^2) + epsilon) * weight, over n elements */
static void rmsnorm(float *out, const float *x, const float *weight, int n, float epsilon) {
    vec squares = {0};
    for (int i = 0; i < n; i += LANES) {
        vec value = load_part(x + i, n - i);
        squares += value * value;
    }
    float scale = 1.0f / sqrtf(sum_lanes(squares) / (float)n + epsilon);
    for (int i = 0; i < n; i += LANES) {
        vec value = load_part(x + i, n - i) * scale * load_part(weight + i, n - i);
        store_part(out + i, value, n - i);
    }
}

struct row_job {
    struct cpu_device *device;
    const struct weight *weight;
    const struct layer_weights *layer;
    const int *rows; /* (n_rows) row of x that each row is made from; NULL: its own */
    struct cpu_device **shards;
    int n_rows, n_shards, layer_index;
    void (*run)(const struct row_job *job, int row);
};

static void row_tile(const void *argument, int tile, struct scratch *scratch) {
    const struct row_job *job = argument;
    (void)scratch;
    int end = (tile + 1) * NORM_ROWS < job->n_rows ? (tile + 1) * NORM_ROWS : job->n_rows;
    for (int row = tile * NORM_ROWS; row < end; row++)
        job->run(job, row);
}

static void for_rows(const struct row_job *job) {
    int n_tiles = divide_up(job->n_rows, NORM_ROWS);
    if (n_tiles > 0)
        parallel_for(job->device, n_tiles, row_tile, job);
}

static void norm_row(const struct row_job *job, int row) {
    struct cpu_device *device = job->device;
    size_t from = (size_t)(job->rows ? job->rows[row] : row);
    rmsnorm(device->h + (size_t)row * device->x_stride, device->x + from * device->x_stride,
            job->weight->vector, device->device.config->d_model,
            device->device.config->norm_epsilon);
}

static void norm_rows(struct cpu_device *device, const struct weight *weight, const int *rows,
                      int n_rows) {
    struct row_job job = {
        .device = device, .weight = weight, .rows = rows, .n_rows = n_rows, .run = norm_row};
    for_rows(&job);
}

static void embed_row(const struct row_job *job, int row) {
    const struct weight *table = job->weight;
    int token = job->device->batch->token[row];
    const char *panel = table->panels + (size_t)(token / PANEL) * table->panel_bytes;
    float *x = job->device->x + (size_t)row * job->device->x_stride;
    for (int k = 0; k < table->cols; k++) {
        vec scale[4], weights[4];
        load_scales(table->type, panel, k, scale);
        load_weights(table->type, panel, k, scale, weights);
        x[k] = weights[token % PANEL / LANES][token % LANES];
    }
}

static void cpu_embed(struct device *base, const struct weight *token_embd) {
    struct cpu_device *device = (struct cpu_device *)base;
    struct row_job job = {
        .device = device, .weight = token_embd, .n_rows = device->batch->n_rows, .run = embed_row};
    for_rows(&job);
}

static void turn_row(const struct row_job *job, int row) { /* the angles of a position */
    const struct device *device = &job->device->device;
    size_t n = (size_t)device->config->rope_dim / 2;
    float *turn = job->device->turn + (size_t)row * n * 2;
    for (size_t i = 0; i < n; i++) {
        double angle =
            (double)job->device->batch->position[row] * (double)device->rope_frequency[i];
        turn[2 * i] = (float)cos(angle);
        turn[2 * i + 1] = (float)sin(angle);
    }
}

static void rope(const struct cpu_device *device, float *head, int row) {
    const struct model_config *config = device->device.config;
    int n = config->rope_dim / 2;
    const float *turn = device->turn + (size_t)row * (size_t)n * 2;
    for (int i = 0; i < n; i++) {
        float *a = config->rope_adjacent ? head + 2 * i : head + i;
        float *b = config->rope_adjacent ? a + 1 : a + n;
        float first = *a, second = *b, cosine = turn[2 * i], sine = turn[2 * i + 1];
        *a = first * cosine - second * sine;
        *b = first * sine + second * cosine;
    }
}

/* Where (head_dim) of a token begin, in elements: its block is (n_layers, {k, v}, heads, 16, dim)
 */
static size_t kv_offset(const struct cpu_device *device, int slot, int layer, int value, int head,
                        int token) {
    const struct model_config *config = device->device.config;
    enum kv_type type = device->device.kv_type;
    size_t dim = (size_t)config->head_dim, heads = (size_t)device->n_kv_heads;
    size_t block = block_bytes(config, device->device.n_shards, type) / kv_element_bytes(type);
    size_t plane = (size_t)(layer * 2 + value) * heads + (size_t)head;
    return (size_t)slot * block + (plane * BLOCK_TOKENS + (size_t)token) * dim;
}

static void append_head(const struct cpu_device *device, size_t to, const float *from) {
    size_t dim = (size_t)device->device.config->head_dim;
    if (device->device.kv_type == KV_F32) {
        memcpy((float *)device->device.kv + to, from, dim * sizeof(float));
        return;
    }
    for (size_t i = 0; i < dim; i++)
        ((uint16_t *)device->device.kv)[to + i] = to_bf16(from[i]);
}

static void rope_append_row(const struct row_job *job, int row) {
    struct cpu_device *device = job->device;
    const struct batch *batch = device->batch;
    const struct model_config *config = device->device.config;
    const struct sequence *sequence = &batch->sequence[batch->row_sequence[row]];
    const struct weight *q_norm = job->layer->attn_q_norm, *k_norm = job->layer->attn_k_norm;
    float *q = device->q + (size_t)row * device->q_stride;
    for (int head = 0; head < device->n_heads; head++, q += config->head_dim) {
        if (q_norm)
            rmsnorm(q, q, q_norm->vector, config->head_dim, config->norm_epsilon);
        rope(device, q, row);
    }
    float *k = device->k + (size_t)row * device->kv_stride;
    float *v = device->v + (size_t)row * device->kv_stride;
    int token = batch->position[row] % BLOCK_TOKENS;
    int slot = batch->block_table[sequence->first_block + batch->position[row] / BLOCK_TOKENS];
    for (int head = 0; head < device->n_kv_heads; head++) {
        if (k_norm)
            rmsnorm(k, k, k_norm->vector, config->head_dim, config->norm_epsilon);
        rope(device, k, row);
        append_head(device, kv_offset(device, slot, job->layer_index, 0, head, token), k);
        append_head(device, kv_offset(device, slot, job->layer_index, 1, head, token), v);
        k += config->head_dim;
        v += config->head_dim;
    }
}

static void cpu_rope_append(struct device *base, const struct layer_weights *layer,
                            int layer_index) {
    struct cpu_device *device = (struct cpu_device *)base;
    struct row_job job = {.device = device,
                          .layer = layer,
                          .layer_index = layer_index,
                          .n_rows = device->batch->n_rows,
                          .run = rope_append_row};
    for_rows(&job);
}

static void cpu_norm_qkv(struct device *base, const struct layer_weights *layer) {
    struct cpu_device *device = (struct cpu_device *)base;
    norm_rows(device, layer->attn_norm, NULL, device->batch->n_rows);
    struct product product = {
        .matrix = {layer->attn_q, layer->attn_k, layer->attn_v},
        .bias = {layer->q_bias, layer->k_bias, layer->v_bias},
        .out = {device->q, device->k, device->v},
        .out_stride = {device->q_stride, device->kv_stride, device->kv_stride},
        .input = device->h,
        .stride = device->x_stride,
        .n_rows = device->batch->n_rows};
    run_product(device, &product, 3);
}

static void cpu_norm_gate_up(struct device *base, const struct layer_weights *layer) {
    struct cpu_device *device = (struct cpu_device *)base;
    norm_rows(device, layer->ffn_norm, NULL, device->batch->n_rows);
    struct product product = {.kind = PRODUCT_SILU,
                              .matrix = {layer->ffn_gate, layer->ffn_up},
                              .out = {device->ffn},
                              .out_stride = {device->ffn_stride},
                              .input = device->h,
                              .stride = device->x_stride,
                              .n_rows = device->batch->n_rows};
    run_product(device, &product, 1);
}

/* Segments end between heads, or at an even k: where any number of shards cuts the matrix. */
static void cpu_project_add(struct device *base, const struct weight *matrix,
                            enum product_input input) {
    struct cpu_device *device = (struct cpu_device *)base;
    bool attends = input == INPUT_ATTENTION;
    int n_segments = K_SEGMENTS / base->n_shards;
    struct product product = {.kind = PRODUCT_SEGMENTS,
                              .matrix = {matrix},
                              .out = {base->n_shards == 1 ? device->x : device->partial},
                              .out_stride = {device->x_stride},
                              .input = attends ? device->attention : device->ffn,
                              .stride = attends ? device->q_stride : device->ffn_stride,
                              .n_rows = device->batch->n_rows,
                              .unit = attends ? base->config->head_dim : 2,
                              .first_segment = base->rank * n_segments,
                              .n_segments = n_segments,
                              .add = base->n_shards == 1};
    run_product(device, &product, 1);
}

static void reduce_row(const struct row_job *job, int row) {
    size_t at = (size_t)row * job->device->x_stride;
    for (int i = 0; i < job->device->device.config->d_model; i += LANES, at += LANES) {
        vec sum[MAX_SHARDS];
        for (int shard = 0; shard < job->n_shards; shard++)
            sum[shard] = load(job->shards[shard]->partial + at);
        for (int n = job->n_shards; n > 1; n /= 2)
            for (int j = 0; j < n / 2; j++)
                sum[j] = sum[2 * j] + sum[2 * j + 1];
        vec total = load(job->device->x + at) + sum[0];
        for (int shard = 0; shard < job->n_shards; shard++)
            store(job->shards[shard]->x + at, total);
    }
}

static void cpu_all_reduce_add(struct device **shards, int n_shards) {
    struct cpu_device *device = (struct cpu_device *)shards[0];
    if (n_shards == 1)
        return; /* project_add has done it */
    struct row_job job = {.device = device,
                          .shards = (struct cpu_device **)shards,
                          .n_shards = n_shards,
                          .n_rows = device->batch->n_rows,
                          .run = reduce_row};
    for_rows(&job);
}

static void cpu_norm_logits(struct device *base, const struct weights *weights) {
    struct cpu_device *device = (struct cpu_device *)base;
    const struct batch *batch = device->batch;
    norm_rows(device, weights->output_norm, batch->sample_row, batch->n_samples);
    struct product product = {.matrix = {weights->output},
                              .out = {device->logits},
                              .out_stride = {(size_t)base->config->vocab_size},
                              .input = device->h,
                              .stride = device->x_stride,
                              .n_rows = batch->n_samples};
    run_product(device, &product, 1);
}

/* ---- attention ---- */

struct attention_job {
    const struct cpu_device *device;
    int layer;
};

struct softmax {      /* of one query, over the tokens seen so far */
    float max, scale; /* scale: what the sums of earlier chunks must be multiplied by */
    vec sum;          /* lane by lane; lanes are added at the end */
};

INLINE vec load_kv(const struct cpu_device *device, size_t at, int n) {
    if (device->device.kv_type == KV_F32)
        return load_part((const float *)device->device.kv + at, n);
    const uint16_t *from = (const uint16_t *)device->device.kv + at;
    uint16_t bits[LANES] = {0};
    if (n >= LANES)
        return widen_bf16(from);
    memcpy(bits, from, sizeof *bits * (size_t)n);
    return widen_bf16(bits);
}

/* Brings tokens [start, start + n) of a head from their blocks into a panel of keys [dim][64] and
 * panels of values [dim / 64][token][64]. What lies beyond the last token may be anything. */
static void gather(const struct attention_job *job, const int *table, int head, int start, int n,
                   struct scratch *scratch) {
    const struct cpu_device *device = job->device;
    int dim = device->device.config->head_dim;
    for (int panel = 0; panel * PANEL < dim && n < CHUNK; panel++)
        memset(scratch->value[panel] + n * PANEL, 0, sizeof(float) * PANEL); /* n may be odd */
    for (int first = 0; first < n; first += BLOCK_TOKENS) {
        int slot = table[(start + first) / BLOCK_TOKENS];
        int tokens = n - first < BLOCK_TOKENS ? n - first : BLOCK_TOKENS;
        size_t key = kv_offset(device, slot, job->layer, 0, head, 0);
        size_t value = kv_offset(device, slot, job->layer, 1, head, 0);
        for (int at = 0; at < dim; at += LANES) {
            vec rows[LANES];
            for (int i = 0; i < LANES; i++) {
                int token = i < tokens ? i : 0; /* the block may end here */
                rows[i] = load_kv(device, key + (size_t)(token * dim + at), dim - at);
            }
            transpose(rows);
            for (int i = 0; i < LANES; i++)
                store(scratch->key + (at + i) * PANEL + first, rows[i]);
            float *values = scratch->value[at / PANEL] + first * PANEL + at % PANEL;
            for (int i = 0; i < tokens; i++)
                store(values + i * PANEL,
                      load_kv(device, value + (size_t)(i * dim + at), dim - at));
        }
    }
}

/* scores (64) become exp(score - max) of the first `visible` of them, and 0. */
static void softmax_chunk(float *scores, int visible, struct softmax *state) {
    const ivec count = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const vec zero = {0}, none = zero - INFINITY;
    vec value[CHUNK / LANES], largest = none;
    for (int i = 0; i < CHUNK / LANES; i++) {
        value[i] = select_vec(count + i * LANES < visible, load(scores + i * LANES), none);
        largest = max_vec(value[i], largest);
    }
    float max = max_lanes(largest);
    max = max > state->max ? max : state->max;
    state->scale = exp_vec(zero + (state->max - max))[0];
    state->max = max;
    state->sum = state->sum * state->scale;
    for (int i = 0; i < CHUNK / LANES; i++) {
        vec part = exp_vec(value[i] - max);
        store(scores + i * LANES, part);
        state->sum += part;
    }
}

/* Scores of one chunk of tokens for n queries, then their share of the output. */
static void attend_chunk(int start, int dim, int n, const int *position, struct softmax *state,
                         struct scratch *scratch) {
    float *scores = scratch->tile[0];
    struct tile tile = {.panel = (const char *)scratch->key,
                        .end = dim,
                        .input = scratch->query,
                        .stride = MAX_HEAD_DIM,
                        .out = scores};
    tile_rows(TYPE_F32, tile, n);
    int last = position[n - 1] - start + 1;
    for (int i = 0; i < n; i++) {
        softmax_chunk(scores + i * PANEL, position[i] - start + 1, &state[i]);
        for (int at = 0; at < dim; at += LANES) {
            float *output = scratch->output[at / PANEL] + i * PANEL + at % PANEL;
            store(output, load(output) * state[i].scale + 0.0f); /* + 0: never -0 */
        }
    }
    for (int panel = 0; panel * PANEL < dim; panel++) {
        struct tile values = {.panel = (const char *)scratch->value[panel],
                              .end = last < CHUNK ? last : CHUNK,
                              .input = scores,
                              .stride = PANEL,
                              .out = scratch->output[panel],
                              .add = true};
        tile_rows(TYPE_F32, values, n);
    }
}

/* Queries of one sequence and one KV head: (row, head of the group), flattened. A softmax over
 * chunks of 64 tokens, in order from token 0: what a row sees does not depend on its neighbours. */
static void attention_tile(const void *argument, int index, struct scratch *scratch) {
    const struct attention_job *job = argument;
    const struct cpu_device *device = job->device;
    const struct batch *batch = device->batch;
    int dim = device->device.config->head_dim, group = device->n_heads / device->n_kv_heads;
    int head = index % device->n_kv_heads, which = 0;
    index =
        device->first_tile[batch->n_sequences] - 1 - index / device->n_kv_heads; /* long first */
    while (index >= device->first_tile[which + 1])
        which++;
    const struct sequence *sequence = &batch->sequence[which];
    int first = (index - device->first_tile[which]) * QUERIES;
    int n = sequence->n_rows * group - first < QUERIES ? sequence->n_rows * group - first : QUERIES;
    int position[QUERIES] = {0};
    size_t at[QUERIES];
    struct softmax state[QUERIES];
    float scale = 1.0f / sqrtf((float)dim);
    for (int i = 0; i < n; i++) {
        int row = (first + i) / group, own_head = head * group + (first + i) % group;
        position[i] = sequence->start + row;
        at[i] = (size_t)(sequence->first_row + row) * device->q_stride + (size_t)(own_head * dim);
        state[i] = (struct softmax){.max = -INFINITY};
        for (int j = 0; j < dim; j++)
            scratch->query[i * MAX_HEAD_DIM + j] = device->q[at[i] + (size_t)j] * scale;
    }
    for (int panel = 0; panel * PANEL < dim; panel++)
        memset(scratch->output[panel], 0, sizeof(float) * (size_t)n * PANEL);
    for (int start = 0; start <= position[n - 1]; start += CHUNK) {
        int tokens = position[n - 1] + 1 - start;
        gather(job, batch->block_table + sequence->first_block, head, start,
               tokens < CHUNK ? tokens : CHUNK, scratch);
        attend_chunk(start, dim, n, position, state, scratch);
    }
    for (int i = 0; i < n; i++) {
        float sum = sum_lanes(state[i].sum);
        for (int j = 0; j < dim; j += LANES) {
            vec value = load(scratch->output[j / PANEL] + i * PANEL + j % PANEL);
            store_part(device->attention + at[i] + j, value / sum, dim - j);
        }
    }
}

static void cpu_attention(struct device *base, int layer_index) {
    struct cpu_device *device = (struct cpu_device *)base;
    struct attention_job job = {device, layer_index};
    int n_tiles = device->first_tile[device->batch->n_sequences] * device->n_kv_heads;
    if (n_tiles > 0)
        parallel_for(device, n_tiles, attention_tile, &job);
}

/* ---- sampling ---- */

/* Philox4x32-10 (Salmon et al. 2011): 4 random words of a counter and a key. */
static void philox(uint32_t counter[4], uint32_t key0, uint32_t key1) {
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

static double uniform(uint64_t seed, int position, int token) { /* in (0, 1) */
    uint32_t counter[4] = {(uint32_t)position, (uint32_t)token, 0, 0};
    philox(counter, (uint32_t)seed, (uint32_t)(seed >> 32));
    return ((double)counter[0] + 0.5) * 0x1p-32;
}

/* scaled = logits / temperature, all finite: NaN becomes the least number. Returns the largest. */
static float temper(const float *logits, float *scaled, int n, float temperature) {
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

static bool before(const float *scaled, int a, int b) { /* the order of candidates */
    return scaled[a] > scaled[b] || (scaled[a] == scaled[b] && a < b);
}

static void sift_down(const float *scaled, int *heap, int count, int at) {
    for (int child = 2 * at + 1; child < count; child = 2 * at + 1) {
        if (child + 1 < count && before(scaled, heap[child + 1], heap[child]))
            child++;
        if (!before(scaled, heap[child], heap[at]))
            return;
        int token = heap[at];
        heap[at] = heap[child];
        heap[child] = token;
        at = child;
    }
}

static double weight_of(float scaled, float max) { /* e^(scaled - max), the same everywhere */
    return (double)exp_vec((vec){0} + (scaled - max))[0];
}

static double sum_of_weights(const float *scaled, int n, float max) {
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
static int keep_top(const struct sampling *sampling, const float *scaled, float max, int *list,
                    int n) {
    bool by_count = sampling->top_k > 0 && sampling->top_k < n;
    double total = sum_of_weights(scaled, n, max);
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
        sift_down(scaled, list, count, i);
    int limit = by_count && sampling->top_k < count ? sampling->top_k : count, kept = 0;
    double sum = 0.0;
    while (kept < limit && (by_count || kept == 0 || sum < (double)sampling->top_p * total)) {
        int token = list[0];
        list[0] = list[count - 1 - kept];
        list[count - 1 - kept++] = token;
        sift_down(scaled, list, count - kept, 0);
        sum += weight_of(scaled[token], max);
    }
    if (by_count && sampling->top_p < 1.0f) { /* of these, by their share of their own sum */
        double enough = (double)sampling->top_p * sum;
        sum = 0.0;
        for (limit = kept, kept = 0; kept < limit && (kept == 0 || sum < enough); kept++)
            sum += weight_of(scaled[list[count - 1 - kept]], max);
    }
    memmove(list, list + count - kept, sizeof *list * (size_t)kept);
    return kept;
}

/* The largest scaled + g of `n` tokens (of the list, or all). -log(u) >= 1 - u rules out most
 * without a logarithm: token wins only if -log(u) < e^(scaled - best). */
static int race(const struct sampling *sampling, int position, const float *scaled, float max,
                const int *list, int n) {
    double least = sampling->min_p > 0.0f ? (double)max + log((double)sampling->min_p) : -INFINITY;
    double best = -INFINITY, scale = INFINITY; /* scale: e^(max - best), a bit more */
    int winner = list ? list[n - 1] : 0;
    for (int i = 0; i < n; i++) {
        int token = list ? list[i] : i;
        if ((double)scaled[token] < least)
            continue;
        double u = uniform(sampling->seed, position, token);
        if (1.0 - u > weight_of(scaled[token], max) * scale)
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

static void sample_tile(const void *argument, int index, struct scratch *scratch) {
    const struct cpu_device *device = argument;
    (void)scratch;
    const struct batch *batch = device->batch;
    const struct sampling *sampling = &batch->sampling[index];
    int n = device->device.config->vocab_size;
    size_t at = (size_t)index * (size_t)n;
    float *scaled = device->scaled + at;
    int *list = device->candidates + at, *kept = NULL;
    float max = temper(device->logits + at, scaled, n, sampling->temperature);
    if (!(sampling->temperature > 0.0f)) {
        int token = 0;
        while (token < n - 1 && scaled[token] != max)
            token++;
        device->sampled[index] = token;
        return;
    }
    if ((sampling->top_k > 0 && sampling->top_k < n) || sampling->top_p < 1.0f) {
        n = keep_top(sampling, scaled, max, list, n);
        kept = list;
    }
    int position = batch->position[batch->sample_row[index]] + 1;
    device->sampled[index] = race(sampling, position, scaled, max, kept, n);
}

static void cpu_sample(struct device *base) {
    struct cpu_device *device = (struct cpu_device *)base;
    if (device->batch->n_samples > 0)
        parallel_for(device, device->batch->n_samples, sample_tile, device);
}

static void cpu_read_logits(struct device *base, float *logits) {
    const struct cpu_device *device = (struct cpu_device *)base;
    size_t n = (size_t)device->batch->n_samples * (size_t)base->config->vocab_size;
    memcpy(logits, device->logits, n * sizeof *logits);
}

/* ---- a step ---- */

static bool cpu_step_begin(struct device *base, const struct batch *batch) {
    struct cpu_device *device = (struct cpu_device *)base;
    assert(batch->n_rows <= base->max_rows && batch->n_samples <= base->max_samples);
    if (base->rank == 0) /* one thread drives all shards of a worker */
        atomic_fetch_add(&device->cpu->active, 1);
    device->batch = batch;
    int group = device->n_heads / device->n_kv_heads;
    for (int i = 0; i < batch->n_sequences; i++) {
        device->first_tile[i + 1] =
            device->first_tile[i] + divide_up(batch->sequence[i].n_rows * group, QUERIES);
    }
    struct row_job job = {.device = device, .n_rows = batch->n_rows, .run = turn_row};
    for_rows(&job);
    return true;
}

static void cpu_step_end(struct device *base, int *sampled) {
    struct cpu_device *device = (struct cpu_device *)base;
    if (sampled && base->rank == 0)
        memcpy(sampled, device->sampled, sizeof *sampled * (size_t)device->batch->n_samples);
    device->batch = NULL;
    if (base->rank == 0)
        atomic_fetch_sub(&device->cpu->active, 1);
}

/* ---- memory and copies ---- */

static size_t cpu_free_memory(struct device *device, bool pinned) {
    (void)device;
    (void)pinned;
    FILE *file = fopen("/proc/meminfo", "r");
    char line[128];
    size_t kibibytes = 0;
    while (file && fgets(line, sizeof line, file) &&
           sscanf(line, "MemAvailable: %zu", &kibibytes) != 1) {
    }
    if (file)
        fclose(file);
    long pages = sysconf(_SC_AVPHYS_PAGES), page = sysconf(_SC_PAGESIZE);
    return kibibytes > 0 ? kibibytes * 1024 : pages > 0 ? (size_t)pages * (size_t)page : 0;
}

static void *cpu_alloc(struct device *device, size_t bytes, bool pinned) {
    if (bytes > cpu_free_memory(device, pinned))
        return NULL;
    if (bytes < HUGE_PAGE)
        return aligned_alloc(64, round_up(bytes > 0 ? bytes : 1, 64));
    void *memory = aligned_alloc(HUGE_PAGE, round_up(bytes, HUGE_PAGE));
    if (memory)
        madvise(memory, round_up(bytes, HUGE_PAGE), MADV_HUGEPAGE);
    return memory;
}

static void cpu_release(struct device *device, void *memory, bool pinned) {
    (void)device;
    (void)pinned;
    free(memory);
}

static void copy_now(const struct copy2d *copy) {
    for (size_t row = 0; row < copy->height; row++) {
        memcpy((char *)copy->to + row * copy->to_pitch,
               (const char *)copy->from + row * copy->from_pitch, copy->width);
    }
}

/* The first copy in the queue; or, where copies are delayed, of a random device and stream: those
 * are in order only among themselves. */
static struct copy_order *pick_copy(struct cpu_backend *cpu, uint64_t random) {
    if (cpu->copy_delay_seed == 0)
        return cpu->first_copy;
    uint64_t count = 0;
    for (struct copy_order *order = cpu->first_copy; order; order = order->next)
        count++;
    struct copy_order *chosen = cpu->first_copy, *first = cpu->first_copy;
    for (uint64_t i = random % count; i > 0; i--)
        chosen = chosen->next;
    while (first->device != chosen->device || first->stream != chosen->stream)
        first = first->next;
    return first;
}

static void *copier_main(void *argument) {
    struct cpu_backend *cpu = argument;
    uint32_t turn = 0;
    pthread_mutex_lock(&cpu->copy_mutex);
    for (;;) {
        while (!cpu->first_copy && !atomic_load(&cpu->stop))
            pthread_cond_wait(&cpu->copy_wake, &cpu->copy_mutex);
        if (!cpu->first_copy)
            break;
        uint32_t random[4] = {turn++, 0, 0, 0};
        philox(random, (uint32_t)cpu->copy_delay_seed, (uint32_t)(cpu->copy_delay_seed >> 32));
        struct copy_order *order = pick_copy(cpu, random[0]), **link = &cpu->first_copy;
        pthread_mutex_unlock(&cpu->copy_mutex);
        if (cpu->copy_delay_seed)
            nanosleep(&(struct timespec){0, (long)(random[1] % MAX_COPY_DELAY) * 1000}, NULL);
        copy_now(&order->copy);
        pthread_mutex_lock(&cpu->copy_mutex);
        atomic_fetch_add_explicit(&order->device->copied[order->stream], 1, memory_order_release);
        while (*link != order)
            link = &(*link)->next;
        *link = order->next;
        free(order);
        pthread_cond_broadcast(&cpu->copy_idle);
    }
    pthread_mutex_unlock(&cpu->copy_mutex);
    return NULL;
}

static uint64_t cpu_copy(struct device *base, enum stream stream, const struct copy2d *copy) {
    struct cpu_device *device = (struct cpu_device *)base;
    struct cpu_backend *cpu = device->cpu;
    struct copy_order *order = malloc(sizeof *order), **link = &cpu->first_copy;
    if (!order) { /* ops cannot fail: the program ends here, as with any fault of a device */
        fprintf(stderr, "dynamo: %s:%d: no memory for a copy order\n", __FILE__, __LINE__);
        abort();
    }
    *order = (struct copy_order){device, stream, *copy, NULL};
    pthread_mutex_lock(&cpu->copy_mutex);
    while (*link)
        link = &(*link)->next;
    *link = order;
    uint64_t ticket = atomic_fetch_add(&device->copies[stream], 1) + 1;
    pthread_cond_signal(&cpu->copy_wake);
    pthread_mutex_unlock(&cpu->copy_mutex);
    return ticket;
}

static bool cpu_copy_done(struct device *base, enum stream stream, uint64_t ticket) {
    struct cpu_device *device = (struct cpu_device *)base;
    return atomic_load_explicit(&device->copied[stream], memory_order_acquire) >= ticket;
}

/* ---- devices ---- */

static bool check_wanted(const struct device *wanted, char *error) {
    const struct model_config *config = wanted->config;
    int n = wanted->n_shards;
    const struct {
        const char *name;
        int value, unit;
    } cuts[] = {{"attention heads", config->n_heads, n},
                {"key-value heads", config->n_kv_heads, n},
                {"rows of the feed-forward part", config->d_ff, n == 1 ? 1 : 2 * n},
                {"attention heads per key-value head", config->n_heads, config->n_kv_heads}};
    if (n < 1 || n > MAX_SHARDS || (n & (n - 1)) || wanted->rank < 0 || wanted->rank >= n) {
        snprintf(error, GGUF_ERROR_LENGTH, "got %d shards, expected 1, 2, 4 or 8", n);
        return false;
    }
    for (size_t i = 0; i < sizeof cuts / sizeof *cuts; i++) {
        if (cuts[i].unit < 1 || cuts[i].value % cuts[i].unit) {
            snprintf(error, GGUF_ERROR_LENGTH,
                     "%s: got %d, expected a multiple of %d for %d shards", cuts[i].name,
                     cuts[i].value, cuts[i].unit, n);
            return false;
        }
    }
    if (config->head_dim > MAX_HEAD_DIM || config->head_dim % 2 || config->rope_dim % 2 ||
        config->rope_dim > config->head_dim) {
        snprintf(error, GGUF_ERROR_LENGTH,
                 "heads of %d, %d of them turned: expected even numbers up to %d", config->head_dim,
                 config->rope_dim, MAX_HEAD_DIM);
        return false;
    }
    return true;
}

/* Rows of n elements: padded, and never 2^n bytes apart, which would alias in the L1 cache. */
static size_t stride_of(int n) {
    size_t stride = round_up((size_t)n, PAD);
    return stride % 64 ? stride : stride + PAD;
}

static void *zeros(size_t rows, size_t stride) { /* (rows, stride) of 4 bytes */
    size_t bytes = round_up((rows * stride + LANES) * 4, 64);
    void *memory = aligned_alloc(64, bytes);
    if (memory)
        memset(memory, 0, bytes);
    return memory;
}

static struct job *take_slot(struct cpu_backend *cpu, bool urgent) {
    struct job *job = NULL;
    pthread_mutex_lock(&cpu->mutex);
    for (int i = 0; i < MAX_SLOTS && !job; i++) {
        if (!cpu->slot_used[i]) {
            job = &cpu->jobs[i];
            cpu->slot_used[i] = true;
            atomic_store(&job->urgent, urgent);
            if (i >= atomic_load(&cpu->n_slots))
                atomic_store(&cpu->n_slots, i + 1);
        }
    }
    pthread_mutex_unlock(&cpu->mutex);
    return job;
}

static void cpu_device_close(struct device *base) {
    struct cpu_device *device = (struct cpu_device *)base;
    struct cpu_backend *cpu = device->cpu;
    pthread_mutex_lock(&cpu->copy_mutex);
    for (int stream = 0; stream < N_STREAMS; stream++)
        while (atomic_load(&device->copied[stream]) < atomic_load(&device->copies[stream]))
            pthread_cond_wait(&cpu->copy_idle, &cpu->copy_mutex);
    pthread_mutex_unlock(&cpu->copy_mutex);
    if (device->job) {
        pthread_mutex_lock(&cpu->mutex);
        cpu->slot_used[device->job - cpu->jobs] = false;
        pthread_mutex_unlock(&cpu->mutex);
    }
    void *memory[] = {device->x,       device->h,          device->partial, device->q,
                      device->k,       device->v,          device->ffn,     device->attention,
                      device->turn,    device->logits,     device->scaled,  device->candidates,
                      device->sampled, device->first_tile, device->scratch};
    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++)
        free(memory[i]);
    free(device);
}

static bool allocate_activations(struct cpu_device *device) {
    const struct model_config *config = device->device.config;
    size_t rows = (size_t)device->device.max_rows, samples = (size_t)device->device.max_samples;
    size_t vocab = (size_t)config->vocab_size;
    size_t normed = rows > samples ? rows : samples;
    device->x_stride = stride_of(config->d_model);
    device->q_stride = stride_of(device->n_heads * config->head_dim);
    device->kv_stride = stride_of(device->n_kv_heads * config->head_dim);
    device->ffn_stride = stride_of(device->d_ff);
    device->x = zeros(rows, device->x_stride);
    device->h = zeros(normed, device->x_stride);
    device->partial = zeros(device->device.n_shards > 1 ? rows : 0, device->x_stride);
    device->q = zeros(rows, device->q_stride);
    device->attention = zeros(rows, device->q_stride);
    device->k = zeros(rows, device->kv_stride);
    device->v = zeros(rows, device->kv_stride);
    device->ffn = zeros(rows, device->ffn_stride);
    device->turn = zeros(rows, (size_t)config->rope_dim);
    device->logits = zeros(samples, vocab);
    device->scaled = zeros(samples, vocab);
    device->candidates = zeros(samples, vocab);
    device->sampled = zeros(samples, 1);
    device->first_tile = zeros(rows + 1, 1);
    device->scratch = zeros(1, sizeof *device->scratch / 4);
    return device->x && device->h && device->partial && device->q && device->attention &&
           device->k && device->v && device->ffn && device->turn && device->logits &&
           device->scaled && device->candidates && device->sampled && device->first_tile &&
           device->scratch;
}

static struct device *cpu_device_open(struct backend *backend, const struct device *wanted,
                                      char *error) {
    struct cpu_backend *cpu = (struct cpu_backend *)backend;
    if (!check_wanted(wanted, error))
        return NULL;
    struct cpu_device *device = calloc(1, sizeof *device);
    if (device) {
        device->device = *wanted;
        device->device.backend = backend;
        device->cpu = cpu;
        device->n_heads = wanted->config->n_heads / wanted->n_shards;
        device->n_kv_heads = wanted->config->n_kv_heads / wanted->n_shards;
        device->d_ff = wanted->config->d_ff / wanted->n_shards;
        device->job = take_slot(cpu, wanted->urgent);
        if (device->job && allocate_activations(device))
            return &device->device;
        cpu_device_close(&device->device);
    }
    snprintf(error, GGUF_ERROR_LENGTH, "no memory for a device of %d rows and %d samples",
             wanted->max_rows, wanted->max_samples);
    return NULL;
}

static void cpu_close(struct backend *backend) {
    struct cpu_backend *cpu = (struct cpu_backend *)backend;
    pthread_mutex_lock(&cpu->pool_mutex);
    pthread_mutex_lock(&cpu->copy_mutex);
    atomic_store(&cpu->stop, true);
    pthread_cond_broadcast(&cpu->wake);
    pthread_cond_broadcast(&cpu->copy_wake);
    pthread_mutex_unlock(&cpu->copy_mutex);
    pthread_mutex_unlock(&cpu->pool_mutex);
    for (int i = 0; i < cpu->n_helpers; i++)
        pthread_join(cpu->helpers[i], NULL);
    pthread_join(cpu->copier, NULL);
    while (cpu->weights) {
        struct weight *weight = cpu->weights;
        cpu->weights = weight->next;
        if (weight->owner) {
            free(weight->panels);
            free(weight->vector);
        }
        free(weight);
    }
    free(cpu->helpers);
    free(cpu);
}

static const struct backend operations = {
    .name = "cpu",
    .close = cpu_close,
    .device_open = cpu_device_open,
    .device_close = cpu_device_close,
    .alloc = cpu_alloc,
    .release = cpu_release,
    .free_memory = cpu_free_memory,
    .upload = cpu_upload,
    .copy = cpu_copy,
    .copy_done = cpu_copy_done,
    .step_begin = cpu_step_begin,
    .embed = cpu_embed,
    .norm_qkv = cpu_norm_qkv,
    .rope_append = cpu_rope_append,
    .attention = cpu_attention,
    .project_add = cpu_project_add,
    .norm_gate_up = cpu_norm_gate_up,
    .all_reduce_add = cpu_all_reduce_add,
    .norm_logits = cpu_norm_logits,
    .sample = cpu_sample,
    .read_logits = cpu_read_logits,
    .step_end = cpu_step_end,
};

struct backend *cpu_backend_open(const struct backend_options *options, char *error) {
    struct cpu_backend *cpu = aligned_alloc(128, round_up(sizeof *cpu, 128));
    if (!cpu) {
        snprintf(error, GGUF_ERROR_LENGTH, "no memory for the CPU backend");
        return NULL;
    }
    memset(cpu, 0, sizeof *cpu);
    cpu->backend = operations;
    cpu->n_threads = options->n_threads > 1 ? options->n_threads : 1;
    cpu->copy_delay_seed = options->copy_delay_seed;
    pthread_mutex_init(&cpu->mutex, NULL);
    pthread_mutex_init(&cpu->pool_mutex, NULL);
    pthread_mutex_init(&cpu->upload_mutex, NULL);
    pthread_mutex_init(&cpu->copy_mutex, NULL);
    pthread_cond_init(&cpu->wake, NULL);
    pthread_cond_init(&cpu->copy_wake, NULL);
    pthread_cond_init(&cpu->copy_idle, NULL);
    cpu->helpers = calloc((size_t)cpu->n_threads, sizeof *cpu->helpers);
    if (!cpu->helpers || pthread_create(&cpu->copier, NULL, copier_main, cpu)) {
        snprintf(error, GGUF_ERROR_LENGTH, "the copier thread of the CPU backend did not start");
        free(cpu->helpers);
        free(cpu);
        return NULL;
    }
    while (cpu->n_helpers < cpu->n_threads - 1 &&
           pthread_create(&cpu->helpers[cpu->n_helpers], NULL, helper_main, cpu) == 0)
        cpu->n_helpers++;
    if (cpu->n_helpers < cpu->n_threads - 1) {
        snprintf(error, GGUF_ERROR_LENGTH, "%d threads: only %d did start", cpu->n_threads,
                 cpu->n_helpers + 1);
        cpu_close(&cpu->backend);
        return NULL;
    }
    return &cpu->backend;
}
