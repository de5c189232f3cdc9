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
 * Merging is one loop: the symbols of a word, and a heap of the pairs that could merge, so n bytes
 * take O(n log n) whatever they are. User-defined tokens are cut out of a text before all this.
 *
 * What it refuses: to find control tokens in a text (`<s>` is three characters; a chat template
 * asks tok_find), vocabularies that cannot spell every byte, patterns it does not know. It adds no
 * beginning-of-text token: that is the caller's decision.
 *
 * Invariants: nothing changes after opening, so threads may share a tokenizer; every byte has a
 * token, so no text is lost (U+2581 in a text of `llama` comes back as the space it means there);
 * what is decoded is valid UTF-8.
 * Define TOKENIZER_IMPLEMENTATION in one file, before including this (gguf.h's is needed, too).
 * Read next: template.h. */
#ifndef TOKENIZER_H
#define TOKENIZER_H

#include "gguf.h"
#include "text.h"

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

int tok_bos(const struct tokenizer *tokenizer); /* -1: none */
int tok_eos(const struct tokenizer *tokenizer); /* -1: none */
bool tok_adds_bos(const struct tokenizer *tokenizer);
/* End of text, of turn or of message: where generation stops. */
bool tok_ends_text(const struct tokenizer *tokenizer, int token);
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

#include "unicode.h"
#include <assert.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>

/* ---- words ----
 *
 * How byte-level BPE cuts a text before pairs merge inside each word. A vocabulary names its
 * pattern (tokenizer.ggml.pre), which its makers published as a regular expression. Here each is a
 * row of a table, and the alternatives are tried in the order in which the expressions have them.
 * Where they backtrack, the outcome is said outright; none takes more than one look at a character.
 * Marks are \p{M}, and \s is the property White_Space. Two details follow the engines that read
 * GGUF: text is not normalised (qwen2's own tokenizer makes it NFC), and endings like 's ignore the
 * case of ASCII letters alone. */

/* Sets of classes. */
enum {
    IN_UPPER = 1 << UNICODE_UPPER,
    IN_LOWER = 1 << UNICODE_LOWER,
    IN_CASELESS = 1 << UNICODE_LETTER,
    IN_MARK = 1 << UNICODE_MARK,
    IN_NUMBER = 1 << UNICODE_NUMBER,
    IN_SPACE = 1 << UNICODE_SPACE,
    IN_LETTER = IN_UPPER | IN_LOWER | IN_CASELESS,
    IN_OTHER = 1 << UNICODE_OTHER | IN_MARK /* [^\s\p{L}\p{N}] */
};

enum {
    PATTERN_MODERN = 1, /* the form that all but gpt-2 have */
    PATTERN_CASED = 2,  /* a word is capitals, then small letters, and has its ending with it */
    PATTERN_WHOLE_WORDS = 4, /* a word that is a token is taken whole, whatever merges say */
    PATTERN_ADDS_BOS = 8     /* unless the file says otherwise */
};

struct pattern {
    const char *name;
    int digits;         /* of a number at most */
    const char *behind; /* what may follow signs, as part of them */
    unsigned traits;
};

/* gpt-2:     '(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
 * llama-bpe: (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|
 *            ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
 * qwen2:     the same with \p{N}
 * gpt-4o:    [^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+ENDING?|
 *            [^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*ENDING?|
 *            \p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+ */
static const struct pattern patterns[] = {
    {.name = "gpt-2"},
    {"llama-bpe", 3, "\r\n", PATTERN_MODERN | PATTERN_WHOLE_WORDS | PATTERN_ADDS_BOS},
    {"llama3", 3, "\r\n", PATTERN_MODERN | PATTERN_WHOLE_WORDS | PATTERN_ADDS_BOS},
    {"llama-v3", 3, "\r\n", PATTERN_MODERN | PATTERN_WHOLE_WORDS | PATTERN_ADDS_BOS},
    {"qwen2", 1, "\r\n", PATTERN_MODERN},
    {"deepseek-r1-qwen", 1, "\r\n", PATTERN_MODERN},
    {"gpt-4o", 3, "\r\n/", PATTERN_MODERN | PATTERN_CASED},
    {"llama4", 3, "\r\n/", PATTERN_MODERN | PATTERN_CASED},
};

static const struct pattern *pattern_find(struct gguf_string name) {
    for (size_t i = 0; i < sizeof patterns / sizeof *patterns; i++)
        if (gguf_equals(name, patterns[i].name))
            return &patterns[i];
    return NULL;
}

/* Where the run of characters in `set` that begins at `at` ends. */
static size_t run_end(const char *text, size_t length, size_t at, unsigned set) {
    uint32_t code;
    for (size_t size; at < length; at += size) {
        size = utf8_char(text + at, length - at, &code);
        if (!(set >> unicode_class_of(code) & 1))
            break;
    }
    return at;
}

/* Bytes of 's, 't, 're, 've, 'm, 'll or 'd; 0: none. */
static size_t ending_size(const char *text, size_t length, bool any_case) {
    static const char *const endings[] = {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"};
    if (length == 0 || text[0] != '\'')
        return 0;
    for (size_t i = 0; i < sizeof endings / sizeof *endings; i++) {
        size_t size = strlen(endings[i]);
        if (size <= length && (any_case ? strncasecmp : strncmp)(text, endings[i], size) == 0)
            return size;
    }
    return 0;
}

/* White space: up to its last line's end; else all but the last, which belongs to the word behind
 * it; or what there is. */
static size_t space_size(const char *text, size_t length, bool lines) {
    size_t end = run_end(text, length, 0, IN_SPACE), last = 0, line = 0;
    uint32_t code;
    for (size_t at = 0; at < end; at += utf8_char(text + at, length - at, &code)) {
        last = at;
        line = text[at] == '\n' || text[at] == '\r' ? at + 1 : line;
    }
    return lines && line > 0 ? line : end < length && last > 0 ? last : end;
}

/* gpt-4o: capitals, then at least one small letter (letters without case and marks are both); or
 * capitals alone. 0: neither begins at `at`. */
static size_t cased_end(const char *text, size_t length, size_t at, bool small) {
    size_t end = run_end(text, length, at, IN_UPPER | IN_CASELESS | IN_MARK), both = 0;
    uint32_t code;
    if (!small)
        return end > at ? end : 0;
    size_t small_end = run_end(text, length, end, IN_LOWER | IN_CASELESS | IN_MARK);
    if (small_end > end)
        return small_end;
    for (size_t i = at, size; i < end; i += size) { /* the last of the capitals that is small too */
        size = utf8_char(text + i, length - i, &code);
        both = unicode_class_of(code) == UNICODE_UPPER ? both : i + size;
    }
    return both;
}

/* The end of a word at the start of a text, which one sign or space may precede; 0: none. */
static size_t letters_end(const struct pattern *pattern, const char *text, size_t length) {
    uint32_t code;
    size_t first = utf8_char(text, length, &code);
    unsigned kind = 1u << unicode_class_of(code);
    bool leads = !(kind & (IN_LETTER | IN_NUMBER)) && text[0] != '\r' && text[0] != '\n';
    if (!(pattern->traits & PATTERN_CASED)) {
        size_t begin = leads ? first : 0, end = run_end(text, length, begin, IN_LETTER);
        return end > begin ? end : 0;
    }
    size_t end = 0;
    for (int small = 1; small >= 0 && end == 0; small--) {
        end = leads ? cased_end(text, length, first, small) : 0;
        end = end ? end : cased_end(text, length, 0, small);
    }
    return end ? end + ending_size(text + end, length - end, true) : 0;
}

static size_t gpt2_size(const char *text, size_t length) {
    static const unsigned sets[] = {IN_LETTER, IN_NUMBER, IN_OTHER};
    size_t ending = ending_size(text, length, false), begin = text[0] == ' ';
    for (size_t i = 0; i < sizeof sets / sizeof *sets && !ending; i++) {
        size_t end = run_end(text, length, begin, sets[i]);
        ending = end > begin ? end : 0;
    }
    return ending ? ending : space_size(text, length, false);
}

/* Bytes of the first word of a text that is not empty. */
static size_t word_size(const struct pattern *pattern, const char *text, size_t length) {
    if (!(pattern->traits & PATTERN_MODERN))
        return gpt2_size(text, length);
    size_t size = pattern->traits & PATTERN_CASED ? 0 : ending_size(text, length, true);
    if (size == 0)
        size = letters_end(pattern, text, length);
    if (size > 0)
        return size;
    uint32_t code;
    for (int i = 0; i < pattern->digits && size < length; i++) {
        size_t digit = utf8_char(text + size, length - size, &code);
        if (unicode_class_of(code) != UNICODE_NUMBER)
            break;
        size += digit;
    }
    if (size > 0)
        return size;
    size_t begin = text[0] == ' ', end = run_end(text, length, begin, IN_OTHER);
    if (end == begin)
        return space_size(text, length, true);
    while (end < length && text[end] && strchr(pattern->behind, text[end]))
        end++;
    return end;
}

/* ---- the vocabulary ----
 *
 * Tokens are copied and become the bytes they stand for. One hash table has them all, and the
 * merges of `gpt2`: what a merge makes is a token's text, cut in two. In `llama` any two neighbours
 * that spell a token merge, so it needs no entries for them. Once a file is read, every byte has a
 * token, what a merge makes is a token, scores are finite, ids are in range. */

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
            token.ends_text |= gguf_equals(spelling, ends[i]);
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
    t->byte_level = gguf_equals(model, "gpt2");
    t->pattern = t->byte_level ? pattern_find(pre) : NULL;
    if (t->byte_level ? t->pattern != NULL : gguf_equals(model, "llama"))
        return true;
    struct gguf_string got = t->byte_level ? pre : model;
    return fail(error, "tokenizer.ggml.%s: got `%.*s`, expected %s",
                t->byte_level ? "pre" : "model", gguf_shown(got), got.data,
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
    t->adds_bos = !t->byte_level || t->pattern->traits & PATTERN_ADDS_BOS;
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
    if (t->byte_level && t->pattern->traits & PATTERN_WHOLE_WORDS)
        whole = find_key(t, word, length, KEY_TOKEN);
    if (whole >= 0) {
        e->tokens[e->n_tokens++] = whole;
        return;
    }
    e->word = word;
    for (size_t at = 0, size; at < length; at += size) {
        uint32_t code;
        size = t->byte_level ? 1 : utf8_char(word + at, length - at, &code);
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
        if (token < 0) {
            at++;
            continue;
        }
        encode_fragment(&e, text + begin, at - begin);
        e.tokens[e.n_tokens++] = token;
        at += (size_t)t->tokens[token].length;
        begin = at;
    }
    if (ok)
        encode_fragment(&e, text + begin, length - begin);
    else
        free(e.tokens);
    *n_tokens = e.n_tokens;
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
    if (!t)
        return;
    for (int i = 0; i < t->n_tokens; i++)
        free(t->tokens[i].text);
    free(t->tokens);
    free(t->slots);
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
    struct stat status;
    if (stat(path, &status) == 0 && !S_ISREG(status.st_mode)) {
        fail(error, "%s: is not a regular file", path); /* a pipe without a writer would hang */
        return NULL;
    }
    FILE *stream = fopen(path, "rb");
    if (!stream) {
        fail(error, "%s: cannot be read: %s; is the tokenizer beside the model?", path,
             strerror(errno));
        return NULL;
    }
    fail(error, "%s: out of memory", path);
    struct tokenizer *t = calloc(1, sizeof *t);
    bool ok = t && vocab_size > 0 && make_room(t, (size_t)vocab_size, 0) &&
              read_checkpoint(t, stream, vocab_size, path, error);
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

int tok_find(const struct tokenizer *t, const char *text, size_t length) {
    int token = find_key(t, text, length, KEY_SPECIAL);
    return token >= 0 ? token : find_key(t, text, length, KEY_TOKEN);
}

#endif /* TOKENIZER_IMPLEMENTATION */
