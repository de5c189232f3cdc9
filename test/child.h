/* child.h: the program under test as a child process, and all that it wrote.
 *
 *     struct outcome o = run(check, "model.bin -p %s -n 5", "hello");
 *     CHECK(o.status == 0, "%s", o.err);
 *
 *     struct live live = live_start(check, true, "model.bin");   at a pseudo terminal
 *     live_until(&live, "> ");
 *     live_write(&live, "Once upon a time\n");
 *     live_until(&live, "\n> ");
 *     talk(&live, &(struct turn){"Once upon a time\n", "\n> "}, 1);   the same
 *     leave(&live, "/exit\n");
 *
 * The words after the program's name go through the shell, so `< file` and `>&-` work. A crash is
 * a status like others: 128 + the signal's number. So is a sanitizer's report: SANITIZER_STATUS, or
 * one failed check where it stands in stderr.
 *
 * How long something takes is counted in processor time, which a busy machine does not lengthen:
 * CHILD_LIMIT ends what computes without end. What is awaited from a live program is awaited until
 * it comes, or the program ends or has slept for SLEEP_LIMIT seconds; one that waits for its share
 * of a processor is not asleep. */
#ifndef CHILD_H
#define CHILD_H

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "check.h"

#ifndef DYNAMO_PROGRAM
#define DYNAMO_PROGRAM "./dynamo"
#endif

enum {
    COMMAND_LENGTH = 8192,
    LIVE_LENGTH = 1 << 20, /* bytes that a live program writes, at most */
    SANITIZER_STATUS = 99,
    SLEEP_LIMIT = 20, /* seconds without processor time: nothing will come */
    /* seconds of processor time, far more than one run takes */
    CHILD_LIMIT = SANITIZED ? 1000 : 120
};

/* SHARE: of a long list of schedules, one in SHARE is run. */
#if defined(__SANITIZE_THREAD__)
enum { SHARE = 5, TSAN = 1 };
#elif defined(__SANITIZE_ADDRESS__)
enum { SHARE = 4, TSAN = 0 };
#else
enum { SHARE = 1, TSAN = 0 };
#endif

#define COUNT(table) (sizeof(table) / sizeof *(table))

struct outcome {
    int status;      /* the exit status; 128 + N: ended by signal N */
    char *out, *err; /* with a zero byte behind them; `out` may hold others */
    size_t out_length;
    double seconds; /* of processor time */
    long kibibytes; /* of memory, at most */
};

/* A child that runs while its output is read. */
struct live {
    struct check *check;
    pid_t pid;
    int input, output; /* the same for a terminal */
    char *text;        /* (length) all that it wrote */
    size_t length, seen;
    bool asleep;    /* it was waited for in vain */
    double seconds; /* of processor time, when it has ended */
};

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

static inline double child_seconds(const struct rusage *usage) {
    return (double)(usage->ru_utime.tv_sec + usage->ru_stime.tv_sec) +
           1e-6 * (double)(usage->ru_utime.tv_usec + usage->ru_stime.tv_usec);
}

/* Becomes a shell's command. Only in a child. */
static inline void child_shell(const char *command) {
    setenv("ASAN_OPTIONS", "exitcode=99:allocator_may_return_null=1:atexit_sleep_ms=0", 1);
    setenv("UBSAN_OPTIONS", "exitcode=99:print_stacktrace=1", 1);
    setenv("TSAN_OPTIONS", "exitcode=99:allocator_may_return_null=1:atexit_sleep_ms=0", 1);
    check_limit(CHILD_LIMIT);
    execl("/bin/sh", "sh", "-c", command, (char *)NULL);
    _exit(127);
}

/* Becomes the program. Only in a child. */
static inline void child_exec(const char *arguments) {
    char command[COMMAND_LENGTH + 256];
    snprintf(command, sizeof command, "exec %s %s", DYNAMO_PROGRAM, arguments);
    child_shell(command);
}

/* Memory of zeros that stays to the program's end: nobody frees what a test reads. */
static inline void *keep(size_t size) {
    static void **all; /* a list, so that none is lost to a sanitizer */
    void **block = calloc(1, 2 * sizeof *block + size);
    block[0] = all;
    all = block;
    return block + 2;
}

/* All of a file with a zero byte behind it; the file is closed. */
static inline char *child_output(FILE *file, size_t *length) {
    fseek(file, 0, SEEK_END);
    long end = ftell(file);
    rewind(file);
    char *text = keep((size_t)end + 1);
    *length = fread(text, 1, (size_t)end, file);
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
    check_waits = arguments;
    wait4(child, &status, 0, &usage);
    check_waits = "";
    size_t err_length;
    outcome.kibibytes = usage.ru_maxrss;
    outcome.status = child_status(status);
    outcome.seconds = child_seconds(&usage);
    outcome.out = child_output(out, &outcome.out_length);
    outcome.err = child_output(err, &err_length);
    CHECK(outcome.status != 128 + SIGXCPU, "%.300s: more than %d s", arguments, CHILD_LIMIT);
    const char *report = strstr(outcome.err, "Sanitizer");
    report = report ? report : strstr(outcome.err, "runtime error");
    CHECK(!report, "%.300s\n%s", arguments, outcome.err);
    return outcome;
}

