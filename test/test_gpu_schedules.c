/* test_gpu_schedules.c: the CUDA backend from outside: the same text in every schedule, bit for bit
 * (see schedules.h), and logits as the models' original implementations have them.
 *
 * DYNAMO_PROGRAM is ./dynamo on a machine with a GPU, where one device stands for several if there
 * are no others, or ./dynamo-emu, which has several (MANY_GPUS). What differs from
 * test_schedules.c: tokens that were generated get their keys and values from other kernels than
 * tokens of prompts do, so a text that was generated and is then read again as a prompt is outside
 * the promise: no second turns. One that is computed again after a failure is inside. */
#define _GNU_SOURCE
#define JSON_IMPLEMENTATION
#define GGUF_IMPLEMENTATION
#define MODEL_IMPLEMENTATION
enum {
    LAST_BIT = 1 << 16, /* of an f32 that the backend keeps, as bf16 */
    SHORTER = 2         /* answers than on the CPU, for the emulation's sake */
};
#include "reference.h"
#include "schedules.h"

#define IN(model) (1 << (model))
enum {
    FEW = IN(TWIN),
    ALL = IN(TWIN) | IN(BF16) | IN(Q8) | IN(EXPERTS),
    REQUESTS = 11,
    SOME_REQUESTS = 7
};

static const struct {
    int models;
    int gpus; /* that it needs */
    const char *options, *proof;
} schedules[] = {
    /* one worker: batches, chunks, shards */
    {ALL, 1, "--devices 0", "steps<=130 hand_overs<=0 kernel_launches>=1000"},
    {FEW, 1, "--devices 0 --max-batch 3 --chunk 7 --copy-delay 1", "steps>=110"},
    {FEW | IN(EXPERTS) | IN(WINDOWS), 1, "--devices 0,0 --tp 2 --kv-device 1000b",
     "hand_overs<=0 kernel_launches>=1000"},
    {ALL, 1, "--devices 0,0,0,0 --tp 4 --kv-device 1000b --chunk 64", "steps<=200"},
    /* two pools */
    {ALL, 1, "--devices 0,0 --copy-delay 2", "hand_overs>=3 blocks_transferred>=5"},
    {FEW, 2, "--devices 0,1 --copy-delay 3", "hand_overs>=3 blocks_transferred>=5"},
    {FEW, 2, "--devices 0,1 --tp 2 --kv-device 1000b", "hand_overs<=0"},
    {FEW, 3, "--devices 0,1,2 --prefill 0,2 --decode 1 --chunk 16", "hand_overs>=5"},
    {FEW, 4, "--devices 0-3 --tp 2 --copy-delay 4", "hand_overs>=3 blocks_transferred>=5"},
    {FEW, 1, "--devices 0,0,0 --colocate --kv-device 100b", "hand_overs<=0"},
    /* pools of different width */
    {IN(BF16), 3, "--devices 0,1,2 --tp-prefill 1 --tp-decode 2 --kv-device 1000b --copy-delay 8",
     "hand_overs>=3 blocks_transferred>=5"},
    {FEW, 1, "--devices 0,0,0 --tp-prefill 2 --tp-decode 1 --kv-device 16b",
     "hand_overs>=3 blocks_transferred>=5 pages_out>=1"},
    {IN(BF16), 4,
     "--devices 0,0,1,2,3 --tp-prefill 1 --tp-decode 4 --kv-device 1000b --copy-delay 9",
     "hand_overs>=3 blocks_transferred>=5"},
    {IN(BF16), 4, "--devices 0,1,2,3,0,1 --tp-prefill 4 --tp-decode 2 --kv-device 1000b",
     "hand_overs>=3 blocks_transferred>=5"},
    /* little memory: paged out and in */
    {FEW, 1, "--devices 0,0 --kv-device 16b --copy-delay 5", "pages_out>=1 evictions>=1"},
    {IN(BF16) | IN(Q8), 1, "--devices 0,0 --kv-device 8b", "pages_out>=1 evictions>=1"},
    {FEW, 1, "--devices 0 --kv-device 15b", "pages_out>=10 recomputed_tokens<=0"},
    {FEW, 1, "--devices 0,0 --kv-policy write-through --kv-device 20b --copy-delay 7",
     "pages_out>=20 evictions>=5"},
    /* a worker fails, and what it had is computed again */
    {FEW, 2, "--devices 0,1 --kv-host 0 --fail 1@#9", "preemptions>=1 recomputed_tokens>=1"},
    {FEW, 2, "--devices 0,1 --kv-device 1000b --fail 1@#16", "preemptions>=1 recomputed_tokens>=1"},
    {FEW, 3, "--devices 0,1,2 --tp-prefill 1 --tp-decode 2 --kv-device 1000b --fail 1@#20",
     "preemptions>=1 recomputed_tokens>=1"},
    {FEW, 3, "--devices 0,1,2 --tp-prefill 2 --tp-decode 1 --kv-device 1000b --fail 0@#2",
     "preemptions>=1 recomputed_tokens>=1"},
};
enum { N_SCHEDULES = sizeof schedules / sizeof *schedules };

