/* bench.c: what the CPU backend reaches of what this machine can do.
 *
 *     bench [TYPE] [decode|prefill|pack]      TYPE: F32, F16, BF16, Q8_0; without: all
 *
 * A model of the shape of stories-110m with random weights is run through the backend's ops. Each
 * figure is the best of several repetitions and stands beside the machine's own limits, probed
 * right before it: reading memory with two threads, and f32 multiply-adds. */
#include "../kernels.c"

enum {
    N_LAYERS = 12,
    D_MODEL = 768,
    N_HEADS = 12,
    HEAD_DIM = 64,
    D_FF = 2048,
    VOCAB = 32000,
    PROMPT = 512,
    CONTEXT = 128, /* tokens that a stream has when it is measured */
    N_THREADS = 2,
    STREAMS = 32,
    REPEATS = 7,
    PROBE_BYTES = 256 << 20
};

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* ---- probes ---- */

struct probe {
    const char *memory;
    _Atomic float sink; /* keeps the work from being removed */
};

static void read_tile(const void *argument, int tile, struct scratch *scratch) {
    const struct probe *probe = argument;
    const char *from = probe->memory + (size_t)tile * (1 << 20);
    vec sum[4] = {{0}};
    for (size_t i = 0; i < 1 << 20; i += 256)
        for (size_t j = 0; j < 4; j++)
            sum[j] += load((const float *)(const void *)(from + i + j * 64));
    scratch->slab[0] = sum_lanes(sum[0] + sum[1] + sum[2] + sum[3]);
}

static void multiply_tile(const void *argument, int tile, struct scratch *scratch) {
    (void)argument;
    vec sum[24], factor = load(scratch->slab) * 0.0f + 0.999f;
    for (int i = 0; i < 24; i++)
        sum[i] = factor * (float)(i + tile);
    for (int k = 0; k < 20000; k++) {
#pragma GCC unroll 24
        for (int i = 0; i < 24; i++)
            sum[i] = sum[i] * factor + factor;
    }
    for (int i = 1; i < 24; i++)
        sum[0] += sum[i];
    store(scratch->slab, sum[0]);
}

static void empty_tile(const void *argument, int tile, struct scratch *scratch) {
    (void)argument;
    (void)tile;
    (void)scratch;
}

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

/* The best and the median rate of n tiles that do `work` each; per 1e9. */
static double probe_rate(struct cpu_device *device, tile_function *run, const void *argument,
                         int n_tiles, double work, double *median) {
    double times[REPEATS];
    pool_enter(&device->cpu->pool);
    for (int i = 0; i < REPEATS; i++) {
        double start = seconds();
        parallel_for(device, n_tiles, run, argument);
        times[i] = seconds() - start;
    }
    pool_leave(&device->cpu->pool);
    qsort(times, REPEATS, sizeof *times, by_size);
    if (median)
        *median = work * n_tiles / times[REPEATS / 2] * 1e-9;
    return work * n_tiles / times[0] * 1e-9;
}

static double probe_read(struct cpu_device *device, const char *memory, double *median) {
    struct probe probe = {.memory = memory};
    return probe_rate(device, read_tile, &probe, PROBE_BYTES >> 20, 1 << 20, median);
}

static double probe_multiply(struct cpu_device *device) {
    return probe_rate(device, multiply_tile, NULL, 32, 20000.0 * 24 * LANES * 2, NULL);
}

/* ---- the model ---- */

struct bench {
    struct model_config config;
    float frequency[HEAD_DIM / 2];
    struct backend *backend;
    struct device *device;
    struct weights weights;
    double weight_bytes, attention_seconds, pack_seconds, packed_bytes;
    struct tensor *tensors[16 * N_LAYERS];
    int n_tensors;
    char *probe_memory;
};

