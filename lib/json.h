/* json.h: a strict reader (RFC 8259), and of writing what printf cannot do: strings.
 * The reader makes an array of nodes, in the order of the text; strings are decoded in place, so
 * the text must outlive them. Node 0 is the whole; children start at the node after a container:
 *     struct json_node *nodes = json_parse(text, length, error);
 *     for (int key = 1; nodes && key < nodes[0].next; key = nodes[key + 1].next)
 *         printf("%s = %s\n", nodes[key].text, nodes[key + 1].text); // then free(nodes) */
#ifndef JSON_H
#define JSON_H
#include "text.h"
#include <stddef.h>
#include <stdio.h>
enum { JSON_DEPTH = 64 };
struct json_node {
    char type;     /* its first byte: one of { [ " t f n, or 0 for a number */
    int next;      /* the node after this value and all that is in it */
    char *text;    /* a string: decoded, ended by a zero byte; else as it stands in the text */
    size_t length; /* bytes; a string may hold zero bytes */
};
/* text[length] must be 0. NULL: `error` says what was expected and at which byte. */
struct json_node *json_parse(char *text, size_t length, char error[ERROR_LENGTH]);
void json_string(FILE *out, const char *text, size_t length); /* quoted; bad UTF-8: U+FFFD */
#endif                                                        /* JSON_H */
#ifdef JSON_IMPLEMENTATION
#undef JSON_IMPLEMENTATION /* json.h may be included again */
#include <limits.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
struct json_reader {
    char *at;
    struct json_node *nodes; /* (n_nodes) */
    int n_nodes;
};
static const char json_letters[] = "\"\\bfnrt/", json_meanings[] = "\"\\\b\f\n\r\t/";

static bool json_digit(char byte) {
    return byte >= '0' && byte <= '9';
}

/* Bytes of the UTF-8 sequence at `text`; 0: none. */
static size_t json_utf8(const char *text, size_t left) {
    uint32_t code;
    int length = utf8_read(text, left, &code);
    return length > 0 ? (size_t)length : 0;
}

/* The UTF-16 unit of the `\uXXXX` at *at, which moves behind it; -1: there is none. */
static long json_unit(char **at) {
    if (strncmp(*at, "\\u", 2) != 0 || strspn(*at + 2, "0123456789abcdefABCDEF") < 4)
        return -1;
    char digits[] = {(*at)[2], (*at)[3], (*at)[4], (*at)[5], 0};
    *at += 6;
    return strtol(digits, NULL, 16);
}

/* Decodes `\uXXXX`, or two for a surrogate pair, to `to`; the end of what it wrote, NULL: bad. */
static char *json_unicode(char **at, char *to) {
    long code = json_unit(at);
    if (code >> 10 == 0x36) {
        long low = json_unit(at);
        code = low >> 10 == 0x37 ? 0x10000 + (code - 0xD800) * 0x400 + (low - 0xDC00) : -1;
    }
    int more = code < 0x80 ? 0 : code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    *to++ = (char)(code >> 6 * more | (more ? 0xF0 << (3 - more) & 0xFF : 0));
    while (more-- > 0)
        *to++ = (char)(0x80 | (code >> 6 * more & 0x3F));
    return code < 0 || code >> 11 == 27 ? NULL : to;
}

/* These return NULL, or what was expected at reader->at. */
static const char *json_read_string(struct json_reader *reader, struct json_node *node) {
    char *to = node->text = ++reader->at;
    while (*reader->at != '"') {
        size_t length = json_utf8(reader->at, SIZE_MAX); /* the zero byte behind all ends it */
        if (!length || (unsigned char)*reader->at < ' ')
            return "UTF-8 without control characters, or the end of the string";
        bool escape = *reader->at == '\\';
        const char *letter = memchr(json_letters, reader->at[1], sizeof json_letters - 1);
        if (escape && !letter) {
            to = json_unicode(&reader->at, to);
            if (!to)
                return "an escape";
            continue;
        }
        if (escape)
            *to = json_meanings[letter - json_letters];
        else
            memmove(to, reader->at, length);
        to += length;
        reader->at += length + escape;
    }
    reader->at++;
    *to = 0;
    node->length = (size_t)(to - node->text);
    return NULL;
}

