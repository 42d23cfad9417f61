// Reading the scores of a tile: ITEMS neighbours for each thread, 16 bytes at a time if the address is aligned.

#pragma once

#include "native/launch.cuh"

namespace gsx {

// scores[i] = score[first + i], or `absent` beyond the end.
template <int ITEMS>
__device__ void loadScores(const float* score, int64_t first, int64_t tokens, float absent, float (&scores)[ITEMS]) {
    static_assert(ITEMS % 4 == 0, "whole vectors");
    const float* at = score + first;
    if (first + ITEMS <= tokens && reinterpret_cast<uintptr_t>(at) % sizeof(float4) == 0) {
        for (int item = 0; item < ITEMS; item += 4) {
            const float4 four = *reinterpret_cast<const float4*>(at + item);
            scores[item] = four.x;
            scores[item + 1] = four.y;
            scores[item + 2] = four.z;
            scores[item + 3] = four.w;
        }
    } else {
        for (int item = 0; item < ITEMS; ++item) scores[item] = first + item < tokens ? at[item] : absent;
    }
}

}  // namespace gsx
