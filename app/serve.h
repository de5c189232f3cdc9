/* serve.h: OpenAI's protocol in front of the engine.
 *
 *     struct server *server = serve_open(&options, watch, error); // takes the port: first
 *     int status = serve_run(server, &answers);            // until SIGTERM
 *     serve_close(server);
 *
 * A POST becomes a *task*: prompts × n answers (answers.h), each with a request of its own. It goes
 * through three threads: that of http.h's loop takes the body; a reader makes of it, one after
 * another, prompts and their ids, so that a long text holds up no stream; the loop submits them,
 * takes what is new of each answer, a token at a time, and sends it, or waits for the whole. The
 * third waits for the engine's news, and wakes the loop. A client that goes away cancels its task,
 * which is kept until its requests have left their steps.
 *
 * One table says what each field of a request means. A field that is not known here is ignored;
 * one that is known, not served, and would change the answer, is refused.
 * Read next: http.h, answers.h. */
#ifndef SERVE_H
#define SERVE_H

#include "answers.h"
#include "watch.h"

struct server;
/* --host, --serve, the keys; what a request does not say; the model's path, by whose last part
 * clients know it. watch: of the same engine, for the page. NULL: `error`. */
struct server *serve_open(const struct options *options, struct watch *watch,
                          char error[ERROR_LENGTH]);
/* Until answers->activity is INTERRUPTED, and all that has begun has ended. False: `error`. */
bool serve_run(struct server *server, struct answers *answers, char error[ERROR_LENGTH]);
void serve_close(struct server *server); /* NULL: nothing is done */

#endif /* SERVE_H */

#ifdef SERVE_IMPLEMENTATION
#undef SERVE_IMPLEMENTATION

#include "../lib/json.h"
#include "http.h"
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <time.h>
#include <unistd.h>

enum {
    SERVE_CHOICES = 128,         /* answers to one POST */
    SERVE_COMPLETION_TOKENS = 16 /* of /v1/completions, where neither -n nor the client says */
};

struct choice { /* one answer of a task */
    struct answer answer;
    int n_taken;          /* tokens */
    size_t thought_shown; /* bytes */
    double last;          /* when its last token came */
    /* for where a token's text begins: what decodes, tokens that it saw, and their characters */
    struct tok_stream decoded;
    int n_decoded, n_characters;
};

struct task {
    struct task *next;
    struct http_connection *_Atomic connection; /* NULL: its client has gone */
    char *body;                                 /* (length) that texts of requests point into */
    size_t length;
    char id[40];
    int64_t created;
    bool chat, tokenizes; /* tokenizes: wants the ids of its prompt */
    atomic_bool read;     /* all up to `choices` is there, or why it is refused: */
    int status;           /* 0: it is not */
    const char *param;    /* the field that is wrong; NULL: none */
    char error[ERROR_LENGTH];
    bool submitted, wrong; /* wrong: one of its requests was refused at once */
    bool begun;            /* a stream whose head is sent */
    bool stream, usage, continuous_usage, ignore_eos;
    bool logprobs; /* of each token its own, and those of the n_top likeliest */
    int n, n_top;
    struct request_spec spec;     /* what its fields say */
    struct request_spec *prompts; /* (n_prompts) */
    int n_prompts, n_choices;
    struct choice *choices; /* (n_choices) n of the first prompt, n of the second, … */
};

enum histogram_name { TTFT, ITL, E2E, QUEUED, PREFILL, DECODE, N_HISTOGRAMS };
static const char *const serve_histograms[] = {
    "time_to_first_token_seconds", "inter_token_latency_seconds",  "e2e_request_latency_seconds",
    "request_queue_time_seconds",  "request_prefill_time_seconds", "request_decode_time_seconds"};
static const double serve_bounds[] = {.001, .0025, .005, .01, .025, .05, .1,  .25, .5,
                                      1,    2.5,   5,    10,  25,   50,  100, 250};
enum { N_BOUNDS = sizeof serve_bounds / sizeof *serve_bounds };
struct histogram {
    int64_t counts[N_BOUNDS + 1], n;
    double sum;
};

struct server {
    const struct options *options;
    const char *host;
    struct watch *watch; /* /stats */
    char name[256];      /* of the model */
    char *keys;          /* one a line; NULL: nobody needs one */
    struct http *http;
    struct answers *answers;
    struct task *tasks; /* the first is the oldest */
    int unread[2];      /* a pipe of pointers to tasks, for the reader */
    int64_t started, n_tasks;
    bool ended; /* under the engine's lock */
    struct histogram histograms[N_HISTOGRAMS];
    int64_t prompt_tokens, generated_tokens, finished[FINISH_ERROR + 1];
};

/* ---- errors ---- */

static void write_string(FILE *out, const char *before, const char *text) {
    (void)fputs(before, out);
    json_string(out, text, strlen(text));
}

static void write_error(FILE *out, int status, const char *param, const char *message) {
    const char *type = status == 401   ? "authentication_error"
                       : status == 429 ? "rate_limit_error"
                       : status >= 500 ? "server_error"
                                       : "invalid_request_error";
    write_string(out, "{\"error\":{\"message\":", message);
    write_string(out, ",\"type\":", type);
    if (param)
        write_string(out, ",\"param\":", param);
    (void)fprintf(out, "%s,\"code\":null}}", param ? "" : ",\"param\":null");
}

/* Answers with an error; false, for the caller to return. */
static bool refuse_task(struct http_connection *c, int status, const char *param,
                        const char *message, const char *fields) {
    write_error(http_body(c), status, param, message);
    http_respond(c, status, "application/json", fields);
    return false;
}

/* ---- the fields of a request ---- */

enum field_kind {
    FIELD_REQUEST,  /* as key `word` in a file of requests */
    FIELD_FLAG,     /* true or false */
    FIELD_COUNT,    /* a whole number */
    FIELD_LOGPROBS, /* of a chat true or false, of a completion how many */
};

