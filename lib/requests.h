/* requests.h: the requests of a file, and the texts that end an answer.
 *
 *     struct requests requests;
 *     if (!requests_read(&requests, &options, error))
 *         ...
 *     for (int i = 0; i < requests.n; i++)
 *         ... requests.specs[i] ...
 *     requests_free(&requests);
 *
 * One request a line: a JSON object if it starts with `{`, else the text itself; empty lines are
 * skipped. What a line does not say is taken from the command line. A bad line becomes a request
 * with `error` set, so that the others go on. Read next: json.h, terminal.h. */
#ifndef REQUESTS_H
#define REQUESTS_H

#include "cli.h"

struct requests {
    struct request_spec *specs; /* (n) */
    int n;
    char *text; /* the file; specs point into it */
};

/* Reads options->file (`-`: stdin). False: it cannot be read, `error` says why. */
bool requests_read(struct requests *requests, const struct options *options,
                   char error[ERROR_LENGTH]);
void requests_free(struct requests *requests);

/* Whether a stop text occurs in `text`. `safe` holds on entry what the last call left there (at
 * first 0) and on return how many bytes may be shown: all before the stop text, or, if none
 * occurred, all that cannot become the beginning of one. The text that ends first counts, so it
 * does not matter in what pieces the text arrived. */
bool requests_stop(const char *text, size_t length, char *const *stop, int n_stop, size_t *safe);

#endif /* REQUESTS_H */

#ifdef REQUESTS_IMPLEMENTATION
#undef REQUESTS_IMPLEMENTATION

#include "json.h"
#include <stdlib.h>
#include <string.h>

enum { MAX_LINES = 1 << 16 /* of a file: all are in flight together */ };

/* text[length] is 0. */
static bool read_request(struct options *options, char *text, size_t length, char *error) {
    struct request_spec *request = &options->request;
    if (*text != '{') {
        request->prompt = text;
        request->prompt_length = length;
        return true;
    }
    struct json_node *nodes = json_parse(text, length, error);
    bool good = nodes != NULL;
    for (int key = 1; good && key < nodes[0].next; key = nodes[key + 1].next)
        good = cli_set(options, nodes, key, error);
    free(nodes);
    if (good && !request->prompt == !request->ids)
        return fail(error, "expected either prompt or ids");
    return good;
}

bool requests_read(struct requests *requests, const struct options *options,
                   char error[ERROR_LENGTH]) {
    const char *name = strcmp(options->file, "-") ? options->file : "stdin";
    size_t length, n_lines = 1;
    *requests = (struct requests){.text = cli_read_file(options->file, &length, error)};
    if (!requests->text)
        return false;
    char *text_end = requests->text + length;
    for (char *at = requests->text; at < text_end; at++)
        n_lines += *at == '\n';
    if (n_lines > MAX_LINES) {
        requests_free(requests);
        return fail(error, "%.400s: got %zu lines, expected at most %d; split it", name, n_lines,
                    (int)MAX_LINES);
    }
    requests->specs = calloc(n_lines, sizeof *requests->specs);
    if (!requests->specs) {
        requests_free(requests);
        return fail(error, "%.400s: out of memory", name);
    }
    int number = 1;
    for (char *line = requests->text, *end; line < text_end; line = end + 1, number++) {
        char wrong[ERROR_LENGTH];
        struct options line_options = *options;
        line_options.given = 0;
        end = memchr(line, '\n', (size_t)(text_end - line));
        end = end ? end : text_end;
        char *stop = end > line && end[-1] == '\r' ? end - 1 : end;
        *stop = 0;
        if (stop == line)
            continue;
        struct request_spec *spec = &requests->specs[requests->n++];
        bool good = read_request(&line_options, line, (size_t)(stop - line), wrong);
        *spec = line_options.request;
        if (good)
            continue;
        spec->error = malloc(ERROR_LENGTH);
        if (!spec->error)
            abort();
        fail(spec->error, "%.200s:%d: %.250s", name, number, wrong);
    }
    return true;
}

void requests_free(struct requests *requests) {
    for (int i = 0; i < requests->n; i++) {
        free(requests->specs[i].ids);
        free(requests->specs[i].error);
    }
    free(requests->specs);
    free(requests->text);
}

bool requests_stop(const char *text, size_t length, char *const *stop, int n_stop, size_t *safe) {
    size_t held = length, start = 0, end = SIZE_MAX;
    for (size_t at = *safe; at < length; at++) {
        for (int i = 0; i < n_stop; i++) {
            size_t left = length - at, size = strnlen(stop[i], left + 1);
            if (memcmp(text + at, stop[i], size < left ? size : left))
                continue;
            if (size > left) {
                held = at < held ? at : held;
            } else if (at + size < end) {
                start = at;
                end = at + size;
            }
        }
    }
    *safe = end < SIZE_MAX ? start : held;
    return end < SIZE_MAX;
}

#endif /* REQUESTS_IMPLEMENTATION */
