/* kernels.cu: the CUDA backend, every op of the forward pass on GPUs.
 *
 * Owns: the activations of each device and its recorded graphs, and through its headers memory,
 * copies and weights, products, attention and sampler. Knows nothing of requests. kernels.c is its
 * specification: where the two differ, kernels.c is right.
 *
 * How data flows: `upload` packs a matrix into tensor-core order (pack.cuh). A step's tokens,
 * positions, block table and work lists go up in one copy; the ops then read them on the device, so
 * that a decode step is the same sequence of launches for any batch of its size, and is recorded
 * once for each and replayed as a graph. Generated tokens are the first rows of a batch, prompt
 * rows follow; products and attention have a kernel for each role. Token ids come back, nothing
 * else.
 *
 * Invariants:
 *   - A row's bits depend on its role and its own text, never on the batch, on the placement of its
 *     blocks or on the number of shards.
 *   - The residual stream x is f32; q and the inputs of products (h, attention, ffn) are bf16.
 * Their gaps (pack.cuh) are 0 from the beginning, and nobody writes there.
 *   - Work on a stream is ordered; between streams nothing is assumed: the scheduler uses a block
 *     only when the copy into it, or the step that wrote it, has been reported.
 *   - A device's fault ends the program, with file, line, device, call, and what was being done.
 *
 * Read next: device.cuh, pack.cuh, product.cuh, attention.cuh, sampler.cuh. */
#include "device.cuh"
#include "attention.cuh"

/* ---- small kernels: one block or warp a row, bound by memory ---- */

/* x = token_embd[token], and the angles of the row's position. */
__global__ void embed_kernel(const struct step_header *step, const struct matrix embedding,
                             float *x, int x_stride, int d_model, float2 *turn,
                             const float *frequency, int n_pairs) {
    grid_wait();
    grid_launch_dependents();
    int row = (int)blockIdx.x;
    if (row >= step->n_rows)
        return;
    int token = array_of<int>(step, step->token)[row];
    int position = array_of<int>(step, step->position)[row];
    for (int i = (int)threadIdx.x; i < d_model; i += THREADS)
        x[(size_t)row * x_stride + i] = matrix_element(embedding, token, i);
    for (int i = (int)threadIdx.x; i < n_pairs; i += THREADS) {
        /* cos would need a stack for large angles */
        double half_turns =
            (double)position * (double)frequency[i] * 0.31830988618379067; /* 1/pi */
        turn[(size_t)row * n_pairs + i] =
            make_float2((float)cospi(half_turns), (float)sinpi(half_turns));
    }
}

/* The sum of all threads' values, in every thread, in a fixed order. shared: (THREADS / 32) */
DEVICE float sum_of_block(float value, float *shared) {
    for (int step = 16; step > 0; step /= 2)
        value += __shfl_xor_sync(0xffffffffu, value, step);
    if (threadIdx.x % WARP == 0)
        shared[threadIdx.x / WARP] = value;
    __syncthreads();
    value = 0.0f;
    for (int i = 0; i < THREADS / WARP; i++)
        value += shared[i];
    return value;
}

/* h = rmsnorm(x) * weight as bf16, of all rows, or of those that sample; h_low: may be NULL. */
__global__ void norm_kernel(const struct step_header *step, int first_sample, const float *x,
                            int x_stride, int d_model, const float *weight, float epsilon,
                            uint16_t *h, uint16_t *h_low, int h_stride) {
    DYNAMIC_SHARED(float, shared);
    grid_wait();
    grid_launch_dependents();
    bool samples = first_sample != ALL_ROWS;
    int row = (int)blockIdx.x + (samples ? first_sample : 0);
    if (row >= (samples ? step->n_samples : step->n_rows))
        return;
    row = samples ? array_of<int>(step, step->sample_row)[row] : row;
    const float *from = x + (size_t)row * x_stride;
    float squares = 0.0f;
    for (int i = (int)threadIdx.x; i < d_model; i += THREADS)
        squares += from[i] * from[i];
    squares = sum_of_block(squares, shared);
    float scale = 1.0f / sqrtf(squares / (float)d_model + epsilon);
    for (int i = (int)threadIdx.x * 2; i < d_model; i += THREADS * 2) {
        float first = from[i] * scale * weight[i];
        float second = i + 1 < d_model ? from[i + 1] * scale * weight[i + 1] : 0.0f;
        size_t at = (size_t)blockIdx.x * h_stride + i;
        uint32_t pair = pack_bf16(first, second);
        *reinterpret_cast<uint32_t *>(h + at) = pair;
        if (h_low)
            *reinterpret_cast<uint32_t *>(h_low + at) =
                pack_bf16(first - bf16_to_float(pair & 0xffff), second - bf16_to_float(pair >> 16));
    }
}

struct rope {
    const float *qkv; /* (n_rows, qkv_stride): heads of q, of k, of v */
    int qkv_stride, n_heads, n_kv_heads, head_dim, rope_dim, layer;
    bool adjacent;
    float epsilon;
    const float *q_norm, *k_norm; /* (head_dim), or NULL */
    const float2 *turn;
    uint16_t *q, *kv; /* bf16 (n_rows, n_heads, head_dim); blocks */
    size_t block_elements;
};

/* q, k: norm over head_dim where there is one, then rope; q as bf16, k and v into their block. One
 * warp a row and head of q, k or v. */