#define AT(member) .offset = offsetof(struct task, member)
static const struct field {
    const char *name;
    enum field_kind kind;
    const char *word;
    size_t offset;
    int low, high;
} fields[] = {
    {"temperature", FIELD_REQUEST, .word = "temperature"},
    {"top_p", FIELD_REQUEST, .word = "top_p"},
    {"top_k", FIELD_COUNT, AT(spec.sampling.top_k), .low = -1, .high = INT_MAX}, /* as 0: all */
    {"min_p", FIELD_REQUEST, .word = "min_p"},
    {"seed", FIELD_REQUEST, .word = "seed"},
    {"stop", FIELD_REQUEST, .word = "stop"},
    {"max_tokens", FIELD_REQUEST, .word = "n"},
    {"max_completion_tokens", FIELD_REQUEST, .word = "n"},
    {"stream", FIELD_FLAG, AT(stream)},
    {"include_usage", FIELD_FLAG, AT(usage)},
    {"continuous_usage_stats", FIELD_FLAG, AT(continuous_usage)},
    {"ignore_eos", FIELD_FLAG, AT(ignore_eos)},
    {"n", FIELD_COUNT, AT(n), .low = 1, .high = SERVE_CHOICES},
    {"min_tokens", FIELD_COUNT, AT(spec.min_new), .high = INT_MAX},
    {"logprobs", FIELD_LOGPROBS, AT(n_top), .high = SAMPLER_TOP},
    {"top_logprobs", FIELD_COUNT, AT(n_top), .high = SAMPLER_TOP},
};
#undef AT

/* What is not served, and the values that ask for nothing: null, nothing, or one of these words. */
/* clang-format off */
static const char *const neutral[] = {
    "prompt_logprobs", "", "frequency_penalty", "0", "presence_penalty", "0",
    "repetition_penalty", "1", "logit_bias", "", "best_of", "1", "echo", "false", "suffix", "",
    "tools", "", "tool_choice", "none|auto", "functions", "", "function_call", "none|auto",
    "response_format", "text", "modalities", "text", "audio", "", "prediction", "",
    "web_search_options", "", "reasoning_effort", "medium", "verbosity", "medium",
    "use_beam_search", "false", "length_penalty", "1", "stop_token_ids", "",
    "allowed_token_ids", "", "bad_words", "", "include_stop_str_in_output", "false",
    "skip_special_tokens", "true", "truncate_prompt_tokens", "", "add_special_tokens", "true",
    "add_generation_prompt", "true", "continue_final_message", "false", "chat_template", "",
    "chat_template_kwargs", "", "structured_outputs", "", "guided_json", "", "guided_regex", "",
    "guided_choice", "", "guided_grammar", "",
};
/* clang-format on */

/* Whether all that is in a value is one of the words, or null; without words nothing may be. */
static bool is_neutral(const struct json_node *nodes, int at, const char *words) {
    const struct json_node *value = &nodes[at];
    bool object = value->type == '{';
    if (object || value->type == '[') {
        for (int i = at + 1 + object; i < value->next; i = nodes[i].next + object)
            if (!*words || !is_neutral(nodes, i, words))
                return false;
        return true;
    }
    if (value->type == 'n' || (value->type == '"' && value->length == 0))
        return true;
    if (value->type == '0')
        return isdigit((unsigned char)*words) && strtod(value->text, NULL) == strtod(words, NULL);
    for (size_t length; *words; words += length + (words[length] == '|')) {
        length = strcspn(words, "|");
        if (value->length == length && memcmp(value->text, words, length) == 0)
            return true;
    }
    return false;
}

/* Sets what a field says; nodes[at], its value, is not null. */
static bool take_field(struct task *t, const struct field *field, const struct json_node *nodes,
                       int at) {
    const struct json_node *value = &nodes[at];
    void *target = (char *)t + field->offset;
    if (field->kind == FIELD_REQUEST)
        return requests_set(&t->spec, field->word, nodes, at, field->name, t->error);
    if (field->kind == FIELD_FLAG || (field->kind == FIELD_LOGPROBS && t->chat)) {
        *(field->kind == FIELD_FLAG ? (bool *)target : &t->logprobs) = value->type == 't';
        return value->type == 't' || value->type == 'f' ||
               fail(t->error, "%s: expected true or false", field->name);
    }
    double number = value->type == '0' ? strtod(value->text, NULL) : -1;
    if (number < field->low || number > field->high || number != (double)(int)number)
        return fail(t->error, "%s: expected a whole number from %d to %d", field->name, field->low,
                    field->high);
    *(int *)target = (int)number;
    t->logprobs = t->logprobs || field->kind == FIELD_LOGPROBS;
    return true;
}

/* What an object of the body says. False: t->param is the field that is wrong. */
static bool take_fields(struct task *t, const struct json_node *nodes, int object) {
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        int at = json_find(nodes, object, t->param = fields[i].name);
        if (at >= 0 && !take_field(t, &fields[i], nodes, at))
            return false;
    }
    for (size_t i = 0; i < sizeof neutral / sizeof *neutral; i += 2) {
        int at = json_find(nodes, object, t->param = neutral[i]);
        if (at >= 0 && !is_neutral(nodes, at, neutral[i + 1]))
            return fail(t->error, "%s: this server has none of it; leave it out%s%s", neutral[i],
                        *neutral[i + 1] ? ", or give " : "", neutral[i + 1]);
    }
    return true;
}

/* ---- tasks: from a body to requests, by the reader ---- */

static bool add_prompt(struct task *t, const char *key, const struct json_node *nodes, int at) {
    t->prompts = grow(t->prompts, (size_t)t->n_prompts, sizeof *t->prompts);
    struct request_spec *spec = &t->prompts[t->n_prompts++];
    *spec = t->spec;
    spec->plain = !t->chat;
    spec->system = t->chat ? spec->system : NULL;
    return requests_set(spec, key, nodes, at, t->param, t->error);
}

