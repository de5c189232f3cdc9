/* replay.h: loads: requests that come at their times, and what came of them.
 *
 *     struct load *load = load_open(&options, error);
 *     load_start(load, now, sched_longest(sched));
 *     while (!load_is_done(load))
 *         if (load_next(load) <= now)
 *             sched_submit(sched, load_take(load), now); // load_ended(load, request, now) follows
 *         else ...
 *     load_print(load, &config, &sched_stats, &kv_stats);
 *
 * A load comes from a trace, from IN:OUT, or from the lines of -f, and is run by a driver, which
 * has the clock: load_run below, which waits, or one in virtual time, which does not.
 *
 * A trace has a request a line, in the form of Mooncake's (Qin et al., FAST 2025), in the order of
 * arrival; keys other than these say nothing that is needed here:
 *     {"timestamp": ms, "input_length": n, "output_length": n, "hash_ids": [46, 47, ...]}
 * The first arrives at once, the others as much later as their times say; blank lines are skipped.
 * Each hash id stands for HASH_TOKENS tokens of the prompt and all before them. The tokens are made
 * from the ids, so that prompts which begin with the same ids begin with the same tokens, and a
 * prefix cache finds what it would have found when the trace was taken (but for answers: a later
 * turn has the trace's tokens in their place). Prompts of IN:OUT have nothing in common. An answer
 * is as long as the load says, and for a line of -f that is its n: no token ends it. One that is
 * too long for the model, or for every worker that decodes, is cut short, and keeps no target.
 *
 * Owns what is known of requests until they have ended, and the statistics, in memory that does not
 * grow with a trace: it is read one line ahead, and a quantile comes from a sketch of fixed size.
 * Refuses to know of steps and workers: when a request runs is decided elsewhere. A line of a trace
 * that is wrong ends the load there, by file and line; a line of -f that is wrong is a request that
 * fails. Read next: answers.h, sim.h. */
#ifndef REPLAY_H
#define REPLAY_H

#include "answers.h"

struct load_options {
    const char *replay; /* a trace (`-`: stdin), or IN:OUT; NULL: the lines of `file` */
    const char *file;
    double rate; /* requests a second, as a Poisson process, but for lines that follow an answer;
                  * 0: the times of a trace or of lines, of IN:OUT 0 s */
    int limit;   /* requests at most; 0: all, of IN:OUT DEFAULT_REQUESTS */
    double ttft, itl; /* targets, in ms; 0: none */
    int64_t most_bad; /* when more than so many have missed a target, no others come; 0: whatever */
    bool json;        /* tells of each request as it ends, on stdout */
    const struct answers *answers;       /* makes prompts of lines; has the seed and vocab_size */
    const struct request_spec *defaults; /* what lines, and the sampling of all, start from */
};

struct load;
/* NULL: `error` is one line. What the options point to outlives the load. */
struct load *load_open(const struct load_options *options, char error[ERROR_LENGTH]);
/* Once, before the others: the load begins at `now` (> 0) by the clock of the driver, which all
 * times are of from here on; max_length: see sched_longest. */
void load_start(struct load *load, double now, int max_length);
/* When the next request arrives. INFINITY: none is known of, as before the answer it follows. */
double load_next(const struct load *load);
/* That request, ready to be submitted; not when load_next is INFINITY. Its id counts from 0. */
struct request *load_take(struct load *load);
/* Takes what came of a request that was taken, and frees it; load_sweep: of all that ended. */
void load_ended(struct load *load, struct request *request, double now);
void load_sweep(struct load *load, double now);
/* All that were taken have ended, and no other will come. */
bool load_is_done(const struct load *load);
/* Why it came to an end too soon: a line of the trace. NULL: it did not. */
const char *load_error(const struct load *load);
void load_close(struct load *load); /* when all that were taken have ended */

enum load_share { LOAD_MEAN, LOAD_P50, LOAD_P90, LOAD_P99, N_LOAD_SHARES };

