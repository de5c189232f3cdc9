/* test_engine.c: what only a look into dynamo.c can tell: the work of a step that it counts, beside
 * sums done by hand; whom it wakes, by what clock it waits, that copies go on while steps run; how
 * far it pins ahead. */
#define _GNU_SOURCE
#include "../dynamo.h"
#include <pthread.h>
#include <time.h>

/* What dynamo.c asks of the clock and of the scheduler is counted. */
static int n_wall_clock, n_asked[MAX_WORKERS];

static int counted_time(clockid_t clock, struct timespec *now) {
    n_wall_clock += clock != CLOCK_MONOTONIC;
    return clock_gettime(clock, now);
}

static int counted_condition(pthread_cond_t *condition, const pthread_condattr_t *attributes) {
    clockid_t clock = CLOCK_REALTIME;
    if (attributes)
        pthread_condattr_getclock(attributes, &clock);
    n_wall_clock += clock != CLOCK_MONOTONIC;
    return pthread_cond_init(condition, attributes);
}

static struct step *counted_next(struct sched *sched, int worker, double now) { /* under the lock */
    n_asked[worker]++;
    return sched_next(sched, worker, now);
}

#include "failing.h"
#define calloc            failing_calloc
#define malloc            failing_malloc
#define realloc           failing_realloc
#define main              dynamo_main
#define clock_gettime     counted_time
#define pthread_cond_init counted_condition
#define sched_next        counted_next
#define sched_create      failing_sched_create
#include "../dynamo.h"
static struct sched *failing_sched_create(const struct sched_config *config);
#include "../dynamo.c"
#undef calloc
#undef malloc
#undef realloc
#undef sched_create
#undef main
#undef clock_gettime
#undef pthread_cond_init
#undef sched_next
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

/* ---- threads ---- */

enum { FAKE_WORKERS = 8, FAKE_BLOCKS = 64, FAKE_PROMPT = 40, FAKE_ANSWER = 400 };

/* A backend that computes and copies nothing: each step says token 7, each copy is done at once. */
static const struct batch *fake_batch[FAKE_WORKERS];
static void (*fake_hook)(int worker); /* called in each step; NULL: nothing is */

static bool fake_begin(struct device *device, const struct batch *batch) {
    fake_batch[device->index] = batch;
    return false;
}

static void fake_end(struct device *device, int *sampled) {
    for (int i = 0; i < fake_batch[device->index]->n_samples; i++)
        sampled[i] = 7;
    if (fake_hook)
        fake_hook(device->index);
}

static uint64_t fake_copy(struct device *device, enum stream stream, const struct copy2d *copy) {
    (void)device, (void)stream, (void)copy;
    return 1;
}

static bool fake_done(struct device *device, enum stream stream, uint64_t ticket) {
    (void)device, (void)stream;
    return ticket == 1;
}

static void fake_release(struct device *device, void *memory) {
    (void)device, (void)memory;
}

static void fake_close(struct device *device) {
    (void)device;
}

static struct engine *threads;

/* Half of the workers prefill, half decode. */
static void open_fakes(struct check *check, int n_workers, int host_blocks) {
    static struct model model = {.config = {.n_layers = 1,
                                            .n_kv_heads = 1,
                                            .head_dim = 64,
                                            .vocab_size = 50,
                                            .context_length = FAKE_BLOCKS * BLOCK_TOKENS}};
    static struct backend backend = {.step_begin = fake_begin,
                                     .step_end = fake_end,
                                     .copy = fake_copy,
                                     .copy_done = fake_done,
                                     .release = fake_release,
                                     .device_close = fake_close};
    static struct device devices[FAKE_WORKERS];
    static const bool ends_text[50];
    static char memory[1]; /* addresses alone */
    threads = calloc(1, sizeof *threads);
    threads->config = (struct engine_config){.model = &model,
                                             .backend = &backend,
                                             .ends_text = ends_text,
                                             .n_workers = n_workers,
                                             .max_batch = 4,
                                             .chunk = 16,
                                             .host_blocks = host_blocks,
                                             .kv_type = KV_BF16};
    threads->host_kv = malloc(1); /* an address alone */
    for (int i = 0; i < n_workers; i++) {
        bool prefills = i < n_workers / 2;
        devices[i] = (struct device){.index = i, .kv = memory};
        threads->workers[i] = (struct worker){.engine = threads, .index = i, .n_shards = 1};
        threads->workers[i].shards[0] = &devices[i];
        threads->config.workers[i].n_shards = 1;
        threads->config.workers[i].blocks = FAKE_BLOCKS;
        threads->config.workers[i].prefills = prefills;
        threads->config.workers[i].decodes = !prefills;
    }
    memset(n_asked, 0, sizeof n_asked);
    open_locks(threads);
    CHECK(open_sched(threads) && engine_start(threads), "no engine");
}

