/* cuda_emu.h: CUDA on the CPU, so that every kernel can be tested, checked and stepped through
 * without a GPU. g++ compiles the very same source that nvcc compiles for the GPU.
 *
 *     #ifdef CUDA_EMULATED
 *     #define CUDA_EMU_IMPLEMENTATION
 *     #include "test/cuda_emu.h"
 *     #else
 *     #include <cuda_runtime.h>            // and the wrappers of inline PTX, see below
 *     #endif
 *     __global__ void add_kernel(float *x, float y, int n) {
 *         int i = blockIdx.x * blockDim.x + threadIdx.x;
 *         if (i < n)
 *             x[i] += y;
 *     }
 *     ...
 *     emu_next_kernel("add_kernel");
 *     cudaLaunchKernelEx(&config, add_kernel, x, 1.0f, n);
 *     cudaStreamSynchronize(stream);
 *
 * g++ -x c++ -std=gnu++17 -g -DCUDA_EMULATED kernels.cu, then in gdb:
 *     break add_kernel if blockIdx.x == 2 && threadIdx.x == 7
 *     print threadIdx
 *     call emu_where()                     // what each thread of this block waits for
 *
 * What it promises. Where CUDA leaves an order open, it takes a different one each time, drawn from
 * emu_seed, and where CUDA leaves a value undefined, it puts NaNs: what is missing in a program
 * then shows as a wrong result, here rather than on the GPU.
 *   - The threads of a block run in random order, each until it must wait (__syncthreads, shuffles,
 *     mma); blocks run one after another in random order. A kernel in which a block waits for
 *     another block never ends.
 *   - Shared memory has exactly the size asked for, is filled with NaNs, and ends at a guard page.
 *   - copy_async16 writes when it is waited for, and its target holds NaNs until then.
 *   - Work on streams is late: it is done when somebody synchronizes or polls, and then in any
 * order that streams and events allow. Stream 0 is a stream like others, and orders nothing else.
 *   - Memory is malloc'ed and filled with NaNs; AddressSanitizer sees every access, also in
 * kernels.
 *   - Calls fail as on a GPU: limits of a launch, memory of the device, pointers of copies,
 * capture. What a GPU would answer with a hang or with garbage ends the program with one line that
 * names the kernel, the block and the thread: a barrier that some threads do not reach, a warp
 * operation without all its lanes, a misaligned vector, shared memory out of bounds.
 *
 * It does not tell what is fast, nor does it run blocks at the same time.
 * One lock guards it all: host threads may call it together, kernels run one by one. */
#ifndef CUDA_EMU_H
#define CUDA_EMU_H
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <functional>
#include <tuple>
#include <type_traits>

/* ---- controls ---- */

void emu_seed(uint64_t seed); /* of all random orders to come */
/* So many devices, and nothing allocated or queued on them. */
void emu_devices(int n, size_t memory_each, int multiprocessors);
void emu_fail(const char *call, int after); /* the call fails once, after so many good ones */
long emu_launches(void);                    /* kernels run so far */
void emu_next_kernel(const char *name); /* names the kernel that this host thread launches next */
extern "C" void emu_where(void);        /* for gdb, inside a kernel */

/* ---- types and built-in variables ---- */

#define __global__ __attribute__((noinline))
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n)               __attribute__((aligned(n)))
#define DYNAMIC_SHARED(type, name) type *name = static_cast<type *>(emu_shared())

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

#define EMU_VECTOR2(name, type, bytes)                                                             \
    struct alignas(bytes) name {                                                                   \
        type x, y;                                                                                 \
    };                                                                                             \
    static inline name make_##name(type x, type y) {                                               \
        return {x, y};                                                                             \
    }
#define EMU_VECTOR4(name, type, bytes)                                                             \
    struct alignas(bytes) name {                                                                   \
        type x, y, z, w;                                                                           \
    };                                                                                             \
    static inline name make_##name(type x, type y, type z, type w) {                               \
        return {x, y, z, w};                                                                       \
    }
EMU_VECTOR2(int2, int, 8)
EMU_VECTOR2(uint2, unsigned, 8)
EMU_VECTOR2(float2, float, 8)
EMU_VECTOR4(int4, int, 16)
EMU_VECTOR4(uint4, unsigned, 16)
EMU_VECTOR4(float4, float, 16)

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

/* ---- rendezvous ---- */

enum emu_op {
    EMU_NONE,
    EMU_SYNCTHREADS,
    EMU_SYNCWARP,
    EMU_SHFL,
    EMU_SHFL_XOR,
    EMU_SHFL_DOWN,
    EMU_SHFL_UP,
    EMU_BALLOT,
    EMU_ANY,
    EMU_ALL,
    EMU_MMA
};

void *emu_shared(void);
int emu_lane(void);
/* Waits for the lanes of the mask, and returns what the operation gives this lane. */
uint64_t emu_warp_op(emu_op op, uint32_t mask, uint64_t value, int source);
void emu_misaligned(const void *p, int bytes, const char *call);

void __syncthreads(void);

static inline void __syncwarp(uint32_t mask = 0xFFFFFFFF) {
    emu_warp_op(EMU_SYNCWARP, mask, 0, 0);
}

static inline uint32_t __ballot_sync(uint32_t mask, int predicate) {
    return (uint32_t)emu_warp_op(EMU_BALLOT, mask, predicate != 0, 0);
}

static inline int __any_sync(uint32_t mask, int predicate) {
    return (int)emu_warp_op(EMU_ANY, mask, predicate != 0, 0);
}

static inline int __all_sync(uint32_t mask, int predicate) {
    return (int)emu_warp_op(EMU_ALL, mask, predicate != 0, 0);
}

template <typename T> static inline T emu_shuffle(emu_op op, uint32_t mask, T value, int source) {
    static_assert(sizeof value == 4 || sizeof value == 8, "shuffles move 4 or 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = emu_warp_op(op, mask, bits, source);
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* A lane that would read beyond its group of `width` lanes keeps its own value. */
template <typename T>
static inline T __shfl_sync(uint32_t mask, T value, int source, int width = 32) {
    int first = emu_lane() & -width;
    return emu_shuffle(EMU_SHFL, mask, value, first + (source & (width - 1)));
}

template <typename T>
static inline T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32) {
    int lane = emu_lane(), source = lane ^ bits, last = lane | (width - 1);
    return emu_shuffle(EMU_SHFL_XOR, mask, value, source <= last ? source : lane);
}

template <typename T>
static inline T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32) {
    int lane = emu_lane(), source = lane + (int)delta, last = lane | (width - 1);
    return emu_shuffle(EMU_SHFL_DOWN, mask, value, source <= last ? source : lane);
}

template <typename T>
static inline T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32) {
    int lane = emu_lane(), source = lane - (int)delta, first = lane & -width;
    return emu_shuffle(EMU_SHFL_UP, mask, value, source >= first ? source : lane);
}

/* ---- functions of one thread ---- */

static inline int __popc(uint32_t x) {
    return __builtin_popcount(x);
}

static inline int __clz(int x) {
    return x ? __builtin_clz((unsigned)x) : 32;
}

static inline int __ffs(int x) {
    return __builtin_ffs(x);
}

static inline uint32_t __brev(uint32_t x) {
    x = x >> 16 | x << 16;
    x = (x >> 8 & 0x00FF00FF) | (x & 0x00FF00FF) << 8;
    x = (x >> 4 & 0x0F0F0F0F) | (x & 0x0F0F0F0F) << 4;
    x = (x >> 2 & 0x33333333) | (x & 0x33333333) << 2;
    return (x >> 1 & 0x55555555) | (x & 0x55555555) << 1;
}

static inline uint32_t __umulhi(uint32_t x, uint32_t y) {
    return (uint32_t)((uint64_t)x * y >> 32);
}

static inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
    uint64_t bytes = (uint64_t)y << 32 | x;
    uint32_t result = 0;
    for (int i = 0; i < 4; i++)
        result |= (uint32_t)(bytes >> (selector >> 4 * i & 7) * 8 & 0xFF) << 8 * i;
    return result;
}

template <typename To, typename From> static inline To emu_bits(From value) {
    To result;
    static_assert(sizeof result == sizeof value, "the same bits");
    memcpy(&result, &value, sizeof result);
    return result;
}

static inline float __int_as_float(int x) {
    return emu_bits<float>(x);
}

static inline float __uint_as_float(uint32_t x) {
    return emu_bits<float>(x);
}

static inline int __float_as_int(float x) {
    return emu_bits<int>(x);
}

static inline uint32_t __float_as_uint(float x) {
    return emu_bits<uint32_t>(x);
}

#define __expf(x) expf(x) /* macros, because math.h declares functions of these names */
#define __logf(x) logf(x)
#define rsqrtf(x) (1.0f / sqrtf(x))

static inline float __fmaf_rn(float x, float y, float z) {
    return fmaf(x, y, z);
}

static inline float __frcp_rn(float x) {
    return 1.0f / x;
}

template <typename T> static inline T __ldg(const T *p) {
    return *p;
}

static inline void __threadfence(void) {}

/* Atomics: only one thread runs at a time. The builtins are for ThreadSanitizer. */
template <typename T, typename Change> static inline T emu_atomic(T *p, Change change) {
    T old, changed;
    __atomic_load(p, &old, __ATOMIC_RELAXED);
    changed = change(old);
    __atomic_store(p, &changed, __ATOMIC_RELAXED);
    return old;
}

