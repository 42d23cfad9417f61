// Products of a few rows with a matrix, without those rows that the scores leave out.
//
// A block owns some columns of the matrix and reads all of their rows: neighbouring threads cover the columns, up to 16
// bytes each, and the other threads of the block take other rows of the matrix. Each thread has kSteps rows of it in
// flight. The threads' sums of a column are then added in shared memory, in one order. What the block begins with is to
// read the scores: if no row is kept, it never touches the matrix.

#pragma once

#include "native/codes.cuh"
#include "native/rows.cuh"

namespace gsx {

constexpr int kThreads = 256;
constexpr int kMostColumns = 64;  // of a block

// Of codes: one for a column, or one for each block of a column's inputs.
enum class Scales { kNone, kColumn, kBlocks };

template <typename W>
struct Matrix {
    const W* weights;
    const void* scales;  // of x's type; float32 if the result is
    int blockRows;       // inputs that share a scale
};

// With two matrices the result is silu(x G) * (x U); with a residual, that + gate * (x W); else x W.
template <typename T, typename W>
struct Operands {
    const T* x;
    const float* score;  // null: all rows are kept
    const float* threshold;
    Matrix<W> matrices[2];
    const T* residual;
    const T* gate;
    int64_t gateStride, gateStep;  // from row to row, from column to column
    int thresholdStep;             // 0: one for all rows
    int rows, inner, width;
    int lanes;  // threads that cover the columns of a block
    void* out;  // of T; float32 if `wide`
    bool wide;
};

// Bit n: row n is kept.
template <int ROWS>
__device__ unsigned keptRows(const float* score, const float* threshold, int thresholdStep, int rows) {
    unsigned kept = 0;
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
        const bool keeps = row < rows && (score == nullptr || score[row] > threshold[row * thresholdStep]);
        kept |= static_cast<unsigned>(keeps) << row;
    }
    return kept;
}

// The sigmoid is that of the function body's ops: 1 / (1 + e^-x).
template <typename T>
__device__ T siluTimes(float gate, float up) {
    const float a = asFloat(rounded<T>(gate));
    const float sigmoid = asFloat(rounded<T>(1.0f / (1.0f + expf(-a))));
    const float silu = asFloat(rounded<T>(__fmul_rn(a, sigmoid)));
    return rounded<T>(__fmul_rn(silu, asFloat(rounded<T>(up))));
}

// The scales of a thread's columns in a block of inputs, 16 bytes at a time.
template <int COUNT, typename S>
__device__ void loadScales(const S* at, float (&out)[COUNT]) {
    constexpr int kAtATime = kVectorBytes / static_cast<int>(sizeof(S));
    static_assert(COUNT % kAtATime == 0, "whole loads");
#pragma unroll
    for (int i = 0; i < COUNT / kAtATime; ++i) {
        float some[kAtATime];
        widen<S>(reinterpret_cast<const uint4*>(at)[i], some);
#pragma unroll
        for (int j = 0; j < kAtATime; ++j) out[i * kAtATime + j] = some[j];
    }
}

template <typename T>
__device__ float scaleOf(const void* scales, int column, bool wide) {
    return wide ? static_cast<const float*>(scales)[column] : asFloat(static_cast<const T*>(scales)[column]);
}

// The block's sum of one column, for the threads that have one. `sums`: this thread's, of its columns. Must be called by
// every thread.
template <int COUNT>
__device__ float columnTotal(const float (&sums)[COUNT], int columns) {
    __shared__ float ofThreads[kThreads * COUNT];  // by slice of the matrix's rows, then by column
    __shared__ float ofParts[kThreads];            // by part, COUNT slices, then by column
    const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) ofThreads[thread * COUNT + i] = sums[i];
    __syncthreads();
    const int first = thread / columns * COUNT * columns + thread % columns;
    float part = 0.0f;
#pragma unroll
    for (int slice = 0; slice < COUNT; ++slice) part = __fadd_rn(part, ofThreads[first + slice * columns]);
    ofParts[thread] = part;
    __syncthreads();
    float total = 0.0f;
    if (thread < columns) {
        for (int at = thread; at < kThreads; at += columns) total = __fadd_rn(total, ofParts[at]);
    }
    return total;
}

