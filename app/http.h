/* http.h: HTTP/1.1 for one thread: connections, requests on their way in, responses on their way
 * out. Knows nothing of models: serve.h does.
 *
 *     static void answer(void *context, struct http_connection *c) {
 *         fputs("Hello\n", http_body(c));
 *         http_respond(c, 200, "text/plain", "");
 *     }
 *     struct http_handler handler = {.begins = allows, .answer = answer, .gone = forget, ...};
 *     struct http *http = http_open("127.0.0.1", 8080, &handler, error);
 *     while (http_turn(http)) {}
 *     http_close(http);
 *
 * One thread turns a loop around poll; another may wake it. A connection reads one request, and
 * what comes behind it waits until that is answered, at once or later, whole or in pieces. What a
 * client does not read waits here: nobody else waits for it, and it gets no further answers. One
 * that ends what it sends has a response that is there; where it must be computed it has gone, as
 * nginx and uvicorn have it.
 *
 * A request, by half-open intervals of what has come (input): its head is taken out as soon as it
 * is whole; then [0, body) is its body so far, [at, n_input) not yet looked at, in between nothing.
 *
 * What two readers could understand differently is refused, and the connection closed: both
 * lengths, two lengths, line breaks without CR, folded lines, space before a colon, encodings but
 * chunked. Heads, bodies, connections and the time that each may take are bounded.
 * Define HTTP_IMPLEMENTATION in one file, before including this. Read next: serve.h. */
#ifndef HTTP_H
#define HTTP_H

#include "../lib/text.h"

enum {
    HTTP_HEAD = 1 << 14,      /* bytes of a request's head */
    HTTP_FIELDS = 64,         /* lines of a head, and of what may follow a body in chunks */
    HTTP_BODY = 8 << 20,      /* bytes: 1 million token ids */
    HTTP_CONNECTIONS = 512,   /* others wait to be accepted */
    HTTP_AHEAD = 1 << 16,     /* bytes that are read at a time, and behind a request */
    HTTP_UNREAD = 1 << 26,    /* bytes of output: who reads so little has gone */
    HTTP_PATIENCE = 60,       /* seconds for a request to come, or between two of them */
    HTTP_READ_PATIENCE = 300, /* seconds in which a client reads nothing of what is there */
    HTTP_TURN_MS = 1000,      /* how long a turn waits at most, for patience comes to an end */
    HTTP_DEAF_MS = 100,       /* how long nobody is accepted when no descriptor was free */
    HTTP_LINGER = 2           /* seconds from the end of our output to that of its input */
};

struct http_request {
    const char *method, *path; /* the latter without its query, decoded */
    const char *body;          /* (length) NULL: it has not come so far */
    size_t length;
    /* how it comes */
    bool persistent, old, chunked, expects; /* old: HTTP/1.0; expects: to be told to continue */
    char head[HTTP_HEAD];                   /* with zero bytes between its parts */
    struct {
        const char *name, *value;
    } fields[HTTP_FIELDS]; /* (n_fields) */
    int n_fields;
};

struct http;
struct http_connection {
    struct http *http;
    struct http_request request;
    void *user; /* of who answers; NULL at first */
    /* http.h's own */
    int socket;
    enum http_state {
        HTTP_READING,   /* a request, or waits for one */
        HTTP_ANSWERING, /* it is whole, its response is not */
        HTTP_CLOSING,   /* nothing more is answered: the rest of the output is sent; behind that
                         * it reads to the client's end, so that the system keeps what was sent */
        HTTP_GONE       /* to be taken away */
    } state;
    bool served;          /* it had a response */
    bool headed, streams; /* the request's head is there; its response comes in pieces */
    char *input, *output; /* (n_input), (n_output) */
    size_t n_input, at, body, left, n_output, sent;
    int n_trailers; /* left: of a chunk, with its end; n_trailers: lines behind the last, + 1 */
    double since;   /* when it last went on: see patience */
};

struct http_handler { /* who answers. None of these may wait */
    /* The head is there. False: it was answered, and its body is not wanted. */
    bool (*begins)(void *context, struct http_connection *c);
    /* The request is whole: responds, or calls http_later. */
    void (*answer)(void *context, struct http_connection *c);
    /* A client that waits for its response has gone. */
    void (*gone)(void *context, struct http_connection *c);
    /* Each turn: responds to those who wait. */
    void (*turn)(void *context);
    void *context;
};

