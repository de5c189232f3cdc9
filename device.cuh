/* device.cuh: what a device of the CUDA backend is, and how things get on it and off.
 *
 * Owns: the GPUs' memory, streams and events, weights on their way up, blocks on their way to and
 * fro. Devices on one GPU share its weights. A device's fault ends the program: with file, line,
 * device, call, and what was being done, after the caller was told (backend_options.lost).
 *
 *     struct cuda_device *d = enter(device, "loading weights"); // it is the current one now
 *     TRY(d, cudaStreamSynchronize(stream));                    // or the program ends
 *     launch(d, "norm_kernel", norm_kernel, grid_of(n), THREADS, 0, x, y, n);
 *
 * Read next: kernels.cu, whose first half this is. */
#ifndef DEVICE_CUH
#define DEVICE_CUH
extern "C" {
#include "dynamo.h"
}
#include "pack.cuh"
#include "product.cuh"
#include "sampler.cuh"

#include <assert.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    MAX_GPUS = 64,
    RING = 1024,              /* copies of a stream that can be under way */
    STAGING_BYTES = 32 << 20, /* of weights on their way up; two of them */
    CHUNK_ROWS = 2048,        /* prompt tokens of a step that fill the chip */
    ALL_ROWS = -1,
    PROBE_MS = 1,           /* that a probe takes at least */
    CHAIN_ROWS = 256,       /* prompt rows that a shard hands to the next at a time */
    BLOCKS_A_PROCESSOR = 4, /* of generated_attention, whose list of work may be long */
    MIN_MAJOR = 8,          /* compute capability: mma of bf16, cp.async */
    PIECES = 64             /* memory blocks of a device */
};

struct weight { /* a matrix, or a vector of f32 */
    const struct tensor *tensor;
    struct slice slice;
    int gpu;
    struct matrix matrix;
    float *vector; /* device (its part of the tensor); NULL: a matrix */
    struct weight *next;
};

struct gpu { /* what devices on the same GPU share */
    bool open;
    cudaDeviceProp properties;
    cudaStream_t stream; /* for uploads */
    cudaEvent_t free[2];
    char *pinned[2], *raw[2]; /* (staging_bytes) host, device */
    size_t staging_bytes;
};

struct cuda_backend {
    struct backend backend;
    struct backend_options options;
    pthread_mutex_t upload_mutex;
    struct weight *weights; /* a list, under upload_mutex */
    struct gpu gpus[MAX_GPUS];
    int n_gpus;
};

struct graph { /* a recorded decode step of up to 8 * index rows */
    cudaGraphExec_t exec;
    uint64_t n_launches;
};

struct ticket_ring {
    cudaEvent_t event[RING];
    uint64_t added, done;
};

struct cuda_device {
    struct device device;
    struct cuda_backend *cuda;
    struct gpu *gpu;
    const char *doing; /* for messages of faults */
    cudaStream_t streams[N_STREAMS];
    struct ticket_ring copies[N_STREAMS];
    int n_heads, n_kv_heads, d_ff; /* of this shard */
    size_t padded_rows;            /* of the inputs of products */
    int h_stride, x_stride, qkv_stride, attention_stride, ffn_stride, logits_stride;
    struct segments attention_places, ffn_places;
    float *x, *qkv, *logits; /* (max_rows, x_stride), (max_rows, qkv_stride), (LOGIT_ROWS, …) */
    uint16_t *h, *q, *attention, *ffn; /* bf16 (max_rows, …_stride), q (max_rows, q heads) */
    uint16_t *h_low;                   /* what bf16 leaves out of h; NULL: no weight is F32 */
    float2 *turn;                      /* (max_rows, rope_dim / 2) cosine and sine */
    float *rope_frequency;             /* (rope_dim / 2) */
    int *arrived;                      /* (max_rows, n_kv_heads, chunks) of attention */
    key_type *keys;                    /* (LOGIT_ROWS, vocab_size) of the sampler */
    int *sampled, *sampled_host;       /* (max_samples) device, pinned */
    /* the step: pinned and device (step_bytes); the parts of splits. They grow when they must. */
    struct step_header *step_host, *step;
    float *partial; /* (split_capacity, n_heads, head_dim + 2) */
    size_t step_bytes, split_capacity;
    int n_rows, n_generated, n_samples, n_splits, n_prompt_items; /* that launches are made for */
    int n_sampled;                                                /* of the batch */
    struct graph graphs[MAX_COLUMNS + 1];
    int recording; /* index of a graph; 0: none */
    uint64_t n_launches;
    /* of several shards: sums of project_add on their way, in turns, so that a reader has time */
    float *sums[2], *gathered;
    int turn_of_sums;
    const struct weight *pending;
    enum product_input pending_input;
    cudaEvent_t ready;
    void *pieces[PIECES]; /* (n_pieces) all device memory of the above */
    int n_pieces;
};

