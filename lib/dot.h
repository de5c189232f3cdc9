/* dot.h: fast products of packed weights, for processors that multiply and add pairs of bf16 or
 * quads of bytes in one instruction. They stand beside the plain kernel of product.h, which any
 * processor runs, and are chosen while the program runs.
 *
 * Such an instruction wants the rows in its own *form*, into which they are turned once a product:
 *     FORM_F32    as they are, for the plain kernel
 *     FORM_BF16   rounded to bf16; for weights in BF16 (AVX-512 BF16: vdpbf16ps)
 *     FORM_Q8     blocks of 32 bytes with a scale; for quantized weights (AVX-512 VNNI: vpdpbusd)
 *
 *     enum row_form form = dot_form(weight->type, false);
 *     dot_convert(form, x, begin, end, row);               // k in [begin, end) of a row
 *     dot_tile(weight->type, n_rows, &tile);               // a struct tile of product.h
 *
 * Invariants: a form of a row depends on that row alone; a sum of whole numbers is exact, and the
 * float sums are chains over k, or over blocks of k, in order. A block that begin or end cuts has
 * zeros outside: a segment of K never depends on its neighbours.
 * What rounding costs: bf16 rows 2^-9 of each element, Q8 rows 1/254 of a block's largest. */
#ifndef DOT_H
#define DOT_H
#include "pack.h"

enum row_form { FORM_F32, FORM_BF16, FORM_Q8, N_FORMS };

enum { Q8_BLOCK = 32 };

struct q8_block { /* element = scale * q */
    int8_t q[Q8_BLOCK];
    int32_t sum[2];          /* of each half of q */
    float scale, scaled_sum; /* of all of q */
};

struct tile;

/* What the kernel for a type wants on this processor; plain: FORM_F32 always. */
enum row_form dot_form(enum tensor_type type, bool plain);
/* Bytes of k in [begin, end) of a row. */
size_t dot_form_bytes(enum row_form form, int begin, int end);
/* from: element `begin` of a row. */
void dot_convert(enum row_form form, const float *from, int begin, int end, char *to);
/* tile->input is in the type's form; 1 to 6 rows. */
void dot_tile(enum tensor_type type, int n_rows, const struct tile *tile);
#endif /* DOT_H */
#ifdef DOT_IMPLEMENTATION
#undef DOT_IMPLEMENTATION

size_t dot_form_bytes(enum row_form form, int begin, int end) {
    if (form == FORM_Q8)
        return (size_t)(divide_up(end, Q8_BLOCK) - begin / Q8_BLOCK) * sizeof(struct q8_block);
    return (size_t)(end - begin) * (form == FORM_BF16 ? 2 : 4);
}

#if defined(__x86_64__)
#include <immintrin.h>

#define DOT_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define DOT_Q8   __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))

static void dot_convert_block(const float *from, int count, struct q8_block *to, int at) {
    float part[Q8_BLOCK] = {0};
    memcpy(part + at, from, sizeof(float) * (size_t)count);
    vec half[2] = {load(part), load(part + LANES)};
    float largest = max_lanes(max_vec(max_vec(half[0], -half[0]), max_vec(half[1], -half[1])));
    float factor = largest > 0.0f ? 127.0f / largest : 0.0f;
    to->scale = largest / 127.0f;
    for (int i = 0; i < 2; i++) {
        vec rounded = half[i] * factor + 12582912.0f; /* 1.5 * 2^23: rounds to a whole number */
        ivec whole = __builtin_convertvector(rounded - 12582912.0f, ivec);
        byte_vec bytes = __builtin_convertvector(whole, byte_vec);
        memcpy(to->q + i * LANES, &bytes, sizeof bytes);
        to->sum[i] = (int32_t)sum_lanes(rounded - 12582912.0f); /* exact: less than 2^24 */
    }
    to->scaled_sum = to->scale * (float)(to->sum[0] + to->sum[1]);
}

static void dot_convert_q8(const float *from, int begin, int end, char *to) {
    struct q8_block *block = (struct q8_block *)(void *)to;
    for (int k = begin; k < end; block++) {
        int next = (k / Q8_BLOCK + 1) * Q8_BLOCK;
        next = next < end ? next : end;
        dot_convert_block(from + (k - begin), next - k, block, k % Q8_BLOCK);
        k = next;
    }
}

/* To nearest, ties to even; what is below the normal numbers becomes 0. An odd last element gets a
 * zero beside it: weights are multiplied in pairs, and what stood there might be no number. */