/* Takes the port, 0: any that is free; clients are refused until http_listen. NULL: `error`. */
struct http *http_open(const char *host, int port, const struct http_handler *handler,
                       char error[ERROR_LENGTH]);
bool http_listen(struct http *http);
int http_port(const struct http *http);
bool http_is_local(const struct http *http); /* only this machine reaches it */
/* Waits for clients or http_wake, and serves them. False: it drains, and all is sent. */
bool http_turn(struct http *http);
void http_wake(struct http *http); /* from any thread, or a signal's handler */
/* No new connections; those that are there close when they have their responses. */
void http_drain(struct http *http);
void http_close(struct http *http); /* NULL: nothing is done */

/* A field's value, the name in small letters; NULL: there is none. */
const char *http_field(const struct http_request *request, const char *name);
/* Where a response's body, or a piece of it, is to be written. */
FILE *http_body(struct http_connection *c);
/* Sends that body as a whole response; fields: further lines of its head, each with its end. */
void http_respond(struct http_connection *c, int status, const char *type, const char *fields);
void http_later(struct http_connection *c);
/* Begins a response of status 200, sends a piece of it, ends it. */
void http_stream(struct http_connection *c, const char *type);
void http_piece(struct http_connection *c);
void http_end(struct http_connection *c);

/* The parser, which fuzz_http.c and tests call alone: looks at what has come. 0: more is needed;
 * 100: its head is there; 200: all of it is, in [0, body); else the status that refuses it. */
int http_parse(struct http_connection *c);
void http_next(struct http_connection *c); /* forgets a request that was whole */

#endif /* HTTP_H */

#ifdef HTTP_IMPLEMENTATION
#undef HTTP_IMPLEMENTATION

#include <arpa/inet.h>
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

struct http {
    struct http_handler handler;
    int listener, wake[2];
    bool listens, drains;
    double deaf_until; /* no descriptor was free */
    struct http_connection *connections[HTTP_CONNECTIONS];
    int n;
    FILE *body; /* writes to text (length) */
    char *text;
    size_t length;
};

static double http_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* ---- requests ---- */

/* Letters of names and methods: RFC 9110's token. */
static size_t http_token(const char *text) {
    size_t n = 0;
    while (isalnum((unsigned char)text[n]) || (text[n] && strchr("!#$%&'*+-.^_`|~", text[n])))
        n++;
    return n;
}

/* Ends a line of a head, or behind a body, at its CR LF; NULL: it has none, or other controls. */
static char *http_line(char *line) {
    char *end = line;
    while (((unsigned char)*end >= ' ' && *end != 127) || *end == '\t')
        end++;
    if (end[0] != '\r' || end[1] != '\n')
        return NULL;
    *end = 0;
    return end + 2;
}

/* Cuts `name: value` in two. NULL: it is none. */
static char *http_cut(char *line) {
    size_t name = http_token(line);
    if (name == 0 || line[name] != ':')
        return NULL;
    line[name++] = 0;
    char *value = line + name + strspn(line + name, " \t");
    for (size_t end = strlen(value); end > 0 && strchr(" \t", value[end - 1]);)
        value[--end] = 0;
    return value;
}

const char *http_field(const struct http_request *r, const char *name) {
    for (int i = 0; i < r->n_fields; i++)
        if (strcasecmp(r->fields[i].name, name) == 0)
            return r->fields[i].value;
    return NULL;
}

/* Replaces each %XX in a path by its byte, in place. False: it is none, or a zero. */
static bool http_decode(char *path) {
    char *to = path;
    for (const char *at = path; *at; at++, to++) {
        *to = *at;
        if (*at != '%')
            continue;
        if (!isxdigit((unsigned char)at[1]) || !isxdigit((unsigned char)at[2]))
            return false;
        *to = (char)strtol((const char[]){at[1], at[2], 0}, NULL, 16);
        at += 2;
        if (!*to)
            return false;
    }
    *to = 0;
    return true;
}

