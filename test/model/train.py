"""Trains model.bin: a small Llama that writes short stories, on text from test/model/stories.py.

The model.bin at the top of the project was made on two shared cores (Zen 4, bfloat16 autocast) with

    pip install -r test/requirements.txt
    python3 test/model/train.py --minutes 25.2 --out 1.bin
    python3 test/model/train.py --minutes 18 --go-on-from 1.bin --story-seed 2 --out 2.bin
    python3 test/model/train.py --minutes 50 --go-on-from 2.bin --story-seed 3 --out 3.bin
    python3 test/model/train.py --minutes 42 --go-on-from 3.bin --story-seed 4 --out model.bin

each with stories that it had not seen. Of the first run: seed 20261123, 1770 steps of 8 x 512
tokens, held-out loss 0.4332 (fresh stories of another seed); of the third: 3472 steps, 0.3178; of
the last: 3124 steps, 12,795,904 tokens, training loss 0.2981 (mean of the last 50 steps), held-out
loss 0.2970. It carries a name and a kind of animal through most stories, but not through all.

The stop is by the clock, so the same seed gives the same weights only for the same number of steps.
"""
import argparse
import functools
import math
import os
import random
import struct
import sys
import time

import sentencepiece
import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from stories import Storyteller  # noqa: E402

SEED = 20261123
HELD_OUT_SEED = 7  # another storyteller: its stories are never trained on
UNKNOWN, BEGIN, END = 0, 1, 2  # token ids

# d_model and FFN are multiples of 64, and heads of 4, so that an engine can shard them evenly.
VOCABULARY = 1536
CONTEXT = 512
D_MODEL = 192
LAYERS = 4
HEADS = 4
HEAD_DIM = D_MODEL // HEADS
FFN = 448
ROPE_THETA = 10000.0
NORM_EPSILON = 1e-5

BATCH = 8
PEAK_RATE = 2e-3
WARMUP_STEPS = 60
TOKENIZER_STORIES = 20000

BEGINNINGS = [
    "Once upon a time", "One day, a little fox", "Lily was sad because", "The old robot", "My dog",
    "Tom and Mia went to the beach", "It was a rainy morning", "Deep in the forest",
    "In a small village", "Every morning, the baker", "The sun was shining", "Why was the dragon",
]


# ---------------------------------------------------------------------------------------------
# Text and tokens

def train_tokenizer(folder):
    """A SentencePiece BPE with byte fallback; newlines and rare characters become bytes."""
    teller = Storyteller(SEED)
    prefix = os.path.join(folder, "tokenizer")
    with open(prefix + ".txt", "w", encoding="utf-8") as file:
        for _ in range(TOKENIZER_STORIES):
            file.write(teller.story() + "\n")
        # Every printable ASCII character gets a token, so that any English prompt has one.
        file.write(" ".join(chr(code) for code in range(33, 127)) + "\n")
    sentencepiece.SentencePieceTrainer.train(
        input=prefix + ".txt", model_prefix=prefix, model_type="bpe", vocab_size=VOCABULARY,
        byte_fallback=True, character_coverage=1.0, normalization_rule_name="identity",
        remove_extra_whitespaces=False, unk_id=UNKNOWN, bos_id=BEGIN, eos_id=END, num_threads=1,
        shuffle_input_sentence=False, minloglevel=2)
    return sentencepiece.SentencePieceProcessor(model_file=prefix + ".model")


def batches(tokenizer, seed):
    """Endless (inputs, targets) of fresh stories; each story is seen once.

    Half of the rows begin at the beginning of a story, because prompts do; the others somewhere
    inside, so that every position of the context sees every part of a story."""
    teller = Storyteller(seed)
    rng = random.Random(seed)

    def row():
        ids = []
        skipped = rng.randrange(200) if rng.random() < 0.5 else 0
        while len(ids) < skipped + CONTEXT + 1:
            ids += [BEGIN] + tokenizer.encode(teller.story()) + [END]
        return ids[skipped:skipped + CONTEXT + 1]

    while True:
        rows = torch.tensor([row() for _ in range(BATCH)])
        yield rows[:, :-1], rows[:, 1:]


# ---------------------------------------------------------------------------------------------
# The model. Weights carry their GGUF names; matrices are (outputs, inputs).

