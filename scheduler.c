/* scheduler.c: who computes what next, on two pools of workers.
 *
 * Owns the queue of requests, their life (enum request_state) and their block tables. Refuses to
 * know of time, threads, devices and addresses: a driver asks sched_next for an idle worker's next
 * step, carries it out, and reports sched_done and sched_copied. Every call is a function of the
 * state and its arguments, so the same code runs under tests as on devices. README.md has a picture
 * of a request's life; set_state is the one function that changes it.
 *
 * Admission takes the oldest waiting request, looks for its longest cached prefix, picks a prefill
 * and a decode worker, and reserves all blocks of its prompt on both: what is admitted can reach
 * RUNNING without needing another block. Only a running answer grows; if nothing can be freed for
 * it, the youngest running request is preempted. The oldest is never preempted for a younger one,
 * so every request ends.
 *
 * Block ownership of a request, by half-open intervals of its table:
 *     [0, n_registered)         in the index, shared, pinned, never written
 *     [n_registered, n_blocks)  private: being filled, or reserved for what comes
 *     [0, n_prefill_blocks)     pinned on the prefill worker too, until they are handed over
 * Continuous batching: Yu et al., "Orca", OSDI 2022; chunked prefill: Agrawal et al.,
 * "Sarathi-Serve", OSDI 2024; separate pools: Zhong et al., "DistServe", OSDI 2024.
 * Read next: dynamo.c, which drives it. */
#include "dynamo.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    NONE = -1,
    LOCAL_PREFILL_TOKENS = 128, /* less than this after a prefix hit is not worth a hand-over */
    BUSY_CHUNKS = 8,            /* prefill workers so many chunks behind: decode workers help */
    MAX_COPY_FAILURES = 3       /* copies that may fail before a request is given up */
};

struct list { /* of requests, oldest first */
    struct request *first, *last;
};

struct worker {
    struct step step;
    char *arena;     /* all arrays of the step */
    int n_admitted;  /* requests that decode here, or will */
    struct copying { /* copies that it was given, the one that began first in front */
        struct kv_copy_order order;
        double started;
    } * copying; /* (copies_in_flight) */
    int n_copying;
    int n_pending; /* orders of the cache that sched_concerned has told of */
};

struct sched {
    struct sched_config config;
    struct kv *kv;
    struct list waiting, admitted;
    struct worker workers[MAX_WORKERS];
    int max_length;
    int n_waiting;
    uint32_t concerned;
    double next_deadline; /* no deadline is earlier */
    struct sched_stats stats;
};

/* What admission decides about a request. hits are the first blocks of its table. */
struct plan {
    int prefill_worker, decode_worker;
    int n_hits;              /* cached blocks, the saved one included */
    int cached, end;         /* tokens [cached, end) are to be prefilled */
    int n_prefill, n_decode; /* blocks to hold on each side */
    bool takes_saved;
};

/* ---- decisions: change these to try another policy ---- */

/* Which request is admitted next: the oldest, preempted ones included. */
static struct request *choose_request(const struct sched *s) {
    return s->waiting.first;
}

static int missing_blocks(const struct sched *s, const struct request *r, int n_hits, int worker) {
    int n = 0;
    for (int i = 0; i < n_hits; i++)
        n += kv_state(s->kv, r->blocks[i], worker) == KV_ABSENT;
    return n;
}

/* Which worker decodes it: the one with the fewest blocks in use and to be fetched. NONE: full. */
static int choose_decode_worker(const struct sched *s, const struct request *r, int n_hits) {
    int best = NONE, least = 0;
    for (int w = 0; w < s->config.kv.n_workers; w++) {
        if (!s->config.decodes[w] || s->workers[w].n_admitted >= s->config.max_batch)
            continue;
        int cost = missing_blocks(s, r, n_hits, w);
        for (const struct request *other = s->admitted.first; other; other = other->next)
            cost += other->decode_worker == w ? other->n_blocks : 0;
        if (best == NONE || cost < least) {
            best = w;
            least = cost;
        }
    }
    return best;
}

/* Prompt tokens that it has still to compute; an answer's tokens are none. */
static int prefill_left(const struct request *r) {
    return r->prefill_end > r->filled ? r->prefill_end - r->filled : 0;
}