#define EMU_ATOMIC(name, type, change)                                                             \
    static inline type name(type *p, type value) {                                                 \
        return emu_atomic(p, [=](type old) { return change; });                                    \
    }
#define EMU_ATOMICS(type)                                                                          \
    EMU_ATOMIC(atomicMax, type, old > value ? old : value)                                         \
    EMU_ATOMIC(atomicMin, type, old < value ? old : value)                                         \
    EMU_ATOMIC(atomicExch, type, ((void)old, value))                                               \
    static inline type atomicCAS(type *p, type compare, type value) {                              \
        return emu_atomic(p, [=](type old) { return old == compare ? value : old; });              \
    }
EMU_ATOMICS(int)
EMU_ATOMICS(unsigned)
EMU_ATOMICS(unsigned long long)
EMU_ATOMIC(atomicAdd, int, (int)((unsigned)old + (unsigned)value))
EMU_ATOMIC(atomicAdd, unsigned, old + value)
EMU_ATOMIC(atomicAdd, unsigned long long, old + value)
EMU_ATOMIC(atomicAdd, float, old + value)

/* ---- what kernels.cu has as inline PTX ---- */

/* c += a b of a warp: (16, 16) x (16, 8) bf16, in the fragments of mma.m16n8k16.row.col. Each
 * output is summed in f32 over k = 0..15, from c on. */
void mma_bf16(float c[4], const uint32_t a[4], const uint32_t b[2]);
/* cp.async: 16 bytes, or zeros, that land when this thread waits for their group. */
void copy_async16(void *shared, const void *global, bool valid);
void copy_async_commit(void);
void emu_copy_async_wait(int newest);
void grid_wait(void);

template <int N> static inline void copy_async_wait(void) {
    emu_copy_async_wait(N);
}

static inline void grid_launch_dependents(void) {}

static inline uint32_t emu_bf16(float x) {
    uint32_t bits = __float_as_uint(x);
    return x != x ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

static inline uint32_t pack_bf16(float low, float high) {
    return emu_bf16(low) | emu_bf16(high) << 16;
}

static inline float half_to_float(uint16_t bits) {
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16, magnitude = bits & 0x7FFF;
    if (magnitude >= 0x7C00) /* infinity, NaN */
        return __uint_as_float(sign | 0x7F800000 | magnitude << 13);
    float value = __uint_as_float(magnitude << 13) * 0x1p112f; /* the exponent's new bias */
    return sign ? -value : value;
}

template <typename T> static inline T emu_load(const void *p, const char *call) {
    T value;
    if ((uintptr_t)p % sizeof value)
        emu_misaligned(p, sizeof value, call);
    memcpy(&value, p, sizeof value);
    return value;
}

template <typename T> static inline void emu_store(void *p, T value, const char *call) {
    if ((uintptr_t)p % sizeof value)
        emu_misaligned(p, sizeof value, call);
    memcpy(p, &value, sizeof value);
}

static inline uint4 load16(const void *p) {
    return emu_load<uint4>(p, "load16");
}

static inline uint2 load8(const void *p) {
    return emu_load<uint2>(p, "load8");
}

static inline float4 load16f(const void *p) {
    return emu_load<float4>(p, "load16f");
}

static inline void store16(void *p, uint4 value) {
    emu_store(p, value, "store16");
}

static inline void store8(void *p, uint2 value) {
    emu_store(p, value, "store8");
}

static inline void store16f(void *p, float4 value) {
    emu_store(p, value, "store16f");
}

/* ---- the runtime: names, values and meanings are CUDA's ---- */

#define EMU_ERRORS(X)                                                                              \
    X(cudaSuccess, 0, "no error")                                                                  \
    X(cudaErrorInvalidValue, 1, "invalid argument")                                                \
    X(cudaErrorMemoryAllocation, 2, "out of memory")                                               \
    X(cudaErrorInvalidConfiguration, 9, "invalid configuration argument")                          \
    X(cudaErrorInvalidMemcpyDirection, 21, "invalid copy direction for memcpy")                    \
    X(cudaErrorNoDevice, 100, "no CUDA-capable device is detected")                                \
    X(cudaErrorInvalidDevice, 101, "invalid device ordinal")                                       \
    X(cudaErrorInvalidResourceHandle, 400, "invalid resource handle")                              \
    X(cudaErrorNotReady, 600, "device not ready")                                                  \
    X(cudaErrorIllegalAddress, 700, "an illegal memory access was encountered")                    \
    X(cudaErrorPeerAccessAlreadyEnabled, 704, "peer access is already enabled")                    \
    X(cudaErrorLaunchFailure, 719, "unspecified launch failure")                                   \
    X(cudaErrorNotSupported, 801, "operation not supported")                                       \
    X(cudaErrorStreamCaptureUnsupported, 900, "operation not permitted when stream is capturing")  \
    X(cudaErrorStreamCaptureInvalidated, 901,                                                      \
      "operation failed due to a previous error during capture")                                   \
    X(cudaErrorStreamCaptureMerge, 902,                                                            \
      "operation would result in a merge of separate capture "                                     \
      "sequences")                                                                                 \
    X(cudaErrorStreamCaptureUnmatched, 903,                                                        \
      "capture was not ended in the same stream as it began")                                      \
    X(cudaErrorStreamCaptureUnjoined, 904, "capturing stream has unjoined work")                   \
    X(cudaErrorStreamCaptureIsolation, 905,                                                        \
      "dependency created on uncaptured work in another stream")                                   \
    X(cudaErrorCapturedEvent, 907,                                                                 \
      "operation not permitted on an event last recorded in a "                                    \
      "capturing stream")                                                                          \
    X(cudaErrorUnknown, 999, "unknown error")

enum cudaError_t {
#define EMU_ERROR(name, value, text) name = value,
    EMU_ERRORS(EMU_ERROR)
#undef EMU_ERROR
};

enum cudaMemcpyKind {
    cudaMemcpyHostToHost,
    cudaMemcpyHostToDevice,
    cudaMemcpyDeviceToHost,
    cudaMemcpyDeviceToDevice,
    cudaMemcpyDefault
};

enum cudaDeviceAttr {
    cudaDevAttrMaxThreadsPerBlock = 1,
    cudaDevAttrMaxSharedMemoryPerBlock = 8,
    cudaDevAttrWarpSize = 10,
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrL2CacheSize = 38,
    cudaDevAttrAsyncEngineCount = 40,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};

enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
    cudaFuncAttributePreferredSharedMemoryCarveout = 9
};

enum cudaStreamCaptureMode {
    cudaStreamCaptureModeGlobal,
    cudaStreamCaptureModeThreadLocal,
    cudaStreamCaptureModeRelaxed
};

enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };

enum {
    cudaStreamDefault = 0,
    cudaStreamNonBlocking = 1,
    cudaEventDefault = 0,
    cudaEventBlockingSync = 1,
    cudaEventDisableTiming = 2,
    cudaHostAllocDefault = 0,
    cudaHostAllocPortable = 1,
    cudaHostAllocMapped = 2,
    cudaHostAllocWriteCombined = 4
};

typedef struct CUstream_st *cudaStream_t;
typedef struct CUevent_st *cudaEvent_t;
typedef struct CUgraph_st *cudaGraph_t;
typedef struct CUgraphExec_st *cudaGraphExec_t;
typedef struct CUgraphNode_st *cudaGraphNode_t;

struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin;
    int warpSize, maxThreadsPerBlock, major, minor, multiProcessorCount;
    int asyncEngineCount, l2CacheSize;
};

union cudaLaunchAttributeValue {
    int programmaticStreamSerializationAllowed;
};

struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    cudaLaunchAttributeValue val;
};

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute *attrs;
    unsigned numAttrs;
};

const char *cudaGetErrorName(cudaError_t error);
const char *cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError(void); /* of this host thread; forgets it */
cudaError_t cudaPeekAtLastError(void);
cudaError_t cudaDriverGetVersion(int *version);
cudaError_t cudaRuntimeGetVersion(int *version);

cudaError_t cudaGetDeviceCount(int *count);
cudaError_t cudaSetDevice(int device); /* of this host thread */
cudaError_t cudaGetDevice(int *device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int device);
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device);
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest);
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer);
cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags);
cudaError_t cudaDeviceSynchronize(void);

cudaError_t cudaMemGetInfo(size_t *free, size_t *total);
cudaError_t cudaMalloc(void **memory, size_t bytes);
cudaError_t cudaFree(void *memory);
cudaError_t cudaHostAlloc(void **memory, size_t bytes, unsigned flags);
cudaError_t cudaFreeHost(void *memory);
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream = nullptr);
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch,
                              size_t width, size_t height, cudaMemcpyKind kind,
                              cudaStream_t stream = nullptr);
cudaError_t cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device,
                                size_t bytes, cudaStream_t stream = nullptr);
cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream = nullptr);

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamQuery(cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags = 0);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream = nullptr);
cudaError_t cudaEventQuery(cudaEvent_t event);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end);

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph);
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *n_nodes);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph,
                                 unsigned long long flags = 0);
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec);

cudaError_t emu_launch(const cudaLaunchConfig_t *config, const void *kernel,
                       std::function<void()> body);
cudaError_t emu_set_attribute(const void *kernel, cudaFuncAttribute attribute, int value);

template <typename T> static inline cudaError_t cudaMalloc(T **memory, size_t bytes) {
    return cudaMalloc(reinterpret_cast<void **>(memory), bytes);
}

