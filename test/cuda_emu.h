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
 *     mma); blocks run one after another in random order.
 *   - A block's shared memory is as large as was asked for, full of NaNs, and ends at a guard page.
 *   - copy_async16 writes when it is waited for; until then its target holds NaNs.
 *   - Where a launch may overlap the kernel before it, a block of it may run before that one, as
 *     far as grid_wait.
 *   - Work on streams is late: it is done when somebody synchronizes or polls, and then in any
 *     order that streams and events allow (see cuda_emu_runtime.h).
 *   - Memory is malloc'ed and full of NaNs: AddressSanitizer checks each access of a kernel.
 *   - ThreadSanitizer sees threads as CUDA does, ordered by __syncthreads, __syncwarp, grid_wait
 *     and __threadfence alone: it reports a missing one even where the order hid it.
 *   - Calls fail as on a GPU: limits of launches, memory of a device, pointers of copies, captures.
 * What a GPU would answer with a hang or with garbage ends the program with one line that names
 * the kernel, the block and the thread: a barrier that some threads do not reach, a warp operation
 * without all its lanes, a misaligned vector, shared memory out of bounds.
 *
 * What it is not: it does not tell what is fast, and a kernel in which a block waits for another
 * never ends. One lock guards it all: host threads may
 * call it together, kernels run one by one. Include the implementation in one file only. */
#ifndef CUDA_EMU_H
#define CUDA_EMU_H
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

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
    EMU_MMA,
    EMU_GRID_WAIT,
    EMU_RETURNED
};

void *emu_shared(void);
int emu_lane(void);
/* Waits for the lanes of the mask, and returns what the operation gives this lane. */
uint64_t emu_warp_op(emu_op op, uint32_t mask, uint64_t value, int source);
void emu_misaligned(const void *p, int bytes, const char *call);

void __syncthreads(void);
void __threadfence(void);

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
#endif /* CUDA_EMU_H */
#ifdef CUDA_EMU_IMPLEMENTATION
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define EMU_ASAN(...) __VA_ARGS__
#else
#define EMU_ASAN(...)
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" void AnnotateIgnoreReadsBegin(const char *file, int line);
extern "C" void AnnotateIgnoreReadsEnd(const char *file, int line);
extern "C" void AnnotateIgnoreWritesBegin(const char *file, int line);
extern "C" void AnnotateIgnoreWritesEnd(const char *file, int line);
#define EMU_TSAN(...) __VA_ARGS__
#else
#define EMU_TSAN(...)
#endif
#if !defined(__x86_64__)
#define EMU_UCONTEXT /* slower, and for any machine */
#endif
#ifdef EMU_UCONTEXT
#include <ucontext.h>
#endif

enum {
    EMU_WARP = 32,
    EMU_MAX_THREADS = 1024,
    EMU_SHARED_ALIGN = 128,
    EMU_ARENA = 232 << 10, /* room for a block's shared memory and 4 KB more, in whole pages */
    EMU_PAGE = 4096,
    EMU_STACK = EMU_ASAN(4 *) EMU_TSAN(4 *) 64 << 10, /* sanitizers make frames larger */
    EMU_FIBER_SETS = 1 EMU_TSAN(+1),
    EMU_SIGNAL_STACK = 64 << 10,
    EMU_GARBAGE = 0xFF /* a byte of a NaN, in f32 and in bf16; -1 in int */
};

static const char *const emu_op_names[] = {
    "can run",          "__syncthreads",  "__syncwarp",    "__shfl_sync", "__shfl_xor_sync",
    "__shfl_down_sync", "__shfl_up_sync", "__ballot_sync", "__any_sync",  "__all_sync",
    "mma_bf16",         "grid_wait",      "returned"};

/* ---- a block and its threads ---- */

struct emu_async_copy {
    void *to;
    const void *from; /* null: zeros */
    int group;
};