static int prefill_backlog(const struct sched *s, int worker) {
    int tokens = 0;
    for (const struct request *r = s->admitted.first; r; r = r->next)
        tokens += r->prefill_worker == worker ? prefill_left(r) : 0;
    return tokens;
}

/* Which worker prefills it: the one with the least to do: prompt tokens, and a block to be fetched
 * for each that is not there. */
static int choose_prefill_worker(const struct sched *s, const struct request *r, int n_hits) {
    int best = NONE, least = 0;
    for (int w = 0; w < s->config.kv.n_workers; w++) {
        if (!s->config.prefills[w])
            continue;
        int cost = prefill_backlog(s, w) + missing_blocks(s, r, n_hits, w);
        if (best == NONE || cost < least) {
            best = w;
            least = cost;
        }
    }
    return best;
}

/* Whether the decode worker prefills by itself: it can as well; there is nothing to compute; little
 * is left after a hit that covers most; or the prefill pool is far behind. */
static bool prefills_locally(const struct sched *s, const struct plan *plan, int prefill_worker) {
    int left = plan->end - plan->cached;
    return s->config.prefills[plan->decode_worker] || left == 0 ||
           (left <= LOCAL_PREFILL_TOKENS && plan->cached > left) ||
           (left <= s->config.chunk &&
            prefill_backlog(s, prefill_worker) > BUSY_CHUNKS * s->config.chunk);
}

/* Which running request makes room: the youngest on that worker. Never one that has rows in the
 * step at hand (`in_step`), which the older ones than the one that grows have. */
static struct request *choose_preempted(const struct sched *s, int worker) {
    struct request *r = s->admitted.last;
    while (r && (r->state != REQUEST_RUNNING || r->decode_worker != worker))
        r = r->previous;
    return r;
}

/* ---- lists, states ---- */

static void list_remove(struct list *list, struct request *r) {
    *(r->previous ? &r->previous->next : &list->first) = r->next;
    *(r->next ? &r->next->previous : &list->last) = r->previous;
    r->previous = r->next = NULL;
}

static void list_insert(struct list *list, struct request *r) {
    struct request *before = list->last;
    while (before && before->id > r->id)
        before = before->previous;
    r->previous = before;
    r->next = before ? before->next : list->first;
    *(r->previous ? &r->previous->next : &list->first) = r;
    *(r->next ? &r->next->previous : &list->last) = r;
}

static struct list *list_of(struct sched *s, enum request_state state) {
    return state == REQUEST_WAITING ? &s->waiting : state == REQUEST_FINISHED ? NULL : &s->admitted;
}

/* The one place where a request's state changes: see the picture in README.md. */
static void set_state(struct sched *s, struct request *r, enum request_state state) {
    static const bool allowed[REQUEST_FINISHED + 1][REQUEST_FINISHED + 1] = {
        [REQUEST_WAITING] = {[REQUEST_LOADING] = true, [REQUEST_FINISHED] = true},
        [REQUEST_LOADING] =
            {[REQUEST_PREFILL] = true, [REQUEST_RUNNING] = true, [REQUEST_FINISHED] = true},
        [REQUEST_PREFILL] =
            {[REQUEST_HAND_OVER] = true, [REQUEST_RUNNING] = true, [REQUEST_FINISHED] = true},
        [REQUEST_HAND_OVER] = {[REQUEST_RUNNING] = true, [REQUEST_FINISHED] = true},
        [REQUEST_RUNNING] = {[REQUEST_WAITING] = true, [REQUEST_FINISHED] = true},
    };
    assert(allowed[r->state][state]);
    struct list *from = list_of(s, r->state), *to = list_of(s, state);
    r->state = state;
    s->n_waiting += (to == &s->waiting) - (from == &s->waiting);
    if (from != to) {
        list_remove(from, r);
        if (to)
            list_insert(to, r);
    }
}

static void concern_all(struct sched *s) {
    s->concerned |= (1u << s->config.kv.n_workers) - 1;
}

/* ---- blocks of a request ---- */

static bool lacks_block(const struct request *r) { /* for the token that it computes next */
    return r->state == REQUEST_RUNNING && r->n_blocks * BLOCK_TOKENS <= r->filled;
}

