/* cli.h: the command line, the files of requests, and a terminal's progress bar.
 *
 *     struct options options;
 *     struct requests requests = {0};
 *     struct request_spec spec;
 *     if (cli_parse(&options, argc, argv, error) && requests_open(&requests, options.file, error))
 *         while (requests_next(&requests, &options.request, &spec, error) > 0)
 *             requests_add(&requests, &spec);
 *     requests_free(&requests);
 *     cli_free(&options);
 *
 * One table lists every option: its name, its key in a line of a request file, its kind, range and
 * help text. The command line, the request files and --help are all read from it, so an option
 * exists everywhere or nowhere. A kind of value is a function that reads it, and words for what it
 * expects; it takes all bytes of a value, and stores only what is valid.
 *
 * A file has one request a line: a JSON object if it starts with `{`, else the text itself; empty
 * lines are skipped, and a byte order mark before a line. What a line does not say is as on the
 * command line. A bad line becomes a request with `error` set, so that the others go on. An object
 * with the one key `cancel` is no request: it ends that with this id.
 *
 * Nothing here runs a model, prints an error or ends the program: what is wrong comes back as one
 * line of text. Texts are not copied: argv, and a request's line, must outlive what points into
 * them. What stands in a struct after parsing is in range; 0, NULL or n == 0 means: not given.
 * Define CLI_IMPLEMENTATION in one file, before including this (json.h's is needed, too).
 * Read next: json.h. */
#ifndef CLI_H
#define CLI_H

#include "json.h"
#include "sampler.h" /* struct sampling */
#include "text.h"

#define CLI_VERSION "0.1.0"

enum {
    PROGRESS_MS = 300,         /* what takes less needs no bar */
    CLI_FILE_LENGTH = 1 << 28, /* bytes of a text at most: /dev/zero has no end */
    CLI_REQUESTS = 1 << 16,    /* that may be in flight together, and of a file at most */
    VALUE_DEVICES = 1024,      /* of a list */
    VALUE_STOPS = 16,          /* texts that end an answer */
    VALUE_FAILURES = 16        /* of --fail */
};

struct size { /* 512M or 8b: bytes, or KV blocks */
    int64_t value;
    bool blocks, given;
};

/* `cpu:4`: cpu, 0 to 3. `0-2,5`: CUDA devices 0, 1, 2, 5. In --prefill and --decode: positions in
 * --devices, or of all devices where --devices is not given. */
struct device_list {
    bool cpu;
    int n;
    int index[VALUE_DEVICES];
};

struct said { /* (length) */
    char *text;
    size_t length;
};

struct request_spec {
    const char *id;       /* NULL: the file gave none */
    char *prompt;         /* NULL if ids are given; may hold zero bytes and invalid UTF-8 */
    size_t prompt_length; /* bytes */
    int *ids;             /* (n_ids) token ids; NULL if a prompt is given */
    int n_ids;
    struct said *earlier; /* (n_earlier + 1) a user's and the answer, in turns; last the prompt */
    int n_earlier;
    const char *after;  /* id of an earlier request, which this one continues; NULL: none */
    const char *cancel; /* not NULL: no request, but the id of one before it that is to end */
    double at;          /* arrival, in seconds after the start */
    float deadline;     /* seconds after its arrival; 0: none */
    bool seeded;        /* its line has a seed of its own */
    int n; /* tokens to write at most; -1: until the end token or the end of the context */
    struct sampling sampling;
    char *stop[VALUE_STOPS]; /* (n_stop) none of them empty */
    int n_stop;
    const char *system; /* NULL: none */
    bool plain;         /* a prompt is continued, by a chat model too */
    int min_new;        /* tokens before which neither an end token nor a stop text ends it */
    char *error;        /* not NULL: this request is refused, for this reason (FILE:LINE: ...) */
    char *line;         /* that it was read from; its texts point into it */
    const char *file;   /* NULL: it comes from no file; else the name, and … */
    int number;         /* … the number of the line there */
};

struct failure {      /* of a worker, in seconds after the start; INFINITY: it does not come back */
    int worker, step; /* 0, or that which it does not end, at any time */
    double at, back;
};

typedef unsigned __int128 option_set; /* those that were given: see cli_given */

struct options {
    const char *model;
    struct request_spec request; /* -p or --ids; and what a line of -f starts from */
    const char *file, *tokenizer, *tokenize, *perplexity, *logits;
    const char *replay, *sim, *plan, *rates, *trace;
    float rate, ttft, itl; /* requests a second; targets, ms. 0: not given */
    float role_seconds;    /* of --auto; 0: not given */
    int limit;             /* requests of --replay; 0: all */
    struct device_list devices, prefill, decode;
    struct size kv_device, kv_host;
    int template, kv_type, kv_policy; /* which of the words of --help, from 1; 0: not given */
    int tp, tp_prefill, tp_decode;    /* 1, 2, 4 or 8: the latter two are those of the workers */
    int max_batch, chunk, threads;    /* 0: not given */
    int max_queue;                    /* 0: no bound */
    int serve;                        /* a port; 0: any */
    const char *host, *api_key, *api_key_file;
    struct failure failures[VALUE_FAILURES]; /* (n_failures) */
    int n_failures;
    uint64_t copy_delay; /* seed of the CPU backend's copy delays; 0: no delays */
    bool colocate, json, stats, verbose, watch, version, help;
    option_set given;
};

/* False: `error` is one line, without the program's name. With --help or --version nothing else is
 * required; else `model` is not NULL. In any case, cli_free follows. */
bool cli_parse(struct options *options, int argc, char **argv, char error[ERROR_LENGTH]);
void cli_free(struct options *options);
bool cli_given(option_set given, const char *option);
void cli_help(FILE *stream);

/* A whole file (`-`: stdin), with a zero byte behind it, freed by the caller. NULL: `error`. */
char *cli_read_file(const char *path, size_t *length, char error[ERROR_LENGTH]);
/* A bar on stderr if that is a terminal and it takes long: from 0, to `total`, which erases it. */
void cli_progress(const char *label, int64_t done, int64_t total);

