/* gguf.h: GGUF files, whole or in parts, read through memory maps and believed in nothing.
 *
 *     char error[ERROR_LENGTH];
 *     struct gguf *file = gguf_open("model.gguf", error);
 *     if (!file)
 *         fprintf(stderr, "dynamo: %s\n", error);
 *     ... gguf_tensor(file, "blk.3.attn_q.weight")->data ...
 *     gguf_close(file);
 *
 * Owns the maps and two tables sorted by name: keys and tensors. Names, strings and tensors point
 * into the maps and live until gguf_close. The files must not shrink before.
 * Data flow: map -> cursor (gguf_take) -> tables. Every number is checked (gguf_expect) before it
 * is used, and a count against the bytes that are left before anything of its size is allocated.
 * The first thing that is wrong is kept as one line; what follows reads zeros and stops.
 * Refuses: big-endian files, and to know what keys and tensors mean. Not thread-safe, except for
 * reading tensors.
 * Define GGUF_IMPLEMENTATION in one file, before including this. Read next: model.h. */
#ifndef GGUF_H
#define GGUF_H

#include "text.h"

#ifdef __CUDACC__ /* also on a GPU */
#define GGUF_INLINE static inline __host__ __device__
#else
#define GGUF_INLINE static inline
#endif

/* Types of tensor elements, as GGUF numbers them. */
enum tensor_type {
    TYPE_F32 = 0,
    TYPE_F16 = 1,
    TYPE_Q4_0 = 2,
    TYPE_Q8_0 = 8,
    TYPE_Q4_K = 12,
    TYPE_Q6_K = 14,
    TYPE_BF16 = 30,
    TYPE_MXFP4 = 39
};
/* Others that are read: kept as Q8_0, since no kernel multiplies them (repack.h). */
enum stored_type {
    STORED_Q4_1 = 3,
    STORED_Q5_0 = 6,
    STORED_Q5_1 = 7,
    STORED_Q2_K = 10,
    STORED_Q3_K = 11,
    STORED_Q5_K = 13,
    STORED_IQ4_NL = 20,
    STORED_IQ4_XS = 23
};
enum { GGUF_EARLY_MXFP4 = 4 }; /* a number that is free again; the later one is 39 */
/* One that GGUF does not have: a byte a weight. No kernel multiplies it, but its cost is known. */
#define TYPE_FP8 ((enum tensor_type)64)

/* Types of key values, as GGUF numbers them; it also has u8, i8, u16, i16, u64, i64 and f64. */
enum gguf_value_type { GGUF_U32 = 4, GGUF_I32, GGUF_F32, GGUF_BOOL, GGUF_STRING, GGUF_ARRAY };

/* A string inside the mapped file: not ended by a zero byte. */
struct gguf_string {
    const char *data;
    size_t length;
};

/* An array value. `values` are the raw little-endian elements, at any alignment (memcpy them);
 * for an array of strings `strings` is used instead. */
struct gguf_array {
    enum gguf_value_type type;
    size_t count;
    const void *values;
    const struct gguf_string *strings;
};

/* A tensor: a matrix of `rows` rows (outputs) of `cols` contiguous elements (inputs); a vector
 * has one row, and of several matrices, one for each expert, the rows are one after another. `data`
 * points into mapped memory. `bytes` is 0 for a type that is not read. */
struct tensor {
    struct gguf_string name;
    enum tensor_type type;
    int64_t rows, cols;
    size_t bytes;
    const void *data;
    size_t period; /* 0; or less than `bytes`, and whole blocks: byte i is byte i % period */
    int stored;    /* 0; or enum stored_type: `type` and `bytes` are what repack.h makes of it */
    bool asked;    /* gguf_tensor found it */
    size_t stored_bytes; /* of `data`, where stored is not 0 */
};

struct gguf_block { /* elements that share scales, or one; no bytes: a type of no use here */
    uint16_t elements, bytes;
};

struct gguf; /* an open file, with all its parts */

/* Opens a GGUF v2/v3 file; of a split one all parts, whichever is named. A file of another format
 * opens too, without keys and tensors: gguf_raw. NULL: `error` holds one line: path, key or tensor,
 * what was found, what was expected, a hint. */
struct gguf *gguf_open(const char *path, char error[ERROR_LENGTH]);
void gguf_close(struct gguf *file);

