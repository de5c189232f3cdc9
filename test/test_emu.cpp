/* test_emu.cpp: what cuda_emu.h promises. Each built-in against a formula, each guarantee by a
 * program that needs it, each kind of lateness and disorder by a program that is wrong and must
 * give wrong results for some seed, and each report by a child process
 * that makes the mistake. */
#define CUDA_EMU_IMPLEMENTATION
#include "cuda_emu.h"

#include "check.h"
#include <sys/wait.h>
#include <thread>
#include <unistd.h>

#if defined(__SANITIZE_ADDRESS__)
static const bool under_asan = true;
#else
static const bool under_asan = false;
#endif
#if defined(__SANITIZE_THREAD__)
static const bool under_tsan = true;
#else
static const bool under_tsan = false;
#endif

enum {
    SEEDS = 60,
    MOST = under_tsan ? 256 : 1024 /* threads of a block; there each takes a megabyte */
};

#define OK(call) CHECK((call) == cudaSuccess, "%s", cudaGetErrorName(cudaPeekAtLastError()))
#define FAILS(call, error)                                                                         \
    do {                                                                                           \
        cudaError_t got = (call);                                                                  \
        CHECK(got == (error), "got %s", cudaGetErrorName(got));                                    \
        CHECK(cudaGetLastError() == (error), "the last error is another one");                     \
        CHECK(cudaGetLastError() == cudaSuccess, "the last error is not forgotten");               \
    } while (0)

/* Puts a kernel into a stream: LAUNCH(grid, block, shared bytes, stream)(kernel, arguments...). */
struct launch {
    cudaLaunchConfig_t config;
    template <typename... P, typename... A>
    cudaError_t operator()(void (*kernel)(P...), A... arguments) {
        return cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...);
    }
};

static launch with(dim3 grid, dim3 block, size_t shared, cudaStream_t stream = nullptr) {
    return {{grid, block, shared, stream, nullptr, 0}};
}

/* Device memory that the host reads and writes directly, as only an emulator allows. */
template <typename T> struct device_array {
    T *data = nullptr;
    explicit device_array(size_t n) {
        if (cudaMalloc(&data, n * sizeof(T)) != cudaSuccess)
            abort();
    }
    ~device_array() {
        cudaFree(data);
    }
    device_array(const device_array &) = delete;
    T &operator[](size_t i) const {
        return data[i];
    }
};

/* ---- functions of one thread ---- */

static void bits_and_numbers(struct check *check) {
    CHECK(__popc(0xF0F0u) == 8 && __clz(0) == 32 && __clz(1) == 31 && __clz(-1) == 0,
          "another value");
    CHECK(__ffs(0) == 0 && __ffs(8) == 4 && __brev(1) == 0x80000000 && __brev(0xD) == 0xB0000000,
          "another value");
    CHECK(__umulhi(0x80000000, 6) == 3, "got %u", __umulhi(0x80000000, 6));
    CHECK(__byte_perm(0x33221100, 0x77665544, 0x7250) == 0x77225500, "got %08x",
          __byte_perm(0x33221100, 0x77665544, 0x7250));
    CHECK(__float_as_int(-0.0f) == INT32_MIN && __int_as_float(0x3F800000) == 1.0f,
          "another value");
    CHECK(__float_as_uint(1.0f) == 0x3F800000 && __uint_as_float(0x40000000) == 2.0f,
          "another value");
    CHECK(__expf(0.0f) == 1.0f && __logf(1.0f) == 0.0f && rsqrtf(4.0f) == 0.5f, "another value");
    CHECK(__fmaf_rn(2.0f, 3.0f, 4.0f) == 10.0f && __frcp_rn(8.0f) == 0.125f, "another value");
    CHECK(sizeof(float4) == 16 && alignof(float4) == 16 && alignof(uint2) == 8, "another value");
    int4 v = make_int4(1, 2, 3, 4);
    CHECK(v.x == 1 && v.w == 4 && __ldg(&v.z) == 3, "another value");
}

static void halves(struct check *check) {
    for (uint32_t bits = 0; bits < 0x10000; bits++) {
        int exponent = (int)(bits >> 10 & 31), fraction = (int)(bits & 1023);
        double value = exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24);
        if (exponent == 31)
            value = fraction ? NAN : INFINITY;
        value = bits & 0x8000 ? -value : value;
        float got = half_to_float((uint16_t)bits);
        CHECK((double)got == value || (got != got && value != value), "%04x: got %g, expected %g",
              bits, (double)got, value);
        CHECK(std::signbit(got) == (bits >> 15) || got != got, "%04x: sign", bits);
    }
}

static float of_bf16(uint32_t bits) {
    return __uint_as_float(bits << 16);
}

/* The nearest of the two neighbours; the even one where both are as near. */
static void bf16_pairs(struct check *check) {
    for (int i = 0; i < 200000; i++) {
        uint32_t bits = emu_random(0xFFFFFFFF) & (i % 3 ? 0xFFFFFFFF : 0xFFFF8000);
        float x = __uint_as_float(bits);
        uint32_t pair = pack_bf16(x, 1.0f), got = pair & 0xFFFF, down = bits >> 16;
        CHECK(pair >> 16 == 0x3F80, "%08x: high half %08x", bits, pair);
        if (x != x) {
            CHECK((got & 0x7FFF) > 0x7F80, "NaN %08x became %04x", bits, got);
            continue;
        }
        uint32_t rest = bits & 0xFFFF;
        bool up = rest > 0x8000 || (rest == 0x8000 && (down & 1));
        CHECK(got == down + up, "%08x: got %04x", bits, got);
    }
    CHECK(pack_bf16(1.0f, -2.0f) == 0xC0003F80, "got %08x", pack_bf16(1.0f, -2.0f));
}

/* ---- threads, warps, blocks ---- */

static __global__ void places_kernel(unsigned *out) {
    unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    out[block * blockDim.x * blockDim.y * blockDim.z + thread] += block << 16 | thread;
}

static void every_thread_runs_once(struct check *check) {
    dim3 grids[] = {{1}, {7}, {3, 2, 5}}, blocks[] = {{1}, {MOST}, {5, 3, 4}, {2, 2, 64}};
    for (dim3 grid : grids)
        for (dim3 block : blocks) {
            size_t n_threads = block.x * block.y * block.z;
            size_t n = grid.x * grid.y * grid.z * n_threads;
            device_array<unsigned> out(n);
            OK(cudaMemsetAsync(out.data, 0, n * 4));
            OK(with(grid, block, 0)(places_kernel, out.data));
            OK(cudaDeviceSynchronize());
            for (size_t i = 0; i < n; i++)
                CHECK(out[i] == (i / n_threads << 16 | i % n_threads), "thread %zu: %08x", i,
                      out[i]);
        }
}

static __global__ void shuffles_kernel(int width, int amount, int *out, int64_t *wide) {
    int lane = (int)threadIdx.x % 32, i = (int)threadIdx.x;
    out[i * 4] = __shfl_sync(0xFFFFFFFF, lane, amount, width);
    out[i * 4 + 1] = (int)__shfl_xor_sync(0xFFFFFFFF, (unsigned)lane, amount, width);
    out[i * 4 + 2] = (int)__shfl_down_sync(0xFFFFFFFF, (float)lane, (unsigned)amount, width);
    out[i * 4 + 3] = __shfl_up_sync(0xFFFFFFFF, lane, (unsigned)amount, width);
    wide[i] = __shfl_xor_sync(0xFFFFFFFF, (int64_t)lane << 40 | 7, 1);
}

static void shuffles(struct check *check) {
    device_array<int> out(64 * 4);
    device_array<int64_t> wide(64);
    for (int width = 1; width <= 32; width *= 2)
        for (int amount = 0; amount < 32; amount++) {
            OK(with(1, 64, 0)(shuffles_kernel, width, amount, out.data, wide.data));
            OK(cudaDeviceSynchronize());
            for (int i = 0; i < 64; i++) {
                int lane = i % 32, first = lane / width * width, *got = &out[(size_t)i * 4];
                int expected[4] = {first + amount % width, lane ^ amount, lane + amount,
                                   lane - amount};
                for (int j = 1; j < 4; j++)
                    if (expected[j] >= first + width || (j == 3 && expected[j] < first))
                        expected[j] = lane;
                for (int j = 0; j < 4; j++)
                    CHECK(got[j] == expected[j], "width %d, amount %d, lane %d, kind %d: got %d",
                          width, amount, lane, j, got[j]);
                CHECK(wide[(size_t)i] == ((int64_t)(lane ^ 1) << 40 | 7), "64 bits, lane %d", lane);
            }
        }
}