struct requests {
    struct request_spec *specs; /* (n) */
    int n;
    bool more; /* others will be added; who reads beside another thread changes it under a lock */
    FILE *file;
    const char *name;
    bool endless;        /* who reads waits while there are CLI_REQUESTS; else more are an error */
    int n_read, n_lines; /* requests, if not endless; lines */
    int n_taken;         /* by who answers them, and not yet answered; -1: nobody takes any more */
    char *text;          /* a line that is being read */
};

/* Opens a file of requests (`-`: stdin). False: `error`. Zeroed before; requests_free follows. */
bool requests_open(struct requests *requests, const char *path, char error[ERROR_LENGTH]);
/* Reads a line, which may be empty, into requests->text (length). 0, < 0: as below. */
int requests_line(struct requests *requests, size_t *length, char error[ERROR_LENGTH]);
/* Reads up to the next request. 0: there is none; < 0: the file cannot be read, see `error`. */
int requests_next(struct requests *requests, const struct request_spec *defaults,
                  struct request_spec *spec, char error[ERROR_LENGTH]);
/* Sets what a key of a file of requests and the value nodes[at] say; for who reads JSON of another
 * form, in which the key has another name. ids and earlier are then to be freed. */
bool requests_set(struct request_spec *request, const char *key, const struct json_node *nodes,
                  int at, const char *name, char error[ERROR_LENGTH]);
/* Adds it to specs, which may move. */
void requests_add(struct requests *requests, const struct request_spec *spec);
void requests_forget(struct request_spec *spec); /* what belongs to it, if it comes from a file */
void requests_free(struct requests *requests);

/* Whether a stop text occurs in `text`. `safe` holds on entry what the last call left there (at
 * first 0) and on return how many bytes may be shown: all before the stop text, or, if none
 * occurred, all that cannot become the beginning of one. The text that ends first counts, so it
 * does not matter in what pieces the text arrived. */
bool requests_stop(const char *text, size_t length, char *const *stop, int n_stop, size_t *safe);

#endif /* CLI_H */

#ifdef CLI_IMPLEMENTATION
#undef CLI_IMPLEMENTATION
#include <assert.h>
#include <errno.h>
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* ---- kinds of values ---- */

struct value {
    char *text; /* (length); NULL: none was given */
    size_t length;
    const struct option_row *row;
};

struct kind {
    bool (*read)(const struct value *value, void *target);
    char json;            /* the json_node's type */
    const char *expected; /* NULL: one of the words of `argument` */
};

/* A row with a key is a field of options.request; without a name, a key of request files only;
 * without a kind, a heading of --help. */
struct option_row {
    const char *name, *argument, *help;
    const struct kind *kind;
    size_t offset;    /* in struct options */
    double low, high; /* of INT and REAL; low: of SIZE */
    const char *key;
};

static bool read_flag(const struct value *value, void *target) {
    return *(bool *)target = !value->text;
}

static bool read_text(const struct value *value, void *target) {
    *(const char **)target = value->text;
    return strlen(value->text) == value->length;
}

static bool read_prompt(const struct value *value, void *target) {
    struct request_spec *request = target;
    request->prompt = value->text;
    request->prompt_length = value->length;
    return true;
}

static bool read_stop(const struct value *value, void *target) {
    struct request_spec *request = target;
    if (value->length == 0 || strlen(value->text) != value->length ||
        request->n_stop == VALUE_STOPS)
        return false;
    request->stop[request->n_stop++] = value->text;
    return true;
}

/* strtod takes more than we do: `bytes` are what a number may consist of. */
static bool read_number(const struct value *value, const char *bytes, double *number) {
    char *end;
    *number = strtod(value->text, &end);
    return value->length > 0 && strspn(value->text, bytes) >= value->length &&
           end == value->text + value->length && *number >= value->row->low &&
           *number <= value->row->high;
}

static bool read_int(const struct value *value, void *target) {
    double number;
    bool good = read_number(value, "0123456789-", &number);
    *(int *)target = good ? (int)number : 0;
    return good;
}

static bool read_real(const struct value *value, void *target) {
    double number;
    bool good = read_number(value, "0123456789-+.eE", &number);
    *(float *)target = good ? (float)number : 0;
    return good;
}

static bool read_time(const struct value *value, void *target) {
    return read_number(value, "0123456789-+.eE", target);
}

static bool read_seed(const struct value *value, void *target) {
    errno = 0;
    *(uint64_t *)target = strtoull(value->text, NULL, 10);
    return value->length > 0 && strspn(value->text, "0123456789") >= value->length && errno == 0;
}

static bool read_size(const struct value *value, void *target) {
    static const char units[] = "bKMG";
    const char *last = value->text + value->length - 1;
    const char *unit = value->length > 0 ? memchr(units, *last, 4) : NULL;
    int shift = unit ? 10 * (int)(unit - units) : 0;
    uint64_t number;
    struct value digits = {.text = value->text, .length = value->length - (unit != NULL)};
    if (!read_seed(&digits, &number) || (double)number < value->row->low ||
        number > (uint64_t)1 << (53 - shift))
        return false;
    *(struct size *)target = (struct size){(int64_t)number << shift, unit == units, true};
    return true;
}

static bool take_int(const char **at, int *value) {
    *at += strspn(*at, " \t\r");
    size_t digits = strspn(*at, "0123456789");
    *value = digits < 10 ? atoi(*at) : -1;
    *at += digits;
    *at += strspn(*at, " \t\r");
    return digits > 0 && *value >= 0;
}

/* `1,15,7`, or with `ranges` `0-3,7`: how many. 0: no list of at most `capacity` numbers. */
static int read_list(const char *at, size_t length, bool ranges, int *list, int capacity) {
    const char *end = at + length;
    int n = 0, first, last;
    do {
        if (!take_int(&at, &first))
            return 0;
        last = first;
        if (ranges && *at == '-' && (++at, !take_int(&at, &last)))
            return 0;
        if (last < first || last - first >= capacity - n)
            return 0;
        while (first <= last)
            list[n++] = first++;
    } while (*at++ == ',');
    return at == end + 1 ? n : 0;
}

