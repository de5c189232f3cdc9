/* test_sim.c: virtual time beside what is known of queues: one server and four, with Poisson
 * arrivals and equal requests; what steps and copies cost beside sums done by hand; that memory
 * does not grow with a load, that the same arguments give the same bytes, that what cannot be is
 * refused in a line; and that the scheduler, given what a real run gave it, decides again what it
 * decided then. */
#define _GNU_SOURCE
#include "../dynamo.h"
#include <pthread.h>

/* ---- what dynamo.c asks of the scheduler, and what it is told, is written down ---- */

enum call { CALL_SUBMIT, CALL_NEXT, CALL_DONE, CALL_COPIES, CALL_COPIED, CALL_CONCERNED };
enum { MOST_CALLS = 1 << 17, MOST_REQUESTS = 64, MOST_TOKENS = 1 << 20 };

static struct record {
    enum call call;
    double now;
    int worker;
    struct kv_copy_order order;
    uint64_t result;
    int first_token, n_tokens; /* of `noted`: tokens that were sampled, or of a prompt */
    int max_new;
} records[MOST_CALLS];
static int noted[MOST_TOKENS], n_records, n_noted;
static bool recording; /* all under the engine's lock */

static struct record *record(enum call call, int worker, double now) {
    static struct record none;
    if (!recording || n_records == MOST_CALLS)
        return &none;
    struct record *r = &records[n_records++];
    *r = (struct record){.call = call, .worker = worker, .now = now, .first_token = n_noted};
    return r;
}

static void record_tokens(struct record *r, const int *from, int n) {
    for (int i = 0; i < n && recording && n_noted < MOST_TOKENS; i++, r->n_tokens++)
        noted[n_noted++] = from[i];
}

static uint64_t mixed(uint64_t hash, int value) {
    return (hash ^ (uint64_t)(unsigned)value) * 0x9e3779b97f4a7c15u + 1;
}

/* All that a step says: which requests, which rows, which slots. */
static uint64_t step_hash(const struct step *step) {
    uint64_t hash = step ? 1 : 0;
    for (int i = 0; step && i < step->batch.n_sequences; i++) {
        hash = mixed(hash, (int)step->requests[i]->id);
        hash = mixed(hash, step->batch.sequence[i].start);
        hash = mixed(hash, step->batch.sequence[i].n_rows);
    }
    for (int i = 0; step && i < step->batch.n_blocks; i++)
        hash = mixed(hash, step->batch.block_table[i]);
    return hash;
}

static uint64_t order_hash(const struct kv_copy_order *order) {
    uint64_t hash = mixed(mixed(1, order->worker), order->node);
    return mixed(mixed(mixed(mixed(hash, order->from), order->to), order->from_slot),
                 order->to_slot);
}

static void noted_submit(struct sched *sched, struct request *r, double now) {
    struct record *to = record(CALL_SUBMIT, 0, now);
    to->max_new = r->max_new;
    record_tokens(to, r->tokens, r->n_prompt);
    sched_submit(sched, r, now);
}

static struct step *noted_next(struct sched *sched, int worker, double now) {
    struct step *step = sched_next(sched, worker, now);
    record(CALL_NEXT, worker, now)->result = step_hash(step);
    return step;
}

static void noted_done(struct sched *sched, int worker, struct step *step, double now) {
    record_tokens(record(CALL_DONE, worker, now), step->batch.sampled, step->batch.n_samples);
    sched_done(sched, worker, step, now);
}

static int noted_copies(struct sched *sched, int worker, struct kv_copy_order *orders, int most) {
    int n = sched_copies(sched, worker, orders, most);
    record(CALL_COPIES, worker, 0)->result = n > 0 ? order_hash(orders) : 0;
    return n;
}

static struct { /* copies; n_workers 0: nobody counts */
    int n_workers, good, failed, wrong, told;
} counted;

static void noted_copied(struct sched *sched, const struct kv_copy_order *order, bool ok,
                         double now) {
    const int places[] = {order->from, order->to};
    bool lost = false;
    for (int i = 0; i < 2; i++)
        lost = lost || (places[i] < counted.n_workers && sched_is_lost(sched, places[i]));
    *(ok ? &counted.good : &counted.failed) += 1;
    counted.wrong += ok == lost;
    record(CALL_COPIED, order->worker, now)->order = *order;
    sched_copied(sched, order, ok, now);
}

