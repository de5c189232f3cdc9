/* dynamo.c: the program. The model's forward pass, one thread per worker, and main.
 *
 * Owns the devices, the clock, the lock and the requests' text. It turns what the scheduler decides
 * into work: a step becomes a forward pass, a copy order becomes copies between the slots'
 * addresses. Refuses to decide: which request, which worker and which block stand in scheduler.c
 * and kvcache.c.
 *
 * Threads: one per worker (worker_main), one that waits for Ctrl-C, and main, which submits
 * requests and shows their text. All that they share is the scheduler, under engine.lock; nothing
 * is computed, copied, printed or waited for while it is held.
 *
 * Read `forward` first: it is the whole model. Then worker_main and copy_block.
 * The forward pass is that of Llama (Touvron et al. 2023) with grouped-query attention (Ainslie et
 * al. 2023); qwen2 adds biases, qwen3 norms of q and k: optional tensors, not branches here. */
#define _GNU_SOURCE
#define GGUF_IMPLEMENTATION
#define MODEL_IMPLEMENTATION
#define SOURCE_IMPLEMENTATION
#define TOKENIZER_IMPLEMENTATION
#define JSON_IMPLEMENTATION
#define CLI_IMPLEMENTATION
#define REQUESTS_IMPLEMENTATION
#define TEMPLATE_IMPLEMENTATION
#define ANSWERS_IMPLEMENTATION
#define PACE_IMPLEMENTATION
#define STATS_IMPLEMENTATION
#define EDITOR_IMPLEMENTATION
#define CHAT_IMPLEMENTATION
#define EVALUATE_IMPLEMENTATION
#define ENGINE_IMPLEMENTATION
#include "app/terminal.h"
#include "app/chat.h"
#include "lib/cli.h"
#include "dynamo.h"
#include "app/editor.h"
#include "engine.h"
#include "app/evaluate.h"
#include "lib/gguf.h"
#include "lib/json.h"
#include "lib/requests.h"
#include "lib/source.h"
#include "app/stats.h"
#include "lib/template.h"
#include "lib/tokenizer.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum {
    EXIT_FILE = 1,
    EXIT_USAGE = 2,
    EXIT_REQUESTS = 3,
    COPY_POLL_NS = 50000 /* an idle worker looks after its copies so often */
};

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static void complain(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    (void)fputs("dynamo: ", stderr);
    (void)vfprintf(stderr, format, arguments);
    (void)fputc('\n', stderr);
    va_end(arguments);
}

/* ---- the model ---- */

/* One forward pass over the rows of a batch; sampled[n_samples] are the next tokens, and logits, if
 * wanted, (n_samples, vocab_size). Every op is given to each shard in turn; the shards work side by
 * side where the backend can. */
static void forward(struct worker *worker, const struct batch *batch, int *sampled, float *logits) {
    const struct backend *backend = worker->engine->backend;
    int n_layers = worker->engine->model.config.n_layers, n_shards = worker->n_shards;
    struct device **shards = worker->shards;
    bool record = true;
    for (int s = 0; s < n_shards; s++)
        record = backend->step_begin(shards[s], batch) && record;
    for (int s = 0; s < n_shards && record; s++)
        backend->embed(shards[s], worker->layers[s][0][TOKEN_EMBD]);
    for (int layer = 0; layer < n_layers && record; layer++) {
        for (int s = 0; s < n_shards; s++) {
            const struct weight *const *w = worker->layers[s][layer];
            backend->norm_qkv(shards[s], w);
            backend->rope_append(shards[s], w, layer);
            backend->attention(shards[s], layer);
            backend->project_add(shards[s], w[ATTN_OUTPUT], INPUT_ATTENTION);
        }
        if (n_shards > 1)
            backend->all_reduce_add(shards, n_shards);
        for (int s = 0; s < n_shards; s++) {
            const struct weight *const *w = worker->layers[s][layer];
            backend->norm_gate_up(shards[s], w);
            backend->project_add(shards[s], w[FFN_DOWN], INPUT_FFN);
        }
        if (n_shards > 1)
            backend->all_reduce_add(shards, n_shards);
    }
    if (record && batch->n_samples > 0)
        backend->sample(shards[0], worker->layers[0][0], logits);
    for (int s = 0; s < n_shards; s++)
        backend->step_end(shards[s], s == 0 ? sampled : NULL);
}