/* Two halves of a warp go their own ways; the odd lanes of one return first. */
static __global__ void votes_kernel(uint32_t *out) {
    uint32_t lane = threadIdx.x, odd = 0xAAAAAAAA, low = 0xFFFF;
    if (lane < 16) {
        out[lane] = __ballot_sync(low, lane % 3 == 0);
        __syncwarp(low);
        out[lane] += (uint32_t)__any_sync(low, lane == 99) << 31;
        out[lane] += (uint32_t)__all_sync(low, lane < 16) << 30;
        return;
    }
    out[lane] = lane & 1 ? (uint32_t)__shfl_sync(odd & ~low, (int)lane, 31)
                         : __ballot_sync(~odd & ~low, lane > 20);
    out[lane] += (uint32_t)__any_sync(~low, lane == 20) << 31;
    out[lane] += (uint32_t)__all_sync(~low, lane != 20) << 30;
}

static void votes_with_masks(struct check *check) {
    device_array<uint32_t> out(32);
    for (int seed = 0; seed < SEEDS; seed++) {
        OK(with(1, 32, 0)(votes_kernel, out.data));
        OK(cudaDeviceSynchronize());
        for (size_t lane = 0; lane < 32; lane++) {
            uint32_t expected = lane < 16 ? 0x9249 | 1u << 30 : lane & 1 ? 31 : 0x55400000;
            expected = lane < 16 ? expected : expected + (1u << 31);
            CHECK(out[lane] == expected, "lane %zu: got %08x, expected %08x", lane, out[lane],
                  expected);
        }
    }
}

template <typename T> static __global__ void atomics_kernel(T *out) {
    T i = (T)(blockIdx.x * blockDim.x + threadIdx.x);
    atomicAdd(&out[0], i);
    atomicMax(&out[1], i);
    atomicMin(&out[2], i);
    atomicExch(&out[3], (T)5);
    while (atomicCAS(&out[4], i, i + 1) != i && threadIdx.x == 0 && blockDim.x == 1) {
    }
}

static __global__ void atomic_floats_kernel(float *out) {
    atomicAdd(out, 0.5f);
}

template <typename T> static void atomics_of(struct check *check) {
    device_array<T> out(5);
    T start[5] = {3, 0, 9, 0, 0};
    OK(cudaMemcpy(out.data, start, sizeof start, cudaMemcpyHostToDevice));
    OK(with(4, 64, 0)(atomics_kernel<T>, out.data));
    OK(cudaDeviceSynchronize());
    CHECK(out[0] == 3 + 255 * 128 && out[1] == 255 && out[2] == 0 && out[3] == 5, "another value");
    CHECK(out[4] >= 1, "no compare-and-swap took place");
}

static void atomics(struct check *check) {
    atomics_of<int>(check);
    atomics_of<unsigned>(check);
    atomics_of<unsigned long long>(check);
    device_array<float> sum(1);
    sum[0] = 1.0f;
    OK(with(4, 64, 0)(atomic_floats_kernel, sum.data));
    OK(cudaDeviceSynchronize());
    CHECK(sum[0] == 129.0f, "got %g", (double)sum[0]);
}

/* Thread i reads what the last thread wrote; `barrier` false: too early. */
static __global__ void mirror_kernel(int *out, bool barrier) {
    DYNAMIC_SHARED(int, shared);
    for (int round = 0; round < 3; round++) {
        shared[threadIdx.x] = (int)threadIdx.x + round;
        if (barrier)
            __syncthreads();
        out[blockIdx.x * blockDim.x + threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x] - round;
        if (barrier)
            __syncthreads();
    }
}

static int wrong_mirrors(bool barrier, int threads) {
    int wrong = 0;
    device_array<int> out(8 * (size_t)threads);
    for (int round = 0; round < (under_tsan ? 1 : 8); round++) {
        with(8, (unsigned)threads, (size_t)threads * 4)(mirror_kernel, out.data, barrier);
        cudaDeviceSynchronize();
        for (int i = 0; i < 8 * threads; i++)
            wrong += out[(size_t)i] != threads - 1 - i % threads;
    }
    return wrong;
}

static void barriers(struct check *check) {
    for (int threads : {1, 31, 32, 33, 250, (int)MOST})
        CHECK(wrong_mirrors(true, threads) == 0, "%d threads", threads);
    if (!under_tsan) /* which reports it */
        CHECK(wrong_mirrors(false, 256) > 0, "a missing barrier does not show");
}

static __global__ void shared_is_fresh_kernel(int n, int *wrong) {
    DYNAMIC_SHARED(uint32_t, shared);
    for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) {
        atomicAdd(wrong, shared[i] != 0xFFFFFFFF);
        shared[i] = 1;
    }
}

static __global__ void no_races_kernel(int *out) {
    DYNAMIC_SHARED(int, shared);
    shared[threadIdx.x] = 1;
    __syncwarp();
    int value = shared[threadIdx.x ^ 1];
    __syncthreads();
    shared[blockDim.x - 1 - threadIdx.x] = value;
    __syncthreads();
    out[blockIdx.x * blockDim.x + threadIdx.x] = shared[threadIdx.x];
}

/* Here a report of ThreadSanitizer would be a false one. */
static void barriers_order_memory(struct check *check) {
    device_array<int> out(256);
    OK(with(4, 64, 256)(no_races_kernel, out.data));
    OK(cudaDeviceSynchronize());
    for (size_t i = 0; i < 256; i++)
        CHECK(out[i] == 1, "thread %zu: got %d", i, out[i]);
}

static void shared_memory_is_garbage(struct check *check) {
    device_array<int> wrong(1);
    wrong[0] = 0;
    OK(with(5, 64, 4000)(shared_is_fresh_kernel, 1000, wrong.data));
    OK(cudaDeviceSynchronize());
    CHECK(wrong[0] == 0, "%d words of the last block are left", wrong[0]);
    CHECK(isnan(of_bf16(0xFFFF)) && isnan(__uint_as_float(0xFFFFFFFF)), "the garbage is no NaN");
}

static __global__ void order_kernel(int *next, int *blocks, int *threads) {
    int i = atomicAdd(next, 1);
    blocks[i] = (int)blockIdx.x;
    threads[i] = (int)threadIdx.x;
}

/* The blocks and the threads of 16 blocks of 2 warps, in the order in which they ran. */
static std::vector<int> order_of(uint64_t seed) {
    device_array<int> next(1), blocks(1024), threads(1024);
    next[0] = 0;
    emu_seed(seed);
    with(16, 64, 0)(order_kernel, next.data, blocks.data, threads.data);
    cudaDeviceSynchronize();
    std::vector<int> order(blocks.data, blocks.data + 1024);
    order.insert(order.end(), threads.data, threads.data + 1024);
    return order;
}

static void orders_follow_the_seed(struct check *check) {
    int forward = 0, backward = 0, last_warp_first = 0, lane_0_first = 0;
    for (uint64_t seed = 1; seed <= SEEDS; seed++) {
        std::vector<int> order = order_of(seed);
        CHECK(order == order_of(seed), "seed %d: two orders", (int)seed);
        CHECK(order != order_of(seed + 1), "seeds %d and the next: one order", (int)seed);
        forward += std::is_sorted(order.begin(), order.begin() + 1024);
        backward += std::is_sorted(order.begin(), order.begin() + 1024, std::greater<int>());
        last_warp_first += order[1024] >= 32;
        lane_0_first += order[1024] % 32 == 0;
    }
    CHECK(forward > 0 && backward > 0 && forward + backward < SEEDS,
          "%d grids in order, %d backwards", forward, backward);
    CHECK(last_warp_first > 0 && last_warp_first < SEEDS, "%d", last_warp_first);
    CHECK(lane_0_first < SEEDS / 2, "%d", lane_0_first);
}

/* ---- products and copies ---- */

