/* evaluate.h: what a model makes of a given text: its ids, its logits, its perplexity.
 *
 *     status = evaluate_logits(&answers, &options.request, "logits.f32");
 *
 * The last two ask for every row's logits, which serving never does, so they go around the
 * scheduler: engine_logits computes a chunk of one text after the other. Read next: answers.h. */
#ifndef EVALUATE_H
#define EVALUATE_H

#include "../lib/model.h"
#include "answers.h"

/* Each returns an exit status, after a line on stderr if it is not 0. */
int evaluate_logits(const struct answers *answers, const struct request_spec *spec,
                    const char *path);
int evaluate_perplexity(const struct answers *answers, const char *path);
/* Prints the ids of each text in `path`, which end with a line `__ggml_vocab_test__` each. Needs no
 * weights: a model file with a vocabulary alone will do. tokenizer: a tokenizer.bin, or NULL. */
int evaluate_tokenize(const char *model, const char *tokenizer, const char *path);

#endif /* EVALUATE_H */

#ifdef EVALUATE_IMPLEMENTATION
#undef EVALUATE_IMPLEMENTATION

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int evaluate_failed(const char *subject, const char *why) {
    (void)fprintf(stderr, "dynamo: %s%s%s\n", subject, *subject ? ": " : "", why);
    return 1;
}

static int evaluate_longest(const struct answers *a) { /* tokens of one text */
    return sched_max_length(engine_sched(a->engine));
}

static int evaluate_vocab(const struct answers *a) {
    return engine_config_of(a->engine)->model->config.vocab_size;
}

/* Calls `take` with the logits of each chunk of a text that fits into a worker's blocks. */
static bool each_logits(const struct answers *a, const int *tokens, int n,
                        bool (*take)(void *state, const float *logits, int start, int n_rows),
                        void *state) {
    int chunk = engine_config_of(a->engine)->chunk;
    float *logits = malloc((size_t)chunk * (size_t)evaluate_vocab(a) * sizeof *logits);
    bool ok = logits != NULL;
    for (int start = 0; start < n && ok; start += chunk) {
        int n_rows = n - start < chunk ? n - start : chunk;
        engine_logits(a->engine, tokens, start, n_rows, logits);
        ok = take(state, logits, start, n_rows);
    }
    free(logits);
    return ok;
}

/* ---- logits ---- */

struct logits_file {
    FILE *file;
    size_t vocab_size;
};

static bool write_logits(void *state, const float *logits, int start, int n_rows) {
    struct logits_file *to = state;
    (void)start;
    size_t n = (size_t)n_rows * to->vocab_size;
    return fwrite(logits, sizeof *logits, n, to->file) == n;
}

int evaluate_logits(const struct answers *a, const struct request_spec *spec, const char *path) {
    int longest = evaluate_longest(a);
    char error[ERROR_LENGTH];
    int n_ids = 0;
    int *ids = answers_encode(a, spec, &n_ids, error);
    if (!ids)
        return evaluate_failed("--logits", error);
    if (n_ids < 1 || n_ids > longest) {
        (void)fail(error, "got a prompt of %d tokens, expected 1 to %d", n_ids, longest);
        free(ids);
        return evaluate_failed("--logits", error);
    }
    struct logits_file to = {fopen(path, "wb"), (size_t)evaluate_vocab(a)};
    bool ok = to.file && each_logits(a, ids, n_ids, write_logits, &to);
    ok = to.file && fclose(to.file) == 0 && ok;
    free(ids);
    return ok ? 0 : evaluate_failed(path, strerror(errno));
}

/* ---- perplexity ---- */

struct perplexity {
    int *tokens; /* the window: (n_tokens) */
    int n_tokens, vocab_size;
    double sum; /* of negative log-likelihoods */
    int64_t n;
};

static double log_sum_exp(const float *row, int n) {
    double largest = row[0], sum = 0;
    for (int i = 1; i < n; i++)
        largest = row[i] > largest ? row[i] : largest;
    for (int i = 0; i < n; i++)
        sum += exp(row[i] - largest);
    return log(sum) + largest;
}

