/* pool.h: a pool of threads that several devices share.
 *
 * Each thread that has parallel work owns a *job*: a function and a number of tiles. It runs tiles
 * itself until none is left; helpers take tiles of whichever job has some, urgent jobs first. No
 * more than n_threads are at work at once: owners between pool_enter and pool_leave count, awake
 * helpers count, and a helper in excess goes to sleep.
 *
 *     struct pool pool;
 *     if (pool_open(&pool, 4, sizeof(struct scratch)) < 4) ...; // pool_close in any case
 *     struct job *job = pool_take_job(&pool, false);            // NULL: all are taken
 *     pool_enter(&pool);
 *     pool_run(&pool, job, scratch, n_tiles, square, numbers);  // square(numbers, 0, ...), ...
 *     pool_leave(&pool);
 *     pool_give_job(&pool, job);
 *     pool_close(&pool);
 *
 * Invariants: a tile is run once; what a job computes is read only by who holds one of its tiles; a
 * sleeping helper is not counted as active. The pool knows nothing of what tiles compute; it only
 * gives each helper a `struct scratch`, which is the includer's own type. Read `pool_run` next. */
#ifndef POOL_H
#define POOL_H
#include <pthread.h>
#include <stdalign.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>

enum {
    POOL_JOBS = 128,    /* that can be taken at a time */
    SPINS = 3000,       /* pauses (about 50 us) before an idle helper sleeps */
    YIELD_SPINS = 20000 /* pauses before a waiting thread suspects that it is in the way */
};

struct scratch; /* of one thread */
typedef void tile_function(const void *argument, int tile, struct scratch *scratch);

/* What one owner asks of the pool. `left` tiles are not yet taken, `done` are finished. */
struct job {
    alignas(128) atomic_int left;
    atomic_bool urgent;
    tile_function *run;
    const void *argument;
    int n_tiles;
    alignas(128) atomic_int done;
};

struct pool {
    struct job jobs[POOL_JOBS];
    bool taken[POOL_JOBS]; /* under `mutex` */
    atomic_int n_jobs;     /* jobs [n_jobs, POOL_JOBS) were never taken */
    int n_threads, n_helpers;
    size_t scratch_bytes;
    atomic_int active, sleepers; /* entered threads and awake helpers; sleeping helpers */
    atomic_bool stop;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    pthread_t *helpers; /* (n_helpers) */
};

/* Starts n_threads - 1 helpers. Returns how many threads there are with the caller's own: fewer
 * than n_threads if the system refuses. */
int pool_open(struct pool *pool, int n_threads, size_t scratch_bytes);
void pool_close(struct pool *pool); /* no job may be running */

struct job *pool_take_job(struct pool *pool, bool urgent); /* NULL: none is left */
void pool_give_job(struct pool *pool, const struct job *job);

/* The calling thread counts as one of n_threads until it leaves. */
void pool_enter(struct pool *pool);
void pool_leave(struct pool *pool);

/* Runs tiles [0, n_tiles), at least one, on all threads; returns when all are done. Who waits for
 * a job that is not urgent takes urgent tiles in between: they are short, and someone waits. */
void pool_run(struct pool *pool, struct job *job, struct scratch *scratch, int n_tiles,
              tile_function *run, const void *argument);
#endif /* POOL_H */
#ifdef POOL_IMPLEMENTATION
#undef POOL_IMPLEMENTATION
#include <assert.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

static void pool_pause(int spins) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
    if (spins > YIELD_SPINS)
        sched_yield();
}

static bool pool_run_tile(struct job *job, struct scratch *scratch) {
    int left = atomic_load_explicit(&job->left, memory_order_relaxed);
    do {
        if (left == 0)
            return false;
    } while (!atomic_compare_exchange_weak_explicit(&job->left, &left, left - 1,
                                                    memory_order_acquire, memory_order_relaxed));
    job->run(job->argument, job->n_tiles - left, scratch);
    atomic_fetch_add_explicit(&job->done, 1, memory_order_release);
    return true;
}

static bool pool_run_any(struct pool *pool, bool urgent, struct scratch *scratch) {
    int n_jobs = atomic_load_explicit(&pool->n_jobs, memory_order_relaxed);
    for (int i = 0; i < n_jobs; i++) {
        struct job *job = &pool->jobs[i];
        if (atomic_load_explicit(&job->urgent, memory_order_relaxed) == urgent &&
            pool_run_tile(job, scratch))
            return true;
    }
    return false;
}

static bool pool_has_work(struct pool *pool) {
    int n_jobs = atomic_load(&pool->n_jobs);
    for (int i = 0; i < n_jobs; i++)
        if (atomic_load(&pool->jobs[i].left) > 0)
            return true;
    return false;
}

