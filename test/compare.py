"""Measures dynamo beside llama.cpp on the same files, in turns, and prints the ratios.

    make && python3 test/compare.py                          # everything, about half an hour
    python3 test/compare.py --shapes stories-110m --types BF16 --parts decode,prefill -n 3

Files of random weights are made once in --work. Each figure is the median of n runs, and runs of
the two programs alternate, since the machine's bandwidth changes from minute to minute. Both use
the same number of threads; llama.cpp through its Python package, built from source for this
machine (pip install --no-binary llama-cpp-python). Its keys and values are f16, its default;
dynamo's are f32, its own (--kv-type bf16 is the nearer comparison).
  decode    one stream: 64 tokens after a prompt of 8
  prefill   a prompt of 512
  streams   8, 16, 32 streams at once: tokens a second while all decode
  requests  16 requests of 64 tokens in and 64 out, start to end, beside llama.cpp's decoding of
            the same batch without any server
  load      from the start of the program to its end after one token, with the file in the page
            cache; and the memory that is resident then, beside the file's size, with one device and
            with two (dynamo alone)
"""
import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time

import gguf
import llama_cpp
import numpy as np

SHAPES = {  # layers, d_model, heads, kv heads, d_ff
    "stories-15m": (6, 288, 6, 6, 768),
    "stories-110m": (12, 768, 12, 12, 2048),
    "tinyllama-1.1b": (22, 2048, 32, 4, 5632),
}
VOCAB = 32000


def make_file(path, shape, type_name):
    """A llama of random weights with a vocabulary of bytes and numbered pieces."""
    layers, d, heads, kv_heads, d_ff = SHAPES[shape]
    random = np.random.default_rng(1)
    kind = gguf.GGMLQuantizationType[type_name]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(2048)
    writer.add_embedding_length(d)
    writer.add_feed_forward_length(d_ff)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(d // heads)
    writer.add_vocab_size(VOCAB)
    pieces = ["<unk>", "<s>", "</s>"] + ["<0x%02X>" % i for i in range(256)]
    pieces += ["\u2581w%d" % i for i in range(VOCAB - len(pieces))]
    kinds = [2, 3, 3] + [6] * 256 + [1] * (VOCAB - 259)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(VOCAB - 259)])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def add(name, *extents):
        if len(extents) == 1:
            writer.add_tensor(name, np.ones(extents, np.float32))
            return
        values = random.standard_normal(extents, dtype=np.float32) / np.float32(extents[1] ** 0.5)
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", VOCAB, d)
    for i in range(layers):
        head = d // heads
        add(f"blk.{i}.attn_norm.weight", d)
        add(f"blk.{i}.attn_q.weight", d, d)
        add(f"blk.{i}.attn_k.weight", kv_heads * head, d)
        add(f"blk.{i}.attn_v.weight", kv_heads * head, d)
        add(f"blk.{i}.attn_output.weight", d, d)
        add(f"blk.{i}.ffn_norm.weight", d)
        add(f"blk.{i}.ffn_gate.weight", d_ff, d)
        add(f"blk.{i}.ffn_up.weight", d_ff, d)
        add(f"blk.{i}.ffn_down.weight", d, d_ff)
    add("output_norm.weight", d)
    if shape == "tinyllama-1.1b":
        add("output.weight", VOCAB, d)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def prompt(seed, count):
    random = np.random.default_rng(seed)
    return [1] + [int(i) for i in random.integers(300, VOCAB, count - 1)]


