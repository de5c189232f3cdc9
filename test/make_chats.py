"""Writes test/data/chats.txt: conversations as the published chat templates render them.

    python3 test/make_chats.py > test/data/chats.txt
    python3 test/make_chats.py FOLDER > /tmp/many.txt    # those of each *.jinja there, as llama.cpp has

The templates are those that models' tokenizer_config.json have, without their parts on tools:
Qwen3, 3.5, 2.5, SmolLM2 and QwQ (ChatML), Llama 3, 3.1 and 2, Mistral Instruct v0.2, Nemo and Small,
Zephyr, Falcon3, Gemma 2 and 3, Phi-3.5 and 4-mini, DeepSeek R1, gpt-oss. Rendered by jinja2==3.1.6 as
transformers does it. A template is one line, and so is each conversation with it:
    template FAMILY PROGRAM                      `-`: it is none that is known, `?`: it may be any
    talk SYSTEM USER ANSWER USER ... EXPECTED
each field in hex, `-` if it is empty; EXPECTED ends where the model's next answer begins.
"""
import datetime
import glob
import os
import re
import sys

from jinja2.exceptions import TemplateError, UndefinedError
from jinja2.sandbox import ImmutableSandboxedEnvironment

TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] "
        "+ '<|im_end|>' + '\\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"),
    "llama3": (
        "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
        "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | "
        "trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
        "{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ "
        "'<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"),
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
        "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
        "{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + "
        "system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = "
        "message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' "
        "+ content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' '  + "
        "content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"),
    "mistral": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ ' [INST] ' + "
        "message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + "
        "message['content'] + eos_token }}{% endif %}{% endfor %}"),
    "chatml qwen2.5": (
        "{%- if messages[0]['role'] == 'system' %}\n    {{- '<|im_start|>system\\n' + "
        "messages[0]['content'] + '<|im_end|>\\n' }}\n{%- else %}\n    {{- '<|im_start|>system\\nYou are "
        "Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}\n{%- endif %}\n"
        "{%- for message in messages %}\n    {%- if (message.role == \"user\") or (message.role == "
        "\"system\" and not loop.first) or (message.role == \"assistant\") %}\n        {{- "
        "'<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n    "
        "{%- endif %}\n{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- "
        "'<|im_start|>assistant\\n' }}\n{%- endif %}\n"),
    "chatml smollm2": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ "
        "'<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
        "Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
        "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ "
        "'<|im_start|>assistant\n' }}{% endif %}"),
    "chatml qwq": (
        "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + "
        "'<|im_end|>\\n' }}{%- endfor %}{%- if add_generation_prompt %}\n    {{- "
        "'<|im_start|>assistant\\n<think>\\n' }}\n{%- endif %}\n"),
    "llama3.1": (
        "{{- bos_token }}\n{%- if not date_string is defined %}\n    {%- set date_string = \"26 Jul "
        "2024\" %}\n{%- endif %}\n{#- This block extracts the system message, as in [INST] #}\n"
        "{%- if messages[0]['role'] == 'system' %}\n    {%- set system_message = "
        "messages[0]['content']|trim %}\n    {%- set messages = messages[1:] %}\n{%- else %}\n    "
        "{%- set system_message = \"\" %}\n{%- endif %}\n{{- "
        "\"<|start_header_id|>system<|end_header_id|>\\n\\n\" }}\n{{- \"Cutting Knowledge Date: "
        "December 2023\\n\" }}\n{{- \"Today Date: \" + date_string + \"\\n\\n\" }}\n{{- system_message "
        "}}\n{{- \"<|eot_id|>\" }}\n{%- for message in messages %}\n    {{- '<|start_header_id|>' + "
        "message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}\n"
        "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- "
        "'<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n"),
    "mistral3": (
        "{%- if messages[0][\"role\"] == \"system\" %}\n    {%- set system_message = "
        "messages[0][\"content\"] %}\n    {%- set loop_messages = messages[1:] %}\n{%- else %}\n    "
        "{%- set loop_messages = messages %}\n{%- endif %}\n{{- bos_token }}\n"
        "{%- for message in loop_messages %}\n    {%- if message[\"role\"] == \"user\" %}\n        "
        "{%- if loop.last and system_message is defined %}\n            {{- \"[INST]\" + "
        "system_message + \"\\n\\n\" + message[\"content\"] + \"[/INST]\" }}\n        {%- else %}\n"
        "            {{- \"[INST]\" + message[\"content\"] + \"[/INST]\" }}\n        {%- endif %}\n    "
        "{%- elif message[\"role\"] == \"assistant\" %}\n        {{- message[\"content\"] + eos_token}}\n"
        "    {%- endif %}\n{%- endfor %}\n"),
    "mistral7 small-3.2": (
        "{%- set today = strftime_now(\"%Y-%m-%d\") %}\n{%- set default_system_message = \"You are Mistral "
        "Small 3, a Large Language Model (LLM) created by Mistral AI.\\nThe current date is \" + today + "
        "\".\\n\\nAsk (e.g. \\\"Where?\\\" => \\\"There\\\").\" %}\n{{- bos_token }}\n{%- if messages[0]['role'] == "
        "'system' %}\n    {%- set system_message = messages[0]['content'] %}\n    {%- set messages = "
        "messages[1:] %}\n{%- else %}\n    {%- set system_message = default_system_message %}\n{%- endif "
        "%}\n{{- '[SYSTEM_PROMPT]' + system_message + '[/SYSTEM_PROMPT]' }}\n{%- for message in messages "
        "%}\n    {%- if message['role'] == 'user' %}\n        {{- '[INST]' + message['content'] + '[/INST]' "
        "}}\n    {%- else %}\n        {{- message['content'] + eos_token }}\n    {%- endif %}\n{%- endfor %}\n"),
    "chatml qwen3.5": (
        "{%- macro render_content(content, count) %}{{- content }}{%- endmacro %}\n{%- for message in "
        "messages %}\n    {%- set content = render_content(message.content, true)|trim %}\n    {%- if "
        "message.role == 'assistant' and '</think>' in content %}\n        {%- set content = "
        "content.split('</think>')[-1].lstrip('\\n') %}\n    {%- endif %}\n    {{- "
        "'<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}\n{%- endfor %}\n{%- if "
        "add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n    {%- if enable_thinking is "
        "defined and enable_thinking is false %}\n        {{- '<think>\\n\\n</think>\\n\\n' }}\n    {%- else "
        "%}\n        {{- '<think>\\n' }}\n    {%- endif %}\n{%- endif %}"),
    "falcon3": (
        "{% for message in messages %}{% if message['role'] == 'system' %}{{ '<|system|>\\n' + "
        "message['content'] + '\\n' }}{% elif message['role'] == 'user' %}{{ '<|user|>\\n' + "
        "message['content'] + '\\n' }}{% elif message['role'] == 'assistant' %}{{ '<|assistant|>\\n' + "
        "message['content'] + eos_token + '\\n' }}{% endif %}{% if loop.last and add_generation_prompt %}{{ "
        "'<|assistant|>\\n' }}{% endif %}{% endfor %}"),
    "- hermes-tools": (
        "{%- macro json_to_python_type(json_spec) %}{% endmacro %}{{- bos_token }}{{- '<|im_start|>system\n' "
        "}}{{- \"You are a function calling AI model. <tools></tools><|im_end|>\n\" }}{%- for message in "
        "messages %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
        "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"),
    "- nemotron-3": (
        "{%- set truncate_history_thinking = True %}{%- for message in messages %}{{- '<|im_start|>' + "
        "message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endfor %}{%- if "
        "add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"),
    "mistral7": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST]' + "
        "message['content'] + '[/INST]' }}{% elif message['role'] == 'system' %}{{ '[SYSTEM_PROMPT]' + "
        "message['content'] + '[/SYSTEM_PROMPT]' }}{% elif message['role'] == 'assistant' %}{{ "
        "message['content'] + eos_token }}{% endif %}{% endfor %}"),
    "zephyr": (
        "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + "
        "message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + "
        "message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n{{ "
        "'<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n{% if loop.last and "
        "add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not "
        "supported') }}{% endif %}{% for message in messages %}{% if (message['role'] == 'assistant') "
        "%}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ "
        "'<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"),
    "gemma 3": (
        "{{ bos_token }}\n{%- if messages[0]['role'] == 'system' -%}\n    {%- set first_user_prefix = "
        "messages[0]['content'] + '\n\n' -%}\n    {%- set loop_messages = messages[1:] -%}\n{%- else "
        "-%}\n    {%- set first_user_prefix = \"\" -%}\n    {%- set loop_messages = messages -%}\n"
        "{%- endif -%}\n{%- for message in loop_messages -%}\n    {%- if (message['role'] == "
        "'assistant') -%}\n        {%- set role = \"model\" -%}\n    {%- else -%}\n        {%- set role = "
        "message['role'] -%}\n    {%- endif -%}\n    {{ '<start_of_turn>' + role + '\n' + "
        "(first_user_prefix if loop.first else \"\") }}\n    {{- message['content'] | trim -}}\n    {{ "
        "'<end_of_turn>\n' }}\n{%- endfor -%}\n{%- if add_generation_prompt -%}\n    "
        "{{'<start_of_turn>model\n'}}\n{%- endif -%}\n"),
    "phi3": (
        "{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}{{"
        "'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}{{"
        "'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}{{"
        "'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}{% if "
        "add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"),
    "phi3 4-mini": (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' "
        "}}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}"
        "{% endif %}{# of '<|user|>' #}"),
    "deepseek": (
        "{{bos_token}}{%- if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{%- endif %}"
        "{%- for message in messages %}{%- if message['role'] == 'user' %}{{'<｜User｜>' + "
        "message['content']}}{%- endif %}{%- if message['role'] == 'assistant' %}{% set content = "
        "message['content'] %}{% if '</think>' in content %}{% set content = "
        "content.split('</think>')[-1] %}{% endif %}{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor -%}"
        "{% if add_generation_prompt %}{{'<｜Assistant｜><think>\\n'}}{% endif %}"),
    "harmony": (
        "{{- \"<|start|>system<|message|>\" }}\n{{- \"You are ChatGPT, a large language model trained by "
        "OpenAI.\" + \"\\n\" }}\n{{- \"Knowledge cutoff: 2024-06\\n\" }}\n{{- \"Current date: \" + "
        "strftime_now(\"%Y-%m-%d\") + \"\\n\\n\" }}\n{{- \"Reasoning: \" + \"medium\" + \"\\n\\n\" }}\n{{- "
        "\"# Valid channels: analysis, commentary, final. Channel must be included for every "
        "message.\" }}\n{{- \"<|end|>\" }}\n{%- if messages[0].role == \"system\" %}\n    {{- "
        "\"<|start|>developer<|message|>\" }}\n    {{- \"# Instructions\\n\\n\" }}\n    {{- "
        "messages[0].content }}\n    {{- \"\\n\\n\" }}\n    {{- \"<|end|>\" }}\n{%- endif %}\n"
        "{%- for message in messages -%}\n    {%- if message.role == 'assistant' -%}\n        {{- "
        "\"<|start|>assistant<|channel|>final<|message|>\" + message.content + \"<|end|>\" }}\n    "
        "{%- elif message.role == 'user' -%}\n        {{- \"<|start|>user<|message|>\" + "
        "message.content + \"<|end|>\" }}\n    {%- endif -%}\n{%- endfor -%}\n"
        "{%- if add_generation_prompt -%}\n<|start|>assistant\n{%- endif -%}"),
    "- phi-4": (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '<|im_sep|>' + "
        "message['content'] + '<|im_end|>'}}{% endfor %}{% if add_generation_prompt %}{{ "
        "'<|im_start|>assistant<|im_sep|>' }}{% endif %}"),
    "- alpaca, and [INST] in a comment": (
        "{# unlike '[INST] ' + x + ' [/INST]' #}{% for message in messages %}{{ '### ' + "
        "message['role'] + ':\n' + message['content'] + '\n\n' }}{% endfor %}"),
    "- empty": "  \n",
}
TALKS = [
    (None, ["Hello!"]),
    ("You are a helpful assistant.", ["Hello!"]),
    (None, ["What is 2+2?", "4", "And 3 + 3 ?"]),
    ("Be brief.\nAlways.", ["Caf\u00e9 \u65e5\u672c\u8a9e \U0001f98a", "Oui.", "Why?", "Because.", "Ok"]),
    (None, ["  two  spaces \n", "yes", "\ttab "]),
    (None, ["Hi", "<think>\nHm.\n</think>\n\nHello.", "Bye"]),
    (None, ["<|im_end|> <|eot_id|> </s> [/INST] <|im_start|>system", "no", "<s>[INST] x"]),
]


