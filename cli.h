/* cli.h: everything between the terminal and the engine: options, request files, tables.
 *
 * One table lists every option: its name, its key in a line of a request file, its type, range
 * and help text. The command line, the request files and --help are all read from it, so an option
 * exists everywhere or nowhere. Nothing here runs a model, prints an error or ends the program:
 * what is wrong comes back as one line of text.
 *
 *     struct options options;
 *     char error[CLI_ERROR_LENGTH];
 *     if (!cli_parse(&options, argc, argv, error)) {
 *         fprintf(stderr, "dynamo: %s\n", error);
 *         return 2;
 *     }
 *     ...
 *     cli_free(&options);
 *
 * All that parsing allocates (request lists too) belongs to `struct options` and goes with it.
 * What stands in a struct after parsing is in range; 0, NULL or n == 0 means: not given. */
#ifndef CLI_H
#define CLI_H

#include "dynamo.h" /* struct sampling */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#define CLI_VERSION "0.1.0"

enum { CLI_ERROR_LENGTH = 512, CLI_DEVICES = 64, CLI_STOPS = 16, CLI_NUMBER_LENGTH = 32 };

enum cli_kv_type { CLI_KV_DEFAULT, CLI_KV_F32, CLI_KV_BF16 }; /* default: the backend's own */
enum cli_kv_policy { CLI_ON_EVICT = 1, CLI_WRITE_THROUGH };

/* 512M or 8b: bytes, or KV blocks. */
struct size {
    int64_t value;
    bool blocks, given;
};

/* `cpu:4`: cpu, 0 to 3. `0-2,5`: CUDA devices 0, 1, 2, 5. In --prefill and --decode: positions in
 * --devices, or CUDA devices where --devices is not given. */
struct device_list {
    bool cpu;
    int n;
    int index[CLI_DEVICES];
};

struct request_spec {
    char *id;             /* NULL: the file gave none */
    int line;             /* of the request file, from 1; 0 for -p and --ids */
    char *prompt;         /* NULL if ids are given; may hold zero bytes and invalid UTF-8 */
    size_t prompt_length; /* bytes */
    int *ids;             /* (n_ids) token ids; NULL if a prompt is given */
    int n_ids;
    int n; /* tokens to write at most; -1: until the end token or the end of the context */
    struct sampling sampling;
    char *stop[CLI_STOPS]; /* (n_stop) none of them empty */
    int n_stop;
    char *system;   /* NULL: none */
    char *error;    /* not NULL: this request is refused, for this reason (FILE:LINE: ...) */
    uint64_t given; /* for cli_given: on its line or on the command line */
};

struct options {
    const char *model;
    struct request_spec request; /* -p or --ids; and what a line of -f starts from */
    const char *file, *tokenizer, *tokenize, *perplexity, *logits;
    struct device_list devices, prefill, decode;
    struct size kv_device, kv_host;
    int kv_type, kv_policy;        /* enum cli_kv_type; enum cli_kv_policy, never 0 */
    int tp;                        /* 1, 2, 4 or 8 */
    int max_batch, chunk, threads; /* 0: not given */
    uint64_t copy_delay;           /* seed of the CPU backend's copy delays; 0: no delays */
    bool colocate, json, stats, verbose, version, help;
    uint64_t given; /* for cli_given */
    void **owned;   /* (n_owned) what cli_free frees */
    int n_owned;
};

/* False: `error` is one line, without the program's name; usage errors: exit status 2. With --help
 * or --version nothing else is required; else `model` is not NULL. */
bool cli_parse(struct options *options, int argc, char **argv, char error[CLI_ERROR_LENGTH]);
void cli_free(struct options *options);
/* Whether an option stood on the command line (options.given) or in a request (spec.given). */
bool cli_given(uint64_t given, const char *option);
void cli_help(FILE *stream);

/* The requests of -f FILE (`-`: stdin), one a line: a JSON object if it starts with `{`, else the
 * text itself; empty lines are skipped. What a line does not say is taken from options->request. A
 * bad line becomes a request with `error` set. False: the file cannot be read. */
