/* kvcache.c: where each KV block is, and which block makes room for another.
 *
 * Owns the slots of every place (each worker's device memory, and the host's), the index of blocks
 * that can be found again by content, and the LRU order. Refuses to touch memory: it deals in slot
 * numbers, and what is to be moved leaves as copy orders that somebody else carries out.
 *
 * A *node* is the content of one block. It has a *copy* at some of the places. A copy is
 *     KV_RESERVED   a slot without content; its copy is not ordered yet, or has failed
 *     KV_ARRIVING   a copy into it is in flight: the slot is neither reused nor freed until it ends
 *     KV_VALID      complete. With pins it is in use; with `reads`, copies are being made from it
 * A private node belongs to one request. A registered node is in the index: it is found by its
 * parent and its own 16 tokens, through a chained hash, but compared in full, so that two texts
 * with one hash stay two texts. Unpinned copies of registered nodes are on the LRU list of their
 * place (in the words of virtual memory: cached; clean if another valid copy exists, else dirty);
 * unpinned copies of private nodes are freed, unless their owner keeps them.
 *
 * Whoever changes a node calls `settle` in the end, which puts each of its copies where it now
 * belongs: on a list, or back among the free slots. So the rules stand in one function.
 *
 * Invariants (test/invariants.h counts them anew):
 *   - every registered node has a valid copy somewhere;
 *   - a slot is free or belongs to exactly one copy; in-flight copies = reads = orders not ended;
 *   - a request pins the whole path of its blocks on its worker, last block released first, so a
 *     child is colder than its parent and leaves go first. Should a parent go before its child,
 *     the child cannot be found any more (a parent's serial number is never used again), and LRU
 *     takes it in its turn.
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
    CLEAN_SHARE = 8  /* on a small device both are a share of its blocks: one in so many */
};

enum list_kind { UNLISTED, MAIN, DUPLICATES, N_LISTS };

struct copy {
    enum kv_state state;
    enum list_kind list;
    int slot, pins, reads;
    int newer, older; /* neighbours on the LRU list: nodes */
};

struct node {
    int *keeper; /* private and kept while unpinned: set to -1 when the last copy is lost */
    int next_in_bucket;
    uint64_t serial, parent; /* numbers of registrations; 0: private | the first block of a text */
    uint64_t hash;           /* of all tokens up to the end of the block */
    int tokens[BLOCK_TOKENS];
};

struct lru {
    int newest, oldest, length;
};

struct ring {                     /* of copy orders not yet given out */
    struct kv_copy_order *orders; /* (size): as many as the worker has slots */
    int size, first, n;
};

struct place {
    int n_slots, n_free;
    int *free_slots; /* (n_free) */
    struct lru lists[N_LISTS];
    struct ring in, out; /* copies for this worker to carry out: into it, and to the host */
};

struct kv {
    int n_places, host; /* host == n_places - 1 */
    enum kv_policy policy;
    int n_nodes, n_buckets;
    int first_free;                /* free nodes are chained by next_in_bucket */
    int n_spare;                   /* duplicates on the host that the cleaners may need */
    uint64_t last_serial, version; /* version: of what kv_find returns */
    struct node *nodes;            /* (n_nodes): as many as slots, so a slot is never without one */
    struct copy *copies;           /* (n_nodes, n_places) */
    int *buckets;                  /* (n_buckets) first node of each chain; a power of two */
    int *slots;                    /* (n_nodes) the places' free_slots, one after another */
    struct kv_copy_order *orders;  /* (n_nodes, 2) the rings of the places, one after another */
    struct place places[MAX_WORKERS + 1];
    struct kv_stats stats;
};

static struct copy *copy_at(const struct kv *kv, int node, int place) {
    return &kv->copies[(size_t)node * (size_t)kv->n_places + (size_t)place];
}

/* Copies of a node in a state. While one is KV_RESERVED, a source for it must stay. */
static int count(const struct kv *kv, int node, enum kv_state state) {
    int n = 0;
    for (int place = 0; place < kv->n_places; place++)
        n += copy_at(kv, node, place)->state == state;
    return n;
}

/* ---- decisions: change these to try another policy ---- */

/* Which copy a block is fetched from: a peer's memory is nearer than the host's. */
static int choose_source(const struct kv *kv, int node) {
    for (int place = 0; place < kv->n_places; place++)
        if (copy_at(kv, node, place)->state == KV_VALID)
            return place;
    return NONE;
}

/* Which block leaves a place: the coldest of which another copy exists, or, if blocks may be lost,
 * the coldest. */
