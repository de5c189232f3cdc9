/* fuzz_http.c: any bytes become requests, or one status that refuses them; and which it is does not
 * depend on the pieces in which they come. What is taken is whole, and has one length. Run by
 * test/fuzz.sh. */
#define HTTP_IMPLEMENTATION
#include "../app/http.h"
#include "fuzz.h"

enum { HEADS, BODIES, CHUNKED, REFUSALS, SECONDS };
static const char *const fuzz_points[] = {
    "heads", "bodies", "bodies in chunks", "refusals", "requests behind others", NULL};

struct outcome {
    int status, n_requests;
    size_t bytes; /* of all bodies */
    uint32_t sum; /* of what was understood */
};

static void add(struct outcome *o, const char *text, size_t n) {
    for (size_t i = 0; i < n; i++)
        o->sum = o->sum * 16777619 + (unsigned char)text[i] + 1;
}

static void take(struct outcome *o, const struct http_connection *c) {
    const struct http_request *r = &c->request;
    FUZZ_CHECK(c->body <= c->at && c->at <= c->n_input && c->body <= HTTP_BODY);
    FUZZ_CHECK(*r->path == '/' || !strcmp(r->path, "*"));
    FUZZ_CHECK(!(r->chunked && http_field(r, "content-length")));
    FUZZ_CHECK(r->old || http_field(r, "host"));
    add(o, r->method, strlen(r->method));
    add(o, r->path, strlen(r->path));
    add(o, c->input, c->body);
    o->bytes += c->body;
    o->n_requests++;
    fuzz_reach(HEADS);
    if (c->body > 0)
        fuzz_reach(r->chunked ? CHUNKED : BODIES);
    if (o->n_requests > 1)
        fuzz_reach(SECONDS);
}

/* `piece` bytes at a time, or so many that the data say it: 0. */
static struct outcome read_all(const uint8_t *data, size_t size, size_t piece) {
    struct outcome o = {0};
    struct http_connection *c = calloc(1, sizeof *c);
    FUZZ_CHECK(c);
    http_next(c);
    for (size_t at = 0; at < size && (o.status == 0 || o.status == 100);) {
        size_t n = piece > 0 ? piece : 1 + data[at] % 17;
        n = n < size - at ? n : size - at;
        char *input = malloc(c->n_input + n); /* of the size that counts, for the sanitizer */
        FUZZ_CHECK(input);
        if (c->n_input > 0)
            memcpy(input, c->input, c->n_input);
        memcpy(input + c->n_input, data + at, n);
        free(c->input);
        c->input = input;
        c->n_input += n;
        at += n;
        while (c->n_input > c->at || c->headed) {
            o.status = http_parse(c);
            if (o.status == 200) {
                take(&o, c);
                http_next(c);
                o.status = 0;
            } else if (o.status != 100) {
                break;
            }
        }
    }
    if (o.status > 200)
        fuzz_reach(REFUSALS);
    free(c->input);
    free(c);
    return o;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    fuzz_runs++;
    struct outcome one = read_all(data, size, size), other = read_all(data, size, 0);
    FUZZ_CHECK(one.status == other.status && one.n_requests == other.n_requests &&
               one.bytes == other.bytes && one.sum == other.sum);
    return 0;
}
