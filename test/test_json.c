/* test_json.c: the JSON reader against texts that RFC 8259 allows and forbids (in the manner of
 * JSONTestSuite), the writer against texts written by hand, each against the other on random
 * values, and the reader on damaged texts in buffers without slack, where a sanitizer sees every
 * byte read too far. */
#define JSON_IMPLEMENTATION
#include "../lib/json.h"
#include "check.h"
#include <math.h>
#include <stdlib.h>

static uint32_t draw(uint64_t *state, uint32_t limit) {
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(*state >> 33) % limit;
}

/* A copy that ends exactly behind its zero byte. */
static char *copy_of(const char *text, size_t length) {
    char *copy = malloc(length + 1);
    if (!copy)
        abort();
    memcpy(copy, text, length);
    copy[length] = 0;
    return copy;
}

static bool accepted(const char *text, size_t length, char error[ERROR_LENGTH]) {
    char *copy = copy_of(text, length);
    struct json_node *nodes = json_parse(copy, length, error);
    bool good = nodes != NULL;
    free(nodes);
    free(copy);
    return good;
}

/* clang-format off */
static const char *const accepted_texts[] = {
    /* space, words */
    "[]", "{}", "[ ]", "{ }", " [] ", "\t\r\n{}\n", "null", "true", "false",
    /* numbers */
    "0", "-0", "42", "-1", "1.5", "0.5", "-0.0", "1e5", "1E5", "1e+5", "1e-5", "0e1", "0e+1", "0E0",
    "1.25e10", "123456789012345678901234567890", "1e400", "-1e400", "1e-400",
    "0.00000000000000000001", "20e1",
    /* strings, containers */
    "\"\"", "\"a\"", "\" \"", "[1]", "[1,2]", "[1 , 2 ]", "[[]]", "[[],[]]", "[[[]],{}]",
    "[null,1,\"1\",{}]", "{\"a\":1}", "{\"a\":1,\"b\":2}", "{\"a\":[{\"b\":{}}]}", "{\"\":0}",
    "{\"a\":1,\"a\":2}", "{ \"a\" : 1 , \"b\" : [ ] }",
    /* escapes */
    "\"\\\"\\\\\\/\\b\\f\\n\\r\\t\"", "\"\\u0000\"", "\"\\u0041\"", "\"\\u00e9\"",
    "\"\\uD834\\uDD1E\"", "\"\\ud834\\udd1e\"", "\"\\uDBFF\\uDFFF\"", "\"\\uFFFF\"", "\"\\uFDD0\"",
    "\"\\\\u0000\"", "\"\\\\a\"",
    /* UTF-8, and lines */
    "\"\x7F\"", "\"\xC3\xA9\"", "\"\xE2\x82\xAC\"", "\"\xF0\x9D\x84\x9E\"", "\"\xF4\x8F\xBF\xBF\"",
    "\"\xEF\xBB\xBF\"", "\"\xED\x9F\xBF\"", "\"\xEE\x80\x80\"", "\"\xC2\x80\"", "\"\xE0\xA0\x80\"",
    "\"\xF0\x90\x80\x80\"", "[\"a\",\n4\n,true]", "[1\n,1\n]", "\"/*no comment*/\"", "[0.1e1]",
    "[-123123123123123123123123123123]",
};

