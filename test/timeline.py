#!/usr/bin/env python3
"""Draws a trace of `dynamo --trace` as a picture (SVG), for a README or a talk.

    ./dynamo model.bin -f prompts.txt --kv-device 40b --trace trace.json
    python3 test/timeline.py trace.json > timeline.svg
    python3 test/timeline.py trace.json --from 120 --to 180 --width 1000 > part.svg    # ms

A band for each worker: its steps, its copies by direction, and the blocks that its memory holds;
then the host's blocks and the requests. An arrow is a hand-over, from the step that ended a prompt
to the first step that goes on with it; a triangle a preemption. Lanes that hold nothing are left
out. All colours are to be read on white and on black. Of the standard library alone.
"""
import argparse
import json
import sys
from xml.sax.saxutils import escape

COLOURS = {"prefill": "#3b82f6", "decode": "#f59e0b", "mixed": "#10b981",
           "copies to the host": "#ef4444", "copies from the host": "#14b8a6",
           "copies from workers": "#a855f7", "pinned": "#6366f1", "cached": "#94a3b8",
           "in flight": "#ec4899", "waiting": "#ef4444", "admitted": "#22c55e"}
SHORT = {"copies to the host": "to host", "copies from the host": "from host",
         "copies from workers": "from peers"}
GREY, LEFT, RIGHT, STEPS, COPIES, CHART, GAP = "#7d8590", 148, 12, 22, 8, 40, 20


class Trace:
    def __init__(self, events):
        self.places, self.lanes, self.spans, self.counters = {}, {}, {}, {}
        self.flows, self.preempted, self.end = {}, [], 0
        for e in events:
            lane, at = (e["pid"], e["tid"]), e.get("ts", 0)
            self.end = max(self.end, at + e.get("dur", 0))
            if e["ph"] == "M" and e["name"] == "process_name":
                self.places[e["pid"]] = e["args"]["name"]
            elif e["ph"] == "M":
                self.lanes[lane] = e["args"]["name"]
            elif e["ph"] == "X":
                self.spans.setdefault(lane, []).append((at, at + e["dur"], e["name"]))
            elif e["ph"] == "C":
                self.counters.setdefault(e["pid"], []).append((at, e["args"]))
            elif e["ph"] in "sf":
                self.flows.setdefault(e["id"], {})[e["ph"]] = (at, lane)
            elif e["name"] == "preempted":
                self.preempted.append((at, e["args"]["at"]))


