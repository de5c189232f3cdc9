/* test_requests.c: requests in files and pipes, from outside: what stands before an object, what is
 * malformed, whose an error is, how many there may be; cancellation by id; weights that make no
 * numbers. The program is a child process. Run from the repository's root. */
#define _GNU_SOURCE
#define JSON_IMPLEMENTATION
#include "files.h"

#include <math.h>
#include <sys/stat.h>

enum { MOST = 65536 }; /* requests of a file */

/* ---- lines ---- */

static void marks_are_no_prompts(struct check *check) {
    write_requests(check, "\xEF\xBB\xBF{'id':'a','prompt':'The cat','n':3}\n"
                          " \t{'id':'b','prompt':'The cat','n':3}\n"
                          "\xEF\xBB\xBF  {'id':'c','prompt':'The cat','n':3}\r\n"
                          "\xEF\xBB\xBF\n"
                          "\xEF\xBB\xBFThe cat\n");
    struct outcome o = run(check, "model.bin -f $T/requests -n 3 -t 0 --json");
    CHECK(o.status == 0 && count_lines(o.out) == 4, "status %d: %s%s", o.status, o.out, o.err);
    for (const char *id = "abc"; *id; id++)
        CHECK(!strcmp(answer(&o, (char[]){*id, 0}, "ids"), answer(&o, "3", "ids")), "%s", o.out);
    CHECK(number(&o, "3", "prompt_tokens") == number(&o, "a", "prompt_tokens"), "%s", o.out);
    static const struct {
        const char *bytes;
        size_t length;
    } wide[] = {{"\xFF\xFE{\0\"\0i\0", 8}, {"\xFE\xFF\0{\0\"", 6}, {"{\0\"\0i\0d\0\n\0", 10},
                {"\0{\0\"\0\n", 6},        {" \0{\0}\0", 6},       {"\xFF\xFE", 2}};
    for (size_t i = 0; i < COUNT(wide); i++) {
        write_file(check, "requests", wide[i].bytes, wide[i].length);
        expect(check, "model.bin -f $T/requests", 1, "",
               "*requests: got UTF-16, expected UTF-8\n*");
    }
}

/* Of each, in JSON and as text: the id that the line gives, if it does so before the fault or in
 * spite of it, then file, line and why. */
static void errors_belong_to_their_id(struct check *check) {
    static const struct {
        const char *line, *id, *words;
    } rows[] = {
        {"{'id':'cut','prompt':'a", "cut", "byte 23: expected"},
        {"{'prompt':'a','n':5,'id':'late'", "late", "expected ',' or '}'"},
        {"{'prompt':['a','id':'in'],'id':'out'}", NULL, "expected ',' or ']'"},
        {"{'id':'half", NULL, "expected"},
        {"{'id':", NULL, "expected a value"},
        {"{'id':7,'prompt':'a'}", NULL, "id: got 7, expected a text"},
        {"{'n':0,'prompt':'a','id':'behind'}", "behind", "n: got 0"},
        {"  {'id':'spaced','promt':'a'}", "spaced", "did you mean prompt"},
        {"{'id':'two','prompt':'a'}{'id':'x'}", "two", "expected the end"},
        {"{'id':'empty','ids':[]}", "empty", "ids: got []"},
        {"{'id':'big','ids':[99999]}", "big", "99999 is no token"},
        {"{'id':'who','prompt':'a','after':'no'}", "who", "after: got \"no\""},
        {"{'id':'none'}", "none", "expected one of prompt"},
        {"{'id':'\\u001b[31m','n':0}", "\x1b[31m", "n: got 0"},
        {"{'cancel':'nobody'}", "nobody", "cancel: got \"nobody\", expected the id"},
        {"{'cancel':'big','n':3}", NULL, "cancel: expected no other key"},
        {"{'cancel':7}", NULL, "cancel: got 7, expected a text"},
    };
    char text[4096] = "";
    for (size_t i = 0; i < COUNT(rows); i++)
        (void)snprintf(text + strlen(text), sizeof text - strlen(text), "%s\n\n", rows[i].line);
    write_requests(check, text);
    struct outcome json = run(check, "model.bin -f $T/requests --json");
    struct outcome shown = run(check, "model.bin -f $T/requests");
    CHECK(json.status == 3 && shown.status == 3 && !*shown.out, "%d, %d: %s", json.status,
          shown.status, shown.out);
    char *rest = shown.err, id[16], begin[64], line_number[16];
    int place = 0;
    for (size_t i = 0; i < COUNT(rows); i++) {
        (void)snprintf(id, sizeof id, "%d", place);
        place += strcmp(rows[i].words, rows[14].words) != 0; /* what cancels is no request */
        const char *own = rows[i].id ? rows[i].id : id, *line = strsep(&rest, "\n");
        const char *error = answer(&json, own, "error");
        (void)snprintf(line_number, sizeof line_number, "requests:%d: ", 2 * (int)i + 1);
        CHECK(strstr(error, rows[i].words) && strstr(error, line_number), "%s: %s", rows[i].line,
              error);
        (void)snprintf(begin, sizeof begin, "dynamo: request %s: ", *own == 27 ? "?[31m" : own);
        CHECK(line && !strncmp(line, begin, strlen(begin)) && !strcmp(line + strlen(begin), error),
              "%s: %s", rows[i].line, line);
    }
}

