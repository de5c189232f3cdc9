/* pack.cuh: weights on the GPU, in the order in which the tensor cores want them.
 *
 * A matrix is cut into *tiles* of 16 outputs and *units* of 32 k. Of a tile and unit each lane of a
 * warp holds a *fragment*: outputs group and group + 8, k = 8 quad to 8 quad + 7 (see ptx.cuh), and
 * the fragments of a warp lie side by side, in the order [tile][unit][lane]. So a warp reads its
 * weights by 16-byte loads of one contiguous stream, and the same bytes serve as the operand of 16
 * rows (generated tokens, product.cuh) and as two operands of 8 columns (prompts).
 *     PACKED_BF16   2 x 16 bytes a lane, one for each mma: 1024 bytes     F16, BF16, Q4_K, Q6_K
 *     PACKED_F32    the same twice: high parts, low parts                 F32
 *     PACKED_Q8     16 bytes a lane, numbers + 128; f16 scales            Q8_0
 *     PACKED_Q4     8 bytes a lane; f16 scales                            Q4_0
 * Scales stand apart, 32 bytes a tile and unit: those of outputs group and group + 8 side by side.
 * An F32 weight is the sum of two bf16, what rounding leaves out of the first being the second: it
 * takes the bytes of an F32, and gives its logits; bf16 alone would be off by 2 %.
 *
 * K is worked off in K_SEGMENTS *segments*, one for each warp of a product. Where shards cut K,
 * a segment ends where any number of shards would cut, between heads or at an even k; it then
 * begins with a unit of its own, whose k outside the segment are 0: so a segment's sum has the
 * same bits on every number of shards. The input of such a product has the same gaps; `place`
 * says where an element goes. Models whose segments end at multiples of 32 have no gaps. */
#ifndef PACK_CUH
#define PACK_CUH
#include "dynamo.h"
#include "ptx.cuh"

enum packed_type { PACKED_BF16, PACKED_F32, PACKED_Q8, PACKED_Q4, PACKED_MIXED };

enum { TILE = 16, UNIT = 32, WARP = 32, SCALE_BYTES = 32 /* of a tile and unit */ };

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
    return type == TYPE_Q8_0   ? PACKED_Q8
           : type == TYPE_Q4_0 ? PACKED_Q4
           : type == TYPE_F32  ? PACKED_F32
                               : PACKED_BF16;
}

enum { PART_BYTES = 1024 /* of bf16: a tile and unit, or the high or low part of one */ };

static inline __host__ __device__ size_t packed_bytes(int type) { /* of a tile and unit */
    return type == PACKED_F32    ? 2 * PART_BYTES
           : type == PACKED_BF16 ? PART_BYTES
           : type == PACKED_Q8   ? 512
                                 : 256;
}

static inline __host__ __device__ bool has_scales(int type) {
    return type == PACKED_Q8 || type == PACKED_Q4;
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

/* ---- fragments ---- */

template <int TYPE> struct fragment { /* PACKED_MIXED: of matrices of several types */
    static constexpr int N = TYPE == PACKED_Q8 || TYPE == PACKED_Q4 ? 1 : 2;
    uint4 words[N];  /* bf16: one for each mma; else x and y (Q4: x): output group, the rest: + 8 */
    uint32_t scales; /* f16: of output group, of group + 8 */
    int type;
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
    const int type = TYPE == PACKED_MIXED ? f.type : TYPE;
    if (!has_scales(type)) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint4 &words = f.words[half % fragment<TYPE>::N];
            a[half][0] = words.x;
            a[half][1] = words.y;
            a[half][2] = words.z;
            a[half][3] = words.w;
        }
        return;
    }
    const float low = half_to_float((uint16_t)f.scales);
    const float high = half_to_float((uint16_t)(f.scales >> 16));
    const uint4 &words = f.words[0];
    if (type == PACKED_Q8) {
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

/* A lane's fragment of a tile and unit whose numbers and scales begin there; ONCE: in device
 * memory, and not to be read again soon. `type` counts for PACKED_MIXED alone. */
template <int TYPE, bool ONCE>
DEVICE void load_fragment(const uint8_t *numbers, const uint8_t *scales, int type, int lane,
                          struct fragment<TYPE> *f) {
    type = TYPE == PACKED_MIXED ? type : TYPE;
    f->type = type;
    if (type == PACKED_Q4) {
        uint2 half = load8(numbers + lane * 8);
        f->words[0] = make_uint4(half.x, half.y, 0, 0);
    } else {
        f->words[0] = ONCE ? load16_once(numbers + lane * 16) : load16(numbers + lane * 16);
    }
    if (has_scales(type)) {
        f->scales = reinterpret_cast<const uint32_t *>(scales)[lane / 4];
    } else {
        numbers += 512 + lane * 16;
        f->words[fragment<TYPE>::N - 1] = ONCE ? load16_once(numbers) : load16(numbers);
    }
}

/* Element `at` of the 8 of a lane and of output group or group + 8, from where a part begins. */
DEVICE float part_element(const uint8_t *part, int lane, int upper, int at) {
    const uint16_t *halves = reinterpret_cast<const uint16_t *>(part + at / 4 * 512 + lane * 16);
    return bf16_to_float(halves[(upper + at % 4 / 2 * 2) * 2 + at % 2]);
}

/* One element as f32: for embeddings. */
DEVICE float matrix_element(const struct matrix &m, int output, int k) {
    size_t index = (size_t)(output / TILE) * m.n_units + k / UNIT;
    int group = output % 8, upper = output % TILE / 8, at = k % 8, lane = 4 * group + k % UNIT / 8;
    const uint8_t *numbers = m.packed + index * packed_bytes(m.type);
    if (!has_scales(m.type)) {
        float low = m.type == PACKED_F32 ? part_element(numbers + PART_BYTES, lane, upper, at) : 0;
        return part_element(numbers, lane, upper, at) + low;
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
    int n_rows, cols;        /* rows at hand; of a whole row */
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

/* A lane's share of a tile and unit, or of its low part: row `row`, k to k + 8, those outside
 * [begin, end) 0. */
DEVICE void pack_floats(const struct raw_rows &raw, int row, int k, int begin, int end, bool low,
                        uint32_t *words) {
    for (int at = 0; at < 8; at += 2) {
        float pair[2] = {0.0f, 0.0f};
        for (int i = 0; i < 2 && row < raw.n_rows; i++)
            if (k + at + i >= begin && k + at + i < end)
                pair[i] = raw_element(raw, row, k + at + i);
        uint32_t both = pack_bf16(pair[0], pair[1]);
        if (low)
            both = pack_bf16(pair[0] - bf16_to_float(both & 0xffff),
                             pair[1] - bf16_to_float(both >> 16));
        words[at / 4 * 128 + at % 4 / 2 * 2] = both;
    }
}

/* Packs tiles [first_tile, first_tile + n) of m, whose outputs are the rows at hand. One warp a
 * tile and unit; bound by memory. The twin of pack_panel. */
__global__ void pack_kernel(const struct matrix m, int first_tile, int n_tiles,
                            const struct raw_rows raw) {
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
        if (!has_scales(m.type)) {
            pack_floats(raw, row, k, begin, end, false, words + lane * 4 + upper);
            if (m.type == PACKED_F32)
                pack_floats(raw, row, k, begin, end, true,
                            words + PART_BYTES / 4 + lane * 4 + upper);
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
#endif /* PACK_CUH */
