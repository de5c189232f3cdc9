"""Writes the small files in test/data/ref with which test/test_reference.c judges the engine.

For each model of MODELS: a tiny model is built with its original implementation in Hugging Face
`transformers` (no download: the weights are drawn here), written as a model file, and run on a
prompt of random tokens in float32 on the CPU with eager attention. The logits of every prompt
position are what the engine must reproduce from the model file.

    python3 -m pip install -r test/requirements.txt
    python3 test/make_reference.py            # writes into test/data/ref; half a minute
    python3 test/make_reference.py --out DIR  # into DIR, to compare

A second run gives the same bits. On another kind of CPU the model files and the index are still
the same; logits may differ in their last bits, where matrix products are summed in another order.

What is written:
    NAME.gguf     GGUF v3, in the names, layouts and types that llama.cpp's converter would use,
                  with no tokenizer: the engine is given token ids
    NAME.bin      for some of the F32 llama models the same weights as a llama2.c v0 checkpoint
    NAME.logits   float32 little-endian (n_tokens, vocab_size)
    index.txt     a line per model file: model file, logits file, tolerance, largest tensor
                  parallel width that its shape allows (1, 2 or 4), token ids

Rounded weights: a file of F16, BF16, Q8_0 or MXFP4 (of experts alone; the rest is BF16) holds rounded matrices, and the logits are computed
from those: rounded and decoded by the `gguf` package, then loaded back into the original
implementation. So the quantizer is no part of the comparison, and the tolerance is there for the
rounding of activations alone. Norms, biases, rope factors and the matrices that choose experts are
F32 in every file. Prompts of rounded models with experts are such that no choice is a close one: a
row that rounding sends to another expert is another row (clear_choices).

Random weights: uniform, so that every bit is an exact result of integer and IEEE arithmetic, and
scaled (SHARP and CALM) so that nothing is trivial: attention is peaked, yet no single position
takes all, logits spread by several units, norm weights lie around 1 but are not 1.
"""
import argparse
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from transformers import (Gemma3ForCausalLM, Gemma3TextConfig, GptOssConfig, GptOssForCausalLM,
                          LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM,
                          MixtralConfig, MixtralForCausalLM,
                          Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM,
                          Qwen3MoeConfig, Qwen3MoeForCausalLM)

N_LAYERS = 2
CONTEXT_LENGTH = 512
Q8_0_BLOCK = 32
CLEAR_MARGIN = 0.15  # of router logits, whose standard deviation is 1
LOCAL_THETA = 5000.0  # of gemma3's layers with a window

# Largest |difference| / largest |logit| that the engine may show.
TOLERANCES = {Type.F32: 1e-4, Type.F16: 8e-3, Type.BF16: 8e-3, Type.Q8_0: 2e-2,
              Type.MXFP4: 2e-2}

# What general.file_type says (llama.cpp's ftype numbers).
FILE_TYPES = {Type.F32: 0, Type.F16: 1, Type.Q8_0: 7, Type.BF16: 32, Type.MXFP4: 38}

CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen3moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "gpt-oss": (GptOssConfig, GptOssForCausalLM),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
}

# The names of a layer's modules: in transformers, in GGUF.
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.router": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "block_sparse_moe.experts.w1": "ffn_gate_exps",
    "block_sparse_moe.experts.w2": "ffn_down_exps",
    "block_sparse_moe.experts.w3": "ffn_up_exps",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}

# Where an architecture means something else by a name, or has one more.
OTHER_NAMES = {
    "gpt-oss": {"post_attention_layernorm": "post_attention_norm"},
    "gemma3": {"post_attention_layernorm": "post_attention_norm",
               "pre_feedforward_layernorm": "ffn_norm",
               "post_feedforward_layernorm": "post_ffw_norm"},
}


