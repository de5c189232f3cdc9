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

/* ---- the cache ---- */

static inline int n_slots(const struct kv *kv) { /* of all places, and the number of nodes */
    int n = 0;
    for (int place = 0; place <= kv->host; place++)
        n += kv->places[place].n_slots;
    return n;
}

/* The state of a copy: unlike kv_state also of one that its owner may not write. */
static inline enum kv_state state_of(const struct copy *copy) {
    return copy->standing < IN_USE ? (enum kv_state)copy->standing : KV_VALID;
}

static inline enum kv_state state_at(const struct kv *kv, int id, int place) {
    const struct copy *copy = copy_at(kv, id, place);
    return copy ? state_of(copy) : KV_ABSENT;
}

/* So many copies of a node are in a state. */
static int count(const struct kv *kv, int id, enum kv_state state) {
    int n = 0;
    for (const struct copy *c = kv->nodes[id].first; c; c = c->next)
        n += state_of(c) == state;
    return n;
}

static const int *keeper_of(const struct node *node) { /* NULL: none */
    return node->serial ? NULL : node->keeper;
}

static const char *check_copy(const struct kv *kv, const struct copy *copy) {
    bool cached = copy->standing >= CLEAN;
    BROKEN(copy->pins < 0 || copy->reads < 0, "negative pins or reads");
    bool gone = kv->places[copy->place].gone;
    BROKEN(copy->standing == RESERVED && copy->pins == 0 && !(gone && copy->reads > 0),
           "a reserved slot that nobody waits for");
    BROKEN(copy->standing < IN_USE && copy->reads > 0 && !gone, "a copy without content is read");
    BROKEN(copy->standing >= IN_USE && gone, "a valid copy at a place that is gone");
    BROKEN(copy->standing != standing_of(kv, copy), "a copy's standing");
    BROKEN(copy->unused && (copy->pins > 0 || copy->place == kv->host), "unused, but pinned");
    BROKEN(cached && !is_of_use(&kv->nodes[copy->node]),
           "a private copy is cached that nobody keeps");
    return NULL;
}

