/* test_http.c: the server. What its parser takes and refuses, in pieces of any size; then the
 * program itself over loopback: the same texts as on the command line, streams, keys, pages of
 * elsewhere, fields that would be ignored, long texts, clients that leave, queues that are full,
 * slow readers, its end. Clients that nobody here wrote are run by clients.py. */
#define _GNU_SOURCE
#define JSON_IMPLEMENTATION
#define HTTP_IMPLEMENTATION
#include "../app/http.h"
#include "files.h"

/* ---- the parser ---- */

/* Feeds `n` bytes, so many at a time. Returns the status it ends with; 0: it wants more. */
static int feed(struct http_connection *c, const char *bytes, size_t n, size_t step) {
    int status = 0;
    memset(c, 0, sizeof *c);
    http_next(c);
    c->input = malloc(n + 1);
    for (size_t at = 0; at < n && (status == 0 || status == 100); at += step) {
        size_t piece = n - at < step ? n - at : step;
        memcpy(c->input + c->n_input, bytes + at, piece);
        c->n_input += piece;
        status = http_parse(c);
        while (status == 100)
            status = http_parse(c);
    }
    return status;
}

#define POST "POST /x HTTP/1.1\r\nHost: a\r\n"
#define GET  "GET /x HTTP/1.1\r\nHost: a\r\n"
static const struct {
    int status;
    const char *bytes, *body;
} heads[] = {
    {200, GET "\r\n", ""},
    {200, "\r\n\r\n" GET "\r\n", ""},
    {200, "GET http://a:80/x HTTP/1.1\r\nHost: localhost\r\n\r\n", ""},
    {200, "GET /x?a=b HTTP/1.0\r\n\r\n", ""},
    {200, "GET /%78?%2 HTTP/1.0\r\n\r\n", ""},
    {200, POST "Content-Length: 3\r\n\r\nabc", "abc"},
    {200, POST "Content-Length: 3\r\n\r\n\na\n", "\na\n"},
    {200, POST "content-LENGTH:3  \r\n\r\nabcdef", "abc"},
    {200, POST "Transfer-Encoding: Chunked\r\n\r\n3\r\nabc\r\n02;x=y\r\nde\r\n0\r\n\r\n", "abcde"},
    {200, POST "Transfer-Encoding: chunked\r\n\r\n0\r\nA: b\r\nC: d\r\n\r\n", ""},
    {0, GET, NULL},
    {0, POST "Content-Length: 3\r\n\r\nab", NULL},
    {0, POST "Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n", NULL},
    /* the first line */
    {400, "GET  /x HTTP/1.1\r\nHost: localhost\r\n\r\n", NULL},
    {400, "GET /x\r\nHost: a\r\n\r\n", NULL},
    {400, "GET /x y HTTP/1.1\r\nHost: localhost\r\n\r\n", NULL},
    {400, "GET x HTTP/1.1\r\nHost: localhost\r\n\r\n", NULL},
    {400, "GET /%7 HTTP/1.1\r\nHost: a\r\n\r\n", NULL},
    {400, "GET /%xx HTTP/1.1\r\nHost: a\r\n\r\n", NULL},
    {400, "GET /x%00y HTTP/1.1\r\nHost: a\r\n\r\n", NULL},
    {400, "G(T /x HTTP/1.1\r\nHost: localhost\r\n\r\n", NULL},
    {400, "GET /\xC3\xA9 HTTP/1.1\r\nHost: localhost\r\n\r\n", NULL},
    {400, "GET /x HTTP/1.1\nHost: a\r\n\r\n", NULL},
    {400, "\x16\x03\x01", NULL}, /* the beginning of TLS */
    {400, "\r\n\n", NULL},
    {400, "GET /x HTTP/1.1\n", NULL}, /* at once, not when patience ends */
    {400, "GET /x HTTP/1.0\n\n", NULL},
    {400, GET "A: b\n", NULL},
    {400, GET "\n", NULL},
    {0, "\r", NULL},
    {505, "GET /x HTTP/2.0\r\nHost: a\r\n\r\n", NULL},
    {505, "GET /x HTTP/1.10\r\nHost: a\r\n\r\n", NULL},
    /* fields */
    {400, GET "Host: b\r\n\r\n", NULL},
    {400, "GET /x HTTP/1.1\r\n\r\n", NULL},
    {400, GET "A : b\r\n\r\n", NULL},
    {400, GET "A: b\r\n folded\r\n\r\n", NULL},
    {400, GET " A: b\r\n\r\n", NULL},
    {400, GET "A: b\rc\r\n\r\n", NULL},
    {400, GET "A: b\nC: d\r\n\r\n", NULL},
    {400, GET "A\r\n\r\n", NULL},
    {400, GET "A: b\x01\r\n\r\n", NULL},
    {400, GET "A: b\x7f\r\n\r\n", NULL},
    {200, POST "Expect: x\r\nContent-Length: 1\r\n\r\na", "a"},
    /* where a body ends: what is read in two ways could hide a request */
    {411, POST "\r\n", NULL},
    {400, POST "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", NULL},
    {400, POST "Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd", NULL},
    {400, POST "Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc", NULL},
    {400, POST "Content-Length: 3, 3\r\n\r\nabc", NULL},
    {400, POST "Content-Length: +3\r\n\r\nabc", NULL},
    {400, POST "Content-Length: 0x3\r\n\r\nabc", NULL},
    {400, POST "Content-Length: -1\r\n\r\n", NULL},
    {400, POST "Content-Length:\r\n\r\n", NULL},
    {413, POST "Content-Length: 99999999999999999999999\r\n\r\n", NULL},
    {413, POST "Content-Length: 8388609\r\n\r\n", NULL},
    {501, POST "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", NULL},
    {501, POST "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", NULL},
    {501, POST "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", NULL},
    {400, "POST /x HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", NULL},
    {400, POST "Transfer-Encoding: chunked\r\n\r\n3\nabc\r\n0\r\n\r\n", NULL},
    {400, POST "Transfer-Encoding: chunked\r\n\r\n3\r\nabcd\r\n0\r\n\r\n", NULL},
    {400, POST "Transfer-Encoding: chunked\r\n\r\n3 \r\nabc\r\n0\r\n\r\n", NULL},
    {400, POST "Transfer-Encoding: chunked\r\n\r\n0x3\r\nabc\r\n0\r\n\r\n", NULL},
    {400, POST "Transfer-Encoding: chunked\r\n\r\n-1\r\nabc\r\n0\r\n\r\n", NULL},
    {400, POST "Transfer-Encoding: chunked\r\n\r\n\r\nabc\r\n0\r\n\r\n", NULL},
    {413, POST "Transfer-Encoding: chunked\r\n\r\nfffffff\r\n", NULL},
    {400, POST "Transfer-Encoding: chunked\r\n\r\nffffffffffffffffffff\r\n", NULL},
    {400, POST "Transfer-Encoding: chunked\r\n\r\n0\r\nA b\r\n\r\n", NULL},
};

