/* run.h: from the command line to an open engine, and what then runs on it.
 *
 *     int main(int argc, char **argv) {
 *         return run_program(argc, argv);
 *     }
 *
 * Opens what the options name: the model, its tokenizer, a backend, then the engine; says which
 * devices form a worker, and which workers prefill and which decode. Then runs one of: an
 * evaluation, one prompt, a file of requests, a load, a conversation. Here alone signals are taken
 * and exit statuses chosen: 0; 1 a file or device; 2 usage; 3 some requests failed; 128 + a signal.
 * Read next: answers.h, and engine_open in dynamo.c. */
#ifndef RUN_H
#define RUN_H

int run_program(int argc, char **argv); /* an exit status */

#endif /* RUN_H */

#ifdef RUN_IMPLEMENTATION
#undef RUN_IMPLEMENTATION

#include "../lib/machine.h"
#include "answers.h"
#include "auto.h"
#include "evaluate.h"
#include "plan.h"
#include "replay.h"
#include "serve.h"
#include "sim.h"
#include "stats.h"
#include "terminal.h"
#include "trace.h"
#include "watch.h"
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <locale.h>
#include <malloc.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { EXIT_FILE = 1, EXIT_USAGE = 2, EXIT_REQUESTS = 3, EXIT_INTERRUPTED = 128 + SIGINT };
enum { DEFAULT_BATCH = 32, STACK_BYTES = 1 << 20 }; /* of a thread: none needs a fifth of it */
enum { PLAN_BATCH = 256, PLAN_TTFT = 500, PLAN_ITL = 50 }; /* targets in ms */

struct run { /* all that a run opens */
    struct options options;
    struct model model;
    bool *ends_text; /* (vocab_size) */
    struct backend *backend;
    struct answers answers;  /* with the tokenizer and the engine */
    struct load *load;       /* NULL: none */
    struct wrap wrap;        /* of texts on a terminal */
    struct server *server;   /* NULL: none */
    struct trace *trace;     /* of --trace and --verbose; or NULL */
    struct watch *watch;     /* of --watch and --serve; or NULL */
    struct auto_roles roles; /* of --auto */
    sigset_t signals;        /* that end the program or its answers */
    pthread_mutex_t closing; /* held by the watcher of signals, or by who sets what it looks at */
};

static void complain(const char *line) {
    (void)fprintf(stderr, "dynamo: %s\n", line);
}

static int refuse(const char *error) {
    complain(error);
    return strncmp(error, "--", 2) == 0 ? EXIT_USAGE : EXIT_FILE; /* an option is at fault */
}

/* ---- opening: model, tokenizer, backend ---- */

/* The tokenizer of the model file, or the tokenizer.bin of a llama2.c checkpoint, given or beside
 * it. A model without one still runs on --ids. */
static void open_tokenizer(struct run *run) {
    const struct options *o = &run->options;
    char beside[4096], error[ERROR_LENGTH];
    const char *slash = strrchr(o->model, '/');
    int folder = slash ? (int)(slash - o->model) + 1 : 0;
    (void)snprintf(beside, sizeof beside, "%.*stokenizer.bin", folder, o->model);
    if (o->tokenizer || run->model.is_checkpoint) {
        run->answers.tokenizer =
            tok_open_checkpoint(o->tokenizer ? o->tokenizer : beside, run->model.config.vocab_size,
                                run->answers.no_tokenizer);
        return;
    }
    run->answers.tokenizer = run->model.file ? tok_open(run->model.file, error) : NULL;
    if (!run->answers.tokenizer)
        (void)fail(run->answers.no_tokenizer, "%.200s: %.300s", o->model,
                   run->model.file ? error : "random weights have none; give --ids");
}

/* How prompts become tokens; evaluations take them as they are. False: not as --template says. */
static bool choose_template(struct run *run, char *error) {
    const struct options *o = &run->options;
    char note[ERROR_LENGTH] = "";
    run->answers.template = (struct chat_template){.kind = TEMPLATE_NONE};
    if (o->logits || o->perplexity || !run->answers.tokenizer)
        return true;
    if (o->template > TEMPLATE_AUTO) {
        run->answers.template.kind = (enum template_kind)o->template;
        return template_fits(run->answers.template.kind, run->answers.tokenizer, note) ||
               fail(error, "--template: %.200s: %.250s", o->model, note);
    }
    run->answers.template = template_of(run->model.file, run->answers.tokenizer, note);
    if (*note)
        (void)fprintf(stderr, "dynamo: %s: %s\n", o->model, note);
    return true;
}

