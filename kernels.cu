/* kernels.cu: the CUDA backend, every op of the forward pass on GPUs.
 *
 * Owns: memory, copies, weights, activations and recorded graphs of each device. Knows nothing of
 * requests. kernels.c is its specification: where the two differ, kernels.c is right.
 *
 *     1  a step, as kernels see it
 *     2  weights and rows, as the tensor cores read them: pack_kernel, widen_kernel
 *     3  devices: what they hold, memory, copies, uploads
 *     4  products: generated_product_kernel, prompt_product_kernel, expert_product_kernel
 *     5  attention: prompt_attention_kernel, generated_attention_kernel
 *     6  embedding, norm, rope: embed_kernel, norm_kernel, rope_append_kernel
 *     7  the products of a layer; several shards: add_normed_kernel, reduce_kernel; experts:
 *        route_kernel, choose_kernel, group_kernel, spread_kernel, combine_kernel
 *     8  logits and samples: sample_kernel
 *     9  a step: begun, recorded, replayed, ended
 *    10  what the chip can do at most: mma_probe_kernel, read_probe_kernel
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
 *     blocks or on the number of shards. So the compiler fuses no product with a sum: it might in a
 *     kernel for 16 rows and not in that for 8. What shall be fused is written as fmaf.
 *   - The residual stream x is f32; q and the inputs of products (h, attention, ffn) are bf16. The
 *     gaps of these inputs (chapter 2) are 0 from the beginning, and nobody writes there.
 *   - Work on a stream is ordered; between streams nothing is assumed: the scheduler uses a block
 *     only when the copy into it, or the step that wrote it, has been reported.
 *   - A device's fault is told with file, line, device, call, and what was being done. Then it ends
 *     the program, or what the engine had there.
 *
 * Beside it: lib/gpu.h (launches, tickets, the instructions of the tensor cores), lib/sampler.h. */
extern "C" {
#include "dynamo.h"
}
#define GPU_IMPLEMENTATION
#include "lib/gpu.h"
#include "lib/repack.h"
#define SAMPLER_GPU_IMPLEMENTATION
#include "lib/sampler.h"

#include <assert.h>
#include <float.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <type_traits>

enum {
    WARP = 32,
    THREADS = 256, /* of a block, unless said otherwise */
    GRAPHS = 8,    /* of decode steps: of up to 8, 16, ... 64 rows */
    MAX_GPUS = 64,
    CHUNK_ROWS = 2048,        /* prompt tokens of a step that fill the chip */
    STAGING_BYTES = 32 << 20, /* of weights on their way up; two of them */
    MIN_MAJOR = 8             /* compute capability: mma of bf16, cp.async */
};

static inline __host__ __device__ int divide(int value, int unit) {
    return (value + unit - 1) / unit;
}

static inline __host__ __device__ int smaller(int a, int b) {
    return a < b ? a : b;
}

static inline __host__ __device__ int larger(int a, int b) {
    return a > b ? a : b;
}

/* ==== 1. A step, as kernels see it ====
 *
 * The host writes a step into one buffer behind this header and copies it up at once; arrays are
 * found by their distance from the header, so a recorded graph, whose arguments never change,
 * serves any batch. */

struct step_header {
    int n_rows, n_generated, n_samples, n_splits; /* rows [0, n_generated) are generated tokens */
    int again; /* some are of one text, computed again: earlier ones' pages are not yet filled */
    /* bytes from the header: (n_rows) ints … */
    int token, position, row_sequence;
    int sample_row, sampling; /* (n_samples) int, struct sampling */
    int sequences, table;     /* (n_sequences) struct sequence; (n_blocks) slots */
    int prompt_items, splits; /* int2 {sequence, first query}; (n_splits) {sequence, split} */
};

template <typename T> DEVICE const T *array_of(const struct step_header *step, int distance) {
    return reinterpret_cast<const T *>(reinterpret_cast<const char *>(step) + distance);
}

/* ==== 2. Weights and rows, as the tensor cores read them ====
 *
 * A matrix is cut into *panels* of 128 outputs and *units* of 64 k, and a unit of a panel is one
 * piece of memory, which one bulk copy brings to a multiprocessor. In it stand *tiles* of 16
 * outputs, and in these *fragments* of 16 k: each lane of a warp has its part of a fragment, the
 * operand a of mma_bf16 (see lib/gpu.h: outputs group and group + 8, k 2 quad, + 1, + 8, + 9) side
 * by side. So the same bytes serve every product on every chip, without a conflict or a shuffle.
 *     PACKED_BF16   [8 tiles][4 fragments][32 lanes][8 numbers]: 16 KB          all types but
 *     PACKED_Q8     [8 tiles][2][32 lanes][2 fragments of 8 bytes], scales      Q8_0
 *     PACKED_Q4     [8 tiles][32 lanes][4 fragments of 8 half bytes], scales    Q4_0
 *     PACKED_MXFP4  the same                                                    MXFP4
 * Numbers are unsigned (+ 128, + 8), those of MXFP4 a sign, two bits of exponent and one of
 * mantissa. Scales, of 32 k, are f16, those of MXFP4 bf16, and end the unit: [8 tiles][2][8][2]
 * those of outputs group and group + 8 side by side.
 *
 * What is multiplied together is one matrix. Of gate and up, outputs 0 to 7 of a tile are gate's,
 * the others up's of the same numbers: so a lane has both sums that an activation needs. Of q, k
 * and v, one follows the other. Those of several types become bf16.
 *
 * K is worked off in K_SEGMENTS *segments*, whose sums are added as a tree. Where shards cut K,
 * a segment ends where any number of shards would cut, between heads or at an even k; it then
 * begins with a unit of its own, whose k outside the segment are 0: so a segment's sum has the
 * same bits on every number of shards. The input of such a product has the same gaps; `place`
 * says where an element goes. Models whose segments end at multiples of 64 have no gaps. */

enum {
    PANEL = 128,
    UNIT = 64,
    TILE = 16,
    SCALE_BYTES = 512 /* of a unit of a panel */
};

enum packed_type { PACKED_BF16, PACKED_Q8, PACKED_Q4, PACKED_MXFP4 };

struct segments {             /* of a shard's K */
    int n;                    /* K_SEGMENTS / n_shards */
    int unit[K_SEGMENTS + 1]; /* units before each segment */
    int k[K_SEGMENTS + 1];    /* k of the whole matrix at which each begins */
};

struct matrix {            /* a packed matrix, or a shard's part of one, as kernels take it */
    const uint8_t *packed; /* [n_panels][n_units] */
    int type;              /* enum packed_type */
    bool paired;           /* gate and up; n_outputs: of each */
    int n_outputs, n_panels, n_units; /* of experts: of each, one after another */
    int first_expert;                 /* of those that the shard has */
    struct segments segments;
};

static inline __host__ __device__ enum packed_type packed_type_of(enum tensor_type type) {
    switch (type) {
    case TYPE_Q8_0: return PACKED_Q8;
    case TYPE_Q4_0: return PACKED_Q4;
    case TYPE_MXFP4: return PACKED_MXFP4;
    default: return PACKED_BF16;
    }
}

static constexpr __host__ __device__ int numbers_bytes(int type) { /* of a unit of a panel */
    return PANEL * UNIT * (type == PACKED_BF16 ? 4 : type == PACKED_Q8 ? 2 : 1) / 2;
}