/* `METHOD /path?query HTTP/1.1`. 0, or the status that refuses it. */
static int http_first_line(struct http_request *r, char *line) {
    size_t method = http_token(line);
    char *target = line + method + 1, *end = target + strcspn(target, " ");
    if (method == 0 || target[-1] != ' ' || *end != ' ' || strncmp(end + 1, "HTTP/", 5) != 0)
        return 400;
    target[-1] = *end = 0;
    if (strcmp(end + 6, "1.1") != 0 && strcmp(end + 6, "1.0") != 0)
        return 505;
    for (char *at = target; *at; at++)
        if (*at & 0x80)
            return 400;
    r->old = end[8] == '0';
    r->persistent = !r->old;
    r->method = line;
    if (strncasecmp(target, "http://", 7) == 0) /* as a proxy is asked */
        target += 7 + strcspn(target + 7, "/?");
    target[strcspn(target, "?")] = 0;
    r->path = target;
    return (*target == '/' || strcmp(target, "*") == 0) && http_decode(target) ? 0 : 400;
}

/* What the fields say of the request's own way. 0, or the status that refuses it. */
static int http_framing(struct http_request *r) {
    int n_lengths = 0, n_encodings = 0, n_hosts = 0;
    for (int i = 0; i < r->n_fields; i++) {
        const char *name = r->fields[i].name, *value = r->fields[i].value;
        if (strcasecmp(name, "content-length") == 0) {
            size_t digits = strspn(value, "0123456789");
            if (n_lengths++ || digits == 0 || value[digits])
                return 400;
            r->length = digits < 18 ? (size_t)atoll(value) : SIZE_MAX;
        } else if (strcasecmp(name, "transfer-encoding") == 0) {
            if (n_encodings++ || strcasecmp(value, "chunked") != 0)
                return 501;
            r->chunked = true;
        } else if (strcasecmp(name, "host") == 0) {
            n_hosts++;
        } else if (strcasecmp(name, "expect") == 0) {
            r->expects = !r->old && strcasecmp(value, "100-continue") == 0;
        } else if (strcasecmp(name, "connection") == 0) {
            r->persistent = strcasestr(value, "close") == NULL &&
                            (r->persistent || strcasestr(value, "keep-alive") != NULL);
        }
    }
    if ((r->chunked && (n_lengths || r->old)) || n_hosts > 1 || (!r->old && n_hosts == 0))
        return 400;
    if (!r->chunked && n_lengths == 0 && strcmp(r->method, "POST") == 0)
        return 411;
    return r->length > HTTP_BODY ? 413 : 0;
}

/* Takes the head out of the input, once all of it is there. */
static int http_take_head(struct http_connection *c) {
    struct http_request *r = &c->request;
    size_t blank = 0; /* lines before it, which belong to nothing */
    while (c->n_input - blank >= 2 && memcmp(c->input + blank, "\r\n", 2) == 0)
        blank += 2;
    c->n_input -= blank;
    memmove(c->input, c->input + blank, c->n_input);
    if (c->n_input > 0 && *c->input != '\r' && !isgraph((unsigned char)*c->input))
        return 400; /* TLS, say, which would wait for a word of ours */
    const char *at = c->input + c->at, *last = c->input + c->n_input, *end = NULL;
    while (!end && (at = memchr(at, '\n', (size_t)(last - at))) != NULL) {
        if (at == c->input || at[-1] != '\r')
            return 400; /* at once: who ends lines so would wait for an answer */
        end = last - ++at >= 2 && memcmp(at, "\r\n", 2) == 0 ? at + 2 : NULL;
    }
    size_t length = end ? (size_t)(end - c->input) : c->n_input;
    if (length > HTTP_HEAD - 1)
        return 431;
    if (!end) {
        c->at = length > 3 ? length - 3 : 0;
        return 0;
    }
    memcpy(r->head, c->input, length);
    r->head[length] = 0;
    c->n_input -= length;
    memmove(c->input, c->input + length, c->n_input);
    c->at = c->body = 0;
    c->headed = true;
    char *line = r->head, *next = http_line(line);
    int status = next ? http_first_line(r, line) : 400;
    for (line = next; status == 0 && (next = http_line(line)) != NULL && *line; line = next) {
        if (r->n_fields == HTTP_FIELDS)
            return 431;
        r->fields[r->n_fields].name = line;
        r->fields[r->n_fields].value = http_cut(line);
        if (!r->fields[r->n_fields++].value)
            return 400;
    }
    status = status > 0 ? status : next == r->head + length ? http_framing(r) : 400;
    return status > 0 ? status : 100;
}

