# make            ./dynamo, tuned for this machine (PORTABLE=1: for any x86-64 or arm64); with CUDA
#                 if nvcc is there (NVCC= without; ARCH=sm_90: for other chips than the one found)
# make test       builds and runs all tests; asan, tsan: the same under sanitizers; fuzz
# make emu        ./dynamo-emu, the CUDA kernels on the CPU; gpu-test: their tests on a GPU
# make portable   dynamo.o and kernels.o for any machine, to see that they compile
# make bench      measures; soak: the long form of the randomized tests
# make lab N=1    ten lines of a policy are yours: test/labs/1-eviction.md, 2-routing.md, 3-admission.md
# make lines      counts lines, keeps the rules of the house; format: applies .clang-format; clean
CC ?= gcc
CXX ?= g++
NVCC ?= $(firstword $(shell command -v nvcc) $(wildcard /usr/local/cuda/bin/nvcc))
WARNINGS = -Wall -Wextra -Wshadow -Wconversion
# (no note that vectors wider than the machine are passed differently by other compilers)
ARCH_FLAGS = $(if $(PORTABLE),-Wno-psabi,-march=native)
COMMON = -O3 -g $(ARCH_FLAGS) -pthread -MMD -MP $(SANITIZE)
FLAGS = -std=gnu11 $(COMMON) $(WARNINGS) $(CFLAGS)
LIBS = -lm -pthread
# each kind of build has a folder, so that none is made of another's objects
B = build/$(if $(VARIANT),$(VARIANT),$(if $(PORTABLE),portable,native))
OBJECTS = $(addprefix $(B)/,dynamo.o scheduler.o kvcache.o kernels.o)
# (the longest first)
TESTS = $(patsubst test/test_%.c,$(B)/test_%,$(filter-out %_gpu_schedules.c,$(LONG) \
	$(filter-out $(LONG),$(wildcard test/test_*.c))))
