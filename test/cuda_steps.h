/* cuda_steps.h: whole steps of the CUDA backend, and sampling. Part of test_cuda.cu.
 *
 * A row's bits depend on its own text alone: the same alone, in crowds, in chunks, on one shard or
 * eight, in a recorded step or a replayed one. Draws are compared with sampler_draw's, and with the
 * definition in lib/sampler.h where those two differ by rounding. */
#ifndef CUDA_STEPS_H
#define CUDA_STEPS_H
#include "cuda_worker.h"

/* ---- the same bits, however the work is cut ---- */

static struct sampling warm(uint64_t seed_of_draw) {
    struct sampling sampling = {0.9f, 0.95f, 0.0f, 0, seed_of_draw};
    return sampling;
}

struct story { /* a text: [0, n_prompt) is a prompt, the rest is generated */
    std::vector<int> text;
    int n_prompt;
};

static struct story draw_story(struct random *random, int n_prompt, int n_generated, int vocab) {
    struct story story = {{}, n_prompt};
    for (int i = 0; i < n_prompt + n_generated; i++)
        story.text.push_back(below(random, vocab));
    return story;
}

/* Others that share a step, with blocks of their own, slots[*used] and on, that may hold anything.
 * Generated ones come first in a step. */
static void add_crowd(struct test_batch *batch, struct random *random, const struct story &story,
                      const std::vector<int> &slots, size_t *used, int n, bool generated) {
    int length = (int)story.text.size();
    for (int i = 0; i < n; i++) {
        int begin = below(random, below(random, 2) ? length : std::min<int>(length, BLOCK_TOKENS));
        int end = generated ? begin + 1 : between(random, begin + 1, length);
        if (*used + (size_t)blocks_of(end) > slots.size())
            break;
        add_text(batch, story.text.data(), &slots[*used], begin, end, generated);
        *used += (size_t)blocks_of(end);
    }
}

/* Tells a story in steps of up to `chunk` prompt tokens among up to `crowd` others. Returns the
 * logits of each step's last own row, and the tokens drawn. */
static std::vector<float> tell(struct worker *worker, struct random *random,
                               const struct story &story, int chunk, int crowd) {
    struct cuda_device *d = cuda_of(worker->shards[0]);
    int vocab = d->device.config->vocab_size, end = (int)story.text.size();
    std::vector<int> slots = shuffled(random, KV_BLOCKS);
    std::vector<float> told;
    for (int at = 0; at < end;) {
        bool generated = at >= story.n_prompt;
        int next = generated ? at + 1 : std::min(story.n_prompt, at + between(random, 1, chunk));
        int n = below(random, crowd + 1), before = below(random, n + 1);
        size_t used = (size_t)blocks_of(end); /* the first blocks are the story's */
        struct test_batch batch;
        add_crowd(&batch, random, story, slots, &used, before, true);
        if (!generated)
            add_crowd(&batch, random, story, slots, &used, (n - before) / 4, false);
        int row = (int)batch.token.size() + next - at - 1;
        add_text(&batch, story.text.data(), slots.data(), at, next, generated);
        add_crowd(&batch, random, story, slots, &used, generated ? n - before : (n - before) / 8,
                  generated);
        int sample = 0, n_rows = (int)batch.token.size();
        for (int i = 0; i < n_rows; i++)
            if (i == row || (n_rows <= LOGIT_ROWS && generated)) {
                sample = i == row ? (int)batch.sample_row.size() : sample;
                add_sample(&batch, i, warm(7));
            }
        forward(worker, seal(&batch));
        std::vector<float> logits =
            peek(&d->device, d->logits + (size_t)sample * d->logits_stride, (size_t)vocab);
        if (generated || next == story.n_prompt) {
            told.insert(told.end(), logits.begin(), logits.end());
            told.push_back((float)batch.sampled[sample]);
        }
        at = next;
    }
    return told;
}

