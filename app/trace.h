/* trace.h: the ledger on paper: what each worker did and why, for Perfetto and for the terminal.
 *
 *     struct trace *trace = trace_open("trace.json", verbose, error);
 *     config.ledger = trace_ledger(trace);
 *     ...                                   // an engine, or a scheduler, of that configuration
 *     trace_begin(trace, &config, sched, engine_now());
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
/* Before the first event: names places and lanes. Time begins at `now`. */
void trace_begin(struct trace *trace, const struct engine_config *config, struct sched *sched,
                 double now);
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
    TRACE_BUFFER = 1 << 18,
    TRACE_FLUSH = TRACE_BUFFER / 2, /* bytes that are written together: an event has fewer */
    TRACE_SCHEDULER = -1            /* its place, as a process of the trace */
};
enum trace_lane { LANE_STEPS, LANE_OUT, LANE_IN, LANE_PEER, LANE_PAGER, N_LANES };

struct trace {
    FILE *file, *lines; /* or NULL */
    const char *path;
    char names[MAX_WORKERS + 1][32];
    bool any;  /* an event stands in the file */
    int error; /* errno of the first write that failed */
    double begun;
    const struct kv *kv;
    int host;
    double block_bytes;
    int64_t ends[MAX_WORKERS][N_LANES]; /* ns: when the last event of a lane ended */
    struct kv_usage shown[MAX_WORKERS + 1];
    int n_waiting, n_admitted; /* requests */
    struct trace_flow {        /* handed over, and not yet in a step */
        int64_t request, start;
        int worker;
    } * flows; /* (n_flows, of room for so many) */
    int n_flows, room;
    int64_t last_flow;
};

/* ---- writing ---- */

static void trace_check(struct trace *t, bool ok) {
    if (!ok && t->error == 0)
        t->error = errno;
}

/* What all events begin with. */
static void trace_start(struct trace *t, const char *phase, const char *name, int place, int lane,
                        int64_t at) {
    if (__fpending(t->file) > TRACE_FLUSH)
        trace_check(t, fflush(t->file) == 0);
    int pid = 10 * (place + 2); /* a lane's number is its own in all of the trace */
    (void)fprintf(t->file,
                  "%s\n{\"ph\":\"%s\",\"name\":\"%s\",\"pid\":%d,\"tid\":%d,\"ts\":%" PRId64
                  ".%03" PRId64,
                  t->any ? "," : "", phase, name, pid, pid + 1 + lane, at / 1000, at % 1000);
    t->any = true;
}

static void trace_name(struct trace *t, const char *what, int place, int lane, const char *name) {
    trace_start(t, "M", what, place, lane, 0);
    (void)fprintf(t->file, ",\"args\":{\"name\":\"%s\"}}", name);
}

/* ---- counters ---- */

static void trace_count_requests(struct trace *t, int64_t at) {
    trace_start(t, "C", "requests", TRACE_SCHEDULER, 0, at);
    (void)fprintf(t->file, ",\"args\":{\"waiting\":%d,\"admitted\":%d}}", t->n_waiting,
                  t->n_admitted);
}

static void trace_count_blocks(struct trace *t, int place, int64_t at) {
    struct kv_usage now = kv_usage(t->kv, place);
    if (memcmp(&now, &t->shown[place], sizeof now) == 0)
        return;
    t->shown[place] = now;
    trace_start(t, "C", "KV blocks", place, 0, at);
    (void)fprintf(t->file, ",\"args\":{\"pinned\":%d,\"cached\":%d,\"in flight\":%d,\"free\":%d}}",
                  now.pinned, now.cached, now.in_flight, now.free);
}

/* ---- hand-overs ---- */

static struct trace_flow *trace_find_flow(const struct trace *t, int64_t request) {
    for (int i = 0; i < t->n_flows; i++)
        if (t->flows[i].request == request)
            return &t->flows[i];
    return NULL;
}

static void trace_end_flow(struct trace *t, int64_t request) {
    struct trace_flow *flow = trace_find_flow(t, request);
    if (flow)
        *flow = t->flows[--t->n_flows];
}

