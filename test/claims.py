#!/usr/bin/env python3
"""Published claims about pools apart, in virtual time: prints a table for each, in markdown.

    make build/native/dynamo && python3 test/claims.py

1. One node: R1-Distill-Llama-70B in FP8 on H100, 3,000 tokens in and 150 out, no two prompts alike:
   4 prefill workers of one GPU and a decode worker of 4 against 2 workers of 4 together: +30 %
   tokens/s per GPU. Two nodes: 8 of one GPU and one of 8 against 2 of 8 together: more than twice
   as much. (Announcement of NVIDIA Dynamo, March 2025; "at like inter-token latency".)
2. A host tier under conversations: published gains in TTFT are from 2 to 46 times.

Claim 1 runs as a Poisson process. For each split and latency the highest rate is searched for at
which the median of inter-token latency is no more; TTFT may be anything. What counts is the tokens
generated there, a second and GPU. Together has two sizes of prefill chunks to choose from, as it is
the one that they matter to. The sensitivity repeats it with rates 20 % lower and higher than the
table of sim.h has them. The same program, the same bytes; a few minutes. Only the standard library
is needed."""

import argparse
import json
import os
import subprocess
import sys
import tempfile

MODEL = "random:llama-3.1-70b:fp8"
LOAD = "3000:150"
LATENCIES = (11, 13, 15, 20, 30)  # ms
RATES = [0.03 * 1.06**i for i in range(80)]  # requests/s of a GPU
H100_BYTES = "memory_bytes 85.5e9"  # 81,559 MiB, as the driver tells

ONE_NODE = {
    "2 x TP 4 together": "h100x8 --colocate --tp 4",
    "4 x TP 1 + 1 x TP 4": "h100x8 --prefill 0-3 --decode 4-7 --tp-prefill 1 --tp-decode 4",
    "6 x TP 1 + 1 x TP 2": "h100x8 --prefill 0-5 --decode 6-7 --tp-prefill 1 --tp-decode 2",
    "2 x TP 2 + 1 x TP 4": "h100x8 --prefill 0-3 --decode 4-7 --tp-prefill 2 --tp-decode 4",
}
TWO_NODES = {
    "2 x TP 8 together": "2xh100x8 --colocate --tp 8",
    "8 x TP 1 + 1 x TP 8": "2xh100x8 --prefill 0-7 --decode 8-15 --tp-prefill 1 --tp-decode 8",
    "2 x TP 4 + 1 x TP 8": "2xh100x8 --prefill 0-7 --decode 8-15 --tp-prefill 4 --tp-decode 8",
}
SENSITIVITY = {  # what is varied: its rates
    "bandwidth": ("read_bytes_per_second",),
    "peak": ("operations_per_second", "fp8_operations_per_second"),
    "links": ("peer_bytes_per_second", "network_bytes_per_second", "host_bytes_per_second"),
    "overhead": ("layer_seconds", "step_seconds", "all_reduce_seconds", "copy_seconds"),
}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--program", default="build/native/dynamo")
    parser.add_argument("--quick", action="store_true", help="without the sensitivity")
    return parser.parse_args()


def simulate(args, folder, options, rates=()):
    path = os.path.join(folder, "rates")
    with open(path, "w", encoding="ascii") as file:
        file.write("\n".join(rates) + "\n")
    words = [args.program, *options.split(), "--json"] + (["--rates", path] if rates else [])
    out = subprocess.run(words, stdout=subprocess.PIPE, check=True).stdout
    return json.loads(out.splitlines()[-1])["load"]


def run(args, folder, cluster, chunk, step, rates, cache={}):
    """Median of ITL, and tokens/s per GPU, at a rate."""
    key = cluster, chunk, step, rates
    if key not in cache:
        gpus = 16 if cluster.startswith("2x") else 8
        load = simulate(args, folder, f"{MODEL} --replay {LOAD} --limit 300 --kv-host 0 "
                        f"--max-batch 256 --chunk {chunk} --rate {RATES[step] * gpus:.6g} "
                        f"--sim {cluster}", rates)
        cache[key] = load["itl_p50_ms"], load["tokens_per_second"] / gpus
    return cache[key]


def at(args, folder, cluster, latency, rates=(H100_BYTES,)):
    """Most tokens/s per GPU at a latency; None: the split is never so quick."""
    best = None
    for chunk in (512, 2048) if "--colocate" in cluster else (2048,):
        low, high = -1, len(RATES)  # low: quick enough
        step = high - 1
        while high - low > 1:
            itl, made = run(args, folder, cluster, chunk, step, rates)
            if itl <= latency:
                low, best = step, max(made, best or 0)
            else:
                high = step
            step = (low + high) // 2
    return best


