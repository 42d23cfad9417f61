// Gated scatter-add. In place: one pass over the kept rows. Into another buffer: one pass over all rows, so that no row
// is moved twice; each row asks which kept row is its own.
//
// The answer comes from a map [N] that is never cleared: the first kernel writes map[index[i]] = i, the second believes
// map[n] only where index[map[n]] is n. What earlier calls or nobody wrote there cannot pass that test (the sparse set
// of Briggs and Torczon, 1993).

#include "gated_scatter_add/kernel.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <string.h>

#include "native/rows.cuh"

namespace gsx {
namespace {

constexpr int kUnroll = 2;  // three or four streams: more would only cost registers

// Round to the element type after each operation, as the function body's Mul and Add do.
__device__ inline float asFloat(float value) { return value; }
__device__ inline float asFloat(__half value) { return __half2float(value); }
__device__ inline float asFloat(__nv_bfloat16 value) { return __bfloat162float(value); }
template <typename T>
__device__ T rounded(float value);
template <>
__device__ inline float rounded<float>(float value) {
    return value;
}
template <>
__device__ inline __half rounded<__half>(float value) {
    return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 rounded<__nv_bfloat16>(float value) {
    return __float2bfloat16_rn(value);
}

// __fmul_rn and __fadd_rn are never fused, so the product is rounded.
template <typename T>
__device__ T addGated(T residual, T row, T gate) {
    const T product = rounded<T>(__fmul_rn(asFloat(gate), asFloat(row)));
    return rounded<T>(__fadd_rn(asFloat(residual), asFloat(product)));
}

// The same for all elements of a vector.
template <typename T, typename Vector>
__device__ Vector addGated(Vector residual, Vector row, Vector gate) {
    constexpr int kElements = sizeof(Vector) / sizeof(T);
    T sums[kElements], rows[kElements], gates[kElements];
    memcpy(static_cast<void*>(sums), &residual, sizeof(Vector));
    memcpy(static_cast<void*>(rows), &row, sizeof(Vector));
    memcpy(static_cast<void*>(gates), &gate, sizeof(Vector));
#pragma unroll
    for (int i = 0; i < kElements; ++i) sums[i] = addGated(sums[i], rows[i], gates[i]);
    Vector out;
    memcpy(&out, sums, sizeof(Vector));
    return out;
}

// A scalar gate as a vector.
template <typename T, typename Vector>
__device__ Vector repeated(T gate) {
    constexpr int kElements = sizeof(Vector) / sizeof(T);
    T gates[kElements];
#pragma unroll
    for (int i = 0; i < kElements; ++i) gates[i] = gate;
    Vector out;
    memcpy(&out, gates, sizeof(Vector));
    return out;
}

struct Kept {
    const int64_t* index;
    const int64_t* count;
    int64_t capacity;
    __device__ int64_t rows() const { return count == nullptr || *count > capacity ? capacity : *count; }
};

__global__ void __launch_bounds__(kRowThreads) mapRows(Kept kept, int64_t tokens, int32_t* map) {
    const int64_t row = int64_t{blockIdx.x} * kRowThreads + threadIdx.x;
    if (row >= kept.rows()) return;
    const int64_t place = kept.index[row];
    if (place >= 0 && place < tokens) map[place] = static_cast<int32_t>(row);
}

template <typename T>
struct Rows {
    const T* rows;
    const T* gate;
    int64_t width;
    bool scalarGate;
};

// One stretch of a row: from residual (at token `place`) to out, with row `row` added where there is one (row >= 0).
template <typename T, int BYTES>
__device__ void addRow(const T* residual, Rows<T> added, int64_t place, int64_t row, T* out) {
    using Vector = typename Bits<BYTES>::Type;
    const int64_t vectors = added.width * static_cast<int64_t>(sizeof(T)) / BYTES;
    const int64_t first = firstVector<kUnroll>();
    const auto* from = reinterpret_cast<const Vector*>(residual) + place * vectors;
    const auto* rows = reinterpret_cast<const Vector*>(added.rows) + row * vectors;
    const auto* gates = reinterpret_cast<const Vector*>(added.gate) + row * vectors;
    auto* to = reinterpret_cast<Vector*>(out) + place * vectors;
    Vector sums[kUnroll], held[kUnroll], gate[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
        const int64_t at = first + int64_t{i} * blockDim.x;
        if (at < vectors) {
            sums[i] = from[at];
            if (row >= 0) held[i] = rows[at];
            if (row >= 0 && !added.scalarGate) gate[i] = gates[at];
        }
    }
    if (row >= 0) {
        const Vector same = added.scalarGate ? repeated<T, Vector>(added.gate[row]) : Vector{};
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
            if (first + int64_t{i} * blockDim.x < vectors) {
                sums[i] = addGated<T, Vector>(sums[i], held[i], added.scalarGate ? same : gate[i]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
        const int64_t at = first + int64_t{i} * blockDim.x;
        if (at < vectors) to[at] = sums[i];
    }
}

template <typename T, int BYTES>
__global__ void __launch_bounds__(kRowThreads)
    addToCopy(const T* residual, Rows<T> added, Kept kept, const int32_t* map, int64_t tokens, T* out) {
    const int64_t place = rowOfThread();
    if (place >= tokens) return;
    const int64_t row = map == nullptr ? -1 : map[place];
    const bool mine = row >= 0 && row < kept.rows() && kept.index[row] == place;
    addRow<T, BYTES>(residual, added, place, mine ? row : -1, out);
}

// residual is out: both are one pointer here, so that the compiler assumes nothing about them.
template <typename T, int BYTES>
__global__ void __launch_bounds__(kRowThreads) addInPlace(T* out, Rows<T> added, Kept kept, int64_t tokens) {
    const int64_t row = rowOfThread();
    if (row >= kept.rows()) return;
    const int64_t place = kept.index[row];
    if (place >= 0 && place < tokens) addRow<T, BYTES>(out, added, place, row, out);
}

template <typename T, int BYTES>
gsx_status scatter(const T* residual, Rows<T> added, Kept kept, int64_t tokens, T* out, int32_t* map,
                   cudaStream_t stream) {
    const int64_t vectors = added.width * static_cast<int64_t>(sizeof(T)) / BYTES;
    if (residual == out) {
        if (kept.capacity == 0) return GSX_OK;
        const RowPlan plan = planRows(kept.capacity, vectors, kUnroll);
        return launch(addInPlace<T, BYTES>, plan.grid, plan.block, stream, out, added, kept, tokens);
    }
    if (kept.capacity > 0) {
        const auto blocks = static_cast<unsigned>((kept.capacity + kRowThreads - 1) / kRowThreads);
        if (const gsx_status failed = launch(mapRows, blocks, kRowThreads, stream, kept, tokens, map)) return failed;
    }
    const RowPlan plan = planRows(tokens, vectors, kUnroll);
    return launch(addToCopy<T, BYTES>, plan.grid, plan.block, stream, residual, added, kept,
                  kept.capacity > 0 ? map : nullptr, tokens, out);
}

template <typename T>
gsx_status scatter(const void* residual, const void* rows, const void* gate, Kept kept, int64_t tokens, int64_t width,
                   bool scalarGate, void* out, int32_t* map, cudaStream_t stream) {
    const Rows<T> added{static_cast<const T*>(rows), static_cast<const T*>(gate), width, scalarGate};
    const auto* from = static_cast<const T*>(residual);
    auto* to = static_cast<T*>(out);
    const int64_t rowBytes = width * static_cast<int64_t>(sizeof(T));
    if (allowsVectors(rowBytes, residual, rows, scalarGate ? nullptr : gate, out)) {
        return scatter<T, kVectorBytes>(from, added, kept, tokens, to, map, stream);
    }
    return scatter<T, sizeof(T)>(from, added, kept, tokens, to, map, stream);
}

}  // namespace
}  // namespace gsx

size_t gsx_gated_scatter_add_workspace(int64_t tokens) {
    return tokens > 0 ? static_cast<size_t>(tokens) * sizeof(int32_t) : 0;
}

gsx_status gsx_gated_scatter_add(const void* residual, const void* rows, const void* gate, const int64_t* index,
                                 const int64_t* count, int64_t tokens, int64_t capacity, int64_t width,
                                 int64_t gate_width, gsx_type type, void* out, void* workspace, size_t workspace_bytes,
                                 cudaStream_t stream) {
    using namespace gsx;
    if (const gsx_status refused = firstFailure({checkTokens(tokens), checkTokens(capacity), checkRow(width, type)})) {
        return refused;
    }
    if (gate_width != 1 && gate_width != width) return GSX_BAD_SIZE;
    const auto bytes = static_cast<size_t>(elementBytes(type));
    const bool inPlace = residual == out;
    const gsx_status refused = firstFailure({
        checkBuffer(residual, tokens, bytes),
        checkBuffer(rows, capacity, bytes),
        checkBuffer(gate, capacity, bytes),
        checkBuffer(index, capacity, sizeof(int64_t)),
        checkBuffer(count, 0, sizeof(int64_t)),
        checkBuffer(out, tokens, bytes),
        checkWorkspace(workspace, workspace_bytes,
                       inPlace || capacity == 0 ? 0 : gsx_gated_scatter_add_workspace(tokens)),
    });
    if (refused != GSX_OK) return refused;
    if (tokens == 0) return GSX_OK;
    const Kept kept{index, count, capacity};
    const bool scalarGate = gate_width == 1;
    auto* map = static_cast<int32_t*>(workspace);
    switch (type) {
    case GSX_FLOAT32: return scatter<float>(residual, rows, gate, kept, tokens, width, scalarGate, out, map, stream);
    case GSX_FLOAT16: return scatter<__half>(residual, rows, gate, kept, tokens, width, scalarGate, out, map, stream);
    case GSX_BFLOAT16:
        return scatter<__nv_bfloat16>(residual, rows, gate, kept, tokens, width, scalarGate, out, map, stream);
    }
    return GSX_UNKNOWN_TYPE;
}
