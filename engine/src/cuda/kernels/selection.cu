// Masks on the device: mixtures of attention rows, means of a round, top-p selection, packed bits.
//
// Top-p works on fixed-point masses, units of 2^-31: sums are exact and free of order, so the mass condition holds exactly in
// this arithmetic and a row's selection never depends on how it was summed or searched. A row is read from memory once, into
// registers, while the next one is copied into shared memory; the threshold is sought between its neighbours, where a line between the
// masses at both would have it, until few entries can be left between them, and one warp settles those without a barrier.
//
// Options: THREADS and VALUES (entries per thread, a multiple of 4): rows of up to THREADS * VALUES entries.

#ifndef THREADS
#define THREADS 1024
#endif
#ifndef VALUES
#define VALUES 32
#endif
#define WARPS (THREADS / 32)
// Entries that one warp settles.
#define FEW 1024

#define UNIT 2147483648.0f

// What to select from a row.
struct RowSpec {
    u32 length;
    float p;
};

struct TopPArgs {
    const float* rows;    // [num_rows, stride], probabilities; a row's total is at most 1
    const RowSpec* specs; // [num_rows]
    u32* selected;        // [num_rows, words], bit i of word w: entry 32 w + i; zeros past a row's end
    u32* thresholds;      // [num_rows]: the smallest selected mass, ~0 when nothing is
    u32 num_rows, stride, words; // stride: a multiple of 4
};

__device__ __forceinline__ u32 warp_sum_u32(u32 x) { return __reduce_add_sync(FULL_WARP, x); }

// A sum over the block; `scratch` alternates between calls so that one barrier serves.
__device__ __forceinline__ u32 block_sum(u32 x, u32* scratch) {
    x = warp_sum_u32(x);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    return warp_sum_u32(threadIdx.x % 32 < WARPS ? scratch[threadIdx.x % 32] : 0);
}