static constexpr __host__ __device__ int unit_bytes(int type) {
    return numbers_bytes(type) + (type == PACKED_BF16 ? 0 : SCALE_BYTES);
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

DEVICE uint16_t *plane_element(const struct planes &p, uint32_t row, uint32_t k) {
    const uint32_t chunk = (k / UNIT * (uint32_t)p.n_rows + row) * 8 + (k / 8 % 8 ^ row % 8);
    return reinterpret_cast<uint16_t *>(p.bytes + (size_t)chunk * 16) + k % 8;
}

/* ---- a warp's operands: a tile of a unit, 4 fragments ---- */

DEVICE float bf16_to_float(uint32_t bits) {
    return __uint_as_float(bits << 16);
}

/* Two numbers, in the low bits of the halves, as bf16: 128 + the last 7 bits is 0x4300 + those. */
template <int TYPE> DEVICE uint32_t whole_to_bf16(uint32_t word) {
    const bool wide = TYPE == PACKED_Q8; /* then - 256, with bit 7 - 128; else - 136 */
    return fma_bf16(and_or(word, wide ? 0x007f007fu : 0x000f000fu, 0x43004300u), 0x3f803f80u,
                    wide ? and_xor(word, 0x00800080u, 0xc380c380u) : 0xc308c308u);
}

/* Two numbers of MXFP4, in bits [at, at + 4) of the halves, as bf16: exponent and mantissa are
 * there as they are, 126 too low. */
DEVICE uint32_t mxfp4_to_bf16(uint32_t word, int at) {
    const uint32_t size = at < 6 ? word << (6 - at) : word >> (at - 6);
    return fma_bf16(and_or(word << (12 - at), 0x80008000u, size & 0x01c001c0u), 0x7e807e80u,
                    0x80008000u);
}

DEVICE float scale_to_float(int type, uint32_t bits) {
    return type == PACKED_MXFP4 ? bf16_to_float(bits & 0xffffu) : half_to_float((uint16_t)bits);
}

/* The operand of fragment i (0 to 3) of a tile; of quantized types numbers without their scales,
 * and *scale is those of outputs group and group + 8. */
template <int TYPE>
DEVICE void load_operand(const uint8_t *unit, int tile, int i, int lane, uint32_t a[4],
                         uint32_t *scale) {
    const uint8_t *from = unit + tile * (numbers_bytes(TYPE) / 8) + lane * 16;
    if constexpr (TYPE == PACKED_BF16) {
        const uint4 words = load16(from + i * 512);
        a[0] = words.x, a[1] = words.y, a[2] = words.z, a[3] = words.w;
    } else {
        const uint2 words = load8(from + (TYPE == PACKED_Q8 ? i / 2 * 512 + i % 2 * 8 : i / 2 * 8));
#pragma unroll
        for (int j = 0; j < 4; j++) {
            uint32_t word = j % 2 ? words.y : words.x;
            const int at = TYPE == PACKED_Q8 ? j / 2 * 8 : (i % 2 * 2 + j / 2) * 4;
            if constexpr (TYPE == PACKED_MXFP4)
                a[j] = mxfp4_to_bf16(word, at);
            else
                a[j] = whole_to_bf16<TYPE>(word >> at);
        }
        *scale = *reinterpret_cast<const uint32_t *>(unit + numbers_bytes(TYPE) +
                                                     (tile * 2 + i / 2) * 32 + lane / 4 * 4);
    }
}

/* The same with the scales multiplied in, rounded to bf16. */
template <int TYPE>
DEVICE void load_scaled(const uint8_t *unit, int tile, int i, int lane, uint32_t a[4]) {
    uint32_t scale;
    load_operand<TYPE>(unit, tile, i, lane, a, &scale);
    if constexpr (TYPE == PACKED_MXFP4) /* powers of two: nothing is rounded */
#pragma unroll
        for (int j = 0; j < 4; j++)
            a[j] = fma_bf16(
                a[j], j % 2 ? scale >> 16 | (scale & 0xffff0000u) : (scale & 0xffffu) | scale << 16,
                0x80008000u);
    else if constexpr (TYPE != PACKED_BF16)
#pragma unroll
        for (int j = 0; j < 4; j++) { /* number * (high + low): the scale as two bf16 */
            float whole = half_to_float((uint16_t)(scale >> j % 2 * 16));
            uint32_t high = pack_bf16(whole, whole);
            float rest = whole - bf16_to_float(high & 0xffffu);
            a[j] = fma_bf16(a[j], high, fma_bf16(a[j], pack_bf16(rest, rest), 0x80008000u));
        }
}

/* A number as it is packed, without its scale. */
DEVICE float number_to_float(int type, uint32_t number) {
    if (type == PACKED_MXFP4)
        return bf16_to_float((number & 8) << 12 | (number & 7) << 6) * 0x1p126f;
    return (float)number - (type == PACKED_Q8 ? 128.0f : 8.0f);
}

/* One element as f32: for embeddings. */
DEVICE float matrix_element(const struct matrix &m, int output, int k) {
    const uint8_t *unit =
        m.packed + ((size_t)(output / PANEL) * m.n_units + k / UNIT) * unit_bytes(m.type);
    int tile = output % PANEL / TILE, upper = output % TILE / 8, fragment = k % UNIT / 16;
    int lane = output % 8 * 4 + k % 8 / 2, far = k % 16 / 8, odd = k % 2;
    if (m.type == PACKED_BF16)
        return bf16_to_float(reinterpret_cast<const uint16_t *>(
            unit)[((tile * 4 + fragment) * 32 + lane) * 8 + (upper + far * 2) * 2 + odd]);
    const uint16_t *scales = reinterpret_cast<const uint16_t *>(unit + numbers_bytes(m.type));
    float scale =
        scale_to_float(m.type, scales[(tile * 2 + fragment / 2) * 16 + output % 8 * 2 + upper]);
    if (m.type == PACKED_Q8) {
        uint8_t byte = unit[((tile * 2 + fragment / 2) * 32 + lane) * 16 +
                            (fragment % 2 * 2 + upper) * 4 + odd * 2 + far];
        return number_to_float(m.type, byte) * scale;
    }
    uint32_t word =
        reinterpret_cast<const uint32_t *>(unit)[(tile * 32 + lane) * 4 + fragment / 2 * 2 + upper];
    return number_to_float(m.type, word >> ((fragment % 2 * 2 + far) * 4 + odd * 16) & 15) * scale;
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

/* Of Q8_0, Q4_0 and MXFP4 (32 k in 34, 18 and 17 bytes): a number as it is packed, and its scale;
 * that of MXFP4 is an exponent, of which 0 stands for a number that is not normal. */
DEVICE uint32_t raw_number(const struct raw_rows &raw, int row, int k, uint16_t *scale) {
    const bool wide = raw.type == TYPE_Q8_0, mxfp4 = raw.type == TYPE_MXFP4;
    const uint8_t *block = raw_at(raw, row, (size_t)(k / 32) * (wide ? 34 : mxfp4 ? 17 : 18));
    const uint8_t *numbers = block + (mxfp4 ? 1 : 2);
    int at = k % 32; /* of 4 bits: 16 k in the low halves of the bytes, then 16 in the high */
    *scale = !mxfp4 ? read16(block) : block[0] > 0 ? (uint16_t)(block[0] << 7) : (uint16_t)64;
    return wide ? numbers[at] ^ 128u : numbers[at % 16] >> (at / 16 * 4) & 15u;
}

DEVICE float raw_element(const struct raw_rows &raw, int row, int k) {
    switch (raw.type) {
    case TYPE_F32: {
        const uint8_t *b = raw_at(raw, row, (size_t)k * 4);
        return __uint_as_float((uint32_t)read16(b) | (uint32_t)read16(b + 2) << 16);
    }
    case TYPE_Q4_K: return raw_k_quant(TYPE_Q4_K, raw_at(raw, row, k / 256 * 144ull), k % 256);
    case TYPE_Q6_K: return raw_k_quant(TYPE_Q6_K, raw_at(raw, row, k / 256 * 210ull), k % 256);
    case TYPE_Q8_0:
    case TYPE_Q4_0:
    case TYPE_MXFP4: {
        const int type = packed_type_of((enum tensor_type)raw.type);
        uint16_t scale;
        uint32_t number = raw_number(raw, row, k, &scale);
        return number_to_float(type, number) * scale_to_float(type, scale);
    }
    }
    uint16_t bits = read16(raw_at(raw, row, (size_t)k * 2));
    return raw.type == TYPE_F16 ? half_to_float(bits) : bf16_to_float(bits);
}

/* A lane's words of one of its two outputs in a tile: those of k outside [begin, end) and of rows
 * that are not there are 0. words: of the unit's tile. */
DEVICE void pack_output(const struct matrix &m, const struct raw_rows &raw, int row, int upper,
                        int unit_k, int begin, int end, uint32_t *words) {
    int lane = (int)threadIdx.x % WARP;
    for (int fragment = 0; fragment < 4; fragment++) {
        uint32_t number[4]; /* k, k + 1, k + 8, k + 9 */
        for (int i = 0; i < 4; i++) {
            int k = unit_k + fragment * 16 + lane % 4 * 2 + i % 2 + i / 2 * 8;
            uint16_t scale;
            if (row >= raw.n_rows || k < begin || k >= end)
                number[i] = m.type == PACKED_Q8 ? 128 : m.type == PACKED_Q4 ? 8 : 0;
            else if (m.type == PACKED_BF16)
                number[i] = pack_bf16(raw_element(raw, row, k), 0.0f);
            else
                number[i] = raw_number(raw, row, k, &scale);
        }
        const uint32_t low = number[0] | number[1] << 16, high = number[2] | number[3] << 16;
        if (m.type == PACKED_BF16) {
            uint32_t *to = words + (fragment * 32 + lane) * 4 + upper;
            to[0] = low;
            to[2] = high;
        } else if (m.type == PACKED_Q8) {
            words[(fragment / 2 * 32 + lane) * 4 + fragment % 2 * 2 + upper] = low | high << 8;
        } else {
            uint32_t *to = words + lane * 4 + fragment / 2 * 2 + upper, word = low | high << 4;
            *to = fragment % 2 ? *to | word << 8 : word;
        }
    }
}

/* Packs the rows at hand into every step-th half of m's tiles, from half `first` on. One warp a
 * half tile, of 8 outputs, and unit; bound by memory. The twin of pack_panel. */
__global__ void pack_kernel(const struct matrix m, int first, int step, const struct raw_rows raw) {
    grid_wait();
    int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP;
    size_t index = (size_t)blockIdx.x * (blockDim.x / WARP) + warp;
    int unit = (int)(index % m.n_units), row = (int)(index / m.n_units) * 8, segment = 0;
    if (row >= raw.n_rows)
        return;
    while (unit >= m.segments.unit[segment + 1])
        segment++;
    int begin = m.segments.k[segment], end = m.segments.k[segment + 1];
    int k = (begin / UNIT + unit - m.segments.unit[segment]) * UNIT, half = first + row / 8 * step;
    uint8_t *to = const_cast<uint8_t *>(m.packed) +
                  ((size_t)(half / 16) * m.n_units + unit) * unit_bytes(m.type);
    pack_output(m, raw, row + lane / 4, half % 2, k, begin, end,
                (uint32_t *)(to + half / 2 % 8 * (numbers_bytes(m.type) / 8)));
    row += lane % 8;
    int at = k + lane / 8 * 32; /* scales of 8 outputs, 2 times 32 k */
    if (m.type != PACKED_BF16 && lane < 16 && row < raw.n_rows && at >= begin / 32 * 32 && at < end)
        (void)raw_number(raw, row, at,
                         (uint16_t *)(to + numbers_bytes(m.type)) +
                             (half / 2 % 8 * 2 + lane / 8) * 16 + lane % 8 * 2 + half % 2);
}

/* The rows at hand as f32: a block a row. */
__global__ void widen_kernel(float *to, int cols, const struct raw_rows raw) {
    grid_wait();
    for (int k = (int)threadIdx.x; k < cols; k += THREADS)
        to[(size_t)blockIdx.x * cols + k] = raw_element(raw, (int)blockIdx.x, k);
}

/* ==== 3. Devices: what they hold, memory, copies, uploads ====
 *
 * Devices on one GPU share its weights, and two staging buffers for those on their way up.
 *
 *     struct cuda_device *d = enter(device, "loading weights"); // it is the current one now
 *     TRY(d, cudaStreamSynchronize(stream));                    // or the device is lost
 *     launch(d, "double_kernel", double_kernel, n_blocks, THREADS, 0, x, n); */

struct weight { /* a matrix, or a vector of f32 */
    const struct tensor *tensor;
    struct slice slice;
    int gpu;
    struct matrix matrix; /* of all that is multiplied together */
    int first_half;       /* half tiles before this one's first */
    bool borrowed;        /* it belongs to the first of them */
    /* device (its part of the tensor, and zeros to a multiple of 8); of a router all of it */
    float *vector;
    struct weight *next;
};

struct card { /* what devices on the same GPU share */
    bool open;
    int n_devices; /* open ones */
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
    struct gpu gpu;     /* its stream is that of computing; its pieces are all memory below */
    struct gpu copying; /* the same, of the thread that copies meanwhile */
    cudaStream_t streams[N_STREAMS];
    struct gpu_tickets copies[N_STREAMS];
    int n_heads, n_kv_heads; /* of this shard */
    int x_stride, qkv_stride, logits_stride;
    struct segments attention_places, ffn_places;
    float *x, *qkv, *logits; /* (max_rows, x_stride), (max_rows, qkv_stride), (LOGIT_ROWS, …) */
    struct planes h, attention, ffn; /* inputs of products */
    uint16_t *q;                     /* bf16 (max_rows, n_heads, kv_head_dim) */
    float4 *sums_of_blocks;          /* of generated products, see there */
    int *blocks_done;                /* (multiprocessors) */
    /* (n_turns, max_rows, rope_dim / 2) cosine and sine; their frequencies (n_turns, rope_dim / 2):
     * of layers that see all, and if it is 2 those of layers with a window */
    float2 *turn;
    float *rope_frequency;
    int n_turns;
    float *squares;                   /* (max_rows, norm_tiles): see struct normed */
    bool normed;                      /* a product left them, not a norm_kernel */
    int *arrived;                     /* (max_rows, n_kv_heads, chunks) of attention */
    float *router;                    /* (max_rows, n_experts) logits */
    int *chosen, *entry;              /* (max_rows, n_used) experts; places of entries */
    float *share;                     /* (max_rows, n_used) */
    struct group_list *groups;        /* the tiles of entries of this layer */
    float *expert_out;                /* (places of entries, x_stride) */
    float *total;                     /* (max_rows, x_stride) of post_norm: what is added to x */
    struct sampler_row *sampler_rows; /* (LOGIT_ROWS) */
    int *sampled;                     /* (max_samples) pinned: kernels write there */
    /* the step: pinned and device (step_bytes); the parts of splits. They grow when they must. */
    struct step_header *step_host, *step;
    float *partial; /* (split_capacity, n_chunks, part): see struct attention */
    int n_chunks, part;
    size_t step_bytes, split_capacity;
    int n_rows, n_generated, n_samples, n_splits, n_prompt_items; /* that launches are made for */
    int n_sampled;                                                /* of the batch */
    struct sampler_top **top;                                     /* of the batch, see there */
    struct graph graphs[GRAPHS + 1];
    int recording; /* index of a graph; 0: none */
    /* of several shards: sums of project_add on their way, in turns, so that a reader has time */
    float *sums[2], *gathered;
    int turn_of_sums;
    const struct weight *pending;
    enum product_input pending_input;
    const float *pending_bias, *next_bias; /* (d_model), or NULL; of the next project_add */
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

static size_t cuda_free_memory(struct device *device) {
    struct cuda_device *d = enter(device, "asking for its free memory");
    size_t available = 0, total = 0;
    TRY(d, cudaMemGetInfo(&available, &total));
    return available;
}

static void *cuda_alloc(struct device *device, size_t bytes) {
    enter(device, "allocating");
    void *memory = NULL;
    cudaError_t error = cudaMalloc(&memory, bytes);
    (void)cudaGetLastError(); /* no room is an answer, not a fault */
    return error == cudaSuccess ? memory : NULL;
}

static void cuda_release(struct device *device, void *memory) {
    struct cuda_device *d = enter(device, "freeing memory");
    TRY(d, cudaFree(memory));
}

/* Beside the thread that drives the device: what is being done there stays as it is. */
static bool cuda_pin(struct device *device, void *memory, size_t bytes) {
    bool ok = cudaSetDevice(device->index) == cudaSuccess &&
              cudaHostRegister(memory, bytes, cudaHostRegisterPortable) == cudaSuccess;
    (void)cudaGetLastError();
    return ok;
}

static void cuda_unpin(struct device *device, void *memory) {
    struct cuda_device *d = enter(device, "unpinning memory");
    TRY(d, cudaHostUnregister(memory));
}

static uint64_t cuda_copy(struct device *device, enum stream stream, const struct copy2d *copy) {
    static const char *const names[N_STREAMS] = {"copying", "paging out", "paging in",
                                                 "handing over blocks"};
    struct cuda_device *d = (struct cuda_device *)device;
    cudaStream_t on = d->streams[stream];
    gpu_enter(&d->copying, names[stream]);
    if (copy->width == copy->to_pitch && copy->width == copy->from_pitch)
        GPU_TRY(&d->copying, cudaMemcpyAsync(copy->to, copy->from, copy->width * copy->height,
                                             cudaMemcpyDefault, on));
    else
        GPU_TRY(&d->copying,
                cudaMemcpy2DAsync(copy->to, copy->to_pitch, copy->from, copy->from_pitch,
                                  copy->width, copy->height, cudaMemcpyDefault, on));
    return gpu_ticket(&d->copying, &d->copies[stream], on);
}

static bool cuda_copy_done(struct device *device, enum stream stream, uint64_t ticket) {
    struct cuda_device *d = (struct cuda_device *)device;
    gpu_enter(&d->copying, "polling a copy");
    return gpu_ticket_done(&d->copying, &d->copies[stream], ticket);
}

/* ---- weights ---- */

/* K of attn_output is cut between heads, that of ffn_down at an even k: see chapter 2. */
static int grain_of(const struct model_config *config, int cols) {
    return cols == config->n_heads * config->head_dim ? config->head_dim : 2;
}

static void free_weight(struct weight *weight) {
    if (!weight->borrowed)
        cudaFree((void *)weight->matrix.packed);
    cudaFree(weight->vector);
    free(weight);
}

static struct weight *find_weight(const struct cuda_device *d, const struct tensor *tensor,
                                  struct slice slice) {
    struct weight *w = d->cuda->weights;
    while (w && !(w->tensor == tensor && w->gpu == d->device.index && w->slice.kind == slice.kind &&
                  w->slice.rank == slice.rank && w->slice.count == slice.count))
        w = w->next;
    return w;
}

/* Uploads rows from `first_row` on, band by band, and packs them, with `halves` half tiles of the
 * same matrix before them, or widens them. A tensor that repeats itself goes up once: the rest is
 * made on the device. */
static bool pack_matrix(struct cuda_device *d, const struct weight *w, int first_row, int n_rows,
                        int halves) {
    const struct tensor *tensor = w->tensor;
    const struct matrix *m = &w->matrix;
    size_t row_bytes = tensor->bytes / (size_t)tensor->rows;
    size_t period = tensor->period < tensor->bytes ? tensor->period : tensor->bytes;
    size_t most = 8 * row_bytes > STAGING_BYTES ? 8 * row_bytes : (size_t)STAGING_BYTES;
    size_t all = row_bytes * (size_t)divide(n_rows, 8) * 8;
    struct gpu_staging *staging = &d->card->staging;
    struct gpu beside = d->gpu; /* the same, but for the stream */
    beside.stream = staging->stream;
    if (!gpu_staging_reserve(&d->gpu, staging, period > 0 ? period : all < most ? all : most))
        return false;
    int band = period > 0 ? n_rows : (int)(staging->bytes / row_bytes / 8) * 8;
    int step = m->paired ? 2 : 1;
    uint8_t *made = tensor->stored ? (uint8_t *)malloc((size_t)band * row_bytes) : NULL;
    if (tensor->stored && !made)
        return false;
    for (int row = 0; row < n_rows; row += band) {
        const int own = smaller(n_rows - row, band);
        const size_t at = (size_t)(first_row + row) * row_bytes;
        const char *data = (const char *)tensor->data + (period > 0 ? 0 : at);
        if (made) {
            repack_rows(tensor, first_row + row, own, made);
            data = (const char *)made;
        }
        const char *up =
            gpu_staging_up(&d->gpu, staging, data, period > 0 ? period : (size_t)own * row_bytes);
        const struct raw_rows raw = {
            (const uint8_t *)up, row_bytes, period > 0 ? at % period : 0, period,
            tensor->type,        own};
        size_t n = (size_t)divide(own, 8) * (size_t)m->n_units * WARP;
        if (w->vector)
            gpu_launch(&beside, "widen_kernel", widen_kernel, own, THREADS, 0,
                       w->vector + (size_t)row * (size_t)tensor->cols, (int)tensor->cols, raw);
        else
            gpu_launch(&beside, "pack_kernel", pack_kernel, (unsigned)((n + THREADS - 1) / THREADS),
                       THREADS, 0, *m, halves + w->first_half + row / 8 * step, step, raw);
    }
    free(made);
    return true;
}

/* Of a matrix that a shard has; of experts, of each. */
static int rows_of(const struct model_config *c, const struct tensor *tensor, struct slice slice) {
    return (int)tensor->rows / (slice.kind == SLICE_ROWS      ? slice.count
                                : slice.kind == SLICE_EXPERTS ? c->n_experts
                                                              : 1);
}

/* The first expert of a shard, or of the one behind the last. */
static int first_expert(const struct model_config *c, int rank, int n_shards) {
    return divide(rank * c->n_experts, n_shards);
}

/* first: of together[0]; NULL: that is this one. Two are gate and up. */
static bool upload_matrix(struct cuda_device *d, struct weight *w,
                          const struct tensor *const *together, const struct weight *first) {
    struct matrix *m = &w->matrix;
    const struct slice *slice = &w->slice;
    const struct model_config *c = d->device.config;
    const bool experts = slice->kind == SLICE_EXPERTS;
    int rows = rows_of(c, w->tensor, *slice), cols = (int)w->tensor->cols, n_halves = 0;
    bool cut = slice->kind == SLICE_COLS, ok = true;
    int n_segments = cut ? K_SEGMENTS / slice->count : K_SEGMENTS;
    m->segments = make_segments(cols, cut ? grain_of(c, cols) : 0,
                                cut ? slice->rank * n_segments : 0, n_segments);
    m->n_units = m->segments.unit[n_segments];
    m->type = packed_type_of(w->tensor->type);
    m->paired = together[1] && !together[2];
    for (int i = 0; together[i]; i++) {
        if (together[i] == w->tensor)
            w->first_half = m->paired ? i : n_halves;
        if (packed_type_of(together[i]->type) != m->type)
            m->type = PACKED_BF16;
        m->n_outputs += m->paired && i > 0 ? 0 : rows_of(c, together[i], *slice);
        n_halves += divide(rows_of(c, together[i], *slice), 8);
    }
    m->n_panels = divide(n_halves, PANEL / 8);
    m->first_expert = experts ? first_expert(c, slice->rank, slice->count) : 0;
    w->borrowed = first != NULL;
    int n_parts = experts ? first_expert(c, slice->rank + 1, slice->count) - m->first_expert : 1;
    size_t bytes = (size_t)m->n_panels * (size_t)m->n_units * (size_t)unit_bytes(m->type) *
                   (size_t)larger(n_parts, 1);
    if (first)
        m->packed = first->matrix.packed;
    else if ((ok = cudaMalloc((void **)&m->packed, bytes) == cudaSuccess))
        TRY(d, cudaMemsetAsync((void *)m->packed, 0, bytes, d->card->staging.stream));
    (void)cudaGetLastError();
    int first_row = slice->kind == SLICE_ROWS ? slice->rank * rows : m->first_expert * rows;
    for (int i = 0; i < n_parts && ok; i++)
        ok = pack_matrix(d, w, first_row + i * rows, rows, i * m->n_panels * (PANEL / 8));
    return ok;
}

/* The router: all of it as f32, for a choice hangs on small differences. */
static bool upload_router(struct cuda_device *d, struct weight *w) {
    size_t n = (size_t)w->tensor->rows * (size_t)w->tensor->cols;
    return cudaMalloc((void **)&w->vector, n * sizeof(float)) == cudaSuccess &&
           pack_matrix(d, w, 0, (int)w->tensor->rows, 0);
}

/* A shard has its part of a bias; a norm is whole, and so are the biases of experts. */
static bool upload_vector(struct cuda_device *d, struct weight *w) {
    bool whole = w->slice.kind == SLICE_WHOLE || w->slice.kind == SLICE_EXPERTS;
    int n = (int)w->tensor->cols / (whole ? 1 : w->slice.count), rank = whole ? 0 : w->slice.rank;
    size_t bytes = (size_t)n * sizeof(float), room = (size_t)divide(n, 8) * 8 * sizeof(float);
    cudaStream_t stream = d->card->staging.stream;
    if (cudaMalloc((void **)&w->vector, room) != cudaSuccess)
        return false;
    TRY(d, cudaMemsetAsync(w->vector, 0, room, stream));
    TRY(d, cudaMemcpyAsync(w->vector, (const char *)w->tensor->data + (size_t)rank * bytes, bytes,
                           cudaMemcpyHostToDevice, stream));
    return true;
}

static const struct weight *cuda_upload(struct device *device, const struct tensor *tensor,
                                        const struct tensor *const *together, struct slice slice,
                                        char *error) {
    struct cuda_device *d = enter(device, "loading weights");
    struct cuda_backend *cuda = d->cuda;
    const struct tensor *const alone[] = {tensor, NULL};
    together = together ? together : alone;
    pthread_mutex_lock(&cuda->upload_mutex);
    struct weight *w = find_weight(d, tensor, slice);
    if (!w && (w = (struct weight *)calloc(1, sizeof *w)) != NULL) {
        const struct weight *first = find_weight(d, together[0], slice);
        w->tensor = tensor;
        w->slice = slice;
        w->gpu = device->index;
        bool is_vector = tensor->rows == 1 && tensor->type == TYPE_F32;
        const bool routes = slice.kind == SLICE_WHOLE && tensor->rows > 1 &&
                            tensor->rows == device->config->n_experts;
        if (is_vector ? upload_vector(d, w)
            : routes  ? upload_router(d, w)
                      : upload_matrix(d, w, together, first)) {
            w->next = cuda->weights;
            cuda->weights = w;
            TRY(d, cudaStreamSynchronize(d->card->staging.stream));
        } else {
            free_weight(w);
            w = NULL;
        }
    }
    pthread_mutex_unlock(&cuda->upload_mutex);
    if (!w) {
        (void)cudaGetLastError();
        (void)fail(error,
                   "%.*s: device %d (%s) has %zu MB left of %zu and needs %zu for this tensor; "
                   "take a model of a smaller type, or more GPUs and --tp",
                   (int)tensor->name.length, tensor->name.data, device->index,
                   d->card->properties.name, cuda_free_memory(device) >> 20,
                   d->card->properties.totalGlobalMem >> 20, (tensor->bytes >> 20) + 1);
    }
    return w;
}

/* ==== 4. Products: rows times packed matrices on the tensor cores ====
 *
 * A row takes the one kernel or the other by its role alone, so its bits do not depend on the
 * batch:
 *   generated_product   tokens that were generated, up to 64 rows: bound by reading the weights.
 *                       Each sum is a tree of K_SEGMENTS chains.
 *   prompt_product      rows of prompts: bound by multiplying. A tile: up to 256 rows and a panel,
 *                       and each sum is one chain over all of K. Where shards cut K, a shard goes
 *                       on with the sums of the one before it: the same chain.
 * Both do their part of what follows a product: bias, activation, or adding to the residual.
 *
 * In both, one warp of a block asks for weights and rows, unit after unit, into a ring of *stages*
 * in shared memory, as far ahead as there is room; the other eight multiply. The weights are the
 * 16-row operand (a) and the rows the 8-column one (b). On Hopper four warps multiply many rows
 * together (wgmma); few rows, and elsewhere all, each warp for itself (mma.sync): the same sums in
 * the same registers, to the bit, for a row must not depend on how many there are.
 *
 * Rows are planes, outputs f32 (n_rows, out_stride), but for the FFN's, which are the next input.
 * The twin of lib/matmul.h. */

/* out = sum + bias, or out += sum + bias; of prompts also: the sum goes on where another shard's
 * ended; ffn = the activation of gate and up */
enum epilogue { STORE, GO_ON, GATED };

enum {
    CONSUMERS = 8, /* warps of a block that multiply */
    FED_THREADS = (CONSUMERS + 1) * WARP,
    PROMPT_THREADS = (CONSUMERS + 4) * WARP, /* registers are left by groups of four warps */
    MAX_STAGES = 24,
    AHEAD_BYTES = 96 << 10, /* of weights that a block asks for ahead: more makes memory slower */
    GENERATED_ROWS = 64,    /* of a generated_product at most */
    /* bytes of a ring's barriers, of an int and the scales of rows */
    RING_BARRIERS = 2 * MAX_STAGES * 8 + 24 + GENERATED_ROWS * 4,
    ROW_BYTES = UNIT * 2, /* of a row of a unit */
    ROW_TILE = 256,       /* rows of a block of prompt_product at most */
    NORMED_ROWS = 16      /* at most where it does the norm behind it, too */
};

/* Generated rows on their way through a norm: x * weight goes into a product, and what comes out is
 * multiplied by 1 / root mean square of x. So whoever makes x makes the product's input as well,
 * and the sums of squares of its tiles of 16; where a norm_kernel does, their sum alone. */
struct normed {
    float *squares; /* (n_rows, n_tiles) */
    int n_tiles;    /* of whole panels; 1: sums of rows; 0: rows are what they seem */
    int width;
    float epsilon;
};

/* NaN where the squares overflow: see rmsnorm in kernels.c. */
DEVICE float scale_of_norm(float squares, int width, float epsilon) {
    return 1.0f / sqrtf(squares / (float)width + epsilon) + 0 * squares;
}

struct product {
    struct matrix matrix;
    float *out; /* (n_rows, out_stride) */
    /* bias[i][output], or NULL; i: of outputs before bias_end[0], before [1], of the rest */
    const float *bias[3];
    int bias_end[2], out_stride;
    bool adds; /* to what `out` holds */
    /* of GATED: biases of gate and up in bias[0] and [1], and where its outputs go */
    int activation; /* enum gate_function */
    struct planes ffn;
    struct segments ffn_places;
    struct planes input;
    int n_stages;
    /* generated_product's: rows [first_row, *n_generated - n_before); what blocks hand over */
    const int *n_generated; /* device */
    int n_before, grain;    /* grain: segments of an item */
    float4 *sums_of_blocks;
    int *blocks_done;
    struct normed rows, next; /* of the input; of what is added to, if it is the next input */
    const float *next_norm;   /* (n_outputs), or NULL */
    struct planes next_input;
    /* prompt_product's; initial: (n_rows, out_stride) where its chains begin; NULL: at 0 */
    int first_row, n_rows;
    const float *initial;
    const struct group_list *groups; /* expert_product's */
};

/* The sum of all lanes' values, in every lane, in a fixed order. */
DEVICE float sum_of_warp(float value) {
    for (int step = 16; step > 0; step /= 2)
        value += __shfl_xor_sync(0xffffffffu, value, step);
    return value;
}

/* The sum of a row's squares, from those of tiles; all lanes of a warp call it. */
DEVICE float sum_of_tiles(const float *squares, int n_tiles) {
    float sum = 0.0f;
    for (int i = (int)threadIdx.x % WARP; i < n_tiles; i += WARP)
        sum += squares[i];
    return sum_of_warp(sum);
}

/* Scales of ROWS rows, from their sums of squares, all in shared memory, by all that multiply. */
template <int ROWS>
DEVICE void find_scales(const struct normed &n, const float *squares, float *scales) {
    for (int row = (int)threadIdx.x / WARP; row < ROWS; row += CONSUMERS) {
        float sum = sum_of_tiles(squares + row * n.n_tiles, n.n_tiles);
        if (threadIdx.x % WARP == 0)
            scales[row] = n.n_tiles > 0 ? scale_of_norm(sum, n.width, n.epsilon) : 1.0f;
    }
    sync_threads<1, CONSUMERS * WARP>();
}

/* Of gate and up: the twin of `activate`. */
DEVICE float activate(int activation, float gate, float up) {
    float steep = gate; /* sigmoid is of it */
    if (activation == ACTIVATE_GELU)
        steep = fmaf(gate * gate * gate, 0.044715f, gate) * 1.5957691216f; /* 2 sqrt(2 / pi) */
    if (activation == ACTIVATE_CLAMPED) {
        gate = gate > 7.0f ? 7.0f : gate; /* NaN stays */
        up = (up > 7.0f ? 7.0f : up < -7.0f ? -7.0f : up) + 1.0f;
        steep = gate * 1.702f;
    }
    return __fdividef(gate, 1.0f + __expf(-steep)) * up;
}

/* Sums of a tile of 16 outputs and N times 8 rows: sum[4 j + e] of a lane is of output group +
 * e / 2 * 8 and row 8 j + 2 quad + e % 2. */
struct corner {
    int tile, row;          /* the first of the rows */
    int begin_row, end_row; /* those that are wanted; end_row >= begin_row */
    int first_bias;         /* of an expert: of those of all experts */
};

/* Calls act(i, row, output, its place in `rows`, as wide as out) for the sum[i] that are wanted. */
template <int N, typename T, typename Act>
DEVICE void for_wanted(const struct product &p, const struct corner &at, T *rows, Act act) {
    const int first = at.row + (int)threadIdx.x % 4 * 2;
    const int group = at.tile * TILE + (int)threadIdx.x % WARP / 4;
    T *own = rows + (size_t)first * (size_t)p.out_stride + (size_t)group;
#pragma unroll
    for (int i = 0; i < N * 4; i++) {
        const int row = first + i / 4 * 8 + i % 2, output = group + i % 4 / 2 * 8;
        const bool wanted = (unsigned)(row - at.begin_row) < (unsigned)(at.end_row - at.begin_row);
        if (wanted && output < p.matrix.n_outputs)
            act(i, row, output, own + (i / 4 * 8 + i % 2) * p.out_stride + i % 4 / 2 * 8);
    }
}

/* What a lane adds its sums to, of few rows, and the next norm's weights of its outputs: read long
 * before they are needed. */
struct added {
    float x[NORMED_ROWS / 2], weight[2];
};

/* x += sum, and the next product's input: see struct normed. */
template <int N>
DEVICE void add_normed(const struct product &p, const struct corner &at, const float *sum,
                       const struct added &added) {
    float x[N * 4] = {};
    for_wanted<N>(p, at, p.out, [&](int i, int row, int output, float *to) {
        *to = x[i] = added.x[i] + (sum[i] + (p.bias[0] ? p.bias[0][output] : 0.0f));
        *plane_element(p.next_input, row, output) =
            (uint16_t)pack_bf16(x[i] * added.weight[i % 4 / 2], 0.0f);
    });
#pragma unroll
    for (int i = 0; i < N * 2; i++) { /* outputs group and group + 8 of a row, then all groups */
        const float *own = x + i / 2 * 4 + i % 2;
        const int row = at.row + i / 2 * 8 + (int)threadIdx.x % 4 * 2 + i % 2;
        float squares = own[0] * own[0] + own[2] * own[2];
        for (int step = 4; step < WARP; step *= 2)
            squares += __shfl_xor_sync(0xffffffffu, squares, step);
        if (threadIdx.x % WARP < 4 && row < at.end_row)
            p.next.squares[(size_t)row * p.next.n_tiles + at.tile] = squares;
    }
}

/* What is done with the sums. All lanes of a warp call it. A sum is added to what is there by an
 * atomic addition because that waits for nothing; nobody else adds there. scales: shared, of
 * generated rows from first_row on, and added; NULL: others have none. */
template <int EPILOGUE, int N>
DEVICE void finish(const struct product &p, const struct corner &at, const float *sum,
                   const float *scales, const struct added *added) {
    auto scale = [&](int row) { return scales ? scales[row - p.first_row] : 1.0f; };
    if constexpr (EPILOGUE != GATED) {
        if constexpr (N <= NORMED_ROWS / 8)
            if (added && p.next_norm)
                return add_normed<N>(p, at, sum, *added);
        float more[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int output = at.tile * TILE + (int)threadIdx.x % WARP / 4 + i * 8;
            const float *bias = p.bias[(output >= p.bias_end[0]) + (output >= p.bias_end[1])];
            more[i] = bias && output < p.matrix.n_outputs ? bias[at.first_bias + output] : 0.0f;
        }
        if (p.adds)
            for_wanted<N>(p, at, p.out, [&](int i, int, int, float *to) {
                atomicAdd(to, sum[i] + more[i % 4 / 2]);
            });
        else
            for_wanted<N>(p, at, p.out, [&](int i, int row, int, float *to) {
                *to = sum[i] * scale(row) + more[i % 4 / 2];
            });
    } else { /* lanes of two outputs swap, so that each has both of one row */
        const int lane = (int)threadIdx.x % WARP;
        const int odd = lane / 4 % 2;
        const int row = at.row + lane % 4 * 2 + odd, output = at.tile * 8 + lane / 8 * 2;
        const bool there = output < p.matrix.n_outputs; /* segments begin at an even k */
        uint16_t *to = plane_element(p.ffn, row, place(p.ffn_places, there ? output : 0));
        const int own = at.tile * 8 + lane / 4; /* before the swap */
        float bias[2];
        for (int i = 0; i < 2; i++)
            bias[i] = p.bias[i] && own < p.matrix.n_outputs ? p.bias[i][at.first_bias + own] : 0.0f;
#pragma unroll
        for (int j = 0; j < N; j++) {
            const float *s = sum + j * 4, low = scale(row - odd + j * 8),
                        high = scale(row - odd + 1 + j * 8);
            const float y[2] = {
                activate(p.activation, s[0] * low + bias[0], s[2] * low + bias[1]),
                activate(p.activation, s[1] * high + bias[0], s[3] * high + bias[1])};
            float other = __shfl_xor_sync(0xffffffffu, odd ? y[0] : y[1], 4);
            if (there && row + j * 8 >= at.begin_row && row + j * 8 < at.end_row)
                *reinterpret_cast<uint32_t *>(to + j * 8 * UNIT) =
                    odd ? pack_bf16(other, y[1]) : pack_bf16(y[0], other);
        }
    }
}

/* ---- the ring ---- */

static constexpr __host__ __device__ int stage_bytes(int type, int rows) { /* a unit, with rows */
    return rows * ROW_BYTES + (unit_bytes(type) + 1023) / 1024 * 1024;
}

struct ring { /* of n stages, each `bytes`: a thread's place in it */
    uint8_t *stages;
    uint64_t *full, *empty; /* (n) barriers: copies have arrived; it may be written again */
    uint64_t *once;         /* what is copied a single time has arrived */
    int n, bytes, at;
    uint32_t parity;
};

/* All threads of the block. In shared memory the stages come first, then `others` bytes, and the
 * barriers. A stage is empty when so many warps have given it back. */
DEVICE struct ring open_ring(uint8_t *shared, int n, int bytes, int others, int warps) {
    uint64_t *full = reinterpret_cast<uint64_t *>(shared + n * bytes + others);
    struct ring r = {shared, full, full + n, full + 2 * n, n, bytes, 0, 0};
    if (threadIdx.x == 0) {
        barrier_init(r.once, COPY_ARRIVALS);
        for (int i = 0; i < n; i++) {
            barrier_init(r.full + i, COPY_ARRIVALS);
            barrier_init(r.empty + i, warps);
        }
        barriers_ready();
    }
    __syncthreads();
    return r;
}

DEVICE void next_stage(struct ring *r) {
    if (++r->at == r->n) {
        r->at = 0;
        r->parity ^= 1;
    }
}

DEVICE uint8_t *wait_empty(const struct ring &r) { /* the producer's; at first all are */
    barrier_wait(r.empty + r.at, r.parity ^ 1);
    return r.stages + r.at * r.bytes;
}

DEVICE uint8_t *wait_full(const struct ring &r) {
    barrier_wait(r.full + r.at, r.parity);
    return r.stages + r.at * r.bytes;
}

/* A warp has done with the stage so many before its own. Not with what it has just loaded: that may
 * still be on its way into registers, and a new copy would overtake it. */
DEVICE void give_back(const struct ring &r, int before) {
    __syncwarp();
    if (threadIdx.x % WARP == 0)
        barrier_arrive(r.empty + (r.at < before ? r.at + r.n : r.at) - before);
}

DEVICE void advance(struct ring *r, bool first) {
    if (!first)
        give_back(*r, 1);
    next_stage(r);
}

/* The producer's, of prompts and experts: asks for all units of a panel, each behind its ROWS rows
 * from first_row on. */
template <int TYPE, int ROWS>
DEVICE void produce_panel(struct planes input, int first_row, const uint8_t *weights, int n_units,
                          struct ring *r) {
    for (int unit = 0; unit < n_units; unit++, next_stage(r)) {
        const size_t row = (size_t)unit * input.n_rows + first_row;
        uint8_t *to = wait_empty(*r);
        copy_piece(to, input.bytes + row * ROW_BYTES, ROWS * ROW_BYTES, false, r->full + r->at);
        copy_piece(to + ROWS * ROW_BYTES, weights + (size_t)unit * unit_bytes(TYPE),
                   unit_bytes(TYPE), false, r->full + r->at);
        copies_sent(r->full + r->at);
    }
}

/* ---- generated tokens ---- */

/* Which units a block has, of the panels one after the other: items [begin, end) of `grain`
 * segments, an equal share for each block. */
struct share {
    int n_groups; /* items of a panel */
    int begin, end;
};

DEVICE struct share find_share(const struct product &p) {
    const int n_groups = p.matrix.segments.n / p.grain, n = p.matrix.n_panels * n_groups;
    return {n_groups, (int)((int64_t)blockIdx.x * n / gridDim.x),
            (int)((int64_t)(blockIdx.x + 1) * n / gridDim.x)};
}

static inline __host__ __device__ int squares_bytes(const struct product &p, int rows) {
    return rows * p.rows.n_tiles * (int)sizeof(float);
}

/* The warp that asks for units: the first weights before the kernel before this has ended, since
 * they do not depend on it; rows afterwards. Those who come next are let in when all has been asked
 * for, or, where rows are few, at once. */
template <int TYPE, int ROWS>
DEVICE void produce_generated(const struct product &p, struct ring r, float *squares) {
    const struct segments &segments = p.matrix.segments;
    const int n_units = p.matrix.n_units;
    const struct share s = find_share(p);
    auto unit_of = [&](int item) {  // of all panels' units
        return item / s.n_groups * n_units + segments.unit[item % s.n_groups * p.grain];
    };
    const int begin = unit_of(s.begin), n = unit_of(s.end) - begin, n_ahead = smaller(n, r.n);
    struct {
        struct ring r;
        const uint8_t *from; /* the unit's weights */
        int unit;            /* of its panel */
    } at = {r, p.matrix.packed + (size_t)begin * unit_bytes(TYPE), begin % n_units};
    const auto start = at;
    auto ask = [&](bool weights, bool rows) {  // and goes on to the next unit
        const size_t row = (size_t)at.unit * p.input.n_rows + p.first_row;
        uint8_t *to = wait_empty(at.r);
        if (weights)
            copy_piece(to + ROWS * ROW_BYTES, at.from, unit_bytes(TYPE), true, at.r.full + at.r.at);
        if (rows) {
            copy_piece(to, p.input.bytes + row * ROW_BYTES, ROWS * ROW_BYTES, false,
                       at.r.full + at.r.at);
            copies_sent(at.r.full + at.r.at);
        }
        next_stage(&at.r);
        at.from += unit_bytes(TYPE);
        at.unit = at.unit + 1 < n_units ? at.unit + 1 : 0;
    };
    if (ROWS < GENERATED_ROWS)
        grid_launch_dependents();
    for (int i = 0; i < n_ahead; i++)
        ask(true, false);
    grid_wait();
    copies_see_stores();
    copy_piece(squares, p.rows.squares + (size_t)p.first_row * p.rows.n_tiles,
               squares_bytes(p, ROWS), false, r.once);
    copies_sent(r.once);
    at = start;
    for (int i = 0; i < n; i++)
        ask(i >= n_ahead, true);
    if (ROWS == GENERATED_ROWS)
        grid_launch_dependents();
}

/* sum (a tile of 16 outputs, ROWS rows) += a unit. Of many rows the last products still go on when
 * it returns, on Hopper, and read a[1]; those of the call before are done. */
template <int TYPE, int ROWS>
DEVICE void multiply_unit(const uint8_t *rows, int tile, uint32_t (&a)[2][2][4],
                          float (&sum)[ROWS / 2]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int i = 0; i < 2; i++)
            load_scaled<TYPE>(rows + ROWS * ROW_BYTES, tile, half * 2 + i, (int)threadIdx.x % WARP,
                              a[half][i]);
        if (ROWS > FEW_COLUMNS)
            wgmma_begin();
        multiply_rows<ROWS>(sum, a[half][0], rows, half * 2, true);
        multiply_rows<ROWS>(sum, a[half][1], rows, half * 2 + 1, true);
        if (ROWS > FEW_COLUMNS)
            wgmma_commit(), wgmma_wait<1>(); /* those before, which read the other half of a */
    }
}

/* The same of quantized rows: numbers are multiplied, 32 k at a time, then sums by the scale. */
template <int TYPE, int ROWS>
DEVICE void multiply_numbers(const uint8_t *rows, int tile, float (&sum)[ROWS / 2]) {
    uint32_t a[2][2][4], scale[2];
    float part[2][ROWS / 2];
#pragma unroll
    for (int i = 0; i < 4; i++)
        load_operand<TYPE>(rows + ROWS * ROW_BYTES, tile, i, (int)threadIdx.x % WARP,
                           a[i / 2][i % 2], &scale[i / 2]);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (ROWS > FEW_COLUMNS)
            wgmma_begin();
        multiply_rows<ROWS>(part[half], a[half][0], rows, half * 2, false);
        multiply_rows<ROWS>(part[half], a[half][1], rows, half * 2 + 1, true);
        if (ROWS > FEW_COLUMNS)
            wgmma_commit();
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (ROWS > FEW_COLUMNS)
            half == 0 ? wgmma_wait<1>() : wgmma_wait<0>();
#pragma unroll
        for (int i = 0; i < ROWS / 2; i++)
            sum[i] =
                fmaf(part[half][i], scale_to_float(TYPE, scale[half] >> i % 4 / 2 * 16), sum[i]);
    }
}

