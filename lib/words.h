/* words.h: how byte-level BPE cuts a text into words, before pairs merge inside each.
 *
 *     const struct pattern *pattern = pattern_find("llama-bpe", 9);  // NULL: not known
 *     for (size_t at = 0; at < length; at += word_size(pattern, text + at, length - at))
 *         ...
 *
 * A vocabulary names its pattern (tokenizer.ggml.pre), which its makers published as a regular
 * expression. Here each is a row of a table, and the alternatives are tried in the order in which
 * the expressions have them. What there is backtracking is here said outright; none takes more than
 * one look at a character. Marks are \p{M}, and \s is the property White_Space. Two details follow
 * the engines that read GGUF: text is not normalised (qwen2's own tokenizer makes it NFC), and
 * endings like 's ignore the case of ASCII letters alone.
 * A part of the implementation of tokenizer.h. */
#ifndef WORDS_H
#define WORDS_H

#include "text.h"
#include "unicode.h"
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

/* Bytes of the first character; a byte that is not UTF-8 is a character of its own. */
static size_t char_size(const char *text, size_t length, uint32_t *code) {
    int size = utf8_read(text, length, code);
    if (size <= 0)
        *code = UINT32_MAX;
    return size > 0 ? (size_t)size : 1;
}

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

struct pattern {
    const char *name;
    bool modern;        /* the form that all but gpt-2 have */
    bool cased;         /* a word is capitals, then small letters, and has its ending with it */
    int digits;         /* of a number at most */
    const char *behind; /* what may follow signs, as part of them */
    bool whole_words;   /* a word that is a token is taken whole, whatever merges say */
    bool adds_bos;      /* unless the file says otherwise */
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
    {"llama-bpe", true, false, 3, "\r\n", true, true},
    {"llama3", true, false, 3, "\r\n", true, true},
    {"llama-v3", true, false, 3, "\r\n", true, true},
    {"qwen2", true, false, 1, "\r\n", false, false},
    {"deepseek-r1-qwen", true, false, 1, "\r\n", false, false},
    {"gpt-4o", true, true, 3, "\r\n/", false, false},
    {"llama4", true, true, 3, "\r\n/", false, false},
};

static const struct pattern *pattern_find(const char *name, size_t length) {
    for (size_t i = 0; i < sizeof patterns / sizeof *patterns; i++)
        if (strlen(patterns[i].name) == length && memcmp(patterns[i].name, name, length) == 0)
            return &patterns[i];
    return NULL;
}

/* Where the run of characters in `set` that begins at `at` ends. */
static size_t run_end(const char *text, size_t length, size_t at, unsigned set) {
    uint32_t code;
    for (size_t size; at < length; at += size) {
        size = char_size(text + at, length - at, &code);
        if (!(set >> unicode_class_of(code) & 1))
            break;
    }
    return at;
}

/* Bytes of 's, 't, 're, 've, 'm, 'll or 'd; 0: none. */
static size_t ending_size(const char *text, size_t length, bool any_case) {
    static const char *const endings[] = {"s", "t", "re", "ve", "m", "ll", "d"};
    for (size_t i = 0; length > 1 && text[0] == '\'' && i < sizeof endings / sizeof *endings; i++) {
        size_t size = strlen(endings[i]), same = 0;
        while (same < size && same + 1 < length &&
               (text[same + 1] |
                (any_case && text[same + 1] >= 'A' && text[same + 1] <= 'Z' ? 'a' - 'A' : 0)) ==
                   endings[i][same])
            same++;
        if (same == size)
            return size + 1;
    }
    return 0;
}

/* White space: up to its last line's end; else all but the last, which belongs to the word behind
 * it; or what there is. */
static size_t space_size(const char *text, size_t length, bool lines) {
    size_t end = run_end(text, length, 0, IN_SPACE), last = 0, line = 0;
    uint32_t code;
    for (size_t at = 0; at < end; at += char_size(text + at, length - at, &code)) {
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
        size = char_size(text + i, length - i, &code);
        both = unicode_class_of(code) == UNICODE_UPPER ? both : i + size;
    }
    return both;
}

/* The end of a word at the start of a text, which one sign or space may precede; 0: none. */
static size_t letters_end(const struct pattern *pattern, const char *text, size_t length) {
    uint32_t code;
    size_t first = char_size(text, length, &code);
    unsigned kind = 1u << unicode_class_of(code);
    bool leads = !(kind & (IN_LETTER | IN_NUMBER)) && text[0] != '\r' && text[0] != '\n';
    if (!pattern->cased) {
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
    if (!pattern->modern)
        return gpt2_size(text, length);
    size_t size = pattern->cased ? 0 : ending_size(text, length, true);
    if (size > 0 || (size = letters_end(pattern, text, length)) > 0)
        return size;
    uint32_t code;
    for (int i = 0; i < pattern->digits && size < length; i++) {
        size_t digit = char_size(text + size, length - size, &code);
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

#endif /* WORDS_H */
