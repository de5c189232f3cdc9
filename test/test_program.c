/* test_program.c: the program from outside, as someone at a terminal has it.
 *
 * Facts that nobody here made come first: token ids as llama.cpp has them, the text that a
 * published llama2.c model is known to write. Then what every option promises, told by comparing
 * runs: the same text alone, among others, on other devices, with blocks paged out. Then absurd
 * weights, Ctrl-C and the terminal. Nothing here looks inside; the program is a child process, so a
 * crash or a hang is one failed check. What it must bear besides stands in test_hostile.c.
 *
 * Run from the repository's root. -DDYNAMO_PROGRAM='"path"' tests another binary. */
#define _GNU_SOURCE
#define JSON_IMPLEMENTATION
#include "files.h"
#include "../lib/json.h"

#include <math.h>
#include <termios.h>

enum {
    VALUE_LENGTH = 8192, /* bytes of a JSON value, at most */
    MAX_IDS = 1024,
    BEGIN_ID = 1,  /* model.bin's beginning-of-text token */
    LIMIT_MS = 100 /* from the start of the program to its first token */
};

/* ---- answers as JSON lines ---- */

/* The value of `key` in one line; in `stats` if the line has that. NULL: there is none. */
static const char *member(char value[VALUE_LENGTH], const char *line, size_t length,
                          const char *key) {
    char error[ERROR_LENGTH];
    char *copy = strndup(line, length);
    struct json_node *nodes = json_parse(copy, length, error);
    const char *found = NULL;
    int first = nodes && nodes[0].next > 2 && !strcmp(nodes[1].text, "stats") ? 3 : 1;
    for (int i = first; nodes && i < nodes[0].next && !found; i = nodes[i + 1].next) {
        if (strcmp(nodes[i].text, key) == 0) {
            snprintf(value, VALUE_LENGTH, "%.*s", (int)nodes[i + 1].length, nodes[i + 1].text);
            found = value;
        }
    }
    free(nodes);
    free(copy);
    return found;
}

/* The value of `key` in the object of the request `id`; `(none)` if there is none. */
static const char *answer_of(char value[VALUE_LENGTH], const struct outcome *o, const char *id,
                             const char *key) {
    for (const char *line = o->out; *line;) {
        size_t length = strcspn(line, "\n");
        const char *name = member(value, line, length, "id");
        if (name && strcmp(name, id) == 0) {
            const char *found = member(value, line, length, key);
            return found ? found : "(none)";
        }
        line += length + (line[length] == '\n');
    }
    return "(none)";
}

/* A number of the last line, the statistics; NULL if there is none. */
static const char *stat_text(char value[VALUE_LENGTH], const struct outcome *o, const char *key) {
    const char *last = o->out;
    for (const char *at = o->out; *at; at++)
        last = *at == '\n' && at[1] ? at + 1 : last;
    const char *found = member(value, last, strcspn(last, "\n"), key);
    return found && !strncmp(last, "{\"stats\":", 9) ? found : NULL;
}

static long stat_of(const struct outcome *o, const char *key) { /* -1 if there is none */
    char value[VALUE_LENGTH];
    const char *found = stat_text(value, o, key);
    return found ? atol(found) : -1;
}

static int count_words(const char *text) {
    int n = 0;
    for (size_t at = strspn(text, " \n"); text[at]; at += strspn(text + at, " \n")) {
        at += strcspn(text + at, " \n");
        n++;
    }
    return n;
}

/* ---- facts ---- */

static void tokenizes_as_published(struct check *check) {
    static const char *const names[] = {"gpt-2", "llama-spm"};
    for (int i = 0; i < 2; i++) {
        char path[PATH_LENGTH];
        snprintf(path, sizeof path, DATA "vocab-%s.gguf.out", names[i]);
        size_t length;
        char *expected = read_file(check, path, &length);
        struct outcome o = run(check, DATA "vocab-%s.gguf --tokenize " DATA "vocab-%s.gguf.inp",
                               names[i], names[i]);
        CHECK(length > 1000 && o.status == 0 && strcmp(o.out, expected) == 0, "%s: status %d\n%s%s",
              names[i], o.status, o.err, o.out);
        outcome_free(&o);
        free(expected);
    }
}

static const char dream[] =
    "I seep into the silence. Contrast edges sharpen, a kaleidoscope of probability. Contrast "
    "edges sharpen, a tapestry of probability unfolding.";

static void writes_as_published(struct check *check) {
    struct outcome o = run(check, AIDREAMS " --tokenizer " AIDREAMS_TOKENIZER " -p 'I see' -t 0");
    CHECK(o.status == 0 && !strncmp(o.out, dream, sizeof dream - 1), "%s%s", o.err, o.out);
    outcome_free(&o);
    char folder[FOLDER_LENGTH], command[PATH_LENGTH];
    make_folder(check, folder);
    snprintf(command, sizeof command,
             "cp " AIDREAMS " %s/model && cp " AIDREAMS_TOKENIZER " %s/tokenizer.bin", folder,
             folder);
    CHECK(system(command) == 0, "%s", command);
    o = run(check, "%s/model -p 'I see' -t 0", folder);
    CHECK(o.status == 0 && !strncmp(o.out, dream, sizeof dream - 1), "%s%s", o.err, o.out);
    outcome_free(&o);
    remove_folder(check, folder);
}

