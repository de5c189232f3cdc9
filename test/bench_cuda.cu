/* bench_cuda.cu: what the CUDA backend reaches of what the GPU can do.
 *
 *     bench_cuda [SHAPE[:TYPE]] [PART...] [floors=FILE]
 *         SHAPE: llama-3.1-8b (default), llama-3.1-70b, tiny (for the emulator)
 *         TYPE: bf16 (default), q8_0, q4_0
 *         PART: start, kernels, decode, prefill, paging; without: all
 * Its lines `..._per_second` are a file for --rates, with `layer_seconds 0`, which they contain.
 *         floors=FILE: what test/floors.py measured of PyTorch, in the column in brackets
 *
 * A model of that shape with random weights is run through the backend's ops. Times are medians of
 * warm runs, on the GPU's own clock where no host is involved, over more weights, keys and values
 * than the caches hold. Each stands beside its floor, measured in the same run: bytes that must
 * move, at the rate at which the device copies its memory (bytes read and written); operations, at
 * the rate of a large bf16 product of the vendor's library. What is printed as it is measured is
 * printed once more at the end, below `== summary`. */
#include "../kernels.cu"

#include <math.h>
#include <stdarg.h>
#include <time.h>
#ifdef WITH_CUBLAS
#include <cublas_v2.h>
#endif

#ifdef CUDA_EMULATED
enum { PROBE_BYTES = 1 << 20, PAGED_BLOCKS = 8, MOST_REPEATS = 2, EMPTY = 4 };
#else
enum { PROBE_BYTES = 1 << 29, PAGED_BLOCKS = 256, MOST_REPEATS = 40, EMPTY = 100 };
#endif

enum {
    MAX_LAYERS = 80,
    MAX_STREAMS = 64,
    LINES = 64,
    LINE_LENGTH = 160,
    N_PRODUCTS = 5,
    N_COUNTS = 4,
    PERIOD_UNITS = 1 << 19 /* blocks of a type after which random weights repeat */
};

static const struct shape {
    const char *name;
    int n_layers, d_model, n_heads, n_kv_heads, head_dim, d_ff, vocab_size;
    int context, streams, prompt, chunk; /* tokens a stream has; most streams; tokens to prefill */
} shapes[] = {
    {"llama-3.1-8b", 32, 4096, 32, 8, 128, 14336, 128256, 1024, 64, 8192, 2048},
    {"llama-3.1-70b", 80, 8192, 64, 8, 128, 28672, 128256, 1024, 1, 2048, 2048},
    {"tiny", 2, 64, 4, 2, 16, 160, 320, 40, 64, 64, 32},
};

static const struct form { /* of a tensor type: elements and bytes of a block */
    const char *name;
    enum tensor_type type;
    int elements, bytes;
} forms[] = {{"bf16", TYPE_BF16, 1, 2}, {"q8_0", TYPE_Q8_0, 32, 34}, {"q4_0", TYPE_Q4_0, 32, 18}};

struct bench {
    const struct shape *shape;
    const struct form *form;
    int argc;
    char **argv;
    struct model_config config;
    float frequency[128];
    struct backend *backend;
    struct cuda_device *d;
    const struct weight *layers[MAX_LAYERS][N_ROLES];
    double weight_bytes; /* that a step reads; `loaded`: with the embedding */
    double loaded, load_seconds;
    char *data; /* (data_bytes) random weights; the next tensor begins at data_at */
    size_t data_bytes, data_at;
    int n_blocks, *slots;        /* (n_blocks) a permutation: a text's blocks lie anywhere */
    double copy, read, multiply; /* floors: bytes and operations a second */
    double up, down;             /* of pinned memory */
    const char *multiplied_by;
    double layer[N_COUNTS]; /* seconds of all kernels of a layer, one by one */
    struct theirs {         /* of floors=FILE */
        char name[32];
        double value;
    } theirs[LINES];
    int n_theirs;
    char lines[LINES][LINE_LENGTH];
    int n_lines;
};

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static void quit(const char *what) {
    (void)fprintf(stderr, "bench_cuda: %s\n", what);
    exit(1);
}

/* Prints a line now, and again in the summary. */
__attribute__((format(printf, 2, 3))) static void report(struct bench *b, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    if (b->n_lines == LINES)
        quit("too many lines");
    char *line = b->lines[b->n_lines++];
    (void)vsnprintf(line, LINE_LENGTH, format, arguments);
    va_end(arguments);
    (void)puts(line);
    (void)fflush(stdout);
}

/* What PyTorch took, in microseconds, as floors.py names it; 0: unknown. */
static double theirs(const struct bench *b, const char *name, int count) {
    char key[32];
    (void)snprintf(key, sizeof key, count > 0 ? "%s.%d" : "%s", name, count);
    for (int i = 0; i < b->n_theirs; i++)
        if (!strcmp(b->theirs[i].name, key))
            return b->theirs[i].value;
    return 0.0;
}

/* ---- time ---- */

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static double median(double *values, int n) {
    qsort(values, (size_t)n, sizeof *values, by_size);
    return (values[(n - 1) / 2] + values[n / 2]) / 2;
}

/* So many runs of something that took so long that they are a quarter of a second. */
static int repeats_of(double once) {
    int n = once > 0 ? (int)fmin(0.25 / once, MOST_REPEATS) : (int)MOST_REPEATS;
    return n < 5 && MOST_REPEATS > 5 ? 5 : n < 2 ? 2 : n;
}

/* Seconds that `act` keeps a stream busy: runs follow each other without a gap, and the clock is
 * the stream's own. */
