/* json.h: a strict reader (RFC 8259) and a writer that puts the commas itself.
 * The reader makes an array of nodes, in the order of the text; strings are decoded in place, so
 * the text must outlive them. Node 0 is the whole; children start at the node after a container:
 *     struct json_node *nodes = json_parse(text, length, error);
 *     for (int key = 1; nodes && key < nodes[0].next; key = nodes[key + 1].next)
 *         printf("%s = %s\n", nodes[key].text, nodes[key + 1].text); // then free(nodes)
 *     struct json_buffer out = {0};
 *     json_put(&out, "{");
 *     json_key(&out, "n");
 *     json_int(&out, 15);
 *     json_put(&out, "}"); // {"n":15}, then free(out.data) */
#ifndef JSON_H
#define JSON_H
#include <stddef.h>
#include <stdint.h>
enum { JSON_ERROR_LENGTH = 128, JSON_DEPTH = 64 };
struct json_node {
    char type;     /* its first byte: one of { [ " t f n, or 0 for a number */
    int next;      /* the node after this value and all that is in it */
    char *text;    /* a string: decoded, ended by a zero byte; else as it stands in the text */
    size_t length; /* bytes; a string may hold zero bytes */
};
struct json_buffer {
    char *data; /* ended by a zero byte; NULL while nothing was written */
    size_t length, capacity;
};
/* text[length] must be 0. NULL: `error` says what was expected and at which byte. */
struct json_node *json_parse(char *text, size_t length, char error[JSON_ERROR_LENGTH]);
void json_put(struct json_buffer *out, const char *token); /* { } [ ] true false null, newline */
void json_key(struct json_buffer *out, const char *name);
void json_string(struct json_buffer *out, const char *text, size_t length); /* bad UTF-8: U+FFFD */
void json_int(struct json_buffer *out, int64_t value);
void json_double(struct json_buffer *out, double value); /* reads back exactly; NaN, inf: null */
#endif                                                   /* JSON_H */
#ifdef JSON_IMPLEMENTATION
#undef JSON_IMPLEMENTATION /* json.h may be included again */
#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
struct json_reader {
    char *at;
    struct json_node *nodes;
    int n_nodes;
};
static const char json_letters[] = "\"\\/bfnrt", json_meanings[] = "\"\\/\b\f\n\r\t";

/* Bytes of the UTF-8 sequence at `text`; 0: none (overlong, surrogate, too large, cut short). */
static size_t json_utf8(const char *text, size_t left) {
    static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
    unsigned char lead = (unsigned char)*text;
    size_t length = lead < 0x80 ? 1 : lead < 0xC0 ? 0 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
    uint32_t code = length < 2 ? lead : lead & (0x7Fu >> length);
    for (size_t i = 1; i < length; i++) {
        if (i == left || (text[i] & 0xC0) != 0x80)
            return 0;
        code = code << 6 | (text[i] & 0x3F);
    }
    return lead > 0xF4 || code < least[length] || code > 0x10FFFF || code >> 11 == 27 ? 0 : length;
}

/* The UTF-16 unit of the `\uXXXX` at reader->at; -1: there is none. */
static long json_unit(struct json_reader *reader) {
    char *at = reader->at;
    if (at[0] != '\\' || at[1] != 'u' || strspn(at + 2, "0123456789abcdefABCDEF") < 4)
        return -1;
    char digits[] = {at[2], at[3], at[4], at[5], 0};
    reader->at += 6;
    return strtol(digits, NULL, 16);
}

/* Decodes an escape to `to`; the end of what it wrote, NULL: no escape, or half a surrogate pair.
 */
static char *json_escape(struct json_reader *reader, char *to) {
    const char *letter = memchr(json_letters, reader->at[1], sizeof json_letters - 1);
    if (letter) {
        *to = json_meanings[letter - json_letters];
        reader->at += 2;
        return to + 1;
    }
    long code = json_unit(reader);
    if (code >> 10 == 0x36) {
        long low = json_unit(reader);
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
        if ((unsigned char)*reader->at < ' ')
            return "an end of the string";
        if (*reader->at != '\\')
            *to++ = *reader->at++;
        else if (!(to = json_escape(reader, to)))
            return "an escape";
    }
    reader->at++;
    *to = 0;
    node->length = (size_t)(to - node->text);
    return NULL;
}

