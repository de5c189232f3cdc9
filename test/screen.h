/* screen.h: a small terminal, which shows what a program has written to one.
 *
 *     struct screen *s = screen_new(24, 80);
 *     screen_write(s, live.text, live.length);
 *     CHECK(s->n_faults == 0 && !strcmp(screen_row(s, 0), "> Once"), ...);
 *
 * It knows the sequences that the program may use, with a scroll region, and finds fault with all
 * others, with a cursor that leaves it, and with characters in its last column, where terminals
 * differ. Columns are those of the C library: main sets a locale of UTF-8. */
#ifndef SCREEN_H
#define SCREEN_H

#include "child.h"
#include "../lib/text.h"

#include <locale.h>
#include <wchar.h>

enum { SCREEN_ROWS = 400, SCREEN_COLUMNS = 96 };

struct screen {
    int rows, columns, y, x, top, bottom, saved_y, saved_x; /* rows [top, bottom] scroll */
    int n_faults;
    bool returns; /* at a newline, as a terminal does for who writes to it */
    char cells[SCREEN_ROWS][SCREEN_COLUMNS][16]; /* a character and its marks; "": of one before */
    char *gone;                                  /* rows that have left it at its top */
};

static inline void screen_blank(struct screen *s, int y, int x) {
    for (; x < SCREEN_COLUMNS; x++)
        strcpy(s->cells[y][x], " ");
}

static inline struct screen *screen_new(int rows, int columns) {
    struct screen *s = keep(sizeof *s);
    *s = (struct screen){.rows = rows, .columns = columns, .bottom = rows - 1};
    s->gone = keep(LIVE_LENGTH);
    for (int y = 0; y < rows; y++)
        screen_blank(s, y, 0);
    return s;
}

/* A row without the blanks at its end. */
static inline char *screen_row(const struct screen *s, int y) {
    char *line = keep(sizeof s->cells[y]);
    for (int x = 0; x < SCREEN_COLUMNS; x++)
        strcat(line, s->cells[y][x]);
    for (size_t n = strlen(line); n > 0 && line[n - 1] == ' '; n--)
        line[n - 1] = 0;
    return line;
}

/* A text without its white space; all that the screen shows, and has shown, likewise. */
static inline char *squeezed(const char *text) {
    char *copy = keep(strlen(text) + 1), *to = copy;
    for (; *text; text++)
        if (!strchr(" \t\r\n", *text))
            *to++ = *text;
    return copy;
}

static inline char *screen_text(const struct screen *s) {
    char *text = keep(LIVE_LENGTH);
    strcpy(text, s->gone);
    for (int y = 0; y < s->rows; y++)
        strcat(text, screen_row(s, y));
    return squeezed(text);
}

/* The row that begins so; -1: none does. */
static inline int screen_find(const struct screen *s, const char *words) {
    for (int y = 0; y < s->rows; y++)
        if (strncmp(screen_row(s, y), words, strlen(words)) == 0)
            return y;
    return -1;
}

static inline void screen_down(struct screen *s) {
    if (s->y != s->bottom) {
        s->y += s->y < s->rows - 1;
        return;
    }
    if (s->top == 0)
        strcat(strcat(s->gone, screen_row(s, 0)), "\n");
    memmove(s->cells[s->top], s->cells[s->top + 1],
            sizeof *s->cells * (size_t)(s->bottom - s->top));
    screen_blank(s, s->bottom, 0);
}

/* Carries out an escape sequence, and returns its bytes. */
static inline size_t screen_sequence(struct screen *s, const char *text) {
    char *end = NULL;
    int a = 0, b = 0;
    switch (text[1]) {
    case '7':
        s->saved_y = s->y;
        s->saved_x = s->x;
        return 2;
    case '8':
        s->y = s->saved_y;
        s->x = s->saved_x;
        return 2;
    case 'D': screen_down(s); return 2;
    case '[': a = (int)strtol(text + 2 + (text[2] == '?'), &end, 10); break;
    default: s->n_faults++; return 1;
    }
    if (*end == ';')
        b = (int)strtol(end + 1, &end, 10);
    switch (*end) {
    case 'A': s->y -= a ? a : 1; break;
    case 'C': s->x += a ? a : 1; break;
    case 'D': s->x -= a ? a : 1; break;
    case 'H':
        s->y = a ? a - 1 : 0;
        s->x = b ? b - 1 : 0;
        break;
    case 'J':
        for (int y = s->y + 1; y < s->rows; y++)
            screen_blank(s, y, 0);
        /* fall through */
    case 'K': screen_blank(s, s->y, s->x); break;
    case 'r':
        s->top = a ? a - 1 : 0;
        s->bottom = (b ? b : s->rows) - 1;
        s->y = s->x = 0;
        break;
    case 'm': break; /* colours */
    case 'h':
    case 'l': s->n_faults += a != 2004; break;
    default: s->n_faults++;
    }
    s->n_faults += s->y < 0 || s->y >= s->rows || s->x < 0 || s->x >= s->columns;
    s->y = s->y < 0 ? 0 : s->y < s->rows ? s->y : s->rows - 1;
    s->x = s->x < 0 ? 0 : s->x < s->columns ? s->x : s->columns - 1;
    return (size_t)(end - text) + 1;
}

/* A character of n bytes. One in the last column is a fault, but for a blank. */
static inline void screen_put(struct screen *s, const char *bytes, size_t n, uint32_t code) {
    int columns = wcwidth((wchar_t)code), x = columns > 0 ? s->x : s->x - 1;
    s->n_faults += columns < 0 || x < 0 || s->x + columns > s->columns - (code != ' ');
    if (columns < 0 || x < 0 || x + columns > SCREEN_COLUMNS)
        return;
    x -= columns == 0 && x > 0 && !*s->cells[s->y][x]; /* a mark of a wide one */
    char *cell = s->cells[s->y][x];
    if (columns > 0)
        *cell = 0;
    if (strlen(cell) + n < sizeof *s->cells[0])
        strncat(cell, bytes, n);
    for (int i = 1; i < columns; i++)
        *s->cells[s->y][x + i] = 0;
    s->x += columns;
}

static inline void screen_write(struct screen *s, const char *text, size_t length) {
    for (size_t at = 0, n; at < length; at += n) {
        uint32_t code;
        n = utf8_char(text + at, length - at, &code);
        if (code == 27) {
            n = screen_sequence(s, text + at);
        } else if (code == '\n') {
            screen_down(s);
            s->x = s->returns ? 0 : s->x;
        } else if (code == '\r') {
            s->x = 0;
        } else if (code == '\t') {
            s->x += 8 - s->x % 8;
        } else {
            screen_put(s, text + at, n, code);
        }
    }
}

#endif
