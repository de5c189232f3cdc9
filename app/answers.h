/* answers.h: requests on their way in, the text of their answers on its way out.
 *
 *     struct answers answers = {.engine = engine, .tokenizer = tokenizer};
 *     int n_failed = answers_run(&answers, &spec);
 *
 * Turns request_specs into requests, submits each when its time has come and the answer that it
 * follows is there, and shows their text as it comes: the answers in the order of the requests, the
 * first unfinished one streaming; or as JSON, an object a request, as it ends. When they run is
 * decided elsewhere.
 *
 * An answer's bytes, by half-open intervals: [0, shown) printed, [shown, safe) to be printed,
 * [safe, length) held back, because it could be the beginning of a stop text.
 * Read next: lib/tokenizer.h, terminal.h, stats.h. */
#ifndef ANSWERS_H
#define ANSWERS_H

#include "../dynamo.h"
#include "../lib/cli.h"
#include "../lib/template.h"
#include "../lib/text.h"
#include "../lib/tokenizer.h"
#include "../lib/wrap.h"
#include <stdatomic.h>

enum {
    ANSWERS_KEPT = 4096,    /* that have ended before all that run: these can be followed */
    ANSWERS_TIMES = 1 << 16 /* of as many requests, the last, times are kept */
};
#define ANSWERS_TOO_LONG "out of memory, or a text of more than %d bytes"

enum activity { IDLE, ANSWERING, SERVING, INTERRUPTED }; /* the last: by Ctrl-C, or SIGTERM */
/* What is told of a request, in seconds: from arrival to admission, from arrival to the first
 * token, and between two tokens in the mean. */
enum answer_time { TIME_QUEUE, TIME_TTFT, TIME_ITL, N_TIMES };

struct answers {
    struct engine *engine; /* NULL: none, and only prompts are made */
    int vocab_size;
    struct tokenizer *tokenizer;     /* NULL: ids only */
    char no_tokenizer[ERROR_LENGTH]; /* why there is none */
    struct chat_template template;   /* of prompts; TEMPLATE_NONE: they are continued */
    bool json, verbose;              /* the latter: thoughts are told on stderr */
    struct wrap *wrap;               /* of texts on a terminal; NULL: they are not wrapped */
    uint64_t seed;                   /* of the run, which --stats tells; the first request's */
    bool converses;                  /* each prompt follows the one before and its answer */
    int *history;                    /* (n_history) what was said; see answers_forget */
    int n_history;
    atomic_int activity; /* enum activity; who sets INTERRUPTED calls engine_wake */
    bool interrupted;    /* the last that ran was */
    int64_t n_requests, n_arrived;
    /* of all requests that ended, for stats.h */
    int64_t n_tokens, n_intervals, n_host_hits; /* the last: prompt tokens */
    double interval_sum, busy_seconds;
    double *times[N_TIMES]; /* (n_times, at most ANSWERS_TIMES) of those that came so far */
    int n_times[N_TIMES];
};

/* One answer; it must not move between answers_submit and its end. */
struct answer {
    struct request_spec spec;
    int64_t place;        /* in the run */
    char number[24];      /* the same in digits, its id if it has none */
    struct answer *after; /* NULL: it follows none */
    struct request request;
    struct tok_stream stream;
    char *text; /* generated (length bytes) */
    size_t length, shown, safe;
    char *thought; /* (n_thought bytes) what the template says is not for the reader */
    size_t n_thought;
    enum template_part part; /* that the last token was in */
    int n_shown;             /* tokens, where there is no tokenizer */
    int n_seen; /* tokens, the prompt's included, that went through stream: up to a stop text */
    bool submitted, echoed, stopped, ended;
};

/* Runs a request to its end. Returns how many failed or were cancelled. */
int answers_run(struct answers *answers, const struct request_spec *spec);
/* The same, of those that are there, and of what is added, under the engine's lock and followed by
 * engine_wake, while requests->more. All are taken away, and with them what belongs to them. */