static bool add_likelihood(void *state, const float *logits, int start, int n_rows) {
    struct perplexity *p = state;
    for (int i = 0; i < n_rows && start + i + 1 < p->n_tokens; i++) {
        const float *row = logits + (size_t)i * (size_t)p->vocab_size;
        p->sum += log_sum_exp(row, p->vocab_size) - row[p->tokens[start + i + 1]];
        p->n++;
    }
    return true;
}

/* Windows of max_length tokens, each begun like a text: with the beginning-of-text token, or else
 * with the last token of the window before, so that every token but the first is predicted. */
int evaluate_perplexity(const struct answers *a, const char *path) {
    int longest = evaluate_longest(a);
    char error[ERROR_LENGTH];
    struct request_spec spec = {0};
    spec.prompt = cli_read_file(path, &spec.prompt_length, error);
    if (!spec.prompt)
        return evaluate_failed("", error);
    int n_ids = 0, first_id = -1;
    int *ids = answers_encode(a, &spec, &n_ids, error);
    free(spec.prompt);
    struct perplexity p = {malloc((size_t)longest * sizeof(int)), 0, evaluate_vocab(a), 0, 0};
    bool ok = ids && p.tokens;
    if (ids && a->tokenizer && tok_adds_bos(a->tokenizer))
        first_id = tok_bos(a->tokenizer);
    for (int next = first_id >= 0; next + (first_id < 0) < n_ids && ok;) {
        p.n_tokens = 0;
        if (first_id >= 0)
            p.tokens[p.n_tokens++] = first_id;
        while (next < n_ids && p.n_tokens < longest)
            p.tokens[p.n_tokens++] = ids[next++];
        ok = each_logits(a, p.tokens, p.n_tokens, add_likelihood, &p);
        next -= first_id < 0 && next < n_ids;
    }
    free(ids);
    free(p.tokens);
    if (!ok || p.n == 0)
        return evaluate_failed(path, ids && p.n == 0 ? "too short to predict a token" : error);
    double mean = p.sum / (double)p.n;
    printf("tokens %lld  nll %.6f  perplexity %.4f\n", (long long)p.n, mean, exp(mean));
    return 0;
}

/* ---- tokenize ---- */

static bool tokenize_texts(const struct tokenizer *tokenizer, const char *text, size_t length) {
    static const char end[] = "__ggml_vocab_test__\n";
    const char *last = text + length;
    while (text < last) {
        const char *stop = memmem(text, (size_t)(last - text), end, sizeof end - 1);
        size_t n = (size_t)((stop ? stop : last) - text);
        int n_ids = 0;
        int *ids = tok_encode(tokenizer, text, stop && n > 0 ? n - 1 : n, &n_ids);
        if (!ids)
            return false;
        for (int i = 0; i < n_ids; i++)
            printf(" %d", ids[i]);
        (void)putchar('\n');
        free(ids);
        text = stop ? stop + sizeof end - 1 : last;
    }
    return true;
}

int evaluate_tokenize(const char *name, const char *beside, const char *path) {
    char error[ERROR_LENGTH], why[ERROR_LENGTH];
    struct model model = {0};
    struct gguf *file = NULL;
    struct tokenizer *tokenizer = NULL;
    if (beside && model_open(&model, name, error))
        tokenizer = tok_open_checkpoint(beside, model.config.vocab_size, error);
    else if (!beside && model_is_random(name))
        (void)fail(error, "%.200s: random weights have no tokenizer", name);
    else if (!beside && (file = gguf_open(name, error)) != NULL)
        tokenizer = tok_open(file, error);
    const char *subject = file ? name : ""; /* of an error that does not name it */
    model_close(&model);
    gguf_close(file);
    if (!tokenizer)
        return evaluate_failed(subject, error);
    size_t length;
    char *text = cli_read_file(path, &length, why);
    bool ok = text && tokenize_texts(tokenizer, text, length);
    if (text && !ok)
        (void)fail(why, "%.200s: " ANSWERS_TOO_LONG, path, TOK_TEXT_LENGTH);
    free(text);
    tok_close(tokenizer);
    return ok ? 0 : evaluate_failed("", why);
}

#endif /* EVALUATE_IMPLEMENTATION */
