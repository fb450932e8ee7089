// Products of a few rows with streamed weights: y = x · Wᵀ for up to 8 * COLUMN_TILES rows of x a block.
//
// Weights are read once, 16 outputs and 64 inputs a tile, through private cp.async rings: eight warps share a tile's outputs
// and split the inputs between them in turn, so that a block streams whole runs of a row. Tensor cores take the weights as
// their 16-row operand and the rows of x as columns. An instruction adds up 16 inputs whose order among themselves is free, so
// lanes load 8 bytes of both operands. The eight sums of an output are added in a fixed order: a row's bits depend on neither
// the other rows nor their number.
//
// Lanes load x 8 bytes at a time from rows that lie side by side, which costs as much as a twentieth of the weights' way; up to eight rows that norms
// and activations leave "by lane" (prelude.cuh) come 16 bytes at a time, from whole lines.
//
// Options: X_BY_LANE; COLUMN_TILES (8 rows of x each); TILES (16 outputs each) per warp, which share a load of x; STAGES; EPILOGUE.

#ifndef COLUMN_TILES
#define COLUMN_TILES 1
#endif
#ifndef TILES
#define TILES 1
#endif
#ifndef STAGES
#define STAGES 6
#endif
// 0: store f32 side by side; 1: add to f32; 2: silu(first) * second, 16-bit.
#ifndef EPILOGUE
#define EPILOGUE 0
#endif

#ifndef X_BY_LANE
#define X_BY_LANE 0
#endif

#define TILE_BYTES (16 * TILE_INPUTS * 2)
#define STAGE_BYTES (TILES * TILE_BYTES)
#define MATRICES (EPILOGUE == 2 ? 2 : 1)
#define WARPS (SPLITS * MATRICES)
#define COLUMNS (8 * COLUMN_TILES)
// Instructions, of four a tile, whose x is loaded ahead: as many as registers allow.
#define AHEAD (COLUMN_TILES <= 2 ? 4 : 2)

extern "C" __global__ void __launch_bounds__(WARPS * 32, WARPS <= 8 && TILES == 1 ? 2 : 1) linear(const LinearArgs a) {
    extern __shared__ __align__(16) u8 shared[];
    // With many rows x lives on L1, which the next kernel's shared memory would shrink: it comes after the loop then.
    // A sum's `peer_norm` starts when what comes before this kernel has ended.
    const bool early = COLUMN_TILES < 3, sends = EPILOGUE != 2 && a.sending.own != nullptr;
    if (early && !sends) let_next_start();
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 split = warp % SPLITS, matrix = warp / SPLITS;
    const u32 first_row = blockIdx.y * COLUMNS;
    const u32 rows = min(a.rows - first_row, COLUMNS);
    const half_bits* const x = a.x + u64(first_row) * a.inputs;
    // Which outputs of which projection this block computes; gate and up are a warp group each.
    const u32 first_tile = blockIdx.x * TILES;
    const u32 number = EPILOGUE == 2 ? matrix : number_of(a, first_tile);
    // By selection: an index would copy the arguments to local memory.
    const Projection p = number == 0 ? a.projections[0] : number == 1 ? a.projections[1] : a.projections[2];
    const u32 first_out = (first_tile - (EPILOGUE == 2 ? 0 : p.first_tile)) * 16;

    const u32 input_tiles = (a.inputs + TILE_INPUTS - 1) / TILE_INPUTS;
    const u32 tiles = input_tiles > split ? (input_tiles - split + SPLITS - 1) / SPLITS : 0;
    const u32 ring = shared_address(shared) + warp * STAGES * STAGE_BYTES;
    auto fetch = [&](u32 t) {
        const u32 to = ring + t % STAGES * STAGE_BYTES;
        const u32 first_input = (t * SPLITS + split) * TILE_INPUTS;
#pragma unroll
        for (int i = 0; i < 4 * TILES; ++i) {
            const u32 row = i * 4 + lane / 8, part = lane % 8, input = first_input + part * 8;
            const bool valid = first_out + row < p.outputs && input < a.inputs;
            copy_async(to + row * 128 + (part ^ (row % 4 * 2)) * 16,
                       p.weight + (valid ? u64(first_out + row) * a.inputs + input : 0), valid);
        }
    };
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) {
        if (s < tiles) fetch(s);
        copy_commit();
    }
    // Weights stand still; x is what the kernel before writes.
    wait_for_previous();
    if (early && sends) let_next_start();
    const u32 half = EPILOGUE == 2 ? NONE : half_of(a.sending);

    float sums[TILES][COLUMN_TILES][4];
#pragma unroll
    for (int o = 0; o < TILES; ++o)