static const struct {
    const char *text;
    int byte; /* where; -1: anywhere */
} refused_texts[] = {
    /* containers */
    {"", 0}, {" ", 1}, {"[", 1}, {"]", 0}, {"{", 1}, {"}", 0}, {"[1", 2}, {"[1,", 3}, {"[,]", 1},
    {"[1,]", 3}, {"[,1]", 1}, {"[1,,2]", 3}, {"[1 2]", 3}, {"[1:2]", 2}, {"[1]]", 3}, {"[1]x", 3},
    {"[]{}", 2}, {"[}", 1}, {"{]", 1}, {"[1}", 2}, {"{\"a\"}", 4}, {"{\"a\":}", 5}, {"{\"a\":1", 6},
    {"{\"a\":1,}", 7}, {"{\"a\":1]", 6}, {"{\"a\" 1}", 5}, {"{\"a\",1}", 4}, {"{:1}", 1},
    {"{1:1}", 1}, {"{a:1}", 1}, {"{'a':1}", 1}, {"{null:1}", 1}, {"{\"a\":1 \"b\":2}", 7},
    {"{,}", 1}, {"{\"a\"::1}", 5},
    /* words */
    {"nul", 0}, {"nulll", 4}, {"Null", 0}, {"TRUE", 0}, {"tru", 0}, {"truex", 4}, {"fals", 0},
    {"NaN", 0}, {"nan", 0}, {"Infinity", 0}, {"inf", 0}, {"-inf", -1}, {"-NaN", -1},
    {"-Infinity", -1},
    /* numbers */
    {"+1", 0}, {"01", -1}, {"-01", -1}, {"00", -1}, {"-", -1}, {"--1", -1}, {"1.", -1}, {".5", 0},
    {"-.5", -1}, {"1.e5", -1}, {"0.e1", -1}, {"1e", -1}, {"1e+", -1}, {"1e-", -1}, {"1eE2", -1},
    {"1e1.5", -1}, {"1.2.3", -1}, {"1+2", -1}, {"1-2", -1}, {"0x1", 1}, {"0x1p3", 1}, {"1a", 1},
    {"1_000", 1}, {"1 000", 2}, {"0e", -1}, {"1.5f", 3}, {"\xEF\xBC\x91", 0},
    /* strings and escapes */
    {"\"", 1}, {"\"a", 2}, {"\"\\\"", 3}, {"\"\\", 1}, {"'a'", 0}, {"\"\\a\"", 1}, {"\"\\x41\"", 1},
    {"\"\\0\"", 1}, {"\"\\'\"", 1}, {"\"\\u\"", 1}, {"\"\\u00\"", 1}, {"\"\\u004\"", 1},
    {"\"\\u004g\"", 1}, {"\"\\u 041\"", 1}, {"\"\\u-041\"", 1}, {"\"\\u0x41\"", 1},
    {"\"\\U0041\"", 1}, {"\"\\uD800\"", -1}, {"\"\\uDC00\"", -1}, {"\"\\uD800\\n\"", -1},
    {"\"\\uD800x\"", -1}, {"\"\\uD800\\u0041\"", -1}, {"\"\\uD800\\uD800\"", -1},
    {"\"\\uDC00\\uD800\"", -1}, {"\"\\uD800\\", -1}, {"\"\\uD800\\u\"", -1}, {"\"\n\"", 1},
    {"\"\t\"", 1}, {"\"\x01\"", 1}, {"\"\x1F\"", 1}, {"[\"a\nb\"]", 3},
    /* what is not UTF-8 */
    {"\"\x80\"", 1}, {"\"\xBF\"", 1}, {"\"\xC0\x80\"", 1}, {"\"\xC1\xBF\"", 1}, {"\"\xC3\"", 1},
    {"\"\xE0\x80\x80\"", 1}, {"\"\xE0\x9F\xBF\"", 1}, {"\"\xE2\x82\"", 1}, {"\"\xED\xA0\x80\"", 1},
    {"\"\xED\xBF\xBF\"", 1}, {"\"\xF0\x80\x80\x80\"", 1}, {"\"\xF0\x8F\xBF\xBF\"", 1},
    {"\"\xF4\x90\x80\x80\"", 1}, {"\"\xF5\x80\x80\x80\"", 1}, {"\"\xF8\x88\x80\x80\x80\"", 1},
    {"\"\xF9\x88\x80\x80\"", 1}, {"\"\xFE\"", 1}, {"\"\xFF\"", 1},
    /* space, comments and other things between */
    {"\xEF\xBB\xBF{}", 0}, {"[1]\xC2\xA0", 3}, {"\f[]", 0}, {"\v[]", 0}, {"[]\f", 2}, {"[1]//x", 3},
    {"[/**/]", 1}, {"#\n1", 0}, {"[\"a\",]", 5}, {"[\"\\u00A\"]", 2}, {"a", 0}, {"<null>", 0},
    {"[*]", 1}, {"\xC3", 0}, {"{\"a\":\"b\"}#", 9}, {"{\"a\":1}}", 7}, {"[\"\": 1]", 3},
    {"[\"x\", truth]", 6},
};
/* clang-format on */

static void accepts(struct check *check) {
    for (size_t i = 0; i < sizeof accepted_texts / sizeof *accepted_texts; i++) {
        char error[ERROR_LENGTH] = "";
        CHECK(accepted(accepted_texts[i], strlen(accepted_texts[i]), error), "%s: %s",
              accepted_texts[i], error);
    }
}

static void refuses(struct check *check) {
    for (size_t i = 0; i < sizeof refused_texts / sizeof *refused_texts; i++) {
        char error[ERROR_LENGTH] = "";
        int byte = -2;
        CHECK(!accepted(refused_texts[i].text, strlen(refused_texts[i].text), error), "%s",
              refused_texts[i].text);
        bool placed = sscanf(error, "byte %d: expected", &byte) == 1;
        CHECK(placed && (refused_texts[i].byte < 0 || byte == refused_texts[i].byte), "%s: %s",
              refused_texts[i].text, error);
    }
    char error[ERROR_LENGTH];
    CHECK(!accepted("[1]\0", 4, error), "zero byte behind");
    CHECK(!accepted("\0", 1, error), "zero byte alone");
    CHECK(!accepted("\"a\0b\"", 5, error), "zero byte in a string");
    CHECK(!accepted("[1,\0 2]", 7, error), "zero byte between");
}