template <typename Act> static double time_on(struct bench *b, cudaStream_t stream, Act act) {
    cudaEvent_t events[MOST_REPEATS + 1];
    double times[MOST_REPEATS];
    act();
    TRY(b->d, cudaStreamSynchronize(stream));
    double start = seconds();
    act();
    TRY(b->d, cudaStreamSynchronize(stream));
    int n = repeats_of(seconds() - start);
    act(); /* while it runs, the next are queued */
    for (int i = 0; i <= n; i++) {
        TRY(b->d, cudaEventCreateWithFlags(&events[i], cudaEventDefault));
        if (i > 0)
            act();
        TRY(b->d, cudaEventRecord(events[i], stream));
    }
    TRY(b->d, cudaStreamSynchronize(stream));
    for (int i = 0; i < n; i++) {
        float milliseconds = 0.0f;
        TRY(b->d, cudaEventElapsedTime(&milliseconds, events[i], events[i + 1]));
        times[i] = 1e-3 * (double)milliseconds;
    }
    for (int i = 0; i <= n; i++)
        TRY(b->d, cudaEventDestroy(events[i]));
    return median(times, n);
}

/* Seconds from call to return. */
template <typename Act> static double time_whole(Act act) {
    double times[MOST_REPEATS];
    act();
    double start = seconds();
    act();
    int n = repeats_of(seconds() - start);
    for (int i = 0; i < n; i++) {
        start = seconds();
        act();
        times[i] = seconds() - start;
    }
    return median(times, n);
}

static cudaStream_t compute_stream(const struct bench *b) {
    return b->d->streams[STREAM_COMPUTE];
}

/* ---- floors ---- */

DEVICE uint32_t mix(uint64_t x) {
    x = (x ^ x >> 31) * 0x9E3779B97F4A7C15u;
    return (uint32_t)(x >> 32) * 0x85EBCA6Bu ^ (uint32_t)(x >> 40);
}

/* Random bf16 of 0.5 to 2 and both signs, two a word. */
__global__ void fill_kernel(uint32_t *words, size_t n) {
    grid_wait();
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x)
        words[i] = (mix(i) & 0x80ff80ff) | 0x3f003f00;
}

__global__ void empty_kernel(int *unused) {
    grid_wait();
    grid_launch_dependents();
    if (unused)
        *unused = 0;
}

/* Fills device memory with random numbers: zeros would cost less power, and time. */
static void fill(struct bench *b, void *memory, size_t bytes) {
    launch(b->d, "fill_kernel", fill_kernel, 1024, THREADS, 0, (uint32_t *)memory, bytes / 4);
}

static void *memory_of(struct bench *b, size_t bytes) {
    void *memory = b->backend->alloc(&b->d->device, bytes);
    if (!memory)
        quit("out of memory");
    return memory;
}

static char *pinned_memory(struct bench *b, size_t bytes) {
    void *memory = host_alloc(bytes);
    if (!memory || !b->backend->pin(&b->d->device, memory, bytes))
        quit("no memory can be pinned");
    return (char *)memory;
}

static void free_pinned(struct bench *b, void *memory) {
    b->backend->unpin(&b->d->device, memory);
    free(memory);
}

static double copy_rate(struct bench *b, void *to, const void *from) {
    return PROBE_BYTES / time_on(
                             b, compute_stream(b),
                             [=] {
                                 TRY(b->d, cudaMemcpyAsync(to, from, PROBE_BYTES, cudaMemcpyDefault,
                                                           compute_stream(b)));
                             });
}

/* A product of 8192 x 8192 x 8192 in bf16, by the vendor's library. */
static void probe_products(struct bench *b) {
    b->multiply = 1e12 * theirs(b, "mm", 0);
    b->multiplied_by = b->multiply > 0 ? "PyTorch" : "";
#ifdef WITH_CUBLAS
    if (b->multiply > 0)
        return;
    enum { N = 8192 };
    cublasHandle_t handle;
    if (cublasCreate(&handle) != CUBLAS_STATUS_SUCCESS)
        return;
    size_t bytes = (size_t)N * N * 2;
    char *memory = (char *)memory_of(b, 3 * bytes);
    fill(b, memory, 2 * bytes);
    bool ok = cublasSetStream(handle, compute_stream(b)) == CUBLAS_STATUS_SUCCESS;
    double time = time_on(b, compute_stream(b), [&] {
        float one = 1.0f, none = 0.0f;
        ok = cublasGemmEx(handle, CUBLAS_OP_T, CUBLAS_OP_N, N, N, N, &one, memory, CUDA_R_16BF, N,
                          memory + bytes, CUDA_R_16BF, N, &none, memory + 2 * bytes, CUDA_R_16BF, N,
                          CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT) == CUBLAS_STATUS_SUCCESS &&
             ok;
    });
    if (ok) {
        b->multiply = 2.0 * N * N * N / time;
        b->multiplied_by = "cuBLAS";
    }
    b->backend->release(&b->d->device, memory);
    (void)cublasDestroy(handle);
#endif
}

static void probe(struct bench *b) {
    char *memory = (char *)memory_of(b, 2 * (size_t)PROBE_BYTES);
    char *pinned = pinned_memory(b, PROBE_BYTES);
    memset(pinned, 1, PROBE_BYTES);
    fill(b, memory, 2 * (size_t)PROBE_BYTES);
    b->copy = 2 * copy_rate(b, memory + PROBE_BYTES, memory);
    b->up = copy_rate(b, memory, pinned);
    b->down = copy_rate(b, pinned, memory);
    int blocks = b->d->card->properties.multiProcessorCount * 8;
    b->read = PROBE_BYTES / time_on(b, compute_stream(b), [=] {
                  launch(b->d, "read_probe_kernel", read_probe_kernel, blocks, THREADS, 0,
                         (const uint4 *)(memory + PROBE_BYTES), (size_t)PROBE_BYTES / 16,
                         (uint32_t *)memory);
              });
    b->backend->release(&b->d->device, memory);
    free_pinned(b, pinned);
    probe_products(b);
    char product[64] = "bf16 product not measured";
    if (b->multiply > 0)
        (void)snprintf(product, sizeof product, "bf16 product %.0f TFLOP/s (%s)",
                       b->multiply * 1e-12, b->multiplied_by);
    report(b, "floors: copy %.0f GB/s, read %.0f GB/s, %s, pinned up %.1f, down %.1f GB/s",
           b->copy * 1e-9, b->read * 1e-9, product, b->up * 1e-9, b->down * 1e-9);
}