/* A tile of 64 KiB of random weights, repeated: small numbers in any type. */
static const struct weight *make_weight(struct bench *bench, enum tensor_type type, int rows,
                                        int cols) {
    struct tensor *tensor = calloc(1, sizeof *tensor);
    size_t n = (size_t)rows * (size_t)cols;
    size_t bytes = type == TYPE_Q8_0 ? n / 32 * 34 : n * (type == TYPE_F32 ? 4 : 2);
    char *data = malloc(bytes), error[GGUF_ERROR_LENGTH];
    if (!tensor || !data) {
        fprintf(stderr, "bench: no memory for the model\n");
        exit(1);
    }
    for (size_t i = 0; i < bytes && i < 65536 / 34 * 34; i++) {
        size_t at = type == TYPE_Q8_0 ? i % 34 : 99, element = type == TYPE_F32 ? i % 4 : i % 2;
        uint32_t hash = (uint32_t)i * 2654435761u;
        bool top = at == 1 || (at == 99 && element == (type == TYPE_F32 ? 3 : 1));
        data[i] = (char)(hash >> 24);
        if (top) { /* the byte of the exponent */
            unsigned low = type == TYPE_F16 ? 0x24 : type == TYPE_Q8_0 ? 0x08 : 0x3c;
            data[i] = (char)(low | (hash >> 8 & 0x80));
        }
    }
    for (size_t i = 65536 / 34 * 34; i < bytes; i += 65536 / 34 * 34) {
        size_t size = 65536 / 34 * 34;
        memcpy(data + i, data, i + size < bytes ? size : bytes - i);
    }
    *tensor = (struct tensor){.name = {"bench", 5},
                              .type = type,
                              .rows = rows,
                              .cols = cols,
                              .bytes = bytes,
                              .data = data};
    bench->tensors[bench->n_tensors++] = tensor;
    double start = seconds();
    const struct weight *weight =
        bench->backend->upload(bench->device, tensor, (struct slice){SLICE_WHOLE, 0, 1}, error);
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
    const struct weight *weight = make_weight(bench, TYPE_F32, 1, D_MODEL);
    for (int i = 0; i < D_MODEL; i++)
        weight->vector[i] = 1.0f;
    bench->weight_bytes = packed;
    return weight;
}

static void make_layer(struct bench *bench, enum tensor_type type, struct layer_weights *layer) {
    layer->attn_norm = make_norm(bench);
    layer->attn_q = make_weight(bench, type, D_MODEL, D_MODEL);
    layer->attn_k = make_weight(bench, type, D_MODEL, D_MODEL);
    layer->attn_v = make_weight(bench, type, D_MODEL, D_MODEL);
    layer->attn_output = make_weight(bench, type, D_MODEL, D_MODEL);
    layer->ffn_norm = make_norm(bench);
    layer->ffn_gate = make_weight(bench, type, D_FF, D_MODEL);
    layer->ffn_up = make_weight(bench, type, D_FF, D_MODEL);
    layer->ffn_down = make_weight(bench, type, D_MODEL, D_FF);
}

static void open_bench(struct bench *bench, enum tensor_type type) {
    char error[GGUF_ERROR_LENGTH];
    *bench = (struct bench){.config = {.n_layers = N_LAYERS,
                                       .d_model = D_MODEL,
                                       .n_heads = N_HEADS,
                                       .n_kv_heads = N_HEADS,
                                       .head_dim = HEAD_DIM,
                                       .d_ff = D_FF,
                                       .vocab_size = VOCAB,
                                       .rope_dim = HEAD_DIM,
                                       .rope_adjacent = true,
                                       .norm_epsilon = 1e-5f}};
    for (int i = 0; i < HEAD_DIM / 2; i++)
        bench->frequency[i] = (float)pow(10000.0, -2.0 * i / HEAD_DIM);
    struct backend_options options = {.n_threads = N_THREADS};
    bench->backend = cpu_backend_open(&options, error);
    struct device wanted = {.config = &bench->config,
                            .rope_frequency = bench->frequency,
                            .n_shards = 1,
                            .max_rows = PROMPT,
                            .max_samples = STREAMS};
    bench->device =
        bench->backend ? bench->backend->device_open(bench->backend, &wanted, error) : NULL;
    size_t n_blocks = (size_t)(STREAMS * blocks_of(CONTEXT + 1) + blocks_of(PROMPT));
    size_t bytes = n_blocks * block_bytes(&bench->config, 1, KV_F32);
    bench->probe_memory =
        bench->device ? bench->backend->alloc(bench->device, PROBE_BYTES, false) : NULL;
    if (!bench->device || !bench->probe_memory ||
        !(bench->device->kv = bench->backend->alloc(bench->device, bytes, false))) {
        fprintf(stderr, "bench: no memory, or %s\n", error);
        exit(1);
    }
    memset(bench->device->kv, 0, bytes);
    memset(bench->probe_memory, 1, PROBE_BYTES);
    bench->weights.layers = calloc(N_LAYERS, sizeof *bench->weights.layers);
    bench->weights.token_embd = bench->weights.output = make_weight(bench, type, VOCAB, D_MODEL);
    bench->weights.output_norm = make_norm(bench);
    for (int i = 0; i < N_LAYERS; i++)
        make_layer(bench, type, &bench->weights.layers[i]);
}

static void close_bench(struct bench *bench) {
    bench->backend->release(bench->device, bench->probe_memory, false);
    bench->backend->release(bench->device, bench->device->kv, false);
    bench->backend->device_close(bench->device);
    bench->backend->close(bench->backend);
    for (int i = 0; i < bench->n_tensors; i++)
        free(bench->tensors[i]);
    free(bench->weights.layers);
}

/* ---- steps ---- */