static void decodes(struct check *check) {
    static const struct {
        const char *json, *text;
        size_t length;
    } cases[] = {{"\"\"", "", 0},
                 {"\"abc\"", "abc", 3},
                 {"\"\\\"\\\\\\/\\b\\f\\n\\r\\t\"", "\"\\/\b\f\n\r\t", 8},
                 {"\"a\\u0000b\"", "a\0b", 3},
                 {"\"\\u0041\\u00e9\\u20AC\"", "A\xC3\xA9\xE2\x82\xAC", 6},
                 {"\"\\u007f\\u0080\\u07ff\\u0800\"", "\x7F\xC2\x80\xDF\xBF\xE0\xA0\x80", 8},
                 {"\"\\uD834\\uDD1Ex\"", "\xF0\x9D\x84\x9Ex", 5},
                 {"\"\\uD800\\uDC00\\uDBFF\\uDFFF\"", "\xF0\x90\x80\x80\xF4\x8F\xBF\xBF", 8},
                 {"\"\\uFFFF\\\\u0041\"", "\xEF\xBF\xBF\\u0041", 9}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char error[ERROR_LENGTH] = "";
        char *copy = copy_of(cases[i].json, strlen(cases[i].json));
        struct json_node *nodes = json_parse(copy, strlen(copy), error);
        CHECK(nodes && nodes[0].type == '"' && nodes[0].length == cases[i].length &&
                  memcmp(nodes[0].text, cases[i].text, cases[i].length + 1) == 0,
              "%s: %s", cases[i].json, error);
        free(nodes);
        free(copy);
    }
}

static void nodes_are_in_order(struct check *check) {
    char text[] = "{\"a\":[1,[ ],\"x\"] , \"b\" : {\"c\":null} ,\"d\":-2.5e3,\"e\":true}";
    static const struct {
        char type;
        int next;
        const char *text;
    } expected[] = {{'{', 14, NULL},   {'"', 2, "a"},    {'[', 6, "[1,[ ],\"x\"]"},
                    {'0', 4, "1"},     {'[', 5, "[ ]"},  {'"', 6, "x"},
                    {'"', 7, "b"},     {'{', 10, NULL},  {'"', 9, "c"},
                    {'n', 10, "null"}, {'"', 11, "d"},   {'0', 12, "-2.5e3"},
                    {'"', 13, "e"},    {'t', 14, "true"}};
    char error[ERROR_LENGTH] = "";
    struct json_node *nodes = json_parse(text, strlen(text), error);
    CHECK(nodes != NULL, "%s", error);
    for (int i = 0; nodes && i < nodes[0].next; i++) {
        const char *value = expected[i].text;
        CHECK(nodes[i].type == expected[i].type && nodes[i].next == expected[i].next,
              "node %d: %c %d", i, nodes[i].type, nodes[i].next);
        if (value && expected[i].type != '[') { /* decoding has put a zero byte into the array */
            CHECK(nodes[i].length == strlen(value) && !memcmp(nodes[i].text, value, strlen(value)),
                  "node %d", i);
        }
        CHECK(expected[i].type != '[' || nodes[i].length == strlen(value), "node %d", i);
    }
    free(nodes);
}

static void depth_is_limited(struct check *check) {
    char error[ERROR_LENGTH] = "";
    for (int depth = JSON_DEPTH - 1; depth <= JSON_DEPTH + 1; depth++) {
        char text[2 * JSON_DEPTH + 8] = "";
        memset(text, '[', (size_t)depth);
        memset(text + depth, ']', (size_t)depth);
        CHECK(accepted(text, strlen(text), error) == (depth <= JSON_DEPTH), "depth %d", depth);
    }
    size_t length = 1000000;
    char *deep = malloc(length);
    if (deep) {
        memset(deep, '[', length);
        CHECK(!accepted(deep, length, error) && strstr(error, "nesting"), "%s", error);
        for (size_t i = 0; i < length; i++)
            deep[i] = "{\"\":"[i % 4];
        CHECK(!accepted(deep, length, error) && strstr(error, "nesting"), "%s", error);
        memset(deep, '9', length);
        CHECK(accepted(deep, length, error), "a number of a million digits: %s", error);
    }
    free(deep);
}

