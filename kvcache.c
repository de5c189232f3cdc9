/* kvcache.c: where each KV block is, and which block makes room for another.
 *
 * Owns the slots of every place (each worker's device memory, and the host's), the index of blocks
 * that can be found again by content, and the order in which copies go. Refuses to touch memory: it
 * deals in slot numbers, and what is to be moved leaves as copy orders that somebody else carries
 * out.
 *
 * A *node* is the content of one block. It has a *copy* in a slot of some of the places. A copy is
 *     KV_RESERVED   a slot without content; its copy is not ordered yet, or has failed
 *     KV_ARRIVING   a copy into it is in flight: the slot is neither reused nor freed until it ends
 *     KV_VALID      complete. With pins it is in use; with `reads`, copies are being made from it
 * A private node belongs to one request. A registered node is in the index: it is found by its
 * parent and its own 16 tokens, through a chained hash, but compared in full, so that two texts
 * with one hash stay two texts. Unpinned copies of registered nodes are cached; those of private
 * nodes are freed, unless their owner keeps them.
 *
 * Each slot has one *standing* (enum standing), and each place counts how many have which. Cached
 * copies are clean if the node has another valid copy, on the host or on a peer, else dirty: to
 * drop a clean one loses nothing, and what was its duplicate is dirty from then on. That alone is
 * no reason to go: the coldest copy of a place goes first, clean or dirty, and a dirty one is
 * paged out before it goes. The cleaner does that in advance for the few that are next.
 *
 * Whoever changes a node calls `settle` in the end, which gives each of its copies its standing: so
 * the rules stand in one function. Clean and dirty copies of a place are on a heap each, the
 * coldest on top: a copy that becomes cached costs O(1) when it is the hottest, as it is under LRU,
 * and to take one out, or to go from clean to dirty, costs O(log n) in every order.
 *
 * Invariants (test/invariants.h counts them anew):
 *   - every registered node has a valid copy somewhere;
 *   - a slot is free or belongs to exactly one copy; in-flight copies = reads = orders not ended;
 *   - a request pins the whole path of its blocks on its worker, last block released first, so
 *     under LRU a child is colder than its parent and leaves go first. Should a parent go before
 *     its child, the child cannot be found any more (a parent's serial number is never used again),
 *     and goes in its turn;
 *   - whoever waits for room gets it. A page-out that somebody waits for frees its slot as it ends,
 *     so what others do on the host cannot undo it. If all of the host is pinned (or there is
 *     none), dirty copies are lost rather than waited for. The cleaners alone come to an end: what
 *     one of them takes from the host is not what another has put there (see choose_host_victim).
 * Chained hashing of full blocks as in vLLM (Kwon et al., "PagedAttention", SOSP 2023).
 * Read next: scheduler.c, which alone changes it. */
#include "dynamo.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

enum {
    NONE = -1,
    CLEAN_LOW = 8,   /* the cleaner starts when fewer of the coldest blocks could be reused */
    CLEAN_HIGH = 16, /* it stops at so many: short bursts of bus traffic, no ping-pong */
    CLEAN_SHARE = 8, /* on a small device both are a share of its blocks: one in so many */
    USES_SHIFT = 40  /* heat under LFU: uses above these bits, the time of the last one below */
};

enum standing {
    FREE,
    PINNED,    /* in use, or reserved */
    IN_FLIGHT, /* arriving */
    BUSY,      /* unpinned; a copy is being made from it, or one that has failed will be again */
    LEAVING,   /* likewise, a page-out, so that it can go */
    CLEAN,     /* cached; another copy is valid. Can go at once */
    DIRTY,     /* cached; the only one. Can go once it is paged out, or lost */
    N_STANDINGS
};

struct copy {
    uint64_t heat;  /* smaller is colder; on the host, while it is CLEAN: since when it is that */
    int node, next; /* next: copy of the same node, or free slot of the same place */
    int pins, reads;
    int at;   /* on a heap: the index there. Arriving, its order not given: the next such copy */
    int from; /* arriving: the copy that it is made from */
    unsigned char place, state, standing;
    bool unused; /* it came to a worker when nobody waited for it any more; not pinned since */
};

