/* answers.h: the text of requests: prompts on their way in, answers on their way out.
 *
 *     struct answers answers = {.options = …, .tokenizer = …, .sched = …, …};
 *     int n_failed = answers_run(&answers, specs, n_specs);
 *     answers_stats(&answers);
 *
 * Turns request_specs into requests, submits them all, and shows their text as it comes: without
 * --json the answers in the order of the requests, the first unfinished one streaming; with --json
 * one object a request, as it ends. Decides nothing about when they run.
 *
 * An answer's bytes, by half-open intervals: [0, shown) printed, [shown, safe) to be printed,
 * [safe, length) held back, because it could be the beginning of a stop text.
 * Read next: tokenizer.h, cli.h (cli_stop). */
#ifndef ANSWERS_H
#define ANSWERS_H

#include "cli.h"
#include "dynamo.h"
#include "tokenizer.h"
#include <pthread.h>

enum activity { IDLE, ANSWERING, INTERRUPTED }; /* the last: by Ctrl-C */

struct answers {
    const struct options *options;
    const struct tokenizer *tokenizer; /* NULL: ids only */
    const char *no_tokenizer;          /* why there is none */
    int vocab_size, n_workers, device_blocks, host_blocks;
    const struct backend *backend;
    struct sched *sched;
    pthread_mutex_t *lock;
    pthread_cond_t *work, *news; /* tells the workers; told by them */
    enum activity *activity;     /* under the lock */
    double (*now)(void);
    int64_t next_id;
    /* sums over all requests that ended, for answers_stats */
    int64_t n_ended, n_tokens, n_intervals;
    double ttft_sum, ttft_max, interval_sum, busy_seconds;
};

/* Runs requests to their ends. Returns how many of them failed or were cancelled. */
int answers_run(struct answers *answers, const struct request_spec *specs, int n_specs);
/* The table of --stats on stderr, or with --json the last object on stdout. */
void answers_stats(const struct answers *answers);
/* One line on stderr: what pools and pager did. */
void answers_summary(const struct answers *answers);
/* The ids of a prompt as a request would have them. NULL: `error`. */
int *answers_encode(const struct answers *answers, const struct request_spec *spec, int *n_ids,
                    char error[CLI_ERROR_LENGTH]);

#endif /* ANSWERS_H */

#ifdef ANSWERS_IMPLEMENTATION
#undef ANSWERS_IMPLEMENTATION

#include "json.h"
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct answer {
    const struct request_spec *spec;
    struct request request;
    struct tok_stream stream;
    char *text; /* generated (length bytes) */
    size_t length, capacity, shown, safe;
    int n_decoded; /* generated tokens that are in text */
    bool echoed, stopped, ended;
};

static const char *const reason_names[] = {"none", "stop", "length", "cancelled", "error"};

/* ---- prompts ---- */

static int *copy_ids(const struct answers *a, const struct request_spec *spec, int *n_ids,
                     char *error) {
    for (int i = 0; i < spec->n_ids; i++) {
        if (spec->ids[i] < 0 || spec->ids[i] >= a->vocab_size) {
            (void)snprintf(error, CLI_ERROR_LENGTH, "ids: %d is no token; the model has 0 to %d",
                           spec->ids[i], a->vocab_size - 1);
            return NULL;
        }
    }
    int *ids = malloc(((size_t)spec->n_ids + 1) * sizeof *ids);
    if (ids && spec->n_ids > 0)
        memcpy(ids, spec->ids, (size_t)spec->n_ids * sizeof *ids);
    *n_ids = spec->n_ids;
    return ids;
}

/* A base model has no place for instructions: the system text stands before the prompt. */
static char *whole_prompt(const struct request_spec *spec, size_t *length) {
    size_t n_system = spec->system ? strlen(spec->system) : 0;
    size_t n_between = n_system > 0 ? 1 : 0;
    *length = n_system + n_between + spec->prompt_length;
    char *text = malloc(*length + 1);
    if (text) {
        memcpy(text, spec->system ? spec->system : "", n_system);
        memset(text + n_system, '\n', n_between);
        memcpy(text + n_system + n_between, spec->prompt, spec->prompt_length);
        text[*length] = 0;
    }
    return text;
}