/* Messages; or a text, or ids, or a list of either. */
static bool take_prompts(struct task *t, const struct json_node *nodes) {
    int at = json_find(nodes, 0, t->param = t->chat ? "messages" : "prompt"), next = at + 1;
    if (at < 0)
        return fail(t->error, "%s: it is missing", t->param);
    if (t->chat)
        return add_prompt(t, "messages", nodes, at);
    bool list = nodes[at].type == '[' && next < nodes[at].next && nodes[next].type != '0';
    for (int i = list ? next : at; i < nodes[at].next; i = nodes[i].next)
        if (!add_prompt(t, nodes[i].type == '"' ? "prompt" : "ids", nodes, i))
            return false;
    int most = t->tokenizes ? 1 : SERVE_CHOICES / t->n;
    return t->n_prompts <= most ||
           fail(t->error, "prompt: got %d, expected at most %d", t->n_prompts, most);
}

static bool take_body(const struct server *s, struct task *t, const struct json_node *nodes) {
    if (nodes[0].type != '{')
        return fail(t->error, "expected an object");
    if (t->tokenizes)
        t->chat = json_find(nodes, 0, "prompt") < 0;
    if (!t->chat && t->spec.n < 0)
        t->spec.n = SERVE_COMPLETION_TOKENS;
    int at = json_find(nodes, 0, t->param = "model");
    if (at >= 0 && (nodes[at].type != '"' || strcmp(nodes[at].text, s->name) != 0))
        return fail(t->error, "model: got %.*s, this server has %.200s",
                    nodes[at].length < 100 ? (int)nodes[at].length : 100, nodes[at].text, s->name);
    at = json_find(nodes, 0, t->param = "stream_options");
    if (at >= 0 && nodes[at].type != '{')
        return fail(t->error, "stream_options: expected an object");
    if (!take_fields(t, nodes, 0) || (at >= 0 && !take_fields(t, nodes, at)))
        return false;
    t->param = "logprobs";
    if (t->n_top > 0 && !t->logprobs)
        return fail(t->error, "top_logprobs: expected logprobs true with it");
    t->spec.seeded = json_find(nodes, 0, "seed") >= 0;
    return take_prompts(t, nodes);
}

/* Makes requests of its prompts. False: one of them is wrong. */
static bool prepare_task(struct answers *a, struct task *t, int longest) {
    t->choices = calloc((size_t)(t->n_prompts * t->n), sizeof *t->choices);
    if (!t->choices)
        abort();
    for (int i = 0; i < t->n_prompts * t->n; i++) {
        struct request_spec *spec = &t->prompts[i / t->n], again = *spec;
        struct request *r = &t->choices[t->n_choices++].answer.request;
        const struct request *first = &t->choices[i - i % t->n].answer.request;
        answers_begin(a, spec, &t->choices[i].answer);
        if (spec->seeded)
            r->sampling.seed = answers_seed(spec->sampling.seed, i % t->n);
        if (i % t->n > 0) { /* encoded once */
            again.prompt = NULL;
            again.ids = first->tokens;
            again.n_ids = first->n_prompt;
        }
        if (!answers_prepare(a, &again, NULL, NULL, 0, longest, r))
            return fail(t->error, "%s", r->error);
        r->min_new = t->ignore_eos ? INT_MAX : r->min_new; /* stop texts stop it still */
        if (t->logprobs && !(r->top = calloc((size_t)r->max_new, sizeof *r->top)))
            return fail(t->error, "out of memory");
    }
    return true;
}

/* The longest text that there is room for; 0: all workers have failed. */
static int longest_text(struct server *s) {
    engine_lock(s->answers->engine);
    int longest = sched_max_length(engine_sched(s->answers->engine));
    engine_unlock(s->answers->engine);
    return longest;
}

/* The status that refuses it; 0: none does. */
static int read_task(struct server *s, struct task *t) {
    int longest = longest_text(s);
    if (longest == 0) {
        (void)fail(t->error, "all workers have failed");
        return 503;
    }
    struct json_node *nodes = json_parse(t->body, t->length, t->error);
    bool good = nodes && take_body(s, t, nodes) && prepare_task(s->answers, t, longest);
    free(nodes);
    return good ? 0 : t->param && strcmp(t->param, "model") == 0 ? 404 : 400;
}

static void *read_tasks(void *context) {
    struct server *s = context;
    struct task *t;
    while (read(s->unread[0], &t, sizeof t) == sizeof t) {
        t->status = t->connection ? read_task(s, t) : 0;
        t->read = true;
        http_wake(s->http);
    }
    return NULL;
}

/* ---- tasks: taken, submitted, cancelled, by the loop ---- */

static void free_task(struct task *t) {
    for (int i = 0; i < t->n_choices; i++) {
        free(t->choices[i].answer.request.top);
        answers_free(&t->choices[i].answer);
    }
    for (int i = 0; i < t->n_prompts; i++) {
        free(t->prompts[i].ids);
        free(t->prompts[i].earlier);
    }
    free(t->prompts);
    free(t->choices);
    free(t->body);
    free(t);
}

/* A header's seconds; 0: none; < 0: it has something else. */
static double read_deadline(const struct http_request *r) {
    const char *value = http_field(r, "x-request-timeout");
    char *end;
    double seconds = value ? strtod(value, &end) : 0;
    return !value ? 0 : end > value && !*end && seconds > 0 && seconds < 1e6 ? seconds : -1;
}