static const char *check_index(const struct kv *kv, int id) {
    const struct node *node = &kv->nodes[id];
    if (!node->serial)
        return NULL;
    BROKEN(count(kv, id, KV_VALID) == 0, "a registered node has no valid copy");
    BROKEN(find_child(kv, node->parent, node->hash, node->tokens) != id, "not findable, or twice");
    for (int parent = 0; parent < n_slots(kv); parent++) {
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
    int n_reads = 0, n_arriving = 0, n_pins = 0, n_awaited = 0;
    bool places[MAX_WORKERS + 1] = {false};
    for (const struct copy *copy = node->first; copy; copy = copy->next) {
        BROKEN(copy->node != id || copy->standing == FREE, "a copy of another node, or of none");
        BROKEN(places[copy->place], "two copies at one place");
        places[copy->place] = true;
        n_arriving += copy->standing == IN_FLIGHT;
        n_reads += copy->reads;
        n_pins += copy->pins;
    }
    for (const struct copy *copy = node->first; copy; copy = copy->next) {
        const char *broken = check_copy(kv, copy);
        if (broken)
            return broken;
    }
    BROKEN(n_reads != n_arriving, "copies in flight and reads differ");
    int n_copies = 0;
    for (const struct copy *copy = node->first; copy; copy = copy->next)
        n_copies++;
    int n_places = 0;
    for (int place = 0; place <= kv->host; place++)
        n_places += (int)(node->places[place / 64] >> place % 64 & 1);
    BROKEN(n_copies != n_places, "places of a node's copies");
    BROKEN(node->n_valid != count(kv, id, KV_VALID), "valid copies of a node");
    for (const struct copy *copy = node->first; copy; copy = copy->next)
        n_awaited += is_awaited(kv, copy);
    BROKEN(node->n_awaited != n_awaited, "awaited copies of a node");
    const int *keeper = keeper_of(node);
    BROKEN(keeper && *keeper != id, "a keeper that does not know its node");
    BROKEN(keeper && count(kv, id, KV_VALID) == 0, "a kept node has no valid copy");
    BROKEN(!node->first && is_of_use(node), "a node without copies");
    BROKEN(node->first && !is_of_use(node) && n_pins + n_reads == 0,
           "a private node that nobody owns");
    return check_index(kv, id);
}

/* Walks a run from its coldest; *n counts its copies. */
static const char *walk_run(const struct kv *kv, int place, enum standing standing,
                            const struct copy *copy, int *n) {
    const struct order *order = &kv->places[place].orders[standing];
    BROKEN(copy->colder, "a run that does not begin with its first");
    for (; copy; copy = copy->warmer, ++*n) {
        const struct entry *end = &order->ends[copy->run];
        BROKEN(copy->standing != standing || copy->place != place, "in the wrong order");
        BROKEN(copy->warmer && (copy->warmer->colder != copy || copy->warmer->heat < copy->heat),
               "a run with a colder copy behind a hotter one");
        BROKEN(end->copy == copy && (copy->warmer || end->heat != copy->heat), "an end of a run");
    }
    return NULL;
}

static const char *check_order(const struct kv *kv, int place, enum standing standing) {
    const struct order *order = &kv->places[place].orders[standing];
    const char *broken = NULL;
    int n = 0;
    for (int i = 0; i < order->n_runs && !broken; i++) {
        const struct entry *entry = &order->heap[i];
        BROKEN(entry->copy->at != i, "a copy that does not know its place on the heap");
        BROKEN(entry->copy->heat != entry->heat, "a heap that does not know a copy's heat");
        BROKEN(i > 0 && entry->heat < order->heap[(i - 1) / 2].heat,
               "a heap with a colder copy below a hotter one");
        broken = walk_run(kv, place, standing, entry->copy, &n);
    }
    for (int i = 0; i < OPEN_RUNS && !broken; i++)
        BROKEN(order->ends[i].copy &&
                   (order->ends[i].copy->standing != standing || order->ends[i].copy->run != i),
               "the end of no run");
    BROKEN(!broken && n != kv->places[place].n[standing], "a copy that is on no run");
    return broken;
}

static const char *check_queue(const struct kv *kv, int worker, const struct queue *queue) {
    const struct copy *target = queue->first;
    for (int i = 0; i < queue->n; i++, target = target->after) {
        const struct copy *source = target->from;
        bool out = queue == &kv->places[worker].out;
        BROKEN(target->standing != IN_FLIGHT || source->standing < IN_USE, "an order's ends");
        BROKEN(target->node != source->node, "an order from one block to another");
        BROKEN((target->place == kv->host) != out, "an order in the wrong queue");
        BROKEN((out ? source->place : target->place) != worker, "an order for another worker");
        BROKEN(i == queue->n - 1 && queue->last != target, "a queue's last order");
    }
    return NULL;
}

static const char *check_place(const struct kv *kv, int place) {
    const struct place *at = &kv->places[place];
    int n[N_STANDINGS] = {0}, n_free = 0;
    for (int i = 0; i < at->n_slots; i++) {
        const struct copy *copy = &at->copies[i];
        n[copy->standing]++;
        BROKEN(copy->standing != FREE && copy->place != place, "a slot of another place");
        BROKEN(copy->standing == FREE && (copy->pins > 0 || copy->reads > 0 || copy->unused),
               "a free slot in use");
        BROKEN(copy->standing != FREE && copy_at(kv, copy->node, place) != copy,
               "a slot whose copy its node does not know");
    }
    for (int i = 0; i < N_STANDINGS; i++)
        BROKEN(n[i] != at->n[i], "slots of a standing");
    const struct copy *free = at->free;
    for (; free != at->copies + at->n_slots && n_free < n[FREE]; n_free++) {
        BROKEN(free->standing != FREE, "on the free list, but not free");
        free = free->next ? free->next : free + 1;
    }
    BROKEN(n_free != n[FREE] || free != at->copies + at->n_slots, "a free slot is lost");
    struct kv_usage usage = kv_usage(kv, place);
    BROKEN(usage.free + usage.pinned + usage.cached + usage.in_flight != at->n_slots,
           "the usage of a place does not add up");
    const char *broken = check_order(kv, place, CLEAN);
    broken = broken ? broken : check_order(kv, place, DIRTY);
    broken = broken ? broken : check_queue(kv, place, &at->in);
    return broken ? broken : check_queue(kv, place, &at->out);
}

static inline const char *kv_check(const struct kv *kv) {
    const char *broken = NULL;
    int n_nodes = 0;
    for (int place = 0; place <= kv->host && !broken; place++)
        broken = check_place(kv, place);
    for (int id = 0; id < n_slots(kv) && !broken; id++) {
        broken = check_node(kv, id);
        n_nodes += kv->nodes[id].first != NULL;
    }
    for (int id = kv->first_free; id != n_slots(kv) && n_nodes <= n_slots(kv); n_nodes++)
        id += 1 + kv->nodes[id].next;
    if (!broken && n_nodes != n_slots(kv))
        broken = "a node is lost";
    return broken;
}

static inline int64_t kv_pins(const struct kv *kv) {
    int64_t n = 0;
    for (int c = 0; c < n_slots(kv); c++)
        n += kv->places[0].copies[c].pins;
    return n;
}

/* ---- the scheduler ---- */

/* Takes the request's pins off `pins`, those of each slot, and checks its table. */
static const char *check_blocks(const struct sched *s, const struct request *r, int *pins) {
    const struct kv *kv = s->kv;
    bool prefills = r->state == REQUEST_LOADING || r->state == REQUEST_PREFILL;
    for (int i = 0; i < r->n_blocks; i++) {
        int id = r->blocks[i];
        const struct node *node = &kv->nodes[id];
        BROKEN((node->serial != 0) != (i < r->filled / BLOCK_TOKENS),
               "a block is registered, or is not");
        BROKEN(keeper_of(node), "a block of a table is kept");
        BROKEN(!copy_at(kv, id, r->decode_worker), "a block is not there");
        if (node->serial) {
            BROKEN(node->parent != (i > 0 ? kv->nodes[r->blocks[i - 1]].serial : 0),
                   "blocks of another text");
            BROKEN(memcmp(node->tokens, r->tokens + (size_t)i * BLOCK_TOKENS,
                          sizeof node->tokens) != 0,
                   "a block of other tokens");
        }
        pins[copy_at(kv, id, r->decode_worker) - kv->places[0].copies]--;
        if (prefills && i < blocks_of(prefill_end(r)) && r->prefill_worker != r->decode_worker)
            pins[copy_at(kv, id, r->prefill_worker) - kv->places[0].copies]--;
    }
    for (int i = 0; r->in_step && i < blocks_of(r->filled); i++)
        BROKEN(state_at(kv, r->blocks[i], worker_of(r)) != KV_VALID, "a step reads a lost block");
    return NULL;
}

static const char *check_request(const struct sched *s, const struct request *r, int *pins) {
    bool waits = r->state == REQUEST_WAITING;
    BROKEN(waits && (r->n_blocks > 0 || r->in_step), "a waiting request holds blocks");
    BROKEN(r->saved != -1 && (!waits || r->preemptions == 0), "saved, but not preempted");
    BROKEN(r->saved != -1 && keeper_of(&s->kv->nodes[r->saved]) != &r->saved,
           "saved, but not kept");
    BROKEN(r->reason != FINISH_NONE && !r->leaves, "a finished request is on a list");
    BROKEN(r->leaves && !r->in_step, "it should have left");
    BROKEN(r->n_held > 0 && !waits, "an admitted request holds copies on the host");
    for (int i = 0; i < r->n_held; i++)
        pins[copy_at(s->kv, r->held[i], s->kv->host) - s->kv->places[0].copies]--;
    if (waits)
        return NULL;
    bool prefills = r->state == REQUEST_LOADING || r->state == REQUEST_PREFILL;
    BROKEN(!r->leaves && (s->workers[r->decode_worker].lost ||
                          (prefills && s->workers[r->prefill_worker].lost)),
           "it is on a worker that has failed");
    BROKEN(r->n_slots > blocks_of(r->filled) && !r->in_step, "slots of blocks that are not filled");
    BROKEN(blocks_of(r->filled) > r->n_blocks, "more filled than it has blocks");
    BROKEN(r->filled > prefill_end(r) && prefills, "filled beyond the prompt");
    BROKEN(r->filled != r->length - 1 && r->state == REQUEST_RUNNING, "an answer with a gap");
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
        BROKEN(previous && previous->id >= r->id && r->preemptions + r->shared == 0,
               "requests are not in order of arrival");
        BROKEN(r->list != list || list_of(s, r) != list, "on the wrong list");
    }
    BROKEN(list->last != previous, "the last request");
    BROKEN(list->length != n, "a list's length");
    return NULL;
}

