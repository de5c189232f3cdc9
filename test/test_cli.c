/* test_cli.c: every option with good and bad values, contradictions, request files line by line,
 * the stop-text matcher against a definition that looks at one byte at a time, --help, and the bar
 * that loading shows. */
#define _GNU_SOURCE
#define JSON_IMPLEMENTATION
#include "../lib/json.h"
#define CLI_IMPLEMENTATION
#include "../lib/cli.h"
#include "child.h"

/* Parses a command line given as words that `|` separates (a value may hold spaces). */
static bool parse(struct options *options, const char *line, char error[ERROR_LENGTH]) {
    static char words[2048]; /* options point into it */
    char *argv[80] = {"dynamo"};
    int argc = 1;
    snprintf(words, sizeof words, "%s", line);
    for (char *at = words; at && *line; argc++) {
        argv[argc] = at;
        at = strchr(at, '|');
        if (at)
            *at++ = 0;
    }
    error[0] = 0;
    return cli_parse(options, argc, argv, error);
}

static uint32_t draw(uint64_t *state, uint32_t limit) {
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(*state >> 33) % limit;
}

static void defaults_hold(struct check *check) {
    struct options o;
    char error[ERROR_LENGTH];
    CHECK(parse(&o, "model.bin", error), "%s", error);
    CHECK(strcmp(o.model, "model.bin") == 0, "%s", o.model);
    CHECK(o.request.n == -1 && o.request.sampling.temperature == 0.8f, "n, temperature");
    CHECK(o.request.sampling.top_p == 0.95f && o.request.sampling.top_k == 0, "top_p, top_k");
    CHECK(o.request.sampling.min_p == 0 && !cli_given(o.given, "--seed"), "min_p, seed");
    CHECK(o.tp == 1 && o.kv_policy == 0 && o.kv_type == 0, "tp, kv");
    CHECK(!o.kv_device.given && !o.kv_host.given && o.devices.n == 0 && o.given == 0, "given");
    cli_free(&o);
}

static void every_option_is_read(struct check *check) {
    struct options o;
    char error[ERROR_LENGTH];
    CHECK(parse(&o,
                "--ids|1,15, 7|-n|5|m.gguf|-t|0.25|--top-p=0.5|--top-k|40|--min-p|1e-2|--seed|"
                "18446744073709551615|--stop|end|--stop=--json|--system|be brief|--devices|cpu:8|"
                "--prefill|0-3|--decode|6,5,4,7|--tp|2|--kv-device|8b|--kv-host|3G|--kv-type|bf16|"
                "--kv-policy|write-through|--max-batch|7|--chunk|64|--threads|3|--json|--stats|"
                "--verbose|--tokenizer|t.bin|--logits|out|--copy-delay|9",
                error),
          "%s", error);
    const struct request_spec *r = &o.request;
    CHECK(r->n_ids == 3 && r->ids[0] == 1 && r->ids[1] == 15 && r->ids[2] == 7, "%d", r->n_ids);
    CHECK(r->n == 5 && r->sampling.temperature == 0.25f && r->sampling.top_p == 0.5f, "%d", r->n);
    CHECK(r->sampling.top_k == 40 && r->sampling.min_p == 0.01f, "%d", r->sampling.top_k);
    CHECK(r->sampling.seed == UINT64_MAX, "%llu", (unsigned long long)r->sampling.seed);
    CHECK(r->n_stop == 2 && !strcmp(r->stop[0], "end") && !strcmp(r->stop[1], "--json"), "stop");
    CHECK(!strcmp(r->system, "be brief") && !strcmp(o.model, "m.gguf"), "%s", o.model);
    CHECK(o.devices.cpu && o.devices.n == 8 && o.devices.index[7] == 7, "%d", o.devices.n);
    CHECK(o.prefill.n == 4 && o.prefill.index[3] == 3 && !o.prefill.cpu, "%d", o.prefill.n);
    CHECK(o.decode.n == 4 && o.decode.index[0] == 6 && o.decode.index[2] == 4, "decode");
    CHECK(o.tp == 2 && o.max_batch == 7 && o.chunk == 64 && o.threads == 3, "%d", o.tp);
    CHECK(o.kv_device.value == 8 && o.kv_device.blocks && o.kv_device.given, "kv-device");
    CHECK(o.kv_host.value == 3ll << 30 && !o.kv_host.blocks && o.kv_host.given, "kv-host");
    CHECK(o.kv_type == 2 && o.kv_policy == 2, "%d", o.kv_type);
    CHECK(o.json && o.stats && o.verbose && !o.colocate && !o.help && !o.version, "flags");
    CHECK(!strcmp(o.tokenizer, "t.bin") && !strcmp(o.logits, "out"), "%s", o.tokenizer);
    CHECK(o.copy_delay == 9 && cli_given(o.given, "--seed") && !cli_given(o.given, "-p"), "given");
    cli_free(&o);
    CHECK(parse(&o, "m|-p|-hello|--colocate|--kv-policy|on-evict|--kv-type=f32", error), "%s",
          error);
    CHECK(!strcmp(o.request.prompt, "-hello") && o.request.prompt_length == 6, "prompt");
    CHECK(o.colocate && o.kv_policy == 1 && o.kv_type == 1, "kv");
    cli_free(&o);
    CHECK(parse(&o, "m|-f|a.txt", error) && !strcmp(o.file, "a.txt"), "%s", error);
    CHECK(parse(&o, "m|--tokenize|b", error) && !strcmp(o.tokenize, "b"), "%s", error);
    CHECK(parse(&o, "m|--perplexity|c", error) && !strcmp(o.perplexity, "c"), "%s", error);
    CHECK(parse(&o, "--help", error) && o.help && !o.model, "%s", error);
    CHECK(parse(&o, "--version", error) && o.version, "%s", error);
    CHECK(parse(&o, "m|-p|", error) && o.request.prompt_length == 0, "an empty prompt: %s", error);
}

