/* cuda_emu.h: CUDA on the CPU, so that every kernel can be tested, checked and stepped through
 * without a GPU. g++ compiles the very same source that nvcc compiles for the GPU. What a kernel
 * sees is in cuda_emu_threads.h; here is the part of CUDA's runtime that the host calls: devices,
 * memory, streams, events, graphs, launches. Names, values and meanings are CUDA's.
 *
 *     #ifdef CUDA_EMULATED
 *     #include "cuda_emu.h"
 *     #else
 *     #include <cuda_runtime.h> // and functions for the inline PTX, such as mma_bf16
 *     #endif
 *     ...
 *     emu_next_kernel("add_kernel");
 *     cudaLaunchKernelEx(&config, add_kernel, x, 1.0f, n);
 *     cudaStreamSynchronize(stream);
 *
 * g++ -x c++ -std=gnu++17 -g -DCUDA_EMULATED -Itest kernels.cu, then in gdb:
 *     break add_kernel if blockIdx.x == 2 && threadIdx.x == 7
 *     print threadIdx
 *     call emu_where()                     // what each thread of this block waits for
 *
 * How it works: a call checks its arguments and appends to a stream's queue; nothing runs. Whoever
 * synchronizes runs what is queued, there, on his own thread, in a random order of those that
 * streams and events allow: sometimes whatever comes, sometimes only what he waits for, so that all
 * else comes as late as it can. Whoever polls finds that nothing, a little or much has been done.
 * One lock guards it all: host threads may call it together, kernels run one by one.
 *
 * What it promises: calls fail as on a GPU, by the limits of launches, the memory of a device, the
 * pointers of copies, the rules of recording; memory is full of NaNs, and malloc'ed, so that
 * AddressSanitizer checks each access of a kernel; a copy to or from memory that was freed in the
 * meantime ends the program.
 *
 * Stricter than CUDA:
 *   - Stream 0 is a stream like others: no other one waits for it (as with cudaStreamNonBlocking).
 *   - A graph is what one stream did, one after the other: a stream that is recorded neither waits
 *     for events nor records them.
 * What it leaves out: the rest of the runtime, and other attributes of launches. Priorities change
 * nothing, since any order is right.
 *
 * Include it in one file of a program. Read next: emu_step, emu_until, emu_launch. */
#ifndef CUDA_EMU_H
#define CUDA_EMU_H
#include "cuda_emu_threads.h"

#include <time.h>

#include <deque>
#include <map>
#include <string>
#include <tuple>
#include <utility>

enum {                                /* of every device: those of compute capability 9.0 */
       EMU_SHARED_DEFAULT = 48 << 10, /* bytes that every kernel may have */
       EMU_SHARED_LIMIT = 227 << 10,  /* ... and with cudaFuncSetAttribute */
       EMU_L2_CACHE = 50 << 20,
       EMU_VERSION = 13000
};

/* ---- types of CUDA's ---- */

#define EMU_ERRORS(X)                                                                              \
    X(cudaSuccess, 0, "no error")                                                                  \
    X(cudaErrorInvalidValue, 1, "invalid argument")                                                \
    X(cudaErrorMemoryAllocation, 2, "out of memory")                                               \
    X(cudaErrorInvalidConfiguration, 9, "invalid configuration argument")                          \
    X(cudaErrorInvalidPitchValue, 12, "invalid pitch argument")                                    \
    X(cudaErrorInvalidMemcpyDirection, 21, "invalid copy direction for memcpy")                    \
    X(cudaErrorInsufficientDriver, 35, "CUDA driver version is insufficient")                      \
    X(cudaErrorNoDevice, 100, "no CUDA-capable device is detected")                                \
    X(cudaErrorInvalidDevice, 101, "invalid device ordinal")                                       \
    X(cudaErrorInvalidResourceHandle, 400, "invalid resource handle")                              \
    X(cudaErrorNotReady, 600, "device not ready")                                                  \
    X(cudaErrorHostMemoryAlreadyRegistered, 712,                                                   \
      "part or all of the requested memory range is already mapped")                               \
    X(cudaErrorHostMemoryNotRegistered, 713,                                                       \
      "pointer does not correspond to a registered memory region")                                 \
    X(cudaErrorLaunchFailure, 719, "unspecified launch failure")                                   \
    X(cudaErrorStreamCaptureUnsupported, 900, "operation not permitted when stream is capturing")  \
    X(cudaErrorStreamCaptureInvalidated, 901,                                                      \
      "operation failed due to a previous error in capture")                                       \
    X(cudaErrorStreamCaptureUnmatched, 903, "capture was not begun in this stream")

