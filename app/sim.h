/* sim.h: a cluster that need not be there: the scheduler and the cache of a real run, whose steps
 * and copies take the time that they would take, by a clock that nobody waits for.
 *
 *     struct cluster cluster;
 *     if (cluster_open(&cluster, "--sim", "2xh100x8", NULL, error) &&
 *         cluster_fit(&cluster, &config, error)) {
 *         struct sim *sim = sim_open(&cluster, &config, load, error);
 *         ok = sim_run(sim, error);  // 100,000 requests: some two minutes
 *         sim_close(sim);
 *     }
 *
 * What is decided is decided by the object code of scheduler.c and kvcache.c, which has no clock
 * and no device and so does not know. This file has what dynamo.c has threads and a backend for:
 * when each step and each copy ends. Nothing is computed: the tokens of answers are a function of
 * the request and the position.
 *
 *     a step    as long as its shards read or compute, whichever takes longer (a roofline), and
 *               what launches take; two all-reduces a layer of shards on several chips
 *     a copy    from when its ports are free, first come, first served: a chip has one out and one
 *               in to its peers, to its host, to other nodes, and within its memory. So transfers
 *               contend.
 *     a chip    that several workers share does their steps side by side, each more slowly
 *
 * The same arguments give the same bytes of output: what happens at one time happens in the order
 * in which it was made. All rates stand in one table; --rates replaces them by measured ones, a
 * line each, `h100 read_bytes_per_second 2.97e12` (`*1.2`: times the table's), without a chip for
 * any. The weights are not read. Refuses: to guess what a chip that is not in the table does, and
 * models that do not fit.
 * Read next: sim_run, then step_cost in dynamo.c. */
#ifndef SIM_H
#define SIM_H

#include "replay.h"

struct chip { /* a GPU, or all cores of a CPU; rates are each way, a second */
    const char *name;
    double memory, read;               /* bytes; as much as programs reach, as of operations */
    double operations, fp8_operations; /* of dense products; a multiply-add is two */
    double peer, host, network; /* bytes to another of its node (0: by its host's link), to its
                                        * host's memory, to another node */
    double host_memory;         /* bytes of a node */
    double layer, step, reduce, copy; /* seconds: launching a layer, and what else a step takes; an
                                        * all-reduce, a copy of nothing */
    int chunk;                        /* what its backend has by default */
    enum kv_type kv_type;
    double urgent, other; /* of a chip that both share: what a decode step has, and another */
    double sample; /* seconds that a token takes besides: its row's own work, and drawing it */
};

struct cluster {
    struct chip chip;
    const char *name;
    int n_nodes, node_chips; /* chips of a node; of a CPU: its devices, which are one chip */
    bool is_cpu;
    int n_devices; /* of all nodes; 0: a CPU, and nobody said how many */
};

/* option: that which names it, for `error`; rates: a file of measured ones, or NULL. False: `error`
 * is one line. */
bool cluster_open(struct cluster *cluster, const char *option, const char *name, const char *rates,
                  char *error);
/* Checks that each worker's part of the model fits, and chooses the numbers of blocks that are
 * -1. */
bool cluster_fit(const struct cluster *cluster, struct engine_config *config, char *error);

struct sim;
/* NULL: `error`. What it is given outlives it. */
struct sim *sim_open(const struct cluster *cluster, const struct engine_config *config,
                     struct load *load, char *error);
/* Until the load is done. False: it does not go on, which is a fault of the scheduler. */
bool sim_run(struct sim *sim, char *error);
struct sched *sim_sched(struct sim *sim);
double sim_now(const struct sim *sim);
void sim_close(struct sim *sim);

#endif /* SIM_H */

#ifdef SIM_IMPLEMENTATION
#undef SIM_IMPLEMENTATION

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

/* ---- chips ---- */