int *answers_encode(const struct answers *a, const struct request_spec *spec, int *n_ids,
                    char error[CLI_ERROR_LENGTH]) {
    (void)snprintf(error, CLI_ERROR_LENGTH, "out of memory, or a prompt too long to tokenize");
    if (!spec->prompt)
        return copy_ids(a, spec, n_ids, error);
    if (!a->tokenizer) {
        (void)snprintf(error, CLI_ERROR_LENGTH, "no tokenizer: %.400s", a->no_tokenizer);
        return NULL;
    }
    size_t length;
    char *text = whole_prompt(spec, &length);
    int n = 0, bos = tok_adds_bos(a->tokenizer) ? tok_bos(a->tokenizer) : -1;
    int *encoded = text ? tok_encode(a->tokenizer, text, length, &n) : NULL;
    int *ids = encoded ? malloc(((size_t)n + 1) * sizeof *ids) : NULL;
    *n_ids = 0;
    if (ids && bos >= 0)
        ids[(*n_ids)++] = bos;
    for (int i = 0; ids && i < n; i++)
        ids[(*n_ids)++] = encoded[i];
    free(encoded);
    free(text);
    return ids;
}

/* Fills in the request; with an error set if it can not even be submitted. */
static void prepare(struct answers *a, struct answer *answer, const struct request_spec *spec) {
    char error[CLI_ERROR_LENGTH];
    struct request *r = &answer->request;
    *answer = (struct answer){.spec = spec};
    *r = (struct request){.id = a->next_id++, .sampling = spec->sampling};
    int n_ids = 0;
    int *ids = spec->error ? NULL : answers_encode(a, spec, &n_ids, error);
    int room = sched_max_length(a->sched) - n_ids;
    room = room < 1 ? 1 : room;
    r->max_new = spec->n >= 0 && spec->n < room ? spec->n : room;
    r->tokens = ids ? realloc(ids, ((size_t)n_ids + (size_t)r->max_new) * sizeof *ids) : NULL;
    r->n_prompt = n_ids;
    if (!r->tokens) {
        free(ids);
        (void)snprintf(r->error, sizeof r->error, "%.250s", spec->error ? spec->error : error);
        r->state = REQUEST_FINISHED;
        r->reason = FINISH_ERROR;
    }
}

/* ---- answers ---- */

static void append(struct answer *answer, const char *bytes, size_t n) {
    if (answer->length + n > answer->capacity) {
        answer->capacity = (answer->length + n) * 2;
        answer->text = realloc(answer->text, answer->capacity);
        if (!answer->text)
            abort();
    }
    memcpy(answer->text + answer->length, bytes, n);
    answer->length += n;
}

static void look_for_stop(struct answer *answer, bool at_end) {
    const struct request_spec *spec = answer->spec;
    if (answer->length == 0)
        return;
    answer->stopped =
        cli_stop(answer->text, answer->length, spec->stop, spec->n_stop, &answer->safe);
    if (answer->stopped)
        answer->length = answer->safe;
    else if (at_end || spec->n_stop == 0)
        answer->safe = answer->length;
}

/* Turns the tokens that have come, up to `length` of the request's, into text. */
static void take_tokens(const struct answers *a, struct answer *answer, int length, bool finished) {
    char out[TOK_TEXT_SIZE];
    const struct request *r = &answer->request;
    for (int i = answer->n_decoded; a->tokenizer && r->tokens && i == 0 && i < r->n_prompt; i++) {
        for (int p = 0; p < r->n_prompt; p++) /* the stream must have seen what it continues */
            (void)tok_decode(a->tokenizer, &answer->stream, r->tokens[p], out);
        break;
    }
    while (!answer->stopped && r->n_prompt + answer->n_decoded < length) {
        int token = r->tokens[r->n_prompt + answer->n_decoded++];
        if (a->tokenizer) {
            append(answer, out, tok_decode(a->tokenizer, &answer->stream, token, out));
            look_for_stop(answer, false);
        }
    }
    if (finished && !answer->stopped) {
        append(answer, out, tok_flush(&answer->stream, out));
        look_for_stop(answer, true);
    }
}

/* ---- showing ---- */

