// Scores as unsigned integers in the same order.

#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

namespace gsx {

// A key above every score's, and one below every score's.
constexpr uint32_t kAboveAll = 0xffffffffu;
constexpr uint32_t kBelowAll = 0;

// From the bits of a float32 score to a key: greater score, greater key; equal scores, equal keys.
//
// The two zeros are equal. NaN is the lowest finite number, so that it comes after every real score and before -inf,
// the score of padding (docs of the op, "Ties").
__host__ __device__ inline uint32_t orderedKey(uint32_t bits) {
    constexpr uint32_t kSign = 0x80000000u;
    constexpr uint32_t kInfinity = 0x7f800000u;
    constexpr uint32_t kLowestFinite = 0xff7fffffu;
    if ((bits & ~kSign) > kInfinity) bits = kLowestFinite;
    if (bits == kSign) bits = 0;
    return bits ^ (kSign | (0u - (bits >> 31)));  // the sign alone, or all bits of a negative number
}

// K as the kernels take it: a number of tokens that are there.
__host__ __device__ inline uint32_t wantedCount(int64_t k, int64_t tokens) {
    if (k < 0) return 0;
    return static_cast<uint32_t>(k < tokens ? k : tokens);
}

}  // namespace gsx
