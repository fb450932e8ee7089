// Products of many rows with streamed weights: y = x · Wᵀ for up to ROWS rows of x a block, to the last bit what linear.cu gives.
// For GPUs that cannot run linear_wgmma.cu.
//
// In linear.cu, eight warps split an output's inputs between them, each holds its own sum, and x is loaded anew for every 16 or 32 outputs;
// beyond a few dozen rows that is what takes the time. Here a block has BLOCK_OUTPUTS outputs, and warps share rings of weights
// and x. One group of warps walks through the eight splits one after another and adds their sums in the same order. Products
// of few outputs would leave multiprocessors idle that way: they get blocks of fewer outputs, and four groups with two splits and a
// ring each, whose sums meet at the end. Instructions, and which inputs each of them takes, are linear.cu's too, so the bits are.
//
// Blocks of the same outputs are neighbours: their weights come from memory once.
//
// Options: COLUMN_TILES (8 rows of x each) per warp; OUTPUT_WARPS (32 outputs each) and GROUPS, 4 and 1 or 2 and 4; STAGES of a group's
// ring; EPILOGUE.

#ifndef COLUMN_TILES
#define COLUMN_TILES 4
#endif
#ifndef OUTPUT_WARPS
#define OUTPUT_WARPS 4
#endif
#ifndef GROUPS
#define GROUPS 1
#endif
#ifndef STAGES
#define STAGES 4
#endif
// 0: store f32 side by side; 1: add to f32; 2: silu(first) * second, 16-bit.
#ifndef EPILOGUE
#define EPILOGUE 0
#endif

#define ROW_WARPS 2
#define OWN_SPLITS (SPLITS / GROUPS)
#define GROUP_THREADS (OUTPUT_WARPS * ROW_WARPS * 32)
#define THREADS (GROUPS * GROUP_THREADS)
// Sums that a warp keeps apart: those of its group's splits, or one and what has come together.
#define KEPT (GROUPS == 1 ? 2 : OWN_SPLITS)
#define BLOCK_OUTPUTS (OUTPUT_WARPS * 32)
#define ROWS (ROW_WARPS * COLUMN_TILES * 8)
// 128 bytes of inputs of each output and row.
#define STAGE_BYTES ((BLOCK_OUTPUTS + ROWS) * 128)
#define MATRICES (EPILOGUE == 2 ? 2 : 1)
// Outputs of a block per matrix.
#define OWN_OUTPUTS (BLOCK_OUTPUTS / MATRICES)

// Where 16 bytes of a row of a stage lie, so that sixteen lanes which read 8 bytes of four rows meet no bank twice.
__device__ __forceinline__ u32 place(u32 row, u32 part) { return row * 128 + (part ^ (row % 4 * 2)) * 16; }

// A step of a block through the tiles of inputs: split after split.
struct Step {
    u32 number, split, tile;

    __device__ __forceinline__ void advance(u32 input_tiles) {
        ++number;
        tile += SPLITS;
        if (tile >= input_tiles) tile = ++split;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, GROUPS == 1 ? 2 : 1) linear_wide(const LinearArgs a) {
    extern __shared__ __align__(16) u8 shared[];
    const u32 group = threadIdx.x / GROUP_THREADS, thread = threadIdx.x % GROUP_THREADS;
    const u32 warp = thread / 32, lane = threadIdx.x % 32;
    const u32 output_warp = warp % OUTPUT_WARPS, row_warp = warp / OUTPUT_WARPS;
    // Row groups first, so that those of the same outputs run side by side.
    const u32 first_row = blockIdx.x * ROWS, tile = blockIdx.y;
    const u32 rows = min(a.rows - first_row, ROWS);
    const half_bits* const x = a.x + u64(first_row) * a.inputs;
    const u32 number = EPILOGUE == 2 ? 0 : number_of(a, tile);
    // By selection: an index would copy the arguments to local memory.
    const Projection p = number == 0 ? a.projections[0] : number == 1 ? a.projections[1] : a.projections[2];
    const u32 first_out = (tile - p.first_tile) * OWN_OUTPUTS;

    const u32 input_tiles = (a.inputs + TILE_INPUTS - 1) / TILE_INPUTS;
    const u32 first_split = group * OWN_SPLITS;
    const u32 own_tiles = tiles_of(first_split, OWN_SPLITS, input_tiles);
    const u8* const ring_bytes = shared + group * (STAGES * STAGE_BYTES);
    const u32 ring = shared_address(ring_bytes);
    auto fetch_weights = [&](const Step& step) {
        const u32 to = ring + step.number % STAGES * STAGE_BYTES, first = step.tile * TILE_INPUTS;
#pragma unroll
        for (u32 i = thread; i < BLOCK_OUTPUTS * 8; i += GROUP_THREADS) {
            const u32 row = i / 8, part = i % 8, input = first + part * 8;
            const u32 out = first_out + (EPILOGUE == 2 ? row % OWN_OUTPUTS : row);
            const half_bits* const weight = EPILOGUE == 2 && row >= OWN_OUTPUTS ? a.projections[1].weight : p.weight;
            const bool valid = out < p.outputs && input < a.inputs;
            copy_async(to + place(row, part), weight + (valid ? u64(out) * a.inputs + input : 0), valid);
        }
    };
    auto fetch_x = [&](const Step& step) {
        const u32 to = ring + step.number % STAGES * STAGE_BYTES + BLOCK_OUTPUTS * 128, first = step.tile * TILE_INPUTS;
#pragma unroll
        for (u32 i = thread; i < ROWS * 8; i += GROUP_THREADS) {
            const u32 row = i / 8, part = i % 8, input = first + part * 8;
            const bool valid = row < rows && input < a.inputs;
            copy_async(to + place(row, part), x + (valid ? u64(row) * a.inputs + input : 0), valid);
        }
    };
    // Weights stand still; x is what the kernel before writes.
    Step ahead = {0, first_split, first_split};
    for (; ahead.number < min(STAGES - 1, own_tiles); ahead.advance(input_tiles)) fetch_weights(ahead);
    wait_for_previous();
    ahead = {0, first_split, first_split};
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) {
        if (ahead.number < own_tiles) {
            fetch_x(ahead);
            ahead.advance(input_tiles);
        }
        copy_commit();
    }

