/* bench.c: what the CPU backend reaches of what this machine can do.
 *
 *     bench cache                          what an operation of kvcache.c costs, by blocks
 *     bench scheduler                      what scheduler.c costs, by workers, requests, context
 *     bench rates [TYPE] [SHAPE]           for --rates: what steps of that model reach here
 *     bench experts [TYPE] [alone]         generated tokens through experts and one matrix, of all
 *                                          types, each beside the probe; alone: by one thread, in
 *                                          its own time, which other programs take none of
 *     bench [TYPE] [SHAPE] [kernel] [decode] [prefill] [long] [bf16-kv] [plain] [no-amx]
 *         TYPE: F32, F16, BF16, Q8_0, Q4_0, Q4_K, Q6_K, MXFP4; without: the first four
 *         SHAPE: stories-110m (default), tinyllama-1.1b; without a part: all but long
 *
 * A model of that shape with random weights is run through the backend's ops. Each figure is the
 * best of several repetitions and stands beside the machine's own limits (`limits` of the backend),
 * measured right before and after it: reading those weights, and the arithmetic that the type's
 * kernel uses. */
#include "../kernels.c"

#include <malloc.h>

enum {
    MAX_LAYERS = 22,
    VOCAB = 32000,
    PROMPT = 512,
    CONTEXT = 128, /* tokens that a stream has when it is measured */
    LONG = 8192,
    N_THREADS = 2,
    STREAMS = 32,
    REPEATS = 7
};

static const struct shape {
    const char *name;
    int n_layers, d_model, n_heads, n_kv_heads, head_dim, d_ff;
    bool tied;
    int n_experts, n_used;
} shapes[] = {{"stories-110m", 12, 768, 12, 12, 64, 2048, true, 0, 0},
              {"tinyllama-1.1b", 22, 2048, 32, 4, 64, 5632, false, 0, 0},
              {"experts-1.1b", 1, 2048, 32, 4, 64, 5632, true, 32, 4}};