static bool open_model(struct run *run, char *error) {
    const struct options *o = &run->options;
    if (!model_open(&run->model, o->model, error))
        return false;
    if (o->verbose)
        model_notes(&run->model, stderr);
    int n = run->answers.vocab_size = run->model.config.vocab_size;
    open_tokenizer(run);
    /* what was asked for must be there; before all the weights are loaded for nothing */
    if (!run->answers.tokenizer && (o->tokenizer || o->request.prompt || o->request.n_stop > 0 ||
                                    o->request.system || o->template > TEMPLATE_AUTO))
        return fail(error, "no tokenizer: %.480s", run->answers.no_tokenizer);
    run->ends_text = calloc((size_t)n, sizeof *run->ends_text);
    if (!run->ends_text)
        return fail(error, "out of memory");
    bool ends = !o->replay && !o->sim && !o->plan; /* a load says how long answers are */
    if (ends && run->model.file && !run->model.is_checkpoint)
        tok_mark_ends(run->model.file, run->ends_text, n);
    if (ends && (run->model.is_checkpoint || o->tokenizer))
        tok_mark_ends(NULL, run->ends_text, n);
    int lost = run->answers.tokenizer ? tok_lost_bytes(run->answers.tokenizer) : 0;
    if (lost > 0 && o->verbose)
        (void)fprintf(stderr, "dynamo: %s: no token for %d of 256 bytes: texts go without them\n",
                      o->model, lost);
    if (run->answers.tokenizer && tok_guessed(run->answers.tokenizer))
        (void)fprintf(stderr,
                      "dynamo: %s: it has no tokenizer.ggml.pre: texts are cut as `default` "
                      "does, maybe not as the model has learnt them\n",
                      o->model);
    return choose_template(run, error);
}

static void tell_lost(void *context) {
    const struct run *run = context;
    if (run->answers.engine)
        engine_tell_lost(run->answers.engine);
    editor_restore();
    (void)watch_restore(run->watch);
    trace_flush(run->trace);
}

/* CUDA where there is a GPU, unless the CPU is asked for. */
static bool open_backend(struct run *run, char *error) {
    const struct options *o = &run->options;
    struct backend_options options = {.n_threads =
                                          o->threads > 0 ? o->threads : machine_processors(""),
                                      .copy_delay_seed = o->copy_delay,
                                      .lost = tell_lost,
                                      .context = run};
    bool cuda = o->devices.n > 0 && !o->devices.cpu;
    if (cuda && !cuda_backend_open)
        return fail(error, "--devices: this build has no CUDA backend; give cpu:N");
    if (cuda_backend_open && !o->devices.cpu) {
        run->backend = cuda_backend_open(&options, error);
        if (!run->backend && !cuda)
            (void)fprintf(stderr, "dynamo: %s; using the CPU\n", error);
    }
    if (!run->backend && !cuda)
        run->backend = cpu_backend_open(&options, error);
    return run->backend != NULL;
}

/* ---- which devices do what ---- */

/* The devices that --prefill and --decode count: those of --devices; else all GPUs, of which a lone
 * one stands for two workers, or as many CPU devices as the lists name. */
static struct device_list list_devices(const struct options *o, int n_gpus) {
    int named = o->prefill.n + o->decode.n;
    struct device_list all = o->devices;
    if (all.n > 0)
        return all;
    all.n = n_gpus > 1 ? n_gpus : n_gpus == 0 && named > 0 ? named : o->tp_prefill + o->tp_decode;
    all.n = all.n < VALUE_DEVICES ? all.n : VALUE_DEVICES;
    for (int i = 0; i < all.n; i++)
        all.index[i] = n_gpus > 0 ? i % n_gpus : i;
    return all;
}

/* How many of n devices prefill, where nobody said it: half of them, or as near as makes whole
 * workers; 0: each does both; -1: they make no whole workers. */
static int share_devices(const struct options *o, int n) {
    for (int i = 0; i < n && !o->colocate; i++) {
        int n_prefill = i < n / 2 ? n / 2 - i : i; /* fewer, then more */
        if (n_prefill > 0 && n_prefill % o->tp_prefill == 0 && (n - n_prefill) % o->tp_decode == 0)
            return n_prefill;
    }
    return o->tp_prefill == o->tp_decode && n % o->tp_decode == 0 ? 0 : -1;
}