/* The arrow begins in the step that has just ended there. */
static void trace_begin_flow(struct trace *t, const struct event *e) {
    if (t->n_flows == t->room) {
        void *more = realloc(t->flows, 2 * ((size_t)t->room + 8) * sizeof *t->flows);
        if (!more)
            return; /* an arrow is missing */
        t->flows = more;
        t->room = 2 * (t->room + 8);
    }
    t->flows[t->n_flows++] =
        (struct trace_flow){e->request, t->ends[e->from][LANE_STEPS] - 1, e->from};
}

static void trace_put_flows(struct trace *t, const struct event *e, int64_t at) {
    for (int i = 0; i < e->step->batch.n_sequences && t->n_flows > 0; i++) {
        const struct trace_flow *flow = trace_find_flow(t, e->step->requests[i]->id);
        if (!flow || flow->worker == e->worker)
            continue;
        const char *more = ",\"cat\":\"hand-over\",\"id\":%" PRId64 ",\"bp\":\"e\"}";
        trace_start(t, "s", "hand-over", flow->worker, LANE_STEPS, flow->start);
        (void)fprintf(t->file, more, ++t->last_flow);
        trace_start(t, "f", "hand-over", e->worker, LANE_STEPS, at);
        (void)fprintf(t->file, more, t->last_flow);
        trace_end_flow(t, flow->request);
    }
}

/* ---- what there is to say of an event ---- */

enum trace_type { AN_INT, AN_ID, A_TEXT, A_PLACE, A_TIER, THE_BYTES, A_REASON };
#define AT(field) offsetof(struct event, field)
static const struct trace_row {
    const char *name; /* of the event */
    struct {
        const char *key;
        enum trace_type type;
        size_t offset;
    } fields[8];
} trace_rows[] = {
    [EVENT_SUBMITTED] = {"submitted",
                         {{"request", AN_ID, AT(request)}, {"prompt_tokens", AN_INT, AT(n)}}},
    [EVENT_FOLLOWS] = {"follows",
                       {{"request", AN_ID, AT(request)},
                        {"leader", AN_ID, AT(other)},
                        {"shared_tokens", AN_INT, AT(n)}}},
    [EVENT_ADMITTED] = {"admitted",
                        {{"request", AN_ID, AT(request)},
                         {"prefill", A_PLACE, AT(from)},
                         {"why_prefill", A_TEXT, AT(why_prefill)},
                         {"decode", A_PLACE, AT(to)},
                         {"why_decode", A_TEXT, AT(why)},
                         {"cached_tokens", AN_INT, AT(n)},
                         {"cached_on_host", AN_INT, AT(n_host)}}},
    [EVENT_PREEMPTED] = {"preempted",
                         {{"request", AN_ID, AT(request)},
                          {"at", A_PLACE, AT(worker)},
                          {"why", A_TEXT, AT(why)}}},
    [EVENT_HANDED_OVER] = {"handed over",
                           {{"request", AN_ID, AT(request)},
                            {"from", A_PLACE, AT(from)},
                            {"to", A_PLACE, AT(to)}}},
    [EVENT_FINISHED] = {"finished",
                        {{"request", AN_ID, AT(request)},
                         {"at", A_PLACE, AT(worker)},
                         {"tokens", AN_INT, AT(n)},
                         {"reason", A_REASON, AT(reason)},
                         {"error", A_TEXT, AT(why)}}},
    [EVENT_EVICTED] = {"evicted",
                       {{"block", AN_INT, AT(node)},
                        {"tier", A_TIER, AT(from)},
                        {"from", A_PLACE, AT(from)},
                        {"bytes", THE_BYTES, 0},
                        {"why", A_TEXT, AT(why)}}},
    [EVENT_COPY_ORDERED] = {"copy ordered",
                            {{"block", AN_INT, AT(node)},
                             {"tier", A_TIER, AT(to)},
                             {"from", A_PLACE, AT(from)},
                             {"to", A_PLACE, AT(to)},
                             {"bytes", THE_BYTES, 0},
                             {"why", A_TEXT, AT(why)}}},
    [EVENT_STEP] = {"step", {{"at", A_PLACE, AT(worker)}}}, /* and of its batch: see below */
    [EVENT_COPY] = {"copy",
                    {{"block", AN_INT, AT(node)},
                     {"tier", A_TIER, AT(to)},
                     {"from", A_PLACE, AT(from)},
                     {"to", A_PLACE, AT(to)},
                     {"bytes", THE_BYTES, 0}}}};
