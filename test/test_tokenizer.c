/* test_tokenizer.c: tokenizer.h against ids that others computed, against a naive encoder written
 * here, and against files and token streams that nobody would want.
 *
 * The ids in test/data/vocab-*.gguf.out and of user-defined tokens are llama.cpp's. Those of
 * tokenizer.bin below were computed with a transcription of llama2.c's quadratic encoder to Python
 * (look up characters, else byte + 3; then merge the best pair of the whole list until there is
 * none). */
#define GGUF_IMPLEMENTATION
#define TOKENIZER_IMPLEMENTATION
#include "../lib/tokenizer.h"
#include "check.h"
#include "tiny.h"
#include <time.h>
#include <unistd.h>

#define SPM_PATH        "test/data/vocab-llama-spm.gguf"
#define GPT2_PATH       "test/data/vocab-gpt-2.gguf"
#define CHECKPOINT_PATH "test/data/aidreams_tokenizer.bin"

enum { CHECKPOINT_TOKENS = 512, MEGABYTE = 1 << 20 };

static uint64_t random_next(uint64_t *state) { /* splitmix64 */
    uint64_t z = *state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

static int random_below(uint64_t *state, int limit) {
    return (int)(random_next(state) % (uint64_t)limit);
}

static struct tokenizer *open_path(struct check *check, const char *path) {
    char error[ERROR_LENGTH] = "";
    struct gguf *file = gguf_open(path, error);
    CHECK(file, "%s", error);
    struct tokenizer *tokenizer = file ? tok_open(file, error) : NULL;
    CHECK(tokenizer, "%s", error);
    if (file)
        gguf_close(file); /* the tokenizer must not need it */
    return tokenizer;
}

/* The text of all ids, zero-ended, freed by the caller. */
static char *decode_all(const struct tokenizer *tokenizer, const int *ids, int n, size_t *length) {
    char *text = malloc((size_t)n * TOK_TOKEN_LENGTH + TOK_TEXT_SIZE + 1), out[TOK_TEXT_SIZE];
    struct tok_stream stream = {0};
    size_t at = 0, size;
    for (int i = 0; i < n; i++) {
        size = tok_decode(tokenizer, &stream, ids[i], out);
        memcpy(text + at, out, size);
        at += size;
    }
    size = tok_flush(&stream, out);
    memcpy(text + at, out, size);
    *length = at + size;
    text[*length] = 0;
    return text;
}

static bool same_ids(const int *a, int n_a, const int *b, int n_b) {
    return n_a == n_b && memcmp(a, b, (size_t)n_a * sizeof *a) == 0;
}

/* ---- against other implementations ---- */

/* A whole file, ended by a zero byte; freed by the caller. */
static char *read_file(const char *path, size_t *length) {
    enum { MOST = 1 << 22 };
    char *data = malloc(MOST);
    FILE *stream = fopen(path, "rb");
    *length = data && stream ? fread(data, 1, MOST, stream) : MOST;
    if (stream)
        fclose(stream);
    if (*length < MOST) {
        data[*length] = 0;
        return data;
    }
    free(data);
    return NULL;
}

/* Writes bytes to a new file that the caller removes; `path` ends in XXXXXX. */
static bool write_file(char *path, const void *data, size_t length) {
    int descriptor = mkstemp(path);
    bool ok = descriptor >= 0 && write(descriptor, data, length) == (ssize_t)length;
    return descriptor >= 0 && close(descriptor) == 0 && ok;
}

static void check_cases(struct check *check, const char *path) {
    static const char mark[] = "\n__ggml_vocab_test__\n";
    char name[128];
    size_t length;
    snprintf(name, sizeof name, "%s.inp", path);
    char *texts = read_file(name, &length);
    snprintf(name, sizeof name, "%s.out", path);
    char *answers = read_file(name, &length), *answer = answers;
    struct tokenizer *tokenizer = open_path(check, path);
    int cases = 0;
    CHECK(texts && answers, "%s: its cases are not there", path);
    for (char *text = texts, *end; text && answers && (end = strstr(text, mark)); cases++) {
        int expected[4096], n = 0, n_ids;
        char *line_end = answer + strcspn(answer, "\n");
        for (char *next = answer; next < line_end && n < 4096; n++)
            expected[n] = (int)strtol(next, &next, 10);
        int *ids = tok_encode(tokenizer, text, (size_t)(end - text), &n_ids);
        CHECK(same_ids(ids, n_ids, expected, n), "%s: case %d: %d ids, not %d", path, cases, n_ids,
              n);
        char *back = decode_all(tokenizer, ids, n_ids, &length);
        CHECK(length == (size_t)(end - text) && memcmp(back, text, length) == 0,
              "%s: case %d comes back as `%s`", path, cases, back);
        free(back);
        free(ids);
        answer = line_end + 1;
        text = end + sizeof mark - 1;
    }
    CHECK(cases == 46, "%s: %d cases", path, cases);
    tok_close(tokenizer);
    free(texts);
    free(answers);
}

static void llama_cpp_ids(struct check *check) {
    check_cases(check, SPM_PATH);
    check_cases(check, GPT2_PATH);
}

static void special_tokens(struct check *check) {
    struct tokenizer *spm = open_path(check, SPM_PATH), *gpt2 = open_path(check, GPT2_PATH);
    CHECK(spm->n_tokens == 32000 && gpt2->n_tokens == 50257, "wrong sizes");
    CHECK(tok_bos(spm) == 1 && tok_eos(spm) == 2 && tok_adds_bos(spm), "bos %d", tok_bos(spm));
    CHECK(tok_bos(gpt2) == 50256 && tok_eos(gpt2) == 50256, "eos %d", tok_eos(gpt2));
    CHECK(!tok_adds_bos(gpt2), "gpt-2 begins without a token");
    CHECK(tok_find(spm, "<s>", 3) == 1 && tok_find(spm, "</s>", 4) == 2, "no <s>");
    CHECK(tok_find(gpt2, "<|endoftext|>", 13) == 50256, "no <|endoftext|>");
    CHECK(tok_find(spm, " Hello", 6) == 15043 && tok_find(gpt2, " Hello", 6) == 18435, "no Hello");
    CHECK(tok_find(spm, "no such token", 13) == -1, "found what is not there");
    CHECK(spm->tokens[1].type == TOKEN_CONTROL && spm->tokens[15043].type != TOKEN_CONTROL,
          "control");
    static const char text[] = "x<s></s><unk><0x41><|endoftext|>";
    for (int round = 0; round < 2; round++) {
        const struct tokenizer *tokenizer = round ? spm : gpt2;
        int n;
        int *ids = tok_encode(tokenizer, text, sizeof text - 1, &n);
        for (int i = 0; i < n; i++)
            CHECK(tokenizer->tokens[ids[i]].type != TOKEN_CONTROL && ids[i] != 0, "id %d in text",
                  ids[i]);
        CHECK(n > 12, "only %d ids", n);
        free(ids);
    }
    tok_close(spm);
    tok_close(gpt2);
}

static void checkpoint_ids(struct check *check) {
    static const struct {
        const char *text;
        int ids[32], n;
    } cases[] = {
        {"I see", {303, 266, 430, 430}, 4},
        {"Once upon a time", {429, 491, 433, 295, 429, 444, 445, 265, 262, 263, 342, 430}, 12},
        {" two  spaces", {429, 263, 449, 437, 429, 420, 435, 404}, 8},
        {"", {}, 0},
        {"whispers é 🦙\n<s>",
         {325, 429, 198, 172, 429, 243, 162, 169, 156, 13, 63, 431, 65},
         13},
    };
    char error[ERROR_LENGTH] = "";
    struct tokenizer *tokenizer = tok_open_checkpoint(CHECKPOINT_PATH, CHECKPOINT_TOKENS, error);
    CHECK(tokenizer, "%s", error);
    for (size_t i = 0; tokenizer && i < sizeof cases / sizeof *cases; i++) {
        int n;
        size_t length;
        int *ids = tok_encode(tokenizer, cases[i].text, strlen(cases[i].text), &n);
        CHECK(same_ids(ids, n, cases[i].ids, cases[i].n), "`%s`: %d ids", cases[i].text, n);
        char *back = decode_all(tokenizer, ids, n, &length);
        CHECK(strcmp(back, cases[i].text) == 0, "`%s` comes back as `%s`", cases[i].text, back);
        free(back);
        free(ids);
    }
    CHECK(tok_adds_bos(tokenizer) && tok_bos(tokenizer) == 1, "begins with token 1");
    tok_close(tokenizer);
    CHECK(!tok_open_checkpoint(CHECKPOINT_PATH, 511, error) && strstr(error, "from token 511"),
          "%s", error);
    CHECK(!tok_open_checkpoint(CHECKPOINT_PATH, 513, error) && strstr(error, "from token 512"),
          "%s", error);
    CHECK(!tok_open_checkpoint(CHECKPOINT_PATH, -1, error), "a negative vocabulary");
    CHECK(!tok_open_checkpoint("test/data/none.bin", 512, error) && strstr(error, "none.bin"), "%s",
          error);
}

/* The same vocabularies with four tokens made user-defined; the ids are llama.cpp's again. */
static void user_defined_tokens(struct check *check) {
    static const struct {
        const char *path;
        int tokens[4]; /* story, qu, z, ing */
        int ids[18], n;
    } cases[] = {{SPM_PATH,
                  {24098, 339, 29920, 292},
                  {450, 29871, 339, 29871, 860, 29871, 24098, 584, 29871, 29896, 29992, 29920, 292,
                   29871, 529, 29879, 29958, 540},
                  18},
                 {GPT2_PATH,
                  {13571, 421, 89, 278},
                  {464, 220, 421, 624, 220, 13571, 25, 352, 31, 89, 278, 1279, 82, 29, 339},
                  15}};
    static const char text[] = "The quick story: 1@zing <s> he",
                      key[] = "tokenizer.ggml.token_type";
    for (int i = 0; i < 2; i++) {
        char path[] = "/tmp/test_tokenizer_XXXXXX";
        size_t length, key_length = sizeof key - 1;
        char *data = read_file(cases[i].path, &length), *types = NULL;
        for (size_t at = 0; data && at + key_length < length && !types; at++)
            types = memcmp(data + at, key, key_length) ? NULL : data + at + key_length + 16;
        CHECK(types, "%s has no %s", cases[i].path, key);
        for (int j = 0; types && j < 4; j++)
            memcpy(types + 4 * cases[i].tokens[j], &(int32_t){TOKEN_USER_DEFINED}, 4);
        CHECK(types && write_file(path, data, length), "%s cannot be written", path);
        struct tokenizer *tokenizer = open_path(check, path);
        int n = 0;
        int *ids = tokenizer ? tok_encode(tokenizer, text, sizeof text - 1, &n) : NULL;
        CHECK(same_ids(ids, n, cases[i].ids, cases[i].n), "%s: %d ids", cases[i].path, n);
        free(ids);
        free(data);
        unlink(path);
        tok_close(tokenizer);
    }
}

/* No cut or changed byte may crash, and none that is refused goes without its path. */
static void damaged_checkpoints(struct check *check) {
    uint64_t state = 5;
    size_t length;
    char *data = read_file(CHECKPOINT_PATH, &length);
    CHECK(data, "%s is not there", CHECKPOINT_PATH);
    for (int round = 0, refused = 0; data && round < 400; round++) {
        char path[] = "/tmp/test_tokenizer_XXXXXX", error[ERROR_LENGTH] = "";
        size_t at = (size_t)random_below(&state, (int)length);
        char kept = data[at];
        data[at] = (char)random_next(&state);
        CHECK(write_file(path, data, round % 2 ? at : length), "%s cannot be written", path);
        data[at] = kept;
        struct tokenizer *tokenizer = tok_open_checkpoint(path, CHECKPOINT_TOKENS, error);
        CHECK(!tokenizer || round % 2 == 0, "cut at byte %zu and accepted", at);
        CHECK(tokenizer || (strstr(error, path) == error && !strchr(error, '\n')), "%s", error);
        refused += !tokenizer;
        if (tokenizer) {
            int n;
            int *ids = tok_encode(tokenizer, "Once upon a time", 16, &n);
            CHECK(ids && n > 0 && n <= 17, "%d ids", n);
            free(ids);
        }
        CHECK(round < 399 || (refused > 200 && refused < 400), "%d refused", refused);
        tok_close(tokenizer);
        unlink(path);
    }
    free(data);
}

/* ---- against a naive encoder ---- */

/* A random vocabulary over a space and the letters a to d. Scores are few, so that ties are many.
 */
struct naive_vocab {
    char texts[330][64];
    float scores[330];
    int n;
};

static void naive_new(struct naive_vocab *vocab, uint64_t *state) {
    memset(vocab, 0, sizeof *vocab);
    for (int byte = 0; byte < 256; byte++)
        snprintf(vocab->texts[3 + byte], 64, "<0x%02X>", (unsigned)byte);
    strcpy(vocab->texts[0], "<unk>");
    strcpy(vocab->texts[1], "<s>");
    strcpy(vocab->texts[2], "</s>");
    for (vocab->n = 259; vocab->n < 264; vocab->n++)
        vocab->texts[vocab->n][0] = " abcd"[vocab->n - 259];
    int limit = 270 + random_below(state, 60);
    while (vocab->n < limit) {
        const char *left = vocab->texts[259 + random_below(state, vocab->n - 259)];
        const char *right = vocab->texts[259 + random_below(state, vocab->n - 259)];
        if (strlen(left) + strlen(right) < 64) {
            char *text = vocab->texts[vocab->n];
            memcpy(text, left, strlen(left));
            memcpy(text + strlen(left), right, strlen(right));
            vocab->scores[vocab->n++] = (float)-random_below(state, 6);
        }
    }
}

static int naive_find(const struct naive_vocab *vocab, const char *left, const char *right) {
    char text[128];
    snprintf(text, sizeof text, "%s%s", left, right);
    for (int i = 259; i < vocab->n; i++)
        if (strcmp(vocab->texts[i], text) == 0)
            return i;
    return -1;
}

/* Merges the best pair of the whole list, the first of equals, until there is none. */
static int naive_encode(const struct naive_vocab *vocab, const char *text, int *ids) {
    int n = 0;
    ids[n++] = 259;
    for (; *text; text++) {
        char letter[2] = {*text, 0};
        int token = naive_find(vocab, letter, "");
        ids[n++] = token >= 0 ? token : 3 + (unsigned char)*text;
    }
    while (true) {
        int best = -1, made = -1;
        for (int i = 0; i + 1 < n; i++) {
            int token = naive_find(vocab, vocab->texts[ids[i]], vocab->texts[ids[i + 1]]);
            if (token >= 0 && (best < 0 || vocab->scores[token] > vocab->scores[made])) {
                best = i;
                made = token;
            }
        }
        if (best < 0)
            return n;
        ids[best] = made;
        n--;
        memmove(ids + best + 1, ids + best + 2, (size_t)(n - best - 1) * sizeof *ids);
    }
}

static struct tokenizer *naive_open(const struct naive_vocab *vocab, char *error) {
    char data[1 << 15], path[] = "/tmp/test_tokenizer_XXXXXX";
    size_t at = 4;
    memset(data, 0, 4);
    for (int i = 0; i < vocab->n; i++) {
        int length = (int)strlen(vocab->texts[i]);
        memcpy(data + at, &vocab->scores[i], 4);
        memcpy(data + at + 4, &length, 4);
        memcpy(data + at + 8, vocab->texts[i], (size_t)length);
        at += 8 + (size_t)length;
    }
    bool written = write_file(path, data, at);
    struct tokenizer *tokenizer = written ? tok_open_checkpoint(path, vocab->n, error) : NULL;
    unlink(path);
    return tokenizer;
}

static void naive_ids(struct check *check) {
    uint64_t state = 1;
    for (int round = 0; round < 60; round++) {
        struct naive_vocab vocab;
        char error[ERROR_LENGTH] = "", text[101] = "";
        naive_new(&vocab, &state);
        struct tokenizer *tokenizer = naive_open(&vocab, error);
        CHECK(tokenizer, "%s", error);
        for (int i = 0; tokenizer && i < 20; i++) {
            int expected[128], n, length = 1 + random_below(&state, 100);
            for (int j = 0; j < length; j++)
                text[j] = " abcde"[random_below(&state, 6)];
            text[length] = 0;
            int *ids = tok_encode(tokenizer, text, (size_t)length, &n);
            int n_expected = naive_encode(&vocab, text, expected);
            CHECK(same_ids(ids, n, expected, n_expected), "round %d: `%s`", round, text);
            free(ids);
        }
        tok_close(tokenizer);
    }
}

/* ---- there and back ---- */

/* Whether a text is valid UTF-8, by the table of the Unicode standard (3-7). */
static bool valid_utf8(const unsigned char *s, size_t n) {
    for (size_t i = 0; i < n;) {
        unsigned a = s[i], b = i + 1 < n ? s[i + 1] : 0, c = i + 2 < n ? s[i + 2] : 0;
        unsigned d = i + 3 < n ? s[i + 3] : 0;
        bool b_ok = b >> 6 == 2, c_ok = c >> 6 == 2, d_ok = d >> 6 == 2;
        uint32_t three = (a & 15) << 12 | (b & 63) << 6 | (c & 63);
        uint32_t four = (a & 7) << 18 | (b & 63) << 12 | (c & 63) << 6 | (d & 63);
        if (a < 0x80)
            i += 1;
        else if (a >> 5 == 6 && a >= 0xC2 && b_ok)
            i += 2;
        else if (a >> 4 == 14 && b_ok && c_ok && three >= 0x800 && three >> 11 != 27)
            i += 3;
        else if (a >> 3 == 30 && b_ok && c_ok && d_ok && four >= 0x10000 && four < 0x110000)
            i += 4;
        else
            return false;
    }
    return true;
}

static size_t random_utf8(uint64_t *state, char *out, int n) {
    static const uint32_t limits[] = {0x80, 0x80, 0x800, 0x10000, 0x110000};
    char *at = out;
    while (n-- > 0) {
        uint32_t code = (uint32_t)random_next(state) % limits[random_below(state, 5)];
        if (code >> 11 == 27 || code == 0x2581) /* no surrogates; U+2581 means a space */
            code = ' ';
        if (code < 0x80) {
            *at++ = (char)code;
            continue;
        }
        int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
        *at++ = (char)((0xFF00u >> (more + 1)) | code >> 6 * more);
        while (more-- > 0)
            *at++ = (char)(0x80 | (code >> 6 * more & 63));
    }
    return (size_t)(at - out);
}

static void round_trips(struct check *check) {
    static const char *const paths[] = {SPM_PATH, GPT2_PATH};
    uint64_t state = 2;
    for (int i = 0; i < 2; i++) {
        struct tokenizer *tokenizer = open_path(check, paths[i]);
        for (int round = 0; tokenizer && round < 300; round++) {
            char text[400];
            int n;
            size_t length = random_utf8(&state, text, random_below(&state, 100)), back_length;
            CHECK(valid_utf8((unsigned char *)text, length), "the test's own text");
            int *ids = tok_encode(tokenizer, text, length, &n);
            char *back = decode_all(tokenizer, ids, n, &back_length);
            CHECK(back_length == length && memcmp(back, text, length) == 0, "round %d", round);
            free(back);
            free(ids);
        }
        tok_close(tokenizer);
    }
}

static void streams_stay_valid(struct check *check) {
    static const char *const paths[] = {SPM_PATH, GPT2_PATH};
    uint64_t state = 3;
    for (int i = 0; i < 2; i++) {
        struct tokenizer *tokenizer = open_path(check, paths[i]);
        struct tok_stream stream = {0};
        int replaced = 0;
        for (int round = 0; tokenizer && round < 20000; round++) {
            char out[TOK_TEXT_SIZE];
            int token = random_below(&state, round % 2 ? 300 : tokenizer->n_tokens) - 1;
            size_t size =
                round % 50 ? tok_decode(tokenizer, &stream, token, out) : tok_flush(&stream, out);
            CHECK(valid_utf8((unsigned char *)out, size), "token %d", token);
            replaced += size >= 3 && memcmp(out, "\xEF\xBF\xBD", 3) == 0;
        }
        CHECK(replaced > 100, "only %d texts began with U+FFFD", replaced);
        tok_close(tokenizer);
    }
}

static void stream_details(struct check *check) {
    struct tokenizer *tokenizer = open_path(check, SPM_PATH);
    struct tok_stream stream = {0};
    char out[TOK_TEXT_SIZE];
    int llama[] = {3 + 0xF0, 3 + 0x9F, 3 + 0xA6, 3 + 0x99};
    for (int i = 0; i < 4; i++) {
        size_t size = tok_decode(tokenizer, &stream, llama[i], out);
        CHECK(size == (i < 3 ? 0u : 4u), "byte %d gave %zu", i, size);
    }
    CHECK(memcmp(out, "\xF0\x9F\xA6\x99", 4) == 0, "not a llama");
    CHECK(tok_decode(tokenizer, &stream, 3 + 0xE2, out) == 0, "half a character");
    CHECK(tok_decode(tokenizer, &stream, 15043, out) == 9, "U+FFFD and ` Hello`");
    CHECK(memcmp(out, "\xEF\xBF\xBD Hello", 9) == 0, "the space stays within a text");
    CHECK(tok_decode(tokenizer, &stream, 3 + 0xE2, out) == 0, "half a character");
    CHECK(tok_flush(&stream, out) == 3 && memcmp(out, "\xEF\xBF\xBD", 3) == 0, "flush");
    CHECK(tok_decode(tokenizer, &stream, 1, out) == 0, "a control token is no text");
    CHECK(tok_decode(tokenizer, &stream, 15043, out) == 5, "the space goes at the beginning");
    tok_close(tokenizer);
}

static void bad_bytes(struct check *check) {
    static const char text[] = "a\xFFz\xE2\x82 \xED\xA0\x80";
    struct tokenizer *spm = open_path(check, SPM_PATH), *gpt2 = open_path(check, GPT2_PATH);
    static const int expected[] = {263,   3 + 0xFF, 29920,    3 + 0xE2, 3 + 0x82,
                                   29871, 3 + 0xED, 3 + 0xA0, 3 + 0x80};
    int n;
    int *ids = tok_encode(spm, text, sizeof text - 1, &n);
    CHECK(same_ids(ids, n, expected, 9), "%d ids", n);
    free(ids);
    ids = tok_encode(gpt2, text, sizeof text - 1, &n);
    size_t bytes = 0;
    for (int i = 0; i < n; i++)
        bytes += (size_t)gpt2->tokens[ids[i]].length;
    CHECK(bytes == sizeof text - 1, "%zu bytes are spelled", bytes);
    free(ids);
    tok_close(spm);
    tok_close(gpt2);
}

/* ---- words: what the `tokenizers` package makes of the published patterns ---- */

static size_t from_hex(const char *hex, char *out) {
    size_t n = 0;
    for (unsigned byte; sscanf(hex + 2 * n, "%2x", &byte) == 1; n++)
        out[n] = (char)byte;
    return n;
}

/* What is left of the words that a text should be cut into. */
struct expected {
    struct check *check;
    const char *line, *sizes; /* the pattern, and the bytes of each word */
    const char *text;
};

static void expect_word(void *context, const char *word, size_t length) {
    struct expected *e = context;
    struct check *check = e->check;
    char *end;
    size_t size = strtoul(e->sizes, &end, 10);
    CHECK(size == length, "%s: `%s`: %zu bytes of `%s`, expected %zu", e->line, e->text, length,
          word, size);
    e->sizes = size == length ? end + (*end == ',') : "0";
}

static void check_splits(struct check *check, const char *path) {
    static char line[1 << 14], text[1 << 13];
    size_t length = 0, n_lines = 0;
    FILE *file = fopen(path, "r");
    CHECK(file != NULL, "%s", path);
    while (file && fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = 0;
        char *rest = strchr(line, ' ');
        *rest++ = 0;
        if (!strcmp(line, "text")) {
            length = from_hex(rest, text);
            text[length] = 0;
            continue;
        }
        const struct pattern *pattern = pattern_find((struct gguf_string){line, strlen(line)});
        struct expected expected = {check, line, rest, text};
        CHECK(pattern != NULL, "%s", line);
        if (pattern)
            split_words(pattern->expressions, text, length, expect_word, &expected);
        CHECK(!*expected.sizes, "%s: `%s`: words are missing", line, text);
        n_lines++;
    }
    CHECK(n_lines > 2500, "%zu lines", n_lines);
    if (file)
        fclose(file);
}

static void published_splits(struct check *check) {
    check_splits(check, getenv("SPLITS") ? getenv("SPLITS") : "test/data/splits.txt");
}

/* Ids as the `tokenizers` package and `sentencepiece` have them: test/make_ids.py. */
static void others_ids(struct check *check) {
    static char line[1 << 15], text[1 << 13];
    int expected[1 << 12], n_lines = 0;
    struct tokenizer *bytes = open_path(check, "test/data/vocab-bytes.gguf");
    struct tokenizer *gemma = open_path(check, "test/data/vocab-gemma.gguf");
    CHECK(tok_lost_bytes(bytes) == 9 && tok_lost_bytes(gemma) == 0, "%d bytes are lost",
          tok_lost_bytes(bytes));
    const char *path = getenv("IDS") ? getenv("IDS") : "test/data/ids.txt";
    FILE *file = fopen(path, "r");
    CHECK(file, "%s", path);
    while (file && fgets(line, sizeof line, file)) {
        const char *vocabulary = strtok(line, " "), *name = strtok(NULL, " ");
        size_t length = from_hex(strtok(NULL, " "), text);
        int n = 0, n_expected = 0;
        for (const char *id; (id = strtok(NULL, ",\n")) && *id != '-';)
            expected[n_expected++] = atoi(id);
        struct tokenizer *t = strcmp(vocabulary, "gemma") ? bytes : gemma;
        if (t == bytes)
            t->pattern = pattern_find((struct gguf_string){name, strlen(name)});
        int *ids = tok_encode(t, text, length, &n);
        CHECK(same_ids(ids, n, expected, n_expected), "%s %s: `%.*s`: %d ids, expected %d",
              vocabulary, name, (int)length, text, n, n_expected);
        free(ids);
        n_lines++;
    }
    CHECK(n_lines > 1000, "%d lines", n_lines);
    if (file)
        fclose(file);
    tok_close(bytes);
    tok_close(gemma);
}

static void a_megabyte(struct check *check) {
    static const char words[] = "It was a bright cold day in April, and the clocks were striking. ";
    static const char *const repeated[] = {words, "a", " ", "7", "\u6587", "A", "\n ", "\u0301"};
    enum {
        N_TEXTS = sizeof repeated / sizeof *repeated + 1,
        N_VOCABULARIES = sizeof patterns / sizeof *patterns + 1
    };
    char *text = malloc(MEGABYTE);
    uint64_t state = 4;
    struct tokenizer *tokenizers[] = {open_path(check, SPM_PATH), open_path(check, GPT2_PATH)};
    for (int i = 0; i < N_TEXTS * N_VOCABULARIES; i += SANITIZED ? 5 : 1) {
        int kind = i / N_VOCABULARIES, which = i % N_VOCABULARIES;
        struct tokenizer *tokenizer = tokenizers[which > 0];
        if (which > 0)
            tokenizer->pattern = &patterns[which - 1];
        size_t unit = kind < N_TEXTS - 1 ? strlen(repeated[kind]) : 1;
        for (size_t j = 0; j < MEGABYTE; j++)
            text[j] = kind < N_TEXTS - 1 ? repeated[kind][j % unit] : (char)random_next(&state);
        memcpy(text + MEGABYTE - 3, "\u6587", 3); /* spaces are not the end */
        int n;
        clock_t start = clock();
        int *ids = tok_encode(tokenizer, text, MEGABYTE, &n);
        double seconds = (double)(clock() - start) / CLOCKS_PER_SEC;
        /* 0.02 to 0.6 s in an optimized build; quadratic time would be an hour */
        CHECK(ids && n > 0 && seconds < 60, "text %d, vocabulary %d: %.2f s", kind, which, seconds);
        free(ids);
    }
    tok_close(tokenizers[0]);
    tok_close(tokenizers[1]);
    free(text);
}

static void whole_words(struct check *check) { /* with no merges left */
    struct tokenizer *t = open_path(check, GPT2_PATH);
    for (size_t i = 0; i <= t->mask; i++)
        if (t->slots[i].kind > 0 && t->slots[i].kind != KEY_TOKEN)
            t->slots[i].kind = TOK_TOKEN_LENGTH + 1;
    static const char *const names[] = {"llama-bpe", "qwen2", "llama3", "gpt-4o"};
    for (int i = 0; i < 4; i++) {
        int n = 0, *ids;
        t->pattern = pattern_find((struct gguf_string){names[i], strlen(names[i])});
        ids = tok_encode(t, "Hello", 5, &n);
        CHECK(n == (i % 2 ? 5 : 1), "%s: %d tokens", names[i], n);
        free(ids);
    }
    CHECK(!pattern_find((struct gguf_string){"llama", 5}), "no such pattern");
    CHECK(!pattern_find((struct gguf_string){"", 0}), "no such pattern");
    tok_close(t);
}

/* ---- malformed vocabularies ---- */

/* What is wrong with a vocabulary; of texts that are NULL, and numbers that are 0, nothing. */
struct fault {
    const char *expected; /* the message must contain it; NULL: it opens */
    const char *drop;     /* the key of this ending is not there */
    bool gpt2;
    const char *model, *pre, *merge, *eos; /* in place of the right ones */
    uint32_t eos_id;
    int scores, types; /* so many are there */
    int byte;          /* spelled like the next one */
    bool unsigned_types;
    float last_score;
    bool long_token;
};

static const struct fault faults[] = {{.expected = NULL},
                                      {NULL, .gpt2 = true},
                                      {"tokenizer.ggml.model", .drop = "model"},
                                      {"be?rt", .model = "be\nrt"},
                                      {"tokenizer.ggml.tokens", .drop = "tokens"},
                                      {"tokenizer.ggml.scores", .drop = "scores"},
                                      {"got 262", .scores = 262},
                                      {"token 262", .last_score = NAN},
                                      {"token_type", .types = 1},
                                      {NULL, .byte = 77},
                                      {NULL, .unsigned_types = true},
                                      {"token 259", .long_token = true},
                                      {"eos_token_id", .eos_id = 263},
                                      {"eos_token_id", .eos = "2"},
                                      {NULL, .drop = "pre", .gpt2 = true},
                                      {NULL, .pre = "", .gpt2 = true},
                                      {"tokenizer.ggml.pre", .pre = "gpt-3", .gpt2 = true},
                                      {"none", .pre = "none", .gpt2 = true},
                                      {"tokenizer.ggml.merges", .drop = "merges", .gpt2 = true},
                                      {"merges", .merge = "aa", .gpt2 = true},
                                      {"merges", .merge = "a b", .gpt2 = true},
                                      {"merges", .merge = "", .gpt2 = true}};

/* The key; where the fault is that it lacks, one that means nothing. */
static const char *key_of(const struct fault *fault, const char *ending) {
    static char key[64];
    snprintf(key, sizeof key, "tokenizer.ggml.%s", ending);
    return fault->drop && !strcmp(fault->drop, ending) ? "tokenizer.ggml.unknown" : key;
}

static const char *either(const char *wrong, const char *right) {
    return wrong ? wrong : right;
}

/* Tokens: <unk>, <s>, </s>, 256 bytes, an empty one, `a` twice, `aa`. */
static void put_vocabulary(struct tiny *t, const struct fault *fault) {
    enum { N = 263 };
    static char text[2 * TOK_TOKEN_LENGTH];
    int n_scores = fault->scores ? fault->scores : N, n_types = fault->types ? fault->types : N;
    tiny_begin(t, 3);
    tiny_text(t, key_of(fault, "model"), either(fault->model, fault->gpt2 ? "gpt2" : "llama"));
    if (fault->gpt2)
        tiny_text(t, key_of(fault, "pre"), either(fault->pre, "gpt-2"));
    tiny_array(t, key_of(fault, "tokens"), GGUF_STRING, N);
    tiny_string(t, "<unk>");
    tiny_string(t, "<s>");
    tiny_string(t, "</s>");
    for (int byte = 0; byte < 256; byte++) {
        size_t length = tiny_spell(fault->gpt2, byte + (byte && byte == fault->byte), text);
        tiny_raw(t, text, length);
    }
    memset(text, 'x', sizeof text - 1);
    tiny_string(t, fault->long_token ? text : "");
    tiny_string(t, "a");
    tiny_string(t, "a");
    tiny_string(t, "aa");
    tiny_array(t, key_of(fault, "scores"), GGUF_F32, (uint64_t)n_scores);
    for (int i = 0; i < n_scores; i++)
        tiny_put(t, i == N - 1 ? &fault->last_score : &(float){0}, sizeof(float));
    tiny_array(t, key_of(fault, "token_type"), fault->unsigned_types ? GGUF_U32 : GGUF_I32,
               (uint64_t)n_types);
    for (int i = 0; i < n_types; i++)
        tiny_put(t, &(int32_t){i == 0 ? TOKEN_UNKNOWN : i < 3 ? TOKEN_CONTROL : TOKEN_NORMAL}, 4);
    tiny_array(t, key_of(fault, "merges"), GGUF_STRING, 1);
    tiny_string(t, either(fault->merge, "a a"));
    if (fault->eos)
        tiny_text(t, key_of(fault, "eos_token_id"), fault->eos);
    else
        tiny_int(t, key_of(fault, "eos_token_id"), fault->eos_id ? fault->eos_id : 2);
    tiny_end(t);
}

static void malformed(struct check *check) {
    static struct tiny file;
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++) {
        const struct fault *fault = &faults[i];
        char path[] = "/tmp/test_tokenizer_XXXXXX", error[ERROR_LENGTH] = "no error";
        put_vocabulary(&file, fault);
        CHECK(write_file(path, file.bytes, file.size), "%s cannot be written", path);
        struct gguf *gguf = gguf_open(path, error);
        CHECK(gguf, "%s", error);
        struct tokenizer *tokenizer = gguf ? tok_open(gguf, error) : NULL;
        gguf_close(gguf);
        unlink(path);
        CHECK(!tokenizer == !!fault->expected, "fault %zu: %s", i, error);
        CHECK(!fault->expected || (strstr(error, fault->expected) && !strchr(error, '\n')),
              "fault %zu: %s", i, error);
        if (tokenizer) { /* of the two `a` the first */
            const int llama[] = {3 + ' ', 262, 260}, gpt2[] = {262, 3 + 'a'};
            int n, *ids = tok_encode(tokenizer, "aaa", 3, &n);
            CHECK(same_ids(ids, n, fault->gpt2 ? gpt2 : llama, fault->gpt2 ? 2 : 3), "%d ids", n);
            bool guessed = (fault->pre && !*fault->pre) || (fault->drop && fault->gpt2);
            CHECK(tok_guessed(tokenizer) == guessed, "fault %zu: guessed", i);
            CHECK(!guessed || tokenizer->pattern == pattern_find(gguf_text("default")), "another");
            free(ids);
        }
        tok_close(tokenizer);
    }
}

