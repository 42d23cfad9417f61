#include "draft_length.h"

#include <algorithm>
#include <cmath>

namespace gsx {
namespace {

// gsx_engines/speculation/length.py explains each of these numbers.
constexpr int64_t kLongest = 16;
constexpr int64_t kFirstLength = 4;
constexpr double kFirstAcceptance = 0.7;
constexpr double kPriorTrials = 4;
constexpr double kDecay = 0.95;
constexpr int64_t kProbeEvery = 32;
constexpr double kFirstPlain = 3;
constexpr double kRowCost = 0.05;
constexpr double kLeastSpread = 0.05;

}  // namespace

AdaptiveLength::AdaptiveLength(std::optional<int64_t> first)
    : mFirst(first.value_or(kFirstLength)),
      mAccepted(kFirstAcceptance * kPriorTrials),
      mTrials(kPriorTrials),
      mConfidence(kFirstAcceptance * kPriorTrials) {}

int64_t AdaptiveLength::next() {
    ++mRounds;
    if (mDraft.weight == 0) return mFirst;
    if (mPlain.weight < kFirstPlain - 0.5) return mRounds % 2 == 0 ? 0 : kLongest;  // weights decay a little
    bool const wins = tokenSeconds() <= mPlain.mean();
    bool const probes = mRounds % kProbeEvery == 0;
    return wins != probes ? kLongest : 0;
}

bool AdaptiveLength::goesOn(int64_t drafted, double confidence) const {
    if (mDraft.weight == 0) return drafted < mFirst;
    // Each token's confidence is corrected by one factor, so the product of several confidences by a power of it.
    double const corrected =
        confidence * std::pow(mAccepted / std::max(mConfidence, 1e-9), static_cast<double>(drafted));
    return std::min(1.0, corrected) * acceptance() * tokenSeconds() > mDraft.mean() + mVerify.slope();
}

void AdaptiveLength::learn(Round const& one) {
    mVerify.add(static_cast<double>(one.length + 1), one.verifySeconds);
    if (one.length == 0) {
        mPlain.add(one.verifySeconds);
        return;
    }
    mDraft.add(one.draftSeconds / static_cast<double>(one.length));
    mSeconds.add(one.draftSeconds + one.verifySeconds);
    mTokens.add(one.tokens);
    mAccepted = kDecay * mAccepted + static_cast<double>(one.accepted);
    mTrials = kDecay * mTrials + static_cast<double>(one.accepted) + static_cast<double>(one.rejected);
    mConfidence = kDecay * mConfidence + one.confidence;
}

void AdaptiveLength::Mean::add(double value) {
    weight = kDecay * weight + 1;
    total = kDecay * total + value;
}

void AdaptiveLength::Line::add(double newX, double newY) {
    weight = kDecay * weight + 1;
    x = kDecay * x + newX;
    y = kDecay * y + newY;
    xx = kDecay * xx + newX * newX;
    xy = kDecay * xy + newX * newY;
}

double AdaptiveLength::Line::slope() const {
    double const meanX = x / weight;
    double const meanY = y / weight;
    double const spread = xx / weight - meanX * meanX;
    double const guess = kRowCost * meanY / (1 + kRowCost * (meanX - 1));
    double const found = spread > kLeastSpread ? (xy / weight - meanX * meanY) / spread : guess;
    return std::min(std::max(found, 0.0), meanY / meanX);
}

}  // namespace gsx