struct emu_lane_state {
    emu_op op; /* that it waits at, unless it is runnable */
    uint32_t mask;
    int source;
    uint64_t value, result;
    float *c; /* of mma_bf16 */
    const uint32_t *a, *b;
};

struct emu_warp { /* masks of lanes */
    uint32_t all, runnable, at_op;
    emu_lane_state lanes[EMU_WARP];
};

/* A thread of a block; or the host thread that runs the block, while it waits for it. */
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
    std::vector<emu_async_copy> copies{}; /* not yet landed */
    void *fake_stack = nullptr;           /* of AddressSanitizer */
    void *tsan = nullptr;                 /* of ThreadSanitizer */
};

struct emu_kernel {
    const char *name;
    std::function<void()> body;
    dim3 grid, block;
    size_t shared_bytes;
    bool programmatic; /* may begin before the kernel before it ends */
};

struct emu_turn { /* see emu_arrive */
    bool odd, used;
};

struct emu_block {
    const emu_kernel *kernel = nullptr;
    unsigned number = 0;
    int n_threads = 0, n_warps = 0, n_at_barrier = 0, n_returned = 0;
    bool early = false, grid_waited = false;  /* early: the kernel before it has not run */
    char *arena = nullptr, *shared = nullptr; /* shared: what it asked for, at the arena's end */
    std::unique_ptr<emu_fiber[]> fibers{};    /* (EMU_FIBER_SETS, n_threads) */
    emu_fiber *threads[EMU_MAX_THREADS];      /* (n_threads) */
    emu_warp warps[EMU_MAX_THREADS / EMU_WARP];
    emu_turn turns[1 + EMU_MAX_THREADS]; /* of barriers */
};

