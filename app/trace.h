/* trace.h: the ledger on paper: what each worker did and why, for Perfetto and for the terminal.
 *
 *     struct trace *trace = trace_open("trace.json", verbose, error);
 *     config.ledger = trace_ledger(trace);
 *     ...                                   // an engine, or a scheduler, of that configuration
 *     ok = trace_begin(trace, &config, sched, engine_now(), error);
 *     ...                                   // it runs
 *     ok = trace_close(trace, error);
 *
 * Owns the file of --trace and the lines of --verbose, which tell the same. The file is an array of
 * events as Chrome and https://ui.perfetto.dev read them ("Trace Event Format"): a process for the
 * scheduler, for each worker and for the host; a lane of each worker for its steps, its copies of
 * each direction, and for what the pager decided there; counters of the blocks of each place and of
 * the requests; an arrow for each hand-over, from the step that ended the prompt to the first that
 * goes on. A stream carries its copies out in order: each begins where the one before it ended.
 *
 * Refuses to have a clock: the times are those of the events, also where they are virtual. Only
 * whole events reach the file, so what a killed program leaves lacks no more than the `]`, which
 * readers of this format do without.
 * Read next: enum event_kind in dynamo.h. */
#ifndef TRACE_H
#define TRACE_H

#include "../dynamo.h"

struct trace;
/* path: NULL: no file; verbose: lines on stderr. NULL: neither was asked for, and `error` is as it
 * was; or the file cannot be written, and it is one line. */
struct trace *trace_open(const char *path, bool verbose, char *error);
struct ledger trace_ledger(struct trace *trace); /* of NULL: of nobody */
/* Before the first event, when all else is open: until then the file is as it was. Names places and
 * lanes; time begins at `now`. NULL: nothing is done. False: it cannot be written, see `error`. */
bool trace_begin(struct trace *trace, const struct engine_config *config, struct sched *sched,
                 double now, char *error);
/* Writes what was noted so far: before a fault ends the program. NULL: nothing is done. */
void trace_flush(struct trace *trace);
/* When no event can come any more. NULL: nothing is done. False: not all could be written. */
bool trace_close(struct trace *trace, char *error);

#endif /* TRACE_H */

#ifdef TRACE_IMPLEMENTATION
#undef TRACE_IMPLEMENTATION

#include "../lib/json.h"
#include "answers.h"
#include <errno.h>
#include <inttypes.h>
#include <stdio_ext.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    TRACE_BUFFER = 1 << 17,
    TRACE_FLUSH = 1 << 14, /* bytes that are written together: room for an event is left */
    TRACE_FLOWS = 1024,
    TRACE_SCHEDULER = -1 /* its place, as a process of the trace */
};
enum trace_lane { LANE_STEPS, LANE_OUT, LANE_IN, LANE_PEER, LANE_PAGER, N_LANES };

struct trace {
    FILE *file, *lines; /* or NULL */
    char buffer[TRACE_BUFFER];
    const char *path;
    char names[MAX_WORKERS + 1][40];
    bool made; /* there was no such file */
    bool any;  /* an event stands in the file */
    int error; /* errno of the first write that failed */
    double begun;
    int64_t now; /* ns: the latest end of an event; one may be noted a little after its end */
    const struct kv *kv;
    int host;
    double block_bytes;
    int64_t ends[MAX_WORKERS][N_LANES]; /* ns: when the last event of a lane ended */
    struct kv_usage shown[MAX_WORKERS + 1];
    int n_waiting, n_admitted; /* requests */
    /* the last hand-over of requests whose ids share this remainder; start: 0: it is drawn */
    struct trace_flow {
        int64_t request, start;
        int worker;
    } flows[TRACE_FLOWS];
    int64_t n_flows; /* drawn */
};

/* ---- writing ---- */

/* What all events begin with. */
static void trace_start(struct trace *t, const char *phase, const char *name, int place, int lane,
                        int64_t at) {
    if (__fpending(t->file) > TRACE_FLUSH && fflush(t->file) != 0)
        t->error = errno;
    int pid = 10 * (place + 2); /* a lane's number is its own in all of the trace */
    (void)fprintf(t->file,
                  "%s\n{\"ph\":\"%s\",\"name\":\"%s\",\"pid\":%d,\"tid\":%d,\"ts\":%" PRId64
                  ".%03" PRId64,
                  t->any ? "," : "", phase, name, pid, pid + 1 + lane, at / 1000, at % 1000);
    t->any = true;
}

