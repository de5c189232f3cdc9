/* device.h: what a device of the CPU backend is, and how things get on it and off.
 *
 * Owns: memory, the packed weights, which all devices share, the activations of each, and the
 * threads' scratch. Copies go through the copier's thread; everything else runs on the pool.
 *
 *     struct device *device = cpu_device_open(backend, &wanted, error); // NULL: error says why
 *     const struct weight *weight = cpu_upload(device, tensor, slice, error);
 *     parallel_for((struct cpu_device *)device, n_tiles, product_tile, &product);
 *     cpu_device_close(device);
 *
 * Invariant: all devices of a backend share one copy of the packed weights; a shard is a view of
 * it. Knows of ops only how much scratch they need. Read next: kernels.c, whose first half this
 * is. */
#ifndef DEVICE_H
#define DEVICE_H
#include "attention.h"
#include "dynamo.h"
#include "lib/probe.h"
#include "lib/product.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define POOL_IMPLEMENTATION
#include "lib/pool.h"
#define COPIER_IMPLEMENTATION
#include "copier.h"
#define PACK_IMPLEMENTATION
#include "lib/pack.h"

enum {
    PAD = 16,             /* activation rows are padded so; one more breaks strides of 2^n */
    MAX_ACTIVATIONS = 20, /* arrays of a device */
    HUGE_PAGE = 2 << 20,  /* bytes: fewer misses of the TLB */
    PROBE_PIECES = 256,   /* of the weights are read to measure the memory, */
    PROBE_BYTES = 1 << 20 /* so many bytes each */
};

struct scratch { /* of one thread: what a tile of a product or of attention works on */
    alignas(64) float slab[SLAB * PANEL];
    float tile[5][ROW_CHUNK * PANEL];
    struct attention_scratch attention;
};

struct cpu_backend {
    struct backend backend;
    struct pool pool;
    struct copier copier;
    pthread_mutex_t upload_mutex;
    struct weight *weights; /* a list, under upload_mutex */
    bool plain;             /* no fast paths */
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
    char *converted[N_FORMS];     /* (rows, converted_stride) the input of a product, see dot.h */
    size_t converted_stride[N_FORMS]; /* bytes */
    float *turn;                      /* (max_rows, {cos, sin}, rope_dim) */
    float *logits;                    /* (LOGIT_ROWS at most, vocab_size) */
    float *scaled;                    /* the same: logits / temperature */
    int *candidates;                  /* the same: of the sampler */
    int *sampled;                     /* (max_samples) */
    int *first_tile;               /* (max_rows + 1) attention tiles of a head before a sequence */
    void *memory[MAX_ACTIVATIONS]; /* (n_memory) all of the above */
    int n_memory;
    struct copy_queue copies[N_STREAMS];
};

static void parallel_for(struct cpu_device *device, int n_tiles, tile_function *run,
                         const void *argument) {
    pool_run(&device->cpu->pool, device->job, device->scratch, n_tiles, run, argument);
}

/* ---- memory, copies and weights ---- */

