/* copier.h: a thread that copies memory beside the computation, as a copy engine does.
 *
 * Copies go into queues, the streams of a device; those of one queue are done in order, and each
 * has a ticket, which is polled. A test can have them delayed and mixed: with a `delay_seed` each
 * takes a random time, and the queues overtake each other.
 *
 *     struct copier copier;
 *     struct copy_queue queue = {0};
 *     if (!copier_open(&copier, 0)) ...;
 *     uint64_t ticket = copier_add(&copier, &queue, &copy);
 *     while (!copier_done(&queue, ticket)) ...; // or copier_drain(&copier, &queue)
 *     copier_close(&copier);                    // after all that was added
 *
 * Invariant: a copy that runs stays in the list until its queue has counted it. */
#ifndef COPIER_H
#define COPIER_H
#include <pthread.h>
#include <stdatomic.h>

#include "dynamo.h"

enum { MAX_COPY_DELAY = 2000 /* microseconds */ };

struct copy_queue {
    atomic_uint_fast64_t added, done;
};

struct copier {
    pthread_t thread;
    pthread_mutex_t mutex;
    pthread_cond_t wake, idle;
    struct copy_order *first; /* the running one stays in the list */
    bool stop;
    uint64_t delay_seed;
};

bool copier_open(struct copier *copier, uint64_t delay_seed); /* false: the thread did not start */
void copier_close(struct copier *copier);
uint64_t copier_add(struct copier *copier, struct copy_queue *queue, const struct copy2d *copy);
bool copier_done(const struct copy_queue *queue, uint64_t ticket);
void copier_drain(struct copier *copier, struct copy_queue *queue); /* waits for all of it */
#endif                                                              /* COPIER_H */
#ifdef COPIER_IMPLEMENTATION
#undef COPIER_IMPLEMENTATION
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct copy_order {
    struct copy_queue *queue;
    struct copy2d copy;
    struct copy_order *next;
};

static uint32_t copier_random(uint64_t *state) { /* splitmix64 */
    uint64_t z = *state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return (uint32_t)(z >> 32);
}

static void copier_copy(const struct copy2d *copy) {
    for (size_t row = 0; row < copy->height; row++) {
        memcpy((char *)copy->to + row * copy->to_pitch,
               (const char *)copy->from + row * copy->from_pitch, copy->width);
    }
}

/* The first copy in the list; or, where copies are delayed, the first of a random queue. */
static struct copy_order *copier_pick(struct copier *copier, uint32_t random) {
    if (copier->delay_seed == 0)
        return copier->first;
    uint32_t count = 0;
    for (struct copy_order *order = copier->first; order; order = order->next)
        count++;
    struct copy_order *chosen = copier->first, *first = copier->first;
    for (uint32_t i = random % count; i > 0; i--)
        chosen = chosen->next;
    while (first->queue != chosen->queue)
        first = first->next;
    return first;
}

static void *copier_main(void *argument) {
    struct copier *copier = argument;
    uint64_t random = copier->delay_seed;
    pthread_mutex_lock(&copier->mutex);
    for (;;) {
        while (!copier->first && !copier->stop)
            pthread_cond_wait(&copier->wake, &copier->mutex);
        if (!copier->first)
            break;
        struct copy_order *order = copier_pick(copier, copier_random(&random));
        pthread_mutex_unlock(&copier->mutex);
        if (copier->delay_seed) {
            long delay = (long)(copier_random(&random) % MAX_COPY_DELAY);
            nanosleep(&(struct timespec){0, delay * 1000}, NULL);
        }
        copier_copy(&order->copy);
        pthread_mutex_lock(&copier->mutex);
        atomic_fetch_add_explicit(&order->queue->done, 1, memory_order_release);
        struct copy_order **link = &copier->first;
        while (*link != order)
            link = &(*link)->next;
        *link = order->next;
        free(order);
        pthread_cond_broadcast(&copier->idle);
    }
    pthread_mutex_unlock(&copier->mutex);
    return NULL;
}

uint64_t copier_add(struct copier *copier, struct copy_queue *queue, const struct copy2d *copy) {
    struct copy_order *order = malloc(sizeof *order), **link = &copier->first;
    if (!order) { /* copies cannot fail: the program ends here, as with any fault of a device */
        fprintf(stderr, "dynamo: %s:%d: no memory for a copy order\n", __FILE__, __LINE__);
        abort();
    }
    *order = (struct copy_order){queue, *copy, NULL};
    pthread_mutex_lock(&copier->mutex);
    while (*link)
        link = &(*link)->next;
    *link = order;
    uint64_t ticket = atomic_fetch_add(&queue->added, 1) + 1;
    pthread_cond_signal(&copier->wake);
    pthread_mutex_unlock(&copier->mutex);
    return ticket;
}

bool copier_done(const struct copy_queue *queue, uint64_t ticket) {
    return atomic_load_explicit(&queue->done, memory_order_acquire) >= ticket;
}

void copier_drain(struct copier *copier, struct copy_queue *queue) {
    pthread_mutex_lock(&copier->mutex);
    while (atomic_load(&queue->done) < atomic_load(&queue->added))
        pthread_cond_wait(&copier->idle, &copier->mutex);
    pthread_mutex_unlock(&copier->mutex);
}

bool copier_open(struct copier *copier, uint64_t delay_seed) {
    *copier = (struct copier){.delay_seed = delay_seed};
    pthread_mutex_init(&copier->mutex, NULL);
    pthread_cond_init(&copier->wake, NULL);
    pthread_cond_init(&copier->idle, NULL);
    return pthread_create(&copier->thread, NULL, copier_main, copier) == 0;
}

void copier_close(struct copier *copier) {
    pthread_mutex_lock(&copier->mutex);
    copier->stop = true;
    pthread_cond_broadcast(&copier->wake);
    pthread_mutex_unlock(&copier->mutex);
    pthread_join(copier->thread, NULL);
}
#endif /* COPIER_IMPLEMENTATION */