static bool json_digit(char byte) {
    return byte >= '0' && byte <= '9';
}

static const char *json_read_number(struct json_reader *reader) {
    char *start = reader->at + (*reader->at == '-');
    size_t length = strspn(start, "0123456789+-.eE");
    const char *point = memchr(start, '.', length);
    if (!json_digit(*start) || (point && !json_digit(point[1])))
        return "a value";
    if (*start == '0' && json_digit(start[1]))
        return "a number without leading zeros";
    char *end; /* strtod takes all that JSON does; what it takes besides is ruled out */
    strtod(start, &end);
    reader->at = end < start + length ? end : start + length;
    return end == start + length ? NULL : "a number";
}

static const char *json_read_scalar(struct json_reader *reader, struct json_node *node) {
    const char *word = node->type == 'n' ? "null" : node->type == 't' ? "true" : "false";
    if (node->type == '"')
        return json_read_string(reader, node);
    if (node->type == *word) {
        bool same = strncmp(reader->at, word, strlen(word)) == 0;
        reader->at += same ? strlen(word) : 0;
        return same ? NULL : "a value";
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

struct json_node *json_parse(char *text, size_t length, char error[JSON_ERROR_LENGTH]) {
    size_t most = 1; /* every value but the first follows one of these */
    for (size_t i = 0; i < length; i++)
        most += text[i] == ',' || text[i] == ':' || text[i] == '[' || text[i] == '{';
    struct json_reader reader = {.at = text};
    reader.nodes = most < INT_MAX ? malloc(most * sizeof *reader.nodes) : NULL;
    const char *wrong = reader.nodes ? NULL : "less (out of memory)";
    for (size_t bytes = 1; !wrong && reader.at < text + length; reader.at += bytes) {
        bytes = json_utf8(reader.at, length - (size_t)(reader.at - text));
        wrong = bytes ? NULL : "UTF-8";
    }
    if (!wrong) {
        reader.at = text;
        wrong = json_read(&reader, 0);
    }
    if (!wrong && (json_space(&reader) || reader.at != text + length))
        wrong = "the end";
    if (!wrong)
        return reader.nodes;
    snprintf(error, JSON_ERROR_LENGTH, "byte %td: expected %s", reader.at - text, wrong);
    free(reader.nodes);
    return NULL;
}

static void json_append(struct json_buffer *out, const char *text, size_t length) {
    if (out->capacity - out->length <= length) {
        out->capacity = 2 * (out->capacity + length) + 1;
        out->data = realloc(out->data, out->capacity);
        if (!out->data)
            abort();
    }
    memcpy(out->data + out->length, text, length);
    out->length += length;
    out->data[out->length] = 0;
}

void json_put(struct json_buffer *out, const char *token) {
    if (out->length && !strchr("{[:,\n", out->data[out->length - 1]) && !strchr("}]:\n", *token))
        json_append(out, ",", 1);
    json_append(out, token, strlen(token));
}

void json_string(struct json_buffer *out, const char *text, size_t length) {
    json_put(out, "\"");
    for (size_t at = 0, bytes; at < length; at += bytes ? bytes : 1) {
        bytes = json_utf8(text + at, length - at);
        const char *letter = memchr(json_meanings, text[at], sizeof json_meanings - 1);
        char escape[8] = {'\\', letter ? json_letters[letter - json_meanings] : 0};
        if (letter && *letter != '/')
            json_append(out, escape, 2);
        else if ((unsigned char)text[at] < ' ')
            json_append(out, escape, (size_t)sprintf(escape, "\\u%04x", (unsigned)text[at]));
        else
            json_append(out, bytes ? text + at : "\xEF\xBF\xBD", bytes ? bytes : 3);
    }
    json_append(out, "\"", 1);
}

void json_key(struct json_buffer *out, const char *name) {
    json_string(out, name, strlen(name));
    json_put(out, ":");
}

void json_int(struct json_buffer *out, int64_t value) {
    char text[32];
    snprintf(text, sizeof text, "%" PRId64, value);
    json_put(out, text);
}

void json_double(struct json_buffer *out, double value) {
    char text[32];
    int digits = 14;
    do {
        snprintf(text, sizeof text, "%.*g", ++digits, value);
    } while (digits < 17 && strtod(text, NULL) != value);
    json_put(out, isfinite(value) ? text : "null");
}
#endif /* JSON_IMPLEMENTATION */