@dataclass(frozen=True)
class Reference:
    """One tiny model and its prompt's length."""
    name: str
    architecture: str
    type: Type
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    vocab_size: int
    n_tokens: int
    tied: bool
    theta: float
    epsilon: float
    rope_scaling: dict = None
    checkpoint: bool = False
    n_layers: int = N_LAYERS
    n_experts: int = 0
    n_used: int = 0
    norm_topk: bool = True
    window: int = None
    biases: bool = False
    query_scale: int = None
    calm: bool = False

    @property
    def widest_tp(self):
        """Shards take whole heads and KV heads. The products that they cut along K are summed in
        8 equal segments; a segment of Q8_0 is made of whole quantization blocks."""
        segment = 8 * (Q8_0_BLOCK if self.type == Type.Q8_0 else 1)
        if not self.n_experts and self.d_ff % segment or self.n_heads * self.head_dim % segment:
            return 1
        return max(tp for tp in (1, 2, 4) if self.n_heads % tp == 0 and self.n_kv_heads % tp == 0)


# The smallest original context puts the three kinds of frequency (kept, blended, divided by the
# factor) inside a prompt of 200 tokens.
LLAMA3_SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                  "high_freq_factor": 4.0, "original_max_position_embeddings": 64}

YARN = {"rope_type": "yarn", "factor": 8.0, "beta_fast": 4.0, "beta_slow": 0.05,
        "original_max_position_embeddings": 64}

