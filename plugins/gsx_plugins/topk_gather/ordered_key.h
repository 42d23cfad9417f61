// Mapping scores to unsigned integers with the same order.

#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

namespace gsx {

// A key above those of all scores, and one below them.
constexpr uint32_t kAboveAll = 0xffffffffu;
constexpr uint32_t kBelowAll = 0;

// From the bits of a float32 score to a key: a greater score has a greater key, equal scores have equal keys.
//
// The two zeros are equal. NaN is treated as the lowest finite number, so it comes after all other scores but before -inf,
// the score of padding (README.md, "Ties").
__host__ __device__ inline uint32_t orderedKey(uint32_t bits) {
    constexpr uint32_t kSign = 0x80000000u;
    constexpr uint32_t kInfinity = 0x7f800000u;
    constexpr uint32_t kLowestFinite = 0xff7fffffu;
    if ((bits & ~kSign) > kInfinity) bits = kLowestFinite;
    if (bits == kSign) bits = 0;
    return bits ^ (kSign | (0u - (bits >> 31)));  // flips the sign bit, or all bits of a negative number
}

// K as the kernels use it: limited to the number of tokens.
__host__ __device__ inline uint32_t wantedCount(int64_t k, int64_t tokens) {
    if (k < 0) return 0;
    return static_cast<uint32_t>(k < tokens ? k : tokens);
}

}  // namespace gsx
