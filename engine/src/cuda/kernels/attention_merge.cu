// The rows of heads whose keys were cut into several chunks, from the chunks' partial results, in the chunks' order.
//
// A kernel of its own: as the last work of the block that ends a head's last chunk it would keep one multiprocessor busy for longer than
// all of them take to read a short context. A thread has four numbers of a row; its loads do not depend on each other.
//
// A partial result is a mean of values, and what comes out is a mean of those: IEEE halves of them keep at least as many digits as the output
// does (above 2^-16), and writing and reading them is a good part of what a batch of short lists costs. A mean beyond 65,504 becomes
// infinite, and is seen in the end.
//
// Options: HEAD_DIM, and those of decode attention (prelude.cuh).

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

// What chunks add up to: their largest score, mass relative to it, and four numbers of their weighted values.
struct Merged {
    float top, total;
    float4 value;
};

// Of so many chunks, `stride` rows apart, with the loads of AT_A_TIME of them under way together.
template <int AT_A_TIME>
__device__ __forceinline__ Merged merge(const MergeArgs& a, u64 first, u64 stride, u32 chunks, u32 d) {
    float top = NEGATIVE_INFINITY, total = 0.0f;
    float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (u32 c = 0; c < chunks; c += AT_A_TIME) {
        float2 s[AT_A_TIME];
        uint2 v[AT_A_TIME];
#pragma unroll
        for (int k = 0; k < AT_A_TIME; ++k) {
            const u64 at = first + min(c + k, chunks - 1) * stride;
            s[k] = __ldcg(a.statistics + at);
            v[k] = __ldcg(a.partials + (at * HEAD_DIM + d) / 4);
        }
        float now = top;
#pragma unroll
        for (int k = 0; k < AT_A_TIME; ++k) now = fmaxf(now, s[k].x);
        const float keep = exp2_fast((top - finite(now)) * a.scale_log2);
        total *= keep;
        value = make_float4(value.x * keep, value.y * keep, value.z * keep, value.w * keep);
#pragma unroll
        for (int k = 0; k < AT_A_TIME; ++k) {
            const float add = c + k < chunks ? s[k].y * exp2_fast((s[k].x - finite(now)) * a.scale_log2) : 0.0f;
            const float2 low = unpack_f16(v[k].x), high = unpack_f16(v[k].y);
            total += add;
            value.x += low.x * add;
            value.y += low.y * add;
            value.z += high.x * add;
            value.w += high.y * add;
        }
        top = now;
    }
    return {top, total, value};
}

// Blocks are [num_kv_heads, rows]; group * HEAD_DIM / 4 threads, or fewer that take several turns.
extern "C" __global__ void __launch_bounds__(256) attention_merge(const MergeArgs a) {
    let_next_start();
    const u32 kv_head = blockIdx.x, group = a.num_heads / a.num_kv_heads;
    const Unit unit = a.spans[a.row_spans[blockIdx.y]];
    const u32 cached = unit.lists == NONE ? unit.past : __ldg(&a.list_ranges[unit.lists + a.layer * a.num_kv_heads + kv_head].y);
    const u32 chunks = chunks_of(cached + unit.tokens);
    wait_for_previous();
    if (chunks == 1) return;
    const u32 token = blockIdx.y - unit.first_row;
    const u64 stride = u64(a.num_kv_heads) * a.row_tiles * BLOCK_ROWS;
    for (u32 i = threadIdx.x; i < group * (HEAD_DIM / 4); i += blockDim.x) {
        const u32 member = i / (HEAD_DIM / 4), d = i % (HEAD_DIM / 4) * 4, row = token * group + member;
        const u64 first = ((u64(unit.places) * a.num_kv_heads + kv_head) * a.row_tiles + row / BLOCK_ROWS) * BLOCK_ROWS + row % BLOCK_ROWS;
        // Waiting for memory once is worth reading the last chunk again; for a few chunks it is not.
        const auto [top, total, value] = chunks <= 4   ? merge<4>(a, first, stride, chunks, d)
                                         : chunks <= 8 ? merge<8>(a, first, stride, chunks, d)
                                                       : merge<16>(a, first, stride, chunks, d);
        const float inverse = 1.0f / total;
        const u32 head = kv_head * group + member;
        *(uint2*)(a.out + (u64(blockIdx.y) * a.num_heads + head) * HEAD_DIM + d) =
            make_uint2(pack(value.x * inverse, value.y * inverse), pack(value.z * inverse, value.w * inverse));
#if CAPTURE
        const u32 capture = unit.chunk >> 16;
        if (d == 0 && capture != NO_CAPTURE && is_captured(row, unit.tokens * group, group))
            a.score_statistics[captured_row(a.score_tokens, a.num_heads, capture, kv_head, row, group)] = make_float2(top * a.scale_log2, total);
#endif
    }
}