static struct {
    std::recursive_mutex mutex; /* guards all there is here, and the runtime's state */
    uint64_t random = 1;
    emu_block blocks[2];                               /* the second one for an early block */
    emu_block *block = nullptr;                        /* that runs, if any does */
    emu_fiber *current = nullptr, *previous = nullptr; /* of its threads */
    emu_fiber host;
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

long emu_launches(void) {
    std::lock_guard<std::recursive_mutex> lock(emu.mutex);
    return emu.launches;
}

/* ---- reports ---- */

static bool emu_in_kernel(void) { /* does this host thread run one? */
    return emu.block && pthread_equal(emu.host_thread, pthread_self());
}

static void emu_print_place(void) {
    fprintf(stderr, "cuda_emu: ");
    if (!emu_in_kernel())
        return;
    fprintf(stderr, "%s, block (%u, %u, %u)", emu.block->kernel->name, blockIdx.x, blockIdx.y,
            blockIdx.z);
    if (emu.current != &emu.host)
        fprintf(stderr, ", thread (%u, %u, %u)", threadIdx.x, threadIdx.y, threadIdx.z);
    fprintf(stderr, ": ");
}

static emu_op emu_waits_at(const emu_fiber &fiber) {
    bool runnable = fiber.warp->runnable >> fiber.lane & 1;
    return runnable ? EMU_NONE : fiber.warp->lanes[fiber.lane].op;
}

static void emu_print_waiting(void) { /* where the threads of the block are */
    int count[EMU_RETURNED + 1] = {0};
    for (int i = 0; i < emu.block->n_threads; i++)
        count[emu_waits_at(*emu.block->threads[i])]++;
    fprintf(stderr, "%d threads:", emu.block->n_threads);
    for (int op = EMU_NONE; op <= EMU_RETURNED; op++)
        if (count[op])
            fprintf(stderr, " %d %s", count[op], emu_op_names[op]);
    fprintf(stderr, "\n");
}

__attribute__((format(printf, 1, 2), noreturn)) static void emu_report(const char *format, ...) {
    va_list values;
    va_start(values, format);
    emu_print_place();
    vfprintf(stderr, format, values);
    va_end(values);
    fprintf(stderr, "\n");
    abort();
}

void emu_misaligned(const void *p, int bytes, const char *call) {
    emu_report("%s(%p): the address is not a multiple of %d", call, p, bytes);
}

extern "C" void emu_where(void) {
    emu_print_place();
    if (!emu_in_kernel()) {
        fprintf(stderr, "no kernel runs\n");
        return;
    }
    emu_print_waiting();
    for (int i = 0, n = 1; i < emu.block->n_threads; i += n) { /* those alike in one line */
        const emu_fiber &first = *emu.block->threads[i];
        emu_op op = emu_waits_at(first);
        for (n = 1; i + n < emu.block->n_threads; n++)
            if (emu_waits_at(*emu.block->threads[i + n]) != op)
                break;
        const uint3 &a = first.index, &b = emu.block->threads[i + n - 1]->index;
        fprintf(stderr, "  threads (%u, %u, %u) to (%u, %u, %u): %s\n", a.x, a.y, a.z, b.x, b.y,
                b.z, emu_op_names[op]);
    }
}

/* The sanitizers call these when they report. */
static void emu_print_sanitized(void) {
    if (!emu_in_kernel())
        return;
    fprintf(stderr, "\n");
    emu_print_place();
    fprintf(stderr, "the sanitizer's report is about this thread\n");
}

extern "C" void __asan_on_error(void) {
    emu_print_sanitized();
}

extern "C" void __ubsan_on_report(void) {
    emu_print_sanitized();
}

/* A fault inside a kernel: on a stack of its own, since the fault may be that the stack is full. */
static void emu_fault(int number, siginfo_t *info, void *) {
    signal(number, SIG_DFL);
    if (!emu_in_kernel())
        return; /* to the same fault, which ends the program now */
    const char *at = (const char *)info->si_addr, *stack = emu.current->stack;
    const char *arena = emu.block->arena;
    if (number == SIGFPE)
        emu_report("integer division by zero");
    if (at >= arena - EMU_PAGE && at < arena + EMU_ARENA + EMU_PAGE)
        emu_report("shared memory out of bounds: byte %td of %zu", at - emu.block->shared,
                   emu.block->kernel->shared_bytes);
    if (at >= stack - EMU_PAGE && at < stack)
        emu_report("the stack of %d KB is full", EMU_STACK >> 10);
    emu_report("invalid memory access at %p", (const void *)at);
}

struct emu_signal_stack { /* of a host thread */
    char memory[EMU_SIGNAL_STACK];
    emu_signal_stack() {
        use(0);
    }
    ~emu_signal_stack() {
        use(SS_DISABLE);
    }
    void use(int flags) {
        stack_t stack = {};
        stack.ss_sp = memory;
        stack.ss_size = sizeof memory;
        stack.ss_flags = flags;
        sigaltstack(&stack, nullptr);
    }
};

static void emu_catch_faults(void) {
    EMU_ASAN(return;) /* it catches them itself */
    static thread_local std::unique_ptr<emu_signal_stack> stack;
    static bool installed;
    if (!stack)
        stack.reset(new emu_signal_stack);
    if (installed)
        return;
    installed = true;
    struct sigaction action = {};
    action.sa_sigaction = emu_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int number : {SIGSEGV, SIGBUS, SIGFPE})
        sigaction(number, &action, nullptr);
}

/* ---- switching between threads ---- */

/* ThreadSanitizer shall see the kernel's accesses to memory, but not the emulator's. It takes a
 * kernel's threads as ordered only where CUDA says so: after what was before the kernel (which they
 * learn from emu.host), by barriers, and before what comes after it (from emu.launches). */
struct emu_quiet {
    emu_quiet() {
        EMU_TSAN(AnnotateIgnoreReadsBegin(__FILE__, __LINE__);)
        EMU_TSAN(AnnotateIgnoreWritesBegin(__FILE__, __LINE__);)
    }
    ~emu_quiet() {
        EMU_TSAN(AnnotateIgnoreReadsEnd(__FILE__, __LINE__);)
        EMU_TSAN(AnnotateIgnoreWritesEnd(__FILE__, __LINE__);)
    }
};