enum cudaError_t : int {
#define EMU_ERROR(name, value, text) name = value,
    EMU_ERRORS(EMU_ERROR)
#undef EMU_ERROR
};

enum cudaMemcpyKind : int {
    cudaMemcpyHostToHost,
    cudaMemcpyHostToDevice,
    cudaMemcpyDeviceToHost,
    cudaMemcpyDeviceToDevice,
    cudaMemcpyDefault
};

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal = 1 };
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
enum { cudaStreamNonBlocking = 1 };
enum { cudaEventDefault = 0, cudaEventDisableTiming = 2 };
enum { cudaHostAllocPortable = 1, cudaHostRegisterPortable = 1 };

typedef struct CUstream_st *cudaStream_t;
typedef struct CUevent_st *cudaEvent_t;
typedef struct CUgraph_st *cudaGraph_t;
typedef struct CUgraphExec_st *cudaGraphExec_t;

struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem, sharedMemPerBlockOptin;
    int major, minor, multiProcessorCount, l2CacheSize;
};

struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    union {
        int programmaticStreamSerializationAllowed;
    } val;
};

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute *attrs;
    unsigned numAttrs;
};

/* ---- state ---- */

struct emu_moment { /* when an event is recorded */
    CUstream_st *stream;
    bool done = false;
    double time = 0; /* seconds */
};

struct emu_task { /* a kernel or something else */
    std::shared_ptr<const emu_kernel> kernel{};
    std::function<void()> run{};
};

struct emu_work { /* in a stream's queue: waits, does the task, and then the moment has come */
    std::shared_ptr<emu_moment> wait{}, mark{};
    emu_task task{};
};

struct CUgraph_st {
    pthread_t thread; /* that records it */
    bool invalid = false;
    std::vector<emu_task> tasks{};
};

struct CUgraphExec_st {
    std::vector<emu_task> tasks;
};

struct CUstream_st {
    int device;
    bool destroyed = false; /* once its queue is empty it is freed */
    std::deque<emu_work> queue{};
    std::unique_ptr<CUgraph_st> graph{}; /* that its work is recorded in */
};

struct CUevent_st {
    int device;
    bool timed;
    std::shared_ptr<emu_moment> moment{}; /* the latest record */
};

enum { EMU_PINNED = -1, EMU_PAGEABLE = -2, EMU_INVALID = -3 }; /* places that are no device */

struct emu_allocation {
    size_t bytes;
    int place;               /* a device, or EMU_PINNED */
    bool registered = false; /* the caller's memory, pinned */
};

static struct { /* under emu.mutex */
    int n_devices = 0, multiprocessors;
    size_t memory_each;
    std::vector<size_t> used;                                  /* of each device's memory */
    std::vector<std::unique_ptr<CUstream_st>> zero;            /* each device's stream 0 */
    std::vector<CUstream_st *> streams;                        /* those too */
    std::map<uintptr_t, emu_allocation> allocations;           /* by address */
    std::map<std::pair<int, const void *>, int> shared_limits; /* of kernels on devices */
    std::map<std::string, int> failures; /* calls that are to fail, after so many good ones */
} cuda;

static thread_local struct {
    int device = 0;
    cudaError_t error = cudaSuccess;
    const char *next_kernel = nullptr;
} emu_thread;

/* ---- errors ---- */

static cudaError_t emu_result(cudaError_t error) {
    if (error != cudaSuccess)
        emu_thread.error = error;
    return error;
}

/* The error that a call fails with in any case. */
static cudaError_t emu_enter(const char *call) {
    if (emu_thread.device >= cuda.n_devices)
        return cuda.n_devices > 0 ? cudaErrorInvalidDevice : cudaErrorNoDevice;
    auto failure = cuda.failures.find(call);
    if (failure == cuda.failures.end() || failure->second-- > 0)
        return cudaSuccess;
    cuda.failures.erase(failure);
    bool allocates = strcmp(call, "cudaMalloc") == 0 || strncmp(call, "cudaHost", 8) == 0;
    return allocates ? cudaErrorMemoryAllocation : cudaErrorLaunchFailure;
}

