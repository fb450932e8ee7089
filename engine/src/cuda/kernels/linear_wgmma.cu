// Products of many rows on Hopper: y = x · Wᵀ for up to ROWS rows of x a block, by warpgroup instructions (wgmma), to the last bit what
// linear.cu gives.
//
// Tensor cores read both operands from shared memory, 64 outputs and all rows of a block at once, and one thread keeps a ring of tiles
// filled by tensor copies (TMA), so that no operand passes through registers. To ask for a tile takes as long as to multiply it: where
// registers allow, a warp does nothing else. A block walks through as many splits of the inputs together as the registers hold sums of:
// tiles of different splits are neighbours, and memory gives long runs faster. Sums are added in the splits' order. Products of few outputs
// would leave multiprocessors idle that way: the blocks of a cluster have a part of the splits each, and each goes on from what the one
// before came to; the last one stores.
//
// An instruction adds 16 inputs at a time to its sum, as mma.sync does, with the same bits: `gpu check` compares them.
// Blocks of the same outputs are neighbours: their weights come from memory once.
//
// Options: COLUMNS (rows of x per instruction) and COLUMN_BLOCKS, the instructions that cover a block's rows; GROUPS of warps, with 64
// outputs each; COPIER, whether a warp is there for copies alone; CLUSTER, the blocks that share splits; TOGETHER, the splits that are walked
// through at a time, in a cluster all of a block's; STAGES of the ring; BLOCKS that share a multiprocessor; EPILOGUE.

#ifndef COLUMNS
#define COLUMNS 32
#endif
#ifndef COLUMN_BLOCKS
#define COLUMN_BLOCKS 1
#endif
#ifndef GROUPS
#define GROUPS 2
#endif
#ifndef COPIER
#define COPIER 0
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
// Threads that multiply, and all.
#define MULTIPLIERS (GROUPS * 128)
#define THREADS (MULTIPLIERS + COPIER * 32)
#define BLOCK_OUTPUTS (GROUPS * 64)
// 128 bytes of inputs of each output and row.
#define STAGE_BYTES ((BLOCK_OUTPUTS + ROWS) * 128)
// Outputs of a block per matrix.
#define OWN_OUTPUTS (BLOCK_OUTPUTS / (EPILOGUE == 2 ? 2 : 1))
// A thread's sums.
#define SUMS (COLUMNS / 2)
// Most results of a product of which the L2 cache keeps enough for the next kernel.
#define RESULTS_KEPT (1 << 21)
// Whether registers hold all sums of a cluster's block and what they are added to.
#define OTHERS_EARLY (CLUSTER > 1 && (TOGETHER + 1) * (ROWS / 2) <= 200)

// d[64 outputs][COLUMNS] += 16 inputs.
__device__ __forceinline__ void wgmma(float (&d)[SUMS], u64 weights, u64 x) {
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

// Clusters: blocks that run at the same time and write to each other's shared memory. `cluster_arrive` tells the others that this block's
// barriers are there; `cluster_wait` waits until all have arrived.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }

__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Where the same place in the shared memory of block `rank` of the cluster is.
__device__ __forceinline__ u32 address_in(u32 rank, const void* place) {
    u32 there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(place)), "r"(rank));
    return there;
}

// Stores in another block's memory, whose barrier counts the bytes.
__device__ __forceinline__ void hand_on(u32 to, float4 v, u32 barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to), "f"(v.x), "f"(v.y),
                 "f"(v.z), "f"(v.w), "r"(barrier)
                 : "memory");
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
    [[maybe_unused]] __shared__ u64 handed_barrier;
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
            barrier_init(vacant + s * 8, MULTIPLIERS / 32);
        }
#if CLUSTER > 1
        barrier_init(shared_address(&handed_barrier), 1);
        barrier_expect(shared_address(&handed_barrier), ROWS * BLOCK_OUTPUTS * 4);
#endif
        barriers_ready();
    }
    __syncthreads();
    if (CLUSTER > 1) cluster_arrive();

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
    // Fills a stage again, when the products of its tile are done in all warps.
    auto refill = [&] {
        barrier_wait(vacant + ahead.number % STAGES * 8, (ahead.number / STAGES - 1) % 2);
        fetch_weights(ahead);
        fetch_x(ahead);
        ahead.advance(input_tiles);
    };
    // Weights stand still; x is what the kernel before writes.
    const bool copies = threadIdx.x == (COPIER ? MULTIPLIERS : 0);
    if (copies)
        for (; ahead.number < min(STAGES, own_tiles); ahead.advance(input_tiles)) fetch_weights(ahead);
    wait_for_previous();
    if (sends) let_next_start();
    if (copies)
        for (ahead = first; ahead.number < min(STAGES, own_tiles); ahead.advance(input_tiles)) fetch_x(ahead);
    if (COPIER && threadIdx.x >= MULTIPLIERS) {
        while (copies && ahead.number < own_tiles) refill();
        return;
    }

    float sums[TOGETHER][COLUMN_BLOCKS][SUMS], total[COLUMN_BLOCKS][SUMS];
#pragma unroll
    for (int c = 0; c < COLUMN_BLOCKS; ++c)
