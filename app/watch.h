/* watch.h: what an engine does at this moment: a picture in the terminal, and JSON for a page.
 *
 *     struct watch *watch = watch_open(trace_ledger(trace)); // who is told all the same
 *     config.ledger = watch_ledger(watch);
 *     ...                                     // answers with an engine of that configuration
 *     watch_begin(watch, &answers);
 *     if (watch_start(watch))                 // draws on stderr, in a thread of its own, until
 *         watch_stop(watch);
 *     watch_json(stdout, watch);              // at any time
 *     watch_close(watch);                     // after the engine
 *
 * Counts what the ledger tells; the rest is read under the engine's lock, for microseconds. Rates
 * and times are of the last five seconds, or of the last WATCH_MARKS tokens and prompts' chunks.
 *
 * The picture has the lowest lines of the terminal: the others scroll above it (the "scroll
 * region"), where text goes that is written to the same terminal. A frame is one write, so it does
 * not mix with that. It is erased at the end. Where there is no terminal, or a dumb or a small one,
 * there is a line a second instead. Read next: enum event_kind in dynamo.h. */
#ifndef WATCH_H
#define WATCH_H

#include "answers.h"

struct watch;
struct watch *watch_open(struct ledger next); /* NULL: out of memory */
struct ledger watch_ledger(struct watch *watch);
void watch_begin(struct watch *watch, const struct answers *answers); /* before the first event */
bool watch_start(struct watch *watch); /* false: it cannot start a thread */
void watch_stop(struct watch *watch);  /* NULL, or not started: nothing is done */
/* Erases the picture, from any thread: the program ends or is stopped. True: nothing is drawn any
 * more until watch_resume; false: the terminal takes nothing. NULL: nothing is done. */
bool watch_restore(struct watch *watch);
void watch_resume(struct watch *watch);
void watch_json(FILE *out, struct watch *watch);  /* an object; takes the engine's lock */
void watch_close(struct watch *watch);            /* NULL: nothing is done */
extern const char watch_page[], watch_page_end[]; /* page.html, which shows it in a browser */

#endif /* WATCH_H */

#ifdef WATCH_IMPLEMENTATION
#undef WATCH_IMPLEMENTATION

#include "../lib/json.h"
#include "stats.h"
#include <inttypes.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <unistd.h>

enum {
    WATCH_MS = 250,           /* between two frames */
    WATCH_MARKS = 4096,       /* 64 KB are copied under the lock */
    WATCH_RESTORE_TRIES = 50, /* of 10 ms: a terminal that takes nothing is left as it is */
    WATCH_LEAST_ROWS = 14,    /* of a terminal: a picture, and some lines of text */
    WATCH_LEAST_COLUMNS = 40,
    WATCH_TEXT_ROWS = 5,  /* left for text */
    WATCH_OTHER_ROWS = 7, /* of the picture: all but the workers */
    WATCH_LABEL = 11,     /* columns: a name; */
    WATCH_NAMES = 28,     /* all before the bar; */
    WATCH_NUMBER = 8,     /* of each number behind it */
    WATCH_LEAST_BAR = 8,
    WATCH_MOST_BAR = 120
};
static const double WATCH_SECONDS = 5;

enum watch_kind { MARK_TTFT, MARK_ITL, MARK_PROMPT };
enum watch_way { WAY_OUT, WAY_IN, WAY_PEER, N_WAYS };
static const char *const watch_ways[N_WAYS] = {"out", "in", "peer"};

struct watch_mark { /* a generated token and how long it took, ms; or a number of prompt tokens */
    double at;
    float value;
    enum watch_kind kind;
};

struct watch_copies {
    int64_t under_way, done;
};

struct watch_now {      /* all that is shown */
    double at, seconds; /* since the beginning */
    struct sched_load load;
    struct sched_stats sched;
    struct kv_usage places[MAX_WORKERS + 1];
    struct watch_copies copies[MAX_WORKERS][N_WAYS]; /* of each worker; the last: into it */
    double rates[2];                                 /* prompt, generated: tokens a second */
    double times[2][2]; /* MARK_TTFT, MARK_ITL: median, 90 %, in ms; NAN: there was none */
};

