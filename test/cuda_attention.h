/* cuda_attention.h: embedding, rope and attention of the CUDA backend. Part of test_cuda.cu.
 *
 * Keys and values lie in blocks in random order; where no token is, they are NaN. */
#ifndef CUDA_ATTENTION_H
#define CUDA_ATTENTION_H
#include "cuda_worker.h"

/* ---- embedding and rope ---- */

static void embedding(struct check *check) {
    struct random random = start("embedding");
    for (enum tensor_type type : all_types) {
        struct model_config config = draw_config(&random, form_of(type).n_k, 1);
        struct test_model *model = make_model(&random, config, like_types(type));
        int n = between(&random, 1, 30), pairs = config.rope_dim / 2;
        struct worker worker = open_worker(open_backend(), model, 1, n + 2);
        struct device *device = worker.shards[0];
        struct cuda_device *d = cuda_of(device);
        struct test_batch batch;
        std::vector<int> text((size_t)n), slots((size_t)n);
        add_text(&batch, text.data(), slots.data(), 0, n, false);
        for (int i = 0; i < n; i++) {
            batch.token[i] = below(&random, config.vocab_size);
            batch.position[i] = below(&random, 1 << between(&random, 1, 20));
        }
        worker.backend->step_begin(device, seal(&batch));
        size_t n_turns = (size_t)n * (size_t)pairs;
        std::vector<float> x = in_orders(
            check, "embed",
            [&] {
                poison(device, d->x, (size_t)n + 2, d->x_stride, d->x_stride);
                poison(device, (float *)d->turn, (size_t)n + 2, 2 * pairs, 2 * pairs);
                worker.backend->embed(device, worker.layers[0][0][TOKEN_EMBD]);
            },
            [&] { return peek(device, d->x, ((size_t)n + 2) * d->x_stride); });
        const struct matrix &m = worker.layers[0][0][TOKEN_EMBD]->matrix;
        std::vector<float> table = elements(device, m),
                           turn = peek(device, (float *)d->turn, 2 * n_turns);
        struct worst worst = {};
        for (int row = 0; row < n; row++) {
            CHECK(!memcmp(&x[(size_t)row * d->x_stride],
                          &table[(size_t)batch.token[row] * m.n_units * UNIT],
                          (size_t)config.d_model * sizeof(float)),
                  "embed: type %d, token %d", (int)type, batch.token[row]);
            for (int i = 0; i < pairs; i++) {
                double angle = (double)batch.position[row] * (double)model->frequency[i];
                const float *got = &turn[2 * ((size_t)row * pairs + i)];
                compare(&worst, row, i, got[0], cos(angle), 1e-7);
                compare(&worst, row, i, got[1], sin(angle), 1e-7);
            }
        }
        for (size_t i = (size_t)n * d->x_stride; i < x.size(); i++)
            CHECK(x[i] != x[i], "embed wrote behind the last row");
        CHECK_WORST(worst, "angles of %d pairs", pairs);
        worker.backend->step_end(device, NULL);
        close_worker(&worker);
        free_model(model);
    }
}

/* Texts with blocks of their own, in random order: generated tokens, then parts of prompts. */
static void add_texts(struct test_batch *batch, struct random *random, int n_generated,
                      int n_prompts, int longest) {
    std::vector<int> slots = shuffled(random, KV_BLOCKS), text((size_t)longest + 64);
    size_t used = 0;
    for (int i = 0; i < n_generated + n_prompts; i++) {
        bool generated = i < n_generated;
        int begin = between(random, 0, longest - 1);
        int end = generated ? begin + 1 : between(random, begin + 1, longest);
        if (!generated && below(random, 2))
            begin = 0;
        if (used + (size_t)blocks_of(end) > KV_BLOCKS)
            break;
        add_text(batch, text.data(), &slots[used], begin, end, generated);
        used += (size_t)blocks_of(end);
    }
}