struct load_result {          /* so far */
    int64_t requests, failed; /* that ended; of them with an error */
    int64_t cancelled;        /* that an interruption ended, which are not among those */
    int64_t cut;              /* whose answers are shorter than the load says */
    int64_t good;             /* that kept both targets, with all of the answer */
    int64_t arrivals;         /* that came by themselves, and did not follow an answer */
    int64_t prompt_tokens, cached_tokens, cached_on_host; /* of those that were admitted */
    int64_t generated_tokens;
    char first_error[ERROR_LENGTH];       /* of the first that failed with one; "": none */
    double seconds;                       /* from the start until the last ended */
    double times[N_TIMES][N_LOAD_SHARES]; /* in ms; quantiles within 0.5 percent */
};

struct load_result load_result(const struct load *load);
/* A table on stdout; with `json` the last object. config: all numbers of blocks are known. */
void load_print(const struct load *load, const struct engine_config *config,
                const struct sched_stats *sched, const struct kv_stats *kv);
/* Runs a load on answers->engine, by the clock, until it is done or interrupted. */
void load_run(struct load *load, struct answers *answers);

/* What is to happen, the earliest first; of one time that of the lowest serial. */
struct moment {
    double time;
    int64_t serial;
    union {
        void *item;
        int index;
    };
};
struct agenda {
    struct moment *heap; /* (n) each earlier than the two below it */
    int n;
};
void agenda_add(struct agenda *agenda, struct moment moment);
struct moment agenda_take(struct agenda *agenda); /* the first; there is one */

#endif /* REPLAY_H */

#ifdef REPLAY_IMPLEMENTATION
#undef REPLAY_IMPLEMENTATION

#include "../lib/json.h"
#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    HASH_TOKENS = 512,       /* of a prompt, for each hash id */
    DEFAULT_REQUESTS = 1000, /* of IN:OUT */
    N_BUCKETS = 3250         /* of a sketch: from SKETCH_LEAST to 1e7 s */
};

/* A sketch of quantiles: how many values fell into each of N_BUCKETS intervals, each SKETCH_GAMMA
 * times as wide as the one before, so that the middle of one is within 0.5 percent of every value
 * in it. (DDSketch: Masson et al., VLDB 2019) */
static const double SKETCH_LEAST = 1e-7, SKETCH_GAMMA = 1.005 / 0.995;
struct sketch {
    int64_t n, buckets[N_BUCKETS]; /* the first: [0, SKETCH_LEAST] */
    double sum;
};

struct item {               /* a request, from when it is known of until nobody needs it */
    struct request request; /* the first, so that an item is found by its request */
    double at;              /* its arrival */
    int64_t place;          /* in the load */
    char number[24];        /* the same in digits, … */
    const char *id;         /* … which is its id, if its line gave none */
    uint64_t *hash_ids;     /* of a trace: (blocks of HASH_TOKENS of its prompt); else NULL */
    const struct request_spec *spec;           /* of a line; else NULL */
    struct item *before, *followers, *sibling; /* whose answer it follows; who follow it */
    struct item *previous, *next;              /* of those that run */
    bool finished;                             /* as was seen last, under the engine's lock */
    int n_users;                               /* itself until it has ended, and its followers */
};

struct load {
    struct load_options options;
    struct requests lines; /* of the trace, or of -f */
    int in, out;           /* of IN:OUT; 0: none */
    struct agenda known;   /* items; the first has its prompt */
    int max_length;
    struct item *first_running, *last_running; /* in the order of arrival */
    int64_t n_made, n_arrived, n_running;
    bool interrupted; /* no other comes */
    double start, last_ended;
    double arrived, timestamp; /* of the request made last: by --rate; of the trace, in ms; … */
    double first;              /* … that of the first, which arrives at once */
    struct load_result sums;   /* without times */
    struct sketch times[N_TIMES];
    char error[ERROR_LENGTH]; /* "": none */
};

/* ---- a sketch of quantiles ---- */

static void sketch_add(struct sketch *sketch, double value) {
    double bucket = value > SKETCH_LEAST ? ceil(log(value / SKETCH_LEAST) / log(SKETCH_GAMMA)) : 0;
    sketch->buckets[bucket < N_BUCKETS ? (int)bucket : N_BUCKETS - 1]++;
    sketch->sum += value;
    sketch->n++;
}

