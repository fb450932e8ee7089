// Attention of a few query rows per sequence, dense or over an index list: decoding, drafting, verification.
//
// A block works on one chunk of keys of one KV head of one span; chunks grow along the keys (chunks.rs). Its keys are dealt out to PARTS
// pipelines of a warp for every 16 query rows: they gather tiles of 16 entries with cp.async, multiply their rows with them on tensor
// cores and keep their own online softmax (Dao et al. 2022), so that in the loop only the warps of a part wait for each other. The parts' results
// are merged in shared memory; when a head has several chunks, attention_merge.cu merges them in key order. Chunks and tiles are cut by
// key index alone, so a row's bits depend neither on the rows beside it nor on the other spans.
//
// Keys: listed (or all) cached positions, then the span's own tokens, which are already in the cache.
// Rows of a block: row = token * group + head in group, where `group` query heads share the KV head.
//
// Options: HEAD_DIM; STAGES; KEPT (sixteens of numbers of a query that stay in registers); SWIZZLED (how entries lie in shared memory);
// ROW_TILES, SMALLEST, CHUNK and CAPTURE (prelude.cuh).

#ifndef HEAD_DIM
#define HEAD_DIM 128
#endif
#ifndef STAGES
#define STAGES 3
#endif

#ifndef KEPT
#define KEPT 0
#endif

#ifndef SWIZZLED
#define SWIZZLED 0
#endif

#define PARTS 4
#define WARPS (PARTS * ROW_TILES)
#define TILE_KEYS 16
#define DIM_STEPS (HEAD_DIM / 16)
// 16-byte pieces of an entry (K and V).
#define PIECES (HEAD_DIM / 4)
// So that ldmatrix meets no bank twice, entries are an odd number of 16-byte units apart; or they begin on 128 bytes each and their pieces trade
// places by key: an instruction or two more for every ldmatrix, but lines of memory become lines of shared memory, which is faster where copies are
// what is waited for.
#define ENTRY_STRIDE (SWIZZLED ? (HEAD_DIM * 4 + 127) / 128 * 128 : HEAD_DIM * 4 + 16)
#define STAGE_BYTES (TILE_KEYS * ENTRY_STRIDE)
#define QUERY_STRIDE (HEAD_DIM * 2 + 16)
// Numbers from row to row of a part's results, with the row's maximum and sum behind them: four rows, of eight numbers at a time, meet no
// bank twice.
#define RESULT_STRIDE (HEAD_DIM / 32 * 32 + (HEAD_DIM % 32 > 8 ? 40 : 8))

struct DecodeArgs {
    const half_bits* q;        // [rows, num_heads, HEAD_DIM]
    const half_bits* kv;       // [block][kv_head][BLOCK_TOKENS][K | V][HEAD_DIM], of one layer
    half_bits* out;            // [rows, num_heads, HEAD_DIM]
    const Unit* units;         // [gridDim.x / num_kv_heads]
    const u32* block_tables;
    const uint2* list_ranges;  // per span with lists: [num_layers * num_kv_heads]: where its list begins, its length
    const u32* list_slots;     // all lists: positions in the cache, block * BLOCK_TOKENS + offset
    uint2* partials;           // [place][kv_head][row tile][BLOCK_ROWS][HEAD_DIM / 4]: IEEE halves
    float2* statistics;        // [place][kv_head][row tile][BLOCK_ROWS]: maximum score, sum
    float* scores;             // [capturing span][score_tokens][num_heads][score_stride]: scores * log2(e) by key
    float2* score_statistics;  // [capturing span][score_tokens][num_heads]: maximum, sum
    u32 num_heads, num_kv_heads;
    u32 layer;
    u32 score_tokens, score_stride;
    float scale_log2;          // log2(e) / sqrt(HEAD_DIM)
};