static void release_prefill_blocks(struct sched *s, struct request *r) {
    while (r->n_prefill_blocks > 0)
        kv_unpin(s->kv, r->blocks[--r->n_prefill_blocks], r->prefill_worker);
}

/* Lets go of all blocks, the last first: so it is colder than what stands before it. */
static void release_blocks(struct sched *s, struct request *r) {
    release_prefill_blocks(s, r);
    while (r->n_blocks > 0)
        kv_unpin(s->kv, r->blocks[--r->n_blocks], r->decode_worker);
    if (r->state != REQUEST_WAITING) {
        s->workers[r->decode_worker].n_admitted--;
        concern_all(s);
    }
    r->n_registered = r->n_ready = 0;
}

static void finish(struct sched *s, struct request *r, enum finish_reason reason, double now) {
    if (r->saved != NONE)
        kv_unkeep(s->kv, r->saved);
    release_blocks(s, r);
    set_state(s, r, REQUEST_FINISHED);
    free(r->blocks);
    free(r->hashes);
    r->blocks = NULL;
    r->hashes = NULL;
    r->reason = reason;
    r->last_token = r->last_token > 0 ? r->last_token : now;
    s->stats.finished++;
}

/* Puts a running request back into the queue. Its full blocks stay findable in the cache; the
 * last, partly filled one is kept for it, so that nothing need be computed again. */
static void preempt(struct sched *s, struct request *r) {
    if (r->filled % BLOCK_TOKENS != 0)
        kv_keep(s->kv, r->blocks[r->filled / BLOCK_TOKENS], &r->saved);
    release_blocks(s, r);
    r->preemptions++;
    set_state(s, r, REQUEST_WAITING);
    s->stats.preemptions++;
}

/* The chained hashes of a request's first n full blocks: each is computed once. */
static const uint64_t *hashes_of(struct request *r, int n) {
    for (; r->n_hashes < n; r->n_hashes++)
        r->hashes[r->n_hashes] = kv_hash(r->n_hashes > 0 ? r->hashes[r->n_hashes - 1] : 0,
                                         r->tokens + (size_t)r->n_hashes * BLOCK_TOKENS);
    return r->hashes;
}

/* Registers the blocks that have become full, and sends them to where they will be read. */
static void register_full_blocks(struct sched *s, struct request *r) {
    for (; (r->n_registered + 1) * BLOCK_TOKENS <= r->filled; r->n_registered++) {
        int i = r->n_registered;
        r->n_ready = r->n_ready < i ? r->n_ready : i; /* another's copy may be on its way still */
        r->blocks[i] = kv_register(s->kv, r->blocks[i], i > 0 ? r->blocks[i - 1] : NONE,
                                   hashes_of(r, i + 1)[i], r->tokens + (size_t)i * BLOCK_TOKENS);
        (void)kv_send(s->kv, r->blocks[i], r->decode_worker);
    }
}

/* Whether all that is filled has arrived on worker. A copy that failed is ordered again; after
 * too many failures the request ends. */
static bool blocks_ready(struct sched *s, struct request *r, int worker, double now) {
    while (r->n_ready < blocks_of(r->filled)) {
        int node = r->blocks[r->n_ready];
        enum kv_state state = kv_state(s->kv, node, worker);
        if (state == KV_RESERVED &&
            (++r->copy_failures > MAX_COPY_FAILURES || !kv_send(s->kv, node, worker))) {
            (void)fail(r->error, "its KV blocks could not be copied");
            finish(s, r, FINISH_ERROR, now);
        }
        if (state != KV_VALID)
            return false;
        r->n_ready++;
    }
    return true;
}

/* ---- admission ---- */