/* ---- ends, and what nobody can type ---- */

/* A file with the tokens of `words`, at most 32, each with a sign for its type: n, u or c. */
static struct gguf *file_of_words(struct check *check, const char *model, const char *words,
                                  int eos) {
    static struct tiny t;
    char path[] = "/tmp/test_tokenizer_XXXXXX", copy[1024], error[ERROR_LENGTH] = "";
    char *word[32];
    int n = 0;
    snprintf(copy, sizeof copy, "%s", words);
    for (char *at = strtok(copy, " "); at && n < 32; at = strtok(NULL, " "))
        word[n++] = at;
    tiny_begin(&t, 3);
    tiny_text(&t, "tokenizer.ggml.model", model);
    tiny_text(&t, "tokenizer.ggml.pre", "gpt-2");
    tiny_array(&t, "tokenizer.ggml.tokens", GGUF_STRING, (uint64_t)n);
    for (int i = 0; i < n; i++)
        tiny_string(&t, word[i] + 1);
    tiny_array(&t, "tokenizer.ggml.token_type", GGUF_I32, (uint64_t)n);
    for (int i = 0; i < n; i++)
        tiny_put(&t, &(int32_t){*word[i] == 'n' ? 1 : *word[i] == 'u' ? 4 : 3}, 4);
    tiny_array(&t, "tokenizer.ggml.merges", GGUF_STRING, 0);
    if (eos >= 0)
        tiny_int(&t, "tokenizer.ggml.eos_token_id", (uint32_t)eos);
    tiny_end(&t);
    CHECK(write_file(path, t.bytes, t.size), "%s cannot be written", path);
    struct gguf *file = gguf_open(path, error);
    CHECK(file, "%s", error);
    unlink(path);
    return file;
}