struct node {
    int *keeper;        /* private and kept while unpinned: set to -1 when the last copy is lost */
    int next_in_bucket; /* or the next free node */
    int first;          /* of its copies; NONE: it is free */
    uint64_t serial, parent; /* numbers of registrations; 0: private | the first block of a text */
    uint64_t hash;           /* of all tokens up to the end of the block */
    int tokens[BLOCK_TOKENS];
};

struct heap { /* each copy is colder than the two below it, at 2 i + 1 and 2 i + 2 */
    int *copies, n;
};

struct queue { /* of copies that arrive and whose orders are not yet given out */
    int first, last, n;
};

struct place {
    int first_slot, n_slots;  /* its copies are kv->copies[first_slot, first_slot + n_slots) */
    int first_free;           /* copy */
    int n[N_STANDINGS];       /* of its slots; their sum is n_slots */
    int wanted;               /* free slots that kv_make_room was last asked for and had not */
    struct heap clean, dirty; /* (n_slots) */
    struct queue in, out;     /* orders for this worker: into it, and to the host */
};

struct kv {
    int n_places, host; /* host == n_places - 1 */
    enum kv_policy policy;
    enum kv_order order;
    int n_nodes, n_buckets;
    int first_free;                       /* node */
    int n_spare;                          /* clean copies on the host that the cleaners may need */
    uint64_t last_serial, clock, version; /* version: of what kv_find returns */
    struct node *nodes;  /* (n_nodes): as many as slots, so a slot is never without one */
    struct copy *copies; /* (n_nodes): one for each slot, those of a place one after another */
    int *buckets;        /* (n_buckets) first node of each chain; a power of two */
    int *heaps;          /* (2, n_nodes) the places' heaps */
    struct place places[MAX_WORKERS + 1];
    struct kv_stats stats;
};

/* Mixes one value into a chained hash (the finalizer of SplitMix64, Steele et al. 2014). */
static uint64_t mix(uint64_t hash, uint64_t value) {
    hash = (hash ^ value) + 0x9e3779b97f4a7c15u;
    hash = (hash ^ (hash >> 30)) * 0xbf58476d1ce4e5b9u;
    hash = (hash ^ (hash >> 27)) * 0x94d049bb133111ebu;
    return hash ^ (hash >> 31);
}

/* ---- decisions: change these to try another policy ---- */

/* How hot a copy is, when it comes and each time its last pin goes. before: when it comes, the heat
 * of the copy that it is made from (0: none); else its own. */
static uint64_t choose_heat(struct kv *kv, uint64_t before, bool comes) {
    uint64_t now = ++kv->clock;
    switch (kv->order) {
    case KV_LRU: return now;
    case KV_FIFO: return comes ? now : before;
    case KV_LFU: return (((before >> USES_SHIFT) + 1) << USES_SHIFT) + now;
    case KV_RANDOM: return mix(0, now);
    }
    return now;
}

/* Which of two cached copies of a place, clean or dirty, goes first. */
static bool colder(const struct kv *kv, int a, int b) {
    return kv->copies[a].heat < kv->copies[b].heat;
}

static int coldest(const struct heap *heap) {
    return heap->n > 0 ? heap->copies[0] : NONE;
}

/* Which copy leaves a worker: the coldest, whatever its standing. */
static int choose_victim(const struct kv *kv, int worker) {
    int clean = coldest(&kv->places[worker].clean), dirty = coldest(&kv->places[worker].dirty);
    return clean == NONE || (dirty != NONE && colder(kv, dirty, clean)) ? dirty : clean;
}

/* Which copy leaves the host: a clean one, whose block is on a device as well, except as many as
 * the cleaners need; then the coldest that is nowhere else; if it is urgent, a clean one. Clean
 * ones go in the order in which they became that: to a cleaner they matter only for as long as
 * their other copies are cold. If they went by heat, cleaners would take what they have just put
 * there, and blocks would go to and fro for ever. */
static int choose_host_victim(const struct kv *kv, bool urgent) {
    const struct place *host = &kv->places[kv->host];
    int alone = coldest(&host->dirty);
    return host->clean.n > (urgent && alone == NONE ? 0 : kv->n_spare) ? coldest(&host->clean)
                                                                       : alone;
}

