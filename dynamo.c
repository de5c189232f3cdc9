/* dynamo.c: the program. The model's forward pass, one thread per worker, and main.
 *
 * Owns the devices, the clock and the lock. It turns what the scheduler decides into work: a step
 * becomes a forward pass, a copy order becomes copies between the slots' addresses. Refuses to
 * decide: which request, which worker and which block stand in scheduler.c and kvcache.c; and to
 * know of text, options and the terminal: those stand in app/, which calls it through dynamo.h.
 *
 * Threads: one per worker (worker_main), one that carries blocks for all of them (courier_main), so
 * that no copy waits for a step, with GPUs one that pins host memory (pin_main), and who called
 * engine_open, who submits requests and follows them. All that they share is the scheduler, under
 * engine.lock; nothing is computed, copied, polled or printed while it is held, but what a ledger
 * writes. Who has changed something wakes those whom it concerns.
 *
 * Read `forward` first: it is the whole model. Then worker_main, courier_main and copy_block.
 * The forward pass is that of Llama (Touvron et al. 2023) with grouped-query attention (Ainslie et
 * al. 2023). What other models have besides is in optional tensors (biases, norms, sinks, experts)
 * and in flags of the config (windows, activations, scales), not in code of their own. */
#define _GNU_SOURCE
#include "dynamo.h"
#include "lib/machine.h"

#include <assert.h>
#include <inttypes.h>
#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    COPY_BYTES = 64 << 20, /* of KV, about, that a worker copies at a time: 1 ms of a fast bus */
    MIN_COPIES = 8,        /* blocks that it copies at a time, at least; */
    MAX_COPIES = 128,      /* at most: a stream of a GPU has room for 1024 copies of 8 shards */
    COPY_SECONDS = 30,     /* a copy that takes so long never ends: the slowest bus needs 0.1 s */
    NOBODY = -1,           /* no worker */
    LOST_SHOWN = 32,       /* requests that a fault names */
    SLAB_BYTES = 64 << 20, /* of host KV, about, that are pinned at a time */
    SLABS_AHEAD = 4,       /* pinned before they are needed */
    CACHED_ANSWERS = 2, /* device KV by default: so many full contexts for each running request */
    HOST_FACTOR = 4,    /* host KV by default: so many times the blocks wanted for a device */
    MOST_WANTED = INT32_MAX / 64 /* blocks of a device by default: slots are numbered by ints */
};
static const double COPY_POLL = 50e-6; /* seconds after which the courier looks again */

struct transfer { /* a block on its way, in pieces */
    struct kv_copy_order order;
    enum stream stream;
    double start, waited; /* waited: seconds for its end, but for those in which nobody looked */
    bool started, lost;   /* lost: with the device that carries it, or that it is to come from */
    int n_pieces;
    struct piece {
        struct device *device;
        uint64_t ticket;
    } pieces[MAX_SHARDS];
};

struct worker { /* a group of devices that hold one copy of the model between them */
    struct engine *engine;
    int index, n_shards;
    struct device *shards[MAX_SHARDS];
    const struct weight *(*layers[MAX_SHARDS])[N_ROLES]; /* (n_shards) of (n_layers) by role */
    pthread_cond_t work; /* the scheduler may have something for it */
    pthread_t thread;
    jmp_buf fault; /* where its thread goes on after a device's fault, if it `computes` */
    bool computes;
    bool in_step, dead; /* under the lock; dead: by a fault */
};

struct engine {
    struct engine_config config;
    float *rope_frequency; /* (rope_dim / 2), twice */
    struct worker workers[MAX_WORKERS];
    char *host_kv; /* (host_blocks, block_bytes of all heads) */
    int n_pinned;  /* the first so many of them, under the lock */
    struct sched *sched;
    struct model_cost cost;
    struct pace prefill, decode; /* under the lock */
    pthread_mutex_t lock;
    pthread_cond_t copies, news; /* for courier and pinner; something to show for callers */
    int64_t n_finished;          /* requests that callers know of */
    int n_started;               /* workers whose threads run */
    pthread_t courier, pinner;   /* run if `carries`, if `pins` */
    bool carries, pins, stopping;
    double next_event;          /* when the courier wakes at the latest */
    struct transfer *transfers; /* (n_transfers) on their way, the courier's own; … */
    int n_transfers;
    double looked; /* … when it looked after them last */
    jmp_buf fault; /* where the courier goes on after a fault, while it is `copying` … */
    int copying;   /* … for this worker; NOBODY: it is not */
};

/* ---- the model ---- */

/* Adds to x, on all shards, what the ops before have left in parts, or unnormed. */
static void add_parts(struct worker *worker, int layer, enum tensor_role post_norm) {
    const struct weight *norm[MAX_SHARDS];
    for (int s = 0; s < worker->n_shards; s++)
        norm[s] = worker->layers[s][layer][post_norm];
    if (worker->n_shards > 1 || norm[0])
        worker->engine->config.backend->all_reduce_add(worker->shards, worker->n_shards,
                                                       norm[0] ? norm : NULL);
}

