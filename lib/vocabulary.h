/* vocabulary.h: what a tokenizer knows: tokens and merges, from a GGUF or a llama2.c tokenizer.bin.
 *
 * Owns struct tokenizer and how it is read and checked; a part of the implementation of
 * tokenizer.h, which says what it is for. Tokens are copied and become the bytes they stand for.
 * One hash table has them all, and the merges of `gpt2`: what a merge makes is a token's text, cut
 * in two. In `llama` any two neighbours that spell a token merge, so it needs no entries for them.
 * A file is believed in nothing, and what is wrong with it is one line in `error`. Once it is read,
 * every byte has a token, what a merge makes is a token, scores are finite, ids are in range.
 * Read next: tokenizer.h. */
#ifndef VOCABULARY_H
#define VOCABULARY_H

#include "words.h"
#include <assert.h>
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TOK_LIMIT = 1 << 24 }; /* tokens, merges: a rank up to here is exact in a float */

/* The numbers are GGUF's. */
enum { TOKEN_NORMAL = 1, TOKEN_UNKNOWN, TOKEN_CONTROL, TOKEN_USER_DEFINED };

/* What a key of the table is; a merge is the number of bytes of its left part. */
enum { KEY_SPECIAL = -2 /* control, unknown */, KEY_BYTE, KEY_TOKEN };

struct vocab_token {
    char *text; /* (length) owned */
    int length, type;
    float score;
    bool ends_text;
};

struct slot {
    const char *text; /* (length) a token's; NULL: the slot is empty */
    int length, kind;
    int value; /* token, or rank of a merge */
};

struct tokenizer {
    struct vocab_token *tokens; /* (n_tokens) */
    struct slot *slots;         /* (mask + 1) open addressing, at most half full */
    size_t mask;
    int n_tokens, bos, eos;
    bool byte_level;               /* `gpt2`; else `llama` */
    const struct pattern *pattern; /* of `gpt2` */
    bool adds_prefix, adds_bos;
    bool starts_user[256]; /* bytes that begin a user-defined token */
    size_t longest_user;   /* bytes of the longest one */
};

/* The slot of a key, or the empty slot where it belongs. */
static struct slot *find_slot(const struct tokenizer *t, const char *text, size_t length,
                              int kind) {
    uint32_t hash = 2166136261u + (uint32_t)kind; /* FNV-1a */
    for (size_t i = 0; i < length; i++)
        hash = (hash ^ (unsigned char)text[i]) * 16777619u;
    for (size_t i = hash & t->mask;; i = (i + 1) & t->mask) {
        struct slot *slot = &t->slots[i];
        if (!slot->text || ((size_t)slot->length == length && slot->kind == kind &&
                            memcmp(slot->text, text, length) == 0))
            return slot;
    }
}

/* -1: not there. */
static int find_key(const struct tokenizer *t, const char *text, size_t length, int kind) {
    const struct slot *slot = find_slot(t, text, length, kind);
    return slot->text ? slot->value : -1;
}

/* GPT-2 writes a byte that is not printable ASCII as a character of two: U+00A1 to U+00FF but
 * U+00AD are themselves, the rest comes from U+0100 on. -1: the text begins with something else. */
static int byte_of_char(const char *text, size_t length) {
    unsigned lead = (unsigned char)text[0];
    if (length < 2 || lead < 0xC2 || lead > 0xC5 || (text[1] & 0xC0) != 0x80)
        return -1;
    int code = (int)(lead & 31) << 6 | (text[1] & 63);
    if (code < 256)
        return code > 160 && code != 173 ? code : -1;
    return code <= 288 ? code - 256 : code <= 322 ? code - 162 : code == 323 ? 173 : -1;
}

static int byte_of_spelling(const char *text, size_t length) { /* `<0x41>` is 65 */
    static const char digits[] = "0123456789ABCDEF";
    if (length != 6 || memcmp(text, "<0x", 3) || text[5] != '>')
        return -1;
    const char *high = memchr(digits, text[3], 16), *low = memchr(digits, text[4], 16);
    return high && low ? (int)(high - digits) * 16 + (int)(low - digits) : -1;
}

/* The bytes that a spelling in the file stands for: never more than it has. */
static size_t unspell(const struct tokenizer *t, const char *text, size_t length, char *out) {
    size_t n = 0;
    for (size_t at = 0, size; at < length; at += size) {
        int byte = t->byte_level ? byte_of_char(text + at, length - at) : -1;
        bool space = !t->byte_level && length - at >= 3 && memcmp(text + at, "\u2581", 3) == 0;
        size = space ? 3 : byte >= 0 ? 2 : 1;
        out[n++] = space ? ' ' : byte >= 0 ? (char)byte : text[at];
    }
    return n;
}