/* Gives each worker its devices and its role: a device one, and all those of --devices. */
static bool plan_workers(const struct options *o, int n_gpus, struct engine_config *config,
                         char *error) {
    struct device_list all = list_devices(o, n_gpus), pools[] = {o->prefill, o->decode};
    int n_prefill = o->prefill.n > 0 ? o->prefill.n : share_devices(o, all.n);
    bool used[VALUE_DEVICES] = {false};
    for (int i = 0; i < all.n && o->prefill.n == 0; i++) {
        struct device_list *list = &pools[i >= n_prefill];
        list->index[list->n++] = i;
    }
    if (n_prefill < 0)
        return fail(error,
                    "--devices: %d devices make no whole workers of %d that prefill and of %d that "
                    "decode",
                    all.n, o->tp_prefill, o->tp_decode);
    for (int pool = 0; pool < 2; pool++) {
        int width = pool == 0 ? o->tp_prefill : o->tp_decode;
        for (int i = 0; i < pools[pool].n; i++) {
            int worker = config->n_workers + i / width, index = pools[pool].index[i];
            if (index >= all.n || used[index])
                return fail(error, "%s: got device %d, expected 0 to %d, not in use already",
                            pool == 0 ? "--prefill" : "--decode", index, all.n - 1);
            if (worker == MAX_WORKERS)
                return fail(error, "--devices: they make more than %d workers", MAX_WORKERS);
            used[index] = true;
            config->workers[worker].devices[i % width] = all.index[index];
            config->workers[worker].n_shards = width;
            config->workers[worker].prefills = pool == 0 || n_prefill == 0;
            config->workers[worker].decodes = pool == 1;
        }
        config->n_workers += pools[pool].n / width;
    }
    for (int i = 0; i < o->devices.n; i++)
        if (!used[i])
            return fail(error, "--devices: neither --prefill nor --decode has device %d", i);
    return true;
}

/* Blocks that a size option stands for; -1: the engine chooses. */
static int blocks_from(struct size size, size_t bytes_per_block) {
    int64_t n = size.blocks ? size.value : size.value / (int64_t)bytes_per_block;
    return !size.given ? -1 : n > INT32_MAX / 64 ? INT32_MAX / 64 : (int)n;
}

/* False: a size in bytes, which is not 0, holds no block; who gave it may have meant blocks. */
static bool size_holds(const char *option, struct size size, int blocks, size_t bytes_per_block,
                       char *error) {
    return size.value == 0 || blocks != 0 ||
           fail(error,
                "%s: got %" PRId64 " bytes, expected at least %zu, a block; %" PRId64
                "b is %" PRId64 " blocks",
                option, size.value, bytes_per_block, size.value, size.value);
}

static void show_loading(int64_t done, int64_t total) {
    cli_progress("loading", done, total);
}

/* What the options say of an engine, but for its workers; chunk and kv_type are the defaults. */
static void configure_engine(const struct run *run, int max_batch, struct engine_config *config) {
    const struct options *o = &run->options;
    config->model = &run->model;
    config->ends_text = run->ends_text;
    config->max_batch = o->max_batch > 0 ? o->max_batch : max_batch;
    config->chunk = o->chunk > 0 ? o->chunk : config->chunk;
    config->max_queue = o->max_queue;
    config->ledger = run->watch ? watch_ledger(run->watch) : trace_ledger(run->trace);
    config->verbose = o->verbose;
    if (o->kv_type > 0) /* the words of --kv-type and --kv-policy are in the order of the enums */
        config->kv_type = (enum kv_type)(o->kv_type - 1);
    config->policy = o->kv_policy > 0 ? (enum kv_policy)(o->kv_policy - 1) : KV_ON_EVICT;
    config->host_blocks =
        blocks_from(o->kv_host, block_bytes(&run->model.config, 1, config->kv_type));
}

/* Blocks of a device of a worker of n, or -1. */
static int device_blocks(const struct run *run, int n, enum kv_type kv_type) {
    const struct model_config *model = &run->model.config;
    int n_shards = model->n_kv_heads % n == 0 ? n : 1; /* else the device refuses */
    return blocks_from(run->options.kv_device, block_bytes(model, n_shards, kv_type));
}