static bool same_bits(const std::vector<float> &a, const std::vector<float> &b) {
    return a.size() == b.size() && !memcmp(a.data(), b.data(), a.size() * sizeof a[0]);
}

/* A row's bits depend on its role and its own text alone. */
static void rows_alone_and_in_crowds(struct check *check) {
    struct random random = start("crowds");
    for (int i = 0; i < (SLOWER ? 1 : 2); i++) {
        enum tensor_type type = i == 0 ? TYPE_F32 : pick(&random, all_types);
        struct model_config config = draw_config(&random, form_of(type).n_k, 1);
        struct test_model *model = make_model(&random, config, like_types(type));
        struct worker worker = open_worker(open_backend(), model, 1, 600);
        struct story story =
            draw_story(&random, between(&random, 2, SLOWER ? 20 : 40), 4, config.vocab_size);
        std::vector<float> alone = tell(&worker, &random, story, 100, 0);
        for (float value : alone)
            CHECK(value == value, "logits are numbers");
        static const int cuts[][2] = {{9, 3}, {100, 12}, {30, 80}}; /* chunk, crowd */
        for (const int *cut : cuts) {
            emu_seed(word(&random));
            std::vector<float> told = tell(&worker, &random, story, cut[0], cut[1]);
            CHECK(same_bits(told, alone), "type %d, %d tokens: chunks of %d among %d", (int)type,
                  (int)story.text.size(), cut[0], cut[1]);
        }
        close_worker(&worker);
        free_model(model);
    }
}

/* Steps with prompts of several pieces (CHAIN_ROWS) and more generated rows than shards add up at
 * once. Returns x and the logits after each. */
static std::vector<float> step_shards(struct check *check, struct random random,
                                      struct worker *worker, int n_rows) {
    struct cuda_device *d = cuda_of(worker->shards[0]);
    std::vector<int> slots = shuffled(&random, KV_BLOCKS), text((size_t)n_rows + 60);
    std::vector<float> out;
    int texts = between(&random, 30, 44), rows = n_rows - texts;
    for (int &token : text)
        token = below(&random, d->device.config->vocab_size);
    for (int step = 0; step < 2; step++) {
        struct test_batch batch;
        for (int i = 0; i < (step ? texts : 4); i++) /* of these four have a token before */
            add_text(&batch, &text[i], &slots[i], i < 4 ? step : 0, i < 4 ? step + 1 : 1, step > 0);
        int begin = step ? rows : 0, end = step ? rows + 11 : rows;
        add_text(&batch, text.data(), &slots[texts], begin, end, false);
        for (int i = 0; i < 9; i++)
            add_sample(&batch, below(&random, (int)batch.token.size()), warm(word(&random)));
        forward(worker, seal(&batch));
        size_t n = batch.token.size() * (size_t)d->x_stride;
        std::vector<float> x = peek(&d->device, d->x, n);
        std::vector<float> logits = peek(&d->device, d->logits, 9 * (size_t)d->logits_stride);
        for (int s = 1; s < worker->n_shards; s++)
            CHECK(same_bits(x, peek(worker->shards[s], cuda_of(worker->shards[s])->x, n)),
                  "step %d: x of shard %d of %d", step, s, worker->n_shards);
        out.insert(out.end(), x.begin(), x.end());
        out.insert(out.end(), logits.begin(), logits.end());
        for (int i = 0; i < 9; i++)
            out.push_back((float)batch.sampled[i]);
    }
    return out;
}