static void requests_are_read_in_any_pieces(struct check *check) {
    static struct http_connection c;
    for (size_t i = 0; i < COUNT(heads); i++)
        for (size_t step = 1; step < 100; step = step < 4 ? step + 1 : 5 * step) {
            const char *body = heads[i].body;
            int status = feed(&c, heads[i].bytes, strlen(heads[i].bytes), step);
            CHECK(status == heads[i].status, "%d, expected %d: %s", status, heads[i].status,
                  heads[i].bytes);
            CHECK(status != 200 || (c.body == strlen(body) && !memcmp(c.input, body, c.body)),
                  "%.*s: %s", (int)c.body, c.input, heads[i].bytes);
            CHECK(status != 200 || strcmp(c.request.path, "/x") == 0, "%s", c.request.path);
            free(c.input);
        }
    const char two[] = POST "Content-Length: 2\r\n\r\nab" GET "\r\n"; /* one behind another */
    CHECK(feed(&c, two, strlen(two), sizeof two) == 200 && c.body == 2, "%zu", c.body);
    http_next(&c);
    CHECK(http_parse(&c) == 100 && http_parse(&c) == 200 && c.body == 0, "the second");
    CHECK(strcmp(c.request.method, "GET") == 0, "%s", c.request.method);
    free(c.input);
}

static void heads_have_bounds(struct check *check) {
    static struct http_connection c;
    static char text[4 * HTTP_HEAD];
    int n = sprintf(text, GET "A: %0*d\r\n\r\n", HTTP_HEAD, 1);
    CHECK(feed(&c, text, (size_t)n, 1000) == 431, "a long field");
    free(c.input);
    n = sprintf(text, GET);
    for (int i = 0; i < HTTP_FIELDS; i++)
        n += sprintf(text + n, "A: b\r\n");
    n += sprintf(text + n, "\r\n");
    CHECK(feed(&c, text, (size_t)n, 1000) == 431, "many fields");
    free(c.input);
    memset(text, 'a', sizeof text);
    CHECK(feed(&c, text, sizeof text, 100) == 431, "no end");
    free(c.input);
    n = sprintf(text, POST "Transfer-Encoding: chunked\r\n\r\n3;");
    memset(text + n, 'a', sizeof text - (size_t)n);
    CHECK(feed(&c, text, sizeof text, 100) == 400, "a long extension");
    free(c.input);
}

/* ---- a server and its clients ---- */

struct served {
    struct check *check;
    struct live live;
    int port;
};

static struct served serve(struct check *check, const char *options) {
    char arguments[512];
    snprintf(arguments, sizeof arguments, "model.bin --serve 0 %s", options);
    struct served s = {.check = check, .live = live_start(check, true, arguments)};
    live_until(&s.live, "http://");
    live_until(&s.live, "/v1");
    const char *at = strrchr(s.live.text, ':');
    s.port = at ? atoi(at + 1) : 0;
    return s;
}

/* Ends it by SIGTERM: it drains. */
static void stop(struct served *s) {
    struct check *check = s->check;
    kill(s->live.pid, SIGTERM);
    int status = live_end(&s->live);
    CHECK(status == 0, "status %d: %s", status, s->live.text);
}

static int dial(const struct served *s) {
    struct check *check = s->check;
    struct sockaddr_in address = {.sin_family = AF_INET,
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
                                  .sin_port = htons((uint16_t)s->port)};
    int client = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    int wrong = connect(client, (struct sockaddr *)&address, sizeof address);
    if (wrong) /* else no check: what waits for the server's rest makes no progress by asking */
        CHECK(!wrong, "cannot connect: %s", strerror(errno));
    return client;
}

static void tell(int client, const char *text) {
    (void)!send(client, text, strlen(text), MSG_NOSIGNAL);
}

/* Reads until `words` have come; NULL: to the end. */
static char *hear(int client, const char *words) {
    size_t size = 1 << 16, length = 0;
    char *text = keep(size);
    ssize_t n;
    check_waits = words ? words : "the end of a response";
    while (!(words && strstr(text, words)) &&
           (n = recv(client, text + length, size - 1 - length, 0)) > 0) {
        length += (size_t)n;
        if (size - length < size / 2) {
            text = memcpy(keep(2 * size), text, length);
            size *= 2;
        }
    }
    return text;
}

static void post(int client, const char *path, const char *fields, const char *json) {
    char body[4096], text[8192];
    int n = put_json(body, json);
    snprintf(text, sizeof text,
             "POST %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n%sContent-Length: "
             "%d\r\n\r\n%s",
             path, fields, n, body);
    tell(client, text);
}

static char *ask(const struct served *s, const char *path, const char *fields, const char *json) {
    int client = dial(s);
    if (json) {
        post(client, path, fields, json);
    } else {
        char text[512];
        snprintf(text, sizeof text,
                 "GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n%s\r\n", path, fields);
        tell(client, text);
    }
    char *response = hear(client, NULL);
    close(client);
    return response;
}

static int status_in(const char *response) {
    return strncmp(response, "HTTP/1.1 ", 9) == 0 ? atoi(response + 9) : -1;
}