class LlamaCpp:
    def __init__(self, path, threads):
        llama_cpp.llama_log_set(self.quiet, None)
        parameters = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), parameters)
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = 32 * 256
        context.n_batch = context.n_ubatch = 2048
        context.n_seq_max = 32
        context.kv_unified = False
        context.n_threads = context.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        self.batch = llama_cpp.llama_batch_init(2048, 0, 1)
        one = llama_cpp.llama_context_default_params()  # long prompts want a context of one
        one.n_ctx = 1024
        one.n_batch = one.n_ubatch = 512
        one.n_threads = one.n_threads_batch = threads
        self.one = llama_cpp.llama_init_from_model(self.model, one)

    @llama_cpp.llama_log_callback
    def quiet(level, text, data):
        pass

    def step(self, rows, context):
        """rows: (token, position, sequence, whether its logits are wanted)"""
        for i, (token, position, sequence, wanted) in enumerate(rows):
            self.batch.token[i] = token
            self.batch.pos[i] = position
            self.batch.n_seq_id[i] = 1
            self.batch.seq_id[i][0] = sequence
            self.batch.logits[i] = wanted
        self.batch.n_tokens = len(rows)
        if llama_cpp.llama_decode(context, self.batch) != 0:
            sys.exit("llama.cpp refused a batch")
        logits = llama_cpp.llama_get_logits_ith(context, len(rows) - 1)
        return int(np.argmax(np.ctypeslib.as_array(logits, (VOCAB,))))

    def clear(self, context):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)

    def prefill(self, count):
        self.clear(self.one)
        ids = prompt(1, count)
        start = time.perf_counter()
        self.step([(t, i, 0, i == count - 1) for i, t in enumerate(ids)], self.one)
        return count / (time.perf_counter() - start)

    def streams(self, n, n_prompt, n_out, whole=False):
        context = self.one if n == 1 else self.context
        self.clear(context)
        start = time.perf_counter()
        rows = [(t, i, s, i == n_prompt - 1)
                for s in range(n) for i, t in enumerate(prompt(s + 1, n_prompt))]
        self.step(rows, context)
        if not whole:
            start = time.perf_counter()
        for i in range(n_prompt, n_prompt + n_out - 1):
            self.step([(300 + i + s, i, s, True) for s in range(n)], context)
        count = n_out if whole else n_out - 1
        return n * count / (time.perf_counter() - start)

    def close(self):
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_free(self.one)
        llama_cpp.llama_model_free(self.model)


class Dynamo:
    def __init__(self, path, options, work):
        self.path, self.options, self.file = path, options, os.path.join(work, "requests.jsonl")

    def run(self, n, n_prompt, n_out):
        with open(self.file, "w", encoding="utf-8") as file:
            for s in range(n):
                line = {"ids": prompt(s + 1, n_prompt), "n": n_out, "temperature": 0}
                file.write(json.dumps(line) + "\n")
        command = ["./dynamo", self.path, "-f", self.file, "--json", "--stats"] + self.options
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        answers = [json.loads(line) for line in lines.splitlines()]
        return answers[:-1], answers[-1]["stats"]

    def prefill(self, count):
        answers, _ = self.run(1, count, 1)
        return count / answers[0]["ttft_ms"] * 1e3

    def streams(self, n, n_prompt, n_out, whole=False):
        answers, stats = self.run(n, n_prompt, n_out)
        for answer in answers:
            if answer["completion_tokens"] != n_out:
                print("note: an answer ended early", file=sys.stderr)
        if whole:
            return stats["tokens_per_second"]
        return n / statistics.mean(a["itl_ms"] for a in answers) * 1e3


