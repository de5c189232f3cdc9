/* dynamo.h: the map of the house.
 *
 * A request travels through these files, and each part of this header belongs to one of them:
 *
 *     dynamo.c     the model's forward pass, the threads of workers, main    (calls all below)
 *     scheduler.c  who computes what next: a state machine over requests     -> kvcache.c
 *     kvcache.c    where each KV block is: slots, the global index, what goes first
 *     kernels.c    the CPU backend: every op of the forward pass, the copies (kernels.cu: CUDA)
 *
 * The scheduler and the cache hold no device pointer, thread or clock: they deal in slot numbers
 * and say what is to be computed and copied. dynamo.c turns slots into addresses and carries the
 * orders out through a backend. A backend knows nothing of requests. README.md has what stands
 * around these files: app/ and lib/.
 *
 * Words for dimensions, used everywhere in shapes such as (n_rows, d_model), slowest first:
 *     n_layers, d_model, n_heads, n_kv_heads, head_dim, d_ff, vocab_size   the model's
 *     n_rows       tokens computed in one step, the rows of all its sequences one after another
 *     n_sequences  requests that take part in a step
 *     n_samples    rows of a step whose next token is sampled
 *     n_shards     devices of one worker; each holds n_heads / n_shards heads and as much of d_ff
 *
 * One block and one token on paper (2 workers: 0 prefills, 1 decodes; a prompt of 20 tokens):
 *     sched_submit   no prefix is cached. Nodes A (tokens 0-15) and B (16-19) are made, each with
 *                    a slot on worker 0 to be written and a slot reserved on worker 1; A is hashed.
 *     sched_next(0)  the first chunk, here all of the prompt.
 *                    The step: rows 0-19, block table {slot of A, slot of B}, one sample (row 19).
 *     forward        row 3 of layer 5: rope_append writes its K to kv + slot(A) * block_bytes,
 *                    at [layer 5][k][kv_head], row 3; attention reads it through the table.
 *     sched_done(0)  A is full: registered under the root, findable. B stays private.
 *                    Token 20 is sampled. Both are sent: their slots on worker 1 are in flight.
 *     sched_copies   hands out the two copy orders of worker 1; the courier carries them out.
 *     sched_copied   twice. B's slot on worker 0 is free again; A stays cached there.
 *     sched_next(1)  all blocks are there: a step of one row, token 20 at position 20, in B.
 *     sched_done(1)  token 21 is sampled, and so on. When B is full it is registered under A.
 *     the end        A and B are unpinned, B first: both stay cached on worker 1. If it needs room,
 *                    its coldest block is copied to host, then dropped. */
#ifndef DYNAMO_H
#define DYNAMO_H

#include "lib/model.h"
#include "lib/sampler.h"

enum {
    BLOCK_TOKENS = 16, /* tokens in a KV block: small enough to share, large enough to copy fast */
    MAX_WORKERS = 128,
    LOGIT_ROWS = 64, /* logits of a device at a time: a row of a large vocabulary is 0.5 MB */
    MAX_SHARDS = 8   /* devices of one worker: their number divides K_SEGMENTS */
};

/* ---- requests ---- */

enum request_state {
    REQUEST_WAITING,   /* in the queue: new, or preempted */
    REQUEST_LOADING,   /* blocks are reserved; its cached prefix is on its way */
    REQUEST_PREFILL,   /* chunks of its prompt are computed */
    REQUEST_HAND_OVER, /* its last blocks are on their way to the decode worker */
    REQUEST_RUNNING,   /* one token a step */
    REQUEST_FINISHED
};

enum finish_reason { FINISH_NONE, FINISH_STOP, FINISH_LENGTH, FINISH_CANCELLED, FINISH_ERROR };

/* A request. The caller owns the memory, fills in the first part, and may read the rest while it
 * holds the scheduler's lock. tokens[0, n_prompt) is the prompt, tokens[n_prompt, length) what was
 * generated; K and V of tokens [0, filled) are computed; after prefill filled == length - 1. */
