/* kernels.c: the CPU backend, every op of the forward pass on the cores of this machine.
 *
 * Owns: devices, their memory and activations, the packed weights that they share, the copier and
 * the ops. Knows nothing of requests, of blocks beyond a step's block table, or of other backends.
 * The ops are C over vectors of 16 floats (lib/simd.h), which any processor runs, and the
 * specification of kernels.cu: where the two differ, this file is right. Products alone have, in
 * lib/matmul.h, faster kernels beside the plain one, in instructions of some processors.
 *
 *     struct backend *cpu = cpu_backend_open(&options, error);      // NULL: error says why
 *     struct device *device = cpu->device_open(cpu, &wanted, error);
 *     const struct weight *weight = cpu->upload(device, tensor, NULL, slice, error);
 *     cpu->step_begin(device, &batch);                              // then the ops, in order
 *
 * How data flows: `upload` packs a matrix once into panels of 64 outputs side by side for each k. A
 * step's rows go through the activations of its device: x -> h -> q, k, v -> blocks -> attention ->
 * x -> h -> ffn -> x, and those that are sampled -> logits -> sampled. An op cuts its work into
 * tiles, which the threads of the pool take one by one, those of decoding devices first.
 *
 * Invariants:
 *   - Each output element is summed in one fixed order that depends on its own row alone, and every
 *     loop over elements works on whole, padded vectors: so the bits do not depend on the batch, on
 *     chunking, on the number of threads or of shards.
 *   - Activation rows are padded with zeros to PAD elements, and stay so.
 *   - All devices of a backend share one copy of the packed weights; a shard is a view of it.
 *   - A copy that runs stays in the copier's list until its queue has counted it.
 *
 * Read next: lib/matmul.h, and lib/pool.h for the threads. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "dynamo.h"

#include <assert.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define MATMUL_IMPLEMENTATION
#include "lib/matmul.h"
#define POOL_IMPLEMENTATION
#include "lib/pool.h"
#define SAMPLER_IMPLEMENTATION
#include "lib/sampler.h"
#define MACHINE_IMPLEMENTATION
#include "lib/machine.h"

enum {
    PREFILL_CHUNK = 256,  /* prompt tokens in one step: enough for full tiles, and soon done */
    NORM_ROWS = 8,        /* rows of a tile of the cheap ops */
    APPEND_ROWS = 4,      /* rows of a tile of rope_append: few, so that every thread gets some */
    MANY_ROWS = 64,       /* a step of more appends 16 a tile: those of a block are one transpose */
    TILES_A_THREAD = 8,   /* of attention: threads then end at about the same time */
    PAD = 16,             /* activation rows are padded to a multiple; see stride_of */
    MAX_ACTIVATIONS = 40, /* arrays of a device */
    HUGE_PAGE = 2 << 20,  /* bytes: fewer misses of the TLB */
    MAX_COPY_DELAY = 2000 /* microseconds, of a copy that a test delays */
};

/* The tiles of attention. */
enum {
    QUERIES = 48,       /* of a tile: they share the reading of the keys and values */
    QUERY_ROWS = 6,     /* queries that one call of a kernel computes: 24 registers of sums */
    KV_TILE = 64,       /* tokens whose scores are computed at a time: 4 vectors */
    MAX_HEAD_DIM = 256, /* sizes the scratch of a thread */
    KV_TILE_BLOCKS = KV_TILE / BLOCK_TOKENS,
    HEAD_STRIDE = MAX_HEAD_DIM + LANES /* not 2^n, which would alias in the L1 cache */
};

/* ---- what a device is: one of several that share the threads and the weights ---- */

struct plane { /* (rows, stride) of an activation; what a row has behind its elements is 0 */
    float *at;
    size_t stride;
};

INLINE float *row_of(struct plane plane, int row) {
    return plane.at + (size_t)row * plane.stride;
}

struct kv_view { /* the keys and values of one sequence, layer and head */
    enum kv_type type;
    int dim;
    char *kv;                 /* the blocks; sizes here are in bytes */
    size_t block, key, value; /* of a block; where the head's planes begin in it */
    size_t next_key;          /* where the keys lie that will be read after these */
    const int *table;         /* (blocks of the sequence) slots */
};

struct softmax { /* of one query, over the tokens seen so far */
    float max;
    vec sum; /* lane by lane; lanes are added at the end */
};

struct attention_scratch {    /* queries of a tile, and what is made of them */
    int n, position[QUERIES]; /* (n) ascending: a query sees tokens up to position, … */
    int window;               /* … so many at most */
    struct softmax state[QUERIES];
    alignas(64) float query[QUERIES * HEAD_STRIDE]; /* times the attention scale */
    alignas(64) float output[QUERIES * HEAD_STRIDE];
    alignas(64) float scores[QUERIES * KV_TILE];
};

struct scratch { /* of one thread: what a tile of a product or of attention works on */
    alignas(64) float slab[SLAB * PANEL];
    float tile[5][ROW_CHUNK * PANEL];
    struct attention_scratch attention;
};

struct copy_queue {
    uint64_t added; /* under the copier's mutex */
    atomic_uint_fast64_t done;
};

struct copy_order {
    struct copy_queue *queue;
    struct copy2d copy;
    struct copy_order *next;
};

struct copier {
    pthread_t thread;
    pthread_mutex_t mutex;
    pthread_cond_t changed;   /* there is a copy more, or one less, or `stop` */
    struct copy_order *first; /* the running one stays in the list */
    bool stop;
    uint64_t delay_seed;
};

struct cpu_backend {
    struct backend backend;
    struct pool pool;
    struct copier copier;
    pthread_mutex_t upload_mutex;
    struct weight *weights; /* a list, under upload_mutex */
    bool plain, amx;        /* no fast paths; those of a matrix unit */
};

/* Of a product: rows [first, first + n), in n_chunks of chunk_rows, times one of the matrices, or
 * that of an expert. */
struct part {
    int matrix, expert, first, n;
    int first_tile, n_chunks, chunk_rows;
};

struct cpu_device {
    struct device device;
    struct cpu_backend *cpu;
    struct job *job;
    struct scratch *scratch; /* of the thread that drives it */
    const struct batch *batch;
    int n_heads, n_kv_heads;         /* of this shard */
    struct plane x, h, partial;      /* (max_rows, d_model); h: the normed rows */
    struct plane q, attention, k, v; /* (max_rows, n_heads * head_dim), k, v n_kv_heads */
    struct plane ffn;                /* (max_rows, or with experts entries, d_ff) */
    struct plane turn[2];            /* (max_rows, {cos, sin}, rope_dim); [1]: with a window */
    /* experts: an *entry* is a row and one of its experts; entries stand in the order of experts,
     * those of one expert, a *group*, in the order of rows */
    struct plane router;     /* (max_rows, n_experts) logits of the experts */
    int *chosen, *entry;     /* (max_rows, n_used) experts; entries, -1: another shard's */
    float *share;            /* (max_rows, n_used) */
    int *source;             /* (entries) rows */
    struct plane expert_out; /* (entries, d_model) */
    struct part *groups;     /* (n_groups) */
    int n_entries, n_groups; /* of this step and layer */
    /* the input of a product in the forms that its matrices want, rows of bytes */
    struct plane converted[N_FORMS];
    struct plane logits, scaled;   /* (LOGIT_ROWS at most, vocab_size); logits / temperature */
    int *candidates;               /* the same: of the sampler */
    int *sampled;                  /* (max_samples) */
    int *first_tile;               /* (max_rows + 1) attention tiles of a head before a sequence */
    void *memory[MAX_ACTIVATIONS]; /* (n_memory) all of the above */
    int n_memory;
    struct copy_queue copies[N_STREAMS];
};

static void parallel_for(struct cpu_device *device, int n_tiles, tile_function *run,
                         const void *argument) {
    if (n_tiles > 0)
        pool_run(&device->cpu->pool, device->job, device->scratch, n_tiles, run, argument);
}

/* ---- rows: ops that make each row from one row ---- */

/* Makes rows [first, end). */
typedef void rows_function(struct cpu_device *device, const void *argument, int first, int end);

struct row_job {
    struct cpu_device *device;
    rows_function *run;
    const void *argument;
    int n_rows, tile_rows;
};

static void row_tile(const void *argument, int tile, struct scratch *scratch) {
    const struct row_job *job = argument;
    int first = tile * job->tile_rows;
    (void)scratch;
    job->run(job->device, job->argument, first, smaller(first + job->tile_rows, job->n_rows));
}

/* Rows [0, n_rows), so many of them a tile. */
static void for_rows(struct cpu_device *device, int n_rows, int tile_rows, rows_function *run,
                     const void *argument) {
    struct row_job job = {device, run, argument, n_rows, tile_rows};
    parallel_for(device, divide_up(n_rows, tile_rows), row_tile, &job);
}

/* ---- copies ---- */

/* A thread copies memory beside the computation, as a GPU's copy engine does. Copies go into
 * queues, the streams of a device; those of one queue are done in order, and each has a ticket,
 * which is polled. With a `delay_seed` each takes a random time, and the queues overtake each
 * other: so a test meets orders that are rare. */