__global__ void rope_append_kernel(const struct step_header *step, const struct rope r) {
    grid_wait();
    grid_launch_dependents();
    int row = (int)blockIdx.x, lane = (int)threadIdx.x % WARP;
    int head = (int)blockIdx.y * (THREADS / WARP) + (int)threadIdx.x / WARP;
    if (row >= step->n_rows || head >= r.n_heads + 2 * r.n_kv_heads)
        return;
    bool is_q = head < r.n_heads, is_v = head >= r.n_heads + r.n_kv_heads;
    const float *from = r.qkv + (size_t)row * r.qkv_stride + head * r.head_dim;
    const float *norm = is_q ? r.q_norm : r.k_norm;
    int kv_head = is_v ? head - r.n_heads - r.n_kv_heads : head - r.n_heads;
    int at = array_of<int>(step, step->position)[row], token = at % BLOCK_TOKENS, apart_by = 1;
    uint16_t *to = r.q + ((size_t)row * r.n_heads + head) * r.head_dim;
    if (!is_q) { /* see attention.cuh for the order in a block */
        int sequence = array_of<int>(step, step->row_sequence)[row];
        int first_block = array_of<struct sequence>(step, step->sequences)[sequence].first_block;
        size_t slot = (size_t)array_of<int>(step, step->table)[first_block + at / BLOCK_TOKENS];
        size_t plane = (size_t)((r.layer * 2 + is_v) * r.n_kv_heads + kv_head) * BLOCK_TOKENS;
        to = r.kv + slot * r.block_elements + plane * r.head_dim;
        to += is_v ? token : token * r.head_dim;
        apart_by = is_v ? BLOCK_TOKENS : 1;
    }
    float scale = 1.0f;
    if (!is_v && norm) {
        float squares = 0.0f;
        for (int i = lane; i < r.head_dim; i += WARP)
            squares += from[i] * from[i];
        for (int i = 16; i > 0; i /= 2)
            squares += __shfl_xor_sync(0xffffffffu, squares, i);
        scale = 1.0f / sqrtf(squares / (float)r.head_dim + r.epsilon);
    }
    for (int pair = lane; pair < r.head_dim / 2; pair += WARP) {
        bool turns = !is_v && pair < r.rope_dim / 2, apart = turns && !r.adjacent;
        int i = apart ? pair : 2 * pair, j = apart ? pair + r.rope_dim / 2 : i + 1;
        float a = from[i], b = from[j];
        if (!is_v && norm) {
            a *= scale * norm[i];
            b *= scale * norm[j];
        }
        float2 turn = make_float2(1.0f, 0.0f);
        if (turns)
            turn = r.turn[(size_t)row * (r.rope_dim / 2) + pair];
        uint32_t both = pack_bf16(a * turn.x - b * turn.y, a * turn.y + b * turn.x);
        to[i * apart_by] = (uint16_t)both;
        to[j * apart_by] = (uint16_t)(both >> 16);
    }
}

struct partial_sums {
    const float *of_shard[MAX_SHARDS];
};

/* x (n_rows, width) += the shards' sums, added as a binary tree. */
__global__ void reduce_kernel(float *x, const struct partial_sums sums, int n_shards, int n) {
    grid_wait();
    grid_launch_dependents();
    int i = (int)(blockIdx.x * THREADS + threadIdx.x);
    if (i >= n)
        return;
    float value[MAX_SHARDS];
    for (int shard = 0; shard < MAX_SHARDS; shard++)
        value[shard] = shard < n_shards ? sums.of_shard[shard][i] : 0.0f;
    for (int m = MAX_SHARDS; m > 1; m /= 2)
        for (int j = 0; j < m / 2; j++)
            value[j] = value[2 * j] + value[2 * j + 1];
    x[i] += value[0];
}

/* ---- ops ---- */

static void cuda_embed(struct device *device, const struct weight *token_embd) {
    struct cuda_device *d = (struct cuda_device *)device;
    launch(d, "embed_kernel", embed_kernel, grid_of(d->n_rows), THREADS, 0, d->step,
           token_embd->matrix, d->x, d->x_stride, device->config->d_model, d->turn,
           d->rope_frequency, device->config->rope_dim / 2);
}

/* Of all rows: first_sample ALL_ROWS; or of n samples from that one on. */
static void norm(struct cuda_device *d, const struct weight *weight, int first_sample, int n) {
    launch(d, "norm_kernel", norm_kernel, grid_of(n), THREADS, THREADS / WARP * sizeof(float),
           d->step, first_sample, d->x, d->x_stride, d->device.config->d_model, weight->vector,
           d->device.config->norm_epsilon, d->h, d->h_low, d->h_stride);
}

/* Blocks of outputs if each has `tiles` of them. */
static int count_blocks(const struct product &p, int epilogue, int tiles) {
    int n = 0;
    for (int i = 0; i < (epilogue == SILU ? 1 : p.n_matrices); i++)
        n += divide(p.matrix[i].n_tiles, tiles);
    return n;
}

template <int TYPE, int EPILOGUE, int COLUMNS>
static void launch_generated(struct cuda_device *d, const struct product &p, int n_rows) {
    int n_segments = p.matrix[0].segments.n;
    launch(d, "generated_product_kernel", generated_product_kernel<TYPE, EPILOGUE, COLUMNS>,
           grid_of(count_blocks(p, EPILOGUE, tiles_a_block(COLUMNS)), divide(n_rows, 8 * COLUMNS)),
           n_segments * WARP,
           generated_product_shared(EPILOGUE == SILU ? 2 : 1, n_segments, COLUMNS), p);
}

/* The product for n_generated rows, and for the prompt rows that p names. */
template <int TYPE, int EPILOGUE>
static void launch_typed(struct cuda_device *d, const struct product &p, int n_generated) {
    if (n_generated > 32)
        launch_generated<TYPE, EPILOGUE, 8>(d, p, n_generated);
    else if (n_generated > 16)
        launch_generated<TYPE, EPILOGUE, 4>(d, p, n_generated);
    else if (n_generated > 8)
        launch_generated<TYPE, EPILOGUE, 2>(d, p, n_generated);
    else if (n_generated > 0)
        launch_generated<TYPE, EPILOGUE, 1>(d, p, n_generated);
    if (p.n_rows > 0) {
        int n_blocks = count_blocks(p, EPILOGUE, OUTPUT_TILE / TILE / (EPILOGUE == SILU ? 2 : 1));
        launch(d, "prompt_product_kernel", prompt_product_kernel<TYPE, EPILOGUE>,
               grid_of(n_blocks * divide(p.n_rows, ROW_TILE)), THREADS, PROMPT_SHARED, p, n_blocks);
    }
}