/* The value that a share of all stays within, by nearest rank. */
static double sketch_quantile(const struct sketch *sketch, double share) {
    int64_t rank = (int64_t)ceil(share * (double)sketch->n), n = sketch->buckets[0];
    int bucket = 0;
    while (n < rank && bucket < N_BUCKETS - 1)
        n += sketch->buckets[++bucket];
    if (bucket == 0)
        return 0;
    return 2 * SKETCH_LEAST * pow(SKETCH_GAMMA, bucket) / (SKETCH_GAMMA + 1);
}

/* ---- what is known, in the order of arrival ---- */

static bool is_earlier(const struct moment *a, const struct moment *b) {
    return (a->time < b->time) | ((a->time == b->time) & (a->serial < b->serial)); /* no branch */
}

void agenda_add(struct agenda *agenda, struct moment moment) {
    int i = agenda->n++;
    agenda->heap = grow(agenda->heap, (size_t)i, sizeof moment);
    for (; i > 0 && is_earlier(&moment, &agenda->heap[(i - 1) / 2]); i = (i - 1) / 2)
        agenda->heap[i] = agenda->heap[(i - 1) / 2];
    agenda->heap[i] = moment;
}

struct moment agenda_take(struct agenda *agenda) {
    struct moment *heap = agenda->heap, first = heap[0], last = heap[--agenda->n];
    int i = 0;
    for (int child; (child = 2 * i + 1) < agenda->n; i = child) {
        child += child + 1 < agenda->n && is_earlier(&heap[child + 1], &heap[child]);
        if (!is_earlier(&heap[child], &last))
            break;
        heap[i] = heap[child];
    }
    heap[i] = last;
    return first;
}

static void known_add(struct load *load, struct item *item) {
    agenda_add(&load->known, (struct moment){item->at, item->place, .item = item});
}

/* ---- making requests ---- */

static struct item *item_create(struct load *load, const struct request_spec *spec) {
    struct item *item = grow(NULL, 0, sizeof *item);
    *item = (struct item){.place = load->n_made++, .spec = spec, .n_users = 1};
    item->request.n_prompt = load->in; /* of IN:OUT */
    item->request.max_new = load->out;
    (void)snprintf(item->number, sizeof item->number, "%" PRId64, item->place);
    item->id = spec && spec->id ? spec->id : item->number;
    item->request.sampling = spec ? spec->sampling : load->options.defaults->sampling;
    if (!spec || !spec->seeded)
        item->request.sampling.seed = answers_seed(load->options.answers->seed, item->place);
    return item;
}

static void item_release(struct item *item) { /* one who needed it does no more */
    if (!item || --item->n_users > 0)
        return;
    free(item->request.tokens);
    free(item->hash_ids);
    free(item);
}

/* A Poisson process: what lies between two arrivals is distributed exponentially. */
static double next_arrival(struct load *load, int64_t place) {
    uint64_t random = answers_random(~load->options.answers->seed, (uint64_t)place);
    return load->arrived -= log(((double)(random >> 11) + 0.5) * 0x1p-53) / load->options.rate;
}

/* What stands behind a key of a trace's line. */
static bool trace_number(const struct json_node *value, const char *key, double low, double high,
                         double *number, char *error) {
    if (!value)
        return fail(error, "%s: missing", key);
    *number = value->type == '0' ? strtod(value->text, NULL) : -1;
    bool whole = low == 0 || *number == floor(*number); /* a time need not be */
    return (*number >= low && *number <= high && whole) ||
           fail(error, "%s: got %.*s, expected a %snumber from %g to %.10g", key,
                value->length < 40 ? (int)value->length : 40, value->text, low == 0 ? "" : "whole ",
                low, high);
}

