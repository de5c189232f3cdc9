/* test_replay.c: loads: what a trace says becomes requests that share what it says they share, what
 * is wrong with a file is told by its line, arrivals are a Poisson process, quantiles are those of
 * the values, answers are followed; and an engine that runs a load finds what the trace implies. */
#define _GNU_SOURCE
#include "../dynamo.h"
#define main dynamo_main
#include "../dynamo.c"
#undef main
#include "check.h"

#include <stdlib.h>
#include <unistd.h>

enum { MANY = 20000, CONTEXT = 2048, VOCABULARY = 1000, MADE_UP = 7, PER_ANSWER = 9 };

/* ---- loads of files that are written here ---- */

static struct answers answers = {.vocab_size = VOCABULARY, .seed = 3};
static const struct request_spec defaults = {.n = -1};
static const char *const path = "/tmp/test_replay.jsonl"; /* see main */
static char file_name[64];

static void write_file(const char *text) {
    FILE *file = fopen(file_name, "wb");
    if (file) {
        (void)fputs(text, file);
        (void)fclose(file);
    }
}

static struct load *open_with(struct load_options options, char *error) {
    options.answers = &answers;
    options.defaults = &defaults;
    struct load *load = load_open(&options, error);
    if (load)
        load_start(load, 1, CONTEXT);
    return load;
}

/* Takes a request that nobody runs. */
static struct request take_only(struct load *load, double *at) {
    *at = load_next(load) - 1;
    struct request *r = load_take(load), copy = *r;
    copy.tokens = malloc((size_t)(r->n_prompt + 1) * sizeof *copy.tokens);
    if (copy.tokens)
        memcpy(copy.tokens, r->tokens, (size_t)r->n_prompt * sizeof *copy.tokens);
    r->reason = FINISH_CANCELLED;
    load_ended(load, r, 1);
    return copy;
}

/* ---- a driver in virtual time: a step takes a millisecond, a copy nothing ---- */

struct ran { /* what a load's requests came to, in the order of their ends */
    int n;
    struct request requests[16];
    int first[16]; /* token of the prompt */
};

static struct sched *open_virtual(void) {
    static bool ends[VOCABULARY];
    struct sched_config config = {.kv = {.n_workers = 1, .device_blocks = {256}},
                                  .prefills = {true},
                                  .decodes = {true},
                                  .max_batch = 8,
                                  .chunk = 256,
                                  .copies_in_flight = 4,
                                  .context_length = CONTEXT,
                                  .ends_text = ends};
    return sched_create(&config);
}

static void take_ended(struct load *load, struct request **running, int *n, double now,
                       struct ran *ran) {
    for (int i = 0; i < *n; i++) {
        struct request *r = running[i];
        if (r->state != REQUEST_FINISHED)
            continue;
        if (ran->n < 16) {
            ran->first[ran->n] = r->tokens[0];
            ran->requests[ran->n++] = *r;
        }
        running[i--] = running[--*n];
        load_ended(load, r, now);
    }
}

static struct ran run_virtually(struct load *load) {
    struct ran ran = {0};
    struct sched *sched = open_virtual();
    struct request *running[64];
    double now = 1;
    int n = 0;
    while (sched && !load_is_done(load)) {
        for (; load_next(load) <= now && n < 64; n++)
            sched_submit(sched, running[n] = load_take(load), now);
        struct step *step = sched_next(sched, 0, now);
        now = step ? now + 1e-3 : fmin(load_next(load), sched_next_event(sched));
        for (int i = 0; step && i < step->batch.n_samples; i++)
            step->batch.sampled[i] = MADE_UP;
        if (step)
            sched_done(sched, 0, step, now);
        if (sched_next_event(sched) <= now)
            sched_expire(sched, now);
        take_ended(load, running, &n, now, &ran);
    }
    sched_destroy(sched);
    return ran;
}

/* ---- tests ---- */

