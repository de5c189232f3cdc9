/* terminal.h: a conversation at a prompt: a line editor, the commands, and what was said so far.
 *
 *     chat_run(&answers, &options.request); // until the end of input, or /exit
 *     editor_restore(); // from any thread, for who ends or stops the program in between
 *     editor_resume(); // and for who lets it go on
 *     if (chat_interrupted()) ... // likewise, after a Ctrl-C that stopped no answer
 *
 * With a chat model each turn follows all turns before it, as token ids: the answers as they were
 * generated, also those that Ctrl-C cut off. So the next turn's prompt begins with blocks that the
 * KV cache has. With a base model every prompt stands alone and is continued.
 *
 * Keys: arrows, Home, End, Delete, Backspace; Ctrl-A, E (ends), B, F, P, N (arrows), K, U, W (cut),
 * L (clear the screen), C (give up the line), D (delete; on an empty line: the end), Z (stop the
 * program), \ (end it). A line that ends with \ goes on in the next, and so does all between two
 * """. What is pasted is text, whatever its bytes, and sent by the next Enter. Turns are kept over
 * runs, in ~/.dynamo_history; without HOME they are not.
 *
 * The terminal gives each key as it comes while a line is read, and shows none while it is
 * answered: those are of the next line. A line takes as many rows as it needs, and is shown again
 * when the terminal has another size. Two signals are taken, between two keys alone: SIGWINCH, its
 * size has changed; and SIGCONT, the program goes on after it was stopped, and finds the terminal
 * as a shell left it. If stdin or stderr is no terminal, or a dumb one, lines are read as they are.
 * Read next: answers.h, lib/template.h. */
#ifndef TERMINAL_H
#define TERMINAL_H

#include "answers.h"

void chat_run(struct answers *answers, const struct request_spec *defaults);
void editor_restore(void);
void editor_resume(void); /* nothing is shown of what is typed while an answer comes */
/* True: a conversation goes on, and has said how to end it. */
bool chat_interrupted(void);

#endif /* TERMINAL_H */

#ifdef TERMINAL_IMPLEMENTATION
#undef TERMINAL_IMPLEMENTATION

#include "stats.h"
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/ttydefaults.h> /* CTRL */
#include <termios.h>
#include <unistd.h>

/* ---- the line editor ---- */

enum {
    EDITOR_LINES = 1000,  /* of history; the file has twice as many at most, when it is opened */
    HISTORY_LENGTH = 4096 /* bytes of a line in the file, about: a longer one is not kept */
};

struct editor {
    char *line; /* (length) what is typed, a zero byte behind it */
    size_t length, at;
    int row;                         /* of the cursor, counted from the first that is shown */
    char *history[EDITOR_LINES + 1]; /* (n_history) the oldest first; then what is typed now, … */
    int n_history, shown;            /* … when another is shown */
    FILE *file;                      /* of the history; NULL: none */
    bool edits;                      /* else lines are read as they are */
    bool is_text;                    /* what was read is no command, whatever it begins with */
};

static const char editor_prompt[] = "> ", editor_block[] = "\"\"\"";
static const char editor_hint[] = "Ctrl-D leaves; /help lists the commands\n";
static struct termios editor_before;
static atomic_bool editor_is_set, editor_answers, editor_gives_up, chat_goes_on;
static volatile sig_atomic_t editor_continued;

/* From any thread, so without stdio. */
static void editor_tell(const char *words) {
    (void)!write(STDERR_FILENO, words, strlen(words));
}

void editor_restore(void) {
    if (atomic_exchange(&editor_is_set, false)) {
        editor_tell("\033[?2004l");
        (void)tcsetattr(STDIN_FILENO, TCSADRAIN, &editor_before);
    }
}

bool chat_interrupted(void) {
    if (!atomic_load(&chat_goes_on))
        return false;
    atomic_store(&editor_gives_up, true);
    editor_tell("\n");
    editor_tell(editor_hint);
    if (atomic_load(&editor_is_set))
        (void)kill(getpid(), SIGCONT); /* it shows its line again */
    else
        editor_tell(editor_prompt);
    return true;
}

static void editor_wake(int number) {
    editor_continued |= number == SIGCONT;
}