/* Decodes the chunks that are there, each in two steps: its line, then its bytes. */
static int http_take_chunks(struct http_connection *c) {
    for (;;) {
        char *line = c->input + c->at, *end;
        size_t there = c->n_input - c->at;
        if (c->left > 0) { /* bytes of a chunk, and the end of their line */
            if (there < c->left)
                return 0;
            size_t n = c->left - 2;
            if (memcmp(line + n, "\r\n", 2) != 0)
                return 400;
            memmove(c->input + c->body, line, n);
            c->body += n;
            c->at += c->left;
            c->left = 0;
            continue;
        }
        end = memchr(line, '\n', there);
        if (!end)
            return there < HTTP_HEAD / 4 ? 0 : 400;
        c->at += (size_t)(end - line) + 1;
        if (end - line > HTTP_HEAD / 4 || http_line(line) != end + 1)
            return 400;
        if (c->n_trailers > 0) { /* behind the last chunk: what is said there is not wanted */
            if (!*line)
                return 200;
            if (c->n_trailers++ > HTTP_FIELDS || !http_cut(line))
                return 400;
            continue;
        }
        size_t digits = strspn(line, "0123456789abcdefABCDEF");
        if (digits == 0 || digits > 15 || (line[digits] && line[digits] != ';'))
            return 400;
        c->left = strtoul(line, NULL, 16);
        if (c->left > HTTP_BODY - c->body)
            return 413;
        c->n_trailers = c->left == 0;
        c->left += c->left > 0 ? 2 : 0;
    }
}

int http_parse(struct http_connection *c) {
    struct http_request *r = &c->request;
    if (!c->headed)
        return http_take_head(c);
    if (r->chunked)
        return http_take_chunks(c);
    c->at = c->body = c->n_input < r->length ? c->n_input : r->length;
    return c->body == r->length ? 200 : 0;
}

void http_next(struct http_connection *c) {
    c->n_input -= c->at;
    if (c->n_input > 0)
        memmove(c->input, c->input + c->at, c->n_input);
    c->at = c->body = c->left = 0;
    c->n_trailers = 0;
    c->headed = c->streams = false;
    struct http_request *r = &c->request;
    r->n_fields = 0;
    r->length = 0;
    r->body = NULL;
    r->method = r->path = "";
    r->persistent = r->old = r->chunked = r->expects = false;
}

/* ---- responses ---- */

static const char *http_reason(int status) {
    static const char reasons[][36] = {"200 OK",
                                       "400 Bad Request",
                                       "401 Unauthorized",
                                       "403 Forbidden",
                                       "404 Not Found",
                                       "405 Method Not Allowed",
                                       "411 Length Required",
                                       "413 Content Too Large",
                                       "429 Too Many Requests",
                                       "431 Request Header Fields Too Large",
                                       "500 Internal Server Error",
                                       "501 Not Implemented",
                                       "503 Service Unavailable",
                                       "504 Gateway Timeout",
                                       "505 HTTP Version Not Supported"};
    for (size_t i = 0; i < sizeof reasons / sizeof *reasons; i++)
        if (atoi(reasons[i]) == status)
            return reasons[i] + 4;
    return "Unknown";
}

static void http_send(struct http_connection *c, const char *bytes, size_t n) {
    char *longer =
        c->n_output - c->sent + n < HTTP_UNREAD ? realloc(c->output, c->n_output + n + 1) : NULL;
    if (!longer) {
        c->state = HTTP_GONE;
        return;
    }
    if (c->n_output == 0)
        c->since = http_now();
    memcpy(longer + c->n_output, bytes, n);
    c->output = longer;
    c->n_output += n;
}

FILE *http_body(struct http_connection *c) {
    rewind(c->http->body);
    return c->http->body;
}