static void show_json(const struct answer *answer) {
    const struct request *r = &answer->request;
    struct json_buffer out = {0};
    char id[32];
    (void)snprintf(id, sizeof id, "%" PRId64, r->id);
    const char *name = answer->spec->id ? answer->spec->id : id;
    int n = answer->n_decoded;
    json_put(&out, "{");
    json_key(&out, "id");
    json_string(&out, name, strlen(name));
    json_key(&out, "text");
    json_string(&out, answer->text ? answer->text : "", answer->length);
    json_key(&out, "ids");
    json_put(&out, "[");
    for (int i = 0; i < n; i++)
        json_int(&out, r->tokens[r->n_prompt + i]);
    json_put(&out, "]");
    json_key(&out, "finish_reason");
    json_string(&out, reason_names[r->reason], strlen(reason_names[r->reason]));
    if (r->reason == FINISH_ERROR) {
        json_key(&out, "error");
        json_string(&out, r->error, strlen(r->error));
    }
    json_key(&out, "prompt_tokens");
    json_int(&out, r->n_prompt);
    json_key(&out, "cached_tokens");
    json_int(&out, r->cached_tokens);
    json_key(&out, "completion_tokens");
    json_int(&out, n);
    if (r->first_token > 0) {
        json_key(&out, "ttft_ms");
        json_double(&out, 1e3 * (r->first_token - r->submitted));
        json_key(&out, "itl_ms");
        json_double(&out, n > 1 ? 1e3 * (r->last_token - r->first_token) / (n - 1) : 0);
    }
    json_put(&out, "}");
    json_put(&out, "\n");
    (void)fwrite(out.data, 1, out.length, stdout);
    free(out.data);
}

/* A base model continues its prompt, so the prompt is shown with it. */
static void echo(const struct answers *a, struct answer *answer) {
    const struct request *r = &answer->request;
    struct tok_stream stream = {0};
    char out[TOK_TEXT_SIZE];
    answer->echoed = true;
    if (answer->spec->prompt)
        (void)fwrite(answer->spec->prompt, 1, answer->spec->prompt_length, stdout);
    for (int i = 0; i < r->n_prompt && !answer->spec->prompt && a->tokenizer; i++)
        (void)fwrite(out, 1, tok_decode(a->tokenizer, &stream, r->tokens[i], out), stdout);
}

/* Prints what can be printed of the first unfinished answer, and of those that ended behind it. */
static int show_text(const struct answers *a, struct answer *all, int n, int first) {
    for (; first < n; first++) {
        struct answer *answer = &all[first];
        const struct request *r = &answer->request;
        bool refused = answer->ended && r->reason == FINISH_ERROR && answer->length == 0;
        if (!answer->echoed && !refused)
            echo(a, answer);
        if (answer->safe > answer->shown)
            (void)fwrite(answer->text + answer->shown, 1, answer->safe - answer->shown, stdout);
        answer->shown = answer->safe;
        if (!answer->ended)
            break;
        (void)fputs(refused ? "" : first < n - 1 ? "\n\n" : "\n", stdout);
        if (r->reason == FINISH_ERROR)
            (void)fprintf(stderr, "dynamo: request %" PRId64 ": %s\n", r->id, r->error);
    }
    (void)fflush(stdout);
    return first;
}

static void count_ended(struct answers *a, const struct answer *answer) {
    const struct request *r = &answer->request;
    a->n_ended++;
    a->n_tokens += answer->n_decoded;
    if (r->first_token > 0) {
        double ttft = r->first_token - r->submitted;
        a->ttft_sum += ttft;
        a->ttft_max = ttft > a->ttft_max ? ttft : a->ttft_max;
    }
    if (answer->n_decoded > 1) {
        a->n_intervals += answer->n_decoded - 1;
        a->interval_sum += r->last_token - r->first_token;
    }
}

/* ---- running ---- */

/* Takes what is new of one answer; true: something was, or it ended. Called with the lock held,
 * which is let go while text is made. */
