// How the next token is chosen: greedy, or sampled after temperature, top-k and top-p.

#pragma once

#include <cstdint>
#include <optional>

namespace gsx {

// The rule is that of gsx_engines/sampling.py: with one seed both write the same text, whatever drafts.
struct Sampling {
    // 0 is greedy.
    double temperature = 0;
    // Only the k likeliest tokens; 0 for all.
    int64_t topK = 0;
    // Only the likeliest tokens that together reach this probability.
    double topP = 1;
    // Of the random numbers; none for a fresh one each time.
    std::optional<uint64_t> seed;

    bool greedy() const noexcept { return temperature == 0; }
};

// Throws UsageError for a temperature below 0, a negative top-k, or a top-p outside of (0, 1].
void check(Sampling const& sampling);

}  // namespace gsx