LONG = $(patsubst %,test/test_%.c,schedules hostile program kernels)
EMU_TESTS = $(B)/test_emu_schedules $(B)/test_cuda $(B)/test_emu
SOURCES = $(wildcard *.c *.h *.cu lib/*.h app/*.h test/*.c test/*.h test/*.cu test/*.cpp)
# what tests run is a build without CUDA, so that they are the same on every machine
TESTED = $(B)/dynamo
EMU = $(if $(VARIANT),$(B)/dynamo-emu,dynamo-emu)

# CUDA: for the chips of this machine, else for two generations and, as PTX, for newer ones (on 9.0
# sm_90a: only that has wgmma); sanitizers have none
CUDA = $(if $(VARIANT),,$(if $(NVCC),$(B)/kernels.cuda.o))
CHIPS = $(or $(ARCH),$(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null \
	| sort -u | sed 's/^/sm_/;s/\.//;s/sm_90$$/sm_90a/'),sm_80 sm_90a compute_80)
# (none fuses a * b + c: the bits of a row would depend on which kernel it is in)
CUDA_SOURCES = kernels.cu dynamo.h $(wildcard lib/*.h)
NVCC_FLAGS = -std=c++17 -O3 -fmad=false -lineinfo --threads 2 -Xcompiler -Wall,-Wextra -Xptxas -v \
	$(foreach chip,$(CHIPS),-gencode arch=$(chip:sm_%=compute_%),code=$(chip)) $(NVCCFLAGS)
# (g++ does not know nvcc's pragmas)
EMU_FLAGS = -std=gnu++17 -ffp-contract=off $(COMMON) $(if $(VARIANT),-O1 $(SANITIZE)) -Wall -Wextra \
	-Wno-unknown-pragmas -DCUDA_EMULATED -I. -Itest $(CFLAGS)

all: dynamo

dynamo: $(OBJECTS) $(CUDA)
	$(if $(CUDA),$(NVCC) $^ -lm -Xcompiler -pthread,$(CC) $(FLAGS) $^ $(LIBS)) -o $@

$(TESTED): $(OBJECTS)
	$(CC) $(FLAGS) $^ $(LIBS) -o $@

$(B)/%.o: %.c $(B)/flags
	$(CC) $(FLAGS) -c $< -o $@

# page.html is a part of it
$(B)/dynamo.o: app/page.html

# the assembler's report beside it says what each kernel takes: test/spills.sh reads it
$(B)/kernels.cuda.o: $(CUDA_SOURCES) $(B)/flags
	@echo 'nvcc compiles the kernels for $(CHIPS), which takes a while (make NVCC= leaves CUDA out)'
	$(NVCC) $(NVCC_FLAGS) -c $< -o $@ 2> $(B)/kernels.cuda.txt || { cat $(B)/kernels.cuda.txt; false; }
	@grep -E 'warning|error' $(B)/kernels.cuda.txt || true

emu: $(EMU)
$(EMU): $(OBJECTS) $(B)/kernels.emu.o
	$(CXX) $(EMU_FLAGS) $^ $(LIBS) -o $@

$(B)/kernels.emu.o: kernels.cu $(B)/flags
	$(CXX) -x c++ $(EMU_FLAGS) -c $< -o $@

# a test includes what it looks into; the program under test is given by name
$(B)/test_%: test/test_%.c $(B)/flags
	$(CC) $(FLAGS) -I. -DDYNAMO_PROGRAM='"./$(TESTED)"' $< $(LIBS) -o $@

# look into dynamo.c, which calls all others
$(B)/test_engine $(B)/test_replay $(B)/test_sim: $(B)/test_%: test/test_%.c $(filter-out $(B)/dynamo.o,$(OBJECTS)) $(B)/flags
	$(CC) $(FLAGS) -I. -DDYNAMO_PROGRAM='"./$(TESTED)"' $< $(filter-out $(B)/dynamo.o,$(OBJECTS)) $(LIBS) -o $@

# the same tests of the emulated CUDA backend, and of the real one
$(B)/test_emu_schedules $(B)/test_gpu_schedules: test/test_gpu_schedules.c $(B)/flags
	$(CC) $(FLAGS) -I. -DDYNAMO_PROGRAM='"./$(if $(findstring emu,$@),$(EMU),dynamo)"' \
		$(if $(findstring emu,$@),-DMANY_GPUS=4) $< $(LIBS) -o $@

# the kernels' tests on the CPU, beside the CPU backend, whose sampler is their model
$(B)/test_cuda: test/test_cuda.cu $(B)/kernels.o $(B)/flags
	$(CXX) -x c++ $(EMU_FLAGS) $< -x none $(B)/kernels.o $(LIBS) -o $@

$(B)/test_cuda_gpu: test/test_cuda.cu test/ops.h test/reference.h $(CUDA_SOURCES) $(B)/kernels.o
	$(NVCC) $(filter-out -v -Xptxas,$(NVCC_FLAGS)) -I. $< $(B)/kernels.o -lm -Xcompiler -pthread -o $@

$(B)/test_emu: test/test_emu.cpp $(B)/flags
	$(CXX) $(subst gnu11,gnu++17,$(FLAGS)) $< $(LIBS) -o $@

# rebuilt when the compiler or its flags change
$(B)/flags: FORCE
	@mkdir -p $(B)
	@echo '$(CC) $(FLAGS) $(EMU_FLAGS) $(NVCC) $(CHIPS)' | cmp -s - $@ || \
		echo '$(CC) $(FLAGS) $(EMU_FLAGS) $(NVCC) $(CHIPS)' > $@

test: $(TESTED) $(EMU) $(TESTS) $(EMU_TESTS) $(CUDA)
	@test/run.sh $(EMU_TESTS) $(TESTS) $(if $(VARIANT),,test/spills.sh)

gpu-test:
	@nvidia-smi -L > /dev/null 2>&1 || { echo 'gpu-test: this machine has no GPU'; exit 1; }
	@test -n '$(NVCC)' || { echo 'gpu-test: nvcc is not installed'; exit 1; }
	$(MAKE) $(B)/test_cuda_gpu
	test/run.sh $(B)/test_cuda_gpu

# (no local variables for a debugger, nor what the runtime has off by default)
ASAN = -O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined \
	--param asan-use-after-return=0
asan:
	$(MAKE) test VARIANT=asan SANITIZE='$(ASAN)'

# the programs that have threads
tsan:
	$(MAKE) test VARIANT=tsan SANITIZE='-g1 -fsanitize=thread' EMU_TESTS=build/tsan/test_emu EMU= \
		TESTS='$(addprefix build/tsan/test_,schedules program kernels http engine)'

portable:
	$(MAKE) PORTABLE=1 $(addprefix build/portable/,dynamo.o kernels.o)

# what reads bytes that others made, a minute each; needs clang
fuzz:
	test/fuzz.sh

soak: $(B)/test_scheduler
	$(B)/test_scheduler soak

bench: $(B)/bench
	$(B)/bench

$(B)/bench: test/bench.c $(B)/scheduler.o $(B)/kvcache.o $(B)/flags
	$(CC) $(FLAGS) -I. $< $(filter %.o,$^) $(LIBS) -o $@

# what the CUDA backend reaches on this GPU (test/gpu.sh: with all else that needs one), beside the
# vendor's library where it is there; emu-bench: that the benchmark runs
CUBLAS = $(if $(wildcard $(dir $(NVCC))../include/cublas_v2.h),-DWITH_CUBLAS -lcublas)
$(B)/bench_cuda: test/bench_cuda.cu $(B)/kernels.o $(CUDA_SOURCES) $(B)/flags
	$(NVCC) $(filter-out -v -Xptxas,$(NVCC_FLAGS)) -I. $< $(B)/kernels.o $(CUBLAS) -lm -Xcompiler -pthread -o $@

$(B)/bench_cuda_emu: test/bench_cuda.cu $(B)/kernels.o $(B)/flags
	$(CXX) -x c++ $(EMU_FLAGS) $< -x none $(B)/kernels.o $(LIBS) -o $@

emu-bench: $(B)/bench_cuda_emu
	$(B)/bench_cuda_emu tiny

lab:
	@test/labs/run.sh $(N)

lines:
	@CC='$(CC)' CXX='$(CXX)' test/lines.sh

format:
	clang-format -i $(filter-out lib/unicode.h,$(SOURCES))

clean:
	rm -rf build dynamo dynamo-emu

FORCE:
.PHONY: all portable test gpu-test asan tsan fuzz emu soak bench emu-bench lab lines format clean FORCE
-include $(wildcard $(B)/*.d)
