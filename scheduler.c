/* scheduler.c: who computes what next, on two pools of workers.
 *
 * Owns the queue of requests, their life (enum request_state) and their block tables. Refuses to
 * know of time, threads, devices and addresses: a driver asks sched_next for an idle worker's next
 * step and sched_copies for copies, carries them out, and reports sched_done and sched_copied.
 * Every call is a function of the state and its arguments, so the same code runs under tests as on
 * devices. README.md has a picture of a request's life; set_state is the one function that changes
 * it, and withdraw the one way out of it.
 *
 * Admission (each call ends with it, if something has changed) takes waiting requests in the order
 * of arrival, looks for the longest cached prefix, picks a prefill and a decode worker, and
 * reserves all blocks of the prompt on both: what is admitted can reach RUNNING without another
 * block. The pools help each other: decode workers prefill where the others are far behind, prefill
 * workers decode where those are full. A few younger requests may pass one that does not fit. One
 * whose next block another is about to compute waits for it, so each block is computed once. Only a
 * running answer grows, which admission expects; if nothing can be freed for it all the same, the
 * youngest on that worker is preempted, and comes back before others; if that takes long they take
 * turns. The oldest on a worker is never preempted for a younger one, so every request ends.
 *
 * An admitted request stands in one queue of one worker: of its prefill worker until its prompt is
 * computed, then of its decode worker. So a step touches only requests of its worker.
 *
 * Block ownership of a request, by half-open intervals of its table:
 *     [0, filled / 16)         in the index, shared, pinned, never written
 *     [filled / 16, n_blocks)  private: being filled, or reserved for what comes
 * Until it is handed over, those of its prompt are pinned on its prefill worker too.
 * Continuous batching: Yu et al., "Orca", OSDI 2022; chunked prefill: Agrawal et al.,
 * "Sarathi-Serve", OSDI 2024; separate pools: Zhong et al., "DistServe", OSDI 2024; expected
 * growth: Gong et al., "Past-Future scheduler", ASPLOS 2025.
 * Read next: dynamo.c, which drives it. */
#include "dynamo.h"

#include <assert.h>
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    NONE = -1,
    NO_SAMPLE = -2,             /* of rows of which none is a request's last */
    LOCAL_PREFILL_TOKENS = 128, /* less than this after a prefix hit is not worth a hand-over */
    BUSY_CHUNKS = 4,            /* prefill workers so many chunks behind: decode workers help */
    MAX_PASSED = 16,            /* younger requests that may be admitted before the oldest */
    MAX_CANDIDATES = 16,        /* waiting requests that are looked at in vain */
    MAX_PROMPTS = 64,           /* that share a chunk */
    LIKELY_ANSWER = 2048,       /* tokens that an answer is expected to have before any has ended */
    ANSWER_WEIGHT = 16,         /* each answer that ends counts for one of so many */
    GROWTH_SLACK = 26, /* percent beyond its blocks that a worker's answers are let grow to */
    YOUNG_SHARE = 8, /* those in their life's first eighth may end with two eighths of the blocks */
    GROWTH_STEPS = 16, /* steps in which answers grow enough for others to be tried again */
    PATIENCE_MS = 300, /* a preempted answer waits so long before it takes another's place */
    RETURN_MS = 10,    /* after which a worker that could not return tries again */
    SPAN_TOKENS = 32,  /* answers are expected to end within spans of so many tokens */
    N_SPANS = 64       /* the last span is all that is further away */
};

struct list { /* of requests, oldest first; preempted ones in the order in which they were that */
    struct request *first, *last;
    int length;
};

struct worker {
    struct step step;
    struct sampler_top *tops; /* of the step's rows: a request may be gone before it ends */
    struct list prefilling;   /* requests that have prompt tokens to compute here */
    struct list decoding;     /* those that run here, or will when their blocks have arrived */
    int64_t turn;   /* of those decoding, who begins the next step: the first from this id */
    int n_stalled;  /* of those decoding, how many lack a block for their next token */
    int n_admitted; /* requests that decode here, or will */
    int backlog;    /* prompt tokens that are left to those prefilling */
    int n_copying;  /* copies that it was given and that have not ended */
    int64_t chosen; /* the number of the admission that chose it last */
    bool prefills, decodes; /* the role that it is meant to have: see assign_roles */
    bool lost, in_step;     /* it has failed; a step of it is not yet reported */
    double fails, returns;  /* when it is to do so; INFINITY: never */
    int n_steps, last_step; /* that were reported; 0, or that with which it is to fail */
};

struct sched {
    struct sched_config config;
    struct kv *kv;
    struct list waiting, preempted; /* new requests; those that have lost their blocks */
    struct list following;          /* new ones that wait for what another computes */
    struct list released;           /* those that have followed: it is computed, or will not be */
    struct worker workers[MAX_WORKERS];
    int max_length, max_prompt_blocks;    /* the largest text; the largest prefill worker */
    int longest;                          /* text that fits where none has failed */
    int64_t n_changes;                    /* of what may let a waiting request be admitted */
    int64_t n_chosen;                     /* admissions */
    double likely_answer;                 /* tokens */
    uint64_t concerned[MAX_WORKERS / 64]; /* a bit for each worker */
    double next_event; /* no deadline is earlier, nor a worker's failure or return */
    struct sched_stats stats;
};

/* What admission decides about a request. Its hits are the first blocks of its table. */
struct plan {
    int decode_worker, prefill_worker;
    int n_hits;                           /* cached blocks, the saved one included */
    int n_alone;                          /* hits that are on the host alone */
    int missing[MAX_WORKERS + 1];         /* hits that are not at the place; … */
    int loose[MAX_WORKERS + 1];           /* … that are, but nobody has pinned them there */
    int cached, end;                      /* tokens [cached, end) are to be prefilled */
    int n_decode, n_prefill;              /* blocks to hold on each side */
    const char *why_decode, *why_prefill; /* these workers: for the ledger */
};

static int min(int a, int b) {
    return a < b ? a : b;
}

static int max(int a, int b) {
    return a > b ? a : b;
}

/* ---- decisions: change these to try another policy ---- */

/* What prefill steps compute: the prompt; after a preemption also the answer, but for its last
 * token, whose K and V come by decoding. */
static int prefill_end(const struct request *r) {
    return max(r->n_prompt, r->length - 1);
}

static int prefill_left(const struct request *r) {
    return max(prefill_end(r) - r->filled, 0);
}

/* How many of them the next step may compute: rows of the prompt, or of the answer. */
static int rows_left(const struct request *r) {
    return r->filled < r->n_prompt ? r->n_prompt - r->filled : prefill_left(r);
}

/* Tokens that an answer is expected to go on for: until it is as long as answers have been, but at
 * least for a quarter of that, or of what it has. */
static int expected_left(const struct sched *s, const struct request *r) {
    int n = r->length - r->n_prompt, likely = (int)s->likely_answer;
    int left = max(likely - n, max(likely, n) / 4 + 1);
    return max(min(left, min(r->max_new - n, s->max_length - r->length)), 0);
}

static int span_of(int n_tokens) {
    return min(n_tokens / SPAN_TOKENS, N_SPANS - 1);
}

/* Whether a worker holds the answers that are there or on their way, and this one, at any time
 * until the last is expected to end; and whether not too many of them begin together, for they
 * would end together: where each begins a little later, more of them fit. */
