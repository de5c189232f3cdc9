/* wrap.h: text in a terminal's columns: how many a character takes, and where a line is broken.
 *
 *     struct wrap wrap = {0}; // at the start of a line
 *     wrap_write(&wrap, stdout, "Once upon", 9);
 *     wrap_write(&wrap, stdout, " a time", 7);
 *
 * Text is shown at once, as it comes, in pieces of whole characters. A word that turns out not to
 * fit is taken back and written again on the next line, so `stdout` is a terminal that moves its
 * cursor. The last column stays empty: terminals differ in what they do when it was written to.
 * Characters of two columns are words of their own; what is no text (control characters, bytes that
 * are not UTF-8) is a `?`.
 * Define WRAP_IMPLEMENTATION in one file, before including this.
 * Read next: text.h. */
#ifndef WRAP_H
#define WRAP_H

#if defined WRAP_IMPLEMENTATION && !defined _GNU_SOURCE
#define _GNU_SOURCE /* wcwidth; too late behind a header of the system */
#endif
#include "text.h"

enum { WRAP_WORD = 256 /* bytes: a longer one is broken */ };

struct wrap {
    int column; /* where the next character goes */
    char word[WRAP_WORD];
    int length, columns; /* of the word that the line ends with */
};

/* Columns of a character, as the C library has them: East Asian ones and emoji take two, marks
 * none; what is not known takes one. The program has set a locale of UTF-8. */
int wrap_columns(uint32_t code);
bool wrap_shows(uint32_t code); /* false: a control character, or none that utf8_char knows */
/* Columns of the terminal, or 80; *rows, if not NULL, or 24. */
int wrap_width(int file, int *rows);
void wrap_write(struct wrap *wrap, FILE *out, const char *text, size_t length);
/* Lines of less than 1 KB in all: wrapped where `out` is a terminal as above, else as they are. */
__attribute__((format(printf, 2, 3))) void wrap_print(FILE *out, const char *format, ...);

#endif /* WRAP_H */

#ifdef WRAP_IMPLEMENTATION
#undef WRAP_IMPLEMENTATION

#include <string.h>
#include <sys/ioctl.h>
#include <wchar.h>

int wrap_columns(uint32_t code) {
    int columns = wcwidth((wchar_t)code);
    return columns < 0 ? 1 : columns;
}

bool wrap_shows(uint32_t code) {
    return code >= ' ' && (code < 127 || code >= 160) && code != UINT32_MAX;
}

int wrap_width(int file, int *rows) {
    struct winsize size = {0};
    bool known = ioctl(file, TIOCGWINSZ, &size) == 0;
    if (rows)
        *rows = known && size.ws_row > 1 ? size.ws_row : 24;
    return known && size.ws_col > 8 ? size.ws_col : 80;
}

static void wrap_line(struct wrap *w, FILE *out) {
    (void)fputc('\n', out);
    w->column = w->length = w->columns = 0;
}

/* One character of n bytes. */
static void wrap_char(struct wrap *w, FILE *out, const char *bytes, int n, int columns, int width) {
    bool blank = *bytes == ' ' || *bytes == '\t';
    if (w->column + columns > width && blank) { /* the end of the line stands for it */
        wrap_line(w, out);
        return;
    }
    if (w->column + columns > width && columns == 1 && w->columns > 0 && w->columns < w->column) {
        (void)fprintf(out, "\033[%dD\033[K\n%.*s", w->columns, w->length, w->word);
        w->column = w->columns;
    } else if (w->column + columns > width) {
        wrap_line(w, out);
    }
    (void)fwrite(bytes, 1, (size_t)n, out);
    w->column += columns;
    bool of_wide = columns == 0 && w->length == 0; /* a mark */
    if (blank || columns == 2 || of_wide || w->length + n > WRAP_WORD) {
        w->length = w->columns = 0;
        return;
    }
    memcpy(w->word + w->length, bytes, (size_t)n);
    w->length += n;
    w->columns += columns;
}

void wrap_write(struct wrap *w, FILE *out, const char *text, size_t length) {
    int width = wrap_width(fileno(out), NULL) - 1;
    uint32_t code;
    for (size_t at = 0, n; at < length; at += n) {
        n = utf8_char(text + at, length - at, &code);
        if (code == '\n')
            wrap_line(w, out);
        else if (code == '\t' || wrap_shows(code))
            wrap_char(w, out, text + at, (int)n,
                      code == '\t' ? 8 - w->column % 8 : wrap_columns(code), width);
        else if (code != '\r')
            wrap_char(w, out, "?", 1, 1, width);
    }
}

void wrap_print(FILE *out, const char *format, ...) {
    char text[1024];
    struct wrap wrap = {0};
    va_list values;
    va_start(values, format);
    (void)vsnprintf(text, sizeof text, format, values);
    va_end(values);
    if (text_moves(fileno(out)))
        wrap_write(&wrap, out, text, strlen(text));
    else
        (void)fputs(text, out);
}

#endif /* WRAP_IMPLEMENTATION */
