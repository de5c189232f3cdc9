/* test_terminal.c: the program at a pseudo terminal: what people type, paste and interrupt there.
 *
 * What stands on the screen is told by screen.h. Columns of characters are held against Unicode's,
 * job control against a shell's. Run from the repository's root. */
#define _GNU_SOURCE
#define JSON_IMPLEMENTATION
#define WRAP_IMPLEMENTATION
#include "files.h"
#include "screen.h"
#include "../lib/wrap.h"

/* What was written since `from`. */
static struct screen *screen_of(const struct live *live, size_t from, int columns) {
    struct screen *s = screen_new(SCREEN_ROWS, columns);
    screen_write(s, live->text + from, live->seen - from);
    return s;
}

#define PROMPT "\033[J> \r\033[2C" /* with nothing behind it */

static struct live converse(struct check *check, const char *arguments, int columns) {
    setenv("TERM", "xterm", 1);
    struct live live = live_start(check, true, arguments);
    live_resize(&live, 24, columns);
    live_until(&live, PROMPT);
    return live;
}

/* ---- columns, and where a line is broken ---- */

/* Those of Unicode's table EastAsianWidth.txt (W and F take two), and of its categories of marks:
 * of each kind some that are easily got wrong. */
static void columns_are_those_of_unicode(struct check *check) {
    static const struct {
        uint32_t first, last;
        int columns;
    } ranges[] = {
        {' ', '~', 1},         {0xA1, 0xAC, 1},       {0x300, 0x36F, 0},     {0x400, 0x482, 1},
        {0x5D0, 0x5EA, 1},     {0x93E, 0x940, 1},     {0x941, 0x948, 0},     {0x200B, 0x200D, 0},
        {0x231A, 0x231B, 2},   {0x2500, 0x257F, 1},   {0x26A1, 0x26A1, 2},   {0x2705, 0x2705, 2},
        {0x2713, 0x2713, 1},   {0x2B50, 0x2B50, 2},   {0x3041, 0x3096, 2},   {0x4E00, 0x9FFF, 2},
        {0xAC00, 0xD7A3, 2},   {0xFE0F, 0xFE0F, 0},   {0xFF01, 0xFF60, 2},   {0xFF61, 0xFF9F, 1},
        {0x1F321, 0x1F323, 1}, {0x1F600, 0x1F64F, 2}, {0x1F680, 0x1F6C5, 2}, {0x20000, 0x2A6DF, 2}};
    for (size_t i = 0; i < COUNT(ranges); i++)
        for (uint32_t code = ranges[i].first; code <= ranges[i].last; code++)
            CHECK(wrap_columns(code) == ranges[i].columns, "U+%04X: %d, expected %d",
                  (unsigned)code, wrap_columns(code), ranges[i].columns);
    CHECK(wrap_columns(UINT32_MAX) == 1 && wrap_columns('\n') == 1, "what is none");
}

/* A line holds as many of its words as fit. */
static void expect_wrapped(struct check *check, const struct screen *s, int row, const char *text,
                           int width) {
    while (*text) {
        char line[80] = "";
        size_t used = 0;
        while (*text && *text != '\n') {
            size_t n = strcspn(text, " \n");
            if (used > 0 && used + 1 + n > (size_t)width)
                break;
            used += (size_t)sprintf(line + used, "%s%.*s", used > 0 ? " " : "", (int)n, text);
            text += n + (text[n] == ' ');
        }
        text += *text == '\n';
        const char *got = screen_row(s, row++);
        CHECK(!strcmp(got, line), "row %d: `%s`, expected `%s`", row, got, line);
    }
}

