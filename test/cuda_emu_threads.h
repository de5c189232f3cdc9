/* cuda_emu_threads.h: the threads of a GPU on a CPU. Runs a kernel, block after block; a thread of
 * the block is a fiber: a function with a stack of its own, which the emulator leaves and comes
 * back to. What kernels call is here; what the host calls to launch them is in cuda_emu.h.
 *
 *     static __global__ void add_kernel(float *x, float y, int n) {
 *         int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
 *         if (i < n)
 *             x[i] += y;
 *     }
 *     emu_kernel kernel = {"add_kernel", [=] { add_kernel(x, 1.0f, n); }, grid, block, 0, false};
 *     emu_run_kernel(&kernel);
 *
 * How a block runs. One fiber runs at a time, until it must wait: at __syncthreads for its block,
 * at sync_threads for a part of it, at a warp operation (shuffle, vote, __syncwarp, mma_bf16,
 * load_matrices, copy_piece) for its warp, at barrier_wait for the end of an mbarrier's phase, at
 * grid_wait for the kernel before it. Who waits marks itself so and hands over to another thread,
 * drawn at random (emu_run_another); the last one to come does the work for all and makes them
 * runnable. When no thread can run and some have not returned, they would wait forever: that is
 * reported, with what each waits for. A warp operation is for the whole warp: masks of a part of it
 * are refused.
 *
 * Where CUDA leaves an order open, another one is drawn each time; where it leaves a value
 * undefined, there are NaNs. So what is missing in a kernel shows as a wrong result:
 *   - Blocks run in order, backwards or shuffled; threads in random order.
 *   - A block's shared memory is as large as was asked for, and full of NaNs.
 *   - Each piece that is copied lands when it likes, at the latest when no thread can run (how late
 *     they are is drawn for each block); until then its target holds NaNs.
 *   - Where a launch may overlap the kernel before it, one of its blocks may run before that one,
 *     as far as grid_wait (emu_start_early).
 * What a GPU would answer with a hang or with garbage ends the program with one line that names the
 * kernel, the block and the thread: a barrier or a warp operation that some threads do not reach,
 * an mbarrier that is not set up or gets arrivals too many, a piece that lands when its block has
 * ended, an address that is not a multiple of what is loaded there, shared memory out of bounds.
 *
 * The sanitizers see what CUDA promises, and no more. AddressSanitizer finds accesses of shared
 * memory out of bounds, and of bytes that are still on their way. ThreadSanitizer takes the threads
 * of a kernel for threads, ordered by barriers, mbarriers, __syncwarp, grid_wait and add_ordered
 * alone, and a piece for a write of the lane that sends it, seen by those who wait for
 * it: it reports what is missing even where the order that was drawn hid it.
 *
 * What it is not: it does not tell what is fast, and a kernel in which a block waits for another
 * never ends. Include it in one file of a program. Read next: emu_warp_op, then emu_run_kernel. */
#ifndef CUDA_EMU_THREADS_H
#define CUDA_EMU_THREADS_H
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <type_traits>
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
#include <ucontext.h>
#endif

enum {
    EMU_WARP = 32,
    EMU_MAX_THREADS = 1024,
    EMU_MAX_WARPS = EMU_MAX_THREADS / EMU_WARP,
    EMU_NAMED_BARRIERS = 16, /* __syncthreads is number 0 */
    EMU_SHARED_ALIGN = 1024,
    EMU_ARENA = 232 << 10, /* room for a block's shared memory and 4 KB more, in whole pages */
    EMU_PAGE = 4096,
    EMU_STACK = EMU_ASAN(4 *) EMU_TSAN(4 *) 64 << 10, /* sanitizers make frames larger */
    EMU_FIBER_SETS = 1 EMU_TSAN(+1),                  /* see emu_fiber_of */
    EMU_SIGNAL_STACK = 64 << 10,
    EMU_GARBAGE = 0xFF /* a byte of a NaN, in f32 and in bf16; -1 in int */
};

/* ---- types and built-in variables ---- */

#define __global__ __attribute__((noinline))
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define DYNAMIC_SHARED(type, name) type *name = static_cast<type *>(emu_shared())

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

#define EMU_VECTOR2(name, type)                                                                    \
    struct alignas(2 * sizeof(type)) name {                                                        \
        type x, y;                                                                                 \
    };                                                                                             \
    static inline name make_##name(type x, type y) {                                               \
        return {x, y};                                                                             \
    }
EMU_VECTOR2(int2, int)
EMU_VECTOR2(uint2, unsigned)
EMU_VECTOR2(float2, float)