def resident(pid):
    """MiB of a process now; 0: it has ended."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii") as file:
            return sum(int(line.split()[1]) for line in file if line.startswith("VmRSS:")) / 1024
    except OSError:
        return 0


def load(name, path, n_runs, options):
    """Seconds to one token, and resident MiB beyond the file's size while more are written: keys
    and values, activations, the program."""
    for devices in ("cpu:1", "cpu:2"):
        command = ["./dynamo", path, "--ids", "1,300,301", "--devices", devices] + options
        subprocess.run(command + ["-n", "1"], check=True, capture_output=True)  # into the cache
        seconds, beyond = [], []
        for _ in range(n_runs):
            start = time.perf_counter()
            subprocess.run(command + ["-n", "1"], check=True, capture_output=True)
            seconds.append(time.perf_counter() - start)
            with subprocess.Popen(command + ["-n", "200"], stdout=subprocess.DEVNULL,
                                  stderr=subprocess.DEVNULL) as child:
                samples = []
                while child.poll() is None:
                    samples.append(resident(child.pid))
                    time.sleep(0.002)
            late = samples[len(samples) * 2 // 3:]  # loading is over
            beyond.append(statistics.median(late) - os.path.getsize(path) / 2**20)
        print(f"{name + ' load on ' + devices:42s} {statistics.median(seconds):5.2f} s for "
              f"{os.path.getsize(path) * 1e-9:.2f} GB; {statistics.median(beyond):.1f} MiB resident "
              "beyond the file's size", flush=True)


class Watch:
    """How much of the machine others used: llama.cpp's threads wait for each other by spinning, so
    a few percent of a core taken away can halve what it reaches."""
    ALLOWED, TRIES = 0.03, 10  # of all cores; of each run

    def __init__(self):
        self.n_disturbed = 0

    @staticmethod
    def now():
        with open("/proc/stat", encoding="ascii") as file:
            ticks = [int(i) for i in file.readline().split()[1:9]]
        user, nice, system, _, _, irq, softirq, steal = ticks
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter() * os.cpu_count(), busy - sum(os.times()[:4])

    def quiet(self, run):
        """What `run` returned, once nobody disturbed it; a run that ends disturbed is counted."""
        for _ in range(self.TRIES):
            start, before = self.now()
            result = run()
            end, after = self.now()
            if after - before <= self.ALLOWED * (end - start):
                return result
        self.n_disturbed += 1
        return result


def compare(name, n_runs, theirs, ours):
    watch = Watch()
    results = [(watch.quiet(theirs), watch.quiet(ours)) for _ in range(n_runs)]
    a = statistics.median(r[0] for r in results)
    b = statistics.median(r[1] for r in results)
    ratio = statistics.median(r[1] / r[0] for r in results)
    note = f"  ({watch.n_disturbed} runs disturbed)" if watch.n_disturbed else ""
    print(f"{name:42s} llama.cpp {a:8.1f}  dynamo {b:8.1f} tok/s  ratio {ratio:5.2f}{note}",
          flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", default="stories-110m,tinyllama-1.1b")
    parser.add_argument("--types", default="F32,BF16,Q8_0")
    parser.add_argument("--parts", default="decode,prefill,streams,requests,load")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--options", default="", help="more options for dynamo")
    parser.add_argument("--work", default="/tmp/compare")
    parser.add_argument("-n", type=int, default=7)
    o = parser.parse_args()
    os.makedirs(o.work, exist_ok=True)
    parts = o.parts.split(",")
    for shape in o.shapes.split(","):
        for kind in o.types.split(","):
            path = os.path.join(o.work, f"{shape}-{kind}.gguf")
            if not os.path.exists(path):
                make_file(path, shape, kind)
            if "load" in parts:
                load(f"{shape} {kind}", path, o.n, ["--threads", str(o.threads)])
            if parts == ["load"]:
                continue
            theirs = LlamaCpp(path, o.threads)
            ours = Dynamo(path, ["--threads", str(o.threads)] + o.options.split(), o.work)
            name = f"{shape} {kind}"
            if "decode" in parts:
                compare(f"{name} decode 1", o.n, lambda: theirs.streams(1, 8, 64),
                        lambda: ours.streams(1, 8, 64))
            if "prefill" in parts:
                compare(f"{name} prefill 512", o.n, lambda: theirs.prefill(512),
                        lambda: ours.prefill(512))
            for n in (8, 16, 32) if "streams" in parts else ():
                compare(f"{name} decode {n}", o.n, lambda n=n: theirs.streams(n, 8, 64),
                        lambda n=n: ours.streams(n, 8, 64))
            if "requests" in parts:
                compare(f"{name} 16 requests, 64 in, 64 out", o.n,
                        lambda: theirs.streams(16, 64, 64, True),
                        lambda: ours.streams(16, 64, 64, True))
            theirs.close()


if __name__ == "__main__":
    main()
