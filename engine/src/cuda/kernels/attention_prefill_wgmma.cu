// Causal attention of many query rows on Hopper, by warpgroup instructions (FlashAttention-3, Shah et al. 2024, sections 3.1 and 3.2).
//
// A block owns 128 rows of one query head of one span: two warpgroups with 64 rows each, and a third whose first thread keeps a ring filled by
// tensor copies, with tiles of keys and of values in the order in which they are used. A warpgroup has the next tile's scores computed while
// the tensor cores still weigh this tile's values, and softmax runs beside them. Late rows, which read most, start first.
//
// A row's result depends on its own keys alone: tiles begin at the same keys for every row, and keys that causality hides from it change no bit.
//
// Options: HEAD_DIM; KEYS of a tile, whole KV blocks; STAGES of the ring, tiles of keys or values.

#ifndef HEAD_DIM
#define HEAD_DIM 128
#endif
#ifndef KEYS
#define KEYS 128
#endif
#ifndef STAGES
#define STAGES 6
#endif

#define GROUPS 2
#define GROUP_ROWS 64
#define ROWS (GROUPS * GROUP_ROWS)
#define THREADS ((GROUPS + 1) * 128)
#define PANELS ((HEAD_DIM + PANEL - 1) / PANEL)
#define QUERY_PANEL (ROWS * PANEL_ROW)
#define TILE_PANEL (KEYS * PANEL_ROW)
#define TILE_BYTES (PANELS * TILE_PANEL)
#define TILE_BLOCKS (KEYS / BLOCK_TOKENS)

// Mirrors `PrefillWgmmaArgs` in attention_prefill.rs.
struct PrefillArgs {
    TensorMap q;  // [rows][num_heads][HEAD_DIM], in boxes of GROUP_ROWS rows
    TensorMap kv; // [entries: blocks, KV heads, positions][K | V][HEAD_DIM] of one layer, in boxes of BLOCK_TOKENS entries
    half_bits* out;       // [rows, num_heads, HEAD_DIM]
    const Span* spans;    // [gridDim.z]
    const u32* block_tables;
    u32 num_heads, num_kv_heads;
    float scale_log2;     // log2(e) / sqrt(HEAD_DIM)
};

// Scores of a warpgroup's rows with a tile's keys: 16 of the queries' numbers.
template <bool FIRST> __device__ __forceinline__ void add_scores(float (&d)[KEYS / 2], u64 queries, u64 keys) {
#if KEYS == 64
    if (FIRST) WGMMA("64", NAMES_32, VALUES_32(0), "%32, %33", "0", queries, keys);
    else WGMMA("64", NAMES_32, VALUES_32(0), "%32, %33", "1", queries, keys);
#elif KEYS == 128
    if (FIRST) WGMMA("128", NAMES_64, VALUES_64(0), "%64, %65", "0", queries, keys);
    else WGMMA("128", NAMES_64, VALUES_64(0), "%64, %65", "1", queries, keys);
#else
#error "no instruction for so many keys"
#endif
}

