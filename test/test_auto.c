/* test_auto.c: workers that change their role as the load does (app/auto.h): which split they come
 * to, beside the best of all that is found by trying each; that they stay there, also where the
 * load is uneven; that a load which swings moves one of them a swing at most; that no role loses
 * its last worker. And in virtual time: that it pays, and is the same twice.
 *
 * Of most tests the load is a formula, and the scheduler is the real one. Run from the repository's
 * root. Read next: test_sim.c. */
#define _GNU_SOURCE
#define NONE NO_ONE /* both files have their own */
#include "../kvcache.c"
#undef NONE
#include "../scheduler.c"
#define AUTO_IMPLEMENTATION
#include "../app/auto.h"
#define JSON_IMPLEMENTATION
#include "files.h"

enum { N_WORKERS = 8 };
static const double SECONDS = 60, TARGET = 0.020;

/* ---- a load, and how long steps take under it ---- */

struct asked {
    double prompts; /* workers that they keep busy */
    double answers; /* that are written at once */
};

static const struct asked morning = {4.2, 350}, evening = {0.4, 1400};

struct world {
    struct sched *sched;
    struct auto_roles roles;
    struct ledger ledger;
    double now, last_change, ends[N_WORKERS]; /* of the last step of each */
    int n_changes;
};

static double step_seconds(double answers, int n_decode) {
    return 0.005 + 5e-5 * answers / n_decode;
}

/* How near the worse of the two pools is to what it can do. */
static double pressure(struct asked asked, int n_prefill) {
    int n_decode = N_WORKERS - n_prefill;
    return fmax(asked.prompts / n_prefill,
                step_seconds(asked.answers, n_decode) / (AUTO_MEAN * TARGET));
}

static double least_pressure(struct asked asked) {
    double least = INFINITY;
    for (int n = 1; n < N_WORKERS; n++)
        least = fmin(least, pressure(asked, n));
    return least;
}

static int count_prefill(const struct world *world) {
    struct sched_load load = sched_load(world->sched);
    int n = 0;
    for (int i = 0; i < N_WORKERS; i++)
        n += strcmp(load.role[i], "prefill") == 0;
    return n;
}

static void world_note(void *context, const struct event *e) {
    struct world *world = context;
    if (e->kind != EVENT_ROLE)
        return;
    world->n_changes++;
    world->last_change = world->now;
}

static void world_open(struct world *world, int n_prefill) {
    static const bool ends_text[16];
    *world = (struct world){.now = 1};
    struct sched_config config = {.kv = {.n_workers = N_WORKERS},
                                  .max_batch = 256,
                                  .chunk = 256,
                                  .copies_in_flight = 16,
                                  .context_length = 4096,
                                  .ends_text = ends_text};
    world->ledger =
        auto_ledger(&world->roles, SECONDS, 1e3 * TARGET, (struct ledger){world_note, world});
    config.kv.ledger = world->ledger;
    for (int i = 0; i < N_WORKERS; i++) {
        config.kv.device_blocks[i] = 64;
        config.prefills[i] = i < n_prefill;
        config.decodes[i] = i >= n_prefill;
    }
    world->sched = world->roles.sched = sched_create(&config);
}

/* A worker computes for so long: rows of prompts, or of answers. */
static void compute(struct world *world, int worker, double *at, double seconds, bool answers) {
    struct sequence sequence = {.n_rows = 1, .generated = answers};
    struct step step = {.batch = {.n_rows = 1, .n_sequences = 1, .sequence = &sequence}};
    struct event event = {EVENT_STEP, *at, *at + seconds, .worker = worker, .step = &step};
    note(&world->ledger, &event);
    *at += seconds;
}

