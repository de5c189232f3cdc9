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
 * `N passed, N failed`, counted in tests; its exit status is 1 if any failed. */
#ifndef CHECK_H
#define CHECK_H

#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
enum { SANITIZED = 1 }; /* everything takes ten times as long */
#else
enum { SANITIZED = 0 };
#endif

enum { CHECK_SHOWN = 10 }; /* failures of one test that are printed in full */

struct check {
    long checked, failed;
};

struct test {
    const char *name;
    void (*function)(struct check *check);
};

#define CHECK(condition, ...)                                                                      \
    do {                                                                                           \
        check->checked++;                                                                          \
        if (!(condition) && check->failed++ < CHECK_SHOWN) {                                       \
            printf("    %s:%d: %s: ", __FILE__, __LINE__, #condition);                             \
            printf(__VA_ARGS__);                                                                   \
            printf("\n");                                                                          \
        }                                                                                          \
    } while (0)

/* A test that checked nothing has failed: it cannot have shown anything. */
static inline int check_run(const struct test *tests, size_t n_tests, int argc, char **argv) {
    int passed = 0, failed = 0;
    for (size_t i = 0; i < n_tests; i++) {
        if (argc > 1 && !strstr(tests[i].name, argv[1]))
            continue;
        struct check check = {0, 0};
        tests[i].function(&check);
        bool ok = check.failed == 0 && check.checked > 0;
        passed += ok;
        failed += !ok;
        printf("  %s %s (%ld checks", ok ? "ok  " : "FAIL", tests[i].name, check.checked);
        printf(check.failed ? ", %ld failed)\n" : ")\n", check.failed);
        fflush(stdout);
    }
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}

#endif