static void ends_are_known(struct check *check) {
    static const struct {
        const char *model, *words, *ends; /* the last: a digit for each word */
        int eos;
    } cases[] = {
        {"gpt2", "na c<|end_of_text|> n<|im_end|> u<|eot_id|> nb", "01110", -1},
        {"gpt2", "na c<|end|> c<|endoftext|> c<|user|> c<|assistant|>", "01100", -1}, /* phi-3 */
        {"gpt2", "na c<|return|> c<|end|> c<|call|> c<|start|> c<|endoftext|>", "010101", 1},
        {"gpt2", "na c<|return|> c<|end|>", "010", 2}, /* whatever the key says */
        {"gpt2", "na c</s> n<end_of_turn> c<|eom_id|> c<|eot|>", "01111", -1},
        {"gpt2", "na u<|EOT|> n<end_of_utterance> nEOT n<EOT>", "01101", -1},
        {"gpt2", "na u</s> nb", "000", -1}, /* Gemma's: it ends what is struck out */
        {"gpt2", "na n</s> nb", "010", 1},
        {"gpt2", "na c<\uFF5Cend\u2581of\u2581sentence\uFF5C> c<\uFF5CUser\uFF5C>", "010", -1},
        {"bert", "na n[SEP] c<|im_end|> n[CLS]", "0011", 3}, /* refused, and its ends are known */
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct gguf *file = file_of_words(check, cases[i].model, cases[i].words, cases[i].eos);
        bool ends[8] = {false};
        char got[9] = "", error[ERROR_LENGTH];
        int n = (int)strlen(cases[i].ends), n_ids;
        tok_mark_ends(file, ends, n);
        for (int j = 0; j < n; j++)
            got[j] = ends[j] ? '1' : '0';
        CHECK(!strcmp(got, cases[i].ends), "case %zu: %s", i, got);
        struct tokenizer *t = tok_open(file, error);
        CHECK(!t == !strcmp(cases[i].model, "bert"), "case %zu: %s", i, error);
        const char *typed =
            cases[i].words; /* all of them, as text: `a`, `b` are all it can spell */
        int *ids = t ? tok_encode(t, typed, strlen(typed), &n_ids) : NULL;
        for (int j = 0; ids && j < n_ids; j++)
            CHECK(!ends[ids[j]] && t->tokens[ids[j]].type != TOKEN_CONTROL, "case %zu: id %d", i,
                  ids[j]);
        free(ids);
        tok_close(t);
        gguf_close(file);
    }
    bool ends[4] = {false};
    tok_mark_ends(NULL, ends, 4);
    CHECK(!ends[0] && ends[1] && ends[2] && !ends[3], "llama2.c: 1 and 2 end a text");
}

