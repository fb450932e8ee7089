// Work per row that is no product: embedding, norm, rotary positions, storing K and V, activations, gathers.

// out[row] = table[tokens[row]]; one block per row.
extern "C" __global__ void embed(const half_bits* table, const u32* tokens, float* out, u32 width) {
    begin_kernel();
    const half_bits* from = table + u64(tokens[blockIdx.x]) * width;
    float* to = out + u64(blockIdx.x) * width;
    for (u32 i = threadIdx.x; i < width; i += blockDim.x) to[i] = to_float(from[i]);
}

// Norm of f32 rows to 16-bit ones; one block per row. width: a multiple of 4.
extern "C" __global__ void __launch_bounds__(NORM_THREADS) rms_norm(const float* x, const float* weight, half_bits* out, u32 width, float eps,
                                                                    u32 rows_by_lane) {
    let_next_start();
    const float4* const row = (const float4*)(x + u64(blockIdx.x) * width);
    RowNorm norm(weight, width);
    wait_for_previous();
    norm.load(row);
    norm.store(row, blockIdx.x, out, rows_by_lane, eps);
}

// out[i] = x[rows[i]]; one block per row.
extern "C" __global__ void gather_rows(const float* x, const u32* rows, float* out, u32 width) {
    begin_kernel();
    const float* from = x + u64(rows[blockIdx.x]) * width;
    for (u32 i = threadIdx.x; i < width; i += blockDim.x) out[u64(blockIdx.x) * width + i] = from[i];
}

// Cosines and sines per row: [rows, 2 * half], the angle an f32 product, as on the CPU; one block per row.
extern "C" __global__ void rotary_angles(const u32* positions, const float* inverse_frequencies, float* angles, u32 half) {
    begin_kernel();
    const u32 i = threadIdx.x;
    if (i >= half) return;
    double sine, cosine;
    sincos(double(float(positions[blockIdx.x]) * inverse_frequencies[i]), &sine, &cosine);
    angles[u64(blockIdx.x) * 2 * half + i] = float(cosine);
    angles[u64(blockIdx.x) * 2 * half + half + i] = float(sine);
}

struct RotateArgs {
    const float* qkv;       // [rows, (num_heads + 2 * num_kv_heads) * head_dim]
    const float* angles;    // [rows, head_dim]: cosines, then sines
    const float* q_norm;    // [head_dim] or null
    const float* k_norm;
    half_bits* q;           // [rows, num_heads, head_dim]
    half_bits* kv;          // the layer's entries
    const Span* spans;
    const u32* row_spans;   // [rows]: which span a row belongs to; ~0: padding
    const u32* block_tables;
    u32 num_heads, num_kv_heads, head_dim;
    float eps;
};

// Splits projected rows, norms q and k per head where asked, rotates them (Su et al. 2021, half-rotation layout) and stores K
// and V in the cache. A warp per head; blocks are [heads / 4, rows]. head_dim: at most 256.
extern "C" __global__ void __launch_bounds__(128) rotate_and_store(const RotateArgs a) {
    let_next_start();
    const u32 row = blockIdx.y, lane = threadIdx.x % 32;
    const u32 head = blockIdx.x * 4 + threadIdx.x / 32, heads = a.num_heads + 2 * a.num_kv_heads;
    const u32 span_number = a.row_spans[row];
    if (head >= heads || span_number == NONE) return wait_for_previous();
    const u32 half = a.head_dim / 2;
    const bool is_query = head < a.num_heads, is_value = head >= a.num_heads + a.num_kv_heads;
    // Where the head goes follows from the pass's description, which is there before the pass begins.
    half_bits* to;
    if (is_query) {
        to = a.q + (u64(row) * a.num_heads + head) * a.head_dim;
    } else {
        const Span span = a.spans[span_number];
        const u32 position = span.past + row - span.first_row;
        const u32 kv_head = (head - a.num_heads) % a.num_kv_heads;
        const u32 block = a.block_tables[span.blocks + position / BLOCK_TOKENS];
        const u64 entry = (u64(block) * a.num_kv_heads + kv_head) * BLOCK_TOKENS + position % BLOCK_TOKENS;
        to = a.kv + (entry * 2 + is_value) * a.head_dim;
    }
    wait_for_previous();

    const float* from = a.qkv + (u64(row) * heads + head) * a.head_dim;
    const float* angles = a.angles + u64(row) * a.head_dim;
    float low[4], high[4], cosine[4], sine[4];
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const u32 d = lane + i * 32;
        low[i] = d < half ? from[d] : 0.0f;
        high[i] = d < half ? from[half + d] : 0.0f;
        const bool turned = d < half && !is_value;
        cosine[i] = turned ? angles[d] : 1.0f;
        sine[i] = turned ? angles[half + d] : 0.0f;
        squares += low[i] * low[i] + high[i] * high[i];
    }
    const float* norm = is_query ? a.q_norm : a.k_norm;
    if (!is_value && norm != nullptr) {
        const float scale = rsqrtf(warp_sum(squares) / float(a.head_dim) + a.eps);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const u32 d = lane + i * 32;
            if (d >= half) continue;
            low[i] *= scale * norm[d];
            high[i] *= scale * norm[half + d];
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const u32 d = lane + i * 32;
        if (d >= half) continue;
        to[d] = to_half(low[i] * cosine[i] - high[i] * sine[i]);
        to[half + d] = to_half(high[i] * cosine[i] + low[i] * sine[i]);
    }
}

