/* template.h: how a chat model wants to be spoken to, in token ids.
 *
 *     char note[ERROR_LENGTH]; // what whoever chats must be told, or ""
 *     struct chat_template template = template_of(file, tokenizer, note);
 *     struct turn turn = {.user = "Hi!", .user_length = 3};
 *     int *ids = template_ids(&template, tokenizer, &turn, &n_ids); // to be freed
 *
 * A GGUF file has its template as a program in Jinja (tokenizer.chat_template). There is no
 * interpreter here: each known family is a row of a table, and told apart by what the program
 * writes, its comments left out. From the program itself come the system text that it has for who
 * gives none, and whether it opens a thought before the answer. A turn's ids are what follows the
 * ids so far, so a conversation only ever grows, and its beginning stays in the KV cache; thoughts
 * are left out of answers that are given (where the program does that), not of those made here.
 * Words like <|im_start|> become special tokens where they stand in a row of the table, and never
 * where they stand in what someone typed. Template and text between two special tokens are encoded
 * as one. Left out: tools, today's date but in Mistral's own system text (Llama 3.1's has the date
 * that its program falls back to, Harmony's none), and that a system text moves to the last turn
 * (Mistral's stays in the first).
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
    TEMPLATE_LLAMA31,
    TEMPLATE_LLAMA2,
    TEMPLATE_MISTRAL,  /* v1 */
    TEMPLATE_MISTRAL3, /* v3, with SentencePiece or tekken (Nemo) */
    TEMPLATE_MISTRAL7,
    TEMPLATE_ZEPHYR,
    TEMPLATE_FALCON3,
    TEMPLATE_GEMMA,
    TEMPLATE_PHI3,
    TEMPLATE_DEEPSEEK,
    TEMPLATE_HARMONY, /* gpt-oss */
    TEMPLATE_NONE
};

struct chat_template {
    enum template_kind kind;
    char *system; /* for who gives none; NULL: there is none. Owned by the caller */
    bool begins;  /* with the beginning-of-text token: its program writes it */
    bool thinks;  /* its program writes <think> before an answer */
    bool trims;   /* its program leaves out white space around what anyone says, */
    bool forgets; /* and the thoughts of answers that are given */
};

struct turn {
    const int *history; /* (n_history) what was said so far, the last answer without its end */
    int n_history;      /* 0: this is the first turn */
    const char *system; /* of a first turn; NULL: the template's own; "": none */
    const char *user;   /* (user_length) */
    size_t user_length;
    const char *answer; /* (answer_length) that was given to it; NULL: it comes now */
    size_t answer_length;
};

/* What a file asks for; NULL: there is no file. TEMPLATE_NONE: prompts are continued as they are,
 * by a base model, or because the template is unknown, or because the vocabulary lacks its tokens:
 * `note` says so. */
struct chat_template template_of(struct gguf *file, const struct tokenizer *tokenizer,
                                 char note[ERROR_LENGTH]);
/* Whether the vocabulary has the special tokens; else `note` names the one that is missing. */
bool template_fits(enum template_kind kind, const struct tokenizer *tokenizer,
                   char note[ERROR_LENGTH]);
/* The history and the turn; to be freed. NULL: no memory, or longer than an encoder takes. */
int *template_ids(const struct chat_template *template, const struct tokenizer *tokenizer,
                  const struct turn *turn, int *n_ids);
/* Which part of an answer a token is in; `part` is what the token before was in. */
enum template_part { PART_FINAL, PART_HEADER, PART_CHANNEL, PART_ANALYSIS };
enum template_part template_part(enum template_kind kind, const struct tokenizer *tokenizer,
                                 int token, enum template_part part);

#endif /* TEMPLATE_H */

#ifdef TEMPLATE_IMPLEMENTATION
#undef TEMPLATE_IMPLEMENTATION

#include <stdlib.h>
#include <string.h>
#include <time.h>

#define BOS "\001"
#define EOS "\002"

/* A conversation is
 *     <s> opening SYSTEM USER ANSWER end USER ANSWER end USER ...
 * where each of the three has a form, and $ stands for what was said. A system text that is not
 * there has no form; in some families it stands inside the first user's, before what was said. The
 * form of an answer is written where an answer is given, and left to the model where it is not. */