static void asks(const struct served *s, const char *path, const char *fields, const char *json,
                 int status, const char *words) {
    struct check *check = s->check;
    char *response = ask(s, path, fields, json);
    CHECK(status_in(response) == status && strstr(response, words), "%s %s: expected %d, %s: %s",
          path, json ? json : "", status, words, response);
}

/* All strings behind a key in a response, one after another. */
static char *strings_of(const char *response, const char *key) {
    size_t length = 0;
    char *all = keep(strlen(response) + 1), error[ERROR_LENGTH], name[64];
    snprintf(name, sizeof name, "\"%s\":\"", key);
    while ((response = strstr(response, name)) != NULL) {
        const char *begin = response + strlen(name) - 1, *end = begin + 1;
        while (*end && *end != '"')
            end += 1 + (*end == '\\');
        char *copy = strndup(begin, (size_t)(end - begin) + 1);
        struct json_node *nodes = json_parse(copy, strlen(copy), error);
        if (nodes)
            memcpy(all + length, nodes[0].text, nodes[0].length);
        length += nodes ? nodes[0].length : 0;
        free(nodes);
        free(copy);
        response = end;
    }
    return all;
}

static double metric(const struct served *s, const char *name) {
    const char *response = ask(s, "/metrics", "", NULL), *at = strstr(response, name);
    at = at ? strchr(at, '}') : NULL;
    return at ? atof(at + 1) : -1;
}

/* Waits until all requests have left and no block is pinned. */
static void rests(const struct served *s) {
    struct check *check = s->check;
    while (metric(s, "\nvllm:num_requests_running{") + metric(s, "\nvllm:num_requests_waiting{") >
               0 ||
           metric(s, "\nvllm:kv_cache_usage_perc{") > 0)
        usleep(10000);
    CHECK(metric(s, "\nvllm:kv_cache_usage_perc{") == 0, "pinned");
}

static int count_files(const struct served *s) {
    char command[128];
    snprintf(command, sizeof command, "ls /proc/%d/fd | wc -l", (int)s->live.pid);
    FILE *pipe = popen(command, "r");
    int n = -1;
    if (fscanf(pipe, "%d", &n) != 1)
        n = -1;
    pclose(pipe);
    return n;
}

/* The numbers behind a key, at most `most`. */
static int numbers_of(const char *text, const char *key, double *numbers, int most) {
    int n = 0;
    char name[64];
    snprintf(name, sizeof name, "\"%s\":", key);
    for (; n < most && (text = strstr(text, name)) != NULL; n++)
        numbers[n] = strtod(text += strlen(name), NULL);
    return n;
}

/* All its descriptors but so many are closed; those that linger have two seconds. */
static void closes(const struct served *s, int before) {
    struct check *check = s->check;
    while (count_files(s) > before)
        usleep(10000);
    CHECK(count_files(s) == before, "%d files, before %d", count_files(s), before);
}

/* ---- tests of the program ---- */

static void texts_are_those_of_the_command_line(struct check *check) {
    struct outcome o = run(check, "model.bin -p 'Once upon' -n 40 --seed 5 --json");
    const char *text = answer(&o, "0", "text");
    struct served s = serve(check, "");
    const char *plain = "{'prompt':'Once upon','max_tokens':40,'seed':5,'model':'model.bin'}";
    const char *events = "{'prompt':'Once upon','max_tokens':40,'seed':5,'stream':true,"
                         "'stream_options':{'include_usage':true}}";
    char *response = ask(&s, "/v1/completions", "", plain);
    CHECK(strcmp(strings_of(response, "text"), text) == 0, "%s: %s", text, response);
    CHECK(strstr(response, "\"completion_tokens\":40,") && strstr(response, "\"length\""), "%s",
          response);
    response = ask(&s, "/v1/completions", "", events);
    CHECK(strcmp(strings_of(response, "text"), text) == 0, "%s: %s", text, response);
    CHECK(count_of(response, "\"choices\":[{") == 40, "one token a chunk: %s", response);
    CHECK(count_of(response, "\"choices\":[],\"usage\":{\"prompt_tokens\":") == 1, "%s", response);
    CHECK(strstr(response, "data: [DONE]\n\n"), "%s", response);
    CHECK(strstr(response, "Transfer-Encoding: chunked\r\n"), "%s", response);
    o = run(check, "model.bin -p 'Once upon' -n 40 -t 0 --stop Rose --json");
    response = ask(&s, "/v1/chat/completions", "",
                   "{'messages':[{'role':'user','content':[{'type':'text','text':'Once upon'}]}],"
                   "'max_completion_tokens':40,'temperature':0,'stop':'Rose','stream':true}");
    CHECK(strcmp(strings_of(response, "content"), answer(&o, "0", "text")) == 0, "%s", response);
    CHECK(count_of(response, "\"role\":\"assistant\"") == 1, "%s", response);
    CHECK(count_of(response, "\"finish_reason\":\"") == 1, "%s", response);
    /* choices have noise of their own, the first that of the seed */
    response = ask(&s, "/v1/completions", "",
                   "{'prompt':['Once upon','Once upon'],'n':2,'max_tokens':40,'seed':5}");
    CHECK(count_of(response, "\"index\":") == 4 && strstr(response, "\"index\":3,"), "%s",
          response);
    CHECK(strncmp(strings_of(response, "text"), text, strlen(text)) == 0, "%s", response);
    stop(&s);
}

