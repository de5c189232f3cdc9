/* ptx.cuh: the few instructions of a GPU that CUDA C++ has no words for, one small function each.
 *
 * This is the only place with inline PTX, and the only #ifdef of the CUDA backend: with
 * CUDA_EMULATED the same names come from test/cuda_emu.h, where a warp is 32 fibers on a CPU, so
 * every kernel can be run, tested and stepped through without a GPU.
 *
 * A warp multiplies by mma_bf16: c (16, 8) += a (16, 16) . b (16, 8), spread over its 32 lanes.
 * With group = lane / 4 and quad = lane % 4, a lane holds
 *     c[0], c[1]   row group,     columns 2 quad, 2 quad + 1      c[2], c[3]   row group + 8
 *     a[0]         row group,     k 2 quad, 2 quad + 1            a[1]         row group + 8
 *     a[2]         row group,     k 2 quad + 8, 2 quad + 9        a[3]         row group + 8
 *     b[0]         column group,  k 2 quad, 2 quad + 1            b[1]         k 2 quad + 8, + 9
 * each a[i] and b[i] two bf16, the first in the low half (PTX ISA, "Matrix Fragments for
 * mma.m16n8k16"). Which k of the matrices stands for which k of the instruction is up to us, as
 * long as a and b agree: pack.cuh lets a lane's k be neighbours, so that fragments are plain
 * 16-byte loads, and neither ldmatrix nor a swizzle is needed. */
#ifndef PTX_CUH
#define PTX_CUH
#include <stdint.h>

#ifdef CUDA_EMULATED
#define CUDA_EMU_IMPLEMENTATION
#include "test/cuda_emu.h"
#else
#include <cuda_runtime.h>

#define DEVICE static __device__ __forceinline__
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

#ifdef CUDA_EMULATED
#define DEVICE            static inline
#define load16_once(from) load16(from)
#define exp2_approx(x)    exp2f(x)
#define cospi(x)          cos(3.14159265358979324 * (x))
#define sinpi(x)          sin(3.14159265358979324 * (x))
#endif
#endif /* PTX_CUH */