static void words_are_wrapped(struct check *check) {
    srand(5);
    for (int round = 0; round < (SANITIZED ? 20 : 200); round++) {
        char text[4096] = "", *out = NULL;
        size_t length = 0, size = 0;
        struct wrap wrap = {0};
        struct screen *s = screen_new(SCREEN_ROWS, 80);
        s->returns = true;
        FILE *file = open_memstream(&out, &size); /* of no width: 80 */
        while (length < 1000) {
            for (int n = 1 + rand() % 20; n > 0; n--)
                text[length++] = (char)('a' + rand() % 26);
            text[length++] = rand() % 30 == 0 ? '\n' : ' ';
        }
        text[--length] = 0;
        for (size_t at = 0, n; at < length; at += n) { /* in pieces, as tokens come */
            n = 1 + (size_t)rand() % 9;
            n = n < length - at ? n : length - at;
            wrap_write(&wrap, file, text + at, n);
        }
        fclose(file);
        screen_write(s, out, size);
        CHECK(s->n_faults == 0, "%d faults: %s", s->n_faults, out);
        expect_wrapped(check, s, 0, text, 79);
        free(out);
    }
}

/* Characters of two columns break anywhere; what is no text is shown, not obeyed. */
static void odd_characters_are_wrapped(struct check *check) {
    char text[600] = "", *out = NULL;
    size_t size = 0;
    struct wrap wrap = {0};
    for (int i = 0; i < 50; i++)
        strcat(text, "\xE4\xB8\xAD");
    strcat(text, "\nx\033[31m\x9F\a\r\ty\n");
    memset(text + strlen(text), 'w', 100);
    FILE *file = open_memstream(&out, &size);
    wrap_write(&wrap, file, text, strlen(text));
    fclose(file);
    char *newline = strchr(out, '\n');
    CHECK(newline - out == 39 * 3, "%td bytes in the first line: %s", newline - out, out);
    CHECK(strstr(out, "\nx?[31m??\ty\n"), "%s", out);
    CHECK(strlen(strrchr(out, '\n') + 1) == 21, "a word longer than a line: %s", out);
    free(out);
    /* a mark stays with the character that it is on, though the word behind goes */
    strcpy(text, "\xE3\x81\x8B\xE3\x82\x99");
    memset(text + 6, 'w', 78);
    wrap = (struct wrap){0};
    file = open_memstream(&out, &size);
    wrap_write(&wrap, file, text, 6 + 78);
    fclose(file);
    struct screen *s = screen_new(SCREEN_ROWS, 80);
    s->returns = true;
    screen_write(s, out, size);
    CHECK(s->n_faults == 0 && !strcmp(screen_row(s, 0), "\xE3\x81\x8B\xE3\x82\x99"), "%s", out);
    free(out);
}

/* Whatever the columns, all is shown, and in order. */
static void mixed_characters_are_wrapped(struct check *check) {
    static const char *const pieces[] = {"a",
                                         "be",
                                         " ",
                                         "\n",
                                         "\xE4\xB8\xAD",
                                         "\xF0\x9F\x91\x8D",
                                         "\t",
                                         "e\xCC\x81",
                                         "\xE3\x81\x8B\xE3\x82\x99",
                                         "\xE0\xA4\xB9\xE0\xA4\xBF",
                                         "\xE2\x9C\x85"};
    srand(7);
    for (int round = 0; round < (SANITIZED ? 10 : 100); round++) {
        char text[8192] = "", *out = NULL;
        size_t size = 0;
        struct wrap wrap = {0};
        struct screen *s = screen_new(SCREEN_ROWS, 80);
        s->returns = true;
        FILE *file = open_memstream(&out, &size);
        for (int i = 0; i < 1000; i++) {
            const char *piece = pieces[rand() % (int)COUNT(pieces)];
            strcat(text, piece);
            wrap_write(&wrap, file, piece, strlen(piece));
        }
        fclose(file);
        screen_write(s, out, size);
        CHECK(s->n_faults == 0 && !strcmp(screen_text(s), squeezed(text)), "%d faults: %s",
              s->n_faults, out);
        free(out);
    }
}

