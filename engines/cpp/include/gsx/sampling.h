// How the next token is chosen: greedy, or sampled after temperature, top-k, top-p and min-p.

#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <utility>
#include <vector>

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
    // Only tokens at least this share as likely as the likeliest one; 0 for all.
    double minP = 0;
    // Divides the logits above 0 of tokens in the prompt and the new text, and multiplies those below; 1 for none.
    double repetitionPenalty = 1;
    // Taken off a token's logit for each time that it is in the new text, and if it is there at all.
    double frequencyPenalty = 0;
    double presencePenalty = 0;
    // Added to the logits of tokens, by id.
    std::map<int64_t, double> logitBias;

    bool greedy() const noexcept { return temperature == 0; }
    // Whether biases or penalties change the logits.
    bool adjusts() const noexcept {
        return repetitionPenalty != 1 || frequencyPenalty != 0 || presencePenalty != 0 || !logitBias.empty();
    }
};

// How likely the model thought a token, and the tokens that it thought likeliest (the likeliest first): natural logarithms
// of its own probabilities, before biases, penalties, temperature and cuts.
struct TokenLogprobs {
    double logprob = 0;
    std::vector<std::pair<int64_t, double>> top;
};

// Throws UsageError for a number outside its range, and for a bias of a token that the model does not have.
void check(Sampling const& sampling, int64_t vocabulary);

}  // namespace gsx