// Threads that registers are dealt out for. Two blocks of 256 could take all of them: but for queries that stay in some, a sixth is left to the
// kernel that merges, so that it is there, and the one after it on its way, while the last blocks run.
#define REGISTER_THREADS (WARPS * 32 + (ROW_TILES == 2 && HEAD_DIM == 128 && !CAPTURE && KEPT == 0 ? 64 : 0))

// Where piece number `piece` of a key's entry is, in bytes from its beginning.
__device__ __forceinline__ u32 piece_at(u32 piece, u32 key) { return (SWIZZLED ? piece ^ key % 8 : piece) * 16; }

// The lane's row of ldmatrix: piece 2 * `pair` + `odd` of the entry at `entry`, of a key that is the lane's number modulo 8. Where pieces lie in order
// all but the pair is known ahead of the loop.
__device__ __forceinline__ u32 row_at(u32 entry, u32 odd, u32 pair) {
    return SWIZZLED ? entry + piece_at(pair * 2 + odd, threadIdx.x) : entry + odd * 16 + pair * 32;
}

extern "C" __global__ void __launch_bounds__(REGISTER_THREADS, HEAD_DIM > 128 ? 1 : 2) attention_decode(const DecodeArgs a) {
    extern __shared__ __align__(16) u8 shared[];
    __shared__ u32 entries[CHUNK];
    u8* const query = shared;
    u8* const ring = shared + BLOCK_ROWS * QUERY_STRIDE;
    let_next_start();

    const u32 unit_number = blockIdx.x / a.num_kv_heads, kv_head = blockIdx.x % a.num_kv_heads, row_tile = blockIdx.y;
    const uint4 unit_low = ((const uint4*)a.units)[2 * unit_number], unit_high = ((const uint4*)a.units)[2 * unit_number + 1];
    const Unit unit = {unit_low.x, unit_low.y, unit_low.z, unit_low.w, unit_high.x, unit_high.y, unit_high.z, unit_high.w};
    if (unit.span == NONE) return wait_for_previous();
    const u32 chunk = unit.chunk & 0xffff;
    [[maybe_unused]] const u32 capture = unit.chunk >> 16;
    const u32 group = a.num_heads / a.num_kv_heads;
    const u32 first_row = row_tile * BLOCK_ROWS;
    const u32 num_rows = unit.tokens * group;
    if (first_row >= num_rows) return wait_for_previous();
    const u32* list = nullptr;
    u32 cached = unit.past;
    if (unit.lists != NONE) {
        const uint2 range = __ldg(a.list_ranges + unit.lists + a.layer * a.num_kv_heads + kv_head);
        list = a.list_slots + range.x;
        cached = range.y;
    }
    const u32 num_keys = cached + unit.tokens;
    const u32 chunks = chunks_of(num_keys);
    const u32 first_key = first_key_of(chunk);
    if (first_key >= num_keys) return wait_for_previous();
    const u32 end_key = min(first_key_of(chunk + 1), num_keys);
    const u32* const table = a.block_tables + unit.blocks;

    // Keys, and rows, of this warp.
    const u32 part = threadIdx.x / 32 % PARTS, own_tile = threadIdx.x / 32 / PARTS, lane = threadIdx.x % 32;
    const u32 own_row = own_tile * 16 + lane / 4; // and the one eight further on

    // Every part has as many tiles, the last ones filled up with entries that are none: the parts would wait for the longest anyway, and
    // all warps pass as many barriers (racecheck tells accesses apart by their number).
    const u32 tiles = (end_key - first_key + PARTS * TILE_KEYS - 1) / (PARTS * TILE_KEYS);
    // Where the chunk's entries are: resolved once, so that the loop depends on no load but its own copies.
    for (u32 i = threadIdx.x; i < tiles * PARTS * TILE_KEYS; i += WARPS * 32) {
        const u32 key = first_key + i;
        u32 entry = NONE;
        if (key < end_key) {
            u32 slot;
            if (list != nullptr && key < cached) {
                slot = __ldcg(list + key); // this pass's own work: not by the read-only path
            } else {
                const u32 position = unit.past + key - cached; // for a dense span, the key itself
                slot = __ldg(table + position / BLOCK_TOKENS) * BLOCK_TOKENS + position % BLOCK_TOKENS;
            }
            entry = (slot / BLOCK_TOKENS * a.num_kv_heads + kv_head) * BLOCK_TOKENS + slot % BLOCK_TOKENS;
        }
        entries[i] = entry;
    }
    const u32 ring_base = shared_address(ring) + part * STAGES * STAGE_BYTES;
    // Starts copying a tile. Partial results are to stay in the cache until they are merged, entries are not.
    const u64 policy = read_once();
    auto fetch = [&](u32 tile) {
        const u32 base = ring_base + tile % STAGES * STAGE_BYTES;
        const u32* const tile_entries = entries + (tile * PARTS + part) * TILE_KEYS;
#pragma unroll
        for (int i = 0; i < TILE_KEYS * PIECES / 32 / ROW_TILES; ++i) {
            const u32 piece = (i * ROW_TILES + own_tile) * 32 + lane, key = piece / PIECES, at = piece % PIECES;
            const u32 entry = tile_entries[key];
            const bool valid = entry != NONE;
            copy_async(base + key * ENTRY_STRIDE + piece_at(at, key), a.kv + u64(valid ? entry : 0) * (2 * HEAD_DIM) + at * 8, valid, policy);
        }
    };
    // The warps of a part have copied what they waited for, and are done with the tile before.
    auto meet = [&] {
        if (ROW_TILES == 1) __syncwarp();
        else asm volatile("bar.sync %0, %1;" ::"r"(1 + part), "n"(ROW_TILES * 32) : "memory");
    };

    __syncthreads();
    // Entries cached before the pass stand still; the pass's own, of the last tiles, and the queries are what the kernel before writes.
    const u32 early = min(max(cached, first_key) - first_key, (STAGES - 1) * PARTS * TILE_KEYS) / (PARTS * TILE_KEYS);
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) {
        if (s == early) wait_for_previous();
        if (s < tiles) fetch(s);
        copy_commit();
    }
    if (early == STAGES - 1) wait_for_previous();
    // Queries to shared memory, rows past the end as zeros. They are asked for ahead of one more tile, which would hold them up, and stored
    // behind it.
    constexpr int QUERY_PIECES = (BLOCK_ROWS * (HEAD_DIM / 8) + WARPS * 32 - 1) / (WARPS * 32);
    uint4 queries[QUERY_PIECES];
    auto place_of = [&](int n) { return threadIdx.x + n * WARPS * 32; };
