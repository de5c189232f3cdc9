/* test_scheduler.c: the cache and the scheduler against an oracle.
 *
 * A simulated machine stands in for devices: each slot of each place holds a fingerprint per token
 * row, the hash of the whole text up to that token. A step writes fingerprints, after it has found
 * the right one at every earlier position of its block table; so a block that is lost, stale,
 * reused too early or not yet arrived is caught by the first step that reads it. Copies are carried
 * out late and out of order: the source must stay as it is until the end is reported, and the
 * target holds garbage until then; some hang, which takes their worker out. The next token is a
 * function of the text, so the answer to each request is known before it is submitted, and must be
 * the same in every schedule.
 *
 *     test_scheduler              the directed tests, and 10^5 random operations
 *     test_scheduler soak [seed]  10^7 random operations */
#include "failing.h"

#define calloc failing_calloc
#define malloc failing_malloc
#include "invariants.h"
#undef calloc
#undef malloc
#include "check.h"

#include <math.h>
#include <time.h>

enum {
    MAX_TEXT = 1024,
    MAX_JOBS = 48,
    MAX_FLIGHTS = 2048,
    MAX_HISTORY = 64,
    VOCABULARY = 64,
    N_ENDS = 2, /* tokens 0 and 1 end an answer */
    EPISODE = 800,
    MAX_ROUNDS = 20000
};

static const double HANG_SECONDS = 0.05; /* after which a copy is found not to end */
static const bool ends_text[VOCABULARY] = {[0] = true, [1] = true};

struct job {
    bool live, cancelled, stopped;
    struct request request;
    int tokens[MAX_TEXT];
    int text[MAX_TEXT], n_text; /* what tokens must be in the end */
    uint64_t chain[MAX_TEXT];   /* the fingerprint of each position of text */
    enum finish_reason reason;
};

struct flight { /* a copy that has been handed out */
    struct kv_copy_order order;
    bool is_void;                  /* a worker at one of its ends has failed since */
    double hangs;                  /* found not to end at this time; 0: it ends */
    uint64_t before[BLOCK_TOKENS]; /* the source at the start */
};

struct machine {
    uint64_t random;
    struct sched_config config;
    struct sched *s;
    uint64_t *memory[MAX_WORKERS + 1]; /* (slots, BLOCK_TOKENS) */
    struct step *running[MAX_WORKERS];
    struct job *jobs; /* (MAX_JOBS) */
    struct flight *flights;
    int n_flights;
    int (*history)[MAX_TEXT]; /* (MAX_HISTORY) texts that may be asked again */
    int history_length[MAX_HISTORY];
    int64_t n_submitted, next_id;
    int n_hung; /* copies to the host that were never reported */
    bool copies_fail, copies_hang, workers_fail, full_check;
    int least_length;                      /* that texts were limited to at any time */
    int64_t noted[EVENT_COPY + 1], n_left; /* by kind; admitted ones that have ended */
    double now;
    const char *broken;
    char broken_text[256];
};

/* Where a request is, as its user would say it; and what may happen to it there. */
enum where { QUEUED, LOADING, PREFILLING, HANDED_OVER, DECODING, PREEMPTED, PAGING, N_WHERE };
enum what { CANCELLED, DEADLINE, SENT_BACK, FAILURE, RETURN, ROLE, COPY_LOST, COPY_HUNG, N_WHAT };
static const char *const where_names[] = {"queued",   "loading",   "prefilling", "handed over",
                                          "decoding", "preempted", "paging"};
static const char *const what_names[] = {"cancelled",   "deadline",   "sent back", "failed worker",
                                         "worker back", "other role", "copy lost", "copy hung"};

struct totals {
    int64_t happened[N_WHAT][N_WHERE];
    int64_t operations, episodes, refused, cancelled, failed_copies, late;
    int64_t in_step;  /* sent back while a step was under way */
    char broken[256]; /* the rule that was broken last */
    struct kv_stats kv;
    struct sched_stats sched;
};

/* ---- randomness and the model ---- */

static bool is_idle(const struct sched *s) {
    return sched_unfinished(s, NULL, 0) == 0;
}

/* Whether a worker is among those to be woken, all of whom are struck off. */
static bool is_concerned(struct sched *s, int worker) {
    bool found = false;
    for (int w; (w = sched_concerned(s)) >= 0;)
        found = found || w == worker;
    return found;
}

static uint64_t scramble(uint64_t x) {
    x = (x ^ (x >> 31)) * 0x7fb5d329728ea185u;
    x = (x ^ (x >> 27)) * 0x81dadef4bc2dd44du;
    return x ^ (x >> 33);
}

static int below(struct machine *m, int n) {
    m->random += 0x9e3779b97f4a7c15u;
    return (int)(scramble(m->random) % (uint64_t)n);
}

static int between(struct machine *m, int low, int high) {
    return low + below(m, high - low + 1);
}

static uint64_t fingerprint(uint64_t before, int token) {
    return scramble(before * 31 + (uint64_t)token + 7);
}

static int model(uint64_t fingerprint_of_text) {
    int token = (int)(scramble(fingerprint_of_text + 99) % 256);
    return token < VOCABULARY ? token : N_ENDS + token % (VOCABULARY - N_ENDS);
}

static void report(struct machine *m, const char *text) {
    if (!m->broken) {
        (void)snprintf(m->broken_text, sizeof m->broken_text, "%s", text);
        m->broken = m->broken_text;
    }
}

/* Writes the whole text that a job must come to. */
static void foresee(struct machine *m, struct job *job) {
    struct request *r = &job->request;
    int limit = sched_longest(m->s);
    uint64_t print = 0;
    job->n_text = 0;
    job->reason = FINISH_NONE;
    while (job->reason == FINISH_NONE) {
        int n = job->n_text, token = n < r->n_prompt ? r->tokens[n] : model(print);
        if (n >= r->n_prompt && ends_text[token]) {
            job->reason = FINISH_STOP;
            break;
        }
        job->text[n] = token;
        job->chain[n] = print = fingerprint(print, token);
        job->n_text = n + 1;
        if (n >= r->n_prompt && (n + 1 - r->n_prompt >= r->max_new || n + 1 >= limit))
            job->reason = FINISH_LENGTH;
    }
}

/* ---- the ledger ---- */

static void count_event(void *context, const struct event *event) {
    struct machine *m = context;
    enum event_kind kind = event->kind;
    m->noted[kind]++;
    m->n_left += kind == EVENT_FINISHED && event->worker >= 0;
    if (kind == EVENT_ADMITTED && event->from != event->to && /* which may keep it */
        !(m->s->config.prefills[event->from] && m->s->config.decodes[event->to]))
        report(m, "admitted to a worker of another role");
    if ((kind == EVENT_ADMITTED && !(event->why && event->why_prefill)) ||
        ((kind == EVENT_PREEMPTED || kind == EVENT_EVICTED || kind == EVENT_COPY_ORDERED) &&
         !event->why))
        report(m, "a decision without a reason");
}

/* When all is done, as often as the counters say. */
static void check_ledger(struct machine *m) {
    struct sched_stats s = sched_stats(m->s);
    struct kv_stats kv = kv_stats(sched_kv(m->s));
    int64_t copies = kv.pages_out + kv.pages_in + kv.transfers;
    if (m->noted[EVENT_SUBMITTED] != s.submitted || m->noted[EVENT_FINISHED] != s.finished ||
        m->noted[EVENT_ADMITTED] != m->n_left + s.preemptions ||
        m->noted[EVENT_PREEMPTED] != s.preemptions || m->noted[EVENT_HANDED_OVER] != s.hand_overs ||
        m->noted[EVENT_EVICTED] != kv.evictions + kv.host_evictions ||
        (m->noted[EVENT_COPY_ORDERED] != copies && !m->copies_fail && !m->workers_fail))
        report(m, "the ledger differs from the counters");
}

/* ---- the machine ---- */

static uint64_t *row_at(const struct machine *m, int place, int slot, int row) {
    return &m->memory[place][(size_t)slot * BLOCK_TOKENS + (size_t)row];
}

static struct job *job_of(struct machine *m, const struct request *r) {
    for (int i = 0; i < MAX_JOBS; i++)
        if (&m->jobs[i].request == r)
            return &m->jobs[i];
    report(m, "a step with a request that does not exist");
    return &m->jobs[0];
}

static void check_now(struct machine *m) {
    if (m->broken || !(m->full_check || below(m, 8) == 0))
        return;
    const char *broken = kv_check(sched_kv(m->s));
    broken = broken ? broken : sched_check(m->s);
    const struct kv *kv = sched_kv(m->s);
    int in_flight = m->n_flights + m->n_hung;
    for (int i = 0; i <= kv->host; i++)
        in_flight += kv_pending(kv, i);
    for (int i = 0; i < n_slots(kv); i++)
        in_flight -= kv->places[0].copies[i].standing == IN_FLIGHT;
    if (broken || in_flight != 0)
        report(m, broken ? broken : "copies in flight and orders differ");
}

/* Positions [0, n) of a sequence, through its block table. */
static void check_prefix(struct machine *m, int worker, const struct batch *batch,
                         const struct sequence *sequence, const struct job *job, int n) {
    for (int i = 0; i < n; i++) {
        int slot = batch->block_table[sequence->first_block + i / BLOCK_TOKENS];
        if (slot < 0 || slot >= m->config.kv.device_blocks[worker]) {
            report(m, "a slot outside the device");
            return;
        }
        if (*row_at(m, worker, slot, i % BLOCK_TOKENS) != job->chain[i]) {
            report(m, "a step reads what is not its text");
            return;
        }
    }
}

/* The rows of one sequence: computed if `done`, else in the making. */
static void compute(struct machine *m, int worker, struct step *step, int index, bool done) {
    struct batch *batch = &step->batch;
    const struct sequence *sequence = &batch->sequence[index];
    const struct job *job = job_of(m, step->requests[index]);
    int end = sequence->start + sequence->n_rows;
    if (sequence->n_rows < 1 || end > job->n_text || sequence->n_blocks != blocks_of(end)) {
        report(m, "a sequence beyond its text");
        return;
    }
    int n_before = sequence->start; /* rows of an answer in one step see each other */
    if (!done && job->request.filled < n_before)
        n_before = job->request.filled;
    check_prefix(m, worker, batch, sequence, job, n_before);
    for (int i = 0; i < sequence->n_rows; i++) {
        int row = sequence->first_row + i, position = sequence->start + i;
        int slot = batch->block_table[sequence->first_block + position / BLOCK_TOKENS];
        if (batch->token[row] != job->text[position] || batch->position[row] != position ||
            batch->row_sequence[row] != index)
            report(m, "a row of other tokens");
        *row_at(m, worker, slot, position % BLOCK_TOKENS) = done ? job->chain[position] : 1;
    }
    if (done)
        check_prefix(m, worker, batch, sequence, job, end);
}

static void check_step(struct machine *m, int worker, struct step *step) {
    const struct batch *batch = &step->batch;
    int n_generated = 0, n_prompt = 0, n_rows = 0, n_first = 0;
    for (int i = 0; i < batch->n_sequences; i++) {
        const struct sequence *sequence = &batch->sequence[i];
        const struct request *r = step->requests[i];
        bool decodes = r->state == REQUEST_RUNNING;
        n_generated += decodes;
        n_prompt += decodes ? 0 : sequence->n_rows;
        n_first += sequence->generated && n_first == i;
        if (sequence->first_row != n_rows || (sequence->generated && sequence->n_rows != 1))
            report(m, "rows of a sequence");
        if (sequence->generated != (sequence->start >= r->n_prompt) ||
            (sequence->generated && n_first <= i))
            report(m, "rows that were generated are others, or do not come first");
        if ((decodes ? r->decode_worker : r->prefill_worker) != worker)
            report(m, "a sequence on another's worker");
        n_rows += sequence->n_rows;
    }
    if (n_rows != batch->n_rows || n_prompt > m->config.chunk || n_generated > m->config.max_batch)
        report(m, "a step that is too large");
}

static enum where where_is(const struct request *r) {
    bool again = r->preemptions > 0;
    switch (r->state) {
    case REQUEST_WAITING: return again ? PREEMPTED : QUEUED;
    case REQUEST_LOADING: return again ? PAGING : LOADING;
    case REQUEST_PREFILL: return PREFILLING;
    case REQUEST_HAND_OVER: return HANDED_OVER;
    default: return DECODING;
    }
}