static bool read_ids(const struct value *value, void *target) {
    struct request_spec *request = target;
    int capacity = value->length < INT_MAX ? (int)value->length / 2 + 1 : 0;
    request->ids = malloc((size_t)capacity * sizeof *request->ids);
    if (request->ids)
        request->n_ids = read_list(value->text, value->length, false, request->ids, capacity);
    return request->n_ids > 0;
}

static bool read_places(const struct value *value, void *target) {
    struct device_list *list = target;
    list->n = read_list(value->text, value->length, true, list->index, VALUE_DEVICES);
    return list->n > 0;
}

static bool read_devices(const struct value *value, void *target) {
    struct device_list *list = target;
    list->cpu = strncmp(value->text, "cpu", 3) == 0;
    if (!list->cpu)
        return read_places(value, target);
    const char *at = value->text + 4;
    list->n = 1;
    bool good = value->length == 3 || (at[-1] == ':' && take_int(&at, &list->n) && !*at);
    for (int i = 0; i < list->n && i < VALUE_DEVICES; i++)
        list->index[i] = i;
    return good && list->n >= 1 && list->n <= VALUE_DEVICES;
}

/* `1@2.5`, or with an end `1@2.5-4`; in its ninth step `1@#9`. */
static bool read_failure(const struct value *value, void *target) {
    struct options *options = target;
    struct failure failure = {.back = INFINITY};
    const char *at = value->text;
    if (strspn(at, "0123456789.@-#") < value->length || options->n_failures == VALUE_FAILURES ||
        !take_int(&at, &failure.worker) || *at++ != '@')
        return false;
    char *end = (char *)(uintptr_t)at + 1;
    bool by_step = *at == '#', ok = by_step || (*at >= '0' && *at <= '9');
    for (int i = 0; i < options->n_failures; i++)
        ok = ok && options->failures[i].worker != failure.worker;
    if (by_step)
        ok = take_int((const char **)&end, &failure.step) && failure.step > 0 && ok;
    else
        failure.at = strtod(at, &end);
    if (*end == '-')
        failure.back = strtod(end + 1, &end);
    options->failures[options->n_failures++] = failure;
    return ok && end == value->text + value->length && failure.back > failure.at;
}

static bool read_choice(const struct value *value, void *target) {
    const char *words = value->row->argument;
    for (int choice = 1;; choice++) {
        size_t length = strcspn(words, "|");
        *(int *)target = choice;
        if (value->length == length && memcmp(value->text, words, length) == 0)
            return true;
        words += length;
        if (!*words++)
            return false;
    }
}

/* The targets: bool; const char *; struct request_spec (three kinds); int; float; uint64_t; struct
 * size; struct device_list (PLACES: no cpu); struct options (FAILURE); int, the n-th word. */
static const struct kind FLAG = {read_flag, 0, "no value"};
static const struct kind TEXT = {read_text, '"', "a text without zero bytes"};
static const struct kind PROMPT = {read_prompt, '"', "a text"};
static const struct kind STOP = {read_stop, '"',
                                 "at most 16 texts, none empty or with a zero byte"};
static const struct kind IDS = {read_ids, '[', "token ids, such as 1,15,7"};
static const struct kind INT = {read_int, '0', "a whole number"};
static const struct kind REAL = {read_real, '0', "a number"};
static const struct kind TIME = {read_time, '0', "a number"};
static const struct kind SEED = {read_seed, '0', "a whole number from 0 to 18446744073709551615"};
static const struct kind SIZE = {read_size, 0, "bytes such as 512M (K, M, G) or blocks such as 8b"};
static const struct kind DEVICES = {read_devices, 0,
                                    "cpu:N, or device numbers such as 0,1 or 0-7; at most 1024"};
static const struct kind PLACES = {read_places, 0, "positions in --devices, such as 0,1 or 0-7"};
static const struct kind FAILURE = {read_failure, 0, "a worker once, 16 at most: 1@2.5 or 1@2-4"};
static const struct kind CHOICE = {read_choice, 0, NULL};
static const struct kind MESSAGES = {NULL, '[', "a list of messages"}; /* see set_messages */

/* ---- the table of options ---- */