/* Data sheets: H100 SXM (80 GB, 3.35 TB/s, 989 and 1979 dense TFLOP/s, NVLink 900 GB/s both ways
 * together, PCIe 5); H200 SXM (141 GB, 4.8 TB/s, else the same); B200 in a DGX (180 GB, 8 TB/s,
 * 2250 and 4500 dense, NVLink 1800); A100 SXM 80 GB (2.04 TB/s, 312, no FP8, NVLink 600, PCIe 4);
 * L40S (48 GB, 864 GB/s, 362 and 733 dense, no NVLink, PCIe 4). A node as in a DGX of its time: 400
 * Gb/s of InfiniBand a GPU (A100: 200), 2 TB of host memory; the L40S in a server with 200 and 1
 * TB. Measured, all on an H100 (commit f79dd72): a pinned copy 55 of PCIe's 64 GB/s, likewise half
 * of that by PCIe 4; decode of Llama-3.1-8B at 176 tokens/s with one stream, which is 0.9 of `read`
 * and 18 us a layer, and prefill of 8192 at 33,100, which is 0.55 of the peak: the others are taken
 * to reach as much; on one chip a decode step beside a prefill step takes 2.5 times as long (and
 * that, it is assumed, has the rest). All-reduce latency: about what NCCL has among 8. The CPU: two
 * cores of a Xeon with AVX-512, in F32; shares on two of an EPYC. */
static const struct chip sim_chips[] = {
    {"h100", 80e9, .9 * 3.35e12, .55 * 989e12, .55 * 1979e12, 450e9, 55e9, 50e9, 2e12, 18e-6, 5e-5,
     1e-5, 3e-5, 2048, KV_BF16, .4, .6, 0},
    {"h200", 141e9, .9 * 4.8e12, .55 * 989e12, .55 * 1979e12, 450e9, 55e9, 50e9, 2e12, 18e-6, 5e-5,
     1e-5, 3e-5, 2048, KV_BF16, .4, .6, 0},
    {"b200", 180e9, .9 * 8e12, .55 * 2250e12, .55 * 4500e12, 900e9, 55e9, 50e9, 2e12, 18e-6, 5e-5,
     1e-5, 3e-5, 2048, KV_BF16, .4, .6, 0},
    {"a100", 80e9, .9 * 2.04e12, .55 * 312e12, .55 * 312e12, 300e9, 26e9, 25e9, 2e12, 18e-6, 5e-5,
     1e-5, 3e-5, 2048, KV_BF16, .4, .6, 0},
    {"l40s", 48e9, .9 * 864e9, .55 * 362e12, .55 * 733e12, 0, 26e9, 25e9, 1e12, 18e-6, 5e-5, 3e-5,
     3e-5, 2048, KV_BF16, .4, .6, 0},
    {"cpu", 16e9, 27e9, 235e9, 235e9, 8e9, 8e9, 1e9, 16e9, 5e-6, 3e-5, 0, 5e-5, 256, KV_F32, .65,
     .55, 3e-3},
};
enum { SIM_CHIPS = sizeof sim_chips / sizeof *sim_chips };

#define RATE(name, field)                                                                          \
    { name, offsetof(struct chip, field) }
static const struct sim_rate {
    const char *name;
    size_t offset;
} sim_rates[] = {
    RATE("memory_bytes", memory),
    RATE("host_memory_bytes", host_memory),
    RATE("read_bytes_per_second", read),
    RATE("operations_per_second", operations),
    RATE("fp8_operations_per_second", fp8_operations),
    RATE("peer_bytes_per_second", peer),
    RATE("host_bytes_per_second", host),
    RATE("network_bytes_per_second", network),
    RATE("layer_seconds", layer),
    RATE("step_seconds", step),
    RATE("all_reduce_seconds", reduce),
    RATE("copy_seconds", copy),
    RATE("urgent_share", urgent),
    RATE("other_share", other),
    RATE("sample_seconds", sample),
};
#undef RATE
enum { SIM_RATES = sizeof sim_rates / sizeof *sim_rates };

static const struct chip *sim_find_chip(const char *name) {
    for (int i = 0; i < SIM_CHIPS; i++)
        if (strcasecmp(name, sim_chips[i].name) == 0)
            return &sim_chips[i];
    return NULL;
}