template <typename T>
static inline cudaError_t cudaHostAlloc(T **memory, size_t bytes, unsigned flags) {
    return cudaHostAlloc(reinterpret_cast<void **>(memory), bytes, flags);
}

template <typename T>
static inline cudaError_t cudaMallocHost(T **memory, size_t bytes, unsigned flags = 0) {
    return cudaHostAlloc(reinterpret_cast<void **>(memory), bytes, flags);
}

template <typename T>
static inline cudaError_t cudaFuncSetAttribute(T *kernel, cudaFuncAttribute attribute, int value) {
    return emu_set_attribute(reinterpret_cast<const void *>(kernel), attribute, value);
}

template <typename... P, typename... A>
static inline cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(P...),
                                             A &&...arguments) {
    std::tuple<std::decay_t<P>...> copies(std::forward<A>(arguments)...);
    return emu_launch(config, reinterpret_cast<const void *>(kernel),
                      [kernel, copies] { std::apply(kernel, copies); });
}
#endif /* CUDA_EMU_H */
#ifdef CUDA_EMU_IMPLEMENTATION
#undef CUDA_EMU_IMPLEMENTATION
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMU_ASAN(...) __VA_ARGS__
#else
#define EMU_ASAN(...)
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define EMU_TSAN(...) __VA_ARGS__
#else
#define EMU_TSAN(...)
#endif
#if !defined(__x86_64__)
#define EMU_UCONTEXT
#endif
#ifdef EMU_UCONTEXT
#include <ucontext.h>
#endif

enum {
    EMU_WARP = 32,
    EMU_MAX_THREADS = 1024,
    EMU_SHARED_DEFAULT = 48 << 10, /* bytes that every kernel may have */
    EMU_SHARED_LIMIT = 227 << 10,  /* ... and with cudaFuncSetAttribute (compute capability 9.0) */
    EMU_SHARED_ALIGN = 128,
    EMU_ARENA = 232 << 10, /* room for it in whole pages, with a page before and behind */
    EMU_PAGE = 4096,
    EMU_STACK = EMU_ASAN(4 *) EMU_TSAN(4 *) 64 << 10, /* sanitizers make frames larger */
    EMU_SIGNAL_STACK = 64 << 10,
    EMU_GARBAGE = 0xFF /* a byte of a NaN, in f32 and in bf16; -1 in int */
};

static const char *const emu_op_names[] = {"nothing",        "__syncthreads",   "__syncwarp",
                                           "__shfl_sync",    "__shfl_xor_sync", "__shfl_down_sync",
                                           "__shfl_up_sync", "__ballot_sync",   "__any_sync",
                                           "__all_sync",     "mma_bf16"};

/* ---- a block and its threads ---- */

struct emu_async_copy {
    void *to;
    const void *from; /* null: zeros */
    int group;
};

struct emu_lane_state { /* what a lane brought to a warp operation, and what it gets */
    emu_op op;
    uint32_t mask;
    int source;
    uint64_t value, result;
    float *c; /* of mma_bf16 */
    const uint32_t *a, *b;
};

struct emu_warp { /* masks of lanes; each is in one of the three, or has returned */
    uint32_t runnable, at_op, at_barrier;
    emu_lane_state lanes[EMU_WARP];
};

/* A thread of a block; or the host thread that runs the block, while it does. */
struct emu_fiber {
#ifdef EMU_UCONTEXT
    ucontext_t context{};
#else
    void *sp; /* while another one runs */
#endif
    char *stack = nullptr;
    size_t stack_bytes = 0;
    uint3 index = {0, 0, 0};
    emu_warp *warp = nullptr;
    int lane = 0, n_groups = 0;
    std::vector<emu_async_copy> copies; /* not yet landed */
    void *fake_stack = nullptr;         /* of AddressSanitizer */
    void *tsan = nullptr;               /* of ThreadSanitizer */
};

struct emu_kernel {
    const char *name;
    std::function<void()> body;
    dim3 grid, block;
    size_t shared_bytes;
    bool programmatic;
};

static struct {
    std::recursive_mutex mutex; /* guards all there is here, and the runtime's state */
    uint64_t random = 1;
    const emu_kernel *kernel = nullptr; /* the one that runs */
    emu_fiber *current = nullptr, *previous = nullptr;
    emu_fiber host;
    std::vector<emu_fiber> fibers;
    emu_warp warps[EMU_MAX_THREADS / EMU_WARP];
    int n_threads, n_warps, n_at_barrier, n_returned;
    bool grid_waited;                         /* some thread of the block called grid_wait */
    char *arena = nullptr, *shared = nullptr; /* shared: the block's part of the arena */
    pthread_t host_thread;
    long launches = 0;
} emu;

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

static uint32_t emu_random(uint32_t limit) { /* splitmix64; < limit */
    uint64_t z = emu.random += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return (uint32_t)((z >> 32) * limit >> 32);
}

void emu_seed(uint64_t seed) {
    std::lock_guard<std::recursive_mutex> lock(emu.mutex);
    emu.random = seed;
}

/* ---- reports ---- */

static void emu_print_place(const char *before) {
    fprintf(stderr, "%scuda_emu: %s, block (%u, %u, %u), thread (%u, %u, %u): ", before,
            emu.kernel->name, blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y,
            threadIdx.z);
}

static void emu_print_waiting(void) { /* what the threads of the block wait for */
    int waiting[EMU_MMA + 1] = {0};
    int n_runnable = 0;
    waiting[EMU_SYNCTHREADS] = emu.n_at_barrier;
    for (int w = 0; w < emu.n_warps; w++) {
        n_runnable += __popc(emu.warps[w].runnable);
        for (int lane = 0; lane < EMU_WARP; lane++)
            if (emu.warps[w].at_op >> lane & 1)
                waiting[emu.warps[w].lanes[lane].op]++;
    }
    fprintf(stderr, "of %d threads", emu.n_threads);
    if (n_runnable)
        fprintf(stderr, ", %d can run", n_runnable);
    for (int op = EMU_SYNCTHREADS; op <= EMU_MMA; op++)
        if (waiting[op])
            fprintf(stderr, ", %d wait at %s", waiting[op], emu_op_names[op]);
    if (emu.n_returned)
        fprintf(stderr, ", %d returned", emu.n_returned);
    fprintf(stderr, "\n");
}

__attribute__((format(printf, 1, 2), noreturn)) static void emu_report(const char *format, ...) {
    va_list values;
    va_start(values, format);
    if (emu.current)
        emu_print_place("");
    else
        fprintf(stderr, "cuda_emu: ");
    vfprintf(stderr, format, values);
    va_end(values);
    fprintf(stderr, "\n");
    fflush(stderr);
    abort();
}

extern "C" void emu_where(void) {
    if (!emu.current) {
        fprintf(stderr, "cuda_emu: no kernel runs\n");
        return;
    }
    emu_print_place("");
    emu_print_waiting();
    for (int i = 0; i < emu.n_threads; i++) {
        const emu_fiber &f = emu.fibers[(size_t)i];
        uint32_t bit = 1u << f.lane;
        const char *state = &f == emu.current          ? "runs"
                            : f.warp->runnable & bit   ? "can run"
                            : f.warp->at_barrier & bit ? "waits at __syncthreads"
                            : !(f.warp->at_op & bit)   ? "returned"
                                                       : nullptr;
        fprintf(stderr, "  thread (%u, %u, %u) ", f.index.x, f.index.y, f.index.z);
        if (state)
            fprintf(stderr, "%s\n", state);
        else
            fprintf(stderr, "waits at %s\n", emu_op_names[f.warp->lanes[f.lane].op]);
    }
}

void emu_misaligned(const void *p, int bytes, const char *call) {
    emu_report("%s(%p): the address must be a multiple of %d", call, p, bytes);
}

#if defined(__SANITIZE_ADDRESS__)
extern "C" void __asan_on_error(void) {
    if (emu.current) {
        emu_print_place("\n");
        fprintf(stderr, "AddressSanitizer's report is about this thread\n");
    }
}
#else
/* A fault inside a kernel: on a stack of its own, since the fault may be an overflow of the stack.
 */
static void emu_fault(int signal_number, siginfo_t *info, void *) {
    signal(signal_number, SIG_DFL);
    if (!emu.current || !pthread_equal(emu.host_thread, pthread_self()))
        return; /* to the same fault, which ends the program now */
    const char *address = (const char *)info->si_addr, *end = emu.arena + EMU_PAGE + EMU_ARENA;
    if (signal_number == SIGFPE)
        emu_report("integer division by zero");
    if (address >= end && address < end + EMU_PAGE)
        emu_report("shared memory out of bounds: byte %td of %zu", address - emu.shared,
                   emu.kernel->shared_bytes);
    if (address >= emu.current->stack - EMU_PAGE && address < emu.current->stack)
        emu_report("the stack of %d KB is full", EMU_STACK >> 10);
    emu_report("invalid memory access at %p", (const void *)address);
}

struct emu_signal_stack {
    char memory[EMU_SIGNAL_STACK];
    emu_signal_stack() {
        stack_t stack = {};
        stack.ss_sp = memory;
        stack.ss_size = sizeof memory;
        sigaltstack(&stack, nullptr);
    }
    ~emu_signal_stack() {
        stack_t stack = {};
        stack.ss_flags = SS_DISABLE;
        sigaltstack(&stack, nullptr);
    }
};