/* A text is a prompt of one token, many times. With the lock held. */
static struct request *submit_fake(int64_t id, int max_new, int text) {
    struct request *r = calloc(1, sizeof *r);
    *r = (struct request){.id = id, .n_prompt = FAKE_PROMPT, .max_new = max_new};
    r->tokens = calloc((size_t)(FAKE_PROMPT + max_new), sizeof *r->tokens);
    for (int i = 0; i < FAKE_PROMPT; i++)
        r->tokens[i] = text;
    sched_submit(threads->sched, r, engine_now());
    engine_wake(threads);
    return r;
}

static void finish_fake(struct request *r) { /* with the lock held */
    check_waits = "an answer, or copies while a step runs";
    while (r->state != REQUEST_FINISHED)
        engine_wait(threads, INFINITY);
    free(r->tokens);
    free(r);
}

/* A request has two workers: no other is asked for steps, however long its answer is. */
static void only_those_concerned_are_woken(struct check *check) {
    open_fakes(check, FAKE_WORKERS, 0);
    engine_lock(threads);
    struct request *r = submit_fake(1, FAKE_ANSWER, 1);
    finish_fake(r);
    int n_most = 0, n_others = 0;
    for (int i = 0; i < FAKE_WORKERS; i++)
        n_most = n_asked[i] > n_most ? n_asked[i] : n_most;
    for (int i = 0; i < FAKE_WORKERS; i++)
        n_others += n_asked[i] < n_most ? n_asked[i] : 0;
    engine_unlock(threads);
    engine_close(threads);
    CHECK(n_most >= FAKE_ANSWER - 1, "asked %d times for the answer's steps", n_most);
    CHECK(n_others < FAKE_ANSWER / 4, "the others were asked %d times", n_others);
}

static int64_t transfers_wanted; /* the step of worker 1 that finds this ends when they are done */

static void wait_for_copies(int worker) {
    int64_t wanted = __atomic_load_n(&transfers_wanted, __ATOMIC_SEQ_CST), done = 0;
    while (worker == 1 && done < wanted) {
        engine_lock(threads);
        done = kv_stats(sched_kv(threads->sched)).transfers;
        engine_unlock(threads);
        usleep(1000);
    }
}

/* Blocks of a second prompt are copied to the worker, and seen to be there, in a step of it. */
static void copies_go_on_while_a_step_runs(struct check *check) {
    open_fakes(check, 2, 0);
    __atomic_store_n(&transfers_wanted, 0, __ATOMIC_SEQ_CST);
    fake_hook = wait_for_copies;
    engine_lock(threads);
    struct request *first = submit_fake(1, FAKE_ANSWER, 1);
    while (first->state != REQUEST_RUNNING && first->state != REQUEST_FINISHED)
        engine_wait(threads, INFINITY);
    int64_t before = kv_stats(sched_kv(threads->sched)).transfers;
    __atomic_store_n(&transfers_wanted, before + 3, __ATOMIC_SEQ_CST);
    struct request *second = submit_fake(2, 5, 2);
    finish_fake(second);
    finish_fake(first);
    CHECK(kv_stats(sched_kv(threads->sched)).transfers >= before + 3, "copies");
    engine_unlock(threads);
    fake_hook = NULL;
    engine_close(threads);
}

static void nobody_waits_by_the_wall_clock(struct check *check) {
    n_wall_clock = 0;
    open_fakes(check, 2, 0);
    engine_lock(threads);
    finish_fake(submit_fake(1, 20, 1));
    double until = engine_now() + 1e-3;
    while (engine_now() < until)
        engine_wait(threads, until);
    engine_unlock(threads);
    engine_close(threads);
    CHECK(n_wall_clock == 0, "the wall clock was asked, or waited by, %d times", n_wall_clock);
}