static void good_values(struct check *check) {
    static const char *const lines[] = {"m|-n|1",
                                        "m|-n|2147483647",
                                        "m|-t|0",
                                        "m|-t|100",
                                        "m|-t|1e-3",
                                        "m|-t|.5",
                                        "m|--top-p|0",
                                        "m|--top-p|1",
                                        "m|--top-k|0",
                                        "m|--min-p|1",
                                        "m|--seed|0",
                                        "m|--tp|1",
                                        "m|--tp|4",
                                        "m|--tp|8",
                                        "m|--devices|cpu",
                                        "m|--devices|cpu:64",
                                        "m|--devices|0",
                                        "m|--devices|0,0",
                                        "m|--devices|0-63",
                                        "m|--devices|3-3,1",
                                        "m|--kv-host|0",
                                        "m|--kv-host|0b",
                                        "m|--kv-device|1",
                                        "m|--kv-device|1b",
                                        "m|--prefill|0|--decode|0",
                                        "m|--threads|1024",
                                        "m|-p|a|--logits|f",
                                        "m|--ids|3|--logits|f",
                                        "m|--devices|4,5|--prefill|1|--decode|0",
                                        "m|--ids|0",
                                        "m|--ids|999999999",
                                        "random:llama:q8_0"};
    for (size_t i = 0; i < sizeof lines / sizeof *lines; i++) {
        struct options o;
        char error[ERROR_LENGTH];
        CHECK(parse(&o, lines[i], error), "%s: %s", lines[i], error);
        cli_free(&o);
    }
}