/* Where the first copy hangs in the list; or, where copies are delayed, the first of a queue that a
 * random one is of. */
static struct copy_order **next_copy(struct copier *copier, unsigned *random) {
    struct copy_order **first = &copier->first, *chosen = copier->first;
    int n = 0;
    for (struct copy_order *order = chosen; order && copier->delay_seed; order = order->next)
        if (rand_r(random) % ++n == 0)
            chosen = order;
    while ((*first)->queue != chosen->queue)
        first = &(*first)->next;
    return first;
}

static void *copier_main(void *argument) {
    struct copier *copier = argument;
    unsigned random = (unsigned)copier->delay_seed;
    pthread_mutex_lock(&copier->mutex);
    while (copier->first || !copier->stop) {
        if (!copier->first) {
            pthread_cond_wait(&copier->changed, &copier->mutex);
            continue;
        }
        struct copy_order **link = next_copy(copier, &random), *order = *link;
        const struct copy2d *copy = &order->copy;
        pthread_mutex_unlock(&copier->mutex);
        if (copier->delay_seed)
            nanosleep(&(struct timespec){0, rand_r(&random) % MAX_COPY_DELAY * 1000}, NULL);
        for (size_t row = 0; row < copy->height; row++)
            memcpy((char *)copy->to + row * copy->to_pitch,
                   (const char *)copy->from + row * copy->from_pitch, copy->width);
        pthread_mutex_lock(&copier->mutex);
        atomic_fetch_add_explicit(&order->queue->done, 1, memory_order_release);
        *link = order->next;
        free(order);
        pthread_cond_broadcast(&copier->changed);
    }
    pthread_mutex_unlock(&copier->mutex);
    return NULL;
}

static bool copier_open(struct copier *copier, uint64_t delay_seed) {
    *copier = (struct copier){.delay_seed = delay_seed};
    pthread_mutex_init(&copier->mutex, NULL);
    pthread_cond_init(&copier->changed, NULL);
    return pthread_create(&copier->thread, NULL, copier_main, copier) == 0;
}

static void copier_close(struct copier *copier) {
    pthread_mutex_lock(&copier->mutex);
    copier->stop = true;
    pthread_cond_broadcast(&copier->changed);
    pthread_mutex_unlock(&copier->mutex);
    pthread_join(copier->thread, NULL);
}

static uint64_t cpu_copy(struct device *base, enum stream stream, const struct copy2d *copy) {
    struct cpu_device *device = (struct cpu_device *)base;
    struct copier *copier = &device->cpu->copier;
    struct copy_queue *queue = &device->copies[stream];
    struct copy_order *order = malloc(sizeof *order), **link = &copier->first;
    if (!order) { /* copies cannot fail: the program ends here, as with any fault of a device */
        fprintf(stderr, "dynamo: %s:%d: no memory for a copy order\n", __FILE__, __LINE__);
        abort();
    }
    *order = (struct copy_order){queue, *copy, NULL};
    pthread_mutex_lock(&copier->mutex);
    while (*link)
        link = &(*link)->next;
    *link = order;
    uint64_t ticket = ++queue->added;
    pthread_cond_broadcast(&copier->changed);
    pthread_mutex_unlock(&copier->mutex);
    return ticket;
}

static bool cpu_copy_done(struct device *base, enum stream stream, uint64_t ticket) {
    struct cpu_device *device = (struct cpu_device *)base;
    return atomic_load_explicit(&device->copies[stream].done, memory_order_acquire) >= ticket;
}

static void finish_copies(struct cpu_device *device) {
    struct copier *copier = &device->cpu->copier;
    pthread_mutex_lock(&copier->mutex);
    for (int stream = 0; stream < N_STREAMS; stream++)
        while (device->copies[stream].done < device->copies[stream].added)
            pthread_cond_wait(&copier->changed, &copier->mutex);
    pthread_mutex_unlock(&copier->mutex);
}

/* ---- memory and weights ---- */

void *host_alloc(size_t bytes) {
    void *memory = NULL;
    if (bytes > machine_free_memory("") || posix_memalign(&memory, HUGE_PAGE, bytes) != 0)
        return NULL;
    madvise(memory, bytes & ~(size_t)(HUGE_PAGE - 1), MADV_HUGEPAGE); /* of the last, it is waste */
    return memory;
}

static size_t cpu_free_memory(struct device *device) {
    (void)device;
    return machine_free_memory("");
}

static void *cpu_alloc(struct device *device, size_t bytes) {
    (void)device;
    return host_alloc(bytes);
}

static void cpu_release(struct device *device, void *memory) {
    (void)device;
    free(memory);
}

static void pack_tile(const void *argument, int tile, struct scratch *scratch) {
    (void)scratch;
    pack_panel(argument, tile);
}

static struct weight *pack_tensor(struct cpu_device *device, const struct tensor *tensor) {
    struct weight *weight = pack_open(tensor);
    if (!weight || weight->vector)
        return weight;
    weight->panels = host_alloc(pack_bytes(weight));
    if (!weight->panels) {
        pack_close(weight);
        return NULL;
    }
    pool_enter(&device->cpu->pool);
    parallel_for(device, pack_panels(weight), pack_tile, weight);
    pool_leave(&device->cpu->pool);
    return weight;
}

static struct weight *add_weight(struct cpu_backend *cpu, struct weight *weight) {
    if (weight) {
        weight->next = cpu->weights;
        cpu->weights = weight;
    }
    return weight;
}

static const struct weight *cpu_upload(struct device *base, const struct tensor *tensor,
                                       const struct tensor *const *together, struct slice slice,
                                       char *error) {
    struct cpu_device *device = (struct cpu_device *)base;
    (void)together; /* each is a matrix of its own */
    struct cpu_backend *cpu = device->cpu;
    pthread_mutex_lock(&cpu->upload_mutex);
    struct weight *weight = cpu->weights;
    while (weight && !(weight->owner && weight->tensor == tensor))
        weight = weight->next;
    if (!weight)
        weight = add_weight(cpu, pack_tensor(device, tensor));
    if (weight && slice.kind != SLICE_WHOLE)
        weight = add_weight(cpu, pack_view(weight, slice));
    pthread_mutex_unlock(&cpu->upload_mutex);
    if (!weight) {
        (void)fail(error, "%.*s: no memory for %zu bytes of weights", (int)tensor->name.length,
                   tensor->name.data, tensor->bytes);
    }
    return weight;
}

/* ---- the machine's limits ---- */

/* A step of a model is held against these figures, which must be taken beside it: memory of shared
 * machines is twice as fast in one minute as in the next. The threads of the pool do nothing else
 * for some milliseconds. */

enum {
    LIMIT_REPEATS = 5,          /* of which the best counts */
    LIMIT_MULTIPLIES = 32,      /* tiles of arithmetic: enough that all threads end together */
    LIMIT_PIECES = 256,         /* of the weights are read: they lie where a step finds them */
    LIMIT_PIECE_BYTES = 1 << 20 /* of such a piece at most: one tile */
};

struct piece {
    const char *from;
    size_t bytes; /* a multiple of 256 */
};

static void read_tile(const void *argument, int tile, struct scratch *scratch) {
    const struct piece *piece = (const struct piece *)argument + tile;
    vec sum[4] = {{0}};
    for (size_t i = 0; i < piece->bytes; i += 256)
        for (size_t j = 0; j < 4; j++)
            sum[j] += load((const float *)(const void *)(piece->from + i + j * 64));
    store(scratch->slab, sum[0] + sum[1] + sum[2] + sum[3]); /* or nothing would be read */
}

static void multiply_tile(const void *argument, int tile, struct scratch *scratch) {
    const struct tile *like = argument;
    (void)tile;
    (void)dot_busy(like->form, like->amx, scratch->slab);
}

static double clock_seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* The shortest time, in seconds, of n_tiles of a job. */
static double best_time(struct cpu_device *device, int n_tiles, tile_function *run,
                        const void *argument) {
    double best = INFINITY;
    pool_enter(&device->cpu->pool);
    for (int i = 0; i < LIMIT_REPEATS; i++) {
        double start = clock_seconds();
        parallel_for(device, n_tiles, run, argument);
        best = fmin(best, clock_seconds() - start);
    }
    pool_leave(&device->cpu->pool);
    return best;
}