/* count_of, of megabytes: a sanitizer measures a text whenever it is looked through. */
static int count_in(const struct outcome *o, const char *words) {
    const char *at = o->out, *end = at + o->out_length;
    int n = 0;
    for (; (at = memmem(at, (size_t)(end - at), words, strlen(words))); at++)
        n++;
    return n;
}

/* Every eighth one runs; a line more is refused, before any runs. */
static void as_many_as_may_be(struct check *check) {
    char *text = keep(24 * (MOST + 2)), *end = text;
    for (int i = 0; i < MOST; i++)
        end += i % 8 || SANITIZED ? sprintf(end, "{\n")
                                  : sprintf(end, "\n{\"ids\":[%d],\"n\":1}\n", 3 + i % 500);
    write_file(check, "requests", text, (size_t)(end - text));
    struct outcome o = run(check, "model.bin -f $T/requests -t 0 --json");
    int n = count_in(&o, "\"finish_reason\":\"length\"") + count_in(&o, "\"stop\"");
    CHECK(o.status == 3 && count_lines(o.out) == MOST && n == (SANITIZED ? 0 : MOST / 8),
          "status %d, %d lines, %d answered", o.status, count_lines(o.out), n);
    CHECK(count_in(&o, ": byte 1: expected") == MOST - n, "others have errors");
    end += sprintf(end, "\n{");
    write_file(check, "requests", text, (size_t)(end - text));
    expect(check, "model.bin -f $T/requests", 1, "", "*requests: got more than 65536 requests*");
}

/* Of a pipe there is no end to them, and no memory stays but of those that were last. */
static void a_pipe_has_no_end(struct check *check) {
    /* when FAR is read, all but MOST of the lines before it have been answered */
    enum { NEAR = 4000, FAR = MOST + 30000, LINES = SANITIZED ? FAR + 1 : 3 * MOST };
    char path[256];
    snprintf(path, sizeof path, "%s", scratch("pipe"));
    CHECK(mkfifo(path, 0600) == 0, "%s: no pipe", path);
    fflush(stdout);
    pid_t writer = fork();
    if (writer == 0) {
        FILE *pipe = fopen(path, "w");
        for (int i = 0; i < LINES; i++)
            fprintf(pipe, i == 0 ? "{\"id\":\"first\",\"ids\":[1,5],\"n\":3}\n"
                          : i == NEAR
                              ? "{\"id\":\"near\",\"after\":\"first\",\"ids\":[9],\"n\":1}\n"
                          : i == FAR ? "{\"id\":\"far\",\"after\":\"first\",\"ids\":[9],\"n\":1}\n"
                                     : "{\n");
        fclose(pipe);
        _exit(0);
    }
    struct outcome o = run(check, "model.bin -f $T/pipe -t 0 --json");
    waitpid(writer, NULL, 0);
    CHECK(o.status == 3 && count_lines(o.out) == LINES, "status %d, %d lines: %s", o.status,
          count_lines(o.out), o.err);
    CHECK(number(&o, "near", "prompt_tokens") == 6, "%g", number(&o, "near", "prompt_tokens"));
    CHECK(strstr(answer(&o, "far", "error"), "after: got \"first\", expected"), "it was followed");
    CHECK(small(&o, 300), "%ld KiB", o.kibibytes);
}

