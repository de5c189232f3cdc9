/* plan.h: which split of a cluster serves a load best: pools apart or together, and how wide.
 *
 *     struct plan_options options = {.cluster = &cluster, .engine = &config, .load = load, ...};
 *     ok = plan_print(&options, error); // ten seconds for 8 GPUs and unique prompts
 *
 * A split gives every GPU of the cluster to a worker: so many that prefill, so many that decode, of
 * 1, 2, 4 or 8 GPUs each; or all alike and together, each doing both. Apart on a single GPU are two
 * workers that share it, as with --devices 0,0. The load runs on each split in virtual time
 * (sim.h), as a Poisson process of a rate that is searched for: the highest at which PLAN_SHARE of
 * the requests keep both targets. Splits are ranked by the tokens generated there, a second and
 * GPU, which are the rate times the tokens of an answer: what a load without an end would give,
 * where a short one has a beginning and an end. Splits that cut answers short keep no targets.
 *
 * What it does to be quick, and says in its output: a simulation has PLAN_REQUESTS to PLAN_LONG
 * requests, or --limit, or all of -f; the search ends when the rate is known to PLAN_STEP; a split
 * that does not keep the targets at PLAN_PRUNED of the best rate of its kind so far is not searched
 * further. Short simulations flatter what cannot quite keep up, as its queue has little time to
 * grow: at the default by some percent. Together is tried with the chip's chunk and with a shorter
 * one, which favours running answers. A host tier is left out where prompts share nothing; where it
 * matters, splits are run with and without it.
 *
 * Owns no policy: placements are in order, prefill first, so that a worker lies within a node
 * where nodes have 8 GPUs. Refuses stdin: a load is opened again for each simulation.
 * Read next: plan_search, then sim_run in sim.h. */
#ifndef PLAN_H
#define PLAN_H

#include "sim.h"

struct plan_options {
    const struct cluster *cluster;
    const struct engine_config *engine; /* without workers; host_blocks: -1: with and without */
    int blocks[MAX_SHARDS + 1];         /* of a device of a worker so wide; -1: all that fit */
    bool short_chunks;                  /* may be tried, together */
    struct load_options load; /* with both targets; json: an object a split, in place of tables */
};

/* Runs the load on every split and tells which is best. False: none is, as `error` says. */
bool plan_print(const struct plan_options *options, char *error);
/* Tells from which length on a prefix is copied sooner than computed, after a table on stdout. */
void plan_break_even(const struct cluster *cluster, const struct engine_config *config);

#endif /* PLAN_H */

#ifdef PLAN_IMPLEMENTATION
#undef PLAN_IMPLEMENTATION

#include <stdlib.h>
#include <string.h>

enum {
    PLAN_REQUESTS = 300, /* of a simulation, at least, … */
    PLAN_LONG = 600,     /* … and at most; else as many as come in … */
    PLAN_TTFTS = 20,     /* … so many times the target of TTFT: a queue must show that it grows */
    PLAN_CHUNK = 512,    /* the shorter one */
    PLAN_POOLS = 16,     /* sizes of the prefill pool, at most */
    PLAN_HALVINGS = 12,  /* of the first rate, until no rate is low enough */
    PLAN_WIDTH = 64,     /* characters of the picture, and … */
    PLAN_HEIGHT = 16     /* … lines */
};
static const double PLAN_SHARE = .9, PLAN_STEP = 1.03, PLAN_PRUNED = .8, PLAN_QUIET = .25;

struct plan_point {                 /* a simulation */
    double rate, per_gpu, per_user; /* tokens/s: of the rate; 1 / the median of ITL */
    struct load_result result;
    bool good;    /* enough of its requests keep both targets, and no answer is cut */
    bool bounded; /* it keeps the target of TTFT, so its queues do not grow without an end */
    char kind;    /* `a` or `t`: apart, together */
};

struct plan_split {
    int n[2], tp[2]; /* workers that prefill, that decode; together: of the second alone */
    int chunk, host_blocks, blocks[2];
    bool pruned, fast;      /* fast: the load is too short to tell its highest rate */
    bool reads_host, cuts;  /* cuts: answers short, and so serves none */
    struct plan_point best; /* rate 0: the targets are not kept */
};

