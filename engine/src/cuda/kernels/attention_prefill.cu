// Causal attention of many query rows: chunks of a prompt over the paged cache (FlashAttention-2, Dao 2023).
//
// A block owns 64 * ROW_TILES rows of one query head of one span: four warps with 16 * ROW_TILES rows each. It streams the
// cache one KV block at a time, two in flight, and skips what causality hides. Late rows, which read most, start first.
//
// Options: HEAD_DIM; ROW_TILES.

#ifndef HEAD_DIM
#define HEAD_DIM 128
#endif
#ifndef ROW_TILES
#define ROW_TILES 2
#endif

#define WARPS 4
#define ROWS (WARPS * 16 * ROW_TILES)
#define DIM_STEPS (HEAD_DIM / 16)
#define PIECES (HEAD_DIM / 4)
#define ENTRY_STRIDE (HEAD_DIM * 4 + 16)
#define STAGE_BYTES (BLOCK_TOKENS * ENTRY_STRIDE)
#define QUERY_STRIDE (HEAD_DIM * 2 + 16)
// Keys whose scores are in registers at a time.
#define SUB_KEYS 32

struct PrefillArgs {
    const half_bits* q;   // [rows, num_heads, HEAD_DIM]
    const half_bits* kv;  // [block][kv_head][BLOCK_TOKENS][K | V][HEAD_DIM], of one layer
    half_bits* out;       // [rows, num_heads, HEAD_DIM]
    const Span* spans;    // [gridDim.z]
    const u32* block_tables;
    u32 num_heads, num_kv_heads;
    float scale_log2;     // log2(e) / sqrt(HEAD_DIM)
};

extern "C" __global__ void __launch_bounds__(WARPS * 32, HEAD_DIM > 128 ? 1 : 2) attention_prefill(const PrefillArgs a) {
    begin_kernel();
    extern __shared__ __align__(16) u8 shared[];
    u8* const query = shared;
    u8* const ring = shared + ROWS * QUERY_STRIDE;
    const Span span = a.spans[blockIdx.z];
    const u32 head = blockIdx.x, kv_head = head / (a.num_heads / a.num_kv_heads);
    const u32 first_row = (gridDim.y - 1 - blockIdx.y) * ROWS;
    if (first_row >= span.tokens) return;
    const u32 end_row = min(first_row + ROWS, span.tokens);
    const u32 num_keys = span.past + end_row;
    const u32* const table = a.block_tables + span.blocks;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    auto fetch = [&](u32 block) {
        const half_bits* from = a.kv + u64(__ldg(table + block) * a.num_kv_heads + kv_head) * BLOCK_TOKENS * 2 * HEAD_DIM;
        const u32 to = shared_address(ring) + block % 2 * STAGE_BYTES;
#pragma unroll 8
        for (u32 piece = threadIdx.x; piece < BLOCK_TOKENS * PIECES; piece += WARPS * 32) {
            const u32 key = piece / PIECES, part = piece % PIECES;
            copy_async(to + key * ENTRY_STRIDE + part * 16, from + piece * 8, block * BLOCK_TOKENS + key < num_keys);
        }
    };

    for (u32 i = threadIdx.x; i < ROWS * (HEAD_DIM / 8); i += WARPS * 32) {
        const u32 r = i / (HEAD_DIM / 8), part = i % (HEAD_DIM / 8), row = first_row + r;
        const bool valid = row < end_row;
        copy_async(shared_address(query) + r * QUERY_STRIDE + part * 16,
                   a.q + (u64(span.first_row + (valid ? row : first_row)) * a.num_heads + head) * HEAD_DIM + part * 8, valid);
    }
    fetch(0);
    copy_commit();

    float output[ROW_TILES][HEAD_DIM / 8][4];
    float maximum[ROW_TILES][2], sum[ROW_TILES][2];
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) output[m][n][i] = 0.0f;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            maximum[m][half] = NEGATIVE_INFINITY;
            sum[m][half] = 0.0f;
        }
    }
    const u32 warp_row = warp * 16 * ROW_TILES;
    // The last position that a row of this warp sees.
    const u32 warp_end = span.past + first_row + warp_row + 16 * ROW_TILES;
    const u32 query_address = shared_address(query) + (warp_row + lane % 16) * QUERY_STRIDE + (lane / 16) * 16;
    const u32 blocks = (num_keys + BLOCK_TOKENS - 1) / BLOCK_TOKENS;

    for (u32 block = 0; block < blocks; ++block) {
        copy_wait<0>();
        __syncthreads();
        if (block + 1 < blocks) fetch(block + 1);
        copy_commit();
        const u32 base = shared_address(ring) + block % 2 * STAGE_BYTES;
#pragma unroll 1
        for (u32 sub = 0; sub < BLOCK_TOKENS; sub += SUB_KEYS) {
            const u32 first_key = block * BLOCK_TOKENS + sub;
            if (first_key >= warp_end) break;
            float score[ROW_TILES][SUB_KEYS / 8][4];
#pragma unroll
            for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
                for (int n = 0; n < SUB_KEYS / 8; ++n)
#pragma unroll
                    for (int i = 0; i < 4; ++i) score[m][n][i] = 0.0f;
            const u32 key_address = base + (sub + lane / 16 * 8 + lane % 8) * ENTRY_STRIDE + (lane / 8 % 2) * 16;
#pragma unroll
            for (int k = 0; k < DIM_STEPS; ++k) {
                u32 rows[ROW_TILES][4];
#pragma unroll
                for (int m = 0; m < ROW_TILES; ++m) load_matrices(rows[m], query_address + m * 16 * QUERY_STRIDE + k * 32);
#pragma unroll
                for (int n = 0; n < SUB_KEYS / 16; ++n) {
                    u32 keys[4];
                    load_matrices(keys, key_address + n * 16 * ENTRY_STRIDE + k * 32);
#pragma unroll
                    for (int m = 0; m < ROW_TILES; ++m) {
                        mma(score[m][2 * n], rows[m], keys[0], keys[1]);
                        mma(score[m][2 * n + 1], rows[m], keys[2], keys[3]);
                    }
                }
            }
            // Causality: key <= past + row.
            if (first_key + SUB_KEYS > span.past + first_row + warp_row) {
#pragma unroll
                for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
                    for (int n = 0; n < SUB_KEYS / 8; ++n)
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            const u32 row = first_row + warp_row + m * 16 + i / 2 * 8 + lane / 4;
                            if (first_key + n * 8 + lane % 4 * 2 + i % 2 > span.past + row) score[m][n][i] = NEGATIVE_INFINITY;
                        }
            }
            u32 weights[ROW_TILES][SUB_KEYS / 16][4];
#pragma unroll
            for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float top = NEGATIVE_INFINITY;
#pragma unroll
                    for (int n = 0; n < SUB_KEYS / 8; ++n) top = fmaxf(top, fmaxf(score[m][n][half * 2], score[m][n][half * 2 + 1]));
                    top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 1));
                    top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 2));
                    const float before = maximum[m][half], now = fmaxf(before, top);
                    const float reference = now == NEGATIVE_INFINITY ? 0.0f : now * a.scale_log2;
                    const float shrink = exp2_fast(before * a.scale_log2 - reference);
                    maximum[m][half] = now;
                    float added = 0.0f;
