// Threshold selection in one kernel. Up to kOneBlock tokens, a single block handles all of them; above that, several tiles
// communicate (compact.cuh).

#include "threshold_gather/kernel.h"

#include "native/check.h"
#include "native/compact.cuh"
#include "native/scores.cuh"

namespace gsx {
namespace {

constexpr int64_t kFewTokens = 512;
constexpr int64_t kOneBlock = 8192;
constexpr int kTileThreads = 256;
constexpr int kTileItems = 8;
constexpr int64_t kTile = kTileThreads * kTileItems;

int64_t tilesOf(int64_t tokens) { return (tokens + kTile - 1) / kTile; }

// Scratch memory: the next tile's number, padding, then a word for each tile.
constexpr size_t kWordsAt = 16;

template <int THREADS, int ITEMS>
__device__ Choice chooseAbove(const float* score, const float* threshold, bool each, int64_t first, int64_t tokens) {
    float scores[ITEMS], limits[ITEMS];
    loadScores<ITEMS>(score, first, tokens, -INFINITY, scores);  // -inf is not above any threshold
    if (each) {
        loadScores<ITEMS>(threshold, first, tokens, INFINITY, limits);
    } else {
        for (float& limit : limits) limit = *threshold;
    }
    Choice choice{0, 0};
    for (int item = 0; item < ITEMS; ++item) choice.sure |= static_cast<uint32_t>(scores[item] > limits[item]) << item;
    return choice;
}

template <int THREADS, int ITEMS>
__global__ void __launch_bounds__(THREADS)
    selectInOneBlock(const float* score, const float* threshold, bool each, int64_t tokens, int64_t* index,
                     int64_t* count) {
    const Choice choice = chooseAbove<THREADS, ITEMS>(score, threshold, each, int64_t{threadIdx.x} * ITEMS, tokens);
    uint32_t total = 0;
    const uint32_t before = exclusiveSum<THREADS>(packed(choice), total);
    writeKept<THREADS, ITEMS>(choice, unpacked(before), unpacked(total), {0, 0}, 0, 0, index);
    if (threadIdx.x == 0) *count = unpacked(total).sure;
}

__global__ void __launch_bounds__(kTileThreads)
    selectInTiles(const float* score, const float* threshold, bool each, int64_t tokens, TileState state,
                  int64_t* index, int64_t* count) {
    const uint32_t tile = drawTile(state);
    const int64_t firstToken = tile * kTile;
    const int64_t first = firstToken + int64_t{threadIdx.x} * kTileItems;
    const Choice choice = chooseAbove<kTileThreads, kTileItems>(score, threshold, each, first, tokens);
    uint32_t word = 0;
    const Counts before = unpacked(exclusiveSum<kTileThreads>(packed(choice), word));
    const Counts total = unpacked(word);
    const Counts earlier = sumEarlierTiles<kTileThreads>(state, tile, total);
    writeKept<kTileThreads, kTileItems>(choice, before, total, earlier, 0, firstToken, index);
    if (threadIdx.x == 0 && tile == gridDim.x - 1) *count = int64_t{earlier.sure} + total.sure;
}

}  // namespace
}  // namespace gsx

size_t gsx_threshold_select_workspace(int64_t tokens) {
    using namespace gsx;
    return tokens <= kOneBlock ? 0 : kWordsAt + static_cast<size_t>(tilesOf(tokens)) * sizeof(unsigned long long);
}

gsx_status gsx_threshold_select(const float* score, const float* threshold, int64_t thresholds, int64_t tokens,
                                int64_t* index, int64_t* count, void* workspace, size_t workspace_bytes,
                                cudaStream_t stream) {
    using namespace gsx;
    const gsx_status refused = firstFailure({
        checkTokens(tokens),
        checkBuffer(score, tokens, sizeof(float)),
        thresholds == 1 || thresholds == tokens ? GSX_OK : GSX_BAD_SIZE,
        checkBuffer(threshold, thresholds, sizeof(float)),
        checkBuffer(index, tokens, sizeof(int64_t)),
        checkBuffer(count, 1, sizeof(int64_t)),
    });
    if (refused != GSX_OK) return refused;
    const bool each = thresholds != 1;
    if (tokens <= kFewTokens) {
        return launch(selectInOneBlock<128, 4>, 1, 128, stream, score, threshold, each, tokens, index, count);
    }
    if (tokens <= kOneBlock) {
        return launch(selectInOneBlock<1024, 8>, 1, 1024, stream, score, threshold, each, tokens, index, count);
    }
    const size_t needed = gsx_threshold_select_workspace(tokens);
    if (const gsx_status bad = checkWorkspace(workspace, workspace_bytes, needed)) return bad;
    if (const cudaError_t error = cudaMemsetAsync(workspace, 0, needed, stream)) return error;
    const TileState state{static_cast<uint32_t*>(workspace),
                          reinterpret_cast<unsigned long long*>(static_cast<char*>(workspace) + kWordsAt)};
    const auto tiles = static_cast<unsigned>(tilesOf(tokens));
    return launch(selectInTiles, tiles, kTileThreads, stream, score, threshold, each, tokens, state, index,
                  count);
}
