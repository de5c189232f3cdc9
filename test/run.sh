#!/bin/sh
# Runs test programs, two at a time, shows what each printed when it has ended, and adds up their
# counts. Last line: N passed, N failed. Give the longest first.
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export folder
# shellcheck disable=SC2016  # the inner shell expands these
printf '%s\n' "$@" | xargs -P 2 -I '{}' sh -c '
    name=$(basename "$1")
    start=$(date +%s)
    "$1" > "$folder/$name" 2>&1
    status=$?
    counts=$(tail -n 1 "$folder/$name" | sed -n "s/^\([0-9]*\) passed, \([0-9]*\) failed\$/\1 \2/p")
    if [ -z "$counts" ]; then
        echo "$1: ended without a result, exit status $status" >> "$folder/$name"
        counts="0 1"
    elif [ "$status" -ne 0 ] && [ "${counts#* }" -eq 0 ]; then
        echo "$1: exit status $status" >> "$folder/$name"
        counts="${counts% *} 1"
    fi
    echo "$counts" >> "$folder/counts"
    printf "== %s, %d s\n%s\n" "$name" $(($(date +%s) - start)) "$(cat "$folder/$name")"
' sh '{}'
awk '{ passed += $1; failed += $2 }
     END { print passed + 0 " passed, " failed + 0 " failed"; exit failed > 0 || !passed }' \
    "$folder/counts"