bool cli_requests(struct options *options, struct request_spec **requests, int *n_requests,
                  char error[CLI_ERROR_LENGTH]);

/* A whole file (`-`: stdin), with a zero byte behind it, freed by the caller. NULL: `error`. */
char *cli_read_file(const char *path, size_t *length, char error[CLI_ERROR_LENGTH]);
/* One line from stdin without its newline, with a `> ` on stderr if a terminal is there; freed by
 * the caller. NULL: the end of input. */
char *cli_ask(size_t *length);

/* Whether a stop text occurs in `text`. `safe` holds on entry what the last call left there (at
 * first 0) and on return how many bytes may be shown: all before the stop text, or, if none
 * occurred, all that cannot become the beginning of one. The text that ends first counts, so it
 * does not matter in what pieces the text arrived. */
bool cli_stop(const char *text, size_t length, char *const *stop, int n_stop, size_t *safe);

struct cli_row {
    const char *label, *value;
};
void cli_table(FILE *stream, const char *title, const struct cli_row *rows, int n_rows);
const char *cli_bytes(char text[CLI_NUMBER_LENGTH], double bytes);  /* 1.50 GiB; returns text */
const char *cli_count(char text[CLI_NUMBER_LENGTH], int64_t value); /* 1,234,567; returns text */
/* `label 42%` on stderr if that is a terminal; erased when done == total. */
void cli_progress(const char *label, int64_t done, int64_t total);

#endif /* CLI_H */

#ifdef CLI_IMPLEMENTATION
#undef CLI_IMPLEMENTATION
#include "json.h"
#include <assert.h>
#include <errno.h>
#include <limits.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum kind { HEADING, FLAG, TEXT, PROMPT, STOP, IDS, INT, REAL, SEED, SIZE, DEVICES, CHOICE };

/* A row whose name is empty is a key of request files only. A CHOICE stores the index, from 1, of
 * the chosen word of `argument`. */
struct option_row {
    const char *name, *argument, *key;
    enum kind kind;
    size_t offset; /* in struct options */
    double low, high;
    const char *help;
};

