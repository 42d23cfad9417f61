// Choosing the next token from logits: the rule of gsx_engines/sampling.py, number for number.
//
// A sampled token is the winner of an exponential race: token v of probability p_v arrives at -log(u_v) / p_v, and the
// first one is taken. The noise u depends on the seed, the sequence, the place in the text and the token alone, so the
// same seed gives the same text with any draft. Probabilities are float64; the sum has NumPy's order.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "gsx/sampling.h"

namespace gsx {

// The logits of one token, [V].
struct LogitsRow {
    float const* data;
    size_t size;
};

// Tokens that may come next, and their probabilities.
struct Candidates {
    std::vector<int64_t> ids;
    std::vector<double> weights;
};

class Picker {
public:
    // Without a seed, the operating system gives one.
    explicit Picker(Sampling const& sampling);

    // The token at a place of a sequence: place is the new token's position in the text, prompt included.
    int64_t pick(LogitsRow logits, size_t sequence, int64_t place) const;

    // A draft's own chance that the model picks the same token. Greedy: the probability of its choice. Sampled: 1, since
    // how likely the token was says nothing there (gsx_engines/sampling.py).
    double confidence(LogitsRow logits) const;

private:
    Sampling mSampling;
    uint64_t mSeed;
};

// Temperature comes first, then top-k, then top-p. Of equal tokens the earlier one counts as the likelier.
Candidates candidatesOf(LogitsRow logits, Sampling const& sampling);

}  // namespace gsx
