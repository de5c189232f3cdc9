/* kvcache.c: where each KV block is, and which block makes room for another.
 *
 * Owns the slots of every place (each worker's device memory, and the host's), the tree of blocks
 * that can be found again by content, and the LRU order. Refuses to touch memory: it deals in slot
 * numbers, and what is to be moved leaves as copy orders that somebody else carries out.
 *
 * A *node* is the content of one block. It has a *copy* at some of the places. A copy is
 *     KV_RESERVED   a slot without content, waiting for a copy to be ordered
 *     KV_ARRIVING   a copy into it is in flight: the slot is neither reused nor freed until it ends
 *     KV_VALID      complete. With pins it is in use; while `reads` copies are made from it, it
 * stays A private node belongs to one request. A registered node is in the tree: its name is the
 * hash of its parent's name and its own 16 tokens, and a hit compares parent and tokens, so that
 * two different texts with one hash stay two texts. Unpinned copies of registered nodes are on the
 * LRU list of their place (the words of virtual memory: cached; clean if another valid copy exists,
 * else dirty); unpinned copies of private nodes are freed, unless their owner keeps them.
 *
 * Every change to a node goes through begin_change / end_change: end_change looks at what the node
 * has become and puts each copy where it belongs (on a list, or back among the free slots). So no
 * caller can forget a list, and the rules stand in one function.
 *
 * Invariants (kv_check counts them anew):
 *   - every registered node has a valid copy somewhere, and its parent is registered;
 *   - a slot is free or belongs to exactly one copy; in-flight copies = reads = orders not ended;
 *   - a request pins the whole path of its blocks on its worker, last block released first, so a
 *     child is always colder than its parent, and leaves go first.
 * Chained hashing of full blocks as in vLLM (Kwon et al., "PagedAttention", SOSP 2023).
 * Read next: scheduler.c, the only caller. */
#include "dynamo.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    NONE = -1,
    CLEAN_LOW = 8,   /* the cleaner starts when fewer of the coldest blocks could be reused … */
    CLEAN_HIGH = 16, /* … and stops at so many: short bursts of bus traffic, no ping-pong */
    CLEAN_SHARE = 8  /* on small devices: a share of the blocks instead */
};

enum list_kind { UNLISTED, MAIN, DUPLICATES, N_LISTS };

struct copy {
    enum kv_state state;
    enum list_kind list;
    int slot, pins, reads;
    int newer, older; /* neighbours on the LRU list: nodes */
};

struct node {
    bool used, registered;
    int *keeper; /* private and kept while unpinned: set to -1 when the last copy is lost */
    int parent, first_child, next_sibling, previous_sibling;
    int next_in_bucket;
    uint64_t hash;
    int tokens[BLOCK_TOKENS];
};

struct lru {
    int newest, oldest, length;
};

struct place {
    int n_slots, n_free;
    int *free_slots; /* (n_free) */
    struct lru lists[N_LISTS];
    int n_clean; /* devices: listed copies that could be dropped at once */
    int n_arriving;
    struct kv_copy_order *orders; /* ring (capacity of all slots) for this worker to carry out */
    int first_order, n_orders;
};

struct kv {
    int n_places, host; /* host == n_places - 1 */
    enum kv_policy policy;
    int n_nodes, n_free_nodes, n_buckets;
    struct node *nodes;  /* (n_nodes) */
    struct copy *copies; /* (n_nodes, n_places) */
    int *free_nodes;     /* (n_free_nodes) */
    int *buckets;        /* (n_buckets) first node of each chain; a power of two */
    struct place places[MAX_WORKERS + 1];
    struct kv_stats stats;
};

static struct copy *copy_at(const struct kv *kv, int node, int place) {
    return &kv->copies[(size_t)node * (size_t)kv->n_places + (size_t)place];
}

static int count_valid(const struct kv *kv, int node) {
    int n = 0;
    for (int place = 0; place < kv->n_places; place++) {
        n += copy_at(kv, node, place)->state == KV_VALID;
    }
    return n;
}

/* ---- decisions: change these to try another policy ---- */

/* Which copy a block is fetched from: a peer's memory is nearer than the host's. */
static int choose_source(const struct kv *kv, int node) {
    for (int place = 0; place < kv->n_places; place++) {
        if (copy_at(kv, node, place)->state == KV_VALID) {
            return place;
        }
    }
    return NONE;
}

