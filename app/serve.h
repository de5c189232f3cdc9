/* serve.h: OpenAI's protocol in front of the engine.
 *
 *     struct server *server = serve_open(&options, error); // before the model: it has the port
 *     int status = serve_run(server, &answers);            // until SIGTERM
 *     serve_close(server);
 *
 * A POST that asks for text becomes a *task*: prompts × n answers (answers.h), each with a request
 * of its own. One thread does all: it turns http.h's loop, encodes prompts (so others wait while it
 * encodes one of megabytes), takes what is new of each answer, a token at a time, and sends it, or
 * waits for the whole. Another waits for the engine's news, and wakes the first. A client that goes
 * away cancels its task, which is kept until its requests have left their steps.
 *
 * One table says what each field of a request means. A field that is not known here is ignored;
 * one that is known, not served, and would change the answer, is refused.
 * Read next: http.h, answers.h. */
#ifndef SERVE_H
#define SERVE_H

#include "answers.h"
#include "watch.h"

struct serve_options {
    const char *host; /* NULL: this machine alone */
    int port;         /* 0: any */
    const char *key, *key_file;
    const char *model;                   /* its path; clients know it by the last part */
    const struct request_spec *defaults; /* for what a request does not say */
    struct watch *watch;                 /* of the same engine: /stats, for the page */
};

struct server;
struct server *serve_open(const struct serve_options *options, char error[ERROR_LENGTH]);
/* Serves until answers->activity is INTERRUPTED, and all that has begun has ended. False: `error`.
 */
bool serve_run(struct server *server, struct answers *answers, char error[ERROR_LENGTH]);
void serve_close(struct server *server); /* NULL: nothing is done */

#endif /* SERVE_H */

#ifdef SERVE_IMPLEMENTATION
#undef SERVE_IMPLEMENTATION

#include "../lib/json.h"
#include "http.h"
#include <ctype.h>
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
};

struct task {
    struct task *next;
    struct http_connection *connection; /* NULL: its client has gone */
    char *body;                         /* that texts of requests point into */
    char id[40];
    int64_t created;
    bool chat, begun; /* begun: a stream whose head is sent */
    bool stream, usage, continuous_usage, ignore_eos, token_ids;
    bool logprobs; /* of each token its own, and those of the n_top likeliest */
    int n, min_tokens, n_top;
    struct request_spec *prompts; /* (n_prompts) */
    int n_prompts, n_choices;
    struct choice *choices; /* (n_choices) n of the first prompt, n of the second, … */
};

enum histogram_name { TTFT, ITL, E2E, QUEUED, PREFILL, DECODE, N_HISTOGRAMS };
static const double serve_bounds[] = {.001, .0025, .005, .01, .025, .05, .1,  .25, .5,
                                      1,    2.5,   5,    10,  25,   50,  100, 250};
enum { N_BOUNDS = sizeof serve_bounds / sizeof *serve_bounds };
struct histogram {
    int64_t counts[N_BOUNDS + 1], n;
    double sum;
};

struct server {
    struct serve_options options;
    char name[256]; /* of the model */
    char **keys;    /* (n_keys) none: nobody needs one */
    int n_keys;
    char *key_text; /* the file of them */
    struct http *http;
    struct answers *answers;
    struct task *tasks;
    int64_t started, n_tasks;
    bool ended; /* under the engine's lock */
    bool gpus;
    struct histogram histograms[N_HISTOGRAMS];
    int64_t prompt_tokens, generated_tokens, finished[FINISH_ERROR + 1];
};

/* ---- errors ---- */

