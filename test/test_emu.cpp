/* test_emu.cpp: what cuda_emu.h and cuda_emu_threads.h promise. Each built-in against a formula,
 * each guarantee by a program that needs it, each kind of lateness and disorder by a program that
 * is wrong and must give wrong results for some seed, and each report by a child process that makes
 * the mistake. */
#include "cuda_emu.h"

#include "check.h"
#include <sys/wait.h>
#include <thread>
#include <unistd.h>

static const bool under_asan = false EMU_ASAN(|| true), under_tsan = false EMU_TSAN(|| true);

enum {
    SEEDS = 60,
    MOST = under_tsan ? 256 : 1024 /* threads of a block; there each takes a megabyte */
};

#define OK(call)                                                                                   \
    do {                                                                                           \
        cudaError_t got = (call);                                                                  \
        CHECK(got == cudaSuccess, "%s", cudaGetErrorString(got));                                  \
    } while (0)
#define FAILS(call, error)                                                                         \
    do {                                                                                           \
        cudaError_t got = (call);                                                                  \
        CHECK(got == (error), "got \"%s\"", cudaGetErrorString(got));                              \
        CHECK(cudaGetLastError() == (error), "the last error is another one");                     \
        CHECK(cudaGetLastError() == cudaSuccess, "the last error is not forgotten");               \
    } while (0)
#define RUN(launch)                                                                                \
    do {                                                                                           \
        OK(launch);                                                                                \
        OK(cudaDeviceSynchronize());                                                               \
    } while (0)

/* Puts a kernel into a stream: with(grid, block, shared bytes, stream)(kernel, arguments...). */
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

static launch overlapping(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
    static cudaLaunchAttribute overlap = {cudaLaunchAttributeProgrammaticStreamSerialization, {1}};
    return {{grid, block, shared, stream, &overlap, 1}};
}

/* Device memory that the host reads and writes directly, as only an emulator allows. */
template <typename T> struct device_array {
    T *data = nullptr;
    explicit device_array(size_t n) {
        if (cudaMalloc(reinterpret_cast<void **>(&data), n * sizeof(T)) != cudaSuccess)
            abort();
    }
    device_array(size_t n, T value) : device_array(n) {
        std::fill(data, data + n, value);
    }
    ~device_array() {
        cudaFree(data);
    }
    device_array(const device_array &) = delete;
    T &operator[](size_t i) const {
        return data[i];
    }
};

static int *pinned_ints(size_t n) {
    void *memory;
    if (cudaHostAlloc(&memory, n * sizeof(int), cudaHostAllocPortable) != cudaSuccess)
        abort();
    return static_cast<int *>(memory);
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

static __global__ void nothing_kernel(void) {}

static __global__ void add_kernel(int *to, const int *from) {
    *to += *from;
}

/* ---- functions of one thread ---- */

static void bits_and_numbers(struct check *check) {
    CHECK(__fdividef(3.0f, 2.0f) == 1.5f, "got %g", (double)__fdividef(3.0f, 2.0f));
    CHECK(__float_as_uint(1.0f) == 0x3F800000 && __uint_as_float(0x40000000) == 2.0f, "bits");
    CHECK(__expf(0.0f) == 1.0f, "got %g", (double)__expf(0.0f));
    CHECK(sizeof(uint4) == 16 && alignof(uint4) == 16 && alignof(float2) == 8, "alignment");
    uint4 v = make_uint4(1, 2, 3, 4);
    int2 w = make_int2(-1, -2);
    float4 f = make_float4(1, 2, 3, 4);
    CHECK(v.x == 1 && v.w == 4 && w.x == -1 && w.y == -2, "another value");
    CHECK(load16(&v).z == 3 && load8(&v.z).y == 4, "another value");
    CHECK(f.y == 2 && f.w == 4 && alignof(float4) == 16, "another value");
    CHECK(isnan(__uint_as_float(0xFFFFFFFF)), "the garbage is no NaN in f32");
    CHECK(isnan(emu_from_bf16(0xFFFF)), "the garbage is no NaN in bf16");
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

/* No bf16 is nearer to the exact value; where another is as near, it is the even one. */
static void bf16_sums_of_products(struct check *check) {
    for (int i = 0; i < 200000; i++) {
        uint32_t x[3]; /* exponents so near that long double has room for the exact sum */
        for (uint32_t &bits : x)
            bits = emu_random(2) << 15 | (117 + emu_random(20)) << 7 | emu_random(128);
        uint32_t high = fma_bf16(x[0] << 16 | x[1], x[1] << 16 | x[2], x[2] << 16 | x[0]) >> 16;
        uint32_t got = fma_bf16(x[0], x[1], x[2]);
        long double exact =
            (long double)emu_from_bf16(x[0]) * emu_from_bf16(x[1]) + emu_from_bf16(x[2]);
        long double far = fabsl(emu_from_bf16(got) - exact);
        for (uint32_t other : {got - 1, got + 1}) {
            long double as_far = fabsl(emu_from_bf16(other) - exact);
            CHECK(far < as_far || (far == as_far && got % 2 == 0) || exact == 0,
                  "%04x * %04x + %04x: got %04x", x[0], x[1], x[2], got);
        }
        CHECK(high == got, "%04x in the low half, %04x in the high one", got, high);
    }
    /* 1.5 (1 + 2^-7) is half-way between two; 2^-100 decides, though no double has both */
    CHECK(fma_bf16(0x3FC0, 0x3F81, 0) == 0x3FC2, "got %x", fma_bf16(0x3FC0, 0x3F81, 0));
    CHECK(fma_bf16(0x3FC0, 0x3F81, 0x0D80) == 0x3FC2, "a little more");
    CHECK(fma_bf16(0x3FC0, 0x3F81, 0x8D80) == 0x3FC1, "a little less");
    CHECK(fma_bf16(0x7F7F, 0x4000, 0x3F80) == 0x7F80, "no infinity");
    CHECK((fma_bf16(0x7F80, 0, 0) & 0x7FFF) > 0x7F80, "no NaN");
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
            device_array<unsigned> out(n, 0);
            RUN(with(grid, block, 0)(places_kernel, out.data));
            for (size_t i = 0; i < n; i++)
                CHECK(out[i] == (i / n_threads << 16 | i % n_threads), "thread %zu: %08x", i,
                      out[i]);
        }
}

/* In the second warp all lanes vote the other way round. */
static __global__ void warp_kernel(int amount, int64_t *out) {
    uint32_t all = 0xFFFFFFFF;
    int lane = (int)threadIdx.x % 32;
    bool vote = (lane % 3 == amount % 3) != (threadIdx.x >= 32);
    out += threadIdx.x * 7;
    out[0] = __shfl_sync(all, lane, amount);
    out[1] = (int64_t)__shfl_xor_sync(all, (float)lane, amount);
    out[2] = __shfl_xor_sync(all, (int64_t)lane << 40 | 7, amount);
    __syncwarp();
    out[3] = __ballot_sync(all, vote);
    out[4] = __any_sync(all, lane == amount && threadIdx.x < 32);
    out[5] = (int64_t)__shfl_sync(all, (unsigned)lane, 32 + amount);
    out[6] = transpose_matrix((uint32_t)(2 * lane << 16 | 2 * lane | 0x10000)); /* 8 row + column */
}

static void warp_operations(struct check *check) {
    device_array<int64_t> out(64 * 7);
    for (int amount = 0; amount < 32; amount++) {
        RUN(with(1, 64, 0)(warp_kernel, amount, out.data));
        int64_t votes = 0;
        for (int lane = 0; lane < 32; lane++)
            votes |= (int64_t)(lane % 3 == amount % 3) << lane;
        for (int i = 0; i < 64; i++) {
            int lane = i % 32;
            int64_t turned = lane % 4 * 16 + lane / 4;
            int64_t expected[7] = {amount,
                                   lane ^ amount,
                                   (int64_t)(lane ^ amount) << 40 | 7,
                                   i < 32 ? votes : ~votes & 0xFFFFFFFF,
                                   i < 32,
                                   amount,
                                   turned | (turned + 8) << 16};
            for (int j = 0; j < 7; j++)
                CHECK(out[(size_t)(i * 7 + j)] == expected[j], "%d, thread %d, result %d: got %llx",
                      amount, i, j, (long long)out[(size_t)(i * 7 + j)]);
        }
    }
}

static __global__ void atomics_kernel(int *sum, unsigned *sums, unsigned long long *long_sum) {
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    atomicAdd(sum, i);
    atomicAdd(&sums[0], (unsigned)i << 20);
    atomicMax(&sums[1], (unsigned)i << 20);
    atomicAdd(&long_sum[0], (unsigned long long)i << 32);
    atomicMax(&long_sum[1], (unsigned long long)i << 32);
}

static void atomics(struct check *check) {
    device_array<int> sum(1, 3);
    device_array<unsigned> sums(2, 7);
    device_array<unsigned long long> long_sum(2, 5);
    RUN(with(4, 64, 0)(atomics_kernel, sum.data, sums.data, long_sum.data));
    CHECK(sum[0] == 3 + 255 * 128, "got %d", sum[0]);
    CHECK(sums[0] == 7 + (255u * 128 << 20), "got %u", sums[0]);
    CHECK(sums[1] == 255u << 20, "got %u", sums[1]);
    CHECK(long_sum[0] == 5 + (255ull * 128 << 32), "got %llx", long_sum[0]);
    CHECK(long_sum[1] == 255ull << 32, "got %llx", long_sum[1]);
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

/* The last warp stands aside: it takes part in none of the two barriers of some threads. */
static __global__ void no_races_kernel(int *out) {
    DYNAMIC_SHARED(int, shared);
    if (threadIdx.x >= 64)
        return;
    shared[threadIdx.x] = 1 + (int)threadIdx.x;
    __syncwarp();
    int value = shared[threadIdx.x ^ 1];
    sync_threads<1, 64>();
    shared[63 - threadIdx.x] = value;
    sync_threads<15, 64>();
    out[blockIdx.x * 64 + threadIdx.x] = shared[threadIdx.x];
}

/* Here a report of ThreadSanitizer would be a false one. */
static void barriers_order_memory(struct check *check) {
    device_array<int> out(256);
    RUN(with(4, 96, 256)(no_races_kernel, out.data));
    for (size_t i = 0; i < 256; i++)
        CHECK(out[i] == 1 + (int)((63 - i % 64) ^ 1), "thread %zu: got %d", i, out[i]);
}

static __global__ void shared_is_fresh_kernel(int n, int *wrong) {
    DYNAMIC_SHARED(uint32_t, shared);
    for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) {
        atomicAdd(wrong, shared[i] != 0xFFFFFFFF);
        shared[i] = 1;
    }
}

static void shared_memory_is_garbage(struct check *check) {
    device_array<int> wrong(1, 0);
    RUN(with(5, 64, 4000)(shared_is_fresh_kernel, 1000, wrong.data));
    CHECK(wrong[0] == 0, "%d words of the last block are left", wrong[0]);
}

static __global__ void order_kernel(int *next, int *blocks, int *threads) {
    int i = atomicAdd(next, 1);
    blocks[i] = (int)blockIdx.x;
    threads[i] = (int)threadIdx.x;
}

/* The blocks and the threads of 16 blocks of 2 warps, in the order in which they ran. */
static std::vector<int> order_of(uint64_t seed) {
    device_array<int> next(1, 0), blocks(1024), threads(1024);
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
        RUN(with(1, 32, 0)(mma_kernel, a.data, b.data, c.data, out.data));
        for (size_t i = 0; i < 128; i++) {
            float sum = c[i];
            for (size_t k = 0; k < 16; k++)
                sum = fmaf(emu_from_bf16(a[i / 8 * 16 + k]), emu_from_bf16(b[i % 8 * 16 + k]), sum);
            CHECK(out[i] == sum, "output %zu: got %.9g, expected %.9g", i, (double)out[i],
                  (double)sum);
        }
    }
}