template <int EPILOGUE>
static void launch_product(struct cuda_device *d, struct product p, int n_generated) {
    int type = p.matrix[0].type;
    p.n_passes = 1;
    for (int i = 0; i < p.n_matrices; i++) {
        type = p.matrix[i].type == type ? type : (int)PACKED_MIXED;
        if (p.matrix[i].type == PACKED_F32)
            p.n_passes = p.input_low ? 3 : 2;
    }
    if (type == PACKED_F32)
        launch_typed<PACKED_F32, EPILOGUE>(d, p, n_generated);
    else if (type == PACKED_BF16)
        launch_typed<PACKED_BF16, EPILOGUE>(d, p, n_generated);
    else if (type == PACKED_Q8)
        launch_typed<PACKED_Q8, EPILOGUE>(d, p, n_generated);
    else if (type == PACKED_Q4)
        launch_typed<PACKED_Q4, EPILOGUE>(d, p, n_generated);
    else
        launch_typed<PACKED_MIXED, EPILOGUE>(d, p, n_generated);
}

/* A product of all rows of the step. */
static struct product product_of(const struct cuda_device *d, const uint16_t *input,
                                 int input_stride) {
    struct product p = {};
    p.input = input;
    p.input_low = input == d->h ? d->h_low : NULL;
    p.input_stride = input_stride;
    p.n_generated = &d->step->n_generated;
    p.first_row = d->n_generated;
    p.n_rows = d->n_rows - d->n_generated;
    return p;
}

static void cuda_norm_qkv(struct device *device, const struct weight *const *layer) {
    struct cuda_device *d = (struct cuda_device *)device;
    const struct weight *const matrices[3] = {layer[ATTN_Q], layer[ATTN_K], layer[ATTN_V]};
    const struct weight *const biases[3] = {layer[Q_BIAS], layer[K_BIAS], layer[V_BIAS]};
    norm(d, layer[ATTN_NORM], ALL_ROWS, d->n_rows);
    struct product p = product_of(d, d->h, d->h_stride);
    float *out = d->qkv;
    for (int i = 0; i < 3; i++) {
        p.matrix[i] = matrices[i]->matrix;
        p.bias[i] = biases[i] ? biases[i]->vector : NULL;
        p.out[i] = out;
        out += p.matrix[i].n_outputs;
    }
    p.n_matrices = 3;
    p.out_stride = d->qkv_stride;
    launch_product<STORE>(d, p, d->n_generated);
}

static void cuda_rope_append(struct device *device, const struct weight *const *layer,
                             int layer_index) {
    struct cuda_device *d = (struct cuda_device *)device;
    const struct model_config *config = device->config;
    struct rope r = {};
    r.qkv = d->qkv;
    r.qkv_stride = d->qkv_stride;
    r.n_heads = d->n_heads;
    r.n_kv_heads = d->n_kv_heads;
    r.head_dim = config->head_dim;
    r.rope_dim = config->rope_dim;
    r.layer = layer_index;
    r.adjacent = config->rope_adjacent;
    r.epsilon = config->norm_epsilon;
    r.q_norm = layer[ATTN_Q_NORM] ? layer[ATTN_Q_NORM]->vector : NULL;
    r.k_norm = layer[ATTN_K_NORM] ? layer[ATTN_K_NORM]->vector : NULL;
    r.turn = d->turn;
    r.q = d->q;
    r.kv = (uint16_t *)device->kv;
    r.block_elements = block_bytes(config, device->n_shards, KV_BF16) / sizeof(uint16_t);
    int heads = d->n_heads + 2 * d->n_kv_heads;
    launch(d, "rope_append_kernel", rope_append_kernel,
           grid_of(d->n_rows, divide(heads, THREADS / WARP)), THREADS, 0, d->step, r);
}

template <int HEAD> static void launch_attention(struct cuda_device *d, const struct attention &a) {
    if (d->n_prompt_items > 0) {
        launch(d, "prompt_attention_kernel", prompt_attention_kernel<HEAD>,
               grid_of(d->n_prompt_items * d->n_kv_heads), ATTENTION_WARPS * WARP,
               prompt_attention_shared(HEAD), a);
    }
    if (d->n_generated > 0) {
        int most = d->gpu->properties.multiProcessorCount * BLOCKS_A_PROCESSOR;
        int n = d->n_splits * d->n_kv_heads * divide(d->n_heads / d->n_kv_heads, 16);
        launch(d, "generated_attention_kernel", generated_attention_kernel<HEAD>,
               grid_of(d->recording || n > most ? most : n), ATTENTION_WARPS * WARP,
               generated_attention_shared(HEAD), a);
    }
}

static int head_of(int head_dim) { /* the kernels that serve it */
    return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256;
}

static void cuda_attention(struct device *device, int layer_index) {
    struct cuda_device *d = (struct cuda_device *)device;
    const struct model_config *config = device->config;
    struct attention a = {};
    a.q = d->q;
    a.out = d->attention;
    a.kv = (const uint16_t *)device->kv;
    a.block_elements = block_bytes(config, device->n_shards, KV_BF16) / sizeof(uint16_t);
    a.plane = (size_t)d->n_kv_heads * BLOCK_TOKENS * (size_t)config->head_dim;
    a.layer = layer_index;
    a.n_heads = d->n_heads;
    a.n_kv_heads = d->n_kv_heads;
    a.head_dim = config->head_dim;
    a.out_stride = d->attention_stride;
    a.scale = 1.44269504f / sqrtf((float)config->head_dim);
    a.places = d->attention_places;
    a.step = d->step;
    a.partial = d->partial;
    a.arrived = d->arrived;
    if (head_of(config->head_dim) == 64)
        launch_attention<64>(d, a);
    else if (head_of(config->head_dim) == 128)
        launch_attention<128>(d, a);
    else
        launch_attention<256>(d, a);
}

static struct product projection(const struct cuda_device *d, const struct weight *matrix,
                                 enum product_input input) {
    bool attends = input == INPUT_ATTENTION;
    struct product p = product_of(d, attends ? d->attention : d->ffn,
                                  attends ? d->attention_stride : d->ffn_stride);
    p.matrix[0] = matrix->matrix;
    p.n_matrices = 1;
    p.out_stride = d->x_stride;
    return p;
}

/* One of several shards: generated rows' sums are left for all_reduce_add, prompt rows' are made
 * there, for each shard goes on where the one before it ended. */
