/* machine.h: what this process may use of the machine: memory, and processors.
 *
 *     size_t bytes = machine_free_memory("");  // "": of this machine; tests have a folder
 *     int threads = machine_processors("");
 *
 * A container is a control group with limits. What a group may use is the least of what it and all
 * groups above it have left (cgroups(7); of version 2 memory.max, memory.high, which slows down who
 * has more, and cpu.max; of version 1 memory.limit_in_bytes and cpu.cfs_quota_us). Within a
 * container the path that the kernel tells may be that of the host, of which only the end is there.
 *
 * Refuses to fail: what cannot be read limits nothing. */
#ifndef MACHINE_H
#define MACHINE_H

#if defined MACHINE_IMPLEMENTATION && !defined _GNU_SOURCE
#define _GNU_SOURCE /* sched_getaffinity; too late behind a header of the system */
#endif
#include <stddef.h>

/* Bytes that could be had now: of the machine, of each group, of the address space (ulimit -v);
 * what its file cache could give back included. 0: not known. */
size_t machine_free_memory(const char *root);
/* Threads that may run at once: those of the affinity mask (taskset, cpusets), or what a quota of
 * processor time comes to, rounded up. At least 1. */
int machine_processors(const char *root);

#endif /* MACHINE_H */

#ifdef MACHINE_IMPLEMENTATION
#undef MACHINE_IMPLEMENTATION

#include <limits.h>
#include <math.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

/* The number behind `key` in a file of a folder; "": the first. INFINITY: "max"; < 0: there is
 * none. `next`, if not NULL: the number after it. */
static double machine_number(const char *folder, const char *name, const char *key, double *next) {
    char path[PATH_MAX], line[256], *end;
    double value = -1;
    (void)snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "r");
    while (file && value < 0 && fgets(line, sizeof line, file))
        if (strncmp(line, key, strlen(key)) == 0) {
            char *at = line + strlen(key);
            bool most = strncmp(at, "max", 3) == 0;
            value = most ? INFINITY : strtod(at, &end);
            if (next)
                *next = strtod(most ? at + 3 : end, NULL);
        }
    if (file)
        fclose(file);
    return value;
}

/* What a group has left of something; INFINITY: it has no limit. */
typedef double machine_left(const char *folder, bool second);

static double machine_memory_left(const char *folder, bool second) {
    double most = machine_number(folder, second ? "memory.max" : "memory.limit_in_bytes", "", NULL);
    double high = second ? machine_number(folder, "memory.high", "", NULL) : -1;
    double used =
        machine_number(folder, second ? "memory.current" : "memory.usage_in_bytes", "", NULL);
    double cache = machine_number(folder, "memory.stat",
                                  second ? "inactive_file " : "total_inactive_file ", NULL);
    most = most < 0 ? high : high < 0 ? most : fmin(most, high);
    return most < 0 ? INFINITY : fmax(most - fmax(used, 0) + fmax(cache, 0), 1);
}

static double machine_quota_left(const char *folder, bool second) {
    double period = 0, quota = machine_number(folder, "cpu.max", "", &period);
    if (!second) {
        quota = machine_number(folder, "cpu.cfs_quota_us", "", NULL);
        period = machine_number(folder, "cpu.cfs_period_us", "", NULL);
    }
    return quota > 0 && period > 0 ? quota / period : INFINITY;
}

/* The least that a group of this process and those above it have left. */
static double machine_least(const char *root, const char *controller, machine_left *left) {
    char path[PATH_MAX], line[PATH_MAX], folder[PATH_MAX];
    double least = INFINITY;
    (void)snprintf(path, sizeof path, "%s/proc/self/cgroup", root);
    FILE *file = fopen(path, "r");
    while (file && fgets(line, sizeof line, file)) { /* number:controllers:/group */
        char *group = line, *number = strsep(&group, ":"), *names = strsep(&group, ":");
        bool second = number && names && !*names, own = second;
        for (char *name; !own && names && (name = strsep(&names, ",")) != NULL;)
            own = strcmp(name, controller) == 0;
        if (!own || !group)
            continue;
        group[strcspn(group, "\n")] = 0;
        int base = snprintf(folder, sizeof folder, "%s/sys/fs/cgroup%s%s", root, second ? "" : "/",
                            second ? "" : controller);
        if (base + (int)strlen(group) >= (int)sizeof folder)
            continue;
        for (; *group; group += 1 + strcspn(group + 1, "/")) {
            (void)strcpy(folder + base, group);
            if (access(folder, F_OK) == 0)
                break; /* else it begins outside of the container */
        }
        for (char *end = stpcpy(folder + base, group); end >= folder + base; end--)
            if (!*end || *end == '/') { /* the group, those above it, and the mount itself */
                *end = 0;
                least = fmin(least, left(folder, second));
            }
    }
    if (file)
        fclose(file);
    return least;
}

size_t machine_free_memory(const char *root) {
    char folder[PATH_MAX];
    struct rlimit limit;
    (void)snprintf(folder, sizeof folder, "%s/proc", root);
    double bytes = 1024 * machine_number(folder, "meminfo", "MemAvailable:", NULL);
    bytes = fmax(0, fmin(bytes, machine_least(root, "memory", machine_memory_left)));
    if (getrlimit(RLIMIT_AS, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY) {
        double used =
            machine_number("/proc/self", "statm", "", NULL) * (double)sysconf(_SC_PAGESIZE);
        bytes = fmin(bytes, fmax((double)limit.rlim_cur - used, 1));
    }
    return (size_t)bytes;
}

int machine_processors(const char *root) {
    cpu_set_t set;
    long n = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set)
                                                         : sysconf(_SC_NPROCESSORS_ONLN);
    double most = ceil(machine_least(root, "cpu", machine_quota_left));
    return n < 1 ? 1 : most < (double)n ? (int)most : (int)n;
}

#endif /* MACHINE_IMPLEMENTATION */