/* Finds the cached prefix and the workers. False: no decode worker takes another request now. */
static bool make_plan(struct sched *s, struct request *r, struct plan *plan) {
    bool resumes = r->length > r->n_prompt;
    int end = resumes ? r->length - 1 : r->length; /* the last token's K and V come by decoding */
    int n_full = (resumes ? end : end - 1) / BLOCK_TOKENS;
    int n_hits = kv_find(s->kv, hashes_of(r, n_full), r->tokens, n_full, r->blocks);
    *plan = (struct plan){.n_hits = n_hits, .cached = n_hits * BLOCK_TOKENS, .end = end};
    if (r->saved != NONE && plan->cached == end - end % BLOCK_TOKENS) {
        plan->takes_saved = true;
        plan->cached = end;
        r->blocks[plan->n_hits++] = r->saved;
    }
    plan->decode_worker = choose_decode_worker(s, r, plan->n_hits);
    if (plan->decode_worker == NONE)
        return false;
    plan->prefill_worker = choose_prefill_worker(s, r, plan->n_hits);
    if (prefills_locally(s, plan, plan->prefill_worker))
        plan->prefill_worker = plan->decode_worker;
    int first_answer = end < s->max_length ? end + 1 : end;
    plan->n_decode = blocks_of(first_answer);
    plan->n_prefill = plan->prefill_worker == plan->decode_worker ? 0 : blocks_of(end);
    return true;
}

/* Running requests of a worker that lack a block for their next token, of those before `end`. */
static int count_stalled(const struct sched *s, int worker, const struct request *end) {
    int n = 0;
    for (const struct request *r = s->admitted.first; r != end; r = r->next)
        n += r->decode_worker == worker && lacks_block(r);
    return n;
}

/* Whether a worker has room for what the request lacks there, and for older requests that wait for
 * a block. If not, the cache has begun to make it. */
static bool make_room(struct sched *s, const struct request *r, const struct plan *plan, int worker,
                      int n_blocks) {
    int lacks = missing_blocks(s, r, plan->n_hits, worker) + n_blocks - plan->n_hits;
    return kv_make_room(s->kv, worker, lacks + count_stalled(s, worker, NULL));
}

/* Pins the hits that are on a worker, so that they stay, or fetches those that are not. */
static void take_hits(struct sched *s, const struct request *r, const struct plan *plan, int worker,
                      bool fetch) {
    for (int i = 0; i < plan->n_hits; i++) {
        bool absent = kv_state(s->kv, r->blocks[i], worker) == KV_ABSENT;
        if (absent == fetch) {
            bool ok = kv_fetch(s->kv, r->blocks[i], worker);
            assert(ok);
        }
    }
}

static void release_hits(struct sched *s, const struct request *r, const struct plan *plan,
                         int worker) {
    for (int i = plan->n_hits - 1; i >= 0; i--)
        if (kv_state(s->kv, r->blocks[i], worker) != KV_ABSENT)
            kv_unpin(s->kv, r->blocks[i], worker);
}

/* Takes all blocks of a plan, on both sides, or none. */
static bool reserve(struct sched *s, struct request *r, const struct plan *plan) {
    int prefill = plan->prefill_worker, decode = plan->decode_worker;
    int sides[] = {decode, prefill}, n_blocks[] = {plan->n_decode, plan->n_prefill};
    int n_sides = prefill == decode ? 1 : 2;
    bool ok = true;
    for (int i = 0; i < n_sides; i++)
        take_hits(s, r, plan, sides[i], false);
    for (int i = 0; i < n_sides; i++) /* both begin to make it */
        ok = make_room(s, r, plan, sides[i], n_blocks[i]) && ok;
    for (int i = 0; i < n_sides; i++)
        if (ok)
            take_hits(s, r, plan, sides[i], true);
        else
            release_hits(s, r, plan, sides[i]);
    for (int i = plan->n_hits; i < plan->n_decode && ok; i++) {
        bool both = i < plan->n_prefill;
        r->blocks[i] = kv_new(s->kv, both ? prefill : decode);
        ok = r->blocks[i] != NONE && (!both || kv_reserve(s->kv, r->blocks[i], decode));
        assert(ok); /* there was room */
    }
    return ok;
}

/* Admits the next request if `worker` is the one that starts it. False: not now. */
static bool admit(struct sched *s, int worker, double now) {
    struct request *r = choose_request(s);
    struct plan plan;
    if (!r || !make_plan(s, r, &plan) || plan.prefill_worker != worker || !reserve(s, r, &plan))
        return false;
    if (r->saved != NONE)
        kv_unkeep(s->kv, r->saved); /* in the table again, or of no use: its tokens come anew */
    r->prefill_worker = plan.prefill_worker;
    r->decode_worker = plan.decode_worker;
    r->n_blocks = plan.n_decode;
    r->n_prefill_blocks = plan.n_prefill;
    r->n_registered = plan.cached / BLOCK_TOKENS;
    r->filled = plan.cached;
    r->prefill_end = plan.end;
    r->admitted = r->admitted > 0 ? r->admitted : now;
    s->workers[plan.decode_worker].n_admitted++;
    if (r->preemptions > 0) {
        s->stats.recomputed_tokens += plan.end - plan.cached;
    } else {
        r->cached_tokens = plan.cached;
        s->stats.prefix_hit_tokens += plan.cached;
        s->stats.local_prefills +=
            plan.prefill_worker == plan.decode_worker && !s->config.prefills[plan.decode_worker];
    }
    set_state(s, r, REQUEST_LOADING);
    return true;
}