#undef AT

/* The first value of an event is told with comma == false. */
static void trace_text(FILE *out, bool json, bool comma, const char *key, const char *text) {
    (void)fprintf(out, json ? "%s\"%s\":" : "%s%s ", comma ? json ? "," : ", " : "", key);
    if (json)
        json_string(out, text, strlen(text));
    else
        (void)fputs(text, out);
}

static void trace_number(FILE *out, bool json, bool comma, const char *key, double number) {
    (void)fprintf(out, json ? "%s\"%s\":%.15g" : "%s%s %.15g", comma ? json ? "," : ", " : "", key,
                  number);
}

static void trace_batch(FILE *out, bool json, const struct step *step, int n_answers) {
    const struct batch *batch = &step->batch;
    trace_number(out, json, true, "rows", batch->n_rows);
    trace_number(out, json, true, "prompts", batch->n_sequences - n_answers);
    trace_number(out, json, true, "answers", n_answers);
    trace_number(out, json, true, "blocks", batch->n_blocks);
    (void)fputs(json ? ",\"requests\":[" : ", requests", out);
    for (int i = 0; i < batch->n_sequences; i++)
        (void)fprintf(out, "%s%" PRId64, json ? i > 0 ? "," : "" : " ", step->requests[i]->id);
    (void)fputs(json ? "]" : "", out);
}

/* All that is known of an event, as the inside of an object or of a line. */
static void trace_fields(const struct trace *t, FILE *out, bool json, const struct event *e) {
    const struct trace_row *row = &trace_rows[e->kind];
    for (int i = 0; i < 8 && row->fields[i].key; i++) {
        const char *at = (const char *)e + row->fields[i].offset, *key = row->fields[i].key;
        int number = *(const int *)at; /* of most types */
        const char *text = NULL;
        switch (row->fields[i].type) {
        case AN_INT: trace_number(out, json, i > 0, key, number); break;
        case AN_ID: trace_number(out, json, i > 0, key, (double)*(const int64_t *)at); break;
        case THE_BYTES: trace_number(out, json, i > 0, key, t->block_bytes); break;
        case A_TEXT: text = *(const char *const *)at; break;
        case A_PLACE: text = number < 0 ? "the queue" : t->names[number]; break;
        case A_TIER: text = number == t->host ? "host" : "device"; break;
        case A_REASON: text = reason_names[number]; break;
        }
        if (text)
            trace_text(out, json, i > 0, key, text);
    }
}

/* ---- events ---- */

/* What a step computes: the name of its event, by which viewers choose colours. */
static const char *trace_step_name(const struct batch *batch, int *n_answers) {
    *n_answers = 0;
    for (int i = 0; i < batch->n_sequences; i++)
        *n_answers += batch->sequence[i].generated;
    return *n_answers == 0 ? "prefill" : *n_answers < batch->n_sequences ? "mixed" : "decode";
}