int answers_stream(struct answers *answers, struct requests *requests);
/* What both do with one answer, and whoever else serves requests. Begins it: all but its prompt. */
void answers_begin(struct answers *answers, const struct request_spec *spec, struct answer *answer);
/* Hands its request, which is prepared, to the engine. Called with the lock held, as the next. */
void answers_submit(struct answers *answers, struct answer *answer);
/* Takes at most so many of its new tokens; true: one, or its end. Makes text without the lock. */
bool answers_advance(struct answers *answers, struct answer *answer, int most);
/* Tokens whose text it has; of one that a stop text ended, up to that. */
int answers_generated(const struct answer *answer);
enum finish_reason answers_reason(const struct answer *answer);
void answers_free(struct answer *answer); /* what it holds */
/* Begins a new conversation. */
void answers_forget(struct answers *answers);
/* In seconds; < 0: it did not come so far. */
double answers_time(const struct request *request, enum answer_time time);
/* What came of a request that has ended, n_generated tokens and `reason`: the members of an object
 * from finish_reason to itl_ms. */
void answers_json(const struct request *request, int n_generated, enum finish_reason reason);
/* Fills in a request: its prompt, which follows history (n_history), that of `before` if there is
 * one, room for its answer in a text of max_length tokens, its deadline. False: it has failed. */
bool answers_prepare(const struct answers *answers, const struct request_spec *spec,
                     const struct request *before, const int *history, int n_history,
                     int max_length, struct request *request);
/* Says in its error, if it has one, which line of a file it is. */
void answers_tell_line(const struct request_spec *spec, struct request *request);
/* A number told at the end of a run, and its names in JSON and in a table: stats.h, replay.h. */
struct figure {
    const char *key, *label;
    double value;
    int decimals; /* of the table */
};
extern const char *const answers_times[N_TIMES][2]; /* likewise, its names */
extern const char *const answers_reasons[];         /* by enum finish_reason */
double answers_ratio(double amount, double whole);  /* 0 of nothing */
double answers_short(double value); /* to six decimals, all that JSON tells of a number */
/* The seed of a run's place-th request that has none of its own. */
uint64_t answers_seed(uint64_t seed, int64_t place);
uint64_t answers_random(uint64_t seed, uint64_t n); /* the n-th number of a sequence */
/* The ids of history (n_history), then of a request's prompt, of which all turns but the last have
 * `most` ids together; to be freed. NULL: `error`. */
int *answers_encode(const struct answers *answers, const struct request_spec *spec,
                    const int *history, int n_history, int most, int *n_ids,
                    char error[ERROR_LENGTH]);

#endif /* ANSWERS_H */

#ifdef ANSWERS_IMPLEMENTATION
#undef ANSWERS_IMPLEMENTATION

#include "../lib/json.h"
#include <inttypes.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

const char *const answers_reasons[] = {"none", "stop", "length", "cancelled", "error"};

int answers_generated(const struct answer *answer) {
    int n = answer->n_seen - answer->request.n_prompt;
    return n > 0 ? n : 0;
}

/* ---- prompts ---- */

/* Lengthens ids (n_ids), which it frees where it fails. */
static int *join(int *ids, int *n_ids, const int *more, int n_more) {
    int *longer = realloc(ids, ((size_t)*n_ids + (size_t)n_more + 1) * sizeof *ids);
    if (!longer) {
        free(ids);
        return NULL;
    }
    if (n_more > 0)
        memcpy(longer + *n_ids, more, (size_t)n_more * sizeof *more);
    *n_ids += n_more;
    return longer;
}

static bool ids_fit(const struct answers *a, const struct request_spec *spec, char *error) {
    for (int i = 0; i < spec->n_ids; i++)
        if (spec->ids[i] >= a->vocab_size)
            return fail(error, "%d is no token; the model has 0 to %d", spec->ids[i],
                        a->vocab_size - 1);
    return true;
}

