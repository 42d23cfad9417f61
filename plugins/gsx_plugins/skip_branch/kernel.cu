// Checks what a product of a step is given, and launches the kernel that fits it (product.cuh).

#include "skip_branch/kernel.h"

#include "skip_branch/product.cuh"

namespace gsx {
namespace {

// With fewer blocks of kMostColumns than this, blocks take half as many columns, so that there are twice as many.
constexpr int64_t kFewBlocks = 200;
constexpr gsx_matrix kNoMatrix{};

enum class Kind { kLinear, kGateUp, kAdd, kGate };

// What a call is given, before its types are known.
struct Given {
    Kind kind;
    const void* residual;
    const void* x;
    const void* gate;
    const float* score;
    const float* threshold;
    gsx_matrix matrices[2];
    int64_t thresholds, rows, inner, width, gateWidth;
    gsx_type type;
    void* out;
};

template <typename T, typename W, Scales SCALES, int BYTES, int ROWS, int PRODUCTS>
gsx_status launchProduct(const Given& given, cudaStream_t stream) {
    const int columns = given.width < kFewBlocks * kMostColumns ? kMostColumns / 2 : kMostColumns;
    Operands<T, W> of{};
    of.x = static_cast<const T*>(given.x);
    of.score = given.score;
    of.threshold = given.threshold;
    for (int i = 0; i < PRODUCTS; ++i) {
        const gsx_matrix& matrix = given.matrices[i];
        const int64_t blocks = SCALES == Scales::kBlocks ? matrix.blocks : 1;
        of.matrices[i] = {static_cast<const W*>(matrix.values), matrix.scales, static_cast<int>(given.inner / blocks)};
    }
    of.residual = static_cast<const T*>(given.residual);
    of.gate = static_cast<const T*>(given.gate);
    of.gateStride = given.gateWidth;
    of.gateStep = given.gateWidth == 1 ? 0 : 1;
    of.thresholdStep = given.thresholds == 1 ? 0 : 1;
    of.rows = static_cast<int>(given.rows);
    of.inner = static_cast<int>(given.inner);
    of.width = static_cast<int>(given.width);
    of.lanes = columns * static_cast<int>(sizeof(W)) / BYTES;
    of.out = given.out;
    of.wide = given.kind == Kind::kGate;
    const auto blocks = static_cast<unsigned>((given.width + columns - 1) / columns);
    return launch(skipProduct<T, W, SCALES, BYTES, ROWS, PRODUCTS>, blocks, kThreads, stream, of);
}

template <typename T, typename W, Scales SCALES, int BYTES, int ROWS>
gsx_status byProducts(const Given& given, cudaStream_t stream) {
    // With blocks, a thread also holds scales: of two matrices it takes half as many columns.
    constexpr int kOfTwo = SCALES == Scales::kBlocks && BYTES == kVectorBytes ? BYTES / 2 : BYTES;
    if (given.kind == Kind::kGateUp) return launchProduct<T, W, SCALES, kOfTwo, ROWS, 2>(given, stream);
    return launchProduct<T, W, SCALES, BYTES, ROWS, 1>(given, stream);
}

template <typename T, typename W, Scales SCALES>
gsx_status byRows(const Given& given, cudaStream_t stream) {
    // Several rows of codes have so many sums that a thread takes half as many columns.
    constexpr int kOfSeveral = kIsCode<W> ? kVectorBytes / 2 : kVectorBytes;
    if (given.rows == 1) return byProducts<T, W, SCALES, kVectorBytes, 1>(given, stream);
    if (given.rows <= 4) return byProducts<T, W, SCALES, kOfSeveral, 4>(given, stream);
    return byProducts<T, W, SCALES, kOfSeveral, GSX_MOST_SKIP_ROWS>(given, stream);
}

template <typename T>
gsx_status ofCodes(const Given& given, cudaStream_t stream) {
    if (given.matrices[0].type == GSX_E4M3_WEIGHTS) return byRows<T, E4m3, Scales::kColumn>(given, stream);
    const bool blocks = given.matrices[0].blocks > 1 || given.matrices[1].blocks > 1;
    if (blocks) return byRows<T, int8_t, Scales::kBlocks>(given, stream);
    return byRows<T, int8_t, Scales::kColumn>(given, stream);
}

template <typename T>
gsx_status ofType(const Given& given, cudaStream_t stream) {
    const gsx_matrix* const matrices = given.matrices;
    if (matrices[0].type != GSX_ROW_WEIGHTS) {
        if constexpr (sizeof(T) == 2) return ofCodes<T>(given, stream);
        return GSX_UNKNOWN_WEIGHTS;
    }
    if (allowsVectors(given.width * int64_t{sizeof(T)}, matrices[0].values, matrices[1].values)) {
        return byRows<T, T, Scales::kNone>(given, stream);
    }
    return byProducts<T, T, Scales::kNone, sizeof(T), GSX_MOST_SKIP_ROWS>(given, stream);
}

gsx_status checkMatrix(const gsx_matrix& matrix, const Given& given) {
    switch (matrix.type) {
    case GSX_ROW_WEIGHTS: return checkBuffer(matrix.values, 1, static_cast<size_t>(elementBytes(given.type)));
    case GSX_INT8_WEIGHTS:
    case GSX_E4M3_WEIGHTS: break;
    default: return GSX_UNKNOWN_WEIGHTS;
    }
    const bool blocks = matrix.blocks > 1;
    if (given.type == GSX_FLOAT32) return GSX_UNKNOWN_WEIGHTS;
    if (blocks && (matrix.type == GSX_E4M3_WEIGHTS || given.kind == Kind::kGate)) return GSX_UNKNOWN_WEIGHTS;
    if (given.width % GSX_CODES_AT_A_TIME != 0) return GSX_BAD_SIZE;
    if (matrix.blocks < 1 || given.inner % matrix.blocks != 0) return GSX_BAD_SIZE;
    if (blocks && given.inner / matrix.blocks % GSX_LEAST_BLOCK != 0) return GSX_BAD_SIZE;
    return firstFailure({checkBuffer(matrix.values, 1, kVectorBytes), checkBuffer(matrix.scales, 1, kVectorBytes)});
}

gsx_status run(const Given& given, cudaStream_t stream) {
    const gsx_type type = given.type;
    const bool decides = given.kind != Kind::kGate, adds = given.kind == Kind::kAdd, two = given.kind == Kind::kGateUp;
    if (const gsx_status bad = firstFailure({checkRow(given.inner, type), checkRow(given.width, type)})) return bad;
    if (given.rows < 0 || (decides && given.thresholds != 1 && given.thresholds != given.rows)) return GSX_BAD_SIZE;
    if (given.rows > GSX_MOST_SKIP_ROWS) return GSX_TOO_LARGE;
    if (two && given.matrices[0].type != given.matrices[1].type) return GSX_UNKNOWN_WEIGHTS;
    const auto bytes = static_cast<size_t>(elementBytes(type));
    const gsx_status refused = firstFailure({
        checkBuffer(given.x, given.rows, bytes),
        checkBuffer(given.score, decides ? given.rows : 0, sizeof(float)),
        checkBuffer(given.threshold, decides ? given.thresholds : 0, sizeof(float)),
        checkMatrix(given.matrices[0], given),
        two ? checkMatrix(given.matrices[1], given) : GSX_OK,
        checkBuffer(given.residual, adds ? given.rows : 0, bytes),
        checkBuffer(given.gate, adds ? given.rows : 0, bytes),
        checkBuffer(given.out, given.rows, decides ? bytes : sizeof(float)),
    });
    if (refused != GSX_OK) return refused;
    if (given.rows == 0) return GSX_OK;
    switch (type) {
    case GSX_FLOAT32: return ofType<float>(given, stream);
    case GSX_FLOAT16: return ofType<__half>(given, stream);
    case GSX_BFLOAT16: return ofType<__nv_bfloat16>(given, stream);
    }
    return GSX_UNKNOWN_TYPE;
}

}  // namespace
}  // namespace gsx