def percent(one, other):
    return "–" if one is None or other is None else f"{100 * (one / other - 1):+.0f} %"


def reached(args, folder, split, base, margin):
    """The highest latency at which one split makes so much more than the other."""
    for latency in range(30, 4, -1):
        one, other = at(args, folder, split, latency), at(args, folder, base, latency)
        if one is not None and other is not None and one >= (1 + margin) * other:
            return f"up to {latency} ms"
    return "nowhere"


def row(*cells):
    print("| " + " | ".join(cells) + " |")


def table(args, folder, splits, margin):
    """What splits make at some latencies, and how much more than the first of them."""
    print(f"\nTokens/s per GPU at a median inter-token latency; published: {100 * margin:+.0f} %\n")
    row("split", *(f"{latency} ms" for latency in LATENCIES), f"{100 * margin:+.0f} % comes out",
        "blocks a worker holds at least")
    row("---", *("---:" for _ in LATENCIES), "---", "---:")
    base = None
    for name, cluster in splits.items():
        base = base or cluster
        cells = []
        for latency in LATENCIES:
            made = at(args, folder, cluster, latency)
            more = percent(made, at(args, folder, base, latency))
            more = "" if cluster is base or made is None else f" ({more})"
            cells.append("–" if made is None else f"{made:.0f}{more}")
        blocks = simulate(args, folder, f"{MODEL} --replay {LOAD} --limit 1 --kv-host 0 "
                          f"--sim {cluster}", (H100_BYTES,))["device_blocks"]
        row(name, *cells,
            "" if cluster is base else reached(args, folder, cluster, base, margin),
            f"{blocks:.0f}")


def sensitivity(args, folder, splits, latency):
    base_name, name = list(splits)[:2]
    print(f"\nMore than {base_name} at {latency} ms, with rates 20 % lower / higher\n")
    row("split", "as in the table", *SENSITIVITY, "80.0 GB in place of 85.5")
    row("---", "---:", *("---:" for _ in SENSITIVITY), "---:")
    cells = []
    variants = [[(H100_BYTES,)]]
    for rates in SENSITIVITY.values():
        variants.append([(H100_BYTES, *(f"{rate} *{factor}" for rate in rates))
                         for factor in (0.8, 1.2)])
    variants.append([()])
    for variant in variants:
        made = []
        for rates in variant:
            pair = [at(args, folder, splits[i], latency, rates) for i in (name, base_name)]
            made.append(percent(*pair))
        cells.append(" / ".join(made))
    row(name, *cells)


def conversations(args, folder):
    trace = os.path.join(folder, "trace.jsonl")
    script = os.path.join(os.path.dirname(__file__), "make_trace.py")
    words = "--users 80 --turns 10 --rate 4 --input 8000 --output 200 --think 20"
    with open(trace, "w", encoding="ascii") as file:
        subprocess.run([sys.executable, script, *words.split()], stdout=file,
                       stderr=subprocess.DEVNULL, check=True)
    print("\n80 users of 10 turns (`test/make_trace.py " + words + "`), llama-3.1-8b in bf16, on "
          "1 + 1 H100 with 20 GB of KV cache each\n")
    row("host tier", "prompt tokens found", "of them on the host alone", "TTFT p50, ms",
        "TTFT p90, ms", "ITL p50, ms", "to the host, GB", "back, GB")
    row("---", *("---:" for _ in range(7)))
    tiers = {"none": "--kv-host 0", "copied on eviction": "--kv-policy on-evict",
             "written through": "--kv-policy write-through"}
    for name, options in tiers.items():
        load = simulate(args, folder, f"random:llama-3.1-8b --replay {trace} --sim h100x2 "
                        f"--kv-device 20G {options}")
        share = 100 / load["prompt_tokens"]
        row(name, f"{share * (load['found_on_devices'] + load['found_on_host']):.0f} %",
            f"{share * load['found_on_host']:.0f} %", f"{load['ttft_p50_ms']:.0f}",
            f"{load['ttft_p90_ms']:.0f}", f"{load['itl_p50_ms']:.1f}",
            f"{load['pages_out_gb']:.0f}", f"{load['pages_in_gb']:.0f}")


def main():
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        for splits, margin, latency in ((ONE_NODE, 0.3, 15), (TWO_NODES, 1.0, 13)):
            table(args, folder, splits, margin)
            if not args.quick:
                sensitivity(args, folder, splits, latency)
        conversations(args, folder)


if __name__ == "__main__":
    main()
