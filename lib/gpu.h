/* gpu.h: what a CUDA program needs beside its kernels, on the host and on the GPU.
 *
 * On the host: calls whose faults are told in one line, which says what was being done; launches
 * that may overlap; tickets for copies, which are polled; memory for uploads, two buffers in turns.
 * On the GPU: one small function for each instruction that CUDA C++ has no words for. This is the
 * only place with inline PTX: with CUDA_EMULATED the same names come from an emulator, where a warp
 * is 32 fibers on a CPU, so every kernel can be run, tested and stepped through without a GPU.
 *
 *     __global__ void double_kernel(float *x, int n) {
 *         grid_launch_dependents();         // the next one may begin, as far as its own grid_wait
 *         grid_wait();                      // what the kernel before wrote is there
 *         int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
 *         if (i < n)
 *             x[i] *= 2.0f;
 *     }
 *     struct gpu gpu = {"twice", 0, &properties, stream};
 *     gpu_enter(&gpu, "doubling");
 *     gpu_launch(&gpu, "double_kernel", double_kernel, dim3((n + 255) / 256), 256, 0, x, n);
 *     GPU_TRY(&gpu, cudaStreamSynchronize(stream)); // or it ends, "while doubling"
 *
 * One thread at a time uses a struct gpu; several of them may stand for one GPU. #define
 * GPU_IMPLEMENTATION before including it in one file.
 *
 * A warp multiplies by mma_bf16: c (16, 8) += a (16, 16) . b (16, 8), spread over its 32 lanes.
 * With group = lane / 4 and quad = lane % 4, a lane holds
 *     c[0], c[1]   row group,     columns 2 quad, 2 quad + 1      c[2], c[3]   row group + 8
 *     a[0]         row group,     k 2 quad, 2 quad + 1            a[1]         row group + 8
 *     a[2]         row group,     k 2 quad + 8, 2 quad + 9        a[3]         row group + 8
 *     b[0]         column group,  k 2 quad, 2 quad + 1            b[1]         k 2 quad + 8, + 9
 * each a[i] and b[i] two bf16, the first in the low half (PTX ISA, "Matrix Fragments for
 * mma.m16n8k16"). On Hopper four warps can multiply together, b in shared memory: see wgmma. */
#ifndef GPU_H
#define GPU_H
#include <assert.h>
#include <stddef.h>
#include <stdint.h>

#ifdef CUDA_EMULATED /* with test/ among the folders of includes */
#include "cuda_emu.h"
#define DEVICE            static inline
#define load16_once(from) load16(from)
#define exp2_approx(x)    exp2f(x)
#define cospi(x)          cos(3.14159265358979324 * (x))
#define sinpi(x)          sin(3.14159265358979324 * (x))
#else
#include <cuda_runtime.h>

#define DEVICE __device__ __forceinline__
#define DYNAMIC_SHARED(type, name)                                                                 \
    extern __shared__ __align__(1024) uint4 dynamic_shared[];                                      \
    type *name = reinterpret_cast<type *>(dynamic_shared)
#define emu_next_kernel(name) (void)(name)
#define emu_seed(seed)        (void)(seed)

