/* test_schedules.c: the same text in every schedule, bit for bit.
 *
 * Each model gets a list of requests: greedy and sampled, prompts of 1 to 200 tokens, many with a
 * long common beginning, and second turns that continue the answers of others. The reference is
 * each request alone in a process of its own, on one device with room for everything. Then one
 * process takes all of them at once, in every schedule of the table below: batched, chunked, handed
 * over, sharded, paged, preempted, dropped and recomputed. Every answer must be that of the
 * reference, token by token, and the counters of --stats must show that what a case is about did
 * happen.
 *
 * Tokens are a coarse sieve: an error in a logit's last bit changes hardly any of them. So the
 * first model is made for this test: its output rows stand in groups whose members differ only in
 * their last bits, so that the last bits of the hidden state decide which member is the likeliest.
 *
 * Run from the repository's root; an argument picks tests. Read next: test_reference.c. */
#define _GNU_SOURCE
#define JSON_IMPLEMENTATION
#define GGUF_IMPLEMENTATION
#include "child.h"
#include "gguf.h"
#include "json.h"

#include <inttypes.h>
#include <stdint.h>

enum {
    FIRST_TURNS = 24,
    SECOND_TURNS = 8, /* each continues the answer of the first turn of its number */
    ALL_TURNS = FIRST_TURNS + SECOND_TURNS,
    NARROW = 64, /* requests of the test of little memory */
    MAX_REQUESTS = 80,
    MAX_TOKENS = 640,
    ID_LENGTH = 24,
    PATH_LENGTH = 64,
    LINE_LENGTH = 8192,
    TWINS = 8,        /* output rows of one group */
    SHARED = 0,       /* stream of random tokens that the common beginnings are taken from */
    BLOCK = 16,       /* tokens of a KV block */
    BIG_DEVICE = 1024 /* blocks: room for everything */
};

#define REF "test/data/ref/"

struct subject {
    const char *name, *path, *more; /* more: options that the model needs */
    int vocab_size;                 /* ids are drawn below this; 0: prompts of words */
    int longest_prompt, longest_answer;
    double heat; /* of temperatures: a model that is sure of itself needs more */
};

enum { TWIN, Q8, BF16, STORY, CHECKPOINT, N_MODELS };

static const struct subject models[N_MODELS] = {
    [TWIN] = {"twin", NULL, "", 331, 200, 120, 1},
    [Q8] = {"qwen3-q8_0", REF "qwen3-q8_0.gguf", "", 397, 200, 120, 1},
    [BF16] = {"llama31-bf16", REF "llama31-bf16.gguf", "", 331, 200, 120, 4},
    [STORY] = {"model.bin", "model.bin", "", 0, 100, 60, 1},
    [CHECKPOINT] = {"aidreams", "test/data/aidreams260K.bin",
                    "--tokenizer test/data/aidreams_tokenizer.bin", 0, 30, 60, 1},
};

struct wish { /* a request as the test sees it */
    char id[ID_LENGTH];
    int ids[MAX_TOKENS];
    int n_ids, n_words; /* one of them is 0 */
    int n;
    double temperature, top_p, min_p;
    int top_k;
    uint64_t seed;
};

struct answer {
    int ids[MAX_TOKENS];
    int n_ids, n_prompt, n_cached;
    char *text, *reason, *error; /* "" if there is none */
    bool here;
};

struct counter {
    char key[40];
    double value;
};

struct counters {
    struct counter all[64];
    int n;
};

