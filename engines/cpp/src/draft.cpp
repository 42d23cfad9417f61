#include "draft.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>
#include <set>
#include <sstream>

#include "gsx/error.h"
#include "text.h"

namespace gsx {
namespace {

constexpr int64_t kMostLayers = 10'000;
constexpr char const* kThresholds = "thresholds";
constexpr char const* kBudget = "budget";

Array<float> arrayOf(Thresholds const& thresholds) {
    Array<float> array({static_cast<int64_t>(thresholds.size()), kBranches});
    for (size_t layer = 0; layer < thresholds.size(); ++layer) {
        for (size_t branch = 0; branch < kBranches; ++branch) {
            array.data[layer * kBranches + branch] = thresholds[layer][branch];
        }
    }
    return array;
}

[[noreturn]] void refuse(std::string const& text) {
    throw UsageError("'" + text + "' is not a draft",
                     {"exit:E (layers), budget:B (a share), or layers:SET (e.g. 3.attn,5-7)", "'" + text + "'", {}});
}

template <typename T>
std::optional<T> numberOf(std::string const& text) {
    T number{};
    auto const [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
    return error == std::errc() && end == text.data() + text.size() && !text.empty() ? std::optional(number) : std::nullopt;
}

// `5` for both branches of layer 5, `5.mlp` for one, `5-7` for a range; false where it is none of these.
bool addPlaces(std::string const& part, std::vector<Place>& places) {
    size_t const dot = part.find('.');
    std::string const branches = dot == std::string::npos ? "" : part.substr(dot + 1);
    std::string const range = part.substr(0, dot);
    size_t const dash = range.find('-');
    std::optional<int64_t> const first = numberOf<int64_t>(range.substr(0, dash));
    std::optional<int64_t> const last = dash == std::string::npos ? first : numberOf<int64_t>(range.substr(dash + 1));
    if (!first || !last || *first < 0 || *last < *first || *last > kMostLayers) return false;
    size_t const before = places.size();
    for (int64_t layer = *first; layer <= *last; ++layer) {
        for (Branch const branch : {Branch::kAttention, Branch::kMlp}) {
            if (dot == std::string::npos || branches == nameOf(branch)) places.emplace_back(layer, branch);
        }
    }
    return places.size() > before;
}

void checkExit(ExitDraft const& draft, Manifest const& manifest) {
    int64_t const layers = manifest.decoder.numLayers;
    if (draft.layer < 1 || draft.layer >= layers) {
        throw UsageError("the exit layer is not inside the model's " + std::to_string(layers),
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
    std::set<Place> gated;
    for (int64_t layer = 0; layer < manifest.decoder.numLayers; ++layer) {
        for (Branch const branch : manifest.gatedBranches) gated.emplace(layer, branch);
    }
    std::set<Place> const skipped(draft.skip.begin(), draft.skip.end());
    std::vector<std::string> unknown;
    for (auto const& [layer, branch] : skipped) {
        if (gated.count({layer, branch}) == 0) unknown.push_back(std::to_string(layer) + "." + nameOf(branch));
    }
    if (unknown.empty() && skipped.size() < gated.size()) return;
    std::vector<std::string> branches;
    for (Branch const branch : manifest.gatedBranches) branches.emplace_back(nameOf(branch));
    throw UsageError(toString(draft) + " cannot be left out",
                     {"some, not all, of the gated branches of layers 0 to " +
                          std::to_string(manifest.decoder.numLayers - 1) + ": " + joinedBy(", ", branches),
                      unknown.empty() ? "all of them" : joinedBy(", ", unknown), {}});
}

}  // namespace

StepOutput EarlyExit::step(Cache& cache, Array<int64_t> ids, Counts counts) {
    return mRunner.draft(cache, std::move(ids), std::move(counts), mInputs, Logits::kLast);
}

StepOutput EarlyExit::verify(Cache& cache, Counts const&, Array<int64_t> ids, Counts counts) {
    // The last token has to pass the early layers first.
    Array<int64_t> last({ids.shape[0], 1});
    for (int64_t row = 0; row < ids.shape[0]; ++row) {
        int64_t& count = counts[static_cast<size_t>(row)];
        last.data[static_cast<size_t>(row)] =
            ids.data[static_cast<size_t>(row * ids.shape[1] + std::max<int64_t>(count - 1, 0))];
        count = std::min<int64_t>(count, 1);
    }
    StepOutput early = mRunner.draft(cache, std::move(last), std::move(counts), mInputs, Logits::kNone);
    return joinedOutput(std::move(early), mRunner.verify(cache, Logits::kAll));
}

void OtherThresholds::begin(std::shared_ptr<RunInputs const> inputs) {
    Selection const& selection = *mRunner.manifest().selection;
    mInputs = std::move(inputs);
    auto made = std::make_shared<RunInputs>(*mInputs);
    Array<float>& thresholds = made->at(kThresholds);
    if (auto const* budget = std::get_if<BudgetDraft>(&mKind)) {
        thresholds = arrayOf(selection.thresholdsFor(budget->budget));
    } else {
        for (auto const& [layer, branch] : std::get<LayersDraft>(mKind).skip) {
            thresholds.data[static_cast<size_t>(layer) * kBranches + static_cast<size_t>(branch)] =
                std::numeric_limits<float>::infinity();
        }
    }
    mDraftInputs = std::move(made);
}

StepOutput OtherThresholds::step(Cache& cache, Array<int64_t> ids, Counts counts) {
    StepOutput output = mRunner.step(cache, std::move(ids), std::move(counts), mDraftInputs, Logits::kLast);
    return {std::move(output.logits), {}, 0};
}

StepOutput OtherThresholds::verify(Cache& cache, Counts const& start, Array<int64_t> ids, Counts counts) {
    cache.rollBack(start);
    return mRunner.step(cache, std::move(ids), std::move(counts), mInputs, Logits::kAll);
}

std::shared_ptr<RunInputs const> inputsFor(Manifest const& manifest, std::optional<double> budget) {
    if (!manifest.selection) {
        if (budget && *budget != 1) {
            throw UsageError("this bundle has no gates", {"budget 1, or none", shortNumber(*budget), {}});
        }
        return std::make_shared<RunInputs>();
    }
    Selection const& selection = *manifest.selection;
    double const wanted = budget.value_or(selection.budget);
    checkBudget(wanted);
    if (selection.mode == SelectionMode::kRank) {
        return std::make_shared<RunInputs>(RunInputs{{kBudget, Array<float>({}, {static_cast<float>(wanted)})}});
    }
    return std::make_shared<RunInputs>(RunInputs{{kThresholds, arrayOf(selection.thresholdsFor(wanted))}});
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
    } else if (kind == "layers") {
        LayersDraft draft;
        std::istringstream parts(value + ",");
        for (std::string part; std::getline(parts, part, ',');) {
            if (!addPlaces(part, draft.skip)) refuse(text);
        }
        return draft;
    }
    refuse(text);
}

void checkDraft(DraftKind const& draft, Manifest const& manifest) {
    if (manifest.selection && manifest.selection->mode == SelectionMode::kRank) {
        throw UsageError("speculation needs selection by threshold",
                         {{},
                          "rank: whether a token is kept depends on the other tokens of the call, drafted ones among them",
                          "export with --select threshold, or decode plainly (no --draft; --no-speculative)"});
    }
    if (auto const* exit = std::get_if<ExitDraft>(&draft)) {
        checkExit(*exit, manifest);
    } else if (!manifest.selection) {
        throw UsageError("the draft " + toString(draft) + " needs gates, and this model has none",
                         {"exit:E", {}, "export with --draft exit:E"});
    } else if (auto const* budget = std::get_if<BudgetDraft>(&draft)) {
        manifest.selection->thresholdsFor(budget->budget);
    } else {
        checkLayers(std::get<LayersDraft>(draft), manifest);
    }
}

}  // namespace gsx