#define EMU_CHECK(condition, error)                                                                \
    if (!(condition))                                                                              \
        return emu_result(error);
#define EMU_CALL(name) /* opens every call */                                                      \
    std::lock_guard<std::mutex> lock(emu.mutex);                                                   \
    if (cudaError_t failure = emu_enter(name))                                                     \
        return emu_result(failure);

const char *cudaGetErrorString(cudaError_t error) {
#define EMU_ERROR(name, value, text)                                                               \
    if (error == name)                                                                             \
        return text;
    EMU_ERRORS(EMU_ERROR)
#undef EMU_ERROR
    return "unrecognized error code";
}

cudaError_t cudaGetLastError(void) {
    return std::exchange(emu_thread.error, cudaSuccess);
}

/* ---- devices ---- */

cudaError_t cudaDriverGetVersion(int *version) {
    *version = EMU_VERSION;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version) {
    return cudaDriverGetVersion(version);
}

static bool emu_is_device(int device) {
    return device >= 0 && device < cuda.n_devices;
}

cudaError_t cudaGetDeviceCount(int *count) {
    *count = 0;
    EMU_CALL(__func__)
    *count = cuda.n_devices;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    EMU_CALL(__func__)
    EMU_CHECK(emu_is_device(device), cudaErrorInvalidDevice)
    emu_thread.device = device;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int device) {
    EMU_CALL(__func__)
    EMU_CHECK(emu_is_device(device), cudaErrorInvalidDevice)
    *properties = {};
    strcpy(properties->name, "Emulated GPU");
    properties->totalGlobalMem = cuda.memory_each;
    properties->l2CacheSize = EMU_L2_CACHE;
    properties->sharedMemPerBlockOptin = EMU_SHARED_LIMIT;
    properties->major = 9;
    properties->multiProcessorCount = cuda.multiprocessors;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    EMU_CALL(__func__)
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) {
    EMU_CALL(__func__)
    EMU_CHECK(emu_is_device(device) && emu_is_device(peer), cudaErrorInvalidDevice)
    *can = device != peer;
    return cudaSuccess;
}

cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) {
    EMU_CALL(__func__)
    EMU_CHECK(flags == 0, cudaErrorInvalidValue)
    EMU_CHECK(emu_is_device(peer) && peer != emu_thread.device, cudaErrorInvalidDevice)
    return cudaSuccess; /* copies between devices need none */
}

/* ---- streams: doing what is queued ---- */

static bool emu_ready(const CUstream_st *stream) {
    return !stream->queue.empty() &&
           (!stream->queue.front().wait || stream->queue.front().wait->done);
}

/* Runs a kernel. Before it, one block of the next one may begin, if that is launched so. */
static void emu_run(const emu_kernel *kernel, const emu_kernel *next) {
    if (next && next->programmatic && emu_random(2))
        emu_start_early(next);
    emu_run_kernel(kernel);
}

/* Does the first work of the queue. */
static void emu_step(CUstream_st *stream) {
    emu_work &work = stream->queue.front();
    if (work.task.kernel)
        emu_run(work.task.kernel.get(),
                stream->queue.size() > 1 ? stream->queue[1].task.kernel.get() : nullptr);
    if (work.task.run)
        work.task.run();
    if (work.mark) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        work.mark->time = (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
        work.mark->done = true;
    }
    stream->queue.pop_front();
    if (stream->destroyed && stream->queue.empty()) {
        cuda.streams.erase(std::find(cuda.streams.begin(), cuda.streams.end(), stream));
        delete stream;
    }
}

/* A stream that can go on; null: all are empty. */
static CUstream_st *emu_any_stream(void) {
    std::vector<CUstream_st *> ready;
    std::copy_if(cuda.streams.begin(), cuda.streams.end(), std::back_inserter(ready), emu_ready);
    return ready.empty() ? nullptr : ready[emu_random((uint32_t)ready.size())];
}

/* Goes on until the moment has come; half of the time with only what it needs. */
static void emu_until(const emu_moment *moment) {
    bool late = emu_random(2);
    while (!moment->done) {
        CUstream_st *stream = late ? moment->stream : emu_any_stream();
        while (!emu_ready(stream))
            stream = stream->queue.front().wait->stream;
        emu_step(stream);
    }
}

