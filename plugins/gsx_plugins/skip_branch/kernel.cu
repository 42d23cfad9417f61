// Products of a few rows with a matrix, without those rows that the scores leave out.
//
// A block owns some columns of the matrix and reads all of their rows: LANES neighbouring threads cover the columns, 16 bytes
// each, and the other threads of the block take other rows of the matrix. Each thread has kSteps rows of it in flight. The
// threads' sums of a column are then added in shared memory, in one order. What the block begins with is to read the
// scores: if no row is kept, it never touches the matrix.

#include "skip_branch/kernel.h"

#include <string.h>

#include "native/numbers.cuh"
#include "native/rows.cuh"

namespace gsx {
namespace {

constexpr int kThreads = 256;
// With fewer blocks of 8 lanes than this, blocks take 4 lanes: half as many columns, so that there are twice as many.
constexpr int64_t kFewBlocks = 200;

enum class Kind { kLinear, kGateUp, kAdd };

template <typename T>
struct Operands {
    const T* x;
    const float* score;
    const float* threshold;
    const T* weight;
    const T* second;    // of kGateUp: the other matrix
    const T* residual;  // of kAdd
    const T* gate;      // of kAdd
    int64_t gateStride, gateStep;  // from row to row, from column to column
    int thresholdStep;  // 0: one for all rows
    int rows, inner, width;
    T* out;
};

// Bit n: row n is kept.
template <int ROWS>
__device__ unsigned keptRows(const float* score, const float* threshold, int thresholdStep, int rows) {
    unsigned kept = 0;
#pragma unroll
    for (int row = 0; row < ROWS; ++row) kept |= static_cast<unsigned>(row < rows && score[row] > threshold[row * thresholdStep]) << row;
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

template <typename T, int BYTES, int LANES, int ROWS, Kind KIND>
__global__ void __launch_bounds__(kThreads) skipProduct(Operands<T> of) {
    using Vector = typename Bits<BYTES>::Type;
    constexpr int kElements = BYTES / static_cast<int>(sizeof(T));
    constexpr int kColumns = LANES * kElements;
    constexpr int kSlices = kThreads / LANES;  // of the matrix's rows
    constexpr int kProducts = KIND == Kind::kGateUp ? 2 : 1;
    // Rows of the matrix that a thread has in flight; with many sums there are no registers for more.
    constexpr int kSteps = ROWS > 4 ? 4 : 8;
    __shared__ float partial[kSlices][kColumns];

    const unsigned kept = keptRows<ROWS>(of.score, of.threshold, of.thresholdStep, of.rows);
    if (KIND == Kind::kGateUp && kept == 0) return;
    const int lane = static_cast<int>(threadIdx.x) % LANES;
    const int slice = static_cast<int>(threadIdx.x) / LANES;
    const int firstColumn = static_cast<int>(blockIdx.x) * kColumns;
    const int column = firstColumn + lane * kElements;
    float sums[kProducts][ROWS][kElements] = {};
    if (kept != 0 && column < of.width) {
        const T* const matrices[] = {of.weight, of.second};
        for (int first = slice * kSteps; first < of.inner; first += kSlices * kSteps) {
            Vector held[kProducts][kSteps];
            const bool whole = first + kSteps <= of.inner;  // so that nothing stands between the loads
#pragma unroll
            for (int product = 0; product < kProducts; ++product) {
                const T* const at = matrices[product] + int64_t{first} * of.width + column;
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
            }
#pragma unroll
            for (int row = 0; row < ROWS; ++row) {
                if ((kept >> row & 1) == 0) continue;
                const T* const x = of.x + int64_t{row} * of.inner + first;
#pragma unroll
                for (int step = 0; step < kSteps; ++step) {
                    const float factor = whole || first + step < of.inner ? asFloat(x[step]) : 0.0f;
#pragma unroll
                    for (int product = 0; product < kProducts; ++product) {
                        T weights[kElements];
                        memcpy(static_cast<void*>(weights), &held[product][step], sizeof(Vector));
#pragma unroll
                        for (int i = 0; i < kElements; ++i) {
                            float& sum = sums[product][row][i];
                            sum = fmaf(factor, asFloat(weights[i]), sum);
                        }
                    }
                }
            }
        }
    }
    const int own = firstColumn + static_cast<int>(threadIdx.x);  // the column that this thread adds up
    const bool adds = static_cast<int>(threadIdx.x) < kColumns && own < of.width;
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
        if (row >= of.rows) break;
        const bool runs = (kept >> row & 1) != 0;
        if (KIND == Kind::kGateUp && !runs) continue;
        float total[kProducts] = {};
        if (runs) {
#pragma unroll
            for (int product = 0; product < kProducts; ++product) {
                __syncthreads();  // the sums before were read
#pragma unroll
                for (int i = 0; i < kElements; ++i) partial[slice][lane * kElements + i] = sums[product][row][i];
                __syncthreads();
                if (adds) {
                    for (int other = 0; other < kSlices; ++other) {
                        total[product] = __fadd_rn(total[product], partial[other][threadIdx.x]);
                    }
                }
            }
        }
        if (!adds) continue;
        T* const out = of.out + int64_t{row} * of.width + own;
        if constexpr (KIND == Kind::kLinear) {
            *out = rounded<T>(total[0]);  // 0 if the row is not kept
        } else if constexpr (KIND == Kind::kGateUp) {
            *out = siluTimes<T>(total[0], total[1]);
        } else {
            const T before = of.residual[int64_t{row} * of.width + own];
            T after = before;
            if (runs) {
                const float gate = asFloat(of.gate[row * of.gateStride + own * of.gateStep]);
                const T gated = rounded<T>(__fmul_rn(gate, asFloat(rounded<T>(total[0]))));
                after = rounded<T>(__fadd_rn(asFloat(before), asFloat(gated)));
            }
            *out = after;
        }
    }
}

template <typename T, int BYTES, int LANES, int ROWS, Kind KIND>
gsx_status launchProduct(const Operands<T>& of, cudaStream_t stream) {
    constexpr int kColumns = LANES * BYTES / static_cast<int>(sizeof(T));
    const auto blocks = static_cast<unsigned>((of.width + kColumns - 1) / kColumns);
    return launch(skipProduct<T, BYTES, LANES, ROWS, KIND>, blocks, kThreads, stream, of);
}

template <typename T, int BYTES, int LANES, Kind KIND>
gsx_status byRows(const Operands<T>& of, cudaStream_t stream) {
    if (of.rows == 1) return launchProduct<T, BYTES, LANES, 1, KIND>(of, stream);
    if (of.rows <= 4) return launchProduct<T, BYTES, LANES, 4, KIND>(of, stream);
    return launchProduct<T, BYTES, LANES, GSX_MOST_SKIP_ROWS, KIND>(of, stream);
}

template <typename T, Kind KIND>
gsx_status skipProductOf(const Operands<T>& of, cudaStream_t stream) {
    const int64_t bytes = of.width * int64_t{sizeof(T)};
    const bool vectors = KIND == Kind::kGateUp ? allowsVectors(bytes, of.weight, of.second) : allowsVectors(bytes, of.weight);
    if (!vectors) return byRows<T, sizeof(T), 32, KIND>(of, stream);
    if (bytes / kVectorBytes < 8 * kFewBlocks) return byRows<T, kVectorBytes, 4, KIND>(of, stream);
    return byRows<T, kVectorBytes, 8, KIND>(of, stream);
}

// What a call is given, before its type is known.
struct Given {
    const void* residual;
    const void* x;
    const void* gate;
    const float* score;
    const float* threshold;
    const void* weight;
    const void* second;
    int64_t thresholds, rows, inner, width, gateWidth;
    void* out;
};

template <typename T, Kind KIND>
gsx_status run(const Given& given, cudaStream_t stream) {
    const bool scalar = given.gateWidth == 1;
    return skipProductOf<T, KIND>(
        {static_cast<const T*>(given.x), given.score, given.threshold, static_cast<const T*>(given.weight),
         static_cast<const T*>(given.second), static_cast<const T*>(given.residual), static_cast<const T*>(given.gate),
         scalar ? 1 : given.gateWidth, scalar ? 0 : 1, given.thresholds == 1 ? 0 : 1, static_cast<int>(given.rows), static_cast<int>(given.inner),
         static_cast<int>(given.width), static_cast<T*>(given.out)},
        stream);
}

template <Kind KIND>
gsx_status run(const Given& given, gsx_type type, cudaStream_t stream) {
    if (const gsx_status bad = firstFailure({checkRow(given.inner, type), checkRow(given.width, type)})) return bad;
    if (given.rows < 0 || (given.thresholds != 1 && given.thresholds != given.rows)) return GSX_BAD_SIZE;
    if (given.rows > GSX_MOST_SKIP_ROWS) return GSX_TOO_LARGE;
    const auto bytes = static_cast<size_t>(elementBytes(type));
    const bool adds = KIND == Kind::kAdd;
    const gsx_status refused = firstFailure({
        checkBuffer(given.x, given.rows, bytes),
        checkBuffer(given.score, given.rows, sizeof(float)),
        checkBuffer(given.threshold, given.thresholds, sizeof(float)),
        checkBuffer(given.weight, 1, bytes),
        checkBuffer(given.second, KIND == Kind::kGateUp ? 1 : 0, bytes),
        checkBuffer(given.residual, adds ? given.rows : 0, bytes),
        checkBuffer(given.gate, adds ? given.rows : 0, bytes),
        checkBuffer(given.out, given.rows, bytes),
    });
    if (refused != GSX_OK) return refused;
    if (given.rows == 0) return GSX_OK;
    switch (type) {
    case GSX_FLOAT32: return run<float, KIND>(given, stream);
    case GSX_FLOAT16: return run<__half, KIND>(given, stream);
    case GSX_BFLOAT16: return run<__nv_bfloat16, KIND>(given, stream);
    }
    return GSX_UNKNOWN_TYPE;
}

}  // namespace
}  // namespace gsx