class Picture:
    def __init__(self, trace, begin, end, width):
        self.trace, self.begin, self.end, self.width = trace, begin, end, width
        self.parts, self.over, self.steps, self.y = [], [], {}, 34

    def x(self, at):
        at = min(max(at, self.begin), self.end)
        return LEFT + (at - self.begin) / (self.end - self.begin) * (self.width - LEFT - RIGHT)

    def text(self, x, y, words, anchor="start", size=11, more=""):
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" '
                          f'font-size="{size}"{more}>{escape(words)}</text>')

    def bars(self, spans, height, colour_of):
        """Spans of one colour that nearly touch become one: a run has thousands of them."""
        merged = []
        for start, end, name in spans:
            if end < self.begin or start > self.end:
                continue
            left, right, colour = self.x(start), self.x(end), colour_of(name)
            right = max(right, left + 0.6)
            if merged and merged[-1][2] == colour and left - merged[-1][1] < 0.25:
                merged[-1][1] = max(right, merged[-1][1])
            else:
                merged.append([left, right, colour])
        for left, right, colour in merged:
            self.parts.append(f'<rect x="{left:.1f}" y="{self.y}" width="{right - left:.1f}" '
                              f'height="{height}" fill="{colour}"/>')

    def chart(self, samples, keys, whole, label):
        """Stacked areas, the first at the bottom, of what was counted."""
        base, levels, at = self.y + CHART, [], None
        for ts, args in samples:
            x = self.x(ts)
            if levels and x - at < 0.5:
                levels.pop()
            else:
                at = x
            levels.append((at, [sum(args[key] for key in keys[:n + 1]) for n in range(len(keys))]))
        levels.append((self.x(self.end), levels[-1][1]))
        for n in reversed(range(len(keys))):
            path, before = f"M{levels[0][0]:.1f} {base}", base
            for x, sums in levels:
                y = base - CHART * sums[n] / whole
                path += f"H{x:.1f}" + (f"V{y:.1f}" if y != before else "")
                before = y
            self.parts.append(f'<path d="{path}V{base}Z" fill="{COLOURS[keys[n]]}"/>')
        self.parts.append(f'<rect x="{LEFT}" y="{self.y}" width="{self.width - LEFT - RIGHT}" '
                          f'height="{CHART}" fill="none" stroke="{GREY}" stroke-opacity=".5"/>')
        self.text(LEFT - 8, self.y + 10, str(whole), "end", 9)
        self.text(LEFT - 8, base, "0", "end", 9)
        self.text(LEFT - 8, self.y + CHART / 2 + 4, label, "end")
        self.y = base + 4

    def place(self, pid, name):
        """A worker, the host, or the scheduler."""
        self.text(4, self.y + 12, name, more=' font-weight="bold"')
        self.y += 18
        for lane in sorted(lane for lane in self.trace.lanes if lane[0] == pid):
            spans, label = self.trace.spans.get(lane), self.trace.lanes[lane]
            if not spans:
                continue
            height = STEPS if label == "steps" else COPIES
            self.text(LEFT - 8, self.y + height / 2 + 4, SHORT.get(label, label), "end")
            if label == "steps":
                self.steps[lane] = self.steps[name] = self.y
            self.bars(spans, height, lambda what: COLOURS.get(what) or COLOURS[label])
            self.y += height + 4
        counted = self.trace.counters.get(pid, [])
        if counted and "free" in counted[0][1]:
            whole = sum(counted[0][1].values())
            self.chart(counted, ("pinned", "cached", "in flight"), whole, "KV blocks")
        elif counted:
            whole = max(sum(args.values()) for _, args in counted)
            self.chart(counted, ("admitted", "waiting"), whole, "requests")
        self.y += GAP

    def arrows(self):
        for ends in self.trace.flows.values():
            if len(ends) < 2:
                continue
            (start, source), (end, target) = ends["s"], ends["f"]
            if start < self.begin or end > self.end or not {source, target} <= set(self.steps):
                continue
            x, y, to_x, to_y = self.x(start), self.steps[source], self.x(end), self.steps[target]
            y, to_y = (y + STEPS, to_y - 1) if y < to_y else (y, to_y + STEPS + 1)
            middle = (y + to_y) / 2
            self.over.append(f'<path d="M{x:.1f} {y}C{x:.1f} {middle} {to_x:.1f} {middle} '
                             f'{to_x:.1f} {to_y}" fill="none" stroke="{GREY}" stroke-width="1.4" '
                             'marker-end="url(#tip)"/>')
        for at, name in self.trace.preempted:
            if name in self.steps and self.begin <= at <= self.end:
                x, y = self.x(at), self.steps[name]
                self.over.append(f'<path d="M{x - 4:.1f} {y - 8}h8l-4 7z" fill="#ef4444"/>')

    def legend(self):
        used = {name for spans in self.trace.spans.values() for _, _, name in spans}
        names = [name for name in ("prefill", "decode", "mixed") if name in used]
        x = LEFT
        for name in names + ["pinned", "cached", "in flight", "admitted", "waiting"]:
            self.parts.append(f'<rect x="{x}" y="8" width="10" height="10" '
                              f'fill="{COLOURS[name]}"/>')
            self.text(x + 14, 17, name)
            x += 26 + 7 * len(name)
        self.parts.append(f'<path d="M{x} 13h16" stroke="{GREY}" stroke-width="1.4" '
                          'marker-end="url(#tip)"/>')
        self.text(x + 24, 17, "hand-over")
        self.parts.append(f'<path d="M{x + 92} 9h8l-4 7z" fill="#ef4444"/>')
        self.text(x + 104, 17, "preemption")

    def axis(self):
        span = (self.end - self.begin) / 1000
        step = next(10 ** power * digit for power in range(-3, 9) for digit in (1, 2, 5)
                    if span / (10 ** power * digit) <= 10)
        tick = -(-self.begin / 1000 // step) * step
        while tick * 1000 <= self.end:
            x = self.x(tick * 1000)
            self.parts.insert(0, f'<path d="M{x:.1f} 28V{self.y - GAP + 6}" stroke="{GREY}" '
                                 'stroke-opacity=".25"/>')
            self.text(x, self.y, f"{abs(tick):g} ms", "middle", 10)
            tick += step
        self.y += 8

    def draw(self):
        workers = [pid for pid, name in self.trace.places.items() if name.startswith("worker")]
        rest = [pid for pid, name in self.trace.places.items() if name == "host"]
        rest += [pid for pid, name in self.trace.places.items() if name == "scheduler"]
        self.legend()
        for pid in workers + rest:
            self.place(pid, self.trace.places[pid])
        self.arrows()
        self.axis()
        return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" height="{self.y}" '
                f'viewBox="0 0 {self.width} {self.y}" fill="{GREY}" '
                'font-family="DejaVu Sans,Verdana,sans-serif">\n'
                '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" '
                f'markerHeight="6" orient="auto"><path d="M0 0L8 4L0 8z" fill="{GREY}"/></marker>'
                "</defs>\n" + "\n".join(self.parts + self.over) + "\n</svg>")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("trace")
    parser.add_argument("--from", dest="begin", type=float, default=0, help="ms")
    parser.add_argument("--to", type=float, help="ms (default: the end)")
    parser.add_argument("--width", type=int, default=1000)
    o = parser.parse_args()
    with open(o.trace, encoding="utf-8") as file:
        text = file.read().rstrip().rstrip(",")
    trace = Trace(json.loads(text if text.endswith("]") else text + "]"))
    end = 1000 * o.to if o.to else trace.end
    if not 1000 * o.begin < end:
        sys.exit(f"{o.trace}: no time between {o.begin:g} and {end / 1000:g} ms")
    print(Picture(trace, 1000 * o.begin, end, o.width).draw())


if __name__ == "__main__":
    main()