static std::shared_ptr<emu_moment> emu_mark(CUstream_st *stream) { /* behind all that is queued */
    stream->queue.emplace_back();
    stream->queue.back().mark = std::make_shared<emu_moment>(emu_moment{stream});
    return stream->queue.back().mark;
}

static void emu_finish(CUstream_st *stream) {
    emu_until(emu_mark(stream).get());
}

static void emu_finish_device(int device) {
    std::vector<std::shared_ptr<emu_moment>> moments;
    for (CUstream_st *stream : cuda.streams)
        if (stream->device == device && !stream->queue.empty())
            moments.push_back(emu_mark(stream));
    for (const auto &moment : moments)
        emu_until(moment.get());
}

static void emu_poll(void) {
    for (uint32_t n = emu_random(4); n > 0; n--)
        if (CUstream_st *stream = emu_any_stream())
            emu_step(stream);
}

static void emu_enqueue(CUstream_st *stream, const emu_task &task) {
    if (stream->graph)
        stream->graph->tasks.push_back(task);
    else
        stream->queue.push_back({nullptr, nullptr, task});
}

/* ---- streams and events ---- */

/* Null stands for stream 0 of the current device, as an answer for: there is no such stream. */
static CUstream_st *emu_stream(cudaStream_t stream) {
    if (!stream)
        return cuda.zero[(size_t)emu_thread.device].get();
    for (CUstream_st *known : cuda.streams)
        if (known == stream && !known->destroyed)
            return known;
    return nullptr;
}

/* Calls that have effects beyond a stream fail while their thread records one, and spoil that. */
static bool emu_allowed_in_capture(void) {
    bool allowed = true;
    for (CUstream_st *stream : cuda.streams)
        if (stream->graph && pthread_equal(stream->graph->thread, pthread_self())) {
            stream->graph->invalid = true;
            allowed = false;
        }
    return allowed;
}

/* What has been recorded has not been launched: it cannot be waited for. */
static cudaError_t emu_not_recorded(CUstream_st *stream) {
    if (!stream)
        return cudaErrorInvalidResourceHandle;
    if (!stream->graph)
        return cudaSuccess;
    stream->graph->invalid = true;
    return cudaErrorStreamCaptureUnsupported;
}

cudaError_t cudaDeviceSynchronize(void) {
    EMU_CALL(__func__)
    EMU_CHECK(emu_allowed_in_capture(), cudaErrorStreamCaptureUnsupported)
    emu_finish_device(emu_thread.device);
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    EMU_CALL(__func__)
    (void)priority;
    EMU_CHECK(flags <= cudaStreamNonBlocking, cudaErrorInvalidValue)
    *stream = new CUstream_st{emu_thread.device};
    cuda.streams.push_back(*stream);
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) { /* its work is done all the same */
    EMU_CALL(__func__)
    EMU_CHECK(stream && emu_stream(stream), cudaErrorInvalidResourceHandle)
    stream->destroyed = true;
    stream->queue.emplace_back();
    if (stream->queue.size() == 1)
        emu_step(stream);
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    EMU_CALL(__func__)
    CUstream_st *s = emu_stream(stream);
    cudaError_t error = emu_not_recorded(s);
    EMU_CHECK(!error, error)
    emu_finish(s);
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    EMU_CALL(__func__)
    EMU_CHECK(flags == cudaEventDefault || flags == cudaEventDisableTiming, cudaErrorInvalidValue)
    *event = new CUevent_st{emu_thread.device, flags == cudaEventDefault};
    return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    EMU_CALL(__func__)
    EMU_CHECK(event, cudaErrorInvalidResourceHandle)
    delete event;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    EMU_CALL(__func__)
    CUstream_st *s = emu_stream(stream);
    cudaError_t error = emu_not_recorded(s);
    EMU_CHECK(!error, error)
    EMU_CHECK(event && s->device == event->device, cudaErrorInvalidResourceHandle)
    event->moment = emu_mark(s);
    return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
    EMU_CALL(__func__)
    CUstream_st *s = emu_stream(stream);
    cudaError_t error = emu_not_recorded(s);
    EMU_CHECK(!error, error)
    EMU_CHECK(event, cudaErrorInvalidResourceHandle)
    EMU_CHECK(flags == 0, cudaErrorInvalidValue)
    if (event->moment)
        s->queue.push_back({event->moment, nullptr, {}});
    return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
    EMU_CALL(__func__)
    EMU_CHECK(event, cudaErrorInvalidResourceHandle)
    EMU_CHECK(emu_allowed_in_capture(), cudaErrorStreamCaptureUnsupported)
    emu_poll();
    return emu_result(!event->moment || event->moment->done ? cudaSuccess : cudaErrorNotReady);
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    EMU_CALL(__func__)
    EMU_CHECK(event, cudaErrorInvalidResourceHandle)
    if (event->moment)
        emu_until(event->moment.get());
    return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
    EMU_CALL(__func__)
    EMU_CHECK(start && start->timed && start->moment, cudaErrorInvalidResourceHandle)
    EMU_CHECK(end && end->timed && end->moment, cudaErrorInvalidResourceHandle)
    EMU_CHECK(start->moment->done && end->moment->done, cudaErrorNotReady)
    *milliseconds = (float)((end->moment->time - start->moment->time) * 1e3);
    return cudaSuccess;
}