DEVICE void mma_bf16(float c[4], const uint32_t a[4], const uint32_t b[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* Two floats as bf16, to nearest even; `low` in the low half. */
DEVICE uint32_t pack_bf16(float low, float high) {
    uint32_t both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

DEVICE float half_to_float(uint16_t bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

DEVICE float exp2_approx(float x) { /* 2^x to 2 ulp, subnormal results 0 */
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* ---- barriers in shared memory, and copies that arrive at them ----
 * An mbarrier counts arrivals; when as many have come as barrier_init says, its phase is over and
 * the next one begins. Phases alternate in parity, from 0 on: barrier_wait(b, 0) waits for the end
 * of the first. */

DEVICE uint32_t shared_address(const void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}

DEVICE void barrier_init(uint64_t *barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(arrivals)
                 : "memory");
}

/* By whoever has set up barriers, before the __syncthreads that shows them to the others. */
DEVICE void barriers_ready() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

DEVICE void barrier_arrive(uint64_t *barrier) {
    asm volatile(
        "{ .reg .b64 t; mbarrier.arrive.shared::cta.b64 t, [%0]; }" ::"r"(shared_address(barrier))
        : "memory");
}

#if __CUDA_ARCH__ >= 900 /* may sleep for a while; older chips ask again and again */
#define BARRIER_ASK "try_wait"
enum { COPY_ARRIVALS = 1 };
#else
#define BARRIER_ASK "test_wait"
enum { COPY_ARRIVALS = 32 };
#endif
DEVICE void barrier_wait(uint64_t *barrier, uint32_t parity) {
    uint32_t done, address = shared_address(barrier);
    do
        asm volatile("{ .reg .pred p; mbarrier." BARRIER_ASK ".parity.shared::cta.b64 p, [%1], %2;"
                     " selp.u32 %0, 1, 0, p; }"
                     : "=r"(done)
                     : "r"(address), "r"(parity)
                     : "memory");
    while (!done);
}

/* From device to shared memory, by all 32 lanes: copy_piece one piece, which all name alike,
 * copy_pieces one of each lane's own. A piece is `bytes` (a multiple of 16, or 0: none) of 16-byte
 * aligned memory. once: it is not to be read again soon. (What products read often has no hint:
 * even the default's made those of prompts a fifth slower, as if L2 then answered multiprocessors
 * one by one that ask for the same.) Pieces arrive at the barrier some time after copies_sent,
 * which all lanes call too: that is COPY_ARRIVALS arrivals there, and the phase does not end before
 * the pieces are all there. */
#if __CUDA_ARCH__ >= 900
DEVICE void bulk_copy(void *to, const void *from, uint32_t bytes, bool once, uint64_t *barrier) {
    const uint32_t target = shared_address(to), arrival = shared_address(barrier);
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(arrival),
                 "r"(bytes)
                 : "memory");
    if (once) {
        uint64_t policy;
        asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
                     ".L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(target),
                     "l"(from), "r"(bytes), "r"(arrival), "l"(policy)
                     : "memory");
    } else
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
                     " [%0], [%1], %2, [%3];" ::"r"(target),
                     "l"(from), "r"(bytes), "r"(arrival)
                     : "memory");
}
#endif

DEVICE void copy_piece(void *to, const void *from, uint32_t bytes, bool once, uint64_t *barrier) {
#if __CUDA_ARCH__ >= 900
    if (bytes > 0 && threadIdx.x % 32 == 0)
        bulk_copy(to, from, bytes, once, barrier);
#else
    (void)once, (void)barrier;
    for (uint32_t at = threadIdx.x % 32 * 16; at < bytes; at += 32 * 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to) + at),
                     "l"((const char *)from + at)
                     : "memory");
#endif
}

DEVICE void copy_pieces(void *to, const void *from, uint32_t bytes, bool once, uint64_t *barrier) {
#if __CUDA_ARCH__ >= 900
    if (bytes > 0)
        bulk_copy(to, from, bytes, once, barrier);
#else
    for (uint32_t left = __ballot_sync(0xffffffffu, bytes > 0); left; left &= left - 1) {
        const int lane = __ffs((int)left) - 1;
        copy_piece((void *)__shfl_sync(0xffffffffu, (unsigned long long)to, lane),
                   (const void *)__shfl_sync(0xffffffffu, (unsigned long long)from, lane),
                   __shfl_sync(0xffffffffu, bytes, lane), once, barrier);
    }
#endif
}

DEVICE void copies_sent(uint64_t *barrier) {
#if __CUDA_ARCH__ >= 900
    __syncwarp();
    if (threadIdx.x % 32 == 0)
        barrier_arrive(barrier);
#else
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier))
                 : "memory");
#endif
}

/* What other kernels stored is there for copies too: after grid_wait. */
DEVICE void copies_see_stores() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.global;" ::: "memory");
#endif
}

/* A barrier of the first `threads` threads of the block, one of 15; index 1 to 15. */
template <int INDEX, int THREADS_> DEVICE void sync_threads() {
    asm volatile("bar.sync %0, %1;" ::"n"(INDEX), "n"(THREADS_) : "memory");
}

/* Adds, and returns what was there. Whoever sees a value sees what was written before the additions
 * that made it, by all threads that a barrier ordered before them. */
DEVICE int add_ordered(int *counter, int value) {
    int before;
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], %2;"
                 : "=r"(before)
                 : "l"(counter), "r"(value)
                 : "memory");
    return before;
}

