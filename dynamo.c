/* dynamo.c: the program. The model's forward pass, one thread per worker, and main.
 *
 * Owns the devices, the clock, the lock and the requests' text. It turns what the scheduler decides
 * into work: a step becomes a forward pass, a copy order becomes copies between the slots'
 * addresses. Refuses to decide: which request, which worker and which block stand in scheduler.c
 * and kvcache.c.
 *
 * Threads: one per worker (worker_main), one that waits for Ctrl-C, and main, which submits
 * requests and shows their text. All that they share is the scheduler, under engine.lock; nothing
 * is computed, copied, printed or waited for while it is held.
 *
 * Read `forward` first: it is the whole model. Then worker_main, copy_block, run_jobs.
 * The forward pass is that of Llama (Touvron et al. 2023) with grouped-query attention (Ainslie et
 * al. 2023); qwen2 adds biases, qwen3 norms of q and k: optional tensors, not branches here. */
#define _GNU_SOURCE
#define GGUF_IMPLEMENTATION
#define MODEL_IMPLEMENTATION
#define TOKENIZER_IMPLEMENTATION
#define JSON_IMPLEMENTATION
#define CLI_IMPLEMENTATION
#define REQUESTS_IMPLEMENTATION
#define ANSWERS_IMPLEMENTATION
#define EVALUATE_IMPLEMENTATION
#include "answers.h"
#include "cli.h"
#include "dynamo.h"
#include "evaluate.h"
#include "gguf.h"
#include "json.h"
#include "requests.h"
#include "tokenizer.h"

#include <assert.h>
#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum {
    EXIT_FILE = 1,
    EXIT_USAGE = 2,
    EXIT_REQUESTS = 3,
    DEFAULT_CPU_DEVICES = 2, /* one prefills, one decodes */
    DEFAULT_BATCH = 32,
    DEFAULT_CHUNK = 256, /* large enough for full tiles, small enough to be preempted soon */
    CACHED_ANSWERS = 2,  /* default device KV: so many full contexts for each running request */
    HOST_FACTOR = 4,     /* default host KV: so many times that */
    COPY_POLL_NS = 50000 /* an idle worker looks after its copies so often */
};

/* A block on its way: one piece for each pair of shards that share heads. */
struct transfer {
    struct kv_copy_order order;
    int n_pieces;
    struct {
        struct device *device;
        enum stream stream;
        uint64_t ticket;
    } pieces[2 * MAX_SHARDS];
};

struct worker { /* a group of devices that hold one copy of the model between them */
    struct engine *engine;
    int index, n_shards;
    bool prefills, decodes;
    struct device *shards[MAX_SHARDS];
    struct weights weights[MAX_SHARDS];
    struct transfer *transfers; /* (n_transfers, capacity of all the slots a copy could fill) */
    int n_transfers;
    pthread_t thread;
};

struct engine {
    struct options *options;
    struct gguf *file;
    struct model model;
    struct tokenizer *tokenizer; /* NULL: the model file has none; then no_tokenizer says why */
    char no_tokenizer[TOK_ERROR_LENGTH];
    struct backend *backend;
    float *rope_frequency; /* (rope_dim / 2) */
    int n_workers, tp, max_batch, chunk, device_blocks, host_blocks;
    enum kv_type kv_type;
    struct worker workers[MAX_WORKERS];
    char *host_kv; /* pinned (host_blocks, block_bytes of all heads) */
    bool *ends_text;
    struct sched *sched;
    pthread_mutex_t lock;
    pthread_cond_t work, news; /* something to do for workers; something to show for main */
    bool stopping;
    enum activity activity;
};

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static void complain(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    (void)fputs("dynamo: ", stderr);
    (void)vfprintf(stderr, format, arguments);
    (void)fputc('\n', stderr);
    va_end(arguments);
}

/* ---- the model ---- */

/* One forward pass over the rows of a batch; sampled[n_samples] are the next tokens, and logits, if
 * wanted, (n_samples, vocab_size). Every op is given to each shard in turn; the shards work side by
 * side where the backend can. */