#pragma unroll
    for (int n = 0; n < QUERY_PIECES; ++n) {
        const u32 r = place_of(n) / (HEAD_DIM / 8), at = place_of(n) % (HEAD_DIM / 8), row = first_row + r;
        const u32 token = row / group, head = kv_head * group + row % group;
        queries[n] = make_uint4(0, 0, 0, 0);
        if (r < BLOCK_ROWS && row < num_rows)
            queries[n] = __ldcg((const uint4*)(a.q + (u64(unit.first_row + token) * a.num_heads + head) * HEAD_DIM + at * 8));
    }
    if (STAGES - 1 < tiles) fetch(STAGES - 1);
    copy_commit();
#pragma unroll
    for (int n = 0; n < QUERY_PIECES; ++n) {
        const u32 r = place_of(n) / (HEAD_DIM / 8), at = place_of(n) % (HEAD_DIM / 8);
        if (r < BLOCK_ROWS) *(uint4*)(query + r * QUERY_STRIDE + at * 16) = queries[n];
    }
    __syncthreads();

    float output[HEAD_DIM / 8][4];
    float maximum[2], sum[2];
    // Per row: keys from this index on are hidden by causality.
    u32 limit[2];
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) output[n][i] = 0.0f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        maximum[half] = NEGATIVE_INFINITY;
        sum[half] = 0.0f;
        limit[half] = min(cached + (first_row + own_row + half * 8) / group + 1, end_key);
    }

    const u32 query_address = shared_address(query) + (own_tile * 16 + lane % 16) * QUERY_STRIDE + (lane / 16) * 16;
    // Queries of the first steps, and those of another one at a time.
    u32 kept[KEPT + 1][4];