static void answers_are_wrapped(struct check *check) {
    struct outcome plain = run(check, "model.bin -p 'Once upon a time' -n 120 -t 0");
    CHECK(plain.status == 0 && !strchr(plain.out, '\033'), "%s", plain.out);
    struct live live = converse(check, "model.bin -n 120 -t 0", 40);
    size_t from = live.seen;
    talk(&live, &(struct turn){"Once upon a time\r", "\033[?2004h"}, 1);
    struct screen *s = screen_of(&live, from, 40);
    CHECK(strlen(plain.out) > 300 && s->n_faults == 0, "%d faults: %s", s->n_faults, live.text);
    expect_wrapped(check, s, 1, plain.out, 39);
    leave(&live, "\004");
    /* piped text is as it is, at whatever terminal the rest is shown */
    live = live_shell(check, true,
                      DYNAMO_PROGRAM " model.bin -p 'Once upon a time' -n 120 -t 0 | cat");
    live_resize(&live, 24, 40);
    CHECK(live_end(&live) == 0 && strstr(live.text, strndupa(plain.out, 200)), "%s", live.text);
}

/* ---- lines ---- */

static void rows_are_shown(struct check *check, const struct live *live, size_t from, int width,
                           const char *rows) {
    char *lines[8];
    struct screen *s = screen_of(live, from, width);
    int n = split(rows, "|", lines, 8);
    CHECK(s->n_faults == 0, "%d faults: %s", s->n_faults, live->text + from);
    for (int i = 0; i <= n; i++)
        CHECK(!strcmp(screen_row(s, i), i < n ? lines[i] : ""), "row %d: `%s`, expected `%s`: %s",
              i, screen_row(s, i), i < n ? lines[i] : "", live->text + from);
}

/* In as many rows as it takes, broken behind blanks; again where the terminal has another size. */
static void long_lines_take_rows(struct check *check) {
    struct live live = converse(check, "model.bin -n 3", 30);
    size_t from = live.seen;
    talk(&live, &(struct turn){"The quick brown fox jumps over the lazy dog", "dog\r\033[19C"}, 1);
    rows_are_shown(check, &live, from, 30, "> The quick brown fox jumps|  over the lazy dog");
    talk(&live, &(struct turn){"\001", "dog\033[1A\r\033[2C"}, 1); /* Ctrl-A, and in the middle */
    talk(&live, &(struct turn){"Now: ", "dog\033[1A\r\033[7C"}, 1);
    rows_are_shown(check, &live, from, 30, "> Now: The quick brown fox|  jumps over the lazy dog");
    live_resize(&live, 24, 60);
    live_until(&live, "lazy dog\r\033[7C");
    rows_are_shown(check, &live, from, 60, "> Now: The quick brown fox jumps over the lazy dog");
    talk(&live, &(struct turn){"\005\xE4\xB8\xAD", "dog\xE4\xB8\xAD\r\033[52C"}, 1);
    from = live.seen;
    live_resize(&live, 24, 20);
    live_until(&live, "dog\xE4\xB8\xAD\r\033[7C");
    rows_are_shown(check, &live, from, 20,
                   "> Now: The quick|  brown fox jumps|  over the lazy|  dog\xE4\xB8\xAD");
    talk(&live, &(struct turn){"\003", PROMPT}, 1);
    leave(&live, "\004");
}

/* The cursor goes over a character with its marks, and Delete and Backspace take both. */
static void marks_go_with_their_character(struct check *check) {
    struct live live = converse(check, "model.bin -n 3", 80);
    size_t from = live.seen;
    talk(&live, &(struct turn){"ae\xCC\x81\xE4\xB8\xAD\xE3\x82\x99z", "z\r\033[7C"}, 1);
    talk(&live, &(struct turn){"\002\002", "z\r\033[4C"}, 1);
    talk(&live, &(struct turn){"\004", "z\r\033[4C"}, 1);
    rows_are_shown(check, &live, from, 80, "> ae\xCC\x81z");
    talk(&live, &(struct turn){"\177", "z\r\033[3C"}, 1);
    rows_are_shown(check, &live, from, 80, "> az");
    talk(&live, &(struct turn){"\003", PROMPT}, 1);
    leave(&live, "\004");
}