/* ---- copies ---- */

/* Where the heads of one shard's part of a block lie; the host is one shard with all heads. */
struct block_part {
    char *address;
    int first_head, n_heads;
};

static struct block_part block_part(const struct engine *engine, int place, int slot, int shard) {
    const struct model_config *config = &engine->model.config;
    bool host = place == engine->n_workers;
    int n_shards = host ? 1 : engine->workers[place].n_shards;
    char *base = host ? engine->host_kv : engine->workers[place].shards[shard]->kv;
    int n_heads = config->n_kv_heads / n_shards;
    size_t bytes = block_bytes(config, n_shards, engine->kv_type);
    return (struct block_part){base + (size_t)slot * bytes, shard * n_heads, n_heads};
}

static int shards_of(const struct engine *engine, int place) {
    return place == engine->n_workers ? 1 : engine->workers[place].n_shards;
}

/* Starts the copies that an order asks for: every pair of shards copies the heads both hold. */
static void copy_block(struct worker *worker, const struct kv_copy_order *order) {
    const struct engine *engine = worker->engine;
    const struct model_config *config = &engine->model.config;
    size_t head_bytes =
        (size_t)BLOCK_TOKENS * (size_t)config->head_dim * kv_element_bytes(engine->kv_type);
    bool out = order->to == engine->n_workers;
    enum stream stream = out                                ? STREAM_PAGE_OUT
                         : order->from == engine->n_workers ? STREAM_PAGE_IN
                                                            : STREAM_TRANSFER;
    struct transfer *transfer = &worker->transfers[worker->n_transfers++];
    *transfer = (struct transfer){.order = *order};
    for (int t = 0; t < shards_of(engine, order->to); t++) {
        struct block_part to = block_part(engine, order->to, order->to_slot, t);
        for (int f = 0; f < shards_of(engine, order->from); f++) {
            struct block_part from = block_part(engine, order->from, order->from_slot, f);
            int first = to.first_head > from.first_head ? to.first_head : from.first_head;
            int to_end = to.first_head + to.n_heads, from_end = from.first_head + from.n_heads;
            int end = to_end < from_end ? to_end : from_end;
            if (first >= end)
                continue;
            struct copy2d copy = {.to = to.address + (size_t)(first - to.first_head) * head_bytes,
                                  .from =
                                      from.address + (size_t)(first - from.first_head) * head_bytes,
                                  .to_pitch = (size_t)to.n_heads * head_bytes,
                                  .from_pitch = (size_t)from.n_heads * head_bytes,
                                  .width = (size_t)(end - first) * head_bytes,
                                  .height = (size_t)config->n_layers * 2};
            struct device *device = worker->shards[out ? f : t];
            int piece = transfer->n_pieces++;
            transfer->pieces[piece].device = device;
            transfer->pieces[piece].stream = stream;
            transfer->pieces[piece].ticket = engine->backend->copy(device, stream, &copy);
        }
    }
}

/* Reports the transfers that have ended. Under the lock: it only polls. */
static bool collect_copies(struct worker *worker) {
    struct engine *engine = worker->engine;
    bool any = false;
    for (int i = 0; i < worker->n_transfers;) {
        struct transfer *transfer = &worker->transfers[i];
        bool done = true;
        for (int p = 0; p < transfer->n_pieces; p++) {
            done = done && engine->backend->copy_done(transfer->pieces[p].device,
                                                      transfer->pieces[p].stream,
                                                      transfer->pieces[p].ticket);
        }
        if (!done) {
            i++;
            continue;
        }
        sched_copied(engine->sched, &transfer->order, true, now());
        *transfer = worker->transfers[--worker->n_transfers];
        any = true;
    }
    return any;
}