static void shards(struct check *check) {
    struct random random = start("shards");
    for (int i = 0; i < (SLOWER ? 1 : 2); i++) {
        enum tensor_type type = all_types[(int)(seed % N_TYPES + i) % N_TYPES];
        struct model_config config = draw_config(&random, form_of(type).n_k, 8);
        int step = form_of(type).n_k > 16 ? form_of(type).n_k : 16;
        config.d_ff = divide(config.d_ff, step) * step;
        config.n_layers = 1;
        struct test_model *model = make_model(&random, config, like_types(type));
        int n_rows = between(&random, CHAIN_ROWS + 50, CHAIN_ROWS + 80);
        std::vector<float> one;
        struct random same = random; /* draws for each number of shards */
        for (int n_shards = 1; n_shards <= MAX_SHARDS; n_shards *= SLOWER ? 8 : 2) {
            emu_seed(word(&random));
            struct worker worker = open_worker(open_backend(), model, n_shards, n_rows);
            std::vector<float> bits = step_shards(check, same, &worker, n_rows);
            one = n_shards == 1 ? bits : one;
            CHECK(same_bits(bits, one), "type %d, d_ff %d, %d heads of %d: %d shards", (int)type,
                  config.d_ff, config.n_heads, config.head_dim, n_shards);
            close_worker(&worker);
        }
        for (float value : one)
            CHECK(value == value, "x and logits are numbers");
        free_model(model);
    }
}

/* ---- recorded steps ---- */

/* Which elements of the keys and values a batch of generated rows writes. */
static std::vector<bool> own_elements(const struct model_config *c,
                                      const struct test_batch &batch) {
    std::vector<bool> own(kv_elements(c));
    for (const struct sequence &s : batch.sequence)
        for (int layer = 0; layer < c->n_layers; layer++)
            for (int at = 0; at < 2 * c->n_kv_heads * c->head_dim; at++)
                own[kv_at(c, batch.table[s.first_block + s.start / BLOCK_TOKENS], layer, at % 2,
                          at / 2 % c->n_kv_heads, s.start % BLOCK_TOKENS, at / 2 / c->n_kv_heads)] =
                    true;
    return own;
}

/* Generated rows, all sampled: a step that is recorded. The first n_long are of texts as long as
 * `longest`, which share all blocks but the last. */
static void add_decode(struct test_batch *batch, struct random *random, int n, int n_long,
                       int longest, int vocab) {
    std::vector<int> slots = shuffled(random, KV_BLOCKS), text((size_t)longest + BLOCK_TOKENS);
    int own = blocks_of(longest) - 1; /* the next block that nobody has */
    for (int i = 0; i < n; i++) {
        int length = i < n_long ? longest : between(random, 1, BLOCK_TOKENS);
        std::vector<int> table(slots.begin(), slots.begin() + blocks_of(length));
        need(own < KV_BLOCKS, "blocks for all texts");
        table.back() = slots[own++];
        text[length - 1] = below(random, vocab);
        add_text(batch, text.data(), table.data(), length - 1, length, true);
        add_sample(batch, i, warm(word(random)));
    }
}

/* A step without ops whose lists need much room, but no splits. */
static void make_room(struct worker *worker) {
    struct test_batch batch;
    std::vector<int> text(2001), slots(blocks_of(2001));
    for (int i = 0; i < 30; i++)
        add_text(&batch, text.data(), slots.data(), 2000, 2001, false);
    worker->backend->step_begin(worker->shards[0], seal(&batch));
    worker->backend->step_end(worker->shards[0], NULL);
}

struct decoded {
    bool ran; /* false: replayed */
    std::vector<float> logits;
    std::vector<uint16_t> kv;
};

static struct decoded decode(struct worker *worker, struct test_batch *batch,
                             const std::vector<uint16_t> &kv) {
    struct device *device = worker->shards[0];
    struct cuda_device *d = cuda_of(device);
    poke(device, (uint16_t *)device->kv, kv);
    bool ran = forward(worker, seal(batch));
    size_t n = batch->token.size() * (size_t)d->logits_stride;
    return {ran, peek(device, d->logits, n), peek(device, (uint16_t *)device->kv, kv.size())};
}

/* Steps of other sizes and lengths on one device, each against a device that has recorded nothing.
 */
