#!/bin/sh
# Fuzzes what reads bytes that others made: model files, text, JSON, request files. Each target runs
# for SECONDS (60), two at a time; needs clang with libFuzzer. What it finds stays in build/fuzz.
#     test/fuzz.sh [SECONDS]
# Seeds are files of this repository, in pieces small enough to be mutated.
seconds=${1:-60}
clang=$(command -v clang-14 || command -v clang) || {
    echo "fuzz.sh: needs clang"
    exit 1
}
folder=build/fuzz
mkdir -p $folder/model $folder/tokenizer $folder/json $folder/requests
for target in model tokenizer json requests; do
    "$clang" -std=gnu11 -g -O1 -march=native -I. -fsanitize=fuzzer,address,undefined \
        -fno-sanitize-recover=undefined -Wno-psabi -D_GNU_SOURCE test/fuzz_$target.c -lm -o $folder/fuzz_$target || exit 1
done
for file in test/data/*.gguf test/data/ref/*.gguf; do # their heads; the small ones whole
    head -c 60000 "$file" > "$folder/model/$(basename "$file")"
done
head -c 30000 model.bin > $folder/model/model.bin
sed -n 's/^text //p' test/data/splits.txt | head -60 | while read -r hex; do
    printf '%s' "$hex" | sed 's/../\\\\x&/g' | xargs -0 printf '%b' > "$folder/tokenizer/$(echo "$hex" | cksum | cut -c1-8)"
done
split -l 20 README.md $folder/tokenizer/readme-
printf '{"prompt":"a\\u00e9\\ud83e\\udd8a","n":3,"temperature":0.5,"stop":["x","yz"],"ids":[1,2]}\n' > $folder/json/one
printf '[1,-2.5e3,true,false,null,{"a":{"b":[[]]}}]' > $folder/json/two
cp $folder/json/one $folder/requests/one
printf 'Once upon a time\n\n{"ids":[1,2,3],"top_p":0.9,"seed":7}\r\n{"prompt":"x","stop":"end","id":"q"}\n' > $folder/requests/two
printf 'model.bin\n--devices\ncpu:4\n--kv-device\n8b\n--tp=2\n-n\n5\n' > $folder/requests/words
for word in GGUF general.architecture llama qwen2 qwen3 llama.block_count llama.embedding_length \
    llama.attention.head_count llama.context_length llama.feed_forward_length general.alignment \
    tokenizer.ggml.model gpt2 tokenizer.ggml.pre llama-bpe tokenizer.ggml.tokens tokenizer.ggml.scores \
    tokenizer.ggml.merges tokenizer.ggml.token_type tokenizer.chat_template token_embd.weight \
    output.weight blk.0.attn_q.weight split.count split.no split.tensors.count; do
    echo "\"$word\""
done > $folder/model.dict
printf '"prompt"\n"ids"\n"temperature"\n"top_p"\n"--kv-device"\n"--devices"\n"cpu:"\n"\\\\ud83e"\n' > $folder/text.dict

run() { # TARGET
    dictionary=$folder/text.dict
    [ "$1" = model ] && dictionary=$folder/model.dict
    ASAN_OPTIONS=allocator_may_return_null=1 $folder/fuzz_$1 -max_total_time="$seconds" -timeout=10 \
        -rss_limit_mb=2048 -max_len=65536 -dict=$dictionary -artifact_prefix=$folder/found-$1- \
        $folder/$1 > $folder/$1.log 2>&1 && echo "$1: $(grep -o 'Done [0-9]* runs.*' $folder/$1.log)"
}
status=0
for pair in "model tokenizer" "json requests"; do
    pids=""
    for target in $pair; do
        run $target &
        pids="$pids $!"
    done
    for pid in $pids; do
        wait "$pid" || status=1
    done
done
if [ $status -ne 0 ]; then
    grep -hE "ERROR|SUMMARY|runtime error|Test unit written" $folder/*.log | head -20
    echo "fuzz.sh: found something; see $folder"
fi
exit $status