DEVICE float4 add4(float4 a, float4 b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

/* A node of the tree is done: adds its left sibling to it, and that of the sum of both, up to level
 * `top`. kept: shared (3 levels, N / 4, consumers), left siblings. True: `sum` is of a node at the
 * top. */
template <int N> DEVICE bool add_siblings(int segment, int top, float (&sum)[N], float4 *kept) {
    float4 *own = reinterpret_cast<float4 *>(sum), *left = kept + threadIdx.x;
    for (int level = 0; level < top; level++) {
        const bool is_right = segment >> level & 1;
#pragma unroll
        for (int i = 0; i < N / 4; i++, left += CONSUMERS * WARP)
            if (is_right)
                own[i] = add4(*left, own[i]);
            else
                *left = own[i];
        if (!is_right)
            return false;
    }
    return true;
}

/* Where a block leaves the sums of an item, of a panel that several blocks share: with those of the
 * block that has the panel's first item. [owner][items of a panel][8 rows][thread] */
template <int ROWS> DEVICE float4 *sums_of_item(const struct product &p, int owner, int group) {
    return p.sums_of_blocks + ((size_t)owner * K_SEGMENTS + group) * (ROWS / 8) * CONSUMERS * WARP +
           threadIdx.x;
}

/* The last block to leave sums of a panel's items adds them all up. at: of the warp's tile. */
template <int EPILOGUE, int ROWS>
DEVICE void add_shared_sums(const struct product &p, struct corner at, int owner, int n_items,
                            int n_groups, const float *scales, const struct added *added,
                            int *last) {
    sync_threads<1, CONSUMERS * WARP>();
    if (threadIdx.x == 0) {
        *last = add_ordered(p.blocks_done + owner, n_items) + n_items == n_groups;
        if (*last)
            p.blocks_done[owner] = 0;
    }
    sync_threads<1, CONSUMERS * WARP>();
    if (!*last)
        return;
    constexpr int N = ROWS < 32 ? ROWS / 8 : 4; /* times 8 rows at a time */
#pragma unroll 1
    for (int first = 0; first < ROWS / 8; first += N, at.row += N * 8) {
        float4 sum[N] = {};
#pragma unroll 1
        for (int half = 0; half < n_groups; half += 4)
#pragma unroll
            for (int j = 0; j < N; j++) {
                float4 v[4];
#pragma unroll
                for (int i = 0; i < 4; i++)
                    v[i] = half + i < n_groups && at.row + j * 8 < at.end_row
                               ? __ldcg(sums_of_item<ROWS>(p, owner, half + i) +
                                        (first + j) * CONSUMERS * WARP)
                               : float4{};
                sum[j] = add4(sum[j], add4(add4(v[0], v[1]), add4(v[2], v[3])));
            }
        finish<EPILOGUE, N>(p, at, &sum[0].x, scales, added);
    }
}

/* sum = all n units of a segment. first: none has been multiplied before. */
template <int TYPE, int ROWS>
DEVICE void multiply_segment(struct ring *r, int n, int warp, bool *first, float (&sum)[ROWS / 2]) {
    uint32_t a[2][2][4];
#pragma unroll
    for (int i = 0; i < ROWS / 2; i++)
        sum[i] = 0.0f;
    for (; n > 0; n--, *first = false) {
        const uint8_t *rows = wait_full(*r);
        if constexpr (TYPE == PACKED_BF16)
            multiply_unit<TYPE, ROWS>(rows, warp, a, sum);
        else
            multiply_numbers<TYPE, ROWS>(rows, warp, sum);
        advance(r, *first);
    }
    wgmma_wait<0>();
}

static constexpr __host__ __device__ int kept_bytes(int rows) { /* of add_siblings */
    return 3 * rows / 8 * CONSUMERS * WARP * 16;
}

/* out (row, output) = sum over k of input (row, k) * matrix (output, k), of up to ROWS rows from
 * first_row on. A block a multiprocessor: see struct share. Shared: the ring, sums of left
 * siblings, squares, an int, and the scales of rows. Bound by memory. */
template <int TYPE, int EPILOGUE, int ROWS>
__global__ void __launch_bounds__(FED_THREADS, 1) generated_product_kernel(const struct product p) {
    DYNAMIC_SHARED(uint8_t, shared);
    float4 *kept = reinterpret_cast<float4 *>(shared + p.n_stages * stage_bytes(TYPE, ROWS));
    float *squares = reinterpret_cast<float *>(kept) + kept_bytes(ROWS) / 4;
    struct ring r = open_ring(shared, p.n_stages, stage_bytes(TYPE, ROWS),
                              kept_bytes(ROWS) + squares_bytes(p, ROWS), CONSUMERS);
    const int warp = (int)threadIdx.x / WARP;
    if (warp == CONSUMERS)
        return produce_generated<TYPE, ROWS>(p, r, squares);
    const struct share s = find_share(p);
    const struct segments &segments = p.matrix.segments;
    const int end_row = *p.n_generated - p.n_before; /* no kernel wrote the step */
    int *last = reinterpret_cast<int *>(r.once + 1);
    float *scales = reinterpret_cast<float *>(last + 1);
    struct added added;
    grid_wait();
    bool first = true;
    for (int item = s.begin, n_items; item < s.end; item += n_items) {
        const int group = item % s.n_groups, n_all = p.matrix.n_panels * s.n_groups;
        /* of the panel's first item: the last block to begin before or with it */
        const int owner = (int)(((int64_t)(item - group + 1) * gridDim.x - 1) / n_all);
        const struct corner at = {item / s.n_groups * (PANEL / TILE) + warp, p.first_row, 0,
                                  end_row, 0};
        n_items = smaller(s.n_groups - group, s.end - item);
        const bool whole = n_items == s.n_groups;
        const int top = whole ? (segments.n > 1) + (segments.n > 2) + (segments.n > 4)
                              : (p.grain > 1) + (p.grain > 2);
        alignas(16) float sum[ROWS / 2];
        if (ROWS <= NORMED_ROWS && p.next_norm)
            for_wanted<ROWS / 8>(p, at, p.out, [&](int i, int, int output, const float *from) {
                added.x[i] = *from;
                added.weight[i % 4 / 2] = p.next_norm[output];
            });
        for (int i = group * p.grain; i < (group + n_items) * p.grain; i++) {
            multiply_segment<TYPE, ROWS>(&r, segments.unit[i + 1] - segments.unit[i], warp, &first,
                                         sum);
            if (!add_siblings(i, top, sum, kept) || whole)
                continue;
#pragma unroll
            for (int j = 0; j < ROWS / 8; j++)
                __stcg(sums_of_item<ROWS>(p, owner, i / p.grain) + j * CONSUMERS * WARP,
                       reinterpret_cast<float4 *>(sum)[j]);
        }
        if (item == s.begin) {
            barrier_wait(r.once, 0);
            find_scales<ROWS>(p.rows, squares, scales);
        }
        if (whole)
            finish<EPILOGUE, ROWS / 8>(p, at, sum, scales, &added);
        else
            add_shared_sums<EPILOGUE, ROWS>(p, at, owner, n_items, s.n_groups, scales, &added,
                                            last);
    }
}

/* ---- prompts ---- */

/* On Hopper a warp has the sums of a tile of outputs and 256 rows. Elsewhere, where each warp reads
 * its operands for itself, of 4 tiles and 48 rows: more would not fit the registers. */
#ifdef HOPPER
enum { WARP_TILES = 1, WARP_GROUPS = 32 /* of 8 rows */ };
#else
enum { WARP_TILES = 4, WARP_GROUPS = 6 };
#endif
enum {
    WARP_SUMS = WARP_TILES * WARP_GROUPS, /* of a tile and 8 rows: 4 a lane */
    TILE_ROWS = WARP_SUMS * 8             /* of a block */
};

/* A block's tiles of rows and panels: tiles of rows begin at a multiple of 8, where planes can be
 * cut. Blocks of one time share panels, so that weights stay in L2. */
struct row_tiles {
    int begin, end, n; /* rows; tiles of rows */
};

DEVICE struct row_tiles find_row_tiles(const struct product &p) {
    int begin = p.first_row / 8 * 8, end = p.first_row + p.n_rows;
    return {begin, end, divide(end - begin, TILE_ROWS)};
}

template <int TYPE> DEVICE void produce_prompt(const struct product &p, struct ring r) {
    const struct row_tiles t = find_row_tiles(p);
    const int n_units = p.matrix.n_units;
    grid_wait();
    copies_see_stores();
    for (int tile = (int)blockIdx.x; tile < t.n * p.matrix.n_panels; tile += (int)gridDim.x)
        produce_panel<TYPE, TILE_ROWS>(
            p.input, t.begin + tile % t.n * TILE_ROWS,
            p.matrix.packed + (size_t)(tile / t.n) * n_units * unit_bytes(TYPE), n_units, &r);
}

DEVICE int tile_of(int warp, int i) { /* of a warp's sums [4 i, 4 i + 4): the tile of the panel */
    return warp % (CONSUMERS / WARP_TILES) * WARP_TILES + i / WARP_GROUPS;
}

DEVICE int row_of(int warp, int i) { /* and the first of 8 rows of the block */
    return (warp / (CONSUMERS / WARP_TILES) * WARP_GROUPS + i % WARP_GROUPS) * 8;
}

/* sum += a unit. Where each warp multiplies for itself, one without any of n_rows does nothing. */
template <int TYPE>
DEVICE void multiply_prompt_unit(const uint8_t *rows, int n_rows, int warp, uint32_t (&a)[2][2][4],
                                 float (&sum)[WARP_SUMS * 4]) {
#ifdef HOPPER
    (void)n_rows;
    multiply_unit<TYPE, TILE_ROWS>(rows, warp, a, sum);
#else
    const int lane = (int)threadIdx.x % WARP;
    (void)a;
    if (row_of(warp, 0) >= n_rows)
        return;
#pragma unroll
    for (int i = 0; i < 4; i++) { /* fragments */
        uint32_t w[WARP_TILES][4], b[4];
#pragma unroll
        for (int tile = 0; tile < WARP_TILES; tile++)
            load_scaled<TYPE>(rows + TILE_ROWS * ROW_BYTES, tile_of(warp, tile * WARP_GROUPS), i,
                              lane, w[tile]);
#pragma unroll
        for (int j = 0; j < WARP_GROUPS; j += 2) { /* 16 rows */
            load_matrices(b, rows + (row_of(warp, j) + lane / 16 * 8 + lane % 8) * ROW_BYTES +
                                 ((i * 2 + lane / 8 % 2) ^ lane % 8) * 16);
#pragma unroll
            for (int k = 0; k < WARP_TILES * 2; k++)
                mma_bf16(&sum[(k / 2 * WARP_GROUPS + j + k % 2) * 4], w[k / 2], b + k % 2 * 2);
        }
        __syncwarp(); /* moves no load across */
    }
#endif
}

template <int TYPE, int EPILOGUE>
DEVICE void multiply_prompts(const struct product &p, struct ring r) {
    const int warp = (int)threadIdx.x / WARP;
    grid_wait();
    const struct row_tiles t = find_row_tiles(p);
    const int n_units = p.matrix.n_units;
    bool first = true;
    for (int tile = (int)blockIdx.x; tile < t.n * p.matrix.n_panels; tile += (int)gridDim.x) {
        const int row = t.begin + tile % t.n * TILE_ROWS, n_rows = t.end - row;
        auto corner_of = [&](int i) -> struct corner {
            return {tile / t.n * (PANEL / TILE) + tile_of(warp, i), row + row_of(warp, i),
                    p.first_row, t.end, 0};
        };
        float sum[WARP_SUMS * 4];
        uint32_t a[2][2][4];
#pragma unroll
        for (int i = 0; i < WARP_SUMS * 4; i++)
            sum[i] = 0.0f;
        if constexpr (EPILOGUE == GO_ON)
#pragma unroll
            for (int i = 0; i < WARP_SUMS; i += 2) {
                for_wanted<2>(p, corner_of(i), p.initial,
                              [&](int k, int, int, const float *from) { sum[i * 4 + k] = *from; });
                __syncwarp(); /* as above */
            }
        for (int unit = 0; unit < n_units; unit++, first = false) {
            multiply_prompt_unit<TYPE>(wait_full(r), n_rows, warp, a, sum);
            advance(&r, first);
        }
        wgmma_wait<0>();
#pragma unroll
        for (int i = 0; i < WARP_SUMS; i += WARP_GROUPS)
            finish<EPILOGUE, WARP_GROUPS>(p, corner_of(i), &sum[i * 4], NULL, NULL);
    }
}

/* out (row, output) = sum over k, in order, of rows [first_row, first_row + n_rows). Grid: any
 * number of blocks; each takes every so-manieth tile of TILE_ROWS rows and a panel. Shared: the
 * ring. Bound by the tensor cores. */
template <int TYPE, int EPILOGUE>
__global__ void __launch_bounds__(PROMPT_THREADS, 1) prompt_product_kernel(const struct product p) {
    DYNAMIC_SHARED(uint8_t, shared);
    struct ring r = open_ring(shared, p.n_stages, stage_bytes(TYPE, ROW_TILE), 0, CONSUMERS);
    if (threadIdx.x < CONSUMERS * WARP) {
        take_registers<232>();
        multiply_prompts<TYPE, EPILOGUE>(p, r);
    } else {
        leave_registers<40>();
        if (threadIdx.x < FED_THREADS)
            produce_prompt<TYPE>(p, r);
    }
}

/* ---- experts ---- */

/* An *entry* is a row and one of its experts. Those of an expert have places side by side, from a
 * multiple of 8 on, in order of no meaning: what an entry gets depends on its row and expert alone,
 * so generated rows and prompts take the same kernel. */
struct entries {
    int expert;     /* of those that the shard has */
    int first, end; /* places: its tile begins at the first */
};

struct group_list {
    int n;
    struct entries tiles[1]; /* (n) */
};

/* out or ffn (entry, output) = sum over k, in order, of an entry's row times its expert's matrix. A
 * block takes every so-manieth tile of up to ROWS entries and a panel; neighbours share experts.
 * Shared: the ring. Bound by memory, or of many rows by the tensor cores. */
template <int TYPE, int EPILOGUE, int ROWS>
__global__ void __launch_bounds__(FED_THREADS, 1) expert_product_kernel(const struct product p) {
    DYNAMIC_SHARED(uint8_t, shared);
    grid_launch_dependents();
    struct ring r = open_ring(shared, p.n_stages, stage_bytes(TYPE, ROWS), 0, CONSUMERS);
    const int warp = (int)threadIdx.x / WARP;
    const int n_panels = p.matrix.n_panels, n_units = p.matrix.n_units;
    bool first = true;
    grid_wait();
    copies_see_stores();
    for (int tile = (int)blockIdx.x; tile < p.groups->n * n_panels; tile += (int)gridDim.x) {
        const struct entries e = p.groups->tiles[tile / n_panels];
        const int panel = tile % n_panels;
        if (warp == CONSUMERS) {
            const uint8_t *weights = p.matrix.packed + (size_t)(e.expert * n_panels + panel) *
                                                           n_units * unit_bytes(TYPE);
            produce_panel<TYPE, ROWS>(p.input, e.first, weights, n_units, &r);
            continue;
        }
        alignas(16) float sum[ROWS / 2];
        multiply_segment<TYPE, ROWS>(&r, n_units, warp, &first, sum);
        const struct corner at = {panel * (PANEL / TILE) + warp, e.first, e.first, e.end,
                                  (p.matrix.first_expert + e.expert) * p.matrix.n_outputs};
        finish<EPILOGUE, ROWS / 8>(p, at, sum, NULL, NULL);
    }
}

/* ---- launches ---- */

enum { FEW_ENTRIES = 8, MANY_ENTRIES = 64 }; /* of an expert_product's tile at most */

/* What this step's tiles have: more where experts have many rows. */
static int entry_tile(const struct cuda_device *d) {
    const struct model_config *c = d->device.config;
    return d->n_rows * c->n_used > 2 * FEW_ENTRIES * c->n_experts ? MANY_ENTRIES : FEW_ENTRIES;
}

/* The stages of so many bytes that a block of this chip has room for, beside `others`. */
static int stages_of(const struct cuda_device *d, int bytes, int others) {
    int room = (int)d->card->properties.sharedMemPerBlockOptin - others - RING_BARRIERS;
    return smaller(room / bytes, MAX_STAGES);
}

/* Launches a kernel with a ring of stages, `most` of them if they fit, and `others` bytes. */
template <typename Parameters>
static void launch_fed(struct cuda_device *d, const char *name, void (*kernel)(Parameters),
                       int blocks, int threads, int stage, int others, int most,
                       std::decay_t<Parameters> p) {
    p.n_stages = smaller(stages_of(d, stage, others), most);
    launch(d, name, kernel, blocks, threads, (size_t)(p.n_stages * stage + others + RING_BARRIERS),
           p);
}

/* Generated rows that a block has room for, with enough stages: fewer on chips with less. */
static int rows_at_once(const struct cuda_device *d) {
    int rows = GENERATED_ROWS;
    while (stages_of(d, stage_bytes(PACKED_BF16, rows), kept_bytes(rows)) < 4)
        rows /= 2;
    return rows;
}

/* Segments of an item: the more, the fewer sums pass through memory. One item a block is best, if
 * two thirds of the blocks have one; else no block may have more to do than with small items. */
static int choose_grain(int n_panels, int n_segments, int blocks) {
    int grain = 1, least = divide(n_panels * n_segments, blocks);
    for (int i = 1; i <= n_segments; i *= 2) {
        int items = n_panels * n_segments / i;
        if (items <= blocks && items * 3 >= blocks * 2)
            return i;
        if (i <= 4 && divide(items, blocks) * i <= least + least / 32)
            grain = i;
    }
    return grain;
}

template <int TYPE, int EPILOGUE, int ROWS>
static void launch_generated(struct cuda_device *d, struct product p) {
    int n_segments = p.matrix.segments.n, blocks = d->card->properties.multiProcessorCount;
    p.grain = choose_grain(p.matrix.n_panels, n_segments, blocks);
    p.sums_of_blocks = d->sums_of_blocks;
    p.blocks_done = d->blocks_done;
    launch_fed(d, "generated_product_kernel", generated_product_kernel<TYPE, EPILOGUE, ROWS>,
               smaller(blocks, p.matrix.n_panels * n_segments / p.grain), FED_THREADS,
               stage_bytes(TYPE, ROWS), kept_bytes(ROWS) + squares_bytes(p, ROWS),
               AHEAD_BYTES / unit_bytes(TYPE), p);
}

/* The product for n_generated rows, and for the prompt rows that p names. Of the latter there may
 * be more tiles than blocks: these then begin together, on an empty chip, so that those that read
 * the same weights or rows are neighbours (see copy_piece), and go on to further tiles; where
 * several devices share the GPU each block has one, so that others get in. */
template <int TYPE, int EPILOGUE>
static void launch_typed(struct cuda_device *d, struct product p, int n_generated) {
    if (p.n_rows > 0) {
        int blocks = d->card->properties.multiProcessorCount;
        int n = divide(p.first_row % 8 + p.n_rows, ROW_TILE) * p.matrix.n_panels;
        constexpr int GOES_ON = EPILOGUE == STORE ? (int)GO_ON : (int)EPILOGUE;
        d->gpu.alone = n > blocks;
        launch_fed(d, "prompt_product_kernel",
                   p.initial ? prompt_product_kernel<TYPE, GOES_ON>
                             : prompt_product_kernel<TYPE, EPILOGUE>,
                   d->card->n_devices > 1 ? n : smaller(n, blocks), PROMPT_THREADS,
                   stage_bytes(TYPE, ROW_TILE), 0, MAX_STAGES, p);
        d->gpu.alone = false;
    }
    int most = rows_at_once(d);
    for (p.first_row = 0; p.first_row < n_generated; p.first_row += most) {
        switch (divide(smaller(n_generated - p.first_row, most), 8)) {
        case 1: launch_generated<TYPE, EPILOGUE, 8>(d, p); break;
        case 2: launch_generated<TYPE, EPILOGUE, 16>(d, p); break;
        case 3:
        case 4: launch_generated<TYPE, EPILOGUE, 32>(d, p); break;
        default: launch_generated<TYPE, EPILOGUE, 64>(d, p);
        }
    }
}

/* Calls act(type), of which the type is a constant. */
template <typename Act> static void with_type(int type, Act act) {
    switch (type) {
    case PACKED_BF16: act(std::integral_constant<int, PACKED_BF16>()); break;
    case PACKED_Q8: act(std::integral_constant<int, PACKED_Q8>()); break;
    case PACKED_Q4: act(std::integral_constant<int, PACKED_Q4>()); break;
    case PACKED_MXFP4: act(std::integral_constant<int, PACKED_MXFP4>()); break;
    }
}

template <int EPILOGUE>
static void launch_product(struct cuda_device *d, const struct product &p, int n_generated) {
    auto launch = [&](auto type) { launch_typed<type(), EPILOGUE>(d, p, n_generated); };
    with_type(p.matrix.type, launch);
}

template <int TYPE, int EPILOGUE, int ROWS>
static void launch_experts(struct cuda_device *d, const struct product &p) {
    launch_fed(d, "expert_product_kernel", expert_product_kernel<TYPE, EPILOGUE, ROWS>,
               d->card->properties.multiProcessorCount, FED_THREADS, stage_bytes(TYPE, ROWS), 0,
               MAX_STAGES, p);
}

template <int EPILOGUE> static void launch_experts(struct cuda_device *d, const struct product &p) {
    auto launch = [&](auto type) {
        if (entry_tile(d) == FEW_ENTRIES)
            launch_experts<type(), EPILOGUE, FEW_ENTRIES>(d, p);
        else
            launch_experts<type(), EPILOGUE, MANY_ENTRIES>(d, p);
    };
    with_type(p.matrix.type, launch);
}

/* A product of all rows of the step, without a bias; what is set in bias[0] is that of all. */
static struct product product_of(const struct cuda_device *d, const struct weight *matrix,
                                 const struct planes &input, float *out, int out_stride) {
    struct product p = {};
    p.matrix = matrix->matrix;
    p.input = input;
    p.out = out;
    p.out_stride = out_stride;
    p.bias_end[0] = p.bias_end[1] = INT_MAX;
    p.n_generated = &d->step->n_generated;
    p.first_row = d->n_generated;
    p.n_rows = d->n_rows - d->n_generated;
    return p;
}

/* ==== 5. Attention: softmax(q . k) . v over paged keys and values ====
 *
 * A *query* is one head of one token. The queries of a KV head's group see the same keys, so they
 * are multiplied together, with a running softmax (FlashAttention-2, Dao 2023).
 *   prompt_attention      up to 128 queries of one sequence by up to 128 tokens a step
 *   generated_attention   one token's heads; its text is cut into splits of fixed length, which
 *                         whoever ends last adds up, in order (Flash-Decoding, Dao et al. 2023)
 * In both, a warp copies keys and values into a ring (chapter 4), and eight multiply. What a query
 * gets does not depend on its neighbours: steps are counted from token 0, and one of which it sees
 * nothing changes no bit.
 *
 * In a block (see block_bytes in dynamo.h), here a *page*, a head's keys are planes of 16 rows, and
 * so are its values. HEAD: 64, 128 or 256, what head_dim is padded to. Twin of attention_rows. */

struct heads {                      /* of a layer: what rope and attention share */
    const struct step_header *step; /* device */
    uint16_t *q;                    /* bf16 (n_rows, n_heads, width) */
    uint8_t *kv;                    /* blocks */
    size_t block_bytes;
    int layer, n_heads, n_kv_heads, head_dim, width; /* width: of head_dim and zeros behind it */
};

struct attention : heads {
    struct planes out; /* heads at `places` */
    struct segments places;
    float scale;        /* log2(e) times the attention scale */
    int window;         /* tokens that a query sees at most, its own among them; INT_MAX: all */
    const float *sinks; /* (n_heads) scores of a token without a value; NULL: there is none */
    int n_stages;       /* of the ring */
    int n_chunks, part; /* chunks of heads, of all groups; floats of a chunk's sums */
    float *partial;     /* (items, part) sums of splits: see store_part */
    int *arrived;       /* (n_sequences, n_chunks) splits that are done; 0 between steps */
};

static constexpr float LOG2_E = 1.44269504f;

/* Where a head's keys (value 0) or values (1) begin in a block of a sequence. */
DEVICE struct planes page_of(const struct heads &h, const struct sequence &s, int block,
                             int kv_head, int value) {
    const int *table = array_of<int>(h.step, h.step->table);
    size_t head = (size_t)(h.layer * 2 + value) * h.n_kv_heads + kv_head;
    return {h.kv + (size_t)table[s.first_block + block] * h.block_bytes +
                head * BLOCK_TOKENS * h.width * sizeof(uint16_t),
            BLOCK_TOKENS};
}

/* Whether a query at `position` sees a token, or any of a page's, whose first is `from`. */
DEVICE bool sees(const struct attention &a, int position, int token) {
    return (unsigned)(position - token) < (unsigned)a.window;
}

DEVICE bool sees_page(const struct attention &a, int position, int from) {
    return from <= position && position - (from + BLOCK_TOKENS - 1) < a.window;
}

/* Of the token without a value, where the largest score is `most`. */
DEVICE float weight_of_sink(const struct attention &a, int head, float most) {
    return a.sinks ? exp2_approx(a.sinks[head] * LOG2_E - most) : 0.0f;
}

/* How the work is cut: finer where heads are long, so that sums fit the registers, and rings 99 KB.
 * There the two groups of four warps have the same 64 queries, and each half of their output. */
struct cut {
    int queries; /* of a block of prompt_attention */
    int step;    /* tokens of a step; half as many where warps cannot leave registers to others */
    int split;   /* tokens of a split, so few that one text fills the chip from 4k tokens on */
    int heads;   /* of a group that are multiplied together for a generated token */
    int pages;   /* bytes of a warp's part of a split */
};

static constexpr __host__ __device__ struct cut cut_of(int head) {
    const int n = head > 128 ? 1 : 2;
#ifdef HOPPER
    const int step = n * 64;
#else
    const int step = n * 32;
#endif
    return {n * 64, step, n * 128, n * 4, n * 128 / CONSUMERS * head * 4};
}

/* A lane's words of a query as operand a of mma_bf16 (N 4; half: rows group or group + 8) or b. */
template <int HEAD, int N>
DEVICE void load_query(const struct attention &a, int row, int head, int half,
                       uint32_t (&operand)[HEAD / 16][N]) {
    const uint32_t *from =
        reinterpret_cast<const uint32_t *>(a.q + ((size_t)row * a.n_heads + head) * HEAD);
#pragma unroll
    for (int i = 0; i < HEAD / 8; i++)
        operand[i / 2][i % 2 * (N / 2) + half] = from[i * 4 + threadIdx.x % 4];
}

/* ---- prompts ---- */

/* The queries of one block: [first, last] of those of a sequence and KV head, which are numbered
 * token by token, and for each token the heads of the group; the steps of tokens that they see. */
struct queries {
    struct sequence s;
    int first, last, kv_head, group, begin, end;
};

template <int HEAD> DEVICE struct queries find_queries(const struct attention &a) {
    struct queries q;
    const int2 item = array_of<int2>(a.step, a.step->prompt_items)[blockIdx.x / a.n_kv_heads];
    q.s = array_of<struct sequence>(a.step, a.step->sequences)[item.x];
    q.kv_head = (int)blockIdx.x % a.n_kv_heads;
    q.group = a.n_heads / a.n_kv_heads;
    q.first = item.y;
    q.last = smaller(q.first + cut_of(HEAD).queries, q.s.n_rows * q.group) - 1;
    const int position = q.s.start + q.first / q.group;
    q.begin = (position - smaller(position, a.window - 1)) / cut_of(HEAD).step;
    q.end = (q.s.start + q.last / q.group) / cut_of(HEAD).step + 1;
    return q;
}

/* The warp that copies: keys of the first step, then in turns keys of a step and values of the one
 * before. A lane has a page's plane; past the text's end it is the last page once more. */
template <int HEAD> DEVICE void produce_steps(const struct attention &a, struct ring r) {
    constexpr int PAGES = cut_of(HEAD).step / BLOCK_TOKENS, PLANE = BLOCK_TOKENS * ROW_BYTES;
    const struct queries q = find_queries<HEAD>(a);
    const int lane = (int)threadIdx.x % WARP, page = lane % PAGES, plane = lane / PAGES;
    const int n = q.end - q.begin, last = (q.s.start + q.s.n_rows - 1) / BLOCK_TOKENS;
    copies_see_stores();
    for (int i = 0; i < 2 * n; i++, next_stage(&r)) {
        int value = i == 2 * n - 1 || (i > 0 && i % 2 == 0), step = q.begin + (i + 1) / 2 - value;
        const struct planes from =
            page_of(a, q.s, smaller(step * PAGES + page, last), q.kv_head, value);
        copy_pieces(wait_empty(r) + (plane * PAGES + page) * PLANE, from.bytes + plane * PLANE,
                    plane < HEAD / UNIT ? PLANE : 0, false, r.full + r.at);
        copies_sent(r.full + r.at);
    }
}

/* sum (16 queries of a warp, N) = a (16, K) . b, where b is a stage's keys (N, K); VALUES: sum += a
 * . b of values (K, N), from a plane on. On Hopper it is only under way afterwards. */
template <int VALUES, int K, int N>
DEVICE void multiply(float (&sum)[N / 2], const uint32_t (&a)[K / 16][4], uint8_t *b) {
#ifdef HOPPER
    wgmma_begin();
#pragma unroll
    for (int i = 0; i < K / 16; i++)
        wgmma<N, VALUES>(sum, a[i],
                         VALUES ? wgmma_columns(b, K * ROW_BYTES) + i * 128
                                : wgmma_rows(b) + i / 4 * N * 8 + i % 4 * 2,
                         VALUES || i > 0);
    wgmma_commit();
#else
    const int lane = (int)threadIdx.x % WARP;
#pragma unroll
    for (int i = 0; i < N / 2 && !VALUES; i++)
        sum[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < K / 16; i++)
#pragma unroll
        for (int j = 0; j < N / 16; j++) {
            uint32_t part[4];
            if (VALUES)
                load_matrices_transposed(
                    part, plane_element({b, K}, i * 16 + lane % 16, j * 16 + lane / 16 * 8));
            else
                load_matrices(part, plane_element({b, N}, j * 16 + lane / 16 * 8 + lane % 8,
                                                  i * 16 + lane / 8 % 2 * 8));
            mma_bf16(sum + j * 8, a[i], part);
            mma_bf16(sum + j * 8 + 4, a[i], part + 2);
        }
#endif
}

/* Of a lane's queries, which are rows group and group + 8 of its warp's. Scores count in log2, so
 * that weights are powers of 2. */
struct softmax {
    int position[2];
    float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {}; /* sum: of this lane's tokens */
    float factor[2]; /* for what was added up before the last step */
};

/* scores of tokens `from` to `from` + N - 1 become weights. */
template <int N>
DEVICE void softmax_step(const struct attention &a, float (&scores)[N / 2], int from,
                         struct softmax *s) {
    const int first = from + (int)threadIdx.x % 4 * 2; /* of the lane */
    if (__any_sync(0xffffffffu,
                   !sees(a, s->position[0], from + N - 1) || !sees(a, s->position[1], from)))
#pragma unroll
        for (int i = 0; i < N / 2; i++)
            if (!sees(a, s->position[i / 2 % 2], first + i / 4 * 8 + i % 2))
                scores[i] = -INFINITY;
#pragma unroll
    for (int row = 0; row < 2; row++) {
        float most = -INFINITY, sum = 0.0f;
#pragma unroll
        for (int i = 0; i < N / 4; i++)
            most = fmaxf(most, scores[i / 2 * 4 + row * 2 + i % 2]);
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
        most = fmaxf(most * a.scale, s->largest[row]);
        const float base = most == -INFINITY ? 0.0f : most; /* it has seen nothing yet */
        s->factor[row] = exp2_approx(s->largest[row] - base);
        s->largest[row] = most;
#pragma unroll
        for (int i = 0; i < N / 4; i++) {
            float &score = scores[i / 2 * 4 + row * 2 + i % 2];
            score = exp2_approx(fmaf(score, a.scale, -base));
            sum += score;
        }
        s->sum[row] = fmaf(s->sum[row], s->factor[row], sum);
    }
}

/* Writes N of head_dim, from `dim` on, of a lane's queries, divided by the sums of weights. */
template <int N>
DEVICE void store_queries(const struct attention &a, const struct queries &q, int query, int dim,
                          const struct softmax &s, const float (&output)[N / 2]) {
    dim += (int)threadIdx.x % 4 * 2;
#pragma unroll
    for (int row = 0; row < 2; row++) {
        int own = query + row * 8, head = q.kv_head * q.group + own % q.group;
        float sum = s.sum[row] + __shfl_xor_sync(0xffffffffu, s.sum[row], 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if (own > q.last)
            continue;
        const int to = q.s.first_row + own / q.group, at = place(a.places, head * a.head_dim) + dim;
        const float factor = 1.0f / (sum + weight_of_sink(a, head, s.largest[row]));
#pragma unroll
        for (int i = 0; i < N / 8; i++)
            if (dim + i * 8 < a.head_dim)
                *reinterpret_cast<uint32_t *>(plane_element(a.out, to, at + i * 8)) = pack_bf16(
                    output[i * 4 + row * 2] * factor, output[i * 4 + row * 2 + 1] * factor);
    }
}

/* A warp that multiplies: 16 queries. The scores of a step are computed while the values of the
 * step before are still being added up. Stages are given back after the softmax: by then all
 * products of them are done, also where no wgmma_wait says so. */
template <int HEAD> DEVICE void attend_steps(const struct attention &a, struct ring r) {
    constexpr int TOKENS = cut_of(HEAD).step, N = HEAD > 128 ? HEAD / 2 : HEAD;
    const int row = (int)threadIdx.x / WARP * 16, dim = row / cut_of(HEAD).queries * N;
    const int mine = row % cut_of(HEAD).queries + (int)threadIdx.x % WARP / 4;
    uint32_t operand[HEAD / 16][4], weights[TOKENS / 16][4];
    float scores[TOKENS / 2], output[N / 2] = {};
    struct softmax s;
    struct queries q = find_queries<HEAD>(a);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int own = smaller(q.first + mine + half * 8, q.last), token = own / q.group;
        s.position[half] = q.s.start + token;
        load_query<HEAD>(a, q.s.first_row + token, q.kv_head * q.group + own % q.group, half,
                         operand);
    }
    multiply<0, HEAD, TOKENS>(scores, operand, wait_full(r));
    wgmma_wait<0>();
    int from = q.begin * TOKENS, last = (q.end - 1) * TOKENS;
    softmax_step<TOKENS>(a, scores, from, &s);
    next_stage(&r);
    give_back(r, 1);
    uint8_t *stage = wait_full(r); /* of the next keys, at the end of the last values */
    for (;; from += TOKENS) {
#pragma unroll
        for (int i = 0; i < TOKENS / 4; i++)
            weights[i / 4][i % 4] = pack_bf16(scores[i * 2], scores[i * 2 + 1]);
#pragma unroll
        for (int i = 0; i < N / 2; i++)
            output[i] *= s.factor[i / 2 % 2];
        if (from == last)
            break;
        next_stage(&r);
        uint8_t *values = wait_full(r) + dim * TOKENS * 2;
        next_stage(&r);
        multiply<0, HEAD, TOKENS>(scores, operand, stage);
        multiply<1, TOKENS, N>(output, weights, values);
        wgmma_wait<1>();
        softmax_step<TOKENS>(a, scores, from + TOKENS, &s);
        stage = wait_full(r);
        wgmma_wait<0>();
        give_back(r, 2);
        give_back(r, 1);
    }
    q = find_queries<HEAD>(a); /* once more: there were no registers to keep it in */
    /* Rows of values that no token has may hold NaN, which a weight of 0 does not hide. */
    for (int i = (int)threadIdx.x; i < TOKENS * HEAD / 8; i += CONSUMERS * WARP)
        if (i / 8 % TOKENS >= q.s.start + q.s.n_rows - last)
            reinterpret_cast<uint4 *>(stage)[i] = make_uint4(0, 0, 0, 0);
    wgmma_sees_stores();
    sync_threads<1, CONSUMERS * WARP>();
    multiply<1, TOKENS, N>(output, weights, stage + dim * TOKENS * 2);
    wgmma_wait<0>();
    store_queries<N>(a, q, q.first + mine, dim, s, output);
}

/* out = softmax(q . k) . v for rows of prompts. Grid: items x KV heads, long texts first. Shared:
 * the ring. Bound by the tensor cores. */
template <int HEAD>
__global__ void __launch_bounds__(PROMPT_THREADS, 1)
    prompt_attention_kernel(const struct attention a) {
    DYNAMIC_SHARED(uint8_t, shared);
    constexpr struct cut CUT = cut_of(HEAD);
    grid_launch_dependents();
    struct ring r =
        open_ring(shared, a.n_stages * (CUT.queries / CUT.step), CUT.step * HEAD * 2, 0, CONSUMERS);
    grid_wait();
    if (threadIdx.x < CONSUMERS * WARP) {
        take_registers<232>();
        attend_steps<HEAD>(a, r);
    } else {
        leave_registers<40>();
        if (threadIdx.x < FED_THREADS)
            produce_steps<HEAD>(a, r);
    }
}

/* ---- generated tokens ---- */

/* What a block works on at a time: a split, a KV head, and a chunk of its group's heads. Items are
 * numbered sequence by sequence, chunk by chunk of all its KV heads, split by split. */
struct item {
    struct sequence s; /* of one row; s.start: its position */
    int kv_head, first_head, n_heads;
    int split, n_splits;
    int counter; /* of those that share the heads */
};

template <int HEAD> DEVICE struct item find_item(const struct attention &a, int index) {
    struct item it;
    const int group = a.n_heads / a.n_kv_heads, n_chunks = a.n_chunks / a.n_kv_heads;
    const int2 entry = array_of<int2>(a.step, a.step->splits)[index / a.n_chunks];
    it.s = array_of<struct sequence>(a.step, a.step->sequences)[entry.x];
    it.n_splits = divide(it.s.start + 1, cut_of(HEAD).split);
    const int within = index - (index / a.n_chunks - entry.y) * a.n_chunks;
    const int chunk = within / it.n_splits, first = chunk % n_chunks * cut_of(HEAD).heads;
    it.split = within % it.n_splits;
    it.kv_head = chunk / n_chunks;
    it.first_head = it.kv_head * group + first;
    it.n_heads = smaller(group - first, cut_of(HEAD).heads);
    it.counter = entry.x * a.n_chunks + chunk;
    return it;
}

/* The warp that copies: a stage is the keys and values of one warp's pages. Of an item a lane has
 * the keys or the values of a page; those of which nothing is seen are not read. Pages that earlier
 * steps have filled are asked for before the kernel before this has ended, if the ring has room,
 * and if no row here is computed again with those before it. */
template <int HEAD>
DEVICE void produce_splits(const struct attention &a, struct ring r, int begin, int end) {
    constexpr int BYTES = BLOCK_TOKENS * HEAD * 2, PIECES = cut_of(HEAD).pages / BYTES;
    const int lane = (int)threadIdx.x % WARP, n = (end - begin) * CONSUMERS;
    const int n_ahead = a.step->again ? 0 : smaller(n, r.n);
    const struct ring start = r;
    struct found {
        const uint8_t *page; /* NULL: nothing of it is seen */
        bool fresh;          /* this step writes into it */
    } own = {}, next;
    auto find = [&](int i) -> struct found {
        const struct item it = find_item<HEAD>(a, smaller(begin + i / CONSUMERS, end - 1));
        int page = it.split * cut_of(HEAD).split / BLOCK_TOKENS + lane / 2;
        bool seen = sees_page(a, it.s.start, page *BLOCK_TOKENS);
        return {seen ? page_of(a, it.s, page, it.kv_head, lane % 2).bytes : NULL,
                page == it.s.start / BLOCK_TOKENS};
    };
    auto ask = [&](int i, bool old, bool fresh) {
        bool wanted = own.page && (own.fresh ? fresh : old) && lane / PIECES == i % CONSUMERS;
        copy_pieces(wait_empty(r) + lane % PIECES * BYTES, own.page, wanted ? BYTES : 0, true,
                    r.full + r.at);
    };
    for (int i = 0; i < n_ahead; i++, next_stage(&r)) {
        if (i % CONSUMERS == 0)
            own = find(i);
        ask(i, true, false);
    }
    r = start;
    next = find(0);
    grid_wait();
    copies_see_stores();
    for (int i = 0; i < n; i++, next_stage(&r)) {
        if (i % CONSUMERS == 0) {
            own = next;
            next = find(i + CONSUMERS); /* long before it is needed */
        }
        ask(i, i >= n_ahead, true);
        copies_sent(r.full + r.at);
    }
}

template <int HEAD> struct sums { /* a warp's: dims are rows, heads columns */
    float output[HEAD / 16][4] = {}, largest[2] = {-INFINITY, -INFINITY}, sum[2] = {};
};

/* Adds a page to a warp's sums; `position` counts from its first token. */
template <int HEAD>
DEVICE void attend_page(const struct attention &a, uint8_t *page, int position,
                        const uint32_t (&q)[HEAD / 16][2], struct sums<HEAD> *s) {
    const int lane = (int)threadIdx.x % WARP;
    const struct planes keys = {page, BLOCK_TOKENS},
                        values = {page + BLOCK_TOKENS * HEAD * 2, BLOCK_TOKENS};
    float halves[2][4] = {}, scores[4], factor[2];
#pragma unroll
    for (int i = 0; i < HEAD / 16; i++) {
        uint32_t k[4];
        load_matrices(k, plane_element(keys, lane % 16, i * 16 + lane / 16 * 8));
        mma_bf16(halves[i % 2], k, q[i]);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) { /* head 2 quad + i % 2 */
        bool seen = sees(a, position, lane / 4 + i / 2 * 8);
        scores[i] = seen ? (halves[0][i] + halves[1][i]) * a.scale : -INFINITY;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) { /* a page has a token that is seen: most is a number */
        float most = fmaxf(fmaxf(scores[i], scores[i + 2]), s->largest[i]);
        for (int step = 4; step < WARP; step *= 2)
            most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
        factor[i] = exp2_approx(s->largest[i] - most);
        s->largest[i] = most;
        scores[i] = exp2_approx(scores[i] - most);
        scores[i + 2] = exp2_approx(scores[i + 2] - most);
        s->sum[i] = fmaf(s->sum[i], factor[i], scores[i] + scores[i + 2]);
    }
    const uint32_t weights[2] = {transpose_matrix(pack_bf16(scores[0], scores[1])),
                                 transpose_matrix(pack_bf16(scores[2], scores[3]))};
#pragma unroll
    for (int i = 0; i < HEAD / 16; i++) {
        uint32_t v[4];
        load_matrices_transposed(
            v, plane_element(values, lane % 8 + lane / 16 * 8, i * 16 + lane / 8 % 2 * 8));
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int later = position - lane % 4 * 2 - j / 2 * 8; /* what no token has may be NaN */
            if (position < BLOCK_TOKENS - 1)
                v[j] &= later > 0 ? 0xffffffffu : later == 0 ? 0xffffu : 0u;
            s->output[i][j] *= factor[j % 2];
        }
        mma_bf16(s->output[i], v, weights);
    }
}