struct plan {
    const struct plan_options *options;
    struct plan_split *splits; /* (n_splits) */
    struct plan_point *points; /* (n_points) all simulations */
    int n_splits, n_points, n_unfit;
    char why[ERROR_LENGTH]; /* the last together that does not fit does not; it is the widest */
    const char *cuts;       /* why answers are cut short; NULL: none is */
    int limit;              /* requests of a simulation; 0: PLAN_REQUESTS to PLAN_LONG */
    bool unique;            /* no prompt shares anything with another */
    bool tiers_matter;      /* a split that was searched has read from the host */
    double best[2];         /* rates: together, apart */
    double least[2];        /* ms, p90 of TTFT and ITL that some simulation reached */
};

static bool plan_apart(const struct plan_split *split) {
    return split->n[0] > 0;
}

/* ---- one simulation ---- */

/* The engine that a split stands for. False: it does not fit. */
static bool plan_engine_of(const struct plan_options *o, const struct plan_split *split,
                           struct engine_config *config, char *error) {
    int device = 0;
    *config = *o->engine;
    config->chunk = split->chunk;
    config->host_blocks = split->host_blocks;
    for (int pool = 0; pool < 2; pool++)
        for (int i = 0; i < split->n[pool]; i++) {
            int w = config->n_workers++, n = split->tp[pool];
            for (int s = 0; s < n; s++)
                config->workers[w].devices[s] = device++ % o->cluster->n_devices;
            config->workers[w].n_shards = n;
            config->workers[w].blocks = o->blocks[n];
            config->workers[w].prefills = pool == 0 || !plan_apart(split);
            config->workers[w].decodes = pool == 1;
        }
    return cluster_fit(o->cluster, config, error);
}

/* Runs the load at a rate, and keeps the point. False: `error`. */
static bool plan_simulate(struct plan *plan, struct plan_split *split, double rate,
                          struct plan_point *point, char *error) {
    const struct plan_options *o = plan->options;
    struct load_options options = o->load;
    struct engine_config config;
    options.rate = rate;
    double n = fmin(fmax(PLAN_REQUESTS, PLAN_TTFTS * rate * 1e-3 * o->load.ttft), PLAN_LONG);
    n = plan->limit > 0 ? plan->limit : floor(n);
    options.limit = (int)n;
    options.most_bad = (int64_t)((1 - PLAN_SHARE) * n + 1e-6); /* the outcome is known */
    options.json = false;
    struct load *load =
        plan_engine_of(o, split, &config, error) ? load_open(&options, error) : NULL;
    struct sim *sim = load ? sim_open(o->cluster, &config, load, error) : NULL;
    bool ok =
        sim && sim_run(sim, error) && (!load_error(load) || fail(error, "%s", load_error(load)));
    if (ok) {
        struct load_result r = load_result(load);
        double ttft = r.times[TIME_TTFT][LOAD_P90], itl = r.times[TIME_ITL][LOAD_P90];
        bool whole = r.failed == 0 && r.cut == 0;
        *point = (struct plan_point){
            .rate = rate,
            .per_gpu =
                rate * (double)r.generated_tokens / (double)r.arrivals / o->cluster->n_devices,
            .per_user = 1e3 / r.times[TIME_ITL][LOAD_P50],
            .result = r,
            .good = r.cut == 0 && (double)r.good >= PLAN_SHARE * (double)r.requests,
            .bounded = whole && ttft <= o->load.ttft && r.times[TIME_ITL][LOAD_P50] > 0,
            .kind = plan_apart(split) ? 'a' : 't'};
        split->reads_host |= kv_stats(sched_kv(sim_sched(sim))).pages_in > 0;
        split->cuts |= r.cut > 0;
        plan->cuts = r.cut > 0 ? load_cuts(load, &config.model->config) : plan->cuts;
        if (whole) {
            plan->least[0] = fmin(plan->least[0], ttft);
            plan->least[1] = fmin(plan->least[1], itl);
        }
        plan->points = grow(plan->points, (size_t)plan->n_points, sizeof *point);
        plan->points[plan->n_points++] = *point;
    }
    sim_close(sim);
    load_close(load);
    return ok;
}