static void recorded_steps(struct check *check) {
    struct random random = start("recorded");
    struct model_config config = draw_config(&random, 1, 1);
    struct test_model *model = make_model(&random, config, like_types(TYPE_BF16));
    struct worker worker = open_worker(open_backend(), model, 1, 70);
    struct cuda_device *d = cuda_of(worker.shards[0]);
    /* rows of each step, and how many are of a long text: more rows and splits need more room, and
     * what was recorded is void; after make_room it is the splits alone that need it */
    static const int rows[][2] = {{8, 0}, {1, 1}, {5, 2},   {24, 1}, {13, 0},
                                  {9, 0}, {3, 1}, {12, 12}, {6, 6},  {40, 1}};
    int replays = 0, growths = 0;
    for (int i = 0; i < 10; i++) {
        struct test_batch batch;
        bool grows = i == 3 || i == 7;
        if (i == 6)
            make_room(&worker);
        add_decode(&batch, &random, rows[i][0], rows[i][1], grows ? 1792 : between(&random, 1, 500),
                   config.vocab_size);
        std::vector<uint16_t> kv(kv_elements(&config));
        for (uint16_t &element : kv)
            element = bf16_of(normal(&random));
        emu_seed(word(&random));
        size_t step_bytes = d->step_bytes, capacity = d->split_capacity;
        struct decoded got = decode(&worker, &batch, kv);
        std::vector<int> sampled = batch.sampled;
        replays += !got.ran;
        growths += i == 3 && d->step_bytes > step_bytes && d->split_capacity > capacity;
        growths += i == 7 && d->step_bytes == step_bytes && d->split_capacity > capacity;
        struct worker fresh = open_worker(open_backend(), model, 1, 70);
        struct decoded expected = decode(&fresh, &batch, kv);
        close_worker(&fresh);
        CHECK(expected.ran, "a device's first step is no replay");
        CHECK(same_bits(got.logits, expected.logits) && got.kv == expected.kv &&
                  sampled == batch.sampled,
              "step %d of %d rows, %s", i, rows[i][0], got.ran ? "recorded" : "replayed");
        std::vector<bool> own = own_elements(&config, batch);
        size_t strange = 0;
        while (strange < kv.size() && (own[strange] || got.kv[strange] == kv[strange]))
            strange++;
        CHECK(strange == kv.size(), "step %d of %d rows wrote to element %zu of others' blocks", i,
              rows[i][0], strange);
    }
    CHECK(replays >= 2 && growths == 2, "%d replays, %d growths", replays, growths);
    close_worker(&worker);
    free_model(model);
}

/* Tokens drawn for rows [first, end) of a prompt that is only embedded, and their logits. */
static std::vector<int> draw_samples(struct worker *worker, const std::vector<int> &text,
                                     const std::vector<struct sampling> &sampling, int first,
                                     int end, std::vector<float> *logits) {
    struct device *device = worker->shards[0];
    struct test_batch batch;
    std::vector<int> slots(KV_BLOCKS);
    add_text(&batch, text.data(), slots.data(), 0, (int)text.size(), false);
    for (int i = first; i < end; i++)
        add_sample(&batch, i, sampling[i]);
    logits->resize((size_t)(end - first) * (size_t)device->config->vocab_size);
    worker->backend->step_begin(device, seal(&batch));
    worker->backend->embed(device, worker->layers[0][0][TOKEN_EMBD]);
    worker->backend->sample(device, worker->layers[0][0], logits->data());
    worker->backend->step_end(device, batch.batch.sampled);
    batch.sampled.pop_back();
    return batch.sampled;
}

