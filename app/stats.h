/* stats.h: what --stats tells when all is done: what was counted, and how fast steps were beside
 * what the machine can do, which is measured for it.
 *
 *     stats_print(&answers);   // no step is running; takes 0.1 s
 *     stats_summary(&answers); // a line, without
 *
 * Steps of workers that share a machine are each held against the whole of it. Read next:
 * count_pace in dynamo.c, which says what a step reads and computes, and the backends' `limits`. */
#ifndef STATS_H
#define STATS_H

#include "answers.h"

/* The table of --stats on stderr, or with --json the last object on stdout. */
void stats_print(const struct answers *answers);
/* One line on stderr: what pools and pager did. */
void stats_summary(const struct answers *answers);

#endif /* STATS_H */

#ifdef STATS_IMPLEMENTATION
#undef STATS_IMPLEMENTATION

#include <inttypes.h>
#include <unistd.h>

static int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* The value that a share of all requests stays within, in ms (nearest rank): 0.5, the median; 1,
 * the longest. Requests that did not come so far count for nothing. */
static double stats_within(const struct answers *a, enum answer_time time, double share) {
    int n = a->n_times[time], rank = (int)ceil(share * n);
    if (n == 0)
        return 0;
    qsort(a->times[time], (size_t)n, sizeof *a->times[time], compare_doubles);
    return 1e3 * a->times[time][rank > 0 ? rank - 1 : 0];
}

static double stats_mean(const struct answers *a, enum answer_time time) {
    double sum = 0;
    for (int i = 0; i < a->n_times[time]; i++)
        sum += a->times[time][i];
    return answers_ratio(1e3 * sum, a->n_times[time]);
}

static void stats_json(const struct answers *a, const struct engine_stats *now,
                       const struct figure *figures, size_t n) {
    const struct engine_config *config = engine_config_of(a->engine);
    printf("{\"stats\":{\"backend\":\"%s\"", config->backend->name);
    for (size_t i = 0; i < n; i++)
        printf(",\"%s\":%.15g", figures[i].key, answers_short(figures[i].value));
    for (int i = 0; i < N_TIMES; i++)
        for (int percent = 50; percent < 100; percent += 49)
            printf(",\"%s_p%d_ms\":%.15g", answers_times[i][0], percent,
                   answers_short(stats_within(a, (enum answer_time)i, 0.01 * percent)));
    (void)fputs(",\"places\":[", stdout); /* the workers, and last the host */
    for (int i = 0; i <= config->n_workers; i++) {
        struct kv_usage u = now->places[i];
        int all = i < config->n_workers ? config->workers[i].blocks : config->host_blocks;
        printf("%s{\"devices\":%d,\"blocks\":%d,\"free\":%d,\"pinned\":%d,\"cached\":%d,"
               "\"in_flight\":%d}",
               i > 0 ? "," : "", i < config->n_workers ? config->workers[i].n_shards : 0, all,
               u.free, u.pinned, u.cached, u.in_flight);
    }
    (void)fputs("]}}\n", stdout);
}

static void stats_table(const struct answers *a, const struct engine_stats *now,
                        const struct figure *figures, size_t n) {
    const struct engine_config *config = engine_config_of(a->engine);
    bool colour = text_colours(STDERR_FILENO);
    const char *label = colour ? "  \033[2m%-34s\033[0m  " : "  %-34s  ";
    char words[64];
    (void)fputs(colour ? "\033[1mstats\033[0m\n" : "stats\n", stderr);
    (void)fprintf(stderr, label, "backend");
    (void)fprintf(stderr, "%s\n", config->backend->name);
    (void)fprintf(stderr, label, "seed");
    (void)fprintf(stderr, "%" PRIu64 "\n", a->seed);
    for (int i = 0; i < N_TIMES; i++) {
        (void)snprintf(words, sizeof words, "%s: median, 99 %%", answers_times[i][1]);
        (void)fprintf(stderr, label, words);
        (void)fprintf(stderr, "%.2f, %.2f ms\n", stats_within(a, (enum answer_time)i, 0.5),
                      stats_within(a, (enum answer_time)i, 0.99));
    }
    for (size_t i = 0; i < n; i++) {
        (void)fprintf(stderr, label, figures[i].label);
        (void)fprintf(stderr, "%.*f\n", figures[i].decimals, figures[i].value);
    }
    for (int i = 0; i <= config->n_workers; i++) {
        struct kv_usage u = now->places[i];
        (void)snprintf(words, sizeof words, "blocks of worker %d", i);
        (void)fprintf(stderr, label, i < config->n_workers ? words : "blocks of the host");
        (void)fprintf(stderr, "%d free, %d pinned, %d cached, %d in flight\n", u.free, u.pinned,
                      u.cached, u.in_flight);
    }
}