// What lies between a < b by ratio, at a share of the way: that of their float bit patterns, which are nearly logarithms.
__device__ __forceinline__ u32 between(u32 a, u32 b, float share) {
    const u32 from = __float_as_uint(float(a)), to = __float_as_uint(float(b));
    const u32 m = u32(__uint_as_float(from + u32(share * float(to - from))));
    return min(max(m, a + 1), b - 1);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) top_p(const TopPArgs a) {
    begin_kernel();
    extern __shared__ __align__(16) float ahead[]; // [THREADS * VALUES]; each thread reads only what it copied
    __shared__ u32 scratch[2][32], few[FEW], few_count, answer;
    const u32 lane = threadIdx.x % 32;
    auto fetch = [&](u32 row) {
        if (row < a.num_rows) {
            const u32 length = a.specs[row].length;
#pragma unroll
            for (int j = 0; j < VALUES / 4; ++j) {
                const u32 at = j * THREADS + threadIdx.x;
                if (at * 4 < length) copy_async(shared_address(ahead + at * 4), a.rows + u64(row) * a.stride + at * 4, true);
            }
        }
        copy_commit();
    };
    fetch(blockIdx.x);
    u32 turn = 0;
    for (u32 row = blockIdx.x; row < a.num_rows; row += gridDim.x) {
        copy_wait<0>();
        const u32 length = a.specs[row].length;
        const float p = a.specs[row].p;
        u32 mass[VALUES];
        u32 total = 0;
#pragma unroll
        for (int j = 0; j < VALUES / 4; ++j) {
            const u32 at = j * THREADS + threadIdx.x;
            float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (at * 4 < length) v = *(const float4*)(ahead + at * 4);
            const float x[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                // NaN and negative entries weigh nothing; what lies past the end does not count.
                const bool counts = at * 4 + e < length;
                mass[j * 4 + e] = counts ? u32(__float2uint_rn(fminf(fmaxf(x[e], 0.0f), 1.0f) * UNIT)) : 0;
                total += mass[j * 4 + e];
            }
        }
        fetch(row + gridDim.x);
        total = block_sum(total, scratch[turn ^= 1]);
        const u32 wanted = u32(min(u64(ceil(double(p) * double(total))), u64(total)));
        // Invariant: mass at or above `reaches` is at least `wanted`, mass at or above `fails` is less.
        u32 reaches = 1, fails = NONE, above = total, below = 0; // the masses at both
        u32 probe = max(total / max(length, 1u), 2u), stride = 4;
        auto weigh = [&](u32 threshold) {
            u32 sum = 0;
#pragma unroll
            for (int i = 0; i < VALUES; ++i) sum += mass[i] >= threshold ? mass[i] : 0;
            return block_sum(sum, scratch[turn ^= 1]);
        };
        u32 threshold = NONE;
        if (wanted > 0) {
            // Gallop from the mean until the answer is bracketed.
            while (probe > reaches && probe < fails) {
                const u32 m = weigh(probe);
                if (m >= wanted) {
                    reaches = probe, above = m;
                    probe = u32(min(u64(probe) * stride, u64(NONE)));
                } else {
                    fails = probe, below = m;
                    probe /= stride;
                }
                stride = min(stride * stride, 65536u);
            }
            // An entry between the bounds weighs `reaches` at least, which says how many there can be.
            bool halved = true;
            while (fails - reaches > 1 && (above - below) / reaches > FEW) {
                // A little further than the line has it, so that both bounds come near; where that did not help, the middle.
                const float line = float(above - wanted) / float(above - below);
                const u32 width = __float_as_uint(float(fails)) - __float_as_uint(float(reaches));
                const u32 at = between(reaches, fails, halved ? line + (line < 0.5f ? 0.0625f : -0.0625f) : 0.5f), m = weigh(at);
                if (m >= wanted) reaches = at, above = m;
                else fails = at, below = m;
                halved = !halved || __float_as_uint(float(fails)) - __float_as_uint(float(reaches)) <= width / 2;
            }
            if (fails - reaches > 1) {
                if (threadIdx.x == 0) few_count = 0;
                u32 own = 0;
#pragma unroll
                for (int i = 0; i < VALUES; ++i) own += mass[i] >= reaches && mass[i] < fails;
                u32 place = own;
#pragma unroll
                for (int step = 1; step < 32; step *= 2) {
                    const u32 before = __shfl_up_sync(FULL_WARP, place, step);
                    if (lane >= step) place += before;
                }
                __syncthreads();
                u32 first = 0;
                if (lane == 31) first = atomicAdd(&few_count, place);
                place += __shfl_sync(FULL_WARP, first, 31) - own;
#pragma unroll
                for (int i = 0; i < VALUES; ++i)
                    if (mass[i] >= reaches && mass[i] < fails) few[place++] = mass[i];
                __syncthreads();
                if (threadIdx.x < 32) {
                    u32 candidate[FEW / 32];
#pragma unroll
                    for (int i = 0; i < FEW / 32; ++i) candidate[i] = i * 32 + lane < few_count ? few[i * 32 + lane] : 0;
                    while (fails - reaches > 1) {
                        const u32 probe = reaches + (fails - reaches) / 2;
                        u32 sum = 0;
#pragma unroll
                        for (int i = 0; i < FEW / 32; ++i) sum += candidate[i] >= probe ? candidate[i] : 0;
                        if (below + warp_sum_u32(sum) >= wanted) reaches = probe;
                        else fails = probe;
                    }
                    if (lane == 0) answer = reaches;
                }
                __syncthreads();
                reaches = answer;
            }
            threshold = reaches;
        }
        u32* const words = a.selected + u64(row) * a.words;
#pragma unroll
        for (int j = 0; j < VALUES / 4; ++j) {
            const u32 at = (j * THREADS + threadIdx.x) * 4;
            u32 bits = 0;
#pragma unroll
            for (int e = 0; e < 4; ++e) bits |= u32(mass[j * 4 + e] >= threshold) << e;
            bits <<= lane % 8 * 4;
#pragma unroll
            for (int step = 1; step < 8; step *= 2) bits |= __shfl_xor_sync(FULL_WARP, bits, step);
            if (lane % 8 == 0 && at < a.words * 32) words[at / 32] = bits;
        }
        if (threadIdx.x == 0) a.thresholds[row] = threshold;
        __syncthreads();
    }
}