/* The highest rate at which a split keeps the targets, into split->best. False: `error`. */
static bool plan_search(struct plan *plan, struct plan_split *split, char *error) {
    double *best = &plan->best[plan_apart(split)], high = INFINITY;
    double rate = *best > 0 ? PLAN_PRUNED * *best : plan->options->cluster->n_devices;
    int halvings = 0;
    while (high / fmax(split->best.rate, 1e-30) > PLAN_STEP) {
        struct plan_point point;
        if (!plan_simulate(plan, split, rate, &point, error))
            return false;
        high = point.good ? high : rate;
        split->best = split->cuts ? (struct plan_point){0} : point.good ? point : split->best;
        /* all that comes within the target of TTFT may wait for its turn */
        split->fast =
            point.good && rate * 1e-3 * plan->options->load.ttft >= (double)point.result.arrivals;
        if (split->fast)
            break;
        split->pruned = !split->cuts && *best > 0 && split->best.rate == 0;
        if (split->cuts || split->pruned || (split->best.rate == 0 && ++halvings > PLAN_HALVINGS))
            return true;
        rate = split->best.rate == 0 ? rate / 2
               : high < INFINITY     ? sqrt(split->best.rate * high)
                                     : rate * (*best > 0 ? 1.25 : 2);
    }
    *best = fmax(*best, split->best.rate);
    return true;
}

/* ---- all splits ---- */

/* Adds a split, if it fits. */
static void plan_add(struct plan *plan, struct plan_split split) {
    struct engine_config config;
    char error[ERROR_LENGTH];
    if (split.n[0] + split.n[1] > MAX_WORKERS)
        return;
    if (!plan_engine_of(plan->options, &split, &config, plan_apart(&split) ? error : plan->why)) {
        plan->n_unfit++;
        return;
    }
    split.host_blocks = config.host_blocks;
    split.blocks[1] = config.workers[config.n_workers - 1].blocks;
    split.blocks[0] = config.workers[0].blocks;
    plan->splits = grow(plan->splits, (size_t)plan->n_splits, sizeof split);
    plan->splits[plan->n_splits++] = split;
}

/* Those that are likely to be good come first, so that more of the others need no search. */
static void plan_list(struct plan *plan) {
    const struct plan_options *o = plan->options;
    int n = o->cluster->n_devices, step = (n + PLAN_POOLS - 1) / PLAN_POOLS;
    struct plan_split split = {.chunk = o->engine->chunk, .host_blocks = o->engine->host_blocks};
    if (split.host_blocks < 0 && plan->unique)
        split.host_blocks = 0;
    for (int tp = 1; tp <= MAX_SHARDS && n % tp == 0; tp *= 2) {
        split.n[1] = n / tp;
        split.tp[0] = split.tp[1] = tp;
        plan_add(plan, split);
        split.chunk = PLAN_CHUNK;
        if (o->short_chunks && o->engine->chunk > PLAN_CHUNK)
            plan_add(plan, split);
        split.chunk = o->engine->chunk;
    }
    if (n == 1 && !o->cluster->is_cpu) { /* as --devices 0,0 */
        split.n[0] = split.n[1] = split.tp[0] = split.tp[1] = 1;
        plan_add(plan, split);
    }
    for (int i = 1; i * step < n; i++) { /* from half of the GPUs to both sides */
        int n_sizes = (n - 1) / step, middle = (n_sizes + 1) / 2;
        int prefill = step * (i % 2 ? middle - i / 2 : middle + i / 2);
        for (split.tp[0] = 1; split.tp[0] <= MAX_SHARDS; split.tp[0] *= 2)
            for (split.tp[1] = 1; split.tp[1] <= MAX_SHARDS; split.tp[1] *= 2) {
                split.n[0] = prefill / split.tp[0];
                split.n[1] = (n - prefill) / split.tp[1];
                if (prefill % split.tp[0] == 0 && (n - prefill) % split.tp[1] == 0)
                    plan_add(plan, split);
            }
    }
}

