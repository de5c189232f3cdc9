/* terminal.h: a conversation at a prompt: a line editor, the commands, and what was said so far.
 *
 *     chat_run(&answers, &options.request); // until the end of input, or /exit
 *     editor_restore(); // from any thread, for who ends the program in between
 *
 * With a chat model each turn follows all turns before it, as token ids: the answers as they were
 * generated, also those that Ctrl-C cut off. So the next turn's prompt begins with blocks that the
 * KV cache has. With a base model every prompt stands alone and is continued.
 *
 * Keys: arrows, Home, End, Delete, Backspace; Ctrl-A, E (ends), B, F, P, N (arrows), K, U, W (cut),
 * L (clear the screen), D (delete; on an empty line: the end). A line that ends with \ goes on in
 * the next. If stdin or stderr is no terminal, or a dumb one, lines are read as they are.
 * The terminal is in raw mode only while a line is read. Text is UTF-8; the cursor moves by
 * characters, of which East Asian ones take two columns and marks none. A line longer than the
 * screen is wide shows the part around the cursor.
 * Read next: answers.h, lib/template.h. */
#ifndef TERMINAL_H
#define TERMINAL_H

#include "answers.h"

void chat_run(struct answers *answers, const struct request_spec *defaults);
void editor_restore(void);

#endif /* TERMINAL_H */

#ifdef TERMINAL_IMPLEMENTATION
#undef TERMINAL_IMPLEMENTATION

#include "../lib/text.h"
#include "../lib/unicode.h"
#include "stats.h"
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/ttydefaults.h> /* CTRL */
#include <termios.h>
#include <unistd.h>

/* ---- the line editor ---- */

enum { EDITOR_LINES = 100 /* of history */ };

struct editor {
    char *line; /* (length) what is typed, a zero byte behind it */
    size_t length, at;
    char *history[EDITOR_LINES]; /* (n_history) the oldest first */
    int n_history, shown;        /* shown == n_history: the new line */
    const char *prompt;
};

static struct termios editor_before;
static atomic_bool editor_is_raw;

void editor_restore(void) {
    if (atomic_exchange(&editor_is_raw, false))
        (void)tcsetattr(STDIN_FILENO, TCSADRAIN, &editor_before);
}

static bool editor_raw(void) {
    const char *kind = getenv("TERM");
    if (!isatty(STDIN_FILENO) || !isatty(STDERR_FILENO) || !kind || !strcmp(kind, "dumb") ||
        tcgetattr(STDIN_FILENO, &editor_before) != 0)
        return false;
    struct termios raw = editor_before;
    raw.c_lflag &= ~(tcflag_t)(ICANON | ECHO | IEXTEN); /* signals stay: Ctrl-C is one */
    raw.c_iflag &= ~(tcflag_t)(IXON);
    raw.c_cc[VMIN] = 1;
    raw.c_cc[VTIME] = 0;
    if (tcsetattr(STDIN_FILENO, TCSADRAIN, &raw) != 0)
        return false;
    atomic_store(&editor_is_raw, true);
    return true;
}