/* Takes over the hash ids that `list` holds, one for all HASH_TOKENS tokens of the prompt. */
static bool trace_hash_ids(const struct json_node *nodes, const struct json_node *list,
                           struct item *item, char *error) {
    int n = 0, wanted = (item->request.n_prompt - 1) / HASH_TOKENS + 1;
    if (!list || list->type != '[')
        return fail(error, list ? "hash_ids: expected a list" : "hash_ids: missing");
    for (int i = (int)(list - nodes) + 1; i < list->next && n < wanted; i = nodes[i].next) {
        size_t length = nodes[i].length;
        if (nodes[i].type != '0' || length > 19 || strspn(nodes[i].text, "0123456789") < length)
            return fail(error, "hash_ids: got %.*s, expected whole numbers of at most 19 digits",
                        length < 40 ? (int)length : 40, nodes[i].text);
        item->hash_ids = grow(item->hash_ids, (size_t)n, sizeof *item->hash_ids);
        item->hash_ids[n++] = strtoull(nodes[i].text, NULL, 10);
    }
    static const char wrong[] =
        "hash_ids: got %d, expected %d, one for every %d tokens of input_length";
    return n == wanted || fail(error, wrong, n, wanted, HASH_TOKENS);
}

/* Takes over what a line of a trace says. */
static bool trace_read(struct load *load, const struct json_node *nodes, struct item *item,
                       char *error) {
    static const char *const keys[] = {"timestamp", "input_length", "output_length", "hash_ids"};
    const struct json_node *values[4] = {NULL};
    double ms = 0, in = 0, out = 0;
    if (nodes[0].type != '{')
        return fail(error, "expected an object");
    for (int key = 1; key < nodes[0].next; key = nodes[key + 1].next)
        for (int i = 0; i < 4; i++)
            if (strcmp(nodes[key].text, keys[i]) == 0)
                values[i] = &nodes[key + 1];
    if (!trace_number(values[0], keys[0], 0, 1e15, &ms, error) ||
        !trace_number(values[1], keys[1], 1, INT_MAX, &in, error) ||
        !trace_number(values[2], keys[2], 1, INT_MAX, &out, error))
        return false;
    if (ms < load->timestamp)
        return fail(error, "timestamp: got %.15g, expected at least %.15g, that of the line before",
                    ms, load->timestamp);
    load->timestamp = ms;
    load->first = item->place == 0 ? ms : load->first;
    item->at = 1e-3 * (ms - load->first);
    item->request.n_prompt = (int)in;
    item->request.max_new = (int)out;
    return trace_hash_ids(nodes, values[3], item, error);
}

/* NULL: the trace has ended, or is wrong: then there is an error. */
static struct item *make_traced(struct load *load) {
    char wrong[ERROR_LENGTH];
    size_t length = 0;
    int read;
    do
        read = requests_line(&load->lines, &length, load->error);
    while (read > 0 && strspn(load->lines.text, " \t\r") == length);
    if (read <= 0)
        return NULL;
    struct item *item = item_create(load, NULL);
    struct json_node *nodes = json_parse(load->lines.text, length, wrong);
    bool good = nodes && trace_read(load, nodes, item, wrong);
    free(nodes);
    if (good)
        return item;
    item_release(item);
    (void)fail(load->error, "%.200s:%d: %.250s", load->lines.name, load->lines.n_lines, wrong);
    return NULL;
}

/* Makes the next request known of, if there is one: those of -f are from the beginning. */
static void make_next(struct load *load) {
    int64_t place = load->n_made;
    if (!load->options.replay || load->error[0] || load->interrupted ||
        (load->options.limit > 0 && place >= load->options.limit))
        return;
    struct item *item = load->in > 0 ? item_create(load, NULL) : make_traced(load);
    if (!item)
        return;
    item->at = load->options.rate > 0 ? next_arrival(load, place) : item->at;
    item->at += load->start;
    known_add(load, item);
}

