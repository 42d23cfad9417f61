// TopKGather for TensorRT: selects tokens, then gathers their rows.

#include "native/gather_rows.h"
#include "native/plugin.h"
#include "topk_gather/kernel.h"

namespace gsx {
namespace {

enum Input { kX, kScore, kK };
enum Output { kRows, kIndex, kCount };

gsx_status run(Call const& call) {
    int64_t const tokens = call.size(kX, 0);
    auto* index = static_cast<int64_t*>(call.outputs[kIndex]);
    auto* count = static_cast<int64_t*>(call.outputs[kCount]);
    gsx_status const failed =
        gsx_topk_select(static_cast<float const*>(call.inputs[kScore]), static_cast<int64_t const*>(call.inputs[kK]),
                        tokens, index, count, call.workspace, gsx_topk_select_workspace(tokens), call.stream);
    if (failed != GSX_OK) return failed;
    return gsx_gather_rows(call.inputs[kX], tokens, call.size(kX, 1), rowType(call.shapes[kX].type), index, count,
                           tokens, call.outputs[kRows], call.stream);
}

}  // namespace

Op const kTopKGather{
    "TopKGather",
    3,
    3,
    {
        {"x", Element::kRow, "NH"},
        {"score", Element::kScore, "N"},
        {"k", Element::kPlace, "1"},
        {"rows", Element::kRow, "KH"},
        {"index", Element::kPlace, "K"},
        {"count", Element::kPlace, ""},
    },
    byTokens<gsx_topk_select_workspace>,
    run,
};

}  // namespace gsx
