// Selection of the K best scores. Both methods find the key of the K-th best score (the pivot). Keys above it are kept, and
// of those equal to it the first ones, as many as are still needed.
//
// Up to kOneBlock tokens: one block holds all keys in registers and determines two bits of the pivot per step, by counting
// how many keys reach each of three candidates. This needs no atomics, so its time does not depend on the scores (gate
// scores share their leading bits, so the atomics of a histogram would collide). It skips the bits that all keys share, and
// stops when exactly K keys reach a candidate.
//
// Above that: three kernels build histograms of digits of 11, 11 and 10 bits, each over the keys that share the digits
// found so far; the last block of each kernel picks the digit. A fourth kernel writes the list (compact.cuh).

#include "topk_gather/kernel.h"

#include "native/check.h"
#include "native/compact.cuh"
#include "native/scores.cuh"
#include "topk_gather/ordered_key.h"

namespace gsx {
namespace {

constexpr int64_t kFewTokens = 512;
constexpr int64_t kManyTokens = 8192;
constexpr int64_t kOneBlock = 16384;
constexpr int kTileThreads = 256;
constexpr int kTileItems = 8;
constexpr int64_t kTile = kTileThreads * kTileItems;

int64_t tilesOf(int64_t tokens) { return (tokens + kTile - 1) / kTile; }

// The keys of a thread's items; kBelowAll beyond the end.
template <int ITEMS>
__device__ void loadKeys(const float* score, int64_t first, int64_t tokens, uint32_t (&keys)[ITEMS]) {
    float scores[ITEMS];
    loadScores<ITEMS>(score, first, tokens, 0.f, scores);
    for (int item = 0; item < ITEMS; ++item) {
        keys[item] = first + item < tokens ? orderedKey(__float_as_uint(scores[item])) : kBelowAll;
    }
}

// The smallest and the greatest key of the block's tokens. Must be called by every thread.
template <int THREADS, int ITEMS>
__device__ uint2 keyRange(const uint32_t (&keys)[ITEMS]) {
    constexpr int kWarps = THREADS / kWarp;
    __shared__ uint32_t least[kWarps], greatest[kWarps];
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    uint32_t low = kAboveAll, high = kBelowAll;
    for (const uint32_t key : keys) {
        if (key != kBelowAll && key < low) low = key;
        if (key > high) high = key;
    }
    low = __reduce_min_sync(kWholeWarp, low);
    high = __reduce_max_sync(kWholeWarp, high);
    if (lane == 0) {
        least[threadIdx.x / kWarp] = low;
        greatest[threadIdx.x / kWarp] = high;
    }
    __syncthreads();
    low = __reduce_min_sync(kWholeWarp, lane < kWarps ? least[lane] : kAboveAll);
    high = __reduce_max_sync(kWholeWarp, lane < kWarps ? greatest[lane] : kBelowAll);
    return {low, high};
}

// Add one if the key reaches the limit, which must not be 0: key - limit then sets the carry. The time of the single block
// is determined by its number of instructions, and without the assembly the compiler generates twice as many here.
__device__ inline void countReached(uint32_t& count, uint32_t key, uint32_t limit) {
#ifdef __CUDA_ARCH__
    asm("{\n\t.reg .u32 rest;\n\tadd.cc.u32 rest, %1, %2;\n\taddc.u32 %0, %0, 0;\n\t}"
        : "+r"(count)
        : "r"(key), "r"(0u - limit));
#else
    count += key >= limit;
#endif
}

// Find the pivot: keys above it are kept, and the first keys equal to it until there are enough.
// Must be called by every thread, with wanted >= 1.
template <int THREADS, int ITEMS>
__device__ uint32_t findPivot(const uint32_t (&keys)[ITEMS], uint32_t wanted) {
    constexpr int kWarps = THREADS / kWarp;
    constexpr int kField = 10;  // bits for the count of a warp; three counts share a word
    constexpr uint32_t kFieldMask = (1u << kField) - 1;
    static_assert(kWarp * ITEMS <= kFieldMask, "the count of a warp fits its field");
    __shared__ uint32_t reached[2][kWarps];  // used in turn, so that one barrier per step is enough
    const int lane = static_cast<int>(threadIdx.x) % kWarp;

    const uint2 range = keyRange<THREADS, ITEMS>(keys);
    if (range.x == range.y) return range.x;
    int shift = (31 - __clz(static_cast<int>(range.x ^ range.y))) & ~1;
    uint32_t pivot = range.y & ~((4u << shift) - 1);  // the bits that all keys share
    for (int step = 0; shift >= 0; shift -= 2, ++step) {
        const uint32_t one = pivot | 1u << shift, two = pivot | 2u << shift, three = pivot | 3u << shift;
        uint32_t ones = 0, twos = 0, threes = 0;
        for (const uint32_t key : keys) {
            countReached(ones, key, one);
            countReached(twos, key, two);
            countReached(threes, key, three);
        }
        const uint32_t mine = __reduce_add_sync(kWholeWarp, ones + (twos << kField) + (threes << 2 * kField));
        if (lane == 0) reached[step & 1][threadIdx.x / kWarp] = mine;
        __syncthreads();
        const uint32_t ofWarp = lane < kWarps ? reached[step & 1][lane] : 0;
        const uint32_t reachOne = __reduce_add_sync(kWholeWarp, ofWarp & kFieldMask);
        const uint32_t reachTwo = __reduce_add_sync(kWholeWarp, ofWarp >> kField & kFieldMask);
        const uint32_t reachThree = __reduce_add_sync(kWholeWarp, ofWarp >> 2 * kField);
        if (reachThree >= wanted) {
            pivot = three;
        } else if (reachTwo >= wanted) {
            pivot = two;
        } else if (reachOne >= wanted) {
            pivot = one;
        }
        // Exactly the wanted keys reach it. They are those above its predecessor, so no ties are needed.
        if (reachOne == wanted || reachTwo == wanted || reachThree == wanted) return pivot - 1;
    }
    return pivot;
}

template <int ITEMS>
__device__ Choice chooseBest(const uint32_t (&keys)[ITEMS], uint32_t pivot) {
    Choice choice{0, 0};
    for (int item = 0; item < ITEMS; ++item) {
        choice.sure |= static_cast<uint32_t>(keys[item] > pivot) << item;
        choice.ties |= static_cast<uint32_t>(keys[item] == pivot) << item;
    }
    return choice;
}

template <int THREADS, int ITEMS>
__global__ void __launch_bounds__(THREADS)
    selectInOneBlock(const float* score, const int64_t* k, int64_t tokens, int64_t* index, int64_t* count) {
    uint32_t keys[ITEMS];
    loadKeys<ITEMS>(score, int64_t{threadIdx.x} * ITEMS, tokens, keys);
    const uint32_t wanted = wantedCount(*k, tokens);
    const uint32_t pivot = wanted == 0 ? kAboveAll : findPivot<THREADS, ITEMS>(keys, wanted);
    const Choice choice = chooseBest<ITEMS>(keys, pivot);
    uint32_t word = 0;
    const Counts before = unpacked(exclusiveSum<THREADS>(packed(choice), word));
    const Counts total = unpacked(word);
    writeKept<THREADS, ITEMS>(choice, before, total, {0, 0}, wanted - total.sure, 0, index);
    if (threadIdx.x == 0) *count = wanted;
}

constexpr int kPasses = 3;
constexpr int kBins = 2048;
__host__ __device__ constexpr int digitBits(int pass) { return pass < 2 ? 11 : 10; }
__host__ __device__ constexpr int digitShift(int pass) { return pass == 0 ? 21 : pass == 1 ? 10 : 0; }

// Scratch memory for more than kOneBlock tokens; initially all 0. The words of the tiles follow it.
struct SearchState {
    uint32_t prefix;             // the digits of the pivot found so far; in the end the pivot
    uint32_t wanted;             // how many keys are still wanted among those that share these digits
    uint32_t nextTile;
    uint32_t finished[kPasses];  // how many blocks of each pass have finished counting
    uint32_t padding[2];
    uint32_t bins[kPasses][kBins];
};
static_assert(sizeof(SearchState) % kWorkspaceAlignment == 0, "the words after it are aligned");

// Pick the digit of the bin with the last wanted key, counted from the greatest. Must be called by every thread of a block.
template <int PASS>
__device__ void pickDigit(SearchState* state, uint32_t prefix, uint32_t wanted) {
    constexpr int kEach = kBins / kTileThreads;
    uint32_t counts[kEach];
    uint32_t mine = 0;
    const int greatest = kBins - 1 - static_cast<int>(threadIdx.x) * kEach;
    for (int i = 0; i < kEach; ++i) {
        counts[i] = __ldcg(&state->bins[PASS][greatest - i]);
        mine += counts[i];
    }
    uint32_t total = 0;
    uint32_t above = exclusiveSum<kTileThreads>(mine, total);
    for (int i = 0; i < kEach; ++i) {
        if (above < wanted && wanted <= above + counts[i]) {
            state->prefix = prefix << digitBits(PASS) | static_cast<uint32_t>(greatest - i);
            state->wanted = wanted - above;
        }
        above += counts[i];
    }
    if (wanted == 0 && threadIdx.x == 0) {  // the greatest key: no key is above it
        state->prefix = prefix << digitBits(PASS) | ((1u << digitBits(PASS)) - 1);
        state->wanted = 0;
    }
}

template <int PASS>
__global__ void __launch_bounds__(kTileThreads)
    countDigits(const float* score, const int64_t* k, int64_t tokens, SearchState* state) {
    __shared__ uint32_t bins[kBins];
    for (int bin = threadIdx.x; bin < kBins; bin += kTileThreads) bins[bin] = 0;
    __syncthreads();
    const uint32_t prefix = PASS == 0 ? 0 : state->prefix;
    uint32_t keys[kTileItems];
    loadKeys<kTileItems>(score, blockIdx.x * kTile + int64_t{threadIdx.x} * kTileItems, tokens, keys);
    for (const uint32_t key : keys) {
        // In the first pass no digits have been found yet (and a shift by 32 bits would be undefined).
        const bool shares = PASS == 0 || key >> (digitShift(PASS) + digitBits(PASS)) % 32 == prefix;
        if (shares && key != kBelowAll) atomicAdd(&bins[key >> digitShift(PASS) & ((1u << digitBits(PASS)) - 1)], 1u);
    }
    __syncthreads();
    for (int bin = threadIdx.x; bin < kBins; bin += kTileThreads) {
        if (bins[bin] != 0) atomicAdd(&state->bins[PASS][bin], bins[bin]);
    }
    if (!isLastBlock(&state->finished[PASS])) return;
    pickDigit<PASS>(state, prefix, PASS == 0 ? wantedCount(*k, tokens) : state->wanted);
}

__global__ void __launch_bounds__(kTileThreads)
    writeBest(const float* score, const int64_t* k, int64_t tokens, SearchState* state, unsigned long long* words,
              int64_t* index, int64_t* count) {
    const TileState tiles{&state->nextTile, words};
    const uint32_t tile = drawTile(tiles);
    const int64_t firstToken = tile * kTile;
    uint32_t keys[kTileItems];
    loadKeys<kTileItems>(score, firstToken + int64_t{threadIdx.x} * kTileItems, tokens, keys);
    const Choice choice = chooseBest<kTileItems>(keys, state->prefix);
    uint32_t word = 0;
    const Counts before = unpacked(exclusiveSum<kTileThreads>(packed(choice), word));
    const Counts total = unpacked(word);
    const Counts earlier = sumEarlierTiles<kTileThreads>(tiles, tile, total);
    writeKept<kTileThreads, kTileItems>(choice, before, total, earlier, state->wanted, firstToken, index);
    if (threadIdx.x == 0 && tile == 0) *count = wantedCount(*k, tokens);
}

}  // namespace
}  // namespace gsx

