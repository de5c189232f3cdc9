/* text.h: what all that reads needs: a line that says what is wrong, memory that grows, UTF-8; and
 * what may be written to a terminal.
 *
 *     bool parse(const char *text, char error[ERROR_LENGTH]) {
 *         if (*text != '{')
 *             return fail(error, "got %c, expected {", *text);
 *         ...
 *
 * Whoever can fail takes room for one line and writes it there: what is at hand, what was found,
 * what was expected, a hint. Who prints it puts the program's name before it. A line never holds
 * control characters, for part of it may come from a file, and a file must not control the
 * terminal; nor is one told to do what it cannot. All of it is inlined, in C and C++; who includes this has bool, size_t, uint32_t and
 * FILE with it. */
#ifndef TEXT_H
#define TEXT_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { ERROR_LENGTH = 512 }; /* bytes of a line, with its end */

static inline void fail_clean(char *line) {
    for (; *line; line++)
        *line = (unsigned char)*line < ' ' || *line == 127 ? '?' : *line;
}

/* Writes the line; false, for the caller to return. */
__attribute__((format(printf, 2, 3))) static inline bool fail(char error[ERROR_LENGTH],
                                                              const char *format, ...) {
    va_list values;
    va_start(values, format);
    vsnprintf(error, ERROR_LENGTH, format, values);
    va_end(values);
    fail_clean(error);
    return false;
}

/* Room for one more behind n items of `size` bytes. At powers of two it makes room for as many
 * again, so who adds one by one needs no capacity. Ends the program where there is no memory. */
static inline void *grow(void *items, size_t n, size_t size) {
    if ((n & (n - 1)) == 0)
        items = realloc(items, (2 * n + 1) * size);
    if (!items)
        abort();
    return items;
}

/* Reads one UTF-8 character. > 0: its bytes. 0: all `length` bytes begin one. < 0: so many bytes
 * can never be part of one (the longest such prefix, as Unicode recommends replacing it). */
static inline int utf8_read(const char *text, size_t length, uint32_t *code) {
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
static inline size_t utf8_char(const char *text, size_t length, uint32_t *code) {
    int size = utf8_read(text, length, code);
    if (size <= 0)
        *code = UINT32_MAX;
    return size > 0 ? (size_t)size : 1;
}

/* Whether a file is a terminal that moves its cursor when told so; and one to be shown colours
 * (https://no-color.org). */
static inline bool text_moves(int file) {
    const char *kind = getenv("TERM");
    return isatty(file) && kind && *kind && strcmp(kind, "dumb") != 0;
}

static inline bool text_colours(int file) {
    const char *none = getenv("NO_COLOR");
    return text_moves(file) && !(none && *none);
}

#endif /* TEXT_H */