/* What json_string makes of `length` bytes, freed by the caller. */
static char *written(const char *bytes, size_t length, size_t *size) {
    char *text = NULL;
    FILE *out = open_memstream(&text, size);
    json_string(out, bytes, length);
    fclose(out);
    return text;
}

static void writes(struct check *check) {
    static const struct {
        const char *bytes;
        size_t length;
        const char *json;
    } cases[] = {
        {"", 0, "\"\""},
        {"a\"b\\c/\n\r\t\b\f\x01\x1F\x7F\xC3\xA9", 16,
         "\"a\\\"b\\\\c/\\n\\r\\t\\b\\f\\u0001\\u001f\x7F\xC3\xA9\""},
        {"x\xFFy\xE2\x82z\xED\xA0\x80\xF0\x9D\x84", 12,
         "\"x\xEF\xBF\xBDy\xEF\xBF\xBD\xEF\xBF\xBDz\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD"
         "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD\""},
        {"a\0b", 3, "\"a\\u0000b\""},
        {"\xE2\x82\xAC", 2, "\"\xEF\xBF\xBD\xEF\xBF\xBD\""}, /* cut short by its length */
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        size_t size = 0;
        char *text = written(cases[i].bytes, cases[i].length, &size);
        CHECK(size == strlen(cases[i].json) && !strcmp(text, cases[i].json), "%s", text);
        free(text);
    }
}

/* Any double, any bytes: what is written is read, and numbers come back bit for bit. */
static void numbers_and_bytes_come_back(struct check *check) {
    uint64_t state = 1;
    for (int i = 0; i < 20000; i++) {
        uint64_t bits = (uint64_t)draw(&state, 1u << 31) << 33 | (uint64_t)draw(&state, 1u << 31)
                                                                     << 8;
        double value;
        memcpy(&value, &bits, sizeof value);
        value = isfinite(value) ? value : 0;
        char bytes[24];
        size_t length = draw(&state, sizeof bytes), size = 0;
        bool ascii = true;
        for (size_t j = 0; j < length; j++) {
            bytes[j] = (char)draw(&state, i % 2 ? 128 : 256);
            ascii = ascii && (unsigned char)bytes[j] < 128;
        }
        char *text = NULL, error[ERROR_LENGTH] = "";
        FILE *out = open_memstream(&text, &size);
        fprintf(out, "[%.17g,", value);
        json_string(out, bytes, length);
        fputc(']', out);
        fclose(out);
        struct json_node *nodes = json_parse(text, size, error);
        CHECK(nodes && nodes[1].type == '0' && nodes[2].type == '"', "%s: %s", text, error);
        if (nodes) {
            double read = strtod(nodes[1].text, NULL);
            CHECK(memcmp(&read, &value, sizeof read) == 0, "%a %a", read, value);
            CHECK(!ascii || (nodes[2].length == length && !memcmp(nodes[2].text, bytes, length)),
                  "bytes of round %d", i);
        }
        free(nodes);
        free(text);
    }
}

static void write_random(FILE *out, uint64_t *state, int depth) {
    uint32_t kind = draw(state, depth > 5 ? 5 : 7);
    if (kind < 3) {
        fputs(kind == 0 ? "null" : kind == 1 ? "true" : "false", out);
    } else if (kind == 3) {
        fprintf(out, "%.17g", ((double)draw(state, 1u << 30) - 5e8) / (1 + draw(state, 1000)));
    } else if (kind == 4) {
        static const char *const pieces[] = {
            "", "a", "\n", "\"", "\xF0\x9D\x84\x9E", "\xE2\x82\xAC"};
        const char *piece = pieces[draw(state, 6)];
        json_string(out, piece, strlen(piece));
    } else {
        fputc(kind == 5 ? '[' : '{', out);
        for (uint32_t left = draw(state, 5); left > 0; left--) {
            if (kind == 6) {
                const char *key = left % 2 ? "key" : "\x01\xC3\xA9";
                json_string(out, key, strlen(key));
                fputc(':', out);
            }
            write_random(out, state, depth + 1);
            fputs(left > 1 ? "," : "", out);
        }
        fputc(kind == 5 ? ']' : '}', out);
    }
}

static char *random_text(uint64_t *state, int depth, size_t *length) {
    char *text = NULL;
    FILE *out = open_memstream(&text, length);
    write_random(out, state, depth);
    fclose(out);
    return text;
}