// BYTES: of a load.
template <typename T, typename W, Scales SCALES, int BYTES, int ROWS, int PRODUCTS>
__global__ void __launch_bounds__(kThreads, ROWS == 1 ? 2 : 1) skipProduct(Operands<T, W> of) {
    using Vector = typename Bits<BYTES>::Type;
    constexpr int kElements = BYTES / static_cast<int>(sizeof(W));
    // Rows of the matrix that a thread has in flight; with many sums there are no registers for more.
    constexpr int kSteps = ROWS > 4 ? 4 : 8;

    const unsigned kept = keptRows<ROWS>(of.score, of.threshold, of.thresholdStep, of.rows);
    if (PRODUCTS == 2 && kept == 0) return;
    const int columns = of.lanes * kElements;
    const int firstColumn = static_cast<int>(blockIdx.x) * columns;
    const int column = firstColumn + static_cast<int>(threadIdx.x) % of.lanes * kElements;
    const int stride = kThreads / of.lanes * kSteps;
    float sums[PRODUCTS][ROWS][kElements] = {};
    if (kept != 0 && column < of.width) {
        for (int first = static_cast<int>(threadIdx.x) / of.lanes * kSteps; first < of.inner; first += stride) {
            Vector held[PRODUCTS][kSteps];
            float scales[PRODUCTS][kElements];
            const bool whole = first + kSteps <= of.inner;  // so that nothing stands between the loads
#pragma unroll
            for (int product = 0; product < PRODUCTS; ++product) {
                const W* const at = of.matrices[product].weights + int64_t{first} * of.width + column;
                if (whole) {
#pragma unroll
                    for (int step = 0; step < kSteps; ++step) {
                        held[product][step] = *reinterpret_cast<const Vector*>(at + int64_t{step} * of.width);
                    }
                } else {
                    for (int step = 0; step < kSteps; ++step) {
                        held[product][step] = Vector{};
                        if (first + step < of.inner) {
                            held[product][step] = *reinterpret_cast<const Vector*>(at + int64_t{step} * of.width);
                        }
                    }
                }
                if constexpr (SCALES == Scales::kBlocks) {
                    const Matrix<W>& matrix = of.matrices[product];
                    const int64_t start = int64_t{first / matrix.blockRows} * of.width + column;
                    loadScales(static_cast<const T*>(matrix.scales) + start, scales[product]);
                }
            }
            float factors[ROWS][kSteps];
#pragma unroll
            for (int row = 0; row < ROWS; ++row) {
                const T* const x = of.x + int64_t{row} * of.inner + first;
#pragma unroll
                for (int step = 0; step < kSteps; ++step) {
                    const bool reads = (kept >> row & 1) != 0 && (whole || first + step < of.inner);
                    factors[row][step] = reads ? asFloat(x[step]) : 0.0f;
                }
            }
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
#pragma unroll
                for (int product = 0; product < PRODUCTS; ++product) {
                    float weights[kElements];
                    widen<W>(held[product][step], weights);
                    if constexpr (SCALES == Scales::kBlocks) {
#pragma unroll
                        for (int i = 0; i < kElements; ++i) weights[i] = __fmul_rn(weights[i], scales[product][i]);
                    }
#pragma unroll
                    for (int row = 0; row < ROWS; ++row) {
                        if (ROWS > 1 && (kept >> row & 1) == 0) continue;
#pragma unroll
                        for (int i = 0; i < kElements; ++i) {
                            float& sum = sums[product][row][i];
                            sum = fmaf(factors[row][step], weights[i], sum);
                        }
                    }
                }
            }
        }
    }
    const int own = firstColumn + static_cast<int>(threadIdx.x);  // the column that this thread writes
    const bool writes = static_cast<int>(threadIdx.x) < columns && own < of.width;
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
        if (row >= of.rows) break;
        const bool runs = (kept >> row & 1) != 0;
        if (PRODUCTS == 2 && !runs) continue;
        float total[PRODUCTS] = {};
        if (runs) {
#pragma unroll
            for (int product = 0; product < PRODUCTS; ++product) {
                total[product] = columnTotal(sums[product][row], columns);
                if constexpr (SCALES == Scales::kColumn) {
                    const void* const ofColumns = of.matrices[product].scales;
                    if (writes) total[product] = __fmul_rn(total[product], scaleOf<T>(ofColumns, own, of.wide));
                }
            }
        }
        if (!writes) continue;
        const int64_t at = int64_t{row} * of.width + own;
        T result;
        if constexpr (PRODUCTS == 2) {
            result = siluTimes<T>(total[0], total[1]);
        } else if (of.wide) {
            static_cast<float*>(of.out)[at] = total[0];
            continue;
        } else if (of.residual == nullptr) {
            result = rounded<T>(total[0]);  // 0 if the row is not kept
        } else {
            result = of.residual[at];
            if (runs) {
                const float gate = asFloat(of.gate[row * of.gateStride + own * of.gateStep]);
                const T gated = rounded<T>(__fmul_rn(gate, asFloat(rounded<T>(total[0]))));
                result = rounded<T>(__fadd_rn(asFloat(result), asFloat(gated)));
            }
        }
        static_cast<T*>(of.out)[at] = result;
    }
}

}  // namespace gsx
