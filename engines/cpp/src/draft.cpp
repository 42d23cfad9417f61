#include "draft.h"

#include <algorithm>
#include <charconv>
#include <limits>
#include <set>

#include "controls.h"
#include "gsx/error.h"
#include "tensor_names.h"
#include "text.h"

namespace gsx {
namespace {

[[noreturn]] void refuse(std::string const& text) {
    throw UsageError("'" + text + "' is not a draft",
                     {"exit:E (layers), budget:B (a share), layers:SET (e.g. 3.attn,5-7), or loops:N", "'" + text + "'", {}});
}

template <typename T>
std::optional<T> numberOf(std::string const& text) {
    T number{};
    auto const [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
    return error == std::errc() && end == text.data() + text.size() && !text.empty() ? std::optional(number) : std::nullopt;
}

// Refuse a draft for a model whose keep rule has nothing that such a draft could change.
[[noreturn]] void refuseOther(DraftKind const& draft, std::string const& needs) {
    bool const budget = std::holds_alternative<BudgetDraft>(draft);
    std::string const name = toString(draft);
    std::string const sets = budget ? "" : ", or --policy layers with " + name;
    std::string const also = budget ? "" : ", or with --policy layers --draft " + name;
    throw UsageError("the draft " + name + " needs " + needs + ", and this model has none",
                     {"exit:E" + sets, {}, "export with --draft exit:E" + also});
}

void checkExit(ExitDraft const& draft, Manifest const& manifest) {
    int64_t const layers = manifest.decoder.numLayers;
    if (draft.layer < 1 || draft.layer >= layers) {
        throw UsageError("the exit is not between two of the model's " + std::to_string(layers) + " layers",
                         {"1 to " + std::to_string(layers - 1), std::to_string(draft.layer), {}});
    }
    if (manifest.draft && manifest.draft->draft == DraftKind(draft)) return;
    std::string const own = manifest.draft ? toString(manifest.draft->draft) : "none";
    bool const splits = manifest.draft && std::holds_alternative<ExitDraft>(manifest.draft->draft);
    throw UsageError("this bundle cannot draft with " + toString(draft),
                     {splits ? "its own: " + own : "graphs that are split at an exit", own,
                      "export again with --draft " + toString(draft)});
}

void checkLayers(LayersDraft const& draft, Manifest const& manifest) {
    std::vector<Place> const places = manifest.skippablePlaces(0, manifest.decoder.numLayers);
    std::set<Place> const skippable(places.begin(), places.end());
    std::set<Place> const skipped(draft.skip.begin(), draft.skip.end());
    std::vector<std::string> unknown;
    for (auto const& [layer, branch] : skipped) {
        if (skippable.count({layer, branch}) == 0) unknown.push_back(std::to_string(layer) + "." + nameOf(branch));
    }
    if (unknown.empty() && skipped.size() < skippable.size()) return;
    std::vector<std::string> branches;
    for (Branch const branch : manifest.policy->branches) branches.emplace_back(nameOf(branch));
    throw UsageError("the draft " + toString(draft) + " leaves out branches that it cannot",
                     {"some, but not all, of the skippable branches of layers 0 to " +
                          std::to_string(manifest.decoder.numLayers - 1) + ": " + joinedBy(", ", branches),
                      unknown.empty() ? "all of them" : joinedBy(", ", unknown), {}});
}

void checkLoops(LoopsDraft const& draft, Manifest const& manifest) {
    bool const reads = manifest.policy && manifest.policy->input(names::kLoops) != nullptr;
    if (!reads) {
        throw UsageError("the draft " + toString(draft) + " needs a keep rule that reads the number of loops",
                         {"a looped model, exported with --policy loops", "a model without", {}});
    }
    int64_t const most = manifest.decoder.loops->most;
    if (draft.loops >= most) {
        throw UsageError("the draft " + toString(draft) + " is not one with fewer loops than the model",
                         {most > 1 ? "1 to " + std::to_string(most - 1) : "a model with several loops",
                          std::to_string(draft.loops), {}});
    }
}

}  // namespace

StepOutput EarlyExitDraft::step(Cache& cache, Array<int64_t> ids, Counts counts) {
    return mRunner.draft(cache, std::move(ids), std::move(counts), mControls, Logits::kLast);
}

StepOutput EarlyExitDraft::verify(Cache& cache, Counts const&, Array<int64_t> ids, Counts counts) {
    // The last token has to run through the early layers first.
    Array<int64_t> last({ids.shape[0], 1});
    for (int64_t row = 0; row < ids.shape[0]; ++row) {
        int64_t& count = counts[static_cast<size_t>(row)];
        last.data[static_cast<size_t>(row)] =
            ids.data[static_cast<size_t>(row * ids.shape[1] + std::max<int64_t>(count - 1, 0))];
        count = std::min<int64_t>(count, 1);
    }
    StepOutput early = mRunner.draft(cache, std::move(last), std::move(counts), mControls, Logits::kNone);
    return joinedOutput(std::move(early), mRunner.verify(cache, Logits::kAll));
}

void FullDepthDraft::begin(std::shared_ptr<Controls const> controls) {
    mControls = std::move(controls);
    auto made = std::make_shared<Controls>(*mControls);
    if (auto const* budget = std::get_if<BudgetDraft>(&mKind)) {
        setBudget(*made, *mRunner.manifest().selection, budget->budget);
    } else if (auto const* loops = std::get_if<LoopsDraft>(&mKind)) {  // of a request that asks for fewer, its own number
        for (int64_t& count : std::get<Array<int64_t>>(made->at(names::kLoops)).data) count = std::min(count, loops->loops);
    } else {
        // A branch that is left out has 0 in the layer mask, or plus infinity as its threshold.
        bool const masked = made->count(names::kLayerMask) != 0;
        auto& array = std::get<Array<float>>(made->at(masked ? names::kLayerMask : names::kThresholds));
        auto const table = static_cast<size_t>(mRunner.manifest().decoder.numLayers) * kBranches;
        for (size_t row = 0; row < array.data.size(); row += table) {
            for (auto const& [layer, branch] : std::get<LayersDraft>(mKind).skip) {
                array.data[row + static_cast<size_t>(layer) * kBranches + static_cast<size_t>(branch)] =
                    masked ? 0 : std::numeric_limits<float>::infinity();
            }
        }
    }
    mDraftControls = std::move(made);
}

StepOutput FullDepthDraft::step(Cache& cache, Array<int64_t> ids, Counts counts) {
    StepOutput output = mRunner.step(cache, std::move(ids), std::move(counts), mDraftControls, Logits::kLast);
    return {std::move(output.logits), std::move(output.likely), {}, 0, {}};
}

StepOutput FullDepthDraft::verify(Cache& cache, Counts const& start, Array<int64_t> ids, Counts counts) {
    cache.rollBack(start);
    return mRunner.step(cache, std::move(ids), std::move(counts), mControls, Logits::kAll);
}

DraftKind parseDraft(std::string const& text) {
    size_t const colon = text.find(':');
    if (colon == std::string::npos) refuse(text);
    std::string const kind = text.substr(0, colon);
    std::string const value = text.substr(colon + 1);
    if (kind == "exit") {
        if (std::optional<int64_t> const layer = numberOf<int64_t>(value)) return ExitDraft{*layer};
    } else if (kind == "budget") {
        if (std::optional<double> const budget = numberOf<double>(value)) {
            checkBudget(*budget);
            return BudgetDraft{*budget};
        }
    } else if (kind == "loops") {
        std::optional<int64_t> const loops = numberOf<int64_t>(value);
        if (loops && *loops >= 1) return LoopsDraft{*loops};
    } else if (kind == "layers") {
        if (std::optional<std::vector<Place>> const places = parsePlaces(value)) return LayersDraft{*places};
    }
    refuse(text);
}

void checkDraft(DraftKind const& draft, Manifest const& manifest) {
    if (manifest.selection && manifest.selection->mode == SelectionMode::kRank) {
        throw UsageError("speculation needs selection by threshold",
                         {{},
                          "rank: whether a token is kept depends on the other tokens of the call, including drafted ones",
                          "export with --select threshold, or decode plainly (no --draft; --no-speculative)"});
    }
    if (manifest.decoder.loops && manifest.decoder.loops->shareCaches) {
        throw UsageError("speculation needs a model whose loops have caches of their own",
                         {"recurrent_kv_cache_mode per_loop",
                          "last_loop: in all loops but the last, what a token sees of another depends on whether both are "
                          "in a call",
                          "decode plainly (no --draft; --no-speculative)"});
    }
    if (auto const* exit = std::get_if<ExitDraft>(&draft)) {
        checkExit(*exit, manifest);
    } else if (auto const* budget = std::get_if<BudgetDraft>(&draft)) {
        if (!manifest.selection) refuseOther(draft, "thresholds");
        manifest.selection->thresholdsFor(budget->budget);
    } else if (auto const* loops = std::get_if<LoopsDraft>(&draft)) {
        checkLoops(*loops, manifest);
    } else {
        bool const skips =
            manifest.policy &&
            (manifest.policy->name == "gateskip" || manifest.policy->input(names::kLayerMask) != nullptr);
        if (!skips) refuseOther(draft, "gates, or --policy layers");
        checkLayers(std::get<LayersDraft>(draft), manifest);
    }
}

}  // namespace gsx