/* A warp's sums into shared memory, (heads, HEAD + 4): values, largest score, sum of weights. */
template <int HEAD> DEVICE void store_part(float *part, int n_heads, const struct sums<HEAD> &s) {
    const int lane = (int)threadIdx.x % WARP;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float sum = s.sum[i], *to = part + (lane % 4 * 2 + i) * (HEAD + 4);
        for (int step = 4; step < WARP; step *= 2)
            sum += __shfl_xor_sync(0xffffffffu, sum, step);
        if (lane % 4 * 2 + i >= n_heads)
            continue;
#pragma unroll
        for (int j = 0; j < HEAD / 8; j++)
            to[j * 8 + lane / 4] = s.output[j / 2][j % 2 * 2 + i];
        if (lane / 4 == 0)
            *reinterpret_cast<float2 *>(to + HEAD) = make_float2(s.largest[i], sum);
    }
}

/* Adds up `n` parts of each head, a.part floats apart, in order, some read at once. Where they are
 * all there is, their quotient is the output; else they become one part more, at `to`. */
template <int HEAD>
DEVICE void merge_parts(const struct attention &a, const struct item &it, const float *parts, int n,
                        float *to) {
    constexpr int AT_ONCE = 8;
    for (int i = (int)threadIdx.x; i < it.n_heads * HEAD / 2; i += CONSUMERS * WARP) {
        const int own = i / (HEAD / 2), head = it.first_head + own, dim = i % (HEAD / 2) * 2;
        const float *first = parts + own * (HEAD + 4);
        float x = 0.0f, y = 0.0f, sum = 0.0f, most = -INFINITY;
        for (int j = 0; j < n; j += AT_ONCE)
#pragma unroll
            for (int k = 0; k < AT_ONCE; k++)
                most = fmaxf(most, first[smaller(j + k, n - 1) * a.part + HEAD]);
        const float base = most == -INFINITY ? 0.0f : most; /* nothing of it is seen */
        for (int j = 0; j < n; j += AT_ONCE) {
            float2 value[AT_ONCE], end[AT_ONCE];
#pragma unroll
            for (int k = 0; k < AT_ONCE; k++) {
                const float *part = first + smaller(j + k, n - 1) * a.part;
                value[k] = *reinterpret_cast<const float2 *>(part + dim);
                end[k] = *reinterpret_cast<const float2 *>(part + HEAD);
            }
#pragma unroll
            for (int k = 0; k < AT_ONCE; k++) {
                float factor = j + k < n ? exp2_approx(end[k].x - base) : 0.0f;
                x = fmaf(value[k].x, factor, x);
                y = fmaf(value[k].y, factor, y);
                sum = fmaf(end[k].y, factor, sum);
            }
        }
        if (to) {
            float *whole = to + own * (HEAD + 4);
            *reinterpret_cast<float2 *>(whole + dim) = make_float2(x, y);
            if (dim == 0)
                *reinterpret_cast<float2 *>(whole + HEAD) = make_float2(most, sum);
        } else if (dim < a.head_dim) {
            sum += weight_of_sink(a, head, most);
            *reinterpret_cast<uint32_t *>(
                plane_element(a.out, it.s.first_row, place(a.places, head * a.head_dim) + dim)) =
                pack_bf16(x / sum, y / sum);
        }
    }
}

