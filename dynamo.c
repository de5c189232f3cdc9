/* dynamo.c: the program. The model's forward pass, one thread per worker, and main.
 *
 * Owns the devices, the clock and the lock. It turns what the scheduler decides into work: a step
 * becomes a forward pass, a copy order becomes copies between the slots' addresses. Refuses to
 * decide: which request, which worker and which block stand in scheduler.c and kvcache.c; and to
 * know of text, options and the terminal: those stand in app/, which calls it through dynamo.h.
 *
 * Threads: one per worker (worker_main), with GPUs one that pins host memory (pin_main), and who
 * called engine_open, who submits requests and follows them. All that they share is the scheduler,
 * under engine.lock; nothing is computed, copied, printed or waited for while it is held.
 *
 * Read `forward` first: it is the whole model. Then worker_main and copy_block.
 * The forward pass is that of Llama (Touvron et al. 2023) with grouped-query attention (Ainslie et
 * al. 2023); qwen2 adds biases, qwen3 norms of q and k: optional tensors, not branches here. */
#define _GNU_SOURCE
#include "dynamo.h"

#include <assert.h>
#include <inttypes.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    COPY_POLL_NS = 50000,  /* an idle worker looks after its copies so often */
    LOST_SHOWN = 32,       /* requests that a fault names */
    SLAB_BYTES = 64 << 20, /* of host KV, about, that are pinned at a time */
    SLABS_AHEAD = 4,       /* pinned before they are needed */
    COPY_ORDERS = 64,      /* that a worker takes at a time */
    CACHED_ANSWERS = 2, /* device KV by default: so many full contexts for each running request */
    HOST_FACTOR = 4     /* host KV by default: so many times the blocks wanted for a device */
};

/* A block on its way: one piece for each pair of shards that share heads. */
struct transfer {
    struct kv_copy_order order;
    enum stream stream;
    int n_pieces;
    struct piece {
        struct device *device;
        uint64_t ticket;
    } pieces[2 * MAX_SHARDS];
};

struct worker { /* a group of devices that hold one copy of the model between them */
    struct engine *engine;
    int index;
    struct device *shards[MAX_SHARDS];
    const struct weight *(*layers[MAX_SHARDS])[N_ROLES]; /* (n_shards) of (n_layers) by role */
    struct transfer *transfers; /* (n_transfers), with room for one into each slot there is */
    int n_transfers;
    pthread_t thread;
};

struct engine {
    struct engine_config config;
    float *rope_frequency; /* (rope_dim / 2) */
    struct worker workers[MAX_WORKERS];
    char *host_kv; /* (host_blocks, block_bytes of all heads) */
    int n_pinned;  /* the first so many of them, under the lock */
    struct sched *sched;
    struct model_cost cost;
    struct pace prefill, decode; /* under the lock */
    pthread_mutex_t lock;
    pthread_cond_t work, news; /* something to do for workers; something to show for callers */
    int n_started;             /* workers whose threads run */
    pthread_t pinner;          /* runs if `pins` */
    bool pins, stopping;
};

/* ---- the model ---- */

/* One forward pass over the rows of a batch; sampled[n_samples] are the next tokens, and logits, if
 * wanted, (n_samples, vocab_size). Every op is given to each shard in turn; the shards work side by
 * side where the backend can. */