#define AT(field) offsetof(struct options, field)
static const struct option_row option_rows[] = {
    {.help = "What to run (without any: a conversation at a prompt; piped stdin is one prompt)"},
    {"-p", "TEXT", "prompt", PROMPT, AT(request.prompt), 0, 0, "one prompt"},
    {"--ids", "1,15,7", "ids", IDS, AT(request.ids), 0, INT_MAX, "one prompt as token ids"},
    {"-f", "FILE", 0, TEXT, AT(file), 0, 0, "one request a line: text, or JSON; - is stdin"},
    {"--tokenize", "FILE", 0, TEXT, AT(tokenize), 0, 0, "print the token ids of FILE's texts"},
    {"--perplexity", "FILE", 0, TEXT, AT(perplexity), 0, 0, "how well the model predicts FILE"},
    {"--logits", "FILE", 0, TEXT, AT(logits), 0, 0, "write the prompt's logits to FILE (float32)"},
    {"--tokenizer", "FILE", 0, TEXT, AT(tokenizer), 0, 0, "tokenizer.bin of a llama2.c model"},
    {"", 0, "id", TEXT, AT(request.id), 0, 0, 0},
    {.help = "How to write"},
    {"-n", "N", "n", INT, AT(request.n), 1, INT_MAX, "tokens at most (default: until the end)"},
    {"-t", "T", "temperature", REAL, AT(request.sampling.temperature), 0, 100,
     "0: always the likeliest token; 1: as the model says (default 0.8)"},
    {"--top-p", "P", "top_p", REAL, AT(request.sampling.top_p), 0, 1,
     "only the likeliest tokens that together have probability P (default 0.95)"},
    {"--top-k", "K", "top_k", INT, AT(request.sampling.top_k), 0, INT_MAX,
     "only the K likeliest tokens (default 0: all)"},
    {"--min-p", "P", "min_p", REAL, AT(request.sampling.min_p), 0, 1,
     "only tokens at least P times as likely as the likeliest (default 0: all)"},
    {"--seed", "S", "seed", SEED, AT(request.sampling.seed), 0, 0,
     "the same seed gives the same text (default: from the clock)"},
    {"--stop", "TEXT", "stop", STOP, 0, 0, 0, "end before this text; may be given several times"},
    {"--system", "TEXT", "system", TEXT, AT(request.system), 0, 0,
     "what a chat model is told first"},
    {.help = "Where to compute"},
    {"--devices", "LIST", 0, DEVICES, AT(devices), 0, 0,
     "cpu:4, or CUDA devices: 0,1 or 0-7 or 0,0"},
    {"--prefill", "LIST", 0, DEVICES, AT(prefill), 0, 0, "those of --devices that read prompts"},
    {"--decode", "LIST", 0, DEVICES, AT(decode), 0, 0, "those of --devices that write answers"},
    {"--tp", "N", 0, INT, AT(tp), 1, 8, "devices that share one copy of the model: 1, 2, 4 or 8"},
    {"--colocate", 0, 0, FLAG, AT(colocate), 0, 0, "every worker prefills and decodes"},
    {"--threads", "N", 0, INT, AT(threads), 1, 1024, "CPU threads"},
    {.help = "Memory (SIZE: bytes with K, M or G, or blocks of 16 tokens: 8b; per device)"},
    {"--kv-device", "SIZE", 0, SIZE, AT(kv_device), 1, 0, "KV cache on each device"},
    {"--kv-host", "SIZE", 0, SIZE, AT(kv_host), 0, 0, "KV cache in host memory; 0: none"},
    {"--kv-type", "f32|bf16", 0, CHOICE, AT(kv_type), 0, 0, "type of its numbers"},
    {"--kv-policy", "on-evict|write-through", 0, CHOICE, AT(kv_policy), 0, 0,
     "copy blocks to the host when they must go, or at once"},
    {"--max-batch", "N", 0, INT, AT(max_batch), 1, 65536, "requests in one decode step, at most"},
    {"--chunk", "N", 0, INT, AT(chunk), 1, 1 << 20, "prompt tokens in one prefill step, at most"},
    {.help = "What to show"},
    {"--json", 0, 0, FLAG, AT(json), 0, 0, "one JSON object a request"},
    {"--stats", 0, 0, FLAG, AT(stats), 0, 0, "a table of speeds and of what the pager did"},
    {"--verbose", 0, 0, FLAG, AT(verbose), 0, 0, "what is loaded and where it goes"},
    {"--copy-delay", "SEED", 0, SEED, AT(copy_delay), 0, 0,
     "for tests: delay CPU copies at random"},
    {"--version", 0, 0, FLAG, AT(version), 0, 0, "print the version"},
    {"--help", 0, 0, FLAG, AT(help), 0, 0, "print this"},
};
#undef AT
enum { N_ROWS = sizeof option_rows / sizeof *option_rows };
static_assert(N_ROWS <= 64, "struct options has one bit for each row");

/* At most one option of a group may be given. */
static const char *const exclusive[][5] = {
    {"-p", "--ids", "-f", "--tokenize", "--perplexity"},
    {"--logits", "-f", "--tokenize", "--perplexity"},
    {"--colocate", "--prefill"},
    {"--colocate", "--decode"},
};
/* The first needs one of the others. */
static const char *const needed[][3] = {
    {"--prefill", "--decode"}, {"--decode", "--prefill"}, {"--logits", "-p", "--ids"}};

/* Writes one line to `error`; false, for the caller to return. */
__attribute__((format(printf, 2, 3))) static bool refuse(char *error, const char *format, ...) {
    va_list values;
    va_start(values, format);
    vsnprintf(error, CLI_ERROR_LENGTH, format, values);
    va_end(values);
    for (char *byte = error; *byte; byte++)
        *byte = (unsigned char)*byte < ' ' ? '?' : *byte;
    return false;
}

/* Hands a block from malloc to the options; NULL, out of memory, ends the program. */
static void *own(struct options *options, void *block) {
    size_t n = (size_t)options->n_owned;
    if ((n & (n - 1)) == 0) /* 0 or a power of two: full */
        options->owned = realloc(options->owned, (2 * n + 1) * sizeof block);
    if (!block || !options->owned) {
        fprintf(stderr, "dynamo: out of memory\n");
        exit(1);
    }
    options->owned[options->n_owned++] = block;
    return block;
}