/* A warp that multiplies: its pages of each split; all warps then add up. Before it waits for its
 * stage to be full, the stage must have been given back by whoever had it before, or what was there
 * before could be taken for its own; with 4 stages or more that one is never two rounds behind. */
template <int HEAD>
DEVICE void attend_splits(const struct attention &a, struct ring r, int begin, int end) {
    const int warp = (int)threadIdx.x / WARP;
    constexpr int TOKENS = cut_of(HEAD).split / CONSUMERS;
    float *parts = reinterpret_cast<float *>(r.stages + r.n * r.bytes);
    int *last = reinterpret_cast<int *>(r.once + 1);
    uint32_t q[HEAD / 16][2];
    for (int i = 0; i < warp; i++)
        next_stage(&r);
    for (int index = begin; index < end; index++) {
        const struct item it = find_item<HEAD>(a, index);
        struct sums<HEAD> s;
        if (index == begin)
            grid_wait();
        if (index == begin || it.split == 0) { /* columns without a head are not stored */
            int head = it.first_head + smaller((int)threadIdx.x % WARP / 4, it.n_heads - 1);
            load_query<HEAD>(a, it.s.first_row, head, 0, q);
        }
        (void)wait_empty(r);
        uint8_t *pages = wait_full(r);
#pragma unroll
        for (int token = 0; token < TOKENS; token += BLOCK_TOKENS) {
            int from = (it.split * CONSUMERS + warp) * TOKENS + token;
            if (sees_page(a, it.s.start, from))
                attend_page<HEAD>(a, pages + token * HEAD * 4, it.s.start - from, q, &s);
        }
        store_part<HEAD>(parts + warp * a.part, it.n_heads, s);
        give_back(r, 0);
        for (int i = 0; i < CONSUMERS; i++)
            next_stage(&r);
        sync_threads<1, CONSUMERS * WARP>();
        float *partial = it.n_splits > 1 ? a.partial + (size_t)index * a.part : NULL;
        merge_parts<HEAD>(a, it, parts, CONSUMERS, partial);
        sync_threads<1, CONSUMERS * WARP>(); /* the parts are added up */
        if (!partial || (it.split < it.n_splits - 1 && index < end - 1))
            continue; /* the counter is told of all splits that the block has at once */
        if (threadIdx.x == 0) {
            int own = smaller(it.split, index - begin) + 1, *counter = a.arrived + it.counter;
            *last = add_ordered(counter, own) + own == it.n_splits;
            if (*last)
                *counter = 0;
        }
        sync_threads<1, CONSUMERS * WARP>();
        if (*last)
            merge_parts<HEAD>(a, it, partial - (size_t)it.split * a.part, it.n_splits, NULL);
    }
}