static void forward(struct worker *worker, const struct batch *batch, int *sampled, float *logits) {
    const struct backend *backend = worker->engine->config.backend;
    int n_layers = worker->engine->config.model->config.n_layers;
    int n_shards = worker->engine->config.n_shards;
    struct device **shards = worker->shards;
    bool record = true;
    for (int s = 0; s < n_shards; s++)
        record = backend->step_begin(shards[s], batch) && record;
    for (int s = 0; s < n_shards && record; s++)
        backend->embed(shards[s], worker->layers[s][0][TOKEN_EMBD]);
    for (int layer = 0; layer < n_layers && record; layer++) {
        for (int s = 0; s < n_shards; s++) {
            const struct weight *const *w = worker->layers[s][layer];
            backend->norm_qkv(shards[s], w);
            backend->rope_append(shards[s], w, layer);
            backend->attention(shards[s], layer);
            backend->project_add(shards[s], w[ATTN_OUTPUT], INPUT_ATTENTION);
        }
        if (n_shards > 1)
            backend->all_reduce_add(shards, n_shards);
        for (int s = 0; s < n_shards; s++) {
            const struct weight *const *w = worker->layers[s][layer];
            backend->norm_gate_up(shards[s], w);
            backend->project_add(shards[s], w[FFN_DOWN], INPUT_FFN);
        }
        if (n_shards > 1)
            backend->all_reduce_add(shards, n_shards);
    }
    if (record && batch->n_samples > 0)
        backend->sample(shards[0], worker->layers[0][0], logits);
    for (int s = 0; s < n_shards; s++)
        backend->step_end(shards[s], s == 0 ? sampled : NULL);
}

/* ---- what a step costs ---- */

struct model_cost model_cost(const struct model *model) {
    struct model_cost cost = {0};
    for (int i = 0; i < N_MODEL_TENSORS; i++) {
        const struct model_tensor *kind = &model_tensors[i];
        if (!kind->layered || kind->role == NO_ROLE || kind->rows == DIM_ONE)
            continue;
        for (int layer = 0; layer < model->config.n_layers; layer++) {
            const struct tensor *tensor = model->layers[layer][kind->role];
            cost.bytes += tensor ? (double)tensor->bytes : 0;
            cost.row_weights += tensor ? (double)tensor->rows * (double)tensor->cols : 0;
        }
    }
    const struct tensor *output = model->layers[0][OUTPUT];
    cost.bytes += (double)output->bytes;
    cost.sample_weights = (double)output->rows * (double)output->cols;
    return cost;
}

void step_work(const struct model_cost *cost, const struct model_config *config,
               enum kv_type kv_type, const struct batch *batch, double *bytes, double *operations) {
    double seen = 0; /* tokens that rows attend to */
    for (int i = 0; i < batch->n_rows; i++)
        seen += batch->position[i] + 1;
    *bytes = cost->bytes + (double)batch->n_blocks * (double)block_bytes(config, 1, kv_type);
    *operations =
        2 * (batch->n_rows * cost->row_weights + batch->n_samples * cost->sample_weights) +
        4 * seen * config->n_layers * config->n_heads * config->head_dim;
}

/* A step of generated tokens is bound by reading, a step of prompts by arithmetic: each is summed
 * for itself, and one with rows of both kinds not at all. */
static void count_pace(struct engine *engine, const struct batch *batch, double seconds) {
    int n_generated = 0;
    for (int i = 0; i < batch->n_sequences; i++)
        n_generated += batch->sequence[i].generated;
    if (batch->n_rows == 0 || (n_generated > 0 && n_generated < batch->n_sequences))
        return;
    struct pace *sum = n_generated > 0 ? &engine->decode : &engine->prefill;
    double bytes, operations;
    step_work(&engine->cost, &engine->config.model->config, engine->config.kv_type, batch, &bytes,
              &operations);
    sum->tokens += batch->n_rows;
    sum->seconds += seconds;
    sum->bytes += bytes;
    sum->operations += operations;
}

/* ---- copies ---- */

/* Where the heads of one shard's part of a block lie; the host is one shard with all heads. */
struct block_part {
    char *address;
    int first_head, n_heads;
};

static int shards_of(const struct engine *engine, int place) {
    return place == engine->config.n_workers ? 1 : engine->config.n_shards;
}

static struct block_part block_part(const struct engine *engine, int place, int slot, int shard) {
    const struct model_config *config = &engine->config.model->config;
    bool host = place == engine->config.n_workers;
    int n_shards = shards_of(engine, place), n_heads = config->n_kv_heads / n_shards;
    char *base = host ? engine->host_kv : engine->workers[place].shards[shard]->kv;
    size_t bytes = block_bytes(config, n_shards, engine->config.kv_type);
    return (struct block_part){base + (size_t)slot * bytes, shard * n_heads, n_heads};
}