/* All lines of -f: those that follow no answer are known of from the beginning. */
static bool make_lines(struct load *load, char *error) {
    struct requests *lines = &load->lines;
    struct request_spec spec;
    int read;
    while ((read = requests_next(lines, load->options.defaults, &spec, error)) > 0) {
        requests_add(lines, &spec);
        if (spec.cancel)
            return fail(error, "%.200s:%d: cancel: not in a load", spec.file, spec.number);
    }
    struct item **items = NULL;
    for (int i = 0; i < lines->n; i++) {
        const struct request_spec *line = &lines->specs[i];
        struct item *item = item_create(load, line), *before = NULL;
        for (int j = i - 1; j >= 0 && line->after && !before; j--)
            if (lines->specs[j].id && strcmp(lines->specs[j].id, line->after) == 0)
                before = items[j];
        items = grow(items, (size_t)i, sizeof *items);
        items[i] = item;
        item->at = load->options.rate > 0 && !line->after ? next_arrival(load, i) : line->at;
        item->before = before;
        if (before) {
            item->sibling = before->followers;
            before->followers = item;
            before->n_users++;
        } else {
            known_add(load, item);
        }
    }
    free(items);
    return read == 0;
}

/* ---- prompts ---- */

/* Of a line: what it says, after the answer that it follows. False: it has ended with an error. */
static bool prompt_of_line(const struct load *load, struct item *item) {
    struct request *r = &item->request;
    const struct request *before = item->before ? &item->before->request : NULL;
    const struct request_spec *spec = item->spec;
    if (!answers_prepare(load->options.answers, spec, before, before ? before->tokens : NULL,
                         before ? before->length : 0, load->max_length, r))
        return false;
    if (spec->n >= 0 && spec->n_stop == 0)
        return true;
    r->state = REQUEST_FINISHED;
    r->reason = FINISH_ERROR;
    return fail(r->error, spec->n < 0 ? "n: not given; a made-up answer has no other end"
                                      : "stop: a made-up answer has no text; n is its length");
}

/* Made from hash ids, or unlike any other. One that does not fit is refused unread. */
static bool prompt_of_numbers(const struct load *load, struct item *item) {
    const struct answers *a = load->options.answers;
    struct request *r = &item->request;
    int64_t room = (int64_t)r->n_prompt + r->max_new;
    room = room <= load->max_length ? room : load->max_length + 1;
    r->tokens = malloc((size_t)room * sizeof *r->tokens);
    if (!r->tokens)
        abort();
    uint64_t text = answers_random(a->seed, (uint64_t)item->place), n = (uint64_t)a->vocab_size;
    for (int i = 0; i < r->n_prompt && i < room; i++) {
        int at = item->hash_ids ? i % HASH_TOKENS : i;
        if (item->hash_ids && at == 0)
            text = answers_random(a->seed, item->hash_ids[i / HASH_TOKENS]);
        r->tokens[i] = (int)(answers_random(text, (uint64_t)at) % n);
    }
    free(item->hash_ids);
    item->hash_ids = NULL;
    return true;
}

/* ---- what came of them ---- */

static bool is_good(const struct load *load, const struct request *r) {
    double ttft = 1e3 * answers_time(r, TIME_TTFT), itl = 1e3 * answers_time(r, TIME_ITL);
    return (r->reason == FINISH_STOP || r->reason == FINISH_LENGTH) &&
           (load->options.ttft <= 0 || ttft <= load->options.ttft) &&
           (load->options.itl <= 0 || itl <= load->options.itl);
}

static void show_item(const struct load *load, const struct item *item) {
    const struct request *r = &item->request;
    (void)fputs("{\"id\":", stdout);
    json_string(stdout, item->id, strlen(item->id));
    printf(",\"at\":%.9g,", item->at - load->start);
    answers_json(r, r->length > r->n_prompt ? r->length - r->n_prompt : 0, r->reason);
    (void)fputs("}\n", stdout);
}

