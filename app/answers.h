/* answers.h: requests on their way in, the text of their answers on its way out.
 *
 *     struct answers answers = {.engine = engine, .tokenizer = tokenizer};
 *     int n_failed = answers_run(&answers, specs, n_specs);
 *
 * Turns request_specs into requests, submits them all, and shows their text as it comes: the
 * answers in the order of the requests, the first unfinished one streaming; or as JSON, one object
 * a request, as it ends. Decides nothing about when they run.
 *
 * An answer's bytes, by half-open intervals: [0, shown) printed, [shown, safe) to be printed,
 * [safe, length) held back, because it could be the beginning of a stop text.
 * Read next: lib/tokenizer.h, terminal.h, stats.h. */
#ifndef ANSWERS_H
#define ANSWERS_H

#include "../dynamo.h"
#include "../lib/cli.h"
#include "../lib/template.h"
#include "../lib/tokenizer.h"
#include <stdatomic.h>

#define ANSWERS_TOO_LONG "out of memory, or a text of more than %d bytes"

enum activity { IDLE, ANSWERING, INTERRUPTED }; /* the last: by Ctrl-C */

struct answers {
    struct engine *engine;
    const struct tokenizer *tokenizer; /* NULL: ids only */
    const char *no_tokenizer;          /* why there is none */
    enum template_kind template;       /* of prompts; TEMPLATE_NONE: they are continued */
    bool json;
    uint64_t seed;  /* of the run, which --stats tells */
    bool converses; /* each prompt follows the one before and its answer */
    int *history;   /* (n_history) what was said; see answers_forget */
    int n_history;
    atomic_int activity; /* enum activity; who sets INTERRUPTED calls engine_wake */
    int64_t next_id;
    /* sums over all requests that ended, for stats.h */
    int64_t n_ended, n_tokens, n_intervals;
    double ttft_sum, ttft_max, interval_sum, busy_seconds;
};

/* Runs requests to their ends. Returns how many of them failed or were cancelled. */
int answers_run(struct answers *answers, const struct request_spec *specs, int n_specs);
/* Begins a new conversation. */
void answers_forget(struct answers *answers);
/* The ids of a prompt as a request would have them. NULL: `error`. */
int *answers_encode(const struct answers *answers, const struct request_spec *spec, int *n_ids,
                    char error[ERROR_LENGTH]);

#endif /* ANSWERS_H */

#ifdef ANSWERS_IMPLEMENTATION
#undef ANSWERS_IMPLEMENTATION

#include "../lib/json.h"
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

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
    int vocab_size = engine_config_of(a->engine)->model->config.vocab_size;
    for (int i = 0; i < spec->n_ids; i++) {
        if (spec->ids[i] < 0 || spec->ids[i] >= vocab_size) {
            (void)fail(error, "ids: %d is no token; the model has 0 to %d", spec->ids[i],
                       vocab_size - 1);
            return NULL;
        }
    }
    size_t bytes = (size_t)spec->n_ids * sizeof *spec->ids;
    int *ids = malloc(bytes);
    *n_ids = ids ? spec->n_ids : 0;
    return ids ? memcpy(ids, spec->ids, bytes) : NULL;
}

int *answers_encode(const struct answers *a, const struct request_spec *spec, int *n_ids,
                    char error[ERROR_LENGTH]) {
    (void)fail(error, ANSWERS_TOO_LONG, TOK_TEXT_LENGTH);
    *n_ids = 0;
    if (!spec->prompt)
        return copy_ids(a, spec, n_ids, error);
    if (!a->tokenizer) {
        (void)fail(error, "no tokenizer: %.400s", a->no_tokenizer);
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
    char error[ERROR_LENGTH];
    struct request *r = &answer->request;
    *answer = (struct answer){.spec = spec};
    *r = (struct request){.id = a->next_id++, .sampling = spec->sampling};
    int n_ids = 0, room = sched_max_length(engine_sched(a->engine));
    bool fits = !spec->prompt || spec->prompt_length / TOK_TOKEN_LENGTH <= (size_t)room;
    int *ids = fits && !spec->error ? answers_encode(a, spec, &n_ids, error) : NULL;
    if (!fits) /* no need to encode it */
        (void)fail(error, "the prompt has %zu bytes, the context has room for %d tokens",
                   spec->prompt_length, room);
    room -= n_ids;
    room = room < 1 ? 1 : room;
    r->max_new = spec->n >= 0 && spec->n < room ? spec->n : room;
    r->tokens = ids ? realloc(ids, ((size_t)n_ids + (size_t)r->max_new) * sizeof *ids) : NULL;
    r->n_prompt = n_ids;
    if (!r->tokens) {
        free(ids);
        (void)fail(r->error, "%s", spec->error ? spec->error : error);
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
    engine_unlock(a->engine);
    take_tokens(a, answer, length, finished);
    if (finished) {
        answer->ended = true;
        count_ended(a, answer);
        if (a->json)
            show_json(answer);
    }
    engine_lock(a->engine);
    if (answer->stopped && !was_stopped) {
        sched_cancel(engine_sched(a->engine), r, true, engine_now());
        engine_wake(a->engine);
    }
    return !answer->stopped || finished;
}

/* Submits all requests, or cancels them. Called with the lock held. */
static void tell_all(struct answers *a, struct answer *all, int n, bool cancel) {
    for (int i = 0; i < n; i++)
        if (cancel)
            sched_cancel(engine_sched(a->engine), &all[i].request, false, engine_now());
        else if (all[i].request.state != REQUEST_FINISHED)
            sched_submit(engine_sched(a->engine), &all[i].request, engine_now());
    engine_wake(a->engine);
}

/* Follows all requests until each has ended. */
static void follow(struct answers *a, struct answer *all, int n) {
    int n_ended = 0, first_shown = 0, first = 0; /* [0, first) have ended */
    bool cancelled = false;
    engine_lock(a->engine);
    a->activity = ANSWERING;
    tell_all(a, all, n, false);
    while (n_ended < n) {
        bool any = false;
        for (int i = first; i < n; i++) {
            bool before = all[i].ended;
            any = advance(a, &all[i]) || any;
            n_ended += all[i].ended && !before;
            first += i == first && all[i].ended;
        }
        if ((a->activity == INTERRUPTED || ferror(stdout)) && !cancelled) {
            cancelled = any = true;
            tell_all(a, all, n, true);
        }
        if (!any) {
            engine_wait(a->engine);
            continue;
        }
        engine_unlock(a->engine);
        if (!a->json)
            first_shown = show_text(a, all, n, first_shown);
        (void)fflush(stdout);
        engine_lock(a->engine);
    }
    a->activity = IDLE;
    engine_unlock(a->engine);
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
    double start = engine_now();
    follow(a, all, n_specs);
    a->busy_seconds += engine_now() - start;
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

#endif /* ANSWERS_IMPLEMENTATION */
