// How blocks and threads share out the rows of a matrix: a block takes a few rows, and in each of them a stretch of
// `lanes` x kUnroll vectors.

#pragma once

#include "native/check.h"
#include "native/launch.cuh"

namespace gsx {

constexpr int kRowThreads = 256;
constexpr int kVectorBytes = 16;

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
inline RowPlan planRows(int64_t rows, int64_t vectors, int unroll) {
    int lanes = 8;  // 128 bytes: less would not fill what memory gives at once
    while (lanes < kRowThreads && int64_t{lanes} * unroll < vectors) lanes *= 2;
    const int rowsPerBlock = kRowThreads / lanes;
    const int64_t stretch = int64_t{lanes} * unroll;
    RowPlan plan;
    plan.grid = dim3(static_cast<unsigned>((rows + rowsPerBlock - 1) / rowsPerBlock),
                     static_cast<unsigned>((vectors + stretch - 1) / stretch));
    plan.block = dim3(static_cast<unsigned>(lanes), static_cast<unsigned>(rowsPerBlock));
    return plan;
}

// This thread's row, and the first of its vectors; the next ones are `blockDim.x` apart.
__device__ inline int64_t rowOfThread() { return int64_t{blockIdx.x} * blockDim.y + threadIdx.y; }
template <int UNROLL>
__device__ int64_t firstVector() {
    return int64_t{blockIdx.y} * blockDim.x * UNROLL + threadIdx.x;
}

// Whether rows of this many bytes can be read 16 bytes at a time at all these addresses.
template <typename... Pointers>
bool allowsVectors(int64_t rowBytes, Pointers... pointers) {
    return rowBytes % kVectorBytes == 0 && (aligned(pointers, kVectorBytes) && ...);
}

}  // namespace gsx
