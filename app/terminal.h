/* terminal.h: a conversation at a prompt: a line editor, the commands, and what was said so far.
 *
 *     chat_run(&answers, &options.request); // until the end of input, or /exit
 *     editor_restore(); // from any thread, for who ends or stops the program in between
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
 * The terminal is in raw mode only while a line is read. A line takes as many rows as it needs, and
 * is shown again when the terminal has another size. Two signals are taken, between two keys alone:
 * SIGWINCH, its size has changed; and SIGCONT, the program goes on after it was stopped, and finds
 * the terminal as a shell left it. If stdin or stderr is no terminal, or a dumb one, lines are read
 * as they are.
 * Read next: answers.h, lib/template.h. */
#ifndef TERMINAL_H
#define TERMINAL_H

#include "answers.h"

void chat_run(struct answers *answers, const struct request_spec *defaults);
void editor_restore(void);
/* True: a conversation goes on, and has said how to end it. */
bool chat_interrupted(void);

#endif /* TERMINAL_H */

#ifdef TERMINAL_IMPLEMENTATION
#undef TERMINAL_IMPLEMENTATION

#include "../lib/text.h"
#include "../lib/wrap.h"
#include "stats.h"
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/select.h>
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
    int row;                     /* of the cursor, counted from the first that is shown */
    char *history[EDITOR_LINES]; /* (n_history) the oldest first */
    int n_history, shown;        /* shown == n_history: the new line */
    char file[4096];             /* of the history; "": none */
    const char *prompt;
    bool edits;   /* else lines are read as they are */
    bool is_text; /* what was read is no command, whatever it begins with */
};

static struct termios editor_before;
static atomic_bool editor_is_raw, editor_is_plain, chat_goes_on;
static volatile sig_atomic_t editor_continued;
static const char editor_hint[] = "Ctrl-D leaves; /help lists the commands\n";

/* From any thread, so without stdio. */
static void editor_tell(const char *words) {
    ssize_t written = write(STDERR_FILENO, words, strlen(words));
    (void)written;
}

void editor_restore(void) {
    if (atomic_exchange(&editor_is_raw, false)) {
        editor_tell("\033[?2004l");
        (void)tcsetattr(STDIN_FILENO, TCSADRAIN, &editor_before);
    }
}

bool chat_interrupted(void) {
    if (!atomic_load(&chat_goes_on))
        return false;
    editor_tell("\n");
    editor_tell(editor_hint);
    if (atomic_load(&editor_is_plain))
        editor_tell("> ");
    if (atomic_load(&editor_is_raw))
        (void)kill(getpid(), SIGCONT); /* it shows its line again */
    return true;
}

static void editor_wake(int number) {
    editor_continued |= number == SIGCONT;
}

/* Only what the terminal was before the first line is what it was. */
static bool editor_raw(void) {
    static bool known;
    if (!isatty(STDIN_FILENO) || !text_moves(STDERR_FILENO) ||
        (!known && tcgetattr(STDIN_FILENO, &editor_before) != 0))
        return false;
    struct termios raw = editor_before;
    struct sigaction wake = {.sa_handler = editor_wake};
    if (!known && (sigaction(SIGWINCH, &wake, NULL) != 0 || sigaction(SIGCONT, &wake, NULL) != 0))
        return false;
    known = true;
    raw.c_lflag &= ~(tcflag_t)(ICANON | ECHO | IEXTEN | ISIG); /* Ctrl-C, Z and \ are keys, too */
    raw.c_iflag &= ~(tcflag_t)(IXON | ICRNL);
    raw.c_cc[VMIN] = 1;
    raw.c_cc[VTIME] = 0;
    if (tcsetattr(STDIN_FILENO, TCSADRAIN, &raw) != 0)
        return false;
    atomic_store(&editor_is_raw, true);
    editor_tell("\033[?2004h");
    return true;
}

/* Bytes of the character behind `at`, or before it. */
static size_t editor_next(const struct editor *e, size_t at) {
    uint32_t code;
    return at < e->length ? utf8_char(e->line + at, e->length - at, &code) : 0;
}

static size_t editor_previous(const struct editor *e, size_t at) {
    size_t size = at > 0;
    while (size > 0 && size < 4 && size < at && (e->line[at - size] & 0xC0) == 0x80)
        size++;
    return size;
}