static const char *json_read_number(struct json_reader *reader) {
    char *start = reader->at + (*reader->at == '-'), *end;
    size_t length = strspn(start, "0123456789+-.eE");
    const char *point = memchr(start, '.', length);
    if (!json_digit(*start) || (*start == '0' && json_digit(start[1])) ||
        (point && !json_digit(point[1])))
        return "a value";
    strtod(start, &end); /* takes all that JSON does; what it takes besides is ruled out */
    reader->at = end < start + length ? end : start + length;
    return end == start + length ? NULL : "a number";
}

static const char *json_read_scalar(struct json_reader *reader, struct json_node *node) {
    static const char *const words[] = {"null", "true", "false"};
    if (node->type == '"')
        return json_read_string(reader, node);
    for (int i = 0; i < 3; i++) {
        if (strncmp(reader->at, words[i], strlen(words[i])) == 0) {
            reader->at += strlen(words[i]);
            return NULL;
        }
    }
    node->type = '0';
    return json_read_number(reader);
}

static char json_space(struct json_reader *reader) {
    reader->at += strspn(reader->at, " \t\r\n");
    return *reader->at;
}

static const char *json_read(struct json_reader *reader, int depth) {
    struct json_node *node = &reader->nodes[reader->n_nodes++];
    *node = (struct json_node){.type = json_space(reader), .text = reader->at};
    char close = node->type == '{' ? '}' : ']';
    bool container = node->type == '{' || node->type == '[';
    if (container && depth == JSON_DEPTH)
        return "less nesting";
    const char *wrong = container ? NULL : json_read_scalar(reader, node);
    reader->at += container;
    bool more = container && json_space(reader) != close;
    while (more && !wrong) {
        if (close == '}') {
            wrong = json_space(reader) == '"' ? json_read(reader, depth + 1) : "a key";
            if (wrong || json_space(reader) != ':')
                return wrong ? wrong : "':'";
            reader->at++;
        }
        wrong = json_read(reader, depth + 1);
        more = !wrong && json_space(reader) == ',';
        reader->at += more;
    }
    if (container && !wrong && *reader->at++ != close)
        return reader->at--, close == '}' ? "',' or '}'" : "',' or ']'";
    if (node->type != '"')
        node->length = (size_t)(reader->at - node->text);
    node->next = reader->n_nodes;
    return wrong;
}

struct json_node *json_parse(char *text, size_t length, char error[ERROR_LENGTH]) {
    size_t most = 1; /* every value but the first follows one of these */
    for (size_t i = 0; i < length; i++)
        most += text[i] == ',' || text[i] == ':' || text[i] == '[' || text[i] == '{';
    struct json_reader reader = {.at = text};
    reader.nodes = most < INT_MAX ? malloc(most * sizeof *reader.nodes) : NULL;
    const char *wrong = reader.nodes ? NULL : "less (out of memory)";
    if (!wrong)
        wrong = json_read(&reader, 0);
    if (!wrong && (json_space(&reader) || reader.at != text + length))
        wrong = "the end";
    if (!wrong)
        return reader.nodes;
    (void)fail(error, "byte %td: expected %s", reader.at - text, wrong);
    free(reader.nodes);
    return NULL;
}

void json_string(FILE *out, const char *text, size_t length) {
    fputc('"', out);
    for (size_t at = 0, bytes; at < length; at += bytes ? bytes : 1) {
        bytes = json_utf8(text + at, length - at);
        const char *letter = memchr(json_meanings, text[at], sizeof json_meanings - 2);
        if (letter)
            fprintf(out, "\\%c", json_letters[letter - json_meanings]);
        else if ((unsigned char)text[at] < ' ')
            fprintf(out, "\\u%04x", (unsigned)text[at]);
        else
            fwrite(bytes ? text + at : "\xEF\xBF\xBD", 1, bytes ? bytes : 3, out);
    }
    fputc('"', out);
}
#endif /* JSON_IMPLEMENTATION */
