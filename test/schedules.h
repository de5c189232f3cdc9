/* schedules.h: a model's requests, the answers that each gets alone, and those it gets among
 * others.
 *
 * What test_schedules.c (CPU) and test_gpu_schedules.c (CUDA, or its emulation) share: requests
 * greedy and sampled, prompts of 1 to 200 tokens, many with a long common beginning, and second
 * turns that continue the answers of others; the reference is each request alone in a process of
 * its own. Then one process takes all of them at once, with the options of a schedule, and each
 * answer must be that of the reference, token by token, and the counters of --stats as the
 * schedule's `proof` says, so that what a case is about did happen.
 *
 *     struct turns *turns = turns_open(check, TWIN, "--devices cpu:1", FIRST_TURNS, SECOND_TURNS);
 *     run_schedule(check, turns, "--devices cpu:2", "hand_overs>=10");
 *
 * Tokens are a coarse sieve: an error in a logit's last bit changes hardly any of them. So the
 * first model is made for these tests: its output rows stand in groups whose members differ only
 * in their last bits, so that the last bits of the hidden state decide which is the likeliest. */
#ifndef SCHEDULES_H
#define SCHEDULES_H
#include "files.h"
#include "../lib/gguf.h"

#include <inttypes.h>
#include <sys/stat.h>

enum {
    FIRST_TURNS = 24,
    SECOND_TURNS = 8, /* each continues the answer of the first turn of its number */
    ALL_TURNS = FIRST_TURNS + SECOND_TURNS,
    NARROW = 64, /* requests of the test of little memory */
    MAX_REQUESTS = 80,
    MAX_TOKENS = 640,
    ID_LENGTH = 24,
    TWINS = 8,        /* output rows of one group */
    SHARED = 0,       /* stream of random tokens that the common beginnings are taken from */
    BLOCK = 16,       /* tokens of a KV block */
    BIG_DEVICE = 1024 /* blocks: room for everything */
};

#define REF DATA "ref/"

struct subject {
    const char *name, *path, *more; /* more: options that the model needs */
    int vocab_size;                 /* ids are drawn below this; 0: prompts of words */
    int longest_prompt, longest_answer;
    double heat; /* of temperatures: a model that is sure of itself needs more */
};

enum { TWIN, Q8, BF16, STORY, CHECKPOINT, EXPERTS, WINDOWS, N_MODELS };

static const struct subject models[N_MODELS] = {
    [TWIN] = {"twin", "$T/twin", "", 331, 200, 120, 1},
    [Q8] = {"qwen3-q8_0", REF "qwen3-q8_0.gguf", "", 397, 200, 120, 1},
    [BF16] = {"llama31-bf16", REF "llama31-bf16.gguf", "", 331, 200, 120, 4},
    [STORY] = {"model.bin", "model.bin", "", 0, 100, 60, 1},
    [EXPERTS] = {"gpt-oss-mxfp4", REF "gpt-oss-mxfp4.gguf", "", 331, 200, 120, 2},
    [WINDOWS] = {"gemma3-f32", REF "gemma3-f32.gguf", "", 331, 200, 120, 2},
    [CHECKPOINT] = {"aidreams", AIDREAMS, "--tokenizer " AIDREAMS_TOKENIZER, 0, 30, 60, 1},
};

struct wish { /* a request as the test sees it */
    char id[ID_LENGTH];
    char
        after[ID_LENGTH]; /* empty: none; else the first n_before of its ids are said by that one */
    int n_before;
    int ids[MAX_TOKENS];
    int n_ids, n_words; /* one of them is 0 */
    int n;
    double temperature, top_p, min_p;
    int top_k;
    uint64_t seed;
    double deadline; /* seconds after which it may end; 0: none */
    double cancel;   /* seconds after which a line cancels it; 0: none does */
};

struct answer {
    int ids[MAX_TOKENS];
    int n_ids, n_prompt, n_cached;
    const char *text, *reason, *error; /* "" if there is none */
    bool here;
};

struct turns { /* a model's requests and the answers that each got alone */
    const struct subject *model;
    const char *alone_options; /* beside those that give it room for everything */
    struct wish wishes[MAX_REQUESTS];
    struct answer alone[MAX_REQUESTS];
    int n_ended, n_cancelled; /* answers that a deadline has ended, or a line, of all runs */
    int n;
};