static void write_error(FILE *out, int status, const char *param, const char *message) {
    const char *type = status == 401   ? "authentication_error"
                       : status == 429 ? "rate_limit_error"
                       : status >= 500 ? "server_error"
                                       : "invalid_request_error";
    (void)fputs("{\"error\":{\"message\":", out);
    json_string(out, message, strlen(message));
    (void)fprintf(out, ",\"type\":\"%s\",\"param\":", type);
    if (param)
        json_string(out, param, strlen(param));
    else
        (void)fputs("null", out);
    (void)fputs(",\"code\":null}}", out);
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
    FIELD_OBJECT,   /* what is in it counts as if it stood outside */
    FIELD_NEUTRAL   /* not served: null, nothing, or one of `word` */
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
    {"top_k", FIELD_REQUEST, .word = "top_k"},
    {"min_p", FIELD_REQUEST, .word = "min_p"},
    {"seed", FIELD_REQUEST, .word = "seed"},
    {"stop", FIELD_REQUEST, .word = "stop"},
    {"max_tokens", FIELD_REQUEST, .word = "n"},
    {"max_completion_tokens", FIELD_REQUEST, .word = "n"},
    {"stream", FIELD_FLAG, AT(stream)},
    {"stream_options", .kind = FIELD_OBJECT},
    {"include_usage", FIELD_FLAG, AT(usage)},
    {"continuous_usage_stats", FIELD_FLAG, AT(continuous_usage)},
    {"ignore_eos", FIELD_FLAG, AT(ignore_eos)},
    {"return_token_ids", FIELD_FLAG, AT(token_ids)},
    {"n", FIELD_COUNT, AT(n), .low = 1, .high = SERVE_CHOICES},
    {"min_tokens", FIELD_COUNT, AT(min_tokens), .high = INT_MAX},
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

static bool take_fields(struct task *t, struct request_spec *spec, struct json_node *nodes,
                        int object, const char **param, char *error);

/* What is wrong, told of the name that the client gave in place of a request file's key. False. */
static bool tell_of(const char *name, char *error) {
    char rest[ERROR_LENGTH];
    (void)snprintf(rest, sizeof rest, "%s", strchr(error, ':') ? strchr(error, ':') : "");
    return fail(error, "%.64s%.400s", name, rest);
}

static bool tell_of_prompt(char *error) { /* which may have been ids */
    return strncmp(error, "ids:", 4) == 0 && tell_of("prompt", error);
}

/* Sets what a field says, whose value is not null. */
static bool take_field(struct task *t, struct request_spec *spec, const struct field *field,
                       struct json_node *nodes, int key, const char **param, char *error) {
    struct json_node *value = &nodes[key + 1];
    void *target = (char *)t + field->offset;
    bool is_flag = value->type == 't' || value->type == 'f';
    if (field->kind == FIELD_OBJECT && value->type == '{')
        return take_fields(t, spec, nodes, key + 1, param, error);
    if (field->kind == FIELD_OBJECT)
        return fail(error, "%s: expected an object", field->name);
    if (field->kind == FIELD_REQUEST) {
        if (strcmp(field->name, "top_k") == 0 && value->length == 2 &&
            memcmp(value->text, "-1", 2) == 0)
            value->text[1] = '0'; /* -1: others' word for all; as -0 it is ours */
        nodes[key] =
            (struct json_node){'"', key + 1, (char *)(uintptr_t)field->word, strlen(field->word)};
        spec->seeded = spec->seeded || strcmp(field->word, "seed") == 0;
        return requests_set(spec, nodes, key, error) || tell_of(field->name, error);
    }
    if (field->kind == FIELD_FLAG || (field->kind == FIELD_LOGPROBS && t->chat)) {
        *(field->kind == FIELD_FLAG ? (bool *)target : &t->logprobs) = value->type == 't';
        return is_flag || fail(error, "%s: expected true or false", field->name);
    }
    double number = value->type == '0' ? strtod(value->text, NULL) : -1;
    if (number < field->low || number > field->high || number != (double)(int)number)
        return fail(error, "%s: expected a whole number from %d to %d", field->name, field->low,
                    field->high);
    *(int *)target = (int)number;
    t->logprobs = t->logprobs || field->kind == FIELD_LOGPROBS;
    return true;
}

/* *param: the field that is wrong. */
static bool take_fields(struct task *t, struct request_spec *spec, struct json_node *nodes,
                        int object, const char **param, char *error) {
    for (int key = object + 1; key < nodes[object].next; key = nodes[key + 1].next) {
        const char *name = nodes[key].text;
        if (nodes[key + 1].type == 'n')
            continue;
        for (size_t i = 0; i < sizeof fields / sizeof *fields; i++)
            if (strcmp(fields[i].name, name) == 0) {
                *param = fields[i].name;
                if (!take_field(t, spec, &fields[i], nodes, key, param, error))
                    return false;
                break;
            }
        for (size_t i = 0; i < sizeof neutral / sizeof *neutral; i += 2)
            if (strcmp(neutral[i], name) == 0 && !is_neutral(nodes, key + 1, neutral[i + 1])) {
                *param = neutral[i];
                return fail(error, "%s: this server has none of it; leave it out%s%s", name,
                            *neutral[i + 1] ? ", or give " : "", neutral[i + 1]);
            }
    }
    return true;
}

/* The value of a key of the whole; NULL: there is none, or it is null. */
static struct json_node *find_value(struct json_node *nodes, const char *name) {
    struct json_node *found = NULL;
    for (int key = 1; key < nodes[0].next; key = nodes[key + 1].next)
        if (strcmp(nodes[key].text, name) == 0)
            found = nodes[key + 1].type == 'n' ? NULL : &nodes[key + 1];
    return found;
}

/* Content in parts becomes one text, in their place: it has fewer bytes. */
static bool join_parts(struct json_node *nodes, int list, char *error) {
    char *to = NULL, *begin = NULL;
    for (int part = list + 1; part < nodes[list].next; part = nodes[part].next) {
        const struct json_node *text = NULL, *type = NULL;
        for (int key = part + 1; nodes[part].type == '{' && key < nodes[part].next;
             key = nodes[key + 1].next) {
            text = strcmp(nodes[key].text, "text") == 0 ? &nodes[key + 1] : text;
            type = strcmp(nodes[key].text, "type") == 0 ? &nodes[key + 1] : type;
        }
        if (!text || text->type != '"' || (type && strcmp(type->text, "text") != 0))
            return fail(error, "messages: got a part of content that is not text");
        if (!begin)
            begin = to = nodes[list].text;
        else
            *to++ = '\n';
        memmove(to, text->text, text->length);
        to += text->length;
    }
    if (!begin)
        return fail(error, "messages: got content without parts");
    *to = 0;
    nodes[list] = (struct json_node){'"', nodes[list].next, begin, (size_t)(to - begin)};
    return true;
}

/* Messages as files of requests have them: developer is another word for system. */
static bool take_messages(struct request_spec *spec, struct json_node *nodes, char *error) {
    struct json_node *list = find_value(nodes, "messages");
    if (!list || list->type != '[')
        return fail(error, "messages: expected a list of messages");
    for (int i = (int)(list - nodes) + 1; i < list->next; i = nodes[i].next)
        for (int key = i + 1; nodes[i].type == '{' && key < nodes[i].next;
             key = nodes[key + 1].next) {
            struct json_node *value = &nodes[key + 1];
            if (strcmp(nodes[key].text, "role") == 0 && strcmp(value->text, "developer") == 0)
                strcpy(value->text, "system");
            if (strcmp(nodes[key].text, "content") == 0 && value->type == '[' &&
                !join_parts(nodes, key + 1, error))
                return false;
            if (strcmp(nodes[key].text, "tool_calls") == 0 && !is_neutral(nodes, key + 1, ""))
                return fail(error, "messages: got tool_calls, which this server has none of");
        }
    return requests_set(spec, nodes, (int)(list - nodes) - 1, error);
}

/* A text, or ids, or a list of either. */
static bool take_prompts(struct task *t, const struct request_spec *spec, struct json_node *nodes,
                         char *error) {
    const struct json_node *value = find_value(nodes, "prompt");
    if (!value)
        return fail(error, "prompt: expected a text, token ids, or a list of either");
    int at = (int)(value - nodes);
    bool list = value->type == '[' && at + 1 < value->next && nodes[at + 1].type != '0';
    for (int i = list ? at + 1 : at; i < value->next; i = nodes[i].next) {
        char key[] = "ids";
        struct json_node pair[] = {{'"', 1, key, 3}, nodes[i]};
        t->prompts = grow(t->prompts, (size_t)t->n_prompts, sizeof *t->prompts);
        struct request_spec *one = &t->prompts[t->n_prompts++];
        *one = *spec;
        one->plain = true;
        one->system = NULL; /* which is told to chats */
        pair[1].next = 2;
        if (nodes[i].type == '"') {
            one->prompt = nodes[i].text;
            one->prompt_length = nodes[i].length;
        } else if (nodes[i].type != '[') {
            return fail(error, "prompt: expected a text, token ids, or a list of either");
        } else if (!requests_set(one, pair, 0, error)) {
            return tell_of_prompt(error);
        }
    }
    return true;
}

/* ---- tasks ---- */

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

/* What the body asks for. False: it is wrong, or its prompts are. */
static bool read_task(struct server *s, struct task *t, struct json_node *nodes, const char **param,
                      char *error) {
    struct request_spec spec = *s->options.defaults;
    const struct json_node *model = find_value(nodes, "model");
    if (!t->chat && spec.n < 0)
        spec.n = SERVE_COMPLETION_TOKENS;
    *param = "model";
    if (model && (model->type != '"' || strcmp(model->text, s->name) != 0))
        return fail(error, "model: got %.*s, this server has %.200s",
                    model->length < 100 ? (int)model->length : 100, model->text, s->name);
    if (!take_fields(t, &spec, nodes, 0, param, error))
        return false;
    *param = "logprobs";
    if (t->logprobs && s->gpus)
        return fail(error, "logprobs: so far only of a server that computes on the CPU");
    if (t->n_top > 0 && !t->logprobs)
        return fail(error, "top_logprobs: expected logprobs true with it");
    spec.min_new = t->ignore_eos ? INT_MAX : t->min_tokens;
    *param = t->chat ? "messages" : "prompt";
    if (t->chat) {
        t->prompts = grow(NULL, 0, sizeof *t->prompts);
        t->prompts[t->n_prompts++] = spec;
        if (!take_messages(&t->prompts[0], nodes, error))
            return false;
    } else if (!take_prompts(t, &spec, nodes, error)) {
        return false;
    }
    if (t->n_prompts > SERVE_CHOICES / t->n)
        return fail(error, "%s: got %d prompts, expected at most %d answers", *param, t->n_prompts,
                    SERVE_CHOICES);
    return true;
}

/* Turns what it asks for into requests. False: one of them is wrong. */
static bool prepare_task(struct server *s, struct task *t, double deadline, char *error) {
    struct answers *a = s->answers;
    int longest = sched_max_length(engine_sched(a->engine));
    t->choices = calloc((size_t)(t->n_prompts * t->n), sizeof *t->choices);
    if (!t->choices)
        abort();
    for (int i = 0; i < t->n_prompts * t->n; i++) {
        struct request_spec *spec = &t->prompts[i / t->n];
        struct answer *answer = &t->choices[t->n_choices++].answer;
        if (deadline > 0)
            spec->deadline = (float)deadline;
        answers_begin(a, spec, answer);
        if (spec->seeded)
            answer->request.sampling.seed = answers_seed(spec->sampling.seed, i % t->n);
        struct request_spec again = *spec; /* encoded once */
        const struct request *first = &t->choices[i - i % t->n].answer.request;
        if (i % t->n > 0) {
            again.prompt = NULL;
            again.ids = first->tokens;
            again.n_ids = first->n_prompt;
        }
        if (!answers_prepare(a, &again, NULL, NULL, 0, longest, &answer->request))
            return fail(error, "%s", answer->request.error) || tell_of_prompt(error);
        if (t->logprobs)
            answer->request.top =
                calloc((size_t)answer->request.max_new, sizeof *answer->request.top);
        if (t->logprobs && !answer->request.top)
            return fail(error, "out of memory");
    }
    return true;
}

/* Cancels what has not ended; its client has gone, or was told. */
static void cancel_task(struct server *s, struct task *t) {
    struct engine *engine = s->answers->engine;
    t->connection = NULL;
    engine_lock(engine);
    for (int i = 0; i < t->n_choices; i++)
        sched_cancel(engine_sched(engine), &t->choices[i].answer.request, false, engine_now());
    engine_wake(engine);
    engine_unlock(engine);
}

static void serve_gone(void *context, struct http_connection *c) {
    cancel_task(context, c->user);
}

/* Hands its requests to the engine; where one is refused at once, so is the task. */
static void submit_task(struct server *s, struct task *t) {
    struct engine *engine = s->answers->engine;
    struct http_connection *c = t->connection;
    const struct request *wrong = NULL;
    char error[ERROR_LENGTH], retry[64] = "";
    bool full = false;
    engine_lock(engine);
    for (int i = 0; i < t->n_choices; i++) {
        struct request *r = &t->choices[i].answer.request;
        answers_submit(s->answers, &t->choices[i].answer);
        wrong = !wrong && r->reason == FINISH_ERROR ? r : wrong;
        s->prompt_tokens += i % t->n == 0 && r->reason != FINISH_ERROR ? r->n_prompt : 0;
    }
    engine_wake(engine);
    if (wrong) {
        full = wrong->refused;
        memcpy(error, wrong->error, sizeof error);
    }
    engine_unlock(engine);
    t->next = s->tasks;
    s->tasks = t;
    c->user = t;
    http_later(c);
    if (!wrong)
        return;
    cancel_task(s, t);
    const struct histogram *queued = &s->histograms[QUEUED];
    double wait = ceil(answers_ratio(queued->sum, (double)queued->n));
    if (full)
        (void)snprintf(retry, sizeof retry, "Retry-After: %d\r\n",
                       (int)fmin(fmax(wait, 1), 60)); /* as long as others have waited */
    refuse_task(c, full ? 429 : 400, NULL, error, retry);
}

/* False: it was answered that nobody does any more. */
static bool computes(struct server *s, struct http_connection *c) {
    engine_lock(s->answers->engine);
    bool failed = sched_max_length(engine_sched(s->answers->engine)) == 0;
    engine_unlock(s->answers->engine);
    return !failed || refuse_task(c, 503, NULL, "all workers have failed", "");
}

/* A body as JSON, in memory of its own, which *text is. NULL: it was refused. */
static struct json_node *read_body(struct http_connection *c, char **text) {
    char error[ERROR_LENGTH];
    size_t n = c->request.length;
    *text = malloc(n + 1);
    if (!*text)
        abort();
    memcpy(*text, c->request.body, n);
    (*text)[n] = 0;
    struct json_node *nodes = json_parse(*text, n, error);
    if (nodes && nodes[0].type == '{')
        return nodes;
    if (nodes)
        (void)fail(error, "expected an object");
    free(nodes);
    free(*text);
    *text = NULL;
    refuse_task(c, 400, NULL, error, "");
    return NULL;
}

/* A header's seconds; 0: none; < 0: it has something else. */
static double read_deadline(const struct http_request *r) {
    const char *value = http_field(r, "x-request-timeout");
    char *end;
    double seconds = value ? strtod(value, &end) : 0;
    return !value ? 0 : end > value && !*end && seconds > 0 && seconds < 1e6 ? seconds : -1;
}

static void post_task(struct server *s, struct http_connection *c) {
    bool chat = strstr(c->request.path, "chat") != NULL; /* of its two routes */
    char error[ERROR_LENGTH] = "", *body;
    const char *param = NULL;
    double deadline = read_deadline(&c->request);
    if (deadline < 0) {
        refuse_task(c, 400, NULL, "x-request-timeout: expected a number of seconds", "");
        return;
    }
    struct json_node *nodes = computes(s, c) ? read_body(c, &body) : NULL;
    if (!nodes)
        return;
    struct task *t = calloc(1, sizeof *t);
    if (!t)
        abort();
    *t = (struct task){.connection = c, .body = body, .chat = chat, .n = 1};
    t->created = (int64_t)time(NULL);
    (void)snprintf(t->id, sizeof t->id, "%s-%016" PRIx64, chat ? "chatcmpl" : "cmpl",
                   answers_random((uint64_t)s->started, (uint64_t)s->n_tasks++));
    bool ok = read_task(s, t, nodes, &param, error);
    free(nodes);
    if (ok && prepare_task(s, t, deadline, error)) {
        submit_task(s, t);
        return;
    }
    refuse_task(c, param && strcmp(param, "model") == 0 ? 404 : 400, param, error, "");
    free_task(t);
}

/* ---- answers on their way out ---- */

static const char *finish_word(const struct choice *choice) {
    return choice->answer.ended ? answers_reasons[answers_reason(&choice->answer)] : NULL;
}

static void write_begin(FILE *out, const struct server *s, const struct task *t,
                        const char *object) {
    (void)fprintf(out, "{\"id\":\"%s\",\"object\":\"%s\",\"created\":%" PRId64 ",\"model\":", t->id,
                  object, t->created);
    json_string(out, s->name, strlen(s->name));
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

/* A token's text, quoted; with `bytes` those, too, for it may hold a part of a character. */
static void write_token(FILE *out, const struct server *s, int token, bool bytes) {
    struct tok_stream stream = {.begun = true};
    char text[TOK_TEXT_SIZE + 4] = "";
    const struct tokenizer *tokenizer = s->answers->tokenizer;
    size_t n = tokenizer ? tok_decode(tokenizer, &stream, token, text) : 0;
    memcpy(text + n, stream.held, (size_t)stream.n_held);
    n += (size_t)stream.n_held;
    json_string(out, text, n);
    for (size_t i = 0; i < n && bytes; i++)
        (void)fprintf(out, "%s%d", i > 0 ? "," : ",\"bytes\":[", (unsigned char)text[i]);
    (void)fputs(!bytes ? "" : n > 0 ? "]" : ",\"bytes\":[]", out);
}

/* Of tokens from `first` on, as a chat has them. */
static void write_chat_logprobs(FILE *out, const struct server *s, const struct task *t,
                                const struct answer *answer, int first) {
    const struct request *r = &answer->request;
    (void)fputs("{\"content\":[", out);
    for (int i = first; i < answers_generated(answer); i++) {
        const struct sampler_top *top = &r->top[i];
        (void)fputs(i > first ? ",{\"token\":" : "{\"token\":", out);
        write_token(out, s, r->tokens[r->n_prompt + i], true);
        (void)fprintf(out, ",\"logprob\":%.6g,\"top_logprobs\":[", (double)top->own);
        for (int k = 0; k < t->n_top && k < top->n; k++) {
            (void)fputs(k > 0 ? ",{\"token\":" : "{\"token\":", out);
            write_token(out, s, top->token[k], true);
            (void)fprintf(out, ",\"logprob\":%.6g}", (double)top->logprob[k]);
        }
        (void)fputs("]}", out);
    }
    (void)fputs("]}", out);
}

static void write_logprobs(FILE *out, const struct server *s, const struct task *t,
                           const struct answer *answer, int first) {
    const struct request *r = &answer->request;
    int n = answers_generated(answer);
    if (t->chat) {
        write_chat_logprobs(out, s, t, answer, first);
        return;
    }
    (void)fputs("{\"tokens\":[", out);
    for (int i = first; i < n; i++) {
        (void)fputs(i > first ? "," : "", out);
        write_token(out, s, r->tokens[r->n_prompt + i], false);
    }
    (void)fputs("],\"token_logprobs\":[", out);
    for (int i = first; i < n; i++)
        (void)fprintf(out, "%s%.6g", i > first ? "," : "", (double)r->top[i].own);
    (void)fputs("],\"top_logprobs\":[", out);
    for (int i = first; i < n; i++) {
        (void)fputs(i > first ? ",{" : "{", out);
        for (int k = 0; k < t->n_top && k < r->top[i].n; k++) {
            (void)fputs(k > 0 ? "," : "", out);
            write_token(out, s, r->top[i].token[k], false);
            (void)fprintf(out, ":%.6g", (double)r->top[i].logprob[k]);
        }
        (void)fputc('}', out);
    }
    (void)fputs("]}", out);
}

/* What a choice has from byte `shown` and token `first` on. */
static void write_choice(FILE *out, const struct server *s, const struct task *t,
                         struct choice *choice, bool delta, size_t shown, int first) {
    const struct answer *answer = &choice->answer;
    size_t thoughts = answer->n_thought - choice->thought_shown;
    const char *finish = finish_word(choice);
    (void)fprintf(out, "{\"index\":%d,", (int)(choice - t->choices));
    if (t->chat) {
        (void)fprintf(out, delta ? "\"delta\":{" : "\"message\":{");
        (void)fputs(first == 0 ? "\"role\":\"assistant\"," : "", out);
        if (thoughts > 0) {
            (void)fputs("\"reasoning_content\":", out);
            json_string(out, answer->thought + choice->thought_shown, thoughts);
            (void)fputc(',', out);
        }
        (void)fputs("\"content\":", out);
    } else {
        (void)fputs("\"text\":", out);
    }
    json_string(out, answer->length ? answer->text + shown : "", answer->safe - shown);
    (void)fputs(t->chat ? "}" : "", out);
    choice->thought_shown = answer->n_thought;
    if (t->token_ids) {
        (void)fputs(",\"token_ids\":[", out);
        for (int i = first; i < answers_generated(answer); i++)
            (void)fprintf(out, "%s%d", i > first ? "," : "",
                          answer->request.tokens[answer->request.n_prompt + i]);
        (void)fputc(']', out);
    }
    (void)fputs(",\"logprobs\":", out);
    if (t->logprobs)
        write_logprobs(out, s, t, answer, first);
    else
        (void)fputs("null", out);
    (void)fprintf(out, ",\"finish_reason\":%s%s%s}", finish ? "\"" : "", finish ? finish : "null",
                  finish ? "\"" : "");
}

/* What ended with an error; NULL: nothing. */
static const struct request *failed_request(const struct task *t) {
    for (int i = 0; i < t->n_choices; i++)
        if (t->choices[i].answer.request.reason == FINISH_ERROR)
            return &t->choices[i].answer.request;
    return NULL;
}

/* 504 if its own deadline has passed. */
static int status_of(const struct request *r) {
    return r->deadline > 0 && engine_now() - r->submitted >= r->deadline ? 504 : 500;
}

static void send_chunk(struct server *s, struct task *t, struct choice *choice, int first) {
    struct http_connection *c = t->connection;
    FILE *out = http_body(c);
    if (!t->begun)
        http_stream(c, "text/event-stream");
    t->begun = true;
    (void)fputs("data: ", out);
    write_begin(out, s, t, t->chat ? "chat.completion.chunk" : "text_completion");
    write_choice(out, s, t, choice, true, choice->answer.shown, first);
    (void)fputc(']', out);
    if (t->continuous_usage)
        write_usage(out, t);
    (void)fputs("}\n\n", out);
    http_piece(c);
    choice->answer.shown = choice->answer.safe;
}

/* All its answers have ended. */
static void end_task(struct server *s, struct task *t) {
    struct http_connection *c = t->connection;
    const struct request *failed = failed_request(t);
    if (!c)
        return;
    if (failed && !t->begun) {
        refuse_task(c, status_of(failed), NULL, failed->error, "");
        return;
    }
    FILE *out = http_body(c);
    if (!t->stream) {
        write_begin(out, s, t, t->chat ? "chat.completion" : "text_completion");
        for (int i = 0; i < t->n_choices; i++) {
            (void)fputs(i > 0 ? "," : "", out);
            write_choice(out, s, t, &t->choices[i], false, 0, 0);
        }
        (void)fputc(']', out);
        write_usage(out, t);
        (void)fputc('}', out);
        http_respond(c, 200, "application/json", "");
        return;
    }
    if (failed) {
        (void)fputs("data: ", out);
        write_error(out, status_of(failed), NULL, failed->error);
        (void)fputs("\n\n", out);
    } else if (t->usage) {
        (void)fputs("data: ", out);
        write_begin(out, s, t, t->chat ? "chat.completion.chunk" : "text_completion");
        (void)fputc(']', out);
        write_usage(out, t);
        (void)fputs("}\n\n", out);
    }
    (void)fputs("data: [DONE]\n\n", out);
    http_piece(c);
    http_end(c);
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

/* Counts what came of a choice: a token, or its end. The times of its first and its last. */
static void count_news(struct server *s, struct choice *choice, double first, double last) {
    const struct request *r = &choice->answer.request;
    int n = answers_generated(&choice->answer);
    s->generated_tokens += n - choice->n_taken;
    if (n > choice->n_taken && n == 1)
        observe(s, TTFT, first - r->submitted);
    else if (n > choice->n_taken)
        observe(s, ITL, last - choice->last);
    choice->last = last;
    if (!choice->answer.ended)
        return;
    enum finish_reason reason = answers_reason(&choice->answer);
    s->finished[reason]++;
    if (reason != FINISH_STOP && reason != FINISH_LENGTH)
        return;
    observe(s, E2E, last - r->submitted);
    observe(s, QUEUED, r->admitted - r->submitted);
    if (first > 0) {
        observe(s, PREFILL, first - r->admitted);
        observe(s, DECODE, last - first);
    }
}

/* Takes what is new of a task. Returns whether all of it has ended. Called with the lock held,
 * which is let go for what is sent. */
static bool advance_task(struct server *s, struct task *t) {
    int n_ended = 0;
    for (int i = 0; i < t->n_choices; i++) {
        struct choice *choice = &t->choices[i];
        while (answers_advance(s->answers, &choice->answer, 1)) {
            double first = choice->answer.request.first_token;
            double last = choice->answer.request.last_token;
            bool failed = choice->answer.request.reason == FINISH_ERROR;
            engine_unlock(s->answers->engine);
            count_news(s, choice, first, last);
            if (t->connection && t->stream && !failed)
                send_chunk(s, t, choice, choice->n_taken);
            choice->n_taken = answers_generated(&choice->answer);
            engine_lock(s->answers->engine);
        }
        n_ended += choice->answer.ended;
    }
    return n_ended == t->n_choices;
}

static void serve_turn(void *context) {
    struct server *s = context;
    struct engine *engine = s->answers->engine;
    if (s->answers->activity == INTERRUPTED)
        http_drain(s->http);
    engine_lock(engine);
    for (struct task **at = &s->tasks; *at;) {
        struct task *t = *at;
        if (!advance_task(s, t)) {
            at = &t->next;
            continue;
        }
        engine_unlock(engine);
        *at = t->next;
        end_task(s, t);
        free_task(t);
        engine_lock(engine);
    }
    engine_unlock(engine);
}

/* ---- what else is served ---- */

static void get_health(struct server *s, struct http_connection *c) {
    if (!computes(s, c))
        return;
    (void)fputs("{\"status\":\"ok\"}\n", http_body(c));
    http_respond(c, 200, "application/json", "");
}

static void get_models(struct server *s, struct http_connection *c) {
    FILE *out = http_body(c);
    (void)fputs("{\"object\":\"list\",\"data\":[{\"id\":", out);
    json_string(out, s->name, strlen(s->name));
    (void)fprintf(out,
                  ",\"object\":\"model\",\"created\":%" PRId64 ",\"owned_by\":\"dynamo\","
                  "\"max_model_len\":%d}]}\n",
                  s->started, sched_max_length(engine_sched(s->answers->engine)));
    http_respond(c, 200, "application/json", "");
}

/* The ids of `prompt`, as it is, or of `messages` in the model's template. */
static void post_tokenize(struct server *s, struct http_connection *c) {
    char error[ERROR_LENGTH] = "", *body;
    struct json_node *nodes = read_body(c, &body);
    if (!nodes)
        return;
    struct task *t = calloc(1, sizeof *t);
    if (!t)
        abort();
    *t = (struct task){.body = body, .n = 1, .chat = !find_value(nodes, "prompt")};
    const char *param = NULL;
    int n = 0, *ids = NULL;
    bool ok = read_task(s, t, nodes, &param, error);
    if (ok && t->n_prompts > 1)
        (void)fail(error, "prompt: got %d, expected one", t->n_prompts);
    else if (ok)
        ids = answers_encode(s->answers, &t->prompts[0], NULL, 0, &n, error);
    if (ids) {
        FILE *out = http_body(c);
        (void)fprintf(out, "{\"count\":%d,\"max_model_len\":%d,\"tokens\":[", n,
                      sched_max_length(engine_sched(s->answers->engine)));
        for (int i = 0; i < n; i++)
            (void)fprintf(out, "%s%d", i > 0 ? "," : "", ids[i]);
        (void)fputs("]}\n", out);
        http_respond(c, 200, "application/json", "");
    } else {
        (void)tell_of_prompt(error);
        refuse_task(c, 400, param, error, "");
    }
    free(ids);
    free(nodes);
    free_task(t);
}

static void write_histogram(FILE *out, const struct server *s, enum histogram_name which,
                            const char *name) {
    const struct histogram *h = &s->histograms[which];
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

static void write_metric(FILE *out, const struct server *s, const char *type, const char *name,
                         double value) {
    (void)fprintf(out, "# TYPE vllm:%s %s\nvllm:%s{model_name=\"%s\"} %.15g\n", name, type, name,
                  s->name, value);
}

static void get_metrics(struct server *s, struct http_connection *c) {
    static const char *const names[] = {
        "time_to_first_token_seconds",  "inter_token_latency_seconds",
        "e2e_request_latency_seconds",  "request_queue_time_seconds",
        "request_prefill_time_seconds", "request_decode_time_seconds"};
    const struct engine_config *config = engine_config_of(s->answers->engine);
    struct engine_stats stats = engine_stats(s->answers->engine);
    FILE *out = http_body(c);
    int running = 0, waiting = 0, blocks = 0, used = 0;
    engine_lock(s->answers->engine);
    for (const struct task *t = s->tasks; t; t = t->next)
        for (int i = 0; i < t->n_choices; i++) {
            enum request_state state = t->choices[i].answer.request.state;
            waiting += state == REQUEST_WAITING;
            running += state != REQUEST_WAITING && state != REQUEST_FINISHED;
        }
    engine_unlock(s->answers->engine);
    for (int i = 0; i < config->n_workers; i++) {
        blocks += config->workers[i].blocks;
        used += stats.places[i].pinned + stats.places[i].in_flight;
    }
    write_metric(out, s, "gauge", "num_requests_running", running);
    write_metric(out, s, "gauge", "num_requests_waiting", waiting);
    write_metric(out, s, "gauge", "kv_cache_usage_perc", answers_ratio(used, blocks));
    write_metric(out, s, "gauge", "gpu_cache_usage_perc", answers_ratio(used, blocks));
    write_metric(out, s, "counter", "prefix_cache_queries_total", (double)s->prompt_tokens);
    write_metric(out, s, "counter", "prefix_cache_hits_total",
                 (double)stats.sched.prefix_hit_tokens);
    write_metric(out, s, "counter", "prompt_tokens_total", (double)s->prompt_tokens);
    write_metric(out, s, "counter", "generation_tokens_total", (double)s->generated_tokens);
    write_metric(out, s, "counter", "num_preemptions_total", (double)stats.sched.preemptions);
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
        write_histogram(out, s, (enum histogram_name)i, names[i]);
    http_respond(c, 200, "text/plain; version=0.0.4", "");
}

/* ---- the page ---- */

static void get_page(struct server *s, struct http_connection *c) {
    (void)s;
    (void)fwrite(watch_page, 1, (size_t)(watch_page_end - watch_page), http_body(c));
    http_respond(c, 200, "text/html; charset=utf-8",
                 "Content-Security-Policy: default-src 'self' 'unsafe-inline'; img-src data:\r\n");
}

static void get_stats(struct server *s, struct http_connection *c) {
    watch_json(http_body(c), s->options.watch);
    http_respond(c, 200, "application/json", "Cache-Control: no-store\r\n");
}

/* ---- routes ---- */

static const struct route {
    const char *method, *path;
    void (*answer)(struct server *s, struct http_connection *c);
} routes[] = {
    {"GET", "/", get_page},
    {"GET", "/stats", get_stats},
    {"GET", "/health", get_health},
    {"GET", "/metrics", get_metrics},
    {"GET", "/v1/models", get_models},
    {"POST", "/v1/chat/completions", post_task},
    {"POST", "/v1/completions", post_task},
    {"POST", "/tokenize", post_tokenize},
};

/* In a time that does not tell how much of it was right. */
static bool same_key(const char *given, const char *key) {
    size_t n = strlen(given), length = strlen(key);
    unsigned differs = n != length;
    for (size_t i = 0; i < n; i++)
        differs |= (unsigned)(given[i] ^ key[length > 0 ? i % length : 0]);
    return differs == 0;
}

/* The password in the value of HTTP Basic (RFC 7617), in base64 as `user:password`, decoded into
 * `text`; "": there is none. */
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
    bool good = s->n_keys == 0;
    if (value && strncasecmp(value, "Bearer ", 7) == 0)
        given = value + 7;
    else if (value && strncasecmp(value, "Basic ", 6) == 0)
        given = basic_password(value + 6, text);
    for (int i = 0; i < s->n_keys; i++)
        good |= same_key(given, s->keys[i]);
    return good;
}

/* A page of elsewhere may not spend what this machine computes: browsers say whose it is. */
static bool is_foreign(const struct http_request *r) {
    const char *origin = http_field(r, "origin"), *host = http_field(r, "host");
    const char *at = origin ? strstr(origin, "://") : NULL;
    return origin && (!at || !host || strcasecmp(at + 3, host) != 0);
}

static bool serve_begins(void *context, struct http_connection *c) {
    struct server *s = context;
    const struct http_request *r = &c->request;
    bool health = strcmp(r->path, "/health") == 0;
    if (!health &&
        !has_key(s, r)) /* a browser asks its reader, and sends it with all it fetches; */
        return refuse_task(
            c, 401, NULL, "this server needs a key: Authorization: Bearer KEY",
            "WWW-Authenticate: Basic realm=\"dynamo\"\r\n"
            "WWW-Authenticate: Bearer\r\n"); /* Chromium: not if both are one field */
    if (!health && is_foreign(r))
        return refuse_task(c, 403, NULL, "a page of another origin may not ask this server", "");
    if (s->answers->activity == INTERRUPTED)
        return refuse_task(c, 503, NULL, "this server is ending", "");
    return true;
}

static void serve_answer(void *context, struct http_connection *c) {
    struct server *s = context;
    const struct http_request *r = &c->request;
    const struct route *route = NULL;
    char allow[64] = "";
    for (size_t i = 0; i < sizeof routes / sizeof *routes && !route; i++)
        route = strcmp(routes[i].path, r->path) == 0 ? &routes[i] : NULL;
    if (!route) {
        refuse_task(c, 404, NULL, "there is nothing of this name", "");
        return;
    }
    bool reads = *route->method == 'G';
    (void)snprintf(allow, sizeof allow, "Allow: %sOPTIONS\r\n", reads ? "GET, HEAD, " : "POST, ");
    if (strcmp(r->method, "OPTIONS") == 0) {
        (void)http_body(c);
        http_respond(c, 204, "", allow);
    } else if (strcmp(r->method, route->method) == 0 || (reads && strcmp(r->method, "HEAD") == 0)) {
        route->answer(s, c);
    } else {
        refuse_task(c, 405, NULL, "not by this method", allow);
    }
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
    pthread_t waiter;
    const char *host = s->options.host ? s->options.host : "127.0.0.1";
    bool v6 = strchr(host, ':') != NULL;
    s->answers = answers;
    s->gpus = engine_config_of(answers->engine)->backend->n_gpus > 0;
    answers->activity = SERVING;
    if (pthread_create(&waiter, NULL, wait_for_news, s) != 0)
        return fail(error, "cannot start threads");
    bool ok = http_listen(s->http);
    if (ok)
        (void)fprintf(stderr, "dynamo: %s at http://%s%s%s:%d/v1\n", s->name, v6 ? "[" : "", host,
                      v6 ? "]" : "", http_port(s->http));
    while (ok && (http_turn(s->http) || s->tasks)) {
    }
    engine_lock(answers->engine);
    s->ended = true;
    engine_wake(answers->engine);
    engine_unlock(answers->engine);
    pthread_join(waiter, NULL);
    answers->activity = IDLE;
    return ok || fail(error, "--serve: cannot listen");
}

/* False: no client could send it. */
static bool take_key(struct server *s, const char *option, char *key, char *error) {
    size_t n = 0;
    while (isgraph((unsigned char)key[n]))
        n++;
    if (n == 0 || key[n])
        return fail(error, "%s: expected a key, of ASCII without spaces", option);
    s->keys = grow(s->keys, (size_t)s->n_keys, sizeof *s->keys);
    s->keys[s->n_keys++] = key;
    return true;
}

static bool read_keys(struct server *s, char *error) {
    size_t length = 0;
    if (s->options.key_file)
        s->key_text = cli_read_file(s->options.key_file, &length, error);
    if (s->options.key_file && !s->key_text)
        return false;
    char *rest = s->key_text, *line;
    while ((line = strsep(&rest, "\r\n")) != NULL)
        if (*line && !take_key(s, "--api-key-file", line, error))
            return false;
    if (s->options.key_file && s->n_keys == 0)
        return fail(error, "--api-key-file: expected a key");
    return !s->options.key || take_key(s, "--api-key", (char *)(uintptr_t)s->options.key, error);
}

struct server *serve_open(const struct serve_options *options, char error[ERROR_LENGTH]) {
    struct server *s = calloc(1, sizeof *s);
    if (!s)
        abort();
    const char *slash = strrchr(options->model, '/');
    s->options = *options;
    (void)snprintf(s->name, sizeof s->name, "%s", slash ? slash + 1 : options->model);
    for (char *at = s->name; *at; at++) /* metrics quote it */
        *at = *at == '"' || *at == '\\' || (unsigned char)*at < ' ' ? '_' : *at;
    s->started = (int64_t)time(NULL);
    const struct http_handler handler = {serve_begins, serve_answer, serve_gone, serve_turn, s};
    if (read_keys(s, error) && (s->http = http_open(options->host ? options->host : "127.0.0.1",
                                                    options->port, &handler, error)) != NULL)
        return s;
    serve_close(s);
    return NULL;
}

void serve_close(struct server *s) {
    if (!s)
        return;
    http_close(s->http);
    free(s->keys);
    free(s->key_text);
    free(s);
}

#endif /* SERVE_IMPLEMENTATION */
