/* test_plan.c: --plan from outside, on clusters whose rates are made so that the outcome is known:
 * where a prompt takes long beside a token, and only the gaps between tokens are watched, pools
 * apart win; where there is next to nothing to decode, one of two GPUs apart idles. Break-even
 * lengths beside sums done by hand; that the same arguments give the same bytes; and that what
 * cannot be is refused in a line. */
#define _GNU_SOURCE
#define JSON_IMPLEMENTATION
#include "files.h"

#include <math.h>

/* of stories-15m in bf16: [6 layers][k, v][6 heads][16 tokens][48 of a head, padded to 64] */
enum { BLOCK_BYTES = 6 * 2 * 6 * 16 * 64 * 2, FEW = 64 / 16, MANY = 2048 / 16 };

#define SMALL "random:stories-15m --limit 200 "
/* a prompt of 400 tokens takes 100 ms; a step of one token 1.6 */
#define SLOW  SMALL "--plan h100x2 --rates $T/slow --ttft 2000 "

static void write_rates(struct check *check) {
    /* each row is multiplied by 6 million weights, each sample by 9.2 million */
    static const char slow[] = "operations_per_second 4.8e10\nlayer_seconds 0\n"
                               "step_seconds 1e-3\ncopy_seconds 0\n";
    static const char links[] = "peer_bytes_per_second 1e9\nhost_bytes_per_second 1e4\n"
                                "copy_seconds 0\n";
    write_file(check, "slow", slow, strlen(slow));
    write_file(check, "links", links, strlen(links));
}

/* What a key of the first object that has all `words` holds; NAN: there is none. */
static double told(const struct outcome *o, const char *words, const char *key) {
    char quoted[64];
    const char *at = strstr(o->out, words);
    (void)snprintf(quoted, sizeof quoted, "\"%s\":", key);
    while (at && at > o->out && at[-1] != '\n')
        at--;
    const char *end = at ? strchr(at, '\n') : NULL, *value = at ? strstr(at, quoted) : NULL;
    return value && value < end ? strtod(value + strlen(quoted), NULL) : NAN;
}

static void apart_wins_where_gaps_are_watched(struct check *check) {
    write_rates(check);
    struct outcome o = run(check, SLOW "--replay 400:10 --itl 3");
    CHECK(o.status == 0 && strstr(o.out, "\napart wins: 1 x TP 1 + 1 x TP 1 makes "), "%s%s", o.out,
          o.err);
    o = run(check, SLOW "--replay 400:10 --itl 3 --json");
    double apart = told(&o, "\"apart\":true", "rate");
    double together = told(&o, "\"apart\":false", "rate");
    double itl = told(&o, "\"apart\":true", "itl_p90_ms");
    /* one worker reads ten prompts a second, at most */
    CHECK(apart > 5 && apart < 10.5 && together < 0.7 * apart, "%g, %g", apart, together);
    CHECK(itl >= 1.6 && itl <= 3, "%g", itl);
}

static void together_wins_where_little_is_decoded(struct check *check) {
    write_rates(check);
    struct outcome o = run(check, SLOW "--replay 400:2 --itl 1000");
    CHECK(o.status == 0 && strstr(o.out, "\napart loses: 1 x TP 1 + 1 x TP 1 makes "), "%s%s",
          o.out, o.err);
    o = run(check, SLOW "--replay 400:2 --itl 1000 --json");
    double apart = told(&o, "\"apart\":true", "rate");
    double together = told(&o, "\"apart\":false", "rate");
    CHECK(fabs(apart / together - 0.5) < 0.1, "%g of %g", apart, together); /* one of two reads */
}

