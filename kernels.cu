/* kernels.cu: the CUDA backend, every op of the forward pass on GPUs.
 *
 * Owns: memory, copies, weights, activations and recorded graphs of each device. Knows nothing of
 * requests. kernels.c is its specification: where the two differ, kernels.c is right.
 *
 *     1  a step, as kernels see it
 *     2  weights, in the order in which the tensor cores want them         pack_kernel
 *     3  devices: what they hold, memory, copies, uploads
 *     4  products                       generated_product_kernel, prompt_product_kernel
 *     5  attention                      prompt_attention_kernel, generated_attention_kernel
 *     6  embedding, norm, rope          embed_kernel, norm_kernel, rope_append_kernel
 *     7  the products of a layer; several shards              silu_kernel, reduce_kernel
 *     8  logits and samples                                                sample_kernel
 *     9  a step: begun, recorded, replayed, ended
 *    10  what the chip can do at most               mma_probe_kernel, read_probe_kernel
 *    11  opening and closing
 * A kernel's launcher, or the op that it is, stands below it.
 *
 * How data flows: `upload` packs a matrix into tensor-core order. A step's tokens, positions, block
 * table and work lists go up in one copy; the ops then read them on the device, so that a decode
 * step is the same sequence of launches for any batch of its size, and is recorded once for each
 * and replayed as a graph. Generated tokens are the first rows of a batch, prompt rows follow;
 * products and attention have a kernel for each role. Token ids come back, and logits if asked for.
 *
 * Invariants:
 *   - A row's bits depend on its role and its own text, never on the batch, on the placement of its
 *     blocks or on the number of shards.
 *   - The residual stream x is f32; q and the inputs of products (h, attention, ffn) are bf16. The
 *     gaps of these inputs (chapter 2) are 0 from the beginning, and nobody writes there.
 *   - Work on a stream is ordered; between streams nothing is assumed: the scheduler uses a block
 *     only when the copy into it, or the step that wrote it, has been reported.
 *   - A device's fault ends the program, with file, line, device, call, and what was being done.
 *
 * Beside it: lib/gpu.h (launches, tickets, the instructions of the tensor cores), lib/sampler.h. */
extern "C" {
#include "dynamo.h"
}
#define GPU_IMPLEMENTATION
#include "lib/gpu.h"
#define SAMPLER_GPU_IMPLEMENTATION
#include "lib/sampler.h"

#include <assert.h>
#include <float.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    WARP = 32,
    THREADS = 256,   /* of a block, unless said otherwise */
    MAX_COLUMNS = 8, /* groups of 8 generated rows that a block of a product has at most */
    MAX_GPUS = 64,
    CHUNK_ROWS = 2048,        /* prompt tokens of a step that fill the chip */
    STAGING_BYTES = 32 << 20, /* of weights on their way up; two of them */
    MIN_MAJOR = 8             /* compute capability: mma of bf16, cp.async */
};

static dim3 grid_of(int x, int y = 1) {
    return dim3((unsigned)x, (unsigned)y);
}

static inline __host__ __device__ int divide(int value, int unit) {
    return (value + unit - 1) / unit;
}

static inline __host__ __device__ int smaller(int a, int b) {
    return a < b ? a : b;
}

/* ==== 1. A step, as kernels see it ====
 *
 * The host writes a step into one buffer behind this header and copies it up at once; arrays are
 * found by their distance from the header, so a recorded graph, whose arguments never change,
 * serves any batch. */

struct step_header {
    int n_rows, n_generated, n_samples, n_splits; /* rows [0, n_generated) are generated tokens */
    /* bytes from the header: (n_rows) ints … */
    int token, position, row_sequence;
    int sample_row, sampling; /* (n_samples) int, struct sampling */
    int sequences, table;     /* (n_sequences) struct sequence; (n_blocks) slots */
    int prompt_items, splits; /* int2 {sequence, first query}; (n_splits) {sequence, split} */
};

template <typename T> DEVICE const T *array_of(const struct step_header *step, int distance) {
    return reinterpret_cast<const T *>(reinterpret_cast<const char *>(step) + distance);
}

/* ==== 2. Weights, in the order in which the tensor cores want them ====
 *
 * A matrix is cut into *tiles* of 16 outputs and *units* of 32 k. Of a tile and unit each lane of a
 * warp holds a *fragment*: outputs group and group + 8, k = 8 quad to 8 quad + 7 (see lib/gpu.h),
 * and the fragments of a warp lie side by side, in the order [tile][unit][lane]. So a warp reads
 * its weights by 16-byte loads of one contiguous stream, and the same bytes serve as the operand of
 * 16 rows (generated tokens) and as two operands of 8 columns (prompts).
 *     PACKED_BF16   2 x 16 bytes a lane, one for each mma: 1024 bytes     all types but
 *     PACKED_Q8     16 bytes a lane, numbers + 128; f16 scales            Q8_0
 *     PACKED_Q4     8 bytes a lane; f16 scales                            Q4_0
 * Scales stand apart, 32 bytes a tile and unit: those of outputs group and group + 8 side by side.
 *
 * K is worked off in K_SEGMENTS *segments*, one for each warp of a product. Where shards cut K,
 * a segment ends where any number of shards would cut, between heads or at an even k; it then
 * begins with a unit of its own, whose k outside the segment are 0: so a segment's sum has the
 * same bits on every number of shards. The input of such a product has the same gaps; `place`
 * says where an element goes. Models whose segments end at multiples of 32 have no gaps. */

enum {
    TILE = 16,
    UNIT = 32,
    UNIT_BYTES = 1024, /* of a tile and unit in bf16: the most */
    SCALE_BYTES = 32   /* of a tile and unit */
};

enum packed_type { PACKED_BF16, PACKED_Q8, PACKED_Q4 };

struct segments {             /* of a shard's K */
    int n;                    /* K_SEGMENTS / n_shards */
    int unit[K_SEGMENTS + 1]; /* units before each segment */
    int k[K_SEGMENTS + 1];    /* k of the whole matrix at which each begins */
};

struct matrix { /* a packed matrix, or a shard's part of one, as kernels take it */
    const uint8_t *packed, *scales;
    int type; /* enum packed_type */
    int n_outputs, n_tiles, n_units;
    struct segments segments;
};

static inline enum packed_type packed_type_of(enum tensor_type type) {
    return type == TYPE_Q8_0 ? PACKED_Q8 : type == TYPE_Q4_0 ? PACKED_Q4 : PACKED_BF16;
}

static constexpr __host__ __device__ size_t packed_bytes(int type) { /* of a tile and unit */
    return type == PACKED_BF16 ? UNIT_BYTES : type == PACKED_Q8 ? 512 : 256;
}

static constexpr __host__ __device__ bool has_scales(int type) {
    return type != PACKED_BF16;
}

/* Segments [first, first + n) of a K that may be cut between multiples of `grain`; grain 0: it is
 * never cut, and a segment is a share of the units. */
static inline struct segments make_segments(int cols, int grain, int first, int n) {
    struct segments s = {};
    s.n = n;
    for (int i = 0; i <= n; i++) {
        s.k[i] = segment_begin(cols, grain > 0 ? grain : UNIT, first + i);
        if (i > 0 && s.k[i] > s.k[i - 1])
            s.unit[i] = s.unit[i - 1] + (s.k[i] + UNIT - 1) / UNIT - s.k[i - 1] / UNIT;
        else if (i > 0)
            s.unit[i] = s.unit[i - 1];
    }
    return s;
}

/* Where element k of a shard's own part lies in a row that is the input of its product. */
DEVICE int place(const struct segments &s, int k) {
    int segment = 0;
    k += s.k[0];
    while (k >= s.k[segment + 1])
        segment++;
    return (s.unit[segment] - s.k[segment] / UNIT) * UNIT + k;
}

/* ---- rows, the inputs of products ---- */

/* bf16 [k / 64][n_rows][64], the 16-byte chunks of a row at chunk ^ row % 8: so 8 rows lie as wgmma
 * and ldmatrix read them without conflicts, and a tile of rows by 64 k is one piece of memory.
 * n_rows is a multiple of 8, what nobody writes is 0. */
struct planes {
    uint8_t *bytes;
    int n_rows;
};

DEVICE uint16_t *plane_element(const struct planes &p, int row, int k) {
    size_t chunk = ((size_t)(k / 64) * p.n_rows + row) * 8 + ((k / 8 % 8) ^ (row % 8));
    return reinterpret_cast<uint16_t *>(p.bytes + chunk * 16) + k % 8;
}

/* ---- fragments ---- */

template <int TYPE> struct fragment {
    static constexpr int N = TYPE == PACKED_BF16 ? 2 : 1;
    uint4 words[N];  /* bf16: one for each mma; else x and y (Q4: x): output group, the rest: + 8 */
    uint32_t scales; /* f16: of output group, of group + 8 */
};

DEVICE float bf16_to_float(uint32_t bits) {
    return __uint_as_float(bits << 16);
}

/* Numbers 0 to 255 become floats without a conversion: they are the last bits of 2^23 + number. */
DEVICE float small_float(uint32_t number, float offset) {
    return __uint_as_float(0x4b000000u | number) - (8388608.0f + offset);
}

/* Four k of an output from their numbers, which lie `bits` apart. */
DEVICE void unpack_four(uint32_t word, int bits, float offset, float scale, uint32_t *first,
                        uint32_t *second) {
    float value[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        value[i] = small_float(word >> (bits * i) & ((1u << bits) - 1), offset) * scale;
    *first = pack_bf16(value[0], value[1]);
    *second = pack_bf16(value[2], value[3]);
}

/* a[0] and a[1] are the 16-row operands of a unit's two mma. */
template <int TYPE> DEVICE void unpack(const struct fragment<TYPE> &f, uint32_t a[2][4]) {
    const uint4 &words = f.words[0];
    if (TYPE == PACKED_BF16) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint4 &own = f.words[half % fragment<TYPE>::N];
            a[half][0] = own.x;
            a[half][1] = own.y;
            a[half][2] = own.z;
            a[half][3] = own.w;
        }
        return;
    }
    const float low = half_to_float((uint16_t)f.scales);
    const float high = half_to_float((uint16_t)(f.scales >> 16));
    if (TYPE == PACKED_Q8) {
        unpack_four(words.x, 8, 128.0f, low, &a[0][0], &a[0][2]);
        unpack_four(words.y, 8, 128.0f, low, &a[1][0], &a[1][2]);
        unpack_four(words.z, 8, 128.0f, high, &a[0][1], &a[0][3]);
        unpack_four(words.w, 8, 128.0f, high, &a[1][1], &a[1][3]);
    } else {
        unpack_four(words.x, 4, 8.0f, low, &a[0][0], &a[0][2]);
        unpack_four(words.x >> 16, 4, 8.0f, low, &a[1][0], &a[1][2]);
        unpack_four(words.y, 4, 8.0f, high, &a[0][1], &a[0][3]);
        unpack_four(words.y >> 16, 4, 8.0f, high, &a[1][1], &a[1][3]);
    }
}

/* The 16-row operands of a unit, from a lane's 8 k of rows group and group + 8. */
DEVICE void row_operands(const uint4 &upper, const uint4 &lower, uint32_t a[2][4]) {
    a[0][0] = upper.x;
    a[0][1] = lower.x;
    a[0][2] = upper.y;
    a[0][3] = lower.y;
    a[1][0] = upper.z;
    a[1][1] = lower.z;
    a[1][2] = upper.w;
    a[1][3] = lower.w;
}

/* sum (16, 8) += a . b of a unit; b: a lane's 8 k of column group. */
DEVICE void multiply_unit(float sum[4], const uint32_t a[2][4], const uint4 &b) {
    const uint32_t low[2] = {b.x, b.y}, high[2] = {b.z, b.w};
    mma_bf16(sum, a[0], low);
    mma_bf16(sum, a[1], high);
}

/* A lane's fragment of a tile and unit whose numbers and scales begin there; ONCE: in device
 * memory, and not to be read again soon. */
template <int TYPE, bool ONCE>
DEVICE void load_fragment(const uint8_t *numbers, const uint8_t *scales, int lane,
                          struct fragment<TYPE> *f) {
    if (TYPE == PACKED_Q4) {
        uint2 half = load8(numbers + lane * 8);
        f->words[0] = make_uint4(half.x, half.y, 0, 0);
    } else {
        f->words[0] = ONCE ? load16_once(numbers + lane * 16) : load16(numbers + lane * 16);
    }
    if (has_scales(TYPE)) {
        f->scales = reinterpret_cast<const uint32_t *>(scales)[lane / 4];
    } else {
        numbers += 512 + lane * 16;
        f->words[fragment<TYPE>::N - 1] = ONCE ? load16_once(numbers) : load16(numbers);
    }
}

/* One element as f32: for embeddings. */
DEVICE float matrix_element(const struct matrix &m, int output, int k) {
    size_t index = (size_t)(output / TILE) * m.n_units + k / UNIT;
    int group = output % 8, upper = output % TILE / 8, at = k % 8, lane = 4 * group + k % UNIT / 8;
    const uint8_t *numbers = m.packed + index * packed_bytes(m.type);
    if (m.type == PACKED_BF16) {
        const uint16_t *own = (const uint16_t *)(numbers + at / 4 * 512 + lane * 16);
        return bf16_to_float(own[(upper + at % 4 / 2 * 2) * 2 + at % 2]);
    }
    const uint16_t *scales = reinterpret_cast<const uint16_t *>(m.scales + index * SCALE_BYTES);
    float scale = half_to_float(scales[group * 2 + upper]);
    if (m.type == PACKED_Q8)
        return ((float)numbers[lane * 16 + upper * 8 + at] - 128.0f) * scale;
    uint8_t byte = numbers[lane * 8 + upper * 4 + at / 2];
    return ((float)(byte >> (at % 2 * 4) & 15) - 8.0f) * scale;
}

/* ---- packing ---- */

struct raw_rows { /* rows of a tensor as the file has them, on the device */
    const uint8_t *bytes;
    size_t row_bytes, first; /* first: where row 0 begins */
    size_t period;           /* what lies so far apart is the same; 0: nothing is */
    int type;                /* enum tensor_type */
    int n_rows;              /* at hand */
};

DEVICE const uint8_t *raw_at(const struct raw_rows &raw, int row, size_t offset) {
    offset += raw.first + (size_t)row * raw.row_bytes;
    return raw.bytes + (raw.period > 0 ? offset % raw.period : offset);
}

DEVICE uint16_t read16(const uint8_t *bytes) { /* of any alignment */
    return (uint16_t)(bytes[0] | bytes[1] << 8);
}

/* Q4_K and Q6_K as ggml defines them: 256 k in 144 and in 210 bytes. */
DEVICE float raw_k_quant(int type, const uint8_t *block, int k) {
    if (type == TYPE_Q4_K) { /* f16 d, m; 8 scales and 8 offsets of 6 bits; 4 bits a number */
        const uint8_t *packed = block + 4;
        int scale, least;
        gguf_q4_k_scales(packed, k / 32, &scale, &least);
        int number = block[16 + k / 64 * 32 + k % 32] >> (k % 64 / 32 * 4) & 15;
        return half_to_float(read16(block)) * (float)scale * (float)number -
               half_to_float(read16(block + 2)) * (float)least;
    }
    int half = k / 128, quarter = k % 128 / 32; /* Q6_K: low 4 bits, high 2 bits, int8 scales, d */
    int low = block[half * 64 + quarter % 2 * 32 + k % 32] >> (quarter / 2 * 4) & 15;
    int high = block[128 + half * 32 + k % 32] >> (quarter * 2) & 3;
    return half_to_float(read16(block + 208)) * (float)(int8_t)block[192 + k / 16] *
           (float)((low | high << 4) - 32);
}