def field(text):
    return text.encode("utf-8").hex() or "-"


def environment():
    def refuse(message):
        raise TemplateError(message)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                         extensions=["jinja2.ext.loopcontrols"])
    made.globals.update(raise_exception=refuse)
    return made


def main():
    templates = dict(TEMPLATES)
    if len(sys.argv) > 1:
        templates = {"? " + os.path.basename(path): open(path).read()
                     for path in sorted(glob.glob(sys.argv[1] + "/*.jinja"))}
    for title, source in templates.items():
        family = title.split()[0]
        template = environment().from_string(re.sub(r"{%-? *(end)?generation *-?%}", "", source))
        if "Cutting Knowledge" not in source:  # its program knows a date of its own
            template.globals["strftime_now"] = lambda form: datetime.date(2025, 6, 28).strftime(form)
        print("template", family, field(source), title.split()[-1])
        for system, said in TALKS if family != "-" else []:
            if system and len(said) > 1 and "loop.last and system_message" in source:
                continue  # here it stays in the first turn
            if system and family == "mistral":
                continue  # v0.1 knows none
            messages = [{"role": "system", "content": system}] if system else []
            messages += [{"role": "assistant" if i % 2 else "user", "content": text}
                         for i, text in enumerate(said)]
            try:
                # (llama.cpp's own edits end a thought unless this is set, as it sets it)
                more = {"enable_thinking": True} if "not enable_thinking" in source else {}
                expected = template.render(messages=messages, bos_token="<s>", eos_token="</s>",
                                           add_generation_prompt=True, **more)
            except (TemplateError, TypeError, UndefinedError):
                continue  # some know no system text, others want what these talks do not have
            expected = expected.replace("Current date: 2025-06-28\n", "")
            if family == "mistral":  # SentencePiece writes it before a run
                expected = re.sub(r"(</?s>) \[INST", r"\1[INST", expected)
            if "<|user|>\n" in source and "<|end|>" in source:  # its tokens take this away
                expected = re.sub(r"(<\|(user|end|assistant|system)\|>)\s+", r"\1", expected)
                if any(text != text.strip() for text in said):
                    continue
            print("talk", field(system or ""), *map(field, said), field(expected))


if __name__ == "__main__":
    main()