/* The emulator's, or as many as test/gpu.sh says there are. */
static int count_gpus(void) {
#ifdef MANY_GPUS
    return MANY_GPUS;
#else
    return getenv("GPUS") ? atoi(getenv("GPUS")) : 1;
#endif
}

static void run_matrix(struct check *check, int model) {
    /* emulated fibers are slow, and slower under sanitizers: there three schedules, or one */
    int step = !SANITIZED ? 1 : model == TWIN ? 9 : N_SCHEDULES;
    int n = model == TWIN && !SANITIZED ? REQUESTS : SOME_REQUESTS;
    struct turns *turns = turns_open(check, model, "--devices 0", n, 0);
    for (int i = 0; i < N_SCHEDULES; i += step)
        if ((schedules[i].models & IN(model)) && schedules[i].gpus <= count_gpus()) {
            struct outcome o = run_schedule(check, turns, schedules[i].options, schedules[i].proof);
            CHECK(!strstr(schedules[i].options, "--fail") || number(&o, "stats", "preemptions") > 0,
                  "%s: nobody was hit", schedules[i].options);
        }
    check_coverage(check);
}

static void same_text_where_bits_count(struct check *check) {
    run_matrix(check, TWIN);
}

static void same_text_of_bf16(struct check *check) {
    run_matrix(check, BF16);
}

static void same_text_of_q8_0(struct check *check) {
    run_matrix(check, Q8);
}

static void same_text_of_experts_windows_and_sinks(struct check *check) {
    run_matrix(check, EXPERTS);
}

static void same_text_of_windows_and_norms_behind(struct check *check) {
    run_matrix(check, WINDOWS);
}

/* ---- logits ---- */

/* Off by so much of the largest logit: F32 weights become bf16. In models of which this is so, few
 * rows may be further off, up to twice as far: those that attend to one token of two that are as
 * near. */
enum { F32_PERCENT = 4, TOLERANCE_PERCENT = 2, FEW_ROWS = 20, IDS_LENGTH = 4096 };

/* Where a row has experts, their choice may hang on less than bf16 keeps: then it must be as the
 * reference has it with the other choice. Of so many rows one at most, whose logits of the two
 * experts are as near, in percent of how far logits are apart. */
enum { EXPERT_ROWS = 8, TIE_PERCENT = 4 };

/* off[row]: the row is off by more than so many percent of the largest logit. Returns how many. */
static int rows_off(const float *got, const float *expected, size_t n, int n_rows, double percent,
                    bool *off) {
    size_t width = n / (size_t)n_rows;
    double largest = 0;
    int n_off = 0;
    for (size_t i = 0; i < n; i++)
        largest = fmax(largest, fabs((double)expected[i]));
    for (size_t row = 0; row < (size_t)n_rows; row++) {
        size_t i = row * width;
        while (i < (row + 1) * width &&
               fabs((double)got[i] - (double)expected[i]) * 100 <= percent * largest)
            i++;
        off[row] = i < (row + 1) * width;
        n_off += off[row];
    }
    return n_off;
}

/* Turns near ties of the router in rows that are off, in one layer, or in several, until they are
 * no longer, and makes `expected` what the reference then has. Returns in how many rows. */
static int turn_ties(struct check *check, const char *path, const char *ids, const float *got,
                     float *expected, size_t n, int n_rows, double percent) {
    char error[ERROR_LENGTH] = "";
    struct model model;
    bool ok = model_open(&model, path, error);
    CHECK(ok, "%s: %s", path, error);
    if (!ok)
        return 0;
    int n_layers = model.config.n_layers, n_turned = 0;
    int *tokens = ref_allocate((size_t)n_rows, sizeof *tokens);
    bool *turned = ref_allocate((size_t)(n_layers * n_rows), sizeof *turned);
    bool *still = ref_allocate((size_t)n_rows, sizeof *still);
    bool *now = ref_allocate((size_t)n_rows, sizeof *now);
    double *gap = ref_doubles(n_layers, n_rows), *logits = ref_doubles(1, (int)n);
    float *frequency = ref_allocate((size_t)model.config.rope_dim, sizeof *frequency);
    char *end = (char *)(uintptr_t)ids;
    for (int i = 0; i < n_rows; i++, end += *end == ',')
        tokens[i] = (int)strtol(end, &end, 10);
    ref_frequencies(&model, frequency);
    int n_off = rows_off(got, expected, n, n_rows, percent, still);
    for (int layers = 1; layers <= 1 << n_layers && n_off > 0; layers++) { /* a bit for each; … */
        for (int i = 0; i < n_layers * n_rows; i++) /* … at last none, for what stays off */
            turned[i] = still[i % n_rows] ? layers >> i / n_rows & 1 : turned[i];
        struct ref_choices choices = {NULL, turned, gap};
        ref_forward_with(&model, frequency, tokens, n_rows, choices, logits);
        for (size_t i = 0; i < n; i++)
            expected[i] = (float)logits[i];
        rows_off(got, expected, n, n_rows, percent, now);
        n_off = 0;
        for (int row = 0; row < n_rows; row++) {
            bool near = true;
            for (int layer = 0; layer < n_layers; layer++)
                near = near && gap[layer * n_rows + row] * 100 > -TIE_PERCENT;
            n_turned += still[row] && near && !now[row];
            still[row] = still[row] && (now[row] || !near);
            n_off += still[row];
        }
    }
    free(tokens);
    free(turned);
    free(still);
    free(now);
    free(gap);
    free(logits);
    free(frequency);
    model_close(&model);
    return n_turned;
}