/* Values by key; integers of any width and sign, if the value fits. False: the key is not there; or
 * it has another type, and then a line lands in gguf_error. */
bool gguf_get_int(struct gguf *file, const char *key, int64_t *value);
bool gguf_get_float(struct gguf *file, const char *key, double *value);
bool gguf_get_bool(struct gguf *file, const char *key, bool *value);
bool gguf_get_string(struct gguf *file, const char *key, struct gguf_string *value);
bool gguf_get_array(struct gguf *file, const char *key, struct gguf_array *value);

const struct tensor *gguf_tensor(const struct gguf *file, const char *name); /* NULL: not there */
/* All tensors, and the names of the keys that nobody has asked for so far, by name; *at: 0 to begin
 * with. NULL: there are no more. */
const struct tensor *gguf_each_tensor(const struct gguf *file, size_t *at);
const struct gguf_string *gguf_unasked_key(const struct gguf *file, size_t *at);
/* Its data will not be needed soon: its memory is given back, and it is read again if touched. */
void gguf_release(const struct tensor *tensor);
const char *gguf_type_name(enum tensor_type type);
struct gguf_block gguf_block(enum tensor_type type);
const void *gguf_raw(const struct gguf *file, size_t *size); /* all bytes; NULL: it is GGUF */
bool gguf_equals(struct gguf_string string, const char *text);
int gguf_shown(struct gguf_string string); /* bytes of it in a message, for "%.*s" */

/* The scale and the offset of part [0, 8) of a Q4_K block, 6 bits each, from the 12 bytes that hold
 * them behind d and m: weight = d * scale * bits - m * least. The last four parts have their top
 * two bits elsewhere. */
GGUF_INLINE void gguf_q4_k_scales(const uint8_t *packed, int part, int *scale, int *least) {
    int low = part % 4;
    *scale = packed[low] & 63;
    *least = packed[low + 4] & 63;
    if (part >= 4) {
        *scale = (packed[low + 8] & 15) | packed[low] >> 6 << 4;
        *least = packed[low + 8] >> 4 | packed[low + 4] >> 6 << 4;
    }
}

/* For whoever checks what a file says: gguf_about composes the name of the key or tensor at hand,
 * which begins the next message; gguf_expect keeps the first failure and returns whether there is
 * none; gguf_error is that line, or "". */
__attribute__((format(printf, 2, 3))) const char *gguf_about(struct gguf *file, const char *format,
                                                             ...);
__attribute__((format(printf, 3, 4))) bool gguf_expect(struct gguf *file, bool condition,
                                                       const char *format, ...);
void gguf_expect_complete(struct gguf *file, size_t bytes); /* it has so many, or more */
const char *gguf_error(const struct gguf *file);

#endif /* GGUF_H */

#ifdef GGUF_IMPLEMENTATION
#undef GGUF_IMPLEMENTATION

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the format is little-endian");

enum {
    GGUF_ENTRY_BYTES = 13,      /* the least that a key takes in a file; a tensor takes more */
    GGUF_MAX_EXTENT = 1 << 30,  /* of a dimension: two of them and a type stay below 2^63 */
    GGUF_MAX_ENTRIES = 1 << 16, /* keys, tensors: far more than any model has */
    GGUF_MAX_STRINGS = 1 << 24, /* in all arrays of a file */
    GGUF_N_VALUES = 13
};
#define GGUF_MAX_OFFSET ((uint64_t)1 << 62) /* what is added to it stays below 2^64 */

struct gguf_key {
    struct gguf_string name; /* first, as in struct tensor: gguf_compare_names */
    bool is_array, asked;
    struct gguf_array value; /* a lone value is an array of one */
};

struct gguf {
    char path[200];                      /* its end, where it is longer */
    char error[ERROR_LENGTH];            /* the first thing that was wrong, or "" */
    char name[128];                      /* what gguf_about composed last */
    struct gguf_string item;             /* the key or tensor at hand, for messages */
    const uint8_t *map;                  /* (size) */
    size_t size, at;                     /* [0, at) has been read, [at, size) has not */
    struct gguf_key *keys;               /* (n_keys) by name */
    struct tensor *tensors;              /* (n_tensors) by name */
    size_t n_keys, n_tensors, n_strings; /* strings: of arrays */
    struct gguf *next;                   /* a part that was joined */
};