/* More samples than logits are kept of: they are computed in pieces. */
static void many_samples(struct check *check) {
    struct random random = start("many samples");
    struct model_config config = draw_config(&random, 1, 1);
    struct test_model *model = make_model(&random, config, like_types(TYPE_BF16));
    int n = LOGIT_ROWS + between(&random, 1, LOGIT_ROWS + 20), vocab = config.vocab_size;
    struct worker worker = open_worker(open_backend(), model, 1, n);
    std::vector<int> text((size_t)n);
    std::vector<struct sampling> sampling;
    for (int &token : text) {
        token = below(&random, vocab);
        sampling.push_back(warm(word(&random)));
    }
    std::vector<float> logits, some;
    std::vector<int> sampled = draw_samples(&worker, text, sampling, 0, n, &logits);
    for (int first = 0, end; first < n; first = end) {
        end = between(&random, first + 1, std::min<int>(n, first + LOGIT_ROWS));
        std::vector<int> alone = draw_samples(&worker, text, sampling, first, end, &some);
        CHECK(!memcmp(&logits[(size_t)first * vocab], some.data(), some.size() * sizeof(float)),
              "logits of samples %d to %d of %d", first, end, n);
        CHECK(std::equal(alone.begin(), alone.end(), sampled.begin() + first),
              "samples %d to %d of %d", first, end, n);
    }
    close_worker(&worker);
    free_model(model);
}

/* ---- sampling ---- */

static float tempered(float logit, float temperature) { /* what is no number is the least one */
    float value = logit / (temperature > 0.0f ? temperature : 1.0f);
    return value >= -FLT_MAX ? std::min(value, FLT_MAX) : -FLT_MAX;
}

static double noisy(const struct sampling &sampling, int position, int token, float scaled) {
    uint32_t words[4] = {(uint32_t)position, (uint32_t)token, 0, 0};
    philox(words, (uint32_t)sampling.seed, (uint32_t)(sampling.seed >> 32));
    return scaled - log(-log(((double)words[0] + 0.5) * 0x1p-32));
}

/* Can `token` be drawn, by lib/sampler.h's definition? Where rounding decides whether a token is
 * among those that reach top_p, both answers are right. `slack`: of sums of weights. */
static bool can_be_drawn(const struct sampling &sampling, int position, const float *logits, int n,
                         int token, double slack) {
    std::vector<float> scaled((size_t)n);
    std::vector<int> order((size_t)n);
    for (int i = 0; i < n; i++) {
        scaled[i] = tempered(logits[i], sampling.temperature);
        order[i] = i;
    }
    std::stable_sort(order.begin(), order.end(),
                     [&](int a, int b) { return scaled[a] > scaled[b]; });
    if (!(sampling.temperature > 0.0f))
        return token == order[0];
    int kept = sampling.top_k > 0 && sampling.top_k < n ? sampling.top_k : n;
    double max = scaled[order[0]], total = 0.0, before = 0.0;
    for (int i = 0; i < kept; i++)
        total += exp(scaled[order[i]] - max);
    double least = sampling.min_p > 0.0f ? max + log((double)sampling.min_p) : -INFINITY;
    double enough = sampling.top_p < 1.0f ? sampling.top_p * total : INFINITY;
    double best = -INFINITY; /* of those that are kept for sure */
    bool possible = false;
    int best_token = n;
    for (int i = 0; i < kept && (i == 0 || before < enough + slack * total); i++) {
        int id = order[i];
        bool sure = i == 0 || before < enough - slack * total;
        before += exp(scaled[id] - max);
        if (scaled[id] < least)
            continue;
        possible |= id == token;
        double value = noisy(sampling, position, id, scaled[id]);
        if (sure && (value > best || (value == best && id < best_token))) {
            best = value;
            best_token = id;
        }
    }
    double value = noisy(sampling, position, token, scaled[token]);
    if (value == best) /* of equals the lower id */
        return possible && token <= best_token;
    return possible && value > best - 1e-12 * fabs(best);
}

static float draw_logit(struct random *random, int kind, float width) {
    float value = width * normal(random);
    static const float odd[] = {NAN, INFINITY, -INFINITY, 3e38f, -3e38f, 1e-40f};
    if (kind == 1) /* ties are common */
        return floorf(value);
    if (kind == 2 && below(random, 4) == 0)
        return pick(random, odd);
    if (kind == 3) /* nothing else than these */
        return odd[below(random, 3)];
    return kind == 4 ? 1.0f : value;
}