static void emu_catch_faults(void) {
    static thread_local std::unique_ptr<emu_signal_stack> stack;
    if (!stack)
        stack.reset(new emu_signal_stack);
    static bool installed;
    if (installed)
        return;
    installed = true;
    struct sigaction action = {};
    action.sa_sigaction = emu_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int number : {SIGSEGV, SIGBUS, SIGFPE})
        sigaction(number, &action, nullptr);
}
#endif

/* ---- switching between threads ---- */

/* emu_swap(&save, load) leaves its registers on the stack whose pointer goes to `save`, and returns
 * on the stack `load`. A new fiber's stack looks as if it had left so from emu_start. */
#ifndef EMU_UCONTEXT
asm(R"(
    .text
    .type emu_swap, @function
emu_swap:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
    .size emu_swap, . - emu_swap
    .type emu_start, @function
emu_start:
    .cfi_startproc
    .cfi_undefined rip
    call emu_fiber_main
    ud2
    .cfi_endproc
    .size emu_start, . - emu_start
)");
extern "C" void emu_swap(void **save, void *load) noexcept;
extern "C" void emu_start(void);
#endif

static void emu_switch(emu_fiber *to, bool for_good = false) {
    emu_fiber *from = emu.current;
    emu.previous = from;
    emu.current = to;
    threadIdx = to->index;
    (void)for_good;
    EMU_ASAN(__sanitizer_start_switch_fiber(for_good ? nullptr : &from->fake_stack, to->stack,
                                            to->stack_bytes);)
    EMU_TSAN(__tsan_switch_to_fiber(to->tsan, 0);)
#ifdef EMU_UCONTEXT
    swapcontext(&from->context, &to->context);
#else
    emu_swap(&from->sp, to->sp);
#endif
    EMU_ASAN(__sanitizer_finish_switch_fiber(from->fake_stack, nullptr, nullptr);)
}

/* The next thread: of the same warp if one can run, or of another warp. */
static emu_fiber *emu_pick(emu_warp *warp) {
    if (!warp->runnable) {
        int first = (int)emu_random((uint32_t)emu.n_warps), i = 0;
        while (i < emu.n_warps && !emu.warps[(first + i) % emu.n_warps].runnable)
            i++;
        if (i == emu.n_warps)
            return nullptr;
        warp = &emu.warps[(first + i) % emu.n_warps];
    }
    uint32_t shift = emu_random(EMU_WARP), lanes = warp->runnable;
    uint32_t rotated = lanes >> shift | lanes << (-shift & 31);
    uint32_t lane = ((uint32_t)__builtin_ctz(rotated) + shift) % EMU_WARP;
    return &emu.fibers[(size_t)(warp - emu.warps) * EMU_WARP + lane];
}

/* No thread can run. Blames one that waits. */
__attribute__((noreturn)) static void emu_deadlock(void) {
    for (int i = 0; i < emu.n_threads; i++) {
        const emu_fiber &fiber = emu.fibers[(size_t)i];
        const emu_lane_state &lane = fiber.warp->lanes[fiber.lane];
        bool at_op = fiber.warp->at_op >> fiber.lane & 1;
        if (!at_op && (emu.n_at_barrier < emu.n_threads - emu.n_returned ||
                       !(fiber.warp->at_barrier >> fiber.lane & 1)))
            continue;
        threadIdx = fiber.index;
        emu_print_place("");
        if (at_op)
            fprintf(stderr, "waits for ever at %s with mask %08x, lanes %08x did not come: ",
                    emu_op_names[lane.op], lane.mask, lane.mask & ~fiber.warp->at_op);
        else
            fprintf(stderr, "waits for ever at __syncthreads: ");
        emu_print_waiting();
        abort();
    }
    abort();
}

static void emu_run_another(void) { /* while this one waits */
    emu_fiber *next = emu_pick(emu.current->warp);
    if (!next)
        emu_deadlock();
    if (next != emu.current)
        emu_switch(next);
}

extern "C" void emu_fiber_main(void) {
    EMU_ASAN(__sanitizer_finish_switch_fiber(nullptr, (const void **)&emu.previous->stack,
                                             &emu.previous->stack_bytes);)
    emu.kernel->body();
    emu_fiber *self = emu.current;
    self->warp->runnable &= ~(1u << self->lane);
    emu.n_returned++;
    emu_fiber *next = emu.n_returned == emu.n_threads ? &emu.host : emu_pick(self->warp);
    if (!next)
        emu_deadlock();
    emu_switch(next, true);
}

/* ---- rendezvous ---- */

static emu_fiber *emu_self(const char *call) {
    if (!emu.current)
        emu_report("%s outside a kernel", call);
    return emu.current;
}

void *emu_shared(void) {
    emu_self("DYNAMIC_SHARED");
    return emu.shared;
}

int emu_lane(void) {
    return emu_self("a warp operation")->lane;
}

void __syncthreads(void) {
    emu_fiber *self = emu_self("__syncthreads");
    self->warp->runnable &= ~(1u << self->lane);
    self->warp->at_barrier |= 1u << self->lane;
    if (++emu.n_at_barrier == emu.n_threads) {
        for (int w = 0; w < emu.n_warps; w++) {
            emu.warps[w].runnable = emu.warps[w].at_barrier;
            emu.warps[w].at_barrier = 0;
        }
        emu.n_at_barrier = 0;
    }
    emu_run_another();
}

static float emu_bf16_float(uint32_t bits) {
    return __uint_as_float(bits << 16);
}