/* ---- the model ---- */

/* Random blocks of the type: weights of about 0.02, which no activation explodes by. */
static void make_data(struct bench *b, size_t bytes) {
    b->data_bytes = bytes;
    size_t unit = (size_t)b->form->bytes, period = unit * PERIOD_UNITS;
    b->data = (char *)malloc(bytes);
    if (!b->data)
        quit("out of memory");
    for (size_t i = 0; i < bytes && i < period; i++) {
        uint32_t hash = (uint32_t)i * 2654435761u;
        hash ^= hash >> 15;
        bool top = i % unit == 1; /* of a bf16, and of a block's f16 scale */
        b->data[i] = (char)(hash >> 8);
        if (top)
            b->data[i] = (char)(b->form->type == TYPE_BF16 ? 0x3c | (hash >> 8 & 0x80) : 0x0c);
    }
    for (size_t i = period; i < bytes; i += period)
        memcpy(b->data + i, b->data, bytes - i < period ? bytes - i : period);
}

static size_t matrix_bytes(const struct bench *b, int rows, int cols) {
    return (size_t)rows * (size_t)cols / (size_t)b->form->elements * (size_t)b->form->bytes;
}

/* The backend knows it by address. */
static const struct tensor *keep(struct bench *b, struct tensor tensor) {
    struct tensor *own = (struct tensor *)malloc(sizeof *own);
    if (!own)
        quit("out of memory");
    *own = tensor;
    own->name.data = "a matrix";
    own->name.length = 8;
    b->loaded += (double)own->bytes;
    return own;
}

static const struct weight *load(struct bench *b, const struct tensor *tensor,
                                 const struct tensor *const *together) {
    char error[ERROR_LENGTH];
    const struct weight *weight =
        b->backend->upload(&b->d->device, tensor, together, {SLICE_WHOLE, 0, 1}, error);
    if (!weight)
        quit(error);
    return weight;
}

static const struct tensor *make_matrix(struct bench *b, int rows, int cols, bool repeats) {
    struct tensor tensor = {};
    tensor.type = b->form->type;
    tensor.rows = rows;
    tensor.cols = cols;
    tensor.bytes = matrix_bytes(b, rows, cols);
    tensor.period = repeats ? (size_t)b->form->bytes * PERIOD_UNITS : 0;
    if (repeats || b->data_at + tensor.bytes > b->data_bytes)
        b->data_at = 0;
    tensor.data = b->data + b->data_at; /* further on each time, as in a file: not in a cache */
    b->data_at += tensor.bytes;
    b->weight_bytes += (double)tensor.bytes;
    return keep(b, tensor);
}

static const struct weight *load_matrix(struct bench *b, int rows, int cols, bool repeats) {
    return load(b, make_matrix(b, rows, cols, repeats), NULL);
}

static const struct weight *load_norm(struct bench *b) {
    int n = b->shape->d_model;
    float *ones = (float *)malloc((size_t)n * sizeof *ones);
    for (int i = 0; i < n && ones; i++)
        ones[i] = 1.0f;
    struct tensor tensor = {};
    tensor.type = TYPE_F32;
    tensor.rows = 1;
    tensor.cols = n;
    tensor.bytes = (size_t)n * sizeof *ones;
    tensor.data = ones;
    const struct weight *weight = load(b, keep(b, tensor), NULL);
    free(ones);
    return weight;
}

/* All weights, from host memory as a file has them; or each but the first period of it made on the
 * device, which is quick. */
static void load_model(struct bench *b, bool repeats) {
    const struct shape *s = b->shape;
    int d = s->d_model, q = s->n_heads * s->head_dim, kv = s->n_kv_heads * s->head_dim;
    size_t most = matrix_bytes(b, s->vocab_size > s->d_ff ? s->vocab_size : s->d_ff, d);
    size_t period = (size_t)b->form->bytes * PERIOD_UNITS;
    make_data(b, repeats && period > most ? period : most);
    double start = seconds();
    b->layers[0][TOKEN_EMBD] = load_matrix(b, s->vocab_size, d, repeats);
    b->weight_bytes = 0; /* a step reads a row of it */
    b->layers[0][OUTPUT] = load_matrix(b, s->vocab_size, d, repeats);
    b->layers[0][OUTPUT_NORM] = load_norm(b);
    for (int i = 0; i < s->n_layers; i++) {
        const struct weight **layer = b->layers[i];
        layer[ATTN_NORM] = load_norm(b);
        const struct tensor *qkv[] = {make_matrix(b, q, d, repeats), make_matrix(b, kv, d, repeats),
                                      make_matrix(b, kv, d, repeats), NULL};
        for (int j = 0; j < 3; j++)
            layer[ATTN_Q + j] = load(b, qkv[j], qkv);
        layer[ATTN_OUTPUT] = load_matrix(b, d, q, repeats);
        layer[FFN_NORM] = load_norm(b);
        const struct tensor *pair[] = {make_matrix(b, s->d_ff, d, repeats),
                                       make_matrix(b, s->d_ff, d, repeats), NULL};
        for (int j = 0; j < 2; j++)
            layer[FFN_GATE + j] = load(b, pair[j], pair);
        layer[FFN_DOWN] = load_matrix(b, d, s->d_ff, repeats);
    }
    b->load_seconds = seconds() - start;
    free(b->data);
}