/* Which block leaves a device: the coldest of which another copy exists. */
static int choose_device_victim(const struct kv *kv, int worker) {
    int node = kv->places[worker].lists[MAIN].oldest;
    while (node != NONE && (copy_at(kv, node, worker)->reads > 0 || count_valid(kv, node) < 2)) {
        node = copy_at(kv, node, worker)->newer;
    }
    return node;
}

/* ---- lists and slots ---- */

static void lru_remove(struct kv *kv, int node, int place) {
    struct copy *copy = copy_at(kv, node, place);
    struct lru *list = &kv->places[place].lists[copy->list];
    *(copy->newer == NONE ? &list->newest : &copy_at(kv, copy->newer, place)->older) = copy->older;
    *(copy->older == NONE ? &list->oldest : &copy_at(kv, copy->older, place)->newer) = copy->newer;
    list->length--;
    copy->list = UNLISTED;
}

static void lru_push(struct kv *kv, int node, int place, enum list_kind kind) {
    struct copy *copy = copy_at(kv, node, place);
    struct lru *list = &kv->places[place].lists[kind];
    copy->list = kind;
    copy->newer = NONE;
    copy->older = list->newest;
    *(list->newest == NONE ? &list->oldest : &copy_at(kv, list->newest, place)->newer) = node;
    list->newest = node;
    list->length++;
}

static void free_slot(struct kv *kv, int node, int place) {
    struct copy *copy = copy_at(kv, node, place);
    struct place *at = &kv->places[place];
    assert(copy->pins == 0 && copy->reads == 0 && copy->state != KV_ARRIVING);
    if (copy->list != UNLISTED) {
        lru_remove(kv, node, place);
    }
    at->free_slots[at->n_free++] = copy->slot;
    *copy = (struct copy){.state = KV_ABSENT};
}

/* ---- the tree ---- */

/* Mixes one value into a chained hash (the finalizer of SplitMix64, Steele et al. 2014). */
static uint64_t mix(uint64_t hash, uint64_t value) {
    hash = (hash ^ value) + 0x9e3779b97f4a7c15u;
    hash = (hash ^ (hash >> 30)) * 0xbf58476d1ce4e5b9u;
    hash = (hash ^ (hash >> 27)) * 0x94d049bb133111ebu;
    return hash ^ (hash >> 31);
}

static uint64_t block_hash(const struct kv *kv, int parent, const int *tokens) {
    uint64_t hash = parent == NONE ? 0 : kv->nodes[parent].hash;
    for (int i = 0; i < BLOCK_TOKENS; i++) {
        hash = mix(hash, (uint64_t)tokens[i]);
    }
    return hash;
}

static int *bucket_of(const struct kv *kv, uint64_t hash) {
    return &kv->buckets[hash & (uint64_t)(kv->n_buckets - 1)];
}

static int find_child(const struct kv *kv, int parent, const int *tokens, uint64_t hash) {
    int id = *bucket_of(kv, hash);
    while (id != NONE) {
        const struct node *node = &kv->nodes[id];
        if (node->parent == parent && node->hash == hash &&
            memcmp(node->tokens, tokens, sizeof node->tokens) == 0) {
            break;
        }
        id = node->next_in_bucket;
    }
    return id;
}

static void tree_insert(struct kv *kv, int id, int parent, const int *tokens, uint64_t hash) {
    struct node *node = &kv->nodes[id];
    node->registered = true;
    node->hash = hash;
    node->parent = parent;
    memcpy(node->tokens, tokens, sizeof node->tokens);
    node->next_in_bucket = *bucket_of(kv, hash);
    *bucket_of(kv, hash) = id;
    if (parent != NONE) {
        node->next_sibling = kv->nodes[parent].first_child;
        if (node->next_sibling != NONE) {
            kv->nodes[node->next_sibling].previous_sibling = id;
        }
        kv->nodes[parent].first_child = id;
    }
}

static void tree_remove(struct kv *kv, int id) {
    struct node *node = &kv->nodes[id];
    assert(node->first_child == NONE); /* or its children could never be found again */
    int *link = bucket_of(kv, node->hash);
    while (*link != id) {
        link = &kv->nodes[*link].next_in_bucket;
    }
    *link = node->next_in_bucket;
    if (node->next_sibling != NONE) {
        kv->nodes[node->next_sibling].previous_sibling = node->previous_sibling;
    }
    if (node->previous_sibling != NONE) {
        kv->nodes[node->previous_sibling].next_sibling = node->next_sibling;
    } else if (node->parent != NONE) {
        kv->nodes[node->parent].first_child = node->next_sibling;
    }
    node->registered = false;
}