static int compare_values(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void quantiles_are_those_of_the_values(struct check *check) {
    static struct sketch sketch, few;
    static double values[MANY];
    static const double shares[] = {0.001, 0.01, 0.25, 0.5, 0.9, 0.99, 0.999, 1};
    double sum = 0;
    for (int i = 0; i < MANY; i++) { /* from microseconds to hours */
        double u = ((double)(answers_random(1, (uint64_t)i) >> 11) + 0.5) * 0x1p-53;
        values[i] = exp(24 * u - 14);
        sketch_add(&sketch, values[i]);
        sum += values[i];
    }
    qsort(values, MANY, sizeof *values, compare_values);
    for (size_t i = 0; i < sizeof shares / sizeof *shares; i++) {
        double exact = values[(int)ceil(shares[i] * MANY) - 1];
        double got = sketch_quantile(&sketch, shares[i]);
        CHECK(fabs(got / exact - 1) <= 0.00501, "%g: got %g, exact %g", shares[i], got, exact);
    }
    CHECK(sketch.n == MANY && fabs(sketch.sum / sum - 1) < 1e-12, "sum %g of %g", sketch.sum, sum);
    CHECK(sketch_quantile(&few, 0.5) == 0, "of nothing: got %g", sketch_quantile(&few, 0.5));
    sketch_add(&few, 0);
    CHECK(sketch_quantile(&few, 0.99) == 0, "of 0: got %g", sketch_quantile(&few, 0.99));
    sketch_add(&few, 1e30);
    CHECK(sketch_quantile(&few, 0.99) > 1e6, "of 1e30: got %g", sketch_quantile(&few, 0.99));
}

/* Of requests without an end the times of the last are kept, whether --stats was given or not. */
static void kept_times_have_a_bound(struct check *check) {
    struct answers a = {0};
    struct answer answer = {.request = {.n_prompt = 1, .length = 3, .submitted = 1, .admitted = 1}};
    for (; answer.place < 3 * ANSWERS_TIMES; answer.place++) { /* in the end all take 9 s */
        answer.request.first_token = answer.place < 2 * ANSWERS_TIMES ? 2 : 10;
        answer.request.last_token = answer.request.first_token + 2;
        count_ended(&a, &answer);
    }
    for (int i = 0; i < N_TIMES; i++)
        CHECK(a.n_times[i] == ANSWERS_TIMES, "%d are kept", a.n_times[i]);
    CHECK(stats_mean(&a, TIME_TTFT) == 9000 && stats_within(&a, TIME_TTFT, 0.01) == 9000, "%g ms",
          stats_mean(&a, TIME_TTFT));
    for (int i = 0; i < N_TIMES; i++)
        free(a.times[i]);
}

static void arrivals_are_a_poisson_process(struct check *check) {
    char error[ERROR_LENGTH];
    double sum = 0, squares = 0, at, again, before = 0;
    struct load_options options = {.replay = "1:1", .rate = 10, .limit = MANY};
    struct load *one = open_with(options, error), *two = open_with(options, error);
    answers.seed = 4;
    struct load *other = open_with(options, error);
    answers.seed = 3;
    CHECK(load_next(one) == load_next(two), "the same seed: %g, %g", load_next(one),
          load_next(two));
    CHECK(load_next(one) != load_next(other), "another seed: %g both", load_next(one));
    for (int i = 0; i < MANY; i++, before = at) {
        free(take_only(one, &at).tokens);
        free(take_only(two, &again).tokens);
        CHECK(at >= before && at == again, "request %d: %g after %g, again %g", i, at, before,
              again);
        sum += at - before;
        squares += (at - before) * (at - before);
    }
    double mean = sum / MANY, deviation = sqrt(squares / MANY - mean * mean);
    CHECK(fabs(mean - 0.1) < 0.003, "mean gap %g", mean); /* 4 standard errors */
    CHECK(fabs(deviation - 0.1) < 0.005, "deviation of gaps %g", deviation);
    CHECK(load_is_done(one) && load_next(one) == INFINITY, "goes on at %g", load_next(one));
    load_close(one);
    load_close(two);
    load_close(other);
}

static void plain_prompts_share_nothing(struct check *check) {
    char error[ERROR_LENGTH];
    uint64_t hashes[DEFAULT_REQUESTS];
    int n = 0;
    double at;
    struct load *load = open_with((struct load_options){.replay = "20:5"}, error);
    for (; !load_is_done(load) && n < DEFAULT_REQUESTS; n++) {
        struct request r = take_only(load, &at);
        CHECK(r.id == n && r.n_prompt == 20 && r.max_new == 5 && at == 0,
              "%d: id %d, %d in, %d out, at %g", n, (int)r.id, r.n_prompt, r.max_new, at);
        hashes[n] = kv_hash(0, r.tokens);
        for (int i = 0; i < n; i++)
            CHECK(hashes[i] != hashes[n], "%d and %d begin with the same block", i, n);
        free(r.tokens);
    }
    CHECK(n == DEFAULT_REQUESTS && load_is_done(load), "got %d", n);
    load_close(load);
    static const char *const bad[] = {"0:5", "5:0", "0:0"};
    for (int i = 0; i < 3; i++) {
        load = open_with((struct load_options){.replay = bad[i]}, error);
        CHECK(!load && strstr(error, bad[i]), "%s: %s", bad[i], error);
    }
}

/* Blocks that two prompts have in common at their beginnings. */
static int shared_blocks(const struct request *a, const struct request *b) {
    uint64_t x = 0, y = 0;
    int n = 0;
    for (; (n + 1) * BLOCK_TOKENS <= a->n_prompt && (n + 1) * BLOCK_TOKENS <= b->n_prompt; n++) {
        x = kv_hash(x, a->tokens + n * BLOCK_TOKENS);
        y = kv_hash(y, b->tokens + n * BLOCK_TOKENS);
        if (x != y)
            break;
    }
    return n;
}

static const char trace[] =
    "{\"timestamp\": 0, \"input_length\": 1100, \"output_length\": 4, \"hash_ids\": [0, 1, 2]}\n"
    "\n"
    "{\"hash_ids\": [0, 1, 3, 4], \"session\": {\"id\": [1]}, \"output_length\": 1, "
    "\"timestamp\": 1500.5, \"input_length\": 1600}\r\n"
    "{\"timestamp\": 1500.5, \"input_length\": 512, \"output_length\": 3, \"hash_ids\": [1]}\n"
    "{\"timestamp\": 9000, \"input_length\": 1040, \"output_length\": 2, \"hash_ids\": [0, 1, 2]}";

static void a_trace_becomes_requests(struct check *check) {
    static const double times[] = {0, 1.5005, 1.5005, 9};
    static const int lengths[][2] = {{1100, 4}, {1600, 1}, {512, 3}, {1040, 2}};
    static const int shared[] = {0, 64, 0, 65}; /* blocks with the first */
    struct request r[4];
    char error[ERROR_LENGTH];
    double at;
    write_file(trace);
    struct load *load = open_with((struct load_options){.replay = file_name}, error);
    CHECK(load, "%s", error);
    for (int i = 0; load && i < 4; i++) {
        r[i] = take_only(load, &at);
        CHECK(fabs(at - times[i]) < 1e-9, "%d: at %g", i, at);
        CHECK(r[i].n_prompt == lengths[i][0] && r[i].max_new == lengths[i][1], "%d: %d in, %d out",
              i, r[i].n_prompt, r[i].max_new);
        int n = i > 0 ? shared_blocks(&r[0], &r[i]) : 0;
        CHECK(kv_hash(0, r[i].tokens) != kv_hash(0, r[i].tokens + BLOCK_TOKENS),
              "%d: a block is like the next", i);
        CHECK(n == shared[i], "%d: shares %d blocks", i, n);
    }
    CHECK(load && load_is_done(load) && !load_error(load), "it does not end");
    for (int i = 0; load && i < 4; i++)
        free(r[i].tokens);
    load_close(load);
    load = open_with((struct load_options){.replay = file_name, .limit = 2, .rate = 100}, error);
    free(take_only(load, &at).tokens);
    double second = load_next(load) - 1;
    CHECK(at < second && second < 1, "by a rate: %g, %g", at, second);
    free(take_only(load, &at).tokens);
    CHECK(load_is_done(load), "goes on after --limit");
    load_close(load);
}

#define LINE(time, in, out, ids)                                                                   \
    "{\"timestamp\":" time ",\"input_length\":" in ",\"output_length\":" out ",\"hash_ids\":" ids  \
    "}\n"
#define GOOD LINE("5", "9", "1", "[1]")

/* What editors and other systems write: a byte order mark, blank lines, \r\n; and times since 1970
 * or later. */
static void times_count_from_the_first(struct check *check) {
    char error[ERROR_LENGTH];
    double at[2] = {-1, -1};
    write_file("\xEF\xBB\xBF \t\r\n" LINE("1e14", "9", "1", "[1]") "   \r\n\t\n\r\n" LINE(
        "100000000000000.125", "9", "1", "[1]") " \n \t");
    struct load *load = open_with((struct load_options){.replay = file_name}, error);
    CHECK(load, "%s", error);
    for (int i = 0; load && i < 2 && !load_is_done(load); i++)
        free(take_only(load, &at[i]).tokens);
    CHECK(at[0] == 0 && fabs(at[1] - 1.25e-4) < 1e-9, "at %.17g and %.17g", at[0], at[1]);
    CHECK(load && load_is_done(load) && !load_error(load), "%s", load ? load_error(load) : error);
    load_close(load);
}

static void bad_traces_are_told_by_their_line(struct check *check) {
    static const struct {
        const char *text, *error; /* behind the name of the file */
    } cases[] = {
        {"", ": no requests in it"},
        {"\n\n", ": no requests in it"},
        {"hello\n", ":1: byte 0: expected a value"},
        {"[1]\n", ":1: expected an object"},
        {"{\"timestamp\":0}\n", ":1: input_length: missing"},
        {"{\"input_length\":1,\"output_length\":1,\"hash_ids\":[1]}\n", ":1: timestamp: missing"},
        {"{\"timestamp\":0,\"input_length\":1}\n", ":1: output_length: missing"},
        {"{\"timestamp\":0,\"input_length\":1,\"output_length\":1}\n", ":1: hash_ids: missing"},
        {LINE("0", "1", "1", "7"), ":1: hash_ids: expected a list"},
        {LINE("0", "1", "1", "[]"), ":1: hash_ids: got 0, expected 1, one for every 512 tokens"},
        {LINE("0", "513", "1", "[1]"), ":1: hash_ids: got 1, expected 2"},
        {LINE("0", "2147483647", "1", "[1]"), ":1: hash_ids: got 1, expected 4194304"},
        {LINE("0", "1", "1", "[-1]"), ":1: hash_ids: got -1, expected whole numbers"},
        {LINE("0", "1", "1", "[1.5]"), ":1: hash_ids: got 1.5"},
        {LINE("0", "1", "1", "[99999999999999999999]"), ":1: hash_ids: got 99999999999999999999"},
        {LINE("0", "1", "1", "[\"a\"]"), ":1: hash_ids: got a"},
        {LINE("0", "-5", "1", "[1]"), ":1: input_length: got -5, expected a whole number from 1"},
        {LINE("0", "0", "1", "[1]"), ":1: input_length: got 0"},
        {LINE("0", "1.5", "1", "[1]"), ":1: input_length: got 1.5"},
        {LINE("0", "1e300", "1", "[1]"), ":1: input_length: got 1e300"},
        {LINE("0", "1", "-1", "[1]"), ":1: output_length: got -1"},
        {LINE("0", "1", "9999999999", "[1]"), ":1: output_length: got 9999999999"},
        {LINE("0", "\"8\"", "1", "[1]"), ":1: input_length: got 8"},
        {LINE("-1", "1", "1", "[1]"), ":1: timestamp: got -1"},
        {LINE("1e999", "1", "1", "[1]"), ":1: timestamp: got 1e999"},
        {GOOD "\n" GOOD LINE("4", "1", "1", "[1]"), ":4: timestamp: got 4, expected at least 5"},
        {GOOD "{\"timestamp\"\n", ":2: byte 12: expected ':'"},
    };
    char error[ERROR_LENGTH], expected[ERROR_LENGTH];
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        double at;
        write_file(cases[i].text);
        struct load *load = open_with((struct load_options){.replay = file_name}, error);
        while (load && !load_is_done(load))
            free(take_only(load, &at).tokens);
        if (load)
            (void)snprintf(error, sizeof error, "%s", load_error(load) ? load_error(load) : "none");
        (void)snprintf(expected, sizeof expected, "%s%s", file_name, cases[i].error);
        CHECK(strncmp(error, expected, strlen(expected)) == 0, "got \"%s\", expected \"%s\"", error,
              expected);
        load_close(load);
    }
    CHECK(!open_with((struct load_options){.replay = "/nonexistent/trace"}, error) &&
              strstr(error, "/nonexistent/trace: No such file"),
          "%s", error);
    CHECK(!open_with((struct load_options){.replay = "/tmp"}, error) && strstr(error, "/tmp: Is a"),
          "%s", error);
}