/* What is typed while an answer comes does not stand in the midst of it, but in the next line. */
static void typing_leaves_an_answer_alone(struct check *check) {
    struct live live = converse(check, "model.bin -n 250", 80);
    talk(&live, (struct turn[]){{"Once\r", "\033[?2004l"}, {"xyzzy", "> xyzzy\r"}}, 2);
    CHECK(count_of(live.text, "xy") == 1, "%s", live.text);
    talk(&live, &(struct turn){"\003", PROMPT}, 1);
    leave(&live, "\004");
}

static void pastes_are_text(struct check *check) {
    struct live live = converse(check, "model.bin -n 3", 80);
    size_t from = live.seen;
    talk(&live,
         &(struct turn){"\033[200~/exit\r\na\tb\003\004\032\034\r\033[Ac\r\r\033[201~",
                        "\n  \r\033[2C"},
         1);
    rows_are_shown(check, &live, from, 80, "> /exit|  a b|  [Ac");
    talk(&live, &(struct turn){"\r", "\033[?2004l\r\n/exit\r\na\tb\r\n[Ac"}, 1); /* its echo */
    live_until(&live, PROMPT);
    from = live.seen;
    talk(&live,
         &(struct turn){"b\033\001a\005\033\033[D\033[200~x\033[201~\033[?62;22c\033[<0;1;7M\r",
                        "\r\naxb"},
         1);
    live_until(&live, PROMPT);
    leave(&live, "/exit\r");
    CHECK(strstr(live.text, "\033[?2004l[2 workers"), "pastes are told of still: %s", live.text);
}

static void blocks_are_turns(struct check *check) {
    static const struct turn turns[] = {
        {"\"\"\"\rThe cat\r/exit\r", "  /exit\r\n  "},
        {"sat\r\"\"\"\r", "\033[?2004l\r\nThe cat\r\n/exit\r\nsat"},
        {NULL, PROMPT},
        {"\"\"\"One \"\"day\"\"\"\r", "\033[?2004l\r\nOne \"\"day"},
        {NULL, PROMPT},
        {"\"\"\"/exit\"\"\"\r", "\033[?2004l\r\n/exit"},
        {NULL, PROMPT},
        {"\"\"\"\rlost\r\003", "^C"}, /* the whole of it is given up */
        {NULL, PROMPT},
        {"One\\\rTwo\r", "\033[?2004l\r\nOne\r\nTwo"},
        {NULL, PROMPT},
        {"\"\"\"\rat\rThe \xE4\xB8\xAD\033[A\033[Dc\033[Bend\r\"\"\"\r", /* by its arrows */
         "\nact\r\nThende \xE4\xB8\xAD"},
        {NULL, PROMPT},
    };
    struct live live = converse(check, "model.bin -n 3", 80);
    talk(&live, turns, COUNT(turns));
    leave(&live, "\004");
}

/* ---- history ---- */

static void expect_history(struct check *check, const char *expected) {
    size_t length;
    const char *text = read_file(check, scratch(".dynamo_history"), &length);
    CHECK(!strcmp(text, expected), "%s; expected %s", text, expected);
}

