#include "sequence_values.h"

#include <map>
#include <string>
#include <utility>

#include "tensor_names.h"
#include "token_axis.h"

namespace gsx {
namespace {

// Call `change(array)` for every value that has an axis of sequences.
template <typename Change>
Controls changed(Controls controls, Change const& change) {
    // Number of axes, with that of the sequences. (Bundles of gsx 0.1.0 have one value without it.)
    static std::map<std::string, size_t> const axes = {
        {names::kThresholds, 3}, {names::kExitThreshold, 1}, {names::kLayerMask, 3}, {names::kFullUntil, 1}, {names::kLoops, 1}};
    for (auto& [name, value] : controls) {
        auto const bySequence = axes.find(name);
        if (bySequence == axes.end()) continue;
        std::visit(
            [&](auto& array) {
                if (array.shape.size() == bySequence->second) change(array);
            },
            value);
    }
    return controls;
}

}  // namespace

Controls valuesOfRows(Controls const& controls, int64_t start, int64_t stop) {
    return changed(controls, [&](auto& array) {
        if (array.shape[0] > 1) array = someRows(array, start, stop);
    });
}

Controls valuesOfEach(Controls const& controls, int64_t batch) {
    return changed(controls, [&](auto& array) {
        if (array.shape[0] == batch) return;
        auto const one = array.data;
        array.data.reserve(one.size() * static_cast<size_t>(batch));
        for (int64_t row = 1; row < batch; ++row) array.data.insert(array.data.end(), one.begin(), one.end());
        array.shape[0] = batch;
    });
}

}  // namespace gsx