#pragma unroll
                    for (int n = 0; n < SUB_KEYS / 8; ++n) {
                        const float p = exp2_fast(fmaf(score[m][n][half * 2], a.scale_log2, -reference));
                        const float q = exp2_fast(fmaf(score[m][n][half * 2 + 1], a.scale_log2, -reference));
                        added += p + q;
                        weights[m][n / 2][half + n % 2 * 2] = pack(p, q);
                    }
                    sum[m][half] = sum[m][half] * shrink + added;
#pragma unroll
                    for (int n = 0; n < HEAD_DIM / 8; ++n) {
                        output[m][n][half * 2] *= shrink;
                        output[m][n][half * 2 + 1] *= shrink;
                    }
                }
            const u32 value_address = base + HEAD_DIM * 2 + (sub + lane / 8 % 2 * 8 + lane % 8) * ENTRY_STRIDE + (lane / 16) * 16;
#pragma unroll
            for (int k = 0; k < SUB_KEYS / 16; ++k)
#pragma unroll
                for (int n = 0; n < DIM_STEPS; ++n) {
                    u32 values[4];
                    load_matrices_transposed(values, value_address + k * 16 * ENTRY_STRIDE + n * 32);
#pragma unroll
                    for (int m = 0; m < ROW_TILES; ++m) {
                        mma(output[m][2 * n], weights[m][k], values[0], values[1]);
                        mma(output[m][2 * n + 1], weights[m][k], values[2], values[3]);
                    }
                }
        }
    }
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float s = sum[m][half];
            s += __shfl_xor_sync(FULL_WARP, s, 1);
            s += __shfl_xor_sync(FULL_WARP, s, 2);
            const u32 row = first_row + warp_row + m * 16 + half * 8 + lane / 4;
            if (row >= end_row) continue;
            const float inverse = 1.0f / s;
            half_bits* to = a.out + (u64(span.first_row + row) * a.num_heads + head) * HEAD_DIM + lane % 4 * 2;
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 8; ++n)
                *(u32*)(to + n * 8) = pack(output[m][n][half * 2] * inverse, output[m][n][half * 2 + 1] * inverse);
        }
}