/* Apart on one GPU is what --sim makes of --devices 0,0. */
static void one_gpu_is_shared(struct check *check) {
    write_rates(check);
    static const char one[] = SMALL "--plan h100 --rates $T/slow --ttft 2000 --replay 400:10";
    struct outcome o = run(check, "%s --itl 20 --json", one);
    double rate = told(&o, "\"apart\":true", "rate");
    double ttft = told(&o, "\"apart\":true", "ttft_p90_ms");
    double itl = told(&o, "\"apart\":true", "itl_p90_ms");
    CHECK(o.status == 0 && rate > 1 && rate < 10.5, "%g: %s%s", rate, o.out, o.err);
    CHECK(itl > 1.6, "%g: nobody shares the chip", itl);
    o = run(check,
            SMALL
            "--sim h100 --devices 0,0 --kv-host 0 --rates $T/slow --replay 400:10 --rate %.9g "
            "--json",
            rate);
    double ttft_there = told(&o, "\"load\":", "ttft_p90_ms");
    double itl_there = told(&o, "\"load\":", "itl_p90_ms");
    CHECK(fabs(ttft / ttft_there - 1) < 0.02, "%g and %g", ttft, ttft_there);
    CHECK(fabs(itl / itl_there - 1) < 0.02, "%g and %g", itl, itl_there);
}

static void the_same_arguments_give_the_same_bytes(struct check *check) {
    write_rates(check);
    static const char *const forms[] = {"", "--json"};
    for (int i = 0; i < 2; i++) {
        struct outcome a = run(check, SLOW "--replay 400:10 %s", forms[i]),
                       b = run(check, SLOW "--replay 400:10 %s", forms[i]);
        CHECK(a.status == 0 && a.out_length > 0 && strcmp(a.out, b.out) == 0, "%s", a.err);
        struct outcome c = run(check, SLOW "--replay 400:10 %s --seed 5", forms[i]);
        CHECK(strcmp(a.out, c.out) != 0, "arrivals do not depend on the seed");
    }
}

/* One split a line; each of them as JSON says it. */
static void every_split_is_told(struct check *check) {
    struct outcome o = run(check, SMALL "--replay 100:10 --plan h100x4 --json --ttft 1");
    static const char *const splits[] = {
        "\"apart\":true,\"prefill_workers\":3,\"tp_prefill\":1,\"decode_workers\":1,\"tp_decode\":"
        "1",
        "\"apart\":true,\"prefill_workers\":1,\"tp_prefill\":2,\"decode_workers\":2,\"tp_decode\":"
        "1",
        "\"apart\":true,\"prefill_workers\":2,\"tp_prefill\":1,\"decode_workers\":1,\"tp_decode\":"
        "2",
        "\"apart\":false,\"prefill_workers\":4,\"tp_prefill\":1,\"decode_workers\":4",
        "\"apart\":false,\"prefill_workers\":2,\"tp_prefill\":2,\"decode_workers\":2"};
    int lines = 0;
    for (const char *at = o.out; (at = strchr(at, '\n')) != NULL; at++)
        lines++;
    CHECK(lines == 10, "%d\n%s", lines, o.out); /* 1 + 4 + 1 apart; 2 widths together, 2 chunks */
    for (size_t i = 0; i < COUNT(splits); i++)
        CHECK(strstr(o.out, splits[i]), "%s\n%s", splits[i], o.out);
    double before = INFINITY; /* the best comes first */
    for (const char *at = o.out; (at = strstr(at, "\"rate\":")) != NULL; at++) {
        double rate = strtod(at + 7, NULL);
        CHECK(rate <= before, "%g after %g", rate, before);
        before = rate;
    }
}

/* Of 4 and of 128 blocks: copied over a link of 1e9 bytes a second, in ms; over one of 1e4 never in
 * time. */
static void break_even_is_that_of_the_rates(struct check *check) {
    write_rates(check);
    static const char *const drivers[] = {"--plan h100x2", "--sim h100x2"};
    for (int i = 0; i < 2; i++) {
        struct outcome o = run(check, SMALL "--replay 20:2 --rates $T/links %s", drivers[i]);
        double first = 0, second = 0, third = 0;
        const char *row = strstr(o.out, "copied to one that decodes (TP 1)");
        int n = row ? sscanf(row + 33, "%lf %lf %lf", &first, &second, &third) : 0;
        CHECK(n == 3 && fabs(third - 1e-6 * MANY * BLOCK_BYTES) < 0.006 &&
                  fabs(first - 1e-6 * FEW * BLOCK_BYTES) < 0.006,
              "%g %g\n%s", first, third, o.out);
        CHECK(strstr(o.out, "does not pay up to 2048 tokens"), "%s", o.out);
    }
}