/* Each line is refused, with a message that names the option and says these words. */
static const struct {
    const char *line, *words;
} bad_line_cases[] = {
    {"", "no model"},
    {"--json", "no model"},
    {"m|x", "x: unexpected"},
    {"m|--sed|1", "did you mean --seed"},
    {"m|--sede=1", "did you mean --seed"},
    {"m|--tokenise|f", "did you mean --tokenize"},
    {"m|--kvhost|1", "did you mean --kv-host"},
    {"m|--colocated", "did you mean --colocate"},
    {"m|--zzzzzzzz", "unknown option; --help"},
    {"m|-h", "-h: unknown option; --help"},
    {"m|--trace|f", "unknown option"},
    {"m|-", "unknown option"},
    {"m|--", "unknown option"},
    {"m|--=1", "unknown option"},
    {"m|--serve|80", "unknown option"},
    {"m|-n", "-n: missing value (N)"},
    {"m|-p|--json", "-p: missing value"},
    {"m|--seed", "missing value"},
    {"m|--kv-type", "missing value (f32|bf16)"},
    {"m|--json=1", "--json: got 1, expected no value"},
    {"m|-n|1|-n|2", "-n: given twice"},
    {"m|--json|--json", "given twice"},
    {"m|-p|a|-p|b", "given twice"},
    {"m|-n|0", "-n: got 0, expected a whole number from 1"},
    {"m|-n|-1", "got -1"},
    {"m|-n|2147483648", "to 2147483647"},
    {"m|-n|1.5", "whole"},
    {"m|-n|1e3", "whole"},
    {"m|-n|x", "got x"},
    {"m|-n|", "expected"},
    {"m|-n| 5", "expected"},
    {"m|-n|5 ", "expected"},
    {"m|-n|5x", "expected"},
    {"m|-n|--5", "expected"},
    {"m|-n|99999999999999999999999", "expected"},
    {"m|-t|-0.1", "from 0 to 100"},
    {"m|-t|101", "from 0"},
    {"m|-t|nan", "got nan"},
    {"m|-t|inf", "got inf"},
    {"m|-t|0x1", "got 0x1"},
    {"m|-t|1e999", "from 0"},
    {"m|-t|", "from 0"},
    {"m|-t|.", "from"},
    {"m|-t|1,5", "from 0"},
    {"m|--top-p|1.01", "from 0 to 1"},
    {"m|--top-p|-1", "from 0"},
    {"m|--min-p|2", "from 0 to 1"},
    {"m|--top-k|-1", "from 0"},
    {"m|--seed|-1", "from 0"},
    {"m|--seed|18446744073709551616", "to 18446744073709551615"},
    {"m|--seed|1.0", "whole"},
    {"m|--seed|", "whole"},
    {"m|--seed|+1", "whole"},
    {"m|--stop|", "--stop: got"},
    {"m|--copy-delay|x", "whole"},
    {"m|--tp|3", "1, 2, 4 or 8"},
    {"m|--tp|0", "from 1 to 8"},
    {"m|--tp|16", "from 1 to 8"},
    {"m|--ids|", "token ids"},
    {"m|--ids|1,", "token ids"},
    {"m|--ids|,1", "token ids"},
    {"m|--ids|1,,2", "token ids"},
    {"m|--ids|-1", "token ids"},
    {"m|--ids|1.5", "token ids"},
    {"m|--ids|1;2", "token ids"},
    {"m|--ids|a", "token ids"},
    {"m|--ids|99999999999", "token ids"},
    {"m|--ids|1]", "token ids"},
    {"m|--kv-device|0", "--kv-device: got 0"},
    {"m|--kv-device|-1", "bytes such as"},
    {"m|--kv-device|1.5G", "bytes"},
    {"m|--kv-device|b", "bytes"},
    {"m|--kv-device|", "bytes"},
    {"m|--kv-device|1T", "bytes"},
    {"m|--kv-device|1GB", "bytes"},
    {"m|--kv-host|8 b", "bytes"},
    {"m|--kv-host|99999999999G", "bytes"},
    {"m|--kv-host|-0b1", "bytes"},
    {"m|--kv-type|f16", "expected f32|bf16"},
    {"m|--kv-type|f3", "expected f32|bf16"},
    {"m|--kv-type|", "expected f32"},
    {"m|--kv-policy|f32|bf16", "--kv-policy: got f32"},
    {"m|--kv-policy|write", "on-evict|write-through"},
    {"m|--threads|0", "from 1"},
    {"m|--threads|1025", "to 1024"},
    {"m|--max-batch|0", "from 1"},
    {"m|--chunk|0", "from 1"},
    {"m|--devices|", "cpu:N"},
    {"m|--devices|cpu:0", "cpu:N"},
    {"m|--devices|cpu:65", "cpu:N"},
    {"m|--devices|cpu:", "cpu:N"},
    {"m|--devices|cpux", "cpu:N"},
    {"m|--devices|cpu:2,3", "cpu"},
    {"m|--devices|gpu", "cpu:N"},
    {"m|--devices|1,", "cpu:N"},
    {"m|--devices|,1", "cpu:N"},
    {"m|--devices|3-1", "cpu:N"},
    {"m|--devices|0-64", "at most 64"},
    {"m|--devices|-1", "cpu"},
    {"m|--devices|0-", "cpu:N"},
    {"m|--devices|0--1", "cpu:N"},
    {"m|--devices|0-31,0-32", "64"},
    {"m|--devices|0-999999999", "64"},
    {"m|--devices|99999999999", "64"},
    {"m|--prefill|cpu|--decode|0", "--prefill: got cpu, expected positions"},
    {"m|--prefill|0|--decode|cpu:2", "--decode: got cpu:2, expected positions"},
    {"m|--devices|cpu:4|--prefill|0|--decode|4", "--decode: got device 4, expected 0 to 3"},
    {"m|--devices|cpu:4|--prefill|0,1|--decode|1",
     "--decode: got device 1, expected 0 to 3, not in use already"},
    {"m|--devices|cpu:4|--prefill|0,0|--decode|1",
     "--prefill: got device 0, expected 0 to 3, not in use already"},
    {"m|--prefill|0", "--prefill: needs --decode"},
    {"m|--decode|0", "needs --prefill"},
    {"m|--devices|cpu:3|--tp|2", "groups of 2"},
    {"m|--prefill|0,1|--decode|2|--tp|2", "groups of 2"},
    {"m|-p|a|--ids|1", "-p and --ids exclude each other"},
    {"m|-p|a|-f|b", "exclude each other"},
    {"m|--ids|1|-f|b", "exclude each other"},
    {"m|--tokenize|a|-p|b", "exclude each other"},
    {"m|--tokenize|a|-f|b", "exclude"},
    {"m|--tokenize|a|--ids|1", "exclude"},
    {"m|--tokenize|a|--perplexity|b", "exclude"},
    {"m|--perplexity|a|-p|b", "exclude"},
    {"m|--logits|a|-f|b", "--logits: needs -p or --ids"},
    {"m|--logits|a|--tokenize|b", "--logits: needs"},
    {"m|--logits|a|--perplexity|b", "--logits: needs"},
    {"m|--logits|a", "--logits: needs -p or --ids"},
    {"m|--colocate|--prefill|0|--decode|1", "--colocate and --prefill"},
    {"m|--colocate|--decode|1", "--decode: needs --prefill"},
    {"m|--kv-type|\x1b[31m\n", "got ?[31m?"}};