static bool room_to_grow(const struct sched *s, const struct request *r, const struct plan *plan,
                         int worker) {
    const struct worker *w = &s->workers[worker];
    int n_blocks = s->config.kv.device_blocks[worker], own = plan->n_decode - plan->n_hits;
    int n_held = n_blocks - kv_reclaimable(s->kv, worker) + plan->missing[worker] +
                 plan->loose[worker]; /* with what it would hold of what it finds */
    int held = n_held, likely = (int)s->likely_answer, n_there = 0;
    if (w->n_admitted == 0 ||
        2 * (held + own + blocks_of(likely) * (w->n_admitted + 1)) <= n_blocks)
        return true;
    int n[N_SPANS] = {0}, blocks[N_SPANS] = {0}; /* answers that end then; what each alone holds */
    int own_left = expected_left(s, r), n_coming = w->n_admitted - w->decoding.length;
    int64_t young = own_left + (int64_t)n_coming * min(likely, own_left); /* tokens to come … */
    int64_t all = young;                                                  /* … of all */
    for (const struct request *o = w->decoding.first; o; o = o->next) {
        int left = expected_left(s, o), span = span_of(left), done = o->length - o->n_prompt;
        young += done * YOUNG_SHARE < done + left ? done + left : 0;
        all += left;
        n[span]++;
        blocks[span] += o->n_blocks - o->cached_tokens / BLOCK_TOKENS;
        held -= o->n_blocks - o->cached_tokens / BLOCK_TOKENS;
    }
    n[span_of(likely)] += n_coming;
    n[span_of(own_left)]++;
    blocks[span_of(own_left)] += own;
    if (young / BLOCK_TOKENS * YOUNG_SHARE > 2 * n_blocks &&
        2 * (n_held + own + all / BLOCK_TOKENS) > n_blocks)
        return false;
    held = max(held, 0);
    for (int span = N_SPANS - 1; span >= 0; span--) { /* those that end later are there, grown */
        held += blocks[span];
        n_there += n[span];
        if (held + n_there * (1 + span * SPAN_TOKENS / BLOCK_TOKENS) >
            n_blocks + n_blocks * GROWTH_SLACK / 100)
            return false;
    }
    return true;
}

/* Blocks that could be freed on a worker for a request, beside those that its answers wait for. */
static int room_on(const struct sched *s, int worker) {
    return kv_reclaimable(s->kv, worker) - s->workers[worker].n_stalled;
}

/* Blocks that a plan's request would pin on a worker, and nobody has yet. */
static int lacks(const struct plan *plan, int worker, bool decodes) {
    int n_blocks = decodes ? plan->n_decode : blocks_of(plan->end);
    return plan->missing[worker] + plan->loose[worker] + n_blocks - plan->n_hits;
}

/* Whether a worker could take a plan's request now: its blocks can be freed there, also those that
 * stalled answers need, and a new answer has room to grow. One that was preempted need not wait for
 * that. */
static bool fits(const struct sched *s, const struct request *r, const struct plan *plan,
                 int worker, bool decodes) {
    int wanted = blocks_of(decodes ? r->length + expected_left(s, r) : plan->end);
    return wanted <= s->config.kv.device_blocks[worker] &&
           lacks(plan, worker, decodes) <= room_on(s, worker) &&
           (!decodes || r->preemptions > 0 || room_to_grow(s, r, plan, worker));
}

/* Which of two workers of equal cost: the one with more room, then the one not chosen for longer.
 * So a cache is not overwritten while another stands empty. */
static bool is_idler(const struct sched *s, int worker, int other) {
    int used = kv_used(s->kv, worker) - kv_used(s->kv, other);
    return used < 0 || (used == 0 && s->workers[worker].chosen < s->workers[other].chosen);
}

/* Which worker decodes a request: of those that have room, the one with the fewest blocks in use
 * and to be fetched. Which one prefills it: the one with the fewest prompt tokens to compute,
 * a block to be fetched counted like one of them. NONE: none has room. */
static int choose_worker(const struct sched *s, const struct request *r, const struct plan *plan,
                         bool decodes) {
    int best = NONE, least = 0;
    for (int i = 0; i < s->config.kv.n_workers; i++) {
        int in_use = s->config.kv.device_blocks[i] - kv_reclaimable(s->kv, i);
        int cost = plan->missing[i] + (decodes ? in_use : s->workers[i].backlog);
        bool can = decodes ? s->config.decodes[i] : s->config.prefills[i];
        bool better = best == NONE || cost < least || (cost == least && is_idler(s, i, best));
        if (can && better && fits(s, r, plan, i, decodes)) {
            best = i;
            least = cost;
        }
    }
    return best;
}

/* Why the decode worker prefills by itself, if it does: it can as well; no prefill worker is as
 * large; there is nothing to compute; little is left after a hit that covers most; or the prefill
 * pool, of which this worker has the least to do, is far behind. */
static const char *prefills_locally(const struct sched *s, const struct plan *plan,
                                    int prefill_worker) {
    int left = plan->end - plan->cached;
    if (s->config.prefills[plan->decode_worker])
        return "local: it does both";
    if (left == 0)
        return "local: nothing to compute";
    if (blocks_of(plan->end) > s->max_prompt_blocks)
        return "local: no prefill worker is as large";
    if (left <= LOCAL_PREFILL_TOKENS && plan->cached > left)
        return "local: the hit covers most";
    if (prefill_worker != NONE &&
        s->workers[prefill_worker].backlog > BUSY_CHUNKS * s->config.chunk)
        return "local: the prefill pool is behind";
    return NULL;
}

/* Whether a prefill worker keeps a request and decodes it, since no decode worker has room: it has
 * room for the answer as well. */
static bool keeps(const struct sched *s, const struct request *r, const struct plan *plan) {
    return plan->prefill_worker != NONE && fits(s, r, plan, plan->prefill_worker, true);
}

/* Which running answer makes room for others: the youngest that was admitted by a given time.
 * NULL: none was. */
static struct request *choose_preempted(const struct worker *w, double by) {
    struct request *r = w->decoding.last;
    while (r && (r->state != REQUEST_RUNNING || r->resumed > by))
        r = r->previous;
    return r;
}

/* How many of the `rest` tokens of a chunk a prompt gets at first: the oldest half of them, of the
 * others those that it is enough for to the end. What is left goes to the oldest that want more. */
static int choose_share(const struct request *r, bool oldest, int rest) {
    int left = rows_left(r);
    return oldest ? min(left, (rest + 1) / 2) : left <= rest ? left : 0;
}

/* ---- lists, states ---- */

static void concern(struct sched *s, int worker) {
    s->concerned[worker / 64] |= (uint64_t)1 << worker % 64;
}

/* Blocks may be free, or be written again: waiting requests can be tried again, and workers whose
 * answers lack some, or wait for some, look. */
static void note_change(struct sched *s) {
    s->n_changes++;
    for (int i = 0; i < s->config.kv.n_workers; i++)
        if (s->workers[i].decoding.first)
            concern(s, i);
}

static void list_remove(struct request *r) {
    *(r->previous ? &r->previous->next : &r->list->first) = r->next;
    *(r->next ? &r->next->previous : &r->list->last) = r->previous;
    r->list->length--;
}