/* Gathers the fragments of all lanes into matrices, multiplies, and scatters. */
static void emu_mma(const emu_lane_state *lanes) {
    float a[16][16], b[16][8], c[16][8];
    for (int lane = 0; lane < EMU_WARP; lane++) {
        int row = lane / 4, col = lane % 4 * 2;
        for (int i = 0; i < 4; i++) { /* two of k in each register */
            uint32_t pair = lanes[lane].a[i];
            float *to = &a[row + i % 2 * 8][col + i / 2 * 8];
            to[0] = emu_bf16_float(pair);
            to[1] = emu_bf16_float(pair >> 16);
            c[row + i / 2 * 8][col + i % 2] = lanes[lane].c[i];
        }
        for (int i = 0; i < 2; i++) {
            b[col + i * 8][row] = emu_bf16_float(lanes[lane].b[i]);
            b[col + i * 8 + 1][row] = emu_bf16_float(lanes[lane].b[i] >> 16);
        }
    }
    for (int row = 0; row < 16; row++)
        for (int k = 0; k < 16; k++)
            for (int col = 0; col < 8; col++)
                c[row][col] += a[row][k] * b[k][col];
    for (int lane = 0; lane < EMU_WARP; lane++)
        for (int i = 0; i < 4; i++)
            lanes[lane].c[i] = c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

/* All lanes of the mask have come: gives each its result. */
static void emu_complete(emu_warp *warp, emu_op op, uint32_t mask) {
    emu_lane_state *lanes = warp->lanes;
    uint32_t votes = 0;
    for (int lane = 0; lane < EMU_WARP; lane++) {
        if (!(mask >> lane & 1))
            continue;
        const emu_lane_state &l = lanes[lane];
        if (l.op != op || l.mask != mask)
            emu_report("%s with mask %08x, but lane %d came to %s with mask %08x", emu_op_names[op],
                       mask, lane, emu_op_names[l.op], l.mask);
        if (op >= EMU_SHFL && op <= EMU_SHFL_UP && !(mask >> l.source & 1))
            emu_report("%s: lane %d reads lane %d, which is not in the mask %08x", emu_op_names[op],
                       lane, l.source, mask);
        votes |= (uint32_t)(l.value & 1) << lane;
    }
    if (op == EMU_MMA)
        emu_mma(lanes);
    for (int lane = 0; lane < EMU_WARP; lane++)
        if (mask >> lane & 1)
            lanes[lane].result = op == EMU_BALLOT ? votes
                                 : op == EMU_ANY  ? votes != 0
                                 : op == EMU_ALL  ? votes == mask
                                                  : lanes[lanes[lane].source].value;
    warp->at_op &= ~mask;
    warp->runnable |= mask;
}

/* The last lane that comes does the work for all, and goes on itself; sometimes another warp does.
 */
uint64_t emu_warp_op(emu_op op, uint32_t mask, uint64_t value, int source) {
    emu_fiber *self = emu_self(emu_op_names[op]);
    emu_warp *warp = self->warp;
    emu_lane_state *lane = &warp->lanes[self->lane];
    uint32_t bit = 1u << self->lane;
    if (!(mask & bit))
        emu_report("%s with mask %08x, which is without its own lane %d", emu_op_names[op], mask,
                   self->lane);
    lane->op = op;
    lane->mask = mask;
    lane->value = value;
    lane->source = source;
    warp->runnable &= ~bit;
    warp->at_op |= bit;
    if ((warp->at_op & mask) != mask)
        emu_run_another();
    else
        emu_complete(warp, op, mask);
    return lane->result;
}

void mma_bf16(float c[4], const uint32_t a[4], const uint32_t b[2]) {
    emu_fiber *self = emu_self("mma_bf16");
    emu_lane_state *lane = &self->warp->lanes[self->lane];
    lane->c = c;
    lane->a = a;
    lane->b = b;
    emu_warp_op(EMU_MMA, 0xFFFFFFFF, 0, self->lane);
}

/* ---- cp.async and dependent launches ---- */

void copy_async16(void *shared, const void *global, bool valid) {
    emu_fiber *self = emu_self("copy_async16");
    char *to = (char *)shared;
    if ((uintptr_t)shared % 16)
        emu_misaligned(shared, 16, "copy_async16 to");
    if (valid && (uintptr_t)global % 16)
        emu_misaligned(global, 16, "copy_async16 from");
    if (to < emu.shared || to + 16 > emu.shared + emu.kernel->shared_bytes)
        emu_report("copy_async16 to byte %td of %zu of shared memory", to - emu.shared,
                   emu.kernel->shared_bytes);
    memset(shared, EMU_GARBAGE, 16);
    self->copies.push_back({shared, valid ? global : nullptr, self->n_groups});
}

void copy_async_commit(void) {
    emu_self("copy_async_commit")->n_groups++;
}

void emu_copy_async_wait(int newest) {
    emu_fiber *self = emu_self("copy_async_wait");
    size_t n = 0;
    for (; n < self->copies.size() && self->copies[n].group < self->n_groups - newest; n++) {
        const emu_async_copy &copy = self->copies[n];
        if (copy.from)
            memcpy(copy.to, copy.from, 16);
        else
            memset(copy.to, 0, 16);
    }
    self->copies.erase(self->copies.begin(), self->copies.begin() + (ptrdiff_t)n);
}

void grid_wait(void) {
    emu_self("grid_wait");
    emu.grid_waited = true;
}

/* ---- running a kernel ---- */

static void *emu_map(size_t bytes) {
    void *memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        emu_report("no memory for %zu bytes", bytes);
    return memory;
}

static void emu_make_fibers(size_t n) { /* each stack has a guard page below */
    while (emu.fibers.size() < n) {
        emu_fiber fiber;
        char *memory = (char *)emu_map(EMU_PAGE + EMU_STACK);
        mprotect(memory, EMU_PAGE, PROT_NONE);
        fiber.stack = memory + EMU_PAGE;
        fiber.stack_bytes = EMU_STACK;
        EMU_TSAN(fiber.tsan = __tsan_create_fiber(0);)
        emu.fibers.push_back(fiber);
    }
    if (emu.arena)
        return;
    emu.arena = (char *)emu_map(EMU_ARENA + 2 * EMU_PAGE);
    mprotect(emu.arena, EMU_PAGE, PROT_NONE);
    mprotect(emu.arena + EMU_PAGE + EMU_ARENA, EMU_PAGE, PROT_NONE);
}

/* Stacks begin at different offsets in their pages, so that they do not share cache sets. */
static void emu_prepare_fiber(emu_fiber *fiber, int i) {
    const dim3 &block = emu.kernel->block;
    unsigned n = (unsigned)i;
    fiber->index = {n % block.x, n / block.x % block.y, n / block.x / block.y};
    fiber->warp = &emu.warps[i / EMU_WARP];
    fiber->lane = i % EMU_WARP;
    fiber->copies.clear();
    fiber->n_groups = 0;
    size_t used = fiber->stack_bytes - n % 16 * 256;
#ifdef EMU_UCONTEXT
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack;
    fiber->context.uc_stack.ss_size = used;
    makecontext(&fiber->context, emu_fiber_main, 0);
#else
    void **sp = (void **)(fiber->stack + used) - 7; /* six registers, and where to return */
    memset(sp, 0, 6 * sizeof *sp);
    sp[6] = (void *)emu_start;
    fiber->sp = sp;
#endif
}

/* The block's shared memory ends as near to the guard page as its alignment allows. What is left
 * between is checked when the block ends. */
static void emu_fill_shared(size_t bytes) {
    char *begin = emu.arena + EMU_PAGE, *end = begin + EMU_ARENA;
    emu.shared = end - (bytes + EMU_SHARED_ALIGN - 1) / EMU_SHARED_ALIGN * EMU_SHARED_ALIGN;
    EMU_ASAN(__asan_unpoison_memory_region(begin, EMU_ARENA);)
    memset(emu.shared, EMU_GARBAGE, (size_t)(end - emu.shared));
    EMU_ASAN(__asan_poison_memory_region(begin, (size_t)(emu.shared - begin));)
    EMU_ASAN(__asan_poison_memory_region(emu.shared + bytes, (size_t)(end - emu.shared) - bytes);)
}

static void emu_check_block(void) {
    EMU_ASAN(return;)
    const char *end = emu.arena + EMU_PAGE + EMU_ARENA;
    for (const char *p = emu.shared + emu.kernel->shared_bytes; p < end; p++)
        if (*p != (char)EMU_GARBAGE)
            emu_report("wrote to byte %td of %zu of shared memory", p - emu.shared,
                       emu.kernel->shared_bytes);
}

static void emu_run_block(void) {
    emu.n_at_barrier = emu.n_returned = 0;
    emu.grid_waited = false;
    for (int i = 0; i < emu.n_threads; i++)
        emu_prepare_fiber(&emu.fibers[(size_t)i], i);
    for (int w = 0; w < emu.n_warps; w++) {
        int n = emu.n_threads - w * EMU_WARP;
        emu.warps[w].runnable = n < EMU_WARP ? (1u << n) - 1 : 0xFFFFFFFF;
        emu.warps[w].at_op = emu.warps[w].at_barrier = 0;
    }
    emu_fill_shared(emu.kernel->shared_bytes);
    emu.current = &emu.host;
    emu_switch(emu_pick(&emu.warps[emu_random((uint32_t)emu.n_warps)]));
    emu_check_block();
    if (emu.kernel->programmatic && !emu.grid_waited)
        emu_report("launched to overlap the kernel before it, but never calls grid_wait");
    emu.current = nullptr;
}

/* Runs the blocks in order, backwards or shuffled. */
static void emu_run_kernel(const emu_kernel *kernel) {
    size_t n = (size_t)kernel->grid.x * kernel->grid.y * kernel->grid.z;
    emu.kernel = kernel;
    emu.n_threads = (int)(kernel->block.x * kernel->block.y * kernel->block.z);
    emu.n_warps = (emu.n_threads + EMU_WARP - 1) / EMU_WARP;
    emu.host_thread = pthread_self();
    emu_make_fibers((size_t)emu.n_threads);
    EMU_TSAN(emu.host.tsan = __tsan_get_current_fiber();)
#if !defined(__SANITIZE_ADDRESS__)
    emu_catch_faults();
#endif
    blockDim = kernel->block;
    gridDim = kernel->grid;
    std::vector<unsigned> order(n);
    uint32_t how = emu_random(4);
    for (size_t i = 0; i < n; i++) {
        size_t at = how < 2 ? emu_random((uint32_t)i + 1) : i;
        order[i] = order[at];
        order[at] = (unsigned)i;
    }
    for (size_t i = 0; i < n; i++) {
        unsigned b = order[how == 2 ? n - 1 - i : i];
        blockIdx = {b % gridDim.x, b / gridDim.x % gridDim.y, b / gridDim.x / gridDim.y};
        emu_run_block();
    }
    emu.kernel = nullptr;
    emu.launches++;
}

/* ---- devices, memory, errors ---- */

struct emu_moment { /* in a stream: where an event was recorded */
    bool done = false;
    double time = 0;
    cudaStream_t stream = nullptr;
    cudaGraph_t graph = nullptr; /* or in a capture: behind these nodes */
    std::vector<int> nodes;
};

struct emu_work { /* in a stream: waits, runs (again, until it is done), marks */
    std::shared_ptr<emu_moment> wait, mark;
    std::function<bool()> run;
};

struct CUevent_st {
    int device;
    bool timed;
    std::shared_ptr<emu_moment> moment; /* the latest record */
};

struct CUstream_st {
    int device;
    bool destroyed = false;
    std::deque<emu_work> queue{};
    cudaGraph_t graph = nullptr; /* that its work is captured in */
    bool origin = false;         /* the capture began here */
    std::vector<int> tails{};    /* nodes that the next one comes after */
};

struct emu_node {
    std::function<void()> run;
    std::vector<int> after;
};

struct CUgraph_st {
    std::vector<emu_node> nodes;
    cudaStreamCaptureMode mode;
    bool invalid = false;
    pthread_t thread;
};

struct CUgraphExec_st {
    std::shared_ptr<const std::vector<emu_node>> nodes;
};

struct emu_allocation {
    size_t bytes;
    int device; /* -1: pinned host memory */
};

static struct {
    int n_devices = 1, multiprocessors = 4;
    size_t memory_each = (size_t)256 << 20;
    std::vector<size_t> used{0};
    std::map<uintptr_t, emu_allocation> allocations;
    std::vector<CUstream_st *> streams; /* the first n_devices: each device's stream 0 */
    std::vector<CUgraph_st *> captures;
    std::map<std::pair<int, const void *>, int> shared_limits; /* of kernels on devices */
    std::map<std::pair<int, int>, bool> peers;
    std::map<std::string, int> failures; /* calls to fail: good ones before */
    std::vector<std::unique_ptr<CUstream_st>> defaults;
} cuda;

static thread_local struct {
    int device = 0;
    cudaError_t error = cudaSuccess;
    const char *kernel = nullptr;
} emu_host;

static cudaError_t emu_result(cudaError_t error) {
    if (error != cudaSuccess)
        emu_host.error = error;
    return error;
}

/* The error that the call is to fail with. */
static cudaError_t emu_injected(const char *call) {
    if (cuda.n_devices == 0)
        return cudaErrorNoDevice;
    auto failure = cuda.failures.find(call);
    if (failure == cuda.failures.end() || failure->second-- > 0)
        return cudaSuccess;
    cuda.failures.erase(failure);
    bool memory = strcmp(call, "cudaMalloc") == 0 || strcmp(call, "cudaHostAlloc") == 0;
    return memory ? cudaErrorMemoryAllocation : cudaErrorLaunchFailure;
}

/* Opens a call of the runtime. */
#define EMU_CALL(name)                                                                             \
    std::lock_guard<std::recursive_mutex> lock(emu.mutex);                                         \
    if (cudaError_t injected = emu_injected(name))                                                 \
        return emu_result(injected);
#define EMU_CHECK(condition, error)                                                                \
    if (!(condition))                                                                              \
        return emu_result(error);

void emu_devices(int n, size_t memory_each, int multiprocessors) {
    std::lock_guard<std::recursive_mutex> lock(emu.mutex);
    for (size_t i = cuda.defaults.size(); i < cuda.streams.size(); i++)
        delete cuda.streams[i];
    cuda.streams.clear();
    cuda.defaults.clear();
    for (auto &allocation : cuda.allocations)
        free((void *)allocation.first);
    cuda.allocations.clear();
    cuda.shared_limits.clear();
    cuda.peers.clear();
    cuda.failures.clear();
    cuda.n_devices = n;
    cuda.memory_each = memory_each;
    cuda.multiprocessors = multiprocessors;
    cuda.used.assign((size_t)n, 0);
    for (int device = 0; device < n; device++) {
        cuda.defaults.emplace_back(new CUstream_st{device});
        cuda.streams.push_back(cuda.defaults.back().get());
    }
    emu_host.device = 0;
}
static const bool emu_one_device = (emu_devices(1, (size_t)256 << 20, 4), true);

const char *cudaGetErrorName(cudaError_t error) {
    switch (error) {
#define EMU_ERROR(name, value, text)                                                               \
    case name: return #name;
        EMU_ERRORS(EMU_ERROR)
#undef EMU_ERROR
    }
    return "unrecognized error code";
}

const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
#define EMU_ERROR(name, value, text)                                                               \
    case name: return text;
        EMU_ERRORS(EMU_ERROR)
#undef EMU_ERROR
    }
    return "unrecognized error code";
}

