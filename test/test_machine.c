/* test_machine.c: limits of control groups, of both versions, in folders that look like /proc and
 * /sys/fs/cgroup; those of this process that it can set itself. */
#define MACHINE_IMPLEMENTATION
#include "../lib/machine.h"
#include "check.h"
#include <sys/stat.h>

static char root[] = "/tmp/test_machine_XXXXXX";

/* A file below the root, with all folders on its way. */
static void put(const char *name, const char *text) {
    char path[PATH_MAX];
    int length = snprintf(path, sizeof path, "%s/%s", root, name);
    for (char *at = path + 1; (at = strchr(at, '/')) != NULL; at++) {
        *at = 0;
        (void)mkdir(path, 0700);
        *at = '/';
    }
    FILE *file = length < (int)sizeof path ? fopen(path, "w") : NULL;
    if (!file || fputs(text, file) < 0 || fclose(file) != 0)
        perror(path);
}

static void clear(void) {
    char command[64];
    (void)snprintf(command, sizeof command, "rm -rf %s/*", root);
    if (system(command) != 0)
        perror(root);
    put("proc/meminfo",
        "MemTotal:       16000000 kB\nMemFree:  1 kB\nMemAvailable:   8000000 kB\n");
}

static void memory_of_the_machine(struct check *check) {
    clear();
    CHECK(machine_free_memory(root) == 8000000ull * 1024, "%zu", machine_free_memory(root));
    put("proc/self/cgroup", "0::/\n");
    CHECK(machine_free_memory(root) == 8000000ull * 1024, "a group without files");
    put("sys/fs/cgroup/memory.max", "max\n");
    put("sys/fs/cgroup/memory.current", "1000\n");
    CHECK(machine_free_memory(root) == 8000000ull * 1024, "a group without a limit");
}

static void memory_of_a_group(struct check *check) {
    clear(); /* the one above has less left; what its file cache holds counts as left */
    put("proc/self/cgroup", "0::/a/b\n");
    put("sys/fs/cgroup/a/b/memory.max", "900000000\n");
    put("sys/fs/cgroup/a/b/memory.current", "100\n");
    put("sys/fs/cgroup/a/memory.max", "400000000\n");
    put("sys/fs/cgroup/a/memory.current", "150000000\n");
    put("sys/fs/cgroup/a/memory.stat", "anon 5\ninactive_file 50000000\nactive_file 7\n");
    CHECK(machine_free_memory(root) == 300000000, "%zu", machine_free_memory(root));
    put("sys/fs/cgroup/a/memory.current", "600000000\n");
    CHECK(machine_free_memory(root) == 1, "more than all is used: %zu", machine_free_memory(root));
}

static void memory_that_slows_down(struct check *check) {
    clear();
    put("proc/self/cgroup", "0::/a/b\n");
    put("sys/fs/cgroup/a/b/memory.max", "max\n");
    put("sys/fs/cgroup/a/b/memory.high", "300000000\n");
    put("sys/fs/cgroup/a/b/memory.current", "100000000\n");
    CHECK(machine_free_memory(root) == 200000000, "high: %zu", machine_free_memory(root));
    put("sys/fs/cgroup/a/memory.max", "400000000\n"); /* what is used is not told */
    put("sys/fs/cgroup/a/b/memory.high", "max\n");
    CHECK(machine_free_memory(root) == 400000000, "max: %zu", machine_free_memory(root));
    put("sys/fs/cgroup/a/memory.max", "0\n");
    CHECK(machine_free_memory(root) == 1, "nothing: %zu", machine_free_memory(root));
    put("sys/fs/cgroup/a/memory.max", "");
    CHECK(machine_free_memory(root) == 8000000ull * 1024, "an empty file");
}

/* The path is the host's, and a group of the container's own is its end. */
static void groups_in_a_container(struct check *check) {
    static const char *const paths[] = {"0::/docker/0123/sub/own\n", "0::/sub/own\n",
                                        "0::/../../sub/own\n"};
    for (size_t i = 0; i < sizeof paths / sizeof *paths; i++) {
        clear();
        put("proc/self/cgroup", paths[i]);
        put("sys/fs/cgroup/sub/own/memory.max", "900000000\n");
        put("sys/fs/cgroup/sub/memory.max", "500000000\n");
        put("sys/fs/cgroup/sub/memory.current", "1000\n");
        put("sys/fs/cgroup/sub/own/cpu.max", "10000 100000\n");
        put("sys/fs/cgroup/own/memory.max", "7000\n"); /* of others */
        CHECK(machine_free_memory(root) == 499999000, "%zu", machine_free_memory(root));
        CHECK(machine_processors(root) == 1, "%d", machine_processors(root));
        put("sys/fs/cgroup/memory.max", "300000000\n");
        CHECK(machine_free_memory(root) == 300000000, "%zu", machine_free_memory(root));
    }
    clear();
    put("proc/self/cgroup", "5:memory:/docker/0123/own\n0::/docker/0123/own\n");
    put("sys/fs/cgroup/memory/own/memory.limit_in_bytes", "600000000\n");
    put("sys/fs/cgroup/memory/memory.limit_in_bytes", "700000000\n");
    CHECK(machine_free_memory(root) == 600000000, "version 1: %zu", machine_free_memory(root));
}