/* x += bias + matrix . input. The bias first: a shard has part of the rest alone. */
static void project(const struct backend *backend, struct device *shard,
                    const struct weight *const *layer, enum tensor_role matrix,
                    enum tensor_role bias, enum product_input input) {
    if (layer[bias])
        backend->add_bias(shard, layer[bias]);
    backend->project_add(shard, layer[matrix], input);
}

static void feed_forward(const struct backend *backend, struct device *shard,
                         const struct weight *const *layer) {
    if (layer[ROUTER]) {
        backend->norm_route(shard, layer);
        backend->expert_gate_up(shard, layer);
        backend->expert_down_add(shard, layer);
    } else {
        backend->norm_gate_up(shard, layer);
        project(backend, shard, layer, FFN_DOWN, FFN_DOWN_BIAS, INPUT_FFN);
    }
}

/* One forward pass over the rows of a batch; sampled[n_samples] are the next tokens, and logits, if
 * wanted, (n_samples, vocab_size). Every op is given to each shard in turn; the shards work side by
 * side where the backend can. */
static void forward(struct worker *worker, const struct batch *batch, int *sampled, float *logits) {
    const struct backend *backend = worker->engine->config.backend;
    int n_layers = worker->engine->config.model->config.n_layers;
    int n_shards = worker->n_shards;
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
            backend->attention(shards[s], w, layer);
            project(backend, shards[s], w, ATTN_OUTPUT, ATTN_OUTPUT_BIAS, INPUT_ATTENTION);
        }
        add_parts(worker, layer, ATTN_POST_NORM);
        for (int s = 0; s < n_shards; s++)
            feed_forward(backend, shards[s], worker->layers[s][layer]);
        add_parts(worker, layer, FFN_POST_NORM);
    }
    if (record && batch->n_samples > 0)
        backend->sample(shards[0], worker->layers[0][0], logits);
    for (int s = 0; s < n_shards; s++)
        backend->step_end(shards[s], s == 0 ? sampled : NULL);
}

/* ---- what a step costs ---- */

struct model_cost model_cost(const struct model *model) {
    struct model_cost cost = {0};
    double used = (double)model->config.n_used / fmax(model->config.n_experts, 1);
    for (int i = 0; i < N_MODEL_TENSORS; i++) {
        const struct model_tensor *kind = &model_tensors[i];
        if (!model_layered(kind) || kind->rows == DIM_ONE)
            continue;
        for (int layer = 0; layer < model->config.n_layers; layer++) {
            const struct tensor *tensor = model->layers[layer][kind->role];
            if (!tensor)
                continue;
            bool expert = kind->slice == SLICE_EXPERTS;
            *(expert ? &cost.expert_bytes : &cost.bytes) += (double)tensor->bytes;
            cost.row_weights += (double)tensor->rows * (double)tensor->cols * (expert ? used : 1);
        }
    }
    const struct tensor *output = model->layers[0][OUTPUT];
    cost.bytes += (double)output->bytes;
    cost.sample_weights = (double)output->rows * (double)output->cols;
    return cost;
}

static size_t part_bytes(const struct engine *engine, int n) { /* of one of n parts of a block */
    return block_bytes(&engine->config.model->config, n, engine->config.kv_type);
}

/* How many tokens, of all of them, n rows see together that begin at position `start`. */
static double tokens_seen(double start, double n, double window) {
    double growing = fmin(fmax(window - start, 0), n); /* rows that see all before them */
    return growing * (start + 0.5 * (growing + 1)) + (n - growing) * window;
}

/* The matrices are read once, of experts those that any row chooses if all are as likely, and the
 * keys and values of its texts that are in a window. */
struct step_cost step_cost(const struct model_config *config, const struct model_cost *cost,
                           enum kv_type kv_type, const struct batch *batch) {
    struct step_cost step = {0};
    double seen = 0; /* tokens that rows attend to, in all layers */
    double missed = config->n_experts > 0 ? 1 - (double)config->n_used / config->n_experts : 0;
    int n_all = 0; /* layers that see all */
    for (int layer = 0; layer < config->n_layers; layer++)
        n_all += model_window(config, layer) == INT32_MAX;
    double n_windowed = config->n_layers - n_all, window = config->window;
    double read = (double)n_all * batch->n_blocks; /* blocks, in all layers */
    for (int i = 0; i < batch->n_sequences; i++) {
        const struct sequence *sequence = &batch->sequence[i];
        double n = sequence->n_rows, start = sequence->start;
        step.n_generated += sequence->generated;
        seen +=
            n_all * tokens_seen(start, n, INT32_MAX) + n_windowed * tokens_seen(start, n, window);
        read += n_windowed * fmin(sequence->n_blocks, 1 + ceil((window + n) / BLOCK_TOKENS));
    }
    step.bytes = cost->bytes + cost->expert_bytes * (1 - pow(missed, batch->n_rows)) +
                 read / config->n_layers * (double)block_bytes(config, 1, kv_type);
    step.operations =
        2 * (batch->n_rows * cost->row_weights + batch->n_samples * cost->sample_weights) +
        4 * seen * config->n_heads * config->head_dim;
    return step;
}