static double seconds_of(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static double seconds(void) {
    return seconds_of(CLOCK_MONOTONIC);
}

static void empty_tile(const void *argument, int tile, struct scratch *scratch) {
    (void)argument;
    (void)tile;
    (void)scratch;
}

/* ---- the model ---- */

struct bench {
    const struct shape *shape;
    struct model_config config;
    float frequency[64];
    struct backend *backend;
    struct device *device;
    const struct weight *layers[MAX_LAYERS][N_ROLES];
    double weight_bytes, attention_seconds, pack_seconds, packed_bytes;
    struct tensor *tensors[16 * MAX_LAYERS];
    int n_tensors;
};

/* A tile of random weights, repeated: small numbers in any type. */
static const struct weight *make_weight(struct bench *bench, enum tensor_type type, int rows,
                                        int cols) {
    struct tensor *tensor = calloc(1, sizeof *tensor);
    struct pack_block form = pack_block(type);
    size_t bytes = (size_t)rows * (size_t)cols / (size_t)form.n_k * (size_t)form.bytes;
    size_t unit = (size_t)form.bytes, size = 65536 / unit * unit;
    char *data = malloc(bytes), error[ERROR_LENGTH];
    if (!tensor || !data) {
        fprintf(stderr, "bench: no memory for the model\n");
        exit(1);
    }
    for (size_t i = 0; i < bytes && i < size; i++) {
        uint32_t hash = (uint32_t)i * 2654435761u;
        data[i] = (char)(hash >> 24);
        size_t at = i % unit, d = type == TYPE_Q6_K ? 209 : type != TYPE_MXFP4;
        bool top = pack_quantized(type)
                       ? at == d || (type == TYPE_Q4_K && at == 3)
                       : i % (type == TYPE_F32 ? 4 : 2) == (type == TYPE_F32 ? 3 : 1);
        if (top) /* the byte of the exponent */
            data[i] = (char)((type == TYPE_F16       ? 0x24
                              : type == TYPE_MXFP4   ? 0x78
                              : pack_quantized(type) ? 0x08
                                                     : 0x3c) |
                             (type == TYPE_MXFP4 ? 0 : hash >> 8 & 0x80));
    }
    for (size_t i = size; i < bytes; i += size)
        memcpy(data + i, data, i + size < bytes ? size : bytes - i);
    *tensor = (struct tensor){.name = {"bench", 5},
                              .type = type,
                              .rows = rows,
                              .cols = cols,
                              .bytes = bytes,
                              .data = data};
    bench->tensors[bench->n_tensors++] = tensor;
    double start = seconds();
    const struct weight *weight = bench->backend->upload(bench->device, tensor, NULL,
                                                         (struct slice){SLICE_WHOLE, 0, 1}, error);
    bench->pack_seconds += seconds() - start;
    bench->packed_bytes += (double)bytes;
    bench->weight_bytes += (double)bytes;
    free(data);
    tensor->data = NULL;
    if (!weight) {
        fprintf(stderr, "bench: %s\n", error);
        exit(1);
    }
    return weight;
}

static const struct weight *make_norm(struct bench *bench) {
    double packed = bench->weight_bytes;
    const struct weight *weight = make_weight(bench, TYPE_F32, 1, bench->shape->d_model);
    for (int i = 0; i < bench->shape->d_model; i++)
        weight->vector[i] = 1.0f;
    bench->weight_bytes = packed;
    return weight;
}

static void make_layer(struct bench *bench, enum tensor_type type, const struct weight **layer) {
    const struct shape *shape = bench->shape;
    int d = shape->d_model, q = shape->n_heads * shape->head_dim;
    int kv = shape->n_kv_heads * shape->head_dim;
    layer[ATTN_NORM] = make_norm(bench);
    layer[ATTN_Q] = make_weight(bench, type, q, d);
    layer[ATTN_K] = make_weight(bench, type, kv, d);
    layer[ATTN_V] = make_weight(bench, type, kv, d);
    layer[ATTN_OUTPUT] = make_weight(bench, type, d, q);
    layer[FFN_NORM] = make_norm(bench);
    if (shape->n_experts > 0) {
        layer[ROUTER] = make_weight(bench, TYPE_F32, shape->n_experts, d);
        layer[ROUTER_BIAS] = make_weight(bench, TYPE_F32, 1, shape->n_experts);
        layer[GATE_EXPERTS] = make_weight(bench, type, shape->n_experts * shape->d_ff, d);
        layer[UP_EXPERTS] = make_weight(bench, type, shape->n_experts * shape->d_ff, d);
        layer[DOWN_EXPERTS] = make_weight(bench, type, shape->n_experts * d, shape->d_ff);
        return;
    }
    layer[FFN_GATE] = make_weight(bench, type, shape->d_ff, d);
    layer[FFN_UP] = make_weight(bench, type, shape->d_ff, d);
    layer[FFN_DOWN] = make_weight(bench, type, d, shape->d_ff);
}

static void *memory_of(struct bench *bench, size_t bytes) {
    void *memory = bench->backend->alloc(bench->device, bytes);
    if (!memory) {
        fprintf(stderr, "bench: no memory for %zu bytes\n", bytes);
        exit(1);
    }
    return memset(memory, 0, bytes);
}

static void open_bench(struct bench *bench, const struct shape *shape, enum tensor_type type,
                       enum kv_type kv_type, int n_threads, bool plain, bool no_amx) {
    char error[ERROR_LENGTH];
    *bench = (struct bench){.shape = shape,
                            .config = {.n_layers = shape->n_layers,
                                       .d_model = shape->d_model,
                                       .n_heads = shape->n_heads,
                                       .n_kv_heads = shape->n_kv_heads,
                                       .head_dim = shape->head_dim,
                                       .d_ff = shape->d_ff,
                                       .n_experts = shape->n_experts,
                                       .n_used = shape->n_used,
                                       .vocab_size = VOCAB,
                                       .rope_dim = shape->head_dim,
                                       .rope_adjacent = true,
                                       .norm_epsilon = 1e-5f}};
    for (int i = 0; i < shape->head_dim / 2; i++)
        bench->frequency[i] = (float)pow(10000.0, -2.0 * i / shape->head_dim);
    struct backend_options options = {.n_threads = n_threads, .plain = plain};
    bench->backend = cpu_backend_open(&options, error);
    if (no_amx && bench->backend)
        ((struct cpu_backend *)bench->backend)->amx = false;
    struct device wanted = {.config = &bench->config,
                            .rope_frequency = bench->frequency,
                            .n_shards = 1,
                            .max_rows = PROMPT,
                            .max_samples = STREAMS,
                            .urgent = true,
                            .kv_type = kv_type};
    bench->device =
        bench->backend ? bench->backend->device_open(bench->backend, &wanted, error) : NULL;
    if (!bench->device) {
        fprintf(stderr, "bench: %s\n", error);
        exit(1);
    }
    int n_blocks = STREAMS * blocks_of(CONTEXT + 1);
    n_blocks = n_blocks < blocks_of(LONG + 1) ? blocks_of(LONG + 1) : n_blocks;
    bench->device->kv =
        memory_of(bench, (size_t)n_blocks * block_bytes(&bench->config, 1, kv_type));
    bench->layers[0][TOKEN_EMBD] = bench->layers[0][OUTPUT] =
        make_weight(bench, type, VOCAB, shape->d_model);
    if (!shape->tied) {
        bench->weight_bytes = 0; /* of what a step reads */
        bench->layers[0][OUTPUT] = make_weight(bench, type, VOCAB, shape->d_model);
    }
    bench->layers[0][OUTPUT_NORM] = make_norm(bench);
    for (int i = 0; i < shape->n_layers; i++)
        make_layer(bench, type, bench->layers[i]);
}

static void close_bench(struct bench *bench) {
    bench->backend->release(bench->device, bench->device->kv);
    bench->backend->device_close(bench->device);
    bench->backend->close(bench->backend);
    for (int i = 0; i < bench->n_tensors; i++)
        free(bench->tensors[i]);
}

/* ---- steps ---- */

static void forward(struct bench *bench, const struct batch *batch) {
    struct backend *backend = bench->backend;
    struct device *device = bench->device;
    backend->step_begin(device, batch);
    backend->embed(device, bench->layers[0][TOKEN_EMBD]);
    bench->attention_seconds = 0.0;
    for (int i = 0; i < bench->shape->n_layers; i++) {
        const struct weight *const *layer = bench->layers[i];
        backend->norm_qkv(device, layer);
        backend->rope_append(device, layer, i);
        double start = seconds();
        backend->attention(device, layer, i);
        bench->attention_seconds += seconds() - start;
        backend->project_add(device, layer[ATTN_OUTPUT], INPUT_ATTENTION);
        backend->norm_gate_up(device, layer);
        backend->project_add(device, layer[FFN_DOWN], INPUT_FFN);
    }
    backend->sample(device, bench->layers[0], NULL);
    backend->step_end(device, batch->sampled);
}

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* The best time of a step of n sequences, each of `rows` rows from position `start`; the time of
 * attention in it. Of a single one, if tokens are drawn as by default. */
static double time_step(struct bench *bench, int n, int start, int rows, bool drawn,
                        double *attention) {
    static _Thread_local int token[PROMPT], position[PROMPT], row_sequence[PROMPT],
        table[LONG / BLOCK_TOKENS + STREAMS * 64];
    static _Thread_local int sample_row[STREAMS], sampled[STREAMS];
    static _Thread_local struct sequence sequences[STREAMS];
    static _Thread_local struct sampling sampling[STREAMS];
    struct batch batch = {n * rows,  n,     n,          0,        token, position, row_sequence,
                          sequences, table, sample_row, sampling, NULL,  sampled};
    for (int i = 0; i < n; i++) {
        int blocks = blocks_of(start + rows);
        sequences[i] = (struct sequence){i * rows, rows, start, batch.n_blocks, blocks, rows == 1};
        for (int j = 0; j < blocks; j++, batch.n_blocks++)
            table[batch.n_blocks] = batch.n_blocks;
        for (int j = 0; j < rows; j++) {
            token[i * rows + j] = (i * 37 + j * 11) % VOCAB;
            position[i * rows + j] = start + j;
            row_sequence[i * rows + j] = i;
        }
        sample_row[i] = (i + 1) * rows - 1;
        sampling[i] = (struct sampling){
            .temperature = drawn ? 0.8f : 0, .top_p = drawn ? 0.95f : 1, .seed = (uint64_t)i};
    }
    double best = 1e9;
    for (int i = drawn ? 1 : REPEATS * (rows > 1 ? 1 : 3); i > 0; i--) {
        double begin = seconds();
        forward(bench, &batch);
        double time = seconds() - begin;
        if (time < best) {
            best = time;
            *attention = bench->attention_seconds;
        }
    }
    return best;
}

/* What the machine can do now: bytes read and operations a second, times 1e-9. */
static void limits(struct bench *bench, enum tensor_type type, double *read, double *ops) {
    bench->backend->limits(&bench->device, 1, type, read, ops);
    *read *= 1e-9;
    *ops *= 1e-9;
}

static double larger(double a, double b) {
    return a > b ? a : b;
}

static void bench_decode(struct bench *bench, const char *type, enum tensor_type tensor_type) {
    static const int streams[] = {1, 8, 16, 32};
    for (int i = 0; i < 4; i++) {
        double attention = 0, read, again, ops;
        limits(bench, tensor_type, &read, &ops);
        double time = time_step(bench, streams[i], CONTEXT, 1, false, &attention);
        limits(bench, tensor_type, &again, &ops);
        double rate = bench->weight_bytes / time * 1e-9, most = larger(read, again);
        printf("%-5s decode %2d: %7.1f tok/s  %5.1f GB/s = %3.0f %% of %.1f  attention %4.1f %%\n",
               type, streams[i], streams[i] / time, rate, 100 * rate / most, most,
               100 * attention / time);
    }
}

/* One stream far into a text: the keys and values are read at so many GB/s. */
static void bench_long(struct bench *bench, const char *type, enum tensor_type tensor_type) {
    for (int context = 1024; context <= LONG; context *= 8) {
        double attention = 0, read, ops;
        limits(bench, tensor_type, &read, &ops);
        double time = time_step(bench, 1, context, 1, false, &attention);
        double bytes =
            (double)block_bytes(&bench->config, 1, bench->device->kv_type) * blocks_of(context + 1);
        printf("%-5s context %d: %6.1f tok/s, attention %4.1f %% of the time, %.1f GB/s = %.0f %% "
               "of %.1f\n",
               type, context, 1 / time, 100 * attention / time, bytes / attention * 1e-9,
               100 * bytes / attention * 1e-9 / read, read);
    }
}

static void bench_prefill(struct bench *bench, const char *type, enum tensor_type tensor_type) {
    const struct shape *shape = bench->shape;
    double attention = 0, read, ops, again;
    limits(bench, tensor_type, &read, &ops);
    double time = time_step(bench, 1, 0, PROMPT, false, &attention);
    limits(bench, tensor_type, &read, &again);
    double most = larger(ops, again);
    double heads = shape->n_heads * shape->head_dim, d = shape->d_model;
    double layer =
        2 * d * heads + 2 * d * shape->n_kv_heads * shape->head_dim + 3 * d * shape->d_ff;
    double work = 2.0 * (PROMPT * shape->n_layers * layer + VOCAB * d);
    double scores = 4.0 * shape->n_layers * heads * PROMPT * (PROMPT + 1) / 2;
    printf("%-5s prefill %d: %7.1f tok/s  %5.1f GFLOP/s = %3.0f %% of %.1f  attention %4.1f %% of "
           "the time, %5.1f GFLOP/s\n",
           type, PROMPT, PROMPT / time, (work + scores) / time * 1e-9,
           100 * (work + scores) / time * 1e-9 / most, most, 100 * attention / time,
           scores / attention * 1e-9);
}

enum { CHUNK = 256, TIMES = 3 * REPEATS }; /* tokens of a prompt in a step, as by default */

static double median(double *times, int n) {
    qsort(times, (size_t)n, sizeof *times, by_size);
    return times[n / 2];
}

struct beside { /* a device that prefills while another decodes */
    struct bench bench;
    double times[TIMES];
    atomic_int n;
};

static void *prefill_beside(void *argument) {
    struct beside *beside = argument;
    double attention;
    for (int i = 0; i < TIMES; i++) {
        beside->times[i] = time_step(&beside->bench, 1, 0, CHUNK, true, &attention);
        atomic_store(&beside->n, i + 1);
    }
    return NULL;
}

/* The median times of a step of one stream and of a chunk on two devices at once. */
static void time_beside(struct bench *bench, double *decode, double *prefill) {
    static struct beside beside;
    static double times[100 * TIMES];
    char error[ERROR_LENGTH];
    double attention;
    int n = 0;
    pthread_t thread;
    struct device wanted = *bench->device;
    beside.bench = *bench;
    wanted.urgent = false;
    wanted.index++;
    struct device *other = bench->backend->device_open(bench->backend, &wanted, error);
    beside.bench.device = other;
    if (!other)
        exit(1);
    other->kv = memory_of(&beside.bench, (size_t)blocks_of(CHUNK) *
                                             block_bytes(&bench->config, 1, wanted.kv_type));
    if (pthread_create(&thread, NULL, prefill_beside, &beside) != 0)
        exit(1);
    for (; atomic_load(&beside.n) < TIMES && n < 100 * TIMES; n++)
        times[n] = time_step(bench, 1, CONTEXT, 1, true, &attention);
    pthread_join(thread, NULL);
    *decode = median(times, n);
    *prefill = median(beside.times, TIMES);
}

/* Weights and a text are read in a step of one stream, and weights multiplied in a chunk of a
 * prompt; what each more stream takes is a token's own; a block is copied as memory is. Medians, as
 * a run has them. */
static void bench_rates(struct bench *bench, const char *type) {
    enum { FEW = 4, BYTES = 1 << 26 };
    const struct shape *shape = bench->shape;
    double heads = shape->n_heads * shape->head_dim, d = shape->d_model, attention, best = 1e9;
    double layer =
        2 * d * heads + 2 * d * shape->n_kv_heads * shape->head_dim + 3 * d * shape->d_ff;
    double work = 2.0 * (CHUNK * shape->n_layers * layer + VOCAB * d) +
                  4.0 * shape->n_layers * heads * CHUNK * (CHUNK + 1) / 2;
    double times[3][TIMES], decode, prefill;
    for (int i = 0; i < TIMES; i++) { /* in turn, as in a run: caches are cold */
        times[0][i] = time_step(bench, 1, CONTEXT, 1, true, &attention);
        times[1][i] = time_step(bench, FEW, CONTEXT, 1, true, &attention);
        times[2][i] = time_step(bench, 1, 0, CHUNK, true, &attention);
    }
    double one = median(times[0], TIMES), prompt = median(times[2], TIMES);
    double sample = fmax(median(times[1], TIMES) - one, 0) / (FEW - 1);
    double kv = (double)block_bytes(&bench->config, 1, bench->device->kv_type);
    double bytes = bench->weight_bytes + kv * blocks_of(CONTEXT + 1);
    double read = bytes / (one - sample), ops_rate = work / (prompt - sample);
    char *from = calloc(1, BYTES), *to = calloc(1, BYTES);
    for (int i = 0; i < REPEATS && from && to; i++) {
        double start = seconds();
        memcpy(to, from, BYTES);
        from[i] = to[BYTES - 1]; /* that it is not left out */
        best = seconds() - start < best ? seconds() - start : best;
    }
    free(from);
    free(to);
    printf("# %s %s\ncpu read_bytes_per_second %.4g\ncpu operations_per_second %.4g\n"
           "cpu peer_bytes_per_second %.4g\ncpu host_bytes_per_second %.4g\n"
           "cpu sample_seconds %.4g\n",
           shape->name, type, read, ops_rate, BYTES / best, BYTES / best, sample);
    time_beside(bench, &decode, &prefill);
    printf("cpu urgent_share %.4g\ncpu other_share %.4g\n", fmin(one / decode, 0.99),
           fmin(prompt / prefill, 0.99));
}

/* The product of a matrix of (5632, 2048) with some rows, alone. */
static void bench_kernel(struct bench *bench, const char *type, enum tensor_type tensor_type) {
    enum { ROWS = 5632, COLS = 2048 };
    struct cpu_device *device = (struct cpu_device *)bench->device;
    static const int counts[] = {1, 8, 16, 32, 512};
    double bytes = bench->weight_bytes;
    const struct weight *weight = make_weight(bench, tensor_type, ROWS, COLS);
    bytes = bench->weight_bytes - bytes;
    bench->weight_bytes -= bytes;
    float *rows = memory_of(bench, (size_t)512 * (COLS + PAD) * sizeof *rows);
    float *out = memory_of(bench, (size_t)512 * ROWS * sizeof *out);
    for (size_t i = 0; i < (size_t)512 * (COLS + PAD); i++)
        rows[i] = (float)(i % 7) - 3.0f;
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        double best = 1e9, read, peak;
        limits(bench, tensor_type, &read, &peak);
        pool_enter(&device->cpu->pool);
        for (int repeat = 0; repeat < 3 * REPEATS; repeat++) {
            struct product product = {.matrix = {weight},
                                      .out = {{out, ROWS}},
                                      .rows = {rows, COLS + PAD},
                                      .n_rows = counts[i]};
            double start = seconds();
            run_product(device, product);
            best = seconds() - start < best ? seconds() - start : best;
        }
        pool_leave(&device->cpu->pool);
        double rate = 2.0 * ROWS * COLS * counts[i] / best * 1e-9;
        printf("%-5s product, %3d rows: %6.1f Gop/s = %3.0f %% of %.1f, %5.1f GB/s of weights\n",
               type, counts[i], rate, 100 * rate / peak, peak, bytes / best * 1e-9);
    }
    bench->backend->release(bench->device, rows);
    bench->backend->release(bench->device, out);
}