static void forward(struct worker *worker, const struct batch *batch, int *sampled, float *logits) {
    const struct backend *backend = worker->engine->backend;
    int n_layers = worker->engine->model.config.n_layers, n_shards = worker->n_shards;
    struct device **shards = worker->shards;
    const struct weights *weights = worker->weights;
    bool record = true;
    for (int s = 0; s < n_shards; s++)
        record = backend->step_begin(shards[s], batch) && record;
    for (int s = 0; s < n_shards && record; s++)
        backend->embed(shards[s], weights[s].token_embd);
    for (int layer = 0; layer < n_layers && record; layer++) {
        for (int s = 0; s < n_shards; s++) {
            const struct layer_weights *w = &weights[s].layers[layer];
            backend->norm_qkv(shards[s], w);
            backend->rope_append(shards[s], w, layer);
            backend->attention(shards[s], layer);
            backend->project_add(shards[s], w->attn_output, INPUT_ATTENTION);
        }
        if (n_shards > 1)
            backend->all_reduce_add(shards, n_shards);
        for (int s = 0; s < n_shards; s++) {
            const struct layer_weights *w = &weights[s].layers[layer];
            backend->norm_gate_up(shards[s], w);
            backend->project_add(shards[s], w->ffn_down, INPUT_FFN);
        }
        if (n_shards > 1)
            backend->all_reduce_add(shards, n_shards);
    }
    if (record && batch->n_samples > 0) {
        backend->norm_logits(shards[0], &weights[0]);
        backend->sample(shards[0]);
    }
    if (logits)
        backend->read_logits(shards[0], logits);
    for (int s = 0; s < n_shards; s++)
        backend->step_end(shards[s], s == 0 ? sampled : NULL);
}

/* ---- copies ---- */

/* Where the heads of one shard's part of a block lie; the host is one shard with all heads. */
struct block_part {
    char *address;
    int first_head, n_heads;
};

static struct block_part block_part(const struct engine *engine, int place, int slot, int shard) {
    const struct model_config *config = &engine->model.config;
    bool host = place == engine->n_workers;
    int n_shards = host ? 1 : engine->workers[place].n_shards;
    char *base = host ? engine->host_kv : engine->workers[place].shards[shard]->kv;
    int n_heads = config->n_kv_heads / n_shards;
    size_t bytes = block_bytes(config, n_shards, engine->kv_type);
    return (struct block_part){base + (size_t)slot * bytes, shard * n_heads, n_heads};
}

static int shards_of(const struct engine *engine, int place) {
    return place == engine->n_workers ? 1 : engine->workers[place].n_shards;
}

/* Starts the copies that an order asks for: every pair of shards copies the heads both hold. */
static void copy_block(struct worker *worker, const struct kv_copy_order *order) {
    const struct engine *engine = worker->engine;
    const struct model_config *config = &engine->model.config;
    size_t head_bytes =
        (size_t)BLOCK_TOKENS * (size_t)config->head_dim * kv_element_bytes(engine->kv_type);
    bool out = order->to == engine->n_workers;
    enum stream stream = out                                ? STREAM_PAGE_OUT
                         : order->from == engine->n_workers ? STREAM_PAGE_IN
                                                            : STREAM_TRANSFER;
    struct transfer *transfer = &worker->transfers[worker->n_transfers++];
    *transfer = (struct transfer){.order = *order};
    for (int t = 0; t < shards_of(engine, order->to); t++) {
        struct block_part to = block_part(engine, order->to, order->to_slot, t);
        for (int f = 0; f < shards_of(engine, order->from); f++) {
            struct block_part from = block_part(engine, order->from, order->from_slot, f);
            int first = to.first_head > from.first_head ? to.first_head : from.first_head;
            int to_end = to.first_head + to.n_heads, from_end = from.first_head + from.n_heads;
            int end = to_end < from_end ? to_end : from_end;
            if (first >= end)
                continue;
            struct copy2d copy = {.to = to.address + (size_t)(first - to.first_head) * head_bytes,
                                  .from =
                                      from.address + (size_t)(first - from.first_head) * head_bytes,
                                  .to_pitch = (size_t)to.n_heads * head_bytes,
                                  .from_pitch = (size_t)from.n_heads * head_bytes,
                                  .width = (size_t)(end - first) * head_bytes,
                                  .height = (size_t)config->n_layers * 2};
            struct device *device = worker->shards[out ? f : t];
            int piece = transfer->n_pieces++;
            transfer->pieces[piece].device = device;
            transfer->pieces[piece].stream = stream;
            transfer->pieces[piece].ticket = engine->backend->copy(device, stream, &copy);
        }
    }
}