static int noted_concerned(struct sched *sched) {
    int worker = sched_concerned(sched);
    record(CALL_CONCERNED, 0, 0)->result = (uint64_t)(worker + 1);
    return worker;
}

#define main            dynamo_main
#define sched_submit    noted_submit
#define sched_next      noted_next
#define sched_done      noted_done
#define sched_copies    noted_copies
#define sched_copied    noted_copied
#define sched_concerned noted_concerned
#include "../dynamo.c"
#undef main
#undef sched_submit
#undef sched_next
#undef sched_done
#undef sched_copies
#undef sched_copied
#undef sched_concerned
#include "check.h"

#include <stdlib.h>

/* ---- runs in virtual time ---- */

static struct model model;
static bool *ends_text;
static double fails_at; /* the last worker; 0: never */

/* n workers of one GPU each, of which the first prefill; 0: each does both. */
static struct engine_config make_config(int n, int n_prefill, int chunk, int blocks) {
    struct engine_config config = {.model = &model,
                                   .ends_text = ends_text,
                                   .n_workers = n,
                                   .max_batch = 64,
                                   .chunk = chunk,
                                   .kv_type = KV_BF16};
    for (int w = 0; w < n; w++) {
        config.workers[w].devices[0] = w;
        config.workers[w].n_shards = 1;
        config.workers[w].blocks = blocks;
        config.workers[w].prefills = n_prefill == 0 || w < n_prefill;
        config.workers[w].decodes = n_prefill == 0 || w >= n_prefill;
    }
    return config;
}

struct outcome {
    struct load_result load;
    struct sched_stats sched;
};

static struct outcome run_load_in(struct check *check, struct engine_config *config,
                                  const char *replay, double rate, int limit) {
    static const struct request_spec defaults = {.n = -1};
    struct answers answers = {.vocab_size = model.config.vocab_size, .seed = 1};
    const struct load_options options = {
        .replay = replay, .rate = rate, .limit = limit, .answers = &answers, .defaults = &defaults};
    char error[ERROR_LENGTH] = "", name[32];
    struct outcome outcome = {0};
    struct cluster cluster;
    (void)snprintf(name, sizeof name, "h100x%d", config->n_workers);
    struct load *load = load_open(&options, error);
    bool fits =
        cluster_open(&cluster, "--sim", name, NULL, error) && cluster_fit(&cluster, config, error);
    struct sim *sim = fits && load ? sim_open(&cluster, config, load, error) : NULL;
    if (sim && fails_at > 0)
        sched_fail_at(sim_sched(sim), config->n_workers - 1, sim_now(sim) + fails_at, 0, INFINITY);
    CHECK(sim && sim_run(sim, error), "%s", error);
    if (sim) {
        outcome.load = load_result(load);
        outcome.sched = sched_stats(sim_sched(sim));
    }
    sim_close(sim);
    load_close(load);
    return outcome;
}

/* ---- queues ---- */

enum { ONE_PROMPT = 16, ARRIVALS = 100000 };

/* How long one waits in the mean, in times of service, for one of c servers that are all busy a
 * share rho of the time, if arrivals are Poisson and service always takes as long (Crommelin
 * 1932). */
static double crommelin(int c, double rho) {
    double wait = 0;
    for (int i = 1; i < 300; i++) {
        double mean = i * c * rho;
        for (int n = i * c; n < i * c + 300; n++) {
            double probability = exp(-mean + n * log(mean) - lgamma(n + 1.0));
            wait += probability * (n > i * c ? 1 - 1 / rho : 1);
        }
    }
    return wait;
}

/* A step takes one prompt; its one token comes with it. A worker holds no more than that prompt:
 * who waits waits in the one queue. */
static void waits_as_queues_do(struct check *check) {
    CHECK(fabs(crommelin(1, 0.7) - 0.7 / (2 * (1 - 0.7))) < 1e-6, "one server: %g",
          crommelin(1, 0.7));
    for (int c = 1; c <= 4; c += 3) {
        struct engine_config config = make_config(c, 0, ONE_PROMPT, 1);
        double service = 1e-3 * run_load_in(check, &config, "16:1", 0, 1).load.times[TIME_TTFT][0];
        struct outcome outcome = run_load_in(check, &config, "16:1", 0.7 * c / service, ARRIVALS);
        double wait = 1e-3 * outcome.load.times[TIME_TTFT][LOAD_MEAN] / service - 1;
        double expected = crommelin(c, 0.7);
        CHECK(outcome.load.requests == ARRIVALS && outcome.load.failed == 0, "some failed");
        CHECK(outcome.sched.steps == ARRIVALS, "%d steps", (int)outcome.sched.steps);
        CHECK(fabs(wait / expected - 1) < 0.05, "%d workers: a wait of %.4f, expected %.4f", c,
              wait, expected);
    }
}

