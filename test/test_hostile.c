/* test_hostile.c: what the program must bear: wrong options, broken and huge files, prompts that
 * look like commands, closed streams, a full disk.
 *
 * It may refuse by one line and the right exit status; a crash, a hang, a sanitizer's report and
 * memory that grows with the file are failures. Model files are broken at random and field by
 * field: tiny.h tells where each number of a model stands. Nothing here looks inside; test_gguf.c
 * does.
 *
 * Run from the repository's root. -DDYNAMO_PROGRAM='"path"' tests another binary. */
#define _GNU_SOURCE
#define JSON_IMPLEMENTATION
#include "files.h"
#include "tiny.h"

/* ---- options and streams ---- */

static void bad_values_are_refused(struct check *check) {
    static const char values[] =
        "-n 0|-n -5|-n 1.5|-n 99999999999|-t -1|-t nan|-t inf|--top-p 1.1|--min-p x|"
        "--top-k -1|--seed -1|--tp 3|--devices cpu:0|--devices cpu:1025|"
        "--devices cpu:99999999999|--devices 0-99999999|--devices 3-1|--kv-device 0|"
        "--kv-device 8x|--kv-type f8|--kv-policy lru|--max-batch 0|--chunk 0|--threads 0|"
        "--seed 99999999999999999999";
    char *items[64], arguments[PATH_LENGTH], words[PATH_LENGTH];
    int n = split(values, "|", items, 64);
    for (int i = 0; i < n; i++) {
        snprintf(arguments, sizeof arguments, "model.bin -p a %s", items[i]);
        char *value = strchr(items[i], ' ');
        snprintf(words, sizeof words, "%.*s: got%s", (int)(value - items[i]), items[i], value);
        refuse(check, arguments, 2, words, 3);
    }
}

/* 16 tokens fill a block, and then there is no room for an answer's second token. */
#define SIXTEEN "1,300,301,302,303,304,305,306,307,308,309,310,311,312,313,314"