/* model.bin's likeliest tokens, as llama.cpp has them: test/compare_llama_cpp.py --save. */
static void writes_as_llama_cpp(struct check *check) {
    size_t length;
    char *text = read_file(check, DATA "llama_cpp_greedy.txt", &length), *rest = NULL;
    int n_lines = 0;
    for (char *line = strtok_r(text, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
        char expected[VALUE_LENGTH], *ids = strchr(line, ' ');
        CHECK(ids, "line %d: %s", n_lines, line);
        if (!ids)
            break;
        *ids++ = 0;
        int n = 1;
        for (const char *at = ids; *at; at++)
            n += *at == ',';
        snprintf(expected, sizeof expected, "\"ids\":[%s]", ids);
        struct outcome o = run(check, "model.bin --ids %s -t 0 -n %d --json", line, n);
        CHECK(o.status == 0 && strstr(o.out, expected), "expected %s, got %s%s", expected, o.out,
              o.err);
        outcome_free(&o);
        n_lines++;
    }
    CHECK(n_lines == 12, "%d lines", n_lines);
    free(text);
}

/* ---- what is written ---- */

static void writes_stories(struct check *check) {
    static const char *const options[] = {"-t 0", "--seed 1", "--seed 2", "-t 1 --top-k 40"};
    for (size_t i = 0; i < sizeof options / sizeof *options; i++) {
        char value[VALUE_LENGTH];
        struct outcome o = run(check, "model.bin -p 'Once upon a time' %s", options[i]);
        CHECK(o.status == 0, "%s: status %d: %s", options[i], o.status, o.err);
        CHECK(!strncmp(o.out, "Once upon a time", 16), "%s: %s", options[i], o.out);
        CHECK(o.out_length > 0 && o.out[o.out_length - 1] == '\n', "%s: no last newline",
              options[i]);
        int n_words = count_words(o.out);
        outcome_free(&o);
        o = run(check, "model.bin -p 'Once upon a time' %s --json", options[i]);
        bool ends = !strcmp(answer_of(value, &o, "0", "finish_reason"), "stop");
        CHECK(ends || n_words >= 100, "%s: %d words, and %s", options[i], n_words, o.out);
        outcome_free(&o);
    }
}

/* Both must have ended well, with the same text or another one. */
static void compare(struct check *check, const char *what, bool same, struct outcome *a,
                    struct outcome *b) {
    CHECK(a->status == 0 && b->status == 0, "%s: status %d, %d: %s%s", what, a->status, b->status,
          a->err, b->err);
    CHECK((strcmp(a->out, b->out) == 0) == same, "%s: expected %s text:\n%s\n%s", what,
          same ? "the same" : "another", a->out, b->out);
    outcome_free(a);
    outcome_free(b);
}

static void a_seed_is_a_text(struct check *check) {
    static const char words[] = "model.bin -p 'Once upon a time' -n 60";
    struct outcome a = run(check, "%s --seed 7", words), b = run(check, "%s --seed 7", words);
    compare(check, "--seed 7, twice", true, &a, &b);
    a = run(check, "%s --seed 7", words);
    b = run(check, "%s --seed 8", words);
    compare(check, "--seed 7 and 8", false, &a, &b);
    a = run(check, "%s --stats", words);
    char *seed = strstr(a.err, "seed");
    unsigned long long number = seed ? strtoull(seed + 4, NULL, 10) : 0;
    CHECK(number > 0, "no seed in the table of --stats:\n%s", a.err);
    b = run(check, "%s --seed %llu", words, number);
    compare(check, "the seed that --stats told", true, &a, &b);
}

static void options_are_obeyed(struct check *check) {
    char value[VALUE_LENGTH];
    struct outcome o = run(check, "model.bin -p 'Once upon a time' -n 5 --json");
    CHECK(!strcmp(answer_of(value, &o, "0", "completion_tokens"), "5") &&
              !strcmp(answer_of(value, &o, "0", "finish_reason"), "length"),
          "-n 5: %s%s", o.out, o.err);
    outcome_free(&o);
    /* a sampler with one choice is a greedy one */
    static const char *const greedy[] = {"--top-k 1", "--top-p 0", "--min-p 1", "-t 0 --seed 9"};
    for (size_t i = 0; i < sizeof greedy / sizeof *greedy; i++) {
        struct outcome a = run(check, "model.bin -p 'The cat' -n 40 -t 0 --seed 3");
        struct outcome b = run(check, "model.bin -p 'The cat' -n 40 %s", greedy[i]);
        compare(check, greedy[i], true, &a, &b);
    }
    struct outcome a = run(check, "model.bin -p 'A\nB' -n 9 -t 0");
    struct outcome b = run(check, "model.bin --system A -p B -n 9 -t 0");
    CHECK(a.out_length > 4 && b.out_length > 2 && !strcmp(a.out + 3, b.out + 1),
          "--system stands before the prompt: %s%s", a.out, b.out);
    outcome_free(&a);
    outcome_free(&b);
}

/* The text of a run in which a stop text is an excerpt of what was generated. */
static void stop_texts_cut(struct check *check) {
    static const char prompt[] = "Once upon a time";
    static const size_t starts[] = {0, 7, 41, 90}, lengths[] = {1, 3, 12, 30};
    char value[VALUE_LENGTH];
    struct outcome whole = run(check, "model.bin -p '%s' -t 0", prompt);
    CHECK(whole.out_length > 150, "too short: %s", whole.out);
    for (int i = 0; i < 4 && whole.out_length > 150; i++) {
        char stop[32] = {0}, *text = whole.out + sizeof prompt - 1;
        memcpy(stop, text + starts[i], lengths[i]);
        size_t length = (size_t)(strstr(text, stop) - whole.out);
        if (strpbrk(stop, "'\n"))
            continue; /* the shell's own */
        struct outcome o =
            run(check, "model.bin -p '%s' -t 0 --stop '%s' --stop zyzzy", prompt, stop);
        CHECK(o.out_length == length + 1 && !strncmp(o.out, whole.out, length), "--stop '%s': %s",
              stop, o.out);
        outcome_free(&o);
        o = run(check, "model.bin -p '%s' -t 0 --stop '%s' --json", prompt, stop);
        CHECK(!strcmp(answer_of(value, &o, "0", "finish_reason"), "stop"), "%s", o.out);
        outcome_free(&o);
    }
    outcome_free(&whole);
}

/* ---- ids, logits, perplexity ---- */

static const char sentence[] = "Once upon a time there was a small bear who lived in the forest. "
                               "He liked honey, and every day he went to look for it.";

/* model.bin's ids of a file's text. */
static int ids_of(struct check *check, const char *path, int ids[MAX_IDS]) {
    struct outcome o = run(check, "model.bin --tokenize %s", path);
    CHECK(o.status == 0, "%s", o.err);
    int n = 0;
    for (char *at = o.out, *end; n < MAX_IDS; at = end) {
        long id = strtol(at, &end, 10);
        if (end == at)
            break;
        ids[n++] = (int)id;
    }
    outcome_free(&o);
    return n;
}

/* `1,2,3`, with the token in front that begins a text. */
static void join_ids(char list[COMMAND_LENGTH / 2], const int *ids, int n) {
    int length = sprintf(list, "%d", BEGIN_ID);
    for (int i = 0; i < n; i++)
        length += sprintf(list + length, ",%d", ids[i]);
}

static void ids_are_prompts(struct check *check) {
    char folder[FOLDER_LENGTH], path[PATH_LENGTH], list[COMMAND_LENGTH / 2];
    int ids[MAX_IDS];
    make_folder(check, folder);
    snprintf(path, sizeof path, "%s/text", folder);
    write_file(check, path, sentence, sizeof sentence - 1);
    int n = ids_of(check, path, ids);
    CHECK(n > 20 && n < 100, "%d ids", n);
    join_ids(list, ids, n);
    struct outcome a = run(check, "model.bin -p '%s' -t 0 -n 30", sentence);
    struct outcome b = run(check, "model.bin --ids %s -t 0 -n 30", list);
    compare(check, "--ids", true, &a, &b);
    remove_folder(check, folder);
}

/* Negative log-likelihood of a text's tokens by the logits that --logits writes of them. */
static double likelihood(struct check *check, const char *folder, const int *ids, int n) {
    char path[PATH_LENGTH], list[COMMAND_LENGTH / 2];
    snprintf(path, sizeof path, "%s/logits", folder);
    join_ids(list, ids, n);
    struct outcome o = run(check, "model.bin --ids %s --logits %s", list, path);
    CHECK(o.status == 0 && o.out_length == 0, "status %d: %s%s", o.status, o.err, o.out);
    outcome_free(&o);
    size_t length;
    float *logits = (float *)(void *)read_file(check, path, &length);
    size_t n_cols = length / sizeof *logits / ((size_t)n + 1);
    CHECK(n_cols > 256 && n_cols * sizeof *logits * ((size_t)n + 1) == length, "%zu bytes", length);
    double sum = 0;
    for (int i = 0; i < n && n_cols > 256; i++) {
        double total = 0;
        const float *row = logits + (size_t)i * n_cols;
        for (size_t j = 0; j < n_cols; j++)
            total += exp((double)row[j]);
        sum += log(total) - (double)row[ids[i]];
    }
    free(logits);
    return sum;
}

static void check_perplexity(struct check *check, const char *path, const char *options, int n,
                             double mean) {
    long n_tokens = 0;
    double nll = 0, perplexity = 0;
    struct outcome o = run(check, "model.bin --perplexity %s %s", path, options);
    int n_read = sscanf(o.out, "tokens %ld nll %lf perplexity %lf", &n_tokens, &nll, &perplexity);
    CHECK(o.status == 0 && n_read == 3 && n_tokens == n, "status %d: %s%s", o.status, o.err, o.out);
    CHECK(fabs(nll - mean) < 1e-4, "%s: nll %g, by the logits %g", options, nll, mean);
    CHECK(fabs(perplexity / exp(mean) - 1) < 1e-3, "%g, by the logits %g", perplexity, exp(mean));
    CHECK(perplexity > 1 && perplexity < 100, "a story's perplexity: %g", perplexity);
    outcome_free(&o);
}

/* A text that fills less than one window of the context, and one cut into windows of 32 tokens,
 * each of which begins like a text. */
static void perplexity_is_that_of_the_logits(struct check *check) {
    char folder[FOLDER_LENGTH], path[PATH_LENGTH];
    int ids[MAX_IDS];
    make_folder(check, folder);
    snprintf(path, sizeof path, "%s/text", folder);
    struct outcome story = run(check, "model.bin -p 'Once upon a time' --seed 4 -n 70");
    write_file(check, path, story.out, story.out_length);
    outcome_free(&story);
    int n = ids_of(check, path, ids);
    CHECK(n > 62, "only %d tokens", n);
    check_perplexity(check, path, "", n, likelihood(check, folder, ids, n) / n);
    double sum = 0;
    for (int start = 0; start < n; start += 31)
        sum += likelihood(check, folder, ids + start, n - start < 31 ? n - start : 31);
    check_perplexity(check, path, "--kv-device 2b --chunk 7", n, sum / n);
    remove_folder(check, folder);
}

/* ---- many requests ---- */

static void requests_finish_together(struct check *check) {
    static const char lines[] =
        "The cat\n"
        "{\"id\":\"a\",\"prompt\":\"Once upon a time\",\"n\":12,\"temperature\":0}\n"
        "{\"id\":\"b\",\"prompt\":\"The dog\",\"n\":30,\"temperature\":1.5,\"seed\":77}\n"
        "\n"
        "{\"id\":\"c\",\"ids\":[1,300,301],\"n\":9,\"top_k\":5,\"seed\":78}\r\n"
        "{\"id\":\"d\",\"prompt\":\"caf\\u00e9 \\ud83d\\ude00\",\"temperature\":0,\"n\":3}\n"
        "The dog";
    static const char *const alone[][2] = {
        {"0", "-p 'The cat'"},
        {"a", "-p 'Once upon a time' -n 12 -t 0"},
        {"b", "-p 'The dog' -n 30 -t 1.5"},
        {"c", "--ids 1,300,301 -n 9 --top-k 5"},
        {"d", "-p 'caf\xC3\xA9 \xF0\x9F\x98\x80' -t 0 -n 3"},
        {"5", "-p 'The dog'"},
    };
    static const char *const seeds[] = {"5", "5", "77", "78", "5", "5"};
    char folder[FOLDER_LENGTH], path[PATH_LENGTH], value[VALUE_LENGTH], other[VALUE_LENGTH];
    make_folder(check, folder);
    snprintf(path, sizeof path, "%s/requests", folder);
    write_file(check, path, lines, sizeof lines - 1);
    struct outcome o = run(check, "model.bin -f %s --seed 5 --json", path);
    CHECK(o.status == 0 && count_lines(o.out) == 6, "status %d: %s%s", o.status, o.err, o.out);
    for (int i = 0; i < 6; i++) {
        struct outcome one = run(check, "model.bin %s --seed %s --json", alone[i][1], seeds[i]);
        static const char *const keys[] = {"text", "ids", "finish_reason", "prompt_tokens",
                                           "completion_tokens"};
        for (int k = 0; k < 5; k++) {
            const char *a = answer_of(value, &o, alone[i][0], keys[k]);
            const char *b = answer_of(other, &one, "0", keys[k]);
            CHECK(strcmp(a, "(none)") && !strcmp(a, b), "%s: %s: %s, alone: %s", alone[i][0],
                  keys[k], a, b);
        }
        outcome_free(&one);
    }
    outcome_free(&o);
    o = run(check, "model.bin -f - --seed 5 -n 4 < %s", path);
    const char *first = strstr(o.out, "The cat"), *last = strstr(o.out, "\n\nThe dog");
    CHECK(o.status == 0 && first == o.out && last && strstr(last, "\n\n\xCA\xFE") == NULL,
          "in order: status %d: %s", o.status, o.out);
    outcome_free(&o);
    remove_folder(check, folder);
}

static void bad_requests_refuse_only_themselves(struct check *check) {
    static const char *const lines[][2] = {
        {"{\"id\":\"x", "expected"},
        {"{\"id\":\"x\",\"prompt\":5}", "prompt: got 5, expected a text"},
        {"{\"id\":\"x\",\"prompt\":\"a\",\"zap\":1}", "zap: unknown key"},
        {"{\"id\":\"x\",\"prompt\":\"a\",\"temperture\":1}", "did you mean temperature"},
        {"{\"id\":\"x\",\"prompt\":\"a\",\"ids\":[1]}", "either prompt or ids"},
        {"{\"id\":\"x\"}", "either prompt or ids"},
        {"{\"id\":\"x\",\"ids\":[99999]}", "99999 is no token"},
        {"{\"id\":\"x\",\"ids\":[-1]}", "-1"},
        {"{\"id\":\"x\",\"ids\":\"1\"}", "expected token ids"},
        {"{\"id\":\"x\",\"prompt\":\"a\",\"n\":0}", "n: got 0"},
        {"{\"id\":\"x\",\"prompt\":\"a\",\"n\":1e400}", "n: got 1e400"},
        {"{\"id\":\"x\",\"prompt\":\"a\",\"temperature\":-1}", "temperature: got -1"},
        {"{\"id\":\"x\",\"prompt\":\"a\",\"n\":2,\"n\":3}", "given twice"},
        {"{\"id\":\"x\",\"prompt\":\"a\"} extra", "expected"},
        {"{\"id\":\"x\",\"prompt\":\"\\ud800\"}", "expected"},
        {"{\"id\":\"x\",\"prompt\":\"\xFF\"}", "expected"},
        {"{\"id\":\"x\",\"prompt\":\"a\",\"stop\":\"\"}", "stop"},
    };
    enum { N_LINES = sizeof lines / sizeof *lines };
    char folder[FOLDER_LENGTH], path[PATH_LENGTH], text[4096], value[VALUE_LENGTH];
    make_folder(check, folder);
    snprintf(path, sizeof path, "%s/requests", folder);
    int length = 0;
    for (int i = 0; i < N_LINES; i++)
        length += sprintf(text + length, "%s\n{\"id\":\"good%d\",\"prompt\":\"The cat\"}\n",
                          lines[i][0], i);
    write_file(check, path, text, (size_t)length);
    struct outcome o = run(check, "model.bin -f %s -n 4 --json", path);
    CHECK(o.status == 3 && count_lines(o.out) == 2 * N_LINES, "status %d: %s", o.status, o.out);
    int n_errors = 0;
    for (const char *at = o.out; (at = strstr(at, "\"finish_reason\":\"error\"")); at++)
        n_errors++;
    CHECK(n_errors == N_LINES, "%d of %d bad lines: %s", n_errors, N_LINES, o.out);
    struct outcome shown = run(check, "model.bin -f %s -n 4", path);
    CHECK(shown.status == 3, "status %d: %s", shown.status, shown.err);
    const char *line = shown.err;
    for (int i = 0; i < N_LINES; i++) {
        char id[16], begin[PATH_LENGTH];
        snprintf(id, sizeof id, "good%d", i);
        CHECK(!strcmp(answer_of(value, &o, id, "completion_tokens"), "4"), "%s: %s", id, value);
        snprintf(begin, sizeof begin, "dynamo: request %d: ", 2 * i);
        CHECK(!strncmp(line, begin, strlen(begin)), "%s: %s", begin, line);
        char *error = strndup(line, strcspn(line, "\n"));
        CHECK(strstr(error, lines[i][1]), "%s: %s, expected %s", lines[i][0], error, lines[i][1]);
        free(error);
        line += strcspn(line, "\n");
        line += *line == '\n';
    }
    CHECK(!strstr(line, "dynamo: "), "more lines than bad requests: %s", line);
    outcome_free(&shown);
    outcome_free(&o);
    remove_folder(check, folder);
}

/* ---- what is shown where ---- */

static void statistics_add_up(struct check *check) {
    static const char *const keys[] = {"kernel_launches",   "pages_out",   "pages_in",
                                       "evictions",         "preemptions", "prefix_hit_tokens",
                                       "recomputed_tokens", "hand_overs",  "blocks_transferred",
                                       "device_blocks",     "host_blocks", "decode_share",
                                       "prefill_share"};
    static const char *const rates[] = {"decode_tokens_per_second", "decode_gb_per_second",
                                        "read_gb_per_second",       "prefill_tokens_per_second",
                                        "prefill_gflops",           "peak_gflops"};
    struct outcome o = run(check,
                           "model.bin -p '%s' -n 20 --json --stats --kv-device 9b "
                           "--kv-host 5b",
                           sentence);
    char value[VALUE_LENGTH];
    CHECK(o.status == 0 && count_lines(o.out) == 2, "status %d: %s", o.status, o.out);
    CHECK(strstr(o.out, "\"backend\":\""), "no backend: %s", o.out);
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        CHECK(stat_of(&o, keys[i]) >= 0, "no %s: %s", keys[i], o.out);
    for (size_t i = 0; i < sizeof rates / sizeof *rates; i++) {
        const char *rate = stat_text(value, &o, rates[i]);
        CHECK(rate && atof(rate) > 0, "%s: %s", rates[i], o.out);
    }
    long n_prompt = atol(answer_of(value, &o, "0", "prompt_tokens"));
    CHECK(n_prompt > 20 && stat_of(&o, "prefill_tokens") == n_prompt, "%ld: %s", n_prompt, o.out);
    CHECK(stat_of(&o, "decode_tokens") == 19, "20, of which prefill gives one: %s", o.out);
    CHECK(stat_of(&o, "hand_overs") == 1, "%s", o.out);
    CHECK(stat_of(&o, "blocks_transferred") == (n_prompt + 15) / 16, "%s", o.out);
    CHECK(stat_of(&o, "device_blocks") == 9 && stat_of(&o, "host_blocks") == 5, "%s", o.out);
    outcome_free(&o);
    struct outcome plain = run(check, "model.bin -p 'The cat' -n 20 -t 0");
    CHECK(strstr(plain.err, "| 20 tokens generated, "), "no summary: %s", plain.err);
    struct outcome full = run(check, "model.bin -p 'The cat' -n 20 -t 0 --stats --verbose");
    CHECK(strstr(full.err, "time to first token") && strstr(full.err, "preemptions") &&
              strstr(full.err, "worker 0 (prefill)") && strstr(full.err, "worker 1 (decode)"),
          "a table and steps: %s", full.err);
    compare(check, "--stats changes nothing on stdout", true, &plain, &full);
}

static void piped_stdin_is_one_prompt(struct check *check) {
    char folder[FOLDER_LENGTH], path[PATH_LENGTH];
    static const char text[] = "The cat\nsat\n\n";
    make_folder(check, folder);
    snprintf(path, sizeof path, "%s/prompt", folder);
    write_file(check, path, text, sizeof text - 1);
    struct outcome a = run(check, "model.bin -p '%s' -n 20 -t 0", text);
    struct outcome b = run(check, "model.bin -n 20 -t 0 < %s", path);
    CHECK(!strncmp(b.out, text, sizeof text - 1), "echo: %s", b.out);
    compare(check, "stdin", true, &a, &b);
    /* zero bytes and invalid UTF-8 go in and come back as they are */
    static const char bytes[] = "a\0b\xFF\xC3\n{\"";
    write_file(check, path, bytes, sizeof bytes - 1);
    b = run(check, "model.bin -n 5 < %s", path);
    CHECK(b.status == 0 && b.out_length >= sizeof bytes && !memcmp(b.out, bytes, sizeof bytes - 1),
          "status %d: %s", b.status, b.err);
    outcome_free(&b);
    b = run(check, "model.bin -n 5 --json -f %s", path);
    CHECK(b.status == 3 && strstr(b.out, "\"completion_tokens\":5"), "status %d: %s", b.status,
          b.out);
    outcome_free(&b);
    remove_folder(check, folder);
}

static void tells_about_itself(struct check *check) {
    struct outcome o = run(check, "--version");
    CHECK(o.status == 0 && !strncmp(o.out, "dynamo ", 7) && count_lines(o.out) == 1, "%s", o.out);
    outcome_free(&o);
    o = run(check, "--help");
    CHECK(o.status == 0 && !strncmp(o.out, "usage: dynamo MODEL", 19) && strstr(o.out, "--seed S"),
          "%s", o.out);
    CHECK(!strstr(o.out, " \n") && *o.err == 0, "blanks at the end of a line: %s", o.out);
    for (const char *line = o.out; *line; line += strcspn(line, "\n") + 1)
        CHECK(strcspn(line, "\n") <= 100, "a line of %zu columns: %.100s", strcspn(line, "\n"),
              line);
    outcome_free(&o);
}

static void the_first_token_comes_soon(struct check *check) {
    double best = INFINITY;
    for (int i = 0; i < 5; i++) {
        double start = child_clock();
        struct live live = live_start(check, false, "model.bin -p 'Once upon a time' -n 20");
        bool came = live_bytes(&live, sizeof "Once upon a time", 10);
        best = fmin(best, child_clock() - start);
        CHECK(came, "no token: %s", live.text);
        CHECK(live_end(&live, 10) == 0, "it did not end well");
        live_close(&live);
    }
    CHECK(soon(best, LIMIT_MS * 1e-3), "the first token after %.1f ms", 1e3 * best);
}

/* ---- where it is computed changes no text ---- */

enum { N_STORIES = 6 };

static void check_stories(struct check *check, const char *path, const char *options,
                          const struct outcome *expected, const char *counter) {
    struct outcome o =
        run(check, "model.bin -f %s --seed 6 -n 50 --json --stats %s", path, options);
    CHECK(o.status == 0, "%s: status %d: %s%s", options, o.status, o.err, o.out);
    for (int i = 0; i < N_STORIES; i++) {
        char id[16], value[VALUE_LENGTH], other[VALUE_LENGTH];
        snprintf(id, sizeof id, "%d", i);
        const char *a = answer_of(value, &o, id, "text");
        const char *b = answer_of(other, expected, id, "text");
        CHECK(strlen(b) > 50 && !strcmp(a, b), "%s: %s\nwithout: %s", options, a, b);
    }
    CHECK(!counter || stat_of(&o, counter) > 0, "%s: no %s: %s", options, counter, o.out);
    outcome_free(&o);
}

static void schedules_change_no_text(struct check *check) {
    static const char lines[] = "Once upon a time\nThe cat\nOnce upon a time there was a dragon\n"
                                "The old owl\n{\"prompt\":\"The dog\",\"temperature\":0}\nOne day";
    /* and the counter that shows that it did what it was meant to */
    static const char *const options[][2] = {
        {"--kv-device 4b --kv-host 4b", NULL},
        {"--kv-device 6b --kv-host 32b --copy-delay 3", "pages_out"},
        {"--kv-device 6b --kv-host 0", "recomputed_tokens"},
        {"--kv-device 9b --kv-host 40b --kv-policy write-through", "pages_out"},
        {"--devices cpu:4 --copy-delay 5", "blocks_transferred"},
        {"--devices cpu:3 --prefill 2 --decode 0,1", "blocks_transferred"},
        {"--devices cpu:4 --tp 2", "hand_overs"},
        {"--colocate", NULL},
        {"--devices cpu:1", NULL},
        {"--chunk 3 --max-batch 2 --threads 1", NULL},
    };
    char folder[FOLDER_LENGTH], path[PATH_LENGTH];
    make_folder(check, folder);
    snprintf(path, sizeof path, "%s/requests", folder);
    write_file(check, path, lines, sizeof lines - 1);
    struct outcome expected = run(check, "model.bin -f %s --seed 6 -n 50 --json --stats", path);
    CHECK(expected.status == 0, "%s", expected.err);
    for (size_t i = 0; i < sizeof options / sizeof *options; i++)
        check_stories(check, path, options[i][0], &expected, options[i][1]);
    outcome_free(&expected);
    remove_folder(check, folder);
}

/* Their logits are neither equal nor wild, and the same on two devices that share the model. */
static void random_weights_run(struct check *check) {
    static const char *const types[] = {"bf16", "q8_0", "q4_0"};
    char folder[FOLDER_LENGTH], path[PATH_LENGTH];
    make_folder(check, folder);
    snprintf(path, sizeof path, "%s/logits", folder);
    for (int i = 0; i < 3; i++) {
        struct outcome o =
            run(check, "random:stories-15m:%s --ids 1,2,3 --logits %s", types[i], path);
        CHECK(o.status == 0, "%s: status %d: %s", types[i], o.status, o.err);
        outcome_free(&o);
        size_t length;
        float *logits = (float *)(void *)read_file(check, path, &length);
        double squares = 0, n = (double)(length / sizeof *logits);
        CHECK(n == 3 * 32000, "%s: %zu bytes", types[i], length);
        for (size_t j = 0; j < length / sizeof *logits; j++)
            squares += (double)logits[j] * (double)logits[j];
        double deviation = sqrt(squares / n);
        CHECK(deviation > 0.2 && deviation < 2, "%s: deviation %g", types[i], deviation);
        free(logits);
    }
    static const char words[] = "random:stories-15m:q8_0 --ids 1,2,3 -n 20 -t 0 --json";
    char ids[2][VALUE_LENGTH];
    struct outcome a = run(check, "%s", words);
    struct outcome b = run(check, "%s --tp 2 --devices cpu:4", words);
    const char *one = answer_of(ids[0], &a, "0", "ids"), *two = answer_of(ids[1], &b, "0", "ids");
    CHECK(strlen(one) > 40 && !strcmp(one, two), "%s\n%s\n%s%s", one, two, a.err, b.err);
    outcome_free(&a);
    outcome_free(&b);
    remove_folder(check, folder);
}

/* ---- models of made up weights ---- */

enum { LONG_CONTEXT = 32768 };

/* A llama2.c checkpoint of random weights whose greedy text does not end for a long time: the rows
 * of the tokens that could end it are zero. Its weights are at most scale / 2. */
static void write_endless_model(struct check *check, const char *folder, float scale) {
    enum { DIM = 64, HIDDEN = 128, LAYERS = 2, HEADS = 2, VOCAB = 512 };
    static const int32_t header[] = {DIM, HIDDEN, LAYERS, HEADS, HEADS, VOCAB, LONG_CONTEXT};
    size_t layer = 2 * DIM + 4 * DIM * DIM + 3 * DIM * HIDDEN;
    size_t n = VOCAB * DIM + LAYERS * layer + DIM + LONG_CONTEXT * (DIM / HEADS);
    size_t length = sizeof header + n * sizeof(float);
    char path[PATH_LENGTH], command[PATH_LENGTH], *bytes = malloc(length);
    uint32_t random = 1;
    memcpy(bytes, header, sizeof header);
    for (size_t i = 0; i < n; i++) {
        random = random * 1664525 + 1013904223;
        float weight = i < 3 * DIM ? 0 : scale * ((float)(random >> 8) / (1 << 24) - 0.5f);
        memcpy(bytes + sizeof header + i * sizeof weight, &weight, sizeof weight);
    }
    snprintf(path, sizeof path, "%s/endless", folder);
    write_file(check, path, bytes, length);
    free(bytes);
    snprintf(command, sizeof command, "cp " AIDREAMS_TOKENIZER " %s/tokenizer.bin", folder);
    CHECK(system(command) == 0, "%s", command);
}

/* Weights that are no numbers, or make none: any text will do. */
static void absurd_weights_are_survived(struct check *check) {
    static const float scales[] = {NAN, INFINITY, 1e38f, 1e20f, 0, 1e-40f};
    static const char *const options[] = {"-t 0", "-t 0.8", "--top-k 5", "--top-p 0",
                                          "--min-p 0.1"};
    char folder[FOLDER_LENGTH], path[PATH_LENGTH];
    make_folder(check, folder);
    for (size_t i = 0; i < sizeof scales / sizeof *scales; i++) {
        write_endless_model(check, folder, scales[i]);
        for (size_t k = 0; k < sizeof options / sizeof *options; k++) {
            snprintf(path, sizeof path, "%s/endless", folder);
            struct outcome o =
                run(check, "%s --ids 1,5,6 -n 3 --kv-device 8b --kv-host 0 %s --json", path,
                    options[k]);
            CHECK(o.status == 0 && strstr(o.out, "\"ids\":["), "%g, %s: status %d: %s%s",
                  (double)scales[i], options[k], o.status, o.out, o.err);
            outcome_free(&o);
        }
    }
    remove_folder(check, folder);
}

/* ---- Ctrl-C ---- */

#define ENDLESS "%s/endless -t 0 --kv-device 2048b --kv-host 0 "

static void an_interrupt_stops_the_answer(struct check *check) {
    char folder[FOLDER_LENGTH];
    make_folder(check, folder);
    write_endless_model(check, folder, 1);
    struct live live = live_start(check, false, ENDLESS "--ids 1,5,6", folder);
    CHECK(live_bytes(&live, 100, 10), "no text: %s", live.text);
    double start = child_clock();
    kill(live.pid, SIGINT);
    int status = live_end(&live, 5);
    CHECK(status == 3, "status %d, expected 3: some requests failed", status);
    CHECK(soon(child_clock() - start, 1), "%.1f s", child_clock() - start);
    CHECK(live.length > 100 && live.text[live.length - 1] == '\n', "%s", live.text);
    live_close(&live);
    char path[PATH_LENGTH], value[VALUE_LENGTH];
    snprintf(path, sizeof path, "%s/requests", folder);
    static const char lines[] = "{\"ids\":[1,9],\"n\":2}\n{\"ids\":[1,5,6]}\n{\"ids\":[1,7]}\n";
    write_file(check, path, lines, sizeof lines - 1);
    live = live_start(check, false, ENDLESS "-f %s --json", folder, path);
    CHECK(live_until(&live, "length", 10), "the short one did not end: %s", live.text);
    usleep(50000 * SLOWER);
    kill(live.pid, SIGINT);
    status = live_end(&live, 5);
    struct outcome o = {.out = live.text};
    CHECK(status == 3 && count_lines(live.text) == 3, "status %d: %s", status, live.text);
    for (int i = 1; i < 3; i++) {
        char id[] = {(char)('0' + i), 0};
        CHECK(!strcmp(answer_of(value, &o, id, "finish_reason"), "cancelled"), "%s: %s", id, value);
        CHECK(atol(answer_of(value, &o, id, "completion_tokens")) > 0, "%s: nothing so far", id);
    }
    live_close(&live);
    remove_folder(check, folder);
}

/* Whoever asks it to go ends it, answers or not. */
static void a_termination_ends_it(struct check *check) {
    static const int signals[] = {SIGTERM, SIGHUP};
    char folder[FOLDER_LENGTH];
    make_folder(check, folder);
    write_endless_model(check, folder, 1);
    setenv("TERM", "xterm", 1);
    for (int i = 0; i < 2; i++) {
        struct live live = live_start(check, false, ENDLESS "--ids 1,5,6", folder);
        CHECK(live_bytes(&live, 100, 10), "no text: %s", live.text);
        kill(live.pid, signals[i]);
        int status = live_end(&live, 5);
        CHECK(status == 128 + signals[i], "status %d", status);
        live_close(&live);
        live = live_start(check, true, ENDLESS, folder); /* its line editor has changed the modes */
        struct termios before, after;
        bool known = tcgetattr(live.input, &before) == 0;
        CHECK(live_until(&live, "> ", 10), "no prompt: %s", live.text);
        CHECK(known && tcgetattr(live.input, &after) == 0 && !(after.c_lflag & ICANON),
              "the editor reads lines, not keys");
        kill(live.pid, signals[i]);
        usleep(100000 * SLOWER);
        known = tcgetattr(live.input, &after) == 0;
        CHECK(known && after.c_lflag == before.c_lflag, "the terminal was left in another mode");
        status = live_end(&live, 5);
        CHECK(status == 128 + signals[i], "status %d", status);
        live_close(&live);
    }
    setenv("TERM", "dumb", 1);
    remove_folder(check, folder);
}

/* Where there is no answer to stop, Ctrl-C ends the program. */
static void an_interrupt_ends_other_work(struct check *check) {
    char folder[FOLDER_LENGTH], path[PATH_LENGTH];
    make_folder(check, folder);
    write_endless_model(check, folder, 1);
    snprintf(path, sizeof path, "%s/text", folder);
    size_t length = 1 << 20;
    char *text = malloc(length);
    memset(text, 'a', length);
    write_file(check, path, text, length);
    free(text);
    struct live live = live_start(check, false, "%s/endless --perplexity %s", folder, path);
    usleep(300000 * SLOWER);
    CHECK(waitpid(live.pid, NULL, WNOHANG) == 0, "it ended before it was interrupted");
    kill(live.pid, SIGINT);
    int status = live_end(&live, 1);
    CHECK(status == 128 + SIGINT, "status %d", status);
    live_close(&live);
    remove_folder(check, folder);
}

/* A reader that has gone, as of `dynamo | head`: no need to write on. */
static void a_closed_pipe_ends_the_answer(struct check *check) {
    char folder[FOLDER_LENGTH];
    make_folder(check, folder);
    write_endless_model(check, folder, 1);
    struct live live = live_start(check, false, ENDLESS "--ids 1,5,6", folder);
    CHECK(live_bytes(&live, 100, 10), "no text: %s", live.text);
    close(live.output);
    live.output = open("/dev/null", O_RDONLY);
    int status = live_end(&live, 1);
    CHECK(status == 1, "status %d", status);
    live_close(&live);
    remove_folder(check, folder);
}

/* ---- at a terminal ---- */

/* model.bin with one key more, so that it has a chat template. The key takes a multiple of the
 * data's alignment, so nothing else moves. */
static void write_chat_model(struct check *check, const char *folder) {
    static const char key[] = "tokenizer.chat_template", jinja[] = "[INST] <<SYS>> {{ messages }}";
    char path[FOLDER_LENGTH + 32];
    size_t size;
    char *model = read_file(check, "model.bin", &size);
    snprintf(path, sizeof path, "%s/chat.gguf", folder);
    FILE *file = fopen(path, "wb");
    CHECK(file && size > 32, "%s", path);
    uint64_t n_keys, key_length = sizeof key - 1, length = 256 - 8 - key_length - 4 - 8;
    uint32_t type = 8; /* a string */
    char text[256];
    memset(text, ' ', sizeof text);
    memcpy(text, jinja, sizeof jinja - 1);
    memcpy(&n_keys, model + 16, 8);
    n_keys++;
    fwrite(model, 1, 16, file);
    fwrite(&n_keys, 8, 1, file);
    fwrite(&key_length, 8, 1, file);
    fwrite(key, 1, key_length, file);
    fwrite(&type, 4, 1, file);
    fwrite(&length, 8, 1, file);
    fwrite(text, 1, length, file);
    fwrite(model + 24, 1, size - 24, file);
    fclose(file);
    free(model);
}

static void chat_models_answer(struct check *check) {
    char folder[FOLDER_LENGTH];
    make_folder(check, folder);
    write_chat_model(check, folder);
    struct outcome plain = run(check, "model.bin -p '[INST] Once upon a time [/INST]' -t 0 -n 20");
    struct outcome chat = run(check, "%s/chat.gguf -p 'Once upon a time' -t 0 -n 20", folder);
    CHECK(chat.status == 0 && !strstr(chat.out, "Once upon a time"), "not echoed: %s", chat.out);
    CHECK(chat.out_length > 10 && strstr(plain.out, chat.out), "`%s` is not the end of `%s`",
          chat.out, plain.out);
    struct outcome none =
        run(check, "%s/chat.gguf -p 'Once upon a time' -t 0 -n 20 --template none", folder);
    struct outcome base = run(check, "model.bin -p 'Once upon a time' -t 0 -n 20");
    CHECK(!strcmp(none.out, base.out), "`%s`, not `%s`", none.out, base.out);
    struct outcome wrong = run(check, "%s/chat.gguf -p Once --template chatml", folder);
    CHECK(wrong.status == 2 && strstr(wrong.err, "<|im_start|>"), "%d %s", wrong.status, wrong.err);
    outcome_free(&plain);
    outcome_free(&chat);
    outcome_free(&none);
    outcome_free(&base);
    outcome_free(&wrong);
    remove_folder(check, folder);
}

static void chats_at_a_terminal(struct check *check) {
    char folder[FOLDER_LENGTH];
    setenv("TERM", "dumb", 1);
    make_folder(check, folder);
    write_chat_model(check, folder);
    struct live live = live_start(check, true, "%s/chat.gguf -n 30 -t 0", folder);
    CHECK(live_until(&live, "> ", 5), "no prompt: %s", live.text);
    live_write(&live, "Tell me about the old fox and the long way home\n");
    CHECK(live_until(&live, "\n> ", 5), "no answer: %s", live.text);
    live_write(&live, "And then?\n");
    CHECK(live_until(&live, "\n> ", 5), "no second answer: %s", live.text);
    live_write(&live, "/stats\n");
    CHECK(live_until(&live, "prompt tokens found cached", 5), "no stats: %s", live.text);
    live_until(&live, "\n", 5);
    int cached = 0;
    const char *line = strstr(live.text, "prompt tokens found cached");
    line = line ? strstr(line, "[0m") : NULL; /* it is in colour */
    CHECK(line && sscanf(line, "[0m %d", &cached) == 1 && cached >= 32, "%d tokens cached: %s",
          cached, live.text);
    live_until(&live, "\n> ", 5);
    live_write(&live, "/clear\n");
    CHECK(live_until(&live, "A new conversation begins", 5), "not cleared: %s", live.text);
    live_write(&live, "/system Be a pirate.\n");
    CHECK(live_until(&live, "A new conversation begins with it", 5), "no system: %s", live.text);
    live_write(&live, "/hlep\n");
    CHECK(live_until(&live, "/hlep: unknown command; /help lists all", 5), "%s", live.text);
    live_write(&live, "/help\n");
    CHECK(live_until(&live, "/exit", 5), "no help: %s", live.text);
    live_write(&live, "/exit\n");
    CHECK(live_end(&live, 5) == 0, "it did not end: %s", live.text);
    live_close(&live);
    remove_folder(check, folder);
}

/* Keys as a terminal sends them: the line that is entered is seen in the echo of the prompt. */
static void edits_a_line(struct check *check) {
    static const struct {
        const char *keys, *line;
    } cases[] = {
        {"Onc a time\001\033[C\033[C\033[Ce upon\n", "\nOnce upon a time"},
        {"x\177\033[H\033[F\033[3~The bear wrong\027cat\n", "\nThe bear cat"},
        {"lost\025Tom\004\n", "\nTom"},
        {"\303\251\303\251\033[D\177A\n", "\nA\303\251"},
        {"\033[A\033[A\n", "\nTom"}, /* the last line but one */
        {"one\\\ntwo\n", "\none\r\ntwo"},
        {"end\001\013Mia\n", "\nMia"},
    };
    setenv("TERM", "xterm", 1);
    struct live live = live_start(check, true, "model.bin -n 3");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        CHECK(live_until(&live, "> ", 5), "no prompt: %s", live.text);
        live_write(&live, cases[i].keys);
        CHECK(live_until(&live, cases[i].line, 5), "%d: no `%s` in %s", (int)i, cases[i].line,
              live.text);
        live_until(&live, "\n", 5);
    }
    CHECK(live_until(&live, "> ", 5), "no prompt: %s", live.text);
    live_write(&live, "\004");
    CHECK(live_end(&live, 5) == 0, "it did not end: %s", live.text);
    live_close(&live);
    setenv("TERM", "dumb", 1);
}