gsx_status gsx_skip_linear(const void* x, const float* score, const float* threshold, const gsx_matrix* weight,
                           int64_t thresholds, int64_t rows, int64_t inner, int64_t width, gsx_type type, void* out,
                           cudaStream_t stream) {
    using namespace gsx;
    if (weight == nullptr) return GSX_NULL_POINTER;
    return run({Kind::kLinear, nullptr, x, nullptr, score, threshold, {*weight, kNoMatrix}, thresholds, rows, inner,
                width, 1, type, out},
               stream);
}

gsx_status gsx_skip_gate_up(const void* x, const float* score, const float* threshold, const gsx_matrix* gate,
                            const gsx_matrix* up, int64_t thresholds, int64_t rows, int64_t inner, int64_t width,
                            gsx_type type, void* out, cudaStream_t stream) {
    using namespace gsx;
    if (gate == nullptr || up == nullptr) return GSX_NULL_POINTER;
    return run({Kind::kGateUp, nullptr, x, nullptr, score, threshold, {*gate, *up}, thresholds, rows, inner, width, 1,
                type, out},
               stream);
}

gsx_status gsx_skip_linear_add(const void* residual, const void* x, const void* gate, const float* score,
                               const float* threshold, const gsx_matrix* weight, int64_t thresholds, int64_t rows,
                               int64_t inner, int64_t width, int64_t gate_width, gsx_type type, void* out,
                               cudaStream_t stream) {
    using namespace gsx;
    if (weight == nullptr) return GSX_NULL_POINTER;
    if (gate_width != 1 && gate_width != width) return GSX_BAD_SIZE;
    return run({Kind::kAdd, residual, x, gate, score, threshold, {*weight, kNoMatrix}, thresholds, rows, inner, width,
                gate_width, type, out},
               stream);
}

gsx_status gsx_gate_linear(const void* x, const gsx_matrix* weight, int64_t rows, int64_t inner, int64_t width,
                           gsx_type type, float* out, cudaStream_t stream) {
    using namespace gsx;
    if (weight == nullptr) return GSX_NULL_POINTER;
    return run({Kind::kGate, nullptr, x, nullptr, nullptr, nullptr, {*weight, kNoMatrix}, 1, rows, inner, width, 1, type,
                out},
               stream);
}