/* Which copy a block is fetched from: a peer's memory is nearer than the host's. */
static int choose_source(const struct kv *kv, int node) {
    int best = NONE;
    for (int c = kv->nodes[node].first; c != NONE; c = kv->copies[c].next)
        if (kv->copies[c].state == KV_VALID &&
            (best == NONE || kv->copies[c].place < kv->copies[best].place))
            best = c;
    return best;
}

/* ---- heaps ---- */

static void heap_set(struct kv *kv, struct heap *heap, int i, int c) {
    heap->copies[i] = c;
    kv->copies[c].at = i;
}

/* Puts a copy into the gap at i, or where the gap must go: up, or down. */
static void heap_fill(struct kv *kv, struct heap *heap, int i, int c) {
    for (; i > 0 && colder(kv, c, heap->copies[(i - 1) / 2]); i = (i - 1) / 2)
        heap_set(kv, heap, i, heap->copies[(i - 1) / 2]);
    for (int child; (child = 2 * i + 1) < heap->n; i = child) {
        if (child + 1 < heap->n && colder(kv, heap->copies[child + 1], heap->copies[child]))
            child++;
        if (!colder(kv, heap->copies[child], c))
            break;
        heap_set(kv, heap, i, heap->copies[child]);
    }
    heap_set(kv, heap, i, c);
}

static void heap_remove(struct kv *kv, struct heap *heap, int c) {
    int last = heap->copies[--heap->n];
    if (last != c)
        heap_fill(kv, heap, kv->copies[c].at, last);
}

/* How many copies at i and below it are colder than a given one, counted up to `most`. */
static int heap_count(const struct kv *kv, const struct heap *heap, int i, int than, int most) {
    if (most <= 0 || i >= heap->n || !colder(kv, heap->copies[i], than))
        return 0;
    int n = 1 + heap_count(kv, heap, 2 * i + 1, than, most - 1);
    return n + heap_count(kv, heap, 2 * i + 2, than, most - n);
}

/* ---- copies and slots ---- */

static int copy_at(const struct kv *kv, int node, int place) { /* NONE: it has none there */
    int c = kv->nodes[node].first;
    while (c != NONE && kv->copies[c].place != place)
        c = kv->copies[c].next;
    return c;
}

static struct heap *heap_of(struct kv *kv, const struct copy *copy) { /* NULL: on none */
    struct place *place = &kv->places[copy->place];
    return copy->standing == CLEAN ? &place->clean : copy->standing == DIRTY ? &place->dirty : NULL;
}

static void set_standing(struct kv *kv, int c, enum standing standing) {
    struct copy *copy = &kv->copies[c];
    if (copy->standing == standing)
        return;
    if (heap_of(kv, copy))
        heap_remove(kv, heap_of(kv, copy), c);
    kv->places[copy->place].n[copy->standing]--;
    copy->standing = (unsigned char)standing;
    kv->places[copy->place].n[standing]++;
    if (standing == CLEAN && copy->place == kv->host)
        copy->heat = ++kv->clock;
    struct heap *heap = heap_of(kv, copy);
    if (heap)
        heap_fill(kv, heap, heap->n++, c);
}

/* Gives a node a reserved slot at a place, with one pin. NONE: none is free. */
static int occupy(struct kv *kv, int node, int place) {
    struct place *at = &kv->places[place];
    int c = at->first_free;
    if (c == NONE)
        return NONE;
    struct copy *copy = &kv->copies[c];
    at->first_free = copy->next;
    copy->node = node;
    copy->next = kv->nodes[node].first;
    kv->nodes[node].first = c;
    copy->pins = 1;
    copy->state = KV_RESERVED;
    set_standing(kv, c, PINNED);
    return c;
}

static void unlink_copy(struct kv *kv, int c) { /* from its node */
    int *link = &kv->nodes[kv->copies[c].node].first;
    while (*link != c)
        link = &kv->copies[*link].next;
    *link = kv->copies[c].next;
}

static void free_slot(struct kv *kv, int c) {
    struct copy *copy = &kv->copies[c];
    struct place *at = &kv->places[copy->place];
    assert(copy->pins == 0 && copy->reads == 0 && copy->state != KV_ARRIVING);
    kv->stats.unused += copy->unused;
    unlink_copy(kv, c);
    set_standing(kv, c, FREE);
    copy->state = KV_ABSENT;
    copy->unused = false;
    copy->next = at->first_free;
    at->first_free = c;
}