static void talks_at_a_terminal(struct check *check) {
    setenv("TERM", "dumb", 1);
    struct live live = live_start(check, true, "model.bin -n 30");
    CHECK(live_until(&live, "> ", 5), "no prompt: %s", live.text);
    live_write(&live, "Once upon a time\n");
    CHECK(live_until(&live, "time\r\nOnce upon a time", 5), "no answer: %s", live.text);
    size_t start = live.seen;
    CHECK(live_until(&live, "\n> ", 5), "no second prompt: %s", live.text);
    CHECK(live.seen - start > 40, "too short: %s", live.text);
    live_write(&live, "\n"); /* nothing to answer */
    CHECK(live_until(&live, "> ", 5), "no third prompt: %s", live.text);
    live_write(&live, "The cat\n");
    CHECK(live_until(&live, "cat\r\nThe cat", 5), "no second answer: %s", live.text);
    CHECK(live_until(&live, "\n> ", 5), "no fourth prompt: %s", live.text);
    live_write(&live, "\004"); /* Ctrl-D */
    CHECK(live_end(&live, 5) == 0, "it did not end: %s", live.text);
    live_close(&live);
}

/* Processor time that a process has used, in clock ticks. */
static long ticks_of(pid_t pid) {
    char path[64], line[1024] = "";
    snprintf(path, sizeof path, "/proc/%d/stat", (int)pid);
    FILE *file = fopen(path, "r");
    long user = -1, system = 0;
    if (file && fgets(line, sizeof line, file) && strrchr(line, ')'))
        sscanf(strrchr(line, ')') + 1, " %*c %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %ld %ld",
               &user, &system);
    if (file)
        fclose(file);
    return user + system;
}

