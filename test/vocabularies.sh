#!/bin/sh
# Compares token ids with those that are published beside vocabularies: of each NAME.gguf in a folder
# that has NAME.gguf.inp (texts) and NAME.gguf.out (ids), as llama.cpp's models/ has them. Exit
# status 1: some differ.   test/vocabularies.sh FOLDER
status=0
for file in "$1"/*.gguf; do
    [ -f "$file.inp" ] && [ -f "$file.out" ] || continue
    if ./dynamo "$file" --tokenize "$file.inp" | sed 's/^ //' > /tmp/vocabularies.$$ &&
        sed 's/^ //' "$file.out" | cmp -s - /tmp/vocabularies.$$; then
        echo "same    $file"
    else
        echo "differ  $file"
        status=1
    fi
done
rm -f /tmp/vocabularies.$$
exit $status