/* Bytes of a good trace changed, left out or doubled: each is a load, or refused in one line. */
static void broken_traces_are_survived(struct check *check) {
    static const char bytes[] = "0123456789-.eE,:{}[]\" \n\\\x01\xff";
    enum { TIMES = 1000 };
    char error[ERROR_LENGTH], text[2 * sizeof trace];
    int n_refused = 0, n_cut = 0;
    for (int i = 0; i < TIMES; i++) {
        size_t n = sizeof trace - 1;
        memcpy(text, trace, n + 1);
        for (int edit = 0; edit <= i % 3; edit++) {
            uint64_t word = answers_random(7, (uint64_t)(4 * i + edit));
            size_t at = word / 1024 % n;
            if (word % 3 == 0)
                text[at] = bytes[word / 8 % (sizeof bytes - 1)];
            else /* what comes then, one byte back or on */
                memmove(text + at + (word % 3 == 1), text + at + (word % 3 == 2),
                        n - at + (word % 3 == 1));
            n = strlen(text);
        }
        double at;
        write_file(text);
        struct load *load = open_with((struct load_options){.replay = file_name}, error);
        n_refused += !load;
        while (load && !load_is_done(load))
            free(take_only(load, &at).tokens);
        n_cut += load && load_error(load);
        if (load && load_error(load))
            (void)snprintf(error, sizeof error, "%s", load_error(load));
        if (!load || load_error(load))
            CHECK(strstr(error, file_name) == error && !strchr(error, '\n'), "%s", error);
        load_close(load);
    }
    CHECK(n_refused > TIMES / 20 && n_cut > TIMES / 20 && n_refused + n_cut < TIMES - TIMES / 40,
          "%d refused, %d cut", n_refused, n_cut);
}

