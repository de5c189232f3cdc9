#!/usr/bin/env python3
"""Clients that others wrote, unchanged, against `--serve`: the openai package, curl, and a load
generator (guidellm) with 4 streams, whose figures are compared with the server's own.

    pip install openai==3.57.0 guidellm==0.8.1
    python3 test/clients.py [./dynamo]

Exit status 1: a client failed, or saw other numbers than the server. Part of no other test."""
import asyncio
import json
import os
import random
import re
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request

import openai

PROGRAM = sys.argv[1] if len(sys.argv) > 1 else "./dynamo"
STREAMS, REQUESTS, TOKENS = 4, 32, 64
wrong = 0


def check(good, what):
    global wrong
    wrong += not good
    print("  ok  " if good else "  FAIL", what, flush=True)


class Server:
    """The program at a port of its own, until the end of a `with`."""

    def __init__(self, *arguments):
        self.child = subprocess.Popen([PROGRAM, *arguments, "--serve", "0"], text=True,
                                      stderr=subprocess.PIPE)
        for line in self.child.stderr:
            found = re.search(r"at (http://.*)/v1", line)
            if found:
                self.url = found[1]
                return
        raise SystemExit("the server did not start")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.child.send_signal(signal.SIGTERM)
        check(self.child.wait() == 0, "it drains and ends with status 0")

    def metric(self, name):
        text = urllib.request.urlopen(self.url + "/metrics").read().decode()
        return float(re.search(rf"^vllm:{name}{{[^}}]*}} (.*)$", text, re.M)[1])


def package(server):
    """The openai package: whole answers, streams, errors, a stream that is left."""
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    model = client.models.list().data[0].id
    said = [{"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Once upon a time"}]}]
    whole = client.chat.completions.create(model=model, messages=said, max_tokens=20, seed=3,
                                           logprobs=True, top_logprobs=5)
    text = whole.choices[0].message.content
    check(text and whole.usage.completion_tokens == 20, "a whole answer, with its usage")
    shown = whole.choices[0].logprobs.content
    check(len(shown) == 20 and "".join(t.token for t in shown) == text, "log-probabilities")
    check(all(len(t.top_logprobs) == 5 and t.logprob <= 0 for t in shown), "the 5 likeliest of each")
    stream = client.chat.completions.create(model=model, messages=said, max_tokens=20, seed=3,
                                            stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    parts = [c.choices[0].delta.content for c in chunks if c.choices]
    check("".join(parts) == text and len(parts) == 20, "the same as a stream, a token a chunk")
    check(chunks[-1].usage.completion_tokens == 20, "the stream's usage")
    choices = client.completions.create(model=model, prompt=["One", "Two"], n=2, max_tokens=5)
    check([c.index for c in choices.choices] == [0, 1, 2, 3], "two answers to each of two prompts")
    legacy = client.completions.create(model=model, prompt="Once", max_tokens=9, logprobs=1).choices[0]
    places = list(zip(legacy.logprobs.text_offset, legacy.logprobs.tokens))
    check(len(places) == 9 and all(legacy.text[at:].startswith(token) for at, token in places),
          "each token's text is where its offset says")
    with client.chat.completions.with_streaming_response.create(
            model=model, messages=said, max_tokens=8, stream=True) as raw:
        check(raw.headers["content-type"].startswith("text/event-stream"), "a raw stream")
    for fields, error in (({"tools": [{"type": "function", "function": {"name": "f"}}]},
                           openai.BadRequestError),
                          ({"response_format": {"type": "json_object"}}, openai.BadRequestError),
                          ({"model": "other"}, openai.NotFoundError)):
        try:
            client.chat.completions.create(**{"model": model, "messages": said, **fields})
            check(False, f"{list(fields)} is refused")
        except error as refusal:
            check(refusal.param in fields, f"refused: {refusal.message[:70]}")
    stream = client.completions.create(model=model, prompt="Once", max_tokens=500, n=20, stream=True,
                                       extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    while sum(map(server.metric, ("num_requests_running", "num_requests_waiting",
                                  "kv_cache_usage_perc"))) > 0:  # (copies may be on their way)
        time.sleep(0.01)
    check(server.metric("kv_cache_usage_perc") == 0, "a stream that is left holds no blocks")


def curl(server):
    body = '{"prompt": "Once upon a time", "max_tokens": 9, "stream": true}'
    out = subprocess.run(["curl", "-sSN", server.url + "/v1/completions", "-d", body], text=True,
                         capture_output=True).stdout
    check(out.count('"text"') == 9 and out.endswith("data: [DONE]\n\n"), "curl reads a stream")
    out = subprocess.run(["curl", "-sS", "-H", "Transfer-Encoding: chunked", "-H",
                          "Expect: 100-continue", server.url + "/tokenize", "-d", body], text=True,
                         capture_output=True).stdout
    check(json.loads(out)["count"] == 7, "curl sends chunks, and asks before")


async def crowd(server, seconds):
    """64 that stream all the time, 500 that come and leave when they like: the texts stay the same,
    and nothing of them stays: no descriptor, block, nor memory."""
    port = int(server.url.rsplit(":", 1)[1])
    texts, counts = [set() for _ in range(8)], {"streams": 0, "visits": 0}
    end = time.monotonic() + seconds

    async def ask(i, leaves):
        body = json.dumps({"prompt": f"Once {i}", "seed": i, "max_tokens": 60, "stream": True})
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                     f"Content-Length: {len(body)}\r\n\r\n{body}"[:random.randrange(400) if leaves
                                                                  else None].encode())
        if leaves:
            await asyncio.sleep(random.random())
        else:
            text = (await reader.read()).decode()
            texts[i].add("".join(re.findall(r'"text":("[^"]*")', text)))
        writer.close()
        counts["visits" if leaves else "streams"] += 1

    async def stay(i, leaves):
        while time.monotonic() < end:
            await ask(i % 8, leaves)

    def state():
        status = open(f"/proc/{server.child.pid}/status").read()
        files = len(os.listdir(f"/proc/{server.child.pid}/fd"))
        return files, int(re.search(r"VmRSS:\s*(\d+)", status)[1])

    async def look():
        await asyncio.sleep(seconds / 2)
        return state()[1]

    files, _ = state()
    memory = (await asyncio.gather(look(), *(stay(i, i >= 64) for i in range(564))))[0]
    while server.metric("num_requests_running") + server.metric("num_requests_waiting") > 0:
        await asyncio.sleep(0.1)
    await asyncio.sleep(3)
    files_now, memory_now = state()
    check(all(len(t) == 1 for t in texts), f"{counts}: each text came out in one form, "
                                         f"of {[sorted(map(len, t)) for t in texts]} bytes")
    check(server.metric("kv_cache_usage_perc") == 0, "no block is held")
    check(files_now <= files, f"descriptors: {files} before, {files_now} after")
    check(memory_now < memory + 8192, f"memory: {memory} KiB after half of it, {memory_now} at the end")


def write_tokenizers(folder):
    """A tokenizer.bin of 32000 tokens, in which each character that is typed is a token, and the
    same for the load generator: both count alike, but for the token that begins a text."""
    from tokenizers import Tokenizer, decoders, models
    characters = [chr(c) for c in range(32, 127)] + ["\n"]
    pieces = ["<unk>", "\n<s>\n", "\n</s>\n"] + [f"<0x{i:02X}>" for i in range(256)] + characters
    pieces += [f"w{i}x" for i in range(len(pieces), 32000)]
    with open(f"{folder}/tokenizer.bin", "wb") as file:
        file.write(struct.pack("<I", max(len(p) for p in pieces)))
        for i, piece in enumerate(pieces):
            file.write(struct.pack("<fI", -i, len(piece)) + piece.encode())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(characters)}, merges=[],
                                     unk_token=" "))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(f"{folder}/tokenizer.json")
    for name, value in (("tokenizer_config", {"tokenizer_class": "PreTrainedTokenizerFast"}),
                        ("config", {"model_type": "llama"})):
        with open(f"{folder}/{name}.json", "w") as file:
            json.dump(value, file)