static void bad_commands_are_refused(struct check *check) {
    static const struct {
        int status;
        const char *words, *commands;
    } rows[] = {
        {2, "no model given", ""},
        {2, "other.bin: unexpected", "model.bin other.bin -p a"},
        {2, "--zap: unknown option", "model.bin -p a --zap"},
        {2, "did you mean --stats", "model.bin -p a --stat"},
        {2, "-p: given twice", "model.bin -p a -p b"},
        {2, "-n: missing value", "model.bin -p a -n"},
        {2, "--stop", "model.bin -p a --stop ''"},
        {2, "--json: got 1, expected no value", "model.bin -p a --json=1"},
        {2, "-p and -f exclude each other", "model.bin -p a -f b"},
        {2, "exclude each other",
         "model.bin -p a --ids 1|model.bin -p a --colocate --prefill 0 --decode 1"},
        {2, "--ids: got 1,,2", "model.bin --ids 1,,2"},
        {2, "--ids", "model.bin --ids ''"},
        {2, "--logits: needs -p or --ids", "model.bin --logits x"},
        {2, "--tp", "model.bin -p a --tp 2 --devices cpu:3"},
        {1, "a worker of 8 devices: got 4 attention heads, expected a multiple of 8",
         "model.bin -p a --tp 8|model.bin -p a --tp-decode 8"},
        {2, "more than 128", "model.bin -p a --devices cpu:300"},
        {2, "5 devices make no whole workers of 4 that prefill and of 2 that decode",
         "model.bin -p a --devices cpu:5 --tp-prefill 4 --tp-decode 2"},
        {2, "this build has no CUDA backend", "model.bin -p a --devices 0"},
        {2, "--decode: got device 4, expected 0 to 1", "model.bin -p a --prefill 0 --decode 4"},
        {2, "--prefill: needs --decode", "model.bin -p a --prefill 0"},
        {2, "--decode: got device 2", "model.bin -p a --devices cpu:2 --prefill 0 --decode 2"},
        {2, "in use already", "model.bin -p a --devices cpu:2 --prefill 0 --decode 0"},
        {2, "--kv-device: got 16 bytes, expected at least 98304, a block; 16b is 16 blocks",
         "model.bin -p a --kv-device 16"},
        {2, "--kv-host: got 16 bytes, expected at least 98304, a block; 16b is 16 blocks",
         "model.bin -p a --kv-host 16"},
        {1, "lower --kv-device", "model.bin -p a --kv-device 900000G"},
        {1, "lower --kv-host", "model.bin -p a --kv-host 900000G"},
        {2, "a: unexpected; the model is -p", "-- -p a"},
        {2, "-: unknown option", "model.bin -"},
        {1, "No such file", "'' -p a"},
        {1, "/dev/zero: is not a regular file",
         "/dev/zero -p a|" AIDREAMS " -p a --tokenizer /dev/zero"},
        {1, "/dev/stdin: is not a regular file", "/dev/stdin -p a < /dev/zero"},
        {1, "/dev/zero: got more than", "model.bin -f /dev/zero"},
        {1, "stdin: got more than", "model.bin -n 3 < /dev/zero"},
        {2, "--ids: got 1,2147483647", "model.bin --ids 1,2147483647"},
        {1, "/nowhere/model: No such file", "/nowhere/model -p a"},
        {1, "test: is a folder", "test -p a"},
        {1, "/dev/null: is not a regular file", "/dev/null -p a"},
        {1, "Makefile: ", "Makefile -p a|" AIDREAMS " -p a --tokenizer Makefile"},
        {1, "aidreams_tokenizer.bin: ", AIDREAMS_TOKENIZER " -p a"},
        {1, "vocab-gpt-2.gguf: ", DATA "vocab-gpt-2.gguf -p a"},
        {1, "/nowhere/f: No such file",
         "model.bin -f /nowhere/f|model.bin --perplexity /nowhere/f|"
         "model.bin --tokenize /nowhere/f|model.bin -p a --logits /nowhere/f"},
        {1, "test: Is a directory", "model.bin -f test|model.bin -p a --logits test"},
        {1, "/dev/null: too short", "model.bin --perplexity /dev/null"},
        {1, "Is a directory", "model.bin < test"},
        {1, "/proc/logits: No such file", "model.bin -p a --logits /proc/logits"},
        {1, "/dev/full: No space left", "model.bin -p a --logits /dev/full"},
        {1, "stdout: No space left",
         "model.bin -p a -n 3 > /dev/full|model.bin -p a -n 3 --json > /dev/full|"
         "model.bin --tokenize Makefile > /dev/full|--help > /dev/full"},
        {1, "stdout: Bad file descriptor",
         "model.bin -p a -n 3 >&-|model.bin --tokenize Makefile >&-|--version >&-|"
         "model.bin -p a -n 3 --json >&-|model.bin --perplexity Makefile >&-"},
        {1, "stdin: Bad file descriptor", "model.bin <&-|model.bin -f - <&-"},
        {3, "999999 is no token", "model.bin --ids 1,999999"},
        {1, "/dev/full", "model.bin --ids 1 --logits /dev/full"},
        {1, "999999 is no token", "model.bin --ids 999999 --logits /dev/null"},
        {1, "no tokenizer",
         NO_TOKENIZER " -p a|" NO_TOKENIZER " -p a --logits /dev/null|" NO_TOKENIZER
                      " --perplexity Makefile"},
        {3, "no tokenizer", NO_TOKENIZER " < Makefile"},
        {1, "tokenizer.ggml.model", NO_TOKENIZER " --tokenize Makefile"},
        {1, "tokenizer.bin: cannot be read", AIDREAMS " -p a"},
        {1, "/nowhere/t: cannot be read", AIDREAMS " -p a --tokenizer /nowhere/t"},
        {1, "test: ", AIDREAMS " -p a --tokenizer test"},
        {1, "model.bin: ", AIDREAMS " -p a --tokenizer model.bin"},
        {1, "random weights have none; give --ids", "random:llama-3.1-70b -p a"},
        {3, "random weights have none; give --ids", "random:stories-15m:q8_0 < Makefile"},
        {1, "random:stories-15: expected random:NAME", "random:stories-15 --ids 1"},
        {1, "288 columns, expected a multiple of 256", "random:stories-15m:q4_k --ids 1"},
        {1, "is not a regular file", "$T/pipe -p a|" AIDREAMS " --tokenizer $T/pipe -p a"},
        {3, "--kv-device", "model.bin --ids " SIXTEEN ",315 -n 3 --kv-device 1b"},
        {1, "/nowhere: No such file", "model.bin --replay /nowhere"},
        {2, "--replay: got 0:4, expected at least 1:1", "model.bin --replay 0:4"},
        {1, "README.md:1: byte 0: expected a value", "model.bin --replay README.md --json"},
        {1, "/dev/null: no requests in it", "model.bin --replay /dev/null"},
        {3, "3 of 3 requests failed; request 0: the prompt has 99999 tokens",
         "model.bin --replay 99999:9 --limit 3|model.bin --replay 99999:9 --limit 3 --json"},
    };
    char *items[16];
    CHECK(mkfifo(scratch("pipe"), 0600) == 0, "no pipe"); /* it has no writer: nobody may wait */
    for (size_t i = 0; i < COUNT(rows); i++) {
        int n = split(rows[i].commands, "|", items, 16);
        for (int k = 0; k < n; k++)
            if (!TSAN || !strstr(items[k], "900000G")) /* which takes its runtime a minute */
                refuse(check, items[k], rows[i].status, rows[i].words, 3);
    }
}