/* A step of generated tokens is bound by reading, a step of prompts by arithmetic: each is summed
 * for itself, and one with rows of both kinds not at all. */
static void count_pace(struct engine *engine, const struct batch *batch, double seconds) {
    struct step_cost cost =
        step_cost(&engine->config.model->config, &engine->cost, engine->config.kv_type, batch);
    if (batch->n_rows == 0 || (cost.n_generated > 0 && cost.n_generated < batch->n_sequences))
        return;
    struct pace *sum = cost.n_generated > 0 ? &engine->decode : &engine->prefill;
    sum->tokens += batch->n_rows;
    sum->seconds += seconds;
    sum->bytes += cost.bytes;
    sum->operations += cost.operations;
}

/* ---- copies ---- */

static int shards_of(const struct engine *engine, int place) { /* the host is one */
    return place == engine->config.n_workers ? 1 : engine->workers[place].n_shards;
}

static size_t shard_bytes(const struct engine *engine, int place) { /* of one block there */
    return part_bytes(engine, shards_of(engine, place));
}

/* Where piece p of n of a block begins, in the shard that has it. */
static char *piece_address(const struct engine *engine, int place, int slot, int p, int n) {
    int each = n / shards_of(engine, place); /* pieces of a shard, side by side in each layer */
    bool host = place == engine->config.n_workers;
    char *kv = host ? engine->host_kv : engine->workers[place].shards[p / each]->kv;
    size_t width = part_bytes(engine, n) / (2 * (size_t)engine->config.model->config.n_layers);
    return kv + (size_t)slot * shard_bytes(engine, place) + (size_t)(p % each) * width;
}

/* Starts the copies that an order asks for: in as many pieces as the wider place has shards (their
 * numbers are powers of two), so that each is in one shard here and in one there. */
static void copy_block(const struct engine *engine, struct transfer *transfer) {
    const struct kv_copy_order *order = &transfer->order;
    int from = shards_of(engine, order->from), to = shards_of(engine, order->to);
    int n = from > to ? from : to, host = engine->config.n_workers;
    bool out = order->to == host, in = order->from == host;
    size_t height = 2 * (size_t)engine->config.model->config.n_layers;
    struct copy2d copy = {.to_pitch = part_bytes(engine, to) / height,
                          .from_pitch = part_bytes(engine, from) / height,
                          .width = part_bytes(engine, n) / height,
                          .height = height};
    transfer->stream = out ? STREAM_PAGE_OUT : in ? STREAM_PAGE_IN : STREAM_TRANSFER;
    transfer->start = engine_now();
    transfer->n_pieces = n;
    for (int p = 0; p < n; p++) {
        copy.to = piece_address(engine, order->to, order->to_slot, p, n);
        copy.from = piece_address(engine, order->from, order->from_slot, p, n);
        int shard = p * (out ? from : to) / n;
        struct device *device = engine->workers[order->worker].shards[shard];
        uint64_t ticket = engine->config.backend->copy(device, transfer->stream, &copy);
        transfer->pieces[p] = (struct piece){device, ticket};
    }
}

static bool transfer_done(const struct engine *engine, const struct transfer *transfer) {
    for (int p = 0; p < transfer->n_pieces; p++) {
        const struct piece *piece = &transfer->pieces[p];
        if (!engine->config.backend->copy_done(piece->device, transfer->stream, piece->ticket))
            return false;
    }
    return true;
}

/* ---- the ledger ---- */

/* What has no times happens now. With the lock held. */
static void stamp(void *context, const struct event *event) {
    const struct engine *engine = context;
    struct event stamped = *event;
    stamped.end = event->end > 0 ? event->end : engine_now();
    stamped.start = event->start > 0 ? event->start : stamped.end;
    note(&engine->config.ledger, &stamped);
}

/* ---- waking ---- */

/* `when` is a time of engine_now; INFINITY: until it is woken. */
static void wait_until(struct engine *engine, pthread_cond_t *condition, double when) {
    if (when == INFINITY) {
        pthread_cond_wait(condition, &engine->lock);
        return;
    }
    double seconds = floor(when);
    struct timespec until = {(time_t)seconds, (long)((when - seconds) * 1e9)};
    (void)pthread_cond_timedwait(condition, &engine->lock, &until);
}

/* Wakes the workers whom changes since the last call concern, the courier if there is something to
 * copy or to end sooner, callers if a request ended. With the lock held. True: they concern the
 * worker that has called, too. */