void stats_print(const struct answers *a) {
    const struct engine_config *config = engine_config_of(a->engine);
    struct engine_stats now = engine_stats(a->engine);
    struct sched_stats s = now.sched;
    struct kv_stats k = now.kv;
    struct pace decode = now.decode, prefill = now.prefill;
    double read, ops;
    int least = INT_MAX, used = 0;
    for (int i = 0; i < config->n_workers; i++) {
        least = config->workers[i].blocks < least ? config->workers[i].blocks : least;
        used += config->workers[i].blocks - now.places[i].free;
    }
    int host_used = config->host_blocks - now.places[config->n_workers].free;
    engine_limits(a->engine, &read, &ops);
    double reading = answers_ratio(decode.bytes, decode.seconds);
    double multiplying = answers_ratio(prefill.operations, prefill.seconds);
    const struct figure all[] = {
        {"requests", "requests", (double)s.submitted, 0},
        {"ttft_ms", "time to first token, mean (ms)", stats_mean(a, TIME_TTFT), 2},
        {"ttft_max_ms", "time to first token, longest (ms)", stats_within(a, TIME_TTFT, 1), 2},
        {"itl_ms", "inter-token latency (ms)",
         answers_ratio(1e3 * a->interval_sum, (double)a->n_intervals), 2},
        {"tokens_per_second", "generated tokens/s",
         answers_ratio((double)a->n_tokens, a->busy_seconds), 2},
        {"prefill_tokens", "prompt tokens computed", (double)s.prefill_tokens, 0},
        {"decode_tokens", "tokens decoded", (double)s.decode_tokens, 0},
        {"steps", "steps", (double)s.steps, 0},
        {"prefix_hit_tokens", "prompt tokens found cached", (double)s.prefix_hit_tokens, 0},
        {"host_hit_tokens", "of them on the host alone", (double)a->n_host_hits, 0},
        {"recomputed_tokens", "tokens computed again", (double)s.recomputed_tokens, 0},
        {"hand_overs", "requests handed over", (double)s.hand_overs, 0},
        {"local_prefills", "prompts prefilled by decoders", (double)s.local_prefills, 0},
        {"blocks_transferred", "blocks moved between workers", (double)k.transfers, 0},
        {"preemptions", "preemptions", (double)s.preemptions, 0},
        {"pages_out", "blocks paged out", (double)k.pages_out, 0},
        {"pages_in", "blocks paged in", (double)k.pages_in, 0},
        {"evictions", "device copies evicted", (double)k.evictions, 0},
        {"host_evictions", "host copies evicted", (double)k.host_evictions, 0},
        {"blocks_lost", "blocks dropped for good", (double)k.lost, 0},
        {"copies_unused", "copies to workers never used", (double)k.unused, 0},
        {"device_blocks", "blocks a worker holds at least", (double)least, 0},
        {"device_blocks_used", "blocks in use or cached on workers", (double)used, 0},
        {"host_blocks", "blocks the host holds", (double)config->host_blocks, 0},
        {"host_blocks_used", "blocks cached on the host", (double)host_used, 0},
        {"decode_tokens_per_second", "decode steps: tokens/s",
         answers_ratio((double)decode.tokens, decode.seconds), 2},
        {"decode_gb_per_second", "decode steps: GB/s read", reading * 1e-9, 2},
        {"read_gb_per_second", "the devices read at most (GB/s)", read * 1e-9, 2},
        {"decode_share", "decode steps: share of that", answers_ratio(reading, read), 2},
        {"prefill_tokens_per_second", "prefill steps: tokens/s",
         answers_ratio((double)prefill.tokens, prefill.seconds), 2},
        {"prefill_gflops", "prefill steps: GFLOP/s", multiplying * 1e-9, 2},
        {"peak_gflops", "the devices multiply at most", ops * 1e-9, 2},
        {"prefill_share", "prefill steps: share of that", answers_ratio(multiplying, ops), 2},
        {"kernel_launches", "kernel launches", (double)config->backend->kernel_launches, 0}};
    (a->json ? stats_json : stats_table)(a, &now, all, sizeof all / sizeof *all);
}

void stats_summary(const struct answers *a) {
    const struct engine_config *config = engine_config_of(a->engine);
    struct engine_stats now = engine_stats(a->engine);
    struct sched_stats s = now.sched;
    struct kv_stats k = now.kv;
    wrap_print(
        stderr,
        "[%d worker%s: %" PRId64 " prompt tokens prefilled, %" PRId64 " found cached, %" PRId64
        " blocks handed over | %" PRId64 " tokens generated, %.0f tokens/s | %" PRId64
        " blocks paged out, %" PRId64 " in, %" PRId64 " preemptions]\n",
        config->n_workers, config->n_workers == 1 ? "" : "s", s.prefill_tokens, s.prefix_hit_tokens,
        k.transfers, a->n_tokens, answers_ratio((double)a->n_tokens, a->busy_seconds), k.pages_out,
        k.pages_in, s.preemptions);
}

#endif /* STATS_IMPLEMENTATION */