/* Moves the count of active threads by `step` if it lies on that side of the limit. */
static bool pool_change_active(struct pool *pool, int step) {
    int active = atomic_load(&pool->active);
    do {
        if (step > 0 ? active >= pool->n_threads : active <= pool->n_threads)
            return false;
    } while (!atomic_compare_exchange_weak(&pool->active, &active, active + step));
    return true;
}

/* A helper that is not counted as active sleeps until there is work and room for it. */
static void pool_park(struct pool *pool) {
    pthread_mutex_lock(&pool->mutex);
    atomic_fetch_add(&pool->sleepers, 1);
    while (!atomic_load(&pool->stop) && !(pool_has_work(pool) && pool_change_active(pool, 1)))
        pthread_cond_wait(&pool->wake, &pool->mutex);
    atomic_fetch_sub(&pool->sleepers, 1);
    pthread_mutex_unlock(&pool->mutex);
}

static void *pool_helper(void *argument) {
    struct pool *pool = argument;
    struct scratch *scratch = aligned_alloc(64, (pool->scratch_bytes + 63) / 64 * 64);
    assert(scratch);
    pool_park(pool);
    for (int spins = 0; !atomic_load_explicit(&pool->stop, memory_order_relaxed);) {
        if (pool_change_active(pool, -1)) {
            pool_park(pool);
        } else if (pool_run_any(pool, true, scratch) || pool_run_any(pool, false, scratch)) {
            spins = 0;
        } else if (++spins < SPINS) {
            pool_pause(spins);
        } else {
            atomic_fetch_sub(&pool->active, 1);
            pool_park(pool);
            spins = 0;
        }
    }
    free(scratch);
    return NULL;
}

static void pool_wake(struct pool *pool, int n_wanted) {
    int sleepers = atomic_load(&pool->sleepers);
    int room = pool->n_threads - atomic_load(&pool->active);
    if (sleepers == 0 || room <= 0)
        return;
    pthread_mutex_lock(&pool->mutex);
    for (int i = 0; i < n_wanted && i < room && i < sleepers; i++)
        pthread_cond_signal(&pool->wake);
    pthread_mutex_unlock(&pool->mutex);
}

void pool_run(struct pool *pool, struct job *job, struct scratch *scratch, int n_tiles,
              tile_function *run, const void *argument) {
    if (n_tiles == 1) {
        run(argument, 0, scratch);
        return;
    }
    bool urgent = atomic_load_explicit(&job->urgent, memory_order_relaxed);
    job->run = run;
    job->argument = argument;
    job->n_tiles = n_tiles;
    atomic_store_explicit(&job->done, 0, memory_order_relaxed);
    atomic_store(&job->left, n_tiles);
    pool_wake(pool, n_tiles - 1);
    while (pool_run_tile(job, scratch)) {
    }
    int spins = 0;
    while (atomic_load_explicit(&job->done, memory_order_acquire) < n_tiles)
        if (urgent || !pool_run_any(pool, true, scratch))
            pool_pause(spins++);
}

void pool_enter(struct pool *pool) {
    atomic_fetch_add(&pool->active, 1);
}

void pool_leave(struct pool *pool) {
    atomic_fetch_sub(&pool->active, 1);
}

struct job *pool_take_job(struct pool *pool, bool urgent) {
    struct job *job = NULL;
    pthread_mutex_lock(&pool->mutex);
    for (int i = 0; i < POOL_JOBS && !job; i++) {
        if (!pool->taken[i]) {
            job = &pool->jobs[i];
            pool->taken[i] = true;
            atomic_store(&job->urgent, urgent);
            if (i >= atomic_load(&pool->n_jobs))
                atomic_store(&pool->n_jobs, i + 1);
        }
    }
    pthread_mutex_unlock(&pool->mutex);
    return job;
}

void pool_give_job(struct pool *pool, const struct job *job) {
    pthread_mutex_lock(&pool->mutex);
    pool->taken[job - pool->jobs] = false;
    pthread_mutex_unlock(&pool->mutex);
}

int pool_open(struct pool *pool, int n_threads, size_t scratch_bytes) {
    memset(pool, 0, sizeof *pool);
    pool->n_threads = n_threads;
    pool->scratch_bytes = scratch_bytes;
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pool->helpers = calloc((size_t)n_threads, sizeof *pool->helpers);
    while (pool->helpers && pool->n_helpers < n_threads - 1 &&
           pthread_create(&pool->helpers[pool->n_helpers], NULL, pool_helper, pool) == 0)
        pool->n_helpers++;
    return pool->n_helpers + 1;
}

void pool_close(struct pool *pool) {
    pthread_mutex_lock(&pool->mutex);
    atomic_store(&pool->stop, true);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->mutex);
    for (int i = 0; i < pool->n_helpers; i++)
        pthread_join(pool->helpers[i], NULL);
    free(pool->helpers);
}
#endif /* POOL_IMPLEMENTATION */