def matrix_shapes():
    shapes = {"token_embd.weight": (VOCABULARY, D_MODEL)}
    for layer in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            shapes[f"blk.{layer}.{name}.weight"] = (D_MODEL, D_MODEL)
        shapes[f"blk.{layer}.ffn_gate.weight"] = (FFN, D_MODEL)
        shapes[f"blk.{layer}.ffn_up.weight"] = (FFN, D_MODEL)
        shapes[f"blk.{layer}.ffn_down.weight"] = (D_MODEL, FFN)
    return shapes


def norm_names():
    layers = [f"blk.{layer}.{name}.weight" for layer in range(LAYERS)
              for name in ("attn_norm", "ffn_norm")]
    return layers + ["output_norm.weight"]


def new_weights():
    """Normal(0, 0.02) matrices; those that write into the residual stream start smaller."""
    generator = torch.Generator().manual_seed(SEED)
    weights = {}
    for name, shape in matrix_shapes().items():
        into_residual = "attn_output" in name or "ffn_down" in name
        deviation = 0.02 / math.sqrt(2 * LAYERS) if into_residual else 0.02
        weights[name] = torch.randn(shape, generator=generator) * deviation
    for name in norm_names():
        weights[name] = torch.ones(D_MODEL)
    return {name: weight.requires_grad_() for name, weight in weights.items()}


@functools.lru_cache(maxsize=None)
def rope_tables():
    frequency = ROPE_THETA ** (-torch.arange(0, HEAD_DIM, 2).double() / HEAD_DIM)
    angle = torch.outer(torch.arange(CONTEXT).double(), frequency)
    return angle.cos().float(), angle.sin().float()


def rope(x, cosine, sine):
    """Rotates the pairs (2i, 2i+1) of x (batch, heads, time, head_dim), as `llama` files want."""
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1)
    return turned.flatten(-2)


def norm(x, weight):
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + NORM_EPSILON) * weight


def attention(x, weights, prefix, cosine, sine):
    batch, time_steps, _ = x.shape

    def heads(name):
        y = F.linear(x, weights[f"{prefix}.{name}.weight"])
        return y.view(batch, time_steps, HEADS, HEAD_DIM).transpose(1, 2)

    query, key = (rope(heads(name).float(), cosine, sine) for name in ("attn_q", "attn_k"))
    value = heads("attn_v")
    mixed = F.scaled_dot_product_attention(
        query.to(value.dtype), key.to(value.dtype), value, is_causal=True)
    mixed = mixed.transpose(1, 2).reshape(batch, time_steps, D_MODEL)
    return F.linear(mixed, weights[f"{prefix}.attn_output.weight"])


def forward(weights, ids):
    """Logits (batch, time, vocabulary) of token ids (batch, time)."""
    cosine, sine = (table[:ids.shape[1]] for table in rope_tables())
    x = F.embedding(ids, weights["token_embd.weight"])
    for layer in range(LAYERS):
        prefix = f"blk.{layer}"
        x = x + attention(norm(x, weights[f"{prefix}.attn_norm.weight"]), weights, prefix, cosine,
                          sine)
        y = norm(x, weights[f"{prefix}.ffn_norm.weight"])
        gate = F.silu(F.linear(y, weights[f"{prefix}.ffn_gate.weight"]))
        up = F.linear(y, weights[f"{prefix}.ffn_up.weight"])
        x = x + F.linear(gate * up, weights[f"{prefix}.ffn_down.weight"])
    return F.linear(norm(x, weights["output_norm.weight"]), weights["token_embd.weight"])


def loss_of(weights, inputs, targets):
    logits = forward(weights, inputs)
    return F.cross_entropy(logits.float().view(-1, VOCABULARY), targets.reshape(-1))


# ---------------------------------------------------------------------------------------------
# Training

