// Drafts: cheap ways to guess the next tokens with the model's own weights. As in gsx_engines/speculation.

#pragma once

#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "runner.h"

namespace gsx {

// Guesses tokens, and has the whole model verify them.
class Draft {
public:
    virtual ~Draft() = default;

    // Begin a request, or a part of one, whose run-time inputs are `controls`.
    virtual void begin(std::shared_ptr<Controls const> controls) = 0;

    // Read one more token (or none) of each sequence, ids [B, 1]. Kept rows are counted only if the model itself would have
    // kept them as well.
    virtual StepOutput step(Cache& cache, Array<int64_t> ids, Counts counts) = 0;

    // Run the whole model on tokens, ids [B, S], of which `step` has read all but the last of each sequence. `start` is the
    // cache's lengths before them. Returns all logits; afterwards the cache holds the tokens.
    virtual StepOutput verify(Cache& cache, Counts const& start, Array<int64_t> ids, Counts counts) = 0;
};

// Drafts with the layers below an exit; verification runs the other layers on the states that the draft left in the cache.
class EarlyExitDraft final : public Draft {
public:
    explicit EarlyExitDraft(SplitRunner& runner) : mRunner(runner) {}
    void begin(std::shared_ptr<Controls const> controls) override { mControls = std::move(controls); }
    StepOutput step(Cache& cache, Array<int64_t> ids, Counts counts) override;
    StepOutput verify(Cache& cache, Counts const& start, Array<int64_t> ids, Counts counts) override;

private:
    SplitRunner& mRunner;
    std::shared_ptr<Controls const> mControls;
};

// Drafts with all layers but cheaper run-time inputs: fewer tokens pass the gates, or some branches do not run. The K/V of
// drafted tokens are the draft's; verification computes them again.
class FullDepthDraft final : public Draft {
public:
    FullDepthDraft(Runner& runner, DraftKind kind) : mRunner(runner), mKind(std::move(kind)) {}
    void begin(std::shared_ptr<Controls const> controls) override;
    StepOutput step(Cache& cache, Array<int64_t> ids, Counts counts) override;
    StepOutput verify(Cache& cache, Counts const& start, Array<int64_t> ids, Counts counts) override;

private:
    Runner& mRunner;
    DraftKind mKind;
    std::shared_ptr<Controls const> mControls;
    std::shared_ptr<Controls const> mDraftControls;
};

// Parse a draft: `exit:E`, `budget:B`, or `layers:SET` such as `layers:3.attn,5-7`. Throws UsageError.
DraftKind parseDraft(std::string const& text);

// Refuse a draft that the bundle does not support. Throws UsageError.
void checkDraft(DraftKind const& draft, Manifest const& manifest);

}  // namespace gsx