#define EMU_VECTOR4(name, type)                                                                    \
    struct alignas(16) name {                                                                      \
        type x, y, z, w;                                                                           \
    };                                                                                             \
    static inline name make_##name(type x, type y, type z, type w) {                               \
        return {x, y, z, w};                                                                       \
    }
EMU_VECTOR4(uint4, unsigned)
EMU_VECTOR4(float4, float)

uint3 threadIdx, blockIdx; /* of the thread that runs */
dim3 blockDim, gridDim;

/* ---- functions of one thread ---- */

static __forceinline__ float __uint_as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline uint32_t __float_as_uint(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

#define __expf(x) expf(x) /* a macro, because math.h declares a function of this name */

static inline float __fdividef(float x, float y) {
    return x / y;
}

/* Atomics: only one thread runs at a time. The builtins are for ThreadSanitizer. */
template <typename T, typename Change> static inline T emu_atomic(T *p, Change change) {
    T old, changed;
    __atomic_load(p, &old, __ATOMIC_RELAXED);
    changed = change(old);
    __atomic_store(p, &changed, __ATOMIC_RELAXED);
    return old;
}

template <typename T> static inline T atomicAdd(T *p, std::common_type_t<T> value) {
    return emu_atomic(
        p, [=](T old) { return old + value; });
}

template <typename T> static inline T atomicMax(T *p, std::common_type_t<T> value) {
    return emu_atomic(
        p, [=](T old) { return old > value ? old : value; });
}

/* Adds, and orders what each adder wrote before what later adders read. */
static inline int add_ordered(int *p, int value) {
    return __atomic_fetch_add(p, value, __ATOMIC_ACQ_REL);
}

/* Two floats as bf16, to nearest even; `low` in the low half. */
static inline uint32_t emu_bf16(float x) {
    uint32_t bits = __float_as_uint(x);
    return x != x ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

static inline uint32_t pack_bf16(float low, float high) {
    return emu_bf16(low) | emu_bf16(high) << 16;
}

static __forceinline__ float emu_from_bf16(uint32_t bits) {
    return __uint_as_float(bits << 16);
}

/* a * b + c, rounded once. x is exact, `rest` what the sum leaves out. The nearest float may lie
 * half-way between two bf16 where the exact value does not: then it moves a little to that side. */
static inline uint32_t emu_fma_bf16(uint32_t a, uint32_t b, uint32_t c) {
    double x = (double)emu_from_bf16(a) * emu_from_bf16(b), y = emu_from_bf16(c), sum = x + y;
    double y_part = sum - x, rest = (x - (sum - y_part)) + (y - y_part);
    float near = (float)sum;
    double beyond = sum - near + rest;
    if ((__float_as_uint(near) & 0xFFFF) == 0x8000 && beyond != 0)
        near = nextafterf(near, beyond > 0 ? INFINITY : -INFINITY);
    return emu_bf16(near);
}

static inline uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
    return (a & b) | c;
}

static inline uint32_t and_xor(uint32_t a, uint32_t b, uint32_t c) {
    return (a & b) ^ c;
}

static inline uint32_t fma_bf16(uint32_t a, uint32_t b, uint32_t c) {
    return emu_fma_bf16(a, b, c) | emu_fma_bf16(a >> 16, b >> 16, c >> 16) << 16;
}

static inline float half_to_float(uint16_t bits) {
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16, magnitude = bits & 0x7FFF;
    if (magnitude >= 0x7C00) /* infinity, NaN */
        return __uint_as_float(sign | 0x7F800000 | magnitude << 13);
    float value = __uint_as_float(magnitude << 13) * 0x1p112f; /* the exponent's new bias */
    return sign ? -value : value;
}

static inline void grid_launch_dependents(void) {} /* they may begin early in any case */
static inline void copies_see_stores(void) {}      /* they do */

/* ---- a block and its threads ---- */

#define EMU_OPS(X) /* where a thread waits; from EMU_SYNCWARP on, for the lanes of its warp */     \
    X(EMU_NONE, "can run")                                                                         \
    X(EMU_SYNCTHREADS, "__syncthreads")                                                            \
    X(EMU_SYNC_SOME, "sync_threads")                                                               \
    X(EMU_GRID_WAIT, "grid_wait")                                                                  \
    X(EMU_BARRIER_WAIT, "barrier_wait")                                                            \
    X(EMU_SYNCWARP, "__syncwarp")                                                                  \
    X(EMU_SHFL, "__shfl_sync")                                                                     \
    X(EMU_SHFL_XOR, "__shfl_xor_sync")                                                             \
    X(EMU_BALLOT, "__ballot_sync")                                                                 \
    X(EMU_ANY, "__any_sync")                                                                       \
    X(EMU_MMA, "mma_bf16")                                                                         \
    X(EMU_LOAD_MATRICES, "load_matrices")                                                          \
    X(EMU_TRANSPOSE, "transpose_matrix")                                                           \
    X(EMU_COPY_PIECES, "copy_pieces")                                                              \
    X(EMU_RETURNED, "returned")
#define EMU_NAME(op, name)   op,
#define EMU_STRING(op, name) name,
enum emu_op { EMU_OPS(EMU_NAME) };
static const char *const emu_op_names[] = {EMU_OPS(EMU_STRING)};

/* An mbarrier, in the 8 bytes that a kernel has for it. A phase is over when all arrivals have come
 * and all pieces that were sent in it have landed. ThreadSanitizer knows it by the address of one
 * of these bytes: the first or the second, by its parity. */
struct __attribute__((may_alias)) emu_mbarrier {
    uint16_t arrivals, missing, pieces; /* those still to come in this phase */
    uint8_t parity, mark;
};

enum { EMU_BARRIER_MARK = 0x5A };

struct emu_piece { /* of copy_pieces, on its way */
    void *to;
    const void *from;
    size_t bytes;
    emu_mbarrier *barrier;
};

struct emu_lane_state {
    emu_op op;  /* that it waits at, unless it is runnable */
    int source; /* lane, of shuffles */
    uint64_t value, result;
    uint32_t a[4], b[2]; /* of mma_bf16 */
    float c[4];
    uint16_t row[8]; /* of load_matrices */
    uint32_t matrices[4];
    bool transposed;
    const emu_mbarrier *barrier; /* of barrier_wait */
};

/* Of a block or a warp. ThreadSanitizer knows a barrier by an address; here by two in turn, since a
 * thread may come to the next barrier before others have left this one. */
struct emu_barrier {
    int n_waiting; /* of a block's */
    bool odd;
    char address[2];
};

struct emu_warp { /* masks of lanes: */
    uint32_t all, runnable, at_op;
    emu_lane_state lanes[EMU_WARP];
    emu_barrier barrier;
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
    int lane = 0;
    void *fake_stack = nullptr; /* of AddressSanitizer */
    void *tsan = nullptr;       /* of ThreadSanitizer */
};

struct emu_kernel { /* a launch */
    const char *name;
    std::function<void()> body; /* of one thread */
    dim3 grid, block;
    size_t shared_bytes;
    bool programmatic; /* may begin before the kernel before it ends */
};

struct emu_block {
    const emu_kernel *kernel = nullptr;
    unsigned number = 0;
    int n_threads = 0, n_warps = 0, n_returned = 0;
    bool early = false, grid_waited = false;  /* early: the kernel before it has not run */
    bool unready = false;                     /* barrier_init without barriers_ready */
    std::vector<emu_piece> pieces{};          /* the oldest first */
    uint32_t lateness = 1;                    /* about so many switches; then one lands */
    char *arena = nullptr, *shared = nullptr; /* shared: what it asked for, at the arena's end */
    std::unique_ptr<emu_fiber[]> fibers{};    /* (EMU_FIBER_SETS, n_threads) */
    emu_fiber *threads[EMU_MAX_THREADS];      /* (n_threads) */
    emu_warp warps[EMU_MAX_WARPS];            /* (n_warps) */
    emu_barrier barriers[EMU_NAMED_BARRIERS];
};

static struct {
    std::mutex mutex; /* guards all there is here: kernels run one by one */
    uint64_t random = 1;
    emu_block blocks[2];                               /* the second one for an early block */
    emu_block *block = nullptr;                        /* that runs, if any does */
    emu_fiber *current = nullptr, *previous = nullptr; /* of its threads */
    emu_fiber host;
    char begun, ended; /* addresses by which ThreadSanitizer knows these moments */
} emu;

static thread_local bool emu_in_kernel; /* does this host thread run one? */

/* What the emulator does on each switch. The sanitizers check what kernels do, and would make of
 * this most of a test's time; what a kernel gives it is copied where they see it. */
#define EMU_OWN __attribute__((no_sanitize("address", "undefined")))

EMU_OWN static uint32_t emu_random(uint32_t limit) { /* splitmix64; < limit */
    uint64_t z = emu.random += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return (uint32_t)((z >> 32) * limit >> 32);
}

/* All random orders to come follow from the seed. */
void emu_seed(uint64_t seed) {
    std::lock_guard<std::mutex> lock(emu.mutex);
    emu.random = seed;
}

/* ---- reports ---- */

static void emu_print_place(void) {
    fprintf(stderr, "cuda_emu: ");
    if (!emu_in_kernel)
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

/* For gdb, inside a kernel: what each thread of the block waits for. */
extern "C" void emu_where(void) {
    emu_print_place();
    if (!emu_in_kernel) {
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
    if (!emu_in_kernel)
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
    if (!emu_in_kernel)
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

static void emu_catch_faults(void) {
    EMU_ASAN(return;) /* it catches them itself */
    static thread_local char memory[EMU_SIGNAL_STACK];
    static thread_local bool ready;
    if (ready)
        return;
    ready = true;
    stack_t stack = {};
    stack.ss_sp = memory;
    stack.ss_size = sizeof memory;
    sigaltstack(&stack, nullptr);
    struct sigaction action = {};
    action.sa_sigaction = emu_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int number : {SIGSEGV, SIGBUS, SIGFPE})
        sigaction(number, &action, nullptr);
}

/* ---- switching between threads ---- */

/* ThreadSanitizer shall see the kernel's accesses to memory, but not the emulator's. It takes a
 * kernel's threads as ordered only where CUDA says so: after what was before the kernel (which they
 * learn from emu.begun), by barriers, and before what comes after it (from emu.ended). */
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

EMU_OWN static void emu_switch(emu_fiber *to) {
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

EMU_OWN static emu_warp *emu_any_warp(void) {
    return &emu.block->warps[emu_random((uint32_t)emu.block->n_warps)];
}

/* The next thread: of this warp if one can run, else of another warp; null: none can run. */
EMU_OWN static emu_fiber *emu_pick(emu_warp *warp) {
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

/* The phase is over if nothing is missing: those that wait for its end can run. */
static void emu_end_phase(emu_mbarrier *barrier) {
    if (barrier->missing > 0 || barrier->pieces > 0)
        return;
    barrier->parity ^= 1;
    barrier->missing = barrier->arrivals;
    for (int w = 0; w < emu.block->n_warps; w++) {
        emu_warp *warp = &emu.block->warps[w];
        for (int lane = 0; lane < EMU_WARP; lane++)
            if (warp->lanes[lane].op == EMU_BARRIER_WAIT && warp->lanes[lane].barrier == barrier)
                warp->runnable |= 1u << lane;
    }
}

/* A piece lands: any of them, an old one more likely. */
static void emu_land(void) {
    std::vector<emu_piece> &pieces = emu.block->pieces;
    uint32_t i = emu_random(1 + emu_random((uint32_t)pieces.size()));
    emu_piece piece = pieces[i];
    pieces.erase(pieces.begin() + i);
    EMU_ASAN(__asan_unpoison_memory_region(piece.to, piece.bytes);)
    memcpy(piece.to, piece.from, piece.bytes);
    piece.barrier->pieces--;
    emu_end_phase(piece.barrier);
}

/* No thread can run. Blames one that waits for other lanes, or else at an mbarrier, or else at a
 * barrier of the block. */
__attribute__((noreturn)) static void emu_deadlock(void) {
    const emu_fiber *blamed = nullptr;
    for (int i = 0; i < emu.block->n_threads; i++) {
        const emu_fiber *fiber = emu.block->threads[i];
        emu_op op = fiber->warp->lanes[fiber->lane].op;
        if (op != EMU_RETURNED && (!blamed || op > blamed->warp->lanes[blamed->lane].op))
            blamed = fiber;
    }
    const emu_lane_state &lane = blamed->warp->lanes[blamed->lane];
    threadIdx = blamed->index;
    emu_print_place();
    fprintf(stderr, "waits forever at %s", emu_op_names[lane.op]);
    if (lane.op == EMU_BARRIER_WAIT)
        fprintf(stderr, "(byte %td, %d) for %d of %d arrivals",
                (const char *)lane.barrier - emu.block->shared, lane.barrier->parity,
                lane.barrier->missing, lane.barrier->arrivals);
    if (lane.op >= EMU_SYNCWARP)
        fprintf(stderr, " for lanes %08x", ~blamed->warp->at_op);
    fprintf(stderr, ": ");
    emu_print_waiting();
    abort();
}

/* This thread waits, or has ended. Where no other can run, with all pieces there, the block has
 * ended, or has come as far as it can before the kernel before it. */
EMU_OWN static void emu_run_another(emu_warp *warp) {
    emu_block *block = emu.block;
    if (!block->pieces.empty() && emu_random(block->lateness) == 0)
        emu_land();
    emu_fiber *next = emu_pick(warp);
    for (; !next && !block->pieces.empty() && block->n_returned < block->n_threads;
         next = emu_pick(warp))
        emu_land();
    if (!next && (block->early || block->n_returned == block->n_threads))
        next = &emu.host;
    if (!next)
        emu_deadlock();
    if (next != emu.current)
        emu_switch(next);
}

EMU_OWN static emu_fiber *emu_self(const char *call) {
    if (!emu_in_kernel)
        emu_report("%s outside a kernel", call);
    return emu.current;
}

EMU_OWN static void emu_wait_at(emu_op op) {
    emu_fiber *self = emu.current;
    self->warp->runnable &= ~(1u << self->lane);
    self->warp->lanes[self->lane].op = op;
}

/* A fiber runs one block's thread after the other. */
extern "C" void emu_fiber_main(void) {
    EMU_ASAN(__sanitizer_finish_switch_fiber(nullptr, (const void **)&emu.previous->stack,
                                             &emu.previous->stack_bytes);)
    for (;;) {
        EMU_TSAN(__tsan_acquire(&emu.begun);)
        emu.block->kernel->body();
        emu_quiet quiet;
        EMU_TSAN(__tsan_release(&emu.ended);)
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

EMU_OWN static char *emu_arrive(emu_barrier *barrier) {
    char *address = &barrier->address[barrier->odd];
    EMU_TSAN(__tsan_release(address);)
    return address;
}

EMU_OWN static void emu_leave(char *address) {
    (void)address;
    EMU_TSAN(__tsan_acquire(address);)
}

/* The first n threads of the block wait for each other. */
EMU_OWN static void emu_sync(emu_op op, int index, int n) {
    emu_quiet quiet;
    emu_fiber *self = emu_self(emu_op_names[op]);
    emu_block *block = emu.block;
    emu_barrier *barrier = &block->barriers[index];
    if (self->warp >= block->warps + (n + EMU_WARP - 1) / EMU_WARP)
        emu_report("sync_threads<%d, %d>, but it is not one of these threads", index, n);
    char *address = emu_arrive(barrier);
    emu_wait_at(op);
    if (++barrier->n_waiting == n) {
        barrier->n_waiting = 0;
        barrier->odd ^= 1;
        for (int w = 0; w * EMU_WARP < n; w++)
            block->warps[w].runnable = block->warps[w].all;
    }
    emu_run_another(self->warp);
    emu_leave(address);
}

EMU_OWN void __syncthreads(void) {
    emu_sync(EMU_SYNCTHREADS, 0, emu_self("__syncthreads") ? emu.block->n_threads : 0);
}

template <int INDEX, int N> static void sync_threads(void) {
    static_assert(INDEX > 0 && INDEX < EMU_NAMED_BARRIERS && N > 0 && N % EMU_WARP == 0);
    emu_sync(EMU_SYNC_SOME, INDEX, N);
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
    EMU_TSAN(__tsan_acquire(&emu.begun);)
}

/* Gathers the fragments of all lanes into matrices, multiplies, and scatters. */
EMU_OWN static void emu_mma(emu_lane_state *lanes) {
    typedef float row_of_8 __attribute__((vector_size(32)));
    float a[16][16];
    row_of_8 b[16], c[16];
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
            c[row] += a[row][k] * b[k];
    for (int lane = 0; lane < EMU_WARP; lane++)
        for (int i = 0; i < 4; i++)
            lanes[lane].c[i] = c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

/* Lane 8 m + i has brought row i of matrix m; each gets two elements of each matrix. */
EMU_OWN static void emu_matrices(emu_lane_state *lanes) {
    for (int lane = 0; lane < EMU_WARP; lane++)
        for (int m = 0; m < 4; m++) {
            const emu_lane_state *rows = lanes + 8 * m;
            int i = lane / 4, j = lane % 4 * 2;
            lanes[lane].matrices[m] = lanes[lane].transposed
                                          ? rows[j].row[i] | (uint32_t)rows[j + 1].row[i] << 16
                                          : rows[i].row[j] | (uint32_t)rows[i].row[j + 1] << 16;
        }
}

/* Of a matrix spread like one of load_matrices: column i of rows j and j + 1. */
EMU_OWN static uint32_t emu_transposed(const emu_lane_state *lanes, int lane) {
    int i = lane / 4, j = lane % 4 * 2, shift = i % 2 * 16;
    return (lanes[j * 4 + i / 2].value >> shift & 0xFFFF) |
           (uint32_t)(lanes[j * 4 + 4 + i / 2].value >> shift) << 16;
}

/* All lanes have come: gives each its result. */
EMU_OWN static void emu_complete(emu_warp *warp, emu_op op) {
    uint32_t votes = 0;
    for (int lane = 0; lane < EMU_WARP; lane++) {
        if (warp->lanes[lane].op != op)
            emu_report("%s, but lane %d is at %s", emu_op_names[op], lane,
                       emu_op_names[warp->lanes[lane].op]);
        votes |= (uint32_t)(warp->lanes[lane].value & 1) << lane;
    }
    if (op == EMU_MMA)
        emu_mma(warp->lanes);
    if (op == EMU_LOAD_MATRICES)
        emu_matrices(warp->lanes);
    for (int i = 0; i < EMU_WARP; i++) {
        emu_lane_state &lane = warp->lanes[i];
        lane.result = op == EMU_BALLOT      ? votes
                      : op == EMU_ANY       ? votes != 0
                      : op == EMU_TRANSPOSE ? emu_transposed(warp->lanes, i)
                                            : warp->lanes[lane.source].value;
    }
    warp->at_op = 0;
    warp->runnable = warp->all;
}

/* Waits for all lanes of the warp, and returns what the operation gives this one. The last to come
 * does the work for all and goes on, or now and then another warp does. */
EMU_OWN static uint64_t emu_warp_op(emu_op op, uint32_t mask, uint64_t value, int source) {
    emu_quiet quiet;
    emu_fiber *self = emu_self(emu_op_names[op]);
    emu_warp *warp = self->warp;
    emu_lane_state *lane = &warp->lanes[self->lane];
    if (mask != 0xFFFFFFFF)
        emu_report("%s with mask %08x: only whole warps are emulated", emu_op_names[op], mask);
    lane->value = value;
    lane->source = source;
    emu_wait_at(op);
    warp->at_op |= 1u << self->lane;
    char *address = op == EMU_SYNCWARP ? emu_arrive(&warp->barrier) : nullptr;
    if (warp->at_op != 0xFFFFFFFF) {
        emu_run_another(warp);
    } else {
        emu_complete(warp, op);
        warp->barrier.odd ^= 1;
        if (emu_random(8) == 0)
            emu_run_another(emu_any_warp());
    }
    if (address)
        emu_leave(address);
    return lane->result;
}

static inline void __syncwarp(uint32_t mask = 0xFFFFFFFF) {
    emu_warp_op(EMU_SYNCWARP, mask, 0, 0);
}

static inline uint32_t __ballot_sync(uint32_t mask, int predicate) {
    return (uint32_t)emu_warp_op(EMU_BALLOT, mask, predicate != 0, 0);
}

static inline int __any_sync(uint32_t mask, int predicate) {
    return (int)emu_warp_op(EMU_ANY, mask, predicate != 0, 0);
}

template <typename T> static inline T emu_shuffle(emu_op op, uint32_t mask, T value, int source) {
    static_assert(sizeof value == 4 || sizeof value == 8, "shuffles move 4 or 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = emu_warp_op(op, mask, bits, source & (EMU_WARP - 1));
    memcpy(&value, &bits, sizeof value);
    return value;
}

template <typename T> static inline T __shfl_sync(uint32_t mask, T value, int source) {
    return emu_shuffle(EMU_SHFL, mask, value, source);
}

template <typename T> static inline T __shfl_xor_sync(uint32_t mask, T value, int bits) {
    return emu_shuffle(EMU_SHFL_XOR, mask, value, emu_self("__shfl_xor_sync")->lane ^ bits);
}

/* c += a b of a warp: (16, 16) x (16, 8) bf16, in the fragments of mma.m16n8k16.row.col. Each
 * output is summed in f32 over k = 0..15, from c on. */
void mma_bf16(float c[4], const uint32_t a[4], const uint32_t b[2]) {
    emu_quiet quiet;
    emu_fiber *self = emu_self("mma_bf16");
    emu_lane_state *lane = &self->warp->lanes[self->lane];
    memcpy(lane->a, a, sizeof lane->a);
    memcpy(lane->b, b, sizeof lane->b);
    memcpy(lane->c, c, sizeof lane->c);
    emu_warp_op(EMU_MMA, 0xFFFFFFFF, 0, self->lane);
    memcpy(c, lane->c, sizeof lane->c);
}

/* ---- loads and copies ---- */

static void emu_check_aligned(const void *p, size_t bytes, const char *call) {
    if ((uintptr_t)p % bytes)
        emu_report("%s(%p): the address is not a multiple of %zu", call, p, bytes);
}

template <typename T> static inline T emu_load(const void *p, const char *call) {
    T value;
    emu_check_aligned(p, sizeof value, call);
    memcpy(&value, p, sizeof value);
    return value;
}

static inline uint4 load16(const void *p) {
    return emu_load<uint4>(p, "load16");
}

static inline uint2 load8(const void *p) {
    return emu_load<uint2>(p, "load8");
}

/* Loads and stores with a hint for the caches. */
template <typename T> static inline T __ldcg(const T *p) {
    return emu_load<T>(p, "__ldcg");
}

template <typename T> static inline void __stcg(T *p, T value) {
    emu_check_aligned(p, sizeof value, "__stcg");
    *p = value;
}

static void emu_check_shared(const void *p, size_t bytes, size_t align, const char *call) {
    emu_self(call);
    ptrdiff_t offset = (const char *)p - emu.block->shared;
    emu_check_aligned(p, align, call);
    if (offset < 0 || (size_t)offset + bytes > emu.block->kernel->shared_bytes)
        emu_report("%s: byte %td, %zu of them, of %zu of shared memory", call, offset, bytes,
                   emu.block->kernel->shared_bytes);
}

static inline void load_matrices(uint32_t r[4], const void *row, bool transposed = false) {
    emu_check_shared(row, 16, 16, "load_matrices");
    uint4 own = load16(row);
    emu_quiet quiet;
    emu_lane_state *lane = &emu.current->warp->lanes[emu.current->lane];
    memcpy(lane->row, &own, 16);
    lane->transposed = transposed;
    emu_warp_op(EMU_LOAD_MATRICES, 0xFFFFFFFF, 0, 0);
    memcpy(r, lane->matrices, sizeof lane->matrices);
}

static inline void load_matrices_transposed(uint32_t r[4], const void *row) {
    load_matrices(r, row, true);
}

static inline uint32_t transpose_matrix(uint32_t own) {
    return (uint32_t)emu_warp_op(EMU_TRANSPOSE, 0xFFFFFFFF, own, 0);
}

/* ---- mbarriers, and copies that arrive at them ---- */

void barrier_init(uint64_t *barrier, int arrivals) {
    emu_check_shared(barrier, 8, 8, "barrier_init");
    *barrier = 0; /* for ThreadSanitizer to see */
    emu_quiet quiet;
    emu_mbarrier *b = (emu_mbarrier *)barrier;
    if (arrivals <= 0 || arrivals > EMU_MAX_THREADS)
        emu_report("barrier_init for %d arrivals", arrivals);
    *b = {(uint16_t)arrivals, (uint16_t)arrivals, 0, 0, EMU_BARRIER_MARK};
    emu.block->unready = true;
    EMU_TSAN(__tsan_mutex_destroy((char *)b, 0);)
    EMU_TSAN(__tsan_mutex_destroy((char *)b + 1, 0);)
}

void barriers_ready(void) {
    emu_quiet quiet;
    emu_self("barriers_ready");
    emu.block->unready = false;
}

static emu_mbarrier *emu_mbarrier_at(uint64_t *barrier, const char *call) {
    emu_check_shared(barrier, 8, 8, call);
    (void)*(volatile uint64_t *)barrier; /* for ThreadSanitizer to see */
    emu_quiet quiet;
    emu_mbarrier *b = (emu_mbarrier *)barrier;
    if (b->mark != EMU_BARRIER_MARK)
        emu_report("%s before barrier_init", call);
    if (emu.block->unready)
        emu_report("%s before barriers_ready", call);
    return b;
}

static void emu_arrive_at(emu_mbarrier *barrier, const char *call) {
    emu_quiet quiet;
    if (barrier->missing == 0)
        emu_report("%s, but all %d arrivals have come", call, barrier->arrivals);
    EMU_TSAN(__tsan_release((char *)barrier + barrier->parity);)
    barrier->missing--;
    emu_end_phase(barrier);
}

void barrier_arrive(uint64_t *barrier) {
    emu_arrive_at(emu_mbarrier_at(barrier, "barrier_arrive"), "barrier_arrive");
}

/* Waits while the phase has this parity: also where two have gone by, as a GPU might. */
void barrier_wait(uint64_t *barrier, uint32_t parity) {
    emu_mbarrier *b = emu_mbarrier_at(barrier, "barrier_wait");
    emu_quiet quiet;
    emu_fiber *self = emu.current;
    if (parity > 1)
        emu_report("barrier_wait with parity %u", parity);
    while (b->parity == parity) {
        self->warp->lanes[self->lane].barrier = b;
        emu_wait_at(EMU_BARRIER_WAIT);
        emu_run_another(self->warp);
    }
    EMU_TSAN(__tsan_acquire((char *)b + parity);)
}

enum { COPY_ARRIVALS = 1 };

/* The first copy is for the sanitizers, who take it for this thread's; then the target is garbage,
 * until the piece lands (emu_land). */
static void emu_send_piece(void *to, const void *from, size_t bytes, emu_mbarrier *barrier) {
    emu_check_shared(to, bytes, 16, "copy_pieces to");
    emu_check_aligned(from, 16, "copy_pieces from");
    if (bytes % 16)
        emu_report("copy_pieces of %zu bytes: not a multiple of 16", bytes);
    memcpy(to, from, bytes);
    emu_quiet quiet;
    EMU_TSAN(__tsan_release((char *)barrier + barrier->parity);)
    memset(to, EMU_GARBAGE, bytes);
    EMU_ASAN(__asan_poison_memory_region(to, bytes);)
    barrier->pieces++;
    emu.block->pieces.push_back({to, from, bytes, barrier});
}

void copy_pieces(void *to, const void *from, uint32_t bytes, bool, uint64_t *barrier) {
    emu_mbarrier *b = emu_mbarrier_at(barrier, "copy_pieces");
    if (bytes > 0)
        emu_send_piece(to, from, bytes, b);
    emu_warp_op(EMU_COPY_PIECES, 0xFFFFFFFF, 0, 0);
}

void copy_piece(void *to, const void *from, uint32_t bytes, bool once, uint64_t *barrier) {
    uint64_t own = (uint64_t)to * 3 ^ (uint64_t)from * 5 ^ (uint64_t)barrier * 7 ^ bytes;
    if (__shfl_sync(0xFFFFFFFF, own, 0) != own)
        emu_report("copy_piece: lanes name different pieces");
    copy_pieces(to, from, emu_self("copy_piece")->lane == 0 ? bytes : 0, once, barrier);
}

void copies_sent(uint64_t *barrier) {
    emu_warp_op(EMU_COPY_PIECES, 0xFFFFFFFF, 0, 0);
    if (emu.current->lane == 0)
        emu_arrive_at(emu_mbarrier_at(barrier, "copies_sent"), "copies_sent");
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
EMU_OWN static emu_fiber *emu_fiber_of(emu_block *block, unsigned i, unsigned n, unsigned turn) {
    unsigned set = turn % EMU_FIBER_SETS, index = set * n + (i + turn) % n;
    emu_fiber *fiber = &block->fibers[index];
    if (!fiber->stack)
        emu_make_fiber(fiber, index);
    return fiber;
}

EMU_OWN static void emu_forget(emu_barrier *barrier) { /* what the block before it did there */
    barrier->n_waiting = 0;
    EMU_TSAN(__tsan_mutex_destroy(&barrier->address[0], 0);)
    EMU_TSAN(__tsan_mutex_destroy(&barrier->address[1], 0);)
}

EMU_OWN static void emu_begin_block(emu_block *block, const emu_kernel *kernel, unsigned number) {
    emu_quiet quiet;
    const dim3 &dim = kernel->block;
    unsigned n = dim.x * dim.y * dim.z, turn = emu_random(EMU_FIBER_SETS * n);
    block->kernel = kernel;
    block->number = number;
    block->n_threads = (int)n;
    block->n_warps = (int)(n + EMU_WARP - 1) / EMU_WARP;
    block->n_returned = 0;
    block->early = block->grid_waited = block->unready = false;
    block->lateness = 1u << emu_random(12);
    block->pieces.clear();
    if (!block->arena) {
        block->arena = emu_map(EMU_ARENA);
        block->fibers.reset(new emu_fiber[EMU_FIBER_SETS * EMU_MAX_THREADS]);
    }
    for (emu_barrier &barrier : block->barriers)
        emu_forget(&barrier);
    for (emu_warp &warp : block->warps) {
        warp.all = warp.at_op = 0;
        emu_forget(&warp.barrier);
    }
    for (unsigned i = 0; i < n; i++) {
        emu_fiber *fiber = block->threads[i] = emu_fiber_of(block, i, n, turn);
        fiber->index = {i % dim.x, i / dim.x % dim.y, i / dim.x / dim.y};
        fiber->warp = &block->warps[i / EMU_WARP];
        fiber->warp->all |= 1u << i % EMU_WARP;
        fiber->warp->runnable = fiber->warp->all;
        fiber->lane = (int)(i % EMU_WARP);
    }
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
    emu_in_kernel = true;
    EMU_TSAN(emu.host.tsan = __tsan_get_current_fiber();)
    EMU_TSAN(__tsan_release(&emu.begun);)
    emu.block = block;
    emu.current = &emu.host;
    emu_run_another(emu_any_warp());
    emu_check_garbage(block, block->shared - EMU_SHARED_ALIGN, block->shared);
    emu_check_garbage(block, block->shared + kernel->shared_bytes, block->arena + EMU_ARENA);
    if (block->n_returned == block->n_threads && !block->pieces.empty())
        emu_report("the block ends while pieces of copy_pieces are on their way");
    if (kernel->programmatic && !block->grid_waited)
        emu_report("launched to overlap the kernel before it, but never calls grid_wait");
    emu.block = nullptr;
    emu_in_kernel = false;
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
    EMU_TSAN(__tsan_acquire(&emu.ended);)
}
#endif /* CUDA_EMU_THREADS_H */