static const struct {
    const char *name;
    size_t bytes; /* the least that one takes */
} gguf_values[] = {{"u8", 1},  {"i8", 1},  {"u16", 2},  {"i16", 2},    {"u32", 4},
                   {"i32", 4}, {"f32", 4}, {"bool", 1}, {"string", 8}, {"array", 0},
                   {"u64", 8}, {"i64", 8}, {"f64", 8}};

enum { GGUF_INTEGERS = 0xc3f, GGUF_FLOATS = 0x1040 }; /* bit i: type i */
enum { GGUF_STORED = 0x902cc8 };                      /* likewise: enum stored_type */

static const char *const gguf_types[] = {
    "F32",          "F16",    "Q4_0",         "Q4_1",      "type 4 (in early files MXFP4)",
    [6] = "Q5_0",   "Q5_1",   "Q8_0",         "Q8_1",      "Q2_K",
    "Q3_K",         "Q4_K",   "Q5_K",         "Q6_K",      "Q8_K",
    "IQ2_XXS",      "IQ2_XS", "IQ3_XXS",      "IQ1_S",     "IQ4_NL",
    "IQ3_S",        "IQ2_S",  "IQ4_XS",       "I8",        "I16",
    "I32",          "I64",    "F64",          "IQ1_M",     "BF16",
    [34] = "TQ1_0", "TQ2_0",  [39] = "MXFP4", [64] = "FP8"};

static const struct gguf_block gguf_blocks[] = {
    [TYPE_F32] = {1, 4},        [TYPE_F16] = {1, 2},         [TYPE_Q4_0] = {32, 18},
    [TYPE_Q8_0] = {32, 34},     [TYPE_Q4_K] = {256, 144},    [TYPE_Q6_K] = {256, 210},
    [TYPE_BF16] = {1, 2},       [TYPE_MXFP4] = {32, 17},     [TYPE_FP8] = {1, 1},
    [STORED_Q4_1] = {32, 20},   [STORED_Q5_0] = {32, 22},    [STORED_Q5_1] = {32, 24},
    [STORED_Q2_K] = {256, 84},  [STORED_Q3_K] = {256, 110},  [STORED_Q5_K] = {256, 176},
    [STORED_IQ4_NL] = {32, 18}, [STORED_IQ4_XS] = {256, 136}};

static struct gguf_string gguf_text(const char *text) {
    return (struct gguf_string){text, strlen(text)};
}

bool gguf_equals(struct gguf_string string, const char *text) {
    return string.length == strlen(text) && !memcmp(string.data, text, string.length);
}

int gguf_shown(struct gguf_string string) {
    return (int)(string.length < 64 ? string.length : 64);
}

const char *gguf_type_name(enum tensor_type type) {
    bool known = (size_t)type < sizeof gguf_types / sizeof *gguf_types && gguf_types[type];
    return known ? gguf_types[type] : "a type unknown here";
}

struct gguf_block gguf_block(enum tensor_type type) {
    bool known = (size_t)type < sizeof gguf_blocks / sizeof *gguf_blocks;
    return known ? gguf_blocks[type] : (struct gguf_block){0, 0};
}

const char *gguf_error(const struct gguf *file) {
    return file->error;
}

const char *gguf_about(struct gguf *file, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(file->name, sizeof file->name, format, arguments);
    va_end(arguments);
    file->item = gguf_text(file->name);
    return file->name;
}

bool gguf_expect(struct gguf *file, bool condition, const char *format, ...) {
    if (condition || file->error[0])
        return !file->error[0];
    int length = (int)(file->item.length < 100 ? file->item.length : 100);
    int used = snprintf(file->error, sizeof file->error, "%s: %.*s%s", file->path, length,
                        file->item.data, length ? ": " : "");
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(file->error + used, sizeof file->error - (size_t)used, format, arguments);
    va_end(arguments);
    fail_clean(file->error);
    return false;
}

/* A number with a comma before each three digits. */
static const char *gguf_digits(char text[32], size_t number) {
    char *at = text + 31;
    *at = 0;
    for (int i = 0; number > 0 || i == 0; i++, number /= 10) {
        if (i > 0 && i % 3 == 0)
            *--at = ',';
        *--at = (char)('0' + number % 10);
    }
    return at;
}