/* Where an element of a key (value 0) or value (1) lies: the layout of dynamo.h, spelt out. */
static size_t kv_at(const struct model_config *c, int slot, int layer, int value, int head,
                    int token, int i) {
    size_t at = (size_t)slot * c->n_layers + layer;
    at = (at * 2 + value) * c->n_kv_heads + head;
    at = at * BLOCK_TOKENS * c->head_dim; /* keys (16, dim), values (dim, 16) */
    return at + (size_t)(value ? i * BLOCK_TOKENS + token : token * c->head_dim + i);
}

static size_t kv_elements(const struct model_config *c) {
    return KV_BLOCKS * block_bytes(c, 1, KV_BF16) / sizeof(uint16_t);
}

/* A head of q or k, normed if there is a norm, and turned. */
static std::vector<double> reference_rope(const struct model_config *c, const float *frequency,
                                          const float *head, const struct tensor *norm,
                                          int position) {
    std::vector<double> in(head, head + c->head_dim);
    double squares = 0.0;
    for (double value : in)
        squares += value * value;
    for (int i = 0; i < c->head_dim && norm; i++)
        in[i] = in[i] / sqrt(squares / c->head_dim + c->norm_epsilon) * element(norm, 0, i);
    std::vector<double> out = in;
    for (int i = 0; i < c->rope_dim / 2; i++) {
        int a = c->rope_adjacent ? 2 * i : i;
        int b = c->rope_adjacent ? a + 1 : a + c->rope_dim / 2;
        double angle = position * (double)frequency[i];
        out[a] = in[a] * cos(angle) - in[b] * sin(angle);
        out[b] = in[a] * sin(angle) + in[b] * cos(angle);
    }
    return out;
}

struct rope_case {
    struct model_config config;
    float frequency[128];
    const struct tensor *q_norm, *k_norm; /* or NULL */
    struct device *device;
    struct test_batch batch;
    std::vector<float> qkv;
};

/* q as the device has it, and keys and values in their blocks, where nothing else has changed. */
static void check_rope(struct check *check, const struct rope_case &r, int layer,
                       const std::vector<uint16_t> &q, const std::vector<uint16_t> &kv) {
    const struct model_config *c = &r.config;
    int stride = cuda_of(r.device)->qkv_stride;
    std::vector<bool> written(kv.size());
    struct worst worst_q = {}, worst_kv = {};
    for (int row = 0; row < (int)r.batch.token.size(); row++) {
        const struct sequence &s = r.batch.sequence[r.batch.row_sequence[row]];
        int position = r.batch.position[row];
        int slot = r.batch.table[s.first_block + position / BLOCK_TOKENS];
        for (int head = 0; head < c->n_heads + 2 * c->n_kv_heads; head++) {
            const float *from = &r.qkv[(size_t)row * stride + (size_t)head * c->head_dim];
            int kv_head = head - c->n_heads, value = kv_head >= c->n_kv_heads;
            const struct tensor *norm = kv_head < 0 ? r.q_norm : r.k_norm;
            std::vector<double> expected(from, from + c->head_dim);
            if (!value)
                expected = reference_rope(c, r.frequency, from, norm, position);
            for (int i = 0; i < c->head_dim; i++) {
                size_t at = kv_at(c, slot, layer, value, kv_head - value * c->n_kv_heads,
                                  position % BLOCK_TOKENS, i);
                if (kv_head < 0)
                    at = ((size_t)row * c->n_heads + head) * c->head_dim + i;
                else
                    written[at] = true;
                compare(kv_head < 0 ? &worst_q : &worst_kv, row, head * c->head_dim + i,
                        from_bf16(kv_head < 0 ? q[at] : kv[at]), expected[i],
                        0x1.01p-8 * fabs(expected[i]) + 3e-6);
            }
        }
    }
    size_t strange = 0;
    while (strange < kv.size() && (written[strange] || kv[strange] == 0xffff))
        strange++;
    CHECK(strange == kv.size(), "rope_append wrote to element %zu, which has no token", strange);
    CHECK_WORST(worst_q, "q of heads of %d, %d turned", c->head_dim, c->rope_dim);
    CHECK_WORST(worst_kv, "k and v of heads of %d, %d turned", c->head_dim, c->rope_dim);
}