#pragma unroll
    for (int k = 0; k < KEPT; ++k) load_matrices(kept[k], query_address + k * 32);
    for (u32 tile = 0; tile < tiles; ++tile) {
        // Keep the copies running: the stage freed by the last tile takes the tile STAGES - 1 ahead. At first all are under way.
        if (tile == 0) copy_wait<STAGES - 1>();
        else copy_wait<STAGES - 2>();
        meet();
        if (tile > 0) {
            if (tile + STAGES - 1 < tiles) fetch(tile + STAGES - 1);
            copy_commit();
        }

        const u32 base = ring_base + tile % STAGES * STAGE_BYTES;
        const u32 tile_key = first_key + (tile * PARTS + part) * TILE_KEYS;
        float score[2][4];
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) score[n][i] = 0.0f;
        const u32 key_entry = base + ((lane / 16) * 8 + lane % 8) * ENTRY_STRIDE;
#pragma unroll
        for (int k = 0; k < DIM_STEPS; ++k) {
            u32 keys[4];
            load_matrices(keys, row_at(key_entry, lane / 8 % 2, k));
            u32 (&rows)[4] = kept[min(k, KEPT)];
            if (k >= KEPT) load_matrices(rows, query_address + k * 32);
            mma(score[0], rows, keys[0], keys[1]);
            mma(score[1], rows, keys[2], keys[3]);
        }
        if (tile_key + TILE_KEYS > min(cached, end_key)) {
#pragma unroll
            for (int n = 0; n < 2; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    if (tile_key + n * 8 + lane % 4 * 2 + i % 2 >= limit[i / 2]) score[n][i] = NEGATIVE_INFINITY;
        }
#if CAPTURE
        if (capture != NO_CAPTURE) {
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                // Two neighbouring keys; a second one past the end falls into the row's padding.
                const u32 key = tile_key + n * 8 + lane % 4 * 2;
                if (key >= end_key) continue;
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const u32 row = first_row + own_row + half * 8;
                    if (!is_captured(row, num_rows, group)) continue;
                    const u64 at = captured_row(a.score_tokens, a.num_heads, capture, kv_head, row, group);
                    *(float2*)(a.scores + at * a.score_stride + key) =
                        make_float2(score[n][half * 2] * a.scale_log2, score[n][half * 2 + 1] * a.scale_log2);
                }
            }
        }
#endif
        // Online softmax, in powers of two.
        u32 weights[4];
        bool moved = false;
        float shrink[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float top = fmaxf(fmaxf(score[0][half * 2], score[0][half * 2 + 1]), fmaxf(score[1][half * 2], score[1][half * 2 + 1]));
            top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 1));
            top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 2));
            const float before = maximum[half], now = fmaxf(before, top);
            const float reference = finite(now) * a.scale_log2;
            shrink[half] = exp2_fast((before - finite(now)) * a.scale_log2);
            moved |= now != before;
            maximum[half] = now;
            float p[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) p[i] = exp2_fast(fmaf(score[i / 2][half * 2 + i % 2], a.scale_log2, -reference));
            sum[half] = sum[half] * shrink[half] + ((p[0] + p[1]) + (p[2] + p[3]));
            weights[half] = pack(p[0], p[1]);
            weights[half + 2] = pack(p[2], p[3]);
        }
        if (__any_sync(FULL_WARP, moved)) {
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) output[n][i] *= shrink[i / 2];
        }
        const u32 value_entry = base + (lane / 8 % 2 * 8 + lane % 8) * ENTRY_STRIDE;
