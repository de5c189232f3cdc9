/* fuzz_seeds.c: models to begin with, for test/fuzz.sh: whole ones, of every architecture, type and
 * template, two llama2.c checkpoints and a tokenizer.bin, so small that a mutation often hits what
 * matters. fuzz_seeds FOLDER */
#include "tiny.h"

#include <stdlib.h>

static void write_seed(const char *folder, const char *name, const void *bytes, size_t size) {
    char path[512];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "wb");
    if (!file || fwrite(bytes, 1, size, file) != size || fclose(file) != 0) {
        perror(path);
        exit(1);
    }
}

/* dim, hidden, layers, heads, kv heads, vocabulary (negative: untied), positions; then weights. */
static void write_checkpoint(const char *folder, const char *name, int32_t vocab) {
    const int32_t dim = 4, hidden = 8, length = 8, header[] = {dim, hidden, 1, 2, 1, vocab, length};
    int32_t rows = abs(vocab), layer = 2 * dim + 3 * dim * dim + 3 * dim * hidden;
    int32_t n = rows * dim * (vocab < 0 ? 2 : 1) + layer + dim + length * dim / 2;
    static float bytes[4096];
    memcpy(bytes, header, sizeof header);
    write_seed(folder, name, bytes, sizeof header + (size_t)n * sizeof(float));
}

/* A tokenizer.bin of 260 tokens: three special ones, all bytes, and `ab`. */
static void write_tokenizer_bin(const char *folder) {
    static const char *const first[] = {"<unk>", "<s>", "</s>"};
    static uint8_t bytes[8192];
    size_t size = sizeof(uint32_t);
    for (int i = 0; i < 260; i++) {
        char spelling[8];
        float score = -(float)i;
        int length = snprintf(spelling, sizeof spelling, "%s", i < 3 ? first[i] : "ab");
        if (i >= 3 && i < 259)
            length = (int)tiny_spell(false, i - 3, spelling);
        memcpy(bytes + size, &score, 4);
        memcpy(bytes + size + 4, &length, 4);
        memcpy(bytes + size + 8, spelling, (size_t)length);
        size += 8 + (size_t)length;
    }
    write_seed(folder, "tokenizer.bin", bytes, size);
}

int main(int argc, char **argv) {
    static const uint32_t types[] = {TINY_F32,  TINY_F16,  TINY_Q4_0, TINY_Q8_0,
                                     TINY_Q4_K, TINY_Q6_K, TINY_BF16};
    static const char *const architectures[] = {"llama", "qwen2", "qwen3"};
    static const char *const chats[] = {"<|im_start|>", "<|start_header_id|>", "<<SYS>> [INST]",
                                        "[INST]", "nothing known"};
    static struct tiny tiny;
    if (argc != 2)
        return 2;
    for (int i = 0; i < 21; i++) {
        char name[64];
        struct tiny_shape shape = {architectures[i % 3], types[i / 3], i < 5 ? chats[i] : NULL};
        if (!tiny_make(&tiny, shape))
            return 1;
        snprintf(name, sizeof name, "%s-%u", shape.architecture, (unsigned)shape.type);
        write_seed(argv[1], name, tiny.bytes, tiny.size);
    }
    write_tokenizer_bin(argv[1]);
    write_checkpoint(argv[1], "tied", 16);
    write_checkpoint(argv[1], "untied", -16);
    return 0;
}