/* All devices share the pool: n makes no difference. Nothing else may run in it meanwhile. */
static void cpu_limits(struct device **shards, int n, enum tensor_type type, double *read,
                       double *ops) {
    struct cpu_device *device = (struct cpu_device *)shards[0];
    struct cpu_backend *cpu = device->cpu;
    struct piece pieces[LIMIT_PIECES];
    int n_pieces = 0;
    double n_bytes = 0;
    (void)n;
    pthread_mutex_lock(&cpu->upload_mutex);
    for (const struct weight *weight = cpu->weights; weight; weight = weight->next) {
        size_t bytes = weight->owner ? pack_bytes(weight) : 0;
        for (size_t at = 0; at < bytes && n_pieces < LIMIT_PIECES; at += LIMIT_PIECE_BYTES) {
            size_t left = bytes - at < LIMIT_PIECE_BYTES ? bytes - at : LIMIT_PIECE_BYTES;
            pieces[n_pieces++] = (struct piece){weight->panels + at, left / 256 * 256};
            n_bytes += (double)(left / 256 * 256);
        }
    }
    pthread_mutex_unlock(&cpu->upload_mutex);
    *read = n_pieces > 0 ? n_bytes / best_time(device, n_pieces, read_tile, pieces) : 0;
    struct tile like = {.form = dot_form(type, cpu->plain), .amx = cpu->amx};
    *ops = LIMIT_MULTIPLIES * dot_busy(like.form, like.amx, device->scratch->slab) /
           best_time(device, LIMIT_MULTIPLIES, multiply_tile, &like);
}

/* ---- devices ---- */

bool device_fits(const struct device *wanted, char *error) {
    const struct model_config *config = wanted->config;
    int n = wanted->n_shards;
    const struct {
        const char *name;
        int value, unit;
    } cuts[] = {{"attention heads", config->n_heads, n},
                {"key-value heads", config->n_kv_heads, n},
                {"rows of the feed-forward part", config->d_ff,
                 n == 1 || config->n_experts > 0 ? 1 : 2 * n},
                {"attention heads per key-value head", config->n_heads, config->n_kv_heads}};
    if (n < 1 || n > MAX_SHARDS || (n & (n - 1)) || wanted->rank < 0 || wanted->rank >= n)
        return fail(error, "a worker of %d devices: expected 1, 2, 4 or 8", n);
    for (size_t i = 0; i < sizeof cuts / sizeof *cuts; i++)
        if (cuts[i].unit < 1 || cuts[i].value % cuts[i].unit)
            return fail(error, "a worker of %d device%s: got %d %s, expected a multiple of %d", n,
                        n > 1 ? "s" : "", cuts[i].value, cuts[i].name, cuts[i].unit);
    return true;
}

static bool head_fits(const struct model_config *config, char *error) {
    if (config->head_dim > MAX_HEAD_DIM || config->head_dim % 2 || config->rope_dim % 2 ||
        config->rope_dim > config->head_dim) {
        return fail(error, "heads of %d, %d of them turned: expected even numbers up to %d",
                    config->head_dim, config->rope_dim, MAX_HEAD_DIM);
    }
    return true;
}

/* Rows of n elements: padded, and never 2^n bytes apart, which would alias in the L1 cache. */
static size_t stride_of(int n) {
    size_t stride = round_up((size_t)n, PAD);
    return stride % 64 ? stride : stride + PAD;
}

/* (rows, stride) of 4 bytes, aligned, with room for one vector more; freed with the device. What
 * is never used takes no memory: options may allow for steps that never come. */
static void *zeros(struct cpu_device *device, size_t rows, size_t stride) {
    assert(device->n_memory < MAX_ACTIVATIONS);
    size_t bytes = (rows * stride + LANES) * 4 + 64;
    bool fits = bytes < HUGE_PAGE || bytes <= machine_free_memory("");
    char *memory = fits ? calloc(1, bytes) : NULL;
    device->memory[device->n_memory++] = memory;
    return memory ? memory + (-(uintptr_t)memory & 63) : NULL;
}

static void cpu_device_close(struct device *base) {
    struct cpu_device *device = (struct cpu_device *)base;
    finish_copies(device);
    if (device->job)
        pool_give_job(&device->cpu->pool, device->job);
    for (int i = 0; i < device->n_memory; i++)
        free(device->memory[i]);
    free(device);
}

/* (rows, n), padded. */
static struct plane plane(struct cpu_device *device, size_t rows, int n) {
    size_t stride = stride_of(n);
    return (struct plane){zeros(device, rows, stride), stride};
}

static bool allocate_activations(struct cpu_device *device) {
    const struct model_config *config = device->device.config;
    size_t rows = (size_t)device->device.max_rows, samples = (size_t)device->device.max_samples;
    size_t vocab = (size_t)config->vocab_size;
    size_t logit_rows = samples < LOGIT_ROWS ? samples : LOGIT_ROWS;
    size_t normed = rows > logit_rows ? rows : logit_rows;
    bool experts = config->n_experts > 0;
    size_t entries = experts ? rows * (size_t)config->n_used : rows;
    int d_ff = experts ? config->d_ff : config->d_ff / device->device.n_shards;
    bool adds = device->device.n_shards == 1 && !config->post_norm; /* at once */
    device->x = plane(device, rows, config->d_model);
    device->h = plane(device, normed, config->d_model);
    device->partial = plane(device, adds ? 0 : rows, config->d_model);
    device->q = plane(device, rows, device->n_heads * config->head_dim);
    device->attention = plane(device, rows, device->n_heads * config->head_dim);
    device->k = plane(device, rows, device->n_kv_heads * config->head_dim);
    device->v = plane(device, rows, device->n_kv_heads * config->head_dim);
    device->ffn = plane(device, entries, d_ff);
    size_t widest = device->q.stride > device->x.stride ? device->q.stride : device->x.stride;
    widest = device->ffn.stride > widest ? device->ffn.stride : widest;
    for (int form = FORM_F32; form < N_FORMS; form++) { /* a segment may cut a block in two */
        size_t bytes = dot_form_bytes(form, 0, (int)widest + 2 * K_SEGMENTS * Q8_BLOCK);
        size_t n = form == FORM_F32 ? device->x.stride : round_up(bytes, 64) / 4 + 16;
        size_t most = form == FORM_F32 && !experts ? 0 : entries > normed ? entries : normed;
        device->converted[form] = (struct plane){zeros(device, most, n), n};
    }
    for (int i = 0; i < 2; i++)
        device->turn[i] = (struct plane){zeros(device, rows, 2 * (size_t)config->rope_dim),
                                         2 * (size_t)config->rope_dim};
    if (experts) {
        device->router = plane(device, rows, config->n_experts);
        device->chosen = zeros(device, entries, 1);
        device->entry = zeros(device, entries, 1);
        device->share = zeros(device, entries, 1);
        device->source = zeros(device, entries, 1);
        device->expert_out = plane(device, entries, config->d_model);
        device->groups = zeros(device, (size_t)config->n_experts, sizeof *device->groups / 4);
    }
    device->logits = (struct plane){zeros(device, logit_rows, vocab), vocab};
    device->scaled = (struct plane){zeros(device, logit_rows, vocab), vocab};
    device->candidates = zeros(device, logit_rows, vocab);
    device->sampled = zeros(device, samples, 1);
    device->first_tile = zeros(device, rows + 1, 1);
    device->scratch = zeros(device, 1, sizeof *device->scratch / 4);
    for (int i = 0; i < device->n_memory; i++)
        if (!device->memory[i])
            return false;
    return true;
}

static struct device *cpu_device_open(struct backend *backend, const struct device *wanted,
                                      char *error) {
    struct cpu_backend *cpu = (struct cpu_backend *)backend;
    if (!device_fits(wanted, error) || !head_fits(wanted->config, error))
        return NULL;
    struct cpu_device *device = calloc(1, sizeof *device);
    if (device) {
        device->device = *wanted;
        device->device.backend = backend;
        device->cpu = cpu;
        device->n_heads = wanted->config->n_heads / wanted->n_shards;
        device->n_kv_heads = wanted->config->n_kv_heads / wanted->n_shards;
        device->job = pool_take_job(&cpu->pool, wanted->urgent);
        if (device->job && allocate_activations(device))
            return &device->device;
        cpu_device_close(&device->device);
    }
    (void)fail(error, "no memory for a device of %d rows and %d samples", wanted->max_rows,
               wanted->max_samples);
    return NULL;
}

/* ---- products ---- */

struct product { /* up to three matrices times the same rows, or of each expert its own rows */
    struct cpu_device *device;
    const struct weight *matrix[3], *bias[3]; /* bias: NULL, or (n_rows of the matrix) */
    int each;   /* rows of an expert's part of the matrices; 0: there are no experts */
    bool gated; /* one output of two matrices: the activation of the first, and the second */
    struct plane out[3]; /* (n_rows) */
    struct plane rows;   /* (n_rows) the input as it is */
    const int *source;   /* (n_rows) row of `rows` that each is; NULL: its own */
    int n_rows;
    int unit, first_segment, n_segments; /* in which K is summed; 0: it is not cut */
    bool add;                            /* out += */
    /* the rest is run_product's */
    const struct part *parts; /* (n_parts) */
    int n_parts, n_tiles;
    bool in_order;       /* a thread's tiles are neighbours: see product_tile */
    bool wants[N_FORMS]; /* the forms of rows that the matrices want */
};

