/* test_watch.c: what --watch shows, by screen.h, so that the picture and the text above it are seen
 * as by who sits there. */
#define _GNU_SOURCE
#define JSON_IMPLEMENTATION
#include "files.h"
#include "screen.h"

#include <ctype.h>
#include <netinet/in.h>
#include <sys/socket.h>

enum { DEVICE_BLOCKS = 24, HOST_BLOCKS = 100, ROWS = 24, COLUMNS = 90, MOST_ROWS = 40 };
enum { REQUESTS = 12, WITHOUT_END = 3000, TOKENS = 250 };
#define LOAD "-n %d --seed 1 --devices cpu:3 --kv-device 24b --kv-host 100b"

/* Each place's blocks, as told in its line, are all that it has. */
static void screen_adds_up(const struct screen *s, struct check *check) {
    int head = screen_find(s, "worker "), host = screen_find(s, "host ");
    CHECK(head > 0 && host == head + 4, "lines %d and %d of %d", head, host, s->rows);
    CHECK(screen_find(s, "copies ") == s->rows - 1, "it ends in line %d of %d",
          screen_find(s, "copies "), s->rows);
    for (int y = head + 1; y <= host && head > 0; y++) {
        const char *line = screen_row(s, y), *end = line + strlen(line);
        int n[4] = {0}, sum = 0;
        while (end > line && end[-1] > 0) /* behind the bar */
            end--;
        CHECK(sscanf(end, "%d %d %d %d", n, n + 1, n + 2, n + 3) == 4, "%s", line);
        for (int i = 0; i < 4; i++)
            sum += n[i];
        CHECK(sum == (y == host ? HOST_BLOCKS : DEVICE_BLOCKS), "%d blocks: %s", sum, line);
    }
}

/* ---- a run at a terminal ---- */

static void write_prompts(struct check *check, int n) {
    static char text[64 * WITHOUT_END];
    int length = 0;
    for (int i = 0; i < n; i++)
        length += sprintf(text + length, "Once upon a time %d\n", i);
    write_file(check, "prompts", text, (size_t)length);
}

static struct live start(struct check *check, const char *terminal, int rows, int n_requests) {
    char command[512];
    setenv("TERM", terminal, 1);
    (void)snprintf(command, sizeof command, "model.bin --watch -f $T/prompts " LOAD, TOKENS);
    write_prompts(check, n_requests);
    struct live live = live_start(check, true, command);
    live_resize(&live, rows, COLUMNS);
    return live;
}

/* Shows what was written, and checks each frame. Returns how many there were. */
static int show(struct screen *s, const char *text, size_t length, struct check *check) {
    static const char end[] = "\033[K\0338";
    int n = 0;
    for (const char *last = text + length, *next; text < last; text = next) {
        next = memmem(text, (size_t)(last - text), end, sizeof end - 1);
        bool frame = next != NULL;
        next = frame ? next + sizeof end - 1 : last;
        screen_write(s, text, (size_t)(next - text));
        if (frame)
            screen_adds_up(s, check);
        n += frame;
    }
    return n;
}

/* Nothing is left of the picture, and lines scroll everywhere. */
static void is_restored(const struct screen *s, struct check *check) {
    CHECK(s->top == 0 && s->bottom == s->rows - 1, "lines %d to %d scroll", s->top, s->bottom);
    CHECK(screen_find(s, "worker ") < 0 && screen_find(s, "copies ") < 0, "a picture is left");
}

static void picture_leaves_the_text_alone(struct check *check) {
    write_prompts(check, REQUESTS);
    struct outcome plain = run(check, "model.bin -f $T/prompts " LOAD, TOKENS);
    struct live live = start(check, "xterm", ROWS, REQUESTS);
    int status = live_end(&live);
    struct screen *s = screen_new(ROWS, COLUMNS);
    int n = show(s, live.text, live.length, check);
    CHECK(status == 0 && s->n_faults == 0, "%d, %d faults: %s", status, s->n_faults, live.text);
    CHECK(n > 0, "no picture: %s", live.text);
    is_restored(s, check);
    char *got = screen_text(s), *expected = squeezed(plain.out),
         *summary = strstr(got, "[3workers:");
    CHECK(summary && (size_t)(summary - got) == strlen(expected) &&
              strncmp(got, expected, strlen(expected)) == 0,
          "got\n%s\nexpected\n%s", got, expected);
}

