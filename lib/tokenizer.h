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
 * asks tok_find), patterns it does not know. It adds no beginning-of-text token: that is the
 * caller's decision.
 *
 * Invariants: nothing changes after opening, so threads may share a tokenizer; no text is lost but
 * for bytes that the vocabulary cannot spell, tok_lost_bytes of the 256 (and U+2581 in a text of
 * `llama` comes back as the space it means there); what is decoded is valid UTF-8.
 * Define TOKENIZER_IMPLEMENTATION in one file, before including this (gguf.h's is needed, too).
 * Read next: template.h. */
#ifndef TOKENIZER_H
#define TOKENIZER_H

#include "gguf.h"
#include "text.h"

enum {
    TOK_TOKEN_LENGTH = 2048,   /* bytes that a token stands for at most; 512 are known */
    TOK_TEXT_LENGTH = 1 << 26, /* bytes of a text at most: encoding takes 41 times as many */
    TOK_TEXT_SIZE = 3 * (TOK_TOKEN_LENGTH + 4) /* a stray byte becomes the 3 bytes of U+FFFD */
};

struct tokenizer; /* owns all it needs: the gguf may be closed */

/* NULL: `error` is one line that begins with the key that is wrong (the caller knows the path), or,
 * for a tokenizer.bin, with its path. */
struct tokenizer *tok_open(struct gguf *file, char error[ERROR_LENGTH]);
struct tokenizer *tok_open_checkpoint(const char *path, int vocab_size, char error[ERROR_LENGTH]);
void tok_close(struct tokenizer *tokenizer);
/* Marks what ends a text, a turn or a message, in ends (n_tokens): where generation stops. A file
 * tells whether its tokenizer can be opened or not; NULL: llama2.c's. */
void tok_mark_ends(struct gguf *file, bool *ends, int n_tokens);

int tok_bos(const struct tokenizer *tokenizer); /* -1: none */
int tok_eos(const struct tokenizer *tokenizer); /* -1: none */
bool tok_adds_bos(const struct tokenizer *tokenizer);
/* How many of the 256 bytes no token stands for: they are left out of texts. */
int tok_lost_bytes(const struct tokenizer *tokenizer);
/* Its file names no pattern, so that `default` was taken: maybe texts were cut otherwise when the
 * model was trained. */
bool tok_guessed(const struct tokenizer *tokenizer);
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
 * pattern (tokenizer.ggml.pre); its makers published it as one regular expression or several, of
 * which each cuts what the ones before left: what it matches and what lies between are pieces.
 * Here an expression is written with one letter for each set of characters (char_sets), and
 *     ? * + |  as in regular expressions     3      one to three of the set
 *     !        \s or the end: (?!\S)         $      the end
 *     e E      's 't 're 've 'm 'll 'd, in small letters or in any
 * with spaces between expressions. So `L+` is \p{L}+, and llama-bpe's
 *     (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|
 *     \s*[\r\n]+|\s+(?!\S)|\s+
 * is "E|x?L+|N3|_?O+n*|S*n+|S+!|S+". The outcome is that of a backtracking engine; in the
 * expressions below a character is looked at a few times at most, so a text takes linear time.
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
    IN_PUNCTUATION = 1 << UNICODE_PUNCTUATION,
    IN_SIGN = IN_PUNCTUATION | 1 << UNICODE_SYMBOL,
    IN_LETTER = IN_UPPER | IN_LOWER | IN_CASELESS,
    IN_ANY = IN_LETTER | IN_MARK | IN_NUMBER | IN_SPACE | IN_SIGN | 1 << UNICODE_OTHER
};

/* First and last code points; a zero ends them. */
static const uint32_t ascii_letters[] = {'A', 'Z', 'a', 'z', 0}, ascii_digits[] = {'0', '9', 0};
static const uint32_t ascii_signs[] = {'!', '/', ':', '@', '[', '`', '{', '~', 0};
static const uint32_t deepseek3_cjk[] = {0x3040, 0x30FF, 0x4E00, 0x9FA5, 0};
static const uint32_t deepseek_cjk[] = {0x0800, 0x9FA5, 0xAC00, 0xD7FF, 0};
static const uint32_t deepseek_signs[] = {'!',    '/',    ':',    '~',    0x2018, 0x201F, 0x3000,
                                          0x3002, 0xFF01, 0xFF0F, 0xFF1A, 0xFF5E, 0};

/* What is of one of the classes and not one of `but`, or one of `chars`, or in `ranges`. */
static const struct char_set {
    unsigned classes;
    const char *chars, *but;
    const uint32_t *ranges;
} char_sets[128] = {
    ['_'] = {.chars = " "},
    ['n'] = {.chars = "\r\n"},
    ['/'] = {.chars = "\r\n/"},
    ['S'] = {IN_SPACE},
    ['N'] = {IN_NUMBER},
    ['L'] = {IN_LETTER},
    ['M'] = {IN_LETTER | IN_MARK},
    ['C'] = {IN_UPPER | IN_CASELESS | IN_MARK}, /* capitals, or small ones, */
    ['c'] = {IN_LOWER | IN_CASELESS | IN_MARK}, /* and what can be either */
    ['O'] = {IN_ANY & ~(IN_SPACE | IN_LETTER | IN_NUMBER)},
    ['o'] = {IN_ANY & ~(IN_SPACE | IN_LETTER | IN_NUMBER | IN_MARK)},
    ['x'] = {IN_ANY & ~(IN_LETTER | IN_NUMBER), .but = "\r\n"},
    ['y'] = {IN_ANY & ~(IN_LETTER | IN_SIGN), .but = "\r\n"},
    ['P'] = {IN_PUNCTUATION},
    ['f'] = {IN_PUNCTUATION, .chars = "$+<=>^~|"},
    ['F'] = {IN_PUNCTUATION, .chars = "$+<=>^~|`"},
    ['s'] = {IN_SIGN},
    ['a'] = {.ranges = ascii_letters},
    ['d'] = {.ranges = ascii_digits},
    ['g'] = {.ranges = ascii_signs},
    ['j'] = {.ranges = deepseek3_cjk},
    ['J'] = {.ranges = deepseek_cjk},
    ['D'] = {.ranges = unicode_deepseek_letters},
    ['G'] = {.ranges = deepseek_signs},
};

enum {
    PATTERN_WHOLE_WORDS = 1, /* a word that is a token is taken whole, whatever merges say */
    PATTERN_ADDS_BOS = 2     /* unless the file says otherwise */
};

struct pattern {
    const char *names;       /* in tokenizer.ggml.pre */
    const char *expressions; /* as above */
    unsigned traits;
};

#define GPT2 "e|_?L+|_?N+|_?O+|S+!|S+"
static const struct pattern patterns[] = {
    {"gpt-2 mpt phi-2 olmo a.x-4.0 mellum", GPT2, 0},
    {"llama-bpe llama3 llama-v3 falcon3 pixtral lfm2 midm-2.0", "E|x?L+|N3|_?O+n*|S*n+|S+!|S+",
     PATTERN_WHOLE_WORDS | PATTERN_ADDS_BOS},
    {"qwen2 deepseek-r1-qwen stablelm2 kormo megrez f2llmv2", "E|x?L+|N|_?O+n*|S*n+|S+!|S+", 0},
    {"qwen35", "E|x?M+|N|_?o+n*|S*n+|S+!|S+", 0},
    {"gpt-4o llama4", "x?C*c+E?|x?C+c*E?|N3|_?O+/*|S*n+|S+!|S+", 0},
    {"tekken", "x?C*c+|x?C+c*|N|_?O+/*|S*n+|S+!|S+", PATTERN_WHOLE_WORDS | PATTERN_ADDS_BOS},
    {"smollm starcoder refact command-r", "N " GPT2, 0},
    {"falcon", "F+ " GPT2 " ddd", 0},
    {"default", "f+ " GPT2 " N+ ddd", 0},
    {"deepseek-llm", "n S?D+ S?G+ S+$ J+ N", 0},
    {"deepseek-coder", "n S?L+ S?P+ J+ N", 0},
    {"deepseek-v3", "N3 j+ ga+|y?M+|_?s+n*|S*n+|S+!|S+", 0},
};

/* Whether a word is one of those in `list`, which spaces divide. */
static bool is_listed(const char *list, struct gguf_string word) {
    for (size_t size; *list; list += size + strspn(list + size, " ")) {
        size = strcspn(list, " ");
        if (size == word.length && memcmp(list, word.data, size) == 0)
            return true;
    }
    return false;
}

static const struct pattern *pattern_find(struct gguf_string name) {
    for (size_t i = 0; i < sizeof patterns / sizeof *patterns; i++)
        if (is_listed(patterns[i].names, name))
            return &patterns[i];
    return NULL;
}

/* Bytes of the character at `at` if it is in the set; 0: it is not, or the text ends. */
static size_t in_set(char letter, const char *text, size_t length, size_t at) {
    const struct char_set *set = &char_sets[(unsigned char)letter];
    uint32_t code;
    if (at == length)
        return 0;
    size_t size = utf8_char(text + at, length - at, &code);
    bool ascii = code > 0 && code < 128;
    bool in = set->classes && set->classes >> unicode_class_of(code) & 1;
    in = in && !(set->but && ascii && strchr(set->but, (int)code));
    in = in || (set->chars && ascii && strchr(set->chars, (int)code));
    for (const uint32_t *range = set->ranges; range && *range && !in; range += 2)
        in = code >= range[0] && code <= range[1];
    return in ? size : 0;
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

/* Bytes of the character that ends at `end`. */
static size_t size_before(const char *text, size_t end) {
    uint32_t code;
    for (size_t size = 4; size > 1; size--)
        if (size <= end && utf8_read(text + end - size, size, &code) == (int)size)
            return size;
    return 1;
}

enum { NO_MATCH = 0 };

/* Where what one alternative matches from `at` on ends. */
static size_t match_end(const char *rule, const char *text, size_t length, size_t at) {
    char letter = *rule;
    if (letter == 0 || letter == '|' || letter == ' ')
        return at;
    char many = *++rule;
    if (letter == '!' || letter == '$') {
        bool fits = at == length || (letter == '!' && in_set('S', text, length, at));
        return fits ? match_end(rule, text, length, at) : NO_MATCH;
    }
    rule += many && strchr("?*+3", many) ? 1 : 0;
    if (letter == 'e' || letter == 'E') {
        size_t size = ending_size(text + at, length - at, letter == 'E');
        return size || many == '?' ? match_end(rule, text, length, at + size) : NO_MATCH;
    }
    size_t least = many != '?' && many != '*', n = 0, end = at, size;
    size_t most = many == '*' || many == '+' ? SIZE_MAX : many == '3' ? 3 : 1;
    while (n < most && (size = in_set(letter, text, length, end)) > 0) {
        end += size;
        n++;
    }
    for (; n >= least; n--) { /* as many as possible, then fewer */
        size_t found = match_end(rule, text, length, end);
        if (found != NO_MATCH || n == 0)
            return found;
        end -= size_before(text, end);
    }
    return NO_MATCH;
}

/* The same of the first alternative of an expression that matches. */
static size_t expression_end(const char *rule, const char *text, size_t length, size_t at) {
    size_t end = NO_MATCH;
    for (; end == NO_MATCH && *rule && *rule != ' '; rule += *rule == '|') {
        end = match_end(rule, text, length, at);
        rule += strcspn(rule, "| ");
    }
    return end;
}

/* Hands each word of a text to `take`. */
static void split_words(const char *expressions, const char *text, size_t length,
                        void (*take)(void *context, const char *word, size_t length),
                        void *context) {
    if (length == 0)
        return;
    if (!*expressions) {
        take(context, text, length);
        return;
    }
    const char *next = expressions + strcspn(expressions, " ");
    next += *next == ' ';
    size_t begin = 0; /* of what no match has taken */
    for (size_t at = 0; at < length;) {
        size_t end = expression_end(expressions, text, length, at);
        if (end == NO_MATCH) {
            uint32_t code;
            bool run = expressions[1] == '+' && in_set(*expressions, text, length, at);
            do /* S+$ does not match inside a run either that it does not match the whole of */
                at += utf8_char(text + at, length - at, &code);
            while (run && in_set(*expressions, text, length, at));
            continue;
        }
        split_words(next, text + begin, at - begin, take, context);
        split_words(next, text + at, end - at, take, context);
        begin = at = end;
    }
    split_words(next, text + begin, length - begin, take, context);
}

/* ---- the vocabulary ----
 *
 * Tokens are copied and become the bytes they stand for. One hash table has them all, and the
 * merges of `gpt2`: what a merge makes is a token's text, cut in two. In `llama` any two neighbours
 * that spell a token merge, so it needs no entries for them. Once a file is read, what a merge
 * makes is a token, scores are finite, ids are in range. */

enum { TOK_LIMIT = 1 << 24 }; /* tokens, merges: a rank up to here is exact in a float */

/* The numbers are GGUF's. */
enum { TOKEN_NORMAL = 1, TOKEN_UNKNOWN, TOKEN_CONTROL, TOKEN_USER_DEFINED };

/* What a key of the table is; a merge is the number of bytes of its left part. */
enum {
    KEY_TEXT = -3, /* of `gpt2`: spelled as text, not as bytes; of both: user-defined */
    KEY_SPECIAL,   /* control, unknown */
    KEY_BYTE,      /* of `llama` */
    KEY_TOKEN
};

struct vocab_token {
    char *text; /* (length) owned */
    int length, type;
    float score;
};

struct slot {
    const char *text; /* (length) a token's; NULL: the slot is empty */
    int length, kind;
    int value; /* token, or rank of a merge */
};

/* Tokens that a file names by id: all but the first end a text. */
enum { ID_BOS, ID_EOS, ID_EOT, ID_EOM, N_IDS };
static const char *const id_keys[] = {"tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id",
                                      "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"};

struct tokenizer {
    struct vocab_token *tokens; /* (n_tokens) */
    struct slot *slots;         /* (mask + 1) open addressing, at most half full */
    size_t mask;
    int n_tokens, n_lost;          /* the last: bytes without a token */
    int64_t ids[N_IDS];            /* -1: none */
    bool byte_level;               /* `gpt2`; else `llama` */
    const struct pattern *pattern; /* of `gpt2` */
    bool adds_prefix, adds_bos, guessed;
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
    while (n_slots < 2 * (2 * n_tokens + n_merges)) /* a user-defined token has two keys */
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

/* Of `gpt2`: whether it has nothing but the stand-ins of bytes. */
static bool spelled_as_bytes(struct gguf_string word) {
    size_t at = 0;
    for (bool ok = true; ok && at < word.length;) {
        bool two = byte_of_char(word.data + at, word.length - at) >= 0;
        ok = two || (word.data[at] > ' ' && word.data[at] <= '~');
        at += ok ? 1 + two : 0;
    }
    return at == word.length;
}

/* Words that a template writes and nobody types: <|start|>, <｜User｜>. */
static bool looks_special(struct gguf_string word) {
    static const char wide[] = "\uFF5C";
    size_t n = word.length;
    return is_listed("<start_of_turn> <end_of_turn>", word) ||
           (n > 4 && memcmp(word.data, "<|", 2) == 0 && memcmp(word.data + n - 2, "|>", 2) == 0) ||
           (n > 8 && word.data[0] == '<' && memcmp(word.data + 1, wide, 3) == 0 &&
            memcmp(word.data + n - 4, wide, 3) == 0 && word.data[n - 1] == '>');
}

/* The next token; `where` begins the message. */
static bool add_token(struct tokenizer *t, struct gguf_string spelling, int type, float score,
                      const char *where, char *error) {
    char *text = malloc(spelling.length + 1);
    if (!text)
        return false;
    size_t n = unspell(t, spelling.data, spelling.length, text);
    int kind = KEY_TOKEN, id = t->n_tokens;
    int byte = t->byte_level ? -1 : byte_of_spelling(spelling.data, spelling.length);
    bool stands_in = byte >= 0 || (t->byte_level && spelling.length == 2 && n == 1);
    bool named = id == t->ids[0] || id == t->ids[1] || id == t->ids[2] || id == t->ids[3];
    if (stands_in) {
        type = TOKEN_NORMAL; /* whatever the file says: it is text */
        text[0] = byte >= 0 ? (char)byte : text[0];
        n = 1;
        kind = byte >= 0 ? KEY_BYTE : KEY_TOKEN;
    } else if (type == TOKEN_CONTROL || type == TOKEN_UNKNOWN || looks_special(spelling) ||
               (named && spelling.length > 2 && spelling.data[0] == '<')) {
        type = type == TOKEN_UNKNOWN ? type : TOKEN_CONTROL;
        kind = KEY_SPECIAL;
    }
    bool no_bytes = t->byte_level && !spelled_as_bytes(spelling);
    if (kind == KEY_SPECIAL || no_bytes || (t->byte_level && type == TOKEN_USER_DEFINED)) {
        memcpy(text, spelling.data, spelling.length);
        n = spelling.length;
    }
    if (type == TOKEN_USER_DEFINED && n > 0) {
        t->starts_user[(unsigned char)text[0]] = true;
        t->longest_user = n > t->longest_user ? n : t->longest_user;
    }
    t->tokens[t->n_tokens++] = (struct vocab_token){text, (int)n, type, score};
    if (n > TOK_TOKEN_LENGTH || !isfinite(score))
        return fail(error,
                    "%s: token %d: got %zu bytes and score %g, expected at most %d "
                    "and a finite score",
                    where, id, n, (double)score, TOK_TOKEN_LENGTH);
    if (kind == KEY_TOKEN && (type == TOKEN_USER_DEFINED || no_bytes))
        add_key(t, text, (int)n, KEY_TEXT, id);
    if (kind != KEY_TOKEN || !no_bytes)
        add_key(t, text, (int)n, kind, id);
    return true;
}

static void count_lost(struct tokenizer *t) {
    for (int i = 0; i < 256; i++) {
        char byte = (char)i;
        t->n_lost += find_key(t, &byte, 1, KEY_TOKEN) < 0 && find_key(t, &byte, 1, KEY_BYTE) < 0;
    }
}

/* `gpt2`: merges are listed, best first, as `left right`. */
static bool add_merges(struct tokenizer *t, struct gguf_array lines, char *error) {
    for (size_t i = 0; i < lines.count; i++) {
        char text[2 * TOK_TOKEN_LENGTH + 1]; /* a byte is spelled as two at most */
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
    bool fits = array->type == type || (type == GGUF_I32 && array->type == GGUF_U32);
    return (fits && array->count >= count && array->count <= most) ||
           fail(error, "%s: got %zu elements of type %d, expected %zu%s of type %d", key,
                array->count, (int)array->type, most, count ? "" : " at most", (int)type);
}

static bool read_family(struct tokenizer *t, struct gguf *file, char *error) {
    struct gguf_string model = {"", 0}, pre = {"", 0};
    gguf_get_string(file, "tokenizer.ggml.model", &model);
    gguf_get_string(file, "tokenizer.ggml.pre", &pre);
    t->byte_level = gguf_equals(model, "gpt2");
    t->guessed = t->byte_level && pre.length == 0;
    pre = t->guessed ? (struct gguf_string){"default", 7} : pre;
    t->pattern = t->byte_level ? pattern_find(pre) : NULL;
    if (t->byte_level ? t->pattern != NULL : gguf_equals(model, "llama"))
        return true;
    struct gguf_string got = t->byte_level ? pre : model;
    return fail(error, "tokenizer.ggml.%s: got `%.*s`, expected %s",
                t->byte_level ? "pre" : "model", gguf_shown(got), got.data,
                t->byte_level ? "one that README.md lists" : "`llama` or `gpt2`");
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
    count_lost(t);
    return !listed || add_merges(t, merges, error);
}

static void named_ids(struct gguf *file, int64_t ids[N_IDS]) {
    for (int i = 0; i < N_IDS; i++) {
        ids[i] = -1;
        (void)gguf_get_int(file, id_keys[i], &ids[i]);
    }
}

static bool read_settings(struct tokenizer *t, struct gguf *file, char *error) {
    for (int i = 0; i < N_IDS; i++)
        if (t->ids[i] < -1 || t->ids[i] >= t->n_tokens)
            return fail(error, "%s: got %lld, expected 0 to %d", id_keys[i], (long long)t->ids[i],
                        t->n_tokens - 1);
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
    count_lost(t);
    return true;
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
    char *plain;            /* (of `llama`) the text with spaces for U+2581 */
    char *text;             /* a part of it with its prefix; or a word without lost bytes */
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

static void encode_word(void *encoder, const char *word, size_t length) {
    struct encoder *e = encoder;
    const struct tokenizer *t = e->tokenizer;
    int previous = -1, whole = -1;
    if (t->byte_level && t->pattern->traits & PATTERN_WHOLE_WORDS)
        whole = find_key(t, word, length, KEY_TOKEN);
    if (whole >= 0) {
        e->tokens[e->n_tokens++] = whole;
        return;
    }
    if (t->byte_level && t->n_lost > 0) { /* the bytes that have a token are neighbours */
        size_t n = 0;
        for (size_t at = 0; at < length; at++)
            if (find_key(t, word + at, 1, KEY_TOKEN) >= 0)
                e->text[n++] = word[at];
        word = e->text;
        length = n;
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
        for (size_t i = 0; token < 0 && i < size; i++) {
            int byte = find_key(t, word + at + i, 1, KEY_BYTE);
            e->tokens[e->n_tokens] = byte;
            e->n_tokens += byte >= 0;
        }
    }
}

/* A text, or what user-defined tokens leave of it: as in llama.cpp, each part has the prefix. */
static void encode_fragment(struct encoder *e, const char *text, size_t length) {
    const struct tokenizer *t = e->tokenizer;
    if (length == 0)
        return;
    if (t->byte_level) {
        split_words(t->pattern->expressions, text, length, encode_word, e);
        return;
    }
    e->text[0] = ' ';
    memcpy(e->text + t->adds_prefix, text, length);
    encode_word(e, e->text, length + t->adds_prefix);
}

/* The longest user-defined token at the start of a text; -1: none. */
static int user_token(const struct tokenizer *t, const char *text, size_t length) {
    size_t size = length < t->longest_user ? length : t->longest_user;
    for (; size > 0 && t->starts_user[(unsigned char)text[0]]; size--) {
        int token = find_key(t, text, size, KEY_TEXT);
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
                        .plain = malloc(n),
                        .tokens = malloc(n * 2 * sizeof *e.tokens)}; /* a prefix a fragment */
    bool ok = e.symbols && e.heap && e.text && e.plain && e.tokens;
    if (ok && !t->byte_level) {
        /* U+2581 in a text is a space, as SentencePiece has it: models were trained that way */
        length = unspell(t, text, length, e.plain);
        text = e.plain;
    }
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
    free(e.plain);
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
    if (t)
        named_ids(file, t->ids);
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
    if (t)
        memcpy(t->ids, (int64_t[N_IDS]){1, 2, -1, -1}, sizeof t->ids);
    bool ok = t && vocab_size > 0 && make_room(t, (size_t)vocab_size, 0) &&
              read_checkpoint(t, stream, vocab_size, path, error);
    fclose(stream);
    if (!ok) {
        tok_close(t);
        return NULL;
    }
    t->adds_bos = t->adds_prefix = true;
    return t;
}

int tok_bos(const struct tokenizer *t) {
    return (int)t->ids[ID_BOS];
}

int tok_eos(const struct tokenizer *t) {
    return (int)t->ids[ID_EOS];
}

bool tok_adds_bos(const struct tokenizer *t) {
    return t->adds_bos && t->ids[ID_BOS] >= 0;
}

int tok_lost_bytes(const struct tokenizer *t) {
    return t->n_lost;
}

bool tok_guessed(const struct tokenizer *t) {
    return t->guessed;
}

void tok_mark_ends(struct gguf *file, bool *ends, int n_tokens) {
    static const char names[] =
        "<|endoftext|> <|end_of_text|> <|eot_id|> <|eom_id|> <|im_end|> <end_of_turn> <|eot|> "
        "<|return|> <|call|> <|END_OF_TURN_TOKEN|> <|EOT|> <EOT> <end_of_utterance> "
        "<\uFF5Cend\u2581of\u2581sentence\uFF5C>";
    struct gguf_array tokens = {0}, types = {0};
    bool harmony = false;
    int end = -1; /* <|end|>, of an answer; in Harmony of a message, and an answer has several */
    int64_t ids[N_IDS];
    for (int i = 1; i < 3 && i < n_tokens && !file; i++)
        ends[i] = true;
    if (!file || !gguf_get_array(file, "tokenizer.ggml.tokens", &tokens) ||
        tokens.type != GGUF_STRING)
        return;
    (void)gguf_get_array(file, "tokenizer.ggml.token_type", &types);
    for (int i = 0; i < n_tokens && (size_t)i < tokens.count; i++) {
        struct gguf_string word = tokens.strings[i];
        int32_t type = TOKEN_NORMAL;
        if (types.type == GGUF_I32 && (size_t)i < types.count)
            memcpy(&type, (const char *)types.values + (size_t)i * sizeof type, sizeof type);
        /* in Gemma's vocabulary </s> ends what is struck out */
        ends[i] = is_listed(names, word) || (type == TOKEN_CONTROL && gguf_equals(word, "</s>"));
        harmony = harmony || gguf_equals(word, "<|return|>");
        end = gguf_equals(word, "<|end|>") ? i : end;
    }
    named_ids(file, ids);
    for (int i = ID_EOS; i < N_IDS; i++)
        if (ids[i] >= 0 && ids[i] < n_tokens)
            ends[ids[i]] = true;
    if (end >= 0)
        ends[end] = !harmony;
}

int tok_find(const struct tokenizer *t, const char *text, size_t length) {
    int token = find_key(t, text, length, KEY_SPECIAL);
    token = token >= 0 ? token : find_key(t, text, length, KEY_TEXT);
    return token >= 0 ? token : find_key(t, text, length, KEY_TOKEN);
}

#endif /* TOKENIZER_IMPLEMENTATION */