/* gate = the activation of gate and up, element by element */
static void activate(enum gate_function activation, float *gate, const float *up, int count) {
    const vec zero = {0}, one = zero + 1.0f, limit = zero + 7.0f;
    for (int i = 0; i < count; i += LANES) {
        vec g = load(gate + i), u = load(up + i), steep = g; /* steep: sigmoid is of it */
        if (activation == ACTIVATE_GELU)
            steep = (g + g * g * g * 0.044715f) * 1.5957691216f; /* 2 sqrt(2 / pi) */
        if (activation == ACTIVATE_CLAMPED) {
            g = min_vec(limit, g);
            u = min_vec(limit, max_vec(-limit, u)) + one;
            steep = g * 1.702f;
        }
        store(gate + i, g / (exp_vec(-steep) + 1.0f) * u);
    }
}

/* Of a tile: the panel; its outputs [begin, end), of which those before 0 are another's (a shard,
 * or an expert, may start and end inside a panel); the rows. */
struct place {
    int panel, begin, end, row, n_rows;
};

/* out (n_rows, PANEL) = the rows . the panel of `matrix` at this place */
static void multiply(const struct product *product, const struct weight *matrix,
                     const struct place *place, float *out, struct scratch *scratch) {
    const struct cpu_device *device = product->device;
    enum row_form form = dot_form(matrix->type, device->cpu->plain);
    bool as_it_is = form == FORM_F32 && !product->source;
    struct plane input = as_it_is ? product->rows : device->converted[form];
    struct tile tile = {.panel = matrix->panels + (size_t)place->panel * matrix->panel_bytes,
                        .end = matrix->cols,
                        .form = form,
                        .input = (const char *)row_of(input, place->row),
                        .stride = input.stride * sizeof(float),
                        .out = out,
                        .ahead = true,
                        .amx = device->cpu->amx};
    if (product->n_segments > 0)
        segment_product(matrix, product->unit, product->first_segment, product->n_segments, tile,
                        place->n_rows, scratch->slab, scratch->tile + 1);
    else
        panel_product(matrix->type, tile, place->n_rows, scratch->slab);
}

/* Adds a bias to sums (n_rows, PANEL). */
static void add_to_sums(const float *bias, const struct place *place, float *sums) {
    for (int row = 0; row < place->n_rows; row++, sums += PANEL)
        for (int at = place->begin < 0 ? 0 : place->begin; at < place->end; at += LANES) {
            float *to = sums + at - place->begin;
            vec sum = load_part(to, place->end - at) + load_part(bias + at, place->end - at);
            store_part(to, sum, place->end - at);
        }
}

/* Adds sums (n_rows, PANEL) to what is there, or stores them. */
static void store_tile(const struct place *place, const float *sums, struct plane to, bool add) {
    for (int row = 0; row < place->n_rows; row++, sums += PANEL) {
        float *out = row_of(to, place->row + row);
        for (int at = place->begin < 0 ? 0 : place->begin; at < place->end; at += LANES) {
            vec value = load(sums + at - place->begin);
            if (add)
                value += load_part(out + at, place->end - at);
            store_part(out + at, value, place->end - at);
        }
    }
}

/* The matrix, or bias, of a part. */
static struct weight weight_of(const struct product *product, const struct part *part,
                               const struct weight *all) {
    return product->each > 0 ? pack_expert(all, part->expert, product->each) : *all;
}

/* A panel of a part's matrix times a chunk of its rows. Threads take tiles in turn, and the
 * processor reads ahead where memory is read in order: so tiles that one thread is likely to take
 * are neighbours; unless those share a panel, which is better. */
static void product_tile(const void *argument, int index, struct scratch *scratch) {
    const struct product *product = argument;
    const struct part *part = product->parts, *last = part + product->n_parts - 1;
    int n_threads = product->device->cpu->pool.n_threads, each = product->n_tiles / n_threads;
    if (product->in_order && index < each * n_threads)
        index = index % n_threads * each + index / n_threads;
    while (part < last && part[1].first_tile <= index)
        part++;
    index -= part->first_tile;
    int row = index % part->n_chunks * part->chunk_rows;
    struct place place = {.row = part->first + row,
                          .n_rows = smaller(part->n - row, part->chunk_rows)};
    for (int i = 0; i < (product->gated ? 2 : 1); i++) {
        const struct weight *all = product->matrix[part->matrix + i];
        struct weight matrix = weight_of(product, part, all);
        place.panel = matrix.first_row / PANEL + index / part->n_chunks;
        place.begin = place.panel * PANEL - matrix.first_row;
        place.end = smaller(place.begin + PANEL, matrix.n_rows);
        multiply(product, &matrix, &place, scratch->tile[i], scratch);
        if (product->bias[part->matrix + i])
            add_to_sums(weight_of(product, part, product->bias[part->matrix + i]).vector, &place,
                        scratch->tile[i]);
    }
    if (product->gated)
        activate(product->device->device.config->activation, scratch->tile[0], scratch->tile[1],
                 place.n_rows * PANEL);
    store_tile(&place, scratch->tile[0], product->out[part->matrix], product->add);
}

/* A row into a form, segment by segment where K is cut. */
static void convert_row(const struct product *product, enum row_form form, int row) {
    int cols = product->matrix[0]->cols, segment = product->first_segment;
    const float *from = row_of(product->rows, product->source ? product->source[row] : row);
    struct plane converted = product->device->converted[form];
    char *to = (char *)row_of(converted, row);
    if (form == FORM_F32)
        memcpy(to, from, converted.stride * sizeof *from);
    else if (product->n_segments == 0)
        dot_convert(form, from, 0, cols, to);
    for (int i = 0; i < product->n_segments; i++, segment++) {
        int begin = segment_begin(cols, product->unit, segment);
        int end = segment_begin(cols, product->unit, segment + 1);
        dot_convert(form, from, begin, end, to);
        from += end - begin;
        to += dot_form_bytes(form, begin, end);
    }
}

static void convert_tile(struct cpu_device *device, const void *argument, int first, int end) {
    const struct product *product = argument;
    (void)device;
    for (int row = first; row < end; row++)
        for (int form = product->source ? FORM_F32 : FORM_F32 + 1; form < N_FORMS; form++)
            if (product->wants[form])
                convert_row(product, (enum row_form)form, row);
}

/* Cuts a part's rows and matrix into tiles, the first of them first_tile; returns that of the next
 * part. */
static int cut_part(const struct product *product, struct part *part, int first_tile) {
    struct weight matrix = weight_of(product, part, product->matrix[part->matrix]);
    bool amx = product->device->cpu->amx && dot_form(matrix.type, false) == FORM_BF16;
    int rows = divide_up(part->n, divide_up(part->n, ROW_CHUNK));
    part->first_tile = first_tile;
    part->chunk_rows = (int)round_up((size_t)rows, amx ? AMX_ROWS : TILE_ROWS);
    part->n_chunks = divide_up(part->n, part->chunk_rows);
    int n_panels = divide_up(matrix.first_row + matrix.n_rows, PANEL) - matrix.first_row / PANEL;
    return first_tile + n_panels * part->n_chunks;
}

static void run_product(struct cpu_device *device, struct product product) {
    struct part whole[3] = {{0}}, *parts = product.each > 0 ? device->groups : whole;
    product.device = device;
    product.parts = parts;
    product.n_parts = product.each > 0 ? device->n_groups : 0;
    product.in_order = true;
    if (product.n_rows == 0)
        return;
    for (int i = 0; i < 3 && product.matrix[i]; i++) {
        product.wants[dot_form(product.matrix[i]->type, device->cpu->plain)] = true;
        if (product.each == 0 && (i == 0 || !product.gated))
            whole[product.n_parts++] = (struct part){.matrix = i, .n = product.n_rows};
    }
    for (int i = 0; i < product.n_parts; i++) {
        product.n_tiles = cut_part(&product, &parts[i], product.n_tiles);
        product.in_order = product.in_order && parts[i].n_chunks == 1;
    }
    if (product.source || product.wants[FORM_BF16] || product.wants[FORM_Q8])
        for_rows(device, product.n_rows, NORM_ROWS, convert_tile, &product);
    parallel_for(device, product.n_tiles, product_tile, &product);
}

/* ---- embed, norm_qkv ---- */

/* out = x / sqrt(mean(x^2) + epsilon) * weight, over n elements; NaN where the squares overflow:
 * 0 would be a number that the model did not give */
static void rmsnorm(float *out, const float *x, const float *weight, int n, float epsilon) {
    vec squares = {0};
    for (int i = 0; i < n; i += LANES) {
        vec value = load_part(x + i, n - i);
        squares += value * value;
    }
    float mean = sum_lanes(squares) / (float)n;
    float scale = 1.0f / sqrtf(mean + epsilon) + 0 * mean; /* 0 * infinity is NaN */
    for (int i = 0; i < n; i += LANES) {
        vec value = load_part(x + i, n - i) * scale * load_part(weight + i, n - i);
        store_part(out + i, value, n - i);
    }
}

struct norm {
    const struct weight *weight;
    const int *rows; /* (n_rows) row of x that each row of h is made from; NULL: its own */
};

static void norm_tile(struct cpu_device *device, const void *argument, int first, int end) {
    const struct norm *norm = argument;
    const struct model_config *config = device->device.config;
    for (int row = first; row < end; row++) {
        int from = norm->rows ? norm->rows[row] : row;
        rmsnorm(row_of(device->h, row), row_of(device->x, from), norm->weight->vector,
                config->d_model, config->norm_epsilon);
    }
}