static void bad_lines(struct check *check) {
    for (size_t i = 0; i < sizeof bad_line_cases / sizeof *bad_line_cases; i++) {
        struct options o;
        char error[ERROR_LENGTH];
        CHECK(!parse(&o, bad_line_cases[i].line, error), "%s", bad_line_cases[i].line);
        CHECK(strstr(error, bad_line_cases[i].words) && !strchr(error, '\n'), "%s: %s",
              bad_line_cases[i].line, error);
        cli_free(&o);
    }
    char line[700] = "m|--stop|a";
    for (int i = 1; i <= VALUE_STOPS; i++)
        strcat(line, "|--stop|a");
    struct options o;
    char error[ERROR_LENGTH];
    CHECK(!parse(&o, line, error) && strstr(error, "at most 16"), "%s", error);
    cli_free(&o);
}

/* A file of a line each, written to a temporary file that is gone when it is closed. */
static bool requests_of(struct options *options, const char *line, const char *text, size_t length,
                        struct requests *requests, char error[ERROR_LENGTH]) {
    static char path[64];
    FILE *file = tmpfile();
    if (!file || fwrite(text, 1, length, file) != length || fflush(file)) {
        snprintf(error, ERROR_LENGTH, "no temporary file");
        return false;
    }
    snprintf(path, sizeof path, "/dev/fd/%d", fileno(file));
    rewind(file);
    bool good = parse(options, line, error);
    options->file = path;
    *requests = (struct requests){0};
    good = good && requests_read(requests, options->file, &options->request, error);
    fclose(file);
    return good;
}