/* ---- the index ---- */

uint64_t kv_hash(uint64_t before, const int *tokens) {
    for (int i = 0; i < BLOCK_TOKENS; i++)
        before = mix(before, (uint64_t)tokens[i]);
    return before;
}

static int *bucket_of(const struct kv *kv, uint64_t hash) {
    return &kv->buckets[hash & (uint64_t)(kv->n_buckets - 1)];
}

static int find_child(const struct kv *kv, uint64_t parent, uint64_t hash, const int *tokens) {
    int id = *bucket_of(kv, hash);
    while (id != NONE) {
        const struct node *node = &kv->nodes[id];
        if (node->parent == parent && node->hash == hash &&
            memcmp(node->tokens, tokens, sizeof node->tokens) == 0)
            break;
        id = node->next_in_bucket;
    }
    return id;
}

/* ---- changing a node ---- */

static void free_node(struct kv *kv, int id) {
    struct node *node = &kv->nodes[id];
    kv->stats.lost += node->serial || node->keeper;
    if (node->serial) {
        kv->version++;
        int *link = bucket_of(kv, node->hash);
        while (*link != id)
            link = &kv->nodes[*link].next_in_bucket;
        *link = node->next_in_bucket;
    }
    if (node->keeper)
        *node->keeper = NONE;
    *node = (struct node){.next_in_bucket = kv->first_free, .first = NONE};
    kv->first_free = id;
}

/* Where a copy belongs whose node has so many valid and reserved copies. */
static enum standing standing_of(const struct copy *copy, int n_valid, int n_reserved) {
    if (copy->state == KV_ARRIVING)
        return IN_FLIGHT;
    if (copy->pins > 0)
        return PINNED;
    if (copy->reads > 0)
        return copy->standing == LEAVING ? LEAVING : BUSY;
    return n_reserved > 0 ? BUSY : n_valid >= 2 ? CLEAN : DIRTY;
}

/* Puts each copy of a changed node where it now belongs; frees a node without copies. */
static void settle(struct kv *kv, int id) {
    const struct node *node = &kv->nodes[id];
    int n[KV_VALID + 1] = {0};
    for (int c = node->first, next; c != NONE; c = next) {
        next = kv->copies[c].next;
        if (kv->copies[c].state == KV_RESERVED && kv->copies[c].pins == 0)
            free_slot(kv, c);
        else
            n[kv->copies[c].state]++;
    }
    for (int c = node->first, next; c != NONE; c = next) {
        enum standing standing = standing_of(&kv->copies[c], n[KV_VALID], n[KV_RESERVED]);
        next = kv->copies[c].next;
        if (standing < CLEAN || node->serial || node->keeper)
            set_standing(kv, c, standing);
        else
            free_slot(kv, c);
    }
    if (node->first == NONE)
        free_node(kv, id);
}

static void pin(struct kv *kv, int c) {
    kv->copies[c].pins++;
    kv->copies[c].unused = false;
    settle(kv, kv->copies[c].node);
}

/* ---- making room ---- */

/* Drops a cached copy. If the block is on the host alone now, its heat goes there. */
static void drop(struct kv *kv, int c) {
    int node = kv->copies[c].node, host = copy_at(kv, node, kv->host);
    *(host == c ? &kv->stats.host_evictions : &kv->stats.evictions) += 1;
    uint64_t heat = kv->copies[c].heat;
    free_slot(kv, c);
    if (host != NONE && host != c && choose_source(kv, node) == host)
        kv->copies[host].heat = heat;
    settle(kv, node);
}

/* Orders a copy from one copy of a node to another; `to` must be KV_RESERVED. */
static void order_copy(struct kv *kv, int from, int to) {
    struct copy *source = &kv->copies[from], *target = &kv->copies[to];
    assert(source->state == KV_VALID && target->state == KV_RESERVED);
    target->state = KV_ARRIVING;
    target->heat = choose_heat(kv, source->heat, true);
    target->from = from;
    target->at = NONE;
    source->reads++;
    struct queue *queue =
        target->place == kv->host ? &kv->places[source->place].out : &kv->places[target->place].in;
    *(queue->n++ > 0 ? &kv->copies[queue->last].at : &queue->first) = to;
    queue->last = to;
    settle(kv, source->node);
}

