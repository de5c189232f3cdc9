/* kvcache.c: where each KV block is, and which block makes room for another.
 *
 * Owns the slots of every place (each worker's device memory, and the host's), the index of blocks
 * that can be found again by content, and the order in which copies go. Refuses to touch memory: it
 * deals in slot numbers; what is to be moved leaves as copy orders that somebody else carries out.
 *
 * A *node* is the content of one block. It has a *copy* in a slot of some of the places. A private
 * node belongs to one request. A registered node is in the index: it is found by its parent and its
 * own 16 tokens, through a chained hash, but compared in full, so that two texts with one hash stay
 * two texts. Unpinned copies of registered nodes are cached; those of private nodes are freed,
 * unless their owner keeps them.
 *
 * Cached copies are clean if the node has another valid one, on the host or a peer, else dirty: to
 * drop a clean one loses nothing, and what was its duplicate is dirty from then on. But that is no
 * reason to go: the coldest copy of a worker goes first, and if it is dirty it is paged out before
 * it goes (of the host: see choose_host_victim). The cleaner does so in advance for the few next.
 *
 * Whoever changes a copy calls `settle_copy` in the end, which gives it its standing (enum
 * standing): so the rules stand in one function; then `settle`, which does so with the others of
 * its node if it matters to them. Clean and dirty copies of a place lie in *runs*, lists in which
 * each copy is warmer than the one before, and the coldest of each run is on a heap. A copy joins a
 * run behind its end if one is still open that is colder. Under LRU heats mostly grow, so runs are
 * few beside copies, and to come and go mostly costs O(1); in any order it costs O(log n) at most.
 *
 * Invariants (test/invariants.h counts them anew):
 *   - every registered node has a valid copy somewhere;
 *   - a slot is free or belongs to exactly one copy; in-flight copies = reads = orders not ended;
 *   - a request pins the whole path of its blocks on its worker, last block released first, so
 *     under LRU a child is colder than its parent and leaves go first. Should a parent go before
 *     its child, the child cannot be found any more (a parent's serial number is never used again),
 *     and goes in its turn;
 *   - room that unpinned copies can give comes: a page-out frees its slot as it ends if somebody
 *     waits for that, so what others do on the host cannot undo it; if all of the host is pinned,
 *     or there is none, dirty copies are lost. Cleaners come to an end: see choose_host_victim.
 * Chained hashing of full blocks as in vLLM (Kwon et al., "PagedAttention", SOSP 2023).
 * Read next: scheduler.c, which alone changes it. */
#include "dynamo.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum {
    NONE = -1,
    CLEAN_LOW = 8,   /* the cleaner starts when fewer of the coldest blocks could be reused */
    CLEAN_HIGH = 16, /* it stops at so many: short bursts of bus traffic, no ping-pong */
    CLEAN_SHARE = 8, /* on a small device both are a share of its blocks: one in so many */
    OPEN_RUNS = 8,   /* workers' blocks come to the host in turns, each time many of one worker */
    USES_SHIFT = 40  /* heat under LFU: uses above these bits, the time of the last one below */
};

/* How it is with a slot. Its state (enum kv_state) goes on here: from IN_USE on it is KV_VALID. */
enum standing {
    FREE = KV_ABSENT,
    RESERVED = KV_RESERVED, /* pinned, but empty: its copy is not yet ordered, or has failed; or …
                              * … its place is gone, and it is pinned or being read all the same */
    IN_FLIGHT = KV_ARRIVING, /* a copy into it is under way: not reused or freed until that ends */
    IN_USE = KV_VALID,       /* complete, and pinned */
    BUSY,    /* unpinned; a copy is being made from it, or one that has failed will be again */
    LEAVING, /* likewise, a page-out, so that it can go */
    CLEAN,   /* cached; another copy is valid. Can go at once */
    DIRTY,   /* cached; the only one. Can go once it is paged out, or lost */
    N_STANDINGS
};

struct copy {
    uint64_t heat;     /* smaller is colder; on the host, while CLEAN: since when it is that */
    struct copy *next; /* of the same node; or of the free slots (NULL: the one behind it) */
    union {
        struct copy *from;   /* IN_FLIGHT: that which it is made from. NULL: none was ordered yet */
        struct copy *colder; /* CLEAN, DIRTY: that before it in its run; NULL: it is on the heap */
    };
    union {
        struct copy *after;  /* IN_FLIGHT: the next in the queue of orders */
        struct copy *warmer; /* CLEAN, DIRTY: that behind it in its run */
    };
    int node, pins, at;              /* at: its index on a heap */
    unsigned char place, reads, run; /* reads: copies made from it now; run: which end it was */
    enum standing standing : 7;
    bool unused : 1; /* it came to a worker when nobody waited for it any more; not pinned since */
};