// Outputs of a warpgroup's rows: 16 keys' weights times their values.
__device__ __forceinline__ void add_values(float (&d)[HEAD_DIM / 2], const u32 (&weights)[4], u64 values) {
#if HEAD_DIM == 64
    WGMMA_REGISTERS("64", NAMES_32, VALUES_32(0), "{%32, %33, %34, %35}, %36", weights, values);
#elif HEAD_DIM == 96
    WGMMA_REGISTERS("96", NAMES_48, VALUES_48(0), "{%48, %49, %50, %51}, %52", weights, values);
#elif HEAD_DIM == 128
    WGMMA_REGISTERS("128", NAMES_64, VALUES_64(0), "{%64, %65, %66, %67}, %68", weights, values);
#elif HEAD_DIM == 256
    WGMMA_REGISTERS("256", NAMES_128, VALUES_128(0), "{%128, %129, %130, %131}, %132", weights, values);
#else
#error "no instruction for this head_dim"
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_prefill_wgmma(const __grid_constant__ PrefillArgs a) {
    begin_kernel();
    extern __shared__ __align__(1024) u8 shared[];
    __shared__ u64 filled_barriers[STAGES], vacant_barriers[STAGES], query_barrier;
    const Span span = a.spans[blockIdx.z];
    const u32 head = blockIdx.x, kv_head = head / (a.num_heads / a.num_kv_heads);
    const u32 first_row = (gridDim.y - 1 - blockIdx.y) * ROWS;
    if (first_row >= span.tokens) return;
    const u32 end_row = min(first_row + ROWS, span.tokens);
    const u32 num_keys = span.past + end_row, tiles = (num_keys + KEYS - 1) / KEYS;
    const u32 query = shared_address(shared), ring = query + PANELS * QUERY_PANEL;
    const u32 filled = shared_address(filled_barriers), vacant = shared_address(vacant_barriers), queries_here = shared_address(&query_barrier);
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (u32 s = 0; s < STAGES; ++s) {
            barrier_init(filled + s * 8, 1);
            barrier_init(vacant + s * 8, GROUPS * 4);
        }
        barrier_init(queries_here, 1);
        barriers_ready();
    }
    __syncthreads();

    if (warp >= GROUPS * 4) {
        give_up_registers<24>();
        if (threadIdx.x > GROUPS * 128) return;
        barrier_expect(queries_here, PANELS * QUERY_PANEL);
        for (u32 panel = 0; panel < PANELS; ++panel)
            for (u32 group = 0; group < GROUPS; ++group)
                copy_tensor(query + panel * QUERY_PANEL + group * (GROUP_ROWS * PANEL_ROW), a.q, panel * PANEL, head,
                            span.first_row + first_row + group * GROUP_ROWS, queries_here);
        const u32* const table = a.block_tables + span.blocks;
        const u32 blocks = (num_keys + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
        u32 number = 0;
        // `part`: 0 for keys, 1 for values.
        auto fetch = [&](u32 tile, u32 part) {
            const u32 stage = number % STAGES, to = ring + stage * TILE_BYTES, barrier = filled + stage * 8;
            // The first time round, a stage is vacant: the phase before a barrier's first is over.
            barrier_wait(vacant + stage * 8, number / STAGES % 2 ^ 1);
            const u32 here = min(blocks - tile * TILE_BLOCKS, TILE_BLOCKS);
            barrier_expect(barrier, here * PANELS * (BLOCK_TOKENS * PANEL_ROW));
            for (u32 b = 0; b < here; ++b) {
                const u32 entry = (__ldg(table + tile * TILE_BLOCKS + b) * a.num_kv_heads + kv_head) * BLOCK_TOKENS;
                for (u32 panel = 0; panel < PANELS; ++panel)
                    copy_tensor(to + panel * TILE_PANEL + b * (BLOCK_TOKENS * PANEL_ROW), a.kv, panel * PANEL, part, entry, barrier);
            }
            ++number;
        };
        fetch(0, 0);
        for (u32 tile = 1; tile < tiles; ++tile) {
            fetch(tile, 0);
            fetch(tile - 1, 1);
        }
        fetch(tiles - 1, 1);
        return;
    }

    take_registers<240>();
    const u32 group = warp / 4;
    float score[KEYS / 2], output[HEAD_DIM / 2];
    u32 weights[KEYS / 16][4];
    // Of a lane's two rows, eight apart: the largest score, and the weights' sum, of this lane's keys.
    float maximum[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY}, sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; ++i) output[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < KEYS / 2; ++i) score[i] = 0.0f;
    const u32 own_row = warp * 16 + lane / 4;
    // The last key that each row sees, less the lane's first one.
    const int last_key = int(span.past + first_row + own_row) - int(lane % 4 * 2);
    const u32 queries = query + group * (GROUP_ROWS * PANEL_ROW);

    u32 used = 0;
    auto wait_for_tile = [&](u32 number) { barrier_wait(filled + number % STAGES * 8, number / STAGES % 2); };
    auto release = [&] {
        if (lane == 0) barrier_arrive(vacant + used % STAGES * 8);
        __syncwarp();
        ++used;
    };
    auto begin_scores = [&](u32 number) {
        const u32 keys = ring + number % STAGES * TILE_BYTES;
#pragma unroll
        for (int k = 0; k < HEAD_DIM / 16; ++k) {
            const u64 rows = matrix_at(queries + k / 4 * QUERY_PANEL + k % 4 * 32), columns = matrix_at(keys + k / 4 * TILE_PANEL + k % 4 * 32);
            if (k == 0) add_scores<true>(score, rows, columns);
            else add_scores<false>(score, rows, columns);
        }
        wgmma_commit();
    };
    auto begin_values = [&](u32 number) {
        const u32 values = ring + number % STAGES * TILE_BYTES;
#pragma unroll
        for (int k = 0; k < KEYS / 16; ++k) add_values(output, weights[k], matrix_at(values + k * (16 * PANEL_ROW), TILE_PANEL));
        wgmma_commit();
    };
    // Scores become weights, relative to the largest so far; what came before is to shrink by so much.
    auto soften = [&](u32 tile, float (&shrink)[2]) {
        const int first_key = tile * KEYS;
        if (first_key + KEYS - 1 > int(span.past + first_row + warp * 16)) {
#pragma unroll
            for (int i = 0; i < KEYS / 2; ++i)
                if (first_key + i / 4 * 8 + i % 2 > last_key + i % 4 / 2 * 8) score[i] = NEGATIVE_INFINITY;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float top = NEGATIVE_INFINITY;
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n) top = fmaxf(top, fmaxf(score[n * 4 + half * 2], score[n * 4 + half * 2 + 1]));
            top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 1));
            top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 2));
            // Every row sees key 0: from the first tile on, its maximum is finite.
            const float now = fmaxf(maximum[half], top), reference = now * a.scale_log2;
            shrink[half] = exp2_fast((maximum[half] - now) * a.scale_log2);
            maximum[half] = now;
            float added = 0.0f;
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float& s = score[n * 4 + half * 2 + i];
                    s = exp2_fast(fmaf(s, a.scale_log2, -reference));
                    added += s;
                }
            sum[half] = sum[half] * shrink[half] + added;
        }
    };
    auto pack_weights = [&] {
#pragma unroll
        for (int k = 0; k < KEYS / 16; ++k)
#pragma unroll
            for (int i = 0; i < 4; ++i) weights[k][i] = pack(score[k * 8 + i * 2], score[k * 8 + i * 2 + 1]);
    };

    float shrink[2];
    barrier_wait(queries_here, 0);
    wait_for_tile(0);
    wgmma_begin();
    begin_scores(0);
    wgmma_wait<0>();
    hold(score);
    release();
    soften(0, shrink);
    pack_weights();
    for (u32 tile = 1; tile < tiles; ++tile) {
        wait_for_tile(used);
        hold(score);
        hold(output);
#pragma unroll
        for (int k = 0; k < KEYS / 16; ++k) hold(weights[k]);
        wgmma_begin();
        begin_scores(used);
        wait_for_tile(used + 1);
        wgmma_begin();
        begin_values(used + 1);
        wgmma_wait<1>();
        hold(score);
        release();
        soften(tile, shrink);
        wgmma_wait<0>();
        hold(output);
        release();
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 2; ++i) output[i] *= shrink[i % 4 / 2];
        pack_weights();
    }
    wait_for_tile(used);
    // What lies past the last key belongs to another sequence or was never written: 0 times a NaN is not 0.
    const u32 rest = tiles * KEYS - num_keys;
    if (rest > 0) {
        uint4* const values = (uint4*)(shared + PANELS * QUERY_PANEL + used % STAGES * TILE_BYTES);
        for (u32 i = threadIdx.x; i < rest * PANELS * (PANEL_ROW / 16); i += GROUPS * 128) {
            const u32 row = i / (PANEL_ROW / 16), panel = row / rest;
            values[(panel * KEYS + KEYS - rest + row % rest) * (PANEL_ROW / 16) + i % (PANEL_ROW / 16)] = make_uint4(0, 0, 0, 0);
        }
        __syncwarp();
        asm volatile("fence.proxy.async.shared::cta;\nbar.sync 1, %0;" ::"n"(GROUPS * 128) : "memory");
    }
    wgmma_begin();
    begin_values(used);
    wgmma_wait<0>();
    hold(output);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float s = sum[half];
        s += __shfl_xor_sync(FULL_WARP, s, 1);
        s += __shfl_xor_sync(FULL_WARP, s, 2);
        const u32 row = first_row + own_row + half * 8;
        if (row >= end_row) continue;
        const float inverse = 1.0f / s;
        half_bits* const to = a.out + (u64(span.first_row + row) * a.num_heads + head) * HEAD_DIM + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; ++n) *(u32*)(to + n * 8) = pack(output[n * 4 + half * 2] * inverse, output[n * 4 + half * 2 + 1] * inverse);
    }
}
