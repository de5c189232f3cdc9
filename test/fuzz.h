/* fuzz.h: what the fuzz targets share. A failed FUZZ_CHECK ends the program, which is a finding. */
#ifndef FUZZ_H
#define FUZZ_H
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define FUZZ_CHECK(condition)                                                                      \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                        \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

enum { FUZZ_POINTS = 8, FUZZ_RUNS = 1000 /* of so many some must reach every point */ };

/* What a target is about, ended by NULL; fuzz_reach(i) counts that an input came there. */
static const char *const fuzz_points[FUZZ_POINTS];
static long fuzz_reached[FUZZ_POINTS], fuzz_runs;

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerInitialize(int *argc, char ***argv);

static inline void fuzz_reach(int point) {
    fuzz_reached[point]++;
}

static void fuzz_report(void) {
    fprintf(stderr, "reached");
    for (int i = 0; fuzz_points[i]; i++)
        fprintf(stderr, "%s %ld %s", i > 0 ? "," : "", fuzz_reached[i], fuzz_points[i]);
    fprintf(stderr, "\n");
    for (int i = 0; fuzz_points[i] && fuzz_runs >= FUZZ_RUNS; i++)
        if (fuzz_reached[i] == 0)
            _exit(1);
}

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc;
    (void)argv;
    return atexit(fuzz_report);
}

/* The input as a file in memory, the same one every time. */
static inline void fuzz_file(char *path, size_t path_size, const uint8_t *data, size_t size) {
    static int descriptor = -1;
    if (descriptor < 0)
        descriptor = memfd_create("fuzz", 0);
    FUZZ_CHECK(descriptor >= 0 && ftruncate(descriptor, 0) == 0 &&
               pwrite(descriptor, data, size, 0) == (ssize_t)size);
    snprintf(path, path_size, "/proc/self/fd/%d", descriptor);
}
#endif