struct node { /* two lines of a processor's cache; most of what is done needs the first alone */
    struct copy *first;      /* of its copies; NULL: the node is free */
    uint64_t serial, parent; /* numbers of registrations; 0: private | the first block of a text */
    union {
        uint64_t hash; /* registered: of all tokens up to the end of the block */
        int *keeper;   /* private, and kept if not NULL: set to -1 when the last copy is lost */
    };
    uint64_t places[MAX_WORKERS / 64 + 1]; /* a bit for each that has a copy */
    int next; /* in its bucket; or of the free nodes, how many it is behind + 1 */
    unsigned char n_valid, n_awaited; /* of its copies: see is_awaited; and … */
    unsigned char matters;            /* … what matters to each of them, when it was settled */
    int tokens[BLOCK_TOKENS];
};

struct entry { /* of a heap; a copy's heat stands here too, so that comparing does not fetch it */
    uint64_t heat;
    struct copy *copy;
};

struct order {          /* the copies of a place that are CLEAN, or DIRTY */
    struct entry *heap; /* (n_runs) the coldest of each run; each colder than the two below it */
    int n_runs;
    struct entry ends[OPEN_RUNS]; /* the last of the runs that may go on; heat 0: none */
};

struct queue { /* of copies that arrive, whose orders are not yet given out */
    struct copy *first, *last;
    int n;
};

struct place {
    int n_slots, n[N_STANDINGS]; /* n: slots of each standing; their sum is n_slots */
    int wanted; /* free slots, the most that kv_make_room was asked for and has not */
    bool gone;  /* a worker that has failed, with all that its slots held */
    struct copy *copies, *free;       /* copies (n_slots): a slot's number is its index */
    struct order orders[N_STANDINGS]; /* of CLEAN and of DIRTY; the others have no heap */
    struct queue in, out;             /* orders for this worker: into it, and to the host */
};

struct kv {
    struct kv_config config;
    int host;                    /* its place, behind the workers */
    int n_spare;                 /* clean copies on the host that the cleaners may need */
    int n_void;                  /* copies in flight to the host from workers that are gone */
    int first_free;              /* node */
    uint64_t clock, last_serial; /* last_serial: of the last registration */
    struct node *nodes;          /* as many as slots, so none is without one */
    size_t n_buckets;            /* a power of two */
    int *buckets;                /* (n_buckets) first node of each chain */
    struct place places[MAX_WORKERS + 1];
    uint64_t wanting[MAX_WORKERS / 64]; /* a bit for each worker whose `wanted` is not 0 */
    struct kv_stats stats;
};

/* Mixes one value into a chained hash (the finalizer of SplitMix64, Steele et al. 2014). */
static uint64_t mix(uint64_t hash, uint64_t value) {
    hash = (hash ^ value) + 0x9e3779b97f4a7c15u;
    hash = (hash ^ (hash >> 30)) * 0xbf58476d1ce4e5b9u;
    hash = (hash ^ (hash >> 27)) * 0x94d049bb133111ebu;
    return hash ^ (hash >> 31);
}

static struct copy *coldest(const struct place *at, enum standing standing) {
    return at->n[standing] > 0 ? at->orders[standing].heap[0].copy : NULL;
}

/* ---- decisions: change these to try another policy ---- */

/* How hot a copy is, when it comes and each time its last pin goes. before: when it comes, the heat
 * of the copy that it is made from (0: none); else its own. */
static uint64_t choose_heat(struct kv *kv, uint64_t before, bool comes) {
    uint64_t now = ++kv->clock;
    switch (kv->config.order) {
    case KV_FIFO: return comes ? now : before;
    case KV_LFU: return (((before >> USES_SHIFT) + 1) << USES_SHIFT) + now;
    case KV_RANDOM: return mix(0, now);
    default: return now; /* KV_LRU */
    }
}

/* Which copy leaves a worker: the coldest, clean or dirty. NULL: none is cached. */
static struct copy *choose_victim(const struct place *worker) {
    struct copy *clean = coldest(worker, CLEAN), *dirty = coldest(worker, DIRTY);
    return !clean || (dirty && dirty->heat < clean->heat) ? dirty : clean;
}

