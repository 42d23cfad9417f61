// Launching a kernel, and collective operations of the threads of one block.

#pragma once

#include <cuda_runtime.h>

#include "native/status.h"

namespace gsx {

constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

// Excludes a type from template argument deduction.
template <typename T>
struct Exactly {
    using Type = T;
};

template <typename... Parameters>
gsx_status launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream,
                  typename Exactly<Parameters>::Type... arguments) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// The sum of `value` over the preceding threads; `total` is the sum over the block. Must be called by every thread.
template <int kThreads>
__device__ uint32_t exclusiveSum(uint32_t value, uint32_t& total) {
    constexpr int kWarps = kThreads / kWarp;
    static_assert(kThreads % kWarp == 0 && kWarps <= kWarp, "whole warps, and one lane for each of them");
    __shared__ uint32_t warpTotals[kWarps];
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    uint32_t inclusive = value;
    for (int distance = 1; distance < kWarp; distance *= 2) {
        const uint32_t other = __shfl_up_sync(kWholeWarp, inclusive, distance);
        if (lane >= distance) inclusive += other;
    }
    if (lane == kWarp - 1) warpTotals[warp] = inclusive;
    __syncthreads();
    const uint32_t ofWarp = lane < kWarps ? warpTotals[lane] : 0;
    const uint32_t before = __reduce_add_sync(kWholeWarp, lane < warp ? ofWarp : 0);
    total = __reduce_add_sync(kWholeWarp, ofWarp);
    __syncthreads();  // warpTotals may be written again
    return before + inclusive - value;
}

// Whether this block is the last one to arrive here; it then sees all writes that the others made before. Must be called by
// every thread. The fences are between barrier and atomic, in a single thread: so they cover the whole block at the least
// cost.
// Args: arrived: initially 0.
__device__ inline bool isLastBlock(uint32_t* arrived) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicAdd(arrived, 1u) == gridDim.x - 1;
        __threadfence();
    }
    __syncthreads();
    return last;
}

}  // namespace gsx
