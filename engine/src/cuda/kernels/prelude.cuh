// What every kernel shares: number types, conversions, tensor-core and copy instructions.
//
// No header is included, so that NVRTC needs nothing but its library. Compile options set HALF_IS_F16 (0: bfloat16).
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifndef HALF_IS_F16
#define HALF_IS_F16 0
#endif

// A 16-bit float, bfloat16 or IEEE half as compiled, by its bits.
typedef u16 half_bits;

#define FULL_WARP 0xffffffffu
#define NEGATIVE_INFINITY __int_as_float(0xff800000)
#define LOG2_E 1.4426950408889634f

__device__ __forceinline__ float to_float(half_bits x) {
#if HALF_IS_F16
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
#else
    return __uint_as_float(u32(x) << 16);
#endif
}

// Two floats rounded to nearest; `low` goes to the lower address.
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 y;
#if HALF_IS_F16
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
#endif
    return y;
}

// Two floats as IEEE halves, whatever the 16-bit type is.
__device__ __forceinline__ u32 pack_f16(float low, float high) {
    u32 y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

__device__ __forceinline__ float2 unpack_f16(u32 x) {
    float2 y;
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}" : "=f"(y.x), "=f"(y.y) : "r"(x));
    return y;
}

__device__ __forceinline__ half_bits to_half(float x) { return half_bits(pack(x, 0.0f)); }

// d[16x8] += a[16x16] · b[16x8], in f32.
__device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if HALF_IS_F16
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8x8 matrices; lane i names row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrices(u32 (&r)[4], u32 shared_address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address) : "memory");
}

// The same, each transposed.
__device__ __forceinline__ void load_matrices_transposed(u32 (&r)[4], u32 shared_address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address) : "memory");
}

__device__ __forceinline__ u32 shared_address(const void* p) { return u32(__cvta_generic_to_shared(p)); }

// Copies up to 16 bytes to shared memory asynchronously, past L1; zeros in the rest of the 16.
__device__ __forceinline__ void copy_async_part(u32 to, const void* from, u32 bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// Copies 16 bytes; zeros where `valid` is false.
__device__ __forceinline__ void copy_async(u32 to, const void* from, bool valid) { copy_async_part(to, from, valid ? 16 : 0); }

// For what is read once: it leaves the L2 cache first.
__device__ __forceinline__ u64 read_once() {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ __forceinline__ void copy_async(u32 to, const void* from, bool valid, u64 policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0), "l"(policy) : "memory");
}

// Stores what is soon read again: it leaves the L2 cache last.
__device__ __forceinline__ void store_to_stay(uint2* to, uint2 value) {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("st.global.L2::cache_hint.v2.b32 [%0], {%1, %2}, %3;" ::"l"(to), "r"(value.x), "r"(value.y), "l"(policy) : "memory");
}

__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most N of this thread's copy groups are still under way.
template <int N> __device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// 2^x; exactly 1 at 0 and 0 at -infinity.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Kernels overlap at their ends on Hopper and later (programmatic dependent launch): a kernel's blocks may start once every block of
// the one before has called `let_next_start` or ended. Until `wait_for_previous` returns, that one and those before it may still
// run: a kernel reads before it only what was there when the pass began (weights, the pass's description, entries cached
// earlier), and writes nothing. Every block waits, else the end of its kernel would not tell of the end of those before.
// After it, what others wrote is not read through the read-only path (`__ldg`), whose loads the compiler may move.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// What most kernels begin with: they have nothing to do ahead of the previous one's end but to be there.
__device__ __forceinline__ void begin_kernel() {
    let_next_start();
    wait_for_previous();
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, step));
    return x;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(FULL_WARP, x, step);
    return x;
}

// One span of a batch: a sequence's rows in this pass. Mirrors `SPAN_WORDS` in batch.rs.
struct Span {
    u32 first_row; // among the pass's rows
    u32 tokens;    // rows
    u32 past;      // positions cached before the pass
    u32 blocks;    // where its block table begins
};

// Positions per KV block, as in kv_cache.rs.
#define BLOCK_TOKENS 64
#define NONE 0xffffffffu

// Reads what another kernel, or another GPU, may be writing.
__device__ __forceinline__ u32 load_volatile(const u32* p) {
    u32 y;
    asm volatile("ld.volatile.global.u32 %0, [%1];" : "=r"(y) : "l"(p) : "memory");
    return y;
}