static int plan_compare(const void *a, const void *b) { /* a stable order of what is equal */
    const struct plan_split *x = a, *y = b;
    double s = x->best.rate, t = y->best.rate;
    int order = (s < t) - (s > t);
    for (int i = 0; i < 2 && order == 0; i++)
        order = x->n[i] != y->n[i] ? y->n[i] - x->n[i] : y->tp[i] - x->tp[i];
    order = order == 0 ? y->chunk - x->chunk : order;
    return order == 0 ? y->host_blocks - x->host_blocks : order;
}

/* ---- telling ---- */

static const char *plan_name(const struct plan_split *split, char name[64]) {
    int n = 0;
    if (plan_apart(split))
        n = snprintf(name, 64, "%d x TP %d + ", split->n[0], split->tp[0]);
    (void)snprintf(name + n, 64 - (size_t)n, "%d x TP %d%s", split->n[1], split->tp[1],
                   plan_apart(split) ? "" : " together");
    return name;
}

static void plan_row(const struct plan_split *split, double bound) {
    char name[64], blocks[32];
    const struct plan_point *p = &split->best;
    (void)snprintf(blocks, sizeof blocks, plan_apart(split) ? "%d + %d" : "%d", split->blocks[0],
                   split->blocks[1]);
    printf("%-22s %6d %-15s %8d ", plan_name(split, name), split->chunk, blocks,
           split->host_blocks);
    if (p->rate <= 0) {
        printf(split->cuts ? "cut short\n" : bound > 0 ? "< %6.2f\n" : "    none\n", bound);
        return;
    }
    const double(*times)[N_LOAD_SHARES] = p->result.times;
    printf("%s%*.2f %13.1f %8.1f %8.1f %7.2f %7.2f\n", split->fast ? "> " : "", split->fast ? 6 : 8,
           p->rate, p->per_gpu, times[TIME_TTFT][LOAD_P50], times[TIME_TTFT][LOAD_P90],
           times[TIME_ITL][LOAD_P50], times[TIME_ITL][LOAD_P90]);
}

static void plan_object(const struct plan_split *split) {
    const struct plan_point *p = &split->best;
    bool apart = plan_apart(split);
    static const char *const words[] = {"false", "true"};
    printf("{\"apart\":%s,\"prefill_workers\":%d,\"tp_prefill\":%d,\"decode_workers\":%d,"
           "\"tp_decode\":%d,\"chunk\":%d,\"prefill_blocks\":%d,\"decode_blocks\":%d,"
           "\"host_blocks\":%d,\"pruned\":%s,\"fast\":%s,\"cuts_short\":%s,\"rate\":%.6g,"
           "\"tokens_per_second_per_gpu\":%.6g",
           words[apart], split->n[!apart], split->tp[!apart], split->n[1], split->tp[1],
           split->chunk, split->blocks[0], split->blocks[1], split->host_blocks,
           words[split->pruned], words[split->fast], words[split->cuts], p->rate, p->per_gpu);
    for (int i = TIME_QUEUE; i < N_TIMES && p->rate > 0; i++)
        for (int share = LOAD_P50; share <= LOAD_P90; share++)
            printf(",\"%s_%s_ms\":%.6g", answers_times[i][0], load_shares[share],
                   p->result.times[i][share]);
    (void)fputs("}\n", stdout);
}

/* No other that is bounded is better in both. */
static bool plan_in_front(const struct plan *plan, const struct plan_point *p) {
    for (int i = 0; i < plan->n_points; i++) {
        const struct plan_point *q = &plan->points[i];
        if (q->bounded && q->per_gpu >= p->per_gpu && q->per_user >= p->per_user &&
            (q->per_gpu > p->per_gpu || q->per_user > p->per_user))
            return false;
    }
    return true;
}