static __global__ void mma_kernel(const uint16_t *a, const uint16_t *b, const float *c,
                                  float *out) {
    int group = (int)threadIdx.x / 4, quad = (int)threadIdx.x % 4;
    uint32_t fa[4], fb[2];
    float fc[4];
    for (int i = 0; i < 4; i++) { /* a: (16, 16) by rows; b: (8, 16), columns; c: (16, 8) */
        memcpy(&fa[i], a + (group + i % 2 * 8) * 16 + quad * 2 + i / 2 * 8, 4);
        fc[i] = c[(group + i / 2 * 8) * 8 + quad * 2 + i % 2];
    }
    for (int i = 0; i < 2; i++)
        memcpy(&fb[i], b + group * 16 + quad * 2 + i * 8, 4);
    mma_bf16(fc, fa, fb);
    for (int i = 0; i < 4; i++)
        out[(group + i / 2 * 8) * 8 + quad * 2 + i % 2] = fc[i];
}

static void mma_sums_in_order(struct check *check) {
    device_array<uint16_t> a(256), b(128);
    device_array<float> c(128), out(128);
    for (int round = 0; round < 20; round++) {
        for (size_t i = 0; i < 256; i++)
            a[i] = (uint16_t)(pack_bf16((float)emu_random(2000) / 1000 - 1, 0));
        for (size_t i = 0; i < 128; i++) {
            b[i] = (uint16_t)(pack_bf16((float)emu_random(2000) / 1000 - 1, 0));
            c[i] = (float)emu_random(1000);
        }
        OK(with(1, 32, 0)(mma_kernel, a.data, b.data, c.data, out.data));
        OK(cudaDeviceSynchronize());
        for (size_t i = 0; i < 128; i++) {
            float sum = c[i];
            for (size_t k = 0; k < 16; k++)
                sum = fmaf(of_bf16(a[i / 8 * 16 + k]), of_bf16(b[i % 8 * 16 + k]), sum);
            CHECK(out[i] == sum, "output %zu: got %.9g, expected %.9g", i, (double)out[i],
                  (double)sum);
        }
    }
}

/* Each thread fetches its 16 bytes of two stages; the second one is odd threads' only. */
static __global__ void copies_kernel(const uint4 *from, uint4 *out, int *early) {
    DYNAMIC_SHARED(uint4, shared);
    unsigned i = threadIdx.x, n = blockDim.x;
    shared[i] = shared[n + i] = make_uint4(9, 9, 9, 9);
    copy_async16(&shared[i], &from[i], true);
    copy_async_commit();
    copy_async16(&shared[n + i], &from[n + i], i & 1);
    copy_async_commit();
    if (!under_asan) /* which would report it */
        early[i] = (int)shared[i].y;
    copy_async_wait<1>();
    if (!under_asan)
        early[n + i] = (int)shared[n + i].x;
    __syncthreads();
    out[i] = load16(&shared[n - 1 - i]);
    copy_async_wait<0>();
    __syncthreads();
    store16(&out[n + i], shared[2 * n - 1 - i]);
}

static void asynchronous_copies(struct check *check) {
    device_array<uint4> from(128), out(128);
    device_array<int> early(128);
    for (unsigned i = 0; i < 128; i++) {
        from[i] = make_uint4(i, i + 1, i + 2, i + 3);
        early[i] = -1;
    }
    OK(with(1, 64, 128 * 16)(copies_kernel, from.data, out.data, early.data));
    OK(cudaDeviceSynchronize());
    for (unsigned i = 0; i < 64; i++) {
        unsigned second = (63 - i) & 1 ? 64 + 63 - i : 0;
        CHECK(out[i].x == 63 - i && out[i].w == 66 - i, "first stage, thread %u: %u", i, out[i].x);
        CHECK(out[64 + i].x == second, "second stage, thread %u: %u", i, out[64 + i].x);
        CHECK(early[i] == -1 && early[64 + i] == -1, "thread %u: it landed before a wait", i);
    }
}

/* ---- devices, errors, limits ---- */

static void errors(struct check *check) {
    CHECK(strcmp(cudaGetErrorName(cudaErrorNotReady), "cudaErrorNotReady") == 0, "another value");
    CHECK(strcmp(cudaGetErrorString(cudaErrorMemoryAllocation), "out of memory") == 0,
          "another value");
    CHECK(strcmp(cudaGetErrorName((cudaError_t)12345), "unrecognized error code") == 0,
          "another value");
    FAILS(cudaSetDevice(1), cudaErrorInvalidDevice);
    FAILS(cudaSetDevice(-1), cudaErrorInvalidDevice);
    emu_fail("cudaStreamQuery", 2);
    OK(cudaStreamQuery(nullptr));
    OK(cudaStreamQuery(nullptr));
    FAILS(cudaStreamQuery(nullptr), cudaErrorLaunchFailure);
    OK(cudaStreamQuery(nullptr));
    emu_fail("cudaMalloc", 0);
    int *memory;
    FAILS(cudaMalloc(&memory, 4), cudaErrorMemoryAllocation);
    emu_fail("cudaLaunchKernelEx", 0);
    FAILS(with(1, 1, 0)(places_kernel, nullptr), cudaErrorLaunchFailure);
    emu_devices(0, 0, 0);
    int count = 7;
    FAILS(cudaGetDeviceCount(&count), cudaErrorNoDevice);
    CHECK(count == 0, "%d devices of none", count);
    FAILS(cudaSetDevice(0), cudaErrorNoDevice);
}

static void devices(struct check *check) {
    emu_devices(3, 1 << 20, 132);
    cudaDeviceProp properties;
    int count = 0, device = 0, value = 0, least = 0, greatest = 0;
    OK(cudaGetDeviceCount(&count));
    OK(cudaSetDevice(2));
    OK(cudaGetDevice(&device));
    OK(cudaGetDeviceProperties(&properties, 2));
    CHECK(count == 3 && device == 2, "%d devices, %d is current", count, device);
    CHECK(properties.multiProcessorCount == 132 && properties.totalGlobalMem == 1 << 20,
          "another value");
    OK(cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, 2));
    CHECK(value == (int)properties.sharedMemPerBlockOptin && value > 48 << 10, "%d", value);
    FAILS(cudaDeviceGetAttribute(&value, (cudaDeviceAttr)99999, 0), cudaErrorInvalidValue);
    FAILS(cudaGetDeviceProperties(&properties, 3), cudaErrorInvalidDevice);
    OK(cudaDeviceGetStreamPriorityRange(&least, &greatest));
    CHECK(greatest < least, "%d is not before %d", greatest, least);
    OK(cudaDeviceCanAccessPeer(&value, 2, 0));
    CHECK(value == 1, "no peer access");
    OK(cudaDeviceEnablePeerAccess(0, 0));
    FAILS(cudaDeviceEnablePeerAccess(0, 0), cudaErrorPeerAccessAlreadyEnabled);
    FAILS(cudaDeviceEnablePeerAccess(2, 0), cudaErrorInvalidDevice);
    OK(cudaDriverGetVersion(&value));
    CHECK(value >= 12000, "%d", value);
    int other = -1;
    std::thread([&] { cudaGetDevice(&other); }).join();
    CHECK(other == 0, "another host thread is at device %d", other);
}

static void device_memory(struct check *check) {
    emu_devices(2, 1 << 20, 4);
    size_t free_bytes = 0, total = 0;
    char *a, *b, *pinned;
    OK(cudaMalloc(&a, 600 << 10));
    FAILS(cudaMalloc(&b, 600 << 10), cudaErrorMemoryAllocation);
    CHECK(!b, "a pointer without memory");
    OK(cudaMemGetInfo(&free_bytes, &total));
    CHECK(total == 1 << 20 && free_bytes == 424 << 10, "%zu of %zu are free", free_bytes, total);
    CHECK((uintptr_t)a % 256 == 0 && a[0] == (char)0xFF && a[(600 << 10) - 1] == (char)0xFF,
          "another value");
    OK(cudaSetDevice(1));
    OK(cudaMalloc(&b, 1 << 20)); /* another device's */
    OK(cudaHostAlloc(&pinned, 4 << 20, cudaHostAllocPortable));
    FAILS(cudaFree(pinned), cudaErrorInvalidValue);
    FAILS(cudaFreeHost(b), cudaErrorInvalidValue);
    FAILS(cudaFree(a + 16), cudaErrorInvalidValue);
    OK(cudaFree(a));
    FAILS(cudaFree(a), cudaErrorInvalidValue);
    OK(cudaFree(nullptr));
    OK(cudaFree(b));
    OK(cudaFreeHost(pinned));
    OK(cudaMalloc(&a, 0));
    CHECK(!a, "no bytes have an address");
    OK(cudaMalloc(&b, 1 << 20));
    OK(cudaFree(b));
}