#pragma unroll
        for (int c = 0; c < COLUMN_TILES; ++c)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[o][c][i] = 0.0f;
    const u32 row = lane / 4;
    // The lane's 8 bytes of x for each of a few instructions, the first of them number `first` of the warp; zeros past the ends.
    auto load_x = [&](uint2 (&v)[COLUMN_TILES][AHEAD], u32 first) {
#if X_BY_LANE
        static_assert(COLUMN_TILES == 1 && AHEAD == 4, "a tile of x is loaded at once");
        const u32 tile = first / 4 * SPLITS + split;
        uint4 two[2] = {make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)};
        if (row < rows && tile * TILE_INPUTS < a.inputs) {
            const uint4* const at = (const uint4*)((const uint2*)a.x + four_by_lane(a.rows, row, tile * (TILE_INPUTS / 4) + lane % 4));
            two[0] = at[0], two[1] = at[1];
        }
#pragma unroll
        for (int k = 0; k < 4; k += 2) {
            v[0][k] = make_uint2(two[k / 2].x, two[k / 2].y);
            v[0][k + 1] = make_uint2(two[k / 2].z, two[k / 2].w);
        }
        return;
#endif
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) {
            const u32 input = ((first + k) / 4 * SPLITS + split) * TILE_INPUTS + (first + k) % 4 * 16 + lane % 4 * 4;
#pragma unroll
            for (int c = 0; c < COLUMN_TILES; ++c)
                v[c][k] = c * 8 + row < rows && input < a.inputs ? *(const uint2*)(x + u64(c * 8 + row) * a.inputs + input)
                                                                 : make_uint2(0, 0);
        }
    };
    uint2 next[COLUMN_TILES][AHEAD];
    load_x(next, 0);
    for (u32 t = 0; t < tiles; ++t) {
        copy_wait<STAGES - 2>();
        __syncwarp();
        if (t + STAGES - 1 < tiles) fetch(t + STAGES - 1);
        copy_commit();
        const u8* const stage = shared + (warp * STAGES + t % STAGES) * STAGE_BYTES;
#pragma unroll
        for (int first = 0; first < 4; first += AHEAD) {
            uint2 v[COLUMN_TILES][AHEAD];
#pragma unroll
            for (int c = 0; c < COLUMN_TILES; ++c)
#pragma unroll
                for (int k = 0; k < AHEAD; ++k) v[c][k] = next[c][k];
            load_x(next, t * 4 + first + AHEAD);
#pragma unroll
            for (int k = 0; k < AHEAD; ++k) {
                const u32 at = (((first + k) * 2 + lane % 4 / 2) ^ (row % 4 * 2)) * 16 + lane % 2 * 8;
#pragma unroll
                for (int o = 0; o < TILES; ++o) {
                    const uint2 low = *(const uint2*)(stage + o * TILE_BYTES + row * 128 + at);
                    const uint2 high = *(const uint2*)(stage + o * TILE_BYTES + (row + 8) * 128 + at);
                    const u32 weights[4] = {low.x, high.x, low.y, high.y};
#pragma unroll
                    for (int c = 0; c < COLUMN_TILES; ++c) mma(sums[o][c], weights, v[c][k].x, v[c][k].y);
                }
            }
        }
        __syncwarp();
    }
    copy_wait<0>();
    if (!early) let_next_start();
    __syncthreads();

    // partial: [matrix][tile][split][column][16 outputs], padded against bank conflicts.
    float* const partial = (float*)shared;
    const u32 pitch = 17;
#pragma unroll
    for (int o = 0; o < TILES; ++o)
#pragma unroll
        for (int c = 0; c < COLUMN_TILES; ++c)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                partial[(((matrix * TILES + o) * SPLITS + split) * COLUMNS + c * 8 + lane % 4 * 2 + i % 2) * pitch + row + i / 2 * 8] = sums[o][c][i];
    __syncthreads();
    auto total = [&](u32 tile, u32 column, u32 o) {
        float s = 0.0f;
#pragma unroll
        for (int k = 0; k < SPLITS; ++k) s += partial[((tile * SPLITS + k) * COLUMNS + column) * pitch + o];
        return s;
    };
    for (u32 i = threadIdx.x; i < TILES * COLUMNS * 16; i += WARPS * 32) {
        const u32 o = i % (TILES * 16), column = i / (TILES * 16), t = o / 16, out = first_out + o;
        if (column >= rows || out >= p.outputs) continue;
        const u64 at = EPILOGUE == 2 && a.out_by_lane ? four_by_lane(a.rows, column, out / 4) * 4 + out % 4
                                                      : product_at(a, EPILOGUE == 0 ? number : 0, first_row + column, out);
        const float other = EPILOGUE == 2 ? total(TILES + t, column, o % 16) : EPILOGUE == 1 ? ((const float*)a.out)[at] : 0.0f;
        store_product<EPILOGUE>(a, EPILOGUE == 2 ? a.projections[0] : p, at, out, total(t, column, o % 16), other, half);
    }
}