static bool wake_concerned(struct engine *engine, int self) {
    int64_t n_finished = sched_stats(engine->sched).finished;
    bool carry = sched_next_event(engine->sched) < engine->next_event, concerned = false;
    for (int w; (w = sched_concerned(engine->sched)) >= 0;) {
        pthread_cond_signal(&engine->workers[w].work);
        concerned = concerned || w == self;
    }
    for (int i = 0; i < engine->config.n_workers; i++)
        carry = carry || kv_pending(sched_kv(engine->sched), i) > 0;
    if (carry)
        pthread_cond_broadcast(&engine->copies);
    if (n_finished != engine->n_finished)
        pthread_cond_broadcast(&engine->news);
    engine->n_finished = n_finished;
    return concerned;
}

void engine_wake(struct engine *engine) {
    (void)wake_concerned(engine, NOBODY);
    pthread_cond_broadcast(&engine->news);
}

/* ---- devices that fail ---- */

/* Whoever computes on a GPU of a worker that has met a fault has lost it as well: the fault ends
 * the context that they share. With the lock held. */
static void lose_devices(struct engine *engine, int lost) {
    const struct worker *met = &engine->workers[lost];
    for (int w = 0; w < engine->config.n_workers; w++) {
        struct worker *worker = &engine->workers[w];
        bool shares = w == lost;
        for (int i = 0; i < met->n_shards * worker->n_shards; i++)
            shares = shares || (engine->config.backend->n_gpus > 0 &&
                                met->shards[i % met->n_shards]->index ==
                                    worker->shards[i / met->n_shards]->index);
        worker->dead = worker->dead || shares;
        if (shares) { /* for good, whatever it was told */
            sched_fail(engine->sched, w, engine_now());
            sched_fail_at(engine->sched, w, INFINITY, 0, INFINITY);
        }
    }
    engine_wake(engine);
}

/* Computes a step. False: a device has failed. */
static bool compute(struct worker *worker, struct step *step) {
    bool ok = setjmp(worker->fault) == 0;
    worker->computes = ok;
    if (ok)
        forward(worker, &step->batch, step->batch.sampled, NULL);
    worker->computes = false;
    return ok;
}

/* The thread of a fault may hold the lock, or another's may, where the fault ends the program. What
 * a thread alone writes is read by it alone; who is whose thread was settled before any went on. */
void engine_tell_lost(struct engine *engine) {
    int64_t ids[LOST_SHOWN];
    for (int w = 0; w < engine->n_started; w++)
        if (pthread_equal(pthread_self(), engine->workers[w].thread) && engine->workers[w].computes)
            longjmp(engine->workers[w].fault, 1);
    if (pthread_equal(pthread_self(), engine->courier) && engine->copying != NOBODY)
        longjmp(engine->fault, 1);
    (void)pthread_mutex_trylock(&engine->lock);
    int n = engine->sched ? sched_unfinished(engine->sched, ids, LOST_SHOWN) : 0;
    if (n > 0)
        (void)fprintf(stderr, "dynamo: %d request%s lost:", n, n == 1 ? " is" : "s are");
    for (int i = 0; i < n && i < LOST_SHOWN; i++)
        (void)fprintf(stderr, " %" PRId64, ids[i]);
    if (n > 0)
        (void)fputs(n > LOST_SHOWN ? " …\n" : "\n", stderr);
}

/* ---- the courier ---- */

/* Starts the copies that are new, and looks after all. Those that have ended, or are lost, are then
 * the last; returns how many are not. One that never ends is a fault of its worker. Without the
 * lock. */
static int carry(struct engine *engine) {
    struct transfer *all = engine->transfers;
    int n = engine->n_transfers;
    double since = fmin(engine_now() - engine->looked, 1); /* the program may have been stopped */
    engine->looked = engine_now();
    for (int i = 0; i < n; i++) {
        engine->copying = all[i].order.worker;
        bool starts = !all[i].started && !all[i].lost;
        all[i].started = all[i].started || starts;
        if (starts)
            copy_block(engine, &all[i]);
    }
    for (int i = n - 1; i >= 0; i--) {
        engine->copying = all[i].order.worker;
        if (!all[i].lost && !transfer_done(engine, &all[i])) {
            all[i].waited += since;
            if (all[i].waited < COPY_SECONDS)
                continue;
            (void)fprintf(stderr, "dynamo: worker %d: a copy has not ended in %d s\n",
                          engine->copying, COPY_SECONDS);
            longjmp(engine->fault, 1);
        }
        struct transfer ended = all[i];
        all[i] = all[--n];
        all[n] = ended;
    }
    return n;
}