/* out = softmax(q . k) . v for generated tokens: a block takes items that lie side by side, so a
 * grid of fixed size serves any batch; of few items the first blocks, which start first, take one.
 * Shared: the ring, the parts of the warps, and an int. Bound by reading keys and values. */
template <int HEAD>
__global__ void __launch_bounds__(FED_THREADS, 1)
    generated_attention_kernel(const struct attention a) {
    DYNAMIC_SHARED(uint8_t, shared);
    grid_launch_dependents();
    struct ring r = open_ring(shared, a.n_stages, cut_of(HEAD).pages,
                              CONSUMERS * a.part * (int)sizeof(float), 1);
    const int n = a.step->n_splits * a.n_chunks,
              blocks = (int)gridDim.x; /* no kernel wrote the step */
    auto share = [&](int block) {
        return n < blocks ? smaller(block, n) : (int)((int64_t)block * n / blocks);
    };
    const int begin = share((int)blockIdx.x), end = share((int)blockIdx.x + 1);
    if (begin < end && threadIdx.x < CONSUMERS * WARP)
        attend_splits<HEAD>(a, r, begin, end);
    else if (begin < end)
        produce_splits<HEAD>(a, r, begin, end);
    else
        grid_wait();
}

/* ---- the op ---- */

template <int HEAD> static void launch_attention(struct cuda_device *d, const struct attention &a) {
    if (d->n_prompt_items > 0) /* a stage so large, or two: see struct cut */
        launch_fed(d, "prompt_attention_kernel", prompt_attention_kernel<HEAD>,
                   d->n_prompt_items * d->n_kv_heads, PROMPT_THREADS,
                   cut_of(HEAD).queries * HEAD * 2, 0, MAX_STAGES / 2, a);
    if (d->n_generated > 0) {
        int most = d->card->properties.multiProcessorCount, stage = cut_of(HEAD).pages;
        int parts = CONSUMERS * a.part * (int)sizeof(float);
        assert(stages_of(d, stage, parts) >= 4);
        launch_fed(d, "generated_attention_kernel", generated_attention_kernel<HEAD>,
                   d->recording ? most : smaller(d->n_splits * a.n_chunks, most), FED_THREADS,
                   stage, parts, MAX_STAGES, a);
    }
}

static void launch_attention(struct cuda_device *d, const struct attention &a) {
    switch (a.width) {
    case 64: launch_attention<64>(d, a); break;
    case 128: launch_attention<128>(d, a); break;
    default: launch_attention<256>(d, a);
    }
}

static struct heads heads_of(const struct cuda_device *d, int layer) {
    const struct model_config *c = d->device.config;
    const size_t bytes = block_bytes(c, d->device.n_shards, KV_BF16);
    uint8_t *kv = (uint8_t *)d->device.kv;
    const int width = kv_head_dim(c, KV_BF16);
    return {d->step, d->q, kv, bytes, layer, d->n_heads, d->n_kv_heads, c->head_dim, width};
}

/* Of a vector that a layer may not have. */
static const float *vector_of(const struct weight *weight) {
    return weight ? weight->vector : NULL;
}

static struct attention attention_of(const struct cuda_device *d, const struct weight *sinks,
                                     int layer) {
    const struct model_config *c = d->device.config;
    const float usual = 1.0f / sqrtf((float)c->head_dim);
    return {heads_of(d, layer),
            d->attention,
            d->attention_places,
            LOG2_E * (c->attention_scale > 0.0f ? c->attention_scale : usual),
            model_window(c, layer),
            vector_of(sinks),
            0,
            d->n_chunks,
            d->part,
            d->partial,
            d->arrived};
}

static void cuda_attention(struct device *device, const struct weight *const *layer,
                           int layer_index) {
    struct cuda_device *d = (struct cuda_device *)device;
    launch_attention(d, attention_of(d, layer[ATTN_SINKS], layer_index));
}

/* ==== 6. Embedding, norm, rope: one block or warp a row, bound by memory ==== */

enum { ALL_ROWS = -1 };

struct turns { /* see struct cuda_device */
    float2 *turn;
    const float *frequency;
    int n_turns, n_rows, n_pairs;
    float magnitude; /* of cosine and sine */
};

/* x = token_embd[token] * scale, and the angles of the row's position. */
__global__ void embed_kernel(const struct step_header *step, const struct matrix embedding,
                             float scale, float *x, int x_stride, int d_model,
                             const struct turns t) {
    grid_wait();
    grid_launch_dependents();
    int row = (int)blockIdx.x;
    if (row >= step->n_rows)
        return;
    int token = array_of<int>(step, step->token)[row];
    int position = array_of<int>(step, step->position)[row];
    for (int i = (int)threadIdx.x; i < d_model; i += THREADS)
        x[(size_t)row * x_stride + i] = matrix_element(embedding, token, i) * scale;
    for (int i = (int)threadIdx.x; i < t.n_turns * t.n_pairs; i += THREADS) {
        double angle = (double)position * (double)t.frequency[i];
        double halves = angle * 0.31830988618379067; /* of a turn: cos would need a stack */
        size_t to = ((size_t)(i / t.n_pairs) * t.n_rows + row) * t.n_pairs + i % t.n_pairs;
        t.turn[to] =
            make_float2((float)cospi(halves) * t.magnitude, (float)sinpi(halves) * t.magnitude);
    }
}

static void cuda_embed(struct device *device, const struct weight *token_embd) {
    struct cuda_device *d = (struct cuda_device *)device;
    const struct model_config *c = device->config;
    const struct turns turns = {
        d->turn,          d->rope_frequency, d->n_turns,
        device->max_rows, c->rope_dim / 2,   c->rope_magnitude > 0.0f ? c->rope_magnitude : 1.0f};
    launch(d, "embed_kernel", embed_kernel, d->n_rows, THREADS, 0, d->step, token_embd->matrix,
           c->embedding_scale > 0.0f ? c->embedding_scale : 1.0f, d->x, d->x_stride, c->d_model,
           turns);
}

/* The sum of all threads' values, in every thread, in a fixed order. shared: (THREADS / 32) */
DEVICE float sum_of_block(float value, float *shared) {
    value = sum_of_warp(value);
    if (threadIdx.x % WARP == 0)
        shared[threadIdx.x / WARP] = value;
    __syncthreads();
    value = 0.0f;
    for (int i = 0; i < THREADS / WARP; i++)
        value += shared[i];
    return value;
}

/* 1 / root mean square of a row's n elements, in every thread. shared: as above */
DEVICE float scale_of_row(const float *row, int n, float epsilon, float *shared) {
    float squares = 0.0f;
    for (int i = (int)threadIdx.x; i < n; i += THREADS)
        squares += row[i] * row[i];
    return scale_of_norm(sum_of_block(squares, shared), n, epsilon);
}

/* h = rmsnorm(x) * weight as bf16, of all rows, or of those that sample; of generated rows that do
 * not, x * weight: see struct normed. What pads x and the weight to a multiple of 8 is 0. */
__global__ void norm_kernel(const struct step_header *step, int first_sample, const float *x,
                            int x_stride, const struct normed n, const float *weight,
                            const struct planes h) {
    DYNAMIC_SHARED(float, shared);
    grid_launch_dependents();
    const bool samples = first_sample != ALL_ROWS;
    const int index = (int)blockIdx.x + (samples ? first_sample : 0);
    const bool there = index < (samples ? step->n_samples : step->n_rows);
    const int row = there && samples ? array_of<int>(step, step->sample_row)[index] : index;
    grid_wait();
    if (!there)
        return;
    const bool scaled = samples || row >= step->n_generated;
    const float *from = x + (size_t)row * x_stride;
    float scale = 1.0f;
    if (scaled) {
        float squares = 0.0f;
        for (int i = (int)threadIdx.x * 4; i < x_stride; i += THREADS * 4) {
            float4 v = *reinterpret_cast<const float4 *>(from + i);
            squares += (v.x * v.x + v.y * v.y) + (v.z * v.z + v.w * v.w);
        }
        scale = scale_of_norm(sum_of_block(squares, shared), n.width, n.epsilon);
    }
    for (int first = 0; first < x_stride; first += THREADS * 8) {
        const int i = first + (int)threadIdx.x * 8;
        alignas(16) float v[8] = {}, w[8];
        if (i < x_stride) {
            uint32_t words[4];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                reinterpret_cast<float4 *>(v)[j] = reinterpret_cast<const float4 *>(from + i)[j];
                reinterpret_cast<float4 *>(w)[j] = reinterpret_cast<const float4 *>(weight + i)[j];
            }
#pragma unroll
            for (int j = 0; j < 4; j++)
                words[j] =
                    pack_bf16(v[j * 2] * scale * w[j * 2], v[j * 2 + 1] * scale * w[j * 2 + 1]);
            *reinterpret_cast<uint4 *>(plane_element(h, (int)blockIdx.x, i)) =
                make_uint4(words[0], words[1], words[2], words[3]);
        }
        if (scaled)
            continue;
#pragma unroll
        for (int j = 0; j < 8; j++) { /* in the order of add_normed */
            v[j] *= v[j];
            v[j] += __shfl_xor_sync(0xffffffffu, v[j], 1);
        }
        if (threadIdx.x % 2 == 0 && i < x_stride)
            shared[i / TILE] = ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
    }
    __syncthreads();
    if (scaled || threadIdx.x >= WARP)
        return;
    float sum = sum_of_tiles(shared, divide(n.width, TILE));
    if (threadIdx.x == 0)
        n.squares[row] = sum;
}

static int norm_tiles(const struct cuda_device *d) { /* of whole panels */
    return divide(d->device.config->d_model, PANEL) * (PANEL / TILE);
}

static struct normed normed_of(const struct cuda_device *d) {
    const struct model_config *c = d->device.config;
    return {d->squares, d->normed ? norm_tiles(d) : 1, c->d_model, c->norm_epsilon};
}

/* Of all rows: first_sample ALL_ROWS; or of n samples from that one on. */
static void launch_norm(struct cuda_device *d, const struct weight *weight, int first_sample,
                        int n) {
    launch(d, "norm_kernel", norm_kernel, n, THREADS,
           (size_t)larger(norm_tiles(d), THREADS / WARP) * sizeof(float), d->step, first_sample,
           d->x, d->x_stride, normed_of(d), weight->vector, d->h);
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
    struct planes to;  /* q: of one row, so that its elements lie as they are */
    int row;
};

DEVICE struct head find_head(const struct rope &r, int row, int index) {
    const float *from = r.qkv + (size_t)row * r.qkv_stride + index * r.head_dim;
    uint16_t *q = r.q + ((size_t)row * r.n_heads + index) * r.width;
    if (index < r.n_heads)
        return {from, r.q_norm, r.rope_dim, {(uint8_t *)q, 1}, 0};
    int kv_head = (index - r.n_heads) % r.n_kv_heads, value = index >= r.n_heads + r.n_kv_heads;
    int position = array_of<int>(r.step, r.step->position)[row], token = position % BLOCK_TOKENS;
    int sequence = array_of<int>(r.step, r.step->row_sequence)[row];
    const struct sequence &s = array_of<struct sequence>(r.step, r.step->sequences)[sequence];
    struct planes to = page_of(r, s, position / BLOCK_TOKENS, kv_head, value);
    return {from, value ? NULL : r.k_norm, value ? 0 : r.rope_dim, to, token};
}

/* 1 / root mean square of a head's elements, in all lanes of a warp. */
DEVICE float scale_of_head(const float *from, int head_dim, float epsilon, int lane) {
    float squares = 0.0f;
    for (int i = lane; i < head_dim; i += WARP)
        squares += from[i] * from[i];
    return scale_of_norm(sum_of_warp(squares), head_dim, epsilon);
}