/* A megabyte, no newline at the end, zero bytes. */
static void lines_of_any_bytes(struct check *check) {
    enum { LONG = 1 << 20 };
    static const char end[] =
        "\",\"id\":\"long\"}\nThe\0cat\n{\"id\":\"zero\",\"prompt\":\"a\0\"}\n"
        "{\"id\":\"last\",\"prompt\":\"The cat\",\"n\":3}";
    char *text = keep(LONG + sizeof end);
    (void)memset(text, 'x', LONG);
    (void)memcpy(text, "{\"prompt\":\"", 11);
    (void)memcpy(text + LONG, end, sizeof end);
    write_file(check, "requests", text, LONG + sizeof end - 1);
    struct outcome o = run(check, "model.bin -f $T/requests -n 3 --json");
    CHECK(o.status == 3 && count_lines(o.out) == 4, "status %d: %s", o.status, o.err);
    CHECK(strstr(answer(&o, "long", "error"), ":1: the prompt has 1048567 tokens"), "%s",
          answer(&o, "long", "error"));
    CHECK(number(&o, "1", "completion_tokens") == 3, "%s", answer(&o, "1", "error"));
    CHECK(strstr(answer(&o, "zero", "error"), ":3: byte 24: expected"), "%s", o.out);
    CHECK(number(&o, "last", "completion_tokens") == 3, "%s", answer(&o, "last", "error"));
}

/* ---- models of random weights ---- */

enum { DIM = 64, HIDDEN = 128, LAYERS = 2, HEADS = 2, VOCAB = 512, LENGTH = 16384, SICK = 7 };

/* A llama2.c checkpoint that ends no text; the embedding of the token `sick` is `value`, and so is
 * the weight at `bad` of the last layer's, if they are not negative. */
static void write_model(struct check *check, int sick, int bad, float value) {
    static const int32_t header[] = {DIM, HIDDEN, LAYERS, HEADS, HEADS, -VOCAB, LENGTH};
    size_t layer = 2 * DIM + 4 * DIM * DIM + 3 * DIM * HIDDEN, table = VOCAB * DIM;
    size_t n = table + LAYERS * layer + DIM + (size_t)LENGTH * (DIM / HEADS) + table;
    float *weights = keep(sizeof header + n * sizeof *weights);
    char *bytes = (char *)weights;
    uint32_t random = 1;
    for (size_t i = 0; i < n; i++) {
        random = random * 1664525 + 1013904223;
        float weight = (float)(random >> 8) / (1 << 24) - 0.5f;
        size_t row = i / DIM;
        weight = i >= n - table && row >= (n - table) / DIM && i < n - table + 3 * DIM ? 0 : weight;
        weight = (sick >= 0 && row == (size_t)sick) ||
                         (bad >= 0 && i == table + LAYERS * layer - 1 - (size_t)bad)
                     ? value
                     : weight;
        memcpy(bytes + sizeof header + i * sizeof weight, &weight, sizeof weight);
    }
    memcpy(bytes, header, sizeof header);
    write_file(check, "model", bytes, sizeof header + n * sizeof(float));
    shell(check, "cp " AIDREAMS_TOKENIZER " $T/tokenizer.bin");
}

