#!/bin/sh
# Fuzzes what reads bytes that others made: model files, text, JSON, request files, HTTP. Each target
# runs for SECONDS (60), two at a time; needs clang with libFuzzer. What it finds stays in build/fuzz.
#     test/fuzz.sh [SECONDS [TARGET...]]
# Seeds are whole models of 20 kB, texts and lines of this repository. A target that
# does not reach what it is about (fuzz.h) has failed: it fuzzed nothing.
clang=$(command -v clang-14 || command -v clang) || {
    echo "fuzz.sh: needs clang"
    exit 1
}
folder=build/fuzz

# One target, in a process of its own: built, and run.
fuzz() { # SECONDS TARGET
    # the products, which no target calls, are unchecked: with checks they take minutes to compile
    "$clang" -std=gnu11 -g -O1 -march=native -Wno-psabi -D_GNU_SOURCE -I. \
        -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined \
        -fsanitize-ignorelist=$folder/unchecked.txt "test/fuzz_$2.c" -lm -o "$folder/fuzz_$2" ||
        exit 255 # xargs stops
    dictionary=$folder/text.dict
    [ "$2" = model ] && dictionary=$folder/model.dict
    ASAN_OPTIONS=allocator_may_return_null=1 "$folder/fuzz_$2" \
        -max_total_time="$1" -timeout=10 -rss_limit_mb=2048 -max_len=65536 \
        -dict="$dictionary" -artifact_prefix="$folder/found-$2-" \
        "$folder/$2" > "$folder/$2.log" 2>&1 || return 1
    echo "$2: $(grep -o 'Done [0-9]* runs.*' "$folder/$2.log")," \
        "$(grep -o 'cov: [0-9]*' "$folder/$2.log" | tail -n 1), $(grep '^reached' "$folder/$2.log")"
}
[ "$1" = one ] && fuzz "$2" "$3" && exit
[ "$1" = one ] && exit 1

seconds=${1:-60}
[ $# -gt 0 ] && shift
targets=${*:-model http tokenizer json requests} # (what is longest to compile comes first)
mkdir -p $folder
printf 'fun:%s\n' '*tile*' 'dot_*' 'widen*' 'amx_*' panel_product > $folder/unchecked.txt
for target in $targets; do
    mkdir -p "$folder/$target"
done

# ---- seeds and dictionaries ----

seed() { # TARGET NAME FORMAT
    mkdir -p "$folder/$1"
    # shellcheck disable=SC2059 # escapes are meant
    printf "$3" > "$folder/$1/$2"
}
mkdir -p "$folder/model" "$folder/tokenizer"
"$clang" -std=gnu11 test/fuzz_seeds.c -o $folder/fuzz_seeds && $folder/fuzz_seeds $folder/model ||
    exit 1
sed -n 's/^text //p' test/data/splits.txt | head -60 | while read -r hex; do # (dash has no \x)
    name=$(echo "$hex" | cksum | cut -d' ' -f1)
    env printf '%b' "$(echo "$hex" | sed 's/../\\x&/g')" > "$folder/tokenizer/$name"
done
split -l 20 README.md $folder/tokenizer/readme-
one='{"prompt":"a\\u00e9\\ud83e\\udd8a","n":3,"temperature":0.5,"stop":["x","yz"],"ids":[1,2]}\n'
seed json one "$one"
seed json two '[1,-2.5e3,true,false,null,{"a":{"b":[[]]}}]'
seed requests one "$one"
seed requests two 'Once\n\n{"ids":[1,2],"top_p":0.9,"seed":7}\r\n{"prompt":"x","stop":"end","id":"q"}\n'
seed http one 'POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabcGET / HTTP/1.1\r\nHost: a\r\n\r\n'
seed http two 'POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nA: b\r\n\r\nGET / HTTP/1.0\r\n\r\n'
seed requests cancel '\357\273\277{"cancel":"q"}\n {"id":"q","prompt":"a",\n'
seed http chat '{"messages":[{"role":"developer","content":"s"},{"content":[{"type":"text","text":"a"},{"text":"b","type":"text"}],"role":"user"}],"n":2,"stop":["x"],"stream_options":{"include_usage":true}}'
seed http completion '{"prompt":["a",[1,2],"b"],"max_tokens":3,"tools":[],"top_k":-1,"stop":"x","logprobs":2,"seed":7}'
seed requests words 'model.bin\n--devices\ncpu:4\n--kv-device\n8b\n--tp=2\n-n\n5\n'
seed requests more 'm\n-f\nx\n--prefill\n0-1\n--decode\n2,3\n--kv-type\nbf16\n--kv-host\n1G\n--stop\ny\n'
for word in GGUF general.architecture llama qwen2 qwen3 llama.block_count llama.embedding_length \
    llama.attention.head_count llama.context_length llama.feed_forward_length general.alignment \
    llama.rope.scaling.type llama.attention.key_length tokenizer.ggml.model gpt2 gpt-2 gpt-4o \
    tokenizer.ggml.pre llama-bpe tokenizer.ggml.tokens tokenizer.ggml.scores output.weight \
    tokenizer.ggml.merges tokenizer.ggml.token_type tokenizer.chat_template token_embd.weight \
    blk.0.attn_q.weight blk.1.attn_q.weight rope_freqs.weight split.count split.no \
    split.tensors.count tokenizer.ggml.add_space_prefix tokenizer.ggml.add_bos_token; do
    printf '"%s"\n' "$word"
done > $folder/model.dict
for word in prompt ids temperature top_p top_k min_p seed stop system id n --kv-device --devices \
    Content-Length: Transfer-Encoding: chunked Host: Expect: 100-continue Connection: close \
    cancel cpu: --prefill --decode --tp --chunk '\\ud83e' '\\udd8a' 1e400 18446744073709551615; do
    printf '"%s"\n' "$word"
done > $folder/text.dict

# ---- runs ----

# shellcheck disable=SC2086 # targets are words
printf '%s\n' $targets | xargs -P 2 -I '{}' sh "$0" one "$seconds" '{}' && exit
grep -hE "ERROR|SUMMARY|runtime error|fuzz_.*: |Test unit written" $folder/*.log | head -20
echo "fuzz.sh: a target does not build, or has found something; see $folder"
exit 1
