// Runners make whole steps of stages: one stage, or two with the exit between them. As gsx_engines/runners.

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
    // Tokens of each sequence that fit.
    int64_t capacity;
    // Tokens of each that the cache holds; and those that have been through all layers, fewer between a draft of a split
    // runner and its verification.
    Counts lengths;
    Counts verified;
    // Of each stage.
    std::vector<StageMemory> memory;
    // Of a split runner: the calls whose exit states the later layers have not seen.
    std::vector<std::pair<Call, ExitState>> waiting;

    // Forget what lies behind these lengths.
    void rollBack(Counts const& to);
};

// What one call gives a loop.
struct StepOutput {
    Array<float> logits;
    KeptTable kept;
    // Rows that the keep rule judged in this call, one a token and skippable branch.
    int64_t gatedRows = 0;
};

class Runner {
public:
    Runner() = default;
    Runner(Runner const&) = delete;
    Runner& operator=(Runner const&) = delete;
    virtual ~Runner() = default;

    virtual Manifest const& manifest() const = 0;

    // Room for `batch` sequences of up to `capacity` tokens, empty.
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
    Cache newCache(int64_t batch, int64_t capacity) override;
    StepOutput step(Cache& cache, Array<int64_t> ids, Counts counts, std::shared_ptr<Controls const> controls,
                    Logits logits) override;

private:
    std::unique_ptr<Stage> mStage;
};

// Runs the engines of the layers below an exit and of the others. Both share one cache: the exit states of drafted tokens
// wait in it until the later layers run on them, so that no layer runs twice on a token that stays.
class SplitRunner final : public Runner {
public:
    SplitRunner(std::unique_ptr<Stage> early, std::unique_ptr<Stage> late)
        : mEarly(std::move(early)), mLate(std::move(late)) {}

    // Number of layers that the draft runs.
    int64_t exitLayer() const { return mEarly->layers().last; }

    Manifest const& manifest() const override { return mEarly->manifest(); }
    Cache newCache(int64_t batch, int64_t capacity) override;
    // A draft without logits, and its verification.
    StepOutput step(Cache& cache, Array<int64_t> ids, Counts counts, std::shared_ptr<Controls const> controls,
                    Logits logits) override;

    // Run the early layers alone; the logits are the exit's.
    StepOutput draft(Cache& cache, Array<int64_t> ids, Counts counts, std::shared_ptr<Controls const> controls,
                     Logits logits);

    // Run the later layers on all tokens that were drafted since the last verification and not rolled back; S of the
    // logits is the largest number of such tokens of a sequence.
    StepOutput verify(Cache& cache, Logits logits);

private:
    std::unique_ptr<Stage> mEarly;
    std::unique_ptr<Stage> mLate;
};

// The output of both halves on the same tokens: the later one's logits.
StepOutput joinedOutput(StepOutput early, StepOutput late);

}  // namespace gsx
