// From bitmaps of positions to index lists of places in the cache.

// Threads per list. Mirrors `EXPAND_THREADS` in batch.rs.
#define THREADS 256

// Mirrors `LIST_WORDS` in batch.rs.
struct List {
    u32 bitmap; // where its bitmap begins, in words
    u32 words;  // of the bitmap
    u32 slots;  // where its entries go
    u32 blocks; // where its span's block table begins
};

// slots of a list = block * BLOCK_TOKENS + offset of each position in its bitmap, in order. One block per list.
//
// Nobody is let start early: attention reads the slots before it waits, so the pass's other kernels begin when all are there.
extern "C" __global__ void __launch_bounds__(THREADS) expand_lists(const List* lists, const u32* bitmaps, const u32* block_tables, u32* slots) {
    wait_for_previous();
    __shared__ u32 warp_totals[THREADS / 32];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const List list = lists[blockIdx.x];
    u32 at = list.slots;
    for (u32 first = 0; first < list.words; first += THREADS) {
        const u32 word = first + threadIdx.x;
        u32 bits = word < list.words ? bitmaps[list.bitmap + word] : 0;
        const u32 count = __popc(bits);
        u32 up_to = count; // members in the warp's words up to this one
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const u32 other = __shfl_up_sync(FULL_WARP, up_to, step);
            if (lane >= step) up_to += other;
        }
        if (lane == 31) warp_totals[warp] = up_to;
        __syncthreads();
        u32 own = at + up_to - count;
        for (u32 w = 0; w < THREADS / 32; ++w) {
            if (w < warp) own += warp_totals[w];
            at += warp_totals[w];
        }
        // A word's positions lie in one block of the cache.
        const u32 base = bits ? block_tables[list.blocks + word * 32 / BLOCK_TOKENS] * BLOCK_TOKENS + word * 32 % BLOCK_TOKENS : 0;
        while (bits) {
            slots[own++] = base + __ffs(bits) - 1;
            bits &= bits - 1;
        }
        __syncthreads();
    }
}