static bool is_alive(const struct job *job) {
    return job->live && job->request.state != REQUEST_FINISHED;
}

/* Whether a node is in a request's table, or waited for as it was preempted in it. */
static bool waits_for(struct machine *m, const struct job *job, int node) {
    const struct request *r = &job->request;
    bool found = is_alive(job) && r->saved == node;
    for (int i = 0; i < r->n_blocks && is_alive(job) && m->s; i++)
        found = found || r->blocks[i] == node;
    return found;
}

/* Counts what happens to each request that is on a worker (-1: on any), or waits. */
static void happens(struct machine *m, enum what what, int worker, struct totals *totals) {
    for (int i = 0; i < MAX_JOBS; i++) {
        const struct request *r = &m->jobs[i].request;
        bool there = is_alive(&m->jobs[i]) &&
                     (worker < 0 || r->state == REQUEST_WAITING || worker_of(r) == worker);
        totals->happened[what][where_is(r)] += there;
    }
}

static void start_copy(struct machine *m, const struct kv_copy_order *order) {
    if (m->n_flights == MAX_FLIGHTS) {
        report(m, "too many copies in flight");
        return;
    }
    struct flight *flight = &m->flights[m->n_flights++];
    bool hangs = m->copies_hang && below(m, 30) == 0;
    *flight = (struct flight){.order = *order, .hangs = hangs ? m->now + HANG_SECONDS : 0};
    memcpy(flight->before, row_at(m, order->from, order->from_slot, 0), sizeof flight->before);
    for (int i = 0; i < BLOCK_TOKENS; i++)
        *row_at(m, order->to, order->to_slot, i) = 2;
}

/* Ends a copy, unless it hangs. Its source must have stayed as it was, its target must be
 * untouched. */
static void end_copy(struct machine *m, int index, struct totals *totals) {
    struct flight flight = m->flights[index];
    const struct kv_copy_order *order = &flight.order;
    if (flight.hangs > 0)
        return;
    m->flights[index] = m->flights[--m->n_flights];
    uint64_t *source = row_at(m, order->from, order->from_slot, 0);
    uint64_t *target = row_at(m, order->to, order->to_slot, 0);
    if (flight.is_void) { /* reported as if nothing had happened */
        sched_copied(m->s, order, below(m, 2), m->now);
        check_now(m);
        return;
    }
    if (memcmp(source, flight.before, sizeof flight.before) != 0)
        report(m, "the source of a copy has changed before its end");
    for (int i = 0; i < BLOCK_TOKENS; i++)
        if (target[i] != 2)
            report(m, "the target of a copy was written meanwhile");
    bool ok = !m->copies_fail || below(m, 10) != 0;
    if (ok)
        memcpy(target, source, sizeof flight.before);
    totals->failed_copies += !ok;
    for (int i = 0; i < MAX_JOBS && !ok; i++)
        if (waits_for(m, &m->jobs[i], order->node))
            totals->happened[COPY_LOST][where_is(&m->jobs[i].request)]++;
    sched_copied(m->s, order, ok, m->now);
    check_now(m);
}

static bool start_copies(struct machine *m, int worker) {
    struct kv_copy_order orders[8];
    int n, all = 0;
    while ((n = sched_copies(m->s, worker, orders, 1 + below(m, 8))) > 0 && !m->broken)
        for (int i = 0; i < n; i++, all++)
            start_copy(m, &orders[i]);
    return all > 0;
}

static bool start_step(struct machine *m, int worker) {
    struct step *step = sched_next(m->s, worker, m->now);
    bool copies = start_copies(m, worker);
    check_now(m);
    if (!step)
        return copies;
    check_step(m, worker, step);
    for (int i = 0; i < step->batch.n_sequences && !m->broken; i++)
        compute(m, worker, step, i, false);
    m->running[worker] = step;
    return true;
}

static void end_step(struct machine *m, int worker) {
    struct step *step = m->running[worker];
    struct batch *batch = &step->batch;
    bool is_void = sched_is_lost(m->s, worker);
    for (int i = 0, sample = 0; i < batch->n_sequences && !m->broken && !is_void; i++) {
        compute(m, worker, step, i, true);
        const struct job *job = job_of(m, step->requests[i]);
        int end = batch->sequence[i].start + batch->sequence[i].n_rows;
        if (end != job->request.length)
            continue;
        if (sample >= batch->n_samples ||
            batch->sampling[sample].seed != job->request.sampling.seed ||
            batch->sample_row[sample] !=
                batch->sequence[i].first_row + batch->sequence[i].n_rows - 1) {
            report(m, "a row that should be sampled is not");
            return;
        }
        batch->sampled[sample++] = model(job->chain[end - 1]);
    }
    m->running[worker] = NULL;
    if (!m->broken) {
        sched_done(m->s, worker, step, m->now);
        check_now(m);
    }
}

/* ---- requests ---- */

/* A prompt that begins like an earlier text, whole or in part, and goes on at random. */
static int make_prompt(struct machine *m, int *tokens) {
    int n = 0, limit = max(sched_max_length(m->s), 1);
    int known = m->n_submitted < MAX_HISTORY ? (int)m->n_submitted : MAX_HISTORY;
    if (below(m, 100) == 0)
        return 0;
    int wanted = below(m, 50) == 0 ? limit + below(m, 20) : 1 + below(m, limit);
    wanted = below(m, 3) ? 1 + below(m, wanted) : wanted;
    if (known > 0 && below(m, 4)) {
        int past = below(m, below(m, 2) ? known : (known < 4 ? known : 4));
        int i = (int)((m->n_submitted - 1 - past) % MAX_HISTORY);
        int length = m->history_length[i];
        n = below(m, 2) ? length : below(m, length + 1);
        memcpy(tokens, m->history[i], (size_t)n * sizeof *tokens);
        wanted = below(m, 3) ? n + below(m, 20) : wanted;
    }
    wanted = wanted > limit + 20 ? limit + 20 : wanted;
    wanted = wanted < 1 ? 1 : wanted;
    for (; n < wanted; n++)
        tokens[n] = N_ENDS + below(m, VOCABULARY - N_ENDS);
    return n < limit + 20 ? n : limit + 20;
}

static void submit(struct machine *m) {
    struct job *job = NULL;
    for (int i = 0; i < MAX_JOBS && !job; i++)
        job = m->jobs[i].live ? NULL : &m->jobs[i];
    if (!job)
        return;
    *job = (struct job){.live = true};
    struct request *r = &job->request;
    r->tokens = job->tokens;
    r->id = m->next_id++;
    r->n_prompt = make_prompt(m, job->tokens);
    r->max_new = below(m, 4) ? 1 + below(m, 120) : 1 + below(m, 4);
    r->sampling.seed = (uint64_t)r->id;
    r->deadline = below(m, 12) ? 0 : 0.001 * below(m, 400);
    if (r->n_prompt >= 1 && r->n_prompt <= sched_max_length(m->s)) {
        foresee(m, job);
        int i = (int)(m->n_submitted++ % MAX_HISTORY);
        memcpy(m->history[i], job->text, (size_t)job->n_text * sizeof(int));
        m->history_length[i] = job->n_text;
    } else {
        job->reason = FINISH_ERROR;
    }
    sched_submit(m->s, r, m->now);
    check_now(m);
}

static void cancel(struct machine *m, struct totals *totals) {
    struct job *job = &m->jobs[below(m, MAX_JOBS)];
    if (is_alive(job) && !job->cancelled) {
        totals->happened[CANCELLED][where_is(&job->request)]++;
        job->stopped = below(m, 2);
        job->cancelled = true;
        sched_cancel(m->s, &job->request, job->stopped, m->now);
        check_now(m);
    }
}

/* Any admitted request, in any state, may have to go back into the queue. */
static void withdraw_one(struct machine *m, struct totals *totals) {
    struct request *r = NULL;
    for (int n = 0, first = below(m, MAX_JOBS); n < MAX_JOBS && !r; n++) {
        struct job *job = &m->jobs[(first + n) % MAX_JOBS];
        enum request_state state = job->request.state;
        bool admitted = state != REQUEST_WAITING && state != REQUEST_FINISHED;
        r = job->live && admitted ? &job->request : NULL;
    }
    if (!r)
        return;
    totals->happened[SENT_BACK][where_is(r)]++;
    totals->in_step += r->in_step;
    send_back(m->s, r, "a test", m->now);
    admit_waiting(m->s, m->now);
    check_now(m);
}

static void fail_worker(struct machine *m, int worker, struct totals *totals);

/* A copy that does not end takes its worker out. If it goes to the host nobody may ever know where
 * it has come to; else, as if the memory were taken away, it has ended. */
static void find_hung_copies(struct machine *m, struct totals *totals) {
    for (int i = 0; i < m->n_flights && !m->broken; i++) {
        struct flight *flight = &m->flights[i];
        if (flight->hangs == 0 || flight->hangs > m->now)
            continue;
        flight->hangs = 0;
        int worker = flight->order.worker;
        if (flight->order.to == m->config.kv.n_workers && below(m, 4) > 0) {
            m->flights[i--] = m->flights[--m->n_flights];
            m->n_hung++;
        }
        if (sched_is_lost(m->s, worker))
            continue;
        happens(m, COPY_HUNG, worker, totals);
        fail_worker(m, worker, totals);
    }
}

static void pass_time(struct machine *m, struct totals *totals) {
    find_hung_copies(m, totals);
    if (sched_next_event(m->s) > m->now)
        return;
    for (int i = 0; i < MAX_JOBS; i++) {
        const struct request *r = &m->jobs[i].request;
        if (is_alive(&m->jobs[i]) && r->deadline > 0 && r->submitted + r->deadline <= m->now)
            totals->happened[DEADLINE][where_is(r)]++;
    }
    sched_expire(m->s, m->now);
    check_now(m);
}

/* ---- workers fail, return, and change their roles ---- */

static void note_length(struct machine *m) {
    int length = sched_max_length(m->s);
    m->least_length = length < m->least_length ? length : m->least_length;
    check_now(m);
}

static void fail_worker(struct machine *m, int worker, struct totals *totals) {
    for (int i = 0; i < m->n_flights; i++) {
        const struct kv_copy_order *order = &m->flights[i].order;
        m->flights[i].is_void |= order->from == worker || order->to == worker;
    }
    memset(m->memory[worker], 0xee,
           (size_t)m->config.kv.device_blocks[worker] * BLOCK_TOKENS * sizeof(uint64_t));
    happens(m, FAILURE, worker, totals);
    sched_fail(m->s, worker, m->now);
    note_length(m);
}

static void change_worker(struct machine *m, int worker, struct totals *totals) {
    if (!sched_is_lost(m->s, worker)) {
        if (below(m, 3) == 0) {
            fail_worker(m, worker, totals);
            return;
        }
        happens(m, ROLE, worker, totals); /* or it drains, to do nothing */
        sched_set_role(m->s, worker, below(m, 2), below(m, 2), m->now);
        note_length(m);
        return;
    }
    if (m->running[worker] && below(m, 2))
        end_step(m, worker);
    bool can = !m->running[worker] && kv_used(sched_kv(m->s), worker) == 0;
    if (sched_return(m->s, worker, m->now) != can)
        report(m, "a worker is back too early, or is not");
    if (can)
        happens(m, RETURN, -1, totals);
    note_length(m);
}

/* Whether a request that should have been answered has ended with an error that it may have. */
static bool is_excused(struct machine *m, const struct request *r, struct totals *totals) {
    static const char deadline[] = "its deadline";
    if (r->reason != FINISH_ERROR)
        return false;
    bool full = strstr(r->error, "the queue is full") && m->config.max_queue > 0;
    bool expired = strstr(r->error, deadline) && r->submitted + r->deadline <= m->now;
    bool nowhere = strstr(r->error, "all workers have failed") ||
                   (strstr(r->error, "holds so long a text") && r->length >= m->least_length &&
                    m->least_length < sched_longest(m->s));
    totals->late += expired;
    totals->refused += full;
    if (full && (r->length > r->n_prompt || r->admitted > 0))
        report(m, "a request that was admitted was refused");
    return full || (expired && r->deadline > 0) || (m->workers_fail && nowhere);
}

