"""Writes test/data/types.bin, with which test/test_kernels.c checks how blocks of types that no
kernel multiplies are read, and measures what keeping them as Q8_0 loses.

    python3 -m pip install -r test/requirements.txt
    python3 test/make_types.py            # writes the file; the same bytes each time
    python3 test/make_types.py --loss     # prints the table below

For each type: uint32 type, uint32 number of weights, blocks of random bits with sane scales, and
the weights as the `gguf` package decodes them, float32.

The table: the error of a product with 4,096 normally distributed weights a row, each row against
the exact one, root mean square over 1,024 rows, relative to the product; of weights in the type
itself, and of the same weights once they are kept as Q8_0 or as F16. The quantizer is a plain one
(parts from their least to their largest weight, scales of blocks of 256 in whole numbers): better
ones have a smaller error of their own, a tenth or so, and the same is added to it.
"""
import argparse
import struct
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

N_WEIGHTS = 1024  # of each type

# Where a block has its f16 scales.
SCALES = {Type.Q4_1: (0, 2), Type.Q5_0: (0,), Type.Q5_1: (0, 2), Type.Q2_K: (80, 82),
          Type.Q3_K: (108,), Type.Q5_K: (0, 2), Type.IQ4_NL: (0,), Type.IQ4_XS: (0,)}


def write(path):
    random = np.random.Generator(np.random.PCG64(1))
    with open(path, "wb") as file:
        for kind, places in SCALES.items():
            elements, size = gguf.GGML_QUANT_SIZES[kind]
            blocks = random.integers(0, 256, (N_WEIGHTS // elements, size), dtype=np.uint8)
            for place in places:
                scales = random.uniform(-0.02, 0.02, len(blocks)).astype(np.float16)
                scales[0] = 0.0  # a block of zeros, but for its offset
                scales[1] = 3e-6  # less than the least normal number
                blocks[:, place:place + 2] = scales.view(np.uint8).reshape(-1, 2)
            file.write(struct.pack("<II", kind, N_WEIGHTS) + blocks.tobytes())
            file.write(gguf.quants.dequantize(blocks, kind).astype("<f4").tobytes())


def step(values, levels):
    """Rounded to whole multiples, 0 to `levels`, of a scale that each last axis has, in f16."""
    scale = (values.max(axis=-1, keepdims=True) / levels).astype(np.float16).astype(np.float64)
    return scale * np.round(values / np.where(scale > 0, scale, 1)).clip(0, levels)


def quantized(weights, part, bits, offset, levels):
    """levels: of the scales of a block of 256, or 0: each part has an f16 of its own."""
    w = weights.reshape(-1, part)
    top = 2 ** bits - 1
    if offset:
        least = np.maximum(-w.min(axis=1), 0)
        scale = (w.max(axis=1) + least) / top
    else:  # numbers from -2^(bits - 1) on; the sign is such that the largest weight has that
        least = np.zeros(len(w))
        scale = np.abs(w).max(axis=1) / 2 ** (bits - 1)
    if levels:
        scale, least = (step(x.reshape(-1, 256 // part), levels).reshape(-1)
                        for x in (scale, least))
    scale, least = (x.astype(np.float16).astype(np.float64)[:, None] if not levels else x[:, None]
                    for x in (scale, least))
    low, high = (0, top) if offset else (-2 ** (bits - 1), 2 ** (bits - 1) - 1)
    numbers = np.round((w + least) / np.where(scale > 0, scale, 1)).clip(low, high)
    return (scale * numbers - least).reshape(weights.shape)


def as_q8_0(weights):
    w = weights.reshape(-1, 32)
    scale = (np.abs(w).max(axis=1, keepdims=True) / 127).astype(np.float16).astype(np.float64)
    return (scale * np.round(w / scale).clip(-127, 127)).reshape(weights.shape)


def loss():
    random = np.random.Generator(np.random.PCG64(2))
    weights, x = random.standard_normal((1024, 4096)) * 0.02, random.standard_normal(4096)
    exact = weights @ x

    def error(w):
        return np.sqrt(np.mean((w @ x - exact) ** 2) / np.mean(exact ** 2))

    print("type   own error   kept as Q8_0   kept as F16")
    for name, shape in {"Q4_1": (32, 4, True, 0), "Q5_1": (32, 5, True, 0),
                        "Q5_K": (32, 5, True, 63), "Q2_K": (16, 2, True, 15),
                        "Q3_K": (16, 3, False, 31)}.items():
        w = quantized(weights, *shape)
        own, q8, f16 = error(w), error(as_q8_0(w)), error(w.astype(np.float16).astype(np.float64))
        print(f"{name}   {own:9.5f}   {q8:.5f} ({q8 / own - 1:+.2%})   "
              f"{f16:.5f} ({f16 / own - 1:+.2%})")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--loss", action="store_true")
    parser.add_argument("--out", default=Path(__file__).parent / "data" / "types.bin")
    arguments = parser.parse_args()
    if arguments.loss:
        loss()
    else:
        write(arguments.out)


if __name__ == "__main__":
    main()