static void tiny_temperatures_are_greedy(struct check *check) {
    static const char *const temperatures[] = {"1e-37", "1e-38", "1.1e-38", "3e-39", "1e-42",
                                               "1e-44", "1e-45", "1e-46",   "1e-400"};
    write_model(check, -1, -1, NAN);
    for (size_t i = 0; i < COUNT(temperatures); i += SANITIZED ? 4 : 1) {
        char one[128], other[128];
        for (int model = 0; model < 2; model++) {
            const char *what = model ? "$T/model --ids 1,5 -n 40" : "model.bin -p 'The cat' -n 60";
            (void)snprintf(one, sizeof one, "%s -t 0", what);
            (void)snprintf(other, sizeof other, "%s --top-p %g -t %s", what, i % 2 ? 0.95 : 1.0,
                           temperatures[i]);
            expect_same(check, true, one, other);
        }
    }
    static const char *const refused[] = {"-1e-45", "nan", "inf", "-inf", "NaN", "-1"};
    for (size_t i = 0; i < COUNT(refused); i++) {
        char line[128];
        (void)snprintf(line, sizeof line, "model.bin -p a -t=%s", refused[i]);
        expect(check, line, 2, "", "dynamo: -t: got *expected a number from 0 to 100\n");
        (void)snprintf(line, sizeof line, "{'id':'x','prompt':'a','temperature':%s}\n", refused[i]);
        write_requests(check, line);
        struct outcome o = run(check, "model.bin -f $T/requests --json");
        CHECK(o.status == 3 && strstr(answer(&o, "x", "error"), ":1: "), "%s%s", o.out, o.err);
    }
}

#define NONE "the model gave a number that is none at token "

/* A request ends with an error, and no text of that token; what runs beside it writes what it
 * writes alone. */
static void end_one_request(struct check *check, float value) {
    static const char *const options[] = {"-t 0", "-t 0.8 --seed 3", "-t 1 --top-k 5 --top-p 1",
                                          "-t 0 --chunk 4", "-t 0 --devices cpu:2 --tp 2"};
    static const char good[] = "{'id':'good','ids':[1,5,6],'n':40,'seed':9}\n";
    char lines[1024];
    write_model(check, SICK, -1, value);
    (void)snprintf(
        lines, sizeof lines,
        "{'id':'ends','ids':[3,4,7]}\n%s"
        "{'id':'begins','ids':[7,3,4,5,6]}\n"
        "{'id':'long','ids':[3,4,5,6,8,9,10,11,12,13,14,15,16,17,18,7,20,21]}\n"
        "{'id':'again','ids':[3,4,5,6,8,9,10,11,12,13,14,15,16,17,18,7,20,21],'at':0.1}\n"
        "{'id':'follows','after':'ends','ids':[3]}\n",
        good);
    for (size_t i = 0; i < COUNT(options); i += SANITIZED ? 2 : 1) {
        write_requests(check, good);
        struct outcome alone = run(check, "$T/model -f $T/requests --json %s", options[i]);
        write_requests(check, lines);
        struct outcome o = run(check, "$T/model -f $T/requests --json %s", options[i]);
        const char *ids = answer(&o, "good", "ids");
        CHECK(o.status == 3 && strlen(ids) > 50 && !strcmp(ids, answer(&alone, "good", "ids")),
              "%s: status %d: %s%s, alone %s", options[i], o.status, o.out, o.err, alone.out);
        CHECK(strstr(answer(&o, "ends", "error"), ":1: " NONE "3"), "%s", o.out);
        CHECK(strstr(answer(&o, "begins", "error"), ":3: " NONE "5"), "%s", o.out);
        CHECK(strstr(answer(&o, "long", "error"), NONE "18"), "%s", o.out);
        CHECK(strstr(answer(&o, "again", "error"), NONE "18"), "%s", o.out);
        CHECK(strstr(answer(&o, "follows", "error"), "ended without an answer"), "%s", o.out);
        CHECK(count_of(o.out, "\"ids\":[]") == 5 && count_of(o.out, "\"text\":\"\"") == 5, "%s",
              o.out);
        if (!strstr(options[i], "chunk"))
            CHECK(number(&o, "again", "cached_tokens") == 0, "a block without numbers: %s", o.out);
    }
}