static void lines_follow_answers(struct check *check) {
    char error[ERROR_LENGTH];
    write_file("{\"id\":\"b\",\"after\":\"none\",\"ids\":[9],\"n\":1}\n" /* fails */
               "{\"id\":\"a\",\"ids\":[11,12],\"n\":3,\"at\":2}\n"       /* at 2 s */
               "{\"id\":\"c\",\"after\":\"a\",\"ids\":[13],\"n\":2}\n"   /* when that has ended */
               "{\"after\":\"c\",\"ids\":[14],\"n\":1,\"at\":50}\n"      /* at 50 s */
               "{\"ids\":[15],\"n\":1,\"at\":1}\n"                       /* at 1 s */
               "{\"after\":\"b\",\"ids\":[16],\"n\":1}\n"                /* fails with it */
               "{\"ids\":[17]}\n"                                        /* fails: no n */
               "{\"ids\":[1000],\"n\":1}\n"                              /* fails: no token */
               "{\"ids\":[18],\"n\":2000,\"at\":3,\"deadline\":0.5}\n"   /* fails: too late */
               "{\"prompt\":\"Hi\",\"n\":1}\n");                         /* fails: no tokenizer */
    struct load *load = open_with((struct load_options){.file = file_name}, error);
    CHECK(load, "%s", error);
    if (!load)
        return;
    struct ran ran = run_virtually(load);
    static const int first[] = {15, 11, 11, 18, 11};
    static const int n_prompt[] = {1, 2, 6, 1, 9};
    static const double submitted[] = {2, 3, 3.003, 4, 51}; /* the load began at 1 */
    CHECK(ran.n == 5, "%d ran", ran.n);
    for (int i = 0; i < 5 && i < ran.n; i++) {
        const struct request *r = &ran.requests[i];
        CHECK(ran.first[i] == first[i] && r->n_prompt == n_prompt[i], "%d: %d first, %d tokens", i,
              ran.first[i], r->n_prompt);
        CHECK(fabs(r->submitted - submitted[i]) < 1e-9, "%d: at %g", i, r->submitted);
    }
    struct load_result result = load_result(load);
    CHECK(result.requests == 10 && result.failed == 6 && result.generated_tokens == 4 + 3 + 500,
          "%d, %d failed, %d tokens", (int)result.requests, (int)result.failed,
          (int)result.generated_tokens);
    char says[ERROR_LENGTH];
    (void)snprintf(says, sizeof says, "request b: %s:1: after: got \"none\"", file_name);
    CHECK(strstr(result.first_error, says), "%s", result.first_error);
    CHECK(load_is_done(load), "it is not done");
    load_close(load);
}

