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

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

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