/* Which copy leaves the host: a clean one, whose block is on a device as well, except as many as
 * the cleaners need; then the coldest that is nowhere else; if it is urgent, a clean one. Clean
 * ones go in the order in which they became that: to a cleaner they matter only for as long as
 * their other copies are cold. If they went by heat, cleaners would take what they have just put
 * there, and blocks would go to and fro for ever. */
static struct copy *choose_host_victim(const struct kv *kv, bool urgent) {
    const struct place *host = &kv->places[kv->host];
    int n_spare = urgent && host->n[DIRTY] == 0 ? 0 : kv->n_spare;
    return coldest(host, host->n[CLEAN] > n_spare ? CLEAN : DIRTY);
}

/* Which copy a block is fetched from: a peer's memory is nearer than the host's. */
static struct copy *choose_source(const struct kv *kv, int node) {
    struct copy *best = NULL;
    for (struct copy *c = kv->nodes[node].first; c; c = c->next)
        if (c->standing >= IN_USE && (!best || c->place < best->place))
            best = c;
    return best;
}

/* ---- heaps ---- */

static void heap_set(struct entry *heap, int i, struct entry entry) {
    heap[i] = entry;
    entry.copy->at = i;
}

/* Puts an entry into the gap at i of a heap of n, or where the gap must go: up, or down. */
static void heap_fill(struct entry *heap, int n, int i, struct entry entry) {
    for (int up; i > 0 && entry.heat < heap[up = (i - 1) / 2].heat; i = up)
        heap_set(heap, i, heap[up]);
    for (int child; (child = 2 * i + 1) < n; i = child) {
        child += child + 1 < n && heap[child + 1].heat < heap[child].heat;
        if (heap[child].heat >= entry.heat)
            break;
        heap_set(heap, i, heap[child]);
    }
    heap_set(heap, i, entry);
}

/* Puts a copy at the warmest end that is colder; if there is none, it begins a run. */
static void put_in(struct order *order, struct copy *c) {
    struct entry *ends = order->ends;
    unsigned char best = 0;
    for (unsigned char i = 1; i < OPEN_RUNS; i++) {
        bool fits = ends[i].heat <= c->heat, best_fits = ends[best].heat <= c->heat;
        if (fits == best_fits ? ends[i].heat > ends[best].heat : fits)
            best = i;
    }
    c->run = best;
    c->warmer = NULL;
    c->colder = ends[best].heat <= c->heat ? ends[best].copy : NULL;
    ends[best] = (struct entry){c->heat, c};
    if (c->colder) {
        c->colder->warmer = c;
        return;
    }
    heap_fill(order->heap, order->n_runs, order->n_runs, ends[best]);
    order->n_runs++;
}

static void take_out(struct order *order, struct copy *c) {
    struct copy *colder = c->colder, *warmer = c->warmer;
    struct entry *end = &order->ends[c->run];
    if (end->copy == c)
        *end = colder ? (struct entry){colder->heat, colder} : (struct entry){0};
    if (warmer)
        warmer->colder = colder;
    if (colder) {
        colder->warmer = warmer;
        return;
    }
    struct entry next =
        warmer ? (struct entry){warmer->heat, warmer} : order->heap[--order->n_runs];
    if (next.copy != c) /* what comes behind it, or else the last one, fills its gap */
        heap_fill(order->heap, order->n_runs, c->at, next);
}

/* How many copies of the runs at i and below are colder than a given one, counted up to `most`. */
static int count_colder(const struct order *order, int i, const struct copy *than, int most) {
    int n = 0;
    if (most <= 0 || i >= order->n_runs || order->heap[i].heat >= than->heat)
        return 0;
    for (struct copy *c = order->heap[i].copy; c && n < most && c->heat < than->heat; c = c->warmer)
        n++;
    for (int child = 2 * i + 1; child <= 2 * i + 2; child++)
        n += count_colder(order, child, than, most - n);
    return n;
}

/* ---- copies and slots ---- */

static struct copy *copy_at(const struct kv *kv, int node, int place) { /* NULL: none */
    bool there = kv->nodes[node].places[place / 64] >> place % 64 & 1;
    struct copy *c = there ? kv->nodes[node].first : NULL;
    while (c && c->place != place)
        c = c->next;
    return c;
}

static bool is_void(const struct kv *kv, const struct copy *c) { /* it will fail, if it ends */
    return c->standing == IN_FLIGHT && kv->places[c->from->place].gone;
}