/* Element (i, j) of matrix m is 64 m + 8 i + j; rows lie 32 bytes apart, the last one first. */
static __global__ void matrices_kernel(uint32_t *out) {
    DYNAMIC_SHARED(uint16_t, shared);
    int lane = (int)threadIdx.x;
    uint16_t *row = shared + (31 - lane) * 16;
    for (int j = 0; j < 8; j++)
        row[j] = (uint16_t)(lane * 8 + j);
    __syncwarp();
    load_matrices(out + lane * 8, row);
    load_matrices_transposed(out + lane * 8 + 4, row);
}

static void matrices_from_shared_memory(struct check *check) {
    device_array<uint32_t> out(256);
    RUN(with(1, 32, 1024)(matrices_kernel, out.data));
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t group = i / 8 / 4, quad = i / 8 % 4, m = i % 4, turned = i % 8 / 4;
        uint32_t first = 64 * m + (turned ? 16 * quad + group : 8 * group + 2 * quad);
        uint32_t expected = first | (first + (turned ? 8 : 1)) << 16;
        CHECK(out[i] == expected, "lane %u, register %u: got %x, expected %x", i / 8, i % 8, out[i],
              expected);
    }
}

template <typename T> static __global__ void hints_kernel(const T *from, T *to) {
    __stcg(&to[2 * threadIdx.x], __ldcg(&from[threadIdx.x]));
    __stcg(&to[2 * threadIdx.x + 1], from[threadIdx.x]);
}

template <typename T> static void hints_of(struct check *check) {
    device_array<T> from(32), to(64);
    for (size_t i = 0; i < 32 * sizeof(T); i++)
        reinterpret_cast<char *>(from.data)[i] = (char)i;
    RUN(with(1, 32, 0)(hints_kernel<T>, from.data, to.data));
    for (size_t i = 0; i < 64; i++)
        CHECK(memcmp(&to[i], &from[i / 2], sizeof(T)) == 0, "another value at %zu", i);
}

static void loads_and_stores_with_hints(struct check *check) {
    hints_of<int>(check);
    hints_of<float>(check);
    hints_of<float2>(check);
    hints_of<float4>(check);
}

/* ---- mbarriers ---- */

/* Each lane fetches 16 bytes, and looks at them before they are there. */
static __global__ void pieces_kernel(const int *from, int *early, int *out) {
    DYNAMIC_SHARED(int, shared);
    uint64_t *barrier = reinterpret_cast<uint64_t *>(shared + 128);
    int *own = shared + threadIdx.x * 4;
    if (threadIdx.x == 0) {
        barrier_init(barrier, COPY_ARRIVALS);
        barriers_ready();
    }
    __syncthreads();
    *own = 9;
    barrier_wait(barrier, 1); /* the phase before the first one is over */
    copy_pieces(own, from + threadIdx.x * 4, 16, false, barrier);
    copies_sent(barrier);
    early[threadIdx.x] = under_asan ? -1 : *own; /* which would report it */
    barrier_wait(barrier, 0);
    out[threadIdx.x] = *own;
}

