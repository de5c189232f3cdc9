#!/usr/bin/env python3
"""Checks that a file is a trace as Perfetto and chrome://tracing read it ("Trace Event Format").

    python3 test/check_trace.py trace.json     # a line of what it holds; exit status 1: faults
    python3 test/check_trace.py --self-test    # broken traces are found to be broken

An array of events, or an object with "traceEvents". Of each: a known phase, numbers for pid, tid
and ts, an object for args. Of each lane (pid, tid), in the order of the file: times of X, i, B and
E never go back, no X begins before the one before it has ended, each B has its E. Of counters:
numbers, and times that never go back. Of flows: each s has one f of the same id, cat and name, not
before it, and both lie within an X of their lane. A file that was cut off lacks the closing bracket:
--unfinished allows that. Of the standard library alone.
"""
import json
import sys

NEEDS = {"X": ("name", "ts", "dur"), "B": ("name", "ts"), "E": ("ts",), "i": ("name", "ts"),
         "C": ("name", "ts", "args"), "M": ("name", "args"), "s": ("name", "ts", "id", "cat"),
         "f": ("name", "ts", "id", "cat")}
NAMES = ("process_name", "process_labels", "process_sort_index", "thread_name", "thread_sort_index")


def nanoseconds(value):
    return round(value * 1000)


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_fields(event):
    phase = event.get("ph")
    if phase not in NEEDS:
        return f"phase {phase!r} is unknown"
    for key in ("pid", "tid") + NEEDS[phase]:
        if key not in event:
            return f"{phase} without {key}"
    for key in ("pid", "tid", "ts", "dur"):
        if key in event and not is_number(event[key]):
            return f"{key} is {event[key]!r}, not a number"
    if event.get("ts", 0) < 0 or event.get("dur", 0) < 0:
        return "a negative time"
    if not isinstance(event.get("args", {}), dict):
        return "args is not an object"
    if phase == "C" and not all(is_number(n) for n in event["args"].values()):
        return "a counter counts numbers"
    if phase == "M" and event["name"] not in NAMES:
        return f"metadata {event['name']!r} is unknown"
    if phase == "i" and event.get("s", "t") not in ("g", "p", "t"):
        return f"scope {event['s']!r} of an instant is unknown"
    return None


def check_flows(flows, spans):
    for key, ends in flows.items():
        if [phase for phase, _, _ in sorted(ends, key=lambda end: end[0] == "f")] != ["s", "f"]:
            yield f"flow {key}: not one s and one f"
            continue
        (_, begin, _), (_, end, _) = sorted(ends, key=lambda end: end[0] == "f")
        if end < begin:
            yield f"flow {key}: f is before s"
        for phase, at, lane in ends:
            if not any(start <= at <= stop for start, stop in spans.get(lane, ())):
                yield f"flow {key}: its {phase} is in no X of its lane"


def check(events):
    """Yields what is wrong, a line each."""
    if not isinstance(events, list):
        yield "no array of events"
        return
    last, ended, opened, flows, spans = {}, {}, {}, {}, {}
    for number, event in enumerate(events):
        wrong = check_fields(event) if isinstance(event, dict) else "not an object"
        if wrong:
            yield f"event {number}: {wrong}"
            continue
        phase, lane, name = event["ph"], (event["pid"], event["tid"]), event.get("name")
        at = nanoseconds(event.get("ts", 0))
        if phase in "sf":
            key = (event["cat"], name, event["id"])
            flows.setdefault(key, []).append((phase, at, lane))
            continue
        if phase == "M":
            continue
        clock = (lane, name) if phase == "C" else lane
        if at < last.get(clock, 0):
            yield f"event {number}: time goes back on lane {clock}"
        last[clock] = at
        if phase == "X":
            if at < ended.get(lane, 0):
                yield f"event {number}: begins before the X before it has ended on lane {lane}"
            ended[lane] = at + nanoseconds(event["dur"])
            spans.setdefault(lane, []).append((at, ended[lane]))
        if phase == "B":
            opened.setdefault(lane, []).append(name)
        if phase == "E" and (not opened.get(lane) or event.get("name", opened[lane][-1]) !=
                             opened[lane].pop()):
            yield f"event {number}: E without its B"
    for lane, names in opened.items():
        for name in names:
            yield f"lane {lane}: B {name!r} without its E"
    yield from check_flows(flows, spans)