/* ---- composing a step ---- */

/* Appends rows [r->filled, r->filled + n_rows) of a request to a worker's step. */
static void add_rows(struct sched *s, struct request *r, int worker, int n_rows) {
    struct step *step = &s->workers[worker].step;
    struct batch *batch = &step->batch;
    struct sequence *sequence = &batch->sequence[batch->n_sequences];
    bool samples = r->filled + n_rows == r->length;
    int n_blocks = blocks_of(r->filled + n_rows);
    *sequence = (struct sequence){.first_row = batch->n_rows,
                                  .n_rows = n_rows,
                                  .start = r->filled,
                                  .first_block = batch->n_blocks,
                                  .n_blocks = n_blocks,
                                  .generated = r->state == REQUEST_RUNNING};
    for (int i = 0; i < n_rows; i++) {
        batch->token[batch->n_rows] = r->tokens[r->filled + i];
        batch->position[batch->n_rows] = r->filled + i;
        batch->row_sequence[batch->n_rows++] = batch->n_sequences;
    }
    for (int i = 0; i < n_blocks; i++)
        batch->block_table[batch->n_blocks++] = kv_slot(s->kv, r->blocks[i], worker);
    if (samples) {
        batch->sample_row[batch->n_samples] = batch->n_rows - 1;
        batch->sampling[batch->n_samples++] = r->sampling;
    }
    step->requests[batch->n_sequences++] = r;
    r->in_step = true;
}

/* Gives a running request the block for its next token. If none can be freed, the youngest is
 * preempted; the youngest itself waits for the others to end. */
static bool grow(struct sched *s, struct request *r, int worker) {
    if (!lacks_block(r))
        return true;
    int n = count_stalled(s, worker, r) + 1; /* those before it come first */
    struct request *victim = choose_preempted(s, worker);
    if (kv_reclaimable(s->kv, worker) < n && victim != r)
        preempt(s, victim);
    if (!kv_make_room(s->kv, worker, n))
        return false;
    r->blocks[r->n_blocks++] = kv_new(s->kv, worker);
    return true;
}

/* Requests whose last blocks have arrived begin to run; all, before one looks for a victim. */
static void start_arrived(struct sched *s, int worker, double now) {
    struct request *next;
    for (struct request *r = s->admitted.first; r; r = next) {
        next = r->next;
        bool decodes = r->state == REQUEST_HAND_OVER || r->state == REQUEST_RUNNING ||
                       (r->state == REQUEST_LOADING && prefill_left(r) == 0);
        if (r->decode_worker == worker && decodes && blocks_ready(s, r, worker, now) &&
            r->state != REQUEST_RUNNING)
            set_state(s, r, REQUEST_RUNNING);
    }
}

static void add_running(struct sched *s, int worker) {
    for (struct request *r = s->admitted.first; r; r = r->next) /* grow may preempt a later one */
        if (r->decode_worker == worker && r->state == REQUEST_RUNNING &&
            r->n_ready == blocks_of(r->filled) && grow(s, r, worker))
            add_rows(s, r, worker, 1);
}

/* Adds chunks of prompts, the oldest first, at most `chunk` tokens in all. */
static void add_prefill(struct sched *s, int worker, double now) {
    int budget = s->config.chunk;
    struct request *next;
    for (struct request *r = s->admitted.first; r && budget > 0; r = next) {
        next = r->next;
        if (r->prefill_worker != worker || prefill_left(r) == 0)
            continue;
        if (blocks_ready(s, r, worker, now)) {
            if (r->state == REQUEST_LOADING)
                set_state(s, r, REQUEST_PREFILL);
            int n_rows = prefill_left(r) < budget ? prefill_left(r) : budget;
            add_rows(s, r, worker, n_rows);
            budget -= n_rows;
        }
    }
}

