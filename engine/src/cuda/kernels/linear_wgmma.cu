// Products of many rows on Hopper: y = x · Wᵀ for up to ROWS rows of x a block, by warpgroup instructions (wgmma), to the last bit what
// linear.cu gives.
//
// Tensor cores read both operands from shared memory, 64 outputs and all rows of a block at once, and one thread keeps a ring of tiles
// filled by tensor copies (TMA), so that no operand passes through registers. A block walks through as many splits of the inputs together
// as the registers hold sums of: tiles of different splits are neighbours, and memory gives long runs faster. Sums are added in the splits'
// order. Products of few outputs would leave multiprocessors idle that way: the blocks of a cluster have a part of the splits each, and of
// all of them each adds up the sums of a part of the rows.
//
// An instruction adds 16 inputs at a time to its sum, as mma.sync does, with the same bits: `gpu check` compares them.
// Blocks of the same outputs are neighbours: their weights come from memory once.
//
// Options: COLUMNS (rows of x per instruction) and COLUMN_BLOCKS, the instructions that cover a block's rows; GROUPS of warps, with 64
// outputs each; CLUSTER, the blocks that share splits; TOGETHER, the splits that are walked through at a time, in a cluster all of a
// block's; STAGES of the ring; BLOCKS that share a multiprocessor; EPILOGUE.

#ifndef COLUMNS
#define COLUMNS 32
#endif
#ifndef COLUMN_BLOCKS
#define COLUMN_BLOCKS 1
#endif
#ifndef GROUPS
#define GROUPS 2
#endif
#ifndef CLUSTER
#define CLUSTER 1
#endif
#ifndef TOGETHER
#define TOGETHER 2
#endif
#ifndef STAGES
#define STAGES 4
#endif
#ifndef BLOCKS
#define BLOCKS 1
#endif
#ifndef EPILOGUE
#define EPILOGUE 0
#endif

#define ROWS (COLUMNS * COLUMN_BLOCKS)
#define OWN_SPLITS (SPLITS / CLUSTER)
#define THREADS (GROUPS * 128)
#define BLOCK_OUTPUTS (GROUPS * 64)
// 128 bytes of inputs of each output and row.
#define STAGE_BYTES ((BLOCK_OUTPUTS + ROWS) * 128)
// Outputs of a block per matrix.
#define OWN_OUTPUTS (BLOCK_OUTPUTS / (EPILOGUE == 2 ? 2 : 1))
// Rows whose sums meet in one block of a cluster.
#define RANK_ROWS (ROWS / CLUSTER)
#define PITCH (BLOCK_OUTPUTS + 4)
// Results per thread, and those that are worked on together.
#define RESULTS ((RANK_ROWS * OWN_OUTPUTS + THREADS - 1) / THREADS)
#define TURNS (RESULTS <= 16 ? RESULTS : 8)

// d[64 outputs][COLUMNS] += 16 inputs.
__device__ __forceinline__ void wgmma(float (&d)[COLUMNS / 2], u64 weights, u64 x) {
#if COLUMNS == 16
    WGMMA("16", NAMES_8, VALUES_8(0), "%8, %9", "1", weights, x);
#elif COLUMNS == 32
    WGMMA("32", NAMES_16, VALUES_16(0), "%16, %17", "1", weights, x);
#elif COLUMNS == 40
    WGMMA("40", NAMES_20, VALUES_20(0), "%20, %21", "1", weights, x);
#elif COLUMNS == 48
    WGMMA("48", NAMES_24, VALUES_24(0), "%24, %25", "1", weights, x);
#elif COLUMNS == 64
    WGMMA("64", NAMES_32, VALUES_32(0), "%32, %33", "1", weights, x);
#elif COLUMNS == 80
    WGMMA("80", NAMES_40, VALUES_40(0), "%40, %41", "1", weights, x);
#else
#error "no instruction for so many columns"
#endif
}

// A step through a block's tiles: some splits together, then the next.
struct Step {
    u32 number, split, turn, tile;

    __device__ __forceinline__ void advance(u32 input_tiles) {
        ++number;
        if (++tile == split + turn * SPLITS + TOGETHER) tile = split + ++turn * SPLITS;
        if (tile < input_tiles) return;
        split += TOGETHER;
        turn = 0;
        tile = split;
    }
};

// Clusters: blocks that run at the same time and read each other's shared memory. `cluster_arrive` tells the others that what this
// thread wrote is there, and what it reads of theirs is read; `cluster_wait` waits until all that have not ended have arrived.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }

__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Where the same place in the shared memory of block `rank` of the cluster is.
__device__ __forceinline__ u32 address_in(u32 rank, const void* place) {
    u32 there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(place)), "r"(rank));
    return there;
}

__device__ __forceinline__ float4 load_from(u32 rank, const float4* place) {
    float4 v;
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address_in(rank, place)) : "memory");
    return v;
}

#if CLUSTER > 1
#define CLUSTERED __cluster_dims__(1, CLUSTER, 1)
#else
#define CLUSTERED
#endif