static DOT_BF16 void dot_convert_bf16(const float *from, int count, char *to) {
    for (int k = 0; k < count; k += LANES) {
        int n = count - k < LANES ? count - k : LANES;
        __m256bh halves = _mm512_cvtneps_pbh((__m512)load_part(from + k, n));
        if (n == LANES)
            memcpy(to + k * 2, &halves, sizeof halves);
        else
            memcpy(to + k * 2, &halves, sizeof(uint16_t) * (size_t)(n + n % 2));
    }
}

/* n_rows x 4 sums of f32; each instruction adds two products to each of 16. */
INLINE DOT_BF16 void dot_bf16(int n_rows, const struct tile *tile) {
    __m512 sum[TILE_ROWS][4];
#pragma GCC unroll 6
    for (int row = 0; row < n_rows; row++)
        for (int i = 0; i < 4; i++)
            sum[row][i] = tile->add ? _mm512_loadu_ps(tile->out + row * PANEL + i * LANES)
                                    : _mm512_setzero_ps();
    const char *input = tile->input;
    for (int k = tile->begin; k < tile->end; k += 2, input += 4) {
        __m512bh weights[4];
        if (tile->ahead)
            read_ahead(tile->panel + (size_t)k * 2 * PANEL, 4 * PANEL);
        for (int i = 0; i < 4; i++)
            weights[i] = (__m512bh)load_words(tile->panel, (unsigned)k / 2, i);
        for (int row = 0; row < n_rows; row++) {
            int32_t pair;
            memcpy(&pair, input + (size_t)row * tile->stride, sizeof pair);
            for (int i = 0; i < 4; i++)
                sum[row][i] =
                    _mm512_dpbf16_ps(sum[row][i], weights[i], (__m512bh)_mm512_set1_epi32(pair));
        }
    }
    for (int row = 0; row < n_rows; row++)
        for (int i = 0; i < 4; i++)
            _mm512_storeu_ps(tile->out + row * PANEL + i * LANES, sum[row][i]);
}

/* Adds the whole numbers of one part of a block and one row, which begins at `row`. */
INLINE DOT_Q8 void dot_scale(enum tensor_type type, int first, int n_vectors,
                             const struct scales *scales, const char *row, const __m512i whole[4],
                             __m512 sum[4]) {
    const struct q8_block *block = (const struct q8_block *)(const void *)row;
    __m512 scale = _mm512_set1_ps(block->scale), total = _mm512_set1_ps(block->scaled_sum);
#pragma GCC unroll 4
    for (int i = 0; i < n_vectors; i++) {
        __m512 both = _mm512_mul_ps((__m512)scales->scale[first + i], scale);
        sum[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole[i]), both, sum[i]);
        if (type == TYPE_Q4_K)
            sum[i] = _mm512_fnmadd_ps((__m512)scales->least[first + i], total, sum[i]);
    }
}

/* n_rows x n_vectors sums, from vector `first` of a panel's 4. The products of the bytes of a part
 * of a block are summed as whole numbers, then scaled. All loops over rows and vectors are
 * unrolled, or the sums would not stay in registers. */
INLINE DOT_Q8 void dot_q8(enum tensor_type type, int n_rows, int first, int n_vectors,
                          const struct tile *tile) {
    const int n_part = pack_block(type).n_part, offset = pack_block(type).offset;
    const size_t stride = tile->stride;
    __m512 sum[TILE_ROWS][4];
#pragma GCC unroll 6
    for (int row = 0; row < n_rows; row++)
#pragma GCC unroll 4
        for (int i = 0; i < n_vectors; i++)
            sum[row][i] = tile->add ? _mm512_loadu_ps(tile->out + row * PANEL + (first + i) * LANES)
                                    : _mm512_setzero_ps();
    unsigned k = (unsigned)(tile->begin / n_part * n_part), end = (unsigned)tile->end;
    const char *block = tile->input;
    for (; k < end; k += (unsigned)n_part) {
        struct scales scales;
        if (tile->ahead && first == 0)
            read_ahead(tile->panel + k / (unsigned)n_part * pack_part_bytes(type),
                       pack_part_bytes(type));
        load_scales(type, tile->panel, k, &scales);
        __m512i whole[TILE_ROWS][4];
        const int32_t *total =
            (const int32_t *)(const void *)(block + Q8_BLOCK) + k % Q8_BLOCK / 16;
#pragma GCC unroll 6
        for (int row = 0; row < n_rows; row++) {
            const int32_t *of_row = total + (size_t)row * stride / 4;
            int32_t all = n_part == Q8_BLOCK ? of_row[0] + of_row[1] : of_row[0];
#pragma GCC unroll 4
            for (int i = 0; i < n_vectors; i++)
                whole[row][i] = _mm512_set1_epi32(-offset * all);
        }
        const char *quads = block + k % Q8_BLOCK;
#pragma GCC unroll 8
        for (unsigned at = 0; at < (unsigned)n_part; at += 4) {
            __m512i weights[4];
#pragma GCC unroll 4
            for (int i = 0; i < n_vectors; i++)
                weights[i] = (__m512i)load_quad(type, tile->panel, k, at, first + i);
#pragma GCC unroll 6
            for (int row = 0; row < n_rows; row++) {
                int32_t quad;
                memcpy(&quad, quads + (size_t)row * stride + at, sizeof quad);
#pragma GCC unroll 4
                for (int i = 0; i < n_vectors; i++)
                    whole[row][i] =
                        _mm512_dpbusd_epi32(whole[row][i], weights[i], _mm512_set1_epi32(quad));
            }
        }
#pragma GCC unroll 6
        for (int row = 0; row < n_rows; row++)
            dot_scale(type, first, n_vectors, &scales, block + (size_t)row * stride, whole[row],
                      sum[row]);
        if ((k + (unsigned)n_part) % Q8_BLOCK == 0)
            block += sizeof(struct q8_block);
    }
#pragma GCC unroll 6
    for (int row = 0; row < n_rows; row++)
#pragma GCC unroll 4
        for (int i = 0; i < n_vectors; i++)
            _mm512_storeu_ps(tile->out + row * PANEL + (first + i) * LANES, sum[row][i]);
}