static void run_rope(struct check *check, struct random *random, struct rope_case *r) {
    struct device *device = r->device;
    struct cuda_device *d = cuda_of(device);
    int n = (int)r->batch.token.size(), pairs = r->config.rope_dim / 2, layer = below(random, 2);
    const struct weight *weights[N_ROLES] = {};
    weights[ATTN_Q_NORM] = upload(device, r->q_norm, SLICE_WHOLE);
    weights[ATTN_K_NORM] = upload(device, r->k_norm, SLICE_WHOLE);
    device->backend->step_begin(device, seal(&r->batch));
    std::vector<float2> turn;
    for (int row = 0; row < n; row++)
        for (int i = 0; i < pairs; i++) {
            double angle = (double)r->batch.position[row] * (double)r->frequency[i];
            turn.push_back(make_float2((float)cos(angle), (float)sin(angle)));
        }
    r->qkv.resize((size_t)n * d->qkv_stride);
    for (float &value : r->qkv)
        value = normal(random);
    poke(device, d->turn, turn);
    poke(device, d->qkv, r->qkv);
    size_t n_q = (size_t)n * r->config.n_heads * r->config.head_dim;
    std::vector<uint16_t> nans(kv_elements(&r->config), 0xffff);
    std::vector<uint16_t> both = in_orders(
        check, "rope_append",
        [&] {
            poke(device, (uint16_t *)device->kv, nans);
            poke(device, d->q, std::vector<uint16_t>(n_q, 0xffff));
            device->backend->rope_append(device, weights, layer);
        },
        [&] {
            std::vector<uint16_t> out = peek(device, d->q, n_q);
            std::vector<uint16_t> kv = peek(device, (uint16_t *)device->kv, nans.size());
            out.insert(out.end(), kv.begin(), kv.end());
            return out;
        });
    std::vector<uint16_t> q(both.begin(), both.begin() + (ptrdiff_t)n_q);
    check_rope(check, *r, layer, q,
               std::vector<uint16_t>(both.begin() + (ptrdiff_t)n_q, both.end()));
    device->backend->step_end(device, NULL);
}

static void rope(struct check *check) {
    static const int heads[] = {8, 16, 24, 40, 64, 80, 96, 128, 136, 192, 256};
    struct random random = start("rope");
    for (int i = 0; i < (SLOWER ? 3 : 11); i++) {
        struct rope_case r = {};
        r.config = draw_config(&random, 1, 1);
        r.config.head_dim = SLOWER ? pick(&random, heads) : heads[i];
        r.config.n_heads = r.config.n_kv_heads * between(&random, 1, 5);
        r.config.rope_dim = 2 * (below(&random, 3) ? r.config.head_dim / 2
                                                   : between(&random, 1, r.config.head_dim / 2));
        r.config.norm_epsilon = below(&random, 2) ? 1e-5f : 0.1f;
        for (int j = 0; j < r.config.rope_dim / 2; j++)
            r.frequency[j] = (float)pow(10000.0, -2.0 * j / r.config.rope_dim);
        if (below(&random, 2))
            r.q_norm = make_tensor(&random, TYPE_F32, 1, r.config.head_dim, 0.2f, 1.0f);
        if (below(&random, 2))
            r.k_norm = make_tensor(&random, TYPE_F32, 1, r.config.head_dim, 0.2f, 1.0f);
        add_texts(&r.batch, &random, between(&random, 0, 9), between(&random, 1, 4), 70);
        struct device wanted = wanted_device(&r.config, r.frequency, 0, 1, 400);
        r.device = open_device(open_backend(), &wanted, KV_BLOCKS);
        struct backend *backend = r.device->backend;
        run_rope(check, &random, &r);
        close_device(r.device);
        backend->close(backend);
        free_tensor(r.q_norm);
        free_tensor(r.k_norm);
    }
}

/* ---- attention ---- */