/* What the options say of an engine whose devices are n_gpus GPUs, or 0: the CPU. */
static bool plan_engine(struct run *run, int n_gpus, struct engine_config *config, char *error) {
    configure_engine(run, DEFAULT_BATCH, config);
    if (!plan_workers(&run->options, n_gpus, config, error))
        return false;
    const struct options *o = &run->options;
    if (o->role_seconds > 0 && (config->n_workers < 3 || config->workers[0].decodes))
        return fail(error, "--auto: got %d worker%s, expected two pools, of at least 3 together",
                    config->n_workers, config->n_workers == 1 ? "" : "s");
    if (o->role_seconds > 0)
        config->ledger = auto_ledger(&run->roles, (double)o->role_seconds,
                                     o->itl > 0 ? (double)o->itl : PLAN_ITL, config->ledger);
    size_t bytes = block_bytes(&run->model.config, 1, config->kv_type);
    bool ok = size_holds("--kv-host", o->kv_host, config->host_blocks, bytes, error);
    for (int i = 0; i < config->n_workers && ok; i++) {
        int n = config->workers[i].n_shards;
        config->workers[i].blocks = device_blocks(run, n, config->kv_type);
        ok = size_holds("--kv-device", o->kv_device, config->workers[i].blocks, bytes / (size_t)n,
                        error);
    }
    return ok;
}

/* Before the first event. False: --fail names no worker, or the trace cannot be written. */
static bool begin(struct run *run, const struct engine_config *config, struct sched *sched,
                  double now, char *error) {
    const struct options *o = &run->options;
    int n_workers = config->n_workers;
    run->roles.sched = sched;
    for (int i = 0; i < o->n_failures; i++) {
        const struct failure *f = &o->failures[i];
        if (f->worker >= n_workers)
            return fail(error, "--fail: got worker %d, expected 0 to %d", f->worker, n_workers - 1);
        sched_fail_at(sched, f->worker, f->step > 0 ? INFINITY : now + f->at, f->step,
                      now + f->back);
    }
    return trace_begin(run->trace, config, sched, now, error);
}

static bool open_engine(struct run *run, char *error) {
    struct engine_config config = {.backend = run->backend,
                                   .chunk = run->backend->chunk,
                                   .kv_type = run->backend->kv_type,
                                   .progress = show_loading};
    if (!plan_engine(run, run->backend->n_gpus, &config, error))
        return false;
    struct engine *engine = engine_open(&config, error);
    bool ok =
        engine && begin(run, engine_config_of(engine), engine_sched(engine), engine_now(), error);
    pthread_mutex_lock(&run->closing);
    run->answers.engine = engine;
    pthread_mutex_unlock(&run->closing);
    if (ok && run->watch)
        watch_begin(run->watch, &run->answers);
    return ok;
}

/* ---- running ---- */

struct reader { /* of requests that come while others are answered */
    struct run *run;
    struct requests requests;
    int last; /* what requests_next returned last */
    char error[ERROR_LENGTH];
};

static void *read_main(void *argument) {
    struct reader *reader = argument;
    struct engine *engine = reader->run->answers.engine;
    struct request_spec spec;
    bool wanted = true;
    while (wanted) {
        pthread_setcancelstate(PTHREAD_CANCEL_ENABLE, NULL); /* where it waits for a line */
        reader->last =
            requests_next(&reader->requests, &reader->run->options.request, &spec, reader->error);
        pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, NULL);
        engine_lock(engine);
        reader->requests.more = reader->last > 0;
        if (reader->last > 0)
            requests_add(&reader->requests, &spec);
        engine_wake(engine);
        while (reader->requests.endless && reader->requests.n_taken >= 0 &&
               reader->requests.n + reader->requests.n_taken >= CLI_REQUESTS)
            engine_wait(engine, INFINITY); /* until some have been answered */
        wanted = reader->last > 0 && reader->requests.n_taken >= 0;
        engine_unlock(engine);
    }
    return NULL;
}

/* How many requests failed; -1: the file cannot be read, and `error` says why. What is a file is
 * read before the first request begins; of a pipe or a terminal each begins when it comes. */
static int run_file(struct run *run, char *error) {
    struct reader reader = {.run = run, .requests.more = true, .last = 1};
    struct stat status;
    pthread_t thread;
    int n_failed = -1;
    if (!requests_open(&reader.requests, run->options.file, error))
        return -1;
    bool regular = fstat(fileno(reader.requests.file), &status) == 0 && S_ISREG(status.st_mode);
    reader.requests.endless = !regular;
    if (regular)
        read_main(&reader);
    if (!regular && pthread_create(&thread, NULL, read_main, &reader) != 0)
        (void)fail(reader.error, "cannot start threads");
    else if (!regular || reader.last == 0)
        n_failed = answers_stream(&run->answers, &reader.requests);
    if (!regular && n_failed >= 0) {
        pthread_cancel(thread);
        pthread_join(thread, NULL);
    }
    memcpy(error, reader.error, ERROR_LENGTH);
    requests_free(&reader.requests);
    return reader.last < 0 ? -1 : n_failed;
}