struct watch {
    struct ledger next;
    const struct answers *answers;
    const struct engine_config *config;
    double begun;
    struct watch_mark marks[WATCH_MARKS]; /* a ring; with what follows, under the engine's lock */
    int64_t n_marks;
    struct watch_copies copies[MAX_WORKERS][N_WAYS];

    pthread_t thread;
    pthread_mutex_t drawing;    /* held while something is drawn; guards: */
    bool started, ansi, colour; /* ansi: the terminal knows escape sequences */
    struct winsize size;        /* that the picture was made for */
    int height;                 /* lines of the picture; 0: there is none */
    double told;                /* when there was a line */
    int stop;                   /* an eventfd: written to when the thread is to end */
};

/* ---- counting ---- */

static void watch_mark(struct watch *w, double at, enum watch_kind kind, double value) {
    w->marks[w->n_marks++ % WATCH_MARKS] = (struct watch_mark){at, (float)value, kind};
}

/* A step that is not yet reported to the scheduler. */
static void watch_step(struct watch *w, const struct event *e) {
    const struct batch *batch = &e->step->batch;
    for (int i = 0; i < batch->n_sequences; i++) {
        const struct request *r = e->step->requests[i];
        int n_rows = batch->sequence[i].n_rows;
        bool first = r->first_token == 0;
        if (!batch->sequence[i].generated)
            watch_mark(w, e->end, MARK_PROMPT, n_rows);
        if (r->filled + n_rows == r->length && r->reason == FINISH_NONE)
            watch_mark(w, e->end, first ? MARK_TTFT : MARK_ITL,
                       1e3 * (e->end - (first ? r->submitted : r->last_token)));
    }
}

static void watch_note(void *context, const struct event *e) {
    struct watch *w = context;
    int host = w->config->n_workers;
    enum watch_way way = e->to == host ? WAY_OUT : e->from == host ? WAY_IN : WAY_PEER;
    struct watch_copies *copies = &w->copies[way == WAY_OUT ? e->from : e->to][way];
    if (e->kind == EVENT_COPY_ORDERED) {
        copies->under_way++;
    } else if (e->kind == EVENT_COPY) {
        copies->under_way--;
        copies->done++;
    } else if (e->kind == EVENT_STEP) {
        watch_step(w, e);
    }
    note(&w->next, e);
}

/* Rates and times of those of n marks that are not before `since`. */
static void watch_measure(struct watch_now *now, const struct watch_mark *marks, int n,
                          double since) {
    double times[2][WATCH_MARKS], n_prompt = 0;
    int n_times[2] = {0};
    for (int i = 0; i < n; i++) {
        const struct watch_mark *mark = &marks[i];
        if (mark->at >= since && mark->kind == MARK_PROMPT)
            n_prompt += (double)mark->value;
        else if (mark->at >= since)
            times[mark->kind][n_times[mark->kind]++] = (double)mark->value;
    }
    now->rates[0] = answers_ratio(n_prompt, now->at - since);
    now->rates[1] = answers_ratio(n_times[0] + n_times[1], now->at - since);
    for (int i = 0; i < 2; i++) {
        qsort(times[i], (size_t)n_times[i], sizeof *times[i], compare_doubles);
        for (int share = 0; share < 2; share++) { /* by nearest rank */
            int rank = (n_times[i] * (share ? 9 : 5) + 9) / 10;
            now->times[i][share] = rank > 0 ? times[i][rank - 1] : NAN;
        }
    }
}

