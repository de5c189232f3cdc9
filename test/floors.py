"""What PyTorch reaches on this GPU, for the column in brackets of test/bench_cuda.cu.

    python3 test/floors.py FILE        writes lines `NAME[.ROWS] VALUE`

`mm` is the rate of an 8192 x 8192 x 8192 product in bf16, in TFLOP/s; all others are microseconds:
the products of a layer of Llama-3.1-8B, and its attention, for 1, 8 and 64 generated rows with a
context of 1024, and for prompts of 2048 and 8192 tokens. As in the benchmark: medians of recorded
graphs, over more weights than the caches hold, on random data. Without PyTorch, or without a GPU,
it says so, and FILE is empty."""

import math
import statistics
import sys

PRODUCTS = {  # outputs, columns
    "qkv": (6144, 4096),
    "attn_output": (4096, 4096),
    "gate_up": (28672, 4096),
    "ffn_down": (4096, 14336),
    "logits": (128256, 4096),
}
HEADS, KV_HEADS, HEAD_DIM, CONTEXT = 32, 8, 128, 1024
BEYOND_CACHES = 400_000_000  # bytes


def microseconds(torch, act, inputs):
    """Of one call; all inputs in turn are one graph."""
    act(*inputs[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for each in inputs:
            act(*each)
    for _ in range(2):
        graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(12)]
    for event in events:
        event.record()
        graph.replay()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in zip(events, events[1:])]
    return 1000 * statistics.median(times) / len(inputs)


def copies(*shapes):
    """So many sets of tensors of these shapes that no cache holds them."""
    return max(1, math.ceil(BEYOND_CACHES / sum(2 * math.prod(shape) for shape in shapes)))


def random(torch, *shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def time_product(torch, rows, outputs, columns):
    x = random(torch, rows, columns)
    n = copies((outputs, columns))
    weights = [random(torch, outputs, columns) for _ in range(n)]
    return microseconds(torch, lambda w: torch.mm(x, w.t()), [(w,) for w in weights])


def time_decode(torch, streams):
    attend = torch.nn.functional.scaled_dot_product_attention
    kv = (streams, KV_HEADS, CONTEXT + 1, HEAD_DIM)
    q = random(torch, streams, HEADS, 1, HEAD_DIM)
    inputs = [(random(torch, *kv), random(torch, *kv)) for _ in range(copies(kv, kv))]
    return microseconds(torch, lambda k, v: attend(q, k, v, enable_gqa=True), inputs)


def time_prompt(torch, tokens):
    attend = torch.nn.functional.scaled_dot_product_attention
    q, k, v = (random(torch, 1, HEADS, tokens, HEAD_DIM) for _ in range(3))
    return microseconds(torch, lambda: attend(q, k, v, is_causal=True), [()] * 4)


def main():
    out = open(sys.argv[1], "w")
    try:
        import torch
    except ImportError:
        print("floors: no PyTorch here")
        return
    if not torch.cuda.is_available():
        print("floors: PyTorch", torch.__version__, "sees no GPU")
        return
    print("floors: PyTorch", torch.__version__, "on", torch.cuda.get_device_name())

    def measure(name, act, *arguments):
        try:
            value = act(torch, *arguments)
        except (RuntimeError, TypeError) as error:
            print("floors:", name, "not measured:", str(error).splitlines()[0])
            return
        torch.cuda.empty_cache()
        print(name, f"{value:.2f}")
        print(name, f"{value:.4f}", file=out, flush=True)

    measure("mm", lambda *_: 2 * 8192**3 / time_product(torch, 8192, 8192, 8192) * 1e-6)
    for name, (outputs, columns) in PRODUCTS.items():
        for rows in (1, 8, 64, 2048)[: 3 if name == "logits" else 4]:
            measure(f"{name}.{rows}", time_product, rows, outputs, columns)
    for streams in (1, 8, 64):
        measure(f"attention.{streams}", time_decode, streams)
    for tokens in (2048, 8192):
        measure(f"attention.{tokens}", time_prompt, tokens)


if __name__ == "__main__":
    main()