/* Lines of -f, of which one follows the answer of another. */
static void lines_are_planned(struct check *check) {
    static const char lines[] = "{\"id\": \"a\", \"ids\": [1, 2, 3], \"n\": 5}\n"
                                "{\"id\": \"b\", \"after\": \"a\", \"ids\": [4, 5], \"n\": 5}\n"
                                "{\"ids\": [9, 8, 7, 6], \"n\": 5}\n";
    write_file(check, "lines", lines, strlen(lines));
    struct outcome o = run(
        check, "random:stories-15m --kv-device 400b --kv-host 0 --plan h100x2 -f $T/lines --json");
    double rate = told(&o, "\"apart\":false", "rate");
    double tokens = told(&o, "\"apart\":false", "tokens_per_second_per_gpu");
    /* 15 tokens of 2 that come by themselves, 2 GPUs */
    CHECK(strstr(o.out, "\"fast\":true"), "%s", o.out); /* two come at once, without harm */
    CHECK(o.status == 0 && rate > 0 && fabs(tokens / rate - 15 / 2. / 2) < 1e-3, "%g %g\n%s",
          tokens, rate, o.err);
}

/* Of a block of bytes a worker of two devices has twice as many: only there such answers end. */
static void cut_answers_are_not_served(struct check *check) {
    write_rates(check);
    struct outcome o =
        run(check, SMALL "--plan h100x4 --replay 100:100 --kv-device 1M --ttft 5000 --json");
    int n_whole = 0, n_cut = 0;
    for (char *line = strtok(o.out, "\n"); line; line = strtok(NULL, "\n")) {
        bool cuts = strstr(line, "\"cuts_short\":true"), serves = !strstr(line, "\"rate\":0,");
        CHECK(cuts == !serves && cuts == !strstr(line, "\"tp_decode\":2"), "%s", line);
        n_cut += cuts;
        n_whole += serves;
    }
    CHECK(o.status == 0 && n_cut > 2 && n_whole > 2, "%d and %d: %s", n_cut, n_whole, o.err);
    o = run(check, SMALL "--plan h100x2 --replay 100:1000 --kv-device 10b");
    CHECK(o.status == 1 && strstr(o.err, "no split keeps the targets: answers are cut short; no "
                                         "worker that decodes holds a longer text\n"),
          "%s", o.err);
    CHECK(strstr(o.out, " cut short\ncut short: no worker that decodes holds a longer text\n"),
          "%s", o.out);
    o = run(check, SMALL "--plan h100x2 --replay 2000:49 --ttft 5000");
    CHECK(strstr(o.err, "answers are cut short; the model's context holds no longer text"), "%s",
          o.err);
    o = run(check, SMALL "--sim h100x2 --replay 100:61 --kv-device 10b --ttft 5000");
    const char *row = strstr(o.out, "of them cut short"), *good = strstr(o.out, "of all requests");
    CHECK(row && strtod(row + 17, NULL) == 200 && good && strtod(good + 15, NULL) == 0 &&
              strstr(o.out, "\ncut short: no worker that decodes holds a longer text\n"),
          "%s", o.out);
    o = run(check, SMALL "--sim h100x2 --replay 100:60 --kv-device 10b --ttft 5000 --json");
    CHECK(told(&o, "\"load\":", "cut_short") == 0 && told(&o, "\"load\":", "good_share") == 1, "%s",
          o.out);
}

/* Of 700 lines 65 fail: that is no tenth of them, but of what a simulation of a trace has. */
static void all_lines_are_run(struct check *check) {
    char lines[700 * 24] = "";
    for (int i = 0; i < 700; i++)
        strcat(lines, i < 65 ? "{\"ids\":[7]}\n" : "{\"ids\":[7],\"n\":5}\n");
    write_file(check, "many", lines, strlen(lines));
    struct outcome o = run(check, "random:stories-15m --plan h100x2 -f $T/many");
    CHECK(o.status == 0 && strstr(o.out, " simulations, of 700 requests"), "%s%s", o.out, o.err);
}