/* Reports the transfers that have ended. Under the lock: it only polls. */
static bool collect_copies(struct worker *worker) {
    struct engine *engine = worker->engine;
    bool any = false;
    for (int i = 0; i < worker->n_transfers;) {
        struct transfer *transfer = &worker->transfers[i];
        bool done = true;
        for (int p = 0; p < transfer->n_pieces; p++) {
            done = done && engine->backend->copy_done(transfer->pieces[p].device,
                                                      transfer->pieces[p].stream,
                                                      transfer->pieces[p].ticket);
        }
        if (!done) {
            i++;
            continue;
        }
        sched_copied(engine->sched, &transfer->order, true, now());
        *transfer = worker->transfers[--worker->n_transfers];
        any = true;
    }
    return any;
}

/* ---- workers ---- */

static void show_step(const struct worker *worker, const struct step *step) {
    (void)fprintf(stderr, "worker %d (%s%s%s): %d rows of %d requests, %d copies started\n",
                  worker->index, worker->prefills ? "prefill" : "",
                  worker->prefills && worker->decodes ? "+" : "", worker->decodes ? "decode" : "",
                  step->batch.n_rows, step->batch.n_sequences, step->n_copies);
}

static void do_step(struct worker *worker, struct step *step) {
    for (int i = 0; i < step->n_copies; i++)
        copy_block(worker, &step->copies[i]);
    if (step->batch.n_rows > 0)
        forward(worker, &step->batch, step->batch.sampled, NULL);
    if (worker->engine->options->verbose)
        show_step(worker, step);
}

/* Other workers have copy orders that came up in this worker's turn. */
static bool others_have_orders(const struct worker *worker) {
    const struct engine *engine = worker->engine;
    for (int i = 0; i < engine->n_workers; i++)
        if (i != worker->index && kv_pending(sched_kv(engine->sched), i) > 0)
            return true;
    return false;
}

static void wait_for_work(struct worker *worker) {
    struct engine *engine = worker->engine;
    if (worker->n_transfers == 0) {
        pthread_cond_wait(&engine->work, &engine->lock);
        return;
    }
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += COPY_POLL_NS;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    (void)pthread_cond_timedwait(&engine->work, &engine->lock, &until);
}

static void *worker_main(void *argument) {
    struct worker *worker = argument;
    struct engine *engine = worker->engine;
    pthread_mutex_lock(&engine->lock);
    while (!engine->stopping) {
        bool changed = collect_copies(worker);
        struct step *step = sched_next(engine->sched, worker->index, now());
        if (changed || others_have_orders(worker)) {
            pthread_cond_broadcast(&engine->work);
            pthread_cond_broadcast(&engine->news); /* a failed request, perhaps */
        }
        if (!step) {
            wait_for_work(worker);
            continue;
        }
        pthread_mutex_unlock(&engine->lock);
        do_step(worker, step);
        pthread_mutex_lock(&engine->lock);
        sched_done(engine->sched, worker->index, step, now());
        pthread_cond_broadcast(&engine->work);
        pthread_cond_broadcast(&engine->news);
    }
    while (worker->n_transfers > 0) /* their memory must not go before they are done */
        (void)collect_copies(worker);
    pthread_mutex_unlock(&engine->lock);
    return NULL;
}

/* ---- loading ---- */

struct loader { /* uploads one shard's tensors until one fails */
    struct engine *engine;
    struct device *device;
    char *error;
    bool ok;
};

static const struct weight *load(struct loader *loader, const struct tensor *tensor,
                                 enum slice_kind kind) {
    if (!tensor || !loader->ok)
        return NULL;
    struct slice slice = {kind, loader->device->rank, loader->device->n_shards};
    const struct weight *weight =
        loader->engine->backend->upload(loader->device, tensor, slice, loader->error);
    loader->ok = weight != NULL;
    return weight;
}

