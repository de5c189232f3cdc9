/* failing.h: memory that runs out when a test says so. What is compiled with
 *
 *     #define calloc failing_calloc
 *     #define malloc failing_malloc
 *     #define realloc failing_realloc
 *
 * behind this header gets its memory from here. */
#ifndef FAILING_H
#define FAILING_H

#include <stdbool.h>
#include <stdlib.h>

static int allocations_left = -1; /* that are good before one fails; < 0: none does */

static inline bool allocation_fails(void) {
    return allocations_left >= 0 && allocations_left-- == 0;
}

static inline void *failing_calloc(size_t n, size_t bytes) {
    return allocation_fails() ? NULL : calloc(n, bytes);
}

static inline void *failing_malloc(size_t bytes) {
    return allocation_fails() ? NULL : malloc(bytes);
}

static inline void *failing_realloc(void *memory, size_t bytes) {
    return allocation_fails() ? NULL : realloc(memory, bytes);
}

#endif /* FAILING_H */
