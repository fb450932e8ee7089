// Products of many rows on Hopper: y = x · Wᵀ for up to ROWS rows of x a block, by warpgroup instructions (wgmma), to the last bit what
// linear.cu gives.
//
// Tensor cores read both operands from shared memory, 64 outputs and all rows of a block at once, and one thread keeps a ring of tiles
// filled by tensor copies (TMA), so that no operand passes through registers. A block walks through as many splits of the inputs together
// as the registers hold sums of: tiles of different splits are neighbours, and memory gives long runs faster. Sums are added in the splits'
// order. Products of few outputs would leave multiprocessors idle that way: the blocks of a cluster have a part of the splits each, and
// each goes on from what the one before came to; the last one stores.
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
#define PITCH (BLOCK_OUTPUTS + 4)
// Most results of a product of which the L2 cache keeps enough for the next kernel.
#define RESULTS_KEPT (1 << 21)
// Rows from one of a thread's results to the next, and how many there are.
#define ROW_STEP (THREADS / OWN_OUTPUTS)
#define RESULTS (ROWS / ROW_STEP)
// Whether registers hold all sums of a cluster's block and what they are added to.
#define OTHERS_EARLY (CLUSTER > 1 && (TOGETHER + 1) * (ROWS / 2) <= 200)

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
    const LinearArgs& a = args.product;
    // A sum's `peer_norm` starts when what comes before this kernel has ended.
    const bool sends = EPILOGUE != 2 && a.sending.own != nullptr;
    if (!sends) let_next_start();
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
    // Weights leave the L2 cache first, so that what kernels hand each other stays, unless the results are too many for it anyway.
    const bool once = u64(a.rows) * a.out_stride < RESULTS_KEPT;
    const u64 policy = read_once();
    auto copy_weights = [&](u32 to, const TensorMap& map, u32 input, u32 barrier) {
        if (once)
            copy_tensor(to, map, input, first_out, barrier, policy);
        else
            copy_tensor(to, map, input, first_out, barrier);
    };
    auto fetch_weights = [&](const Step& step) {
        const u32 stage = step.number % STAGES, to = ring + stage * STAGE_BYTES, input = step.tile * TILE_INPUTS;
        barrier_expect(filled + stage * 8, STAGE_BYTES);
        copy_weights(to, args.weights[number], input, filled + stage * 8);
        if (EPILOGUE == 2) copy_weights(to + OWN_OUTPUTS * 128, args.weights[1], input, filled + stage * 8);
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
    if (sends) let_next_start();
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
    // A thread's results: of one output, in every ROW_STEP-th row.
    const u32 own_out = threadIdx.x % OWN_OUTPUTS, own_row = threadIdx.x / OWN_OUTPUTS, out = first_out + own_out;
    u64 first_result = product_at(a, number, first_row + own_row, out);
    auto is_result = [&](int i) { return own_row + i * ROW_STEP < rows && out < p.outputs; };
    auto result = [&](int i) { return first_result + u64(i * ROW_STEP) * a.out_stride; };
    static_assert(ROWS % ROW_STEP == 0, "threads have as many results each");
    float other[RESULTS];
    auto load_others = [&] {
#pragma unroll
        for (int i = 0; i < RESULTS; ++i) other[i] = is_result(i) ? ((const float*)a.out)[result(i)] : 0.0f;
    };
    // What they are added to is far away: it is on its way while sums come together.
    if (EPILOGUE == 1 && OTHERS_EARLY && rank == CLUSTER - 1) load_others();
    // Nobody reads the ring any more: sums take its place.
    __syncthreads();
#if CLUSTER > 1
    // Splits are in the blocks' order, and a thread of the next block has sums of the same rows and outputs.
    float4* const handed_on = (float4*)shared + threadIdx.x;
    auto add_own = [&](int c) {
#pragma unroll
        for (int k = 0; k < TOGETHER; ++k)
#pragma unroll
            for (int i = 0; i < COLUMNS / 2; ++i) total[c][i] += sums[k][c][i];
    };
    if (rank == 0)
#pragma unroll
        for (int c = 0; c < COLUMN_BLOCKS; ++c) add_own(c);
#pragma unroll
    for (int r = 0; r < CLUSTER - 1; ++r) {
        if (rank == r)
#pragma unroll
            for (int c = 0; c < COLUMN_BLOCKS; ++c)
#pragma unroll
                for (int i = 0; i < COLUMNS / 2; i += 4)
                    handed_on[(c * COLUMNS / 8 + i / 4) * THREADS] = make_float4(total[c][i], total[c][i + 1], total[c][i + 2], total[c][i + 3]);
        cluster_arrive();
        cluster_wait();
        if (rank == r + 1)
#pragma unroll
            for (int c = 0; c < COLUMN_BLOCKS; ++c) {
#pragma unroll
                for (int i = 0; i < COLUMNS / 2; i += 4) {
                    const float4 v = load_from(r, handed_on + (c * COLUMNS / 8 + i / 4) * THREADS);
                    total[c][i] = v.x, total[c][i + 1] = v.y, total[c][i + 2] = v.z, total[c][i + 3] = v.w;
                }
                add_own(c);
            }
    }
    // Nobody reads the memory of a block that has ended.
    cluster_arrive();
    if (rank < CLUSTER - 1) return cluster_wait();
#endif
    // [rows][outputs], padded against bank conflicts: whole lines leave from there, and gate and up outputs meet.
    float* const parts = (float*)shared;
#pragma unroll
    for (int c = 0; c < COLUMN_BLOCKS; ++c)
#pragma unroll
        for (int i = 0; i < COLUMNS / 2; ++i) {
            const u32 row = c * COLUMNS + i / 4 * 8 + lane % 4 * 2 + i % 2;
            parts[row * PITCH + group * 64 + warp * 16 + lane / 4 + i % 4 / 2 * 8] = total[c][i];
        }
    const Biases biases = biases_of<EPILOGUE>(a, p, min(out, p.outputs - 1));
    const u32 half = EPILOGUE == 2 ? NONE : half_of(a.sending);
    __syncthreads();
    if (EPILOGUE == 1 && !OTHERS_EARLY) load_others();
    // Where results go is worked out again: to keep it would take more registers than there are.
    asm volatile("" : "+l"(first_result));
#pragma unroll
    for (int i = 0; i < RESULTS; ++i) {
        if (!is_result(i)) continue;
        const float* const sum = parts + (own_row + i * ROW_STEP) * PITCH + own_out;
        store_biased<EPILOGUE>(a, biases, result(i), sum[0], EPILOGUE == 2 ? sum[OWN_OUTPUTS] : EPILOGUE == 1 ? other[i] : 0.0f, half);
    }
#if CLUSTER > 1
    // The others have arrived long since.
    __syncwarp();
    cluster_wait();
#endif
}