/* The heads that two parts of a block both hold, of all layers. False: they share none. */
static bool shared_heads(const struct engine *engine, struct block_part from, struct block_part to,
                         struct copy2d *copy) {
    const struct model_config *config = &engine->config.model->config;
    enum kv_type type = engine->config.kv_type;
    size_t head_bytes = (size_t)(BLOCK_TOKENS * kv_head_dim(config, type)) * kv_element_bytes(type);
    int first = to.first_head > from.first_head ? to.first_head : from.first_head;
    int to_end = to.first_head + to.n_heads, from_end = from.first_head + from.n_heads;
    int end = to_end < from_end ? to_end : from_end;
    if (first >= end)
        return false;
    *copy = (struct copy2d){.to = to.address + (size_t)(first - to.first_head) * head_bytes,
                            .from = from.address + (size_t)(first - from.first_head) * head_bytes,
                            .to_pitch = (size_t)to.n_heads * head_bytes,
                            .from_pitch = (size_t)from.n_heads * head_bytes,
                            .width = (size_t)(end - first) * head_bytes,
                            .height = (size_t)config->n_layers * 2};
    return true;
}

/* Starts the copies that an order asks for: every pair of shards copies the heads both hold. */
static void copy_block(struct worker *worker, const struct kv_copy_order *order) {
    const struct engine *engine = worker->engine;
    int host = engine->config.n_workers;
    bool out = order->to == host, in = order->from == host;
    enum stream stream = out ? STREAM_PAGE_OUT : in ? STREAM_PAGE_IN : STREAM_TRANSFER;
    struct transfer *transfer = &worker->transfers[worker->n_transfers++];
    *transfer = (struct transfer){.order = *order, .stream = stream};
    for (int t = 0; t < shards_of(engine, order->to); t++) {
        struct block_part to = block_part(engine, order->to, order->to_slot, t);
        for (int f = 0; f < shards_of(engine, order->from); f++) {
            struct block_part from = block_part(engine, order->from, order->from_slot, f);
            struct copy2d copy;
            if (!shared_heads(engine, from, to, &copy))
                continue;
            struct device *device = worker->shards[out ? f : t];
            uint64_t ticket = engine->config.backend->copy(device, stream, &copy);
            transfer->pieces[transfer->n_pieces++] = (struct piece){device, ticket};
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
        for (int p = 0; p < transfer->n_pieces && done; p++) {
            const struct piece *piece = &transfer->pieces[p];
            done =
                engine->config.backend->copy_done(piece->device, transfer->stream, piece->ticket);
        }
        if (!done) {
            i++;
            continue;
        }
        sched_copied(engine->sched, &transfer->order, true, engine_now());
        *transfer = worker->transfers[--worker->n_transfers];
        any = true;
    }
    return any;
}

/* ---- workers ---- */

static void show_step(const struct worker *worker, const struct step *step) {
    bool prefills = worker->engine->config.workers[worker->index].prefills;
    bool decodes = worker->engine->config.workers[worker->index].decodes;
    (void)fprintf(stderr, "worker %d (%s%s%s): %d rows of %d requests, %d copies on their way\n",
                  worker->index, prefills ? "prefill" : "", prefills && decodes ? "+" : "",
                  decodes ? "decode" : "", step->batch.n_rows, step->batch.n_sequences,
                  worker->n_transfers);
}

/* Returns the seconds that it computed for. */
static double do_step(struct worker *worker, struct step *step) {
    double start = engine_now();
    forward(worker, &step->batch, step->batch.sampled, NULL);
    double seconds = engine_now() - start;
    if (worker->engine->config.verbose)
        show_step(worker, step);
    return seconds;
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
        (void)collect_copies(worker);
        struct step *step = sched_next(engine->sched, worker->index, engine_now());
        struct kv_copy_order orders[COPY_ORDERS];
        int n = sched_copies(engine->sched, worker->index, orders, COPY_ORDERS);
        uint32_t concerned = sched_concerned(engine->sched), self = 1u << worker->index;
        if (concerned & ~self)
            engine_wake(engine);
        if (!step && n == 0) {
            if (!(concerned & self))
                wait_for_work(worker);
            continue;
        }
        pthread_mutex_unlock(&engine->lock);
        for (int i = 0; i < n; i++)
            copy_block(worker, &orders[i]);
        double seconds = step ? do_step(worker, step) : 0;
        pthread_mutex_lock(&engine->lock);
        if (!step)
            continue;
        count_pace(engine, &step->batch, seconds);
        sched_done(engine->sched, worker->index, step, engine_now());
        engine_wake(engine);
    }
    while (worker->n_transfers > 0) /* their memory must not go before they are done */
        (void)collect_copies(worker);
    pthread_mutex_unlock(&engine->lock);
    return NULL;
}

