"""Prints what llama.cpp writes greedily with a model, so that other engines can be compared to it.

One JSON line for each beginning: the prompt's ids, the generated ids, and the generated text.
Temperature 0, no repeat penalty; generation stops at the end token, at -n tokens, or where the
context is full.

    python3 test/compare_llama_cpp.py model.bin                      # a dozen beginnings
    python3 test/compare_llama_cpp.py model.bin --program ./dynamo   # are its ids the same?
    python3 test/compare_llama_cpp.py model.bin --save test/data/llama_cpp_greedy.txt
    python3 test/compare_llama_cpp.py model.bin "My dog" -n 100
    python3 test/compare_llama_cpp.py model.bin --tokenizer work/tokenizer.model

With --tokenizer, the ids of a dozen texts are also compared with SentencePiece's own; with
--against-pytorch, the greedy ids are compared with those of model/train.py's forward pass on the
file's weights, and the gap between the two best logits is shown where they part. --save writes
prompts and ids, for tests, up to where the two best logits are less than CLOSE apart: rounding may
decide there. Exits with 1 if ids or a tokenization differ.
"""
import argparse
import json
import os
import subprocess
import sys

import numpy as np
from llama_cpp import Llama

CLOSE = 0.1

BEGINNINGS = [
    "Once upon a time", "One day, a little fox", "Lily was sad because", "The old robot", "My dog",
    "Tom and Mia went to the beach", "It was a rainy morning", "Deep in the forest",
    "In a small village", "Every morning, the baker", "The sun was shining", "Why was the dragon",
]
HARD_TEXTS = [
    "", " ", "Hello, world!", "  two  spaces   three ", "line one\nline two\n\nline four", "\ttab",
    "caf\u00e9, na\u00efve, \u00fcber", "\u65e5\u672c\u8a9e", "\U0001f98a and \U0001f43b",
    "1234567890 3.14 100%", "x = {a[0]: 'b'} | ~`^\\ @#$&*()_+-=<>/?;:\"", "ZZTop QUIETLY wAs",
]


def open_model(path):
    return Llama(model_path=path, n_ctx=512, n_threads=1, n_threads_batch=1, logits_all=True,
                 verbose=False)


def greedy(model, beginning, count):
    """(prompt ids, generated ids): always the most likely token."""
    prompt = model.tokenize(beginning.encode("utf-8"), add_bos=True, special=False)
    model.reset()
    generated = []
    for token in model.generate(prompt, temp=0.0, repeat_penalty=1.0):
        if token == model.token_eos():
            break
        generated.append(token)
        if len(generated) == count or len(prompt) + len(generated) == model.n_ctx():
            break
    return prompt, generated


def print_greedy(model, beginnings, count):
    """Prints the JSON lines and returns [(prompt ids, generated ids)]."""
    results = []
    for beginning in beginnings:
        prompt, generated = greedy(model, beginning, count)
        text = model.detokenize(generated, prev_tokens=prompt).decode("utf-8", errors="replace")
        print(json.dumps(dict(beginning=beginning, prompt=prompt, ids=generated, text=text)))
        results.append((prompt, generated))
    return results


def sure(model, prompt, generated):
    """How many of the generated ids come before the first close decision."""
    model.reset()
    model.eval(prompt + generated)
    for i in range(len(generated)):
        best = np.partition(model.scores[len(prompt) - 1 + i], -2)[-2:]
        if best[1] - best[0] < CLOSE:
            return i
    return len(generated)


def save(model, path, results):
    with open(path, "w", encoding="ascii") as file:
        for prompt, generated in results:
            ids = generated[:sure(model, prompt, generated)]
            file.write(f"{','.join(map(str, prompt))} {','.join(map(str, ids))}\n")


def differing_ids(program, path, results):
    """How many continuations the program writes differently."""
    differing = 0
    for prompt, theirs in results:
        command = [program, path, "--ids", ",".join(map(str, prompt)), "-t", "0", "--json",
                   "-n", str(len(theirs))]
        run = subprocess.run(command, check=True, capture_output=True, text=True)
        ours = json.loads(run.stdout)["ids"]
        if ours != theirs:
            differing += 1
            place = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), len(ours))
            print(f"differs after {place} tokens: {prompt}", file=sys.stderr)
    print(f"greedy: {len(results) - differing} of {len(results)} continuations equal {program}'s",
          file=sys.stderr)
    return differing


def differing_tokenizations(model, tokenizer, texts):
    """How many texts llama.cpp and SentencePiece cut differently; each is printed."""
    differing = 0
    for text in texts:
        ours = tokenizer.encode(text)
        theirs = model.tokenize(text.encode("utf-8"), add_bos=False, special=False)
        if ours != theirs:
            differing += 1
            print(f"differs: {text!r}: SentencePiece {ours}, llama.cpp {theirs}", file=sys.stderr)
    print(f"tokenization: {len(texts) - differing} of {len(texts)} texts equal", file=sys.stderr)
    return differing


def compare_with_pytorch(path, results, count):
    """Says how many greedy continuations are the same in model/train.py's float32 forward pass."""
    import torch
    sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "model"))
    import train
    weights = train.read_gguf_weights(path)
    same = 0
    for prompt, theirs in results:
        ours = train.continuation(weights, prompt, count)
        if ours == theirs:
            same += 1
            continue
        place = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b),
                     min(len(ours), len(theirs)))
        with torch.no_grad():
            logits = train.forward(weights, torch.tensor([prompt + ours[:place]]))[0, -1]
        best = logits.topk(2)
        print(f"parts after {place} tokens: PyTorch's best ids are {best.indices.tolist()} with "
              f"logits {best.values.tolist()}", file=sys.stderr)
    print(f"greedy: {same} of {len(results)} continuations equal PyTorch's", file=sys.stderr)


def main():
    parser = argparse.ArgumentParser(description="Greedy text of llama.cpp, as JSON lines.")
    parser.add_argument("model")
    parser.add_argument("beginnings", nargs="*", default=BEGINNINGS)
    parser.add_argument("-n", type=int, default=200, dest="count")
    parser.add_argument("--tokenizer", help="SentencePiece model to compare the tokens with")
    parser.add_argument("--against-pytorch", action="store_true")
    parser.add_argument("--program", help="whose greedy ids are compared")
    parser.add_argument("--save", help="file for prompts and ids that are no close decision")
    arguments = parser.parse_args()
    model = open_model(arguments.model)
    results = print_greedy(model, arguments.beginnings, arguments.count)
    if arguments.against_pytorch:
        compare_with_pytorch(arguments.model, results, arguments.count)
    differing = 0
    if arguments.program:
        differing += differing_ids(arguments.program, arguments.model, results)
    if arguments.save:
        save(model, arguments.save, results)
    if arguments.tokenizer:
        import sentencepiece
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=arguments.tokenizer)
        texts = HARD_TEXTS + arguments.beginnings
        differing += differing_tokenizations(model, tokenizer, texts)
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