/* ---- graphs ---- */

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
    EMU_CALL(__func__)
    CUstream_st *s = emu_stream(stream);
    EMU_CHECK(s, cudaErrorInvalidResourceHandle)
    EMU_CHECK(mode == cudaStreamCaptureModeThreadLocal, cudaErrorInvalidValue)
    EMU_CHECK(stream && !s->graph, cudaErrorStreamCaptureUnsupported)
    s->graph.reset(new CUgraph_st{pthread_self()});
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    EMU_CALL(__func__)
    *graph = nullptr;
    CUstream_st *s = emu_stream(stream);
    EMU_CHECK(s, cudaErrorInvalidResourceHandle)
    EMU_CHECK(s->graph, cudaErrorStreamCaptureUnmatched)
    std::unique_ptr<CUgraph_st> recorded = std::move(s->graph);
    EMU_CHECK(!recorded->invalid, cudaErrorStreamCaptureInvalidated)
    *graph = recorded.release();
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph,
                                 unsigned long long flags) {
    EMU_CALL(__func__)
    EMU_CHECK(graph && flags == 0, cudaErrorInvalidValue)
    *exec = new CUgraphExec_st{graph->tasks};
    return cudaSuccess;
}

/* Queues all of it, behind an empty work: its first kernel does not overlap what was before it. */
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
    EMU_CALL(__func__)
    CUstream_st *s = emu_stream(stream);
    EMU_CHECK(exec, cudaErrorInvalidValue)
    EMU_CHECK(s, cudaErrorInvalidResourceHandle)
    EMU_CHECK(!s->graph, cudaErrorStreamCaptureUnsupported)
    emu_enqueue(s, {});
    for (const emu_task &task : exec->tasks)
        emu_enqueue(s, task);
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    EMU_CALL(__func__)
    EMU_CHECK(graph, cudaErrorInvalidValue)
    delete graph;
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
    EMU_CALL(__func__)
    EMU_CHECK(exec, cudaErrorInvalidValue)
    delete exec;
    return cudaSuccess;
}

/* ---- memory ---- */

static cudaError_t emu_allocate(void **memory, size_t bytes, int place) {
    *memory = nullptr;
    if (!emu_allowed_in_capture())
        return cudaErrorStreamCaptureUnsupported;
    if (bytes == 0)
        return cudaSuccess;
    if (place >= 0 && bytes > cuda.memory_each - cuda.used[(size_t)place])
        return cudaErrorMemoryAllocation;
    if (posix_memalign(memory, 256, bytes) != 0)
        return cudaErrorMemoryAllocation;
    memset(*memory, EMU_GARBAGE, bytes);
    cuda.allocations[(uintptr_t)*memory] = {bytes, place};
    if (place >= 0)
        cuda.used[(size_t)place] += bytes;
    return cudaSuccess;
}