static void list_insert(struct list *list, struct request *r, bool at_end) {
    struct request *before = list->last;
    while (before && before->id > r->id && !at_end)
        before = before->previous;
    r->list = list;
    r->previous = before;
    r->next = before ? before->next : list->first;
    *(r->previous ? &r->previous->next : &list->first) = r;
    *(r->next ? &r->next->previous : &list->last) = r;
    list->length++;
}

static bool lacks_block(const struct request *r) { /* for the token that it computes next */
    return r->state == REQUEST_RUNNING && r->n_blocks * BLOCK_TOKENS <= r->filled;
}

/* The worker whose steps and copies an admitted request waits for now. */
static int worker_of(const struct request *r) {
    return prefill_left(r) > 0 ? r->prefill_worker : r->decode_worker;
}

static struct list *list_of(struct sched *s, const struct request *r) {
    if (r->state == REQUEST_FINISHED)
        return NULL;
    if (r->state == REQUEST_WAITING && r->preemptions == 0 && r->shared > 0)
        return r->leader ? &s->following : &s->released;
    if (r->state == REQUEST_WAITING)
        return r->preemptions > 0 ? &s->preempted : &s->waiting;
    struct worker *w = &s->workers[worker_of(r)];
    return prefill_left(r) > 0 ? &w->prefilling : &w->decoding;
}

/* Puts a request that has changed where it now belongs. */
static void place_request(struct sched *s, struct request *r) {
    struct list *list = list_of(s, r);
    if (list == r->list)
        return;
    list_remove(r);
    r->list = NULL;
    if (list)
        list_insert(list, r, r->state == REQUEST_WAITING);
}

/* The one place where a request's state changes: see the picture in README.md. It goes forward, or
 * leaves. */
static void set_state(struct sched *s, struct request *r, enum request_state state) {
    bool leaves = state == REQUEST_FINISHED || state == REQUEST_WAITING;
    assert(r->state != REQUEST_FINISHED && (leaves ? r->state != state : r->state < state));
    r->state = state;
    bool moves = list_of(s, r) != r->list;
    if (state == REQUEST_RUNNING) /* it may lack one if texts may be longer than when it came */
        s->workers[r->decode_worker].n_stalled += lacks_block(r);
    place_request(s, r);
    if (moves && !leaves)
        concern(s, worker_of(r));
}

/* ---- blocks of a request ---- */

/* Lets go of the blocks on the prefill worker, if that is another. */
static void release_prefill_blocks(struct sched *s, const struct request *r) {
    bool prefills = r->state == REQUEST_LOADING || r->state == REQUEST_PREFILL;
    int n = prefills && r->prefill_worker != r->decode_worker ? blocks_of(prefill_end(r)) : 0;
    while (n > 0)
        kv_unpin(s->kv, r->blocks[--n], r->prefill_worker);
}

static void release_held(struct sched *s, struct request *r) {
    while (r->n_held > 0)
        kv_unpin(s->kv, r->held[--r->n_held], s->config.kv.n_workers);
}

/* Lets go of all blocks, the last first: so it is colder than what stands before it. */
static void release_blocks(struct sched *s, struct request *r) {
    release_held(s, r);
    release_prefill_blocks(s, r);
    if (r->state != REQUEST_WAITING) {
        struct worker *decodes = &s->workers[r->decode_worker];
        decodes->n_admitted--;
        decodes->n_stalled -= lacks_block(r);
        s->workers[r->prefill_worker].backlog -= prefill_left(r);
    }
    while (r->n_blocks > 0)
        kv_unpin(s->kv, r->blocks[--r->n_blocks], r->decode_worker);
    r->n_slots = 0;
    note_change(s);
}

/* Those that follow a request can be admitted when it has computed what they share, or will not. */
static void release_followers(struct sched *s, const struct request *leader) {
    bool computes = leader->state == REQUEST_LOADING || leader->state == REQUEST_PREFILL;
    struct request *next;
    for (struct request *r = s->following.first; r; r = next) {
        next = r->next;
        if (r->leader == leader && (!computes || leader->filled >= r->shared)) {
            r->leader = NULL;
            r->tried = -1;
            r->lacks = 0;
            place_request(s, r);
        }
    }
}

/* Takes a request out of the state it is in, or will when the step is done that it takes part in.
 * FINISH_NONE: back into the queue. Its full blocks stay findable in the cache; the last, partly
 * filled one of an answer is kept for it, so that nothing need be computed again. */
static void withdraw(struct sched *s, struct request *r, enum finish_reason reason, double now) {
    r->leaves = r->in_step;
    r->reason = r->reason == FINISH_NONE ? reason : r->reason;
    if (r->in_step)
        return;
    bool waits = r->reason == FINISH_NONE;
    int worker = r->state == REQUEST_WAITING ? NONE : worker_of(r);
    if (waits && r->state == REQUEST_RUNNING && r->filled % BLOCK_TOKENS != 0)
        kv_keep(s->kv, r->blocks[r->filled / BLOCK_TOKENS], &r->saved);
    else if (!waits && r->saved != NONE)
        kv_unkeep(s->kv, r->saved);
    release_blocks(s, r);
    r->preemptions += waits;
    s->stats.preemptions += waits;
    s->stats.finished += !waits;
    set_state(s, r, waits ? REQUEST_WAITING : REQUEST_FINISHED);
    release_followers(s, r);
    if (waits) {
        note(&s->config.kv.ledger, &(struct event){EVENT_PREEMPTED, .request = r->id,
                                                   .worker = r->decode_worker, .why = r->why});
        return;
    }
    free(r->hashes); /* and the arrays behind them */
    r->hashes = NULL;
    r->last_token = r->last_token > 0 ? r->last_token : now;
    note(&s->config.kv.ledger, &(struct event){.kind = EVENT_FINISHED,
                                               .request = r->id,
                                               .worker = worker,
                                               .n = r->length - r->n_prompt,
                                               .reason = r->reason,
                                               .why = r->error[0] ? r->error : NULL});
}

static void send_back(struct sched *s, struct request *r, const char *why, double now) {
    r->why = why;
    withdraw(s, r, FINISH_NONE, now);
}

/* Sends back who lacks a block where there are no more: a larger worker has them, or none does. */
static void move_on(struct sched *s, struct request *r, double now) {
    if (lacks_block(r) && r->n_blocks == s->config.kv.device_blocks[r->decode_worker])
        send_back(s, r, "it fills its worker", now);
}

/* The chained hash of a full block: those before it have theirs. */
static void hash_block(struct request *r, int i) {
    r->hashes[i] = kv_hash(i > 0 ? r->hashes[i - 1] : 0, r->tokens + (size_t)i * BLOCK_TOKENS);
}

/* Registers the blocks that have become full, from `first` on. Another's may stand for one of them
 * then, in another slot, and be on its way still. */
static void register_full_blocks(struct sched *s, struct request *r, int first) {
    for (int i = first; i < r->filled / BLOCK_TOKENS; i++) {
        if ((i + 1) * BLOCK_TOKENS > r->n_prompt) /* else it was hashed when it came */
            hash_block(r, i);
        r->blocks[i] = kv_register(s->kv, r->blocks[i], i > 0 ? r->blocks[i - 1] : NONE,
                                   r->hashes[i], r->tokens + (size_t)i * BLOCK_TOKENS);
        r->n_slots = min(r->n_slots, i);
    }
}

