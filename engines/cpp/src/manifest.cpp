#include "gsx/manifest.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <numeric>
#include <set>

#include "gsx/error.h"
#include "text.h"

namespace gsx {
namespace {

// The branches in the form that `parseDraft` reads; neighbouring layers with the same branches become a range.
std::string spelled(LayersDraft const& draft) {
    std::map<int64_t, std::set<Branch>> leftOut;
    for (auto const& [layer, branch] : draft.skip) leftOut[layer].insert(branch);
    std::vector<std::string> parts;
    for (auto first = leftOut.begin(); first != leftOut.end();) {
        auto last = first;
        auto next = std::next(last);
        while (next != leftOut.end() && next->first == last->first + 1 && next->second == first->second) last = next++;
        std::string part = std::to_string(first->first);
        if (last != first) part += "-" + std::to_string(last->first);
        if (first->second.size() < kBranches) part += std::string(".") + nameOf(*first->second.begin());
        parts.push_back(part);
        first = next;
    }
    return joinedBy(",", parts);
}

}  // namespace

char const* nameOf(Branch branch) noexcept { return branch == Branch::kAttention ? "attn" : "mlp"; }

void checkBudget(double budget) {
    if (!(std::isfinite(budget) && budget > 0 && budget <= 1)) {
        throw UsageError("the budget is out of range", {"a number above 0 and at most 1", exactNumber(budget), {}});
    }
}

Thresholds Selection::thresholdsFor(double wanted) const {
    checkBudget(wanted);
    double const lowest = grid.back().budget;
    if (wanted < lowest) {
        throw UsageError("budget " + shortNumber(wanted) + " is below the calibrated grid",
                         {shortNumber(lowest) + " to 1", shortNumber(wanted),
                          "export again with budget " + shortNumber(wanted) + ", so that the grid includes it"});
    }
    for (size_t i = 0; i < grid.size(); ++i) {
        GridPoint const& upper = grid[i];
        if (upper.budget == wanted) return upper.thresholds;
        if (i + 1 == grid.size() || grid[i + 1].budget >= wanted || wanted > upper.budget) continue;
        // Next to budget 1, whose thresholds are minus infinity, those of the neighbour are used.
        GridPoint const& lower = grid[i + 1];
        auto const share = static_cast<float>((upper.budget - wanted) / (upper.budget - lower.budget));
        Thresholds between = lower.thresholds;
        for (size_t layer = 0; layer < between.size(); ++layer) {
            for (size_t branch = 0; branch < kBranches; ++branch) {
                float const high = upper.thresholds[layer][branch];
                float const low = lower.thresholds[layer][branch];
                if (!std::isinf(high)) between[layer][branch] = high + share * (low - high);
            }
        }
        return between;
    }
    // Only for a budget above the first one of the grid, which is 1 in every exported bundle.
    return grid.front().thresholds;
}

RuntimeInput const* Policy::input(std::string const& wanted) const {
    auto const found =
        std::find_if(inputs.begin(), inputs.end(), [&](RuntimeInput const& one) { return one.name == wanted; });
    return found == inputs.end() ? nullptr : &*found;
}

std::pair<int64_t, int64_t> Manifest::layersOf(std::string const& graph) const {
    auto const* exit = draft ? std::get_if<ExitDraft>(&draft->draft) : nullptr;
    if (graph == "model" || exit == nullptr) return {0, decoder.numLayers};
    return graph == "draft" ? std::pair(int64_t{0}, exit->layer) : std::pair(exit->layer, decoder.numLayers);
}

std::vector<Place> Manifest::skippablePlaces(int64_t first, int64_t last) const {
    std::vector<Place> places;
    if (!policy) return places;
    std::vector<int64_t> layers(static_cast<size_t>(last - first));
    std::iota(layers.begin(), layers.end(), first);
    for (int64_t const layer : policy->layers.value_or(layers)) {
        if (layer < first || layer >= last) continue;
        for (Branch const branch : {Branch::kAttention, Branch::kMlp}) {
            bool const skips = std::find(policy->branches.begin(), policy->branches.end(), branch) != policy->branches.end();
            if (skips) places.emplace_back(layer, branch);
        }
    }
    return places;
}

std::optional<int64_t> Loops::loopOf(int64_t visit) const {
    int64_t const inside = visit - before;
    if (inside < 0 || inside >= looped * most) return std::nullopt;
    return inside / looped;
}

bool operator==(DraftKind const& one, DraftKind const& other) { return toString(one) == toString(other); }

std::string toString(DraftKind const& draft) {
    if (auto const* exit = std::get_if<ExitDraft>(&draft)) return "exit:" + std::to_string(exit->layer);
    if (auto const* budget = std::get_if<BudgetDraft>(&draft)) return "budget:" + shortNumber(budget->budget);
    if (auto const* loops = std::get_if<LoopsDraft>(&draft)) return "loops:" + std::to_string(loops->loops);
    return "layers:" + spelled(std::get<LayersDraft>(draft));
}

}  // namespace gsx