static void what_came_of_a_load_is_summed(struct check *check) {
    char error[ERROR_LENGTH];
    write_file(LINE("0", "600", "5", "[1,2]") LINE("10", "600", "3", "[1,3]")
                   LINE("10", "2049", "1", "[4,4,4,4,4]"));
    struct load *load =
        open_with((struct load_options){.replay = file_name, .ttft = 3.1, .itl = 1.1}, error);
    struct ran ran = run_virtually(load);
    struct load_result r = load_result(load);
    CHECK(ran.n == 3 && r.requests == 3 && r.failed == 1, "%d ran, %d failed", ran.n,
          (int)r.failed);
    CHECK(strstr(r.first_error, "request 2: the prompt has 2049 tokens"), "%s", r.first_error);
    CHECK(r.prompt_tokens == 600 + 600 && r.cached_tokens == 512, "%d tokens, %d cached",
          (int)r.prompt_tokens, (int)r.cached_tokens);
    CHECK(r.generated_tokens == 8 && fabs(r.seconds - 0.013) < 1e-9, "%d tokens in %g s",
          (int)r.generated_tokens, r.seconds);
    /* three chunks of 256, then a token a step; a hit needs one; the third has no times */
    CHECK(fabs(r.times[TIME_TTFT][LOAD_MEAN] - 2) < 1e-6, "ttft %g", r.times[TIME_TTFT][LOAD_MEAN]);
    CHECK(fabs(r.times[TIME_TTFT][LOAD_P99] / 3 - 1) < 0.006, "ttft 99 %%: %g",
          r.times[TIME_TTFT][LOAD_P99]);
    CHECK(fabs(r.times[TIME_ITL][LOAD_P50] - 1) < 0.006, "itl %g", r.times[TIME_ITL][LOAD_P50]);
    CHECK(r.good == 2, "%d kept the targets", (int)r.good);
    load_close(load);
    load = open_with((struct load_options){.replay = file_name, .ttft = 2.9}, error);
    (void)run_virtually(load);
    CHECK(load_result(load).good == 1, "%d kept 2.9 ms", (int)load_result(load).good);
    load_close(load);
}