/* Whether all that is filled has arrived on worker. A copy that failed, for its source was lost, is
 * ordered again, from another place; if there is none the request goes back into the queue. */
static bool blocks_ready(struct sched *s, struct request *r, int worker, double now) {
    for (; r->n_slots < blocks_of(r->filled); r->n_slots++) {
        int node = r->blocks[r->n_slots];
        enum kv_state state = kv_state(s->kv, node, worker);
        if (state == KV_VALID) {
            r->slots[r->n_slots] = kv_slot(s->kv, node, worker);
            continue;
        }
        if (state == KV_RESERVED && !kv_send(s->kv, node, worker))
            send_back(s, r, "a block of it is lost", now);
        return false;
    }
    return true;
}

/* ---- admission ---- */

/* Finds the cached prefix, and where it is. What is on the host alone is held there, so that no
 * room is made at its cost, as long as half of the host stays for others. */
static void look_up(struct sched *s, struct request *r, struct plan *plan) {
    int end = prefill_end(r), host = s->config.kv.n_workers;
    int n_full = (r->length - 1) / BLOCK_TOKENS; /* a token is left to be computed */
    release_held(s, r);
    *plan = (struct plan){.end = end};
    plan->n_hits = kv_find(s->kv, r->hashes, r->tokens, n_full, r->blocks);
    plan->cached = plan->n_hits * BLOCK_TOKENS;
    if (r->saved != NONE && plan->cached == end - end % BLOCK_TOKENS) {
        plan->cached = end;
        r->blocks[plan->n_hits++] = r->saved;
    }
    plan->n_decode = blocks_of(end + (r->max_new > 1 && end < s->max_length)); /* a token's row */
    for (int w = 0; w < host; w++)
        plan->missing[w] = plan->n_hits;
    for (int i = 0; i < plan->n_hits; i++) {
        bool pinned[MAX_WORKERS + 1];
        int places[MAX_WORKERS + 1], n = kv_places(s->kv, r->blocks[i], places, pinned);
        bool alone = n == 1 && places[0] == host;
        while (n > 0) {
            plan->missing[places[--n]]--;
            plan->loose[places[n]] += !pinned[n];
        }
        plan->n_alone += alone;
        if (alone && kv_usage(s->kv, host).pinned < s->config.kv.host_blocks / 2) {
            (void)kv_hold(s->kv, r->blocks[i], host);
            r->held[r->n_held++] = r->blocks[i];
        }
    }
}

/* The admitted request that is about to compute the first block that this one lacks; or NULL. */
static const struct request *find_leader(const struct sched *s, const struct request *r,
                                         const struct plan *plan) {
    int block = plan->n_hits, end = (block + 1) * BLOCK_TOKENS;
    for (int i = 0; i < s->config.kv.n_workers && end < r->length; i++) /* a token is left */
        for (const struct request *o = s->workers[i].prefilling.first; o; o = o->next)
            if (end <= prefill_end(o) && o->filled < end && o->hashes[block] == r->hashes[block])
                return o;
    return NULL;
}

/* A new request waits apart for what another one computes, all that they share: it neither stands
 * in the way of those behind it, nor do they pass it. */
static void follow(struct sched *s, struct request *r, const struct request *leader, int block) {
    int n = min(r->length - 1, prefill_end(leader)) / BLOCK_TOKENS;
    while (block < n && leader->hashes[block] == r->hashes[block])
        block++;
    r->leader = leader;
    r->shared = block * BLOCK_TOKENS;
    place_request(s, r);
    note(&s->config.kv.ledger,
         &(struct event){EVENT_FOLLOWS, .request = r->id, .other = leader->id, .n = r->shared});
}

/* Whether it is worth while to look a request up again. Since its last try the room has come that
 * is made for it; or something has changed, and a worker has as much room as it lacked: of those
 * that prefill, or, where none that decodes had enough, any, for it may be kept. */
static bool may_fit(const struct sched *s, const struct request *r) {
    if (r->tried == s->n_changes)
        return r->makes_room && kv_usage(s->kv, r->room_at).free >= r->lacks;
    for (int i = 0; i < s->config.kv.n_workers && !r->makes_room; i++)
        if ((r->lacks_decoder || s->config.prefills[i]) && room_on(s, i) >= r->lacks)
            return true;
    return r->makes_room;
}

/* For may_fit: what those that have no room lacked, at least. */
static void note_lack(const struct sched *s, struct request *r, const struct plan *plan) {
    r->makes_room = false;
    r->lacks_decoder = plan->decode_worker == NONE;
    r->lacks = INT_MAX;
    for (int i = 0; i < s->config.kv.n_workers; i++)
        if (r->lacks_decoder || s->config.prefills[i])
            r->lacks = min(r->lacks, lacks(plan, i, r->lacks_decoder));
}

/* Chooses the workers. False: none has room. */
static bool choose_workers(struct sched *s, struct request *r, struct plan *plan) {
    plan->decode_worker = choose_worker(s, r, plan, true);
    plan->prefill_worker = choose_worker(s, r, plan, false);
    plan->why_decode = "fewest blocks in use and to be fetched";
    plan->why_prefill = "least to compute and to be fetched";
    const char *local =
        plan->decode_worker != NONE ? prefills_locally(s, plan, plan->prefill_worker) : NULL;
    if (local) {
        plan->prefill_worker = plan->decode_worker;
        plan->why_prefill = local;
    } else if (plan->decode_worker == NONE && keeps(s, r, plan)) {
        plan->decode_worker = plan->prefill_worker;
        plan->why_decode = "kept: no decode worker has room";
    } else if (r->max_new == 1) {
        plan->decode_worker = plan->prefill_worker;
        plan->why_decode = "its one token comes with the prompt";
    }
    plan->n_prefill = plan->prefill_worker == plan->decode_worker ? 0 : blocks_of(plan->end);
    bool ok = plan->decode_worker != NONE && plan->prefill_worker != NONE;
    if (!ok)
        note_lack(s, r, plan);
    return ok;
}

/* Takes all blocks of a plan, on both sides, or none. If there was room nothing had to go to the
 * host for it, so all hits are where they were. */
static bool reserve(struct sched *s, struct request *r, const struct plan *plan) {
    int sides[] = {plan->decode_worker, plan->prefill_worker};
    int n_blocks[] = {plan->n_decode, plan->n_prefill}, n_sides = plan->n_prefill > 0 ? 2 : 1;
    bool ok = true;
    for (int i = 0; i < n_sides; i++) {              /* both begin to make room */
        for (int hit = 0; hit < plan->n_hits; hit++) /* those that are there stay */
            (void)kv_hold(s->kv, r->blocks[hit], sides[i]);
        int n = plan->missing[sides[i]] + n_blocks[i] - plan->n_hits;
        n += s->workers[sides[i]].n_stalled;
        if (kv_make_room(s->kv, sides[i], n))
            continue;
        ok = false;
        r->makes_room = true;
        r->room_at = sides[i];
        r->lacks = n;
    }
    for (int i = 0; i < n_sides; i++) {
        int n_missing = plan->missing[sides[i]];
        for (int hit = 0; hit < plan->n_hits && ok && n_missing > 0; hit++)
            if (kv_state(s->kv, r->blocks[hit], sides[i]) == KV_ABSENT) {
                ok = kv_fetch(s->kv, r->blocks[hit], sides[i]);
                assert(ok); /* there was room */
                n_missing--;
            }
        for (int hit = plan->n_hits - 1; hit >= 0 && !ok; hit--)
            if (kv_state(s->kv, r->blocks[hit], sides[i]) != KV_ABSENT)
                kv_unpin(s->kv, r->blocks[hit], sides[i]);
    }
    for (int i = plan->n_hits; i < plan->n_decode && ok; i++) {
        bool both = i < plan->n_prefill;
        r->blocks[i] = kv_new(s->kv, sides[both]);
        ok = r->blocks[i] != NONE && (!both || kv_reserve(s->kv, r->blocks[i], sides[0]));
        assert(ok);
    }
    return ok;
}

