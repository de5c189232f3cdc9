/* evaluate.h: what a model makes of a given text: its ids, its logits, its perplexity.
 *
 *     status = evaluate_logits(&answers, &options.request, "logits.f32");
 *
 * The last two ask for every row's logits, which serving never does, so they go around the
 * scheduler: engine_logits computes a chunk of one text after the other. Read next: answers.h. */
#ifndef EVALUATE_H
#define EVALUATE_H

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
#include <stdlib.h>
#include <string.h>

static int evaluate_failed(const char *subject, const char *why) {
    (void)fprintf(stderr, "dynamo: %s%s%s\n", subject, *subject ? ": " : "", why);
    return 1;
}

/* Tokens of one text, on the first worker. */
static int evaluate_longest(const struct answers *a) {
    int all = sched_max_length(engine_sched(a->engine));
    int here = engine_config_of(a->engine)->workers[0].blocks * BLOCK_TOKENS;
    return here < all ? here : all;
}

/* Room for the logits of a chunk. */
static float *chunk_create(const struct answers *a) {
    size_t n_rows = (size_t)engine_config_of(a->engine)->chunk;
    return malloc(n_rows * (size_t)a->vocab_size * sizeof(float));
}

/* Computes the chunk of tokens[0, n) that begins at `start`, which is token `place` of the text.
 * How many rows it has; 0: a number is none, and `error` says where. */
static int chunk_logits(const struct answers *a, const int *tokens, int start, int n, int place,
                        float *logits, char *error) {
    int chunk = engine_config_of(a->engine)->chunk;
    int n_rows = n - start < chunk ? n - start : chunk;
    int n_good = engine_logits(a->engine, tokens, start, n_rows, logits);
    if (n_good == n_rows)
        return n_rows;
    /* one by one, for in one step it reaches rows before it: they take it 0 times, which is NaN */
    for (n_good = 0; engine_logits(a->engine, tokens, start + n_good, 1, logits) > 0;)
        n_good++;
    (void)fail(error, "the model gave a number that is none at token %d", place + n_good + 1);
    return 0;
}

/* ---- logits ---- */

int evaluate_logits(const struct answers *a, const struct request_spec *spec, const char *path) {
    int longest = evaluate_longest(a);
    char error[ERROR_LENGTH];
    int n_ids = 0;
    int *ids = answers_encode(a, spec, NULL, 0, INT_MAX, &n_ids, error);
    if (ids && (n_ids < 1 || n_ids > longest)) {
        (void)fail(error, "got a prompt of %d tokens, expected 1 to %d", n_ids, longest);
        free(ids);
        ids = NULL;
    }
    if (!ids)
        return evaluate_failed("--logits", error);
    FILE *file = fopen(path, "wb");
    float *logits = chunk_create(a);
    bool ok = file && logits;
    int n_rows = 1;
    for (int start = 0; start < n_ids && ok && n_rows > 0; start += n_rows) {
        n_rows = chunk_logits(a, ids, start, n_ids, start, logits, error);
        size_t n = (size_t)n_rows * (size_t)a->vocab_size;
        ok = fwrite(logits, sizeof *logits, n, file) == n;
    }
    ok = file && fclose(file) == 0 && ok;
    free(logits);
    free(ids);
    if (!ok || n_rows == 0)
        return evaluate_failed(ok ? "--logits" : path, ok ? error : strerror(errno));
    return 0;
}

/* ---- perplexity ---- */

static double log_sum_exp(const float *row, int n) {
    double largest = row[0], sum = 0;
    for (int i = 1; i < n; i++)
        largest = row[i] > largest ? row[i] : largest;
    for (int i = 0; i < n; i++)
        sum += exp(row[i] - largest);
    return log(sum) + largest;
}

/* Adds the negative log-likelihoods of tokens[1, n), of a text from token `place` on. */
static bool add_surprise(const struct answers *a, const int *tokens, int n, int place,
                         float *logits, double *sum, char *error) {
    int vocab_size = a->vocab_size;
    for (int start = 0, n_rows; start < n; start += n_rows) {
        n_rows = chunk_logits(a, tokens, start, n, place + start, logits, error);
        if (n_rows == 0)
            return false;
        for (int i = 0; i < n_rows && start + i + 1 < n; i++) {
            const float *row = logits + (size_t)i * (size_t)vocab_size;
            *sum += log_sum_exp(row, vocab_size) - row[tokens[start + i + 1]];
        }
    }
    return true;
}

/* Windows of max_length tokens, each begun by the last token of the window before, so that every
 * token but the first is predicted; or by the beginning-of-text token instead, if texts have it. */
int evaluate_perplexity(const struct answers *a, const char *path) {
    int longest = evaluate_longest(a);
    char error[ERROR_LENGTH];
    struct request_spec spec = {0};
    if (longest < 2)
        return evaluate_failed("--perplexity", "a context of 1 token has none to predict");
    spec.prompt = cli_read_file(path, &spec.prompt_length, error);
    if (!spec.prompt)
        return evaluate_failed("", error);
    int n_ids = 0, n_predicted = 0;
    int *ids = answers_encode(a, &spec, NULL, 0, INT_MAX, &n_ids, error);
    free(spec.prompt);
    float *logits = chunk_create(a);
    double sum = 0;
    bool ok = ids && logits;
    for (int start = 0; start + 1 < n_ids && ok; start += longest - 1) {
        int n = n_ids - start < longest ? n_ids - start : longest;
        if (tok_adds_bos(a->tokenizer))
            ids[start] = tok_bos(a->tokenizer);
        ok = add_surprise(a, ids + start, n, start, logits, &sum, error);
        n_predicted += n - 1;
    }
    free(ids);
    free(logits);
    if (!ok || n_predicted == 0)
        return evaluate_failed(path, ok ? "too short to predict a token" : error);
    double mean = sum / n_predicted;
    printf("tokens %d  nll %.6f  perplexity %.4f\n", n_predicted, mean, exp(mean));
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
    char error[ERROR_LENGTH];
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
    char *text = cli_read_file(path, &length, error);
    bool ok = text && tokenize_texts(tokenizer, text, length);
    if (text && !ok)
        (void)fail(error, "%.200s: " ANSWERS_TOO_LONG, path, TOK_TEXT_LENGTH);
    free(text);
    tok_close(tokenizer);
    return ok ? 0 : evaluate_failed("", error);
}

#endif /* EVALUATE_IMPLEMENTATION */
