/* repack.h: weights of types that files have and no kernel multiplies, turned into Q8_0.
 *
 *     if (tensor->stored) // tensor->type is then TYPE_Q8_0
 *         repack_rows(tensor, first, n, rows);
 *
 * A backend calls it while it packs, block by block, so that no second copy of the weights exists.
 * Every one of these types is parts of 32 numbers, each half of which has a scale and an offset:
 *
 *     weight = scale * number - least
 *
 * Where the halves have one scale and no offset (Q5_0, IQ4_NL, IQ4_XS) the numbers stay and get a
 * scale of Q8_0's, f16: the first two lose nothing, the third 2^-12 of a weight. The others are
 * rounded to 1/127 of a part's largest weight. So the error that a product has because of the type
 * itself grows (python3 test/make_types.py --loss): by 0.4 % in Q4_1, 1 % in Q5_1 and Q5_K, 0.1 %
 * in Q2_K, 0.2 % in Q3_K. F16 would add 0.01 %, but takes 16 bits a weight, and as much more time
 * to read; Q8_0 takes 8.5, and has kernels on both kinds of device.
 * All of it is inlined, in C and C++. Read next: matmul.h. */
#ifndef REPACK_H
#define REPACK_H

#include "gguf.h"
#include <math.h>
#include <string.h>

enum { REPACK_PART = 32, REPACK_PART_BYTES = 34, REPACK_MAX_BYTES = 8 * REPACK_PART_BYTES };

struct repack_part { /* weight i = scale[i / 16] * number[i] - least[i / 16] */
    float scale[2], least[2];
    int8_t number[REPACK_PART];
};

/* ---- f16 ---- */

static inline float repack_float(const uint8_t *half) {
    uint32_t magnitude = (uint32_t)(half[0] | (half[1] & 0x7f) << 8), bits = magnitude << 13;
    float value;
    memcpy(&value, &bits, 4);
    value = magnitude < 0x7c00 ? value * 0x1p112f : NAN; /* an infinite scale is a fault, too */
    return half[1] & 0x80 ? -value : value;
}

static inline uint16_t repack_half(float value) { /* to nearest, ties to even; too large: NaN */
    float small = fabsf(value) * 0x1p-112f;
    uint32_t bits;
    memcpy(&bits, &small, 4);
    bits = (bits + 0xfff + (bits >> 13 & 1)) >> 13;
    return (uint16_t)((bits < 0x7c00 ? bits : 0x7e00) | (value < 0 ? 0x8000u : 0));
}

/* ---- reading ---- */

static inline int repack_elements(int stored) { /* of a block */
    return stored >= STORED_Q2_K && stored != STORED_IQ4_NL ? 256 : 32;
}

/* 16 bytes: the first 16 numbers are their low halves, the others the high ones. */
static inline void repack_nibbles(const uint8_t *bytes, int8_t *numbers) {
    for (int i = 0; i < 16; i++) {
        numbers[i] = (int8_t)(bytes[i] & 15);
        numbers[i + 16] = (int8_t)(bytes[i] >> 4);
    }
}

/* The numbers of IQ4 are indexes of these. */
static inline void repack_look_up(int8_t *numbers) {
    static const int8_t table[] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                   1,    13,   25,  38,  53,  69,  89,  113};
    for (int i = 0; i < REPACK_PART; i++)
        numbers[i] = table[numbers[i]];
}

/* Q4_1: f16 d, m; 16 bytes. Q5_0: f16 d; 4 bytes with a bit more of each number; 16 bytes. Q5_1
 * like that, with m. IQ4_NL: f16 d; 16 bytes. */
static inline void repack_read_32(int stored, const uint8_t *block, struct repack_part *p) {
    bool offset = stored == STORED_Q4_1 || stored == STORED_Q5_1;
    bool wide = stored == STORED_Q5_0 || stored == STORED_Q5_1;
    const uint8_t *high = block + (offset ? 4 : 2);
    repack_nibbles(high + (wide ? 4 : 0), p->number);
    for (int i = 0; i < REPACK_PART && wide; i++)
        p->number[i] = (int8_t)((p->number[i] | (high[i / 8] >> i % 8 & 1) << 4) -
                                (stored == STORED_Q5_0 ? 16 : 0));
    if (stored == STORED_IQ4_NL)
        repack_look_up(p->number);
    p->scale[0] = p->scale[1] = repack_float(block);
    p->least[0] = p->least[1] = offset ? -repack_float(block + 2) : 0;
}

/* Q2_K: 16 bytes with a scale and an offset of 4 bits; 64 bytes; f16 d, m.
 * Q3_K: 32 bytes with a bit more of each number; 64 bytes; 12 with 16 scales of 6 bits; f16 d. */