/* Whether a copy into it will be ordered yet, or again: so its source must stay. */
static bool is_awaited(const struct kv *kv, const struct copy *c) {
    return !kv->places[c->place].gone &&
           (c->standing == RESERVED || (is_void(kv, c) && c->place != kv->host));
}

static void count_copy(struct kv *kv, const struct copy *c, int n) {
    struct node *node = &kv->nodes[c->node];
    node->n_valid = (unsigned char)(node->n_valid + n * (c->standing >= IN_USE));
    node->n_awaited = (unsigned char)(node->n_awaited + n * is_awaited(kv, c));
}

/* Gives a copy another standing than it has. */
static void set_standing(struct kv *kv, struct copy *c, enum standing standing) {
    struct place *at = &kv->places[c->place];
    struct order *from = &at->orders[c->standing], *to = &at->orders[standing];
    at->n[c->standing]--;
    at->n[standing]++;
    if (from->heap)
        take_out(from, c);
    count_copy(kv, c, -1);
    c->standing = standing;
    count_copy(kv, c, 1);
    if (standing == CLEAN && c->place == kv->host)
        c->heat = ++kv->clock;
    if (to->heap)
        put_in(to, c);
}

static void link_copy(struct kv *kv, struct copy *c, int node) {
    c->node = node;
    c->next = kv->nodes[node].first;
    kv->nodes[node].first = c;
    kv->nodes[node].places[c->place / 64] |= (uint64_t)1 << c->place % 64;
    count_copy(kv, c, 1);
}

static void unlink_copy(struct kv *kv, const struct copy *c) {
    struct copy **link = &kv->nodes[c->node].first;
    while (*link != c)
        link = &(*link)->next;
    *link = c->next;
    kv->nodes[c->node].places[c->place / 64] &= ~((uint64_t)1 << c->place % 64);
    count_copy(kv, c, -1);
}

/* Gives a node a slot at a place, with one pin. NULL: none is free. */
static struct copy *occupy(struct kv *kv, int node, int place, enum standing standing) {
    struct place *at = &kv->places[place];
    struct copy *c = at->n[FREE] > 0 ? at->free : NULL;
    if (c) {
        at->free = c->next ? c->next : c + 1;
        c->place = (unsigned char)place;
        link_copy(kv, c, node);
        c->pins = 1;
        c->from = NULL;
        c->heat = choose_heat(kv, 0, true);
        set_standing(kv, c, standing);
    }
    return c;
}

static void free_slot(struct kv *kv, struct copy *c) {
    assert(c->pins == 0 && c->reads == 0 && c->standing != IN_FLIGHT);
    kv->stats.unused += c->unused;
    c->unused = false;
    set_standing(kv, c, FREE);
    unlink_copy(kv, c);
    c->next = kv->places[c->place].free;
    kv->places[c->place].free = c;
}

/* ---- the index ---- */

uint64_t kv_hash(uint64_t before, const int *tokens) {
    for (int i = 0; i < BLOCK_TOKENS; i += 2)
        before = mix(before, (uint64_t)tokens[i] << 32 | (uint32_t)tokens[i + 1]);
    return before;
}

static int *bucket_of(const struct kv *kv, uint64_t hash) {
    return &kv->buckets[hash & (kv->n_buckets - 1)];
}

static int find_child(const struct kv *kv, uint64_t parent, uint64_t hash, const int *tokens) {
    const struct node *nodes = kv->nodes;
    int id = *bucket_of(kv, hash);
    while (id != NONE && (nodes[id].parent != parent || nodes[id].hash != hash ||
                          memcmp(nodes[id].tokens, tokens, sizeof nodes->tokens) != 0))
        id = nodes[id].next;
    return id;
}

/* ---- changing a node ---- */

static bool is_of_use(const struct node *node) { /* later, to others or to its keeper */
    return node->serial != 0 || node->keeper;
}

/* Its content is lost, and nobody finds it any more. */
static void forget(struct kv *kv, int id) {
    struct node *node = &kv->nodes[id];
    kv->stats.lost += is_of_use(node);
    if (node->serial) {
        int *link = bucket_of(kv, node->hash);
        while (*link != id)
            link = &kv->nodes[*link].next;
        *link = node->next;
    } else if (node->keeper) {
        *node->keeper = NONE;
    }
    node->serial = 0;
    node->keeper = NULL;
}

static void free_node(struct kv *kv, int id) {
    forget(kv, id);
    kv->nodes[id] = (struct node){.next = kv->first_free - id - 1};
    kv->first_free = id;
}

/* What matters to all copies of a node: that the content is of use later, that there is more than
 * one, that there will be another. */
