// Choosing the next token from logits: the rule of gsx_engines/sampling.py, with the same numbers.
//
// A sampled token is the winner of an exponential race: token v of probability p_v arrives at time -log(u_v) / p_v, and the
// first one to arrive is chosen. The noise u depends only on the seed, the sequence, the position in the text and the token,
// so the same seed gives the same text with any draft. Probabilities are float64, summed in NumPy's order.

#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "gsx/sampling.h"

namespace gsx {

// The logits of one token, [V].
struct LogitsRow {
    float const* data;
    size_t size;
};

// What is known of the logits of one token where a GPU found the likeliest tokens: as in gsx_engines/likeliest.py.
struct Likeliest {
    // [C], the likeliest tokens in ascending order of id, and their logits. If the least likely of them has equals, it is
    // open which of these are here.
    std::vector<int64_t> ids;
    std::vector<float> logits;
    // The sum of exp(logit - largest) over all tokens; not finite if some logit is NaN or plus infinity.
    double total;
    // V.
    size_t size;
    // Fetches all logits [V], until the engine's next call.
    std::function<std::vector<float>()> whole;

    // Whether all tokens with a logit of at least this are here.
    bool hasAllOf(float logit) const;
};

// The tokens that may come next, and their probabilities.
struct Candidates {
    std::vector<int64_t> ids;
    std::vector<double> weights;
};

class Picker {
public:
    // Without a seed, the operating system provides one.
    explicit Picker(Sampling const& sampling);

    // Choose a token of a sequence; place is the new token's position in the text, prompt included.
    int64_t pick(LogitsRow logits, size_t sequence, int64_t place) const;
    // The same token from the likeliest ones, which must suffice.
    int64_t pick(Likeliest const& likeliest, size_t sequence, int64_t place) const;

    // The draft's own probability that the model picks the same token. Greedy: the probability of the draft's choice.
    // Sampled: 1, since the probability of the token says nothing there (gsx_engines/sampling.py).
    double confidence(LogitsRow logits) const;
    double confidence(Likeliest const& likeliest) const;

    Sampling const& sampling() const { return mSampling; }

private:
    // `names`: the tokens' ids, ascending; null if the logits are those of all tokens.
    int64_t pickOf(LogitsRow logits, int64_t const* names, size_t sequence, int64_t place) const;

    Sampling mSampling;
    uint64_t mSeed;
};

// Logits after biases and penalties, which depend on the text so far: the prompt and the new tokens. Each is computed in
// float64 and rounded once.
std::vector<float> adjusted(LogitsRow logits, Sampling const& sampling, std::vector<int64_t> const& prompt,
                            std::vector<int64_t> const& fresh);

// Log-probabilities of a token and of the `count` likeliest ones. Of equally likely tokens the earlier one comes first.
TokenLogprobs logprobsOf(LogitsRow logits, int64_t token, int64_t count);

// Whether the likeliest tokens alone give what all logits would: the same candidates, with the same weights.
bool suffices(Likeliest const& likeliest, Sampling const& sampling);

// Temperature is applied first, then top-k, then top-p, then min-p. Of equally likely tokens the earlier one comes first.
Candidates candidatesOf(LogitsRow logits, Sampling const& sampling);

}  // namespace gsx