/* Checks the answers of the requests that have ended, and makes room for others. */
static int collect(struct machine *m, struct totals *totals) {
    int n_live = 0;
    for (int i = 0; i < MAX_JOBS; i++) {
        struct job *job = &m->jobs[i];
        const struct request *r = &job->request;
        if (!job->live || r->state != REQUEST_FINISHED) {
            n_live += job->live;
            continue;
        }
        job->live = false;
        totals->cancelled += job->cancelled;
        if (job->reason == FINISH_ERROR) {
            totals->refused++;
            if (r->reason != FINISH_ERROR || !r->error[0] || r->length != r->n_prompt)
                report(m, "a prompt that cannot run was not refused");
            continue;
        }
        if (memcmp(r->tokens, job->text, (size_t)r->length * sizeof(int)) != 0)
            report(m, "the wrong answer");
        if (is_excused(m, r, totals))
            continue;
        if (job->cancelled && r->reason != (job->stopped ? FINISH_STOP : FINISH_CANCELLED))
            report(m, "a cancelled request ended otherwise");
        if (!job->cancelled && (r->reason != job->reason || r->length != job->n_text))
            report(m, "an answer that ends too early, or for the wrong reason");
    }
    return n_live;
}

/* ---- episodes ---- */

static void choose_config(struct machine *m) {
    struct sched_config *config = &m->config;
    static const int hosts[] = {0, 0, 1, 2, 4, 16, 64, 256};
    *config = (struct sched_config){.max_batch = below(m, 3) ? 1 + below(m, 8) : 32,
                                    .chunk = below(m, 2) ? 1 + below(m, 64) : 16,
                                    .copies_in_flight = below(m, 2) ? 1 + below(m, 8) : 64,
                                    .likely_answer = below(m, 2),
                                    .context_length = 8 + below(m, 500),
                                    .ends_text = ends_text};
    config->kv.n_workers = between(m, 1, 4);
    config->kv.host_blocks = hosts[below(m, 8)];
    config->kv.policy = below(m, 3) ? KV_ON_EVICT : KV_WRITE_THROUGH;
    config->kv.order = (enum kv_order)below(m, 4);
    int size = below(m, 3) ? between(m, 1, 12) : between(m, 1, 40);
    bool any_prefills = false, any_decodes = false;
    bool colocated = below(m, 4) == 0;
    for (int w = 0; w < config->kv.n_workers; w++) {
        config->kv.device_blocks[w] = below(m, 2) ? size : between(m, 1, 40);
        int role = colocated ? 2 : below(m, 5);
        config->prefills[w] = role == 0 || role >= 3 ? w % 2 == 0 : role == 2;
        config->decodes[w] = !config->prefills[w] || role == 2;
        any_prefills |= config->prefills[w];
        any_decodes |= config->decodes[w];
    }
    config->prefills[0] |= !any_prefills;
    config->decodes[config->kv.n_workers - 1] |= !any_decodes;
    m->copies_fail = below(m, 6) == 0;
    m->workers_fail = below(m, 3) == 0;
    m->copies_hang = m->workers_fail && below(m, 2);
    config->max_queue = below(m, 6) ? 0 : 1 + below(m, 16);
    m->full_check = below(m, 4) == 0;
    config->kv.ledger = (struct ledger){count_event, m};
}

/* What the machine looks like when it has failed. */
static void print_machine(const struct machine *m) {
    const struct sched_config *config = &m->config;
    printf("    %d workers:", config->kv.n_workers);
    for (int w = 0; w < config->kv.n_workers; w++) {
        printf(" %s%s%d", config->prefills[w] ? "p" : "", config->decodes[w] ? "d" : "",
               config->kv.device_blocks[w]);
    }
    printf(", host %d, %s, max_batch %d, chunk %d, context %d%s\n", config->kv.host_blocks,
           config->kv.policy == KV_ON_EVICT ? "on-evict" : "write-through", config->max_batch,
           config->chunk, config->context_length, m->copies_fail ? ", copies fail" : "");
    for (int i = 0; i < MAX_JOBS; i++) {
        const struct request *r = &m->jobs[i].request;
        if (m->jobs[i].live) {
            printf(
                "    request %d: state %d, workers %d %d, filled %d of %d, %d blocks, %d ready%s\n",
                (int)r->id, (int)r->state, r->prefill_worker, r->decode_worker, r->filled,
                r->length, r->n_blocks, r->n_slots, r->in_step ? ", in a step" : "");
        }
    }
    for (int place = 0; place <= m->s->kv->host; place++) {
        struct kv_usage usage = kv_usage(m->s->kv, place);
        printf("    place %d: %d free, %d pinned, %d cached, %d in flight, %d orders\n", place,
               usage.free, usage.pinned, usage.cached, usage.in_flight,
               kv_pending(m->s->kv, place));
    }
}

static void operate(struct machine *m, const int *weights, struct totals *totals) {
    int worker = below(m, m->config.kv.n_workers);
    int choice =
        below(m, weights[0] + weights[1] + weights[2] + weights[3] + weights[4] + weights[5]);
    m->now += 0.001;
    if ((choice -= weights[0]) < 0) {
        submit(m);
    } else if ((choice -= weights[1]) < 0) {
        if (m->running[worker])
            end_step(m, worker);
        else
            (void)start_step(m, worker);
    } else if ((choice -= weights[2]) < 0) {
        if (m->n_flights > 0)
            end_copy(m, below(m, m->n_flights), totals);
    } else if ((choice -= weights[3]) < 0) {
        cancel(m, totals);
    } else if ((choice -= weights[4]) < 0) {
        withdraw_one(m, totals);
    } else {
        change_worker(m, worker, totals);
    }
    pass_time(m, totals);
    (void)collect(m, totals);
}

/* Those who are concerned by what happened, or have a step in hand or something to copy. */
static void wake_concerned(struct machine *m, bool *awake) {
    for (int w = 0; w < m->config.kv.n_workers; w++)
        awake[w] = awake[w] || m->running[w] || kv_pending(m->s->kv, w) > 0;
    for (int w; (w = sched_concerned(m->s)) >= 0;)
        awake[w] = true;
}

/* Asks one worker; true: it had something to do. */
static bool drive_worker(struct machine *m, int worker, bool *awake, struct totals *totals) {
    bool active = m->running[worker] || start_step(m, worker);
    awake[worker] = active;
    if (m->running[worker] && below(m, 4)) {
        end_step(m, worker);
        awake[worker] = true;
    }
    while (m->n_flights > 0 && !m->broken && below(m, 8))
        end_copy(m, below(m, m->n_flights), totals);
    wake_concerned(m, awake);
    return active || m->n_flights > 0;
}

/* Drives everything to its end, as a thread per worker does it: one that had nothing to do sleeps
 * until it is concerned by what another call did. */
static void drain(struct machine *m, struct totals *totals) {
    bool active = true, awake[MAX_WORKERS];
    int round = 0, quiet_since = 0, first = below(m, m->config.kv.n_workers);
    memset(awake, true, sizeof awake);
    (void)is_concerned(m->s, 0);
    while (active && !m->broken) {
        active = false;
        m->now += 0.001;
        pass_time(m, totals);
        wake_concerned(m, awake);
        for (int i = 0; i < m->config.kv.n_workers && !m->broken; i++) {
            int w = (first + i) % m->config.kv.n_workers;
            active = (awake[w] && drive_worker(m, w, awake, totals)) || active;
        }
        for (int w = 0; w < m->config.kv.n_workers; w++)
            active = active || awake[w];
        while (!active && m->n_flights > 0 && !m->broken) {
            end_copy(m, below(m, m->n_flights), totals);
            wake_concerned(m, awake);
            active = true;
        }
        int n_live = collect(m, totals);
        quiet_since = n_live > 0 ? round : quiet_since;
        if (++round > MAX_ROUNDS || round - quiet_since > 500)
            report(m, n_live > 0 ? "requests that never end" : "copies that never end");
        if (!active && n_live > 0)
            report(m, "requests wait for nothing");
    }
    for (int w = 0; w < m->config.kv.n_workers && !m->broken; w++)
        if (m->running[w]) /* of one that has failed */
            end_step(m, w);
    struct kv *kv = sched_kv(m->s);
    if (!m->broken && (!is_idle(m->s) || kv_pins(kv) != 0))
        report(m, "something is in use after the end");
    for (int place = 0; place <= kv->host && !m->broken; place++) {
        bool sources = m->n_hung > 0 && place < kv->host && sched_is_lost(m->s, place);
        int n_hung = place == kv->host ? m->n_hung : 0;
        if ((kv_used(kv, place) != kv_usage(kv, place).cached + n_hung && !sources) ||
            kv_pending(kv, place) > 0)
            report(m, "slots in use after the end");
    }
    if (!m->broken)
        check_ledger(m);
}

static bool machine_create(struct machine *m) {
    m->s = sched_create(&m->config);
    for (int i = 0; i <= m->config.kv.n_workers; i++) {
        int n =
            i < m->config.kv.n_workers ? m->config.kv.device_blocks[i] : m->config.kv.host_blocks;
        m->memory[i] = calloc((size_t)n * BLOCK_TOKENS + 1, sizeof(uint64_t));
    }
    m->jobs = calloc(MAX_JOBS, sizeof *m->jobs);
    m->flights = calloc(MAX_FLIGHTS, sizeof *m->flights);
    m->history = calloc(MAX_HISTORY, sizeof *m->history);
    return m->s != NULL;
}

static void machine_destroy(struct machine *m) {
    for (int i = 0; i < MAX_JOBS; i++)
        free(m->broken && m->jobs[i].live ? m->jobs[i].request.hashes : NULL);
    for (int i = 0; i <= m->config.kv.n_workers; i++)
        free(m->memory[i]);
    free(m->jobs);
    free(m->flights);
    free(m->history);
    sched_destroy(m->s);
}

static void add_totals(const struct machine *m, struct totals *totals) {
    struct kv_stats kv = kv_stats(sched_kv(m->s));
    struct sched_stats sched = sched_stats(m->s);
    totals->kv.pages_out += kv.pages_out;
    totals->kv.pages_in += kv.pages_in;
    totals->kv.transfers += kv.transfers;
    totals->kv.evictions += kv.evictions;
    totals->kv.host_evictions += kv.host_evictions;
    totals->kv.lost += kv.lost;
    totals->sched.submitted += sched.submitted;
    totals->sched.finished += sched.finished;
    totals->sched.preemptions += sched.preemptions;
    totals->sched.hand_overs += sched.hand_overs;
    totals->sched.prefix_hit_tokens += sched.prefix_hit_tokens;
    totals->sched.recomputed_tokens += sched.recomputed_tokens;
    totals->sched.local_prefills += sched.local_prefills;
    totals->sched.decode_tokens += sched.decode_tokens;
    totals->episodes++;
}

static bool run_episode(uint64_t seed, struct totals *totals) {
    struct machine m = {.random = scramble(seed)};
    choose_config(&m);
    if (!machine_create(&m))
        return false;
    int weights[] = {1 + below(&m, 8), 20 + below(&m, 40), 1 + below(&m, 40),
                     below(&m, 3),     below(&m, 3),       m.workers_fail ? 1 + below(&m, 3) : 0};
    m.least_length = sched_max_length(m.s);
    int operation = 0;
    for (; operation < EPISODE && !m.broken; operation++)
        operate(&m, weights, totals);
    totals->operations += operation;
    drain(&m, totals);
    add_totals(&m, totals);
    if (m.broken) {
        printf("    seed %llu, operation %d: %s\n", (unsigned long long)seed, operation, m.broken);
        print_machine(&m);
    }
    bool ok = !m.broken;
    (void)snprintf(totals->broken, sizeof totals->broken, "%s", m.broken_text);
    machine_destroy(&m);
    return ok;
}

/* Everything has happened to requests everywhere, where it can; during a hand-over, which is short,
 * where a million operations were run (see also each_state_meets_each_event). */
static void check_events(struct check *check, const struct totals *totals) {
    for (int what = 0; what < N_WHAT; what++) {
        printf("    %s:", what_names[what]);
        for (int where = 0; where < N_WHERE; where++) {
            bool waits = where == QUEUED || where == PREEMPTED;
            bool rare = where == HANDED_OVER && totals->operations < 1000000;
            bool can = !rare && (!waits || (what != SENT_BACK && what != COPY_LOST));
            int64_t n = totals->happened[what][where];
            printf(" %lld %s", (long long)n, where_names[where]);
            CHECK(!can || n > 0, "%s: never while %s", what_names[what], where_names[where]);
        }
        printf("\n");
    }
}