static void an_answer_is_as_long_as_said_or_cut(struct check *check) {
    char error[ERROR_LENGTH];
    write_file(LINE("0", "2000", "48", "[1,2,3,4]") LINE("0", "2000", "49", "[1,2,3,4]"));
    for (int lines = 0; lines < 2; lines++) {
        struct load_options options = {.replay = lines ? NULL : file_name, .file = file_name};
        struct load *load = open_with(options, error);
        CHECK(load, "%s", error);
        if (!load)
            return;
        (void)run_virtually(load);
        struct load_result r = load_result(load);
        CHECK(r.requests == 2 && r.failed == 0 && r.cut == 1 && r.good == 1,
              "%d, %d failed, %d cut, %d good", (int)r.requests, (int)r.failed, (int)r.cut,
              (int)r.good);
        load_close(load);
        write_file("{\"ids\":[1,2,3],\"n\":2045}\n{\"ids\":[1,2,3],\"n\":2046}\n");
    }
}

static void a_line_comes_when_it_says_and_has_no_stop(struct check *check) {
    char error[ERROR_LENGTH];
    double at[2];
    write_file("{\"ids\":[1],\"n\":1,\"at\":86400.001}\n{\"ids\":[1],\"n\":1,\"at\":86400.003}\n"
               "{\"ids\":[2],\"n\":2,\"stop\":\"end\",\"at\":90000}\n");
    struct load *load = open_with((struct load_options){.file = file_name}, error);
    CHECK(load, "%s", error);
    for (int i = 0; load && i < 2; i++)
        free(take_only(load, &at[i]).tokens);
    CHECK(fabs(at[0] - 86400.001) < 1e-6 && fabs(at[1] - 86400.003) < 1e-6, "%.6f, %.6f", at[0],
          at[1]);
    CHECK(load && load_is_done(load) && load_result(load).failed == 1 &&
              strstr(load_result(load).first_error, "stop: a made-up answer has no text"),
          "the third: %s", load ? load_result(load).first_error : error);
    load_close(load);
}

static void loads_left_early_are_freed(struct check *check) { /* the sanitizer sees what is not */
    char error[ERROR_LENGTH];
    write_file(
        "{\"id\":\"a\",\"ids\":[1],\"n\":1}\n{\"id\":\"b\",\"after\":\"a\",\"ids\":[2],\"n\":1}\n"
        "{\"after\":\"b\",\"ids\":[3],\"n\":1}\n{\"ids\":[4],\"n\":1,\"at\":9}\n");
    for (int n = 0; n < 4; n++) {
        double at;
        struct load *load = open_with((struct load_options){.file = file_name}, error);
        for (int i = 0; load && i < n && !load_is_done(load); i++)
            free(take_only(load, &at).tokens);
        CHECK(load, "%s", error);
        load_close(load);
    }
}