static void pieces_are_late(struct check *check) {
    device_array<int> from(128), early(32), out(32);
    int n_late = 0;
    for (int i = 0; i < 128; i++)
        from[(size_t)i] = i;
    for (int seed = 0; seed < SEEDS; seed++) {
        RUN(with(1, 32, 128 * 4 + 8)(pieces_kernel, from.data, early.data, out.data));
        for (int i = 0; i < 32; i++) {
            int value = early[(size_t)i];
            CHECK(out[(size_t)i] == i * 4, "lane %d: got %d", i, out[(size_t)i]);
            CHECK(value == -1 || value == i * 4, "lane %d: %d before it is there", i, value);
            n_late += value == -1;
        }
    }
    CHECK(n_late > 0 && (under_asan || n_late < SEEDS * 32), "%d pieces late", n_late);
}

enum { STAGES = 3, STAGE = 1024, ROUNDS = 8, CONSUMERS = 64 };

/* A producer warp feeds two others through a ring of stages. They may be wrong: read a stage before
 * it is full, or free it before they have read it. */
enum wrong { RIGHT, READ_EARLY, FREE_EARLY };

static __global__ void ring_kernel(const int *from, int *out, int wrong) {
    DYNAMIC_SHARED(char, shared);
    uint64_t *full = reinterpret_cast<uint64_t *>(shared + STAGES * STAGE), *empty = full + STAGES;
    int thread = (int)threadIdx.x;
    if (thread < STAGES) {
        barrier_init(&full[thread], COPY_ARRIVALS);
        barrier_init(&empty[thread], CONSUMERS);
        barriers_ready();
    }
    __syncthreads();
    for (int i = 0; i < ROUNDS; i++) {
        int slot = i % STAGES, turn = i / STAGES % 2;
        char *stage = shared + slot * STAGE;
        if (thread >= CONSUMERS) {
            int piece = thread % 32 * 32, bytes = thread % 2 ? 16 : 32; /* the rest stays garbage */
            barrier_wait(&empty[slot], turn ^ 1);
            copy_pieces(stage + piece, (const char *)(from + i * STAGE / 4) + piece,
                        thread % 32 == 31 ? 0 : bytes, true, &full[slot]);
            copies_sent(&full[slot]);
        } else {
            if (wrong != READ_EARLY)
                barrier_wait(&full[slot], turn);
            if (wrong == FREE_EARLY)
                barrier_arrive(&empty[slot]);
            sync_threads<1, CONSUMERS>();
            out[i * CONSUMERS + thread] = reinterpret_cast<int *>(stage)[thread ^ 32];
            if (wrong == READ_EARLY)
                barrier_wait(&full[slot], turn);
            if (wrong != FREE_EARLY)
                barrier_arrive(&empty[slot]);
        }
    }
}

static int wrong_in_ring(struct check *check, enum wrong how) {
    device_array<int> from(ROUNDS * STAGE / 4), out(ROUNDS * CONSUMERS, 0);
    for (int i = 0; i < ROUNDS * STAGE / 4; i++)
        from[(size_t)i] = i;
    size_t shared = STAGES * STAGE + 2 * STAGES * 8;
    RUN(with(1, CONSUMERS + 32, shared)(ring_kernel, from.data, out.data, how));
    int wrong = 0;
    for (int i = 0; i < ROUNDS * CONSUMERS; i++) {
        int at = (i % CONSUMERS) ^ 32;
        wrong += out[(size_t)i] != (at % 16 >= 12 ? -1 : i / CONSUMERS * STAGE / 4 + at);
    }
    return wrong;
}

static void rings_of_stages(struct check *check) {
    bool plain = !under_asan && !under_tsan; /* which report it */
    int read_early = 0, free_early = 0;
    for (int seed = 0; seed < SEEDS; seed++) {
        CHECK(wrong_in_ring(check, RIGHT) == 0, "it waits, and something is wrong");
        read_early += plain && wrong_in_ring(check, READ_EARLY) > 0;
        free_early += plain && wrong_in_ring(check, FREE_EARLY) > 0;
    }
    CHECK(!plain || (read_early > 0 && free_early > 0), "read too early %d times, freed %d times",
          read_early, free_early);
}

/* ---- devices, errors, limits ---- */

static void errors(struct check *check) {
    const char *text = cudaGetErrorString(cudaErrorMemoryAllocation);
    CHECK(strcmp(text, "out of memory") == 0, "got \"%s\"", text);
    text = cudaGetErrorString((cudaError_t)12345);
    CHECK(strcmp(text, "unrecognized error code") == 0, "got \"%s\"", text);
    FAILS(cudaSetDevice(1), cudaErrorInvalidDevice);
    FAILS(cudaSetDevice(-1), cudaErrorInvalidDevice);
    emu_fail("cudaStreamSynchronize", 2);
    OK(cudaStreamSynchronize(nullptr));
    OK(cudaStreamSynchronize(nullptr));
    FAILS(cudaStreamSynchronize(nullptr), cudaErrorLaunchFailure);
    OK(cudaStreamSynchronize(nullptr));
    emu_fail("cudaMalloc", 0);
    void *memory;
    FAILS(cudaMalloc(&memory, 4), cudaErrorMemoryAllocation);
    emu_fail("cudaLaunchKernelEx", 0);
    FAILS(with(1, 1, 0)(nothing_kernel), cudaErrorLaunchFailure);
    emu_devices(0, 0, 0);
    int count = 7;
    FAILS(cudaGetDeviceCount(&count), cudaErrorNoDevice);
    CHECK(count == 0, "%d devices of none", count);
    FAILS(cudaSetDevice(0), cudaErrorNoDevice);
}

static void devices(struct check *check) {
    emu_devices(3, 1 << 20, 132);
    cudaDeviceProp properties;
    int count = 0, value = 0, least = 0, greatest = 0;
    OK(cudaGetDeviceCount(&count));
    OK(cudaGetDeviceProperties(&properties, 2));
    CHECK(count == 3, "%d devices", count);
    CHECK(properties.multiProcessorCount == 132 && properties.totalGlobalMem == 1 << 20 &&
              properties.major == 9 && properties.l2CacheSize > 1 << 20,
          "another value");
    FAILS(cudaGetDeviceProperties(&properties, 3), cudaErrorInvalidDevice);
    OK(cudaDeviceGetStreamPriorityRange(&least, &greatest));
    CHECK(greatest < least, "%d is not before %d", greatest, least);
    OK(cudaSetDevice(2));
    OK(cudaDeviceCanAccessPeer(&value, 2, 0));
    CHECK(value == 1, "no peer access");
    OK(cudaDeviceEnablePeerAccess(0, 0));
    FAILS(cudaDeviceEnablePeerAccess(2, 0), cudaErrorInvalidDevice);
    OK(cudaDriverGetVersion(&value));
    CHECK(value >= 12000, "%d", value);
    OK(cudaRuntimeGetVersion(&value));
    CHECK(value >= 12000, "%d", value);
    void *here, *there = nullptr;
    OK(cudaMalloc(&here, 1 << 20)); /* all of this device: another host thread is at device 0 */
    std::thread([&] { cudaMalloc(&there, 1 << 20); }).join();
    CHECK(there, "another host thread is at this thread's device");
}