static void fields_mean_what_they_say(struct check *check) {
    struct served s = serve(check, "");
    const char *path = "/v1/completions";
    char *response = ask(&s, path, "", "{'prompt':'The end.','ignore_eos':true,'max_tokens':300}");
    CHECK(strstr(response, "\"completion_tokens\":300,"), "%s", response);
    response =
        ask(&s, path, "",
            "{'prompt':'Once','temperature':0,'max_tokens':30,'min_tokens':30,'stop':['e']}");
    CHECK(strstr(response, "\"completion_tokens\":30,"), "%s", response);
    asks(&s, path, "",
         "{'prompt':'Once','temperature':0,'max_tokens':90,'ignore_eos':true,'stop':['e']}", 200,
         "\"finish_reason\":\"stop\"");
    asks(&s, path, "", "{'prompt':[[1,2],[3]],'top_k':-1,'seed':null}", 200, "\"index\":1");
    asks(&s, path, "",
         "{'prompt':'a','frequency_penalty':0.0,'tools':[],'tool_choice':'auto','n':1,'best_of':1,"
         "'response_format':{'type':'text'},'logit_bias':{},'logprobs':null,'echo':false,'x':[{}]}",
         200, "\"text\"");
    static const char *const refused[] = {"'frequency_penalty':0.1",
                                          "'tools':[{}]",
                                          "'tools':[1]",
                                          "'logit_bias':{'5':1}",
                                          "'response_format':{'type':'json_object'}",
                                          "'echo':true",
                                          "'best_of':2",
                                          "'n':0",
                                          "'n':129",
                                          "'n':1.5",
                                          "'stream':1",
                                          "'temperature':-1",
                                          "'temperature':'x'",
                                          "'top_p':2",
                                          "'max_tokens':0",
                                          "'stop':5",
                                          "'stop':''",
                                          "'seed':-1",
                                          "'min_tokens':-1",
                                          "'suffix':'x'",
                                          "'stream_options':true",
                                          "'top_k':-10",
                                          "'guided_json':{'a':1}",
                                          "'reasoning_effort':'low'"};
    for (size_t i = 0; i < COUNT(refused); i++) {
        char json[256], param[64];
        snprintf(json, sizeof json, "{'prompt':'a',%s}", refused[i]);
        snprintf(param, sizeof param, "\"param\":\"%.*s\"", (int)strcspn(refused[i] + 1, "'"),
                 refused[i] + 1);
        asks(&s, path, "", json, 400, param);
    }
    static const char *const wrong[] = {"{}",
                                        "[]",
                                        "5",
                                        "{",
                                        "{'prompt':5}",
                                        "{'prompt':[]}",
                                        "{'prompt':''}",
                                        "{'prompt':[1,'a']}",
                                        "{'prompt':[99999]}",
                                        "{'prompt':['a',[1]],'n':100}",
                                        "{'prompt':[-1]}"};
    for (size_t i = 0; i < COUNT(wrong); i++)
        asks(&s, path, "", wrong[i], strcmp(wrong[i], "{'prompt':''}") ? 400 : 200, "");
    asks(&s, path, "", "{'prompt':[1,-1]}", 400, "\"prompt: got [1,-1], expected");
    asks(&s, path, "", "{'prompt':[99999]}", 400, "\"99999 is no token");
    asks(&s, path, "", "{'prompt':'a','model':'other'}", 404, "model.bin");
    asks(&s, path, "", "{'model':5,'prompt':'a'}", 404, "got 5, this");
    asks(&s, path, "", "{'prompt':'a','max_tokens':0}", 400, "\"max_tokens: got 0");
    path = "/v1/chat/completions";
    asks(&s, path, "", "{'messages':[]}", 400, "messages");
    asks(&s, path, "", "{'messages':[{'role':'tool','content':'a'}]}", 400, "messages");
    asks(&s, path, "", "{'messages':[{'role':'user','content':'a','tool_calls':[{}]}]}", 400,
         "tool_calls");
    asks(&s, path, "", "{'messages':[{'role':'user','content':[{'type':'image_url'}]}]}", 400,
         "not text");
    asks(&s, path, "",
         "{'messages':[{'role':'developer','content':'a'},{'role':'user','content':'b'}],"
         "'max_tokens':1}",
         200, "content");
    asks(&s, path, "x-request-timeout: soon\r\n", "{}", 400, "x-request-timeout");
    asks(&s, "/tokenize", "", "{'prompt':'Once upon a time'}", 200, "\"count\":7,");
    asks(&s, "/tokenize", "", "{'prompt':['Once','upon']}", 400,
         "prompt: got 2, expected at most 1");
    asks(&s, "/tokenize", "", "{'prompt':[99999]}", 400, "\"99999 is no token");
    asks(&s, "/v1/models", "", NULL, 200, "\"id\":\"model.bin\"");
    asks(&s, "/v1/models/model.bin", "", NULL, 200, "{\"id\":\"model.bin\",\"object\":\"model\"");
    asks(&s, "/v1/models/model%2ebin", "", NULL, 200, "{\"id\":\"model.bin\"");
    asks(&s, "/v1/models/some/model.bin", "", NULL, 404, "\"param\":\"model\"");
    asks(&s, "/v1/modelsx", "", NULL, 404, "nothing of this name");
    asks(&s, "/nothing", "", NULL, 404, "\"error\":{\"message\":");
    asks(&s, "/v1/completions", "", NULL, 405, "Allow: POST\r\n");
    stop(&s);
}

/* Log-probabilities of a first token, against the logits that --logits writes. */
static void logprobs_are_those_of_the_logits(struct check *check) {
    struct outcome o = run(check, "model.bin -p Once --logits $T/logits");
    size_t length;
    float *logits = (float *)(void *)read_file(check, scratch("logits"), &length);
    struct outcome ids = run(check, "model.bin -p Once -n 1 --json");
    size_t vocab = length / sizeof *logits / (size_t)number(&ids, "0", "prompt_tokens");
    double sum = 0, told[22], expected[20];
    CHECK(o.status == 0 && vocab > 20, "%zu numbers", length);
    logits = (float *)(void *)((char *)logits + length) - vocab; /* of the last token */
    for (size_t i = 0; i < vocab; i++)
        sum += exp((double)logits[i]);
    for (int k = 0; k < 20; k++) {
        size_t best = 0;
        for (size_t i = 0; i < vocab; i++)
            best = logits[i] > logits[best] ? i : best;
        expected[k] = (double)logits[best] - log(sum);
        logits[best] = -INFINITY;
    }
    struct served s = serve(check, "");
    char *response = ask(&s, "/v1/chat/completions", "",
                         "{'messages':[{'role':'user','content':'Once'}],'max_tokens':1,"
                         "'temperature':0,'logprobs':true,'top_logprobs':20}");
    int n = numbers_of(response, "logprob", told, 22);
    CHECK(n == 21 && fabs(told[0] - told[1]) == 0, "%d numbers: %s", n, response);
    for (int k = 0; k < 20 && k < n - 1; k++)
        CHECK(fabs(told[k + 1] - expected[k]) < 1e-4, "%g, expected %g", told[k + 1], expected[k]);
    response = ask(&s, "/v1/completions", "",
                   "{'prompt':'Once','max_tokens':3,'temperature':0,'logprobs':2,'stream':true}");
    CHECK(count_of(response, "\"token_logprobs\":[-") == 3, "%s", response);
    const char *list = strstr(response, "\"token_logprobs\":[");
    double first = list ? atof(list + 18) : 0;
    CHECK(fabs(first - expected[0]) < 1e-4, "%g, expected %g", first, expected[0]);
    asks(&s, "/v1/completions", "", "{'prompt':'a','logprobs':21}", 400, "\"param\":\"logprobs\"");
    asks(&s, "/v1/completions", "", "{'prompt':'a','top_logprobs':1}", 400, "logprobs");
    stop(&s);
}

