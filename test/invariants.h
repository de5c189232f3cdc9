/* invariants.h: kvcache.c and scheduler.c as one text, and kv_check and sched_check, which recount
 * everything that they keep track of. A test that includes it can look inside.
 *
 *     #include "invariants.h"
 *     const char *broken = kv_check(kv);   NULL: all is well
 */
#ifndef INVARIANTS_H
#define INVARIANTS_H

#include "../kvcache.c"
#define NONE NO_ONE /* both files have their own */
#include "../scheduler.c"
#undef NONE

#define BROKEN(condition, text)                                                                    \
    do {                                                                                           \
        if (condition) {                                                                           \
            return (text);                                                                         \
        }                                                                                          \
    } while (0)

enum { CHECK_SLOTS = 4096 }; /* no test has a larger place */

/* ---- the cache ---- */

static const char *check_copy(const struct kv *kv, int id, int place) {
    const struct node *node = &kv->nodes[id];
    const struct copy *copy = copy_at(kv, id, place);
    bool in_use = copy->pins > 0 || copy->reads > 0 || copy->list != UNLISTED;
    BROKEN(copy->pins < 0 || copy->reads < 0, "negative pins or reads");
    switch (copy->state) {
    case KV_ABSENT: BROKEN(in_use, "an absent copy is in use"); return NULL;
    case KV_RESERVED:
        BROKEN(copy->pins == 0, "a reserved slot that nobody waits for");
        BROKEN(copy->reads > 0 || copy->list != UNLISTED, "a reserved slot is read or listed");
        break;
    case KV_ARRIVING:
        BROKEN(copy->reads > 0 || copy->list != UNLISTED, "an arriving copy is read or listed");
        break;
    case KV_VALID:
        BROKEN(!in_use && count(kv, id, KV_RESERVED) == 0, "a valid copy is nowhere");
        BROKEN(copy->pins > 0 && copy->list != UNLISTED, "a pinned copy is listed");
        BROKEN(copy->pins == 0 && node->serial && copy->list == UNLISTED, "cached, unlisted");
        BROKEN(copy->list == DUPLICATES && (place != kv->host || count(kv, id, KV_VALID) < 2),
               "not a duplicate");
        BROKEN(copy->list == MAIN && place == kv->host && count(kv, id, KV_VALID) >= 2,
               "a duplicate on the main list");
        break;
    }
    BROKEN(copy->slot < 0 || copy->slot >= kv->places[place].n_slots, "a slot outside its place");
    return NULL;
}

static const char *check_index(const struct kv *kv, int id) {
    const struct node *node = &kv->nodes[id];
    if (!node->serial)
        return NULL;
    BROKEN(node->keeper, "a registered node is kept");
    BROKEN(count(kv, id, KV_VALID) == 0, "a registered node has no valid copy");
    BROKEN(find_child(kv, node->parent, node->hash, node->tokens) != id, "not findable, or twice");
    for (int parent = 0; parent < kv->n_nodes; parent++) {
        BROKEN(parent != id && kv->nodes[parent].serial == node->serial, "two of one number");
        BROKEN(node->parent && kv->nodes[parent].serial == node->parent &&
                   node->hash != kv_hash(kv->nodes[parent].hash, node->tokens),
               "a wrong hash");
    }
    BROKEN(!node->parent && node->hash != kv_hash(0, node->tokens), "a wrong hash");
    return NULL;
}

static const char *check_node(const struct kv *kv, int id) {
    const struct node *node = &kv->nodes[id];
    int n_copies = 0, n_reads = 0, n_arriving = 0, n_pins = 0;
    for (int place = 0; place < kv->n_places; place++) {
        const struct copy *copy = copy_at(kv, id, place);
        const char *broken = check_copy(kv, id, place);
        if (broken)
            return broken;
        n_copies += copy->state != KV_ABSENT;
        n_arriving += copy->state == KV_ARRIVING;
        n_reads += copy->reads;
        n_pins += copy->pins;
    }
    BROKEN(n_reads != n_arriving, "copies in flight and reads differ");
    BROKEN(node->keeper && *node->keeper != id, "a keeper that does not know its node");
    BROKEN(node->keeper && count(kv, id, KV_VALID) == 0, "a kept node has no valid copy");
    BROKEN(n_copies == 0 && (node->serial || node->keeper), "a node without copies");
    BROKEN(n_copies > 0 && !node->serial && !node->keeper && n_pins + n_reads == 0,
           "a private node that nobody owns");
    return check_index(kv, id);
}

static const char *check_list(const struct kv *kv, int place, enum list_kind kind) {
    const struct lru *list = &kv->places[place].lists[kind];
    int length = 0, older = -1;
    for (int id = list->oldest; id != -1; id = copy_at(kv, id, place)->newer) {
        BROKEN(copy_at(kv, id, place)->list != kind, "on a list it does not know of");
        BROKEN(copy_at(kv, id, place)->older != older, "broken list links");
        BROKEN(++length > kv->n_nodes, "a list runs in a circle");
        older = id;
    }
    BROKEN(list->newest != older, "a list ends early");
    BROKEN(list->length != length, "a list's length");
    for (int id = 0; id < kv->n_nodes; id++)
        length -= copy_at(kv, id, place)->list == kind;
    BROKEN(length != 0, "a copy says that it is on a list and is not");
    return NULL;
}