/* ---- workers ---- */

static void show_step(const struct worker *worker, const struct step *step) {
    (void)fprintf(stderr, "worker %d (%s%s%s): %d rows of %d requests, %d copies started\n",
                  worker->index, worker->prefills ? "prefill" : "",
                  worker->prefills && worker->decodes ? "+" : "", worker->decodes ? "decode" : "",
                  step->batch.n_rows, step->batch.n_sequences, step->n_copies);
}

/* Returns the seconds that it computed for. */
static double do_step(struct worker *worker, struct step *step) {
    for (int i = 0; i < step->n_copies; i++)
        copy_block(worker, &step->copies[i]);
    double start = now();
    if (step->batch.n_rows > 0)
        forward(worker, &step->batch, step->batch.sampled, NULL);
    double seconds = now() - start;
    if (worker->engine->options->verbose)
        show_step(worker, step);
    return seconds;
}

/* Whether this worker's turn changed what others could do: it ended a request (n_finished were
 * before), or ordered copies that others carry out. */
static bool concerns_others(const struct worker *worker, int64_t n_finished) {
    const struct engine *engine = worker->engine;
    if (sched_stats(engine->sched).finished != n_finished)
        return true;
    for (int i = 0; i < engine->n_workers; i++)
        if (i != worker->index && kv_pending(sched_kv(engine->sched), i) > 0)
            return true;
    return false;
}

static void wait_for_work(struct worker *worker) {
    struct engine *engine = worker->engine;
    if (worker->n_transfers == 0) {
        pthread_cond_wait(&engine->work, &engine->lock);
        return;
    }
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += COPY_POLL_NS;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    (void)pthread_cond_timedwait(&engine->work, &engine->lock, &until);
}

static void *worker_main(void *argument) {
    struct worker *worker = argument;
    struct engine *engine = worker->engine;
    pthread_mutex_lock(&engine->lock);
    while (!engine->stopping) {
        bool changed = collect_copies(worker);
        int64_t n_finished = sched_stats(engine->sched).finished;
        struct step *step = sched_next(engine->sched, worker->index, now());
        if (concerns_others(worker, n_finished) || changed) {
            pthread_cond_broadcast(&engine->work);
            pthread_cond_broadcast(&engine->news);
        }
        if (!step) {
            wait_for_work(worker);
            continue;
        }
        pthread_mutex_unlock(&engine->lock);
        double seconds = do_step(worker, step);
        pthread_mutex_lock(&engine->lock);
        pace_count(&engine->pace, &step->batch, seconds);
        sched_done(engine->sched, worker->index, step, now());
        pthread_cond_broadcast(&engine->work);
        pthread_cond_broadcast(&engine->news);
    }
    while (worker->n_transfers > 0) /* their memory must not go before they are done */
        (void)collect_copies(worker);
    pthread_mutex_unlock(&engine->lock);
    return NULL;
}

/* ---- every row's logits, without the scheduler ---- */

/* Runs tokens[start, start + n) of a text through worker 0, which its first blocks hold. */
static void run_rows(void *argument, const int *tokens, int start, int n, float *logits) {
    struct engine *engine = argument;
    int n_blocks = blocks_of(start + n);
    int *numbers = calloc(5 * (size_t)n + (size_t)n_blocks, sizeof *numbers);
    struct sampling *greedy = calloc((size_t)n, sizeof *greedy);
    assert(numbers && greedy);
    struct sequence sequence = {.n_rows = n, .start = start, .n_blocks = n_blocks};
    struct batch batch = {.n_rows = n,
                          .n_sequences = 1,
                          .n_samples = n,
                          .n_blocks = n_blocks,
                          .token = numbers,
                          .position = numbers + n,
                          .row_sequence = numbers + 2 * n, /* all 0 */
                          .sequence = &sequence,
                          .sample_row = numbers + 3 * n,
                          .sampling = greedy,
                          .sampled = numbers + 4 * n,
                          .block_table = numbers + 5 * n};
    for (int i = 0; i < n; i++) {
        batch.token[i] = tokens[start + i];
        batch.position[i] = start + i;
        batch.sample_row[i] = i;
    }
    for (int i = 0; i < n_blocks; i++)
        batch.block_table[i] = i;
    forward(&engine->workers[0], &batch, batch.sampled, logits);
    free(greedy);
    free(numbers);
}

