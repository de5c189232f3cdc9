/* auto.h: --auto: workers change their role as the load does.
 *
 *     config.ledger = auto_ledger(&roles, 60, 25, config.ledger);
 *     ...                                   // opens an engine, or a cluster in virtual time
 *     roles.sched = engine_sched(engine);   // from now on one a minute may change
 *
 * It is a ledger between the driver and who else wants to know: all that it measures stands in the
 * steps that go by, and so it runs by the clock, or in virtual time. What the load asks for is two
 * numbers, of how many workers in the mean:
 *
 *     prompts   the time that steps took, as far as their rows were of prompts
 *     answers   the time that steps of answers alone took, each as many times as it took AUTO_MEAN
 *               of the target: where that is the mean, most answers are within the target
 *
 * A worker of each pool is then that busy, or that near to the target, as is its part of its pool's
 * number: where that of a pool is more than AUTO_LEAST, and the larger of the two parts would be
 * smaller by AUTO_GAIN with a worker more there and one less in the other pool, one changes. Which
 * pool computes for which does not matter: a decode worker that prefills, since the others are far
 * behind, shows that prompts want more than they have.
 *
 * What keeps it from swinging: both numbers are means over half of `seconds`, and roles rest so
 * long after each change; the gain, so that the change back would have to gain as much. A load that
 * swings as fast changes one role a swing at most. The last worker of a role keeps it, and nothing
 * changes while no worker but those that have one role is left of a pool (see sched_fail). What a
 * worker has when it changes it finishes. TTFT has no part in it, but by how busy those are that
 * prefill. Read next: sched_set_role in scheduler.c. */
#ifndef AUTO_H
#define AUTO_H

#include "../dynamo.h"

struct auto_roles {
    struct ledger next;
    struct sched *sched; /* NULL: nothing changes yet */
    int n_workers;
    double seconds, itl;    /* between two changes; the target */
    double looked, changed; /* when; 0: not yet */
    double work[2];         /* since it looked, in seconds: of prompts, of answers */
    double load[2];         /* the same in each second, in the mean over some time */
};

/* The ledger to give to a driver; itl in ms. Sets `roles`, which outlives the driver. */
struct ledger auto_ledger(struct auto_roles *roles, int n_workers, double seconds, double itl,
                          struct ledger next);

#endif /* AUTO_H */

#ifdef AUTO_IMPLEMENTATION
#undef AUTO_IMPLEMENTATION

#include <math.h>

enum { AUTO_LOOKS = 60 }; /* in the time between two changes */
static const double AUTO_LEAST = 0.5, AUTO_GAIN = 0.1, AUTO_MEAN = 2.0 / 3;

static void auto_count(struct auto_roles *a, const struct event *e) {
    const struct batch *batch = &e->step->batch;
    double seconds = e->end - e->start;
    int n_prompts = batch->n_rows;
    for (int i = 0; i < batch->n_sequences; i++)
        n_prompts -= batch->sequence[i].generated;
    a->work[0] += seconds * n_prompts / batch->n_rows;
    if (n_prompts == 0)
        a->work[1] += seconds * seconds / (AUTO_MEAN * a->itl);
}

/* Gives a worker of the other pool this role: the one that has the fewest requests to finish. */
static bool auto_change(struct auto_roles *a, bool decodes, double now) {
    struct sched_load load = sched_load(a->sched);
    int n[2] = {0}, least = -1, requests = 0;
    for (int i = 0; i < a->n_workers; i++) {
        bool other = load.role[i][0] == (decodes ? 'p' : 'd');
        int has = load.prefilling[i] + load.decoding[i];
        n[0] += load.role[i][0] == 'p';
        n[1] += load.role[i][0] == 'd';
        if (other && (least < 0 || has < requests)) {
            least = i;
            requests = has;
        }
    }
    if (n[decodes] < 1 || n[!decodes] < 2)
        return false;
    double own = a->load[decodes], rest = a->load[!decodes];
    double before = fmax(own / n[decodes], rest / n[!decodes]);
    double after = fmax(own / (n[decodes] + 1), rest / (n[!decodes] - 1));
    if (before < AUTO_LEAST || after > (1 - AUTO_GAIN) * before)
        return false;
    sched_set_role(a->sched, least, !decodes, decodes, now);
    return true;
}

static void auto_look(struct auto_roles *a, double now) {
    double passed = now - a->looked, share = 1 - exp(-2 * passed / a->seconds);
    for (int i = 0; i < 2; i++) {
        a->load[i] += (a->work[i] / passed - a->load[i]) * share;
        a->work[i] = 0;
    }
    a->looked = now;
    if (now - a->changed >= a->seconds && (auto_change(a, false, now) || auto_change(a, true, now)))
        a->changed = now;
}

static void auto_note(void *context, const struct event *e) {
    struct auto_roles *a = context;
    note(&a->next, e);
    if (e->kind != EVENT_STEP || !a->sched)
        return;
    if (a->looked <= 0)
        a->looked = a->changed = e->start;
    auto_count(a, e);
    if (e->end - a->looked >= a->seconds / AUTO_LOOKS)
        auto_look(a, e->end);
}

struct ledger auto_ledger(struct auto_roles *roles, int n_workers, double seconds, double itl,
                          struct ledger next) {
    *roles = (struct auto_roles){
        .next = next, .n_workers = n_workers, .seconds = seconds, .itl = 1e-3 * itl};
    return (struct ledger){auto_note, roles};
}

#endif /* AUTO_IMPLEMENTATION */