/* Linux says it in /proc/meminfo; where there is no such file, free pages alone count. */
size_t host_free_memory(void) {
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

static size_t cpu_free_memory(struct device *device, bool pinned) {
    (void)device;
    (void)pinned;
    return host_free_memory();
}

static void *cpu_alloc(struct device *device, size_t bytes, bool pinned) {
    if (bytes > cpu_free_memory(device, pinned))
        return NULL;
    char *memory = aligned_alloc(64, round_up(bytes > 0 ? bytes : 1, 64));
    size_t first = -(uintptr_t)memory & (HUGE_PAGE - 1); /* whole ones: the rest would be wasted */
    if (memory && first + HUGE_PAGE <= bytes)
        madvise(memory + first, (bytes - first) & ~(size_t)(HUGE_PAGE - 1), MADV_HUGEPAGE);
    return memory;
}

static void cpu_release(struct device *device, void *memory, bool pinned) {
    (void)device;
    (void)pinned;
    free(memory);
}

static uint64_t cpu_copy(struct device *base, enum stream stream, const struct copy2d *copy) {
    struct cpu_device *device = (struct cpu_device *)base;
    return copier_add(&device->cpu->copier, &device->copies[stream], copy);
}

static bool cpu_copy_done(struct device *base, enum stream stream, uint64_t ticket) {
    return copier_done(&((struct cpu_device *)base)->copies[stream], ticket);
}

static void pack_tile(const void *argument, int tile, struct scratch *scratch) {
    (void)scratch;
    pack_panel(argument, tile);
}

static struct weight *pack(struct cpu_device *device, const struct tensor *tensor) {
    struct weight *weight = pack_open(tensor);
    if (!weight || weight->vector)
        return weight;
    weight->panels = cpu_alloc(&device->device, pack_bytes(weight), false);
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
                                       struct slice slice, char *error) {
    struct cpu_device *device = (struct cpu_device *)base;
    struct cpu_backend *cpu = device->cpu;
    pthread_mutex_lock(&cpu->upload_mutex);
    struct weight *weight = cpu->weights;
    while (weight && !(weight->owner && weight->tensor == tensor))
        weight = weight->next;
    if (!weight)
        weight = add_weight(cpu, pack(device, tensor));
    if (weight && slice.kind != SLICE_WHOLE)
        weight = add_weight(cpu, pack_view(weight, slice));
    pthread_mutex_unlock(&cpu->upload_mutex);
    if (!weight) {
        (void)fail(error, "%.*s: no memory for %zu bytes of weights", (int)tensor->name.length,
                   tensor->name.data, tensor->bytes);
    }
    return weight;
}

/* All devices share the pool: n make no difference. */
static void cpu_limits(struct device **shards, int n, enum tensor_type type, double *read,
                       double *ops) {
    struct cpu_device *device = (struct cpu_device *)shards[0];
    struct cpu_backend *cpu = device->cpu;
    struct probe probe = {&cpu->pool, device->job, device->scratch};
    struct probe_piece pieces[PROBE_PIECES];
    int n_pieces = 0;
    (void)n;
    pthread_mutex_lock(&cpu->upload_mutex);
    for (const struct weight *weight = cpu->weights; weight; weight = weight->next) {
        size_t bytes = weight->owner ? pack_bytes(weight) : 0;
        for (size_t at = 0; at < bytes && n_pieces < PROBE_PIECES; at += PROBE_BYTES)
            pieces[n_pieces++] = (struct probe_piece){
                weight->panels + at, bytes - at < PROBE_BYTES ? bytes - at : PROBE_BYTES};
    }
    pthread_mutex_unlock(&cpu->upload_mutex);
    *read = probe_read(&probe, pieces, n_pieces);
    *ops = probe_multiply(&probe, dot_form(type, cpu->plain));
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
                {"rows of the feed-forward part", config->d_ff, n == 1 ? 1 : 2 * n},
                {"attention heads per key-value head", config->n_heads, config->n_kv_heads}};
    if (n < 1 || n > MAX_SHARDS || (n & (n - 1)) || wanted->rank < 0 || wanted->rank >= n)
        return fail(error, "--tp: got %d, expected 1, 2, 4 or 8", n);
    for (size_t i = 0; i < sizeof cuts / sizeof *cuts; i++)
        if (cuts[i].unit < 1 || cuts[i].value % cuts[i].unit)
            return fail(error, "--tp %d: got %d %s, expected a multiple of %d", n, cuts[i].value,
                        cuts[i].name, cuts[i].unit);
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
    bool fits = bytes < HUGE_PAGE || bytes <= cpu_free_memory(&device->device, false);
    char *memory = fits ? calloc(1, bytes) : NULL;
    device->memory[device->n_memory++] = memory;
    return memory ? memory + (-(uintptr_t)memory & 63) : NULL;
}

static void cpu_device_close(struct device *base) {
    struct cpu_device *device = (struct cpu_device *)base;
    struct cpu_backend *cpu = device->cpu;
    for (int stream = 0; stream < N_STREAMS; stream++)
        copier_drain(&cpu->copier, &device->copies[stream]);
    if (device->job)
        pool_give_job(&cpu->pool, device->job);
    for (int i = 0; i < device->n_memory; i++)
        free(device->memory[i]);
    free(device);
}

static bool allocate_activations(struct cpu_device *device) {
    const struct model_config *config = device->device.config;
    size_t rows = (size_t)device->device.max_rows, samples = (size_t)device->device.max_samples;
    size_t vocab = (size_t)config->vocab_size;
    size_t logit_rows = samples < LOGIT_ROWS ? samples : LOGIT_ROWS;
    size_t normed = rows > logit_rows ? rows : logit_rows;
    device->x_stride = stride_of(config->d_model);
    device->q_stride = stride_of(device->n_heads * config->head_dim);
    device->kv_stride = stride_of(device->n_kv_heads * config->head_dim);
    device->ffn_stride = stride_of(device->d_ff);
    device->x = zeros(device, rows, device->x_stride);
    device->h = zeros(device, normed, device->x_stride);
    device->partial = zeros(device, device->device.n_shards > 1 ? rows : 0, device->x_stride);
    device->q = zeros(device, rows, device->q_stride);
    device->attention = zeros(device, rows, device->q_stride);
    device->k = zeros(device, rows, device->kv_stride);
    device->v = zeros(device, rows, device->kv_stride);
    device->ffn = zeros(device, rows, device->ffn_stride);
    size_t widest = device->q_stride > device->x_stride ? device->q_stride : device->x_stride;
    widest = device->ffn_stride > widest ? device->ffn_stride : widest;
    for (int form = FORM_F32 + 1; form < N_FORMS; form++) { /* a segment may cut a block in two */
        device->converted_stride[form] =
            dot_form_bytes(form, 0, (int)widest + 2 * K_SEGMENTS * Q8_BLOCK);
        device->converted_stride[form] = round_up(device->converted_stride[form], 64) + 64;
        device->converted[form] = zeros(device, normed, device->converted_stride[form] / 4);
    }
    device->turn = zeros(device, rows, 2 * (size_t)config->rope_dim);
    device->logits = zeros(device, logit_rows, vocab);
    device->scaled = zeros(device, logit_rows, vocab);
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
        device->d_ff = wanted->config->d_ff / wanted->n_shards;
        device->job = pool_take_job(&cpu->pool, wanted->urgent);
        if (device->job && allocate_activations(device))
            return &device->device;
        cpu_device_close(&device->device);
    }
    (void)fail(error, "no memory for a device of %d rows and %d samples", wanted->max_rows,
               wanted->max_samples);
    return NULL;
}
#endif /* DEVICE_H */