/* ---- main ---- */

/* Ctrl-C stops the answers; where there are none, or a second time, the program. What else ends it
 * finds the terminal as it was. */
static void *interrupt_main(void *argument) {
    struct engine *engine = argument;
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGHUP);
    for (;;) {
        int number;
        (void)sigwait(&signals, &number);
        pthread_mutex_lock(&engine->lock);
        if (number != SIGINT || engine->activity != ANSWERING) {
            editor_restore();
            _exit(128 + number);
        }
        engine->activity = INTERRUPTED;
        pthread_cond_broadcast(&engine->news);
        pthread_mutex_unlock(&engine->lock);
    }
    return NULL;
}

/* A conversation at the terminal; or all of a piped stdin as one prompt. */
static int run_stdin(struct answers *answers, struct options *options) {
    char error[ERROR_LENGTH];
    if (isatty(STDIN_FILENO)) {
        struct chat chat = {.answers = answers, .options = options};
        answers->converses = true;
        chat_run(&chat);
        answers_forget(answers);
        return 0;
    }
    struct request_spec spec = options->request;
    spec.prompt = cli_read_file("-", &spec.prompt_length, error);
    if (!spec.prompt) {
        complain("%s", error);
        return EXIT_FILE;
    }
    int n_failed = answers_run(answers, &spec, 1);
    free(spec.prompt);
    return n_failed > 0 ? EXIT_REQUESTS : 0;
}

static int run_requests(struct engine *engine, struct answers *answers) {
    struct options *o = engine->options;
    char error[ERROR_LENGTH];
    int status = 0;
    if (o->file) {
        struct requests requests;
        if (!requests_read(&requests, o, error)) {
            complain("%s", error);
            return EXIT_FILE;
        }
        status = answers_run(answers, requests.specs, requests.n) > 0 ? EXIT_REQUESTS : 0;
        requests_free(&requests);
    } else if (o->request.prompt || o->request.ids) {
        status = answers_run(answers, &o->request, 1) > 0 ? EXIT_REQUESTS : 0;
    } else {
        status = run_stdin(answers, o);
    }
    if (status == EXIT_FILE)
        return status;
    if (o->stats)
        stats_print(answers);
    else if (!o->json)
        stats_summary(answers);
    return status;
}

static int serve(struct engine *engine, struct answers *answers) {
    int n_started = 0, status = EXIT_FILE;
    bool ok = true;
    for (; ok && n_started < engine->n_workers; n_started += ok) {
        struct worker *worker = &engine->workers[n_started];
        ok = pthread_create(&worker->thread, NULL, worker_main, worker) == 0;
    }
    if (ok)
        status = run_requests(engine, answers);
    else
        complain("cannot start threads");
    pthread_mutex_lock(&engine->lock);
    engine->stopping = true;
    pthread_cond_broadcast(&engine->work);
    pthread_mutex_unlock(&engine->lock);
    for (int i = 0; i < n_started; i++)
        pthread_join(engine->workers[i].thread, NULL);
    return status;
}

/* Signals are for interrupt_main alone; a closed stdout is an error of fflush, not a death. Before
 * any other thread is started, so that none of them takes one. */
