/* gpu.h: what a CUDA program needs beside its kernels, on the host and on the GPU.
 *
 * On the host: calls that end the program with one line that says what was being done; launches
 * that may overlap; tickets for copies, which are polled; memory for uploads, two buffers in turns.
 * On the GPU: one small function for each instruction that CUDA C++ has no words for. This is the
 * only place with inline PTX: with CUDA_EMULATED the same names come from an emulator, where a warp
 * is 32 fibers on a CPU, so every kernel can be run, tested and stepped through without a GPU.
 *
 *     __global__ void double_kernel(float *x, int n) {
 *         grid_wait();                      // what the kernel before wrote is there
 *         grid_launch_dependents();         // the next one may begin, as far as its own grid_wait
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
 * mma.m16n8k16"). Which k of the matrices stands for which k of the instruction is up to the
 * caller, as long as a and b agree: if a lane's k are neighbours in memory, its operands are plain
 * 16-byte loads, and neither ldmatrix nor a swizzle is needed. */
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
    extern __shared__ uint4 dynamic_shared[];                                                      \
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

/* 16 bytes from device to shared memory, without a register; zeros if not `valid`. They are there
 * after copy_async_wait<N> when at most N younger groups were committed. */
DEVICE void copy_async16(void *shared, const void *global, bool valid) {
    uint32_t to = (uint32_t)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
}

DEVICE void copy_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int N> DEVICE void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

/* Programmatic dependent launch: a kernel may start while the one before it still runs, and waits
 * here before it touches what that one writes. On older chips it starts afterwards. */
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

/* Of weights: read once a step, by one warp, so they need no place in the L1 cache. */
DEVICE uint4 load16_once(const void *from) {
    uint4 value;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
        : "l"(from));
    return value;
}

#endif

/* ---- the host's side ---- */

enum {
    GPU_TICKETS = 1024, /* of one stream that can be open; each is an event */
    GPU_PIECES = 64     /* of memory that gpu_take can give */
};

struct gpu {             /* the first part is the caller's to fill in */
    const char *program; /* begins the line of a fault */
    int index;
    const cudaDeviceProp *properties;
    cudaStream_t stream;         /* that gpu_launch puts kernels into */
    void (*lost)(void *context); /* called before a fault ends the program; or NULL */
    void *context;
    const char *doing;   /* for messages */
    uint64_t n_launches; /* counts gpu_launch; the caller may set it */
    void *pieces[GPU_PIECES];
    int n_pieces;
};

/* Ends the program unless `error` is success. `call`: its text or name. */
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
 *     gpu_staging_up        copies them to the device, on `stream`, and returns where they are
 *     gpu_staging_used      what is on the stream by now is the last that reads them */
struct gpu_staging {
    cudaStream_t stream;
    cudaEvent_t free[2];
    char *host[2], *device[2]; /* (bytes) */
    size_t bytes;
    int turn;
};
void gpu_staging_open(const struct gpu *gpu, struct gpu_staging *staging);
void gpu_staging_close(struct gpu_staging *staging);
bool gpu_staging_reserve(const struct gpu *gpu, struct gpu_staging *staging, size_t bytes);
const char *gpu_staging_up(const struct gpu *gpu, struct gpu_staging *staging, const void *from,
                           size_t bytes);
void gpu_staging_used(const struct gpu *gpu, struct gpu_staging *staging);

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

/* Puts a kernel into the stream; on chips that can, it starts while the one before it ends: see
 * grid_wait. */
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
    config.numAttrs = gpu->properties->major >= 9;
    emu_next_kernel(name);
    GPU_TRY(gpu, cudaSetDevice(gpu->index));
    const auto most = cudaFuncAttributeMaxDynamicSharedMemorySize;
    if (shared > 48 << 10) /* more than that must be asked for */
        gpu_check(gpu, cudaFuncSetAttribute(kernel, most, (int)shared), name, __FILE__, __LINE__);
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
    for (int i = 0; i < 2; i++) {
        GPU_TRY(gpu, cudaEventSynchronize(staging->free[i]));
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
    char *host = staging->host[staging->turn], *device = staging->device[staging->turn];
    GPU_TRY(gpu, cudaEventSynchronize(staging->free[staging->turn]));
    memcpy(host, from, bytes);
    GPU_TRY(gpu, cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, staging->stream));
    return device;
}

void gpu_staging_used(const struct gpu *gpu, struct gpu_staging *staging) {
    GPU_TRY(gpu, cudaEventRecord(staging->free[staging->turn], staging->stream));
    staging->turn ^= 1;
}
#endif /* GPU_IMPLEMENTATION */