void cli_free(struct options *options) {
    while (options->n_owned > 0)
        free(options->owned[--options->n_owned]);
    free(options->owned);
    options->owned = NULL;
}

/* ---- values: each takes all `length` bytes of its text ---- */

static bool read_number(const char *text, size_t length, const char *bytes, double *value) {
    char *end;
    *value = strtod(text, &end);
    return length > 0 && strspn(text, bytes) >= length && end == text + length;
}

static bool read_int(const struct option_row *row, const char *text, size_t length, int *target) {
    double value;
    bool good =
        read_number(text, length, "0123456789-", &value) && value >= row->low && value <= row->high;
    *target = good ? (int)value : 0;
    return good;
}

static bool read_real(const struct option_row *row, const char *text, size_t length,
                      float *target) {
    double value;
    bool good = read_number(text, length, "0123456789-+.eE", &value) && value >= row->low &&
                value <= row->high;
    *target = good ? (float)value : 0;
    return good;
}

static bool take_int(const char **at, int *value) {
    size_t digits = strspn(*at, "0123456789");
    *value = digits < 10 ? atoi(*at) : -1;
    *at += digits;
    return digits > 0 && *value >= 0;
}

static bool read_ids(struct options *options, const char *text, size_t length) {
    struct request_spec *request = &options->request;
    request->ids = own(options, malloc((length / 2 + 1) * sizeof *request->ids));
    request->n_ids = 0;
    const char *at = text;
    do {
        at += strspn(at, " \t\r");
        if (!take_int(&at, &request->ids[request->n_ids++]))
            return false;
        at += strspn(at, " \t\r");
    } while (*at++ == ',');
    return at == text + length + 1;
}

static bool read_seed(const char *text, size_t length, uint64_t *seed) {
    errno = 0;
    *seed = strtoull(text, NULL, 10);
    return length > 0 && strspn(text, "0123456789") >= length && errno == 0;
}

static bool read_size(const char *text, size_t length, double least, struct size *size) {
    static const char units[] = "bKMG";
    const char *unit = length > 1 ? memchr(units, text[length - 1], 4) : NULL;
    double number, scale = unit ? (double)(1 << 10 * (unit - units)) : 1;
    bool good = read_number(text, length - (unit != NULL), "0123456789", &number) &&
                number >= least && number * scale <= 0x1p53;
    *size = (struct size){good ? (int64_t)(number * scale) : 0, unit == units, true};
    return good;
}

static bool read_devices(const char *at, struct device_list *list) {
    int first = 0, last = 0;
    *list = (struct device_list){.cpu = strncmp(at, "cpu", 3) == 0};
    if (list->cpu) {
        list->n = 1;
        at += 3;
        bool good = !*at || (*at++ == ':' && take_int(&at, &list->n) && !*at);
        for (int i = 0; good && i < list->n && i < CLI_DEVICES; i++)
            list->index[i] = i;
        return good && list->n >= 1 && list->n <= CLI_DEVICES;
    }
    do {
        if (!take_int(&at, &first))
            return false;
        last = first;
        if (*at == '-') {
            at++;
            if (!take_int(&at, &last))
                return false;
        }
        if (last < first || last - first >= CLI_DEVICES - list->n)
            return false;
        while (first <= last)
            list->index[list->n++] = first++;
    } while (*at++ == ',');
    return at[-1] == 0;
}

static bool read_choice(const char *text, const char *words, int *choice) {
    size_t length = strcspn(words, "|");
    for (*choice = 1; strlen(text) != length || memcmp(words, text, length); ++*choice) {
        if (!words[length])
            return false;
        words += length + 1;
        length = strcspn(words, "|");
    }
    return true;
}

static bool read_stop(struct request_spec *request, char *text, size_t length) {
    bool good = length > 0 && strlen(text) == length && request->n_stop < CLI_STOPS;
    if (good)
        request->stop[request->n_stop++] = text;
    return good;
}

