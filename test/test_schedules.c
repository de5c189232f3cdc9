/* test_schedules.c: the same text in every schedule, bit for bit: see schedules.h.
 *
 * Batched, chunked, handed over, sharded, paged, preempted, dropped and recomputed, in the table
 * below. Then second turns from the cache, and little memory.
 *
 * Run from the repository's root; an argument picks tests. Read next: test_reference.c. */
#define _GNU_SOURCE
#define JSON_IMPLEMENTATION
#define GGUF_IMPLEMENTATION
enum { LAST_BIT = 1 /* of an f32 */, SHORTER = 1 };
#include "schedules.h"

static const char one_device[] = "--devices cpu:1";

/* ---- the matrix ---- */

#define IN(model) (1 << (model))

enum {
    IDS_MODELS = IN(TWIN) | IN(Q8) | IN(BF16) | IN(EXPERTS) | IN(WINDOWS),
    FEW_MODELS = IN(TWIN) | IN(STORY) | IN(EXPERTS),
    ALL_MODELS = IDS_MODELS | IN(STORY) | IN(CHECKPOINT)
};

struct schedule {
    int models;
    const char *options, *proof;
};

static const struct schedule schedules[] = {
    /* one worker: batches, chunks, shards */
    {ALL_MODELS, "--devices cpu:1", "steps<=200 hand_overs<=0 device_blocks>=500"},
    {FEW_MODELS, "--devices cpu:1 --max-batch 3 --threads 1", "steps>=225 prefix_hit_tokens>=100"},
    {FEW_MODELS, "--devices cpu:1 --chunk 1", "steps>=600"},
    {ALL_MODELS, "--devices cpu:1 --chunk 7", "steps>=90"},
    {FEW_MODELS, "--devices cpu:1 --chunk 64 --threads 3", "steps<=200"},
    {FEW_MODELS, "--devices cpu:1 --chunk 4096", "steps<=121"},
    {FEW_MODELS, "--devices cpu:2 --tp 2 --kv-device 4M",
     "device_blocks>=84 hand_overs<=0 blocks_transferred<=0"},
    {FEW_MODELS, "--devices cpu:4 --tp 4 --kv-device 4M --chunk 7",
     "device_blocks>=168 steps>=140 hand_overs<=0"},
    /* two pools */
    {ALL_MODELS, "--devices cpu:2 --copy-delay 1", "hand_overs>=7 blocks_transferred>=12"},
    {FEW_MODELS, "--devices cpu:3 --copy-delay 2 --chunk 7",
     "hand_overs>=4 blocks_transferred>=12"},
    {FEW_MODELS, "--devices cpu:3 --prefill 0,2 --decode 1 --chunk 16",
     "hand_overs>=4 blocks_transferred>=12"},
    {FEW_MODELS, "--devices cpu:4 --kv-device 100b --copy-delay 3 --max-batch 4",
     "hand_overs>=4 local_prefills>=1 device_blocks_used>=80"},
    {FEW_MODELS, "--devices cpu:4 --tp 2 --copy-delay 4", "hand_overs>=7 blocks_transferred>=12"},
    {IN(TWIN), "--devices cpu:8 --tp 4 --copy-delay 5 --chunk 64",
     "hand_overs>=4 blocks_transferred>=20"},
    {FEW_MODELS, "--devices cpu:4 --colocate --kv-device 100b --copy-delay 6",
     "hand_overs<=0 prefix_hit_tokens>=100"},
    /* pools of different width: a device holds as many bytes, so a wide worker holds more blocks */
    {FEW_MODELS, "--devices cpu:3 --tp-prefill 1 --tp-decode 2 --copy-delay 16",
     "hand_overs>=7 blocks_transferred>=12"},
    {FEW_MODELS, "--devices cpu:3 --tp-prefill 2 --tp-decode 1 --kv-device 28b --copy-delay 17",
     "hand_overs>=4 blocks_transferred>=12 pages_out>=15"},
    {FEW_MODELS, "--devices cpu:8 --prefill 0,1,2,3 --decode 4-7 --tp-prefill 1 --tp-decode 4",
     "hand_overs>=4 blocks_transferred>=12"},
    {IN(TWIN), "--devices cpu:6 --tp-prefill 4 --tp-decode 2 --copy-delay 18 --chunk 64",
     "hand_overs>=4 blocks_transferred>=20"},
    {IN(TWIN), "--devices cpu:5 --tp-prefill 1 --tp-decode 4 --kv-device 200K --copy-delay 19",
     "device_blocks<=25 evictions>=15 hand_overs>=4 blocks_transferred>=12"},
    /* little memory: paged out and in */
    {IDS_MODELS | IN(STORY), "--devices cpu:1 --kv-device 28b --copy-delay 7",
     "pages_out>=20 pages_in>=1 evictions>=20"},
    {ALL_MODELS, "--devices cpu:2 --kv-device 28b --copy-delay 8 --chunk 64",
     "pages_out>=15 evictions>=20 hand_overs>=4"},
    {FEW_MODELS, "--devices cpu:4 --kv-device 28b --copy-delay 9 --chunk 7",
     "pages_out>=5 hand_overs>=4 device_blocks_used>=57"},
    {FEW_MODELS, "--devices cpu:4 --tp 2 --kv-device 28b --copy-delay 10",
     "pages_out>=15 hand_overs>=4"},
    {FEW_MODELS, "--devices cpu:3 --colocate --kv-device 28b --kv-host 40b",
     "pages_out>=1 hand_overs<=0 device_blocks_used>=29"},
    {IDS_MODELS, "--devices cpu:1 --kv-device 22b", "pages_out>=20 preemptions>=1"},
    /* no host memory: dropped and recomputed */
    {IDS_MODELS, "--devices cpu:1 --kv-device 28b --kv-host 0",
     "preemptions>=1 recomputed_tokens>=50 blocks_lost>=20 pages_out<=0"},
    {FEW_MODELS, "--devices cpu:2 --kv-device 28b --kv-host 0 --copy-delay 11",
     "blocks_lost>=15 hand_overs>=4 pages_out<=0"},
    {FEW_MODELS, "--devices cpu:4 --tp 2 --kv-device 40b --kv-host 0 --chunk 7",
     "blocks_lost>=5 hand_overs>=4 pages_out<=0"},
    /* write-through */
    {FEW_MODELS, "--devices cpu:2 --kv-policy write-through --copy-delay 12",
     "pages_out>=50 evictions<=0 hand_overs>=7"},
    {FEW_MODELS, "--devices cpu:2 --kv-policy write-through --kv-device 28b --copy-delay 13",
     "pages_out>=50 evictions>=20"},
    {FEW_MODELS, "--devices cpu:4 --kv-policy write-through --kv-device 28b --kv-host 12b",
     "pages_out>=40 host_evictions>=20"},
    /* one after another: second turns start from what the first ones left */
    {IDS_MODELS, "--devices cpu:1 --max-batch 1", "steps>=1600 prefix_hit_tokens>=800"},
    {IDS_MODELS, "--devices cpu:2 --max-batch 1 --copy-delay 14",
     "prefix_hit_tokens>=800 hand_overs>=4 local_prefills>=5"},
    {IDS_MODELS, "--devices cpu:2 --max-batch 1 --kv-device 28b --copy-delay 15",
     "prefix_hit_tokens>=500 pages_out>=60 pages_in>=10 evictions>=60"},
};
enum { N_SCHEDULES = sizeof schedules / sizeof *schedules };

