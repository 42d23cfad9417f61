// How blocks and threads share out the rows of a matrix: a block takes a few rows, and in each of them a stretch of
// `lanes` x kUnroll vectors.

#pragma once

#include "native/check.h"
#include "native/launch.cuh"

namespace gsx {

constexpr int kRowThreads = 256;
// Blocks that a multiprocessor is to hold. Asked for more of them, the compiler saves registers by loading a thread's
// second vector when it is done with the first, which halves what is in flight.
constexpr int kRowBlocks = 5;
constexpr int kVectorBytes = 16;

constexpr int64_t kMaxGridY = 65535;  // CUDA's
static_assert(kMaxRowBytes <= kMaxGridY * kRowThreads * 2 * 2, "rows of 2-byte elements, two a thread, fit the grid");

// Raw bits of one access.
template <int BYTES>
struct Bits;
template <>
struct Bits<16> {
    using Type = uint4;
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

// Args: rows, vectors of a row: at least 1. unroll: vectors a thread has in flight.
inline RowPlan planRows(int64_t rows, int vectors, int unroll) {
    int lanes = 8;  // 128 bytes: less would not fill what memory gives at once
    while (lanes < kRowThreads && lanes * unroll < vectors) lanes *= 2;
    const int rowsPerBlock = kRowThreads / lanes;
    const int stretch = lanes * unroll;
    RowPlan plan;
    plan.grid = dim3(static_cast<unsigned>((rows + rowsPerBlock - 1) / rowsPerBlock),
                     static_cast<unsigned>((vectors + stretch - 1) / stretch));
    plan.block = dim3(static_cast<unsigned>(lanes), static_cast<unsigned>(rowsPerBlock));
    return plan;
}

// This thread's row.
__device__ inline int64_t rowOfThread() { return int64_t{blockIdx.x} * blockDim.y + threadIdx.y; }

// This thread's vectors of a row, `blockDim.x` apart. Loads are all in flight together; behind the end are zeros.
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

// Whether rows of this many bytes can be read 16 bytes at a time at all these addresses.
template <typename... Pointers>
bool allowsVectors(int64_t rowBytes, Pointers... pointers) {
    return rowBytes % kVectorBytes == 0 && (aligned(pointers, kVectorBytes) && ...);
}

}  // namespace gsx