#define AT(field) .offset = offsetof(struct options, field)
static const struct option_row option_rows[] = {
    {.help = "What to run (without any: a conversation at a prompt; piped stdin is one prompt)"},
    {"-m", "FILE", "the model; it may also stand by itself", &TEXT, AT(model)},
    {"-p", "TEXT", "one prompt", &PROMPT, AT(request), .key = "prompt"},
    {"--ids", "1,15,7", "one prompt as token ids", &IDS, AT(request), .key = "ids"},
    {"-f", "FILE", "one request a line: text, or JSON with [keys]; - is stdin", &TEXT, AT(file)},
    {"--tokenize", "FILE", "print the token ids of FILE's texts", &TEXT, AT(tokenize)},
    {"--perplexity", "FILE", "how well the model predicts FILE", &TEXT, AT(perplexity)},
    {"--logits", "FILE", "write the prompt's logits to FILE (float32)", &TEXT, AT(logits)},
    {"--tokenizer", "FILE", "tokenizer.bin of a llama2.c model", &TEXT, AT(tokenizer)},
    {.kind = &TEXT, AT(request.id), .key = "id"},
    {.kind = &MESSAGES, AT(request), .key = "messages"},
    {.kind = &TEXT, AT(request.after), .key = "after"},
    {.kind = &TEXT, AT(request.cancel), .key = "cancel"},
    {.kind = &TIME, AT(request.at), .high = 1e6, .key = "at"},
    {.kind = &REAL, AT(request.deadline), .high = 1e6, .key = "deadline"},
    {.help = "How to write"},
    {"-n", "N", "tokens at most (default: until the end)", &INT, AT(request.n), 1, INT_MAX,
     .key = "n"},
    {"-t", "T", "0: the likeliest token; 1: as the model says (default 0.8)", &REAL,
     AT(request.sampling.temperature), 0, 100, .key = "temperature"},
    {"--top-p", "P", "only the likeliest, of probability P together (default 0.95)", &REAL,
     AT(request.sampling.top_p), 0, 1, .key = "top_p"},
    {"--top-k", "K", "only the K likeliest tokens (default 0: all)", &INT,
     AT(request.sampling.top_k), 0, INT_MAX, .key = "top_k"},
    {"--min-p", "P", "only those at least P times as likely as the first (default 0)", &REAL,
     AT(request.sampling.min_p), 0, 1, .key = "min_p"},
    {"--seed", "S", "of the run: the first request's, the others get their own from it", &SEED,
     AT(request.sampling.seed), .key = "seed"},
    {"--stop", "TEXT", "end before this text; may be given several times", &STOP, AT(request),
     .key = "stop"},
    {"--system", "TEXT", "what a chat model is told first", &TEXT, AT(request.system),
     .key = "system"},
    {"--template",
     "auto|chatml|llama3|llama3.1|llama2|mistral|mistral3|mistral7|zephyr|falcon3|gemma|phi3|"
     "deepseek|harmony|none",
     "how a chat model is spoken to (default: as the file says)", &CHOICE, AT(template)},
    {.help = "Where to compute"},
    {"--devices", "LIST", "cpu:4, or CUDA devices: 0,1 or 0-7 or 0,0", &DEVICES, AT(devices)},
    {"--prefill", "LIST", "those of --devices, or of all, that read prompts", &PLACES, AT(prefill)},
    {"--decode", "LIST", "those of --devices, or of all, that write answers", &PLACES, AT(decode)},
    {"--tp", "N", "devices that share one copy of the model: 1, 2, 4 or 8", &INT, AT(tp), 1, 8},
    {"--tp-prefill", "N", "the same, of workers that read prompts (default: --tp)", &INT,
     AT(tp_prefill), 1, 8},
    {"--tp-decode", "N", "the same, of workers that write answers (default: --tp)", &INT,
     AT(tp_decode), 1, 8},
    {"--colocate", NULL, "every worker prefills and decodes", &FLAG, AT(colocate)},
    {"--auto", "SECONDS", "every so many a worker may change its role, as the load does", &REAL,
     AT(role_seconds), 1e-3, 1e6},
    {"--threads", "N", "CPU threads", &INT, AT(threads), 1, 1024},
    {.help = "Memory (SIZE: bytes with K, M or G, or blocks of 16 tokens: 8b; per device)"},
    {"--kv-device", "SIZE", "KV cache on each device", &SIZE, AT(kv_device), 1},
    {"--kv-host", "SIZE", "KV cache in host memory; 0: none", &SIZE, AT(kv_host)},
    {"--kv-type", "f32|bf16", "type of its numbers", &CHOICE, AT(kv_type)},
    {"--kv-policy", "on-evict|write-through",
     "copy blocks to the host when they must go, or at once", &CHOICE, AT(kv_policy)},
    {"--max-batch", "N", "requests in one decode step, at most", &INT, AT(max_batch), 1, 65536},
    {"--chunk", "N", "prompt tokens in one prefill step, at most", &INT, AT(chunk), 1, 1 << 20},
    {"--max-queue", "N", "requests that may wait, others are refused (default 0: any number)", &INT,
     AT(max_queue), 0, INT_MAX},
    {.help = "For clients of OpenAI's protocol"},
    {"--serve", "PORT", "answer HTTP: /v1/chat/completions and others; 0: any free port", &INT,
     AT(serve), 0, 65535},
    {"--host", "ADDRESS", "from which network (default 127.0.0.1: this machine alone)", &TEXT,
     AT(host)},
    {"--api-key", "KEY", "that clients must have", &TEXT, AT(api_key)},
    {"--api-key-file", "FILE", "the same, one a line", &TEXT, AT(api_key_file)},
    {.help = "Loads, and clusters that need not be there"},
    {"--replay", "FILE|IN:OUT", "requests of a Mooncake trace; or of IN tokens each, and OUT back",
     &TEXT, AT(replay)},
    {"--rate", "R", "requests a second in the mean (default: the trace's; IN:OUT: all at once)",
     &REAL, AT(rate), 1e-6, 1e6},
    {"--limit", "N", "requests of the load at most (IN:OUT: default 1000)", &INT, AT(limit), 1,
     INT_MAX},
    {"--ttft", "MS", "target: time to first token", &REAL, AT(ttft), 1e-3, 1e9},
    {"--itl", "MS", "target: inter-token latency", &REAL, AT(itl), 1e-3, 1e9},
    {"--sim", "CLUSTER", "run the load in virtual time on h100x8, 2xh100x8, …", &TEXT, AT(sim)},
    {"--plan", "CLUSTER", "rank the splits of its GPUs into pools for the load", &TEXT, AT(plan)},
    {"--rates", "FILE", "what was measured, in place of the chips' data sheets", &TEXT, AT(rates)},
    {"--trace", "FILE", "write steps, copies and decisions for Perfetto", &TEXT, AT(trace)},
    {"--fail", "WORKER@SECONDS",
     "take a worker out (1@2-4: it is back at 4; 1@#9: in its ninth step)", &FAILURE, .offset = 0},
    {.help = "What to show"},
    {"--json", NULL, "one JSON object a request", &FLAG, AT(json)},
    {"--stats", NULL, "a table of speeds and of what the pager did", &FLAG, AT(stats)},
    {"--watch", NULL, "a picture of workers, blocks and speeds on stderr as they run", &FLAG,
     AT(watch)},
    {"--verbose", NULL,
     "each step, copy and decision, a model's thoughts, what of its file is unused", &FLAG,
     AT(verbose)},
    {"--copy-delay", "SEED", "for tests: delay CPU copies at random", &SEED, AT(copy_delay)},
    {"--version", NULL, "print the version", &FLAG, AT(version)},
    {"--help", NULL, "print this; so does -h (and --prompt, --n-predict, --temp are -p, -n, -t)",
     &FLAG, AT(help)},
};
#undef AT
enum { N_ROWS = sizeof option_rows / sizeof *option_rows };
static_assert(N_ROWS <= 128, "an option_set has one bit for each row");

/* What a way to run does not know is refused: each of these options excludes the others, or all but
 * those, or needs one of them. */