/* A tenth of a second. Prompts that are too many for those that prefill are for the others. */
static void tick(struct world *world, struct asked asked) {
    struct sched_load load = sched_load(world->sched);
    int n = count_prefill(world);
    double busy = fmin(asked.prompts / n, 1), left = 0;
    if (n < N_WORKERS)
        left = fmin(fmax(asked.prompts - n, 0) / (N_WORKERS - n), 1);
    for (int i = 0; i < N_WORKERS; i++) {
        bool prefills = load.role[i][0] == 'p';
        double seconds = 0.1 * (prefills ? busy : left), end = world->now + 0.1;
        double *at = &world->ends[i];
        *at = fmax(*at, world->now);
        if (seconds > 0)
            compute(world, i, at, seconds, false);
        while (!prefills && *at < end && asked.answers > 0)
            compute(world, i, at, step_seconds(asked.answers, N_WORKERS - n), true);
    }
    world->now += 0.1;
}

static void spend(struct world *world, struct asked asked, double seconds) {
    for (double end = world->now + seconds; world->now < end;)
        tick(world, asked);
}

/* ---- where it leads ---- */

/* From any split to one that is as good as the best, but for the gain that a change must bring; by
 * the shortest way, and there it stays. */
static void finds_the_best_split(struct check *check) {
    const struct asked all[] = {morning, evening, {5.5, 200}, {2, 900}};
    for (int i = 0; i < 4; i++)
        for (int start = 1; start < N_WORKERS; start++) {
            struct world world;
            world_open(&world, start);
            spend(&world, all[i], 20 * SECONDS);
            int end = count_prefill(&world);
            CHECK(pressure(all[i], end) <= least_pressure(all[i]) / (1 - AUTO_GAIN) + 1e-9,
                  "load %d: from %d to %d that prefill: %g, the best %g", i, start, end,
                  pressure(all[i], end), least_pressure(all[i]));
            CHECK(world.n_changes == abs(end - start), "load %d: from %d to %d in %d changes", i,
                  start, end, world.n_changes);
            CHECK(world.last_change <= 8 * SECONDS, "load %d: still at %g s", i, world.last_change);
            sched_destroy(world.sched);
        }
}

/* A worker without which texts could not be as long decodes on, also where it has least to do. */
static void the_largest_decodes_on(struct check *check) {
    struct world world;
    world_open(&world, 1);
    world.sched->config.kv.device_blocks[1] = 80; /* the first that would change */
    world.sched->longest = 80 * BLOCK_TOKENS;
    assign_roles(world.sched);
    spend(&world, (struct asked){5.5, 200}, 20 * SECONDS);
    CHECK(count_prefill(&world) > 3, "%d prefill", count_prefill(&world));
    CHECK(world.sched->config.decodes[1], "the largest does not");
    sched_destroy(world.sched);
}

/* Each second has from half of the load to one and a half times as much. */
static void stays_where_the_load_is_uneven(struct check *check) {
    struct world world;
    uint64_t random = 1;
    world_open(&world, 4);
    for (int second = 0; second < 3600; second++) {
        double by[2];
        for (int i = 0; i < 2; i++) {
            random = random * 6364136223846793005u + 1442695040888963407u;
            by[i] = 0.5 + (double)(random >> 33) * 0x1p-31;
        }
        spend(&world, (struct asked){morning.prompts * by[0], morning.answers * by[1]}, 1);
    }
    int end = count_prefill(&world);
    CHECK(world.n_changes <= 3, "%d changes in an hour", world.n_changes);
    CHECK(pressure(morning, end) <= least_pressure(morning) / (1 - AUTO_GAIN), "%d prefill", end);
    sched_destroy(world.sched);
}

/* Morning and evening in turn. In the time between two changes: one at most, whenever they swing;
 * where a swing lasts, each ends with a split that suits it. */
static void swings_move_one_worker_at_most(struct check *check) {
    static const double swings[] = {10, 60, 1200};
    for (int i = 0; i < 3; i++) {
        struct world world;
        world_open(&world, 4);
        int most = 0, n_swings = (int)(7200 / swings[i]);
        for (int swing = 0; swing < n_swings; swing++) {
            struct asked asked = swing % 2 == 0 ? morning : evening;
            int before = world.n_changes, n;
            spend(&world, asked, swings[i]);
            most = max(most, world.n_changes - before);
            n = count_prefill(&world);
            CHECK(swings[i] < 1000 || pressure(asked, n) <= least_pressure(asked) / 0.9 + 1e-9,
                  "swing %d ends with %d that prefill", swing, n);
        }
        CHECK(swings[i] > SECONDS || most <= 1, "swings of %g s: %d changes in one", swings[i],
              most);
        CHECK(swings[i] <= SECONDS || world.n_changes >= n_swings, "swings of %g s: %d changes",
              swings[i], world.n_changes);
        sched_destroy(world.sched);
    }
}

