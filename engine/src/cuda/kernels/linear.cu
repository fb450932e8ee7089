// Products of a few rows with streamed weights: y = x · Wᵀ for up to 8 * COLUMN_TILES rows of x a block.
//
// Weights are read once, 16 outputs and 64 inputs a tile, through private cp.async rings: eight warps share a tile's outputs
// and split the inputs between them in turn, so that a block streams whole runs of a row. Tensor cores take the weights as
// their 16-row operand and the rows of x as columns; inputs may be fed in any order as long as both operands agree, so
// both are loaded 16 bytes a lane. The eight sums of an output are added in a fixed order: a row's bits depend on neither
// the other rows nor their number.
//
// Options: COLUMN_TILES (8 rows of x each); TILES (16 outputs each) per warp, which share a load of x; STAGES; EPILOGUE.

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

#define TILE_BYTES (16 * TILE_INPUTS * 2)
#define STAGE_BYTES (TILES * TILE_BYTES)
#define MATRICES (EPILOGUE == 2 ? 2 : 1)
#define WARPS (SPLITS * MATRICES)
#define COLUMNS (8 * COLUMN_TILES)

extern "C" __global__ void __launch_bounds__(WARPS * 32, WARPS <= 8 && TILES == 1 ? 2 : 1) linear(const LinearArgs a) {
    extern __shared__ __align__(16) u8 shared[];
    // With many rows x lives on L1, which the next kernel's shared memory would shrink: it comes after the loop then.
    if (COLUMN_TILES < 3) let_next_start();
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
            copy_async(to + row * 128 + (part ^ (row % 2 * 4)) * 16,
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

    float sums[TILES][COLUMN_TILES][4];
#pragma unroll
    for (int o = 0; o < TILES; ++o)
#pragma unroll
        for (int c = 0; c < COLUMN_TILES; ++c)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[o][c][i] = 0.0f;
    const u32 row = lane / 4;
    // The lane's 16 bytes of x for half a tile; zeros past the ends.
    auto load_x = [&](uint4 (&v)[COLUMN_TILES], u32 t, u32 half) {
        const u32 input = (t * SPLITS + split) * TILE_INPUTS + half * 32 + lane % 4 * 8;
#pragma unroll
        for (int c = 0; c < COLUMN_TILES; ++c)
            v[c] = c * 8 + row < rows && input < a.inputs ? *(const uint4*)(x + u64(c * 8 + row) * a.inputs + input)
                                                            : make_uint4(0, 0, 0, 0);
    };
    uint4 next[COLUMN_TILES];
    load_x(next, 0, 0);
    for (u32 t = 0; t < tiles; ++t) {
        copy_wait<STAGES - 2>();
        __syncwarp();
        if (t + STAGES - 1 < tiles) fetch(t + STAGES - 1);
        copy_commit();
        const u8* const stage = shared + (warp * STAGES + t % STAGES) * STAGE_BYTES;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint4 v[COLUMN_TILES];
#pragma unroll
            for (int c = 0; c < COLUMN_TILES; ++c) v[c] = next[c];
            if (half == 0) load_x(next, t, 1);
            else load_x(next, t + 1, 0);
            const u32 part = (half * 4 + lane % 4) ^ (row % 2 * 4);
#pragma unroll
            for (int o = 0; o < TILES; ++o) {
                const uint4 low = *(const uint4*)(stage + o * TILE_BYTES + row * 128 + part * 16);
                const uint4 high = *(const uint4*)(stage + o * TILE_BYTES + (row + 8) * 128 + part * 16);
                const u32 first[4] = {low.x, high.x, low.y, high.y}, second[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
                for (int c = 0; c < COLUMN_TILES; ++c) {
                    mma(sums[o][c], first, v[c].x, v[c].y);
                    mma(sums[o][c], second, v[c].z, v[c].w);
                }
            }
        }
        __syncwarp();
    }
    copy_wait<0>();
    if (COLUMN_TILES >= 3) let_next_start();
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
    u32 before = 0;
    if (EPILOGUE == 0 && number > 0) before = a.projections[0].outputs;
    if (EPILOGUE == 0 && number > 1) before += a.projections[1].outputs;
    for (u32 i = threadIdx.x; i < TILES * COLUMNS * 16; i += WARPS * 32) {
        const u32 o = i % (TILES * 16), column = i / (TILES * 16), t = o / 16;
        const u32 out = first_out + o;
        if (column >= rows || out >= p.outputs) continue;
        const u64 at = u64(first_row + column) * a.out_stride + before + out;
        if (EPILOGUE == 2) {
            float gate = total(t, column, o % 16), up = total(TILES + t, column, o % 16);
            if (a.projections[0].bias) gate += a.projections[0].bias[out];
            if (a.projections[1].bias) up += a.projections[1].bias[out];
            ((half_bits*)a.out)[at] = to_half(gate / (1.0f + __expf(-gate)) * up);
        } else {
            float y = total(t, column, o % 16);
            if (p.bias) y += p.bias[out];
            float* const to = (float*)a.out + at;
            *to = EPILOGUE == 1 ? *to + y : y;
        }
    }
}