static bool read_text(char *text, size_t length, void *target) {
    memcpy(target, &text, sizeof text); /* a char * or a const char * */
    return strlen(text) == length;
}

/* Stores what `text` says where the row wants it. text[length] is 0, or ends a JSON value. */
static bool read_value(struct options *options, const struct option_row *row, char *text,
                       size_t length) {
    void *target = (char *)options + row->offset;
    switch (row->kind) {
    case HEADING: return false;
    case FLAG: return *(bool *)target = true;
    case PROMPT:
        options->request.prompt = text;
        options->request.prompt_length = length;
        return true;
    case TEXT: return read_text(text, length, target);
    case STOP: return read_stop(&options->request, text, length);
    case IDS: return read_ids(options, text, length);
    case INT: return read_int(row, text, length, target);
    case REAL: return read_real(row, text, length, target);
    case SEED: return read_seed(text, length, target);
    case SIZE: return read_size(text, length, row->low, target);
    case DEVICES: return read_devices(text, target);
    case CHOICE: return read_choice(text, row->argument, target);
    }
    return false;
}

/* read_value, or a message about `name`, which is the option or the key. */
static bool set_value(struct options *options, const struct option_row *row, const char *name,
                      char *text, size_t length, char *error) {
    static const char *const expected[] = {
        [TEXT] = "a text without zero bytes",
        [STOP] = "at most 16 texts, none empty or with a zero byte",
        [IDS] = "token ids, such as 1,15,7",
        [SEED] = "a whole number from 0 to 18446744073709551615",
        [SIZE] = "bytes such as 512M (K, M, G) or blocks such as 8b",
        [DEVICES] = "cpu:N, or device numbers such as 0,1 or 0-7; at most 64",
        [CHOICE] = NULL, /* its words */
    };
    if (read_value(options, row, text, length))
        return true;
    int shown = length < 60 ? (int)length : 60;
    if (row->kind == INT || row->kind == REAL)
        return refuse(error, "%s: got %.*s, expected a %snumber from %.10g to %.10g", name, shown,
                      text, row->kind == INT ? "whole " : "", row->low, row->high);
    return refuse(error, "%s: got %.*s, expected %s", name, shown, text,
                  row->kind == CHOICE ? row->argument : expected[row->kind]);
}

/* ---- names ---- */

/* The name by which a row is known on the command line, or in a request file. */
static const char *name_of(int row, bool key) {
    const char *name = key ? option_rows[row].key : option_rows[row].name;
    return name ? name : "";
}

static const struct option_row *find_row(const char *name, bool key) {
    for (int row = 0; row < N_ROWS && *name; row++)
        if (strcmp(name_of(row, key), name) == 0)
            return &option_rows[row];
    return NULL;
}

static uint64_t row_bit(const struct option_row *row) {
    return (uint64_t)1 << (row - option_rows);
}

bool cli_given(uint64_t given, const char *option) {
    const struct option_row *row = find_row(option, false);
    assert(row != NULL);
    return given & row_bit(row);
}

/* Whether so many bytes inserted, removed or changed make one word from the other. */
static bool resembles(const char *a, const char *b, int edits) {
    while (*a && *a == *b) {
        a++;
        b++;
    }
    if (!*a && !*b)
        return true;
    return edits > 0 &&
           ((*a && resembles(a + 1, b, edits - 1)) || (*b && resembles(a, b + 1, edits - 1)) ||
            (*a && *b && resembles(a + 1, b + 1, edits - 1)));
}

static bool refuse_unknown(const char *name, bool key, char *error) {
    const char *what = key ? "key" : "option";
    for (int edits = 1; edits <= 2; edits++)
        for (int row = 0; row < N_ROWS; row++)
            if (strlen(name_of(row, key)) > 3 && resembles(name, name_of(row, key), edits))
                return refuse(error, "%.60s: unknown %s; did you mean %s", name, what,
                              name_of(row, key));
    return refuse(error, "%.60s: unknown %s; --help lists all", name, what);
}

/* ---- the command line ---- */

