/* fuzz_model.c: a model file of any bytes is opened, or refused by one line. What opens has its
 * tokenizer read, which then takes and makes text, and its smallest matrices packed. The same bytes
 * are read as a tokenizer.bin. Run by test/fuzz.sh. */
#define GGUF_IMPLEMENTATION
#define MODEL_IMPLEMENTATION
#define TOKENIZER_IMPLEMENTATION
#define TEMPLATE_IMPLEMENTATION
#include "../lib/matmul.h"
#include "dynamo.h"
#include "../lib/gguf.h"
#include "../lib/model.h"
#include "../lib/template.h"
#include "../lib/tokenizer.h"
#define MATMUL_IMPLEMENTATION
#include "../lib/matmul.h"
#include "fuzz.h"

enum { OPENED, MODELS, VOCABULARIES, CHATS, CHECKPOINTS, TOKENIZER_BINS, PACKED };
static const char *const fuzz_points[] = {"files",       "models",         "vocabularies", "chats",
                                          "checkpoints", "tokenizer.bins", "packed",       NULL};

static void pack_all(const struct gguf *file) {
    for (size_t i = 0; i < file->n_tensors; i++) {
        const struct tensor *tensor = &file->tensors[i];
        if (tensor->bytes == 0 || tensor->bytes > 1 << 16 || tensor->cols > 4096)
            continue;
        struct weight *weight = pack_open(tensor);
        FUZZ_CHECK(weight != NULL);
        if (!weight->vector) {
            fuzz_reach(PACKED);
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

/* A vocabulary that someone made up spells a text, and is spelled. */
static void use_tokenizer(const struct tokenizer *t) {
    static const char text[] = "abc <|im_start|>a <s>\xC3\xA9\xE2\x96\x81\xFF 12'll\n\n  x [INST]";
    char out[TOK_TEXT_SIZE], note[ERROR_LENGTH];
    struct tok_stream stream = {0};
    int n = 0, *ids = tok_encode(t, text, sizeof text, &n);
    FUZZ_CHECK(ids); /* none, where the vocabulary spells no byte of it */
    for (int i = 0; i < n; i++) {
        FUZZ_CHECK(ids[i] >= 0 && ids[i] < t->n_tokens && t->tokens[ids[i]].type != TOKEN_CONTROL);
        FUZZ_CHECK(tok_decode(t, &stream, ids[i], out) <= sizeof out);
    }
    free(ids);
    for (int i = -1; i <= t->n_tokens && i < 400; i++)
        FUZZ_CHECK(tok_decode(t, &stream, i, out) <= sizeof out);
    (void)tok_flush(&stream, out);
    for (enum template_kind kind = TEMPLATE_CHATML; kind <= TEMPLATE_NONE; kind++) {
        struct turn turn = {NULL, 0, "be <s>", text, sizeof text, "x", 1};
        struct chat_template template = {.kind = kind};
        if (template_fits(kind, t, note)) {
            ids = template_ids(&template, t, &turn, &n);
            FUZZ_CHECK(ids);
            free(ids);
        }
    }
}

static void read_tokenizer_bin(const char *path) {
    char error[ERROR_LENGTH] = "";
    struct tokenizer *t = tok_open_checkpoint(path, 260, error);
    FUZZ_CHECK(t || (*error && !strchr(error, '\n')));
    if (t) {
        fuzz_reach(TOKENIZER_BINS);
        use_tokenizer(t);
    }
    tok_close(t);
}

static void read_model(const char *path) {
    char error[ERROR_LENGTH] = "";
    struct model model;
    if (model_open(&model, path, error)) {
        fuzz_reach(model.is_checkpoint ? CHECKPOINTS : MODELS);
        model_close(&model);
    } else {
        FUZZ_CHECK(error[0] && !strchr(error, '\n'));
    }
}

static void read_vocabulary(struct gguf *file) {
    char note[ERROR_LENGTH] = "";
    struct tokenizer *tokenizer = tok_open(file, note);
    FUZZ_CHECK(tokenizer || (*note && !strchr(note, '\n')));
    if (tokenizer) {
        fuzz_reach(VOCABULARIES);
        use_tokenizer(tokenizer);
    }
    struct chat_template template = template_of(file, tokenizer, note);
    if (template.kind != TEMPLATE_NONE)
        fuzz_reach(CHATS);
    free(template.system);
    FUZZ_CHECK(!strchr(note, '\n'));
    tok_close(tokenizer);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    char path[64], error[ERROR_LENGTH] = "";
    fuzz_runs++;
    fuzz_file(path, sizeof path, data, size);
    struct gguf *file = gguf_open(path, error);
    FUZZ_CHECK(!file == !!error[0] && !strchr(error, '\n'));
    if (file) {
        fuzz_reach(OPENED);
        read_vocabulary(file);
        pack_all(file);
        gguf_close(file);
    }
    read_model(path);
    read_tokenizer_bin(path);
    return 0;
}