void gguf_expect_complete(struct gguf *file, size_t bytes) {
    char is[32], should[32];
    gguf_expect(file, file->size >= bytes, "incomplete: %s of %s bytes",
                gguf_digits(is, file->size), gguf_digits(should, bytes));
}

static int gguf_compare_names(const void *left_entry, const void *right_entry) {
    const struct gguf_string *left = left_entry, *right = right_entry;
    size_t shared = left->length < right->length ? left->length : right->length;
    int order = memcmp(left->data, right->data, shared);
    return order ? order : (left->length > right->length) - (left->length < right->length);
}

/* Both tables' entries begin with their names. */
static void gguf_sort(struct gguf *file, void *table, size_t count, size_t bytes_each) {
    if (count)
        qsort(table, count, bytes_each, gguf_compare_names);
    for (size_t i = 1; i < count; i++) {
        const char *entry = (const char *)table + i * bytes_each;
        file->item = *(const struct gguf_string *)entry;
        gguf_expect(file, gguf_compare_names(entry - bytes_each, entry) != 0, "is there twice");
    }
}

static void *gguf_search(const void *table, size_t count, size_t bytes_each, const char *name) {
    struct gguf_string wanted = gguf_text(name);
    return count ? bsearch(&wanted, table, count, bytes_each, gguf_compare_names) : NULL;
}

static void *gguf_allocate(struct gguf *file, size_t count, size_t bytes_each) {
    void *memory = calloc(count + 1, bytes_each); /* never empty: NULL is a failure */
    gguf_expect(file, memory, "out of memory");
    return memory;
}

/* ---- reading: after a failure all is zeros, so that only loops must look at `error` ---- */

static const void *gguf_take(struct gguf *file, size_t bytes) {
    static const uint8_t zeros[8];
    if (!gguf_expect(file, bytes <= file->size - file->at,
                     "ends too early, after %zu bytes; is it complete?", file->size))
        return zeros;
    file->at += bytes;
    return file->map + file->at - bytes;
}

static uint64_t gguf_take_int(struct gguf *file, size_t bytes) {
    uint64_t value = 0;
    memcpy(&value, gguf_take(file, bytes), bytes);
    return value;
}

/* A count of things, which must have room in what is left of the file. */
static size_t gguf_take_count(struct gguf *file, size_t bytes_each, size_t most) {
    uint64_t count = gguf_take_int(file, 8);
    size_t room = (file->size - file->at) / bytes_each;
    gguf_expect(file, count <= room, "got %ju, but only %zu have room; is it complete?",
                (uintmax_t)count, room);
    gguf_expect(file, count <= most, "got %ju, expected at most %zu", (uintmax_t)count, most);
    return file->error[0] ? 0 : (size_t)count;
}

static struct gguf_string gguf_take_string(struct gguf *file) {
    size_t length = gguf_take_count(file, 1, SIZE_MAX);
    return (struct gguf_string){gguf_take(file, length), length};
}

static void gguf_take_key(struct gguf *file, struct gguf_key *key) {
    gguf_about(file, "a key");
    file->item = key->name = gguf_take_string(file);
    uint64_t type = gguf_take_int(file, 4);
    key->is_array = type == GGUF_ARRAY;
    type = key->is_array ? gguf_take_int(file, 4) : type;
    if (!gguf_expect(file, type < GGUF_N_VALUES && type != GGUF_ARRAY,
                     "got an unknown value type %ju", (uintmax_t)type))
        return;
    size_t bytes_each = gguf_values[type].bytes;
    size_t most = type == GGUF_STRING ? GGUF_MAX_STRINGS - file->n_strings : SIZE_MAX;
    size_t count = key->is_array ? gguf_take_count(file, bytes_each, most) : 1;
    key->value = (struct gguf_array){(enum gguf_value_type)type, count, NULL, NULL};
    if (type != GGUF_STRING) {
        key->value.values = gguf_take(file, count * bytes_each);
        return;
    }
    struct gguf_string *strings = gguf_allocate(file, count, sizeof *strings);
    for (size_t i = 0; i < count && !file->error[0]; i++)
        strings[i] = gguf_take_string(file);
    file->n_strings += key->is_array ? count : 0;
    key->value.strings = strings;
}

static void gguf_keep_as_q8_0(struct tensor *tensor) {
    struct gguf_block block = gguf_block(TYPE_Q8_0);
    tensor->stored = (int)tensor->type;
    tensor->stored_bytes = tensor->bytes;
    tensor->type = TYPE_Q8_0;
    tensor->bytes = (size_t)(tensor->rows * (tensor->cols / block.elements)) * block.bytes;
}