MODELS = [
    # Widths that are no multiple of anything; untied.
    Reference("llama-mha-f32", "llama", Type.F32, d_model=40, n_heads=5, n_kv_heads=5, head_dim=8,
              d_ff=93, vocab_size=331, n_tokens=53, tied=False, theta=1e4, epsilon=1e-5,
              checkpoint=True),
    Reference("llama-tied-f32", "llama", Type.F32, d_model=32, n_heads=4, n_kv_heads=1, head_dim=8,
              d_ff=86, vocab_size=397, n_tokens=40, tied=True, theta=1e4, epsilon=1e-5,
              checkpoint=True),
    # Heads wider together than the model (key_length); segments of odd length: 104 / 8 = 13.
    Reference("llama-tp-f32", "llama", Type.F32, d_model=32, n_heads=16, n_kv_heads=4, head_dim=8,
              d_ff=104, vocab_size=331, n_tokens=48, tied=True, theta=5e5, epsilon=1e-3),
    # Llama 3.1's rope scaling over a long prompt.
    Reference("llama31-bf16", "llama", Type.BF16, d_model=64, n_heads=8, n_kv_heads=4, head_dim=16,
              d_ff=96, vocab_size=331, n_tokens=195, tied=True, theta=5e5, epsilon=1e-5,
              rope_scaling=LLAMA3_SCALING),
    Reference("llama-q8_0", "llama", Type.Q8_0, d_model=64, n_heads=4, n_kv_heads=2, head_dim=16,
              d_ff=96, vocab_size=331, n_tokens=34, tied=False, theta=1e4, epsilon=1e-5),
    # The head counts of Qwen2.5-0.5B: seven query heads share a KV head.
    Reference("qwen2-f16", "qwen2", Type.F16, d_model=112, n_heads=14, n_kv_heads=2, head_dim=8,
              d_ff=64, vocab_size=331, n_tokens=45, tied=True, theta=1e6, epsilon=1e-6),
    # (A window that its config has, and use_sliding_window switches off.)
    Reference("qwen2-q8_0", "qwen2", Type.Q8_0, d_model=64, n_heads=4, n_kv_heads=4, head_dim=16,
              d_ff=96, vocab_size=307, n_tokens=64, tied=False, theta=1e6, epsilon=1e-6, window=16),
    Reference("qwen3-f32", "qwen3", Type.F32, d_model=48, n_heads=4, n_kv_heads=1, head_dim=24,
              d_ff=100, vocab_size=331, n_tokens=50, tied=True, theta=1e6, epsilon=1e-6),
    Reference("qwen3-q8_0", "qwen3", Type.Q8_0, d_model=64, n_heads=16, n_kv_heads=4, head_dim=16,
              d_ff=256, vocab_size=397, n_tokens=41, tied=False, theta=1e6, epsilon=1e-6),
    # Experts whose rows begin inside a panel, and whose number no number of shards divides.
    Reference("qwen3moe-f32", "qwen3moe", Type.F32, d_model=32, n_heads=4, n_kv_heads=4,
              head_dim=16, d_ff=21, vocab_size=331, n_tokens=70, tied=False, theta=1e6,
              epsilon=1e-6, n_experts=11, n_used=3),
    Reference("qwen3moe-unnormed-f32", "qwen3moe", Type.F32, d_model=32, n_heads=4, n_kv_heads=2,
              head_dim=16, d_ff=40, vocab_size=331, n_tokens=40, tied=True, theta=1e6,
              epsilon=1e-6, n_experts=8, n_used=4, norm_topk=False),
    Reference("qwen3moe-q8_0", "qwen3moe", Type.Q8_0, d_model=64, n_heads=16, n_kv_heads=4,
              head_dim=16, d_ff=96, vocab_size=331, n_tokens=61, tied=False, theta=1e6,
              epsilon=1e-6, n_experts=16, n_used=4),
    # A window that ends inside a tile of 64 tokens, and YaRN whose ramp begins and ends between
    # two pairs.
    Reference("gpt-oss-f32", "gpt-oss", Type.F32, d_model=48, n_heads=8, n_kv_heads=4, head_dim=16,
              d_ff=50, vocab_size=331, n_tokens=195, tied=False, theta=1.5e5, epsilon=1e-5,
              rope_scaling=YARN | {"truncate": False}, n_experts=8, n_used=3, window=40),
    Reference("gpt-oss-mxfp4", "gpt-oss", Type.MXFP4, d_model=64, n_heads=8, n_kv_heads=4,
              head_dim=16, d_ff=96, vocab_size=331, n_tokens=150, tied=False, theta=1.5e5,
              epsilon=1e-5, rope_scaling=YARN | {"truncate": False}, n_experts=12, n_used=4,
              window=24),
    # Five layers with a window and a base of their own, one that sees all.
    Reference("gemma3-f32", "gemma3", Type.F32, d_model=40, n_heads=4, n_kv_heads=4, head_dim=16,
              d_ff=48, vocab_size=331, n_tokens=150, tied=True, theta=1e6, epsilon=1e-6,
              rope_scaling={"rope_type": "linear", "factor": 8.0}, n_layers=6, window=50),
    # Mistral; then each of rope's scalings, with all biases.
    Reference("llama-window-f32", "llama", Type.F32, d_model=32, n_heads=4, n_kv_heads=2,
              head_dim=8, d_ff=48, vocab_size=331, n_tokens=90, tied=False, theta=1e4,
              epsilon=1e-5, window=16),
    Reference("llama-linear-f32", "llama", Type.F32, d_model=32, n_heads=4, n_kv_heads=4,
              head_dim=8, d_ff=48, vocab_size=331, n_tokens=80, tied=False, theta=1e4,
              epsilon=1e-5, rope_scaling={"rope_type": "linear", "factor": 4.0}, biases=True),
    Reference("llama-yarn-f32", "llama", Type.F32, d_model=32, n_heads=4, n_kv_heads=2,
              head_dim=16, d_ff=48, vocab_size=331, n_tokens=120, tied=False, theta=1e4,
              epsilon=1e-5, rope_scaling=YARN | {"attention_factor": 0.9}),
    Reference("mixtral-bf16", "llama", Type.BF16, d_model=64, n_heads=4, n_kv_heads=2, head_dim=16,
              d_ff=80, vocab_size=331, n_tokens=50, tied=False, theta=1e6, epsilon=1e-5,
              n_experts=8, n_used=2),
    # As deep as the 27B, whose attention is scaled otherwise; and a window that hides nothing, whose
    # layers have their base all the same.
    Reference("gemma3-27b-f32", "gemma3", Type.F32, d_model=16, n_heads=2, n_kv_heads=1, head_dim=4,
              d_ff=8, vocab_size=53, n_tokens=30, tied=True, theta=1e6, epsilon=1e-6,
              rope_scaling={"rope_type": "linear", "factor": 8.0}, n_layers=62,
              window=CONTEXT_LENGTH, query_scale=8, calm=True),
]