/* ---- faults ---- */

#define TRY(device, call) check_call(device, call, #call, __LINE__)

static void check_call(const struct cuda_device *d, cudaError_t error, const char *call, int line) {
    if (error == cudaSuccess)
        return;
    fprintf(stderr, "dynamo: %s:%d: device %d (%s): %.*s: %s, while %s\n", __FILE__, line,
            d->device.index, d->gpu->properties.name, (int)strcspn(call, "("), call,
            cudaGetErrorString(error), d->doing);
    if (d->cuda->options.lost)
        d->cuda->options.lost(d->cuda->options.context);
    abort();
}

static struct cuda_device *enter(struct device *device, const char *doing) {
    struct cuda_device *d = (struct cuda_device *)device;
    d->doing = doing;
    TRY(d, cudaSetDevice(device->index));
    return d;
}

/* ---- launches ---- */

/* Puts a kernel into the compute stream; on chips that can, it starts while the one before it ends
 * (see grid_wait in ptx.cuh). */
template <typename... Parameters, typename... Arguments>
static void launch(struct cuda_device *d, const char *name, void (*kernel)(Parameters...),
                   dim3 grid, int threads, size_t shared, Arguments... arguments) {
    cudaLaunchAttribute overlap = {};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3((unsigned)threads);
    config.dynamicSmemBytes = shared;
    config.stream = d->streams[STREAM_COMPUTE];
    config.attrs = &overlap;
    config.numAttrs = d->gpu->properties.major >= 9;
    emu_next_kernel(name);
    TRY(d, cudaSetDevice(d->device.index));
    if (shared > 48 << 10)
        check_call(
            d,
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared),
            name, __LINE__);
    check_call(d, cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), name, __LINE__);
    __atomic_fetch_add(&d->cuda->backend.kernel_launches, 1, __ATOMIC_RELAXED);
    d->n_launches++;
}

static dim3 grid_of(int x, int y = 1) {
    return dim3((unsigned)x, (unsigned)y);
}

static int divide(int value, int unit) {
    return (value + unit - 1) / unit;
}

/* ---- memory and copies ---- */

static size_t cuda_free_memory(struct device *device, bool pinned) {
    struct cuda_device *d = enter(device, "asking for its free memory");
    size_t available = 0, total = 0;
    if (pinned)
        return host_free_memory();
    TRY(d, cudaMemGetInfo(&available, &total));
    return available;
}

static void *cuda_alloc(struct device *device, size_t bytes, bool pinned) {
    enter(device, "allocating");
    void *memory = NULL;
    cudaError_t error =
        pinned ? cudaHostAlloc(&memory, bytes, cudaHostAllocPortable) : cudaMalloc(&memory, bytes);
    (void)cudaGetLastError(); /* no room is an answer, not a fault */
    return error == cudaSuccess ? memory : NULL;
}

static void cuda_release(struct device *device, void *memory, bool pinned) {
    struct cuda_device *d = enter(device, "freeing memory");
    TRY(d, pinned ? cudaFreeHost(memory) : cudaFree(memory));
}

static uint64_t cuda_copy(struct device *device, enum stream stream, const struct copy2d *copy) {
    static const char *const names[N_STREAMS] = {"copying", "paging out", "paging in",
                                                 "handing over blocks"};
    struct cuda_device *d = enter(device, names[stream]);
    struct ticket_ring *ring = &d->copies[stream];
    if (ring->added - ring->done == RING)
        TRY(d, cudaEventSynchronize(ring->event[ring->done++ % RING]));
    cudaStream_t on = d->streams[stream];
    if (copy->width == copy->to_pitch && copy->width == copy->from_pitch)
        TRY(d, cudaMemcpyAsync(copy->to, copy->from, copy->width * copy->height, cudaMemcpyDefault,
                               on));
    else
        TRY(d, cudaMemcpy2DAsync(copy->to, copy->to_pitch, copy->from, copy->from_pitch,
                                 copy->width, copy->height, cudaMemcpyDefault, on));
    TRY(d, cudaEventRecord(ring->event[ring->added % RING], on));
    return ++ring->added;
}

static bool cuda_copy_done(struct device *device, enum stream stream, uint64_t ticket) {
    struct cuda_device *d = enter(device, "polling a copy");
    struct ticket_ring *ring = &d->copies[stream];
    while (ring->done < ticket) {
        cudaError_t error = cudaEventQuery(ring->event[ring->done % RING]);
        if (error == cudaErrorNotReady)
            return false;
        check_call(d, error, "cudaEventQuery", __LINE__);
        ring->done++;
    }
    return true;
}

