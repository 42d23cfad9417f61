// Launches the attention of a step for one element type. Each type has a file of its own, so that they compile side by side.

#pragma once

#include <algorithm>
#include <cmath>

#include "step_attention/attention.cuh"
#include "step_attention/kernel.h"

namespace gsx {

constexpr int64_t kFewRows = 4, kManyRows = 8;  // of a chunk

// How a step is cut.
struct Plan {
    int64_t rows, chunks, groups, splits;
    int lanes, ofChunk;
};

// The scratch memory: partial sums, what they are relative to, and counters, if nobody else has some.
struct Scratch {
    int64_t partial, found, arrived, bytes;  // where each begins
};

gsx_status attendInFloat16(const gsx_attention& given, const Plan& plan, const Scratch& scratch, cudaStream_t stream);
gsx_status attendInBfloat16(const gsx_attention& given, const Plan& plan, const Scratch& scratch, cudaStream_t stream);

template <typename T, int LANES, int ROWS>
gsx_status launchAttention(const gsx_attention& given, const Plan& plan, const Scratch& scratch, cudaStream_t stream) {
    constexpr double kLog2OfE = 1.4426950408889634;
    auto* const memory = static_cast<char*>(given.workspace);
    Attention<T> of{};
    of.query = given.queries != 0 ? static_cast<const T*>(given.query) : nullptr;
    of.key = static_cast<const T*>(given.key);
    of.value = static_cast<const T*>(given.value);
    of.cos = static_cast<const T*>(given.cos);
    of.sin = static_cast<const T*>(given.sin);
    of.score = given.score;
    of.threshold = given.threshold;
    of.mask = static_cast<const uint8_t*>(given.mask);
    of.writeAt = given.write_at;
    of.keys = static_cast<T*>(given.present_key);
    of.values = static_cast<T*>(given.present_value);
    of.out = static_cast<T*>(given.out);
    of.tokens = static_cast<int>(given.tokens);
    of.heads = static_cast<int>(given.heads);
    of.kvHeads = static_cast<int>(given.kv_heads);
    of.columns = static_cast<int>(given.columns);
    of.width = static_cast<int>(given.width);
    of.window = static_cast<int>(std::min<int64_t>(given.window, GSX_MAX_TOKENS));
    of.rows = static_cast<int>(plan.rows);
    of.chunks = static_cast<int>(plan.chunks);
    of.splits = static_cast<int>(plan.splits);
    of.thresholdStep = given.thresholds == 1 ? 0 : 1;
    of.newStride = static_cast<int>(given.new_stride);
    of.halfOfQuery = given.rotate_query ? static_cast<int>(given.rotated / 2) : 0;
    of.halfOfKey = given.rotate_key ? static_cast<int>(given.rotated / 2) : 0;
    const double scale = given.scale != 0.0f ? given.scale : 1.0 / std::sqrt(static_cast<double>(given.width));
    const bool capped = given.softcap > 0.0f;
    of.factor = static_cast<float>(capped ? 2.0 * kLog2OfE * scale / given.softcap : kLog2OfE * scale);
    of.cap = capped ? static_cast<float>(kLog2OfE * given.softcap) : 0.0f;
    if (plan.splits > 1) {
        of.partial = reinterpret_cast<float*>(memory + scratch.partial);
        of.found = reinterpret_cast<float2*>(memory + scratch.found);
        of.arrived = given.counters;
        if (of.arrived == nullptr) {
            of.arrived = reinterpret_cast<uint32_t*>(memory + scratch.arrived);
            const auto bytes = static_cast<size_t>(plan.groups) * sizeof(uint32_t);
            if (const gsx_status failed = cudaMemsetAsync(of.arrived, 0, bytes, stream)) return failed;
        }
    }
    const dim3 grid(static_cast<unsigned>(plan.splits), static_cast<unsigned>(plan.groups));
    return launch(attendStep<T, LANES, ROWS>, grid, kThreads, stream, of);
}

template <typename T, int LANES>
gsx_status byRows(const gsx_attention& given, const Plan& plan, const Scratch& scratch, cudaStream_t stream) {
    if (plan.ofChunk == kFewRows) return launchAttention<T, LANES, kFewRows>(given, plan, scratch, stream);
    return launchAttention<T, LANES, kManyRows>(given, plan, scratch, stream);
}

template <typename T>
gsx_status attendIn(const gsx_attention& given, const Plan& plan, const Scratch& scratch, cudaStream_t stream) {
    switch (plan.lanes) {
    case 8: return byRows<T, 8>(given, plan, scratch, stream);
    case 16: return byRows<T, 16>(given, plan, scratch, stream);
    default: return byRows<T, 32>(given, plan, scratch, stream);
    }
}

}  // namespace gsx