struct request {
    int64_t id;            /* unique; the order of arrival, and of seniority */
    int *tokens;           /* (capacity of n_prompt + max_new, sched_longest is enough) */
    int n_prompt, max_new; /* max_new >= 1 */
    int min_new;           /* an end token before so many is one like others */
    struct sampling sampling;
    struct sampler_top *top; /* (max_new) of each new token; NULL: nobody asks */
    double deadline;         /* seconds after its arrival when it is ended; <= 0: none */

    enum request_state state;
    enum finish_reason reason; /* why it has ended, or will when its step is done */
    char error[ERROR_LENGTH];
    bool refused; /* its error: the queue was full */
    int length, filled, preemptions;
    int cached_tokens, cached_on_host; /* of the prompt, when admitted; of them on the host alone */
    int prefill_worker, decode_worker; /* that it has, or had last; -1: none yet; may be the same */
    uint64_t *hashes;             /* kv_hash up to the end of each full block. In one piece with */
    int *blocks, n_blocks;        /* … nodes of the cache, in order of position; */
    int *slots, n_slots;          /* … of the first blocks, seen to be where it is computed; */
    int *held, n_held;            /* … nodes whose host copies it holds as it waits */
    int64_t tried;                /* its last try to be admitted, at which count of changes; … */
    int lacks;                    /* … the blocks that it lacked then, … */
    bool lacks_decoder;           /* … on any worker, or on those that prefill; … */
    bool makes_room;              /* … whether they are being freed, … */
    int room_at;                  /* … on this worker */
    int n_passed;                 /* others admitted while it was the first that did not fit */
    int shared;                   /* tokens that it has waited for another to compute, who is … */
    const struct request *leader; /* … or NULL: they are there */
    int saved;                    /* node of the block it was preempted in; -1: none */
    const char *why;              /* it was preempted last, or will be when the step is done */
    bool in_step, leaves; /* leaves: when the step is done; if it has no reason, to wait again */
    double submitted, first_token, last_token; /* seconds; 0: not yet */
    double admitted, resumed;                  /* for the first time, for the last time */
    struct list *list;                         /* of the scheduler: where it stands */
    struct request *previous, *next;
};

/* ---- one step: all that a forward pass needs to know ---- */

struct sequence {
    int first_row, n_rows;     /* its rows in the batch */
    int start;                 /* position of its first row: so many tokens are in its blocks */
    int first_block, n_blocks; /* its part of block_table */
    bool generated;            /* its row is a generated token (decode), not a prompt's */
};

struct batch {
    int n_rows, n_sequences, n_samples, n_blocks;
    int *token, *position, *row_sequence; /* (n_rows) */
    struct sequence *sequence;            /* (n_sequences) */
    int *block_table;                     /* (n_blocks) slots on the worker that runs the step */
    int *sample_row;                      /* (n_samples) rows whose logits are wanted */
    struct sampling *sampling;            /* (n_samples) */
    struct sampler_top **top;             /* (n_samples) out, NULL or each NULL: not asked for */
    int *sampled; /* (n_samples) out: the token for position + 1; -1: see lib/sampler.h */
};

/* ---- the backend interface: CPU, CUDA ---- */

/* A tensor, or a shard's part of one, in the backend's own layout. The ops take a layer's weights
 * by their roles, `const struct weight *const *layer` (N_ROLES): see enum tensor_role in
 * lib/model.h. Those that the model does not have are NULL. */
struct weight;

enum kv_type { KV_F32, KV_BF16 };
enum stream { STREAM_COMPUTE, STREAM_PAGE_OUT, STREAM_PAGE_IN, STREAM_TRANSFER, N_STREAMS };
enum product_input { INPUT_ATTENTION, INPUT_FFN };

struct copy2d { /* `height` runs of `width` bytes */
    void *to;
    const void *from;
    size_t to_pitch, from_pitch, width, height;
};

/* One device as dynamo.c sees it; a backend allocates it as the first member of its own struct.
 * Fields are set once, by device_open from its arguments and, for kv, by the caller. */
struct device {
    struct backend *backend;
    const struct model_config *config; /* of the whole model */
    const float *rope_frequency;       /* host (rope_dim / 2) radians per position; behind them …
                                        * those of layers with a window, if theta_windowed is set */
    int index;                         /* its number in --devices */
    int rank, n_shards;                /* its place in its worker */
    bool urgent;                       /* it decodes: its work goes before prefill work */
    int max_rows, max_samples;         /* the largest step that it must take */
    enum kv_type kv_type;
    void *kv; /* device (blocks, block_bytes): see block_bytes below */
};