/* ---- weights ---- */

/* Zeroed device memory that is freed with the device. */
template <typename T> static void take(struct cuda_device *d, T **memory, size_t n, bool *ok) {
    void *piece = NULL;
    *ok = *ok && cudaMalloc(&piece, n > 0 ? n * sizeof(T) : sizeof(T)) == cudaSuccess;
    if (*ok) {
        TRY(d, cudaMemsetAsync(piece, 0, n * sizeof(T), d->streams[STREAM_COMPUTE]));
        assert(d->n_pieces < PIECES);
        d->pieces[d->n_pieces++] = piece;
    }
    (void)cudaGetLastError();
    *memory = (T *)piece;
}

/* K of attn_output is cut between heads, that of ffn_down at an even k: see pack.cuh. */
static int grain_of(const struct model_config *config, int cols) {
    return cols == config->n_heads * config->head_dim ? config->head_dim : 2;
}

static void free_weight(struct weight *weight) {
    if (weight) {
        cudaFree((void *)weight->matrix.packed);
        cudaFree((void *)weight->matrix.scales);
        cudaFree(weight->vector);
    }
    free(weight);
}

/* Makes sure that both staging buffers hold `bytes`. */
static bool open_staging(struct cuda_device *d, size_t bytes) {
    struct gpu *gpu = d->gpu;
    if (bytes <= gpu->staging_bytes)
        return true;
    bool ok = true;
    for (int i = 0; i < 2; i++) {
        TRY(d, cudaEventSynchronize(gpu->free[i]));
        cudaFree(gpu->raw[i]);
        cudaFreeHost(gpu->pinned[i]);
        gpu->raw[i] = gpu->pinned[i] = NULL;
        ok = ok && cudaMalloc((void **)&gpu->raw[i], bytes) == cudaSuccess &&
             cudaHostAlloc((void **)&gpu->pinned[i], bytes, cudaHostAllocPortable) == cudaSuccess;
    }
    gpu->staging_bytes = ok ? bytes : 0;
    (void)cudaGetLastError();
    return ok;
}

/* Copies bytes to a staging buffer of the device, beside the packing of what is in the other. */
static char *stage_up(struct cuda_device *d, int which, const void *from, size_t bytes) {
    struct gpu *gpu = d->gpu;
    TRY(d, cudaEventSynchronize(gpu->free[which]));
    memcpy(gpu->pinned[which], from, bytes);
    TRY(d, cudaMemcpyAsync(gpu->raw[which], gpu->pinned[which], bytes, cudaMemcpyHostToDevice,
                           gpu->stream));
    return gpu->raw[which];
}

/* Uploads rows from `first_row` on, band by band, and packs them. A tensor that repeats itself goes
 * up once: the rest is made on the device. */
static bool pack_matrix(struct cuda_device *d, const struct tensor *tensor, int first_row,
                        int n_rows, const struct matrix *m) {
    size_t row_bytes = tensor->bytes / (size_t)tensor->rows, tile_bytes = TILE * row_bytes;
    size_t period = tensor->period;
    size_t most = tile_bytes > STAGING_BYTES ? tile_bytes : (size_t)STAGING_BYTES;
    size_t all = tile_bytes * (size_t)m->n_tiles;
    if (!open_staging(d, period > 0 ? period : all < most ? all : most))
        return false;
    int band = (int)(period > 0 ? (size_t)m->n_tiles : d->gpu->staging_bytes / tile_bytes);
    for (int tile = 0, i = 0; tile < m->n_tiles; tile += band, i++) {
        int n_tiles = m->n_tiles - tile < band ? m->n_tiles - tile : band;
        struct raw_rows raw = {};
        raw.row_bytes = row_bytes;
        raw.type = tensor->type;
        raw.cols = (int)tensor->cols;
        raw.n_rows = n_rows - tile * TILE < n_tiles * TILE ? n_rows - tile * TILE : n_tiles * TILE;
        const char *from = (const char *)tensor->data;
        size_t offset = (size_t)(first_row + tile * TILE) * row_bytes;
        size_t bytes = (size_t)raw.n_rows * row_bytes;
        if (period > 0) {
            bytes = period < tensor->bytes ? period : tensor->bytes;
            raw.period = bytes;
            raw.first = offset % bytes;
            offset = 0;
        }
        raw.bytes = (const uint8_t *)stage_up(d, i % 2, from + offset, bytes);
        int warps = THREADS / WARP;
        size_t n = ((size_t)n_tiles * m->n_units + warps - 1) / warps;
        cudaLaunchConfig_t config = {};
        config.gridDim = dim3((unsigned)n);
        config.blockDim = dim3(THREADS);
        config.stream = d->gpu->stream;
        emu_next_kernel("pack_kernel");
        TRY(d, cudaLaunchKernelEx(&config, pack_kernel, *m, tile, n_tiles, raw));
        TRY(d, cudaEventRecord(d->gpu->free[i % 2], d->gpu->stream));
    }
    return true;
}