/* A shard's heads are rows of q, k, v and columns of attn_output; its part of d_ff, likewise. */
static bool load_weights(struct loader *loader, const struct model *model, struct weights *out) {
    int n_layers = model->config.n_layers;
    out->token_embd = load(loader, model->token_embd, SLICE_WHOLE);
    out->output_norm = load(loader, model->output_norm, SLICE_WHOLE);
    out->output = load(loader, model->output, SLICE_WHOLE);
    out->layers = calloc((size_t)n_layers, sizeof *out->layers);
    for (int i = 0; i < n_layers && loader->ok && out->layers; i++) {
        const struct model_layer *from = &model->layers[i];
        out->layers[i] =
            (struct layer_weights){.attn_norm = load(loader, from->attn_norm, SLICE_WHOLE),
                                   .attn_q = load(loader, from->attn_q, SLICE_ROWS),
                                   .attn_k = load(loader, from->attn_k, SLICE_ROWS),
                                   .attn_v = load(loader, from->attn_v, SLICE_ROWS),
                                   .q_bias = load(loader, from->q_bias, SLICE_ROWS),
                                   .k_bias = load(loader, from->k_bias, SLICE_ROWS),
                                   .v_bias = load(loader, from->v_bias, SLICE_ROWS),
                                   .attn_q_norm = load(loader, from->attn_q_norm, SLICE_WHOLE),
                                   .attn_k_norm = load(loader, from->attn_k_norm, SLICE_WHOLE),
                                   .attn_output = load(loader, from->attn_output, SLICE_COLS),
                                   .ffn_norm = load(loader, from->ffn_norm, SLICE_WHOLE),
                                   .ffn_gate = load(loader, from->ffn_gate, SLICE_ROWS),
                                   .ffn_up = load(loader, from->ffn_up, SLICE_ROWS),
                                   .ffn_down = load(loader, from->ffn_down, SLICE_COLS)};
        cli_progress("loading", i + 1, n_layers);
    }
    return loader->ok && out->layers;
}

static float *rope_frequencies(const struct model *model) {
    int n = model->config.rope_dim / 2;
    float *frequency = malloc((size_t)n * sizeof *frequency);
    for (int i = 0; i < n && frequency; i++) {
        double exponent = -2.0 * i / model->config.rope_dim;
        float divisor = 1;
        if (model->rope_freqs)
            memcpy(&divisor, (const char *)model->rope_freqs->data + 4 * (size_t)i, 4);
        frequency[i] = (float)(pow(model->config.rope_theta, exponent) / divisor);
    }
    return frequency;
}

/* Opens one worker's devices, and puts its shards of the model on them. */
static bool open_worker(struct engine *engine, struct worker *worker, const int *devices,
                        char *error) {
    worker->engine = engine;
    worker->n_shards = engine->tp;
    for (int s = 0; s < worker->n_shards; s++) {
        struct device wanted = {.backend = engine->backend,
                                .config = &engine->model.config,
                                .rope_frequency = engine->rope_frequency,
                                .index = devices[s],
                                .rank = s,
                                .n_shards = worker->n_shards,
                                .urgent = worker->decodes,
                                .max_rows = engine->max_batch + engine->chunk,
                                .max_samples = engine->max_batch + engine->chunk,
                                .kv_type = engine->kv_type};
        worker->shards[s] = engine->backend->device_open(engine->backend, &wanted, error);
        struct loader loader = {engine, worker->shards[s], error, worker->shards[s] != NULL};
        if (!loader.ok || !load_weights(&loader, &engine->model, &worker->weights[s]))
            return false;
    }
    return true;
}

/* ---- which devices do what ---- */

