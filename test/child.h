/* child.h: the program under test as a child process, with a time limit and all that it wrote.
 *
 *     struct outcome o = run(check, "model.bin -p %s -n 5", "hello");
 *     CHECK(o.status == 0, "%s", o.err);
 *     outcome_free(&o);
 *
 *     struct live live = live_start(check, true, "model.bin");   at a pseudo terminal
 *     live_until(&live, "> ", 5);
 *     live_write(&live, "Once upon a time\n");
 *     int status = live_end(&live, 5);
 *     live_close(&live);
 *
 * The words after the program's name go through the shell, so `< file` and `>&-` work. A crash
 * and a hang are statuses like others: 128 + the signal's number. So is a sanitizer's report:
 * SANITIZER_STATUS, or one failed check where it stands in stderr. */
#ifndef CHILD_H
#define CHILD_H

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "check.h"

#ifndef DYNAMO_PROGRAM
#define DYNAMO_PROGRAM "./dynamo"
#endif

enum {
    CHILD_LIMIT = 60, /* seconds for one run: far more than it takes, even under a sanitizer */
    COMMAND_LENGTH = 8192,
    SANITIZER_STATUS = 99
};

/* SLOWER: how much longer is waited for something than in an optimized build. SHARE: of a long list
 * of schedules, one in SHARE is run. */
#if defined(__SANITIZE_THREAD__)
enum { SLOWER = 10, SHARE = 5, TSAN = 1 };
#elif defined(__SANITIZE_ADDRESS__)
enum { SLOWER = 10, SHARE = 2, TSAN = 0 };
#else
enum { SLOWER = 1, SHARE = 1, TSAN = 0 };
#endif

struct outcome {
    int status;      /* the exit status; 128 + N: ended by signal N */
    char *out, *err; /* with a zero byte behind them; `out` may hold others */
    size_t out_length;
    double seconds;
    long kibibytes; /* of memory, at most */
};

/* A child that runs while its output is read. */
struct live {
    struct check *check;
    pid_t pid;
    int input, output; /* the same for a terminal */
    char *text;        /* (length) all that it wrote */
    size_t length, seen;
};