gsx_status gsx_skip_linear(const void* x, const float* score, const float* threshold, const void* weight,
                           int64_t thresholds, int64_t rows, int64_t inner, int64_t width, gsx_type type, void* out,
                           cudaStream_t stream) {
    using namespace gsx;
    return run<Kind::kLinear>(
        {nullptr, x, nullptr, score, threshold, weight, nullptr, thresholds, rows, inner, width, 1, out}, type, stream);
}

gsx_status gsx_skip_gate_up(const void* x, const float* score, const float* threshold, const void* gate, const void* up,
                            int64_t thresholds, int64_t rows, int64_t inner, int64_t width, gsx_type type, void* out,
                            cudaStream_t stream) {
    using namespace gsx;
    return run<Kind::kGateUp>({nullptr, x, nullptr, score, threshold, gate, up, thresholds, rows, inner, width, 1, out},
                              type, stream);
}

gsx_status gsx_skip_linear_add(const void* residual, const void* x, const void* gate, const float* score,
                               const float* threshold, const void* weight, int64_t thresholds, int64_t rows,
                               int64_t inner, int64_t width, int64_t gate_width, gsx_type type, void* out,
                               cudaStream_t stream) {
    using namespace gsx;
    if (gate_width != 1 && gate_width != width) return GSX_BAD_SIZE;
    return run<Kind::kAdd>(
        {residual, x, gate, score, threshold, weight, nullptr, thresholds, rows, inner, width, gate_width, out}, type,
        stream);
}