/* Whether two requests that are being prefilled compute the same block next, of which one could use
 * the other's: a token behind it is left to be computed. */
static bool compute_the_same(const struct request *a, const struct request *b) {
    int block = a->filled / BLOCK_TOKENS, end = (block + 1) * BLOCK_TOKENS;
    return b->filled / BLOCK_TOKENS == block && end < a->length && end < b->length &&
           end <= prefill_end(a) && end <= prefill_end(b) &&
           memcmp(a->tokens, b->tokens, (size_t)end * sizeof *a->tokens) == 0;
}

static const char *check_computed_once(const struct sched *s) {
    for (int i = 0; i < s->config.kv.n_workers; i++)
        for (const struct request *a = s->workers[i].prefilling.first; a; a = a->next)
            for (int j = 0; j < s->config.kv.n_workers; j++)
                for (const struct request *b = s->workers[j].prefilling.first; b; b = b->next)
                    BROKEN(a->id < b->id && compute_the_same(a, b), "a block is computed twice");
    return NULL;
}

/* The sums of a worker against its requests. */
static const char *check_worker(const struct sched *s, int index) {
    const struct worker *w = &s->workers[index];
    int n_admitted = 0, n_stalled = 0, backlog = 0;
    for (int i = 0; i < 2 * s->config.kv.n_workers; i++) {
        for (const struct request *r = list_at(s, i)->first; r; r = r->next) {
            n_admitted += r->decode_worker == index;
            n_stalled += r->decode_worker == index && lacks_block(r);
            backlog += r->prefill_worker == index ? prefill_left(r) : 0;
        }
    }
    BROKEN(n_admitted != w->n_admitted, "n_admitted");
    BROKEN(n_stalled != w->n_stalled, "n_stalled");
    BROKEN(backlog != w->backlog, "a worker's backlog");
    BROKEN(w->n_copying > s->config.copies_in_flight, "too many copies at a time");
    return NULL;
}

static inline const char *sched_check(struct sched *s) {
    const struct kv *kv = s->kv;
    int n = n_slots(kv);
    int *pins = malloc((size_t)n * sizeof *pins);
    for (int i = 0; i < n; i++)
        pins[i] = kv->places[0].copies[i].pins;
    const char *broken = NULL;
    for (int i = 0; list_at(s, i) && !broken; i++)
        broken = check_requests(s, list_at(s, i), pins);
    for (int i = 0; i < n && !broken; i++)
        broken = pins[i] != 0 ? "pins and requests do not add up" : NULL;
    for (int w = 0; w < s->config.kv.n_workers && !broken; w++)
        broken = check_worker(s, w);
    broken = broken ? broken : check_computed_once(s);
    free(pins);
    return broken;
}

#endif