/* For a line each key is read as it comes; for an answer nothing is shown in the midst of it. */
static void editor_set(bool keys) {
    struct termios mode = editor_before;
    mode.c_lflag &= ~(tcflag_t)ECHO;
    if (keys) {
        mode.c_lflag &= ~(tcflag_t)(ICANON | IEXTEN | ISIG); /* Ctrl-C, Z and \ are keys, too */
        mode.c_iflag &= ~(tcflag_t)(IXON | ICRNL);
        mode.c_cc[VMIN] = 1;
        mode.c_cc[VTIME] = 0;
    }
    (void)tcsetattr(STDIN_FILENO, TCSADRAIN, &mode);
    atomic_store(&editor_is_set, true);
    atomic_store(&editor_answers, !keys);
    editor_tell(keys ? "\033[?2004h" : "\033[?2004l");
}

void editor_resume(void) { /* a line that is edited sees to itself, when SIGCONT has come */
    if (atomic_load(&editor_answers) && tcgetpgrp(STDIN_FILENO) == getpgrp())
        editor_set(false);
}

/* The end of the character at `at`, with the marks that it bears; the beginning of that before. */
static size_t editor_next(const struct editor *e, size_t at) {
    size_t from = at;
    for (uint32_t code; at < e->length;) {
        size_t n = utf8_char(e->line + at, e->length - at, &code);
        if (at > from && wrap_columns(code) > 0)
            break;
        at += n;
    }
    return at;
}

static size_t editor_previous(const struct editor *e, size_t at) {
    size_t before = 0;
    for (size_t next; (next = editor_next(e, before)) < at; before = next) {
    }
    return before;
}

/* Where the row ends that begins at `start`, of so many columns: behind a newline, else behind the
 * last blank that fits. *columns: of its part before the cursor. */
static size_t editor_row(const struct editor *e, size_t start, int room, int *columns) {
    size_t blank = start, at = start;
    uint32_t code;
    *columns = 0;
    for (int used = 0; at < e->length && e->line[at] != '\n';) {
        size_t n = utf8_char(e->line + at, e->length - at, &code);
        used += wrap_columns(code);
        if (used > room && e->line[at] != ' ')
            return blank > start ? blank : at;
        at += n;
        *columns = at <= e->at ? used : *columns;
        if (used > room)
            return at; /* the blank stands in the column that is left */
        blank = e->line[at - 1] == ' ' ? at : blank;
    }
    return at + (at < e->length);
}

/* Lays the line out, and writes those of its rows that are in [first, last). Returns how many there
 * are; *row, *column: where the cursor is. */
static int editor_rows(const struct editor *e, int room, int first, int last, int *row,
                       int *column) {
    int n = 0, indent = (int)strlen(editor_prompt);
    bool more = true;
    for (size_t start = 0, end; more; start = end, n++) {
        int columns;
        uint32_t code;
        end = editor_row(e, start, room - indent, &columns);
        more = end < e->length || (end > start && e->line[end - 1] == '\n');
        if (e->at >= start) {
            *row = n;
            *column = indent + columns;
        }
        if (n < first || n >= last)
            continue;
        (void)fprintf(stderr, "%s%*s", n > first ? "\n" : "", indent, n > 0 ? "" : editor_prompt);
        for (size_t at = start, size; at < end && e->line[at] != '\n'; at += size) {
            size = utf8_char(e->line + at, end - at, &code);
            bool shows = wrap_shows(code);
            (void)fwrite(shows          ? e->line + at
                         : code == '\t' ? " "
                                        : "?",
                         1, shows ? size : 1, stderr);
        }
    }
    return n;
}

/* Writes the line and the cursor again; of more rows than the screen has, down to the cursor's. */
static void editor_show(struct editor *e) {
    int height, row = 0, column = 0, room = wrap_width(STDERR_FILENO, &height) - 1;
    (void)fprintf(stderr, e->row > 0 ? "\r\033[%dA\033[J" : "\r\033[J", e->row);
    (void)editor_rows(e, room, 0, 0, &row, &column);
    e->row = row < height ? row : height - 1;
    int last = row - e->row + height;
    int n = editor_rows(e, room, row - e->row, last, &row, &column);
    n = n < last ? n : last;
    if (n - 1 > row)
        (void)fprintf(stderr, "\033[%dA", n - 1 - row);
    (void)fprintf(stderr, "\r\033[%dC", column);
    (void)fflush(stderr);
}