static const char *check_place(const struct kv *kv, int place) {
    const struct place *at = &kv->places[place];
    bool taken[CHECK_SLOTS] = {false};
    int n_taken = at->n_free;
    for (int i = 0; i < at->n_free; i++) {
        BROKEN(taken[at->free_slots[i]], "a slot is free twice");
        taken[at->free_slots[i]] = true;
    }
    for (int id = 0; id < kv->n_nodes; id++) {
        const struct copy *copy = copy_at(kv, id, place);
        if (copy->state != KV_ABSENT) {
            BROKEN(taken[copy->slot], "two copies share a slot, or it is free as well");
            taken[copy->slot] = true;
            n_taken++;
        }
    }
    BROKEN(n_taken != at->n_slots, "a slot is lost");
    for (int i = 0; i < at->in.n + at->out.n; i++) {
        const struct ring *ring = i < at->in.n ? &at->in : &at->out;
        int index = ring->first + (ring == &at->in ? i : i - at->in.n);
        const struct kv_copy_order *order = &ring->orders[index % ring->size];
        const struct copy *source = copy_at(kv, order->node, order->from);
        const struct copy *target = copy_at(kv, order->node, order->to);
        BROKEN(order->worker != place, "an order for another worker");
        BROKEN((order->to == kv->host) != (ring == &at->out), "an order on the wrong ring");
        BROKEN(source->state != KV_VALID || source->slot != order->from_slot, "an order's source");
        BROKEN(target->state != KV_ARRIVING || target->slot != order->to_slot, "an order's target");
    }
    return NULL;
}

static inline const char *kv_check(const struct kv *kv) {
    const char *broken = NULL;
    int n_used = 0;
    for (int id = 0; id < kv->n_nodes && !broken; id++) {
        broken = check_node(kv, id);
        for (int place = 0; place < kv->n_places; place++) {
            if (copy_at(kv, id, place)->state != KV_ABSENT) {
                n_used++;
                break;
            }
        }
    }
    for (int place = 0; place < kv->n_places && !broken; place++) {
        broken = check_place(kv, place);
        for (int kind = MAIN; kind < N_LISTS && !broken; kind++)
            broken = check_list(kv, place, (enum list_kind)kind);
    }
    for (int id = kv->first_free; id != -1 && n_used <= kv->n_nodes; n_used++)
        id = kv->nodes[id].next_in_bucket;
    if (!broken && n_used != kv->n_nodes)
        broken = "a node is lost";
    return broken;
}

static inline int64_t kv_pins(const struct kv *kv) {
    int64_t n = 0;
    for (int i = 0; i < kv->n_nodes * kv->n_places; i++)
        n += kv->copies[i].pins;
    return n;
}

/* ---- the scheduler ---- */

/* Takes the request's pins off `pins` (n_nodes, n_places), and checks its table. */
static const char *check_blocks(const struct sched *s, const struct request *r, int *pins) {
    const struct kv *kv = s->kv;
    for (int i = 0; i < r->n_blocks; i++) {
        int id = r->blocks[i];
        const struct node *node = &kv->nodes[id];
        BROKEN((node->serial != 0) != (i < r->n_registered), "a block is registered, or is not");
        BROKEN(node->keeper, "a block of a table is kept");
        BROKEN(copy_at(kv, id, r->decode_worker)->state == KV_ABSENT, "a block is not there");
        if (node->serial) {
            BROKEN(node->parent != (i > 0 ? kv->nodes[r->blocks[i - 1]].serial : 0),
                   "blocks of another text");
            BROKEN(memcmp(node->tokens, r->tokens + (size_t)i * BLOCK_TOKENS,
                          sizeof node->tokens) != 0,
                   "a block of other tokens");
        }
        pins[id * kv->n_places + r->decode_worker]--;
        if (i < r->n_prefill_blocks)
            pins[id * kv->n_places + r->prefill_worker]--;
    }
    int worker = r->state == REQUEST_LOADING || r->state == REQUEST_PREFILL ? r->prefill_worker
                                                                            : r->decode_worker;
    for (int i = 0; r->in_step && i < blocks_of(r->filled); i++)
        BROKEN(copy_at(kv, r->blocks[i], worker)->state != KV_VALID, "a step reads a lost block");
    return NULL;
}

