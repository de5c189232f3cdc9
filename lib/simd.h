/* simd.h: sixteen floats at a time, in the vector extensions of GCC and clang.
 *
 * A vec is one register of AVX-512, and several of lesser machines. Loads and stores need no
 * alignment, and the `part` forms stop after `count` elements. Lanes are added in one fixed order
 * (sum_lanes), so a result does not depend on who asks. All of it is inlined: there is no
 * implementation to include.
 *
 *     vec sum = {0};
 *     for (int i = 0; i < n; i += LANES)
 *         sum += load_part(x + i, n - i); // missing elements are 0
 *     float total = sum_lanes(sum); */
#ifndef SIMD_H
#define SIMD_H
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#pragma GCC diagnostic ignored "-Wpsabi" /* vectors are passed between inlined functions only */

enum { LANES = 16 /* floats in a vector */ };

#define INLINE   static inline __attribute__((always_inline))
/* At a cache line: else a kernel's short loops are up to 1.4 times slower where they lie badly. */
#define NOINLINE __attribute__((noinline, aligned(64)))

typedef float vec __attribute__((vector_size(64)));
typedef int32_t ivec __attribute__((vector_size(64)));
typedef float vec_any __attribute__((vector_size(64), aligned(4), may_alias)); /* unaligned */
typedef int32_t ivec_any __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t half_vec __attribute__((vector_size(32), aligned(2), may_alias));
typedef int16_t short_vec __attribute__((vector_size(32)));
typedef int8_t byte_vec __attribute__((vector_size(16), aligned(1), may_alias));

INLINE vec load(const float *from) {
    return *(const vec_any *)from;
}

INLINE void store(float *to, vec value) {
    *(vec_any *)to = value;
}

INLINE vec load_part(const float *from, int count) { /* missing elements are 0 */
    vec value = {0};
    if (count >= LANES)
        return load(from);
    memcpy(&value, from, sizeof(float) * (size_t)count);
    return value;
}

INLINE vec load_bytes(const char *from, size_t count) { /* at most 64; missing ones are 0 */
    vec value = {0};
    if (count == sizeof value)
        memcpy(&value, from, sizeof value); /* one load */
    else
        memcpy(&value, from, count);
    return value;
}

INLINE void store_part(float *to, vec value, int count) {
    if (count >= LANES)
        store(to, value);
    else
        memcpy(to, &value, sizeof(float) * (size_t)count);
}

INLINE vec select_vec(ivec mask, vec yes, vec no) {
    return (vec)((mask & (ivec)yes) | (~mask & (ivec)no));
}

INLINE vec max_vec(vec a, vec b) { /* b, where one is NaN */
#ifdef __AVX512F__
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return select_vec(a > b, a, b);
#endif
}

INLINE vec min_vec(vec a, vec b) { /* likewise */
#ifdef __AVX512F__
    return (vec)_mm512_min_ps((__m512)a, (__m512)b);
#else
    return select_vec(a < b, a, b);
#endif
}

/* Each lane takes the value of the lane `step` away, in the other half of a group of 2 * step. */
#define LANES_FROM(value, step)                                                                    \
    __builtin_shufflevector(value, value, 0 ^ step, 1 ^ step, 2 ^ step, 3 ^ step, 4 ^ step,        \
                            5 ^ step, 6 ^ step, 7 ^ step, 8 ^ step, 9 ^ step, 10 ^ step,           \
                            11 ^ step, 12 ^ step, 13 ^ step, 14 ^ step, 15 ^ step)
INLINE vec lanes_from(vec value, int step) {
    switch (step) {
    case 8: return LANES_FROM(value, 8);
    case 4: return LANES_FROM(value, 4);
    case 2: return LANES_FROM(value, 2);
    default: return LANES_FROM(value, 1);
    }
}

INLINE float sum_lanes(vec value) {
    for (int step = LANES / 2; step > 0; step /= 2)
        value += lanes_from(value, step);
    return value[0];
}

INLINE float max_lanes(vec value) {
    for (int step = LANES / 2; step > 0; step /= 2)
        value = max_vec(value, lanes_from(value, step));
    return value[0];
}

/* e^x to 2 ulp (the polynomial of the Cephes library); 0 below -87, no more than e^88; NaN of NaN,
 * which the second of two operands keeps. */
INLINE vec exp_vec(vec x) {
    const vec zero = {0};
    const vec low = zero - 87.0f, high = zero + 88.0f;
    vec inside = min_vec(high, max_vec(low, x));
    vec shifted = inside * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: rounds to a whole number */
    vec whole = shifted - 12582912.0f;
    vec rest = inside - whole * 0.693359375f;
    rest = rest + whole * 2.12194440e-4f;
    vec sum = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * (rest * rest) + rest + 1.0f;
    ivec power = __builtin_convertvector(whole, ivec) << 23;
    return select_vec(x < low, zero, (vec)((ivec)sum + power));
}

INLINE vec widen_bf16(const uint16_t *from) {
    return (vec)(__builtin_convertvector(*(const half_vec *)from, ivec) << 16);
}

/* One instruction where there is one: compilers take the general forms apart. Both are exact, but
 * for infinities and NaN, which no weight is. */
INLINE vec widen_f16(const uint16_t *from) {
#ifdef __AVX512F__
    return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)from));
#else
    ivec bits = __builtin_convertvector(*(const half_vec *)from, ivec);
    vec magnitude = (vec)((bits & 0x7fff) << 13) * 0x1p112f;
    return (vec)((ivec)magnitude | ((bits & 0x8000) << 16));
#endif
}

INLINE vec widen_f16_words(ivec words) { /* the low half of each */
    half_vec halves = __builtin_convertvector(words, half_vec);
    return widen_f16((const uint16_t *)&halves);
}

INLINE ivec widen_uint8(const char *from) {
#ifdef __AVX512F__
    return (ivec)_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)from));
#else
    short_vec half = __builtin_convertvector(*(const byte_vec *)(const void *)from, short_vec);
    return __builtin_convertvector(half, ivec) & 255;
#endif
}

INLINE vec widen_int8(const char *from) {
#ifdef __AVX512F__
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)from)));
#else
    short_vec half = __builtin_convertvector(*(const byte_vec *)(const void *)from, short_vec);
    return __builtin_convertvector(__builtin_convertvector(half, ivec), vec);
#endif
}

INLINE half_vec narrow_bf16(ivec bits) { /* to nearest, ties to even; NaN stays one */
    ivec rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    ivec is_nan = (bits & 0x7fffffff) > 0x7f800000;
    return __builtin_convertvector((is_nan & 0x7fc0) | (~is_nan & rounded), half_vec);
}

INLINE void interleave(const vec from[LANES], vec to[LANES]) { /* row i with row i + 8 */
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        vec a = from[i], b = from[i + 8];
        to[2 * i] =
            __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        to[2 * i + 1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29,
                                                14, 30, 15, 31);
    }
}

INLINE void transpose(vec rows[LANES]) { /* four rounds turn a 16 x 16 matrix */
    vec next[LANES];
    interleave(rows, next);
    interleave(next, rows);
    interleave(rows, next);
    interleave(next, rows);
}
#endif /* SIMD_H */