/* ---- what things cost ---- */

static struct sim *open_pairs(struct check *check, struct cluster *cluster,
                              struct engine_config *config, const char *name) {
    char error[ERROR_LENGTH] = "";
    bool ok =
        cluster_open(cluster, "--sim", name, NULL, error) && cluster_fit(cluster, config, error);
    struct sim *sim = ok ? sim_open(cluster, config, NULL, error) : NULL;
    CHECK(sim, "%s", error);
    return sim;
}

static double copies_end(struct sim *sim, int from, int to) {
    struct kv_copy_order order = {.worker = to, .from = from, .to = to};
    return sim_copy_end(sim, &order) - sim->now - sim->cluster->chip.copy;
}

static void copies_share_ports(struct check *check) {
    struct engine_config config = make_config(16, 0, 256, 100);
    struct cluster cluster;
    config.host_blocks = 10;
    struct sim *sim = open_pairs(check, &cluster, &config, "2xh100x8");
    if (!sim)
        return;
    double bytes = (double)block_bytes(&model.config, 1, KV_BF16), one = bytes / cluster.chip.peer;
    CHECK(fabs(copies_end(sim, 0, 1) / one - 1) < 1e-6, "the first");
    CHECK(fabs(copies_end(sim, 0, 2) / one - 2) < 1e-6, "the same way out");
    CHECK(fabs(copies_end(sim, 3, 2) / one - 3) < 1e-6, "the same way in");
    CHECK(fabs(copies_end(sim, 4, 5) / one - 1) < 1e-6, "no way in common");
    CHECK(fabs(copies_end(sim, 5, 4) / one - 1) < 1e-6, "the ways back");
    double abroad = bytes / cluster.chip.network, host = bytes / cluster.chip.host;
    CHECK(fabs(copies_end(sim, 6, 8) / abroad - 1) < 1e-6, "to another node");
    CHECK(fabs(copies_end(sim, 6, 9) / abroad - 2) < 1e-6, "the same network port");
    CHECK(fabs(copies_end(sim, 6, 7) / one - 1) < 1e-6, "a peer meanwhile");
    CHECK(fabs(copies_end(sim, 7, 16) / host - 1) < 1e-6, "to the host");
    CHECK(fabs(copies_end(sim, 16, 7) / host - 1) < 1e-6, "back from it at once");
    CHECK(fabs(copies_end(sim, 16, 15) / abroad - 1) < 1e-6, "from the host of another node");
    sim_close(sim);
}

static double step_of(struct check *check, int width, double link, int rows, int n_samples) {
    struct engine_config config = make_config(1, 0, 256, 10);
    struct cluster cluster;
    static struct sequence sequence;
    config.workers[0].n_shards = width;
    for (int i = 0; i < width; i++)
        config.workers[0].devices[i] = i;
    struct sim *sim = open_pairs(check, &cluster, &config, "h100x8");
    if (!sim)
        return 0;
    sim->workers[0].link *= link;
    sequence = (struct sequence){.n_rows = rows};
    struct batch batch = {
        .n_rows = rows, .n_sequences = 1, .n_samples = n_samples, .sequence = &sequence};
    double time = sim_step_seconds(sim, 0, &batch);
    sim_close(sim);
    return time;
}

static void shards_pay_for_their_sums(struct check *check) {
    const struct model_config *m = &model.config;
    double one = step_of(check, 1, 1, 256, 0), two = step_of(check, 2, 1, 256, 0);
    double slow = step_of(check, 2, 0.01, 256, 0);
    double moved = 2 * m->n_layers * 256.0 * m->d_model * 2; /* 2 (n - 1) / n of it, n = 2 */
    CHECK(fabs((slow - two) / (99 * moved / 450e9) - 1) < 1e-6, "%g s of sums", slow - two);
    double sums = 2 * m->n_layers * 1e-5 + moved / 450e9, rest = m->n_layers * 18e-6 + 5e-5;
    CHECK(fabs((two - sums - rest) / ((one - rest) / 2) - 1) < 1e-6, "half of the rest");
    double output = (double)model.layers[0][OUTPUT]->bytes / (0.9 * 3.35e12);
    double more = step_of(check, 2, 1, 1, 1) - step_of(check, 2, 1, 1, 0);
    CHECK(fabs(more / output - 1) < 1e-6, "a sample reads the output, on one shard: %g s", more);
}