static unsigned char what_matters(const struct node *node) {
    return (unsigned char)(is_of_use(node) + 2 * (node->n_valid >= 2) + 4 * (node->n_awaited > 0));
}

/* Where a copy belongs. FREE: nobody needs it. */
static enum standing standing_of(const struct kv *kv, const struct copy *c) {
    const struct node *node = &kv->nodes[c->node];
    bool awaited = node->n_awaited > 0;
    if (c->standing == IN_FLIGHT || c->pins > 0)
        return c->standing < IN_USE ? c->standing : IN_USE;
    if (c->reads > 0)
        return c->standing == LEAVING || c->standing == RESERVED ? c->standing : BUSY;
    if (c->standing == RESERVED || !(is_of_use(node) || awaited))
        return FREE;
    return awaited ? BUSY : node->n_valid >= 2 ? CLEAN : DIRTY;
}

/* Puts a changed copy where it now belongs. */
static void settle_copy(struct kv *kv, struct copy *c) {
    enum standing standing = standing_of(kv, c);
    if (standing == FREE)
        free_slot(kv, c);
    else if (standing != c->standing)
        set_standing(kv, c, standing);
}

/* Does so with all copies of a node, if its change matters to them; frees one without copies. */
static void settle(struct kv *kv, int id) {
    struct node *node = &kv->nodes[id];
    while (node->matters != what_matters(node)) {
        node->matters = what_matters(node);
        for (struct copy *c = node->first, *next; c; c = next) {
            next = c->next;
            settle_copy(kv, c);
        }
    }
    if (!node->first)
        free_node(kv, id);
}

/* ---- making room ---- */

/* Drops a cached copy. If the block is on the host alone now, its heat goes there. */
static void drop(struct kv *kv, struct copy *c, bool moved) {
    uint64_t heat = c->heat;
    int node = c->node;
    note(&kv->config.ledger,
         &(struct event){EVENT_EVICTED, .node = node, .from = c->place,
                         .why = moved                  ? "moved to the host"
                                : c->standing == CLEAN ? "clean: there is another"
                                                       : "lost"});
    *(c->place == kv->host ? &kv->stats.host_evictions : &kv->stats.evictions) += 1;
    free_slot(kv, c);
    struct copy *left = choose_source(kv, node);
    if (!left)
        forget(kv, node);
    else if (left->place == kv->host)
        left->heat = heat;
    settle(kv, node);
}

static void enqueue(struct queue *queue, struct copy *to) {
    *(queue->n++ > 0 ? &queue->last->after : &queue->first) = to;
    queue->last = to;
}

/* Orders a copy from one copy of a node to another. */
static void order_copy(struct kv *kv, struct copy *from, struct copy *to, const char *why) {
    assert(from->standing >= IN_USE && to->standing == RESERVED && !kv->places[to->place].gone);
    bool out = to->place == kv->host;
    enqueue(out ? &kv->places[from->place].out : &kv->places[to->place].in, to);
    to->heat = choose_heat(kv, from->heat, true);
    to->from = from;
    from->reads++;
    set_standing(kv, to, IN_FLIGHT);
    note(&kv->config.ledger, &(struct event){EVENT_COPY_ORDERED, .node = to->node,
                                             .from = from->place, .to = to->place, .why = why});
    settle_copy(kv, from);
    settle(kv, to->node);
}

/* Orders a copy of a worker's copy to the host. False: the host has no room for it now, or one that
 * is void, and has not ended yet. */
static bool page_out(struct kv *kv, struct copy *c, bool urgent, const char *why) {
    if (copy_at(kv, c->node, kv->host))
        return false;
    if (kv->places[kv->host].n[FREE] == 0) {
        struct copy *victim = choose_host_victim(kv, urgent);
        if (!victim)
            return false;
        drop(kv, victim, false);
    }
    struct copy *to = occupy(kv, c->node, kv->host, RESERVED);
    to->pins = 0;
    set_standing(kv, c, LEAVING); /* unless it is pinned: see settle_copy */
    order_copy(kv, c, to, why);
    return true;
}

/* ---- the public functions: see dynamo.h ---- */

static int watermark(const struct place *place, int most) {
    int share = place->n_slots / CLEAN_SHARE;
    return share < most ? share : most;
}

void kv_destroy(struct kv *kv) {
    free(kv);
}