static int choose_victim(const struct kv *kv, int place, enum list_kind kind, bool may_lose) {
    int node = kv->places[place].lists[kind].oldest;
    while (node != NONE &&
           (copy_at(kv, node, place)->reads > 0 || count(kv, node, KV_RESERVED) > 0 ||
            (count(kv, node, KV_VALID) < 2 && !may_lose)))
        node = copy_at(kv, node, place)->newer;
    return node;
}

/* ---- lists and slots ---- */

/* Moves a copy to the newest end of a list of its place, or to none. */
static void list_move(struct kv *kv, int node, int place, enum list_kind kind) {
    struct copy *copy = copy_at(kv, node, place);
    struct lru *list = &kv->places[place].lists[copy->list];
    if (copy->list != UNLISTED) {
        int *above = copy->newer == NONE ? &list->newest : &copy_at(kv, copy->newer, place)->older;
        int *below = copy->older == NONE ? &list->oldest : &copy_at(kv, copy->older, place)->newer;
        *above = copy->older;
        *below = copy->newer;
        list->length--;
    }
    list = &kv->places[place].lists[kind];
    copy->list = kind;
    if (kind != UNLISTED) {
        copy->newer = NONE;
        copy->older = list->newest;
        *(copy->older == NONE ? &list->oldest : &copy_at(kv, copy->older, place)->newer) = node;
        list->newest = node;
        list->length++;
    }
}

/* Gives a node a slot at a place, with one pin. False: none is free. */
static bool occupy(struct kv *kv, int node, int place, enum kv_state state) {
    struct place *at = &kv->places[place];
    if (at->n_free == 0)
        return false;
    int slot = at->free_slots[--at->n_free];
    *copy_at(kv, node, place) = (struct copy){.state = state, .slot = slot, .pins = 1};
    return true;
}

static void free_slot(struct kv *kv, int node, int place) {
    struct copy *copy = copy_at(kv, node, place);
    struct place *at = &kv->places[place];
    assert(copy->pins == 0 && copy->reads == 0 && copy->state != KV_ARRIVING);
    list_move(kv, node, place, UNLISTED);
    at->free_slots[at->n_free++] = copy->slot;
    *copy = (struct copy){.state = KV_ABSENT};
}

/* ---- the index ---- */

/* Mixes one value into a chained hash (the finalizer of SplitMix64, Steele et al. 2014). */
static uint64_t mix(uint64_t hash, uint64_t value) {
    hash = (hash ^ value) + 0x9e3779b97f4a7c15u;
    hash = (hash ^ (hash >> 30)) * 0xbf58476d1ce4e5b9u;
    hash = (hash ^ (hash >> 27)) * 0x94d049bb133111ebu;
    return hash ^ (hash >> 31);
}

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
    *node = (struct node){.next_in_bucket = kv->first_free};
    kv->first_free = id;
}

/* Puts each copy of a changed node where it now belongs; frees a node without copies. */
static void settle(struct kv *kv, int id) {
    for (int place = 0; place < kv->n_places; place++)
        if (copy_at(kv, id, place)->state == KV_RESERVED && copy_at(kv, id, place)->pins == 0)
            free_slot(kv, id, place);
    bool cached = kv->nodes[id].serial || kv->nodes[id].keeper;
    bool useless = !cached && count(kv, id, KV_RESERVED) == 0;
    bool duplicate = count(kv, id, KV_VALID) >= 2;
    for (int place = 0; place < kv->n_places; place++) {
        const struct copy *copy = copy_at(kv, id, place);
        bool unpinned = copy->state == KV_VALID && copy->pins == 0;
        enum list_kind kind = place == kv->host && duplicate ? DUPLICATES : MAIN;
        kind = unpinned && cached ? kind : UNLISTED;
        if (copy->list != kind)
            list_move(kv, id, place, kind);
        if (unpinned && useless && copy->reads == 0)
            free_slot(kv, id, place);
    }
    if (count(kv, id, KV_ABSENT) == kv->n_places)
        free_node(kv, id);
}

/* ---- making room ---- */

/* Frees slots of a place until there are n; see choose_victim. */
static bool drop_coldest(struct kv *kv, int place, enum list_kind kind, bool may_lose, int n) {
    while (kv->places[place].n_free < n) {
        int victim = choose_victim(kv, place, kind, may_lose);
        if (victim == NONE)
            return false;
        free_slot(kv, victim, place);
        *(place == kv->host ? &kv->stats.host_evictions : &kv->stats.evictions) += 1;
        settle(kv, victim);
    }
    return true;
}

/* A free slot on the host. The first to go are duplicates, except as many as the cleaners need:
 * if they took each other's, blocks would go to and fro for ever. */