/* Admits a waiting request. False: not now. */
static bool admit(struct sched *s, struct request *r, double now) {
    struct plan plan;
    look_up(s, r, &plan);
    const struct request *leader = find_leader(s, r, &plan);
    if (leader && r->preemptions == 0)
        follow(s, r, leader, plan.n_hits);
    if (leader || !choose_workers(s, r, &plan) || !reserve(s, r, &plan))
        return false;
    release_held(s, r);
    if (r->saved != NONE)
        kv_unkeep(s->kv, r->saved); /* in the table again, or of no use: its tokens come anew */
    r->prefill_worker = plan.prefill_worker;
    r->decode_worker = plan.decode_worker;
    r->n_blocks = plan.n_decode;
    r->filled = plan.cached;
    r->resumed = now;
    r->admitted = r->admitted > 0 ? r->admitted : now;
    struct worker *prefills = &s->workers[plan.prefill_worker];
    struct worker *decodes = &s->workers[plan.decode_worker];
    prefills->backlog += prefill_left(r);
    decodes->n_admitted++;
    prefills->chosen = decodes->chosen = ++s->n_chosen;
    if (r->preemptions > 0) {
        s->stats.recomputed_tokens += plan.end - plan.cached;
    } else {
        r->cached_tokens = plan.cached;
        r->cached_on_host = plan.n_alone * BLOCK_TOKENS;
        s->stats.prefix_hit_tokens += plan.cached;
        s->stats.local_prefills += prefills == decodes && !s->config.prefills[r->decode_worker];
    }
    note(&s->config.kv.ledger, &(struct event){.kind = EVENT_ADMITTED,
                                               .request = r->id,
                                               .from = plan.prefill_worker,
                                               .to = plan.decode_worker,
                                               .n = plan.cached,
                                               .n_host = plan.n_alone * BLOCK_TOKENS,
                                               .why = plan.why_decode,
                                               .why_prefill = plan.why_prefill});
    set_state(s, r, REQUEST_LOADING);
    return true;
}

/* Ends a waiting request whose text no worker that is left can hold. False: one can. */
static bool give_up(struct sched *s, struct request *r, double now) {
    if (r->length <= s->max_length)
        return false;
    (void)fail(r->error, s->max_length > 0 ? "no worker that is left holds so long a text"
                                           : "all workers have failed");
    withdraw(s, r, FINISH_ERROR, now);
    return true;
}

/* Admits what fits: who was preempted, who has followed another, and new ones, each in order. The
 * first of them that does not fit lets at most MAX_PASSED behind it pass. One is tried again when
 * something has changed. */
static void admit_waiting(struct sched *s, double now) {
    const struct list *lists[] = {&s->preempted, &s->released, &s->waiting};
    struct request *passed[] = {NULL, NULL, NULL}, *next;
    for (int i = 0, n = 0; i < 3; i++)
        for (struct request *r = lists[i]->first; r && n < MAX_CANDIDATES; r = next) {
            next = r->next;
            for (int j = 0; j <= i; j++)
                if (passed[j] && passed[j]->n_passed >= MAX_PASSED)
                    return;
            int64_t changes = s->n_changes; /* before what trying it changes */
            if (give_up(s, r, now)) {
                continue;
            } else if (may_fit(s, r) && admit(s, r, now)) {
                for (int j = 0; j <= i; j++)
                    if (passed[j])
                        passed[j]->n_passed++;
            } else if (!r->leader) {
                r->tried = changes;
                passed[i] = passed[i] ? passed[i] : r;
                n++;
            }
        }
}

/* ---- composing a step ---- */

/* Appends rows [start, start + n_rows) of a request to a worker's step, as a sequence. */
static void add_sequence(struct sched *s, struct request *r, int worker, int start, int n_rows) {
    struct step *step = &s->workers[worker].step;
    struct batch *batch = &step->batch;
    int n_blocks = blocks_of(start + n_rows);
    batch->sequence[batch->n_sequences] = (struct sequence){.first_row = batch->n_rows,
                                                            .n_rows = n_rows,
                                                            .start = start,
                                                            .first_block = batch->n_blocks,
                                                            .n_blocks = n_blocks,
                                                            .generated = start >= r->n_prompt};
    for (int i = 0; i < n_rows; i++) {
        batch->token[batch->n_rows] = r->tokens[start + i];
        batch->position[batch->n_rows] = start + i;
        batch->row_sequence[batch->n_rows++] = batch->n_sequences;
    }
    for (; r->n_slots < n_blocks; r->n_slots++)
        r->slots[r->n_slots] = kv_slot(s->kv, r->blocks[r->n_slots], worker);
    memcpy(batch->block_table + batch->n_blocks, r->slots, (size_t)n_blocks * sizeof *r->slots);
    batch->n_blocks += n_blocks;
    if (start + n_rows == r->length) {
        batch->sample_row[batch->n_samples] = batch->n_rows - 1;
        batch->top[batch->n_samples] = r->top ? &s->workers[worker].tops[batch->n_samples] : NULL;
        batch->sampling[batch->n_samples++] = r->sampling;
    }
    step->requests[batch->n_sequences++] = r;
    r->in_step = true;
}

/* The next rows of a request: of its prompt as one sequence. A row of its answer is one by itself,
 * also where it is computed again: so the same kernels compute it, and its bits are the same. */
static void add_rows(struct sched *s, struct request *r, int worker, int n_rows) {
    if (r->filled < r->n_prompt)
        add_sequence(s, r, worker, r->filled, n_rows);
    for (int i = 0; i < n_rows && r->filled >= r->n_prompt; i++)
        add_sequence(s, r, worker, r->filled + i, 1);
}

/* Gives answers that lack a block for their next token one, the oldest first. */
static void give_blocks(struct sched *s, int worker) {
    struct worker *w = &s->workers[worker];
    if (w->n_stalled > 0)
        (void)kv_make_room(s->kv, worker, min(w->n_stalled, kv_reclaimable(s->kv, worker)));
    for (struct request *r = w->decoding.first; r && w->n_stalled > 0; r = r->next) {
        int node = lacks_block(r) ? kv_new(s->kv, worker) : NONE;
        if (node != NONE) {
            r->blocks[r->n_blocks++] = node;
            w->n_stalled--;
        }
    }
}

/* As long as there are not blocks enough for all answers the youngest is preempted, though not for
 * the block that it lacks itself: for that it waits until others end. */