static void device_memory(struct check *check) {
    emu_devices(2, 1 << 20, 4);
    size_t free_bytes = 0, total = 0;
    void *a, *b, *pinned;
    OK(cudaMalloc(&a, 600 << 10));
    FAILS(cudaMalloc(&b, 600 << 10), cudaErrorMemoryAllocation);
    CHECK(!b, "a pointer without memory");
    OK(cudaMemGetInfo(&free_bytes, &total));
    CHECK(total == 1 << 20 && free_bytes == 424 << 10, "%zu of %zu are free", free_bytes, total);
    const char *bytes = static_cast<char *>(a);
    CHECK((uintptr_t)a % 256 == 0, "at %p", a);
    CHECK(bytes[0] == (char)0xFF && bytes[(600 << 10) - 1] == (char)0xFF, "it is no garbage");
    OK(cudaSetDevice(1));
    OK(cudaMalloc(&b, 1 << 20)); /* another device's */
    OK(cudaHostAlloc(&pinned, 4 << 20, cudaHostAllocPortable));
    FAILS(cudaFree(pinned), cudaErrorInvalidValue);
    FAILS(cudaFreeHost(b), cudaErrorInvalidValue);
    FAILS(cudaFree(static_cast<char *>(a) + 16), cudaErrorInvalidValue);
    OK(cudaFree(a));
    FAILS(cudaFree(a), cudaErrorInvalidValue);
    OK(cudaFree(nullptr));
    OK(cudaFree(b));
    OK(cudaFreeHost(pinned));
    OK(cudaMalloc(&a, 0));
    CHECK(!a, "no bytes have an address");
    OK(cudaMalloc(&b, 1 << 20)); /* what was freed is there again */
}

/* Memory of the caller's, pinned for a while. */
static void registered_memory(struct check *check) {
    constexpr int PAGE = EMU_PAGE;
    emu_devices(2, 1 << 20, 4);
    alignas(PAGE) static char host[3 * PAGE + 64];
    device_array<char> device(2 * PAGE, 1);
    void *pinned;
    OK(cudaHostAlloc(&pinned, 64, cudaHostAllocPortable));
    FAILS(cudaHostRegister(nullptr, 64, cudaHostRegisterPortable), cudaErrorInvalidValue);
    FAILS(cudaHostRegister(host, 0, cudaHostRegisterPortable), cudaErrorInvalidValue);
    FAILS(cudaHostRegister(host, 64, 2), cudaErrorInvalidValue);
    FAILS(cudaHostRegister(device.data, 64, cudaHostRegisterPortable), cudaErrorInvalidValue);
    FAILS(cudaHostRegister(pinned, 64, cudaHostRegisterPortable), cudaErrorInvalidValue);
    emu_fail("cudaHostRegister", 0);
    FAILS(cudaHostRegister(host, 64, cudaHostRegisterPortable), cudaErrorMemoryAllocation);
    OK(cudaHostRegister(host + PAGE, PAGE, cudaHostRegisterPortable));
    for (int at : {PAGE, PAGE - 1, 2 * PAGE - 1, PAGE - 64})
        FAILS(cudaHostRegister(host + at, 65, cudaHostRegisterPortable),
              cudaErrorHostMemoryAlreadyRegistered);
    OK(cudaHostRegister(host + 2 * PAGE, PAGE + 64, cudaHostRegisterPortable));
    for (int at : {0, PAGE}) /* from pageable to pinned memory; from one pinned piece to another */
        FAILS(cudaMemcpyAsync(device.data, host + at, PAGE + 1, cudaMemcpyDefault, nullptr),
              cudaErrorInvalidValue);
    OK(cudaMemcpyAsync(host + PAGE, device.data, PAGE, cudaMemcpyDefault, nullptr));
    CHECK(host[PAGE] == 0, "a copy to pinned memory runs at once");
    OK(cudaMemcpyAsync(host, device.data, PAGE, cudaMemcpyDefault, nullptr));
    CHECK(host[0] == 1 && host[PAGE] == 1, "a copy to pageable memory is waited for");
    FAILS(cudaFreeHost(host + PAGE), cudaErrorInvalidValue);
    FAILS(cudaHostUnregister(host), cudaErrorHostMemoryNotRegistered);
    FAILS(cudaHostUnregister(pinned), cudaErrorHostMemoryNotRegistered);
    OK(cudaHostUnregister(host + PAGE));
    FAILS(cudaHostUnregister(host + PAGE), cudaErrorHostMemoryNotRegistered);
    OK(cudaHostUnregister(host + 2 * PAGE));
    OK(cudaMemcpyAsync(host + PAGE, device.data, PAGE + 1, cudaMemcpyDefault, nullptr));
    OK(cudaFreeHost(pinned));
}

static __global__ void shared_ends_kernel(int bytes, int *runs) {
    DYNAMIC_SHARED(char, shared);
    if (threadIdx.x == 0) {
        shared[0] = shared[bytes - 1] = 0;
        atomicAdd(runs, 1);
    }
}

static void launch_limits(struct check *check) {
    emu_devices(2, 1 << 20, 4);
    const struct {
        dim3 grid, block;
    } refused[] = {{{0}, {32}},   {{1, 65536}, {32}},    {{1}, {0}},
                   {{1}, {1025}}, {{1}, dim3(1, 1, 65)}, {{1}, {33, 32}}};
    for (const auto &size : refused)
        FAILS(with(size.grid, size.block, 0)(nothing_kernel), cudaErrorInvalidConfiguration);
    int *runs = pinned_ints(1);
    *runs = 0;
    OK(with(1, 32, 48 << 10)(shared_ends_kernel, 48 << 10, runs));
    FAILS(with(1, 32, (48 << 10) + 1)(shared_ends_kernel, 1, runs), cudaErrorInvalidValue);
    auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
    FAILS(cudaFuncSetAttribute(shared_ends_kernel, attribute, 228 << 10), cudaErrorInvalidValue);
    OK(cudaFuncSetAttribute(shared_ends_kernel, attribute, 227 << 10));
    OK(with(1, 32, 227 << 10)(shared_ends_kernel, 227 << 10, runs));
    FAILS(with(1, 32, (227 << 10) + 1)(shared_ends_kernel, 1, runs), cudaErrorInvalidValue);
    FAILS(with(1, 32, 49 << 10)(nothing_kernel), cudaErrorInvalidValue);
    CHECK(*runs == 0, "a kernel runs before anybody waits for it");
    OK(cudaDeviceSynchronize());
    CHECK(*runs == 2, "%d kernels ran", *runs);
    two_streams streams;
    OK(cudaSetDevice(1)); /* attributes, streams and events are a device's */
    FAILS(with(1, 32, 227 << 10)(shared_ends_kernel, 1, runs), cudaErrorInvalidValue);
    FAILS(cudaEventRecord(streams.event, nullptr), cudaErrorInvalidResourceHandle);
    FAILS(with(1, 32, 0, streams.a)(nothing_kernel), cudaErrorInvalidResourceHandle);
    cudaStream_t stream;
    OK(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, 0));
    OK(cudaStreamDestroy(stream));
    FAILS(cudaStreamSynchronize(stream), cudaErrorInvalidResourceHandle);
    OK(cudaFreeHost(runs));
}

/* ---- copies ---- */

