/* cuda_faults.h: copies of the CUDA backend, and what goes wrong. Part of test_cuda.cu.
 *
 * Devices that are refused, machines without a GPU; under emulation also memory that runs out, and
 * calls that fail in the middle. */
#ifndef CUDA_FAULTS_H
#define CUDA_FAULTS_H
#include "cuda_worker.h"

/* ---- copies ---- */

struct place {             /* `bytes` of memory that a copy can have to do with */
    struct device *device; /* NULL: pinned host memory */
    uint8_t *memory;
};

static void wait_for(struct device *device, enum stream stream, uint64_t ticket) {
    while (!device->backend->copy_done(device, stream, ticket))
        continue;
}

/* Pieces of 40 bytes, a random part of each copied, two places further along a chain of places: the
 * next copy of a piece is ordered when the one before is reported, on the device that fetches. */
static void check_copies(struct check *check, struct random *random, struct device **devices,
                         const struct place *chain, int n_places) {
    enum { PIECE = 40, PIECES_COPIED = GPU_TICKETS + 300 };
    struct backend *backend = devices[0]->backend;
    std::vector<uint8_t> from(PIECE * PIECES_COPIED), to(from.size());
    for (uint8_t &byte : from)
        byte = (uint8_t)word(random);
    memcpy(chain[0].memory, from.data(), from.size());
    enum stream stream = (enum stream)between(random, STREAM_PAGE_OUT, STREAM_TRANSFER);
    bool late = false;
    for (int i = 1; i < n_places; i++) {
        struct device *by = chain[i].device ? chain[i].device : chain[i - 1].device;
        std::vector<uint64_t> tickets;
        for (int piece : shuffled(random, PIECES_COPIED)) {
            struct copy2d copy = {chain[i].memory + piece * PIECE,
                                  chain[i - 1].memory + piece * PIECE,
                                  PIECE,
                                  PIECE,
                                  PIECE,
                                  1};
            if (piece % 3 == 0) /* four rows of ten bytes */
                copy = {copy.to, copy.from, 10, 10, 10, 4};
            tickets.push_back(backend->copy(by, stream, &copy));
            CHECK(tickets.size() == 1 || tickets.back() == tickets[tickets.size() - 2] + 1,
                  "ticket %llu", (unsigned long long)tickets.back());
        }
        late |= !backend->copy_done(by, stream, tickets.back());
        wait_for(by, stream, tickets[tickets.size() / 2]);
        CHECK(backend->copy_done(by, stream, tickets[0]), "copies end in their order");
        wait_for(by, stream, tickets.back());
    }
    memcpy(to.data(), chain[n_places - 1].memory, to.size());
    CHECK(from == to, "bytes went through %d places", n_places);
#ifdef CUDA_EMULATED
    CHECK(late, "a copy is not done as soon as it is ordered");
#else
    (void)late;
#endif
}

/* Runs of bytes with a pitch, to the device and back: nothing beside them is touched. */
static void check_pitches(struct check *check, struct random *random, struct device *device,
                          uint8_t *host, uint8_t *on_device) {
    struct backend *backend = device->backend;
    size_t width = (size_t)between(random, 1, 60), height = (size_t)between(random, 1, 30);
    size_t pitch = width + (size_t)below(random, 20), other = width + (size_t)below(random, 20);
    for (size_t i = 0; i < 8000; i++)
        host[i] = (uint8_t)word(random);
    std::vector<uint8_t> before(host, host + 8000);
    struct copy2d up = {on_device, host, other, pitch, width, height};
    struct copy2d down = {host + 4000, on_device, pitch, other, width, height};
    wait_for(device, STREAM_PAGE_IN, backend->copy(device, STREAM_PAGE_IN, &up));
    wait_for(device, STREAM_PAGE_OUT, backend->copy(device, STREAM_PAGE_OUT, &down));
    bool right = true;
    for (size_t i = 0; i < 8000; i++) {
        size_t at = i - 4000;
        bool copied = i >= 4000 && at / pitch < height && at % pitch < width;
        right &= host[i] == before[copied ? at : i];
    }
    CHECK(right, "%zu runs of %zu bytes, %zu and %zu apart", height, width, pitch, other);
}

