// GatedScatterAdd for TensorRT: writes into a separate buffer, since aliased outputs are still a preview in TensorRT.

#include "gated_scatter_add/kernel.h"

#include "native/plugin.h"

namespace gsx {
namespace {

enum Input { kResidual, kRows, kGate, kIndex };

gsx_status run(Call const& call) {
    int64_t const tokens = call.size(kResidual, 0);
    return gsx_gated_scatter_add(call.inputs[kResidual], call.inputs[kRows], call.inputs[kGate],
                                 static_cast<int64_t const*>(call.inputs[kIndex]), nullptr, tokens,
                                 call.size(kRows, 0), call.size(kResidual, 1), call.size(kGate, 1),
                                 rowType(call.shapes[kResidual].type), call.outputs[0], call.workspace,
                                 gsx_gated_scatter_add_workspace(tokens), call.stream);
}

}  // namespace

Op const kGatedScatterAdd{
    "GatedScatterAdd",
    4,
    1,
    {
        {"residual", Element::kRow, "NH"},
        {"rows", Element::kRow, "KH"},
        {"gate", Element::kRow, "KG"},
        {"index", Element::kPlace, "K"},
        {"out", Element::kRow, "NH"},
    },
    byTokens<gsx_gated_scatter_add_workspace>,
    run,
};

}  // namespace gsx