static void norm_rows(struct cpu_device *device, const struct weight *weight, const int *rows,
                      int n_rows) {
    struct norm norm = {weight, rows};
    for_rows(device, n_rows, NORM_ROWS, norm_tile, &norm);
}

static void embed_tile(struct cpu_device *device, const void *token_embd, int first, int end) {
    float scale = device->device.config->embedding_scale;
    for (int row = first; row < end; row++) {
        float *x = row_of(device->x, row);
        pack_read_row(token_embd, device->batch->token[row], x);
        for (int i = 0; i < device->device.config->d_model && scale > 0; i++)
            x[i] *= scale;
    }
}

static void cpu_embed(struct device *base, const struct weight *token_embd) {
    struct cpu_device *device = (struct cpu_device *)base;
    for_rows(device, device->batch->n_rows, NORM_ROWS, embed_tile, token_embd);
}

static void cpu_norm_qkv(struct device *base, const struct weight *const *layer) {
    struct cpu_device *device = (struct cpu_device *)base;
    norm_rows(device, layer[ATTN_NORM], NULL, device->batch->n_rows);
    run_product(device, (struct product){.matrix = {layer[ATTN_Q], layer[ATTN_K], layer[ATTN_V]},
                                         .bias = {layer[Q_BIAS], layer[K_BIAS], layer[V_BIAS]},
                                         .out = {device->q, device->k, device->v},
                                         .rows = device->h,
                                         .n_rows = device->batch->n_rows});
}

/* ---- rope_append ---- */

/* New keys and values on their way into the blocks: turned by their positions (RoPE, Su et al.
 * 2021), and written where attention reads them. A block keeps keys as [head_dim][16 tokens]: rows
 * are transposed in registers. */

/* Once a step: the cosine of each element of a head turned at a row's position, then the sine of
 * each, with the sign with which it is added. */
static void turn_row(const struct model_config *config, const float *frequency, int position,
                     float *cosine) {
    int dim = config->rope_dim, step = config->rope_adjacent ? 2 : 1;
    int partner = config->rope_adjacent ? 1 : dim / 2;
    double magnitude = config->rope_magnitude > 0 ? (double)config->rope_magnitude : 1;
    float *sine = cosine + dim;
    for (int i = 0; i < dim / 2; i++, cosine += step, sine += step) {
        double angle = position * (double)frequency[i];
        cosine[0] = cosine[partner] = (float)(cos(angle) * magnitude);
        sine[partner] = (float)(sin(angle) * magnitude);
        sine[0] = -sine[partner];
    }
}

static void turn_tile(struct cpu_device *device, const void *unused, int first, int end) {
    const struct model_config *config = device->device.config;
    const float *frequency = device->device.rope_frequency;
    (void)unused;
    for (int row = first; row < end; row++) {
        int position = device->batch->position[row];
        turn_row(config, frequency, position, row_of(device->turn[0], row));
        if (config->theta_windowed > 0)
            turn_row(config, frequency + config->rope_dim / 2, position,
                     row_of(device->turn[1], row));
    }
}

