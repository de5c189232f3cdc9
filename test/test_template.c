/* test_template.c: chat templates against what the published Jinja programs render. */
#define _GNU_SOURCE
#define GGUF_IMPLEMENTATION
#define TOKENIZER_IMPLEMENTATION
#define TEMPLATE_IMPLEMENTATION
#include "../lib/template.h"
#include "check.h"
#include "tiny.h"
#include <unistd.h>

/* A vocabulary in which some words became special tokens. */
static struct tokenizer *open_vocabulary(struct check *check, const char *path,
                                         const char *const *special) {
    char error[ERROR_LENGTH] = "";
    struct gguf *file = gguf_open(path, error);
    struct tokenizer *t = file ? tok_open(file, error) : NULL;
    CHECK(t != NULL, "%s", error);
    for (int i = 0; t && special && special[i]; i++) {
        struct vocab_token *token = &t->tokens[t->n_tokens - 2 - i];
        free(token->text);
        token->text = strdup(special[i]);
        token->length = (int)strlen(special[i]);
        token->type = TOKEN_CONTROL;
        add_key(t, token->text, token->length, KEY_SPECIAL, t->n_tokens - 2 - i);
    }
    gguf_close(file);
    return t;
}

static const char *const chat_words[] = {"<|im_start|>",        "<|im_end|>",        "<|eot_id|>",
                                         "<|start_header_id|>", "<|end_header_id|>", NULL};

static char *from_hex(const char *hex, size_t *length) {
    char *text = calloc(strlen(hex) / 2 + 2, 1);
    *length = 0;
    for (unsigned byte; sscanf(hex + 2 * *length, "%2x", &byte) == 1; ++*length)
        text[*length] = (char)byte;
    return text;
}

/* Tokens as text: special ones by name. A space that `llama` puts before a run is left out. */
static char *spell(const struct tokenizer *t, const int *ids, int n, const char *bos) {
    char *text = NULL;
    size_t length;
    FILE *stream = open_memstream(&text, &length);
    bool begins = true;
    for (int i = 0; i < n; i++) {
        const struct vocab_token *token = &t->tokens[ids[i]];
        bool special = token->type == TOKEN_CONTROL || ids[i] == tok_bos(t);
        size_t skip = !special && begins && t->adds_prefix && token->text[0] == ' ';
        if (ids[i] == tok_bos(t))
            fputs(bos, stream);
        else
            fwrite(token->text + skip, 1, (size_t)token->length - skip, stream);
        begins = special;
    }
    fclose(stream);
    return text;
}

/* What a model says, one token a byte, so that nothing is added. */
static int *say(const struct tokenizer *t, int *ids, int *n, const char *text, size_t length) {
    ids = realloc(ids, ((size_t)*n + length + 1) * sizeof *ids);
    for (size_t i = 0; i < length; i++)
        ids[(*n)++] = find_key(t, text + i, 1, t->byte_level ? KEY_TOKEN : KEY_BYTE);
    return ids;
}

static void check_talk(struct check *check, struct tokenizer *t, enum template_kind kind,
                       char **fields, int n_fields) {
    size_t lengths[16];
    char *texts[16] = {NULL};
    for (int i = 0; i < n_fields; i++)
        texts[i] = from_hex(fields[i], &lengths[i]);
    int n = 0, *ids = NULL;
    for (int i = 1; i < n_fields - 1; i += 2) {
        struct turn turn = {ids, n, texts[0], texts[i], lengths[i]};
        int *next = template_ids(kind, t, &turn, &n);
        CHECK(next && (!ids || memcmp(ids, next, (size_t)turn.n_history * sizeof *ids) == 0),
              "a turn follows the ones before it");
        free(ids);
        ids = next;
        if (i + 2 < n_fields - 1)
            ids = say(t, ids, &n, texts[i + 1], lengths[i + 1]);
    }
    char *got = spell(t, ids, n, kind == TEMPLATE_LLAMA3 ? "<|begin_of_text|>" : "<s>");
    CHECK(!strcmp(got, texts[n_fields - 1]), "%s:\n%s\nexpected:\n%s", templates[kind].name, got,
          texts[n_fields - 1]);
    free(got);
    free(ids);
    for (int i = 0; i < n_fields; i++)
        free(texts[i]);
}