/* Four 8 x 8 matrices of 16-bit elements: lane i names row i % 8 of matrix i / 8 (16 bytes). r[m]:
 * of matrix m, row lane / 4, columns lane % 4 * 2 and + 1; transposed: the other way round. */
DEVICE void load_matrices(uint32_t r[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

DEVICE void load_matrices_transposed(uint32_t r[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

/* An 8 x 8 matrix of 16-bit elements, spread over a warp as by load_matrices, transposed. */
DEVICE uint32_t transpose_matrix(uint32_t own) {
    uint32_t r;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(own));
    return r;
}

/* (a & b) | c, or (a & b) ^ c, in one instruction (which takes one constant, no two). */
DEVICE uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

DEVICE uint32_t and_xor(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

/* a * b + c of two bf16 each, rounded once. */
DEVICE uint32_t fma_bf16(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

/* ---- products of a warpgroup, on Hopper alone ----
 * Four warps multiply together: sum (64, N) += a (64, 16) . b (16, N), a in registers, b in shared
 * memory. Warp w of the four has rows 16 w to 16 w + 15 of a and of the sum, in the order of
 * mma_bf16: sum[4 j + e] is what c[e] is of columns 8 j to 8 j + 7. The tensor cores work on while
 * the warps go on: between wgmma_begin and wgmma_wait nothing may touch sum or a. */
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define HOPPER 1

/* b: k in rows of 64 columns, 128 bytes each, 16-byte chunks at chunk ^ row % 8; 1024-byte aligned.
 * The next 64 columns lie `apart` bytes further. k 16 i to 16 i + 15: add 128 i. (PTX ISA, "Matrix
 * Descriptor Format": 128-byte swizzle.) */
DEVICE uint64_t wgmma_columns(const void *p, uint32_t apart) {
    return (uint64_t)((shared_address(p) & 0x3ffff) >> 4) | (uint64_t)(apart >> 4) << 16 |
           (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}

/* b the other way round: N rows of 64 k; `apart` means nothing. k 16 i to 16 i + 15: add 2 i. */
DEVICE uint64_t wgmma_rows(const void *p) {
    return wgmma_columns(p, 16);
}

DEVICE void wgmma_begin() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

DEVICE void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int NEWEST> DEVICE void wgmma_wait() { /* for all but so many committed groups */
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(NEWEST) : "memory");
}

/* How many registers each thread of a warpgroup has from now on: some leave what others take. */
template <int N> DEVICE void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

template <int N> DEVICE void leave_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

/* What this thread stored to shared memory is there for products: before a barrier of all. */
DEVICE void wgmma_sees_stores() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

#define WGMMA_F4(i)  "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3])
#define WGMMA_F8(i)  WGMMA_F4(i), WGMMA_F4(i + 4)
#define WGMMA_F16(i) WGMMA_F8(i), WGMMA_F8(i + 8)
#define WGMMA_F32(i) WGMMA_F16(i), WGMMA_F16(i + 16)
#define WGMMA_F64(i) WGMMA_F32(i), WGMMA_F32(i + 32)
#define WGMMA_4      "%0, %1, %2, %3"
#define WGMMA_8      WGMMA_4 ", %4, %5, %6, %7"
#define WGMMA_16     WGMMA_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_32                                                                                   \
    WGMMA_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_64                                                                                   \
    WGMMA_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"    \
             ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_128                                                                                  \
    WGMMA_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"    \
             ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"    \
             ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109"    \
             ", %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122"      \
             ", %123, %124, %125, %126, %127"
#define WGMMA(N, TURNED, SUMS, A, B, P, ...)                                                       \
    if constexpr (COLUMNS == N && TRANSPOSED == TURNED)                                            \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, " P ", 0;\n"                                      \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" SUMS "}, {" A        \
                 "}, " B ", p, 1, 1, " #TURNED "; }\n"                                             \
                 : __VA_ARGS__                                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)adds))

/* adds: to what the sum is; else it begins at 0. TRANSPOSED 1: b is of wgmma_columns. */
template <int COLUMNS, int TRANSPOSED = 0>
DEVICE void wgmma(float (&sum)[COLUMNS / 2], const uint32_t a[4], uint64_t b, bool adds) {
    WGMMA(32, 0, WGMMA_16, "%16, %17, %18, %19", "%20", "%21", WGMMA_F16(0));
    WGMMA(64, 0, WGMMA_32, "%32, %33, %34, %35", "%36", "%37", WGMMA_F32(0));
    WGMMA(64, 1, WGMMA_32, "%32, %33, %34, %35", "%36", "%37", WGMMA_F32(0));
    WGMMA(128, 0, WGMMA_64, "%64, %65, %66, %67", "%68", "%69", WGMMA_F64(0));
    WGMMA(128, 1, WGMMA_64, "%64, %65, %66, %67", "%68", "%69", WGMMA_F64(0));
    WGMMA(256, 0, WGMMA_128, "%128, %129, %130, %131", "%132", "%133", WGMMA_F64(0), WGMMA_F64(64));
}
#endif

/* Programmatic dependent launch: a kernel may start while the one before it still runs, and waits
 * here before it touches what that one writes. On older chips, or `alone`, it starts afterwards. */
DEVICE void grid_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

DEVICE void grid_launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

DEVICE uint4 load16(const void *from) {
    return *reinterpret_cast<const uint4 *>(from);
}

DEVICE uint2 load8(const void *from) {
    return *reinterpret_cast<const uint2 *>(from);
}

DEVICE uint4 load16_once(const void *from) { /* of device memory: not into the L1 cache */
    uint4 value;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
        : "l"(from));
    return value;
}
#endif

#ifndef HOPPER /* products are done at once, and registers are what they are */
DEVICE void wgmma_begin() {}
DEVICE void wgmma_commit() {}
template <int NEWEST> DEVICE void wgmma_wait() {}
template <int N> DEVICE void take_registers() {}
template <int N> DEVICE void leave_registers() {}
DEVICE void wgmma_sees_stores() {}
#endif

/* sum (16 rows of a warp, COLUMNS) += a . b of 16 k, or = where not `adds`: the same registers on
 * every chip. rows: COLUMNS of b as wgmma_rows has them; k 16 i to 16 i + 15 of their 64. On
 * Hopper more than FEW_COLUMNS are only under way afterwards: see wgmma_begin. */
enum { FEW_COLUMNS = 16 };
template <int COLUMNS>
DEVICE void multiply_rows(float (&sum)[COLUMNS / 2], const uint32_t a[4], const uint8_t *rows,
                          int i, bool adds) {
#ifdef HOPPER
    if constexpr (COLUMNS > FEW_COLUMNS)
        return wgmma<COLUMNS>(sum, a, wgmma_rows(rows) + 2 * i, adds);
#endif
    const int lane = (int)threadIdx.x % 32;
    uint32_t b[4]; /* of 16 columns, or of the last 8 twice */
    for (int j = 0; j < COLUMNS / 8; j++) {
        int row = (j / 2 * 2 + lane / 16 < COLUMNS / 8 ? j / 2 * 2 + lane / 16 : j) * 8 + lane % 8;
        if (j % 2 == 0)
            load_matrices(b, rows + row * 128 + ((i * 2 + lane / 8 % 2) ^ row % 8) * 16);
        for (int e = 0; e < 4 && !adds; e++)
            sum[j * 4 + e] = 0.0f;
        mma_bf16(&sum[j * 4], a, b + j % 2 * 2);
    }
}

/* ---- the host's side ---- */

enum {
    GPU_TICKETS = 1024, /* of one stream that can be open; each is an event */
    GPU_PIECES = 64     /* of memory that gpu_take can give */
};

struct gpu {             /* the first part is the caller's to fill in */
    const char *program; /* begins the line of a fault */
    int index;
    const cudaDeviceProp *properties;
    cudaStream_t stream; /* that gpu_launch puts kernels into */
    void (*lost)(
        void *context); /* a fault has been told; NULL, or if it returns: the program ends */
    void *context;
    const char *doing;   /* for messages */
    bool alone;          /* what is launched begins when all before it has ended */
    uint64_t n_launches; /* counts gpu_launch; the caller may set it */
    void *pieces[GPU_PIECES];
    int n_pieces;
};

/* Tells of a fault, calls `lost` and ends the program, unless `error` is success. `call`: its text
 * or name. */
void gpu_check(const struct gpu *gpu, cudaError_t error, const char *call, const char *file,
               int line);
#define GPU_TRY(gpu, call) gpu_check(gpu, call, #call, __FILE__, __LINE__)
/* Makes it the current device of this thread. */
void gpu_enter(struct gpu *gpu, const char *doing);

/* Tickets for what has been put into a stream: 1, 2, ... in its order. Zeroed before it is opened.
 * gpu_ticket waits where GPU_TICKETS of them are open. */
struct gpu_tickets {
    cudaEvent_t event[GPU_TICKETS];
    uint64_t given, done;
};
void gpu_tickets_open(const struct gpu *gpu, struct gpu_tickets *tickets);
void gpu_tickets_close(const struct gpu *gpu, struct gpu_tickets *tickets);
uint64_t gpu_ticket(const struct gpu *gpu, struct gpu_tickets *tickets, cudaStream_t stream);
bool gpu_ticket_done(const struct gpu *gpu, struct gpu_tickets *tickets, uint64_t ticket);

/* Two buffers on either side, so that one is filled while the GPU works on the other. Zeroed
 * before it is opened.
 *     gpu_staging_reserve   makes both hold so many bytes; false: no room
 *     gpu_staging_up        copies them to the device, on `stream`, and returns where they are, for
 *                           what is put on the stream until the next call */
struct gpu_staging {
    cudaStream_t stream;
    cudaEvent_t free[2];       /* what reads a buffer has ended */
    char *host[2], *device[2]; /* (bytes) */
    size_t bytes;
    int turn;
};
void gpu_staging_open(const struct gpu *gpu, struct gpu_staging *staging);
void gpu_staging_close(struct gpu_staging *staging);
bool gpu_staging_reserve(const struct gpu *gpu, struct gpu_staging *staging, size_t bytes);
const char *gpu_staging_up(const struct gpu *gpu, struct gpu_staging *staging, const void *from,
                           size_t bytes);

/* Zeroed memory for n of T, until gpu_free. Clears *ok where there is no room. */
template <typename T> static void gpu_take(struct gpu *gpu, T **memory, size_t n, bool *ok) {
    void *piece = NULL;
    assert(gpu->n_pieces < GPU_PIECES);
    *ok = *ok && cudaMalloc(&piece, n > 0 ? n * sizeof(T) : sizeof(T)) == cudaSuccess;
    if (*ok) {
        GPU_TRY(gpu, cudaMemsetAsync(piece, 0, n * sizeof(T), gpu->stream));
        gpu->pieces[gpu->n_pieces++] = piece;
    }
    (void)cudaGetLastError(); /* no room is an answer, not a fault */
    *memory = (T *)piece;
}

/* Frees what gpu_take gave. */
void gpu_free(struct gpu *gpu);

/* Puts a kernel into the stream; on chips that can, and if not `alone`, it starts while the one
 * before it ends: see grid_wait. */
template <typename... Parameters, typename... Arguments>
static void gpu_launch(struct gpu *gpu, const char *name, void (*kernel)(Parameters...), dim3 grid,
                       int threads, size_t shared, Arguments... arguments) {
    cudaLaunchAttribute overlap = {};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3((unsigned)threads);
    config.dynamicSmemBytes = shared;
    config.stream = gpu->stream;
    config.attrs = &overlap;
    config.numAttrs = gpu->properties->major >= 9 && !gpu->alone;
    emu_next_kernel(name);
    GPU_TRY(gpu, cudaSetDevice(gpu->index));
    const auto most = cudaFuncAttributeMaxDynamicSharedMemorySize;
    const int all = (int)gpu->properties->sharedMemPerBlockOptin;
    if (shared > 48 << 10) /* must be asked for, and by all who launch the kernel alike */
        gpu_check(gpu, cudaFuncSetAttribute(kernel, most, all), name, __FILE__, __LINE__);
    gpu_check(gpu, cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), name, __FILE__,
              __LINE__);
    gpu->n_launches++;
}
#endif /* GPU_H */
#ifdef GPU_IMPLEMENTATION
#undef GPU_IMPLEMENTATION
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void gpu_check(const struct gpu *gpu, cudaError_t error, const char *call, const char *file,
               int line) {
    if (error == cudaSuccess)
        return;
    fprintf(stderr, "%s: %s:%d: device %d (%s): %.*s: %s, while %s\n", gpu->program, file, line,
            gpu->index, gpu->properties->name, (int)strcspn(call, "("), call,
            cudaGetErrorString(error), gpu->doing);
    if (gpu->lost)
        gpu->lost(gpu->context);
    abort();
}