int *answers_encode(const struct answers *a, const struct request_spec *spec, const int *history,
                    int n_history, int most, int *n_ids, char error[ERROR_LENGTH]) {
    const struct said one = {spec->prompt, spec->prompt_length};
    const struct said *said = spec->earlier ? spec->earlier : &one; /* the prompt is the last */
    int *ids = NULL;
    struct turn turn = {.history = history, .n_history = n_history, .system = spec->system};
    const struct chat_template none = {.kind = TEMPLATE_NONE};
    *n_ids = 0;
    (void)fail(error, ANSWERS_TOO_LONG, TOK_TEXT_LENGTH);
    if (!spec->prompt) {
        if (ids_fit(a, spec, error) && (ids = join(NULL, n_ids, history, n_history)))
            ids = join(ids, n_ids, spec->ids, spec->n_ids);
        return ids;
    }
    if (!a->tokenizer) {
        (void)fail(error, "no tokenizer: %.400s", a->no_tokenizer);
        return NULL;
    }
    int i = 0;
    for (; i <= spec->n_earlier && *n_ids <= most; i += 2) {
        turn.user = said[i].text;
        turn.user_length = said[i].length;
        turn.answer = i < spec->n_earlier ? said[i + 1].text : NULL;
        turn.answer_length = turn.answer ? said[i + 1].length : 0;
        int *longer = template_ids(spec->plain ? &none : &a->template, a->tokenizer, &turn, n_ids);
        free(ids);
        ids = longer;
        if (!ids)
            break;
        turn.history = ids;
        turn.n_history = *n_ids;
    }
    if (!ids || i > spec->n_earlier)
        return ids;
    free(ids);
    (void)fail(error, "the prompt has over %d tokens, the context has room for %d", *n_ids, most);
    return NULL;
}

/* SplitMix64 (Steele et al. 2014). */
uint64_t answers_random(uint64_t seed, uint64_t n) {
    uint64_t z = seed + n * 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

/* The first request has that of the run, so that one prompt has what --seed says; the others each
 * another, which no JSON reader rounds. */
uint64_t answers_seed(uint64_t seed, int64_t place) {
    return place == 0 ? seed : answers_random(seed, (uint64_t)place) >> 11;
}

/* Its ids, when what it follows is there. NULL: `error`. */
static int *prompt_ids(const struct answers *a, const struct request_spec *spec,
                       const struct request *before, const int *history, int n_history, int room,
                       int *n_ids, char *error) {
    if (spec->error)
        (void)fail(error, "%s", spec->error);
    else if (spec->cancel)
        (void)fail(error, "cancel: got \"%.200s\", expected the id of a request before it",
                   spec->cancel);
    else if (spec->prompt && spec->prompt_length / TOK_TOKEN_LENGTH > (size_t)room)
        (void)fail(error, "the prompt has %zu bytes, the context has room for %d tokens",
                   spec->prompt_length, room); /* no need to encode it */
    else if (spec->after && !before)
        (void)fail(error, "after: got \"%.200s\", expected the id of a request before it",
                   spec->after);
    else if (before && before->reason != FINISH_STOP && before->reason != FINISH_LENGTH)
        (void)fail(error, "after: \"%.200s\" %s", spec->after,
                   before->reason == FINISH_CANCELLED ? "was cancelled"
                                                      : "ended without an answer");
    else
        return answers_encode(a, spec, history, n_history, room, n_ids, error);
    return NULL;
}

bool answers_prepare(const struct answers *a, const struct request_spec *spec,
                     const struct request *before, const int *history, int n_history,
                     int max_length, struct request *r) {
    char error[ERROR_LENGTH];
    int n_ids = 0;
    int *ids = prompt_ids(a, spec, before, history, n_history, max_length, &n_ids, error);
    int room = n_ids < max_length ? max_length - n_ids : 1;
    r->max_new = spec->n >= 0 && spec->n < room ? spec->n : room;
    r->tokens = ids ? realloc(ids, ((size_t)n_ids + (size_t)r->max_new) * sizeof *ids) : NULL;
    r->n_prompt = n_ids;
    r->deadline = (double)spec->deadline;
    r->min_new = spec->min_new;
    if (r->tokens)
        return true;
    free(ids);
    r->state = REQUEST_FINISHED;
    r->reason = FINISH_ERROR;
    return fail(r->error, "%s", error);
}

/* When what it follows is there. */
static void prepare(const struct answers *a, struct answer *answer) {
    const struct answer *after = answer->after;
    (void)answers_prepare(a, &answer->spec, after ? &after->request : NULL,
                          after ? after->request.tokens : a->history,
                          after ? after->n_seen : a->n_history,
                          sched_longest(engine_sched(a->engine)), &answer->request);
}

/* ---- answers ---- */

/* Appends bytes, and looks for the stop texts in what is there. */
static void append(struct answer *answer, const char *bytes, size_t n, bool last) {
    const struct request_spec *spec = &answer->spec;
    for (size_t i = 0; i < n; i++) {
        answer->text = grow(answer->text, answer->length, 1);
        answer->text[answer->length++] = bytes[i];
    }
    if (answers_generated(answer) < spec->min_new)
        answer->safe = answer->length;
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
        if (answer->n_seen <= r->n_prompt)
            continue; /* the stream must see the prompt that it continues */
        if (!answer->spec.plain)
            answer->part = template_part(a->template.kind, a->tokenizer, token, answer->part);
        if (answer->part == PART_FINAL)
            append(answer, out, n, false);
        for (size_t i = 0; i < n && answer->part == PART_ANALYSIS; i++) {
            answer->thought = grow(answer->thought, answer->n_thought, 1);
            answer->thought[answer->n_thought++] = out[i];
        }
    }
    if (finished && !answer->stopped)
        append(answer, out, tok_flush(&answer->stream, out), true);
}