/* Our end of a new pseudo terminal. */
static inline bool child_terminal(int *ours) {
    *ours = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
    return *ours >= 0 && grantpt(*ours) == 0 && unlockpt(*ours) == 0;
}

/* Starts a shell's command, its standard streams at a terminal, or its stdout in a pipe. */
static inline struct live live_shell(struct check *check, bool terminal, const char *command) {
    struct live live = {.check = check, .pid = -1, .input = -1, .output = -1};
    int output[2] = {-1, -1};
    bool ok = terminal ? child_terminal(&live.input) : pipe2(output, O_CLOEXEC) == 0;
    CHECK(ok, "no pipe or pseudo terminal for: %s", command);
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
        child_shell(command);
    }
    if (!terminal)
        close(output[1]);
    live.output = terminal ? live.input : output[0];
    live.text = keep(LIVE_LENGTH);
    return live;
}

/* Starts the program so. */
static inline struct live live_start(struct check *check, bool terminal, const char *arguments) {
    char command[COMMAND_LENGTH + 256];
    snprintf(command, sizeof command, "exec %s %s", DYNAMO_PROGRAM, arguments);
    return live_shell(check, terminal, command);
}

/* Seconds of processor time that it has used; -1: it is gone. */
static inline double live_used(const struct live *live) {
    clockid_t clock;
    struct timespec used;
    if (clock_getcpuclockid(live->pid, &clock) != 0 || clock_gettime(clock, &used) != 0)
        return -1;
    return (double)used.tv_sec + 1e-9 * (double)used.tv_nsec;
}

/* Waits until it has used so much more processor time. False: it ended before. */
static inline bool live_works(const struct live *live, double seconds) {
    double end = live_used(live) + seconds;
    siginfo_t ended = {0};
    check_waits = "it to work";
    while (live_used(live) < end && ended.si_pid == 0) {
        usleep(1000);
        waitid(P_PID, (id_t)live->pid, &ended, WEXITED | WNOHANG | WNOWAIT);
    }
    return ended.si_pid == 0;
}

/* Waits until something can be read. False: it sleeps, and will not write any more. */
static inline bool live_ready(struct live *live) {
    struct pollfd ready = {.fd = live->output, .events = POLLIN};
    double last = -1;
    for (int seconds = live->asleep ? SLEEP_LIMIT - 1 : 0; seconds < SLEEP_LIMIT; seconds++) {
        if (poll(&ready, 1, 1000) > 0)
            return true;
        double used = live_used(live);
        seconds = used > last ? -1 : seconds;
        last = used;
    }
    live->asleep = true;
    return false;
}

/* Reads once. False: the end, or nothing comes. */
static inline bool live_read(struct live *live) {
    size_t room = LIVE_LENGTH - 1 - live->length;
    ssize_t n = live_ready(live) ? read(live->output, live->text + live->length, room) : 0;
    live->length += n > 0 ? (size_t)n : 0;
    return n > 0;
}

/* Reads until `words` have come behind what was seen before, and counts them as seen. */
static inline void live_until(struct live *live, const char *words) {
    struct check *check = live->check;
    char *found = NULL;
    check_waits = words;
    do
        found = memmem(live->text + live->seen, live->length - live->seen, words, strlen(words));
    while (!found && live_read(live));
    CHECK(found, "no `%s` comes: %s", words, live->text);
    if (found)
        live->seen = (size_t)(found - live->text) + strlen(words);
}

/* Reads until there are so many bytes that were not seen. */
static inline void live_bytes(struct live *live, size_t n) {
    struct check *check = live->check;
    check_waits = "text";
    while (live->length - live->seen < n && live_read(live)) {
    }
    CHECK(live->length - live->seen >= n, "no %zu bytes come: %s", n, live->text);
}

static inline void live_write(struct live *live, const char *text) {
    struct check *check = live->check;
    ssize_t length = (ssize_t)strlen(text);
    CHECK(write(live->input, text, (size_t)length) == length, "cannot write %s", text);
}

/* Reads to the end. Returns the status; -1: it did not end, and was killed. */
static inline int live_end(struct live *live) {
    int status = 0;
    struct rusage usage = {0};
    check_waits = "its end";
    while (live_read(live)) {
    }
    if (live->asleep)
        kill(live->pid, SIGKILL);
    wait4(live->pid, &status, 0, &usage);
    live->seconds = child_seconds(&usage);
    close(live->output);
    return live->asleep ? -1 : child_status(status);
}

/* Its terminal gets another size. */
static inline void live_resize(struct live *live, int rows, int columns) {
    struct winsize size = {.ws_row = (unsigned short)rows, .ws_col = (unsigned short)columns};
    struct check *check = live->check;
    CHECK(ioctl(live->input, TIOCSWINSZ, &size) == 0, "no size");
}

/* Writes the keys, if any, and reads until the words have come. */
struct turn {
    const char *keys, *words;
};

static inline void talk(struct live *live, const struct turn *turns, size_t n) {
    for (size_t i = 0; i < n; i++) {
        if (turns[i].keys)
            live_write(live, turns[i].keys);
        live_until(live, turns[i].words);
    }
}

/* It must end well with the last keys. */
static inline void leave(struct live *live, const char *keys) {
    struct check *check = live->check;
    live_write(live, keys);
    CHECK(live_end(live) == 0, "it did not end well: %s", live->text);
}

#endif