def rate_at(step, fraction):
    """Linear warm-up by steps, then a cosine to zero by the fraction of time that has passed."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return PEAK_RATE * warmup * (1 - 0.5 * min(1.0, fraction))


def new_optimizer(weights):
    """AdamW; only matrices decay."""
    groups = [
        dict(params=[w for w in weights.values() if w.dim() == 2], weight_decay=0.1),
        dict(params=[w for w in weights.values() if w.dim() == 1], weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), fused=True)


def train(tokenizer, weights, minutes, seed, save):
    """Trains for some minutes of wall-clock time; save() is called every two minutes.

    Returns (steps, training loss over the last 50 steps)."""
    optimizer = new_optimizer(weights)
    stream = batches(tokenizer, seed)
    step_loss = torch.compile(loss_of)
    started = saved = time.time()
    recent = []
    step = 0
    while (fraction := (time.time() - started) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, fraction)
        inputs, targets = next(stream)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = step_loss(weights, inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent = recent[-49:] + [loss.item()]
        step += 1
        if step % 50 == 0:
            tokens, seconds = step * BATCH * CONTEXT / 1e6, time.time() - started
            print(f"step {step}, {tokens:.2f} M tokens, {seconds:.0f} s, "
                  f"loss {sum(recent) / len(recent):.4f}", flush=True)
        if time.time() - saved > 120:
            save()
            saved = time.time()
    return step, sum(recent) / len(recent)


@torch.no_grad()
def held_out_loss(tokenizer, weights, count=8):
    stream = batches(tokenizer, HELD_OUT_SEED)
    return sum(loss_of(weights, *next(stream)).item() for _ in range(count)) / count


def rounded(weights):
    """The weights as model.bin holds them: matrices in bfloat16 (nearest even), norms as is."""
    return {name: weight.detach().bfloat16().float() if weight.dim() == 2 else weight.detach()
            for name, weight in weights.items()}


# ---------------------------------------------------------------------------------------------
# GGUF (version 3): header, keys, tensor table, then the tensors, each aligned to 32 bytes

GGUF_U32, GGUF_I32, GGUF_F32, GGUF_BOOL, GGUF_STRING, GGUF_ARRAY = 4, 5, 6, 7, 8, 9
GGML_F32, GGML_BF16 = 0, 30
ALIGNMENT = 32
NORMAL_TOKEN, UNKNOWN_TOKEN, CONTROL_TOKEN, BYTE_TOKEN = 1, 2, 3, 6


def packed(kind, value):
    """The bytes of one GGUF value."""
    if kind == GGUF_STRING:
        data = value.encode("utf-8")
        return struct.pack("<Q", len(data)) + data
    if kind == GGUF_ARRAY:
        element_kind, elements = value
        head = struct.pack("<IQ", element_kind, len(elements))
        return head + b"".join(packed(element_kind, element) for element in elements)
    return struct.pack({GGUF_U32: "<I", GGUF_I32: "<i", GGUF_F32: "<f", GGUF_BOOL: "<?"}[kind],
                       value)


def token_type(tokenizer, token):
    if tokenizer.is_unknown(token):
        return UNKNOWN_TOKEN
    if tokenizer.is_control(token):
        return CONTROL_TOKEN
    return BYTE_TOKEN if tokenizer.is_byte(token) else NORMAL_TOKEN


def metadata(tokenizer):
    tokens = range(VOCABULARY)
    return [
        ("general.architecture", GGUF_STRING, "llama"),
        ("general.name", GGUF_STRING, "dynamo stories"),
        ("llama.context_length", GGUF_U32, CONTEXT),
        ("llama.embedding_length", GGUF_U32, D_MODEL),
        ("llama.block_count", GGUF_U32, LAYERS),
        ("llama.feed_forward_length", GGUF_U32, FFN),
        ("llama.attention.head_count", GGUF_U32, HEADS),
        ("llama.attention.head_count_kv", GGUF_U32, HEADS),
        ("llama.attention.layer_norm_rms_epsilon", GGUF_F32, NORM_EPSILON),
        ("llama.rope.dimension_count", GGUF_U32, HEAD_DIM),
        ("llama.rope.freq_base", GGUF_F32, ROPE_THETA),
        ("tokenizer.ggml.model", GGUF_STRING, "llama"),
        ("tokenizer.ggml.tokens", GGUF_ARRAY,
         (GGUF_STRING, [tokenizer.id_to_piece(token) for token in tokens])),
        ("tokenizer.ggml.scores", GGUF_ARRAY,
         (GGUF_F32, [tokenizer.get_score(token) for token in tokens])),
        ("tokenizer.ggml.token_type", GGUF_ARRAY,
         (GGUF_I32, [token_type(tokenizer, token) for token in tokens])),
        ("tokenizer.ggml.bos_token_id", GGUF_U32, BEGIN),
        ("tokenizer.ggml.eos_token_id", GGUF_U32, END),
        ("tokenizer.ggml.unknown_token_id", GGUF_U32, UNKNOWN),
        ("tokenizer.ggml.add_bos_token", GGUF_BOOL, True),
        ("tokenizer.ggml.add_eos_token", GGUF_BOOL, False),
        ("tokenizer.ggml.add_space_prefix", GGUF_BOOL, True),
    ]


def tensor_bytes(weight):
    """A matrix as bfloat16, a norm as float32, both little-endian."""
    weight = weight.detach().contiguous()
    if weight.dim() == 2:
        return weight.bfloat16().view(torch.int16).numpy().tobytes()
    return weight.numpy().tobytes()


def padding(length):
    return b"\0" * (-length % ALIGNMENT)


def write_gguf(path, tokenizer, weights):
    keys = metadata(tokenizer)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(weights), len(keys))
    for key, kind, value in keys:
        head += packed(GGUF_STRING, key) + struct.pack("<I", kind) + packed(kind, value)
    data = b""
    for name, weight in weights.items():
        shape = tuple(reversed(weight.shape))  # GGUF stores the fastest dimension first
        kind = GGML_BF16 if weight.dim() == 2 else GGML_F32
        head += packed(GGUF_STRING, name) + struct.pack(
            f"<I{len(shape)}QIQ", len(shape), *shape, kind, len(data))
        content = tensor_bytes(weight)
        data += content + padding(len(content))
    with open(path + ".new", "wb") as file:
        file.write(head + padding(len(head)) + data)
    os.replace(path + ".new", path)  # readers never see half a file


def read_gguf_weights(path):
    """The tensors of a GGUF of F32 and BF16, as float32."""
    import gguf  # only needed to go on from an earlier model, or to check one
    weights = {}
    for tensor in gguf.GGUFReader(path).tensors:
        data = torch.from_numpy(tensor.data.copy())
        if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
            data = data.view(torch.bfloat16).float()
        shape = [int(size) for size in reversed(tensor.shape)]  # GGUF: fastest first
        weights[tensor.name] = data.view(shape)
    return weights


# ---------------------------------------------------------------------------------------------
# Samples

@torch.no_grad()
def continuation(weights, prompt, count, temperature=0.0, generator=None):
    """The ids that follow the prompt's ids; always the most likely one at temperature 0."""
    ids = list(prompt)
    while len(ids) - len(prompt) < count and len(ids) < CONTEXT:
        logits = forward(weights, torch.tensor([ids]))[0, -1]
        if temperature == 0:
            token = int(logits.argmax())
        else:
            chances = torch.softmax(logits / temperature, -1)
            token = int(torch.multinomial(chances, 1, generator=generator))
        if token == END:
            break
        ids.append(token)
    return ids[len(prompt):]