static void cuda_project_add(struct device *device, const struct weight *matrix,
                             enum product_input input) {
    struct cuda_device *d = (struct cuda_device *)device;
    struct product p = projection(d, matrix, input);
    if (device->n_shards == 1) {
        p.out[0] = d->x;
        launch_product<ADD>(d, p, d->n_generated);
        return;
    }
    d->pending = matrix;
    d->pending_input = input;
    d->turn_of_sums ^= 1;
    p.out[0] = d->sums[d->turn_of_sums];
    p.n_rows = 0;
    launch_product<STORE>(d, p, d->n_generated);
}

static void cuda_norm_gate_up(struct device *device, const struct weight *const *layer) {
    struct cuda_device *d = (struct cuda_device *)device;
    norm(d, layer[FFN_NORM], ALL_ROWS, d->n_rows);
    struct product p = product_of(d, d->h, d->h_stride);
    p.matrix[0] = layer[FFN_GATE]->matrix;
    p.matrix[1] = layer[FFN_UP]->matrix;
    p.n_matrices = 2;
    p.ffn = d->ffn;
    p.ffn_stride = d->ffn_stride;
    p.ffn_places = d->ffn_places;
    launch_product<SILU>(d, p, d->n_generated);
}

/* ---- several shards ---- */

/* Orders what comes on `to`'s stream after what is now on `from`'s. */
static void follow(struct cuda_device *to, struct cuda_device *from) {
    enter(&from->device, "adding up shards");
    TRY(from, cudaEventRecord(from->ready, from->streams[STREAM_COMPUTE]));
    enter(&to->device, "adding up shards");
    TRY(to, cudaStreamWaitEvent(to->streams[STREAM_COMPUTE], from->ready, 0));
}

static void fetch(struct cuda_device *to, void *memory, const struct cuda_device *from,
                  const void *source, size_t bytes) {
    TRY(to, cudaMemcpyPeerAsync(memory, to->device.index, source, from->device.index, bytes,
                                to->streams[STREAM_COMPUTE]));
}

/* Every shard fetches the sums of all others, and adds the same tree to its own x. */
static void reduce_generated(struct cuda_device **shards, int n_shards) {
    int piece =
        shards[0]->device.max_rows / n_shards > 0 ? shards[0]->device.max_rows / n_shards : 1;
    for (int row = 0; row < shards[0]->n_generated; row += piece) {
        int n_rows = shards[0]->n_generated - row < piece ? shards[0]->n_generated - row : piece;
        int n = n_rows * shards[0]->x_stride;
        size_t at = (size_t)row * shards[0]->x_stride;
        for (int s = 0; s < n_shards; s++) {
            struct cuda_device *d = shards[s];
            struct partial_sums sums = {};
            for (int from = 0; from < n_shards; from++) {
                const float *own = shards[from]->sums[shards[from]->turn_of_sums] + at;
                float *copy = d->gathered + (size_t)from * n;
                sums.of_shard[from] = from == s ? own : copy;
                if (from == s)
                    continue;
                follow(d, shards[from]);
                fetch(d, copy, shards[from], own, (size_t)n * sizeof(float));
            }
            enter(&d->device, "adding up shards");
            launch(d, "reduce_kernel", reduce_kernel, grid_of(divide(n, THREADS)), THREADS, 0,
                   d->x + at, sums, n_shards, n);
        }
    }
}

/* A piece of the prompt rows goes from shard to shard, and each goes on with the sums it gets; the
 * last adds them to x and hands that to all. Pieces follow each other, so all shards are at work.
 */
static void chain_prompts(struct cuda_device **shards, int n_shards) {
    int begin = shards[0]->n_generated, end = shards[0]->n_rows;
    struct cuda_device *last = shards[n_shards - 1];
    for (int row = begin; row < end; row += CHAIN_ROWS) {
        int n = end - row < CHAIN_ROWS ? end - row : CHAIN_ROWS;
        size_t at = (size_t)row * last->x_stride;
        size_t bytes = (size_t)n * last->x_stride * sizeof(float);
        for (int s = 0; s < n_shards; s++) {
            struct cuda_device *d = shards[s];
            struct product p = projection(d, d->pending, d->pending_input);
            p.first_row = row;
            p.n_rows = n;
            p.out[0] = d == last ? d->x : d->sums[d->turn_of_sums];
            if (s > 0) {
                const struct cuda_device *before = shards[s - 1];
                follow(d, shards[s - 1]);
                fetch(d, d->gathered + at, before, before->sums[before->turn_of_sums] + at, bytes);
                p.initial = d->gathered;
            }
            enter(&d->device, "adding up shards");
            if (d == last)
                launch_product<ADD>(d, p, 0);
            else
                launch_product<STORE>(d, p, 0);
        }
        for (int s = 0; s < n_shards - 1; s++) {
            follow(shards[s], last);
            fetch(shards[s], shards[s]->x + at, last, last->x + at, bytes);
        }
    }
}

static void cuda_all_reduce_add(struct device **shards, int n_shards) {
    struct cuda_device **all = (struct cuda_device **)shards;
    if (all[0]->n_generated > 0)
        reduce_generated(all, n_shards);
    if (all[0]->n_rows > all[0]->n_generated)
        chain_prompts(all, n_shards);
}

/* ---- logits and samples ---- */

/* Logits of samples [first, first + n) of the step. They take the kernel of generated rows,
 * whatever rows they are: there are few. At most LOGIT_ROWS at a time, for a row is half a
 * megabyte. */
static void compute_logits(struct cuda_device *d, const struct weight *const *weights, int first,
                           int n) {
    norm(d, weights[OUTPUT_NORM], first, n);
    struct product p = product_of(d, d->h, d->h_stride);
    p.matrix[0] = weights[OUTPUT]->matrix;
    p.n_matrices = 1;
    p.out[0] = d->logits;
    p.out_stride = d->logits_stride;
    p.n_generated = &d->step->n_samples;
    p.n_before = first;
    p.n_rows = 0;
    launch_product<STORE>(d, p, n);
}

