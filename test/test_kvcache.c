/* test_kvcache.c: the rules of the cache, one by one, on caches of a few blocks. What becomes of
 * them under all orders of events is the matter of test_scheduler.c. */
#include "check.h"
#include "invariants.h"

#include <stdlib.h>

enum { HOST_OF_ONE = 1 /* the host's place beside one worker */ };

static struct kv *create(int device_blocks, int host_blocks, enum kv_policy policy) {
    struct kv_config config = {.n_workers = 1,
                               .device_blocks = {device_blocks},
                               .host_blocks = host_blocks,
                               .policy = policy};
    return kv_create(&config);
}

/* Tokens of a text of its own: `text` first, then the position. */
static void write_text(int *tokens, int n_blocks, int text) {
    for (int i = 0; i < n_blocks * BLOCK_TOKENS; i++)
        tokens[i] = i == 0 ? 1000 + text : i;
}

/* kv_find and kv_register with the hashes of the text. */
static int find_text(const struct kv *kv, const int *tokens, int n_blocks, int *nodes) {
    uint64_t hashes[8];
    for (int i = 0; i < n_blocks; i++)
        hashes[i] = kv_hash(i > 0 ? hashes[i - 1] : 0, tokens + i * BLOCK_TOKENS);
    return kv_find(kv, hashes, tokens, n_blocks, nodes);
}

static int enter(struct kv *kv, int node, int parent, const int *tokens) {
    uint64_t before = parent == -1 ? 0 : kv->nodes[parent].hash;
    return kv_register(kv, node, parent, kv_hash(before, tokens), tokens);
}

/* Computes a text on a worker, registers its blocks and lets them go, the last first. */
static void store(struct check *check, struct kv *kv, int worker, int text, int n_blocks) {
    int tokens[8 * BLOCK_TOKENS], nodes[8];
    write_text(tokens, n_blocks, text);
    for (int i = 0; i < n_blocks; i++) {
        CHECK(kv_make_room(kv, worker, 1), "no room for text %d, block %d", text, i);
        int node = kv_new(kv, worker);
        nodes[i] = enter(kv, node, i > 0 ? nodes[i - 1] : -1, tokens + i * BLOCK_TOKENS);
    }
    for (int i = n_blocks - 1; i >= 0; i--)
        kv_unpin(kv, nodes[i], worker);
    CHECK(!kv_check(kv), "%s", kv_check(kv));
}

static int find(const struct kv *kv, int text, int n_blocks) {
    int tokens[8 * BLOCK_TOKENS], nodes[8];
    write_text(tokens, n_blocks, text);
    return find_text(kv, tokens, n_blocks, nodes);
}

/* Carries out all orders of a worker; returns how many there were. */
static int copy_all(struct kv *kv, int worker, bool ok) {
    struct kv_copy_order order = {0};
    int n = 0;
    for (; kv_next_copy(kv, worker, &order); n++)
        kv_copied(kv, &order, ok);
    return n;
}

static void tail_goes_first(struct check *check) {
    struct kv *kv = create(3, 0, KV_ON_EVICT);
    store(check, kv, 0, 1, 3);
    for (int left = 2; left >= 0; left--) {
        CHECK(kv_make_room(kv, 0, 3 - left), "no room");
        CHECK(find(kv, 1, 3) == left, "%d blocks are left, expected %d", find(kv, 1, 3), left);
    }
    CHECK(kv_stats(kv).lost == 3 && kv_stats(kv).evictions == 3, "counters");
    CHECK(kv_used(kv, 0) == 0, "used");
    kv_destroy(kv);
}

static void least_recently_used_goes_first(struct check *check) {
    struct kv *kv = create(4, 0, KV_ON_EVICT);
    int tokens[BLOCK_TOKENS], node = -1;
    for (int text = 0; text < 4; text++)
        store(check, kv, 0, text, 1);
    write_text(tokens, 1, 0);
    CHECK(find_text(kv, tokens, 1, &node) == 1, "text 0 is not found");
    CHECK(kv_fetch(kv, node, 0), "fetch");
    kv_unpin(kv, node, 0); /* now 1 is the coldest, 0 the warmest */
    static const int order[] = {1, 2, 3, 0};
    for (int i = 0; i < 4; i++) {
        CHECK(find(kv, order[i], 1) == 1, "text %d has gone too early", order[i]);
        CHECK(kv_make_room(kv, 0, i + 1), "no room");
        CHECK(find(kv, order[i], 1) == 0, "text %d has not gone", order[i]);
    }
    kv_destroy(kv);
}