static void post_task(struct server *s, struct http_connection *c) {
    double deadline = read_deadline(&c->request);
    if (deadline < 0) {
        refuse_task(c, 400, NULL, "x-request-timeout: expected a number of seconds", "");
        return;
    }
    struct task *t = calloc(1, sizeof *t), **last = &s->tasks;
    char *body = malloc(c->request.length + 1);
    if (!t || !body)
        abort();
    t->body = memcpy(body, c->request.body, c->request.length);
    t->length = c->request.length;
    body[t->length] = 0;
    t->spec = s->options->request;
    t->spec.deadline = deadline > 0 ? (float)deadline : t->spec.deadline;
    t->n = 1;
    t->chat = strstr(c->request.path, "chat") != NULL; /* of its routes */
    t->tokenizes = strcmp(c->request.path, "/tokenize") == 0;
    t->created = (int64_t)time(NULL);
    (void)snprintf(t->id, sizeof t->id, "%s-%016" PRIx64, t->chat ? "chatcmpl" : "cmpl",
                   answers_random((uint64_t)s->started, (uint64_t)s->n_tasks++));
    while (*last)
        last = &(*last)->next;
    *last = t;
    t->connection = c;
    c->user = t;
    http_later(c);
    if (write(s->unread[1], &t, sizeof t) != sizeof t) { /* thousands wait, and have gone */
        (void)fail(t->error, "too many requests have not been read");
        t->status = 503;
        t->read = true;
    }
}

static void cancel_task(struct server *s, struct task *t) {
    struct engine *engine = s->answers->engine;
    engine_lock(engine);
    for (int i = 0; i < t->n_choices; i++)
        sched_cancel(engine_sched(engine), &t->choices[i].answer.request, false, engine_now());
    engine_wake(engine);
    engine_unlock(engine);
}

/* Hands its requests to the engine; where one is refused at once, all end: see end_task. */
static void submit_task(struct server *s, struct task *t) {
    struct engine *engine = s->answers->engine;
    engine_lock(engine);
    for (int i = 0; i < t->n_choices; i++) {
        const struct request *r = &t->choices[i].answer.request;
        answers_submit(s->answers, &t->choices[i].answer);
        t->wrong = t->wrong || r->reason == FINISH_ERROR;
        s->prompt_tokens += i % t->n == 0 && r->reason != FINISH_ERROR ? r->n_prompt : 0;
    }
    engine_wake(engine);
    engine_unlock(engine);
    t->submitted = true;
    if (t->wrong)
        cancel_task(s, t);
}

static void serve_gone(void *context, struct http_connection *c) {
    struct task *t = c->user;
    t->connection = NULL;
    if (t->submitted)
        cancel_task(context, t);
}

/* ---- answers on their way out ---- */

static void write_begin(FILE *out, const struct server *s, const struct task *t) {
    (void)fprintf(out, "{\"id\":\"%s\",\"object\":\"%s%s\",\"created\":%" PRId64, t->id,
                  t->chat ? "chat.completion" : "text_completion",
                  t->chat && t->stream ? ".chunk" : "", t->created);
    write_string(out, ",\"model\":", s->name);
    (void)fputs(",\"choices\":[", out);
}

static void write_usage(FILE *out, const struct task *t) {
    int64_t prompt = 0, cached = 0, generated = 0;
    for (int i = 0; i < t->n_choices; i++) {
        const struct answer *answer = &t->choices[i].answer;
        generated += answers_generated(answer);
        if (i % t->n == 0) {
            prompt += answer->request.n_prompt;
            cached += answer->request.cached_tokens;
        }
    }
    (void)fprintf(out,
                  ",\"usage\":{\"prompt_tokens\":%" PRId64 ",\"completion_tokens\":%" PRId64
                  ",\"total_tokens\":%" PRId64
                  ",\"prompt_tokens_details\":{\"cached_tokens\":%" PRId64 "}}",
                  prompt, generated, prompt + generated, cached);
}

/* A token's text, and how likely it was: of a chat the beginning of an object, with the bytes, for
 * it may hold a part of a character; of a completion a member of one, or a text alone (NULL). */
static void write_token(FILE *out, const struct server *s, bool chat, int token,
                        const float *logprob) {
    struct tok_stream stream = {.begun = true};
    char text[TOK_TEXT_SIZE + 4] = "";
    const struct tokenizer *tokenizer = s->answers->tokenizer;
    size_t n = tokenizer ? tok_decode(tokenizer, &stream, token, text) : 0;
    memcpy(text + n, stream.held, (size_t)stream.n_held);
    n += (size_t)stream.n_held;
    (void)fputs(chat ? "{\"token\":" : "", out);
    json_string(out, text, n);
    (void)fputs(chat ? ",\"bytes\":[" : "", out);
    for (size_t i = 0; i < n && chat; i++)
        (void)fprintf(out, "%s%d", i > 0 ? "," : "", (unsigned char)text[i]);
    (void)fputs(chat ? "],\"logprob\"" : "", out);
    if (logprob)
        (void)fprintf(out, ":%.6g", (double)*logprob);
}

/* The likeliest in a token's place. */
static void write_likeliest(FILE *out, const struct server *s, const struct task *t,
                            const struct sampler_top *top) {
    (void)fputs(t->chat ? ",\"top_logprobs\":[" : "{", out);
    for (int k = 0; k < t->n_top && k < top->n; k++) {
        (void)fputs(k > 0 ? "," : "", out);
        write_token(out, s, t->chat, top->token[k], &top->logprob[k]);
        (void)fputs(t->chat ? "}" : "", out);
    }
    (void)fputs(t->chat ? "]}" : "}", out);
}

/* Characters of its text before the n-th token; one that several make belongs to the last. */
static int count_before(const struct server *s, struct choice *choice, int n) {
    const struct request *r = &choice->answer.request;
    const struct tokenizer *tokenizer = s->answers->tokenizer;
    char text[TOK_TEXT_SIZE];
    for (; tokenizer && choice->n_decoded < r->n_prompt + n; choice->n_decoded++) {
        int token = r->tokens[choice->n_decoded];
        size_t length = tok_decode(tokenizer, &choice->decoded, token, text);
        for (size_t k = 0; k < length && choice->n_decoded >= r->n_prompt; k++)
            choice->n_characters += (text[k] & 0xC0) != 0x80; /* a byte that begins one */
    }
    return choice->n_characters;
}