struct turns { /* a model's requests and the answers that each got alone */
    const struct subject *model;
    char path[PATH_LENGTH];
    struct wish wishes[MAX_REQUESTS];
    struct answer alone[MAX_REQUESTS];
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

/* Makes each row of the output matrix (rows, cols) the first of its group, with about every other
 * element one bit larger. */
static void make_twins(float *output, int64_t rows, int64_t cols) {
    for (int64_t row = 0; row < rows; row++) {
        const float *first = output + (row - row % TWINS) * cols;
        for (int64_t col = 0; col < cols; col++) {
            uint32_t bits;
            memcpy(&bits, first + col, sizeof bits);
            bits += row % TWINS != 0 && draw((uint64_t)row, (uint64_t)col) % 2 == 0;
            memcpy(output + row * cols + col, &bits, sizeof bits);
        }
    }
}

static void write_twin_model(struct check *check, char path[PATH_LENGTH]) {
    static const char original[] = REF "llama-tp-f32.gguf";
    char error[GGUF_ERROR_LENGTH] = "";
    snprintf(path, PATH_LENGTH, "/tmp/dynamo_twin_XXXXXX");
    FILE *from = fopen(original, "rb");
    struct gguf *file = gguf_open(original, error);
    const struct tensor *output = file ? gguf_tensor(file, "token_embd.weight") : NULL;
    CHECK(from && output && output->type == TYPE_F32, "%s: no f32 embedding; %s", original, error);
    if (from && output) {
        size_t length;
        char *bytes = child_output(from, &length);
        char *at = memmem(bytes, length, output->data, output->bytes);
        float *rows = malloc(output->bytes);
        memcpy(rows, at, output->bytes);
        make_twins(rows, output->rows, output->cols);
        memcpy(at, rows, output->bytes);
        int descriptor = mkstemp(path);
        CHECK(write(descriptor, bytes, length) == (ssize_t)length, "%s", path);
        close(descriptor);
        free(rows);
        free(bytes);
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
    *wish = (struct wish){.n = answers[number % 7] * model->longest_answer / 120};
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
    fprintf(file, wish->n_words > 0 ? "\"prompt\": \"" : "\"ids\": [");
    put_words(file, wish);
    for (int i = 0; i < wish->n_ids; i++)
        fprintf(file, i > 0 ? ",%d" : "%d", wish->ids[i]);
    fprintf(file, wish->n_words > 0 ? "\"" : "]");
    fprintf(file, ", \"n\": %d, \"temperature\": %g, \"top_p\": %g, \"min_p\": %g", wish->n,
            wish->temperature, wish->top_p, wish->min_p);
    fprintf(file, ", \"top_k\": %d, \"seed\": %" PRIu64 "}\n", wish->top_k, wish->seed);
}

/* ---- what comes back ---- */

/* The value of a key of the object nodes[at]; NULL: it has none. */
static const struct json_node *value_of(const struct json_node *nodes, int at, const char *key) {
    for (int i = at + 1; i < nodes[at].next; i = nodes[i + 1].next)
        if (strcmp(nodes[i].text, key) == 0)
            return &nodes[i + 1];
    return NULL;
}

static char *text_of(const struct json_node *nodes, const char *key) {
    const struct json_node *value = value_of(nodes, 0, key);
    return strdup(value && value->type == '"' ? value->text : "");
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

static void take_counters(const struct json_node *nodes, int at, struct counters *counters) {
    for (int i = at + 1; i < nodes[at].next && counters->n < 64; i = nodes[i + 1].next) {
        struct counter *counter = &counters->all[counters->n];
        if (nodes[i + 1].type != '0')
            continue;
        snprintf(counter->key, sizeof counter->key, "%.39s", nodes[i].text);
        counter->value = atof(nodes[i + 1].text);
        counters->n++;
    }
}

static int find_wish(const struct wish *wishes, int n, const char *id) {
    for (int i = 0; i < n; i++)
        if (strcmp(wishes[i].id, id) == 0)
            return i;
    return -1;
}

static void free_answers(struct answer *answers, int n) {
    for (int i = 0; i < n; i++) {
        free(answers[i].text);
        free(answers[i].reason);
        free(answers[i].error);
        answers[i] = (struct answer){0};
    }
}

static void take_line(struct check *check, char *line, const struct wish *wishes, int n,
                      struct answer *answers, struct counters *counters) {
    char error[JSON_ERROR_LENGTH];
    struct json_node *nodes = json_parse(line, strlen(line), error);
    CHECK(nodes && nodes->type == '{', "no JSON object: %s: %.200s", error, line);
    if (!nodes)
        return;
    const struct json_node *stats = value_of(nodes, 0, "stats");
    const struct json_node *id = value_of(nodes, 0, "id");
    int i = id ? find_wish(wishes, n, id->text) : -1;
    CHECK(stats || (i >= 0 && !answers[i].here), "answer of an unknown request, or twice: %s",
          id ? id->text : "none");
    if (stats)
        take_counters(nodes, (int)(stats - nodes), counters);
    else if (i >= 0 && !answers[i].here)
        take_answer(nodes, &answers[i]);
    free(nodes);
}

/* Runs one process on all n requests. Returns its exit status. answers: (n) zeros. */
static int run_wishes(struct check *check, const char *model, const char *options,
                      const struct wish *wishes, int n, struct answer *answers,
                      struct counters *counters) {
    char path[] = "/tmp/dynamo_wishes_XXXXXX";
    FILE *file = fdopen(mkstemp(path), "w");
    for (int i = 0; i < n; i++)
        put_wish(file, &wishes[i]);
    fclose(file);
    *counters = (struct counters){.n = 0};
    struct outcome outcome = run(check, "%s -f %s --json --stats %s", model, path, options);
    char *rest = outcome.out, *line;
    while ((line = strsep(&rest, "\n")))
        if (*line)
            take_line(check, line, wishes, n, answers, counters);
    unlink(path);
    int status = outcome.status;
    CHECK(status == 0 || status == 3, "%s: exit status %d: %.300s", options, status, outcome.err);
    outcome_free(&outcome);
    return status;
}

/* ---- the reference ---- */

static void run_alone(struct check *check, struct turns *turns, int i) {
    char options[128];
    struct counters counters;
    snprintf(options, sizeof options, "--devices cpu:1 --kv-device %db --kv-host 0 %s", BIG_DEVICE,
             turns->model->more);
    int status =
        run_wishes(check, turns->path, options, &turns->wishes[i], 1, &turns->alone[i], &counters);
    CHECK(status == 0 && turns->alone[i].here && turns->alone[i].n_cached == 0, "%s alone: %d",
          turns->wishes[i].id, status);
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

static struct turns *turns_open(struct check *check, int model) {
    struct turns *turns = calloc(1, sizeof *turns);
    turns->model = &models[model];
    if (model == TWIN)
        write_twin_model(check, turns->path);
    else
        snprintf(turns->path, sizeof turns->path, "%s", turns->model->path);
    for (; turns->n < FIRST_TURNS; turns->n++) {
        set_first_turn(&turns->wishes[turns->n], turns->model, turns->n);
        run_alone(check, turns, turns->n);
    }
    int n_second = turns->model->vocab_size > 0 ? SECOND_TURNS : 0;
    for (int i = 0; i < n_second; i++, turns->n++) {
        set_second_turn(&turns->wishes[turns->n], turns->model, &turns->wishes[i], &turns->alone[i],
                        i);
        run_alone(check, turns, turns->n);
    }
    int n_distinct = count_distinct(turns);
    CHECK(n_distinct >= 60, "%s: answers of %d different tokens show little", turns->model->name,
          n_distinct);
    return turns;
}

static void turns_close(struct turns *turns) {
    if (turns->model == &models[TWIN])
        unlink(turns->path);
    free_answers(turns->alone, turns->n);
    free(turns);
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

static double counter_value(const struct counters *counters, const char *key, bool *known) {
    *known = false;
    for (int i = 0; i < counters->n; i++) {
        if (strcmp(counters->all[i].key, key) == 0) {
            *known = true;
            return counters->all[i].value;
        }
    }
    return 0;
}

/* proof: conditions such as `pages_out>=20 preemptions<=0`. */
static void check_counters(struct check *check, const char *name, const char *proof,
                           const struct counters *counters) {
    char key[40], relation[3];
    int limit, length;
    for (; sscanf(proof, " %39[a-z_]%2[<>=]%d%n", key, relation, &limit, &length) == 3;
         proof += length) {
        bool known;
        double value = counter_value(counters, key, &known);
        bool holds = relation[0] == '>' ? value >= limit : value <= limit;
        CHECK(known && holds, "%s: %s is %g, expected %s %d%s", name, key, value, relation, limit,
              known ? "" : "; there is no such counter");
    }
    CHECK(proof[strspn(proof, " ")] == 0, "%s: cannot be read: %s", name, proof);
}

/* ---- the matrix ---- */

#define IN(model) (1 << (model))

enum {
    IDS_MODELS = IN(TWIN) | IN(Q8) | IN(BF16),
    FEW_MODELS = IN(TWIN) | IN(STORY),
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
    {FEW_MODELS, "--devices cpu:1 --chunk 1", "steps>=900"},
    {ALL_MODELS, "--devices cpu:1 --chunk 7", "steps>=100"},
    {FEW_MODELS, "--devices cpu:1 --chunk 64 --threads 3", "steps<=200"},
    {FEW_MODELS, "--devices cpu:1 --chunk 4096", "steps<=121"},
    {FEW_MODELS, "--devices cpu:2 --tp 2 --kv-device 4M",
     "device_blocks>=84 hand_overs<=0 blocks_transferred<=0"},
    {FEW_MODELS, "--devices cpu:4 --tp 4 --kv-device 4M --chunk 7",
     "device_blocks>=168 steps>=160 hand_overs<=0"},
    /* two pools */
    {ALL_MODELS, "--devices cpu:2 --copy-delay 1", "hand_overs>=15 blocks_transferred>=25"},
    {FEW_MODELS, "--devices cpu:3 --copy-delay 2 --chunk 7",
     "hand_overs>=10 blocks_transferred>=25"},
    {FEW_MODELS, "--devices cpu:3 --prefill 0,2 --decode 1 --chunk 16",
     "hand_overs>=10 blocks_transferred>=25"},
    {FEW_MODELS, "--devices cpu:4 --kv-device 100b --copy-delay 3 --max-batch 4",
     "hand_overs>=10 local_prefills>=1 device_blocks_used>=101"},
    {FEW_MODELS, "--devices cpu:4 --tp 2 --copy-delay 4", "hand_overs>=15 blocks_transferred>=25"},
    {IN(TWIN), "--devices cpu:8 --tp 4 --copy-delay 5 --chunk 64",
     "hand_overs>=10 blocks_transferred>=40"},
    {FEW_MODELS, "--devices cpu:4 --colocate --kv-device 100b --copy-delay 6",
     "hand_overs<=0 prefix_hit_tokens>=100"},
    /* little memory: paged out and in */
    {ALL_MODELS, "--devices cpu:1 --kv-device 28b --copy-delay 7",
     "pages_out>=20 pages_in>=1 evictions>=20"},
    {ALL_MODELS, "--devices cpu:2 --kv-device 28b --copy-delay 8 --chunk 64",
     "pages_out>=15 evictions>=20 hand_overs>=10"},
    {FEW_MODELS, "--devices cpu:4 --kv-device 28b --copy-delay 9 --chunk 7",
     "pages_out>=5 hand_overs>=10 device_blocks_used>=57"},
    {FEW_MODELS, "--devices cpu:4 --tp 2 --kv-device 28b --copy-delay 10",
     "pages_out>=15 hand_overs>=10"},
    {FEW_MODELS, "--devices cpu:3 --colocate --kv-device 28b --kv-host 40b",
     "pages_out>=1 hand_overs<=0 device_blocks_used>=29"},
    {ALL_MODELS, "--devices cpu:1 --kv-device 22b", "pages_out>=20 preemptions>=1"},
    /* no host memory: dropped and recomputed */
    {ALL_MODELS, "--devices cpu:1 --kv-device 28b --kv-host 0",
     "preemptions>=5 recomputed_tokens>=50 blocks_lost>=20 pages_out<=0"},
    {FEW_MODELS, "--devices cpu:2 --kv-device 28b --kv-host 0 --copy-delay 11",
     "blocks_lost>=15 hand_overs>=10 pages_out<=0"},
    {FEW_MODELS, "--devices cpu:4 --tp 2 --kv-device 40b --kv-host 0 --chunk 7",
     "blocks_lost>=5 hand_overs>=10 pages_out<=0"},
    /* write-through */
    {FEW_MODELS, "--devices cpu:2 --kv-policy write-through --copy-delay 12",
     "pages_out>=50 evictions<=0 hand_overs>=15"},
    {FEW_MODELS, "--devices cpu:2 --kv-policy write-through --kv-device 28b --copy-delay 13",
     "pages_out>=50 evictions>=20"},
    {FEW_MODELS, "--devices cpu:4 --kv-policy write-through --kv-device 28b --kv-host 12b",
     "pages_out>=40 host_evictions>=20"},
    /* one after another: second turns start from what the first ones left */
    {IDS_MODELS, "--devices cpu:1 --max-batch 1", "steps>=1600 prefix_hit_tokens>=900"},
    {IDS_MODELS, "--devices cpu:2 --max-batch 1 --copy-delay 14",
     "prefix_hit_tokens>=900 hand_overs>=10 local_prefills>=5"},
    {IDS_MODELS, "--devices cpu:2 --max-batch 1 --kv-device 28b --copy-delay 15",
     "prefix_hit_tokens>=500 pages_out>=60 pages_in>=10 evictions>=60"},
};
enum { N_SCHEDULES = sizeof schedules / sizeof *schedules };

static void run_schedule(struct check *check, struct turns *turns,
                         const struct schedule *schedule) {
    char options[256], name[512];
    struct answer *answers = calloc(MAX_REQUESTS, sizeof *answers);
    struct counters counters;
    snprintf(options, sizeof options, "%s %s", schedule->options, turns->model->more);
    snprintf(name, sizeof name, "%s %s", turns->model->name, schedule->options);
    int status =
        run_wishes(check, turns->path, options, turns->wishes, turns->n, answers, &counters);
    CHECK(status == 0, "%s: exit status %d", name, status);
    for (int i = 0; i < turns->n; i++)
        check_answer(check, name, &turns->wishes[i], &answers[i], &turns->alone[i], false);
    check_counters(check, name, schedule->proof, &counters);
    free_answers(answers, turns->n);
    free(answers);
}

static void run_matrix(struct check *check, int model) {
    struct turns *turns = turns_open(check, model);
    for (int i = model % SHARE; i < N_SCHEDULES; i += SHARE)
        if (schedules[i].models & IN(model))
            run_schedule(check, turns, &schedules[i]);
    turns_close(turns);
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

static void same_text_of_stories(struct check *check) {
    run_matrix(check, STORY);
}

static void same_text_of_a_checkpoint(struct check *check) {
    run_matrix(check, CHECKPOINT);
}

/* ---- second turns ---- */

/* With room for everything, a second turn finds all full blocks of the first, but not the block of
 * the first's last token, whose K and V were never computed. */
static void second_turns_start_from_the_cache(struct check *check) {
    struct turns *turns = turns_open(check, TWIN);
    static const char *const options[] = {
        "--devices cpu:1 --max-batch 1 --kv-device 400b",
        "--devices cpu:2 --max-batch 1 --kv-device 400b --copy-delay 3",
        "--devices cpu:2 --max-batch 1 --kv-device 30b --kv-policy write-through"};
    for (int way = 0; way < 3; way++) {
        struct answer *answers = calloc(MAX_REQUESTS, sizeof *answers);
        struct counters counters;
        run_wishes(check, turns->path, options[way], turns->wishes, turns->n, answers, &counters);
        for (int i = 0; i < SECOND_TURNS; i++) {
            const struct answer *second = &answers[FIRST_TURNS + i];
            int computed = turns->alone[i].n_prompt + turns->alone[i].n_ids - 1;
            CHECK(second->n_cached == computed / BLOCK * BLOCK,
                  "%s: second%d: %d tokens of %d found cached", options[way], i, second->n_cached,
                  computed);
            check_answer(check, options[way], &turns->wishes[FIRST_TURNS + i], second,
                         &turns->alone[FIRST_TURNS + i], false);
        }
        free_answers(answers, turns->n);
        free(answers);
    }
    turns_close(turns);
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
    struct answer *answers = calloc(MAX_REQUESTS, sizeof *answers);
    struct counters counters;
    int status =
        run_wishes(check, turns->path, options, turns->wishes, turns->n, answers, &counters);
    CHECK(status == 3, "%s: exit status %d, expected 3", options, status);
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
    check_counters(check, options, proof, &counters);
    free_answers(answers, turns->n);
    free(answers);
}

/* 14 blocks hold two of the longer requests. */
static void nothing_runs_out_of_memory(struct check *check) {
    struct turns *turns = calloc(1, sizeof *turns);
    turns->model = &models[TWIN];
    write_twin_model(check, turns->path);
    set_narrow_wishes(turns);
    for (int i = 0; i < turns->n; i++)
        if (strcmp(turns->wishes[i].id, "context") != 0)
            run_alone(check, turns, i);
    run_narrow(check, turns, "--devices cpu:1 --kv-device 14b --copy-delay 1",
               "pages_out>=60 evictions>=60");
    run_narrow(check, turns, "--devices cpu:2 --kv-device 14b --copy-delay 2 --chunk 7",
               "pages_out>=60 hand_overs>=40 blocks_transferred>=60");
    run_narrow(check, turns, "--devices cpu:2 --kv-device 14b --kv-host 0",
               "preemptions>=3 recomputed_tokens>=30 blocks_lost>=60");
    run_narrow(check, turns, "--devices cpu:4 --kv-device 14b --kv-host 5b --copy-delay 3",
               "pages_out>=60 host_evictions>=40 blocks_lost>=40 hand_overs>=40");
    turns_close(turns);
}

int main(int argc, char **argv) {
    static const struct test tests[] = {
        {"same_text_where_each_bit_counts", same_text_where_each_bit_counts},
        {"same_text_of_q8_0", same_text_of_q8_0},
        {"same_text_of_bf16", same_text_of_bf16},
        {"same_text_of_stories", same_text_of_stories},
        {"same_text_of_a_checkpoint", same_text_of_a_checkpoint},
        {"second_turns_start_from_the_cache", second_turns_start_from_the_cache},
        {"nothing_runs_out_of_memory", nothing_runs_out_of_memory},
    };
    return check_run(tests, sizeof tests / sizeof *tests, argc, argv);
}
