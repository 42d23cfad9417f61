// Checks what the attention of a step is given, cuts it into blocks, and launches it (launch.cuh).

#include "step_attention/kernel.h"

#include <algorithm>

#include "native/check.h"
#include "step_attention/launch.cuh"

namespace gsx {
namespace {

// Blocks that fill a GPU of 132 multiprocessors twice: with fewer, the cache is cut into more parts.
constexpr int64_t kEnoughBlocks = 264;

int64_t upTo(int64_t total, int64_t part) { return (total + part - 1) / part; }

Plan planOf(int64_t sequences, int64_t tokens, int64_t heads, int64_t kvHeads, int64_t columns, int64_t width) {
    Plan plan{};
    plan.rows = tokens * (heads / kvHeads);
    plan.ofChunk = static_cast<int>(plan.rows <= kFewRows ? kFewRows : kManyRows);
    plan.chunks = upTo(plan.rows, plan.ofChunk);
    plan.groups = sequences * kvHeads * plan.chunks;
    plan.lanes = width <= 64 ? 8 : width <= 128 ? 16 : 32;
    const int64_t inFlight = plan.ofChunk == kFewRows ? kColumnsInFlight<kFewRows> : kColumnsInFlight<kManyRows>;
    const int64_t tiles = std::max<int64_t>(upTo(columns, kThreads / plan.lanes * inFlight), 1);
    const int64_t wanted = std::clamp<int64_t>(upTo(kEnoughBlocks, std::max<int64_t>(plan.groups, 1)), 1, kMostSplits);
    plan.splits = upTo(tiles, upTo(tiles, wanted));
    return plan;
}

Scratch scratchOf(const Plan& plan, int64_t width) {
    Scratch scratch{};
    if (plan.splits == 1) return scratch;
    const int64_t parts = plan.groups * plan.splits * plan.ofChunk;
    scratch.found = parts * width * int64_t{sizeof(float)};
    scratch.arrived = scratch.found + parts * int64_t{sizeof(float2)};
    scratch.bytes = scratch.arrived + plan.groups * int64_t{sizeof(uint32_t)};
    return scratch;
}

// A cache that is not updated in place.
gsx_status copyCache(const void* past, void* present, size_t bytes, cudaStream_t stream) {
    if (past == present) return GSX_OK;
    return cudaMemcpyAsync(present, past, bytes, cudaMemcpyDeviceToDevice, stream);
}

gsx_status checkSizes(const gsx_attention& of) {
    constexpr int64_t kChannels = GSX_HEAD_CHANNELS_AT_A_TIME;
    if (of.type != GSX_FLOAT16 && of.type != GSX_BFLOAT16) return GSX_UNKNOWN_TYPE;
    if (of.sequences < 0 || of.tokens < 0 || of.columns < 1 || of.window < 0) return GSX_BAD_SIZE;
    if (of.kv_heads < 1 || of.heads < 1 || of.heads % of.kv_heads != 0) return GSX_BAD_SIZE;
    if (of.width < kChannels || of.width % kChannels != 0 || of.width > GSX_MOST_HEAD_WIDTH) return GSX_BAD_SIZE;
    if (of.new_stride < of.kv_heads * of.width || of.new_stride % kChannels != 0) return GSX_BAD_SIZE;
    if (of.rotate_query || of.rotate_key) {
        if (of.rotated < 2 * kChannels || of.rotated % (2 * kChannels) != 0 || of.rotated > of.width) return GSX_BAD_SIZE;
    }
    if (of.sequences > GSX_MOST_ATTENTION_ROWS || of.tokens > GSX_MOST_ATTENTION_ROWS) return GSX_TOO_LARGE;
    const int64_t rows = of.sequences * of.tokens;
    if (rows > GSX_MOST_ATTENTION_ROWS || of.columns > GSX_MAX_TOKENS) return GSX_TOO_LARGE;
    if (of.queries != rows && of.queries != 0) return GSX_BAD_SIZE;
    if (of.score != nullptr && of.thresholds != 1 && of.thresholds != rows) return GSX_BAD_SIZE;
    return firstFailure({checkRow(of.heads * of.width, of.type), checkRow(of.new_stride, of.type)});
}

}  // namespace
}  // namespace gsx

size_t gsx_step_attention_workspace(int64_t sequences, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t columns,
                                    int64_t width) {
    using namespace gsx;
    if (sequences < 1 || tokens < 1 || kv_heads < 1 || heads < kv_heads || columns < 1 || width < 1) return 0;
    return static_cast<size_t>(scratchOf(planOf(sequences, tokens, heads, kv_heads, columns, width), width).bytes);
}

gsx_status gsx_step_attention(const gsx_attention* given, cudaStream_t stream) {
    using namespace gsx;
    if (given == nullptr) return GSX_NULL_POINTER;
    const gsx_attention& of = *given;
    if (const gsx_status bad = checkSizes(of)) return bad;
    const int64_t rows = of.sequences * of.tokens, turned = of.rotate_query || of.rotate_key ? rows : 0;
    const int64_t decided = of.score != nullptr ? rows : 0;
    const Plan plan = planOf(of.sequences, of.tokens, of.heads, of.kv_heads, of.columns, of.width);
    if (plan.groups > GSX_ATTENTION_COUNTERS) return GSX_TOO_LARGE;
    const gsx_status refused = firstFailure({
        checkBuffer(of.query, of.queries, kVectorBytes),
        checkBuffer(of.key, rows, kVectorBytes),
        checkBuffer(of.value, rows, kVectorBytes),
        checkBuffer(of.cos, turned, kVectorBytes),
        checkBuffer(of.sin, turned, kVectorBytes),
        checkBuffer(of.score, decided, sizeof(float)),
        checkBuffer(of.threshold, decided != 0 ? of.thresholds : 0, sizeof(float)),
        checkBuffer(of.mask, rows, 1),
        checkBuffer(of.write_at, of.sequences, sizeof(int64_t)),
        checkBuffer(of.past_key, rows, kVectorBytes),
        checkBuffer(of.past_value, rows, kVectorBytes),
        checkBuffer(of.present_key, rows, kVectorBytes),
        checkBuffer(of.present_value, rows, kVectorBytes),
        checkBuffer(of.out, of.queries, kVectorBytes),
        checkWorkspace(of.workspace, static_cast<size_t>(std::max<int64_t>(of.workspace_bytes, 0)),
                       static_cast<size_t>(scratchOf(plan, of.width).bytes)),
    });
    if (refused != GSX_OK) return refused;
    if (rows == 0) return GSX_OK;
    const auto bytes = static_cast<size_t>(of.sequences * of.kv_heads * of.columns * of.width * elementBytes(of.type));
    if (const gsx_status failed = copyCache(of.past_key, of.present_key, bytes, stream)) return failed;
    if (const gsx_status failed = copyCache(of.past_value, of.present_value, bytes, stream)) return failed;
    const Scratch scratch = scratchOf(plan, of.width);
    return of.type == GSX_FLOAT16 ? attendInFloat16(of, plan, scratch, stream)
                                  : attendInBfloat16(of, plan, scratch, stream);
}