static void history_is_kept(struct check *check) {
    struct stat status = {0};
    shell(check, "rm -f $T/.dynamo_history"); /* of other tests */
    struct live live = converse(check, "model.bin -n 1", 80);
    struct live other = converse(check, "model.bin -n 1", 80);
    talk(&live,
         (struct turn[]){{"one\r", PROMPT}, {"\033[200~a\rb\\\033[201~\r", "  b\r\n  \r\033[2C"}},
         2);
    talk(&live, (struct turn[]){{"c\r", PROMPT}, {"c c\r", PROMPT}, {"c c\r", PROMPT}}, 3);
    talk(&other, &(struct turn){"two\r", PROMPT}, 1);
    leave(&live, "\004");
    leave(&other, "\004");
    expect_history(check, "one\na\\nb\\nc\nc c\ntwo\n");
    CHECK(stat(scratch(".dynamo_history"), &status) == 0 && (status.st_mode & 0777) == 0600,
          "mode %o", (unsigned)status.st_mode);
    live = converse(check, "model.bin -n 1", 80);
    talk(&live, &(struct turn){"\020\020\020", "> a\r\n  b\r\n  c\r\033[3C"}, 1);
    talk(&live, (struct turn[]){{"\016\016", "> two"}, {"\003", PROMPT}}, 2);
    talk(&live, (struct turn[]){{"new", "> new"}, {"\020\020", "> c c"}}, 2);
    talk(&live, (struct turn[]){{"\016\016\016", "> new"}, {"\003", PROMPT}},
         2); /* as it was left */
    leave(&live, "\004");
    /* without a home none is written */
    unsetenv("HOME");
    live = converse(check, "model.bin -n 1", 80);
    talk(&live, &(struct turn){"three\r", PROMPT}, 1);
    leave(&live, "\004");
    setenv("HOME", getenv("T"), 1);
    expect_history(check, "one\na\\nb\\nc\nc c\ntwo\n");
}

/* The file is cut to its end when it has become twice as long as what is used. */
static void history_is_bounded(struct check *check) {
    shell(check, "seq 2001 > $T/.dynamo_history");
    struct live live = converse(check, "model.bin -n 1", 80);
    shell(check, "seq 1002 2001 | cmp - $T/.dynamo_history");
    char *line = keep(9002);
    memset(line, 'x', 9000);
    talk(&live,
         (struct turn[]){{line, "xx"}, {"\025", PROMPT}, {"\020", "> 2001"}, {"\003", PROMPT}}, 4);
    strcpy(line + 7000, "\r"); /* longer than a line of the file may be */
    talk(&live, &(struct turn){line, PROMPT}, 1);
    leave(&live, "\004");
    shell(check, "seq 1002 2001 | cmp - $T/.dynamo_history; rm $T/.dynamo_history");
}

/* ---- signals ---- */

static void ctrl_c_gives_up_a_line(struct check *check) {
    static const struct turn turns[] = {
        {"lost\003", "> lost\r\033[6C\033[?2004l^C\r\n"},
        {NULL, PROMPT},
        {"\003", "^C\r\nCtrl-D leaves; /help lists the commands\r\n"},
        {NULL, PROMPT},
        {"Once\r", "\033[?2004l\r\nOnce"},
        {NULL, PROMPT}};
    struct live live = converse(check, "model.bin -n 3", 80);
    talk(&live, turns, COUNT(turns));
    kill(live.pid, SIGINT); /* from elsewhere */
    live_until(&live, "\r\nCtrl-D leaves");
    live_until(&live, PROMPT);
    kill(live.pid, SIGTSTP); /* without a shell that could let it go on, it goes on */
    live_until(&live, "\033[?2004l\033[?2004h");
    live_until(&live, PROMPT);
    leave(&live, "\004");
    live = live_shell(check, true, "echo begins; exec " DYNAMO_PROGRAM " model.bin -f - -n 3");
    talk(&live, (struct turn[]){{NULL, "begins\r\n"}, {"Once\n", "\r\nOnce"}, {NULL, "\r\n"}}, 3);
    /* what the terminal shows of it has a line of its own */
    talk(&live, &(struct turn){"\003", "^C\r\n[2 workers"}, 1);
    CHECK(live_end(&live) == 130, "%s", live.text);
}

