/* tokenizer.h: text to token ids and back.
 *
 *     struct tokenizer *tokenizer = tok_open(file, error);  // file: from gguf_open
 *     int *ids = tok_encode(tokenizer, "Once upon", 9, &n_ids);
 *     struct tok_stream stream = {0};
 *     char out[TOK_TEXT_SIZE];
 *     for (int i = 0; i < n_ids; i++) {
 *         fwrite(out, 1, tok_decode(tokenizer, &stream, ids[i], out), stdout);
 *     }
 *     fwrite(out, 1, tok_flush(&stream, out), stdout);
 *
 * Two families of vocabularies (tokenizer.ggml.model):
 * - `llama`, and llama2.c's tokenizer.bin: SentencePiece BPE. A text is characters; of all
 *   neighbours that together spell a token the pair of the highest score merges first; a character
 *   that is no token becomes bytes. Spaces are U+2581 in the file.
 * - `gpt2`: byte-level BPE. A pattern (tokenizer.ggml.pre) splits a text into words; a word is
 *   bytes, and pairs merge in the order of the file's list. Bytes are printable stand-ins there.
 * On opening, tokens are copied and become the bytes they stand for, so that both families share
 * all that follows. Merging is one loop: symbols in a linked list, candidate pairs in a heap, so n
 * bytes take O(n log n) whatever they are.
 *
 * What it refuses: to find control tokens in a text (`<s>` is three characters; a chat template
 * asks tok_find), vocabularies that cannot spell every byte, patterns it does not know. It adds no
 * beginning-of-text token: that is the caller's decision.
 *
 * Invariants: nothing changes after opening, so threads may share a tokenizer; every byte has a
 * token, so no text is lost (U+2581 in a text of `llama` comes back as the space it means there);
 * what is decoded is valid UTF-8. Read next: gguf.h. */
#ifndef TOKENIZER_H
#define TOKENIZER_H

#include "gguf.h"
#include <stdbool.h>
#include <stddef.h>

enum {
    TOK_ERROR_LENGTH = 512,
    TOK_TOKEN_LENGTH = 1024,   /* bytes of a token at most; the longest known ones have 512 */
    TOK_TEXT_LENGTH = 1 << 28, /* bytes of a text at most, so that an int counts what it becomes */
    TOK_TEXT_SIZE = 3 * (TOK_TOKEN_LENGTH + 4) /* a stray byte becomes the 3 bytes of U+FFFD */
};

struct tokenizer; /* owns all it needs: the gguf may be closed */

/* NULL: `error` is one line that begins with the key that is wrong (the caller knows the path), or,
 * for a tokenizer.bin, with its path. */
struct tokenizer *tok_open(struct gguf *file, char error[TOK_ERROR_LENGTH]);
struct tokenizer *tok_open_checkpoint(const char *path, int vocab_size,
                                      char error[TOK_ERROR_LENGTH]);
void tok_close(struct tokenizer *tokenizer);

int tok_vocab_size(const struct tokenizer *tokenizer);
int tok_bos(const struct tokenizer *tokenizer); /* -1: none */
int tok_eos(const struct tokenizer *tokenizer); /* -1: none */
bool tok_adds_bos(const struct tokenizer *tokenizer);
/* End of text, of turn or of message: where generation stops. */
bool tok_ends_text(const struct tokenizer *tokenizer, int token);
bool tok_is_control(const struct tokenizer *tokenizer, int token);
/* The token of exactly this text, a control token before any other; -1: none. */
int tok_find(const struct tokenizer *tokenizer, const char *text, size_t length);
/* The ids of a text, to be freed. A byte that is not UTF-8 stands for itself. NULL: out of memory,
 * or longer than TOK_TEXT_LENGTH. */
int *tok_encode(const struct tokenizer *tokenizer, const char *text, size_t length, int *n_tokens);

/* One text on its way out. All zero: at its beginning, where SentencePiece's leading space is
 * dropped; so an answer that continues a prompt is decoded by the stream that saw the prompt. */
struct tok_stream {
    char held[4]; /* (n_held) the beginning of a character */
    int n_held;
    bool begun;
};
/* Writes what one more token adds, whole characters only, and returns the number of bytes. Bytes
 * that cannot become UTF-8 come out as U+FFFD, control tokens and ids out of range as nothing. */
