// How far to draft: the rule of gsx_engines/speculation/length.py.

#pragma once

#include <cstdint>
#include <optional>

namespace gsx {

// What one round of drafting and verifying gave, over all sequences.
struct Round {
    // Tokens drafted, of the sequence with the most.
    int64_t length;
    // New tokens of a sequence, on average.
    double tokens;
    // Drafted tokens that were right; sequences of which one was wrong.
    int64_t accepted;
    int64_t rejected;
    // Of the drafted tokens that were judged, summed up.
    double confidence;
    double draftSeconds;
    double verifySeconds;
};

// Decides how far each round drafts.
class DraftLength {
public:
    virtual ~DraftLength() = default;
    // The most tokens to draft in the next round; 0 for a plain step.
    virtual int64_t next() = 0;
    // Whether a sequence that has drafted so many tokens, all right with this chance, drafts another one.
    virtual bool goesOn(int64_t drafted, double confidence) const = 0;
    // Take in a finished round.
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

// Drafts on as long as another token is likely to save more time than it takes, by measured acceptance and cost.
class AdaptiveLength final : public DraftLength {
public:
    // `first` is the length of the first rounds; none for the rule's own.
    explicit AdaptiveLength(std::optional<int64_t> first = std::nullopt);
    int64_t next() override;
    bool goesOn(int64_t drafted, double confidence) const override;
    void learn(Round const& one) override;

    // The measured chance that a drafted token is right, if the ones before it are.
    double acceptance() const { return mAccepted / mTrials; }

private:
    // Old values count less and less.
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
        // Never below 0, nor so steep that y(0) is below 0: that is noise.
        double slope() const;
    };

    // What a token takes in rounds with a draft.
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