/* Of tokens [first, n): of a chat one list, of a completion four. */
static void write_logprobs(FILE *out, const struct server *s, const struct task *t,
                           struct choice *choice, int first, int n) {
    static const char *const lists[] = {"{\"content\":[", "{\"tokens\":[", "],\"token_logprobs\":[",
                                        "],\"top_logprobs\":[", "],\"text_offset\":["};
    const struct request *r = &choice->answer.request;
    for (int list = !t->chat; list < (t->chat ? 1 : 5); list++) {
        (void)fputs(lists[list], out);
        for (int i = first; i < n; i++) {
            const float *own = &r->top[i].own;
            (void)fputs(i > first ? "," : "", out);
            if (list < 2)
                write_token(out, s, t->chat, r->tokens[r->n_prompt + i], t->chat ? own : NULL);
            if (list == 0 || list == 3)
                write_likeliest(out, s, t, &r->top[i]);
            else if (list == 2)
                (void)fprintf(out, "%.6g", (double)*own);
            else if (list == 4)
                (void)fprintf(out, "%d", count_before(s, choice, i));
        }
    }
    (void)fputs("]}", out);
}

/* What a choice has that was not sent: of a stream its new tokens, else all. */
static void write_choice(FILE *out, const struct server *s, const struct task *t,
                         struct choice *choice) {
    struct answer *answer = &choice->answer;
    int first = t->stream ? choice->n_taken : 0, n = answers_generated(answer);
    size_t thoughts = answer->n_thought - choice->thought_shown;
    (void)fprintf(out, "{\"index\":%d,", (int)(choice - t->choices));
    if (t->chat)
        (void)fprintf(out, "\"%s\":{%s", t->stream ? "delta" : "message",
                      first == 0 ? "\"role\":\"assistant\"," : "");
    if (t->chat && thoughts > 0) {
        (void)fputs("\"reasoning_content\":", out);
        json_string(out, answer->thought + choice->thought_shown, thoughts);
        (void)fputc(',', out);
    }
    (void)fputs(t->chat ? "\"content\":" : "\"text\":", out);
    json_string(out, answer->length ? answer->text + answer->shown : "",
                answer->safe - answer->shown);
    (void)fputs(t->chat ? "}," : ",", out);
    answer->shown = answer->safe;
    choice->thought_shown = answer->n_thought;
    (void)fputs(t->logprobs ? "\"logprobs\":" : "\"logprobs\":null", out);
    if (t->logprobs)
        write_logprobs(out, s, t, choice, first, n);
    if (answer->ended)
        write_string(out, ",\"finish_reason\":", answers_reasons[answers_reason(answer)]);
    (void)fputs(answer->ended ? "}" : ",\"finish_reason\":null}", out);
}

/* A piece of a stream; NULL: its last, of usage alone. */
static void send_chunk(struct server *s, struct task *t, struct choice *choice) {
    struct http_connection *c = t->connection;
    FILE *out = http_body(c);
    if (!t->begun)
        http_stream(c, "text/event-stream");
    t->begun = true;
    (void)fputs("data: ", out);
    write_begin(out, s, t);
    if (choice)
        write_choice(out, s, t, choice);
    (void)fputc(']', out);
    if (!choice || t->continuous_usage)
        write_usage(out, t);
    (void)fputs("}\n\n", out);
    http_piece(c);
}

/* What of it ended with an error, and as which status; NULL: nothing. */
static const struct request *failed_request(const struct task *t, int *status) {
    const struct request *failed = NULL;
    for (int i = t->n_choices - 1; i >= 0; i--)
        if (t->choices[i].answer.request.reason == FINISH_ERROR)
            failed = &t->choices[i].answer.request;
    bool late =
        failed && failed->deadline > 0 && engine_now() - failed->submitted >= failed->deadline;
    *status = failed && failed->refused ? 429 : t->wrong ? 400 : late ? 504 : 500;
    return failed;
}

/* All its answers have ended. */
static void end_task(struct server *s, struct task *t) {
    int status;
    struct http_connection *c = t->connection;
    const struct request *failed = failed_request(t, &status);
    if (failed && !t->begun) {
        refuse_task(c, status, NULL, failed->error, status == 429 ? "Retry-After: 1\r\n" : "");
        return;
    }
    if (t->stream && !failed && t->usage)
        send_chunk(s, t, NULL);
    FILE *out = http_body(c);
    if (t->stream) {
        (void)fputs(failed ? "data: " : "", out);
        if (failed)
            write_error(out, status, NULL, failed->error);
        (void)fputs(failed ? "\n\ndata: [DONE]\n\n" : "data: [DONE]\n\n", out);
        http_piece(c);
        http_end(c);
        return;
    }
    write_begin(out, s, t);
    for (int i = 0; i < t->n_choices; i++) {
        (void)fputs(i > 0 ? "," : "", out);
        write_choice(out, s, t, &t->choices[i]);
    }
    (void)fputc(']', out);
    write_usage(out, t);
    (void)fputc('}', out);
    http_respond(c, 200, "application/json", "");
}

static void send_ids(struct server *s, struct task *t) {
    const struct request *r = &t->choices[0].answer.request;
    FILE *out = http_body(t->connection);
    (void)fprintf(out, "{\"count\":%d,\"max_model_len\":%d,\"tokens\":[", r->n_prompt,
                  longest_text(s));
    for (int i = 0; i < r->n_prompt; i++)
        (void)fprintf(out, "%s%d", i > 0 ? "," : "", r->tokens[i]);
    (void)fputs("]}\n", out);
    http_respond(t->connection, 200, "application/json", "");
}

static void observe(struct server *s, enum histogram_name name, double value) {
    struct histogram *h = &s->histograms[name];
    int i = 0;
    while (i < N_BOUNDS && value > serve_bounds[i])
        i++;
    h->counts[i]++;
    h->n++;
    h->sum += value;
}