/* Each token's text stands where its offset says, in characters; noise makes odd ones, and where
 * nothing is before it the first may lose a space. A stream tells the same, a token at a time. */
static void offsets_are_where_tokens_begin(struct check *check) {
    struct served s = serve(check, "--seed 1");
    char *response = ask(&s, "/v1/completions", "",
                         "{'prompt':'','temperature':4,'max_tokens':200,'logprobs':0,'seed':9}");
    char error[ERROR_LENGTH], *body = strstr(response, "\r\n\r\n");
    struct json_node *nodes = json_parse(body, strlen(body), error);
    int choice = json_find(nodes, 0, "choices") + 1,
        logprobs = json_find(nodes, choice, "logprobs");
    const struct json_node *text = &nodes[json_find(nodes, choice, "text")];
    int offset = json_find(nodes, logprobs, "text_offset"), n = 0, n_whole = 0, n_long = 0;
    int token = json_find(nodes, logprobs, "tokens");
    bool broken = false;
    CHECK(offset > 0 && nodes[offset].next - offset == 201, "%s", response);
    char *streamed = ask(&s, "/v1/completions", "",
                         "{'prompt':'','temperature':4,'max_tokens':200,'logprobs':0,'seed':9,"
                         "'stream':true}");
    for (const char *at = text->text; n < 200 && offset > 0; n++) {
        const struct json_node *its = &nodes[token + 1 + n];
        int begins = atoi(nodes[offset + 1 + n].text), before = 0;
        streamed = strstr(streamed, "\"text_offset\":[") + 15;
        CHECK(atoi(streamed) == begins && streamed[strspn(streamed, "0123456789")] == ']',
              "token %d: %d, streamed %.20s", n, begins, streamed);
        for (at = text->text; before < begins || (*at & 0xC0) == 0x80; at++)
            before += (at[1] & 0xC0) != 0x80;
        bool whole = !memmem(its->text, its->length, "\xEF\xBF\xBD", 3);
        const char *shown = its->text + (n == 0 && *its->text == ' ');
        size_t length = its->length - (size_t)(shown - its->text);
        CHECK(!whole || broken || memcmp(at, shown, length) == 0, "token %d, at %d: %.*s: %s", n,
              begins, (int)length, shown, response);
        broken = !whole; /* what is left of a character belongs to the token behind it */
        n_whole += whole;
        n_long += whole && begins != (int)(at - text->text);
    }
    CHECK(n_whole > 100 && n_long > 20, "%d are whole, %d behind a long one", n_whole, n_long);
    free(nodes);
    stop(&s);
}

static void one_connection_serves_many(struct check *check) {
    struct served s = serve(check, "");
    int client = dial(&s);
    tell(client,
         "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nHEAD /metrics HTTP/1.1\r\nHost: "
         "localhost\r\n\r\n"
         "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
         "c\r\n{\"prompt\":\"a\r\n1a\r\n\",\"max_tokens\":2,\"seed\":1}\r\n0\r\n\r\n"
         "HEAD /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
         "GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\nGET / HTTP/1.1\r\n");
    char *response = hear(client, NULL);
    CHECK(count_of(response, "HTTP/1.1 200 OK\r\n") == 5, "%s", response);
    CHECK(count_of(response, "HTTP/1.1 ") == 5, "%s", response);
    CHECK(strstr(response, "\"completion_tokens\":2,"), "%s", response);
    close(client);
    client = dial(&s); /* one whose request comes in pieces */
    static const char *const pieces[] = {"GET /he", "alth HTTP/1.1\r\nHo",
                                         "st: a\r\nConnection: clo", "se\r\n\r", "\n"};
    for (size_t i = 0; i < COUNT(pieces); i++) {
        tell(client, pieces[i]);
        usleep(20000);
    }
    response = hear(client, NULL);
    CHECK(status_in(response) == 200, "in pieces: %s", response);
    close(client);
    client = dial(&s); /* one that asks whether it may send */
    tell(client, "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
                 "Content-Length: 15\r\nConnection: close\r\n\r\n");
    response = hear(client, "100 Continue\r\n\r\n");
    CHECK(strncmp(response, "HTTP/1.1 100 ", 13) == 0, "%s", response);
    tell(client, "{\"prompt\":\"abc\"}");
    response = hear(client, NULL);
    CHECK(status_in(response) == 400, "a byte is missing: %s", response);
    close(client);
    client = dial(&s); /* and one that is refused leaves no way to hide a request */
    tell(client, POST "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
                      "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n");
    response = hear(client, NULL);
    CHECK(status_in(response) == 400 && count_of(response, "HTTP/1.1") == 1, "%s", response);
    CHECK(strstr(response, "Connection: close\r\n"), "%s", response);
    close(client);
    client = dial(&s);
    tell(client, "POST /v1/completions HTTP/1.0\r\nContent-Length: 46\r\n\r\n"
                 "{\"prompt\":\"Once\",\"stream\":true,\"max_tokens\":3}");
    response = hear(client, NULL);
    CHECK(strstr(response, "[DONE]") && !strstr(response, "chunked"), "HTTP/1.0: %s", response);
    close(client);
    stop(&s);
}

