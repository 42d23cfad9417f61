// Runners make whole steps out of one stage, or of two with the exit between them. As in gsx_engines/runners.

#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "stage.h"

namespace gsx {

// K/V of a batch of sequences.
struct Cache {
    int64_t batch;
    // Tokens that fit, for each sequence.
    int64_t capacity;
    // Tokens that the cache holds for each sequence, and how many of them have been through all layers; these are fewer
    // while drafted tokens of a split runner wait for verification.
    Counts lengths;
    Counts verified;
    // The memory of each stage.
    std::vector<StageMemory> memory;
    // In a split runner: the calls whose exit states the later layers have not processed yet.
    std::vector<std::pair<Call, ExitState>> waiting;
    // Of these calls, how many of the early layers' branches kept each token, [B, S]; empty if the engine does not tell.
    std::vector<Array<int64_t>> waitingKept;

    // Forget all tokens beyond these lengths.
    void rollBack(Counts const& to);
};

// The result of one call, as the decoding loop sees it.
struct StepOutput {
    // As in StageOutput.
    Array<float> logits;
    std::shared_ptr<LikelyLogits const> likely;
    KeptTable kept;
    // Rows that the keep rule decided on in this call: one for each token and skippable branch.
    int64_t gatedRows = 0;
    // [B, S], how many branches kept each token; empty if the engines do not tell.
    Array<int64_t> keptByToken;
};

class Runner {
public:
    Runner() = default;
    Runner(Runner const&) = delete;
    Runner& operator=(Runner const&) = delete;
    virtual ~Runner() = default;

    virtual Manifest const& manifest() const = 0;

    // Whether its outputs tell how many branches kept each token.
    virtual bool countsTokens() const = 0;

    // An empty cache for `batch` sequences of up to `capacity` tokens.
    virtual Cache newCache(int64_t batch, int64_t capacity) = 0;

    // Run tokens of every sequence, ids [B, S], and append their K/V to the cache, whose lengths grow by `counts`.
    virtual StepOutput step(Cache& cache, Array<int64_t> ids, Counts counts, std::shared_ptr<Controls const> controls,
                            Logits logits) = 0;
};

// Runs the engine of all layers.
class WholeRunner final : public Runner {
public:
    explicit WholeRunner(std::unique_ptr<Stage> stage) : mStage(std::move(stage)) {}

    Manifest const& manifest() const override { return mStage->manifest(); }
    bool countsTokens() const override { return mStage->countsTokens(); }
    Cache newCache(int64_t batch, int64_t capacity) override;
    StepOutput step(Cache& cache, Array<int64_t> ids, Counts counts, std::shared_ptr<Controls const> controls,
                    Logits logits) override;

private:
    std::unique_ptr<Stage> mStage;
};

// Runs two engines: the layers below an exit, and the others. Both share one cache. The exit states of drafted tokens wait
// in it until the later layers run on them, so no layer runs twice on an accepted token.
class SplitRunner final : public Runner {
public:
    SplitRunner(std::unique_ptr<Stage> early, std::unique_ptr<Stage> late)
        : mEarly(std::move(early)), mLate(std::move(late)) {}

    // How many layers the draft runs.
    int64_t exitLayer() const { return mEarly->layers().last; }

    Manifest const& manifest() const override { return mEarly->manifest(); }
    bool countsTokens() const override { return mEarly->countsTokens() && mLate->countsTokens(); }
    Cache newCache(int64_t batch, int64_t capacity) override;
    // A draft without logits, then its verification.
    StepOutput step(Cache& cache, Array<int64_t> ids, Counts counts, std::shared_ptr<Controls const> controls,
                    Logits logits) override;

    // Run only the early layers; the logits are those at the exit.
    StepOutput draft(Cache& cache, Array<int64_t> ids, Counts counts, std::shared_ptr<Controls const> controls,
                     Logits logits);

    // Run the later layers on all tokens that were drafted since the last verification and not rolled back. S of the
    // logits is the largest number of such tokens in any sequence. Of the kept rows, those by token are of all layers.
    StepOutput verify(Cache& cache, Logits logits);

private:
    std::unique_ptr<Stage> mEarly;
    std::unique_ptr<Stage> mLate;
};

// The outputs of both halves as one, with the logits and the kept rows by token of the later half.
StepOutput joinedOutput(StepOutput early, StepOutput late);

}  // namespace gsx
