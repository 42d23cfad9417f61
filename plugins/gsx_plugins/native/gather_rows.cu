// Row gather: bits are copied, so only the size of the element type matters.

#include "native/gather_rows.h"

#include "native/rows.cuh"

namespace gsx {
namespace {

constexpr int kUnroll = 4;

template <int BYTES>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    gatherRows(const char* x, int64_t tokens, int vectors, const int64_t* index, const int64_t* count, int64_t capacity,
               char* rows) {
    using Vector = typename Bits<BYTES>::Type;
    const int64_t row = rowOfThread();
    if (row >= capacity || (count != nullptr && row >= *count)) return;
    const int64_t place = index[row];
    Vector held[kUnroll] = {};
    if (place >= 0 && place < tokens) loadVectors(reinterpret_cast<const Vector*>(x) + place * vectors, vectors, held);
    storeVectors(reinterpret_cast<Vector*>(rows) + row * vectors, vectors, held);
}

template <int BYTES>
gsx_status gather(const void* x, int64_t tokens, int64_t rowBytes, const int64_t* index, const int64_t* count,
                  int64_t capacity, void* rows, cudaStream_t stream) {
    const int vectors = static_cast<int>(rowBytes / BYTES);
    const RowPlan plan = planRows(capacity, vectors, kUnroll);
    return launch(gatherRows<BYTES>, plan.grid, plan.block, stream, static_cast<const char*>(x), tokens, vectors, index,
                  count, capacity, static_cast<char*>(rows));
}

}  // namespace
}  // namespace gsx

gsx_status gsx_gather_rows(const void* x, int64_t tokens, int64_t width, gsx_type type, const int64_t* index,
                           const int64_t* count, int64_t capacity, void* rows, cudaStream_t stream) {
    using namespace gsx;
    if (const gsx_status refused = firstFailure({checkTokens(tokens), checkTokens(capacity), checkRow(width, type)})) {
        return refused;
    }
    const auto bytes = static_cast<size_t>(elementBytes(type));
    const gsx_status refused = firstFailure({
        checkBuffer(x, tokens, bytes),
        checkBuffer(index, capacity, sizeof(int64_t)),
        checkBuffer(count, 0, sizeof(int64_t)),
        checkBuffer(rows, capacity, bytes),
    });
    if (refused != GSX_OK) return refused;
    if (capacity == 0) return GSX_OK;
    const int64_t rowBytes = width * elementBytes(type);
    if (allowsVectors(rowBytes, x, rows)) {
        return gather<16>(x, tokens, rowBytes, index, count, capacity, rows, stream);
    }
    return bytes == 4 ? gather<4>(x, tokens, rowBytes, index, count, capacity, rows, stream)
                      : gather<2>(x, tokens, rowBytes, index, count, capacity, rows, stream);
}
