/* test_template.c: chat templates against what the published Jinja programs render. */
#define _GNU_SOURCE
#define GGUF_IMPLEMENTATION
#define TOKENIZER_IMPLEMENTATION
#define TEMPLATE_IMPLEMENTATION
#include <time.h>

static time_t test_time(time_t *unused) { /* the day on which make_chats.py renders */
    (void)unused;
    return 1751068800 + 43200; /* the noon of 28 June 2025 */
}

#define time(unused) test_time(unused)
#include "../lib/template.h"
#undef time
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
        if (i == 0)
            t->ids[ID_EOS] = t->n_tokens - 2;
    }
    gguf_close(file);
    return t;
}

static const char *const chat_words[] = {"</s>",
                                         "<|im_start|>",
                                         "<|im_end|>",
                                         "<|eot_id|>",
                                         "<|start_header_id|>",
                                         "<|end_header_id|>",
                                         "[INST]",
                                         "[/INST]",
                                         "[SYSTEM_PROMPT]",
                                         "[/SYSTEM_PROMPT]",
                                         "<|user|>",
                                         "<|assistant|>",
                                         "<|system|>",
                                         "<|end|>",
                                         "<start_of_turn>",
                                         "<end_of_turn>",
                                         "<\uFF5CUser\uFF5C>",
                                         "<\uFF5CAssistant\uFF5C>",
                                         "<|start|>",
                                         "<|channel|>",
                                         "<|message|>",
                                         "<|return|>",
                                         "<\uFF5Cend\u2581of\u2581sentence\uFF5C>",
                                         NULL};

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

/* The last of a talk's fields, which are in hex, is what its template makes of the others. */
static bool check_talk(struct check *check, struct tokenizer *t,
                       const struct chat_template *template, const char *name, char **fields,
                       int n_fields) {
    size_t lengths[16];
    char *texts[16] = {NULL};
    for (int i = 0; i < n_fields; i++)
        texts[i] = from_hex(fields[i], &lengths[i]);
    int n = 0, *ids = NULL;
    for (int i = 1; i < n_fields - 1; i += 2) {
        bool last = i == n_fields - 2;
        struct turn turn = {ids,
                            n,
                            lengths[0] > 0 ? texts[0] : NULL,
                            texts[i],
                            lengths[i],
                            last ? NULL : texts[i + 1],
                            last ? 0 : lengths[i + 1]};
        int *next = template_ids(template, t, &turn, &n);
        CHECK(next && (!ids || memcmp(ids, next, (size_t)turn.n_history * sizeof *ids) == 0),
              "a turn follows the ones before it");
        free(ids);
        ids = next;
    }
    char *got = spell(t, ids, n, "<s>");
    const char *expected = texts[n_fields - 1];
    CHECK(!strcmp(got, expected), "%s is taken for %s:\n%s\nexpected:\n%s", name,
          templates[template->kind].name, got, expected);
    bool same = !strcmp(got, expected);
    free(got);
    free(ids);
    for (int i = 0; i < n_fields; i++)
        free(texts[i]);
    return same;
}

