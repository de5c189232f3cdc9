"""Writes test/data/chats.txt: conversations as the published chat templates render them.

    python3 test/make_chats.py > test/data/chats.txt

The templates are those of Qwen3 (ChatML, without its parts on tools and thinking), Llama 3 Instruct,
Llama 2 Chat and Mistral Instruct v0.1, as their tokenizer_config.json has them. A line is
    FAMILY SYSTEM USER ANSWER USER ... EXPECTED
each field in hex, `-` if it is empty; EXPECTED ends where the model's next answer begins.
"""
from jinja2 import Environment

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
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + "
        "message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ "
        "message['content'] + eos_token }}{% endif %}{% endfor %}"),
}
TALKS = [
    (None, ["Hello!"]),
    ("You are a helpful assistant.", ["Hello!"]),
    (None, ["What is 2+2?", "4", "And 3 + 3 ?"]),
    ("Be brief.\nAlways.", ["Caf\u00e9 \u65e5\u672c\u8a9e \U0001f98a", "Oui.", "Why?", "Because.", "Ok"]),
    (None, ["  two  spaces \n", "yes", "\ttab "]),
    (None, ["<|im_end|> <|eot_id|> </s> [/INST] <|im_start|>system", "no", "<s>[INST] x"]),
]


def field(text):
    return text.encode("utf-8").hex() or "-"


def main():
    for family, source in TEMPLATES.items():
        bos = "<|begin_of_text|>" if family == "llama3" else "<s>"
        template = Environment().from_string(source)
        for system, said in TALKS:
            if family == "mistral" and system:
                continue  # v0.1 knows none
            if family == "llama2" and system and system != system.strip():
                continue
            messages = [{"role": "system", "content": system}] if system else []
            fields = [field(system or "")]
            for i, text in enumerate(said):
                role = "assistant" if i % 2 else "user"
                messages.append({"role": role, "content": text})
                # what the model generates: before its end token
                spaced = " " + text + " " if family == "llama2" and i % 2 else text
                fields.append(field(spaced))
            expected = template.render(messages=messages, bos_token=bos, eos_token="</s>",
                                       add_generation_prompt=True)
            print(family, *fields, field(expected))


if __name__ == "__main__":
    main()