// out = silu(gate) * up of rows [gate | up]; for products made by a library. One thread per element.
extern "C" __global__ void gated_silu(const float* x, half_bits* out, u32 width, u64 elements) {
    begin_kernel();
    const u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= elements) return;
    const u64 row = i / width, column = i % width;
    const float gate = x[row * 2 * width + column], up = x[row * 2 * width + width + column];
    out[i] = to_half(gate / (1.0f + __expf(-gate)) * up);
}

// x[row, first + column] += bias[column] for [rows, width] of a wider matrix.
extern "C" __global__ void add_bias(float* x, const float* bias, u32 width, u32 stride, u64 elements) {
    begin_kernel();
    const u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < elements) x[i / width * stride + i % width] += bias[i % width];
}

// x = the sum of parts, [ranks, elements], rank after rank.
extern "C" __global__ void sum_ranks(const float* parts, float* x, u32 ranks, u64 elements) {
    begin_kernel();
    const u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= elements) return;
    float sum = parts[i];
    for (u32 rank = 1; rank < ranks; ++rank) sum += parts[rank * elements + i];
    x[i] = sum;
}

// Pseudo-random weights of the given spread, for benchmarks: uniform in ±spread, a hash of index and seed. An element's index is its
// place in a matrix of which x holds rows of `columns` elements, `stride` apart, from `first` on.
extern "C" __global__ void fill_random(half_bits* x, float spread, u32 seed, u64 elements, u64 columns, u64 stride, u64 first) {
    begin_kernel();
    for (u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x; i < elements; i += u64(gridDim.x) * blockDim.x) {
        const u64 index = first + i / columns * stride + i % columns;
        u32 h = u32(index) * 2654435761u ^ u32(index >> 32) * 40503u ^ seed;
        h ^= h >> 16; h *= 2246822519u; h ^= h >> 13; h *= 3266489917u; h ^= h >> 16;
        x[i] = to_half((float(h) * 4.656612873e-10f - 1.0f) * spread);
    }
}

// Scores in powers of two to probabilities: p = 2^(score - maximum) / sum; blocks are [row pieces, rows].
extern "C" __global__ void score_probabilities(float* scores, const float2* statistics, u32 stride, u32 length) {
    begin_kernel();
    const float2 s = statistics[blockIdx.y];
    float* row = scores + u64(blockIdx.y) * stride;
    const float inverse = 1.0f / s.y;
    for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < length; i += gridDim.x * blockDim.x) row[i] = exp2_fast(row[i] - s.x) * inverse;
}

// Mean probability of every key over a span's tokens and the query heads of a KV head. scores: [tokens, num_heads, stride] as above;
// masses: [num_kv_heads, stride]. Blocks are [key pieces, kv heads].
extern "C" __global__ void entry_masses(const float* scores, const float2* statistics, float* masses, u32 tokens, u32 num_heads, u32 stride) {
    begin_kernel();
    const u32 kv_head = blockIdx.y, group = num_heads / gridDim.y;
    const float weight = 1.0f / float(tokens * group);
    for (u32 key = blockIdx.x * blockDim.x + threadIdx.x; key < stride; key += gridDim.x * blockDim.x) {
        float sum = 0.0f;
        for (u32 token = 0; token < tokens; ++token)
            for (u32 g = 0; g < group; ++g) {
                const u32 row = token * num_heads + kv_head * group + g;
                const float2 s = statistics[row];
                sum += exp2_fast(scores[u64(row) * stride + key] - s.x) / s.y;
            }
        masses[u64(kv_head) * stride + key] = sum * weight;
    }
}

// Mirrors `Bias` in backend.rs.
struct Bias {
    u32 row, column;
    float value;
};

// x[row][column] += value, of distinct entries; one thread each.
extern "C" __global__ void add_biases(float* x, u32 width, const Bias* biases, u32 count) {
    begin_kernel();
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const Bias bias = biases[i];
    x[u64(bias.row) * width + bias.column] += bias.value;
}

// The first of the largest of each f32 row: its column, ~0 for a row that holds a NaN or an infinity, and its value's bits above
// that. One block of 1,024 threads per row.
extern "C" __global__ void __launch_bounds__(1024) row_argmax(const float* x, u64* out, u32 width) {
    begin_kernel();
    __shared__ u64 best_of_warp[32];
    const float* const row = x + u64(blockIdx.x) * width;
    // Order of floats as integers above, smaller columns before larger ones below; 0 is less than any entry.
    u64 best = 0;
    bool sound = true;
#pragma unroll 8
    for (u32 column = threadIdx.x; column < width; column += 1024) {
        const u32 bits = __float_as_uint(row[column] + 0.0f); // -0 equals 0
        sound &= (bits & 0x7f800000u) != 0x7f800000u;
        const u32 ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
        best = max(best, u64(ordered) << 32 | ~column);
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) best = max(best, __shfl_xor_sync(FULL_WARP, best, step));
    if (threadIdx.x % 32 == 0) best_of_warp[threadIdx.x / 32] = best;
    const bool all_sound = __syncthreads_and(sound);
    if (threadIdx.x >= 32) return;
    best = best_of_warp[threadIdx.x];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) best = max(best, __shfl_xor_sync(FULL_WARP, best, step));
    if (threadIdx.x > 0) return;
    const u32 column = all_sound ? ~u32(best) : NONE;
    out[blockIdx.x] = u64(all_sound ? __float_as_uint(row[column]) : 0u) << 32 | column;
}