static bool make_host_room(struct kv *kv, bool urgent) {
    const struct place *host = &kv->places[kv->host];
    bool many = host->lists[DUPLICATES].length > kv->n_spare;
    return (many && drop_coldest(kv, kv->host, DUPLICATES, false, 1)) ||
           drop_coldest(kv, kv->host, MAIN, true, 1) ||
           (urgent && drop_coldest(kv, kv->host, DUPLICATES, false, 1));
}

/* Orders a copy between two places of a node; `to` must be KV_RESERVED. */
static void order_copy(struct kv *kv, int node, int from, int to) {
    struct copy *source = copy_at(kv, node, from), *target = copy_at(kv, node, to);
    int worker = to == kv->host ? from : to; /* a device fetches; the host is written to */
    struct ring *ring = to == kv->host ? &kv->places[worker].out : &kv->places[worker].in;
    assert(source->state == KV_VALID && target->state == KV_RESERVED && ring->n < ring->size);
    target->state = KV_ARRIVING;
    source->reads++;
    ring->orders[(ring->first + ring->n++) % ring->size] =
        (struct kv_copy_order){worker, node, from, to, source->slot, target->slot};
}

/* Orders a copy of a device's block to host. False: the host has no room for it now. */
static bool page_out(struct kv *kv, int node, int worker, bool urgent) {
    if (!make_host_room(kv, urgent) || !occupy(kv, node, kv->host, KV_RESERVED))
        return false;
    order_copy(kv, node, worker, kv->host);
    copy_at(kv, node, kv->host)->pins = 0;
    settle(kv, node);
    return true;
}

static bool is_dirty(const struct kv *kv, int node, int worker) {
    return count(kv, node, KV_VALID) < 2 && copy_at(kv, node, worker)->reads == 0;
}

/* Orders page-outs of the coldest blocks until, when they have ended, n can be reused at once. */
static void page_out_coldest(struct kv *kv, int worker, bool urgent, int n) {
    int n_ready = kv->places[worker].n_free;
    int node = kv->places[worker].lists[MAIN].oldest;
    for (; node != NONE && n_ready < n; node = copy_at(kv, node, worker)->newer) {
        if (is_dirty(kv, node, worker) && !page_out(kv, node, worker, urgent))
            return; /* the host's blocks are all on their way: their end will be heard of */
        n_ready++;
    }
}

/* ---- the public functions: see dynamo.h ---- */

static bool allocate(struct kv *kv) {
    size_t n_nodes = (size_t)kv->n_nodes, n_places = (size_t)kv->n_places;
    kv->nodes = calloc(n_nodes, sizeof *kv->nodes);
    kv->copies = calloc(n_nodes * n_places, sizeof *kv->copies);
    kv->buckets = calloc((size_t)kv->n_buckets, sizeof *kv->buckets);
    kv->slots = calloc(n_nodes, sizeof *kv->slots);
    kv->orders = calloc(n_nodes * 2, sizeof *kv->orders);
    return kv->nodes && kv->copies && kv->buckets && kv->slots && kv->orders;
}

static int watermark(const struct place *place, int most) {
    int share = place->n_slots / CLEAN_SHARE;
    return share < most ? share : most;
}

/* Sets up place number `index`, whose slots begin at `first` of all slots. */
static void place_create(struct kv *kv, int index, int first) {
    struct place *place = &kv->places[index];
    place->free_slots = kv->slots + first;
    place->in = (struct ring){.orders = kv->orders + 2 * first, .size = place->n_slots};
    place->out = (struct ring){.orders = place->in.orders + place->n_slots, .size = place->n_slots};
    for (int i = 0; i < place->n_slots; i++)
        place->free_slots[i] = place->n_slots - 1 - i; /* slot 0 is taken first */
    place->n_free = place->n_slots;
    for (int i = 0; i < N_LISTS; i++)
        place->lists[i] = (struct lru){NONE, NONE, 0};
    kv->n_spare += index == kv->host ? 0 : watermark(place, CLEAN_HIGH);
}

