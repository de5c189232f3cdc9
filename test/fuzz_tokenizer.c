/* fuzz_tokenizer.c: any text becomes ids and back. The first byte chooses the vocabulary and the
 * pattern. Run by test/fuzz.sh, from the root of the repository. */
#define GGUF_IMPLEMENTATION
#define TOKENIZER_IMPLEMENTATION
#define TEMPLATE_IMPLEMENTATION
#include "../lib/template.h"
#include "../lib/tokenizer.h"
#include "fuzz.h"

enum { SPM, BPE, ALL_VALID };
static const char *const fuzz_points[] = {"spm", "bpe", "valid UTF-8", NULL};

static struct tokenizer *open_vocabulary(const char *path) {
    char error[ERROR_LENGTH];
    struct gguf *file = gguf_open(path, error);
    FUZZ_CHECK(file);
    struct tokenizer *tokenizer = tok_open(file, error);
    FUZZ_CHECK(tokenizer);
    gguf_close(file);
    return tokenizer;
}

static bool is_utf8(const char *text, size_t length) {
    uint32_t code;
    for (int size; length > 0; text += size, length -= (size_t)size)
        if ((size = utf8_read(text, length, &code)) <= 0)
            return false;
    return true;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static struct tokenizer *vocabularies[2];
    if (!vocabularies[0]) {
        vocabularies[0] = open_vocabulary("test/data/vocab-llama-spm.gguf");
        vocabularies[1] = open_vocabulary("test/data/vocab-gpt-2.gguf");
    }
    fuzz_runs++;
    if (size == 0)
        return 0;
    fuzz_reach(data[0] & 1 ? BPE : SPM);
    struct tokenizer *t = vocabularies[data[0] & 1];
    t->pattern = &patterns[data[0] / 2 % (sizeof patterns / sizeof *patterns)];
    const char *text = (const char *)data + 1;
    int n, *ids = tok_encode(t, text, --size, &n);
    FUZZ_CHECK(ids);
    char *back = malloc((size + 8) * 16), out[TOK_TEXT_SIZE];
    size_t length = 0, raw = 0;
    struct tok_stream stream = {0};
    for (int i = 0; i < n; i++) {
        FUZZ_CHECK(ids[i] >= 0 && ids[i] < t->n_tokens && t->tokens[ids[i]].type != TOKEN_CONTROL);
        raw += (size_t)t->tokens[ids[i]].length;
        size_t added = tok_decode(t, &stream, ids[i], out);
        FUZZ_CHECK(is_utf8(out, added));
        memcpy(back + length, out, added);
        length += added;
    }
    length += tok_flush(&stream, back + length);
    FUZZ_CHECK(is_utf8(back, length));
    if (is_utf8(text, size))
        fuzz_reach(ALL_VALID);
    if (t->byte_level) { /* no byte is lost, and valid text comes back as it was */
        FUZZ_CHECK(raw == size);
        FUZZ_CHECK(!is_utf8(text, size) || (length == size && memcmp(back, text, size) == 0));
    }
    free(back);
    free(ids);
    struct turn turn = {NULL, 0, "x", text, size, NULL, 0};
    struct chat_template template = {.kind = data[0] & 1 ? TEMPLATE_NONE : TEMPLATE_LLAMA2};
    free(template_ids(&template, t, &turn, &n));
    return 0;
}
