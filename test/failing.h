/* failing.h: memory that runs out when a test says so. What is compiled with
 *
 *     #define calloc failing_calloc
 *     #define malloc failing_malloc
 *
 * behind this header gets its memory from here. */
#ifndef FAILING_H
#define FAILING_H

#include <stdlib.h>

static int allocations_left = -1; /* that are good before one fails; < 0: none does */

static void *failing_calloc(size_t n, size_t bytes) {
    return allocations_left >= 0 && allocations_left-- == 0 ? NULL : calloc(n, bytes);
}

static void *failing_malloc(size_t bytes) {
    return allocations_left >= 0 && allocations_left-- == 0 ? NULL : malloc(bytes);
}

#endif /* FAILING_H */