static const struct rule {
    enum { ONE_OF_THEM, EXCLUDES, ONLY, NEEDS } what;
    const char *options, *others;
} rules[] = {
    {ONE_OF_THEM, "", "-p --ids -f --tokenize --perplexity --replay --serve"},
    {ONE_OF_THEM, "", "--serve --sim --plan"},
    {EXCLUDES, "--serve", "--json --stats"}, /* it answers in JSON, and has /metrics */
    {NEEDS, "--host --api-key --api-key-file", "--serve"},
    {NEEDS, "--sim --plan", "--replay or -f"},
    {NEEDS, "--rate --limit", "--replay"},
    {NEEDS, "--ttft", "--replay, --sim or --plan"},
    {NEEDS, "--itl", "--replay, --sim, --plan or --auto"},
    {NEEDS, "--rates", "--sim or --plan"},
    {NEEDS, "--logits", "-p or --ids"},
    {NEEDS, "--watch", "-p, --ids, -f, --replay or --serve"},
    {NEEDS, "--prefill", "--decode"},
    {NEEDS, "--decode", "--prefill"},
    {EXCLUDES, "--colocate", "--prefill --auto"},
    {EXCLUDES, "--ids", "--system"}, /* which are words before words */
    /* a load says how long its prompts and answers are, and ends with a table of its own */
    {EXCLUDES, "--replay", "-n --stop --system --template --tokenizer --stats"},
    /* virtual time computes and draws nothing, makes no texts, and none could watch it */
    {EXCLUDES, "--sim --plan",
     "-t --top-p --top-k --min-p --stop --threads --stats --watch --copy-delay"},
    /* a plan tries all splits of a cluster and all rates, again and again */
    {EXCLUDES, "--plan",
     "--devices --prefill --tp --tp-prefill --tp-decode --colocate --rate --auto --fail --trace "
     "--verbose"},
    /* what looks at the model itself writes nothing, and takes texts as they are, one by one */
    {ONLY, "--tokenize", "-m --tokenizer"},
    {ONLY, "--perplexity --logits",
     "-m -p --ids --tokenizer --devices --prefill --decode --tp --tp-prefill --tp-decode "
     "--colocate --threads --kv-device --kv-host --kv-type --chunk --verbose"},
};

/* `name`: the option or the key; `quote`: what stands around the text, or "". */
static bool refuse_value(const struct value *value, const char *name, const char *quote,
                         char *error) {
    const struct option_row *row = value->row;
    const char *expected = row->kind->expected ? row->kind->expected : row->argument;
    char range[64] = "";
    if (row->high > row->low)
        snprintf(range, sizeof range, " from %.10g to %.10g", row->low, row->high);
    return fail(error, "%s: got %s%.*s%s, expected %s%s", name, quote,
                value->length < 60 ? (int)value->length : 60, value->text, quote, expected, range);
}

/* What people type who know other programs: the first N_OBEYED are taken, others suggested. */
static const struct other_name {
    const char *name, *option;
} other_names[] = {
    {"-h", "--help"},
    {"--temp", "-t"},
    {"--prompt", "-p"},
    {"--n-predict", "-n"},
    {"--temperature", "-t"},
    {"--max-tokens", "-n"},
    {"--max-new-tokens", "-n"},
    {"--model", "-m"},
    {"--file", "-f"},
    {"--input-ids", "--ids"},
    {"--system-prompt", "--system"},
    {"--chat-template", "--template"},
    {"--gpus", "--devices"},
    {"--n-gpu-layers", "--devices"},
    {"--tensor-parallel-size", "--tp"},
    {"--batch-size", "--max-batch"},
    {"--max-num-seqs", "--max-batch"},
    {"--cache-type", "--kv-type"},
};
enum { N_OTHERS = sizeof other_names / sizeof *other_names, N_OBEYED = 4 };

/* The name by which a row is known on the command line, or in a request file. */
static const char *name_of(const struct option_row *row, bool key) {
    const char *name = key ? row->key : row->name;
    return name ? name : "";
}

static const struct option_row *find_row(const char *name, bool key) {
    for (int i = 0; i < N_OBEYED && !key; i++)
        if (strcmp(other_names[i].name, name) == 0)
            name = other_names[i].option;
    for (int row = 0; row < N_ROWS && *name; row++)
        if (strcmp(name_of(&option_rows[row], key), name) == 0)
            return &option_rows[row];
    return NULL;
}

bool cli_given(option_set given, const char *option) {
    const struct option_row *row = find_row(option, false);
    assert(row != NULL);
    return given >> (row - option_rows) & 1;
}

/* Whether so many bytes inserted, removed, changed or swapped make b of a; - and _ are the same. */
static bool resembles(const char *a, const char *b, int edits) {
    for (; *a && (*a == *b || (strchr("-_", *a) && strchr("-_", *b) && *b)); a++)
        b++;
    if (!*a && !*b)
        return true;
    return edits > 0 &&
           ((*a && resembles(a + 1, b, edits - 1)) || (*b && resembles(a, b + 1, edits - 1)) ||
            (*a && *b && resembles(a + 1, b + 1, edits - 1)) ||
            (*a && *b && *a == b[1] && a[1] == *b && resembles(a + 2, b + 2, edits - 1)));
}

/* What an unknown name may have meant: a name of either kind, as it is or nearly. NULL: nothing. */
static const char *suggest(const char *name, bool key) {
    name += strspn(name, "-");
    int most = strlen(name) < 3 ? 0 : strlen(name) < 6 ? 1 : 2;
    for (int edits = 0; edits <= most; edits++) {
        for (int i = 0; i < 2 * N_ROWS + N_OTHERS; i++) {
            const struct other_name *other = i < 2 * N_ROWS ? NULL : &other_names[i - 2 * N_ROWS];
            const struct option_row *row =
                other ? find_row(other->option, false) : &option_rows[i / 2];
            const char *similar = other ? other->name : name_of(row, i % 2 != key);
            similar += strspn(similar, "-");
            if (*similar && *name_of(row, key) && (int)strlen(similar) > 2 * edits &&
                resembles(name, similar, edits))
                return name_of(row, key);
        }
    }
    return NULL;
}