static void pinned_blocks_stay(struct check *check) {
    struct kv *kv = create(2, 0, KV_ON_EVICT);
    int tokens[BLOCK_TOKENS], node = -1;
    store(check, kv, 0, 1, 1);
    store(check, kv, 0, 2, 1);
    write_text(tokens, 1, 1);
    CHECK(find_text(kv, tokens, 1, &node) == 1 && kv_fetch(kv, node, 0), "fetch");
    CHECK(kv_make_room(kv, 0, 1), "the other one could go");
    CHECK(!kv_make_room(kv, 0, 2), "a pinned block was dropped");
    CHECK(find(kv, 1, 1) == 1 && find(kv, 2, 1) == 0, "the wrong one has gone");
    kv_destroy(kv);
}

/* When so many cannot be had at present, the others stay. */
static void nothing_goes_in_vain(struct check *check) {
    struct kv *kv = create(3, 0, KV_ON_EVICT);
    for (int text = 1; text <= 3; text++)
        store(check, kv, 0, text, 1);
    int tokens[BLOCK_TOKENS], node = -1;
    write_text(tokens, 1, 2);
    CHECK(find_text(kv, tokens, 1, &node) == 1 && kv_fetch(kv, node, 0), "fetch");
    CHECK(!kv_make_room(kv, 0, 3) && find(kv, 1, 1) && find(kv, 3, 1), "dropped in vain");
    kv_unpin(kv, node, 0);
    CHECK(kv_make_room(kv, 0, 3) && kv_used(kv, 0) == 0, "now they go");
    kv_destroy(kv);
}

static void page_out_and_in(struct check *check) {
    struct kv *kv = create(2, 4, KV_ON_EVICT);
    int tokens[2 * BLOCK_TOKENS], nodes[2];
    store(check, kv, 0, 1, 2);
    CHECK(!kv_make_room(kv, 0, 2), "dirty blocks were dropped");
    CHECK(kv_pending(kv, 0) == 2 && !kv_make_room(kv, 0, 2), "two page-outs are wanted");
    struct kv_copy_order order = {0};
    CHECK(kv_next_copy(kv, 0, &order), "no order");
    CHECK(order.worker == 0 && order.from == 0 && order.to == HOST_OF_ONE, "the order");
    CHECK(order.from_slot == 1, "the tail is in slot 1, ordered was %d", order.from_slot);
    CHECK(kv_used(kv, 0) == 2 && !kv_make_room(kv, 0, 1), "in flight, and dropped");
    kv_copied(kv, &order, true);
    CHECK(kv_make_room(kv, 0, 1) && kv_used(kv, 0) == 1, "clean, and not dropped");
    CHECK(copy_all(kv, 0, true) == 1 && kv_make_room(kv, 0, 2), "the second one");
    write_text(tokens, 2, 1);
    CHECK(find_text(kv, tokens, 2, nodes) == 2, "not found on the host");
    CHECK(kv_fetch(kv, nodes[0], 0) && kv_state(kv, nodes[0], 0) == KV_ARRIVING, "page in");
    CHECK(copy_all(kv, 0, false) == 1 && kv_state(kv, nodes[0], 0) == KV_RESERVED, "a failure");
    CHECK(kv_send(kv, nodes[0], 0) && copy_all(kv, 0, true) == 1, "ordered again");
    CHECK(kv_state(kv, nodes[0], 0) == KV_VALID, "arrived");
    CHECK(kv_stats(kv).pages_out == 2 && kv_stats(kv).pages_in == 1, "counters");
    CHECK(kv_used(kv, HOST_OF_ONE) == 2, "a page-in keeps the host's copy");
    CHECK(!kv_check(kv), "%s", kv_check(kv));
    kv_destroy(kv);
}

/* A host of 3: texts 1 and 2 are there alone, 3 is on the device too. Text 4 takes the place of 3,
 * though 1 is colder. */