/* ---- changing a node ---- */

static bool is_clean(const struct kv *kv, int node, int place) {
    const struct copy *copy = copy_at(kv, node, place);
    return copy->list != UNLISTED && copy->reads == 0 && count_valid(kv, node) >= 2;
}

static void begin_change(struct kv *kv, int node) {
    assert(kv->nodes[node].used);
    for (int worker = 0; worker < kv->host; worker++) {
        kv->places[worker].n_clean -= is_clean(kv, node, worker);
    }
}

static void free_node(struct kv *kv, int id) {
    struct node *node = &kv->nodes[id];
    if (node->registered) {
        tree_remove(kv, id);
        kv->stats.lost++;
    }
    if (node->keeper) {
        *node->keeper = NONE;
        node->keeper = NULL;
        kv->stats.lost++;
    }
    node->used = false;
    kv->free_nodes[kv->n_free_nodes++] = id;
}

/* Puts each copy of a changed node where it now belongs; frees a node without copies. */
static void end_change(struct kv *kv, int id) {
    const struct node *node = &kv->nodes[id];
    bool cached = node->registered || node->keeper;
    int n_copies = 0;
    for (int place = 0; place < kv->n_places; place++) {
        struct copy *copy = copy_at(kv, id, place);
        bool idle = copy->pins == 0 && copy->reads == 0;
        if (idle && (copy->state == KV_RESERVED || (copy->state == KV_VALID && !cached))) {
            free_slot(kv, id, place);
        }
        n_copies += copy->state != KV_ABSENT;
    }
    bool duplicate = count_valid(kv, id) >= 2;
    for (int place = 0; place < kv->n_places; place++) {
        struct copy *copy = copy_at(kv, id, place);
        enum list_kind kind = UNLISTED;
        if (copy->state == KV_VALID && copy->pins == 0 && cached) {
            kind = place == kv->host && duplicate ? DUPLICATES : MAIN;
        }
        if (copy->list != kind && copy->list != UNLISTED) {
            lru_remove(kv, id, place);
        }
        if (copy->list != kind) {
            lru_push(kv, id, place, kind);
        }
        if (place != kv->host) {
            kv->places[place].n_clean += is_clean(kv, id, place);
        }
    }
    if (n_copies == 0) {
        free_node(kv, id);
    }
}

static void drop_copy(struct kv *kv, int node, int place) {
    begin_change(kv, node);
    free_slot(kv, node, place);
    *(place == kv->host ? &kv->stats.host_evictions : &kv->stats.evictions) += 1;
    end_change(kv, node);
}

/* ---- making room ---- */

static bool is_idle(const struct kv *kv, int node) {
    for (int place = 0; place < kv->n_places; place++) {
        const struct copy *copy = copy_at(kv, node, place);
        if (copy->state != KV_ABSENT &&
            (copy->state != KV_VALID || copy->pins > 0 || copy->reads > 0)) {
            return false;
        }
    }
    return true;
}

/* The node after `node` in a walk over all descendants of `top`, parents first; NONE: the end. */
static int next_below(const struct kv *kv, int node, int top) {
    if (kv->nodes[node].first_child != NONE) {
        return kv->nodes[node].first_child;
    }
    while (node != top && kv->nodes[node].next_sibling == NONE) {
        node = kv->nodes[node].parent;
    }
    return node == top ? NONE : kv->nodes[node].next_sibling;
}

/* Drops the last copy of a block for good, and with it what could not be found without it (as a
 * rule nothing: children are colder, and gone before). False: something there is in use. */
static bool drop_subtree(struct kv *kv, int top) {
    for (int node = top; node != NONE; node = next_below(kv, node, top)) {
        if (!is_idle(kv, node)) {
            return false;
        }
    }
    int node = top;
    for (;;) {
        while (kv->nodes[node].first_child != NONE) {
            node = kv->nodes[node].first_child;
        }
        int parent = kv->nodes[node].parent;
        for (int place = 0; place < kv->n_places && kv->nodes[node].used; place++) {
            if (copy_at(kv, node, place)->state == KV_VALID) {
                drop_copy(kv, node, place);
            }
        }
        if (node == top) {
            return true;
        }
        node = parent;
    }
}