/* First the work is done that may use it. */
static cudaError_t emu_free(void *memory, bool pinned) {
    if (!memory)
        return cudaSuccess;
    auto found = cuda.allocations.find((uintptr_t)memory);
    if (found == cuda.allocations.end() || found->second.registered ||
        (found->second.place == EMU_PINNED) != pinned)
        return cudaErrorInvalidValue;
    if (!emu_allowed_in_capture())
        return cudaErrorStreamCaptureUnsupported;
    for (int device = 0; device < cuda.n_devices; device++)
        if (pinned || device == found->second.place)
            emu_finish_device(device);
    if (!pinned)
        cuda.used[(size_t)found->second.place] -= found->second.bytes;
    cuda.allocations.erase(found);
    free(memory);
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
    EMU_CALL(__func__)
    *total = cuda.memory_each;
    *free = cuda.memory_each - cuda.used[(size_t)emu_thread.device];
    return cudaSuccess;
}

cudaError_t cudaMalloc(void **memory, size_t bytes) {
    EMU_CALL(__func__)
    return emu_result(emu_allocate(memory, bytes, emu_thread.device));
}

cudaError_t cudaFree(void *memory) {
    EMU_CALL(__func__)
    return emu_result(emu_free(memory, false));
}

cudaError_t cudaHostAlloc(void **memory, size_t bytes, unsigned flags) {
    EMU_CALL(__func__)
    EMU_CHECK(flags <= cudaHostAllocPortable, cudaErrorInvalidValue)
    return emu_result(emu_allocate(memory, bytes, EMU_PINNED));
}

cudaError_t cudaFreeHost(void *memory) {
    EMU_CALL(__func__)
    return emu_result(emu_free(memory, true));
}

/* Pins memory of the caller's: whole pages, which no other registered memory may share. */
cudaError_t cudaHostRegister(void *memory, size_t bytes, unsigned flags) {
    EMU_CALL(__func__)
    EMU_CHECK(memory && bytes > 0 && flags <= cudaHostRegisterPortable, cudaErrorInvalidValue)
    EMU_CHECK(emu_allowed_in_capture(), cudaErrorStreamCaptureUnsupported)
    uintptr_t begin = (uintptr_t)memory, end = begin + bytes;
    for (const auto &[first, allocation] : cuda.allocations) {
        uintptr_t last = first + allocation.bytes - 1;
        EMU_CHECK(end <= first || begin > last || allocation.registered, cudaErrorInvalidValue)
        EMU_CHECK((end - 1) / EMU_PAGE < first / EMU_PAGE || begin / EMU_PAGE > last / EMU_PAGE ||
                      !allocation.registered,
                  cudaErrorHostMemoryAlreadyRegistered)
    }
    cuda.allocations[begin] = {bytes, EMU_PINNED, true};
    return cudaSuccess;
}

/* (copies that still need it fail when their turn comes) */
cudaError_t cudaHostUnregister(void *memory) {
    EMU_CALL(__func__)
    auto found = cuda.allocations.find((uintptr_t)memory);
    EMU_CHECK(found != cuda.allocations.end() && found->second.registered,
              cudaErrorHostMemoryNotRegistered)
    EMU_CHECK(emu_allowed_in_capture(), cudaErrorStreamCaptureUnsupported)
    cuda.allocations.erase(found);
    return cudaSuccess;
}

/* Where the bytes lie: a device, EMU_PINNED or EMU_PAGEABLE; EMU_INVALID: partly outside. */
static int emu_place(const void *memory, size_t bytes) {
    uintptr_t begin = (uintptr_t)memory, end = begin + bytes;
    auto next = cuda.allocations.lower_bound(end);
    if (next == cuda.allocations.begin())
        return EMU_PAGEABLE;
    const auto &[first, allocation] = *--next;
    if (begin >= first + allocation.bytes)
        return EMU_PAGEABLE;
    bool inside = begin >= first && end <= first + allocation.bytes;
    return inside ? allocation.place : EMU_INVALID;
}

struct emu_copy {
    char *to;
    size_t to_pitch;
    const char *from;
    size_t from_pitch, width, height;
};

static int emu_target(const emu_copy &copy) {
    return emu_place(copy.to, (copy.height - 1) * copy.to_pitch + copy.width);
}

static int emu_source(const emu_copy &copy) {
    return emu_place(copy.from, (copy.height - 1) * copy.from_pitch + copy.width);
}

static void emu_do_copy(const emu_copy &copy) {
    for (size_t row = 0; row < copy.height; row++)
        memcpy(copy.to + row * copy.to_pitch, copy.from + row * copy.from_pitch, copy.width);
}

