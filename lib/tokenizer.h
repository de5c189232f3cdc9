/* tokenizer.h: text to token ids and back.
 *
 *     struct tokenizer *tokenizer = tok_open(file, error);  // file: from gguf_open
 *     int *ids = tok_encode(tokenizer, "Once upon", 9, &n_ids);
 *     struct tok_stream stream = {0};
 *     char out[TOK_TEXT_SIZE];
 *     for (int i = 0; i < n_ids; i++)
 *         fwrite(out, 1, tok_decode(tokenizer, &stream, ids[i], out), stdout);
 *     fwrite(out, 1, tok_flush(&stream, out), stdout);
 *
 * Two families of vocabularies (tokenizer.ggml.model):
 * - `llama`, and llama2.c's tokenizer.bin: SentencePiece BPE. A text is characters; of all
 *   neighbours that together spell a token the pair of the highest score merges first; what is no
 *   token in the end becomes bytes. Spaces are U+2581 in the file.
 * - `gpt2`: byte-level BPE. A pattern (tokenizer.ggml.pre) splits a text into words; a word is
 *   bytes, and pairs merge in the order of the file's list. Bytes are printable stand-ins there.
 * words.h has the patterns; vocabulary.h makes one table of both. Merging is one loop: the symbols
 * of a word, and a heap of the pairs that could merge, so n bytes take O(n log n) whatever they
 * are. User-defined tokens are cut out of a text before all this.
 *
 * What it refuses: to find control tokens in a text (`<s>` is three characters; a chat template
 * asks tok_find), vocabularies that cannot spell every byte, patterns it does not know. It adds no
 * beginning-of-text token: that is the caller's decision.
 *
 * Invariants: nothing changes after opening, so threads may share a tokenizer; every byte has a
 * token, so no text is lost (U+2581 in a text of `llama` comes back as the space it means there);
 * what is decoded is valid UTF-8. Read next: vocabulary.h. */
#ifndef TOKENIZER_H
#define TOKENIZER_H

#include "gguf.h"
#include "text.h"
#include <stdbool.h>
#include <stddef.h>

enum {
    TOK_TOKEN_LENGTH = 1024,   /* bytes of a token at most; the longest known ones have 512 */
    TOK_TEXT_LENGTH = 1 << 26, /* bytes of a text at most: encoding takes 41 times as many */
    TOK_TEXT_SIZE = 3 * (TOK_TOKEN_LENGTH + 4) /* a stray byte becomes the 3 bytes of U+FFFD */
};

struct tokenizer; /* owns all it needs: the gguf may be closed */

/* NULL: `error` is one line that begins with the key that is wrong (the caller knows the path), or,
 * for a tokenizer.bin, with its path. */
struct tokenizer *tok_open(struct gguf *file, char error[ERROR_LENGTH]);
struct tokenizer *tok_open_checkpoint(const char *path, int vocab_size, char error[ERROR_LENGTH]);
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

#include "vocabulary.h"
#include "words.h"
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

/* ---- encoding ---- */

/* Two neighbours that could merge; outdated once they are no longer `size` bytes together. */
struct candidate {
    float priority; /* score, or -rank */
    int left, size;
};

/* A part of a word that is a token, or a single character. */
struct symbol {
    int size;     /* bytes; 0: it is merged into its left neighbour, or the end of the word */
    int previous; /* -1: none */
};

struct encoder {
    const struct tokenizer *tokenizer;
    const char *word;       /* what is being merged */
    struct symbol *symbols; /* of the word: [n] is the one that begins at byte n */
    struct candidate *heap; /* (n_heap) the best first */
    char *text;             /* a fragment with the spaces that `llama` has */
    int *tokens;            /* (n_tokens) the result */
    int n_heap, n_tokens;
};

static bool goes_before(const struct candidate *a, const struct candidate *b) {
    return a->priority > b->priority || (a->priority == b->priority && a->left < b->left);
}

static void heap_push(struct encoder *e, struct candidate added) {
    int at = e->n_heap++;
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
    const struct tokenizer *t = e->tokenizer;
    int size = e->symbols[left].size, right_size = e->symbols[left + size].size;
    if (right_size == 0)
        return;
    size_t both = (size_t)size + (size_t)right_size;
    int found = find_key(t, e->word + left, both, t->byte_level ? size : KEY_TOKEN);
    if (found >= 0) {
        float priority = t->byte_level ? -(float)found : t->tokens[found].score;
        heap_push(e, (struct candidate){priority, left, (int)both});
    }
}

static void merge_symbols(struct encoder *e) {
    while (e->n_heap > 0) {
        struct candidate best = heap_pop(e);
        struct symbol *left = &e->symbols[best.left];
        struct symbol *right = left + left->size;
        if (left->size + right->size != best.size)
            continue;
        right->size = 0;
        left->size = best.size;
        left[best.size].previous = best.left;
        if (left->previous >= 0)
            add_candidate(e, left->previous);
        add_candidate(e, best.left);
    }
}

