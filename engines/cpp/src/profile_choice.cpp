#include "profile_choice.h"

#include <algorithm>
#include <string>
#include <tuple>

#include "gsx/error.h"
#include "text.h"

namespace gsx {
namespace {

// The window is a multiple of this many columns (gsx_engines/runners/tensorrt.py).
constexpr int64_t kWindowStep = 64;

std::string spanOf(Sizes const& sizes) {
    std::string const least = std::to_string(sizes.least);
    return sizes.least == sizes.most ? least : least + " to " + std::to_string(sizes.most);
}

}  // namespace

bool fits(Sizes const& sizes, int64_t size) { return sizes.least <= size && size <= sizes.most; }

int64_t windowOf(int64_t filled, int64_t capacity) {
    return std::min((filled + kWindowStep - 1) / kWindowStep * kWindowStep, capacity);
}

size_t chooseProfile(std::vector<EngineProfile> const& profiles, int64_t batch, int64_t tokens, int64_t window) {
    size_t chosen = profiles.size();
    for (size_t i = 0; i < profiles.size(); ++i) {
        EngineProfile const& profile = profiles[i];
        if (!fits(profile.batch, batch) || !fits(profile.tokens, tokens) || !fits(profile.window, window)) continue;
        if (chosen == profiles.size() || profile.tokens.most < profiles[chosen].tokens.most) chosen = i;
    }
    if (chosen < profiles.size()) return chosen;
    std::vector<std::string> outside;
    for (auto const& [name, axis, size] : {std::tuple("batch", &EngineProfile::batch, batch),
                                           std::tuple("tokens", &EngineProfile::tokens, tokens),
                                           std::tuple("window", &EngineProfile::window, window)}) {
        auto const takes = [axis = axis, size = size](EngineProfile const& profile) { return fits(profile.*axis, size); };
        if (std::none_of(profiles.begin(), profiles.end(), takes)) outside.emplace_back(name);
    }
    std::string const why =
        outside.empty() ? "each has some axis out of range" : joinedBy(" and ", outside) + " out of range in each";
    std::vector<std::string> ranges;
    for (EngineProfile const& profile : profiles) {
        ranges.push_back(profile.name + ": batch " + spanOf(profile.batch) + ", tokens " + spanOf(profile.tokens) +
                         ", window " + spanOf(profile.window));
    }
    throw EngineError("no profile of the engine fits this call: " + why,
                      {joinedBy("; ", ranges),
                       "batch " + std::to_string(batch) + ", tokens " + std::to_string(tokens) + ", window " +
                           std::to_string(window),
                       "build with wider ranges: gsx build --context, --batch or --profile"});
}

int64_t mostTokens(std::vector<EngineProfile> const& profiles, int64_t batch) {
    int64_t most = 0;
    for (EngineProfile const& profile : profiles) {
        if (fits(profile.batch, batch)) most = std::max(most, profile.tokens.most);
    }
    return most;
}

}  // namespace gsx
