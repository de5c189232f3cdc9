/* files.h: what the tests that run the program share: their folder of files, the answers in its
 * output, and what is expected of a run.
 *
 *     write_file(check, "requests", text, length);
 *     expect(check, "model.bin -f $T/requests -n 4", 0, "The cat*", NULL);
 *     struct outcome o = run(check, "model.bin -f $T/requests --json --stats");
 *     CHECK(number(&o, "stats", "pages_out") > 0 && !strcmp(answer(&o, "a", "ids"), "[1,2]"), ...);
 *
 * $T is a folder of this test program's own, which goes when it ends. Includes json.h: one of the
 * files that a test is made of defines JSON_IMPLEMENTATION. */
#ifndef FILES_H
#define FILES_H

#include "child.h"
#include "../lib/json.h"

#include <fnmatch.h>
#include <stdint.h>
#include <sys/stat.h>

#define DATA               "test/data/"
#define AIDREAMS           DATA "aidreams260K.bin"
#define AIDREAMS_TOKENIZER DATA "aidreams_tokenizer.bin"
#define NO_TOKENIZER       DATA "ref/qwen3-f32.gguf"

/* A row of the table of tests. */
#define TEST(name)                                                                                 \
    { #name, name }

enum { PATH_LENGTH = 256 };

/* ---- files ---- */

static inline void shell(struct check *check, const char *command) {
    CHECK(system(command) == 0, "%s", command);
}

/* The pieces of a list. Returns how many there are. */
static inline int split(const char *list, const char *between, char *items[], int limit) {
    int n = 0;
    char *rest = keep(strlen(list) + 1);
    for (strcpy(rest, list); rest && n < limit; n++)
        items[n] = strsep(&rest, between);
    return n;
}

/* The path of a file in $T. */
static inline const char *scratch(const char *name) {
    char *path = keep(PATH_LENGTH);
    snprintf(path, PATH_LENGTH, "%s/%s", getenv("T"), name);
    return path;
}

/* `line` with " for each ': JSON as C can say it. Returns the length. */
static inline int put_json(char *text, const char *line) {
    int n = 0;
    for (; line[n]; n++)
        text[n] = line[n] == '\'' ? '"' : line[n];
    text[n] = 0;
    return n;
}

static inline void write_file(struct check *check, const char *name, const void *bytes,
                              size_t length) {
    FILE *file = fopen(scratch(name), "wb");
    bool ok = file && fwrite(bytes, 1, length, file) == length;
    ok = file && fclose(file) == 0 && ok;
    CHECK(ok, "cannot write $T/%s", name);
}

/* $T/requests: lines as put_json takes them. */
static inline void write_requests(struct check *check, const char *lines) {
    char *text = keep(strlen(lines) + 1);
    size_t length = (size_t)put_json(text, lines);
    write_file(check, "requests", text, length);
}

/* All bytes of a file with a zero byte behind them; an empty text if there is none. */
static inline char *read_file(struct check *check, const char *path, size_t *length) {
    FILE *file = fopen(path, "rb");
    CHECK(file, "%s: cannot be read; is this the repository's root?", path);
    *length = 0;
    return file ? child_output(file, length) : keep(1);
}

/* ---- answers as JSON lines ---- */

static inline int count_lines(const char *text) {
    int n = 0;
    for (; *text; text++)
        n += *text == '\n';
    return n;
}

static inline int count_of(const char *text, const char *words) {
    int n = 0;
    for (; (text = strstr(text, words)); text++)
        n++;
    return n;
}

/* The value of a key of the object nodes[at]; NULL: it has none. */
static inline const struct json_node *value_of(const struct json_node *nodes, int at,
                                               const char *key) {
    for (int i = at + 1; i < nodes[at].next; i = nodes[i + 1].next)
        if (strcmp(nodes[i].text, key) == 0)
            return &nodes[i + 1];
    return NULL;
}

/* The value of `key` in the answer of the request `id`, or in the statistics, whose id is `stats`;
 * `(none)`: there is none. */
static inline const char *answer(const struct outcome *o, const char *id, const char *key) {
    bool stats = strcmp(id, "stats") == 0;
    char error[ERROR_LENGTH], *value = NULL;
    for (const char *line = o->out, *end; *line && !value; line = end + (*end == '\n')) {
        end = line + strcspn(line, "\n");
        char *copy = strndup(line, (size_t)(end - line));
        struct json_node *nodes = json_parse(copy, (size_t)(end - line), error);
        const struct json_node *its = nodes ? value_of(nodes, 0, stats ? "stats" : "id") : NULL;
        if (its && (stats || strcmp(its->text, id) == 0))
            its = value_of(nodes, stats ? (int)(its - nodes) : 0, key);
        else
            its = NULL;
        if (its)
            value = memcpy(keep(its->length + 1), its->text, its->length);
        free(nodes);
        free(copy);
    }
    return value ? value : "(none)";
}

static inline double number(const struct outcome *o, const char *id, const char *key) {
    const char *value = answer(o, id, key);
    return strcmp(value, "(none)") ? atof(value) : -1;
}

/* ---- what is expected ---- */

/* Ends with `status`, and what it writes is as these say: `*` stands for anything, as for a shell;
 * NULL: it may be anything. */
static inline void expect(struct check *check, const char *arguments, int status, const char *out,
                          const char *err) {
    struct outcome o = run(check, "%s", arguments);
    CHECK(o.status == status, "%s: status %d, expected %d: %s", arguments, o.status, status, o.err);
    CHECK(!out || fnmatch(out, o.out, 0) == 0, "%s: %s; expected %s", arguments, o.out, out);
    CHECK(!err || fnmatch(err, o.err, 0) == 0, "%s: %s; expected %s", arguments, o.err, err);
}

/* Both must have ended well, with the same text or another one. */
static inline void compare(struct check *check, const char *what, bool same,
                           const struct outcome *a, const struct outcome *b) {
    CHECK(a->status == 0 && b->status == 0, "%s: status %d, %d: %s%s", what, a->status, b->status,
          a->err, b->err);
    CHECK((strcmp(a->out, b->out) == 0) == same, "%s: expected %s text:\n%s\n%s", what,
          same ? "the same" : "another", a->out, b->out);
}

static inline void expect_same(struct check *check, bool same, const char *one, const char *other) {
    struct outcome a = run(check, "%s", one), b = run(check, "%s", other);
    compare(check, other, same, &a, &b);
}

/* Exactly one line begins with `dynamo: `, and holds the words. */
static inline void check_refusal(struct check *check, const char *what, const struct outcome *o,
                                 int status, const char *words) {
    CHECK(o->status == status, "%s: status %d, expected %d: %s", what, o->status, status, o->err);
    const char *line = strstr(o->err, "dynamo: ");
    CHECK(line, "%s: no line that says why: %s", what, o->err);
    if (!line)
        return;
    size_t length = strcspn(line, "\n");
    CHECK(!strstr(line + length, "dynamo: "), "%s: more than one line: %s", what, o->err);
    CHECK(line == o->err || line[-1] == '\n', "%s: not at the start of its line: %s", what, o->err);
    CHECK(length < 600, "%s: a line of %zu bytes", what, length);
    const char *found = memmem(line, length, words, strlen(words));
    CHECK(found, "%s: %.*s; expected %s", what, (int)length, line, words);
}

/* A run that must be refused so, in so much processor time and little memory. */
static inline void refuse(struct check *check, const char *arguments, int status, const char *words,
                          double seconds) {
    struct outcome o = run(check, "%s", arguments);
    check_refusal(check, arguments, &o, status, words);
    CHECK(soon(o.seconds, seconds) && small(&o, 700), "%s: %.1f s, %ld KiB", arguments, o.seconds,
          o.kibibytes);
}

static inline void remove_folder(void) {
    if (system("rm -rf \"$T\"") != 0)
        perror("rm");
}

/* check_run with the folder $T, which is HOME, and a terminal that no line editor knows. */
static inline int run_tests(const struct test *tests, size_t n_tests, int argc, char **argv) {
    static char folder[] = "/tmp/dynamo_test_XXXXXX";
    if (!mkdtemp(folder)) {
        perror(folder);
        return 1;
    }
    setenv("T", folder, 1);
    setenv("HOME", folder, 1);
    setenv("TERM", "dumb", 1);
    atexit(remove_folder);
    return check_run(tests, n_tests, argc, argv);
}

#endif