static void nothing_without_the_key(struct check *check) {
    static const char *const paths[] = {"/",  "/v1/models",      "/metrics",
                                        "/x", "/v1/completions", "/stats"};
    write_file(check, "keys", "first\n\nsecond\r\n", 15);
    struct served s = serve(check, "--api-key third --api-key-file $T/keys");
    for (size_t i = 0; i < COUNT(paths); i++) {
        asks(&s, paths[i], "", NULL, 401, "authentication_error");
        asks(&s, paths[i], "", "{}", 401, "authentication_error");
        asks(&s, paths[i], "Authorization: Bearer firs\r\n", NULL, 401, "");
        asks(&s, paths[i], "Authorization: Bearer firstt\r\n", NULL, 401, "");
        asks(&s, paths[i], "Authorization: Basic first\r\n", NULL, 401,
             "WWW-Authenticate: Basic realm=\"dynamo\"\r\n"); /* alone, or Chromium asks nobody */
        asks(&s, paths[i], "Authorization: Basic bWU6Zmlycw==\r\n", NULL, 401, ""); /* me:firs */
        asks(&s, paths[i], "Authorization: Basic Zmlyc3Q=\r\n", NULL, 401, "");     /* first */
        asks(&s, paths[i], "Authorization: Basic bWU6\r\n", NULL, 401, "");         /* me: */
        asks(&s, paths[i], "Authorization: Bearer \r\n", NULL, 401, "");
    }
    asks(&s, "/health", "", NULL, 200, "ok");
    asks(&s, "/", "Authorization: Bearer first\r\n", NULL, 200, "<html");
    asks(&s, "/", "Authorization: Basic bWU6Zmlyc3Q=\r\n", NULL, 200, "<html"); /* me:first */
    asks(&s, "/stats", "Authorization: basic OnNlY29uZA==\r\n", NULL, 200, ""); /* :second */
    asks(&s, "/v1/models", "Authorization: Bearer first\r\n", NULL, 200, "");
    asks(&s, "/v1/models", "authorization: bearer second\r\n", NULL, 200, "");
    asks(&s, "/v1/models", "Authorization: Bearer third\r\n", NULL, 200, "");
    stop(&s);
    write_file(check, "none", "\n", 1);
    refuse(check, "model.bin --serve 0 --api-key-file $T/none", 2, "expected a key", 5);
    static const char *const unsendable[] = {"a b", " a", "a\n b ", "\xEF\xBB\xBFkey", "\xC3\xA9"};
    for (size_t i = 0; i < COUNT(unsendable); i++) {
        write_file(check, "keys", unsendable[i], strlen(unsendable[i]));
        refuse(check, "model.bin --serve 0 --api-key-file $T/keys", 2, "without spaces", 5);
    }
    refuse(check, "model.bin --serve 0 --api-key ''", 2, "--api-key: expected a key", 5);
    s = serve(check, "");
    asks(&s, "/v1/models", "Origin: http://elsewhere\r\n", NULL, 403, "origin");
    asks(&s, "/v1/models", "Origin: http://localhost\r\n", NULL, 200, "");
    char taken[64];
    snprintf(taken, sizeof taken, "model.bin --serve %d", s.port);
    refuse(check, taken, 2, "in use", 5);
    stop(&s);
}

static int status_of_host(const struct served *s, const char *host, const char *fields) {
    char text[256];
    int client = dial(s);
    snprintf(text, sizeof text, "GET /stats HTTP/1.1\r\nHost: %s\r\n%sConnection: close\r\n\r\n",
             host, fields);
    tell(client, text);
    char *response = hear(client, NULL);
    close(client);
    return status_in(response);
}

/* A page of elsewhere whose name was made to lead to this machine is no foreign origin, but names
 * itself. Addresses and localhost are no such names, nor is anything where a key protects. */
static void pages_that_are_led_here_are_refused(struct check *check) {
    static const struct {
        const char *host;
        bool leads_here;
    } hosts[] = {{"localhost", true},       {"LocalHost:8000", true},     {"127.0.0.1", true},
                 {"10.0.0.1:80", true},     {"[::1]:8000", true},         {"evil.example", false},
                 {"127.0.0.1.evil", false}, {"localhost.evil:80", false}, {"local", false},
                 {"ip6-localhost", false}};
    static const char *const fields[] = {"Sec-Fetch-Site: same-origin\r\n",
                                         "User-Agent: Mozilla/5.0 (X11)\r\n"}; /* of browsers */
    struct served servers[] = {serve(check, ""), serve(check, "--api-key k"),
                               serve(check, "--host 0.0.0.0")};
    for (size_t i = 0; i < COUNT(hosts); i++)
        for (size_t k = 0; k < COUNT(servers); k++) {
            int expected[] = {hosts[i].leads_here ? 200 : 403, 401, 200};
            int status = status_of_host(&servers[k], hosts[i].host, fields[(i + k) % 2]);
            CHECK(status == expected[k], "%s, server %zu: %d", hosts[i].host, k, status);
            status = status_of_host(&servers[k], hosts[i].host, ""); /* as a proxy calls it */
            CHECK(status == (k == 1 ? 401 : 200), "%s, no browser: %d", hosts[i].host, status);
        }
    for (size_t k = 0; k < COUNT(servers); k++)
        stop(&servers[k]);
}