/* Random keys and values where the batch's texts have them, and NaN everywhere else. */
static std::vector<uint16_t> random_kv(struct random *random, const struct model_config *c,
                                       const struct test_batch &batch, int layer) {
    std::vector<uint16_t> kv(kv_elements(c), 0xffff);
    for (const struct sequence &s : batch.sequence)
        for (int t = 0; t < s.start + s.n_rows; t++)
            for (int at = 0; at < 2 * c->n_kv_heads * c->head_dim; at++) {
                int value = at % 2, head = at / 2 % c->n_kv_heads, i = at / 2 / c->n_kv_heads;
                int slot = batch.table[s.first_block + t / BLOCK_TOKENS];
                kv[kv_at(c, slot, layer, value, head, t % BLOCK_TOKENS, i)] =
                    bf16_of(normal(random));
            }
    return kv;
}

/* softmax(q . k) . v for one row and head: out, and how exact it can be if weights are bf16. */
static void reference_attention(const struct model_config *c, const struct test_batch &batch,
                                int layer, int row, int head, const std::vector<uint16_t> &kv,
                                const uint16_t *q, std::vector<double> *out,
                                std::vector<double> *allowed) {
    const struct sequence &s = batch.sequence[batch.row_sequence[row]];
    int kv_head = head / (c->n_heads / c->n_kv_heads), n = batch.position[row] + 1;
    std::vector<double> weight((size_t)n), squares((size_t)c->head_dim);
    double largest = -INFINITY, sum = 0.0;
    auto at = [&](int value, int t, int i) {
        int slot = batch.table[s.first_block + t / BLOCK_TOKENS];
        return (double)from_bf16(kv[kv_at(c, slot, layer, value, kv_head, t % BLOCK_TOKENS, i)]);
    };
    for (int t = 0; t < n; t++) {
        for (int i = 0; i < c->head_dim; i++)
            weight[t] += from_bf16(q[i]) * at(0, t, i);
        weight[t] /= sqrt(c->head_dim);
        largest = std::max(largest, weight[t]);
    }
    for (double &w : weight) {
        w = exp(w - largest);
        sum += w;
    }
    out->assign((size_t)c->head_dim, 0.0);
    allowed->assign((size_t)c->head_dim, 0.0);
    for (int t = 0; t < n; t++)
        for (int i = 0; i < c->head_dim; i++) {
            double part = weight[t] / sum * at(1, t, i);
            (*out)[i] += part;
            squares[i] += part * part;
            (*allowed)[i] += 1e-4 * fabs(part);
        }
    for (int i = 0; i < c->head_dim; i++)
        (*allowed)[i] += 0x1p-8 * (3.0 * sqrt(squares[i]) + 1.01 * fabs((*out)[i]));
}

