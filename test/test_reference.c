/* test_reference.c: the engine against the models' original implementations.
 *
 * test/make_reference.py made tiny models of random weights, ran them in Hugging Face
 * `transformers` and left the logits of every prompt position in test/data/ref; its head says
 * how. Here the program itself is run on each model file, and must
 *   - come within the index's tolerance of those logits (largest difference / largest logit),
 *   - give the very same bits when the prompt is cut into chunks, and
 *   - give the very same bits when the model is sharded over several devices.
 * The program is a child process: a crash or a hang is one failed check, not the end of the test.
 * reference.h, by which all ops are judged, is itself judged here, by the same logits.
 *
 * Run from the repository's root. -DDYNAMO_PROGRAM='"path"' tests another binary. */
#define _GNU_SOURCE
#define GGUF_IMPLEMENTATION
#define MODEL_IMPLEMENTATION
#include "reference.h"

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

#ifndef DYNAMO_PROGRAM
#define DYNAMO_PROGRAM "./dynamo"
#endif

#define FOLDER          "test/data/ref/"
#define REFERENCE_ERROR 1e-5 /* of reference.h: the originals computed in f32 */

enum {
    NAME_LENGTH = 64,
    PATH_LENGTH = 128,
    MAX_REFERENCES = 64,
    TIME_LIMIT = 300, /* seconds of processor time: far more than one run takes, even sanitized */
    EXEC_FAILED = 127
};

/* One line of the index. */
struct reference {
    char model[NAME_LENGTH];
    char logits[NAME_LENGTH];
    double tolerance; /* of the largest logit */
    int widest_tp;    /* 1, 2 or 4: what the model's shape allows */
    char *ids;        /* as on the command line: 1,15,7 */
    size_t n_tokens;
};

struct index {
    struct reference references[MAX_REFERENCES];
    size_t count;
};

/* Logits. `values` is NULL if there are none. */
struct matrix {
    float *values; /* (rows, cols) */
    size_t rows, cols;
};

/* ---- reading ---- */

static bool read_line(struct reference *reference, const char *line) {
    int ids_at = 0;
    int n_fields = sscanf(line, "%63s %63s %lf %d %n", reference->model, reference->logits,
                          &reference->tolerance, &reference->widest_tp, &ids_at);
    if (n_fields != 4 || ids_at == 0)
        return false;
    size_t length = strspn(line + ids_at, "0123456789,");
    reference->ids = strndup(line + ids_at, length);
    reference->n_tokens = 1;
    for (const char *c = reference->ids; *c; c++)
        reference->n_tokens += *c == ',';
    return length > 0;
}

static void index_open(struct check *check, struct index *index) {
    index->count = 0;
    FILE *file = fopen(FOLDER "index.txt", "r");
    CHECK(file, "no %sindex.txt: is this the repository's root?", FOLDER);
    if (!file)
        return;
    char *line = NULL;
    size_t capacity = 0;
    while (index->count < MAX_REFERENCES && getline(&line, &capacity, file) > 0) {
        bool ok = read_line(&index->references[index->count], line);
        CHECK(ok, "line %zu of the index: %s", index->count + 1, line);
        index->count += ok;
    }
    free(line);
    fclose(file);
}

static void index_close(struct index *index) {
    for (size_t i = 0; i < index->count; i++)
        free(index->references[i].ids);
}

/* The float32 matrix of `rows` rows that makes up the whole file. */
static struct matrix read_matrix(const char *path, size_t rows) {
    struct matrix matrix = {NULL, rows, 0};
    FILE *file = fopen(path, "rb");
    if (!file)
        return matrix;
    fseek(file, 0, SEEK_END);
    long bytes = ftell(file);
    rewind(file);
    size_t row_bytes = rows * sizeof(float);
    if (bytes > 0 && (size_t)bytes % row_bytes == 0) {
        matrix.cols = (size_t)bytes / row_bytes;
        matrix.values = malloc((size_t)bytes);
        if (matrix.values && fread(matrix.values, (size_t)bytes, 1, file) != 1) {
            free(matrix.values);
            matrix.values = NULL;
        }
    }
    fclose(file);
    return matrix;
}

/* ---- running ---- */

/* Runs the program to its end. Returns its wait status. */
static int run_program(char *const *arguments) {
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        check_limit(TIME_LIMIT);
        int nowhere = open("/dev/null", O_WRONLY);
        dup2(nowhere, STDOUT_FILENO);
        execv(arguments[0], arguments);
        _exit(EXEC_FAILED);
    }
    int status = -1;
    waitpid(child, &status, 0);
    return status;
}

