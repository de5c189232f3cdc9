/* amx_twin.h: the instructions of a matrix unit (AMX) in plain C, for machines without one.
 *
 * As Intel's manual defines them (Software Developer's Manual, volume 2: LDTILECFG, TILELOADD,
 * TDPBF16PS); shapes that a processor refuses end the test. Each thread has tiles of its own.
 * Include it before kernels.c, whose wrappers of the instructions call it while `twin_on`. */
#ifndef AMX_TWIN_H
#define AMX_TWIN_H
#include <assert.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#define AMX_DO(twin, ...)                                                                          \
    do {                                                                                           \
        if (twin_on)                                                                               \
            twin;                                                                                  \
        else                                                                                       \
            __asm__ volatile(__VA_ARGS__);                                                         \
    } while (0)

static bool twin_on;
static _Thread_local struct {
    struct {
        uint8_t palette, zeros[15];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } shape;
    char tile[8][16][64];
} twin;

static void twin_zero(int tile) {
    memset(twin.tile[tile], 0, sizeof twin.tile[tile]);
}

static void twin_configure(const void *shapes) {
    static_assert(sizeof twin.shape == 64, "as the processor reads it");
    memcpy(&twin.shape, shapes, sizeof twin.shape);
    assert(twin.shape.palette == 1);
    for (int i = 0; i < 8; i++) {
        assert(twin.shape.rows[i] <= 16 && twin.shape.row_bytes[i] <= 64);
        assert((twin.shape.rows[i] == 0) == (twin.shape.row_bytes[i] == 0));
        twin_zero(i);
    }
}

static void twin_load(int tile, const void *from, size_t stride) {
    twin_zero(tile);
    for (size_t row = 0; row < twin.shape.rows[tile]; row++)
        memcpy(twin.tile[tile][row], (const char *)from + row * stride, twin.shape.row_bytes[tile]);
}

static void twin_store(int tile, void *to, size_t stride) {
    for (size_t row = 0; row < twin.shape.rows[tile]; row++)
        memcpy((char *)to + row * stride, twin.tile[tile][row], twin.shape.row_bytes[tile]);
}

static float twin_flush(float value) { /* what is below the normal numbers is 0 */
    return fabsf(value) < 0x1p-126f ? copysignf(0.0f, value) : value;
}

static float twin_f32(const char *bf16) {
    uint32_t bits = 0;
    float value;
    memcpy((char *)&bits + 2, bf16, 2);
    memcpy(&value, &bits, sizeof value);
    return twin_flush(value);
}

/* Even and odd k are chains of their own, whose sums are added to what is there. */
static void twin_dot(int sum, int rows, int weights) {
    int n_words = twin.shape.rows[weights]; /* of k */
    assert(twin.shape.rows[sum] == twin.shape.rows[rows] && twin.shape.rows[sum] > 0);
    assert(twin.shape.row_bytes[rows] == n_words * 4);
    assert(twin.shape.row_bytes[sum] == twin.shape.row_bytes[weights]);
    for (int row = 0; row < twin.shape.rows[sum]; row++) {
        float part[16][2] = {{0}}, to[16];
        for (int k = 0; k < n_words; k++)
            for (int i = 0; i < 32; i++)
                part[i / 2][i % 2] =
                    twin_flush(fmaf(twin_f32(twin.tile[rows][row] + k * 4 + i % 2 * 2),
                                    twin_f32(twin.tile[weights][k] + i * 2), part[i / 2][i % 2]));
        memcpy(to, twin.tile[sum][row], sizeof to);
        for (int i = 0; i < 16; i++)
            to[i] = twin_flush(twin_flush(to[i]) + twin_flush(part[i][0] + part[i][1]));
        memcpy(twin.tile[sum][row], to, sizeof to);
    }
}
#endif
