// Stands in for CUDA's header of this name, so that g++ compiles the kernels' own sources, launches included, and runs
// them on the CPU: every thread of a block is a fiber, blocks run one after the other. What is not faked is the order of
// things: a fiber runs until it needs another thread (a barrier, a warp operation), and the order in which fibers get
// their turn can be turned round or shuffled, so that a missing barrier shows. Only what the kernels use is here.
//
// Not covered: blocks that run at the same time, memory ordering between them, alignment faults, speed.

#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <tuple>

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __shared__
#define __shared__ static

inline uint3 threadIdx;
inline uint3 blockIdx;
inline dim3 blockDim;
inline dim3 gridDim;

namespace emulation {

// Run a kernel's body for every thread of every block. Returns cudaErrorLaunchFailure where threads wait for each other
// in ways that a GPU would not survive either; the reason goes to stderr.
cudaError_t run(dim3 grid, dim3 block, const std::function<void()>& body);

// Wait for all threads of the block.
void blockBarrier();

// Every lane of the warp gives a value and gets all 32. `operation` must be the same in all lanes.
void exchange(uint32_t value, const char* operation, uint32_t (&all)[32]);

}  // namespace emulation

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
    std::tuple<Parameters...> values(arguments...);
    return emulation::run(config->gridDim, config->blockDim, [&] { std::apply(kernel, values); });
}

inline void __syncthreads() { emulation::blockBarrier(); }
inline void __threadfence() {}

inline uint32_t __shfl_up_sync(unsigned, uint32_t value, unsigned distance) {
    uint32_t all[32];
    emulation::exchange(value, "shfl_up", all);
    const unsigned lane = threadIdx.x % 32;
    return lane >= distance ? all[lane - distance] : value;
}
inline uint32_t __reduce_add_sync(unsigned, uint32_t value) {
    uint32_t all[32], sum = 0;
    emulation::exchange(value, "reduce_add", all);
    for (const uint32_t one : all) sum += one;
    return sum;
}
inline uint32_t __reduce_min_sync(unsigned, uint32_t value) {
    uint32_t all[32];
    emulation::exchange(value, "reduce_min", all);
    for (const uint32_t one : all) value = one < value ? one : value;
    return value;
}
inline uint32_t __reduce_max_sync(unsigned, uint32_t value) {
    uint32_t all[32];
    emulation::exchange(value, "reduce_max", all);
    for (const uint32_t one : all) value = one > value ? one : value;
    return value;
}

inline uint32_t atomicAdd(uint32_t* at, uint32_t value) {
    const uint32_t old = *at;
    *at += value;
    return old;
}
template <typename T>
T __ldcg(const T* at) {
    return *at;
}
inline int __popc(uint32_t value) { return __builtin_popcount(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value)); }
inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}
inline float __fmul_rn(float a, float b) { return a * b; }  // compiled with -ffp-contract=off
inline float __fadd_rn(float a, float b) { return a + b; }