static void watch_look(struct watch *w, struct watch_now *now) {
    struct engine *engine = w->answers->engine;
    struct watch_mark marks[WATCH_MARKS];
    engine_lock(engine);
    const struct sched *sched = engine_sched(engine);
    now->at = engine_now();
    now->load = sched_load(sched);
    now->sched = sched_stats(sched);
    for (int i = 0; i <= w->config->n_workers; i++)
        now->places[i] = kv_usage(sched_kv(engine_sched(engine)), i);
    memcpy(now->copies, w->copies, sizeof now->copies);
    int n = w->n_marks < WATCH_MARKS ? (int)w->n_marks : WATCH_MARKS;
    memcpy(marks, w->marks, (size_t)n * sizeof *marks);
    double oldest = n < WATCH_MARKS ? w->begun : marks[w->n_marks % WATCH_MARKS].at;
    engine_unlock(engine);
    now->seconds = now->at - w->begun;
    watch_measure(now, marks, n, fmax(now->at - WATCH_SECONDS, oldest));
}

/* ---- what is shown ---- */

enum watch_part_name { PART_PINNED, PART_CACHED, PART_IN_FLIGHT, PART_FREE, N_PARTS };
static const struct watch_part {
    const char *name, *cell, *colour;
} watch_parts[N_PARTS] = {[PART_PINNED] = {"pinned", "█", "\033[32m"},
                          [PART_CACHED] = {"cached", "▒", "\033[34m"},
                          [PART_IN_FLIGHT] = {"flight", "▓", "\033[33m"},
                          [PART_FREE] = {"free", "·", "\033[2m"}};

struct watch_row { /* a worker, several, or the host, which computes nothing */
    char name[20];
    bool computes;
    int decoding, prefilling; /* requests */
    int blocks[N_PARTS];
};

/* Makes rows of at most `most` workers, the last of all that are left, and the host: how many. */
static int watch_rows(const struct watch *w, const struct watch_now *now, int most,
                      struct watch_row rows[MAX_WORKERS + 1]) {
    int n = w->config->n_workers, shown = n < most ? n : most;
    memset(rows, 0, ((size_t)shown + 1) * sizeof *rows);
    for (int i = 0; i <= n; i++) {
        const struct kv_usage *u = &now->places[i];
        const int blocks[N_PARTS] = {u->pinned, u->cached, u->in_flight, u->free};
        struct watch_row *row = &rows[i == n ? shown : i < shown ? i : shown - 1];
        for (int part = 0; part < N_PARTS; part++)
            row->blocks[part] += blocks[part];
        row->computes = i < n;
        row->decoding += i < n ? now->load.decoding[i] : 0;
        row->prefilling += i < n ? now->load.prefilling[i] : 0;
        (void)snprintf(row->name, sizeof row->name, i < n ? "%d %s" : "host", i,
                       i < n ? now->load.role[i] : "");
    }
    if (n > shown)
        (void)snprintf(rows[shown - 1].name, sizeof rows->name, "%d others", n - shown + 1);
    return shown + 1;
}

enum { N_TEXTS = 4, TEXT_LENGTH = 256 };
static const char *const watch_labels[N_TEXTS] = {"requests", "tokens/s", "latency", "copies"};

/* What is told below the rows. */
static void watch_texts(const struct watch *w, const struct watch_now *now,
                        char texts[N_TEXTS][TEXT_LENGTH]) {
    char times[2][48];
    struct watch_copies all[N_WAYS] = {0};
    for (int i = 0; i < w->config->n_workers; i++)
        for (int way = 0; way < N_WAYS; way++) {
            all[way].under_way += now->copies[i][way].under_way;
            all[way].done += now->copies[i][way].done;
        }
    for (int i = 0; i < 2; i++)
        (void)snprintf(times[i], sizeof times[i],
                       isnan(now->times[i][0]) ? "-" : "%.1f ms, 90 %% %.1f ms", now->times[i][0],
                       now->times[i][1]);
    (void)snprintf(texts[0], TEXT_LENGTH,
                   "%d waiting, %d preempted, %" PRId64 " of %" PRId64 " ended", now->load.waiting,
                   now->load.preempted, now->sched.finished, now->sched.submitted);
    (void)snprintf(texts[1], TEXT_LENGTH, "%.0f of prompts, %.0f generated", now->rates[0],
                   now->rates[1]);
    (void)snprintf(texts[2], TEXT_LENGTH, "TTFT %s; ITL %s", times[MARK_TTFT], times[MARK_ITL]);
    (void)snprintf(texts[3], TEXT_LENGTH,
                   "under way: %" PRId64 " out, %" PRId64 " in, %" PRId64 " peer; done: %" PRId64
                   ", %" PRId64 ", %" PRId64,
                   all[WAY_OUT].under_way, all[WAY_IN].under_way, all[WAY_PEER].under_way,
                   all[WAY_OUT].done, all[WAY_IN].done, all[WAY_PEER].done);
}

