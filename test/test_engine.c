/* test_engine.c: the work of a step that dynamo.c counts, against sums done by hand. */
#define main dynamo_main
#include "../dynamo.c"
#undef main
#include "check.h"

enum { ROWS = 4, MATRICES = 7 };

/* Two layers of seven matrices of 10 x 3 in 120 bytes each, and an output of 50 x 3 in 600. */
static struct engine *open_counts(void) {
    static struct engine engine;
    static struct tensor matrix = {.rows = 10, .cols = 3, .bytes = 120};
    static struct tensor output = {.rows = 50, .cols = 3, .bytes = 600};
    static const struct tensor *layers[2][N_ROLES];
    static struct model model = {.config = {.n_layers = 2,
                                            .d_model = 3,
                                            .n_heads = 6,
                                            .n_kv_heads = 2,
                                            .head_dim = 4,
                                            .vocab_size = 50},
                                 .layers = layers};
    static const int matrices[MATRICES] = {ATTN_Q,   ATTN_K, ATTN_V,  ATTN_OUTPUT,
                                           FFN_GATE, FFN_UP, FFN_DOWN};
    for (int i = 0; i < 2 * MATRICES; i++)
        layers[i / MATRICES][matrices[i % MATRICES]] = &matrix;
    layers[0][OUTPUT] = &output;
    engine = (struct engine){.config = {.model = &model, .kv_type = KV_BF16},
                             .cost = model_cost(&model)};
    return &engine;
}

/* Two sequences, of 3 rows from position 5 on and of one row at 100. */
static struct batch make_batch(bool first_generated, bool second_generated) {
    static int position[ROWS] = {5, 6, 7, 100};
    static struct sequence sequences[2];
    sequences[0] = (struct sequence){.n_rows = 3, .start = 5, .generated = first_generated};
    sequences[1] =
        (struct sequence){.first_row = 3, .n_rows = 1, .start = 100, .generated = second_generated};
    return (struct batch){.n_rows = ROWS,
                          .n_sequences = 2,
                          .n_samples = 2,
                          .n_blocks = 8,
                          .position = position,
                          .sequence = sequences};
}

static void work_of_a_step(struct check *check) {
    /* 2 layers of keys and values, 2 heads of 4 (padded to 64), 16 tokens in bf16: 16 KB a block */
    const double bytes = 2 * MATRICES * 120 + 600 + 8 * 16384.0;
    const double products = 2.0 * (ROWS * 2 * MATRICES * 30 + 2 * 150);
    const double attention = 4.0 * (6 + 7 + 8 + 101) * 2 * 6 * 4; /* two products, layers, heads */
    struct engine *engine = open_counts();
    for (int generated = 0; generated < 2; generated++) {
        const struct pace *sum = generated ? &engine->decode : &engine->prefill;
        struct batch batch = make_batch(generated, generated);
        count_pace(engine, &batch, 0.5);
        count_pace(engine, &batch, 0.25);
        CHECK(sum->tokens == 2 * ROWS, "%d tokens", (int)sum->tokens);
        CHECK(sum->seconds == 0.75, "%g seconds", sum->seconds);
        CHECK(sum->bytes == 2 * bytes, "%g bytes, expected %g", sum->bytes, 2 * bytes);
        CHECK(sum->operations == 2 * (products + attention), "%g operations, expected %g",
              sum->operations, 2 * (products + attention));
    }
}

static void other_steps_count_for_neither(struct check *check) {
    struct engine *engine = open_counts();
    struct batch mixed = make_batch(false, true), none = {0};
    count_pace(engine, &mixed, 0.5);
    count_pace(engine, &none, 0.5);
    CHECK(engine->decode.tokens == 0 && engine->decode.seconds == 0, "decode");
    CHECK(engine->prefill.tokens == 0 && engine->prefill.seconds == 0, "prefill");
}

/* ---- pinning ---- */

enum { PIN_LAYERS = 512, SLAB = 16, HOST_SLABS = 7, REFUSED = 6 /* 4 MB a block: 16 are 64 MB */ };