static void copies(struct check *check) {
    struct random random = start("copies");
    struct model_config config = draw_config(&random, 1, 1);
    config.rope_dim = 0;
    struct backend *backend = open_backend();
    struct device *devices[2];
    uint8_t *memory[4];
    size_t bytes = 64 * 2048;
    for (int i = 0; i < 2; i++) {
        struct device wanted = wanted_device(&config, NULL, 0, 1, 1);
        wanted.index = i % backend->n_gpus;
        devices[i] = open_device(backend, &wanted, 1);
        memory[i] = (uint8_t *)backend->alloc(devices[i], bytes, false);
        memory[2 + i] = (uint8_t *)backend->alloc(devices[i], bytes, true);
        need(memory[i] && memory[2 + i], "memory for copies");
    }
    const struct place chain[] = {
        {NULL, memory[2]}, {devices[0], memory[0]}, {devices[1], memory[1]}, {NULL, memory[3]}};
    check_copies(check, &random, devices, chain, 4);
    for (int i = 0; i < 20; i++)
        check_pitches(check, &random, devices[i % 2], memory[2 + i % 2], memory[i % 2]);
    for (int pinned = 0; pinned < 2; pinned++) {
        CHECK(!backend->alloc(devices[0], (size_t)1 << 60, pinned), "more than there is");
        CHECK(backend->free_memory(devices[0], pinned) > bytes, "some memory is free");
    }
    CHECK(cudaGetLastError() == cudaSuccess, "no room is no fault");
    for (int i = 0; i < 2; i++) {
        backend->release(devices[i], memory[i], false);
        backend->release(devices[i], memory[2 + i], true);
        close_device(devices[i]);
    }
    backend->close(backend);
}

/* ---- refusals: one line that says what to do ---- */

/* The message with which a device is refused. */
static const char *refusal(struct check *check, struct backend *backend,
                           const struct device *wanted) {
    static char error[ERROR_LENGTH];
    error[0] = 0;
    struct device *device = backend->device_open(backend, wanted, error);
    CHECK(!device, "a device that should be refused");
    CHECK(error[0] && !strchr(error, '\n'), "one line: %s", error);
    if (device)
        backend->device_close(device);
    return error;
}

#define CHECK_REFUSAL(words, wanted)                                                               \
    do {                                                                                           \
        const char *message = refusal(check, backend, wanted);                                     \
        CHECK(strstr(message, words), "%s", message);                                              \
    } while (0)

static void refused_devices(struct check *check) {
    struct random random = start("refused");
    struct model_config config = draw_config(&random, 1, 8);
    config.rope_dim = 0;
    struct backend *backend = open_backend();
    const struct device good = wanted_device(&config, NULL, 0, 1, 4);
    struct device wanted = good;
    wanted.index = backend->n_gpus;
    CHECK_REFUSAL("there are", &wanted);
    wanted.index = -1;
    CHECK_REFUSAL("got device -1", &wanted);
    wanted = good;
    wanted.kv_type = KV_F32;
    CHECK_REFUSAL("--kv-type", &wanted);
    for (int n_shards = 0; n_shards <= 16; n_shards++) {
        struct model_config odd = config;
        odd.n_heads = odd.n_kv_heads = n_shards == 4 ? 18 : 3 * 5 * 7 * 16; /* 4: not of these */
        odd.head_dim = 8;
        odd.d_ff = n_shards == 8 ? 8 : 3 * 5 * 7 * 32; /* 8: one row each is not enough */
        wanted = wanted_device(&odd, NULL, 0, n_shards, 4);
        if (n_shards != 1 && n_shards != 2)
            CHECK_REFUSAL("--tp", &wanted);
    }
    wanted = good;
    static const int dims[] = {4, 20, 250, 257, 264, 512};
    for (int dim : dims) {
        config.head_dim = dim;
        CHECK_REFUSAL("multiples of 8 up to 256", &wanted);
    }
    config.head_dim = 8;
    pretended.major = 7;
    CHECK_REFUSAL("expected 8.0 or newer", &wanted);
    pretended.major = 0;
    close_device(open_device(backend, &wanted, 1)); /* nothing of that is left */
    backend->close(backend);
}

