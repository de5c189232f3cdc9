/* template.h: how a chat model wants to be spoken to, in token ids.
 *
 *     char note[ERROR_LENGTH];
 *     enum template_kind kind = template_of(file, tokenizer, note);  // note: what must be told, or
 * "" int *ids = template_ids(kind, tokenizer, &turn, &n_ids);       // to be freed
 *
 * A GGUF file has its template as a program in Jinja (tokenizer.chat_template). There is no
 * interpreter here: four families are told apart by the marks that the program contains, and each
 * is a row of a table. A turn's ids are what follows the ids so far, so a conversation only ever
 * grows, and its beginning stays in the KV cache.
 * Words like <|im_start|> become special tokens where they stand in a row of the table, and never
 * where they stand in what someone typed. Template and text between two special tokens are encoded
 * as one. Left out: a template's own default system text, tools, and dates. */
#ifndef TEMPLATE_H
#define TEMPLATE_H

#include "gguf.h"
#include "tokenizer.h"

/* In the order of the words of --template, from 1. */
enum template_kind {
    TEMPLATE_AUTO = 1,
    TEMPLATE_CHATML,
    TEMPLATE_LLAMA3,
    TEMPLATE_LLAMA2,
    TEMPLATE_MISTRAL,
    TEMPLATE_NONE
};

struct turn {
    const int *history; /* (n_history) what was said so far, the last answer without its end */
    int n_history;      /* 0: this is the first turn */
    const char *system; /* of a first turn; NULL: none */
    const char *user;   /* (user_length) */
    size_t user_length;
};

/* TEMPLATE_NONE: a base model, which continues its prompt. */
enum template_kind template_of(struct gguf *file, const struct tokenizer *tokenizer,
                               char note[ERROR_LENGTH]);
/* Whether the vocabulary has the special tokens; else `note` names the one that is missing. */
bool template_fits(enum template_kind kind, const struct tokenizer *tokenizer,
                   char note[ERROR_LENGTH]);
/* The history and the turn; to be freed. NULL: no memory, or longer than an encoder takes. */
int *template_ids(enum template_kind kind, const struct tokenizer *tokenizer,
                  const struct turn *turn, int *n_ids);

#endif /* TEMPLATE_H */

#ifdef TEMPLATE_IMPLEMENTATION
#undef TEMPLATE_IMPLEMENTATION

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BOS "\001"
#define EOS "\002"

/* begin (SYSTEM) user, answer; then end next user, answer; ... Of Llama 2 and Mistral the system
 * text stands inside the first user's turn. */
static const struct template {
    const char *name, *mark; /* mark: in the Jinja program */
    const char *begin, *before_system, *after_system, *before_user, *after_user, *end, *next;
    bool system_inside, trims; /* trims: white space around what was typed */
}
templates[] = {[TEMPLATE_CHATML] = {"chatml", "<|im_start|>", "", "<|im_start|>system\n",
                                    "<|im_end|>\n", "<|im_start|>user\n",
                                    "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>", "\n",
                                    false, false},
               [TEMPLATE_LLAMA3] = {"llama3", "<|start_header_id|>", BOS,
                                    "<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>",
                                    "<|start_header_id|>user<|end_header_id|>\n\n",
                                    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
                                    "<|eot_id|>", "", false, true},
               [TEMPLATE_LLAMA2] = {"llama2", "<<SYS>>", BOS, "<<SYS>>\n", "\n<</SYS>>\n\n",
                                    "[INST] ", " [/INST]", EOS, BOS, true, true},
               [TEMPLATE_MISTRAL] = {"mistral", "[INST]", BOS, "", "\n\n", "[INST] ", " [/INST]",
                                     EOS, "", true, false},
               [TEMPLATE_NONE] = {"none", NULL, BOS, "", "\n", "", "", "", "", false, false}};

struct template_writer {
    const struct tokenizer *tokenizer;
    FILE *run; /* text that is not yet encoded */
    char *text;
    size_t length;
    int *ids;
    int n_ids;
    bool ok;
};

static void template_add(struct template_writer *w, const int *ids, int n) {
    int *larger = w->ok ? realloc(w->ids, ((size_t)w->n_ids + (size_t)n + 1) * sizeof *ids) : NULL;
    w->ok = larger != NULL;
    if (!w->ok)
        return;
    w->ids = larger;
    if (n > 0)
        memcpy(w->ids + w->n_ids, ids, (size_t)n * sizeof *ids);
    w->n_ids += n;
}

static void template_start_run(struct template_writer *w) {
    w->run = open_memstream(&w->text, &w->length);
    w->ok = w->ok && w->run;
}

/* Encodes the text so far, and adds a special token if there is one. */
static void template_end_run(struct template_writer *w, int token) {
    if (!w->ok || fclose(w->run) != 0) {
        w->ok = false;
        return;
    }
    int n = 0, *ids = tok_encode(w->tokenizer, w->text, w->length, &n);
    w->ok = ids != NULL;
    template_add(w, ids, n);
    if (token >= 0)
        template_add(w, &token, 1);
    free(ids);
    free(w->text);
    template_start_run(w);
}