/* While it waits for a line, its threads sleep: workers, helpers, the copier. */
static void waiting_costs_nothing(struct check *check) {
    setenv("TERM", "dumb", 1);
    struct live live = live_start(check, true, "model.bin -n 5 --devices cpu:4 --threads 4");
    CHECK(live_until(&live, "> ", 5), "no prompt: %s", live.text);
    live_write(&live, "Once upon a time\n");
    CHECK(live_until(&live, "\n> ", 5), "no answer: %s", live.text);
    usleep(200000);
    long before = ticks_of(live.pid);
    sleep(1);
    long used = ticks_of(live.pid) - before;
    CHECK(before >= 0 && used <= 2, "%ld ticks in a second", used);
    live_write(&live, "\004");
    CHECK(live_end(&live, 5) == 0, "it did not end: %s", live.text);
    live_close(&live);
}

static void ctrl_c_at_a_terminal(struct check *check) {
    char folder[FOLDER_LENGTH];
    make_folder(check, folder);
    write_endless_model(check, folder, 1);
    setenv("TERM", "dumb", 1);
    struct live live = live_start(check, true, ENDLESS, folder);
    CHECK(live_until(&live, "> ", 5), "no prompt: %s", live.text);
    for (int i = 0; i < 2; i++) { /* it must not strike the answer after it as well */
        live_write(&live, "I see\n");
        CHECK(live_until(&live, "see\r\nI see", 5) && live_bytes(&live, 200, 5), "no answer %d: %s",
              i, live.text);
        live_write(&live, "\003"); /* Ctrl-C */
        CHECK(live_until(&live, "\r\n> ", 1), "answer %d goes on", i);
    }
    live_write(&live, "\003");
    int status = live_end(&live, 1);
    CHECK(status == 128 + SIGINT, "status %d", status);
    live_close(&live);
    remove_folder(check, folder);
}