static cudaError_t emu_check_copy(const emu_copy &copy, cudaMemcpyKind kind) {
    if (kind < cudaMemcpyHostToHost || kind > cudaMemcpyDefault)
        return cudaErrorInvalidMemcpyDirection;
    if (copy.width > copy.to_pitch || copy.width > copy.from_pitch)
        return cudaErrorInvalidPitchValue;
    if (copy.width == 0 || copy.height == 0)
        return cudaSuccess;
    int target = emu_target(copy), source = emu_source(copy);
    bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    if (!copy.to || !copy.from || target == EMU_INVALID || source == EMU_INVALID)
        return cudaErrorInvalidValue;
    if (kind != cudaMemcpyDefault && (to_device != (target >= 0) || from_device != (source >= 0)))
        return cudaErrorInvalidValue;
    return cudaSuccess;
}

/* Pageable memory is read at once, and written before the call returns; pinned memory is read and
 * written when the copy's turn comes. */
static cudaError_t emu_copy_async(emu_copy copy, cudaMemcpyKind kind, CUstream_st *stream) {
    if (!stream)
        return cudaErrorInvalidResourceHandle;
    cudaError_t error = emu_check_copy(copy, kind);
    if (error || copy.width == 0 || copy.height == 0)
        return error;
    int target = emu_target(copy), source = emu_source(copy);
    auto staged = std::make_shared<std::vector<char>>();
    if (source == EMU_PAGEABLE && !stream->graph) {
        staged->resize(copy.width * copy.height);
        emu_do_copy(
            {staged->data(), copy.width, copy.from, copy.from_pitch, copy.width, copy.height});
        copy.from = staged->data();
        copy.from_pitch = copy.width;
    }
    emu_enqueue(stream, {nullptr, [=] {
                             if (emu_target(copy) != target ||
                                 (staged->empty() && emu_source(copy) != source))
                                 emu_report("a copy runs after its memory was freed");
                             emu_do_copy(copy);
                         }});
    if (target == EMU_PAGEABLE && !stream->graph)
        emu_finish(stream);
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
    EMU_CALL(__func__)
    emu_copy copy = {(char *)to, bytes, (const char *)from, bytes, bytes, 1};
    return emu_result(emu_copy_async(copy, kind, emu_stream(stream)));
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
    EMU_CALL(__func__)
    EMU_CHECK(emu_allowed_in_capture(), cudaErrorStreamCaptureUnsupported)
    emu_copy copy = {(char *)to, bytes, (const char *)from, bytes, bytes, 1};
    cudaError_t error = emu_copy_async(copy, kind, emu_stream(nullptr));
    emu_finish(emu_stream(nullptr));
    return emu_result(error);
}

cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch,
                              size_t width, size_t height, cudaMemcpyKind kind,
                              cudaStream_t stream) {
    EMU_CALL(__func__)
    emu_copy copy = {(char *)to, to_pitch, (const char *)from, from_pitch, width, height};
    return emu_result(emu_copy_async(copy, kind, emu_stream(stream)));
}

cudaError_t cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device,
                                size_t bytes, cudaStream_t stream) {
    EMU_CALL(__func__)
    EMU_CHECK(emu_is_device(to_device) && emu_is_device(from_device), cudaErrorInvalidDevice)
    EMU_CHECK(bytes == 0 || emu_place(to, bytes) == to_device, cudaErrorInvalidValue)
    EMU_CHECK(bytes == 0 || emu_place(from, bytes) == from_device, cudaErrorInvalidValue)
    emu_copy copy = {(char *)to, bytes, (const char *)from, bytes, bytes, 1};
    return emu_result(emu_copy_async(copy, cudaMemcpyDeviceToDevice, emu_stream(stream)));
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream) {
    EMU_CALL(__func__)
    CUstream_st *s = emu_stream(stream);
    EMU_CHECK(s, cudaErrorInvalidResourceHandle)
    int place = emu_place(to, bytes);
    EMU_CHECK(bytes == 0 || place >= EMU_PINNED, cudaErrorInvalidValue)
    emu_enqueue(s, {nullptr, [=] {
                        if (bytes > 0 && emu_place(to, bytes) != place)
                            emu_report("a memset runs after its memory was freed");
                        memset(to, value, bytes);
                    }});
    return cudaSuccess;
}

