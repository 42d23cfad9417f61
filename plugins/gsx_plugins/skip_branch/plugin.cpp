// SkipLinear, SkipGateUp and SkipLinearAdd for TensorRT.

#include "native/plugin.h"
#include "skip_branch/kernel.h"

namespace gsx {
namespace {

float const* floats(void const* pointer) noexcept { return static_cast<float const*>(pointer); }

size_t noWorkspace(int64_t) { return 0; }

// One for all rows, or one for each.
int64_t thresholdsOf(Call const& call, int32_t threshold, int32_t rows) noexcept {
    return call.shapes[threshold].dims.nbDims == 0 ? 1 : call.size(rows, 0);
}

gsx_status runLinear(Call const& call) {
    enum Input { kX, kScore, kThreshold, kWeight };
    return gsx_skip_linear(call.inputs[kX], floats(call.inputs[kScore]), floats(call.inputs[kThreshold]),
                           call.inputs[kWeight], thresholdsOf(call, kThreshold, kX), call.size(kX, 0), call.size(kX, 1),
                           call.size(kWeight, 1), rowType(call.shapes[kX].type), call.outputs[0], call.stream);
}

gsx_status runGateUp(Call const& call) {
    enum Input { kX, kScore, kThreshold, kGate, kUp };
    return gsx_skip_gate_up(call.inputs[kX], floats(call.inputs[kScore]), floats(call.inputs[kThreshold]),
                            call.inputs[kGate], call.inputs[kUp], thresholdsOf(call, kThreshold, kX), call.size(kX, 0),
                            call.size(kX, 1), call.size(kGate, 1), rowType(call.shapes[kX].type), call.outputs[0],
                            call.stream);
}

gsx_status runLinearAdd(Call const& call) {
    enum Input { kResidual, kX, kGate, kScore, kThreshold, kWeight };
    return gsx_skip_linear_add(call.inputs[kResidual], call.inputs[kX], call.inputs[kGate], floats(call.inputs[kScore]),
                               floats(call.inputs[kThreshold]), call.inputs[kWeight],
                               thresholdsOf(call, kThreshold, kX), call.size(kX, 0),
                               call.size(kX, 1), call.size(kWeight, 1), call.size(kGate, 1),
                               rowType(call.shapes[kResidual].type), call.outputs[0], call.stream);
}

}  // namespace

Op const kSkipLinear{
    "SkipLinear",
    4,
    1,
    {
        {"x", Element::kRow, "NI"},
        {"score", Element::kScore, "N"},
        {"threshold", Element::kScore, "N", true},
        {"weight", Element::kRow, "IO"},
        {"out", Element::kRow, "NO"},
    },
    noWorkspace,
    runLinear,
};

Op const kSkipGateUp{
    "SkipGateUp",
    5,
    1,
    {
        {"x", Element::kRow, "NI"},
        {"score", Element::kScore, "N"},
        {"threshold", Element::kScore, "N", true},
        {"gate", Element::kRow, "IO"},
        {"up", Element::kRow, "IO"},
        {"out", Element::kRow, "NO"},
    },
    noWorkspace,
    runGateUp,
};

Op const kSkipLinearAdd{
    "SkipLinearAdd",
    6,
    1,
    {
        {"residual", Element::kRow, "NH"},
        {"x", Element::kRow, "NI"},
        {"gate", Element::kRow, "NG"},
        {"score", Element::kScore, "N"},
        {"threshold", Element::kScore, "N", true},
        {"weight", Element::kRow, "IH"},
        {"out", Element::kRow, "NH"},
    },
    noWorkspace,
    runLinearAdd,
};

}  // namespace gsx
