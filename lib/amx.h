/* amx.h: the matrix unit of some x86 processors (AMX, Intel, since 2023), its instructions by name.
 *
 * It has eight registers, *tiles* of up to 16 rows of 64 bytes. One instruction adds to a tile of
 * sums, [row][output], the product of a tile of rows, [row][k], and one of words of a panel of
 * matmul.h, which lie as it wants them, [word of 2 bf16][output]: 16 x 16 x 32 in 16 cycles. Here
 * tiles 0 to 3 are sums, 4 is rows, 5 to 7 are weights, always numbers as they stand:
 *
 *     amx_configure(16, 16);             // the shapes of all tiles: rows, words of k; zeros them
 *     amx_load(4, rows, row_bytes);      // 16 rows of 16 words
 *     amx_load(5, words, line_bytes);    // 16 words of 16 outputs
 *     amx_dot(0, 4, 5);                  // and tiles 1 to 3
 *     amx_store_sums(out, line_bytes);
 *     amx_release();                     // or each switch of threads would save them
 *
 * Without one, AMX is not defined or amx_ready says no. A test that defines AMX_DO before including
 * this has each instruction done in C. */
#ifndef AMX_H
#define AMX_H
#include "simd.h"

#include <stdbool.h>

enum {
    AMX_ROWS = 16, /* of a tile */
    AMX_K = 32     /* bf16 in a row of a tile */
};

#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#define AMX __attribute__((target("amx-tile,amx-bf16")))
#ifndef AMX_DO
#define AMX_DO(twin, ...) __asm__ volatile(__VA_ARGS__)
#endif

/* Whether this process may use it from here on. */
static inline bool amx_ready(void) {
    enum { ASK_PERMISSION = 0x1023 /* ARCH_REQ_XCOMP_PERM */, TILE_DATA = 18 };
    unsigned a, b, c, features, saved, high, wanted = 1u << 22 | 1u << 24; /* bf16, tiles */
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &features) || (features & wanted) != wanted)
        return false;
    __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0)); /* by the system: shapes, tiles */
    return (saved >> 17 & 3) == 3 && syscall(SYS_arch_prctl, ASK_PERMISSION, TILE_DATA) == 0;
}

INLINE AMX void amx_configure(int rows, int words) {
    struct {
        uint8_t palette, zeros[15];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } shapes = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        shapes.row_bytes[i] = (uint16_t)(i == 4 ? words * 4 : 64);
        shapes.rows[i] = (uint8_t)(i > 4 ? words : rows);
    }
    AMX_DO(twin_configure(&shapes), "ldtilecfg %0" : : "m"(shapes));
}

#define AMX_MEMORY(at, stride) : : "r"(at), "r"(stride) : "memory"
#define amx_release()  AMX_DO((void)0, "tilerelease")
#define amx_zero(tile) AMX_DO(twin_zero(tile), "tilezero %tmm" #tile)
#define amx_load(tile, from, stride)                                                               \
    AMX_DO(twin_load(tile, from, stride),                                                          \
           "tileloadd (%0,%1,1), %%tmm" #tile AMX_MEMORY(from, stride))
#define amx_store(tile, to, stride)                                                                \
    AMX_DO(twin_store(tile, to, stride),                                                           \
           "tilestored %%tmm" #tile ", (%0,%1,1)" AMX_MEMORY(to, stride))
#define amx_dot(sum, rows, weights)                                                                \
    AMX_DO(twin_dot(sum, rows, weights), "tdpbf16ps %tmm" #weights ", %tmm" #rows ", %tmm" #sum)

/* The four sums, side by side. */
INLINE AMX void amx_load_sums(bool zeros, const char *from, size_t stride) {
    if (zeros) {
        amx_zero(0);
        amx_zero(1);
        amx_zero(2);
        amx_zero(3);
    } else {
        amx_load(0, from, stride);
        amx_load(1, from + 64, stride);
        amx_load(2, from + 128, stride);
        amx_load(3, from + 192, stride);
    }
}

INLINE AMX void amx_store_sums(char *to, size_t stride) {
    amx_store(0, to, stride);
    amx_store(1, to + 64, stride);
    amx_store(2, to + 128, stride);
    amx_store(3, to + 192, stride);
}

#else
static inline bool amx_ready(void) {
    return false;
}
#endif
#endif /* AMX_H */