/* emu_swap(&save, load) leaves its registers on the stack whose pointer goes to `save`, and returns
 * on the stack `load`. A new fiber's stack looks as if it had left so, to return to emu_start. */
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
    .cfi_undefined rip  # a debugger's backtrace ends here
    call emu_fiber_main
    ud2
    .cfi_endproc
    .size emu_start, . - emu_start
)");
extern "C" void emu_swap(void **save, void *load) noexcept;
extern "C" void emu_start(void);
#endif

static void emu_switch(emu_fiber *to) {
    emu_fiber *from = emu.current;
    emu.previous = from;
    emu.current = to;
    threadIdx = to->index;
#ifndef EMU_UCONTEXT
    void *sp = to->sp;
#endif
    EMU_ASAN(__sanitizer_start_switch_fiber(&from->fake_stack, to->stack, to->stack_bytes);)
    EMU_TSAN(__tsan_switch_to_fiber(to->tsan, __tsan_switch_to_fiber_no_sync);)
#ifdef EMU_UCONTEXT
    swapcontext(&from->context, &to->context);
#else
    emu_swap(&from->sp, sp);
#endif
    EMU_ASAN(__sanitizer_finish_switch_fiber(from->fake_stack, nullptr, nullptr);)
}

static emu_warp *emu_any_warp(void) {
    return &emu.block->warps[emu_random((uint32_t)emu.block->n_warps)];
}

/* The next thread: of this warp if one can run, else of another warp; null: none can run. */
static emu_fiber *emu_pick(emu_warp *warp) {
    emu_block *block = emu.block;
    if (!warp->runnable)
        warp = emu_any_warp();
    for (int i = 1; !warp->runnable && i < block->n_warps; i++)
        warp = warp + 1 < block->warps + block->n_warps ? warp + 1 : block->warps;
    if (!warp->runnable)
        return nullptr;
    uint32_t shift = emu_random(EMU_WARP);
    uint32_t turned = warp->runnable >> shift | warp->runnable << (-shift & 31);
    uint32_t lane = ((uint32_t)__builtin_ctz(turned) + shift) % EMU_WARP;
    return block->threads[(warp - block->warps) * EMU_WARP + lane];
}

/* No thread can run. Blames one that waits for other lanes, or else one at the barrier. */
__attribute__((noreturn)) static void emu_deadlock(void) {
    const emu_fiber *blamed = nullptr;
    for (int i = 0; i < emu.block->n_threads; i++) {
        const emu_fiber *fiber = emu.block->threads[i];
        emu_op op = fiber->warp->lanes[fiber->lane].op;
        if (op != EMU_RETURNED && (!blamed || op != EMU_SYNCTHREADS))
            blamed = fiber;
    }
    const emu_lane_state &lane = blamed->warp->lanes[blamed->lane];
    threadIdx = blamed->index;
    emu_print_place();
    fprintf(stderr, "waits forever at %s", emu_op_names[lane.op]);
    if (lane.op != EMU_SYNCTHREADS)
        fprintf(stderr, " with mask %08x for lanes %08x", lane.mask,
                lane.mask & ~blamed->warp->at_op);
    fprintf(stderr, ": ");
    emu_print_waiting();
    abort();
}

/* This thread waits, or has ended. Where no other can run, the block has ended, or has come as far
 * as it can before the kernel before it. */
static void emu_run_another(emu_warp *warp) {
    emu_block *block = emu.block;
    emu_fiber *next = emu_pick(warp);
    if (!next && (block->early || block->n_returned == block->n_threads))
        next = &emu.host;
    if (!next)
        emu_deadlock();
    if (next != emu.current)
        emu_switch(next);
}

static emu_fiber *emu_self(const char *call) {
    if (!emu_in_kernel())
        emu_report("%s outside a kernel", call);
    return emu.current;
}

