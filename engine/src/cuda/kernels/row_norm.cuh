// Root-mean-square norm of a row (Zhang and Sennrich 2019) by a block, for whichever kernel brings the row: one order of its sum.

#define NORM_THREADS 256

// Fours of a row that a thread keeps in registers; what a wider row has beyond them is read twice.
#define KEPT 4

struct RowNorm {
    const float4* weights;
    u32 fours;
    float4 kept[KEPT], kept_weights[KEPT];

    // Weights stand still: this may come before what the row is written by has ended.
    __device__ __forceinline__ RowNorm(const float* weight, u32 width) : weights((const float4*)weight), fours(width / 4) {
#pragma unroll
        for (u32 k = 0; k < KEPT; ++k)
            if (place(k) < fours) kept_weights[k] = weights[place(k)];
    }

    // Where this thread's k-th four is.
    static __device__ __forceinline__ u32 place(u32 k) { return threadIdx.x + k * NORM_THREADS; }

    __device__ __forceinline__ void load(const float4* row) {
#pragma unroll
        for (u32 k = 0; k < KEPT; ++k)
            if (place(k) < fours) kept[k] = row[place(k)];
    }

    // Once `kept` is there, and the rest of the row in memory; it is row number `number` of `out`. `rows_by_lane`: of how many, where they are to be
    // as `four_by_lane` says; else 0.
    __device__ __forceinline__ void store(const float4* row, u32 number, half_bits* out, u32 rows_by_lane, float eps) const {
        __shared__ float sums[NORM_THREADS / 32];
        float squares = 0.0f;
        auto add = [&](float4 v) { squares += (v.x * v.x + v.y * v.y) + (v.z * v.z + v.w * v.w); };
#pragma unroll
        for (u32 k = 0; k < KEPT; ++k)
            if (place(k) < fours) add(kept[k]);
        for (u32 i = place(KEPT); i < fours; i += NORM_THREADS) add(row[i]);
        squares = warp_sum(squares);
        if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = squares;
        __syncthreads();
        float total = 0.0f;
#pragma unroll
        for (u32 w = 0; w < NORM_THREADS / 32; ++w) total += sums[w];
        const float scale = rsqrtf(total / float(4 * fours) + eps);
        auto put = [&](u32 i, float4 v, float4 w) {
            const u64 at = rows_by_lane > 0 ? four_by_lane(rows_by_lane, number, i) : u64(number) * fours + i;
            ((uint2*)out)[at] = make_uint2(pack(v.x * scale * w.x, v.y * scale * w.y), pack(v.z * scale * w.z, v.w * scale * w.w));
        };
#pragma unroll
        for (u32 k = 0; k < KEPT; ++k)
            if (place(k) < fours) put(place(k), kept[k], kept_weights[k]);
        for (u32 i = place(KEPT); i < fours; i += NORM_THREADS) put(i, row[i], weights[i]);
    }
};