static void published_templates(struct check *check) {
    struct tokenizer *bytes = open_vocabulary(check, "test/data/vocab-gpt-2.gguf", chat_words);
    struct tokenizer *spm = open_vocabulary(check, "test/data/vocab-llama-spm.gguf", NULL);
    static char line[1 << 14];
    int n_lines = 0;
    FILE *file = fopen("test/data/chats.txt", "r");
    CHECK(file && bytes && spm, "no data");
    while (file && fgets(line, sizeof line, file)) {
        char *fields[16];
        int n = 0;
        line[strcspn(line, "\n")] = 0;
        char *family = strtok(line, " ");
        for (char *field; (field = strtok(NULL, " ")) && n < 16;)
            fields[n++] = field;
        for (enum template_kind kind = TEMPLATE_CHATML; kind < TEMPLATE_NONE; kind++)
            if (!strcmp(family, templates[kind].name))
                check_talk(check, kind <= TEMPLATE_LLAMA3 ? bytes : spm, kind, fields, n);
        n_lines++;
    }
    CHECK(n_lines == 22, "%d lines", n_lines);
    if (file)
        fclose(file);
    tok_close(bytes);
    tok_close(spm);
}

static void typed_marks_are_text(struct check *check) {
    struct tokenizer *t = open_vocabulary(check, "test/data/vocab-gpt-2.gguf", chat_words);
    char text[512] = "";
    for (int i = 0; chat_words[i]; i++)
        strcat(text, chat_words[i]);
    struct turn turn = {NULL, 0, text, text, strlen(text)};
    int n, n_special = 0, *ids = template_ids(TEMPLATE_CHATML, t, &turn, &n);
    for (int i = 0; i < n; i++)
        n_special += t->tokens[ids[i]].type == TOKEN_CONTROL;
    CHECK(n_special == 5, "%d special tokens, of which all are the template's", n_special);
    free(ids);
    tok_close(t);
}

/* The smallest file with a template. */
static struct gguf *file_with(struct check *check, const char *jinja) {
    static struct tiny tiny;
    char error[ERROR_LENGTH], path[] = "/tmp/test_template_XXXXXX";
    tiny_begin(&tiny, 3);
    tiny_text(&tiny, "tokenizer.chat_template", jinja);
    tiny_end(&tiny);
    int descriptor = mkstemp(path);
    CHECK(write(descriptor, tiny.bytes, tiny.size) == (ssize_t)tiny.size, "cannot write %s", path);
    close(descriptor);
    struct gguf *file = gguf_open(path, error);
    CHECK(file, "%s", error);
    unlink(path);
    return file;
}

static void recognised(struct check *check) {
    struct tokenizer *bytes = open_vocabulary(check, "test/data/vocab-gpt-2.gguf", chat_words);
    struct tokenizer *spm = open_vocabulary(check, "test/data/vocab-llama-spm.gguf", NULL);
    const struct {
        const char *jinja;
        const struct tokenizer *tokenizer;
        enum template_kind kind;
        const char *note;
    } cases[] = {{"{{'<|im_start|>' + role}}", bytes, TEMPLATE_CHATML, ""},
                 {"{{'<|start_header_id|>'}}", bytes, TEMPLATE_LLAMA3, ""},
                 {"[INST] <<SYS>> {{x}}", spm, TEMPLATE_LLAMA2, ""},
                 {"[INST] {{x}} [/INST]", spm, TEMPLATE_MISTRAL, ""},
                 {"<start_of_turn>user", bytes, TEMPLATE_CHATML, "taken is chatml"},
                 {"<start_of_turn>user", spm, TEMPLATE_LLAMA2, "taken is llama2"},
                 {"{{'<|im_start|>' + role}}", spm, TEMPLATE_LLAMA2, "taken is llama2"},
                 {NULL, spm, TEMPLATE_NONE, ""}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char note[ERROR_LENGTH];
        const char *jinja = cases[i].jinja; /* NULL: random weights, which are no file */
        struct gguf *file = jinja ? file_with(check, jinja) : NULL;
        enum template_kind kind = template_of(file, cases[i].tokenizer, note);
        CHECK(kind == cases[i].kind, "case %zu: %s", i, templates[kind].name);
        CHECK(cases[i].note[0] ? strstr(note, cases[i].note) != NULL : !note[0], "%s", note);
        gguf_close(file);
    }
    char note[ERROR_LENGTH] = "";
    CHECK(!template_fits(TEMPLATE_CHATML, spm, note) && strstr(note, "no token <|im_start|>"), "%s",
          note);
    CHECK(template_fits(TEMPLATE_NONE, spm, note), "nothing is needed for none");
    tok_close(bytes);
    tok_close(spm);
}

int main(int argc, char **argv) {
    static const struct test tests[] = {{"published_templates", published_templates},
                                        {"typed_marks_are_text", typed_marks_are_text},
                                        {"recognised", recognised}};
    return check_run(tests, sizeof tests / sizeof *tests, argc, argv);
}