/* A tokenizer.bin that has no byte tokens spells what it can. */
static void no_byte_tokens(struct check *check) {
    static const char *const words[] = {"<unk>", "<s>", "</s>", " ", "a", "b", "ab"};
    const int expected[] = {3, 6, 3, 4};
    char data[256], path[] = "/tmp/test_tokenizer_XXXXXX", error[ERROR_LENGTH] = "";
    size_t at = 4;
    memset(data, 0, sizeof data);
    for (int i = 0; i < 7; i++) {
        int length = (int)strlen(words[i]);
        memcpy(data + at + 4, &length, 4);
        memcpy(data + at + 8, words[i], (size_t)length);
        at += 8 + (size_t)length;
    }
    CHECK(write_file(path, data, at), "%s cannot be written", path);
    struct tokenizer *t = tok_open_checkpoint(path, 7, error);
    CHECK(t, "%s", error);
    int n = 0, *ids = t ? tok_encode(t,
                                     "ab\u00e9 \xFF"
                                     "a",
                                     7, &n)
                        : NULL;
    CHECK(same_ids(ids, n, expected, 4), "%d ids", n);
    CHECK(!t || tok_lost_bytes(t) == 253, "%d bytes are lost", tok_lost_bytes(t));
    free(ids);
    tok_close(t);
    unlink(path);
}

int main(int argc, char **argv) {
    static const struct test tests[] = {{"llama_cpp_ids", llama_cpp_ids},
                                        {"special_tokens", special_tokens},
                                        {"user_defined_tokens", user_defined_tokens},
                                        {"damaged_checkpoints", damaged_checkpoints},
                                        {"checkpoint_ids", checkpoint_ids},
                                        {"naive_ids", naive_ids},
                                        {"round_trips", round_trips},
                                        {"streams_stay_valid", streams_stay_valid},
                                        {"stream_details", stream_details},
                                        {"bad_bytes", bad_bytes},
                                        {"published_splits", published_splits},
                                        {"others_ids", others_ids},
                                        {"whole_words", whole_words},
                                        {"a_megabyte", a_megabyte},
                                        {"malformed", malformed},
                                        {"ends_are_known", ends_are_known},
                                        {"no_byte_tokens", no_byte_tokens}};
    return check_run(tests, sizeof tests / sizeof *tests, argc, argv);
}
