// Gated scatter-add. In place: one pass over the kept rows. Into another buffer: one pass over all rows, so that no row is
// moved twice; each row looks up which kept row belongs to it.
//
// The lookup uses a map [N] that is never cleared: the first kernel writes map[index[i]] = i, and the second one trusts
// map[n] only if index[map[n]] is n. Values from earlier calls and uninitialized values cannot pass this test (the sparse
// set of Briggs and Torczon, 1993).

#include "gated_scatter_add/kernel.h"

#include <string.h>

#include "native/numbers.cuh"
#include "native/rows.cuh"

namespace gsx {
namespace {

constexpr int kUnroll = 2;  // each thread reads two or three streams, so more would only cost registers

// Results are rounded to the element type after each operation, as by Mul and Add in the function body.
// __fmul_rn and __fadd_rn are never fused, so the product is always rounded.
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

// What is added: rows, and gates with one element per row (SCALAR) or as many as the row has.
template <typename T, int BYTES, bool SCALAR>
struct Added {
    using Vector = typename Bits<BYTES>::Type;

    const void* rows;
    const void* gate;
    int vectors;

    // This thread's part of a row.
    struct Part {
        Vector rows[kUnroll], gates[SCALAR ? 1 : kUnroll];

        __device__ void addTo(Vector (&sums)[kUnroll]) const {
#pragma unroll
            for (int i = 0; i < kUnroll; ++i) sums[i] = addGated<T, Vector>(sums[i], rows[i], gates[SCALAR ? 0 : i]);
        }
    };

    __device__ Part load(int64_t row) const {
        Part part;
        loadVectors(static_cast<const Vector*>(rows) + row * vectors, vectors, part.rows);
        if constexpr (SCALAR) {
            part.gates[0] = repeated<T, Vector>(static_cast<const T*>(gate)[row]);
        } else {
            loadVectors(static_cast<const Vector*>(gate) + row * vectors, vectors, part.gates);
        }
        return part;
    }
};

// The loads of the residual do not wait for the lookup of the row to add.
template <typename T, int BYTES, bool SCALAR>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    addToCopy(const void* residual, Added<T, BYTES, SCALAR> added, Kept kept, const int32_t* map, int64_t tokens,
              void* out) {
    using Vector = typename Bits<BYTES>::Type;
    const int64_t place = rowOfThread();
    if (place >= tokens) return;
    const int64_t row = map == nullptr ? -1 : map[place];
    Vector sums[kUnroll];
    loadVectors(static_cast<const Vector*>(residual) + place * added.vectors, added.vectors, sums);
    if (row >= 0 && row < kept.rows() && kept.index[row] == place) added.load(row).addTo(sums);
    storeVectors(static_cast<Vector*>(out) + place * added.vectors, added.vectors, sums);
}

// Residual and out are the same buffer, passed as one pointer, so that the compiler makes no assumptions about aliasing. The
// loads of what is added do not wait for the load of its position.
template <typename T, int BYTES, bool SCALAR>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    addInPlace(void* out, Added<T, BYTES, SCALAR> added, Kept kept, int64_t tokens) {
    using Vector = typename Bits<BYTES>::Type;
    const int64_t row = rowOfThread();
    if (row >= kept.rows()) return;
    const int64_t place = kept.index[row];
    const auto part = added.load(row);
    if (place < 0 || place >= tokens) return;
    Vector* const to = static_cast<Vector*>(out) + place * added.vectors;
    Vector sums[kUnroll];
    loadVectors(to, added.vectors, sums);
    part.addTo(sums);
    storeVectors(to, added.vectors, sums);
}

struct Call {
    const void* residual;
    const void* rows;
    const void* gate;
    Kept kept;
    int64_t tokens, width;
    void* out;
    int32_t* map;
    cudaStream_t stream;
};

template <typename T, int BYTES, bool SCALAR>
gsx_status scatter(const Call& call) {
    const Kept kept = call.kept;
    const Added<T, BYTES, SCALAR> added{call.rows, call.gate, static_cast<int>(call.width * int64_t{sizeof(T)} / BYTES)};
    if (call.residual == call.out) {
        if (kept.capacity == 0) return GSX_OK;
        const RowPlan plan = planRows(kept.capacity, added.vectors, kUnroll);
        return launch(addInPlace<T, BYTES, SCALAR>, plan.grid, plan.block, call.stream, call.out, added, kept,
                      call.tokens);
    }
    if (kept.capacity > 0) {
        const auto blocks = static_cast<unsigned>((kept.capacity + kRowThreads - 1) / kRowThreads);
        const gsx_status failed = launch(mapRows, blocks, kRowThreads, call.stream, kept, call.tokens, call.map);
        if (failed != GSX_OK) return failed;
    }
    const RowPlan plan = planRows(call.tokens, added.vectors, kUnroll);
    return launch(addToCopy<T, BYTES, SCALAR>, plan.grid, plan.block, call.stream, call.residual, added, kept,
                  kept.capacity > 0 ? call.map : nullptr, call.tokens, call.out);
}

template <typename T>
gsx_status scatter(const Call& call, bool scalarGate) {
    const int64_t rowBytes = call.width * int64_t{sizeof(T)};
    constexpr int kElement = sizeof(T);
    if (scalarGate) {
        return allowsVectors(rowBytes, call.residual, call.rows, call.out) ? scatter<T, kVectorBytes, true>(call)
                                                                           : scatter<T, kElement, true>(call);
    }
    return allowsVectors(rowBytes, call.residual, call.rows, call.gate, call.out)
               ? scatter<T, kVectorBytes, false>(call)
               : scatter<T, kElement, false>(call);
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
    const Call call{residual, rows, gate, {index, count, capacity}, tokens, width, out, static_cast<int32_t*>(workspace),
                    stream};
    switch (type) {
    case GSX_FLOAT32: return scatter<float>(call, gate_width == 1);
    case GSX_FLOAT16: return scatter<__half>(call, gate_width == 1);
    case GSX_BFLOAT16: return scatter<__nv_bfloat16>(call, gate_width == 1);
    }
    return GSX_UNKNOWN_TYPE;
}
