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
 * Read next: tokenizer.h, requests.h. */
#ifndef ANSWERS_H
#define ANSWERS_H

#include "dynamo.h"
#include "requests.h"
#include "template.h"
#include "tokenizer.h"
#include <pthread.h>

enum activity { IDLE, ANSWERING, INTERRUPTED }; /* the last: by Ctrl-C */

struct answers {
    const struct options *options;
    const struct tokenizer *tokenizer; /* NULL: ids only */
    const char *no_tokenizer;          /* why there is none */
    enum template_kind template;       /* of prompts; TEMPLATE_NONE: they are continued */
    bool converses;                    /* each prompt follows the one before and its answer */
    int *history;                      /* (n_history) what was said; see answers_forget */
    int n_history;
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
/* Begins a new conversation. */
void answers_forget(struct answers *answers);
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
#include <unistd.h>

struct answer {
    const struct request_spec *spec;
    struct request request;
    struct tok_stream stream;
    char *text; /* generated (length bytes) */
    size_t length, capacity, shown, safe;
    int n_seen; /* tokens, the prompt's included, that went through stream */
    bool echoed, stopped, ended;
};

static const char *const reason_names[] = {"none", "stop", "length", "cancelled", "error"};

static int n_generated(const struct answer *answer) {
    int n = answer->n_seen - answer->request.n_prompt;
    return n > 0 ? n : 0;
}

/* ---- prompts ---- */

static int *copy_ids(const struct answers *a, const struct request_spec *spec, int *n_ids,
                     char *error) {
    for (int i = 0; i < spec->n_ids; i++) {
        if (spec->ids[i] < 0 || spec->ids[i] >= a->vocab_size) {
            (void)cli_refuse(error, "ids: %d is no token; the model has 0 to %d", spec->ids[i],
                             a->vocab_size - 1);
            return NULL;
        }
    }
    size_t bytes = (size_t)spec->n_ids * sizeof *spec->ids;
    int *ids = malloc(bytes);
    *n_ids = ids ? spec->n_ids : 0;
    return ids ? memcpy(ids, spec->ids, bytes) : NULL;
}

int *answers_encode(const struct answers *a, const struct request_spec *spec, int *n_ids,
                    char error[CLI_ERROR_LENGTH]) {
    (void)cli_refuse(error, "out of memory, or a prompt too long to tokenize");
    *n_ids = 0;
    if (!spec->prompt)
        return copy_ids(a, spec, n_ids, error);
    if (!a->tokenizer) {
        (void)cli_refuse(error, "no tokenizer: %.400s", a->no_tokenizer);
        return NULL;
    }
    struct turn turn = {.history = a->history,
                        .n_history = a->n_history,
                        .system = spec->system,
                        .user = spec->prompt,
                        .user_length = spec->prompt_length};
    return template_ids(a->template, a->tokenizer, &turn, n_ids);
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

/* Appends bytes, and looks for the stop texts in what is there. */
static void append(struct answer *answer, const char *bytes, size_t n, bool last) {
    const struct request_spec *spec = answer->spec;
    if (answer->length + n > answer->capacity) {
        answer->capacity = (answer->length + n) * 2;
        answer->text = realloc(answer->text, answer->capacity);
        if (!answer->text)
            abort();
    }
    if (n > 0)
        memcpy(answer->text + answer->length, bytes, n);
    answer->length += n;
    answer->stopped =
        requests_stop(answer->text, answer->length, spec->stop, spec->n_stop, &answer->safe);
    if (answer->stopped)
        answer->length = answer->safe;
    else if (last)
        answer->safe = answer->length;
}

/* Turns the tokens that have come, up to `length` of the request's, into text. */
static void take_tokens(const struct answers *a, struct answer *answer, int length, bool finished) {
    char out[TOK_TEXT_SIZE];
    const struct request *r = &answer->request;
    while (!answer->stopped && answer->n_seen < length) {
        int token = r->tokens[answer->n_seen++];
        size_t n = a->tokenizer ? tok_decode(a->tokenizer, &answer->stream, token, out) : 0;
        if (answer->n_seen > r->n_prompt) /* the stream must see the prompt that it continues */
            append(answer, out, n, false);
    }
    if (finished && !answer->stopped)
        append(answer, out, tok_flush(&answer->stream, out), true);
}

/* ---- showing ---- */

static void show_json(const struct answer *answer) {
    const struct request *r = &answer->request;
    int n = n_generated(answer);
    char number[32];
    (void)snprintf(number, sizeof number, "%" PRId64, r->id);
    const char *id = answer->spec->id ? answer->spec->id : number;
    (void)fputs("{\"id\":", stdout);
    json_string(stdout, id, strlen(id));
    (void)fputs(",\"text\":", stdout);
    json_string(stdout, answer->text, answer->length);
    (void)fputs(",\"ids\":[", stdout);
    for (int i = 0; i < n; i++)
        printf("%s%d", i > 0 ? "," : "", r->tokens[r->n_prompt + i]);
    /* a stop text may have been found after the last token was made */
    enum finish_reason reason = answer->stopped ? FINISH_STOP : r->reason;
    printf("],\"finish_reason\":\"%s\"", reason_names[reason]);
    if (reason == FINISH_ERROR) {
        (void)fputs(",\"error\":", stdout);
        json_string(stdout, r->error, strlen(r->error));
    }
    printf(",\"prompt_tokens\":%d,\"cached_tokens\":%d,\"completion_tokens\":%d", r->n_prompt,
           r->cached_tokens, n);
    if (r->first_token > 0)
        printf(",\"ttft_ms\":%.15g,\"itl_ms\":%.15g", 1e3 * (r->first_token - r->submitted),
               n > 1 ? 1e3 * (r->last_token - r->first_token) / (n - 1) : 0);
    (void)fputs("}\n", stdout);
}

/* A base model continues its prompt, so the prompt is shown with it; a chat model answers. */
static void echo(const struct answers *a, struct answer *answer) {
    const struct request *r = &answer->request;
    struct tok_stream stream = {0};
    char out[TOK_TEXT_SIZE];
    answer->echoed = true;
    if (answer->spec->prompt && a->template != TEMPLATE_NONE)
        return;
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
    return first;
}

static void count_ended(struct answers *a, const struct answer *answer) {
    const struct request *r = &answer->request;
    a->n_ended++;
    int n = n_generated(answer);
    a->n_tokens += n;
    if (r->first_token > 0) {
        double ttft = r->first_token - r->submitted;
        a->ttft_sum += ttft;
        a->ttft_max = ttft > a->ttft_max ? ttft : a->ttft_max;
    }
    if (n > 1) {
        a->n_intervals += n - 1;
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
    if (answer->ended || (!finished && r->n_prompt + n_generated(answer) >= length))
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

/* Submits all requests, or cancels them. Called with the lock held. */
static void tell_all(struct answers *a, struct answer *all, int n, bool cancel) {
    for (int i = 0; i < n; i++)
        if (cancel)
            sched_cancel(a->sched, &all[i].request, false, a->now());
        else if (all[i].request.state != REQUEST_FINISHED)
            sched_submit(a->sched, &all[i].request, a->now());
    pthread_cond_broadcast(a->work);
}

/* Follows all requests until each has ended. */
static void follow(struct answers *a, struct answer *all, int n) {
    int n_ended = 0, first_shown = 0, first = 0; /* [0, first) have ended */
    bool cancelled = false;
    pthread_mutex_lock(a->lock);
    *a->activity = ANSWERING;
    tell_all(a, all, n, false);
    while (n_ended < n) {
        bool any = false;
        for (int i = first; i < n; i++) {
            bool before = all[i].ended;
            any = advance(a, &all[i]) || any;
            n_ended += all[i].ended && !before;
            first += i == first && all[i].ended;
        }
        if ((*a->activity == INTERRUPTED || ferror(stdout)) && !cancelled) {
            cancelled = any = true;
            tell_all(a, all, n, true);
        }
        if (!any) {
            pthread_cond_wait(a->news, a->lock);
            continue;
        }
        pthread_mutex_unlock(a->lock);
        if (!a->options->json)
            first_shown = show_text(a, all, n, first_shown);
        (void)fflush(stdout);
        pthread_mutex_lock(a->lock);
    }
    *a->activity = IDLE;
    pthread_mutex_unlock(a->lock);
}

void answers_forget(struct answers *a) {
    free(a->history);
    a->history = NULL;
    a->n_history = 0;
}

/* The tokens of a request that ran are what was said so far. */
static void remember(struct answers *a, struct request *r) {
    if (r->reason == FINISH_ERROR || a->template == TEMPLATE_NONE)
        return;
    free(a->history);
    a->history = r->tokens;
    a->n_history = r->length;
    r->tokens = NULL;
}

int answers_run(struct answers *a, const struct request_spec *specs, int n_specs) {
    struct answer *all = calloc((size_t)n_specs + 1, sizeof *all);
    if (!all)
        abort();
    for (int i = 0; i < n_specs; i++)
        prepare(a, &all[i], &specs[i]);
    double start = a->now();
    follow(a, all, n_specs);
    a->busy_seconds += a->now() - start;
    int n_failed = 0;
    for (int i = 0; i < n_specs; i++) {
        enum finish_reason reason = all[i].request.reason;
        n_failed += reason == FINISH_ERROR || reason == FINISH_CANCELLED;
        if (a->converses)
            remember(a, &all[i].request);
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

static void stats_json(const struct answers *a, const struct number *numbers, size_t n) {
    printf("{\"stats\":{\"backend\":\"%s\"", a->backend->name);
    for (size_t i = 0; i < n; i++)
        printf(",\"%s\":%.15g", numbers[i].key, numbers[i].value);
    (void)fputs("}}\n", stdout);
}

static void stats_table(const struct answers *a, const struct number *numbers, size_t n) {
    bool colour = isatty(STDERR_FILENO);
    const char *label = colour ? "  \033[2m%-34s\033[0m  " : "  %-34s  ";
    (void)fputs(colour ? "\033[1mstats\033[0m\n" : "stats\n", stderr);
    (void)fprintf(stderr, label, "backend");
    (void)fprintf(stderr, "%s\n", a->backend->name);
    (void)fprintf(stderr, label, "seed");
    (void)fprintf(stderr, "%" PRIu64 "\n", a->options->request.sampling.seed);
    for (size_t i = 0; i < n; i++) {
        (void)fprintf(stderr, label, numbers[i].label);
        (void)fprintf(stderr, "%.*f\n", numbers[i].whole ? 0 : 2, numbers[i].value);
    }
}

/* What the scheduler and the cache counted; the workers may still be copying. */
struct counters {
    struct sched_stats sched;
    struct kv_stats kv;
    int device_used, host_used; /* blocks, in use or cached */
};

static struct counters read_counters(const struct answers *a) {
    pthread_mutex_lock(a->lock);
    const struct kv *kv = sched_kv(a->sched);
    struct counters counters = {.sched = sched_stats(a->sched), .kv = kv_stats(kv)};
    for (int i = 0; i < a->n_workers; i++)
        counters.device_used += kv_used(kv, i);
    counters.host_used = kv_used(kv, a->n_workers);
    pthread_mutex_unlock(a->lock);
    return counters;
}

void answers_stats(const struct answers *a) {
    struct counters counters = read_counters(a);
    struct sched_stats s = counters.sched;
    struct kv_stats k = counters.kv;
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
        {"device_blocks_used", "blocks in use or cached on workers", (double)counters.device_used,
         true},
        {"host_blocks", "blocks the host holds", (double)a->host_blocks, true},
        {"host_blocks_used", "blocks cached on the host", (double)counters.host_used, true},
        {"kernel_launches", "kernel launches", (double)a->backend->kernel_launches, true}};
    if (a->options->json)
        stats_json(a, all, sizeof all / sizeof *all);
    else
        stats_table(a, all, sizeof all / sizeof *all);
}

void answers_summary(const struct answers *a) {
    struct counters counters = read_counters(a);
    struct sched_stats s = counters.sched;
    struct kv_stats k = counters.kv;
    double seconds = a->busy_seconds > 0 ? a->busy_seconds : 1;
    (void)fprintf(stderr,
                  "[%d worker%s: %" PRId64 " prompt tokens prefilled, %" PRId64
                  " found cached, %" PRId64 " blocks handed over | %" PRId64
                  " tokens generated, %.0f tokens/s | %" PRId64 " blocks paged out, %" PRId64
                  " in, %" PRId64 " preemptions]\n",
                  a->n_workers, a->n_workers == 1 ? "" : "s", s.prefill_tokens, s.prefix_hit_tokens,
                  k.transfers, a->n_tokens, (double)a->n_tokens / seconds, k.pages_out, k.pages_in,
                  s.preemptions);
}

#endif /* ANSWERS_IMPLEMENTATION */