/* A program without stderr, stdin or all of them does the same; and what is meant for a closed
 * stream never lands in a file that was opened since. */
static void closed_streams_are_no_files(struct check *check) {
    static const char cat[] = "model.bin -p 'The cat' -n 9 -t 0";
    expect_same(check, true, cat, "model.bin -p 'The cat' -n 9 -t 0 2>&-");
    expect_same(check, true, cat, "model.bin -p 'The cat' -n 9 -t 0 <&-");
    expect_same(check, true, cat, "model.bin -p 'The cat' -n 9 -t 0 <&- 2>&-");
    expect_same(check, true, cat, "model.bin -p 'The cat' -n 9 -t 0 2> /dev/full");
    expect(check, "model.bin --zap 2>&-", 2, "", NULL);
    size_t n[2];
    for (int i = 0; i < 2; i++) {
        expect(check,
               i ? "model.bin -p 'The cat' --logits $T/logits --verbose <&- >&- 2>&-"
                 : "model.bin -p 'The cat' --logits $T/logits --verbose",
               0, NULL, NULL);
        read_file(check, scratch("logits"), &n[i]);
    }
    CHECK(n[0] > 1000 && n[0] == n[1], "%zu bytes of logits, or %zu", n[0], n[1]);
}

/* Room for what never comes costs nothing, and more than there is, is refused. */
static void large_options_cost_nothing(struct check *check) {
    static const char *const options[] = {
        "--threads 1024",
        "--chunk 1048576",
        "--max-batch 65536 --kv-device 64b --kv-host 64b",
        "-n 2147483647 --kv-device 2b",
        "--devices cpu:16 --kv-device 1b --kv-host 0 --chunk 1 --max-batch 1",
        "--top-k 2147483647 --seed 18446744073709551615 --min-p 1e-300 -t 1e-300",
    };
    for (size_t i = 0; i < COUNT(options); i++) {
        struct outcome o = run(check, "model.bin -p a %s --json", options[i]);
        CHECK(o.status == 0 && strstr(o.out, "\"finish_reason\":\""), "%s: status %d: %s",
              options[i], o.status, o.err);
        CHECK(soon(o.seconds, 5) && small(&o, 500), "%s: %.1f s, %ld KiB", options[i], o.seconds,
              o.kibibytes);
    }
}

static void long_prompts_are_refused(struct check *check) {
    static const char *const patterns[] = {"a", " ", "Once upon a time ", "\xF0\x9F\x98\x80",
                                           "\xFF"};
    size_t length = 1 << 20;
    char *text = keep(length);
    for (size_t i = 0; i < COUNT(patterns); i++) {
        for (size_t at = 0; at < length; at++)
            text[at] = patterns[i][at % strlen(patterns[i])];
        write_file(check, "prompt", text, length); /* too long even if each token had 1024 bytes */
        struct outcome o = run(check, "model.bin < $T/prompt");
        check_refusal(check, patterns[i], &o, 3, "context");
        CHECK(soon(o.seconds, 2), "'%s': %.1f s", patterns[i], o.seconds);
        CHECK(o.out_length == 0, "'%s': %zu bytes on stdout", patterns[i], o.out_length);
        write_file(check, "prompt", text, length / 3);
        o = run(check, "model.bin -f $T/prompt");
        check_refusal(check, patterns[i], &o, 3, "context");
    }
    expect(check, "model.bin --ids " SIXTEEN " -n 3 --kv-device 1b --json", 0,
           "*\"finish_reason\":\"length\"*", NULL);
}

/* ---- half a gigabyte of anything ---- */

enum { HUGE_BYTES = 512 << 20, HUGE_HEAD = 1 << 20 };

/* A file of which only the head takes room on the disk; zeros follow. */
static void write_huge(struct check *check, const void *head, size_t length, off_t size) {
    write_file(check, "huge", head, length);
    CHECK(truncate(scratch("huge"), size) == 0, "cannot make a file that large");
}