/* The positions of --prefill and --decode: inside --devices, and each in one pool. */
static bool check_pools(const struct options *options, char *error) {
    const struct device_list *pools[] = {&options->prefill, &options->decode};
    const char *const names[] = {"--prefill", "--decode"};
    bool used[CLI_DEVICES] = {false};
    for (int pool = 0; pool < 2; pool++) {
        if (pools[pool]->cpu)
            return refuse(error, "%s: got cpu, expected numbers: positions in --devices",
                          names[pool]);
        for (int i = 0; i < pools[pool]->n && options->devices.n; i++) {
            int index = pools[pool]->index[i];
            if (index >= options->devices.n)
                return refuse(error, "%s: got device %d, but --devices has %d", names[pool], index,
                              options->devices.n);
            if (used[index])
                return refuse(error, "%s: device %d is in use already; each has one place",
                              names[pool], index);
            used[index] = true;
        }
    }
    return true;
}

static bool check_options(const struct options *options, char *error) {
    if (!options->model)
        return refuse(error, "no model given; usage: dynamo MODEL [options], see --help");
    for (size_t i = 0; i < sizeof exclusive / sizeof *exclusive; i++) {
        const char *first = NULL;
        for (int j = 0; j < 5 && exclusive[i][j]; j++) {
            if (!cli_given(options->given, exclusive[i][j]))
                continue;
            if (first)
                return refuse(error, "%s and %s exclude each other", first, exclusive[i][j]);
            first = exclusive[i][j];
        }
    }
    for (size_t i = 0; i < sizeof needed / sizeof *needed; i++) {
        const char *const *names = needed[i];
        if (cli_given(options->given, names[0]) && !cli_given(options->given, names[1]) &&
            !(names[2] && cli_given(options->given, names[2])))
            return refuse(error, "%s: needs %s%s%s", names[0], names[1], names[2] ? " or " : "",
                          names[2] ? names[2] : "");
    }
    int tp = options->tp;
    if (8 % tp != 0)
        return refuse(error, "--tp: got %d, expected 1, 2, 4 or 8", tp);
    if (options->devices.n % tp || options->prefill.n % tp || options->decode.n % tp)
        return refuse(error, "--tp: every list of devices must divide into groups of %d", tp);
    return check_pools(options, error);
}

bool cli_parse(struct options *options, int argc, char **argv, char error[CLI_ERROR_LENGTH]) {
    *options = (struct options){.tp = 1, .kv_policy = CLI_ON_EVICT};
    options->request =
        (struct request_spec){.n = -1, .sampling = {.temperature = 0.8f, .top_p = 0.95f}};
    for (int i = 1; i < argc; i++) {
        char *word = argv[i], *value = strchr(word, '=');
        if (*word != '-') {
            if (options->model)
                return refuse(error, "%.60s: unexpected; the model is %.60s", word, options->model);
            options->model = word;
            continue;
        }
        if (value)
            *value++ = 0;
        const struct option_row *row = find_row(word, false);
        if (!row)
            return refuse_unknown(word, false, error);
        if (options->given & row_bit(row) && row->kind != STOP)
            return refuse(error, "%s: given twice", word);
        options->given |= row_bit(row);
        if (value && row->kind == FLAG)
            return refuse(error, "%s: takes no value", word);
        if (row->kind != FLAG && !value && i + 1 < argc && !find_row(argv[i + 1], false))
            value = argv[++i];
        if (row->kind != FLAG && !value)
            return refuse(error, "%s: missing value (%s)", word, row->argument);
        if (!set_value(options, row, word, value, value ? strlen(value) : 0, error))
            return false;
    }
    return options->help || options->version || check_options(options, error);
}