void gpu_enter(struct gpu *gpu, const char *doing) {
    gpu->doing = doing;
    GPU_TRY(gpu, cudaSetDevice(gpu->index));
}

void gpu_free(struct gpu *gpu) {
    while (gpu->n_pieces > 0)
        GPU_TRY(gpu, cudaFree(gpu->pieces[--gpu->n_pieces]));
}

void gpu_tickets_open(const struct gpu *gpu, struct gpu_tickets *tickets) {
    for (int i = 0; i < GPU_TICKETS; i++)
        GPU_TRY(gpu, cudaEventCreateWithFlags(&tickets->event[i], cudaEventDisableTiming));
}

void gpu_tickets_close(const struct gpu *gpu, struct gpu_tickets *tickets) {
    for (int i = 0; i < GPU_TICKETS; i++)
        GPU_TRY(gpu, cudaEventDestroy(tickets->event[i]));
}

uint64_t gpu_ticket(const struct gpu *gpu, struct gpu_tickets *tickets, cudaStream_t stream) {
    if (tickets->given - tickets->done == GPU_TICKETS)
        GPU_TRY(gpu, cudaEventSynchronize(tickets->event[tickets->done++ % GPU_TICKETS]));
    GPU_TRY(gpu, cudaEventRecord(tickets->event[tickets->given % GPU_TICKETS], stream));
    return ++tickets->given;
}

