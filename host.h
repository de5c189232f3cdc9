/* host.h: how much memory this machine has left, which both backends ask before they take some.
 *
 *     if (bytes > host_free_memory())
 *         return NULL; // rather than be ended by the system once the memory is used
 *
 * Linux says it in /proc/meminfo, with what its file cache could give back; where there is no such
 * file, free pages alone count. Compiled as C and as C++. */
#ifndef HOST_H
#define HOST_H
#include <stdio.h>
#include <unistd.h>

static inline size_t host_free_memory(void) { /* bytes; 0: not known */
    FILE *file = fopen("/proc/meminfo", "r");
    char line[128];
    size_t kibibytes = 0;
    while (file && fgets(line, sizeof line, file) &&
           sscanf(line, "MemAvailable: %zu", &kibibytes) != 1) {
    }
    if (file)
        fclose(file);
    long pages = sysconf(_SC_AVPHYS_PAGES), page = sysconf(_SC_PAGESIZE);
    return kibibytes > 0 ? kibibytes * 1024 : pages > 0 ? (size_t)pages * (size_t)page : 0;
}
#endif /* HOST_H */