/* A line of a file of rates: [CHIP] NAME [*]NUMBER. False: it is none, or `given` has that rate. */
static bool sim_read_rate(struct chip *chip, const char *line, unsigned *given) {
    char words[3][32], more, *end;
    int n = sscanf(line, "%31s %31s %31s %c", words[0], words[1], words[2], &more);
    if (n != 2 && n != 3)
        return n < 1;
    bool times = *words[n - 1] == '*';
    double value = strtod(words[n - 1] + times, &end);
    if ((n == 3 && !sim_find_chip(words[0])) || *end || end == words[n - 1] + times ||
        !(value >= 0 && value < 1e30))
        return false;
    for (int i = 0; i < SIM_RATES; i++)
        if (strcmp(words[n - 2], sim_rates[i].name) == 0) {
            double *rate = (double *)((char *)chip + sim_rates[i].offset);
            unsigned bit = (unsigned)(n == 2 || strcasecmp(words[0], chip->name) == 0) << i;
            bool again = *given & bit; /* of this chip */
            *rate = !bit ? *rate : times ? *rate * value : value;
            *given |= bit;
            return !again;
        }
    return false;
}

static bool sim_read_rates(struct chip *chip, const char *path, char *error) {
    size_t length;
    unsigned given = 0; /* a bit for each rate that is of this chip */
    char *text = cli_read_file(path, &length, error), *rest = text, *line;
    bool ok = text;
    for (int number = 1; ok && (line = strsep(&rest, "\n")) != NULL; number++) {
        line[strcspn(line, "#")] = 0;
        ok = sim_read_rate(chip, line, &given) ||
             fail(error, "%.300s:%d: got %.60s, expected a rate, such as %s 2.9e12, once", path,
                  number, line, sim_rates[2].name);
    }
    free(text);
    if (ok && given == 0)
        return fail(error, "%.300s: no rate of a %s in it", path, chip->name);
    if (ok && !(chip->read >= 1 && chip->operations >= 1 && chip->fp8_operations >= 1 &&
                chip->host >= 1 && chip->network >= 1 && (chip->peer == 0 || chip->peer >= 1) &&
                chip->urgent > 0 && chip->urgent < 1 && chip->other > 0 && chip->other < 1))
        return fail(error, "%.300s: a rate is below 1 a second, or a share not between 0 and 1",
                    path);
    return ok;
}

/* [NODESx]CHIP[xGPUS], cpu[:DEVICES], in letters of either case. False: it is none. */
static bool sim_parse(struct cluster *cluster, const char *name) {
    char chip[8], mark[2] = "x", number[6] = "1", more;
    int nodes = 1, start = 0;
    *cluster = (struct cluster){.name = name};
    if (*name >= '0' && *name <= '9' && (sscanf(name, "%5d%*1[xX]%n", &nodes, &start), start == 0))
        return false;
    int n = sscanf(name + start, "%7[^xX:]%1[xX:]%5[0-9]%c", chip, mark, number, &more);
    const struct chip *found = n == 1 || n == 3 ? sim_find_chip(chip) : NULL;
    int each = atoi(number);
    cluster->is_cpu = found && strcmp(found->name, "cpu") == 0;
    if (!found || nodes < 1 || each < 1 || nodes > VALUE_DEVICES || each > VALUE_DEVICES / nodes ||
        (*mark == ':' && (!cluster->is_cpu || start > 0)))
        return false;
    cluster->chip = *found;
    cluster->n_nodes = nodes;
    cluster->node_chips = strcasecmp(name, "cpu") == 0 ? 0 : each;
    cluster->n_devices = nodes * cluster->node_chips;
    return true;
}

bool cluster_open(struct cluster *cluster, const char *option, const char *name, const char *rates,
                  char *error) {
    if (!sim_parse(cluster, name)) {
        int n = snprintf(error, ERROR_LENGTH,
                         "%s: got %.60s, expected CHIP[xGPUS] or NODESxCHIP[xGPUS] such as "
                         "2xh100x8, %d GPUs at most, or cpu:DEVICES; CHIP:",
                         option, name, VALUE_DEVICES);
        for (int i = 0; i < SIM_CHIPS; i++)
            n += snprintf(error + n, ERROR_LENGTH - (size_t)n, "%s %s", i > 0 ? "," : "",
                          sim_chips[i].name);
        return false;
    }
    return !rates || sim_read_rates(&cluster->chip, rates, error);
}

