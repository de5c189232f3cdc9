/* pace.h: how much work the steps were, and how long they took.
 *
 *     pace_open(&pace, &model, KV_F32);
 *     pace_count(&pace, &step->batch, seconds);            // after each step
 *     ... pace.decode.bytes / pace.decode.seconds ...      // stats.h shows it
 *
 * A step of generated tokens is bound by reading: every matrix once, and the keys and values of its
 * texts. A step of prompts is bound by arithmetic. So each kind is held against a limit of its own
 * (see `limits` in dynamo.h). A step with rows of both kinds counts for neither. */
#ifndef PACE_H
#define PACE_H

#include "dynamo.h"

struct paced { /* steps of one kind */
    int64_t tokens;
    double seconds, bytes, operations; /* operations: two for a multiply-add */
};

struct pace {
    const struct model *model;
    enum kv_type kv_type;
    double weight_bytes;                  /* that a step reads */
    double layer_weights, output_weights; /* by which each row, and each sample, is multiplied */
    struct paced decode, prefill;
};

void pace_open(struct pace *pace, const struct model *model, enum kv_type kv_type);
void pace_count(struct pace *pace, const struct batch *batch, double seconds);

#endif /* PACE_H */

#ifdef PACE_IMPLEMENTATION
#undef PACE_IMPLEMENTATION

void pace_open(struct pace *pace, const struct model *model, enum kv_type kv_type) {
    *pace = (struct pace){.model = model, .kv_type = kv_type};
    for (int i = 0; i < N_MODEL_TENSORS; i++) {
        const struct model_tensor *kind = &model_tensors[i];
        for (int layer = 0; layer < model->config.n_layers; layer++) {
            const struct tensor *tensor =
                kind->layered && kind->role >= 0 ? model->layers[layer][kind->role] : NULL;
            if (tensor && kind->rows != DIM_ONE) {
                pace->weight_bytes += (double)tensor->bytes;
                pace->layer_weights += (double)tensor->rows * (double)tensor->cols;
            }
        }
    }
    const struct tensor *output = model->layers[0][OUTPUT];
    pace->weight_bytes += (double)output->bytes;
    pace->output_weights = (double)output->rows * (double)output->cols;
}

void pace_count(struct pace *pace, const struct batch *batch, double seconds) {
    const struct model_config *config = &pace->model->config;
    double seen = 0; /* tokens that rows attend to */
    int n_generated = 0;
    for (int i = 0; i < batch->n_sequences; i++)
        n_generated += batch->sequence[i].generated;
    for (int i = 0; i < batch->n_rows; i++)
        seen += batch->position[i] + 1;
    if (batch->n_rows == 0 || (n_generated > 0 && n_generated < batch->n_sequences))
        return;
    struct paced *sum = n_generated > 0 ? &pace->decode : &pace->prefill;
    sum->tokens += batch->n_rows;
    sum->seconds += seconds;
    sum->bytes += pace->weight_bytes +
                  (double)batch->n_blocks * (double)block_bytes(config, 1, pace->kv_type);
    sum->operations +=
        2 * (batch->n_rows * pace->layer_weights + batch->n_samples * pace->output_weights) +
        4 * seen * config->n_layers * config->n_heads * config->head_dim;
}

#endif /* PACE_IMPLEMENTATION */