/* What three of four values are below: other programs have taken time of the rest. */
static double upper(double *values, int n) {
    qsort(values, (size_t)n, sizeof *values, by_size);
    return values[n * 3 / 4];
}

/* One row by four experts of 32, by as many single matrices, and the probe over as many bytes, in
 * turns, each of memory that the others have not just read. */
static void bench_experts(struct bench *bench, const char *type) {
    enum { ROUNDS = 48, USED = 4, PIECE = 1 << 20 };
    struct cpu_device *device = (struct cpu_device *)bench->device;
    const struct weight *const *layer = bench->layers[0], *gate = layer[GATE_EXPERTS];
    int n = bench->shape->n_experts, d_ff = bench->shape->d_ff;
    size_t each = pack_bytes(gate) / (size_t)n; /* of a matrix of an expert */
    double experts[ROUNDS], dense[ROUNDS], probe[ROUNDS];
    struct batch batch = {.n_rows = 1};
    clockid_t clock = device->cpu->pool.n_threads > 1 ? CLOCK_MONOTONIC : CLOCK_PROCESS_CPUTIME_ID;
    device->batch = &batch;
    pool_enter(&device->cpu->pool);
    for (int round = 0; round < ROUNDS; round++) {
        struct piece pieces[LIMIT_PIECES];
        int n_pieces = 0;
        for (int i = 0; i < bench->shape->d_model; i++)
            device->x.at[i] = (float)((i * 7 + round) % 13) - 6.0f;
        for (int e = 0; e < n; e++)
            layer[ROUTER_BIAS]->vector[e] = (e / USED - round) % (n / USED) ? 0.0f : 1e6f;
        double start = seconds_of(clock);
        cpu_norm_route(bench->device, layer);
        cpu_expert_gate_up(bench->device, layer);
        cpu_expert_down_add(bench->device, layer);
        experts[round] = (double)(3 * USED * each) / (seconds_of(clock) - start) * 1e-9;
        start = seconds_of(clock);
        for (int i = 0; i < USED; i++) {
            struct weight matrix = pack_expert(gate, (USED * (round + 2) + i) % n, d_ff);
            run_product(device, (struct product){.matrix = {&matrix},
                                                 .out = {device->ffn},
                                                 .rows = device->h,
                                                 .n_rows = 1});
        }
        dense[round] = (double)(USED * each) / (seconds_of(clock) - start) * 1e-9;
        const char *from = gate->panels + (size_t)(USED * (round + 4) % n) * each;
        for (size_t at = 0; at + PIECE <= USED * each && n_pieces < LIMIT_PIECES; at += PIECE)
            pieces[n_pieces++] = (struct piece){from + at, PIECE};
        start = seconds_of(clock);
        parallel_for(device, n_pieces, read_tile, pieces);
        probe[round] = (double)n_pieces * PIECE / (seconds_of(clock) - start) * 1e-9;
    }
    pool_leave(&device->cpu->pool);
    double most = upper(probe, ROUNDS), of_experts = upper(experts, ROUNDS),
           of_dense = upper(dense, ROUNDS);
    printf("%-5s experts %5.1f GB/s = %3.0f %%, a matrix %5.1f GB/s = %3.0f %% of %.1f\n", type,
           of_experts, 100 * of_experts / most, of_dense, 100 * of_dense / most, most);
}