DEVICE float raw_element(const struct raw_rows &raw, int row, int k) {
    if (raw.type == TYPE_F32) {
        const uint8_t *b = raw_at(raw, row, (size_t)k * 4);
        return __uint_as_float((uint32_t)read16(b) | (uint32_t)read16(b + 2) << 16);
    }
    if (raw.type == TYPE_Q4_K || raw.type == TYPE_Q6_K) {
        size_t bytes = raw.type == TYPE_Q4_K ? 144 : 210;
        return raw_k_quant(raw.type, raw_at(raw, row, (size_t)(k / 256) * bytes), k % 256);
    }
    uint16_t bits = read16(raw_at(raw, row, (size_t)k * 2));
    return raw.type == TYPE_F16 ? half_to_float(bits) : bf16_to_float(bits);
}

/* A row's 8 numbers of k in [k, k + 8), those outside [begin, end) 0, and their block's scale. */
DEVICE uint2 raw_numbers(const struct raw_rows &raw, int row, int k, int begin, int end,
                         uint16_t *scale) {
    bool wide = raw.type == TYPE_Q8_0;
    const uint8_t *block = raw_at(raw, row, (size_t)(k / 32) * (wide ? 34 : 18));
    uint32_t word[2] = {0, 0};
    *scale = read16(block);
    for (int i = 0; i < 8; i++) {
        int at = (k + i) % 32; /* Q4_0: 16 k in the low halves of the bytes, then 16 in the high */
        uint32_t number = wide ? block[2 + at] ^ 128u : block[2 + at % 16] >> (at / 16 * 4) & 15u;
        if (k + i < begin || k + i >= end)
            number = wide ? 128 : 8;
        if (wide)
            word[i / 4] |= number << (i % 4 * 8);
        else
            word[0] |= number << (i * 4);
    }
    return make_uint2(word[0], word[1]);
}

/* A lane's share of a tile and unit in bf16: k to k + 8 of a row, those outside [begin, end) 0. */
DEVICE void pack_floats(const struct raw_rows &raw, int row, int k, int begin, int end,
                        uint32_t *words) {
    for (int at = 0; at < 8; at += 2) {
        float pair[2] = {0.0f, 0.0f};
        for (int i = 0; i < 2 && row < raw.n_rows; i++)
            if (k + at + i >= begin && k + at + i < end)
                pair[i] = raw_element(raw, row, k + at + i);
        words[at / 4 * 128 + at % 4 / 2 * 2] = pack_bf16(pair[0], pair[1]);
    }
}

/* Packs tiles [first_tile, first_tile + n) of m, whose outputs are the rows at hand. One warp a
 * tile and unit; bound by memory. The twin of pack_panel. */
__global__ void pack_kernel(const struct matrix m, int first_tile, int n_tiles,
                            const struct raw_rows raw) {
    grid_wait();
    int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP;
    size_t index = (size_t)blockIdx.x * (blockDim.x / WARP) + warp;
    if (index >= (size_t)n_tiles * m.n_units)
        return;
    int unit = (int)(index % m.n_units), tile = (int)(index / m.n_units), segment = 0;
    while (unit >= m.segments.unit[segment + 1])
        segment++;
    int begin = m.segments.k[segment], end = m.segments.k[segment + 1];
    int k = (begin / UNIT + unit - m.segments.unit[segment]) * UNIT + lane % 4 * 8;
    index += (size_t)first_tile * m.n_units;
    uint32_t *words = (uint32_t *)(m.packed + index * packed_bytes(m.type));
    uint16_t *scales = (uint16_t *)(m.scales + index * SCALE_BYTES);
    for (int upper = 0; upper < 2; upper++) {
        int row = tile * TILE + upper * 8 + lane / 4;
        if (m.type == PACKED_BF16) {
            pack_floats(raw, row, k, begin, end, words + lane * 4 + upper);
            continue;
        }
        uint16_t scale = 0;
        uint2 numbers = make_uint2(0, 0);
        if (row < raw.n_rows)
            numbers = raw_numbers(raw, row, k, begin, end, &scale);
        if (m.type == PACKED_Q8) {
            words[lane * 4 + upper * 2] = numbers.x;
            words[lane * 4 + upper * 2 + 1] = numbers.y;
        } else {
            words[lane * 2 + upper] = numbers.x;
        }
        if (lane % 4 == 0)
            scales[lane / 4 * 2 + upper] = scale;
    }
}

/* ==== 3. Devices: what they hold, memory, copies, uploads ====
 *
 * Devices on one GPU share its weights, and two staging buffers for those on their way up.
 *
 *     struct cuda_device *d = enter(device, "loading weights"); // it is the current one now
 *     TRY(d, cudaStreamSynchronize(stream));                    // or the program ends
 *     launch(d, "norm_kernel", norm_kernel, grid_of(n), THREADS, 0, x, y, n); */

struct weight { /* a matrix, or a vector of f32 */
    const struct tensor *tensor;
    struct slice slice;
    int gpu;
    struct matrix matrix;
    float *vector; /* device (its part of the tensor); NULL: a matrix */
    struct weight *next;
};

struct card { /* what devices on the same GPU share */
    bool open;
    cudaDeviceProp properties;
    struct gpu_staging staging;
};

struct cuda_backend {
    struct backend backend;
    struct backend_options options;
    pthread_mutex_t upload_mutex;
    struct weight *weights;      /* a list, under upload_mutex */
    struct card cards[MAX_GPUS]; /* (backend.n_gpus) */
};

struct graph { /* a recorded decode step of up to 8 * index rows */
    cudaGraphExec_t exec;
    uint64_t n_launches;
};

struct cuda_device {
    struct device device;
    struct cuda_backend *cuda;
    struct card *card;
    struct gpu gpu; /* its stream is that of computing; its pieces are all memory below */
    cudaStream_t streams[N_STREAMS];
    struct gpu_tickets copies[N_STREAMS];
    int n_heads, n_kv_heads, d_ff; /* of this shard */
    size_t padded_rows;            /* of the inputs of products */
    int h_stride, x_stride, qkv_stride, attention_stride, ffn_stride, logits_stride;
    struct segments attention_places, ffn_places;
    float *x, *qkv, *logits; /* (max_rows, x_stride), (max_rows, qkv_stride), (LOGIT_ROWS, …) */
    uint16_t *h, *q, *attention, *ffn; /* bf16 (max_rows, …_stride), q (max_rows, q heads) */
    float *gate_up;                    /* (max_rows, 2 d_ff); NULL: they are never of two types */
    int ffn_types;                     /* bits: of matrices of their shape, 1 << packed type */
    float2 *turn;                      /* (max_rows, rope_dim / 2) cosine and sine */
    float *rope_frequency;             /* (rope_dim / 2) */
    int *arrived;                      /* (max_rows, n_kv_heads, chunks) of attention */
    struct sampler_row *sampler_rows;  /* (LOGIT_ROWS) */
    int *sampled, *sampled_host;       /* (max_samples) device, pinned */
    /* the step: pinned and device (step_bytes); the parts of splits. They grow when they must. */
    struct step_header *step_host, *step;
    float *partial; /* (split_capacity, n_heads, head_dim + 2) */
    size_t step_bytes, split_capacity;
    int n_rows, n_generated, n_samples, n_splits, n_prompt_items; /* that launches are made for */
    int n_sampled;                                                /* of the batch */
    struct graph graphs[MAX_COLUMNS + 1];
    int recording; /* index of a graph; 0: none */
    /* of several shards: sums of project_add on their way, in turns, so that a reader has time */
    float *sums[2], *gathered;
    int turn_of_sums;
    const struct weight *pending;
    enum product_input pending_input;
    cudaEvent_t ready;
};

#define TRY(d, call)   GPU_TRY(&(d)->gpu, call)
#define launch(d, ...) gpu_launch(&(d)->gpu, __VA_ARGS__)

static struct cuda_device *enter(struct device *device, const char *doing) {
    struct cuda_device *d = (struct cuda_device *)device;
    gpu_enter(&d->gpu, doing);
    return d;
}

/* ---- memory and copies ---- */

static size_t cuda_free_memory(struct device *device, bool pinned) {
    struct cuda_device *d = enter(device, "asking for its free memory");
    size_t available = 0, total = 0;
    if (pinned)
        return host_free_memory();
    TRY(d, cudaMemGetInfo(&available, &total));
    return available;
}

static void *cuda_alloc(struct device *device, size_t bytes, bool pinned) {
    enter(device, "allocating");
    void *memory = NULL;
    cudaError_t error =
        pinned ? cudaHostAlloc(&memory, bytes, cudaHostAllocPortable) : cudaMalloc(&memory, bytes);
    (void)cudaGetLastError(); /* no room is an answer, not a fault */
    return error == cudaSuccess ? memory : NULL;
}

static void cuda_release(struct device *device, void *memory, bool pinned) {
    struct cuda_device *d = enter(device, "freeing memory");
    TRY(d, pinned ? cudaFreeHost(memory) : cudaFree(memory));
}

static uint64_t cuda_copy(struct device *device, enum stream stream, const struct copy2d *copy) {
    static const char *const names[N_STREAMS] = {"copying", "paging out", "paging in",
                                                 "handing over blocks"};
    struct cuda_device *d = enter(device, names[stream]);
    cudaStream_t on = d->streams[stream];
    if (copy->width == copy->to_pitch && copy->width == copy->from_pitch)
        TRY(d, cudaMemcpyAsync(copy->to, copy->from, copy->width * copy->height, cudaMemcpyDefault,
                               on));
    else
        TRY(d, cudaMemcpy2DAsync(copy->to, copy->to_pitch, copy->from, copy->from_pitch,
                                 copy->width, copy->height, cudaMemcpyDefault, on));
    return gpu_ticket(&d->gpu, &d->copies[stream], on);
}

static bool cuda_copy_done(struct device *device, enum stream stream, uint64_t ticket) {
    struct cuda_device *d = enter(device, "polling a copy");
    return gpu_ticket_done(&d->gpu, &d->copies[stream], ticket);
}

/* ---- weights ---- */

/* K of attn_output is cut between heads, that of ffn_down at an even k: see chapter 2. */
static int grain_of(const struct model_config *config, int cols) {
    return cols == config->n_heads * config->head_dim ? config->head_dim : 2;
}

static void free_weight(struct weight *weight) {
    cudaFree((void *)weight->matrix.packed);
    cudaFree((void *)weight->matrix.scales);
    cudaFree(weight->vector);
    free(weight);
}

/* Uploads rows from `first_row` on, band by band, and packs them. A tensor that repeats itself goes
 * up once: the rest is made on the device. */
static bool pack_matrix(struct cuda_device *d, const struct tensor *tensor, int first_row,
                        int n_rows, const struct matrix *m) {
    size_t row_bytes = tensor->bytes / (size_t)tensor->rows, tile_bytes = TILE * row_bytes;
    size_t period = tensor->period;
    size_t most = tile_bytes > STAGING_BYTES ? tile_bytes : (size_t)STAGING_BYTES;
    size_t all = tile_bytes * (size_t)m->n_tiles;
    struct gpu_staging *staging = &d->card->staging;
    struct gpu up = d->gpu; /* the same, but for the stream */
    up.stream = staging->stream;
    if (!gpu_staging_reserve(&d->gpu, staging, period > 0 ? period : all < most ? all : most))
        return false;
    int band = (int)(period > 0 ? (size_t)m->n_tiles : staging->bytes / tile_bytes);
    for (int tile = 0; tile < m->n_tiles; tile += band) {
        int n_tiles = smaller(m->n_tiles - tile, band);
        struct raw_rows raw = {};
        raw.row_bytes = row_bytes;
        raw.type = tensor->type;
        raw.n_rows = smaller(n_rows - tile * TILE, n_tiles * TILE);
        const char *from = (const char *)tensor->data;
        size_t offset = (size_t)(first_row + tile * TILE) * row_bytes;
        size_t bytes = (size_t)raw.n_rows * row_bytes;
        if (period > 0) {
            bytes = period < tensor->bytes ? period : tensor->bytes;
            raw.period = bytes;
            raw.first = offset % bytes;
            offset = 0;
        }
        raw.bytes = (const uint8_t *)gpu_staging_up(&d->gpu, staging, from + offset, bytes);
        size_t n_blocks = ((size_t)n_tiles * m->n_units * WARP + THREADS - 1) / THREADS;
        gpu_launch(&up, "pack_kernel", pack_kernel, dim3((unsigned)n_blocks), THREADS, 0, *m, tile,
                   n_tiles, raw);
        gpu_staging_used(&d->gpu, staging);
    }
    return true;
}

static bool upload_matrix(struct cuda_device *d, struct weight *w) {
    const struct tensor *tensor = w->tensor;
    const struct slice *slice = &w->slice;
    struct matrix *m = &w->matrix;
    int rows = (int)tensor->rows / (slice->kind == SLICE_ROWS ? slice->count : 1);
    int first_row = slice->kind == SLICE_ROWS ? slice->rank * rows : 0;
    bool cut = slice->kind == SLICE_COLS;
    int grain = cut ? grain_of(d->device.config, (int)tensor->cols) : 0;
    int n_segments = cut ? K_SEGMENTS / slice->count : K_SEGMENTS;
    m->segments =
        make_segments((int)tensor->cols, grain, cut ? slice->rank * n_segments : 0, n_segments);
    m->type = packed_type_of(tensor->type);
    m->n_outputs = rows;
    m->n_tiles = divide(rows, TILE);
    m->n_units = m->segments.unit[n_segments];
    size_t n = (size_t)m->n_tiles * m->n_units;
    bool ok = cudaMalloc((void **)&m->packed, n * packed_bytes(m->type)) == cudaSuccess;
    if (has_scales(m->type))
        ok = ok && cudaMalloc((void **)&m->scales, n * SCALE_BYTES) == cudaSuccess;
    (void)cudaGetLastError();
    return ok && pack_matrix(d, tensor, first_row, rows, m);
}

/* A shard has its part of a bias; a norm is whole. */
static bool upload_vector(struct cuda_device *d, struct weight *w) {
    const struct tensor *tensor = w->tensor;
    int n = (int)tensor->cols / (w->slice.kind == SLICE_WHOLE ? 1 : w->slice.count);
    const char *from = (const char *)tensor->data;
    if (w->slice.kind != SLICE_WHOLE)
        from += (size_t)w->slice.rank * n * sizeof(float);
    size_t bytes = (size_t)n * sizeof(float);
    cudaStream_t stream = d->card->staging.stream;
    if (cudaMalloc((void **)&w->vector, bytes) != cudaSuccess)
        return false;
    TRY(d, cudaMemcpyAsync(w->vector, from, bytes, cudaMemcpyHostToDevice, stream));
    return true;
}

/* Gate and up of one type are multiplied by one kernel, which needs no place for their sums. If
 * there are matrices of their shape in several types, they may be two of those: see
 * cuda_norm_gate_up. False: no room. */
static bool make_gate_up(struct cuda_device *d, const struct weight *w) {
    bool ok = true;
    if (w->matrix.n_outputs != d->d_ff || w->tensor->cols != d->device.config->d_model)
        return true;
    d->ffn_types |= 1 << w->matrix.type;
    if (!d->gate_up && (d->ffn_types & (d->ffn_types - 1)))
        gpu_take(&d->gpu, &d->gate_up, (size_t)d->device.max_rows * 2 * (size_t)d->d_ff, &ok);
    return ok;
}