static void copies_check_their_pointers(struct check *check) {
    emu_devices(2, 1 << 20, 4);
    void *memory;
    char *a, *b, host[64] = {0};
    int *pinned = pinned_ints(16);
    OK(cudaMalloc(&memory, 64));
    a = static_cast<char *>(memory);
    OK(cudaSetDevice(1));
    OK(cudaMalloc(&memory, 64));
    b = static_cast<char *>(memory);
    const struct {
        void *to;
        const void *from;
        cudaMemcpyKind kind;
        cudaError_t error;
    } refused[] = {{host, host, cudaMemcpyHostToDevice, cudaErrorInvalidValue},
                   {a, a, cudaMemcpyHostToDevice, cudaErrorInvalidValue},
                   {a, host, cudaMemcpyDeviceToDevice, cudaErrorInvalidValue},
                   {a, pinned, cudaMemcpyDeviceToHost, cudaErrorInvalidValue},
                   {a + 1, host, cudaMemcpyDefault, cudaErrorInvalidValue},
                   {nullptr, host, cudaMemcpyDefault, cudaErrorInvalidValue},
                   {a, host, (cudaMemcpyKind)9, cudaErrorInvalidMemcpyDirection}};
    for (const auto &copy : refused)
        FAILS(cudaMemcpyAsync(copy.to, copy.from, 64, copy.kind, nullptr), copy.error);
    FAILS(cudaMemcpy2DAsync(a, 8, host, 16, 9, 4, cudaMemcpyDefault, nullptr),
          cudaErrorInvalidPitchValue);
    FAILS(cudaMemcpy2DAsync(a, 16, host, 16, 16, 5, cudaMemcpyDefault, nullptr),
          cudaErrorInvalidValue);
    FAILS(cudaMemcpyPeerAsync(a, 1, b, 1, 64, nullptr), cudaErrorInvalidValue);
    FAILS(cudaMemcpyPeerAsync(a, 0, b, 2, 64, nullptr), cudaErrorInvalidDevice);
    FAILS(cudaMemsetAsync(host, 0, 64, nullptr), cudaErrorInvalidValue);
    OK(cudaMemcpyAsync(a, nullptr, 0, cudaMemcpyHostToDevice, nullptr));
    OK(cudaMemcpy2DAsync(a, 16, pinned, 16, 16, 4, cudaMemcpyHostToDevice, nullptr));
    OK(cudaMemcpyPeerAsync(b, 1, a, 0, 64, nullptr));
    OK(cudaMemcpyAsync(host, b, 64, cudaMemcpyDefault, nullptr));
    CHECK(host[63] == (char)0xFF, "a copy to pageable memory is waited for");
    OK(cudaFree(a));
    FAILS(cudaMemcpyAsync(a, host, 64, cudaMemcpyHostToDevice, nullptr), cudaErrorInvalidValue);
    OK(cudaFree(b));
    OK(cudaFreeHost(pinned));
}