static void no_gpu(struct check *check) {
    static const struct {
        cudaError_t count;
        int driver;
        const char *words;
    } cases[] = {{cudaErrorInsufficientDriver, 11080, "the driver knows CUDA 11.8"},
                 {cudaErrorInsufficientDriver, 0, "no driver is installed"},
                 {cudaErrorNoDevice, 13000, "no GPU: "}};
    for (const auto &machine : cases) {
        char error[ERROR_LENGTH] = "";
        struct backend_options options = {};
        pretended.count = machine.count;
        pretended.driver = machine.driver;
        struct backend *backend = cuda_backend_open(&options, error);
        CHECK(!backend && strstr(error, machine.words) && !strchr(error, '\n'), "%s", error);
    }
    pretended.count = cudaSuccess;
    pretended.driver = -1;
    CHECK(cudaGetLastError() == cudaSuccess, "no GPU is no fault");
}

#ifdef CUDA_EMULATED
/* ---- what only an emulated machine can be made to do ---- */

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

enum { GPUS = 4, MEMORY = 256 << 20, PROCESSORS = 4 };

static size_t free_bytes() {
    size_t available = 0, total = 0;
    need_success(cudaSetDevice(0), "cudaSetDevice");
    need_success(cudaMemGetInfo(&available, &total), "cudaMemGetInfo");
    return available;
}

/* Opens a worker of one shard as engine.h does, until something fails: false, and why. */
static bool try_worker(struct backend *backend, const struct test_model *model, char *error) {
    struct device wanted = wanted_device(&model->config, model->frequency, 0, 1, 40);
    struct device *device = backend->device_open(backend, &wanted, error);
    if (!device)
        return false;
    bool ok = true;
    for (const struct tensor *tensor : model->tensors) {
        struct slice slice = {SLICE_WHOLE, 0, 1};
        ok = ok && backend->upload(device, tensor, slice, error);
    }
    void *kv = ok ? backend->alloc(device, 1000, false) : NULL;
    void *host = ok ? backend->alloc(device, 1000, true) : NULL;
    if (ok && !(kv && host))
        snprintf(error, ERROR_LENGTH, "no room for blocks");
    ok = ok && kv && host;
    backend->release(device, kv, false);
    backend->release(device, host, true);
    backend->device_close(device);
    return ok;
}

/* Every allocation of a worker fails once: there is a message each time, and nothing is left. */
static void memory_that_is_missing(struct check *check) {
    struct random random = start("memory");
    struct test_model *model =
        make_model(&random, draw_config(&random, 32, 1), like_types(TYPE_Q8_0));
    static const char *const calls[] = {"cudaMalloc", "cudaHostAlloc"};
    size_t before = free_bytes();
    for (const char *call : calls) {
        bool ok = false;
        int after = 0;
        for (; !ok && after < 200; after++) {
            char error[ERROR_LENGTH] = "";
            struct backend *backend = open_backend();
            emu_fail(call, after);
            ok = try_worker(backend, model, error);
            CHECK(ok || (error[0] && !strchr(error, '\n')), "%s %d: %s", call, after, error);
            backend->close(backend);
            CHECK(free_bytes() == before, "%s %d: %zu bytes are left behind", call, after,
                  before - free_bytes());
        }
        CHECK(ok && after > 3, "%s failed %d times", call, after - 1);
        emu_devices(GPUS, MEMORY, PROCESSORS);
    }
    free_model(model);
}

static void models_that_do_not_fit(struct check *check) {
    struct random random = start("too large");
    char error[ERROR_LENGTH] = "";
    emu_devices(1, 20 << 20, PROCESSORS);
    struct model_config config = draw_config(&random, 1, 1);
    config.rope_dim = 0;
    struct backend *backend = open_backend();
    struct device wanted = wanted_device(&config, NULL, 0, 1, 4);
    struct device *device = open_device(backend, &wanted, 1);
    struct tensor *small = make_tensor(&random, TYPE_BF16, 100, 100, 1.0f, 0.0f);
    struct tensor *large = make_tensor(&random, TYPE_BF16, 1200, 10000, 1.0f, 0.0f);
    struct slice whole = {SLICE_WHOLE, 0, 1};
    CHECK(!backend->upload(device, large, whole, error), "24 MB of 20");
    int left = 0, total = 0, needed = 0;
    CHECK(sscanf(error, "t: device 0 (%*[^)]) has %d MB left of %d and needs %d for this tensor",
                 &left, &total, &needed) == 3,
          "%s", error);
    CHECK(left > 10 && left < 20 && total == 20 && needed == 23 && strstr(error, "smaller type"),
          "%s", error);
    CHECK(backend->upload(device, small, whole, error), "%s", error);
    wanted.max_rows = 1000000;
    CHECK_REFUSAL("lower --chunk or --max-batch", &wanted);
    close_device(device);
    backend->close(backend);
    CHECK(free_bytes() == 20 << 20, "memory is left behind");
    free_tensor(small);
    free_tensor(large);
    emu_devices(GPUS, MEMORY, PROCESSORS);
}