struct kv *kv_create(const struct kv_config *config) {
    size_t n = (size_t)config->host_blocks, n_buckets = 16;
    for (int i = 0; i < config->n_workers; i++)
        n += (size_t)config->device_blocks[i];
    while (n_buckets < n)
        n_buckets *= 2;
    size_t each = sizeof(struct node) + sizeof(struct copy) + 2 * sizeof(struct entry);
    size_t bytes = sizeof(struct kv) + (n + 1) * each + n_buckets * sizeof(int);
    struct kv *kv = calloc(1, bytes);
    if (!kv)
        return NULL;
    uintptr_t page = (uintptr_t)kv & ~(uintptr_t)4095, nodes = (uintptr_t)(kv + 1);
    (void)madvise((void *)page, bytes, MADV_HUGEPAGE); /* as far as it can be */
    nodes += -nodes % sizeof(struct node);
    kv->nodes = (struct node *)nodes; /* all is in one piece of memory */
    kv->config = *config;
    kv->host = config->n_workers;
    kv->n_buckets = n_buckets;
    struct copy *copies = (struct copy *)(kv->nodes + n);
    kv->buckets = (int *)(copies + n);
    struct entry *heaps = (struct entry *)(kv->buckets + n_buckets);
    for (int i = 0; i <= kv->host; i++) {
        struct place *at = &kv->places[i];
        at->n_slots = i < kv->host ? config->device_blocks[i] : config->host_blocks;
        at->n[FREE] = at->n_slots;
        at->orders[CLEAN].heap = heaps;
        at->orders[DIRTY].heap = heaps + at->n_slots;
        heaps += 2 * at->n_slots;
        at->copies = at->free = copies; /* nothing is touched before it is used */
        copies += at->n_slots;
        kv->n_spare += i < kv->host ? watermark(at, CLEAN_HIGH) : 0;
    }
    memset(kv->buckets, NONE, n_buckets * sizeof *kv->buckets);
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

int kv_reclaimable(const struct kv *kv, int worker) {
    const int *n = kv->places[worker].n;
    return kv->places[worker].gone ? 0 : n[FREE] + n[BUSY] + n[LEAVING] + n[CLEAN] + n[DIRTY];
}

static void want(struct kv *kv, int worker, int n) { /* n free slots; 0: none */
    uint64_t *bits = &kv->wanting[worker / 64], bit = (uint64_t)1 << worker % 64;
    *bits = n > 0 ? *bits | bit : *bits & ~bit;
    kv->places[worker].wanted = n;
}

bool kv_make_room(struct kv *kv, int worker, int n) {
    struct place *at = &kv->places[worker];
    const struct place *host = &kv->places[kv->host];
    int can = kv_reclaimable(kv, worker);
    if (at->wanted <= n || at->wanted > can)
        want(kv, worker, at->n[FREE] < n && n <= can ? n : 0);
    struct copy *victim; /* where n come to be free, nothing goes to the host: all stays there */
    while (n <= can && at->n[FREE] + at->n[LEAVING] < n && (victim = choose_victim(at))) {
        bool may_lose = host->n[RESERVED] + host->n[IN_USE] + kv->n_void == host->n_slots ||
                        (victim->standing == DIRTY && copy_at(kv, victim->node, kv->host));
        if (victim->standing == CLEAN || may_lose)
            drop(kv, victim, false);
        else if (!page_out(kv, victim, true, "makes room"))
            break; /* what is in flight to the host or from it will make room there */
    }
    return at->n[FREE] >= n;
}

void kv_clean(struct kv *kv, int worker) {
    const struct place *at = &kv->places[worker];
    for (int n = watermark(at, CLEAN_LOW); at->n[DIRTY] > 0; n = watermark(at, CLEAN_HIGH)) {
        struct copy *next = coldest(at, DIRTY);
        int n_ready = at->n[FREE] + at->n[LEAVING]; /* and those that go before it */
        n_ready += count_colder(&at->orders[CLEAN], 0, next, n - n_ready);
        if (n_ready >= n || !page_out(kv, next, false, "cleaner: soon the coldest"))
            break;
    }
}

int kv_new(struct kv *kv, int worker) {
    int id = kv->first_free;
    if (!occupy(kv, id, worker, IN_USE))
        return NONE;
    kv->first_free = id + 1 + kv->nodes[id].next;
    return id;
}

bool kv_reserve(struct kv *kv, int node, int worker) {
    assert(!copy_at(kv, node, worker));
    bool ok = occupy(kv, node, worker, RESERVED);
    settle(kv, node);
    return ok;
}

/* Orders the copy that fills a reserved one. False: no place holds the block. */
static bool fill(struct kv *kv, struct copy *to, const char *why) {
    struct copy *from = to->standing == RESERVED ? choose_source(kv, to->node) : NULL;
    if (from)
        order_copy(kv, from, to, to->from ? "again: the last has failed" : why);
    return to->standing != RESERVED;
}

bool kv_send(struct kv *kv, int node, int worker) {
    struct copy *to = copy_at(kv, node, worker);
    return to && fill(kv, to, "hand-over");
}

bool kv_hold(struct kv *kv, int node, int place) {
    struct copy **first = &kv->nodes[node].first, **link = first, *c;
    if (!(kv->nodes[node].places[place / 64] >> place % 64 & 1))
        return false;
    while ((c = *link)->place != place)
        link = &c->next;
    *link = c->next; /* it stands first: it is asked for next */
    c->next = *first;
    *first = c;
    c->pins++;
    c->unused = false;
    settle_copy(kv, c);
    return true;
}

bool kv_fetch(struct kv *kv, int node, int worker) {
    if (!kv_hold(kv, node, worker) &&
        (!choose_source(kv, node) || !occupy(kv, node, worker, RESERVED)))
        return false;
    return fill(kv, kv->nodes[node].first, "fetch: a prefix hit");
}

void kv_unpin(struct kv *kv, int node, int place) {
    struct copy *c = copy_at(kv, node, place);
    assert(c && c->pins > 0);
    if (--c->pins == 0)
        c->heat = choose_heat(kv, c->heat, false);
    settle_copy(kv, c);
    settle(kv, node);
}

enum kv_state kv_state(const struct kv *kv, int node, int place) {
    const struct copy *own = copy_at(kv, node, place);
    if (!own || own->standing < IN_USE)
        return own ? (enum kv_state)own->standing : KV_ABSENT;
    bool read = false; /* its owner must not write it while it is being copied */
    for (const struct copy *c = kv->nodes[node].first; c && !kv->nodes[node].serial; c = c->next)
        read = read || (c->reads > 0 && !kv->places[c->place].gone);
    return read ? KV_ARRIVING : KV_VALID;
}

int kv_places(const struct kv *kv, int node, int *places, bool *pinned) {
    int n = 0;
    for (const struct copy *c = kv->nodes[node].first; c; c = c->next) {
        places[n] = c->place;
        pinned[n++] = c->pins > 0;
    }
    return n;
}

static int slot_of(const struct kv *kv, const struct copy *c) {
    return (int)(c - kv->places[c->place].copies);
}

int kv_slot(const struct kv *kv, int node, int worker) {
    return slot_of(kv, copy_at(kv, node, worker));
}

/* Moves the pins of a private node to the node that was registered first with its content, and
 * with them its slots where that one has none. */
static void merge(struct kv *kv, int private, int winner) {
    for (struct copy *mine = kv->nodes[private].first, *next; mine; mine = next) {
        struct copy *other = copy_at(kv, winner, mine->place);
        next = mine->next;
        if (mine->reads > 0 || mine->standing == IN_FLIGHT) {
            assert(kv->places[mine->place].gone || is_void(kv, mine));
            continue; /* a void copy ends, if it does, where it has begun */
        }
        if (other) {
            other->pins += mine->pins;
            other->unused = false;
            mine->pins = 0;
            settle_copy(kv, other);
        } else {
            unlink_copy(kv, mine);
            link_copy(kv, mine, winner);
        }
        settle_copy(kv, mine);
    }
    settle(kv, winner);
    settle(kv, private);
}

int kv_register(struct kv *kv, int id, int parent, uint64_t hash, const int *tokens) {
    struct node *node = &kv->nodes[id];
    node->parent = parent == NONE ? 0 : kv->nodes[parent].serial;
    assert(!node->serial && (parent == NONE || node->parent));
    int winner = find_child(kv, node->parent, hash, tokens);
    if (winner != NONE) {
        merge(kv, id, winner);
        return winner;
    }
    node->serial = ++kv->last_serial;
    node->hash = hash;
    memcpy(node->tokens, tokens, sizeof node->tokens);
    node->next = *bucket_of(kv, node->hash);
    *bucket_of(kv, node->hash) = id;
    if (kv->config.policy == KV_WRITE_THROUGH)
        (void)page_out(kv, choose_source(kv, id), true, "write-through");
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

static struct kv_copy_order order_of(const struct kv *kv, int worker, const struct copy *to) {
    const struct copy *from = to->from;
    return (struct kv_copy_order){worker,    to->node,          from->place,
                                  to->place, slot_of(kv, from), slot_of(kv, to)};
}

bool kv_next_copy(struct kv *kv, int worker, struct kv_copy_order *order) {
    struct place *at = &kv->places[worker];
    struct queue *queue = at->in.n > 0 ? &at->in : &at->out;
    if (queue->n == 0)
        return false;
    *order = order_of(kv, worker, queue->first);
    queue->first = queue->first->after;
    queue->n--;
    return true;
}

void kv_copied(struct kv *kv, const struct kv_copy_order *order, bool ok) {
    struct copy *to = &kv->places[order->to].copies[order->to_slot], *from = to->from;
    const struct place *at = &kv->places[from->place];
    assert(to->standing == IN_FLIGHT && to->node == order->node && from->reads > 0);
    bool out = order->to == kv->host, in = order->from == kv->host;
    bool leaves = from->standing == LEAVING;
    ok = ok && !at->gone && !kv->places[order->to].gone;
    kv->n_void -= out && at->gone;
    from->reads--;
    set_standing(kv, to, ok ? IN_USE : RESERVED);
    to->unused = ok && !out && to->pins == 0;
    *(out ? &kv->stats.pages_out : in ? &kv->stats.pages_in : &kv->stats.transfers) += ok;
    bool moved = ok && leaves && at->n[FREE] < at->wanted && standing_of(kv, from) == CLEAN;
    if (moved)
        drop(kv, from, true); /* it is on no heap, and need not be */
    settle_copy(kv, to);
    if (!moved)
        settle_copy(kv, from);
    settle(kv, order->node);
    for (int i = 0; i < MAX_WORKERS / 64; i++)
        for (uint64_t bits = kv->wanting[i]; bits != 0; bits &= bits - 1) {
            int w = 64 * i + __builtin_ctzll(bits);
            const struct place *worker = &kv->places[w];
            if (worker->n[FREE] + worker->n[LEAVING] < worker->wanted)
                (void)kv_make_room(kv, w, worker->wanted); /* what had no room on the host goes */
            else if (worker->n[FREE] >= worker->wanted)
                want(kv, w, 0);
        }
}

/* Orders that are not given out end here, those from or to a worker that is gone. */
static void take_back(struct kv *kv, int worker, struct queue *queue) {
    int n = queue->n;
    queue->n = 0;
    for (struct copy *to = queue->first, *next; n > 0; n--, to = next) {
        struct kv_copy_order order = order_of(kv, worker, to);
        next = to->after;
        if (to->place == worker || order.from == worker)
            kv_copied(kv, &order, false);
        else
            enqueue(queue, to);
    }
}

/* What a place has to do with it that is gone, or will be. */
static void count_void(struct kv *kv, int n) {
    for (int i = 0; i <= kv->host; i++)
        for (int slot = 0; slot < kv->places[i].n_slots; slot++) {
            const struct copy *c = &kv->places[i].copies[slot];
            kv->nodes[c->node].n_awaited =
                (unsigned char)(kv->nodes[c->node].n_awaited + n * is_awaited(kv, c));
            kv->n_void += n * (is_void(kv, c) && i == kv->host);
        }
}

void kv_lose(struct kv *kv, int worker) {
    struct place *at = &kv->places[worker];
    count_void(kv, -1);
    at->gone = true;
    count_void(kv, 1);
    want(kv, worker, 0);
    for (int i = 0; i < at->n_slots; i++) {
        struct copy *c = &at->copies[i];
        int node = c->node;
        if (c->standing == FREE)
            continue;
        if (c->standing >= IN_USE)
            set_standing(kv, c, RESERVED);
        if (kv->nodes[node].n_valid == 0)
            forget(kv, node);
        settle_copy(kv, c);
        settle(kv, node);
    }
    for (int i = 0; i < kv->host; i++) {
        take_back(kv, worker, &kv->places[i].in);
        take_back(kv, worker, &kv->places[i].out);
    }
}

bool kv_regain(struct kv *kv, int worker) {
    struct place *at = &kv->places[worker];
    at->gone = at->n[FREE] < at->n_slots;
    return !at->gone;
}

bool kv_is_lost(const struct kv *kv, int node) {
    return kv->nodes[node].n_valid == 0;
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
                             .pinned = n[RESERVED] + n[IN_USE],
                             .cached = n[BUSY] + n[LEAVING] + n[CLEAN] + n[DIRTY],
                             .in_flight = n[IN_FLIGHT]};
}

struct kv_stats kv_stats(const struct kv *kv) {
    return kv->stats;
}
