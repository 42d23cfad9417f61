// How the rows of a matrix are distributed over blocks and threads: a block handles a few rows, and in each of them a
// stretch of `lanes` x kUnroll vectors.

#pragma once

#include "native/check.h"
#include "native/launch.cuh"

namespace gsx {

constexpr int kRowThreads = 256;
// Number of blocks per multiprocessor that the compiler aims for. With a larger one it saves registers by loading a
// thread's second vector only after it is done with the first, which halves the loads in flight.
constexpr int kRowBlocks = 5;
constexpr int kVectorBytes = 16;

constexpr int64_t kMaxGridY = 65535;  // limit of CUDA
static_assert(kMaxRowBytes <= kMaxGridY * kRowThreads * 2 * 2, "rows of 2-byte elements, two per thread, fit the grid");

// The type of one access, by its size.
template <int BYTES>
struct Bits;
template <>
struct Bits<16> {
    using Type = uint4;
};
template <>
struct Bits<8> {
    using Type = uint2;
};
template <>
struct Bits<4> {
    using Type = uint32_t;
};
template <>
struct Bits<2> {
    using Type = uint16_t;
};

struct RowPlan {
    dim3 grid;   // x: groups of rows; y: stretches of a row
    dim3 block;  // x: lanes of a row; y: rows
};

// Args: rows: at least 1. vectors: of a row, at least 1. unroll: vectors that a thread has in flight.
inline RowPlan planRows(int64_t rows, int vectors, int unroll) {
    int lanes = 8;  // 128 bytes: fewer would not fill a memory transaction
    while (lanes < kRowThreads && lanes * unroll < vectors) lanes *= 2;
    const int rowsPerBlock = kRowThreads / lanes;
    const int stretch = lanes * unroll;
    RowPlan plan;
    plan.grid = dim3(static_cast<unsigned>((rows + rowsPerBlock - 1) / rowsPerBlock),
                     static_cast<unsigned>((vectors + stretch - 1) / stretch));
    plan.block = dim3(static_cast<unsigned>(lanes), static_cast<unsigned>(rowsPerBlock));
    return plan;
}

// The row of this thread.
__device__ inline int64_t rowOfThread() { return int64_t{blockIdx.x} * blockDim.y + threadIdx.y; }

// Load this thread's vectors of a row, which are `blockDim.x` apart. All loads are in flight together; beyond the end of
// the row the vectors are zero.
template <typename Vector, int UNROLL>
__device__ void loadVectors(const Vector* row, int vectors, Vector (&held)[UNROLL]) {
    const int first = static_cast<int>(blockIdx.y * blockDim.x) * UNROLL + static_cast<int>(threadIdx.x);
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) {
        const int at = first + i * static_cast<int>(blockDim.x);
        held[i] = at < vectors ? row[at] : Vector{};
    }
}
template <typename Vector, int UNROLL>
__device__ void storeVectors(Vector* row, int vectors, const Vector (&held)[UNROLL]) {
    const int first = static_cast<int>(blockIdx.y * blockDim.x) * UNROLL + static_cast<int>(threadIdx.x);
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) {
        const int at = first + i * static_cast<int>(blockDim.x);
        if (at < vectors) row[at] = held[i];
    }
}

// Whether rows of this many bytes can be accessed 16 bytes at a time at all these addresses.
template <typename... Pointers>
bool allowsVectors(int64_t rowBytes, Pointers... pointers) {
    return rowBytes % kVectorBytes == 0 && (aligned(pointers, kVectorBytes) && ...);
}

}  // namespace gsx