static void emu_wait_at(emu_op op) {
    emu_fiber *self = emu.current;
    self->warp->runnable &= ~(1u << self->lane);
    self->warp->lanes[self->lane].op = op;
}

/* A fiber runs one block's thread after the other. */
extern "C" void emu_fiber_main(void) {
    EMU_ASAN(__sanitizer_finish_switch_fiber(nullptr, (const void **)&emu.previous->stack,
                                             &emu.previous->stack_bytes);)
    for (;;) {
        EMU_TSAN(__tsan_acquire(&emu.host);)
        emu.block->kernel->body();
        emu_quiet quiet;
        EMU_TSAN(__tsan_release(&emu.launches);)
        emu.block->n_returned++;
        emu_wait_at(EMU_RETURNED);
        emu_run_another(emu.current->warp);
    }
}

/* ---- rendezvous ---- */

void *emu_shared(void) {
    emu_self("DYNAMIC_SHARED");
    return emu.block->shared;
}

int emu_lane(void) {
    return emu_self("a warp operation")->lane;
}

/* ThreadSanitizer knows a barrier by an address, here one in the arena that is nothing else; by two
 * in turn, since a thread may come to the next barrier before others have left this. Number 0 is
 * the block's barrier, 1 + i that of lanes of which thread i is the first. */
static char *emu_arrive(unsigned number) {
    emu_turn *turn = &emu.block->turns[number];
    char *barrier = emu.block->arena + 2 * number + turn->odd;
    turn->used = true;
    EMU_TSAN(__tsan_release(barrier);)
    return barrier;
}

static void emu_leave(char *barrier) {
    (void)barrier;
    EMU_TSAN(__tsan_acquire(barrier);)
}

static void emu_forget_barriers(emu_block *block) { /* of the block that ran before */
    for (unsigned i = 0; i < 1 + EMU_MAX_THREADS; i++) {
        if (!block->turns[i].used)
            continue;
        EMU_TSAN(__tsan_mutex_destroy(block->arena + 2 * i, 0);)
        EMU_TSAN(__tsan_mutex_destroy(block->arena + 2 * i + 1, 0);)
        block->turns[i].used = false;
    }
}

void __syncthreads(void) {
    emu_quiet quiet;
    emu_fiber *self = emu_self("__syncthreads");
    emu_block *block = emu.block;
    char *barrier = emu_arrive(0);
    emu_wait_at(EMU_SYNCTHREADS);
    if (++block->n_at_barrier == block->n_threads) {
        block->n_at_barrier = 0;
        block->turns[0].odd ^= 1;
        for (int w = 0; w < block->n_warps; w++)
            block->warps[w].runnable = block->warps[w].all;
    }
    emu_run_another(self->warp);
    emu_leave(barrier);
}

void __threadfence(void) { /* what is before one is before what is after a later one */
    EMU_TSAN(__tsan_acquire(&emu.random);)
    EMU_TSAN(__tsan_release(&emu.random);)
}

/* An early block waits for the kernel before it; for others that has run. */
void grid_wait(void) {
    emu_quiet quiet;
    emu_fiber *self = emu_self("grid_wait");
    emu.block->grid_waited = true;
    if (!emu.block->early)
        return;
    emu_wait_at(EMU_GRID_WAIT);
    emu_run_another(self->warp);
    EMU_TSAN(__tsan_acquire(&emu.host);)
}

static float emu_from_bf16(uint32_t bits) {
    return __uint_as_float(bits << 16);
}