/* Functions that can fail return NULL or false, and write a line into `error` if they have it; the
 * ops cannot fail: a fault of the device is told with its file and line, and ends the program, or
 * what the engine had there: see backend_options.
 *
 * The activations belong to the device: x (n_rows, d_model) f32 is the residual stream, and q, k,
 * v, attention and ffn are what the ops below leave for each other, in its own layout. An op is
 * called between step_begin and step_end, by the one thread that drives the device, and may
 * return before its work is done; the ops of a device are carried out in order.
 *
 * A shard computes its own heads and its own part of d_ff, or its own experts. project_add and
 * expert_down_add on one of several shards leave their partial sum on the device, and
 * all_reduce_add of the worker's shards adds all partial sums to every shard's x; on a worker of
 * one shard they add to x themselves, unless the config says post_norm. K is summed in K_SEGMENTS
 * segments combined by a binary tree (prompts on GPUs: as one chain, from shard to shard), and a
 * row's experts in as many groups, so the result does not depend on n_shards. */
struct backend {
    const char *name;
    void (*close)(struct backend *backend);
    /* devices; fields of `wanted` except kv say what is asked for */
    struct device *(*device_open)(struct backend *backend, const struct device *wanted,
                                  char *error);
    void (*device_close)(struct device *device);
    /* memory of the device; the host's is of host_alloc. NULL: no room */
    void *(*alloc)(struct device *device, size_t bytes);
    void (*release)(struct device *device, void *memory);
    size_t (*free_memory)(struct device *device); /* bytes that alloc could give */
    /* pinned host memory, of whole pages, is copied faster; a copy is of pinned memory alone, or of
     * none. From any thread. False: the system refuses it. NULL: it makes no difference */
    bool (*pin)(struct device *device, void *memory, size_t bytes);
    void (*unpin)(struct device *device, void *memory);
    /* together: see model_together, NULL: none; they come in order, a backend may make them one */
    const struct weight *(*upload)(struct device *device, const struct tensor *tensor,
                                   const struct tensor *const *together, struct slice slice,
                                   char *error);
    /* measures, between steps and in 0.1 s, what a worker's n devices reach at most: bytes read and
     * operations (a multiply-add is two) in products of `type`, both a second; 0: unknown */
    void (*limits)(struct device **shards, int n, enum tensor_type type, double *read, double *ops);
    /* copies run beside the ops; a ticket is polled, never waited for. These two are called by one
     * thread for all devices, while others drive their steps */
    uint64_t (*copy)(struct device *device, enum stream stream, const struct copy2d *copy);
    bool (*copy_done)(struct device *device, enum stream stream, uint64_t ticket);