static void huge_model_files_are_refused(struct check *check) {
    static const struct {
        const char *what, *head; /* NULL: the byte, repeated; or random ones */
        size_t length;
        int byte;
        const char *words;
    } kinds[] = {
#define HEAD(text) text, sizeof(text) - 1, 0
        {"zeros", HEAD(""), "block_count"},
        {"0xff", NULL, 0, 0xFF, "checkpoint"},
        {"random", NULL, 0, -1, "checkpoint"},
        {"letters", NULL, 0, 'a', "is text"},
        {"no keys", HEAD("GGUF\3\0\0\0"), "general.architecture"},
        {"2^64 - 1 tensors", HEAD("GGUF\3\0\0\0\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF"),
         "tensors: got 1844"},
        {"2^24 tensors", HEAD("GGUF\3\0\0\0\0\0\0\1\0\0\0\0"), "tensors: got 16777216, expected"},
        {"2^24 keys", HEAD("GGUF\3\0\0\0\0\0\0\0\0\0\0\0\0\0\0\1\0\0\0\0"),
         "keys: got 16777216, expected"},
        {"60000 keys, all alike", HEAD("GGUF\3\0\0\0\0\0\0\0\0\0\0\0\x60\xEA"), "is there twice"},
        {"a key of 2^28 bytes",
         HEAD("GGUF\3\0\0\0\0\0\0\0\0\0\0\0\1\0\0\0\0\0\0\0\0\0\0\x10\0\0\0\0"),
         "general.architecture"},
        {"2^25 strings",
         HEAD("GGUF\3\0\0\0\0\0\0\0\0\0\0\0\1\0\0\0\0\0\0\0\1\0\0\0\0\0\0\0t"
              "\x9\0\0\0\x8\0\0\0\0\0\0\2\0\0\0\0"),
         "t: got 33554432, expected at most"},
        {"2^28 bytes",
         HEAD("GGUF\3\0\0\0\0\0\0\0\0\0\0\0\1\0\0\0\0\0\0\0\1\0\0\0\0\0\0\0t"
              "\x9\0\0\0\0\0\0\0\0\0\0\x10\0\0\0\0"),
         "general.architecture"},
#undef HEAD
    };
    char *filled = keep(HUGE_HEAD);
    for (size_t i = 0; i < COUNT(kinds); i++) {
        uint32_t random = 7;
        for (size_t at = 0; at < HUGE_HEAD; at++) {
            random = random * 1664525 + 1013904223;
            filled[at] = (char)(kinds[i].byte < 0 ? (int)(random >> 24) : kinds[i].byte);
        }
        const char *head = kinds[i].head ? kinds[i].head : filled;
        write_huge(check, head, kinds[i].head ? kinds[i].length : HUGE_HEAD, HUGE_BYTES);
        struct outcome o = run(check, "$T/huge -p a -n 2");
        check_refusal(check, kinds[i].what, &o, 1, "/huge: ");
        check_refusal(check, kinds[i].what, &o, 1, kinds[i].words);
        CHECK(soon(o.seconds, 1) && small(&o, 64), "%s: %.1f s, %ld KiB", kinds[i].what, o.seconds,
              o.kibibytes);
    }
}

/* Those of 200 MB are read, and then refused for another reason. */
static void huge_texts_are_refused(struct check *check) {
    static const char many[] = "got more than 268435456 bytes";
    enum { READ_BYTES = 200 << 20 };
    static const struct {
        off_t size;
        const char *arguments;
        int status;
        const char *words;
    } rows[] = {{HUGE_BYTES, "model.bin -n 2 -f $T/huge", 1, many},
                {HUGE_BYTES, "model.bin -n 2 < $T/huge.pipe", 1, many},
                {HUGE_BYTES, "model.bin --tokenize $T/huge", 1, many},
                {READ_BYTES, "model.bin -n 2 -f $T/huge", 3, "context"},
                {READ_BYTES, "model.bin -n 2 < $T/huge", 3, "context"},
                {READ_BYTES, "model.bin --perplexity $T/huge", 1, "a text of more than"}};
    CHECK(mkfifo(scratch("huge.pipe"), 0600) == 0, "no pipe");
    for (size_t i = 0; i < COUNT(rows); i++) {
        if (SANITIZED && rows[i].size == READ_BYTES)
            continue;
        write_huge(check, "\xFF<s>", 4, rows[i].size);
        if (strstr(rows[i].arguments, "pipe"))
            shell(check, "cd $T && cat huge > huge.pipe 2> /dev/null &");
        refuse(check, rows[i].arguments, rows[i].status, rows[i].words, 4);
    }
}

/* ---- requests ---- */