size_t tok_decode(const struct tokenizer *tokenizer, struct tok_stream *stream, int token,
                  char out[TOK_TEXT_SIZE]);
/* Ends a text: an unfinished character comes out as U+FFFD; the stream is new again. */
size_t tok_flush(struct tok_stream *stream, char out[TOK_TEXT_SIZE]);

#endif /* TOKENIZER_H */

#ifdef TOKENIZER_IMPLEMENTATION
#undef TOKENIZER_IMPLEMENTATION

#include "unicode_table.h"
#include <assert.h>
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TOK_LIMIT = 1 << 24 }; /* tokens, merges: a rank up to here is exact in a float */

/* The numbers are GGUF's. */
enum { TOKEN_NORMAL = 1, TOKEN_UNKNOWN, TOKEN_CONTROL, TOKEN_USER_DEFINED, TOKEN_BYTE = 6 };

struct vocab_token {
    const char *text; /* (length) in tokenizer.texts */
    int length, type;
    bool ends_text;
};

struct vocab_merge {
    int left, right; /* tokens: the key in tokenizer.pairs */
    int result;
    float priority; /* score, or -rank */
};

/* Open addressing, at most half full. Keys are not copied. */
struct table {
    struct slot {
        const void *key; /* (length) bytes; NULL: the slot is empty */
        int length, value;
    } * slots;
    size_t mask;
};

struct tokenizer {
    struct vocab_token *tokens; /* (n_tokens) */
    struct vocab_merge *merges; /* (n_merges) */
    char *texts;                /* of all tokens */
    struct table plain;         /* text -> token that may come out of a user's text */
    struct table special;       /* text -> control or unknown token */
    struct table pairs;         /* left, right -> merge */
    size_t (*split)(const char *text, size_t length); /* bytes of the next word; NULL: `llama` */
    int n_tokens, n_merges, bos, eos;
    int byte_tokens[256];
    bool adds_prefix, adds_bos;
};

__attribute__((format(printf, 2, 3))) static bool vocab_fail(char *error, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error, TOK_ERROR_LENGTH, format, arguments);
    va_end(arguments);
    for (char *at = error; *at; at++) /* names come from files: one line it stays */
        *at = (unsigned char)*at < ' ' || *at == 127 ? '?' : *at;
    return false;
}

/* ---- tables ---- */

static bool table_new(struct table *table, size_t n) {
    size_t slots = 2;
    while (slots < 2 * n)
        slots *= 2;
    table->mask = slots - 1;
    table->slots = calloc(slots, sizeof *table->slots);
    return table->slots;
}

/* The slot of a key, or the empty slot where it belongs. */
static struct slot *table_slot(const struct table *table, const void *key, size_t length) {
    uint32_t hash = 2166136261u; /* FNV-1a */
    for (size_t i = 0; i < length; i++)
        hash = (hash ^ ((const unsigned char *)key)[i]) * 16777619u;
    for (size_t i = hash & table->mask;; i = (i + 1) & table->mask) {
        struct slot *slot = &table->slots[i];
        if (!slot->key || ((size_t)slot->length == length && !memcmp(slot->key, key, length)))
            return slot;
    }
}

static int table_find(const struct table *table, const void *key, size_t length) {
    const struct slot *slot = table_slot(table, key, length);
    return slot->key ? slot->value : -1;
}

static void table_add(struct table *table, const void *key, size_t length, int value) {
    struct slot *slot = table_slot(table, key, length);
    if (!slot->key) /* of several equal keys the first counts */
        *slot = (struct slot){key, (int)length, value};
}

/* ---- characters ---- */

/* Reads one UTF-8 character. > 0: its bytes. 0: all `length` bytes begin one. < 0: so many bytes
 * can never be part of one (the longest such prefix, as Unicode recommends replacing it). */
static int utf8_read(const char *text, size_t length, uint32_t *code) {
    uint32_t lead = length ? (unsigned char)text[0] : 0;
    int size = lead < 0x80 ? 1 : lead < 0xC2 ? 0 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
    if (size == 0 || lead > 0xF4)
        return -1;
    /* the second byte's range excludes overlong forms, surrogates and what lies past U+10FFFF */
    unsigned char low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
    unsigned char high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
    *code = size == 1 ? lead : lead & (0x7Fu >> size);
    for (int i = 1; i < size && (size_t)i < length; i++) {
        unsigned char byte = (unsigned char)text[i];
        if (byte < low || byte > high)
            return -i;
        *code = *code << 6 | (byte & 0x3Fu);
        low = 0x80;
        high = 0xBF;
    }
    return (size_t)size <= length ? size : 0;
}