    /* one step. step_begin takes what it needs from the batch, which stays unchanged until
     * step_end; false: it has replayed a recording of the ops, which are then skipped */
    bool (*step_begin)(struct device *device, const struct batch *batch);
    /* x = token_embd[token] * embedding_scale */
    void (*embed)(struct device *device, const struct weight *token_embd);
    /* q, k, v = attn_{q,k,v} . rmsnorm(x) + bias */
    void (*norm_qkv)(struct device *device, const struct weight *const *layer);
    /* q, k: norm over head_dim if the layer has one, then rope; k, v into their blocks */
    void (*rope_append)(struct device *device, const struct weight *const *layer, int layer_index);
    /* attention = softmax(q . k * attention_scale) . v over the positions up to its own that are in
     * the layer's window, through the table. Sinks: each is a score more, without a value */
    void (*attention)(struct device *device, const struct weight *const *layer, int layer_index);
    /* x += matrix . input; see above for shards */
    void (*project_add)(struct device *device, const struct weight *matrix,
                        enum product_input input);
    /* ffn = activation(ffn_gate . h + bias, ffn_up . h + bias), h = rmsnorm(x) */
    void (*norm_gate_up)(struct device *device, const struct weight *const *layer);
    /* of a layer with experts, in place of these two: the experts of each row, those of the largest
     * router . h + bias, h = rmsnorm(x), and their shares, by softmax; */
    void (*norm_route)(struct device *device, const struct weight *const *layer);
    /* … for each of them ffn = activation(gate . h + bias, up . h + bias); */
    void (*expert_gate_up)(struct device *device, const struct weight *const *layer);
    /* … x += the sum of share * (down . ffn + bias) */
    void (*expert_down_add)(struct device *device, const struct weight *const *layer);
    /* norm: NULL, or of each shard: x += rmsnorm(the sum), also on a worker of one */
    void (*all_reduce_add)(struct device **shards, int n_shards, const struct weight *const *norm);
    void (*add_bias)(struct device *device, const struct weight *bias); /* x += bias */
    /* one token for each sampled row, as lib/sampler.h defines it, from its logits = output .
     * rmsnorm(x); LOGIT_ROWS rows at a time. `logits`: NULL, or host (n_samples, vocab_size) where
     * they are to be after step_end; not in a step that may be recorded, whose rows are all
     * generated. Called on the first shard alone, with the first layer's weights, where the model's
     * own stand */
    void (*sample)(struct device *device, const struct weight *const *first, float *logits);
    /* waits for the step and writes the sampled tokens (n_samples), if `sample` was called */
    void (*step_end)(struct device *device, int *sampled);
    enum kv_type kv_type;     /* what it keeps keys and values in, unless told otherwise */
    int chunk;                /* prompt tokens in one step that suit it */
    int n_gpus;               /* device.index is below; 0: devices are the CPU, memory the host's */
    uint64_t kernel_launches; /* a CUDA backend counts; 0 on the CPU */
};

struct backend_options {
    int n_threads;               /* of the CPU backend: so many run at once */
    uint64_t copy_delay_seed;    /* tests: not 0 delays each copy by a random time */
    bool plain;                  /* no instructions that only some processors have */
    void (*lost)(void *context); /* called before a device's fault ends the program, which it does
                                  * not if this does not return; or NULL */
    void *context;
};

struct backend *cpu_backend_open(const struct backend_options *options, char *error);
/* NULL: no GPU that it can use. In a build without nvcc the function itself is NULL. */
__attribute__((weak)) struct backend *cuda_backend_open(const struct backend_options *options,
                                                        char *error);

/* ---- the ledger: what happened, when and why ---- */

/* What happened; and which fields of the event count then, beside its times. */
enum event_kind {
    EVENT_SUBMITTED,   /* request; n: tokens of its prompt */
    EVENT_FOLLOWS,     /* request: it waits for `other` to compute n tokens that they share */
    EVENT_ADMITTED,    /* request; from, to: its prefill and decode worker, and why each; n, n_host:
                        * tokens found cached, and of them on the host alone */
    EVENT_PREEMPTED,   /* request; worker; why */
    EVENT_HANDED_OVER, /* request: its prefill is done; from, to: workers */
    EVENT_FINISHED,    /* request; worker, or -1: it was waiting; n: tokens of its answer; reason;
                        * why: its error, or NULL */
    EVENT_FAILED,      /* worker: what it had is lost */
    EVENT_ROLE,        /* worker; why: what it does from now on */
    EVENT_EVICTED,     /* node; from: a place; why: what is left of it */
    EVENT_COPY_ORDERED, /* node; from, to: places; why */
    EVENT_STEP,         /* worker; step: it is not yet reported to sched_done */
    EVENT_COPY          /* worker; node; from, to: places */
};

struct event {
    enum event_kind kind;
    double start, end;             /* by the driver's clock; the same of a decision */
    const char *why, *why_prefill; /* good until the ledger has returned */
    int64_t request, other;        /* ids */
    int worker, from, to;          /* a place is a worker, or the host: see below */
    int node, n, n_host;
    enum finish_reason reason;
    const struct step *step;
};

/* Who wants to know. Scheduler and cache note what they decide, with times 0: they have no clock.
 * Their driver puts a ledger of its own between, which stamps the time, and notes steps and copies
 * itself: a step before sched_done, a copy before sched_copied. All is noted under the driver's
 * lock, in order: a ledger must be quick, and call nothing that changes anything. (A step may be
 * noted a little after its end. Then the scheduler is not in the midst of anything: who is told of
 * a step may call sched_set_role, as app/auto.h does.) */