enum {
    T_BEGINS = 1, /* with the beginning-of-text token, whatever program and vocabulary say */
    T_SYSTEM_INSIDE = 2,
    T_TRIMS = 4,        /* white space around what users said and the answers, */
    T_TRIMS_SYSTEM = 8, /* and around the system text */
    T_PLAIN = 16        /* its words need be no tokens */
};

/* clang-format off */
static const struct template_row {
    const char *name;
    const char *marks[3], *but[4]; /* what the program contains, and what it does not */
    unsigned traits;
    const char *opening, *system, *user, *answer, *end;
} templates[] = {
    [TEMPLATE_CHATML] = {"chatml", {"<|im_start|>", "<|im_end|>"},
        {"<|im_sep|>", "## Metadata", "truncate_history", "json_to_python_type"}, 0, "",
        "<|im_start|>system\n$<|im_end|>\n",
        "<|im_start|>user\n$<|im_end|>\n<|im_start|>assistant\n",
        "$", "<|im_end|>\n"},
    [TEMPLATE_LLAMA3] = {"llama3", {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"},
        {"Cutting Knowledge Date", ">>>"}, T_BEGINS | T_TRIMS | T_TRIMS_SYSTEM, "",
        "<|start_header_id|>system<|end_header_id|>\n\n$<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\n$<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "$", "<|eot_id|>"},
    /* it has a system message in any case, which the next one ends */
    [TEMPLATE_LLAMA31] = {"llama3.1",
        {"<|start_header_id|>", "Today Date: ", "Cutting Knowledge Date: December 2023"}, {NULL},
        T_BEGINS | T_TRIMS | T_TRIMS_SYSTEM,
        "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\n",
        "$",
        "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n$<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "$", ""},
    [TEMPLATE_LLAMA2] = {"llama2", {"[INST]", "<<SYS>>"}, {NULL},
        T_BEGINS | T_SYSTEM_INSIDE | T_TRIMS | T_TRIMS_SYSTEM, "",
        "<<SYS>>\n$\n<</SYS>>\n\n", "[INST] $ [/INST]", " $ ", EOS BOS},
    [TEMPLATE_MISTRAL] = {"mistral", {"[INST]", " [/INST]"}, {"<<SYS>>"},
        T_BEGINS | T_SYSTEM_INSIDE, "", "$\n\n", "[INST] $ [/INST]", " $", EOS},
    [TEMPLATE_MISTRAL3] = {"mistral3", {"[INST]", "[/INST]"}, {" [/INST]", "[SYSTEM_PROMPT]"},
        T_BEGINS | T_SYSTEM_INSIDE, "", "$\n\n", "[INST]$[/INST]", "$", EOS},
    [TEMPLATE_MISTRAL7] = {"mistral7", {"[INST]", "[/INST]", "[SYSTEM_PROMPT]"}, {NULL},
        T_BEGINS, "", "[SYSTEM_PROMPT]$[/SYSTEM_PROMPT]", "[INST]$[/INST]", "$", EOS},
    [TEMPLATE_ZEPHYR] = {"zephyr", {"<|user|>\n", "<|assistant|>", "eos_token"},
        {"<|end|>", "[gMASK]", "['content'] + '\n'"}, T_PLAIN, "", "<|system|>\n$" EOS "\n",
        "<|user|>\n$" EOS "\n<|assistant|>\n", "$", EOS "\n"},
    [TEMPLATE_FALCON3] = {"falcon3", {"<|user|>\n", "<|assistant|>", "['content'] + '\n'"},
        {"<|end|>", "[gMASK]"}, T_PLAIN, "", "<|system|>\n$\n",
        "<|user|>\n$\n<|assistant|>\n", "$", EOS "\n"},
    [TEMPLATE_GEMMA] = {"gemma", {"<start_of_turn>", "<end_of_turn>"}, {NULL},
        T_BEGINS | T_SYSTEM_INSIDE | T_TRIMS, "", "$\n\n",
        "<start_of_turn>user\n$<end_of_turn>\n<start_of_turn>model\n", "$", "<end_of_turn>\n"},
    /* its first vocabulary's tokens take the line breaks behind them away */
    [TEMPLATE_PHI3] = {"phi3", {"<|assistant|>", "<|end|>"}, {"<|content|>", "<|channel|>"}, 0, "",
        "<|system|>$<|end|>", "<|user|>$<|end|><|assistant|>", "$", "<|end|>"},
    [TEMPLATE_DEEPSEEK] = {"deepseek", {"<\uFF5CUser\uFF5C>", "<\uFF5CAssistant\uFF5C>"},
        {"<think></think>", "thinking_end_token"}, T_BEGINS, "", "$",
        "<\uFF5CUser\uFF5C>$<\uFF5CAssistant\uFF5C>", "$",
        "<\uFF5Cend\u2581of\u2581sentence\uFF5C>"},
    [TEMPLATE_HARMONY] = {"harmony", {"<|start|>assistant", "<|channel|>", "<|message|>"}, {NULL},
        0,
        "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n"
        "Knowledge cutoff: 2024-06\n\nReasoning: medium\n\n# Valid channels: analysis, commentary, "
        "final. Channel must be included for every message.<|end|>",
        "<|start|>developer<|message|># Instructions\n\n$\n\n<|end|>",
        "<|start|>user<|message|>$<|end|><|start|>assistant",
        "<|channel|>final<|message|>$", "<|end|>"},
    [TEMPLATE_NONE] = {"none", {NULL}, {NULL}, 0, "", "$\n", "$", "$", ""},
};
/* clang-format on */

struct template_writer {
    const struct tokenizer *tokenizer;
    char *text; /* (length) not yet encoded */
    size_t length;
    int *ids; /* (n_ids) */
    int n_ids;
    bool ok;
};

/* So many bytes for what was `items`; where there is no memory, w->ok is false and it stays. */
static void *template_room(struct template_writer *w, void *items, size_t bytes) {
    void *larger = w->ok ? realloc(items, bytes) : NULL;
    w->ok = larger != NULL;
    return w->ok ? larger : items;
}

static void template_add(struct template_writer *w, const int *ids, int n) {
    w->ids = template_room(w, w->ids, ((size_t)w->n_ids + (size_t)n + 1) * sizeof *ids);
    for (int i = 0; i < n && w->ok; i++)
        w->ids[w->n_ids++] = ids[i];
}

static void template_text(struct template_writer *w, const char *text, size_t length) {
    w->text = template_room(w, w->text, w->length + length + 1);
    for (size_t i = 0; i < length && w->ok; i++)
        w->text[w->length++] = text[i];
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
    size_t size = strcspn(text, *text == '[' ? "]" : ">");
    if ((*text != '<' && *text != '[') || !text[size])
        return -1;
    int token = tok_find(tokenizer, text, size + 1);
    *length = token >= 0 ? size + 1 : 1;
    return token;
}

/* Up to the end, or the hole of a form. */
static void template_write(struct template_writer *w, const char *text) {
    while (*text && *text != '$' && w->ok) {
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

/* Harmony: the last answer goes on without what came before its last channel. */
static void template_drop_analysis(struct template_writer *w) {
    int channel = tok_find(w->tokenizer, "<|channel|>", 11);
    int message = tok_find(w->tokenizer, "<|message|>", 11), first = -1, last = -1;
    bool headed = false; /* the message at hand has a channel */
    for (int i = 0; i < w->n_ids; i++)
        if (w->ids[i] == channel) {
            first = first < 0 ? i : first;
            last = i;
            headed = true;
        } else if (w->ids[i] == message) {
            first = headed ? first : -1; /* someone else's */
            headed = false;
        }
    if (first >= 0 && last > first) {
        w->n_ids -= last - first;
        memmove(w->ids + first, w->ids + last, (size_t)(w->n_ids - first) * sizeof *w->ids);
    }
}

enum template_part template_part(enum template_kind kind, const struct tokenizer *tokenizer,
                                 int token, enum template_part part) {
    static const char *const words[] = {"<|start|>", "<|channel|>", "<|message|>", "<|end|>"};
    int found = -1;
    for (int i = 0; i < 4 && kind == TEMPLATE_HARMONY && found < 0; i++)
        found = token == tok_find(tokenizer, words[i], strlen(words[i])) ? i : -1;
    switch (found) {
    case 0:
    case 3: return PART_HEADER;
    case 1: return PART_CHANNEL;
    case 2: return part == PART_CHANNEL ? PART_ANALYSIS : PART_FINAL;
    default: break;
    }
    /* the channel's name is one token, or begins with one */
    bool is_final = part == PART_CHANNEL && token == tok_find(tokenizer, "final", 5);
    return is_final ? PART_HEADER : part;
}

static void template_write_said(struct template_writer *w, const char *form, const char *text,
                                size_t length, bool trims) {
    template_write(w, form);
    template_write_typed(w, text, length, trims);
    template_write(w, strchr(form, '$') + 1);
}

/* What follows the thought of an answer. */
static const char *template_skip_thought(const char *text, size_t *length, bool breaks) {
    static const char tag[] = "</think>";
    const char *end = text + *length, *found;
    bool thought = false;
    for (; (found = memmem(text, (size_t)(end - text), tag, sizeof tag - 1)); thought = true)
        text = found + sizeof tag - 1;
    while (thought && breaks && text < end && *text == '\n')
        text++;
    *length = (size_t)(end - text);
    return text;
}

int *template_ids(const struct chat_template *template, const struct tokenizer *tokenizer,
                  const struct turn *turn, int *n_ids) {
    const struct template_row *row = &templates[template->kind];
    const char *system = turn->system ? turn->system : template->system;
    struct template_writer w = {.tokenizer = tokenizer, .ok = true};
    bool first = turn->n_history == 0, trims = row->traits & T_TRIMS || template->trims;
    bool inside = row->traits & T_SYSTEM_INSIDE;
    template_add(&w, turn->history, turn->n_history);
    if (w.ok && template->kind == TEMPLATE_HARMONY)
        template_drop_analysis(&w);
    if (first && (row->traits & T_BEGINS || template->begins || tok_adds_bos(tokenizer)))
        template_write(&w, BOS);
    template_write(&w, first ? row->opening : row->end);
    if (inside)
        template_write(&w, row->user);
    if (first && system && *system)
        template_write_said(&w, row->system, system, strlen(system),
                            row->traits & T_TRIMS_SYSTEM || template->trims);
    template_write_said(&w, inside ? strchr(row->user, '$') : row->user, turn->user,
                        turn->user_length, trims);
    const char *answer = turn->answer;
    size_t length = turn->answer_length;
    if (answer && template->forgets)
        answer = template_skip_thought(answer, &length, template->kind != TEMPLATE_DEEPSEEK);
    if (answer)
        template_write_said(&w, row->answer, answer, length, trims);
    else if (template->thinks)
        template_write(&w, "<think>\n");
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
    const struct template_row *row = &templates[kind];
    const char *parts[] = {row->user, row->answer, row->end};
    for (size_t i = 0; i < sizeof parts / sizeof *parts && !(row->traits & T_PLAIN); i++) {
        const char *at = strchr(parts[i], '<');
        for (; at; at = strchr(at + 1, '<')) {
            size_t length;
            if (template_special(tokenizer, at, &length) < 0)
                return fail(note, "template %s: the vocabulary has no token %.*s; see --template",
                            row->name, (int)strcspn(at, ">") + 1, at);
        }
    }
    return true;
}

/* A program without its comments, and with line breaks for `\n`; to be freed. */
static char *template_program(struct gguf_string jinja) {
    char *text = malloc(jinja.length + 1);
    size_t n = 0;
    for (size_t at = 0; text && at < jinja.length; at++) {
        size_t left = jinja.length - at;
        const char *from = jinja.data + at;
        const char *close = left > 3 && !memcmp(from, "{#", 2) ? memmem(from, left, "#}", 2) : NULL;
        bool line = left > 1 && memcmp(from, "\\n", 2) == 0;
        if (close)
            at += (size_t)(close - from) + 1;
        else if (*from)
            text[n++] = line ? '\n' : *from;
        at += !close && line;
    }
    if (text)
        text[n] = 0;
    return text;
}

static bool template_matches(const struct template_row *row, const char *program) {
    for (int i = 0; i < 4; i++)
        if ((i < 3 && row->marks[i] && !strstr(program, row->marks[i])) ||
            (row->but[i] && strstr(program, row->but[i])))
            return false;
    return row->marks[0] != NULL;
}

/* The system text that the program has, between the words that stand around one, or by name; NULL:
 * none. */
static char *template_own_system(const struct template_row *row, const char *program) {
    const char *after = strchr(row->system, '$') + 1, *at = program;
    char before[64];
    (void)snprintf(before, sizeof before, "%.*s", (int)(after - 1 - row->system), row->system);
    while (*before && *after && (at = strstr(at, before)) != NULL) {
        char stops[] = {'{', at > program && strchr("'\"", at[-1]) ? at[-1] : '{', 0};
        at += strlen(before);
        const char *end = strstr(at, after);
        if (end > at && strcspn(at, stops) >= (size_t)(end - at))
            return strndup(at, (size_t)(end - at));
    }
    static const char name[] = "set default_system_message = "; /* Mistral's */
    const char *quote = (at = strstr(program, name)) ? at + sizeof name - 1 : "";
    static const char today[] = "\" + today + \"";
    time_t now = time(NULL);
    struct tm date;
    char *system = *quote == '\'' || *quote == '"' ? malloc(strlen(quote)) : NULL;
    size_t n = 0;
    for (at = quote + 1; system && *at; at++) {
        if (strncmp(at, today, sizeof today - 1) == 0 && localtime_r(&now, &date)) {
            n += strftime(system + n, sizeof today, "%Y-%m-%d", &date);
            at += sizeof today - 2;
            continue;
        }
        if (*at == *quote)
            break;
        at += *at == '\\' && at[1];
        system[n++] = *at;
    }
    if (system)
        system[n] = 0;
    if (system && *at && at[1 + strspn(at + 1, " -")] == '%')
        return system;
    free(system); /* it is put together from several */
    return NULL;
}

/* Whether the program opens a thought before an answer, for who asks for nothing special. */
static bool template_thinks(const char *program) {
    const char *at = program, *tag = NULL;
    while ((at = strstr(at, "add_generation_prompt")) != NULL)
        tag = at++;
    for (at = tag; at && strncmp(at, "<think>\n'", 9) != 0 && strncmp(at, "<think>\n\"", 9) != 0;) {
        at = *at ? at + 1 : NULL;
        tag = at && strncmp(at, "{%", 2) == 0 ? at : tag;
    }
    if (!at)
        return false;
    char condition[64]; /* of what it stands in */
    (void)snprintf(condition, sizeof condition, "%.*s", (int)strcspn(tag, "}"), tag);
    return strstr(condition, "add_generation_prompt") || strstr(condition, "else") ||
           strstr(condition, "not defined");
}

struct chat_template template_of(struct gguf *file, const struct tokenizer *tokenizer,
                                 char note[ERROR_LENGTH]) {
    struct gguf_string jinja = {NULL, 0};
    struct chat_template found = {.kind = TEMPLATE_NONE};
    *note = 0;
    if (!tokenizer || !file || !gguf_get_string(file, "tokenizer.chat_template", &jinja))
        return found;
    char *program = template_program(jinja);
    const char *blank = program ? program + strspn(program, " \t\r\n") : "";
    enum template_kind kind = TEMPLATE_CHATML;
    while (*blank && kind < TEMPLATE_NONE && !template_matches(&templates[kind], program))
        kind++;
    if (*blank && kind == TEMPLATE_NONE) {
        (void)fail(note, "its chat template is none that is known: prompts are continued as they "
                         "are; --template chooses one");
    } else if (*blank && template_fits(kind, tokenizer, note)) {
        if (kind == TEMPLATE_MISTRAL && tok_find(tokenizer, "[INST]", 6) >= 0)
            kind = TEMPLATE_MISTRAL3; /* where these are tokens no space is beside them */
        found.kind = kind;
        found.begins = strstr(program, "bos_token") != NULL;
        found.thinks = template_thinks(program);
        found.trims = strstr(program, ", true)|trim %}"); /* Qwen3.5's render_content */
        found.forgets =
            strstr(program, "split('</think>')") || strstr(program, "split(\"</think>\")");
        found.system = template_own_system(&templates[kind], program);
    }
    free(program);
    return found;
}

#endif /* TEMPLATE_IMPLEMENTATION */
