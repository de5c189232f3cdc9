#!/usr/bin/env python3
"""Writes a load for `dynamo -f`: users who talk in turns; and judges what came of it.

    python3 test/load.py --users 20 --turns 5 > load.jsonl
    ./dynamo model.bin -f load.jsonl --json --stats > answers.jsonl
    python3 test/load.py --judge answers.jsonl load.jsonl

Users come as a Poisson process. Each one's first turn begins with a system text that all share;
each turn follows the answer of the one before ("after"), not before the user has thought ("at").
Lengths of prompts and answers and times of thought have long tails (log-normal; --tail is the
deviation of the logarithm). The same --seed writes the same lines. Of the standard library alone.

Judging compares what was found in the cache with what could have been: all full blocks of the text
before a turn but the last token, whose keys and values nobody has computed yet.
"""
import argparse
import json
import math
import random
import sys

BLOCK = 16
WORDS = ("the a little big old red happy sad fox bear girl boy dog cat tree house garden forest "
         "river sun moon star went saw found said loved wanted looked for in to and with one day "
         "then but so she he they was had very kind friend home play help").split()


def options():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--users", type=int, default=20)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rate", type=float, default=10, help="users who come in a second")
    parser.add_argument("--think", type=float, default=1, help="seconds between turns, mean")
    parser.add_argument("--system", type=int, default=32, help="words, or ids, that all share")
    parser.add_argument("--first", type=int, default=0, help="more of them in a first turn, mean")
    parser.add_argument("--prompt", type=int, default=40, help="words, or ids, of a turn, mean")
    parser.add_argument("--answer", type=int, default=50, help="tokens of an answer, mean")
    parser.add_argument("--tail", type=float, default=0.5, help="0: no tail, all are the mean")
    parser.add_argument("--longest", type=int, default=0, help="of a prompt or an answer; 0: any")
    parser.add_argument("--deadline", type=float, default=0, help="seconds; 0: none")
    parser.add_argument("--ids", type=int, default=0, metavar="VOCAB",
                        help="token ids below VOCAB in the place of words")
    parser.add_argument("--judge", nargs=2, metavar=("ANSWERS", "LOAD"))
    return parser.parse_args()


def draw(rng, mean, tail):
    """Log-normal, of that mean."""
    return mean * math.exp(rng.gauss(0, tail) - tail * tail / 2) if tail else mean


def length(rng, mean, o):
    n = max(1, round(draw(rng, mean, o.tail)))
    return min(n, o.longest) if o.longest else n


def text(rng, n, o):
    if o.ids:
        return [rng.randrange(3, o.ids) for _ in range(n)]
    return " ".join(rng.choice(WORDS) for _ in range(n))


def write(o):
    rng = random.Random(o.seed)
    system = text(rng, o.system, o) if o.system else [] if o.ids else ""
    lines, arrival = [], 0.0
    for user in range(o.users):
        arrival += rng.expovariate(o.rate)
        at = arrival
        for turn in range(o.turns):
            first = length(rng, o.first, o) if o.first and turn == 0 else 0
            said = text(rng, first + length(rng, o.prompt, o), o)
            gap = [] if o.ids else ". "
            said = (system + gap + said if turn == 0 else said if o.ids else " " + said) or said
            line = {"id": f"u{user}t{turn}", "ids" if o.ids else "prompt": said,
                    "at": round(at, 3), "n": length(rng, o.answer, o)}
            if turn > 0:
                line["after"] = f"u{user}t{turn - 1}"
            if o.deadline:
                line["deadline"] = o.deadline
            lines.append((turn, at, line))
            at += draw(rng, o.think, o.tail)
    # a turn stands behind the one that it follows: sorted by turn, then by arrival
    for _, _, line in sorted(lines, key=lambda l: (l[0], l[1])):
        print(json.dumps(line))


def within(values, share):
    values = sorted(values)
    return values[max(0, math.ceil(share * len(values)) - 1)] if values else 0


def judge(answers_path, load_path):
    with open(answers_path) as file:
        objects = [json.loads(line) for line in file if line.strip()]
    answers = {o["id"]: o for o in objects if "id" in o}
    stats = next((o["stats"] for o in objects if "stats" in o), {})
    with open(load_path) as file:
        load = [json.loads(line) for line in file if line.strip()]
    cacheable = found = on_host = blocks = 0
    followed = {line.get("after") for line in load}
    for line in load:
        answer, before = answers.get(line["id"], {}), answers.get(line.get("after"))
        if answer and line["id"] not in followed:
            blocks += (answer["prompt_tokens"] + answer["completion_tokens"]) // BLOCK
        if before and "queue_ms" in answer:
            whole = before["prompt_tokens"] + before["completion_tokens"]
            possible = (whole - 1) // BLOCK * BLOCK
            cacheable += possible
            found += min(answer["cached_tokens"], possible)
            on_host += answer["cached_on_host"]
    failed = sum(a["finish_reason"] in ("error", "cancelled") for a in answers.values())
    print(f"answers {len(answers)} of {len(load)}, failed {failed}; conversations of {blocks} blocks")
    print(f"cacheable tokens {cacheable}, found {100 * found / max(1, cacheable):.1f} %, "
          f"on the host alone {100 * on_host / max(1, cacheable):.1f} %")
    for key in ("queue_ms", "ttft_ms", "itl_ms"):
        values = [a[key] for a in answers.values() if key in a]
        print(f"{key}: median {within(values, 0.5):.2f}, 99 % {within(values, 0.99):.2f}")
    if stats:
        print(f"{stats['tokens_per_second']:.0f} tokens/s, prompt tokens computed "
              f"{stats['prefill_tokens']}, blocks paged out {stats['pages_out']}, in "
              f"{stats['pages_in']}, lost {stats['blocks_lost']}")


if __name__ == "__main__":
    chosen = options()
    try:
        if chosen.judge:
            judge(*chosen.judge)
        else:
            write(chosen)
    except BrokenPipeError:
        sys.stderr.close()
