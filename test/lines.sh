#!/bin/sh
# Lines of each file against its budget, and the longest function. Exit status 1: over budget.
# Budgets count comments. The longest function is measured on formatted code, where a function
# begins with an unindented line that ends in `{` and ends with an unindented `}`.
over=0
total=0
longest() {
    awk '/^[a-z].*\) \{$/ || /^        *.*\) \{$/ && !open { if (!open) { open = 1; start = FNR; name = $0 } }
         /^\}/ { if (open && FNR - start + 1 > best) { best = FNR - start + 1; which = name } open = 0 }
         END { sub(/\(.*/, "", which); sub(/.*[ *]/, "", which); print best + 0, which }' "$1"
}
check() {
    file=$1
    budget=$2
    function_budget=${3:-60}
    [ -f "$file" ] || return
    n=$(wc -l < "$file")
    found=$(longest "$file")
    wide=$(awk 'length($0) > 100' "$file" | wc -l)
    mark=""
    if [ "$n" -gt "$budget" ] || [ "${found% *}" -gt "$function_budget" ] || [ "$wide" -gt 0 ]; then
        mark="  OVER"
        over=1
    fi
    printf '%-16s %5d of %5d   longest function %3d  %s%s\n' "$file" "$n" "$budget" $found "$mark"
}