/* Counts what came of a choice: a token, or its end. Called with the lock held. */
static void count_news(struct server *s, struct choice *choice) {
    const struct request *r = &choice->answer.request;
    int n = answers_generated(&choice->answer);
    s->generated_tokens += n - choice->n_taken;
    if (n > choice->n_taken && n == 1)
        observe(s, TTFT, r->first_token - r->submitted);
    else if (n > choice->n_taken)
        observe(s, ITL, r->last_token - choice->last);
    choice->last = r->last_token;
    if (!choice->answer.ended)
        return;
    enum finish_reason reason = answers_reason(&choice->answer);
    s->finished[reason]++;
    if (reason != FINISH_STOP && reason != FINISH_LENGTH)
        return;
    observe(s, E2E, r->last_token - r->submitted);
    observe(s, QUEUED, r->admitted - r->submitted);
    if (r->first_token > 0) {
        observe(s, PREFILL, r->first_token - r->admitted);
        observe(s, DECODE, r->last_token - r->first_token);
    }
}

/* Takes what is new of a choice, and sends it. */
static void advance_choice(struct server *s, struct task *t, struct choice *choice) {
    struct engine *engine = s->answers->engine;
    const struct request *r = &choice->answer.request;
    engine_lock(engine);
    while (answers_advance(s->answers, &choice->answer, 1)) {
        count_news(s, choice);
        bool failed = r->reason == FINISH_ERROR || r->reason == FINISH_CANCELLED;
        engine_unlock(engine);
        if (t->connection && t->stream && !failed)
            send_chunk(s, t, choice);
        choice->n_taken = answers_generated(&choice->answer);
        engine_lock(engine);
    }
    engine_unlock(engine);
}

/* Goes on with a task. False: it has ended. */
static bool advance_task(struct server *s, struct task *t) {
    int n_ended = 0;
    if (!t->read)
        return true;
    if (!t->submitted && (t->status || t->tokenizes || !t->connection)) {
        if (t->connection && t->status)
            refuse_task(t->connection, t->status, t->param, t->error, "");
        else if (t->connection)
            send_ids(s, t);
        return false;
    }
    if (!t->submitted)
        submit_task(s, t);
    for (int i = 0; i < t->n_choices; i++) {
        advance_choice(s, t, &t->choices[i]);
        n_ended += t->choices[i].answer.ended;
    }
    if (n_ended == t->n_choices && t->connection)
        end_task(s, t);
    return n_ended < t->n_choices;
}

static void serve_turn(void *context) {
    struct server *s = context;
    if (s->answers->activity == INTERRUPTED)
        http_drain(s->http);
    for (struct task **at = &s->tasks; *at;) {
        struct task *t = *at;
        if (advance_task(s, t)) {
            at = &t->next;
        } else {
            *at = t->next;
            free_task(t);
        }
    }
}

/* ---- what else is served ---- */

static void get_health(struct server *s, struct http_connection *c) {
    if (longest_text(s) == 0) {
        refuse_task(c, 503, NULL, "all workers have failed", "");
        return;
    }
    (void)fputs("{\"status\":\"ok\"}\n", http_body(c));
    http_respond(c, 200, "application/json", "");
}

/* The list of models, or the one that is named behind its path. */
static void get_models(struct server *s, struct http_connection *c) {
    const char *name = c->request.path + strlen("/v1/models");
    if (*name && strcmp(name + 1, s->name) != 0) {
        refuse_task(c, 404, "model", "this server has no such model", "");
        return;
    }
    FILE *out = http_body(c);
    (void)fputs(*name ? "" : "{\"object\":\"list\",\"data\":[", out);
    write_string(out, "{\"id\":", s->name);
    (void)fprintf(out,
                  ",\"object\":\"model\",\"created\":%" PRId64 ",\"owned_by\":\"dynamo\","
                  "\"max_model_len\":%d}%s\n",
                  s->started, longest_text(s), *name ? "" : "]}");
    http_respond(c, 200, "application/json", "");
}

static void write_histogram(FILE *out, const struct server *s, enum histogram_name which) {
    const struct histogram *h = &s->histograms[which];
    const char *name = serve_histograms[which];
    int64_t n = 0;
    (void)fprintf(out, "# TYPE vllm:%s histogram\n", name);
    for (int i = 0; i <= N_BOUNDS; i++) {
        n += h->counts[i];
        (void)fprintf(out, "vllm:%s_bucket{model_name=\"%s\",le=\"", name, s->name);
        (void)fprintf(out, i < N_BOUNDS ? "%g" : "+Inf", i < N_BOUNDS ? serve_bounds[i] : 0);
        (void)fprintf(out, "\"} %" PRId64 "\n", n);
    }
    (void)fprintf(out, "vllm:%s_sum{model_name=\"%s\"} %.9g\n", name, s->name, h->sum);
    (void)fprintf(out, "vllm:%s_count{model_name=\"%s\"} %" PRId64 "\n", name, s->name, h->n);
}