/* Costs of the cache on a device of n blocks with a host of as many: to take, register and let go a
 * block; to find one; to order the page-out of one when room for n / 2 is wanted; to ask for that
 * room again while they are under way; to end one, which drops it. */
static void bench_cache(void) {
    enum { TEXT = 250, ASKED = 1000 }; /* blocks of a text */
    printf("%8s %10s %10s %10s %10s %10s %10s\n", "blocks", "register", "find", "page out", "again",
           "copied", "memory");
    for (int n = 1000; n <= 1000000; n *= 10) {
        struct kv_config config = {.n_workers = 1, .device_blocks = {n}, .host_blocks = n};
        struct kv *kv = kv_create(&config);
        int *tokens = calloc((size_t)n * BLOCK_TOKENS, sizeof *tokens), node = -1, found[TEXT];
        uint64_t *hashes = calloc((size_t)n, sizeof *hashes);
        double time[6] = {seconds()};
        for (int i = 0; i < n; i++) {
            tokens[i * BLOCK_TOKENS] = i;
            bool first = i % TEXT == 0;
            hashes[i] = kv_hash(first ? 0 : hashes[i - 1], tokens + i * BLOCK_TOKENS);
            int parent = first ? -1 : node;
            node = kv_register(kv, kv_new(kv, 0), parent, hashes[i], tokens + i * BLOCK_TOKENS);
            kv_unpin(kv, node, 0);
        }
        time[1] = seconds();
        int n_found = 0;
        for (int i = 0; i < n; i += TEXT)
            n_found += kv_find(kv, hashes + i, tokens + i * BLOCK_TOKENS, TEXT, found);
        time[2] = seconds();
        bool room = kv_make_room(kv, 0, n / 2);
        time[3] = seconds();
        for (int i = 0; i < ASKED; i++)
            room = kv_make_room(kv, 0, n / 2) || room;
        time[4] = seconds();
        struct kv_copy_order order;
        while (kv_next_copy(kv, 0, &order))
            kv_copied(kv, &order, true);
        time[5] = seconds();
        int counts[] = {n, n_found, n / 2, ASKED, n / 2};
        printf("%8d", n);
        for (int i = 0; i < 5; i++)
            printf(" %7.0f ns", (time[i + 1] - time[i]) / counts[i] * 1e9);
        printf(" %4.0f B/slot%s\n", (double)malloc_usable_size(kv) / (2 * n),
               room || n_found != n || kv_used(kv, 0) != n / 2 ? " (wrong)" : "");
        kv_destroy(kv);
        free(tokens);
        free(hashes);
    }
}