static void trace_line(struct trace *t, const struct event *e, const char *name, int n_answers) {
    (void)fprintf(t->lines, "%12.6f %s: ", e->end - t->begun, name);
    trace_fields(t, t->lines, false, e);
    if (e->kind == EVENT_STEP)
        trace_batch(t->lines, false, e->step, n_answers);
    if (e->end > e->start)
        trace_number(t->lines, false, true, "us", 1e6 * (e->end - e->start));
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

static void trace_event(struct trace *t, const struct event *e, const char *name, int n_answers) {
    enum trace_lane lane;
    int place = trace_place(t, e, &lane);
    int64_t start = llround(1e9 * (e->start - t->begun)), end = llround(1e9 * (e->end - t->begun));
    bool lasts = e->kind == EVENT_STEP || e->kind == EVENT_COPY;
    if (lasts) {
        int64_t *last = &t->ends[place][lane];
        start = start > *last ? start : *last;
        *last = end = end > start ? end : start;
    }
    trace_start(t, lasts ? "X" : "i", name, place, (int)lane, start);
    if (lasts)
        (void)fprintf(t->file, ",\"dur\":%" PRId64 ".%03" PRId64, (end - start) / 1000,
                      (end - start) % 1000);
    (void)fprintf(t->file, "%s,\"args\":{", lasts ? "" : ",\"s\":\"t\"");
    trace_fields(t, t->file, true, e);
    if (e->kind == EVENT_STEP)
        trace_batch(t->file, true, e->step, n_answers);
    (void)fprintf(t->file, "}}");
    if (e->kind == EVENT_STEP)
        trace_put_flows(t, e, start);
    if (lasts) {
        trace_count_blocks(t, place, end);
        trace_count_blocks(t, t->host, end);
    }
}

/* Counts the requests that wait and those that were admitted; true: one of them has gone on. */
static bool trace_count(struct trace *t, const struct event *e) {
    int waiting = (e->kind == EVENT_SUBMITTED || e->kind == EVENT_PREEMPTED) -
                  (e->kind == EVENT_ADMITTED || (e->kind == EVENT_FINISHED && e->worker < 0));
    int admitted = (e->kind == EVENT_ADMITTED) -
                   (e->kind == EVENT_PREEMPTED || (e->kind == EVENT_FINISHED && e->worker >= 0));
    t->n_waiting += waiting;
    t->n_admitted += admitted;
    return waiting != 0 || admitted != 0;
}

static void trace_note(void *context, const struct event *e) {
    struct trace *t = context;
    int n_answers = 0;
    const char *name = trace_rows[e->kind].name;
    if (e->kind == EVENT_STEP)
        name = trace_step_name(&e->step->batch, &n_answers);
    if (t->lines)
        trace_line(t, e, name, n_answers);
    if (!t->file)
        return;
    trace_event(t, e, name, n_answers);
    if (trace_count(t, e))
        trace_count_requests(t, llround(1e9 * (e->end - t->begun)));
    if (e->kind == EVENT_HANDED_OVER)
        trace_begin_flow(t, e);
    if (e->kind == EVENT_PREEMPTED || e->kind == EVENT_FINISHED)
        trace_end_flow(t, e->request);
}

/* ---- the file ---- */

struct trace *trace_open(const char *path, bool verbose, char *error) {
    if (!path && !verbose)
        return NULL;
    struct trace *t = calloc(1, sizeof *t);
    if (!t) {
        (void)fail(error, "out of memory");
        return NULL;
    }
    /* its own stream, so that a line comes in one piece */
    t->lines = verbose ? fdopen(dup(STDERR_FILENO), "w") : NULL;
    if (t->lines)
        (void)setvbuf(t->lines, NULL, _IOLBF, BUFSIZ);
    if (!path)
        return t;
    t->path = path;
    t->file = fopen(path, "w");
    if (t->file)
        (void)setvbuf(t->file, NULL, _IOFBF, TRACE_BUFFER);
    if (t->file && fputs("[", t->file) >= 0 && fflush(t->file) == 0)
        return t;
    (void)fail(error, "--trace %.200s: %s", path, strerror(errno));
    (void)trace_close(t, NULL);
    return NULL;
}

struct ledger trace_ledger(struct trace *t) {
    return (struct ledger){t ? trace_note : NULL, t};
}

void trace_begin(struct trace *t, const struct engine_config *config, struct sched *sched,
                 double now) {
    static const char *const lanes[N_LANES] = {
        "steps", "copies to the host", "copies from the host", "copies from workers", "pager"};
    if (!t)
        return;
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
        trace_name(t, "process_name", i, 0, i == TRACE_SCHEDULER ? "scheduler" : t->names[i]);
        for (int lane = 0; lane < N_LANES; lane++)
            if (i < 0 ? lane == 0 : i < t->host || lane == LANE_PAGER)
                trace_name(t, "thread_name", i, lane, i < 0 ? "decisions" : lanes[lane]);
        if (i >= 0)
            trace_count_blocks(t, i, 0);
    }
}

bool trace_close(struct trace *t, char *error) {
    if (!t)
        return true;
    if (t->lines)
        (void)fclose(t->lines);
    if (t->file) {
        trace_check(t, fputs("\n]\n", t->file) >= 0 && !ferror(t->file));
        trace_check(t, fclose(t->file) == 0);
    }
    bool ok = t->error == 0 || fail(error, "--trace %.200s: %s", t->path, strerror(t->error));
    free(t->flows);
    free(t);
    return ok;
}

#endif /* TRACE_IMPLEMENTATION */