/* Up to 3 rows: 4 vectors wide, the panel is read once. More: 2 x 2, so that the sums of both kinds
 * fit into the registers. */
#define DOT_Q8_KERNEL(type, rows)                                                                  \
    static DOT_Q8 void dot_##type##_##rows(const struct tile *tile) {                              \
        if (rows <= 3) {                                                                           \
            dot_q8(TYPE_##type, rows, 0, 4, tile);                                                 \
        } else {                                                                                   \
            dot_q8(TYPE_##type, rows, 0, 2, tile);                                                 \
            dot_q8(TYPE_##type, rows, 2, 2, tile);                                                 \
        }                                                                                          \
    }
#define DOT_BF16_KERNEL(type, rows)                                                                \
    static DOT_BF16 void dot_BF16_##rows(const struct tile *tile) {                                \
        dot_bf16(rows, tile);                                                                      \
    }
#define DOT_KERNELS(kernel, type)                                                                  \
    kernel(type, 1) kernel(type, 2) kernel(type, 3) kernel(type, 4) kernel(type, 5)                \
        kernel(type, 6) static void (*const dot_##type[])(const struct tile *) = {                 \
            dot_##type##_1, dot_##type##_2, dot_##type##_3,                                        \
            dot_##type##_4, dot_##type##_5, dot_##type##_6};

DOT_KERNELS(DOT_BF16_KERNEL, BF16)
DOT_KERNELS(DOT_Q8_KERNEL, Q8_0)
DOT_KERNELS(DOT_Q8_KERNEL, Q4_0)
DOT_KERNELS(DOT_Q8_KERNEL, Q4_K)
DOT_KERNELS(DOT_Q8_KERNEL, Q6_K)

enum row_form dot_form(enum tensor_type type, bool plain) {
    bool wide = !plain && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    if (wide && type == TYPE_BF16 && __builtin_cpu_supports("avx512bf16"))
        return FORM_BF16;
    if (wide && pack_quantized(type) && __builtin_cpu_supports("avx512vnni"))
        return FORM_Q8;
    return FORM_F32;
}

void dot_convert(enum row_form form, const float *from, int begin, int end, char *to) {
    if (form == FORM_BF16)
        dot_convert_bf16(from, end - begin, to);
    else
        dot_convert_q8(from, begin, end, to);
}

void dot_tile(enum tensor_type type, int n_rows, const struct tile *tile) {
    switch (type) {
    case TYPE_BF16: dot_BF16[n_rows - 1](tile); return;
    case TYPE_Q8_0: dot_Q8_0[n_rows - 1](tile); return;
    case TYPE_Q4_0: dot_Q4_0[n_rows - 1](tile); return;
    case TYPE_Q4_K: dot_Q4_K[n_rows - 1](tile); return;
    case TYPE_Q6_K: dot_Q6_K[n_rows - 1](tile); return;
    default: return; /* they have no such form */
    }
}

#else /* other processors: the plain kernel alone */

enum row_form dot_form(enum tensor_type type, bool plain) {
    (void)type;
    (void)plain;
    return FORM_F32;
}

void dot_convert(enum row_form form, const float *from, int begin, int end, char *to) {
    (void)form;
    (void)from;
    (void)begin;
    (void)end;
    (void)to;
}

void dot_tile(enum tensor_type type, int n_rows, const struct tile *tile) {
    (void)type;
    (void)n_rows;
    (void)tile;
}
#endif
#endif /* DOT_IMPLEMENTATION */