/* Sets the workers' roles and opens them. Without options: two CPU devices, one of each role. */
static bool open_workers(struct engine *engine, char *error) {
    const struct options *o = engine->options;
    struct device_list all = o->devices, empty = {0};
    if (all.n == 0 && o->prefill.n == 0) {
        all = (struct device_list){.cpu = true, .n = DEFAULT_CPU_DEVICES * engine->tp};
        for (int i = 0; i < all.n; i++)
            all.index[i] = i;
    }
    if (!all.cpu) {
        (void)snprintf(error, GGUF_ERROR_LENGTH,
                       "--devices: this build has no CUDA backend; give cpu:N");
        return false;
    }
    struct device_list prefill = o->prefill, decode = o->prefill.n > 0 ? o->decode : empty;
    if (prefill.n == 0) { /* the first half prefills */
        int n_prefill = all.n / engine->tp / 2 * engine->tp;
        for (int i = 0; i < all.n; i++) {
            struct device_list *list = i < n_prefill && !o->colocate ? &prefill : &decode;
            list->index[list->n++] = i;
        }
    }
    engine->n_workers = (prefill.n + decode.n) / engine->tp;
    if (engine->n_workers > MAX_WORKERS || (prefill.n + decode.n) % engine->tp != 0) {
        (void)snprintf(error, GGUF_ERROR_LENGTH,
                       "--devices: %d devices with --tp %d: they make no whole workers, or more "
                       "than %d",
                       prefill.n + decode.n, engine->tp, MAX_WORKERS);
        return false;
    }
    for (int i = 0; i < engine->n_workers; i++) {
        struct worker *worker = &engine->workers[i];
        int first = i * engine->tp;
        worker->index = i;
        worker->decodes = first >= prefill.n;
        worker->prefills = first < prefill.n || prefill.n == 0;
        const int *devices =
            first < prefill.n ? &prefill.index[first] : &decode.index[first - prefill.n];
        if (!open_worker(engine, worker, devices, error))
            return false;
    }
    return true;
}

/* Blocks that a size option stands for; `otherwise` if it was not given. */
static int blocks_from(struct size size, size_t bytes_per_block, int64_t otherwise) {
    int64_t n = !size.given   ? otherwise
                : size.blocks ? size.value
                              : size.value / (int64_t)bytes_per_block;
    return n > INT32_MAX / 64 ? INT32_MAX / 64 : (int)n;
}

/* Sizes both tiers and allocates them. What the machine has free is never exceeded by default. */
static bool open_kv(struct engine *engine, char *error) {
    const struct backend *backend = engine->backend;
    const struct model_config *config = &engine->model.config;
    struct device *device = engine->workers[0].shards[0];
    size_t shard_bytes = block_bytes(config, engine->tp, engine->kv_type);
    size_t all_bytes = block_bytes(config, 1, engine->kv_type);
    int64_t wanted =
        (int64_t)CACHED_ANSWERS * engine->max_batch * blocks_of(config->context_length);
    int64_t most = (int64_t)(backend->free_memory(device, true) / 4 / all_bytes);
    int64_t host_wanted = wanted * HOST_FACTOR < most ? wanted * HOST_FACTOR : most;
    engine->host_blocks = blocks_from(engine->options->kv_host, all_bytes, host_wanted);
    size_t taken = all_bytes * (size_t)engine->host_blocks; /* a CPU's host and devices are one */
    size_t left = backend->free_memory(device, false) / 10 * 9;
    left = left > taken ? left - taken : 0;
    most = (int64_t)(left / shard_bytes) / (engine->n_workers * engine->tp);
    engine->device_blocks =
        blocks_from(engine->options->kv_device, shard_bytes, wanted < most ? wanted : most);
    if (engine->device_blocks < 1) {
        (void)snprintf(error, GGUF_ERROR_LENGTH,
                       "room for no KV block of %zu bytes; raise --kv-device or lower --kv-host",
                       shard_bytes);
        return false;
    }
    bool ok = true;
    for (int i = 0; i < engine->n_workers; i++) {
        struct worker *worker = &engine->workers[i];
        for (int s = 0; s < engine->tp; s++) {
            size_t bytes = shard_bytes * (size_t)engine->device_blocks;
            worker->shards[s]->kv = backend->alloc(worker->shards[s], bytes, false);
            ok = ok && worker->shards[s]->kv;
        }
        size_t n = (size_t)engine->device_blocks + (size_t)engine->host_blocks;
        worker->transfers = calloc(n, sizeof *worker->transfers);
        ok = ok && worker->transfers;
    }
    if (engine->host_blocks > 0) {
        engine->host_kv = backend->alloc(device, all_bytes * (size_t)engine->host_blocks, true);
        ok = ok && engine->host_kv;
    }
    if (!ok) {
        (void)snprintf(error, GGUF_ERROR_LENGTH,
                       "no memory for %d KV blocks on each of %d devices and %d on the host; "
                       "lower --kv-device or --kv-host",
                       engine->device_blocks, engine->n_workers * engine->tp, engine->host_blocks);
    }
    return ok;
}

