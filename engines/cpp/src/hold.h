// A budget that holds: the thresholds of a sequence's new tokens move along the calibrated grid. As in
// gsx_engines/bundle/hold.py, in the same whole numbers; docs/design.md, section 3, has the rule.

#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "gsx/generation.h"
#include "stage.h"

namespace gsx {

// The controller of one sequence.
class Hold {
public:
    // `branches`: how many branches of the model may be skipped.
    Hold(Selection const& selection, double budget, int64_t branches);

    // How many more tokens have the thresholds of now, from 1 on.
    int64_t leftInBlock() const;
    // The budget whose calibrated thresholds apply now.
    double setting() const;
    // The thresholds that apply now.
    Thresholds thresholds() const { return mSelection->thresholdsFor(setting()); }
    // Count a new token that the model has read and that stays; `kept`: how many branches it ran. Returns whether the
    // thresholds of the next token may be others.
    bool read(int64_t kept);

    int64_t kept() const { return mKept; }
    // Rows that the keep rule decided on.
    int64_t gated() const { return mTokens * mBranches; }

private:
    int64_t next() const;

    Selection const* mSelection;
    double mBudget;
    int64_t mBranches;
    int64_t mTokens = 0;
    int64_t mKept = 0;
    // In millionths: the setting of now, and the sum of all so far.
    int64_t mSetting;
    int64_t mSum;
};

// The controller for a request; unset if it does not ask for one. Its settings were checked by controlsFor.
std::optional<Hold> holdOf(Manifest const& manifest, Keep const& keep);

// Run-time inputs with the thresholds that apply now; of each sequence its controller, null where they stay.
std::shared_ptr<Controls const> withThresholds(Controls const& controls, std::vector<Hold const*> const& holds);

}  // namespace gsx