void cli_help(FILE *stream) {
    fputs("usage: dynamo MODEL [options]\n\n"
          "Runs a language model as a datacenter does: one pool of devices reads prompts\n"
          "(prefill), another writes answers (decode). The KV cache moves between them in\n"
          "blocks; when a device is full, cold blocks are paged to host memory. MODEL is a GGUF\n"
          "file, a llama2.c checkpoint or random:NAME[:TYPE]. Text goes to stdout, all else to\n"
          "stderr. Three ways to begin:\n\n"
          "  dynamo model.bin\n"
          "      talk with a chat model, or let a base model complete what you type\n"
          "  dynamo model.bin -p \"Once upon a time\" -n 64 --stats\n"
          "      one prompt, then a table of what the pools and the pager did\n"
          "  dynamo model.bin -f prompts.txt --devices cpu:4 --kv-device 64b --kv-host 1G\n"
          "      many prompts at once on four small devices: blocks are paged out and in\n",
          stream);
    for (int i = 0; i < N_ROWS; i++) {
        const struct option_row *row = &option_rows[i];
        if (row->kind == HEADING) {
            fprintf(stream, "\n%s:\n", row->help);
        } else if (row->help) {
            int printed = fprintf(stream, "  %s %s", row->name, row->argument ? row->argument : "");
            if (printed >= 23)
                fputc('\n', stream);
            fprintf(stream, "%*s%s\n", printed < 23 ? 23 - printed : 23, "", row->help);
        }
    }
}

/* ---- files and terminal ---- */

char *cli_read_file(const char *path, size_t *length, char error[CLI_ERROR_LENGTH]) {
    FILE *file = strcmp(path, "-") ? fopen(path, "rb") : stdin;
    char *text = NULL;
    size_t capacity = 0;
    bool good = file != NULL;
    for (*length = 0; good && !feof(file) && !ferror(file);) {
        if (capacity - *length < 2) {
            capacity = 2 * capacity + 4096;
            char *larger = realloc(text, capacity);
            good = larger != NULL;
            text = larger ? larger : text;
        }
        if (good)
            *length += fread(text + *length, 1, capacity - *length - 1, file);
    }
    if (!good || ferror(file)) {
        refuse(error, "%s: %s", path, strerror(errno));
        free(text);
        text = NULL;
    } else {
        text[*length] = 0;
    }
    if (file && file != stdin)
        fclose(file);
    return text;
}

char *cli_ask(size_t *length) {
    char *line = NULL;
    size_t capacity = 0;
    if (isatty(0) && isatty(2))
        fputs("> ", stderr);
    ssize_t bytes = getline(&line, &capacity, stdin);
    if (bytes < 0) {
        free(line);
        return NULL;
    }
    bytes -= line[bytes - 1] == '\n';
    line[bytes] = 0;
    *length = (size_t)bytes;
    return line;
}

bool cli_stop(const char *text, size_t length, char *const *stop, int n_stop, size_t *safe) {
    size_t held = length, start = 0, end = SIZE_MAX;
    for (size_t at = *safe; at < length; at++) {
        for (int i = 0; i < n_stop; i++) {
            size_t size = strlen(stop[i]), left = length - at;
            if (memcmp(text + at, stop[i], size < left ? size : left))
                continue;
            if (size > left) {
                held = at < held ? at : held;
            } else if (at + size < end) {
                start = at;
                end = at + size;
            }
        }
    }
    *safe = end < SIZE_MAX ? start : held;
    return end < SIZE_MAX;
}

void cli_table(FILE *stream, const char *title, const struct cli_row *rows, int n_rows) {
    bool colour = isatty(fileno(stream));
    int width = 0;
    for (int i = 0; i < n_rows; i++)
        width = (int)strlen(rows[i].label) > width ? (int)strlen(rows[i].label) : width;
    fprintf(stream, colour ? "\033[1m%s\033[0m\n" : "%s\n", title);
    for (int i = 0; i < n_rows; i++)
        fprintf(stream, colour ? "  \033[2m%-*s\033[0m  %s\n" : "  %-*s  %s\n", width,
                rows[i].label, rows[i].value);
}

const char *cli_bytes(char text[CLI_NUMBER_LENGTH], double bytes) {
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
    int unit = 0;
    for (; unit < 4 && bytes >= 1023.995; unit++)
        bytes /= 1024;
    snprintf(text, CLI_NUMBER_LENGTH, unit ? "%.2f %s" : "%.0f %s", bytes, units[unit]);
    return text;
}