/* ---- the picture ---- */

/* A text, in the colour of a part where there are colours. */
static void watch_paint(const struct watch *w, FILE *out, enum watch_part_name part,
                        const char *text) {
    (void)fprintf(out, "%s%s%s", w->colour ? watch_parts[part].colour : "", text,
                  w->colour ? "\033[m" : "");
}

/* `width` cells, shared as the blocks are. */
static void watch_bar(const struct watch *w, FILE *out, const int parts[N_PARTS], int width) {
    int64_t all = 0, before = 0;
    for (int part = 0; part < N_PARTS; part++)
        all += parts[part];
    for (int part = 0, cell = 0; part < N_PARTS; part++) {
        char cells[3 * WATCH_MOST_BAR + 1] = "";
        before += parts[part];
        for (; all > 0 && cell < (before * width + all / 2) / all; cell++)
            (void)strcat(cells, watch_parts[part].cell);
        watch_paint(w, out, part, cells);
    }
    (void)fprintf(out, "%*s", all > 0 ? 0 : width, "");
}

/* A row, or the line above them (NULL). Where it is narrow the bar alone tells of blocks. */
static void watch_line(const struct watch *w, FILE *out, const struct watch_row *row, int width) {
    int bar = width - WATCH_NAMES - N_PARTS * WATCH_NUMBER;
    bool numbers = bar >= WATCH_LEAST_BAR;
    bar = numbers ? bar : width - WATCH_NAMES;
    bar = bar < WATCH_MOST_BAR ? bar : WATCH_MOST_BAR;
    char text[24];
    if (!row)
        (void)fprintf(out, "%-10s %7s %7s  %-*s", "worker", "prefill", "decode", bar, "blocks");
    else if (row->computes)
        (void)fprintf(out, "%-10s %7d %7d  ", row->name, row->prefilling, row->decoding);
    else
        (void)fprintf(out, "%-*s", WATCH_NAMES, row->name);
    if (row)
        watch_bar(w, out, row->blocks, bar);
    for (int part = 0; part < N_PARTS && numbers; part++) {
        if (row)
            (void)snprintf(text, sizeof text, "%*d", WATCH_NUMBER, row->blocks[part]);
        else
            (void)snprintf(text, sizeof text, "%*s", WATCH_NUMBER, watch_parts[part].name);
        watch_paint(w, out, (enum watch_part_name)part, text);
    }
}

/* The lowest lines become the picture's: what stands there moves up. */
static void watch_take_lines(struct watch *w, FILE *out, int height) {
    (void)fputs("\0337\033[r\0338\033[J", out); /* no region, and no picture below the text */
    for (int i = 0; i < height; i++)
        (void)fputs("\033D", out); /* down, in the same column */
    (void)fprintf(out, "\033[%dA\0337\033[1;%dr\0338", height, w->size.ws_row - height);
    w->height = height;
}

/* Without waiting for a terminal that takes nothing. */
static void watch_write(const char *text, size_t length, int milliseconds) {
    struct pollfd ready = {.fd = STDERR_FILENO, .events = POLLOUT};
    if (poll(&ready, 1, milliseconds) > 0)
        (void)!write(STDERR_FILENO, text, length);
}