static void run_random(struct check *check, uint64_t seed, int64_t n_operations) {
    struct totals totals = {0};
    printf("    from seed %llu\n", (unsigned long long)seed);
    for (int n_failed = 0; totals.operations < n_operations && n_failed < 10;) {
        bool ok = run_episode(seed, &totals);
        CHECK(ok, "seed %llu: %s", (unsigned long long)seed, totals.broken);
        n_failed += !ok;
        seed++;
    }
    const struct {
        const char *name;
        int64_t count;
    } counts[] = {{"pages out", totals.kv.pages_out},
                  {"pages in", totals.kv.pages_in},
                  {"transfers", totals.kv.transfers},
                  {"evictions", totals.kv.evictions},
                  {"host evictions", totals.kv.host_evictions},
                  {"blocks lost", totals.kv.lost},
                  {"preemptions", totals.sched.preemptions},
                  {"hand-overs", totals.sched.hand_overs},
                  {"prefix hit tokens", totals.sched.prefix_hit_tokens},
                  {"recomputed tokens", totals.sched.recomputed_tokens},
                  {"local prefills", totals.sched.local_prefills},
                  {"failed copies", totals.failed_copies},
                  {"deadlines", totals.late},
                  {"sent back in mid-step", totals.in_step}};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++)
        printf("    %lld %s%s\n", (long long)counts[i].count, counts[i].name,
               counts[i].count < 100 ? " (coverage: few)" : "");
    CHECK(totals.sched.submitted == totals.sched.finished, "requests are left");
    check_events(check, &totals);
    printf("    %lld operations, %lld requests (%lld cancelled, %lld refused), %lld "
           "tokens\n",
           (long long)totals.operations, (long long)totals.sched.submitted,
           (long long)totals.cancelled, (long long)totals.refused,
           (long long)totals.sched.decode_tokens);
}

static void random_operations(struct check *check) {
    struct totals found = {0}; /* a block is registered twice, of which a void copy has not ended */
    CHECK(run_episode(1003938, &found), "seed 1003938: %s", found.broken);
    /* a larger worker is back as an answer is handed over that fills its own */
    CHECK(run_episode(1010847, &found), "seed 1010847: %s", found.broken);
    run_random(check, 460, 100000); /* what happens least of all is among the next 125 */
}

/* ---- directed tests ---- */

enum { ANSWER = 7 }; /* the token that is always sampled there */

/* roles: of each worker p (prefills), d (decodes) or b (both). */
static struct sched_config config_of(const char *roles, const int *blocks, int host_blocks,
                                     int max_batch, int chunk) {
    struct sched_config config = {
        .kv = {.n_workers = (int)strlen(roles), .host_blocks = host_blocks},
        .max_batch = max_batch,
        .chunk = chunk,
        .copies_in_flight = 64,
        .likely_answer = 1,
        .context_length = 4096,
        .ends_text = ends_text};
    for (int i = 0; roles[i]; i++) {
        config.kv.device_blocks[i] = blocks[i];
        config.prefills[i] = roles[i] != 'd';
        config.decodes[i] = roles[i] != 'p';
    }
    return config;
}

static struct sched *open_workers(const char *roles, const int *blocks, int chunk) {
    struct sched_config config = config_of(roles, blocks, 0, 64, chunk);
    return sched_create(&config);
}

static struct sched *open_pools(int prefill_blocks, int decode_blocks, int max_batch, int chunk) {
    int blocks[] = {prefill_blocks, decode_blocks};
    struct sched_config config = config_of("pd", blocks, 0, max_batch, chunk);
    return sched_create(&config);
}

static struct sched *open_one(int device_blocks, int host_blocks, int max_batch) {
    struct sched_config config = config_of("b", &device_blocks, host_blocks, max_batch, 64);
    return sched_create(&config);
}

/* Submits a prompt whose first n_shared tokens are another's, and the rest of its own. */
static void ask_after(struct sched *s, struct job *job, int id, int n_prompt, int max_new,
                      const int *shared, int n_shared) {
    *job = (struct job){.request = {.id = id, .n_prompt = n_prompt, .max_new = max_new}};
    job->request.tokens = job->tokens;
    for (int i = 0; i < n_prompt; i++)
        job->tokens[i] = i < n_shared        ? shared[i]
                         : i == n_shared     ? 2 + id % 62
                         : i == n_shared + 1 ? 2 + id / 62
                                             : 2 + i % 50;
    sched_submit(s, &job->request, 0);
}

/* Submits a prompt of its own text. */
static void ask(struct sched *s, struct job *job, int id, int n_prompt, int max_new) {
    ask_after(s, job, id, n_prompt, max_new, NULL, 0);
}

/* One step of a worker with its copies. Returns how many rows it had; -1: none, and no copies. */
static int step_once(struct sched *s, int worker) {
    struct step *step = sched_next(s, worker, 0);
    struct kv_copy_order orders[64];
    int n_copies = sched_copies(s, worker, orders, 64);
    for (int i = 0; i < n_copies; i++)
        sched_copied(s, &orders[i], true, 0);
    if (!step)
        return n_copies > 0 ? 0 : -1;
    for (int i = 0; i < step->batch.n_samples; i++)
        step->batch.sampled[i] = ANSWER;
    sched_done(s, worker, step, 0);
    return step->batch.n_rows;
}

/* The walk at the top of dynamo.h. */
static void one_request(struct check *check) {
    struct sched *s = open_pools(4, 4, 4, 64);
    struct kv *kv = sched_kv(s);
    static struct job job;
    const struct request *r = &job.request;
    ask(s, &job, 0, 20, 13);
    CHECK(r->state == REQUEST_LOADING && is_concerned(s, 0), "worker 0 has something to do");
    CHECK(!sched_next(s, 1, 0), "the decode worker has nothing");
    struct step *step = sched_next(s, 0, 0);
    CHECK(step && step->batch.n_rows == 20, "20 rows");
    CHECK(step->batch.block_table[0] == 0 && step->batch.block_table[1] == 1, "the table");
    CHECK(step->batch.n_samples == 1 && step->batch.sample_row[0] == 19, "the sample");
    CHECK(!step->batch.sequence[0].generated && step->batch.sequence[0].start == 0, "a prompt");
    CHECK(r->state == REQUEST_PREFILL && kv_used(kv, 0) == 2 && kv_used(kv, 1) == 2, "reserved");
    CHECK(!sched_next(s, 1, 0), "nothing to copy yet");
    step->batch.sampled[0] = ANSWER;
    sched_done(s, 0, step, 1);
    CHECK(r->state == REQUEST_HAND_OVER && r->length == 21 && r->filled == 20, "handed over");
    CHECK(kv_pending(kv, 1) == 2, "both blocks are sent");
    CHECK(r->first_token == 1, "the time of the first token");
    struct kv_copy_order orders[3];
    CHECK(!sched_next(s, 1, 2) && sched_copies(s, 1, orders, 3) == 2, "two orders");
    for (int i = 0; i < 2; i++) {
        CHECK(orders[i].from == 0 && orders[i].to == 1 && orders[i].worker == 1, "order %d", i);
        CHECK(orders[i].from_slot == i && orders[i].to_slot == i, "slots of order %d", i);
    }
    sched_copied(s, &orders[1], true, 2);
    CHECK(!sched_next(s, 1, 2) && kv_used(kv, 0) == 1, "A is on its way, B's source is free");
    sched_copied(s, &orders[0], true, 2);
    step = sched_next(s, 1, 3);
    CHECK(step && step->batch.n_rows == 1 && r->state == REQUEST_RUNNING, "it runs");
    CHECK(step->batch.token[0] == ANSWER && step->batch.position[0] == 20, "the row");
    CHECK(step->batch.sequence[0].generated && step->batch.sequence[0].n_blocks == 2, "decode");
    step->batch.sampled[0] = ANSWER;
    sched_done(s, 1, step, 3);
    for (int i = 0; i < 11; i++)
        CHECK(r->state == REQUEST_RUNNING && step_once(s, 1) == 1, "token %d", i);
    CHECK(r->state == REQUEST_FINISHED && r->reason == FINISH_LENGTH && r->length == 33, "the end");
    uint64_t hashes[2] = {kv_hash(0, r->tokens)};
    hashes[1] = kv_hash(hashes[0], r->tokens + BLOCK_TOKENS);
    int nodes[2];
    CHECK(kv_find(kv, hashes, r->tokens, 2, nodes) == 2 && kv_used(kv, 1) == 2, "both are cached");
    CHECK(kv_pins(kv) == 0 && is_idle(s) && !sched_next(s, 0, 4) && !sched_next(s, 1, 4), "idle");
    CHECK(kv_make_room(kv, 1, 3) && kv_state(kv, nodes[0], 1) == KV_VALID, "B goes first");
    CHECK(sched_stats(s).hand_overs == 1 && kv_stats(kv).transfers == 2, "counters");
    sched_destroy(s);
}

static void refusals(struct check *check) {
    struct sched *s = open_one(4, 0, 4);
    static struct job job;
    static const struct {
        int n_prompt;
        const char *text;
    } cases[] = {{0, "empty"}, {65, "--kv-device"}, {65, "5 KV blocks, a device holds 4"}};
    for (int i = 0; i < 3; i++) {
        ask(s, &job, i, cases[i].n_prompt, 1);
        CHECK(job.request.state == REQUEST_FINISHED && job.request.reason == FINISH_ERROR, "%d", i);
        CHECK(strstr(job.request.error, cases[i].text), "%s", job.request.error);
    }
    static const int answers[] = {10, INT_MAX}; /* of any length: cut at what there is room for */
    for (int i = 0; i < 2; i++) {
        ask(s, &job, 3 + i, 64, answers[i]);
        CHECK(step_once(s, 0) > 0 && job.request.reason == FINISH_LENGTH, "as long as the device");
        CHECK(job.request.length == 65 && is_idle(s), "one token");
    }
    sched_destroy(s);
}

static void cancel_in_mid_step(struct check *check) {
    struct sched *s = open_one(8, 0, 4);
    static struct job jobs[2];
    ask(s, &jobs[0], 0, 20, 9);
    ask(s, &jobs[1], 1, 20, 9);
    struct step *step = sched_next(s, 0, 0);
    CHECK(step->batch.n_sequences == 2, "two sequences");
    sched_cancel(s, &jobs[0].request, false, 0);
    sched_cancel(s, &jobs[1].request, true, 0);
    CHECK(jobs[0].request.state == REQUEST_PREFILL && kv_used(sched_kv(s), 0) == 4, "too early");
    sched_done(s, 0, step, 0);
    CHECK(jobs[0].request.reason == FINISH_CANCELLED, "cancelled");
    CHECK(jobs[1].request.reason == FINISH_STOP && jobs[1].request.length == 20, "stopped");
    CHECK(is_idle(s) && kv_used(sched_kv(s), 0) == 2, "what was computed stays cached");
    sched_destroy(s);
}

static void youngest_is_preempted(struct check *check) {
    static const int hosts[] = {0, 4, 32}; /* none, too small for all, large enough */
    for (int host = 0; host < 3; host++) {
        struct sched *s = open_one(8, hosts[host], 4);
        static struct job jobs[4];
        for (int i = 0; i < 4; i++)
            ask(s, &jobs[i], i, 10, 100);
        int n_steps = 0, first_end = 4, last_preempted = 4;
        for (; !is_idle(s) && n_steps < 2000; n_steps++) {
            (void)step_once(s, 0);
            for (int i = 0; i < 4; i++) {
                bool ended = jobs[i].request.state == REQUEST_FINISHED;
                if (jobs[i].request.preemptions > 0 && i < last_preempted) {
                    CHECK(i == last_preempted - 1, "request %d before younger ones", i);
                    last_preempted = i;
                }
                first_end = ended && i < first_end ? i : first_end;
                CHECK(!ended || first_end == 0, "request %d ended before the oldest", i);
            }
        }
        CHECK(is_idle(s), "they never end");
        CHECK(jobs[0].request.preemptions == 0, "the oldest was preempted");
        CHECK(sched_stats(s).preemptions >= 3 && jobs[3].request.preemptions > 0, "no preemption");
        CHECK((kv_stats(sched_kv(s)).pages_in > 0) == (host > 0), "pages in");
        CHECK((sched_stats(s).recomputed_tokens == 0) == (host == 2), "%d recomputed",
              (int)sched_stats(s).recomputed_tokens);
        sched_destroy(s);
    }
}

