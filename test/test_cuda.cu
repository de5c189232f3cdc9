/* test_cuda.cu: every op of the CUDA backend against float64, on random shapes.
 *
 * The same source is compiled by g++, which runs the kernels on the CPU (test/cuda_emu.h), and by
 * nvcc for a GPU (make gpu-test). Ops are driven through struct backend, so their launchers are
 * tested too. An op's inputs are written into the device's memory or read from there, so that an
 * error is found in the op that makes it; its outputs are NaN before. What a GPU leaves open, the
 * emulator does in another order each time: everything is run in several orders, and must give the
 * same bits. References are float64, of the same bf16 inputs; the sampler's twin is sampler.h.
 *
 *     test_cuda                      all tests, on shapes drawn from the clock
 *     test_cuda products 1234        those with this in their name, from the seed 1234 */
extern "C" {
#include "dynamo.h"
#include "../lib/sampler.h"
}
#include "lib/gpu.h"

/* What the machine seems to be: the backend asks here, so that any can be played. */
static struct {
    int major;         /* of the chips; 0: as they are */
    int driver;        /* its version; -1: as it is */
    cudaError_t count; /* why there are no devices */
} pretended = {0, -1, cudaSuccess};

static cudaError_t pretended_count(int *n) {
    return pretended.count != cudaSuccess ? pretended.count : cudaGetDeviceCount(n);
}

static cudaError_t pretended_driver(int *version) {
    cudaError_t error = cudaDriverGetVersion(version);
    *version = pretended.driver >= 0 ? pretended.driver : *version;
    return error;
}

static cudaError_t pretended_properties(cudaDeviceProp *properties, int device) {
    cudaError_t error = cudaGetDeviceProperties(properties, device);
    properties->major = pretended.major > 0 ? pretended.major : properties->major;
    return error;
}

#define cudaGetDeviceCount   pretended_count
#define cudaDriverGetVersion pretended_driver
#undef cudaGetDeviceProperties /* a macro in some versions of CUDA */
#define cudaGetDeviceProperties pretended_properties
#include "../kernels.cu"

#include "cuda_products.h"
#include "cuda_attention.h"
#include "cuda_steps.h"
#include "cuda_faults.h"

int main(int argc, char **argv) {
    static const struct test tests[] = {
        {"packing", packing},
        {"periodic_tensors", periodic_tensors},
        {"products_f32", products_f32},
        {"products_f16", products_f16},
        {"products_bf16", products_bf16},
        {"products_q8_0", products_q8_0},
        {"products_q4_0", products_q4_0},
        {"products_q4_k", products_q4_k},
        {"products_q6_k", products_q6_k},
        {"products_of_mixed_types", products_of_mixed_types},
        {"products_of_many_rows", products_of_many_rows},
        {"embedding", embedding},
        {"rope", rope},
        {"attention_of_all_heads", attention_of_all_heads},
        {"attention_of_long_texts", attention_of_long_texts},
        {"rows_alone_and_in_crowds", rows_alone_and_in_crowds},
        {"shards", shards},
        {"recorded_steps", recorded_steps},
        {"many_samples", many_samples},
        {"sampling", sampling},
        {"copies", copies},
        {"refused_devices", refused_devices},
        {"no_gpu", no_gpu},
#ifdef CUDA_EMULATED
        {"memory_that_is_missing", memory_that_is_missing},
        {"models_that_do_not_fit", models_that_do_not_fit},
        {"faults", faults},
#endif
    };
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    seed = argc > 2 ? strtoull(argv[2], NULL, 10)
                    : ((uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000) % 1000000000;
    char error[ERROR_LENGTH] = "";
    struct backend_options options = {};
    struct backend *backend = cuda_backend_open(&options, error);
    if (!backend) {
        printf("test_cuda: %s\n", error);
        return 1;
    }
    backend->close(backend);
    printf("  seed %llu\n", (unsigned long long)seed);
    return check_run(tests, sizeof tests / sizeof *tests, argc, argv);
}