static void run_matrix(struct check *check, int model) {
    struct turns *turns = turns_open(check, model, one_device, FIRST_TURNS, SECOND_TURNS);
    int step = model == TWIN && SANITIZED ? 2 : SHARE; /* each sanitizer takes another half */
    for (int i = (model + TSAN) % step; i < N_SCHEDULES; i += step)
        if (schedules[i].models & IN(model))
            run_schedule(check, turns, schedules[i].options, schedules[i].proof);
    check_coverage(check);
}

static void same_text_where_each_bit_counts(struct check *check) {
    run_matrix(check, TWIN);
}

static void same_text_of_q8_0(struct check *check) {
    run_matrix(check, Q8);
}

static void same_text_of_bf16(struct check *check) {
    run_matrix(check, BF16);
}

static void same_text_of_experts_windows_and_sinks(struct check *check) {
    run_matrix(check, EXPERTS);
}

static void same_text_of_windows_and_norms_behind(struct check *check) {
    run_matrix(check, WINDOWS);
}

static void same_text_of_stories(struct check *check) {
    run_matrix(check, STORY);
}

static void same_text_of_a_checkpoint(struct check *check) {
    run_matrix(check, CHECKPOINT);
}

/* ---- workers that fail ---- */

enum { MOMENTS = SANITIZED ? 4 : 20, LAST_MOMENT = 40 };