static const struct weight *cuda_upload(struct device *device, const struct tensor *tensor,
                                        struct slice slice, char *error) {
    struct cuda_device *d = enter(device, "loading weights");
    struct cuda_backend *cuda = d->cuda;
    pthread_mutex_lock(&cuda->upload_mutex);
    struct weight *w = cuda->weights;
    while (w && !(w->tensor == tensor && w->gpu == device->index && w->slice.kind == slice.kind &&
                  w->slice.rank == slice.rank && w->slice.count == slice.count))
        w = w->next;
    if (!w && (w = (struct weight *)calloc(1, sizeof *w)) != NULL) {
        w->tensor = tensor;
        w->slice = slice;
        w->gpu = device->index;
        bool is_vector = tensor->rows == 1 && tensor->type == TYPE_F32;
        if (is_vector ? upload_vector(d, w) : upload_matrix(d, w)) {
            w->next = cuda->weights;
            cuda->weights = w;
            TRY(d, cudaStreamSynchronize(d->card->staging.stream));
        } else {
            free_weight(w);
            w = NULL;
        }
    }
    bool ok = w && (w->vector || make_gate_up(d, w));
    pthread_mutex_unlock(&cuda->upload_mutex);
    if (!ok) {
        size_t available = 0, total = 0;
        (void)cudaGetLastError();
        (void)cudaMemGetInfo(&available, &total);
        (void)fail(error,
                   "%.*s: device %d (%s) has %zu MB left of %zu and needs %zu for this tensor; "
                   "take a model of a smaller type, or more GPUs and --tp",
                   (int)tensor->name.length, tensor->name.data, device->index,
                   d->card->properties.name, available >> 20, total >> 20,
                   (tensor->bytes >> 20) + 1);
    }
    return ok ? w : NULL;
}

/* ==== 4. Products: rows times packed matrices on the tensor cores ====
 *
 * A row takes the one kernel or the other by its role alone, so its bits do not depend on the
 * batch:
 *   generated_product   tokens that were generated: bound by reading the weights. A block of
 *                       K_SEGMENTS warps has 1 or 2 tiles of outputs and up to 64 rows; each warp
 *                       sums its segment of K, and the sums are added as a binary tree.
 *   prompt_product      rows of prompts: bound by multiplying. A block has 256 rows and 128
 *                       outputs, and each sum is one chain over all of K. Where shards cut K, a
 *                       shard goes on with the sums of the one before it: the same chain.
 * Both do their part of what follows a product: bias, silu(gate) * up, or adding to the residual.
 *
 * Rows are bf16 (n_rows, input_stride), outputs f32, but for the FFN's, which are the next input.
 * The twin of lib/matmul.h. */

enum epilogue { STORE, SILU }; /* out = sum + bias, or out += sum; ffn = silu(gate) * up */

static constexpr __host__ __device__ int kinds_of(int epilogue) { /* matrices of one output */
    return epilogue == SILU ? 2 : 1;
}

enum {
    SUM_STRIDE = 20, /* floats: a row of 16 sums; 20 keeps the lanes in different banks */
    ROW_TILE = 256,  /* rows of a block of prompt_product: with 128 outputs, 85 products a byte */
    OUTPUT_TILE = 128,
    WARP_ROWS = 64, /* a warp's 64 x 64 sums fill 128 registers */
    STAGES = 4,     /* units under way in shared memory: 3 x 24 KB cover the latency of L2 */
    ROW_BAND = 8    /* row tiles that blocks of one time share, so that weights stay in L2 */
};

struct product {
    struct matrix matrix[3]; /* of like K; SILU: gate and up */
    float *out[3];           /* (n_rows, out_stride) */
    const float *bias[3];    /* (n_outputs), or NULL */
    int n_matrices, out_stride;
    bool adds;             /* to what `out` holds; instead of a bias */
    const uint16_t *input; /* bf16 (n_rows, input_stride) */
    int input_stride;
    const int *n_generated; /* device: generated_product has rows [0, *n_generated - n_before) */
    int n_before;
    int first_row, n_rows; /* prompt_product's */
    const float *initial;  /* (n_rows, out_stride) where its chains begin; NULL: at 0 */
    uint16_t *ffn;         /* SILU: bf16 (n_rows, ffn_stride) */
    int ffn_stride;
    struct segments ffn_places; /* the K of ffn_down */
};

DEVICE float silu(float x) {
    return x / (1.0f + __expf(-x));
}

/* What is done with the sums of a row and of two outputs, the first even; `up` for SILU alone. */
template <int EPILOGUE>
DEVICE void finish(const struct product &p, int which, int row, int output, const float sum[2],
                   const float up[2]) {
    int n = p.matrix[which].n_outputs - output;
    if (n <= 0)
        return;
    if (EPILOGUE == SILU) { /* segments begin at an even k: both lie side by side */
        uint16_t *to = p.ffn + (size_t)row * p.ffn_stride + place(p.ffn_places, output);
        *reinterpret_cast<uint32_t *>(to) = pack_bf16(silu(sum[0]) * up[0], silu(sum[1]) * up[1]);
        return;
    }
    float *out = p.out[which] + (size_t)row * p.out_stride + output;
    const float *bias = p.bias[which];
#pragma unroll
    for (int i = 0; i < 2; i++)
        if (i < n)
            out[i] = sum[i] + (p.adds ? out[i] : bias ? bias[output + i] : 0.0f);
}

/* Which matrix a block works on, and its first tile there, if a block takes `tiles` of them. */
template <int EPILOGUE>
DEVICE int find_tile(const struct product &p, int block, int tiles, int *which) {
    *which = 0;
    while (EPILOGUE != SILU && *which + 1 < p.n_matrices) {
        int n_blocks = divide(p.matrix[*which].n_tiles, tiles);
        if (block < n_blocks)
            break;
        block -= n_blocks;
        ++*which;
    }
    return block * tiles;
}

/* ---- generated tokens ---- */

/* Tiles of outputs that a block takes: more, where many rows would be read again for each. */
static constexpr __host__ __device__ int tiles_a_block(int columns) {
    return columns > 2 ? 2 : 1;
}

/* The tree that sums K_SEGMENTS segments; those that another shard has are 0 here. */
DEVICE float tree_sum(const float *sums, int n_segments, int stride) {
    float value[K_SEGMENTS];
#pragma unroll
    for (int i = 0; i < K_SEGMENTS; i++)
        value[i] = i < n_segments ? sums[i * stride] : 0.0f;
#pragma unroll
    for (int n = K_SEGMENTS; n > 1; n /= 2)
#pragma unroll
        for (int i = 0; i < n / 2; i++)
            value[i] = value[2 * i] + value[2 * i + 1];
    return value[0];
}

/* What a block of generated_product has: SLOTS tiles, of SILU each of gate and of up, its rows, and
 * for each warp the units [at, end) of its segment. */
template <int TYPE, int EPILOGUE, int COLUMNS> struct generated_block {
    static constexpr int KINDS = kinds_of(EPILOGUE), TILES = tiles_a_block(COLUMNS);
    static constexpr int SLOTS = TILES * KINDS, ROWS = 8 * COLUMNS;
    static constexpr int AHEAD = SLOTS < 4 ? 4 / SLOTS : 1; /* units in registers while they come */
    int which, first_tile, first_row, warp, lane, at, end;
    struct fragment<TYPE> next[AHEAD][SLOTS];
    float sum[SLOTS][COLUMNS][4];
};

template <int TYPE, int EPILOGUE, int COLUMNS>
DEVICE void fetch_weights(const struct product &p, int from,
                          struct generated_block<TYPE, EPILOGUE, COLUMNS> *b) {
#pragma unroll
    for (int i = 0; i < b->AHEAD * b->SLOTS; i++) {
        int at = from + i / b->SLOTS, slot = i % b->SLOTS;
        const struct matrix &m = p.matrix[b->which + slot % b->KINDS];
        int tile = b->first_tile + slot / b->KINDS;
        size_t index = (size_t)smaller(tile, m.n_tiles - 1) * m.n_units + at;
        if (at < b->end)
            load_fragment<TYPE, true>(m.packed + index * packed_bytes(TYPE),
                                      m.scales + index * SCALE_BYTES, b->lane,
                                      &b->next[i / b->SLOTS][slot]);
    }
}

/* The sums of a warp's segment: the weights are the 16-row operand and the rows the 8-column one,
 * so one row and 64 take the same instructions. */
template <int TYPE, int EPILOGUE, int COLUMNS>
DEVICE void multiply_segment(const struct product &p,
                             struct generated_block<TYPE, EPILOGUE, COLUMNS> *b) {
    constexpr int AHEAD = b->AHEAD, SLOTS = b->SLOTS;
    const uint16_t *input =
        p.input + (size_t)(b->first_row + b->lane / 4) * p.input_stride + b->lane % 4 * 8;
    for (; b->at < b->end; b->at += AHEAD) {
        struct fragment<TYPE> now[AHEAD][SLOTS];
#pragma unroll
        for (int i = 0; i < AHEAD * SLOTS; i++)
            now[i / SLOTS][i % SLOTS] = b->next[i / SLOTS][i % SLOTS];
        fetch_weights(p, b->at + AHEAD, b);
#pragma unroll
        for (int ahead = 0; ahead < AHEAD; ahead++) {
            if (b->at + ahead >= b->end)
                break;
            uint32_t a[SLOTS][2][4];
#pragma unroll
            for (int slot = 0; slot < SLOTS; slot++)
                unpack<TYPE>(now[ahead][slot], a[slot]);
#pragma unroll
            for (int column = 0; column < COLUMNS; column++) {
                uint4 x =
                    load16(input + (size_t)column * 8 * p.input_stride + (b->at + ahead) * UNIT);
#pragma unroll
                for (int slot = 0; slot < SLOTS; slot++)
                    multiply_unit(b->sum[slot][column], a[slot], x);
            }
        }
    }
}

/* Adds the segments of one of the block's tiles, and finishes its outputs. */
template <int TYPE, int EPILOGUE, int COLUMNS>
DEVICE void finish_tile(const struct product &p,
                        const struct generated_block<TYPE, EPILOGUE, COLUMNS> &b, int tile,
                        int n_rows, float *sums) {
    int n_segments = (int)blockDim.x / WARP, stride = b.ROWS * SUM_STRIDE;
#pragma unroll
    for (int i = 0; i < b.KINDS * COLUMNS * 4; i++) { /* element i % 4: row 2 quad + i % 2 */
        int kind = i / (COLUMNS * 4), column = i / 4 % COLUMNS;
        int row = column * 8 + b.lane % 4 * 2 + i % 2, output = b.lane / 4 + i % 4 / 2 * 8;
        sums[(kind * n_segments + b.warp) * stride + row * SUM_STRIDE + output] =
            b.sum[tile * b.KINDS + kind][column][i % 4];
    }
    __syncthreads();
    for (int i = (int)threadIdx.x * 2; i < b.ROWS * TILE; i += (int)blockDim.x * 2) {
        int row = i / TILE, output = (b.first_tile + tile) * TILE + i % TILE;
        float value[2][2] = {};
        for (int j = 0; j < 2 * b.KINDS; j++) {
            const float *from = sums + j / 2 * n_segments * stride + row * SUM_STRIDE;
            value[j / 2][j % 2] = tree_sum(from + i % TILE + j % 2, n_segments, stride);
        }
        if (b.first_row + row < n_rows)
            finish<EPILOGUE>(p, b.which, b.first_row + row, output, value[0], value[1]);
    }
    __syncthreads();
}

/* out (row, output) = sum over k of input (row, k) * matrix (output, k), rows [0, n_generated).
 * Grid: (blocks of tiles, blocks of 8 * COLUMNS rows); a warp per segment of K. Shared: (kinds,
 * segments, 8 * COLUMNS rows, SUM_STRIDE) floats. Bound by memory. */
template <int TYPE, int EPILOGUE, int COLUMNS>
__global__ void __launch_bounds__(THREADS) generated_product_kernel(const struct product p) {
    DYNAMIC_SHARED(float, sums);
    struct generated_block<TYPE, EPILOGUE, COLUMNS> b;
    b.first_tile = find_tile<EPILOGUE>(p, (int)blockIdx.x, b.TILES, &b.which);
    b.first_row = (int)blockIdx.y * b.ROWS;
    b.warp = (int)threadIdx.x / WARP;
    b.lane = (int)threadIdx.x % WARP;
    const struct segments &segments = p.matrix[b.which].segments;
    b.at = segments.unit[b.warp];
    b.end = segments.unit[b.warp + 1];
#pragma unroll
    for (int i = 0; i < b.SLOTS * COLUMNS * 4; i++)
        b.sum[i / 4 / COLUMNS][i / 4 % COLUMNS][i % 4] = 0.0f;
    fetch_weights(p, b.at, &b); /* they do not depend on the kernel before */
    grid_wait();
    grid_launch_dependents();
    int n_rows = *p.n_generated - p.n_before;
    if (b.first_row >= n_rows)
        return;
    multiply_segment(p, &b);
#pragma unroll
    for (int tile = 0; tile < b.TILES; tile++)
        finish_tile(p, b, tile, n_rows, sums);
}

static inline size_t generated_product_shared(int kinds, int n_segments, int columns) {
    return sizeof(float) * (size_t)(kinds * n_segments * 8 * columns * SUM_STRIDE);
}

/* ---- prompts ---- */

enum {
    STAGE_ROWS = ROW_TILE * UNIT * 2,                    /* bytes of the rows of a stage */
    STAGE_SLOTS = OUTPUT_TILE / TILE,                    /* tiles of weights of a stage */
    STAGE_BYTES = STAGE_ROWS + STAGE_SLOTS * UNIT_BYTES, /* scales fit where bf16 would be */
    PROMPT_SHARED = STAGES * STAGE_BYTES
};

/* Which matrix and tile stands in slot (0 to 7) of a block. SILU: a warp's four are two tiles of
 * gate and the same two of up, so that it has both sums of an output. */
template <int EPILOGUE> DEVICE int slot_tile(int first_tile, int slot, int *kind) {
    *kind = EPILOGUE == SILU ? slot % 4 / 2 : 0;
    return first_tile + (EPILOGUE == SILU ? slot / 4 * 2 + slot % 2 : slot);
}

/* Starts the copies of one unit of a block's rows and weights into a stage. Rows are 64 bytes side
 * by side: a fragment is 16 of them, and eight lanes read 128 bytes in a row. */
template <int TYPE, int EPILOGUE>
DEVICE void load_stage(const struct product &p, int which, int first_tile, int first_row, int unit,
                       uint8_t *stage) {
    const uint16_t *input = p.input + unit * UNIT;
    for (int i = (int)threadIdx.x; i < ROW_TILE * 4; i += THREADS) {
        int row = first_row + i / 4, last = p.first_row + p.n_rows - 1;
        const uint16_t *from = input + (size_t)smaller(row, last) * p.input_stride;
        copy_async16(stage + i * 16, from + i % 4 * 8, row <= last);
    }
    constexpr int BYTES = (int)packed_bytes(TYPE);
    constexpr int A_SLOT = (BYTES + (has_scales(TYPE) ? SCALE_BYTES : 0)) / 16;
    stage += STAGE_ROWS;
    for (int i = (int)threadIdx.x; i < STAGE_SLOTS * A_SLOT; i += THREADS) {
        int slot = i / A_SLOT, byte = i % A_SLOT * 16, kind;
        int tile = slot_tile<EPILOGUE>(first_tile, slot, &kind);
        const struct matrix &m = p.matrix[which + kind];
        bool there = tile < m.n_tiles;
        size_t index = (size_t)(there ? tile : 0) * m.n_units + unit;
        const uint8_t *from = byte < BYTES ? m.packed + index * BYTES + byte
                                           : m.scales + index * SCALE_BYTES + (byte - BYTES);
        copy_async16(stage + slot * UNIT_BYTES + byte, there ? from : m.packed, there);
    }
}