/* Speed for one against that of all: `a`, `t` pools apart or together; `A`, `T`: none is better. */
static void plan_picture(const struct plan *plan) {
    char rows[PLAN_HEIGHT][PLAN_WIDTH + 1];
    double width = 0, height = 0;
    memset(rows, ' ', sizeof rows);
    for (int i = 0; i < plan->n_points; i++) {
        width = plan->points[i].bounded ? fmax(width, plan->points[i].per_user) : width;
        height = plan->points[i].bounded ? fmax(height, plan->points[i].per_gpu) : height;
    }
    if (width <= 0) /* such as where no answer has a second token */
        return;
    for (int front = 0; front < 2; front++) /* the front last, so that nothing hides it */
        for (int i = 0; i < plan->n_points; i++) {
            const struct plan_point *p = &plan->points[i];
            if (!p->bounded || plan_in_front(plan, p) != (front == 1))
                continue;
            int x = (int)(p->per_user / width * (PLAN_WIDTH - 1));
            int y = (int)(p->per_gpu / height * (PLAN_HEIGHT - 1));
            rows[PLAN_HEIGHT - 1 - y][x] = (char)(p->kind - (front ? 'a' - 'A' : 0));
        }
    printf(
        "\ntokens/s per GPU against tokens/s of one answer (a: apart, t: together; A, T: none is "
        "better in both),\nof all simulations whose p90 of TTFT is within its target\n");
    for (int y = 0; y < PLAN_HEIGHT; y++) {
        rows[y][PLAN_WIDTH] = 0;
        printf("%9.1f |%s\n", height * (PLAN_HEIGHT - 1 - y) / (PLAN_HEIGHT - 1), rows[y]);
    }
    memset(rows[0], '-', PLAN_WIDTH);
    printf("%9s +%s\n%10s 0%*.1f\n", "", rows[0], "", PLAN_WIDTH - 1, width);
}

/* One sentence, if any kind, together and apart, has a best; NULL: it has none. */
static void plan_verdict(const struct plan_split *const best[2]) {
    char names[2][64];
    const struct plan_split *apart = best[1], *together = best[0];
    const struct plan_split *only = !apart ? together : !together ? apart : NULL;
    if (only)
        printf("\nonly %s keeps the targets: %s, %s%.1f tokens/s per GPU\n",
               apart ? "apart" : "together", plan_name(only, names[0]), only->fast ? "> " : "",
               only->best.per_gpu);
    if ((apart && apart->fast) || (together && together->fast))
        printf("\nthe load is too short to tell: all of it comes within the target of TTFT; give "
               "more requests (--limit, or lines) or tighter targets\n");
    if (!apart || !together || apart->fast || together->fast)
        return;
    double margin = apart->best.per_gpu / together->best.per_gpu - 1;
    const char *word = fabs(margin) < PLAN_STEP - 1 ? "is level" : margin > 0 ? "wins" : "loses";
    printf("\napart %s: %s makes %.1f tokens/s per GPU within the targets, %s %.1f; %+.1f %% (the "
           "search is exact to %.0f %%)\n",
           word, plan_name(apart, names[0]), apart->best.per_gpu, plan_name(together, names[1]),
           together->best.per_gpu, 100 * margin, 100 * (PLAN_STEP - 1));
}

/* False: no split keeps the targets, and `error` says how far off they are. */
static bool plan_kept(const struct plan *plan, char *error) {
    const char *why = plan->points[0].result.first_error;
    if (plan->best[0] > 0 || plan->best[1] > 0)
        return true;
    if (*why && isinf(plan->least[0]))
        return fail(error, "no split keeps the targets: requests fail; %.400s", why);
    if (plan->cuts && isinf(plan->least[0]))
        return fail(error, "no split keeps the targets: answers are cut short; %s", plan->cuts);
    return fail(error,
                "no split keeps the targets; the best TTFT/ITL that was reached: %.2f ms / %.2f ms "
                "(p90, each by itself)%s%s",
                plan->least[0], plan->least[1], plan->cuts ? "; others cut answers short: " : "",
                plan->cuts ? plan->cuts : "");
}