static void preempt(struct sched *s, int worker, double now) {
    struct worker *w = &s->workers[worker];
    while (w->n_stalled > 0) {
        struct request *youngest = choose_preempted(w, INFINITY);
        if (kv_reclaimable(s->kv, worker) >= w->n_stalled - lacks_block(youngest))
            return;
        send_back(s, youngest, "no block is left for all: the youngest", now);
    }
}

/* If there is not room for all answers, they take turns: none waits long. Without a host tier they
 * do not, for each turn would compute anew what was dropped. */
static void rotate(struct sched *s, int worker, double now) {
    struct worker *w = &s->workers[worker];
    const struct request *waits = s->preempted.first;
    if (!waits || waits->decode_worker != worker || s->config.kv.host_blocks == 0 ||
        now < waits->last_token + 1e-3 * PATIENCE_MS ||
        kv_reclaimable(s->kv, worker) >= blocks_of(waits->length) + w->n_stalled)
        return;
    struct request *victim = choose_preempted(w, now - 1e-3 * PATIENCE_MS);
    if (victim && victim != w->decoding.first) /* the oldest stays */
        send_back(s, victim, "its turn is over: another has waited", now);
}

/* Adds a row for each answer that has its blocks. More than max_batch of them take turns. */
static void add_running(struct sched *s, int worker, double now) {
    struct worker *w = &s->workers[worker];
    struct request *r = w->decoding.first, *next;
    int n_rows = s->config.max_batch;
    while (r && r->id < w->turn)
        r = r->next;
    for (int n = w->decoding.length; n > 0 && n_rows > 0; n--, r = next) {
        r = r ? r : w->decoding.first;
        next = r->next;
        if (lacks_block(r) || !blocks_ready(s, r, worker, now))
            continue;
        if (r->state != REQUEST_RUNNING)
            set_state(s, r, REQUEST_RUNNING);
        move_on(s, r, now);
        if (r->state != REQUEST_RUNNING || lacks_block(r))
            continue;
        add_rows(s, r, worker, 1);
        n_rows--;
    }
    w->turn = n_rows == 0 && r ? r->id : 0;
}

/* Adds chunks of prompts, at most `chunk` tokens in all. */
static void add_prefill(struct sched *s, int worker, double now) {
    struct request *ready[MAX_PROMPTS], *next;
    int share[MAX_PROMPTS], n = 0, rest = s->config.chunk;
    for (struct request *r = s->workers[worker].prefilling.first; r && n < MAX_PROMPTS; r = next) {
        next = r->next;
        if (!blocks_ready(s, r, worker, now))
            continue;
        if (r->state == REQUEST_LOADING)
            set_state(s, r, REQUEST_PREFILL);
        ready[n] = r;
        share[n] = choose_share(r, n == 0, rest);
        rest -= share[n++];
    }
    for (int i = 0; i < n; i++) {
        int more = min(rows_left(ready[i]) - share[i], rest);
        rest -= more;
        share[i] += more;
    }
    for (int i = 0; i < 2 * n; i++) { /* rows of answers come first */
        struct request *r = ready[i % n];
        if (share[i % n] > 0 && (r->filled < r->n_prompt) == (i >= n))
            add_rows(s, r, worker, share[i % n]);
    }
}

struct step *sched_next(struct sched *s, int worker, double now) {
    struct step *step = &s->workers[worker].step;
    struct batch *batch = &step->batch;
    if (s->workers[worker].lost)
        return NULL;
    batch->n_rows = batch->n_sequences = batch->n_samples = batch->n_blocks = 0;
    preempt(s, worker, now);
    give_blocks(s, worker);
    rotate(s, worker, now);
    add_running(s, worker, now);
    add_prefill(s, worker, now);
    admit_waiting(s, now);
    kv_clean(s->kv, worker);
    if (batch->n_rows == 0)
        return NULL;
    s->n_changes += ++s->stats.steps % GROWTH_STEPS == 0;
    s->workers[worker].in_step = true;
    return step;
}

int sched_copies(struct sched *s, int worker, struct kv_copy_order *orders, int most) {
    struct worker *w = &s->workers[worker];
    int n = 0;
    for (; n < most && w->n_copying < s->config.copies_in_flight; n++, w->n_copying++)
        if (!kv_next_copy(s->kv, worker, &orders[n]))
            break;
    return n;
}

/* ---- what comes back ---- */

/* Appends a sampled token, or ends the answer. */
static void take_token(struct sched *s, struct request *r, int token, double now) {
    r->last_token = now;
    r->first_token = r->first_token > 0 ? r->first_token : now;
    bool stops = s->config.ends_text[token] && r->length - r->n_prompt >= r->min_new;
    if (!stops)
        r->tokens[r->length++] = token;
    if (!stops && r->length - r->n_prompt < r->max_new && r->length < s->longest)
        return;
    s->likely_answer += (r->length - r->n_prompt - s->likely_answer) / ANSWER_WEIGHT;
    withdraw(s, r, stops ? FINISH_STOP : FINISH_LENGTH, now);
}

/* The prompt is done. What was computed on another worker goes on to the decode worker. */
static void end_prefill(struct sched *s, struct request *r) {
    bool stays = r->prefill_worker == r->decode_worker;
    if (!stays) {
        if (r->filled % BLOCK_TOKENS != 0)
            (void)kv_send(s->kv, r->blocks[r->filled / BLOCK_TOKENS], r->decode_worker);
        release_prefill_blocks(s, r);
        r->n_slots = 0;
        note_change(s);
        s->stats.hand_overs++;
        note(&s->config.kv.ledger,
             &(struct event){EVENT_HANDED_OVER, .request = r->id, .from = r->prefill_worker,
                             .to = r->decode_worker});
    }
    set_state(s, r, stays ? REQUEST_RUNNING : REQUEST_HAND_OVER);
}

/* What n_rows more computed rows of a request come to, and the token sampled of the last: or
 * NO_SAMPLE; or NONE, for the model made no number of them, and nobody shall find their blocks.
 * Nothing is sent before the answer is known to go on. */
static void take_rows(struct sched *s, struct request *r, int worker, int n_rows, int token,
                      double now) {
    struct worker *w = &s->workers[worker];
    int first = r->filled / BLOCK_TOKENS; /* of the blocks that may be full now */
    if (r->state == REQUEST_PREFILL)
        w->backlog -= n_rows;
    r->in_step = false;
    r->filled += n_rows;
    w->n_stalled += lacks_block(r);
    if (token != NONE)
        register_full_blocks(s, r, first);
    release_followers(s, r);
    if (token == NONE && r->reason == FINISH_NONE) {
        (void)fail(r->error, "the model gave a number that is none at token %d", r->length);
        withdraw(s, r, FINISH_ERROR, now);
    } else if (token >= 0 && r->reason == FINISH_NONE) {
        take_token(s, r, token, now);
    }
    if (r->leaves)
        withdraw(s, r, r->reason, now);
    if (r->state != REQUEST_PREFILL && r->state != REQUEST_RUNNING)
        return;
    for (int i = first; i < r->filled / BLOCK_TOKENS; i++)
        (void)kv_send(s->kv, r->blocks[i], r->decode_worker);
    if (r->state == REQUEST_PREFILL && prefill_left(r) == 0)
        end_prefill(s, r);
    move_on(s, r, now);
}