/* Orders a copy of a worker's copy to the host. False: the host has no room for it now. */
static bool page_out(struct kv *kv, int c, bool urgent) {
    struct place *host = &kv->places[kv->host];
    if (host->n[FREE] == 0) {
        int victim = choose_host_victim(kv, urgent);
        if (victim == NONE)
            return false;
        drop(kv, victim);
    }
    int to = occupy(kv, kv->copies[c].node, kv->host);
    kv->copies[to].pins = 0;
    set_standing(kv, c, LEAVING); /* unless it is pinned */
    order_copy(kv, c, to);
    return true;
}

/* Makes a worker's coldest copy go, at once or when it is paged out. False: it must wait until
 * something on the host that is in flight has come to its end. */
static bool make_leave(struct kv *kv, int c) {
    const struct place *host = &kv->places[kv->host];
    bool may_lose = host->n[PINNED] == host->n_slots;
    if (kv->copies[c].standing == DIRTY && !may_lose)
        return page_out(kv, c, true);
    drop(kv, c);
    return true;
}

/* Slots that are free, will be, or can be at once when it is their turn; counted up to `most`. */
static int count_ready(const struct kv *kv, const struct place *at, int most) {
    int n = at->n[FREE] + at->n[LEAVING];
    return n + heap_count(kv, &at->clean, 0, coldest(&at->dirty), most - n);
}

/* ---- the public functions: see dynamo.h ---- */

static bool allocate(struct kv *kv) {
    size_t n_nodes = (size_t)kv->n_nodes;
    kv->nodes = calloc(n_nodes, sizeof *kv->nodes);
    kv->copies = calloc(n_nodes, sizeof *kv->copies);
    kv->buckets = calloc((size_t)kv->n_buckets, sizeof *kv->buckets);
    kv->heaps = calloc(2 * n_nodes, sizeof *kv->heaps);
    return kv->nodes && kv->copies && kv->buckets && kv->heaps;
}

static int watermark(const struct place *place, int most) {
    int share = place->n_slots / CLEAN_SHARE;
    return share < most ? share : most;
}

/* Sets up place number `index`, whose slots begin at `first` of all slots. */
static void place_create(struct kv *kv, int index, int first) {
    struct place *place = &kv->places[index];
    int n = place->n_slots;
    place->first_slot = first;
    place->first_free = n > 0 ? first : NONE; /* slot 0 is taken first */
    place->n[FREE] = n;
    place->clean.copies = kv->heaps + 2 * (size_t)first;
    place->dirty.copies = place->clean.copies + n;
    for (int i = 0; i < n; i++)
        kv->copies[first + i] =
            (struct copy){.place = (unsigned char)index, .next = i + 1 < n ? first + i + 1 : NONE};
    kv->n_spare += index == kv->host ? 0 : watermark(place, CLEAN_HIGH);
}

void kv_destroy(struct kv *kv) {
    if (kv) {
        free(kv->nodes);
        free(kv->copies);
        free(kv->buckets);
        free(kv->heaps);
    }
    free(kv);
}

struct kv *kv_create(const struct kv_config *config) {
    struct kv *kv = calloc(1, sizeof *kv);
    if (!kv)
        return NULL;
    kv->host = config->n_workers;
    kv->n_places = config->n_workers + 1;
    kv->policy = config->policy;
    kv->order = config->order;
    for (int i = 0; i < kv->n_places; i++) {
        kv->places[i].n_slots = i == kv->host ? config->host_blocks : config->device_blocks[i];
        kv->n_nodes += kv->places[i].n_slots;
    }
    for (kv->n_buckets = 16; kv->n_buckets < kv->n_nodes;)
        kv->n_buckets *= 2;
    if (!allocate(kv)) {
        kv_destroy(kv);
        return NULL;
    }
    for (int i = 0, first = 0; i < kv->n_places; first += kv->places[i++].n_slots)
        place_create(kv, i, first);
    for (int i = 0; i < kv->n_nodes; i++)
        kv->nodes[i] =
            (struct node){.first = NONE, .next_in_bucket = i + 1 < kv->n_nodes ? i + 1 : NONE};
    for (int i = 0; i < kv->n_buckets; i++)
        kv->buckets[i] = NONE;
    return kv;
}