static void requests_are_read(struct check *check) {
    static const char text[] =
        "a plain line \n\n"
        " {not JSON}\n"
        "{\"prompt\": \"a\\nb\\u0000c\", \"n\": 3, \"temperature\": 0, \"top_p\": 0.5, \"top_k\": "
        "2, "
        "\"min_p\": 0.25, \"seed\": 18446744073709551615, \"stop\": \"x\", \"system\": \"s\", "
        "\"id\": \"one\"}\r\n"
        "\r\n"
        "{\"ids\": [ 1 , 2,3 ], \"stop\": [\"p\", \"q\"]}\n"
        "{\"prompt\":\"\"}\n"
        "\xFF\0z\n"
        "{\"ids\":[7], \"stop\": []}";
    struct options o;
    struct requests requests;
    char error[ERROR_LENGTH];
    CHECK(requests_of(&o, "m|-n|9|--seed|5|--stop|end|--system|sys", text, sizeof text - 1,
                      &requests, error),
          "%s", error);
    struct request_spec *r = requests.specs;
    int n = requests.n;
    CHECK(n == 7, "%d requests", n);
    if (n != 7)
        return;
    for (int i = 0; i < n; i++)
        CHECK(!r[i].error, "%s", r[i].error);
    CHECK(!strcmp(r[0].prompt, "a plain line ") && r[0].prompt_length == 13, "%s", r[0].prompt);
    CHECK(r[0].n == 9 && r[0].sampling.seed == 5 && r[0].n_stop == 1 && !r[0].id, "%d", r[0].n);
    CHECK(r[0].sampling.temperature == 0.8f && !strcmp(r[0].system, "sys"), "defaults");
    CHECK(!strcmp(r[1].prompt, " {not JSON}"), "%s", r[1].prompt);
    CHECK(r[2].prompt_length == 5 && !memcmp(r[2].prompt, "a\nb\0c", 6) && !r[2].ids, "prompt");
    CHECK(r[2].n == 3 && r[2].sampling.temperature == 0 && r[2].sampling.top_p == 0.5f, "n");
    CHECK(r[2].sampling.top_k == 2 && r[2].sampling.min_p == 0.25f, "top_k, min_p");
    CHECK(r[2].sampling.seed == UINT64_MAX, "seed");
    CHECK(r[2].n_stop == 1 && !strcmp(r[2].stop[0], "x") && !strcmp(r[2].system, "s"), "stop");
    CHECK(r[2].id && !strcmp(r[2].id, "one"), "id");
    CHECK(r[3].n_ids == 3 && r[3].ids[2] == 3 && !r[3].prompt && !r[3].id, "ids");
    CHECK(r[3].n_stop == 2 && !strcmp(r[3].stop[1], "q") && r[3].n == 9, "stops");
    CHECK(r[3].sampling.top_k == 0 && r[3].sampling.seed == 5, "a line does not change the next");
    CHECK(r[4].prompt && r[4].prompt_length == 0, "an empty prompt");
    CHECK(r[5].prompt_length == 3 && !memcmp(r[5].prompt, "\xFF\0z", 4), "bytes");
    CHECK(r[6].n_ids == 1 && r[6].n_stop == 0, "stop []");
    CHECK(o.request.n == 9 && !o.request.ids && o.request.n_stop == 1 &&
              cli_given(o.given, "--stop"),
          "untouched");
    requests_free(&requests);
    cli_free(&o);
}

static const struct {
    const char *line, *words;
} bad_request_cases[] = {
    {"{", "byte 1: expected"},
    {"{\"prompt\":\"a\"", "byte 13"},
    {"{\"prompt\":\"a\"} x", "byte 15"},
    {"{}", "either prompt or ids"},
    {"{\"n\":1}", "either prompt or ids"},
    {"{\"prompt\":1}", "prompt: got 1, expected a text"},
    {"{\"prompt\":\"a\",\"ids\":[1]}", "either prompt or ids"},
    {"{\"promt\":\"a\"}", "promt: unknown key; did you mean prompt"},
    {"{\"prompt\":\"a\",\"n\\u0000\":1}", "unknown key"},
    {"{\"prompt\":\"a\",\"json\":true}", "json: unknown key"},
    {"{\"prompt\":\"a\",\"prompt\":\"b\"}", "prompt: given twice"},
    {"{\"prompt\":\"a\",\"n\":0}", "n: got 0, expected"},
    {"{\"prompt\":\"a\",\"n\":1.5}", "n: got 1.5, expected"},
    {"{\"prompt\":\"a\",\"n\":\"1\"}", "n: got \"1\", expected a whole number"},
    {"{\"prompt\":\"a\",\"n\":null}", "n: got null, expected"},
    {"{\"prompt\":\"a\",\"top_p\":2}", "top_p: got 2, expected a number from 0 to 1"},
    {"{\"prompt\":\"a\",\"temperature\":1e999}", "temperature: got 1e999"},
    {"{\"prompt\":\"a\",\"seed\":-1}", "seed: got -1"},
    {"{\"prompt\":\"a\",\"stop\":\"\"}", "stop: got"},
    {"{\"prompt\":\"a\",\"stop\":[1]}", "stop: got 1, expected"},
    {"{\"prompt\":\"a\",\"stop\":[[\"a\"]]}", "stop: got [\"a"},
    {"{\"prompt\":\"a\",\"stop\":[\"a\\u0000\"]}", "zero byte"},
    {"{\"prompt\":\"a\",\"system\":\"a\\u0000\"}", "zero byte"},
    {"{\"prompt\":\"a\",\"id\":7}", "id: got 7, expected a text"},
    {"{\"ids\":[]}", "ids: got"},
    {"{\"ids\":7}", "ids: got 7, expected token ids"},
    {"{\"ids\":[1.5]}", "ids: got [1.5], expected"},
    {"{\"ids\":[-1]}", "ids: got [-1], expected"},
    {"{\"ids\":[1,\"2\"]}", "ids: got"},
    {"{\"ids\":[[1]]}", "ids: got"},
    {"{\"ids\":[99999999999]}", "ids: got"},
    {"{\"ids\":\"1,2\"}", "ids: got \"1,2\", expected"}};