// Where a product that is one of two ranks' parts of a sum goes instead of `out`: see peer_norm.cu. Mirrors `Sending` in peer_norm.rs.
struct Sending {
    u32* own;        // this rank's parts, for itself; null: the product is no such part
    u32* other;      // and for the other rank, in its memory
    const u32* turn; // which half of them is this sum's: even or odd
    u32 half;        // elements of half
};

// What no element of a sum is sent as: arithmetic makes no NaN with these bits, and `send` none of any.
#define NOT_SENT 0xffffffffu

// The first element of the sum's half; NONE where the product is no part of one.
__device__ __forceinline__ u32 half_of(const Sending& s) {
    return s.own == nullptr ? NONE : load_volatile(s.turn) % 2 * s.half;
}

// Element `at` of this rank's part goes to both ranks.
__device__ __forceinline__ void send(const Sending& s, u64 at, float part) {
    u32 bits = __float_as_uint(part);
    if (bits == NOT_SENT) bits = 0x7fffffffu;
    asm volatile("st.volatile.global.u32 [%0], %1;" ::"l"(s.other + at), "r"(bits) : "memory");
    asm volatile("st.volatile.global.u32 [%0], %1;" ::"l"(s.own + at), "r"(bits) : "memory");
}

// Products: a row's inputs are split in so many ways, tile by tile in turn, in all kernels: their sums have one order.
#define SPLITS 8
#define TILE_INPUTS 64

// Rows of 16-bit numbers as lanes of linear.cu read them: [tile of TILE_INPUTS numbers][row][lane % 4][instruction][4]. A lane's numbers of a tile
// lie side by side, and a row's fill a line. Where the four numbers of a row from number 4 * `four` on are, in fours.
__device__ __forceinline__ u32 four_by_lane(u32 rows, u32 row, u32 four) {
    return ((four / 16 * rows + row) * 4 + four % 4) * 4 + four % 16 / 4;
}

// Mirrors `ProjectionArgs` in linear.rs.
struct Projection {
    const half_bits* weight; // [outputs, inputs]
    const float* bias;       // [outputs] or null
    u32 outputs;
    u32 first_tile;          // of the kernel's tiles of outputs, among all projections'
};

// What kernels of products are called with; mirrors `LinearArgs` in linear.rs.
struct LinearArgs {
    const half_bits* x;      // [rows, inputs]
    void* out;               // [rows, out_stride]
    Projection projections[3]; // unused ones begin at tile ~0
    u32 rows, inputs;        // inputs: a multiple of 8
    u32 out_stride;
    u32 out_by_lane;         // of EPILOGUE 2: whether results go where `four_by_lane` says
    Sending sending;         // not with EPILOGUE 2
};

// Which projection holds an output tile; unused projections begin past the last tile.
__device__ __forceinline__ u32 number_of(const LinearArgs& a, u32 tile) {
    return (tile >= a.projections[1].first_tile) + (tile >= a.projections[2].first_tile);
}

// Tiles of inputs that so many splits have, from one on: split k has tile k and every SPLITS-th after it.
__device__ __forceinline__ u32 tiles_of(u32 first_split, u32 splits, u32 input_tiles) {
    u32 tiles = 0;
    for (u32 k = first_split; k < first_split + splits; ++k) tiles += input_tiles > k ? (input_tiles - k + SPLITS - 1) / SPLITS : 0;
    return tiles;
}

// Where the number of `out` of projection `number` is in a row of results; projections are stored side by side.
__device__ __forceinline__ u64 product_at(const LinearArgs& a, u32 number, u32 row, u32 out) {
    u64 at = u64(row) * a.out_stride + out;
    if (number > 0) at += a.projections[0].outputs;
    if (number > 1) at += a.projections[1].outputs;
    return at;
}

// What is added to an output's sums: where there is none they keep their bits, zeros their signs.
struct Biases {
    bool is, is_up;
    float own, up; // `up`: of the second matrix, for EPILOGUE 2
};

template <int EPILOGUE_> __device__ __forceinline__ Biases biases_of(const LinearArgs& a, const Projection& p, u32 out) {
    const float* const up = EPILOGUE_ == 2 ? a.projections[1].bias : nullptr;
    return {p.bias != nullptr, up != nullptr, p.bias ? p.bias[out] : 0.0f, up ? up[out] : 0.0f};
}