static inline double child_clock(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

/* No time and no memory is a test under a sanitizer: there, only a hang is (CHILD_LIMIT). */
static inline bool soon(double seconds, double limit) {
    return SANITIZED || seconds < limit;
}

static inline bool small(const struct outcome *o, long mebibytes) {
    return SANITIZED || o->kibibytes < mebibytes * 1024;
}

static inline int child_status(int status) {
    return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

/* Becomes the program. Only in a child. */
static inline void child_exec(const char *arguments) {
    char command[COMMAND_LENGTH + 256];
    snprintf(command, sizeof command, "exec %s %s", DYNAMO_PROGRAM, arguments);
    setenv("ASAN_OPTIONS", "exitcode=99:allocator_may_return_null=1:atexit_sleep_ms=0", 1);
    setenv("UBSAN_OPTIONS", "exitcode=99:print_stacktrace=1", 1);
    setenv("TSAN_OPTIONS", "exitcode=99:allocator_may_return_null=1:atexit_sleep_ms=0", 1);
    alarm(CHILD_LIMIT);
    execl("/bin/sh", "sh", "-c", command, (char *)NULL);
    _exit(127);
}

/* All of a temporary file, which is closed. */
static inline char *child_output(FILE *file, size_t *length) {
    fseek(file, 0, SEEK_END);
    long end = ftell(file);
    rewind(file);
    char *text = malloc((size_t)end + 1);
    *length = fread(text, 1, (size_t)end, file);
    text[*length] = 0;
    fclose(file);
    return text;
}

/* Runs the program to its end. */
__attribute__((format(printf, 2, 3))) static inline struct outcome run(struct check *check,
                                                                       const char *format, ...) {
    char arguments[COMMAND_LENGTH];
    va_list values;
    va_start(values, format);
    int length = vsnprintf(arguments, sizeof arguments, format, values);
    va_end(values);
    CHECK(length < COMMAND_LENGTH, "a command of %d bytes", length);
    struct outcome outcome = {0};
    FILE *out = tmpfile(), *err = tmpfile();
    double start = child_clock();
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        dup2(open("/dev/null", O_RDONLY), STDIN_FILENO);
        dup2(fileno(out), STDOUT_FILENO);
        dup2(fileno(err), STDERR_FILENO);
        child_exec(arguments);
    }
    int status = -1;
    struct rusage usage = {0};
    wait4(child, &status, 0, &usage);
    size_t err_length;
    outcome.kibibytes = usage.ru_maxrss;
    outcome.status = child_status(status);
    outcome.seconds = child_clock() - start;
    outcome.out = child_output(out, &outcome.out_length);
    outcome.err = child_output(err, &err_length);
    const char *report = strstr(outcome.err, "Sanitizer");
    report = report ? report : strstr(outcome.err, "runtime error");
    CHECK(!report, "%.300s\n%s", arguments, outcome.err);
    return outcome;
}

static inline void outcome_free(struct outcome *outcome) {
    free(outcome->out);
    free(outcome->err);
}

/* Our end of a new pseudo terminal. */
static inline bool child_terminal(int *ours) {
    *ours = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
    return *ours >= 0 && grantpt(*ours) == 0 && unlockpt(*ours) == 0;
}

/* Starts the program with stdin, stdout and stderr at a terminal, or with stdout in a pipe. */
__attribute__((format(printf, 3, 4))) static inline struct live
live_start(struct check *check, bool terminal, const char *format, ...) {
    char arguments[COMMAND_LENGTH];
    va_list values;
    va_start(values, format);
    vsnprintf(arguments, sizeof arguments, format, values);
    va_end(values);
    struct live live = {.check = check, .pid = -1, .input = -1, .output = -1};
    int output[2] = {-1, -1};
    bool ok = terminal ? child_terminal(&live.input) : pipe2(output, O_CLOEXEC) == 0;
    CHECK(ok, "no pipe or pseudo terminal for: %s", arguments);
    fflush(stdout);
    live.pid = ok ? fork() : -1;
    if (live.pid == 0) {
        if (terminal) {
            setsid(); /* so that the terminal it opens next becomes its own: Ctrl-C goes there */
            int end = open(ptsname(live.input), O_RDWR);
            for (int i = 0; i < 3; i++)
                dup2(end, i);
        } else {
            dup2(open("/dev/null", O_RDONLY), STDIN_FILENO);
            dup2(output[1], STDOUT_FILENO);
            dup2(open("/dev/null", O_WRONLY), STDERR_FILENO);
        }
        child_exec(arguments);
    }
    if (!terminal)
        close(output[1]);
    live.output = terminal ? live.input : output[0];
    live.text = calloc(1, 1);
    return live;
}

/* Reads once, if something comes before the deadline. False: nothing came, or the end. */
static inline bool live_read(struct live *live, double deadline) {
    double left = deadline - child_clock();
    struct pollfd ready = {.fd = live->output, .events = POLLIN};
    char buffer[4096];
    if (left <= 0 || poll(&ready, 1, (int)(1e3 * left) + 1) <= 0)
        return false;
    ssize_t n = read(live->output, buffer, sizeof buffer);
    if (n <= 0)
        return false;
    live->text = realloc(live->text, live->length + (size_t)n + 1);
    memcpy(live->text + live->length, buffer, (size_t)n);
    live->length += (size_t)n;
    live->text[live->length] = 0;
    return true;
}

/* Reads until `words` have come behind what was seen before, and counts them as seen. */
static inline bool live_until(struct live *live, const char *words, double seconds) {
    double deadline = child_clock() + seconds * SLOWER;
    for (;;) {
        char *found =
            memmem(live->text + live->seen, live->length - live->seen, words, strlen(words));
        if (found) {
            live->seen = (size_t)(found - live->text) + strlen(words);
            return true;
        }
        if (!live_read(live, deadline))
            return false;
    }
}

/* Reads until there are so many bytes that were not seen. */
static inline bool live_bytes(struct live *live, size_t n, double seconds) {
    double deadline = child_clock() + seconds * SLOWER;
    while (live->length - live->seen < n)
        if (!live_read(live, deadline))
            return false;
    return true;
}

static inline void live_write(struct live *live, const char *text) {
    struct check *check = live->check;
    ssize_t length = (ssize_t)strlen(text);
    CHECK(write(live->input, text, (size_t)length) == length, "cannot write %s", text);
}

/* Reads to the end. Returns the status; -1: it did not end in time, and was killed. */
static inline int live_end(struct live *live, double seconds) {
    double deadline = child_clock() + seconds * SLOWER;
    while (live_read(live, deadline)) {
    }
    int status = 0;
    pid_t ended = 0;
    while ((ended = waitpid(live->pid, &status, WNOHANG)) == 0 && child_clock() < deadline)
        usleep(1000);
    if (ended == 0) {
        kill(live->pid, SIGKILL);
        waitpid(live->pid, NULL, 0);
    }
    return ended > 0 ? child_status(status) : -1;
}

static inline void live_close(struct live *live) {
    close(live->output);
    free(live->text);
}

#endif
