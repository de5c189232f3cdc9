/* engine.h: an open engine: a model on its devices, and both tiers of KV blocks.
 *
 *     struct engine engine = {0};
 *     if (engine_open(&engine, &options, error)) … // file, devices, weights, tiers, scheduler
 *     engine_close(&engine);                       // also after a failed open
 *
 * Turns options into workers: which devices form one, which prefill and which decode, how many
 * blocks each and the host hold. What runs on it stands in dynamo.c. Every file that is read, and
 * every amount of memory that is taken, is asked for here. Read next: `forward` in dynamo.c. */
#ifndef ENGINE_H
#define ENGINE_H

#include "app/terminal.h"
#include "dynamo.h"
#include "lib/model.h"
#include <pthread.h>

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
    const struct weight *(*layers[MAX_SHARDS])[N_ROLES]; /* of each shard (n_layers): see backend */
    struct transfer *transfers; /* (n_transfers, capacity of all the slots a copy could fill) */
    int n_transfers;
    pthread_t thread;
};

struct engine {
    struct options *options;
    struct model model;
    struct tokenizer *tokenizer; /* NULL: the model file has none; then no_tokenizer says why */
    char no_tokenizer[ERROR_LENGTH];
    struct backend *backend;
    float *rope_frequency; /* (rope_dim / 2) */
    int n_workers, tp, max_batch, chunk, device_blocks, host_blocks;
    enum kv_type kv_type;
    struct worker workers[MAX_WORKERS];
    char *host_kv; /* pinned (host_blocks, block_bytes of all heads) */
    bool *ends_text;
    struct sched *sched;
    struct pace pace; /* under the lock */
    pthread_mutex_t lock;
    pthread_cond_t work, news; /* something to do for workers; something to show for main */
    bool stopping;
    enum activity activity;
};

/* False: `error` is one line. The engine's threads are not started yet. */
bool engine_open(struct engine *engine, struct options *options, char error[ERROR_LENGTH]);
void engine_close(struct engine *engine);

#endif /* ENGINE_H */

#ifdef ENGINE_IMPLEMENTATION
#undef ENGINE_IMPLEMENTATION

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    DEFAULT_DEVICES = 2, /* one prefills, one decodes */
    DEFAULT_BATCH = 32,
    LOST_SHOWN = 32,    /* requests that a fault names */
    CACHED_ANSWERS = 2, /* default device KV: so many full contexts for each running request */
    HOST_FACTOR = 4     /* default host KV: so many times that */
};

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
    gguf_release(tensor); /* the backend has a copy */
    return weight;
}

/* All that the forward pass needs, as the table of tensors says. rope_freqs is not uploaded: what is
 * made of it stands in the engine. */
static bool load_weights(struct loader *loader, const struct model *model,
                         const struct weight *(*to)[N_ROLES]) {
    for (int layer = 0; layer < model->config.n_layers && loader->ok; layer++) {
        cli_progress("loading", layer, model->config.n_layers);
        for (int i = 0; i < N_MODEL_TENSORS; i++) {
            int role = model_tensors[i].role;
            if (role >= 0 && role != ROPE_FREQS)
                to[layer][role] = load(loader, model->layers[layer][role], model_tensors[i].slice);
        }
    }
    cli_progress("loading", model->config.n_layers, model->config.n_layers);
    return loader->ok;
}

static float *rope_frequencies(const struct model *model) {
    int n = model->config.rope_dim / 2;
    const struct tensor *divisors = model->layers[0][ROPE_FREQS];
    float *frequency = malloc((size_t)n * sizeof *frequency);
    for (int i = 0; i < n && frequency; i++) {
        double exponent = -2.0 * i / model->config.rope_dim;
        float divisor = 1;
        if (divisors)
            memcpy(&divisor, (const char *)divisors->data + 4 * (size_t)i, 4);
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
        worker->layers[s] =
            calloc((size_t)engine->model.config.n_layers, sizeof *worker->layers[s]);
        if (!loader.ok || !worker->layers[s] ||
            !load_weights(&loader, &engine->model, worker->layers[s]))
            return false;
    }
    return true;
}