/* Room for so many. False: out of memory, as is all that fails below without a message. */
static bool make_room(struct tokenizer *t, size_t n_tokens, size_t n_merges) {
    size_t n_slots = 2;
    while (n_slots < 2 * (n_tokens + n_merges))
        n_slots *= 2;
    t->mask = n_slots - 1;
    t->slots = calloc(n_slots, sizeof *t->slots);
    t->tokens = calloc(n_tokens + 1, sizeof *t->tokens);
    return t->slots && t->tokens;
}

static void add_key(struct tokenizer *t, const char *text, int length, int kind, int value) {
    struct slot *slot = find_slot(t, text, (size_t)length, kind);
    if (!slot->text) /* of several equal keys the first counts */
        *slot = (struct slot){text, length, kind, value};
}

static bool is_text(struct gguf_string string, const char *text) {
    return string.length == strlen(text) && memcmp(string.data, text, string.length) == 0;
}

/* The next token; `where` begins the message. */
static bool add_token(struct tokenizer *t, struct gguf_string spelling, int type, float score,
                      const char *where, char *error) {
    static const char *const ends[] = {"<|endoftext|>", "<|eot_id|>", "<|eom_id|>",
                                       "<|im_end|>",    "<|end|>",    "<end_of_turn>"};
    if (spelling.length > TOK_TOKEN_LENGTH || !isfinite(score))
        return fail(error,
                    "%s: token %d: got %zu bytes and score %g, expected at most %d "
                    "and a finite score",
                    where, t->n_tokens, spelling.length, (double)score, TOK_TOKEN_LENGTH);
    char *text = malloc(spelling.length + 1);
    if (!text)
        return false;
    struct vocab_token token = {text, (int)spelling.length, type, score, false};
    memcpy(text, spelling.data, spelling.length);
    int kind = KEY_TOKEN, byte = t->byte_level ? -1 : byte_of_spelling(text, spelling.length);
    if (byte >= 0) {
        text[0] = (char)byte;
        token.length = 1;
        token.type = TOKEN_NORMAL; /* whatever the file says: it is text */
        kind = KEY_BYTE;
    } else if (type == TOKEN_CONTROL || type == TOKEN_UNKNOWN) {
        kind = KEY_SPECIAL;
        for (size_t i = 0; i < sizeof ends / sizeof *ends; i++)
            token.ends_text |= is_text(spelling, ends[i]);
    } else if (type == TOKEN_USER_DEFINED && spelling.length > 0) {
        t->starts_user[(unsigned char)text[0]] = true;
        t->longest_user = spelling.length > t->longest_user ? spelling.length : t->longest_user;
    } else {
        token.length = (int)unspell(t, spelling.data, spelling.length, text);
    }
    add_key(t, text, token.length, kind, t->n_tokens);
    t->tokens[t->n_tokens++] = token;
    return true;
}

static bool spells_all_bytes(const struct tokenizer *t, const char *where, char *error) {
    for (int i = 0; i < 256; i++) {
        char byte = (char)i;
        if (find_key(t, &byte, 1, t->byte_level ? KEY_TOKEN : KEY_BYTE) < 0)
            return fail(error, "%s: no token for byte 0x%02X", where, (unsigned)i);
    }
    return true;
}

/* `gpt2`: merges are listed, best first, as `left right`. */
static bool add_merges(struct tokenizer *t, struct gguf_array lines, char *error) {
    for (size_t i = 0; i < lines.count; i++) {
        char text[TOK_TOKEN_LENGTH];
        struct gguf_string line = lines.strings[i];
        size_t left = 0, both = 0;
        const char *space = line.length > 0 ? memchr(line.data + 1, ' ', line.length - 1) : NULL;
        if (space && line.length <= sizeof text) {
            size_t cut = (size_t)(space - line.data);
            left = unspell(t, line.data, cut, text);
            both = left + unspell(t, space + 1, line.length - cut - 1, text + left);
        }
        int token = both > left ? find_key(t, text, both, KEY_TOKEN) : -1;
        if (token < 0)
            return fail(error, "tokenizer.ggml.merges: %zu does not make a token of two", i);
        add_key(t, t->tokens[token].text, (int)both, (int)left, (int)i);
    }
    return true;
}

/* An array of `count` elements; 0: of any number. */
static bool read_array(struct gguf *file, const char *key, enum gguf_value_type type, size_t count,
                       bool required, struct gguf_array *array, char *error) {
    if (!gguf_get_array(file, key, array))
        return !required || fail(error, "%s: is missing, expected an array", key);
    size_t most = count ? count : TOK_LIMIT;
    return (array->type == type && array->count >= count && array->count <= most) ||
           fail(error, "%s: got %zu elements of type %d, expected %zu%s of type %d", key,
                array->count, (int)array->type, most, count ? "" : " at most", (int)type);
}