/* ---- pinning ---- */

/* Blocks of host KV that are pinned at a time. 16 blocks are whole pages: a block in bf16 is a
 * multiple of 4 KB, and a page has 64 KB at most. */
static int slab_blocks(const struct engine *engine) {
    size_t bytes = block_bytes(&engine->config.model->config, 1, engine->config.kv_type);
    return (int)((SLAB_BYTES / 16 + bytes - 1) / bytes * 16);
}

static char *host_block(const struct engine *engine, int block) {
    return block_part(engine, engine->config.n_workers, block, 0).address;
}

/* Pinning takes far longer than copying, so it is done in the background, some slabs ahead: a slot
 * that was never used is taken only when all others are in use (kvcache.c). */
static void *pin_main(void *argument) {
    struct engine *engine = argument;
    const struct engine_config *config = &engine->config;
    int slab = slab_blocks(engine);
    bool ok = true;
    pthread_mutex_lock(&engine->lock);
    while (!engine->stopping && ok && engine->n_pinned < config->host_blocks) {
        int first = engine->n_pinned, left = config->host_blocks - first;
        int n = left < slab ? left : slab;
        if (first >= kv_used(sched_kv(engine->sched), config->n_workers) + SLABS_AHEAD * slab) {
            pthread_cond_wait(&engine->work, &engine->lock);
            continue;
        }
        pthread_mutex_unlock(&engine->lock);
        size_t bytes = (size_t)(host_block(engine, first + n) - host_block(engine, first));
        ok = config->backend->pin(engine->workers[0].shards[0], host_block(engine, first), bytes);
        if (!ok && config->verbose)
            (void)fprintf(stderr, "host KV: block %d and those behind cannot be pinned\n", first);
        pthread_mutex_lock(&engine->lock);
        engine->n_pinned += ok ? n : 0;
    }
    pthread_mutex_unlock(&engine->lock);
    return NULL;
}

/* ---- opening: weights ---- */

/* Uploads all that the forward pass needs of one shard, as the table of tensors says. rope_freqs is
 * not uploaded: what is made of it stands in the engine. */