static void duplicates_go_first(struct check *check) {
    struct kv *kv = create(2, 3, KV_ON_EVICT);
    int tokens[BLOCK_TOKENS], node = -1;
    for (int text = 1; text <= 3; text++) {
        store(check, kv, 0, text, 1);
        (void)kv_make_room(kv, 0, 2);
        (void)copy_all(kv, 0, true);
        CHECK(kv_make_room(kv, 0, 2), "no room");
    }
    write_text(tokens, 1, 3);
    CHECK(find_text(kv, tokens, 1, &node) == 1 && kv_fetch(kv, node, 0), "fetch");
    CHECK(copy_all(kv, 0, true) == 1, "page in");
    store(check, kv, 0, 4, 1);
    CHECK(!kv_make_room(kv, 0, 1) && copy_all(kv, 0, true) == 1, "page out");
    CHECK(find(kv, 1, 1) && find(kv, 2, 1) && find(kv, 3, 1) && find(kv, 4, 1), "one is lost");
    CHECK(kv_stats(kv).lost == 0 && kv_stats(kv).host_evictions == 1, "counters");
    kv_unpin(kv, node, 0);
    kv_destroy(kv);
}

static void full_host_loses_the_coldest(struct check *check) {
    struct kv *kv = create(1, 2, KV_ON_EVICT);
    for (int text = 1; text <= 4; text++) {
        store(check, kv, 0, text, 1);
        (void)kv_make_room(kv, 0, 1);
        (void)copy_all(kv, 0, true);
        CHECK(kv_make_room(kv, 0, 1), "no room");
    }
    CHECK(!find(kv, 1, 1) && !find(kv, 2, 1) && find(kv, 3, 1) && find(kv, 4, 1), "LRU");
    CHECK(kv_stats(kv).lost == 2, "%d lost", (int)kv_stats(kv).lost);
    kv_destroy(kv);
}

static void write_through_copies_at_once(struct check *check) {
    struct kv *kv = create(4, 16, KV_WRITE_THROUGH);
    for (int text = 0; text < 4; text++) {
        store(check, kv, 0, text, 3);
        (void)copy_all(kv, 0, true);
        CHECK(kv_used(kv, HOST_OF_ONE) == 3 * (text + 1), "%d on the host",
              kv_used(kv, HOST_OF_ONE));
        (void)kv_make_room(kv, 0, 4);
        CHECK(kv_pending(kv, 0) == 0 && kv_used(kv, 0) == 0, "all were clean");
    }
    for (int text = 0; text < 4; text++)
        CHECK(find(kv, text, 3) == 3, "text %d is lost", text);
    kv_destroy(kv);
}

/* Text 1 came to the host before text 2, but was used after it. */
static void host_learns_what_was_used(struct check *check) {
    struct kv *kv = create(2, 2, KV_WRITE_THROUGH);
    int tokens[BLOCK_TOKENS], node = -1;
    for (int text = 1; text <= 2; text++) {
        store(check, kv, 0, text, 1);
        CHECK(copy_all(kv, 0, true) == 1, "to the host at once");
    }
    write_text(tokens, 1, 1);
    CHECK(find_text(kv, tokens, 1, &node) == 1 && kv_fetch(kv, node, 0), "fetch");
    kv_unpin(kv, node, 0);
    CHECK(kv_make_room(kv, 0, 2), "both are clean");
    store(check, kv, 0, 3, 1);
    CHECK(copy_all(kv, 0, true) == 1 && find(kv, 1, 1) && !find(kv, 2, 1), "the colder one goes");
    kv_destroy(kv);
}

/* The cleaner works between its watermarks, and stops when a small host cannot help. */
static void cleaner_stops(struct check *check) {
    for (int host_blocks = 0; host_blocks <= 80; host_blocks++) {
        struct kv *kv = create(64, host_blocks, KV_ON_EVICT);
        for (int text = 0; text < 64; text++)
            store(check, kv, 0, text, 1);
        int n = 0, n_rounds = 0;
        for (int copied = 1; copied > 0 && n_rounds < 100; n_rounds++) {
            kv_clean(kv, 0);
            copied = copy_all(kv, 0, true);
            n += copied;
        }
        CHECK(n_rounds < 100, "host %d: it never stops", host_blocks);
        CHECK(n == (host_blocks < 8 ? host_blocks : 8), "host %d: %d copies", host_blocks, n);
        kv_destroy(kv);
    }
}