static void copies_of_rows(struct check *check) {
    for (size_t width : {0, 1, 7, 16})
        for (size_t height : {0, 1, 5}) {
            device_array<char> device(16 * 20, 9);
            char in[12 * 19], out[12 * 18] = {0};
            std::iota(in, in + sizeof in, (char)0);
            OK(cudaMemcpy2DAsync(device.data, 20, in, 19, width, height, cudaMemcpyHostToDevice,
                                 nullptr));
            OK(cudaMemcpy2DAsync(out, 18, device.data, 20, width, height, cudaMemcpyDeviceToHost,
                                 nullptr));
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
    int *pinned = pinned_ints(2), pageable = 1;
    device_array<int> device(2);
    pinned[0] = 1;
    OK(cudaMemcpyAsync(device.data, pinned, 4, cudaMemcpyHostToDevice, nullptr));
    OK(cudaMemcpyAsync(device.data + 1, &pageable, 4, cudaMemcpyHostToDevice, nullptr));
    pinned[0] = pageable = 2;
    CHECK(device[0] == -1 && device[1] == -1, "a copy runs at once");
    OK(cudaDeviceSynchronize());
    CHECK(device[0] == 2, "pinned memory is read when the copy runs: got %d", device[0]);
    CHECK(device[1] == 1, "pageable memory is read at once: got %d", device[1]);
    OK(cudaMemcpyAsync(pinned + 1, device.data, 4, cudaMemcpyDeviceToHost, nullptr));
    CHECK(pinned[1] == -1, "a copy to pinned memory runs at once");
    OK(cudaDeviceSynchronize());
    CHECK(pinned[1] == 2, "got %d", pinned[1]);
    OK(cudaMemcpy(pinned, device.data + 1, 4, cudaMemcpyDefault));
    CHECK(pinned[0] == 1, "a copy that waits: got %d", pinned[0]);
    OK(cudaFreeHost(pinned));
}

/* ---- streams and events ---- */

/* What one stream sees of x, which another one sets to 0 and at last to 0x01010101. */
static int value_seen(bool wait, bool sync_late_stream) {
    two_streams streams;
    device_array<int> x(2);
    int *seen = pinned_ints(1);
    cudaMemsetAsync(x.data, 0, 8, streams.a);
    for (int i = 0; i < 4; i++)
        with(1, 1, 0, streams.a)(add_kernel, x.data, x.data + 1);
    cudaMemsetAsync(x.data, 1, 4, streams.a);
    cudaEventRecord(streams.event, streams.a);
    cudaMemsetAsync(x.data + 1, 1, 4, streams.a); /* behind the event */
    if (wait)
        cudaStreamWaitEvent(streams.b, streams.event, 0);
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
        int seen = value_seen(true, seed & 1);
        CHECK(seen == 0x01010101, "with the event: got %08x", seen);
        seen = value_seen(false, seed & 1);
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
    int untouched = 0, begun = 0;
    for (int seed = 0; seed < SEEDS; seed++) {
        device_array<int> x(2, 0);
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
        OK(cudaStreamSynchronize(streams.a));
        CHECK(x[0] == 0x09090909, "the stream is not empty: %08x", x[0]);
    }
    (void)cudaGetLastError();
    CHECK(not_ready > SEEDS / 2 && not_ready < 10 * SEEDS, "polled in vain %d times", not_ready);
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
                cudaEventRecord(streams.event, streams.a);
                if (i % 7 == t)
                    cudaEventQuery(streams.event);
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

/* A graph that triples x[0], by way of x[1]; between launches a kernel adds x[1] once more. */
static void graphs(struct check *check) {
    two_streams streams;
    device_array<int> x(2, 1);
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    OK(cudaStreamBeginCapture(streams.a, cudaStreamCaptureModeThreadLocal));
    OK(cudaMemsetAsync(x.data + 1, 0, 4, streams.a));
    for (int i = 0; i < 2; i++)
        OK(with(1, 1, 0, streams.a)(add_kernel, x.data + 1, x.data));
    OK(with(1, 1, 0, streams.a)(add_kernel, x.data, x.data + 1));
    OK(cudaStreamEndCapture(streams.a, &graph));
    OK(cudaGraphInstantiate(&exec, graph, 0));
    OK(cudaGraphDestroy(graph));
    OK(cudaDeviceSynchronize());
    CHECK(x[0] == 1 && x[1] == 1, "what was recorded ran");
    int expected = 1;
    for (int i = 0; i < 10; i++) {
        OK(cudaGraphLaunch(exec, streams.b));
        OK(with(1, 1, 0, streams.b)(add_kernel, x.data, x.data + 1));
        expected *= 5;
        if (i % 3 == 0) {
            OK(cudaStreamSynchronize(streams.b));
            CHECK(x[0] == expected, "got %d, expected %d", x[0], expected);
        }
    }
    OK(cudaGraphLaunch(exec, streams.b));
    OK(cudaGraphExecDestroy(exec)); /* what is launched is done all the same */
    OK(cudaStreamSynchronize(streams.b));
    CHECK(x[0] == 3 * expected, "got %d, expected %d", x[0], 3 * expected);
}

static void recording_forbids(struct check *check) {
    two_streams streams, others;
    void *memory;
    cudaGraph_t graph;
    FAILS(cudaStreamBeginCapture(nullptr, cudaStreamCaptureModeThreadLocal),
          cudaErrorStreamCaptureUnsupported);
    FAILS(cudaStreamEndCapture(streams.a, &graph), cudaErrorStreamCaptureUnmatched);
    const std::function<cudaError_t()> spoilers[] = {
        [&] { return cudaStreamSynchronize(streams.a); },
        [&] { return cudaDeviceSynchronize(); },
        [&] { return cudaMalloc(&memory, 4); },
        [&] { return cudaEventQuery(others.event); },
        [&] { return cudaEventRecord(streams.event, streams.a); },
        [&] { return cudaStreamWaitEvent(streams.a, others.event, 0); }};
    for (const auto &spoil : spoilers) {
        OK(cudaStreamBeginCapture(streams.a, cudaStreamCaptureModeThreadLocal));
        FAILS(spoil(), cudaErrorStreamCaptureUnsupported);
        FAILS(cudaStreamEndCapture(streams.a, &graph), cudaErrorStreamCaptureInvalidated);
        CHECK(!graph, "a graph all the same");
    }
    device_array<int> x(1);
    OK(cudaMemsetAsync(x.data, 1, 4, streams.a));
    OK(cudaStreamBeginCapture(streams.a, cudaStreamCaptureModeThreadLocal));
    OK(cudaMemsetAsync(x.data, 2, 4, streams.a)); /* recorded, not done */
    FAILS(cudaStreamBeginCapture(streams.a, cudaStreamCaptureModeThreadLocal),
          cudaErrorStreamCaptureUnsupported);
    cudaError_t other = cudaErrorNotReady;
    std::thread([&] {
        other = cudaMalloc(&memory, 4);
        cudaFree(memory); /* waits for what was launched before */
    }).join();
    CHECK(x[0] == 0x01010101, "got %x", (unsigned)x[0]);
    CHECK(other == cudaSuccess, "another host thread may do it: got %d", other);
    FAILS(cudaStreamEndCapture(streams.b, &graph), cudaErrorStreamCaptureUnmatched);
    OK(cudaStreamEndCapture(streams.a, &graph));
    OK(cudaGraphDestroy(graph));
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

/* How many sums are wrong, in a stream or in a graph. */
static int wrong_sums(struct check *check, bool too_early, bool as_graph) {
    two_streams streams;
    device_array<int> x(256, 0), y(256);
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    if (as_graph)
        OK(cudaStreamBeginCapture(streams.a, cudaStreamCaptureModeThreadLocal));
    OK(overlapping(4, 64, 0, streams.a)(produce_kernel, x.data));
    OK(overlapping(4, 64, 256, streams.a)(consume_kernel, x.data, y.data, too_early));
    if (as_graph) {
        OK(cudaStreamEndCapture(streams.a, &graph));
        OK(cudaGraphInstantiate(&exec, graph, 0));
        OK(cudaGraphLaunch(exec, streams.a));
        OK(cudaGraphDestroy(graph));
        OK(cudaGraphExecDestroy(exec));
    }
    OK(cudaStreamSynchronize(streams.a));
    int wrong = 0;
    for (int i = 0; i < 256; i++)
        wrong += y[(size_t)i] != 1 + i / 64 * 64 + 63 - i % 64;
    return wrong;
}

static void early_blocks(struct check *check) {
    for (int as_graph = 0; as_graph < 2; as_graph++) {
        int early = 0, right = 0;
        for (int seed = 0; seed < SEEDS; seed++) {
            CHECK(wrong_sums(check, false, as_graph) == 0, "read behind grid_wait");
            int wrong = under_tsan ? 0 : wrong_sums(check, true, as_graph);
            early += wrong == 64; /* one block began before the kernel before it */
            right += wrong == 0;
        }
        CHECK(early > 0 || under_tsan, "no block begins early");
        CHECK(right > 0 && early + right == SEEDS, "%d blocks early, %d not", early, right);
    }
}

/* Of two kernels that could begin early at the same time, one does. */
static void early_blocks_of_two_streams(struct check *check) {
    two_streams streams;
    for (int seed = 0; seed < SEEDS; seed++) {
        device_array<int> x(512, 0), y(512);
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

/* A graph waits for all that was before it: its first kernel never begins early. */
static void graphs_do_not_begin_early(struct check *check) {
    two_streams streams;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    device_array<int> x(256), y(256);
    OK(cudaStreamBeginCapture(streams.a, cudaStreamCaptureModeThreadLocal));
    OK(overlapping(4, 64, 256, streams.a)(consume_kernel, x.data, y.data, true));
    OK(cudaStreamEndCapture(streams.a, &graph));
    OK(cudaGraphInstantiate(&exec, graph, 0));
    for (int seed = 0; seed < SEEDS; seed++) {
        std::fill(x.data, x.data + 256, 0);
        OK(overlapping(4, 64, 0, streams.a)(produce_kernel, x.data));
        OK(cudaGraphLaunch(exec, streams.a));
        OK(cudaStreamSynchronize(streams.a));
        for (int i = 0; i < 256; i++)
            CHECK(y[(size_t)i] == 1 + i / 64 * 64 + 63 - i % 64, "thread %d", i);
    }
    OK(cudaGraphDestroy(graph));
    OK(cudaGraphExecDestroy(exec));
}

/* The last block to arrive sees what the others wrote, if the count orders. */
static __global__ void last_block_kernel(int *parts, int *arrived, int *out, bool ordered) {
    DYNAMIC_SHARED(int, before);
    parts[blockIdx.x * blockDim.x + threadIdx.x] = 1;
    __syncthreads();
    if (threadIdx.x == 0)
        *before = ordered ? add_ordered(arrived, 1) : atomicAdd(arrived, 1);
    __syncthreads();
    for (unsigned i = 0; *before == (int)gridDim.x - 1 && i < gridDim.x; i++)
        atomicAdd(out, parts[i * blockDim.x + (threadIdx.x + i) % blockDim.x]);
}

static int last_block(bool ordered) {
    device_array<int> parts(256), out(2, 0);
    with(4, 64, 4)(last_block_kernel, parts.data, &out[1], &out[0], ordered);
    cudaDeviceSynchronize();
    return out[0];
}

static void last_block_sums(struct check *check) {
    for (int round = 0; round < 20; round++)
        CHECK(last_block(true) == 256, "another sum");
}

/* ---- reports ---- */

/* What each thread does; `errs` is thread 37 of block 1. */
typedef void (*erring)(bool errs, char *shared, int *out);

static __global__ void erring_kernel(erring act, int *out) {
    DYNAMIC_SHARED(char, shared);
    act(blockIdx.x == 1 && threadIdx.x == 37, shared, out);
}

/* 3 blocks of 64 threads, with 100 bytes of shared memory, in which each does this. */
static std::function<void()> in_kernel(erring act) {
    return [act] {
        device_array<int> out(1000);
        emu_next_kernel("erring_kernel");
        with(3, 64, 100)(erring_kernel, act, out.data);
        cudaDeviceSynchronize();
    };
}
#define KERNEL(...)                                                                                \
    in_kernel([](bool errs, char *shared, int *out) {                                              \
        (void)errs, (void)shared, (void)out;                                                       \
        __VA_ARGS__;                                                                               \
    })

__attribute__((noinline)) static int deep(int n) {
    volatile char frame[1000];
    frame[n % 1000] = (char)n;
    return n == 0 ? 0 : deep(n - 1) + frame[n % 1000];
}

static volatile int zero = 0;

static volatile char *bytes(char *shared) { /* so that each access is made */
    return shared;
}

static void multiply(bool here) {
    uint32_t fragment[4] = {0};
    float c[4] = {0};
    if (here)
        mma_bf16(c, fragment, fragment);
}

static uint64_t *barrier_in(char *shared, int arrivals) {
    uint64_t *barrier = reinterpret_cast<uint64_t *>(shared);
    barrier_init(barrier, arrivals);
    barriers_ready();
    return barrier;
}

/* A whole warp sends a piece of 16 bytes for each lane, or one lane one of another kind. */
static void send(char *shared, int to, const int *from, unsigned bytes) {
    copy_pieces(shared + to, from, bytes, false, barrier_in(shared, 1));
}

static __global__ void sending_kernel(const int *from, int n) {
    DYNAMIC_SHARED(char, shared);
    uint64_t *barrier = reinterpret_cast<uint64_t *>(shared);
    if (threadIdx.x == 0)
        barrier_in(shared, 1);
    __syncwarp();
    for (int i = 0; i < n; i++) {
        copy_pieces(shared + 16 + i * 512 + threadIdx.x * 16, from, 16, false, barrier);
        copies_sent(barrier);
    }
}

static __global__ void naming_kernel(const int *from) {
    DYNAMIC_SHARED(char, shared);
    uint64_t *barrier = reinterpret_cast<uint64_t *>(shared);
    if (threadIdx.x == 0)
        barrier_in(shared, 1);
    __syncwarp();
    copy_piece(shared + 16, from + threadIdx.x / 31 * 4, 16, false, barrier);
    copies_sent(barrier);
    barrier_wait(barrier, 0);
}

static void name_two_pieces() {
    device_array<int> from(8);
    emu_next_kernel("naming_kernel");
    with(1, 32, 32)(naming_kernel, from.data);
    cudaDeviceSynchronize();
}

static void send_and_forget(int n) {
    device_array<int> from(4);
    emu_next_kernel("sending_kernel");
    for (int i = 0; i < SEEDS; i++)
        with(1, 32, 16 + 512 * (size_t)n)(sending_kernel, from.data, n);
    cudaDeviceSynchronize();
}

static void ring(enum wrong how) {
    struct check check = {0, 0};
    emu_next_kernel("ring_kernel");
    for (int seed = 0; seed < SEEDS; seed++)
        wrong_in_ring(&check, how);
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

static void race(bool same_warp) {
    device_array<int> memory(1);
    with(1, 64, 64)(races_kernel, memory.data, same_warp);
    cudaDeviceSynchronize();
}

static __global__ void same_place_kernel(int *out) {
    out[threadIdx.x] = 1;
}

static void race_of_blocks(void) {
    device_array<int> out(64);
    with(8, 64, 0)(same_place_kernel, out.data);
    cudaDeviceSynchronize();
}

static void read_too_early(void) {
    struct check check = {0, 0};
    for (int seed = 0; seed < SEEDS; seed++)
        wrong_sums(&check, true, false);
}

static void use_freed_memory(bool copy) {
    two_streams streams;
    void *memory;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaMalloc(&memory, 8);
    cudaStreamBeginCapture(streams.a, cudaStreamCaptureModeThreadLocal);
    if (copy)
        cudaMemcpyAsync(memory, (int *)memory + 1, 4, cudaMemcpyDeviceToDevice, streams.a);
    else
        cudaMemsetAsync(memory, 0, 4, streams.a);
    cudaStreamEndCapture(streams.a, &graph);
    cudaGraphInstantiate(&exec, graph, 0);
    cudaFree(memory);
    cudaGraphLaunch(exec, streams.a);
    cudaStreamSynchronize(streams.a);
}

static void never_wait_for_grid(void) {
    emu_next_kernel("nothing_kernel");
    overlapping(1, 32, 0, nullptr)(nothing_kernel);
    cudaDeviceSynchronize();
}

/* A mistake that a program can make, and words of the message that it must get: from the emulator,
 * or from a sanitizer. */
enum found { ALWAYS, PLAIN, ASAN, TSAN };
struct mistake {
    const char *name;
    enum found found;
    std::function<void()> make;
    std::vector<const char *> words;
};

#define ALL    0xFFFFFFFF
#define BLOCK  "cuda_emu: erring_kernel, block (1, 0, 0)"
#define THREAD BLOCK ", thread (37, 0, 0): "

// clang-format off
static const mistake all_mistakes[] = {
    {"return before a barrier", ALWAYS, KERNEL(if (!errs) __syncthreads()),
     {BLOCK ", thread (", "waits forever at __syncthreads", "63 __syncthreads 1 returned"}},
    {"the other barrier", ALWAYS, KERNEL(if (errs) __syncwarp(); __syncthreads()),
     {THREAD "waits forever at __syncwarp for lanes ffffffdf: ", "63 __syncthreads 1 __syncwarp"}},
    {"a lane has returned", ALWAYS, KERNEL(if (!errs) __shfl_xor_sync(ALL, 1, 1)),
     {BLOCK ", thread (", "waits forever at __shfl_xor_sync for lanes 00000020: 64 threads: ",
      "31 __shfl_xor_sync 33 returned"}},
    {"half a warp", ALWAYS, KERNEL(multiply(threadIdx.x % 32 < 16); __syncthreads()),
     {"erring_kernel", "waits forever at mma_bf16 for lanes ffff0000: 64 threads:"}},
    {"another operation", ALWAYS,
     KERNEL(*out = errs ? (int)__ballot_sync(ALL, 1) : __shfl_sync(ALL, 1, 0)),
     {BLOCK ", thread (", ", but lane ", "__ballot_sync", "__shfl_sync"}},
    {"a part of a warp", ALWAYS, KERNEL(if (errs) __syncwarp(1u << 5)),
     {THREAD "__syncwarp with mask 00000020: only whole warps are emulated"}},
    {"outside a kernel", ALWAYS, __syncthreads, {"cuda_emu: __syncthreads outside a kernel"}},
    {"no grid_wait", ALWAYS, never_wait_for_grid,
     {"cuda_emu: nothing_kernel, block (0, 0, 0)", "never calls grid_wait"}},
    {"too few arrivals", ALWAYS,
     KERNEL(uint64_t *barrier = (uint64_t *)shared;
            if (errs) { barrier_arrive(barrier_in(shared, 2)); barrier_wait(barrier, 0); }),
     {THREAD "waits forever at barrier_wait(byte 0, 0) for 1 of 2 arrivals: 64 threads: ",
      "1 barrier_wait 63 returned"}},
    {"a phase missed", ALWAYS, /* the first warp ends two as soon as the thread waits */
     KERNEL(uint64_t *barrier = (uint64_t *)shared; volatile char *waits = shared + 8;
            if (threadIdx.x == 0) barrier_in(shared, 1);
            __syncthreads();
            if (threadIdx.x == 37) { *waits = 1; barrier_wait(barrier, 0); }
            while (threadIdx.x < 32 && !__any_sync(ALL, *waits == 1)) {}
            if (threadIdx.x == 0) { barrier_arrive(barrier); barrier_arrive(barrier); }),
     {"thread (37, 0, 0): waits forever at barrier_wait(byte 0, 0) for 1 of 1 arrivals: "}},
    {"no barrier_init", ALWAYS, KERNEL(if (errs) barrier_wait((uint64_t *)shared, 0)),
     {THREAD "barrier_wait before barrier_init"}},
    {"no barriers_ready", ALWAYS,
     KERNEL(if (errs) { barrier_init((uint64_t *)shared, 1); barrier_arrive((uint64_t *)shared); }),
     {THREAD "barrier_arrive before barriers_ready"}},
    {"a barrier beside 8 bytes", ALWAYS, KERNEL(if (errs) barrier_in(shared + 4, 1)),
     {THREAD "barrier_init(", "not a multiple of 8"}},
    {"a count as a parity", ALWAYS, KERNEL(if (errs) barrier_wait(barrier_in(shared, 1), 2)),
     {THREAD "barrier_wait with parity 2"}},
    {"too many arrivals", ALWAYS, [] { send_and_forget(2); },
     {"sending_kernel", "copies_sent, but all 1 arrivals have come"}},
    {"no wait for pieces", ALWAYS, [] { send_and_forget(1); },
     {"sending_kernel", "the block ends while pieces of copy_pieces are on their way"}},
    {"two pieces for one", ALWAYS, [] { name_two_pieces(); },
     {"naming_kernel", "copy_piece: lanes name different pieces"}},
    {"not one of some threads", ALWAYS, KERNEL(sync_threads<3, 32>()),
     {"erring_kernel", "sync_threads<3, 32>, but it is not one of these threads"}},
    {"a look around", ALWAYS, KERNEL(if (errs) { emu_where(); abort(); }),
     {THREAD "64 threads: ", "  threads (0, 0, 0) to ("}},

    {"a load beside 16 bytes", ALWAYS, KERNEL(if (errs) *out = (int)load16(shared + 8).x),
     {THREAD "load16(", "not a multiple of 16"}},
    {"a load beside 8 bytes", ALWAYS, KERNEL(if (errs) *out = (int)load8(shared + 4).x),
     {THREAD "load8(", "not a multiple of 8"}},
    {"a piece of 8 bytes", ALWAYS, KERNEL(if (errs) send(shared, 16, out, 8)),
     {THREAD "copy_pieces of 8 bytes: not a multiple of 16"}},
    {"a piece from beside 16 bytes", ALWAYS, KERNEL(if (errs) send(shared, 16, out + 1, 16)),
     {THREAD "copy_pieces from(", "not a multiple of 16"}},
    {"a piece to beside 16 bytes", ALWAYS, KERNEL(if (errs) send(shared, 20, out, 16)),
     {THREAD "copy_pieces to(", "not a multiple of 16"}},
    {"a piece to beyond", ALWAYS, KERNEL(if (errs) send(shared, 80, out, 32)),
     {THREAD "copy_pieces to: byte 80, 32 of them, of 100 of shared memory"}},
    {"a matrix beside 16 bytes", ALWAYS,
     KERNEL(uint32_t r[4]; if (errs) load_matrices(r, shared + 8)),
     {THREAD "load_matrices(", "not a multiple of 16"}},
    {"a matrix elsewhere", ALWAYS, KERNEL(uint32_t r[4]; if (errs) load_matrices(r, out)),
     {THREAD "load_matrices: byte "}},
    {"a memset of freed memory", ALWAYS, [] { use_freed_memory(false); },
     {"cuda_emu: a memset runs after its memory was freed"}},
    {"a copy of freed memory", ALWAYS, [] { use_freed_memory(true); },
     {"cuda_emu: a copy runs after its memory was freed"}},

    {"a read far behind", PLAIN, KERNEL(if (errs) *out = bytes(shared)[1024]),
     {THREAD "shared memory out of bounds: byte 1024 of 100"}},
    {"a write behind", PLAIN, KERNEL(if (errs) bytes(shared)[100] = 1),
     {BLOCK ": shared memory out of bounds: byte 100 of 100 was written"}},
    {"a write before", PLAIN, KERNEL(if (errs) bytes(shared)[-1] = 1),
     {BLOCK ": shared memory out of bounds: byte -1 of 100 was written"}},
    {"a null pointer", PLAIN, KERNEL(if (errs) *(volatile int *)(uintptr_t)zero = 1),
     {THREAD "invalid memory access at (nil)"}},
    {"a division", PLAIN, KERNEL(if (errs) *out = 7 / zero), {THREAD "integer division by zero"}},
    {"a full stack", PLAIN, KERNEL(if (errs) *out = deep(1000)), {THREAD "the stack of"}},

    {"a read behind", ASAN, KERNEL(if (errs) *out = bytes(shared)[100]),
     {THREAD, "use-after-poison"}},
    {"a write behind", ASAN, KERNEL(if (errs) bytes(shared)[100] = 1),
     {THREAD, "use-after-poison"}},
    {"a write before", ASAN, KERNEL(if (errs) bytes(shared)[-1] = 1),
     {THREAD, "use-after-poison"}},
    {"a read of a stage too early", ASAN, [] { ring(READ_EARLY); },
     {"cuda_emu: ring_kernel", "use-after-poison"}},
    {"a piece from behind the heap's", ASAN, KERNEL(if (errs) send(shared, 16, out + 996, 32)),
     {THREAD, "heap-buffer-overflow"}},
    {"a write behind the heap's", ASAN, KERNEL(if (errs) out[1000] = 1),
     {THREAD, "heap-buffer-overflow"}},

    {"a race of warps", TSAN, [] { race(false); }, {"data race", "races_kernel"}},
    {"a race of lanes", TSAN, [] { race(true); }, {"data race", "races_kernel"}},
    {"a race of blocks", TSAN, race_of_blocks, {"data race", "same_place_kernel"}},
    {"no order", TSAN, [] { last_block(false); }, {"data race", "last_block_kernel"}},
    {"a stage read early", TSAN, [] { ring(READ_EARLY); }, {"data race", "ring_kernel"}},
    {"a stage freed early", TSAN, [] { ring(FREE_EARLY); }, {"data race", "ring_kernel"}},
    {"read too early", TSAN, read_too_early, {"data race", "consume_kernel"}},
};
// clang-format on

static std::vector<mistake> mistakes(void) {
    std::vector<mistake> found;
    for (const mistake &each : all_mistakes)
        if (each.found == ALWAYS || (each.found == TSAN && under_tsan) ||
            each.found == (under_asan ? ASAN : PLAIN))
            found.push_back(each);
    return found;
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
        bool hangs = WIFSIGNALED(status) && WTERMSIG(status) == SIGXCPU;
        CHECK(status != 0 && !hangs, "%s: the child %s", all[i].name,
              hangs ? "hangs" : "ended well");
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
        TEST(bf16_sums_of_products),
        TEST(every_thread_runs_once),
        TEST(warp_operations),
        TEST(atomics),
        TEST(barriers),
        TEST(barriers_order_memory),
        TEST(shared_memory_is_garbage),
        TEST(orders_follow_the_seed),
        TEST(mma_sums_in_order),
        TEST(matrices_from_shared_memory),
        TEST(loads_and_stores_with_hints),
        TEST(pieces_are_late),
        TEST(rings_of_stages),
        TEST(errors),
        TEST(devices),
        TEST(device_memory),
        TEST(registered_memory),
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
        TEST(recording_forbids),
        TEST(early_blocks),
        TEST(early_blocks_of_two_streams),
        TEST(graphs_do_not_begin_early),
        TEST(last_block_sums),
        TEST(mistakes_are_reported),
    };
    return check_run(tests, sizeof tests / sizeof *tests, argc, argv);
}