static void get_metrics(struct server *s, struct http_connection *c) {
    const struct engine_config *config = engine_config_of(s->answers->engine);
    struct engine_stats stats = engine_stats(s->answers->engine);
    FILE *out = http_body(c);
    int running = 0, waiting = 0, blocks = 0, used = 0;
    engine_lock(s->answers->engine);
    for (const struct task *t = s->tasks; t; t = t->next)
        for (int i = 0; t->submitted && i < t->n_choices; i++) {
            enum request_state state = t->choices[i].answer.request.state;
            waiting += state == REQUEST_WAITING;
            running += state != REQUEST_WAITING && state != REQUEST_FINISHED;
        }
    engine_unlock(s->answers->engine);
    for (int i = 0; i < config->n_workers; i++) {
        blocks += config->workers[i].blocks;
        used += stats.places[i].pinned + stats.places[i].in_flight;
    }
    const struct {
        const char *type, *name;
        double value;
    } metrics[] = {
        {"gauge", "num_requests_running", running},
        {"gauge", "num_requests_waiting", waiting},
        {"gauge", "kv_cache_usage_perc", answers_ratio(used, blocks)},
        {"gauge", "gpu_cache_usage_perc", answers_ratio(used, blocks)},
        {"counter", "prefix_cache_queries_total", (double)s->prompt_tokens},
        {"counter", "prefix_cache_hits_total", (double)stats.sched.prefix_hit_tokens},
        {"counter", "prompt_tokens_total", (double)s->prompt_tokens},
        {"counter", "generation_tokens_total", (double)s->generated_tokens},
        {"counter", "num_preemptions_total", (double)stats.sched.preemptions},
    };
    for (size_t i = 0; i < sizeof metrics / sizeof *metrics; i++)
        (void)fprintf(out, "# TYPE vllm:%s %s\nvllm:%s{model_name=\"%s\"} %.15g\n", metrics[i].name,
                      metrics[i].type, metrics[i].name, s->name, metrics[i].value);
    (void)fputs("# TYPE vllm:request_success_total counter\n", out);
    for (int i = FINISH_STOP; i <= FINISH_ERROR; i++)
        (void)fprintf(out,
                      "vllm:request_success_total{model_name=\"%s\",finished_reason=\"%s\"} "
                      "%" PRId64 "\n",
                      s->name, answers_reasons[i], s->finished[i]);
    (void)fprintf(out,
                  "# TYPE vllm:cache_config_info gauge\n"
                  "vllm:cache_config_info{block_size=\"%d\",num_gpu_blocks=\"%d\"} 1\n",
                  BLOCK_TOKENS, blocks);
    for (int i = 0; i < N_HISTOGRAMS; i++)
        write_histogram(out, s, (enum histogram_name)i);
    http_respond(c, 200, "text/plain; version=0.0.4", "");
}

static void get_page(struct server *s, struct http_connection *c) {
    (void)s;
    (void)fwrite(watch_page, 1, (size_t)(watch_page_end - watch_page), http_body(c));
    http_respond(c, 200, "text/html; charset=utf-8",
                 "Content-Security-Policy: default-src 'self' 'unsafe-inline'; img-src data:\r\n");
}

static void get_stats(struct server *s, struct http_connection *c) {
    watch_json(http_body(c), s->watch);
    http_respond(c, 200, "application/json", "Cache-Control: no-store\r\n");
}

/* ---- who may ask ---- */

/* In a time that does not tell how much of it was right. */
static bool same_key(const char *given, const char *key, size_t length) {
    size_t n = strlen(given);
    unsigned differs = n != length;
    for (size_t i = 0; i < n; i++)
        differs |= (unsigned)(given[i] ^ key[i % length]);
    return differs == 0;
}

/* The password of HTTP Basic (RFC 7617), of base64 of `user:password`, in `text`; "": none. */
static const char *basic_password(const char *value, char text[HTTP_HEAD]) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    size_t length = 0;
    unsigned bits = 0;
    int n = 0;
    for (const char *digit; *value && (digit = strchr(digits, *value)) != NULL; value++) {
        bits = bits << 6 | (unsigned)(digit - digits);
        n += 6;
        if (n >= 8)
            text[length++] = (char)(bits >> (n -= 8));
    }
    text[length] = 0;
    const char *colon = strchr(text, ':');
    return colon && strspn(value, "=") == strlen(value) ? colon + 1 : "";
}

static bool has_key(const struct server *s, const struct http_request *r) {
    const char *value = http_field(r, "authorization"), *given = "";
    char text[HTTP_HEAD];
    bool good = !s->keys;
    if (value && strncasecmp(value, "Bearer ", 7) == 0)
        given = value + 7;
    else if (value && strncasecmp(value, "Basic ", 6) == 0)
        given = basic_password(value + 6, text);
    for (const char *key = s->keys; key && *key; key += strspn(key, "\r\n")) {
        size_t length = strcspn(key, "\r\n");
        good |= length > 0 && same_key(given, key, length);
        key += length;
    }
    return good;
}

/* A page of elsewhere may not spend what this machine computes: browsers say whose it is. */
static bool is_foreign(const struct http_request *r) {
    const char *origin = http_field(r, "origin"), *host = http_field(r, "host");
    const char *at = origin ? strstr(origin, "://") : NULL;
    return origin && (!at || !host || strcasecmp(at + 3, host) != 0);
}

/* Nor one whose own name leads here by now (DNS rebinding), which is then no foreign origin. Who
 * serves this machine alone, without a key, is asked by browsers by its address, which no such name
 * can be, by `localhost`, or by the name that --host gives. */
static bool is_misled(const struct server *s, const struct http_request *r) {
    const char *host = http_field(r, "host"), *own = s->host;
    const char *agent = http_field(r, "user-agent"); /* a GET has no origin */
    bool browser = http_field(r, "origin") || http_field(r, "sec-fetch-site") ||
                   (agent && strncasecmp(agent, "Mozilla/", 8) == 0);
    if (!browser || s->keys || !http_is_local(s->http) || !host || *host == '[')
        return false;
    size_t n = strcspn(host, ":");
    return strspn(host, "0123456789.") != n &&
           (n != strlen("localhost") || strncasecmp(host, "localhost", n) != 0) &&
           (n != strlen(own) || strncasecmp(host, own, n) != 0);
}

static bool serve_begins(void *context, struct http_connection *c) {
    struct server *s = context;
    const struct http_request *r = &c->request;
    bool health = strcmp(r->path, "/health") == 0;
    /* a browser asks its reader for it, and sends it with all that it fetches; two fields, for
     * Chromium asks nobody where both schemes stand in one */
    if (!health && !has_key(s, r))
        return refuse_task(c, 401, NULL, "this server needs a key: Authorization: Bearer KEY",
                           "WWW-Authenticate: Basic realm=\"dynamo\"\r\n"
                           "WWW-Authenticate: Bearer\r\n");
    if (!health && is_foreign(r))
        return refuse_task(c, 403, NULL, "a page of another origin may not ask this server", "");
    if (!health && is_misled(s, r))
        return refuse_task(c, 403, NULL,
                           "Host: expected localhost or an address, since there is no --api-key",
                           "");
    if (s->answers->activity == INTERRUPTED)
        return refuse_task(c, 503, NULL, "this server is ending", "");
    return true;
}