static bool upload_matrix(struct cuda_device *d, struct weight *w) {
    const struct tensor *tensor = w->tensor;
    const struct slice *slice = &w->slice;
    struct matrix *m = &w->matrix;
    int rows = (int)tensor->rows / (slice->kind == SLICE_ROWS ? slice->count : 1);
    int first_row = slice->kind == SLICE_ROWS ? slice->rank * rows : 0;
    bool cut = slice->kind == SLICE_COLS;
    int grain = cut ? grain_of(d->device.config, (int)tensor->cols) : 0;
    int n_segments = cut ? K_SEGMENTS / slice->count : K_SEGMENTS;
    m->segments =
        make_segments((int)tensor->cols, grain, cut ? slice->rank * n_segments : 0, n_segments);
    m->type = packed_type_of(tensor->type);
    m->n_outputs = rows;
    m->n_tiles = divide(rows, TILE);
    m->n_units = m->segments.unit[n_segments];
    size_t n = (size_t)m->n_tiles * m->n_units;
    bool ok = cudaMalloc((void **)&m->packed, n * packed_bytes(m->type)) == cudaSuccess;
    if (has_scales(m->type))
        ok = ok && cudaMalloc((void **)&m->scales, n * SCALE_BYTES) == cudaSuccess;
    (void)cudaGetLastError();
    return ok && pack_matrix(d, tensor, first_row, rows, m);
}

/* A shard has its part of a bias; a norm is whole. */
static bool upload_vector(struct cuda_device *d, struct weight *w) {
    const struct tensor *tensor = w->tensor;
    int n = (int)tensor->cols / (w->slice.kind == SLICE_WHOLE ? 1 : w->slice.count);
    const char *from = (const char *)tensor->data;
    if (w->slice.kind != SLICE_WHOLE)
        from += (size_t)w->slice.rank * n * sizeof(float);
    size_t bytes = (size_t)n * sizeof(float);
    if (!open_staging(d, bytes) || cudaMalloc((void **)&w->vector, bytes) != cudaSuccess)
        return false;
    const char *raw = stage_up(d, 0, from, bytes);
    TRY(d, cudaMemcpyAsync(w->vector, raw, bytes, cudaMemcpyDeviceToDevice, d->gpu->stream));
    TRY(d, cudaEventRecord(d->gpu->free[0], d->gpu->stream));
    return true;
}

static const struct weight *cuda_upload(struct device *device, const struct tensor *tensor,
                                        struct slice slice, char *error) {
    struct cuda_device *d = enter(device, "loading weights");
    struct cuda_backend *cuda = d->cuda;
    pthread_mutex_lock(&cuda->upload_mutex);
    struct weight *w = cuda->weights;
    while (w && !(w->tensor == tensor && w->gpu == device->index && w->slice.kind == slice.kind &&
                  w->slice.rank == slice.rank && w->slice.count == slice.count))
        w = w->next;
    if (!w && (w = (struct weight *)calloc(1, sizeof *w)) != NULL) {
        w->tensor = tensor;
        w->slice = slice;
        w->gpu = device->index;
        bool is_vector = tensor->rows == 1 && tensor->type == TYPE_F32;
        if (is_vector ? upload_vector(d, w) : upload_matrix(d, w)) {
            w->next = cuda->weights;
            cuda->weights = w;
            TRY(d, cudaStreamSynchronize(d->gpu->stream));
        } else {
            free_weight(w);
            w = NULL;
        }
    }
    bool ok = w != NULL;
    if (ok && w->matrix.type == PACKED_F32 && !w->vector && !d->h_low)
        take(d, &d->h_low, d->padded_rows * (size_t)d->h_stride, &ok);
    pthread_mutex_unlock(&cuda->upload_mutex);
    if (!ok) {
        size_t available = 0, total = 0;
        (void)cudaGetLastError();
        (void)cudaMemGetInfo(&available, &total);
        (void)fail(error,
                   "%.*s: device %d (%s) has %zu MB left of %zu and needs %zu for this tensor; "
                   "take a model of a smaller type, or more GPUs and --tp",
                   (int)tensor->name.length, tensor->name.data, device->index,
                   d->gpu->properties.name, available >> 20, total >> 20,
                   (tensor->bytes >> 20) + 1);
    }
    return ok ? w : NULL;
}
#endif /* DEVICE_CUH */