/* Younger requests pass one that does not fit, but not for ever. */
static void passed_by_a_few(struct check *check) {
    struct sched *s = open_one(6, 0, 4);
    static struct job jobs[40];
    ask(s, &jobs[0], 0, 40, 30); /* 3 blocks, 5 in the end */
    CHECK(step_once(s, 0) == 40, "the first");
    ask(s, &jobs[1], 1, 70, 5); /* 5 blocks */
    for (int i = 2; i < 40; i++)
        ask(s, &jobs[i], i, 3, 1);
    int n_before = 0;
    while (jobs[1].request.state == REQUEST_WAITING && step_once(s, 0) > 0) {
        n_before = 0;
        for (int i = 2; i < 40; i++)
            n_before += jobs[i].request.state == REQUEST_FINISHED;
    }
    CHECK(n_before == MAX_PASSED, "%d have passed it", n_before);
    while (!is_idle(s))
        CHECK(step_once(s, 0) >= 0, "stuck");
    sched_destroy(s);
}

static void run_all(struct check *check, struct sched *s);

/* Answers that are preempted again and again come back first, but they let new requests pass a
 * large one no more often than it may be passed. */
static void passed_by_a_few_of_preempted(struct check *check) {
    enum { SMALL = 120 };
    struct sched *s = open_one(12, 40, 8);
    static struct job jobs[SMALL + 1];
    for (int i = 0; i < 4; i++)
        ask(s, &jobs[i], i, 20, 100); /* 2 blocks, 8 in the end: expected to be short */
    for (int i = 0; i < 3; i++)
        CHECK(step_once(s, 0) > 0, "they begin");
    CHECK(jobs[3].request.decode_worker >= 0, "not all do");
    ask(s, &jobs[4], 4, 150, 2); /* 10 blocks */
    for (int i = 5; i <= SMALL; i++)
        ask(s, &jobs[i], i, 3, 20);
    int n_passed = 0;
    for (int step = 0; jobs[4].request.decode_worker < 0 && step < 5000; step++) {
        n_passed = 0; /* what is admitted in the same step as it has not */
        for (int i = 5; i <= SMALL; i++)
            n_passed += jobs[i].request.decode_worker >= 0;
        (void)step_once(s, 0);
    }
    CHECK(sched_stats(s).preemptions > 0, "nobody was preempted");
    CHECK(jobs[4].request.decode_worker >= 0, "it still waits");
    CHECK(n_passed <= MAX_PASSED, "%d have passed it", n_passed);
    run_all(check, s);
    sched_destroy(s);
}

/* Equal prompts of whole blocks: no more than all but the last block can be found, so only that is
 * waited for; the last blocks are computed side by side. */
static void whole_blocks_wait_for_no_last_one(struct check *check) {
    struct sched *s = open_one(100, 0, 8);
    static struct job jobs[5];
    for (int i = 0; i < 5; i++)
        ask_after(s, &jobs[i], i, 64, 1, jobs[0].tokens, i > 0 ? 64 : 0);
    int n = s->following.length, first = step_once(s, 0), others = step_once(s, 0);
    CHECK(n == 4 && first == 64, "%d follow, %d tokens", n, first);
    CHECK(others == 4 * 16 && is_idle(s), "%d tokens of the others", others);
    sched_destroy(s);
}

/* Many that wait for one prefix keep nobody else waiting, where there is room. */
static void sharers_stop_nobody(struct check *check) {
    enum { SHARERS = 24, OTHERS = 40, PREFIX = 640 };
    struct sched *s = open_workers("bb", (int[]){400, 400}, 64);
    static struct job jobs[SHARERS + OTHERS];
    for (int i = 0; i < SHARERS; i++)
        ask_after(s, &jobs[i], i, PREFIX + 3, 2, jobs[0].tokens, i > 0 ? PREFIX : 0);
    (void)step_once(s, 0);
    (void)step_once(s, 1);
    int n_waiting = 0;
    for (int i = SHARERS; i < SHARERS + OTHERS; i++)
        ask(s, &jobs[i], i, 3, 1);
    for (int i = SHARERS; i < SHARERS + OTHERS; i++)
        n_waiting += jobs[i].request.state == REQUEST_WAITING;
    CHECK(n_waiting == 0, "%d others wait", n_waiting);
    run_all(check, s);
    CHECK(sched_stats(s).prefill_tokens <= PREFIX + SHARERS * (3 + BLOCK_TOKENS) + OTHERS * 3,
          "%d tokens were computed", (int)sched_stats(s).prefill_tokens);
    sched_destroy(s);
}

static void where_prompts_are_computed(struct check *check) {
    struct sched *s = open_pools(200, 200, 8, 16);
    static struct job jobs[4];
    ask(s, &jobs[0], 0, 200, 2);
    while (!is_idle(s))
        CHECK(step_once(s, 0) >= 0 || step_once(s, 1) >= 0, "stuck");
    CHECK(sched_stats(s).hand_overs == 1 && sched_stats(s).local_prefills == 0, "a cold prompt");
    /* the next turn: 192 tokens are cached, 28 are not */
    ask_after(s, &jobs[1], 1, 220, 1, jobs[0].tokens, 200);
    CHECK(step_once(s, 0) == -1 && step_once(s, 1) == 16, "the decode worker does the rest");
    CHECK(step_once(s, 1) == 12 && sched_stats(s).local_prefills == 1, "to the end");
    CHECK(jobs[1].request.cached_tokens == 192, "%d cached", jobs[1].request.cached_tokens);
    ask(s, &jobs[2], 2, 16 * (BUSY_CHUNKS + 2), 1);
    CHECK(step_once(s, 0) == 16, "a long prompt, not cached");
    ask(s, &jobs[3], 3, 16, 1);
    CHECK(step_once(s, 1) == 16, "the prefill pool is far behind, the decode worker helps");
    CHECK(sched_stats(s).local_prefills == 2 && jobs[3].request.length == 17, "done");
    sched_destroy(s);
}

/* ---- what is cached stays, and is shared ---- */

static int cached_blocks(struct sched *s, const struct job *job, int n) {
    uint64_t hashes[MAX_TEXT / BLOCK_TOKENS];
    int nodes[MAX_TEXT / BLOCK_TOKENS];
    for (int i = 0; i < n; i++)
        hashes[i] = kv_hash(i > 0 ? hashes[i - 1] : 0, job->tokens + i * BLOCK_TOKENS);
    return kv_find(sched_kv(s), hashes, job->tokens, n, nodes);
}

static void run_all(struct check *check, struct sched *s) {
    int n_idle = 0;
    while (!is_idle(s) && n_idle < 3) {
        bool any = false;
        for (int w = 0; w < s->config.kv.n_workers; w++)
            any = step_once(s, w) >= 0 || any;
        n_idle = any ? 0 : n_idle + 1;
    }
    CHECK(is_idle(s), "stuck");
}

/* Its prefix is on the host alone, and colder than all else there; room for it on the device must
 * not be made at its cost, however often it is tried. */
static void a_waiting_prompt_keeps_what_is_cached(struct check *check) {
    struct sched *s = open_one(12, 20, 4);
    static struct job jobs[5];
    for (int i = 0; i < 3; i++) {
        ask(s, &jobs[i], i, 160, 2);
        run_all(check, s);
    }
    int found = cached_blocks(s, &jobs[0], 10);
    CHECK(found == 10, "%d blocks are cached at arrival", found);
    ask_after(s, &jobs[3], 3, 165, 2, jobs[0].tokens, 160);
    CHECK(jobs[3].request.state == REQUEST_WAITING, "it waits for room");
    CHECK(jobs[3].request.n_held > 0 && !sched_check(s), "it is held: %s", sched_check(s));
    run_all(check, s);
    CHECK(jobs[3].request.cached_tokens == 160, "%d tokens found", jobs[3].request.cached_tokens);
    CHECK(jobs[3].request.cached_on_host >= 128 && jobs[3].request.n_held == 0,
          "they were on the host");
    ask_after(s, &jobs[4], 4, 165, 2, jobs[1].tokens, 160);
    sched_cancel(s, &jobs[4].request, false, 0);
    CHECK(kv_pins(sched_kv(s)) == 0, "nothing is held for one that has gone");
    sched_destroy(s);
}

/* One request at a time, which fit on all devices together, and not on one. */
static void paced_load_is_spread(struct check *check) {
    static const char *const roles[] = {"bbbb", "ppdd"};
    for (int way = 0; way < 2; way++) {
        struct sched *s = open_workers(roles[way], (int[]){60, 60, 60, 60}, 64);
        static struct job jobs[32];
        int n_texts = way == 0 ? 16 : 8, n_hits = 0, n_on[4] = {0};
        for (int i = 0; i < 2 * n_texts; i++) {
            ask(s, &jobs[i], i % n_texts, 209, 2);
            run_all(check, s);
            n_on[jobs[i].request.decode_worker]++;
            n_on[jobs[i].request.prefill_worker]++;
            n_hits += jobs[i].request.cached_tokens;
        }
        CHECK(n_hits == n_texts * 208, "%s: %d of %d tokens found", roles[way], n_hits,
              n_texts * 208);
        for (int w = 0; w < 4; w++)
            CHECK(n_on[w] >= 4, "%s: worker %d was chosen %d times", roles[way], w, n_on[w]);
        sched_destroy(s);
    }
}

/* When all caches are full it goes round; the emptier one goes before who has waited longer. */
static void equal_workers_take_turns(struct check *check) {
    static const char *const roles[] = {"bbbb", "ppdd"};
    static struct job job;
    for (int way = 0; way < 2; way++) {
        struct sched *s = open_workers(roles[way], (int[]){14, 14, 14, 14}, 64);
        int n_on[4] = {0};
        for (int i = 0; i < 40; i++) {
            ask(s, &job, i, 209, 2);
            run_all(check, s);
            n_on[job.request.decode_worker] += i >= 8;
            n_on[job.request.prefill_worker] += i >= 8;
        }
        for (int w = 0; w < 4; w++)
            CHECK(n_on[w] == 16, "%s: worker %d was chosen %d times", roles[way], w, n_on[w]);
        sched_destroy(s);
    }
    struct sched *s = open_workers("bb", (int[]){200, 200}, 64);
    for (int i = 0; i < 3; i++) {
        ask(s, &job, i, i == 0 ? 640 : 20, 2);
        run_all(check, s);
        CHECK(job.request.decode_worker == (i > 0), "request %d is on the fuller worker", i);
    }
    sched_destroy(s);
}

/* Whoever computes it may go: the next one goes on. */
static void a_shared_prefix_is_computed_once(struct check *check) {
    enum { ALL = 32, SHARED_TOKENS = 960, OWN = 20 };
    for (int way = 0; way < 2; way++) {
        struct sched *s = open_workers("pd", (int[]){160, 160}, 64);
        static struct job jobs[ALL];
        int most = 0;
        for (int i = 0; i < ALL; i++)
            ask_after(s, &jobs[i], i, SHARED_TOKENS + OWN, 2, jobs[0].tokens,
                      i > 0 ? SHARED_TOKENS : 0);
        for (int step = 0; !is_idle(s) && step < 500; step++) {
            most = kv_used(sched_kv(s), 1) > most ? kv_used(sched_kv(s), 1) : most;
            (void)step_once(s, 0);
            (void)step_once(s, 1);
            if (way == 1 && step == 3)
                sched_cancel(s, &jobs[0].request, false, 0);
        }
        int computed = (int)sched_stats(s).prefill_tokens;
        CHECK(is_idle(s), "they never end");
        CHECK(computed <= SHARED_TOKENS + ALL * OWN, "%d tokens were computed", computed);
        CHECK(most <= SHARED_TOKENS / BLOCK_TOKENS + ALL * 2, "%d blocks were in use", most);
        sched_destroy(s);
    }
}

/* ---- copies ---- */