bool gpu_ticket_done(const struct gpu *gpu, struct gpu_tickets *tickets, uint64_t ticket) {
    while (tickets->done < ticket) {
        cudaError_t error = cudaEventQuery(tickets->event[tickets->done % GPU_TICKETS]);
        if (error == cudaErrorNotReady)
            return false;
        gpu_check(gpu, error, "cudaEventQuery", __FILE__, __LINE__);
        tickets->done++;
    }
    return true;
}

void gpu_staging_open(const struct gpu *gpu, struct gpu_staging *staging) {
    GPU_TRY(gpu, cudaStreamCreateWithPriority(&staging->stream, cudaStreamNonBlocking, 0));
    for (int i = 0; i < 2; i++)
        GPU_TRY(gpu, cudaEventCreateWithFlags(&staging->free[i], cudaEventDisableTiming));
}

void gpu_staging_close(struct gpu_staging *staging) {
    cudaStreamDestroy(staging->stream);
    for (int i = 0; i < 2; i++) {
        cudaEventDestroy(staging->free[i]);
        cudaFree(staging->device[i]);
        cudaFreeHost(staging->host[i]);
    }
}

bool gpu_staging_reserve(const struct gpu *gpu, struct gpu_staging *staging, size_t bytes) {
    if (bytes <= staging->bytes)
        return true;
    bool ok = true;
    GPU_TRY(gpu, cudaStreamSynchronize(staging->stream));
    for (int i = 0; i < 2; i++) {
        cudaFree(staging->device[i]);
        cudaFreeHost(staging->host[i]);
        staging->device[i] = staging->host[i] = NULL;
        ok = ok && cudaMalloc((void **)&staging->device[i], bytes) == cudaSuccess &&
             cudaHostAlloc((void **)&staging->host[i], bytes, cudaHostAllocPortable) == cudaSuccess;
    }
    staging->bytes = ok ? bytes : 0;
    (void)cudaGetLastError();
    return ok;
}

const char *gpu_staging_up(const struct gpu *gpu, struct gpu_staging *staging, const void *from,
                           size_t bytes) {
    GPU_TRY(gpu, cudaEventRecord(staging->free[staging->turn], staging->stream));
    staging->turn ^= 1;
    char *host = staging->host[staging->turn], *device = staging->device[staging->turn];
    GPU_TRY(gpu, cudaEventSynchronize(staging->free[staging->turn]));
    memcpy(host, from, bytes);
    GPU_TRY(gpu, cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, staging->stream));
    return device;
}
#endif /* GPU_IMPLEMENTATION */