/* ---- what fits ---- */

static int cluster_node(const struct cluster *cluster, int device) {
    return cluster->node_chips > 0 ? device / cluster->node_chips : 0;
}

static int cluster_chip(const struct cluster *cluster, int device) { /* whose it is */
    return cluster->is_cpu ? cluster_node(cluster, device) : device;
}

/* Bytes of the weights of one of n shards. */
static double sim_weights(const struct model *model, int n) {
    double bytes = 0;
    for (int i = 0; i < N_MODEL_TENSORS; i++) {
        const struct model_tensor *kind = &model_tensors[i];
        int layers = model_layered(kind) ? model->config.n_layers : 1;
        for (int layer = 0; layer < layers && kind->role != NO_ROLE; layer++) {
            const struct tensor *tensor = model->layers[layer][kind->role];
            bool again = kind->role == OUTPUT && tensor == model->layers[0][TOKEN_EMBD];
            if (tensor && !again)
                bytes += (double)tensor->bytes / (kind->slice == SLICE_WHOLE ? 1 : n);
        }
    }
    return bytes;
}

static bool sim_does_not_fit(const struct cluster *cluster, const struct engine_config *config,
                             int n_shards, double weights, char *error) {
    char hint[80] = "no --tp is enough";
    double most = .9 * cluster->chip.memory;
    for (int n = MAX_SHARDS; n >= 1 && !cluster->is_cpu; n /= 2) {
        struct device wanted = {.config = &config->model->config, .n_shards = n};
        if (n <= cluster->n_devices && device_fits(&wanted, error) &&
            sim_weights(config->model, n) < most)
            (void)snprintf(hint, sizeof hint, "they fit with --tp %d", n);
    }
    return fail(error,
                "weights of %.1f GB a device and KV blocks do not fit nine tenths of the memory of "
                "a %s, %.1f GB, with --tp %d; %s",
                1e-9 * weights, cluster->chip.name, 1e-9 * most, n_shards, hint);
}

bool cluster_fit(const struct cluster *cluster, struct engine_config *config, char *error) {
    const struct model_config *model = &config->model->config;
    double host = cluster->n_nodes * cluster->chip.host_memory /
                  (double)block_bytes(model, 1, config->kv_type);
    if (config->host_blocks < 0)
        config->host_blocks = (int)fmin(.25 * host, INT32_MAX / 64);
    if (config->host_blocks > host)
        return fail(error, "--kv-host: got %d blocks, the hosts of %.60s have room for %.0f",
                    config->host_blocks, cluster->name, floor(host));
    int sharing[VALUE_DEVICES] = {0}; /* devices that are a chip; the weights that it has, … */
    double weights[VALUE_DEVICES] = {0};
    uint64_t has[VALUE_DEVICES] = {0}; /* … which workers share: bit n + i is shard i of n */
    for (int w = 0; w < config->n_workers; w++)
        for (int s = 0; s < config->workers[w].n_shards; s++) {
            int device = config->workers[w].devices[s];
            if (device >= cluster->n_devices && cluster->n_devices > 0)
                return fail(error, "--devices: got %d, %.60s has %d", device, cluster->name,
                            cluster->n_devices);
            int chip = cluster_chip(cluster, device), n = config->workers[w].n_shards;
            uint64_t bit = (uint64_t)1 << (cluster->is_cpu ? 1 : n + s);
            sharing[chip]++;
            weights[chip] +=
                has[chip] & bit ? 0 : sim_weights(config->model, cluster->is_cpu ? 1 : n);
            has[chip] |= bit;
        }
    for (int w = 0; w < config->n_workers; w++) {
        int n = config->workers[w].n_shards, *blocks = &config->workers[w].blocks;
        struct device wanted = {.config = model, .n_shards = n};
        if (!device_fits(&wanted, error))
            return false;
        double bytes = (double)block_bytes(model, n, config->kv_type);
        int most = INT32_MAX / 64, least = 0; /* the chip with the least room */
        for (int s = 0; s < n; s++) {
            int chip = cluster_chip(cluster, config->workers[w].devices[s]);
            double left = .9 * cluster->chip.memory - weights[chip];
            int room = (int)fmin(most, fmax(left / sharing[chip] / bytes, 0));
            least = s == 0 || room < most ? chip : least;
            most = room;
        }
        if (most < 1)
            return sim_does_not_fit(cluster, config, n, weights[least], error);
        if (*blocks > most)
            return fail(error,
                        "--kv-device: got %d blocks, a %s has room for %d beside the weights",
                        *blocks, cluster->chip.name, most);
        *blocks = *blocks < 0 ? most : *blocks;
    }
    return true;
}