/* The engine's logits on `n_devices` devices, with one more option if `option` is not NULL. */
static struct matrix program_logits(struct check *check, const struct reference *reference,
                                    int n_devices, char *option, char *value) {
    char model[PATH_LENGTH], devices[NAME_LENGTH];
    char output[] = "/tmp/dynamo_logits_XXXXXX";
    int descriptor = mkstemp(output);
    CHECK(descriptor >= 0, "cannot make a file like %s", output);
    if (descriptor < 0)
        return (struct matrix){NULL, 0, 0};
    close(descriptor);
    snprintf(model, sizeof model, FOLDER "%s", reference->model);
    snprintf(devices, sizeof devices, "cpu:%d", n_devices);
    char *arguments[] = {DYNAMO_PROGRAM, model,   "--ids", reference->ids, "--logits", output,
                         "--devices",    devices, option,  value,          NULL};
    int status = run_program(arguments);
    const char *shown = option ? option : "--devices", *shown_value = option ? value : devices;
    CHECK(status == 0, "%s %s %s: %s %d", reference->model, shown, shown_value,
          WIFSIGNALED(status) ? "ended by signal" : "exit status",
          WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
    struct matrix logits = read_matrix(output, reference->n_tokens);
    CHECK(logits.values, "%s %s %s: no logits of %zu positions", reference->model, shown,
          shown_value, reference->n_tokens);
    unlink(output);
    return logits;
}

/* ---- judging ---- */

static void check_close(struct check *check, const struct reference *reference, struct matrix got,
                        struct matrix expected) {
    CHECK(got.cols == expected.cols, "%s: vocabulary of %zu, expected %zu", reference->model,
          got.cols, expected.cols);
    if (got.cols != expected.cols)
        return;
    double largest = 0, worst = -1;
    size_t worst_at = 0;
    for (size_t i = 0; i < expected.rows * expected.cols; i++) {
        double difference = fabs((double)got.values[i] - (double)expected.values[i]);
        largest = fmax(largest, fabs((double)expected.values[i]));
        if (isnan(difference)) {
            worst = INFINITY;
            worst_at = i;
            break;
        }
        if (difference > worst) {
            worst = difference;
            worst_at = i;
        }
    }
    CHECK(worst <= reference->tolerance * largest,
          "%s: position %zu, token %zu: got %g, expected %g; off by %.1e of the largest, "
          "allowed %.1e",
          reference->model, worst_at / expected.cols, worst_at % expected.cols,
          (double)got.values[worst_at], (double)expected.values[worst_at], worst / largest,
          reference->tolerance);
}

static void check_same_bits(struct check *check, const struct reference *reference,
                            const char *option, const char *value, struct matrix got,
                            struct matrix expected) {
    CHECK(got.cols == expected.cols, "%s %s %s: vocabulary of %zu, without it %zu",
          reference->model, option, value, got.cols, expected.cols);
    if (got.cols != expected.cols)
        return;
    size_t count = expected.rows * expected.cols, same = 0;
    while (same < count && !memcmp(got.values + same, expected.values + same, sizeof(float)))
        same++;
    size_t at = same < count ? same : 0;
    CHECK(same == count, "%s %s %s: position %zu, token %zu: %.9g, without it %.9g",
          reference->model, option, value, at / expected.cols, at % expected.cols,
          (double)got.values[at], (double)expected.values[at]);
}

/* `option value` on `n_devices` devices changes no bit of what one device computes. */
static void check_option(struct check *check, const struct reference *reference,
                         struct matrix expected, int n_devices, char *option, char *value) {
    struct matrix got = program_logits(check, reference, n_devices, option, value);
    if (got.values && expected.values)
        check_same_bits(check, reference, option, value, got, expected);
    free(got.values);
}

/* ---- tests ---- */

static void agrees_with_the_original(struct check *check) {
    struct index index;
    index_open(check, &index);
    for (size_t i = 0; i < index.count; i++) {
        const struct reference *reference = &index.references[i];
        char path[PATH_LENGTH];
        snprintf(path, sizeof path, FOLDER "%s", reference->logits);
        struct matrix expected = read_matrix(path, reference->n_tokens);
        CHECK(expected.values, "%s: cannot be read", path);
        struct matrix got = program_logits(check, reference, 1, NULL, NULL);
        if (got.values && expected.values)
            check_close(check, reference, got, expected);
        free(expected.values);
        free(got.values);
    }
    index_close(&index);
}

/* Logits by reference.h, of the file itself. */
static struct matrix reference_logits(struct check *check, const struct reference *reference) {
    struct matrix logits = {NULL, reference->n_tokens, 0};
    char path[PATH_LENGTH], error[ERROR_LENGTH] = "";
    struct model model;
    snprintf(path, sizeof path, FOLDER "%s", reference->model);
    bool ok = model_open(&model, path, error);
    CHECK(ok, "%s: %s", path, error);
    if (ok) {
        int n = 0, tokens[512];
        float frequency[512];
        for (char *at = reference->ids; n < 512 && *at; at += *at == ',')
            tokens[n++] = (int)strtol(at, &at, 10);
        logits.cols = (size_t)model.config.vocab_size;
        logits.values = ref_allocate((size_t)n * logits.cols, sizeof *logits.values);
        double *values = ref_doubles(n, model.config.vocab_size);
        ref_frequencies(&model, frequency);
        ref_forward(&model, frequency, tokens, n, values);
        for (size_t i = 0; i < (size_t)n * logits.cols; i++)
            logits.values[i] = (float)values[i];
        free(values);
        model_close(&model);
    }
    return logits;
}

static void reference_agrees_with_the_original(struct check *check) {
    struct index index;
    index_open(check, &index);
    for (size_t i = 0; i < index.count; i++) {
        struct reference exact = index.references[i];
        char path[PATH_LENGTH];
        snprintf(path, sizeof path, FOLDER "%s", exact.logits);
        struct matrix expected = read_matrix(path, exact.n_tokens);
        struct matrix got = reference_logits(check, &exact);
        exact.tolerance = REFERENCE_ERROR;
        if (got.values && expected.values)
            check_close(check, &exact, got, expected);
        free(expected.values);
        free(got.values);
    }
    index_close(&index);
}

static void chunks_change_no_bit(struct check *check) {
    struct index index;
    index_open(check, &index);
    for (size_t i = 0; i < index.count; i++) {
        const struct reference *reference = &index.references[i];
        struct matrix expected = program_logits(check, reference, 1, NULL, NULL);
        check_option(check, reference, expected, 1, "--chunk", "1");
        check_option(check, reference, expected, 1, "--chunk", "7");
        free(expected.values);
    }
    index_close(&index);
}

static void shards_change_no_bit(struct check *check) {
    struct index index;
    index_open(check, &index);
    int n_wide = 0;
    for (size_t i = 0; i < index.count; i++) {
        const struct reference *reference = &index.references[i];
        if (reference->widest_tp < 2)
            continue;
        struct matrix expected = program_logits(check, reference, 1, NULL, NULL);
        check_option(check, reference, expected, 2, "--tp", "2");
        if (reference->widest_tp >= 4) {
            check_option(check, reference, expected, 4, "--tp", "4");
            n_wide++;
        }
        free(expected.values);
    }
    CHECK(n_wide >= 2, "only %d models for 4 devices in the index", n_wide);
    index_close(&index);
}

/* Shows that --tp is obeyed: were it not, this model of five heads would run. */
static void heads_are_not_cut(struct check *check) {
    char *arguments[] = {DYNAMO_PROGRAM,
                         FOLDER "llama-mha-f32.gguf",
                         "--ids",
                         "1,15,7",
                         "--logits",
                         "/dev/null",
                         "--devices",
                         "cpu:2",
                         "--tp",
                         "2",
                         NULL};
    int status = run_program(arguments);
    CHECK(WIFEXITED(status) && (WEXITSTATUS(status) == 1 || WEXITSTATUS(status) == 2),
          "five heads on two devices: wait status %d, expected exit status 1 or 2", status);
    arguments[8] = NULL;
    status = run_program(arguments);
    CHECK(status == 0, "the same without --tp: wait status %d, expected 0", status);
}

int main(int argc, char **argv) {
    static const struct test tests[] = {
        {"reference_agrees_with_the_original", reference_agrees_with_the_original},
        {"agrees_with_the_original", agrees_with_the_original},
        {"chunks_change_no_bit", chunks_change_no_bit},
        {"shards_change_no_bit", shards_change_no_bit},
        {"heads_are_not_cut", heads_are_not_cut},
    };
    return check_run(tests, sizeof tests / sizeof *tests, argc, argv);
}