static void make_config(struct bench *b) {
    const struct shape *s = b->shape;
    b->config.n_layers = s->n_layers;
    b->config.d_model = s->d_model;
    b->config.n_heads = s->n_heads;
    b->config.n_kv_heads = s->n_kv_heads;
    b->config.head_dim = b->config.rope_dim = s->head_dim;
    b->config.d_ff = s->d_ff;
    b->config.vocab_size = s->vocab_size;
    b->config.rope_adjacent = true;
    b->config.norm_epsilon = 1e-5f;
    for (int i = 0; i < s->head_dim / 2; i++)
        b->frequency[i] = (float)pow(500000.0, -2.0 * i / s->head_dim);
}

static void open_device(struct bench *b) {
    char error[ERROR_LENGTH];
    struct backend_options options = {};
    struct device wanted = {};
    double start = seconds();
    b->backend = cuda_backend_open(&options, error);
    wanted.config = &b->config;
    wanted.rope_frequency = b->frequency;
    wanted.n_shards = 1;
    wanted.urgent = true;
    wanted.max_rows = b->shape->chunk > MAX_STREAMS ? b->shape->chunk : (int)MAX_STREAMS;
    wanted.max_samples = MAX_STREAMS;
    wanted.kv_type = KV_BF16;
    struct device *device = b->backend ? b->backend->device_open(b->backend, &wanted, error) : NULL;
    if (!device)
        quit(error);
    double first = seconds() - start;
    start = seconds();
    struct device *second = b->backend->device_open(b->backend, &wanted, error);
    if (!second)
        quit(error);
    double again = seconds() - start;
    b->backend->device_close(second);
    b->d = (struct cuda_device *)device;
    const cudaDeviceProp *p = &b->d->card->properties;
    report(b, "%s, %d multiprocessors, %.0f GB, L2 %.0f MB", p->name, p->multiProcessorCount,
           (double)p->totalGlobalMem * 1e-9, (double)p->l2CacheSize * 1e-6);
    report(b, "open: the first device %.2f s, with the driver; a second one %.2f s", first, again);
}

/* Keys and values of random numbers, in blocks of a random order. */
static void make_kv(struct bench *b) {
    const struct shape *s = b->shape;
    size_t bytes = block_bytes(&b->config, 1, KV_BF16);
    b->n_blocks = s->streams * blocks_of(s->context + 1);
    if (b->n_blocks < blocks_of(s->prompt))
        b->n_blocks = blocks_of(s->prompt);
    b->d->device.kv = memory_of(b, (size_t)b->n_blocks * bytes);
    fill(b, b->d->device.kv, (size_t)b->n_blocks * bytes);
    b->slots = (int *)malloc((size_t)b->n_blocks * sizeof *b->slots);
    for (int i = 0; i < b->n_blocks && b->slots; i++) {
        int other = (int)((unsigned)i * 2654435761u >> 4) % (i + 1);
        b->slots[i] = b->slots[other];
        b->slots[other] = i;
    }
}

/* ---- steps ---- */

static struct { /* of the batch at hand */
    int *token, *position, *row_sequence;
    int sample_row[MAX_STREAMS], sampled[MAX_STREAMS];
    struct sequence sequence[MAX_STREAMS];
    struct sampling sampling[MAX_STREAMS];
} step;

/* n texts of `start` tokens each get `rows` more; all are generated ones, or a prompt's. Random
 * weights are no language: a low temperature gives them the few likely tokens that a text has. */
static struct batch make_batch(struct bench *b, int n, int start, int rows, bool generated) {
    int n_rows = n * rows, each = blocks_of(start + rows);
    size_t bytes = (size_t)n_rows * sizeof(int);
    step.token = (int *)realloc(step.token, bytes);
    step.position = (int *)realloc(step.position, bytes);
    step.row_sequence = (int *)realloc(step.row_sequence, bytes);
    for (int i = 0; i < n; i++) {
        step.sequence[i] = {i * rows, rows, start, i * each, each, generated};
        step.sample_row[i] = (i + 1) * rows - 1;
        step.sampling[i] = {0.1f, 0.95f, 0.0f, 0, (uint64_t)i};
    }
    for (int i = 0; i < n_rows; i++) {
        step.token[i] = (int)((unsigned)i * 2654435761u % (unsigned)b->shape->vocab_size);
        step.position[i] = start + i % rows;
        step.row_sequence[i] = i / rows;
    }
    struct batch batch = {n_rows,
                          n,
                          n,
                          n * each,
                          step.token,
                          step.position,
                          step.row_sequence,
                          step.sequence,
                          b->slots,
                          step.sample_row,
                          step.sampling,
                          NULL,
                          step.sampled};
    return batch;
}

static struct batch decode_batch(struct bench *b, int streams) {
    return make_batch(b, streams, b->shape->context, 1, true);
}

/* A chunk of the prompt; the last one samples. */
static struct batch prompt_batch(struct bench *b, int start) {
    struct batch batch = make_batch(b, 1, start, b->shape->chunk, false);
    batch.n_samples = start + b->shape->chunk == b->shape->prompt;
    return batch;
}

/* As in dynamo.c. */
static void forward(struct bench *b, const struct batch *batch) {
    struct backend *backend = b->backend;
    struct device *device = &b->d->device;
    if (backend->step_begin(device, batch)) {
        backend->embed(device, b->layers[0][TOKEN_EMBD]);
        for (int i = 0; i < b->shape->n_layers; i++) {
            const struct weight *const *layer = b->layers[i];
            backend->norm_qkv(device, layer);
            backend->rope_append(device, layer, i);
            backend->attention(device, layer, i);
            backend->project_add(device, layer[ATTN_OUTPUT], INPUT_ATTENTION);
            backend->norm_gate_up(device, layer);
            backend->project_add(device, layer[FFN_DOWN], INPUT_FFN);
        }
        if (batch->n_samples > 0)
            backend->sample(device, b->layers[0], NULL);
    }
    backend->step_end(device, batch->sampled);
}