int kv_find(const struct kv *kv, const uint64_t *hashes, const int *tokens, int max_blocks,
            int *nodes) {
    uint64_t parent = 0;
    int n = 0;
    for (; n < max_blocks; n++) {
        nodes[n] = find_child(kv, parent, hashes[n], tokens + (size_t)n * BLOCK_TOKENS);
        if (nodes[n] == NONE)
            break;
        parent = kv->nodes[nodes[n]].serial;
    }
    return n;
}

uint64_t kv_version(const struct kv *kv) {
    return kv->version;
}

int kv_reclaimable(const struct kv *kv, int worker) {
    const int *n = kv->places[worker].n;
    return n[FREE] + n[BUSY] + n[LEAVING] + n[CLEAN] + n[DIRTY];
}

bool kv_make_room(struct kv *kv, int worker, int n) {
    struct place *at = &kv->places[worker];
    at->wanted = kv_reclaimable(kv, worker) >= n ? n : 0;
    while (at->n[FREE] + at->n[LEAVING] < at->wanted) {
        int victim = choose_victim(kv, worker);
        if (victim == NONE || !make_leave(kv, victim))
            break;
    }
    bool ok = at->n[FREE] >= n;
    at->wanted = ok ? 0 : at->wanted;
    return ok;
}

void kv_clean(struct kv *kv, int worker) {
    const struct place *at = &kv->places[worker];
    int low = watermark(at, CLEAN_LOW), high = watermark(at, CLEAN_HIGH);
    if (at->dirty.n > 0 && count_ready(kv, at, low) < low)
        while (at->dirty.n > 0 && count_ready(kv, at, high) < high &&
               page_out(kv, coldest(&at->dirty), false)) {
        }
}

int kv_new(struct kv *kv, int worker) {
    int id = kv->first_free, c = id == NONE ? NONE : occupy(kv, id, worker);
    if (c == NONE)
        return NONE;
    kv->first_free = kv->nodes[id].next_in_bucket;
    kv->copies[c].state = KV_VALID;
    kv->copies[c].heat = choose_heat(kv, 0, true);
    return id;
}

bool kv_reserve(struct kv *kv, int node, int worker) {
    assert(copy_at(kv, node, worker) == NONE);
    return occupy(kv, node, worker) != NONE;
}

bool kv_send(struct kv *kv, int node, int worker) {
    int from = choose_source(kv, node), to = copy_at(kv, node, worker);
    if (to != NONE && kv->copies[to].state == KV_RESERVED && from != NONE)
        order_copy(kv, from, to);
    return from != NONE;
}

bool kv_fetch(struct kv *kv, int node, int worker) {
    int c = copy_at(kv, node, worker);
    if (c != NONE)
        pin(kv, c);
    else if (choose_source(kv, node) == NONE || occupy(kv, node, worker) == NONE)
        return false;
    return kv_send(kv, node, worker);
}

void kv_hold(struct kv *kv, int node, int place) {
    int c = copy_at(kv, node, place);
    assert(c != NONE && kv->copies[c].state != KV_RESERVED);
    pin(kv, c);
}

void kv_unpin(struct kv *kv, int node, int place) {
    int c = copy_at(kv, node, place);
    assert(c != NONE && kv->copies[c].pins > 0);
    if (--kv->copies[c].pins == 0)
        kv->copies[c].heat = choose_heat(kv, kv->copies[c].heat, false);
    settle(kv, node);
}

enum kv_state kv_state(const struct kv *kv, int node, int place) {
    int own = copy_at(kv, node, place);
    enum kv_state state = own == NONE ? KV_ABSENT : kv->copies[own].state;
    for (int c = kv->nodes[node].first; c != NONE && !kv->nodes[node].serial;
         c = kv->copies[c].next)
        if (state == KV_VALID && kv->copies[c].reads > 0)
            state = KV_ARRIVING; /* its owner must not write it while it is being copied */
    return state;
}

int kv_slot(const struct kv *kv, int node, int worker) {
    return copy_at(kv, node, worker) - kv->places[worker].first_slot;
}

/* Moves the pins of a private node to the node that was registered first with its content, and
 * with them its slots where that one has none. */