/* Two workers of as many blocks each, and the host. */
static struct kv *create_two(int device_blocks, int host_blocks, enum kv_order order) {
    struct kv_config config = {.n_workers = 2,
                               .device_blocks = {device_blocks, device_blocks},
                               .host_blocks = host_blocks,
                               .order = order};
    return kv_create(&config);
}

static int node_of(const struct kv *kv, int text) { /* of the first block; -1: not cached */
    int tokens[BLOCK_TOKENS], node = -1;
    write_text(tokens, 1, text);
    return find_text(kv, tokens, 1, &node) == 1 ? node : -1;
}

/* Uses a text's first block on a worker, which fetches it if it must. */
static void use(struct check *check, struct kv *kv, int worker, int text) {
    int node = node_of(kv, text);
    CHECK(node != -1 && kv_fetch(kv, node, worker), "text %d cannot be had", text);
    (void)copy_all(kv, worker, true);
    CHECK(kv_state(kv, node, worker) == KV_VALID, "text %d has not come", text);
    kv_unpin(kv, node, worker);
}

/* 32 cold texts are on worker 0 alone, 32 hot ones on a peer (or the host) too: the cold ones go,
 * though each must be paged out first. */
static void coldest_go_clean_or_dirty(struct check *check) {
    static const enum kv_order orders[] = {KV_LRU, KV_FIFO, KV_LFU};
    for (int i = 0; i < 6; i++) {
        struct kv *kv = create_two(64, 128, orders[i % 3]);
        for (int text = 0; text < 64; text++)
            store(check, kv, 0, text, 1);
        for (int text = 32; text < 64; text++) {
            if (i < 3)
                use(check, kv, 1, text);
            else
                CHECK(page_out(kv, copy_at(kv, node_of(kv, text), 0), true, "test"), "no room");
            (void)copy_all(kv, 0, true);
            use(check, kv, 0, text);
        }
        CHECK(kv->places[0].n[CLEAN] == 32 && kv->places[0].n[DIRTY] == 32, "half of them");
        kv_clean(kv, 0);
        CHECK(kv_pending(kv, 0) == 8, "what is clean, but hot, is not ready to go");
        for (int n = 1; n <= 32; n++)
            for (int ask = 0; !kv_make_room(kv, 0, n) && ask < 10; ask++)
                (void)copy_all(kv, 0, true);
        CHECK(kv_usage(kv, 0).free == 32, "%d free", kv_usage(kv, 0).free);
        for (int text = 0; text < 64; text++)
            CHECK(kv_state(kv, node_of(kv, text), 0) == (text < 32 ? KV_ABSENT : KV_VALID),
                  "case %d, text %d", i, text);
        CHECK(kv_stats(kv).lost == 0 && !kv_check(kv), "%s", kv_check(kv));
        kv_destroy(kv);
    }
}

/* While page-outs are under way that will make the room, asking again costs nothing: it looks at no
 * block, for there is none here that it could look at. Each frees its slot as it ends. */
static void asking_again_looks_at_no_block(struct check *check) {
    struct kv *kv = create(256, 256, KV_ON_EVICT);
    for (int text = 0; text < 256; text++)
        store(check, kv, 0, text, 1);
    CHECK(!kv_make_room(kv, 0, 100) && kv_pending(kv, 0) == 100, "100 page-outs");
    struct kv aside = *kv;
    kv->nodes = NULL;
    kv->places[0].copies = NULL;
    kv->places[0].orders[CLEAN].heap = kv->places[0].orders[DIRTY].heap = NULL;
    for (int i = 0; i < 1000; i++)
        CHECK(!kv_make_room(kv, 0, 1 + i % 100), "not yet");
    CHECK(kv_pending(kv, 0) == 100, "%d page-outs", kv_pending(kv, 0));
    *kv = aside;
    CHECK(copy_all(kv, 0, true) == 100 && kv_usage(kv, 0).free == 100, "as they end");
    CHECK(kv_make_room(kv, 0, 100) && find(kv, 0, 1) && find(kv, 255, 1), "nothing is lost");
    kv_destroy(kv);
}

/* What waits for room on the device is held on the host, though it is the coldest there. When all
 * of the host is held, others are lost: nobody waits for ever. */