static void plan_tell(const struct plan *plan) {
    const struct plan_options *o = plan->options;
    const struct plan_split *best[2] = {NULL, NULL};
    int n_pruned = 0;
    char n[48];
    (void)snprintf(n, sizeof n, plan->limit > 0 ? "%d" : "%d to %d",
                   plan->limit > 0 ? plan->limit : PLAN_REQUESTS, PLAN_LONG);
    for (int i = plan->n_splits - 1; i >= 0; i--) {
        const struct plan_split *split = &plan->splits[i];
        n_pruned += split->pruned;
        if (split->best.rate > 0)
            best[plan_apart(split)] = split;
    }
    printf("%s: %d splits of %d GPUs, %d do not fit; targets: TTFT %g ms, ITL %g ms, kept by %.0f "
           "%% of the requests\n%d simulations, of %s requests (so far as the load has them); %d "
           "splits that miss the targets at %g of the best rate of their kind are not searched "
           "further\nmost answers at once on a worker: %d; host tier: %s\n\n",
           o->cluster->name, plan->n_splits, o->cluster->n_devices, plan->n_unfit, o->load.ttft,
           o->load.itl, 100 * PLAN_SHARE, plan->n_points, n, n_pruned, PLAN_PRUNED,
           o->engine->max_batch,
           o->engine->host_blocks >= 0 ? "as given"
           : plan->tiers_matter        ? "where it matters, with and without it"
           : plan->unique              ? "none, as prompts share nothing"
                                       : "as large as by default; nothing was read from it");
    printf("%-22s %6s %-15s %8s %8s %13s %8s %8s %7s %7s\n%-22s %6s %-15s %8s %8s %13s %8s %8s %7s "
           "%7s\n",
           "split", "chunk", "blocks", "host", "requests", "tokens/s", "TTFT", "TTFT", "ITL", "ITL",
           "", "", "a worker", "blocks", "/s", "per GPU", "p50 ms", "p90 ms", "p50", "p90");
    for (int i = 0; i < plan->n_splits; i++)
        plan_row(&plan->splits[i], PLAN_PRUNED * plan->best[plan_apart(&plan->splits[i])]);
    if (plan->cuts)
        printf("cut short: %s\n", plan->cuts);
    if (best[0] || best[1])
        plan_picture(plan);
    plan_verdict(best);
    struct engine_config config;
    char error[ERROR_LENGTH];
    struct plan_split shown = best[1] ? *best[1] : best[0] ? *best[0] : plan->splits[0];
    shown.host_blocks = o->engine->host_blocks;
    if (plan_engine_of(o, &shown, &config, error))
        plan_break_even(o->cluster, &config);
}

bool plan_print(const struct plan_options *o, char *error) {
    struct plan plan = {.options = o, .least = {INFINITY, INFINITY}};
    bool ok = true;
    if (strcmp(o->load.replay ? o->load.replay : o->load.file, "-") == 0)
        return fail(error, "--plan: a load is read again for each simulation; give a file, not -");
    if (o->cluster->n_devices < 1)
        return fail(error, "--plan: got cpu, expected how many devices, such as cpu:4");
    struct load *load = load_open(&o->load, error);
    if (!load)
        return false;
    plan.unique = load->in > 0;
    plan.limit = o->load.replay ? o->load.limit : load->lines.n; /* all of -f */
    load_close(load);
    plan_list(&plan);
    if (plan.n_splits == 0)
        return fail(error, "--plan: no split fits: %.400s", plan.why);
    for (int i = 0; i < plan.n_splits && ok; i++) {
        cli_progress("simulating", i, plan.n_splits);
        ok = plan_search(&plan, &plan.splits[i], error);
        struct plan_split without = plan.splits[i]; /* a host tier; joins the end */
        if (!ok || o->engine->host_blocks >= 0 || !without.reads_host || without.pruned)
            continue;
        plan.tiers_matter = true;
        without.reads_host = false;
        without.host_blocks = 0;
        without.best.rate = 0;
        plan_add(&plan, without);
    }
    cli_progress("simulating", 1, 1);
    for (int i = 0; i < plan.n_splits && ok; i++) { /* for the picture: fewer answers at once */
        struct plan_point point;
        double rate = PLAN_QUIET * fmax(plan.best[0], plan.best[1]);
        ok = rate <= 0 || plan_simulate(&plan, &plan.splits[i], rate, &point, error);
    }
    if (ok) {
        qsort(plan.splits, (size_t)plan.n_splits, sizeof *plan.splits, plan_compare);
        if (!o->load.json)
            plan_tell(&plan);
        for (int i = 0; i < plan.n_splits && o->load.json; i++)
            plan_object(&plan.splits[i]);
        ok = plan_kept(&plan, error);
    }
    free(plan.splits);
    free(plan.points);
    return ok;
}

