// Drafts: cheap ways to guess the next tokens with the model's own weights. As gsx_engines/speculation.

#pragma once

#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "runner.h"

namespace gsx {

// Guesses tokens, and lets the whole model look at them.
class Draft {
public:
    virtual ~Draft() = default;

    // What the graphs are given for this draft, where it differs from what the model is given.
    virtual void begin(std::shared_ptr<Controls const> controls) = 0;

    // Read one more token (or none) of each sequence, ids [B, 1]; kept rows where the model itself would have kept them.
    virtual StepOutput step(Cache& cache, Array<int64_t> ids, Counts counts) = 0;

    // Run the whole model on tokens, ids [B, S], of which `step` has read all but each sequence's last. `start` are the
    // cache's lengths before them. Gives all logits; the cache then holds the tokens.
    virtual StepOutput verify(Cache& cache, Counts const& start, Array<int64_t> ids, Counts counts) = 0;
};

// The layers below an exit draft; verification runs the others, on the states that the draft left.
class EarlyExit final : public Draft {
public:
    explicit EarlyExit(SplitRunner& runner) : mRunner(runner) {}
    void begin(std::shared_ptr<Controls const> controls) override { mControls = std::move(controls); }
    StepOutput step(Cache& cache, Array<int64_t> ids, Counts counts) override;
    StepOutput verify(Cache& cache, Counts const& start, Array<int64_t> ids, Counts counts) override;

private:
    SplitRunner& mRunner;
    std::shared_ptr<Controls const> mControls;
};

// The whole depth with other run-time inputs drafts: fewer tokens pass the gates, or some branches do not run. The K/V of
// drafted tokens are the draft's; verification computes them anew.
class OtherControls final : public Draft {
public:
    OtherControls(Runner& runner, DraftKind kind) : mRunner(runner), mKind(std::move(kind)) {}
    void begin(std::shared_ptr<Controls const> controls) override;
    StepOutput step(Cache& cache, Array<int64_t> ids, Counts counts) override;
    StepOutput verify(Cache& cache, Counts const& start, Array<int64_t> ids, Counts counts) override;

private:
    Runner& mRunner;
    DraftKind mKind;
    std::shared_ptr<Controls const> mControls;
    std::shared_ptr<Controls const> mDraftControls;
};

// Read a draft: `exit:E`, `budget:B`, or `layers:SET` such as `layers:3.attn,5-7`. Throws UsageError.
DraftKind parseDraft(std::string const& text);

// Refuse a draft that a bundle does not have. Throws UsageError.
void checkDraft(DraftKind const& draft, Manifest const& manifest);

}  // namespace gsx