static void http_send_head(struct http_connection *c, int status, const char *type,
                           const char *fields, const char *framing) {
    char head[1024], date[64];
    time_t now = time(NULL);
    if (c->http->drains || (!c->request.body && (c->request.chunked || c->request.length > 0)))
        c->request.persistent = false; /* what else comes finds nobody, or is not a request */
    struct tm utc;
    strftime(date, sizeof date, "%a, %d %b %Y %H:%M:%S GMT", gmtime_r(&now, &utc));
    int n = snprintf(head, sizeof head,
                     "HTTP/1.1 %d %s\r\nDate: %s\r\nContent-Type: %s\r\n%s%sConnection: %s\r\n\r\n",
                     status, http_reason(status), date, type, framing, fields,
                     c->request.persistent ? "keep-alive" : "close");
    http_send(c, head, n < (int)sizeof head ? (size_t)n : 0);
}

/* The response is whole: on to the next request, or to the end. */
static void http_finish(struct http_connection *c) {
    bool persistent = c->request.persistent;
    c->user = NULL;
    c->served = true;
    http_next(c);
    if (c->state == HTTP_GONE)
        return;
    c->since = http_now();
    c->state = persistent ? HTTP_READING : HTTP_CLOSING;
}

void http_respond(struct http_connection *c, int status, const char *type, const char *fields) {
    struct http *http = c->http;
    char framing[64];
    (void)fflush(http->body);
    (void)snprintf(framing, sizeof framing, "Content-Length: %zu\r\n", http->length);
    http_send_head(c, status, type, fields, framing);
    if (strcmp(c->request.method, "HEAD") != 0)
        http_send(c, http->text, http->length);
    http_finish(c);
}

void http_later(struct http_connection *c) {
    c->state = HTTP_ANSWERING;
}

void http_stream(struct http_connection *c, const char *type) {
    c->streams = !c->request.old;
    c->request.persistent = c->request.persistent && c->streams;
    http_send_head(c, 200, type, "Cache-Control: no-cache\r\nX-Accel-Buffering: no\r\n",
                   c->streams ? "Transfer-Encoding: chunked\r\n" : "");
}

void http_piece(struct http_connection *c) {
    char line[32];
    (void)fflush(c->http->body);
    if (c->streams)
        http_send(c, line, (size_t)snprintf(line, sizeof line, "%zx\r\n", c->http->length));
    http_send(c, c->http->text, c->http->length);
    if (c->streams)
        http_send(c, "\r\n", 2);
}

void http_end(struct http_connection *c) {
    if (c->streams)
        http_send(c, "0\r\n\r\n", 5);
    http_finish(c);
}

/* A request that was not understood: nothing behind it can be, either. */
static void http_refuse(struct http_connection *c, int status) {
    c->request.persistent = false;
    (void)fprintf(http_body(c),
                  "{\"error\":{\"message\":\"%s\",\"type\":\"invalid_request_error\","
                  "\"param\":null,\"code\":null}}\n",
                  http_reason(status));
    http_respond(c, status, "application/json", "");
}

/* ---- connections ---- */

/* Answers what is whole in the input, as far as its client reads the answers. */
static void http_serve(struct http_connection *c) {
    struct http *http = c->http;
    while (c->state == HTTP_READING && c->n_input > 0 && c->n_output < HTTP_AHEAD) {
        int status = http_parse(c);
        if (status == 0)
            return;
        if (status == 100) {
            if (!http->handler.begins(http->handler.context, c))
                continue;
            if (c->request.expects && c->n_input == 0)
                http_send(c, "HTTP/1.1 100 Continue\r\n\r\n", 25);
            status = http_parse(c);
            if (status == 0)
                return;
        }
        if (status != 200) {
            http_refuse(c, status);
            return;
        }
        c->request.length = c->body;
        c->request.body = c->input;
        http->handler.answer(http->handler.context, c);
    }
}

/* Reads what has come; the client's end, too. */
static void http_receive(struct http_connection *c) {
    if (c->headed && c->at > c->body) { /* of chunks that were decoded */
        memmove(c->input + c->body, c->input + c->at, c->n_input - c->at);
        c->n_input -= c->at - c->body;
        c->at = c->body;
    }
    char *longer = realloc(c->input, c->n_input + HTTP_AHEAD + 1);
    ssize_t n = longer ? recv(c->socket, longer + c->n_input, HTTP_AHEAD, 0) : 0;
    c->input = longer ? longer : c->input;
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (n <= 0) {
        c->state = n == 0 && c->state == HTTP_READING && c->n_output > 0 ? HTTP_CLOSING : HTTP_GONE;
        return;
    }
    if (c->n_input == 0 && !c->headed && c->n_output == 0)
        c->since = http_now();
    c->n_input = c->state == HTTP_CLOSING ? 0 : c->n_input + (size_t)n;
}