/* Where the row ends that begins at `start`, of so many columns: behind a newline, else behind the
 * last blank that fits. *columns: of its part before the cursor. */
static size_t editor_row(const struct editor *e, size_t start, int room, int *columns) {
    size_t blank = start, at = start;
    uint32_t code;
    *columns = 0;
    for (int used = 0; at < e->length && e->line[at] != '\n';) {
        size_t n = utf8_char(e->line + at, e->length - at, &code);
        used += wrap_shows(code) ? wrap_columns(code) : 1;
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

/* Writes the line again, and the cursor where it is; of more rows than the screen has, those down
 * to the cursor's. */
static void editor_show(struct editor *e) {
    int rows, ignored, column = 0, indent = (int)strlen(e->prompt);
    int room = wrap_width(STDERR_FILENO, &rows) - 1 - indent, cursor = 0, row = 0;
    size_t start = 0, end;
    while ((end = editor_row(e, start, room, &ignored)) <= e->at && end > start &&
           (end < e->length || e->line[end - 1] == '\n')) {
        start = end;
        cursor++;
    }
    (void)fprintf(stderr, e->row > 0 ? "\r\033[%dA\033[J" : "\r\033[J", e->row);
    e->row = cursor < rows ? cursor : rows - 1;
    bool more = true;
    for (start = 0; more && row <= cursor - e->row + rows - 1; row++, start = end) {
        uint32_t code;
        int columns;
        end = editor_row(e, start, room, &columns);
        more = end < e->length || (end > start && e->line[end - 1] == '\n');
        if (row < cursor - e->row)
            continue;
        (void)fprintf(stderr, "%s%*s", row > cursor - e->row ? "\n" : "", indent,
                      row > 0 ? "" : e->prompt);
        for (size_t at = start, n; at < end && e->line[at] != '\n'; at += n) {
            n = utf8_char(e->line + at, end - at, &code);
            bool shows = wrap_shows(code);
            (void)fwrite(shows ? e->line + at : code == '\t' ? " " : "?", 1, shows ? n : 1, stderr);
        }
        column = row == cursor ? indent + columns : column;
    }
    if (row - 1 > cursor)
        (void)fprintf(stderr, "\033[%dA", row - 1 - cursor);
    (void)fprintf(stderr, column > 0 ? "\r\033[%dC" : "\r", column);
    (void)fflush(stderr);
}

/* The next byte; -1: the end of input. */
static int editor_byte(struct editor *e) {
    sigset_t mask;
    unsigned char byte;
    (void)pthread_sigmask(SIG_SETMASK, NULL, &mask);
    sigdelset(&mask, SIGWINCH);
    sigdelset(&mask, SIGCONT);
    for (;;) {
        fd_set input;
        FD_ZERO(&input);
        FD_SET(STDIN_FILENO, &input);
        ssize_t n = pselect(STDIN_FILENO + 1, &input, NULL, NULL, NULL, &mask);
        bool woken = n < 0 && errno == EINTR;
        if (woken) {
            e->row = editor_continued ? 0 : e->row; /* others have written since */
            editor_continued = 0;
            (void)editor_raw();
            editor_show(e);
        } else if (n > 0)
            n = read(STDIN_FILENO, &byte, 1);
        if (n > 0)
            return byte;
        if (!woken && (n == 0 || errno != EINTR))
            return -1;
    }
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
    int number = 0, byte = editor_byte(e);
    if (byte != '[' && byte != 'O')
        return 0;
    while ((byte = editor_byte(e)) >= '0' && byte <= ';')
        number = byte <= '9' && number < 1000 ? 10 * number + byte - '0' : 1000;
    if (byte == '~') /* `ESC [ 3 ~`, else `ESC [ A`, or `ESC [ 1 ; 5 A` */
        byte = number == 200 ? KEY_PASTE : number < 10 ? '0' + number : 0;
    switch (byte) {
    case 'A': return CTRL('P'); /* up */
    case 'B': return CTRL('N'); /* down */
    case 'C': return CTRL('F'); /* right */
    case 'D': return CTRL('B'); /* left */
    case 'H':
    case '1':
    case '7': return CTRL('A'); /* Home */
    case 'F':
    case '4':
    case '8': return CTRL('E'); /* End */
    case '3': return KEY_DELETE;
    case KEY_PASTE: return KEY_PASTE;
    default: return 0;
    }
}

/* Takes in what is pasted, up to the sequence that ends it: lines, tabs, no other control byte. */
static void editor_paste(struct editor *e) {
    static const char end[] = "\033[201~";
    size_t n = sizeof end - 1, from = e->at, to = from;
    int byte = 0;
    while (byte >= 0 && (e->at - from < n || memcmp(e->line + e->at - n, end, n) != 0)) {
        byte = editor_byte(e);
        if (byte >= 0)
            editor_insert(e, &(char){(char)byte}, 1);
    }
    size_t last = byte >= 0 ? e->at - n : e->at;
    char before = 0;
    for (size_t i = from; i < last; i++) {
        char c = e->line[i];
        bool again = c == '\n' && before == '\r'; /* a line that ends in both */
        if (((unsigned char)c >= ' ' && c != 127) || c == '\t' || c == '\r' ||
            (c == '\n' && !again))
            e->line[to++] = c == '\r' ? '\n' : c;
        before = c;
    }
    editor_cut(e, to, e->at);
}

static void editor_recall(struct editor *e, int step) {
    int wanted = e->shown + step;
    if (wanted < 0 || wanted > e->n_history)
        return;
    editor_cut(e, 0, e->length);
    e->shown = wanted;
    if (wanted < e->n_history)
        editor_insert(e, e->history[wanted], strlen(e->history[wanted]));
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
    case CTRL('B'): e->at -= editor_previous(e, e->at); break;
    case CTRL('F'): e->at += editor_next(e, e->at); break;
    case CTRL('P'): editor_recall(e, -1); break;
    case CTRL('N'): editor_recall(e, 1); break;
    case CTRL('K'): editor_cut(e, e->at, e->length); break;
    case CTRL('U'): editor_cut(e, 0, e->at); break;
    case CTRL('L'):
        (void)fputs("\033[H\033[2J", stderr);
        e->row = 0;
        break;
    case 127:
    case CTRL('H'): editor_cut(e, e->at - editor_previous(e, e->at), e->at); break;
    case CTRL('D'):
        if (e->length == 0)
            return ENDED;
        /* fall through */
    case KEY_DELETE: editor_cut(e, e->at, e->at + editor_next(e, e->at)); break;
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
        if (state != EDITING)
            e->at = e->length;
        if (state != EDITING || ioctl(STDIN_FILENO, FIONREAD, &more) != 0 || more == 0)
            editor_show(e); /* once for all that has come */
    }
    while (e->length > 0 && e->line[e->length - 1] == '\n') /* the end of what was pasted */
        editor_cut(e, e->length - 1, e->length);
    return state;
}

/* ---- its history ---- */

static void history_add(struct editor *e, const char *line) {
    if (*line == 0 || (e->n_history > 0 && !strcmp(e->history[e->n_history - 1], line)))
        return;
    if (e->n_history == EDITOR_LINES) {
        free(e->history[0]);
        memmove(e->history, e->history + 1, sizeof *e->history * (EDITOR_LINES - 1));
        e->n_history--;
    }
    e->history[e->n_history] = strdup(line);
    e->n_history += e->history[e->n_history] != NULL;
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
    char *line = NULL;
    size_t capacity = 0;
    int n = 0;
    if (!home || !*home)
        return;
    (void)snprintf(e->file, sizeof e->file, "%s/.dynamo_history", home);
    FILE *file = fdopen(open(e->file, O_RDWR | O_APPEND | O_CLOEXEC | O_NONBLOCK), "r+");
    if (!file)
        return;
    (void)flock(fileno(file), LOCK_EX);
    for (ssize_t length; (length = getline(&line, &capacity, file)) > 0; n++) {
        char *to = line;
        line[length - (line[length - 1] == '\n')] = 0;
        for (const char *from = line; *from; from++) {
            bool special = *from == '\\' && (from[1] == 'n' || from[1] == '\\');
            *to++ = !special ? *from : *++from == 'n' ? '\n' : '\\';
        }
        *to = 0;
        history_add(e, line);
    }
    if (n > 2 * EDITOR_LINES && ftruncate(fileno(file), 0) == 0)
        for (int i = 0; i < e->n_history; i++)
            history_write(fileno(file), e->history[i]);
    free(line);
    (void)fclose(file);
}

static void history_keep(struct editor *e, const char *line) {
    int before = e->n_history;
    history_add(e, line);
    int file = e->n_history > before || before == EDITOR_LINES
                   ? open(e->file, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NONBLOCK, 0600)
                   : -1;
    if (file < 0)
        return;
    (void)flock(file, LOCK_EX);
    history_write(file, line);
    close(file);
}

/* ---- a turn ---- */

/* One line as it comes, without its newline. */
static bool editor_plain(struct editor *e) {
    atomic_store(&editor_is_plain, isatty(STDIN_FILENO) && isatty(STDERR_FILENO));
    if (atomic_load(&editor_is_plain))
        (void)fputs(e->prompt, stderr);
    size_t capacity = 0; /* that of the line before is not known */
    free(e->line);
    e->line = NULL;
    ssize_t bytes = getline(&e->line, &capacity, stdin);
    atomic_store(&editor_is_plain, false);
    if (bytes < 0)
        return false;
    e->length = (size_t)(bytes - (e->line[bytes - 1] == '\n'));
    e->line[e->length] = 0;
    return true;
}

/* Leaves one line in the editor. */
static enum editor_state editor_one(struct editor *e, const char *prompt) {
    e->length = e->at = 0;
    e->row = 0;
    e->shown = e->n_history;
    e->prompt = prompt;
    e->edits = editor_raw();
    if (!e->edits)
        return editor_plain(e) ? ENTERED : ENDED;
    e->line = grow(e->line, 0, 1);
    *e->line = 0;
    enum editor_state state = editor_line(e);
    editor_restore();
    (void)fputs(state == CLEARED ? "^C\n" : "\n", stderr);
    return state;
}

/* A line and those that continue it, to be freed. NULL: the end of input. */
static char *editor_read(struct editor *e, const char *prompt, size_t *length) {
    static const char quotes[] = "\"\"\"";
    char *text = NULL;
    bool block = false, more = true;
    while (more) {
        enum editor_state state = editor_one(e, text ? ". " : prompt);
        if (state == CLEARED && !text && e->length == 0)
            (void)fputs(editor_hint, stderr);
        if (state == CLEARED) {
            free(text);
            text = NULL;
        }
        if (state == ENDED)
            break;
        if (state == CLEARED)
            continue;
        size_t before = !text ? 0 : *length + block; /* else a newline in place of the backslash */
        char *longer = realloc(text, before + e->length + 1);
        if (!longer)
            break;
        text = longer;
        memcpy(text + before, e->line, e->length + 1);
        if (before > 0)
            text[before - 1] = '\n';
        *length = before + e->length;
        block = strncmp(text, quotes, 3) == 0;
        const char *end = text + *length - (*length < 3 ? *length : 3);
        more = block ? *length < 6 || strcmp(end, quotes) != 0
                     : *length > 0 && text[*length - 1] == '\\';
    }
    if (text && block && !more) { /* without the quotes, and the newlines beside them */
        size_t first = 3 + (text[3] == '\n'), last = *length - 3;
        last -= last > first && text[last - 1] == '\n';
        *length = last > first ? last - first : 0;
        memmove(text, text + first, *length);
        text[*length] = 0;
    }
    e->is_text = text && (block || memchr(text, '\n', *length));
    if (text && e->edits)
        history_keep(e, text);
    return text;
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
    char *system = NULL; /* that of the defaults */
    bool goes_on = answers->converses = true;
    history_open(&editor);
    atomic_store(&chat_goes_on, true);
    while (goes_on) {
        struct request_spec spec = *defaults;
        spec.system = system ? system : defaults->system;
        spec.prompt = editor_read(&editor, "> ", &spec.prompt_length);
        if (!spec.prompt)
            break;
        if (!editor.is_text && spec.prompt[0] == '/' && spec.prompt[1] >= 'a' &&
            spec.prompt[1] <= 'z') {
            goes_on = chat_command(answers, spec.prompt, &system);
        } else if (spec.prompt_length > 0 && answers_run(answers, &spec) > 0 &&
                   !answers->interrupted && answers->n_history > 0) {
            (void)fputs("If the conversation has become too long: /clear begins a new one.\n",
                        stderr);
        }
        free(spec.prompt);
    }
    atomic_store(&chat_goes_on, false);
    free(system);
    answers_forget(answers);
    for (int i = 0; i < editor.n_history; i++)
        free(editor.history[i]);
    free(editor.line);
}

#endif /* TERMINAL_IMPLEMENTATION */
