// How the next token is chosen: greedy, or sampled after temperature, top-k and top-p.

#pragma once

#include <cstdint>
#include <optional>

namespace gsx {

// The same rule as in gsx_engines/sampling.py: with the same seed both write the same text, with or without a draft.
struct Sampling {
    // 0 is greedy.
    double temperature = 0;
    // Only the k likeliest tokens; 0 for all.
    int64_t topK = 0;
    // Only the likeliest tokens that together reach this probability.
    double topP = 1;
    // Seed of the random numbers; unset: a new one each time.
    std::optional<uint64_t> seed;

    bool greedy() const noexcept { return temperature == 0; }
};

// Throws UsageError for a temperature below 0, a negative top-k, or a top-p outside (0, 1].
void check(Sampling const& sampling);

}  // namespace gsx