static void held_on_the_host(struct check *check) {
    for (int n_held = 2; n_held <= 4; n_held += 2) {
        struct kv *kv = create(4, 4, KV_ON_EVICT);
        int nodes[4];
        store(check, kv, 0, 1, 4);
        CHECK(!kv_make_room(kv, 0, 4) && copy_all(kv, 0, true) == 4, "page out");
        for (int i = 0; i < n_held; i++) {
            int tokens[4 * BLOCK_TOKENS];
            write_text(tokens, 4, 1);
            CHECK(find_text(kv, tokens, 4, nodes) == 4, "not on the host");
            CHECK(kv_hold(kv, nodes[i], HOST_OF_ONE), "hold");
        }
        for (int text = 2; text < 12; text++) {
            for (int i = 0; !kv_make_room(kv, 0, 4) && i < 10; i++)
                (void)copy_all(kv, 0, true);
            store(check, kv, 0, text, 4);
            CHECK(find(kv, 1, 4) >= n_held, "%d of it are left", find(kv, 1, 4));
            CHECK(kv_usage(kv, HOST_OF_ONE).pinned == n_held, "pinned");
        }
        CHECK(kv_make_room(kv, 0, 4) == (n_held == 4), "the host can take some, or none");
        for (int i = n_held - 1; i >= 0; i--)
            kv_unpin(kv, nodes[i], HOST_OF_ONE);
        CHECK(kv_usage(kv, HOST_OF_ONE).pinned == 0 && !kv_check(kv), "%s", kv_check(kv));
        kv_destroy(kv);
    }
}

/* Both workers want all their blocks at once and the host is small: whatever the order, and though
 * each asks, and cleans, whenever a copy of the other has ended, both come to their end. */
static void small_hosts_serve_all(struct check *check) {
    static const int hosts[] = {0, 1, 2, 5, 9};
    for (int i = 0; i < 20; i++) {
        struct kv *kv = create_two(16, hosts[i / 4], (enum kv_order)(i % 4));
        struct kv_copy_order order = {0};
        bool had[2] = {false, false};
        int n_copies = 0;
        for (int text = 0; text < 32; text++)
            store(check, kv, text % 2, text, 1);
        for (int turn = 0; !(had[0] && had[1]) && n_copies < 500; turn = !turn) {
            for (int j = 0; j < 2; j++) {
                int worker = j == 0 ? turn : !turn;
                had[worker] = had[worker] || kv_make_room(kv, worker, 16);
                kv_clean(kv, worker);
            }
            if (kv_next_copy(kv, turn, &order)) {
                kv_copied(kv, &order, true);
                n_copies++;
            }
            CHECK(!kv_check(kv), "%s", kv_check(kv));
        }
        CHECK(had[0] && had[1] && n_copies <= 32, "order %d, host %d: %d copies", i % 4,
              hosts[i / 4], n_copies);
        kv_destroy(kv);
    }
}

/* The cleaners of two workers come to their end in every order, with blocks that are here and
 * there, of different ages and uses. */
static void cleaners_stop_in_every_order(struct check *check) {
    for (int i = 0; i < 4 * 70; i++) {
        struct kv *kv = create_two(24, i / 4, (enum kv_order)(i % 4));
        int n = 0;
        for (int text = 0; text < 48; text++)
            store(check, kv, text % 2, text, 1);
        for (int text = 0; text < 48; text += 3) /* the hot ones are on the host too, if it can */
            for (int again = 0; again < 4; again++) {
                (void)(again == 2 &&
                       page_out(kv, copy_at(kv, node_of(kv, text), text % 2), true, "test"));
                (void)copy_all(kv, text % 2, true);
                use(check, kv, text % 2, text);
            }
        for (int idle = 0; idle < 2 && n < 1000; idle++) {
            for (int worker = 0; worker < 2; worker++) {
                kv_clean(kv, worker);
                int n_copied = copy_all(kv, worker, true);
                n += n_copied;
                idle = n_copied > 0 ? -1 : idle;
            }
        }
        CHECK(n < 200, "order %d, host %d: it never stops", i % 4, i / 4);
        CHECK(!kv_check(kv), "%s", kv_check(kv));
        kv_destroy(kv);
    }
}