static bool advance(struct answers *a, struct answer *answer) {
    struct request *r = &answer->request;
    int length = r->length;
    bool finished = r->state == REQUEST_FINISHED;
    if (answer->ended || (!finished && r->n_prompt + answer->n_decoded >= length))
        return false;
    bool was_stopped = answer->stopped;
    pthread_mutex_unlock(a->lock);
    take_tokens(a, answer, length, finished);
    if (finished) {
        answer->ended = true;
        count_ended(a, answer);
        if (a->options->json)
            show_json(answer);
    }
    pthread_mutex_lock(a->lock);
    if (answer->stopped && !was_stopped) {
        sched_cancel(a->sched, r, true, a->now());
        pthread_cond_broadcast(a->work);
    }
    return !answer->stopped || finished;
}

static void submit_all(struct answers *a, struct answer *all, int n) {
    pthread_mutex_lock(a->lock);
    for (int i = 0; i < n; i++)
        if (all[i].request.state != REQUEST_FINISHED)
            sched_submit(a->sched, &all[i].request, a->now());
    pthread_cond_broadcast(a->work);
    pthread_mutex_unlock(a->lock);
}

/* Follows all requests until each has ended. */
static void follow(struct answers *a, struct answer *all, int n) {
    int n_ended = 0, first_shown = 0;
    bool cancelled = false;
    pthread_mutex_lock(a->lock);
    *a->activity = ANSWERING;
    while (n_ended < n) {
        bool any = false;
        for (int i = 0; i < n; i++) {
            bool before = all[i].ended;
            any = advance(a, &all[i]) || any;
            n_ended += all[i].ended && !before;
        }
        if ((*a->activity == INTERRUPTED || ferror(stdout)) && !cancelled) {
            cancelled = any = true;
            for (int i = 0; i < n; i++)
                sched_cancel(a->sched, &all[i].request, false, a->now());
            pthread_cond_broadcast(a->work);
        }
        if (!any) {
            pthread_cond_wait(a->news, a->lock);
        } else if (!a->options->json) {
            pthread_mutex_unlock(a->lock);
            first_shown = show_text(a, all, n, first_shown);
            pthread_mutex_lock(a->lock);
        } else {
            (void)fflush(stdout);
        }
    }
    *a->activity = IDLE;
    pthread_mutex_unlock(a->lock);
}

int answers_run(struct answers *a, const struct request_spec *specs, int n_specs) {
    struct answer *all = calloc((size_t)n_specs + 1, sizeof *all);
    if (!all)
        abort();
    for (int i = 0; i < n_specs; i++)
        prepare(a, &all[i], &specs[i]);
    double start = a->now();
    submit_all(a, all, n_specs);
    follow(a, all, n_specs);
    a->busy_seconds += a->now() - start;
    int n_failed = 0;
    for (int i = 0; i < n_specs; i++) {
        enum finish_reason reason = all[i].request.reason;
        n_failed += reason == FINISH_ERROR || reason == FINISH_CANCELLED;
        free(all[i].request.tokens);
        free(all[i].text);
    }
    free(all);
    return n_failed;
}

/* ---- statistics ---- */

struct number {
    const char *key, *label; /* of JSON, of the table */
    double value;
    bool whole;
};