/* Gathers the fragments of all lanes into matrices, multiplies, and scatters. */
static void emu_mma(const emu_lane_state *lanes) {
    float a[16][16], b[16][8], c[16][8];
    for (int lane = 0; lane < EMU_WARP; lane++) {
        int row = lane / 4, col = lane % 4 * 2;
        for (int i = 0; i < 4; i++) {
            float *to = &a[row + i % 2 * 8][col + i / 2 * 8];
            to[0] = emu_from_bf16(lanes[lane].a[i]);
            to[1] = emu_from_bf16(lanes[lane].a[i] >> 16);
            c[row + i / 2 * 8][col + i % 2] = lanes[lane].c[i];
        }
        for (int i = 0; i < 2; i++) {
            b[col + i * 8][row] = emu_from_bf16(lanes[lane].b[i]);
            b[col + i * 8 + 1][row] = emu_from_bf16(lanes[lane].b[i] >> 16);
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
    for (uint32_t left = mask; left; left &= left - 1) {
        int lane = __builtin_ctz(left);
        if (lanes[lane].op != op || lanes[lane].mask != mask)
            emu_report("%s with mask %08x, but lane %d is at %s with mask %08x", emu_op_names[op],
                       mask, lane, emu_op_names[lanes[lane].op], lanes[lane].mask);
        if (op >= EMU_SHFL && op <= EMU_SHFL_UP && !(mask >> lanes[lane].source & 1))
            emu_report("%s: lane %d reads lane %d, which is not in the mask %08x", emu_op_names[op],
                       lane, lanes[lane].source, mask);
        votes |= (uint32_t)(lanes[lane].value & 1) << lane;
    }
    if (op == EMU_MMA)
        emu_mma(lanes);
    for (uint32_t left = mask; left; left &= left - 1) {
        emu_lane_state *lane = &lanes[__builtin_ctz(left)];
        lane->result = op == EMU_BALLOT ? votes
                       : op == EMU_ANY  ? votes != 0
                       : op == EMU_ALL  ? votes == mask
                                        : lanes[lane->source].value;
    }
    warp->at_op &= ~mask;
    warp->runnable |= mask;
}

/* The last lane that comes does the work for all and goes on, or now and then another warp does. */
uint64_t emu_warp_op(emu_op op, uint32_t mask, uint64_t value, int source) {
    emu_quiet quiet;
    emu_fiber *self = emu_self(emu_op_names[op]);
    emu_warp *warp = self->warp;
    emu_lane_state *lane = &warp->lanes[self->lane];
    uint32_t bit = 1u << self->lane;
    if (!(mask & bit))
        emu_report("%s with mask %08x, which is without its own lane %d", emu_op_names[op], mask,
                   self->lane);
    lane->mask = mask;
    lane->value = value;
    lane->source = source;
    emu_wait_at(op);
    warp->at_op |= bit;
    unsigned first = (unsigned)(warp - emu.block->warps) * EMU_WARP + (unsigned)__builtin_ctz(mask);
    char *barrier = op == EMU_SYNCWARP ? emu_arrive(1 + first) : nullptr;
    if ((warp->at_op & mask) != mask) {
        emu_run_another(warp);
    } else {
        emu_complete(warp, op, mask);
        emu.block->turns[1 + first].odd ^= 1;
        if (emu_random(8) == 0)
            emu_run_another(emu_any_warp());
    }
    if (barrier)
        emu_leave(barrier);
    return lane->result;
}

void mma_bf16(float c[4], const uint32_t a[4], const uint32_t b[2]) {
    emu_quiet quiet;
    emu_fiber *self = emu_self("mma_bf16");
    emu_lane_state *lane = &self->warp->lanes[self->lane];
    lane->c = c;
    lane->a = a;
    lane->b = b;
    emu_warp_op(EMU_MMA, 0xFFFFFFFF, 0, self->lane);
}

void copy_async16(void *shared, const void *global, bool valid) {
    emu_fiber *self = emu_self("copy_async16");
    ptrdiff_t offset = (char *)shared - emu.block->shared;
    size_t bytes = emu.block->kernel->shared_bytes;
    if ((uintptr_t)shared % 16)
        emu_misaligned(shared, 16, "copy_async16 to");
    if (valid && (uintptr_t)global % 16)
        emu_misaligned(global, 16, "copy_async16 from");
    if (offset < 0 || (size_t)offset + 16 > bytes)
        emu_report("copy_async16 to byte %td of %zu of shared memory", offset, bytes);
    memset(shared, EMU_GARBAGE, 16);
    EMU_ASAN(__asan_poison_memory_region(shared, 16);)
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
        EMU_ASAN(__asan_unpoison_memory_region(copy.to, 16);)
        if (copy.from)
            memcpy(copy.to, copy.from, 16);
        else
            memset(copy.to, 0, 16);
    }
    self->copies.erase(self->copies.begin(), self->copies.begin() + (ptrdiff_t)n);
}

/* ---- running a kernel ---- */

static char *emu_map(size_t bytes) { /* with a guard page before and behind */
    char *memory = (char *)mmap(nullptr, bytes + 2 * EMU_PAGE, PROT_NONE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory + EMU_PAGE, bytes, PROT_READ | PROT_WRITE) != 0)
        emu_report("no memory for %zu bytes", bytes);
    return memory + EMU_PAGE;
}