/* Drops the coldest blocks of a list until a slot of the place is free. */
static bool drop_coldest(struct kv *kv, int place, enum list_kind kind) {
    int node = kv->places[place].lists[kind].oldest;
    while (node != NONE && kv->places[place].n_free == 0) {
        int newer = copy_at(kv, node, place)->newer;
        if (copy_at(kv, node, place)->reads > 0) {
            node = newer;
        } else if (count_valid(kv, node) >= 2) {
            drop_copy(kv, node, place);
        } else if (!drop_subtree(kv, node)) {
            node = newer;
        }
    }
    return kv->places[place].n_free > 0;
}

/* A free slot; room is made if there is a block that can go at once. NONE: not now. */
static int take_slot(struct kv *kv, int place) {
    struct place *at = &kv->places[place];
    if (at->n_free == 0 && place == kv->host) {
        (void)(drop_coldest(kv, place, DUPLICATES) || drop_coldest(kv, place, MAIN));
    } else if (at->n_free == 0) {
        int victim = choose_device_victim(kv, place);
        if (victim != NONE) {
            drop_copy(kv, victim, place);
        } else if (kv->places[kv->host].n_slots == 0) {
            (void)drop_coldest(kv, place, MAIN);
        }
    }
    return at->n_free > 0 ? at->free_slots[--at->n_free] : NONE;
}

/* Gives `node` a slot at `place`, with one pin. The caller brackets the change. */
static bool occupy(struct kv *kv, int node, int place, enum kv_state state) {
    int slot = take_slot(kv, place);
    if (slot == NONE) {
        return false;
    }
    struct copy *copy = copy_at(kv, node, place);
    *copy = (struct copy){state, UNLISTED, slot, 1, 0, NONE, NONE};
    return true;
}

/* Orders a copy between two places of a node; `to` must be KV_RESERVED. */
static void order_copy(struct kv *kv, int node, int from, int to) {
    struct copy *source = copy_at(kv, node, from), *target = copy_at(kv, node, to);
    int worker = to == kv->host ? from : to; /* a device fetches; the host is written to */
    struct place *at = &kv->places[worker];
    assert(source->state == KV_VALID && target->state == KV_RESERVED);
    target->state = KV_ARRIVING;
    kv->places[to].n_arriving++;
    source->reads++;
    int last = (at->first_order + at->n_orders++) % kv->n_nodes;
    at->orders[last] = (struct kv_copy_order){worker, node, from, to, source->slot, target->slot};
}

/* Orders a copy of a device's block to host. False: the host has no room for it now. */
static bool page_out(struct kv *kv, int node, int worker) {
    struct copy *source = copy_at(kv, node, worker);
    begin_change(kv, node);
    source->reads++; /* or making room on the host could drop this very block */
    bool ok = occupy(kv, node, kv->host, KV_RESERVED);
    source->reads--;
    if (ok) {
        order_copy(kv, node, worker, kv->host);
        copy_at(kv, node, kv->host)->pins = 0;
    }
    end_change(kv, node);
    return ok;
}

/* ---- the public functions: see dynamo.h ---- */

static void *array(size_t n, size_t bytes) {
    return calloc(n ? n : 1, bytes);
}

static bool place_create(struct place *place, int n_slots, int n_all) {
    place->n_slots = place->n_free = n_slots;
    place->free_slots = array((size_t)n_slots, sizeof(int));
    place->orders = array((size_t)n_all, sizeof *place->orders);
    if (!place->free_slots || !place->orders) {
        return false;
    }
    for (int i = 0; i < n_slots; i++) {
        place->free_slots[i] = n_slots - 1 - i; /* slot 0 is taken first */
    }
    for (int i = 0; i < N_LISTS; i++) {
        place->lists[i] = (struct lru){NONE, NONE, 0};
    }
    return true;
}

struct kv *kv_create(const struct kv_config *config) {
    struct kv *kv = calloc(1, sizeof *kv);
    if (!kv) {
        return NULL;
    }
    kv->host = config->n_workers;
    kv->n_places = config->n_workers + 1;
    kv->policy = config->policy;
    kv->n_nodes = config->host_blocks;
    for (int i = 0; i < config->n_workers; i++) {
        kv->n_nodes += config->device_blocks[i];
    }
    for (kv->n_buckets = 16; kv->n_buckets < kv->n_nodes;) {
        kv->n_buckets *= 2;
    }
    size_t n_nodes = (size_t)kv->n_nodes;
    kv->nodes = array(n_nodes, sizeof *kv->nodes);
    kv->copies = array(n_nodes * (size_t)kv->n_places, sizeof *kv->copies);
    kv->free_nodes = array(n_nodes, sizeof *kv->free_nodes);
    kv->buckets = array((size_t)kv->n_buckets, sizeof *kv->buckets);
    bool ok = kv->nodes && kv->copies && kv->free_nodes && kv->buckets;
    for (int i = 0; i < kv->n_places; i++) {
        int n_slots = i == kv->host ? config->host_blocks : config->device_blocks[i];
        ok = place_create(&kv->places[i], n_slots, kv->n_nodes) && ok;
    }
    if (!ok) {
        kv_destroy(kv);
        return NULL;
    }
    for (int i = kv->n_nodes - 1; i >= 0; i--) {
        kv->free_nodes[kv->n_free_nodes++] = i;
    }
    for (int i = 0; i < kv->n_buckets; i++) {
        kv->buckets[i] = NONE;
    }
    return kv;
}