static void forward(struct bench *bench, const struct batch *batch) {
    struct backend *backend = bench->backend;
    struct device *device = bench->device;
    backend->step_begin(device, batch);
    backend->embed(device, bench->weights.token_embd);
    bench->attention_seconds = 0.0;
    for (int i = 0; i < N_LAYERS; i++) {
        const struct layer_weights *layer = &bench->weights.layers[i];
        backend->norm_qkv(device, layer);
        backend->rope_append(device, layer, i);
        double start = seconds();
        backend->attention(device, i);
        bench->attention_seconds += seconds() - start;
        backend->project_add(device, layer->attn_output, INPUT_ATTENTION);
        backend->norm_gate_up(device, layer);
        backend->project_add(device, layer->ffn_down, INPUT_FFN);
    }
    backend->norm_logits(device, &bench->weights);
    backend->sample(device);
    backend->step_end(device, batch->sampled);
}

/* The best time of a step of n sequences, each of `rows` rows from position `start`; the time of
 * attention in it. */
static double best_step(struct bench *bench, int n, int start, int rows, double *attention) {
    static int token[PROMPT], position[PROMPT], row_sequence[PROMPT], table[STREAMS * 64];
    static int sample_row[STREAMS], sampled[STREAMS];
    static struct sequence sequences[STREAMS];
    static struct sampling sampling[STREAMS];
    struct batch batch = {n * rows,     n,         n,     0,          token,    position,
                          row_sequence, sequences, table, sample_row, sampling, sampled};
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
        sampling[i] = (struct sampling){.top_p = 1.0f}; /* greedy: random weights are no language */
    }
    double best = 1e9;
    for (int i = 0; i < REPEATS * (rows > 1 ? 1 : 3); i++) {
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

static void bench_decode(struct bench *bench, const char *type) {
    struct cpu_device *device = (struct cpu_device *)bench->device;
    static const int streams[] = {1, 8, 32};
    for (int i = 0; i < 3; i++) {
        double attention = 0, median, probe = probe_read(device, bench->probe_memory, &median);
        double time = best_step(bench, streams[i], CONTEXT, 1, &attention);
        double again = probe_read(device, bench->probe_memory, NULL);
        probe = probe > again ? probe : again;
        double rate = bench->weight_bytes / time * 1e-9;
        printf("%-5s decode %2d: %7.1f tok/s  %5.1f GB/s = %3.0f %% of %.1f (median %.1f)  "
               "attention %4.1f %%\n",
               type, streams[i], streams[i] / time, rate, 100 * rate / probe, probe, median,
               100 * attention / time);
    }
}

static void bench_prefill(struct bench *bench, const char *type) {
    struct cpu_device *device = (struct cpu_device *)bench->device;
    double attention = 0, probe = probe_multiply(device);
    double time = best_step(bench, 1, 0, PROMPT, &attention), again = probe_multiply(device);
    probe = probe > again ? probe : again;
    double layer = 4.0 * D_MODEL * D_MODEL + 3.0 * D_MODEL * D_FF;
    double work = 2.0 * (PROMPT * N_LAYERS * layer + (double)VOCAB * D_MODEL);
    double scores = 4.0 * N_LAYERS * N_HEADS * HEAD_DIM * PROMPT * (PROMPT + 1) / 2;
    printf("%-5s prefill %d: %7.1f tok/s  %5.1f GFLOP/s = %3.0f %% of %.1f  attention %4.1f %% of "
           "the time, %5.1f GFLOP/s\n",
           type, PROMPT, PROMPT / time, (work + scores) / time * 1e-9,
           100 * (work + scores) / time * 1e-9 / probe, probe, 100 * attention / time,
           scores / attention * 1e-9);
}

int main(int argc, char **argv) {
    static const struct {
        const char *name;
        enum tensor_type type;
    } types[] = {{"F32", TYPE_F32}, {"BF16", TYPE_BF16}, {"F16", TYPE_F16}, {"Q8_0", TYPE_Q8_0}};
    const char *part = argc > 2 ? argv[2] : "";
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        if (argc > 1 && strcmp(argv[1], types[i].name) != 0)
            continue;
        static struct bench bench;
        open_bench(&bench, types[i].type);
        struct cpu_device *device = (struct cpu_device *)bench.device;
        double jobs = probe_rate(device, empty_tile, NULL, 2, 1.0, NULL);
        printf("%-5s packed at %.2f GB/s; an empty job takes %.2f us\n", types[i].name,
               bench.packed_bytes / bench.pack_seconds * 1e-9, 2e-3 / jobs);
        if (!*part || !strcmp(part, "decode"))
            bench_decode(&bench, types[i].name);
        if (!*part || !strcmp(part, "prefill"))
            bench_prefill(&bench, types[i].name);
        fflush(stdout);
        close_bench(&bench);
    }
    return 0;
}
