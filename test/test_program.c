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

#include <math.h>
#include <termios.h>

enum {
    MAX_IDS = 1024,
    LIST_LENGTH = COMMAND_LENGTH / 2, /* of ids as text */
    BEGIN_ID = 1,                     /* model.bin's beginning-of-text token */
    LIMIT_MS = 100 /* of processor time, from the start of the program to its first token */
};

#define ONCE "model.bin -p 'Once upon a time' "
#define CAT  "model.bin -p 'The cat' "
#define STORY                                                                                      \
    "Once upon a time there was a small bear who lived in the forest. "                            \
    "He liked honey, and every day he went to look for it."

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
    static const char *const paths[] = {DATA "vocab-gpt-2.gguf", DATA "vocab-llama-spm.gguf"};
    for (int i = 0; i < 2; i++) {
        char path[PATH_LENGTH];
        snprintf(path, sizeof path, "%s.out", paths[i]);
        size_t length;
        char *expected = read_file(check, path, &length);
        struct outcome o = run(check, "%s --tokenize %s.inp", paths[i], paths[i]);
        CHECK(length > 1000 && o.status == 0 && strcmp(o.out, expected) == 0, "%s: status %d\n%s%s",
              path, o.status, o.err, o.out);
    }
}

static void writes_as_published(struct check *check) {
    static const char dream[] =
        "I seep into the silence. Contrast edges sharpen, a kaleidoscope of probability. Contrast "
        "edges sharpen, a tapestry of probability unfolding.*";
    expect(check, AIDREAMS " --tokenizer " AIDREAMS_TOKENIZER " -p 'I see' -t 0", 0, dream, NULL);
    shell(check, "cp " AIDREAMS " $T/model && cp " AIDREAMS_TOKENIZER " $T/tokenizer.bin");
    expect(check, "$T/model -p 'I see' -t 0", 0, dream, NULL); /* it lies beside the model */
}