def print_samples(tokenizer, weights, count=200):
    generator = torch.Generator().manual_seed(SEED)
    for beginning in BEGINNINGS:
        prompt = [BEGIN] + tokenizer.encode(beginning)
        for temperature in (0.0, 0.8):
            ids = continuation(weights, prompt, count, temperature, generator)
            text = tokenizer.decode(prompt + ids)
            print(f"--- {beginning} (temperature {temperature})\n{text}\n", flush=True)


def main():
    parser = argparse.ArgumentParser(description="Trains model.bin.")
    parser.add_argument("--minutes", type=float, default=50, help="wall-clock time to train for")
    parser.add_argument("--out", default="model.bin", help="the GGUF file to write")
    parser.add_argument("--work", default="train_work", help="folder for the tokenizer's files")
    parser.add_argument("--go-on-from", metavar="GGUF", help="start from this model's weights")
    parser.add_argument("--story-seed", type=int, default=SEED + 1,
                        help="seed of the stories; take a new one when you go on")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(SEED)
    os.makedirs(arguments.work, exist_ok=True)
    tokenizer = train_tokenizer(arguments.work)
    weights = new_weights()
    if arguments.go_on_from:
        for name, weight in read_gguf_weights(arguments.go_on_from).items():
            weights[name].data.copy_(weight)
    print(f"{sum(weight.numel() for weight in weights.values())} parameters")

    def save():
        write_gguf(arguments.out, tokenizer, weights)

    steps, training_loss = train(tokenizer, weights, arguments.minutes,
                                  arguments.story_seed, save)
    save()
    print(f"{steps} steps, {steps * BATCH * CONTEXT} tokens")
    print(f"training loss {training_loss:.4f} (mean of the last 50 steps)")
    print(f"held-out loss {held_out_loss(tokenizer, weights):.4f}")
    final = rounded(weights)
    print(f"held-out loss {held_out_loss(tokenizer, final):.4f} with bfloat16 weights")
    print(f"{arguments.out}: {os.path.getsize(arguments.out)} bytes")
    print_samples(tokenizer, final)


if __name__ == "__main__":
    main()
