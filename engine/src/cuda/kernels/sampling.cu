// Per row of logits: the most probable token and the normaliser of the softmax.

// tokens[row]: the first of the largest logits; normalisers[row]: maximum, sum of e^((logit - maximum) / temperature). A block of 1,024 threads per row.
extern "C" __global__ void __launch_bounds__(1024) greedy_and_normaliser(const float* logits, u32* tokens, float2* normalisers, u32 vocabulary,
                                                                         float inverse_temperature) {
    __shared__ float tops[32], sums[32];
    __shared__ u32 indices[32];
    const float* const row = logits + u64(blockIdx.x) * vocabulary;
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float top = NEGATIVE_INFINITY;
    u32 index = NONE;
    for (u32 i = threadIdx.x; i < vocabulary; i += 1024) {
        const float x = row[i];
        if (x > top) top = x, index = i;
    }
    auto better = [](float x, u32 i, float y, u32 j) { return x > y || (x == y && i < j); };
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        const float other = __shfl_xor_sync(FULL_WARP, top, step);
        const u32 j = __shfl_xor_sync(FULL_WARP, index, step);
        if (better(other, j, top, index)) top = other, index = j;
    }
    if (lane == 0) tops[warp] = top, indices[warp] = index;
    __syncthreads();
    top = tops[0], index = indices[0];
    for (u32 w = 1; w < 32; ++w)
        if (better(tops[w], indices[w], top, index)) top = tops[w], index = indices[w];
    float sum = 0.0f;
    for (u32 i = threadIdx.x; i < vocabulary; i += 1024) sum += __expf((row[i] - top) * inverse_temperature);
    sum = warp_sum(sum);
    if (lane == 0) sums[warp] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        float total = 0.0f;
        for (u32 w = 0; w < 32; ++w) total += sums[w];
        tokens[blockIdx.x] = index;
        normalisers[blockIdx.x] = make_float2(top, total);
    }
}
