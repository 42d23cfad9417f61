// What a caller asks of a generation, and what comes back.

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

// Called with (sequence, token) for every new token, as soon as it is chosen; returns whether the sequence is to end
// here (finish "stopped").
using OnToken = std::function<bool(size_t, int64_t)>;

// What a request keeps; what it leaves open is as exported. At most one is given.
struct Keep {
    // Share of skippable work, with rules that have thresholds.
    std::optional<double> budget;
    // The branches that run, such as `0-3,6,8.attn`, with rules that read a layer mask. So do the others:
    std::optional<std::string> layers;
    // How many layers run.
    std::optional<int64_t> exit;
    // Target of Unified Layer Skipping: the prompt runs in full, new tokens through the kept layers.
    std::optional<double> speedup;
    // Confidence at which a token leaves, with rules that measure it; infinity: none leaves.
    std::optional<double> exitThreshold;
};

struct Options {
    // Of each sequence; the model's context may end it earlier.
    int64_t maxNewTokens = 128;
    // Of all prompts, or one for each; empty: all as exported. One batch has one budget, and one exit threshold.
    std::vector<Keep> keep;
    Sampling sampling;
    // Tokens that end a sequence, and are kept in it; none for the model's end-of-text.
    std::optional<Tokens> stopIds;
    // Tokens drafted at once, 0 for plain decoding; none to find it while generating.
    std::optional<int64_t> draftLength;
    OnToken onToken;
};

// Counters of one generation, over all sequences.
struct GenerationStats {
    int64_t promptTokens = 0;
    int64_t newTokens = 0;
    int64_t sequences = 0;
    // Until the first tokens are chosen; all later rounds.
    double prefillSeconds = 0;
    double decodeSeconds = 0;
    // Rounds after the first call: each has one verification, or one plain step.
    int64_t decodeSteps = 0;
    // Parts of decodeSeconds: in draft steps; in verifications and plain steps. What is left is the loop's own.
    double draftSeconds = 0;
    double verifySeconds = 0;
    // By place in the draft, its first token first: how often a token stood there with none but right ones before it,
    // and how often it was right.
    std::vector<int64_t> drafted;
    std::vector<int64_t> accepted;
    // Rows that skippable branches ran on, and rows that the keep rule judged, in all layers that the model itself ran.
    int64_t keptRows = 0;
    int64_t gatedRows = 0;

    // Share of (token, branch) pairs kept; none without a keep rule.
    std::optional<double> keptShare() const;
    // New tokens after the first of each sequence, by the time that they took.
    std::optional<double> decodeTokensPerSecond() const;
    // New tokens of a sequence for each round; above 1 where a draft was right.
    std::optional<double> tokensPerVerification() const;
    // Chance of a drafted token to be right, if the ones before it are.
    std::optional<double> acceptance() const;
};

// One sequence's result: the new tokens, and why it ended.
struct Generated {
    Tokens tokens;
    FinishReason finish = FinishReason::kLength;
};

// All sequences, in the order of the prompts, and the counters.
struct Generation {
    std::vector<Generated> sequences;
    GenerationStats stats;
};

}  // namespace gsx