/* Counts a request that has ended, and makes those known of that follow it. */
static void count_item(struct load *load, struct item *item, double now) {
    struct request *r = &item->request;
    struct load_result *sums = &load->sums;
    int n_generated = r->length > r->n_prompt ? r->length - r->n_prompt : 0;
    bool cancelled = r->reason == FINISH_CANCELLED;
    bool cut =
        r->reason == FINISH_LENGTH && n_generated < (item->spec ? item->spec->n : r->max_new);
    sums->requests += !cancelled;
    sums->cancelled += cancelled;
    sums->failed += r->reason == FINISH_ERROR;
    sums->cut += cut;
    sums->good += !cut && is_good(load, r);
    sums->arrivals += !cancelled && (!item->spec || !item->spec->after);
    sums->prompt_tokens += r->admitted > 0 ? r->n_prompt : 0;
    sums->cached_tokens += r->cached_tokens;
    sums->cached_on_host += r->cached_on_host;
    sums->generated_tokens += n_generated;
    load->last_ended = fmax(load->last_ended, now);
    if (item->spec)
        answers_tell_line(item->spec, r);
    if (r->error[0] && !sums->first_error[0])
        (void)fail(sums->first_error, "request %.64s: %.400s", item->id, r->error);
    for (int i = 0; i < N_TIMES; i++) {
        double seconds = answers_time(r, (enum answer_time)i);
        if (seconds >= 0)
            sketch_add(&load->times[i], seconds);
    }
    if (load->options.json)
        show_item(load, item);
    for (struct item *next = item->followers; next; next = next->sibling) {
        next->at = fmax(load->start + next->at, now);
        known_add(load, next);
    }
    item_release(item);
}

/* The first of what is known of gets its prompt. Who can have none fails, as do all who follow. */
static void look_ahead(struct load *load) {
    struct item *item;
    while (load->known.n > 0 && !(item = load->known.heap[0].item)->request.tokens) {
        bool good = item->spec ? prompt_of_line(load, item) : prompt_of_numbers(load, item);
        item_release(item->before);
        item->before = NULL;
        if (!good)
            count_item(load, agenda_take(&load->known).item, item->at);
    }
}

/* What has not arrived will not. */
static void load_forget(struct load *load) {
    load->interrupted = true;
    while (load->known.n > 0) {
        struct item *item = agenda_take(&load->known).item;
        for (struct item *next = item->followers; next; next = next->sibling)
            known_add(load, next);
        item_release(item->before);
        item_release(item);
    }
}

/* ---- a load, to its driver ---- */

struct load *load_open(const struct load_options *options, char error[ERROR_LENGTH]) {
    struct load *load = grow(NULL, 0, sizeof *load);
    *load = (struct load){.options = *options};
    const char *replay = options->replay, *name = replay ? replay : options->file;
    char end;
    if (replay && strspn(replay, "0123456789:") == strlen(replay) &&
        sscanf(replay, "%9d:%9d%c", &load->in, &load->out, &end) == 2) {
        load->options.limit = options->limit > 0 ? options->limit : DEFAULT_REQUESTS;
        if (load->in > 0 && load->out > 0)
            return load;
        (void)fail(error, "--replay: got %.60s, expected at least 1:1", replay);
    } else if (requests_open(&load->lines, name, error) && (replay || make_lines(load, error))) {
        make_next(load);
        if (load->known.n > 0)
            return load;
        (void)fail(error, load->error[0] ? "%s" : "%.400s: no requests in it",
                   load->error[0] ? load->error : load->lines.name);
    }
    load_close(load);
    return NULL;
}

void load_start(struct load *load, double now, int max_length) {
    load->start = load->last_ended = now;
    load->max_length = max_length;
    for (int i = 0; i < load->known.n; i++) {
        struct moment *moment = &load->known.heap[i];
        moment->time = ((struct item *)moment->item)->at += now;
    }
    if (load->known.n == 0)
        make_next(load);
    look_ahead(load);
}

double load_next(const struct load *load) {
    return load->known.n > 0 ? load->known.heap[0].time : INFINITY;
}

struct request *load_take(struct load *load) {
    struct item *item = agenda_take(&load->known).item;
    item->request.id = load->n_arrived++;
    item->previous = load->last_running;
    *(item->previous ? &item->previous->next : &load->first_running) = item;
    load->last_running = item;
    load->n_running++;
    make_next(load);
    look_ahead(load);
    return &item->request;
}