static void trace_label(struct trace *t, const char *what, int place, int lane, const char *name) {
    trace_start(t, "M", what, place, lane, 0);
    (void)fprintf(t->file, ",\"args\":{\"name\":\"%s\"}}", name);
}

/* ---- counters ---- */

static void trace_count_blocks(struct trace *t, int place) {
    struct kv_usage now = kv_usage(t->kv, place);
    if (memcmp(&now, &t->shown[place], sizeof now) == 0)
        return;
    t->shown[place] = now;
    trace_start(t, "C", "KV blocks", place, 0, t->now);
    (void)fprintf(t->file, ",\"args\":{\"pinned\":%d,\"cached\":%d,\"in flight\":%d,\"free\":%d}}",
                  now.pinned, now.cached, now.in_flight, now.free);
}

/* What an event has changed. (An eviction makes room for what comes next.) */
static void trace_count(struct trace *t, const struct event *e) {
    bool comes = e->kind == EVENT_SUBMITTED, leaves = e->kind == EVENT_FINISHED;
    bool starts = e->kind == EVENT_ADMITTED, stops = e->kind == EVENT_PREEMPTED;
    bool moves = starts || e->kind == EVENT_HANDED_OVER || e->kind == EVENT_COPY_ORDERED ||
                 e->kind == EVENT_COPY;
    if (moves)
        trace_count_blocks(t, e->from);
    if (moves || e->kind == EVENT_STEP || stops || (leaves && e->worker >= 0))
        trace_count_blocks(t, moves ? e->to : e->worker);
    if (!comes && !starts && !stops && !leaves)
        return;
    t->n_waiting += comes + stops - starts - (leaves && e->worker < 0);
    t->n_admitted += starts - stops - (leaves && e->worker >= 0);
    trace_start(t, "C", "requests", TRACE_SCHEDULER, 0, t->now);
    (void)fprintf(t->file, ",\"args\":{\"waiting\":%d,\"admitted\":%d}}", t->n_waiting,
                  t->n_admitted);
}

/* ---- hand-overs ---- */

/* An arrow begins in the step that has just ended on the prefill worker. It is drawn when the step
 * is known in which it ends. */
static void trace_hand_over(struct trace *t, const struct event *e) {
    struct trace_flow *flow = &t->flows[(uint64_t)e->request % TRACE_FLOWS];
    if (e->kind == EVENT_HANDED_OVER)
        *flow = (struct trace_flow){e->request, t->ends[e->from][LANE_STEPS] - 1, e->from};
    else if (flow->request == e->request) /* it has ended, or begins anew */
        flow->start = 0;
}

static void trace_draw_flows(struct trace *t, const struct event *e, int64_t at) {
    for (int i = 0; i < e->step->batch.n_sequences; i++) {
        int64_t id = e->step->requests[i]->id;
        struct trace_flow *flow = &t->flows[(uint64_t)id % TRACE_FLOWS];
        if (flow->request != id || flow->start == 0 || flow->worker == e->worker)
            continue;
        t->n_flows++;
        for (int end = 0; end < 2; end++) {
            trace_start(t, end ? "f" : "s", "hand-over", end ? e->worker : flow->worker, LANE_STEPS,
                        end ? at : flow->start);
            (void)fprintf(t->file, ",\"cat\":\"request\",\"id\":%" PRId64 ",\"bp\":\"e\"}",
                          t->n_flows);
        }
        flow->start = 0;
    }
}

/* ---- what there is to say of an event ---- */

static int trace_answers(const struct batch *batch) {
    int n = 0;
    for (int i = 0; i < batch->n_sequences; i++)
        n += batch->sequence[i].generated;
    return n;
}

/* The name of each kind, and what is told of it: a letter (see trace_field), and its key. */
static const char *const trace_rows[][2] = {
    [EVENT_SUBMITTED] = {"submitted", "r request n prompt_tokens"},
    [EVENT_FOLLOWS] = {"follows", "r request o leader n shared_tokens"},
    [EVENT_ADMITTED] = {"admitted", "r request f prefill p why_prefill t decode y why_decode "
                                    "n cached_tokens h cached_on_host"},
    [EVENT_PREEMPTED] = {"preempted", "r request w at y why"},
    [EVENT_HANDED_OVER] = {"handed over", "r request f from t to"},
    [EVENT_FINISHED] = {"finished", "r request w at n tokens e reason y error"},
    [EVENT_FAILED] = {"failed", "w at"},
    [EVENT_ROLE] = {"role", "w at y role"},
    [EVENT_EVICTED] = {"evicted", "b block F tier f from B bytes y why"},
    [EVENT_COPY_ORDERED] = {"copy ordered", "b block T tier f from t to B bytes y why"},
    [EVENT_STEP] = {NULL, "w at R rows P prompts A answers K blocks L requests"},
    [EVENT_COPY] = {"copy", "b block T tier f from t to B bytes"}};

