#!/usr/bin/env python3
"""Writes a trace in Mooncake's form, for --replay: the same arguments, the same bytes.

    python3 test/make_trace.py --users 50 --turns 8 --rate 4 > trace.jsonl
    dynamo model.gguf --replay trace.jsonl --ttft 200 --itl 30

Users come as a Poisson process. Each holds a conversation of --turns turns at most: a turn's prompt
is that of the turn before, its answer, and what the user says next; between an answer and the next
turn lie --think seconds in the mean. All users of one of --systems kinds begin with the same
--system tokens. What a user says is as long as makes prompts --input tokens in the mean, over all
turns; answers have --output in the mean. Lengths are geometric, at least 1.

A hash id stands for 512 tokens and all before them; so a prompt shares with another what fills
whole blocks of 512, and how much of the tokens that is goes to stderr. With --users the trace ends
with their last turns; else after --requests.

With --day the trace is a day of so many seconds, with two peaks; each request is a user's only one,
and shares nothing. In its first half the rate rises from 0 to --rate and falls again, with --input
and --output; in its second half likewise, to what --evening says.

Only the standard library is needed."""

import argparse
import heapq
import json
import math
import random
import sys

BLOCK = 512  # tokens of a hash id


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=1000, help="in all; see --users")
    parser.add_argument("--users", type=int, help="conversations, in place of --requests")
    parser.add_argument("--turns", type=int, default=3, help="of a conversation, at most")
    parser.add_argument("--rate", type=float, default=1, help="requests a second in the mean")
    parser.add_argument("--input", type=int, default=8000, help="tokens of a prompt in the mean")
    parser.add_argument("--output", type=int, default=200, help="tokens of an answer in the mean")
    parser.add_argument("--system", type=int, default=1024, help="tokens that users of a kind share")
    parser.add_argument("--systems", type=int, default=4, help="kinds of users")
    parser.add_argument("--think", type=float, default=20, help="seconds between turns in the mean")
    parser.add_argument("--day", type=float, help="seconds of a day with two peaks")
    parser.add_argument("--evening", help="its second peak: IN:OUT:RATE")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.day is not None or args.evening is not None:
        try:
            args.evening = [float(word) for word in (args.evening or "").split(":")]
        except ValueError:
            args.evening = []
        least = min(*args.evening, args.day or 0, args.rate)
        if len(args.evening) != 3 or least <= 0 or args.users:
            parser.error("--day SECONDS and --evening IN:OUT:RATE go together, without --users")
        return args
    said = args.input - args.system - (args.turns - 1) / 2 * args.output
    if min(args.turns, args.systems, args.output, args.input) < 1 or args.rate <= 0 or said < 1:
        parser.error("--input must have room for --system, and for the answers of half the turns")
    args.said = said / ((args.turns + 1) / 2)  # turn t has said it t times
    return args


def geometric(rng, mean):
    """A length of at least 1 that has this mean."""
    if mean <= 1:
        return 1
    return 1 + int(math.log(1 - rng.random()) / math.log(1 - 1 / mean))


class User:
    """A conversation: how long its text is, and the ids of the blocks that are full."""

    def __init__(self, args, kind):
        n = args.system // BLOCK
        self.length = args.system
        self.ids = list(range(kind * n, (kind + 1) * n))
        self.left = args.turns


def trace(args):
    """Yields (seconds, input length, output length, hash ids), in the order of arrival."""
    rng = random.Random(args.seed)
    next_id = args.systems * (args.system // BLOCK)
    users, made, order = 0, 0, 0
    arrival = rng.expovariate(args.rate / args.turns)
    turns = []  # a heap of (seconds, order, user)
    while turns or args.users is None or users < args.users:
        if (args.users is None or users < args.users) and (not turns or arrival <= turns[0][0]):
            heapq.heappush(turns, (arrival, order, User(args, rng.randrange(args.systems))))
            users, order = users + 1, order + 1
            arrival += rng.expovariate(args.rate / args.turns)
            continue
        if args.users is None and made == args.requests:
            return
        at, _, user = heapq.heappop(turns)
        user.length += geometric(rng, args.said)
        answer = geometric(rng, args.output)
        while len(user.ids) < user.length // BLOCK:
            user.ids.append(next_id)
            next_id += 1
        last = [next_id] if user.length % BLOCK else []  # a block that is cut is nobody else's
        next_id += len(last)
        yield at, user.length, answer, user.ids + last
        made += 1
        user.length += answer
        user.left -= 1
        if user.left > 0:
            heapq.heappush(turns, (at + rng.expovariate(1 / args.think), order, user))
            order += 1


def day(args):
    """The same, of a day: a rate of 0 at its begin, its middle and its end."""
    rng = random.Random(args.seed)
    peaks = [(args.input, args.output, args.rate), args.evening]
    most = max(rate for _, _, rate in peaks)
    at, next_id = rng.expovariate(most), 0
    while at < args.day:
        prompt, answer, rate = peaks[at >= args.day / 2]
        if rng.random() * most < rate * math.sin(2 * math.pi * at / args.day) ** 2:
            length = geometric(rng, prompt)
            n = -(-length // BLOCK)
            yield at, length, geometric(rng, answer), list(range(next_id, next_id + n))
            next_id += n
        at += rng.expovariate(most)


def main():
    args = arguments()
    seen, tokens, shared, answers, n, at = set(), 0, 0, 0, 0, 0
    for at, length, answer, ids in (day if args.day else trace)(args):
        line = {"timestamp": round(at * 1000), "input_length": length, "output_length": answer,
                "hash_ids": ids}
        print(json.dumps(line, separators=(", ", ": ")))
        n, tokens, answers = n + 1, tokens + length, answers + answer
        shared += BLOCK * sum(i in seen for i in ids)
        seen.update(ids)
    print(f"{n} requests in {at:.0f} s ({n / max(at, 1e-9):.2f}/s); in the mean "
          f"{tokens / max(n, 1):.0f} tokens in, {answers / max(n, 1):.0f} out; "
          f"{100 * shared / max(tokens, 1):.0f} % of prompt tokens shared", file=sys.stderr)


if __name__ == "__main__":
    main()