/* ---- on an engine ---- */

static struct engine *open_small(struct model *model, bool *ends) {
    char error[ERROR_LENGTH] = "";
    struct backend_options options = {.n_threads = 2};
    struct engine_config config = {.model = model,
                                   .backend = cpu_backend_open(&options, error),
                                   .ends_text = ends,
                                   .n_workers = 2,
                                   .max_batch = 8,
                                   .chunk = 256,
                                   .host_blocks = 64};
    for (int i = 0; i < 2; i++) {
        config.workers[i].n_shards = 1;
        config.workers[i].devices[0] = i;
        config.workers[i].blocks = 300;
        config.workers[i].prefills = i == 0;
        config.workers[i].decodes = i == 1;
    }
    struct engine *engine = engine_open(&config, error);
    if (!engine || !engine_start(engine))
        printf("    %s\n", error);
    return engine;
}

/* The generated tokens that answers.h tells of the requests in the file, each with PER_ANSWER, in
 * the order of the file; how many. */
static int answer_ids(struct answers *a, int *ids) {
    struct requests requests = {0};
    struct request_spec spec;
    char error[ERROR_LENGTH], out[80], line[4096];
    int n = 0, screen = dup(STDOUT_FILENO);
    (void)snprintf(out, sizeof out, "%s.out", file_name);
    if (!requests_open(&requests, file_name, error))
        return 0;
    while (requests_next(&requests, &defaults, &spec, error) > 0)
        requests_add(&requests, &spec);
    (void)fflush(stdout);
    FILE *file = freopen(out, "w", stdout);
    (void)answers_stream(a, &requests);
    (void)fflush(stdout);
    (void)dup2(screen, STDOUT_FILENO);
    (void)close(screen);
    requests_free(&requests);
    file = fopen(out, "r");
    while (file && fgets(line, sizeof line, file)) {
        char *at = strstr(line, "\"ids\":[");
        int *to = ids + PER_ANSWER * strtol(line + 7, NULL, 10); /* of {"id":"N" */
        for (at = at ? at + 7 : NULL; at && *at != ']'; at += *at == ',', n++)
            *to++ = (int)strtol(at, &at, 10);
    }
    if (file)
        (void)fclose(file);
    (void)unlink(out);
    return n;
}

/* The same, of a load on the engine, one request after another. */
static int load_ids(struct load *load, struct engine *engine, int *ids) {
    int n = 0;
    while (!load_is_done(load)) {
        struct request *r = load_take(load);
        engine_lock(engine);
        sched_submit(engine_sched(engine), r, engine_now());
        engine_wake(engine);
        while (r->state != REQUEST_FINISHED)
            engine_wait(engine, INFINITY);
        engine_unlock(engine);
        for (int i = r->n_prompt; i < r->length; i++)
            ids[PER_ANSWER * ((struct item *)r)->place + i - r->n_prompt] = r->tokens[i];
        n += r->length - r->n_prompt;
        load_ended(load, r, engine_now());
    }
    return n;
}

static void *interrupt(void *argument) { /* as soon as it answers, as Ctrl-C does */
    struct answers *a = argument;
    int answering = ANSWERING;
    while (!atomic_compare_exchange_strong(&a->activity, &answering, INTERRUPTED))
        answering = ANSWERING;
    engine_lock(a->engine);
    engine_wake(a->engine);
    engine_unlock(a->engine);
    return NULL;
}