static void watch_draw(struct watch *w, const struct watch_now *now, bool anew) {
    struct watch_row rows[MAX_WORKERS + 1];
    int width = w->size.ws_col - 1; /* a full line would wait to be wrapped */
    int n = watch_rows(w, now, w->size.ws_row - WATCH_TEXT_ROWS - WATCH_OTHER_ROWS, rows);
    int line = w->size.ws_row - (n + WATCH_OTHER_ROWS - 1) + 1;
    char *text = NULL, words[N_TEXTS][TEXT_LENGTH];
    size_t length;
    FILE *out = open_memstream(&text, &length);
    if (!out)
        return;
    if (anew)
        watch_take_lines(w, out, w->size.ws_row - line + 1);
    (void)fprintf(out, "\0337\033[%d;1H", line++);
    for (int i = 0; i < width; i++)
        (void)fputs("─", out);
    for (int i = -1; i < n; i++) {
        (void)fprintf(out, "\033[K\033[%d;1H", line++);
        watch_line(w, out, i < 0 ? NULL : &rows[i], width);
    }
    watch_texts(w, now, words);
    for (int i = 0; i < N_TEXTS; i++)
        (void)fprintf(out, "\033[K\033[%d;1H%-*s%.*s", line++, WATCH_LABEL, watch_labels[i],
                      width - WATCH_LABEL, words[i]);
    (void)fputs("\033[K\0338", out);
    if (fclose(out) == 0)
        watch_write(text, length, 0);
    free(text);
}

/* Of a picture that is there. */
static void watch_erase(struct watch *w, int milliseconds) {
    static const char text[] = "\0337\033[r\0338\033[J";
    if (w->height > 0)
        watch_write(text, sizeof text - 1, milliseconds);
    w->height = 0;
}

/* The same in one line. */
static void watch_tell(const struct watch *w, const struct watch_now *now) {
    struct watch_row rows[MAX_WORKERS + 1];
    char words[N_TEXTS][TEXT_LENGTH];
    int n = watch_rows(w, now, MAX_WORKERS, rows);
    watch_texts(w, now, words);
    flockfile(stderr);
    (void)fprintf(stderr, "%.1f s", now->seconds);
    for (int i = 0; i < N_TEXTS; i++)
        (void)fprintf(stderr, "; %s: %s", watch_labels[i], words[i]);
    for (int i = 0; i < n; i++) {
        const int *b = rows[i].blocks;
        (void)fprintf(stderr, "; %s: ", rows[i].name);
        if (rows[i].computes)
            (void)fprintf(stderr, "%d prefill, %d decode, ", rows[i].prefilling, rows[i].decoding);
        (void)fprintf(stderr, "%d pinned, %d cached, %d in flight, %d free", b[PART_PINNED],
                      b[PART_CACHED], b[PART_IN_FLIGHT], b[PART_FREE]);
    }
    (void)fputc('\n', stderr);
    funlockfile(stderr);
}

/* A picture where there is room, and where the terminal is ours: else a line, if it is time. */
static void watch_show(struct watch *w, bool last) {
    struct watch_now now;
    struct winsize size = {0};
    pid_t front = tcgetpgrp(STDERR_FILENO); /* < 0: of another session's terminal */
    bool picture = w->ansi && ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 &&
                   size.ws_row >= WATCH_LEAST_ROWS && size.ws_col >= WATCH_LEAST_COLUMNS &&
                   (front < 0 || front == getpgrp());
    bool anew = w->height == 0 || memcmp(&size, &w->size, sizeof size) != 0;
    if (!picture || last)
        watch_erase(w, 0);
    if (picture && last)
        return;
    watch_look(w, &now);
    w->size = size;
    if (picture) {
        watch_draw(w, &now, anew);
    } else if (last || now.at >= w->told + 1) {
        watch_tell(w, &now);
        w->told = now.at;
    }
}

static bool watch_frame(struct watch *w, bool last) {
    pthread_mutex_lock(&w->drawing);
    watch_show(w, last);
    pthread_mutex_unlock(&w->drawing);
    return last;
}

static void *watch_main(void *argument) {
    struct watch *w = argument;
    struct pollfd stop = {.fd = w->stop, .events = POLLIN};
    while (!watch_frame(w, poll(&stop, 1, WATCH_MS) > 0)) {
    }
    return NULL;
}

/* ---- the same for machines ---- */

static void watch_json_place(FILE *out, const struct kv_usage *u) {
    (void)fprintf(out, "\"free\":%d,\"pinned\":%d,\"cached\":%d,\"in_flight\":%d", u->free,
                  u->pinned, u->cached, u->in_flight);
}