/* Marks an option as given; NULL: there is no such option, or it was given already. */
static const struct option_row *give(option_set *given, const char *name, bool key, char *error) {
    const struct option_row *row = find_row(name, key);
    if (!row) {
        const char *similar = suggest(name, key);
        fail(error, "%.60s: unknown %s; %s%s", name, key ? "key" : "option",
             similar ? "did you mean " : "--help lists all", similar ? similar : "");
        return NULL;
    }
    option_set bit = (option_set)1 << (row - option_rows);
    if (*given & bit && ((row->kind != &STOP && row->kind != &FAILURE) || key) &&
        !fail(error, "%s: given twice", name))
        return NULL;
    *given |= bit;
    return row;
}

/* The content of a message: a text, or a list of `{"type": "text", "text": "Hi"}`, which become one
 * text, a line each, where the first of them stands. */
static bool read_content(const struct json_node *nodes, int at, struct said *said, char *error) {
    *said = (struct said){NULL, 0};
    if (nodes[at].type == '"')
        *said = (struct said){nodes[at].text, nodes[at].length};
    for (int i = at + 1; nodes[at].type == '[' && i < nodes[at].next; i = nodes[i].next) {
        int type = json_find(nodes, i, "type"), text = json_find(nodes, i, "text");
        if (text < 0 || nodes[text].type != '"' ||
            (type >= 0 && strcmp(nodes[type].text, "text") != 0))
            return fail(error, "messages: got a part of content that is not text");
        if (said->text)
            said->text[said->length++] = '\n'; /* a part has more bytes than its text */
        else
            said->text = nodes[text].text;
        memmove(said->text + said->length, nodes[text].text, nodes[text].length);
        said->length += nodes[text].length;
        said->text[said->length] = 0;
    }
    return said->text || fail(error, "messages: got a content without parts");
}

/* `[{"role": "user", "content": "Hi"}, ...]`: the last is the prompt, what is before it has been
 * said. The keys of a message may come in any order; `developer` is another word for system. */
static bool set_messages(struct request_spec *request, const struct json_node *nodes, int list,
                         char *error) {
    static const char *const roles[] = {"user", "assistant"};
    int number = 0, n = 0;
    for (int i = list + 1; i < nodes[list].next; i = nodes[i].next, number++) {
        int told = json_find(nodes, i, "role"), content = json_find(nodes, i, "content");
        int calls = json_find(nodes, i, "tool_calls");
        bool named = told >= 0 && nodes[told].type == '"';
        const char *role = named ? nodes[told].text : "none", *expected = roles[n % 2];
        bool system =
            number == 0 && (strcmp(role, "system") == 0 || strcmp(role, "developer") == 0);
        bool none = content < 0 || !strchr("\"[", nodes[content].type);
        if (none || (!system && strcmp(role, expected) != 0))
            return fail(error, "messages: number %d: got role %.40s%s, expected %s and a content",
                        number + 1, role, none ? " and no content" : "", expected);
        if (calls >= 0 && nodes[calls].next > calls + 1)
            return fail(error, "messages: number %d: got tool_calls, of which there are none here",
                        number + 1);
        request->earlier = grow(request->earlier, (size_t)n, sizeof *request->earlier);
        if (!read_content(nodes, content, &request->earlier[n], error))
            return false;
        request->system = system ? request->earlier[n].text : request->system;
        n += !system;
    }
    if (n % 2 == 0)
        return fail(error, "messages: got %d, expected the last to be the user's", number);
    request->n_earlier = n - 1;
    request->prompt = request->earlier[n - 1].text;
    request->prompt_length = request->earlier[n - 1].length;
    return true;
}

/* Sets what the key of a row says, of which nodes[at] is the value; an error calls it `name`. */
static bool set_value(struct request_spec *request, const struct option_row *row,
                      const struct json_node *nodes, int at, const char *name, char *error) {
    int end = nodes[at].next;
    if (row->kind == &MESSAGES && nodes[at].type == '[')
        return set_messages(request, nodes, at, error);
    if (row->kind == &STOP) {
        request->n_stop = 0;
        at += nodes[at].type == '[';
    }
    char *target = (char *)request + (row->offset - offsetof(struct options, request));
    for (; at < end; at = nodes[at].next) {
        const struct json_node *node = &nodes[at];
        size_t bracket = node->type == '['; /* of token ids */
        struct value inside = {node->text + bracket, node->length - 2 * bracket, row};
        if (node->type != row->kind->json || !row->kind->read || !row->kind->read(&inside, target))
            return refuse_value(&(struct value){node->text, node->length, row}, name,
                                node->type == '"' ? "\"" : "", error);
    }
    return true;
}

bool requests_set(struct request_spec *request, const char *key, const struct json_node *nodes,
                  int at, const char *name, char error[ERROR_LENGTH]) {
    const struct option_row *row = find_row(key, true);
    assert(row != NULL);
    return set_value(request, row, nodes, at, name, error);
}

/* ---- files of requests ---- */

/* text[length] is 0. The id comes first: then whatever is wrong is told of it. */
static bool read_request(struct request_spec *request, char *text, size_t length, char *error) {
    if (text[strspn(text, " \t")] != '{') {
        request->prompt = text;
        request->prompt_length = length;
        return true;
    }
    option_set given = 0;
    int n_nodes = 0;
    struct json_node *nodes = json_parse_part(text, length, &n_nodes, error);
    bool good = !*error;
    for (int at = 1; at + 1 < n_nodes && nodes[at + 1].next; at = nodes[at + 1].next)
        if (strcmp(nodes[at].text, "id") == 0 && nodes[at + 1].type == '"')
            request->id = nodes[at + 1].text;
    for (int key = 1; good && key < nodes[0].next; key = nodes[key + 1].next) {
        bool plain = nodes[key].length == strlen(nodes[key].text); /* no zero byte inside */
        const struct option_row *row = give(&given, plain ? nodes[key].text : "", true, error);
        good = row && set_value(request, row, nodes, key + 1, row->key, error);
    }
    free(nodes);
    request->seeded = cli_given(given, "--seed");
    if (good && request->cancel)
        return (given & (given - 1)) == 0 || fail(error, "cancel: expected no other key");
    int n = cli_given(given, "-p") + cli_given(given, "--ids") + (request->earlier != NULL);
    return good && (n == 1 || fail(error, "expected one of prompt, ids and messages"));
}