    float sums[KEPT][2][COLUMN_TILES][4];
#pragma unroll
    for (int k = 0; k < KEPT; ++k)
#pragma unroll
        for (int o = 0; o < 2; ++o)
#pragma unroll
            for (int c = 0; c < COLUMN_TILES; ++c)
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[k][o][c][i] = 0.0f;
    const u32 row = lane / 4;
    u32 s = 0;
    // All groups take as many turns, the longest split's, since they meet in each.
    const u32 turns = (input_tiles + SPLITS - 1) / SPLITS;
    auto add_split = [&](float (&sum)[2][COLUMN_TILES][4], u32 split) {
        for (u32 t = 0; t < turns; ++t) {
            const bool has_tile = t * SPLITS + split < input_tiles;
            if (has_tile) copy_wait<STAGES - 2>();
            // All of the stage has come, and nobody reads the one that is filled next.
            __syncthreads();
            if (!has_tile) continue;
            if (ahead.number < own_tiles) {
                fetch_weights(ahead);
                fetch_x(ahead);
                ahead.advance(input_tiles);
            }
            copy_commit();
            const u8* const stage = ring_bytes + s++ % STAGES * STAGE_BYTES;
            const u8* const weights = stage + output_warp * 32 * 128;
            const u8* const columns = stage + (BLOCK_OUTPUTS + row_warp * COLUMN_TILES * 8) * 128;
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const u32 part = k * 2 + lane % 4 / 2, at = lane % 2 * 8;
                uint2 v[COLUMN_TILES];
#pragma unroll
                for (int c = 0; c < COLUMN_TILES; ++c) v[c] = *(const uint2*)(columns + place(c * 8 + row, part) + at);
#pragma unroll
                for (int o = 0; o < 2; ++o) {
                    const uint2 low = *(const uint2*)(weights + place(o * 16 + row, part) + at);
                    const uint2 high = *(const uint2*)(weights + place(o * 16 + row + 8, part) + at);
                    const u32 rows16[4] = {low.x, high.x, low.y, high.y};
#pragma unroll
                    for (int c = 0; c < COLUMN_TILES; ++c) mma(sum[o][c], rows16, v[c].x, v[c].y);
                }
            }
        }
    };
    if (GROUPS == 1) {
        for (u32 split = 0; split < SPLITS; ++split) {
            add_split(sums[0], split);
#pragma unroll
            for (int o = 0; o < 2; ++o)
#pragma unroll
                for (int c = 0; c < COLUMN_TILES; ++c)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        sums[1][o][c][i] += sums[0][o][c][i];
                        sums[0][o][c][i] = 0.0f;
                    }
        }
    } else {
#pragma unroll
        for (int k = 0; k < KEPT; ++k) add_split(sums[k], first_split + k);
    }
    copy_wait<0>();
    let_next_start();
    const u32 half = EPILOGUE == 2 ? NONE : half_of(a.sending);
    __syncthreads();

    // [splits that are apart][rows][outputs], padded against bank conflicts; gate and up outputs meet here too.
    float* const block = (float*)shared;
    const u32 pitch = BLOCK_OUTPUTS + 4;
#pragma unroll
    for (int k = GROUPS == 1 ? 1 : 0; k < KEPT; ++k) {
        const u32 part = GROUPS == 1 ? 0 : first_split + k;
#pragma unroll
        for (int o = 0; o < 2; ++o)
#pragma unroll
            for (int c = 0; c < COLUMN_TILES; ++c)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    block[(part * ROWS + (row_warp * COLUMN_TILES + c) * 8 + lane % 4 * 2 + i % 2) * pitch + output_warp * 32 + o * 16 + row + i / 2 * 8] =
                        sums[k][o][c][i];
    }
    __syncthreads();
    auto total = [&](u32 column, u32 o) {
        if (GROUPS == 1) return block[column * pitch + o];
        float y = 0.0f;
#pragma unroll
        for (int k = 0; k < SPLITS; ++k) y += block[(k * ROWS + column) * pitch + o];
        return y;
    };
    for (u32 i = threadIdx.x; i < ROWS * OWN_OUTPUTS; i += THREADS) {
        const u32 o = i % OWN_OUTPUTS, column = i / OWN_OUTPUTS, out = first_out + o;
        if (column >= rows || out >= p.outputs) continue;
        const u64 at = product_at(a, number, first_row + column, out);
        const float other = EPILOGUE == 2 ? total(column, OWN_OUTPUTS + o) : EPILOGUE == 1 ? ((const float*)a.out)[at] : 0.0f;
        store_product<EPILOGUE>(a, p, at, out, total(column, o), other, half);
    }
}