/* Others are answered while a long text becomes ids: the loop does not do it. */
static void a_long_text_holds_nobody_up(struct check *check) {
    enum { LENGTH = SANITIZED ? 200000 : 1000000 };
    struct served s = serve(check, "");
    int client = dial(&s), n = 0;
    char *body = keep(LENGTH + 1), head[128];
    memset(body, 'a', LENGTH);
    memcpy(body, "{\"prompt\":\"", 11);
    memcpy(body + LENGTH - 2, "\"}", 2);
    snprintf(head, sizeof head,
             "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n", LENGTH);
    tell(client, head);
    for (int sent = 0, piece = 0; sent < LENGTH - 1; sent += piece)
        piece = (int)send(client, body + sent, (size_t)(LENGTH - 1 - sent), 0);
    for (int i = 0; i < 100; i++) /* each turn takes some of it: all but the last byte is there */
        asks(&s, "/health", "", NULL, 200, "ok");
    tell(client, "}");
    for (char byte; recv(client, &byte, 1, MSG_PEEK | MSG_DONTWAIT) < 0; n++)
        asks(&s, "/health", "", NULL, 200, "ok");
    char *response = hear(client, "]}");
    CHECK(n > 3, "%d others were answered before: %.200s", n, response);
    CHECK(strstr(response, "\"tokens\":["), "%.200s", response);
    close(client);
    stop(&s);
}

/* As uvicorn and nginx do, measured: who sends nothing more has its answer if that is ready, and
 * is gone if it is to be computed. */
static void who_closes_half_has_what_is_ready(struct check *check) {
    struct served s = serve(check, "");
    int client = dial(&s);
    tell(client, "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n");
    shutdown(client, SHUT_WR);
    char *response = hear(client, NULL);
    CHECK(status_in(response) == 200, "ready: %s", response);
    close(client);
    client = dial(&s);
    post(client, "/v1/completions", "", "{'prompt':'Once','max_tokens':500,'ignore_eos':true}");
    shutdown(client, SHUT_WR);
    response = hear(client, NULL);
    CHECK(!*response, "to be computed: %s", response);
    close(client);
    rests(&s);
    CHECK(metric(&s, "finished_reason=\"length\"") == 0, "it was computed");
    stop(&s);
}

/* Connections that have not asked yet keep their places, also when there are no others. */
static void places_are_kept(struct check *check) {
    struct served s = serve(check, "");
    static int clients[HTTP_CONNECTIONS + 8];
    for (int i = 0; i < (int)COUNT(clients); i++)
        clients[i] = dial(&s);
    for (int i = 0; i < (int)COUNT(clients); i++) {
        tell(clients[i],
             i % 2 ? "GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
                   : "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n");
        char *response = hear(clients[i], "\"ok\"}\n");
        CHECK(strstr(response, "\"ok\""), "client %d: %s", i, response);
        if (i % 2)
            close(clients[i]);
    }
    for (int i = 0; i < (int)COUNT(clients); i += 2)
        close(clients[i]);
    stop(&s);
}

/* Four answers that go on for long. */
#define LONG                                                                                       \
    (SANITIZED ? "{'prompt':'Once','max_tokens':200,'ignore_eos':true,'stream':true,'n':4}"        \
               : "{'prompt':'Once','max_tokens':500,'ignore_eos':true,'stream':true,'n':4}")

static void who_leaves_is_cancelled(struct check *check) {
    struct served s = serve(check, "--max-batch 2 --devices cpu:2");
    int before = count_files(&s), clients[8];
    for (int i = 0; i < 8; i++) { /* some run, others wait */
        clients[i] = dial(&s);
        post(clients[i], "/v1/completions", "", LONG);
    }
    (void)hear(clients[0], "data: ");
    while (metric(&s, "\nvllm:num_requests_waiting{") < 8) /* all have been read */
        usleep(10000);
    for (int i = 0; i < 8; i++)
        close(clients[i]);
    rests(&s);
    double cancelled = metric(&s, "finished_reason=\"cancelled\"");
    CHECK(cancelled > 8, "%g requests were cancelled", cancelled);
    asks(&s, "/v1/completions", "x-request-timeout: 0.001\r\n",
         "{'prompt':'Once','max_tokens':500,'ignore_eos':true,'n':4}", 504, "deadline");
    closes(&s, before);
    stop(&s);
}

static void full_queues_say_so(struct check *check) {
    struct served s = serve(check, "--max-batch 1 --max-queue 1 --devices cpu:2");
    asks(&s, "/v1/completions", "", "{'prompt':'a','n':100,'max_tokens':500,'stream':true}", 429,
         "Retry-After: ");
    rests(&s);
    asks(&s, "/v1/completions", "", "{'prompt':'a'}", 200, "text");
    double before = metric(&s, "prompt_tokens_total");
    asks(&s, "/v1/completions", "", "{'prompt':[[1],[1],[1],[1],[1],[1],[1],[1],[1]]}", 429, "");
    rests(&s);
    CHECK(metric(&s, "prompt_tokens_total") < before + 9, "tokens that nobody read are counted");
    stop(&s);
}

/* Turns that are too many are not read to the end: what they take grows as they do. */
static void too_many_turns_are_told(struct check *check) {
    enum { TURNS = SANITIZED ? 2000 : 60000 };
    static const char turn[] = "{\"role\":\"user\",\"content\":\"a\"},"
                               "{\"role\":\"assistant\",\"content\":\"b\"},";
    struct served s = serve(check, "--template llama2");
    int client = dial(&s);
    char *body = keep(TURNS * sizeof turn + 100), *end = body, head[160];
    end += sprintf(end, "{\"messages\":[");
    for (int i = 0; i < TURNS; i++)
        end += sprintf(end, "%s", turn);
    end += sprintf(end, "{\"role\":\"user\",\"content\":\"c\"}]}");
    (void)snprintf(head, sizeof head,
                   "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                   "Content-Length: %d\r\n\r\n",
                   (int)(end - body));
    tell(client, head);
    tell(client, body);
    char *response = hear(client, NULL);
    CHECK(status_in(response) == 400 && strstr(response, "the prompt has over 5"), "%s", response);
    close(client);
    stop(&s);
}

static void it_drains(struct check *check) {
    for (int times = 1; times <= 2; times++) {
        struct served s = serve(check, "");
        int client = dial(&s), idle = dial(&s);
        post(client, "/v1/completions", "", LONG);
        char *first = hear(client, "data: ");
        for (int i = 0; i < times; i++)
            kill(s.live.pid, SIGTERM);
        char *rest = hear(client, NULL);
        CHECK(strstr(first, "200 OK"), "%s", first);
        CHECK(times > 1 || strstr(rest, "[DONE]"), "%s", rest);
        int status = live_end(&s.live);
        CHECK(status == 0 || (times > 1 && status == 128 + SIGTERM), "status %d", status);
        close(client);
        close(idle);
    }
}

