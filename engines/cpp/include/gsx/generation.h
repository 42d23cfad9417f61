// A generation: what a caller asks for, and what it returns.

#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "gsx/sampling.h"

namespace gsx {

using Tokens = std::vector<int64_t>;

enum class FinishReason { kEndOfText, kLength, kContext, kStopped };
// "end-of-text", "length", "context" or "stopped".
char const* nameOf(FinishReason reason) noexcept;

// Called with (sequence, token) for every new token as soon as it is chosen. Returning true ends the sequence (finish
// "stopped").
using OnToken = std::function<bool(size_t, int64_t)>;

// What a request keeps; where it says nothing, the exported settings apply. At most one member is set, but for `hold`.
struct Keep {
    // Share of skippable work to keep, for keep rules with thresholds.
    std::optional<double> budget;
    // The branches that run, such as `0-3,6,8.attn`, for keep rules that read a layer mask.
    std::optional<std::string> layers;
    // How many layers run; for the same rules.
    std::optional<int64_t> exit;
    // Target of Unified Layer Skipping: the prompt runs in full, new tokens run the kept layers. For the same rules.
    std::optional<double> speedup;
    // Confidence at which a token exits, for keep rules that measure it; infinity: no token exits.
    std::optional<double> exitThreshold;
    // How many loops of a looped model run, for keep rules that read their number.
    std::optional<int64_t> loops;
    // Move the thresholds of new tokens so that these keep the budget's share on this text too.
    bool hold = false;
};

struct Options {
    // For each sequence; the model's context may end it earlier.
    int64_t maxNewTokens = 128;
    // One for all prompts, or one for each; empty: as exported.
    std::vector<Keep> keep;
    Sampling sampling;
    // Tokens that end a sequence; they stay part of it. Unset: the model's end-of-text tokens.
    std::optional<Tokens> stopIds;
    // Tokens drafted at once, 0 for plain decoding. Unset: found while generating.
    std::optional<int64_t> draftLength;
    // Record each token's log-probability, and those of so many likeliest tokens. Unset: none.
    std::optional<int64_t> logprobs;
    OnToken onToken;
};

// Counters of one generation, over all sequences.
struct GenerationStats {
    int64_t promptTokens = 0;
    int64_t newTokens = 0;
    int64_t sequences = 0;
    // Time until the first tokens are chosen, and time of all later rounds.
    double prefillSeconds = 0;
    double decodeSeconds = 0;
    // Rounds after the first call; each has one verification or one plain step.
    int64_t decodeSteps = 0;
    // Parts of decodeSeconds: in draft steps, and in verifications and plain steps. The rest is spent in the loop itself.
    double draftSeconds = 0;
    double verifySeconds = 0;
    // By position in the draft, from its first token on: how often a token was drafted there after only correct ones, and
    // how often it was correct itself.
    std::vector<int64_t> drafted;
    std::vector<int64_t> accepted;
    // Rows that skippable branches ran on, and rows that the keep rule decided on, in all layers that the model itself ran.
    int64_t keptRows = 0;
    int64_t gatedRows = 0;
    // The same of the new tokens alone whose budget was held; drafted tokens that were wrong do not count.
    int64_t heldKeptRows = 0;
    int64_t heldGatedRows = 0;

    // Share of (token, branch) pairs kept; unset without a keep rule.
    std::optional<double> keptShare() const;
    // The same of new tokens alone; unset where no budget was held.
    std::optional<double> heldShare() const;
    // New tokens after the first of each sequence, divided by the time that they took.
    std::optional<double> decodeTokensPerSecond() const;
    // New tokens of a sequence per round; above 1 where drafts were accepted.
    std::optional<double> tokensPerVerification() const;
    // Probability that a drafted token is correct, given that those before it are.
    std::optional<double> acceptance() const;
};

// The result of one sequence: its new tokens, why it ended, and the tokens' log-probabilities, if wanted.
struct Generated {
    Tokens tokens;
    FinishReason finish = FinishReason::kLength;
    std::vector<TokenLogprobs> logprobs;
};

// All sequences, in the order of the prompts, and the counters.
struct Generation {
    std::vector<Generated> sequences;
    GenerationStats stats;
};

}  // namespace gsx
