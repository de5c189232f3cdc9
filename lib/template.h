/* template.h: how a chat model wants to be spoken to, in token ids.
 *
 *     char note[ERROR_LENGTH]; // what whoever chats must be told, or ""
 *     enum template_kind kind = template_of(file, tokenizer, note);
 *     struct turn turn = {.user = "Hi!", .user_length = 3};
 *     int *ids = template_ids(kind, tokenizer, &turn, &n_ids); // to be freed
 *
 * A GGUF file has its template as a program in Jinja (tokenizer.chat_template). There is no
 * interpreter here: four families are told apart by the marks that the program contains, and each
 * is a row of a table. A turn's ids are what follows the ids so far, so a conversation only ever
 * grows, and its beginning stays in the KV cache.
 * Words like <|im_start|> become special tokens where they stand in a row of the table, and never
 * where they stand in what someone typed. Template and text between two special tokens are encoded
 * as one. Left out: a template's own default system text, tools, and dates.
 * Define TEMPLATE_IMPLEMENTATION in one file, before including this (those of gguf.h and
 * tokenizer.h are needed, too). */
#ifndef TEMPLATE_H
#define TEMPLATE_H

#if defined TEMPLATE_IMPLEMENTATION && !defined _GNU_SOURCE
#define _GNU_SOURCE /* memmem; too late behind a header of the system */
#endif
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

/* What a file asks for; NULL: there is no file. TEMPLATE_NONE: a base model, which continues its
 * prompt. */
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

#include <stdlib.h>
#include <string.h>

#define BOS "\001"
#define EOS "\002"

/* A conversation is
 *     <s> before_system SYSTEM after_system before_user USER after_user ANSWER
 *     end next before_user USER after_user ANSWER
 *     end next ...
 * without the three of the system where there is no such text, or with them behind the first
 * before_user: `system_inside`. A part that is not there is NULL. */
static const struct template_row {
    const char *name, *mark; /* mark: in the Jinja program */
    const char *before_system, *after_system, *before_user, *after_user, *end, *next;
    bool begins;        /* with the beginning-of-text token, whatever the vocabulary says */
    bool system_inside; /* as above */
    bool trims;         /* white space around what was typed */
} templates[] = {
    [TEMPLATE_CHATML] = {.name = "chatml",
                         .mark = "<|im_start|>",
                         .before_system = "<|im_start|>system\n",
                         .after_system = "<|im_end|>\n",
                         .before_user = "<|im_start|>user\n",
                         .after_user = "<|im_end|>\n<|im_start|>assistant\n",
                         .end = "<|im_end|>",
                         .next = "\n"},
    [TEMPLATE_LLAMA3] = {.name = "llama3",
                         .mark = "<|start_header_id|>",
                         .begins = true,
                         .before_system = "<|start_header_id|>system<|end_header_id|>\n\n",
                         .after_system = "<|eot_id|>",
                         .before_user = "<|start_header_id|>user<|end_header_id|>\n\n",
                         .after_user = "<|eot_id|>"
                                       "<|start_header_id|>assistant<|end_header_id|>\n\n",
                         .end = "<|eot_id|>",
                         .trims = true},
    [TEMPLATE_LLAMA2] = {.name = "llama2",
                         .mark = "<<SYS>>",
                         .begins = true,
                         .before_system = "<<SYS>>\n",
                         .after_system = "\n<</SYS>>\n\n",
                         .before_user = "[INST] ",
                         .after_user = " [/INST]",
                         .end = EOS,
                         .next = BOS,
                         .system_inside = true,
                         .trims = true},
    [TEMPLATE_MISTRAL] = {.name = "mistral",
                          .mark = "[INST]",
                          .begins = true,
                          .after_system = "\n\n",
                          .before_user = "[INST] ",
                          .after_user = " [/INST]",
                          .end = EOS,
                          .system_inside = true},
    [TEMPLATE_NONE] = {.name = "none", .after_system = "\n"},
};

struct template_writer {
    const struct tokenizer *tokenizer;
    char *text; /* (length) not yet encoded */
    size_t length;
    int *ids; /* (n_ids) */
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

static void template_text(struct template_writer *w, const char *text, size_t length) {
    char *larger = w->ok ? realloc(w->text, w->length + length + 1) : NULL;
    w->ok = larger != NULL;
    if (!w->ok)
        return;
    w->text = larger;
    memcpy(w->text + w->length, text, length);
    w->length += length;
}

/* Encodes the text so far. */
static void template_end_run(struct template_writer *w) {
    if (w->ok && w->length > 0) {
        int n = 0, *ids = tok_encode(w->tokenizer, w->text, w->length, &n);
        w->ok = ids != NULL;
        template_add(w, ids, n);
        free(ids);
    }
    w->length = 0;
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
    while (text && *text && w->ok) {
        size_t length;
        int token = template_special(w->tokenizer, text, &length);
        if (token >= 0) {
            template_end_run(w);
            template_add(w, &token, 1);
        } else if (*text != *BOS && *text != *EOS) { /* a vocabulary may have neither */
            template_text(w, text, length);
        }
        text += length;
    }
}

/* What someone typed: no word of it is special. */
static void template_write_typed(struct template_writer *w, const char *text, size_t length,
                                 bool trims) {
    static const char space[] = " \t\n\r\v\f";
    while (trims && length > 0 && strchr(space, text[length - 1]))
        length--;
    while (trims && length > 0 && strchr(space, *text)) {
        text++;
        length--;
    }
    template_text(w, text, length);
}

int *template_ids(enum template_kind kind, const struct tokenizer *tokenizer,
                  const struct turn *turn, int *n_ids) {
    const struct template_row *t = &templates[kind];
    struct template_writer w = {.tokenizer = tokenizer, .ok = true};
    template_add(&w, turn->history, turn->n_history);
    if (turn->n_history > 0) {
        template_write(&w, t->end);
        template_write(&w, t->next);
    } else if (t->begins || tok_adds_bos(tokenizer)) {
        template_write(&w, BOS); /* as the template says, or the vocabulary */
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
    template_end_run(&w);
    free(w.text);
    *n_ids = w.ok ? w.n_ids : 0;
    if (w.ok)
        return w.ids;
    free(w.ids);
    return NULL;
}

bool template_fits(enum template_kind kind, const struct tokenizer *tokenizer,
                   char note[ERROR_LENGTH]) {
    const struct template_row *t = &templates[kind];
    const char *parts[] = {t->before_user, t->after_user, t->end};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        const char *at = parts[i] ? strstr(parts[i], "<|") : NULL;
        for (; at; at = strstr(at + 1, "<|")) {
            size_t length;
            if (template_special(tokenizer, at, &length) < 0)
                return fail(note, "template %s: the vocabulary has no token %.*s; see --template",
                            t->name, (int)length, at);
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
    (void)fail(note,
               "its chat template is none of chatml, llama3, llama2, mistral; taken is %s, for "
               "which its vocabulary has the tokens; --template chooses another, or none",
               templates[nearest].name);
    return nearest;
}

#endif /* TEMPLATE_IMPLEMENTATION */
