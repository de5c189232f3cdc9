/* chat.h: a conversation at a prompt: what is typed, the commands, and what was said so far.
 *
 *     struct chat chat = {.answers = &answers, .options = &options};
 *     chat_run(&chat);    // until the end of input, or /exit
 *
 * With a chat model each turn follows all turns before it, as token ids: the answers as they were
 * generated, also those that Ctrl-C cut off. So the next turn's prompt begins with blocks that the
 * KV cache has. With a base model every prompt stands alone and is continued.
 * Read next: template.h, editor.h. */
#ifndef CHAT_H
#define CHAT_H

#include "terminal.h"

struct chat {
    struct answers *answers;
    struct options *options;
    char *system; /* owned; NULL: that of the options */
};

void chat_run(struct chat *chat);

#endif /* CHAT_H */

#ifdef CHAT_IMPLEMENTATION
#undef CHAT_IMPLEMENTATION

#include "editor.h"
#include "stats.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static bool chat_help(struct chat *chat, const char *argument);

static bool chat_stats(struct chat *chat, const char *argument) {
    (void)argument;
    stats_print(chat->answers);
    return true;
}

static bool chat_clear(struct chat *chat, const char *argument) {
    (void)argument;
    answers_forget(chat->answers);
    (void)fputs(chat->answers->template == TEMPLATE_NONE
                    ? "There is nothing to clear: this model continues each prompt by itself.\n"
                    : "A new conversation begins.\n",
                stderr);
    return true;
}

static bool chat_system(struct chat *chat, const char *argument) {
    free(chat->system);
    chat->system = strdup(argument);
    chat->options->request.system = chat->system;
    answers_forget(chat->answers);
    (void)fputs(chat->answers->template == TEMPLATE_NONE
                    ? "It will stand before each prompt: this model has no place for it.\n"
                    : "A new conversation begins with it.\n",
                stderr);
    return true;
}

static bool chat_exit(struct chat *chat, const char *argument) {
    (void)chat;
    (void)argument;
    return false;
}

static const struct chat_command {
    const char *name, *help;
    bool (*run)(struct chat *chat, const char *argument); /* false: the conversation ends */
} chat_commands[] = {
    {"/help", "these commands", chat_help},
    {"/stats", "speeds, and what the pools and the pager did so far", chat_stats},
    {"/clear", "forget what was said", chat_clear},
    {"/system", "TEXT: what the model is told first, in a new conversation", chat_system},
    {"/exit", "leave; so does Ctrl-D", chat_exit},
};

static bool chat_help(struct chat *chat, const char *argument) {
    (void)chat;
    (void)argument;
    for (size_t i = 0; i < sizeof chat_commands / sizeof *chat_commands; i++)
        (void)fprintf(stderr, "%-8s  %s\n", chat_commands[i].name, chat_commands[i].help);
    (void)fputs("A line that ends with \\ goes on in the next. Ctrl-C stops an answer.\n", stderr);
    return true;
}

/* A line that begins with / and is a command's name, alone or with something behind it. */
static bool chat_command(struct chat *chat, const char *line) {
    size_t length = strcspn(line, " ");
    for (size_t i = 0; i < sizeof chat_commands / sizeof *chat_commands; i++) {
        const struct chat_command *command = &chat_commands[i];
        if (strlen(command->name) == length && strncmp(line, command->name, length) == 0)
            return command->run(chat, line + length + strspn(line + length, " "));
    }
    (void)fprintf(stderr, "%.*s: unknown command; /help lists all\n", (int)length, line);
    return true;
}

void chat_run(struct chat *chat) {
    struct editor editor = {0};
    bool goes_on = true;
    while (goes_on) {
        struct request_spec spec = chat->options->request;
        spec.prompt = editor_read(&editor, "> ", &spec.prompt_length);
        if (!spec.prompt)
            break;
        if (spec.prompt[0] == '/' && spec.prompt[1] >= 'a' && spec.prompt[1] <= 'z') {
            goes_on = chat_command(chat, spec.prompt);
        } else if (spec.prompt_length > 0 && answers_run(chat->answers, &spec, 1) > 0 &&
                   chat->answers->n_history > 0) {
            (void)fputs("If the conversation has become too long: /clear begins a new one.\n",
                        stderr);
        }
        free(spec.prompt);
    }
    chat->options->request.system = NULL;
    free(chat->system);
    editor_close(&editor);
}
#endif /* CHAT_IMPLEMENTATION */