/* Two workers on one chip: each takes its share of it. */
static void a_chip_is_shared(struct check *check) {
    struct engine_config config = make_config(2, 1, 256, 100);
    struct cluster cluster;
    config.workers[1].devices[0] = 0;
    struct sim *sim = open_pairs(check, &cluster, &config, "h100");
    if (!sim)
        return;
    struct step steps[2] = {0};
    for (int w = 0; w < 2; w++) {
        sim->workers[w].step = &steps[w];
        sim->workers[w].left = 1;
        sim->workers[w].since = sim->now;
        sim_share(sim, w);
    }
    CHECK(fabs(sim->workers[0].speed - 0.6) < 1e-9, "prefill: %g", sim->workers[0].speed);
    CHECK(fabs(sim->workers[1].speed - 0.4) < 1e-9, "decode: %g", sim->workers[1].speed);
    struct moment event = agenda_take(&sim->events);
    while (event.serial != sim->workers[event.index].serial)
        event = agenda_take(&sim->events);
    CHECK(event.index == 0 && fabs(event.time - sim->now - 1 / 0.6) < 1e-9, "%g", event.time);
    sim->now = event.time;
    sim->workers[0].step = NULL;
    sim_share(sim, 0);
    while (event.index == 0 || event.serial != sim->workers[event.index].serial)
        event = agenda_take(&sim->events);
    double left = 1 - 0.4 / 0.6; /* of the other, now alone */
    CHECK(fabs(event.time - sim->now - left) < 1e-9, "%g left", event.time - sim->now);
    sim_close(sim);
}

/* Also one that is not the first of a worker's; and what goes to another worker on it passes no
 * link, but is read and written, one block after another. */
static void any_chip_is_shared(struct check *check) {
    struct cluster cluster;
    for (int chip = 0; chip < 3; chip++) {
        struct engine_config config = make_config(2, 1, 256, 100);
        config.workers[0].n_shards = 2;
        config.workers[0].devices[1] = 1;
        config.workers[1].devices[0] = chip;
        struct sim *sim = open_pairs(check, &cluster, &config, "h100x3");
        if (!sim)
            return;
        CHECK((sim->workers[0].next == 1) == (chip < 2), "the decoder on chip %d", chip);
        CHECK((sim->workers[1].next == 0) == (chip < 2), "the decoder on chip %d", chip);
        sim_close(sim);
    }
    struct engine_config config = make_config(2, 1, 256, 100);
    config.workers[1].devices[0] = 0;
    struct sim *sim = open_pairs(check, &cluster, &config, "l40s");
    if (!sim)
        return;
    double one = 2 * (double)block_bytes(&model.config, 1, KV_BF16) / cluster.chip.read;
    for (int i = 0; i < 2; i++)
        CHECK(fabs(copies_end(sim, 0, 1) / one - 1 - i) < 1e-6, "within the chip: %d", i);
    sim_close(sim);
}

static void count_told(void *context, const struct event *event) {
    (void)context;
    counted.told += event->kind == EVENT_COPY;
}

/* Copies from or to a worker that has failed meanwhile have failed, and the ledger has none. */
static void copies_fail_with_their_worker(struct check *check) {
    int n_failed = 0;
    for (int i = 1; i <= 8; i++) {
        struct engine_config config = make_config(4, 2, 256, 4000);
        config.ledger.note = count_told;
        memset(&counted, 0, sizeof counted);
        counted.n_workers = 4;
        fails_at = .002 * i;
        struct outcome outcome = run_load_in(check, &config, "200:20", 20000, 1000);
        CHECK(outcome.load.requests == 1000 && outcome.load.failed == 0, "requests have failed");
        CHECK(counted.wrong == 0 && counted.told == counted.good && counted.good > 0,
              "%d wrong, %d of %d told", counted.wrong, counted.told, counted.good);
        n_failed += counted.failed;
    }
    CHECK(n_failed > 0, "no copy was on its way when the worker failed");
    counted.n_workers = 0;
    fails_at = 0;
}