/* Every key with every kind of value: a line each, answered or refused. */
static void odd_requests_are_answered(struct check *check) {
    static const char keys[] = "prompt|ids|n|temperature|top_p|top_k|seed|stop|system|id|min_p|zap|"
                               "|\\u0000|prompt\\u0000";
    static const char values[] = "null|true|0|-1|1e9|1e400|-0|0.5|2147483648|''|'a'|'\\u0000'|[]|"
                                 "[1]|[1,2.5]|['a']|[[1]]|{}|{'a':1}|'<s>'|[-1]|[99999]|[1e3]|"
                                 "[true]|[null]|18446744073709551616";
    static const char rest[] = "{|{'|{'a'|{'a':|{'prompt':'a',}|{'prompt':'a'}}|"
                               "\xEF\xBB\xBF{'prompt':'a'}|[|\\|\xFF\xFE|"
                               "{'prompt':[[[[[[[[[[[[[[";
    char *key[32], *value[32], *more[32], *text = keep(1 << 20);
    int n_keys = split(keys, "|", key, 32), n_values = split(values, "|", value, 32), length = 0;
    int n_more = split(rest, "|", more, 32), n_lines = n_keys * n_values * 2 + n_more;
    for (int i = 0; i < n_keys * n_values; i++)
        for (int with = 0; with < 2; with++)
            length += sprintf(text + length, "{%s'%s':%s}\n", with ? "'prompt':'a'," : "",
                              key[i / n_values], value[i % n_values]);
    for (int i = 0; i < n_more; i++)
        length += sprintf(text + length, "%s\n", more[i]);
    put_json(text, text);
    write_file(check, "requests", text, (size_t)length);
    struct outcome o = run(check, "model.bin -f $T/requests -n 2 --kv-device 64b --json");
    CHECK(o.status == 3 && n_lines == 15 * 26 * 2 + 11 && count_lines(o.out) == n_lines,
          "status %d, %d lines of %d: %s", o.status, count_lines(o.out), n_lines, o.err);
    int n_refused = count_of(o.out, "\"error\":\"");
    CHECK(n_refused > n_lines / 2 && n_refused < n_lines, "%d of %d refused", n_refused, n_lines);
}

/* More than the scheduler is told of at once: all are answered, in order. */
static void many_requests_are_answered(struct check *check) {
    enum { N = SANITIZED ? 4500 : 12000 };
    char *text = keep(N * 16);
    int length = 0, n = 0;
    for (int i = 0; i < N; i++)
        length += sprintf(text + length, i % 1000 == 999 ? "{\"n\":1}\n" : "a %d\n", i);
    write_file(check, "requests", text, (size_t)length);
    struct outcome o = run(check, "model.bin -f $T/requests -n 1 --kv-device 64b");
    for (char *rest = o.out, *line; (line = strsep(&rest, "\n"));) {
        int wanted;
        if (sscanf(line, "a %d", &wanted) != 1)
            continue;
        n += n % 1000 == 999; /* that one was refused */
        CHECK(wanted == n, "%d comes where %d is expected", wanted, n);
        n = wanted + 1;
    }
    CHECK(o.status == 3 && n >= N - 1, "status %d, %d of %d answers", o.status, n, N);
}

/* What is typed is text: whatever it spells, it has as many tokens as bytes in a vocabulary that
 * merges none of these. Said as a prompt, in a chat, as a system text, in JSON. */
static void special_tokens_are_typed_as_text(struct check *check) {
    static const struct tiny_shape shapes[] = {{"llama", TINY_F32, NULL},
                                               {"qwen2", TINY_F32, "<|im_start|>"},
                                               {"qwen3", TINY_F32, "<|start_header_id|>"},
                                               {"llama", TINY_F32, "<<SYS>>"},
                                               {"llama", TINY_F32, "[INST]"}};
    static const char *const ways[] = {"-p '%s'", "-p x --system '%s'", "-f $T/requests"};
    enum { SPECIAL = COUNT(tiny_special) };
    char words[PATH_LENGTH], line[PATH_LENGTH];
    static struct tiny tiny;
    for (size_t i = 0; i < COUNT(shapes); i++) {
        CHECK(tiny_make(&tiny, shapes[i]), "a model too large");
        write_file(check, "model", tiny.bytes, tiny.size);
        for (size_t way = 0; way < 3; way++) {
            int n_tokens[SPECIAL + 1];
            for (size_t k = 0; k <= SPECIAL; k++) { /* the last is the measure: one byte */
                const char *text = k < SPECIAL ? tiny_special[k] : "x";
                snprintf(line, sizeof line, "{\"prompt\":\"%s\"}\n", text);
                write_file(check, "requests", line, strlen(line));
                snprintf(words, sizeof words, ways[way], text);
                struct outcome o = run(check, "$T/model %s -n 1 --json", words);
                n_tokens[k] = (int)number(&o, "0", "prompt_tokens");
                CHECK(o.status == 0 && n_tokens[k] > 0, "%s: status %d: %s", words, o.status,
                      o.err);
            }
            for (size_t k = 0; k < SPECIAL; k++)
                CHECK(n_tokens[k] - n_tokens[SPECIAL] == (int)strlen(tiny_special[k]) - 1,
                      "%s: %s in way %zu: %d tokens, x: %d", shapes[i].chat ? shapes[i].chat : "-",
                      tiny_special[k], way, n_tokens[k], n_tokens[SPECIAL]);
        }
    }
}