static void merge(struct kv *kv, int private, int winner) {
    for (int c = kv->nodes[private].first, next; c != NONE; c = next) {
        struct copy *mine = &kv->copies[c];
        int other = copy_at(kv, winner, mine->place);
        next = mine->next;
        assert(mine->reads == 0 && mine->state != KV_ARRIVING && mine->standing == PINNED);
        if (other == NONE) {
            unlink_copy(kv, c);
            mine->node = winner;
            mine->next = kv->nodes[winner].first;
            kv->nodes[winner].first = c;
        } else {
            kv->copies[other].pins += mine->pins;
            kv->copies[other].unused = false;
            mine->pins = 0;
        }
    }
    settle(kv, winner);
    settle(kv, private);
}

int kv_register(struct kv *kv, int id, int parent, uint64_t hash, const int *tokens) {
    struct node *node = &kv->nodes[id];
    const struct node *before = parent == NONE ? NULL : &kv->nodes[parent];
    assert(!node->serial && (!before || before->serial));
    node->parent = before ? before->serial : 0;
    node->hash = hash;
    int winner = find_child(kv, node->parent, node->hash, tokens);
    if (winner != NONE) {
        merge(kv, id, winner);
        return winner;
    }
    kv->version++;
    node->serial = ++kv->last_serial;
    memcpy(node->tokens, tokens, sizeof node->tokens);
    node->next_in_bucket = *bucket_of(kv, node->hash);
    *bucket_of(kv, node->hash) = id;
    if (kv->policy == KV_WRITE_THROUGH && kv->places[kv->host].n_slots > 0)
        (void)page_out(kv, choose_source(kv, id), true);
    return id;
}

void kv_keep(struct kv *kv, int node, int *keeper) {
    kv->nodes[node].keeper = keeper;
    *keeper = node;
}

void kv_unkeep(struct kv *kv, int node) {
    *kv->nodes[node].keeper = NONE;
    kv->nodes[node].keeper = NULL;
    settle(kv, node);
}

bool kv_next_copy(struct kv *kv, int worker, struct kv_copy_order *order) {
    struct place *at = &kv->places[worker];
    struct queue *queue = at->in.n > 0 ? &at->in : &at->out;
    if (queue->n == 0)
        return false;
    int to = queue->first, from = kv->copies[to].from;
    int target = kv->copies[to].place, source = kv->copies[from].place;
    *order = (struct kv_copy_order){worker,
                                    kv->copies[to].node,
                                    source,
                                    target,
                                    from - kv->places[source].first_slot,
                                    to - kv->places[target].first_slot};
    queue->first = kv->copies[to].at;
    queue->n--;
    return true;
}

void kv_copied(struct kv *kv, const struct kv_copy_order *order, bool ok) {
    struct place *from = &kv->places[order->from], *to = &kv->places[order->to];
    int c = from->first_slot + order->from_slot;
    struct copy *source = &kv->copies[c], *target = &kv->copies[to->first_slot + order->to_slot];
    assert(target->state == KV_ARRIVING && target->from == c && source->reads > 0);
    bool leaves = source->standing == LEAVING;
    source->reads--;
    target->state = ok ? KV_VALID : KV_RESERVED;
    target->unused = ok && order->to != kv->host && target->pins == 0;
    int64_t *count = order->to == kv->host     ? &kv->stats.pages_out
                     : order->from == kv->host ? &kv->stats.pages_in
                                               : &kv->stats.transfers;
    *count += ok;
    settle(kv, order->node);
    if (leaves && source->standing == CLEAN && from->n[FREE] < from->wanted)
        drop(kv, c);
}

int kv_pending(const struct kv *kv, int worker) {
    return kv->places[worker].in.n + kv->places[worker].out.n;
}

int kv_used(const struct kv *kv, int place) {
    return kv->places[place].n_slots - kv->places[place].n[FREE];
}

struct kv_usage kv_usage(const struct kv *kv, int place) {
    const int *n = kv->places[place].n;
    return (struct kv_usage){.free = n[FREE],
                             .pinned = n[PINNED],
                             .cached = n[BUSY] + n[LEAVING] + n[CLEAN] + n[DIRTY],
                             .in_flight = n[IN_FLIGHT]};
}

struct kv_stats kv_stats(const struct kv *kv) {
    return kv->stats;
}
