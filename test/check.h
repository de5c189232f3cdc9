/* check.h: the whole test framework. A test program is a table of {name, function}; CHECK counts
 * and goes on, so that one run shows every failure.
 *
 *     static void adds(struct check *check) {
 *         CHECK(1 + 1 == 2, "got %d", 1 + 1);
 *     }
 *     int main(int argc, char **argv) {
 *         static const struct test tests[] = {{"adds", adds}};
 *         return check_run(tests, sizeof tests / sizeof *tests, argc, argv);
 *     }
 *
 * A program runs all its tests, or those whose names contain its argument. Its last line is
 * `N passed, N failed`, counted in tests; its exit status is 1 if any failed.
 *
 * No test has a limit of wall-clock time: on a busy machine it would fail for that. A test limits
 * processor time (check_limit) or counts; what hangs without using any is found by one watchdog,
 * a thread, which ends a program in which not one CHECK was reached in twenty minutes. Until then
 * it says every half minute where a test that takes so long has come to. */
#ifndef CHECK_H
#define CHECK_H

#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
enum { SANITIZED = 1 }; /* everything takes ten times as long */
#else
enum { SANITIZED = 0 };
#endif

enum {
    CHECK_SHOWN = 10,        /* failures of one test that are printed in full */
    CHECK_TICK = 30,         /* seconds between the lines that tell of a long test */
    CHECK_PATIENCE = 20 * 60 /* seconds without a CHECK: the program hangs */
};

struct check {
    long checked, failed;
};

struct test {
    const char *name;
    void (*function)(struct check *check);
};

/* What a test waits for, for the watchdog's last words: "" or a text that stays. */
static const char *check_waits = "";

/* (the watchdog reads the count while it grows) */
#define CHECK(condition, ...)                                                                      \
    do {                                                                                           \
        __atomic_store_n(&check->checked, check->checked + 1, __ATOMIC_RELAXED);                   \
        if (!(condition) && check->failed++ < CHECK_SHOWN) {                                       \
            printf("    %s:%d: %s: ", __FILE__, __LINE__, #condition);                             \
            printf(__VA_ARGS__);                                                                   \
            printf("\n");                                                                          \
            fflush(stdout);                                                                        \
        }                                                                                          \
    } while (0)

/* For a child of the test: it ends with its parent, and by SIGXCPU after so much processor time. */
static inline void check_limit(int seconds) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    struct rlimit limit;
    limit.rlim_cur = limit.rlim_max = (rlim_t)seconds;
    limit.rlim_max += 5; /* then by SIGKILL */
    setrlimit(RLIMIT_CPU, &limit);
}

struct check_watch { /* the test that runs now */
    const char *name;
    struct check check;
};

static inline void *check_watchdog(void *argument) {
    struct check_watch *watch = (struct check_watch *)argument;
    const char *name = NULL;
    long checked = 0;
    for (int quiet = 0; quiet < CHECK_PATIENCE; quiet += CHECK_TICK) {
        sleep(CHECK_TICK);
        const char *name_now = __atomic_load_n(&watch->name, __ATOMIC_RELAXED);
        long checked_now = __atomic_load_n(&watch->check.checked, __ATOMIC_RELAXED);
        if (name_now == name)
            printf("  ...  %s goes on (%ld checks)\n", name, checked_now);
        if (name_now != name || checked_now != checked)
            quiet = -CHECK_TICK;
        fflush(stdout);
        name = name_now;
        checked = checked_now;
    }
    printf("  FAIL %s: timed out: no check in %d minutes; it waits for: %s\n", name,
           CHECK_PATIENCE / 60, check_waits);
    fflush(stdout);
    _exit(1);
}

/* A test that checked nothing has failed: it cannot have shown anything. */
static inline int check_run(const struct test *tests, size_t n_tests, int argc, char **argv) {
    static struct check_watch watch;
    pthread_t watchdog;
    int passed = 0, failed = 0;
    static const int signals[] = {SIGINT, SIGQUIT, SIGHUP};
    for (int i = 0; i < 3; i++) /* nohup, or a shell's background job, ignores them, and so … */
        (void)signal(signals[i], SIG_DFL); /* … would every program that a test runs */
    for (size_t i = 0; i < n_tests; i++) {
        if (argc > 1 && !strstr(tests[i].name, argv[1]))
            continue;
        __atomic_store_n(&watch.check.checked, 0, __ATOMIC_RELAXED);
        watch.check.failed = 0;
        __atomic_store_n(&watch.name, tests[i].name, __ATOMIC_RELAXED);
        if (passed + failed == 0 && pthread_create(&watchdog, NULL, check_watchdog, &watch) == 0)
            pthread_detach(watchdog);
        tests[i].function(&watch.check);
        const struct check *check = &watch.check;
        bool ok = check->failed == 0 && check->checked > 0;
        passed += ok;
        failed += !ok;
        printf("  %s %s (%ld checks", ok ? "ok  " : "FAIL", tests[i].name, check->checked);
        printf(check->failed ? ", %ld failed)\n" : ")\n", check->failed);
        fflush(stdout);
    }
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0 || passed == 0; /* no test has that name */
}

#endif