struct step *sched_next(struct sched *s, int worker, double now) {
    struct step *step = &s->workers[worker].step;
    struct batch *batch = &step->batch;
    batch->n_rows = batch->n_sequences = batch->n_samples = batch->n_blocks = 0;
    while (admit(s, worker, now)) {
    }
    start_arrived(s, worker, now);
    add_running(s, worker);
    add_prefill(s, worker, now);
    kv_clean(s->kv, worker);
    s->stats.steps += batch->n_rows > 0;
    return batch->n_rows > 0 ? step : NULL;
}

int sched_copies(struct sched *s, int worker, struct kv_copy_order *orders, int most, double now) {
    struct worker *w = &s->workers[worker];
    int n = 0;
    while (n < most && w->n_copying < s->config.copies_in_flight &&
           kv_next_copy(s->kv, worker, &orders[n]))
        w->copying[w->n_copying++] = (struct copying){orders[n++], now};
    w->n_pending = kv_pending(s->kv, worker);
    return n;
}

/* ---- what comes back ---- */

/* Appends a sampled token, or ends the answer. */
static void take_token(struct sched *s, struct request *r, int token, double now) {
    r->last_token = now;
    r->first_token = r->first_token > 0 ? r->first_token : now;
    if (s->config.ends_text[token]) {
        finish(s, r, FINISH_STOP, now);
        return;
    }
    r->tokens[r->length++] = token;
    if (r->length - r->n_prompt >= r->max_new || r->length >= s->max_length)
        finish(s, r, FINISH_LENGTH, now);
}

/* The prompt is done: hands the request over, or goes on where it is. */
static void end_prefill(struct sched *s, struct request *r) {
    if (r->n_prefill_blocks == 0) {
        set_state(s, r, REQUEST_RUNNING);
        return;
    }
    if (r->filled % BLOCK_TOKENS != 0)
        (void)kv_send(s->kv, r->blocks[r->filled / BLOCK_TOKENS], r->decode_worker);
    release_prefill_blocks(s, r);
    r->n_ready = 0;
    s->stats.hand_overs++;
    set_state(s, r, REQUEST_HAND_OVER);
}

void sched_done(struct sched *s, int worker, struct step *step, double now) {
    const struct batch *batch = &step->batch;
    (void)worker;
    for (int i = 0, sample = 0; i < batch->n_sequences; i++) {
        struct request *r = step->requests[i];
        const struct sequence *sequence = &batch->sequence[i];
        int last_row = sequence->first_row + sequence->n_rows - 1;
        bool sampled = sample < batch->n_samples && batch->sample_row[sample] == last_row;
        int token = sampled ? batch->sampled[sample++] : NONE;
        *(sequence->generated ? &s->stats.decode_tokens : &s->stats.prefill_tokens) +=
            sequence->n_rows;
        r->in_step = false;
        r->filled += sequence->n_rows;
        register_full_blocks(s, r);
        if (r->ending != FINISH_NONE) {
            finish(s, r, r->ending, now);
            continue;
        }
        if (sampled)
            take_token(s, r, token, now);
        if (r->state == REQUEST_PREFILL && r->filled == r->prefill_end)
            end_prefill(s, r);
    }
    concern_all(s);
}

void sched_copied(struct sched *s, const struct kv_copy_order *order, bool ok, double now) {
    (void)now;
    struct worker *w = &s->workers[order->worker];
    int i = 0;
    while (w->copying[i].order.to != order->to || w->copying[i].order.to_slot != order->to_slot)
        i++;
    assert(i < w->n_copying);
    memmove(&w->copying[i], &w->copying[i + 1], (size_t)(--w->n_copying - i) * sizeof *w->copying);
    kv_copied(s->kv, order, ok);
    concern_all(s);
}

uint32_t sched_concerned(struct sched *s) {
    for (int w = 0; w < s->config.kv.n_workers; w++) {
        int n = kv_pending(s->kv, w);
        s->concerned |= n > s->workers[w].n_pending ? 1u << w : 0;
        s->workers[w].n_pending = n;
    }
    uint32_t concerned = s->concerned;
    s->concerned = 0;
    return concerned;
}