static float *run_logits(struct check *check, const char *model, const char *ids,
                         const char *options, size_t *n) {
    struct outcome o = run(check, REF "%s --ids %s --logits $T/logits %s", model, ids, options);
    CHECK(o.status == 0, "%s %s: exit status %d: %s", model, options, o.status, o.err);
    float *logits = (float *)(void *)read_file(check, scratch("logits"), n);
    *n /= sizeof *logits;
    return logits;
}

static void check_logits(struct check *check, const char *model, const char *logits, int widest_tp,
                         const char *ids) {
    static const char *const ways[] = {"--devices 0 --chunk 5", "--devices 0,0 --tp 2 --colocate",
                                       "--devices 0,0,0,0 --tp 4 --colocate --chunk 9"};
    char path[PATH_LENGTH];
    size_t n, n_expected, n_again;
    float *got = run_logits(check, model, ids, "--devices 0 --chunk 4096", &n);
    snprintf(path, sizeof path, REF "%s", logits);
    float *expected = (float *)(void *)read_file(check, path, &n_expected);
    n_expected /= sizeof *expected;
    CHECK(n > 0 && n == n_expected, "%s: %zu logits, expected %zu", model, n, n_expected);
    int n_rows = 1;
    for (const char *c = ids; *c; c++)
        n_rows += *c == ',';
    bool same = n > 0 && n == n_expected, f32 = strstr(model, "f32"), off[IDS_LENGTH];
    bool experts = strstr(model, "moe") || strstr(model, "gpt-oss") || strstr(model, "mixtral");
    double percent = f32 ? F32_PERCENT : TOLERANCE_PERCENT;
    snprintf(path, sizeof path, REF "%s", model);
    int n_turned =
        same && experts ? turn_ties(check, path, ids, got, expected, n, n_rows, percent) : 0;
    CHECK(n_turned <= n_rows / EXPERT_ROWS, "%s: other experts in %d of %d rows", model, n_turned,
          n_rows);
    int n_off = same ? rows_off(got, expected, n, n_rows, percent, off) : 0;
    CHECK(n_off <= (f32 ? n_rows / FEW_ROWS : 0),
          "%s: %d of %d rows are off by more than %g percent", model, n_off, n_rows, percent);
    n_off = same ? rows_off(got, expected, n, n_rows, 2 * percent, off) : 0;
    CHECK(n_off == 0, "%s: %d rows are off by more than %g percent", model, n_off, 2 * percent);
    for (int i = 0; i < (SANITIZED ? 1 : 3); i++) {
        if (i > 0 && widest_tp < 2 * i)
            continue;
        float *again = run_logits(check, model, ids, ways[i], &n_again);
        CHECK(n_again == n && memcmp(again, got, n * sizeof *got) == 0, "%s: other bits with %s",
              model, ways[i]);
    }
}

static void logits_of_the_originals(struct check *check) {
    FILE *index = fopen(REF "index.txt", "r");
    char model[64], logits[64], ids[IDS_LENGTH];
    double tolerance;
    int widest_tp;
    CHECK(index, "no " REF "index.txt");
    for (int i = 0; index && fscanf(index, "%63s %63s %lf %d %4095s", model, logits, &tolerance,
                                    &widest_tp, ids) == 5;
         i++)
        if (i % (SHARE * SHARE) == 0 && !strstr(model, "gemma3-27b")) /* its heads are of 4 */
            check_logits(check, model, logits, widest_tp, ids);
    if (index)
        fclose(index);
}

int main(int argc, char **argv) {
    static const struct test tests[] = {TEST(logits_of_the_originals),
                                        TEST(same_text_where_bits_count),
                                        TEST(same_text_of_experts_windows_and_sinks),
                                        TEST(same_text_of_bf16),
                                        TEST(same_text_of_q8_0),
                                        TEST(same_text_of_windows_and_norms_behind)};
    /* (the last three would show a sanitizer nothing new, and take it minutes) */
    return run_tests(tests, COUNT(tests) - 3 * SANITIZED, argc, argv);
}
