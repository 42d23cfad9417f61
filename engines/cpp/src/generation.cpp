#include "gsx/generation.h"

#include <numeric>

namespace gsx {

char const* nameOf(FinishReason reason) noexcept {
    switch (reason) {
    case FinishReason::kEndOfText: return "end-of-text";
    case FinishReason::kLength: return "length";
    case FinishReason::kContext: return "context";
    case FinishReason::kStopped: return "stopped";
    }
    return "";
}

std::optional<double> GenerationStats::keptShare() const {
    if (gatedRows == 0) return std::nullopt;
    return static_cast<double>(keptRows) / static_cast<double>(gatedRows);
}

std::optional<double> GenerationStats::heldShare() const {
    if (heldGatedRows == 0) return std::nullopt;
    return static_cast<double>(heldKeptRows) / static_cast<double>(heldGatedRows);
}

std::optional<double> GenerationStats::decodeTokensPerSecond() const {
    if (decodeSeconds == 0) return std::nullopt;
    return static_cast<double>(newTokens - sequences) / decodeSeconds;
}

std::optional<double> GenerationStats::tokensPerVerification() const {
    if (decodeSteps == 0) return std::nullopt;
    return static_cast<double>(newTokens - sequences) / static_cast<double>(sequences) / static_cast<double>(decodeSteps);
}

std::optional<double> GenerationStats::acceptance() const {
    int64_t const tries = std::accumulate(drafted.begin(), drafted.end(), int64_t{0});
    if (tries == 0) return std::nullopt;
    return static_cast<double>(std::accumulate(accepted.begin(), accepted.end(), int64_t{0})) / static_cast<double>(tries);
}

}  // namespace gsx