/* Texts 0 to 3 come in this order; then 0 is used again twice, and 1 once. */
static void orders_differ(struct check *check) {
    static const enum kv_order orders[] = {KV_LRU, KV_FIFO, KV_LFU, KV_RANDOM, KV_RANDOM};
    static const char *expected[] = {"2301", "0123", "2310"};
    char gone[5][8] = {""};
    for (int i = 0; i < 5; i++) {
        struct kv_config config = {.n_workers = 1, .device_blocks = {4}, .order = orders[i]};
        struct kv *kv = kv_create(&config);
        for (int text = 0; text < 4; text++)
            store(check, kv, 0, text, 1);
        for (int again = 0; again < 3; again++)
            use(check, kv, 0, again / 2);
        for (int n = 1; n <= 4; n++) {
            CHECK(kv_make_room(kv, 0, n), "no room");
            for (int text = 0; text < 4; text++)
                if (!find(kv, text, 1) && !strchr(gone[i], '0' + text))
                    gone[i][n - 1] = (char)('0' + text);
        }
        CHECK(i >= 3 || strcmp(gone[i], expected[i]) == 0, "order %d: %s", i, gone[i]);
        kv_destroy(kv);
    }
    CHECK(strlen(gone[3]) == 4 && strcmp(gone[3], gone[4]) == 0, "%s, %s", gone[3], gone[4]);
    for (int i = 0; i < 3; i++)
        CHECK(strcmp(gone[3], expected[i]) != 0, "random, and as order %d: %s", i, gone[3]);
}

/* Each slot is counted once, and a copy that came when nobody wanted it any more, and went. */
static void slots_and_copies_are_accounted_for(struct check *check) {
    struct kv *kv = create_two(4, 4, KV_LRU);
    struct kv_copy_order order = {0};
    for (int text = 0; text < 3; text++)
        store(check, kv, 0, text, 1);
    int node = node_of(kv, 0);
    CHECK(kv_fetch(kv, node, 1) && kv_next_copy(kv, 1, &order), "a transfer");
    struct kv_usage here = kv_usage(kv, 0), there = kv_usage(kv, 1);
    CHECK(here.free == 1 && here.cached == 3 && here.pinned == 0 && here.in_flight == 0, "here");
    CHECK(there.free == 3 && there.cached == 0 && there.in_flight == 1, "there");
    kv_copied(kv, &order, true);
    CHECK(kv_usage(kv, 1).pinned == 1 && kv_usage(kv, 1).in_flight == 0, "it has come");
    kv_unpin(kv, node, 1);
    node = node_of(kv, 1);
    CHECK(kv_fetch(kv, node, 1) && kv_next_copy(kv, 1, &order), "a transfer");
    kv_unpin(kv, node, 1); /* given up before it has come */
    kv_copied(kv, &order, true);
    CHECK(kv_usage(kv, 1).cached == 2 && kv_stats(kv).unused == 0, "both are still there");
    CHECK(kv_make_room(kv, 1, 4) && kv_stats(kv).evictions == 2, "both have gone");
    CHECK(kv_stats(kv).unused == 1, "%d copies were never used", (int)kv_stats(kv).unused);
    kv_destroy(kv);
}

/* Copies that somebody waits for are not behind page-outs. */
static void copies_in_go_first(struct check *check) {
    struct kv *kv = create_two(4, 8, KV_LRU);
    struct kv_copy_order order = {0};
    store(check, kv, 1, 9, 1);
    for (int text = 0; text < 3; text++)
        store(check, kv, 0, text, 1);
    CHECK(!kv_make_room(kv, 0, 4) && kv_pending(kv, 0) == 3, "page-outs");
    CHECK(kv_fetch(kv, node_of(kv, 9), 0) && kv_pending(kv, 0) == 4, "one in");
    CHECK(kv_next_copy(kv, 0, &order) && order.from == 1 && order.to == 0, "it goes first");
    for (int i = 0; i < 3; i++)
        CHECK(kv_next_copy(kv, 0, &order) && order.to == 2, "then those out");
    CHECK(!kv_next_copy(kv, 0, &order) && !kv_check(kv), "and no more");
    kv_destroy(kv);
}

/* Two blocks with one 64-bit hash: what differs before the last two tokens, which are mixed in
 * together, is made up for by these, if both have the sign of a token. */