static const char *check_request(const struct sched *s, const struct request *r, int *pins) {
    bool waits = r->state == REQUEST_WAITING;
    BROKEN(waits && (r->n_blocks > 0 || r->in_step), "a waiting request holds blocks");
    BROKEN(r->saved != -1 && (!waits || r->preemptions == 0), "saved, but not preempted");
    BROKEN(r->saved != -1 && s->kv->nodes[r->saved].keeper != &r->saved, "saved, but not kept");
    BROKEN(r->reason != FINISH_NONE, "a finished request is on a list");
    BROKEN(r->n_held > 0 && !waits, "an admitted request holds copies on the host");
    for (int i = 0; i < r->n_held; i++)
        pins[r->held[i] * s->kv->n_places + s->kv->host]--;
    if (waits)
        return NULL;
    bool prefills = r->state == REQUEST_LOADING || r->state == REQUEST_PREFILL;
    BROKEN(r->max_new > 1 && !s->config.decodes[r->decode_worker],
           "it decodes on a worker that does not");
    BROKEN(r->prefill_worker != r->decode_worker && !s->config.prefills[r->prefill_worker],
           "it prefills on a worker that does not");
    BROKEN(r->n_registered != r->filled / BLOCK_TOKENS, "a full block is not registered");
    BROKEN(r->n_ready < 0 || r->n_ready > blocks_of(r->filled), "n_ready");
    BROKEN(r->n_sent != r->n_registered, "a full block was not sent");
    BROKEN(blocks_of(r->filled) > r->n_blocks, "more filled than it has blocks");
    BROKEN(r->filled > r->prefill_end && prefills, "filled beyond the prompt");
    BROKEN(r->filled != r->length - 1 && r->state == REQUEST_RUNNING, "an answer with a gap");
    BROKEN((r->n_prefill_blocks > 0) != (prefills && r->prefill_worker != r->decode_worker),
           "blocks on the prefill worker");
    for (int i = 0; i < r->n_slots; i++)
        BROKEN(r->slots[i] != kv_slot(s->kv, r->blocks[i], worker_of(r)), "a wrong slot");
    return check_blocks(s, r, pins);
}

static const char *check_requests(struct sched *s, const struct list *list, int *pins) {
    const struct request *previous = NULL;
    int n = 0;
    for (struct request *r = list->first; r; previous = r, r = r->next, n++) {
        const char *broken = check_request(s, r, pins);
        if (broken)
            return broken;
        BROKEN(r->previous != previous, "broken links between requests");
        BROKEN(previous && previous->id >= r->id, "requests are not in order of arrival");
        BROKEN(r->list != list || list_of(s, r) != list, "on the wrong list");
        for (const struct request *o = list->first; o != r && r->state == REQUEST_PREFILL;
             o = o->next)
            BROKEN(o->state == REQUEST_PREFILL &&
                       o->filled / BLOCK_TOKENS == r->filled / BLOCK_TOKENS &&
                       r->filled / BLOCK_TOKENS < (r->prefill_end - 1) / BLOCK_TOKENS &&
                       o->preemptions + r->preemptions == 0 &&
                       memcmp(o->tokens, r->tokens,
                              (size_t)(r->filled / BLOCK_TOKENS + 1) * sizeof(int) *
                                  BLOCK_TOKENS) == 0 &&
                       o->prefill_end >= (r->filled / BLOCK_TOKENS + 1) * BLOCK_TOKENS,
                   "two requests compute the same block");
    }
    BROKEN(list->last != previous, "the last request");
    BROKEN(list->length != n, "a list's length");
    return NULL;
}

/* The sums of a worker against its requests. */
static const char *check_worker(const struct sched *s, int index) {
    const struct worker *w = &s->workers[index];
    int n_admitted = 0, n_blocks = 0, backlog = 0;
    for (int i = 2; list_at(s, i); i++) {
        for (const struct request *r = list_at(s, i)->first; r; r = r->next) {
            n_admitted += r->decode_worker == index;
            n_blocks += r->decode_worker == index ? r->n_blocks : 0;
            backlog += r->prefill_worker == index ? prefill_left(r) : 0;
        }
    }
    BROKEN(n_admitted != w->n_admitted, "n_admitted");
    BROKEN(n_blocks != w->n_blocks, "a worker's sum of blocks");
    BROKEN(backlog != w->backlog, "a worker's backlog");
    BROKEN(w->turn && w->turn->list != &w->queues[RUNNING], "the turn of one that does not run");
    BROKEN(w->n_copying > s->config.copies_in_flight, "too many copies at a time");
    return NULL;
}

static inline const char *sched_check(struct sched *s) {
    const struct kv *kv = s->kv;
    int n = kv->n_nodes * kv->n_places, n_held = 0;
    int *pins = malloc((size_t)n * sizeof *pins);
    for (int i = 0; i < n; i++)
        pins[i] = kv->copies[i].pins;
    const char *broken = NULL;
    for (int i = 0; list_at(s, i) && !broken; i++) {
        broken = check_requests(s, list_at(s, i), pins);
        for (const struct request *r = list_at(s, i)->first; r; r = r->next)
            n_held += r->n_held;
    }
    for (int i = 0; i < n && !broken; i++)
        broken = pins[i] != 0 ? "pins and requests do not add up" : NULL;
    for (int w = 0; w < s->config.kv.n_workers && !broken; w++)
        broken = check_worker(s, w);
    if (!broken && (n_held != s->n_held || n_held > s->config.kv.host_blocks / 2))
        broken = "copies held on the host";
    free(pins);
    return broken;
}

#endif
