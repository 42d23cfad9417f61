// Stream compaction: from "which tokens are kept" to the list of their positions, in token order.
//
// A tile is the part of the tokens that one block handles: THREADS x ITEMS tokens, with ITEMS neighbours for each thread.
// The caller knows of every token whether it is kept for sure, or is a tie, of which only the first `allowed` of the whole
// call are kept (when selecting the K best, tokens whose score equals the K-th; threshold selection has no ties). The
// position of a kept token in the list is the number of sure tokens before it, plus the number of ties before it, at most
// `allowed`.
//
// The tiles of a call communicate through one word per tile: its counts, and a bit that says that they are valid. A tile
// publishes its counts before it waits for earlier tiles, and tile numbers are assigned when a block starts. So an earlier
// tile is always running or finished, and no block waits for one that cannot start. The result does not depend on the
// order of the blocks.

#pragma once

#include "native/launch.cuh"

namespace gsx {

// Which items of a thread are kept, for sure or as ties: bit i stands for item i.
struct Choice {
    uint32_t sure;
    uint32_t ties;
};

// Numbers of sure tokens and of ties in some part of the tokens.
struct Counts {
    uint32_t sure;
    uint32_t ties;
};

__host__ __device__ inline uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }

// The counts of one tile in one word: 16 bits are enough for the items of a tile.
constexpr int kTileItemsMax = 16384;
__device__ inline uint32_t packed(Choice choice) {
    return static_cast<uint32_t>(__popc(choice.sure)) | static_cast<uint32_t>(__popc(choice.ties)) << 16;
}
__device__ inline Counts unpacked(uint32_t word) { return {word & 0xffffu, word >> 16}; }

// The counts of one tile in the form that other tiles read: the top bit says that they are valid.
constexpr unsigned long long kPublished = 1ull << 63;
__device__ inline unsigned long long published(Counts counts) {
    return kPublished | static_cast<unsigned long long>(counts.sure) << 31 | counts.ties;
}

// Write the tile's part of the list.
// Args: before: counts of the preceding threads in the tile; total: of the tile; earlier: of all earlier tiles.
template <int THREADS, int ITEMS>
__device__ void writeKept(Choice choice, Counts before, Counts total, Counts earlier, uint32_t allowed, int64_t firstToken,
                          int64_t* index) {
    static_assert(THREADS * ITEMS <= kTileItemsMax, "offsets in a tile are stored in 16 bits");
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

// The memory through which the tiles of a call communicate.
struct TileState {
    uint32_t* next;             // the next tile number; initially 0
    unsigned long long* words;  // one word for each tile; initially 0
};

// Draw the number of this block's tile. Must be called by every thread.
__device__ inline uint32_t drawTile(TileState state) {
    __shared__ uint32_t tile;
    if (threadIdx.x == 0) tile = atomicAdd(state.next, 1u);
    __syncthreads();
    return tile;
}

// Publish the tile's counts, and sum those of all earlier tiles. Must be called by every thread.
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