/* model.bin's likeliest tokens, as llama.cpp has them: test/compare_llama_cpp.py --save. */
static void writes_as_llama_cpp(struct check *check) {
    size_t length;
    char *text = read_file(check, DATA "llama_cpp_greedy.txt", &length), *rest = NULL;
    int n_lines = 0;
    for (char *line = strtok_r(text, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
        char expected[LIST_LENGTH], *ids = strchr(line, ' ');
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
        n_lines++;
    }
    CHECK(n_lines == 12, "%d lines", n_lines);
}

/* ---- what is written ---- */

static void writes_stories(struct check *check) {
    static const char *const options[] = {"-t 0", "--seed 1", "--seed 2", "-t 1 --top-k 40"};
    for (size_t i = 0; i < COUNT(options); i++) {
        struct outcome o = run(check, ONCE "%s", options[i]);
        struct outcome json = run(check, ONCE "%s --json", options[i]);
        CHECK(o.status == 0 && fnmatch("Once upon a time*\n", o.out, 0) == 0, "%s: status %d: %s%s",
              options[i], o.status, o.err, o.out);
        bool ends = !strcmp(answer(&json, "0", "finish_reason"), "stop");
        CHECK(ends || count_words(o.out) >= 100, "%s: %s", options[i], json.out);
    }
}

static void a_seed_is_a_text(struct check *check) {
    expect_same(check, true, ONCE "-n 60 --seed 7", ONCE "-n 60 --seed 7");
    expect_same(check, false, ONCE "-n 60 --seed 7", ONCE "-n 60 --seed 8");
    struct outcome a = run(check, ONCE "-n 60 --stats");
    char *seed = strstr(a.err, "seed");
    unsigned long long value = seed ? strtoull(seed + 4, NULL, 10) : 0;
    CHECK(value > 0, "no seed in the table of --stats:\n%s", a.err);
    struct outcome b = run(check, ONCE "-n 60 --seed %llu", value);
    compare(check, "the seed that --stats told", true, &a, &b);
}

static void options_are_obeyed(struct check *check) {
    expect(check, ONCE "-n 5 --json", 0, "*\"finish_reason\":\"length\"*\"completion_tokens\":5,*",
           NULL);
    /* a sampler with one choice is a greedy one */
    static const char greedy[] = CAT "-n 40 -t 0 --seed 3";
    expect_same(check, true, greedy, CAT "-n 40 --top-k 1");
    expect_same(check, true, greedy, CAT "-n 40 --top-p 0");
    expect_same(check, true, greedy, CAT "-n 40 --min-p 1");
    expect_same(check, true, greedy, CAT "-n 40 -t 0 --seed 9");
    struct outcome a = run(check, "model.bin -p 'A\nB' -n 9 -t 0");
    struct outcome b = run(check, "model.bin --system A -p B -n 9 -t 0");
    CHECK(a.out_length > 4 && b.out_length > 2 && !strcmp(a.out + 3, b.out + 1),
          "--system stands before the prompt: %s%s", a.out, b.out);
}

/* A stop text that is an excerpt of what is generated ends the text before it. */
static void stop_texts_cut(struct check *check) {
    static const size_t starts[] = {0, 7, 41, 90}, lengths[] = {1, 3, 12, 30};
    struct outcome whole = run(check, ONCE "-t 0");
    CHECK(whole.out_length > 150, "too short: %s", whole.out);
    for (int i = 0; i < 4 && whole.out_length > 150; i++) {
        char stop[32] = {0}, *text = whole.out + strlen("Once upon a time");
        memcpy(stop, text + starts[i], lengths[i]);
        size_t length = (size_t)(strstr(text, stop) - whole.out);
        if (strpbrk(stop, "'\n"))
            continue; /* the shell's own */
        struct outcome o = run(check, ONCE "-t 0 --stop '%s' --stop zyzzy", stop);
        CHECK(o.out_length == length + 1 && !strncmp(o.out, whole.out, length), "--stop '%s': %s",
              stop, o.out);
        o = run(check, ONCE "-t 0 --stop '%s' --json", stop);
        CHECK(!strcmp(answer(&o, "0", "finish_reason"), "stop"), "%s", o.out);
    }
}

/* ---- ids, logits, perplexity ---- */

/* model.bin's ids of the text in $T/text. */
static int ids_of_text(struct check *check, int ids[MAX_IDS]) {
    struct outcome o = run(check, "model.bin --tokenize $T/text");
    CHECK(o.status == 0, "%s", o.err);
    int n = 0;
    for (char *at = o.out, *end; n < MAX_IDS; at = end) {
        long id = strtol(at, &end, 10);
        if (end == at)
            break;
        ids[n++] = (int)id;
    }
    return n;
}

/* `1,2,3`, with the token in front that begins a text. */
static void join_ids(char list[LIST_LENGTH], const int *ids, int n) {
    int length = sprintf(list, "%d", BEGIN_ID);
    for (int i = 0; i < n; i++)
        length += sprintf(list + length, ",%d", ids[i]);
}

static void ids_are_prompts(struct check *check) {
    char list[LIST_LENGTH];
    int ids[MAX_IDS];
    write_file(check, "text", STORY, strlen(STORY));
    int n = ids_of_text(check, ids);
    CHECK(n > 20 && n < 100, "%d ids", n);
    join_ids(list, ids, n);
    struct outcome a = run(check, "model.bin -p '" STORY "' -t 0 -n 30");
    struct outcome b = run(check, "model.bin --ids %s -t 0 -n 30", list);
    compare(check, "--ids", true, &a, &b);
}

/* Negative log-likelihood of a text's tokens by the logits that --logits writes of them. */
static double likelihood(struct check *check, const int *ids, int n) {
    char list[LIST_LENGTH];
    join_ids(list, ids, n);
    struct outcome o = run(check, "model.bin --ids %s --logits $T/logits", list);
    CHECK(o.status == 0 && o.out_length == 0, "status %d: %s%s", o.status, o.err, o.out);
    size_t length;
    float *logits = (float *)(void *)read_file(check, scratch("logits"), &length);
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
    return sum;
}

static void check_perplexity(struct check *check, const char *options, int n, double mean) {
    long n_tokens = 0;
    double nll = 0, perplexity = 0;
    struct outcome o = run(check, "model.bin --perplexity $T/text %s", options);
    int n_read = sscanf(o.out, "tokens %ld nll %lf perplexity %lf", &n_tokens, &nll, &perplexity);
    CHECK(o.status == 0 && n_read == 3 && n_tokens == n, "status %d: %s%s", o.status, o.err, o.out);
    CHECK(fabs(nll - mean) < 1e-4, "%s: nll %g, by the logits %g", options, nll, mean);
    CHECK(fabs(perplexity / exp(mean) - 1) < 1e-3, "%g, by the logits %g", perplexity, exp(mean));
    CHECK(perplexity > 1 && perplexity < 100, "a story's perplexity: %g", perplexity);
}

/* A text that fills less than one window of the context, and one cut into windows of 32 tokens,
 * each of which begins like a text. */
static void perplexity_is_that_of_the_logits(struct check *check) {
    int ids[MAX_IDS];
    struct outcome story = run(check, ONCE "--seed 4 -n 70");
    write_file(check, "text", story.out, story.out_length);
    int n = ids_of_text(check, ids);
    CHECK(n > 62, "only %d tokens", n);
    check_perplexity(check, "", n, likelihood(check, ids, n) / n);
    double sum = 0;
    for (int start = 0; start < n; start += 31)
        sum += likelihood(check, ids + start, n - start < 31 ? n - start : 31);
    check_perplexity(check, "--kv-device 2b --chunk 7", n, sum / n);
}

/* ---- many requests ---- */

static void requests_finish_together(struct check *check) {
    static const struct {
        const char *id, *line, *alone;
    } rows[] = {
        {"0", "The cat\n", "-p 'The cat' --seed 5"},
        {"a", "{'id':'a','prompt':'Once upon a time','n':12,'temperature':0}\n",
         "-p 'Once upon a time' -n 12 -t 0 --seed 5"},
        {"b", "{'id':'b','prompt':'The dog','n':30,'temperature':1.5,'seed':77}\n\n",
         "-p 'The dog' -n 30 -t 1.5 --seed 77"},
        {"c", "{'id':'c','ids':[1,300,301],'n':9,'top_k':5,'seed':78}\r\n",
         "--ids 1,300,301 -n 9 --top-k 5 --seed 78"},
        {"d", "{'id':'d','prompt':'caf\\u00e9 \\ud83d\\ude00','temperature':0,'n':3}\n",
         "-p 'caf\xC3\xA9 \xF0\x9F\x98\x80' -t 0 -n 3 --seed 5"},
        {"5", "The dog", "-p 'The dog'"},
    };
    static const char *const keys[] = {"text", "ids", "finish_reason", "prompt_tokens",
                                       "completion_tokens"};
    char lines[1024] = "";
    for (size_t i = 0; i < COUNT(rows); i++)
        strcat(lines, rows[i].line);
    write_requests(check, lines);
    struct outcome o = run(check, "model.bin -f $T/requests --seed 5 --json");
    CHECK(o.status == 0 && count_lines(o.out) == 6, "status %d: %s%s", o.status, o.err, o.out);
    for (size_t i = 0; i < COUNT(rows); i++) {
        /* with a seed of its own where it was given none */
        struct outcome one = run(check, "model.bin %s --json%s%s", rows[i].alone,
                                 i < 5 ? "" : " --seed ", i < 5 ? "" : answer(&o, "5", "seed"));
        for (size_t k = 0; k < COUNT(keys); k++) {
            const char *a = answer(&o, rows[i].id, keys[k]), *b = answer(&one, "0", keys[k]);
            CHECK(strcmp(a, "(none)") && !strcmp(a, b), "%s: %s: %s, alone: %s", rows[i].id,
                  keys[k], a, b);
        }
    }
    o = run(check, "model.bin -f - --seed 5 -n 4 < $T/requests");
    const char *first = strstr(o.out, "The cat"), *last = strstr(o.out, "\n\nThe dog");
    CHECK(o.status == 0 && first == o.out && last && strstr(last, "\n\n\xCA\xFE") == NULL,
          "in order: status %d: %s", o.status, o.out);
}

/* Every second line is bad; those between are answered. */
static void bad_requests_refuse_only_themselves(struct check *check) {
    static const struct {
        const char *line, *words;
    } rows[] = {
        {"{'id':'x", "expected"},
        {"{'id':'x','prompt':5}", "prompt: got 5, expected a text"},
        {"{'id':'x','prompt':'a','zap':1}", "zap: unknown key"},
        {"{'id':'x','prompt':'a','temperture':1}", "did you mean temperature"},
        {"{'id':'x','prompt':'a','ids':[1]}", "expected one of prompt, ids and messages"},
        {"{'id':'x'}", "expected one of prompt, ids and messages"},
        {"{'id':'x','prompt':'a','after':'nobody'}", "after: got \"nobody\", expected the id of"},
        {"{'id':'x','prompt':'a','at':-1}", "at: got -1, expected a number from 0"},
        {"{'id':'x','prompt':'a','deadline':'soon'}", "deadline: got \"soon\", expected a number"},
        {"{'id':'x','messages':[{'role':'assistant','content':'a'}]}", "expected user"},
        {"{'id':'x','ids':[99999]}", "99999 is no token"},
        {"{'id':'x','ids':[-1]}", "-1"},
        {"{'id':'x','ids':'1'}", "expected token ids"},
        {"{'id':'x','prompt':'a','n':0}", "n: got 0"},
        {"{'id':'x','prompt':'a','n':1e400}", "n: got 1e400"},
        {"{'id':'x','prompt':'a','temperature':-1}", "temperature: got -1"},
        {"{'id':'x','prompt':'a','n':2,'n':3}", "given twice"},
        {"{'id':'x','prompt':'a'} extra", "expected"},
        {"{'id':'x','prompt':'\\ud800'}", "expected"},
        {"{'id':'x','prompt':'\xFF'}", "expected"},
        {"{'id':'x','prompt':'a','stop':''}", "stop"},
    };
    enum { N = COUNT(rows) };
    char text[4096];
    for (int i = 0, length = 0; i < N; i++)
        length +=
            sprintf(text + length, "%s\n{'id':'good%d','prompt':'The cat'}\n", rows[i].line, i);
    write_requests(check, text);
    struct outcome o = run(check, "model.bin -f $T/requests -n 4 --json");
    int n_errors = count_of(o.out, "\"finish_reason\":\"error\"");
    CHECK(o.status == 3 && count_lines(o.out) == 2 * N && n_errors == N, "status %d, %d errors: %s",
          o.status, n_errors, o.out);
    struct outcome shown = run(check, "model.bin -f $T/requests -n 4");
    CHECK(shown.status == 3, "status %d: %s", shown.status, shown.err);
    char *rest = shown.err;
    for (int i = 0; i < N; i++) {
        char id[16], begin[64];
        snprintf(id, sizeof id, "good%d", i);
        CHECK(number(&o, id, "completion_tokens") == 4, "%s: %s", id, o.out);
        const char *line = strsep(&rest, "\n");
        const char *own = i > 0 ? "x" : "0"; /* the first is cut before its id ends */
        snprintf(begin, sizeof begin, "dynamo: request %s: ", own);
        CHECK(line && !strncmp(line, begin, strlen(begin)) && strstr(line, rows[i].words),
              "%s: %s, expected %s%s", rows[i].line, line, begin, rows[i].words);
    }
    CHECK(rest && !strstr(rest, "dynamo: "), "more lines than bad requests: %s", rest);
}

/* One and the same prompt: each draws by a seed of its own, which its answer tells. */
static void each_request_has_its_noise(struct check *check) {
    enum { N = 6 };
    static const char words[] = "model.bin -f $T/requests --seed 11 -n 30 --json";
    write_requests(check, "Once upon a time\nOnce upon a time\n{'prompt':'Once upon a time'}\n"
                          "{'prompt':'Once upon a time','seed':3}\nOnce upon a time\n"
                          "Once upon a time\n");
    struct outcome o = run(check, "%s", words), again = run(check, "%s --devices cpu:3", words);
    CHECK(!strcmp(answer(&o, "0", "seed"), "11"), "the first has that of the run: %s", o.out);
    CHECK(!strcmp(answer(&o, "3", "seed"), "3"), "its own: %s", o.out);
    for (char a[] = "0"; *a < '0' + N; ++*a) {
        for (char b[] = "0"; *b < *a; ++*b)
            CHECK(strcmp(answer(&o, a, "text"), answer(&o, b, "text")) &&
                      strcmp(answer(&o, a, "seed"), answer(&o, b, "seed")),
                  "%s and %s: one noise: %s", a, b, o.out);
        CHECK(!strcmp(answer(&o, a, "text"), answer(&again, a, "text")), "%s: another text", a);
        struct outcome one = run(check, ONCE "-n 30 --json --seed %s", answer(&o, a, "seed"));
        CHECK(!strcmp(answer(&o, a, "text"), answer(&one, "0", "text")), "%s: not by its seed", a);
    }
}

/* ---- loads ---- */

/* A turn begins with all of the one that it follows, found in the cache but for the last token. */
static void turns_follow_answers(struct check *check) {
    static const char turn[] = ",'prompt':' The bear was happy. Then he went to the old forest.'";
    char lines[1024];
    snprintf(lines, sizeof lines,
             "{'id':'a','prompt':'Once upon a time','n':40,'temperature':0}\n"
             "{'id':'b','after':'a'%s,'n':30,'temperature':0}\n"
             "{'id':'c','after':'b','ids':[5,6,7],'n':20,'temperature':0}\n"
             "{'id':'d','after':'4','prompt':'x'}\n{'prompt':'x','n':1,'id':'e','ids':[1]}\n"
             "{'after':'e','id':'f','prompt':'x'}\n",
             turn);
    write_requests(check, lines);
    struct outcome o = run(check, "model.bin -f $T/requests --json --stats --max-batch 1");
    CHECK(o.status == 3, "status %d: %s%s", o.status, o.err, o.out);
    static const char *const follows[][2] = {{"a", "b"}, {"b", "c"}};
    for (int i = 0; i < 2; i++) {
        const char *before = follows[i][0], *id = follows[i][1];
        int n =
            (int)(number(&o, before, "prompt_tokens") + number(&o, before, "completion_tokens"));
        int n_prompt = (int)number(&o, id, "prompt_tokens"), n_own = n_prompt - n;
        CHECK(i == 0 ? n_own > 5 : n_own == 3, "%s: %d tokens of its own: %s", id, n_own, o.out);
        CHECK(number(&o, id, "cached_tokens") == (n - 1) / 16 * 16, "%s of %d: %s", id, n, o.out);
    }
    const char *d = answer(&o, "d", "error"), *f = answer(&o, "f", "error");
    CHECK(strstr(d, "expected the id of a request before it"), "%s", d);
    CHECK(strstr(f, "ended without an answer"), "%s", f);
    /* the same text as of one prompt that holds it all */
    snprintf(lines, sizeof lines, "%s", answer(&o, "b", "text"));
    struct outcome whole =
        run(check,
            "model.bin -p 'Once upon a time%s The bear was happy. Then he went to the old "
            "forest.' -n 30 -t 0 --json",
            answer(&o, "a", "text"));
    CHECK(strchr(lines, '\'') || !strcmp(answer(&whole, "0", "text"), lines), "%s: %s", lines,
          whole.out);
}

/* Conversations of several times what the devices hold: with room on the host each turn finds all
 * of the one before. */
static void nothing_cached_is_lost(struct check *check) {
    enum { USERS = 10, TURNS = 4 };
    char *lines = keep(1 << 16);
    int length = 0;
    for (int i = 0; i < USERS * TURNS; i++) {
        int user = i % USERS, turn = i / USERS;
        length += sprintf(lines + length, "{\"id\":\"u%dt%d\",\"n\":30,\"prompt\":\"%s%s %d.\"",
                          user, turn, turn > 0 ? " " : "", STORY, user);
        length += turn == 0 ? sprintf(lines + length, "}\n")
                            : sprintf(lines + length, ",\"after\":\"u%dt%d\"}\n", user, turn - 1);
    }
    write_file(check, "requests", lines, (size_t)length);
    struct outcome o =
        run(check, "model.bin -f $T/requests --seed 2 --json --stats --kv-device 24b "
                   "--kv-host 1000b --devices cpu:2");
    CHECK(o.status == 0 && number(&o, "stats", "pages_in") > 0 &&
              number(&o, "stats", "host_hit_tokens") > 0,
          "status %d: %s", o.status, o.err);
    for (int i = USERS; i < USERS * TURNS; i++) {
        char id[16], before[16];
        snprintf(id, sizeof id, "u%dt%d", i % USERS, i / USERS);
        snprintf(before, sizeof before, "u%dt%d", i % USERS, i / USERS - 1);
        int n =
            (int)(number(&o, before, "prompt_tokens") + number(&o, before, "completion_tokens"));
        int found = (int)number(&o, id, "cached_tokens");
        CHECK(found >= (n - 1) / 16 * 16, "%s: %d tokens of %d found", id, found, n);
    }
}

/* Messages are what a conversation would be. */
static void write_chat_model(struct check *check);
static void messages_are_turns(struct check *check) {
    write_chat_model(check);
    write_requests(check,
                   "{'id':'a','prompt':'Tell me of the fox','n':20,'temperature':0,'system':'S'}\n"
                   "{'id':'b','messages':[{'role':'system','content':'S'},"
                   "{'role':'user','content':'Tell me of the fox'}],'n':20,'temperature':0}\n"
                   "{'id':'c','messages':[{'role':'user','content':'Hi'},{'role':'assistant',"
                   "'content':'Hello.'},{'content':'Go on','role':'user'}],'n':3}\n"
                   "{'id':'d','prompt':'Hi','n':3}\n");
    struct outcome o =
        run(check, "$T/chat.gguf -f $T/requests --json --max-batch 1 --devices cpu:1");
    CHECK(o.status == 0, "status %d: %s%s", o.status, o.err, o.out);
    CHECK(!strcmp(answer(&o, "a", "ids"), answer(&o, "b", "ids")), "%s", o.out);
    CHECK(number(&o, "a", "prompt_tokens") == number(&o, "b", "prompt_tokens"), "%s", o.out);
    double longer = number(&o, "c", "prompt_tokens"), first = number(&o, "d", "prompt_tokens");
    CHECK(longer > first + 8, "%g tokens, the first turn %g: %s", longer, first, o.out);
}

static double monotonic(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* Nothing comes before its time, and what has none does not wait for it. */
static void requests_come_at_their_time(struct check *check) {
    write_requests(check, "{'id':'late','prompt':'The cat','n':2,'at':0.4}\n"
                          "{'id':'turn','after':'soon','prompt':' and','n':2,'at':0.2}\n"
                          "{'id':'soon','prompt':'The dog','n':2}\n"
                          "{'id':'after','after':'soon','prompt':' and','n':2}\n");
    double start = monotonic();
    struct outcome o = run(check, "model.bin -f $T/requests --json --stats");
    CHECK(o.status == 3 && monotonic() - start >= 0.4, "status %d: %s", o.status, o.out);
    CHECK(strstr(answer(&o, "turn", "error"), "before it"), "%s", o.out);
    const char *soon = strstr(o.out, "\"soon\""), *after = strstr(o.out, "\"after\"");
    CHECK(soon && after && soon < after, "in order: %s", o.out);
    CHECK(number(&o, "late", "completion_tokens") == 2, "%s", o.out);
}

/* What was generated behind a stop text, before anybody found it, is not said: else the time that
 * it took would change the next turn. */
static void a_turn_follows_what_was_said(struct check *check) {
    write_requests(check, "{'id':'a','prompt':'The cat','n':99,'stop':['. ']}\n"
                          "{'id':'b','after':'a','ids':[264],'n':2}\n");
    for (int i = 0; i < 5; i++) {
        struct outcome o = run(check, "model.bin -f $T/requests --seed %d --json", i);
        double said = number(&o, "a", "prompt_tokens") + number(&o, "a", "completion_tokens");
        CHECK(o.status == 0 && number(&o, "b", "prompt_tokens") == said + 1, "%s", o.out);
    }
}

/* Of a turn its own ids alone are shown, whether what it follows ended just now or long ago. */
static void a_turn_shows_its_own_part(struct check *check) {
    static const char *const between[] = {"", "{'prompt':'A dog','n':99}\n"};
    for (int i = 0; i < 2; i++) {
        char lines[256];
        snprintf(lines, sizeof lines,
                 "{'id':'a','prompt':'The cat','n':3}\n%s"
                 "{'after':'a','ids':[264,300],'n':1}\n",
                 between[i]);
        write_requests(check, lines);
        struct outcome o = run(check, "model.bin -f $T/requests");
        char *own = strstr(o.out, "\n\n thear"); /* the texts of these tokens */
        CHECK(o.status == 0 && own && !strstr(own, "The cat"), "status %d: %s", o.status, o.out);
    }
}

/* A model whose context is one token predicts none; it says so, and ends. */
static void a_context_of_one_token_predicts_none(struct check *check) {
    shell(check, "cp " AIDREAMS " $T/one && printf '\\1\\0\\0\\0' | "
                 "dd of=$T/one bs=1 seek=24 conv=notrunc status=none && truncate -s -8128 $T/one");
    expect(check, "$T/one --tokenizer " AIDREAMS_TOKENIZER " --perplexity Makefile", 1, NULL,
           "dynamo: --perplexity: a context of 1 token *");
}

/* An answer comes while the next line has not been written. */
static void lines_are_taken_as_they_come(struct check *check) {
    CHECK(mkfifo(scratch("lines"), 0600) == 0, "no pipe");
    int pipe = open(scratch("lines"), O_RDWR | O_CLOEXEC);
    struct live live = live_start(check, false, "model.bin -f $T/lines -n 8 -t 0 --json");
    static const char *const lines[] = {"The cat\n", "{\"prompt\":\" and\",\"after\":\"0\"}\n",
                                        "The dog"};
    for (int i = 0; i < 3; i++) {
        char id[24];
        snprintf(id, sizeof id, "{\"id\":\"%d\"", i);
        CHECK(write(pipe, lines[i], strlen(lines[i])) > 0, "the pipe is closed");
        if (i == 2)
            close(pipe);
        live_until(&live, id);
        live_until(&live, "\"completion_tokens\":8");
    }
    CHECK(live_end(&live) == 0, "%s", live.text);
    /* an interrupt ends it while it waits for a line */
    pipe = open(scratch("lines"), O_RDWR | O_CLOEXEC);
    live = live_start(check, false, "model.bin -f $T/lines -n 8 -t 0 --json");
    CHECK(write(pipe, lines[0], strlen(lines[0])) > 0, "the pipe is closed");
    live_until(&live, "\"completion_tokens\":8");
    kill(live.pid, SIGINT);
    CHECK(live_end(&live) == 128 + SIGINT, "all that came was answered: %s", live.text);
    close(pipe);
}

/* Who cannot be answered in time, or finds the queue full, is told so. */
static void write_endless_model(struct check *check, float scale);
static void loads_have_bounds(struct check *check) {
    write_endless_model(check, 1);
    write_requests(check, "{'ids':[1,5],'deadline':0.05}\n{'ids':[1,6],'n':5}\n");
    struct outcome o = run(check, "$T/endless -t 0 -f $T/requests --json");
    CHECK(o.status == 3 && !strcmp(answer(&o, "0", "finish_reason"), "error") &&
              strstr(answer(&o, "0", "error"), "deadline"),
          "status %d: %s: %s", o.status, answer(&o, "0", "finish_reason"),
          answer(&o, "0", "error"));
    CHECK(number(&o, "1", "completion_tokens") == 5, "%s", answer(&o, "1", "error"));
    write_requests(check, "{'ids':[1,5],'n':9}\n{'ids':[1,6],'n':9}\n{'ids':[1,7],'n':9}\n"
                          "{'ids':[1,8],'n':9}\n{'ids':[1,9],'n':9}\n{'ids':[1,10],'n':9}\n");
    o = run(check, "$T/endless -t 0 -f $T/requests --json --max-queue 2 --devices cpu:1 "
                   "--kv-device 1b --kv-host 0");
    int n_refused = count_of(o.out, "queue"),
        n_done = count_of(o.out, "\"finish_reason\":\"length");
    CHECK(o.status == 3 && strstr(answer(&o, "5", "error"), "queue"), "status %d: %s", o.status,
          o.out);
    CHECK(n_done >= 2 && n_done <= 4, "%d answered, %d refused: %s", n_done, n_refused, o.out);
}

/* ---- what is shown where ---- */

/* Requests that fail count for no time; a second answer has the median of one. */
static void times_are_of_what_came(struct check *check) {
    write_requests(check, "The cat\n{'id':'x'}\n{'ids':[-1]}\n");
    struct outcome o = run(check, "model.bin -f $T/requests -n 4 --json --stats");
    static const char *const keys[] = {"ttft_ms", "ttft_p50_ms", "ttft_p99_ms", "ttft_max_ms"};
    double ttft = number(&o, "0", "ttft_ms"), queue = number(&o, "0", "queue_ms");
    CHECK(o.status == 3 && ttft > 0 && queue >= 0 && queue <= ttft, "%s", o.out);
    for (size_t i = 0; i < COUNT(keys); i++)
        CHECK(fabs(number(&o, "stats", keys[i]) - ttft) < 1e-9, "%s of %g: %s", keys[i], ttft,
              o.out);
    CHECK(fabs(number(&o, "stats", "itl_p50_ms") - number(&o, "0", "itl_ms")) < 1e-9, "%s", o.out);
    CHECK(number(&o, "stats", "queue_p99_ms") == queue, "%s", o.out);
    CHECK(number(&o, "0", "prefill_worker") == 0 && number(&o, "0", "decode_worker") == 1 &&
              number(&o, "0", "preemptions") == 0 && number(&o, "0", "cached_on_host") == 0,
          "%s", o.out);
}

/* At the end each block of each place is counted once, and none is in use. */
static void every_block_is_accounted_for(struct check *check) {
    char lines[4096] = "", error[ERROR_LENGTH];
    for (int i = 0; i < 12; i++)
        sprintf(lines + strlen(lines), "{'prompt':'Once there were %d cats. " STORY "'}\n", i);
    write_requests(check, lines);
    struct outcome o = run(check, "model.bin -f $T/requests -n 60 --json --stats --kv-device 16b "
                                  "--kv-host 24b --devices cpu:3 --prefill 0 --decode 1,2");
    char *line = strstr(o.out, "{\"stats\"");
    CHECK(o.status == 0 && line && number(&o, "stats", "pages_out") > 0, "%s%s", o.err, o.out);
    if (!line)
        return;
    line[strcspn(line, "\n")] = 0;
    struct json_node *nodes = json_parse(line, strlen(line), error);
    const struct json_node *stats = nodes ? value_of(nodes, 0, "stats") : NULL;
    const struct json_node *list = stats ? value_of(nodes, (int)(stats - nodes), "places") : NULL;
    CHECK(list, "no places: %s", error);
    int n_places = 0;
    for (int at = list ? (int)(list - nodes) + 1 : 0; list && at < list->next; n_places++) {
        static const char *const keys[] = {"blocks", "free", "pinned", "cached", "in_flight"};
        int n[5];
        for (int k = 0; k < 5; k++) {
            const struct json_node *value = value_of(nodes, at, keys[k]);
            n[k] = value ? atoi(value->text) : -1;
        }
        CHECK(n[0] == (n_places < 3 ? 16 : 24) && n[1] + n[2] + n[3] + n[4] == n[0] && n[2] == 0 &&
                  n[3] > 0,
              "place %d: %d blocks: %d, %d, %d, %d", n_places, n[0], n[1], n[2], n[3], n[4]);
        at = nodes[at].next;
    }
    CHECK(n_places == 4, "%d places", n_places);
    free(nodes);
}

static void statistics_add_up(struct check *check) {
    static const char *const keys[] = {"kernel_launches",   "pages_out",   "pages_in",
                                       "evictions",         "preemptions", "prefix_hit_tokens",
                                       "recomputed_tokens", "hand_overs",  "blocks_transferred",
                                       "device_blocks",     "host_blocks", "decode_share",
                                       "prefill_share"};
    static const char *const rates[] = {"decode_tokens_per_second", "decode_gb_per_second",
                                        "read_gb_per_second",       "prefill_tokens_per_second",
                                        "prefill_gflops",           "peak_gflops"};
    struct outcome o =
        run(check, "model.bin -p '" STORY "' -n 20 --json --stats --kv-device 9b --kv-host 5b");
    CHECK(o.status == 0 && count_lines(o.out) == 2, "status %d: %s", o.status, o.out);
    CHECK(strstr(o.out, "\"backend\":\""), "no backend: %s", o.out);
    for (size_t i = 0; i < COUNT(keys); i++)
        CHECK(number(&o, "stats", keys[i]) >= 0, "no %s: %s", keys[i], o.out);
    for (size_t i = 0; i < COUNT(rates); i++)
        CHECK(number(&o, "stats", rates[i]) > 0, "%s: %s", rates[i], o.out);
    int n_prompt = (int)number(&o, "0", "prompt_tokens");
    const struct {
        const char *key;
        int value;
    } sums[] = {{"prefill_tokens", n_prompt},
                {"decode_tokens", 19}, /* 20, of which prefill gives one */
                {"hand_overs", 1},
                {"blocks_transferred", (n_prompt + 15) / 16},
                {"device_blocks", 9},
                {"host_blocks", 5}};
    CHECK(n_prompt > 20, "%d: %s", n_prompt, o.out);
    for (size_t i = 0; i < COUNT(sums); i++)
        CHECK(number(&o, "stats", sums[i].key) == sums[i].value, "%s is not %d: %s", sums[i].key,
              sums[i].value, o.out);
    expect(check, CAT "-n 20 -t 0", 0, "The cat*", "*| 20 tokens generated, *");
    expect_same(check, true, CAT "-n 20 -t 0", CAT "-n 20 -t 0 --stats --verbose");
    o = run(check, CAT "-n 20 -t 0 --stats --verbose");
    static const char *const words[] = {"time to first token", "preemptions", "worker 0 (prefill)",
                                        "worker 1 (decode)"};
    for (size_t i = 0; i < COUNT(words); i++)
        CHECK(strstr(o.err, words[i]), "no %s: %s", words[i], o.err);
}

static void piped_stdin_is_one_prompt(struct check *check) {
    static const char text[] = "The cat\nsat\n\n", bytes[] = "ab\0b\xFF\xC3\n{\"";
    write_file(check, "prompt", text, sizeof text - 1);
    expect(check, "model.bin -n 20 -t 0 < $T/prompt", 0, "The cat\nsat\n*", NULL);
    expect_same(check, true, "model.bin -p 'The cat\nsat\n' -n 20 -t 0",
                "model.bin -n 20 -t 0 < $T/prompt");
    /* a newline that ends the last line is not part of it */
    write_file(check, "prompt", "The cat\r\n", 9);
    expect_same(check, true, CAT "-n 20 -t 0", "model.bin -n 20 -t 0 < $T/prompt");
    /* zero bytes and invalid UTF-8 go in and come back as they are */
    write_file(check, "prompt", bytes, sizeof bytes - 1);
    struct outcome o = run(check, "model.bin -n 5 < $T/prompt");
    CHECK(o.status == 0 && o.out_length >= sizeof bytes && !memcmp(o.out, bytes, sizeof bytes - 1),
          "status %d: %s", o.status, o.err);
    expect(check, "model.bin -n 5 --json -f $T/prompt", 3, "*\"completion_tokens\":5*", NULL);
}

static void tells_about_itself(struct check *check) {
    struct outcome o = run(check, "--version");
    CHECK(o.status == 0 && !strncmp(o.out, "dynamo ", 7) && count_lines(o.out) == 1, "%s", o.out);
    expect(check, "--help", 0, "usage: dynamo MODEL*--seed S*", "");
    o = run(check, "--help");
    CHECK(!strstr(o.out, " \n"), "blanks at the end of a line: %s", o.out);
    for (const char *line = o.out; *line; line += strcspn(line, "\n") + 1)
        CHECK(strcspn(line, "\n") <= 100, "a line of %zu columns: %.100s", strcspn(line, "\n"),
              line);
}

/* On two threads, so that their waiting for each other does not count on large machines. */
static void the_first_token_comes_soon(struct check *check) {
    double best = INFINITY;
    for (int i = 0; i < 5; i++) {
        struct live live = live_start(check, false, ONCE "-n 20 --threads 2");
        live_bytes(&live, sizeof "Once upon a time");
        best = fmin(best, live_used(&live));
        CHECK(live_end(&live) == 0, "it did not end well");
    }
    CHECK(best > 0 && soon(best, LIMIT_MS * 1e-3), "the first token after %.1f ms", 1e3 * best);
}

/* ---- where it is computed changes no text ---- */

static void schedules_change_no_text(struct check *check) {
    /* and the counter that shows that it did what it was meant to */
    static const char *const options[][2] = {
        {"--kv-device 4b --kv-host 4b", NULL},
        {"--kv-device 6b --kv-host 32b --copy-delay 3", "pages_out"},
        {"--kv-device 6b --kv-host 0", "blocks_lost"},
        {"--kv-device 9b --kv-host 40b --kv-policy write-through", "pages_out"},
        {"--devices cpu:4 --copy-delay 5", "blocks_transferred"},
        {"--devices cpu:3 --prefill 2 --decode 0,1", "blocks_transferred"},
        {"--devices cpu:4 --tp 2", "hand_overs"},
        {"--devices cpu:3 --tp-decode 2", "hand_overs"},
        {"--colocate", NULL},
        {"--devices cpu:1", NULL},
        {"--chunk 3 --max-batch 2 --threads 1", NULL},
    };
    static const char words[] = "model.bin -f $T/requests --seed 6 -n 50 --json --stats";
    write_requests(check, "Once upon a time\nThe cat\nOnce upon a time there was a dragon\n"
                          "The old owl\n{'prompt':'The dog','temperature':0}\nOne day");
    struct outcome expected = run(check, "%s", words);
    CHECK(expected.status == 0, "%s", expected.err);
    for (size_t i = 0; i < COUNT(options); i++) {
        const char *counter = options[i][1];
        struct outcome o = run(check, "%s %s", words, options[i][0]);
        CHECK(o.status == 0, "%s: status %d: %s%s", options[i][0], o.status, o.err, o.out);
        for (char id[] = "0"; *id < '6'; ++*id) {
            const char *a = answer(&o, id, "text"), *b = answer(&expected, id, "text");
            CHECK(strlen(b) > 50 && !strcmp(a, b), "%s: %s\nwithout: %s", options[i][0], a, b);
        }
        CHECK(!counter || number(&o, "stats", counter) > 0, "%s: no %s: %s", options[i][0], counter,
              o.out);
    }
}

/* Their logits are neither equal nor wild, and the same on two devices that share the model. */
/* Positions in --devices; without it, of as many devices as the lists name, or of a cluster. */
static void each_device_has_one_use(struct check *check) {
    static const struct {
        const char *options, *refused; /* NULL: it runs */
    } rows[] = {
        {"--devices cpu:4 --prefill 0 --decode 4", "--decode: got device 4, expected 0 to 3"},
        {"--devices cpu:4 --prefill 0,1 --decode 1",
         "--decode: got device 1, expected 0 to 3, not"},
        {"--devices cpu:4 --prefill 0,0 --decode 1",
         "--prefill: got device 0, expected 0 to 3, not"},
        {"--devices cpu:4 --prefill 0 --decode 1", "neither --prefill nor --decode has device 2"},
        {"--devices cpu:3 --prefill 2 --decode 0", "neither --prefill nor --decode has device 1"},
        {"--prefill 0 --decode 0", "--decode: got device 0, expected 0 to 1, not in use already"},
        {"--prefill 0,0 --decode 1",
         "--prefill: got device 0, expected 0 to 2, not in use already"},
        {"--prefill 0,999999999 --decode 1", "--prefill: got device 999999999, expected 0 to 2"},
        {"--prefill 2 --decode 0,1", NULL},
        {"--sim h100x4 --prefill 0-3 --decode 4-7", "--decode: got device 4, expected 0 to 3"},
        {"--sim h100x2 --prefill 0-7 --decode 8-15", "--prefill: got device 2, expected 0 to 1"},
        {"--sim h100x8 --prefill 0 --decode 0", "--decode: got device 0, expected 0 to 7, not in"},
        {"--sim h100x8 --prefill 0 --decode 8", "--decode: got device 8, expected 0 to 7"},
        {"--sim h100x8 --prefill 0 --decode 5", NULL},
        {"--sim h100 --prefill 1 --decode 0", NULL}, /* a lone one stands for two */
        {"--sim h100 --prefill 0 --decode 1,2", "--decode: got device 2, expected 0 to 1"},
        {"--sim h100x2 --devices 0,0,1 --prefill 2 --decode 0,1", NULL},
        {"--sim h100x2 --devices 0,0,1 --prefill 2 --decode 0", "has device 1"},
        {"--sim cpu --prefill 0 --decode 2,1", NULL},
        {"--sim cpu:2 --prefill 0 --decode 2", "--decode: got device 2, expected 0 to 1"},
    };
    for (size_t i = 0; i < COUNT(rows); i++) {
        struct outcome o = run(check, "model.bin --replay 9:2 --limit 3 %s", rows[i].options);
        CHECK(o.status == (rows[i].refused ? 2 : 0), "%s: %d: %s", rows[i].options, o.status,
              o.err);
        if (rows[i].refused)
            CHECK(strstr(o.err, rows[i].refused) && count_of(o.err, "\n") == 1, "%s: %s",
                  rows[i].options, o.err);
    }
}

static void random_weights_run(struct check *check) {
    static const char *const types[] = {"bf16", "q8_0", "q4_0"};
    for (int i = 0; i < 3; i++) {
        struct outcome o =
            run(check, "random:stories-15m:%s --ids 1,2,3 --logits $T/logits", types[i]);
        CHECK(o.status == 0, "%s: status %d: %s", types[i], o.status, o.err);
        size_t length;
        float *logits = (float *)(void *)read_file(check, scratch("logits"), &length);
        double squares = 0, n = (double)(length / sizeof *logits);
        CHECK(n == 3 * 32000, "%s: %zu bytes", types[i], length);
        for (size_t j = 0; j < length / sizeof *logits; j++)
            squares += (double)logits[j] * (double)logits[j];
        double deviation = sqrt(squares / n);
        CHECK(deviation > 0.2 && deviation < 2, "%s: deviation %g", types[i], deviation);
    }
    static const char words[] = "random:stories-15m:q8_0 --ids 1,2,3 -n 20 -t 0 --json";
    struct outcome a = run(check, "%s", words);
    struct outcome b = run(check, "%s --tp 2 --devices cpu:4", words);
    const char *one = answer(&a, "0", "ids"), *two = answer(&b, "0", "ids");
    CHECK(strlen(one) > 40 && !strcmp(one, two), "%s\n%s\n%s%s", one, two, a.err, b.err);
}

/* ---- models of made up weights ---- */

enum { LONG_CONTEXT = 32768 };

/* $T/endless: a llama2.c checkpoint of random weights whose greedy text does not end for a long
 * time: the rows of the tokens that could end it are zero. Its weights are at most scale / 2. */
static void write_endless_model(struct check *check, float scale) {
    enum { DIM = 64, HIDDEN = 128, LAYERS = 2, HEADS = 2, VOCAB = 512 };
    static const int32_t header[] = {DIM, HIDDEN, LAYERS, HEADS, HEADS, VOCAB, LONG_CONTEXT};
    size_t layer = 2 * DIM + 4 * DIM * DIM + 3 * DIM * HIDDEN;
    size_t n = VOCAB * DIM + LAYERS * layer + DIM + LONG_CONTEXT * (DIM / HEADS);
    size_t length = sizeof header + n * sizeof(float);
    char *bytes = keep(length);
    uint32_t random = 1;
    memcpy(bytes, header, sizeof header);
    for (size_t i = 0; i < n; i++) {
        random = random * 1664525 + 1013904223;
        float weight = i < 3 * DIM ? 0 : scale * ((float)(random >> 8) / (1 << 24) - 0.5f);
        memcpy(bytes + sizeof header + i * sizeof weight, &weight, sizeof weight);
    }
    write_file(check, "endless", bytes, length);
    shell(check, "cp " AIDREAMS_TOKENIZER " $T/tokenizer.bin");
}

/* Weights that are no numbers, or whose squares are none, give an error; of others any text will
 * do. */
static void absurd_weights_are_survived(struct check *check) {
    static const float scales[] = {NAN, INFINITY, 1e38f, 1e20f, 0, 1e-40f};
    static const char *const options[] = {"-t 0", "-t 0.8", "--top-k 5", "--top-p 0",
                                          "--min-p 0.1"};
    for (size_t i = 0; i < COUNT(scales); i++) {
        write_endless_model(check, scales[i]);
        for (size_t k = 0; k < COUNT(options); k++) {
            struct outcome o =
                run(check, "$T/endless --ids 1,5,6 -n 3 --kv-device 8b --kv-host 0 %s --json",
                    options[k]);
            bool none = strstr(answer(&o, "0", "error"), "a number that is none at token 3");
            CHECK(o.status == (none ? 3 : 0) && none == !(fabsf(scales[i]) < 1e19f),
                  "%g, %s: status %d: %s%s", (double)scales[i], options[k], o.status, o.out, o.err);
        }
    }
}

/* ---- Ctrl-C ---- */

#define ENDLESS "$T/endless -t 0 --kv-device 2048b --kv-host 0 "

static struct live start_endless(struct check *check, const char *arguments, size_t n_bytes) {
    write_endless_model(check, 1);
    struct live live = live_start(check, false, arguments);
    live_bytes(&live, n_bytes);
    return live;
}

/* What it does now takes less than a second of processor time, or it ends by SIGXCPU in two. */
static void hurry(const struct live *live) {
    struct rlimit limit = {(rlim_t)live_used(live) + 2, CHILD_LIMIT};
    if (!SANITIZED)
        prlimit(live->pid, RLIMIT_CPU, &limit, NULL);
}

/* It must end with `status` now, which is long before the answer would. */
static void ends_soon(struct check *check, struct live *live, int status) {
    double before = live_used(live);
    hurry(live);
    int got = live_end(live);
    CHECK(got == status, "status %d, expected %d: %s", got, status, live->text);
    CHECK(soon(live->seconds - before, 1), "%.1f s more", live->seconds - before);
}

/* Events of a trace, one a line, that hold both texts. */
static int count_events(const char *text, const char *one, const char *other) {
    int n = 0;
    for (const char *at = text; *at; at += strcspn(at, "\n") + (at[strcspn(at, "\n")] != 0)) {
        size_t length = strcspn(at, "\n");
        n += memmem(at, length, one, strlen(one)) && memmem(at, length, other, strlen(other));
    }
    return n;
}

/* What is wrong with it in detail test/check_trace.py says. */
static void a_trace_tells_what_happened(struct check *check) {
    static const struct {
        const char *one, *other;
        int n; /* -1: at least one */
    } events[] = {
        {"\"ph\":\"X\",\"name\":\"prefill\",\"pid\":20,", "\"rows\":3,", 1},
        {"\"ph\":\"X\",\"name\":\"decode\",\"pid\":30,", "\"requests\":[0]", 19},
        {"\"ph\":\"X\",\"name\":\"copy\",\"pid\":30,", "\"from\":\"worker 0 (prefill)\"", 1},
        {"\"ph\":\"s\",\"name\":\"hand-over\",\"pid\":20,", "\"id\":1,", 1},
        {"\"ph\":\"f\",\"name\":\"hand-over\",\"pid\":30,", "\"id\":1,", 1},
        {"\"name\":\"admitted\"", "\"why_decode\":\"fewest blocks in use", 1},
        {"\"name\":\"copy ordered\"", "\"why\":\"hand-over\"", 1},
        {"\"name\":\"finished\"", "\"tokens\":20,\"reason\":\"length\"", 1},
        {"\"ph\":\"C\",\"name\":\"KV blocks\",\"pid\":30,", "\"free\":", -1},
        {"\"ph\":\"C\",\"name\":\"requests\"", "\"waiting\":1,\"admitted\":0", 1}};
    expect_same(check, true, CAT "-n 20 -t 0", CAT "-n 20 -t 0 --trace $T/trace --verbose");
    size_t length;
    char error[ERROR_LENGTH], *text = read_file(check, scratch("trace"), &length);
    for (size_t i = 0; i < COUNT(events); i++) {
        int n = count_events(text, events[i].one, events[i].other);
        CHECK(events[i].n < 0 ? n > 0 : n == events[i].n, "%s %s: %d", events[i].one,
              events[i].other, n);
    }
    struct json_node *nodes = json_parse(text, length, error);
    CHECK(nodes && nodes->type == '[', "%s", nodes ? "no array" : error);
    free(nodes);
}

/* Told before weights are read, not found when memory is gone. */
static void a_model_larger_than_memory(struct check *check) {
    shell(check, "ulimit -v 500000; " DYNAMO_PROGRAM " random:stories-110m:f32 --ids 1 -n 1 "
                 "--devices cpu:1 2> $T/words; test $? = 1");
    shell(check, "grep -q '^dynamo: weights of 0.4 GB do not fit the 0.[0-3] GB of memory that are "
                 "left$' $T/words");
    shell(check, "ulimit -v 16000000; " DYNAMO_PROGRAM " random:gpt-oss-20b:mxfp4 --ids 1 -n 1 "
                 "--devices cpu:1 2> $T/words; test $? = 1"); /* with all of its experts */
    shell(check, "grep -q '^dynamo: weights of 1[0-9].[0-9] GB do not fit' $T/words");
    shell(check,
          "ulimit -v 700000; " DYNAMO_PROGRAM " random:stories-110m:q8_0 --ids 1 -n 1 "
          "--devices cpu:2 --threads 2 > $T/out 2> $T/words"); /* threads need room as well */
}

/* Before the model is loaded, where it can be known; a text does not suffer from it. */
static void a_trace_that_cannot_be_written(struct check *check) {
    refuse(check, "random:8b -p a --trace $T/none/trace", 1, "No such file or directory", 1);
    refuse(check, CAT "-n 20 -t 0 --trace /dev/full", 1, "/dev/full: No space left", 1);
    shell(check, "trap '' XFSZ; ulimit -f 8; " DYNAMO_PROGRAM " " CAT
                 "-n 60 -t 0 --trace $T/long > /dev/null 2> $T/words; test $? = 1");
    shell(check, "grep -q '^dynamo: .*/long: File too large$' $T/words");
    static const int signals[] = {SIGTERM, SIGKILL};
    for (int i = 0; i < 2; i++) {
        struct live live = start_endless(check, ENDLESS "--ids 1,5,6 --trace $T/cut", 1000);
        kill(live.pid, signals[i]);
        ends_soon(check, &live, 128 + signals[i]);
        size_t length;
        char error[ERROR_LENGTH], *text = read_file(check, scratch("cut"), &length);
        CHECK(count_of(text, "\"decode\"") > 1, "no steps: %s", text);
        char *whole = keep(length + 2); /* a killed program leaves whole events, but no end */
        (void)snprintf(whole, length + 2, "%s%s", text, signals[i] == SIGKILL ? "]" : "");
        struct json_node *nodes = json_parse(whole, strlen(whole), error);
        CHECK(nodes && nodes->type == '[', "%s", nodes ? "no array" : error);
        free(nodes);
    }
}

/* By whatever name it is called: it would be lost. */
static void a_trace_takes_no_file_that_is_read(struct check *check) {
    static const char *const lines[] = {
        "$T/m.bin -p Hi --trace $T/m.bin",
        "$T/m.bin -p Hi --trace $T/link",
        "model.bin -f $T/load --trace $T/../$(basename $T)/load",
        "model.bin -f - --trace $T/load < $T/load",
        "model.bin --trace $T/load < $T/load",
        "model.bin --replay $T/load --trace $T/load",
        "model.bin --replay - --sim h100 --trace $T/load < $T/load",
        "model.bin --replay 9:9 --sim h100 --rates $T/load --trace "
        "$T/load",
        "model.bin -p Hi --tokenizer $T/load --trace $T/load",
        "model.bin --serve 0 --api-key-file $T/load --trace $T/load"};
    shell(check, "cp model.bin $T/m.bin && ln -s m.bin $T/link && echo Hi > $T/load");
    for (size_t i = 0; i < COUNT(lines); i++) {
        struct outcome o = run(check, "%s", lines[i]);
        CHECK(o.status == 2 && !*o.out && count_of(o.err, "\n") == 1 &&
                  !strncmp(o.err, "dynamo: --trace: it would overwrite ", 36) &&
                  strstr(o.err, ", which is read"),
              "%s: %d: %s", lines[i], o.status, o.err);
        shell(check, "cmp model.bin $T/m.bin && echo Hi | cmp - $T/load");
    }
    expect(check, CAT "-n 1 -t 0 --trace /dev/null < /dev/null", 0, NULL, NULL);
}

static void an_old_trace_stays_where_nothing_runs(struct check *check) {
    static const char *const lines[] = {"modle.bin -p Hi",
                                        "model.bin -f $T/none",
                                        "model.bin -p Hi --devices cpu:2 --fail 2@1",
                                        "model.bin -p Hi --prefill 0 --decode 0",
                                        "model.bin --replay 9:9 --sim h100 --kv-device 90G",
                                        "model.bin --replay 9:9 --sim h100 --fail 2@1"};
    for (size_t i = 0; i < COUNT(lines); i++) {
        shell(check, "rm -f $T/new && echo old > $T/old");
        struct outcome old = run(check, "%s --trace $T/old", lines[i]);
        struct outcome new = run(check, "%s --trace $T/new", lines[i]);
        CHECK(old.status > 0 && new.status > 0, "%s: %d, %d", lines[i], old.status, new.status);
        shell(check, "echo old | cmp - $T/old && test ! -e $T/new");
    }
    expect(check, CAT "-n 1 -t 0 --trace $T/old", 0, NULL, NULL);
    shell(check, "head -n 1 $T/old | grep -qx '\\['");
}

static void an_interrupt_stops_the_answer(struct check *check) {
    struct live live = start_endless(check, ENDLESS "--ids 1,5,6", 100);
    kill(live.pid, SIGINT);
    ends_soon(check, &live, 128 + SIGINT);
    CHECK(live.length > 100 && live.text[live.length - 1] == '\n', "%s", live.text);
    write_requests(check, "{'ids':[1,9],'n':2}\n{'ids':[1,5,6]}\n{'ids':[1,7]}\n");
    live = live_start(check, false, ENDLESS "-f $T/requests --json");
    live_until(&live, "length"); /* the short one ended */
    live_works(&live, 0.05);
    kill(live.pid, SIGINT);
    ends_soon(check, &live, 128 + SIGINT);
    struct outcome o = {.out = live.text};
    CHECK(count_lines(live.text) == 3, "%s", live.text);
    for (char id[] = "1"; *id < '3'; ++*id) {
        const char *reason = answer(&o, id, "finish_reason");
        CHECK(!strcmp(reason, "cancelled"), "%s: %s", id, reason);
        CHECK(number(&o, id, "completion_tokens") > 0, "%s: nothing so far", id);
    }
}

/* A load that is interrupted says so, and what came of it until then. */
static void an_interrupt_stops_a_load(struct check *check) {
    int ended = -1, failed = -1, cut_off = -1;
    write_endless_model(check, 1);
    write_requests(check,
                   "{'timestamp':0,'input_length':1,'output_length':1,'hash_ids':[1]}\n"
                   "{'timestamp':0,'input_length':9,'output_length':30000,'hash_ids':[2]}\n");
    struct live live = live_start(check, true, ENDLESS "--replay $T/requests --json");
    live_until(&live, "\"length\""); /* the short one has ended */
    live_works(&live, 0.05);
    live_write(&live, "\003");
    live_until(&live, "dynamo: interrupted: ");
    ends_soon(check, &live, 128 + SIGINT);
    const char *at = strstr(live.text, "until then ");
    CHECK(at && sscanf(at, "until then %d requests had ended, %d of them with an error; %d were",
                       &ended, &failed, &cut_off) == 3,
          "%s", live.text);
    CHECK(ended == 1 && failed == 0 && cut_off == 1, "%s", live.text);
    CHECK(strstr(live.text, "{\"load\":{\"requests\":1,\"failed\":0,"), "%s", live.text);
}

/* Ctrl-C at any moment of the last answer's end: the answer is whole, or cancelled, or the program
 * ends by the signal. It never finds an engine that is half closed. */
static void an_interrupt_may_come_last(struct check *check) {
    for (int i = 0; i < 120; i++) {
        struct live live = live_start(check, false, "model.bin --ids 1,5 -n 2 -t 0 --kv-host 8b");
        live_bytes(&live, 1);
        for (int signals = 0; signals < 1 + i % 3; signals++) {
            usleep((useconds_t)(i * 7));
            kill(live.pid, SIGINT);
        }
        int status = live_end(&live);
        CHECK(status == 0 || status == 128 + SIGINT, "run %d: %d", i, status);
    }
}

/* Whoever asks it to go ends it, answers or not. */
static void a_termination_ends_it(struct check *check) {
    static const int signals[] = {SIGTERM, SIGHUP};
    setenv("TERM", "xterm", 1);
    for (int i = 0; i < 2; i++) {
        struct live live = start_endless(check, ENDLESS "--ids 1,5,6", 100);
        kill(live.pid, signals[i]);
        ends_soon(check, &live, 128 + signals[i]);
        live = live_start(check, true, ENDLESS); /* its line editor has changed the modes */
        struct termios before, after;
        bool known = tcgetattr(live.input, &before) == 0;
        live_until(&live, "> ");
        CHECK(known && tcgetattr(live.input, &after) == 0 && !(after.c_lflag & ICANON),
              "the editor reads lines, not keys");
        kill(live.pid, signals[i]);
        int terminal = dup(live.input);
        ends_soon(check, &live, 128 + signals[i]);
        known = tcgetattr(terminal, &after) == 0;
        close(terminal);
        CHECK(known && after.c_lflag == before.c_lflag, "the terminal was left in another mode");
    }
    setenv("TERM", "dumb", 1);
}

/* While weights are loaded, nobody but the watcher of signals looks. */
static void a_termination_ends_the_loading(struct check *check) {
    setenv("TERM", "xterm", 1); /* a dumb one is shown no bar */
    const char *large = SANITIZED ? "random:tinyllama-1.1b:q8_0 --ids 1 -n 1 --devices cpu:1"
                                  : "random:llama-3.1-8b:q8_0 --ids 1 -n 1 --devices cpu:1";
    struct live live = live_start(check, true, large);
    setenv("TERM", "dumb", 1);
    live_until(&live, "loading [");
    kill(live.pid, SIGTERM);
    ends_soon(check, &live, 128 + SIGTERM);
    CHECK(!strstr(live.text, "\033[K\r\033[K"), "it went on: %s", live.text); /* the bar's end */
}

/* Where there is no answer to stop, Ctrl-C ends the program. */
static void an_interrupt_ends_other_work(struct check *check) {
    size_t length = 1 << 20;
    char *text = keep(length);
    memset(text, 'a', length);
    write_file(check, "text", text, length);
    struct live live = start_endless(check, "$T/endless --perplexity $T/text", 0);
    CHECK(live_works(&live, 0.3), "it ended before it was interrupted");
    kill(live.pid, SIGINT);
    ends_soon(check, &live, 128 + SIGINT);
}

/* A reader that has gone, as of `dynamo | head`: no need to write on. */
static void a_closed_pipe_ends_the_answer(struct check *check) {
    struct live live = start_endless(check, ENDLESS "--ids 1,5,6", 100);
    close(live.output);
    live.output = open("/dev/null", O_RDONLY);
    ends_soon(check, &live, 1);
    /* in virtual time as well: all of it would take an hour */
    shell(check,
          DYNAMO_PROGRAM " model.bin --sim cpu:2 --replay 10:10 --rate 20 --limit 9999999 --json "
                         "2> $T/words | head -n 1 > $T/first; test -s $T/first");
    shell(check, "grep -q 'stdout: Broken pipe' $T/words");
}

/* What ends a text is known without a tokenizer that can be opened, and without the key. */
static void ends_without_tokenizer(struct check *check) {
    static const char *const keys[] = {"tokenizer.ggml.model", "tokenizer.ggml.eos_token_id"};
    static const char *const files[] = {"refused.gguf", "no-eos.gguf"};
    shell(check, "printf 'Once upon a time' > $T/once && printf 1 > $T/ids && " DYNAMO_PROGRAM
                 " model.bin --tokenize $T/once | tr ' ' , >> $T/ids");
    for (int i = 0; i < 2; i++) {
        size_t size, length = strlen(keys[i]);
        char *model = read_file(check, "model.bin", &size);
        char *at = memmem(model, size, keys[i], length);
        CHECK(at != NULL, "no %s", keys[i]);
        if (i == 0)
            memcpy(at + length + 12, "other", 5); /* behind a type and a length; it was `llama` */
        else
            at[length - 1] = 'x'; /* another key; </s> is a control token still */
        write_file(check, files[i], model, size);
    }
    shell(check, "for m in model.bin $T/refused.gguf $T/no-eos.gguf; do " DYNAMO_PROGRAM
                 " $m --ids $(cat $T/ids) -n 400 -t 0 --json 2> /dev/null |"
                 " sed 's/.*\"ids\":\\(.*\\),\"seed.*/\\1/'; done > $T/ends");
    shell(check, "grep -c '\"finish_reason\":\"stop\"' $T/ends | grep -qx 3");
    shell(check, "test $(sort -u $T/ends | wc -l) = 1");
}

/* ---- at a terminal ---- */

/* $T/chat.gguf: model.bin with one key more, so that it has a chat template. The key takes a
 * multiple of the data's alignment, so nothing else moves. */
static void write_chat_model(struct check *check) {
    static const char name[] = "tokenizer.chat_template", jinja[] = "[INST] <<SYS>> {{ messages }}";
    enum { KEYS = 16, HEADER = 24, ADDED = 256, NAME = sizeof name - 1 };
    static const uint64_t name_length = NAME, length = ADDED - 8 - NAME - 4 - 8;
    static const uint32_t type = 8; /* a string */
    size_t size;
    char *model = read_file(check, "model.bin", &size), *chat = keep(size + ADDED);
    if (size > HEADER) {
        char *key = chat + HEADER;
        memcpy(chat, model, HEADER);
        chat[KEYS]++;
        memset(key, ' ', ADDED);
        memcpy(key, &name_length, 8);
        memcpy(key + 8, name, NAME);
        memcpy(key + 8 + NAME, &type, 4);
        memcpy(key + 8 + NAME + 4, &length, 8);
        memcpy(key + 8 + NAME + 4 + 8, jinja, sizeof jinja - 1);
        memcpy(key + ADDED, model + HEADER, size - HEADER);
    }
    write_file(check, "chat.gguf", chat, size + ADDED);
}

#define CHAT "$T/chat.gguf -p 'Once upon a time' -t 0 -n 20 "

static void chat_models_answer(struct check *check) {
    write_chat_model(check);
    struct outcome plain = run(check, "model.bin -p '[INST] Once upon a time [/INST]' -t 0 -n 20");
    struct outcome chat = run(check, CHAT);
    CHECK(chat.status == 0 && !strstr(chat.out, "Once upon a time"), "not echoed: %s", chat.out);
    CHECK(chat.out_length > 10 && strstr(plain.out, chat.out), "`%s` is not the end of `%s`",
          chat.out, plain.out);
    expect_same(check, true, CHAT "--template none", ONCE "-t 0 -n 20");
    expect(check, "$T/chat.gguf -p Once --template chatml", 2, NULL, "*<|im_start|>*");
}

static void chats_at_a_terminal(struct check *check) {
    static const struct turn turns[] = {
        {NULL, "> "},
        {"Tell me about the old fox and the long way home\n", "\n> "},
        {"And then?\n", "\n> "},
        {"/stats\n", "prompt tokens found cached"},
        {NULL, "\n"},
        {NULL, "\n> "},
        {"/clear\n", "A new conversation begins"},
        {"/system Be a pirate.\n", "A new conversation begins with it"},
        {"/hlep\n", "/hlep: unknown command; /help lists all"},
        {"/help\n", "/exit"},
    };
    write_chat_model(check);
    struct live live = live_start(check, true, "$T/chat.gguf -n 30 -t 0");
    talk(&live, turns, COUNT(turns));
    int cached = 0;
    const char *line = strstr(live.text, "prompt tokens found cached");
    CHECK(line && sscanf(line, "prompt tokens found cached %d", &cached) == 1 && cached >= 32,
          "%d tokens cached: %s", cached, live.text);
    leave(&live, "/exit\n");
}

/* Keys as a terminal sends them: the line that is entered is seen in the echo of the prompt. */
static void edits_a_line(struct check *check) {
    static const struct turn lines[] = {
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
    for (size_t i = 0; i < COUNT(lines); i++) {
        live_until(&live, "> ");
        talk(&live, lines + i, 1);
        live_until(&live, "\n");
    }
    live_until(&live, "> ");
    leave(&live, "\004");
    setenv("TERM", "dumb", 1);
}

static void talks_at_a_terminal(struct check *check) {
    static const struct turn turns[] = {
        {NULL, "> "},
        {"Once upon a time\n", "time\r\nOnce upon a time"},
        {NULL, "\n> "},
        {"\n", "> "}, /* nothing to answer */
        {"The cat\n", "cat\r\nThe cat"},
        {NULL, "\n> "},
    };
    struct live live = live_start(check, true, "model.bin -n 30");
    talk(&live, turns, 2);
    size_t start = live.seen;
    talk(&live, turns + 2, 1);
    CHECK(live.seen - start > 40, "too short: %s", live.text);
    talk(&live, turns + 3, 3);
    leave(&live, "\004"); /* Ctrl-D */
}

/* While it waits for a line, its threads sleep: workers, helpers, the copier. When they come to
 * that depends on the machine; but then there is a second without work. */
static void waiting_costs_nothing(struct check *check) {
    static const struct turn turns[] = {{NULL, "> "}, {"Once upon a time\n", "\n> "}};
    struct live live = live_start(check, true, "model.bin -n 5 --devices cpu:4 --threads 4");
    talk(&live, turns, 2);
    double used = 1;
    for (int tries = 0; tries < 5 && used > 0.02; tries++) {
        double before = live_used(&live);
        sleep(1);
        used = live_used(&live) - before;
    }
    CHECK(used <= 0.02, "%.3f s of processor time in a second", used);
    leave(&live, "\004");
}

static void ctrl_c_at_a_terminal(struct check *check) {
    write_endless_model(check, 1);
    struct live live = live_start(check, true, ENDLESS);
    live_until(&live, "> ");
    for (int i = 0; i < 2; i++) { /* it must not strike the answer after it as well */
        talk(&live, &(struct turn){"I see\n", "see\r\nI see"}, 1);
        live_bytes(&live, 200);
        double before = live_used(&live);
        hurry(&live);
        talk(&live, &(struct turn){"\003", "\r\n> "}, 1); /* Ctrl-C */
        double used = live_used(&live) - before;
        CHECK(soon(used, 1), "answer %d goes on for %.1f s", i, used);
    }
    talk(&live, &(struct turn){"\003", "Ctrl-D leaves"}, 1); /* there is no answer to stop */
    leave(&live, "\004");
}

/* Stopped in the midst of an answer, the terminal shows what is typed; not when it goes on. */
static void a_stopped_answer_goes_on_unseen(struct check *check) {
    struct termios mode = {.c_lflag = ECHO};
    write_endless_model(check, 1);
    setenv("TERM", "xterm", 1);
    struct live live =
        live_shell(check, true, "set -m; " DYNAMO_PROGRAM " " ENDLESS "; stty -a; fg");
    setenv("TERM", "dumb", 1);
    talk(&live, (struct turn[]){{NULL, "> "}, {"I see\r", "\033[?2004l\r\nI see"}}, 2);
    talk(&live, (struct turn[]){{"\032", " icanon"}, {NULL, " echo "}}, 2);
    for (int i = 0; i < 50 && mode.c_lflag & ECHO; i++) {
        live.seen = live.length;
        live_bytes(&live, 1000);
        CHECK(tcgetattr(live.input, &mode) == 0, "no terminal");
    }
    CHECK(mode.c_lflag & ICANON && !(mode.c_lflag & ECHO), "what is typed is shown");
    talk(&live, &(struct turn){"\003", "> "}, 1);
    leave(&live, "\004");
}

/* It is what was said so far, as any other, and nothing is said of a conversation too long. */
static void an_interrupted_answer_is_no_failure(struct check *check) {
    write_endless_model(check, 1);
    struct live live = live_start(check, true, ENDLESS "--template llama2");
    live_until(&live, "> ");
    for (int i = 0; i < 2; i++) {
        talk(&live, &(struct turn){"I see\n", "see\r\n"}, 1);
        live_bytes(&live, 100);
        talk(&live, &(struct turn){"\003", "\r\n> "}, 1);
    }
    CHECK(strstr(live.text, "a chat model") && !strstr(live.text, "too long"), "%s", live.text);
    leave(&live, "\004");
}

int main(int argc, char **argv) {
    static const struct test tests[] = {TEST(tokenizes_as_published),
                                        TEST(writes_as_published),
                                        TEST(writes_as_llama_cpp),
                                        TEST(writes_stories),
                                        TEST(a_seed_is_a_text),
                                        TEST(options_are_obeyed),
                                        TEST(stop_texts_cut),
                                        TEST(ids_are_prompts),
                                        TEST(perplexity_is_that_of_the_logits),
                                        TEST(requests_finish_together),
                                        TEST(bad_requests_refuse_only_themselves),
                                        TEST(each_request_has_its_noise),
                                        TEST(turns_follow_answers),
                                        TEST(nothing_cached_is_lost),
                                        TEST(messages_are_turns),
                                        TEST(requests_come_at_their_time),
                                        TEST(a_turn_follows_what_was_said),
                                        TEST(a_turn_shows_its_own_part),
                                        TEST(a_context_of_one_token_predicts_none),
                                        TEST(lines_are_taken_as_they_come),
                                        TEST(loads_have_bounds),
                                        TEST(times_are_of_what_came),
                                        TEST(every_block_is_accounted_for),
                                        TEST(statistics_add_up),
                                        TEST(a_trace_tells_what_happened),
                                        TEST(a_trace_that_cannot_be_written),
                                        TEST(a_trace_takes_no_file_that_is_read),
                                        TEST(an_old_trace_stays_where_nothing_runs),
                                        TEST(piped_stdin_is_one_prompt),
                                        TEST(tells_about_itself),
                                        TEST(the_first_token_comes_soon),
                                        TEST(schedules_change_no_text),
                                        TEST(each_device_has_one_use),
                                        TEST(random_weights_run),
                                        TEST(absurd_weights_are_survived),
                                        TEST(an_interrupt_stops_the_answer),
                                        TEST(an_interrupt_ends_other_work),
                                        TEST(an_interrupt_stops_a_load),
                                        TEST(an_interrupt_may_come_last),
                                        TEST(a_termination_ends_it),
                                        TEST(a_termination_ends_the_loading),
                                        TEST(a_closed_pipe_ends_the_answer),
                                        TEST(talks_at_a_terminal),
                                        TEST(waiting_costs_nothing),
                                        TEST(ctrl_c_at_a_terminal),
                                        TEST(a_stopped_answer_goes_on_unseen),
                                        TEST(an_interrupted_answer_is_no_failure),
                                        TEST(ends_without_tokenizer),
                                        TEST(chat_models_answer),
                                        TEST(chats_at_a_terminal),
                                        TEST(edits_a_line),
                                        TEST(a_model_larger_than_memory)};
    /* (a sanitizer takes terabytes of addresses: not the last) */
    return run_tests(tests, COUNT(tests) - SANITIZED, argc, argv);
}