def build(reference):
    """The original implementation of the model; its weights are still to be loaded."""
    make_config, make_model = CLASSES[reference.architecture]
    more = {}
    if reference.architecture == "llama" and reference.window:
        make_config, make_model = MistralConfig, MistralForCausalLM
    if reference.architecture == "llama" and reference.n_experts:
        make_config, make_model = MixtralConfig, MixtralForCausalLM
        more = dict(num_local_experts=reference.n_experts, num_experts_per_tok=reference.n_used)
    if reference.architecture == "llama" and reference.biases:
        more = dict(attention_bias=True, mlp_bias=True)
    if reference.architecture == "qwen3moe":
        more = dict(num_experts=reference.n_experts, num_experts_per_tok=reference.n_used,
                    moe_intermediate_size=reference.d_ff, norm_topk_prob=reference.norm_topk)
    if reference.architecture == "gpt-oss":
        more = dict(num_local_experts=reference.n_experts, num_experts_per_tok=reference.n_used)
    if reference.architecture == "gemma3":
        more = dict(rope_local_base_freq=LOCAL_THETA,
                    query_pre_attn_scalar=reference.query_scale or reference.head_dim)
    config = make_config(
        hidden_size=reference.d_model, intermediate_size=reference.d_ff,
        num_hidden_layers=reference.n_layers, num_attention_heads=reference.n_heads,
        num_key_value_heads=reference.n_kv_heads, head_dim=reference.head_dim,
        vocab_size=reference.vocab_size, max_position_embeddings=CONTEXT_LENGTH,
        rms_norm_eps=reference.epsilon, rope_theta=reference.theta,
        rope_scaling=reference.rope_scaling, sliding_window=reference.window,
        tie_word_embeddings=reference.tied, attn_implementation="eager",
        torch_dtype="float32", use_cache=False, **more)
    return make_model(config).eval()


@dataclass(frozen=True)
class Scale:
    """Standard deviations of the random weights, for matrices times the square root of their
    inputs: 1 gives outputs as large as the inputs."""
    query_key: float  # its square is the spread of attention scores
    residual: float  # what a layer adds
    embedding: float
    tied_embedding: float
    tied_output_norm: float  # makes up for the small embedding that is also the output matrix
    output: float = 2.0


# F32 leaves room for rounding, so layers do nearly all of the work, and the embedding is so small
# that the norm's epsilon shows. For the rounded types the rounding of activations (bf16, or int8
# in blocks of 32) must not be blown up by layers that are more sensitive than a trained model's:
# with these values it takes about half of the tolerance. (So, too, where many layers blow up what
# float32 rounds.)
SHARP = Scale(query_key=1.4, residual=1.0, embedding=0.05, tied_embedding=0.05,
              tied_output_norm=6.0)
CALM = Scale(query_key=1.0, residual=0.5, embedding=1.0, tied_embedding=0.3, tied_output_norm=1.0)


