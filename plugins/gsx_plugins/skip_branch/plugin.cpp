// SkipLinear, SkipGateUp, SkipLinearAdd and GateLinear for TensorRT, for weights of each type.
//
// A matrix of the rows' type is one input; a matrix of codes is two, codes and scales.

#include "native/plugin.h"
#include "skip_branch/kernel.h"

namespace gsx {
namespace {

float const* floats(void const* pointer) noexcept { return static_cast<float const*>(pointer); }

size_t noWorkspace(Largest const&) { return 0; }

// One for all rows, or one for each.
int64_t thresholdsOf(Call const& call, int32_t threshold, int32_t rows) noexcept {
    return call.shapes[threshold].dims.nbDims == 0 ? 1 : call.size(rows, 0);
}

constexpr int32_t inputsOf(gsx_weights weights) noexcept { return weights == GSX_ROW_WEIGHTS ? 1 : 2; }

// The matrix whose inputs begin at `first`.
gsx_matrix matrixOf(Call const& call, int32_t first, gsx_weights weights) noexcept {
    if (weights == GSX_ROW_WEIGHTS) return {call.inputs[first], nullptr, 0, weights};
    return {call.inputs[first], call.inputs[first + 1], call.size(first + 1, 0), weights};
}

// The number of its columns; -1 if codes and scales do not agree on it.
int64_t widthOf(Call const& call, int32_t first, gsx_weights weights) noexcept {
    if (weights == GSX_ROW_WEIGHTS) return call.size(first, 1);
    int64_t const width = call.size(first + 1, 1);
    return width == 4 * call.size(first, 1) ? width : -1;
}

template <gsx_weights WEIGHTS>
gsx_status runLinear(Call const& call) {
    enum Input { kX, kScore, kThreshold, kWeight };
    gsx_matrix const weight = matrixOf(call, kWeight, WEIGHTS);
    return gsx_skip_linear(call.inputs[kX], floats(call.inputs[kScore]), floats(call.inputs[kThreshold]), &weight,
                           thresholdsOf(call, kThreshold, kX), call.size(kX, 0), call.size(kX, 1),
                           widthOf(call, kWeight, WEIGHTS), rowType(call.shapes[kX].type), call.outputs[0], call.stream);
}

template <gsx_weights WEIGHTS>
gsx_status runGateUp(Call const& call) {
    enum Input { kX, kScore, kThreshold, kGate, kUp = kGate + inputsOf(WEIGHTS) };
    gsx_matrix const gate = matrixOf(call, kGate, WEIGHTS), up = matrixOf(call, kUp, WEIGHTS);
    int64_t const width = widthOf(call, kGate, WEIGHTS);
    if (width != widthOf(call, kUp, WEIGHTS)) return GSX_BAD_SIZE;
    return gsx_skip_gate_up(call.inputs[kX], floats(call.inputs[kScore]), floats(call.inputs[kThreshold]), &gate, &up,
                            thresholdsOf(call, kThreshold, kX), call.size(kX, 0), call.size(kX, 1), width,
                            rowType(call.shapes[kX].type), call.outputs[0], call.stream);
}

template <gsx_weights WEIGHTS>
gsx_status runLinearAdd(Call const& call) {
    enum Input { kResidual, kX, kGate, kScore, kThreshold, kWeight };
    gsx_matrix const weight = matrixOf(call, kWeight, WEIGHTS);
    return gsx_skip_linear_add(call.inputs[kResidual], call.inputs[kX], call.inputs[kGate], floats(call.inputs[kScore]),
                               floats(call.inputs[kThreshold]), &weight, thresholdsOf(call, kThreshold, kX),
                               call.size(kX, 0), call.size(kX, 1), widthOf(call, kWeight, WEIGHTS), call.size(kGate, 1),
                               rowType(call.shapes[kResidual].type), call.outputs[0], call.stream);
}

template <gsx_weights WEIGHTS>
gsx_status runGate(Call const& call) {
    enum Input { kX, kWeight };
    gsx_matrix const weight = matrixOf(call, kWeight, WEIGHTS);
    return gsx_gate_linear(call.inputs[kX], &weight, call.size(kX, 0), call.size(kX, 1), widthOf(call, kWeight, WEIGHTS),
                           rowType(call.shapes[kX].type), static_cast<float*>(call.outputs[0]), call.stream);
}

constexpr Tensor kX{"x", Element::kRow, "NI"};
constexpr Tensor kScores{"score", Element::kScore, "N"};
constexpr Tensor kBound{"threshold", Element::kScore, "N", true};
// Blocks B and D, since those of two matrices may differ; C: a quarter of the columns.
constexpr Tensor kCodes{"weight", Element::kCodes, "IC"};
constexpr Tensor kScales{"scale", Element::kRow, "BO"};

template <gsx_weights WEIGHTS>
constexpr Op codesLinear(char const* name) {
    return {name,
            5,
            1,
            {kX, kScores, kBound, kCodes, kScales, {"out", Element::kRow, "NO"}},
            noWorkspace,
            runLinear<WEIGHTS>};
}

template <gsx_weights WEIGHTS>
constexpr Op codesGateUp(char const* name) {
    return {name,
            7,
            1,
            {kX,
             kScores,
             kBound,
             {"gate", Element::kCodes, "IC"},
             {"gate scale", Element::kRow, "BO"},
             {"up", Element::kCodes, "IC"},
             {"up scale", Element::kRow, "DO"},
             {"out", Element::kRow, "NO"}},
            noWorkspace,
            runGateUp<WEIGHTS>};
}

template <gsx_weights WEIGHTS>
constexpr Op codesLinearAdd(char const* name) {
    return {name,
            7,
            1,
            {{"residual", Element::kRow, "NH"},
             kX,
             {"gate", Element::kRow, "NG"},
             kScores,
             kBound,
             kCodes,
             {"scale", Element::kRow, "BH"},
             {"out", Element::kRow, "NH"}},
            noWorkspace,
            runLinearAdd<WEIGHTS>};
}

template <gsx_weights WEIGHTS>
constexpr Op codesGate(char const* name) {
    return {name,
            3,
            1,
            {kX, kCodes, {"scale", Element::kScore, "BO"}, {"out", Element::kScore, "NO"}},
            noWorkspace,
            runGate<WEIGHTS>};
}

}  // namespace

Op const kProductOps[] = {
    {"SkipLinear",
     4,
     1,
     {kX, kScores, kBound, {"weight", Element::kRow, "IO"}, {"out", Element::kRow, "NO"}},
     noWorkspace,
     runLinear<GSX_ROW_WEIGHTS>},
    {"SkipGateUp",
     5,
     1,
     {kX, kScores, kBound, {"gate", Element::kRow, "IO"}, {"up", Element::kRow, "IO"}, {"out", Element::kRow, "NO"}},
     noWorkspace,
     runGateUp<GSX_ROW_WEIGHTS>},
    {"SkipLinearAdd",
     6,
     1,
     {{"residual", Element::kRow, "NH"},
      kX,
      {"gate", Element::kRow, "NG"},
      kScores,
      kBound,
      {"weight", Element::kRow, "IH"},
      {"out", Element::kRow, "NH"}},
     noWorkspace,
     runLinearAdd<GSX_ROW_WEIGHTS>},
    {"GateLinear",
     2,
     1,
     {kX, {"weight", Element::kRow, "IO"}, {"out", Element::kScore, "NO"}},
     noWorkspace,
     runGate<GSX_ROW_WEIGHTS>},
    codesLinear<GSX_INT8_WEIGHTS>("SkipLinearInt8"),
    codesGateUp<GSX_INT8_WEIGHTS>("SkipGateUpInt8"),
    codesLinearAdd<GSX_INT8_WEIGHTS>("SkipLinearAddInt8"),
    codesGate<GSX_INT8_WEIGHTS>("GateLinearInt8"),
    codesLinear<GSX_E4M3_WEIGHTS>("SkipLinearE4M3"),
    codesGateUp<GSX_E4M3_WEIGHTS>("SkipGateUpE4M3"),
    codesLinearAdd<GSX_E4M3_WEIGHTS>("SkipLinearAddE4M3"),
    codesGate<GSX_E4M3_WEIGHTS>("GateLinearE4M3"),
};

}  // namespace gsx