// A row that is mixed from captured heads of one layer. Mirrors `JOB_WORDS` in row_mixer.rs.
struct MixJob {
    u32 row;      // of the output
    u32 captured; // first head's row of the captured ones
    u32 terms, num_terms;
    u32 length;
    u32 adds;     // whether an earlier layer has written the row
    u32 unused[2];
};

struct MixTerm {
    u32 head;
    float weight;
};

// rows[job.row] (+)= sum of weight * probability over the terms' heads, from captured scores in powers of two and their statistics.
// Blocks are [pieces of 1,024 positions, jobs]; strides are multiples of 4.
extern "C" __global__ void __launch_bounds__(256) mix_rows(const float* scores, const float2* statistics, const MixJob* jobs,
                                                           const MixTerm* terms, float* rows, u32 score_stride, u32 row_stride) {
    begin_kernel();
    const MixJob job = jobs[blockIdx.y];
    const u32 at = (blockIdx.x * 256 + threadIdx.x) * 4;
    if (at >= job.length) return;
    float4* const out = (float4*)(rows + u64(job.row) * row_stride + at);
    float4 sum = job.adds ? *out : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
    for (u32 t = 0; t < job.num_terms; ++t) {
        const MixTerm term = terms[job.terms + t];
        const u64 head = job.captured + term.head;
        const float2 s = statistics[head];
        const float4 score = *(const float4*)(scores + head * score_stride + at);
        const float scale = term.weight / s.y;
        sum.x = fmaf(exp2_fast(score.x - s.x), scale, sum.x);
        sum.y = fmaf(exp2_fast(score.y - s.x), scale, sum.y);
        sum.z = fmaf(exp2_fast(score.z - s.x), scale, sum.z);
        sum.w = fmaf(exp2_fast(score.w - s.x), scale, sum.w);
    }
    *out = sum;
}

// A row of means: a round's rows, summed step by step, and selected from after each. Mirrors `MEAN_WORDS` in round_sums.rs.
struct MeanRow {
    float* sum;  // [context, rounded up to 4]
    u32 row;     // of the mixed rows: this step's, and then what is selected from
    u32 context; // positions that count
    u32 length;  // of the row
    u32 steps;   // of the round before this one
    float share; // what a neighbour counts
    u32 reach;   // neighbours to either side
};

// sum (+)= row. Blocks are [pieces of 1,024 positions, means].
extern "C" __global__ void __launch_bounds__(256) add_to_means(const MeanRow* means, const float* rows, u32 row_stride) {
    begin_kernel();
    const MeanRow mean = means[blockIdx.y];
    const u32 at = (blockIdx.x * 256 + threadIdx.x) * 4;
    if (at >= mean.context) return;
    float4 sum = *(const float4*)(rows + u64(mean.row) * row_stride + at);
    if (mean.steps > 0) {
        const float4 before = *(const float4*)(mean.sum + at);
        sum.x += before.x, sum.y += before.y, sum.z += before.z, sum.w += before.w;
    }
    *(float4*)(mean.sum + at) = sum;
}

// row = the sum, spread, scaled so that its mass is at most 1; zeros past the context. Blocks are [pieces of 256 positions, means].
extern "C" __global__ void __launch_bounds__(256) spread_means(const MeanRow* means, float* rows, u32 row_stride) {
    begin_kernel();
    const MeanRow mean = means[blockIdx.y];
    const u32 at = blockIdx.x * 256 + threadIdx.x;
    if (at >= mean.length) return;
    float total = 0.0f;
    if (at < mean.context) {
        float weight = 1.0f, gain = 1.0f;
        total = mean.sum[at];
        for (u32 d = 1; d <= mean.reach; ++d) {
            weight *= mean.share;
            gain += 2.0f * weight;
            if (at + d < mean.context) total = fmaf(weight, mean.sum[at + d], total);
            if (at >= d) total = fmaf(weight, mean.sum[at - d], total);
        }
        total /= gain * float(mean.steps + 1);
    }
    rows[u64(mean.row) * row_stride + at] = total;
}