static bool watch_signals(struct engine *engine) {
    sigset_t signals;
    pthread_t interrupts;
    sigemptyset(&signals);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGHUP);
    sigaddset(&signals, SIGPIPE);
    pthread_sigmask(SIG_BLOCK, &signals, NULL);
    return pthread_mutex_init(&engine->lock, NULL) == 0 &&
           pthread_cond_init(&engine->work, NULL) == 0 &&
           pthread_cond_init(&engine->news, NULL) == 0 &&
           pthread_create(&interrupts, NULL, interrupt_main, engine) == 0 &&
           pthread_detach(interrupts) == 0;
}

/* How prompts become tokens; evaluations take them as they are. False: not as --template says. */
static bool choose_template(const struct engine *engine, struct answers *answers) {
    const struct options *o = engine->options;
    char note[ERROR_LENGTH] = "";
    bool asked = o->template > TEMPLATE_AUTO;
    answers->template = TEMPLATE_NONE;
    if (o->logits || o->perplexity || !engine->tokenizer)
        return true;
    answers->template = asked ? (enum template_kind)o->template
                              : template_of(engine->file, engine->tokenizer, note);
    bool fits = !asked || template_fits(answers->template, engine->tokenizer, note);
    if (*note)
        complain("%s: %s", o->model, note);
    return fits;
}

static int run_model(struct options *options) {
    struct engine *engine = calloc(1, sizeof *engine);
    if (!engine || !watch_signals(engine)) {
        complain("out of memory, or of threads");
        return EXIT_FILE;
    }
    if (!cli_given(options->given, "--seed"))
        options->request.sampling.seed = (uint64_t)time(NULL) * 1000003u + (uint64_t)getpid();
    int status = EXIT_FILE;
    char error[ERROR_LENGTH];
    if (!engine_open(engine, options, error)) {
        complain("%s", error);
    } else {
        struct answers answers = {.options = options,
                                  .tokenizer = engine->tokenizer,
                                  .no_tokenizer = engine->no_tokenizer,
                                  .vocab_size = engine->model.config.vocab_size,
                                  .n_workers = engine->n_workers,
                                  .device_blocks = engine->device_blocks,
                                  .host_blocks = engine->host_blocks,
                                  .backend = engine->backend,
                                  .shards = engine->workers[0].shards,
                                  .n_shards = engine->workers[0].n_shards,
                                  .pace = &engine->pace,
                                  .sched = engine->sched,
                                  .lock = &engine->lock,
                                  .work = &engine->work,
                                  .news = &engine->news,
                                  .activity = &engine->activity,
                                  .now = now};
        struct evaluation evaluation = {&answers, run_rows, engine, engine->chunk,
                                        sched_max_length(engine->sched)};
        if (!choose_template(engine, &answers))
            status = EXIT_USAGE;
        else if (options->logits)
            status = evaluate_logits(&evaluation, options->logits);
        else if (options->perplexity)
            status = evaluate_perplexity(&evaluation, options->perplexity);
        else
            status = serve(engine, &answers);
    }
    engine_close(engine);
    return status;
}

/* A stream that the caller closed stays so: else the next file would get its number, and what is
 * meant for stderr. Opened the wrong way round, it fails with the same error. */
static void hold_closed_streams(void) {
    for (int number = 0; number < 3; number++)
        if (fcntl(number, F_GETFD) < 0)
            (void)open("/dev/null", number == STDIN_FILENO ? O_WRONLY : O_RDONLY);
}

int main(int argc, char **argv) {
    struct options options;
    char error[ERROR_LENGTH];
    int status = 0;
    hold_closed_streams();
    if (!cli_parse(&options, argc, argv, error)) {
        complain("%s", error);
        status = EXIT_USAGE;
    } else if (options.help)
        cli_help(stdout);
    else if (options.version)
        printf("dynamo %s\n", CLI_VERSION);
    else if (options.tokenize)
        status = evaluate_tokenize(&options, options.tokenize);
    else
        status = run_model(&options);
    cli_free(&options);
    if (fflush(stdout) != 0 || ferror(stdout)) {
        complain("stdout: %s", strerror(errno));
        status = EXIT_FILE;
    }
    return status;
}