/* Logits of a scene: 0 a few likely tokens, 1 all of like weight, 2 all the same, 3 two values, 4
 * rounded to bf16. */
static void make_logits(struct bench *b, int scene) {
    size_t n = (size_t)LOGIT_ROWS * (size_t)b->d->logits_stride;
    float *logits = (float *)malloc(n * sizeof *logits);
    uint64_t state = 1;
    for (size_t i = 0; i < n && logits; i++) {
        float sum = -6.0f; /* of 12 random numbers: nearly normal */
        for (int j = 0; j < 12; j++) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            sum += (float)(state >> 40) * 0x1p-24f;
        }
        logits[i] = scene == 0   ? 2.0f * sum + (state % 2000 == 0 ? 12.0f : 0.0f)
                    : scene == 1 ? 0.3f * sum
                    : scene == 2 ? 1.0f
                    : scene == 3 ? (float)(i % 3 == 0)
                                 : 0.5f * sum;
        uint32_t bits;
        memcpy(&bits, &logits[i], sizeof bits);
        bits &= scene == 4 ? 0xffff0000u : 0xffffffffu;
        memcpy(&logits[i], &bits, sizeof bits);
    }
    TRY(b->d, cudaMemcpy(b->d->logits, logits, n * sizeof *logits, cudaMemcpyHostToDevice));
    free(logits);
}

/* Seconds of one of `n` things that `act` launches in a step of this batch, replayed as a graph.
 * scene: logits that are to be there, see make_logits; -1: those that the model gives. */
template <typename Act>
static double time_recorded(struct bench *b, const struct batch *batch, int n, Act act,
                            int scene = -1) {
    struct cuda_device *d = b->d;
    cudaStream_t stream = compute_stream(b);
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    forward(b, batch); /* so that there are inputs of every op */
    if (scene >= 0)
        make_logits(b, scene);
    forget_graphs(d);
    b->backend->step_begin(&d->device, batch); /* begins to record, if generated rows are all */
    if (!d->recording)
        TRY(d, cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < n; i++)
        act(i);
    d->recording = 0;
    TRY(d, cudaStreamEndCapture(stream, &graph));
    TRY(d, cudaGraphInstantiate(&exec, graph, 0));
    TRY(d, cudaGraphDestroy(graph));
    double time = time_on(b, stream, [&] { TRY(d, cudaGraphLaunch(exec, stream)); });
    TRY(d, cudaGraphExecDestroy(exec));
    return time / n;
}

/* ---- kernels ---- */

enum product_name { QKV, OUT, GATE_UP, DOWN, LOGITS };
static const char *const product_names[N_PRODUCTS] = {"qkv", "attn_output", "gate_up", "ffn_down",
                                                      "logits"};

/* The product alone, without the norm that an op has before it. */
static void launch_named(struct bench *b, enum product_name name, int layer_index) {
    struct cuda_device *d = b->d;
    const struct weight *const *layer = b->layers[layer_index];
    switch (name) {
    case QKV: multiply_qkv(d, layer); break;
    case OUT: b->backend->project_add(&d->device, layer[ATTN_OUTPUT], INPUT_ATTENTION); break;
    case GATE_UP: multiply_gate_up(d, layer); break;
    case DOWN: b->backend->project_add(&d->device, layer[FFN_DOWN], INPUT_FFN); break;
    case LOGITS: multiply_logits(d, b->layers[0][OUTPUT], 0, d->n_samples); break;
    }
    project_pending(d, NULL); /* what waits for a norm that does not come */
}

/* Outputs and columns of a product. */
static void extents(const struct bench *b, enum product_name name, int *n, int *k) {
    const struct shape *s = b->shape;
    int q = s->n_heads * s->head_dim, kv = s->n_kv_heads * s->head_dim;
    const int outputs[N_PRODUCTS] = {q + 2 * kv, s->d_model, 2 * s->d_ff, s->d_model,
                                     s->vocab_size};
    *n = outputs[name];
    *k = name == OUT ? q : name == DOWN ? s->d_ff : s->d_model;
}

/* The least seconds that so many rows can take: bytes of weights, rows and results, or operations.
 * 0: not known. */
static double product_floor(const struct bench *b, enum product_name name, int rows) {
    int n, k;
    extents(b, name, &n, &k);
    double moved = (double)matrix_bytes(b, n, k) + rows * (2.0 * k + 4.0 * n);
    double bytes = moved / b->copy;
    double operations = b->multiply > 0 ? 2.0 * n * k * rows / b->multiply : 0.0;
    return rows > MAX_STREAMS && b->multiply == 0 ? 0.0 : fmax(bytes, operations);
}

/* One cell of the table: microseconds, share of the floor, PyTorch's microseconds. */
static void add_cell(char *line, double time, double floor, double other) {
    size_t at = strlen(line), room = LINE_LENGTH - at;
    char share[16] = "   -", bracket[24] = "";
    if (floor > 0)
        (void)snprintf(share, sizeof share, "%3.0f%%", 100 * floor / time);
    if (other > 0)
        (void)snprintf(bracket, sizeof bracket, "(%.1f)", other);
    (void)snprintf(line + at, room, " %8.1f %s %-9s", time * 1e6, share, bracket);
}

static int count_of(const struct bench *b, int column) {
    static const int counts[N_COUNTS] = {1, 8, 64, 0};
    return counts[column] > 0 ? counts[column] : b->shape->chunk;
}