/* A CPU has no pools apart: a bound alone is no verdict. One token has no gap for a picture. */
static void what_is_too_short_is_told(struct check *check) {
    struct outcome o = run(check, "random:stories-15m --plan cpu:1 --replay 9:9 --limit 5");
    CHECK(strstr(o.out, "\nonly together keeps the targets: 1 x TP 1 together, > ") &&
              strstr(o.out, "\nthe load is too short to tell: ") &&
              strstr(o.out, "tokens/s of one"),
          "%s%s", o.out, o.err);
    o = run(check, "random:stories-15m --plan cpu:1 --replay 9:1 --limit 5");
    CHECK(o.status == 0 && !strstr(o.out, "tokens/s of one"), "%s%s", o.out, o.err);
}

static void refused_in_a_line(struct check *check) {
    write_rates(check);
    static const struct {
        const char *arguments, *words;
        int status;
    } cases[] = {
        {"--replay 9:9 --plan h100y8", "--plan: got h100y8, expected CHIP", 2},
        {"--replay 9:9 --plan cpu", "--plan: got cpu, expected how many devices", 2},
        {"--replay 9:9 --plan h100x2 --tp 2", "--plan and --tp exclude each other", 2},
        {"--replay 9:9 --plan h100x2 --rate 2", "--plan and --rate exclude each other", 2},
        {"--replay 9:9 --plan h100x2 --colocate", "--plan and --colocate exclude each other", 2},
        {"--replay 9:9 --plan h100x2 --verbose", "--plan and --verbose exclude each other", 2},
        {"--replay 9:9 --sim h100x2 --devices cpu:2", "--devices: got cpu, expected numbers", 2},
        {"--replay - --plan h100x2", "--plan: a load is read again for each simulation", 2},
        {"--replay $T/none --plan h100x2", "none: No such file", 1},
        {"--replay 9:9 --plan h100x2 --kv-device 1K",
         "--kv-device: got 1024 bytes, expected at least 147456, a block", 2},
        {"--replay 9:9 --plan h100x2 --kv-host 1K",
         "--kv-host: got 1024 bytes, expected at least 147456, a block", 2},
        {"--replay 9:9 --plan h100x2 --kv-device 99G", "--plan: no split fits: --kv-device: got",
         2},
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        char arguments[160];
        (void)snprintf(arguments, sizeof arguments, SMALL "%s", cases[i].arguments);
        refuse(check, arguments, cases[i].status, cases[i].words, 2);
    }
    refuse(check, "random:llama-3.1-405b --replay 9:9 --plan h100x4", 2,
           "--plan: no split fits: weights of ", 5);
}

/* A plan without a split that keeps the targets is none, also for who asks by JSON. */
static void no_plan_is_an_error(struct check *check) {
    write_rates(check);
    struct outcome o = run(check, SLOW "--replay 400:10 --itl 0.1"); /* a token takes 1.6 ms … */
    double ttft = 0, itl = 0;
    const char *words = "dynamo: no split keeps the targets; the best TTFT/ITL that was reached: ";
    const char *at = strstr(o.err, words);
    int n = at ? sscanf(at + strlen(words), "%lf ms / %lf ms", &ttft, &itl) : 0;
    CHECK(o.status == 1 && n == 2 && itl > 1.6 && itl < 1.7, "%d: %g: %s", o.status, itl, o.err);
    CHECK(ttft > 50 && ttft < 60, "%g", ttft); /* … and two shards read a prompt in 57 */
    CHECK(strstr(o.out, "1 x TP 2 together"), "the splits: %s", o.out);
    expect(check, SLOW "--replay 400:10 --itl 0.1 --json", 1, "{*", "dynamo: no split keeps *");
    expect(check, SMALL "--plan h100 --replay 100000:10", 1, NULL,
           "dynamo: no split keeps the targets: requests fail; request 0: the prompt has 100000 *");
}

int main(int argc, char **argv) {
    static const struct test tests[] = {TEST(apart_wins_where_gaps_are_watched),
                                        TEST(together_wins_where_little_is_decoded),
                                        TEST(one_gpu_is_shared),
                                        TEST(the_same_arguments_give_the_same_bytes),
                                        TEST(every_split_is_told),
                                        TEST(break_even_is_that_of_the_rates),
                                        TEST(lines_are_planned),
                                        TEST(cut_answers_are_not_served),
                                        TEST(all_lines_are_run),
                                        TEST(what_is_too_short_is_told),
                                        TEST(refused_in_a_line),
                                        TEST(no_plan_is_an_error)};
    return run_tests(tests, COUNT(tests), argc, argv);
}