/* ---- memory, bytes ---- */

static void memory_is_of_those_in_flight(struct check *check) {
    struct engine_config config = make_config(4, 2, 256, 400);
    config.host_blocks = 400;
    struct outcome few = run_load_in(check, &config, "100:20", 2000, 10000);
    struct rusage before, after;
    getrusage(RUSAGE_SELF, &before);
    struct outcome many = run_load_in(check, &config, "100:20", 2000, 100000);
    getrusage(RUSAGE_SELF, &after);
    CHECK(few.load.requests == 10000 && many.load.requests == 100000, "not all");
    CHECK(few.load.failed + many.load.failed == 0, "%s", many.load.first_error);
    CHECK(few.sched.hand_overs > 9000, "%d hand-overs", (int)few.sched.hand_overs);
    CHECK(after.ru_maxrss - before.ru_maxrss < 4096 || SANITIZED, "%ld KB more",
          after.ru_maxrss - before.ru_maxrss);
}

static size_t output_of(const char *arguments, char *to, size_t room, int *status) {
    char command[512];
    (void)snprintf(command, sizeof command, "%s %s 2>&1", DYNAMO_PROGRAM, arguments);
    FILE *pipe = popen(command, "r");
    size_t n = pipe ? fread(to, 1, room - 1, pipe) : 0;
    to[n] = 0;
    *status = pipe ? WEXITSTATUS(pclose(pipe)) : -1;
    return n;
}

static void the_same_bytes_twice(struct check *check) {
    static char outputs[3][1 << 18];
    static const char *const arguments[] = {
        "random:llama-3.1-8b --sim 2xh100x2 --replay 900:40 --rate 60 --limit 300 --json",
        "random:llama-3.1-8b --sim 2xh100x2 --replay 900:40 --rate 60 --limit 300 --json",
        "random:llama-3.1-8b --sim 2xh100x2 --replay 900:40 --rate 60 --limit 300 --json --seed 9"};
    size_t n[3];
    int status;
    for (int i = 0; i < 3; i++) {
        n[i] = output_of(arguments[i], outputs[i], sizeof outputs[i], &status);
        CHECK(status == 0 && n[i] > 10000, "status %d, %zu bytes", status, n[i]);
    }
    CHECK(n[0] == n[1] && memcmp(outputs[0], outputs[1], n[0]) == 0, "two runs differ");
    CHECK(n[0] != n[2] || memcmp(outputs[0], outputs[2], n[0]) != 0, "a seed that changes nothing");
}