static void bad_requests_stand_alone(struct check *check) {
    for (size_t i = 0; i < sizeof bad_request_cases / sizeof *bad_request_cases; i++) {
        char text[256], place[64], error[ERROR_LENGTH];
        struct options o;
        struct requests requests;
        int length = snprintf(text, sizeof text, "before\n%s\nafter\n", bad_request_cases[i].line);
        CHECK(requests_of(&o, "m|--stop|end", text, (size_t)length, &requests, error), "%s", error);
        struct request_spec *r = requests.specs;
        int n = requests.n;
        CHECK(n == 3 && !r[0].error && !r[2].error && r[2].n_stop == 1, "%s: %d",
              bad_request_cases[i].line, n);
        if (n == 3) {
            snprintf(place, sizeof place, "%s:2: ", o.file);
            CHECK(r[1].error && strstr(r[1].error, bad_request_cases[i].words) &&
                      !strncmp(r[1].error, place, strlen(place)),
                  "%s: %s", bad_request_cases[i].line, r[1].error ? r[1].error : "no error");
        }
        requests_free(&requests);
        cli_free(&o);
    }
}

static void damaged_requests(struct check *check) {
    static const char *const lines[] = {
        "{\"prompt\":\"a\\u00e9\",\"n\":3,\"stop\":[\"p\",\"q\"],\"seed\":7}\n",
        "{\"ids\":[1, 2,3],\"temperature\":0.5,\"id\":\"x\"}\n", "plain\n"};
    static const char bytes[] = "\"\\{}[],:0123456789-.e \n\r\xE2\x01";
    uint64_t state = 4;
    int n_good = 0, n_bad = 0;
    for (int round = 0; round < 300; round++) {
        char text[1024] = "", error[ERROR_LENGTH];
        for (int i = 0; i < 8; i++)
            strcat(text, lines[draw(&state, 3)]);
        size_t length = strlen(text) - draw(&state, 20);
        for (uint32_t left = draw(&state, 6); left > 0; left--)
            text[draw(&state, (uint32_t)length)] = bytes[draw(&state, sizeof bytes)];
        struct options o;
        struct requests requests;
        CHECK(requests_of(&o, "m", text, length, &requests, error), "%s", error);
        struct request_spec *r = requests.specs;
        for (int i = 0; i < requests.n; i++) {
            n_bad += r[i].error != NULL;
            n_good += !r[i].error;
            CHECK(r[i].error || !r[i].prompt != !r[i].ids, "request %d of %s", i, text);
        }
        requests_free(&requests);
        cli_free(&o);
    }
    CHECK(n_good > 100 && n_bad > 100, "%d good, %d bad", n_good, n_bad);
}

static void files_are_read_whole(struct check *check) {
    size_t length = 0;
    char error[ERROR_LENGTH] = "", path[64];
    CHECK(!cli_read_file("no/such/file", &length, error), "a file that is not there");
    CHECK(!strcmp(error, "no/such/file: No such file or directory"), "%s", error);
    CHECK(!cli_read_file("test", &length, error), "a folder");
    CHECK(!strcmp(error, "test: Is a directory"), "%s", error);
    for (size_t size = 0; size < 40000; size = 3 * size + 1365) {
        FILE *file = tmpfile();
        for (size_t i = 0; file && i < size; i++)
            fputc((int)(i * 7 % 256), file);
        snprintf(path, sizeof path, "/dev/fd/%d", file ? fileno(file) : -1);
        if (file)
            rewind(file);
        char *text = cli_read_file(path, &length, error);
        CHECK(text && length == size && text[length] == 0, "%zu of %zu: %s", length, size, error);
        for (size_t i = 0; text && i < length; i++)
            CHECK((unsigned char)text[i] == i * 7 % 256, "byte %zu", i);
        free(text);
        if (file)
            fclose(file);
    }
    struct options o;
    struct requests requests;
    CHECK(parse(&o, "m|-f|no/such/file", error) &&
              !requests_read(&requests, o.file, &o.request, error),
          "-f");
    CHECK(!strncmp(error, "no/such/file: ", 14), "%s", error);
    cli_free(&o);
}