/* Tensors lie in the order of their descriptions: this one's offset is `end` or more, and `end`
 * moves behind it. `data` is left as if the data began at address 0. */
static void gguf_take_tensor(struct gguf *file, struct tensor *tensor, size_t alignment,
                             size_t *end) {
    gguf_about(file, "a tensor");
    file->item = tensor->name = gguf_take_string(file);
    uint64_t n_dims = gguf_take_int(file, 4), extents[4] = {1, 1, 1, 1};
    for (size_t i = 0; i < n_dims && i < 4; i++)
        extents[i] = gguf_take_int(file, 8);
    bool flat = n_dims >= 1 && n_dims <= 4 && extents[3] == 1;
    bool sane = extents[0] - 1 < GGUF_MAX_EXTENT && extents[1] - 1 < GGUF_MAX_EXTENT &&
                extents[2] - 1 < GGUF_MAX_EXTENT && extents[1] * extents[2] <= GGUF_MAX_EXTENT;
    gguf_expect(file, flat && sane,
                "got %ju dimensions, (%ju, %ju, %ju), expected 1 to 3, and 1 to 2^30 rows and "
                "columns",
                (uintmax_t)n_dims, (uintmax_t)extents[2], (uintmax_t)extents[1],
                (uintmax_t)extents[0]);
    uint64_t type = gguf_take_int(file, 4), offset = gguf_take_int(file, 8);
    struct gguf_block block = gguf_block((enum tensor_type)type);
    size_t elements = block.bytes ? block.elements : 1;
    gguf_expect(file, extents[0] % elements == 0, "got %ju columns, expected a multiple of %zu",
                (uintmax_t)extents[0], elements);
    if (!gguf_expect(file, offset % alignment == 0 && offset >= *end && offset <= GGUF_MAX_OFFSET,
                     "begins at byte %ju of the data, expected a multiple of %zu from %zu on",
                     (uintmax_t)offset, alignment, *end))
        return;
    tensor->type = (enum tensor_type)type;
    tensor->rows = (int64_t)(extents[1] * extents[2]);
    tensor->cols = (int64_t)extents[0];
    tensor->bytes = block.bytes * (extents[0] / elements) * (size_t)tensor->rows;
    tensor->data = (const void *)(uintptr_t)offset;
    *end = offset + tensor->bytes;
    if (type < 32 && GGUF_STORED >> type & 1)
        gguf_keep_as_q8_0(tensor);
}

static void gguf_take_tensors(struct gguf *file, size_t n_tensors, size_t alignment) {
    size_t end = 0;
    file->tensors = gguf_allocate(file, n_tensors, sizeof *file->tensors);
    for (; file->n_tensors < n_tensors && !file->error[0]; file->n_tensors++)
        gguf_take_tensor(file, &file->tensors[file->n_tensors], alignment, &end);
    size_t start = (file->at + alignment - 1) / alignment * alignment;
    gguf_about(file, "%s", "");
    gguf_expect_complete(file, n_tensors ? start + end : 0);
    for (size_t i = 0; i < file->n_tensors && !file->error[0]; i++)
        file->tensors[i].data = file->map + start + (uintptr_t)file->tensors[i].data;
}

static void gguf_parse(struct gguf *file) {
    file->at = 4;
    uint32_t version = (uint32_t)gguf_take_int(file, 4);
    gguf_expect(file, version == 2 || version == 3,
                "got GGUF version %u, expected 2 or 3; convert an old or big-endian file again",
                version);
    gguf_about(file, "tensors");
    size_t n_tensors = gguf_take_count(file, GGUF_ENTRY_BYTES, GGUF_MAX_ENTRIES);
    gguf_about(file, "keys");
    size_t n_keys = gguf_take_count(file, GGUF_ENTRY_BYTES, GGUF_MAX_ENTRIES);
    file->keys = gguf_allocate(file, n_keys, sizeof *file->keys);
    for (; file->n_keys < n_keys && !file->error[0]; file->n_keys++)
        gguf_take_key(file, &file->keys[file->n_keys]);
    if (file->error[0])
        return;
    gguf_sort(file, file->keys, n_keys, sizeof *file->keys);
    int64_t alignment = 32;
    gguf_get_int(file, gguf_about(file, "general.alignment"), &alignment);
    bool power = alignment >= 8 && alignment <= GGUF_MAX_EXTENT && !(alignment & (alignment - 1));
    if (gguf_expect(file, power, "got %jd, expected a power of two from 8 on",
                    (intmax_t)alignment)) {
        gguf_take_tensors(file, n_tensors, (size_t)alignment);
        gguf_sort(file, file->tensors, file->n_tensors, sizeof *file->tensors);
    }
}