/* A shell stops and continues it: the terminal is usable meanwhile, and the line is there again. */
static void a_shell_can_stop_it(struct check *check) {
    setenv("TERM", "xterm", 1);
    struct live live =
        live_shell(check, true,
                   "set -m; " DYNAMO_PROGRAM " model.bin -n 3; stty -a; fg; echo "
                   "left with $?; " DYNAMO_PROGRAM " model.bin; echo left with $?; stty -a");
    static const struct turn turns[] = {{NULL, PROMPT},
                                        {"half a li", "> half a li\r\033[11C"},
                                        {"\032", " icanon"},
                                        /* Ctrl-Z */ {NULL, " echo "},
                                        {NULL, "> half a li\r\033[11C"},
                                        {"ne\r", "\033[?2004l\r\nhalf a line"},
                                        {NULL, PROMPT},
                                        {"\004", "left with 0"},
                                        {NULL, PROMPT},
                                        {"ab\034", "left with 131"}, /* Ctrl-\ */
                                        {NULL, " icanon"},
                                        {NULL, " echo "}};
    live_resize(&live, 24, 80);
    talk(&live, turns, COUNT(turns));
    (void)live_end(&live);
}

/* What was ignored when it began stays so, as of nohup. */
static void ignored_signals_stay_ignored(struct check *check) {
    struct live live = live_shell(check, false,
                                  "trap '' HUP INT QUIT; exec " DYNAMO_PROGRAM
                                  " random:stories-15m:q8_0 --ids 1,2 -n 90");
    live_bytes(&live, 20);
    kill(live.pid, SIGHUP);
    kill(live.pid, SIGINT);
    kill(live.pid, SIGQUIT);
    CHECK(live_end(&live) == 0, "%s", live.text);
    CHECK(count_of(live.text, ",") == 91, "%s", live.text);
}

/* ---- what is told ---- */

static void the_first_line_says_what_runs(struct check *check) {
    struct live live = converse(check, "model.bin --devices cpu:3 --prefill 0 --decode 1,2", 80);
    expect_wrapped(
        check, screen_of(&live, 0, 80), 0,
        "model.bin: llama, 1.9M weights in BF16 (3.8 MB), a base model, which continues "
        "what you type; on cpu, 3 workers: 1 prefill, 2 decode. /help lists the commands",
        79);
    talk(&live, (struct turn[]){{"/help\r", "\"\"\""}, {NULL, PROMPT}}, 2);
    leave(&live, "\004");
}

/* A dumb terminal is sent text alone; one without colours none of them. */
static void terminals_are_respected(struct check *check) {
    setenv("TERM", "dumb", 1);
    struct live live = live_start(check, true, "model.bin -n 50");
    talk(&live,
         (struct turn[]){{NULL, "> "}, {"Once\n", "\n> "}, {"/stats\n", "blocks of the host"}}, 3);
    talk(&live, (struct turn[]){{NULL, "> "}, {"\"\"\"\n", ". "}, {"lost\n", ". "}}, 3);
    talk(&live, (struct turn[]){{"\003", "> "}, {"Mia\n", "\nMia"}, {NULL, "\n> "}}, 3);
    leave(&live, "\004");
    CHECK(!strchr(live.text, '\033'), "%s", live.text);
    CHECK(strstr(live.text, "> \r\n[2 workers"), "the last words have their line: %s", live.text);
    setenv("TERM", "xterm", 1);
    for (int i = 0; i < 2; i++) {
        setenv("NO_COLOR", i ? "1" : "", 1);
        live = converse(check, "model.bin -n 3", 80);
        talk(&live, (struct turn[]){{"Once\r", "Once"}, {NULL, PROMPT}}, 2);
        talk(&live, (struct turn[]){{"/stats\r", "to first token, mean"}, {NULL, PROMPT}}, 2);
        const char *mean = strstr(live.text, "mean (ms)");
        mean = mean ? strpbrk(mean + 9, i ? "0123456789" : "m") : NULL; /* behind ESC [ 0 m */
        CHECK(mean && atof(mean + !i) > 0, "no time is kept: %s", live.text);
        leave(&live, "\004");
        CHECK((strstr(live.text, "\033[2m") != NULL) == !i, "NO_COLOR: %d: %s", i, live.text);
    }
    unsetenv("NO_COLOR");
}