/* Beside each request one of the same prompt that ends before it, at another moment of a run: by
 * its deadline, or by a line that cancels it. */
static void add_hurried(struct turns *turns, double run) {
    int n = turns->n;
    for (int i = 0; i < n; i++, turns->n++) {
        struct wish *hurried = &turns->wishes[turns->n];
        *hurried = turns->wishes[i];
        snprintf(hurried->id, ID_LENGTH, "hurried%d", i);
        *(i % 2 == 0 ? &hurried->deadline : &hurried->cancel) = 1e-6 + run * i / n;
        turns->alone[turns->n] = turns->alone[i];
    }
}

/* A worker fails in one of 20 steps of it, and of some runs it comes back: pools of one width and
 * of two, with a host tier and without, little memory; copies are late, others end in between.
 * Where memory is ample nobody is preempted but who had something there. */
static void same_text_where_workers_fail(struct check *check) {
    static const struct {
        const char *options;
        bool ample;
    } ways[] = {
        {"--devices cpu:2 --kv-policy write-through --copy-delay 21 --fail 1@#%1$d", true},
        {"--devices cpu:3 --tp-prefill 1 --tp-decode 2 --copy-delay 22 --fail 1@#%1$d", true},
        {"--devices cpu:3 --tp-prefill 1 --tp-decode 2 --chunk 7 --fail 0@#%1$d", true},
        {"--devices cpu:4 --kv-device 28b --copy-delay 23 --fail 2@#%1$d --fail 0@#%1$d", false},
        {"--devices cpu:3 --tp-prefill 2 --tp-decode 1 --kv-host 0 --fail 1@#%1$d-%2$g", true},
        {"--devices cpu:4 --colocate --chunk 7 --copy-delay 24 --fail 3@#%1$d-%2$g", true}};
    struct turns *turns = turns_open(check, TWIN, one_device, FIRST_TURNS, SECOND_TURNS);
    struct timespec start, end;
    clock_gettime(CLOCK_MONOTONIC, &start);
    run_schedule(check, turns, "--devices cpu:2", "preemptions<=0");
    clock_gettime(CLOCK_MONOTONIC, &end); /* only to spread over it what ends before */
    double run = (double)(end.tv_sec - start.tv_sec) + 1e-9 * (double)(end.tv_nsec - start.tv_nsec);
    double recomputed = 0, lost = 0;
    add_hurried(turns, run / 2);
    for (int i = 0; i < MOMENTS; i++) {
        char options[256];
        size_t way = (size_t)i % COUNT(ways);
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
        snprintf(options, sizeof options, ways[way].options, 1 + i * LAST_MOMENT / MOMENTS, run);
#pragma GCC diagnostic pop
        struct outcome o = run_schedule(check, turns, options, "");
        CHECK(!ways[way].ample || number(&o, "stats", "preemptions") >= 1, "%s: nobody was hit",
              options);
        recomputed += number(&o, "stats", "recomputed_tokens");
        lost += number(&o, "stats", "blocks_lost");
    }
    CHECK(recomputed >= MOMENTS, "%g tokens were computed again", recomputed);
    CHECK(lost >= MOMENTS, "%g blocks were lost", lost);
    CHECK(turns->n_ended >= MOMENTS, "%d deadlines have passed", turns->n_ended);
    CHECK(turns->n_cancelled >= MOMENTS, "%d were cancelled", turns->n_cancelled);
}

/* Without any worker each request ends with an error that says so; in virtual time likewise. */
static void no_worker_is_left(struct check *check) {
    struct turns *turns = turns_open(check, TWIN, one_device, 4, 0);
    struct answer *answers = keep(MAX_REQUESTS * sizeof *answers);
    struct outcome o = run_wishes(check, turns->model, "--devices cpu:2 --fail 1@#1 --fail 0@#1",
                                  turns->wishes, turns->n, answers);
    CHECK(o.status == 3, "exit status %d", o.status);
    for (int i = 0; i < turns->n; i++)
        CHECK(answers[i].here && (strcmp(answers[i].reason, "error") != 0 ||
                                  strstr(answers[i].error, "all workers have failed")),
              "%s: %s %s", turns->wishes[i].id, answers[i].reason, answers[i].error);
    o = run(check, "model.bin -p a --devices cpu:2 --fail 2@1");
    CHECK(o.status == 2 && strstr(o.err, "--fail: got worker 2, expected 0 to 1"), "%s", o.err);
    static const char sim[] = "random:llama-3.1-8b --sim h100x4 --replay 2000:100 --rate 20 "
                              "--limit 200 --fail 3@1-4 --fail 0@2";
    o = run(check, "%s --verbose", sim);
    CHECK(o.status == 0 && strstr(o.err, "failed: at worker 3") &&
              strstr(o.err, "role: at worker 3 (decode), role decode"),
          "status %d", o.status);
    struct outcome again = run(check, "%s", sim);
    CHECK(again.status == 0 && strcmp(again.out, o.out) == 0, "not the same twice");
    o = run(check, "%s --fail 1@3 --fail 2@3", sim);
    CHECK(o.status == 3 && strstr(o.err, "all workers have failed"), "%d: %s", o.status, o.err);
}

