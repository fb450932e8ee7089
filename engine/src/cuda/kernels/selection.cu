// Masks on the device: mixtures of attention rows, means of a round, top-p selection, packed bits.
//
// Top-p works on fixed-point masses, units of 2^-31: sums are exact and free of order, so the mass condition holds exactly in
// this arithmetic and a row's selection never depends on how it was summed or searched. A row is read from memory once, into
// registers, while the next one is copied into shared memory; the threshold is sought between its neighbours, where a line between the
// masses at both would have it, until few entries can be left between them. Those are tried at many thresholds at a time.
//
// Options: THREADS and VALUES (entries per thread, a multiple of 4): rows of up to THREADS * VALUES entries.

#ifndef THREADS
#define THREADS 1024
#endif
#ifndef VALUES
#define VALUES 32
#endif
#define WARPS (THREADS / 32)
// Entries that are collected.
#define FEW 1024
// Thresholds at which those are tried at a time, and those of a warp.
#define PROBES 64
#define WARP_PROBES (PROBES / WARPS)

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
    u32 num_rows, stride, words; // multiples of 4: stride, words
};

__device__ __forceinline__ u32 warp_sum_u32(u32 x) { return __reduce_add_sync(FULL_WARP, x); }

// A sum over the block; `scratch` alternates between calls so that one barrier serves.
__device__ __forceinline__ u32 block_sum(u32 x, u32* scratch) {
    x = warp_sum_u32(x);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    return warp_sum_u32(threadIdx.x % 32 < WARPS ? scratch[threadIdx.x % 32] : 0);
}

// sum += mass, if it is at or above the threshold. Additions and comparisons of integers share a half-wide pipe, products have one of
// their own: so it is the product with gridDim.z, which is 1, as the compiler does not know.
__device__ __forceinline__ void add_reaching(u32& sum, u32 mass, u32 threshold) {
    asm("{\n.reg .pred reaches;\nsetp.ge.u32 reaches, %1, %2;\n@reaches mad.lo.u32 %0, %1, %3, %0;\n}" : "+r"(sum) : "r"(mass), "r"(threshold), "r"(gridDim.z));
}

// Stores a mass that lies between the bounds, and moves on to the next place; without a branch, since hardly any does.
__device__ __forceinline__ void collect(u32& place, u32 mass, u32 reaches, u32 fails) {
    asm volatile("{\n.reg .pred between;\nsetp.lt.u32 between, %2, %3;\n@between st.shared.u32 [%0], %1;\n@between add.u32 %0, %0, 4;\n}"
                 : "+r"(place)
                 : "r"(mass), "r"(mass - reaches), "r"(fails - reaches)
                 : "memory");
}