/* The block's shared memory ends as near to the guard page as its alignment allows. */
static void emu_fill_shared(emu_block *block) {
    size_t bytes = block->kernel->shared_bytes;
    char *end = block->arena + EMU_ARENA;
    block->shared = end - (bytes + EMU_SHARED_ALIGN - 1) / EMU_SHARED_ALIGN * EMU_SHARED_ALIGN;
    char *begin = block->shared - EMU_SHARED_ALIGN;
    EMU_TSAN(mmap(block->arena, EMU_ARENA, PROT_READ | PROT_WRITE, /* knows nothing of others */
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);)
    EMU_ASAN(__asan_unpoison_memory_region(block->arena, EMU_ARENA);)
    memset(begin, EMU_GARBAGE, (size_t)(end - begin));
    EMU_ASAN(__asan_poison_memory_region(block->arena, (size_t)(block->shared - block->arena));)
    EMU_ASAN(
        __asan_poison_memory_region(block->shared + bytes, (size_t)(end - block->shared) - bytes);)
}

static void emu_check_garbage(const emu_block *block, const char *begin, const char *end) {
    EMU_ASAN(return;)
    for (const char *p = begin; p < end; p++)
        if (*p != (char)EMU_GARBAGE)
            emu_report("shared memory out of bounds: byte %td of %zu was written",
                       p - block->shared, block->kernel->shared_bytes);
}

/* Stacks begin at different offsets in their pages, so that they do not share cache sets. */
static void emu_make_fiber(emu_fiber *fiber, unsigned i) {
    fiber->stack = emu_map(EMU_STACK);
    fiber->stack_bytes = EMU_STACK;
    EMU_TSAN(fiber->tsan = __tsan_create_fiber(0);)
    size_t used = EMU_STACK - i % 16 * 256;
#ifdef EMU_UCONTEXT
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack;
    fiber->context.uc_stack.ss_size = used;
    makecontext(&fiber->context, emu_fiber_main, 0);
#else
    void **sp = (void **)(fiber->stack + used) - 7; /* six registers, and where to return */
    sp[6] = (void *)emu_start;
    fiber->sp = sp;
#endif
}

/* ThreadSanitizer sees races of blocks only where they have different fibers: those of one fiber
 * come one after another, and its later ones know all that the earlier ones knew. */
static emu_fiber *emu_fiber_of(emu_block *block, unsigned i, unsigned n, unsigned turn) {
    unsigned set = turn % EMU_FIBER_SETS, index = set * n + (i + turn) % n;
    emu_fiber *fiber = &block->fibers[index];
    if (!fiber->stack)
        emu_make_fiber(fiber, index);
    return fiber;
}