def read(text, unfinished=False):
    if unfinished and not text.rstrip().endswith("]"):
        text = text.rstrip().rstrip(",") + "]"
    trace = json.loads(text)
    return trace.get("traceEvents") if isinstance(trace, dict) else trace


def self_test():
    def x(tid, ts, dur, **more):
        return {"ph": "X", "name": "step", "pid": 1, "tid": tid, "ts": ts, "dur": dur, **more}

    def flow(phase, tid, ts, key=1, name="hand-over"):
        return {"ph": phase, "name": name, "cat": "flow", "id": key, "pid": 1, "tid": tid, "ts": ts}

    def other(phase, ts, **more):
        return {"ph": phase, "name": "n", "pid": 1, "tid": 9, "ts": ts, **more}

    good = [{"ph": "M", "name": "process_name", "pid": 1, "tid": 1, "args": {"name": "w"}},
            x(1, 1, 2.5), x(1, 3.5, 1, args={"rows": 3}), x(2, 4, 2), flow("s", 1, 3.6),
            flow("f", 2, 4), other("C", 2, args={"free": 2}), other("B", 3), other("i", 4, s="t"),
            other("E", 5)]
    broken = [("phase", [x(1, 1, 1, ph="Q")]), ("without dur", [other("X", 1)]),
              ("not a number", [x("one", 1, 1)]), ("negative", [x(1, -1, 1)]),
              ("not an object", [x(1, 1, 1, args=[])]), ("not an object", ["X"]),
              ("no array", {"ph": "X"}), ("counts", [other("C", 1, args={"free": "2"})]),
              ("metadata", [other("M", 1, args={})]), ("scope", [other("i", 1, s="x")]),
              ("goes back", [x(1, 5, 0), x(1, 4, 0)]),
              ("goes back", [other("i", 5), other("i", 4.999)]),
              ("goes back", [other("C", 5, args={}), other("C", 4, args={})]),
              ("has ended", [x(1, 5, 2), x(1, 6.999, 1)]),
              ("without its E", [other("B", 1)]), ("without its B", [other("E", 1)]),
              ("without its B", [other("B", 1), other("E", 2, name="m")]),
              ("one s and one f", [x(1, 1, 2), flow("s", 1, 2)]),
              ("one s and one f", [x(1, 1, 2), flow("s", 1, 2), flow("f", 1, 2, key=2)]),
              ("one s and one f", [x(1, 1, 2), flow("s", 1, 2), flow("f", 1, 2, name="other")]),
              ("one s and one f", [x(1, 1, 2), flow("s", 1, 2), flow("s", 1, 2)]),
              ("before s", [x(1, 1, 2), flow("s", 1, 3), flow("f", 1, 2)]),
              ("in no X", [x(1, 1, 2), flow("s", 1, 3), flow("f", 1, 4)])]
    failures = [f"a good one: {wrong}" for wrong in check(read(json.dumps(good)))]
    failures += [f"cut off: {wrong}" for wrong in check(read(json.dumps(good)[:-1] + ",\n", True))]
    for words, events in broken:
        wrong = list(check(events))
        if not any(words in line for line in wrong):
            failures.append(f"not found: {words}: {events}: {wrong}")
    print("\n".join(failures) or f"{len(broken)} broken traces found, a good one passed")
    return bool(failures)


def main():
    paths = [word for word in sys.argv[1:] if not word.startswith("--")]
    if "--self-test" in sys.argv:
        return self_test()
    if not paths:
        sys.exit(__doc__)
    failed = False
    for path in paths:
        with open(path, encoding="utf-8") as file:
            try:
                events = read(file.read(), "--unfinished" in sys.argv)
                wrong = list(check(events))
            except ValueError as error:
                events, wrong = [], [f"no JSON: {error}"]
        for line in wrong[:20]:
            print(f"{path}: {line}")
        failed |= bool(wrong)
        phases = [event["ph"] for event in events if isinstance(event, dict) and "ph" in event]
        counts = ", ".join(f"{phases.count(phase)} {phase}" for phase in sorted(set(phases)))
        print(f"{path}: {len(wrong)} faults; {counts}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