/* Workers change their role in the midst of answers, as targets have it that none or each keeps. */
static void same_text_where_roles_follow_the_load(struct check *check) {
    static const char *const ways[] = {
        "--devices cpu:4 --prefill 0-2 --decode 3 --itl 0.001 --auto 0.005 --verbose",
        "--devices cpu:4 --prefill 0 --decode 1-3 --itl 1e6 --auto 0.001 --verbose"};
    struct turns *turns = turns_open(check, TWIN, one_device, FIRST_TURNS, SECOND_TURNS);
    for (int way = 0; way < 2; way++) {
        struct answer *answers = keep(MAX_REQUESTS * sizeof *answers);
        struct outcome o =
            run_wishes(check, turns->model, ways[way], turns->wishes, turns->n, answers);
        for (int i = 0; i < turns->n; i++)
            check_answer(check, ways[way], &turns->wishes[i], &answers[i], &turns->alone[i], false);
        int n_changes = count_of(o.err, " role: ");
        CHECK(o.status == 0 && n_changes >= 1, "%s: status %d, %d changes", ways[way], o.status,
              n_changes);
    }
}

/* ---- second turns ---- */

/* A second turn that follows the answer of the first finds all full blocks of it, but for the last
 * token, whose K and V were never computed. */
static void second_turns_start_from_the_cache(struct check *check) {
    struct turns *turns = turns_open(check, TWIN, one_device, FIRST_TURNS, SECOND_TURNS);
    static const char *const options[] = {
        "--devices cpu:1 --max-batch 1 --kv-device 400b",
        "--devices cpu:2 --max-batch 1 --kv-device 400b --copy-delay 3",
        "--devices cpu:2 --max-batch 1 --kv-device 30b --kv-policy write-through"};
    for (int i = 0; i < SECOND_TURNS; i++) {
        struct wish *second = &turns->wishes[FIRST_TURNS + i];
        memcpy(second->after, turns->wishes[i].id, ID_LENGTH);
        second->n_before = turns->alone[i].n_prompt + turns->alone[i].n_ids;
    }
    for (int way = 0; way < 3; way++) {
        struct answer *answers = keep(MAX_REQUESTS * sizeof *answers);
        run_wishes(check, turns->model, options[way], turns->wishes, turns->n, answers);
        for (int i = 0; i < SECOND_TURNS; i++) {
            const struct answer *second = &answers[FIRST_TURNS + i];
            int computed = turns->alone[i].n_prompt + turns->alone[i].n_ids - 1;
            CHECK(second->n_cached == computed / BLOCK * BLOCK,
                  "%s: second%d: %d tokens of %d found cached", options[way], i, second->n_cached,
                  computed);
            check_answer(check, options[way], &turns->wishes[FIRST_TURNS + i], second,
                         &turns->alone[FIRST_TURNS + i], false);
        }
    }
}

/* ---- little memory ---- */

/* Answers of 20 to 112 tokens with their prompts: 2 to 7 blocks. */
static void set_narrow(struct wish *wish, const struct subject *model, int number) {
    int total = 20 + draw_below(3, (uint64_t)number, 93);
    int length = 1 + draw_below(4, (uint64_t)number, total - 10);
    *wish = (struct wish){.n = total - length};
    snprintf(wish->id, ID_LENGTH, "narrow%d", number);
    set_prompt(wish, model, number, length, number % 2 == 0 ? length / 2 : 0);
    set_sampling(wish, number, model->heat);
}