/* The special token at the start of a template's text, and its length; -1: none. */
static int template_special(const struct tokenizer *tokenizer, const char *text, size_t *length) {
    *length = 1;
    if (*text == *BOS || *text == *EOS)
        return *text == *BOS ? tok_bos(tokenizer) : tok_eos(tokenizer);
    const char *close = strncmp(text, "<|", 2) == 0 ? strstr(text, "|>") : NULL;
    if (close)
        *length = (size_t)(close + 2 - text);
    else if (strncmp(text, "[INST]", 6) == 0 || strncmp(text, "[/INST]", 7) == 0)
        *length = strcspn(text, "]") + 1;
    else
        return -1;
    return tok_find(tokenizer, text, *length);
}

static void template_write(struct template_writer *w, const char *text) {
    while (*text && w->ok) {
        size_t length;
        int token = template_special(w->tokenizer, text, &length);
        if (token >= 0)
            template_end_run(w, token);
        else if (*text != *BOS && *text != *EOS) /* a vocabulary may have neither */
            (void)fwrite(text, 1, length, w->run);
        text += length;
    }
}

static void template_write_typed(struct template_writer *w, const char *text, size_t length,
                                 bool trims) {
    for (; trims && length > 0 && strchr(" \t\n\r\v\f", text[length - 1]); length--) {
    }
    for (; trims && length > 0 && strchr(" \t\n\r\v\f", *text); length--)
        text++;
    if (w->ok)
        (void)fwrite(text, 1, length, w->run);
}

int *template_ids(enum template_kind kind, const struct tokenizer *tokenizer,
                  const struct turn *turn, int *n_ids) {
    const struct template *t = &templates[kind];
    struct template_writer w = {.tokenizer = tokenizer, .ok = true};
    template_start_run(&w);
    template_add(&w, turn->history, turn->n_history);
    if (turn->n_history > 0) {
        template_write(&w, t->end);
        template_write(&w, t->next);
    } else if (strcmp(t->begin, "") != 0 && kind != TEMPLATE_NONE) {
        template_write(&w, t->begin);
    } else if (tok_adds_bos(tokenizer)) {
        template_write(&w, BOS);
    }
    const char *system = turn->n_history == 0 ? turn->system : NULL;
    if (t->system_inside)
        template_write(&w, t->before_user);
    if (system && *system) {
        template_write(&w, t->before_system);
        template_write_typed(&w, system, strlen(system), t->trims);
        template_write(&w, t->after_system);
    }
    if (!t->system_inside)
        template_write(&w, t->before_user);
    template_write_typed(&w, turn->user, turn->user_length, t->trims);
    template_write(&w, t->after_user);
    template_end_run(&w, -1);
    if (w.run)
        (void)fclose(w.run);
    free(w.text);
    *n_ids = w.ok ? w.n_ids : 0;
    if (w.ok)
        return w.ids;
    free(w.ids);
    return NULL;
}

bool template_fits(enum template_kind kind, const struct tokenizer *tokenizer,
                   char note[ERROR_LENGTH]) {
    const struct template *t = &templates[kind];
    const char *parts[] = {t->before_user, t->after_user, t->end};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        for (const char *at = parts[i]; (at = strstr(at, "<|")) != NULL; at++) {
            size_t length;
            if (template_special(tokenizer, at, &length) < 0) {
                (void)snprintf(note, ERROR_LENGTH,
                               "template %s: the vocabulary has no token %.*s; see --template",
                               t->name, (int)length, at);
                return false;
            }
        }
    }
    return true;
}

enum template_kind template_of(struct gguf *file, const struct tokenizer *tokenizer,
                               char note[ERROR_LENGTH]) {
    struct gguf_string jinja = {NULL, 0};
    enum template_kind nearest = TEMPLATE_NONE;
    char missing[ERROR_LENGTH];
    *note = 0;
    if (!tokenizer || !file || !gguf_get_string(file, "tokenizer.chat_template", &jinja))
        return TEMPLATE_NONE;
    for (enum template_kind kind = TEMPLATE_CHATML; kind < TEMPLATE_NONE; kind++) {
        bool fits = template_fits(kind, tokenizer, missing);
        bool marked = memmem(jinja.data, jinja.length, templates[kind].mark,
                             strlen(templates[kind].mark)) != NULL;
        if (marked && fits)
            return kind;
        if (fits && nearest == TEMPLATE_NONE)
            nearest = kind;
    }
    (void)snprintf(note, ERROR_LENGTH,
                   "its chat template is none of chatml, llama3, llama2, mistral; taken is %s, for "
                   "which its vocabulary has the tokens; --template chooses another, or none",
                   templates[nearest].name);
    return nearest;
}
#endif /* TEMPLATE_IMPLEMENTATION */
