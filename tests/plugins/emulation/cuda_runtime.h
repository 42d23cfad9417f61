// Stands in for CUDA's header of this name, so that g++ compiles the kernels' own sources, launches included, and runs
// them on the CPU: every thread of a block is a fiber, and blocks run one after the other or several together, started
// in any order. All of it on one thread of the CPU, so that a run can be repeated. What is not faked:
//
// - The order of things. A thread runs until it needs another one (a barrier, a warp operation) or, where blocks run
//   together, is put off at some access to memory. The order of turns is emulation_set_order's.
// - Memory between threads. The compiler tells of every access (-fsanitize=thread, with functions of our own behind it),
//   and two accesses that no barrier, or fence and atomic, puts in order are reported as a race, in shared memory and
//   between blocks (races.h), whether or not this run's order shows it.
// - Waiting. A block that waits for one that cannot start is reported, and so are barriers and warp operations that not
//   all threads reach. Shared memory is garbage at the start.
//
// Only what the kernels use is here. Not covered: alignment faults, speed.

#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <tuple>

#undef __launch_bounds__
#define __launch_bounds__(...)
// The thread-local variables of the library: their image is exchanged when another block gets its turn.
#undef __shared__
#define __shared__ static thread_local

inline uint3 threadIdx;
inline uint3 blockIdx;
inline dim3 blockDim;
inline dim3 gridDim;

namespace emulation {

// Run a kernel's body for every thread of every block. Returns cudaErrorLaunchFailure where threads do what a GPU would
// not survive either, or what it would not do twice alike; cudaGetErrorString then tells what.
cudaError_t run(dim3 grid, dim3 block, const std::function<void()>& body);

// Every lane of the warp gives a value and gets all 32. `operation` must be the same in all lanes.
void exchange(uint32_t value, const char* operation, uint32_t (&all)[32]);

}  // namespace emulation

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
    std::tuple<Parameters...> values(arguments...);
    return emulation::run(config->gridDim, config->blockDim, [&] { std::apply(kernel, values); });
}

void __syncthreads();
void __threadfence();
uint32_t atomicAdd(uint32_t* at, uint32_t value);

inline uint32_t __shfl_up_sync(unsigned, uint32_t value, unsigned distance) {
    uint32_t all[32];
    emulation::exchange(value, "shfl_up", all);
    const unsigned lane = threadIdx.x % 32;
    return lane >= distance ? all[lane - distance] : value;
}
inline float __shfl_xor_sync(unsigned, float value, int mask) {
    uint32_t all[32], bits;
    std::memcpy(&bits, &value, sizeof(bits));
    emulation::exchange(bits, "shfl_xor", all);
    std::memcpy(&value, &all[threadIdx.x % 32 ^ static_cast<unsigned>(mask)], sizeof(value));
    return value;
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

template <typename T>
T __ldcg(const T* at) {
    return *at;
}
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __popc(uint32_t value) { return __builtin_popcount(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value)); }
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
    const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
    uint32_t made = 0;
    for (unsigned i = 0; i < 4; ++i) made |= static_cast<uint32_t>(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
    return made;
}
inline float __uint_as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}
inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}
inline float __fmul_rn(float a, float b) { return a * b; }  // compiled with -ffp-contract=off
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdividef(float a, float b) { return a / b; }