static void http_flush(struct http_connection *c) {
    while (c->sent < c->n_output) {
        ssize_t n = send(c->socket, c->output + c->sent, c->n_output - c->sent, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EAGAIN)
            return;
        if (n <= 0) {
            c->state = HTTP_GONE;
            return;
        }
        c->sent += (size_t)n;
        c->since = http_now();
    }
    c->sent = c->n_output = 0;
    if (c->state == HTTP_CLOSING)
        (void)shutdown(c->socket, SHUT_WR);
}

static void http_accept(struct http *http) {
    double now = http_now();
    while (http->n < HTTP_CONNECTIONS) {
        int socket = accept4(http->listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        struct http_connection *c = socket >= 0 ? calloc(1, sizeof *c) : NULL;
        if (!c) {
            http->deaf_until =
                errno == EAGAIN ? 0 : now + 1e-3 * HTTP_DEAF_MS; /* out of descriptors, or worse */
            if (socket >= 0)
                (void)close(socket);
            return;
        }
        (void)setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
        c->http = http;
        c->socket = socket;
        c->since = now;
        http_next(c);
        http->connections[http->n++] = c;
    }
}

/* When a connection has had its time, to a second. */
static double http_patience(const struct http_connection *c) {
    if (c->n_output > 0)
        return c->since + HTTP_READ_PATIENCE;
    switch (c->state) {
    case HTTP_READING: return c->since + HTTP_PATIENCE;
    case HTTP_CLOSING: return c->since + HTTP_LINGER;
    default: return INFINITY;
    }
}

/* Takes away who has gone or had its time; if all places are taken, who is idle for longest. */
static void http_sweep(struct http *http) {
    double now = http_now();
    struct http_connection *idle = NULL;
    for (int i = 0; i < http->n; i++) {
        struct http_connection *c = http->connections[i];
        bool rests = c->state == HTTP_READING && c->n_input == 0 && c->n_output == 0 && !c->headed;
        if (http_patience(c) <= now || (rests && http->drains))
            c->state = HTTP_GONE;
        else if (rests && c->served && (!idle || c->since < idle->since))
            idle = c;
    }
    if (idle && http->n == HTTP_CONNECTIONS)
        idle->state = HTTP_GONE;
    for (int i = http->n - 1; i >= 0; i--) {
        struct http_connection *c = http->connections[i];
        if (c->state != HTTP_GONE)
            continue;
        if (c->user)
            http->handler.gone(http->handler.context, c);
        (void)close(c->socket);
        free(c->input);
        free(c->output);
        free(c);
        http->connections[i] = http->connections[--http->n];
    }
}

bool http_turn(struct http *http) {
    struct pollfd ready[HTTP_CONNECTIONS + 2] = {{.fd = http->wake[0], .events = POLLIN}};
    char bytes[512];
    int n = http->n;
    bool accepts = http->listens && n < HTTP_CONNECTIONS && http->deaf_until <= http_now();
    ready[1] = (struct pollfd){.fd = accepts ? http->listener : -1, .events = POLLIN};
    for (int i = 0; i < n; i++) {
        const struct http_connection *c = http->connections[i];
        bool reads = (c->state == HTTP_CLOSING && c->n_output == 0) ||
                     (c->state == HTTP_READING && c->n_output < HTTP_AHEAD) ||
                     (c->state == HTTP_ANSWERING && c->n_input - c->at < HTTP_AHEAD);
        ready[i + 2].fd = c->socket;
        ready[i + 2].events = (short)((reads ? POLLIN : 0) | (c->n_output > 0 ? POLLOUT : 0) |
                                      (c->state == HTTP_ANSWERING ? POLLRDHUP : 0));
    }
    (void)poll(ready, (nfds_t)n + 2, http->deaf_until > http_now() ? HTTP_DEAF_MS : HTTP_TURN_MS);
    while (read(http->wake[0], bytes, sizeof bytes) == sizeof bytes) {
    }
    for (int i = 0; i < n; i++) {
        struct http_connection *c = http->connections[i];
        short events = ready[i + 2].revents;
        if (events & (POLLERR | POLLHUP | POLLNVAL | POLLRDHUP))
            c->state = events & POLLIN && c->state != HTTP_ANSWERING ? c->state : HTTP_GONE;
        if (events & POLLIN && c->state != HTTP_GONE)
            http_receive(c);
    }
    if (ready[1].revents)
        http_accept(http);
    for (int i = 0; i < http->n; i++)
        http_serve(http->connections[i]);
    http->handler.turn(http->handler.context);
    for (int i = 0; i < http->n; i++) {
        struct http_connection *c = http->connections[i];
        bool more = true;
        while (more && c->state != HTTP_GONE) {
            http_serve(c); /* what came behind a request that was answered now */
            more = c->n_output >= HTTP_AHEAD;
            http_flush(c);
            more = more && c->n_output == 0;
        }
    }
    http_sweep(http);
    return !http->drains || http->n > 0;
}

/* ---- opening and closing ---- */

struct http *http_open(const char *host, int port, const struct http_handler *handler,
                       char error[ERROR_LENGTH]) {
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE | AI_NUMERICSERV};
    struct addrinfo *address = NULL;
    char service[16];
    (void)snprintf(service, sizeof service, "%d", port);
    int wrong = getaddrinfo(host, service, &hints, &address);
    if (wrong) {
        (void)fail(error, "--host: %.200s: %s", host, gai_strerror(wrong));
        return NULL;
    }
    struct http *http = calloc(1, sizeof *http);
    if (!http)
        abort();
    http->handler = *handler;
    http->body = open_memstream(&http->text, &http->length);
    http->wake[0] = http->wake[1] = -1;
    http->listener =
        socket(address->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, IPPROTO_TCP);
    bool ok = http->body && http->listener >= 0 &&
              setsockopt(http->listener, SOL_SOCKET, SO_REUSEADDR, &(int){1}, sizeof(int)) == 0 &&
              bind(http->listener, address->ai_addr, address->ai_addrlen) == 0 &&
              pipe2(http->wake, O_NONBLOCK | O_CLOEXEC) == 0;
    freeaddrinfo(address);
    if (ok)
        return http;
    (void)fail(error, "--serve: port %d of %.200s: %s", port, host, strerror(errno));
    http_close(http);
    return NULL;
}