static void copies_are_bounded_by_what_is_in_flight(struct check *check) {
    for (int way = 0; way < 2; way++) {
        struct sched *s = open_pools(200, 200, 4, 1600);
        s->config.copies_in_flight = way == 0 ? 150 : 10;
        static struct job jobs[2];
        struct kv_copy_order orders[200];
        ask(s, &jobs[0], 0, 1000, 40);
        ask(s, &jobs[1], 1, 900, 40);
        struct step *step = sched_next(s, 0, 0);
        CHECK(step && step->batch.n_samples == 1, "one is done");
        step->batch.sampled[0] = ANSWER;
        sched_done(s, 0, step, 0);
        CHECK(step_once(s, 0) == 300, "the other");
        CHECK(kv_pending(sched_kv(s), 1) == 63 + 57, "%d orders", kv_pending(sched_kv(s), 1));
        int n = sched_copies(s, 1, orders, 200);
        CHECK(n == (way == 0 ? 120 : 10), "%d copies at a time", n);
        CHECK(sched_copies(s, 1, orders + n, 200 - n) == 0, "no more");
        sched_copied(s, &orders[0], true, 0);
        CHECK(sched_copies(s, 1, orders, 200) == way, "one for one that has ended");
        CHECK(is_concerned(s, 1), "its worker is told");
        for (int i = 0; i < 2; i++)
            sched_cancel(s, &jobs[i].request, false, 0);
        sched_destroy(s);
    }
}

/* One token comes with the prompt; an end token comes before the last blocks are sent. */
static void nothing_is_sent_for_nothing(struct check *check) {
    struct sched *s = open_pools(32, 32, 4, 64);
    struct kv *kv = sched_kv(s);
    static struct job jobs[3];
    ask(s, &jobs[0], 0, 150, 1);
    CHECK(kv_used(kv, 1) == 0, "%d blocks are reserved for a request of one token", kv_used(kv, 1));
    run_all(check, s);
    CHECK(jobs[0].request.reason == FINISH_LENGTH && jobs[0].request.length == 151, "it has it");
    for (int i = 1; i < 3; i++) { /* an end token after one chunk, and after two */
        ask(s, &jobs[i], i, 64 * i - 4, 9);
        for (int chunk = 0; chunk < i; chunk++) {
            struct step *step = sched_next(s, 0, 0);
            CHECK(step && step->batch.n_samples == (chunk == i - 1), "chunk %d", chunk);
            step->batch.sampled[0] = 0;
            sched_done(s, 0, step, 0);
        }
        CHECK(jobs[i].request.reason == FINISH_STOP, "it ends at once");
        CHECK(kv_pending(kv, 1) == 4 * (i - 1), "%d blocks are sent", kv_pending(kv, 1));
    }
    CHECK(sched_stats(s).hand_overs == 0, "hand-overs");
    sched_destroy(s);
}

/* ---- whose turn it is ---- */

/* The first token waits for blocks alone; then requests take turns. */
static void first_tokens_wait_for_no_slot(struct check *check) {
    enum { ALL = 10 };
    struct sched *s = open_one(200, 0, 2);
    static struct job jobs[ALL];
    for (int i = 0; i < ALL; i++)
        ask(s, &jobs[i], i, 32, 40);
    for (int step = 0; step < ALL * 32 / 64; step++)
        (void)step_once(s, 0);
    for (int i = 0; i < ALL; i++)
        CHECK(jobs[i].request.length > 32, "request %d has no token", i);
    while (jobs[0].request.state != REQUEST_FINISHED) {
        int least = MAX_TEXT, most = 0;
        for (int i = 0; i < ALL; i++) {
            least = jobs[i].request.length < least ? jobs[i].request.length : least;
            most = jobs[i].request.length > most ? jobs[i].request.length : most;
        }
        CHECK(step_once(s, 0) == 2, "two rows");
        CHECK(most - least <= 6, "%d tokens apart", most - least);
    }
    run_all(check, s);
    sched_destroy(s);
}

static void a_chunk_is_shared(struct check *check) {
    struct sched *s = open_one(200, 0, 16);
    static struct job jobs[9];
    ask(s, &jobs[0], 0, 960, 1);
    for (int i = 1; i < 9; i++)
        ask(s, &jobs[i], i, 16, 1);
    for (int step = 1; !is_idle(s) && step < 100; step++) {
        CHECK(step_once(s, 0) == 64, "a whole chunk");
        CHECK(jobs[0].request.filled >= 32 * step || is_idle(s), "the long prompt stands still");
        CHECK(step < 4 || jobs[8].request.state == REQUEST_FINISHED, "the short ones wait for it");
    }
    CHECK(is_idle(s) && sched_stats(s).steps == (960 + 8 * 16) / 64, "no step too many");
    sched_destroy(s);
}

/* The one with fewer blocks in use has no room, the other has. */
static void a_full_worker_is_passed_by(struct check *check) {
    struct sched *s = open_workers("pdd", (int[]){200, 20, 100}, 1024);
    static struct job jobs[3];
    ask(s, &jobs[0], 0, 250, 60); /* 16 blocks */
    CHECK(jobs[0].request.decode_worker == 1, "the emptier one");
    ask(s, &jobs[1], 1, 640, 60); /* 41 blocks */
    CHECK(jobs[1].request.decode_worker == 2, "the only one that holds it");
    ask(s, &jobs[2], 2, 160, 60);
    CHECK(jobs[2].request.state != REQUEST_WAITING && jobs[2].request.decode_worker == 2,
          "it waits for a full worker");
    run_all(check, s);
    sched_destroy(s);
}

static void workers_of_different_sizes(struct check *check) {
    struct sched *s = open_workers("pdd", (int[]){4, 8, 20}, 64);
    static struct job jobs[4];
    CHECK(sched_max_length(s) == 320, "the longest text: %d", sched_max_length(s));
    ask(s, &jobs[0], 0, 321, 9);
    CHECK(jobs[0].request.reason == FINISH_ERROR, "too long for all");
    ask(s, &jobs[1], 1, 310, 300);
    CHECK(jobs[1].request.prefill_worker == 2 && jobs[1].request.decode_worker == 2,
          "too long for the prefill worker and the small decode worker");
    run_all(check, s);
    CHECK(jobs[1].request.length == 320, "to the end: %d", jobs[1].request.length);
    ask(s, &jobs[2], 2, 60, 200); /* an answer longer than expected: it outgrows its worker */
    CHECK(jobs[2].request.prefill_worker == 0 && jobs[2].request.decode_worker == 1, "a small one");
    run_all(check, s);
    CHECK(jobs[2].request.length == 260 && jobs[2].request.decode_worker == 2, "it has moved");
    CHECK(jobs[2].request.preemptions == 1, "%d times", jobs[2].request.preemptions);
    sched_destroy(s);
}

/* ---- bounds ---- */

static void a_full_queue_refuses(struct check *check) {
    struct sched *s = open_one(4, 0, 4);
    static struct job jobs[4];
    s->config.max_queue = 2;
    for (int i = 0; i < 4; i++)
        ask(s, &jobs[i], i, 50, 9);
    for (int i = 0; i < 4; i++)
        CHECK((jobs[i].request.reason == FINISH_ERROR) == (i == 3), "request %d", i);
    CHECK(strstr(jobs[3].request.error, "queue is full: as many as --max-queue says, 2"), "%s",
          jobs[3].request.error);
    run_all(check, s);
    CHECK(jobs[2].request.reason == FINISH_LENGTH && jobs[3].request.first_token == 0, "the rest");
    sched_destroy(s);
}

/* Those that follow another count, before what they share is computed and after; one that need not
 * wait is not refused. All have deadlines. */
static void followers_wait_in_the_queue(struct check *check) {
    struct sched *s = open_one(8, 0, 4);
    static struct job jobs[7];
    s->config.max_queue = 2;
    ask(s, &jobs[0], 0, 64, 30);
    for (int i = 1; i < 4; i++)
        ask_after(s, &jobs[i], i, 124, 9, jobs[0].tokens, 64);
    CHECK(s->following.length == 2 && jobs[3].request.reason == FINISH_ERROR, "two may follow");
    jobs[2].request.deadline = 1;
    sched_expire(s, 1);
    CHECK(jobs[2].request.reason == FINISH_ERROR && s->following.length == 1, "its deadline");
    ask_after(s, &jobs[4], 4, 124, 9, jobs[0].tokens, 64);
    CHECK(step_once(s, 0) == 64 && s->released.length == 2, "it is there, but no room");
    ask(s, &jobs[5], 5, 100, 9);
    CHECK(jobs[5].request.reason == FINISH_ERROR, "two wait");
    ask(s, &jobs[6], 6, 3, 9);
    CHECK(jobs[6].request.state == REQUEST_LOADING, "it need not wait");
    jobs[4].request.deadline = 2;
    sched_expire(s, 2);
    CHECK(jobs[4].request.reason == FINISH_ERROR && s->released.length == 1, "its deadline");
    CHECK(step_once(s, 0) == 4, "both run");
    jobs[6].request.deadline = 3;
    withdraw(s, &jobs[6].request, FINISH_NONE, 2);
    CHECK(s->preempted.length == 1, "it is preempted");
    sched_expire(s, 3);
    CHECK(jobs[6].request.reason == FINISH_ERROR, "its deadline");
    run_all(check, s);
    sched_destroy(s);
}

/* Where the pool that decodes is full, the worker that prefills keeps a request; a long prompt is
 * prefilled by a decode worker that is idle, where the others are far behind. */
static void pools_help_each_other(struct check *check) {
    struct sched *s = open_pools(40, 12, 4, 64);
    static struct job jobs[9];
    for (int i = 0; i < 3; i++)
        ask(s, &jobs[i], i, 100, 20); /* 7 blocks: one of them fits the decode worker */
    CHECK(jobs[0].request.decode_worker == 1 && jobs[1].request.decode_worker == 0, "one is kept");
    CHECK(jobs[2].request.decode_worker == 0 && jobs[2].request.prefill_worker == 0, "another");
    run_all(check, s);
    CHECK(jobs[1].request.reason == FINISH_LENGTH && sched_stats(s).hand_overs == 1, "they end");
    sched_destroy(s);
    s = open_pools(100, 100, 8, 64);
    for (int i = 0; i < 9; i++)
        ask(s, &jobs[i], i, 100, 2);
    int n_local = 0; /* behind by more than 4 chunks of 64 tokens: 3 prompts */
    for (int i = 0; i < 9; i++)
        n_local += jobs[i].request.prefill_worker == 1;
    CHECK(n_local == 6 && jobs[2].request.prefill_worker == 0, "%d by the other", n_local);
    run_all(check, s);
    sched_destroy(s);
}

/* It is tried again when the prefill worker gets room, here as the first's blocks have been copied
 * from it, not only when a decode worker does. */
static void who_can_be_kept_is_tried_again(struct check *check) {
    struct sched *s = open_pools(8, 8, 4, 64);
    static struct job jobs[2];
    for (int i = 0; i < 2; i++)
        ask(s, &jobs[i], i, 100, 20); /* 7 blocks */
    CHECK(jobs[1].request.state == REQUEST_WAITING, "no worker has room");
    CHECK(step_once(s, 0) == 64 && step_once(s, 0) == 36 && step_once(s, 1) == 0, "the first");
    CHECK(jobs[1].request.state == REQUEST_LOADING && jobs[1].request.decode_worker == 0, "kept");
    run_all(check, s);
    sched_destroy(s);
}

static void deadlines_end_requests(struct check *check) {
    struct sched *s = open_pools(6, 12, 4, 64);
    static struct job jobs[4];
    CHECK(sched_next_event(s) == INFINITY, "nothing to wait for");
    for (int i = 0; i < 4; i++) { /* runs, is handed over, is prefilled, waits */
        jobs[i] =
            (struct job){.request = {.id = i, .n_prompt = 33, .max_new = 9, .deadline = 5 - i}};
        jobs[i].request.tokens = jobs[i].tokens;
        jobs[i].tokens[0] = i + 2;
        sched_submit(s, &jobs[i].request, 0);
        if (i < 2)
            CHECK(step_once(s, 0) == 33, "its prompt");
        if (i < 1)
            CHECK(step_once(s, 1) == 0 && step_once(s, 1) == 1, "it runs");
    }
    const enum request_state states[] = {REQUEST_RUNNING, REQUEST_HAND_OVER, REQUEST_PREFILL,
                                         REQUEST_WAITING};
    struct step *step = sched_next(s, 0, 0);
    for (int i = 3; i >= 0; i--) {
        const struct request *r = &jobs[i].request;
        CHECK(r->state == states[i], "request %d is in state %d", i, r->state);
        CHECK(sched_next_event(s) == 5 - i, "the next event: %g", sched_next_event(s));
        sched_expire(s, 5 - i - 0.5);
        CHECK(r->state != REQUEST_FINISHED, "too early");
        sched_expire(s, 5 - i);
        CHECK((r->state == REQUEST_FINISHED) == (i != 2), "a step holds request 2");
        if (i == 2)
            sched_done(s, 0, step, 5 - i);
        CHECK(r->reason == FINISH_ERROR && strstr(r->error, "deadline"), "request %d: %s", i,
              r->error);
        CHECK(r->first_token == 0, "no time of a first token");
    }
    CHECK(is_idle(s) && sched_next_event(s) == INFINITY, "all have ended");
    run_all(check, s);
    CHECK(kv_pins(sched_kv(s)) == 0, "pins are left");
    sched_destroy(s);
}