static void no_number_ends_one_request(struct check *check) {
    end_one_request(check, NAN);
    end_one_request(check, 1e20f); /* which has no square */
}

/* Wherever a weight is none: nothing makes a number of it. */
static void no_weight_is_passed_over(struct check *check) {
    static const int bad[] = {0, DIM * HIDDEN - 1, 2 * DIM * HIDDEN, 3 * DIM * HIDDEN - 1};
    for (size_t i = 0; i < COUNT(bad); i++) {
        write_model(check, -1, bad[i], NAN);
        expect(check, "$T/model --ids 1,5,6 -n 9", 3, NULL, "*" NONE "3\n*");
        expect(check, "$T/model --ids 1,5,6 -n 9 -t 0 --json", 3, "*\"error\":\"" NONE "3\"*",
               NULL);
    }
}

static void evaluations_tell_where(struct check *check) {
    write_model(check, SICK, -1, NAN);
    expect(check, "$T/model --ids 1,5,6,7,8 --logits $T/logits", 1, "",
           "dynamo: --logits: " NONE "4\n");
    expect(check, "$T/model --ids 1,5,6,7,8 --logits $T/logits --chunk 2", 1, "",
           "dynamo: --logits: " NONE "4\n");
    expect(check, "$T/model --ids 1,5,6,8 --logits $T/logits", 0, "", "");
    shell(check, "printf 'Once upon a time' > $T/story");
    struct outcome o = run(check, "$T/model --tokenize $T/story --tokenizer $T/tokenizer.bin");
    int n = 0, at = 0, token = 0;
    for (const char *ids = o.out; at < 4 && sscanf(ids, " %d%n", &token, &n) == 1; at++)
        ids += n;
    write_model(check, token, -1, NAN); /* the fourth, and one that begins the text before it */
    char words[128];
    (void)snprintf(words, sizeof words, "dynamo: */story: " NONE "%d\n", at + 1);
    CHECK(at == 4, "%s", o.out);
    expect(check, "$T/model --perplexity $T/story", 1, "", words);
    expect(check, "$T/model --perplexity $T/story --chunk 2", 1, "", words);
    write_model(check, -1, -1, NAN);
    expect(check, "$T/model --perplexity $T/story", 0, "tokens*", "");
}

/* ---- cancellation ---- */

static void say(struct check *check, int pipe, const char *line) {
    char text[256];
    int length = put_json(text, line);
    CHECK(write(pipe, text, (size_t)length) == length, "the pipe is closed");
}

/* The one that runs leaves no room for the next. */
static void requests_are_cancelled_by_id(struct check *check) {
    write_model(check, -1, -1, NAN);
    CHECK(mkfifo(scratch("lines"), 0600) == 0, "no pipe");
    int pipe = open(scratch("lines"), O_RDWR | O_CLOEXEC);
    struct live live = live_start(check, false,
                                  "$T/model -f - -t 0 --json --devices cpu:1 --kv-device 600b "
                                  "--kv-host 0 < $T/lines");
    say(check, pipe, "{'id':'runs','ids':[1,5]}\n{'id':'next','after':'runs','ids':[3]}\n");
    say(check, pipe, "{'id':'later','ids':[3],'at':100000}\n");
    say(check, pipe, "{'id':'then','after':'later','ids':[3]}\n{'id':'last','after':'then',");
    say(check, pipe, "'ids':[3]}\n{'id':'short','ids':[4],'n':1}\n");
    live_until(&live, "\"id\":\"short\"");
    say(check, pipe, "{'id':'waits','ids':[1,6]}\n{'cancel':'waits'}\n");
    live_until(&live, "\"id\":\"waits\",\"text\":\"");
    live_until(&live, "\"finish_reason\":\"cancelled\"");
    say(check, pipe, "{'cancel':'nobody'}\n");
    live_until(&live, "\"id\":\"nobody\"");
    live_until(&live, "stdin:9: cancel: got \\\"nobody\\\", expected the id of a request");
    say(check, pipe, "{'cancel':'then'}\n");
    live_until(&live, "\"id\":\"then\"");
    live_until(&live, "\"finish_reason\":\"cancelled\"");
    live_until(&live, "stdin:5: after: \\\"then\\\" was cancelled");
    say(check, pipe, "{'cancel':'later'}\n");
    live_until(&live, "\"id\":\"later\"");
    live_until(&live, "\"finish_reason\":\"cancelled\"");
    say(check, pipe, " {'cancel':'runs'}\n");
    live_until(&live, "\"id\":\"runs\"");
    live_until(&live, "\"finish_reason\":\"cancelled\"");
    live_until(&live, "stdin:2: after: \\\"runs\\\" was cancelled");
    say(check, pipe, "{'cancel':'runs'}\n{'cancel':'short'}\n{'id':'end','ids':[9],'n':3}");
    close(pipe); /* what has ended is let be */
    live_until(&live, "\"id\":\"end\"");
    live_until(&live, "\"completion_tokens\":3");
    CHECK(live_end(&live) == 3, "%s", live.text);
    CHECK(count_lines(live.text) == 9, "an object each: %s", live.text);
}

