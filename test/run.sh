#!/bin/sh
# Runs test programs one after another and adds up their counts. Last line: N passed, N failed.
passed=0
failed=0
for program in "$@"; do
    start=$(date +%s)
    echo "== $(basename "$program")"
    output=$("$program" 2>&1)
    status=$?
    echo "$output"
    echo "   $(($(date +%s) - start)) s"
    counts=$(echo "$output" | tail -n 1 | sed -n 's/^\([0-9]*\) passed, \([0-9]*\) failed$/\1 \2/p')
    if [ -n "$counts" ]; then
        passed=$((passed + ${counts% *}))
        failed=$((failed + ${counts#* }))
        if [ "$status" -ne 0 ] && [ "${counts#* }" -eq 0 ]; then
            echo "$program: exit status $status"
            failed=$((failed + 1))
        fi
    else
        echo "$program: ended without a result, exit status $status"
        failed=$((failed + 1))
    fi
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