/* ---- showing ---- */

const char *const answers_times[N_TIMES][2] = {[TIME_QUEUE] = {"queue", "time in the queue"},
                                               [TIME_TTFT] = {"ttft", "time to first token"},
                                               [TIME_ITL] = {"itl", "inter-token latency"}};

double answers_ratio(double amount, double whole) {
    return whole > 0 ? amount / whole : 0;
}

double answers_short(double value) {
    return round(value * 1e6) / 1e6;
}

double answers_time(const struct request *r, enum answer_time time) {
    int n = r->length - r->n_prompt;
    switch (time) {
    case TIME_QUEUE: return r->admitted > 0 ? r->admitted - r->submitted : -1;
    case TIME_TTFT: return r->first_token > 0 ? r->first_token - r->submitted : -1;
    default: return r->first_token > 0 && n > 1 ? (r->last_token - r->first_token) / (n - 1) : -1;
    }
}

/* The text of an answer that was shown to its end; others may still follow its tokens. */
static void free_text(struct answer *answer) {
    free(answer->text);
    free(answer->thought);
    answer->text = answer->thought = NULL;
    answer->n_thought = 0;
}

void answers_json(const struct request *r, int n, enum finish_reason reason) {
    printf("\"finish_reason\":\"%s\"", answers_reasons[reason]);
    if (reason == FINISH_ERROR) {
        (void)fputs(",\"error\":", stdout);
        json_string(stdout, r->error, strlen(r->error));
    }
    printf(",\"seed\":%" PRIu64 ",\"prompt_tokens\":%d,\"cached_tokens\":%d,\"cached_on_host\":%d"
           ",\"completion_tokens\":%d,\"preemptions\":%d",
           r->sampling.seed, r->n_prompt, r->cached_tokens, r->cached_on_host, n, r->preemptions);
    if (r->admitted > 0)
        printf(",\"prefill_worker\":%d,\"decode_worker\":%d", r->prefill_worker, r->decode_worker);
    for (int i = 0; i < N_TIMES; i++) {
        double seconds = answers_time(r, (enum answer_time)i);
        if (seconds >= 0)
            printf(",\"%s_ms\":%.15g", answers_times[i][0], answers_short(1e3 * seconds));
    }
}

static void show_json(const struct answer *answer) {
    const struct request *r = &answer->request;
    int n = answers_generated(answer);
    (void)fputs("{\"id\":", stdout);
    json_string(stdout, answer->spec.id, strlen(answer->spec.id));
    (void)fputs(",\"text\":", stdout);
    json_string(stdout, answer->text, answer->length);
    if (answer->n_thought > 0) {
        (void)fputs(",\"reasoning_content\":", stdout);
        json_string(stdout, answer->thought, answer->n_thought);
    }
    (void)fputs(",\"ids\":[", stdout);
    for (int i = 0; i < n; i++)
        printf("%s%d", i > 0 ? "," : "", r->tokens[r->n_prompt + i]);
    (void)fputs("],", stdout);
    answers_json(r, n, answers_reason(answer));
    (void)fputs("}\n", stdout);
}

static void show(const struct answers *a, const char *text, size_t length) {
    if (a->wrap)
        wrap_write(a->wrap, stdout, text, length);
    else
        (void)fwrite(text, 1, length, stdout);
}