/* ---- broken model files ---- */

/* Runs $T/broken: it may be refused, by lines that say why. Returns the status. */
static int survive(struct check *check, const char *what, const char *options) {
    struct outcome o = run(check, "$T/broken %s", options);
    CHECK(o.status == 0 || o.status == 1 || o.status == 3, "%s: status %d: %s", what, o.status,
          o.err);
    CHECK(o.status == 0 || strstr(o.err, "dynamo: "), "%s: status %d, no line", what, o.status);
    for (const char *line = o.err; *line; line += strcspn(line, "\n") + 1)
        CHECK(!strncmp(line, "dynamo: ", 8) || *line == '[', "%s: a line of its own: %s", what,
              o.err);
    for (const char *at = o.err; *at; at++)
        CHECK((unsigned char)*at >= ' ' || *at == '\n', "%s: a control character", what);
    CHECK(soon(o.seconds, 5) && small(&o, 300), "%s: %.1f s, %ld KiB", what, o.seconds,
          o.kibibytes);
    return o.status;
}

struct victim {
    const char *path, *options;
    size_t header; /* bytes before the tensors' data, about */
};

static const struct victim victims[] = {
    {NO_TOKENIZER, "--ids 1,2,3 -n 3", 2000},
    {"model.bin", "-p 'Once upon' -n 3", 36000},
    {DATA "ref/llama-q8_0.gguf", "--ids 1,2,3 -n 3 --kv-device 4b --kv-host 4b", 2000},
    {AIDREAMS, "-p 'I see' -n 3 --tokenizer " AIDREAMS_TOKENIZER, 28},
};

static void truncated_files_are_refused(struct check *check) {
    char what[PATH_LENGTH];
    for (size_t v = 0; v < COUNT(victims); v++) {
        size_t length;
        char *bytes = read_file(check, victims[v].path, &length);
        for (size_t i = 0; i < 16; i++) { /* in the header, in the data, and near the end */
            size_t at = i < 10 ? victims[v].header * i / 10 : length / 6 * (i - 10) + length / 7;
            at = i == 15 ? length - 100 : at; /* more than padding */
            write_file(check, "broken", bytes, at);
            struct outcome o = run(check, "$T/broken %s", victims[v].options);
            snprintf(what, sizeof what, "%s, cut after %zu bytes", victims[v].path, at);
            check_refusal(check, what, &o, 1, "/broken: ");
            CHECK(soon(o.seconds, 2), "%s: %.1f s", what, o.seconds);
        }
    }
}

/* Not what the numbers then mean, but that each is looked at before it is trusted. */
static void mutated_files_are_survived(struct check *check) {
    static const uint8_t values[] = {0, 1, 0x7F, 0x80, 0xFF};
    uint32_t random = 12345;
    char what[PATH_LENGTH];
    for (size_t v = 0; v < COUNT(victims); v++) {
        size_t length;
        char *bytes = read_file(check, victims[v].path, &length);
        for (int i = 0; i < (v == 3 ? 28 : 30) && length > victims[v].header; i++) {
            random = random * 1664525 + 1013904223;
            size_t at = v == 3 ? (size_t)i : (random >> 8) % victims[v].header;
            char before = bytes[at];
            bytes[at] = (char)(i % 2 ? values[(random >> 4) % 5] : before ^ (1 << (random >> 29)));
            write_file(check, "broken", bytes, length);
            bytes[at] = before;
            snprintf(what, sizeof what, "%s at %zu", victims[v].path, at);
            survive(check, what, victims[v].options);
        }
    }
}

/* So many bytes of `value` at `offset` behind a name, which stands in the file once. */
struct patch {
    const char *name;
    size_t offset, size;
    uint64_t value;
    const char *words; /* of the line that refuses it */
};