static void check_chats(struct check *check, const char *path) {
    static const char gpt2[] = "test/data/vocab-gpt-2.gguf";
    static const char *const end[] = {"</s>", NULL};
    struct tokenizer *words = open_vocabulary(check, gpt2, chat_words), *t = words,
                     *no_words = open_vocabulary(check, gpt2, end); /* Mistral's first */
    struct chat_template template = {.kind = TEMPLATE_NONE};
    static char line[1 << 19], name[64];
    int n_talks = 0, n_known = 0, n_templates = 0;
    FILE *chats = fopen(path, "r");
    CHECK(chats && t, "no data");
    while (chats && fgets(line, sizeof line, chats)) {
        char *fields[16], error[ERROR_LENGTH];
        int n = 0;
        line[strcspn(line, "\n")] = 0;
        bool talk = !strcmp(strtok(line, " "), "talk");
        for (char *field; n < 16 && (field = strtok(NULL, " "));)
            fields[n++] = field;
        if (talk && template.kind != TEMPLATE_NONE) {
            bool same = check_talk(check, t, &template, name, fields, n);
            n_talks++;
            if (getenv("CHATS"))
                printf("%s  %s\n", same ? "same  " : "differ", name);
        }
        if (talk)
            continue;
        size_t length;
        char *jinja = from_hex(fields[1], &length);
        struct gguf *file = file_with(check, jinja);
        free(template.system);
        t = strcmp(fields[0], "mistral") ? words : no_words;
        template = template_of(file, t, error);
        snprintf(name, sizeof name, "%s", fields[2]);
        const char *kind = template.kind == TEMPLATE_NONE ? "-" : templates[template.kind].name;
        CHECK(*fields[0] == '?' || !strcmp(fields[0], kind), "%s is taken for %s: %s", name, kind,
              error);
        CHECK(*error ? template.kind == TEMPLATE_NONE : *kind != '-' || !strcmp(name, "empty"),
              "%s: note: %s", name, error);
        n_templates++;
        n_known += *kind != '-';
        if (*fields[0] == '?')
            printf("%s: %s\n", name, kind);
        free(jinja);
        gguf_close(file);
    }
    CHECK(n_templates > 15 && n_known > 15 && n_talks > 80, "%d templates, %d known, %d talks",
          n_templates, n_known, n_talks);
    free(template.system);
    if (chats)
        fclose(chats);
    tok_close(words);
    tok_close(no_words);
}

static void published_templates(struct check *check) {
    check_chats(check, getenv("CHATS") ? getenv("CHATS") : "test/data/chats.txt");
}

static void typed_marks_are_text(struct check *check) {
    struct tokenizer *t = open_vocabulary(check, "test/data/vocab-gpt-2.gguf", chat_words);
    char text[1024] = "";
    for (int i = 0; chat_words[i]; i++)
        strcat(text, chat_words[i]);
    struct turn turn = {NULL, 0, text, text, strlen(text), NULL, 0};
    struct chat_template template = {.kind = TEMPLATE_CHATML};
    int n, n_special = 0, *ids = template_ids(&template, t, &turn, &n);
    for (int i = 0; i < n; i++)
        n_special += t->tokens[ids[i]].type == TOKEN_CONTROL;
    CHECK(n_special == 5, "%d special tokens, of which all are the template's", n_special);
    free(ids);
    tok_close(t);
}

static void recognised(struct check *check) {
    struct tokenizer *bytes = open_vocabulary(check, "test/data/vocab-gpt-2.gguf", chat_words);
    struct tokenizer *spm = open_vocabulary(check, "test/data/vocab-llama-spm.gguf", NULL);
    const struct {
        const char *jinja;
        const struct tokenizer *tokenizer;
        enum template_kind kind;
        const char *note;
    } cases[] = {
        {"{{'<|im_start|>' + role + '<|im_end|>'}}", bytes, TEMPLATE_CHATML, ""},
        {"[INST] <<SYS>> {{x}}", spm, TEMPLATE_LLAMA2, ""},
        {"[INST] {{x}} [/INST]", spm, TEMPLATE_MISTRAL, ""},
        {"[INST] {{x}} [/INST]", bytes, TEMPLATE_MISTRAL3, ""}, /* these are tokens there */
        {"[INST]{{x}}[/INST]{# [INST] <<SYS>> [/INST] #}", spm, TEMPLATE_MISTRAL3, ""},
        {"{{'<|user|>\\n' + x + eos_token}}<|assistant|>", spm, TEMPLATE_ZEPHYR, ""},
        {"### User: {{x}} {# [INST] [/INST] #}", spm, TEMPLATE_NONE, "none that is known"},
        {"<start_of_turn>user<end_of_turn>", spm, TEMPLATE_NONE, "no token <start_of_turn>"},
        {"<|im_start|> <|im_end|>", spm, TEMPLATE_NONE, "no token <|im_start|>"},
        {"", spm, TEMPLATE_NONE, ""},
        {NULL, spm, TEMPLATE_NONE, ""}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char note[ERROR_LENGTH];
        const char *jinja = cases[i].jinja; /* NULL: random weights, which are no file */
        struct gguf *file = jinja ? file_with(check, jinja) : NULL;
        struct chat_template found = template_of(file, cases[i].tokenizer, note);
        CHECK(found.kind == cases[i].kind, "case %zu: %s", i, templates[found.kind].name);
        CHECK(cases[i].note[0] ? strstr(note, cases[i].note) != NULL : !note[0], "%s", note);
        free(found.system);
        gguf_close(file);
    }
    char note[ERROR_LENGTH] = "";
    CHECK(!template_fits(TEMPLATE_CHATML, spm, note) && strstr(note, "no token <|im_start|>"), "%s",
          note);
    CHECK(template_fits(TEMPLATE_NONE, spm, note), "nothing is needed for none");
    tok_close(bytes);
    tok_close(spm);
}