#pragma unroll
        for (int n = 0; n < DIM_STEPS; ++n) {
            u32 values[4];
            load_matrices_transposed(values, row_at(value_entry, lane / 16, DIM_STEPS + n));
            mma(output[2 * n], weights, values[0], values[1]);
            mma(output[2 * n + 1], weights, values[2], values[3]);
        }
    }
    copy_wait<0>();
    meet();

    // Merge the parts. Each leaves its rows where its ring was.
    auto results_of = [&](u32 w, u32 row) { return (float*)(ring + w * STAGES * STAGE_BYTES) + row * RESULT_STRIDE; };
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const u32 row = own_row + half * 8;
        if (first_row + own_tile * 16 + half * 8 >= num_rows) break;
        float s = sum[half];
        s += __shfl_xor_sync(FULL_WARP, s, 1);
        s += __shfl_xor_sync(FULL_WARP, s, 2);
        float* const mine = results_of(part, row);
        if (lane % 4 == 0) *(float2*)(mine + HEAD_DIM) = make_float2(maximum[half], s);
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; ++n)
            *(float2*)(mine + n * 8 + lane % 4 * 2) = make_float2(output[n][half * 2], output[n][half * 2 + 1]);
    }
    __syncthreads();

    const u64 place = (u64(unit.places + chunk) * a.num_kv_heads + kv_head) * gridDim.y + row_tile;
    const bool alone = chunks == 1;
    for (u32 i = threadIdx.x; i < BLOCK_ROWS * (HEAD_DIM / 4); i += WARPS * 32) {
        const u32 r = i / (HEAD_DIM / 4), d = i % (HEAD_DIM / 4) * 4, row = first_row + r;
        if (row >= num_rows) break;
        float2 part_statistics[PARTS];
        float top = NEGATIVE_INFINITY;
#pragma unroll
        for (int w = 0; w < PARTS; ++w) {
            part_statistics[w] = *(const float2*)(results_of(w, r) + HEAD_DIM);
            top = fmaxf(top, part_statistics[w].x);
        }
        const float reference = finite(top) * a.scale_log2;
        float total = 0.0f;
        float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int w = 0; w < PARTS; ++w) {
            const float scale = exp2_fast((part_statistics[w].x - finite(top)) * a.scale_log2);
            const float4 v = *(const float4*)(results_of(w, r) + d);
            total += scale * part_statistics[w].y;
            value.x += scale * v.x;
            value.y += scale * v.y;
            value.z += scale * v.z;
            value.w += scale * v.w;
        }
        const u32 token = row / group, head = kv_head * group + row % group;
        // A row that sees no key of this chunk has no mass in it.
        const float inverse = alone || total > 0.0f ? 1.0f / total : 0.0f;
        const uint2 mean = make_uint2(pack_f16(value.x * inverse, value.y * inverse), pack_f16(value.z * inverse, value.w * inverse));
        if (alone) {
            // What merging would make of it: a row's bits must not tell whether later tokens of its span have begun another chunk.
            const float2 low = unpack_f16(mean.x), high = unpack_f16(mean.y);
            *(uint2*)(a.out + (u64(unit.first_row + token) * a.num_heads + head) * HEAD_DIM + d) =
                make_uint2(pack(low.x * total * inverse, low.y * total * inverse), pack(high.x * total * inverse, high.y * total * inverse));
#if CAPTURE
            if (d == 0 && capture != NO_CAPTURE && is_captured(row, num_rows, group))
                a.score_statistics[captured_row(a.score_tokens, a.num_heads, capture, kv_head, row, group)] = make_float2(reference, total);
#endif
        } else {
            store_to_stay(a.partials + ((place * BLOCK_ROWS + r) * HEAD_DIM + d) / 4, mean);
            if (d == 0) store_to_stay((uint2*)(a.statistics + place * BLOCK_ROWS + r), make_uint2(__float_as_uint(top), __float_as_uint(total)));
        }
    }
}