/* The first prefix of `text` that ends with a stop text: where that begins (the longest counts). */
static bool stop_by_definition(const char *text, size_t length, char *const *stop, int n_stop,
                               size_t *start) {
    for (size_t end = 1; end <= length; end++) {
        bool found = false;
        for (int i = 0; i < n_stop; i++) {
            size_t size = strlen(stop[i]);
            if (size <= end && !memcmp(text + end - size, stop[i], size)) {
                *start = found && *start < end - size ? *start : end - size;
                found = true;
            }
        }
        if (found)
            return true;
    }
    return false;
}

/* How many bytes at the end begin a stop text. */
static size_t held_by_definition(const char *text, size_t length, char *const *stop, int n_stop) {
    for (size_t held = length; held > 0; held--) {
        for (int i = 0; i < n_stop; i++)
            if (strlen(stop[i]) > held && !memcmp(stop[i], text + length - held, held))
                return held;
    }
    return 0;
}

static void stops_are_found(struct check *check) {
    char *stop[] = {"\nUser:", "</s>", "s>"};
    size_t safe = 0;
    CHECK(!requests_stop("Hello\n", 6, stop, 3, &safe) && safe == 5, "%zu", safe);
    CHECK(!requests_stop("Hello\nUs", 8, stop, 3, &safe) && safe == 5, "%zu", safe);
    CHECK(!requests_stop("Hello\nUse", 9, stop, 3, &safe) && safe == 5, "%zu", safe);
    CHECK(!requests_stop("Hello\nUses", 10, stop, 3, &safe) && safe == 9, "%zu", safe);
    CHECK(requests_stop("Hello\nUses> x", 13, stop, 3, &safe) && safe == 9, "%zu", safe);
    safe = 0;
    CHECK(requests_stop("a</s>", 5, stop, 3, &safe) && safe == 1, "the longer of two: %zu", safe);
    safe = 0;
    CHECK(!requests_stop("anything", 8, stop, 0, &safe) && safe == 8, "no stop texts: %zu", safe);
    CHECK(!requests_stop("", 0, stop, 3, &(size_t){0}), "no text");
}

static void stops_match_the_definition(struct check *check) {
    uint64_t state = 5;
    int n_found = 0, n_held = 0;
    for (int round = 0; round < 20000; round++) {
        char text[25] = "", words[4][6] = {""};
        char *stop[4] = {words[0], words[1], words[2], words[3]};
        int n_stop = (int)draw(&state, 4) + 1;
        for (int i = 0; i < n_stop; i++)
            for (uint32_t left = 1 + draw(&state, 5); left > 0; left--)
                words[i][left - 1] = "ab"[draw(&state, 2)];
        size_t length = draw(&state, 24), safe = 0, start = 0, reached = 0;
        for (size_t i = 0; i < length; i++)
            text[i] = "abc"[draw(&state, 3)];
        bool found = false;
        while (!found && reached < length) { /* in random pieces, as tokens come */
            size_t piece = 1 + draw(&state, 5), before = safe;
            reached = reached + piece < length ? reached + piece : length;
            found = requests_stop(text, reached, stop, n_stop, &safe);
            CHECK(safe >= before, "%s: shown text was taken back: %zu, %zu", text, before, safe);
            size_t held = held_by_definition(text, reached, stop, n_stop);
            CHECK(found || safe == reached - held, "%s: holds %zu of %zu, not %zu", text,
                  reached - safe, reached, held);
            n_held += !found && held > 0;
        }
        bool expected = stop_by_definition(text, length, stop, n_stop, &start);
        CHECK(found == expected && (!found || safe == start), "%s: %d at %zu, not %d at %zu", text,
              found, safe, expected, start);
        n_found += found;
    }
    CHECK(n_found > 1000 && n_found < 19900 && n_held > 1000, "%d found, %d held", n_found, n_held);
}

