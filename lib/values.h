/* values.h: what options and the keys of request files take: texts, numbers, lists, sizes, devices.
 *
 * A kind of value is a function that reads it, and words for what it expects. A reader takes all of
 * `length` bytes, whatever stands behind them (a zero byte, or the rest of a JSON text), and looks
 * at nothing else; it returns false for what is no such value, or out of range. What it stores is
 * valid then. Texts are not copied. Read next: cli.h. */
#ifndef VALUES_H
#define VALUES_H

#include "../dynamo.h" /* struct sampling */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { VALUE_DEVICES = 64, VALUE_STOPS = 16 };

struct size { /* 512M or 8b: bytes, or KV blocks */
    int64_t value;
    bool blocks, given;
};

/* `cpu:4`: cpu, 0 to 3. `0-2,5`: CUDA devices 0, 1, 2, 5. In --prefill and --decode: positions in
 * --devices, or CUDA devices where --devices is not given. */
struct device_list {
    bool cpu;
    int n;
    int index[VALUE_DEVICES];
};

struct request_spec {
    const char *id;       /* NULL: the file gave none */
    char *prompt;         /* NULL if ids are given; may hold zero bytes and invalid UTF-8 */
    size_t prompt_length; /* bytes */
    int *ids;             /* (n_ids) token ids; NULL if a prompt is given */
    int n_ids;
    int n; /* tokens to write at most; -1: until the end token or the end of the context */
    struct sampling sampling;
    char *stop[VALUE_STOPS]; /* (n_stop) none of them empty */
    int n_stop;
    const char *system; /* NULL: none */
    char *error;        /* not NULL: this request is refused, for this reason (FILE:LINE: ...) */
};

struct value {
    char *text; /* (length); NULL: none was given */
    size_t length;
    double low, high;  /* of INT and REAL; low: of SIZE */
    const char *words; /* of CHOICE: f32|bf16 */
};

struct kind {
    bool (*read)(const struct value *value, void *target);
    char json;            /* the json_node's type */
    const char *expected; /* NULL: one of the words */
};

/* Their targets: bool; const char *; struct request_spec (three kinds); int; float; uint64_t;
 * struct size; struct device_list (PLACES: without cpu); int, which of the words, from 1. */
extern const struct kind FLAG, TEXT, PROMPT, STOP, IDS, INT, REAL, SEED, SIZE, DEVICES, PLACES,
    CHOICE;

#endif /* VALUES_H */

#ifdef VALUES_IMPLEMENTATION
#undef VALUES_IMPLEMENTATION

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

static bool read_flag(const struct value *value, void *target) {
    return *(bool *)target = !value->text;
}

static bool read_text(const struct value *value, void *target) {
    *(const char **)target = value->text;
    return strlen(value->text) == value->length;
}

static bool read_prompt(const struct value *value, void *target) {
    struct request_spec *request = target;
    request->prompt = value->text;
    request->prompt_length = value->length;
    return true;
}

static bool read_stop(const struct value *value, void *target) {
    struct request_spec *request = target;
    if (value->length == 0 || strlen(value->text) != value->length ||
        request->n_stop == VALUE_STOPS)
        return false;
    request->stop[request->n_stop++] = value->text;
    return true;
}

/* strtod takes more than we do: `bytes` are what a number may consist of. */
static bool read_number(const struct value *value, const char *bytes, double *number) {
    char *end;
    *number = strtod(value->text, &end);
    return value->length > 0 && strspn(value->text, bytes) >= value->length &&
           end == value->text + value->length && *number >= value->low && *number <= value->high;
}

static bool read_int(const struct value *value, void *target) {
    double number;
    bool good = read_number(value, "0123456789-", &number);
    *(int *)target = good ? (int)number : 0;
    return good;
}

static bool read_real(const struct value *value, void *target) {
    double number;
    bool good = read_number(value, "0123456789-+.eE", &number);
    *(float *)target = good ? (float)number : 0;
    return good;
}

static bool read_seed(const struct value *value, void *target) {
    errno = 0;
    *(uint64_t *)target = strtoull(value->text, NULL, 10);
    return value->length > 0 && strspn(value->text, "0123456789") >= value->length && errno == 0;
}