const char *cli_count(char text[CLI_NUMBER_LENGTH], int64_t value) {
    char digits[CLI_NUMBER_LENGTH];
    int n = snprintf(digits, sizeof digits, "%lld", (long long)value), length = 0;
    for (int i = 0; i < n; i++) {
        text[length++] = digits[i];
        if (digits[i] != '-' && i + 1 < n && (n - i - 1) % 3 == 0)
            text[length++] = ',';
    }
    text[length] = 0;
    return text;
}

void cli_progress(const char *label, int64_t done, int64_t total) {
    if (!isatty(2))
        return;
    if (done >= total)
        fputs("\r\033[K", stderr);
    else
        fprintf(stderr, "\r%s %d%%\033[K", label, (int)(100 * done / total));
}

/* ---- request files ---- */

static bool set_member(struct options *options, struct json_node *nodes, int key, char *error) {
    struct json_node *name = &nodes[key], *value = &nodes[key + 1];
    const struct option_row *row = find_row(name->text, true);
    if (!row || strlen(name->text) != name->length)
        return refuse_unknown(name->text, true, error);
    if (options->given & row_bit(row))
        return refuse(error, "%s: given twice", row->key);
    options->given |= row_bit(row);
    if (row->kind == IDS && value->type == '[') /* the text between the brackets */
        return set_value(options, row, row->key, value->text + 1, value->length - 2, error);
    if (row->kind == STOP)
        options->request.n_stop = 0;
    bool text = row->kind == TEXT || row->kind == PROMPT || row->kind == STOP;
    char wanted = text ? '"' : row->kind == IDS ? '[' : '0';
    int first = row->kind == STOP && value->type == '[' ? key + 2 : key + 1;
    for (int i = first; i < value->next; i = nodes[i].next) {
        if (nodes[i].type != wanted)
            return refuse(error, "%s: expected %s", row->key,
                          text            ? "a string"
                          : wanted == '[' ? "an array of token ids"
                                          : "a number");
        if (!set_value(options, row, row->key, nodes[i].text, nodes[i].length, error))
            return false;
    }
    return true;
}

static bool parse_line(struct options *options, char *text, size_t length, char *error) {
    struct request_spec *request = &options->request;
    if (*text != '{') {
        request->prompt = text;
        request->prompt_length = length;
        return true;
    }
    struct json_node *nodes = json_parse(text, length, error);
    bool good = nodes != NULL;
    for (int key = 1; good && key < nodes[0].next; key = nodes[key + 1].next)
        good = set_member(options, nodes, key, error);
    free(nodes);
    if (good && !request->prompt == !request->ids)
        return refuse(error, "expected either prompt or ids");
    return good;
}

bool cli_requests(struct options *options, struct request_spec **requests, int *n_requests,
                  char error[CLI_ERROR_LENGTH]) {
    const struct request_spec defaults = options->request;
    const uint64_t given = options->given;
    const char *name = strcmp(options->file, "-") ? options->file : "stdin";
    size_t length, lines = 1;
    char *text = cli_read_file(options->file, &length, error);
    if (!text)
        return false;
    own(options, text);
    for (size_t i = 0; i < length; i++)
        lines += text[i] == '\n';
    *requests = own(options, calloc(lines, sizeof **requests));
    *n_requests = 0;
    int number = 0;
    for (char *line = text, *end; line < text + length; line = end + 1) {
        end = memchr(line, '\n', (size_t)(text + length - line));
        end = end ? end : text + length;
        char *stop = end > line && end[-1] == '\r' ? end - 1 : end;
        number++;
        if (stop == line)
            continue;
        *stop = 0;
        options->request = defaults;
        options->request.line = number;
        options->given = 0;
        char wrong[CLI_ERROR_LENGTH];
        if (!parse_line(options, line, (size_t)(stop - line), wrong)) {
            options->request.error = own(options, malloc(CLI_ERROR_LENGTH));
            refuse(options->request.error, "%.200s:%d: %.250s", name, number, wrong);
        }
        options->request.given = options->given | given;
        (*requests)[(*n_requests)++] = options->request;
    }
    options->request = defaults;
    options->given = given;
    return true;
}

#endif /* CLI_IMPLEMENTATION */