static __global__ void nothing_kernel(void) {}

static __global__ void shared_ends_kernel(int bytes) {
    DYNAMIC_SHARED(char, shared);
    if (threadIdx.x == 0)
        shared[0] = shared[bytes - 1] = 0;
}

static void launch_limits(struct check *check) {
    long before = emu_launches();
    FAILS(with(0, 32, 0)(nothing_kernel), cudaErrorInvalidConfiguration);
    FAILS(with({1, 65536}, 32, 0)(nothing_kernel), cudaErrorInvalidConfiguration);
    FAILS(with(1, 0, 0)(nothing_kernel), cudaErrorInvalidConfiguration);
    FAILS(with(1, 1025, 0)(nothing_kernel), cudaErrorInvalidConfiguration);
    FAILS(with(1, {1, 1, 65}, 0)(nothing_kernel), cudaErrorInvalidConfiguration);
    FAILS(with(1, {33, 32}, 0)(nothing_kernel), cudaErrorInvalidConfiguration);
    OK(with(1, 32, 48 << 10)(shared_ends_kernel, 48 << 10));
    FAILS(with(1, 32, (48 << 10) + 1)(shared_ends_kernel, 1), cudaErrorInvalidValue);
    auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
    FAILS(cudaFuncSetAttribute(shared_ends_kernel, attribute, 228 << 10), cudaErrorInvalidValue);
    OK(cudaFuncSetAttribute(shared_ends_kernel, attribute, 227 << 10));
    OK(with(1, 32, 227 << 10)(shared_ends_kernel, 227 << 10));
    FAILS(with(1, 32, (227 << 10) + 1)(shared_ends_kernel, 1), cudaErrorInvalidValue);
    FAILS(with(1, 32, 49 << 10)(nothing_kernel), cudaErrorInvalidValue);
    OK(cudaFuncSetAttribute(nothing_kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100));
    CHECK(emu_launches() == before, "a kernel runs before anybody waits for it");
    OK(cudaDeviceSynchronize());
    CHECK(emu_launches() == before + 2, "%ld kernels ran", emu_launches() - before);
    emu_devices(2, 1 << 20, 4);
    cudaStream_t stream;
    OK(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, 0));
    cudaEvent_t event;
    OK(cudaEventCreateWithFlags(&event, 0));
    OK(cudaFuncSetAttribute(shared_ends_kernel, attribute, 227 << 10));
    OK(cudaSetDevice(1)); /* attributes, streams and events are a device's */
    FAILS(with(1, 32, 227 << 10)(shared_ends_kernel, 1), cudaErrorInvalidValue);
    FAILS(cudaEventRecord(event, nullptr), cudaErrorInvalidResourceHandle);
    OK(cudaEventDestroy(event));
    FAILS(with(1, 32, 0, stream)(nothing_kernel), cudaErrorInvalidResourceHandle);
    OK(cudaStreamDestroy(stream));
    FAILS(cudaStreamSynchronize(stream), cudaErrorInvalidResourceHandle);
}

/* ---- copies ---- */