/* ---- values by key ---- */

static const struct gguf_array *gguf_find(struct gguf *file, const char *name, bool is_array,
                                          unsigned types, const char *expected) {
    struct gguf_key *key = gguf_search(file->keys, file->n_keys, sizeof *key, name);
    if (!key)
        return NULL;
    key->asked = true;
    bool fits = key->is_array == is_array && types >> key->value.type & 1;
    file->item = key->name;
    gguf_expect(file, fits, "got %s%s, expected %s", key->is_array ? "an array of " : "",
                gguf_values[key->value.type].name, expected);
    return fits ? &key->value : NULL;
}

bool gguf_get_int(struct gguf *file, const char *key, int64_t *value) {
    const struct gguf_array *found = gguf_find(file, key, false, GGUF_INTEGERS, "an integer");
    if (!found)
        return false;
    uint64_t bits = 0;
    size_t bytes = gguf_values[found->type].bytes, unused = 64 - 8 * bytes;
    memcpy(&bits, found->values, bytes);
    bool is_signed = found->type % 2; /* as GGUF numbers them */
    if (!is_signed && bits > INT64_MAX)
        return gguf_expect(file, false, "got %ju, expected less than 2^63", (uintmax_t)bits);
    *value = is_signed ? (int64_t)(bits << unused) >> unused : (int64_t)bits;
    return true;
}

bool gguf_get_float(struct gguf *file, const char *key, double *value) {
    const struct gguf_array *found = gguf_find(file, key, false, GGUF_FLOATS, "a float");
    float single;
    if (found && found->type == GGUF_F32)
        *value = (double)*(float *)memcpy(&single, found->values, sizeof single);
    else if (found)
        memcpy(value, found->values, sizeof *value);
    return found;
}

bool gguf_get_bool(struct gguf *file, const char *key, bool *value) {
    const struct gguf_array *found = gguf_find(file, key, false, 1 << GGUF_BOOL, "a bool");
    if (found)
        *value = *(const uint8_t *)found->values != 0;
    return found;
}

bool gguf_get_string(struct gguf *file, const char *key, struct gguf_string *value) {
    const struct gguf_array *found = gguf_find(file, key, false, 1 << GGUF_STRING, "a string");
    if (found)
        *value = found->strings[0];
    return found;
}

bool gguf_get_array(struct gguf *file, const char *key, struct gguf_array *value) {
    const struct gguf_array *found = gguf_find(file, key, true, ~0u, "an array");
    if (found)
        *value = *found;
    return found;
}

void gguf_release(const struct tensor *tensor) {
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), from = (uintptr_t)tensor->data;
    size_t bytes = tensor->stored ? tensor->stored_bytes : tensor->bytes;
    uintptr_t first = (from + page - 1) / page * page, end = (from + bytes) / page * page;
    if (end > first)
        (void)madvise((void *)first, end - first, MADV_DONTNEED);
}

const struct tensor *gguf_tensor(const struct gguf *file, const char *name) {
    struct tensor *found = gguf_search(file->tensors, file->n_tensors, sizeof *file->tensors, name);
    if (found)
        found->asked = true;
    return found;
}

const struct gguf_string *gguf_unasked_key(const struct gguf *file, size_t *at) {
    while (*at < file->n_keys && file->keys[*at].asked)
        ++*at;
    return *at < file->n_keys ? &file->keys[(*at)++].name : NULL;
}

const struct tensor *gguf_each_tensor(const struct gguf *file, size_t *at) {
    return *at < file->n_tensors ? &file->tensors[(*at)++] : NULL;
}

/* ---- opening ---- */