static void lying_files_are_refused(struct check *check) {
    /* behind a key: u32 type, value; behind a tensor's name: u32 n, u64 sizes, u32 type, u64 at */
    static const struct patch patches[] = {
        {"GGUF", 0, 4, 99, "version"},
        {"GGUF", 4, 8, UINT64_MAX, "have room"},
        {"GGUF", 4, 8, (uint64_t)1 << 40, "have room"},
        {"GGUF", 12, 8, UINT64_MAX, ""},
        {"GGUF", 12, 8, (uint64_t)1 << 40, ""},
        {"llama.block_count", 0, 4, 8, ""},
        {"llama.block_count", 0, 4, 6, "llama.block_count"},
        {"llama.block_count", 4, 4, 0, "llama.block_count"},
        {"llama.block_count", 4, 4, UINT32_MAX, "llama.block_count"},
        {"llama.block_count", 4, 4, 5, "blk.4."},
        {"llama.context_length", 4, 4, 0, "llama.context_length"},
        {"llama.attention.head_count", 4, 4, 0, "llama.attention.head_count"},
        {"llama.attention.head_count", 4, 4, 7, "head_count"},
        {"llama.embedding_length", 4, 4, 193, "193"},
        {"general.architecture", 12, 5, 0x616161616D, "general.architecture"},
        {"token_embd.weight", 0, 4, 9, "token_embd.weight"},
        {"token_embd.weight", 4, 8, UINT64_MAX, "token_embd.weight"},
        {"token_embd.weight", 4, 8, (uint64_t)1 << 62, "token_embd.weight"},
        {"token_embd.weight", 12, 8, (uint64_t)1 << 40, "token_embd.weight"},
        {"token_embd.weight", 20, 4, 1000, "token_embd.weight"},
        {"token_embd.weight", 24, 8, 1, "token_embd.weight"},
        {"output_norm.weight", 4, 8, 96, "output_norm.weight"},
        {"output_norm.weight", 16, 8, (uint64_t)1 << 40, "incomplete: "},
        {"output_norm.weight", 16, 8, (uint64_t)0 - 32, "output_norm.weight"},
        {"output_norm.weight", 16, 8, 0, "output_norm.weight"},
    };
    char what[PATH_LENGTH];
    size_t length;
    char *bytes = read_file(check, "model.bin", &length);
    for (size_t i = 0; i < COUNT(patches); i++) {
        const struct patch *p = &patches[i];
        char saved[8], *at = memmem(bytes, length, p->name, strlen(p->name));
        CHECK(at, "no %s in model.bin", p->name);
        if (!at)
            continue;
        at += strlen(p->name) + p->offset;
        memcpy(saved, at, sizeof saved);
        memcpy(at, &p->value, p->size); /* little-endian */
        write_file(check, "broken", bytes, length);
        memcpy(at, saved, sizeof saved);
        snprintf(what, sizeof what, "%s + %zu = %#llx", p->name, p->offset,
                 (unsigned long long)p->value);
        struct outcome o = run(check, "$T/broken -p a -n 2");
        check_refusal(check, what, &o, 1, "/broken: ");
        check_refusal(check, what, &o, 1, p->words);
        CHECK(soon(o.seconds, 2), "%s: %.1f s", what, o.seconds);
    }
}

/* A bad value for a field that holds `old`: the i-th of its kind; where it is the old one, none. */
static uint64_t bad_value(const struct tiny *t, enum tiny_kind kind, uint64_t old, int i) {
    const uint64_t values[FIELD_NAME + 1][8] = {
        [FIELD_COUNT] = {0, old - 1, old + 1, old * 2, 1u << 31, old | 1ull << 32, UINT64_MAX,
                         1ull << 63},
        [FIELD_LENGTH] = {0, old - 1, old + 1, 1u << 31, t->size, 1ull << 62, UINT64_MAX - 7,
                          UINT64_MAX},
        [FIELD_KEY_TYPE] = {0, 3, 6, 8, 9, 12, 13, 0x80000000},
        [FIELD_VALUE] = {0, 1, old + 1, old * 2, 0x7FFFFFFF, 0x80000000, 0x7FC00000, 0xFFFFFFFF},
        [FIELD_EXTENT] = {0, 1, old + 1, old * 2, 1u << 30, 1ull << 32, 1ull << 62, UINT64_MAX},
        [FIELD_TENSOR_TYPE] = {0, 1, 2, 8, 12, 30, 39, 0xFFFFFFFF},
        [FIELD_OFFSET] = {0, old + 1, old + 32, old - 32, t->size, 1ull << 40, 1ull << 63,
                          UINT64_MAX - 31},
        [FIELD_NAME] = {0, '\n', 0xFF, ' ', 'z', 0x1B, '%', '/'}};
    return values[kind][i];
}