/* The elements of a head that turn together as pair `pair`, or stay as they are. */
DEVICE int2 find_pair(const struct rope &r, int n_turned, int pair) {
    if (r.adjacent || pair >= n_turned / 2)
        return make_int2(2 * pair, 2 * pair + 1);
    return make_int2(pair, pair + n_turned / 2);
}

/* q, k: norm over head_dim where there is one, then rope; q as bf16, k and v into their block, with
 * zeros up to `width`. One warp a row and head of q, k or v. */
__global__ void rope_append_kernel(const struct rope r) {
    grid_launch_dependents();
    int row = (int)blockIdx.x, lane = (int)threadIdx.x % WARP;
    int index = (int)blockIdx.y * (THREADS / WARP) + (int)threadIdx.x / WARP;
    struct head head = {};
    if (row < r.step->n_rows && index < r.n_heads + 2 * r.n_kv_heads)
        head = find_head(r, row, index);
    grid_wait();
    if (!head.from)
        return;
    float scale = head.norm ? scale_of_head(head.from, r.head_dim, r.epsilon, lane) : 1.0f;
    for (int pair = lane; pair < r.width / 2; pair += WARP) {
        const int2 at = find_pair(r, head.n_turned, pair);
        bool there = at.y < r.head_dim;
        float a = there ? head.from[at.x] : 0.0f, b = there ? head.from[at.y] : 0.0f;
        if (head.norm && there) {
            a *= scale * head.norm[at.x];
            b *= scale * head.norm[at.y];
        }
        float2 turn = make_float2(1.0f, 0.0f);
        if (pair < head.n_turned / 2)
            turn = r.turn[(size_t)row * (r.rope_dim / 2) + pair];
        uint32_t both = pack_bf16(a * turn.x - b * turn.y, a * turn.y + b * turn.x);
        uint16_t *to = plane_element(head.to, head.row, at.x);
        if (at.y == at.x + 1) {
            *reinterpret_cast<uint32_t *>(to) = both;
        } else {
            *to = (uint16_t)both;
            *plane_element(head.to, head.row, at.y) = (uint16_t)(both >> 16);
        }
    }
}

static void cuda_rope_append(struct device *device, const struct weight *const *layer,
                             int layer_index) {
    struct cuda_device *d = (struct cuda_device *)device;
    const struct model_config *c = device->config;
    const bool windowed = d->n_turns > 1 && model_window(c, layer_index) < INT_MAX;
    const struct rope r = {heads_of(d, layer_index),
                           d->qkv,
                           d->qkv_stride,
                           c->rope_dim,
                           c->rope_adjacent,
                           c->norm_epsilon,
                           vector_of(layer[ATTN_Q_NORM]),
                           vector_of(layer[ATTN_K_NORM]),
                           d->turn + (windowed ? device->max_rows * (c->rope_dim / 2) : 0)};
    int heads = d->n_heads + 2 * d->n_kv_heads;
    launch(d, "rope_append_kernel", rope_append_kernel,
           dim3(d->n_rows, divide(heads, THREADS / WARP)), THREADS, 0, r);
}

/* ==== 7. The products of a layer; several shards; experts ==== */

enum { CHAIN_ROWS = 256 /* prompt rows that a shard hands to the next at a time */ };

static void multiply_qkv(struct cuda_device *d, const struct weight *const *layer) {
    struct product p = product_of(d, layer[ATTN_Q], d->h, d->qkv, d->qkv_stride); /* with k, v */
    p.bias_end[0] = d->n_heads * d->device.config->head_dim;
    p.bias_end[1] = p.bias_end[0] + d->n_kv_heads * d->device.config->head_dim;
    for (int i = 0; i < 3; i++) {
        const float *bias = vector_of(layer[Q_BIAS + i]);
        p.bias[i] = bias ? bias - (i > 0 ? p.bias_end[i - 1] : 0) : NULL;
    }
    p.rows = normed_of(d);
    launch_product<STORE>(d, p, d->n_generated);
}

/* Of gate with up, whose biases follow each other too. */
static struct product gated(const struct cuda_device *d, const struct weight *const *layer,
                            int role, int bias) {
    struct product p = product_of(d, layer[role], d->h, NULL, 0);
    p.bias[0] = vector_of(layer[bias]);
    p.bias[1] = vector_of(layer[bias + 1]);
    p.activation = d->device.config->activation;
    p.ffn = d->ffn;
    p.ffn_places = d->ffn_places;
    return p;
}

static void multiply_gate_up(struct cuda_device *d, const struct weight *const *layer) {
    struct product p = gated(d, layer, FFN_GATE, FFN_GATE_BIAS);
    p.rows = normed_of(d);
    launch_product<GATED>(d, p, d->n_generated);
}

static struct product projection(const struct cuda_device *d, const struct weight *matrix,
                                 enum product_input input, float *out, const float *bias) {
    const struct planes &rows = input == INPUT_ATTENTION ? d->attention : d->ffn;
    struct product p = product_of(d, matrix, rows, out, d->x_stride);
    p.bias[0] = bias;
    return p;
}

/* Where the sum of all shards goes: with a norm behind it, it is not added to x at once. */
static float *sum_of_layer(const struct cuda_device *d) {
    return d->total ? d->total : d->x;
}

/* The product that waits, if one does, and the norm behind it, if there is one. */
static void project_pending(struct cuda_device *d, const struct weight *norm) {
    const bool waits = d->pending && d->device.n_shards == 1;
    d->normed = waits;
    if (waits) {
        struct product p =
            projection(d, d->pending, d->pending_input, sum_of_layer(d), d->pending_bias);
        p.adds = !d->total;
        if (norm) {
            p.next = normed_of(d);
            p.next_norm = norm->vector;
            p.next_input = d->h;
        }
        launch_product<STORE>(d, p, d->n_generated);
        d->pending = NULL;
    } else if (norm)
        launch_norm(d, norm, ALL_ROWS, d->n_rows);
}

/* One of several shards: generated rows' sums are left for all_reduce_add, prompt rows' are made
 * there, for each shard goes on where the one before it ended. Of one shard: where few generated
 * rows are recorded, it waits for the norm behind it, which is then done together with it. */
static void cuda_project_add(struct device *device, const struct weight *matrix,
                             enum product_input input) {
    struct cuda_device *d = (struct cuda_device *)device;
    d->pending = matrix;
    d->pending_input = input;
    d->pending_bias = d->next_bias;
    d->next_bias = NULL;
    if (device->n_shards == 1) {
        if (!d->recording || d->n_rows > NORMED_ROWS || d->total)
            project_pending(d, NULL);
        return;
    }
    d->turn_of_sums ^= 1;
    struct product p = projection(d, matrix, input, d->sums[d->turn_of_sums], NULL);
    p.n_rows = 0;
    launch_product<STORE>(d, p, d->n_generated);
}

static void cuda_norm_qkv(struct device *device, const struct weight *const *layer) {
    struct cuda_device *d = (struct cuda_device *)device;
    project_pending(d, layer[ATTN_NORM]);
    multiply_qkv(d, layer);
}

static void cuda_norm_gate_up(struct device *device, const struct weight *const *layer) {
    struct cuda_device *d = (struct cuda_device *)device;
    project_pending(d, layer[FFN_NORM]);
    multiply_gate_up(d, layer);
}

/* ---- several shards; what is added to x ---- */

/* x += rmsnorm(from) * weight. A block a row. */
__global__ void add_normed_kernel(const struct step_header *step, float *x, int x_stride,
                                  const float *from, const float *weight, int n, float epsilon) {
    DYNAMIC_SHARED(float, shared);
    grid_launch_dependents();
    const size_t at = (size_t)blockIdx.x * x_stride;
    grid_wait();
    if ((int)blockIdx.x >= step->n_rows)
        return;
    const float scale = scale_of_row(from + at, n, epsilon, shared);
    for (int i = (int)threadIdx.x; i < n; i += THREADS)
        x[at + i] += from[at + i] * scale * weight[i];
}

struct partial_sums {
    const float *of_shard[MAX_SHARDS];
};

/* to (n_rows, width) += or = the shards' sums, added as a binary tree, and bias (width). */
__global__ void reduce_kernel(float *to, bool adds, const struct partial_sums sums, int n_shards,
                              int n, const float *bias, int width) {
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
    value[0] += bias ? bias[i % width] : 0.0f;
    to[i] = adds ? to[i] + value[0] : value[0];
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

/* Of rows [0, end) every shard fetches the sums of all others, and adds the same tree to its x. */
static void reduce_rows(struct cuda_device **shards, int n_shards, int end) {
    int piece = larger(shards[0]->device.max_rows / n_shards, 1); /* `gathered` holds n_shards */
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
            launch(d, "reduce_kernel", reduce_kernel, divide(n, THREADS), THREADS, 0,
                   sum_of_layer(d) + at, !d->total, sums, n_shards, n,
                   d->pending ? d->pending_bias : NULL, d->x_stride);
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
            const bool ends = d == last;
            struct product p = projection(d, d->pending, d->pending_input,
                                          ends ? sum_of_layer(d) : d->sums[d->turn_of_sums],
                                          ends ? d->pending_bias : NULL);
            p.first_row = row;
            p.n_rows = n;
            p.adds = ends && !d->total;
            if (s > 0) {
                struct cuda_device *before = shards[s - 1];
                fetch_sums(d, d->gathered + at, before, before->sums[before->turn_of_sums] + at,
                           bytes);
                p.initial = d->gathered;
            }
            launch_product<STORE>(d, p, 0);
        }
        for (int s = 0; s < n_shards - 1; s++)
            fetch_sums(shards[s], sum_of_layer(shards[s]) + at, last, sum_of_layer(last) + at,
                       bytes);
    }
}

/* Experts have left sums of all rows, projections those of generated ones. */
static void cuda_all_reduce_add(struct device **shards, int n_shards,
                                const struct weight *const *norm) {
    struct cuda_device **all = (struct cuda_device **)shards;
    const int n_rows = all[0]->n_rows, end = all[0]->pending ? all[0]->n_generated : n_rows;
    if (n_shards > 1 && end > 0)
        reduce_rows(all, n_shards, end);
    if (n_shards > 1 && n_rows > end)
        chain_prompts(all, n_shards);
    for (int s = 0; s < n_shards && norm; s++) {
        struct cuda_device *d = enter(shards[s], "adding up shards");
        launch(d, "add_normed_kernel", add_normed_kernel, n_rows, THREADS,
               THREADS / WARP * sizeof(float), d->step, d->x, d->x_stride, d->total,
               norm[s]->vector, d->device.config->d_model, d->device.config->norm_epsilon);
    }
}

/* To be added with what is projected next: alone it could change an x that others still copy. */
static void cuda_add_bias(struct device *device, const struct weight *bias) {
    ((struct cuda_device *)device)->next_bias = bias->vector;
}

/* ---- experts ---- */

/* logits (n_rows, n_experts) = router . rmsnorm(x) + bias: a block a row and 8 experts, a warp an
 * expert; all in f32. */
__global__ void route_kernel(const struct step_header *step, const float *x, int x_stride,
                             int d_model, float epsilon, const float *norm, const float *router,
                             const float *bias, int n_experts, float *logits) {
    DYNAMIC_SHARED(float, shared);
    grid_launch_dependents();
    const int row = (int)blockIdx.x, lane = (int)threadIdx.x % WARP;
    const int expert = (int)blockIdx.y * (THREADS / WARP) + (int)threadIdx.x / WARP;
    const float *from = x + (size_t)row * x_stride;
    const float *weight = router + (size_t)smaller(expert, n_experts - 1) * d_model;
    float sum = 0.0f;
    grid_wait();
    if (row >= step->n_rows)
        return;
    const float scale = scale_of_row(from, d_model, epsilon, shared);
    for (int i = lane; i < d_model; i += WARP)
        sum = fmaf(from[i] * scale * norm[i], weight[i], sum);
    sum = sum_of_warp(sum);
    if (lane == 0 && expert < n_experts)
        logits[(size_t)row * n_experts + expert] = sum + (bias ? bias[expert] : 0.0f);
}

/* Of each row the n_used experts with the largest logits, of equals those that come first, and
 * their shares. A warp a row; a lane has every 32nd logit, which becomes -inf when it is chosen. */
__global__ void choose_kernel(const struct step_header *step, float *logits, int n_experts,
                              int n_used, bool share_of_all, int *chosen, float *share) {
    grid_launch_dependents();
    const int lane = (int)threadIdx.x % WARP;
    const int row = (int)blockIdx.x * (THREADS / WARP) + (int)threadIdx.x / WARP;
    grid_wait();
    if (row >= step->n_rows)
        return;
    float *own = logits + (size_t)row * n_experts, largest = 0.0f, sum = 0.0f;
    for (int i = 0; i < n_used; i++) {
        float most = -INFINITY;
        int expert = n_experts - 1;
        for (int e = lane; e < n_experts; e += WARP)
            if (own[e] > most) {
                most = own[e];
                expert = e;
            }
        for (int step_of = 16; step_of > 0; step_of /= 2) {
            float other = __shfl_xor_sync(0xffffffffu, most, step_of);
            int other_expert = __shfl_xor_sync(0xffffffffu, expert, step_of);
            if (other > most || (other == most && other_expert < expert)) {
                most = other;
                expert = other_expert;
            }
        }
        if (i == 0) {
            largest = most;
            for (int e = lane; e < n_experts && share_of_all; e += WARP)
                sum += expf(own[e] - largest);
            sum = sum_of_warp(sum);
        }
        const float part = expf(most - largest);
        sum += share_of_all ? 0.0f : part;
        if (lane == 0) {
            chosen[row * n_used + i] = expert;
            share[row * n_used + i] = part;
        }
        if (expert % WARP == lane)
            own[expert] = -INFINITY;
    }
    for (int i = 0; i < n_used && lane == 0; i++)
        share[row * n_used + i] /= sum;
}

/* The places of entries, -1: another shard's; and their tiles. One block; shared: (2, n_own). */
__global__ void group_kernel(const struct step_header *step, const int *chosen, int n_used,
                             int first_own, int n_own, int tile, int *entry,
                             struct group_list *groups) {
    DYNAMIC_SHARED(int, count);
    grid_launch_dependents();
    int *next = count + n_own;
    for (int i = (int)threadIdx.x; i < n_own; i += THREADS)
        count[i] = 0;
    grid_wait();
    __syncthreads();
    const int n = step->n_rows * n_used;
    for (int i = (int)threadIdx.x; i < n; i += THREADS)
        if ((unsigned)(chosen[i] - first_own) < (unsigned)n_own)
            atomicAdd(&count[chosen[i] - first_own], 1);
    __syncthreads();
    if (threadIdx.x == 0) {
        int n_tiles = 0, first = 0;
        for (int expert = 0; expert < n_own; expert++) {
            const int end = first + count[expert];
            next[expert] = first;
            for (int at = first; at < end; at += tile)
                groups->tiles[n_tiles++] = {expert, at, smaller(at + tile, end)};
            first = divide(end, 8) * 8;
        }
        groups->n = n_tiles;
    }
    __syncthreads();
    for (int i = (int)threadIdx.x; i < n; i += THREADS) {
        const int own = chosen[i] - first_own;
        entry[i] = (unsigned)own < (unsigned)n_own ? atomicAdd(&next[own], 1) : -1;
    }
}

/* h = rmsnorm(x) * weight as bf16, of each row in the places of all its entries, with zeros up to
 * x_stride: a row that is no number may have left its like there. A block a row. */
__global__ void spread_kernel(const struct step_header *step, const float *x, int x_stride,
                              int d_model, float epsilon, const float *norm, const int *entry,
                              int n_used, const struct planes h) {
    DYNAMIC_SHARED(float, shared);
    grid_launch_dependents();
    const int row = (int)blockIdx.x;
    const float *from = x + (size_t)row * x_stride;
    grid_wait();
    if (row >= step->n_rows)
        return;
    const float scale = scale_of_row(from, d_model, epsilon, shared);
    for (int i = (int)threadIdx.x * 2; i < x_stride; i += THREADS * 2) { /* zeros pad x and norm */
        uint32_t both = pack_bf16(from[i] * scale * norm[i], from[i + 1] * scale * norm[i + 1]);
        for (int j = 0; j < n_used; j++)
            if (entry[row * n_used + j] >= 0)
                *reinterpret_cast<uint32_t *>(plane_element(h, entry[row * n_used + j], i)) = both;
    }
}

/* to += or = each row's outputs of its experts by their shares, summed by groups of experts, and
 * those as a binary tree: see expert_group. A block a row. */
__global__ void combine_kernel(const struct step_header *step, const int *chosen, const int *entry,
                               const float *share, int n_used, int n_experts, int n_shards,
                               const float *out, float *to, int x_stride, int d_model, bool adds) {
    grid_launch_dependents();
    const int row = (int)blockIdx.x, n_own = K_SEGMENTS / n_shards;
    grid_wait();
    if (row >= step->n_rows)
        return;
    for (int i = (int)threadIdx.x; i < d_model; i += THREADS) {
        float sum[K_SEGMENTS];
#pragma unroll
        for (int group = 0; group < K_SEGMENTS; group++) {
            sum[group] = 0.0f;
            for (int j = row * n_used; j < (row + 1) * n_used; j++)
                if (entry[j] >= 0 && chosen[j] * K_SEGMENTS / n_experts % n_own == group)
                    sum[group] = fmaf(share[j], out[(size_t)entry[j] * x_stride + i], sum[group]);
        }
#pragma unroll
        for (int n = K_SEGMENTS; n > 1; n /= 2)
#pragma unroll
            for (int j = 0; j < n / 2; j++)
                sum[j] = sum[2 * j] + sum[2 * j + 1];
        float *at = to + (size_t)row * x_stride + i;
        *at = adds ? *at + sum[0] : sum[0];
    }
}

static void cuda_norm_route(struct device *device, const struct weight *const *layer) {
    struct cuda_device *d = (struct cuda_device *)device;
    const struct model_config *c = device->config;
    const int n_warps = THREADS / WARP, first = first_expert(c, device->rank, device->n_shards);
    const int n_own = first_expert(c, device->rank + 1, device->n_shards) - first;
    const float *norm = layer[FFN_NORM]->vector;
    project_pending(d, NULL);
    launch(d, "route_kernel", route_kernel, dim3(d->n_rows, divide(c->n_experts, n_warps)), THREADS,
           n_warps * sizeof(float), d->step, d->x, d->x_stride, c->d_model, c->norm_epsilon, norm,
           layer[ROUTER]->vector, vector_of(layer[ROUTER_BIAS]), c->n_experts, d->router);
    launch(d, "choose_kernel", choose_kernel, divide(d->n_rows, n_warps), THREADS, 0, d->step,
           d->router, c->n_experts, c->n_used, c->share_of_all, d->chosen, d->share);
    launch(d, "group_kernel", group_kernel, 1, THREADS, 2 * sizeof(int) * (size_t)larger(n_own, 1),
           d->step, d->chosen, c->n_used, first, n_own, entry_tile(d), d->entry, d->groups);
    launch(d, "spread_kernel", spread_kernel, d->n_rows, THREADS, n_warps * sizeof(float), d->step,
           d->x, d->x_stride, c->d_model, c->norm_epsilon, norm, d->entry, c->n_used, d->h);
}