static struct engine *pinning;
static int n_pins; /* slabs, under the engine's lock */

static bool count_pin(struct device *device, void *memory, size_t bytes) {
    (void)device;
    size_t slab = SLAB * block_bytes(&pinning->config.model->config, 1, KV_BF16);
    engine_lock(pinning);
    bool next = (char *)memory == pinning->host_kv + (size_t)n_pins * slab && bytes == slab;
    bool ok = next && n_pins < REFUSED;
    n_pins += ok ? 1 : 100; /* 100: another than the next, or the one that is refused */
    engine_unlock(pinning);
    return ok;
}

/* Blocks of its first worker that are copied to the host as soon as they are full. */
static void fill_host(struct kv *kv, int n) {
    for (int i = 0; i < n; i++) {
        int tokens[BLOCK_TOKENS] = {kv_used(kv, 1)};
        struct kv_copy_order order;
        (void)kv_register(kv, kv_new(kv, 0), -1, kv_hash(0, tokens), tokens);
        while (kv_next_copy(kv, 0, &order))
            kv_copied(kv, &order, true);
    }
}

/* Waits until the pinner has come so far; the watchdog knows if it never does. */
static bool comes_to(int n) {
    bool there = false, exact = false;
    check_waits = "slabs to be pinned";
    for (int i = 0; !there || i < 20; i++) { /* and not further */
        engine_lock(pinning);
        there = n_pins >= n;
        exact = n_pins == n;
        pthread_cond_broadcast(&pinning->copies);
        engine_unlock(pinning);
        usleep(1000);
    }
    return exact;
}

static void pins_ahead_of_what_is_used(struct check *check) {
    static struct model model = {.config = {.n_layers = PIN_LAYERS,
                                            .d_model = 64,
                                            .n_heads = 2,
                                            .n_kv_heads = 2,
                                            .head_dim = 64,
                                            .vocab_size = 50,
                                            .context_length = 64}};
    static struct backend backend = {.pin = count_pin};
    static char memory[1]; /* addresses alone: nobody writes there */
    static struct engine engine;
    pthread_t thread;
    int n = HOST_SLABS * SLAB;
    engine = (struct engine){
        .config = {.model = &model,
                   .backend = &backend,
                   .n_workers = 1,
                   .workers = {{.n_shards = 1, .blocks = n, .prefills = true, .decodes = true}},
                   .max_batch = 1,
                   .chunk = 16,
                   .host_blocks = n,
                   .kv_type = KV_BF16,
                   .policy = KV_WRITE_THROUGH},
        .host_kv = memory};
    pinning = &engine;
    open_locks(&engine);
    CHECK(open_sched(&engine) && slab_blocks(&engine) == SLAB, "%d blocks", slab_blocks(&engine));
    CHECK(pthread_create(&thread, NULL, pin_main, &engine) == 0, "no thread");
    CHECK(comes_to(SLABS_AHEAD), "%d slabs before any is used", n_pins);
    for (int i = 0; i < 2; i++) {
        engine_lock(&engine);
        fill_host(sched_kv(engine.sched), i == 0 ? 1 : SLAB);
        engine_unlock(&engine);
        CHECK(comes_to(SLABS_AHEAD + 1 + i), "%d slabs", n_pins);
    }
    engine_lock(&engine);
    fill_host(sched_kv(engine.sched), SLAB);
    engine_unlock(&engine);
    CHECK(comes_to(REFUSED + 100), "the slab that cannot be pinned is tried once: %d", n_pins);
    pthread_join(thread, NULL); /* it has given up */
    CHECK(engine.n_pinned == REFUSED * SLAB, "%d blocks", engine.n_pinned);
    sched_destroy(engine.sched);
    free(engine.transfers);
}

int main(int argc, char **argv) {
    static const struct test tests[] = {
        {"work_of_a_step", work_of_a_step},
        {"other_steps_count_for_neither", other_steps_count_for_neither},
        {"pins_ahead_of_what_is_used", pins_ahead_of_what_is_used},
    };
    return check_run(tests, sizeof tests / sizeof *tests, argc, argv);
}