void kv_destroy(struct kv *kv) {
    if (kv) {
        free(kv->nodes);
        free(kv->copies);
        free(kv->buckets);
        free(kv->slots);
        free(kv->orders);
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
        kv->nodes[i].next_in_bucket = i + 1 < kv->n_nodes ? i + 1 : NONE;
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
    return kv->places[worker].n_free + kv->places[worker].lists[MAIN].length;
}

bool kv_make_room(struct kv *kv, int worker, int n) {
    bool has_host = kv->places[kv->host].n_slots > 0;
    if (drop_coldest(kv, worker, MAIN, !has_host, n))
        return true;
    if (has_host)
        page_out_coldest(kv, worker, true, n);
    return false;
}

void kv_clean(struct kv *kv, int worker) {
    const struct place *at = &kv->places[worker];
    int n_ready = at->n_free, low = watermark(at, CLEAN_LOW);
    int node = at->lists[MAIN].oldest;
    while (node != NONE && n_ready < low && !is_dirty(kv, node, worker)) {
        node = copy_at(kv, node, worker)->newer;
        n_ready++;
    }
    if (node != NONE && n_ready < low)
        page_out_coldest(kv, worker, false, watermark(at, CLEAN_HIGH));
}

int kv_new(struct kv *kv, int worker) {
    int id = kv->first_free;
    if (id == NONE || !occupy(kv, id, worker, KV_VALID))
        return NONE;
    kv->first_free = kv->nodes[id].next_in_bucket;
    return id;
}

bool kv_reserve(struct kv *kv, int node, int worker) {
    assert(copy_at(kv, node, worker)->state == KV_ABSENT);
    return occupy(kv, node, worker, KV_RESERVED);
}

bool kv_send(struct kv *kv, int node, int worker) {
    int from = choose_source(kv, node);
    if (copy_at(kv, node, worker)->state == KV_RESERVED && from != NONE) {
        order_copy(kv, node, from, worker);
        settle(kv, node);
    }
    return from != NONE;
}

bool kv_fetch(struct kv *kv, int node, int worker) {
    struct copy *copy = copy_at(kv, node, worker);
    if (copy->state != KV_ABSENT) {
        copy->pins++;
        settle(kv, node);
    } else if (choose_source(kv, node) == NONE || !occupy(kv, node, worker, KV_RESERVED)) {
        return false;
    }
    return kv_send(kv, node, worker);
}

void kv_hold(struct kv *kv, int node, int place) {
    struct copy *copy = copy_at(kv, node, place);
    assert(copy->state == KV_VALID || copy->state == KV_ARRIVING);
    copy->pins++;
    settle(kv, node);
}

void kv_unpin(struct kv *kv, int node, int worker) {
    assert(copy_at(kv, node, worker)->pins > 0);
    copy_at(kv, node, worker)->pins--;
    settle(kv, node);
}

enum kv_state kv_state(const struct kv *kv, int node, int worker) {
    enum kv_state state = copy_at(kv, node, worker)->state;
    for (int place = 0; place < kv->n_places && !kv->nodes[node].serial; place++)
        if (state == KV_VALID && copy_at(kv, node, place)->reads > 0)
            state = KV_ARRIVING; /* its owner must not write it while it is being copied */
    return state;
}

int kv_slot(const struct kv *kv, int node, int worker) {
    return copy_at(kv, node, worker)->slot;
}

/* Moves the pins of a private node to the node that was registered first with its content, and
 * with them its slots where that one has none. */
static void merge(struct kv *kv, int private, int winner) {
    for (int place = 0; place < kv->n_places; place++) {
        struct copy *mine = copy_at(kv, private, place), *other = copy_at(kv, winner, place);
        assert(mine->reads == 0 && mine->state != KV_ARRIVING && mine->list == UNLISTED);
        if (other->state == KV_ABSENT) {
            *other = *mine;
            *mine = (struct copy){.state = KV_ABSENT};
        }
        other->pins += mine->pins;
        mine->pins = 0;
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
        (void)page_out(kv, id, choose_source(kv, id), true);
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
    struct ring *ring = at->in.n > 0 ? &at->in : &at->out;
    if (ring->n == 0)
        return false;
    *order = ring->orders[ring->first];
    ring->first = (ring->first + 1) % ring->size;
    ring->n--;
    return true;
}

void kv_copied(struct kv *kv, const struct kv_copy_order *order, bool ok) {
    struct copy *source = copy_at(kv, order->node, order->from);
    struct copy *target = copy_at(kv, order->node, order->to);
    assert(target->state == KV_ARRIVING && source->reads > 0);
    source->reads--;
    target->state = ok ? KV_VALID : KV_RESERVED;
    int64_t *count = order->to == kv->host     ? &kv->stats.pages_out
                     : order->from == kv->host ? &kv->stats.pages_in
                                               : &kv->stats.transfers;
    *count += ok;
    settle(kv, order->node);
}

int kv_pending(const struct kv *kv, int worker) {
    return kv->places[worker].in.n + kv->places[worker].out.n;
}

int kv_used(const struct kv *kv, int place) {
    return kv->places[place].n_slots - kv->places[place].n_free;
}

struct kv_stats kv_stats(const struct kv *kv) {
    return kv->stats;
}