/* All of a piped stdin is one prompt, but for the newline that ends its last line. */
static int run_piped(struct run *run, char *error) {
    struct request_spec spec = run->options.request;
    spec.prompt = cli_read_file("-", &spec.prompt_length, error);
    for (const char *end = "\n\r"; *end && spec.prompt && spec.prompt_length > 0; end++)
        if (spec.prompt[spec.prompt_length - 1] == *end)
            spec.prompt[--spec.prompt_length] = 0;
    int n_failed = spec.prompt ? answers_run(&run->answers, &spec) : -1;
    free(spec.prompt);
    return n_failed;
}

static struct load_options describe_load(const struct run *run) {
    const struct options *o = &run->options;
    return (struct load_options){.replay = o->replay,
                                 .file = o->file,
                                 .rate = (double)o->rate,
                                 .limit = o->limit,
                                 .ttft = (double)o->ttft,
                                 .itl = (double)o->itl,
                                 .json = o->json,
                                 .answers = &run->answers,
                                 .defaults = &o->request};
}

/* False: what is wrong with it. A file is looked into before all the weights are loaded. */
static bool open_load(struct run *run, char *error) {
    const struct options *o = &run->options;
    const struct load_options options = describe_load(run);
    /* with a real engine -f is answered in text; a plan opens its own */
    bool wanted = (o->replay || o->sim) && !o->plan;
    if (o->file && strcmp(o->file, "-") != 0 && access(o->file, R_OK) != 0)
        return fail(error, "%.400s: %s", o->file, strerror(errno));
    run->load = wanted ? load_open(&options, error) : NULL;
    return run->load || !wanted;
}

/* False: it is a file that is read, or cannot be opened, which is to be known before all else. */
static bool open_trace(struct run *run, char *error) {
    const struct options *o = &run->options;
    const char *const inputs[] = {o->model,     o->file,         o->replay,   o->rates,
                                  o->tokenizer, o->api_key_file, "/dev/stdin"};
    struct stat trace, input;
    bool regular = o->trace && stat(o->trace, &trace) == 0 && S_ISREG(trace.st_mode);
    for (size_t i = 0; i < sizeof inputs / sizeof *inputs && regular; i++)
        if (inputs[i] && stat(inputs[i], &input) == 0 && input.st_dev == trace.st_dev &&
            input.st_ino == trace.st_ino)
            return fail(error, "--trace: it would overwrite %.400s, which is read", inputs[i]);
    run->trace = trace_open(o->trace, o->verbose, error);
    return run->trace || (!o->trace && !o->verbose);
}

/* False: its port is taken, or its keys are wrong, which is to be known before all else. */
static bool open_server(struct run *run, char *error) {
    bool wanted = cli_given(run->options.given, "--serve");
    run->server = wanted ? serve_open(&run->options, run->watch, error) : NULL;
    return run->server || !wanted;
}

/* Says what went wrong with a load that has ended. */
static int load_status(const struct load *load, bool interrupted) {
    struct load_result result = load_result(load);
    if (load_error(load))
        return refuse(load_error(load));
    if (interrupted) {
        (void)fprintf(stderr,
                      "%sdynamo: interrupted: until then %" PRId64 " requests had ended, %" PRId64
                      " of them with an error; %" PRId64 " were cut off\n",
                      text_moves(STDERR_FILENO) ? "\n" : "", result.requests, result.failed,
                      result.cancelled);
        return EXIT_INTERRUPTED;
    }
    if (result.failed > 0)
        (void)fprintf(stderr, "dynamo: %" PRId64 " of %" PRId64 " requests failed%s%s\n",
                      result.failed, result.requests, *result.first_error ? "; " : "",
                      result.first_error);
    return result.failed > 0 ? EXIT_REQUESTS : 0;
}

static int run_load(struct run *run) {
    struct load *load = run->load;
    load_run(load, &run->answers);
    watch_stop(run->watch);
    struct engine_stats stats = engine_stats(run->answers.engine);
    load_print(load, engine_config_of(run->answers.engine), &stats.sched, &stats.kv);
    return load_status(load, run->answers.interrupted);
}

/* The cluster of --sim or --plan, and what an engine on it has by default. */
static bool open_cluster(const struct options *o, struct cluster *cluster,
                         struct engine_config *config, char *error) {
    if (!cluster_open(cluster, o->sim ? "--sim" : "--plan", o->sim ? o->sim : o->plan, o->rates,
                      error))
        return false;
    config->chunk = cluster->chip.chunk;
    config->kv_type = cluster->chip.kv_type;
    return true;
}