static bool read_family(struct tokenizer *t, struct gguf *file, char *error) {
    struct gguf_string model = {"", 0}, pre = {"", 0};
    gguf_get_string(file, "tokenizer.ggml.model", &model);
    gguf_get_string(file, "tokenizer.ggml.pre", &pre);
    t->byte_level = is_text(model, "gpt2");
    t->pattern = t->byte_level ? pattern_find(pre.data, pre.length) : NULL;
    if (t->byte_level ? t->pattern != NULL : is_text(model, "llama"))
        return true;
    struct gguf_string got = t->byte_level ? pre : model;
    return fail(error, "tokenizer.ggml.%s: got `%.*s`, expected %s",
                t->byte_level ? "pre" : "model", (int)(got.length < 64 ? got.length : 64), got.data,
                t->byte_level ? "`gpt-2`, `llama-bpe`, `qwen2` or `gpt-4o`" : "`llama` or `gpt2`");
}

static bool read_tokens(struct tokenizer *t, struct gguf *file, char *error) {
    static const char key[] = "tokenizer.ggml.tokens";
    struct gguf_array tokens = {0}, types = {0}, scores = {0}, merges = {0};
    bool listed = t->byte_level;
    if (!read_array(file, key, GGUF_STRING, 0, true, &tokens, error))
        return false;
    size_t n = tokens.count;
    if (!read_array(file, "tokenizer.ggml.token_type", GGUF_I32, n, false, &types, error) ||
        !read_array(file, "tokenizer.ggml.scores", GGUF_F32, n, !listed, &scores, error) ||
        !read_array(file, "tokenizer.ggml.merges", GGUF_STRING, 0, listed, &merges, error) ||
        !make_room(t, n, merges.count))
        return false;
    for (size_t i = 0; i < n; i++) {
        int32_t type = TOKEN_NORMAL;
        float score = 0;
        if (types.values)
            memcpy(&type, (const char *)types.values + i * sizeof type, sizeof type);
        if (scores.values)
            memcpy(&score, (const char *)scores.values + i * sizeof score, sizeof score);
        if (!add_token(t, tokens.strings[i], type, score, key, error))
            return false;
    }
    return spells_all_bytes(t, key, error) && (!listed || add_merges(t, merges, error));
}

static bool read_settings(struct tokenizer *t, struct gguf *file, char *error) {
    static const char *const keys[] = {"tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id",
                                       "tokenizer.ggml.eot_token_id",
                                       "tokenizer.ggml.eom_token_id"};
    int ids[4];
    for (int i = 0; i < 4; i++) {
        int64_t id = -1;
        if (gguf_get_int(file, keys[i], &id) && (id < 0 || id >= t->n_tokens))
            return fail(error, "%s: got %lld, expected 0 to %d", keys[i], (long long)id,
                        t->n_tokens - 1);
        ids[i] = (int)id;
        if (i > 0 && id >= 0)
            t->tokens[id].ends_text = true;
    }
    t->bos = ids[0];
    t->eos = ids[1];
    t->adds_prefix = !t->byte_level;
    t->adds_bos = !t->byte_level || t->pattern->adds_bos;
    gguf_get_bool(file, "tokenizer.ggml.add_space_prefix", &t->adds_prefix);
    gguf_get_bool(file, "tokenizer.ggml.add_bos_token", &t->adds_bos);
    t->adds_prefix = t->adds_prefix && !t->byte_level;
    return gguf_error(file)[0] == 0 || fail(error, "%s", gguf_error(file));
}

/* tokenizer.bin: a uint32, then for each token a float32 score, an int32 length and its text. */
static bool read_checkpoint(struct tokenizer *t, FILE *stream, int n, const char *path,
                            char *error) {
    struct {
        float score;
        int32_t length;
    } head = {0, 0};
    static_assert(sizeof head == 8, "as in the file");
    char text[TOK_TOKEN_LENGTH];
    bool ok = fread(text, sizeof(uint32_t), 1, stream) == 1;
    while (ok && t->n_tokens < n) {
        ok = fread(&head, sizeof head, 1, stream) == 1 && head.length >= 0 &&
             head.length <= TOK_TOKEN_LENGTH &&
             fread(text, 1, (size_t)head.length, stream) == (size_t)head.length;
        int id = t->n_tokens;
        int type = id == 0 ? TOKEN_UNKNOWN : id < 3 ? TOKEN_CONTROL : TOKEN_NORMAL;
        struct gguf_string spelling = {text, (size_t)head.length};
        if (ok && !add_token(t, spelling, type, head.score, path, error))
            return false;
    }
    if (!ok || fgetc(stream) != EOF)
        return fail(error,
                    "%s: wrong from token %d on, expected %d and the end; is it this model's?",
                    path, t->n_tokens, n);
    return spells_all_bytes(t, path, error);
}

#endif /* VOCABULARY_H */