/* Copies n rows of logits to the host. */
static void read_logits(struct cuda_device *d, float *to, int n) {
    size_t width = (size_t)d->device.config->vocab_size * sizeof(float);
    assert(!d->recording);
    TRY(d, cudaMemcpy2DAsync(to, width, d->logits, (size_t)d->logits_stride * sizeof(float), width,
                             (size_t)n, cudaMemcpyDefault, d->streams[STREAM_COMPUTE]));
}

/* The tokens of samples [first, first + n), of which the logits are there. */
static void draw_tokens(struct cuda_device *d, int first, int n) {
    struct sampler s = {d->logits, d->logits_stride, d->device.config->vocab_size, first, d->step,
                        d->keys,   d->sampled};
    launch(d, "sample_kernel", sample_kernel, grid_of(n), SAMPLER_THREADS, SAMPLER_SHARED, s);
}

static void cuda_sample(struct device *device, const struct weight *const *weights, float *logits) {
    struct cuda_device *d = enter(device, "sampling");
    for (int first = 0; first < d->n_samples; first += LOGIT_ROWS) {
        int n = d->n_samples - first < LOGIT_ROWS ? d->n_samples - first : (int)LOGIT_ROWS;
        compute_logits(d, weights, first, n);
        if (logits)
            read_logits(d, logits + (size_t)first * (size_t)device->config->vocab_size, n);
        draw_tokens(d, first, n);
    }
}

/* ---- a step ---- */

/* Gives up recorded graphs: something they point to moves. */
static void forget_graphs(struct cuda_device *d) {
    for (int i = 0; i <= MAX_COLUMNS; i++) {
        if (d->graphs[i].exec)
            TRY(d, cudaGraphExecDestroy(d->graphs[i].exec));
        d->graphs[i].exec = NULL;
    }
}

/* Makes room for a step of so many bytes and so many splits. */
static void reserve_step(struct cuda_device *d, size_t bytes, size_t n_splits) {
    size_t split_bytes =
        sizeof(float) * (size_t)d->n_heads * (size_t)(d->device.config->head_dim + 2);
    if (bytes > d->step_bytes) {
        forget_graphs(d);
        TRY(d, cudaFreeHost(d->step_host));
        TRY(d, cudaFree(d->step));
        d->step_bytes = bytes * 2;
        TRY(d, cudaHostAlloc((void **)&d->step_host, d->step_bytes, cudaHostAllocPortable));
        TRY(d, cudaMalloc((void **)&d->step, d->step_bytes));
    }
    if (n_splits > d->split_capacity) {
        forget_graphs(d);
        TRY(d, cudaFree(d->partial));
        d->split_capacity = n_splits * 2;
        TRY(d, cudaMalloc((void **)&d->partial, d->split_capacity * split_bytes));
    }
}

/* Appends an array to the step's buffer; returns its distance from the header. from NULL: it is
 * written by the caller. */
static int append(struct cuda_device *d, size_t *end, const void *from, size_t bytes) {
    size_t at = *end;
    if (from)
        memcpy((char *)d->step_host + at, from, bytes);
    *end += (bytes + 15) / 16 * 16;
    assert(*end <= d->step_bytes);
    return (int)at;
}

/* The tiles of queries of prompts, and the splits of generated tokens: into lists, or only counted
 * (NULL). Long texts come first, so that none is left alone at the end. */
static void list_work(struct cuda_device *d, const struct batch *batch, int2 *items, int2 *splits) {
    int group = d->n_heads / d->n_kv_heads, tile = query_tile(head_of(d->device.config->head_dim));
    d->n_prompt_items = d->n_splits = 0;
    for (int i = 0; i < batch->n_sequences; i++) {
        const struct sequence *s = &batch->sequence[i];
        int n = s->generated ? divide(s->start + 1, SPLIT_TOKENS) : divide(s->n_rows * group, tile);
        int *count = s->generated ? &d->n_splits : &d->n_prompt_items;
        int2 *list = s->generated ? splits : items;
        for (int j = 0; j < n && list; j++)
            list[*count + j] = make_int2(i, s->generated ? j : (n - 1 - j) * tile);
        *count += n;
    }
}

static size_t write_step(struct cuda_device *d, const struct batch *b) {
    list_work(d, b, NULL, NULL);
    size_t rows = (size_t)b->n_rows * sizeof(int), samples = (size_t)b->n_samples;
    size_t sequences = (size_t)b->n_sequences * sizeof *b->sequence;
    size_t work[2] = {(size_t)d->n_prompt_items * sizeof(int2), (size_t)d->n_splits * sizeof(int2)};
    size_t sampling = samples * sizeof *b->sampling, table = (size_t)b->n_blocks * sizeof(int);
    size_t end = (sizeof *d->step_host + 15) / 16 * 16;
    reserve_step(d,
                 end + 3 * rows + samples * sizeof(int) + sampling + sequences + work[0] + work[1] +
                     table + 9 * 16,
                 (size_t)d->n_splits);
    struct step_header *h = d->step_host;
    h->n_rows = b->n_rows;
    h->n_generated = d->n_generated;
    h->n_samples = b->n_samples;
    h->n_splits = d->n_splits;
    h->token = append(d, &end, b->token, rows);
    h->position = append(d, &end, b->position, rows);
    h->row_sequence = append(d, &end, b->row_sequence, rows);
    h->sample_row = append(d, &end, b->sample_row, samples * sizeof(int));
    h->sampling = append(d, &end, b->sampling, sampling);
    h->sequences = append(d, &end, b->sequence, sequences);
    h->prompt_items = append(d, &end, NULL, work[0]);
    h->splits = append(d, &end, NULL, work[1]);
    h->table = append(d, &end, b->block_table, table);
    list_work(d, b, (int2 *)((char *)h + h->prompt_items), (int2 *)((char *)h + h->splits));
    return end;
}