static bool load_weights(const struct engine *engine, struct device *device,
                         const struct weight *(*to)[N_ROLES], char *error) {
    const struct model *model = engine->config.model;
    int n_layers = model->config.n_layers;
    for (int layer = 0; layer < n_layers; layer++) {
        if (engine->config.progress)
            engine->config.progress(layer, n_layers);
        for (int i = 0; i < N_MODEL_TENSORS; i++) {
            int role = model_tensors[i].role;
            const struct tensor *tensor = role == NO_ROLE ? NULL : model->layers[layer][role];
            if (!tensor || role == ROPE_FREQS)
                continue;
            struct slice slice = {model_tensors[i].slice, device->rank, device->n_shards};
            const struct tensor *together[4];
            model_together(model->layers[layer], role, together);
            to[layer][role] =
                engine->config.backend->upload(device, tensor, together, slice, error);
            if (!to[layer][role])
                return false;
            gguf_release(tensor); /* the backend has a copy */
        }
    }
    if (engine->config.progress)
        engine->config.progress(n_layers, n_layers);
    return true;
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
static bool open_worker(struct engine *engine, int index, char *error) {
    const struct engine_config *config = &engine->config;
    struct worker *worker = &engine->workers[index];
    worker->engine = engine;
    worker->index = index;
    for (int s = 0; s < config->n_shards; s++) {
        struct device wanted = {.backend = config->backend,
                                .config = &config->model->config,
                                .rope_frequency = engine->rope_frequency,
                                .index = config->workers[index].devices[s],
                                .rank = s,
                                .n_shards = config->n_shards,
                                .urgent = config->workers[index].decodes,
                                .max_rows = config->max_batch + config->chunk,
                                .max_samples = config->max_batch + config->chunk,
                                .kv_type = config->kv_type};
        worker->shards[s] = config->backend->device_open(config->backend, &wanted, error);
        worker->layers[s] =
            calloc((size_t)config->model->config.n_layers, sizeof *worker->layers[s]);
        if (!worker->shards[s] || !worker->layers[s] ||
            !load_weights(engine, worker->shards[s], worker->layers[s], error))
            return false;
    }
    return true;
}

/* ---- opening: both tiers of KV blocks ---- */

/* How many devices share the memory of one: those on its GPU, or, of the CPU, all. */
static int count_sharing(const struct engine *engine, const struct device *device) {
    int n = 0, n_shards = engine->config.n_shards;
    for (int i = 0; i < engine->config.n_workers * n_shards; i++)
        n += engine->config.backend->n_gpus == 0 ||
             engine->workers[i / n_shards].shards[i % n_shards]->index == device->index;
    return n;
}

/* Blocks that each device can hold at most, if nine tenths of what is free there are taken. */
static int64_t most_blocks(const struct engine *engine, size_t taken_on_host) {
    const struct backend *backend = engine->config.backend;
    int n_shards = engine->config.n_shards;
    size_t bytes = block_bytes(&engine->config.model->config, n_shards, engine->config.kv_type);
    int64_t most = INT32_MAX;
    for (int i = 0; i < engine->config.n_workers * n_shards; i++) {
        struct device *device = engine->workers[i / n_shards].shards[i % n_shards];
        size_t left = backend->free_memory(device) / 10 * 9;
        size_t taken = backend->n_gpus > 0 ? 0 : taken_on_host;
        left = left > taken ? left - taken : 0;
        int64_t blocks = (int64_t)(left / bytes) / count_sharing(engine, device);
        most = blocks < most ? blocks : most;
    }
    return most;
}

/* Blocks, whose slots are numbered by ints. */
static int fewer(int64_t wanted, int64_t most) {
    int64_t n = wanted < most ? wanted : most, limit = INT32_MAX / 64;
    return (int)(n < limit ? n : limit);
}

/* Chooses how many blocks each tier holds, where nobody said it: full contexts for all that can
 * run, and never more than the machine has free. */
static bool size_tiers(struct engine *engine, char *error) {
    struct engine_config *config = &engine->config;
    const struct model_config *model = &config->model->config;
    size_t shard_bytes = block_bytes(model, config->n_shards, config->kv_type);
    size_t all_bytes = block_bytes(model, 1, config->kv_type);
    int64_t wanted = (int64_t)CACHED_ANSWERS * config->max_batch * blocks_of(model->context_length);
    if (config->host_blocks < 0)
        config->host_blocks =
            fewer(wanted * HOST_FACTOR, (int64_t)(host_free_memory() / 4 / all_bytes));
    if (config->device_blocks < 0)
        config->device_blocks =
            fewer(wanted, most_blocks(engine, all_bytes * (size_t)config->host_blocks));
    if (config->device_blocks < 1)
        return fail(error,
                    "room for no KV block of %zu bytes; raise --kv-device or lower --kv-host",
                    shard_bytes);
    return true;
}

static bool open_tiers(struct engine *engine, char *error) {
    const struct engine_config *config = &engine->config;
    const struct backend *backend = config->backend;
    const struct model_config *model = &config->model->config;
    size_t n_device = (size_t)config->device_blocks, n_host = (size_t)config->host_blocks;
    bool ok = true;
    for (int i = 0; i < config->n_workers; i++) {
        struct worker *worker = &engine->workers[i];
        for (int s = 0; s < config->n_shards; s++) {
            size_t bytes = n_device * block_bytes(model, config->n_shards, config->kv_type);
            worker->shards[s]->kv = backend->alloc(worker->shards[s], bytes);
            ok = ok && worker->shards[s]->kv;
        }
        worker->transfers = calloc(n_device + n_host, sizeof *worker->transfers);
        ok = ok && worker->transfers;
    }
    if (n_host > 0) {
        size_t bytes = n_host * block_bytes(model, 1, config->kv_type);
        engine->host_kv = host_alloc(bytes);
        ok = ok && engine->host_kv;
    }
    return ok ||
           fail(error,
                "no memory for %d KV blocks on each of %d devices and %d on the host; lower "
                "--kv-device or --kv-host",
                config->device_blocks, config->n_workers * config->n_shards, config->host_blocks);
}

static bool open_sched(struct engine *engine) {
    const struct engine_config *config = &engine->config;
    struct sched_config sched = {.kv = {.n_workers = config->n_workers,
                                        .host_blocks = config->host_blocks,
                                        .policy = config->policy},
                                 .max_batch = config->max_batch,
                                 .chunk = config->chunk,
                                 .copies_in_flight = COPY_ORDERS,
                                 .context_length = config->model->config.context_length,
                                 .vocab_size = config->model->config.vocab_size,
                                 .ends_text = config->ends_text};
    for (int i = 0; i < config->n_workers; i++) {
        sched.kv.device_blocks[i] = config->device_blocks;
        sched.prefills[i] = config->workers[i].prefills;
        sched.decodes[i] = config->workers[i].decodes;
    }
    engine->sched = sched_create(&sched);
    return engine->sched != NULL;
}

/* ---- the engine ---- */

struct engine *engine_open(const struct engine_config *config, char *error) {
    (void)fail(error, "out of memory");
    struct engine *engine = calloc(1, sizeof *engine);
    if (!engine)
        return NULL;
    engine->config = *config;
    engine->cost = model_cost(config->model);
    pthread_mutex_init(&engine->lock, NULL);
    pthread_cond_init(&engine->work, NULL);
    pthread_cond_init(&engine->news, NULL);
    engine->rope_frequency = rope_frequencies(config->model);
    bool ok = engine->rope_frequency;
    for (int i = 0; i < config->n_workers && ok; i++)
        ok = open_worker(engine, i, error);
    if (ok && size_tiers(engine, error) && open_tiers(engine, error) && open_sched(engine))
        return engine;
    engine_close(engine);
    return NULL;
}

bool engine_start(struct engine *engine) {
    for (bool ok = true; ok && engine->n_started < engine->config.n_workers;) {
        struct worker *worker = &engine->workers[engine->n_started];
        ok = pthread_create(&worker->thread, NULL, worker_main, worker) == 0;
        engine->n_started += ok;
    }
    engine->pins = engine->host_kv && engine->config.backend->pin &&
                   pthread_create(&engine->pinner, NULL, pin_main, engine) == 0;
    return engine->n_started == engine->config.n_workers;
}

static void close_worker(const struct engine *engine, struct worker *worker) {
    const struct backend *backend = engine->config.backend;
    for (int s = 0; s < engine->config.n_shards; s++) {
        free(worker->layers[s]);
        if (worker->shards[s]) {
            backend->release(worker->shards[s], worker->shards[s]->kv);
            backend->device_close(worker->shards[s]);
        }
    }
    free(worker->transfers);
}

void engine_close(struct engine *engine) {
    if (!engine)
        return;
    engine_lock(engine);
    engine->stopping = true;
    engine_wake(engine);
    engine_unlock(engine);
    for (int i = 0; i < engine->n_started; i++)
        pthread_join(engine->workers[i].thread, NULL);
    if (engine->pins)
        pthread_join(engine->pinner, NULL);
    for (int first = 0; first < engine->n_pinned; first += slab_blocks(engine))
        engine->config.backend->unpin(engine->workers[0].shards[0], host_block(engine, first));
    free(engine->host_kv);
    sched_destroy(engine->sched);
    for (int i = 0; i < engine->config.n_workers; i++)
        close_worker(engine, &engine->workers[i]);
    free(engine->rope_frequency);
    pthread_cond_destroy(&engine->news);
    pthread_cond_destroy(&engine->work);
    pthread_mutex_destroy(&engine->lock);
    free(engine);
}

const struct engine_config *engine_config_of(const struct engine *engine) {
    return &engine->config;
}

void engine_lock(struct engine *engine) {
    pthread_mutex_lock(&engine->lock);
}

void engine_unlock(struct engine *engine) {
    pthread_mutex_unlock(&engine->lock);
}

struct sched *engine_sched(struct engine *engine) {
    return engine->sched;
}

void engine_wait(struct engine *engine) {
    pthread_cond_wait(&engine->news, &engine->lock);
}

void engine_wake(struct engine *engine) {
    pthread_cond_broadcast(&engine->work);
    pthread_cond_broadcast(&engine->news);
}

double engine_now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

struct engine_stats engine_stats(struct engine *engine) {
    engine_lock(engine);
    const struct kv *kv = sched_kv(engine->sched);
    struct engine_stats stats = {.sched = sched_stats(engine->sched),
                                 .kv = kv_stats(kv),
                                 .prefill = engine->prefill,
                                 .decode = engine->decode,
                                 .host_used = kv_used(kv, engine->config.n_workers)};
    for (int i = 0; i < engine->config.n_workers; i++)
        stats.device_used += kv_used(kv, i);
    engine_unlock(engine);
    return stats;
}

void engine_limits(struct engine *engine, double *read, double *ops) {
    const struct engine_config *config = &engine->config;
    *read = *ops = 0;
    if (config->backend->limits) /* a backend need not know */
        config->backend->limits(engine->workers[0].shards, config->n_shards,
                                config->model->layers[0][FFN_GATE]->type, read, ops);
}

void engine_logits(struct engine *engine, const int *tokens, int start, int n, float *logits) {
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
    for (int i = 0; i < n_blocks; i++) /* the first of the worker: nobody else uses them */
        batch.block_table[i] = i;
    forward(&engine->workers[0], &batch, batch.sampled, logits);
    free(greedy);
    free(numbers);
}

/* The thread of the fault may hold the lock, or another's may. */
void engine_tell_lost(struct engine *engine) {
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

/* ---- main: the code of the headers that stand around the engine is compiled here ---- */

#define GGUF_IMPLEMENTATION
#define MODEL_IMPLEMENTATION
#define TOKENIZER_IMPLEMENTATION
#define TEMPLATE_IMPLEMENTATION
#define JSON_IMPLEMENTATION
#define CLI_IMPLEMENTATION
#include "lib/cli.h"
#include "lib/gguf.h"
#include "lib/json.h"
#include "lib/model.h"
#include "lib/template.h"
#include "lib/tokenizer.h"

#define ANSWERS_IMPLEMENTATION
#define TERMINAL_IMPLEMENTATION
#define STATS_IMPLEMENTATION
#define EVALUATE_IMPLEMENTATION
#define RUN_IMPLEMENTATION
#include "app/answers.h"
#include "app/evaluate.h"
#include "app/run.h"
#include "app/stats.h"
#include "app/terminal.h"

int main(int argc, char **argv) {
    return run_program(argc, argv);
}