static const char *const help_words[] = {"usage: dynamo MODEL",
                                         "-p TEXT",
                                         "--ids 1,15,7",
                                         "-f FILE",
                                         "-n N",
                                         "-t T",
                                         "--top-p P",
                                         "--top-k K",
                                         "--min-p P",
                                         "--seed S",
                                         "--stop TEXT",
                                         "--system TEXT",
                                         "--devices LIST",
                                         "--prefill LIST",
                                         "--decode LIST",
                                         "--tp N",
                                         "--colocate",
                                         "--kv-device SIZE",
                                         "--kv-host SIZE",
                                         "--kv-type f32|bf16",
                                         "--kv-policy on-evict|write-through",
                                         "--max-batch N",
                                         "--chunk N",
                                         "--threads N",
                                         "--tokenizer FILE",
                                         "--json",
                                         "--stats",
                                         "--verbose",
                                         "--version",
                                         "--help",
                                         "--tokenize FILE",
                                         "--perplexity FILE",
                                         "--logits FILE",
                                         "[prompt]",
                                         "[ids]",
                                         "[temperature]",
                                         "[top_p]",
                                         "[stop]",
                                         "  dynamo model.bin -f"};

static void help_is_whole(struct check *check) {
    char *text = NULL;
    size_t length = 0;
    FILE *stream = open_memstream(&text, &length);
    cli_help(stream);
    fclose(stream);
    for (size_t i = 0; i < sizeof help_words / sizeof *help_words; i++)
        CHECK(strstr(text, help_words[i]), "%s is not in --help", help_words[i]);
    for (char *line = text, *end; *line; line = end + 1) {
        end = strchr(line, '\n');
        CHECK(end - line <= 100, "%.*s", (int)(end - line), line);
    }
    free(text);
}

/* What cli_progress writes to stderr, if that is a terminal or if it is a pipe. */
static int progress_shown(struct check *check, bool terminal, char *shown, int size) {
    int ours, theirs, ends[2], kept = dup(2);
    if (terminal) {
        theirs = child_terminal(&ours) ? open(ptsname(ours), O_RDWR | O_NOCTTY) : -1;
    } else {
        theirs = pipe(ends) == 0 ? ends[1] : -1;
        ours = ends[0];
    }
    CHECK(theirs >= 0, "no %s", terminal ? "terminal" : "pipe");
    if (theirs < 0)
        return 0;
    fcntl(ours, F_SETFL, O_NONBLOCK);
    fflush(stderr);
    dup2(theirs, 2);
    cli_progress("loading", 0, 4);
    cli_progress("loading", 1, 4); /* too soon for a bar */
    usleep((PROGRESS_MS + 50) * 1000);
    cli_progress("loading", 2, 4);
    cli_progress("loading", 4, 4);
    fflush(stderr);
    dup2(kept, 2);
    int n = (int)read(ours, shown, (size_t)size - 1);
    shown[n > 0 ? n : 0] = 0;
    close(kept);
    close(theirs);
    close(ours);
    return n > 0 ? n : 0;
}

static void loading_shows_a_bar(struct check *check) {
    char shown[400];
    progress_shown(check, true, shown, sizeof shown);
    CHECK(!strcmp(shown, "\rloading [###############               ] 50%\033[K\r\033[K"), "%s",
          shown);
    CHECK(progress_shown(check, false, shown, sizeof shown) == 0, "into a pipe: %s", shown);
}

int main(int argc, char **argv) {
    static const struct test tests[] = {
        {"defaults_hold", defaults_hold},
        {"every_option_is_read", every_option_is_read},
        {"good_values", good_values},
        {"bad_lines", bad_lines},
        {"requests_are_read", requests_are_read},
        {"bad_requests_stand_alone", bad_requests_stand_alone},
        {"damaged_requests", damaged_requests},
        {"files_are_read_whole", files_are_read_whole},
        {"stops_are_found", stops_are_found},
        {"stops_match_the_definition", stops_match_the_definition},
        {"help_is_whole", help_is_whole},
        {"loading_shows_a_bar", loading_shows_a_bar},
    };
    return check_run(tests, sizeof tests / sizeof *tests, argc, argv);
}