/* Without a tokenizer ids are the text, such as --ids takes. */
static void show_ids(const struct answers *a, struct answer *answer, int first) {
    char id[16];
    for (; answer->n_shown < answer->n_seen; answer->n_shown++)
        if (answer->n_shown >= first)
            show(a, id,
                 (size_t)snprintf(id, sizeof id, &",%d"[answer->n_shown == first],
                                  answer -> request.tokens[answer->n_shown]));
}

/* A base model continues its prompt, so the prompt is shown with it; a chat model answers. Of a
 * request that follows another its own part alone. */
static void echo(const struct answers *a, struct answer *answer) {
    const struct request *r = &answer->request;
    struct tok_stream stream = {0};
    char out[TOK_TEXT_SIZE];
    answer->echoed = true;
    if (answer->spec.prompt && a->template.kind != TEMPLATE_NONE)
        return;
    if (answer->spec.prompt)
        show(a, answer->spec.prompt, answer->spec.prompt_length);
    for (int i = 0; i < r->n_prompt && !answer->spec.prompt && a->tokenizer; i++) {
        size_t n = tok_decode(a->tokenizer, &stream, r->tokens[i], out);
        show(a, out, i < r->n_prompt - answer->spec.n_ids ? 0 : n);
    }
}

/* Prints what can be printed of the first unfinished answer, and of those that ended behind it. */
static int show_text(const struct answers *a, struct answer **all, int n, int first) {
    for (; first < n; first++) {
        struct answer *answer = all[first];
        const struct request *r = &answer->request;
        bool refused = answer->ended && r->reason == FINISH_ERROR && answers_generated(answer) == 0;
        if (!answer->echoed && !refused && (r->tokens || answer->ended))
            echo(a, answer);
        if (a->verbose && answer->n_thought > 0 && (answer->length > 0 || answer->ended)) {
            (void)fprintf(stderr, "dynamo: request %" PRId64 ": its analysis: %.*s\n",
                          answer->place, (int)answer->n_thought, answer->thought);
            answer->n_thought = 0;
        }
        if (answer->safe > answer->shown)
            show(a, answer->text + answer->shown, answer->safe - answer->shown);
        answer->shown = answer->safe;
        if (!a->tokenizer)
            show_ids(a, answer, r->n_prompt - answer->spec.n_ids);
        if (!answer->ended)
            break;
        free_text(answer);
        show(a, "\n\n", refused ? 0 : first < n - 1 ? 2 : 1);
        if (r->reason == FINISH_ERROR) {
            char line[ERROR_LENGTH]; /* the id is the user's, and may be any text */
            (void)fail(line, answer->spec.file ? "request %.100s: %.400s" : "%.0s%.400s",
                       answer->spec.id, r->error);
            (void)fprintf(stderr, "dynamo: %s\n", line);
        }
    }
    return first;
}

static void count_ended(struct answers *a, const struct answer *answer) {
    const struct request *r = &answer->request;
    int n = answers_generated(answer);
    a->n_tokens += n;
    a->n_host_hits += r->cached_on_host;
    if (n > 1) {
        a->n_intervals += n - 1;
        a->interval_sum += r->last_token - r->first_token;
    }
    for (int i = 0; i < N_TIMES; i++) {
        double seconds = answers_time(r, (enum answer_time)i);
        if (seconds < 0)
            continue;
        bool full = a->n_times[i] == ANSWERS_TIMES;
        int at = full ? (int)(answer->place % ANSWERS_TIMES) : a->n_times[i]++;
        a->times[i] = full ? a->times[i] : grow(a->times[i], (size_t)at, sizeof *a->times[i]);
        a->times[i][at] = seconds;
    }
}

/* ---- running ---- */

bool answers_advance(struct answers *a, struct answer *answer, int most) {
    struct request *r = &answer->request;
    int length = r->length, from = r->n_prompt + answers_generated(answer);
    if (!answer->stopped && length - from > most)
        length = from + most;
    bool finished = r->state == REQUEST_FINISHED && length == r->length;
    if (answer->ended || (!finished && from >= length))
        return false;
    bool was_stopped = answer->stopped;
    engine_unlock(a->engine);
    take_tokens(a, answer, length, finished);
    answer->ended = finished;
    engine_lock(a->engine);
    if (answer->stopped && !was_stopped) {
        sched_cancel(engine_sched(a->engine), r, true, engine_now());
        engine_wake(a->engine);
    }
    return !answer->stopped || finished || r->state == REQUEST_FINISHED;
}