/* ---- events ---- */

struct sim_worker {
    struct step *step; /* NULL: it is idle */
    double start;      /* of the step */
    double left;       /* seconds of work, of a chip for itself, … */
    double since;      /* … left at this time; … */
    double speed;      /* … it does so many of them in a second */
    int64_t serial;    /* of the event of its end; others of it are void */
    int n_chips;       /* different ones, that its shards are on */
    int next;          /* another worker on one of its chips; those are a ring */
    double link;       /* bytes a second between its shards */
};

struct sim_copy {
    struct kv_copy_order order;
    double start;
    int next; /* of those that are free */
};

enum { SIM_PEER, SIM_HOST, SIM_NET, SIM_WITHIN, SIM_LINKS }; /* the last: of a chip's memory */

struct sim {
    const struct cluster *cluster;
    const struct engine_config *config;
    struct load *load;
    struct sched *sched;
    struct model_cost cost;
    double output_bytes, now;
    struct sim_worker workers[MAX_WORKERS];
    uint64_t orders[MAX_WORKERS / 64]; /* a bit for each worker that may have copies to start */
    /* what ends: a worker's step, if the index is below the number of workers, or a copy */
    struct agenda events;
    int64_t n_made;
    struct sim_copy *copies;                   /* those on their way, and … */
    int free_copy;                             /* … the first of the others; -1: none */
    double ports[VALUE_DEVICES][SIM_LINKS][2]; /* when a chip's are free, out of it and into it */
    uint16_t *home;                            /* (host_blocks) the node where a slot's block is */
};

static int64_t sim_push(struct sim *sim, double time, int index) {
    agenda_add(&sim->events, (struct moment){time, sim->n_made, .index = index});
    return sim->n_made++;
}

/* What the scheduler notes has no times; what it orders is to be carried. */
static void sim_note(void *context, const struct event *event) {
    struct sim *sim = context;
    if (event->kind == EVENT_COPY_ORDERED) {
        int worker = event->to < sim->config->n_workers ? event->to : event->from;
        sim->orders[worker / 64] |= (uint64_t)1 << worker % 64;
    }
    if (!sim->config->ledger.note)
        return;
    struct event stamped = *event;
    stamped.start = event->start > 0 ? event->start : sim->now;
    stamped.end = sim->now;
    note(&sim->config->ledger, &stamped);
}

/* ---- steps ---- */

/* Seconds of a step of a worker that has its chips for itself. The output is multiplied on the
 * first shard alone, and only if a token is sampled. */
static double sim_step_seconds(const struct sim *sim, int worker, const struct batch *batch) {
    const struct chip *chip = &sim->cluster->chip;
    const struct model_config *model = &sim->config->model->config;
    struct step_cost cost = step_cost(model, &sim->cost, sim->config->kv_type, batch);
    bool fp8 = model_main_type(sim->config->model) == TYPE_FP8;
    double n = sim->workers[worker].n_chips, rows = batch->n_rows;
    double products = 2 * rows * sim->cost.row_weights;
    double samples = 2 * batch->n_samples * sim->cost.sample_weights;
    double attention = cost.operations - products - samples;
    double bytes = (cost.bytes - sim->output_bytes) / n + (samples > 0 ? sim->output_bytes : 0);
    double computes = (products / n + samples) / (fp8 ? chip->fp8_operations : chip->operations) +
                      attention / n / chip->operations;
    double reduce = 2 * (n - 1) / n * rows * model->d_model * 2 / sim->workers[worker].link;
    double layer = chip->layer + (n > 1 ? 2 * (reduce + chip->reduce) : 0);
    return fmax(bytes / chip->read, computes) + model->n_layers * layer + chip->step +
           batch->n_samples * chip->sample;
}

