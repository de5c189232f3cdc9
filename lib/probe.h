/* probe.h: what this machine can do at most: read memory, multiply and add.
 *
 * The threads of a pool do nothing else for some milliseconds, a few times over; the best time
 * counts. A step of a model is held against such figures, which must be taken beside it: memory of
 * shared machines is twice as fast in one minute as in the next.
 *
 *     struct probe probe = {&pool, job, scratch};
 *     struct probe_piece pieces[] = {{memory, 1 << 20}, ...};
 *     double bytes = probe_read(&probe, pieces, n_pieces);         // a second
 *     double operations = probe_multiply(&probe, FORM_BF16);       // a second, two a multiply-add
 *
 * What is read should be what the step reads, so that it lies where the step finds it; multiplied
 * is with the instruction that the products of a form are made of, 24 sums side by side, as there.
 * Nothing else may run in the pool meanwhile. */
#ifndef PROBE_H
#define PROBE_H
#include "matmul.h"
#include "pool.h"

struct probe {
    struct pool *pool;
    struct job *job; /* its thread is not in the pool */
    struct scratch *scratch;
};

struct probe_piece { /* read by one thread */
    const char *from;
    size_t bytes; /* all but what is left behind a multiple of 256 */
};

double probe_read(const struct probe *probe, const struct probe_piece *pieces, int n_pieces);
double probe_multiply(const struct probe *probe, enum row_form form);
/* The shortest time, in seconds, of n_tiles of a job. */
double probe_time(const struct probe *probe, int n_tiles, tile_function *run, const void *argument);
#endif /* PROBE_H */
#ifdef PROBE_IMPLEMENTATION
#undef PROBE_IMPLEMENTATION
#include <time.h>

enum { PROBE_REPEATS = 5, PROBE_TILES = 32, PROBE_STEPS = 10000, PROBE_SUMS = 24 };

struct probe_pieces {
    const struct probe_piece *pieces;
    _Atomic float sink; /* keeps the work from being removed */
};

static void probe_read_tile(const void *argument, int tile, struct scratch *scratch) {
    struct probe_pieces *all = (struct probe_pieces *)argument;
    const struct probe_piece *piece = &all->pieces[tile];
    (void)scratch;
    vec sum[4] = {{0}};
    for (size_t i = 0; i + 256 <= piece->bytes; i += 256)
        for (size_t j = 0; j < 4; j++)
            sum[j] += load((const float *)(const void *)(piece->from + i + j * 64));
    all->sink = sum_lanes(sum[0] + sum[1] + sum[2] + sum[3]);
}

static void probe_f32(const void *argument, int tile, struct scratch *scratch) {
    _Atomic float *sink = (_Atomic float *)argument;
    (void)scratch;
    vec sum[PROBE_SUMS], factor = (vec){0} + *sink * 0.0f + 0.999f;
    for (int i = 0; i < PROBE_SUMS; i++)
        sum[i] = factor * (float)(i + tile);
    for (int k = 0; k < PROBE_STEPS; k++) {
#pragma GCC unroll 24
        for (int i = 0; i < PROBE_SUMS; i++)
            sum[i] = sum[i] * factor + factor;
    }
    for (int i = 1; i < PROBE_SUMS; i++)
        sum[0] += sum[i];
    *sink = sum_lanes(sum[0]);
}

#if defined(__x86_64__)
static DOT_BF16 void probe_bf16(const void *argument, int tile, struct scratch *scratch) {
    (void)scratch;
    __m512 sum[PROBE_SUMS];
    __m512bh factor = (__m512bh)_mm512_set1_epi32(0x3c003c00);
    for (int i = 0; i < PROBE_SUMS; i++)
        sum[i] = _mm512_set1_ps((float)(i + tile));
    for (int k = 0; k < PROBE_STEPS; k++) {
#pragma GCC unroll 24
        for (int i = 0; i < PROBE_SUMS; i++)
            sum[i] = _mm512_dpbf16_ps(sum[i], factor, factor);
    }
    for (int i = 1; i < PROBE_SUMS; i++)
        sum[0] = _mm512_add_ps(sum[0], sum[i]);
    *(_Atomic float *)argument = _mm512_reduce_add_ps(sum[0]);
}

/* In assembler: gcc 12 copies sums of this instruction to and fro. */
static DOT_Q8 void probe_q8(const void *argument, int tile, struct scratch *scratch) {
    (void)scratch;
    ivec sum[PROBE_SUMS], factor = (ivec){0} + 0x01020301;
#pragma GCC unroll 24
    for (int i = 0; i < PROBE_SUMS; i++)
        sum[i] = (ivec){0} + (i + tile);
    for (int k = 0; k < PROBE_STEPS; k++) {
#pragma GCC unroll 24
        for (int i = 0; i < PROBE_SUMS; i++)
            __asm__("vpdpbusd %1, %1, %0" : "+v"(sum[i]) : "v"(factor));
    }
#pragma GCC unroll 24
    for (int i = 1; i < PROBE_SUMS; i++)
        sum[0] += sum[i];
    *(_Atomic float *)argument = sum_lanes(__builtin_convertvector(sum[0], vec));
}
#else /* they have FORM_F32 alone */
#define probe_bf16 probe_f32
#define probe_q8   probe_f32
#endif

static double probe_clock(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

double probe_time(const struct probe *probe, int n_tiles, tile_function *run,
                  const void *argument) {
    double best = 1e9;
    pool_enter(probe->pool);
    for (int i = 0; i < PROBE_REPEATS; i++) {
        double start = probe_clock();
        pool_run(probe->pool, probe->job, probe->scratch, n_tiles, run, argument);
        double time = probe_clock() - start;
        best = time < best ? time : best;
    }
    pool_leave(probe->pool);
    return best;
}

double probe_read(const struct probe *probe, const struct probe_piece *pieces, int n_pieces) {
    struct probe_pieces all = {.pieces = pieces};
    double bytes = 0;
    for (int i = 0; i < n_pieces; i++)
        bytes += (double)(pieces[i].bytes / 256 * 256);
    return n_pieces > 0 ? bytes / probe_time(probe, n_pieces, probe_read_tile, &all) : 0;
}

double probe_multiply(const struct probe *probe, enum row_form form) {
    _Atomic float sink = 0;
    int wide = form == FORM_BF16 ? 2 : form == FORM_Q8 ? 4 : 1; /* products of one lane */
    tile_function *run = form == FORM_BF16 ? probe_bf16 : form == FORM_Q8 ? probe_q8 : probe_f32;
    double operations = 2.0 * PROBE_TILES * PROBE_STEPS * PROBE_SUMS * LANES * wide;
    return operations / probe_time(probe, PROBE_TILES, run, &sink);
}
#endif /* PROBE_IMPLEMENTATION */
