/* source.h: what a MODEL argument names: a file, all parts of a split one, or random weights.
 *
 *     struct gguf *file = source_open("llama-70b-00001-of-00003.gguf", error);
 *     if (!file)
 *         fprintf(stderr, "dynamo: %s\n", error);
 *     ... gguf_tensor(file, "blk.79.ffn_up.weight") ... // of whichever part
 *     gguf_close(file);                                 // all parts
 *
 * A large model often comes as several GGUF files, NAME-00001-of-00003.gguf and so on. The first
 * has all that the model's keys say, the others tensors and three keys that every part has:
 *     split.no             which part it is, counted from 0 (in names: from 1)
 *     split.count          how many parts there are
 *     split.tensors.count  tensors of all parts together
 * Any part may be named: its name gives those of the others, which lie beside it. A part must fit
 * its name and the first part, and have no tensor that another has; if not, an error names it.
 * Define GGUF_IMPLEMENTATION and SOURCE_IMPLEMENTATION in one file, before including this.
 * Read next: random.h, model.h. */
#ifndef SOURCE_H
#define SOURCE_H

#include "gguf.h"

/* NULL: `error` is one line. */
struct gguf *source_open(const char *name, char error[ERROR_LENGTH]);

#endif /* SOURCE_H */

#ifdef SOURCE_IMPLEMENTATION
#undef SOURCE_IMPLEMENTATION
#define RANDOM_IMPLEMENTATION
#include "random.h"

#include <stdio.h>
#include <string.h>

enum { SOURCE_ENDING = 32, SOURCE_MAX_PARTS = 99999 /* a name has five digits for it */ };

struct source {        /* a split model while it is put together */
    struct gguf *file; /* the first part, joined by those that were checked */
    const char *path;  /* of the part that was named */
    size_t stem;       /* bytes of the path before the ending that tells the part */
    int64_t n_parts, n_tensors;
};

static int64_t source_key(struct gguf *part, const char *key) {
    int64_t value = 0;
    bool found = gguf_get_int(part, gguf_about(part, "split.%s", key), &value);
    gguf_expect(part, found, "is missing; every part of a split model has it");
    return value;
}

static void source_ending(char ending[SOURCE_ENDING], int64_t no, int64_t n_parts) {
    snprintf(ending, SOURCE_ENDING, "-%05d-of-%05d.gguf", (int)no + 1, (int)n_parts);
}

/* Reads the keys of the part that was named, which its name must fit. Returns its number. */
static int64_t source_read(struct source *source) {
    struct gguf *file = source->file;
    char ending[SOURCE_ENDING];
    source->n_tensors = source_key(file, "tensors.count");
    source->n_parts = source_key(file, "count");
    gguf_expect(file, source->n_parts >= 1 && source->n_parts <= SOURCE_MAX_PARTS,
                "got %jd, expected 1 to %d", (intmax_t)source->n_parts, SOURCE_MAX_PARTS);
    int64_t no = source_key(file, "no");
    if (!gguf_expect(file, no >= 0 && no < source->n_parts, "got %jd, expected 0 to %jd",
                     (intmax_t)no, (intmax_t)source->n_parts - 1))
        return 0;
    source_ending(ending, no, source->n_parts);
    size_t length = strlen(source->path), tail = strlen(ending);
    bool fits = length >= tail && !strcmp(source->path + length - tail, ending);
    gguf_expect(file, fits, "got %jd, expected a name that ends in %s", (intmax_t)no, ending);
    source->stem = fits ? length - tail : 0;
    return no;
}

static struct gguf *source_part(const struct source *source, int64_t no, char *error) {
    char path[4096], ending[SOURCE_ENDING]; /* no path that is longer can be opened */
    source_ending(ending, no, source->n_parts);
    snprintf(path, sizeof path, "%.*s%s", (int)source->stem, source->path, ending);
    struct gguf *part = gguf_open(path, error);
    size_t length = strlen(error);
    if (!part)
        snprintf(error + length, ERROR_LENGTH - length, "; it is part %jd of %jd", (intmax_t)no + 1,
                 (intmax_t)source->n_parts);
    return part;
}

static int source_shown(struct gguf_string text) { /* bytes of it in a message */
    return (int)(text.length < 64 ? text.length : 64);
}

/* Leaves gguf_error in the part if its keys tell that it is not this part of this model. */
static void source_check(const struct source *source, struct gguf *part, int64_t no) {
    static const char *const texts[] = {"general.architecture", "general.name"};
    static const char hint[] = "is it of another model?";
    const struct {
        const char *key;
        int64_t expected;
    } numbers[] = {{"count", source->n_parts}, {"no", no}, {"tensors.count", source->n_tensors}};
    for (size_t i = 0; i < 3; i++) {
        int64_t value = source_key(part, numbers[i].key);
        gguf_expect(part, value == numbers[i].expected, "got %jd, expected %jd; %s",
                    (intmax_t)value, (intmax_t)numbers[i].expected, hint);
    }
    for (size_t i = 0; i < 2; i++) { /* the first part has these, the others may */
        struct gguf_string text = {"", 0}, first = text;
        bool both = gguf_get_string(source->file, texts[i], &first) &&
                    gguf_get_string(part, gguf_about(part, "%s", texts[i]), &text);
        bool same =
            !both || (text.length == first.length && !memcmp(text.data, first.data, text.length));
        gguf_expect(part, same, "got %.*s, expected %.*s; %s", source_shown(text), text.data,
                    source_shown(first), first.data, hint);
    }
}

static bool source_ok(const struct gguf *part, char *error) {
    (void)fail(error, "%s", gguf_error(part));
    return !error[0];
}

/* Joins all parts to the first, whichever was named. */
static bool source_join(struct source *source, char *error) {
    int64_t named = source_read(source);
    if (!source_ok(source->file, error))
        return false;
    if (named > 0) {
        gguf_close(source->file);
        source->file = source_part(source, 0, error);
        if (!source->file)
            return false;
        source_check(source, source->file, 0);
    }
    bool ok = source_ok(source->file, error);
    for (int64_t no = 1; no < source->n_parts && ok; no++) {
        struct gguf *part = source_part(source, no, error);
        if (!part)
            return false;
        source_check(source, part, no);
        gguf_join(source->file, part);
        ok = source_ok(part, error);
    }
    size_t n_joined = gguf_n_tensors(source->file);
    gguf_about(source->file, "split.tensors.count");
    gguf_expect(source->file, !ok || n_joined == (uint64_t)source->n_tensors,
                "got %jd, but the parts hold %zu", (intmax_t)source->n_tensors, n_joined);
    return ok && source_ok(source->file, error);
}

struct gguf *source_open(const char *name, char error[ERROR_LENGTH]) {
    if (random_named(name))
        return random_open(name, error);
    struct source source = {.file = gguf_open(name, error), .path = name};
    int64_t n_parts = 1;
    if (source.file)
        gguf_get_int(source.file, gguf_about(source.file, "split.count"), &n_parts);
    if (n_parts == 1 || source_join(&source, error))
        return source.file;
    gguf_close(source.file);
    return NULL;
}

#endif /* SOURCE_IMPLEMENTATION */