/* Pairs (a, b) become (a cos - b sin, b cos + a sin). */
static void turn_head(float *head, const float *turn, const struct model_config *config) {
    int dim = config->rope_dim, n = dim / 2;
    const float *sine = turn + dim;
    for (int i = 0; i < dim && config->rope_adjacent; i += LANES) {
        vec own = load_part(head + i, dim - i), other = lanes_from(own, 1);
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

static void turn_heads(const struct cpu_device *device, const struct weight *norm, float *heads,
                       int n_heads, int layer, int row) {
    const struct model_config *config = device->device.config;
    bool windowed = config->theta_windowed > 0 && model_window(config, layer) < INT32_MAX;
    const float *turn = row_of(device->turn[windowed], row);
    for (int head = 0; head < n_heads; head++, heads += config->head_dim) {
        if (norm)
            rmsnorm(heads, heads, norm->vector, config->head_dim, config->norm_epsilon);
        turn_head(heads, turn, config);
    }
}

/* A head's keys and values in the blocks of a sequence: (n_layers, {k, v}, heads, 16 * dim).
 * next: the next head's are read after these. */
static struct kv_view kv_view(const struct cpu_device *device, const struct sequence *sequence,
                              int layer, int head, bool next) {
    const struct model_config *config = device->device.config;
    enum kv_type type = device->device.kv_type;
    size_t plane = (size_t)(BLOCK_TOKENS * kv_head_dim(config, type)) * kv_element_bytes(type);
    size_t key = (size_t)(layer * 2 * device->n_kv_heads + head) * plane;
    return (struct kv_view){.type = type,
                            .dim = config->head_dim,
                            .kv = device->device.kv,
                            .block = block_bytes(config, device->device.n_shards, type),
                            .key = key,
                            .value = key + (size_t)device->n_kv_heads * plane,
                            .next_key = next ? key + plane : key,
                            .table = device->batch->block_table + sequence->first_block};
}

static void append_store(enum kv_type type, char *to, vec value, int count) {
    if (type == KV_F32) {
        store_part((float *)(void *)to, value, count);
        return;
    }
    half_vec halves = narrow_bf16((ivec)value);
    memcpy(to, &halves, sizeof(uint16_t) * (size_t)(count < LANES ? count : LANES));
}

/* The keys of n tokens, 16 elements at a time: an element has its line in the plane. */
static void append_keys(enum kv_type type, char *key, const float *k, size_t stride, int n,
                        int dim) {
    for (int at = 0; at < dim; at += LANES) {
        vec rows[LANES] = {{0}};
        for (int row = 0; row < n; row++)
            rows[row] = load_part(k + (size_t)row * stride + at, dim - at);
        transpose(rows);
        for (int i = 0; i < LANES && i < dim - at; i++)
            append_store(type, key + (size_t)(at + i) * LANES * kv_element_bytes(type), rows[i], n);
    }
}

/* Rows k and v (n, stride) of tokens [position, position + n), which are all in one block. */
static void append_write(const struct kv_view *view, int position, int n, const float *k,
                         const float *v, size_t stride) {
    size_t element = kv_element_bytes(view->type), token = (size_t)(position % BLOCK_TOKENS);
    char *block = view->kv + (size_t)view->table[position / BLOCK_TOKENS] * view->block;
    char *key = block + view->key + token * element;
    char *value = block + view->value + token * (size_t)view->dim * element;
    append_keys(view->type, key, k, stride, n, view->dim);
    for (int row = 0; row < n; row++)
        for (int at = 0; at < view->dim; at += LANES)
            append_store(view->type, value + (size_t)(row * view->dim + at) * element,
                         load(v + (size_t)row * stride + at), view->dim - at);
}

struct append {
    const struct weight *const *layer;
    int layer_index;
};

/* Rows that stand in one block are written together. */
static void append_tile(struct cpu_device *device, const void *argument, int row, int end) {
    const struct append *append = argument;
    const struct batch *batch = device->batch;
    for (int i = row; i < end; i++) {
        turn_heads(device, append->layer[ATTN_Q_NORM], row_of(device->q, i), device->n_heads,
                   append->layer_index, i);
        turn_heads(device, append->layer[ATTN_K_NORM], row_of(device->k, i), device->n_kv_heads,
                   append->layer_index, i);
    }
    for (int n; row < end; row += n) {
        const struct sequence *sequence = &batch->sequence[batch->row_sequence[row]];
        int position = batch->position[row];
        n = smaller(end, sequence->first_row + sequence->n_rows) - row;
        n = smaller(n, BLOCK_TOKENS - position % BLOCK_TOKENS);
        for (int head = 0; head < device->n_kv_heads; head++) {
            struct kv_view view = kv_view(device, sequence, append->layer_index, head, false);
            append_write(&view, position, n, row_of(device->k, row) + head * view.dim,
                         row_of(device->v, row) + head * view.dim, device->k.stride);
        }
    }
}

static void cpu_rope_append(struct device *base, const struct weight *const *layer,
                            int layer_index) {
    struct cpu_device *device = (struct cpu_device *)base;
    struct append append = {layer, layer_index};
    int n_rows = device->batch->n_rows, tile_rows = n_rows > MANY_ROWS ? BLOCK_TOKENS : APPEND_ROWS;
    for_rows(device, n_rows, tile_rows, append_tile, &append);
}

/* ---- attention ---- */

/* softmax(q . k) . v of some queries over the paged keys and values of one head. Tokens are taken
 * KV_TILE at a time, in order from token 0, with a running softmax (Milakov and Gimelshein 2018,
 * and FlashAttention, Dao et al. 2022). Nothing is gathered: a block keeps its keys as
 * [head_dim][16 tokens] and its values as [16 tokens][head_dim], so that the lanes of a vector are
 * tokens in the one product and elements of the output in the other.
 * What a query sees does not depend on its neighbours: each score is one chain over head_dim, each
 * output one chain over tokens, and a tile's tokens beyond a query's own, or before its window,
 * have the weight 0; tiles that are all before it are not read. Rows of a block that were never
 * written may hold anything. */

struct kv_tile { /* up to KV_TILE tokens, and what is made of them */
    enum kv_type type;
    int dim, start, n_tokens;                                /* start: the first token */
    const char *key[KV_TILE_BLOCKS], *value[KV_TILE_BLOCKS]; /* planes of their blocks */
    const char *next_key[KV_TILE_BLOCKS];                    /* of the tile that is read next */
    bool ahead; /* the planes come from memory: each line asks for that of the plane read next */
    const float *input; /* (rows, HEAD_STRIDE) queries, or (rows, KV_TILE) weights of tokens */
    float *output;      /* (rows, KV_TILE) scores, or (rows, HEAD_STRIDE) outputs */
};

INLINE vec kv_load(enum kv_type type, const char *plane, size_t at) {
    return type == KV_F32 ? load((const float *)(const void *)plane + at)
                          : widen_bf16((const uint16_t *)(const void *)plane + at);
}

static vec kv_load_part(enum kv_type type, const char *plane, size_t at, int n) {
    uint16_t halves[LANES] = {0};
    if (type == KV_F32)
        return load_part((const float *)(const void *)plane + at, n);
    memcpy(halves, plane + at * sizeof *halves, sizeof *halves * (size_t)n);
    return widen_bf16(halves);
}

/* scores[row][KV_TILE] = query[row] . key[token]: 16 tokens a vector */
INLINE void score_kernel(int n_rows, enum kv_type type, const struct kv_tile *tile) {
    vec sum[QUERY_ROWS][KV_TILE_BLOCKS];
#pragma GCC unroll 6
    for (int row = 0; row < n_rows; row++)
        for (int i = 0; i < KV_TILE_BLOCKS; i++)
            sum[row][i] = (vec){0};
    for (size_t d = 0; d < (size_t)tile->dim; d++) {
        vec keys[KV_TILE_BLOCKS];
        for (int i = 0; i < KV_TILE_BLOCKS; i++)
            keys[i] = kv_load(type, tile->key[i], d * BLOCK_TOKENS);
        for (int i = 0; i < KV_TILE_BLOCKS && tile->ahead; i++)
            __builtin_prefetch(tile->value[i] + d * BLOCK_TOKENS * kv_element_bytes(type));
        for (int row = 0; row < n_rows; row++) {
            float factor = tile->input[(size_t)row * HEAD_STRIDE + d];
            for (int i = 0; i < KV_TILE_BLOCKS; i++)
                sum[row][i] += factor * keys[i];
        }
    }
    for (int row = 0; row < n_rows; row++)
        for (int i = 0; i < KV_TILE_BLOCKS; i++)
            store(tile->output + row * KV_TILE + i * LANES, sum[row][i]);
}

/* output[row][begin + 16 * n_vectors] += weight[row][token] * value[token] */
INLINE void value_kernel(int n_rows, enum kv_type type, int begin, int n_vectors,
                         const struct kv_tile *tile) {
    vec sum[QUERY_ROWS][4];
#pragma GCC unroll 6
    for (int row = 0; row < n_rows; row++)
        for (int i = 0; i < n_vectors; i++)
            sum[row][i] = load(tile->output + row * HEAD_STRIDE + begin + i * LANES);
    int left = tile->dim - begin;
    for (int token = 0; token < tile->n_tokens; token++) {
        const char *plane = tile->value[token / BLOCK_TOKENS];
        size_t at = (size_t)(token % BLOCK_TOKENS * tile->dim + begin);
        vec values[4];
        for (int i = 0; i < n_vectors; i++)
            values[i] = n_vectors > 1 || left >= LANES
                            ? kv_load(type, plane, at + (size_t)i * LANES)
                            : kv_load_part(type, plane, at, left);
        for (int i = 0; i < n_vectors && tile->ahead; i++)
            __builtin_prefetch(tile->next_key[token / BLOCK_TOKENS] +
                               (at + (size_t)i * LANES) * kv_element_bytes(type));
        for (int row = 0; row < n_rows; row++) {
            float factor = tile->input[row * KV_TILE + token];
            for (int i = 0; i < n_vectors; i++)
                sum[row][i] += factor * values[i];
        }
    }
    for (int row = 0; row < n_rows; row++)
        for (int i = 0; i < n_vectors; i++)
            store(tile->output + row * HEAD_STRIDE + begin + i * LANES, sum[row][i]);
}

static void compute_scores(int n_rows, const struct kv_tile *tile) {
    if (tile->type == KV_F32)
        WITH_ROWS(n_rows, score_kernel, KV_F32, tile);
    else
        WITH_ROWS(n_rows, score_kernel, KV_BF16, tile);
}

/* All elements of the outputs: 4 vectors at a time, then one. */
INLINE void value_vectors(int n_rows, enum kv_type type, const struct kv_tile *tile) {
    int at = 0;
    for (; tile->dim - at >= 4 * LANES; at += 4 * LANES)
        value_kernel(n_rows, type, at, 4, tile);
    for (; at < tile->dim; at += LANES)
        value_kernel(n_rows, type, at, 1, tile);
}

static void add_values(int n_rows, const struct kv_tile *tile) {
    if (tile->type == KV_F32)
        WITH_ROWS(n_rows, value_vectors, KV_F32, tile);
    else
        WITH_ROWS(n_rows, value_vectors, KV_BF16, tile);
}

/* scores (KV_TILE) become exp(score - max) of [from, visible), at least one of them, and 0. A
 * larger maximum than before scales what is there of the output (dim). */
static void softmax_tile(float *scores, int from, int visible, struct softmax *state, float *output,
                         int dim) {
    const ivec count = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const vec zero = {0}, none = zero - INFINITY;
    vec value[KV_TILE / LANES], largest = none;
    for (int i = 0; i < KV_TILE / LANES; i++) {
        ivec seen = (count + i * LANES < visible) & (count + i * LANES >= from);
        value[i] = select_vec(seen, load(scores + i * LANES), none);
        largest = max_vec(value[i], largest);
    }
    float max = max_lanes(largest);
    if (max > state->max) {
        vec scale = exp_vec(zero + (state->max - max));
        state->max = max;
        state->sum *= scale;
        for (int at = 0; at < dim; at += LANES)
            store(output + at, load(output + at) * scale);
    }
    for (int i = 0; i < KV_TILE / LANES; i++) {
        vec part = exp_vec(value[i] - state->max);
        store(scores + i * LANES, part);
        state->sum += part;
    }
}

/* Where the planes at `offset` of a tile's blocks begin. A tile that the text does not fill has
 * its last block several times; what it gives there has the weight 0. */
static void find_planes(const struct kv_view *view, int start, int end, size_t offset,
                        const char *plane[KV_TILE_BLOCKS]) {
    int last = (end - 1) / BLOCK_TOKENS;
    for (int i = 0; i < KV_TILE_BLOCKS; i++) {
        int block = smaller(start / BLOCK_TOKENS + i, last);
        plane[i] = view->kv + (size_t)view->table[block] * view->block + offset;
    }
}

static int first_seen(const struct attention_scratch *scratch, int position) {
    return position - smaller(position, scratch->window - 1);
}

/* Adds a tile to the queries [first, end), which see of it. */
static void attend_tile(struct kv_tile *tile, int first, int end,
                        struct attention_scratch *scratch) {
    int n_tokens = tile->n_tokens;
    for (int rows; first < end; first += rows) {
        const int *position = scratch->position + first;
        float *scores = scratch->scores + first * KV_TILE;
        float *output = scratch->output + first * HEAD_STRIDE;
        rows = smaller(end - first, QUERY_ROWS);
        tile->input = scratch->query + first * HEAD_STRIDE;
        tile->output = scores;
        compute_scores(rows, tile);
        for (int i = 0; i < rows; i++)
            softmax_tile(scores + i * KV_TILE, first_seen(scratch, position[i]) - tile->start,
                         position[i] - tile->start + 1, &scratch->state[first + i],
                         output + i * HEAD_STRIDE, tile->dim);
        tile->n_tokens = smaller(position[rows - 1] - tile->start + 1, n_tokens);
        tile->input = scores;
        tile->output = output;
        add_values(rows, tile);
        tile->ahead = false; /* the next queries find them in a cache */
    }
}

/* The outputs of scratch->n queries. */
static void attention_rows(const struct kv_view *view, struct attention_scratch *scratch) {
    int n = scratch->n, end = scratch->position[n - 1] + 1, first = 0, seeing = 0;
    int begin = first_seen(scratch, scratch->position[0]) / KV_TILE * KV_TILE;
    for (int i = 0; i < n; i++)
        for (int at = 0; at < view->dim; at += LANES)
            store(scratch->output + i * HEAD_STRIDE + at, (vec){0});
    for (int start = begin; start < end; start += KV_TILE) {
        bool last = start + KV_TILE >= end;
        struct kv_tile tile = {.type = view->type,
                               .dim = view->dim,
                               .start = start,
                               .n_tokens = smaller(end - start, KV_TILE),
                               .ahead = true};
        find_planes(view, start, end, view->key, tile.key);
        find_planes(view, start, end, view->value, tile.value);
        find_planes(view, last ? 0 : start + KV_TILE, end, last ? view->next_key : view->key,
                    tile.next_key);
        while (scratch->position[first] < start)
            first++;
        while (seeing < n && first_seen(scratch, scratch->position[seeing]) < start + KV_TILE)
            seeing++;
        attend_tile(&tile, first, seeing, scratch);
    }
    for (int i = 0; i < n; i++) {
        float sum = sum_lanes(scratch->state[i].sum);
        float *output = scratch->output + i * HEAD_STRIDE;
        for (int at = 0; at < view->dim; at += LANES)
            store(output + at, (load(output + at) + 0.0f) / sum); /* + 0: never -0 */
    }
}

struct attention_job {
    const struct cpu_device *device;
    const struct weight *sinks;      /* (n_heads) or NULL */
    int layer, heads, n_head_groups; /* heads: that a tile takes */
};

/* Queries of one sequence and one KV head: (row, head of the group), flattened. */
static void attend(const struct attention_job *job, const struct sequence *sequence, int first,
                   int head, bool next, struct attention_scratch *scratch) {
    const struct cpu_device *device = job->device;
    int dim = device->device.config->head_dim, group = device->n_heads / device->n_kv_heads;
    float *out[QUERIES], scale = device->device.config->attention_scale;
    scale = scale > 0 ? scale : 1.0f / sqrtf((float)dim);
    scratch->window = model_window(device->device.config, job->layer);
    scratch->n = smaller(sequence->n_rows * group - first, QUERIES);
    for (int i = 0; i < scratch->n; i++) {
        int row = (first + i) / group, own_head = head * group + (first + i) % group;
        scratch->position[i] = sequence->start + row;
        scratch->state[i] = (struct softmax){.max = -INFINITY};
        if (job->sinks) /* a token with this score and the value 0 */
            scratch->state[i] = (struct softmax){job->sinks->vector[own_head], {1}};
        const float *q = row_of(device->q, sequence->first_row + row) + own_head * dim;
        out[i] = row_of(device->attention, sequence->first_row + row) + own_head * dim;
        for (int j = 0; j < dim; j++)
            scratch->query[i * HEAD_STRIDE + j] = q[j] * scale;
    }
    struct kv_view view = kv_view(device, sequence, job->layer, head, next);
    attention_rows(&view, scratch);
    for (int i = 0; i < scratch->n; i++)
        memcpy(out[i], scratch->output + i * HEAD_STRIDE, sizeof(float) * (size_t)dim);
}

/* A thread takes neighbouring heads: their keys are neighbours in a block, and being read ahead. */
static void attention_tile(const void *argument, int index, struct scratch *scratch) {
    const struct attention_job *job = argument;
    const struct cpu_device *device = job->device;
    const struct batch *batch = device->batch;
    int which = 0, head = index % job->n_head_groups * job->heads;
    int last = smaller(head + job->heads, device->n_kv_heads);
    /* the last of a prompt first: they see the most, and take longest */
    index = device->first_tile[batch->n_sequences] - 1 - index / job->n_head_groups;
    while (index >= device->first_tile[which + 1])
        which++;
    int first = (index - device->first_tile[which]) * QUERIES;
    for (; head < last; head++)
        attend(job, &batch->sequence[which], first, head, head + 1 < last, &scratch->attention);
}

static void cpu_attention(struct device *base, const struct weight *const *layer, int layer_index) {
    struct cpu_device *device = (struct cpu_device *)base;
    int n_tiles = device->first_tile[device->batch->n_sequences], n_heads = device->n_kv_heads;
    int enough = TILES_A_THREAD * device->cpu->pool.n_threads;
    int heads = smaller(n_tiles * n_heads / enough, n_heads);
    struct attention_job job = {device, layer[ATTN_SINKS], layer_index, heads > 1 ? heads : 1, 0};
    job.n_head_groups = divide_up(n_heads, job.heads);
    parallel_for(device, n_tiles * job.n_head_groups, attention_tile, &job);
}

/* ---- project_add, all_reduce_add ---- */

/* Segments end between heads, or at an even k: where any number of shards cuts the matrix. */
static void cpu_project_add(struct device *base, const struct weight *matrix,
                            enum product_input input) {
    struct cpu_device *device = (struct cpu_device *)base;
    bool attends = input == INPUT_ATTENTION;
    bool add = base->n_shards == 1 && !base->config->post_norm;
    int n_segments = K_SEGMENTS / base->n_shards;
    run_product(device, (struct product){.matrix = {matrix},
                                         .out = {add ? device->x : device->partial},
                                         .rows = attends ? device->attention : device->ffn,
                                         .n_rows = device->batch->n_rows,
                                         .unit = attends ? base->config->head_dim : 2,
                                         .first_segment = base->rank * n_segments,
                                         .n_segments = n_segments,
                                         .add = add});
}

struct reduction {
    struct cpu_device *const *shards;
    const struct weight *norm; /* of what is added to x; or NULL */
};

/* Of all shards: their partial sums, as a binary tree, to each one's x. */
static void reduce_tile(struct cpu_device *device, const void *argument, int first, int end) {
    const struct reduction *reduction = argument;
    struct cpu_device *const *shards = reduction->shards;
    const struct model_config *config = device->device.config;
    int n_shards = device->device.n_shards;
    size_t begin = (size_t)first * device->x.stride, stop = (size_t)end * device->x.stride;
    for (size_t at = begin; at < stop; at += LANES) {
        vec sum[MAX_SHARDS];
        for (int shard = 0; shard < n_shards; shard++)
            sum[shard] = load(shards[shard]->partial.at + at);
        for (int n = n_shards; n > 1; n /= 2)
            for (int j = 0; j < n / 2; j++)
                sum[j] = sum[2 * j] + sum[2 * j + 1];
        store(device->partial.at + at, sum[0]);
    }
    for (int row = first; row < end && reduction->norm; row++)
        rmsnorm(row_of(device->partial, row), row_of(device->partial, row), reduction->norm->vector,
                config->d_model, config->norm_epsilon);
    for (size_t at = begin; at < stop; at += LANES) {
        vec total = load(device->x.at + at) + load(device->partial.at + at);
        for (int shard = 0; shard < n_shards; shard++)
            store(shards[shard]->x.at + at, total);
    }
}

static void cpu_all_reduce_add(struct device **shards, int n_shards,
                               const struct weight *const *norm) {
    struct cpu_device *device = (struct cpu_device *)shards[0];
    struct reduction reduction = {(struct cpu_device *const *)shards, norm ? norm[0] : NULL};
    if (n_shards > 1 || norm) /* else project_add has done it */
        for_rows(device, device->batch->n_rows, NORM_ROWS, reduce_tile, &reduction);
}

static void add_bias_tile(struct cpu_device *device, const void *argument, int first, int end) {
    const struct weight *bias = argument;
    int n = device->device.config->d_model;
    for (int row = first; row < end; row++)
        for (int at = 0; at < n; at += LANES) {
            float *x = row_of(device->x, row) + at;
            store_part(x, load_part(x, n - at) + load_part(bias->vector + at, n - at), n - at);
        }
}

static void cpu_add_bias(struct device *base, const struct weight *bias) {
    struct cpu_device *device = (struct cpu_device *)base;
    for_rows(device, device->batch->n_rows, NORM_ROWS, add_bias_tile, bias);
}

/* ---- norm_gate_up ---- */

static void cpu_norm_gate_up(struct device *base, const struct weight *const *layer) {
    struct cpu_device *device = (struct cpu_device *)base;
    norm_rows(device, layer[FFN_NORM], NULL, device->batch->n_rows);
    run_product(device, (struct product){.matrix = {layer[FFN_GATE], layer[FFN_UP]},
                                         .bias = {layer[FFN_GATE_BIAS], layer[FFN_UP_BIAS]},
                                         .gated = true,
                                         .out = {device->ffn},
                                         .rows = device->h,
                                         .n_rows = device->batch->n_rows});
}

/* ---- experts: norm_route, expert_gate_up, expert_down_add ---- */

/* Of each row the n_used experts with the largest logits, of equals those that come first, and
 * their shares. */
static void choose_tile(struct cpu_device *device, const void *unused, int row, int end) {
    const struct model_config *config = device->device.config;
    int n = config->n_experts, n_used = config->n_used;
    (void)unused;
    for (; row < end; row++) {
        float *logits = row_of(device->router, row), sum = 0, largest = 0;
        int *chosen = device->chosen + row * n_used;
        float *share = device->share + row * n_used;
        for (int slot = 0; slot < n_used; slot++) {
            int best = 0;
            for (int i = 1; i < n; i++)
                best = logits[i] > logits[best] ? i : best;
            chosen[slot] = best;
            largest = slot > 0 ? largest : logits[best];
            share[slot] = expf(logits[best] - largest);
            sum += share[slot];
            logits[best] = -INFINITY;
        }
        for (int i = 0; i < n && config->share_of_all; i++)
            sum += expf(logits[i] - largest);
        for (int slot = 0; slot < n_used; slot++)
            share[slot] /= sum;
    }
}

/* The step's entries: those of this shard's experts. */
static void group_entries(struct cpu_device *device) {
    const struct model_config *config = device->device.config;
    int n = device->batch->n_rows * config->n_used;
    int n_own = K_SEGMENTS / device->device.n_shards, first = device->device.rank * n_own;
    device->n_entries = device->n_groups = 0;
    for (int expert = 0; expert < config->n_experts; expert++) {
        int group = expert_group(config, expert) - first, begin = device->n_entries;
        for (int i = 0; i < n; i++) {
            if (device->chosen[i] != expert)
                continue;
            bool own = group >= 0 && group < n_own;
            device->entry[i] = own ? device->n_entries : -1;
            if (own)
                device->source[device->n_entries++] = i / config->n_used;
        }
        if (device->n_entries > begin)
            device->groups[device->n_groups++] =
                (struct part){.expert = expert, .first = begin, .n = device->n_entries - begin};
    }
}

static void cpu_norm_route(struct device *base, const struct weight *const *layer) {
    struct cpu_device *device = (struct cpu_device *)base;
    norm_rows(device, layer[FFN_NORM], NULL, device->batch->n_rows);
    run_product(device, (struct product){.matrix = {layer[ROUTER]},
                                         .bias = {layer[ROUTER_BIAS]},
                                         .out = {device->router},
                                         .rows = device->h,
                                         .n_rows = device->batch->n_rows});
    for_rows(device, device->batch->n_rows, NORM_ROWS, choose_tile, NULL);
    group_entries(device);
}

static void cpu_expert_gate_up(struct device *base, const struct weight *const *layer) {
    struct cpu_device *device = (struct cpu_device *)base;
    run_product(device, (struct product){.matrix = {layer[GATE_EXPERTS], layer[UP_EXPERTS]},
                                         .bias = {layer[GATE_EXPERTS_BIAS], layer[UP_EXPERTS_BIAS]},
                                         .each = base->config->d_ff,
                                         .gated = true,
                                         .out = {device->ffn},
                                         .rows = device->h,
                                         .source = device->source,
                                         .n_rows = device->n_entries});
}

/* Each row's outputs of its experts by their shares, summed by groups of experts, and those as a
 * binary tree: shards hold whole groups, so that their number makes no difference. */
static void combine_tile(struct cpu_device *device, const void *unused, int row, int end) {
    const struct model_config *config = device->device.config;
    int n_used = config->n_used, n_own = K_SEGMENTS / device->device.n_shards;
    bool add = device->device.n_shards == 1;
    (void)unused;
    for (; row < end; row++) {
        for (size_t at = 0; at < device->x.stride; at += LANES) {
            vec sum[K_SEGMENTS] = {{0}};
            for (int i = row * n_used; i < (row + 1) * n_used; i++) {
                int group = expert_group(config, device->chosen[i]) % n_own;
                if (device->entry[i] >= 0)
                    sum[group] +=
                        device->share[i] * load(row_of(device->expert_out, device->entry[i]) + at);
            }
            for (int n = n_own; n > 1; n /= 2)
                for (int j = 0; j < n / 2; j++)
                    sum[j] = sum[2 * j] + sum[2 * j + 1];
            float *to = row_of(add ? device->x : device->partial, row) + at;
            store(to, add ? load(to) + sum[0] : sum[0]);
        }
    }
}

static void cpu_expert_down_add(struct device *base, const struct weight *const *layer) {
    struct cpu_device *device = (struct cpu_device *)base;
    run_product(device, (struct product){.matrix = {layer[DOWN_EXPERTS]},
                                         .bias = {layer[DOWN_EXPERTS_BIAS]},
                                         .each = base->config->d_model,
                                         .out = {device->expert_out},
                                         .rows = device->ffn,
                                         .n_rows = device->n_entries});
    for_rows(device, device->batch->n_rows, NORM_ROWS, combine_tile, NULL);
}

/* ---- sample ---- */

static void draw_token(struct cpu_device *device, const void *first, int index, int end) {
    const struct batch *batch = device->batch;
    int n = device->device.config->vocab_size, sample = *(const int *)first + index;
    int position = batch->position[batch->sample_row[sample]] + 1;
    const float *logits = row_of(device->logits, index);
    (void)end;
    int token =
        sampler_draw(&batch->sampling[sample], position, logits, n, row_of(device->scaled, index),
                     device->candidates + (size_t)index * (size_t)n);
    device->sampled[sample] = token;
    if (batch->top && batch->top[sample] && token >= 0)
        sampler_top(logits, n, token, batch->top[sample]);
}

/* The tokens of samples [first, first + n), of which the logits are there. */
static void draw_tokens(struct cpu_device *device, int first, int n) {
    for_rows(device, n, 1, draw_token, &first);
}

static void cpu_sample(struct device *base, const struct weight *const *weights, float *logits) {
    struct cpu_device *device = (struct cpu_device *)base;
    size_t vocab = (size_t)base->config->vocab_size;
    int n_samples = device->batch->n_samples;
    for (int first = 0; first < n_samples; first += LOGIT_ROWS) {
        int n = smaller(n_samples - first, LOGIT_ROWS);
        norm_rows(device, weights[OUTPUT_NORM], device->batch->sample_row + first, n);
        run_product(device, (struct product){.matrix = {weights[OUTPUT]},
                                             .out = {device->logits},
                                             .rows = device->h,
                                             .n_rows = n});
        if (logits)
            memcpy(logits + (size_t)first * vocab, device->logits.at,
                   (size_t)n * vocab * sizeof *logits);
        draw_tokens(device, first, n);
    }
}

/* ---- a step ---- */

static bool cpu_step_begin(struct device *base, const struct batch *batch) {
    struct cpu_device *device = (struct cpu_device *)base;
    assert(batch->n_rows <= base->max_rows && batch->n_samples <= base->max_samples);
    if (base->rank == 0) /* one thread drives all shards of a worker */
        pool_enter(&device->cpu->pool);
    device->batch = batch;
    int group = device->n_heads / device->n_kv_heads;
    for (int i = 0; i < batch->n_sequences; i++) {
        device->first_tile[i + 1] =
            device->first_tile[i] + divide_up(batch->sequence[i].n_rows * group, QUERIES);
    }
    for_rows(device, batch->n_rows, NORM_ROWS, turn_tile, NULL);
    return true;
}

static void cpu_step_end(struct device *base, int *sampled) {
    struct cpu_device *device = (struct cpu_device *)base;
    if (sampled && base->rank == 0)
        memcpy(sampled, device->sampled, sizeof *sampled * (size_t)device->batch->n_samples);
    device->batch = NULL;
    if (base->rank == 0)
        pool_leave(&device->cpu->pool);
}

/* ---- the backend ---- */

static void cpu_close(struct backend *backend) {
    struct cpu_backend *cpu = (struct cpu_backend *)backend;
    pool_close(&cpu->pool);
    copier_close(&cpu->copier);
    while (cpu->weights) {
        struct weight *weight = cpu->weights;
        cpu->weights = weight->next;
        if (weight->owner)
            free(weight->panels);
        pack_close(weight);
    }
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
    .limits = cpu_limits,
    .copy = cpu_copy,
    .copy_done = cpu_copy_done,
    .step_begin = cpu_step_begin,
    .embed = cpu_embed,
    .norm_qkv = cpu_norm_qkv,
    .rope_append = cpu_rope_append,
    .attention = cpu_attention,
    .project_add = cpu_project_add,
    .norm_gate_up = cpu_norm_gate_up,
    .norm_route = cpu_norm_route,
    .expert_gate_up = cpu_expert_gate_up,
    .expert_down_add = cpu_expert_down_add,
    .all_reduce_add = cpu_all_reduce_add,
    .add_bias = cpu_add_bias,
    .sample = cpu_sample,
    .step_end = cpu_step_end,
    .kv_type = KV_F32,
    .chunk = PREFILL_CHUNK,
};

struct backend *cpu_backend_open(const struct backend_options *options, char *error) {
    struct cpu_backend *cpu = aligned_alloc(128, round_up(sizeof *cpu, 128));
    if (!cpu) {
        (void)fail(error, "no memory for the CPU backend");
        return NULL;
    }
    memset(cpu, 0, sizeof *cpu);
    cpu->backend = operations;
    cpu->plain = options->plain;
    cpu->amx = !options->plain && amx_ready();
    pthread_mutex_init(&cpu->upload_mutex, NULL);
    if (!copier_open(&cpu->copier, options->copy_delay_seed)) {
        (void)fail(error, "the copier thread of the CPU backend did not start");
        free(cpu);
        return NULL;
    }
    int n_threads = options->n_threads > 1 ? options->n_threads : 1;
    int n_started = pool_open(&cpu->pool, n_threads, sizeof(struct scratch));
    if (n_started < n_threads) {
        (void)fail(error, "%d threads: only %d did start", n_threads, n_started);
        cpu_close(&cpu->backend);
        return NULL;
    }
    return &cpu->backend;
}
