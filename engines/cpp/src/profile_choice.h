// Choosing the optimization profile of an engine for a call. As in gsx_engines/tensorrt/profile_choice.py.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "gsx/manifest.h"

namespace gsx {

// Whether a size is in a range.
bool fits(Sizes const& sizes, int64_t size);

// Number of the profile for a call: of those that fit, the one with the lowest maximum of tokens.
// Throws EngineError: none fits; it says which axis is out of which range.
size_t chooseProfile(std::vector<EngineProfile> const& profiles, int64_t batch, int64_t tokens, int64_t window);

// The most tokens of each sequence that fit into one call; 0 if no profile allows so many sequences.
int64_t mostTokens(std::vector<EngineProfile> const& profiles, int64_t batch);

// How many columns of the cache a call reads: the filled ones, rounded up, so that shapes seldom change.
int64_t windowOf(int64_t filled, int64_t capacity);

}  // namespace gsx