static void emu_begin_block(emu_block *block, const emu_kernel *kernel, unsigned number) {
    emu_quiet quiet;
    const dim3 &dim = kernel->block;
    unsigned n = dim.x * dim.y * dim.z, turn = emu_random(EMU_FIBER_SETS * n);
    block->kernel = kernel;
    block->number = number;
    block->n_threads = (int)n;
    block->n_warps = (int)(n + EMU_WARP - 1) / EMU_WARP;
    block->n_at_barrier = block->n_returned = 0;
    block->early = block->grid_waited = false;
    if (!block->arena) {
        block->arena = emu_map(EMU_ARENA);
        block->fibers.reset(new emu_fiber[EMU_FIBER_SETS * EMU_MAX_THREADS]);
    }
    for (emu_warp &warp : block->warps)
        warp.all = warp.at_op = 0;
    for (unsigned i = 0; i < n; i++) {
        emu_fiber *fiber = block->threads[i] = emu_fiber_of(block, i, n, turn);
        fiber->index = {i % dim.x, i / dim.x % dim.y, i / dim.x / dim.y};
        fiber->warp = &block->warps[i / EMU_WARP];
        fiber->warp->all |= 1u << i % EMU_WARP;
        fiber->warp->runnable = fiber->warp->all;
        fiber->lane = (int)(i % EMU_WARP);
        fiber->n_groups = 0;
        fiber->copies.clear();
    }
    emu_forget_barriers(block);
    emu_fill_shared(block);
}

/* Runs the block's threads until none can go on. */
static void emu_go_on(emu_block *block) {
    emu_quiet quiet;
    const emu_kernel *kernel = block->kernel;
    unsigned n = block->number;
    blockDim = kernel->block;
    gridDim = kernel->grid;
    blockIdx = {n % gridDim.x, n / gridDim.x % gridDim.y, n / gridDim.x / gridDim.y};
    emu_catch_faults();
    emu.host_thread = pthread_self();
    EMU_TSAN(emu.host.tsan = __tsan_get_current_fiber();)
    EMU_TSAN(__tsan_release(&emu.host);)
    emu.block = block;
    emu.current = &emu.host;
    emu_run_another(emu_any_warp());
    emu_check_garbage(block, block->shared - EMU_SHARED_ALIGN, block->shared);
    emu_check_garbage(block, block->shared + kernel->shared_bytes, block->arena + EMU_ARENA);
    if (kernel->programmatic && !block->grid_waited)
        emu_report("launched to overlap the kernel before it, but never calls grid_wait");
    emu.block = nullptr;
}

/* Before the kernel before it runs, one of the kernel's blocks goes as far as grid_wait. */
static void emu_start_early(const emu_kernel *kernel) {
    emu_block *block = &emu.blocks[1];
    if (block->early)
        return;
    emu_begin_block(block, kernel, emu_random(kernel->grid.x * kernel->grid.y * kernel->grid.z));
    block->early = true;
    emu_go_on(block);
}

/* All blocks, in order, backwards or shuffled. */
static void emu_run_kernel(const emu_kernel *kernel) {
    std::vector<unsigned> order(kernel->grid.x * kernel->grid.y * kernel->grid.z);
    std::iota(order.begin(), order.end(), 0);
    uint32_t how = emu_random(4);
    if (how == 0)
        std::reverse(order.begin(), order.end());
    for (size_t i = order.size() - 1; how > 1 && i > 0; i--)
        std::swap(order[i], order[emu_random((uint32_t)i + 1)]);
    for (unsigned number : order) {
        emu_block *early = &emu.blocks[1], *block = &emu.blocks[0];
        if (early->early && early->kernel == kernel && early->number == number) {
            block = early;
            block->early = false;
            for (int i = 0; i < block->n_threads; i++) {
                const emu_fiber &fiber = *block->threads[i];
                if (fiber.warp->lanes[fiber.lane].op == EMU_GRID_WAIT)
                    fiber.warp->runnable |= 1u << fiber.lane;
            }
        } else {
            emu_begin_block(block, kernel, number);
        }
        emu_go_on(block);
    }
    EMU_TSAN(__tsan_acquire(&emu.launches);)
    emu.launches++;
}
#endif                        /* CUDA_EMU_IMPLEMENTATION */
#include "cuda_emu_runtime.h" /* streams, events, graphs, memory */