// What becomes of a sum. EPILOGUE 0: store f32; 1: add to `other`, which was there; 2: silu(sum) * other, of gate and up, 16-bit. `half`:
// as `half_of` says.
template <int EPILOGUE_>
__device__ __forceinline__ void store_biased(const LinearArgs& a, const Biases& biases, u64 at, float sum, float other, u32 half) {
    if (biases.is) sum += biases.own;
    if (EPILOGUE_ == 2) {
        if (biases.is_up) other += biases.up;
        ((half_bits*)a.out)[at] = to_half(sum / (1.0f + __expf(-sum)) * other);
        return;
    }
    if (EPILOGUE_ == 1) sum = other + sum;
    if (half == NONE)
        ((float*)a.out)[at] = sum;
    else
        send(a.sending, half + at, sum);
}

// The same for one sum of an output.
template <int EPILOGUE_>
__device__ __forceinline__ void store_product(const LinearArgs& a, const Projection& p, u64 at, u32 out, float sum, float other, u32 half) {
    store_biased<EPILOGUE_>(a, biases_of<EPILOGUE_>(a, p, out), at, sum, other, half);
}

// Decode attention: both of its kernels are compiled with ROW_TILES (16 query rows each), SMALLEST (how many chunks of keys have the
// smallest size), CHUNK (keys of the largest) and CAPTURE (hand out scores: 1 of every token, 2 of the last one).
#ifndef ROW_TILES
#define ROW_TILES 1
#endif
#ifndef CHUNK
#define CHUNK 512
#endif
#ifndef SMALLEST
#define SMALLEST 8
#endif
#ifndef CAPTURE
#define CAPTURE 0
#endif
#define BLOCK_ROWS (16 * ROW_TILES)

// How keys are cut: sizes of chunks, smallest first, and how many there are of each, before those of CHUNK keys. Mirrors `GROWING` in
// chunks.rs.
#define GROWING_SIZES 3
#define GROWING_KEYS {256, 320, 512}
#define GROWING_CHUNKS {SMALLEST, 16, 20}

__device__ __forceinline__ u32 first_key_of(u32 chunk) {
    constexpr u32 sizes[] = GROWING_KEYS, counts[] = GROWING_CHUNKS;
    u32 key = 0;
#pragma unroll
    for (int size = 0; size < GROWING_SIZES; ++size) {
        const u32 keys = sizes[size] < CHUNK ? sizes[size] : CHUNK;
        if (chunk <= counts[size]) return key + chunk * keys;
        key += counts[size] * keys;
        chunk -= counts[size];
    }
    return key + chunk * CHUNK;
}

__device__ __forceinline__ u32 chunks_of(u32 keys) {
    constexpr u32 sizes[] = GROWING_KEYS, counts[] = GROWING_CHUNKS;
    u32 chunks = 0;
#pragma unroll
    for (int size = 0; size < GROWING_SIZES; ++size) {
        const u32 each = sizes[size] < CHUNK ? sizes[size] : CHUNK;
        if (keys <= counts[size] * each) return chunks + (keys + each - 1) / each;
        keys -= counts[size] * each;
        chunks += counts[size];
    }
    return chunks + (keys + CHUNK - 1) / CHUNK;
}

// A chunk of keys of one span. Mirrors `UNIT_WORDS` in batch.rs.
struct Unit {
    u32 span;      // its number; ~0: padding
    u32 chunk;     // below, its number; above, that of its span among the capturing ones, 0xffff: none
    u32 first_row; // of the span, among the pass's rows
    u32 tokens;    // rows of the span
    u32 past;      // positions cached before the pass
    u32 blocks;    // where the span's block table begins
    u32 lists;     // where its list ranges begin; ~0: dense
    u32 places;    // where the partial results of the span's chunks begin
};

#define NO_CAPTURE 0xffffu

// Whether a query row's scores are handed out.
__device__ __forceinline__ bool is_captured(u32 row, u32 num_rows, u32 group) {
    return CAPTURE && row < num_rows && (CAPTURE == 1 || row + group >= num_rows);
}

// Where they go: rows of all tokens, or of the last one alone.
__device__ __forceinline__ u64 captured_row(u32 score_tokens, u32 num_heads, u32 capture, u32 kv_head, u32 row, u32 group) {
    const u32 token = CAPTURE == 1 ? row / group : 0;
    return (u64(capture) * score_tokens + token) * num_heads + kv_head * group + row % group;
}

// A maximum to subtract; where a row has seen no key, any finite one gives zeros. Maxima are subtracted before they are scaled: keys
// that causality hides from a row leave its maximum alone, and then the factor must be 1 to the last bit (a product less its own
// rounding, as one fused operation, would be off by that rounding).
__device__ __forceinline__ float finite(float maximum) { return maximum == NEGATIVE_INFINITY ? 0.0f : maximum; }