/* sum (4 x 16 rows, 4 x 2 x 8 outputs) += one unit of a warp's rows and slots. */
template <int TYPE>
DEVICE void multiply_stage(const uint8_t *stage, int warp, int lane, float sum[4][8][4]) {
    const uint8_t *rows = stage + (warp / 2 * WARP_ROWS + lane / 4) * 64 + lane % 4 * 16;
    const uint8_t *weights = stage + STAGE_ROWS + warp % 2 * 4 * UNIT_BYTES;
    uint32_t x[4][2][4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        row_operands(load16(rows + i * 16 * 64), load16(rows + (i * 16 + 8) * 64), x[i]);
#pragma unroll
    for (int slot = 0; slot < 4; slot++) {
        struct fragment<TYPE> f;
        uint32_t w[2][4];
        const uint8_t *numbers = weights + slot * UNIT_BYTES;
        load_fragment<TYPE, false>(numbers, numbers + packed_bytes(TYPE), lane, &f);
        unpack<TYPE>(f, w);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint32_t low[2] = {w[half][0], w[half][2]}, high[2] = {w[half][1], w[half][3]};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                mma_bf16(sum[i][slot * 2], x[i][half], low);
                mma_bf16(sum[i][slot * 2 + 1], x[i][half], high);
            }
        }
    }
}

/* out (row, output) = sum over k, in order, of rows [first_row, first_row + n_rows). Grid: row
 * tiles x blocks of outputs, in bands. 8 warps: 4 along the rows, 2 along the outputs. The rows are
 * the 16-row operand. Shared: STAGES x 24 KB. Bound by the tensor cores. */
template <int TYPE, int EPILOGUE>
__global__ void __launch_bounds__(THREADS, 1)
    prompt_product_kernel(const struct product p, int n_blocks) {
    DYNAMIC_SHARED(uint8_t, stages);
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;
    int n_row_tiles = divide(p.n_rows, ROW_TILE), in_band = ROW_BAND * n_blocks;
    int first = (int)blockIdx.x / in_band * ROW_BAND, at = (int)blockIdx.x % in_band;
    int height = smaller(n_row_tiles - first, ROW_BAND);
    int first_row = p.first_row + (first + at % height) * ROW_TILE, which;
    int first_tile = find_tile<EPILOGUE>(p, at / height, STAGE_SLOTS / kinds_of(EPILOGUE), &which);
    int end_row = p.first_row + p.n_rows;
    int n = p.matrix[which].n_units; /* stages to come */
    float sum[4][8][4] = {};
    grid_wait();
    grid_launch_dependents();
    for (int i = 0; i < STAGES - 1; i++) {
        if (i < n)
            load_stage<TYPE, EPILOGUE>(p, which, first_tile, first_row, i,
                                       stages + i * STAGE_BYTES);
        copy_async_commit(); /* a group for each stage, though it be empty: waits count groups */
    }
    /* act(i, j, c, row, output): sum[i][j][c] and [c + 1] are those of a row and two outputs */
    auto for_pairs = [&](auto act) {
#pragma unroll
        for (int pair = 0; pair < 4 * 8 * 2; pair++) {
            int i = pair / 16, j = pair / 2 % 8, kind;
            int tile = slot_tile<EPILOGUE>(first_tile, warp % 2 * 4 + j / 2, &kind);
            int row = first_row + warp / 2 * WARP_ROWS + i * 16 + lane / 4 + pair % 2 * 8;
            int output = tile * TILE + j % 2 * 8 + lane % 4 * 2;
            if (row < end_row && kind == 0)
                act(i, j, pair % 2 * 2, row, output);
        }
    };
    if (p.initial)
        for_pairs([&](int i, int j, int c, int row, int output) {
            for (int k = 0; k < 2; k++)
                if (output + k < p.matrix[which].n_outputs)
                    sum[i][j][c + k] = p.initial[(size_t)row * p.out_stride + output + k];
        });
    for (int i = 0; i < n; i++) {
        copy_async_wait<STAGES - 2>();
        __syncthreads(); /* the stage has arrived for all, and all are done with the oldest */
        int ahead = i + STAGES - 1;
        if (ahead < n)
            load_stage<TYPE, EPILOGUE>(p, which, first_tile, first_row, ahead,
                                       stages + ahead % STAGES * STAGE_BYTES);
        copy_async_commit();
        multiply_stage<TYPE>(stages + i % STAGES * STAGE_BYTES, warp, lane, sum);
    }
    for_pairs([&](int i, int j, int c, int row, int output) {
        finish<EPILOGUE>(p, which, row, output, &sum[i][j][c], &sum[i][(j + 4) % 8][c]);
    });
}

/* ---- launches ---- */

/* Blocks of outputs if each has `tiles` of them. */
static int count_blocks(const struct product &p, int epilogue, int tiles) {
    int n = 0;
    for (int i = 0; i < (epilogue == SILU ? 1 : p.n_matrices); i++)
        n += divide(p.matrix[i].n_tiles, tiles);
    return n;
}

template <int TYPE, int EPILOGUE, int COLUMNS>
static void launch_generated(struct cuda_device *d, const struct product &p, int n_rows) {
    int n_segments = p.matrix[0].segments.n;
    launch(d, "generated_product_kernel", generated_product_kernel<TYPE, EPILOGUE, COLUMNS>,
           grid_of(count_blocks(p, EPILOGUE, tiles_a_block(COLUMNS)), divide(n_rows, 8 * COLUMNS)),
           n_segments * WARP, generated_product_shared(kinds_of(EPILOGUE), n_segments, COLUMNS), p);
}

/* The product for n_generated rows, and for the prompt rows that p names. */
template <int TYPE, int EPILOGUE>
static void launch_typed(struct cuda_device *d, const struct product &p, int n_generated) {
    if (n_generated > 32)
        launch_generated<TYPE, EPILOGUE, 8>(d, p, n_generated);
    else if (n_generated > 16)
        launch_generated<TYPE, EPILOGUE, 4>(d, p, n_generated);
    else if (n_generated > 8)
        launch_generated<TYPE, EPILOGUE, 2>(d, p, n_generated);
    else if (n_generated > 0)
        launch_generated<TYPE, EPILOGUE, 1>(d, p, n_generated);
    if (p.n_rows > 0) {
        int n_blocks = count_blocks(p, EPILOGUE, STAGE_SLOTS / kinds_of(EPILOGUE));
        launch(d, "prompt_product_kernel", prompt_product_kernel<TYPE, EPILOGUE>,
               grid_of(n_blocks * divide(p.n_rows, ROW_TILE)), THREADS, PROMPT_SHARED, p, n_blocks);
    }
}

/* Matrices of one type together, each by itself where they are of several. */
template <int EPILOGUE>
static void launch_product(struct cuda_device *d, const struct product &p, int n_generated) {
    int type = p.matrix[0].type;
    for (int i = 1; i < p.n_matrices; i++)
        type = p.matrix[i].type == type ? type : -1;
    struct product one = p;
    one.n_matrices = 1;
    for (int i = 0; i < p.n_matrices && type < 0; i++) {
        one.matrix[0] = p.matrix[i];
        one.bias[0] = p.bias[i];
        one.out[0] = p.out[i];
        launch_product<EPILOGUE>(d, one, n_generated);
    }
    switch (type) {
    case PACKED_BF16: launch_typed<PACKED_BF16, EPILOGUE>(d, p, n_generated); break;
    case PACKED_Q8: launch_typed<PACKED_Q8, EPILOGUE>(d, p, n_generated); break;
    case PACKED_Q4: launch_typed<PACKED_Q4, EPILOGUE>(d, p, n_generated); break;
    }
}

/* A product of all rows of the step. */
static struct product product_of(const struct cuda_device *d, const uint16_t *input,
                                 int input_stride) {
    struct product p = {};
    p.input = input;
    p.input_stride = input_stride;
    p.n_generated = &d->step->n_generated;
    p.first_row = d->n_generated;
    p.n_rows = d->n_rows - d->n_generated;
    return p;
}

/* ==== 5. Attention: softmax(q . k) . v over paged keys and values ====
 *
 * A *query* is one head of one token. The queries of a KV head's group see the same keys, so they
 * are the rows of one matrix, and a warp works on 16 or 32 of them: scores = q . k of two blocks of
 * tokens at a time, with a running softmax (FlashAttention-2, Dao 2023), then weights . v.
 *   prompt_attention      blocks of four warps with up to 128 queries of one sequence share the
 *                         keys that they copy to shared memory: bound by the tensor cores
 *   generated_attention   one query token: its keys are cut into splits of fixed length, each read
 *                         once, straight into registers, by four warps; whoever ends last adds up
 *                         the splits, in their order (Flash-Decoding, Dao et al. 2023): by memory
 * What a query gets does not depend on its neighbours: tokens are taken in steps counted from token
 * 0, and those after its own weigh 0.
 *
 * In a block (see block_bytes in dynamo.h) a head's keys are [16 tokens][head_dim], its values
 * [head_dim][16 tokens], bf16: then the k of both products are neighbours in memory. Tokens 4 quad
 * to 4 quad + 3 of a block belong to one lane in the scores, which is just how it needs them as
 * operand of the second product (token_of). HEAD: head_dim padded to 64, 128 or 256. The twin of
 * attention_rows. */

enum {
    ATTENTION_WARPS = 4,
    STEP_TOKENS = 2 * BLOCK_TOKENS, /* of the running softmax */
    SPLIT_TOKENS = 256,             /* so short that one text fills the chip from 4k tokens on */
    BLOCKS_A_PROCESSOR = 4          /* of generated_attention, whose list of work may be long */
};

struct heads {                      /* of a layer: what rope and attention share */
    const struct step_header *step; /* device */
    uint16_t *q, *kv;               /* bf16 (n_rows, n_heads, head_dim); blocks */
    size_t block_elements, plane;   /* of a block; from a head's keys to its values */
    int layer, n_heads, n_kv_heads, head_dim;
};

struct attention : heads {
    uint16_t *out; /* bf16 (n_rows, out_stride), heads at `places` */
    int out_stride;
    float scale; /* log2(e) / sqrt(head_dim) */
    struct segments places;
    float *partial; /* (n_splits, n_heads, head_dim + 2): weighted values, largest score, sum */
    int *arrived;   /* (n_sequences, n_kv_heads) splits that are done; 0 between steps */
};

/* Token of a block that is column `column` of score tile `tile` (8 columns each). */
DEVICE int token_of(int tile, int column) {
    return column / 2 * 4 + tile * 2 + column % 2;
}

/* Where a head's keys begin in a block of a sequence; its values begin `plane` elements further. */
DEVICE uint16_t *key_plane(const struct heads &h, const struct sequence &s, int block,
                           int kv_head) {
    size_t first = (size_t)(h.layer * 2 * h.n_kv_heads + kv_head) * BLOCK_TOKENS * h.head_dim;
    const int *table = array_of<int>(h.step, h.step->table);
    return h.kv + (size_t)table[s.first_block + block] * h.block_elements + first;
}

/* Values of tokens [first, first + 4), without those from `end` on: rows that were never written
 * may hold NaN, which a weight of 0 does not hide. */
DEVICE uint2 values_before(uint2 v, int first, int end) {
    v.x &= first + 1 < end ? 0xffffffffu : first < end ? 0xffffu : 0u;
    v.y &= first + 3 < end ? 0xffffffffu : first + 2 < end ? 0xffffu : 0u;
    return v;
}

/* ---- the running softmax of a warp's 16 rows; a lane has parts of rows group, group + 8 ---- */

struct softmax {
    float max[2], sum[2]; /* sum: of this lane's tokens */
};

/* scores (2 blocks x 2 tiles) become weights, packed as the operand of the second product; `output`
 * is scaled to the new maximum. visible: tokens of the step that each of the two rows sees. */
template <int HEAD>
DEVICE void softmax_step(float scores[2][2][4], const int visible[2], float scale, int quad,
                         struct softmax *state, float output[HEAD / 8][4], uint32_t weights[2][4]) {
    float factor[2];
#pragma unroll
    for (int row = 0; row < 2; row++) {
        float largest = state->max[row];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float &score = scores[i / 4][i / 2 % 2][row * 2 + i % 2];
            if (i / 4 * BLOCK_TOKENS + quad * 4 + i % 4 >= visible[row])
                score = -INFINITY;
            largest = fmaxf(largest, score);
        }
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
        factor[row] = exp2_approx((state->max[row] - largest) * scale);
        if (largest == -INFINITY) /* it sees no token yet */
            factor[row] = 1.0f;
        state->max[row] = largest;
        state->sum[row] *= factor[row];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float &score = scores[i / 4][i / 2 % 2][row * 2 + i % 2];
            score = score == -INFINITY ? 0.0f : exp2_approx((score - largest) * scale);
            state->sum[row] += score;
        }
    }
    if (__any_sync(0xffffffffu, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
        for (int i = 0; i < HEAD / 8 * 4; i++)
            output[i / 4][i % 4] *= factor[i % 4 / 2];
    }
#pragma unroll
    for (int i = 0; i < 8; i++) { /* register: row i % 2, tile i % 4 / 2 */
        const float *pair = &scores[i / 4][i % 4 / 2][i % 2 * 2];
        weights[i / 4][i % 4] = pack_bf16(pair[0], pair[1]);
    }
}

DEVICE void softmax_end(struct softmax *state) { /* the sums of all lanes of a row */
#pragma unroll
    for (int row = 0; row < 2; row++) {
        state->sum[row] += __shfl_xor_sync(0xffffffffu, state->sum[row], 1);
        state->sum[row] += __shfl_xor_sync(0xffffffffu, state->sum[row], 2);
    }
}

/* ---- prompts ---- */

/* Queries of a block, and steps of keys and values under way: fewer where heads are long. */
static constexpr __host__ __device__ int query_tile(int head) {
    return ATTENTION_WARPS * (head > 128 ? 16 : 32);
}

static constexpr __host__ __device__ int kv_stages(int head) {
    return head > 128 ? 2 : 3;
}

static constexpr size_t prompt_attention_shared(int head) {
    return (size_t)head * 2 * (size_t)(query_tile(head) + kv_stages(head) * 2 * STEP_TOKENS);
}

/* The queries of one block: [first, last] of those of a sequence and KV head, which are numbered
 * token by token, and for each token the heads of the group. */
struct queries {
    struct sequence s;
    int first, last, kv_head, group;
};

DEVICE struct queries find_queries(const struct attention &a, int tile_queries) {
    struct queries q;
    const int2 item = array_of<int2>(a.step, a.step->prompt_items)[blockIdx.x / a.n_kv_heads];
    q.s = array_of<struct sequence>(a.step, a.step->sequences)[item.x];
    q.kv_head = (int)blockIdx.x % a.n_kv_heads;
    q.group = a.n_heads / a.n_kv_heads;
    q.first = item.y;
    q.last = smaller(q.first + tile_queries, q.s.n_rows * q.group) - 1;
    return q;
}

/* Starts the copies of the keys and values of a step (2 blocks) into shared memory: keys unit by
 * unit, in rows of 32 elements, so that 16 bytes of eight lanes are 128 in a row; values as they
 * lie. What is past the text's end, or past head_dim, is 0. */
template <int HEAD>
DEVICE void load_kv(const struct attention &a, const struct sequence &s, int kv_head, int step,
                    uint8_t *stage) {
    constexpr int KEY_CHUNKS = STEP_TOKENS * HEAD / 8, VALUE_CHUNKS = HEAD * 2 * 2;
    for (int i = (int)threadIdx.x; i < KEY_CHUNKS + VALUE_CHUNKS; i += ATTENTION_WARPS * WARP) {
        bool key = i < KEY_CHUNKS;
        int at = key ? i : i - KEY_CHUNKS;
        int row = at / 4 % STEP_TOKENS, dim = at / 4 / STEP_TOKENS * UNIT + at % 4 * 8;
        int block = step * 2 + (key ? row / BLOCK_TOKENS : at / (HEAD * 2));
        int offset = row % BLOCK_TOKENS * a.head_dim + dim;
        if (!key) {
            dim = at / 2 % HEAD;
            offset = dim * BLOCK_TOKENS + at % 2 * 8;
        }
        bool there = block < s.n_blocks && dim < a.head_dim;
        const uint16_t *from = key_plane(a, s, there ? block : 0, kv_head);
        from += there ? offset + (key ? 0 : (int)a.plane) : 0;
        copy_async16(stage + i * 16, from, there);
    }
}