double sched_next_event(const struct sched *s) {
    double next = s->next_deadline;
    for (int w = 0; w < s->config.kv.n_workers && s->config.copy_seconds > 0; w++)
        if (s->workers[w].n_copying > 0)
            next = fmin(next, s->workers[w].copying[0].started + s->config.copy_seconds);
    return next;
}

/* ---- requests come and go ---- */

void sched_submit(struct sched *s, struct request *r, double now) {
    *r = (struct request){.id = r->id,
                          .tokens = r->tokens,
                          .n_prompt = r->n_prompt,
                          .max_new = r->max_new,
                          .sampling = r->sampling,
                          .deadline = r->deadline,
                          .length = r->n_prompt,
                          .prefill_worker = NONE,
                          .decode_worker = NONE,
                          .saved = NONE,
                          .submitted = now};
    s->stats.submitted++;
    concern_all(s);
    if (r->deadline > 0)
        s->next_deadline = fmin(s->next_deadline, now + r->deadline);
    bool queue_full = s->config.max_queue > 0 && s->n_waiting >= s->config.max_queue;
    list_insert(&s->waiting, r);
    s->n_waiting++;
    int context = s->config.context_length;
    if (r->n_prompt < 1) {
        (void)fail(r->error, "the prompt is empty");
    } else if (r->n_prompt > context) {
        (void)fail(r->error, "the prompt has %d tokens, the model's context is %d", r->n_prompt,
                   context);
    } else if (r->n_prompt > s->max_length) {
        (void)fail(r->error,
                   "the prompt has %d tokens and needs %d KV blocks, a device holds %d; "
                   "raise --kv-device",
                   r->n_prompt, blocks_of(r->n_prompt), s->max_length / BLOCK_TOKENS);
    } else if (queue_full) {
        (void)fail(r->error, "the queue is full: %d requests wait", s->config.max_queue);
    } else {
        size_t n = (size_t)blocks_of(s->max_length) + 1;
        r->blocks = malloc(n * sizeof *r->blocks);
        r->hashes = malloc(n * sizeof *r->hashes);
        if (!r->blocks || !r->hashes)
            (void)fail(r->error, "out of memory");
    }
    if (r->error[0])
        finish(s, r, FINISH_ERROR, now);
}

void sched_cancel(struct sched *s, struct request *r, bool stop_found, double now) {
    enum finish_reason reason = stop_found ? FINISH_STOP : FINISH_CANCELLED;
    if (r->in_step)
        r->ending = reason;
    else if (r->state != REQUEST_FINISHED)
        finish(s, r, reason, now);
}

/* Ends a request with an error, as soon as no step holds it. */
static void give_up(struct sched *s, struct request *r, double now) {
    if (r->in_step)
        r->ending = FINISH_ERROR;
    else
        finish(s, r, FINISH_ERROR, now);
}

/* Ends those of a list whose time has run out; finds the next deadline. */
static void expire_requests(struct sched *s, struct list *list, double now) {
    struct request *next;
    for (struct request *r = list->first; r; r = next) {
        next = r->next;
        double end = r->submitted + r->deadline;
        if (r->deadline <= 0 || r->ending != FINISH_NONE)
            continue;
        if (end <= now) {
            (void)fail(r->error, "its deadline of %g s has passed", r->deadline);
            give_up(s, r, now);
        } else {
            s->next_deadline = fmin(s->next_deadline, end);
        }
    }
}

/* Ends the requests that wait for a block at a place. */
static void expire_copy(struct sched *s, const struct kv_copy_order *order, double now) {
    struct request *next;
    for (struct request *r = s->admitted.first; r; r = next) {
        next = r->next;
        bool prefills = r->state == REQUEST_LOADING || r->state == REQUEST_PREFILL;
        if (order->to != (prefills ? r->prefill_worker : r->decode_worker))
            continue;
        int i = r->n_ready, n = blocks_of(r->filled);
        while (i < n && r->blocks[i] != order->node)
            i++;
        if (i < n) {
            (void)fail(r->error, "a copy of its KV blocks has not ended for %g s",
                       s->config.copy_seconds);
            give_up(s, r, now);
        }
    }
}