/* Takes a worker's step and ends it: token 1 for all. Returns its rows. */
static int bench_step(struct sched *s, int worker, double *spent) {
    double start = seconds();
    struct step *step = sched_next(s, worker, 0);
    *spent += seconds() - start;
    int n_rows = step ? step->batch.n_rows : 0;
    for (int i = 0; step && i < step->batch.n_samples; i++)
        step->batch.sampled[i] = 1;
    start = seconds();
    if (step)
        sched_done(s, worker, step, 0);
    *spent += seconds() - start;
    return n_rows;
}

/* Steps of all workers, a row for each of their requests: nanoseconds a row. */
static double bench_steps(struct sched *s, int n_workers) {
    double spent = 0, rows = 0;
    for (int step = 0; step < 48; step++)
        for (int w = 0; w < n_workers; w++)
            rows += bench_step(s, w, &spent);
    return spent / rows * 1e9;
}

/* n_workers, each with n running requests that have so much text, and then others that wait. */
static void bench_requests(int n_workers, int n, int context, int n_waiting) {
    enum { ANSWER = 1024 };
    static const bool ends_text[2] = {false, false};
    struct sched_config config = {.kv = {.n_workers = n_workers},
                                  .max_batch = n,
                                  .chunk = 16384,
                                  .copies_in_flight = 64,
                                  .likely_answer = 1,
                                  .context_length = context + ANSWER,
                                  .ends_text = ends_text};
    for (int w = 0; w < n_workers; w++) {
        config.kv.device_blocks[w] = n * blocks_of(context + ANSWER);
        config.prefills[w] = config.decodes[w] = true;
    }
    struct sched *s = sched_create(&config);
    int n_all = n_workers * n + n_waiting;
    struct request *requests = calloc((size_t)n_all, sizeof *requests);
    int *tokens = calloc((size_t)n_all * (size_t)(context + ANSWER), sizeof *tokens);
    double submit = 0, start = 0, queue = 0, spent = 0;
    for (int i = 0; i < n_all; i++) {
        struct request *r = &requests[i];
        *r = (struct request){.id = i, .n_prompt = context, .max_new = ANSWER};
        r->tokens = tokens + (size_t)i * (size_t)(context + ANSWER);
        r->tokens[0] = i;
        start = seconds();
        sched_submit(s, r, 0);
        submit += i < n_workers * n ? seconds() - start : 0;
        queue += i < n_workers * n ? 0 : seconds() - start;
        for (int w = 0; w < n_workers && i % 64 == 63 && i < n_workers * n; w++)
            (void)bench_step(s, w, &spent);
        int rows = i == n_workers * n - 1 ? 0 : i + 1;
        for (int round = 0; rows != i + 1 && round < 1000; round++) {
            rows = 0;
            for (int w = 0; w < n_workers; w++)
                rows += bench_step(s, w, &spent); /* until only generated rows are left */
        }
        if (i == n_workers * n - 1)
            printf("%8d %8d %8d %10.0f ns", n_workers, n, context, bench_steps(s, n_workers));
    }
    printf(" %10.0f ns %10.0f ns", bench_steps(s, n_workers), submit / (n_workers * n) * 1e9);
    printf(" %10.0f ns\n", n_waiting > 0 ? queue / n_waiting * 1e9 : 0);
    for (int i = n_all - 1; i >= 0; i--)
        sched_cancel(s, &requests[i], false, 0);
    sched_destroy(s);
    free(requests);
    free(tokens);
}