static void gguf_map(struct gguf *file, const char *path) {
    struct stat status;
    /* O_NONBLOCK: opening a pipe without a writer must not hang. */
    int descriptor = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    bool open_ok = descriptor >= 0 && fstat(descriptor, &status) == 0;
    if (gguf_expect(file, open_ok, "%s", strerror(errno)) &&
        gguf_expect(file, !S_ISDIR(status.st_mode), "is a folder; name the file inside") &&
        gguf_expect(file, S_ISREG(status.st_mode), "is not a regular file") &&
        gguf_expect(file, status.st_size > 0, "is empty")) {
        size_t size = (size_t)status.st_size;
        void *map = mmap(NULL, size, PROT_READ, MAP_PRIVATE, descriptor, 0);
        if (gguf_expect(file, map != MAP_FAILED, "cannot be mapped: %s", strerror(errno))) {
            file->map = map;
            file->size = size;
        }
    }
    if (descriptor >= 0)
        close(descriptor);
}

const void *gguf_raw(const struct gguf *file, size_t *size) {
    *size = file->size;
    return file->size >= 4 && !memcmp(file->map, "GGUF", 4) ? NULL : file->map;
}

void gguf_close(struct gguf *file) {
    while (file) {
        struct gguf *next = file->next;
        for (size_t i = 0; i < file->n_keys; i++)
            free((void *)file->keys[i].value.strings);
        if (file->map)
            munmap((void *)file->map, file->size);
        free(file->keys);
        free(file->tensors);
        free(file);
        file = next;
    }
}

/* Leaves what was wrong with the file in `error`; whether nothing was. */
static bool gguf_is_fine(const struct gguf *file, char *error) {
    (void)fail(error, "%s", file->error);
    return !error[0];
}

/* A file by itself, be it a part or whole. */
static struct gguf *gguf_open_one(const char *path, char *error) {
    struct gguf *file = calloc(1, sizeof *file);
    (void)fail(error, "%s: out of memory", path);
    if (!file)
        return NULL;
    size_t size, length = strlen(path), most = sizeof file->path - 1;
    snprintf(file->path, sizeof file->path, "%s", path + (length > most ? length - most : 0));
    gguf_about(file, "%s", "");
    gguf_map(file, path);
    if (file->map && !gguf_raw(file, &size))
        gguf_parse(file);
    if (gguf_is_fine(file, error))
        return file;
    gguf_close(file);
    return NULL;
}

/* ---- files in parts ----
 *
 * A large model often comes as several GGUF files, NAME-00001-of-00003.gguf and so on. The first
 * has all that the model's keys say, the others tensors and three keys that every part has:
 *     split.no             which part it is, counted from 0 (in names: from 1)
 *     split.count          how many parts there are
 *     split.tensors.count  tensors of all parts together
 * Any part may be named: its name gives those of the others, which lie beside it. A part must fit
 * its name and the first part, and have no tensor that another has; if not, an error names it. */

enum { SPLIT_ENDING = 32, SPLIT_MAX_PARTS = 99999 /* a name has five digits for it */ };

struct split {          /* a split model while it is put together */
    const char *path;   /* of the part that was named */
    size_t stem;        /* bytes of the path before the ending that tells the part */
    struct gguf *first; /* joined by the parts that were checked */
    int64_t n_parts, n_tensors;
};

static int64_t split_key(struct gguf *part, const char *key) {
    int64_t value = 0;
    bool found = gguf_get_int(part, gguf_about(part, "split.%s", key), &value);
    gguf_expect(part, found, "is missing; every part of a split model has it");
    return value;
}

static void split_ending(char ending[SPLIT_ENDING], int64_t no, int64_t n_parts) {
    snprintf(ending, SPLIT_ENDING, "-%05d-of-%05d.gguf", (int)no + 1, (int)n_parts);
}

/* Reads the keys of the part that was named, which its name must fit. */
static void split_read(struct split *split, struct gguf *file) {
    char ending[SPLIT_ENDING];
    split->n_tensors = split_key(file, "tensors.count");
    split->n_parts = split_key(file, "count");
    gguf_expect(file, split->n_parts >= 1 && split->n_parts <= SPLIT_MAX_PARTS,
                "got %jd, expected 1 to %d", (intmax_t)split->n_parts, SPLIT_MAX_PARTS);
    int64_t no = split_key(file, "no");
    if (!gguf_expect(file, no >= 0 && no < split->n_parts, "got %jd, expected 0 to %jd",
                     (intmax_t)no, (intmax_t)split->n_parts - 1))
        return;
    split_ending(ending, no, split->n_parts);
    size_t length = strlen(split->path), tail = strlen(ending);
    bool fits = length >= tail && !strcmp(split->path + length - tail, ending);
    gguf_expect(file, fits, "got %jd, expected a name that ends in %s", (intmax_t)no, ending);
    split->stem = length - tail;
}