int main(int argc, char **argv) {
    static const struct test tests[] = {
        {"tokenizes_as_published", tokenizes_as_published},
        {"writes_as_published", writes_as_published},
        {"writes_as_llama_cpp", writes_as_llama_cpp},
        {"writes_stories", writes_stories},
        {"a_seed_is_a_text", a_seed_is_a_text},
        {"options_are_obeyed", options_are_obeyed},
        {"stop_texts_cut", stop_texts_cut},
        {"ids_are_prompts", ids_are_prompts},
        {"perplexity_is_that_of_the_logits", perplexity_is_that_of_the_logits},
        {"requests_finish_together", requests_finish_together},
        {"bad_requests_refuse_only_themselves", bad_requests_refuse_only_themselves},
        {"statistics_add_up", statistics_add_up},
        {"piped_stdin_is_one_prompt", piped_stdin_is_one_prompt},
        {"tells_about_itself", tells_about_itself},
        {"the_first_token_comes_soon", the_first_token_comes_soon},
        {"schedules_change_no_text", schedules_change_no_text},
        {"random_weights_run", random_weights_run},
        {"absurd_weights_are_survived", absurd_weights_are_survived},
        {"an_interrupt_stops_the_answer", an_interrupt_stops_the_answer},
        {"an_interrupt_ends_other_work", an_interrupt_ends_other_work},
        {"a_termination_ends_it", a_termination_ends_it},
        {"a_closed_pipe_ends_the_answer", a_closed_pipe_ends_the_answer},
        {"talks_at_a_terminal", talks_at_a_terminal},
        {"waiting_costs_nothing", waiting_costs_nothing},
        {"ctrl_c_at_a_terminal", ctrl_c_at_a_terminal},
        {"chat_models_answer", chat_models_answer},
        {"chats_at_a_terminal", chats_at_a_terminal},
        {"edits_a_line", edits_a_line},
    };
    return check_run(tests, sizeof tests / sizeof *tests, argc, argv);
}
