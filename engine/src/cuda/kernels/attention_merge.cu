// The rows of heads whose keys were cut into several chunks, from the chunks' partial results, in the chunks' order.
//
// A kernel of its own: as the last work of the block that ends a head's last chunk it would keep one multiprocessor busy for longer than
// all of them take to read a short context. A warp has a row of one head. Each lane weighs one of 32 chunks, which all lanes then apply to
// four numbers each; loads of values wait neither for each other nor for the weights.
//
// While the last blocks of decode attention run, merging takes the multiprocessors' room block by block, and the kernel after it begins once
// all of merging is there: so it is to have few registers, but where its blocks are few. Then a row's chunks are read all at once.
//
// A partial result is a mean of values, and what comes out is a mean of those: IEEE halves of them keep at least as many digits as the output
// does (above 2^-16), and writing and reading them is a good part of what a batch of short lists costs. A mean beyond 65,504 becomes
// infinite, and is seen in the end.
//
// Options: HEAD_DIM; AT_A_TIME (chunks whose values are under way together, 16 or 32); those of decode attention (prelude.cuh).

#ifndef HEAD_DIM
#define HEAD_DIM 128
#endif

struct MergeArgs {
    const uint2* partials;       // [place][kv_head][row tile][BLOCK_ROWS][HEAD_DIM / 4]: means of values, as IEEE halves
    const float2* statistics;    // [place][kv_head][row tile][BLOCK_ROWS]: maximum score, sum
    half_bits* out;              // [rows, num_heads, HEAD_DIM]
    const Unit* spans;           // a unit of each span
    const u32* row_spans;        // [rows]
    const uint2* list_ranges;    // as for attention_decode
    float2* score_statistics;
    u32 num_heads, num_kv_heads;
    u32 layer;
    u32 score_tokens;
    u32 row_tiles;
    float scale_log2;
};

#ifndef AT_A_TIME
#define AT_A_TIME 16
#endif
// Turns of a warp through a row, four numbers a lane.
#define TURNS ((HEAD_DIM + 127) / 128)

// Blocks are [num_kv_heads, rows]; a warp for every head of the group, or fewer that take several in turn.
extern "C" __global__ void __launch_bounds__(256, AT_A_TIME > 16 ? 2 : HEAD_DIM > 128 ? 3 : 4) attention_merge(const MergeArgs a) {
    let_next_start();
    const u32 kv_head = blockIdx.x, group = a.num_heads / a.num_kv_heads, lane = threadIdx.x % 32;
    const Unit unit = a.spans[a.row_spans[blockIdx.y]];
    const u32 cached = unit.lists == NONE ? unit.past : __ldg(&a.list_ranges[unit.lists + a.layer * a.num_kv_heads + kv_head].y);
    const u32 chunks = chunks_of(cached + unit.tokens);
    wait_for_previous();
    if (chunks == 1) return;
    const u32 token = blockIdx.y - unit.first_row;
    const u32 stride = a.num_kv_heads * a.row_tiles * BLOCK_ROWS; // from chunk to chunk, in rows
    for (u32 member = threadIdx.x / 32; member < group; member += blockDim.x / 32) {
        const u32 row = token * group + member, head = kv_head * group + member;
        const u32 first = ((unit.places * a.num_kv_heads + kv_head) * a.row_tiles + row / BLOCK_ROWS) * BLOCK_ROWS + row % BLOCK_ROWS;
#pragma unroll 1
        for (u32 turn = 0; turn < TURNS; ++turn) {
            const u32 piece = turn * 32 + lane;
            const bool is_piece = HEAD_DIM % 128 == 0 || piece < HEAD_DIM / 4;
            u32 partial = first * (HEAD_DIM / 4) + piece;
            float top = NEGATIVE_INFINITY, total = 0.0f;
            float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            for (u32 rest = chunks; rest > 0; rest -= min(rest, 32)) {
                const float2 own = lane < rest ? __ldcg(a.statistics + first + (chunks - rest + lane) * stride) : make_float2(NEGATIVE_INFINITY, 0.0f);
                uint2 v[AT_A_TIME];
                auto read = [&](u32 chunk) {
#pragma unroll
                    for (int k = 0; k < AT_A_TIME; ++k) {
                        v[k] = is_piece && chunk + k < rest ? __ldcg(a.partials + partial) : make_uint2(0, 0);
                        partial += stride * (HEAD_DIM / 4);
                    }
                };
                read(0);
                const float now = fmaxf(top, warp_max(own.x));
                const float keep = exp2_fast((top - finite(now)) * a.scale_log2);
                const float weight = own.y * exp2_fast((own.x - finite(now)) * a.scale_log2);
                total = total * keep + warp_sum(weight);
                value = make_float4(value.x * keep, value.y * keep, value.z * keep, value.w * keep);
                top = now;
#pragma unroll 1
                for (u32 chunk = 0;;) {
#pragma unroll
                    for (int k = 0; k < AT_A_TIME; ++k) {
                        const float add = __shfl_sync(FULL_WARP, weight, chunk + k);
                        const float2 low = unpack_f16(v[k].x), high = unpack_f16(v[k].y);
                        value.x += low.x * add;
                        value.y += low.y * add;
                        value.z += high.x * add;
                        value.w += high.y * add;
                    }
                    chunk += AT_A_TIME;
                    if (chunk >= min(rest, 32)) break;
                    read(chunk);
                }
            }
            const float inverse = 1.0f / total;
            if (is_piece)
                *(uint2*)(a.out + (u64(blockIdx.y) * a.num_heads + head) * HEAD_DIM + piece * 4) =
                    make_uint2(pack(value.x * inverse, value.y * inverse), pack(value.z * inverse, value.w * inverse));
#if CAPTURE
            const u32 capture = unit.chunk >> 16;
            if (piece == 0 && capture != NO_CAPTURE && is_captured(row, unit.tokens * group, group))
                a.score_statistics[captured_row(a.score_tokens, a.num_heads, capture, kv_head, row, group)] = make_float2(top * a.scale_log2, total);
#endif
        }
    }
}