/* Whose head came before, and whose body after it began to drain, is told that it closes. */
static void a_draining_connection_closes(struct check *check) {
    struct served s = serve(check, "");
    int idle = dial(&s), late = dial(&s);
    tell(late, "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
               "Content-Length: 17\r\n\r\n");
    char *response = hear(late, "100 Continue\r\n\r\n");
    CHECK(strstr(response, "100 Continue"), "%s", response);
    kill(s.live.pid, SIGTERM);
    CHECK(!*hear(idle, NULL), "who rests is answered"); /* closed: it drains */
    tell(late, "{\"prompt\":\"Once\"}");
    response = hear(late, NULL);
    CHECK(strstr(response, "200 OK") && strstr(response, "Connection: close"), "%s", response);
    CHECK(live_end(&s.live) == 0, "it does not end well");
    close(idle);
    close(late);
}

/* Who computes nothing any more says so, and routers ask others. */
static void without_workers_it_is_not_healthy(struct check *check) {
    struct served s = serve(check, "--devices cpu:1 --fail 0@0.5");
    while (status_in(ask(&s, "/health", "", NULL)) == 200)
        usleep(10000);
    asks(&s, "/health", "", NULL, 503, "server_error");
    asks(&s, "/v1/completions", "", "{'prompt':'a'}", 503, "all workers have failed");
    stop(&s);
}

/* A client that asks for more than it reads waits for itself: what is not sent has a bound. */
static void who_does_not_read_is_not_answered(struct check *check) {
    enum { ASKED = 6000 }; /* 80 MB of pages */
    static const char page[] = "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";
    static char all[ASKED * sizeof page], text[1 << 16];
    struct served s = serve(check, "");
    int client = dial(&s), n = 0;
    for (int i = 0; i < ASKED; i++)
        strcat(all + (size_t)i * (sizeof page - 1), page);
    tell(client, all);
    asks(&s, "/health", "", NULL, 200, "ok"); /* others are */
    check_waits = "the last page";
    for (ssize_t got, at = 0; n < ASKED && (got = recv(client, text, sizeof text, 0)) > 0;)
        for (ssize_t i = 0; i < got; i++) { /* a page ends with its script */
            static const char end[] = "begin();\n</script>\n";
            at = text[i] == end[at] ? at + 1 : text[i] == end[0];
            n += end[at] == 0;
            at = end[at] == 0 ? 0 : at;
        }
    CHECK(n == ASKED, "%d pages", n);
    close(client);
    stop(&s);
}

enum { CLIENTS = SANITIZED ? 16 : 64, VISITORS = SANITIZED ? 60 : 500 };

/* Nobody reads before all have asked; one does not read at all. */
static void many_are_served_at_once(struct check *check) {
    struct served s = serve(check, "");
    char json[160], *expected[4];
    int clients[CLIENTS], before = count_files(&s);
    for (int i = 0; i < 4; i++) {
        snprintf(json, sizeof json, "{'prompt':'Once %d','max_tokens':60,'seed':%d}", i, i);
        expected[i] = strings_of(ask(&s, "/v1/completions", "", json), "text");
    }
    int asleep = dial(&s);
    post(asleep, "/v1/completions", "", LONG);
    for (int i = 0; i < CLIENTS; i++) {
        snprintf(json, sizeof json, "{'prompt':'Once %d','max_tokens':60,'seed':%d,'stream':true}",
                 i % 4, i % 4);
        clients[i] = dial(&s);
        post(clients[i], "/v1/completions", "", json);
    }
    for (int i = CLIENTS - 1; i >= 0; i--) {
        char *response = hear(clients[i], NULL);
        CHECK(strcmp(strings_of(response, "text"), expected[i % 4]) == 0, "client %d: %s", i,
              response);
        close(clients[i]);
    }
    close(asleep);
    for (int i = 0; i < VISITORS; i++) { /* who come, say something, and go */
        static const char *const words[] = {"",
                                            "GET",
                                            GET,
                                            GET "\r\n",
                                            POST "Content-Length: 9\r\n",
                                            POST "Content-Length: 9\r\n\r\n{",
                                            "\r\n",
                                            "\x16\x03"};
        int visitor = dial(&s);
        if (i % 9 < 8)
            tell(visitor, words[i % 9]);
        else
            post(visitor, "/v1/completions", "", LONG);
        if (i % 2)
            setsockopt(visitor, SOL_SOCKET, SO_LINGER, &(struct linger){1, 0},
                       sizeof(struct linger)); /* by a reset */
        close(visitor);
    }
    rests(&s);
    closes(&s, before);
    stop(&s);
}

int main(int argc, char **argv) {
    static const struct test tests[] = {TEST(requests_are_read_in_any_pieces),
                                        TEST(heads_have_bounds),
                                        TEST(texts_are_those_of_the_command_line),
                                        TEST(fields_mean_what_they_say),
                                        TEST(logprobs_are_those_of_the_logits),
                                        TEST(offsets_are_where_tokens_begin),
                                        TEST(one_connection_serves_many),
                                        TEST(nothing_without_the_key),
                                        TEST(pages_that_are_led_here_are_refused),
                                        TEST(a_long_text_holds_nobody_up),
                                        TEST(who_closes_half_has_what_is_ready),
                                        TEST(places_are_kept),
                                        TEST(who_leaves_is_cancelled),
                                        TEST(full_queues_say_so),
                                        TEST(too_many_turns_are_told),
                                        TEST(it_drains),
                                        TEST(a_draining_connection_closes),
                                        TEST(without_workers_it_is_not_healthy),
                                        TEST(who_does_not_read_is_not_answered),
                                        TEST(many_are_served_at_once)};
    return run_tests(tests, sizeof tests / sizeof *tests, argc, argv);
}
