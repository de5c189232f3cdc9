/* wrap.h: text in a terminal's columns: how many a character takes, and where a line is broken.
 *
 *     struct wrap wrap = {0}; // at the start of a line
 *     wrap_write(&wrap, stdout, "Once upon", 9);
 *     wrap_write(&wrap, stdout, " a time", 7);
 *
 * Text is shown at once, as it comes, in pieces of whole characters. A word that turns out not to fit is taken back and written
 * again on the next line, so `stdout` is a terminal that moves its cursor. The last column stays
 * empty: what a terminal does when it has been written to differs. Characters of two columns are
 * words of their own; what is no text (control characters, bytes that are not UTF-8) is a `?`.
 * Define WRAP_IMPLEMENTATION in one file, before including this.
 * Read next: text.h. */
#ifndef WRAP_H
#define WRAP_H

#include "text.h"

enum { WRAP_WORD = 256 /* bytes: a longer one is broken */ };

struct wrap {
    int column; /* where the next character goes */
    char word[WRAP_WORD];
    int length, columns; /* of the word that the line ends with */
};

/* Columns of a character: East Asian ones and emoji take two, marks none. */
int wrap_columns(uint32_t code);
bool wrap_shows(uint32_t code); /* false: a control character, or none that utf8_char knows */
/* Columns of the terminal, or 80; *rows, if not NULL, or 24. */
int wrap_width(int file, int *rows);
void wrap_write(struct wrap *wrap, FILE *out, const char *text, size_t length);

#endif /* WRAP_H */

#ifdef WRAP_IMPLEMENTATION
#undef WRAP_IMPLEMENTATION

#include "unicode.h"
#include <string.h>
#include <sys/ioctl.h>

int wrap_columns(uint32_t code) {
    bool wide = (code >= 0x1100 && code < 0x1160) || (code >= 0x2E80 && code < 0xA4D0) ||
                (code >= 0xAC00 && code < 0xD7A4) || (code >= 0xF900 && code < 0xFB00) ||
                (code >= 0xFE30 && code < 0xFE70) || (code >= 0xFF00 && code < 0xFF61) ||
                (code >= 0x1F300 && code < 0x1FB00) || (code >= 0x20000 && code < 0x3FFFE);
    return unicode_class_of(code) == UNICODE_MARK || code == 0x200D ? 0 : wide ? 2 : 1;
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
    if (blank || columns == 2 || w->length + n > WRAP_WORD) {
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

#endif /* WRAP_IMPLEMENTATION */