/* A step costs so much for each of its requests, without and with requests that wait; to submit one
 * that is admitted, and one that must wait. */
static void bench_scheduler(void) {
    printf("%8s %8s %8s %13s %13s %13s %13s\n", "workers", "each", "context", "a row",
           "others wait", "admitted", "waits");
    for (int n_workers = 1; n_workers <= 16; n_workers *= 2)
        bench_requests(n_workers, 500, 256, 1000);
    for (int n = 10; n <= 4000; n = n == 1000 ? 4000 : n * 10)
        bench_requests(1, n, 256, 1000);
    for (int context = 1024; context <= 65536; context *= 8)
        bench_requests(1, 32, context, 8);
    bench_requests(1, 32, 131072, 8);
}

static bool asked(int argc, char **argv, const char *word) {
    for (int i = 1; i < argc; i++)
        if (!strcmp(argv[i], word))
            return true;
    return false;
}

int main(int argc, char **argv) {
    static const struct {
        const char *name;
        enum tensor_type type;
    } types[] = {{"F32", TYPE_F32},   {"BF16", TYPE_BF16},  {"F16", TYPE_F16},
                 {"Q8_0", TYPE_Q8_0}, {"Q4_0", TYPE_Q4_0},  {"Q4_K", TYPE_Q4_K},
                 {"Q6_K", TYPE_Q6_K}, {"MXFP4", TYPE_MXFP4}};
    enum { N_TYPES = sizeof types / sizeof *types, USUAL_TYPES = 4 };
    if (argc == 1 || asked(argc, argv, "cache"))
        bench_cache();
    if (argc == 1 || asked(argc, argv, "scheduler"))
        bench_scheduler();
    if (asked(argc, argv, "cache") || asked(argc, argv, "scheduler"))
        return 0;
    bool some_type = false, part = asked(argc, argv, "kernel") || asked(argc, argv, "long") ||
                                   asked(argc, argv, "decode") || asked(argc, argv, "prefill");
    for (int i = 0; i < N_TYPES; i++)
        some_type = some_type || asked(argc, argv, types[i].name);
    bool experts = asked(argc, argv, "experts");
    const struct shape *shape = &shapes[experts ? 2 : asked(argc, argv, shapes[1].name)];
    for (int i = 0; i < N_TYPES; i++) {
        if (some_type ? !asked(argc, argv, types[i].name) : i >= USUAL_TYPES && !experts)
            continue;
        static struct bench bench;
        open_bench(&bench, shape, types[i].type, asked(argc, argv, "bf16-kv") ? KV_BF16 : KV_F32,
                   asked(argc, argv, "alone") ? 1 : N_THREADS, asked(argc, argv, "plain"),
                   asked(argc, argv, "no-amx"));
        if (experts) {
            bench_experts(&bench, types[i].name);
            close_bench(&bench);
            continue;
        }
        if (asked(argc, argv, "rates")) {
            bench_rates(&bench, types[i].name);
            return 0;
        }
        struct cpu_device *device = (struct cpu_device *)bench.device;
        double empty = best_time(device, 2, empty_tile, NULL);
        printf("%-5s %s, packed at %.2f GB/s; an empty job takes %.2f us\n", types[i].name,
               shape->name, bench.packed_bytes / bench.pack_seconds * 1e-9, empty * 1e6);
        if (!part || asked(argc, argv, "kernel"))
            bench_kernel(&bench, types[i].name, types[i].type);
        if (!part || asked(argc, argv, "decode"))
            bench_decode(&bench, types[i].name, types[i].type);
        if (!part || asked(argc, argv, "prefill"))
            bench_prefill(&bench, types[i].name, types[i].type);
        if (asked(argc, argv, "long"))
            bench_long(&bench, types[i].name, types[i].type);
        fflush(stdout);
        close_bench(&bench);
    }
    return 0;
}