/* Bytes of the first character; a byte that is not UTF-8 is a character of its own. */
static size_t char_size(const char *text, size_t length, uint32_t *code) {
    int size = utf8_read(text, length, code);
    *code = size > 0 ? *code : UINT32_MAX;
    return size > 0 ? (size_t)size : length > 0;
}

/* GPT-2 writes bytes as printable characters: themselves, or, for the others, from U+0100 on. */
static int byte_of_char(uint32_t code) {
    bool printable = (code > 32 && code < 127) || (code > 160 && code < 256 && code != 173);
    if (code < 256)
        return printable ? (int)code : -1;
    return code <= 288 ? (int)code - 256 : code <= 322 ? (int)code - 162 : code == 323 ? 173 : -1;
}

static int byte_of_spelling(const char *text, size_t length) { /* `<0x41>` is 65 */
    static const char digits[] = "0123456789ABCDEF";
    if (length != 6 || memcmp(text, "<0x", 3) || text[5] != '>')
        return -1;
    const char *high = memchr(digits, text[3], 16), *low = memchr(digits, text[4], 16);
    return high && low ? (int)(high - digits) * 16 + (int)(low - digits) : -1;
}

/* The bytes that a spelling in the file stands for: never more than it has. */
static int unspell(const struct tokenizer *t, const char *text, size_t length, char *out) {
    char *end = out;
    uint32_t code;
    for (size_t at = 0, size; at < length; at += size) {
        size = char_size(text + at, length - at, &code);
        int byte = t->split ? byte_of_char(code) : code == 0x2581 ? ' ' : -1;
        if (byte >= 0) {
            *end++ = (char)byte;
        } else {
            memcpy(end, text + at, size);
            end += size;
        }
    }
    return (int)(end - out);
}

/* ---- splitting patterns ---- */

/* Bytes of the characters of one class at the start of a text, and of the last of them. */
static size_t run_of(const char *text, size_t length, enum unicode_class kind, size_t *last) {
    size_t run = 0;
    uint32_t code;
    *last = 0;
    while (run < length) {
        size_t size = char_size(text + run, length - run, &code);
        if (unicode_class_of(code) != kind)
            break;
        run += size;
        *last = size;
    }
    return run;
}