static bool read_size(const struct value *value, void *target) {
    static const char units[] = "bKMG";
    const char *last = value->text + value->length - 1;
    const char *unit = value->length > 0 ? memchr(units, *last, 4) : NULL;
    int shift = unit ? 10 * (int)(unit - units) : 0;
    uint64_t number;
    struct value digits = {.text = value->text, .length = value->length - (unit != NULL)};
    if (!read_seed(&digits, &number) || (double)number < value->low ||
        number > (uint64_t)1 << (53 - shift))
        return false;
    *(struct size *)target = (struct size){(int64_t)number << shift, unit == units, true};
    return true;
}

static bool take_int(const char **at, int *value) {
    *at += strspn(*at, " \t\r");
    size_t digits = strspn(*at, "0123456789");
    *value = digits < 10 ? atoi(*at) : -1;
    *at += digits;
    *at += strspn(*at, " \t\r");
    return digits > 0 && *value >= 0;
}

/* `1,15,7`, or where `ranges` are allowed `0-3,7`. How many numbers; 0: that is no list of at most
 * `capacity` numbers. */
static int read_list(const char *at, size_t length, bool ranges, int *list, int capacity) {
    const char *end = at + length;
    int n = 0, first, last;
    do {
        if (!take_int(&at, &first))
            return 0;
        last = first;
        if (ranges && *at == '-' && (++at, !take_int(&at, &last)))
            return 0;
        if (last < first || last - first >= capacity - n)
            return 0;
        while (first <= last)
            list[n++] = first++;
    } while (*at++ == ',');
    return at == end + 1 ? n : 0;
}

static bool read_ids(const struct value *value, void *target) {
    struct request_spec *request = target;
    int capacity = value->length < INT_MAX ? (int)value->length / 2 + 1 : 0;
    request->ids = malloc((size_t)capacity * sizeof *request->ids);
    if (request->ids)
        request->n_ids = read_list(value->text, value->length, false, request->ids, capacity);
    return request->n_ids > 0;
}

static bool read_places(const struct value *value, void *target) {
    struct device_list *list = target;
    list->n = read_list(value->text, value->length, true, list->index, VALUE_DEVICES);
    return list->n > 0;
}

static bool read_devices(const struct value *value, void *target) {
    struct device_list *list = target;
    list->cpu = strncmp(value->text, "cpu", 3) == 0;
    if (!list->cpu)
        return read_places(value, target);
    const char *at = value->text + 4;
    list->n = 1;
    bool good = value->length == 3 || (at[-1] == ':' && take_int(&at, &list->n) && !*at);
    for (int i = 0; i < list->n && i < VALUE_DEVICES; i++)
        list->index[i] = i;
    return good && list->n >= 1 && list->n <= VALUE_DEVICES;
}

static bool read_choice(const struct value *value, void *target) {
    const char *words = value->words;
    for (int choice = 1;; choice++) {
        size_t length = strcspn(words, "|");
        *(int *)target = choice;
        if (value->length == length && memcmp(value->text, words, length) == 0)
            return true;
        words += length;
        if (!*words++)
            return false;
    }
}

const struct kind FLAG = {read_flag, 0, "no value"};
const struct kind TEXT = {read_text, '"', "a text without zero bytes"};
const struct kind PROMPT = {read_prompt, '"', "a text"};
const struct kind STOP = {read_stop, '"', "at most 16 texts, none empty or with a zero byte"};
const struct kind IDS = {read_ids, '[', "token ids, such as 1,15,7"};
const struct kind INT = {read_int, '0', "a whole number"};
const struct kind REAL = {read_real, '0', "a number"};
const struct kind SEED = {read_seed, '0', "a whole number from 0 to 18446744073709551615"};
const struct kind SIZE = {read_size, 0, "bytes such as 512M (K, M, G) or blocks such as 8b"};
const struct kind DEVICES = {read_devices, 0,
                             "cpu:N, or device numbers such as 0,1 or 0-7; at most 64"};
const struct kind PLACES = {read_places, 0, "positions in --devices, such as 0,1 or 0-7"};
const struct kind CHOICE = {read_choice, 0, NULL};

#endif /* VALUES_IMPLEMENTATION */