/* scores of 16 queries and the 32 tokens of a step, of which `keys` begin the stage. */
template <int HEAD>
DEVICE void stage_scores(const uint8_t *queries, const uint8_t *keys, int n_queries, int lane,
                         float scores[2][2][4]) {
#pragma unroll 2
    for (int unit = 0; unit < HEAD / UNIT; unit++) { /* 2: more would not fit the registers */
        const uint8_t *from = queries + (unit * n_queries + lane / 4) * 64 + lane % 4 * 16;
        uint32_t q[2][4];
        row_operands(load16(from), load16(from + 8 * 64), q);
#pragma unroll
        for (int i = 0; i < 4; i++) { /* block i / 2, tile i % 2 */
            int token = i / 2 * BLOCK_TOKENS + token_of(i % 2, lane / 4);
            multiply_unit(scores[i / 2][i % 2], q,
                          load16(keys + (unit * STEP_TOKENS + token) * 64 + lane % 4 * 16));
        }
    }
}

/* Starts the copies of the queries, unit by unit; those past the last, and past head_dim, are 0. */
template <int HEAD>
DEVICE void load_queries(const struct attention &a, const struct queries &q, uint8_t *tile) {
    constexpr int N = query_tile(HEAD);
    for (int i = (int)threadIdx.x; i < N * HEAD / 8; i += ATTENTION_WARPS * WARP) {
        int query = q.first + i / 4 % N, dim = i / 4 / N * UNIT + i % 4 * 8;
        bool there = dim < a.head_dim && query <= q.last;
        query = there ? query : q.first;
        size_t row = (size_t)(q.s.first_row + query / q.group) * a.n_heads;
        row += q.kv_head * q.group + query % q.group;
        copy_async16(tile + i * 16, a.q + row * a.head_dim + (there ? dim : 0), there);
    }
}

/* output (16 queries from `first`) += weights . values of a step; tokens from `end` on are none. */
template <int HEAD, int ROW_TILES>
DEVICE void stage_values(const uint8_t *values, int lane, int end,
                         const uint32_t weights[ROW_TILES][2][4],
                         float output[ROW_TILES][HEAD / 8][4]) {
    values += lane / 4 * 32 + lane % 4 * 8;
#pragma unroll
    for (int n = 0; n < 2 * HEAD / 8; n++) { /* block n % 2, 8 elements of the output */
        uint2 v = load8(values + (n % 2 * HEAD + n / 2 * 8) * 32);
        if (end < STEP_TOKENS)
            v = values_before(v, n % 2 * BLOCK_TOKENS + lane % 4 * 4, end);
        const uint32_t b[2] = {v.x, v.y};
#pragma unroll
        for (int i = 0; i < ROW_TILES; i++)
            mma_bf16(output[i][n / 2], weights[i][n % 2], b);
    }
}

/* Writes 16 queries from `first` on, divided by the sums of their weights. */
template <int HEAD>
DEVICE void store_queries(const struct attention &a, const struct queries &q, int first, int lane,
                          struct softmax *state, const float output[HEAD / 8][4]) {
    softmax_end(state);
#pragma unroll
    for (int row = 0; row < 2; row++) {
        int query = first + row * 8 + lane / 4;
        if (query > q.last)
            continue;
        int head = q.kv_head * q.group + query % q.group;
        uint16_t *out = a.out + (size_t)(q.s.first_row + query / q.group) * a.out_stride +
                        place(a.places, head * a.head_dim) + lane % 4 * 2;
        float factor = 1.0f / state->sum[row];
#pragma unroll
        for (int n = 0; n < HEAD / 8; n++)
            if (n * 8 < a.head_dim)
                *reinterpret_cast<uint32_t *>(out + n * 8) =
                    pack_bf16(output[n][row * 2] * factor, output[n][row * 2 + 1] * factor);
    }
}

/* out = softmax(q . k) . v for rows of prompts. Grid: items x KV heads, long texts first; a block
 * has query_tile(HEAD) queries, a warp 16 or 32 of them. Shared: the queries, and kv_stages(HEAD)
 * steps of keys and values. Bound by the tensor cores. */
template <int HEAD>
__global__ void __launch_bounds__(ATTENTION_WARPS *WARP)
    prompt_attention_kernel(const struct attention a) {
    constexpr int N = query_tile(HEAD), ROW_TILES = N / ATTENTION_WARPS / 16;
    constexpr int STAGES_AHEAD = kv_stages(HEAD) - 1, STAGE = 2 * STEP_TOKENS * HEAD * 2;
    DYNAMIC_SHARED(uint8_t, shared);
    uint8_t *stages = shared + N * HEAD * 2;
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;
    grid_wait();
    grid_launch_dependents();
    const struct queries q = find_queries(a, N);
    int n_steps = (q.s.start + q.last / q.group) / STEP_TOKENS + 1;
    load_queries<HEAD>(a, q, shared); /* of one group with the first step */
    for (int i = 0; i < STAGES_AHEAD; i++) {
        if (i < n_steps)
            load_kv<HEAD>(a, q.s, q.kv_head, i, stages + i * STAGE);
        copy_async_commit(); /* a group for each step, though it be empty: waits count groups */
    }
    float output[ROW_TILES][HEAD / 8][4] = {};
    struct softmax state[ROW_TILES];
    int position[ROW_TILES][2], first = warp * ROW_TILES * 16;
#pragma unroll
    for (int i = 0; i < ROW_TILES * 2; i++) {
        int query = q.first + first + i / 2 * 16 + i % 2 * 8 + lane / 4;
        position[i / 2][i % 2] = q.s.start + smaller(query, q.last) / q.group;
        state[i / 2].max[i % 2] = -INFINITY;
        state[i / 2].sum[i % 2] = 0.0f;
    }
    for (int step = 0; step < n_steps; step++) {
        copy_async_wait<STAGES_AHEAD - 1>();
        __syncthreads(); /* the step has arrived for all, and all are done with the oldest */
        int ahead = step + STAGES_AHEAD, begin = step * STEP_TOKENS;
        if (ahead < n_steps)
            load_kv<HEAD>(a, q.s, q.kv_head, ahead, stages + ahead % (STAGES_AHEAD + 1) * STAGE);
        copy_async_commit();
        const uint8_t *keys = stages + step % (STAGES_AHEAD + 1) * STAGE;
        uint32_t weights[ROW_TILES][2][4];
#pragma unroll
        for (int i = 0; i < ROW_TILES; i++) {
            float scores[2][2][4] = {};
            const int visible[2] = {position[i][0] - begin + 1, position[i][1] - begin + 1};
            stage_scores<HEAD>(shared + (first + i * 16) * 64, keys, N, lane, scores);
            softmax_step<HEAD>(scores, visible, a.scale, lane % 4, &state[i], output[i],
                               weights[i]);
        }
        stage_values<HEAD, ROW_TILES>(keys + STAGE / 2, lane, q.s.start + q.s.n_rows - begin,
                                      weights, output);
    }
#pragma unroll
    for (int i = 0; i < ROW_TILES; i++)
        store_queries<HEAD>(a, q, q.first + first + i * 16, lane, &state[i], output[i]);
}

/* ---- generated tokens ---- */

static constexpr size_t generated_attention_shared(int head) {
    return sizeof(float) * (ATTENTION_WARPS * 16 * (size_t)(head + 2) + 4);
}

/* The part of one block: a split, a KV head, and up to 16 heads of its group. */
struct split {
    struct sequence s;
    int kv_head, first_head, n_heads; /* n_heads: 1 to 16 */
    int index, n_tokens;              /* of the split, of the text */
    int item, chunk, n_sequence;      /* its place in the list, in the group; the sequence's */
};

DEVICE struct split find_split(const struct attention &a, int index, int n_chunks) {
    struct split p;
    int group = a.n_heads / a.n_kv_heads;
    p.chunk = index % n_chunks;
    p.kv_head = index / n_chunks % a.n_kv_heads;
    p.item = index / n_chunks / a.n_kv_heads;
    const int2 item = array_of<int2>(a.step, a.step->splits)[p.item];
    p.n_sequence = item.x;
    p.s = array_of<struct sequence>(a.step, a.step->sequences)[item.x];
    p.first_head = p.kv_head * group + p.chunk * 16;
    p.n_heads = smaller(group - p.chunk * 16, 16);
    p.index = item.y;
    p.n_tokens = p.s.start + 1;
    return p;
}

/* The operand of 16 heads, straight from memory. */
template <int HEAD>
DEVICE void load_heads(const struct attention &a, const struct split &p, int lane,
                       uint32_t q[HEAD / UNIT][2][4]) {
    const uint16_t *from = a.q + ((size_t)p.s.first_row * a.n_heads + p.first_head) * a.head_dim;
#pragma unroll
    for (int i = 0; i < HEAD / UNIT * 2; i++) { /* unit i / 2; head group, or group + 8 */
        int dim = i / 2 * UNIT + lane % 4 * 8, head = lane / 4 + i % 2 * 8;
        uint4 x = make_uint4(0, 0, 0, 0);
        if (head < p.n_heads && dim < a.head_dim)
            x = load16(from + head * a.head_dim + dim);
        q[i / 2][0][i % 2] = x.x;
        q[i / 2][0][i % 2 + 2] = x.y;
        q[i / 2][1][i % 2] = x.z;
        q[i / 2][1][i % 2 + 2] = x.w;
    }
}

/* One warp's part of a split: blocks [block, end). */
template <int HEAD>
DEVICE void attend_blocks(const struct attention &a, const struct split &p,
                          const uint32_t q[HEAD / UNIT][2][4], int block, int end, int lane,
                          struct softmax *state, float output[HEAD / 8][4]) {
    for (; block < end; block += 2) {
        float scores[2][2][4] = {};
        const uint16_t *plane[2] = {key_plane(a, p.s, block, p.kv_head),
                                    key_plane(a, p.s, smaller(block + 1, end - 1), p.kv_head)};
        uint32_t weights[2][4];
#pragma unroll
        for (int i = 0; i < 4 * HEAD / UNIT; i++) { /* block and tile of unit i / 4 */
            int dim = i / 4 * UNIT + lane % 4 * 8, block_of = i / 2 % 2, tile = i % 2;
            const uint16_t *key = plane[block_of] + token_of(tile, lane / 4) * a.head_dim;
            uint4 k = dim < a.head_dim ? load16(key + dim) : make_uint4(0, 0, 0, 0);
            multiply_unit(scores[block_of][tile], q[i / 4], k);
        }
        int seen = p.n_tokens - block * BLOCK_TOKENS;
        if (block + 1 >= end && seen > BLOCK_TOKENS)
            seen = BLOCK_TOKENS; /* the second block is the first once more, and weighs 0 */
        const int visible[2] = {seen, seen};
        softmax_step<HEAD>(scores, visible, a.scale, lane % 4, state, output, weights);
        __syncwarp(); /* moves no load across: keys and values would not both fit the registers */
#pragma unroll
        for (int n = 0; n < 2 * HEAD / 8; n++) {
            int dim = n / 2 * 8 + lane / 4, token = lane % 4 * 4;
            uint2 v = make_uint2(0, 0);
            if (dim < a.head_dim)
                v = load8(plane[n % 2] + a.plane + dim * BLOCK_TOKENS + token);
            if (seen < STEP_TOKENS)
                v = values_before(v, n % 2 * BLOCK_TOKENS + token, seen);
            const uint32_t b[2] = {v.x, v.y};
            mma_bf16(output[n / 2], weights[n % 2], b);
        }
    }
}

/* A warp's sums for 16 heads into shared memory: (head, head_dim values, largest score, sum). */
template <int HEAD>
DEVICE void store_part(const struct attention &a, const struct softmax &state, int lane,
                       const float output[HEAD / 8][4], float *parts) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float *to = parts + (lane / 4 + i * 8) * (a.head_dim + 2);
#pragma unroll
        for (int n = 0; n < HEAD / 8; n++)
            if (n * 8 < a.head_dim) {
                to[n * 8 + lane % 4 * 2] = output[n][i * 2];
                to[n * 8 + lane % 4 * 2 + 1] = output[n][i * 2 + 1];
            }
        if (lane % 4 == 0) {
            to[a.head_dim] = state.max[i];
            to[a.head_dim + 1] = state.sum[i];
        }
    }
}

/* Adds up `n` parts of each head of p, part_stride floats apart, in their order. Where they are all
 * there is, their quotient is the output; else they become one part more, at `to`. */
DEVICE void merge_parts(const struct attention &a, const struct split &p, const float *parts,
                        size_t part_stride, int n, float *to) {
    int width = a.head_dim + 2;
    for (int i = (int)threadIdx.x; i < p.n_heads * a.head_dim; i += ATTENTION_WARPS * WARP) {
        int head = i / a.head_dim, dim = i % a.head_dim;
        const float *own = parts + head * width;
        float value = 0.0f, sum = 0.0f, largest = -INFINITY;
        for (int j = 0; j < n; j++)
            largest = fmaxf(largest, own[j * part_stride + a.head_dim]);
        for (int j = 0; j < n; j++) {
            const float *part = own + j * part_stride;
            if (part[a.head_dim] == -INFINITY) /* it saw nothing */
                continue;
            float factor = exp2_approx((part[a.head_dim] - largest) * a.scale);
            value += part[dim] * factor;
            sum += part[a.head_dim + 1] * factor;
        }
        if (to) {
            to[head * width + dim] = value;
            if (dim == 0) {
                to[head * width + a.head_dim] = largest;
                to[head * width + a.head_dim + 1] = sum;
            }
        } else {
            uint16_t *out = a.out + (size_t)p.s.first_row * a.out_stride;
            out[place(a.places, (p.first_head + head) * a.head_dim) + dim] =
                (uint16_t)pack_bf16(value / sum, 0.0f);
        }
    }
}

/* True in all threads of the block that is the last of `n` to arrive; it then sees what the others
 * wrote before. The counter is 0 again afterwards. */
DEVICE bool arrive(int *counter, int n, int *shared) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        *shared = atomicAdd(counter, 1) == n - 1;
        if (*shared)
            *counter = 0;
    }
    __syncthreads();
    __threadfence();
    return *shared;
}

/* out = softmax(q . k) . v for generated tokens: blocks go through the list of splits, KV heads and
 * groups of 16 heads, so a grid of fixed size serves any batch. Shared: the parts of the warps, and
 * an int. Bound by reading keys and values. */
template <int HEAD>
__global__ void __launch_bounds__(ATTENTION_WARPS *WARP, HEAD > 128 ? 1 : 2)
    generated_attention_kernel(const struct attention a) {
    DYNAMIC_SHARED(float, parts);
    constexpr int A_WARP = SPLIT_TOKENS / BLOCK_TOKENS / ATTENTION_WARPS;
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP, width = a.head_dim + 2;
    int n_chunks = divide(a.n_heads / a.n_kv_heads, 16);
    grid_wait();
    grid_launch_dependents();
    int n = a.step->n_splits * a.n_kv_heads * n_chunks;
    for (int index = (int)blockIdx.x; index < n; index += (int)gridDim.x) {
        const struct split p = find_split(a, index, n_chunks);
        uint32_t q[HEAD / UNIT][2][4];
        load_heads<HEAD>(a, p, lane, q);
        int block = p.index * A_WARP * ATTENTION_WARPS + warp * A_WARP;
        int end = smaller(block + A_WARP, divide(p.n_tokens, BLOCK_TOKENS));
        float output[HEAD / 8][4] = {};
        struct softmax state = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
        attend_blocks<HEAD>(a, p, q, block, end, lane, &state, output);
        softmax_end(&state);
        store_part<HEAD>(a, state, lane, output, parts + warp * 16 * width);
        __syncthreads();
        int n_splits = divide(p.n_tokens, SPLIT_TOKENS);
        size_t item_stride = (size_t)a.n_heads * width;
        float *partial = a.partial + p.item * item_stride + (size_t)p.first_head * width;
        merge_parts(a, p, parts, 16 * width, ATTENTION_WARPS, n_splits > 1 ? partial : NULL);
        if (n_splits > 1) {
            int *counter = a.arrived + (p.n_sequence * a.n_kv_heads + p.kv_head) * n_chunks;
            int *shared = reinterpret_cast<int *>(parts + ATTENTION_WARPS * 16 * (HEAD + 2));
            if (arrive(counter + p.chunk, n_splits, shared)) /* splits are neighbours */
                merge_parts(a, p, partial - p.index * item_stride, item_stride, n_splits, NULL);
        }
        __syncthreads(); /* `parts` is free again */
    }
}