/* The load on a cluster that need not be there. */
static int run_sim(struct run *run) {
    const struct options *o = &run->options;
    struct engine_config config = {0};
    struct cluster cluster;
    struct sim *sim = NULL;
    char error[ERROR_LENGTH];
    if (!open_cluster(o, &cluster, &config, error) ||
        (o->devices.cpu && !cluster.is_cpu &&
         !fail(error, "--devices: got cpu, expected numbers of GPUs of %.60s", o->sim)) ||
        !plan_engine(run, cluster.n_devices, &config, error) ||
        !cluster_fit(&cluster, &config, error) ||
        !(sim = sim_open(&cluster, &config, run->load, error)) ||
        !begin(run, &config, sim_sched(sim), sim_now(sim), error)) {
        sim_close(sim);
        return refuse(error);
    }
    bool ok = sim_run(sim, error);
    if (!ok)
        complain(error);
    struct sched_stats sched = sched_stats(sim_sched(sim));
    struct kv_stats kv = kv_stats(sched_kv(sim_sched(sim)));
    load_print(run->load, &config, &sched, &kv);
    if (!o->json)
        plan_break_even(&cluster, &config);
    sim_close(sim);
    return ok ? load_status(run->load, false) : EXIT_FILE;
}

/* The load on all splits of a cluster that need not be there. */
static int run_plan(struct run *run) {
    const struct options *o = &run->options;
    struct engine_config config = {0};
    struct cluster cluster;
    char error[ERROR_LENGTH];
    if (!open_cluster(o, &cluster, &config, error))
        return refuse(error);
    configure_engine(run, PLAN_BATCH, &config);
    struct plan_options options = {.cluster = &cluster,
                                   .engine = &config,
                                   .short_chunks = o->chunk == 0,
                                   .load = describe_load(run)};
    options.load.ttft = o->ttft > 0 ? options.load.ttft : PLAN_TTFT;
    options.load.itl = o->itl > 0 ? options.load.itl : PLAN_ITL;
    for (int n = 1; n <= MAX_SHARDS; n++)
        options.blocks[n] = device_blocks(run, n, config.kv_type);
    size_t bytes = block_bytes(&run->model.config, 1, config.kv_type);
    bool ok = size_holds("--kv-host", o->kv_host, config.host_blocks, bytes, error) &&
              size_holds("--kv-device", o->kv_device, options.blocks[1], bytes, error);
    return ok && plan_print(&options, error) ? 0 : refuse(error);
}

/* The first line of a conversation: what is loaded, and where. */
static void tell_model(const struct run *run) {
    const struct engine_config *config = engine_config_of(run->answers.engine);
    const char *slash = strrchr(run->options.model, '/');
    double weights = 0, bytes = 0;
    int n_prefill = 0, n_decode = 0, n_workers = config->n_workers;
    for (int i = 0; i < run->model.config.n_layers * N_ROLES; i++) {
        const struct tensor *tensor = run->model.layers[i / N_ROLES][i % N_ROLES];
        if (tensor && (i != OUTPUT || tensor != run->model.layers[0][TOKEN_EMBD])) {
            weights += (double)tensor->rows * (double)tensor->cols;
            bytes += (double)tensor->bytes;
        }
    }
    for (int i = 0; i < n_workers; i++) {
        n_prefill += config->workers[i].prefills;
        n_decode += config->workers[i].decodes;
    }
    bool base = run->answers.template.kind == TEMPLATE_NONE;
    wrap_print(stderr,
               "%s: %s, %.*f%s weights in %s (%.*f %s), a %s; on %s, %d worker%s: %d prefill, %d "
               "decode. /help lists the commands\n",
               slash ? slash + 1 : run->options.model, run->model.config.architecture,
               weights < 1e10, weights * (weights < 1e9 ? 1e-6 : 1e-9), weights < 1e9 ? "M" : "B",
               gguf_type_name(model_main_type(&run->model)), bytes < 1e10,
               bytes * (bytes < 1e9 ? 1e-6 : 1e-9), bytes < 1e9 ? "MB" : "GB",
               base ? "base model, which continues what you type" : "chat model",
               config->backend->name, n_workers, n_workers == 1 ? "" : "s", n_prefill, n_decode);
}