static void make_collision(int *one, int *other) {
    const uint64_t signs = (uint64_t)1 << 63 | (uint64_t)1 << 31;
    uint64_t hashes[2], difference = signs;
    for (int i = 0; i < BLOCK_TOKENS; i++)
        one[i] = other[i] = i;
    for (int t = 1; difference & signs; t++) {
        other[0] = t;
        for (int text = 0; text < 2; text++) {
            const int *tokens = text == 0 ? one : other;
            hashes[text] = 0;
            for (int i = 0; i < BLOCK_TOKENS - 2; i += 2)
                hashes[text] =
                    mix(hashes[text], (uint64_t)tokens[i] << 32 | (uint32_t)tokens[i + 1]);
        }
        difference = hashes[0] ^ hashes[1];
    }
    other[BLOCK_TOKENS - 2] ^= (int)(difference >> 32);
    other[BLOCK_TOKENS - 1] ^= (int)(uint32_t)difference;
}

static void collision_is_no_hit(struct check *check) {
    int one[BLOCK_TOKENS], other[BLOCK_TOKENS], found = -1;
    make_collision(one, other);
    CHECK(memcmp(one, other, sizeof one) != 0, "the blocks are equal");
    CHECK(kv_hash(0, one) == kv_hash(0, other), "the hashes differ");
    struct kv *kv = create(4, 0, KV_ON_EVICT);
    int first = enter(kv, kv_new(kv, 0), -1, one);
    CHECK(find_text(kv, other, 1, &found) == 0, "a wrong hit");
    int second = enter(kv, kv_new(kv, 0), -1, other);
    CHECK(first != second, "two texts became one");
    CHECK(find_text(kv, one, 1, &found) == 1 && found == first, "the first is not found");
    CHECK(find_text(kv, other, 1, &found) == 1 && found == second, "the second is not found");
    int below[2][BLOCK_TOKENS] = {{0}};
    (void)enter(kv, kv_new(kv, 0), second, below[0]);
    int path[2 * BLOCK_TOKENS];
    memcpy(path, one, sizeof one);
    memcpy(path + BLOCK_TOKENS, below[0], sizeof below[0]);
    int nodes[2];
    CHECK(find_text(kv, path, 2, nodes) == 1, "the child of another parent was found");
    memcpy(path, other, sizeof other);
    CHECK(find_text(kv, path, 2, nodes) == 2, "the child is not found");
    CHECK(!kv_check(kv), "%s", kv_check(kv));
    kv_destroy(kv);
}

static void first_registered_wins(struct check *check) {
    struct kv_config config = {.n_workers = 2, .device_blocks = {4, 4}};
    struct kv *kv = kv_create(&config);
    int tokens[BLOCK_TOKENS];
    write_text(tokens, 1, 1);
    int first = kv_new(kv, 0), second = kv_new(kv, 1);
    CHECK(enter(kv, first, -1, tokens) == first, "the first");
    CHECK(enter(kv, second, -1, tokens) == first, "the second has not given way");
    CHECK(kv_state(kv, first, 1) == KV_VALID, "its copy, on another worker, was of use");
    int third = kv_new(kv, 0);
    CHECK(kv_used(kv, 0) == 2, "two slots");
    CHECK(enter(kv, third, -1, tokens) == first && kv_used(kv, 0) == 1, "a copy too many");
    kv_unpin(kv, first, 0);
    CHECK(!kv_make_room(kv, 0, 4), "it has two pins there");
    kv_unpin(kv, first, 0);
    CHECK(kv_make_room(kv, 0, 4), "it has none now");
    kv_unpin(kv, first, 1);
    CHECK(find(kv, 1, 1) == 1, "lost");
    kv_destroy(kv);
}

/* A parent that goes before its child takes the way to it; the child is dropped in its turn, and a
 * parent that is computed again does not find it. */
static void orphans_are_not_found(struct check *check) {
    struct kv_config config = {.n_workers = 2, .device_blocks = {2, 2}};
    struct kv *kv = kv_create(&config);
    int tokens[2 * BLOCK_TOKENS], nodes[2];
    write_text(tokens, 2, 1);
    nodes[0] = enter(kv, kv_new(kv, 0), -1, tokens);
    nodes[1] = enter(kv, kv_new(kv, 1), nodes[0], tokens + BLOCK_TOKENS);
    kv_unpin(kv, nodes[1], 1);
    kv_unpin(kv, nodes[0], 0);
    CHECK(find(kv, 1, 2) == 2, "not found");
    CHECK(kv_make_room(kv, 0, 2) && find(kv, 1, 2) == 0, "the parent is found");
    store(check, kv, 0, 1, 1);
    CHECK(find(kv, 1, 2) == 1, "an orphan was found under another parent");
    CHECK(kv_used(kv, 1) == 1 && kv_make_room(kv, 1, 2), "the orphan cannot go");
    kv_destroy(kv);
}