/* ---- to copy or to compute ---- */

/* Seconds of a worker for itself to compute the first n tokens of a prompt. */
static double plan_prefill_seconds(const struct sim *sim, int worker, int n) {
    double seconds = 0;
    for (int start = 0, rows; start < n; start += rows) {
        rows = n - start < sim->config->chunk ? n - start : sim->config->chunk;
        struct sequence sequence = {.n_rows = rows, .start = start};
        struct batch batch = {.n_rows = rows,
                              .n_sequences = 1,
                              .n_blocks = blocks_of(start + rows),
                              .sequence = &sequence};
        seconds += sim_step_seconds(sim, worker, &batch);
    }
    return seconds;
}

/* Seconds until a prefix of n tokens has been copied, where nobody else copies. */
static double plan_copy_seconds(struct sim *sim, int from, int to, int n) {
    struct kv_copy_order order = {.worker = to, .from = from, .to = to};
    double start = sim->now, end = start;
    for (int i = 0; i < blocks_of(n); i++)
        end = sim_copy_end(sim, &order);
    sim->now = end; /* the ports are free then */
    return end - start;
}

/* The least length, in whole blocks, from which on a copy is sooner there; 0: none up to `most`. */
static int plan_pays_from(struct sim *sim, int prefill, int from, int to, int most) {
    int low = 0, high = blocks_of(most) + 1; /* blocks: does not pay, pays */
    for (int n = high - 1; high - low > 1; n = (low + high) / 2) {
        double copies = plan_copy_seconds(sim, from, to, n * BLOCK_TOKENS);
        *(copies < plan_prefill_seconds(sim, prefill, n * BLOCK_TOKENS) ? &high : &low) = n;
    }
    return high > blocks_of(most) ? 0 : high * BLOCK_TOKENS;
}

void plan_break_even(const struct cluster *cluster, const struct engine_config *config) {
    static const char *const labels[] = {"computed by a worker that prefills (TP %d)",
                                         "copied to one that decodes (TP %d)",
                                         "loaded from the host (TP %d)"};
    char error[ERROR_LENGTH], label[64];
    int context = config->model->config.context_length, host = config->n_workers, prefill = 0;
    int longest = context < 32768 ? context : 32768, decode = host - 1; /* another, if there is */
    struct sim *sim = sim_open(cluster, config, NULL, error);
    if (!sim)
        return;
    sim->home[0] = (uint16_t)cluster_node(cluster, config->workers[prefill].devices[0]);
    printf("\n%-44s %9d %9d %9d tokens", "to copy a prefix, or to compute it: ms of", longest / 32,
           longest / 4, longest);
    for (int row = 0; row < 3; row++) {
        int from = row == 1 ? prefill : host, into = row == 1 ? decode : prefill;
        if (from == into || (row == 2 && config->host_blocks == 0))
            continue;
        (void)snprintf(label, sizeof label, labels[row], config->workers[into].n_shards);
        printf("\n  %-42s", label);
        for (int n = longest / 32; n <= longest; n *= n < longest / 4 ? 8 : 4)
            printf(" %9.2f", 1e3 * (row == 0 ? plan_prefill_seconds(sim, prefill, n)
                                             : plan_copy_seconds(sim, from, into, n)));
        int pays = row == 0 ? 0 : plan_pays_from(sim, prefill, from, into, context);
        if (row > 0)
            printf(pays > 0 ? "  pays from %d tokens on" : "  does not pay up to %d tokens",
                   pays > 0 ? pays : context);
    }
    (void)fputs("\n", stdout);
    sim_close(sim);
}

#endif /* PLAN_IMPLEMENTATION */