static int run_requests(struct run *run) {
    const struct options *o = &run->options;
    char error[ERROR_LENGTH];
    int n_failed = 0;
    if (o->file)
        n_failed = run_file(run, error);
    else if (o->request.prompt || o->request.ids)
        n_failed = answers_run(&run->answers, &o->request);
    else if (isatty(STDIN_FILENO)) {
        tell_model(run);
        chat_run(&run->answers, &o->request); /* who talks has seen what failed */
    } else
        n_failed = run_piped(run, error);
    watch_stop(run->watch);
    if (n_failed < 0)
        complain(error);
    if (n_failed < 0 && run->answers.n_requests == 0)
        return EXIT_FILE;
    bool interrupted = run->answers.interrupted && !run->answers.converses;
    if (interrupted && text_moves(STDERR_FILENO))
        (void)fputc('\n', stderr); /* behind a ^C */
    if (o->stats)
        stats_print(&run->answers);
    else if (!o->json)
        stats_summary(&run->answers);
    return n_failed < 0   ? EXIT_FILE
           : interrupted  ? EXIT_INTERRUPTED
           : n_failed > 0 ? EXIT_REQUESTS
                          : 0;
}

static int run_engine(struct run *run) {
    const struct options *o = &run->options;
    struct answers *answers = &run->answers;
    answers->json = o->json;
    answers->verbose = o->verbose;
    answers->wrap = text_moves(STDOUT_FILENO) && !o->verbose ? &run->wrap : NULL;
    if (o->logits)
        return evaluate_logits(answers, &o->request, o->logits);
    if (o->perplexity)
        return evaluate_perplexity(answers, o->perplexity);
    char error[ERROR_LENGTH] = "cannot start threads";
    if (engine_start(answers->engine) && (!o->watch || watch_start(run->watch))) {
        if (!run->server)
            return run->load ? run_load(run) : run_requests(run);
        bool served = serve_run(run->server, answers, error);
        watch_stop(run->watch);
        if (served)
            return 0;
    }
    return refuse(error);
}

/* ---- signals ---- */

/* Stops the program as a shell expects it, and not at all where no shell could let it go on. Who
 * edits a line is woken in both cases. */
static void stop_program(struct run *run) {
    sigset_t stop;
    sigemptyset(&stop);
    sigaddset(&stop, SIGTSTP);
    pthread_mutex_lock(&run->closing);
    editor_restore();
    bool erased = watch_restore(run->watch);
    (void)raise(SIGTSTP);
    pthread_sigmask(SIG_UNBLOCK, &stop, NULL); /* here it stands still */
    pthread_sigmask(SIG_BLOCK, &stop, NULL);
    editor_resume();
    if (erased)
        watch_resume(run->watch);
    pthread_mutex_unlock(&run->closing);
    (void)kill(getpid(), SIGCONT);
}

/* Whether it ends something else than the program: Ctrl-C the answers, or the line of a
 * conversation; that, or SIGTERM, a server, when it has answered. */
static bool interrupts(struct run *run, int number) {
    int answering = ANSWERING, serving = SERVING;
    atomic_int *activity = &run->answers.activity;
    bool is_int = number == SIGINT;
    return (is_int && atomic_compare_exchange_strong(activity, &answering, INTERRUPTED)) ||
           ((is_int || number == SIGTERM) &&
            atomic_compare_exchange_strong(activity, &serving, INTERRUPTED)) ||
           (is_int && answering == IDLE && chat_interrupted());
}

/* A signal that interrupts nothing, or comes again, ends the program, the terminal as it was. */
static void *watch_signals(void *argument) {
    struct run *run = argument;
    char error[ERROR_LENGTH];
    for (;;) {
        int number;
        (void)sigwait(&run->signals, &number);
        if (number == SIGTSTP) {
            stop_program(run);
            continue;
        }
        if (!interrupts(run, number)) {
            editor_restore();
            pthread_mutex_lock(&run->closing);
            (void)watch_restore(run->watch);
            if (run->answers.engine && run->trace) { /* nothing is noted any more */
                engine_lock(run->answers.engine);
                (void)trace_close(run->trace, error);
            }
            _exit(128 + number);
        }
        pthread_mutex_lock(&run->closing);
        if (run->answers.engine) { /* else its answers have just ended */
            engine_lock(run->answers.engine);
            engine_wake(run->answers.engine);
            engine_unlock(run->answers.engine);
        }
        pthread_mutex_unlock(&run->closing);
    }
    return NULL;
}

/* Signals are for watch_signals alone, but for those that the caller ignores (nohup), and two that
 * a line editor waits for; a closed stdout is an error of fflush, not a death. Before any other
 * thread is started, so that none of them takes one. */