struct ledger {
    void (*note)(void *context, const struct event *event); /* NULL: nobody wants to know */
    void *context;
};

static inline void note(const struct ledger *ledger, const struct event *event) {
    if (ledger->note)
        ledger->note(ledger->context, event);
}

/* ---- kvcache.c: where each block is ---- */

/* A *place* is a worker (0 .. n_workers - 1) or the host (n_workers). A *node* is a block's
 * content; it has at most one *copy* at each place, in a *slot* there. */
enum kv_policy { KV_ON_EVICT, KV_WRITE_THROUGH };
enum kv_order { KV_LRU, KV_FIFO, KV_LFU, KV_RANDOM }; /* which copy of a place goes first */
enum kv_state { KV_ABSENT, KV_RESERVED, KV_ARRIVING, KV_VALID };

struct kv_config {
    int n_workers;
    int device_blocks[MAX_WORKERS]; /* slots of each worker */
    int host_blocks;                /* 0: no host tier */
    enum kv_policy policy;
    enum kv_order order;
    struct ledger ledger; /* the scheduler's, too */
};

struct kv_copy_order { /* `worker` copies node from a slot of place `from` to a slot of `to` */
    int worker, node, from, to, from_slot, to_slot;
};

struct kv_stats {
    int64_t pages_out, pages_in, transfers; /* copies completed: to host, from host, peer to peer */
    int64_t evictions, host_evictions;      /* copies dropped to make room */
    int64_t lost;                           /* blocks whose last copy was dropped */
    int64_t unused; /* copies that came to a worker for nobody (what had wanted them was gone), and
                       left it without ever having been pinned */
};

struct kv_usage { /* the slots of a place: all of them, each counted once */
    int free;
    int pinned;    /* in use by requests, reserved or held for them */
    int cached;    /* unpinned: kept for whoever may want them, until they must go */
    int in_flight; /* a copy into them is under way */
};

struct kv;
struct kv *kv_create(const struct kv_config *config); /* NULL: out of memory */
void kv_destroy(struct kv *kv);

/* The hash of a text up to the end of a block: of its BLOCK_TOKENS tokens and the hash of the text
 * before it (0: it is the first). */
uint64_t kv_hash(uint64_t before, const int *tokens);
/* The longest cached prefix: nodes of full blocks equal to tokens[0, 16), [16, 32), …, at most
 * max_blocks of them; hashes (max_blocks) are theirs. Returns their number. Nothing is pinned. */
int kv_find(const struct kv *kv, const uint64_t *hashes, const int *tokens, int max_blocks,
            int *nodes);
/* Blocks that could be taken on `worker` sooner or later, if all unpinned ones are paged out. */
int kv_reclaimable(const struct kv *kv, int worker);
/* A private node with a pinned, writable copy on worker; -1: nothing is available. */
int kv_new(struct kv *kv, int worker);
/* Adds a pinned, still empty copy of a private node on another worker. False: none available. */
bool kv_reserve(struct kv *kv, int node, int worker);
/* Orders the copy that fills a reserved one. False: no place holds the block. */
bool kv_send(struct kv *kv, int node, int worker);
/* Makes a node resident on worker: pins the copy there, or takes a slot and orders a copy from a
 * peer or host. False: no slot is available, or no place holds the block. */
bool kv_fetch(struct kv *kv, int node, int worker);
/* Pins a copy, at any place: it stays there until kv_unpin. One that was arriving on the host and
 * has failed is KV_RESERVED until then. False: there is none. */
bool kv_hold(struct kv *kv, int node, int place);
void kv_unpin(struct kv *kv, int node, int place);
enum kv_state kv_state(const struct kv *kv, int node, int place);
int kv_slot(const struct kv *kv, int node, int worker);
/* The places where a node has a copy, or will when it has arrived, and whether it is pinned there:
 * arrays of MAX_WORKERS + 1. Returns their number. */