static void ids_are_shown_without_a_tokenizer(struct check *check) {
    static const char words[] = "random:stories-15m:q8_0 --ids 1,2 -n 4 -t 0";
    struct outcome text = run(check, "%s", words), json = run(check, "%s --json", words);
    char expected[100], *ids = strdupa(answer(&json, "0", "ids"));
    snprintf(expected, sizeof expected, "1,2,%.*s\n", (int)strlen(ids) - 2, ids + 1);
    CHECK(strlen(ids) > 8 && !strcmp(text.out, expected), "%s; expected %s", text.out, expected);
    struct outcome again = run(check, "random:stories-15m:q8_0 -t 0 -n 1 --ids %.*s",
                               (int)strcspn(text.out, "\n"), text.out); /* they can be given back */
    CHECK(again.status == 0 && !strncmp(again.out, text.out, strlen(text.out) - 1), "%s",
          again.out);
    CHECK(!strcmp(answer(&json, "0", "text"), ""), "%s", json.out);
    static const char *const of_texts[] = {"--stop a", "--template chatml",
                                           "--tokenizer /dev/null"};
    for (size_t i = 0; i < COUNT(of_texts); i++) { /* there are no texts that these could be of */
        char line[96];
        snprintf(line, sizeof line, "%s %s", words, of_texts[i]);
        refuse(check, line, 1, i < 2 ? "no tokenizer: random" : "no tokenizer: ", 5);
    }
}

static void numbers_are_short(struct check *check) {
    struct outcome o = run(check, "model.bin -p Once -n 20 --json --stats");
    struct outcome load = run(check, "model.bin --replay 20:5 --limit 3 --json");
    const char *const texts[] = {o.out, load.out};
    for (int i = 0; i < 2; i++) {
        int n = 0;
        for (const char *at = texts[i]; (at = strchr(at, '.')); n++)
            CHECK(strspn(++at, "0123456789") <= 6, "%.20s: %s", at, texts[i]);
        CHECK(n > 3, "%s", texts[i]);
    }
}

/* A request is named as its file names it. */
static void errors_name_line_and_id(struct check *check) {
    static const char lines[] = "The cat\n\n{\"ids\":[99999],\"id\":\"mine\"}\n{\"ids\":[99999]}\n"
                                "{\"ids\":[99999],\"id\":\"\\u001b[31m\"}\n";
    write_file(check, "lines", lines, sizeof lines - 1);
    expect(check, "model.bin -f $T/lines -n 3", 3, "The cat*",
           "dynamo: request mine: */lines:3: 99999 is no token*\n"
           "dynamo: request 2: */lines:4: 99999 is no token*\n"
           "dynamo: request [?][[]31m: */lines:5: 99999 is no token*");
    expect(check, "model.bin --ids 99999", 3, NULL, "dynamo: 99999 is no token*");
}

int main(int argc, char **argv) {
    static const struct test tests[] = {TEST(columns_are_those_of_unicode),
                                        TEST(words_are_wrapped),
                                        TEST(odd_characters_are_wrapped),
                                        TEST(mixed_characters_are_wrapped),
                                        TEST(answers_are_wrapped),
                                        TEST(long_lines_take_rows),
                                        TEST(marks_go_with_their_character),
                                        TEST(typing_leaves_an_answer_alone),
                                        TEST(pastes_are_text),
                                        TEST(blocks_are_turns),
                                        TEST(history_is_kept),
                                        TEST(history_is_bounded),
                                        TEST(ctrl_c_gives_up_a_line),
                                        TEST(a_shell_can_stop_it),
                                        TEST(ignored_signals_stay_ignored),
                                        TEST(the_first_line_says_what_runs),
                                        TEST(terminals_are_respected),
                                        TEST(ids_are_shown_without_a_tokenizer),
                                        TEST(numbers_are_short),
                                        TEST(errors_name_line_and_id)};
    (void)setlocale(LC_CTYPE, "C.UTF-8"); /* of wrap.h and screen.h */
    return run_tests(tests, COUNT(tests), argc, argv);
}