/* ---- which devices do what ---- */

/* The devices that --prefill and --decode count: those of --devices; else all GPUs, of which a lone
 * one stands for two devices, or as many CPU devices. */
static struct device_list list_devices(const struct engine *engine) {
    const struct options *o = engine->options;
    int n_gpus = engine->backend->n_gpus, named = o->prefill.n + o->decode.n;
    struct device_list all = o->devices;
    if (all.n > 0)
        return all;
    all.n = named > 0 ? named : n_gpus > 1 ? n_gpus : DEFAULT_DEVICES * engine->tp;
    for (int i = 0; i < all.n; i++)
        all.index[i] = n_gpus > 0 ? i % n_gpus : i;
    return all;
}

/* Sets the workers' roles and opens them. */
static bool open_workers(struct engine *engine, char *error) {
    const struct options *o = engine->options;
    struct device_list all = list_devices(engine), empty = {0};
    struct device_list prefill = o->prefill, decode = o->prefill.n > 0 ? o->decode : empty;
    if (prefill.n == 0) { /* the first half prefills */
        int n_prefill = all.n / engine->tp / 2 * engine->tp;
        for (int i = 0; i < all.n; i++) {
            struct device_list *list = i < n_prefill && !o->colocate ? &prefill : &decode;
            list->index[list->n++] = i;
        }
    }
    int n_workers = (prefill.n + decode.n) / engine->tp;
    if (n_workers > MAX_WORKERS || (prefill.n + decode.n) % engine->tp != 0) {
        return fail(error,
                    "--devices: %d devices with --tp %d: they make no whole workers, or more "
                    "than %d",
                    prefill.n + decode.n, engine->tp, MAX_WORKERS);
    }
    engine->n_workers = n_workers;
    for (int i = 0; i < n_workers; i++) {
        struct worker *worker = &engine->workers[i];
        int first = i * engine->tp;
        worker->index = i;
        worker->decodes = first >= prefill.n;
        worker->prefills = first < prefill.n || prefill.n == 0;
        const int *places =
            first < prefill.n ? &prefill.index[first] : &decode.index[first - prefill.n];
        int devices[MAX_SHARDS];
        for (int s = 0; s < engine->tp; s++)
            devices[s] = all.index[places[s]];
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

/* How many devices share the memory of one: those on its GPU, or, of the CPU, all. */
static int count_sharing(const struct engine *engine, const struct device *device) {
    int n = 0;
    for (int i = 0; i < engine->n_workers * engine->tp; i++)
        n += engine->backend->n_gpus == 0 ||
             engine->workers[i / engine->tp].shards[i % engine->tp]->index == device->index;
    return n;
}

/* Blocks that each device can hold at most, if nine tenths of what is free there are taken. */
static int64_t most_blocks(const struct engine *engine, size_t taken_on_host) {
    const struct backend *backend = engine->backend;
    size_t bytes = block_bytes(&engine->model.config, engine->tp, engine->kv_type);
    int64_t most = INT32_MAX;
    for (int i = 0; i < engine->n_workers * engine->tp; i++) {
        struct device *device = engine->workers[i / engine->tp].shards[i % engine->tp];
        size_t left = backend->free_memory(device, false) / 10 * 9;
        size_t taken = backend->n_gpus > 0 ? 0 : taken_on_host;
        left = left > taken ? left - taken : 0;
        int64_t blocks = (int64_t)(left / bytes) / count_sharing(engine, device);
        most = blocks < most ? blocks : most;
    }
    return most;
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
    most = most_blocks(engine, all_bytes * (size_t)engine->host_blocks);
    engine->device_blocks =
        blocks_from(engine->options->kv_device, shard_bytes, wanted < most ? wanted : most);
    if (engine->device_blocks < 1) {
        return fail(error,
                    "room for no KV block of %zu bytes; raise --kv-device or lower --kv-host",
                    shard_bytes);
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
        (void)fail(error,
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
    if (o->tokenizer || engine->model.is_checkpoint) {
        engine->tokenizer =
            tok_open_checkpoint(o->tokenizer ? o->tokenizer : beside,
                                engine->model.config.vocab_size, engine->no_tokenizer);
        return;
    }
    char error[ERROR_LENGTH];
    engine->tokenizer = engine->model.file ? tok_open(engine->model.file, error) : NULL;
    if (!engine->tokenizer) {
        (void)snprintf(engine->no_tokenizer, sizeof engine->no_tokenizer, "%.200s: %.300s",
                       o->model,
                       engine->model.file ? error : "random weights have none; give --ids");
    }
}

void engine_close(struct engine *engine) {
    sched_destroy(engine->sched);
    for (int i = 0; i < engine->n_workers; i++) {
        struct worker *worker = &engine->workers[i];
        if (i == 0 && engine->host_kv)
            engine->backend->release(worker->shards[0], engine->host_kv, true);
        for (int s = 0; s < worker->n_shards; s++) {
            free(worker->layers[s]);
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
    free(engine->rope_frequency);
    free(engine->ends_text);
}

/* Before a device's fault ends the program. Its thread may hold the lock, or another's may. */
static void tell_lost(void *context) {
    struct engine *engine = context;
    int64_t ids[LOST_SHOWN];
    (void)pthread_mutex_trylock(&engine->lock);
    int n = engine->sched ? sched_unfinished(engine->sched, ids, LOST_SHOWN) : 0;
    if (n > 0)
        (void)fprintf(stderr, "dynamo: %d request%s lost:", n, n == 1 ? " is" : "s are");
    for (int i = 0; i < n && i < LOST_SHOWN; i++)
        (void)fprintf(stderr, " %" PRId64, ids[i]);
    if (n > 0)
        (void)fputs(n > LOST_SHOWN ? " …\n" : "\n", stderr);
}

/* CUDA where there is a GPU, unless the CPU is asked for. */
static bool open_backend(struct engine *engine, char *error) {
    const struct options *o = engine->options;
    struct backend_options options = {
        .n_threads = o->threads > 0 ? o->threads : (int)sysconf(_SC_NPROCESSORS_ONLN),
        .copy_delay_seed = o->copy_delay,
        .lost = tell_lost,
        .context = engine};
    bool cuda = o->devices.n > 0 && !o->devices.cpu;
    if (cuda && !cuda_backend_open)
        return fail(error, "--devices: this build has no CUDA backend; give cpu:N");
    if (cuda_backend_open && !o->devices.cpu) {
        engine->backend = cuda_backend_open(&options, error);
        if (!engine->backend && !cuda)
            (void)fprintf(stderr, "dynamo: %s; using the CPU\n", error);
    }
    if (!engine->backend && !cuda)
        engine->backend = cpu_backend_open(&options, error);
    if (!engine->backend)
        return false;
    engine->chunk = o->chunk > 0 ? o->chunk : engine->backend->chunk;
    engine->kv_type = o->kv_type == CLI_KV_DEFAULT ? engine->backend->kv_type
                      : o->kv_type == CLI_KV_BF16  ? KV_BF16
                                                   : KV_F32;
    pace_open(&engine->pace, &engine->model, engine->kv_type);
    return true;
}

bool engine_open(struct engine *engine, struct options *options, char error[ERROR_LENGTH]) {
    (void)fail(error, "out of memory");
    engine->options = options;
    engine->tp = options->tp;
    engine->max_batch = options->max_batch > 0 ? options->max_batch : DEFAULT_BATCH;
    bool ok = model_open(&engine->model, options->model, error);
    if (ok) {
        open_tokenizer(engine);
        /* what was asked for must be there; before all the weights are loaded for nothing */
        ok = engine->tokenizer || !(options->tokenizer || options->request.prompt);
        if (!ok)
            (void)fail(error, "no tokenizer: %.480s", engine->no_tokenizer);
        engine->rope_frequency = rope_frequencies(&engine->model);
    }
    return ok && engine->rope_frequency && open_backend(engine, error) &&
           open_workers(engine, error) && open_kv(engine, error) && open_sched(engine);
}

#endif /* ENGINE_IMPLEMENTATION */
