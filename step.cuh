/* step.cuh: what a step is, as the kernels see it. The host writes it into one buffer behind this
 * header and copies it up at once; arrays are found by their distance from the header, so a
 * recorded graph, whose arguments never change, serves any batch. */
#ifndef STEP_CUH
#define STEP_CUH
#include "dynamo.h"
#include "ptx.cuh"

struct step_header {
    int n_rows, n_generated, n_samples, n_splits; /* rows [0, n_generated) are generated tokens */
    /* bytes from the header: (n_rows) ints … */
    int token, position, row_sequence;
    int sample_row, sampling; /* (n_samples) int, struct sampling */
    int sequences, table;     /* (n_sequences) struct sequence; (n_blocks) slots */
    int prompt_items, splits; /* int2 {sequence, first query}; (n_splits) {sequence, split} */
};

template <typename T> DEVICE const T *array_of(const struct step_header *step, int distance) {
    return reinterpret_cast<const T *>(reinterpret_cast<const char *>(step) + distance);
}
#endif /* STEP_CUH */