/* ---- routes ---- */

static const struct route {
    const char *method, *path;
    bool names; /* what is behind the path and / names something */
    void (*answer)(struct server *s, struct http_connection *c);
} routes[] = {
    {"GET", "/", false, get_page},
    {"GET", "/stats", false, get_stats},
    {"GET", "/health", false, get_health},
    {"GET", "/metrics", false, get_metrics},
    {"GET", "/v1/models", true, get_models},
    {"POST", "/v1/chat/completions", false, post_task},
    {"POST", "/v1/completions", false, post_task},
    {"POST", "/tokenize", false, post_task},
};

static const struct route *find_route(const char *path) {
    for (size_t i = 0; i < sizeof routes / sizeof *routes; i++) {
        size_t n = strlen(routes[i].path);
        if (strncmp(path, routes[i].path, n) == 0 &&
            (!path[n] || (routes[i].names && path[n] == '/')))
            return &routes[i];
    }
    return NULL;
}

static void serve_answer(void *context, struct http_connection *c) {
    const struct http_request *r = &c->request;
    const struct route *route = find_route(r->path);
    bool reads = route && *route->method == 'G';
    if (!route)
        refuse_task(c, 404, NULL, "there is nothing of this name", "");
    else if (strcmp(r->method, route->method) == 0 || (reads && strcmp(r->method, "HEAD") == 0))
        route->answer(context, c);
    else
        refuse_task(c, 405, NULL, "not by this method",
                    reads ? "Allow: GET, HEAD\r\n" : "Allow: POST\r\n");
}

/* ---- running ---- */

static void *wait_for_news(void *context) {
    struct server *s = context;
    struct engine *engine = s->answers->engine;
    engine_lock(engine);
    while (!s->ended) {
        engine_wait(engine, INFINITY);
        http_wake(s->http); /* with the lock held, so that no news is missed */
    }
    engine_unlock(engine);
    return NULL;
}

bool serve_run(struct server *s, struct answers *answers, char error[ERROR_LENGTH]) {
    pthread_t waiter, reader;
    bool v6 = strchr(s->host, ':') != NULL;
    s->answers = answers;
    answers->activity = SERVING;
    if (pthread_create(&reader, NULL, read_tasks, s) != 0 ||
        pthread_create(&waiter, NULL, wait_for_news, s) != 0)
        return fail(error, "cannot start threads");
    bool ok = http_listen(s->http);
    if (ok)
        (void)fprintf(stderr, "dynamo: %s at http://%s%s%s:%d/v1\n", s->name, v6 ? "[" : "",
                      s->host, v6 ? "]" : "", http_port(s->http));
    while (ok && (http_turn(s->http) || s->tasks)) {
    }
    engine_lock(answers->engine);
    s->ended = true;
    engine_wake(answers->engine);
    engine_unlock(answers->engine);
    (void)close(s->unread[1]); /* which the reader sees */
    s->unread[1] = -1;
    pthread_join(waiter, NULL);
    pthread_join(reader, NULL);
    answers->activity = IDLE;
    return ok || fail(error, "--serve: cannot listen");
}

/* Keys, one a line, that clients can send. */
static bool are_keys(const char *option, const char *text, char *error) {
    size_t line_ends = strspn(text, "\r\n"), n = line_ends;
    while (isgraph((unsigned char)text[n]) || text[n] == '\r' || text[n] == '\n')
        n++;
    return (n > line_ends && !text[n]) ||
           fail(error, "%s: expected a key, of ASCII without spaces", option);
}

static bool read_keys(struct server *s, char *error) {
    const char *key = s->options->api_key, *path = s->options->api_key_file;
    size_t length;
    char *file = path ? cli_read_file(path, &length, error) : NULL;
    bool good = (!path || file) && (!key || are_keys("--api-key", key, error)) &&
                (!file || are_keys("--api-key-file", file, error));
    if (good && (key || file) && asprintf(&s->keys, "%s\n%s", key ? key : "", file ? file : "") < 0)
        abort();
    free(file);
    return good;
}

struct server *serve_open(const struct options *options, struct watch *watch,
                          char error[ERROR_LENGTH]) {
    struct server *s = calloc(1, sizeof *s);
    if (!s)
        abort();
    const char *slash = strrchr(options->model, '/');
    s->options = options;
    s->watch = watch;
    s->host = options->host ? options->host : "127.0.0.1";
    (void)snprintf(s->name, sizeof s->name, "%s", slash ? slash + 1 : options->model);
    for (char *at = s->name; *at; at++) /* metrics quote it */
        *at = *at == '"' || *at == '\\' || (unsigned char)*at < ' ' ? '_' : *at;
    s->started = (int64_t)time(NULL);
    s->unread[0] = s->unread[1] = -1;
    const struct http_handler handler = {serve_begins, serve_answer, serve_gone, serve_turn, s};
    if (read_keys(s, error) && (s->http = http_open(s->host, options->serve, &handler, error))) {
        if (pipe2(s->unread, O_CLOEXEC) == 0 && fcntl(s->unread[1], F_SETFL, O_NONBLOCK) == 0)
            return s;
        (void)fail(error, "--serve: %s", strerror(errno));
    }
    serve_close(s);
    return NULL;
}

void serve_close(struct server *s) {
    if (!s)
        return;
    http_close(s->http);
    for (int i = 0; i < 2; i++)
        if (s->unread[i] >= 0)
            (void)close(s->unread[i]);
    free(s->keys);
    free(s);
}

#endif /* SERVE_IMPLEMENTATION */