/* The ids of special words and of text between them. */
static int *ids_of(const struct tokenizer *t, const char *const *words, int n_words, int *n_ids) {
    int *ids = malloc(256 * sizeof *ids), n = 0;
    for (int i = 0; i < n_words; i++) {
        int one = words[i][0] == '<' ? tok_find(t, words[i], strlen(words[i])) : -1, more = 0;
        int *text = one < 0 ? tok_encode(t, words[i], strlen(words[i]), &more) : NULL;
        for (int j = 0; j < more; j++)
            ids[n++] = text[j];
        if (one >= 0)
            ids[n++] = one;
        free(text);
    }
    *n_ids = n;
    return ids;
}

/* gpt-oss: what an answer's parts are, and that a turn goes on without the analysis before it. */
static void harmony_channels(struct check *check) {
    static const char *const said[] = {
        "<|start|>", "user",        "<|message|>", "Hi",          "<|end|>",     "<|start|>",
        "assistant", "<|channel|>", "analysis",    "<|message|>", "Hm",          "<|end|>",
        "<|start|>", "assistant",   "<|channel|>", "final",       "<|message|>", "Hello"};
    static const char expected[] = "<|start|>user<|message|>Hi<|end|><|start|>assistant"
                                   "<|channel|>final<|message|>Hello<|end|>"
                                   "<|start|>user<|message|>Bye<|end|><|start|>assistant";
    struct tokenizer *t = open_vocabulary(check, "test/data/vocab-gpt-2.gguf", chat_words);
    struct chat_template template = {.kind = TEMPLATE_HARMONY};
    char parts[2][64] = {"", ""}, out[TOK_TEXT_SIZE];
    int n, n_next, *ids = ids_of(t, said, 18, &n);
    enum template_part part = PART_HEADER;
    int first = 0, n_first;
    free(ids_of(t, said, 7, &n_first));
    for (int i = n_first; i < n; i++) {
        struct tok_stream stream = {.begun = true};
        size_t size = tok_decode(t, &stream, ids[i], out);
        part = template_part(TEMPLATE_HARMONY, t, ids[i], part);
        first = part == PART_FINAL ? 1 : 0;
        if (part == PART_FINAL || part == PART_ANALYSIS)
            strncat(parts[first], out, size);
    }
    CHECK(!strcmp(parts[0], "Hm") && !strcmp(parts[1], "Hello"), "%s, %s", parts[0], parts[1]);
    CHECK(template_part(TEMPLATE_CHATML, t, ids[0], PART_FINAL) == PART_FINAL, "only gpt-oss has");
    struct turn turn = {ids, n, "ignored: not the first", "Bye", 3, NULL, 0};
    int *next = template_ids(&template, t, &turn, &n_next);
    char *got = spell(t, next, n_next, "");
    CHECK(!strcmp(got, expected), "%s", got);
    turn.history = next; /* nothing more goes, and a second analysis does */
    turn.n_history = n_next;
    int n_again, *again = template_ids(&template, t, &turn, &n_again);
    CHECK(!memcmp(again, next, (size_t)n_next * sizeof *next), "what was said stays");
    free(got);
    free(again);
    free(next);
    free(ids);
    tok_close(t);
}

int main(int argc, char **argv) {
    static const struct test tests[] = {{"published_templates", published_templates},
                                        {"typed_marks_are_text", typed_marks_are_text},
                                        {"recognised", recognised},
                                        {"harmony_channels", harmony_channels}};
    return check_run(tests, sizeof tests / sizeof *tests, argc, argv);
}