/* The next byte; -1: the end of input. */
static int editor_byte(struct editor *e) {
    sigset_t mask;
    unsigned char byte;
    struct pollfd input = {.fd = STDIN_FILENO, .events = POLLIN};
    (void)pthread_sigmask(SIG_SETMASK, NULL, &mask);
    sigdelset(&mask, SIGWINCH);
    sigdelset(&mask, SIGCONT);
    while (ppoll(&input, 1, NULL, &mask) < 0 && errno == EINTR) {
        e->row = editor_continued ? 0 : e->row; /* others have written since */
        editor_continued = 0;
        editor_set(true);
        editor_show(e);
    }
    return read(STDIN_FILENO, &byte, 1) == 1 ? byte : -1;
}

static void editor_insert(struct editor *e, const char *bytes, size_t n) {
    for (size_t i = 0; i < n; i++) {
        e->line = grow(e->line, e->length + 1, 1);
        memmove(e->line + e->at + 1, e->line + e->at, e->length++ - e->at + 1);
        e->line[e->at++] = bytes[i];
    }
}

static void editor_cut(struct editor *e, size_t from, size_t to) {
    memmove(e->line + from, e->line + to, e->length - to);
    e->length -= to - from;
    e->at = from;
    e->line[e->length] = 0;
}

enum { KEY_DELETE = 256, KEY_PASTE }; /* other keys are bytes */

/* What an escape sequence means: KEY_..., or the Ctrl key that does the same. 0: nothing. */
static int editor_escape(struct editor *e) {
    static const char ends[] = "ABCDH17F48"; /* arrows up, down, right, left; Home; End: … */
    static const char same[] = "PNFBAAAEEE"; /* … Ctrl with these */
    int number = 0, byte;
    while ((byte = editor_byte(e)) == 27) { /* Esc, and then a key that sends one */
    }
    if (byte != '[' && byte != 'O')
        return byte > 0 && byte < ' ' ? byte : 0;
    while ((byte = editor_byte(e)) >= '0' && byte <= '?')
        number = byte <= '9' && number < 1000 ? 10 * number + byte - '0' : 1000;
    if (byte == '~' && (number == 3 || number == 200))
        return number == 3 ? KEY_DELETE : KEY_PASTE;
    if (byte == '~') /* `ESC [ 4 ~`, else `ESC [ A`, or `ESC [ 1 ; 5 A` */
        byte = number < 10 ? '0' + number : 0;
    const char *found = byte > 0 ? strchr(ends, byte) : NULL;
    return found ? CTRL(same[found - ends]) : 0;
}

/* Takes in what is pasted, up to the sequence that ends it: lines, tabs, no other control byte. */
static void editor_paste(struct editor *e) {
    static const char end[] = "\033[201~";
    int byte = 0;
    for (size_t n = 0; n < sizeof end - 1;) { /* so many bytes of it have come */
        int before = byte;
        byte = editor_byte(e);
        if (byte < 0)
            return;
        if (byte == end[n]) {
            n++;
            continue;
        }
        editor_insert(e, end + 1, n > 0 ? n - 1 : 0);
        n = byte == end[0];
        char c = byte == '\r' ? '\n' : (char)byte;
        bool again = byte == '\n' && before == '\r'; /* a line that ends in both */
        if (c == '\t' || (c == '\n' && !again) || (byte >= ' ' && byte != 127))
            editor_insert(e, &c, 1);
    }
}

/* To the line above, or below, of what is edited. False: there is none. */
static bool editor_move(struct editor *e, int step) {
    size_t start = e->at, to = e->at + strcspn(e->line + e->at, "\n") + 1;
    while (start > 0 && e->line[start - 1] != '\n')
        start--;
    if (step < 0) {
        if (start == 0)
            return false;
        for (to = start - 1; to > 0 && e->line[to - 1] != '\n';)
            to--;
    }
    if (to > e->length)
        return false;
    for (; start < e->at && to < e->length && e->line[to] != '\n'; start = editor_next(e, start))
        to = editor_next(e, to);
    e->at = to;
    return true;
}