/* ---- memory ---- */

/* Before anything is read, weights and both tiers together. */
static void what_does_not_fit_is_refused(struct check *check) {
    static const struct {
        const char *arguments, *words;
    } rows[] = {
        {"model.bin -p a --kv-host 900G",
         "KV blocks of 966.4 GB do not fit the *; lower --kv-host"},
        {"model.bin -p a --kv-device 450G",
         "KV blocks of 966.4 GB do not fit the *; lower --kv-device"},
        {"model.bin -p a --kv-device 450G --devices cpu:1", "KV blocks of 483.2 GB do not fit"},
        {"random:llama-3.1-405b:q8_0 --ids 1", "weights of 43*.* GB do not fit the *"},
        {"random:llama-3.1-405b:q8_0 --ids 1 --kv-host 1G",
         "weights of 43*.* GB and KV blocks of 1.1 GB do not fit the *"},
    };
    for (size_t i = 0; i < COUNT(rows); i++) {
        char words[128];
        (void)snprintf(words, sizeof words, "dynamo: *%s*", rows[i].words);
        expect(check, rows[i].arguments, 1, "", words);
    }
    if (SANITIZED)
        return; /* it takes terabytes of addresses */
    shell(check, "ulimit -v 900000; " DYNAMO_PROGRAM " model.bin --ids 1 -n 1 --kv-host 500M "
                 "--kv-device 250M 2> $T/words > $T/out; test $? = 1");
    shell(check,
          "grep -q 'weights of 0.0 GB and KV blocks of 1.0 GB do not fit the 0.' $T/words || "
          "! cat $T/words");
    shell(check, "ulimit -v 900000; " DYNAMO_PROGRAM " model.bin --ids 1 -n 1 > $T/out 2>&1");
    for (int threads = 1; threads <= 16; threads *= 2) { /* as many as there are processors */
        char command[256];
        (void)snprintf(command, sizeof command,
                       "for most in 280000 300000 350000 400000 500000 600000; do (ulimit -v "
                       "$most; " DYNAMO_PROGRAM
                       " model.bin -p Once -n 3 --threads %d > $T/out 2> $T/words) || "
                       "{ echo $most; cat $T/words; exit 1; }; done",
                       threads);
        shell(check, command);
    }
}

int main(int argc, char **argv) {
    static const struct test tests[] = {
        TEST(marks_are_no_prompts),        TEST(errors_belong_to_their_id),
        TEST(as_many_as_may_be),           TEST(a_pipe_has_no_end),
        TEST(lines_of_any_bytes),          TEST(tiny_temperatures_are_greedy),
        TEST(no_number_ends_one_request),  TEST(no_weight_is_passed_over),
        TEST(evaluations_tell_where),      TEST(requests_are_cancelled_by_id),
        TEST(what_does_not_fit_is_refused)};
    return run_tests(tests, COUNT(tests), argc, argv);
}
