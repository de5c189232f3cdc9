/* auto.h: --auto: workers change their role as the load does.
 *
 *     config.ledger = auto_ledger(&roles, 60, 25, config.ledger);
 *     ...                                 // an engine is opened, or a cluster in virtual time
 *     roles.sched = engine_sched(engine); // from now on one worker a minute may change
 *
 * It is a ledger between the driver and who else wants to know: all that it measures stands in the
 * steps that go by, so it works by the clock and in virtual time. Of how many workers the load has
 * need, as the mean of some time:
 *
 *     prompts   the time of steps, as far as their rows are of prompts, whoever computes them
 *     answers   the time of steps that are of answers alone, each as many times as it takes
 *               AUTO_MEAN of the target of ITL: where that is the mean, most answers keep it
 *
 * A pool has more to do the more of these stand against its workers. If that is more than
 * AUTO_LEAST in the busier pool, and one worker more there and less in the other would make the
 * larger of the two smaller by AUTO_GAIN, one changes, and finishes what it has. Then roles rest
 * for `seconds`, of which the means are over half: so a load that swings faster changes one role a
 * swing at most, and one that is only uneven none. The last worker of a role keeps it. Refuses to
 * guess what will come, and to weigh TTFT, but by how busy those are that prefill. Workers that
 * share a GPU keep the precedence there that they began with. Read next: sched_set_role. */
#ifndef AUTO_H
#define AUTO_H

#include "../dynamo.h"

struct auto_roles {
    struct ledger next;
    struct sched *sched;    /* NULL: nothing changes yet */
    double seconds, itl;    /* between two changes; the target */
    double looked, changed; /* when; 0: not yet */
    double work[2];         /* since it looked, in seconds: of prompts, of answers */
    double load[2];         /* the same in each second, in the mean over some time */
};

/* The ledger to give to a driver; itl in ms. Sets `roles`, which outlives the driver. */
struct ledger auto_ledger(struct auto_roles *roles, double seconds, double itl, struct ledger next);

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
    for (int i = 0; i < MAX_WORKERS && load.role[i]; i++) {
        bool other = load.role[i][0] == (decodes ? 'p' : 'd');
        int has = load.prefilling[i] + load.decoding[i];
        n[0] += load.role[i][0] == 'p';
        n[1] += load.role[i][0] == 'd';
        if (other && i != load.needed && (least < 0 || has < requests)) {
            least = i;
            requests = has;
        }
    }
    if (n[decodes] < 1 || n[!decodes] < 2 || least < 0)
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

struct ledger auto_ledger(struct auto_roles *roles, double seconds, double itl,
                          struct ledger next) {
    *roles = (struct auto_roles){.next = next, .seconds = seconds, .itl = 1e-3 * itl};
    return (struct ledger){auto_note, roles};
}

#endif /* AUTO_IMPLEMENTATION */
