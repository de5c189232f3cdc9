/* json.h: a strict reader (RFC 8259), and of writing what printf cannot do: strings.
 *
 *     struct json_node *nodes = json_parse(text, length, error);
 *     for (int key = 1; nodes && key < nodes[0].next; key = nodes[key + 1].next)
 *         printf("%s = %s\n", nodes[key].text, nodes[key + 1].text);
 *     free(nodes);
 *
 * The reader makes an array of nodes, in the order of the text: node 0 is the whole, the first
 * child of a container is the node after it, and `next` leads past a value and all that is in it.
 * In an object keys and values take turns. Strings are decoded in place, since none gets longer by
 * that: so the text must be writable, and outlive the nodes.
 * Refuses whatever the grammar does not have: comments, commas at the end, NaN, numbers that begin
 * with 0 or +, text that is not UTF-8, halves of surrogate pairs, and more than 64 levels.
 * Define JSON_IMPLEMENTATION in one file, before including this. */
#ifndef JSON_H
#define JSON_H

#include "text.h"

enum { JSON_DEPTH = 64 };

struct json_node {
    char type;     /* its first byte: one of { [ " t f n, or 0 for a number */
    int next;      /* the node after this value and all that is in it */
    char *text;    /* a string: decoded, ended by a zero byte; else as it stands in the text */
    size_t length; /* bytes; a string may hold zero bytes */
};

/* text[length] must be 0. NULL: `error` says what was expected and at which byte. */
struct json_node *json_parse(char *text, size_t length, char error[ERROR_LENGTH]);
/* The same, but also of a text that is wrong: the `n` nodes up to there, of which those not read to
 * their end have `next` 0; `error` is "" of one that is not. NULL: out of memory. */
struct json_node *json_parse_part(char *text, size_t length, int *n, char error[ERROR_LENGTH]);
/* The node of a key's value in the object that nodes[object] is, of the last if there are several;
 * -1: there is none, or it is null, or nodes[object] is no object. */
int json_find(const struct json_node *nodes, int object, const char *name);
/* Writes it quoted; what is not UTF-8 comes out as U+FFFD, one for each byte. */
void json_string(FILE *out, const char *text, size_t length);

#endif /* JSON_H */

#ifdef JSON_IMPLEMENTATION
#undef JSON_IMPLEMENTATION

#include <limits.h>
#include <stdlib.h>
#include <string.h>

/* What may follow a backslash, and what it stands for; \/ is read, but never written. */
static const char json_letters[] = "\"\\bfnrt/", json_meanings[] = "\"\\\b\f\n\r\t/";

/* Functions that return a text return NULL, or what was expected at `at`. */
struct json_reader {
    char *at;                /* the text is read up to here */
    struct json_node *nodes; /* (n_nodes) */
    int n_nodes;
};

/* ---- strings ---- */

/* The UTF-16 unit of the `\uXXXX` at reader->at, which moves behind it; -1: there is none. */
static long json_unit(struct json_reader *reader) {
    const char *at = reader->at;
    if (strncmp(at, "\\u", 2) != 0 || strspn(at + 2, "0123456789abcdefABCDEF") < 4)
        return -1;
    char digits[] = {at[2], at[3], at[4], at[5], 0};
    reader->at += 6;
    return strtol(digits, NULL, 16);
}

/* The code point of one `\uXXXX`, or of two that are a surrogate pair; -1: it is neither. */
static long json_code(struct json_reader *reader) {
    long code = json_unit(reader);
    if (code >= 0xDC00 && code < 0xE000)
        return -1; /* a second half without the first */
    if (code < 0xD800 || code >= 0xE000)
        return code;
    long low = json_unit(reader);
    return low >= 0xDC00 && low < 0xE000 ? 0x10000 + (code - 0xD800) * 0x400 + (low - 0xDC00) : -1;
}

/* Writes a code point as UTF-8; returns the end of it. */
static char *json_put(char *to, long code) {
    int more = code < 0x80 ? 0 : code < 0x800 ? 1 : code < 0x10000 ? 2 : 3; /* bytes after it */
    static const int leads[] = {0, 0xC0, 0xE0, 0xF0};
    *to++ = (char)(leads[more] | code >> 6 * more);
    while (more-- > 0)
        *to++ = (char)(0x80 | (code >> 6 * more & 0x3F));
    return to;
}

/* Decodes the escape at reader->at, which moves behind it; NULL: it is none. */
static char *json_escape(struct json_reader *reader, char *to) {
    const char *letter = memchr(json_letters, reader->at[1], sizeof json_letters - 1);
    if (letter) {
        *to = json_meanings[letter - json_letters];
        reader->at += 2;
        return to + 1;
    }
    long code = json_code(reader);
    return code < 0 ? NULL : json_put(to, code);
}

static const char *json_read_string(struct json_reader *reader, struct json_node *node) {
    char *to = node->text = ++reader->at;
    while (*reader->at != '"') {
        uint32_t code;
        int bytes = utf8_read(reader->at, SIZE_MAX, &code); /* the zero byte behind all ends it */
        if (bytes < 1 || (unsigned char)*reader->at < ' ')
            return "UTF-8 without control characters, or the end of the string";
        if (*reader->at == '\\') {
            to = json_escape(reader, to);
            if (!to)
                return "an escape";
        } else {
            memmove(to, reader->at, (size_t)bytes);
            to += bytes;
            reader->at += bytes;
        }
    }
    reader->at++;
    *to = 0;
    node->length = (size_t)(to - node->text);
    return NULL;
}