/* ---- launches ---- */

template <typename T>
static cudaError_t cudaFuncSetAttribute(T *kernel, cudaFuncAttribute attribute, int value) {
    EMU_CALL(__func__)
    EMU_CHECK(attribute == cudaFuncAttributeMaxDynamicSharedMemorySize, cudaErrorInvalidValue)
    EMU_CHECK(value >= 0 && value <= EMU_SHARED_LIMIT, cudaErrorInvalidValue)
    cuda.shared_limits[{emu_thread.device, reinterpret_cast<const void *>(kernel)}] = value;
    return cudaSuccess;
}

/* Names the kernel that this host thread launches next, for reports. */
void emu_next_kernel(const char *name) {
    emu_thread.next_kernel = name;
}

static bool emu_grid_fits(const dim3 &grid, const dim3 &block) {
    return grid.x > 0 && grid.y > 0 && grid.z > 0 && block.x > 0 && block.y > 0 && block.z > 0 &&
           grid.x <= 0x7FFFFFFF && grid.y <= 0xFFFF && grid.z <= 0xFFFF && block.z <= 64 &&
           (uint64_t)block.x * block.y * block.z <= EMU_MAX_THREADS;
}

cudaError_t emu_launch(const cudaLaunchConfig_t *config, const void *kernel,
                       std::function<void()> body) {
    const char *name = std::exchange(emu_thread.next_kernel, nullptr);
    EMU_CALL("cudaLaunchKernelEx")
    CUstream_st *stream = emu_stream(config->stream);
    EMU_CHECK(stream && stream->device == emu_thread.device, cudaErrorInvalidResourceHandle)
    EMU_CHECK(emu_grid_fits(config->gridDim, config->blockDim), cudaErrorInvalidConfiguration)
    auto limit = cuda.shared_limits.find({emu_thread.device, kernel});
    int shared_limit = limit == cuda.shared_limits.end() ? EMU_SHARED_DEFAULT : limit->second;
    EMU_CHECK(config->dynamicSmemBytes <= (size_t)shared_limit, cudaErrorInvalidValue)
    bool programmatic = false;
    for (unsigned i = 0; i < config->numAttrs; i++) {
        EMU_CHECK(config->attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization,
                  cudaErrorInvalidValue)
        programmatic = config->attrs[i].val.programmaticStreamSerializationAllowed;
    }
    emu_kernel launch = {name ? name : "a kernel without a name",
                         body,
                         config->gridDim,
                         config->blockDim,
                         config->dynamicSmemBytes,
                         programmatic};
    emu_enqueue(stream, {std::make_shared<const emu_kernel>(launch), nullptr});
    return cudaSuccess;
}

template <typename... P, typename... A>
static cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(P...),
                                      A &&...arguments) {
    std::tuple<std::decay_t<P>...> copies(std::forward<A>(arguments)...);
    return emu_launch(config, reinterpret_cast<const void *>(kernel),
                      [kernel, copies] { std::apply(kernel, copies); });
}

/* ---- controls ---- */

/* So many devices, and nothing allocated or queued on them. */
void emu_devices(int n, size_t memory_each, int multiprocessors) {
    std::lock_guard<std::mutex> lock(emu.mutex);
    for (int device = 0; device < cuda.n_devices; device++)
        emu_finish_device(device);
    for (size_t i = cuda.zero.size(); i < cuda.streams.size(); i++)
        delete cuda.streams[i];
    for (auto &allocation : cuda.allocations)
        if (!allocation.second.registered)
            free((void *)allocation.first);
    cuda = {};
    cuda.n_devices = n;
    cuda.multiprocessors = multiprocessors;
    cuda.memory_each = memory_each;
    cuda.used.assign((size_t)n, 0);
    for (int device = 0; device < n; device++) {
        cuda.zero.emplace_back(new CUstream_st{device});
        cuda.streams.push_back(cuda.zero.back().get());
    }
    emu_thread.device = 0;
}

[[maybe_unused]] static const bool emu_four_devices = (emu_devices(4, (size_t)256 << 20, 4), true);

/* The call fails once, after so many good ones. */
void emu_fail(const char *call, int after) {
    std::lock_guard<std::mutex> lock(emu.mutex);
    cuda.failures[call] = after;
}
#endif /* CUDA_EMU_H */