void sched_done(struct sched *s, int worker, struct step *step, double now) {
    const struct batch *batch = &step->batch;
    struct worker *w = &s->workers[worker];
    w->in_step = false;
    if (++w->n_steps == w->last_step) {
        sched_fail(s, worker, now);
        s->next_event = now; /* others may have ended by it: a driver looks */
    }
    if (w->lost)
        return; /* so are its rows; those who wanted them may be gone */
    for (int i = 0, sample = 0; i < batch->n_sequences;) {
        struct request *r = step->requests[i];
        int n_rows = 0;
        for (; i < batch->n_sequences && step->requests[i] == r; i++)
            n_rows += batch->sequence[i].n_rows;
        bool samples = r->filled + n_rows == r->length;
        if (samples && r->top)
            r->top[r->length - r->n_prompt] = *batch->top[sample];
        int token = samples ? batch->sampled[sample++] : NO_SAMPLE;
        *(r->state == REQUEST_RUNNING ? &s->stats.decode_tokens : &s->stats.prefill_tokens) +=
            n_rows;
        take_rows(s, r, worker, n_rows, token, now);
    }
    give_blocks(s, worker);
    admit_waiting(s, now);
}

void sched_copied(struct sched *s, const struct kv_copy_order *order, bool ok, double now) {
    int to = min(order->to, s->config.kv.n_workers - 1); /* the host's: any, none has more room */
    int before = kv_reclaimable(s->kv, to);
    s->workers[order->worker].n_copying--;
    concern(s, order->worker);
    if (order->from < s->config.kv.n_workers)
        concern(s, order->from); /* what was read there may be written again */
    kv_copied(s->kv, order, ok);
    s->n_changes += !ok || kv_reclaimable(s->kv, to) != before;
    admit_waiting(s, now);
}

int sched_concerned(struct sched *s) {
    for (int i = 0; i < MAX_WORKERS / 64; i++) {
        uint64_t all = s->concerned[i];
        s->concerned[i] &= all - 1; /* without the first */
        if (all != 0)
            return 64 * i + __builtin_ctzll(all);
    }
    return NONE;
}

/* ---- requests come and go ---- */

/* One allocation holds the request's arrays. The prompt is hashed once. */
static bool make_tables(const struct sched *s, struct request *r) {
    size_t n = (size_t)blocks_of(r->n_prompt + min(r->max_new, s->longest - r->n_prompt)) + 1;
    r->hashes = malloc(n * (sizeof *r->hashes + 3 * sizeof *r->blocks));
    if (!r->hashes)
        return false;
    r->blocks = (int *)(r->hashes + n);
    r->slots = r->blocks + n;
    r->held = r->slots + n;
    for (int i = 0; i < r->n_prompt / BLOCK_TOKENS; i++)
        hash_block(r, i);
    return true;
}

void sched_submit(struct sched *s, struct request *r, double now) {
    *r = (struct request){.id = r->id,
                          .tokens = r->tokens,
                          .n_prompt = r->n_prompt,
                          .max_new = r->max_new,
                          .min_new = r->min_new,
                          .sampling = r->sampling,
                          .top = r->top,
                          .deadline = r->deadline,
                          .length = r->n_prompt,
                          .prefill_worker = NONE,
                          .decode_worker = NONE,
                          .saved = NONE,
                          .tried = -1,
                          .submitted = now};
    s->stats.submitted++;
    note(&s->config.kv.ledger,
         &(struct event){EVENT_SUBMITTED, .request = r->id, .n = r->n_prompt});
    if (r->deadline > 0)
        s->next_event = fmin(s->next_event, now + r->deadline);
    list_insert(&s->waiting, r, true);
    int context = s->config.context_length, most = s->config.max_queue;
    if (r->n_prompt < 1) {
        (void)fail(r->error, "the prompt is empty");
    } else if (s->max_length == 0) {
        (void)fail(r->error, "all workers have failed");
    } else if (r->n_prompt > context) {
        (void)fail(r->error, "the prompt has %d tokens, the model's context is %d", r->n_prompt,
                   context);
    } else if (r->n_prompt > s->max_length) {
        (void)fail(r->error,
                   "the prompt has %d tokens and needs %d KV blocks, a device holds %d; "
                   "raise --kv-device",
                   r->n_prompt, blocks_of(r->n_prompt), s->max_length / BLOCK_TOKENS);
    } else if (!make_tables(s, r)) {
        (void)fail(r->error, "out of memory");
    } else {
        admit_waiting(s, now);
        if (r->state == REQUEST_WAITING && most > 0 &&
            s->waiting.length + s->released.length + s->following.length > most)
            r->refused =
                !fail(r->error, "the queue is full: as many as --max-queue says, %d", most);
    }
    if (r->error[0])
        withdraw(s, r, FINISH_ERROR, now);
}

void sched_cancel(struct sched *s, struct request *r, bool stop_found, double now) {
    if (r->state != REQUEST_FINISHED)
        withdraw(s, r, stop_found ? FINISH_STOP : FINISH_CANCELLED, now);
    admit_waiting(s, now);
}

/* All lists of requests, one after another: NULL after the last. */
static const struct list *list_at(const struct sched *s, int i) {
    int n = i - 2 * s->config.kv.n_workers;
    if (n < 0)
        return i % 2 == 0 ? &s->workers[i / 2].prefilling : &s->workers[i / 2].decoding;
    const struct list *lists[] = {&s->preempted, &s->released, &s->waiting, &s->following};
    return n < 4 ? lists[n] : NULL;
}

int sched_unfinished(const struct sched *s, int64_t *ids, int most) {
    int n = 0;
    for (int i = 0; list_at(s, i); i++)
        for (const struct request *r = list_at(s, i)->first; r; r = r->next, n++)
            if (n < most)
                ids[n] = r->id;
    return n;
}

/* ---- workers fail, return, and change their roles ---- */

static const char *const role_names[] = {"none", "prefill", "decode", "both"};

/* Who has which role now: as it is meant to be; where no worker is left that has a role, all that
 * are left take it over. */
static void assign_roles(struct sched *s) {
    bool any[2] = {false, false};
    for (int i = 0; i < s->config.kv.n_workers; i++) {
        any[0] = any[0] || (!s->workers[i].lost && s->workers[i].prefills);
        any[1] = any[1] || (!s->workers[i].lost && s->workers[i].decodes);
    }
    s->max_length = s->max_prompt_blocks = 0;
    for (int i = 0; i < s->config.kv.n_workers; i++) {
        const struct worker *w = &s->workers[i];
        int n = s->config.kv.device_blocks[i];
        bool prefills = !w->lost && (w->prefills || !any[0]);
        bool decodes = !w->lost && (w->decodes || !any[1]);
        bool changes = prefills != s->config.prefills[i] || decodes != s->config.decodes[i];
        s->stats.role_changes += changes;
        if (changes)
            note(&s->config.kv.ledger, &(struct event){EVENT_ROLE, .worker = i,
                                                       .why = role_names[prefills + 2 * decodes]});
        s->config.prefills[i] = prefills;
        s->config.decodes[i] = decodes;
        if (decodes)
            s->max_length = max(s->max_length, min(n * BLOCK_TOKENS, s->longest));
        if (prefills)
            s->max_prompt_blocks = max(s->max_prompt_blocks, n);
    }
}

