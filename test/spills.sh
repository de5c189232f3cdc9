#!/bin/sh
# What the assembler of CUDA says of the hot kernels: none may keep values in memory that it has no
# register for, nor have a stack. Reads the report that the build leaves beside kernels.cuda.o (see
# the Makefile), or the file given. Last line: N passed, N failed, as test/run.sh wants it.
#
#     test/spills.sh [build/native/kernels.cuda.txt]
report=${1:-build/native/kernels.cuda.txt}
if [ ! -f "$report" ]; then
    echo "  no nvcc here, no report of its assembler: skipped"
    echo "0 passed, 0 failed"
    exit 0
fi
awk '
/Compiling entry function/ {
    split($0, quoted, "\047")
    chip = quoted[4]
}
/Function properties for/ { # mangled: _Z, the length of the name, the name, I and its arguments E
    name = $NF
    match(name, /[a-z][a-z_]*_kernel/)
    kernel = substr(name, RSTART, RLENGTH)
    arguments = substr(name, RSTART + RLENGTH)
    hot = kernel ~ /^(generated_product|expert_product|norm|rope_append|embed|sample)_kernel$/ ||
          (kernel ~ /_attention_kernel$/ && arguments ~ /^ILi(64|128)E/) ||
          (kernel == "prompt_product_kernel" && arguments !~ /^ILi[0-9]ELi1E/) # GO_ON: of shards
}
/bytes stack frame/ && hot {
    n[kernel]++
    if ($1 + $5 + $9 > 0) {
        printf "    %s: %s: %s bytes of stack, %s stored, %s loaded\n", chip, name, $1, $5, $9
        bad[kernel]++
    }
    hot = 0
}
END {
    split("generated_product prompt_product expert_product prompt_attention " \
          "generated_attention norm rope_append embed sample", kernels, " ")
    for (i = 1; i <= 9; i++) {
        kernel = kernels[i] "_kernel"
        ok = n[kernel] > 0 && !bad[kernel]
        printf "  %s %s (%d of %d spill)\n", ok ? "ok  " : "FAIL", kernel, bad[kernel], n[kernel]
        passed += ok
    }
    printf "%d passed, %d failed\n", passed, 9 - passed
    exit passed < 9
}' "$report"