/* The same where a device may fail: then those that it has lost are known the next time. */
static int try_to_carry(struct engine *engine) {
    bool ok = setjmp(engine->fault) == 0;
    int n_left = ok ? carry(engine) : engine->n_transfers;
    int worker = engine->copying;
    engine->copying = NOBODY;
    pthread_mutex_lock(&engine->lock);
    if (!ok)
        lose_devices(engine, worker);
    return n_left;
}

/* Takes the orders that there are. With the lock held. */
static void take_orders(struct engine *engine) {
    const struct worker *workers = engine->workers;
    struct kv_copy_order order;
    for (int i = 0; i < engine->n_transfers; i++) { /* the host is no worker, and has no faults */
        struct transfer *t = &engine->transfers[i];
        t->lost = workers[t->order.worker].dead ||
                  (!t->started && t->order.from < engine->config.n_workers &&
                   workers[t->order.from].dead);
    }
    for (int w = 0; w < engine->config.n_workers && !engine->stopping; w++)
        while (sched_copies(engine->sched, w, &order, 1))
            engine->transfers[engine->n_transfers++] = (struct transfer){.order = order};
}

/* Carries all workers' copies, and calls sched_expire when it is time. */
static void *courier_main(void *argument) {
    struct engine *engine = argument;
    pthread_mutex_lock(&engine->lock);
    while (!engine->stopping || engine->n_transfers > 0) { /* their memory must not go before */
        if (engine_now() >= sched_next_event(engine->sched))
            sched_expire(engine->sched, engine_now());
        take_orders(engine);
        engine->next_event = sched_next_event(engine->sched);
        (void)wake_concerned(engine, NOBODY);
        if (engine->n_transfers == 0) {
            wait_until(engine, &engine->copies, engine->next_event);
            continue;
        }
        pthread_mutex_unlock(&engine->lock);
        int n_left = try_to_carry(engine), n = engine->n_transfers;
        engine->n_transfers = n_left;
        for (int i = n_left; i < n; i++) {
            const struct kv_copy_order *order = &engine->transfers[i].order;
            bool ok = !engine->transfers[i].lost;
            if (!ok && engine->transfers[i].started && order->to == engine->config.n_workers)
                continue; /* the device may write there yet */
            if (ok)
                stamp(engine, &(struct event){EVENT_COPY, .start = engine->transfers[i].start,
                                              .worker = order->worker, .node = order->node,
                                              .from = order->from, .to = order->to});
            sched_copied(engine->sched, order, ok, engine_now());
        }
        if (n_left == n)
            wait_until(engine, &engine->copies, engine_now() + COPY_POLL);
    }
    pthread_mutex_unlock(&engine->lock);
    return NULL;
}

/* ---- workers ---- */

static void *worker_main(void *argument) {
    struct worker *worker = argument;
    struct engine *engine = worker->engine;
    pthread_mutex_lock(&engine->lock);
    while (!engine->stopping) {
        double start = engine_now();
        struct step *step = sched_next(engine->sched, worker->index, start);
        bool concerned = wake_concerned(engine, worker->index);
        if (!step) {
            if (!concerned) /* else it has itself changed something */
                pthread_cond_wait(&worker->work, &engine->lock);
            continue;
        }
        worker->in_step = true;
        pthread_mutex_unlock(&engine->lock);
        bool ok = compute(worker, step);
        double end = engine_now();
        pthread_mutex_lock(&engine->lock);
        worker->in_step = false;
        if (ok)
            count_pace(engine, &step->batch, end - start);
        else
            lose_devices(engine, worker->index);
        if (!sched_is_lost(engine->sched, worker->index))
            stamp(engine,
                  &(struct event){EVENT_STEP, start, end, .worker = worker->index, .step = step});
        sched_done(engine->sched, worker->index, step, end);
        engine_wake(engine);
    }
    pthread_mutex_unlock(&engine->lock);
    return NULL;
}

/* ---- pinning ---- */

/* Blocks of host KV that are pinned at a time. 16 blocks are whole pages: a block in bf16 is a
 * multiple of 4 KB, and a page has 64 KB at most. */
static int slab_blocks(const struct engine *engine) {
    size_t bytes = part_bytes(engine, 1);
    return (int)((SLAB_BYTES / 16 + bytes - 1) / bytes * 16);
}

