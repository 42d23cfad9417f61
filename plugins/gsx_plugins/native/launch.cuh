// Launching a kernel, and the steps that threads of one block take together.

#pragma once

#include <cuda_runtime.h>

#include "native/status.h"

namespace gsx {

constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

// Keeps a type out of template argument deduction.
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

// The sum of `value` over the threads before this one; `total` is the sum over the block. Every thread calls it.
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

// Whether this block is the last to come here; it then sees what the others did before. Every thread calls it.
// The fences stand between barrier and atomic, in one thread: so they speak for its whole block, and cost the least.
// Args: arrived: 0 at the start.
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
