// How many tokens to draft: the rule of gsx_engines/speculation/length.py.

#pragma once

#include <cstdint>
#include <optional>

namespace gsx {

// The result of one round of drafting and verifying, over all sequences.
struct Round {
    // Tokens drafted for the sequence with the most.
    int64_t length;
    // New tokens per sequence, on average.
    double tokens;
    // Drafted tokens that were correct, and sequences with a wrong one.
    int64_t accepted;
    int64_t rejected;
    // Sum of the draft's confidences in the tokens that were verified.
    double confidence;
    double draftSeconds;
    double verifySeconds;
};

// Decides how many tokens each round drafts.
class DraftLength {
public:
    virtual ~DraftLength() = default;
    // The most tokens to draft in the next round; 0 for a plain step.
    virtual int64_t next() = 0;
    // Whether a sequence drafts another token. `drafted`: how many it has drafted in this round; `confidence`: the draft's
    // own probability that all of them are correct.
    virtual bool goesOn(int64_t drafted, double confidence) const = 0;
    // Take a finished round into account.
    virtual void learn(Round const& one) = 0;
};

// Always the same draft length.
class FixedLength final : public DraftLength {
public:
    explicit FixedLength(int64_t length) : mLength(length) {}
    int64_t next() override { return mLength; }
    bool goesOn(int64_t, double) const override { return true; }
    void learn(Round const&) override {}

private:
    int64_t mLength;
};

// Keeps drafting as long as another token is expected to save more time than it costs, by measured acceptance and cost.
class AdaptiveLength final : public DraftLength {
public:
    // `first` is the length of the first rounds; unset: the rule's own.
    explicit AdaptiveLength(std::optional<int64_t> first = std::nullopt);
    int64_t next() override;
    bool goesOn(int64_t drafted, double confidence) const override;
    void learn(Round const& one) override;

    // The measured probability that a drafted token is correct, given that those before it are.
    double acceptance() const { return mAccepted / mTrials; }

private:
    // Mean with decaying weights.
    struct Mean {
        double weight = 0;
        double total = 0;
        void add(double value);
        double mean() const { return total / weight; }
    };

    // Least squares of y over x with decaying weights.
    struct Line {
        double weight = 0;
        double x = 0;
        double y = 0;
        double xx = 0;
        double xy = 0;
        void add(double newX, double newY);
        // Limited to what is plausible: not below 0, nor so steep that y(0) would be below 0.
        double slope() const;
    };

    // Seconds per token in rounds with a draft.
    double tokenSeconds() const { return mSeconds.total / mTokens.total; }

    int64_t mFirst;
    Mean mDraft;
    Line mVerify;
    Mean mSeconds;
    Mean mTokens;
    Mean mPlain;
    double mAccepted;
    double mTrials;
    double mConfidence;
    int64_t mRounds = 0;
};

}  // namespace gsx