static void encode_word(struct encoder *e, const char *word, size_t length) {
    const struct tokenizer *t = e->tokenizer;
    int previous = -1, whole = -1;
    if (t->byte_level && t->pattern->whole_words)
        whole = find_key(t, word, length, KEY_TOKEN);
    if (whole >= 0) {
        e->tokens[e->n_tokens++] = whole;
        return;
    }
    e->word = word;
    for (size_t at = 0, size; at < length; at += size) {
        uint32_t code;
        size = t->byte_level ? 1 : char_size(word + at, length - at, &code);
        e->symbols[at] = (struct symbol){(int)size, previous};
        previous = (int)at;
    }
    e->symbols[length] = (struct symbol){0, previous};
    for (size_t at = 0; at < length; at += (size_t)e->symbols[at].size)
        add_candidate(e, (int)at);
    merge_symbols(e);
    for (size_t at = 0, size; at < length; at += size) {
        size = (size_t)e->symbols[at].size;
        int token = find_key(t, word + at, size, KEY_TOKEN);
        if (token >= 0)
            e->tokens[e->n_tokens++] = token;
        for (size_t i = 0; token < 0 && i < size; i++)
            e->tokens[e->n_tokens++] = find_key(t, word + at + i, 1, KEY_BYTE);
    }
}

/* A text, or what user-defined tokens leave of it: as in llama.cpp, each part has the prefix. */
static void encode_fragment(struct encoder *e, const char *text, size_t length) {
    const struct tokenizer *t = e->tokenizer;
    if (!t->byte_level && length > 0) {
        /* U+2581 in a text is a space, as SentencePiece has it: models were trained that way */
        size_t n = unspell(t, text, length, e->text + t->adds_prefix);
        e->text[0] = t->adds_prefix ? ' ' : e->text[0];
        encode_word(e, e->text, n + t->adds_prefix);
        return;
    }
    for (size_t at = 0, size; at < length; at += size) {
        size = word_size(t->pattern, text + at, length - at);
        encode_word(e, text + at, size);
    }
}

/* The longest user-defined token at the start of a text; -1: none. */
static int user_token(const struct tokenizer *t, const char *text, size_t length) {
    size_t size = length < t->longest_user ? length : t->longest_user;
    for (; size > 0 && t->starts_user[(unsigned char)text[0]]; size--) {
        int token = find_key(t, text, size, KEY_TOKEN);
        if (token >= 0 && t->tokens[token].type == TOKEN_USER_DEFINED)
            return token;
    }
    return -1;
}

int *tok_encode(const struct tokenizer *t, const char *text, size_t length, int *n_tokens) {
    size_t begin = 0, n = length + 2; /* with a prefix and the end of a word */
    *n_tokens = 0;
    if (length > TOK_TEXT_LENGTH)
        return NULL;
    struct encoder e = {.tokenizer = t,
                        .symbols = malloc(n * sizeof *e.symbols),
                        .heap = malloc(n * 2 * sizeof *e.heap), /* a merge takes 1, adds 2 */
                        .text = malloc(n),
                        .tokens = malloc(n * 2 * sizeof *e.tokens)}; /* a prefix a fragment */
    bool ok = e.symbols && e.heap && e.text && e.tokens;
    for (size_t at = 0; ok && at < length;) {
        int token = user_token(t, text + at, length - at);
        size_t size = token >= 0 ? (size_t)t->tokens[token].length : 1;
        if (token >= 0) {
            encode_fragment(&e, text + begin, at - begin);
            e.tokens[e.n_tokens++] = token;
            begin = at + size;
        }
        at += size;
    }
    if (ok) {
        encode_fragment(&e, text + begin, length - begin);
        *n_tokens = e.n_tokens;
    } else {
        free(e.tokens);
    }
    free(e.symbols);
    free(e.heap);
    free(e.text);
    return ok ? e.tokens : NULL;
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
        size_t added = size > 0 ? (size_t)size : 3;
        memcpy(out + written, size > 0 ? stream->held : "\xEF\xBF\xBD", added);
        written += added;
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

/* ---- opening and asking ---- */

void tok_close(struct tokenizer *t) {
    for (int i = 0; t && i < t->n_tokens; i++)
        free(t->tokens[i].text);
    if (t) {
        free(t->tokens);
        free(t->slots);
    }
    free(t);
}

struct tokenizer *tok_open(struct gguf *file, char error[ERROR_LENGTH]) {
    struct tokenizer *t = calloc(1, sizeof *t);
    fail(error, "tokenizer.ggml: out of memory");
    if (t && read_family(t, file, error) && read_tokens(t, file, error) &&
        read_settings(t, file, error))
        return t;
    tok_close(t);
    return NULL;
}

struct tokenizer *tok_open_checkpoint(const char *path, int vocab_size, char error[ERROR_LENGTH]) {
    struct tokenizer *t = calloc(1, sizeof *t);
    struct stat status;
    if (stat(path, &status) == 0 &&
        !S_ISREG(status.st_mode)) { /* opening a pipe without a writer would hang */
        free(t);
        fail(error, "%s: is not a regular file", path);
        return NULL;
    }
    FILE *stream = fopen(path, "rb");
    fail(error, "%s: cannot be read: %s; is the tokenizer beside the model?", path,
         stream ? "out of memory" : strerror(errno));
    bool ok = t && stream && vocab_size > 0 && make_room(t, (size_t)vocab_size, 0) &&
              read_checkpoint(t, stream, vocab_size, path, error);
    if (stream)
        fclose(stream);
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
    int token = find_key(t, text, length, KEY_SPECIAL);
    return token >= 0 ? token : find_key(t, text, length, KEY_TOKEN);
}

#endif /* TOKENIZER_IMPLEMENTATION */