static void refuses_in_a_line(struct check *check) {
    static const struct {
        const char *arguments, *says;
        int status;
    } cases[] = {
        {"random:llama-3.1-8b --replay 9:9 --sim h300x8", "got h300x8, expected CHIP", 2},
        {"random:llama-3.1-8b --replay 9:9 --sim h100x", "got h100x, expected CHIP", 2},
        {"random:llama-3.1-8b --replay 9:9 --sim 0xh100x8", "got 0xh100x8", 2},
        {"random:llama-3.1-8b --replay 9:9 --sim h100:4", "got h100:4, expected CHIP[xGPUS] or", 2},
        {"random:llama-3.1-8b --replay 9:9 --sim h100x+4", "got h100x+4, expected CHIP", 2},
        {"random:llama-3.1-8b --replay 9:9 --sim 'h100x 4'", "got h100x 4, expected CHIP", 2},
        {"random:llama-3.1-8b --replay 9:9 --sim '2 xh100'", "got 2 xh100, expected CHIP", 2},
        {"random:llama-3.1-8b --replay 9:9 --sim +2xh100", "got +2xh100, expected CHIP", 2},
        {"random:llama-3.1-8b --replay 9:9 --sim h100x4x", "got h100x4x, expected CHIP", 2},
        {"random:llama-3.1-8b --replay 9:9 --sim 2xcpu:4", "or cpu:DEVICES", 2},
        {"random:llama-3.1-8b --replay 9:9 --sim cpu:", "got cpu:, expected CHIP", 2},
        {"random:llama-3.1-8b --replay 9:9 --sim 999xh100x8", "1024 GPUs at most", 2},
        {"random:llama-3.1-8b --replay 9:9 --sim h100 --devices 0-1", "got 1, h100 has 1", 2},
        {"random:llama-3.1-70b --replay 9:9 --sim h100x8", "they fit with --tp 4", 1},
        {"random:llama-3.1-405b --replay 9:9 --sim h100x8 --tp 8", "no --tp is enough", 1},
        {"random:llama-3.1-70b --replay 9:9 --sim h100 --tp 8", "weights of 170.6 GB", 1},
        {"random:llama-3.1-8b --replay 9:9 --sim h100 --kv-device 70G", "has room for", 2},
        {"random:llama-3.1-8b --replay 9:9 --sim h100 --kv-host 9000G", "--kv-host: got ", 2},
        {"random:llama-3.1-8b --replay 9:9 --sim 4xh100 --kv-host 9000G", "have room for", 2},
        {"random:llama-3.1-8b --replay 9:9 --sim h100 --rates /dev/zero", "/dev/zero", 1},
        {"random:llama-3.1-8b --replay 9:9 --sim h100 --rates Makefile", "expected a rate, such as",
         1},
        {"random:llama-3.1-8b --replay 9:9 --sim h100 --rates /dev/null", "no rate of a h100", 1},
        {"random:gpt-oss-120b --replay 9:9 --sim h100x2", "no --tp is enough", 1},
        {"random:llama-3.1-8b --replay 9:9 --sim cpu:4 --tp 4", "weights of 16.1 GB a", 1},
        {"random:llama-3.1-8b:fp8 --ids 1 --devices cpu", "FP8", 1},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char output[2048];
        int status;
        size_t n = output_of(cases[i].arguments, output, sizeof output, &status);
        CHECK(status == cases[i].status, "%s: status %d", cases[i].arguments, status);
        CHECK(strstr(output, cases[i].says), "%s: %s", cases[i].arguments, output);
        CHECK(n > 0 && strchr(output, '\n') == output + n - 1, "%s: %s", cases[i].arguments,
              output);
    }
}

/* Workers of other sizes take answers over: their texts may then be longer than when they came. */
static void answers_outgrow_who_is_left(struct check *check) {
    static char output[1 << 16];
    static const char *const arguments[] = {
        "random:llama-3.1-70b:fp8 --sim h100x8 --prefill 0-3 --decode 4-7 --tp-prefill 2 "
        "--tp-decode 1 --replay 200:6000 --limit 40 --rate 1 --fail 2@5-100 --fail 3@5-100 "
        "--fail 4@5-100 --fail 5@5-100",
        "random:llama-3.1-70b:fp8 --sim h100x8 --prefill 0-3 --decode 4-7 --tp-prefill 2 "
        "--tp-decode 1 --replay 200:6000 --limit 20 --auto 1"};
    for (int i = 0; i < 2; i++) {
        int status;
        size_t n = output_of(arguments[i], output, sizeof output, &status);
        CHECK(status == 0 && n > 1000, "status %d: %.200s", status, output);
    }
}

/* A file of these rates, for an h100. */
static bool rates_hold(const char *text, char *error) {
    char name[] = "/tmp/test_sim_XXXXXX";
    struct cluster cluster;
    int file = mkstemp(name);
    bool ok = write(file, text, strlen(text)) == (ssize_t)strlen(text);
    close(file);
    *error = 0;
    ok = ok && cluster_open(&cluster, "--sim", "h100x2", name, error);
    unlink(name);
    return ok;
}

static void rates_are_possible_and_given_once(struct check *check) {
    static const char *const bad[] = {"peer_bytes_per_second 1e-9\n",
                                      "peer_bytes_per_second *1e-20\n",
                                      "urgent_share 1\n",
                                      "copy_seconds *2\ncopy_seconds *2\n",
                                      "copy_seconds 2\nH100 copy_seconds 3\n",
                                      "h100 copy_seconds 2\nstep_seconds 1\nh100 copy_seconds 2\n"};
    char error[ERROR_LENGTH];
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        CHECK(!rates_hold(bad[i], error) && *error && !strchr(error, '\n'), "%s: %s", bad[i],
              error);
    CHECK(strstr(error, ":3: got h100 copy_seconds 2, expected a rate") && strstr(error, "once"),
          "%s", error);
    CHECK(rates_hold("peer_bytes_per_second 0\n", error), "%s", error); /* no such link */
    CHECK(rates_hold("copy_seconds *2\na100 copy_seconds *2\nb200 copy_seconds *2\n", error), "%s",
          error);
}