static int collect(const struct answers *a, struct number *rows) {
    struct sched_stats s = sched_stats(a->sched);
    struct kv_stats k = kv_stats(sched_kv(a->sched));
    int64_t device_used = 0;
    for (int i = 0; i < a->n_workers; i++)
        device_used += kv_used(sched_kv(a->sched), i);
    double n_requests = a->n_ended > 0 ? (double)a->n_ended : 1;
    double n_intervals = a->n_intervals > 0 ? (double)a->n_intervals : 1;
    double seconds = a->busy_seconds > 0 ? a->busy_seconds : 1;
    const struct number all[] = {
        {"requests", "requests", (double)s.submitted, true},
        {"ttft_ms", "time to first token, mean (ms)", 1e3 * a->ttft_sum / n_requests, false},
        {"ttft_max_ms", "time to first token, longest (ms)", 1e3 * a->ttft_max, false},
        {"itl_ms", "inter-token latency (ms)", 1e3 * a->interval_sum / n_intervals, false},
        {"tokens_per_second", "generated tokens/s", (double)a->n_tokens / seconds, false},
        {"prefill_tokens", "prompt tokens computed", (double)s.prefill_tokens, true},
        {"decode_tokens", "tokens decoded", (double)s.decode_tokens, true},
        {"steps", "steps", (double)s.steps, true},
        {"prefix_hit_tokens", "prompt tokens found cached", (double)s.prefix_hit_tokens, true},
        {"recomputed_tokens", "tokens computed again", (double)s.recomputed_tokens, true},
        {"hand_overs", "requests handed over", (double)s.hand_overs, true},
        {"local_prefills", "prompts prefilled by decoders", (double)s.local_prefills, true},
        {"blocks_transferred", "blocks moved between workers", (double)k.transfers, true},
        {"preemptions", "preemptions", (double)s.preemptions, true},
        {"pages_out", "blocks paged out", (double)k.pages_out, true},
        {"pages_in", "blocks paged in", (double)k.pages_in, true},
        {"evictions", "device copies evicted", (double)k.evictions, true},
        {"host_evictions", "host copies evicted", (double)k.host_evictions, true},
        {"blocks_lost", "blocks dropped for good", (double)k.lost, true},
        {"device_blocks", "blocks a worker holds", (double)a->device_blocks, true},
        {"device_blocks_used", "blocks in use or cached on workers", (double)device_used, true},
        {"host_blocks", "blocks the host holds", (double)a->host_blocks, true},
        {"host_blocks_used", "blocks cached on the host",
         (double)kv_used(sched_kv(a->sched), a->n_workers), true},
        {"kernel_launches", "kernel launches", (double)a->backend->kernel_launches, true}};
    if (rows)
        memcpy(rows, all, sizeof all);
    return (int)(sizeof all / sizeof *all);
}

static void stats_json(const struct answers *a, const struct number *numbers, int n) {
    struct json_buffer out = {0};
    json_put(&out, "{");
    json_key(&out, "stats");
    json_put(&out, "{");
    json_key(&out, "backend");
    json_string(&out, a->backend->name, strlen(a->backend->name));
    for (int i = 0; i < n; i++) {
        json_key(&out, numbers[i].key);
        if (numbers[i].whole)
            json_int(&out, (int64_t)numbers[i].value);
        else
            json_double(&out, numbers[i].value);
    }
    json_put(&out, "}");
    json_put(&out, "}");
    json_put(&out, "\n");
    (void)fwrite(out.data, 1, out.length, stdout);
    free(out.data);
}

static void stats_table(const struct answers *a, const struct number *numbers, int n) {
    char values[64][CLI_NUMBER_LENGTH], seed[CLI_NUMBER_LENGTH];
    struct cli_row rows[64];
    (void)snprintf(seed, sizeof seed, "%" PRIu64, a->options->request.sampling.seed);
    rows[0] = (struct cli_row){"backend", a->backend->name};
    rows[1] = (struct cli_row){"seed", seed};
    for (int i = 0; i < n; i++) {
        if (numbers[i].whole)
            (void)cli_count(values[i], (int64_t)numbers[i].value);
        else
            (void)snprintf(values[i], sizeof values[i], "%.2f", numbers[i].value);
        rows[i + 2] = (struct cli_row){numbers[i].label, values[i]};
    }
    cli_table(stderr, "stats", rows, n + 2);
}

void answers_stats(const struct answers *a) {
    struct number numbers[62];
    int n = collect(a, numbers);
    if (a->options->json)
        stats_json(a, numbers, n);
    else
        stats_table(a, numbers, n);
}

void answers_summary(const struct answers *a) {
    struct sched_stats s = sched_stats(a->sched);
    struct kv_stats k = kv_stats(sched_kv(a->sched));
    double seconds = a->busy_seconds > 0 ? a->busy_seconds : 1;
    (void)fprintf(stderr,
                  "[%d worker%s: %" PRId64 " prompt tokens prefilled, %" PRId64
                  " found cached, %" PRId64 " blocks handed over | %" PRId64
                  " tokens decoded, %.0f tokens/s | %" PRId64 " blocks paged out, %" PRId64
                  " in, %" PRId64 " preemptions]\n",
                  a->n_workers, a->n_workers == 1 ? "" : "s", s.prefill_tokens, s.prefix_hit_tokens,
                  k.transfers, s.decode_tokens, (double)a->n_tokens / seconds, k.pages_out,
                  k.pages_in, s.preemptions);
}

#endif /* ANSWERS_IMPLEMENTATION */