static void kept_blocks(struct check *check) {
    struct kv *kv = create(2, 2, KV_ON_EVICT);
    int keeper = -1, node = kv_new(kv, 0);
    kv_keep(kv, node, &keeper);
    kv_unpin(kv, node, 0);
    CHECK(keeper == node && kv_used(kv, 0) == 1, "it is not kept");
    CHECK(!kv_make_room(kv, 0, 2) && kv_pending(kv, 0) == 1, "it is paged out like any other");
    struct kv_copy_order order = {0};
    CHECK(kv_next_copy(kv, 0, &order), "no order");
    CHECK(kv_fetch(kv, node, 0), "pinned again, while it is copied");
    kv_unkeep(kv, node);
    CHECK(keeper == -1 && kv_state(kv, node, 0) == KV_ARRIVING, "it may not be written yet");
    kv_copied(kv, &order, true);
    CHECK(kv_state(kv, node, 0) == KV_VALID, "now it may");
    CHECK(kv_used(kv, HOST_OF_ONE) == 0, "what is going to be stale must go");
    kv_keep(kv, node, &keeper);
    kv_unpin(kv, node, 0);
    for (int text = 0; text < 8; text++) { /* it becomes the coldest, first here, then there */
        (void)kv_make_room(kv, 0, 1);
        (void)copy_all(kv, 0, true);
        store(check, kv, 0, text, 1);
    }
    CHECK(keeper == -1, "its owner was not told that it is lost");
    kv_destroy(kv);
}

/* The source of a hand-over that failed must stay until it has succeeded. */
static void failed_hand_over(struct check *check) {
    struct kv_config config = {.n_workers = 2, .device_blocks = {2, 2}};
    struct kv *kv = kv_create(&config);
    int node = kv_new(kv, 0);
    CHECK(kv_reserve(kv, node, 1) && kv_send(kv, node, 1), "send");
    kv_unpin(kv, node, 0);
    CHECK(copy_all(kv, 1, false) == 1, "one copy");
    CHECK(kv_state(kv, node, 1) == KV_RESERVED && kv_used(kv, 0) == 1, "the source is gone");
    CHECK(!kv_make_room(kv, 0, 2), "the source was dropped");
    CHECK(kv_send(kv, node, 1) && copy_all(kv, 1, true) == 1, "again");
    CHECK(kv_state(kv, node, 1) == KV_VALID && kv_used(kv, 0) == 0, "the source is of no use now");
    kv_unpin(kv, node, 1);
    CHECK(kv_used(kv, 1) == 0 && !kv_check(kv), "it was private");
    kv_destroy(kv);
}

int main(int argc, char **argv) {
    static const struct test tests[] = {
        {"tail_goes_first", tail_goes_first},
        {"least_recently_used_goes_first", least_recently_used_goes_first},
        {"pinned_blocks_stay", pinned_blocks_stay},
        {"nothing_goes_in_vain", nothing_goes_in_vain},
        {"page_out_and_in", page_out_and_in},
        {"duplicates_go_first", duplicates_go_first},
        {"full_host_loses_the_coldest", full_host_loses_the_coldest},
        {"write_through_copies_at_once", write_through_copies_at_once},
        {"host_learns_what_was_used", host_learns_what_was_used},
        {"cleaner_stops", cleaner_stops},
        {"coldest_go_clean_or_dirty", coldest_go_clean_or_dirty},
        {"asking_again_looks_at_no_block", asking_again_looks_at_no_block},
        {"held_on_the_host", held_on_the_host},
        {"small_hosts_serve_all", small_hosts_serve_all},
        {"cleaners_stop_in_every_order", cleaners_stop_in_every_order},
        {"orders_differ", orders_differ},
        {"slots_and_copies_are_accounted_for", slots_and_copies_are_accounted_for},
        {"copies_in_go_first", copies_in_go_first},
        {"collision_is_no_hit", collision_is_no_hit},
        {"first_registered_wins", first_registered_wins},
        {"orphans_are_not_found", orphans_are_not_found},
        {"kept_blocks", kept_blocks},
        {"failed_hand_over", failed_hand_over},
    };
    return check_run(tests, sizeof tests / sizeof *tests, argc, argv);
}