static void cuda_expert_gate_up(struct device *device, const struct weight *const *layer) {
    struct cuda_device *d = (struct cuda_device *)device;
    struct product p = gated(d, layer, GATE_EXPERTS, GATE_EXPERTS_BIAS);
    p.groups = d->groups;
    launch_experts<GATED>(d, p);
}

static void cuda_expert_down_add(struct device *device, const struct weight *const *layer) {
    struct cuda_device *d = (struct cuda_device *)device;
    const struct model_config *c = device->config;
    struct product p = product_of(d, layer[DOWN_EXPERTS], d->ffn, d->expert_out, d->x_stride);
    p.bias[0] = vector_of(layer[DOWN_EXPERTS_BIAS]);
    p.groups = d->groups;
    launch_experts<STORE>(d, p);
    d->pending = NULL;
    d->turn_of_sums ^= 1;
    const bool alone = device->n_shards == 1;
    launch(d, "combine_kernel", combine_kernel, d->n_rows, THREADS, 0, d->step, d->chosen, d->entry,
           d->share, c->n_used, c->n_experts, device->n_shards, d->expert_out,
           alone ? sum_of_layer(d) : d->sums[d->turn_of_sums], d->x_stride, c->d_model,
           alone && !d->total);
}

/* ==== 8. Logits and samples ==== */

/* One stage of drawing sampled[i] (pinned) from the logits of sample i, from first_sample on; a
 * block has `part` tokens of a row. rows: (gridDim.y), zero before and after all stages. */
__global__ void __launch_bounds__(SAMPLER_THREADS, 2)
    sample_kernel(const struct step_header *step, int stage, int first_sample, const float *logits,
                  int logits_stride, int n_vocab, int part, struct sampler_row *rows,
                  int *sampled) {
    DYNAMIC_SHARED(sampler_key, shared);
    grid_launch_dependents();
    int sample = smaller(first_sample + (int)blockIdx.y, step->n_samples - 1);
    int first = (int)blockIdx.x * part, row = array_of<int>(step, step->sample_row)[sample];
    struct draw d = {};
    d.sampling = array_of<struct sampling>(step, step->sampling)[sample];
    d.position = array_of<int>(step, step->position)[row] + 1; /* no kernel wrote the step */
    grid_wait();
    if (sample < first_sample + (int)blockIdx.y)
        return;
    d.logits = logits + (size_t)blockIdx.y * logits_stride;
    d.n = n_vocab;
    d.first = first;
    d.end = smaller(first + part, n_vocab);
    d.n_parts = (int)gridDim.x;
    d.row = &rows[blockIdx.y];
    d.shared = shared;
    if (stage == 0)
        sampler_maximum(d);
    else if (stage < SAMPLER_STAGES - 1)
        sampler_select(d, stage - 1);
    else
        sampler_race(d, &sampled[sample]);
}

static_assert(LOGIT_ROWS >= 8 * GRAPHS, "a recorded step has all its samples at once");
/* Logits of samples [first, first + n) of the step, whose normed rows are in h. They take the
 * kernel of generated rows, whatever rows they are: there are few. */
static void multiply_logits(struct cuda_device *d, const struct weight *output, int first, int n) {
    struct product p = product_of(d, output, d->h, d->logits, d->logits_stride);
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
    for (int stage = 0; stage < SAMPLER_STAGES; stage++)
        launch(d, "sample_kernel", sample_kernel, dim3(divide(vocab, part), n), SAMPLER_THREADS,
               SAMPLER_SHARED, d->step, stage, first, d->logits, d->logits_stride, vocab, part,
               d->sampler_rows, d->sampled);
}

/* What samples [first, first + n), the last that were drawn, ask for of their logits. */
static void read_tops(struct cuda_device *d, int first, int n) {
    const int vocab = d->device.config->vocab_size;
    float *logits = NULL;
    cudaStream_t stream = d->streams[STREAM_COMPUTE];
    for (int i = 0; i < n && d->top; i++) {
        if (!d->top[first + i])
            continue;
        logits = logits ? logits : (float *)grow(NULL, 0, (size_t)vocab * sizeof *logits);
        TRY(d, cudaMemcpyAsync(logits, d->logits + (size_t)i * d->logits_stride,
                               (size_t)vocab * sizeof *logits, cudaMemcpyDeviceToHost, stream));
        TRY(d, cudaStreamSynchronize(stream));
        if (d->sampled[first + i] >= 0)
            sampler_top(logits, vocab, d->sampled[first + i], d->top[first + i]);
    }
    free(logits);
}

static void cuda_sample(struct device *device, const struct weight *const *weights, float *logits) {
    struct cuda_device *d = enter(device, "sampling");
    size_t vocab = (size_t)device->config->vocab_size, width = vocab * sizeof(float);
    assert(!logits || !d->recording);
    project_pending(d, NULL);
    for (int first = 0; first < d->n_samples; first += LOGIT_ROWS) {
        int n = smaller(d->n_samples - first, LOGIT_ROWS);
        if (first > 0)
            read_tops(d, first - LOGIT_ROWS, LOGIT_ROWS);
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
    for (int i = 0; i <= GRAPHS; i++) {
        if (d->graphs[i].exec)
            TRY(d, cudaGraphExecDestroy(d->graphs[i].exec));
        d->graphs[i].exec = NULL;
    }
}

/* Makes room for a step of so many bytes and so many splits. */
static void reserve_step(struct cuda_device *d, size_t bytes, size_t n_splits) {
    size_t split_bytes = sizeof(float) * (size_t)d->n_chunks * (size_t)d->part;
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
 * (NULL). Of a prompt the last tiles come first: they see the most, and take longest. */
static void list_work(struct cuda_device *d, const struct batch *batch, int2 *items, int2 *splits) {
    int head = kv_head_dim(d->device.config, KV_BF16), group = d->n_heads / d->n_kv_heads;
    int tile = cut_of(head).queries, split = cut_of(head).split;
    d->n_prompt_items = d->n_splits = 0;
    for (int i = 0; i < batch->n_sequences; i++) {
        const struct sequence *s = &batch->sequence[i];
        int n = s->generated ? divide(s->start + 1, split) : divide(s->n_rows * group, tile);
        int *count = s->generated ? &d->n_splits : &d->n_prompt_items;
        int2 *list = s->generated ? splits : items;
        for (int j = 0; j < n && list; j++)
            list[*count + j] = make_int2(i, s->generated ? j : (n - 1 - j) * tile);
        *count += n;
    }
}

/* Whether a step has more than one generated token of a text. */
static bool computes_again(const struct batch *b) {
    bool again = false;
    for (int i = 1; i < b->n_sequences; i++) {
        const struct sequence *one = &b->sequence[i - 1], *next = one + 1;
        again = again || (next->generated && next->start == one->start + 1 &&
                          b->block_table[next->first_block] == b->block_table[one->first_block]);
    }
    return again;
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
    h.again = computes_again(b);
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

/* A step of generated tokens alone, each sampled, on one shard, is recorded the first time: for up
 * to 8, 16, … 64 rows. */
static bool cuda_step_begin(struct device *device, const struct batch *batch) {
    struct cuda_device *d = enter(device, "computing a step");
    assert(batch->n_rows <= device->max_rows && batch->n_samples <= device->max_samples);
    d->n_rows = batch->n_rows;
    d->n_samples = d->n_sampled = batch->n_samples;
    d->top = batch->top;
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
    if (d->n_generated < d->n_rows || d->n_samples < d->n_rows || d->n_rows > 8 * GRAPHS ||
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
    project_pending(d, NULL);
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
    TRY(d, cudaStreamSynchronize(stream));
    if (!sampled)
        return;
    memcpy(sampled, d->sampled, (size_t)d->n_sampled * sizeof *sampled);
    int last = d->n_sampled > 0 ? (d->n_sampled - 1) / LOGIT_ROWS * LOGIT_ROWS : 0;
    read_tops(d, last, d->n_sampled - last);
}

/* ==== 10. What the chip can do at most ==== */

enum {
    PROBE_MS = 1,        /* that a probe takes at least */
    PROBE_PRODUCTS = 32, /* of 16 x 8 x 16 that a warp has in a step */
    PROBE_READS = 16,    /* of 16 bytes that a thread asks for at once; a tile: of a block */
    PROBE_TILE = PROBE_READS * THREADS,
    PROBE_SHARED = 32 << 10 /* an operand of 256 rows */
};

/* Products by the fastest instruction that there is; `sink` keeps them from being removed. */
__global__ void __launch_bounds__(THREADS) mma_probe_kernel(int n_steps, float *sink) {
    grid_wait();
    grid_launch_dependents();
    const uint32_t a[4] = {0x3c003c00, 0x3c003c00, 0x3c003c00, 0x3c003c00};
    float sum[PROBE_PRODUCTS * 4];
#ifdef HOPPER
    DYNAMIC_SHARED(uint32_t, words);
    for (int i = (int)threadIdx.x; i < PROBE_SHARED / 4; i += THREADS)
        words[i] = a[0];
    wgmma_sees_stores();
    __syncthreads();
    for (int step = 0; step < n_steps; step++) {
        wgmma_begin();
        wgmma<256>(sum, a, wgmma_rows(words), step > 0);
        wgmma_commit();
        wgmma_wait<1>();
    }
    wgmma_wait<0>();
#else
    for (int i = 0; i < PROBE_PRODUCTS * 4; i++)
        sum[i] = 0.0f;
    for (int step = 0; step < n_steps; step++)
#pragma unroll
        for (int i = 0; i < PROBE_PRODUCTS; i++)
            mma_bf16(sum + i * 4, a, a);
    for (int i = 1; i < PROBE_PRODUCTS; i++)
        sum[0] += sum[i * 4];
#endif
    if (sum[0] < 0.0f)
        *sink = sum[0];
}

/* Reads n times 16 bytes, a tile at least; `sink` keeps the reads from being removed. */
__global__ void __launch_bounds__(THREADS)
    read_probe_kernel(const uint4 *memory, size_t n, uint32_t *sink) {
    grid_wait();
    grid_launch_dependents();
    uint32_t sum = 0;
    for (size_t at = (size_t)blockIdx.x * PROBE_TILE; at < n;
         at += (size_t)gridDim.x * PROBE_TILE) {
        const uint4 *tile = memory + (at + PROBE_TILE <= n ? at : n - PROBE_TILE) + threadIdx.x;
        uint4 value[PROBE_READS];
#pragma unroll
        for (int i = 0; i < PROBE_READS; i++)
            value[i] = load16_once(tile + i * THREADS);
#pragma unroll
        for (int i = 0; i < PROBE_READS; i++)
            sum += value[i].x ^ value[i].y ^ value[i].z ^ value[i].w;
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
    TRY(d, cudaEventCreateWithFlags(&events[0], cudaEventDefault));
    TRY(d, cudaEventCreateWithFlags(&events[1], cudaEventDefault));
    TRY(d, cudaEventRecord(events[0], d->streams[STREAM_COMPUTE]));
    int blocks = d->card->properties.multiProcessorCount, steps = 16, repeats = 1;
    float ms = 0.0f;
    for (; ms < PROBE_MS && steps < 1 << 20; steps *= 4) {
        launch(d, "mma_probe_kernel", mma_probe_kernel, blocks, THREADS, PROBE_SHARED, steps, d->x);
        ms = lap(d, events);
        *ops = (double)PROBE_PRODUCTS * steps * blocks * (THREADS / WARP) * 2 * 16 * 8 * 16 /
               (ms * 1e-3) * n;
    }
    const struct matrix *m = largest ? &largest->matrix : NULL;
    size_t bytes = m ? (size_t)m->n_panels * m->n_units * (size_t)unit_bytes(m->type) : 0;
    for (ms = 0.0f; ms < PROBE_MS && bytes >= PROBE_TILE * 16 && repeats < 1 << 12; repeats *= 4) {
        for (int i = 0; i < repeats; i++)
            launch(d, "read_probe_kernel", read_probe_kernel, 8 * blocks, THREADS, 0,
                   (const uint4 *)m->packed, bytes / sizeof(uint4), (uint32_t *)d->x);
        ms = lap(d, events);
        *read = (double)bytes * repeats / (ms * 1e-3) * n;
    }
    TRY(d, cudaEventDestroy(events[0]));
    TRY(d, cudaEventDestroy(events[1]));
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

static int stride_of(int n) { /* to a multiple of 8: rows begin at 16 bytes */
    return divide(n, 8) * 8;
}

/* n rows of an input of products, which are read in tiles of up to ROW_TILE. */
static void take_planes(struct cuda_device *d, struct planes *p, int n, int n_units, bool *ok) {
    p->n_rows = stride_of(n + ROW_TILE);
    gpu_take(&d->gpu, &p->bytes, (size_t)n_units * (size_t)p->n_rows * ROW_BYTES, ok);
}

static void give_frequencies(struct cuda_device *d) {
    TRY(d, cudaMemcpyAsync(d->rope_frequency, d->device.rope_frequency,
                           (size_t)(d->device.config->rope_dim / 2 * d->n_turns) * sizeof(float),
                           cudaMemcpyHostToDevice, d->streams[STREAM_COMPUTE]));
    TRY(d, cudaStreamSynchronize(d->streams[STREAM_COMPUTE]));
}

static bool allocate_activations(struct cuda_device *d) {
    const struct model_config *c = d->device.config;
    int n = d->device.n_shards, rank = d->device.rank, n_segments = K_SEGMENTS / n;
    int q_cols = c->n_heads * c->head_dim, first = rank * n_segments;
    size_t rows = (size_t)d->device.max_rows, samples = (size_t)d->device.max_samples;
    size_t blocks = (size_t)d->card->properties.multiProcessorCount;
    d->n_heads = c->n_heads / n;
    d->n_kv_heads = c->n_kv_heads / n;
    int head = kv_head_dim(c, KV_BF16), group = c->n_heads / c->n_kv_heads;
    d->n_chunks = d->n_kv_heads * divide(group, cut_of(head).heads);
    d->part = smaller(group, cut_of(head).heads) * (head + 4);
    d->attention_places = make_segments(q_cols, grain_of(c, q_cols), first, n_segments);
    const bool experts = c->n_experts > 0; /* whole ones: their K is not cut */
    d->ffn_places = experts ? make_segments(c->d_ff, 0, 0, K_SEGMENTS)
                            : make_segments(c->d_ff, grain_of(c, c->d_ff), first, n_segments);
    const int n_entries = (int)rows * c->n_used, n_gaps = smaller(n_entries, c->n_experts);
    const int n_places = n_entries + 7 * n_gaps; /* a place for each, and 7 behind each expert's */
    const int n_rows = larger((int)rows, (int)samples);
    d->x_stride = stride_of(c->d_model);
    d->qkv_stride = (d->n_heads + 2 * d->n_kv_heads) * c->head_dim;
    d->logits_stride = stride_of(c->vocab_size);
    size_t x = (size_t)d->x_stride, shared_x = n > 1 ? x : 0;
    size_t logit_rows = rank > 0 ? 0 : samples < LOGIT_ROWS ? samples : (size_t)LOGIT_ROWS;
    bool ok = true;
    auto take = [&](auto **memory, size_t elements) { gpu_take(&d->gpu, memory, elements, &ok); };
    take(&d->x, rows * x);
    take_planes(d, &d->h, larger(n_rows, n_places), divide(c->d_model, UNIT), &ok);
    take(&d->qkv, rows * (size_t)d->qkv_stride);
    take(&d->q, rows * (size_t)(d->n_heads * head));
    take_planes(d, &d->attention, n_rows, d->attention_places.unit[n_segments], &ok);
    take_planes(d, &d->ffn, larger(n_rows, n_places), d->ffn_places.unit[d->ffn_places.n], &ok);
    take(&d->router, rows * (size_t)c->n_experts);
    take(&d->chosen, (size_t)n_entries);
    take(&d->entry, (size_t)n_entries);
    take(&d->share, (size_t)n_entries);
    take((struct entries **)&d->groups,
         experts ? (size_t)(n_gaps + divide(n_entries, FEW_ENTRIES)) + 1 : 0);
    take(&d->expert_out, (size_t)n_places * x);
    if (c->post_norm)
        take(&d->total, rows * x);
    take(&d->sums_of_blocks, blocks * K_SEGMENTS * GENERATED_ROWS / 8 * CONSUMERS * WARP);
    take(&d->blocks_done, blocks);
    take(&d->squares, (rows + GENERATED_ROWS) * (size_t)norm_tiles(d));
    d->n_turns = c->theta_windowed > 0.0f ? 2 : 1;
    take(&d->turn, rows * (size_t)(c->rope_dim / 2 * d->n_turns));
    take(&d->rope_frequency, (size_t)(c->rope_dim / 2 * d->n_turns));
    take(&d->arrived, rows * (size_t)d->n_heads);
    take(&d->logits, logit_rows * (size_t)d->logits_stride);
    take(&d->sampler_rows, logit_rows);
    take(&d->sums[0], rows * shared_x);
    take(&d->sums[1], rows * shared_x);
    take(&d->gathered, (rows + MAX_SHARDS) * shared_x);
    ok = ok && cudaHostAlloc((void **)&d->sampled, samples * sizeof(int), cudaHostAllocPortable) ==
                   cudaSuccess;
    if (ok)
        give_frequencies(d);
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
    if (p->major < MIN_MAJOR)
        return fail(error, "device %d (%s) has compute capability %d.%d, expected %d.0 or newer",
                    index, p->name, p->major, p->minor, MIN_MAJOR);
    if (cudaFuncSetAttribute(sample_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
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
    d->copying = d->gpu;
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
    TRY(d, cudaFreeHost(d->sampled));
    d->card->n_devices--;
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
    d->card->n_devices++;
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

static const struct backend operations = {
    .name = "cuda",
    .close = cuda_close,
    .device_open = cuda_device_open,
    .device_close = cuda_device_close,
    .alloc = cuda_alloc,
    .release = cuda_release,
    .free_memory = cuda_free_memory,
    .pin = cuda_pin,
    .unpin = cuda_unpin,
    .upload = cuda_upload,
    .limits = cuda_limits,
    .copy = cuda_copy,
    .copy_done = cuda_copy_done,
    .step_begin = cuda_step_begin,
    .embed = cuda_embed,
    .norm_qkv = cuda_norm_qkv,
    .rope_append = cuda_rope_append,
    .attention = cuda_attention,
    .project_add = cuda_project_add,
    .norm_gate_up = cuda_norm_gate_up,
    .norm_route = cuda_norm_route,
    .expert_gate_up = cuda_expert_gate_up,
    .expert_down_add = cuda_expert_down_add,
    .all_reduce_add = cuda_all_reduce_add,
    .add_bias = cuda_add_bias,
    .sample = cuda_sample,
    .step_end = cuda_step_end,
    .kv_type = KV_BF16,
    .chunk = CHUNK_ROWS,
    .n_gpus = 0,
    .kernel_launches = 0,
};

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
    cuda->backend = operations;
    cuda->options = *options;
    cuda->backend.n_gpus = smaller(n_gpus, MAX_GPUS);
    pthread_mutex_init(&cuda->upload_mutex, NULL);
    return &cuda->backend;
}