/* 64 requests, three that cannot run, and one whose answer outgrows the device. */
static void set_narrow_wishes(struct turns *turns) {
    for (; turns->n < NARROW; turns->n++)
        set_narrow(&turns->wishes[turns->n], turns->model, turns->n);
    static const struct {
        const char *id;
        int length, n;
    } extremes[] = {{"outgrows", 100, 200}, {"budget", 225, 5}, {"context", 513, 5}};
    for (int i = 0; i < 3; i++, turns->n++) {
        struct wish *wish = &turns->wishes[turns->n];
        *wish = (struct wish){.n = extremes[i].n};
        snprintf(wish->id, ID_LENGTH, "%s", extremes[i].id);
        set_prompt(wish, turns->model, turns->n, extremes[i].length, 0);
        set_sampling(wish, 0, 1);
    }
}

struct refusal {
    const char *id, *reason;
};

static void run_narrow(struct check *check, struct turns *turns, const char *options,
                       const char *proof) {
    static const struct refusal refusals[] = {{"budget", "--kv-device"}, {"context", "context"}};
    struct answer *answers = keep(MAX_REQUESTS * sizeof *answers);
    struct outcome o = run_wishes(check, turns->model, options, turns->wishes, turns->n, answers);
    CHECK(o.status == 3, "%s: exit status %d, expected 3", options, o.status);
    for (int i = 0; i < turns->n; i++) {
        const char *reason = NULL, *id = turns->wishes[i].id;
        for (int r = 0; r < 2; r++)
            reason = strcmp(id, refusals[r].id) == 0 ? refusals[r].reason : reason;
        bool cut = strcmp(id, "outgrows") == 0;
        if (!reason)
            check_answer(check, options, &turns->wishes[i], &answers[i], &turns->alone[i], cut);
        else
            CHECK(answers[i].here && strcmp(answers[i].reason, "error") == 0 &&
                      strstr(answers[i].error, reason),
                  "%s: %s: %s %s, expected an error that names %s", options, id, answers[i].reason,
                  answers[i].error, reason);
        if (cut)
            CHECK(answers[i].here && answers[i].n_prompt + answers[i].n_ids == 14 * BLOCK &&
                      strcmp(answers[i].reason, "length") == 0,
                  "%s: %s: ended after %d tokens by %s", options, id,
                  answers[i].n_prompt + answers[i].n_ids, answers[i].reason);
    }
    check_counters(check, options, proof, &o);
    check_coverage(check);
}

/* 14 blocks hold two of the longer requests. */
static void nothing_runs_out_of_memory(struct check *check) {
    struct turns *turns = keep(sizeof *turns);
    turns->model = &models[TWIN];
    turns->alone_options = one_device;
    write_twin_model(check);
    set_narrow_wishes(turns);
    for (int i = 0; i < turns->n; i++)
        if (strcmp(turns->wishes[i].id, "context") != 0)
            run_alone(check, turns, i);
    run_narrow(check, turns, "--devices cpu:1 --kv-device 14b --copy-delay 1",
               "pages_out>=60 evictions>=60");
    run_narrow(check, turns, "--devices cpu:2 --kv-device 14b --copy-delay 2 --chunk 7",
               "pages_out>=60 hand_overs>=20 blocks_transferred>=60");
    run_narrow(check, turns, "--devices cpu:2 --kv-device 14b --kv-host 0",
               "pages_out<=0 hand_overs>=20 blocks_lost>=60");
    run_narrow(check, turns, "--devices cpu:4 --kv-device 14b --kv-host 5b --copy-delay 3",
               "pages_out>=60 host_evictions>=40 blocks_lost>=40 hand_overs>=20");
}

int main(int argc, char **argv) {
    static const struct test tests[] = {TEST(same_text_where_each_bit_counts),
                                        TEST(same_text_of_experts_windows_and_sinks),
                                        TEST(same_text_where_workers_fail),
                                        TEST(no_worker_is_left),
                                        TEST(same_text_where_roles_follow_the_load),
                                        TEST(second_turns_start_from_the_cache),
                                        TEST(nothing_runs_out_of_memory),
                                        TEST(same_text_of_q8_0),
                                        TEST(same_text_of_bf16),
                                        TEST(same_text_of_windows_and_norms_behind),
                                        TEST(same_text_of_stories),
                                        TEST(same_text_of_a_checkpoint)};
    /* (the last five would show a sanitizer nothing new: test_kernels has all types) */
    return run_tests(tests, COUNT(tests) - 5 * SANITIZED, argc, argv);
}