int kv_places(const struct kv *kv, int node, int *places, bool *pinned);
/* Registers a private, full node under `parent` (-1: the first block); hash is that of the text up
 * to its end. If the index has the block already, the pins move to it and `node` is gone. Returns
 * the node that now stands for it. */
int kv_register(struct kv *kv, int node, int parent, uint64_t hash, const int *tokens);
/* The owner keeps a private node that it is about to unpin: it stays cached, and *keeper, set to
 * node here, becomes -1 when its last copy is lost, or at kv_unkeep (when fetched again). */
void kv_keep(struct kv *kv, int node, int *keeper);
void kv_unkeep(struct kv *kv, int node);
/* Makes n slots of a worker free: the coldest copies go, those that are nowhere else to the host
 * first (without a host tier, or if all of it is pinned, they are lost). False: not yet. It goes on
 * as copies end, for the most that was asked for and can be reached: ask again when so many are
 * free, or when blocks were unpinned. Nothing goes if n cannot be reached at present. */
bool kv_make_room(struct kv *kv, int worker, int n);
/* The cleaner: orders page-outs so that a few of the coldest blocks can be dropped at once. */
void kv_clean(struct kv *kv, int worker);
/* The next copy for a worker to carry out: those into the worker first, then page-outs. */
bool kv_next_copy(struct kv *kv, int worker, struct kv_copy_order *order);
/* A worker has failed: what its slots hold is void, and so are copies from and to it: orders not
 * yet given out are taken back, the others fail when they are reported. What was nowhere else is
 * lost. Pins stay until they are unpinned; nothing is ordered from or to there any more. */
void kv_lose(struct kv *kv, int worker);
/* It is back, and empty. False: a slot is pinned yet, or in flight. */
bool kv_regain(struct kv *kv, int worker);
bool kv_is_lost(const struct kv *kv, int node);  /* no place holds its content */
int kv_pending(const struct kv *kv, int worker); /* orders that kv_next_copy has not yet given */
void kv_copied(struct kv *kv, const struct kv_copy_order *order, bool ok);
int kv_used(const struct kv *kv, int place); /* slots that are not free */
struct kv_usage kv_usage(const struct kv *kv, int place);
struct kv_stats kv_stats(const struct kv *kv);

/* ---- scheduler.c: who computes what next ---- */

struct sched_config {
    struct kv_config kv;
    bool prefills[MAX_WORKERS], decodes[MAX_WORKERS]; /* the roles of each worker */
    int max_batch;                                    /* answers in one step of a worker */
    int chunk;                                        /* prompt tokens in one step */
    int max_queue;        /* requests that may wait; one more is refused. 0: any number */
    int copies_in_flight; /* blocks that a worker copies at a time */
    int likely_answer;    /* tokens, until answers have ended; 0: as many as is usual */
    int context_length;
    const bool *ends_text; /* (vocab_size) tokens that end an answer */
};

struct step { /* what a worker does next; owned by the scheduler, valid until sched_done */
    struct batch batch;        /* n_rows > 0 */
    struct request **requests; /* (n_sequences) */
};

struct sched_stats {
    int64_t submitted, finished, preemptions, hand_overs; /* hand_overs: requests */
    int64_t prefix_hit_tokens, recomputed_tokens;
    int64_t prefill_tokens, decode_tokens, steps;
    int64_t local_prefills; /* prompts prefilled by the decode worker itself */
    int64_t role_changes;   /* of workers, those by failures included */
};

struct sched;
struct sched *sched_create(const struct sched_config *config); /* NULL: out of memory */
void sched_destroy(struct sched *sched);
struct kv *sched_kv(struct sched *sched);
/* The longest text in tokens: that fits now (0: all workers have failed); that ever fits. */
int sched_max_length(const struct sched *sched);
int sched_longest(const struct sched *sched);
/* All calls are made under one lock of the caller; `now` is in seconds, of any clock that does not
 * go back. A worker that got NULL from sched_next is asked again when sched_concerned names it;
 * sched_copies whenever kv_pending says that there are orders.
 * A request that can never run is finished at once, with FINISH_ERROR and a reason. */