bool requests_open(struct requests *requests, const char *path, char error[ERROR_LENGTH]) {
    bool std = strcmp(path, "-") == 0;
    requests->name = std ? "stdin" : path;
    requests->file = std ? stdin : fopen(path, "rb");
    return requests->file || fail(error, "%.400s: %s", requests->name, strerror(errno));
}

/* Reads into requests->text what comes before `end`, a byte or EOF, and puts a zero byte there. */
static bool read_until(struct requests *requests, int end, size_t *length, char *error) {
    size_t n = 0;
    int byte;
    *error = 0;
    while ((byte = getc_unlocked(requests->file)) != EOF && byte != end && n <= CLI_FILE_LENGTH) {
        requests->text = grow(requests->text, n, 1);
        requests->text[n++] = (char)byte;
    }
    requests->text = grow(requests->text, n, 1);
    requests->text[n] = 0;
    *length = n;
    if (byte == EOF && ferror(requests->file))
        return fail(error, "%.400s: %s", requests->name, strerror(errno));
    return n <= CLI_FILE_LENGTH ||
           fail(error, "%.400s: got more than %d bytes", requests->name, CLI_FILE_LENGTH);
}

char *cli_read_file(const char *path, size_t *length, char error[ERROR_LENGTH]) {
    struct requests whole = {0};
    char *text = NULL;
    if (requests_open(&whole, path, error) && read_until(&whole, EOF, length, error)) {
        text = whole.text;
        whole.text = NULL;
    }
    requests_free(&whole);
    return text;
}

int requests_line(struct requests *requests, size_t *length, char error[ERROR_LENGTH]) {
    if (!read_until(requests, '\n', length, error))
        return -1;
    if (*length == 0 && feof(requests->file))
        return 0;
    requests->n_lines++;
    *length -= *length > 0 && requests->text[*length - 1] == '\r';
    requests->text[*length] = 0;
    if (strncmp(requests->text, "\xEF\xBB\xBF", 3) == 0)
        memmove(requests->text, requests->text + 3, (*length -= 3) + 1);
    const char *text = requests->text; /* UTF-16 begins with a mark, or has zeros in between */
    bool wide = requests->n_lines == 1 && *length > 1 &&
                (!text[0] != !text[1] || memcmp(text, "\xFF\xFE", 2) == 0 ||
                 memcmp(text, "\xFE\xFF", 2) == 0);
    return wide && !fail(error, "%.400s: got UTF-16, expected UTF-8", requests->name) ? -1 : 1;
}

int requests_next(struct requests *requests, const struct request_spec *defaults,
                  struct request_spec *spec, char error[ERROR_LENGTH]) {
    char wrong[ERROR_LENGTH];
    size_t length = 0;
    while (length == 0) {
        int read = requests_line(requests, &length, error);
        if (read <= 0)
            return read;
    }
    if (!requests->endless && requests->n_read++ == CLI_REQUESTS &&
        !fail(error, "%.400s: got more than %d requests; split it", requests->name, CLI_REQUESTS))
        return -1;
    *spec = *defaults;
    spec->line = requests->text;
    spec->file = requests->name;
    spec->number = requests->n_lines;
    requests->text = NULL;
    if (read_request(spec, spec->line, length, wrong))
        return 1;
    spec->cancel = NULL;
    spec->error = grow(NULL, 0, ERROR_LENGTH);
    fail(spec->error, "%.200s:%d: %.250s", requests->name, requests->n_lines, wrong);
    return 1;
}

void requests_add(struct requests *requests, const struct request_spec *spec) {
    requests->specs = grow(requests->specs, (size_t)requests->n, sizeof *spec);
    requests->specs[requests->n++] = *spec;
}

void requests_forget(struct request_spec *spec) {
    if (!spec->line)
        return;
    free(spec->ids);
    free(spec->earlier);
    free(spec->error);
    free(spec->line);
}

void requests_free(struct requests *requests) {
    for (int i = 0; i < requests->n; i++)
        requests_forget(&requests->specs[i]);
    free(requests->specs);
    free(requests->text);
    if (requests->file && requests->file != stdin)
        (void)fclose(requests->file);
}