/* 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+ */
static size_t split_gpt2(const char *text, size_t length) {
    static const char *const endings[] = {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"};
    for (size_t i = 0; i < sizeof endings / sizeof *endings; i++) {
        size_t size = strlen(endings[i]);
        if (length >= size && memcmp(text, endings[i], size) == 0)
            return size;
    }
    size_t last, space = text[0] == ' ' && length > 1;
    uint32_t code;
    char_size(text + space, length - space, &code);
    if (unicode_class_of(code) != UNICODE_SPACE)
        return space + run_of(text + space, length - space, unicode_class_of(code), &last);
    size_t run = run_of(text, length, UNICODE_SPACE, &last);
    /* the last space of several belongs to the word behind them */
    return run == length || run == last ? run : run - last;
}

static const struct {
    const char *name; /* tokenizer.ggml.pre */
    size_t (*split)(const char *text, size_t length);
} split_patterns[] = {{"gpt-2", split_gpt2}};

/* ---- encoding ---- */

/* A token of the word that is being merged. */
struct symbol {
    int token;          /* -1: merged into its left neighbour */
    int previous, next; /* symbols; -1: none */
};

/* Two neighbours that could merge; outdated once they are no longer merge->left and ->right. */
struct candidate {
    const struct vocab_merge *merge;
    float priority; /* the merge's: the heap compares it often */
    int left;
};

struct encoder {
    const struct tokenizer *tokenizer;
    struct symbol *symbols; /* (n_symbols) of one word */
    struct candidate *heap; /* (n_heap) the best first */
    int *tokens;            /* (n_tokens) the result */
    int n_symbols, n_heap, n_tokens;
};

static bool goes_before(const struct candidate *a, const struct candidate *b) {
    return a->priority > b->priority || (a->priority == b->priority && a->left < b->left);
}

static void heap_push(struct encoder *e, struct candidate added) {
    int at = e->n_heap++;
    assert(e->n_heap < 2 * e->n_symbols); /* one a pair; a merge takes one and adds at most two */
    while (at > 0 && goes_before(&added, &e->heap[(at - 1) / 2])) {
        e->heap[at] = e->heap[(at - 1) / 2];
        at = (at - 1) / 2;
    }
    e->heap[at] = added;
}

static struct candidate heap_pop(struct encoder *e) {
    struct candidate best = e->heap[0], moved = e->heap[--e->n_heap];
    int at = 0;
    for (int child = 1; child < e->n_heap; child = 2 * at + 1) {
        child += child + 1 < e->n_heap && goes_before(&e->heap[child + 1], &e->heap[child]);
        if (!goes_before(&e->heap[child], &moved))
            break;
        e->heap[at] = e->heap[child];
        at = child;
    }
    e->heap[at] = moved;
    return best;
}

static void add_candidate(struct encoder *e, int left) {
    if (left < 0 || e->symbols[left].next < 0)
        return;
    const struct symbol *symbol = &e->symbols[left];
    int pair[2] = {symbol->token, e->symbols[symbol->next].token};
    int found = table_find(&e->tokenizer->pairs, pair, sizeof pair);
    if (found >= 0) {
        const struct vocab_merge *merge = &e->tokenizer->merges[found];
        heap_push(e, (struct candidate){merge, merge->priority, left});
    }
}

static void add_symbol(struct encoder *e, int token) {
    int at = e->n_symbols++;
    e->symbols[at] = (struct symbol){token, at - 1, -1};
    if (at > 0)
        e->symbols[at - 1].next = at;
}

static void merge_symbols(struct encoder *e) {
    for (int i = 0; i < e->n_symbols; i++)
        add_candidate(e, i);
    while (e->n_heap > 0) {
        struct candidate best = heap_pop(e);
        struct symbol *left = &e->symbols[best.left];
        struct symbol *right = left->next < 0 ? left : &e->symbols[left->next];
        if (left->token != best.merge->left || right->token != best.merge->right || right == left)
            continue;
        left->token = best.merge->result;
        left->next = right->next;
        right->token = -1;
        if (left->next >= 0)
            e->symbols[left->next].previous = best.left;
        add_candidate(e, left->previous);
        add_candidate(e, best.left);
    }
}

static void encode_word(struct encoder *e, const char *text, size_t length) {
    const struct tokenizer *t = e->tokenizer;
    e->n_symbols = 0;
    for (size_t at = 0, size; at < length; at += size) {
        uint32_t code;
        size = t->split ? 1 : char_size(text + at, length - at, &code);
        int token = table_find(&t->plain, text + at, size);
        if (token >= 0)
            add_symbol(e, token);
        for (size_t i = 0; token < 0 && i < size; i++)
            add_symbol(e, t->byte_tokens[(unsigned char)text[at + i]]);
    }
    merge_symbols(e);
    for (int i = 0; i >= 0; i = e->symbols[i].next)
        e->tokens[e->n_tokens++] = e->symbols[i].token;
}

int *tok_encode(const struct tokenizer *t, const char *text, size_t length, int *n_tokens) {
    size_t prefix = t->adds_prefix && length > 0, n = prefix + length;
    struct encoder e = {.tokenizer = t};
    *n_tokens = 0;
    if (length > TOK_TEXT_LENGTH)
        return NULL;
    char *whole = malloc(n + 1);
    e.symbols = malloc((n + 1) * sizeof *e.symbols);
    e.heap = malloc((n + 1) * 2 * sizeof *e.heap);
    e.tokens = malloc((n + 1) * sizeof *e.tokens);
    if (whole && e.symbols && e.heap && e.tokens) {
        whole[0] = ' ';
        /* U+2581 in a text is a space, as SentencePiece has it: models were trained that way */
        if (t->split)
            memcpy(whole, text, length);
        else
            n = prefix + (size_t)unspell(t, text, length, whole + prefix);
        for (size_t at = 0, size; at < n; at += size) {
            size = t->split ? t->split(whole + at, n - at) : n;
            encode_word(&e, whole + at, size);
        }
        *n_tokens = e.n_tokens;
    } else {
        free(e.tokens);
        e.tokens = NULL;
    }
    free(whole);
    free(e.symbols);
    free(e.heap);
    return e.tokens;
}

/* ---- decoding ---- */

/* Moves what is complete from `held` to `out`; at the end of a text nothing stays behind. */
static size_t release_held(struct tok_stream *stream, bool at_end, char *out) {
    size_t written = 0;
    while (stream->n_held > 0) {
        uint32_t code;
        int size = utf8_read(stream->held, (size_t)stream->n_held, &code);
        if (size == 0 && !at_end)
            break;
        int used = size > 0 ? size : size < 0 ? -size : stream->n_held;
        memcpy(out + written, size > 0 ? stream->held : "\xEF\xBF\xBD",
               size > 0 ? (size_t)size : 3);
        written += size > 0 ? (size_t)size : 3;
        stream->n_held -= used;
        memmove(stream->held, stream->held + used, (size_t)stream->n_held);
    }
    return written;
}

size_t tok_decode(const struct tokenizer *t, struct tok_stream *stream, int token,
                  char out[TOK_TEXT_SIZE]) {
    size_t written = 0;
    if (token < 0 || token >= t->n_tokens || t->tokens[token].type == TOKEN_CONTROL)
        return 0;
    const struct vocab_token *piece = &t->tokens[token];
    for (int i = 0; i < piece->length; i++) {
        if (stream->begun || !t->adds_prefix || piece->text[i] != ' ') {
            stream->held[stream->n_held++] = piece->text[i];
            written += release_held(stream, false, out + written);
        }
        stream->begun = true;
    }
    return written;
}

size_t tok_flush(struct tok_stream *stream, char out[TOK_TEXT_SIZE]) {
    size_t written = release_held(stream, true, out);
    *stream = (struct tok_stream){0};
    return written;
}

/* ---- opening ---- */

void tok_close(struct tokenizer *t) {
    if (t) {
        free(t->tokens);
        free(t->merges);
        free(t->texts);
        free(t->plain.slots);
        free(t->special.slots);
        free(t->pairs.slots);
        free(t);
    }
}

/* One more token, its text written to `text`. Returns the bytes of its text. */
static int add_token(struct tokenizer *t, struct gguf_string spelling, int type, char *text) {
    static const char *const ends[] = {"<|endoftext|>", "<|eot_id|>", "<|eom_id|>",
                                       "<|im_end|>",    "<|end|>",    "<end_of_turn>"};
    struct vocab_token *token = &t->tokens[t->n_tokens];
    int byte = t->split ? -1 : byte_of_spelling(spelling.data, spelling.length);
    *token = (struct vocab_token){text, (int)spelling.length, type, false};
    memcpy(text, spelling.data, spelling.length);
    if (byte >= 0) {
        *text = (char)byte;
        token->length = 1;
        token->type = TOKEN_BYTE;
        t->byte_tokens[byte] = t->n_tokens;
    } else if (type == TOKEN_CONTROL || type == TOKEN_UNKNOWN) {
        table_add(&t->special, text, spelling.length, t->n_tokens);
        for (size_t i = 0; i < sizeof ends / sizeof *ends; i++) {
            size_t length = strlen(ends[i]);
            token->ends_text |= length == spelling.length && !memcmp(text, ends[i], length);
        }
    } else {
        if (type != TOKEN_USER_DEFINED)
            token->length = unspell(t, spelling.data, spelling.length, text);
        table_add(&t->plain, text, (size_t)token->length, t->n_tokens);
    }
    t->n_tokens++;
    return token->length;
}

/* `where` begins messages; types are raw int32, NULL: all TOKEN_NORMAL. */
static bool add_tokens(struct tokenizer *t, const struct gguf_string *spellings, size_t n,
                       const char *types, const char *where, char *error) {
    size_t bytes = 0;
    for (size_t i = 0; i < n; i++) {
        bytes += spellings[i].length;
        if (spellings[i].length > TOK_TOKEN_LENGTH || bytes > TOK_TEXT_LENGTH) {
            return vocab_fail(error, "%s: token %zu has %zu bytes, expected at most %d", where, i,
                              spellings[i].length, TOK_TOKEN_LENGTH);
        }
    }
    t->tokens = calloc(n, sizeof *t->tokens);
    t->texts = malloc(bytes + 1);
    if (!t->tokens || !t->texts || !table_new(&t->plain, n) || !table_new(&t->special, n))
        return vocab_fail(error, "%s: out of memory for %zu tokens", where, n);
    memset(t->byte_tokens, -1, sizeof t->byte_tokens);
    char *end = t->texts;
    for (size_t i = 0; i < n; i++) {
        int32_t type = TOKEN_NORMAL;
        if (types)
            memcpy(&type, types + i * sizeof type, sizeof type);
        end += add_token(t, spellings[i], type, end);
    }
    for (int i = 0; i < 256; i++) {
        char byte = (char)i;
        if (t->byte_tokens[i] < 0 && (!t->split || table_find(&t->plain, &byte, 1) < 0))
            return vocab_fail(error, "%s: no token for byte 0x%02X", where, (unsigned)i);
    }
    return true;
}

static bool new_merges(struct tokenizer *t, size_t n, const char *where, char *error) {
    t->merges = malloc((n + 1) * sizeof *t->merges);
    return (t->merges && table_new(&t->pairs, n)) ||
           vocab_fail(error, "%s: out of memory for %zu merges", where, n);
}

/* The merge that makes a text out of its first `cut` bytes and the rest. False: not all tokens. */
static bool add_merge(struct tokenizer *t, const char *text, int cut, int length, float priority) {
    struct vocab_merge *merge = &t->merges[t->n_merges];
    merge->left = table_find(&t->plain, text, (size_t)cut);
    merge->right = table_find(&t->plain, text + cut, (size_t)(length - cut));
    merge->result = table_find(&t->plain, text, (size_t)length);
    merge->priority = priority;
    if (merge->left < 0 || merge->right < 0 || merge->result < 0)
        return false;
    table_add(&t->pairs, merge, 2 * sizeof merge->left, t->n_merges++);
    return true;
}

/* `llama`: any two tokens that make a token merge, by its score. Scores are raw float32. */
static bool add_score_merges(struct tokenizer *t, const char *scores, const char *where,
                             char *error) {
    size_t cuts = 0;
    for (int i = 0; i < t->n_tokens; i++)
        cuts += (size_t)t->tokens[i].length;
    if (!new_merges(t, cuts, where, error))
        return false;
    for (int i = 0; i < t->n_tokens; i++) {
        const struct vocab_token *token = &t->tokens[i];
        float score;
        memcpy(&score, scores + (size_t)i * sizeof score, sizeof score);
        if (!isfinite(score))
            return vocab_fail(error, "%s: the score of token %d is not finite", where, i);
        bool plain = table_find(&t->plain, token->text, (size_t)token->length) == i;
        for (int cut = 1; plain && cut < token->length; cut++)
            add_merge(t, token->text, cut, token->length, score);
    }
    return true;
}

static bool read_array(struct gguf *file, const char *key, enum gguf_value_type type, size_t least,
                       size_t most, struct gguf_array *array, char *error) {
    if (!gguf_get_array(file, key, array))
        return vocab_fail(error, "%s: not there, expected an array", key);
    if (array->type != type || array->count < least || array->count > most) {
        return vocab_fail(error, "%s: got %zu of type %d, expected %zu to %zu of type %d", key,
                          array->count, (int)array->type, least, most, (int)type);
    }
    return true;
}

/* `gpt2`: merges are listed, best first, as `left right`. */
static bool add_listed_merges(struct tokenizer *t, struct gguf *file, char *error) {
    static const char key[] = "tokenizer.ggml.merges";
    struct gguf_array lines = {0};
    if (!read_array(file, key, GGUF_STRING, 0, TOK_LIMIT, &lines, error) ||
        !new_merges(t, lines.count, key, error))
        return false;
    for (size_t i = 0; i < lines.count; i++) {
        char text[TOK_TOKEN_LENGTH];
        struct gguf_string line = lines.strings[i];
        const char *space = line.length > 0 ? memchr(line.data + 1, ' ', line.length - 1) : NULL;
        if (!space || line.length > sizeof text)
            return vocab_fail(error, "%s: %zu is not two tokens with a space between", key, i);
        size_t cut = (size_t)(space - line.data);
        int left = unspell(t, line.data, cut, text);
        int right = unspell(t, space + 1, line.length - cut - 1, text + left);
        if (!add_merge(t, text, left, left + right, -(float)i))
            return vocab_fail(error, "%s: %zu names or makes something that is no token", key, i);
    }
    return true;
}

static bool string_is(struct gguf_string string, const char *text) {
    return string.length == strlen(text) && memcmp(string.data, text, string.length) == 0;
}

static bool read_family(struct tokenizer *t, struct gguf *file, char *error) {
    struct gguf_string model = {"", 0}, pre = {"", 0};
    gguf_get_string(file, "tokenizer.ggml.model", &model);
    gguf_get_string(file, "tokenizer.ggml.pre", &pre);
    if (string_is(model, "llama"))
        return true;
    if (!string_is(model, "gpt2")) {
        return vocab_fail(error, "tokenizer.ggml.model: got `%.*s`, expected `llama` or `gpt2`",
                          (int)model.length, model.data);
    }
    for (size_t i = 0; i < sizeof split_patterns / sizeof *split_patterns; i++)
        t->split = string_is(pre, split_patterns[i].name) ? split_patterns[i].split : t->split;
    return t->split || vocab_fail(error, "tokenizer.ggml.pre: got `%.*s`, expected `gpt-2`",
                                  (int)pre.length, pre.data);
}

/* -1 if the key is not there. */
static bool read_id(struct tokenizer *t, struct gguf *file, const char *key, int *id, char *error) {
    int64_t value = -1;
    if (gguf_get_int(file, key, &value) && (value < 0 || value >= t->n_tokens)) {
        return vocab_fail(error, "%s: got %lld, expected 0 to %d", key, (long long)value,
                          t->n_tokens - 1);
    }
    *id = (int)value;
    return true;
}

static bool read_vocab(struct tokenizer *t, struct gguf *file, char *error) {
    static const char key[] = "tokenizer.ggml.tokens";
    static const char *const end_keys[] = {"tokenizer.ggml.eot_token_id",
                                           "tokenizer.ggml.eom_token_id",
                                           "tokenizer.ggml.eos_token_id"};
    struct gguf_array tokens = {0}, scores = {0}, types = {0};
    if (!read_family(t, file, error) ||
        !read_array(file, key, GGUF_STRING, 1, TOK_LIMIT, &tokens, error))
        return false;
    size_t n = tokens.count;
    if (gguf_get_array(file, "tokenizer.ggml.token_type", &types) &&
        !read_array(file, "tokenizer.ggml.token_type", GGUF_I32, n, n, &types, error))
        return false;
    if (!t->split && !read_array(file, "tokenizer.ggml.scores", GGUF_F32, n, n, &scores, error))
        return false;
    if (!add_tokens(t, tokens.strings, n, types.values, key, error) ||
        !(t->split ? add_listed_merges(t, file, error)
                   : add_score_merges(t, scores.values, "tokenizer.ggml.scores", error)) ||
        !read_id(t, file, "tokenizer.ggml.bos_token_id", &t->bos, error))
        return false;
    for (size_t i = 0; i < sizeof end_keys / sizeof *end_keys; i++) {
        if (!read_id(t, file, end_keys[i], &t->eos, error))
            return false;
        if (t->eos >= 0)
            t->tokens[t->eos].ends_text = true;
    }
    t->adds_prefix = t->adds_bos = !t->split;
    gguf_get_bool(file, "tokenizer.ggml.add_space_prefix", &t->adds_prefix);
    gguf_get_bool(file, "tokenizer.ggml.add_bos_token", &t->adds_bos);
    t->adds_prefix = t->adds_prefix && !t->split;
    return gguf_error(file)[0] == 0 || vocab_fail(error, "%s", gguf_error(file));
}

struct tokenizer *tok_open(struct gguf *file, char error[TOK_ERROR_LENGTH]) {
    struct tokenizer *t = calloc(1, sizeof *t);
    if (!t) {
        vocab_fail(error, "tokenizer.ggml: out of memory");
    } else if (!read_vocab(t, file, error)) {
        tok_close(t);
        t = NULL;
    }
    return t;
}

/* Reads a whole file; freed by the caller. */
static char *read_whole(const char *path, size_t *length, char *error) {
    FILE *stream = fopen(path, "rb");
    long size = stream && fseek(stream, 0, SEEK_END) == 0 ? ftell(stream) : -1;
    char *data = size >= 0 && size <= TOK_TEXT_LENGTH ? malloc((size_t)size + 1) : NULL;
    bool ok = data && fseek(stream, 0, SEEK_SET) == 0 &&
              fread(data, 1, (size_t)size, stream) == (size_t)size;
    if (stream)
        fclose(stream);
    if (!ok) {
        vocab_fail(error, "%s: cannot be read; is the tokenizer beside the model?", path);
        free(data);
        return NULL;
    }
    *length = (size_t)size;
    return data;
}

/* tokenizer.bin: a uint32, then for each token a float32 score, an int32 length and its text. */
static bool parse_checkpoint(struct tokenizer *t, const char *data, size_t length, size_t n,
                             const char *path, char *error) {
    struct gguf_string *texts = calloc(n, sizeof *texts);
    char *scores = calloc(n, 2 * sizeof(float)), *types = scores + n * sizeof(float);
    size_t at = sizeof(uint32_t), i = 0;
    bool ok = texts && scores;
    for (; ok && i < n && at + 8 <= length; i++) {
        int32_t size, type = i == 0 ? TOKEN_UNKNOWN : i < 3 ? TOKEN_CONTROL : TOKEN_NORMAL;
        memcpy(scores + i * sizeof(float), data + at, sizeof(float));
        memcpy(types + i * sizeof type, &type, sizeof type);
        memcpy(&size, data + at + 4, sizeof size);
        at += 8;
        if (size < 0 || (size_t)size > length - at)
            break;
        texts[i] = (struct gguf_string){data + at, (size_t)size};
        at += (size_t)size;
    }
    if (!ok) {
        vocab_fail(error, "%s: out of memory for %zu tokens", path, n);
    } else if (i < n || at != length) {
        ok = vocab_fail(error, "%s: got %zu bytes and %s tokens, expected %zu; is it this model's?",
                        path, length, i < n ? "fewer" : "more", n);
    }
    ok = ok && add_tokens(t, texts, n, types, path, error) &&
         add_score_merges(t, scores, path, error);
    free(texts);
    free(scores);
    return ok;
}

struct tokenizer *tok_open_checkpoint(const char *path, int vocab_size,
                                      char error[TOK_ERROR_LENGTH]) {
    struct tokenizer *t = calloc(1, sizeof *t);
    size_t length;
    char *data = read_whole(path, &length, error);
    bool ok = t && data && vocab_size >= 259 && vocab_size <= TOK_LIMIT;
    if (data && !ok)
        vocab_fail(error, "%s: got a model of %d tokens, expected at least 259", path, vocab_size);
    ok = ok && parse_checkpoint(t, data, length, (size_t)vocab_size, path, error);
    free(data);
    if (!ok) {
        tok_close(t);
        return NULL;
    }
    t->bos = 1;
    t->eos = 2;
    t->adds_bos = t->adds_prefix = true;
    t->tokens[1].ends_text = t->tokens[2].ends_text = true;
    return t;
}

/* ---- asking ---- */

int tok_vocab_size(const struct tokenizer *t) {
    return t->n_tokens;
}

int tok_bos(const struct tokenizer *t) {
    return t->bos;
}

int tok_eos(const struct tokenizer *t) {
    return t->eos;
}

bool tok_adds_bos(const struct tokenizer *t) {
    return t->adds_bos && t->bos >= 0;
}

bool tok_ends_text(const struct tokenizer *t, int token) {
    return token >= 0 && token < t->n_tokens && t->tokens[token].ends_text;
}

bool tok_is_control(const struct tokenizer *t, int token) {
    return token >= 0 && token < t->n_tokens && t->tokens[token].type == TOKEN_CONTROL;
}

int tok_find(const struct tokenizer *t, const char *text, size_t length) {
    int token = table_find(&t->special, text, length);
    return token >= 0 ? token : table_find(&t->plain, text, length);
}

#endif /* TOKENIZER_IMPLEMENTATION */