static struct batch batch_of(struct bench *b, int column) {
    return column == N_COUNTS - 1 ? prompt_batch(b, 0) : decode_batch(b, count_of(b, column));
}

static double time_product(struct bench *b, enum product_name name, const struct batch *batch) {
    return time_recorded(
        b, batch, b->shape->n_layers, [=](int i) { launch_named(b, name, i); });
}

static double kv_bytes(const struct bench *b, int tokens) { /* of one layer */
    return 4.0 * b->shape->n_kv_heads * b->shape->head_dim * tokens;
}

/* Operations of a prompt's attention in one layer: each row sees what is before it, and itself. */
static double attention_work(const struct bench *b, int start, int rows) {
    double seen = (double)rows * start + (double)rows * (rows + 1) / 2;
    return 4.0 * b->shape->n_heads * b->shape->head_dim * seen;
}

static double time_attention(struct bench *b, const struct batch *batch) {
    return time_recorded(
        b, batch, b->shape->n_layers,
        [=](int i) { b->backend->attention(&b->d->device, b->layers[i], i); });
}

static void bench_products(struct bench *b) {
    for (int name = 0; name < N_PRODUCTS; name++) {
        char line[LINE_LENGTH];
        (void)snprintf(line, sizeof line, "%-12s", product_names[name]);
        for (int column = 0; column < N_COUNTS - (name == LOGITS); column++) {
            int rows = count_of(b, column);
            if (rows > b->shape->streams && column < N_COUNTS - 1) {
                add_cell(line, 0, 0, 0);
                continue;
            }
            struct batch batch = batch_of(b, column);
            double time = time_product(b, (enum product_name)name, &batch);
            b->layer[column] += name == LOGITS ? 0 : time;
            add_cell(line, time, product_floor(b, (enum product_name)name, rows),
                     theirs(b, product_names[name], rows));
        }
        report(b, "%s", line);
    }
}

static void bench_attention(struct bench *b) {
    char line[LINE_LENGTH];
    (void)snprintf(line, sizeof line, "%-12s", "attention");
    for (int column = 0; column < N_COUNTS; column++) {
        int rows = count_of(b, column), tokens = rows * (b->shape->context + 1);
        bool prompt = column == N_COUNTS - 1;
        struct batch batch = batch_of(b, column);
        double floor = prompt ? b->multiply > 0 ? attention_work(b, 0, rows) / b->multiply : 0.0
                              : kv_bytes(b, tokens) / b->copy;
        double time = time_attention(b, &batch);
        b->layer[column] += time;
        add_cell(line, time, floor, theirs(b, "attention", rows));
    }
    report(b, "%s", line);
}

/* Norm and rope, bound by latency where rows are few; and all kernels of a layer together. */
static void bench_small(struct bench *b) {
    char norms[LINE_LENGTH] = "norm        ", ropes[LINE_LENGTH] = "rope        ";
    char layers[LINE_LENGTH] = "their layer ";
    const struct shape *s = b->shape;
    int heads = s->n_heads + 2 * s->n_kv_heads;
    for (int column = 0; column < N_COUNTS; column++) {
        struct batch batch = batch_of(b, column);
        double rows = count_of(b, column);
        double time = time_recorded(b, &batch, s->n_layers, [=](int i) {
            launch_norm(b->d, b->layers[i][ATTN_NORM], ALL_ROWS, b->d->n_rows);
        });
        b->layer[column] += 2 * time;
        add_cell(norms, time, rows * s->d_model * 6.0 / b->copy, 0);
        time = time_recorded(b, &batch, s->n_layers, [=](int i) {
            b->backend->rope_append(&b->d->device, b->layers[i], i);
        });
        b->layer[column] += time;
        add_cell(ropes, time, rows * heads * s->head_dim * 6.0 / b->copy, 0);
        add_cell(layers, b->layer[column], 0, 0);
    }
    report(b, "%s", norms);
    report(b, "%s", ropes);
    report(b, "%s", layers);
}

/* The sampler: the largest logit alone, and with default options several kinds of logits. */
static void bench_sampler(struct bench *b) {
    enum { SCENES = 5 };
    static const char *const names[SCENES] = {"few likely", "flat", "all alike", "two values",
                                              "bf16"};
    char text[2][LINE_LENGTH];
    for (int many = 0; many < 2; many++) {
        struct batch batch = decode_batch(b, many ? b->shape->streams : 1);
        (void)snprintf(text[many], LINE_LENGTH, "sample, us %3d rows:", batch.n_samples);
        for (int scene = -1; scene < SCENES; scene++) {

            for (int i = 0; i < batch.n_samples; i++) {
                batch.sampling[i].temperature = scene < 0 ? 0.0f : 0.8f;
                batch.sampling[i].top_p = 0.95f;
            }
            double time = time_recorded(
                b, &batch, 4, [=](int) { draw_tokens(b->d, 0, b->d->n_samples); },
                scene < 0 ? 0 : scene);
            size_t at = strlen(text[many]);
            (void)snprintf(text[many] + at, LINE_LENGTH - at, "  %s %.1f",
                           scene < 0 ? "greedy" : names[scene], time * 1e6);
        }
        report(b, "%s", text[many]);
    }
    struct batch batch = decode_batch(b, 1);
    double empty = time_recorded(b, &batch, EMPTY, [=](int) {
        launch(b->d, "empty_kernel", empty_kernel, 1, WARP, 0, (int *)NULL);
    });
    report(b, "empty launch %.2f us", empty * 1e6);
}

static void bench_kernels(struct bench *b) {
    report(b, "us, floor%% (PyTorch)%14s %23s %23s %15d rows", "1 row", "8 rows", "64 rows",
           b->shape->chunk);
    bench_products(b);
    if (b->shape->streams == MAX_STREAMS) {
        bench_attention(b);
        bench_small(b);
        bench_sampler(b);
    }
}