/* The name of an event, by which viewers choose colours; a step's is what it computes. */
static const char *trace_name(const struct event *e) {
    if (e->kind != EVENT_STEP)
        return trace_rows[e->kind][0];
    int n = trace_answers(&e->step->batch);
    return n == 0 ? "prefill" : n < e->step->batch.n_sequences ? "mixed" : "decode";
}

/* What a letter stands for: a text, or NULL and a number; or neither. */
static const char *trace_field(const struct trace *t, const struct event *e, char letter,
                               double *number) {
    const struct batch *batch = e->step ? &e->step->batch : NULL;
    switch (letter) {
    case 'f': return t->names[e->from];
    case 't': return t->names[e->to];
    case 'w': return e->worker < 0 ? "the queue" : t->names[e->worker];
    case 'F': return e->from == t->host ? "host" : "device";
    case 'T': return e->to == t->host ? "host" : "device";
    case 'p': return e->why_prefill;
    case 'y': return e->why;
    case 'e': return answers_reasons[e->reason];
    case 'r': *number = (double)e->request; break;
    case 'o': *number = (double)e->other; break;
    case 'b': *number = e->node; break;
    case 'n': *number = e->n; break;
    case 'h': *number = e->n_host; break;
    case 'B': *number = t->block_bytes; break;
    case 'R': *number = batch->n_rows; break;
    case 'P': *number = batch->n_sequences - trace_answers(batch); break;
    case 'A': *number = trace_answers(batch); break;
    case 'K': *number = batch->n_blocks; break;
    }
    return NULL;
}

static void trace_requests(FILE *out, bool json, const struct step *step) {
    for (int i = 0; i < step->batch.n_sequences; i++)
        (void)fprintf(out, "%s%" PRId64, i == 0 ? "" : json ? "," : " ", step->requests[i]->id);
}

/* All that is told of an event, as the inside of an object or of a line. */
static void trace_fields(const struct trace *t, FILE *out, bool json, const struct event *e) {
    const char *before = "", *at = trace_rows[e->kind][1];
    for (int length; *at; at += length + (at[length] == ' ')) {
        char letter = *at;
        at += 2;
        length = (int)strcspn(at, " ");
        double number = NAN;
        const char *text = trace_field(t, e, letter, &number);
        if (!text && isnan(number) && letter != 'L')
            continue;
        (void)fprintf(out, json ? "%s\"%.*s\":" : "%s%.*s ", before, length, at);
        before = json ? "," : ", ";
        if (letter == 'L') {
            (void)fputs(json ? "[" : "", out);
            trace_requests(out, json, e->step);
            (void)fputs(json ? "]" : "", out);
        } else if (text && json)
            json_string(out, text, strlen(text));
        else if (text)
            (void)fputs(text, out);
        else
            (void)fprintf(out, "%.15g", number);
    }
}

/* ---- events ---- */

static void trace_line(struct trace *t, const struct event *e) {
    (void)fprintf(t->lines, "%12.6f %s: ", e->end - t->begun, trace_name(e));
    trace_fields(t, t->lines, false, e);
    if (e->end > e->start)
        (void)fprintf(t->lines, ", %.3f ms", 1e3 * (e->end - e->start));
    (void)fputc('\n', t->lines);
}

/* Where an event stands: its place, and its lane there. */
static int trace_place(const struct trace *t, const struct event *e, enum trace_lane *lane) {
    switch (e->kind) {
    case EVENT_STEP: *lane = LANE_STEPS; return e->worker;
    case EVENT_COPY:
        *lane = e->to == t->host ? LANE_OUT : e->from == t->host ? LANE_IN : LANE_PEER;
        return e->worker;
    case EVENT_EVICTED: *lane = LANE_PAGER; return e->from;
    case EVENT_COPY_ORDERED: *lane = LANE_PAGER; return e->to == t->host ? e->from : e->to;
    default: *lane = LANE_STEPS; return TRACE_SCHEDULER;
    }
}

