/* fuzz_json.c: any text is parsed or refused, and what is parsed can be written and parsed again.
 * Run by test/fuzz.sh. */
#define JSON_IMPLEMENTATION
#include "../lib/json.h"
#include "fuzz.h"

enum { PARSED, OBJECTS };
static const char *const fuzz_points[] = {"parsed", "objects", NULL};

static char *copy_of(const void *data, size_t size) { /* without slack behind its zero byte */
    char *copy = malloc(size + 1);
    FUZZ_CHECK(copy);
    memcpy(copy, data, size);
    copy[size] = 0;
    return copy;
}

/* Strings by json_string, the rest as it stood in the text. */
static void print(FILE *out, const struct json_node *nodes, int at) {
    const struct json_node *node = &nodes[at];
    if (node->type == '"') {
        json_string(out, node->text, node->length);
    } else if (node->type != '[' && node->type != '{') {
        fwrite(node->text, 1, node->length, out);
    } else {
        fputc(node->type, out);
        for (int i = at + 1, n = 0; i < node->next; i = nodes[i].next, n++) {
            fputs(n == 0 ? "" : node->type == '{' && n % 2 ? ":" : ",", out);
            print(out, nodes, i);
        }
        fputc(node->type + 2, out);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    char error[ERROR_LENGTH] = "", *text = copy_of(data, size), *printed = NULL;
    struct json_node *nodes = json_parse(text, size, error);
    FUZZ_CHECK(nodes || (error[0] && !strchr(error, '\n')));
    fuzz_runs++;
    if (nodes) {
        fuzz_reach(PARSED);
        if (nodes[0].type == '{' && nodes[0].next > 1)
            fuzz_reach(OBJECTS);
        size_t length;
        FILE *out = open_memstream(&printed, &length);
        print(out, nodes, 0);
        fclose(out);
        struct json_node *again = json_parse(printed, length, error);
        FUZZ_CHECK(again && again[0].next == nodes[0].next);
        for (int i = 0; i < nodes[0].next; i++) {
            bool text_alike = nodes[i].type == '{' || nodes[i].type == '[' ||
                              (nodes[i].length == again[i].length &&
                               !memcmp(nodes[i].text, again[i].text, nodes[i].length));
            FUZZ_CHECK(nodes[i].type == again[i].type && nodes[i].next == again[i].next &&
                       text_alike);
        }
        free(again);
        free(printed);
    }
    free(nodes);
    free(text);
    return 0;
}