static struct sampling draw_sampling(struct random *random, int n) {
    static const float temperatures[] = {0.0f, 1e-3f, 0.5f, 0.8f, 1.0f, 3.0f};
    static const float tops[] = {0.0f, 1e-6f, 0.1f, 0.5f, 0.95f, 0.999999f, 1.0f, 1.0f};
    static const float least[] = {0.0f, 0.0f, 0.05f, 1.0f};
    const int counts[] = {0, 0, 1, 2, n / 3, n - 1, n, n + 1, 1000};
    struct sampling sampling = {pick(random, temperatures), pick(random, tops), pick(random, least),
                                pick(random, counts), (uint64_t)word(random) << 32 | word(random)};
    return sampling;
}

struct draws { /* how many, and in how many the device and its twin do not agree */
    int all, different;
};

static void check_sampler(struct check *check, struct random *random, struct device *device,
                          int n_rows, struct draws *draws) {
    struct cuda_device *d = cuda_of(device);
    int n = device->config->vocab_size, kind = below(random, 7);
    std::vector<float> logits((size_t)n_rows * d->logits_stride, NAN), scaled((size_t)n);
    std::vector<int> list((size_t)n), text(1), slots(1);
    struct test_batch batch;
    for (int i = 0; i < n_rows; i++) {
        float width = (float)between(random, 1, 7);
        for (int j = 0; j < n; j++)
            logits[(size_t)i * d->logits_stride + j] = draw_logit(random, kind, width);
        add_text(&batch, text.data(), slots.data(), 0, 1, false);
        batch.position[i] = below(random, 1 << 20);
        add_sample(&batch, i, draw_sampling(random, n));
    }
    std::vector<int> sampled = in_orders(
        check, "sample",
        [&] {
            device->backend->step_begin(device, seal(&batch));
            poke(device, d->logits, logits);
            draw_tokens(d, 0, n_rows);
            device->backend->step_end(device, batch.batch.sampled);
        },
        [&] { return batch.sampled; });
    for (int i = 0; i < n_rows; i++) {
        const struct sampling &s = batch.sampling[i];
        const float *row = &logits[(size_t)i * d->logits_stride];
        int position = batch.position[i] + 1, token = sampled[i];
        int twin = sampler_draw(&s, position, row, n, scaled.data(), list.data());
        draws->all++;
        draws->different += token != twin;
        bool right = token >= 0 && token < n && can_be_drawn(s, position, row, n, token, 1e-6) &&
                     (token == twin || can_be_drawn(s, position, row, n, twin, 1e-4));
        CHECK(right, "%d of %d, the twin %d: kind %d, t %g, p %g, min_p %g, k %d, seed %llu", token,
              n, twin, kind, (double)s.temperature, (double)s.top_p, (double)s.min_p, s.top_k,
              (unsigned long long)s.seed);
    }
}

static void sampling(struct check *check) {
    struct random random = start("sampling");
    const int sizes[] = {1, 2, 300, between(&random, 3, 1100), 33000};
    struct draws draws = {};
    for (int n : sizes) {
        struct model_config config = draw_config(&random, 1, 1);
        config.rope_dim = 0;
        config.vocab_size = n;
        struct device wanted = wanted_device(&config, NULL, 0, 1, LOGIT_ROWS);
        struct device *device = open_device(open_backend(), &wanted, 1);
        struct backend *backend = device->backend;
        for (int i = 0; i < (SLOWER ? 1 : n > 2000 ? 2 : 7); i++)
            check_sampler(check, &random, device, n > 2000 ? 4 : LOGIT_ROWS, &draws);
        close_device(device);
        backend->close(backend);
    }
    CHECK(draws.different * 200 <= draws.all, "%d of %d draws are not the twin's", draws.different,
          draws.all);
}
#endif /* CUDA_STEPS_H */