/* Those that run on a worker's chip share it anew: prefill among themselves, decode likewise. */
static void sim_share(struct sim *sim, int worker) {
    const struct chip *chip = &sim->cluster->chip;
    int n[2] = {0}, i = worker; /* steps of workers that only prefill; of others */
    do
        n[sim->config->workers[i].decodes] += sim->workers[i].step != NULL;
    while ((i = sim->workers[i].next) != worker);
    do {
        struct sim_worker *w = &sim->workers[i];
        bool decodes = sim->config->workers[i].decodes;
        double share = n[!decodes] == 0 ? 1 : decodes ? chip->urgent : chip->other;
        if (w->step && w->speed * n[decodes] != share) {
            w->left -= (sim->now - w->since) * w->speed;
            w->since = sim->now;
            w->speed = share / n[decodes];
            w->serial = sim_push(sim, sim->now + fmax(w->left, 0) / w->speed, i);
        }
    } while ((i = sim->workers[i].next) != worker);
}

/* Asks an idle worker for its next step. */
static void sim_begin(struct sim *sim, int worker) {
    struct sim_worker *w = &sim->workers[worker];
    struct step *step = sched_next(sim->sched, worker, sim->now);
    if (!step)
        return;
    w->step = step;
    w->start = w->since = sim->now;
    w->speed = 0;
    w->left = sim_step_seconds(sim, worker, &step->batch);
    sim_share(sim, worker);
}

static int sim_token(const struct sim *sim, const struct request *r) { /* a made-up one */
    uint64_t bits = answers_random(answers_random(0, (uint64_t)r->id), (uint64_t)r->length);
    return (int)(bits % (uint64_t)sim->config->model->config.vocab_size);
}

static void sim_step_ends(struct sim *sim, int worker) {
    struct sim_worker *w = &sim->workers[worker];
    struct step *step = w->step;
    const struct batch *batch = &step->batch;
    bool lost = sched_is_lost(sim->sched, worker); /* its requests may be gone */
    int n = lost ? 0 : batch->n_sequences;
    for (int i = 0; i < batch->n_samples && !lost; i++)
        batch->sampled[i] =
            sim_token(sim, step->requests[batch->row_sequence[batch->sample_row[i]]]);
    if (!lost)
        sim_note(sim,
                 &(struct event){EVENT_STEP, .start = w->start, .worker = worker, .step = step});
    sched_done(sim->sched, worker, step, sim->now);
    w->step = NULL;
    for (int i = 0; i < n; i++)
        if ((i == 0 || step->requests[i] != step->requests[i - 1]) && /* see add_rows */
            step->requests[i]->state == REQUEST_FINISHED)
            load_ended(sim->load, step->requests[i], sim->now);
    if (w->next != worker)
        sim_share(sim, worker);
    sim_begin(sim, worker);
}

/* ---- copies ---- */

/* When a piece of a block has gone from a device to another; it holds its ports meanwhile. -1: its
 * node's host, or another's. */