void kv_destroy(struct kv *kv) {
    for (int i = 0; kv && i < kv->n_places; i++) {
        free(kv->places[i].free_slots);
        free(kv->places[i].orders);
    }
    if (kv) {
        free(kv->nodes);
        free(kv->copies);
        free(kv->free_nodes);
        free(kv->buckets);
    }
    free(kv);
}

int kv_find(const struct kv *kv, const int *tokens, int max_blocks, int *nodes) {
    int n = 0;
    for (int parent = NONE; n < max_blocks; n++) {
        const int *block = tokens + (size_t)n * BLOCK_TOKENS;
        parent = find_child(kv, parent, block, block_hash(kv, parent, block));
        if (parent == NONE) {
            break;
        }
        nodes[n] = parent;
    }
    return n;
}

int kv_available(const struct kv *kv, int worker) {
    const struct place *at = &kv->places[worker];
    bool has_host = kv->places[kv->host].n_slots > 0;
    return at->n_free + (has_host ? at->n_clean : at->lists[MAIN].length);
}

int kv_reclaimable(const struct kv *kv, int worker) {
    return kv->places[worker].n_free + kv->places[worker].lists[MAIN].length;
}

int kv_new(struct kv *kv, int worker) {
    int slot = take_slot(kv, worker);
    if (slot == NONE) {
        return NONE;
    }
    int id = kv->free_nodes[--kv->n_free_nodes];
    kv->nodes[id] = (struct node){.used = true,
                                  .parent = NONE,
                                  .first_child = NONE,
                                  .next_sibling = NONE,
                                  .previous_sibling = NONE,
                                  .next_in_bucket = NONE};
    *copy_at(kv, id, worker) = (struct copy){KV_VALID, UNLISTED, slot, 1, 0, NONE, NONE};
    return id;
}

bool kv_reserve(struct kv *kv, int node, int worker) {
    assert(copy_at(kv, node, worker)->state == KV_ABSENT);
    begin_change(kv, node);
    bool ok = occupy(kv, node, worker, KV_RESERVED);
    end_change(kv, node);
    return ok;
}

bool kv_send(struct kv *kv, int node, int worker) {
    int from = choose_source(kv, node);
    if (copy_at(kv, node, worker)->state == KV_RESERVED && from != NONE) {
        begin_change(kv, node);
        order_copy(kv, node, from, worker);
        end_change(kv, node);
    }
    return from != NONE;
}

bool kv_fetch(struct kv *kv, int node, int worker) {
    struct copy *copy = copy_at(kv, node, worker);
    int from = choose_source(kv, node);
    if (from == NONE) {
        return false;
    }
    begin_change(kv, node);
    bool ok = true;
    copy_at(kv, node, from)->reads++; /* or making room could drop the source */
    if (copy->state == KV_ABSENT) {
        ok = occupy(kv, node, worker, KV_RESERVED);
    } else {
        copy->pins++;
    }
    copy_at(kv, node, from)->reads--;
    if (copy->state == KV_RESERVED) {
        order_copy(kv, node, from, worker);
    }
    end_change(kv, node);
    return ok;
}

void kv_unpin(struct kv *kv, int node, int worker) {
    assert(copy_at(kv, node, worker)->pins > 0);
    begin_change(kv, node);
    copy_at(kv, node, worker)->pins--;
    end_change(kv, node);
}

enum kv_state kv_state(const struct kv *kv, int node, int worker) {
    return copy_at(kv, node, worker)->state;
}

int kv_slot(const struct kv *kv, int node, int worker) {
    return copy_at(kv, node, worker)->slot;
}