void watch_json(FILE *out, struct watch *w) {
    struct watch_now now;
    watch_look(w, &now);
    (void)fprintf(out, "{\"seconds\":%.3f,\"chat\":%s,\"workers\":[", now.seconds,
                  w->answers->template.kind == TEMPLATE_NONE ? "false" : "true");
    for (int i = 0; i < w->config->n_workers; i++) {
        (void)fprintf(out, "%s{\"role\":\"%s\",\"devices\":%d,\"prefilling\":%d,\"decoding\":%d,",
                      i > 0 ? "," : "", now.load.role[i], w->config->workers[i].n_shards,
                      now.load.prefilling[i], now.load.decoding[i]);
        watch_json_place(out, &now.places[i]);
        for (int way = 0; way < N_WAYS; way++)
            (void)fprintf(out, ",\"%s\":[%" PRId64 ",%" PRId64 "]", watch_ways[way],
                          now.copies[i][way].under_way, now.copies[i][way].done);
        (void)fputs("}", out);
    }
    (void)fputs("],\"host\":{", out);
    watch_json_place(out, &now.places[w->config->n_workers]);
    (void)fprintf(out,
                  "},\"waiting\":%d,\"preempted\":%d,\"submitted\":%" PRId64
                  ",\"finished\":%" PRId64 ",\"prompt_tokens_per_second\":%.4g"
                  ",\"generated_tokens_per_second\":%.4g",
                  now.load.waiting, now.load.preempted, now.sched.submitted, now.sched.finished,
                  now.rates[0], now.rates[1]);
    for (int i = 0; i < 2; i++)
        (void)fprintf(out, isnan(now.times[i][0]) ? ",\"%s\":null" : ",\"%s\":[%.4g,%.4g]",
                      i == MARK_TTFT ? "ttft_ms" : "itl_ms", now.times[i][0], now.times[i][1]);
    (void)fputs("}\n", out);
}

__asm__(".pushsection .rodata\n"
        ".global watch_page, watch_page_end\n"
        "watch_page: .incbin \"app/page.html\"\n"
        "watch_page_end: .popsection\n");

/* ---- beginning, end ---- */

struct watch *watch_open(struct ledger next) {
    struct watch *w = calloc(1, sizeof *w);
    if (!w)
        return NULL;
    w->next = next;
    w->ansi = text_moves(STDERR_FILENO);
    w->colour = text_colours(STDERR_FILENO);
    pthread_mutex_init(&w->drawing, NULL);
    return w;
}

struct ledger watch_ledger(struct watch *w) {
    return (struct ledger){watch_note, w};
}

void watch_begin(struct watch *w, const struct answers *answers) {
    w->answers = answers;
    w->config = engine_config_of(answers->engine);
    w->begun = w->told = engine_now();
}

bool watch_start(struct watch *w) {
    w->stop = eventfd(0, EFD_CLOEXEC);
    w->started = w->stop >= 0 && pthread_create(&w->thread, NULL, watch_main, w) == 0;
    if (w->started)
        (void)watch_frame(w, false); /* at once, so that a short run has one, too */
    return w->started;
}

void watch_stop(struct watch *w) {
    if (!w || !w->started)
        return;
    (void)eventfd_write(w->stop, 1);
    pthread_join(w->thread, NULL);
    (void)close(w->stop);
    w->started = false;
}

bool watch_restore(struct watch *w) {
    for (int tries = 0; w && tries < WATCH_RESTORE_TRIES; tries++) {
        if (pthread_mutex_trylock(&w->drawing) == 0) {
            watch_erase(w, 500);
            return true;
        }
        (void)poll(NULL, 0, 10);
    }
    return false;
}

void watch_resume(struct watch *w) {
    pthread_mutex_unlock(&w->drawing);
}

void watch_close(struct watch *w) {
    if (!w)
        return;
    pthread_mutex_destroy(&w->drawing);
    free(w);
}

#endif /* WATCH_IMPLEMENTATION */