cudaError_t cudaPeekAtLastError(void) {
    return emu_host.error;
}

cudaError_t cudaGetLastError(void) {
    cudaError_t error = emu_host.error;
    emu_host.error = cudaSuccess;
    return error;
}

void emu_fail(const char *call, int after) {
    std::lock_guard<std::recursive_mutex> lock(emu.mutex);
    cuda.failures[call] = after;
}

long emu_launches(void) {
    std::lock_guard<std::recursive_mutex> lock(emu.mutex);
    return emu.launches;
}

void emu_next_kernel(const char *name) {
    emu_host.kernel = name;
}

cudaError_t cudaDriverGetVersion(int *version) {
    *version = 13000;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version) {
    return cudaDriverGetVersion(version);
}

cudaError_t cudaGetDeviceCount(int *count) {
    *count = cuda.n_devices;
    EMU_CALL("cudaGetDeviceCount")
    return cudaSuccess;
}

static bool emu_is_device(int device) {
    return device >= 0 && device < cuda.n_devices;
}

cudaError_t cudaSetDevice(int device) {
    EMU_CALL("cudaSetDevice")
    EMU_CHECK(emu_is_device(device), cudaErrorInvalidDevice)
    emu_host.device = device;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int *device) {
    EMU_CALL("cudaGetDevice")
    *device = emu_host.device;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device) {
    EMU_CALL("cudaDeviceGetAttribute")
    EMU_CHECK(emu_is_device(device), cudaErrorInvalidDevice)
    switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = EMU_MAX_THREADS; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = EMU_SHARED_DEFAULT; break;
    case cudaDevAttrWarpSize: *value = EMU_WARP; break;
    case cudaDevAttrMultiProcessorCount: *value = cuda.multiprocessors; break;
    case cudaDevAttrL2CacheSize: *value = 50 << 20; break;
    case cudaDevAttrAsyncEngineCount: *value = 3; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = EMU_SHARED_LIMIT; break;
    default: return emu_result(cudaErrorInvalidValue);
    }
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int device) {
    EMU_CALL("cudaGetDeviceProperties")
    EMU_CHECK(emu_is_device(device), cudaErrorInvalidDevice)
    *properties = {"emulated GPU",
                   cuda.memory_each,
                   EMU_SHARED_DEFAULT,
                   EMU_SHARED_LIMIT,
                   EMU_WARP,
                   EMU_MAX_THREADS,
                   9,
                   0,
                   cuda.multiprocessors,
                   3,
                   50 << 20};
    return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    EMU_CALL("cudaDeviceGetStreamPriorityRange")
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) {
    EMU_CALL("cudaDeviceCanAccessPeer")
    EMU_CHECK(emu_is_device(device) && emu_is_device(peer), cudaErrorInvalidDevice)
    *can = device != peer;
    return cudaSuccess;
}

cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) {
    EMU_CALL("cudaDeviceEnablePeerAccess")
    EMU_CHECK(flags == 0, cudaErrorInvalidValue)
    EMU_CHECK(emu_is_device(peer) && peer != emu_host.device, cudaErrorInvalidDevice)
    bool *enabled = &cuda.peers[{emu_host.device, peer}];
    EMU_CHECK(!*enabled, cudaErrorPeerAccessAlreadyEnabled)
    *enabled = true;
    return cudaSuccess;
}

/* ---- streams ---- */

/* The stream, or stream 0 of the current device; null: there is no such stream. */
static CUstream_st *emu_stream(cudaStream_t stream) {
    if (!stream)
        return cuda.streams[(size_t)emu_host.device];
    for (CUstream_st *s : cuda.streams)
        if (s == stream && !s->destroyed)
            return s;
    return nullptr;
}

static bool emu_ready(const CUstream_st *stream) {
    return !stream->queue.empty() &&
           (!stream->queue.front().wait || stream->queue.front().wait->done);
}

/* Does the next thing in the stream, or a part of it. */
static void emu_step(CUstream_st *stream) {
    emu_work &work = stream->queue.front();
    if (work.run && !work.run())
        return;
    if (work.mark) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        work.mark->time = (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
        work.mark->done = true;
    }
    stream->queue.pop_front();
    if (!stream->destroyed || !stream->queue.empty())
        return;
    for (size_t i = 0; i < cuda.streams.size(); i++)
        if (cuda.streams[i] == stream)
            cuda.streams.erase(cuda.streams.begin() + (ptrdiff_t)i);
    delete stream;
}

/* A stream that can go on, or null if all are empty. */
static CUstream_st *emu_random_stream(void) {
    std::vector<CUstream_st *> ready;
    for (CUstream_st *stream : cuda.streams)
        if (emu_ready(stream))
            ready.push_back(stream);
    return ready.empty() ? nullptr : ready[emu_random((uint32_t)ready.size())];
}

/* Goes on until the moment has come. Half of the time it does only what that moment needs, so that
 * all else comes as late as it can; or else anything may come before. */
static void emu_until(const emu_moment *moment) {
    bool late = emu_random(2);
    while (!moment->done) {
        CUstream_st *stream = moment->stream;
        if (late)
            while (!emu_ready(stream))
                stream = stream->queue.front().wait->stream;
        else
            stream = emu_random_stream();
        emu_step(stream);
    }
}

static void emu_finish(CUstream_st *stream) {
    auto moment = std::make_shared<emu_moment>();
    moment->stream = stream;
    stream->queue.push_back({nullptr, moment, nullptr});
    emu_until(moment.get());
}

static void emu_finish_device(int device) {
    std::vector<CUstream_st *> streams;
    for (CUstream_st *stream : cuda.streams)
        if (stream->device == device && !stream->queue.empty())
            streams.push_back(stream);
    while (!streams.empty()) { /* those that were destroyed end with their last work */
        size_t i = emu_random((uint32_t)streams.size());
        emu_finish(streams[i]);
        streams.erase(streams.begin() + (ptrdiff_t)i);
    }
}

/* When the host polls, the device may have done nothing, or a little, or much. */
static void emu_poll(void) {
    for (uint32_t n = emu_random(4); n > 0; n--)
        if (CUstream_st *stream = emu_random_stream())
            emu_step(stream);
}

static void emu_enqueue(CUstream_st *stream, std::function<void()> run) {
    if (!stream->graph) {
        stream->queue.push_back({nullptr, nullptr, [run] {
                                     run();
                                     return true;
                                 }});
        return;
    }
    std::vector<emu_node> &nodes = stream->graph->nodes;
    nodes.push_back({run, stream->tails});
    stream->tails = {(int)nodes.size() - 1};
}

/* May this host thread make a call that waits for work or that has work of its own? While another
 * one captures, such a call fails, and spoils the capture. */
static bool emu_capture_allows(void) {
    bool allowed = true;
    for (CUgraph_st *graph : cuda.captures) {
        if (graph->mode == cudaStreamCaptureModeRelaxed)
            continue;
        if (graph->mode == cudaStreamCaptureModeThreadLocal &&
            !pthread_equal(graph->thread, pthread_self()))
            continue;
        graph->invalid = true;
        allowed = false;
    }
    return allowed;
}