static double sim_piece(struct sim *sim, const int chips[2], bool abroad, double bytes) {
    const struct chip *chip = &sim->cluster->chip;
    bool peers = chips[0] >= 0 && chips[1] >= 0;
    bool within = peers && chips[0] == chips[1] && !sim->cluster->is_cpu; /* read and written */
    bool linked = peers && !within && !abroad && chip->peer > 0;
    const bool uses[SIM_LINKS] = {linked, !linked && !within && !(peers && abroad), abroad, within};
    const double rates[SIM_LINKS] = {chip->peer, chip->host, chip->network, chip->read / 2};
    double *ports[2 * SIM_LINKS], start = sim->now, rate = INFINITY;
    int n = 0;
    for (int link = 0; link < SIM_LINKS; link++)
        for (int end = 0; end < 2 && uses[link]; end++) {
            rate = fmin(rate, rates[link]);
            if (chips[end] >= 0)
                ports[n++] = &sim->ports[chips[end]][link][end];
        }
    for (int i = 0; i < n; i++)
        start = fmax(start, *ports[i]);
    for (int i = 0; i < n; i++)
        *ports[i] = start + bytes / rate;
    return start + bytes / rate;
}

/* When a copy that starts now ends: its pieces, as many as the wider place has shards, go side by
 * side as far as they use other ports. A block on the host is in the memory of the node whose
 * worker put it there. */
static double sim_copy_end(struct sim *sim, const struct kv_copy_order *order) {
    const struct cluster *cluster = sim->cluster;
    const struct engine_config *config = sim->config;
    int host = config->n_workers, ends[2] = {order->from, order->to}, shards[2], n = 1;
    for (int i = 0; i < 2; i++) {
        shards[i] = ends[i] == host ? 1 : config->workers[ends[i]].n_shards;
        n = shards[i] > n ? shards[i] : n;
    }
    double bytes = (double)block_bytes(&config->model->config, n, config->kv_type), last = sim->now;
    for (int p = 0; p < n; p++) {
        int chips[2] = {-1, -1}, nodes[2] = {0};
        for (int i = 0; i < 2; i++) {
            if (ends[i] == host)
                continue;
            int device = config->workers[ends[i]].devices[p * shards[i] / n];
            chips[i] = cluster_chip(cluster, device);
            nodes[i] = cluster_node(cluster, device);
        }
        if (ends[1] == host)
            sim->home[order->to_slot] = (uint16_t)(nodes[1] = nodes[0]);
        else if (ends[0] == host)
            nodes[0] = sim->home[order->from_slot];
        last = fmax(last, sim_piece(sim, chips, nodes[0] != nodes[1], bytes));
    }
    return last + cluster->chip.copy;
}

/* Starts what a worker may copy now. */
static void sim_carry(struct sim *sim, int worker) {
    struct kv_copy_order order;
    while (sched_copies(sim->sched, worker, &order, 1) > 0) {
        int i = sim->free_copy;
        sim->free_copy = sim->copies[i].next;
        sim->copies[i].order = order;
        sim->copies[i].start = sim->now;
        (void)sim_push(sim, sim_copy_end(sim, &order), sim->config->n_workers + i);
    }
}

static void sim_copy_ends(struct sim *sim, int i) {
    struct sim_copy *copy = &sim->copies[i];
    const struct kv_copy_order *order = &copy->order;
    int host = sim->config->n_workers;
    bool ok = (order->from == host || !sched_is_lost(sim->sched, order->from)) &&
              (order->to == host || !sched_is_lost(sim->sched, order->to));
    if (ok)
        sim_note(sim, &(struct event){EVENT_COPY, .start = copy->start, .worker = order->worker,
                                      .node = order->node, .from = order->from, .to = order->to});
    sched_copied(sim->sched, order, ok, sim->now);
    sim->orders[order->worker / 64] |= (uint64_t)1 << order->worker % 64;
    copy->next = sim->free_copy;
    sim->free_copy = i;
}

/* ---- the run ---- */

/* Idle workers that the last event concerns get steps, and copies start: of those workers alone. */
static void sim_serve(struct sim *sim) {
    for (int w; (w = sched_concerned(sim->sched)) >= 0;)
        if (!sim->workers[w].step)
            sim_begin(sim, w);
    for (int i = 0; i < MAX_WORKERS / 64; i++)
        for (; sim->orders[i] != 0; sim->orders[i] &= sim->orders[i] - 1)
            sim_carry(sim, 64 * i + __builtin_ctzll(sim->orders[i]));
}

