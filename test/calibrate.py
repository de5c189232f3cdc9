#!/usr/bin/env python3
"""Compares virtual time with the clock: the same loads on the CPU engine, and by --sim.

    make build/native/bench && python3 test/calibrate.py random:stories-110m:f32

Measures the rates of this machine (bench rates), finds what the engine can take at most, then runs
loads of Poisson arrivals at shares of that on two CPU devices, by the clock and in virtual time, and
prints the medians of TTFT and ITL of both: by the clock the median of --repeats runs, between which
the rates are measured again. Exit status 1: an error above --limit at a load of up to a half. Only
the standard library is needed."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default="random:stories-110m:f32")
    parser.add_argument("--program", default="build/native/dynamo")
    parser.add_argument("--bench", default="build/native/bench")
    parser.add_argument("--load", default="200:30", help="IN:OUT tokens")
    parser.add_argument("--requests", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=15, help="percent")
    parser.add_argument("--blocks", type=int, default=128,
                        help="of a device: few, since memory costs more when it is first touched")
    parser.add_argument("--options", default="", help="more, for both")
    return parser.parse_args()


def run(args, *options):
    words = [args.program, args.model, "--replay", args.load, "--json",
             "--kv-device", f"{args.blocks}b", "--kv-host", "0", *options]
    out = subprocess.run(words + args.options.split(), stdout=subprocess.PIPE, check=True).stdout
    return json.loads(out.splitlines()[-1])["load"]


def rates(args):
    """What steps of the model's own shape and type reach now, if bench has them, by name."""
    words = args.model.upper().split(":")
    kind = words[2] if len(words) > 2 else "BF16" if words[0] == "RANDOM" else "F32"
    out = subprocess.run([args.bench, "rates", kind], stdout=subprocess.PIPE, check=True).stdout
    lines = [line.rsplit(" ", 1) for line in out.decode().splitlines() if line[0] != "#"]
    return {name: float(value) for name, value in lines}


def write(path, measured):
    """A file of rates: the medians of what was measured."""
    with open(path, "w", encoding="utf-8") as file:
        for name in measured[0]:
            file.write(f"{name} {statistics.median(m[name] for m in measured)}\n")
        file.write("memory_bytes 1e12\n")  # the numbers of blocks are given


def main():
    args = arguments()
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "rates")
        virtual = ["--sim", "cpu:2", "--rates", path]
        write(path, [rates(args)])
        most = run(args, *virtual, "--limit", "100")["requests_per_second"]
        print(f"{args.model}, {args.load}: at most {most:.2f} requests/s in virtual time")
        print(f"{'load':>6} {'':>8} {'TTFT p50':>10} {'ITL p50':>10}   ms")
        for share in (0.25, 0.5):
            options = ["--limit", str(args.requests), "--rate", f"{share * most:.6f}"]
            real, measured = [], [rates(args)]
            for _ in range(args.repeats):  # in turn: a shared machine is now faster, now slower
                real.append(run(args, "--devices", "cpu:2", *options))
                measured.append(rates(args))
            write(path, measured)
            told = run(args, *virtual, *options)
            errors = []
            for key in ("ttft_p50_ms", "itl_p50_ms"):
                measured = statistics.median(r[key] for r in real)
                errors.append((measured, told[key], 100 * (told[key] / measured - 1)))
            for i, label in enumerate(("clock", "virtual")):
                print(f"{share:6.2f} {label:>8} {errors[0][i]:10.2f} {errors[1][i]:10.2f}")
            print(f"{'':6} {'error':>8} {errors[0][2]:9.1f}% {errors[1][2]:9.1f}%", flush=True)
            bad += any(abs(error[2]) > args.limit for error in errors)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