/* A stop text may have been found after the last token was made. */
enum finish_reason answers_reason(const struct answer *answer) {
    return answer->stopped ? FINISH_STOP : answer->request.reason;
}

void answers_begin(struct answers *a, const struct request_spec *spec, struct answer *answer) {
    *answer = (struct answer){.spec = *spec, .place = a->n_requests};
    a->n_requests += !spec->cancel;
    (void)snprintf(answer->number, sizeof answer->number, "%" PRId64, answer->place);
    if (!answer->spec.id)
        answer->spec.id = spec->cancel ? spec->cancel : answer->number;
    if (a->template.kind == TEMPLATE_HARMONY && spec->prompt && !spec->plain)
        answer->part = PART_HEADER; /* it is for the model to choose a channel */
    answer->request.sampling = spec->sampling;
    if (!spec->seeded)
        answer->request.sampling.seed = answers_seed(a->seed, answer->place);
}

void answers_submit(struct answers *a, struct answer *answer) {
    answer->request.id = a->n_arrived++;
    sched_submit(engine_sched(a->engine), &answer->request, engine_now());
}

void answers_free(struct answer *answer) {
    free(answer->request.tokens);
    free_text(answer);
}

struct answer_list {     /* the answers of a run; in pointers, for the scheduler has theirs */
    struct answer **all; /* (n) [0, first) have ended, [0, first_shown) were shown */
    int n, first, first_shown, n_failed;
    double start;
};

/* The last with an id; NULL: none. */
static struct answer *find_answer(const struct answer_list *list, const char *id) {
    for (int i = list->n - 1; i >= 0; i--)
        if (!list->all[i]->spec.cancel && strcmp(list->all[i]->spec.id, id) == 0)
            return list->all[i];
    return NULL;
}

/* Ends a request in whatever state it is. Called with the lock held. */
static void cancel(struct answers *a, struct answer *answer) {
    if (answer->submitted) {
        sched_cancel(engine_sched(a->engine), &answer->request, false, engine_now());
    } else if (answer->request.state != REQUEST_FINISHED) {
        answer->request.state = REQUEST_FINISHED;
        answer->request.reason = FINISH_CANCELLED;
    }
    answer->submitted = true;
    engine_wake(a->engine);
}

/* Takes up requests that are new, and makes ids of those that follow none. Called with the lock
 * held, which is let go meanwhile: so one that is added now is seen as well. */
static bool take_up(struct answers *a, struct answer_list *list, struct requests *requests) {
    int i = 0;
    for (; i < requests->n; i++) {
        struct request_spec spec = requests->specs[i];
        struct answer *named = spec.cancel ? find_answer(list, spec.cancel) : NULL;
        if (named) {
            cancel(a, named);
            requests_forget(&spec);
            continue;
        }
        struct answer *answer = grow(NULL, 0, sizeof *answer);
        answers_begin(a, &spec, answer);
        engine_unlock(a->engine);
        answer->after = spec.after ? find_answer(list, spec.after) : NULL;
        if (!answer->after)
            prepare(a, answer);
        list->all = grow(list->all, (size_t)list->n, sizeof *list->all);
        list->all[list->n++] = answer;
        engine_lock(a->engine);
    }
    requests->n = 0;
    requests->n_taken += i;
    return i > 0;
}

/* Submits it, or not yet; then `next` is at the latest when its time comes. Called with the lock
 * held, which is let go while ids are made of the text that follows an answer. */
static bool submit(struct answers *a, struct answer *answer, double start, double *next) {
    struct request *r = &answer->request;
    double at = start + (double)answer->spec.at;
    if (answer->submitted || (answer->after && !answer->after->ended))
        return false;
    if (!r->tokens && r->state != REQUEST_FINISHED) {
        engine_unlock(a->engine);
        prepare(a, answer);
        answer->after = NULL; /* it may be let go */
        engine_lock(a->engine);
    }
    answer->submitted = r->state == REQUEST_FINISHED || engine_now() >= at;
    if (!answer->submitted) {
        *next = at < *next ? at : *next;
        return false;
    }
    if (r->state != REQUEST_FINISHED)
        answers_submit(a, answer);
    return true;
}