static long resident(void) { /* bytes */
    long pages = 0;
    FILE *file = fopen("/proc/self/statm", "r");
    bool ok = file && fscanf(file, "%*d %ld", &pages) == 1;
    if (file)
        (void)fclose(file);
    return ok ? pages * sysconf(_SC_PAGESIZE) : 0;
}

/* After the first thousand requests nothing grows any more, and at the end no block is in use: not
 * on the workers, which are too small for all, nor on the host, where cold ones go. */
static void a_hundred_thousand_requests(struct check *check) {
    enum { REQUESTS = SANITIZED ? 3000 : 100000, TOGETHER = 20, TEXTS = 199, HOST_BLOCKS = 180 };
    long before = 0;
    open_fakes(check, 4, HOST_BLOCKS);
    engine_lock(threads);
    struct request *asked[TOGETHER] = {NULL};
    for (int64_t id = 0; id < REQUESTS + TOGETHER; id++) {
        struct request **r = &asked[id % TOGETHER];
        if (*r) {
            CHECK((*r)->id == id - TOGETHER, "request %d", (int)(*r)->id);
            finish_fake(*r);
        }
        *r = id < REQUESTS ? submit_fake(id, (int)(1 + id % 7), (int)((id * id + id / 3) % TEXTS))
                           : NULL;
        before = id == 1000 ? resident() : before;
    }
    long more = resident() - before;
    engine_unlock(threads);
    struct engine_stats stats = engine_stats(threads);
    CHECK(stats.sched.finished == REQUESTS, "%d ended", (int)stats.sched.finished);
    CHECK(stats.kv.pages_out > 100 && stats.kv.pages_in > 100, "no paging");
    for (int place = 0; place <= 4; place++) {
        struct kv_usage u = stats.places[place];
        int n = place < 4 ? FAKE_BLOCKS : HOST_BLOCKS;
        CHECK(u.pinned == 0 && u.free + u.cached + u.in_flight == n,
              "place %d: %d free, %d pinned, %d cached, %d in flight", place, u.free, u.pinned,
              u.cached, u.in_flight);
    }
    CHECK(engine_close(threads), "it does not close");
    CHECK((before > 0 && more < 1 << 20) || SANITIZED, "%ld bytes more", more);
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

/* ---- what of an answer is for the reader ---- */

/* gpt-2's vocabulary, in which its last words are those of Harmony. */
static struct tokenizer *open_harmony(struct check *check) {
    static const char *const words[] = {"<|start|>", "<|channel|>", "<|message|>", "<|end|>"};
    char error[ERROR_LENGTH] = "";
    struct gguf *file = gguf_open("test/data/vocab-gpt-2.gguf", error);
    struct tokenizer *t = file ? tok_open(file, error) : NULL;
    CHECK(t, "%s", error);
    for (int i = 0; t && i < 4; i++) {
        struct vocab_token *token = &t->tokens[t->n_tokens - 2 - i];
        free(token->text);
        *token = (struct vocab_token){strdup(words[i]), (int)strlen(words[i]), TOKEN_CONTROL, 0};
        add_key(t, token->text, token->length, KEY_SPECIAL, t->n_tokens - 2 - i);
    }
    gguf_close(file);
    return t;
}

static void thoughts_are_apart(struct check *check) {
    static const char *const said[] = {"Hi",          "<|channel|>", "analysis",    "<|message|>",
                                       "Hm",          "<|end|>",     "<|start|>",   "assistant",
                                       "<|channel|>", "final",       "<|message|>", "Hello."};
    char prompt[] = "Hi";
    struct request_spec spec = {.prompt = prompt, .id = "0"};
    struct tokenizer *t = open_harmony(check);
    struct answers answers = {.tokenizer = t, .template = {.kind = TEMPLATE_HARMONY}};
    struct answer answer = {.spec = spec, .part = PART_HEADER};
    int ids[64], n = 0, n_prompt = 0;
    for (int i = 0; t && i < 12; i++) {
        int more = 0, one = tok_find(t, said[i], strlen(said[i]));
        int *text = *said[i] == '<' ? NULL : tok_encode(t, said[i], strlen(said[i]), &more);
        memcpy(ids + n, text ? text : &one, (size_t)(text ? more : 1) * sizeof *ids);
        n += text ? more : 1;
        n_prompt = i == 0 ? n : n_prompt;
        free(text);
    }
    answer.request.tokens = ids;
    answer.request.n_prompt = n_prompt;
    answer.request.length = n;
    for (int i = n_prompt; i <= n; i++) /* as they come */
        take_tokens(&answers, &answer, i, i == n);
    CHECK(answer.length == 6 && memcmp(answer.text, "Hello.", 6) == 0, "%zu bytes of text",
          answer.length);
    CHECK(answer.n_thought == 2 && memcmp(answer.thought, "Hm", 2) == 0, "%zu bytes of thought",
          answer.n_thought);
    char *shown = NULL;
    size_t length;
    FILE *kept = stdout, *stream = open_memstream(&shown, &length);
    stdout = stream;
    show_json(&answer);
    stdout = kept;
    fclose(stream);
    CHECK(strstr(shown, "\"text\":\"Hello.\",\"reasoning_content\":\"Hm\","), "%s", shown);
    free(shown);
    free_text(&answer);
    tok_close(t);
}

/* ---- devices that fail ---- */

enum { FAULT_PROMPT = 40, FAULT_ANSWER = 40, FAULT_TEXT = FAULT_PROMPT + FAULT_ANSWER, ASKED = 5 };
static const uint64_t HUNG = UINT64_MAX; /* ticket of a copy that never ends */

static struct engine *lost_engines[16]; /* which cannot be closed: so that no sanitizer minds */
static int n_lost_engines;

struct fault {             /* after so many good calls; -1: never */
    int n_steps, n_copies; /* a step of worker 1, a copy of any */
    bool one_gpu;          /* both workers are on it */
    int n_hangs;           /* a copy of this stream and all behind it hang */
    enum stream stream;
};
static const struct fault no_fault = {-1, -1, false, -1, STREAM_COMPUTE};

static struct {
    struct engine *engine;
    struct backend whole;
    struct fault fault;
    const struct device *hung;
    int n_copies[N_STREAMS]; /* that were asked for */
    int n_rows;              /* of steps that did not fail */
} faulty;

static bool faulty_step_begin(struct device *device, const struct batch *batch) {
    if (device == faulty.engine->workers[1].shards[0] && faulty.fault.n_steps-- == 0)
        engine_tell_lost(faulty.engine);
    __atomic_fetch_add(&faulty.n_rows, batch->n_rows, __ATOMIC_RELAXED);
    return faulty.whole.step_begin(device, batch);
}

static uint64_t faulty_copy(struct device *device, enum stream stream, const struct copy2d *copy) {
    if (faulty.fault.n_copies-- == 0)
        engine_tell_lost(faulty.engine);
    faulty.n_copies[stream]++;
    if (stream == faulty.fault.stream && faulty.fault.n_hangs-- == 0)
        faulty.hung = device;
    bool hangs = stream == faulty.fault.stream && device == faulty.hung;
    return hangs ? HUNG : faulty.whole.copy(device, stream, copy);
}

/* In the courier's thread, whose the transfers are: for those that hang, time flies. */
static bool faulty_done(struct device *device, enum stream stream, uint64_t ticket) {
    for (int i = 0; i < faulty.engine->n_transfers && ticket == HUNG; i++)
        faulty.engine->transfers[i].waited += COPY_SECONDS / 20.0;
    return ticket != HUNG && faulty.whole.copy_done(device, stream, ticket);
}

/* Answers of two workers, one after another, the last to the prompt of the first. What they have on
 * the devices does not fit there. Whether the engine could be closed. */
static bool answer_with_fault(struct check *check, struct fault fault, struct request *asked,
                              int n) {
    char error[ERROR_LENGTH] = "";
    struct model model;
    struct backend_options options = {.n_threads = 1};
    struct backend *backend = cpu_backend_open(&options, error);
    CHECK(backend && model_open(&model, "model.bin", error), "%s", error);
    bool *ends = calloc((size_t)model.config.vocab_size, sizeof *ends);
    struct engine_config config = {.model = &model,
                                   .backend = backend,
                                   .ends_text = ends,
                                   .n_workers = 2,
                                   .max_batch = 4,
                                   .chunk = 16,
                                   .host_blocks = 20};
    for (int w = 0; w < 2; w++) {
        config.workers[w].devices[0] = w;
        config.workers[w].n_shards = 1;
        config.workers[w].blocks = 8;
    }
    config.workers[0].prefills = config.workers[1].decodes = true;
    struct engine *engine = engine_open(&config, error);
    CHECK(engine, "%s", error);
    memset(&faulty, 0, sizeof faulty);
    faulty.engine = engine;
    faulty.whole = *backend;
    faulty.fault = fault;
    backend->step_begin = faulty_step_begin;
    backend->copy = faulty_copy;
    backend->copy_done = faulty_done;
    backend->n_gpus = fault.one_gpu;
    for (int w = 0; w < 2 && fault.one_gpu; w++)
        engine->workers[w].shards[0]->index = 0;
    CHECK(engine_start(engine), "no threads");
    engine_lock(engine);
    check_waits = "an answer, though a device has failed";
    for (int ask = 0; ask < n; ask++) {
        struct request *r = &asked[ask];
        *r = (struct request){
            .id = ask, .tokens = r->tokens, .n_prompt = FAULT_PROMPT, .max_new = FAULT_ANSWER};
        for (int i = 0; i < FAULT_PROMPT; i++)
            r->tokens[i] = 3 + (i * (1 + ask % (ASKED - 1))) % 20;
        sched_submit(engine->sched, r, engine_now());
        engine_wake(engine);
        while (r->state != REQUEST_FINISHED)
            engine_wait(engine, INFINITY);
    }
    int counted = (int)(engine->prefill.tokens + engine->decode.tokens);
    CHECK(counted == faulty.n_rows, "the pace is of %d rows, %d were computed", counted,
          faulty.n_rows);
    engine_unlock(engine);
    check_waits = "an engine to close";
    backend->n_gpus = 0;
    bool closed = engine_close(engine);
    if (closed)
        backend->close(backend);
    model_close(&model);
    if (closed)
        free(ends);
    else
        lost_engines[n_lost_engines++] = engine;
    return closed;
}

/* The program goes on without a device, with the same text; without any GPU the request ends. */
static void a_device_that_fails(struct check *check) {
    static int whole[FAULT_TEXT], tokens[FAULT_TEXT];
    struct request r = {.tokens = whole};
    CHECK(answer_with_fault(check, no_fault, &r, 1) && r.length == FAULT_TEXT, "%s", r.error);
    r.tokens = tokens;
    for (int i = 0; i < 6; i++) {
        bool copies = i % 2 == 1;
        struct fault fault = no_fault;
        *(copies ? &fault.n_copies : &fault.n_steps) = copies ? i / 2 : 5 * i;
        bool closed = answer_with_fault(check, fault, &r, 1);
        CHECK(!closed && r.reason == FINISH_LENGTH && r.preemptions == 1, "fault %d: %s, %d", i,
              r.error, r.preemptions);
        CHECK(memcmp(tokens, whole, sizeof whole) == 0, "fault %d: another text", i);
    }
    struct fault shared = {3, -1, true, -1, STREAM_COMPUTE};
    CHECK(!answer_with_fault(check, shared, &r, 1) && r.reason == FINISH_ERROR &&
              strstr(r.error, "all workers have failed"),
          "%s", r.error);
}

/* A page-out, a page-in or a hand-over, the first or the last of a run, takes its worker out; what
 * is asked has the same answers, and the engine closes, though the copy never ends. */
static void a_copy_that_never_ends(struct check *check) {
    static int whole[ASKED][FAULT_TEXT], tokens[ASKED][FAULT_TEXT];
    struct request asked[ASKED];
    int n_copies[N_STREAMS];
    for (int i = 0; i < ASKED; i++)
        asked[i].tokens = whole[i];
    CHECK(answer_with_fault(check, no_fault, asked, ASKED), "it does not close");
    memcpy(n_copies, faulty.n_copies, sizeof n_copies);
    for (int i = 0; i < ASKED; i++)
        asked[i].tokens = tokens[i];
    for (enum stream stream = STREAM_PAGE_OUT; stream < N_STREAMS; stream++)
        for (int last = 0; last < 2; last++) {
            struct fault fault = no_fault;
            fault.stream = stream;
            fault.n_hangs = last ? n_copies[stream] - 1 : 0;
            CHECK(n_copies[stream] > 0, "no copy of stream %d", (int)stream);
            bool closed = answer_with_fault(check, fault, asked, ASKED);
            CHECK(!closed || (last && !faulty.hung), "stream %d: nothing hung", (int)stream);
            CHECK(memcmp(tokens, whole, sizeof whole) == 0, "stream %d: another text", (int)stream);
            for (int i = 0; i < ASKED; i++)
                CHECK(asked[i].reason == FINISH_LENGTH, "stream %d: %s", (int)stream,
                      asked[i].error);
        }
}

/* What a backend and the scheduler allocate: each call may fail. */
static struct backend with_memory;

static struct sched *failing_sched_create(const struct sched_config *config) {
    return allocation_fails() ? NULL : sched_create(config);
}

static struct device *failing_open(struct backend *backend, const struct device *wanted,
                                   char *error) {
    if (!allocation_fails())
        return with_memory.device_open(backend, wanted, error);
    (void)fail(error, "no memory for a device");
    return NULL;
}

static void *failing_alloc(struct device *device, size_t bytes) {
    return allocation_fails() ? NULL : with_memory.alloc(device, bytes);
}

static const struct weight *failing_upload(struct device *device, const struct tensor *tensor,
                                           const struct tensor *const *together, struct slice slice,
                                           char *error) {
    if (!allocation_fails())
        return with_memory.upload(device, tensor, together, slice, error);
    (void)fail(error, "no memory for a weight");
    return NULL;
}

/* A request whose ids find no memory ends with an error of its own. */
static void a_request_without_memory(struct check *check) {
    int ids[] = {3, 4, 5}, n = 0;
    struct answers answers = {.vocab_size = 10};
    struct request_spec spec = {.ids = ids, .n_ids = 3, .n = 5};
    struct request r = {0};
    for (bool ok = false; !ok && n < 10; n += !ok) {
        r = (struct request){0};
        allocations_left = n;
        ok = answers_prepare(&answers, &spec, NULL, NULL, 0, 100, &r);
        CHECK(ok || (r.reason == FINISH_ERROR && strstr(r.error, "out of memory")),
              "allocation %d: %s", n, r.error);
    }
    allocations_left = -1;
    CHECK(n == 3 && r.n_prompt == 3 && r.max_new == 5, "after %d failures", n);
    free(r.tokens);
}

/* Each allocation of a model and its engine fails once: a line says so, and nothing is left. */
static void memory_that_runs_out(struct check *check) {
    struct backend_options options = {.n_threads = 1};
    char error[ERROR_LENGTH] = "";
    struct backend *backend = cpu_backend_open(&options, error);
    with_memory = *backend;
    backend->device_open = failing_open;
    backend->alloc = failing_alloc;
    backend->upload = failing_upload;
    struct engine *engine = NULL;
    int n = 0;
    for (; !engine && n < 500; n += !engine) {
        struct model model;
        *error = 0;
        allocations_left = n;
        bool ok = model_open(&model, "model.bin", error);
        struct engine_config config = {.model = &model,
                                       .backend = backend,
                                       .n_workers = 2,
                                       .max_batch = 4,
                                       .chunk = 16,
                                       .host_blocks = 20};
        for (int w = 0; w < 2; w++) {
            config.workers[w].devices[0] = w;
            config.workers[w].n_shards = 1;
            config.workers[w].blocks = 20;
            config.workers[w].prefills = config.workers[w].decodes = true;
        }
        engine = ok ? engine_open(&config, error) : NULL;
        CHECK(engine || strstr(error, "memory"), "allocation %d: %s", n, error);
        CHECK(engine_close(engine), "it closes");
        model_close(&model);
    }
    allocations_left = -1;
    CHECK(engine && n > 20, "opened where %d allocations were good", n);
    backend->close(backend);
}

int main(int argc, char **argv) {
    static const struct test tests[] = {
        {"memory_that_runs_out", memory_that_runs_out},
        {"a_request_without_memory", a_request_without_memory},
        {"a_device_that_fails", a_device_that_fails},
        {"a_copy_that_never_ends", a_copy_that_never_ends},
        {"thoughts_are_apart", thoughts_are_apart},
        {"work_of_a_step", work_of_a_step},
        {"other_steps_count_for_neither", other_steps_count_for_neither},
        {"only_those_concerned_are_woken", only_those_concerned_are_woken},
        {"copies_go_on_while_a_step_runs", copies_go_on_while_a_step_runs},
        {"nobody_waits_by_the_wall_clock", nobody_waits_by_the_wall_clock},
        {"a_hundred_thousand_requests", a_hundred_thousand_requests},
        {"pins_ahead_of_what_is_used", pins_ahead_of_what_is_used},
    };
    return check_run(tests, sizeof tests / sizeof *tests, argc, argv);
}
