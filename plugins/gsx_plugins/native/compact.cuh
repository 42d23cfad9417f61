// From "which tokens are kept" to the list of their places, in token order.
//
// A tile is what one block looks at: THREADS x ITEMS tokens, ITEMS neighbours a thread. Of every token the caller knows
// whether it is kept for sure, or is a tie, of which only the first `allowed` of the whole call are kept (selection of
// the K best: tokens whose score is that of the K-th; threshold selection has no ties). A kept token's place in the list
// is the number of sure tokens before it plus the number of ties before it, at most `allowed`.
//
// Tiles of one call learn from each other by one word a tile: its counts, and a bit that says that they are there. A tile
// publishes before it waits for earlier ones, and numbers are drawn when a block starts, so an earlier tile is always
// running or done and nobody waits for a block that cannot start. The result does not depend on the order of blocks.

#pragma once

#include "native/launch.cuh"

namespace gsx {

// Which of a thread's items are kept: bit i stands for item i.
struct Choice {
    uint32_t sure;
    uint32_t ties;
};

// Counts of sure tokens and of ties, of a part of the tokens.
struct Counts {
    uint32_t sure;
    uint32_t ties;
};

__host__ __device__ inline uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }

// Counts of one tile in one word: 16 bits are enough for the items of a tile.
constexpr int kTileItemsMax = 16384;
__device__ inline uint32_t packed(Choice choice) {
    return static_cast<uint32_t>(__popc(choice.sure)) | static_cast<uint32_t>(__popc(choice.ties)) << 16;
}
__device__ inline Counts unpacked(uint32_t word) { return {word & 0xffffu, word >> 16}; }

// Counts of one tile as other tiles read them: the top bit says that they are there.
constexpr unsigned long long kPublished = 1ull << 63;
__device__ inline unsigned long long published(Counts counts) {
    return kPublished | static_cast<unsigned long long>(counts.sure) << 31 | counts.ties;
}

// Write the tile's part of the list.
// Args: before: counts of the thread's predecessors in the tile; total: of the tile; earlier: of all earlier tiles.
template <int THREADS, int ITEMS>
__device__ void writeKept(Choice choice, Counts before, Counts total, Counts earlier, uint32_t allowed, int64_t firstToken,
                          int64_t* index) {
    static_assert(THREADS * ITEMS <= kTileItemsMax, "offsets in a tile are kept in 16 bits");
    __shared__ uint16_t kept[THREADS * ITEMS];
    const uint32_t tiesUsed = smaller(earlier.ties, allowed);
    const uint32_t tiesBefore = smaller(earlier.ties + before.ties, allowed);
    uint32_t ties = choice.ties;
    for (uint32_t last = tiesBefore + __popc(ties); last > allowed; --last) ties &= ~(0x80000000u >> __clz(ties));
    const uint32_t mine = choice.sure | ties;
    uint32_t place = before.sure + tiesBefore - tiesUsed;
    for (int item = 0; item < ITEMS; ++item) {
        if (mine >> item & 1) kept[place++] = static_cast<uint16_t>(threadIdx.x * ITEMS + item);
    }
    __syncthreads();
    const uint32_t count = total.sure + smaller(earlier.ties + total.ties, allowed) - tiesUsed;
    int64_t* out = index + earlier.sure + tiesUsed;
    for (uint32_t place = threadIdx.x; place < count; place += THREADS) out[place] = firstToken + kept[place];
}

// Tiles of a call that talk to each other.
struct TileState {
    uint32_t* next;             // the next tile number; 0 at the start
    unsigned long long* words;  // one word a tile; 0 at the start
};

// The number of this block's tile. Every thread calls it.
__device__ inline uint32_t drawTile(TileState state) {
    __shared__ uint32_t tile;
    if (threadIdx.x == 0) tile = atomicAdd(state.next, 1u);
    __syncthreads();
    return tile;
}

// Publish the tile's counts and sum those of all earlier tiles. Every thread calls it.
template <int THREADS>
__device__ Counts sumEarlierTiles(TileState state, uint32_t tile, Counts total) {
    volatile unsigned long long* words = state.words;
    if (threadIdx.x == 0) words[tile] = published(total);
    Counts sum{0, 0};
    for (uint32_t other = threadIdx.x; other < tile; other += THREADS) {
        unsigned long long word = words[other];
        while (!(word & kPublished)) word = words[other];
        sum.sure += static_cast<uint32_t>(word >> 31) & 0x7fffffffu;
        sum.ties += static_cast<uint32_t>(word) & 0x7fffffffu;
    }
    Counts all{0, 0};
    exclusiveSum<THREADS>(sum.sure, all.sure);
    exclusiveSum<THREADS>(sum.ties, all.ties);
    return all;
}

}  // namespace gsx
