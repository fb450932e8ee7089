// A sum over the GPUs of a split model, through each other's memory: every rank sends its part to all others' inboxes and adds up what
// it finds in its own, rank by rank. One way over the link and no barrier: each 8 bytes carry 4 of data and the number of the sum that
// they belong to, so whoever reads them knows by themselves whether they have come (NCCL's LL protocol does so).
//
// Where there is more to send than a way over the link takes time (`slice`), every rank adds up a slice for all: parts go to the slice's
// owner, and sums from there to all others. The order is the same.
//
// Sums take turns between two halves of the inboxes. A rank that sends for sum n + 2 has ended sum n + 1, for which it needed
// something from every other rank, and that was sent after sum n had ended there: nobody reads the half any more.

// Mirrors `MOST_RANKS` in peer_sum.rs.
#define MOST_RANKS 8

// How often a block looks for a part before it asks whether anybody is still there: some milliseconds.
#define PATIENCE 4096

struct PeerSumArgs {
    float* x;                   // [2 * pairs]: this rank's part, then the sum
    uint4* inboxes[MOST_RANKS]; // of every rank: [2 halves, ranks, capacity] pairs
    u32* state;                 // this rank's own: the last sum's number, and blocks that are through with this one
    const u32* abandoned;       // on the host: not 0 once a rank has gone
    u32 pairs, capacity, rank, ranks;
    u32 slice;                  // pairs that a rank adds up for all; 0: every rank adds up all pairs
};

__device__ __forceinline__ void send(uint4* to, float2 part, u32 number) {
    asm volatile("st.volatile.global.v4.u32 [%0], {%1, %3, %2, %3};" ::"l"(to), "r"(__float_as_uint(part.x)),
                 "r"(__float_as_uint(part.y)), "r"(number) : "memory");
}

// A pair as it lies in an inbox.
struct Packet {
    u32 x, first, y, second;

    __device__ __forceinline__ void load(const uint4* from) {
        asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(x), "=r"(first), "=r"(y), "=r"(second) : "l"(from) : "memory");
    }
    __device__ __forceinline__ bool is_of(u32 number) const { return first == number && second == number; }
    __device__ __forceinline__ float2 pair() const { return make_float2(__uint_as_float(x), __uint_as_float(y)); }
};

// Waits for the pairs of sum `number` of the ranks in `missing`, a bit each, `stride` from one to the next; they are looked for all at a
// time. Whatever lies there once a rank has gone.
__device__ __forceinline__ void receive(Packet (&packets)[MOST_RANKS], u32 missing, const uint4* from, u64 stride, u32 number, const u32* abandoned) {
    for (u32 looks = 1; missing; ++looks) {
#pragma unroll
        for (u32 r = 0; r < MOST_RANKS; ++r)
            if (missing >> r & 1) packets[r].load(from + r * stride);
#pragma unroll
        for (u32 r = 0; r < MOST_RANKS; ++r)
            if ((missing >> r & 1) && packets[r].is_of(number)) missing &= ~(1u << r);
        if (looks % PATIENCE == 0 && load_volatile(abandoned)) break;
    }
}

// By selection: an index would copy the arguments to local memory.
__device__ __forceinline__ uint4* inbox_of(const PeerSumArgs& a, u32 rank) {
    uint4* inbox = a.inboxes[0];
#pragma unroll
    for (u32 r = 1; r < MOST_RANKS; ++r)
        if (r == rank) inbox = a.inboxes[r];
    return inbox;
}

// All blocks must fit the device at a time, since they wait for blocks elsewhere that wait for others here. Mirrors `BLOCKS` in peer_sum.rs.
extern "C" __global__ void __launch_bounds__(256, 4) peer_sum(const PeerSumArgs a) {
    begin_kernel();
    u32 number = load_volatile(a.state) + 1;
    // 0 is what an inbox begins with; halves go on taking turns.
    if (number == 0) number = 2;
    const u32 first = blockIdx.x * 256 + threadIdx.x, step = gridDim.x * 256;
    const u64 half = u64(number % 2) * a.ranks * a.capacity;
    float2* const x = (float2*)a.x;
    const u64 own_place = half + u64(a.rank) * a.capacity;
    auto send_to = [&](u32 r, u32 i, float2 part) { send(inbox_of(a, r) + own_place + i, part, number); };
    auto send_to_all = [&](u32 i, float2 part) {
#pragma unroll
        for (u32 r = 0; r < MOST_RANKS; ++r)
            if (r < a.ranks && r != a.rank) send(a.inboxes[r] + own_place + i, part, number);
    };
    const uint4* const inbox = inbox_of(a, a.rank) + half;
    const u32 others = ((1u << a.ranks) - 1) & ~(1u << a.rank);
    auto add_up = [&](u32 i) {
        const float2 own = x[i];
        Packet packets[MOST_RANKS];
        receive(packets, others, inbox + i, a.capacity, number, a.abandoned);
        float2 sum = own;
#pragma unroll
        for (u32 r = 0; r < MOST_RANKS; ++r) {
            if (r >= a.ranks) break;
            const float2 part = r == a.rank ? own : packets[r].pair();
            sum = r == 0 ? part : make_float2(sum.x + part.x, sum.y + part.y);
        }
        x[i] = sum;
        return sum;
    };
    if (a.slice == 0) {
        for (u32 i = first; i < a.pairs; i += step) send_to_all(i, x[i]);
        for (u32 i = first; i < a.pairs; i += step) add_up(i);
    } else {
        const u32 begin = min(a.rank * a.slice, a.pairs), end = min(begin + a.slice, a.pairs);
        for (u32 i = first; i < a.pairs; i += step)
            if (i < begin || i >= end) send_to(i / a.slice, i, x[i]);
        for (u32 i = begin + first; i < end; i += step) send_to_all(i, add_up(i));
        for (u32 i = first; i < a.pairs; i += step) {
            if (i >= begin && i < end) continue;
            Packet packets[MOST_RANKS];
            // The owner's, in the first place.
            receive(packets, 1, inbox + u64(i / a.slice) * a.capacity + i, 0, number, a.abandoned);
            x[i] = packets[0].pair();
        }
    }
    // Every block has read the last sum's number when the last of them comes here.
    __syncthreads();
    if (threadIdx.x == 0 && atomicAdd(a.state + 1, 1) == gridDim.x - 1) {
        a.state[1] = 0;
        a.state[0] = number;
    }
}