/* ---- values ---- */

static char json_skip_space(struct json_reader *reader) { /* returns what comes then */
    reader->at += strspn(reader->at, " \t\r\n");
    return *reader->at;
}

static size_t json_digits(const char *text) {
    return strspn(text, "0123456789");
}

/* -? (0 | [1-9][0-9]*) ([.][0-9]+)? ([eE][+-]?[0-9]+)? */
static const char *json_read_number(struct json_reader *reader) {
    char *at = reader->at + (*reader->at == '-');
    size_t whole = json_digits(at), digits = whole;
    if (whole == 0 || (*at == '0' && whole > 1))
        return "a value";
    at += whole;
    if (*at == '.') {
        digits = json_digits(at + 1);
        at += 1 + digits;
    }
    if (digits > 0 && (*at == 'e' || *at == 'E')) {
        at += 1 + (at[1] == '+' || at[1] == '-');
        digits = json_digits(at);
        at += digits;
    }
    reader->at = at;
    return digits > 0 ? NULL : "a digit";
}

static const char *json_read_scalar(struct json_reader *reader, struct json_node *node) {
    static const char *const words[] = {"null", "true", "false"};
    if (node->type == '"')
        return json_read_string(reader, node);
    for (int i = 0; i < 3; i++) {
        size_t length = strlen(words[i]);
        if (strncmp(reader->at, words[i], length) == 0) {
            reader->at += length;
            return NULL;
        }
    }
    node->type = '0';
    return json_read_number(reader);
}

static const char *json_read(struct json_reader *reader, int depth); /* values hold values */

/* What stands between the brackets, and the closing one. */
static const char *json_read_children(struct json_reader *reader, bool is_object, int depth) {
    char close = is_object ? '}' : ']';
    bool more = json_skip_space(reader) != close;
    while (more) {
        const char *wrong = NULL;
        if (is_object) {
            wrong = json_skip_space(reader) == '"' ? json_read(reader, depth) : "a key";
            if (wrong)
                return wrong;
            if (json_skip_space(reader) != ':')
                return "':'";
            reader->at++;
        }
        wrong = json_read(reader, depth);
        if (wrong)
            return wrong;
        more = json_skip_space(reader) == ',';
        reader->at += more;
    }
    if (*reader->at != close)
        return is_object ? "',' or '}'" : "',' or ']'";
    reader->at++;
    return NULL;
}

/* A value inside `depth` others. */
static const char *json_read(struct json_reader *reader, int depth) {
    int index = reader->n_nodes++;
    struct json_node *node = &reader->nodes[index];
    *node = (struct json_node){.type = json_skip_space(reader), .text = reader->at};
    const char *wrong;
    if (node->type == '{' || node->type == '[') {
        if (depth == JSON_DEPTH)
            return "less nesting";
        reader->at++;
        wrong = json_read_children(reader, node->type == '{', depth + 1);
    } else {
        wrong = json_read_scalar(reader, node);
    }
    if (node->type != '"')
        node->length = (size_t)(reader->at - node->text);
    node->next = wrong ? 0 : reader->n_nodes;
    return wrong;
}

struct json_node *json_parse_part(char *text, size_t length, int *n, char error[ERROR_LENGTH]) {
    size_t most = 1; /* every value but the first follows one of these */
    for (size_t i = 0; i < length; i++)
        most += text[i] == ',' || text[i] == ':' || text[i] == '[' || text[i] == '{';
    struct json_reader reader = {.at = text};
    reader.nodes = most < INT_MAX ? malloc(most * sizeof *reader.nodes) : NULL;
    const char *wrong = reader.nodes ? json_read(&reader, 0) : "less (out of memory)";
    if (!wrong && (json_skip_space(&reader) || reader.at != text + length))
        wrong = "the end";
    *error = 0;
    *n = reader.n_nodes;
    if (wrong)
        (void)fail(error, "byte %td: expected %s", reader.at - text, wrong);
    return reader.nodes;
}

struct json_node *json_parse(char *text, size_t length, char error[ERROR_LENGTH]) {
    int n;
    struct json_node *nodes = json_parse_part(text, length, &n, error);
    if (!*error)
        return nodes;
    free(nodes);
    return NULL;
}

int json_find(const struct json_node *nodes, int object, const char *name) {
    int found = -1;
    for (int key = object + 1; nodes[object].type == '{' && key < nodes[object].next;
         key = nodes[key + 1].next)
        if (strcmp(nodes[key].text, name) == 0)
            found = nodes[key + 1].type == 'n' ? -1 : key + 1;
    return found;
}

/* ---- writing ---- */

void json_string(FILE *out, const char *text, size_t length) {
    int bytes;
    fputc('"', out);
    for (size_t at = 0; at < length; at += (size_t)bytes) {
        uint32_t code;
        bytes = utf8_read(text + at, length - at, &code);
        const char *letter = memchr(json_meanings, text[at], sizeof json_meanings - 2);
        if (letter)
            fprintf(out, "\\%c", json_letters[letter - json_meanings]);
        else if ((unsigned char)text[at] < ' ')
            fprintf(out, "\\u%04x", (unsigned)text[at]);
        else if (bytes > 0)
            fwrite(text + at, 1, (size_t)bytes, out);
        else
            fputs("\xEF\xBF\xBD", out);
        bytes = bytes > 0 ? bytes : 1;
    }
    fputc('"', out);
}

#endif /* JSON_IMPLEMENTATION */