static void copies_check_their_pointers(struct check *check) {
    emu_devices(2, 1 << 20, 4);
    char *a, *b, *pinned, host[64] = {0};
    OK(cudaMalloc(&a, 64));
    OK(cudaSetDevice(1));
    OK(cudaMalloc(&b, 64));
    OK(cudaHostAlloc(&pinned, 64, 0));
    FAILS(cudaMemcpyAsync(host, host, 64, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
    FAILS(cudaMemcpyAsync(a, a, 64, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
    FAILS(cudaMemcpyAsync(a, host, 64, cudaMemcpyDeviceToDevice), cudaErrorInvalidValue);
    FAILS(cudaMemcpyAsync(a, pinned, 64, cudaMemcpyDeviceToHost), cudaErrorInvalidValue);
    FAILS(cudaMemcpyAsync(a + 1, host, 64, cudaMemcpyDefault), cudaErrorInvalidValue);
    FAILS(cudaMemcpyAsync(nullptr, host, 64, cudaMemcpyDefault), cudaErrorInvalidValue);
    FAILS(cudaMemcpyAsync(a, host, 64, (cudaMemcpyKind)9), cudaErrorInvalidMemcpyDirection);
    FAILS(cudaMemcpy2DAsync(a, 8, host, 16, 9, 4, cudaMemcpyDefault), cudaErrorInvalidPitchValue);
    FAILS(cudaMemcpy2DAsync(a, 16, host, 16, 16, 5, cudaMemcpyDefault), cudaErrorInvalidValue);
    FAILS(cudaMemcpyPeerAsync(a, 1, b, 1, 64), cudaErrorInvalidValue);
    FAILS(cudaMemcpyPeerAsync(a, 0, b, 2, 64), cudaErrorInvalidDevice);
    FAILS(cudaMemsetAsync(host, 0, 64), cudaErrorInvalidValue);
    OK(cudaMemcpyAsync(a, nullptr, 0, cudaMemcpyHostToDevice));
    OK(cudaMemcpy2DAsync(a, 16, pinned, 16, 16, 4, cudaMemcpyHostToDevice));
    OK(cudaMemcpyPeerAsync(b, 1, a, 0, 64));
    OK(cudaMemcpyAsync(host, b, 64, cudaMemcpyDefault));
    CHECK(host[63] == (char)0xFF, "a copy to pageable memory is waited for");
    OK(cudaFree(a));
    FAILS(cudaMemcpyAsync(a, host, 64, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
    OK(cudaFree(b));
    OK(cudaFreeHost(pinned));
}

static void copies_of_rows(struct check *check) {
    device_array<char> device(16 * 20);
    for (size_t width : {0, 1, 7, 16})
        for (size_t height : {0, 1, 5}) {
            char in[12 * 19], out[12 * 18];
            for (size_t i = 0; i < sizeof in; i++)
                in[i] = (char)i;
            memset(out, 0, sizeof out);
            OK(cudaMemsetAsync(device.data, 9, 16 * 20));
            OK(cudaMemcpy2DAsync(device.data, 20, in, 19, width, height, cudaMemcpyHostToDevice));
            OK(cudaMemcpy2DAsync(out, 18, device.data, 20, width, height, cudaMemcpyDeviceToHost));
            OK(cudaDeviceSynchronize());
            for (size_t i = 0; i < sizeof out; i++) {
                bool inside = i % 18 < width && i / 18 < height;
                char expected = inside ? (char)(i / 18 * 19 + i % 18) : 0;
                CHECK(out[i] == expected, "%zu x %zu: byte %zu", width, height, i);
            }
            for (size_t i = 0; i < 16 * 20; i++)
                CHECK((i % 20 < width && i / 20 < height) || device[i] == 9, "beyond: %zu", i);
        }
}

static void copies_are_late(struct check *check) {
    int *pinned, pageable = 1;
    OK(cudaMallocHost(&pinned, 8));
    device_array<int> device(2);
    pinned[0] = 1;
    OK(cudaMemcpyAsync(device.data, pinned, 4, cudaMemcpyHostToDevice));
    OK(cudaMemcpyAsync(device.data + 1, &pageable, 4, cudaMemcpyHostToDevice));
    pinned[0] = pageable = 2;
    CHECK(device[0] == -1 && device[1] == -1, "a copy runs at once");
    OK(cudaDeviceSynchronize());
    CHECK(device[0] == 2, "pinned memory is read when the copy runs: got %d", device[0]);
    CHECK(device[1] == 1, "pageable memory is read at once: got %d", device[1]);
    OK(cudaMemcpyAsync(pinned + 1, device.data, 4, cudaMemcpyDeviceToHost));
    CHECK(pinned[1] == -1, "a copy to pinned memory runs at once");
    OK(cudaDeviceSynchronize());
    CHECK(pinned[1] == 2, "got %d", pinned[1]);
    OK(cudaFreeHost(pinned));
}

/* ---- streams and events ---- */

static __global__ void add_kernel(int *to, const int *from) {
    *to += *from;
}

struct two_streams {
    cudaStream_t a, b;
    cudaEvent_t event;
    two_streams() {
        cudaStreamCreateWithPriority(&a, cudaStreamNonBlocking, 0);
        cudaStreamCreateWithPriority(&b, cudaStreamNonBlocking, -1);
        cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
    }
    ~two_streams() {
        cudaStreamDestroy(a);
        cudaStreamDestroy(b);
        cudaEventDestroy(event);
    }
};

/* x = 1 + 2 + ... in one stream, then its copy in the other: right, or too early, or half done. */
static int sum_seen(bool wait, bool sync_late_stream) {
    two_streams streams;
    device_array<int> x(2);
    int *seen;
    cudaMallocHost(&seen, 4);
    cudaMemsetAsync(x.data, 0, 8, streams.a);
    for (int i = 0; i < 4; i++)
        with(1, 1, 0, streams.a)(add_kernel, x.data, x.data + 1);
    cudaMemsetAsync(x.data, 1, 4, streams.a);
    cudaEventRecord(streams.event, streams.a);
    cudaMemsetAsync(x.data + 1, 1, 4, streams.a); /* behind the event */
    if (wait)
        cudaStreamWaitEvent(streams.b, streams.event);
    cudaMemcpyAsync(seen, x.data, 4, cudaMemcpyDeviceToHost, streams.b);
    if (sync_late_stream)
        cudaStreamSynchronize(streams.a);
    cudaStreamSynchronize(streams.b);
    int result = *seen;
    cudaFreeHost(seen);
    return result;
}

static void events_order_streams(struct check *check) {
    int before = 0, right = 0;
    for (int seed = 0; seed < SEEDS; seed++) {
        int seen = sum_seen(true, seed & 1);
        CHECK(seen == 0x01010101, "with the event: got %08x", seen);
        seen = sum_seen(false, seed & 1);
        before += seen == -1;
        right += seen == 0x01010101;
    }
    CHECK(before > 0, "a copy that waits for nothing never comes first");
    CHECK(right > 0, "a copy that waits for nothing never comes last");
}

static void streams_keep_their_order(struct check *check) {
    device_array<int> x(2);
    cudaStream_t stream;
    OK(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, 0));
    for (int i = 0; i < 100; i++) {
        OK(cudaMemcpyAsync(x.data, &i, 4, cudaMemcpyHostToDevice, stream));
        OK(cudaMemcpyAsync(x.data + 1, x.data, 4, cudaMemcpyDeviceToDevice, stream));
    }
    OK(cudaStreamDestroy(stream)); /* what is queued is done all the same */
    OK(cudaDeviceSynchronize());
    CHECK(x[0] == 99 && x[1] == 99, "got %d, %d", x[0], x[1]);
}

/* To wait for one stream may do nothing in others, or something. */
static void others_may_be_late(struct check *check) {
    two_streams streams;
    device_array<int> x(2);
    int untouched = 0, begun = 0;
    for (int seed = 0; seed < SEEDS; seed++) {
        OK(cudaMemsetAsync(x.data, 0, 8, streams.a));
        OK(cudaDeviceSynchronize());
        for (int i = 1; i <= 20; i++) {
            OK(cudaMemsetAsync(x.data, i, 4, streams.a));
            OK(cudaMemsetAsync(x.data + 1, i, 4, streams.b));
        }
        OK(cudaStreamSynchronize(streams.b));
        CHECK(x[1] == 20 * 0x01010101, "got %08x", x[1]);
        untouched += x[0] == 0;
        begun += x[0] != 0;
    }
    CHECK(untouched > SEEDS / 4 && begun > SEEDS / 4, "%d times not, %d times", untouched, begun);
}

static void polling(struct check *check) {
    two_streams streams;
    device_array<int> x(1);
    int not_ready = 0;
    OK(cudaEventQuery(streams.event)); /* never recorded */
    for (int round = 0; round < SEEDS; round++) {
        for (int i = 0; i < 3; i++)
            OK(cudaMemsetAsync(x.data, i, 4, streams.a));
        OK(cudaEventRecord(streams.event, streams.a));
        OK(cudaMemsetAsync(x.data, 9, 4, streams.a));
        while (cudaEventQuery(streams.event) == cudaErrorNotReady)
            not_ready++;
        CHECK(x[0] == 0x02020202 || x[0] == 0x09090909, "the event came too early: %08x", x[0]);
        while (cudaStreamQuery(streams.a) == cudaErrorNotReady)
            not_ready++;
        CHECK(x[0] == 0x09090909, "the stream is not empty: %08x", x[0]);
    }
    (void)cudaGetLastError();
    CHECK(not_ready > SEEDS && not_ready < 10 * SEEDS, "polled in vain %d times", not_ready);
    cudaEvent_t start, end;
    float elapsed = -1;
    OK(cudaEventCreateWithFlags(&start, cudaEventDefault));
    OK(cudaEventCreateWithFlags(&end, cudaEventDefault));
    FAILS(cudaEventElapsedTime(&elapsed, start, end), cudaErrorInvalidResourceHandle);
    OK(cudaEventRecord(start, streams.a));
    OK(cudaEventRecord(end, streams.a));
    FAILS(cudaEventElapsedTime(&elapsed, start, end), cudaErrorNotReady);
    OK(cudaEventSynchronize(end));
    OK(cudaEventElapsedTime(&elapsed, start, end));
    CHECK(elapsed >= 0 && elapsed < 60e3f, "%g ms", (double)elapsed);
    FAILS(cudaEventElapsedTime(&elapsed, start, streams.event), cudaErrorInvalidResourceHandle);
    OK(cudaEventDestroy(start));
    OK(cudaEventDestroy(end));
}

static void host_threads(struct check *check) {
    device_array<int> x(8);
    std::vector<std::thread> threads;
    int wrong[4] = {0};
    for (int t = 0; t < 4; t++)
        threads.emplace_back([&, t] {
            two_streams streams;
            int *sum = x.data + 2 * t, one = 1, result;
            cudaMemcpyAsync(sum + 1, &one, 4, cudaMemcpyHostToDevice, streams.a);
            cudaMemsetAsync(sum, 0, 4, streams.a);
            for (int i = 0; i < 200; i++) {
                with(1, 1, 0, streams.a)(add_kernel, sum, sum + 1);
                if (i % 7 == t)
                    cudaStreamQuery(streams.a);
            }
            cudaMemcpyAsync(&result, sum, 4, cudaMemcpyDeviceToHost, streams.a);
            wrong[t] = result - 200;
        });
    for (std::thread &thread : threads)
        thread.join();
    for (int t = 0; t < 4; t++)
        CHECK(wrong[t] == 0, "host thread %d: off by %d", t, wrong[t]);
}

/* ---- graphs ---- */

/* b = a + a in one branch, c = a in the other, then a = b + c; so each replay triples a. */
static cudaGraph_t capture_fork(struct check *check, two_streams *streams, int *x, bool join) {
    cudaEvent_t back;
    cudaGraph_t graph;
    OK(cudaEventCreateWithFlags(&back, cudaEventDisableTiming));
    OK(cudaStreamBeginCapture(streams->a, cudaStreamCaptureModeThreadLocal));
    OK(cudaMemsetAsync(x + 1, 0, 8, streams->a));
    OK(cudaEventRecord(streams->event, streams->a));
    OK(cudaStreamWaitEvent(streams->b, streams->event));
    OK(with(1, 1, 0, streams->a)(add_kernel, x + 1, x));
    OK(with(1, 1, 0, streams->a)(add_kernel, x + 1, x));
    OK(with(1, 1, 0, streams->b)(add_kernel, x + 2, x));
    OK(cudaEventRecord(back, streams->b));
    if (join) {
        OK(cudaStreamWaitEvent(streams->a, back));
        OK(cudaMemsetAsync(x, 0, 4, streams->a));
        OK(with(1, 1, 0, streams->a)(add_kernel, x, x + 1));
        OK(with(1, 1, 0, streams->a)(add_kernel, x, x + 2));
        OK(cudaStreamEndCapture(streams->a, &graph));
    } else {
        FAILS(cudaStreamEndCapture(streams->a, &graph), cudaErrorStreamCaptureUnjoined);
    }
    OK(cudaEventDestroy(back));
    return graph;
}

static void graphs(struct check *check) {
    two_streams streams;
    device_array<int> x(3);
    x[0] = 1;
    long launches = emu_launches();
    cudaGraph_t graph = capture_fork(check, &streams, x.data, true);
    cudaGraphExec_t exec;
    size_t n = 0;
    OK(cudaGraphGetNodes(graph, nullptr, &n));
    CHECK(n == 7, "%zu nodes", n);
    OK(cudaGraphInstantiate(&exec, graph, 0));
    OK(cudaGraphDestroy(graph));
    CHECK(x[0] == 1, "the capture ran");
    for (int i = 0; i < 10; i++) {
        OK(cudaGraphLaunch(exec, streams.b));
        OK(with(1, 1, 0, streams.b)(add_kernel, x.data, x.data + 2));
        if (i % 3 == 0)
            OK(cudaStreamSynchronize(streams.b));
    }
    OK(cudaGraphExecDestroy(exec)); /* what is launched is done all the same */
    OK(cudaStreamSynchronize(streams.b));
    int expected = 1;
    for (int i = 0; i < 10; i++)
        expected *= 4;
    CHECK(x[0] == expected, "got %d, expected %d", x[0], expected);
    CHECK(emu_launches() - launches == 60, "%ld kernels ran", emu_launches() - launches);
}

static __global__ void ticket_kernel(int *next, int *mine) {
    *mine = atomicAdd(next, 1);
}

static void branches_run_in_any_order(struct check *check) {
    two_streams streams;
    device_array<int> x(4);
    cudaGraph_t graph = capture_fork(check, &streams, x.data, false);
    CHECK(!graph, "a graph without an end"); /* nothing of it is left in the next capture */
    cudaGraphExec_t exec;
    int first[2] = {0, 0};
    OK(cudaStreamBeginCapture(streams.a, cudaStreamCaptureModeGlobal));
    OK(cudaMemsetAsync(x.data, 0, 4, streams.a));
    OK(cudaEventRecord(streams.event, streams.a));
    OK(cudaStreamWaitEvent(streams.b, streams.event));
    OK(with(1, 1, 0, streams.a)(ticket_kernel, x.data, x.data + 1));
    OK(with(1, 1, 0, streams.b)(ticket_kernel, x.data, x.data + 2));
    OK(cudaEventRecord(streams.event, streams.b));
    OK(cudaStreamWaitEvent(streams.a, streams.event));
    OK(cudaStreamEndCapture(streams.a, &graph));
    OK(cudaGraphInstantiate(&exec, graph));
    for (int seed = 0; seed < SEEDS; seed++) {
        OK(cudaGraphLaunch(exec, streams.a));
        OK(cudaStreamSynchronize(streams.a));
        CHECK(x[1] + x[2] == 1, "tickets %d, %d", x[1], x[2]);
        first[x[1] & 1]++;
    }
    CHECK(first[0] > 0 && first[1] > 0, "%d, %d", first[0], first[1]);
    OK(cudaGraphDestroy(graph));
    OK(cudaGraphExecDestroy(exec));
}

static void captures_forbid(struct check *check) {
    two_streams streams, others;
    int *memory, other = 0;
    cudaGraph_t graph;
    FAILS(cudaStreamBeginCapture(nullptr, cudaStreamCaptureModeGlobal),
          cudaErrorStreamCaptureUnsupported);
    FAILS(cudaStreamEndCapture(streams.a, &graph), cudaErrorStreamCaptureUnmatched);
    for (int i = 0; i < 5; i++) { /* each of these spoils the capture */
        OK(cudaStreamBeginCapture(streams.a, cudaStreamCaptureModeThreadLocal));
        FAILS(i == 0   ? cudaStreamSynchronize(streams.a)
              : i == 1 ? cudaStreamQuery(streams.a)
              : i == 2 ? cudaDeviceSynchronize()
              : i == 3 ? cudaMalloc(&memory, 4)
                       : cudaEventQuery(others.event),
              cudaErrorStreamCaptureUnsupported);
        FAILS(cudaStreamEndCapture(streams.a, &graph), cudaErrorStreamCaptureInvalidated);
    }
    for (auto mode : {cudaStreamCaptureModeThreadLocal, cudaStreamCaptureModeGlobal}) {
        bool local = mode == cudaStreamCaptureModeThreadLocal;
        device_array<int> x(1);
        OK(cudaMemsetAsync(x.data, 1, 4, streams.a));
        OK(cudaStreamBeginCapture(streams.a, mode));
        OK(cudaMemsetAsync(x.data, 2, 4, streams.a)); /* recorded, not done */
        std::thread([&] {
            other = cudaMalloc(&memory, 4);
            cudaFree(memory); /* waits for what was launched before */
        }).join();
        CHECK(!local || x.data[0] == 0x01010101, "got %x", (unsigned)x.data[0]);
        CHECK(other == (local ? cudaSuccess : cudaErrorStreamCaptureUnsupported), "got %d", other);
        cudaError_t end = cudaStreamEndCapture(streams.a, &graph);
        CHECK(end == (local ? cudaSuccess : cudaErrorStreamCaptureInvalidated), "got %d", end);
        if (graph)
            OK(cudaGraphDestroy(graph));
    }
    OK(cudaStreamBeginCapture(streams.a, cudaStreamCaptureModeRelaxed));
    OK(cudaMalloc(&memory, 4));
    OK(cudaMemsetAsync(memory, 0, 4, others.a));
    OK(cudaEventRecord(others.event, others.a));
    (void)cudaGetLastError();
    FAILS(cudaStreamWaitEvent(streams.a, others.event), cudaErrorStreamCaptureIsolation);
    OK(cudaEventRecord(streams.event, streams.a));
    FAILS(cudaEventSynchronize(streams.event), cudaErrorCapturedEvent);
    FAILS(cudaStreamEndCapture(streams.b, &graph), cudaErrorStreamCaptureUnmatched);
    OK(cudaStreamBeginCapture(others.b, cudaStreamCaptureModeRelaxed));
    FAILS(cudaStreamWaitEvent(others.b, streams.event), cudaErrorStreamCaptureMerge);
    cudaGraph_t other_graph;
    OK(cudaStreamEndCapture(others.b, &other_graph));
    OK(cudaGraphDestroy(other_graph));
    OK(cudaStreamEndCapture(streams.a, &graph));
    OK(cudaGraphDestroy(graph));
    FAILS(cudaStreamWaitEvent(streams.b, streams.event), cudaErrorCapturedEvent);
    OK(cudaFree(memory));
}

/* ---- kernels that overlap the one before ---- */

static __global__ void produce_kernel(int *x) {
    grid_wait();
    grid_launch_dependents();
    x[blockIdx.x * blockDim.x + threadIdx.x] = 1;
}

/* The first warp waits for the grid and then at the barrier, the second one the other way round. */
static __global__ void consume_kernel(const int *x, int *y, bool too_early) {
    DYNAMIC_SHARED(int, shared);
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x), value = too_early ? x[i] : 0;
    if (threadIdx.x < 32)
        grid_wait();
    shared[threadIdx.x] = i;
    __syncthreads();
    if (threadIdx.x >= 32)
        grid_wait();
    value = too_early ? value : x[i];
    y[i] = value + shared[blockDim.x - 1 - threadIdx.x];
}

static launch overlapping(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
    static cudaLaunchAttribute overlap = {cudaLaunchAttributeProgrammaticStreamSerialization, {1}};
    return {{grid, block, shared, stream, &overlap, 1}};
}

/* How many sums are wrong, in a stream or in a graph. */
static int wrong_sums(struct check *check, bool too_early, bool graph) {
    two_streams streams;
    device_array<int> x(256), y(256);
    cudaGraph_t captured;
    cudaGraphExec_t exec;
    OK(cudaMemsetAsync(x.data, 0, 1024, streams.a));
    OK(cudaStreamSynchronize(streams.a));
    if (graph)
        OK(cudaStreamBeginCapture(streams.a, cudaStreamCaptureModeThreadLocal));
    OK(overlapping(4, 64, 0, streams.a)(produce_kernel, x.data));
    OK(overlapping(4, 64, 256, streams.a)(consume_kernel, x.data, y.data, too_early));
    if (graph) {
        OK(cudaStreamEndCapture(streams.a, &captured));
        OK(cudaGraphInstantiate(&exec, captured, 0));
        OK(cudaGraphLaunch(exec, streams.a));
        OK(cudaGraphDestroy(captured));
        OK(cudaGraphExecDestroy(exec));
    }
    OK(cudaStreamSynchronize(streams.a));
    int wrong = 0;
    for (int i = 0; i < 256; i++)
        wrong += y[(size_t)i] != 1 + i / 64 * 64 + 63 - i % 64;
    return wrong;
}

/* Of two kernels that could begin early at the same time, one does. */
static void early_blocks_of_two_streams(struct check *check) {
    two_streams streams;
    device_array<int> x(512), y(512);
    for (int seed = 0; seed < SEEDS; seed++) {
        OK(cudaMemsetAsync(x.data, 0, 2048, streams.a));
        OK(cudaStreamSynchronize(streams.a));
        for (int i = 0; i < 2; i++) {
            cudaStream_t stream = i ? streams.b : streams.a;
            OK(overlapping(4, 64, 0, stream)(produce_kernel, x.data + i * 256));
            OK(overlapping(4, 64, 256, stream)(consume_kernel, x.data + i * 256, y.data + i * 256,
                                               false));
        }
        OK(cudaDeviceSynchronize());
        for (int i = 0; i < 512; i++)
            CHECK(y[(size_t)i] == 1 + i % 256 / 64 * 64 + 63 - i % 64, "thread %d", i);
    }
}

static void early_blocks(struct check *check) {
    for (int graph = 0; graph < 2; graph++) {
        int early = 0, right = 0;
        for (int seed = 0; seed < SEEDS; seed++) {
            CHECK(wrong_sums(check, false, graph) == 0, "read behind grid_wait");
            int wrong = under_tsan ? 0 : wrong_sums(check, true, graph);
            early += wrong == 64; /* one block began before the kernel before it */
            right += wrong == 0;
        }
        CHECK(early > 0 || under_tsan, "no block begins early");
        CHECK(right > 0 && early + right == SEEDS, "%d blocks early, %d not", early, right);
    }
}

/* ---- reports ---- */

enum {
    RETURN_BEFORE_BARRIER,
    BARRIER_OR_SHUFFLE,
    LANE_RETURNED,
    OTHER_OPERATION,
    OTHER_MASK,
    MASK_WITHOUT_SELF,
    SOURCE_OUTSIDE_MASK,
    HALF_A_WARP,
    LOAD_MISALIGNED,
    STORE_MISALIGNED,
    COPY_MISALIGNED,
    COPY_OUTSIDE,
    READ_UNDER_WAY,
    READ_BEHIND,
    WRITE_BEHIND,
    WRITE_BEFORE,
    NULL_POINTER,
    DIVISION,
    STACK,
    HEAP,
    WHERE
};

__attribute__((noinline)) static int deep(int n) {
    volatile char frame[1000];
    frame[n % 1000] = (char)n;
    return n == 0 ? 0 : deep(n - 1) + frame[n % 1000];
}

static __global__ void warp_mistakes_kernel(int mistake, int *out) {
    uint32_t lane = threadIdx.x % 32, all = 0xFFFFFFFF;
    bool is5 = blockIdx.x == 1 && threadIdx.x == 37;
    float c[4] = {0};
    uint32_t fragment[4] = {0};
    if (mistake == RETURN_BEFORE_BARRIER && is5)
        return;
    if (mistake == BARRIER_OR_SHUFFLE && is5)
        __syncwarp();
    if (mistake == LANE_RETURNED && is5)
        return;
    if (mistake == LANE_RETURNED)
        *out = __shfl_xor_sync(all, 1, 1);
    if (mistake == OTHER_OPERATION)
        *out = is5 ? (int)__ballot_sync(all, 1) : __shfl_sync(all, 1, 0);
    if (mistake == OTHER_MASK)
        *out = __shfl_sync(is5 ? all >> 1 : all, 1, 0);
    if (mistake == MASK_WITHOUT_SELF && is5)
        __syncwarp(1);
    if (mistake == SOURCE_OUTSIDE_MASK && lane < 16)
        *out = __shfl_sync(0xFFFF, 1, is5 ? 20 : 2);
    if (mistake == HALF_A_WARP && lane < 16)
        mma_bf16(c, fragment, fragment);
    __syncthreads();
}

static __global__ void memory_mistakes_kernel(int mistake, int *out) {
    DYNAMIC_SHARED(char, shared);
    __syncthreads();
    if (blockIdx.x != 1 || threadIdx.x != 37)
        return;
    volatile char *bytes = shared;
    volatile int zero = 0;
    switch (mistake) {
    case LOAD_MISALIGNED: *out = (int)load16(shared + 8).x; break;
    case STORE_MISALIGNED: store8(shared + 4, make_uint2(1, 2)); break;
    case COPY_MISALIGNED: copy_async16(shared, (char *)out + 4, true); break;
    case COPY_OUTSIDE: copy_async16(shared + 96, out, true); break;
    case READ_BEHIND: *out = bytes[under_asan ? 100 : 128]; break;
    case READ_UNDER_WAY:
        copy_async16(shared, out, true);
        *out = bytes[15];
        break;
    case WRITE_BEHIND: bytes[100] = 1; break;
    case WRITE_BEFORE: bytes[-1] = 1; break;
    case NULL_POINTER: *(volatile int *)(uintptr_t)zero = 1; break;
    case DIVISION: *out = 7 / zero; break;
    case STACK: *out = deep(1000); break;
    case HEAP: out[1000] = 1; break;
    case WHERE: emu_where(); abort();
    default: break;
    }
}

/* Races that no order shows: between warps, or between lanes without __syncwarp. */
static __global__ void races_kernel(int *out, bool same_warp) {
    DYNAMIC_SHARED(int, shared);
    if (same_warp ? threadIdx.x < 2 : threadIdx.x % 32 == 0)
        shared[1] = 7;
    __syncthreads();
    if (threadIdx.x == 0)
        *out = shared[1];
}

/* The last block to arrive sees what the others wrote, if there are fences. */
static __global__ void last_block_kernel(int *parts, unsigned *arrived, int *out, bool fences) {
    DYNAMIC_SHARED(unsigned, before);
    parts[blockIdx.x * blockDim.x + threadIdx.x] = 1;
    if (fences)
        __threadfence();
    __syncthreads();
    if (threadIdx.x == 0)
        *before = atomicAdd(arrived, 1u);
    __syncthreads();
    if (fences)
        __threadfence();
    for (unsigned i = 0; *before == gridDim.x - 1 && i < gridDim.x; i++)
        atomicAdd(out, parts[i * blockDim.x + (threadIdx.x + i) % blockDim.x]);
}

static int last_block(bool fences) {
    device_array<int> parts(256), out(2);
    out[0] = out[1] = 0;
    with(4, 64, 4)(last_block_kernel, parts.data, (unsigned *)&out[1], &out[0], fences);
    cudaDeviceSynchronize();
    return out[0];
}

static void last_block_sums(struct check *check) {
    for (int round = 0; round < 20; round++)
        CHECK(last_block(true) == 256, "another sum");
}

static __global__ void same_place_kernel(int *out) {
    out[threadIdx.x] = 1;
}

static void write_from_all_blocks(void) {
    device_array<int> out(64);
    with(8, 64, 0)(same_place_kernel, out.data);
    cudaDeviceSynchronize();
}

/* A mistake that a program can make, and words of the message that it must get. */
struct mistake {
    const char *name;
    std::function<void()> make;
    std::vector<const char *> words;
};

/* In both kernels block 1, thread 37 is the one that errs. */
static mistake in_kernel(int kind, std::vector<const char *> words) {
    auto make = [kind] {
        device_array<int> out(1000);
        if (kind < LOAD_MISALIGNED) {
            emu_next_kernel("warp_mistakes_kernel");
            with(3, 64, 0)(warp_mistakes_kernel, kind, out.data);
        } else {
            emu_next_kernel("memory_mistakes_kernel");
            with(3, 64, 100)(memory_mistakes_kernel, kind, out.data);
        }
        cudaDeviceSynchronize();
    };
    return {words.back(), make, words};
}

static void use_freed_memory(bool copy) {
    two_streams streams;
    int *memory;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaMalloc(&memory, 8);
    cudaStreamBeginCapture(streams.a, cudaStreamCaptureModeThreadLocal);
    if (copy)
        cudaMemcpyAsync(memory, memory + 1, 4, cudaMemcpyDeviceToDevice, streams.a);
    else
        cudaMemsetAsync(memory, 0, 4, streams.a);
    cudaStreamEndCapture(streams.a, &graph);
    cudaGraphInstantiate(&exec, graph);
    cudaFree(memory);
    cudaGraphLaunch(exec, streams.a);
    cudaStreamSynchronize(streams.a);
}

static void never_wait_for_grid(void) {
    emu_next_kernel("nothing_kernel");
    overlapping(1, 32, 0, nullptr)(nothing_kernel);
    cudaDeviceSynchronize();
}

static void race(bool same_warp) {
    device_array<int> memory(1);
    with(1, 64, 64)(races_kernel, memory.data, same_warp);
    cudaDeviceSynchronize();
}

static void read_too_early(void) {
    struct check check = {0, 0};
    for (int seed = 0; seed < SEEDS; seed++)
        wrong_sums(&check, true, false);
}

#define WARP_MISTAKE   "cuda_emu: warp_mistakes_kernel, block (1, 0, 0), thread ("
#define MEMORY_MISTAKE "cuda_emu: memory_mistakes_kernel, block (1, 0, 0), thread (37, 0, 0): "

static std::vector<mistake> mistakes(void) {
    std::vector<mistake> all = {
        in_kernel(RETURN_BEFORE_BARRIER,
                  {WARP_MISTAKE, "waits forever at __syncthreads", "63 __syncthreads 1 returned"}),
        in_kernel(BARRIER_OR_SHUFFLE,
                  {WARP_MISTAKE "37, 0, 0): waits forever at __syncwarp with mask ffffffff",
                   "for lanes ffffffdf: 64 threads: 63 __syncthreads 1 __syncwarp"}),
        in_kernel(LANE_RETURNED,
                  {WARP_MISTAKE, "waits forever at __shfl_xor_sync with mask ffffffff",
                   "for lanes 00000020: 64 threads:", "31 __shfl_xor_sync 1 returned"}),
        in_kernel(OTHER_OPERATION, {WARP_MISTAKE, "__ballot_sync with", "__shfl_sync with"}),
        in_kernel(OTHER_MASK, {WARP_MISTAKE, "mask 7fffffff", "mask ffffffff"}),
        in_kernel(MASK_WITHOUT_SELF, {WARP_MISTAKE "37, 0, 0): __syncwarp with mask 00000001",
                                      "which is without its own lane 5"}),
        in_kernel(SOURCE_OUTSIDE_MASK,
                  {WARP_MISTAKE, "lane 5 reads lane 20, which is not in the mask 0000ffff"}),
        in_kernel(HALF_A_WARP, {"warp_mistakes_kernel", "waits forever at mma_bf16 with mask "
                                                        "ffffffff for lanes ffff0000"}),
        in_kernel(LOAD_MISALIGNED, {MEMORY_MISTAKE "load16(", "not a multiple of 16"}),
        in_kernel(STORE_MISALIGNED, {MEMORY_MISTAKE "store8(", "not a multiple of 8"}),
        in_kernel(COPY_MISALIGNED, {MEMORY_MISTAKE "copy_async16 from(", "a multiple of 16"}),
        in_kernel(COPY_OUTSIDE, {MEMORY_MISTAKE "copy_async16", "to byte 96 of 100"}),
        in_kernel(WHERE, {MEMORY_MISTAKE "64 threads: ", "  threads (0, 0, 0) to ("}),
        {"outside", __syncthreads, {"cuda_emu: __syncthreads outside a kernel"}},
        {"freed memory",
         [] { use_freed_memory(false); },
         {"cuda_emu: a memset runs after its memory was freed"}},
        {"freed source",
         [] { use_freed_memory(true); },
         {"cuda_emu: a copy runs after its memory was freed"}},
        {"no grid_wait",
         never_wait_for_grid,
         {"cuda_emu: nothing_kernel, block (0, 0, 0)", "never calls grid_wait"}}};
    std::vector<mistake> plain = {
        in_kernel(READ_BEHIND, {MEMORY_MISTAKE "shared memory out of bounds: byte 128 of 100"}),
        in_kernel(WRITE_BEHIND, {"memory_mistakes_kernel, block (1, 0, 0)",
                                 "shared memory out of bounds: byte 100 of 100 was written"}),
        in_kernel(WRITE_BEFORE, {"memory_mistakes_kernel, block (1, 0, 0)",
                                 "shared memory out of bounds: byte -1 of 100 was written"}),
        in_kernel(NULL_POINTER, {MEMORY_MISTAKE "invalid memory access at (nil)"}),
        in_kernel(DIVISION, {MEMORY_MISTAKE "integer division by zero"}),
        in_kernel(STACK, {MEMORY_MISTAKE "the stack of"})};
    std::vector<mistake> asan = {in_kernel(READ_BEHIND, {MEMORY_MISTAKE, "use-after-poison"}),
                                 in_kernel(WRITE_BEHIND, {MEMORY_MISTAKE, "use-after-poison"}),
                                 in_kernel(WRITE_BEFORE, {MEMORY_MISTAKE, "use-after-poison"}),
                                 in_kernel(READ_UNDER_WAY, {MEMORY_MISTAKE, "use-after-poison"}),
                                 in_kernel(HEAP, {MEMORY_MISTAKE, "heap-buffer-overflow"})};
    std::vector<mistake> tsan = {
        {"race of warps", [] { race(false); }, {"data race", "races_kernel"}},
        {"race of lanes", [] { race(true); }, {"data race", "races_kernel"}},
        {"race of blocks", write_from_all_blocks, {"data race", "same_place_kernel"}},
        {"no fence", [] { last_block(false); }, {"data race", "last_block_kernel"}},
        {"read too early", read_too_early, {"data race", "consume_kernel"}}};
    const std::vector<mistake> &more = under_asan ? asan : plain;
    all.insert(all.end(), more.begin(), more.end());
    if (under_tsan)
        all.insert(all.end(), tsan.begin(), tsan.end());
    return all;
}

/* Each in a process of its own, which must not end well. */
static void mistakes_are_reported(struct check *check) {
    std::vector<mistake> all = mistakes();
    for (size_t i = 0; i < all.size(); i++) {
        FILE *file = tmpfile();
        pid_t child = fork();
        if (child == 0) {
            dup2(fileno(file), STDERR_FILENO);
            check_limit(120);
            execl("/proc/self/exe", "test_emu", "--mistake", std::to_string(i).c_str(), nullptr);
            _exit(0);
        }
        int status = 0;
        waitpid(child, &status, 0);
        char text[1 << 16];
        rewind(file);
        text[fread(text, 1, sizeof text - 1, file)] = 0;
        fclose(file);
        CHECK(status != 0, "%s: the child ended well", all[i].name);
        bool hangs = WIFSIGNALED(status) && WTERMSIG(status) == SIGXCPU;
        CHECK(!hangs, "%s: the child hangs", all[i].name);
        for (const char *word : all[i].words)
            CHECK(strstr(text, word), "%s: no \"%s\" in\n%s", all[i].name, word, text);
    }
}

/* Each test has a device of its own, and an order of its own that does not change. */
template <void (*test)(struct check *)> static void fresh(struct check *check) {
    emu_devices(1, 64 << 20, 4);
    emu_seed(1);
    test(check);
    (void)cudaGetLastError();
}

extern "C" const char *__tsan_default_options(void) {
    return "atexit_sleep_ms=0";
}

#define TEST(name)                                                                                 \
    { #name, fresh < name> }

int main(int argc, char **argv) {
    if (argc == 3 && strcmp(argv[1], "--mistake") == 0) {
        mistakes()[(size_t)atoi(argv[2])].make();
        return 0; /* unless a sanitizer has something to say */
    }
    static const struct test tests[] = {
        TEST(bits_and_numbers),
        TEST(halves),
        TEST(bf16_pairs),
        TEST(every_thread_runs_once),
        TEST(shuffles),
        TEST(votes_with_masks),
        TEST(atomics),
        TEST(barriers),
        TEST(barriers_order_memory),
        TEST(shared_memory_is_garbage),
        TEST(orders_follow_the_seed),
        TEST(mma_sums_in_order),
        TEST(asynchronous_copies),
        TEST(errors),
        TEST(devices),
        TEST(device_memory),
        TEST(launch_limits),
        TEST(copies_check_their_pointers),
        TEST(copies_of_rows),
        TEST(copies_are_late),
        TEST(events_order_streams),
        TEST(streams_keep_their_order),
        TEST(others_may_be_late),
        TEST(polling),
        TEST(host_threads),
        TEST(graphs),
        TEST(branches_run_in_any_order),
        TEST(captures_forbid),
        TEST(early_blocks),
        TEST(early_blocks_of_two_streams),
        TEST(last_block_sums),
        TEST(mistakes_are_reported),
    };
    return check_run(tests, sizeof tests / sizeof *tests, argc, argv);
}