def draw_weight(random, reference, name, shape):
    """float32 `shape`: uniform, at the scale that the kind of tensor asks for."""
    scale = SHARP if reference.type == Type.F32 and not reference.calm else CALM
    if name.endswith("norm.weight"):
        middle = 1.0
        if ".q_norm" in name or ".k_norm" in name:
            middle = scale.query_key
        elif name == "model.norm.weight" and reference.tied:
            middle = scale.tied_output_norm
        less = 1.0 if reference.architecture == "gemma3" else 0.0  # its norms add 1
        return (middle * random.uniform(0.5, 1.5, shape) - less).astype(np.float32)
    deviation = 1.0
    if "embed_tokens" in name:
        deviation = scale.tied_embedding if reference.tied else scale.embedding
    elif not name.endswith("bias") and not name.endswith("sinks"):
        deviation = (2.0 if "experts" in name else 1.0) / np.sqrt(shape[-1])
    if "q_proj" in name or "k_proj" in name:
        deviation *= scale.query_key
    elif "o_proj" in name or "down_proj" in name:
        deviation *= scale.residual
    elif "lm_head" in name:
        deviation *= scale.output
    bound = deviation * np.sqrt(3.0)  # U(-bound, bound) has this standard deviation
    return random.uniform(-bound, bound, shape).astype(np.float32)


def tensor_shapes(reference, model):
    """{name in transformers: shape}, without a tied output matrix, and with the matrices of all
    experts as one: (experts, outputs, inputs), gate and up apart."""
    shapes = {}
    for name, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        if name == "lm_head.weight" and reference.tied:
            continue
        if reference.architecture != "gpt-oss" and ".experts." in name:
            layer, _, number, module = re.fullmatch(r"(.*)\.(experts)\.(\d+)\.(.*)", name).groups()
            shapes[f"{layer}.experts.{module}"] = (reference.n_experts, *shape)
        elif name.endswith("experts.gate_up_proj"):
            for part in ("gate", "up"):
                shapes[name.replace("gate_up_proj", f"{part}_proj.weight")] = (
                    shape[0], shape[2] // 2, shape[1])
        elif name.endswith("experts.gate_up_proj_bias"):
            for part in ("gate", "up"):
                shapes[name.replace("gate_up_proj_bias", f"{part}_proj.bias")] = (
                    shape[0], shape[1] // 2)
        elif name.endswith("experts.down_proj"):
            shapes[name + ".weight"] = (shape[0], shape[2], shape[1])
        elif name.endswith("experts.down_proj_bias"):
            shapes[name.replace("_bias", ".bias")] = shape
        else:
            shapes[name] = shape
    return shapes


def original_state(reference, weights):
    """The same weights in the names and layouts of transformers."""
    state = {}
    for name, weight in weights.items():
        if ".experts." not in name:
            state[name] = weight
        elif reference.architecture != "gpt-oss":
            for i, expert in enumerate(weight):
                state[name.replace("experts.", f"experts.{i}.")] = expert
        elif "gate_proj" in name:  # rows of gate and up in turn
            both = np.stack([weight, weights[name.replace("gate_proj", "up_proj")]], axis=2)
            both = both.reshape(weight.shape[0], 2 * weight.shape[1], *weight.shape[2:])
            if name.endswith("weight"):
                state[name.replace("gate_proj.weight", "gate_up_proj")] = both.swapaxes(1, 2)
            else:
                state[name.replace("gate_proj.bias", "gate_up_proj_bias")] = both
        elif "down_proj" in name and name.endswith("weight"):
            state[name.replace(".weight", "")] = weight.swapaxes(1, 2)
        elif "down_proj" in name:
            state[name.replace(".bias", "_bias")] = weight
    return {name: np.ascontiguousarray(weight) for name, weight in state.items()}


def draw_weights(reference, model, seed):
    """{name: float32 array} of tensor_shapes."""
    # RandomState's stream is frozen, whatever the version of numpy.
    random = np.random.RandomState(seed)
    weights = {}
    for name, shape in tensor_shapes(reference, model).items():
        weights[name] = draw_weight(random, reference, name, shape)
    return weights


def stored_type(name, weight, kind):
    """In which type a file of this type holds a tensor."""
    if weight.ndim == 1 or "bias" in name or ".gate.weight" in name or (
            "router" in name or "gate_inp" in name):
        return Type.F32
    if kind == Type.MXFP4:
        return kind if "exp" in name else Type.BF16
    return kind


def rounded(weights, kind):
    """The float32 weights that a file of this type holds: matrices rounded, vectors not."""
    return {name: gguf.quants.dequantize(gguf.quants.quantize(weight, stored), stored)
            for name, weight in weights.items() for stored in [stored_type(name, weight, kind)]}


def draw_prompt(reference, seed):
    """Token ids; the first and the last of the vocabulary are among them."""
    random = np.random.RandomState(seed)
    ids = random.randint(0, reference.vocab_size, reference.n_tokens)
    ids[[3, -2]] = [0, reference.vocab_size - 1]
    return ids


def load(model, weights, tied):
    state = {name: torch.from_numpy(weight) for name, weight in weights.items()}
    if tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)


def run(model, ids):
    """float32 (n_tokens, vocab_size): the logits of every position."""
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)[None]).logits[0]
    return logits.numpy().astype("<f4")


