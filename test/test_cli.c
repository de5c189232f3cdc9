/* test_cli.c: every option with good and bad values, contradictions, request files line by line,
 * the stop-text matcher against a definition that looks at one byte at a time, --help, and the bar
 * that loading shows. */
#define _GNU_SOURCE
#define JSON_IMPLEMENTATION
#define CLI_IMPLEMENTATION
#include <time.h>

/* For cli.h, time passes when a test says so. */
static struct timespec test_time;
static int test_clock(clockid_t clock, struct timespec *now) {
    (void)clock;
    *now = test_time;
    return 0;
}
#define clock_gettime test_clock
#include "../lib/json.h"
#include "../lib/cli.h"
#undef clock_gettime
#include "files.h"

/* Parses a command line: words that blanks separate; one in ' holds blanks, or nothing. */
static bool parse(struct options *options, const char *line, char error[ERROR_LENGTH]) {
    static char words[2048]; /* options point into it */
    char *argv[80] = {"dynamo"};
    int argc = 1;
    snprintf(words, sizeof words, "%s", line);
    for (char *at = words; *at; at += *at == ' ') {
        bool quoted = *at == '\'';
        at += quoted;
        argv[argc++] = at;
        at += strcspn(at, quoted ? "'" : " ");
        if (*at)
            *at++ = 0;
        else
            break;
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
    CHECK(!o.kv_device.given && !o.kv_host.given && o.devices.n == 0 && !cli_given(o.given, "-n"),
          "given");
    cli_free(&o);
}

static void every_option_is_read(struct check *check) {
    struct options o;
    char error[ERROR_LENGTH];
    CHECK(parse(&o,
                "--ids '1,15, 7' -n 5 m.gguf -t 0.25 --top-p=0.5 --top-k 40 --min-p 1e-2 --seed "
                "18446744073709551615 --stop end --stop=--json --devices cpu:8 "
                "--prefill 0-3 --decode 6,5,4,7 --tp 2 --kv-device 8b --kv-host 3G --kv-type bf16 "
                "--kv-policy write-through --max-batch 7 --chunk 64 --threads 3 --json --stats "
                "--verbose --tokenizer t.bin --copy-delay 9",
                error),
          "%s", error);
    const struct request_spec *r = &o.request;
    CHECK(r->n_ids == 3 && r->ids[0] == 1 && r->ids[1] == 15 && r->ids[2] == 7, "%d", r->n_ids);
    CHECK(r->n == 5 && r->sampling.temperature == 0.25f && r->sampling.top_p == 0.5f, "%d", r->n);
    CHECK(r->sampling.top_k == 40 && r->sampling.min_p == 0.01f, "%d", r->sampling.top_k);
    CHECK(r->sampling.seed == UINT64_MAX, "%llu", (unsigned long long)r->sampling.seed);
    CHECK(r->n_stop == 2 && !strcmp(r->stop[0], "end") && !strcmp(r->stop[1], "--json"), "stop");
    CHECK(!r->system && !strcmp(o.model, "m.gguf"), "%s", o.model);
    CHECK(o.devices.cpu && o.devices.n == 8 && o.devices.index[7] == 7, "%d", o.devices.n);
    CHECK(o.prefill.n == 4 && o.prefill.index[3] == 3 && !o.prefill.cpu, "%d", o.prefill.n);
    CHECK(o.decode.n == 4 && o.decode.index[0] == 6 && o.decode.index[2] == 4, "decode");
    CHECK(o.tp == 2 && o.tp_prefill == 2 && o.tp_decode == 2 && o.max_batch == 7 && o.chunk == 64 &&
              o.threads == 3,
          "%d", o.tp);
    CHECK(o.kv_device.value == 8 && o.kv_device.blocks && o.kv_device.given, "kv-device");
    CHECK(o.kv_host.value == 3ll << 30 && !o.kv_host.blocks && o.kv_host.given, "kv-host");
    CHECK(o.kv_type == 2 && o.kv_policy == 2, "%d", o.kv_type);
    CHECK(o.json && o.stats && o.verbose && !o.colocate && !o.help && !o.version, "flags");
    CHECK(!strcmp(o.tokenizer, "t.bin"), "%s", o.tokenizer);
    CHECK(o.copy_delay == 9 && cli_given(o.given, "--seed") && !cli_given(o.given, "-p"), "given");
    cli_free(&o);
    CHECK(parse(&o, "m -p -hello --system 'be brief' --colocate --kv-policy on-evict --kv-type=f32",
                error),
          "%s", error);
    CHECK(!strcmp(o.request.system, "be brief"), "%s", o.request.system);
    CHECK(!strcmp(o.request.prompt, "-hello") && o.request.prompt_length == 6, "prompt");
    CHECK(o.colocate && o.kv_policy == 1 && o.kv_type == 1, "kv");
    cli_free(&o);
    CHECK(parse(&o, "m --tp-decode 4 --tp 2", error) && o.tp_prefill == 2 && o.tp_decode == 4,
          "widths: %d, %d", o.tp_prefill, o.tp_decode);
    CHECK(parse(&o, "m -f a --auto 60 --itl 25", error) && o.role_seconds == 60, "%s", error);
    cli_free(&o);
    CHECK(parse(&o, "m --fail 1@2.5 --fail 0@0-4 --fail 2@#9", error) && o.n_failures == 3, "%s",
          error);
    CHECK(o.failures[0].worker == 1 && o.failures[0].at == 2.5 && o.failures[0].back > 1e300 &&
              o.failures[1].worker == 0 && o.failures[1].at == 0 && o.failures[1].back == 4 &&
              o.failures[1].step == 0 && o.failures[2].worker == 2 && o.failures[2].step == 9,
          "failures");
    CHECK(parse(&o, "m -f a.txt", error) && !strcmp(o.file, "a.txt"), "%s", error);
    CHECK(parse(&o, "m --tokenize b", error) && !strcmp(o.tokenize, "b"), "%s", error);
    CHECK(parse(&o, "m --perplexity c", error) && !strcmp(o.perplexity, "c"), "%s", error);
    CHECK(parse(&o, "m --logits d -p a", error) && !strcmp(o.logits, "d"), "%s", error);
    CHECK(parse(&o, "--help", error) && o.help && !o.model, "%s", error);
    CHECK(parse(&o, "--version", error) && o.version, "%s", error);
    CHECK(parse(&o, "m -p ''", error) && o.request.prompt_length == 0, "an empty prompt: %s",
          error);
}

/* What people type who know other programs. */
static void other_names_are_known(struct check *check) {
    static const char *const lines[] = {
        "m -p x -n 5 -t 0.5", "-m m --prompt x --n-predict 5 --temp 0.5",
        "--prompt=x --n-predict=5 --temp=0.5 -m=m", "-p x -t 0.5 -n 5 -- m"};
    struct options o;
    char error[ERROR_LENGTH];
    for (size_t i = 0; i < COUNT(lines); i++) {
        CHECK(parse(&o, lines[i], error), "%s: %s", lines[i], error);
        CHECK(o.model && !strcmp(o.model, "m") && o.request.prompt &&
                  !strcmp(o.request.prompt, "x") && o.request.n == 5 &&
                  o.request.sampling.temperature == 0.5f,
              "%s", lines[i]);
    }
    CHECK(parse(&o, "-h", error) && o.help, "%s", error);
    CHECK(parse(&o, "-- -m", error) && !strcmp(o.model, "-m"), "%s", error);
    CHECK(parse(&o, "-m a=b", error) && !strcmp(o.model, "a=b"), "%s", error);
}

/* What follows the model's name. */
static void good_values(struct check *check) {
    static const char lines[] = "-n 1|-n 2147483647|-t 0|-t 100|-t 1e-3|-t .5|--top-p 0|--top-p 1|"
                                "--top-k 0|--min-p 1|--seed 0|--tp 1|--tp 4|--tp 8|--devices cpu|"
                                "--devices cpu:64|--devices 0|--devices 0,0|--devices 0-63|"
                                "--devices 3-3,1|--kv-host 0|--kv-host 0b|--kv-device 1|"
                                "--kv-device 1b|--prefill 0 --decode 1|--threads 1024|"
                                "-p a --logits f|--ids 3 --logits f|"
                                "--devices cpu:8 --prefill 0-3 --decode 4-7 --tp-decode 4|"
                                "--colocate --tp-prefill 2 --tp-decode 2|--devices cpu:3 "
                                "--tp-prefill 2|--devices 4,5 --prefill 1 --decode 0|"
                                "--ids 0|--ids 999999999";
    char error[ERROR_LENGTH], line[512], *items[64];
    struct options o;
    int n = split(lines, "|", items, 64);
    for (int i = 0; i < n; i++) {
        snprintf(line, sizeof line, "m %s", items[i]);
        CHECK(parse(&o, line, error), "%s: %s", line, error);
        cli_free(&o);
    }
    CHECK(parse(&o, "random:llama:q8_0", error), "%s", error);
    cli_free(&o);
}

/* Each of these lines (what follows the model's name) is refused by a message with these words. */
static const struct {
    const char *words, *lines;
} bad_lines_by_words[] = {
    {"x: unexpected; the model is m, a prompt is given by -p", "x"},
    {"-m: given twice", "-m x"},
    {"-x: unexpected; the model is m", "-- -x"},
    {"did you mean -t", "--temperature 1|--temperture=1|--tepm 1|--tem 1"},
    {"did you mean -n", "--max-tokens 1|--max_tokens=1|--n-predct 1|--maxtokens 1"},
    {"did you mean -p", "--promt x"},
    {"did you mean -m", "--model x"},
    {"did you mean --devices", "--gpu 0|--n_gpu_layers 9|--device cpu"},
    {"did you mean --max-batch", "--batch-size 4"},
    {"did you mean --top-p", "--top_p 1|--topp 1"},
    {"did you mean --help", "--hepl"},
    {"did you mean --seed", "--sed 1|--sede=1"},
    {"did you mean --tokenize", "--tokenise f"},
    {"did you mean --kv-host", "--kvhost 1"},
    {"did you mean --colocate", "--colocated"},
    {"unknown option; --help", "--zzzzzzzz"},
    {"unknown option; --help", "--gq|--xx 1|-x|-|--=1"},
    {"-t: given twice", "--temp 1 -t 2"},
    {"-p: missing value", "-p --temp 1"},
    {"--temp: got x, expected a number", "--temp x"},
    {"-n: missing value (N)", "-n"},
    {"-p: missing value", "-p --json"},
    {"missing value", "--seed"},
    {"missing value (f32|bf16)", "--kv-type"},
    {"--json: got 1, expected no value", "--json=1"},
    {"-n: given twice", "-n 1 -n 2"},
    {"given twice", "--json --json|-p a -p b"},
    {"-n: got 0, expected a whole number from 1", "-n 0"},
    {"got -1", "-n -1"},
    {"to 2147483647", "-n 2147483648"},
    {"1@2.5",
     "--fail 1|--fail @1|--fail 1@|--fail 1@-1|--fail 1@2-2|--fail 1@2-|--fail 1@x|--fail 1@#|"
     "--fail 1@#0|--fail 1@#x|--fail 1@#1.5|--fail #1"},
    {"--fail: got 1@3, expected a worker once, 16 at most: 1@2.5 or 1@2-4",
     "--fail 1@2 --fail 1@3|--fail 1@#2 --fail 0@1 --fail 1@3|--fail 1@2-4 --fail 1@3"},
    {"--fail: got 1@#3, expected", "--fail 1@2 --fail 1@#3"},
    {"whole", "-n 1.5|-n 1e3|--seed 1.0|--seed ''|--seed +1|--copy-delay x"},
    {"got x", "-n x"},
    {"expected", "-n ''|-n ' 5'|-n '5 '|-n 5x|-n --5|-n 99999999999999999999999"},
    {"from 0 to 100", "-t -0.1"},
    {"from 0", "-t 101|-t 1e999|-t ''|-t 1,5|--top-p -1|--top-k -1|--seed -1"},
    {"got nan", "-t nan"},
    {"got inf", "-t inf"},
    {"got 0x1", "-t 0x1"},
    {"from", "-t ."},
    {"from 0 to 1", "--top-p 1.01|--min-p 2"},
    {"to 18446744073709551615", "--seed 18446744073709551616"},
    {"--stop: got", "--stop ''"},
    {"1, 2, 4 or 8", "--tp 3|--tp-prefill 6|--tp-decode 5"},
    {"from 1 to 8", "--tp 0|--tp 16|--tp-prefill 0|--tp-decode 9"},
    {"token ids", "--ids ''|--ids 1,|--ids ,1|--ids 1,,2|--ids -1|--ids 1.5|--ids 1;2|--ids a|"
                  "--ids 99999999999|--ids 1]"},
    {"--kv-device: got 0", "--kv-device 0"},
    {"bytes such as", "--kv-device -1"},
    {"bytes", "--kv-device 1.5G|--kv-device b|--kv-device ''|--kv-device 1T|--kv-device 1GB|"
              "--kv-host '8 b'|--kv-host 99999999999G|--kv-host -0b1"},
    {"expected f32|bf16", "--kv-type f16|--kv-type f3"},
    {"expected f32", "--kv-type ''"},
    {"--kv-policy: got f32", "--kv-policy f32 bf16"},
    {"on-evict|write-through", "--kv-policy write"},
    {"from 1", "--threads 0|--max-batch 0|--chunk 0"},
    {"--max-queue: got -1", "--max-queue -1"},
    {"to 1024", "--threads 1025"},
    {"cpu:N",
     "--devices ''|--devices cpu:0|--devices cpu:1025|--devices cpu:|--devices cpux|--devices gpu|"
     "--devices 1,|--devices ,1|--devices 3-1|--devices 0-|--devices 0--1"},
    {"cpu", "--devices cpu:2,3|--devices -1"},
    {"at most 1024", "--devices 0-1024"},
    {"1024", "--devices 0-511,0-512|--devices 0-999999999|--devices 99999999999"},
    {"--prefill: got cpu, expected positions", "--prefill cpu --decode 0"},
    {"--decode: got cpu:2, expected positions", "--prefill 0 --decode cpu:2"},
    {"--tp: --tp-prefill and --tp-decode leave nothing", "--tp 2 --tp-prefill 1 --tp-decode 2"},
    {"--prefill: needs --decode", "--prefill 0"},
    {"needs --prefill", "--decode 0"},
    {"groups of 2", "--devices cpu:3 --tp 2|--prefill 0,1 --decode 2 --tp 2"},
    {"--tp-decode: every list of devices must divide into groups of 4",
     "--prefill 0 --decode 1,2 --tp-decode 4"},
    {"--tp-prefill is 2 and --tp-decode 1", "--colocate --tp-prefill 2"},
    {"-p and --ids exclude each other", "-p a --ids 1"},
    {"exclude each other", "-p a -f b|--ids 1 -f b|--tokenize a -p b"},
    {"exclude",
     "--tokenize a -f b|--tokenize a --ids 1|--tokenize a --perplexity b|--perplexity a -p b"},
    {"--logits: needs -p or --ids", "--logits a -f b|--logits a"},
    {"--logits: needs", "--logits a --tokenize b|--logits a --perplexity b"},
    {"--tokenize and --trace exclude each other", "--trace a --tokenize b"},
    {"--logits and --trace exclude each other", "--trace a --logits b -p c"},
    {"-p and --replay exclude each other", "-p a --replay b"},
    {"exclude each other", "-n 3 --replay b|--stop a --replay b|--system a --replay b|"
                           "--stats --replay b|--template none --replay b"},
    {"exclude each other", "-n 3 --perplexity a|--stop a --perplexity b|"
                           "--system a --perplexity b|--template none --perplexity b|"
                           "--stats --perplexity b|--json --perplexity b"},
    {"exclude each other", "--json --tokenize a|-n 3 --logits a -p b|--json --logits a --ids 1"},
    {"write-through needs a host tier", "--kv-host 0 --kv-policy write-through"},
    {"--ttft: needs --replay, --sim or --plan", "-f a --ttft 3"},
    {"--itl: needs --replay, --sim, --plan or --auto", "-f a --itl 3"},
    {"exclude each other", "-f a --colocate --auto 60|-f a --plan h100 --auto 60|"
                           "--tokenize a --auto 60|--perplexity a --auto 60"},
    {"--sim and --plan exclude each other", "--replay a --sim h100 --plan h100"},
    {"needs --replay or -f", "--sim h100|--plan h100"},
    {"exclude each other",
     "-f a --sim h100 --stats|-f a --sim h100 --stop x|-f a --plan h100 --stop x|"
     "-f a --sim h100 --threads 2|-f a --plan h100 --threads 2|"
     "-f a --sim h100 --copy-delay 1|-f a --plan h100 --copy-delay 1|"
     "-f a --plan h100 --stats"},
    {"needs --replay", "--rate 1|--limit 2"},
    {"--rates: needs --sim or --plan", "--rates f"},
    {"expected a number from", "--rate 0 --replay a|--ttft 0|--itl -1|--auto 0"},
    {"needs --serve", "--host a|--api-key a|--api-key-file f"},
    {"exclude each other", "-p a --serve 1|-f a --serve 1|--serve 1 --json|--serve 1 --stats"},
    {"expected a whole number from 0 to 65535", "--serve 65536|--serve -1|--serve a"},
    {"--colocate and --prefill", "--colocate --prefill 0 --decode 1"},
    {"--decode: needs --prefill", "--colocate --decode 1"},
    {"got ?[31m?", "--kv-type '\x1b[31m\n'"}};

static void refuse_line(struct check *check, const char *line, const char *words) {
    struct options o;
    char error[ERROR_LENGTH];
    CHECK(!parse(&o, line, error), "%s", line);
    CHECK(strstr(error, words) && !strchr(error, '\n'), "%s: %s", line, error);
    cli_free(&o);
}

/* What a way to run does not know is refused, of all options and all ways. */
static void each_way_knows_its_options(struct check *check) {
    static const char *const ways[128] = {['c'] = "",
                                          ['p'] = "-p a",
                                          ['i'] = "--ids 1",
                                          ['f'] = "-f a",
                                          ['t'] = "--tokenize a",
                                          ['x'] = "--perplexity a",
                                          ['l'] = "--logits a -p b",
                                          ['L'] = "--logits a --ids 1",
                                          ['r'] = "--replay a",
                                          ['s'] = "--sim h100 --replay a",
                                          ['S'] = "--sim h100 -f a",
                                          ['P'] = "--plan h100 --replay a",
                                          ['Q'] = "--plan h100 -f a",
                                          ['v'] = "--serve 0"};
    static const struct {
        const char *options, *ways; /* those in which they have one */
    } rows[] = {
        {"-p a", "c"},
        {"--ids 1", "c"},
        {"-f a", "c"},
        {"--tokenize a", "c"},
        {"--perplexity a", "c"},
        {"--logits a", "pi"},
        {"--replay a", "c"},
        {"--serve 0", "c"},
        {"--sim h100", "fr"},
        {"--plan h100", "fr"},
        {"--tokenizer a", "cpiftxlLSQv"},
        {"-n 3", "cpifSQv"},
        {"-t 1|--top-p 1|--top-k 1|--min-p 1", "cpifrv"},
        {"--seed 1", "cpifrsSPQv"},
        {"--stop a", "cpifv"},
        {"--system a", "cpfSQv"},
        {"--template none", "cpifSQv"},
        {"--devices cpu:2|--prefill 0 --decode 1|--tp 2|--tp-prefill 2|--tp-decode 2",
         "cpifxlLrsSv"},
        {"--colocate|--verbose", "cpifxlLrsSv"},
        {"--auto 1|--trace a|--fail 1@2", "cpifrsSv"},
        {"--threads 2", "cpifxlLrv"},
        {"--kv-device 1b|--kv-host 1b|--kv-type f32|--chunk 2", "cpifxlLrsSPQv"},
        {"--kv-policy on-evict|--max-batch 2|--max-queue 2", "cpifrsSPQv"},
        {"--host a|--api-key a|--api-key-file a", "v"},
        {"--rate 1", "rs"},
        {"--limit 1", "rsP"},
        {"--ttft 1|--itl 1", "rsSPQ"},
        {"--rates a", "sSPQ"},
        {"--json", "cpifrsSPQ"},
        {"--stats", "cpif"},
        {"--watch", "pifrv"},
        {"--copy-delay 1", "cpifrv"},
        {"--help|--version", "cpiftxlLrsSPQv"},
        {"-m n", ""},
    };
    option_set seen = 0;
    for (size_t i = 0; i < COUNT(rows); i++) {
        char line[256], error[ERROR_LENGTH], *items[8];
        int n = split(rows[i].options, "|", items, 8);
        for (int k = 0; k < n; k++)
            for (int way = 0; way < 128; way++) {
                struct options o;
                if (!ways[way])
                    continue;
                snprintf(line, sizeof line, "m %s %s", ways[way], items[k]);
                bool good = parse(&o, line, error);
                CHECK(good == (strchr(rows[i].ways, way) != NULL), "%s: %s", line, error);
                seen |= o.given;
                cli_free(&o);
            }
    }
    for (int row = 0; row < N_ROWS; row++)
        CHECK(!option_rows[row].name || seen >> row & 1, "%s is nowhere", option_rows[row].name);
}

static void bad_lines(struct check *check) {
    char line[700] = "m --stop a", *items[64];
    refuse_line(check, "", "no model");
    refuse_line(check, "--json", "no model");
    for (int i = 1; i <= VALUE_STOPS; i++)
        strcat(line, " --stop a");
    refuse_line(check, line, "at most 16");
    snprintf(line, sizeof line, "m");
    for (int i = 0; i <= VALUE_FAILURES; i++)
        snprintf(line + strlen(line), 24, " --fail %d@1", i);
    refuse_line(check, line, "--fail: got 16@1, expected a worker once, 16 at most");
    for (size_t i = 0; i < COUNT(bad_lines_by_words); i++) {
        int n = split(bad_lines_by_words[i].lines, "|", items, 64);
        for (int k = 0; k < n; k++) {
            snprintf(line, sizeof line, "m %s", items[k]);
            refuse_line(check, line, bad_lines_by_words[i].words);
        }
    }
}

static bool read_all(struct requests *requests, const char *path,
                     const struct request_spec *defaults, char error[ERROR_LENGTH]) {
    struct request_spec spec;
    int got = requests_open(requests, path, error) ? 1 : -1;
    while (got > 0 && (got = requests_next(requests, defaults, &spec, error)) > 0)
        requests_add(requests, &spec);
    return got == 0;
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
    good = good && read_all(requests, options->file, &options->request, error);
    fclose(file);
    return good;
}

static void requests_are_read(struct check *check) {
    static const char text[] =
        "a plain line \n\n"
        "\xEF\xBB\xBF not {JSON}\n"
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
    CHECK(requests_of(&o, "m -n 9 --seed 5 --stop end --system sys", text, sizeof text - 1,
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
    CHECK(!strcmp(r[1].prompt, " not {JSON}"), "%s", r[1].prompt);
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
    const char *words, *lines;
} bad_requests_by_words[] = {
    {"byte 1: expected", "{"},
    {"byte 13", "{'prompt':'a'"},
    {"byte 2: expected a key", " {not JSON}"},
    {"cancel: expected no other key", "{'cancel':'a','id':'b'}|{'prompt':'a','cancel':'a'}"},
    {"cancel: got 1, expected a text", "{'cancel':1}"},
    {"byte 15", "{'prompt':'a'} x"},
    {"one of prompt, ids and messages",
     "{}|{'n':1}|{'prompt':'a','ids':[1]}|{'ids':[1],'messages':[{'role':'user','content':'a'}]}|"
     "{'prompt':'a','messages':[{'role':'user','content':'a'}]}"},
    {"at: got -1, expected a number from 0 to 1000000", "{'prompt':'a','at':-1}"},
    {"at: got \"1\", expected a number", "{'prompt':'a','at':'1'}"},
    {"deadline: got 1e7, expected a number", "{'prompt':'a','deadline':1e7}"},
    {"after: got 7, expected a text", "{'prompt':'a','after':7}"},
    {"messages: got \"a\", expected a list", "{'messages':'a'}"},
    {"messages: number 1: got role none and no content, expected user",
     "{'messages':[1]}|{'messages':['a']}|{'messages':[{}]}|{'messages':[{'role':1}]}"},
    {"number 1: got role user and no content",
     "{'messages':[{'role':'user'}]}|{'messages':[{'role':'user','content':5}]}"},
    {"messages: got a part of content that is not text",
     "{'messages':[{'role':'user','content':['a']}]}|"
     "{'messages':[{'role':'user','content':[{'type':'image_url','text':'a'}]}]}"},
    {"messages: got a content without parts", "{'messages':[{'role':'user','content':[]}]}"},
    {"messages: number 1: got tool_calls",
     "{'messages':[{'role':'user','content':'a','tool_calls':[{}]}]}"},
    {"number 1: got role assistant, expected user",
     "{'messages':[{'role':'assistant','content':'a'}]}"},
    {"number 2: got role user, expected assistant",
     "{'messages':[{'role':'user','content':'a'},{'role':'user','content':'a'}]}"},
    {"number 2: got role system, expected assistant",
     "{'messages':[{'role':'user','content':'a'},{'role':'system','content':'a'}]}"},
    {"expected the last to be the user's",
     "{'messages':[]}|{'messages':[{'role':'system','content':'a'}]}|"
     "{'messages':[{'role':'user','content':'a'},{'role':'assistant','content':'a'}]}"},
    {"prompt: got 1, expected a text", "{'prompt':1}"},
    {"promt: unknown key; did you mean prompt", "{'promt':'a'}"},
    {"max_tokens: unknown key; did you mean n", "{'max_tokens':3}"},
    {"temp: unknown key; did you mean temperature", "{'temp':3}"},
    {"topp: unknown key; did you mean top_p", "{'topp':3}"},
    {"model: unknown key; --help", "{'model':'a'}"},
    {"unknown key", "{'prompt':'a','n\\u0000':1}"},
    {"json: unknown key", "{'prompt':'a','json':true}"},
    {"prompt: given twice", "{'prompt':'a','prompt':'b'}"},
    {"n: got 0, expected", "{'prompt':'a','n':0}"},
    {"n: got 1.5, expected", "{'prompt':'a','n':1.5}"},
    {"n: got \"1\", expected a whole number", "{'prompt':'a','n':'1'}"},
    {"n: got null, expected", "{'prompt':'a','n':null}"},
    {"top_p: got 2, expected a number from 0 to 1", "{'prompt':'a','top_p':2}"},
    {"temperature: got 1e999", "{'prompt':'a','temperature':1e999}"},
    {"seed: got -1", "{'prompt':'a','seed':-1}"},
    {"stop: got", "{'prompt':'a','stop':''}"},
    {"stop: got 1, expected", "{'prompt':'a','stop':[1]}"},
    {"stop: got [\"a", "{'prompt':'a','stop':[['a']]}"},
    {"zero byte", "{'prompt':'a','stop':['a\\u0000']}|{'prompt':'a','system':'a\\u0000'}"},
    {"id: got 7, expected a text", "{'prompt':'a','id':7}"},
    {"ids: got", "{'ids':[]}|{'ids':[1,'2']}|{'ids':[[1]]}|{'ids':[99999999999]}"},
    {"ids: got 7, expected token ids", "{'ids':7}"},
    {"ids: got [1.5], expected", "{'ids':[1.5]}"},
    {"ids: got [-1], expected", "{'ids':[-1]}"},
    {"ids: got \"1,2\", expected", "{'ids':'1,2'}"}};

static void bad_requests_stand_alone(struct check *check) {
    for (size_t i = 0; i < COUNT(bad_requests_by_words); i++) {
        char text[512], place[64], error[ERROR_LENGTH], *items[64];
        int n = split(bad_requests_by_words[i].lines, "|", items, 64);
        for (int k = 0; k < n; k++) {
            struct options o;
            struct requests requests;
            snprintf(text, sizeof text, "before\n%s\nafter\n", items[k]);
            size_t length = (size_t)put_json(text, text);
            CHECK(requests_of(&o, "m --stop end", text, length, &requests, error), "%s", error);
            struct request_spec *r = requests.specs;
            CHECK(requests.n == 3 && !r[0].error && !r[2].error && r[2].n_stop == 1, "%s: %d",
                  items[k], requests.n);
            snprintf(place, sizeof place, "%s:2: ", o.file);
            const char *got = requests.n == 3 && r[1].error ? r[1].error : "no error";
            CHECK(strstr(got, bad_requests_by_words[i].words) &&
                      !strncmp(got, place, strlen(place)),
                  "%s: %s", items[k], got);
            requests_free(&requests);
            cli_free(&o);
        }
    }
}

static void loads_are_read(struct check *check) {
    static const char text[] =
        "{\"id\": \"a\", \"prompt\": \"x\", \"at\": 1.5, \"deadline\": 2e1, \"seed\": 4}\n"
        "{\"after\": \"a\", \"ids\": [1]}\n"
        "{\"messages\": [{\"role\": \"developer\", \"content\": \"s\"}, {\"content\": "
        "\"u\\u0000\", "
        "\"name\": {\"role\": 1}, \"role\": \"user\"}, {\"role\": \"assistant\", \"content\": "
        "\"\"}, {\"role\": \"user\", \"content\": [{\"text\": \"la\", \"type\": \"text\"}, "
        "{\"text\": \"\"}, {\"text\": \"s\\u0074\"}]}]}\nplain";
    struct options o;
    struct requests requests;
    char error[ERROR_LENGTH];
    CHECK(requests_of(&o, "m --max-queue 7", text, sizeof text - 1, &requests, error), "%s", error);
    CHECK(o.max_queue == 7, "%d", o.max_queue);
    struct request_spec *r = requests.specs;
    CHECK(requests.n == 4, "%d requests", requests.n);
    for (int i = 0; i < requests.n; i++)
        CHECK(!r[i].error, "%s", r[i].error);
    if (requests.n == 4) {
        CHECK(r[0].at == 1.5f && r[0].deadline == 20 && r[0].seeded && !r[0].after, "the first");
        CHECK(!strcmp(r[1].after, "a") && r[1].at == 0 && r[1].deadline == 0 && !r[1].seeded,
              "a turn");
        CHECK(!strcmp(r[2].system, "s") && r[2].n_earlier == 2 && r[2].earlier[0].length == 2 &&
                  r[2].earlier[1].length == 0 && !strcmp(r[2].prompt, "la\n\nst") &&
                  r[2].prompt_length == 6,
              "messages");
        CHECK(!r[3].system && r[3].n_earlier == 0 && !r[3].seeded, "text");
    }
    requests_free(&requests);
    cli_free(&o);
}

/* A line is there when it has been written, not when the file ends. */
static void lines_come_one_by_one(struct check *check) {
    int ends[2];
    char path[32], error[ERROR_LENGTH] = "";
    struct requests requests = {0};
    struct request_spec spec, defaults = {.n = 3};
    CHECK(pipe(ends) == 0, "no pipe");
    snprintf(path, sizeof path, "/dev/fd/%d", ends[0]);
    CHECK(requests_open(&requests, path, error), "%s", error);
    for (int i = 0; i < 3; i++) {
        static const char *const lines[] = {"\n\r\nfirst\r\n", "{\"n\":0}\n", "last"};
        CHECK(write(ends[1], lines[i], strlen(lines[i])) > 0, "the pipe is closed");
        if (i == 2)
            close(ends[1]);
        CHECK(requests_next(&requests, &defaults, &spec, error) == 1, "line %d: %s", i, error);
        CHECK(i == 1 ? strstr(spec.error, ":4: n: got 0") != NULL
                     : !spec.error && !strcmp(spec.prompt, i == 0 ? "first" : "last"),
              "line %d: %s", i, spec.error ? spec.error : spec.prompt);
        requests_add(&requests, &spec);
    }
    CHECK(requests_next(&requests, &defaults, &spec, error) == 0, "the end: %s", error);
    CHECK(requests.n == 3 && requests.specs[2].n == 3, "%d requests", requests.n);
    requests_free(&requests);
    close(ends[0]);
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
    struct requests requests = {0};
    CHECK(parse(&o, "m -f no/such/file", error) && !read_all(&requests, o.file, &o.request, error),
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

static void help_is_whole(struct check *check) {
    static const char words[] =
        "usage: dynamo MODEL;-m FILE;-p TEXT;--ids 1,15,7;-f FILE;-n N;-t T;"
        "--top-p P;--top-k K;--min-p P;--seed S;--stop TEXT;--system TEXT;"
        "--devices LIST;--prefill LIST;--decode LIST;--tp N;--colocate;"
        "--tp-prefill N;--tp-decode N;"
        "--kv-device SIZE;--kv-host SIZE;--kv-type f32|bf16;"
        "--kv-policy on-evict|write-through;--max-batch N;--chunk N;--max-queue N;"
        "--threads N;--tokenizer FILE;--json;--stats;--verbose;--version;"
        "--help;--tokenize FILE;--perplexity FILE;--logits FILE;[prompt];"
        "[ids];[temperature];[top_p];[stop];  dynamo model.bin -f";
    char *text = NULL, *items[64];
    size_t length = 0;
    FILE *stream = open_memstream(&text, &length);
    cli_help(stream);
    fclose(stream);
    int n = split(words, ";", items, 64);
    for (int i = 0; i < n; i++)
        CHECK(strstr(text, items[i]), "%s is not in --help", items[i]);
    for (char *line = text, *end; *line; line = end + 1) {
        end = strchr(line, '\n');
        CHECK(end - line <= 100, "%.*s", (int)(end - line), line);
    }
    free(text);
}

/* What cli_progress writes to stderr, if that is a terminal or if it is a pipe. */
static void progress_shown(struct check *check, bool terminal, const char *expected) {
    int ends[2] = {-1, -1}, kept = dup(2), length = 0;
    bool ok = terminal ? child_terminal(&ends[0]) : pipe(ends) == 0;
    ends[1] = terminal && ok ? open(ptsname(ends[0]), O_RDWR | O_NOCTTY) : ends[1];
    char shown[400] = "";
    fflush(stderr);
    dup2(ends[1], 2);
    cli_progress("loading", 0, 4);
    cli_progress("loading", 1, 4); /* too soon for a bar */
    test_time.tv_sec += PROGRESS_MS / 1000 + 1;
    cli_progress("loading", 2, 4);
    cli_progress("loading", 4, 4);
    fflush(stderr);
    dup2(kept, 2);
    close(kept);
    close(ends[1]);
    for (ssize_t n; (n = read(ends[0], shown + length, sizeof shown - 1 - (size_t)length)) > 0;)
        length += (int)n;
    close(ends[0]);
    CHECK(ok && !strcmp(shown, expected), "terminal: %d: %s", terminal, shown);
}

static void loading_shows_a_bar(struct check *check) {
    setenv("TERM", "dumb", 1);
    progress_shown(check, true, "");
    setenv("TERM", "xterm", 1);
    progress_shown(check, true, "\rloading [###############               ] 50%\033[K\r\033[K");
    progress_shown(check, false, "");
}

int main(int argc, char **argv) {
    static const struct test tests[] = {TEST(defaults_hold),
                                        TEST(every_option_is_read),
                                        TEST(other_names_are_known),
                                        TEST(good_values),
                                        TEST(bad_lines),
                                        TEST(each_way_knows_its_options),
                                        TEST(requests_are_read),
                                        TEST(bad_requests_stand_alone),
                                        TEST(loads_are_read),
                                        TEST(lines_come_one_by_one),
                                        TEST(damaged_requests),
                                        TEST(files_are_read_whole),
                                        TEST(stops_are_found),
                                        TEST(stops_match_the_definition),
                                        TEST(help_is_whole),
                                        TEST(loading_shows_a_bar)};
    return run_tests(tests, COUNT(tests), argc, argv);
}
