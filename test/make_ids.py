"""Writes two small vocabularies and how other packages encode texts with them.

    python3 test/make_ids.py          # test/data/vocab-bytes.gguf, vocab-gemma.gguf, ids.txt
    python3 test/make_ids.py 20000 /tmp/many.txt               # ids of that many random texts

vocab-bytes: byte-level BPE that has no token for some bytes, and tokens of up to 512 spaces; ids are
those of tokenizers==0.23.3 with each pattern of make_splits.py. vocab-gemma: SentencePiece as Gemma
has it: no space before a text, byte fallback, line breaks and runs of spaces as tokens that were
defined; ids are those of sentencepiece==0.2.0. A line of ids.txt is `VOCABULARY PATTERN HEX IDS`.
"""
import io
import json
import random
import sys

import sentencepiece
from gguf import GGUFWriter
from make_splits import PATTERNS, POINTS, TEXTS
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers

FOLDER = "test/data/"
LOST = [0x03, 0x04, 0x7F, 0xC0, 0xC1, 0xF5, 0xFE, 0xFF, 0xA9]  # the last: of é, among others
WHOLE_WORDS = ("llama-bpe", "tekken")
NASTY = ["", "theÀ \x03 x y\x04", "é\u00e9 café the\x7fre", " " * 519 + "the", " " * 1030, "a" + " " * 257,
         "\n\n\n\nx\n\n", "\u2581\u2581x \u2581", "<0x41><s></s><bos><|endoftext|>", "\t\t  \t", "a\t\t\tb\u200dc\u200d", "\U0010ffff\ufffd"]


def write(path, model, tokens, types, scores=None, merges=None, **settings):
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    if merges:
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges(merges)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if scores:
        writer.add_token_scores(scores)
    for key, value in settings.items():
        getattr(writer, key)(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def byte_level():
    """The tokens, with their ids, and the merges."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trained.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(
        vocab_size=700, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    stand_in = {byte: sign for byte, sign in zip(
        list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256)) +
        [b for b in range(256) if not (33 <= b < 127 or 161 <= b < 173 or 174 <= b)],
        list(map(chr, range(33, 127))) + list(map(chr, range(161, 173))) +
        list(map(chr, range(174, 256))) + [chr(256 + i) for i in range(68)])}
    assert alphabet.pre_tokenize_str(" é\n")[0][0] == "".join(stand_in[b] for b in " é\n".encode())
    lost = {stand_in[byte] for byte in LOST}
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    space = stand_in[32]
    merges += [(space * (1 << i), space * (1 << i)) for i in range(9)]
    tab, joiner = stand_in[9], [stand_in[byte] for byte in "\u200d".encode()]
    merges += [(tab, tab), (joiner[0], joiner[1]), ("".join(joiner[:2]), joiner[2])]
    merges = [pair for i, pair in enumerate(merges)
              if not lost & set("".join(pair)) and pair not in merges[:i]]
    tokens = [stand_in[byte] for byte in range(256) if byte not in LOST]
    tokens += dict.fromkeys("".join(pair) for pair in merges)
    tokens += ["\u200d", "\t\t"]  # what no bytes spell, and a defined token: both mean what merges make, too
    return tokens, merges


def gemma():
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 3), model_writer=stream, model_type="bpe", vocab_size=1100,
        byte_fallback=True, add_dummy_prefix=False, remove_extra_whitespaces=False,
        normalization_rule_name="identity", character_coverage=0.98, pad_id=0, eos_id=1, bos_id=2,
        unk_id=3, pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>", hard_vocab_limit=False,
        user_defined_symbols=["<mask>"] + ["\n" * i for i in range(1, 9)] +
        ["\u2581" * i for i in range(2, 17)] + ["<table>", "<b>", "</s>"], minloglevel=2)
    return sentencepiece.SentencePieceProcessor(model_proto=stream.getvalue())


def main():
    source = random.Random(7)
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 12
    texts = NASTY + TEXTS + ["".join(source.choice(POINTS) for _ in range(source.randint(1, 24)))
                             for _ in range(count)]
    tokens, merges = byte_level()
    spm = gemma()
    n = spm.get_piece_size()
    if len(sys.argv) < 3:
        write(FOLDER + "vocab-bytes.gguf", "gpt2", tokens, [1] * (len(tokens) - 1) + [4],
              merges=[" ".join(pair) for pair in merges])
        types = [3 if spm.is_control(i) else 2 if spm.is_unknown(i) else 6 if spm.is_byte(i) else
                 4 if 4 <= i < 31 else 1 for i in range(n)]
        write(FOLDER + "vocab-gemma.gguf", "llama", [spm.id_to_piece(i) for i in range(n)], types,
              scores=[spm.get_score(i) for i in range(n)], add_bos_token_id=2, add_eos_token_id=1,
              add_add_space_prefix=False)
    out = open(sys.argv[2] if len(sys.argv) > 2 else FOLDER + "ids.txt", "w")
    for name, expressions in PATTERNS.items():
        encoder = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges,
                                       ignore_merges=name in WHOLE_WORDS))
        encoder.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(expression), "isolated") for expression in expressions] +
            [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        encoder.add_tokens([AddedToken(tokens[-1], normalized=False)])
        for text in texts:
            print("bytes", name, text.encode().hex() or "-",
                  ",".join(map(str, encoder.encode(text).ids)) or "-", file=out)
    for text in texts:
        print("gemma", "-", text.encode().hex() or "-", ",".join(map(str, spm.encode(text))) or "-",
              file=out)


if __name__ == "__main__":
    main()