/* Two fields of one kind and size change places: names, offsets, rows and columns. */
static void swap_fields(struct tiny *t, const struct tiny_field *a, const struct tiny_field *b) {
    for (int i = 0; i < a->bytes; i++) {
        uint8_t kept = t->bytes[a->at + (size_t)i];
        t->bytes[a->at + (size_t)i] = t->bytes[b->at + (size_t)i];
        t->bytes[b->at + (size_t)i] = kept;
    }
}

static void try_mutation(struct check *check, const struct tiny *t, int n_ended[4],
                         const char *what) {
    write_file(check, "broken", t->bytes, t->size);
    n_ended[survive(check, what, "-p 'abc <s>' -n 2 --kv-device 4b --kv-host 0") & 3]++;
}

/* One in STEP of all changes of one field; then pairs: swapped, or one a copy of the other. */
static void break_fields(struct check *check, struct tiny *t, int n_ended[4], int first) {
    enum { STEP = 17, BAD_VALUES = 8 };
    static struct tiny kept;
    char what[PATH_LENGTH];
    kept = *t;
    for (int i = first; i < t->n_fields * BAD_VALUES; i += STEP) {
        const struct tiny_field *field = &t->fields[i / BAD_VALUES];
        size_t bytes = field->kind == FIELD_NAME ? 1 : (size_t)field->bytes;
        uint64_t old = 0;
        memcpy(&old, t->bytes + field->at, bytes);
        uint64_t value = bad_value(t, field->kind, old, i % BAD_VALUES);
        if (memcmp(&value, &old, bytes) == 0)
            continue;
        memcpy(t->bytes + field->at, &value, bytes);
        snprintf(what, sizeof what, "%s + %zu = %#llx", field->name, field->at,
                 (unsigned long long)value);
        try_mutation(check, t, n_ended, what);
        *t = kept;
    }
    for (int i = 0, last[FIELD_NAME + 1] = {0}, n = first; i < t->n_fields; i++) {
        const struct tiny_field *field = &t->fields[i], *other = &t->fields[last[field->kind]];
        bool alike = last[field->kind] > 0 && field->bytes == other->bytes &&
                     memcmp(t->bytes + field->at, t->bytes + other->at, (size_t)field->bytes) != 0;
        last[field->kind] = i;
        if (!alike || n++ % 3 != 0)
            continue;
        if (n % 2)
            swap_fields(t, field, other);
        else
            memcpy(t->bytes + field->at, t->bytes + other->at, (size_t)field->bytes);
        snprintf(what, sizeof what, "%s %s %s, kind %d", field->name, n % 2 ? "<->" : "=",
                 other->name, (int)field->kind);
        try_mutation(check, t, n_ended, what);
        *t = kept;
    }
}

static void broken_fields_are_survived(struct check *check) {
    static const struct tiny_shape shapes[] = {{"llama", TINY_Q8_0, "<<SYS>> [INST]"},
                                               {"qwen2", TINY_Q4_K, "<|im_start|>"},
                                               {"qwen3", TINY_Q6_K, NULL}};
    static struct tiny tiny;
    int n_ended[4] = {0}; /* with each status */
    for (int i = 0; i < 3; i++) {
        CHECK(tiny_make(&tiny, shapes[i]), "a model too large");
        write_file(check, "broken", tiny.bytes, tiny.size);
        struct outcome o = run(check, "$T/broken -p abc -n 2");
        CHECK(o.status == 0, "the whole model: %s", o.err);
        break_fields(check, &tiny, n_ended, i);
    }
    int n = n_ended[0] + n_ended[1] + n_ended[3];
    CHECK(n >= 200 && n_ended[0] >= 10 && n_ended[1] >= 100, "%d mutations, %d ran, %d refused", n,
          n_ended[0], n_ended[1]);
}

int main(int argc, char **argv) {
    static const struct test tests[] = {
        TEST(bad_values_are_refused),      TEST(bad_commands_are_refused),
        TEST(closed_streams_are_no_files), TEST(large_options_cost_nothing),
        TEST(long_prompts_are_refused),    TEST(huge_model_files_are_refused),
        TEST(huge_texts_are_refused),      TEST(odd_requests_are_answered),
        TEST(many_requests_are_answered),  TEST(special_tokens_are_typed_as_text),
        TEST(truncated_files_are_refused), TEST(mutated_files_are_survived),
        TEST(lying_files_are_refused),     TEST(broken_fields_are_survived)};
    return run_tests(tests, COUNT(tests), argc, argv);
}