static char *host_block(const struct engine *engine, int block) {
    return engine->host_kv + (size_t)block * part_bytes(engine, 1);
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
            pthread_cond_wait(&engine->copies, &engine->lock);
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
            if (tensor->type == TYPE_FP8)
                return fail(error, "no device here multiplies FP8 weights: give --sim or --plan");
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

/* YaRN: how much of a pair's frequency is divided by rope_scale, 0 to 1; without it all. */
static double rope_scaled(const struct model_config *config, int pair) {
    double low = (double)config->yarn_low, high = (double)config->yarn_high;
    return high > 0 ? fmin(fmax((pair - low) / (high - low), 0), 1) : 1;
}

/* Those of layers that see all, and behind them, if they differ, those of layers with a window. */
static float *rope_frequencies(const struct model *model) {
    const struct model_config *config = &model->config;
    const struct tensor *divisors = model->layers[0][ROPE_FREQS];
    int n = config->rope_dim / 2;
    double scale = config->rope_scale > 0 ? (double)config->rope_scale : 1;
    float *frequency = malloc(2 * (size_t)n * sizeof *frequency);
    for (int i = 0; i < n && frequency; i++) {
        double exponent = -2.0 * i / config->rope_dim, scaled = rope_scaled(config, i);
        float divisor = 1;
        if (divisors)
            memcpy(&divisor, (const char *)divisors->data + 4 * (size_t)i, 4);
        frequency[i] = (float)(pow((double)config->rope_theta, exponent) / (double)divisor *
                               (scaled / scale + 1 - scaled));
        frequency[n + i] = (float)pow((double)config->theta_windowed, exponent);
    }
    return frequency;
}

/* Opens one worker's devices, and puts its shards of the model on them. */
static bool open_worker(struct engine *engine, int index, char *error) {
    const struct engine_config *config = &engine->config;
    struct worker *worker = &engine->workers[index];
    worker->engine = engine;
    worker->index = index;
    worker->n_shards = config->workers[index].n_shards;
    for (int s = 0; s < worker->n_shards; s++) {
        struct device wanted = {.backend = config->backend,
                                .config = &config->model->config,
                                .rope_frequency = engine->rope_frequency,
                                .index = config->workers[index].devices[s],
                                .rank = s,
                                .n_shards = worker->n_shards,
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
    int n = 0;
    for (int w = 0; w < engine->config.n_workers; w++)
        for (int s = 0; s < engine->workers[w].n_shards; s++)
            n += engine->config.backend->n_gpus == 0 ||
                 engine->workers[w].shards[s]->index == device->index;
    return n;
}

static int64_t fewer(int64_t a, int64_t b) {
    return a < b ? a : b;
}

/* Blocks that each device of a worker can hold at most, if nine tenths of what is free there are
 * shared equally. */
static int64_t most_blocks(const struct engine *engine, const struct worker *worker) {
    const struct backend *backend = engine->config.backend;
    size_t host = (size_t)engine->config.host_blocks * part_bytes(engine, 1);
    size_t taken = backend->n_gpus > 0 ? 0 : host, bytes = shard_bytes(engine, worker->index);
    int64_t most = INT32_MAX;
    for (int s = 0; s < worker->n_shards; s++) {
        size_t left = backend->free_memory(worker->shards[s]) / 10 * 9;
        left = left > taken ? left - taken : 0;
        most = fewer(most, (int64_t)(left / bytes) / count_sharing(engine, worker->shards[s]));
    }
    return most;
}

/* Chooses how many blocks each tier holds, where nobody said it: full contexts for all that can
 * run, and never more than the machine has free. */
static bool size_tiers(struct engine *engine, char *error) {
    struct engine_config *config = &engine->config;
    int64_t context = blocks_of(config->model->config.context_length);
    int64_t wanted = fewer(CACHED_ANSWERS * config->max_batch * context, MOST_WANTED);
    int64_t host = (int64_t)(machine_free_memory("") / 4 / part_bytes(engine, 1));
    if (config->host_blocks < 0)
        config->host_blocks = (int)fewer(wanted * HOST_FACTOR, host);
    for (int i = 0; i < config->n_workers; i++) {
        int *blocks = &config->workers[i].blocks;
        if (*blocks < 0)
            *blocks = (int)fewer(wanted, most_blocks(engine, &engine->workers[i]));
        if (*blocks < 1)
            return fail(error,
                        "room for no KV block of %zu bytes; raise --kv-device or lower --kv-host",
                        shard_bytes(engine, i));
    }
    return true;
}

static bool open_tiers(struct engine *engine, char *error) {
    const struct engine_config *config = &engine->config;
    size_t bytes = 0, host_bytes = (size_t)config->host_blocks * part_bytes(engine, 1);
    bool ok = true;
    for (int i = 0; i < config->n_workers; i++) {
        struct worker *worker = &engine->workers[i];
        for (int s = 0; s < worker->n_shards && ok; s++) {
            bytes = (size_t)config->workers[i].blocks * shard_bytes(engine, i);
            worker->shards[s]->kv = config->backend->alloc(worker->shards[s], bytes);
            ok = worker->shards[s]->kv;
        }
    }
    if (host_bytes > 0 && ok) {
        engine->host_kv = host_alloc(host_bytes);
        ok = engine->host_kv;
    }
    return ok || fail(error,
                      "no memory for KV blocks: %zu bytes on a device, %zu on the host; lower "
                      "--kv-device or --kv-host",
                      bytes, host_bytes);
}

struct sched_config engine_sched_config(const struct engine_config *config) {
    int copies = (int)(COPY_BYTES / block_bytes(&config->model->config, 1, config->kv_type));
    copies = copies < MIN_COPIES ? MIN_COPIES : copies > MAX_COPIES ? MAX_COPIES : copies;
    struct sched_config sched = {.kv = {.n_workers = config->n_workers,
                                        .host_blocks = config->host_blocks,
                                        .policy = config->policy,
                                        .ledger = config->ledger},
                                 .max_batch = config->max_batch,
                                 .chunk = config->chunk,
                                 .max_queue = config->max_queue,
                                 .copies_in_flight = copies,
                                 .context_length = config->model->config.context_length,
                                 .ends_text = config->ends_text};
    for (int i = 0; i < config->n_workers; i++) {
        sched.kv.device_blocks[i] = config->workers[i].blocks;
        sched.prefills[i] = config->workers[i].prefills;
        sched.decodes[i] = config->workers[i].decodes;
    }
    return sched;
}

static bool open_sched(struct engine *engine) {
    struct sched_config sched = engine_sched_config(&engine->config);
    size_t n = (size_t)(sched.copies_in_flight * sched.kv.n_workers);
    if (engine->config.ledger.note) /* between, to stamp the time */
        sched.kv.ledger = (struct ledger){stamp, engine};
    engine->transfers = malloc(n * sizeof *engine->transfers);
    engine->sched = sched_create(&sched);
    return engine->sched && engine->transfers;
}

/* ---- the engine ---- */

/* All conditions wait by the clock of engine_now, which nobody sets. */
static void open_locks(struct engine *engine) {
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&engine->lock, NULL);
    pthread_cond_init(&engine->copies, &monotonic);
    pthread_cond_init(&engine->news, &monotonic);
    for (int i = 0; i < MAX_WORKERS; i++)
        pthread_cond_init(&engine->workers[i].work, &monotonic);
    pthread_condattr_destroy(&monotonic);
}

/* Asked before many GB are read: weights, which the devices of the CPU share, and both tiers as far
 * as someone said how large. For what a GPU holds, upload and alloc ask. */
static bool memory_fits(const struct engine *engine, char *error) {
    const struct engine_config *config = &engine->config;
    const struct tensor *const *first = config->model->layers[0];
    double left = (double)machine_free_memory(""), weights = 0;
    double host = fmax(config->host_blocks, 0) * (double)part_bytes(engine, 1), blocks = host;
    if (config->backend->n_gpus == 0) {
        weights = engine->cost.bytes + engine->cost.expert_bytes;
        weights += first[TOKEN_EMBD] != first[OUTPUT] ? (double)first[TOKEN_EMBD]->bytes : 0;
        for (int i = 0; i < config->n_workers; i++)
            blocks += fmax(config->workers[i].blocks, 0) * config->workers[i].n_shards *
                      (double)part_bytes(engine, config->workers[i].n_shards);
    }
    if (left <= 0 || weights + blocks <= left)
        return true;
    if (blocks > 0)
        return fail(error,
                    "weights of %.1f GB and KV blocks of %.1f GB do not fit the %.1f GB of memory "
                    "that are left; lower %s",
                    1e-9 * weights, 1e-9 * blocks, 1e-9 * left,
                    host > 0.5 * blocks ? "--kv-host" : "--kv-device");
    return fail(error, "weights of %.1f GB do not fit the %.1f GB of memory that are left",
                1e-9 * weights, 1e-9 * left);
}

struct engine *engine_open(const struct engine_config *config, char *error) {
    (void)fail(error, "out of memory");
    struct engine *engine = calloc(1, sizeof *engine);
    if (!engine)
        return NULL;
    engine->config = *config;
    engine->copying = NOBODY;
    engine->cost = model_cost(config->model);
    open_locks(engine);
    engine->rope_frequency = rope_frequencies(config->model);
    bool ok = engine->rope_frequency && memory_fits(engine, error);
    for (int i = 0; i < config->n_workers && ok; i++)
        ok = open_worker(engine, i, error);
    if (ok && size_tiers(engine, error) && open_tiers(engine, error) && open_sched(engine))
        return engine;
    engine_close(engine);
    return NULL;
}

bool engine_start(struct engine *engine) {
    engine_lock(engine); /* no thread goes on before all are there */
    for (bool ok = true; ok && engine->n_started < engine->config.n_workers;) {
        struct worker *worker = &engine->workers[engine->n_started];
        ok = pthread_create(&worker->thread, NULL, worker_main, worker) == 0;
        engine->n_started += ok;
    }
    engine->carries = pthread_create(&engine->courier, NULL, courier_main, engine) == 0;
    engine->pins = engine->host_kv && engine->config.backend->pin &&
                   pthread_create(&engine->pinner, NULL, pin_main, engine) == 0;
    bool ok = engine->carries && engine->n_started == engine->config.n_workers;
    engine_unlock(engine);
    return ok;
}

static void close_worker(const struct engine *engine, struct worker *worker) {
    const struct backend *backend = engine->config.backend;
    for (int s = 0; s < worker->n_shards; s++) {
        free(worker->layers[s]);
        if (worker->shards[s]) {
            backend->release(worker->shards[s], worker->shards[s]->kv);
            backend->device_close(worker->shards[s]);
        }
    }
}

bool engine_close(struct engine *engine) {
    if (!engine)
        return true;
    engine_lock(engine);
    engine->stopping = true;
    pthread_cond_broadcast(&engine->copies);
    for (int i = 0; i < engine->n_started; i++)
        pthread_cond_signal(&engine->workers[i].work);
    engine_unlock(engine);
    if (engine->carries)
        pthread_join(engine->courier, NULL);
    if (engine->pins)
        pthread_join(engine->pinner, NULL);
    bool dead[MAX_WORKERS] = {false};
    engine_lock(engine);
    for (int i = 0; i < engine->n_started; i++)
        dead[i] = engine->workers[i].dead; /* it may hang in a step */
    engine_unlock(engine);
    for (int i = 0; i < engine->n_started; i++)
        (void)(dead[i] ? pthread_detach(engine->workers[i].thread)
                       : pthread_join(engine->workers[i].thread, NULL));
    for (int i = 0; i < engine->n_started; i++)
        if (dead[i] || engine->workers[i].dead)
            return false;
    for (int first = 0; first < engine->n_pinned; first += slab_blocks(engine))
        engine->config.backend->unpin(engine->workers[0].shards[0], host_block(engine, first));
    free(engine->host_kv);
    free(engine->transfers);
    sched_destroy(engine->sched);
    for (int i = 0; i < engine->config.n_workers; i++)
        close_worker(engine, &engine->workers[i]);
    free(engine->rope_frequency);
    for (int i = 0; i < MAX_WORKERS; i++)
        pthread_cond_destroy(&engine->workers[i].work);
    pthread_cond_destroy(&engine->news);
    pthread_cond_destroy(&engine->copies);
    pthread_mutex_destroy(&engine->lock);
    free(engine);
    return true;
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

void engine_wait(struct engine *engine, double until) {
    wait_until(engine, &engine->news, until);
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
                                 .decode = engine->decode};
    for (int i = 0; i <= engine->config.n_workers; i++)
        stats.places[i] = kv_usage(kv, i);
    engine_unlock(engine);
    return stats;
}

void engine_limits(struct engine *engine, double *read, double *ops) {
    const struct engine_config *config = &engine->config;
    struct worker *first = &engine->workers[0];
    *read = *ops = 0;
    engine_lock(engine);
    while (first->in_step && !first->dead) /* all requests may have ended meanwhile */
        engine_wait(engine, INFINITY);
    bool dead = first->dead;
    engine_unlock(engine);
    if (config->backend->limits && !dead) /* a backend need not know */
        config->backend->limits(first->shards, first->n_shards, model_main_type(config->model),
                                read, ops);
}

int engine_logits(struct engine *engine, const int *tokens, int start, int n, float *logits) {
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
    int n_good = 0;
    while (n_good < n && batch.sampled[n_good] >= 0)
        n_good++;
    free(greedy);
    free(numbers);
    return n_good;
}

/* ---- main: the code of the headers that stand around the engine is compiled here ---- */

#define GGUF_IMPLEMENTATION
#define MODEL_IMPLEMENTATION
#define TOKENIZER_IMPLEMENTATION
#define TEMPLATE_IMPLEMENTATION
#define JSON_IMPLEMENTATION
#define CLI_IMPLEMENTATION
#define WRAP_IMPLEMENTATION
#include "lib/cli.h"
#include "lib/gguf.h"
#include "lib/json.h"
#include "lib/model.h"
#include "lib/template.h"
#include "lib/tokenizer.h"

#define ANSWERS_IMPLEMENTATION
#define AUTO_IMPLEMENTATION
#define HTTP_IMPLEMENTATION
#define SERVE_IMPLEMENTATION
#define REPLAY_IMPLEMENTATION
#define SIM_IMPLEMENTATION
#define PLAN_IMPLEMENTATION
#define TERMINAL_IMPLEMENTATION
#define STATS_IMPLEMENTATION
#define TRACE_IMPLEMENTATION
#define WATCH_IMPLEMENTATION
#define EVALUATE_IMPLEMENTATION
#define RUN_IMPLEMENTATION
#include "app/answers.h"
#include "app/auto.h"
#include "app/evaluate.h"
#include "app/plan.h"
#include "app/replay.h"
#include "app/run.h"
#include "app/sim.h"
#include "app/stats.h"
#include "app/terminal.h"
#include "app/trace.h"
#include "app/watch.h"

int main(int argc, char **argv) {
    return run_program(argc, argv);
}