static inline void repack_read_q2_q3(int stored, const uint8_t *block, int part,
                                     struct repack_part *p) {
    bool q3 = stored == STORED_Q3_K;
    const uint8_t *low = block + (q3 ? 32 : 16) + part / 4 * 32, *scales = block + (q3 ? 96 : 0);
    for (int i = 0; i < REPACK_PART; i++) {
        int number = low[i] >> (part % 4 * 2) & 3;
        p->number[i] = (int8_t)(q3 && !(block[i] >> part & 1) ? number - 4 : number);
    }
    for (int i = 0; i < 2; i++) {
        int at = 2 * part + i, scale = scales[at] & 15;
        if (q3)
            scale = ((scales[at % 8] >> (at / 8 * 4) & 15) |
                     (scales[8 + at % 4] >> (at / 4 * 2) & 3) << 4) -
                    32;
        p->scale[i] = repack_float(block + (q3 ? 108 : 80)) * (float)scale;
        p->least[i] = q3 ? 0 : repack_float(block + 82) * (float)(scales[at] >> 4);
    }
}

/* f16 d, m; 12 bytes as in Q4_K; 32 bytes with a bit more of each number; 128 bytes. */
static inline void repack_read_q5_k(const uint8_t *block, int part, struct repack_part *p) {
    int scale, least;
    gguf_q4_k_scales(block + 4, part, &scale, &least);
    for (int i = 0; i < REPACK_PART; i++)
        p->number[i] = (int8_t)((block[48 + part / 2 * 32 + i] >> (part % 2 * 4) & 15) |
                                (block[16 + i] >> part & 1) << 4);
    p->scale[0] = p->scale[1] = repack_float(block) * (float)scale;
    p->least[0] = p->least[1] = repack_float(block + 2) * (float)least;
}

/* f16 d; 8 scales of 6 bits: the high two in 2 bytes, the low four in 4; 128 bytes. */
static inline void repack_read_iq4_xs(const uint8_t *block, int part, struct repack_part *p) {
    int low = block[4 + part / 2] >> (part % 2 * 4) & 15;
    int high = block[2 + part / 4] >> (part % 4 * 2) & 3;
    repack_nibbles(block + 8 + part * 16, p->number);
    repack_look_up(p->number);
    p->scale[0] = p->scale[1] = repack_float(block) * (float)((low | high << 4) - 32);
    p->least[0] = p->least[1] = 0;
}

/* Part `part` of a block. */
static inline void repack_read(int stored, const uint8_t *block, int part, struct repack_part *p) {
    switch (stored) {
    case STORED_Q2_K:
    case STORED_Q3_K: repack_read_q2_q3(stored, block, part, p); return;
    case STORED_Q5_K: repack_read_q5_k(block, part, p); return;
    case STORED_IQ4_XS: repack_read_iq4_xs(block, part, p); return;
    default: repack_read_32(stored, block, p); return;
    }
}

/* ---- writing ---- */

static inline void repack_write(const struct repack_part *p, uint8_t *to) {
    bool exact = p->scale[0] == p->scale[1] && p->least[0] == 0 && p->least[1] == 0;
    float weight[REPACK_PART], most = 0;
    for (int i = 0; i < REPACK_PART; i++) {
        weight[i] = p->scale[i / 16] * (float)p->number[i] - p->least[i / 16];
        most = fabsf(weight[i]) <= most ? most : fabsf(weight[i]); /* NaN stays */
    }
    uint16_t half = repack_half(exact ? p->scale[0] : most / 127);
    uint8_t bytes[2] = {(uint8_t)half, (uint8_t)(half >> 8)};
    float scale = repack_float(bytes), inverse = scale > 0 ? 1 / scale : 0;
    memcpy(to, bytes, 2);
    for (int i = 0; i < REPACK_PART; i++) {
        float number = weight[i] * inverse;
        number = number > -127 ? fminf(number, 127) : -127; /* of NaN too */
        int rounded = (int)(number + (number < 0 ? -0.5f : 0.5f));
        to[2 + i] = (uint8_t)(exact ? p->number[i] : rounded);
    }
}

/* to: as many bytes as Q8_0 takes for the block's elements. */
static inline void repack_block(int stored, const uint8_t *block, uint8_t *to) {
    for (int part = 0; part < repack_elements(stored) / REPACK_PART; part++) {
        struct repack_part p;
        repack_read(stored, block, part, &p);
        repack_write(&p, to + part * REPACK_PART_BYTES);
    }
}

/* `n` rows of a tensor that is stored otherwise. */
static inline void repack_rows(const struct tensor *tensor, int64_t first, int64_t n, uint8_t *to) {
    int elements = repack_elements(tensor->stored);
    int64_t row_blocks = tensor->cols / elements;
    size_t bytes = tensor->stored_bytes / (size_t)(tensor->rows * row_blocks);
    const uint8_t *from = (const uint8_t *)tensor->data + (size_t)(first * row_blocks) * bytes;
    for (int64_t i = 0; i < n * row_blocks; i++, from += bytes)
        repack_block(tensor->stored, from,
                     to + (size_t)i * (size_t)(elements / REPACK_PART * REPACK_PART_BYTES));
}

#endif /* REPACK_H */
