/* fuzz_model.c: a model file of any bytes is opened, or refused by one line. What opens has its
 * tokenizer read, and its smallest matrices packed. Run by test/fuzz.sh. */
#define GGUF_IMPLEMENTATION
#define MODEL_IMPLEMENTATION
#define SOURCE_IMPLEMENTATION
#define TOKENIZER_IMPLEMENTATION
#define TEMPLATE_IMPLEMENTATION
#include "../pack.h"
#include "dynamo.h"
#include "gguf.h"
#include "source.h"
#include "template.h"
#include "tokenizer.h"
#define PACK_IMPLEMENTATION
#include "pack.h"
#include "fuzz.h"

static void pack_all(const struct gguf *file) {
    for (size_t i = 0; i < file->n_tensors; i++) {
        const struct tensor *tensor = &file->tensors[i];
        if (tensor->bytes == 0 || tensor->bytes > 1 << 16 || tensor->cols > 4096)
            continue;
        struct weight *weight = pack_open(tensor);
        FUZZ_CHECK(weight != NULL);
        if (!weight->vector) {
            float row[4096];
            weight->panels = aligned_alloc(64, round_up(pack_bytes(weight), 64));
            for (int panel = 0; panel < pack_panels(weight); panel++)
                pack_panel(weight, panel);
            pack_read_row(weight, weight->n_rows - 1, row);
            free(weight->panels);
        }
        pack_close(weight);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    char path[64], error[GGUF_ERROR_LENGTH] = "", note[TOK_ERROR_LENGTH];
    fuzz_file(path, sizeof path, data, size);
    struct gguf *file = source_open(path, error);
    FUZZ_CHECK(!file == !!error[0] && !strchr(error, '\n'));
    if (file) {
        struct model model;
        if (model_open(&model, file, error))
            model_close(&model);
        else
            FUZZ_CHECK(error[0] && !strchr(error, '\n'));
        struct tokenizer *tokenizer = tok_open(file, note);
        FUZZ_CHECK(tokenizer || !strchr(note, '\n'));
        (void)template_of(file, tokenizer, note);
        FUZZ_CHECK(!strchr(note, '\n'));
        tok_close(tokenizer);
        pack_all(file);
        gguf_close(file);
    }
    return 0;
}