bool http_listen(struct http *http) {
    return http->listens = listen(http->listener, SOMAXCONN) == 0;
}

union http_address {
    struct sockaddr any;
    struct sockaddr_in v4;
    struct sockaddr_in6 v6;
};

static union http_address http_address(const struct http *http) {
    union http_address at = {0};
    (void)getsockname(http->listener, &at.any, &(socklen_t){sizeof at});
    return at;
}

int http_port(const struct http *http) {
    return ntohs(http_address(http).v4.sin_port); /* IPv6 has it at the same place */
}

bool http_is_local(const struct http *http) {
    union http_address at = http_address(http);
    return at.any.sa_family == AF_INET ? ntohl(at.v4.sin_addr.s_addr) >> 24 == 127
                                       : IN6_IS_ADDR_LOOPBACK(&at.v6.sin6_addr);
}

void http_wake(struct http *http) {
    (void)!write(http->wake[1], "", 1); /* if it is full, who reads it will wake */
}

void http_drain(struct http *http) {
    if (http->listens)
        (void)close(http->listener);
    http->listener = -1;
    http->listens = false;
    http->drains = true;
}

void http_close(struct http *http) {
    if (!http)
        return;
    for (int i = 0; i < http->n; i++)
        http->connections[i]->state = HTTP_GONE;
    http_sweep(http);
    for (int i = 0; i < 2; i++)
        if (http->wake[i] >= 0)
            (void)close(http->wake[i]);
    if (http->listener >= 0)
        (void)close(http->listener);
    if (http->body)
        (void)fclose(http->body);
    free(http->text);
    free(http);
}

#endif /* HTTP_IMPLEMENTATION */