/* ---- numbers ---- */

/* The i-th number of a stream (SplitMix64). */
static uint64_t draw(uint64_t stream, uint64_t i) {
    uint64_t z = (stream + 1) * 0xd1342543de82ef95u + (i + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static int draw_below(uint64_t stream, uint64_t i, int limit) {
    return (int)(draw(stream, i) % (uint64_t)limit);
}

/* ---- the model whose last bits matter ---- */

/* Makes each row of the output matrix (rows, cols) the first of its group, with `bit`, the last
 * that the backend keeps, added to about every other element. */
static void make_twins(float *output, int64_t rows, int64_t cols, uint32_t bit) {
    for (int64_t row = 0; row < rows; row++) {
        const float *first = output + (row - row % TWINS) * cols;
        for (int64_t col = 0; col < cols; col++) {
            uint32_t bits;
            memcpy(&bits, first + col, sizeof bits);
            bits += row % TWINS != 0 && draw((uint64_t)row, (uint64_t)col) % 2 == 0 ? bit : 0;
            memcpy(output + row * cols + col, &bits, sizeof bits);
        }
    }
}

/* $T/twin */
static void write_twin_model(struct check *check) {
    static const char original[] = REF "llama-tp-f32.gguf";
    char error[ERROR_LENGTH] = "";
    struct gguf *file = gguf_open(original, error);
    const struct tensor *output = file ? gguf_tensor(file, "token_embd.weight") : NULL;
    CHECK(output && output->type == TYPE_F32, "%s: no f32 embedding; %s", original, error);
    if (output) {
        size_t length;
        char *bytes = read_file(check, original, &length);
        char *at = memmem(bytes, length, output->data, output->bytes);
        float *rows = memcpy(keep(output->bytes), at, output->bytes);
        make_twins(rows, output->rows, output->cols, LAST_BIT);
        memcpy(at, rows, output->bytes);
        write_file(check, "twin", bytes, length);
    }
    gguf_close(file);
}

/* ---- requests ---- */

static void set_sampling(struct wish *wish, int number, double heat) {
    static const struct {
        double temperature, top_p, min_p;
        int top_k;
    } ways[] = {{1, 1, 0, 0},      {0.7, 0.95, 0, 0}, {1.3, 1, 0.02, 0},
                {0.9, 0.9, 0, 40}, {2, 1, 0, 7},      {1, 0.8, 0.01, 100}};
    int way = number / 2 % (int)(sizeof ways / sizeof *ways);
    bool greedy = number % 2 == 0;
    wish->temperature = greedy ? 0 : ways[way].temperature * heat;
    wish->top_p = ways[way].top_p;
    wish->min_p = ways[way].min_p;
    wish->top_k = ways[way].top_k;
    wish->seed = draw(1, (uint64_t)number);
}

/* A prompt of `length` tokens: the first `n_shared` are those of every other such request. */
static void set_prompt(struct wish *wish, const struct subject *model, int number, int length,
                       int n_shared) {
    wish->n_ids = model->vocab_size > 0 ? length : 0;
    wish->n_words = model->vocab_size > 0 ? 0 : length;
    for (int i = 0; i < length; i++) {
        uint64_t stream = i < n_shared ? SHARED : 100 + (uint64_t)number;
        int limit = model->vocab_size > 0 ? model->vocab_size : 1 << 20;
        wish->ids[i] = draw_below(stream, (uint64_t)i, limit);
    }
}

static void set_first_turn(struct wish *wish, const struct subject *model, int number) {
    static const int lengths[] = {1, 16, 17, 40, 2, 90, 33, 64, 150, 15, 200, 48, 120};
    static const int answers[] = {60, 120, 33, 1, 90, 16, 75};
    int length = lengths[number % 13] * model->longest_prompt / 200;
    *wish = (struct wish){.n = answers[number % 7] * model->longest_answer / 120 / SHORTER};
    wish->n = wish->n < 1 ? 1 : wish->n;
    length = length < 1 ? 1 : length;
    snprintf(wish->id, ID_LENGTH, "first%d", number);
    set_prompt(wish, model, number, length, number % 3 == 0 ? 0 : length * 3 / 4);
    set_sampling(wish, number, model->heat);
}

/* Continues a first turn: its prompt, its answer, and 5 tokens more. */
static void set_second_turn(struct wish *wish, const struct subject *model,
                            const struct wish *first, const struct answer *answer, int number) {
    *wish = *first;
    snprintf(wish->id, ID_LENGTH, "second%d", number);
    for (int i = 0; i < answer->n_ids + 5; i++) {
        int more = draw_below(50 + (uint64_t)number, (uint64_t)i, model->vocab_size);
        wish->ids[wish->n_ids++] = i < answer->n_ids ? answer->ids[i] : more;
    }
    wish->n = 40;
    set_sampling(wish, number + 1, model->heat);
}

static void put_words(FILE *file, const struct wish *wish) {
    static const char *const words[] = {"the",  "fox",  "and", "went",  "Emma", "garden",
                                        "to",   "a",    "red", "stone", "was",  "very",
                                        "moon", "said", "she", "dreams"};
    for (int i = 0; i < wish->n_words; i++)
        fprintf(file, "%s%s", i > 0 ? " " : "", words[wish->ids[i] % 16]);
}

/* The request as a line of a request file. */
static void put_wish(FILE *file, const struct wish *wish) {
    fprintf(file, "{\"id\": \"%s\", ", wish->id);
    if (wish->after[0])
        fprintf(file, "\"after\": \"%s\", ", wish->after);
    fprintf(file, wish->n_words > 0 ? "\"prompt\": \"" : "\"ids\": [");
    put_words(file, wish);
    for (int i = wish->n_before; i < wish->n_ids; i++)
        fprintf(file, i > wish->n_before ? ",%d" : "%d", wish->ids[i]);
    fprintf(file, wish->n_words > 0 ? "\"" : "]");
    fprintf(file, ", \"n\": %d, \"temperature\": %g, \"top_p\": %g, \"min_p\": %g", wish->n,
            wish->temperature, wish->top_p, wish->min_p);
    fprintf(file, ", \"top_k\": %d, \"deadline\": %g, \"seed\": %" PRIu64 "}\n", wish->top_k,
            wish->deadline, wish->seed);
}

/* ---- what comes back ---- */

/* The text or number of an answer's key; (`nodes` go, what they point to stays). */
static const char *text_of(const struct json_node *nodes, const char *key) {
    const struct json_node *value = value_of(nodes, 0, key);
    return value && value->type == '"' ? value->text : "";
}

static int int_of(const struct json_node *nodes, const char *key) {
    const struct json_node *value = value_of(nodes, 0, key);
    return value && value->type == '0' ? atoi(value->text) : -1;
}

static void take_answer(const struct json_node *nodes, struct answer *answer) {
    const struct json_node *ids = value_of(nodes, 0, "ids");
    answer->here = true;
    answer->text = text_of(nodes, "text");
    answer->reason = text_of(nodes, "finish_reason");
    answer->error = text_of(nodes, "error");
    answer->n_prompt = int_of(nodes, "prompt_tokens");
    answer->n_cached = int_of(nodes, "cached_tokens");
    const struct json_node *end = ids ? nodes + ids->next : NULL;
    for (const struct json_node *id = ids + 1; ids && id < end && answer->n_ids < MAX_TOKENS; id++)
        answer->ids[answer->n_ids++] = atoi(id->text);
}

static void take_line(struct check *check, char *line, const struct wish *wishes, int n,
                      struct answer *answers) {
    char error[ERROR_LENGTH];
    struct json_node *nodes = json_parse(line, strlen(line), error);
    CHECK(nodes && nodes->type == '{', "no JSON object: %s: %.200s", error, line);
    if (!nodes)
        return;
    const struct json_node *id = value_of(nodes, 0, "id");
    int i = 0;
    while (i < n && id && strcmp(wishes[i].id, id->text) != 0)
        i++;
    bool expected = id && i < n && !answers[i].here;
    CHECK(expected || value_of(nodes, 0, "stats"), "answer of an unknown request, or twice: %s",
          id ? id->text : "none");
    if (expected)
        take_answer(nodes, &answers[i]);
    free(nodes);
}

/* Requests, and, while they run, the lines that cancel some: those that are to come first stand
 * first. */
static void put_wishes(FILE *file, const struct wish *wishes, int n) {
    double waited = 0;
    for (int i = 0; i < n; i++)
        put_wish(file, &wishes[i]);
    for (int i = 0; i < n; i++) {
        if (wishes[i].cancel <= 0)
            continue;
        fflush(file);
        usleep((useconds_t)(1e6 * (wishes[i].cancel - waited)));
        waited = wishes[i].cancel;
        fprintf(file, "{\"cancel\": \"%s\"}\n", wishes[i].id);
    }
    fclose(file);
}

/* Runs one process on all n requests, which it reads at once, or, where lines are to cancel some
 * meanwhile, from a pipe. answers: (n) zeros. */
static struct outcome run_wishes(struct check *check, const struct subject *model,
                                 const char *options, const struct wish *wishes, int n,
                                 struct answer *answers) {
    bool piped = false;
    for (int i = 0; i < n; i++)
        piped = piped || wishes[i].cancel > 0;
    unlink(scratch("wishes"));
    CHECK(!piped || mkfifo(scratch("wishes"), 0600) == 0, "no $T/wishes");
    if (!piped)
        put_wishes(fopen(scratch("wishes"), "w"), wishes, n);
    fflush(stdout);
    pid_t writer = piped ? fork() : -1;
    if (writer == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        put_wishes(fopen(scratch("wishes"), "w"), wishes, n);
        _exit(0);
    }
    struct outcome outcome =
        run(check, "%s %s -f $T/wishes --json --stats %s", model->path, model->more, options);
    if (piped) {
        kill(writer, SIGKILL); /* if the program has not read all, it still writes */
        waitpid(writer, NULL, 0);
    }
    char *rest = memcpy(keep(outcome.out_length + 1), outcome.out, outcome.out_length), *line;
    while ((line = strsep(&rest, "\n")))
        if (*line)
            take_line(check, line, wishes, n, answers);
    CHECK(outcome.status == 0 || outcome.status == 3, "%s: exit status %d: %.300s", options,
          outcome.status, outcome.err);
    return outcome;
}

/* ---- the reference ---- */

static void run_alone(struct check *check, struct turns *turns, int i) {
    char options[128];
    snprintf(options, sizeof options, "%s --kv-device %db --kv-host 0", turns->alone_options,
             BIG_DEVICE);
    struct outcome o =
        run_wishes(check, turns->model, options, &turns->wishes[i], 1, &turns->alone[i]);
    CHECK(o.status == 0 && turns->alone[i].here && turns->alone[i].n_cached == 0, "%s alone: %d",
          turns->wishes[i].id, o.status);
}

static int count_distinct(const struct turns *turns) {
    bool seen[1 << 16] = {false};
    int n = 0;
    for (int i = 0; i < turns->n; i++) {
        for (int t = 0; t < turns->alone[i].n_ids; t++) {
            bool *token = &seen[turns->alone[i].ids[t] & 0xffff];
            n += !*token;
            *token = true;
        }
    }
    return n;
}

/* What was asked first is asked by most tests, and computed once. */
static struct turns *turns_open(struct check *check, int model, const char *alone_options,
                                int n_first, int n_second) {
    static struct turns first;
    struct turns *turns = keep(sizeof *turns);
    if (first.model == &models[model] && first.n == n_first + n_second &&
        strcmp(first.alone_options, alone_options) == 0)
        return memcpy(turns, &first, sizeof first);
    turns->model = &models[model];
    turns->alone_options = alone_options;
    if (model == TWIN)
        write_twin_model(check);
    for (; turns->n < n_first; turns->n++) {
        set_first_turn(&turns->wishes[turns->n], turns->model, turns->n);
        run_alone(check, turns, turns->n);
    }
    n_second = turns->model->vocab_size > 0 ? n_second : 0;
    for (int i = 0; i < n_second; i++, turns->n++) {
        set_second_turn(&turns->wishes[turns->n], turns->model, &turns->wishes[i], &turns->alone[i],
                        i);
        run_alone(check, turns, turns->n);
    }
    int n_distinct = count_distinct(turns);
    CHECK(n_distinct >= 60, "%s: answers of %d different tokens show little", turns->model->name,
          n_distinct);
    if (!first.model)
        first = *turns;
    return turns;
}

/* ---- judging ---- */

/* got is what `alone` is, or, where the memory's end cut it short, its beginning. */
static void check_answer(struct check *check, const char *name, const struct wish *wish,
                         const struct answer *got, const struct answer *alone, bool cut) {
    CHECK(got->here, "%s: %s: no answer", name, wish->id);
    if (!got->here)
        return;
    int same = 0, n = got->n_ids < alone->n_ids ? got->n_ids : alone->n_ids;
    while (same < n && got->ids[same] == alone->ids[same])
        same++;
    bool whole = same == got->n_ids && (cut || same == alone->n_ids);
    CHECK(whole,
          "%s: %s (prompt of %d, temperature %g, seed %" PRIu64 "): token %d of %d: got %d, alone "
          "%d; %s %s",
          name, wish->id, got->n_prompt, wish->temperature, wish->seed, same, alone->n_ids,
          same < got->n_ids ? got->ids[same] : -1, same < alone->n_ids ? alone->ids[same] : -1,
          got->reason, got->error);
    if (!whole || cut)
        return;
    CHECK(strcmp(got->text, alone->text) == 0, "%s: %s: text %.80s, alone %.80s", name, wish->id,
          got->text, alone->text);
    CHECK(strcmp(got->reason, alone->reason) == 0, "%s: %s: ended by %s, alone by %s", name,
          wish->id, got->reason, alone->reason);
}

/* Counters that were to be reached, and those that were not: how often blocks are paged, and
 * requests preempted, depends on the clock as well. */
static int n_wished, n_missed;

/* proof: conditions on the counters such as `pages_out>=20 preemptions<=0`. */
static void check_counters(struct check *check, const char *name, const char *proof,
                           const struct outcome *o) {
    char key[40], relation[3];
    int limit, length;
    for (; sscanf(proof, " %39[a-z_]%2[<>=]%d%n", key, relation, &limit, &length) == 3;
         proof += length) {
        double value = number(o, "stats", key);
        bool least = relation[0] == '>';
        CHECK(value >= 0, "%s: there is no counter %s", name, key);
        CHECK(least || value <= limit, "%s: %s is %g, at most %d", name, key, value, limit);
        n_wished += least;
        n_missed += least && value < limit;
        if (least && value < limit)
            printf("    coverage: %s: %s is %g, wanted %d\n", name, key, value, limit);
    }
    CHECK(proof[strspn(proof, " ")] == 0, "%s: cannot be read: %s", name, proof);
}

/* Schedules that do not do what they are for prove nothing. */
static void check_coverage(struct check *check) {
    CHECK(n_missed * 10 <= n_wished, "%d of %d counters were not reached", n_missed, n_wished);
}

/* Runs all requests at once, and compares; those with a deadline, or that are cancelled, may have
 * ended before. */
static struct outcome run_schedule(struct check *check, struct turns *turns, const char *schedule,
                                   const char *proof) {
    char name[512];
    struct answer *answers = keep(MAX_REQUESTS * sizeof *answers);
    snprintf(name, sizeof name, "%s %s", turns->model->name, schedule);
    struct outcome o = run_wishes(check, turns->model, schedule, turns->wishes, turns->n, answers);
    int n_ended = 0, n_cancelled = 0;
    for (int i = 0; i < turns->n; i++) {
        bool ended = turns->wishes[i].deadline > 0 && answers[i].here &&
                     strstr(answers[i].error, "its deadline");
        bool cancelled = turns->wishes[i].cancel > 0 && answers[i].here &&
                         strcmp(answers[i].reason, "cancelled") == 0;
        n_ended += ended;
        n_cancelled += cancelled;
        check_answer(check, name, &turns->wishes[i], &answers[i], &turns->alone[i],
                     ended || cancelled);
    }
    turns->n_ended += n_ended;
    turns->n_cancelled += n_cancelled;
    CHECK(o.status == (n_ended + n_cancelled > 0 ? 3 : 0), "%s: exit status %d", name, o.status);
    check_counters(check, name, proof, &o);
    return o;
}
#endif /* SCHEDULES_H */