#pragma unroll
        for (int i = 0; i < SUMS; ++i) {
            total[c][i] = 0.0f;
#pragma unroll
            for (int k = 0; k < TOGETHER; ++k) sums[k][c][i] = 0.0f;
        }
    u32 done = 0;
    // The products of one more tile are done in this warp.
    auto release = [&] {
        if (lane == 0) barrier_arrive(vacant + done % STAGES * 8);
        if (!COPIER) {
            if (copies && ahead.number < own_tiles) refill();
            __syncwarp();
        }
        ++done;
    };
    u32 begun = 0;
    auto add_tile = [&](float (&sum)[COLUMN_BLOCKS][SUMS]) {
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
                    for (int i = 0; i < SUMS; ++i) {
                        total[c][i] += sums[k][c][i];
                        sums[k][c][i] = 0.0f;
                    }
        }
    }
    // A thread's sums are of two outputs, eight apart, and of two neighbours of every eight rows.
    const u32 own_out = group * 64 + warp * 16 + lane / 4, own_row = lane % 4 * 2;
    auto row_of = [&](int c, int i) { return c * COLUMNS + i / 4 * 8 + i % 2; };
    auto out_of = [&](int i) { return i % 4 / 2 * 8; };
#if EPILOGUE != 2
    const u64 first_result = product_at(a, number, first_row + own_row, first_out + own_out);
    auto is_result = [&](int c, int i) { return own_row + row_of(c, i) < rows && first_out + own_out + out_of(i) < p.outputs; };
    auto result = [&](int c, int i) { return first_result + row_of(c, i) * a.out_stride + out_of(i); };
    float other[COLUMN_BLOCKS][SUMS];
    auto load_others = [&] {
#pragma unroll
        for (int c = 0; c < COLUMN_BLOCKS; ++c)
#pragma unroll
            for (int i = 0; i < SUMS; ++i) other[c][i] = EPILOGUE == 1 && is_result(c, i) ? ((const float*)a.out)[result(c, i)] : 0.0f;
    };
    // What they are added to is far away: it is on its way while sums come together.
    if (OTHERS_EARLY && rank == CLUSTER - 1) load_others();
#endif
#if CLUSTER > 1
    // Splits are in the blocks' order, and a thread of the next block has sums of the same rows and outputs: they go to where it finds them, behind
    // its ring.
    float4* const handed = (float4*)(shared + STAGES * STAGE_BYTES) + threadIdx.x;
    auto place = [&](int c, int i) { return handed + (c * SUMS + i) / 4 * MULTIPLIERS; };
    if (rank > 0) barrier_wait(shared_address(&handed_barrier), 0);
#pragma unroll
    for (int c = 0; c < COLUMN_BLOCKS; ++c)
#pragma unroll
        for (int i = 0; i < SUMS; i += 4) {
            if (rank > 0) {
                const float4 v = *place(c, i);
                total[c][i] = v.x, total[c][i + 1] = v.y, total[c][i + 2] = v.z, total[c][i + 3] = v.w;
            }
#pragma unroll
            for (int j = i; j < i + 4; ++j)
#pragma unroll
                for (int k = 0; k < TOGETHER; ++k) total[c][j] += sums[k][c][j];
        }
    if (rank < CLUSTER - 1) {
        // Its barrier is there since long.
        cluster_wait();
        const u32 barrier = address_in(rank + 1, &handed_barrier);
#pragma unroll
        for (int c = 0; c < COLUMN_BLOCKS; ++c)
#pragma unroll
            for (int i = 0; i < SUMS; i += 4)
                hand_on(address_in(rank + 1, place(c, i)), make_float4(total[c][i], total[c][i + 1], total[c][i + 2], total[c][i + 3]), barrier);
        return;
    }
#endif
#if EPILOGUE == 2
    // Gate and up outputs meet in shared memory, [rows][outputs], padded against bank conflicts: nobody reads the ring any more.
    constexpr u32 pitch = BLOCK_OUTPUTS + 4, row_step = MULTIPLIERS / OWN_OUTPUTS;
    static_assert(ROWS % row_step == 0, "threads have as many results each");
    auto meet = [&] { asm volatile("bar.sync 1, %0;" ::"n"(MULTIPLIERS) : "memory"); };
    float* const parts = (float*)shared;
    meet();
#pragma unroll
    for (int c = 0; c < COLUMN_BLOCKS; ++c)
#pragma unroll
        for (int i = 0; i < SUMS; ++i) parts[(own_row + row_of(c, i)) * pitch + own_out + out_of(i)] = total[c][i];
    const u32 column = threadIdx.x % OWN_OUTPUTS, out = first_out + column;
    const Biases biases = biases_of<EPILOGUE>(a, p, min(out, p.outputs - 1));
    meet();
#pragma unroll
    for (u32 i = 0; i < ROWS / row_step; ++i) {
        const u32 row = threadIdx.x / OWN_OUTPUTS + i * row_step;
        if (row >= rows || out >= p.outputs) continue;
        const float* const sum = parts + row * pitch + column;
        store_biased<EPILOGUE>(a, biases, product_at(a, number, first_row + row, out), sum[0], sum[OWN_OUTPUTS], NONE);
    }
#else
    Biases biases[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) biases[i] = biases_of<EPILOGUE>(a, p, min(first_out + own_out + i * 8, p.outputs - 1));
    const u32 half = half_of(a.sending);
    if (!OTHERS_EARLY) load_others();
#pragma unroll
    for (int c = 0; c < COLUMN_BLOCKS; ++c)
#pragma unroll
        for (int i = 0; i < SUMS; ++i)
            if (is_result(c, i)) store_biased<EPILOGUE>(a, biases[i % 4 / 2], result(c, i), total[c][i], other[c][i], half);
#endif
}