size_t gsx_topk_select_workspace(int64_t tokens) {
    using namespace gsx;
    if (tokens <= kOneBlock) return 0;
    return sizeof(SearchState) + static_cast<size_t>(tilesOf(tokens)) * sizeof(unsigned long long);
}

gsx_status gsx_topk_select(const float* score, const int64_t* k, int64_t tokens, int64_t* index, int64_t* count,
                           void* workspace, size_t workspace_bytes, cudaStream_t stream) {
    using namespace gsx;
    const gsx_status refused = firstFailure({
        checkTokens(tokens),
        checkBuffer(score, tokens, sizeof(float)),
        checkBuffer(k, 1, sizeof(int64_t)),
        checkBuffer(index, tokens, sizeof(int64_t)),
        checkBuffer(count, 1, sizeof(int64_t)),
    });
    if (refused != GSX_OK) return refused;
    if (tokens <= kFewTokens) {
        return launch(selectInOneBlock<128, 4>, 1, 128, stream, score, k, tokens, index, count);
    }
    if (tokens <= kManyTokens) {
        return launch(selectInOneBlock<512, 16>, 1, 512, stream, score, k, tokens, index, count);
    }
    if (tokens <= kOneBlock) {
        return launch(selectInOneBlock<1024, 16>, 1, 1024, stream, score, k, tokens, index, count);
    }
    const size_t needed = gsx_topk_select_workspace(tokens);
    if (const gsx_status bad = checkWorkspace(workspace, workspace_bytes, needed)) return bad;
    if (const cudaError_t error = cudaMemsetAsync(workspace, 0, needed, stream)) return error;
    auto* state = static_cast<SearchState*>(workspace);
    auto* words = reinterpret_cast<unsigned long long*>(state + 1);
    const auto tiles = static_cast<unsigned>(tilesOf(tokens));
    for (auto* count_digits : {countDigits<0>, countDigits<1>, countDigits<2>}) {
        const gsx_status failed = launch(count_digits, tiles, kTileThreads, stream, score, k, tokens, state);
        if (failed != GSX_OK) return failed;
    }
    return launch(writeBest, tiles, kTileThreads, stream, score, k, tokens, state, words, index, count);
}