cudaError_t cudaDeviceSynchronize(void) {
    EMU_CALL("cudaDeviceSynchronize")
    EMU_CHECK(emu_capture_allows(), cudaErrorStreamCaptureUnsupported)
    emu_finish_device(emu_host.device);
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    EMU_CALL("cudaStreamCreateWithPriority")
    (void)priority; /* any order is right */
    EMU_CHECK(flags <= cudaStreamNonBlocking, cudaErrorInvalidValue)
    cuda.streams.push_back(new CUstream_st{emu_host.device});
    *stream = cuda.streams.back();
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    EMU_CALL("cudaStreamDestroy")
    EMU_CHECK(stream && emu_stream(stream), cudaErrorInvalidResourceHandle)
    stream->destroyed = true;
    stream->queue.push_back({nullptr, nullptr, nullptr});
    if (stream->queue.size() == 1)
        emu_step(stream);
    return cudaSuccess;
}

/* A stream that is captured cannot be waited for. */
static cudaError_t emu_check_wait(CUstream_st *stream) {
    if (!stream)
        return cudaErrorInvalidResourceHandle;
    if (!stream->graph)
        return cudaSuccess;
    stream->graph->invalid = true;
    return cudaErrorStreamCaptureUnsupported;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    EMU_CALL("cudaStreamSynchronize")
    CUstream_st *s = emu_stream(stream);
    if (cudaError_t error = emu_check_wait(s))
        return emu_result(error);
    emu_finish(s);
    return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t stream) {
    EMU_CALL("cudaStreamQuery")
    CUstream_st *s = emu_stream(stream);
    if (cudaError_t error = emu_check_wait(s))
        return emu_result(error);
    emu_poll();
    return s->queue.empty() ? cudaSuccess : emu_result(cudaErrorNotReady);
}

/* ---- events ---- */

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    EMU_CALL("cudaEventCreateWithFlags")
    EMU_CHECK(flags <= (cudaEventBlockingSync | cudaEventDisableTiming), cudaErrorInvalidValue)
    *event = new CUevent_st{emu_host.device, !(flags & cudaEventDisableTiming), nullptr};
    return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    EMU_CALL("cudaEventDestroy")
    EMU_CHECK(event, cudaErrorInvalidResourceHandle)
    delete event;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    EMU_CALL("cudaEventRecord")
    CUstream_st *s = emu_stream(stream);
    EMU_CHECK(s && event && s->device == event->device, cudaErrorInvalidResourceHandle)
    event->moment = std::make_shared<emu_moment>();
    event->moment->stream = s;
    event->moment->graph = s->graph;
    event->moment->nodes = s->tails;
    if (!s->graph)
        s->queue.push_back({nullptr, event->moment, nullptr});
    return cudaSuccess;
}

/* A wait for an event of a capture takes its stream into the capture. */
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
    EMU_CALL("cudaStreamWaitEvent")
    CUstream_st *s = emu_stream(stream);
    EMU_CHECK(s && event, cudaErrorInvalidResourceHandle)
    EMU_CHECK(flags == 0, cudaErrorInvalidValue)
    const auto &moment = event->moment;
    if (!moment)
        return cudaSuccess;
    if (!moment->graph) {
        EMU_CHECK(!s->graph || moment->done, cudaErrorStreamCaptureIsolation)
        if (!s->graph)
            s->queue.push_back({moment, nullptr, nullptr});
        return cudaSuccess;
    }
    EMU_CHECK(!s->graph || s->graph == moment->graph, cudaErrorStreamCaptureMerge)
    s->graph = moment->graph;
    s->tails.insert(s->tails.end(), moment->nodes.begin(), moment->nodes.end());
    return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
    EMU_CALL("cudaEventQuery")
    EMU_CHECK(event, cudaErrorInvalidResourceHandle)
    EMU_CHECK(emu_capture_allows(), cudaErrorStreamCaptureUnsupported)
    EMU_CHECK(!event->moment || !event->moment->graph, cudaErrorCapturedEvent)
    emu_poll();
    return !event->moment || event->moment->done ? cudaSuccess : emu_result(cudaErrorNotReady);
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    EMU_CALL("cudaEventSynchronize")
    EMU_CHECK(event, cudaErrorInvalidResourceHandle)
    EMU_CHECK(!event->moment || !event->moment->graph, cudaErrorCapturedEvent)
    if (event->moment)
        emu_until(event->moment.get());
    return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
    EMU_CALL("cudaEventElapsedTime")
    EMU_CHECK(start && end && start->timed && end->timed && start->moment && end->moment,
              cudaErrorInvalidResourceHandle)
    EMU_CHECK(start->moment->done && end->moment->done, cudaErrorNotReady)
    *milliseconds = (float)((end->moment->time - start->moment->time) * 1e3);
    return cudaSuccess;
}

/* ---- graphs ---- */

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
    EMU_CALL("cudaStreamBeginCapture")
    CUstream_st *s = emu_stream(stream);
    EMU_CHECK(s, cudaErrorInvalidResourceHandle)
    EMU_CHECK(stream && !s->graph, cudaErrorStreamCaptureUnsupported)
    s->graph = new CUgraph_st{{}, mode, false, pthread_self()};
    s->origin = true;
    cuda.captures.push_back(s->graph);
    return cudaSuccess;
}

/* Marks the nodes that those of the list come after, and themselves. */
static void emu_mark(const std::vector<emu_node> &nodes, const std::vector<int> &list,
                     std::vector<bool> *marked) {
    for (int node : list) {
        if ((*marked)[(size_t)node])
            continue;
        (*marked)[(size_t)node] = true;
        emu_mark(nodes, nodes[(size_t)node].after, marked);
    }
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    EMU_CALL("cudaStreamEndCapture")
    CUstream_st *s = emu_stream(stream);
    EMU_CHECK(s, cudaErrorInvalidResourceHandle)
    EMU_CHECK(s->graph && s->origin, cudaErrorStreamCaptureUnmatched)
    CUgraph_st *captured = s->graph;
    std::vector<bool> joined(captured->nodes.size());
    emu_mark(captured->nodes, s->tails, &joined);
    bool all_joined = std::find(joined.begin(), joined.end(), false) == joined.end();
    for (CUstream_st *other : cuda.streams) {
        if (other->graph != captured)
            continue;
        other->graph = nullptr;
        other->origin = false;
        other->tails.clear();
    }
    cuda.captures.erase(std::find(cuda.captures.begin(), cuda.captures.end(), captured));
    *graph = nullptr;
    cudaError_t error = captured->invalid ? cudaErrorStreamCaptureInvalidated
                        : !all_joined     ? cudaErrorStreamCaptureUnjoined
                                          : cudaSuccess;
    if (error)
        delete captured;
    else
        *graph = captured;
    return emu_result(error);
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *n_nodes) {
    EMU_CALL("cudaGraphGetNodes")
    EMU_CHECK(graph && n_nodes && !nodes, cudaErrorInvalidValue) /* they are only counted */
    *n_nodes = graph->nodes.size();
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph,
                                 unsigned long long flags) {
    EMU_CALL("cudaGraphInstantiate")
    EMU_CHECK(graph && flags == 0, cudaErrorInvalidValue)
    *exec = new CUgraphExec_st{std::make_shared<const std::vector<emu_node>>(graph->nodes)};
    return cudaSuccess;
}

/* Runs one node, any of those that can be next. */
static bool emu_run_node(const std::vector<emu_node> &nodes, std::vector<bool> *done) {
    std::vector<size_t> ready;
    for (size_t i = 0; i < nodes.size(); i++) {
        bool can = !(*done)[i];
        for (int before : nodes[i].after)
            can = can && (*done)[(size_t)before];
        if (can)
            ready.push_back(i);
    }
    if (ready.empty())
        return true;
    size_t node = ready[emu_random((uint32_t)ready.size())];
    nodes[node].run();
    (*done)[node] = true;
    return ready.size() == 1 && std::find(done->begin(), done->end(), false) == done->end();
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
    EMU_CALL("cudaGraphLaunch")
    CUstream_st *s = emu_stream(stream);
    EMU_CHECK(exec, cudaErrorInvalidValue)
    EMU_CHECK(s, cudaErrorInvalidResourceHandle)
    EMU_CHECK(!s->graph, cudaErrorStreamCaptureUnsupported)
    auto nodes = exec->nodes;
    auto done = std::make_shared<std::vector<bool>>(nodes->size());
    s->queue.push_back({nullptr, nullptr, [=] { return emu_run_node(*nodes, done.get()); }});
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    EMU_CALL("cudaGraphDestroy")
    EMU_CHECK(graph, cudaErrorInvalidValue)
    delete graph;
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
    EMU_CALL("cudaGraphExecDestroy")
    EMU_CHECK(exec, cudaErrorInvalidValue)
    delete exec;
    return cudaSuccess;
}

/* ---- memory ---- */

static cudaError_t emu_allocate(void **memory, size_t bytes, int device) {
    *memory = nullptr;
    if (!emu_capture_allows())
        return cudaErrorStreamCaptureUnsupported;
    if (bytes == 0)
        return cudaSuccess;
    if (device >= 0 && bytes > cuda.memory_each - cuda.used[(size_t)device])
        return cudaErrorMemoryAllocation;
    if (posix_memalign(memory, 256, bytes) != 0)
        return cudaErrorMemoryAllocation;
    memset(*memory, EMU_GARBAGE, bytes);
    cuda.allocations[(uintptr_t)*memory] = {bytes, device};
    if (device >= 0)
        cuda.used[(size_t)device] += bytes;
    return cudaSuccess;
}