static void clusters_have_names(struct check *check) {
    static const struct {
        const char *name;
        int n_nodes, n_devices;
    } rows[] = {{"h100", 1, 1},      {"H100X4", 1, 4}, {"H100x4", 1, 4},
                {"2Xh200X8", 2, 16}, {"3xL40S", 3, 3}, {"cpu", 1, 0},
                {"CPU:4", 1, 4},     {"CPU", 1, 0},    {"128xb200x8", 128, 1024},
                {"cpux2", 1, 2}};
    char error[ERROR_LENGTH];
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        struct cluster cluster;
        CHECK(cluster_open(&cluster, "--sim", rows[i].name, NULL, error), "%s", error);
        CHECK(cluster.n_nodes == rows[i].n_nodes && cluster.n_devices == rows[i].n_devices,
              "%s: %d, %d", rows[i].name, cluster.n_nodes, cluster.n_devices);
    }
}

static void rates_are_read(struct check *check) {
    char name[] = "/tmp/test_sim_XXXXXX", error[ERROR_LENGTH];
    static const char text[] = "# measured\n\nread_bytes_per_second 1e12\n"
                               "A100 read_bytes_per_second 5\nh100 host_bytes_per_second 7e9\n"
                               "sample_seconds 0.25\nother_share 0.7\n";
    struct engine_config config = make_config(2, 1, 256, 100);
    struct sequence sequence = {.n_rows = 3};
    struct batch batch = {.n_rows = 3, .n_sequences = 1, .n_samples = 1, .sequence = &sequence};
    struct cluster cluster;
    int file = mkstemp(name);
    CHECK(write(file, text, sizeof text - 1) == (ssize_t)sizeof text - 1, "cannot write");
    close(file);
    CHECK(cluster_open(&cluster, "--sim", "h100x2", name, error), "%s", error);
    CHECK(cluster.chip.other == 0.7 && cluster.chip.urgent == 0.4, "shares");
    CHECK(cluster.chip.read == 1e12 && cluster.chip.host == 7e9 && cluster.chip.peer == 450e9,
          "%g, %g, %g", cluster.chip.read, cluster.chip.host, cluster.chip.peer);
    unlink(name);
    struct sim *sim = sim_open(&cluster, &config, NULL, error);
    if (!sim)
        return;
    double one = sim_step_seconds(sim, 0, &batch);
    batch.n_samples = 3;
    CHECK(fabs(sim_step_seconds(sim, 0, &batch) - one - 2 * 0.25) < 1e-3, "%g s of one", one);
    sim_close(sim);
}

/* ---- a real run, decided again ---- */

enum { REAL_REQUESTS = 24, REAL_BLOCKS = 24, REAL_ANSWER = 24 };

/* Requests that share beginnings, on two CPU devices with few blocks. Returns its configuration. */
static struct engine_config run_really(struct check *check) {
    const struct backend_options options = {.n_threads = 2};
    char error[ERROR_LENGTH] = "";
    struct engine_config config = make_config(2, 1, 32, REAL_BLOCKS);
    struct request requests[REAL_REQUESTS];
    static int tokens[REAL_REQUESTS][256];
    config.backend = cpu_backend_open(&options, error);
    config.kv_type = KV_F32;
    config.host_blocks = 16;
    struct engine *engine = config.backend ? engine_open(&config, error) : NULL;
    CHECK(engine && engine_start(engine), "%s", error);
    if (!engine)
        return config;
    for (int i = 0; i < REAL_REQUESTS; i++) {
        requests[i] = (struct request){.id = i, .n_prompt = 20 + 37 * i % 90, .tokens = tokens[i]};
        requests[i].max_new = 1 + i % REAL_ANSWER;
        for (int j = 0; j < requests[i].n_prompt; j++)
            tokens[i][j] = j < 48 ? 3 + i % 3 : 3 + i;
    }
    check_waits = "a real run";
    engine_lock(engine);
    recording = true;
    for (int i = 0; i < REAL_REQUESTS; i++) {
        noted_submit(engine_sched(engine), &requests[i], engine_now());
        engine_wake(engine);
        engine_wait(engine, engine_now() + 0.01);
    }
    for (int i = 0; i < REAL_REQUESTS; i++)
        while (requests[i].state != REQUEST_FINISHED)
            engine_wait(engine, INFINITY);
    recording = false;
    struct kv_stats stats = kv_stats(sched_kv(engine_sched(engine)));
    engine_unlock(engine);
    CHECK(stats.transfers > 0 && stats.pages_out > 0, "%d transfers, %d page-outs",
          (int)stats.transfers, (int)stats.pages_out);
    engine_close(engine);
    config.backend->close(config.backend);
    return config;
}