/* ---- the op ---- */

template <int HEAD> static void launch_attention(struct cuda_device *d, const struct attention &a) {
    if (d->n_prompt_items > 0) {
        launch(d, "prompt_attention_kernel", prompt_attention_kernel<HEAD>,
               grid_of(d->n_prompt_items * d->n_kv_heads), ATTENTION_WARPS * WARP,
               prompt_attention_shared(HEAD), a);
    }
    if (d->n_generated > 0) {
        int most = d->card->properties.multiProcessorCount * BLOCKS_A_PROCESSOR;
        int n = d->n_splits * d->n_kv_heads * divide(d->n_heads / d->n_kv_heads, 16);
        launch(d, "generated_attention_kernel", generated_attention_kernel<HEAD>,
               grid_of(d->recording ? most : smaller(n, most)), ATTENTION_WARPS * WARP,
               generated_attention_shared(HEAD), a);
    }
}

static int head_of(int head_dim) { /* the kernels that serve it */
    return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256;
}

static void set_heads(const struct cuda_device *d, int layer, struct heads *h) {
    const struct model_config *config = d->device.config;
    h->step = d->step;
    h->q = d->q;
    h->kv = (uint16_t *)d->device.kv;
    h->block_elements = block_bytes(config, d->device.n_shards, KV_BF16) / sizeof(uint16_t);
    h->plane = (size_t)d->n_kv_heads * BLOCK_TOKENS * (size_t)config->head_dim;
    h->layer = layer;
    h->n_heads = d->n_heads;
    h->n_kv_heads = d->n_kv_heads;
    h->head_dim = config->head_dim;
}

static void cuda_attention(struct device *device, int layer_index) {
    struct cuda_device *d = (struct cuda_device *)device;
    struct attention a = {};
    set_heads(d, layer_index, &a);
    a.out = d->attention;
    a.out_stride = d->attention_stride;
    a.scale = 1.44269504f / sqrtf((float)a.head_dim);
    a.places = d->attention_places;
    a.partial = d->partial;
    a.arrived = d->arrived;
    switch (head_of(a.head_dim)) {
    case 64: launch_attention<64>(d, a); break;
    case 128: launch_attention<128>(d, a); break;
    default: launch_attention<256>(d, a);
    }
}

/* ==== 6. Embedding, norm, rope: one block or warp a row, bound by memory ==== */

enum { ALL_ROWS = -1 };

/* x = token_embd[token], and the angles of the row's position. */
__global__ void embed_kernel(const struct step_header *step, const struct matrix embedding,
                             float *x, int x_stride, int d_model, float2 *turn,
                             const float *frequency, int n_pairs) {
    grid_wait();
    grid_launch_dependents();
    int row = (int)blockIdx.x;
    if (row >= step->n_rows)
        return;
    int token = array_of<int>(step, step->token)[row];
    int position = array_of<int>(step, step->position)[row];
    for (int i = (int)threadIdx.x; i < d_model; i += THREADS)
        x[(size_t)row * x_stride + i] = matrix_element(embedding, token, i);
    for (int i = (int)threadIdx.x; i < n_pairs; i += THREADS) {
        double angle = (double)position * (double)frequency[i];
        double halves = angle * 0.31830988618379067; /* of a turn: cos would need a stack */
        turn[(size_t)row * n_pairs + i] = make_float2((float)cospi(halves), (float)sinpi(halves));
    }
}

static void cuda_embed(struct device *device, const struct weight *token_embd) {
    struct cuda_device *d = (struct cuda_device *)device;
    launch(d, "embed_kernel", embed_kernel, grid_of(d->n_rows), THREADS, 0, d->step,
           token_embd->matrix, d->x, d->x_stride, device->config->d_model, d->turn,
           d->rope_frequency, device->config->rope_dim / 2);
}

/* The sum of all threads' values, in every thread, in a fixed order. shared: (THREADS / 32) */
DEVICE float sum_of_block(float value, float *shared) {
    for (int step = 16; step > 0; step /= 2)
        value += __shfl_xor_sync(0xffffffffu, value, step);
    if (threadIdx.x % WARP == 0)
        shared[threadIdx.x / WARP] = value;
    __syncthreads();
    value = 0.0f;
    for (int i = 0; i < THREADS / WARP; i++)
        value += shared[i];
    return value;
}

/* h = rmsnorm(x) * weight as bf16, of all rows, or of those that sample. */
__global__ void norm_kernel(const struct step_header *step, int first_sample, const float *x,
                            int x_stride, int d_model, const float *weight, float epsilon,
                            uint16_t *h, int h_stride) {
    DYNAMIC_SHARED(float, shared);
    grid_wait();
    grid_launch_dependents();
    bool samples = first_sample != ALL_ROWS;
    int row = (int)blockIdx.x + (samples ? first_sample : 0);
    if (row >= (samples ? step->n_samples : step->n_rows))
        return;
    row = samples ? array_of<int>(step, step->sample_row)[row] : row;
    const float *from = x + (size_t)row * x_stride;
    float squares = 0.0f;
    for (int i = (int)threadIdx.x; i < d_model; i += THREADS)
        squares += from[i] * from[i];
    squares = sum_of_block(squares, shared);
    float scale = 1.0f / sqrtf(squares / (float)d_model + epsilon);
    for (int i = (int)threadIdx.x * 2; i < d_model; i += THREADS * 2) {
        float first = from[i] * scale * weight[i];
        float second = i + 1 < d_model ? from[i + 1] * scale * weight[i + 1] : 0.0f;
        uint16_t *to = h + (size_t)blockIdx.x * h_stride + i;
        *reinterpret_cast<uint32_t *>(to) = pack_bf16(first, second);
    }
}

/* Of all rows: first_sample ALL_ROWS; or of n samples from that one on. */
static void launch_norm(struct cuda_device *d, const struct weight *weight, int first_sample,
                        int n) {
    launch(d, "norm_kernel", norm_kernel, grid_of(n), THREADS, THREADS / WARP * sizeof(float),
           d->step, first_sample, d->x, d->x_stride, d->device.config->d_model, weight->vector,
           d->device.config->norm_epsilon, d->h, d->h_stride);
}

struct rope : heads {
    const float *qkv; /* (n_rows, qkv_stride): heads of q, of k, of v */
    int qkv_stride, rope_dim;
    bool adjacent;
    float epsilon;
    const float *q_norm, *k_norm; /* (head_dim), or NULL */
    const float2 *turn;           /* (n_rows, rope_dim / 2) cosine and sine */
};

struct head {          /* of q, k or v in a row: where its elements come from, and where they go */
    const float *from; /* (head_dim) */
    const float *norm; /* (head_dim); NULL: it has none */
    int n_turned;      /* elements that turn; 0: of v */
    uint16_t *to;      /* element i goes to to[i * apart] */
    int apart;
};

DEVICE struct head find_head(const struct rope &r, int row, int index) {
    const float *from = r.qkv + (size_t)row * r.qkv_stride + index * r.head_dim;
    uint16_t *q = r.q + ((size_t)row * r.n_heads + index) * r.head_dim;
    if (index < r.n_heads)
        return {from, r.q_norm, r.rope_dim, q, 1};
    int kv_head = (index - r.n_heads) % r.n_kv_heads;
    int position = array_of<int>(r.step, r.step->position)[row], token = position % BLOCK_TOKENS;
    int sequence = array_of<int>(r.step, r.step->row_sequence)[row];
    const struct sequence &s = array_of<struct sequence>(r.step, r.step->sequences)[sequence];
    uint16_t *keys = key_plane(r, s, position / BLOCK_TOKENS, kv_head);
    if (index < r.n_heads + r.n_kv_heads)
        return {from, r.k_norm, r.rope_dim, keys + token * r.head_dim, 1};
    return {from, NULL, 0, keys + r.plane + token, BLOCK_TOKENS};
}

/* 1 / root mean square of a head's elements, in all lanes of a warp. */
DEVICE float scale_of_head(const float *from, int head_dim, float epsilon, int lane) {
    float squares = 0.0f;
    for (int i = lane; i < head_dim; i += WARP)
        squares += from[i] * from[i];
    for (int i = 16; i > 0; i /= 2)
        squares += __shfl_xor_sync(0xffffffffu, squares, i);
    return 1.0f / sqrtf(squares / (float)head_dim + epsilon);
}

/* The elements of a head that turn together as pair `pair`, or stay as they are. */
DEVICE int2 find_pair(const struct rope &r, int n_turned, int pair) {
    if (r.adjacent || pair >= n_turned / 2)
        return make_int2(2 * pair, 2 * pair + 1);
    return make_int2(pair, pair + n_turned / 2);
}

/* q, k: norm over head_dim where there is one, then rope; q as bf16, k and v into their block. One
 * warp a row and head of q, k or v. */
__global__ void rope_append_kernel(const struct rope r) {
    grid_wait();
    grid_launch_dependents();
    int row = (int)blockIdx.x, lane = (int)threadIdx.x % WARP;
    int index = (int)blockIdx.y * (THREADS / WARP) + (int)threadIdx.x / WARP;
    if (row >= r.step->n_rows || index >= r.n_heads + 2 * r.n_kv_heads)
        return;
    const struct head head = find_head(r, row, index);
    float scale = head.norm ? scale_of_head(head.from, r.head_dim, r.epsilon, lane) : 1.0f;
    for (int pair = lane; pair < r.head_dim / 2; pair += WARP) {
        const int2 at = find_pair(r, head.n_turned, pair);
        float a = head.from[at.x], b = head.from[at.y];
        if (head.norm) {
            a *= scale * head.norm[at.x];
            b *= scale * head.norm[at.y];
        }
        float2 turn = make_float2(1.0f, 0.0f);
        if (pair < head.n_turned / 2)
            turn = r.turn[(size_t)row * (r.rope_dim / 2) + pair];
        uint32_t both = pack_bf16(a * turn.x - b * turn.y, a * turn.y + b * turn.x);
        head.to[at.x * head.apart] = (uint16_t)both;
        head.to[at.y * head.apart] = (uint16_t)(both >> 16);
    }
}

/* Of a norm or bias that a layer may not have. */
static const float *vector_of(const struct weight *weight) {
    return weight ? weight->vector : NULL;
}

static void cuda_rope_append(struct device *device, const struct weight *const *layer,
                             int layer_index) {
    struct cuda_device *d = (struct cuda_device *)device;
    const struct model_config *config = device->config;
    struct rope r = {};
    set_heads(d, layer_index, &r);
    r.qkv = d->qkv;
    r.qkv_stride = d->qkv_stride;
    r.rope_dim = config->rope_dim;
    r.adjacent = config->rope_adjacent;
    r.epsilon = config->norm_epsilon;
    r.q_norm = vector_of(layer[ATTN_Q_NORM]);
    r.k_norm = vector_of(layer[ATTN_K_NORM]);
    r.turn = d->turn;
    int heads = d->n_heads + 2 * d->n_kv_heads;
    launch(d, "rope_append_kernel", rope_append_kernel,
           grid_of(d->n_rows, divide(heads, THREADS / WARP)), THREADS, 0, r);
}

/* ==== 7. The products of a layer; several shards ==== */

enum { CHAIN_ROWS = 256 /* prompt rows that a shard hands to the next at a time */ };

static void multiply_qkv(struct cuda_device *d, const struct weight *const *layer) {
    const struct weight *const matrices[3] = {layer[ATTN_Q], layer[ATTN_K], layer[ATTN_V]};
    const struct weight *const biases[3] = {layer[Q_BIAS], layer[K_BIAS], layer[V_BIAS]};
    struct product p = product_of(d, d->h, d->h_stride);
    float *out = d->qkv;
    for (int i = 0; i < 3; i++) {
        p.matrix[i] = matrices[i]->matrix;
        p.bias[i] = vector_of(biases[i]);
        p.out[i] = out;
        out += p.matrix[i].n_outputs;
    }
    p.n_matrices = 3;
    p.out_stride = d->qkv_stride;
    launch_product<STORE>(d, p, d->n_generated);
}

static void cuda_norm_qkv(struct device *device, const struct weight *const *layer) {
    struct cuda_device *d = (struct cuda_device *)device;
    launch_norm(d, layer[ATTN_NORM], ALL_ROWS, d->n_rows);
    multiply_qkv(d, layer);
}

static struct product projection(const struct cuda_device *d, const struct weight *matrix,
                                 enum product_input input) {
    bool attends = input == INPUT_ATTENTION;
    struct product p = product_of(d, attends ? d->attention : d->ffn,
                                  attends ? d->attention_stride : d->ffn_stride);
    p.matrix[0] = matrix->matrix;
    p.n_matrices = 1;
    p.out_stride = d->x_stride;
    return p;
}

/* One of several shards: generated rows' sums are left for all_reduce_add, prompt rows' are made
 * there, for each shard goes on where the one before it ended. */
static void cuda_project_add(struct device *device, const struct weight *matrix,
                             enum product_input input) {
    struct cuda_device *d = (struct cuda_device *)device;
    struct product p = projection(d, matrix, input);
    if (device->n_shards == 1) {
        p.out[0] = d->x;
        p.adds = true;
        launch_product<STORE>(d, p, d->n_generated);
        return;
    }
    d->pending = matrix;
    d->pending_input = input;
    d->turn_of_sums ^= 1;
    p.out[0] = d->sums[d->turn_of_sums];
    p.n_rows = 0;
    launch_product<STORE>(d, p, d->n_generated);
}

/* ffn = silu(gate) * up, of sums (n_rows, {gate, up}, d_ff) that two products made. */
__global__ void silu_kernel(const struct step_header *step, const float *gate_up, int d_ff,
                            uint16_t *ffn, int ffn_stride, const struct segments places) {
    grid_wait();
    grid_launch_dependents();
    int row = (int)blockIdx.x;
    if (row >= step->n_rows)
        return;
    const float *gate = gate_up + (size_t)row * 2 * d_ff;
    uint16_t *to = ffn + (size_t)row * ffn_stride;
    for (int i = (int)threadIdx.x; i < d_ff; i += THREADS)
        to[place(places, i)] = (uint16_t)pack_bf16(silu(gate[i]) * gate[d_ff + i], 0.0f);
}

static void multiply_gate_up(struct cuda_device *d, const struct weight *const *layer) {
    struct product p = product_of(d, d->h, d->h_stride);
    p.matrix[0] = layer[FFN_GATE]->matrix;
    p.matrix[1] = layer[FFN_UP]->matrix;
    p.n_matrices = 2;
    if (p.matrix[0].type == p.matrix[1].type) {
        p.ffn = d->ffn;
        p.ffn_stride = d->ffn_stride;
        p.ffn_places = d->ffn_places;
        launch_product<SILU>(d, p, d->n_generated);
        return;
    }
    p.out[0] = d->gate_up;
    p.out[1] = d->gate_up + d->d_ff;
    p.out_stride = 2 * d->d_ff;
    launch_product<STORE>(d, p, d->n_generated);
    launch(d, "silu_kernel", silu_kernel, grid_of(d->n_rows), THREADS, 0, d->step, d->gate_up,
           d->d_ff, d->ffn, d->ffn_stride, d->ffn_places);
}