// What lies between a < b by ratio, at a share of the way: that of their float bit patterns, which are nearly logarithms.
__device__ __forceinline__ u32 between(u32 a, u32 b, float share) {
    const u32 from = __float_as_uint(float(a)), to = __float_as_uint(float(b));
    const u32 m = u32(__uint_as_float(from + u32(share * float(to - from))));
    return min(max(m, a + 1), b - 1);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) top_p(const TopPArgs a) {
    begin_kernel();
    extern __shared__ __align__(16) float ahead[]; // [THREADS * VALUES]; each warp reads only what it copied
    __shared__ u32 scratch[2][PROBES], few[FEW], few_count;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    // A warp has every WARPS-th run of 128 entries: a lane copies four neighbours of each run, and takes every 32nd.
    auto fetch = [&](u32 row) {
        if (row < a.num_rows) {
            const u32 length = a.specs[row].length;
            const float* const from = a.rows + u64(row) * a.stride;
#pragma unroll
            for (int j = 0; j < VALUES / 4; ++j) {
                const u32 at = (j * THREADS + threadIdx.x) * 4;
                copy_async_part(shared_address(ahead + at), from + at, at < length ? min(length - at, 4) * 4 : 0);
            }
        }
        copy_commit();
    };
    fetch(blockIdx.x);
    u32 turn = 0;
    for (u32 row = blockIdx.x; row < a.num_rows; row += gridDim.x) {
        copy_wait<0>();
        __syncwarp();
        const u32 length = a.specs[row].length;
        const float p = a.specs[row].p;
        u32 mass[VALUES];
        u32 total = 0;
#pragma unroll
        for (int i = 0; i < VALUES; ++i) {
            // NaN and negative entries weigh nothing.
            mass[i] = __float2uint_rn(__saturatef(ahead[(i / 4 * WARPS + warp) * 128 + i % 4 * 32 + lane]) * UNIT);
            total += mass[i];
        }
        if (threadIdx.x == 0) few_count = 0;
        __syncwarp();
        fetch(row + gridDim.x);
        total = block_sum(total, scratch[turn ^= 1]);
        const u32 wanted = u32(min(u64(ceil(double(p) * double(total))), u64(total)));
        // Invariant: mass at or above `reaches` is at least `wanted`, mass at or above `fails` is less.
        u32 reaches = 1, fails = NONE, above = total, below = 0; // the masses at both
        u32 probe = max(total / max(length, 1u), 2u), stride = 4;
        auto weigh = [&](u32 threshold) {
            u32 sum[2] = {0, 0};
#pragma unroll
            for (int i = 0; i < VALUES; ++i) add_reaching(sum[i % 2], mass[i], threshold);
            return block_sum(sum[0] + sum[1], scratch[turn ^= 1]);
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
            while (fails - reaches > 1 && above - below >= u64(FEW + 1) * reaches) {
                // A little further than the line has it, so that both bounds come near; where that did not help, the middle.
                const float line = __fdividef(float(above - wanted), float(above - below));
                const u32 width = __float_as_uint(float(fails)) - __float_as_uint(float(reaches));
                const u32 at = between(reaches, fails, halved ? line + (line < 0.5f ? 0.0625f : -0.0625f) : 0.5f), m = weigh(at);
                if (m >= wanted) reaches = at, above = m;
                else fails = at, below = m;
                halved = !halved || __float_as_uint(float(fails)) - __float_as_uint(float(reaches)) <= width / 2;
            }
            if (fails - reaches > 1) {
                u32 own = 0;
#pragma unroll
                for (int i = 0; i < VALUES; ++i) own += mass[i] - reaches < fails - reaches;
                // There is room for all: so many could not weigh what lies between the bounds.
                if (own > 0) {
                    u32 place = shared_address(few + atomicAdd(&few_count, own));
#pragma unroll
                    for (int i = 0; i < VALUES; ++i) collect(place, mass[i], reaches, fails);
                }
                __syncthreads();
                const u32 count = few_count;
                while (fails - reaches > 1) {
                    // Thresholds that rise from the first one that is not known to reach.
                    const u32 gap = fails - reaches - 1;
                    auto probe_at = [&](u32 number) { return reaches + 1 + u32(u64(number) * gap / PROBES); };
                    u32 sum[WARP_PROBES] = {};
#pragma unroll 1
                    for (u32 i = lane; i < count; i += 32) {
                        const u32 candidate = few[i];
#pragma unroll
                        for (int q = 0; q < WARP_PROBES; ++q) add_reaching(sum[q], candidate, probe_at(warp * WARP_PROBES + q));
                    }
                    u32* const sums = scratch[turn ^= 1];
#pragma unroll
                    for (int q = 0; q < WARP_PROBES; ++q) {
                        sum[q] = warp_sum_u32(sum[q]);
                        if (lane == 0) sums[warp * WARP_PROBES + q] = sum[q];
                    }
                    __syncthreads();
                    u32 reaching = 0;
#pragma unroll
                    for (int q = 0; q < PROBES; q += 32) reaching += __popc(__ballot_sync(FULL_WARP, below + sums[q + lane] >= wanted));
                    const u32 last = reaching > 0 ? probe_at(reaching - 1) : reaches;
                    if (reaching < PROBES) fails = probe_at(reaching);
                    reaches = last;
                }
            }
            threshold = reaches;
        }
        u32* const words = a.selected + u64(row) * a.words;
#pragma unroll
        for (int j = 0; j < VALUES / 4; ++j) {
            u32 bits[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) bits[e] = __ballot_sync(FULL_WARP, mass[j * 4 + e] >= threshold);
            const u32 word = (j * WARPS + warp) * 4;
            if (lane == 0 && word < a.words) *(uint4*)(words + word) = make_uint4(bits[0], bits[1], bits[2], bits[3]);
        }
        if (threadIdx.x == 0) a.thresholds[row] = threshold;
        __syncthreads();
    }
}

// A row that is mixed from captured heads of a group of layers. Mirrors `JOB_WORDS` in row_mixer.rs.
struct MixJob {
    u32 row;      // of the output
    u32 captured; // the group's row of its session's first head in its first layer
    u32 terms, num_terms;
    u32 length;
    u32 adds;     // whether an earlier group has written the row
    u32 unused[2];
};

struct MixTerm {
    u32 row; // from `captured` on
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
        const u64 row = job.captured + term.row;
        const float2 s = statistics[row];
        const float4 score = *(const float4*)(scores + row * score_stride + at);
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