static bool open_sched(struct engine *engine) {
    struct sched_config config = {.kv = {.n_workers = engine->n_workers,
                                         .host_blocks = engine->host_blocks,
                                         .policy = engine->options->kv_policy == CLI_WRITE_THROUGH
                                                       ? KV_WRITE_THROUGH
                                                       : KV_ON_EVICT},
                                  .max_batch = engine->max_batch,
                                  .chunk = engine->chunk,
                                  .context_length = engine->model.config.context_length,
                                  .vocab_size = engine->model.config.vocab_size};
    for (int i = 0; i < engine->n_workers; i++) {
        config.kv.device_blocks[i] = engine->device_blocks;
        config.prefills[i] = engine->workers[i].prefills;
        config.decodes[i] = engine->workers[i].decodes;
    }
    engine->ends_text = calloc((size_t)config.vocab_size, sizeof *engine->ends_text);
    for (int i = 0; i < config.vocab_size && engine->ends_text && engine->tokenizer; i++)
        engine->ends_text[i] = tok_ends_text(engine->tokenizer, i);
    config.ends_text = engine->ends_text;
    engine->sched = engine->ends_text ? sched_create(&config) : NULL;
    return engine->sched != NULL;
}

/* The tokenizer of the model file, or the tokenizer.bin of a llama2.c checkpoint, given or beside
 * it. A model without one still runs on --ids. */
static void open_tokenizer(struct engine *engine) {
    const struct options *o = engine->options;
    char beside[4096];
    const char *slash = strrchr(o->model, '/');
    int folder = slash ? (int)(slash - o->model) + 1 : 0;
    (void)snprintf(beside, sizeof beside, "%.*stokenizer.bin", folder, o->model);
    if (o->tokenizer || engine->model.placed) {
        engine->tokenizer =
            tok_open_checkpoint(o->tokenizer ? o->tokenizer : beside,
                                engine->model.config.vocab_size, engine->no_tokenizer);
        return;
    }
    char error[TOK_ERROR_LENGTH];
    engine->tokenizer = tok_open(engine->file, error);
    if (!engine->tokenizer) {
        (void)snprintf(engine->no_tokenizer, sizeof engine->no_tokenizer, "%.200s: %.300s",
                       o->model, error);
    }
}

static void close_engine(struct engine *engine) {
    sched_destroy(engine->sched);
    for (int i = 0; i < engine->n_workers; i++) {
        struct worker *worker = &engine->workers[i];
        if (i == 0 && engine->host_kv)
            engine->backend->release(worker->shards[0], engine->host_kv, true);
        for (int s = 0; s < worker->n_shards; s++) {
            free(worker->weights[s].layers);
            if (worker->shards[s]) {
                engine->backend->release(worker->shards[s], worker->shards[s]->kv, false);
                engine->backend->device_close(worker->shards[s]);
            }
        }
        free(worker->transfers);
    }
    if (engine->backend)
        engine->backend->close(engine->backend);
    tok_close(engine->tokenizer);
    model_close(&engine->model);
    gguf_close(engine->file);
    free(engine->rope_frequency);
    free(engine->ends_text);
}

