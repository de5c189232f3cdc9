/* fuzz_requests.c: a request file of any bytes becomes requests, each with a prompt, ids, or one
 * line that refuses it; and a command line of any words is taken or refused. Run by test/fuzz.sh.
 */
#define JSON_IMPLEMENTATION
#define CLI_IMPLEMENTATION
#include "../lib/cli.h"
#include "fuzz.h"

enum { TEXTS, OBJECTS, ALL_IDS, STOPS, COMMANDS };
static const char *const fuzz_points[] = {"texts",      "objects",  "ids",
                                          "stop texts", "commands", NULL};

static void parse_words(const uint8_t *data, size_t size) {
    char *text = malloc(size + 1), *words[17] = {(char[]){"dynamo"}};
    FUZZ_CHECK(text);
    memcpy(text, data, size);
    text[size] = 0;
    int n = 1;
    for (char *word = strtok(text, "\n"); word && n < 16; word = strtok(NULL, "\n"))
        words[n++] = word;
    struct options options;
    char error[ERROR_LENGTH] = "";
    bool good = cli_parse(&options, n, words, error);
    FUZZ_CHECK(good || (error[0] && !strchr(error, '\n')));
    if (good)
        fuzz_reach(COMMANDS);
    cli_free(&options);
    free(text);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    char path[64], error[ERROR_LENGTH] = "";
    char *words[] = {(char[]){"dynamo"}, (char[]){"m"}, (char[]){"-f"}, path, NULL};
    struct options options;
    struct requests requests = {0};
    struct request_spec read;
    fuzz_runs++;
    fuzz_file(path, sizeof path, data, size);
    FUZZ_CHECK(cli_parse(&options, 4, words, error));
    FUZZ_CHECK(requests_open(&requests, options.file, error));
    while (requests_next(&requests, &options.request, &read, error) > 0)
        requests_add(&requests, &read);
    FUZZ_CHECK(!*error || strstr(error, "got UTF-16"));
    for (int i = 0; i < requests.n; i++) {
        const struct request_spec *spec = &requests.specs[i];
        FUZZ_CHECK(spec->error    ? !strchr(spec->error, '\n')
                   : spec->cancel ? !spec->prompt && !spec->ids
                                  : !spec->prompt != !spec->ids);
        FUZZ_CHECK(spec->file == requests.name && spec->number <= requests.n_lines);
        FUZZ_CHECK(spec->error || spec->sampling.temperature >= 0);
        size_t safe = 0;
        if (!spec->error)
            fuzz_reach(spec->ids ? ALL_IDS : spec->id ? OBJECTS : TEXTS);
        if (!spec->error && spec->n_stop > 0)
            fuzz_reach(STOPS);
        if (spec->prompt && !spec->error)
            (void)requests_stop((const char *)data, size, spec->stop, spec->n_stop, &safe);
        FUZZ_CHECK(safe <= size);
    }
    requests_free(&requests);
    cli_free(&options);
    parse_words(data, size);
    return 0;
}