/* Runs `act` in a child process. Returns its status, 128 + N for signal N, and what it wrote. */
template <typename Act> static int in_child(Act act, char *text, size_t size) {
    FILE *file = tmpfile();
    need(file != NULL, "a temporary file");
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        dup2(fileno(file), STDERR_FILENO);
        act();
        _exit(0);
    }
    int status = -1;
    waitpid(child, &status, 0);
    rewind(file);
    text[fread(text, 1, size - 1, file)] = 0;
    fclose(file);
    return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

static void tell_of_loss(void *) {
    fprintf(stderr, "the requests are lost\n");
}

/* Steps and copies on a worker, so that each kind of call is made. */
static void work(struct worker *worker, struct random *random) {
    struct device *device = worker->shards[0];
    struct story story = draw_story(random, 5, 3, device->config->vocab_size);
    tell(worker, random, story, 10, 0);
    uint8_t *host = (uint8_t *)worker->backend->alloc(device, 1000, true);
    struct copy2d copy = {host, device->kv, 10, 10, 10, 10},
                  rows = {host, device->kv, 20, 10, 5, 9};
    wait_for(device, STREAM_PAGE_OUT, worker->backend->copy(device, STREAM_PAGE_OUT, &copy));
    wait_for(device, STREAM_PAGE_OUT, worker->backend->copy(device, STREAM_PAGE_OUT, &rows));
}

/* A call fails in the middle: one line says where and what, and the requests that are lost. */
static void faults(struct check *check) {
    static const struct {
        const char *call, *doing;
        int n_shards;
    } cases[] = {{"cudaLaunchKernelEx", "computing a step", 1},
                 {"cudaMemcpyAsync", "computing a step", 1},
                 {"cudaStreamSynchronize", "ending a step", 1},
                 {"cudaStreamBeginCapture", "computing a step", 1},
                 {"cudaStreamEndCapture", "ending a step", 1},
                 {"cudaGraphInstantiate", "ending a step", 1},
                 {"cudaGraphLaunch", "ending a step", 1},
                 {"cudaMemcpy2DAsync", "paging out", 1},
                 {"cudaEventRecord", "paging out", 1},
                 {"cudaEventQuery", "polling a copy", 1},
                 {"cudaMemcpyPeerAsync", "adding up shards", 2},
                 {"cudaStreamWaitEvent", "adding up shards", 2}};
    struct random random = start("faults");
    struct test_model *model =
        make_model(&random, draw_config(&random, 1, 2), like_types(TYPE_BF16));
    for (const auto &fault : cases) {
        char text[2000], where[100] = "", call[100] = "", why[100] = "", doing[100] = "";
        int line = 0, device = -1;
        int status = in_child(
            [&] {
                struct worker worker =
                    open_worker(open_backend(tell_of_loss), model, fault.n_shards, 60);
                emu_fail(fault.call, 0);
                work(&worker, &random);
            },
            text, sizeof text);
        int found =
            sscanf(text, "dynamo: %99[^:]:%d: device %d (%*[^)]): %99[^:]: %99[^,], while %99[^\n]",
                   where, &line, &device, call, why, doing);
        CHECK(status == 128 + SIGABRT && found == 6, "%s: status %d: %s", fault.call, status, text);
        bool launches = !strcmp(fault.call, "cudaLaunchKernelEx");
        bool source = strstr(where, ".cu") || strstr(where, "gpu.h");
        CHECK(source && line > 0 && device >= 0 && device < fault.n_shards &&
                  !strcmp(call, launches ? "embed_kernel" : fault.call) &&
                  !strcmp(doing, fault.doing),
              "%s", text);
        const char *rest = strchr(text, '\n');
        CHECK(rest && !strcmp(rest, "\nthe requests are lost\n"), "%s", text);
    }
    free_model(model);
}
#endif
#endif /* CUDA_FAULTS_H */
