#!/bin/sh
# Runs test programs, two at a time, and adds up their counts. Shows when each begins and ends, and
# between these every line it prints, as it comes, behind the program's name. Last line: N passed,
# N failed. Give the longest first.
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export folder
# shellcheck disable=SC2016  # the inner shell expands these
printf '%s\n' "$@" | xargs -P 2 -I '{}' sh -c '
    name=$(basename "$1")
    start=$(date +%s)
    echo "== $name begins"
    { "$1" 2>&1; echo $? > "$folder/$name.status"; } | tee "$folder/$name" |
        while IFS= read -r line || [ -n "$line" ]; do
            printf "%s: %s\n" "$name" "$line"
        done
    status=$(cat "$folder/$name.status")
    counts=$(tail -n 1 "$folder/$name" | sed -n "s/^\([0-9]*\) passed, \([0-9]*\) failed\$/\1 \2/p")
    how="${counts% *} passed, ${counts#* } failed"
    if [ -z "$counts" ]; then
        counts="0 1"
        how="FAIL: ended without a result, exit status $status"
    elif [ "$status" -ne 0 ] && [ "${counts#* }" -eq 0 ]; then
        counts="${counts% *} 1"
        how="FAIL: exit status $status"
    fi
    echo "$counts" >> "$folder/counts"
    echo "== $name ends after $(($(date +%s) - start)) s: $how"
' sh '{}'
awk '{ passed += $1; failed += $2 }
     END { print passed + 0 " passed, " failed + 0 " failed"; exit failed > 0 || !passed }' \
    "$folder/counts"