bool sim_run(struct sim *sim, char *error) {
    load_start(sim->load, sim->now, sched_longest(sim->sched));
    while (!load_is_done(sim->load) && !ferror_unlocked(stdout)) { /* else nobody reads it */
        double arrival = load_next(sim->load), expiry = sched_next_event(sim->sched);
        double end = sim->events.n > 0 ? sim->events.heap[0].time : INFINITY;
        double now = fmin(arrival, fmin(end, expiry));
        if (now == INFINITY)
            return fail(error, "requests wait for what never comes"); /* a fault of the scheduler */
        sim->now = fmax(sim->now, now);
        if (end == now) {
            struct moment event = agenda_take(&sim->events);
            int copy = event.index - sim->config->n_workers;
            if (copy >= 0)
                sim_copy_ends(sim, copy);
            else if (event.serial == sim->workers[event.index].serial)
                sim_step_ends(sim, event.index);
        } else if (arrival == now) {
            struct request *r = load_take(sim->load);
            sched_submit(sim->sched, r, sim->now);
            if (r->state == REQUEST_FINISHED)
                load_ended(sim->load, r, sim->now);
        } else {
            sched_expire(sim->sched, sim->now);
            load_sweep(sim->load, sim->now);
        }
        sim_serve(sim);
    }
    return true;
}

/* ---- opening and closing ---- */

/* Which workers share a chip, and what lies between a worker's shards. */
static void sim_open_worker(struct sim *sim, int index, int last_on[VALUE_DEVICES]) {
    const struct cluster *cluster = sim->cluster;
    const int *devices = sim->config->workers[index].devices;
    struct sim_worker *worker = &sim->workers[index];
    worker->next = index;
    worker->link = cluster->chip.peer > 0 ? cluster->chip.peer : cluster->chip.host;
    for (int i = 0; i < sim->config->workers[index].n_shards; i++) {
        int *last = &last_on[cluster_chip(cluster, devices[i])], other = *last - 1;
        if (other >= 0 && worker->next == index && other != index) {
            worker->next = sim->workers[other].next;
            sim->workers[other].next = index;
        }
        worker->n_chips += other != index;
        *last = index + 1;
        if (cluster_node(cluster, devices[i]) != cluster_node(cluster, devices[0]))
            worker->link = fmin(worker->link, cluster->chip.network);
    }
}

struct sim *sim_open(const struct cluster *cluster, const struct engine_config *config,
                     struct load *load, char *error) {
    struct sched_config sched = engine_sched_config(config);
    int n_copies = sched.copies_in_flight * config->n_workers, last_on[VALUE_DEVICES] = {0};
    struct sim *sim = calloc(1, sizeof *sim);
    (void)fail(error, "out of memory");
    if (!sim)
        return NULL;
    sim->cluster = cluster;
    sim->config = config;
    sim->load = load;
    sim->now = 1; /* a time of 0 is none */
    sim->cost = model_cost(config->model);
    sim->output_bytes = (double)config->model->layers[0][OUTPUT]->bytes;
    for (int w = 0; w < config->n_workers; w++)
        sim_open_worker(sim, w, last_on);
    sched.kv.ledger = (struct ledger){sim_note, sim};
    sim->sched = sched_create(&sched);
    sim->copies = calloc((size_t)n_copies, sizeof *sim->copies);
    sim->home = calloc((size_t)config->host_blocks + 1, sizeof *sim->home);
    if (!sim->sched || !sim->copies || !sim->home) {
        sim_close(sim);
        return NULL;
    }
    for (int i = 0; i < n_copies; i++)
        sim->copies[i].next = i + 1 < n_copies ? i + 1 : -1;
    return sim;
}

struct sched *sim_sched(struct sim *sim) {
    return sim->sched;
}

double sim_now(const struct sim *sim) {
    return sim->now;
}

void sim_close(struct sim *sim) {
    if (!sim)
        return;
    sched_destroy(sim->sched);
    free(sim->copies);
    free(sim->home);
    free(sim->events.heap);
    free(sim);
}

#endif /* SIM_IMPLEMENTATION */