static void follows_the_size(struct check *check) {
    struct live live = start(check, "xterm", ROWS, WITHOUT_END);
    live_until(&live, "copies ");
    live_until(&live, "\0338");
    size_t before = live.length;
    live_resize(&live, MOST_ROWS, COLUMNS);
    live_until(&live, "copies ");
    live_until(&live, "\0338");
    live_until(&live, "\033[40;1Hcopies "); /* the lowest line of the new size */
    live_until(&live, "\0338");
    live_resize(&live, 8, COLUMNS); /* too small: a line a second in its place */
    live_until(&live, "\033[r\0338\033[J");
    kill(live.pid, SIGKILL);
    live_end(&live);
    CHECK(show(screen_new(ROWS, COLUMNS), live.text, before, check) > 0, "none");
}

static void signals_leave_a_terminal(struct check *check) {
    static const int signals[] = {SIGTERM, SIGHUP, SIGINT};
    for (size_t i = 0; i < COUNT(signals); i++) {
        struct live live = start(check, "xterm", ROWS, WITHOUT_END);
        live_until(&live, "copies ");
        kill(live.pid, SIGTSTP); /* no shell could let it go on, so it does so itself */
        live_until(&live, "\033[r\0338\033[J");
        live_until(&live, "copies ");
        kill(live.pid, signals[i]);
        if (signals[i] == SIGINT)
            live_until(&live, "\033[r\0338\033[J");
        int status = live_end(&live);
        CHECK(status == (signals[i] == SIGINT ? 3 : 128 + signals[i]) || status == 130,
              "signal %d: %d", signals[i], status);
        struct screen *s = screen_new(ROWS, COLUMNS);
        (void)show(s, live.text, live.length, check);
        is_restored(s, check);
    }
}

static void colours_can_be_refused(struct check *check) {
    for (int plain = 0; plain < 2; plain++) {
        if (plain)
            setenv("NO_COLOR", "1", 1);
        struct live live = start(check, "xterm", ROWS, WITHOUT_END);
        live_until(&live, "copies ");
        kill(live.pid, SIGTERM);
        live_end(&live);
        unsetenv("NO_COLOR");
        CHECK((strstr(live.text, "\033[32m") == NULL) == plain, "NO_COLOR %d: %s", plain,
              live.text);
    }
}

/* ---- lines ---- */

/* The blocks of each place in all lines of a text. Returns how many lines there were. */
static int lines_add_up(char *text, struct check *check) {
    int n = 0;
    for (char *line = strtok(text, "\r\n"); line; line = strtok(NULL, "\r\n")) {
        char *at = strstr(line, " s; requests: ");
        for (int place = 0; at && place < 4; place++, at += at != NULL) {
            int b[4] = {0};
            at = strstr(at, " pinned, ");
            while (at && isdigit((unsigned char)at[-1]))
                at--;
            CHECK(at &&
                      sscanf(at, "%d pinned, %d cached, %d in flight, %d free", b, b + 1, b + 2,
                             b + 3) == 4 &&
                      b[0] + b[1] + b[2] + b[3] == (place == 3 ? HOST_BLOCKS : DEVICE_BLOCKS),
                  "place %d: %s", place, line);
            at = at ? strstr(at, " pinned") : NULL;
            n += at && place == 3;
        }
    }
    return n;
}

static void lines_where_there_is_no_screen(struct check *check) {
    write_prompts(check, REQUESTS);
    struct outcome o = run(check, "model.bin --watch -f $T/prompts " LOAD, TOKENS);
    CHECK(o.status == 0 && !strchr(o.err, 27), "%d: %s", o.status, o.err);
    CHECK(strstr(o.err, "12 of 12 ended"), "the last line is that of the end: %s", o.err);
    CHECK(lines_add_up(o.err, check) > 0, "no line");
    struct live live = start(check, "dumb", ROWS, REQUESTS);
    CHECK(live_end(&live) == 0 && !strchr(live.text, 27), "%s", live.text);
    CHECK(lines_add_up(live.text, check) > 0, "no line");
    o = run(check, "model.bin --replay 40:20 --limit 5 --watch --devices cpu:2");
    CHECK(o.status == 0 && strstr(o.err, "5 of 5 ended"), "%d: %s", o.status, o.err);
    o = run(check, "model.bin --watch");
    CHECK(o.status == 2 && strstr(o.err, "--watch"), "%d: %s", o.status, o.err);
}