/* An answer that has lost its place is no new request: it takes none of the queue's places. */
static void who_is_preempted_is_not_queued(struct check *check) {
    struct sched *s = open_one(8, 0, 4);
    static struct job jobs[6];
    for (int i = 0; i < 4; i++)
        ask(s, &jobs[i], i, 10, 100);
    for (int i = 0; i < 200 && s->preempted.length == 0; i++)
        (void)step_once(s, 0);
    CHECK(s->preempted.length > 0 && s->waiting.length == 0, "nobody was preempted");
    s->config.max_queue = 1;
    for (int i = 4; i < 6; i++)
        ask(s, &jobs[i], i, 65, 6);
    CHECK(jobs[4].request.state == REQUEST_WAITING, "refused: %s", jobs[4].request.error);
    CHECK(strstr(jobs[5].request.error, "the queue is full"), "%s", jobs[5].request.error);
    run_all(check, s);
    sched_destroy(s);
}

/* What a prompt finds on a worker is no room for it there: it goes where there is some. */
static void hits_are_no_room(struct check *check) {
    struct sched_config config = config_of("bb", (int[]){40, 40}, 0, 8, 512);
    config.likely_answer = 16;
    struct sched *s = sched_create(&config);
    static struct job jobs[4];
    ask(s, &jobs[0], 0, 320, 1);
    run_all(check, s);
    int there = jobs[0].request.decode_worker;
    ask(s, &jobs[1], 1, 10, 200);
    ask(s, &jobs[2], 2, 280, 200);
    CHECK(jobs[1].request.decode_worker == 1 - there && jobs[2].request.decode_worker == there,
          "%d, %d", jobs[1].request.decode_worker, jobs[2].request.decode_worker);
    CHECK(kv_usage(sched_kv(s), there).cached == 20, "the prefix is not there");
    ask_after(s, &jobs[3], 3, 400, 8, jobs[0].tokens, 320);
    CHECK(jobs[3].request.state == REQUEST_LOADING && jobs[3].request.cached_tokens == 320,
          "it waits for room beside what it found");
    CHECK(jobs[3].request.decode_worker == 1 - there, "at %d", jobs[3].request.decode_worker);
    run_all(check, s);
    sched_destroy(s);
}

/* Nor is it room that answers there can grow into: whoever finds it will keep it. */
static void hits_are_no_room_to_grow(struct check *check) {
    struct sched_config config = config_of("b", (int[]){40}, 0, 8, 512);
    config.likely_answer = 160;
    struct sched *s = sched_create(&config);
    static struct job jobs[3];
    ask(s, &jobs[0], 0, 320, 1);
    run_all(check, s);
    ask(s, &jobs[1], 1, 180, 200);
    while (jobs[1].request.length < 204 && step_once(s, 0) > 0) {
    }
    ask_after(s, &jobs[2], 2, 384, 200, jobs[0].tokens, 320);
    CHECK(kv_usage(sched_kv(s), 0).cached == 20 && kv_reclaimable(sched_kv(s), 0) >= 25,
          "it has no room now");
    CHECK(jobs[2].request.state == REQUEST_WAITING, "both together outgrow their worker");
    run_all(check, s);
    CHECK(sched_stats(s).preemptions == 0, "they met");
    sched_destroy(s);
}

/* Where no worker that decodes has room, one that prefills keeps an answer. So who waits for room
 * looks again when there is enough on that one, which may be less: it has the prefix. */
static void room_to_be_kept_is_seen(struct check *check) {
    struct sched_config config = config_of("pd", (int[]){30, 28}, 0, 8, 512);
    struct sched *s = sched_create(&config);
    static struct job jobs[4];
    struct kv_copy_order orders[28];
    ask(s, &jobs[0], 0, 440, 8); /* fills the worker that decodes, which gets no steps */
    (void)step_once(s, 0);
    for (int i = 0, n = sched_copies(s, 1, orders, 28); i < n; i++)
        sched_copied(s, &orders[i], true, 0);
    ask(s, &jobs[1], 1, 400, 40);
    (void)step_once(s, 0);
    ask(s, &jobs[2], 2, 45, 3);
    (void)step_once(s, 0);
    CHECK(jobs[1].request.decode_worker == 0 && jobs[2].request.decode_worker == 0, "not kept");
    ask_after(s, &jobs[3], 3, 400, 2, jobs[1].tokens, 384); /* lacks 2 blocks there, 26 elsewhere */
    CHECK(jobs[3].request.state == REQUEST_WAITING && kv_reclaimable(sched_kv(s), 0) == 1,
          "%d blocks are free", kv_reclaimable(sched_kv(s), 0));
    while (jobs[2].request.state != REQUEST_FINISHED && step_once(s, 0) >= 0) {
    }
    CHECK(jobs[3].request.decode_worker == 0 && jobs[1].request.state == REQUEST_RUNNING,
          "it waits though there is room");
    run_all(check, s);
    sched_destroy(s);
}

/* Where the largest worker has failed an answer goes on as far as the others hold it, and says so:
 * it does not end as if it were whole. Others' answers do not mind. */
static void texts_too_long_for_who_is_left(struct check *check) {
    struct sched *s = open_workers("pdd", (int[]){6, 8, 4}, 64);
    static struct job jobs[2];
    const struct request *r = &jobs[0].request;
    CHECK(sched_longest(s) == 128 && sched_load(s).needed == 1, "%d", sched_longest(s));
    ask(s, &jobs[0], 0, 40, 60);
    for (int i = 0; i < 90 && r->length < 50; i++)
        (void)step_once(s, i % 3);
    CHECK(r->decode_worker == 1 && r->length == 50, "%d tokens", r->length);
    sched_fail(s, 1, 0);
    CHECK(sched_max_length(s) == 64 && sched_longest(s) == 128, "%d", sched_max_length(s));
    ask(s, &jobs[1], 1, 20, 10);
    run_all(check, s);
    CHECK(r->reason == FINISH_ERROR && strstr(r->error, "holds so long a text"), "%s", r->error);
    CHECK(r->length == 65, "%d tokens", r->length);
    CHECK(jobs[1].request.reason == FINISH_LENGTH, "%s", jobs[1].request.error);
    sched_destroy(s);
}

/* Written through, no more than the last block is computed again; the other pool takes over. */
static void a_failed_worker_loses_one_block(struct check *check) {
    struct sched_config config = config_of("pd", (int[]){8, 8}, 16, 4, 64);
    config.kv.policy = KV_WRITE_THROUGH;
    struct sched *s = sched_create(&config);
    static struct job jobs[2];
    const struct request *r = &jobs[0].request;
    ask(s, &jobs[0], 0, 40, 40);
    for (int i = 0; i < 30 && r->length < 60; i++) {
        (void)step_once(s, 0);
        (void)step_once(s, 1);
    }
    CHECK(r->state == REQUEST_RUNNING && r->decode_worker == 1 && r->length == 60, "it runs");
    sched_fail(s, 1, 0);
    CHECK(sched_is_lost(s, 1) && s->config.decodes[0] && r->decode_worker == 0, "taken over");
    CHECK(sched_stats(s).recomputed_tokens == 59 - 48, "%d tokens are computed again",
          (int)sched_stats(s).recomputed_tokens);
    struct step *step = NULL;
    for (int i = 0; i < 3 && !step; i++) { /* copies come first */
        struct kv_copy_order orders[8];
        step = sched_next(s, 0, 0);
        for (int n = sched_copies(s, 0, orders, 8); n > 0; n--)
            sched_copied(s, &orders[n - 1], true, 0);
    }
    CHECK(step && step->batch.n_rows == 11 && step->batch.n_sequences == 11 &&
              step->batch.sequence[0].generated && step->batch.n_samples == 0,
          "rows of the answer, each by itself");
    if (step)
        sched_done(s, 0, step, 0);
    while (!is_idle(s) && step_once(s, 0) >= 0) {
    }
    CHECK(r->reason == FINISH_LENGTH && r->length == 80 && r->preemptions == 1, "%s", r->error);
    CHECK(sched_return(s, 1, 0) && s->config.decodes[1] && !s->config.decodes[0], "it is back");
    sched_fail(s, 0, 0);
    sched_fail(s, 1, 0);
    ask(s, &jobs[1], 1, 5, 5);
    CHECK(strstr(jobs[1].request.error, "all workers have failed"), "%s", jobs[1].request.error);
    CHECK(is_idle(s) && !kv_check(sched_kv(s)), "%s", kv_check(sched_kv(s)));
    sched_destroy(s);
}

/* A request of 100 tokens in each state but that of paging meets each event: it ends, or goes on to
 * its end elsewhere, and nothing of it stays behind. */
static void each_state_meets_each_event(struct check *check) {
    enum { CANCEL, STOP, LATE, FAIL_PREFILL, FAIL_DECODE, N_EVENTS };
    static const enum request_state states[] = {REQUEST_WAITING, REQUEST_LOADING,
                                                REQUEST_PREFILL, REQUEST_HAND_OVER,
                                                REQUEST_RUNNING, REQUEST_WAITING};
    static const int reasons[] = {FINISH_CANCELLED, FINISH_STOP, FINISH_ERROR};
    for (int i = 0; i < PAGING * N_EVENTS; i++) {
        struct sched *s = open_pools(10, 10, 4, 64);
        static struct job jobs[2];
        struct request *r = &jobs[1].request;
        int stage = i / N_EVENTS, event = i % N_EVENTS;
        if (stage == QUEUED)
            ask(s, &jobs[0], 0, 100, 9);
        ask(s, &jobs[1], 1, 100, 9);
        if (stage >= PREFILLING)
            CHECK(step_once(s, 0) == 64, "stage %d: a chunk", stage);
        if (stage >= HANDED_OVER)
            CHECK(step_once(s, 0) == 36, "stage %d: the rest of the prompt", stage);
        if (stage >= DECODING)
            CHECK(step_once(s, 1) == 0 && step_once(s, 1) == 1, "stage %d: its copies", stage);
        if (stage == PREEMPTED)
            send_back(s, r, "a test", 0);
        CHECK(r->state == states[stage], "stage %d is state %d", stage, r->state);
        r->deadline = event == LATE ? 1 : 0;
        if (event <= STOP)
            sched_cancel(s, r, event == STOP, 1);
        else if (event == LATE)
            sched_expire(s, 1);
        else
            sched_fail(s, event - FAIL_PREFILL, 1);
        CHECK(event > LATE || (int)r->reason == reasons[event], "stage %d, event %d: %d", stage,
              event, (int)r->reason);
        run_all(check, s);
        CHECK(event <= LATE || r->reason == FINISH_LENGTH || r->reason == FINISH_STOP,
              "stage %d, event %d: %s", stage, event, r->error);
        CHECK(is_idle(s) && kv_pins(sched_kv(s)) == 0 && !kv_check(sched_kv(s)),
              "stage %d, event %d: something is left", stage, event);
        sched_destroy(s);
    }
}