/* To another of what was typed before, where there is no line to go to. */
static void editor_recall(struct editor *e, int step) {
    int wanted = e->shown + step;
    if (editor_move(e, step))
        return;
    if (wanted < 0 || wanted > e->n_history)
        return;
    if (e->shown == e->n_history) {
        free(e->history[e->n_history]);
        e->history[e->n_history] = strdup(e->line);
    }
    e->shown = wanted;
    editor_cut(e, 0, e->length);
    if (e->history[wanted])
        editor_insert(e, e->history[wanted], strlen(e->history[wanted]));
}

/* Whether it is all of a turn, which it then is alone; else it goes on in another line. */
static bool editor_ends(struct editor *e) {
    size_t n = e->length;
    while (n > 0 && e->line[n - 1] == '\n') /* the end of what was pasted */
        n--;
    const size_t quotes = sizeof editor_block - 1;
    bool block = strncmp(e->line, editor_block, quotes) == 0;
    bool backslash = !block && n > 0 && e->line[n - 1] == '\\';
    if (backslash ||
        (block && (n < 2 * quotes || memcmp(e->line + n - quotes, editor_block, quotes) != 0))) {
        editor_cut(e, backslash ? n - 1 : e->length, e->length);
        editor_insert(e, "\n", 1);
        return false;
    }
    editor_cut(e, n, e->length);
    if (block) { /* without the quotes, and the newlines beside them */
        n -= quotes;
        editor_cut(e, n - (n > quotes && e->line[n - 1] == '\n'), e->length);
        editor_cut(e, 0, quotes + (e->line[quotes] == '\n'));
        e->at = e->length;
    }
    e->is_text = block || memchr(e->line, '\n', e->length);
    return true;
}

enum editor_state { EDITING, ENTERED, CLEARED, ENDED };

static enum editor_state editor_key(struct editor *e, int key) {
    size_t word = e->at;
    switch (key) {
    case '\r':
    case '\n': return ENTERED;
    case CTRL('C'): return CLEARED;
    case CTRL('Z'): (void)kill(0, SIGTSTP); break; /* as the terminal would */
    case CTRL('\\'): (void)kill(0, SIGQUIT); break;
    case KEY_PASTE: editor_paste(e); break;
    case CTRL('A'): e->at = 0; break;
    case CTRL('E'): e->at = e->length; break;
    case CTRL('B'): e->at = editor_previous(e, e->at); break;
    case CTRL('F'): e->at = editor_next(e, e->at); break;
    case CTRL('P'): editor_recall(e, -1); break;
    case CTRL('N'): editor_recall(e, 1); break;
    case CTRL('K'): editor_cut(e, e->at, e->length); break;
    case CTRL('U'): editor_cut(e, 0, e->at); break;
    case CTRL('L'):
        (void)fputs("\033[H\033[2J", stderr);
        e->row = 0;
        break;
    case 127:
    case CTRL('H'): editor_cut(e, editor_previous(e, e->at), e->at); break;
    case CTRL('D'):
        if (e->length == 0)
            return ENDED;
        /* fall through */
    case KEY_DELETE: editor_cut(e, e->at, editor_next(e, e->at)); break;
    case CTRL('W'):
        while (word > 0 && e->line[word - 1] == ' ')
            word--;
        while (word > 0 && e->line[word - 1] != ' ')
            word--;
        editor_cut(e, word, e->at);
        break;
    default: break;
    }
    return EDITING;
}

/* Edits a line until it is a turn, or given up. */
static enum editor_state editor_line(struct editor *e) {
    enum editor_state state = EDITING;
    editor_show(e);
    while (state == EDITING) {
        int byte = editor_byte(e), more = 0;
        if (byte < 0)
            return ENDED;
        if (byte == '\t' || (byte >= ' ' && byte != 127))
            editor_insert(e, &(char){(char)byte}, 1);
        else
            state = editor_key(e, byte == 27 ? editor_escape(e) : byte);
        if (state != EDITING) {
            e->at = e->length;
            editor_show(e);
        }
        if (state == ENTERED && !editor_ends(e))
            state = EDITING;
        if (state == EDITING && (ioctl(STDIN_FILENO, FIONREAD, &more) != 0 || more == 0))
            editor_show(e); /* once for all that has come */
    }
    return state;
}