/* Moves the pins of a private node to the node that was registered first with its content. */
static void merge(struct kv *kv, int private, int winner) {
    begin_change(kv, private);
    begin_change(kv, winner);
    for (int place = 0; place < kv->n_places; place++) {
        struct copy *mine = copy_at(kv, private, place), *other = copy_at(kv, winner, place);
        assert(mine->reads == 0 && mine->state != KV_ARRIVING && mine->list == UNLISTED);
        bool better = mine->state == KV_VALID && other->state == KV_RESERVED;
        if (mine->state != KV_ABSENT && (other->state == KV_ABSENT || better)) {
            struct copy swapped = *other;
            other->state = mine->state;
            other->slot = mine->slot;
            *mine = (struct copy){swapped.state, UNLISTED, swapped.slot, mine->pins, 0, NONE, NONE};
        }
        other->pins += mine->pins;
        mine->pins = 0;
    }
    end_change(kv, winner);
    end_change(kv, private);
}

int kv_register(struct kv *kv, int node, int parent, const int *tokens) {
    assert(!kv->nodes[node].registered && (parent == NONE || kv->nodes[parent].registered));
    uint64_t hash = block_hash(kv, parent, tokens);
    int winner = find_child(kv, parent, tokens, hash);
    if (winner != NONE) {
        merge(kv, node, winner);
        return winner;
    }
    tree_insert(kv, node, parent, tokens, hash);
    if (kv->policy == KV_WRITE_THROUGH && kv->places[kv->host].n_slots > 0) {
        (void)page_out(kv, node, choose_source(kv, node));
    }
    return node;
}

void kv_keep(struct kv *kv, int node, int *keeper) {
    kv->nodes[node].keeper = keeper;
    *keeper = node;
}

void kv_unkeep(struct kv *kv, int node) {
    begin_change(kv, node);
    *kv->nodes[node].keeper = NONE;
    kv->nodes[node].keeper = NULL;
    end_change(kv, node);
}

void kv_clean(struct kv *kv, int worker, int demand) {
    struct place *at = &kv->places[worker];
    int share = at->n_slots / CLEAN_SHARE;
    int low = share < CLEAN_LOW ? share : CLEAN_LOW;
    int goal = share < CLEAN_HIGH ? share : CLEAN_HIGH;
    int ready = at->n_free;
    bool cleaning = false;
    goal = goal > demand ? goal : demand;
    low = low > demand ? low : demand;
    int node = kv->places[kv->host].n_slots > 0 ? at->lists[MAIN].oldest : NONE;
    while (node != NONE && ready < goal) {
        int newer = copy_at(kv, node, worker)->newer;
        bool dirty = count_valid(kv, node) < 2 && copy_at(kv, node, worker)->reads == 0;
        if (!dirty) {
            ready++;
            node = newer;
            continue;
        }
        cleaning = cleaning || ready < low;
        if (!cleaning) {
            break;
        }
        if (page_out(kv, node, worker)) {
            ready++;
            node = newer;
        } else if (ready < demand && kv->places[kv->host].n_arriving == 0 &&
                   drop_subtree(kv, node)) {
            node = at->lists[MAIN].oldest; /* what stood beside it may be gone too */
            ready = at->n_free;
        } else {
            break;
        }
    }
}

bool kv_next_copy(struct kv *kv, int worker, struct kv_copy_order *order) {
    struct place *at = &kv->places[worker];
    if (at->n_orders == 0) {
        return false;
    }
    *order = at->orders[at->first_order];
    at->first_order = (at->first_order + 1) % kv->n_nodes;
    at->n_orders--;
    return true;
}

void kv_copied(struct kv *kv, const struct kv_copy_order *order, bool ok) {
    struct copy *source = copy_at(kv, order->node, order->from);
    struct copy *target = copy_at(kv, order->node, order->to);
    assert(target->state == KV_ARRIVING && source->reads > 0);
    begin_change(kv, order->node);
    source->reads--;
    target->state = ok ? KV_VALID : KV_RESERVED;
    kv->places[order->to].n_arriving--;
    if (ok) {
        int64_t *count = order->to == kv->host     ? &kv->stats.pages_out
                         : order->from == kv->host ? &kv->stats.pages_in
                                                   : &kv->stats.transfers;
        *count += 1;
    }
    end_change(kv, order->node);
}

int kv_pending(const struct kv *kv, int worker) {
    return kv->places[worker].n_orders;
}

int kv_used(const struct kv *kv, int place) {
    return kv->places[place].n_slots - kv->places[place].n_free;
}

struct kv_stats kv_stats(const struct kv *kv) {
    return kv->stats;
}
