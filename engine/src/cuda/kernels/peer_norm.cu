// The sum of a product over two GPUs of a split model, and its norm, in one kernel.
//
// The product itself sends every element to both ranks as it has it, to memory that holds NOT_SENT before and after: an element that
// is something else is there. So it needs no word that tells of it, nor the end of the product: its way over the link begins while other
// blocks still multiply, and what a kernel's end waits for, that the other GPU has answered every store, happens beside the norm.
//
// Sums take turns between two halves of that memory. A rank that sends for sum n + 2 has ended sum n + 1, for which it needed something
// that the other rank sent after its sum n, which left its half empty.

// How often a block looks before it asks whether the other rank is still there: some milliseconds.
#define PATIENCE 4096

struct PeerNormArgs {
    float* x;             // [rows, width]: the sum goes there
    const float* weight;  // [width]
    half_bits* out;       // [rows, width]: its norm
    u32* parts[2];        // by rank: [2 halves, half]
    u32* state;           // this rank's own: the turn, and blocks that are through with this sum
    const u32* abandoned; // on the host: not 0 once a rank has gone
    u32 half, width, rank; // width: a multiple of 4
    float eps;
    u32 rows_by_lane;     // as `RowNorm::store` wants it
};

__device__ __forceinline__ uint4 load_volatile(const uint4* p) {
    uint4 y;
    asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(y.x), "=r"(y.y), "=r"(y.z), "=r"(y.w) : "l"(p) : "memory");
    return y;
}

__device__ __forceinline__ bool has_come(uint4 v) {
    return v.x != NOT_SENT && v.y != NOT_SENT && v.z != NOT_SENT && v.w != NOT_SENT;
}

__device__ __forceinline__ float4 floats_of(uint4 v) {
    return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w));
}

// One block per row. It starts when what comes before the product has ended.
extern "C" __global__ void __launch_bounds__(NORM_THREADS) peer_norm(const PeerNormArgs a) {
    RowNorm norm(a.weight, a.width);
    const u64 row = u64(blockIdx.x) * norm.fours, first = u64(load_volatile(a.state) % 2 * a.half) / 4 + row;
    uint4* const parts[2] = {(uint4*)a.parts[0] + first, (uint4*)a.parts[1] + first};
    float4* const x = (float4*)a.x + row;
    // One thread looks out for this rank's own part, so that the product is not disturbed.
    if (threadIdx.x == 0) {
        const u32* const own = (const u32*)(a.rank == 0 ? parts[0] : parts[1]);
        for (u32 looks = 1; load_volatile(own) == NOT_SENT; ++looks)
            if (looks % PATIENCE == 0 && load_volatile(a.abandoned)) break;
    }
    __syncthreads();
    let_next_start();
    // Waits for fours number `first_four` and every NORM_THREADS-th after it, adds them up and empties their places.
    auto add_up = [&](auto& sums, u32 first_four) {
        constexpr u32 count = sizeof(sums) / sizeof(float4);
        uint4 of_rank[2][count];
        bool missing = true;
        for (u32 looks = 1; missing; ++looks) {
#pragma unroll
            for (u32 r = 0; r < 2; ++r)
#pragma unroll
                for (u32 k = 0; k < count; ++k)
                    if (first_four + k * NORM_THREADS < norm.fours) of_rank[r][k] = load_volatile(parts[r] + first_four + k * NORM_THREADS);
            missing = false;
#pragma unroll
            for (u32 r = 0; r < 2; ++r)
#pragma unroll
                for (u32 k = 0; k < count; ++k)
                    if (first_four + k * NORM_THREADS < norm.fours) missing |= !has_come(of_rank[r][k]);
            if (looks % PATIENCE == 0 && load_volatile(a.abandoned)) break;
        }
#pragma unroll
        for (u32 k = 0; k < count; ++k) {
            const u32 i = first_four + k * NORM_THREADS;
            if (i >= norm.fours) continue;
            const float4 v = floats_of(of_rank[0][k]), w = floats_of(of_rank[1][k]);
            x[i] = sums[k] = make_float4(v.x + w.x, v.y + w.y, v.z + w.z, v.w + w.w);
            parts[0][i] = parts[1][i] = make_uint4(NOT_SENT, NOT_SENT, NOT_SENT, NOT_SENT);
        }
    };
    add_up(norm.kept, norm.place(0));
    for (u32 i = norm.place(KEPT); i < norm.fours; i += NORM_THREADS) {
        float4 beyond[1];
        add_up(beyond, i);
    }
    norm.store(x, blockIdx.x, a.out, a.rows_by_lane, a.eps);
    // The end of this kernel is to tell of the product's.
    wait_for_previous();
    // Every block has read the turn when the last of them comes here: it has been through `store`.
    if (threadIdx.x == 0 && atomicAdd(a.state + 1, 1) == gridDim.x - 1) {
        a.state[1] = 0;
        a.state[0] += 1;
    }
}