static int columns_of(uint32_t code) {
    bool wide = (code >= 0x1100 && code < 0x1160) || (code >= 0x2E80 && code < 0xA4D0) ||
                (code >= 0xAC00 && code < 0xD7A4) || (code >= 0xF900 && code < 0xFB00) ||
                (code >= 0xFE30 && code < 0xFE70) || (code >= 0xFF00 && code < 0xFF61) ||
                (code >= 0x1F300 && code < 0x1FB00) || (code >= 0x20000 && code < 0x3FFFE);
    return unicode_class_of(code) == UNICODE_MARK || code == 0x200D ? 0 : wide ? 2 : 1;
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

/* Writes the line again, and the cursor where it is. */
static void editor_show(const struct editor *e) {
    struct winsize size;
    int width = ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 8 ? size.ws_col : 80;
    int room = width - (int)strlen(e->prompt) - 1, before = 0, used = 0;
    uint32_t code;
    size_t first = e->at;
    for (size_t n; first > 0 && before < room * 3 / 4; first -= n) { /* what fits before it */
        n = editor_previous(e, first);
        (void)utf8_char(e->line + first - n, n, &code);
        before += columns_of(code);
    }
    (void)fprintf(stderr, "\r\033[K%s", e->prompt);
    for (size_t at = first, n; at < e->length; at += n) {
        n = utf8_char(e->line + at, e->length - at, &code);
        used += columns_of(code);
        if (used > room)
            break;
        bool printable = code >= ' ' && code != 127 && code != UINT32_MAX;
        (void)fwrite(printable ? e->line + at : "?", 1, printable ? n : 1, stderr);
    }
    if (e->at < e->length)
        (void)fprintf(stderr, "\r\033[%dC", (int)strlen(e->prompt) + before);
    (void)fflush(stderr);
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

enum { KEY_DELETE = 256 }; /* other keys are bytes */

/* What an escape sequence means: KEY_DELETE, or the Ctrl key that does the same. 0: nothing. */
static int editor_escape(void) {
    char byte = 0, number = 0;
    if (read(STDIN_FILENO, &byte, 1) != 1 || (byte != '[' && byte != 'O'))
        return 0;
    while (read(STDIN_FILENO, &byte, 1) == 1 && ((byte >= '0' && byte <= '9') || byte == ';'))
        number = number ? number : byte;
    if (byte == '~') /* `ESC [ 3 ~`, else `ESC [ A` */
        byte = number;
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
    default: return 0;
    }
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

enum editor_state { EDITING, ENTERED, ENDED };

static enum editor_state editor_key(struct editor *e, int key) {
    size_t word = e->at;
    switch (key) {
    case '\r':
    case '\n': return ENTERED;
    case CTRL('A'): e->at = 0; break;
    case CTRL('E'): e->at = e->length; break;
    case CTRL('B'): e->at -= editor_previous(e, e->at); break;
    case CTRL('F'): e->at += editor_next(e, e->at); break;
    case CTRL('P'): editor_recall(e, -1); break;
    case CTRL('N'): editor_recall(e, 1); break;
    case CTRL('K'): editor_cut(e, e->at, e->length); break;
    case CTRL('U'): editor_cut(e, 0, e->at); break;
    case CTRL('L'): (void)fputs("\033[H\033[2J", stderr); break;
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
        char byte;
        ssize_t n = read(STDIN_FILENO, &byte, 1);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return ENDED;
        if (byte == '\t' || ((unsigned char)byte >= ' ' && byte != 127))
            editor_insert(e, &byte, 1);
        else
            state = editor_key(e, byte == 27 ? editor_escape() : byte);
        int more = 0;
        if (state != EDITING || ioctl(STDIN_FILENO, FIONREAD, &more) != 0 || more == 0)
            editor_show(e); /* once for all that was pasted */
    }
    return state;
}

static void editor_remember(struct editor *e) {
    if (e->length == 0 || (e->n_history > 0 && !strcmp(e->history[e->n_history - 1], e->line)))
        return;
    if (e->n_history == EDITOR_LINES) {
        free(e->history[0]);
        memmove(e->history, e->history + 1, sizeof *e->history * (EDITOR_LINES - 1));
        e->n_history--;
    }
    e->history[e->n_history] = strdup(e->line);
    e->n_history += e->history[e->n_history] != NULL;
}

/* One line as it comes, without its newline. */
static bool editor_plain(struct editor *e) {
    if (isatty(STDIN_FILENO) && isatty(STDERR_FILENO))
        (void)fputs(e->prompt, stderr);
    size_t capacity = 0; /* that of the line before is not known */
    free(e->line);
    e->line = NULL;
    ssize_t bytes = getline(&e->line, &capacity, stdin);
    if (bytes < 0)
        return false;
    e->length = (size_t)(bytes - (e->line[bytes - 1] == '\n'));
    e->line[e->length] = 0;
    return true;
}

/* Leaves one line in the editor. False: the end of input. */
static bool editor_one(struct editor *e, const char *prompt) {
    e->length = e->at = 0;
    e->shown = e->n_history;
    e->prompt = prompt;
    if (!editor_raw())
        return editor_plain(e);
    e->line = grow(e->line, 0, 1);
    *e->line = 0;
    bool entered = editor_line(e) == ENTERED;
    (void)fputc('\n', stderr);
    editor_restore();
    if (entered)
        editor_remember(e);
    return entered;
}

/* A line and those that continue it, to be freed. NULL: the end of input. */
static char *editor_read(struct editor *e, const char *prompt, size_t *length) {
    char *text = NULL;
    *length = 0;
    while (editor_one(e, text ? ". " : prompt)) {
        char *longer = realloc(text, *length + e->length + 1);
        if (!longer)
            break;
        text = longer;
        if (*length > 0)
            text[*length - 1] = '\n'; /* it was a backslash */
        memcpy(text + *length, e->line, e->length + 1);
        *length += e->length;
        if (*length == 0 || text[*length - 1] != '\\')
            break;
    }
    return text;
}

/* ---- the conversation ---- */

static const char chat_help[] =
    "/help     these commands\n"
    "/stats    speeds, and what the pools and the pager did so far\n"
    "/clear    forget what was said\n"
    "/system   TEXT: what the model is told first, in a new conversation\n"
    "/exit     leave; so does Ctrl-D\n"
    "A line that ends with \\ goes on in the next. Ctrl-C stops an answer.\n";

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
    while (goes_on) {
        struct request_spec spec = *defaults;
        spec.system = system ? system : defaults->system;
        spec.prompt = editor_read(&editor, "> ", &spec.prompt_length);
        if (!spec.prompt)
            break;
        if (spec.prompt[0] == '/' && spec.prompt[1] >= 'a' && spec.prompt[1] <= 'z') {
            goes_on = chat_command(answers, spec.prompt, &system);
        } else if (spec.prompt_length > 0 && answers_run(answers, &spec) > 0 &&
                   answers->n_history > 0) {
            (void)fputs("If the conversation has become too long: /clear begins a new one.\n",
                        stderr);
        }
        free(spec.prompt);
    }
    free(system);
    answers_forget(answers);
    for (int i = 0; i < editor.n_history; i++)
        free(editor.history[i]);
    free(editor.line);
}

#endif /* TERMINAL_IMPLEMENTATION */