/* Each allocation fails once: an error, and nothing is lost of what runs. */
static void memory_that_runs_out(struct check *check) {
    static struct job jobs[3];
    struct sched *s = NULL;
    int n = 0;
    for (; !s && n < 10; n += !s) {
        allocations_left = n;
        s = open_pools(8, 8, 4, 64);
    }
    CHECK(s && n == 4, "opened where %d allocations were good", n);
    allocations_left = -1;
    ask(s, &jobs[0], 0, 33, 9);
    CHECK(step_once(s, 0) == 33, "its prompt");
    allocations_left = 0;
    ask(s, &jobs[1], 1, 40, 9);
    CHECK(allocations_left < 0 && jobs[1].request.reason == FINISH_ERROR &&
              strcmp(jobs[1].request.error, "out of memory") == 0,
          "%s", jobs[1].request.error);
    ask(s, &jobs[2], 2, 40, 9);
    run_all(check, s);
    CHECK(jobs[0].request.reason > FINISH_NONE && jobs[0].request.reason < FINISH_CANCELLED &&
              jobs[2].request.reason > FINISH_NONE && jobs[2].request.reason < FINISH_CANCELLED,
          "the others: %s %s", jobs[0].request.error, jobs[2].request.error);
    CHECK(is_idle(s) && kv_pins(sched_kv(s)) == 0 && !kv_check(sched_kv(s)), "something is left");
    sched_destroy(s);
}

/* ---- a long queue ---- */

enum { QUEUE = 20000, SHORT_QUEUE = 100, SMALL_ANSWER = 8 };

struct small { /* a request of one token */
    struct request request;
    int tokens[1 + SMALL_ANSWER];
};

/* Seconds of processor time to preempt n running answers, the youngest first, as `preempt` does,
 * where as many new requests wait. Those that were preempted before wait as well. */
static double time_preemptions(struct check *check, int n) {
    struct sched *s = open_one(2 * n, 0, 1);
    struct small *all = calloc((size_t)(3 * n), sizeof *all);
    for (int i = 0; i < 3 * n; i++) {
        all[i].request = (struct request){.id = i, .n_prompt = 1, .max_new = SMALL_ANSWER};
        all[i].request.tokens = all[i].tokens;
        sched_submit(s, &all[i].request, 0);
    }
    const struct worker *w = &s->workers[0];
    while (w->prefilling.length > 0)
        CHECK(step_once(s, 0) > 0, "stuck");
    CHECK(w->decoding.length >= n && s->waiting.length >= n, "%d run, %d wait", w->decoding.length,
          s->waiting.length);
    clock_t start = clock();
    for (int i = 0; i < n; i++)
        withdraw(s, choose_preempted(w, INFINITY), FINISH_NONE, 0);
    double seconds = (double)(clock() - start) / CLOCKS_PER_SEC;
    CHECK(sched_stats(s).preemptions == n && s->preempted.length == n, "all of them wait");
    for (int i = 0; i < 3 * n; i++)
        withdraw(s, &all[i].request, FINISH_CANCELLED, 0);
    CHECK(is_idle(s), "some are left");
    sched_destroy(s);
    free(all);
    return seconds;
}

/* As many preemptions into a queue 200 times as long take about as long: up to 3 times that, for
 * the caches; with a walk over the queue it would be 1,000 times. */
static void preempting_costs_the_same(struct check *check) {
    double least[2] = {INFINITY, INFINITY}; /* of three tries: others use the caches, too */
    for (int try = 0; try < 3; try++) {
        double seconds = 0;
        for (int i = 0; i < QUEUE / SHORT_QUEUE; i++)
            seconds += time_preemptions(check, SHORT_QUEUE);
        least[0] = fmin(least[0], seconds);
        least[1] = fmin(least[1], time_preemptions(check, QUEUE));
    }
    CHECK(least[1] < 20 * fmax(least[0], 1e-3), "%.3f us a preemption, in a short queue %.3f",
          1e6 * least[1] / QUEUE, 1e6 * least[0] / QUEUE);
}

/* ---- a load in virtual time ---- */

enum { USERS = 400, USER_TEXT = 4400 };

struct user {
    struct request request;
    int wanted; /* tokens of its answer */
    double arrival;
    int tokens[USER_TEXT];
};

struct world { /* steps cost so much each and by row, copies by block and one at a time */
    struct sched *s;
    double now, step_seconds, row_seconds, block_seconds;
    struct step *steps[MAX_WORKERS];
    double ends[MAX_WORKERS], bus[MAX_WORKERS];
    struct {
        struct kv_copy_order order;
        double end;
    } copies[MAX_FLIGHTS];
    int n_copies;
    double longest_gap; /* between two tokens of an answer */
};

static void start_worker(struct world *world, int w) {
    struct kv_copy_order orders[64];
    struct step *step = world->steps[w] ? NULL : sched_next(world->s, w, world->now);
    int n = sched_copies(world->s, w, orders, 64);
    if (step) {
        world->steps[w] = step;
        world->ends[w] = world->now + world->step_seconds + world->row_seconds * step->batch.n_rows;
    }
    for (int i = 0; i < n; i++) {
        world->bus[w] = fmax(world->bus[w], world->now) + world->block_seconds;
        world->copies[world->n_copies].order = orders[i];
        world->copies[world->n_copies++].end = world->bus[w];
    }
}

static void end_worker_step(struct world *world, int w) {
    struct step *step = world->steps[w];
    for (int i = 0, sample = 0; i < step->batch.n_sequences; i++) {
        const struct request *r = step->requests[i];
        const struct user *user = (const struct user *)r;
        const struct sequence *sequence = &step->batch.sequence[i];
        if (sequence->start + sequence->n_rows != r->length)
            continue;
        step->batch.sampled[sample++] = r->length - r->n_prompt >= user->wanted ? 0 : ANSWER;
        if (r->first_token > 0)
            world->longest_gap = fmax(world->longest_gap, world->now - r->last_token);
    }
    world->steps[w] = NULL;
    sched_done(world->s, w, step, world->now);
}

/* What happens next, until a time. False: nothing. */
static bool next_event(struct world *world, double until) {
    int worker = -1, copy = -1;
    double first = until;
    for (int w = 0; w < world->s->config.kv.n_workers; w++)
        start_worker(world, w);
    for (int w = 0; w < world->s->config.kv.n_workers; w++) {
        if (world->steps[w] && world->ends[w] <= first) {
            first = world->ends[w];
            worker = w;
        }
    }
    for (int i = 0; i < world->n_copies; i++) {
        if (world->copies[i].end < first) {
            first = world->copies[i].end;
            copy = i;
        }
    }
    if (worker < 0 && copy < 0)
        return false;
    world->now = first;
    if (copy >= 0) {
        struct kv_copy_order order = world->copies[copy].order;
        world->copies[copy] = world->copies[--world->n_copies];
        sched_copied(world->s, &order, true, world->now);
    } else {
        end_worker_step(world, worker);
    }
    return true;
}

/* Users come one after another with short prompts and long answers. Returns the time of the last
 * token. */
static double run_users(struct world *world, struct user *users, int n) {
    for (int i = 0; i < n; i++) {
        while (next_event(world, users[i].arrival)) {
        }
        world->now = users[i].arrival;
        sched_submit(world->s, &users[i].request, world->now);
    }
    while (next_event(world, INFINITY)) {
    }
    return world->now;
}

static void make_user(struct user *user, int id, int n_prompt, int wanted, double arrival) {
    *user = (struct user){.request = {.id = id, .n_prompt = n_prompt, .max_new = 4000}};
    user->request.tokens = user->tokens;
    user->wanted = wanted;
    user->arrival = arrival;
    for (int i = 0; i < n_prompt; i++)
        user->tokens[i] = (int)(2 + scramble((uint64_t)(id * 1000 + i)) % 62);
}

/* Short prompts, answers of 1,500 or of 1,000 to 2,000 tokens, more of them than there is room for.
 * What took so many seconds when growth was not expected, with gaps of 25 to 120 s and 176 to
 * 1,666 preemptions, takes about as long. Without a host tier a preempted answer is computed
 * again. */
static void answers_have_room_to_grow(struct check *check) {
    static const struct {
        int host_blocks, spread;
        double every, seconds, share, gap;
    } loads[] = {{16000, 0, 0.1, 290, 0.98, 2},      {16000, 0, 0.01, 290, 0.98, 2},
                 {16000, 500, 0.1, 290.9, 0.96, 3},  {16000, 500, 0.3, 297.4, 0.96, 3},
                 {16000, 500, 0.01, 294.6, 0.96, 3}, {0, 500, 0.1, 291.3, 0.94, 3}};
    for (size_t load = 0; load < sizeof loads / sizeof *loads; load++) {
        struct sched_config config =
            config_of("b", (int[]){4000}, loads[load].host_blocks, 256, 512);
        config.likely_answer = 0; /* as many as is usual */
        config.context_length = 8192;
        struct world *world = calloc(1, sizeof *world);
        struct user *users = calloc(USERS, sizeof *users);
        *world = (struct world){.s = sched_create(&config),
                                .step_seconds = 0.02,
                                .row_seconds = 0.0001,
                                .block_seconds = 0.0005};
        for (int i = 0; i < USERS; i++)
            make_user(&users[i], i, 20 + (int)(scramble((uint64_t)i + 77) % 180),
                      1500 - loads[load].spread +
                          (int)(scramble((uint64_t)i + 5) % (uint64_t)(2 * loads[load].spread + 1)),
                      1 + loads[load].every * i);
        double seconds = run_users(world, users, USERS);
        struct sched_stats stats = sched_stats(world->s);
        CHECK(is_idle(world->s) && stats.finished == USERS, "they never end");
        CHECK(world->longest_gap <= loads[load].gap, "load %d: a gap of %.1f s", (int)load,
              world->longest_gap);
        CHECK(seconds * loads[load].share <= loads[load].seconds, "it takes %.1f s", seconds);
        CHECK(stats.preemptions <= 2 * USERS, "%d preemptions", (int)stats.preemptions);
        sched_destroy(world->s);
        free(users);
        free(world);
    }
}

int main(int argc, char **argv) {
    static const struct test tests[] = {
        {"one_request", one_request},
        {"refusals", refusals},
        {"cancel_in_mid_step", cancel_in_mid_step},
        {"youngest_is_preempted", youngest_is_preempted},
        {"passed_by_a_few", passed_by_a_few},
        {"passed_by_a_few_of_preempted", passed_by_a_few_of_preempted},
        {"whole_blocks_wait_for_no_last_one", whole_blocks_wait_for_no_last_one},
        {"sharers_stop_nobody", sharers_stop_nobody},
        {"where_prompts_are_computed", where_prompts_are_computed},
        {"a_waiting_prompt_keeps_what_is_cached", a_waiting_prompt_keeps_what_is_cached},
        {"paced_load_is_spread", paced_load_is_spread},
        {"equal_workers_take_turns", equal_workers_take_turns},
        {"a_shared_prefix_is_computed_once", a_shared_prefix_is_computed_once},
        {"copies_are_bounded_by_what_is_in_flight", copies_are_bounded_by_what_is_in_flight},
        {"nothing_is_sent_for_nothing", nothing_is_sent_for_nothing},
        {"first_tokens_wait_for_no_slot", first_tokens_wait_for_no_slot},
        {"a_chunk_is_shared", a_chunk_is_shared},
        {"a_full_worker_is_passed_by", a_full_worker_is_passed_by},
        {"workers_of_different_sizes", workers_of_different_sizes},
        {"a_full_queue_refuses", a_full_queue_refuses},
        {"followers_wait_in_the_queue", followers_wait_in_the_queue},
        {"pools_help_each_other", pools_help_each_other},
        {"who_can_be_kept_is_tried_again", who_can_be_kept_is_tried_again},
        {"deadlines_end_requests", deadlines_end_requests},
        {"who_is_preempted_is_not_queued", who_is_preempted_is_not_queued},
        {"hits_are_no_room", hits_are_no_room},
        {"hits_are_no_room_to_grow", hits_are_no_room_to_grow},
        {"room_to_be_kept_is_seen", room_to_be_kept_is_seen},
        {"texts_too_long_for_who_is_left", texts_too_long_for_who_is_left},
        {"a_failed_worker_loses_one_block", a_failed_worker_loses_one_block},
        {"each_state_meets_each_event", each_state_meets_each_event},
        {"memory_that_runs_out", memory_that_runs_out},
        {"preempting_costs_the_same", preempting_costs_the_same},
        {"answers_have_room_to_grow", answers_have_room_to_grow},
        {"random_operations", random_operations},
    };
    if (argc > 1 && strcmp(argv[1], "soak") == 0) {
        struct check check = {0, 0};
        run_random(&check, argc > 2 ? strtoull(argv[2], NULL, 10) : 1000000, 10000000);
        printf("%d passed, %d failed\n", check.failed == 0, check.failed != 0);
        return check.failed != 0;
    }
    return check_run(tests, sizeof tests / sizeof *tests, argc, argv);
}
