#!/bin/sh
# Prints the lines of each file, comments included, and keeps the rules of the house. Exit status 1:
# one is broken. The numbers per file are to be seen, not kept: no file is split to meet one.
#
#   the spine      what a reader takes in one sitting: dynamo.h, the forward pass, scheduler.c,
#                  kvcache.c, and the product of generated rows with what it calls in kernels.cu
#   the product    all C and CUDA but test/ and the generated table lib/unicode.h
#   functions      at most 60 lines each, the forward pass 160 (product only)
#   columns        at most 100 (product and tests)
#   lib/           a header includes none from elsewhere, and compiles alone: as declarations, and
#                  with its implementation. gpu.h has the emulator of test/ in the place of CUDA
#   the top level  nothing but what stands below
cd "$(dirname "$0")/.." || exit 1
top="Makefile README.md LICENSE model.bin dynamo.h dynamo.c scheduler.c kvcache.c kernels.c kernels.cu
     lib app test"
broken=$(mktemp) || exit 1
trap 'rm -f "$broken"' EXIT

fail() { # RULE: each line of the input breaks it
    sed "s|^|FAIL  $1: |" >> "$broken"
}

files() { # those of the patterns that exist
    for file in "$@"; do [ ! -f "$file" ] || echo "$file"; done
}

# The functions of formatted code, one a line: FILE LINE LENGTH NAME. One begins with its signature
# (at column 0; it may span lines) and ends with `}` at column 0. CALLER: the name of one, for it and
# the device functions that it calls, directly or not; empty: all.
functions() { # CALLER FILE...
    caller=$1
    shift
    LC_ALL=C awk -v caller="$caller" '
        FNR == 1 { text = ""; inside = skip = 0 }
        inside && /^}/ { close_function() }
        inside { body[name] = body[name] " " $0; next }
        skip || /^#/ { skip = /\\$/; text = ""; next } # macros
        /^[A-Za-z_]/ || text != "" {
            if (text == "") { start = FNR }
            line = $0
            gsub(/\/\*[^*]*\*\//, "", line) # comments, whole ones first
            sub(/ *(\/[*\/].*)?$/, "", line)
            text = $0 == "" ? "" : text " " line
            if (text !~ /[;{}]$/) next
            t = text
            text = ""
            gsub(/template <[^>]*>/, "", t)
            while (gsub(/\([^()]*\)/, "@", t)) {} # what is in parentheses
            gsub(/__(launch_bounds|attribute)__@/, "", t)
            sub(/[{].*}$/, "{}", t)
            if (t ~ /=/ || !match(t, /[A-Za-z0-9_]+@[a-z ]*[{]}?$/)) next
            name = substr(t, RSTART, RLENGTH)
            sub(/@.*/, "", name)
            device = t ~ /DEVICE|__device__|__global__/
            inside = 1
            if (t ~ /}$/) close_function()
        }
        function close_function() {
            inside = 0
            n++
            list[n] = FILENAME " " start " " FNR - start + 1 " " name
            names[n] = name
            if (device) at[name] = at[name] " " n
        }
        function follow(which, text, token) { # marks what it calls
            if (which in seen) return
            seen[which]
            text = body[which]
            while (match(text, /[A-Za-z0-9_]+[<(]/)) {
                token = substr(text, RSTART, RLENGTH - 1)
                text = substr(text, RSTART + RLENGTH)
                if (token in at) follow(token)
            }
        }
        END {
            if (caller) follow(caller)
            for (i = 1; i <= n; i++) if (!caller || names[i] in seen) print list[i]
        }' "$@"
}

product=$(files *.[ch] *.cu lib/*.h app/*.h | grep -v '^lib/unicode.h$')
tests=$(files test/*.[ch] test/*.cu test/*.cpp)
group() { # TITLE FILE...
    printf '%s\n' "$1"
    shift
    wc -l "$@" | awk '$2 != "total" { print; n += $1 } END { printf "%7d\n", n }'
}
group "the top level" $(files Makefile README.md *.[ch] *.cu)
for room in lib app; do
    [ ! -d $room ] || group "$room/" $room/*
done
group "test/" $(files test/*.* test/model/*)

decode=$(functions generated_product_kernel kernels.cu | awk '{ n += $3 } END { print n + 0 }')
forward=$(functions "" dynamo.c | awk '$4 == "forward" { print $3 }')
[ "$decode" -gt 0 ] || echo "no generated_product_kernel in kernels.cu" | fail "the spine"
[ -n "$forward" ] || echo "no forward in dynamo.c" | fail "the spine"
spine=$(($(cat dynamo.h scheduler.c kvcache.c | wc -l) + ${forward:-0} + decode))
whole=$(cat $product | wc -l)
echo "the spine     $spine of  3230 (forward ${forward:-0}, the product of generated rows $decode)"
echo "the product  $whole of 24000"
[ "$spine" -le 3230 ] || echo "$spine lines" | fail "the spine"
[ "$whole" -le 24000 ] || echo "$whole lines" | fail "the product"
functions "" $product | awk '$3 > ($1 == "dynamo.c" && $4 == "forward" ? 160 : 60) {
    print $1 ":" $2 ": " $4 " has " $3 " lines" }' | fail functions
LC_ALL=C awk '{ gsub(/[\200-\277]/, "") } # of a letter of several bytes count one
    length($0) > 100 { print FILENAME ":" FNR ": " length($0) }' $product $tests | fail columns

grep -n '^ *# *include *"' lib/*.h | while IFS=: read -r file line include; do
    name=$(echo "$include" | cut -d '"' -f 2)
    case $name in
    */*) false ;;
    cuda_emu.h) [ "$file" = lib/gpu.h ] ;;
    *) [ -f "lib/$name" ] ;;
    esac || echo "$file:$line: it includes $name"
done | fail lib/

compiles() { # HEADER [FLAG]
    case $1 in
    lib/gpu.h) compiler="${CXX:-g++} -std=gnu++17 -x c++ -DCUDA_EMULATED -Itest" ;;
    *) compiler="${CC:-gcc} -std=gnu11 -x c" ;;
    esac
    if ! command -v ${compiler%% *} > /dev/null; then
        echo "${compiler%% *} is not here: $* is not compiled" >&2
        return
    fi
    errors=$($compiler -fsyntax-only -Wall -Wextra -Wshadow -Wconversion -Werror $2 "$1" 2>&1) ||
        { echo "$errors" | grep -w error || echo "$errors"; } | head -n 3 | fail "$* alone"
}
for header in $(files lib/*.h); do
    compiles "$header"
    macro=$(sed -n 's/^#ifdef \([A-Z0-9_]*_IMPLEMENTATION\)$/-D\1/p' "$header" | head -n 1)
    [ -z "$macro" ] || compiles "$header" "$macro"
done

{ git ls-files 2> /dev/null || ls; } | sed 's|/.*||' | sort -u |
    grep -vxE "\..*|dynamo|dynamo-emu|build$(printf '|%s' $top)" | fail "the top level"
cat "$broken"
[ ! -s "$broken" ]