void sched_submit(struct sched *sched, struct request *request, double now);
/* Ends a request as soon as no step holds it: FINISH_CANCELLED, or FINISH_STOP. */
void sched_cancel(struct sched *sched, struct request *request, bool stop_found, double now);
/* The next step of an idle worker; NULL: nothing to compute at present. */
struct step *sched_next(struct sched *sched, int worker, double now);
void sched_done(struct sched *sched, int worker, struct step *step, double now);
/* Copies that a worker may start now, at most `most`, also while a step of it runs: as many as
 * copies_in_flight leaves room for. Returns how many. Each is reported to sched_copied. */
int sched_copies(struct sched *sched, int worker, struct kv_copy_order *orders, int most);
void sched_copied(struct sched *sched, const struct kv_copy_order *order, bool ok, double now);
/* A worker has failed: its memory is gone. What it had goes on elsewhere, from what others and the
 * host hold. Its step, reported or not, is void (and requests that it names may be gone); copies
 * from and to it are reported when they have ended, and have failed then. Those from it to the host
 * may never end, and their slots stay in flight. Where no worker is left that has a role, all that
 * are left have it; without any each request ends with an error. */
void sched_fail(struct sched *sched, int worker, double now);
/* It will fail at a time, or with a step of it (its first is 1; 0: with none), and be back at
 * another time; INFINITY: never. */
void sched_fail_at(struct sched *sched, int worker, double fails, int step, double returns);
bool sched_is_lost(const struct sched *sched, int worker);
/* It is back, and empty. False: a step or copies of it have not yet been reported. */
bool sched_return(struct sched *sched, int worker, double now);
/* Gives a worker another role: what it has it finishes. (--auto does, see app/auto.h.) */
void sched_set_role(struct sched *sched, int worker, bool prefills, bool decodes, double now);
/* The workers that may have a step to compute, and need be woken: one of them with each call, which
 * strikes it off; -1: there are no others. */
int sched_concerned(struct sched *sched);
/* When a deadline runs out, or a worker fails or returns as it was told to, next: sched_expire is
 * to be called then. INFINITY: never. Any call may bring it nearer. */
double sched_next_event(const struct sched *sched);
void sched_expire(struct sched *sched, double now);
/* The ids of requests that are not finished, at most `most` of them; returns how many there are. */
int sched_unfinished(const struct sched *sched, int64_t *ids, int most);
struct sched_load {
    const char *role[MAX_WORKERS];                      /* now: prefill, decode, both or none */
    int prefilling[MAX_WORKERS], decoding[MAX_WORKERS]; /* or will when their blocks are there */
    int waiting, preempted;                             /* new ones; those that lost their blocks */
    int needed; /* the one worker without which texts could not be as long; -1: there is none */
};
struct sched_load sched_load(const struct sched *sched);
struct sched_stats sched_stats(const struct sched *sched);

/* ---- dynamo.c: an open engine, a model on its devices with both tiers of KV blocks ---- */

struct engine_config {
    const struct model *model; /* open; model, backend and ends_text outlive the engine */
    struct backend *backend;
    const bool *ends_text; /* (vocab_size) tokens that end an answer */
    int n_workers;
    struct {
        int devices[MAX_SHARDS]; /* (n_shards) the index of each */
        int n_shards;            /* a block of a worker of several is as many times smaller */
        int blocks;              /* that each of its devices holds; -1: chosen */
        bool prefills, decodes;
    } workers[MAX_WORKERS];
    int max_batch, chunk, max_queue; /* see struct sched_config */
    int host_blocks;                 /* that the host holds; -1: chosen */
    enum kv_type kv_type;
    enum kv_policy policy;
    struct ledger ledger;                          /* its times are of engine_now */
    bool verbose;                                  /* a line on stderr if memory is not pinned */
    void (*progress)(int64_t done, int64_t total); /* of loading; NULL: nobody asks */
};

struct pace { /* steps of one kind: of prompts, or of generated tokens */
    int64_t tokens;
    double seconds, bytes, operations; /* read and computed at least; a multiply-add is two */
};

/* What a model asks of a step: the bytes of all matrices but those of experts, which it reads once,
 * and of all experts, of which it reads those that its rows choose; the weights by which each row,
 * and each sample, is multiplied. */
struct model_cost {
    double bytes, expert_bytes, row_weights, sample_weights;
};