/* Leaves gguf_error in the part if its keys tell that it is not this part of this model. */
static void split_check(const struct split *split, struct gguf *part, int64_t no) {
    static const char *const texts[] = {"general.architecture", "general.name"};
    static const char hint[] = "is it of another model?";
    const struct {
        const char *key;
        int64_t expected;
    } numbers[] = {{"count", split->n_parts}, {"no", no}, {"tensors.count", split->n_tensors}};
    for (size_t i = 0; i < 3; i++) {
        int64_t value = split_key(part, numbers[i].key);
        gguf_expect(part, value == numbers[i].expected, "got %jd, expected %jd; %s",
                    (intmax_t)value, (intmax_t)numbers[i].expected, hint);
    }
    for (size_t i = 0; i < 2; i++) { /* the first part has these, the others may */
        struct gguf_string got = {"", 0}, expected = got;
        bool both = gguf_get_string(split->first, texts[i], &expected) &&
                    gguf_get_string(part, gguf_about(part, "%s", texts[i]), &got);
        gguf_expect(part, !both || gguf_compare_names(&got, &expected) == 0,
                    "got %.*s, expected %.*s; %s", gguf_shown(got), got.data, gguf_shown(expected),
                    expected.data, hint);
    }
}

/* Adds the tensors of a part to the first's, which owns the part from now on. */
static void split_add(struct gguf *first, struct gguf *part) {
    size_t n_own = first->n_tensors, n = n_own + part->n_tensors;
    struct tensor *tensors = realloc(first->tensors, (n + 1) * sizeof *tensors);
    part->next = first->next;
    first->next = part;
    if (tensors)
        first->tensors = tensors;
    if (!gguf_expect(part, tensors, "out of memory"))
        return;
    memcpy(tensors + n_own, part->tensors, part->n_tensors * sizeof *tensors);
    first->n_tensors = n;
    gguf_sort(part, tensors, n, sizeof *tensors);
}

/* Opens a part, checks it (the first against itself) and joins it to the first. */
static bool split_take(struct split *split, int64_t no, char *error) {
    char path[4096], ending[SPLIT_ENDING]; /* no path that is longer can be opened */
    split_ending(ending, no, split->n_parts);
    snprintf(path, sizeof path, "%.*s%s", (int)split->stem, split->path, ending);
    struct gguf *part = gguf_open_one(path, error);
    size_t length = strlen(error);
    if (!part) {
        snprintf(error + length, ERROR_LENGTH - length, "; it is part %jd of %jd", (intmax_t)no + 1,
                 (intmax_t)split->n_parts);
        return false;
    }
    if (no == 0)
        split->first = part;
    split_check(split, part, no);
    if (no > 0)
        split_add(split->first, part);
    return gguf_is_fine(part, error);
}

/* All parts as one file, whichever was named. */
static struct gguf *split_open(struct split *split, char *error) {
    bool ok = true;
    for (int64_t no = 0; no < split->n_parts && ok; no++)
        ok = split_take(split, no, error);
    struct gguf *file = split->first;
    if (ok) {
        gguf_about(file, "split.tensors.count");
        gguf_expect(file, file->n_tensors == (uint64_t)split->n_tensors,
                    "got %jd, but the parts hold %zu", (intmax_t)split->n_tensors, file->n_tensors);
    }
    if (ok && gguf_is_fine(file, error))
        return file;
    gguf_close(file);
    return NULL;
}

struct gguf *gguf_open(const char *path, char error[ERROR_LENGTH]) {
    struct split split = {.path = path};
    struct gguf *file = gguf_open_one(path, error);
    int64_t n_parts = 1;
    if (!file)
        return NULL;
    gguf_get_int(file, gguf_about(file, "split.count"), &n_parts);
    if (n_parts != 1)
        split_read(&split, file);
    bool ok = gguf_is_fine(file, error);
    if (ok && n_parts == 1)
        return file;
    gguf_close(file);
    return ok ? split_open(&split, error) : NULL;
}

#endif /* GGUF_IMPLEMENTATION */