static void memory_of_a_group_of_version_1(struct check *check) {
    clear(); /* in a container: the path is the host's, and what is mounted is its end */
    put("proc/self/cgroup", "12:cpuset:/x\n9:cpu,cpuacct:/x\n5:memory:/docker/0123\n0::/\n");
    put("sys/fs/cgroup/memory/memory.limit_in_bytes", "500000000\n");
    put("sys/fs/cgroup/memory/memory.usage_in_bytes", "200000000\n");
    put("sys/fs/cgroup/memory/memory.stat", "inactive_file 7\ntotal_inactive_file 1000000\n");
    CHECK(machine_free_memory(root) == 301000000, "%zu", machine_free_memory(root));
    put("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
    CHECK(machine_free_memory(root) == 8000000ull * 1024, "%zu", machine_free_memory(root));
}

static void memory_of_the_address_space(struct check *check) {
    struct rlimit before, limit;
    CHECK(getrlimit(RLIMIT_AS, &before) == 0, "the limit");
    limit = before;
    limit.rlim_cur = 1 << 30;
    clear();
    CHECK(setrlimit(RLIMIT_AS, &limit) == 0, "a limit");
    size_t left = machine_free_memory(root);
    CHECK(setrlimit(RLIMIT_AS, &before) == 0, "no limit");
    CHECK(left > 1 << 28 && left < 1 << 30, "%zu", left);
}

static void processors_of_a_quota(struct check *check) {
    clear();
    cpu_set_t all, one;
    CHECK(sched_getaffinity(0, sizeof all, &all) == 0, "the mask");
    CHECK(machine_processors(root) == CPU_COUNT(&all), "%d", machine_processors(root));
    put("proc/self/cgroup", "0::/a\n");
    static const struct {
        const char *quota;
        int most;
    } rows[] = {{"50000 100000\n", 1},
                {"100000 100000\n", 1},
                {"150000 100000\n", 2},
                {"max 100000\n", 1024}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        put("sys/fs/cgroup/a/cpu.max", rows[i].quota);
        int expected = CPU_COUNT(&all) < rows[i].most ? CPU_COUNT(&all) : rows[i].most;
        CHECK(machine_processors(root) == expected, "%s: %d", rows[i].quota,
              machine_processors(root));
    }
    put("proc/self/cgroup", "9:cpu,cpuacct:/x\n0::/\n");
    put("sys/fs/cgroup/cpu/x/cpu.cfs_quota_us", "100000\n");
    put("sys/fs/cgroup/cpu/x/cpu.cfs_period_us", "100000\n");
    CHECK(machine_processors(root) == 1, "version 1: %d", machine_processors(root));
    put("sys/fs/cgroup/cpu/x/cpu.cfs_quota_us", "-1\n");
    CHECK(machine_processors(root) == CPU_COUNT(&all), "none: %d", machine_processors(root));
    for (size_t i = CPU_SETSIZE; i-- > 0;)
        if (CPU_ISSET(i, &all)) {
            CPU_ZERO(&one);
            CPU_SET(i, &one);
        }
    CHECK(sched_setaffinity(0, sizeof one, &one) == 0, "one of them");
    CHECK(machine_processors(root) == 1, "of the mask: %d", machine_processors(root));
    CHECK(sched_setaffinity(0, sizeof all, &all) == 0, "all of them");
}

int main(int argc, char **argv) {
    static const struct test tests[] = {
        {"memory_of_the_machine", memory_of_the_machine},
        {"memory_of_a_group", memory_of_a_group},
        {"memory_that_slows_down", memory_that_slows_down},
        {"groups_in_a_container", groups_in_a_container},
        {"memory_of_a_group_of_version_1", memory_of_a_group_of_version_1},
        {"processors_of_a_quota", processors_of_a_quota},
        {"memory_of_the_address_space", memory_of_the_address_space}, /* of which a sanitizer takes
                                                                        * terabytes */
    };
    if (!mkdtemp(root)) {
        perror(root);
        return 1;
    }
    int status = check_run(tests, sizeof tests / sizeof *tests - SANITIZED, argc, argv);
    char command[64];
    (void)snprintf(command, sizeof command, "rm -rf %s", root);
    return system(command) == 0 ? status : 1;
}