/* Whatever the load is, and whoever fails. */
static void no_role_loses_its_last_worker(struct check *check) {
    const struct asked all[] = {{8, 0}, {0, 5000}, {0, 0}, {0.3, 40}};
    for (int i = 0; i < 4; i++) {
        struct world world;
        world_open(&world, 4);
        spend(&world, all[i], 20 * SECONDS);
        int n = count_prefill(&world), expected[] = {7, 1, 4, 4}; /* where little is, all stay */
        CHECK(n == expected[i], "load %d: %d that prefill, expected %d", i, n, expected[i]);
        sched_destroy(world.sched);
    }
    struct world world;
    world_open(&world, 6);
    sched_fail(world.sched, 6, world.now); /* one is left that decodes … */
    spend(&world, (struct asked){8, 0}, 10 * SECONDS);
    CHECK(count_prefill(&world) == 6, "%d that prefill", count_prefill(&world));
    sched_fail(world.sched, 7, world.now); /* … none, and all have both roles */
    int before = world.n_changes;
    spend(&world, evening, 10 * SECONDS);
    CHECK(world.n_changes == before, "%d changes", world.n_changes - before);
    sched_destroy(world.sched);
}

/* ---- in virtual time ---- */

/* A figure of the table. */
static double figure(struct check *check, const struct outcome *o, const char *label) {
    const char *at = strstr(o->out, label);
    CHECK(o->status == 0 && at, "%s: status %d: %.300s", label, o->status, o->err);
    return at ? strtod(at + strlen(label), NULL) : 0;
}

/* From a split that suits long prompts, and the load is of long answers; the other way round. */
static void it_pays(struct check *check) {
    static const char *const ways[] = {
        "--itl 20 --prefill 0-5 --decode 6,7 --replay 300:800 --rate 80 --limit 2500",
        "--itl 12 --prefill 0 --decode 1-7 --replay 8000:200 --rate 17 --limit 1000"};
    for (int i = 0; i < (SANITIZED ? 1 : 2); i++) {
        struct outcome o[3];
        for (int run_number = 0; run_number < 3; run_number++)
            o[run_number] = run(check,
                                "random:llama-3.1-8b:bf16 --sim h100x8 --kv-host 0 "
                                "--max-batch 256 --ttft 2000 %s %s",
                                ways[i], run_number > 0 ? "--auto 5" : "");
        double before = figure(check, &o[0], "share of all requests");
        double after = figure(check, &o[1], "share of all requests");
        double n_changes = figure(check, &o[1], "changes of a worker's role");
        CHECK(figure(check, &o[0], "changes of a worker's role") <= 0, "it changes unasked");
        CHECK(n_changes >= 3, "%s: %g changes", ways[i], n_changes);
        CHECK(after > 1.1 * before, "%s: %g of the requests within the targets, %g without",
              ways[i], after, before);
        CHECK(strcmp(o[1].out, o[2].out) == 0, "%s: not the same twice", ways[i]);
    }
}

static void is_refused_where_there_is_nothing_to_change(struct check *check) {
    expect(check, "model.bin -p a --devices cpu:2 --auto 60", 2, NULL,
           "*--auto: got 2 workers, expected two pools, of at least 3 together*");
    expect(check, "model.bin -p a --devices cpu:1 --auto 60", 2, NULL,
           "*--auto: got 1 worker, expected*");
}

int main(int argc, char **argv) {
    static const struct test tests[] = {TEST(finds_the_best_split),
                                        TEST(the_largest_decodes_on),
                                        TEST(stays_where_the_load_is_uneven),
                                        TEST(swings_move_one_worker_at_most),
                                        TEST(no_role_loses_its_last_worker),
                                        TEST(it_pays),
                                        TEST(is_refused_where_there_is_nothing_to_change)};
    return run_tests(tests, COUNT(tests), argc, argv);
}