/* Lines as they come, until they are a turn. */
static enum editor_state editor_plain(struct editor *e) {
    bool ends = false, prompts = isatty(STDIN_FILENO) && isatty(STDERR_FILENO);
    int byte = 0;
    while (!ends && byte != EOF) {
        if (prompts)
            (void)fputs(e->length > 0 ? ". " : editor_prompt, stderr);
        size_t before = e->length;
        while ((byte = getchar()) != EOF && byte != '\n')
            editor_insert(e, &(char){(char)byte}, 1);
        if (atomic_exchange(&editor_gives_up, false)) { /* the lines before this one */
            editor_cut(e, 0, before);
            e->at = e->length;
        }
        ends = editor_ends(e);
    }
    bool ended = byte == EOF && e->length == 0;
    if (ended && prompts)
        (void)fputs("\n", stderr);
    return ended ? ENDED : ENTERED;
}

/* ---- its history ---- */

/* False: it is the last already, or nothing. */
static bool history_add(struct editor *e, const char *line) {
    if (*line == 0 || (e->n_history > 0 && !strcmp(e->history[e->n_history - 1], line)))
        return false;
    char *copy = strdup(line);
    if (!copy)
        return false;
    free(e->history[e->n_history]);
    e->history[e->n_history] = NULL;
    if (e->n_history == EDITOR_LINES) {
        free(e->history[0]);
        memmove(e->history, e->history + 1, sizeof *e->history * EDITOR_LINES);
        e->n_history--;
    }
    e->history[e->n_history++] = copy;
    return true;
}

/* Adds a line to the file, in which \n and \\ stand for two bytes of it. */
static void history_write(int file, const char *line) {
    char bytes[HISTORY_LENGTH];
    size_t n = 0;
    for (; *line && n < HISTORY_LENGTH - 2; line++) {
        bool special = *line == '\n' || *line == '\\';
        if (special)
            bytes[n++] = '\\';
        bytes[n++] = *line == '\n' ? 'n' : *line;
    }
    bytes[n++] = '\n';
    ssize_t written = *line ? 0 : write(file, bytes, n); /* who cannot keep it goes on without */
    (void)written;
}

/* Runs that share the file take turns, and each adds to it what it reads: nothing is lost. */
static void history_open(struct editor *e) {
    const char *home = getenv("HOME");
    char path[4096], *line = NULL;
    size_t capacity = 0;
    int n = 0, flags = O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC | O_NONBLOCK;
    if (!home || !*home)
        return;
    (void)snprintf(path, sizeof path, "%s/.dynamo_history", home);
    e->file = fdopen(open(path, flags, 0600), "r+");
    if (!e->file)
        return;
    int file = fileno(e->file);
    (void)flock(file, LOCK_EX);
    for (ssize_t length; (length = getline(&line, &capacity, e->file)) > 0; n++) {
        char *to = line;
        line[length - (line[length - 1] == '\n')] = 0;
        for (const char *from = line; *from; from++) {
            bool special = *from == '\\' && (from[1] == 'n' || from[1] == '\\');
            *to++ = !special ? *from : *++from == 'n' ? '\n' : '\\';
        }
        *to = 0;
        (void)history_add(e, line);
    }
    if (n > 2 * EDITOR_LINES && ftruncate(file, 0) == 0)
        for (int i = 0; i < e->n_history; i++)
            history_write(file, e->history[i]);
    (void)flock(file, LOCK_UN);
    free(line);
}

static void history_keep(struct editor *e) {
    if (!history_add(e, e->line) || !e->file)
        return;
    (void)flock(fileno(e->file), LOCK_EX);
    history_write(fileno(e->file), e->line);
    (void)flock(fileno(e->file), LOCK_UN);
}

/* ---- a turn ---- */

static void editor_open(struct editor *e) {
    struct sigaction wake = {.sa_handler = editor_wake};
    e->edits = isatty(STDIN_FILENO) && text_moves(STDERR_FILENO) &&
               tcgetattr(STDIN_FILENO, &editor_before) == 0 &&
               sigaction(SIGWINCH, &wake, NULL) == 0 && sigaction(SIGCONT, &wake, NULL) == 0;
    history_open(e);
}