/* Opens the file, the devices and both tiers. False: a line was printed. */
static bool open_engine(struct engine *engine, struct options *options) {
    char error[GGUF_ERROR_LENGTH] = "out of memory";
    struct backend_options backend = {
        .n_threads = options->threads > 0 ? options->threads : (int)sysconf(_SC_NPROCESSORS_ONLN),
        .copy_delay_seed = options->copy_delay};
    engine->options = options;
    engine->tp = options->tp;
    engine->max_batch = options->max_batch > 0 ? options->max_batch : DEFAULT_BATCH;
    engine->chunk = options->chunk > 0 ? options->chunk : DEFAULT_CHUNK;
    engine->kv_type = options->kv_type == CLI_KV_BF16 ? KV_BF16 : KV_F32;
    engine->file = gguf_open(options->model, error);
    bool ok = engine->file && model_open(&engine->model, engine->file, error);
    if (ok) {
        open_tokenizer(engine);
        ok = engine->tokenizer || !options->tokenizer; /* what was asked for must be there */
        if (!ok)
            (void)snprintf(error, sizeof error, "%.500s", engine->no_tokenizer);
        engine->rope_frequency = rope_frequencies(&engine->model);
        engine->backend = cpu_backend_open(&backend, error);
    }
    ok = ok && engine->rope_frequency && engine->backend && open_workers(engine, error) &&
         open_kv(engine, error) && open_sched(engine);
    if (!ok)
        complain("%s", error);
    return ok;
}

/* ---- every row's logits, without the scheduler ---- */

/* Runs tokens[start, start + n) of a text through worker 0, whose blocks 0, 1, … hold the text. */
static void run_rows(void *argument, const int *tokens, int start, int n, float *logits) {
    struct engine *engine = argument;
    int n_blocks = blocks_of(start + n);
    int *numbers = calloc(5 * (size_t)n + (size_t)n_blocks, sizeof *numbers);
    struct sampling *greedy = calloc((size_t)n, sizeof *greedy);
    assert(numbers && greedy);
    struct sequence sequence = {.n_rows = n, .start = start, .n_blocks = n_blocks};
    struct batch batch = {.n_rows = n,
                          .n_sequences = 1,
                          .n_samples = n,
                          .n_blocks = n_blocks,
                          .token = numbers,
                          .position = numbers + n,
                          .row_sequence = numbers + 2 * n, /* all 0 */
                          .sequence = &sequence,
                          .sample_row = numbers + 3 * n,
                          .sampling = greedy,
                          .sampled = numbers + 4 * n,
                          .block_table = numbers + 5 * n};
    for (int i = 0; i < n; i++) {
        batch.token[i] = tokens[start + i];
        batch.position[i] = start + i;
        batch.sample_row[i] = i;
    }
    for (int i = 0; i < n_blocks; i++)
        batch.block_table[i] = i;
    forward(&engine->workers[0], &batch, batch.sampled, logits);
    free(greedy);
    free(numbers);
}

/* ---- main ---- */

/* Ctrl-C stops the answers; where there are none, or a second time, the program. */
static void *interrupt_main(void *argument) {
    struct engine *engine = argument;
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGINT);
    for (;;) {
        int number;
        (void)sigwait(&signals, &number);
        pthread_mutex_lock(&engine->lock);
        if (engine->activity != ANSWERING)
            _exit(128 + SIGINT);
        engine->activity = INTERRUPTED;
        pthread_cond_broadcast(&engine->news);
        pthread_mutex_unlock(&engine->lock);
    }
    return NULL;
}

/* Prompt after prompt from the terminal; or all of a piped stdin as one prompt. */
static int run_stdin(struct answers *answers, struct options *options) {
    bool terminal = isatty(STDIN_FILENO);
    char error[CLI_ERROR_LENGTH];
    for (;;) {
        struct request_spec spec = options->request;
        spec.prompt = terminal ? cli_ask(&spec.prompt_length)
                               : cli_read_file("-", &spec.prompt_length, error);
        if (!spec.prompt) {
            if (!terminal)
                complain("%s", error);
            return terminal ? 0 : EXIT_FILE;
        }
        int n_failed = spec.prompt_length > 0 || !terminal ? answers_run(answers, &spec, 1) : 0;
        free(spec.prompt);
        if (!terminal)
            return n_failed > 0 ? EXIT_REQUESTS : 0;
    }
}

