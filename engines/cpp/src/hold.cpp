#include "hold.h"

#include <algorithm>
#include <cmath>

#include "tensor_names.h"

namespace gsx {
namespace {

// New tokens that share their thresholds; tokens in which what is owed is made up for; the unit of budgets, and of the
// settings between two blocks (gsx_engines/bundle/hold.py).
constexpr int64_t kBlock = 16;
constexpr int64_t kWindow = 64;
constexpr int64_t kMillion = 1'000'000;
constexpr int64_t kStep = 1000;

int64_t millionths(double budget) { return static_cast<int64_t>(std::nearbyint(budget * static_cast<double>(kMillion))); }

// Rounds down also below 0, as Python does; the divisor is positive.
int64_t floorOf(int64_t value, int64_t divisor) { return value / divisor - (value % divisor < 0 ? 1 : 0); }

}  // namespace

Hold::Hold(Selection const& selection, double budget, int64_t branches)
    : mSelection(&selection), mBudget(budget), mBranches(branches), mSetting(millionths(budget)), mSum(mSetting) {}

int64_t Hold::leftInBlock() const { return kBlock - mTokens % kBlock; }

double Hold::setting() const {
    return mTokens < kBlock ? mBudget : static_cast<double>(mSetting) / static_cast<double>(kMillion);
}

bool Hold::read(int64_t kept) {
    ++mTokens;
    mKept += kept;
    if (mTokens % kBlock != 0) return false;
    mSetting = next();
    mSum += mSetting;
    return true;
}

int64_t Hold::next() const {
    int64_t const owed = millionths(mBudget) * gated() - mKept * kMillion;
    int64_t const wanted =
        floorOf(mSum, mTokens / kBlock) + floorOf(owed, gated()) + floorOf(owed, kWindow * mBranches);
    int64_t const least = -floorOf(-millionths(mSelection->grid.back().budget), kStep) * kStep;
    return std::min(std::max(floorOf(wanted, kStep) * kStep, least), kMillion);
}

std::optional<Hold> holdOf(Manifest const& manifest, Keep const& keep) {
    if (!keep.hold) return std::nullopt;
    Selection const& selection = *manifest.selection;
    auto const branches = static_cast<int64_t>(manifest.skippablePlaces(0, manifest.decoder.numLayers).size());
    return Hold(selection, keep.budget.value_or(selection.budget), branches);
}

std::shared_ptr<Controls const> withThresholds(Controls const& controls, std::vector<Hold const*> const& holds) {
    auto made = std::make_shared<Controls>(controls);
    std::vector<float>& data = std::get<Array<float>>(made->at(names::kThresholds)).data;
    size_t const size = data.size() / holds.size();
    for (size_t row = 0; row < holds.size(); ++row) {
        if (holds[row] == nullptr) continue;
        auto at = data.begin() + static_cast<int64_t>(row * size);
        for (auto const& layer : holds[row]->thresholds()) at = std::copy(layer.begin(), layer.end(), at);
    }
    return made;
}

}  // namespace gsx