static void editor_close(struct editor *e) {
    atomic_store(&editor_answers, false);
    editor_restore();
    for (int i = 0; i <= e->n_history; i++)
        free(e->history[i]);
    free(e->line);
    if (e->file)
        (void)fclose(e->file);
}

/* A turn, which stays until the next is read. NULL: the end of input. */
static char *editor_read(struct editor *e, size_t *length) {
    enum editor_state state;
    do {
        e->line = grow(e->line, 0, 1);
        *e->line = 0;
        e->length = e->at = 0;
        e->row = 0;
        e->shown = e->n_history;
        if (e->edits) {
            editor_set(true);
            state = editor_line(e);
            editor_set(false);
            (void)fputs(state == CLEARED ? "^C\n" : "\n", stderr);
        } else
            state = editor_plain(e);
        if (state == CLEARED && e->length == 0)
            (void)fputs(editor_hint, stderr);
    } while (state == CLEARED);
    if (e->edits && state == ENTERED)
        history_keep(e);
    *length = e->length;
    return state == ENDED ? NULL : e->line;
}

/* ---- the conversation ---- */

static const char chat_help[] =
    "/help     these commands\n"
    "/stats    speeds, and what the pools and the pager did so far\n"
    "/clear    forget what was said\n"
    "/system   TEXT: what the model is told first, in a new conversation\n"
    "/exit     leave; so does Ctrl-D\n"
    "A line that ends with \\ goes on in the next, and so does all between two \"\"\".\n"
    "Ctrl-C stops an answer, or gives up a line.\n";

/* Forgets what was said, and says so; a base model has nothing to forget. */
static void chat_restart(struct answers *answers, const char *of_chat, const char *of_base) {
    answers_forget(answers);
    (void)fputs(answers->template.kind == TEMPLATE_NONE ? of_base : of_chat, stderr);
}

/* What a line that begins with / asks for: a command's name, alone or with something behind it.
 * *system: that of /system, owned by the caller. False: the end. */
static bool chat_command(struct answers *answers, const char *line, char **system) {
    char name[16];
    size_t length = strcspn(line, " ");
    (void)snprintf(name, sizeof name, "%.*s", (int)length, line);
    bool goes_on = strcmp(name, "/exit") != 0;
    if (!strcmp(name, "/help")) {
        (void)fputs(chat_help, stderr);
    } else if (!strcmp(name, "/stats")) {
        stats_print(answers);
    } else if (!strcmp(name, "/clear")) {
        chat_restart(answers, "A new conversation begins.\n",
                     "There is nothing to clear: this model continues each prompt by itself.\n");
    } else if (!strcmp(name, "/system")) {
        free(*system);
        *system = strdup(line + length + strspn(line + length, " "));
        chat_restart(answers, "A new conversation begins with it.\n",
                     "It will stand before each prompt: this model has no place for it.\n");
    } else if (goes_on) {
        (void)fprintf(stderr, "%.*s: unknown command; /help lists all\n", (int)length, line);
    }
    return goes_on;
}

void chat_run(struct answers *answers, const struct request_spec *defaults) {
    struct editor editor = {0};
    struct request_spec spec = *defaults;
    char *system = NULL; /* that of the defaults */
    bool goes_on = answers->converses = true;
    editor_open(&editor);
    atomic_store(&chat_goes_on, true);
    while (goes_on && (spec.prompt = editor_read(&editor, &spec.prompt_length)) != NULL) {
        const char *line = spec.prompt;
        spec.system = system ? system : defaults->system;
        if (!editor.is_text && line[0] == '/' && line[1] >= 'a' && line[1] <= 'z')
            goes_on = chat_command(answers, line, &system);
        else if (spec.prompt_length > 0 && answers_run(answers, &spec) > 0 &&
                 !answers->interrupted && answers->n_history > 0)
            (void)fputs("If the conversation has become too long: /clear begins a new one.\n",
                        stderr);
    }
    atomic_store(&chat_goes_on, false);
    free(system);
    answers_forget(answers);
    editor_close(&editor);
}

#endif /* TERMINAL_IMPLEMENTATION */