/* What a step reads and computes at least, on all devices of its worker. */
struct step_cost {
    int n_generated; /* sequences whose row is a generated token */
    double bytes, operations;
};

struct engine_stats {
    struct sched_stats sched;
    struct kv_stats kv;
    struct pace prefill, decode;             /* steps with rows of both kinds count for neither */
    struct kv_usage places[MAX_WORKERS + 1]; /* blocks of the workers, then of the host */
};

struct engine;
/* Loads the weights and takes both tiers; no thread runs yet. NULL: `error` is one line. */
struct engine *engine_open(const struct engine_config *config, char *error);
bool engine_start(struct engine *engine); /* starts the workers' threads; false: it cannot */
/* Ends them; NULL: nothing is done. False: a device is lost, so its memory stays, and the backend
 * cannot be closed: the program must end. */
bool engine_close(struct engine *engine);
/* As it was given, with the numbers of blocks that were chosen. */
const struct engine_config *engine_config_of(const struct engine *engine);
/* Requests are submitted and read under the lock. engine_wait lets go of it until something has
 * changed, someone called engine_wake, or it is `until` by engine_now (INFINITY: never).
 * engine_wake is called after sched_submit and sched_cancel, with the lock held: it wakes the
 * workers whom that concerns. */
void engine_lock(struct engine *engine);
void engine_unlock(struct engine *engine);
struct sched *engine_sched(struct engine *engine);
void engine_wait(struct engine *engine, double until);
void engine_wake(struct engine *engine);
double engine_now(void); /* seconds; the clock of requests' times */
struct engine_stats engine_stats(struct engine *engine);
/* What the devices of the first worker reach at most, measured now: see `limits` above. */
void engine_limits(struct engine *engine, double *read, double *ops);
/* Logits (n, vocab_size) of tokens [start, start + n) of a text, whose rows [0, start) were
 * computed by such calls before; n is at most `chunk`. Goes around the scheduler: before
 * engine_start. Returns how many rows come before the first that has no probabilities. */
int engine_logits(struct engine *engine, const int *tokens, int start, int n, float *logits);
/* The scheduler that a configuration stands for, of which all numbers of blocks are known. */
struct sched_config engine_sched_config(const struct engine_config *config);
struct model_cost model_cost(const struct model *model);
struct step_cost step_cost(const struct model_config *config, const struct model_cost *cost,
                           enum kv_type kv_type, const struct batch *batch);
/* For backend_options.lost: in a thread of the engine it does not return, and all workers of the
 * device's GPU are lost, see sched_fail. Else it names the requests that end with the program. */
void engine_tell_lost(struct engine *engine);

/* ---- small things that several files need ---- */

/* What both backends ask before they open a device: whether the model can be cut so. False: `error`
 * says what does not divide. (kernels.c) */
bool device_fits(const struct device *wanted, char *error);
/* Memory of this machine, at a border of pages, huge ones where it can be, to be freed by free; it
 * takes none before it is written. NULL: no room. (kernels.c) */
void *host_alloc(size_t bytes);

static inline int blocks_of(int n_tokens) { /* blocks that hold so many tokens */
    return (n_tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
}

static inline size_t kv_element_bytes(enum kv_type type) {
    return type == KV_F32 ? 4 : 2;
}

/* Elements that a head has in a block: in bf16 head_dim is padded to what tensor cores take. */
static inline int kv_head_dim(const struct model_config *config, enum kv_type type) {
    int dim = config->head_dim;
    return type == KV_F32 ? dim : dim <= 64 ? 64 : dim <= 128 ? 128 : 256;
}

/* Bytes of one block of a shard: [n_layers][k, v][n_kv_heads / n_shards][BLOCK_TOKENS][head_dim],
 * head_dim that of kv_head_dim. Within a head's part the order is the backend's. */
static inline size_t block_bytes(const struct model_config *config, int n_shards,
                                 enum kv_type type) {
    return (size_t)config->n_layers * 2 * (size_t)(config->n_kv_heads / n_shards) * BLOCK_TOKENS *
           (size_t)kv_head_dim(config, type) * kv_element_bytes(type);
}

#endif /* DYNAMO_H */