/* A step of generated tokens alone is recorded the first time, for up to 8, 16, … 64 rows. */
static bool cuda_step_begin(struct device *device, const struct batch *batch) {
    struct cuda_device *d = enter(device, "computing a step");
    assert(batch->n_rows <= device->max_rows && batch->n_samples <= device->max_samples);
    d->n_rows = batch->n_rows;
    d->n_samples = d->n_sampled = batch->n_samples;
    d->n_generated = 0;
    for (int i = 0; i < batch->n_sequences; i++) {
        assert(!batch->sequence[i].generated || batch->sequence[i].first_row == d->n_generated);
        d->n_generated += batch->sequence[i].generated;
    }
    cudaStream_t stream = d->streams[STREAM_COMPUTE];
    size_t bytes = write_step(d, batch);
    TRY(d, cudaMemcpyAsync(d->step, d->step_host, bytes, cudaMemcpyHostToDevice, stream));
    d->recording = 0;
    if (d->n_generated < d->n_rows || d->n_samples < d->n_rows || d->n_rows > 8 * MAX_COLUMNS ||
        device->n_shards > 1)
        return true;
    d->recording = divide(d->n_rows, 8);
    struct graph *graph = &d->graphs[d->recording];
    if (graph->exec) {
        TRY(d, cudaGraphLaunch(graph->exec, stream));
        __atomic_fetch_add(&d->cuda->backend.kernel_launches, graph->n_launches, __ATOMIC_RELAXED);
        d->recording = 0;
        return false;
    }
    d->n_rows = d->n_generated = d->n_samples = 8 * d->recording;
    d->n_launches = 0;
    TRY(d, cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    return true;
}

static void cuda_step_end(struct device *device, int *sampled) {
    struct cuda_device *d = enter(device, "ending a step");
    cudaStream_t stream = d->streams[STREAM_COMPUTE];
    if (d->recording) {
        struct graph *graph = &d->graphs[d->recording];
        cudaGraph_t recorded;
        TRY(d, cudaStreamEndCapture(stream, &recorded));
        TRY(d, cudaGraphInstantiate(&graph->exec, recorded, 0));
        TRY(d, cudaGraphDestroy(recorded));
        TRY(d, cudaGraphLaunch(graph->exec, stream));
        graph->n_launches = d->n_launches;
        d->recording = 0;
    }
    size_t bytes = (size_t)d->n_sampled * sizeof *sampled;
    if (sampled && bytes > 0)
        TRY(d, cudaMemcpyAsync(d->sampled_host, d->sampled, bytes, cudaMemcpyDeviceToHost, stream));
    TRY(d, cudaStreamSynchronize(stream));
    if (sampled)
        memcpy(sampled, d->sampled_host, bytes);
}

/* ---- what the chip can do at most ---- */

/* Operations of 8 independent mma a step and warp. `sink` keeps them from being removed. */
__global__ void mma_probe_kernel(int n_steps, float *sink) {
    grid_wait();
    grid_launch_dependents();
    const uint32_t a[4] = {0x3c003c00, 0x3c003c00, 0x3c003c00, 0x3c003c00}, b[2] = {a[0], a[0]};
    float sum[8][4] = {};
    for (int step = 0; step < n_steps; step++)
#pragma unroll
        for (int i = 0; i < 8; i++)
            mma_bf16(sum[i], a, b);
    for (int i = 1; i < 8; i++)
        sum[0][0] += sum[i][0];
    if (sum[0][0] < 0.0f)
        *sink = sum[0][0];
}

/* Reads n times 16 bytes; `sink` keeps the reads from being removed. */
__global__ void read_probe_kernel(const uint4 *memory, size_t n, uint32_t *sink) {
    grid_wait();
    grid_launch_dependents();
    size_t stride = (size_t)gridDim.x * THREADS, i = (size_t)blockIdx.x * THREADS + threadIdx.x;
    uint32_t sum = 0;
#pragma unroll 4
    for (size_t at = i; at < n; at += stride) {
        uint4 value = load16_once(memory + at);
        sum += value.x ^ value.y ^ value.z ^ value.w;
    }
    if (sum == 0x5eed5eed)
        *sink = sum;
}

/* Milliseconds of the compute stream from one call to the next with the same events. */
static float lap(struct cuda_device *d, cudaEvent_t events[2]) {
    float ms = 0.0f;
    TRY(d, cudaEventRecord(events[1], d->streams[STREAM_COMPUTE]));
    TRY(d, cudaEventSynchronize(events[1]));
    TRY(d, cudaEventElapsedTime(&ms, events[0], events[1]));
    TRY(d, cudaEventRecord(events[0], d->streams[STREAM_COMPUTE]));
    return ms;
}

/* Reads the largest weight, which no cache holds, if it is one of a real model; multiplies on all
 * tensor cores. Both grow until they take a millisecond. Of n shards each has a GPU's limits. */
static void cuda_limits(struct device **shards, int n, enum tensor_type type, double *read,
                        double *ops) {
    struct cuda_device *d = enter(shards[0], "probing the limits");
    const struct weight *largest = NULL;
    (void)type; /* all types multiply as bf16 */
    for (const struct weight *w = d->cuda->weights; w; w = w->next)
        if (w->gpu == shards[0]->index && !w->vector &&
            (!largest || w->tensor->bytes > largest->tensor->bytes))
            largest = w;
    cudaEvent_t events[2];
    for (int i = 0; i < 2; i++)
        TRY(d, cudaEventCreateWithFlags(&events[i], cudaEventDefault));
    TRY(d, cudaEventRecord(events[0], d->streams[STREAM_COMPUTE]));
    int blocks = d->gpu->properties.multiProcessorCount * 2, steps = 16, repeats = 1;
    float ms = 0.0f;
    for (; ms < PROBE_MS && steps < 1 << 20; steps *= 4) {
        launch(d, "mma_probe_kernel", mma_probe_kernel, grid_of(blocks), THREADS, 0, steps, d->x);
        ms = lap(d, events);
        *ops = 8.0 * steps * blocks * (THREADS / WARP) * 2 * 16 * 8 * 16 / (ms * 1e-3) * n;
    }
    const struct matrix *m = largest ? &largest->matrix : NULL;
    size_t bytes = m ? (size_t)m->n_tiles * m->n_units * packed_bytes(m->type) : 0;
    for (ms = 0.0f; ms < PROBE_MS && bytes > 0 && repeats < 1 << 12; repeats *= 4) {
        for (int i = 0; i < repeats; i++)
            launch(d, "read_probe_kernel", read_probe_kernel, grid_of(blocks), THREADS, 0,
                   (const uint4 *)m->packed, bytes / sizeof(uint4), (uint32_t *)d->x);
        ms = lap(d, events);
        *read = (double)bytes * repeats / (ms * 1e-3) * n;
    }
    for (int i = 0; i < 2; i++)
        TRY(d, cudaEventDestroy(events[i]));
}

/* ---- devices ---- */

static bool check_wanted(const struct cuda_backend *cuda, const struct device *wanted,
                         char *error) {
    const struct model_config *config = wanted->config;
    if (wanted->index < 0 || wanted->index >= cuda->n_gpus)
        return fail(error, "--devices: got device %d, there are %d GPUs (0 to %d)", wanted->index,
                    cuda->n_gpus, cuda->n_gpus - 1);
    if (!device_fits(wanted, error))
        return false;
    if (config->head_dim % 8 || config->head_dim > 256)
        return fail(error,
                    "heads of %d: the CUDA kernels cover multiples of 8 up to 256; use "
                    "--devices cpu:2",
                    config->head_dim);
    return wanted->kv_type == KV_BF16 ||
           fail(error, "--kv-type: the CUDA backend keeps keys and values in bf16");
}

static int stride_of(int n) { /* rows begin at 16 bytes */
    return divide(n, 8) * 8;
}

static bool allocate_activations(struct cuda_device *d) {
    const struct model_config *c = d->device.config;
    int n = d->device.n_shards, rank = d->device.rank, n_segments = K_SEGMENTS / n;
    int q_cols = c->n_heads * c->head_dim, first = rank * n_segments;
    size_t rows = (size_t)d->device.max_rows, samples = (size_t)d->device.max_samples;
    size_t padded = (rows > samples ? rows : samples) + 8 * MAX_COLUMNS; /* whole groups are read */
    d->padded_rows = padded;
    d->n_heads = c->n_heads / n;
    d->n_kv_heads = c->n_kv_heads / n;
    d->d_ff = c->d_ff / n;
    d->attention_places = make_segments(q_cols, grain_of(c, q_cols), first, n_segments);
    d->ffn_places = make_segments(c->d_ff, grain_of(c, c->d_ff), first, n_segments);
    d->x_stride = stride_of(c->d_model);
    d->h_stride = divide(c->d_model, UNIT) * UNIT;
    d->qkv_stride = (d->n_heads + 2 * d->n_kv_heads) * c->head_dim;
    d->attention_stride = d->attention_places.unit[n_segments] * UNIT;
    d->ffn_stride = d->ffn_places.unit[n_segments] * UNIT;
    d->logits_stride = stride_of(c->vocab_size);
    bool ok = true, many = n > 1;
    take(d, &d->x, rows * (size_t)d->x_stride, &ok);
    take(d, &d->h, padded * (size_t)d->h_stride, &ok);
    take(d, &d->qkv, rows * (size_t)d->qkv_stride, &ok);
    take(d, &d->q, rows * (size_t)(d->n_heads * c->head_dim), &ok);
    take(d, &d->attention, padded * (size_t)d->attention_stride, &ok);
    take(d, &d->ffn, padded * (size_t)d->ffn_stride, &ok);
    take(d, &d->turn, rows * (size_t)(c->rope_dim / 2), &ok);
    take(d, &d->rope_frequency, (size_t)c->rope_dim / 2, &ok);
    take(d, &d->arrived, rows * (size_t)d->n_heads, &ok);
    size_t logit_rows = rank > 0 ? 0 : samples < LOGIT_ROWS ? samples : (size_t)LOGIT_ROWS;
    take(d, &d->logits, logit_rows * (size_t)d->logits_stride, &ok);
    take(d, &d->keys, logit_rows * (size_t)c->vocab_size, &ok);
    take(d, &d->sampled, samples, &ok);
    take(d, &d->sums[0], many ? rows * (size_t)d->x_stride : 0, &ok);
    take(d, &d->sums[1], many ? rows * (size_t)d->x_stride : 0, &ok);
    take(d, &d->gathered, many ? (rows + MAX_SHARDS) * (size_t)d->x_stride : 0, &ok);
    ok = ok && cudaHostAlloc((void **)&d->sampled_host, samples * sizeof(int),
                             cudaHostAllocPortable) == cudaSuccess;
    if (ok)
        TRY(d, cudaMemcpyAsync(d->rope_frequency, d->device.rope_frequency,
                               (size_t)c->rope_dim / 2 * sizeof(float), cudaMemcpyHostToDevice,
                               d->streams[STREAM_COMPUTE]));
    TRY(d, cudaStreamSynchronize(d->streams[STREAM_COMPUTE]));
    return ok;
}

/* What devices on one GPU share. The chip must be new enough, and the kernels built for it. */
static bool open_gpu(struct cuda_device *d, char *error) {
    struct gpu *gpu = d->gpu;
    int index = d->device.index;
    if (gpu->open)
        return true;
    TRY(d, cudaGetDeviceProperties(&gpu->properties, index));
    const cudaDeviceProp *p = &gpu->properties;
    if (p->major < MIN_MAJOR) {
        return fail(error, "device %d (%s) has compute capability %d.%d, expected %d.0 or newer",
                    index, p->name, p->major, p->minor, MIN_MAJOR);
    }
    if (cudaFuncSetAttribute(sample_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             SAMPLER_SHARED) != cudaSuccess) {
        (void)cudaGetLastError();
        return fail(error,
                    "device %d (%s): the kernels were built for other chips; make ARCH=sm_%d%d",
                    index, p->name, p->major, p->minor);
    }
    TRY(d, cudaStreamCreateWithPriority(&gpu->stream, cudaStreamNonBlocking, 0));
    for (int i = 0; i < 2; i++)
        TRY(d, cudaEventCreateWithFlags(&gpu->free[i], cudaEventDisableTiming));
    for (int peer = 0; peer < d->cuda->n_gpus; peer++) {
        int reachable = 0;
        if (peer != index && cudaDeviceCanAccessPeer(&reachable, index, peer) == cudaSuccess &&
            reachable)
            (void)cudaDeviceEnablePeerAccess(peer, 0);
    }
    (void)cudaGetLastError(); /* without peer access copies go through the host */
    gpu->open = true;
    return true;
}

static void cuda_device_close(struct device *device) {
    struct cuda_device *d = enter(device, "closing");
    TRY(d, cudaDeviceSynchronize());
    forget_graphs(d);
    for (int stream = 0; stream < N_STREAMS; stream++) {
        for (int i = 0; i < RING; i++)
            TRY(d, cudaEventDestroy(d->copies[stream].event[i]));
        TRY(d, cudaStreamDestroy(d->streams[stream]));
    }
    TRY(d, cudaEventDestroy(d->ready));
    for (int i = 0; i < d->n_pieces; i++)
        TRY(d, cudaFree(d->pieces[i]));
    TRY(d, cudaFree(d->step));
    TRY(d, cudaFree(d->partial));
    TRY(d, cudaFreeHost(d->step_host));
    TRY(d, cudaFreeHost(d->sampled_host));
    free(d);
}

static struct device *cuda_device_open(struct backend *backend, const struct device *wanted,
                                       char *error) {
    struct cuda_backend *cuda = (struct cuda_backend *)backend;
    if (!check_wanted(cuda, wanted, error))
        return NULL;
    struct cuda_device *d = (struct cuda_device *)calloc(1, sizeof *d);
    if (!d) {
        (void)fail(error, "out of memory");
        return NULL;
    }
    d->device = *wanted;
    d->device.backend = backend;
    d->cuda = cuda;
    d->gpu = &cuda->gpus[wanted->index];
    enter(&d->device, "opening");
    if (!open_gpu(d, error)) {
        free(d);
        return NULL;
    }
    int least = 0, most = 0;
    TRY(d, cudaDeviceGetStreamPriorityRange(&least, &most));
    for (int stream = 0; stream < N_STREAMS; stream++) {
        int priority = stream == STREAM_COMPUTE && !wanted->urgent ? least : most;
        TRY(d, cudaStreamCreateWithPriority(&d->streams[stream], cudaStreamNonBlocking, priority));
        for (int i = 0; i < RING; i++)
            TRY(d, cudaEventCreateWithFlags(&d->copies[stream].event[i], cudaEventDisableTiming));
    }
    TRY(d, cudaEventCreateWithFlags(&d->ready, cudaEventDisableTiming));
    if (!allocate_activations(d)) {
        cuda_device_close(&d->device);
        (void)fail(
            error,
            "device %d: no memory for the activations of %d rows; lower --chunk or --max-batch",
            wanted->index, wanted->max_rows);
        return NULL;
    }
    return &d->device;
}

static void cuda_close(struct backend *backend) {
    struct cuda_backend *cuda = (struct cuda_backend *)backend;
    while (cuda->weights) {
        struct weight *weight = cuda->weights;
        cuda->weights = weight->next;
        cudaSetDevice(weight->gpu);
        free_weight(weight);
    }
    for (int i = 0; i < cuda->n_gpus; i++) {
        struct gpu *gpu = &cuda->gpus[i];
        if (!gpu->open)
            continue;
        cudaSetDevice(i);
        cudaStreamDestroy(gpu->stream);
        for (int j = 0; j < 2; j++) {
            cudaEventDestroy(gpu->free[j]);
            cudaFree(gpu->raw[j]);
            cudaFreeHost(gpu->pinned[j]);
        }
    }
    free(cuda);
}

static void set_operations(struct backend *backend) {
    backend->name = "cuda";
    backend->close = cuda_close;
    backend->device_open = cuda_device_open;
    backend->device_close = cuda_device_close;
    backend->alloc = cuda_alloc;
    backend->release = cuda_release;
    backend->free_memory = cuda_free_memory;
    backend->upload = cuda_upload;
    backend->limits = cuda_limits;
    backend->copy = cuda_copy;
    backend->copy_done = cuda_copy_done;
    backend->step_begin = cuda_step_begin;
    backend->embed = cuda_embed;
    backend->norm_qkv = cuda_norm_qkv;
    backend->rope_append = cuda_rope_append;
    backend->attention = cuda_attention;
    backend->project_add = cuda_project_add;
    backend->norm_gate_up = cuda_norm_gate_up;
    backend->all_reduce_add = cuda_all_reduce_add;
    backend->sample = cuda_sample;
    backend->step_end = cuda_step_end;
    backend->kv_type = KV_BF16;
    backend->chunk = CHUNK_ROWS;
}

/* Why there is no GPU, in one line. */
static void explain_absence(cudaError_t status, char *error) {
    int driver = 0, built = 0;
    (void)cudaDriverGetVersion(&driver);
    (void)cudaRuntimeGetVersion(&built);
    if (status == cudaErrorInsufficientDriver && driver > 0)
        (void)fail(error,
                   "no GPU: the driver knows CUDA %d.%d, this build needs %d.%d; update the driver",
                   driver / 1000, driver % 1000 / 10, built / 1000, built % 1000 / 10);
    else if (status == cudaErrorInsufficientDriver)
        (void)fail(error, "no GPU: no driver is installed");
    else
        (void)fail(error, "no GPU: %s",
                   status == cudaSuccess ? "the machine has none" : cudaGetErrorString(status));
}

extern "C" struct backend *cuda_backend_open(const struct backend_options *options, char *error) {
    int n_gpus = 0;
    cudaError_t status = cudaGetDeviceCount(&n_gpus);
    if (status != cudaSuccess || n_gpus == 0) {
        explain_absence(status, error);
        (void)cudaGetLastError();
        return NULL;
    }
    struct cuda_backend *cuda = (struct cuda_backend *)calloc(1, sizeof *cuda);
    if (!cuda) {
        (void)fail(error, "out of memory");
        return NULL;
    }
    emu_seed(options->copy_delay_seed);
    set_operations(&cuda->backend);
    cuda->options = *options;
    cuda->n_gpus = n_gpus < MAX_GPUS ? n_gpus : MAX_GPUS;
    cuda->backend.n_gpus = cuda->n_gpus;
    pthread_mutex_init(&cuda->upload_mutex, NULL);
    return &cuda->backend;
}
