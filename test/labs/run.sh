#!/bin/sh
# The labs: ten lines of a policy are yours, the load and the goal are here.
#
#     test/labs/run.sh 1        builds what you have changed, runs lab 1 (see 1-eviction.md), and the
#                               rules that every policy keeps. Exit status 1: not yet
#     test/labs/run.sh check    that the labs are sound, on a copy of the sources: the code as it
#                               stands misses each goal, solutions/ reaches it and keeps the rules
#
# Neither needs a GPU or a model: the loads run in virtual time, a second each.
cd "$(dirname "$0")/../.." || exit 1
labs="1 2 3"
program=build/native/dynamo

build() {
    log=$(make -j2 NVCC= $program build/native/test_kvcache build/native/test_scheduler 2>&1)
    built=$?
    echo "$log" | grep -E -A 3 'warning: |error: |\*\*\*'
    return $built
}

# Tests that say what the stock policy chooses, which is what a lab changes. All others hold for any.
says_stock() { # LAB
    case $1 in
    1) echo tail_goes_first least_recently_used_goes_first page_out_and_in orders_differ kept_blocks \
        full_host_loses_the_coldest host_learns_what_was_used coldest_go_clean_or_dirty ;;
    2) echo equal_workers_take_turns paced_load_is_spread where_prompts_are_computed ;;
    3) echo a_chunk_is_shared first_tokens_wait_for_no_slot ;;
    esac
}

# Runs the tests of both files, random operations among them, with all invariants counted anew.
rules() { # LAB
    broken=""
    for test in test_kvcache test_scheduler; do
        output=$(build/native/$test 2>&1)
        echo "$output" | grep -qE '^[0-9]+ passed, [0-9]+ failed$' ||
            broken="$broken $test:$(echo "$output" | tail -n 1)"
        for name in $(echo "$output" | sed -n 's/^  FAIL \([a-z_]*\).*/\1/p'); do
            case " $(says_stock "$1") " in
            *" $name "*) ;;
            *) broken="$broken $name" ;;
            esac
        done
    done
    [ -z "$broken" ] && echo "every rule is kept" && return
    echo "a rule is broken:$broken"
    return 1
}

lab() { # LAB: both, whatever the first says
    python3 test/labs/lab.py run "$1" $program && reached=0 || reached=1
    rules "$1" && return $reached
}

# One line for each thing that must hold. It counts in `passed` and `failed`.
must() { # WHAT COMMAND...
    what=$1
    shift
    if output=$("$@" 2>&1); then
        held=yes
        passed=$((passed + 1))
        echo "  ok   $what"
    else
        held=
        failed=$((failed + 1))
        echo "  FAIL $what"
    fi
    [ -z "$output" ] || echo "$output" | sed 's/^/       /'
    [ "$held" ]
}

misses() { # LAB: it runs, but not well enough
    python3 test/labs/lab.py run "$1" $program
    [ $? -eq 3 ]
}

solve() { # LAB, in the copy, which is as before after `solve LAB -R`
    patch -p1 -s -f $2 --no-backup-if-mismatch < "test/labs/solutions/$1.patch" ||
        { echo "solutions/$1.patch no longer applies"; return 1; }
}

check() {
    copy=$(mktemp -d)
    trap 'rm -rf "$copy"' EXIT
    mkdir -p "$copy/build" "$copy/test"
    cp -a Makefile ./*.c ./*.h app lib "$copy" && cp -a test/*.c test/*.h test/labs "$copy/test"
    [ ! -d build/native ] || cp -a build/native "$copy/build" # only what differs is built anew
    cd "$copy" || exit 1
    passed=0
    failed=0
    must "the sources build" build
    for lab in $labs; do
        must "lab $lab: as it stands, the goal is missed" misses "$lab"
        must "lab $lab: the page's figures are true" python3 test/labs/lab.py stock "$lab" $program
    done
    for lab in $labs; do
        must "lab $lab: the solution applies" solve "$lab" "" || continue
        must "lab $lab: it builds" build
        must "lab $lab: it reaches the goal and keeps the rules" lab "$lab"
        must "lab $lab: it comes off again" solve "$lab" -R
    done
    echo "$passed passed, $failed failed"
    [ "$failed" -eq 0 ]
}

case $1 in
check) check ;;
[123]) build && lab "$1" ;;
*)
    sed -n '2,9s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