void load_ended(struct load *load, struct request *request, double now) {
    struct item *item = (struct item *)request;
    *(item->previous ? &item->previous->next : &load->first_running) = item->next;
    *(item->next ? &item->next->previous : &load->last_running) = item->previous;
    load->n_running--;
    count_item(load, item, now);
    if (load->interrupted || (load->options.most_bad > 0 &&
                              load->sums.requests - load->sums.good > load->options.most_bad))
        load_forget(load);
    look_ahead(load);
}

static bool mark_finished(struct load *load) { /* false: none is */
    bool any = false;
    for (struct item *item = load->first_running; item; item = item->next)
        any |= item->finished = item->request.state == REQUEST_FINISHED;
    return any;
}

static void end_marked(struct load *load, double now) {
    for (struct item *item = load->first_running, *next; item; item = next) {
        next = item->next;
        if (item->finished)
            load_ended(load, &item->request, now);
    }
}

void load_sweep(struct load *load, double now) {
    if (mark_finished(load))
        end_marked(load, now);
}

bool load_is_done(const struct load *load) {
    return load->n_running == 0 && load->known.n == 0;
}

const char *load_error(const struct load *load) {
    return load->error[0] ? load->error : NULL;
}

void load_close(struct load *load) {
    if (!load)
        return;
    load_forget(load);
    free(load->known.heap);
    requests_free(&load->lines);
    free(load);
}

/* ---- on a real engine ---- */

/* Submits what has arrived, at a time about as many as run, so that those that have ended meanwhile
 * are not kept. Prompts are made without the lock. */
static void submit_arrived(struct load *load, struct engine *engine) {
    for (int64_t n = load->n_running + 64; n > 0 && load_next(load) <= engine_now(); n--) {
        struct request *r = load_take(load);
        engine_lock(engine);
        sched_submit(engine_sched(engine), r, engine_now());
        engine_wake(engine);
        engine_unlock(engine);
    }
}

void load_run(struct load *load, struct answers *a) {
    struct engine *engine = a->engine;
    load_start(load, engine_now(), sched_longest(engine_sched(engine)));
    a->activity = ANSWERING;
    while (!load_is_done(load)) {
        submit_arrived(load, engine);
        engine_lock(engine);
        if (a->activity == INTERRUPTED || ferror(stdout)) { /* then all end, whoever may follow */
            load_forget(load);
            a->interrupted = a->activity == INTERRUPTED;
            struct item *item = load->last_running; /* the last first: none takes its place */
            for (; item; item = item->previous)
                sched_cancel(engine_sched(engine), &item->request, false, engine_now());
            engine_wake(engine);
        }
        if (!mark_finished(load) && !load_is_done(load))
            engine_wait(engine, load_next(load));
        engine_unlock(engine);
        end_marked(load, engine_now());
        (void)fflush(stdout);
    }
    a->activity = IDLE;
}

/* ---- telling ---- */

static const char *load_cuts(const struct load *load, const struct model_config *model) {
    return load->max_length < model->context_length ? "no worker that decodes holds a longer text"
                                                    : "the model's context holds no longer text";
}

struct load_result load_result(const struct load *load) {
    static const double shares[] = {[LOAD_P50] = 0.5, [LOAD_P90] = 0.9, [LOAD_P99] = 0.99};
    struct load_result result = load->sums;
    result.seconds = load->last_ended - load->start;
    for (int i = 0; i < N_TIMES; i++) {
        const struct sketch *sketch = &load->times[i];
        result.times[i][LOAD_MEAN] = 1e3 * answers_ratio(sketch->sum, (double)sketch->n);
        for (int share = LOAD_P50; share < N_LOAD_SHARES; share++)
            result.times[i][share] = 1e3 * sketch_quantile(sketch, shares[share]);
    }
    return result;
}

static const char *const load_shares[] = {"mean", "p50", "p90", "p99"};

