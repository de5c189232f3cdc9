# make            ./dynamo, tuned for this machine (PORTABLE=1: for any x86-64 or arm64)
# make test       builds and runs all tests; asan, tsan: the same under sanitizers
# make bench      measures; soak: the long form of the randomized tests
# make lines      counts lines against the budget; format: applies .clang-format; clean
CC ?= gcc
CXX ?= g++
WARNINGS = -Wall -Wextra -Wshadow -Wconversion
# (no note that vectors wider than the machine are passed differently by other compilers)
ARCH_FLAGS = $(if $(PORTABLE),-Wno-psabi,-march=native)
FLAGS = -std=gnu11 -O3 -g $(ARCH_FLAGS) $(WARNINGS) -pthread -MMD -MP $(SANITIZE) $(CFLAGS)
LIBS = -lm -pthread
# each kind of build has a folder, so that none is made of another's objects
B = build/$(if $(VARIANT),$(VARIANT),$(if $(PORTABLE),portable,native))
OBJECTS = $(addprefix $(B)/,dynamo.o scheduler.o kvcache.o kernels.o)
TESTS = $(patsubst test/test_%.c,$(B)/test_%,$(wildcard test/test_*.c)) $(B)/test_emu
SOURCES = $(wildcard *.c *.h test/*.c test/*.h test/*.cpp)
PROGRAM = $(if $(VARIANT),$(B)/dynamo,dynamo)

all: $(PROGRAM)

# the program stands in the root; sanitized ones stay in their folder
$(PROGRAM): $(OBJECTS)
	$(CC) $(FLAGS) $^ $(LIBS) -o $@

$(B)/%.o: %.c $(B)/flags
	$(CC) $(FLAGS) -c $< -o $@

# a test includes what it looks into; the program under test is given by name
$(B)/test_%: test/test_%.c $(B)/flags
	$(CC) $(FLAGS) -I. -DDYNAMO_PROGRAM='"./$(PROGRAM)"' $< $(LIBS) -o $@

$(B)/test_emu: test/test_emu.cpp $(B)/flags
	$(CXX) $(subst gnu11,gnu++17,$(FLAGS)) $< $(LIBS) -o $@

# rebuilt when the compiler or its flags change
$(B)/flags: FORCE
	@mkdir -p $(B)
	@echo '$(CC) $(FLAGS)' | cmp -s - $@ || echo '$(CC) $(FLAGS)' > $@

test: $(PROGRAM) $(TESTS)
	@test/run.sh $(TESTS)

asan:
	$(MAKE) test VARIANT=asan SANITIZE='-fsanitize=address,undefined -fno-sanitize-recover=undefined'

tsan:
	$(MAKE) test VARIANT=tsan SANITIZE='-fsanitize=thread'

soak: $(B)/test_scheduler
	$(B)/test_scheduler soak

bench: $(B)/bench
	$(B)/bench

$(B)/bench: test/bench.c $(B)/flags
	$(CC) $(FLAGS) -I. $< $(LIBS) -o $@

lines:
	@test/lines.sh

format:
	clang-format -i $(filter-out unicode_table.h,$(SOURCES))

clean:
	rm -rf build dynamo

FORCE:
.PHONY: all test asan tsan soak bench lines format clean FORCE
-include $(wildcard $(B)/*.d)