/* What the recorded call gives now; a request is made of its tokens. */
static uint64_t call_again(struct sched *sched, const struct record *r, struct step **steps,
                           struct request *request) {
    struct kv_copy_order order;
    switch (r->call) {
    case CALL_SUBMIT:
        request->n_prompt = r->n_tokens;
        request->max_new = r->max_new;
        request->tokens = calloc((size_t)(r->n_tokens + r->max_new), sizeof(int));
        memcpy(request->tokens, noted + r->first_token, (size_t)r->n_tokens * sizeof(int));
        sched_submit(sched, request, r->now);
        return 0;
    case CALL_NEXT:
        steps[r->worker] = sched_next(sched, r->worker, r->now);
        return step_hash(steps[r->worker]);
    case CALL_DONE:
        memcpy(steps[r->worker]->batch.sampled, noted + r->first_token,
               (size_t)r->n_tokens * sizeof(int));
        sched_done(sched, r->worker, steps[r->worker], r->now);
        return 0;
    case CALL_COPIES: return sched_copies(sched, r->worker, &order, 1) > 0 ? order_hash(&order) : 0;
    case CALL_COPIED: sched_copied(sched, &r->order, true, r->now); return 0;
    default: return (uint64_t)(sched_concerned(sched) + 1);
    }
}

/* The steps and copies of a real run take in virtual time as long as they took. */
static void decides_again_as_in_a_real_run(struct check *check) {
    struct engine_config config = run_really(check);
    struct sched_config sched_config = engine_sched_config(&config);
    struct sched *sched = sched_create(&sched_config);
    struct step *steps[2] = {NULL, NULL};
    static struct request requests[MOST_REQUESTS];
    int n = 0, n_steps = 0, i = 0;
    for (bool same = true; i < n_records && same; i++) {
        const struct record *r = &records[i];
        requests[n].id = n;
        same = call_again(sched, r, steps, &requests[n]) == r->result;
        n += r->call == CALL_SUBMIT;
        n_steps += r->call == CALL_NEXT && r->result != 0;
        CHECK(same, "call %d of %d is answered otherwise: %d", i, n_records, (int)r->call);
    }
    CHECK(n == REAL_REQUESTS && n_steps > REAL_ANSWER && i < MOST_CALLS, "%d steps", n_steps);
    CHECK(sched_stats(sched).finished == REAL_REQUESTS, "not all have ended");
    for (int j = 0; j < n; j++)
        free(requests[j].tokens);
    sched_destroy(sched);
}

int main(int argc, char **argv) {
    static const struct test tests[] = {
        {"waits_as_queues_do", waits_as_queues_do},
        {"copies_share_ports", copies_share_ports},
        {"shards_pay_for_their_sums", shards_pay_for_their_sums},
        {"a_chip_is_shared", a_chip_is_shared},
        {"any_chip_is_shared", any_chip_is_shared},
        {"copies_fail_with_their_worker", copies_fail_with_their_worker},
        {"memory_is_of_those_in_flight", memory_is_of_those_in_flight},
        {"the_same_bytes_twice", the_same_bytes_twice},
        {"refuses_in_a_line", refuses_in_a_line},
        {"answers_outgrow_who_is_left", answers_outgrow_who_is_left},
        {"rates_are_read", rates_are_read},
        {"rates_are_possible_and_given_once", rates_are_possible_and_given_once},
        {"clusters_have_names", clusters_have_names},
        {"decides_again_as_in_a_real_run", decides_again_as_in_a_real_run},
    };
    char error[ERROR_LENGTH];
    if (!model_open(&model, "random:stories-15m", error)) {
        (void)fprintf(stderr, "%s\n", error);
        return 1;
    }
    ends_text = calloc((size_t)model.config.vocab_size, sizeof *ends_text);
    return check_run(tests, sizeof tests / sizeof *tests, argc, argv);
}