def medians(trace):
    """Of TTFT and of the mean ITL of each request, in ms, by the ends of the steps that it was in;
    of an even number the lower one, as guidellm takes it."""
    submitted, ends, tokens = {}, {}, {}
    for event in json.load(open(trace)):
        args = event.get("args", {})
        if event["name"] == "submitted":
            submitted[args["request"]] = event["ts"]
        elif event["name"] == "finished":
            tokens[args["request"]] = args["tokens"]
        for request in args.get("requests", ()):
            ends.setdefault(request, []).append(event["ts"] + event["dur"])
    first = {r: ends[r][-n] for r, n in tokens.items()}  # (before it: all but its last chunk)
    return (statistics.median_low(first[r] - submitted[r] for r in tokens) / 1e3,
            statistics.median_low((ends[r][-1] - first[r]) / (n - 1) for r, n in tokens.items()) / 1e3)


def load(folder):
    """A load generator, whose medians of TTFT and ITL are within 10 % or 5 ms of the server's."""
    with Server("random:stories-110m", "--tokenizer", f"{folder}/tokenizer.bin", "--trace",
                f"{folder}/trace.json") as server:
        command = ["guidellm", "run", "--backend",
                   f"kind=openai_http,target={server.url},request_format=/v1/completions",
                   "--profile", f"kind=concurrent,streams={STREAMS}",
                   "--constraint", f"kind=max_requests,count={REQUESTS}",
                   "--data", f"kind=synthetic_text,prompt_tokens={TOKENS},output_tokens={TOKENS}",
                   "--tokenizer", f"kind=hf_auto,model={folder}",
                   "--output", f"kind=json,path={folder}/report.json", "--disable-console"]
        ran = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, text=True,
                             capture_output=True)
        check(ran.returncode == 0, f"guidellm: {ran.stderr[-500:] if ran.returncode else 'ran'}")
        with open(f"{folder}/report.json") as file:
            metrics = json.load(file)["benchmarks"][0]["metrics"]
        totals = metrics["request_totals"]
        check(totals["successful"] == REQUESTS and totals["errored"] == 0, f"its requests: {totals}")
        tokens = server.metric("generation_tokens_total")
        told = metrics["output_token_count"]["successful"]["total_sum"]
        check(tokens == told == REQUESTS * TOKENS, f"tokens: {tokens:g} here, {told:g} there")
    for ours, key in zip(medians(f"{folder}/trace.json"),
                         ("time_to_first_token_ms", "inter_token_latency_ms")):
        theirs = metrics[key]["successful"]["median"]
        check(abs(theirs - ours) < max(5, 0.1 * ours),
              f"{key}: median {ours:.2f} here, {theirs:.2f} there")


def main():
    with Server("model.bin") as server:
        package(server)
        curl(server)
    with Server("model.bin", "--kv-device", "512b", "--kv-host", "512b") as server:
        asyncio.run(crowd(server, 60))  # (its pools are soon full)
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizers(folder)
        load(folder)
    print(f"{wrong} failed")
    return wrong > 0


sys.exit(main())