bool requests_stop(const char *text, size_t length, char *const *stop, int n_stop, size_t *safe) {
    size_t held = length, start = 0, end = SIZE_MAX;
    for (size_t at = *safe; at < length; at++) {
        for (int i = 0; i < n_stop; i++) {
            size_t left = length - at, size = strnlen(stop[i], left + 1);
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

/* ---- the command line ---- */

/* --tp is that of both pools, where they have none of their own. */
static bool check_widths(struct options *options, char *error) {
    int *widths[] = {&options->tp, &options->tp_prefill, &options->tp_decode};
    static const char *const names[] = {"--tp", "--tp-prefill", "--tp-decode"};
    if (cli_given(options->given, "--tp") && options->tp_prefill > 0 && options->tp_decode > 0)
        return fail(error, "--tp: --tp-prefill and --tp-decode leave nothing to it");
    const struct device_list *lists[] = {&options->devices, &options->prefill, &options->decode};
    for (int i = 0; i < 3; i++) {
        *widths[i] = *widths[i] > 0 ? *widths[i] : options->tp;
        if (8 % *widths[i] != 0)
            return fail(error, "%s: got %d, expected 1, 2, 4 or 8", names[i], *widths[i]);
        bool counts = i > 0 || options->tp_prefill + options->tp_decode == 0;
        if (counts && lists[i]->n % *widths[i])
            return fail(error, "%s: every list of devices must divide into groups of %d", names[i],
                        *widths[i]);
    }
    if (options->colocate && options->tp_prefill != options->tp_decode)
        return fail(error,
                    "--colocate: every worker prefills and decodes, but --tp-prefill is %d and "
                    "--tp-decode %d",
                    options->tp_prefill, options->tp_decode);
    return true;
}

/* The options that a rule lists. */
static option_set set_of(const char *list) {
    option_set set = 0;
    char name[32];
    for (size_t n; *(list += strspn(list, " ,")); list += n) {
        n = strcspn(list, " ,");
        (void)snprintf(name, sizeof name, "%.*s", (int)n, list);
        const struct option_row *row = find_row(name, false);
        set |= row ? (option_set)1 << (row - option_rows) : 0; /* none is `or` */
    }
    return set;
}

static const char *first_of(option_set set) {
    int row = 0;
    while (!(set >> row & 1))
        row++;
    return option_rows[row].name;
}

static bool check_rule(const struct rule *rule, option_set given, char *error) {
    option_set list = set_of(rule->others), met = given & (rule->what == ONLY ? ~list : list);
    option_set option = rule->what == ONE_OF_THEM ? met & -met : given & set_of(rule->options);
    met &= ~option;
    if (!option || (met != 0) == (rule->what == NEEDS))
        return true;
    return rule->what == NEEDS
               ? fail(error, "%s: needs %s", first_of(option), rule->others)
               : fail(error, "%s and %s exclude each other", first_of(option), first_of(met));
}

static bool check_options(struct options *options, char *error) {
    if (!options->model)
        return fail(error, "no model given; usage: dynamo MODEL [options], see --help");
    for (size_t i = 0; i < sizeof rules / sizeof *rules; i++)
        if (!check_rule(&rules[i], options->given, error))
            return false;
    if (options->kv_host.given && options->kv_host.value == 0 && options->kv_policy == 2)
        return fail(error, "--kv-policy: write-through needs a host tier, and --kv-host is 0");
    return check_widths(options, error);
}

bool cli_parse(struct options *options, int argc, char **argv, char error[ERROR_LENGTH]) {
    *options = (struct options){.tp = 1};
    options->request =
        (struct request_spec){.n = -1, .sampling = {.temperature = 0.8f, .top_p = 0.95f}};
    bool plain = false; /* behind -- no word is an option */
    for (int i = 1; i < argc; i++) {
        char *word = argv[i], *value = strchr(word, '=');
        if (!plain && strcmp(word, "--") == 0) {
            plain = true;
            continue;
        }
        if (plain || *word != '-') {
            if (options->model)
                return fail(error, "%.60s: unexpected; the model is %.60s, a prompt is given by -p",
                            word, options->model);
            options->model = word;
            (void)give(&options->given, "-m", false, error);
            continue;
        }
        if (value)
            *value++ = 0;
        const struct option_row *row = give(&options->given, word, false, error);
        if (!row)
            return false;
        if (row->kind != &FLAG && !value && i + 1 < argc && !find_row(argv[i + 1], false))
            value = argv[++i];
        if (row->kind != &FLAG && !value)
            return fail(error, "%s: missing value (%s)", word, row->argument);
        struct value whole = {value, value ? strlen(value) : 0, row};
        if (!row->kind->read(&whole, (char *)options + row->offset))
            return refuse_value(&whole, word, "", error);
    }
    return options->help || options->version || check_options(options, error);
}

void cli_free(struct options *options) {
    free(options->request.ids);
}

void cli_help(FILE *stream) {
    fputs(
        "usage: dynamo MODEL [options]\n\n"
        "Runs a language model as a datacenter does: one pool of devices reads prompts\n"
        "(prefill), another writes answers (decode). The KV cache moves between them in\n"
        "blocks; when a device is full, cold blocks are paged to host memory. MODEL is a GGUF\n"
        "file (any part of it), a llama2.c checkpoint or random:NAME[:TYPE] (random: lists all).\n"
        "Text goes to stdout, all else to stderr. Ways to begin:\n\n"
        "  dynamo model.bin\n"
        "      talks with a chat model, completes what you type with a base model; /help\n"
        "  dynamo model.bin -p \"Once upon a time\" -n 64 --stats\n"
        "      one prompt, then a table of what the pools and the pager did\n"
        "  echo \"One day, a fox\" | dynamo model.bin -t 0\n"
        "      the same from a pipe; the likeliest text, the same every time\n"
        "  dynamo model.bin -f prompts.txt --devices cpu:4 --kv-device 64b --kv-host 1G\n"
        "      many prompts at once on four small devices: blocks are paged out and in\n"
        "  dynamo model.bin -f requests.jsonl --json --stats > answers.jsonl\n"
        "      one request a line, each with options of its own: {\"prompt\": \"Hi\", \"n\": 9};\n"
        "      \"at\": its second, \"after\": whose answer it follows, \"deadline\", \"messages\"\n"
        "  dynamo model.bin -p \"Once\" --seed 7 --colocate\n"
        "      the same text as without --colocate: no schedule changes a text\n",
        stream);
    for (int i = 0; i < N_ROWS; i++) {
        const struct option_row *row = &option_rows[i];
        if (!row->kind) {
            fprintf(stream, "\n%s:\n", row->help);
        } else if (row->help) {
            const char *argument = row->argument ? row->argument : "";
            int fits = strlen(argument) > 80 ? 60 + (int)strcspn(argument + 60, "|") + 1 : 80;
            int printed = fprintf(stream, "  %s %.*s", row->name, fits, argument);
            if (strlen(argument) > 80)
                fprintf(stream, "\n%*s%s", 4, "", argument + fits);
            if (printed >= 23)
                fputc('\n', stream);
            fprintf(stream, "%*s%s", printed < 23 ? 23 - printed : 23, "", row->help);
            fprintf(stream, row->key ? " [%s]\n" : "\n", row->key);
        }
    }
}

/* ---- the terminal ---- */

void cli_progress(const char *label, int64_t done, int64_t total) {
    static struct timespec begun;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    if (done == 0)
        begun = now;
    int64_t ms = (now.tv_sec - begun.tv_sec) * 1000 + (now.tv_nsec - begun.tv_nsec) / 1000000;
    if (ms < PROGRESS_MS || !text_moves(2))
        return;
    static const char full[] = "##############################";
    int filled = (int)((int64_t)(sizeof full - 1) * done / total);
    if (done >= total)
        fputs("\r\033[K", stderr);
    else
        fprintf(stderr, "\r%s [%-30.*s] %d%%\033[K", label, filled, full,
                (int)(100 * done / total));
}

#endif /* CLI_IMPLEMENTATION */