void answers_tell_line(const struct request_spec *spec, struct request *r) {
    char why[ERROR_LENGTH];
    if (r->reason != FINISH_ERROR || !spec->file || spec->error) /* which says it already */
        return;
    memcpy(why, r->error, sizeof why);
    (void)fail(r->error, "%.200s:%d: %.290s", spec->file, spec->number, why);
}

/* All that is new of an answer; of one that ends now it tells. */
static bool advance(struct answers *a, struct answer *answer) {
    if (!answers_advance(a, answer, INT_MAX))
        return false;
    if (answer->ended) {
        struct request *r = &answer->request;
        engine_unlock(a->engine);
        count_ended(a, answer);
        answers_tell_line(&answer->spec, r);
        if (a->json) {
            show_json(answer);
            free_text(answer);
        }
        engine_lock(a->engine);
    }
    return true;
}

/* The tokens of a request that ran, up to a stop text, are what was said so far. */
static void remember(struct answers *a, struct answer *answer) {
    struct request *r = &answer->request;
    if (r->reason == FINISH_ERROR || a->template.kind == TEMPLATE_NONE)
        return;
    free(a->history);
    a->history = r->tokens;
    a->n_history = answer->n_seen;
    r->tokens = NULL;
}

/* Lets go of the first n answers, which have ended and were shown. */
static void let_go(struct answers *a, struct answer_list *list, int n) {
    for (int i = 0; i < n; i++) {
        struct answer *answer = list->all[i];
        enum finish_reason reason = answer->request.reason;
        list->n_failed += reason == FINISH_ERROR || reason == FINISH_CANCELLED;
        if (a->converses)
            remember(a, answer);
        answers_free(answer);
        requests_forget(&answer->spec);
        free(answer);
    }
    list->n -= n;
    list->first -= n;
    list->first_shown -= n;
    if (list->n > 0)
        memmove(list->all, list->all + n, (size_t)list->n * sizeof *list->all);
}

/* Follows all requests until each has ended and no others can come. */
static void follow(struct answers *a, struct answer_list *list, struct requests *requests) {
    bool cancelled = false;
    a->interrupted = false;
    engine_lock(a->engine);
    a->activity = ANSWERING;
    while (list->first < list->n || (!cancelled && (requests->more || requests->n > 0))) {
        double next = INFINITY;
        bool any = !cancelled && take_up(a, list, requests), submitted = false;
        for (int i = list->first; i < list->n; i++)
            submitted = submit(a, list->all[i], list->start, &next) || submitted;
        if (submitted)
            engine_wake(a->engine);
        for (int i = list->first; i < list->n; i++) {
            any = (list->all[i]->submitted && advance(a, list->all[i])) || any;
            list->first += i == list->first && list->all[i]->ended;
        }
        if (list->n - list->first < requests->n_taken)
            engine_wake(a->engine); /* who reads them may go on */
        requests->n_taken = list->n - list->first;
        if ((a->activity == INTERRUPTED || ferror(stdout)) && !cancelled) {
            cancelled = any = true;
            a->interrupted = a->activity == INTERRUPTED;
            for (int i = 0; i < list->n; i++)
                cancel(a, list->all[i]);
        }
        if (!any) {
            engine_wait(a->engine, next);
            continue;
        }
        engine_unlock(a->engine);
        list->first_shown =
            a->json ? list->first : show_text(a, list->all, list->n, list->first_shown);
        (void)fflush(stdout);
        engine_lock(a->engine);
        if (list->first_shown >= 2 * ANSWERS_KEPT)
            let_go(a, list, list->first_shown - ANSWERS_KEPT);
    }
    requests->n_taken = -1;
    engine_wake(a->engine);
    a->activity = IDLE;
    engine_unlock(a->engine);
}

void answers_forget(struct answers *a) {
    free(a->history);
    a->history = NULL;
    a->n_history = 0;
}

int answers_stream(struct answers *a, struct requests *requests) {
    struct answer_list list = {.start = engine_now()};
    follow(a, &list, requests);
    a->busy_seconds += engine_now() - list.start;
    let_go(a, &list, list.n);
    free(list.all);
    return list.n_failed;
}

int answers_run(struct answers *a, const struct request_spec *spec) {
    struct request_spec one = *spec;
    return answers_stream(a, &(struct requests){.specs = &one, .n = 1});
}

#endif /* ANSWERS_IMPLEMENTATION */