static void trace_event(struct trace *t, const struct event *e) {
    enum trace_lane lane;
    int place = trace_place(t, e, &lane);
    int64_t start = llround(1e9 * (e->start - t->begun)), end = llround(1e9 * (e->end - t->begun));
    bool lasts = e->kind == EVENT_STEP || e->kind == EVENT_COPY;
    t->now = end > t->now ? end : t->now;
    if (lasts) {
        int64_t *last = &t->ends[place][lane];
        start = start > *last ? start : *last;
        *last = end = end > start ? end : start;
    }
    trace_start(t, lasts ? "X" : "i", trace_name(e), place, (int)lane, start);
    if (lasts)
        (void)fprintf(t->file, ",\"dur\":%" PRId64 ".%03" PRId64, (end - start) / 1000,
                      (end - start) % 1000);
    (void)fprintf(t->file, "%s,\"args\":{", lasts ? "" : ",\"s\":\"t\"");
    trace_fields(t, t->file, true, e);
    (void)fprintf(t->file, "}}");
    if (e->kind == EVENT_STEP)
        trace_draw_flows(t, e, start);
}

static void trace_note(void *context, const struct event *e) {
    struct trace *t = context;
    if (t->lines)
        trace_line(t, e);
    if (!t->file || t->error != 0) /* what was not written would be missing between others */
        return;
    trace_event(t, e);
    trace_count(t, e);
    if (e->kind == EVENT_HANDED_OVER || e->kind == EVENT_PREEMPTED || e->kind == EVENT_FINISHED)
        trace_hand_over(t, e);
}

/* ---- the file ---- */

struct trace *trace_open(const char *path, bool verbose, char *error) {
    if (!path && !verbose)
        return NULL;
    struct trace *t = calloc(1, sizeof *t);
    if (!t && !fail(error, "out of memory"))
        return NULL;
    /* its own stream, so that a line comes in one piece */
    t->lines = verbose ? fdopen(dup(STDERR_FILENO), "w") : NULL;
    if (t->lines)
        (void)setvbuf(t->lines, NULL, _IOLBF, BUFSIZ);
    if (!path)
        return t;
    t->path = path;
    t->made = access(path, F_OK) != 0;
    t->file = fopen(path, "a");
    if (t->file && setvbuf(t->file, t->buffer, _IOFBF, sizeof t->buffer) == 0)
        return t;
    t->error = errno;
    (void)trace_close(t, error);
    return NULL;
}

struct ledger trace_ledger(struct trace *t) {
    return (struct ledger){t ? trace_note : NULL, t};
}

bool trace_begin(struct trace *t, const struct engine_config *config, struct sched *sched,
                 double now, char *error) {
    static const char *const lanes[N_LANES] = {
        "steps", "copies to the host", "copies from the host", "copies from workers", "pager"};
    if (!t)
        return true;
    if (t->file && ((ftruncate(fileno(t->file), 0) != 0 && errno != EINVAL) || /* of a device */
                    fputs("[", t->file) < 0 || fflush(t->file) != 0))
        return fail(error, "%.200s: %s", t->path, strerror(errno));
    t->begun = now;
    t->kv = sched_kv(sched);
    t->host = config->n_workers;
    t->block_bytes = (double)block_bytes(&config->model->config, 1, config->kv_type);
    for (int i = 0; i < t->host; i++)
        (void)snprintf(t->names[i], sizeof t->names[i], "worker %d (%s%s%s)", i,
                       config->workers[i].prefills ? "prefill" : "",
                       config->workers[i].prefills && config->workers[i].decodes ? "+" : "",
                       config->workers[i].decodes ? "decode" : "");
    (void)snprintf(t->names[t->host], sizeof t->names[t->host], "host");
    for (int i = TRACE_SCHEDULER; i <= t->host && t->file; i++) {
        trace_label(t, "process_name", i, 0, i == TRACE_SCHEDULER ? "scheduler" : t->names[i]);
        for (int lane = 0; lane < N_LANES; lane++)
            if (i < 0 ? lane == 0 : i < t->host || lane == LANE_PAGER)
                trace_label(t, "thread_name", i, lane, i < 0 ? "decisions" : lanes[lane]);
        if (i >= 0)
            trace_count_blocks(t, i);
    }
    return true;
}

void trace_flush(struct trace *t) {
    if (t && t->file)
        (void)fflush(t->file);
}

bool trace_close(struct trace *t, char *error) {
    if (!t)
        return true;
    if (t->lines)
        (void)fclose(t->lines);
    if (t->file && t->error == 0 && t->kv)
        (void)fputs("\n]\n", t->file);
    if (t->file && t->made && !t->kv) /* it has not begun */
        (void)unlink(t->path);
    if (t->file && fclose(t->file) != 0 && t->error == 0 && t->kv)
        t->error = errno;
    bool ok = t->error == 0 || fail(error, "%.200s: %s", t->path, strerror(t->error));
    free(t);
    return ok;
}

#endif /* TRACE_IMPLEMENTATION */