/* Whether a request needs what a worker that has failed had: its memory, or blocks that nobody else
 * has, which were on their way. */
static bool is_hit(const struct sched *s, const struct request *r, int lost) {
    bool hit =
        r->decode_worker == lost || (r->prefill_worker == lost && r->state < REQUEST_HAND_OVER);
    for (int i = 0; i < blocks_of(r->filled) && !hit; i++)
        hit = kv_is_lost(s->kv, r->blocks[i]);
    return hit;
}

/* A worker is another than it was, or, unless NONE, lost: who has something there goes back into
 * the queue, and what waits is looked at anew. */
static void change_roles(struct sched *s, int lost, double now) {
    assign_roles(s);
    note_change(s);
    for (int i = 0; list_at(s, i); i++) {
        struct request *next;
        for (struct request *r = list_at(s, i)->first; r; r = next) {
            next = r->next;
            if (r->state == REQUEST_WAITING) {
                r->makes_room = false;
                r->lacks = 0;
                (void)give_up(s, r, now);
            } else if (lost != NONE && is_hit(s, r, lost)) {
                r->in_step = r->in_step && worker_of(r) != lost; /* that step is void */
                send_back(s, r, "a worker has failed", now);
            }
        }
    }
    admit_waiting(s, now);
}

void sched_fail(struct sched *s, int worker, double now) {
    if (s->workers[worker].lost)
        return;
    s->workers[worker].lost = true;
    note(&s->config.kv.ledger, &(struct event){EVENT_FAILED, .worker = worker});
    kv_lose(s->kv, worker);
    change_roles(s, worker, now);
}

bool sched_return(struct sched *s, int worker, double now) {
    struct worker *w = &s->workers[worker];
    if (!w->lost || w->in_step || !kv_regain(s->kv, worker))
        return false;
    w->lost = false;
    change_roles(s, NONE, now);
    return true;
}

void sched_fail_at(struct sched *s, int worker, double fails, int step, double returns) {
    s->workers[worker].fails = fails;
    s->workers[worker].last_step = step;
    s->workers[worker].returns = returns;
    s->next_event = fmin(s->next_event, fmin(fails, returns));
}

/* Workers fail and return as they are told to: whose step or copies have not ended, later. */
static void expire_workers(struct sched *s, double now) {
    for (int i = 0; i < s->config.kv.n_workers; i++) {
        struct worker *w = &s->workers[i];
        if (w->fails <= now) {
            w->fails = INFINITY;
            sched_fail(s, i, now);
        } else if (w->returns <= now) {
            w->returns = sched_return(s, i, now) ? INFINITY : now + 1e-3 * RETURN_MS;
        }
        s->next_event = fmin(s->next_event, fmin(w->fails, w->returns));
    }
}

void sched_set_role(struct sched *s, int worker, bool prefills, bool decodes, double now) {
    s->workers[worker].prefills = prefills;
    s->workers[worker].decodes = decodes;
    change_roles(s, NONE, now);
}

bool sched_is_lost(const struct sched *s, int worker) {
    return s->workers[worker].lost;
}

struct sched_load sched_load(const struct sched *s) {
    int waiting = s->waiting.length + s->released.length + s->following.length, n_longest = 0;
    struct sched_load load = {.waiting = waiting, .preempted = s->preempted.length, .needed = NONE};
    for (int i = 0; i < s->config.kv.n_workers; i++) {
        if (s->config.decodes[i] && s->config.kv.device_blocks[i] * BLOCK_TOKENS >= s->max_length)
            load.needed = n_longest++ == 0 ? i : NONE;
        load.role[i] = role_names[s->config.prefills[i] + 2 * s->config.decodes[i]];
        load.prefilling[i] = s->workers[i].prefilling.length;
        load.decoding[i] = s->workers[i].decoding.length;
    }
    return load;
}

/* ---- what takes too long ---- */

double sched_next_event(const struct sched *s) {
    return s->next_event;
}

void sched_expire(struct sched *s, double now) {
    s->next_event = INFINITY;
    expire_workers(s, now);
    for (int i = 0; list_at(s, i); i++) {
        struct request *next;
        for (struct request *r = list_at(s, i)->first; r; r = next) {
            next = r->next;
            double end = r->deadline > 0 ? r->submitted + r->deadline : INFINITY;
            if (r->reason == FINISH_NONE && end <= now) {
                (void)fail(r->error, "its deadline of %g s has passed", r->deadline);
                withdraw(s, r, FINISH_ERROR, now);
            } else if (r->reason == FINISH_NONE) {
                s->next_event = fmin(s->next_event, end);
            }
        }
    }
    admit_waiting(s, now);
}

/* ---- creation ---- */

/* All arrays of a worker's step are one piece of memory, which begins with the requests. */
static bool worker_create(struct worker *w, const struct sched *s) {
    struct batch *batch = &w->step.batch;
    size_t n = (size_t)(s->config.max_batch + s->config.chunk);
    size_t n_blocks = (size_t)blocks_of(s->longest); /* of one request at most */
    struct request **requests =
        calloc(n, sizeof *requests + sizeof *batch->sampling + sizeof *batch->top +
                      sizeof *w->tops + sizeof *batch->sequence + (5 + n_blocks) * sizeof(int));
    if (!requests)
        return false;
    w->step.requests = requests;
    batch->sampling = (struct sampling *)(requests + n);
    batch->top = (struct sampler_top **)(batch->sampling + n);
    w->tops = (struct sampler_top *)(batch->top + n);
    batch->sequence = (struct sequence *)(w->tops + n);
    batch->token = (int *)(batch->sequence + n);
    batch->position = batch->token + n;
    batch->row_sequence = batch->position + n;
    batch->sample_row = batch->row_sequence + n;
    batch->sampled = batch->sample_row + n;
    batch->block_table = batch->sampled + n;
    return true;
}

struct sched *sched_create(const struct sched_config *config) {
    struct sched *s = calloc(1, sizeof *s);
    if (!s)
        return NULL;
    s->config = *config;
    s->next_event = INFINITY;
    s->likely_answer = config->likely_answer > 0 ? config->likely_answer : LIKELY_ANSWER;
    for (int i = 0; i < config->kv.n_workers; i++) {
        s->workers[i].prefills = config->prefills[i];
        s->workers[i].decodes = config->decodes[i];
        s->workers[i].fails = s->workers[i].returns = INFINITY;
        if (config->decodes[i])
            s->longest = max(s->longest, config->kv.device_blocks[i] * BLOCK_TOKENS);
    }
    s->longest = min(s->longest, config->context_length);
    assign_roles(s);
    s->kv = kv_create(&config->kv);
    bool ok = s->kv;
    for (int i = 0; i < config->kv.n_workers; i++)
        ok = worker_create(&s->workers[i], s) && ok;
    if (ok)
        return s;
    sched_destroy(s);
    return NULL;
}

void sched_destroy(struct sched *s) {
    for (int i = 0; s && i < s->config.kv.n_workers; i++)
        free(s->workers[i].step.requests);
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

int sched_longest(const struct sched *s) {
    return s->longest;
}

struct sched_stats sched_stats(const struct sched *s) {
    return s->stats;
}