void sched_expire(struct sched *s, double now) {
    s->next_deadline = INFINITY;
    expire_requests(s, &s->waiting, now);
    expire_requests(s, &s->admitted, now);
    for (int i = 0; i < s->config.kv.n_workers && s->config.copy_seconds > 0; i++) {
        struct worker *w = &s->workers[i];
        for (int n = w->n_copying; n > 0 && now >= w->copying[0].started + s->config.copy_seconds;
             n--) {
            struct copying late = {w->copying[0].order, now}; /* those who wait for it later too */
            memmove(&w->copying[0], &w->copying[1],
                    (size_t)(w->n_copying - 1) * sizeof *w->copying);
            w->copying[w->n_copying - 1] = late;
            expire_copy(s, &late.order, now);
        }
    }
}

int sched_unfinished(const struct sched *s, int64_t *ids, int most) {
    const struct list *lists[] = {&s->admitted, &s->waiting};
    int n = 0;
    for (int i = 0; i < 2; i++)
        for (const struct request *r = lists[i]->first; r; r = r->next, n++)
            if (n < most)
                ids[n] = r->id;
    return n;
}

/* ---- creation ---- */

static void *carve(char *arena, size_t *end, size_t n, size_t bytes_each) {
    void *array = arena ? arena + *end : NULL;
    *end += (n * bytes_each + 15) / 16 * 16;
    return array;
}

/* Lays the arrays of a worker into its arena, one behind the other; returns the bytes that
 * they take. arena NULL: that alone. */
static size_t lay_out(struct worker *w, char *arena, size_t n_rows, size_t n_blocks,
                      size_t n_copying) {
    struct step *step = &w->step;
    struct batch *batch = &step->batch;
    size_t end = 0;
    w->copying = carve(arena, &end, n_copying, sizeof *w->copying);
    step->requests = carve(arena, &end, n_rows, sizeof *step->requests);
    batch->sequence = carve(arena, &end, n_rows, sizeof *batch->sequence);
    batch->sampling = carve(arena, &end, n_rows, sizeof *batch->sampling);
    batch->token = carve(arena, &end, n_rows, sizeof *batch->token);
    batch->position = carve(arena, &end, n_rows, sizeof *batch->position);
    batch->row_sequence = carve(arena, &end, n_rows, sizeof *batch->row_sequence);
    batch->sample_row = carve(arena, &end, n_rows, sizeof *batch->sample_row);
    batch->sampled = carve(arena, &end, n_rows, sizeof *batch->sampled);
    batch->block_table = carve(arena, &end, n_rows * n_blocks, sizeof *batch->block_table);
    return end;
}

static bool worker_create(struct worker *w, const struct sched *s) {
    size_t n_rows = (size_t)(s->config.max_batch + s->config.chunk);
    size_t n_blocks = (size_t)blocks_of(s->max_length); /* of one request at most */
    size_t n_copying = (size_t)s->config.copies_in_flight;
    w->arena = calloc(1, lay_out(w, NULL, n_rows, n_blocks, n_copying));
    if (w->arena)
        (void)lay_out(w, w->arena, n_rows, n_blocks, n_copying);
    return w->arena;
}

struct sched *sched_create(const struct sched_config *config) {
    struct sched *s = calloc(1, sizeof *s);
    if (!s)
        return NULL;
    s->config = *config;
    s->next_deadline = INFINITY;
    s->max_length = config->context_length;
    for (int i = 0; i < config->kv.n_workers; i++) {
        int capacity = config->kv.device_blocks[i] * BLOCK_TOKENS;
        s->max_length = capacity < s->max_length ? capacity : s->max_length;
    }
    s->kv = kv_create(&config->kv);
    bool ok = s->kv != NULL;
    for (int i = 0; i < config->kv.n_workers; i++)
        ok = worker_create(&s->workers[i], s) && ok;
    if (!ok) {
        sched_destroy(s);
        return NULL;
    }
    return s;
}

void sched_destroy(struct sched *s) {
    for (int i = 0; s && i < s->config.kv.n_workers; i++)
        free(s->workers[i].arena);
    if (s)
        kv_destroy(s->kv);
    free(s);
}

struct kv *sched_kv(struct sched *s) {
    return s->kv;
}

int sched_max_length(const struct sched *s) {
    return s->max_length;
}

struct sched_stats sched_stats(const struct sched *s) {
    return s->stats;
}