static void cuda_norm_gate_up(struct device *device, const struct weight *const *layer) {
    struct cuda_device *d = (struct cuda_device *)device;
    launch_norm(d, layer[FFN_NORM], ALL_ROWS, d->n_rows);
    multiply_gate_up(d, layer);
}

/* ---- several shards ---- */

struct partial_sums {
    const float *of_shard[MAX_SHARDS];
};

/* x (n_rows, width) += the shards' sums, added as a binary tree. */
__global__ void reduce_kernel(float *x, const struct partial_sums sums, int n_shards, int n) {
    grid_wait();
    grid_launch_dependents();
    int i = (int)(blockIdx.x * THREADS + threadIdx.x);
    if (i >= n)
        return;
    float value[MAX_SHARDS];
    for (int shard = 0; shard < MAX_SHARDS; shard++)
        value[shard] = shard < n_shards ? sums.of_shard[shard][i] : 0.0f;
    for (int m = MAX_SHARDS; m > 1; m /= 2)
        for (int j = 0; j < m / 2; j++)
            value[j] = value[2 * j] + value[2 * j + 1];
    x[i] += value[0];
}

/* Copies from another shard, when all is done that is on its stream by now. Enters `to`. */
static void fetch_sums(struct cuda_device *to, void *memory, struct cuda_device *from,
                       const void *source, size_t bytes) {
    enter(&from->device, "adding up shards");
    TRY(from, cudaEventRecord(from->ready, from->gpu.stream));
    enter(&to->device, "adding up shards");
    TRY(to, cudaStreamWaitEvent(to->gpu.stream, from->ready, 0));
    TRY(to, cudaMemcpyPeerAsync(memory, to->device.index, source, from->device.index, bytes,
                                to->gpu.stream));
}

/* Every shard fetches the sums of all others, and adds the same tree to its own x. */
static void reduce_generated(struct cuda_device **shards, int n_shards) {
    int end = shards[0]->n_generated, most = shards[0]->device.max_rows / n_shards;
    int piece = most > 0 ? most : 1; /* n_shards of them fit into `gathered` */
    for (int row = 0; row < end; row += piece) {
        int n = smaller(end - row, piece) * shards[0]->x_stride;
        size_t at = (size_t)row * shards[0]->x_stride;
        for (int s = 0; s < n_shards; s++) {
            struct cuda_device *d = shards[s];
            struct partial_sums sums = {};
            for (int from = 0; from < n_shards; from++) {
                const float *own = shards[from]->sums[shards[from]->turn_of_sums] + at;
                float *copy = d->gathered + (size_t)from * n;
                sums.of_shard[from] = from == s ? own : copy;
                if (from != s)
                    fetch_sums(d, copy, shards[from], own, (size_t)n * sizeof(float));
            }
            launch(d, "reduce_kernel", reduce_kernel, grid_of(divide(n, THREADS)), THREADS, 0,
                   d->x + at, sums, n_shards, n);
        }
    }
}

/* A piece of the prompt rows goes from shard to shard, and each goes on with the sums it gets; the
 * last adds them to x and hands that to all. Pieces follow each other: all shards are at work. */
static void chain_prompts(struct cuda_device **shards, int n_shards) {
    int end = shards[0]->n_rows;
    struct cuda_device *last = shards[n_shards - 1];
    for (int row = shards[0]->n_generated; row < end; row += CHAIN_ROWS) {
        int n = smaller(end - row, CHAIN_ROWS);
        size_t at = (size_t)row * last->x_stride;
        size_t bytes = (size_t)n * last->x_stride * sizeof(float);
        for (int s = 0; s < n_shards; s++) {
            struct cuda_device *d = enter(&shards[s]->device, "adding up shards");
            struct product p = projection(d, d->pending, d->pending_input);
            p.first_row = row;
            p.n_rows = n;
            p.out[0] = d == last ? d->x : d->sums[d->turn_of_sums];
            p.adds = d == last;
            if (s > 0) {
                struct cuda_device *before = shards[s - 1];
                fetch_sums(d, d->gathered + at, before, before->sums[before->turn_of_sums] + at,
                           bytes);
                p.initial = d->gathered;
            }
            launch_product<STORE>(d, p, 0);
        }
        for (int s = 0; s < n_shards - 1; s++)
            fetch_sums(shards[s], shards[s]->x + at, last, last->x + at, bytes);
    }
}

static void cuda_all_reduce_add(struct device **shards, int n_shards) {
    struct cuda_device **all = (struct cuda_device **)shards;
    if (all[0]->n_generated > 0)
        reduce_generated(all, n_shards);
    if (all[0]->n_rows > all[0]->n_generated)
        chain_prompts(all, n_shards);
}

/* ==== 8. Logits and samples ==== */

enum sampler_stage { MAXIMUM, SELECT, SELECT_REST, RACE }; /* see lib/sampler.h */

/* One stage of drawing sampled[i] from the logits of sample i, from first_sample on; a block has
 * `part` tokens of a row. rows: (gridDim.y), zero before and after all stages. */
template <int STAGE>
__global__ void __launch_bounds__(SAMPLER_THREADS, 2)
    sample_kernel(const struct step_header *step, int first_sample, const float *logits,
                  int logits_stride, int n_vocab, int part, struct sampler_row *rows,
                  int *sampled) {
    DYNAMIC_SHARED(sampler_key, shared);
    grid_launch_dependents();
    int sample = first_sample + (int)blockIdx.y, first = (int)blockIdx.x * part;
    struct draw d = {};
    if (sample < step->n_samples) { /* no kernel wrote the step */
        d.sampling = array_of<struct sampling>(step, step->sampling)[sample];
        d.position =
            array_of<int>(step, step->position)[array_of<int>(step, step->sample_row)[sample]] + 1;
    }
    grid_wait();
    if (sample >= step->n_samples)
        return;
    d.logits = logits + (size_t)blockIdx.y * logits_stride;
    d.n = n_vocab;
    d.first = first;
    d.end = smaller(first + part, n_vocab);
    d.n_parts = (int)gridDim.x;
    d.row = &rows[blockIdx.y];
    d.shared = shared;
    if (STAGE == MAXIMUM)
        sampler_maximum(d);
    else if (STAGE == RACE)
        sampler_race(d, &sampled[sample]);
    else
        sampler_select(d, STAGE == SELECT_REST);
}

/* Logits of samples [first, first + n) of the step, whose normed rows are in h. They take the
 * kernel of generated rows, whatever rows they are: there are few. */
static void multiply_logits(struct cuda_device *d, const struct weight *output, int first, int n) {
    struct product p = product_of(d, d->h, d->h_stride);
    p.matrix[0] = output->matrix;
    p.n_matrices = 1;
    p.out[0] = d->logits;
    p.out_stride = d->logits_stride;
    p.n_generated = &d->step->n_samples;
    p.n_before = first;
    p.n_rows = 0;
    launch_product<STORE>(d, p, n);
}

/* The tokens of samples [first, first + n), of which the logits are there, by as many blocks as the
 * chip holds at once. */
static void draw_tokens(struct cuda_device *d, int first, int n) {
    int vocab = d->device.config->vocab_size, chip = 2 * d->gpu.properties->multiProcessorCount;
    int part = divide(divide(vocab * n, chip), SAMPLER_GROUP) * SAMPLER_GROUP;
    for (int i = 0; i < SAMPLER_SELECTS + 2; i++)
        launch(d, "sample_kernel",
               i == 0                    ? sample_kernel<MAXIMUM>
               : i < SAMPLER_SELECTS     ? sample_kernel<SELECT>
               : i < SAMPLER_SELECTS + 1 ? sample_kernel<SELECT_REST>
                                         : sample_kernel<RACE>,
               grid_of(divide(vocab, part), n), SAMPLER_THREADS, SAMPLER_SHARED, d->step, first,
               d->logits, d->logits_stride, vocab, part, d->sampler_rows, d->sampled);
}

static void cuda_sample(struct device *device, const struct weight *const *weights, float *logits) {
    struct cuda_device *d = enter(device, "sampling");
    size_t vocab = (size_t)device->config->vocab_size, width = vocab * sizeof(float);
    assert(!logits || !d->recording);
    for (int first = 0; first < d->n_samples; first += LOGIT_ROWS) {
        int n = smaller(d->n_samples - first, LOGIT_ROWS);
        launch_norm(d, weights[OUTPUT_NORM], first, n);
        multiply_logits(d, weights[OUTPUT], first, n);
        if (logits)
            TRY(d, cudaMemcpy2DAsync(logits + (size_t)first * vocab, width, d->logits,
                                     (size_t)d->logits_stride * sizeof(float), width, (size_t)n,
                                     cudaMemcpyDefault, d->gpu.stream));
        draw_tokens(d, first, n);
    }
}

/* ==== 9. A step: begun, recorded, replayed, ended ==== */

/* Gives up recorded graphs: something they point to moves. */
static void forget_graphs(struct cuda_device *d) {
    for (int i = 0; i <= MAX_COLUMNS; i++) {
        if (d->graphs[i].exec)
            TRY(d, cudaGraphExecDestroy(d->graphs[i].exec));
        d->graphs[i].exec = NULL;
    }
}

/* Makes room for a step of so many bytes and so many splits. */
static void reserve_step(struct cuda_device *d, size_t bytes, size_t n_splits) {
    size_t split_bytes =
        sizeof(float) * (size_t)d->n_heads * (size_t)(d->device.config->head_dim + 2);
    if (bytes > d->step_bytes) {
        forget_graphs(d);
        TRY(d, cudaFreeHost(d->step_host));
        TRY(d, cudaFree(d->step));
        d->step_bytes = bytes * 2;
        TRY(d, cudaHostAlloc((void **)&d->step_host, d->step_bytes, cudaHostAllocPortable));
        TRY(d, cudaMalloc((void **)&d->step, d->step_bytes));
    }
    if (n_splits > d->split_capacity) {
        forget_graphs(d);
        TRY(d, cudaFree(d->partial));
        d->split_capacity = n_splits * 2;
        TRY(d, cudaMalloc((void **)&d->partial, d->split_capacity * split_bytes));
    }
}

/* The tiles of queries of prompts, and the splits of generated tokens: into lists, or only counted
 * (NULL). Long texts come first, so that none is left alone at the end. */
static void list_work(struct cuda_device *d, const struct batch *batch, int2 *items, int2 *splits) {
    int group = d->n_heads / d->n_kv_heads, tile = query_tile(head_of(d->device.config->head_dim));
    d->n_prompt_items = d->n_splits = 0;
    for (int i = 0; i < batch->n_sequences; i++) {
        const struct sequence *s = &batch->sequence[i];
        int n = s->generated ? divide(s->start + 1, SPLIT_TOKENS) : divide(s->n_rows * group, tile);
        int *count = s->generated ? &d->n_splits : &d->n_prompt_items;
        int2 *list = s->generated ? splits : items;
        for (int j = 0; j < n && list; j++)
            list[*count + j] = make_int2(i, s->generated ? j : (n - 1 - j) * tile);
        *count += n;
    }
}

/* Fills the step's buffer. Returns its bytes. */
static size_t write_step(struct cuda_device *d, const struct batch *b) {
    list_work(d, b, NULL, NULL);
    size_t rows = (size_t)b->n_rows * sizeof(int), samples = (size_t)b->n_samples;
    struct step_header h = {};
    h.n_rows = b->n_rows;
    h.n_generated = d->n_generated;
    h.n_samples = b->n_samples;
    h.n_splits = d->n_splits;
    const struct {
        int *distance;
        const void *from; /* NULL: list_work writes it */
        size_t bytes;
    } arrays[] = {{&h.token, b->token, rows},
                  {&h.position, b->position, rows},
                  {&h.row_sequence, b->row_sequence, rows},
                  {&h.sample_row, b->sample_row, samples * sizeof *b->sample_row},
                  {&h.sampling, b->sampling, samples * sizeof *b->sampling},
                  {&h.sequences, b->sequence, (size_t)b->n_sequences * sizeof *b->sequence},
                  {&h.prompt_items, NULL, (size_t)d->n_prompt_items * sizeof(int2)},
                  {&h.splits, NULL, (size_t)d->n_splits * sizeof(int2)},
                  {&h.table, b->block_table, (size_t)b->n_blocks * sizeof *b->block_table}};
    size_t end = (sizeof h + 15) / 16 * 16;
    for (const auto &array : arrays) {
        *array.distance = (int)end;
        end += (array.bytes + 15) / 16 * 16;
    }
    reserve_step(d, end, (size_t)d->n_splits);
    char *step = (char *)d->step_host;
    *d->step_host = h;
    for (const auto &array : arrays)
        if (array.from)
            memcpy(step + *array.distance, array.from, array.bytes);
    list_work(d, b, (int2 *)(step + h.prompt_items), (int2 *)(step + h.splits));
    return end;
}