/* Writes the nodes again; equal to the first text if reading and writing lose nothing. */
static void rewrite(FILE *out, const struct json_node *nodes, int at) {
    const struct json_node *node = &nodes[at];
    if (node->type == '"') {
        json_string(out, node->text, node->length);
    } else if (node->type != '[' && node->type != '{') {
        fprintf(out, "%.*s", (int)node->length, node->text);
    } else {
        fputc(node->type, out);
        for (int child = at + 1; child < node->next; child = nodes[child].next) {
            if (node->type == '{') {
                json_string(out, nodes[child].text, nodes[child].length);
                fputc(':', out);
                child++;
            }
            rewrite(out, nodes, child);
            fputs(nodes[child].next < node->next ? "," : "", out);
        }
        fputc(node->type == '[' ? ']' : '}', out);
    }
}

static void documents_come_back(struct check *check) {
    uint64_t state = 2;
    for (int i = 0; i < 3000; i++) {
        char error[ERROR_LENGTH] = "", *second = NULL;
        size_t length = 0, second_length = 0;
        char *first = random_text(&state, 0, &length), *copy = copy_of(first, length);
        struct json_node *nodes = json_parse(copy, length, error);
        CHECK(nodes != NULL, "%s: %s", first, error);
        if (nodes) {
            FILE *out = open_memstream(&second, &second_length);
            rewrite(out, nodes, 0);
            fclose(out);
            CHECK(length == second_length && !strcmp(first, second), "%s: %s", first, second);
        }
        free(nodes);
        free(copy);
        free(second);
        free(first);
    }
}

/* What json_parse_part has read of a text: values to their end, in order, strings ended. */
static void check_part(struct check *check, const char *text, size_t length) {
    char error[ERROR_LENGTH], *copy = copy_of(text, length);
    int n = -1;
    struct json_node *nodes = json_parse_part(copy, length, &n, error);
    CHECK(nodes && n > 0 && !*error == accepted(text, length, error), "%d nodes", n);
    for (int i = 0; i < n; i++) {
        const struct json_node *node = &nodes[i];
        CHECK(node->next == 0 || (node->next > i && node->next <= n), "%d of %d", node->next, n);
        CHECK(node->text >= copy && node->text + node->length <= copy + length, "node %d", i);
        CHECK(node->type != '"' || node->next == 0 || !node->text[node->length], "node %d", i);
    }
    free(nodes);
    free(copy);
}

static void parts_are_whole(struct check *check) {
    static const char text[] = "{\"id\":\"x\",\"a\":[1,{\"b\":2}],\"c\":3}";
    for (size_t length = 1; length < sizeof text; length++) {
        char error[ERROR_LENGTH], *copy = copy_of(text, length);
        int n, n_whole = 0;
        struct json_node *nodes = json_parse_part(copy, length, &n, error);
        for (int at = 1; at + 1 < n && nodes[at + 1].next; at = nodes[at + 1].next)
            n_whole++;
        int expected = (length >= 9) + (length >= 25) + (length >= 31);
        CHECK(n_whole == expected, "%s: %d", error, n_whole);
        free(nodes);
        free(copy);
        check_part(check, text, length);
    }
}

static void survives_damage(struct check *check) {
    uint64_t state = 3;
    static const char bytes[] = "\"\\{}[],:0123456789-+.eEutfn \xE2\x82\xAC\xF0\xFF\x01";
    int n_good = 0, n_bad = 0;
    for (int i = 0; i < 20000; i++) {
        char error[ERROR_LENGTH] = "";
        size_t whole = 0;
        char *text = random_text(&state, 1, &whole);
        for (uint32_t left = 1 + draw(&state, 3); left > 0; left--)
            text[draw(&state, (uint32_t)whole)] = bytes[draw(&state, sizeof bytes)];
        size_t length = whole - draw(&state, (uint32_t)whole) * draw(&state, 2);
        bool good = accepted(text, length, error);
        n_good += good;
        n_bad += !good;
        CHECK(good || strncmp(error, "byte ", 5) == 0, "%s", error);
        check_part(check, text, length);
        free(text);
    }
    CHECK(n_good > 100 && n_bad > 100, "%d good, %d bad", n_good, n_bad);
}

int main(int argc, char **argv) {
    static const struct test tests[] = {
        {"accepts", accepts},
        {"refuses", refuses},
        {"decodes", decodes},
        {"nodes_are_in_order", nodes_are_in_order},
        {"depth_is_limited", depth_is_limited},
        {"writes", writes},
        {"numbers_and_bytes_come_back", numbers_and_bytes_come_back},
        {"documents_come_back", documents_come_back},
        {"parts_are_whole", parts_are_whole},
        {"survives_damage", survives_damage},
    };
    return check_run(tests, sizeof tests / sizeof *tests, argc, argv);
}
