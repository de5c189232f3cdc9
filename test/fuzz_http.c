/* fuzz_http.c: any bytes become requests, or one status that refuses them; and which it is does not
 * depend on the pieces in which they come. What is taken is whole, and has one length. Bytes that
 * begin with { are a body, which becomes prompts, or one line that refuses it. Run by test/fuzz.sh.
 */
#define GGUF_IMPLEMENTATION
#define TOKENIZER_IMPLEMENTATION
#define TEMPLATE_IMPLEMENTATION
#define JSON_IMPLEMENTATION
#define CLI_IMPLEMENTATION
#define WRAP_IMPLEMENTATION
#define ANSWERS_IMPLEMENTATION
#define HTTP_IMPLEMENTATION
#define SERVE_IMPLEMENTATION
#include "../app/answers.h"
#include "../app/http.h"
#include "../app/serve.h"
#include "fuzz.h"

/* There is no engine: nothing that is read here reaches one. */
void engine_lock(struct engine *e) {
    (void)e;
}
void engine_unlock(struct engine *e) {
    (void)e;
}
void engine_wake(struct engine *e) {
    (void)e;
}
void engine_wait(struct engine *e, double until) {
    (void)e, (void)until;
}
double engine_now(void) {
    return 0;
}
struct sched *engine_sched(struct engine *e) {
    return (void)e, NULL;
}
struct engine_stats engine_stats(struct engine *e) {
    return (void)e, (struct engine_stats){0};
}
const struct engine_config *engine_config_of(const struct engine *e) {
    return (void)e, NULL;
}
const char watch_page[1], watch_page_end[1];
void watch_json(FILE *out, struct watch *watch) {
    (void)out, (void)watch;
}
int sched_max_length(const struct sched *s) {
    return (void)s, 0;
}
int sched_longest(const struct sched *s) {
    return (void)s, 0;
}
void sched_submit(struct sched *s, struct request *r, double now) {
    (void)s, (void)r, (void)now;
}
void sched_cancel(struct sched *s, struct request *r, bool stop, double now) {
    (void)s, (void)r, (void)stop, (void)now;
}

enum { HEADS, BODIES, CHUNKED, REFUSALS, SECONDS, CHATS, COMPLETIONS };
static const char *const fuzz_points[] = {
    "heads",       "bodies", "bodies in chunks", "refusals", "requests behind others", "chats",
    "completions", NULL};

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

/* A body, in memory of its size. */
static void read_fuzzed(const uint8_t *data, size_t size, bool chat) {
    static const struct request_spec defaults = {.n = -1};
    struct server server = {.name = "m"};
    struct task *t = calloc(1, sizeof *t);
    char *body = malloc(size + 1);
    FUZZ_CHECK(t && body);
    memcpy(body, data, size);
    body[size] = 0;
    *t = (struct task){.body = body, .n = 1, .chat = chat, .spec = defaults};
    struct json_node *nodes = json_parse(body, size, t->error);
    bool good = nodes && take_body(&server, t, nodes);
    FUZZ_CHECK(good || (*t->error && !strchr(t->error, '\n')));
    for (int i = 0; i < t->n_prompts && good; i++) {
        const struct request_spec *spec = &t->prompts[i];
        FUZZ_CHECK(!spec->prompt != !spec->ids);
        FUZZ_CHECK(!spec->prompt ||
                   (spec->prompt >= body && spec->prompt + spec->prompt_length <= body + size));
        FUZZ_CHECK(spec->n_stop <= VALUE_STOPS && t->n * t->n_prompts <= SERVE_CHOICES);
    }
    if (good)
        fuzz_reach(chat ? CHATS : COMPLETIONS);
    free(nodes);
    free_task(t);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    fuzz_runs++;
    if (size > 0 && *data == '{') {
        read_fuzzed(data, size, true);
        read_fuzzed(data, size, false);
        return 0;
    }
    struct outcome one = read_all(data, size, size), other = read_all(data, size, 0);
    FUZZ_CHECK(one.status == other.status && one.n_requests == other.n_requests &&
               one.bytes == other.bytes && one.sum == other.sum);
    return 0;
}