/* A step of generated tokens alone is recorded the first time, for up to 8, 16, … 64 rows. */
static bool cuda_step_begin(struct device *device, const struct batch *batch) {
    struct cuda_device *d = enter(device, "computing a step");
    assert(batch->n_rows <= device->max_rows && batch->n_samples <= device->max_samples);
    d->n_rows = batch->n_rows;
    d->n_samples = d->n_sampled = batch->n_samples;
    d->n_generated = 0;
    for (int i = 0; i < batch->n_sequences; i++) {
        assert(!batch->sequence[i].generated || batch->sequence[i].first_row == d->n_generated);
        d->n_generated += batch->sequence[i].generated;
    }
    cudaStream_t stream = d->streams[STREAM_COMPUTE];
    size_t bytes = write_step(d, batch);
    TRY(d, cudaMemcpyAsync(d->step, d->step_host, bytes, cudaMemcpyHostToDevice, stream));
    d->recording = 0;
    d->gpu.n_launches = 0;
    if (d->n_generated < d->n_rows || d->n_samples < d->n_rows || d->n_rows > 8 * MAX_COLUMNS ||
        device->n_shards > 1)
        return true;
    d->recording = divide(d->n_rows, 8);
    struct graph *graph = &d->graphs[d->recording];
    if (graph->exec) {
        TRY(d, cudaGraphLaunch(graph->exec, stream));
        d->gpu.n_launches = graph->n_launches;
        d->recording = 0;
        return false;
    }
    d->n_rows = d->n_generated = d->n_samples = 8 * d->recording;
    TRY(d, cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    return true;
}

static void cuda_step_end(struct device *device, int *sampled) {
    struct cuda_device *d = enter(device, "ending a step");
    cudaStream_t stream = d->streams[STREAM_COMPUTE];
    if (d->recording) {
        struct graph *graph = &d->graphs[d->recording];
        cudaGraph_t recorded;
        TRY(d, cudaStreamEndCapture(stream, &recorded));
        TRY(d, cudaGraphInstantiate(&graph->exec, recorded, 0));
        TRY(d, cudaGraphDestroy(recorded));
        TRY(d, cudaGraphLaunch(graph->exec, stream));
        graph->n_launches = d->gpu.n_launches;
        d->recording = 0;
    }
    __atomic_fetch_add(&d->cuda->backend.kernel_launches, d->gpu.n_launches, __ATOMIC_RELAXED);
    size_t bytes = (size_t)d->n_sampled * sizeof *sampled;
    if (sampled && bytes > 0)
        TRY(d, cudaMemcpyAsync(d->sampled_host, d->sampled, bytes, cudaMemcpyDeviceToHost, stream));
    TRY(d, cudaStreamSynchronize(stream));
    if (sampled)
        memcpy(sampled, d->sampled_host, bytes);
}

/* ==== 10. What the chip can do at most ==== */

enum { PROBE_MS = 1 /* that a probe takes at least */ };

/* Operations of 8 independent mma a step and warp. `sink` keeps them from being removed. */
__global__ void mma_probe_kernel(int n_steps, float *sink) {
    grid_wait();
    grid_launch_dependents();
    const uint32_t a[4] = {0x3c003c00, 0x3c003c00, 0x3c003c00, 0x3c003c00}, b[2] = {a[0], a[0]};
    float sum[8][4] = {};
    for (int step = 0; step < n_steps; step++)
#pragma unroll
        for (int i = 0; i < 8; i++)
            mma_bf16(sum[i], a, b);
    for (int i = 1; i < 8; i++)
        sum[0][0] += sum[i][0];
    if (sum[0][0] < 0.0f)
        *sink = sum[0][0];
}

/* Reads n times 16 bytes; `sink` keeps the reads from being removed. */
__global__ void read_probe_kernel(const uint4 *memory, size_t n, uint32_t *sink) {
    grid_wait();
    grid_launch_dependents();
    size_t stride = (size_t)gridDim.x * THREADS, i = (size_t)blockIdx.x * THREADS + threadIdx.x;
    uint32_t sum = 0;
#pragma unroll 4
    for (size_t at = i; at < n; at += stride) {
        uint4 value = load16_once(memory + at);
        sum += value.x ^ value.y ^ value.z ^ value.w;
    }
    if (sum == 0x5eed5eed)
        *sink = sum;
}

/* Milliseconds of the compute stream from one call to the next with the same events. */
static float lap(struct cuda_device *d, cudaEvent_t events[2]) {
    float ms = 0.0f;
    TRY(d, cudaEventRecord(events[1], d->streams[STREAM_COMPUTE]));
    TRY(d, cudaEventSynchronize(events[1]));
    TRY(d, cudaEventElapsedTime(&ms, events[0], events[1]));
    TRY(d, cudaEventRecord(events[0], d->streams[STREAM_COMPUTE]));
    return ms;
}

/* Reads the largest weight, which no cache holds, if it is one of a real model; multiplies on all
 * tensor cores. Both grow until they take a millisecond. Of n shards each has a GPU's limits. */
static void cuda_limits(struct device **shards, int n, enum tensor_type type, double *read,
                        double *ops) {
    struct cuda_device *d = enter(shards[0], "probing the limits");
    const struct weight *largest = NULL;
    (void)type; /* all types multiply as bf16 */
    for (const struct weight *w = d->cuda->weights; w; w = w->next)
        if (w->gpu == shards[0]->index && !w->vector &&
            (!largest || w->tensor->bytes > largest->tensor->bytes))
            largest = w;
    cudaEvent_t events[2];
    for (int i = 0; i < 2; i++)
        TRY(d, cudaEventCreateWithFlags(&events[i], cudaEventDefault));
    TRY(d, cudaEventRecord(events[0], d->streams[STREAM_COMPUTE]));
    int blocks = d->card->properties.multiProcessorCount * 2, steps = 16, repeats = 1;
    float ms = 0.0f;
    for (; ms < PROBE_MS && steps < 1 << 20; steps *= 4) {
        launch(d, "mma_probe_kernel", mma_probe_kernel, grid_of(blocks), THREADS, 0, steps, d->x);
        ms = lap(d, events);
        *ops = 8.0 * steps * blocks * (THREADS / WARP) * 2 * 16 * 8 * 16 / (ms * 1e-3) * n;
    }
    const struct matrix *m = largest ? &largest->matrix : NULL;
    size_t bytes = m ? (size_t)m->n_tiles * m->n_units * packed_bytes(m->type) : 0;
    for (ms = 0.0f; ms < PROBE_MS && bytes > 0 && repeats < 1 << 12; repeats *= 4) {
        for (int i = 0; i < repeats; i++)
            launch(d, "read_probe_kernel", read_probe_kernel, grid_of(blocks), THREADS, 0,
                   (const uint4 *)m->packed, bytes / sizeof(uint4), (uint32_t *)d->x);
        ms = lap(d, events);
        *read = (double)bytes * repeats / (ms * 1e-3) * n;
    }
    for (int i = 0; i < 2; i++)
        TRY(d, cudaEventDestroy(events[i]));
}

/* ==== 11. Opening and closing ==== */

static bool check_wanted(int n_gpus, const struct device *wanted, char *error) {
    const struct model_config *config = wanted->config;
    if (wanted->index < 0 || wanted->index >= n_gpus)
        return fail(error, "--devices: got device %d, there are %d GPUs (0 to %d)", wanted->index,
                    n_gpus, n_gpus - 1);
    if (!device_fits(wanted, error))
        return false;
    if (config->head_dim % 8 || config->head_dim > 256)
        return fail(error,
                    "heads of %d: the CUDA kernels cover multiples of 8 up to 256; use "
                    "--devices cpu:2",
                    config->head_dim);
    return wanted->kv_type == KV_BF16 ||
           fail(error, "--kv-type: the CUDA backend keeps keys and values in bf16");
}

static int stride_of(int n) { /* rows begin at 16 bytes */
    return divide(n, 8) * 8;
}

static bool allocate_activations(struct cuda_device *d) {
    const struct model_config *c = d->device.config;
    int n = d->device.n_shards, rank = d->device.rank, n_segments = K_SEGMENTS / n;
    int q_cols = c->n_heads * c->head_dim, first = rank * n_segments;
    size_t rows = (size_t)d->device.max_rows, samples = (size_t)d->device.max_samples;
    size_t padded = (rows > samples ? rows : samples) + 8 * MAX_COLUMNS; /* whole groups are read */
    d->padded_rows = padded;
    d->n_heads = c->n_heads / n;
    d->n_kv_heads = c->n_kv_heads / n;
    d->d_ff = c->d_ff / n;
    d->attention_places = make_segments(q_cols, grain_of(c, q_cols), first, n_segments);
    d->ffn_places = make_segments(c->d_ff, grain_of(c, c->d_ff), first, n_segments);
    d->x_stride = stride_of(c->d_model);
    d->h_stride = divide(c->d_model, UNIT) * UNIT;
    d->qkv_stride = (d->n_heads + 2 * d->n_kv_heads) * c->head_dim;
    d->attention_stride = d->attention_places.unit[n_segments] * UNIT;
    d->ffn_stride = d->ffn_places.unit[n_segments] * UNIT;
    d->logits_stride = stride_of(c->vocab_size);
    bool ok = true, many = n > 1;
    gpu_take(&d->gpu, &d->x, rows * (size_t)d->x_stride, &ok);
    gpu_take(&d->gpu, &d->h, padded * (size_t)d->h_stride, &ok);
    gpu_take(&d->gpu, &d->qkv, rows * (size_t)d->qkv_stride, &ok);
    gpu_take(&d->gpu, &d->q, rows * (size_t)(d->n_heads * c->head_dim), &ok);
    gpu_take(&d->gpu, &d->attention, padded * (size_t)d->attention_stride, &ok);
    gpu_take(&d->gpu, &d->ffn, padded * (size_t)d->ffn_stride, &ok);
    gpu_take(&d->gpu, &d->turn, rows * (size_t)(c->rope_dim / 2), &ok);
    gpu_take(&d->gpu, &d->rope_frequency, (size_t)c->rope_dim / 2, &ok);
    gpu_take(&d->gpu, &d->arrived, rows * (size_t)d->n_heads, &ok);
    size_t logit_rows = rank > 0 ? 0 : samples < LOGIT_ROWS ? samples : (size_t)LOGIT_ROWS;
    gpu_take(&d->gpu, &d->logits, logit_rows * (size_t)d->logits_stride, &ok);
    gpu_take(&d->gpu, &d->sampler_rows, logit_rows, &ok);
    gpu_take(&d->gpu, &d->sampled, samples, &ok);
    gpu_take(&d->gpu, &d->sums[0], many ? rows * (size_t)d->x_stride : 0, &ok);
    gpu_take(&d->gpu, &d->sums[1], many ? rows * (size_t)d->x_stride : 0, &ok);
    gpu_take(&d->gpu, &d->gathered, many ? (rows + MAX_SHARDS) * (size_t)d->x_stride : 0, &ok);
    ok = ok && cudaHostAlloc((void **)&d->sampled_host, samples * sizeof(int),
                             cudaHostAllocPortable) == cudaSuccess;
    if (ok)
        TRY(d, cudaMemcpyAsync(d->rope_frequency, d->device.rope_frequency,
                               (size_t)c->rope_dim / 2 * sizeof(float), cudaMemcpyHostToDevice,
                               d->streams[STREAM_COMPUTE]));
    TRY(d, cudaStreamSynchronize(d->streams[STREAM_COMPUTE]));
    return ok;
}

/* What devices on one GPU share. The chip must be new enough, and the kernels built for it. */
static bool open_card(struct cuda_device *d, char *error) {
    struct card *card = d->card;
    int index = d->device.index;
    if (card->open)
        return true;
    TRY(d, cudaGetDeviceProperties(&card->properties, index));
    const cudaDeviceProp *p = &card->properties;
    if (p->major < MIN_MAJOR) {
        return fail(error, "device %d (%s) has compute capability %d.%d, expected %d.0 or newer",
                    index, p->name, p->major, p->minor, MIN_MAJOR);
    }
    if (cudaFuncSetAttribute(sample_kernel<RACE>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             SAMPLER_SHARED) != cudaSuccess) {
        (void)cudaGetLastError();
        return fail(error,
                    "device %d (%s): the kernels were built for other chips; make ARCH=sm_%d%d",
                    index, p->name, p->major, p->minor);
    }
    gpu_staging_open(&d->gpu, &card->staging);
    for (int peer = 0; peer < d->cuda->backend.n_gpus; peer++) {
        int reachable = 0;
        if (peer != index && cudaDeviceCanAccessPeer(&reachable, index, peer) == cudaSuccess &&
            reachable)
            (void)cudaDeviceEnablePeerAccess(peer, 0);
    }
    (void)cudaGetLastError(); /* without peer access copies go through the host */
    card->open = true;
    return true;
}

static void open_streams(struct cuda_device *d) {
    int least = 0, most = 0;
    TRY(d, cudaDeviceGetStreamPriorityRange(&least, &most));
    for (int stream = 0; stream < N_STREAMS; stream++) {
        bool late = stream == STREAM_COMPUTE && !d->device.urgent;
        TRY(d, cudaStreamCreateWithPriority(&d->streams[stream], cudaStreamNonBlocking,
                                            late ? least : most));
        gpu_tickets_open(&d->gpu, &d->copies[stream]);
    }
    d->gpu.stream = d->streams[STREAM_COMPUTE];
    TRY(d, cudaEventCreateWithFlags(&d->ready, cudaEventDisableTiming));
}

static void cuda_device_close(struct device *device) {
    struct cuda_device *d = enter(device, "closing");
    TRY(d, cudaDeviceSynchronize());
    forget_graphs(d);
    for (int stream = 0; stream < N_STREAMS; stream++) {
        gpu_tickets_close(&d->gpu, &d->copies[stream]);
        TRY(d, cudaStreamDestroy(d->streams[stream]));
    }
    TRY(d, cudaEventDestroy(d->ready));
    gpu_free(&d->gpu);
    TRY(d, cudaFree(d->step));
    TRY(d, cudaFree(d->partial));
    TRY(d, cudaFreeHost(d->step_host));
    TRY(d, cudaFreeHost(d->sampled_host));
    free(d);
}

static struct device *cuda_device_open(struct backend *backend, const struct device *wanted,
                                       char *error) {
    struct cuda_backend *cuda = (struct cuda_backend *)backend;
    if (!check_wanted(backend->n_gpus, wanted, error))
        return NULL;
    struct cuda_device *d = (struct cuda_device *)calloc(1, sizeof *d);
    if (!d) {
        (void)fail(error, "out of memory");
        return NULL;
    }
    d->device = *wanted;
    d->device.backend = backend;
    d->cuda = cuda;
    d->card = &cuda->cards[wanted->index];
    d->gpu.program = "dynamo";
    d->gpu.index = wanted->index;
    d->gpu.properties = &d->card->properties;
    d->gpu.lost = cuda->options.lost;
    d->gpu.context = cuda->options.context;
    enter(&d->device, "opening");
    if (!open_card(d, error)) {
        free(d);
        return NULL;
    }
    open_streams(d);
    if (!allocate_activations(d)) {
        cuda_device_close(&d->device);
        (void)fail(
            error,
            "device %d: no memory for the activations of %d rows; lower --chunk or --max-batch",
            wanted->index, wanted->max_rows);
        return NULL;
    }
    return &d->device;
}

static void cuda_close(struct backend *backend) {
    struct cuda_backend *cuda = (struct cuda_backend *)backend;
    while (cuda->weights) {
        struct weight *weight = cuda->weights;
        cuda->weights = weight->next;
        cudaSetDevice(weight->gpu);
        free_weight(weight);
    }
    for (int i = 0; i < backend->n_gpus; i++) {
        if (!cuda->cards[i].open)
            continue;
        cudaSetDevice(i);
        gpu_staging_close(&cuda->cards[i].staging);
    }
    free(cuda);
}

static void set_operations(struct backend *backend) {
    backend->name = "cuda";
    backend->close = cuda_close;
    backend->device_open = cuda_device_open;
    backend->device_close = cuda_device_close;
    backend->alloc = cuda_alloc;
    backend->release = cuda_release;
    backend->free_memory = cuda_free_memory;
    backend->upload = cuda_upload;
    backend->limits = cuda_limits;
    backend->copy = cuda_copy;
    backend->copy_done = cuda_copy_done;
    backend->step_begin = cuda_step_begin;
    backend->embed = cuda_embed;
    backend->norm_qkv = cuda_norm_qkv;
    backend->rope_append = cuda_rope_append;
    backend->attention = cuda_attention;
    backend->project_add = cuda_project_add;
    backend->norm_gate_up = cuda_norm_gate_up;
    backend->all_reduce_add = cuda_all_reduce_add;
    backend->sample = cuda_sample;
    backend->step_end = cuda_step_end;
    backend->kv_type = KV_BF16;
    backend->chunk = CHUNK_ROWS;
}

/* Why there is no GPU, in one line. */
static void explain_absence(cudaError_t status, char *error) {
    int driver = 0, built = 0;
    (void)cudaDriverGetVersion(&driver);
    (void)cudaRuntimeGetVersion(&built);
    if (status == cudaErrorInsufficientDriver && driver > 0)
        (void)fail(error,
                   "no GPU: the driver knows CUDA %d.%d, this build needs %d.%d; update the driver",
                   driver / 1000, driver % 1000 / 10, built / 1000, built % 1000 / 10);
    else if (status == cudaErrorInsufficientDriver)
        (void)fail(error, "no GPU: no driver is installed");
    else
        (void)fail(error, "no GPU: %s",
                   status == cudaSuccess ? "the machine has none" : cudaGetErrorString(status));
}

extern "C" struct backend *cuda_backend_open(const struct backend_options *options, char *error) {
    int n_gpus = 0;
    cudaError_t status = cudaGetDeviceCount(&n_gpus);
    if (status != cudaSuccess || n_gpus == 0) {
        explain_absence(status, error);
        (void)cudaGetLastError();
        return NULL;
    }
    struct cuda_backend *cuda = (struct cuda_backend *)calloc(1, sizeof *cuda);
    if (!cuda) {
        (void)fail(error, "out of memory");
        return NULL;
    }
    emu_seed(options->copy_delay_seed);
    set_operations(&cuda->backend);
    cuda->options = *options;
    cuda->backend.n_gpus = smaller(n_gpus, MAX_GPUS);
    pthread_mutex_init(&cuda->upload_mutex, NULL);
    return &cuda->backend;
}