static int run_requests(struct engine *engine, struct answers *answers) {
    struct options *o = engine->options;
    char error[CLI_ERROR_LENGTH];
    int status = 0;
    if (o->file) {
        struct requests requests;
        if (!requests_read(&requests, o, error)) {
            complain("%s", error);
            return EXIT_FILE;
        }
        status = answers_run(answers, requests.specs, requests.n) > 0 ? EXIT_REQUESTS : 0;
        requests_free(&requests);
    } else if (o->request.prompt || o->request.ids) {
        status = answers_run(answers, &o->request, 1) > 0 ? EXIT_REQUESTS : 0;
    } else {
        status = run_stdin(answers, o);
    }
    if (o->stats)
        answers_stats(answers);
    else if (!o->json)
        answers_summary(answers);
    return status;
}

static int serve(struct engine *engine, struct answers *answers) {
    int n_started = 0, status = EXIT_FILE;
    bool ok = true;
    for (; ok && n_started < engine->n_workers; n_started += ok) {
        struct worker *worker = &engine->workers[n_started];
        ok = pthread_create(&worker->thread, NULL, worker_main, worker) == 0;
    }
    if (ok)
        status = run_requests(engine, answers);
    else
        complain("cannot start threads");
    pthread_mutex_lock(&engine->lock);
    engine->stopping = true;
    pthread_cond_broadcast(&engine->work);
    pthread_mutex_unlock(&engine->lock);
    for (int i = 0; i < n_started; i++)
        pthread_join(engine->workers[i].thread, NULL);
    return status;
}

/* Signals are for interrupt_main alone; a closed stdout is an error of fflush, not a death. Before
 * any other thread is started, so that none of them takes one. */
static bool watch_signals(struct engine *engine) {
    sigset_t signals;
    pthread_t interrupts;
    sigemptyset(&signals);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGPIPE);
    pthread_sigmask(SIG_BLOCK, &signals, NULL);
    return pthread_mutex_init(&engine->lock, NULL) == 0 &&
           pthread_cond_init(&engine->work, NULL) == 0 &&
           pthread_cond_init(&engine->news, NULL) == 0 &&
           pthread_create(&interrupts, NULL, interrupt_main, engine) == 0 &&
           pthread_detach(interrupts) == 0;
}

static int run_model(struct options *options) {
    struct engine *engine = calloc(1, sizeof *engine);
    if (!engine || !watch_signals(engine)) {
        complain("out of memory, or of threads");
        return EXIT_FILE;
    }
    if (!cli_given(options->given, "--seed"))
        options->request.sampling.seed = (uint64_t)time(NULL) * 1000003u + (uint64_t)getpid();
    int status = EXIT_FILE;
    if (open_engine(engine, options)) {
        struct answers answers = {.options = options,
                                  .tokenizer = engine->tokenizer,
                                  .no_tokenizer = engine->no_tokenizer,
                                  .vocab_size = engine->model.config.vocab_size,
                                  .n_workers = engine->n_workers,
                                  .device_blocks = engine->device_blocks,
                                  .host_blocks = engine->host_blocks,
                                  .backend = engine->backend,
                                  .sched = engine->sched,
                                  .lock = &engine->lock,
                                  .work = &engine->work,
                                  .news = &engine->news,
                                  .activity = &engine->activity,
                                  .now = now};
        struct evaluation evaluation = {&answers, run_rows, engine, engine->chunk,
                                        sched_max_length(engine->sched)};
        if (options->logits)
            status = evaluate_logits(&evaluation, options->logits);
        else if (options->perplexity)
            status = evaluate_perplexity(&evaluation, options->perplexity);
        else
            status = serve(engine, &answers);
    }
    close_engine(engine);
    return status;
}

int main(int argc, char **argv) {
    struct options options;
    char error[CLI_ERROR_LENGTH];
    int status = 0;
    if (!cli_parse(&options, argc, argv, error)) {
        complain("%s", error);
        status = EXIT_USAGE;
    } else if (options.help)
        cli_help(stdout);
    else if (options.version)
        printf("dynamo %s\n", CLI_VERSION);
    else if (options.tokenize)
        status = evaluate_tokenize(&options, options.tokenize);
    else
        status = run_model(&options);
    cli_free(&options);
    if (fflush(stdout) != 0 || ferror(stdout)) {
        complain("stdout: %s", strerror(errno));
        status = EXIT_FILE;
    }
    return status;
}