/* ---- JSON ---- */

/* The body of an answer on a port of this machine; it is closed after that. */
static char *ask(struct check *check, int port, const char *request) {
    struct sockaddr_in at = {.sin_family = AF_INET,
                             .sin_port = htons((uint16_t)port),
                             .sin_addr = {htonl(INADDR_LOOPBACK)}};
    int s = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    char *text = keep(1 << 16), *end = text;
    CHECK(connect(s, (struct sockaddr *)&at, sizeof at) == 0, "no server at %d", port);
    CHECK(write(s, request, strlen(request)) == (ssize_t)strlen(request), "cannot write");
    for (ssize_t n; (n = read(s, end, (size_t)(text + (1 << 16) - 1 - end))) > 0;)
        end += n;
    close(s);
    char *body = strstr(text, "\r\n\r\n");
    CHECK(strncmp(text, "HTTP/1.1 200", 12) == 0 && body, "%.200s", text);
    return body ? body + 4 : text;
}

static int sum_of(struct json_node *nodes, int place) {
    static const char *const parts[] = {"free", "pinned", "cached", "in_flight"};
    int sum = 0;
    for (int i = 0; i < 4; i++) {
        const struct json_node *part = value_of(nodes, place, parts[i]);
        sum += part ? atoi(part->text) : -1000;
    }
    return sum;
}

static void page_and_its_figures(struct check *check) {
    static const char post[] = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: "
                               "close\r\nContent-Length: 37\r\n\r\n"
                               "{\"prompt\": \"A fox\", \"max_tokens\": 20}";
    struct live live = live_start(check, true,
                                  "model.bin --serve 0 --devices cpu:3 "
                                  "--kv-device 24b --kv-host 100b");
    int port = 0;
    live_until(&live, "127.0.0.1:");
    live_until(&live, "/v1");
    (void)sscanf(strstr(live.text, "127.0.0.1:"), "127.0.0.1:%d", &port);
    const char *page =
        ask(check, port, "GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    CHECK(strstr(page, "</script>") && !strstr(page, "http"), "an external resource: %s", page);
    (void)ask(check, port, post);
    char error[ERROR_LENGTH] = "";
    char *text =
        ask(check, port, "GET /stats HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    struct json_node *nodes = json_parse(text, strlen(text), error);
    CHECK(nodes, "%s", error);
    kill(live.pid, SIGTERM);
    CHECK(live_end(&live) == 0, "%s", live.text);
    if (!nodes)
        return;
    const struct json_node *workers = value_of(nodes, 0, "workers"),
                           *host = value_of(nodes, 0, "host");
    int n = 0, first = workers ? (int)(workers - nodes) + 1 : 0;
    for (int i = first; workers && i < workers->next; i = nodes[i].next, n++)
        CHECK(sum_of(nodes, i) == DEVICE_BLOCKS, "worker %d: %d", n, sum_of(nodes, i));
    CHECK(n == 3 && host && sum_of(nodes, (int)(host - nodes)) == HOST_BLOCKS, "%d workers", n);
    const struct json_node *finished = value_of(nodes, 0, "finished");
    const struct json_node *ttft = value_of(nodes, 0, "ttft_ms");
    CHECK(finished && atoi(finished->text) == 1, "a request ended");
    CHECK(ttft && ttft->type == '[', "it had a first token");
    free(nodes);
}

int main(int argc, char **argv) {
    static const struct test tests[] = {
        TEST(picture_leaves_the_text_alone),  TEST(follows_the_size),
        TEST(signals_leave_a_terminal),       TEST(colours_can_be_refused),
        TEST(lines_where_there_is_no_screen), TEST(page_and_its_figures)};
    unsetenv("NO_COLOR");
    (void)setlocale(LC_CTYPE, "C.UTF-8"); /* of screen.h */
    return run_tests(tests, COUNT(tests), argc, argv);
}