/* Waits for all work that may use it. */
static cudaError_t emu_free(void *memory, bool pinned) {
    if (!memory)
        return cudaSuccess;
    auto found = cuda.allocations.find((uintptr_t)memory);
    if (found == cuda.allocations.end() || (found->second.device < 0) != pinned)
        return cudaErrorInvalidValue;
    if (!emu_capture_allows())
        return cudaErrorStreamCaptureUnsupported;
    int device = found->second.device;
    for (int i = 0; i < cuda.n_devices; i++)
        if (pinned || i == device)
            emu_finish_device(i);
    if (!pinned)
        cuda.used[(size_t)device] -= found->second.bytes;
    cuda.allocations.erase(found);
    free(memory);
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
    EMU_CALL("cudaMemGetInfo")
    *total = cuda.memory_each;
    *free = cuda.memory_each - cuda.used[(size_t)emu_host.device];
    return cudaSuccess;
}

cudaError_t cudaMalloc(void **memory, size_t bytes) {
    EMU_CALL("cudaMalloc")
    return emu_result(emu_allocate(memory, bytes, emu_host.device));
}

cudaError_t cudaFree(void *memory) {
    EMU_CALL("cudaFree")
    return emu_result(emu_free(memory, false));
}

cudaError_t cudaHostAlloc(void **memory, size_t bytes, unsigned flags) {
    EMU_CALL("cudaHostAlloc")
    EMU_CHECK(flags < 8, cudaErrorInvalidValue)
    return emu_result(emu_allocate(memory, bytes, -1));
}

cudaError_t cudaFreeHost(void *memory) {
    EMU_CALL("cudaFreeHost")
    return emu_result(emu_free(memory, true));
}

enum { EMU_PINNED = -1, EMU_PAGEABLE = -2, EMU_INVALID = -3 };

/* Where the bytes lie: on a device, or one of the above. */
static int emu_place(const void *memory, size_t bytes) {
    uintptr_t begin = (uintptr_t)memory;
    auto next = cuda.allocations.upper_bound(begin + bytes - 1);
    if (next == cuda.allocations.begin())
        return EMU_PAGEABLE;
    --next;
    uintptr_t end = next->first + next->second.bytes;
    if (begin >= end)
        return EMU_PAGEABLE;
    bool inside = begin >= next->first && begin + bytes <= end;
    return inside ? next->second.device : EMU_INVALID;
}

struct emu_copy {
    char *to;
    const char *from;
    size_t to_pitch, from_pitch, width, height;
    int to_place, from_place;
};

static void emu_run_copy(const emu_copy &copy) {
    for (size_t row = 0; row < copy.height; row++)
        memcpy(copy.to + row * copy.to_pitch, copy.from + row * copy.from_pitch, copy.width);
}

static bool emu_place_copy(emu_copy *copy) {
    copy->to_place = emu_place(copy->to, (copy->height - 1) * copy->to_pitch + copy->width);
    copy->from_place = emu_place(copy->from, (copy->height - 1) * copy->from_pitch + copy->width);
    return copy->to_place != EMU_INVALID && copy->from_place != EMU_INVALID;
}

/* From pageable memory a copy is made at once, and to pageable memory it is waited for. */
static cudaError_t emu_copy_async(emu_copy copy, cudaMemcpyKind kind, CUstream_st *stream) {
    if (!stream)
        return cudaErrorInvalidResourceHandle;
    if (copy.width > copy.to_pitch || copy.width > copy.from_pitch)
        return cudaErrorInvalidValue;
    if (copy.width == 0 || copy.height == 0)
        return cudaSuccess;
    if (kind < cudaMemcpyHostToHost || kind > cudaMemcpyDefault)
        return cudaErrorInvalidMemcpyDirection;
    if (!copy.to || !copy.from || !emu_place_copy(&copy))
        return cudaErrorInvalidValue;
    bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    bool right = to_device == (copy.to_place >= 0) && from_device == (copy.from_place >= 0);
    if (kind != cudaMemcpyDefault && !right)
        return cudaErrorInvalidValue;
    std::shared_ptr<std::vector<char>> staged;
    if (copy.from_place == EMU_PAGEABLE && !stream->graph) {
        staged = std::make_shared<std::vector<char>>(copy.width * copy.height);
        emu_copy stage = copy;
        stage.to = staged->data();
        stage.to_pitch = copy.width;
        emu_run_copy(stage);
        copy.from = staged->data();
        copy.from_pitch = copy.width;
    }
    emu_enqueue(stream, [copy, staged] {
        emu_copy now = copy;
        if (!emu_place_copy(&now) || now.to_place != copy.to_place ||
            (!staged && now.from_place != copy.from_place))
            emu_report("a copy runs after its memory was freed");
        emu_run_copy(copy);
    });
    if (copy.to_place == EMU_PAGEABLE && !stream->graph)
        emu_finish(stream);
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
    EMU_CALL("cudaMemcpyAsync")
    emu_copy copy = {(char *)to, (const char *)from, bytes, bytes, bytes, 1, 0, 0};
    return emu_result(emu_copy_async(copy, kind, emu_stream(stream)));
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
    EMU_CALL("cudaMemcpy")
    EMU_CHECK(emu_capture_allows(), cudaErrorStreamCaptureUnsupported)
    emu_copy copy = {(char *)to, (const char *)from, bytes, bytes, bytes, 1, 0, 0};
    cudaError_t error = emu_copy_async(copy, kind, emu_stream(nullptr));
    emu_finish(emu_stream(nullptr));
    return emu_result(error);
}

cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch,
                              size_t width, size_t height, cudaMemcpyKind kind,
                              cudaStream_t stream) {
    EMU_CALL("cudaMemcpy2DAsync")
    emu_copy copy = {(char *)to, (const char *)from, to_pitch, from_pitch, width, height, 0, 0};
    return emu_result(emu_copy_async(copy, kind, emu_stream(stream)));
}

cudaError_t cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device,
                                size_t bytes, cudaStream_t stream) {
    EMU_CALL("cudaMemcpyPeerAsync")
    EMU_CHECK(emu_is_device(to_device) && emu_is_device(from_device), cudaErrorInvalidDevice)
    EMU_CHECK(bytes == 0 || emu_place(to, bytes) == to_device, cudaErrorInvalidValue)
    EMU_CHECK(bytes == 0 || emu_place(from, bytes) == from_device, cudaErrorInvalidValue)
    emu_copy copy = {(char *)to, (const char *)from, bytes, bytes, bytes, 1, 0, 0};
    return emu_result(emu_copy_async(copy, cudaMemcpyDeviceToDevice, emu_stream(stream)));
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream) {
    EMU_CALL("cudaMemsetAsync")
    CUstream_st *s = emu_stream(stream);
    EMU_CHECK(s, cudaErrorInvalidResourceHandle)
    if (bytes == 0)
        return cudaSuccess;
    EMU_CHECK(to && emu_place(to, bytes) >= EMU_PINNED, cudaErrorInvalidValue)
    emu_enqueue(s, [=] {
        if (emu_place(to, bytes) < EMU_PINNED)
            emu_report("a memset runs after its memory was freed");
        memset(to, value, bytes);
    });
    return cudaSuccess;
}

/* ---- launches ---- */

cudaError_t emu_set_attribute(const void *kernel, cudaFuncAttribute attribute, int value) {
    EMU_CALL("cudaFuncSetAttribute")
    if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) {
        EMU_CHECK(value >= -1 && value <= 100, cudaErrorInvalidValue)
        return cudaSuccess;
    }
    EMU_CHECK(attribute == cudaFuncAttributeMaxDynamicSharedMemorySize, cudaErrorInvalidValue)
    EMU_CHECK(value >= 0 && value <= EMU_SHARED_LIMIT, cudaErrorInvalidValue)
    cuda.shared_limits[{emu_host.device, kernel}] = value;
    return cudaSuccess;
}

cudaError_t emu_launch(const cudaLaunchConfig_t *config, const void *kernel,
                       std::function<void()> body) {
    const char *name = emu_host.kernel ? emu_host.kernel : "a kernel without a name";
    emu_host.kernel = nullptr;
    EMU_CALL("cudaLaunchKernelEx")
    CUstream_st *stream = emu_stream(config->stream);
    EMU_CHECK(stream && stream->device == emu_host.device, cudaErrorInvalidResourceHandle)
    const dim3 &grid = config->gridDim, &block = config->blockDim;
    uint64_t n_threads = (uint64_t)block.x * block.y * block.z;
    EMU_CHECK(grid.x && grid.y && grid.z && n_threads, cudaErrorInvalidConfiguration)
    EMU_CHECK(grid.x <= 0x7FFFFFFF && grid.y <= 0xFFFF && grid.z <= 0xFFFF,
              cudaErrorInvalidConfiguration)
    EMU_CHECK(n_threads <= EMU_MAX_THREADS && block.z <= 64, cudaErrorInvalidConfiguration)
    auto limit = cuda.shared_limits.find({emu_host.device, kernel});
    int shared_limit = limit == cuda.shared_limits.end() ? EMU_SHARED_DEFAULT : limit->second;
    EMU_CHECK(config->dynamicSmemBytes <= (size_t)shared_limit, cudaErrorInvalidValue)
    bool programmatic = false;
    for (unsigned i = 0; i < config->numAttrs; i++) {
        EMU_CHECK(config->attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization,
                  cudaErrorInvalidValue)
        programmatic = config->attrs[i].val.programmaticStreamSerializationAllowed;
    }
    emu_kernel launch = {name, body, grid, block, config->dynamicSmemBytes, programmatic};
    emu_enqueue(stream, [launch] { emu_run_kernel(&launch); });
    return cudaSuccess;
}
#endif /* CUDA_EMU_IMPLEMENTATION */
