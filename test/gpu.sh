#!/bin/sh
# Everything that needs a GPU, in one command of at most eight minutes: no network, no model files.
#
#     test/gpu.sh                    all stages
#     test/gpu.sh build kernels      these alone, in this order
#
#   build      the program, the tests and the benchmark, for this machine's GPU
#   kernels    make gpu-test: every op against float64, then products and attention once more by the
#              portable twin of what Hopper alone can do (ARCH=sm_90)
#   sanitize   some of those tests under compute-sanitizer: memory, barriers, unwritten memory; races
#              of what has no ring
#   schedules  the same text in every schedule, on all GPUs; one stands for those that are not there
#   floors     what PyTorch reaches (test/floors.py)
#   bench      what the backend reaches, beside the floors (test/bench_cuda.cu)
#
# Each stage has a limit of time, and ends when the eight minutes do; one that fails does not keep
# the next from running. The log is ${OUT:-build/gpu}/log.txt, the benchmark's and PyTorch's figures
# stand beside it. The last lines are the figures and, for each stage, how it went. Exit status 1:
# something failed.
cd "$(dirname "$0")/.." || exit 1
out=${OUT:-build/gpu}
work=build/gpu
mkdir -p "$out" "$work"
log=$out/log.txt
results=$work/results.txt
: > "$log"
: > "$results"
end=$(($(date +%s) + 475))
kept=0 # seconds that later stages need
failed=0
PYTHONUNBUFFERED=1
export PYTHONUNBUFFERED

note() { # a line of the last table
    echo "$*" >> "$results"
}

say() {
    echo "$*" | tee -a "$log"
}

# run NAME SECONDS COMMAND...: output to the screen, the log and $work/NAME.txt; counts failures.
run() {
    name=$1
    limit=$2
    shift 2
    left=$((end - kept - $(date +%s)))
    if [ "$left" -lt 5 ]; then
        note "FAIL $name: no time was left"
        failed=$((failed + 1))
        return 1
    fi
    [ "$limit" -le "$left" ] || limit=$left
    say "==== $name (at most $limit s): $*"
    start=$(date +%s)
    {
        timeout -k 5 "$limit" "$@" 2>&1
        echo $? > "$work/status"
    } | tee "$work/$name.txt" | tee -a "$log"
    status=$(cat "$work/status")
    took=$(($(date +%s) - start))
    case $status in
    0) word="ok   $name" ;;
    124 | 137) word="FAIL $name: not done after $limit s" ;;
    *) word="FAIL $name: exit status $status" ;;
    esac
    last=$(grep -E '^[0-9]+ passed, [0-9]+ failed$' "$work/$name.txt" | tail -n 1)
    if grep -q '^0 passed, 0 failed$' "$work/$name.txt"; then
        word="FAIL $name: a test of some name is not there"
        status=1
    fi
    note "$word, $took s${last:+, $last}"
    [ "$status" -eq 0 ] || failed=$((failed + 1))
    return "$status"
}

# What is not there is said, and is no failure.
absent() {
    note "--   $*"
    say "==== $*"
}

build() {
    run build 180 make -k -j "$(nproc)" dynamo build/native/bench_cuda \
        build/native/test_cuda_gpu build/native/test_gpu_schedules
}

kernels() {
    run kernels 90 make gpu-test
    case $(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1) in
    9.0) run twin 90 sh -c '
        make ARCH=sm_90 VARIANT=twin CUDA= build/twin/test_cuda_gpu &&
            build/twin/test_cuda_gpu products && build/twin/test_cuda_gpu attention' ;;
    esac
}

sanitize() {
    tool=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2> /dev/null)
    tool=$(echo "$tool" | head -n 1)
    if [ -z "$tool" ]; then
        absent "sanitize: compute-sanitizer is not installed"
        return
    fi
    # (Of rings racecheck takes the lane that gives a stage back for its warp, behind a __syncwarp, to
    # speak for itself alone: it reports what the other 31 have read.)
    # shellcheck disable=SC2016
    for check in memcheck racecheck synccheck initcheck; do
        tests="weights products_bf16 products_q8_0 attention sampl"
        [ $check != racecheck ] || tests=weights
        run $check 40 sh -c '
            bad=0
            for test in $2; do
                "$0" --tool "$1" --error-exitcode 9 --print-limit 20 \
                    build/native/test_cuda_gpu $test 1234 || bad=9
            done
            exit $bad' "$tool" $check "$tests"
    done
}

schedules() {
    if [ ! -x build/native/test_gpu_schedules ]; then
        absent "schedules: build/native/test_gpu_schedules is not built"
        return
    fi
    GPUS=$(nvidia-smi -L | wc -l)
    export GPUS
    run schedules 150 build/native/test_gpu_schedules
}

floors() {
    python=$(command -v python3)
    if [ -z "$python" ] || ! "$python" -c 'import torch' 2> /dev/null; then
        absent "floors: no PyTorch, so nothing of it beside the figures"
        return
    fi
    run floors 75 "$python" test/floors.py "$work/floors"
    cp "$work/floors" "$out/floors.txt"
}

bench() {
    given=""
    [ ! -s "$work/floors" ] || given="floors=$work/floors"
    # shellcheck disable=SC2086
    run bench.8b 90 build/native/bench_cuda llama-3.1-8b:bf16 $given
    run bench.8b-q8_0 20 build/native/bench_cuda llama-3.1-8b:q8_0 decode
    run bench.8b-q4_0 20 build/native/bench_cuda llama-3.1-8b:q4_0 decode
    run bench.70b 45 build/native/bench_cuda llama-3.1-70b:q8_0 decode
}

# The figures of the benchmark: its summary, or as far as it came; of further models not the machine
# once more.
table() {
    for file in "$work"/bench.8b.txt "$work"/bench.8b-*.txt "$work"/bench.70b.txt; do
        [ -f "$file" ] || continue
        cp "$file" "$work/figures"
        grep -q '^== summary' "$file" && sed '1,/^== summary/d' "$file" > "$work/figures"
        case $file in
        */bench.8b.txt) cat "$work/figures" ;;
        *) grep -E 'load|decode' "$work/figures" ;;
        esac
    done | tee "$out/bench.txt"
    rm -f "$work/figures"
}

rm -f "$work"/bench.*.txt
say "$(date -u '+%F %T') $(nvidia-smi -L 2> /dev/null | head -n 1)"
stages=${*:-build kernels sanitize schedules floors bench}
for stage in $stages; do
    case " $stages " in
    *" bench "*) kept=$([ "$stage" = sanitize ] || [ "$stage" = schedules ] && echo 200 || echo 0) ;;
    esac
    case $stage in
    build | kernels | sanitize | schedules | floors | bench) $stage ;;
    *)
        echo "test/gpu.sh [build] [kernels] [sanitize] [schedules] [floors] [bench]"
        exit 2
        ;;
    esac
done
say "==== figures and results"
table
cat "$results"
cat "$out/bench.txt" "$results" >> "$log"
echo "$failed failed"
[ "$failed" -eq 0 ]