static void load_json(const struct load_result *result, const struct figure *figures, size_t n) {
    (void)fputs("{\"load\":{", stdout);
    for (size_t i = 0; i < n; i++)
        printf("%s\"%s\":%.15g", i > 0 ? "," : "", figures[i].key, answers_short(figures[i].value));
    for (int i = 0; i < N_TIMES; i++)
        for (int share = 0; share < N_LOAD_SHARES; share++)
            printf(",\"%s_%s_ms\":%.15g", answers_times[i][0], load_shares[share],
                   answers_short(result->times[i][share]));
    (void)fputs("}}\n", stdout);
}

static void load_table(const struct load_result *result, const struct figure *figures, size_t n) {
    printf("%-34s", "times in ms");
    for (int share = 0; share < N_LOAD_SHARES; share++)
        printf(" %11s", load_shares[share]);
    for (int i = 0; i < N_TIMES; i++) {
        printf("\n  %-32s", answers_times[i][1]);
        for (int share = 0; share < N_LOAD_SHARES; share++)
            printf(" %11.2f", result->times[i][share]);
    }
    (void)fputs("\nload\n", stdout);
    for (size_t i = 0; i < n; i++)
        printf("  %-32s %11.*f\n", figures[i].label, figures[i].decimals, figures[i].value);
    (void)fputs("time to first token: from arrival to the first token, the queue included; "
                "inter-token latency: the mean gap between the tokens of an answer\n",
                stdout);
}

void load_print(const struct load *load, const struct engine_config *config,
                const struct sched_stats *sched, const struct kv_stats *k) {
    struct load_result r = load_result(load);
    double gb = 1e-9 * (double)block_bytes(&config->model->config, 1, config->kv_type);
    int least = INT_MAX;
    for (int i = 0; i < config->n_workers; i++)
        least = config->workers[i].blocks < least ? config->workers[i].blocks : least;
    const struct figure all[] = {
        {"requests", "requests", (double)r.requests, 0},
        {"failed", "of them failed", (double)r.failed, 0},
        {"cut_short", "of them cut short", (double)r.cut, 0},
        {"seconds", "seconds", r.seconds, 2},
        {"requests_per_second", "requests/s", answers_ratio((double)r.requests, r.seconds), 3},
        {"tokens_per_second", "generated tokens/s",
         answers_ratio((double)r.generated_tokens, r.seconds), 2},
        {"prompt_tokens", "prompt tokens", (double)r.prompt_tokens, 0},
        {"found_on_devices", "found on devices", (double)(r.cached_tokens - r.cached_on_host), 0},
        {"found_on_host", "found on the host alone", (double)r.cached_on_host, 0},
        {"prefill_tokens", "computed, again included", (double)sched->prefill_tokens, 0},
        {"share_saved", "share found",
         answers_ratio((double)r.cached_tokens, (double)r.prompt_tokens), 3},
        {"preemptions", "preemptions", (double)sched->preemptions, 0},
        {"role_changes", "changes of a worker's role", (double)sched->role_changes, 0},
        {"pages_out", "blocks paged out", (double)k->pages_out, 0},
        {"pages_out_gb", "the same in GB", (double)k->pages_out * gb, 3},
        {"pages_in", "blocks paged in", (double)k->pages_in, 0},
        {"pages_in_gb", "the same in GB", (double)k->pages_in * gb, 3},
        {"blocks_transferred", "blocks moved between workers", (double)k->transfers, 0},
        {"transferred_gb", "the same in GB", (double)k->transfers * gb, 3},
        {"copies_unused", "copies to workers never used", (double)k->unused, 0},
        {"device_blocks", "blocks a worker holds at least", (double)least, 0},
        {"host_blocks", "blocks the host holds", (double)config->host_blocks, 0},
        {"goodput", "requests/s within the targets", answers_ratio((double)r.good, r.seconds), 3},
        {"good_share", "share of all requests", answers_ratio((double)r.good, (double)r.requests),
         3}};
    size_t n = sizeof all / sizeof *all;
    if (load->options.ttft <= 0 && load->options.itl <= 0)
        n -= 2;
    (load->options.json ? load_json : load_table)(&r, all, n);
    if (r.cut > 0 && !load->options.json)
        printf("cut short: %s\n", load_cuts(load, &config->model->config));
}

#endif /* REPLAY_IMPLEMENTATION */
