#!/usr/bin/env python3
"""The loads of the labs, and what a program makes of them. run.sh calls it.

    python3 test/labs/lab.py load 1 > load.jsonl            # a trace for --replay
    python3 test/labs/lab.py run 1 build/native/dynamo      # a table; exit status 3: not yet
    python3 test/labs/lab.py stock 1 build/native/dynamo    # whether the page's figures are its own
    python3 test/labs/lab.py command 1                      # what `run` runs

What must be reached, and what the unchanged program reached, stand in the table of the lab's page,
whose columns are the names in `measures`. Everything is in virtual time and seeded: the same
program has the same figures on every machine."""

import glob
import json
import os
import random
import re
import subprocess
import sys
import tempfile

BLOCK = 512  # tokens of a hash id, see test/make_trace.py


class Texts:
    """Texts that nobody else has, as lists of hash ids."""

    def __init__(self):
        self.n = 0

    def fresh(self, n_ids):
        self.n += n_ids
        return list(range(self.n - n_ids, self.n))


def eviction(rng, texts):
    """Conversations that come back, in seven of ten requests, among long texts that never do. After
    250 requests the users go home, and others come."""
    at = 0
    for _ in range(6):
        users = [texts.fresh(rng.randint(4, 6)) for _ in range(16)]
        for _ in range(250):
            at += rng.expovariate(5)
            returns = rng.random() < 0.7
            ids = rng.choice(users) + texts.fresh(1) if returns else texts.fresh(rng.randint(10, 20))
            yield at, BLOCK * len(ids), 2, ids


def routing(rng, texts):
    """Questions about 60 documents, some of them asked about far more often than others."""
    documents = [texts.fresh(rng.randint(8, 16)) for _ in range(60)]
    weights = [1 / (i + 1) ** 1.2 for i in range(len(documents))]
    at = 0
    for _ in range(1000):
        at += rng.expovariate(38)
        ids = rng.choices(documents, weights)[0] + texts.fresh(rng.randint(1, 2))
        yield at, BLOCK * len(ids) - rng.randrange(BLOCK), rng.randint(50, 200), ids


def admission(rng, texts):
    """Prompts of a bounded Pareto distribution: half of them have less than 500 tokens, and the
    longest tenth has more than half of all tokens."""
    alpha, least, most = 1.1, 256, 60000
    at = 0
    for _ in range(1200):
        at += rng.expovariate(26)
        n = int(least * (1 - rng.random() * (1 - (least / most) ** alpha)) ** (-1 / alpha))
        yield at, n, rng.randint(1, 8), texts.fresh(-(-n // BLOCK))


ONE = "--sim h100 --devices 0 --kv-host 0"
LABS = {
    "1": (eviction, ONE + " --kv-device 10G"),
    "2": (routing, "--sim h100x4 --colocate --kv-host 0 --kv-device 14G"),
    "3": (admission, ONE),
}


def load(lab):
    for at, length, answer, ids in LABS[lab][0](random.Random(1), Texts()):
        yield json.dumps({"timestamp": round(at * 1000), "input_length": length,
                          "output_length": answer, "hash_ids": ids})


def command(lab, program, trace):
    return [program, "random:llama-3.1-8b", *LABS[lab][1].split(), "--replay", trace]


def measures(lab, program):
    """What a program makes of a lab's load: numbers by the names that the pages' tables use."""
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as trace:
        trace.write("\n".join(load(lab)) + "\n")
        trace.flush()
        done = subprocess.run([*command(lab, program, trace.name), "--json"],
                              stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"lab {lab}: the program ends with status {done.returncode}")
    *requests, last = [json.loads(line) for line in done.stdout.splitlines()]
    times = sorted(r["ttft_ms"] for r in requests if "ttft_ms" in r)
    if last["load"]["failed"] or len(times) != last["load"]["requests"]:
        sys.exit(f"lab {lab}: {last['load']['failed']} requests failed")
    return {"prompt tokens found, %": 100 * last["load"]["share_saved"],
            "mean TTFT, ms": sum(times) / len(times),
            "p90 TTFT, ms": times[int(0.90 * len(times))],
            "p99 TTFT, ms": times[int(0.99 * len(times))],
            "longest TTFT, ms": times[-1]}


def table(lab):
    """The page's table: names of columns, the recorded figures, the goals (None: no matter)."""
    page = glob.glob(os.path.join(os.path.dirname(os.path.abspath(__file__)), f"{lab}-*.md"))[0]
    rows = {}
    with open(page, encoding="utf-8") as file:
        for line in file:
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if line.startswith("|") and (cells[0] in ("stock", "goal") or "TTFT" in line):
                rows.setdefault(cells[0], cells[1:])
    goals = [re.fullmatch(r"([≤≥]) ([\d.]+)", cell) for cell in rows["goal"]]
    if not any(goals):
        sys.exit(f"{page}: no goal")
    return rows[""], [float(cell) for cell in rows["stock"]], goals


def run(lab, program):
    names, stock, goals = table(lab)
    found = measures(lab, program)
    found = [found[name] for name in names]
    kept = [not goal or (x <= float(goal[2]) if goal[1] == "≤" else x >= float(goal[2]))
            for x, goal in zip(found, goals)]
    width = max(map(len, names)) + 2
    for title, cells in (("", names), ("stock", [f"{x:.1f}" for x in stock]),
                         ("yours", [f"{x:.1f}" for x in found]),
                         ("goal", [goal[0] if goal else "" for goal in goals])):
        print(f"  {title:6}" + "".join(f"{cell:>{width}}" for cell in cells))
    print("PASS" if all(kept) else "not yet: " + ", ".join(
        name for name, ok in zip(names, kept) if not ok))
    return 0 if all(kept) else 3


def check_stock(lab, program):
    names, stock, _ = table(lab)
    found = measures(lab, program)
    wrong = [f"{name}: {found[name]:.1f}, the page has {x:.1f}"
             for name, x in zip(names, stock) if abs(found[name] - x) > 0.05 * x]
    for line in wrong:
        print(line)
    return 1 if wrong else 0


def main():
    if len(sys.argv) == 3 and sys.argv[1] == "load" and sys.argv[2] in LABS:
        for line in load(sys.argv[2]):
            print(line)
    elif len(sys.argv) == 3 and sys.argv[1] == "command" and sys.argv[2] in LABS:
        print(*command(sys.argv[2], "build/native/dynamo", "load.jsonl"))
    elif len(sys.argv) == 4 and sys.argv[1] in ("run", "stock") and sys.argv[2] in LABS:
        sys.exit((run if sys.argv[1] == "run" else check_stock)(sys.argv[2], sys.argv[3]))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