static bool start_watching(struct run *run) {
    static const int watched[] = {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGTSTP};
    pthread_t watcher;
    pthread_attr_t threads;
    struct rlimit addresses;
    sigset_t blocked;
    sigemptyset(&run->signals);
    for (size_t i = 0; i < sizeof watched / sizeof *watched; i++) {
        struct sigaction was;
        if (sigaction(watched[i], NULL, &was) == 0 && was.sa_handler != SIG_IGN)
            sigaddset(&run->signals, watched[i]);
    }
    blocked = run->signals;
    sigaddset(&blocked, SIGWINCH);
    sigaddset(&blocked, SIGCONT);
    pthread_sigmask(SIG_BLOCK, &blocked, NULL);
    (void)signal(SIGPIPE, SIG_IGN);
    /* where addresses are limited all of a stack counts, and malloc's 64 MB for each thread */
    if (getrlimit(RLIMIT_AS, &addresses) == 0 && addresses.rlim_cur != RLIM_INFINITY)
        (void)mallopt(M_ARENA_MAX, 1);
    if (pthread_attr_init(&threads) == 0) {
        (void)pthread_attr_setstacksize(&threads, STACK_BYTES);
        (void)pthread_setattr_default_np(&threads);
        pthread_attr_destroy(&threads);
    }
    return pthread_create(&watcher, NULL, watch_signals, run) == 0 && pthread_detach(watcher) == 0;
}

/* ---- the program ---- */

static int run_model(struct run *run) {
    const struct options *o = &run->options;
    char error[ERROR_LENGTH] = "";
    int status;
    if (!start_watching(run))
        return refuse("out of threads");
    if (!cli_given(o->given, "--seed") && !o->replay && !o->sim &&
        !o->plan) /* a load is repeatable */
        run->options.request.sampling.seed = (uint64_t)time(NULL) * 1000003u + (uint64_t)getpid();
    run->answers.seed = o->request.sampling.seed;
    bool watches = o->watch || cli_given(o->given, "--serve");
    pthread_mutex_lock(&run->closing); /* who watches signals looks at them */
    bool ok = open_trace(run, error);
    run->watch = watches ? watch_open(trace_ledger(run->trace)) : NULL;
    pthread_mutex_unlock(&run->closing);
    ok = ok && (!watches || run->watch || fail(error, "out of memory")) &&
         open_server(run, error) && open_model(run, error) && open_load(run, error);
    if (ok && o->sim)
        status = run_sim(run);
    else if (ok && o->plan)
        status = run_plan(run);
    else if (ok && open_backend(run, error) && open_engine(run, error))
        status = run_engine(run);
    else
        status = refuse(error);
    pthread_mutex_lock(&run->closing);
    struct engine *engine = run->answers.engine;
    struct watch *watch = run->watch;
    run->answers.engine = NULL;
    run->watch = NULL;
    pthread_mutex_unlock(&run->closing);
    bool closed = engine_close(engine);
    watch_close(watch);
    load_close(run->load);
    serve_close(run->server);
    if (!trace_close(run->trace, error))
        status = refuse(error);
    if (run->backend && closed)
        run->backend->close(run->backend);
    tok_close(run->answers.tokenizer);
    free(run->answers.template.system);
    model_close(&run->model);
    free(run->ends_text);
    return status;
}

/* A stream that the caller closed stays so: else the next file would get its number, and what is
 * meant for stderr. Opened the wrong way round, it fails with the same error. */
static void hold_closed_streams(void) {
    for (int number = 0; number < 3; number++)
        if (fcntl(number, F_GETFD) < 0)
            (void)open("/dev/null", number == STDIN_FILENO ? O_WRONLY : O_RDONLY);
}

int run_program(int argc, char **argv) {
    /* the watcher of signals outlives this call */
    static struct run run = {.closing = PTHREAD_MUTEX_INITIALIZER};
    char error[ERROR_LENGTH];
    int status = 0;
    hold_closed_streams();
    (void)setlocale(LC_CTYPE, "C.UTF-8"); /* of lib/wrap.h */
    if (!cli_parse(&run.options, argc, argv, error)) {
        complain(error);
        status = EXIT_USAGE;
    } else if (run.options.help)
        cli_help(stdout);
    else if (run.options.version)
        printf("dynamo %s\n", CLI_VERSION);
    else if (run.options.tokenize)
        status = evaluate_tokenize(run.options.model, run.options.tokenizer, run.options.tokenize);
    else
        status = run_model(&run);
    cli_free(&run.options);
    if (ferror(stdout)) /* why is long forgotten: it is tried again */
        (void)fputc('\n', stdout);
    if (fflush(stdout) != 0 || ferror(stdout)) {
        (void)fprintf(stderr, "dynamo: stdout: %s\n", strerror(errno));
        status = EXIT_FILE;
    }
    return status;
}

#endif /* RUN_IMPLEMENTATION */