/* Attention of a batch, some rows and heads of it compared. */
static void check_attention(struct check *check, struct random *random,
                            const struct model_config *c, struct test_batch *batch) {
    struct device wanted = wanted_device(c, NULL, 0, 1, (int)batch->token.size() + 1);
    struct device *device = open_device(open_backend(), &wanted, KV_BLOCKS);
    struct backend *backend = device->backend;
    struct cuda_device *d = cuda_of(device);
    int layer = below(random, 2), n = (int)batch->token.size();
    std::vector<uint16_t> kv = random_kv(random, c, *batch, layer);
    std::vector<uint16_t> q((size_t)n * c->n_heads * c->head_dim);
    for (size_t i = 0, head = 0; head < (size_t)n * c->n_heads; head++) {
        static const float widths[] = {0.2f, 1.0f, 5.0f}; /* even and peaked weights */
        for (float width = pick(random, widths); i < (head + 1) * c->head_dim; i++)
            q[i] = bf16_of(width * normal(random));
    }
    std::vector<int> places = places_of(d->attention_places);
    std::vector<uint16_t> nans = at_places(places, d->padded_rows, d->attention_stride,
                                           [](size_t, size_t) { return (uint16_t)0xffff; });
    backend->step_begin(device, seal(batch));
    poke(device, d->q, q);
    poke(device, (uint16_t *)device->kv, kv);
    std::vector<uint16_t> got = in_orders(
        check, "attention",
        [&] {
            poke(device, d->attention, nans);
            backend->attention(device, layer);
        },
        [&] { return peek(device, d->attention, nans.size()); });
    struct worst worst = {};
    for (int i = 0; i < (SLOWER ? 40 : 150); i++) {
        std::vector<double> expected, allowed;
        int row = below(random, n), head = below(random, c->n_heads);
        reference_attention(c, *batch, layer, row, head, kv,
                            &q[((size_t)row * c->n_heads + head) * c->head_dim], &expected,
                            &allowed);
        for (int j = 0; j < c->head_dim; j++) {
            size_t at = (size_t)row * d->attention_stride + places[head * c->head_dim + j];
            compare(&worst, row, head * c->head_dim + j, from_bf16(got[at]), expected[j],
                    allowed[j]);
        }
    }
    CHECK_WORST(worst, "attention: %d rows, %d heads of %d, %d for keys", n, c->n_heads,
                c->head_dim, c->n_kv_heads);
    int missing = 0;
    for (int row = 0; row < n; row++)
        for (int place : places)
            missing += got[(size_t)row * d->attention_stride + place] == 0xffff;
    CHECK(missing == 0, "attention left out %d elements", missing);
    CHECK(std::equal(got.begin() + (ptrdiff_t)n * d->attention_stride, got.end(),
                     nans.begin() + (ptrdiff_t)n * d->attention_stride),
          "attention wrote behind the last row");
    for (int counter : peek(device, d->arrived, (size_t)device->max_rows * d->n_heads))
        CHECK(counter == 0, "a counter of splits is %d after the step", counter);
    backend->step_end(device, NULL);
    close_device(device);
    backend->close(backend);
}

static struct model_config attention_config(struct random *random, int head_dim, int group) {
    struct model_config c = draw_config(random, 1, 1);
    c.head_dim = head_dim;
    c.rope_dim = 0;
    c.n_kv_heads = group > 4 ? 1 : between(random, 1, 2);
    c.n_heads = group * c.n_kv_heads;
    return c;
}

static void attention_of_all_heads(struct check *check) {
    static const int groups[] = {1, 4, 7, 8, 20};
    struct random random = start("heads");
    for (int i = 0; i < (SLOWER ? 4 : 12); i++) {
        int head_dim =
            8 * between(&random, i % 3 < 2 ? i % 3 * 8 + 1 : 17, i % 3 < 2 ? i % 3 * 8 + 8 : 32);
        struct model_config c = attention_config(&random, head_dim, groups[i % 5]);
        struct test_batch batch;
        add_texts(&batch, &random, between(&random, 0, 6), between(&random, 0, 3) + (i % 2), 90);
        if (batch.token.empty())
            add_texts(&batch, &random, 1, 1, 40);
        check_attention(check, &random, &c, &batch);
    }
}

/* Texts of several splits, at and beside their ends; a prompt far into its text. */
static void attention_of_long_texts(struct check *check) {
    static const int lengths[] = {255, 256, 257, 511, 512, 513, 1023, 1024, 1025, 1279, 1500};
    struct random random = start("long texts");
    for (int i = 0; i < (SLOWER ? 1 : 4); i++) {
        struct model_config c = attention_config(&random, i % 2 ? 64 : 128, i % 2 ? 4 : 1);
        std::vector<int> slots = shuffled(&random, KV_BLOCKS), text(2000);
        int length = pick(&random, lengths), other = between(&random, 1, 600);
        struct test_batch batch;
        add_text(&batch, text.data(), &slots[0], other - 1, other, true);
        add_text(&batch, text.data(), &slots[50], length - 1, length, true);
        add_text(&batch, text.data(), &slots[146], 0, between(&random, 1, 40), false);
        check_attention(check, &random, &c, &batch);
        struct test_batch prompt;
        int begin = between(&random, 1, 700);
        add_text(&prompt, text.data(), &slots[10], begin, begin + between(&random, 1, 70), false);
        check_attention(check, &random, &c, &prompt);
    }
}
#endif /* CUDA_ATTENTION_H */