def clear_choices(reference, model, ids, seed):
    """The prompt, with tokens replaced where any layer's choice of experts is so close that rounded
    activations could change it, which would change all behind it."""
    margins = []

    def watch(router, inputs, _):
        bias = getattr(router, "bias", None)
        rows = inputs[0].reshape(-1, reference.d_model)
        best = torch.nn.functional.linear(rows, router.weight, bias).sort(descending=True)[0]
        margins.append((best[-1, reference.n_used - 1] - best[-1, reference.n_used]).item())

    hooks = [module.register_forward_hook(watch) for name, module in model.named_modules()
             if name.endswith((".gate", ".router"))]
    random = np.random.RandomState(seed)
    for i in range(len(ids)):
        while margins.clear() or run(model, ids[:i + 1]) is None or min(margins) < CLEAR_MARGIN:
            ids[i] = random.randint(0, reference.vocab_size)
    for hook in hooks:
        hook.remove()
    return ids


def gguf_name(reference, name):
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    if name == "lm_head.weight":
        return "output.weight"
    _, _, layer, module = name.split(".", 3)
    if module == "self_attn.sinks":
        return f"blk.{layer}.attn_sinks.weight"
    module, kind = module.rsplit(".", 1)
    names = LAYER_NAMES | OTHER_NAMES.get(reference.architecture, {})
    return f"blk.{layer}.{names[module]}.{kind}"