/* ---- decode ---- */

/* What is wanted of this type and these streams: now, and later; percent of the floor. */
static void decode_goal(const struct bench *b, int streams, char *goal, size_t size) {
    bool bf16 = b->form->type == TYPE_BF16, q8 = b->form->type == TYPE_Q8_0;
    const char *text = b->shape->streams == 1  ? "goal 72 (85)"
                       : streams == 1 && bf16  ? "goal 88 (95)"
                       : streams == 8 && bf16  ? "goal 86 (94)"
                       : streams == 64 && bf16 ? "goal 75 (85)"
                       : streams == 1 && q8    ? "goal 76 (85)"
                       : streams == 64 && q8   ? "goal 52 (62)"
                                               : "";
    (void)snprintf(goal, size, "%s", text);
}

static void bench_decode(struct bench *b) {
    static const int streams[] = {1, 8, 16, 32, 64};
    const struct shape *s = b->shape;
    for (int i = 0; i < 5 && streams[i] <= s->streams; i++) {
        int n = streams[i];
        if (b->form->type != TYPE_BF16 && (n == 16 || n == 32))
            continue;
        struct batch batch = decode_batch(b, n);
        forget_graphs(b->d);
        double time = time_whole([&] { forward(b, &batch); });
        cudaGraphExec_t exec = b->d->graphs[divide(n, 8)].exec;
        double on_gpu = time_on(b, compute_stream(b),
                                [&] { TRY(b->d, cudaGraphLaunch(exec, compute_stream(b))); });
        double bytes = b->weight_bytes + s->n_layers * kv_bytes(b, n * (s->context + 1));
        char goal[32];
        decode_goal(b, n, goal, sizeof goal);
        report(
            b,
            "%s decode %2d %8.1f tok/s of %8.1f = %3.0f %%  step %.3f ms, on the GPU %.3f, floor "
            "%.3f  %s",
            b->form->name, n, n / time, n * b->copy / bytes, 100 * bytes / b->copy / time,
            time * 1e3, on_gpu * 1e3, bytes / b->copy * 1e3, goal);
        if (n == 1) /* with what launches take: see layer_seconds */
            report(b, "read_bytes_per_second %.4g", bytes / time);
    }
}

/* ---- prefill ---- */

static void report_prefill(struct bench *b, const char *what, double time, double work,
                           const char *goal) {
    char share[48] = "share of the floor not known";
    if (b->multiply > 0)
        (void)snprintf(share, sizeof share, "%3.0f %% of %.0f", 100 * work / b->multiply / time,
                       b->multiply * 1e-12);
    report(b, "prefill %d, %-9s %8.1f ms  %6.1f TFLOP/s = %s  %s", b->shape->prompt, what,
           time * 1e3, work / time * 1e-12, share, goal);
}

/* A prompt, chunk by chunk; and its products and its attention alone. */
static void bench_prefill(struct bench *b) {
    const struct shape *s = b->shape;
    double products = 0, attention = 0, work = 0, scores = 0;
    for (int start = 0; start < s->prompt; start += s->chunk) {
        struct batch batch = prompt_batch(b, start);
        attention += s->n_layers * time_attention(b, &batch);
        scores += s->n_layers * attention_work(b, start, s->chunk);
    }
    struct batch batch = prompt_batch(b, 0);
    for (int name = 0; name < LOGITS; name++) {
        int n, k;
        extents(b, (enum product_name)name, &n, &k);
        work += 2.0 * s->n_layers * n * k * s->prompt;
        products +=
            s->n_layers * time_product(b, (enum product_name)name, &batch) * (s->prompt / s->chunk);
    }
    double whole = time_whole([&] {
        for (int start = 0; start < s->prompt; start += s->chunk) {
            struct batch chunk = prompt_batch(b, start);
            forward(b, &chunk);
        }
    });
    report_prefill(b, "products", products, work, "goal 75 (90)");
    report_prefill(b, "attention", attention, scores, "goal 55 (70)");
    report_prefill(b, "whole", whole, work + scores, "goal 60 (77)");
    report(b, "operations_per_second %.4g", (work + scores) / whole);
    double other = 1e-6 * s->n_layers * theirs(b, "attention", s->prompt);
    if (other > 0)
        report(b, "  attention by PyTorch, the prompt at once: %.1f ms", other * 1e3);
}

/* ---- paging ---- */

struct pager {
    struct bench *b;
    char *host; /* pinned (PAGED_BLOCKS, bytes) */
    size_t bytes;
};

/* Starts to copy a block to its place on the host, or back. */
static uint64_t page(const struct pager *p, enum stream stream, int block) {
    char *device = (char *)p->b->d->device.kv + (size_t)block * p->bytes;
    char *host = p->host + (size_t)block * p->bytes;
    bool out = stream == STREAM_PAGE_OUT;
    struct copy2d copy = {
        out ? host : device, out ? device : host, p->bytes, p->bytes, p->bytes, 1};
    return p->b->backend->copy(&p->b->d->device, stream, &copy);
}

/* Bytes a second each way, if all blocks are paged out, in (the upper half of them), or both. */
static double page_rate(const struct pager *p, bool out, bool in) {
    struct bench *b = p->b;
    int first = out && in ? PAGED_BLOCKS / 2 : 0, n = PAGED_BLOCKS - first;
    double time = time_whole([&] {
        uint64_t last[2] = {0, 0};
        for (int i = 0; i < n; i++) {
            last[0] = out ? page(p, STREAM_PAGE_OUT, i) : 0;
            last[1] = in ? page(p, STREAM_PAGE_IN, first + i) : 0;
        }
        while (!b->backend->copy_done(&b->d->device, STREAM_PAGE_OUT, last[0]) ||
               !b->backend->copy_done(&b->d->device, STREAM_PAGE_IN, last[1])) {
        }
    });
    return (double)n * (double)p->bytes / time;
}

