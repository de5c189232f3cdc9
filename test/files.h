/* files.h: what test_program.c and test_hostile.c share: files, and how a refusal looks. */
#ifndef FILES_H
#define FILES_H

#include "child.h"

#include <stdint.h>
#include <sys/stat.h>

#define DATA               "test/data/"
#define AIDREAMS           DATA "aidreams260K.bin"
#define AIDREAMS_TOKENIZER DATA "aidreams_tokenizer.bin"
#define NO_TOKENIZER       DATA "ref/qwen3-f32.gguf"

enum { PATH_LENGTH = 256, FOLDER_LENGTH = 32 };

static inline void make_folder(struct check *check, char folder[FOLDER_LENGTH]) {
    strcpy(folder, "/tmp/dynamo_test_XXXXXX");
    CHECK(mkdtemp(folder), "cannot make %s", folder);
}

static inline void remove_folder(struct check *check, const char *folder) {
    char command[PATH_LENGTH];
    snprintf(command, sizeof command, "rm -rf %s", folder);
    CHECK(system(command) == 0, "%s", command);
}

static inline void write_file(struct check *check, const char *path, const void *bytes,
                              size_t length) {
    FILE *file = fopen(path, "wb");
    bool ok = file && fwrite(bytes, 1, length, file) == length;
    ok = file && fclose(file) == 0 && ok;
    CHECK(ok, "cannot write %s", path);
}

/* All bytes of a file with a zero byte behind them; an empty text if there is none. */
static inline char *read_file(struct check *check, const char *path, size_t *length) {
    FILE *file = fopen(path, "rb");
    CHECK(file, "%s: cannot be read; is this the repository's root?", path);
    if (!file) {
        *length = 0;
        return calloc(1, 1);
    }
    return child_output(file, length);
}

static inline int count_lines(const char *text) {
    int n = 0;
    for (; *text; text++)
        n += *text == '\n';
    return n;
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
    char *copy = strndup(line, length);
    CHECK(strstr(copy, words), "%s: %s; expected %s", what, copy, words);
    free(copy);
}

#endif