def adjacent_pairs(weight, n_heads):
    """Rope turns the pairs (i, i + head_dim / 2) in transformers, and the pairs (2i, 2i + 1) in
    llama files: reorders the rows of each head accordingly."""
    halves = weight.reshape(n_heads, 2, weight.shape[0] // n_heads // 2, -1)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def file_weights(reference, weights):
    """{GGUF name: float32 array}, in the order of rows that a file has."""
    stored = {}
    for name, weight in weights.items():
        if reference.architecture == "llama" and "q_proj" in name:
            weight = adjacent_pairs(weight, reference.n_heads)
        if reference.architecture == "llama" and "k_proj" in name:
            weight = adjacent_pairs(weight, reference.n_kv_heads)
        if reference.architecture == "gemma3" and name.endswith("norm.weight"):
            weight = weight + np.float32(1)
        stored[gguf_name(reference, name)] = weight
    return stored


def rope_divisors(reference, model):
    """float32 (head_dim / 2): what each unscaled frequency is divided by."""
    exponents = np.arange(0, reference.head_dim, 2) / reference.head_dim
    frequencies = reference.theta ** -exponents
    return (frequencies / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)


def write_gguf(path, reference, model, stored):
    writer = gguf.GGUFWriter(path, reference.architecture)
    writer.add_name(f"reference {reference.name}")
    writer.add_file_type(FILE_TYPES[reference.type])
    writer.add_context_length(CONTEXT_LENGTH)
    writer.add_embedding_length(reference.d_model)
    writer.add_block_count(reference.n_layers)
    writer.add_feed_forward_length(reference.d_ff)
    writer.add_head_count(reference.n_heads)
    writer.add_head_count_kv(reference.n_kv_heads)
    writer.add_layer_norm_rms_eps(reference.epsilon)
    writer.add_rope_freq_base(reference.theta)
    if reference.n_heads * reference.head_dim != reference.d_model:
        writer.add_key_length(reference.head_dim)
        writer.add_value_length(reference.head_dim)
    if reference.architecture == "llama":
        writer.add_vocab_size(reference.vocab_size)
        writer.add_rope_dimension_count(reference.head_dim)
    if reference.n_experts:
        writer.add_expert_count(reference.n_experts)
        writer.add_expert_used_count(reference.n_used)
        writer.add_expert_feed_forward_length(reference.d_ff)
        if not reference.norm_topk:
            writer.add_expert_weights_norm(False)
    if reference.window:
        writer.add_sliding_window(reference.window)
    if reference.architecture == "gemma3":
        writer.add_float32("gemma3.rope.freq_base_swa", LOCAL_THETA)
    scaling = reference.rope_scaling or {}
    if scaling.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", rope_divisors(reference, model))
    elif scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling["rope_type"]))
        writer.add_rope_scaling_factor(scaling["factor"])
    if scaling.get("rope_type") == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(scaling["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(scaling["beta_slow"])
        if "attention_factor" in scaling:
            writer.add_rope_scaling_yarn_attn_factor(scaling["attention_factor"])
    for name, weight in stored.items():
        kind = stored_type(name, weight, reference.type)
        writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_checkpoint(path, reference, stored):
    """The same model as a llama2.c v0 checkpoint."""
    vocab_size = reference.vocab_size if reference.tied else -reference.vocab_size
    header = struct.pack("<7i", reference.d_model, reference.d_ff, N_LAYERS, reference.n_heads,
                         reference.n_kv_heads, vocab_size, CONTEXT_LENGTH)
    # Nobody reads these any more; whoever does shall notice.
    obsolete_rope_tables = np.full((2, CONTEXT_LENGTH, reference.head_dim // 2), np.nan, "<f4")

    def all_layers(name):
        return [stored[f"blk.{layer}.{name}.weight"] for layer in range(N_LAYERS)]

    arrays = [stored["token_embd.weight"]]
    for name in ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm",
                 "ffn_gate", "ffn_down", "ffn_up"):
        arrays += all_layers(name)
    arrays += [stored["output_norm.weight"], obsolete_rope_tables]
    if not reference.tied:
        arrays.append(stored["output.weight"])
    path.write_bytes(header + b"".join(array.astype("<f4").tobytes() for array in arrays))


def make(reference, seed, folder):
    """Writes one model's files; returns its lines of the index."""
    model = build(reference)
    weights = rounded(draw_weights(reference, model, seed), reference.type)
    ids = draw_prompt(reference, seed + 1000)
    load(model, original_state(reference, weights), reference.tied)
    if reference.n_experts and reference.type != Type.F32:
        ids = clear_choices(reference, model, ids, seed + 2000)
    logits = run(model, ids)
    stored = file_weights(reference, weights)
    model_files = [f"{reference.name}.gguf"]
    write_gguf(folder / model_files[0], reference, model, stored)
    if reference.checkpoint:
        model_files.append(f"{reference.name}.bin")
        write_checkpoint(folder / model_files[1], reference, stored)
    (folder / f"{reference.name}.logits").write_bytes(logits.tobytes())
    print(f"{reference.name}: logits {logits.min():.1f} to {logits.max():.1f}, "
          f"standard deviation {logits.std():.1f}")
    id_list = ",".join(map(str, ids))
    return [f"{file} {reference.name}.logits {TOLERANCES[reference.type]:g} "
            f"{reference.widest_tp} {id_list}\n" for file in model_files]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data" / "ref")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # so that sums are taken in the same order each time
    index = []
    for seed, reference in enumerate(MODELS):
        index += make(reference, seed, folder)
    (folder / "index.txt").write_text("".join(index))


if __name__ == "__main__":
    main()