// Mirrors `WgmmaArgs` in linear_wgmma.rs.
struct WgmmaArgs {
    TensorMap x;          // boxes of ROWS rows
    TensorMap weights[3]; // of OWN_OUTPUTS rows
    LinearArgs product;
};

extern "C" __global__ void CLUSTERED __launch_bounds__(THREADS, BLOCKS) linear_wgmma(const __grid_constant__ WgmmaArgs args) {
    extern __shared__ __align__(1024) u8 shared[];
    __shared__ u64 filled_barriers[STAGES], free_barriers[STAGES];
    let_next_start();
    const LinearArgs& a = args.product;
    const u32 group = threadIdx.x / 128, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    // Row groups first, so that those of the same outputs run side by side.
    const u32 first_row = blockIdx.x * ROWS, tile = blockIdx.y / CLUSTER, rank = blockIdx.y % CLUSTER;
    const u32 rows = min(a.rows - first_row, ROWS);
    const u32 number = EPILOGUE == 2 ? 0 : number_of(a, tile);
    // By selection: an index would copy the arguments to local memory.
    const Projection p = number == 0 ? a.projections[0] : number == 1 ? a.projections[1] : a.projections[2];
    const u32 first_out = (tile - p.first_tile) * OWN_OUTPUTS;

    const u32 input_tiles = (a.inputs + TILE_INPUTS - 1) / TILE_INPUTS;
    const u32 first_split = rank * OWN_SPLITS;
    const u32 ring = shared_address(shared), filled = shared_address(filled_barriers), vacant = shared_address(free_barriers);
    if (threadIdx.x == 0) {
        for (u32 s = 0; s < STAGES; ++s) {
            barrier_init(filled + s * 8, 1);
            barrier_init(vacant + s * 8, THREADS / 32);
        }
        barriers_ready();
    }
    __syncthreads();

    // The first thread copies. Weights stand still; x is what the kernel before writes.
    const u32 own_tiles = tiles_of(first_split, OWN_SPLITS, input_tiles);
    auto fetch_weights = [&](const Step& step) {
        const u32 stage = step.number % STAGES, to = ring + stage * STAGE_BYTES, input = step.tile * TILE_INPUTS;
        barrier_expect(filled + stage * 8, STAGE_BYTES);
        copy_tensor(to, args.weights[number], input, first_out, filled + stage * 8);
        if (EPILOGUE == 2) copy_tensor(to + OWN_OUTPUTS * 128, args.weights[1], input, first_out, filled + stage * 8);
    };
    auto fetch_x = [&](const Step& step) {
        const u32 stage = step.number % STAGES;
        copy_tensor(ring + stage * STAGE_BYTES + BLOCK_OUTPUTS * 128, args.x, step.tile * TILE_INPUTS, first_row, filled + stage * 8);
    };
    const Step first = {0, first_split, 0, first_split};
    Step ahead = first;
    if (threadIdx.x == 0)
        for (; ahead.number < min(STAGES, own_tiles); ahead.advance(input_tiles)) fetch_weights(ahead);
    wait_for_previous();
    if (threadIdx.x == 0)
        for (ahead = first; ahead.number < min(STAGES, own_tiles); ahead.advance(input_tiles)) fetch_x(ahead);

    float sums[TOGETHER][COLUMN_BLOCKS][COLUMNS / 2], total[COLUMN_BLOCKS][COLUMNS / 2];
#pragma unroll
    for (int c = 0; c < COLUMN_BLOCKS; ++c)
#pragma unroll
        for (int i = 0; i < COLUMNS / 2; ++i) {
            total[c][i] = 0.0f;
#pragma unroll
            for (int k = 0; k < TOGETHER; ++k) sums[k][c][i] = 0.0f;
        }
    u32 done = 0;
    // The products of one more tile are done in this warp; when they are in all, its stage is filled again.
    auto release = [&] {
        const u32 stage = done % STAGES, barrier = vacant + stage * 8;
        if (lane == 0) barrier_arrive(barrier);
        if (threadIdx.x == 0 && ahead.number < own_tiles) {
            barrier_wait(barrier, done / STAGES % 2);
            fetch_weights(ahead);
            fetch_x(ahead);
            ahead.advance(input_tiles);
        }
        __syncwarp();
        ++done;
    };
    u32 begun = 0;
    auto add_tile = [&](float (&sum)[COLUMN_BLOCKS][COLUMNS / 2]) {
        const u32 s = begun % STAGES, stage = ring + s * STAGE_BYTES;
        barrier_wait(filled + s * 8, begun / STAGES % 2);
        const u32 weights = stage + group * (64 * 128), columns = stage + BLOCK_OUTPUTS * 128;
        wgmma_begin();
#pragma unroll
        for (int k = 0; k < TILE_INPUTS / 16; ++k)
#pragma unroll
            for (int c = 0; c < COLUMN_BLOCKS; ++c)
                wgmma(sum[c], matrix_at(weights + k * 32), matrix_at(columns + c * (COLUMNS * 128) + k * 32));
        wgmma_commit();
        wgmma_wait<1>();
        if (begun++ > done) release();
    };
    for (u32 split = first_split; split < first_split + OWN_SPLITS; split += TOGETHER) {
        for (u32 t = split; t < input_tiles; t += SPLITS)
#pragma unroll
            for (int k = 0; k < TOGETHER; ++k)
                if (t + k < input_tiles) add_tile(sums[k]);
        wgmma_wait<0>();
#pragma unroll
        for (int k = 0; k < TOGETHER; ++k)
#pragma unroll
            for (int c = 0; c < COLUMN_BLOCKS; ++c) hold(sums[k][c]);
        if (begun > done) release();
        if (CLUSTER == 1) {
#pragma unroll
            for (int k = 0; k < TOGETHER; ++k)
#pragma unroll
                for (int c = 0; c < COLUMN_BLOCKS; ++c)
#pragma unroll
                    for (int i = 0; i < COLUMNS / 2; ++i) {
                        total[c][i] += sums[k][c][i];
                        sums[k][c][i] = 0.0f;
                    }
        }
    }
    // What sums are added to is far away: it is on its way while they come together.
    auto result = [&](u32 turn, int i) {
        const u32 n = turn + i * THREADS, own = n / OWN_OUTPUTS, row = rank * RANK_ROWS + own, out = first_out + n % OWN_OUTPUTS;
        return own < RANK_ROWS && row < rows && out < p.outputs ? product_at(a, number, first_row + row, out) : ~0ull;
    };
    float other[TURNS];
    auto load_others = [&](u32 turn) {
#pragma unroll
        for (int i = 0; i < TURNS; ++i) {
            const u64 at = result(turn, i);
            other[i] = at == ~0ull ? 0.0f : ((const float*)a.out)[at];
        }
    };
    if (EPILOGUE == 1) load_others(threadIdx.x);
    static_assert(RANK_ROWS % 2 == 0, "whole warps meet the cluster");
    // Nobody reads the ring any more: sums take its place, [splits that are apart][rows][outputs], padded against bank conflicts.
    __syncthreads();
    float* const parts = (float*)shared;
    auto hand_in = [&](float (&sum)[COLUMN_BLOCKS][COLUMNS / 2], u32 part) {
#pragma unroll
        for (int c = 0; c < COLUMN_BLOCKS; ++c)
#pragma unroll
            for (int i = 0; i < COLUMNS / 2; ++i) {
                const u32 row = c * COLUMNS + i / 4 * 8 + lane % 4 * 2 + i % 2;
                const u32 out = group * 64 + warp * 16 + lane / 4 + i % 4 / 2 * 8;
                parts[(part * ROWS + row) * PITCH + out] = sum[c][i];
            }
    };
    // Rows of this block's share, and where their sums are.
    float* sums_at = parts;
#if CLUSTER == 1
    hand_in(total, 0);
#else
#pragma unroll
    for (int k = 0; k < TOGETHER; ++k) hand_in(sums[k], k);
    cluster_arrive();
    cluster_wait();
    sums_at = parts + TOGETHER * ROWS * PITCH;
    for (u32 i = threadIdx.x; i < RANK_ROWS * (BLOCK_OUTPUTS / 4); i += THREADS) {
        const u32 own = i / (BLOCK_OUTPUTS / 4), o = i % (BLOCK_OUTPUTS / 4) * 4;
        float4 part[SPLITS], sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int k = 0; k < SPLITS; ++k)
            part[k] = load_from(k / TOGETHER, (const float4*)(parts + (k % TOGETHER * ROWS + rank * RANK_ROWS + own) * PITCH + o));
#pragma unroll
        for (int k = 0; k < SPLITS; ++k) sum = make_float4(sum.x + part[k].x, sum.y + part[k].y, sum.z + part[k].z, sum.w + part[k].w);
        *(float4*)(sums_at + own * PITCH + o) = sum;
    }
    cluster_arrive();
#endif
    __syncthreads();
    for (u32 turn = threadIdx.x; turn < RANK_ROWS * OWN_OUTPUTS; turn += THREADS * TURNS) {
        if (EPILOGUE == 1 && turn != threadIdx.x) load_others(turn);
#pragma unroll
        for (int i = 0; i < TURNS; ++i) {
            const u32 n = turn + i * THREADS, o = n % OWN_OUTPUTS;
            const u64 at = result(turn, i);
            if (at == ~0ull) continue;
            // Gate and up outputs meet here, too.
            const float* const sum = sums_at + n / OWN_OUTPUTS * PITCH + o;
            store_product<EPILOGUE>(a, p, at, first_out + o, sum[0], EPILOGUE == 2 ? sum[OWN_OUTPUTS] : EPILOGUE == 1 ? other[i] : 0.0f);
        }
    }
#if CLUSTER > 1
    // Nobody reads this block's memory any more.
    __syncwarp();
    cluster_wait();
#endif
}