static void an_engine_runs_loads(struct check *check) {
    pthread_t thread;
    struct model model = {0};
    char error[ERROR_LENGTH];
    if (!model_open(&model, "random:stories-15m:q8_0", error)) {
        CHECK(false, "%s", error);
        return;
    }
    bool *ends = calloc((size_t)model.config.vocab_size, sizeof *ends);
    struct engine *engine = open_small(&model, ends);
    struct backend *backend = engine_config_of(engine)->backend;
    struct answers a = {.engine = engine, .vocab_size = model.config.vocab_size, .json = true};
    struct load_options options = {.replay = file_name, .answers = &a, .defaults = &defaults};

    write_file(LINE("0", "600", "4", "[1,2]") LINE("0", "530", "3", "[1,3]")
                   LINE("40", "1040", "2", "[1,2,5]") LINE("40", "90000", "2", "[]"));
    struct load *load = load_open(&options, error);
    CHECK(load, "%s", error);
    load_run(load, &a);
    struct load_result r = load_result(load);
    CHECK(r.requests == 3 && r.failed == 0 && r.generated_tokens == 9, "%d, %d failed, %d tokens",
          (int)r.requests, (int)r.failed, (int)r.generated_tokens);
    /* of the third 512 too, and of the 88 after them the first 5 blocks */
    CHECK(r.prompt_tokens == 2170 && r.cached_tokens == 512 + 512 + 80, "%d tokens, %d cached",
          (int)r.prompt_tokens, (int)r.cached_tokens);
    CHECK(r.seconds > 0.04 && r.times[TIME_TTFT][LOAD_P50] > 0, "%g s, ttft %g ms", r.seconds,
          r.times[TIME_TTFT][LOAD_P50]);
    CHECK(load_error(load) && strstr(load_error(load), ":4: hash_ids: got 0, expected 176"), "%s",
          load_error(load));
    load_close(load);

    static const char lines[] =
        "{\"id\":\"0\",\"ids\":[5,6,7],\"n\":9}\n{\"after\":\"0\",\"ids\":[8],\"n\":9,\"seed\":2}\n"
        "{\"ids\":[5,6,7],\"n\":9,\"temperature\":0.8}\n{\"ids\":[1],\"n\":9,\"temperature\":1.5}"
        "\n";
    int ours[64], theirs[64];
    write_file(lines);
    options = (struct load_options){.file = file_name, .answers = &a, .defaults = &defaults};
    load = load_open(&options, error);
    load_start(load, engine_now(), sched_max_length(engine_sched(engine)));
    int n = load_ids(load, engine, ours), n_theirs = answer_ids(&a, theirs);
    int differ = 0;
    for (int i = 0; i < n && i < n_theirs; i++)
        differ += ours[i] != theirs[i];
    CHECK(n == 36 && n_theirs == 36 && differ == 0, "%d and %d tokens, %d differ", n, n_theirs,
          differ);
    load_close(load);

    write_file("{\"id\":\"a\",\"ids\":[1],\"n\":2000}\n{\"after\":\"a\",\"ids\":[1],\"n\":2000}\n"
               "{\"ids\":[1],\"n\":1,\"at\":1e6}\n");
    load = load_open(&options, error);
    pthread_create(&thread, NULL, interrupt, &a);
    load_run(load, &a);
    pthread_join(thread, NULL);
    r = load_result(load);
    CHECK(load_is_done(load) && r.requests == 0 && r.failed == 0 && r.cancelled == 1,
          "interrupted: %d, %d failed, %d cancelled", (int)r.requests, (int)r.failed,
          (int)r.cancelled);
    load_close(load);
    for (int i = 0; i < N_TIMES; i++)
        free(a.times[i]);
    engine_close(engine);
    backend->close(backend);
    model_close(&model);
    free(ends);
}

int main(int argc, char **argv) {
    static const struct test tests[] = {
        {"quantiles are those of the values", quantiles_are_those_of_the_values},
        {"kept times have a bound", kept_times_have_a_bound},
        {"arrivals are a Poisson process", arrivals_are_a_poisson_process},
        {"plain prompts share nothing", plain_prompts_share_nothing},
        {"a trace becomes requests", a_trace_becomes_requests},
        {"times count from the first", times_count_from_the_first},
        {"bad traces are told by their line", bad_traces_are_told_by_their_line},
        {"broken traces are survived", broken_traces_are_survived},
        {"lines follow answers", lines_follow_answers},
        {"what came of a load is summed", what_came_of_a_load_is_summed},
        {"an answer is as long as said, or cut", an_answer_is_as_long_as_said_or_cut},
        {"a line comes when it says and has no stop", a_line_comes_when_it_says_and_has_no_stop},
        {"loads left early are freed", loads_left_early_are_freed},
        {"an engine runs loads", an_engine_runs_loads},
    };
    (void)snprintf(file_name, sizeof file_name, "%s.%d", path, (int)getpid());
    int status = check_run(tests, sizeof tests / sizeof *tests, argc, argv);
    (void)unlink(file_name);
    return status;
}