/* Seconds of a step while blocks are paged both ways. */
static double paged_step(const struct pager *p, const struct batch *batch) {
    struct bench *b = p->b;
    uint64_t last[2] = {0, 0};
    double times[MOST_REPEATS];
    for (int i = 0; i < MOST_REPEATS; i++) {
        while (!b->backend->copy_done(&b->d->device, STREAM_PAGE_OUT, last[0]) ||
               !b->backend->copy_done(&b->d->device, STREAM_PAGE_IN, last[1])) {
        }
        for (int block = 0; block < PAGED_BLOCKS / 2; block++) { /* they take as long as a step */
            last[0] = page(p, STREAM_PAGE_OUT, block);
            last[1] = page(p, STREAM_PAGE_IN, PAGED_BLOCKS / 2 + block);
        }
        double start = seconds();
        forward(b, batch);
        times[i] = seconds() - start;
    }
    return median(times, MOST_REPEATS);
}

static void bench_paging(struct bench *b) {
    struct pager p = {b, NULL, block_bytes(&b->config, 1, KV_BF16)};
    if (b->n_blocks < PAGED_BLOCKS)
        quit("paging: too few blocks");
    p.host = pinned_memory(b, PAGED_BLOCKS * p.bytes);
    TRY(b->d, cudaMemcpy(p.host, b->d->device.kv, PAGED_BLOCKS * p.bytes, cudaMemcpyDefault));
    double out = page_rate(&p, true, false), in = page_rate(&p, false, true);
    double both = page_rate(&p, true, true);
    report(b,
           "paging, blocks of %.2f MiB: out %.1f GB/s = %.0f %% of a plain copy, in %.1f = %.0f "
           "%%, both at once %.1f each",
           (double)p.bytes / 1048576, out * 1e-9, 100 * out / b->down, in * 1e-9, 100 * in / b->up,
           both * 1e-9);
    report(b, "host_bytes_per_second %.4g", (out + in) / 2);
    struct batch batch = decode_batch(b, 1);
    double alone = time_whole([&] { forward(b, &batch); });
    double beside = paged_step(&p, &batch);
    report(b, "  a decode step of 1 stream meanwhile: %.3f ms, alone %.3f: %+.1f %%", beside * 1e3,
           alone * 1e3, 100 * (beside / alone - 1));
    free_pinned(b, p.host);
}

/* ---- main ---- */

static bool asked(const struct bench *b, const char *part) {
    static const char *const parts[] = {"start", "kernels", "decode", "prefill", "paging"};
    bool some = false, this_one = false;
    for (int i = 1; i < b->argc; i++) {
        for (int j = 0; j < 5; j++)
            some = some || !strcmp(b->argv[i], parts[j]);
        this_one = this_one || !strcmp(b->argv[i], part);
    }
    return this_one || !some;
}

static void read_theirs(struct bench *b, const char *path) {
    FILE *file = fopen(path, "r");
    while (file && b->n_theirs < LINES &&
           fscanf(file, "%31s %lf", b->theirs[b->n_theirs].name, &b->theirs[b->n_theirs].value) ==
               2)
        b->n_theirs++;
    if (file)
        (void)fclose(file);
    else
        (void)printf("%s cannot be read: no figures of PyTorch\n", path);
}

/* SHAPE[:TYPE] and floors=FILE; what is neither must be a part. */
static void read_arguments(struct bench *b) {
    b->shape = &shapes[0];
    b->form = &forms[0];
    for (int i = 1; i < b->argc; i++) {
        const char *word = b->argv[i], *colon = strchr(word, ':');
        size_t length = colon ? (size_t)(colon - word) : strlen(word);
        bool known = strstr("start kernels decode prefill paging", word) != NULL;
        for (int j = 0; j < (int)(sizeof shapes / sizeof *shapes); j++)
            if (strlen(shapes[j].name) == length && !strncmp(word, shapes[j].name, length)) {
                b->shape = &shapes[j];
                known = !colon;
            }
        for (int j = 0; j < 3 && colon; j++)
            if (!strcmp(colon + 1, forms[j].name)) {
                b->form = &forms[j];
                known = true;
            }
        if (!strncmp(word, "floors=", 7))
            read_theirs(b, word + 7);
        else if (!known)
            quit("bench_cuda [SHAPE[:TYPE]] [start] [kernels] [decode] [prefill] [paging] "
                 "[floors=FILE]");
    }
}

int main(int argc, char **argv) {
    static struct bench bench;
    struct bench *b = &bench;
    b->argc = argc;
    b->argv = argv;
    read_arguments(b);
    make_config(b);
    open_device(b);
    probe(b);
    bool from_host = asked(b, "start");
    load_model(b, !from_host);
    report(b, "load %s:%s: %.2f GB in %.2f s = %.1f GB/s, %s", b->shape->name, b->form->name,
           b->loaded * 1e-9, b->load_seconds, b->loaded / b->load_seconds * 1e-9,
           from_host ? "from host memory" : "of tensors that repeat themselves");
    make_kv(b);
    if (asked(b, "decode"))
        bench_decode(b);
    if (asked(b, "prefill"))
        bench_prefill(b);
    if (asked(b, "kernels"))
        bench_kernels(b);
    if (asked(b, "paging"))
        bench_paging(b);
    (void)puts("== summary");
    for (int i = 0; i < b->n_lines; i++)
        (void)puts(b->lines[i]);
    b->backend->release(&b->d->device, b->d->device.kv);
    b->backend->device_close(&b->d->device);
    b->backend->close(b->backend);
    return 0;
}
