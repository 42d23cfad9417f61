#include "controls.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <set>
#include <sstream>

#include "gsx/error.h"
#include "tensor_names.h"
#include "text.h"

namespace gsx {
namespace {

// Layers that a message names; any more are only counted.
constexpr size_t kMostNamed = 4;
constexpr int64_t kMostLayers = 10'000;

// [L, 2], 1 for a branch that runs.
using Mask = std::vector<float>;

std::optional<int64_t> layerOf(std::string const& text) {
    int64_t number = 0;
    auto const [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
    bool const whole = error == std::errc() && end == text.data() + text.size() && !text.empty();
    return whole && number >= 0 && number <= kMostLayers ? std::optional(number) : std::nullopt;
}

std::string trimmed(std::string const& text) {
    size_t const first = text.find_first_not_of(" \t");
    return first == std::string::npos ? "" : text.substr(first, text.find_last_not_of(" \t") - first + 1);
}

// Add the branches that one part of a set names; false if it is not valid.
bool addPlaces(std::string const& part, std::vector<Place>& places) {
    size_t const dot = part.find('.');
    std::string const branches = dot == std::string::npos ? "" : part.substr(dot + 1);
    std::string const range = part.substr(0, dot);
    size_t const dash = range.find('-');
    std::optional<int64_t> const first = layerOf(range.substr(0, dash));
    std::optional<int64_t> const last = dash == std::string::npos ? first : layerOf(range.substr(dash + 1));
    if (!first || !last || *last < *first) return false;
    size_t const before = places.size();
    for (int64_t layer = *first; layer <= *last; ++layer) {
        for (Branch const branch : {Branch::kAttention, Branch::kMlp}) {
            if (dot == std::string::npos || branches == nameOf(branch)) places.emplace_back(layer, branch);
        }
    }
    return places.size() > before;
}

void checkMask(Mask const& mask, std::string const& kvPolicy) {
    if (std::all_of(mask.begin(), mask.end(), [](float runs) { return runs == 0; })) {
        throw UsageError("the set keeps nothing", {"at least one branch that runs", {}, {}});
    }
    if (kvPolicy == "copy" && mask[0] == 0) {
        throw UsageError("the set drops the first layer's attention",
                         {"a set with 0.attn: under the K/V policy copy the layers above copy its K and V",
                          {},
                          "keep layer 0, or export with the K/V policy none or compute"});
    }
}

Mask maskOf(std::vector<Place> const& places, Manifest const& manifest) {
    int64_t const layers = manifest.decoder.numLayers;
    Mask mask(static_cast<size_t>(layers) * kBranches);
    std::set<int64_t> unknown;
    for (auto const& [layer, branch] : places) {
        if (layer >= layers) {
            unknown.insert(layer);
        } else {
            mask[static_cast<size_t>(layer) * kBranches + static_cast<size_t>(branch)] = 1;
        }
    }
    if (!unknown.empty()) {
        std::vector<std::string> names;
        for (int64_t const layer : unknown) names.push_back(std::to_string(layer));
        std::string more;
        if (names.size() > kMostNamed) {
            more = " and " + std::to_string(names.size() - kMostNamed) + " more";
            names.resize(kMostNamed);
        }
        throw UsageError("the set names layers that the model does not have",
                         {"layers from 0 to " + std::to_string(layers - 1), joinedBy(", ", names) + more, {}});
    }
    checkMask(mask, manifest.kvPolicy);
    return mask;
}

std::vector<Place> wholeLayers(std::vector<int64_t> const& layers) {
    std::vector<Place> places;
    for (int64_t const layer : layers) {
        places.emplace_back(layer, Branch::kAttention);
        places.emplace_back(layer, Branch::kMlp);
    }
    return places;
}

// The layers below an exit.
std::vector<Place> exitPlaces(int64_t depth, Manifest const& manifest) {
    int64_t const layers = manifest.decoder.numLayers;
    std::set<int64_t> trained(manifest.policy->exits.begin(), manifest.policy->exits.end());
    bool const any = trained.empty();
    trained.insert(layers);
    if (any ? depth < 1 || depth > layers : trained.count(depth) == 0) {
        std::vector<std::string> names;
        for (int64_t const one : trained) names.push_back(std::to_string(one));
        std::optional<std::string> todo;
        if (0 < depth && depth < layers) {
            todo = "to run these layers anyway, give them as the set 0-" + std::to_string(depth - 1);
        }
        throw UsageError("the model has no exit after " + std::to_string(depth) + " layers",
                         {any ? "1 to " + std::to_string(layers) : "one of " + joinedBy(", ", names),
                          std::to_string(depth), todo});
    }
    std::vector<int64_t> kept(static_cast<size_t>(depth));
    std::iota(kept.begin(), kept.end(), 0);
    return wholeLayers(kept);
}

// The layers that Unified Layer Skipping keeps for a target speed-up (gsx_engines/bundle/layer_sets.py).
std::vector<Place> unifiedPlaces(double speedup, int64_t layers) {
    if (!(std::isfinite(speedup) && speedup >= 1)) {
        throw UsageError("the speed-up is out of range", {"a number of at least 1", shortNumber(speedup), {}});
    }
    constexpr double kRounding = 1e-9;  // 3 / 0.3 must not become 9
    auto const count = static_cast<int64_t>(std::floor(static_cast<double>(layers) / speedup + kRounding));
    if (count < 2) {
        throw UsageError("a speed-up of " + shortNumber(speedup) + " leaves fewer than two of " + std::to_string(layers) +
                             " layers",
                         {"at most " + shortNumber(static_cast<double>(layers) / 2) +
                              ": the first and the last layer always run",
                          shortNumber(speedup),
                          {}});
    }
    int64_t const step = layers / (count - 1);
    std::vector<int64_t> kept = {0};
    for (int64_t layer = step; layer < layers - 1 && static_cast<int64_t>(kept.size()) < count - 1; layer += step) {
        kept.push_back(layer);
    }
    kept.push_back(layers - 1);
    return wholeLayers(kept);
}

Mask layerMask(Manifest const& manifest, RuntimeInput const& read, Keep const& keep) {
    if (keep.layers) {
        std::optional<std::vector<Place>> const places = parsePlaces(*keep.layers);
        if (!places) {
            throw UsageError("'" + *keep.layers + "' is not a set of layers",
                             {"e.g. 0-3,6,8.attn", "'" + *keep.layers + "'", {}});
        }
        return maskOf(*places, manifest);
    }
    if (keep.exit) return maskOf(exitPlaces(*keep.exit, manifest), manifest);
    if (keep.speedup) return maskOf(unifiedPlaces(*keep.speedup, manifest.decoder.numLayers), manifest);
    Mask mask;
    for (auto const& layer : read.defaultMask) mask.insert(mask.end(), layer.begin(), layer.end());
    checkMask(mask, manifest.kvPolicy);
    return mask;
}

std::vector<std::string> givenOf(Keep const& keep) {
    std::vector<std::string> given;
    if (keep.budget) given.emplace_back("budget");
    if (keep.layers) given.emplace_back("layers");
    if (keep.exit) given.emplace_back("exit");
    if (keep.speedup) given.emplace_back("speedup");
    if (keep.exitThreshold) given.emplace_back("exit_threshold");
    if (keep.loops) given.emplace_back("loops");
    return given;
}

// Refuse a threshold outside the range of the confidence measure; infinity, at which no token exits, is allowed.
void checkExitThreshold(double threshold, double least, double most) {
    if (threshold == std::numeric_limits<double>::infinity() || (least <= threshold && threshold <= most)) return;
    throw UsageError("the exit threshold is outside the range of the confidence measure",
                     {shortNumber(least) + " to " + shortNumber(most) + ", or inf for no exits",
                      shortNumber(threshold),
                      {}});
}

// Refuse to hold what is not a budget of thresholds, or has none for each sequence.
void checkHold(Manifest const& manifest) {
    if (!manifest.selection) {
        throw UsageError("there is no budget to hold",
                         {"a bundle whose keep rule has thresholds",
                          manifest.policy ? "policy " + manifest.policy->name : "a dense model", {}});
    }
    if (manifest.selection->mode == SelectionMode::kRank) {
        throw UsageError("holding a budget needs selection by threshold",
                         {{}, "rank, which keeps the budget's share of every call", "export with --select threshold"});
    }
    if (!manifest.policy->input(names::kThresholds)->bySequence) {
        throw UsageError("the thresholds of this bundle are the same for all sequences, so none can hold a budget of its own",
                         {"thresholds with a batch axis", "a bundle of gsx 0.1.0", "export the model again"});
    }
}

// Refuse settings that the bundle's rule does not read.
void checkRead(Manifest const& manifest, Keep const& keep) {
    std::vector<std::string> const given = givenOf(keep);
    if (given.size() > 1) {
        throw UsageError("only one setting may decide what is kept", {"one of them", joinedBy(" and ", given), {}});
    }
    bool const dense = !manifest.policy;
    if (keep.hold) checkHold(manifest);
    if (keep.budget) {
        if (dense && *keep.budget == 1) return;
        if (!manifest.selection) {
            throw UsageError("this bundle has no budget to choose",
                             {dense ? "budget 1, or no budget" : "a bundle whose keep rule has thresholds",
                              dense ? "a dense model, budget " + shortNumber(*keep.budget) : "policy " + manifest.policy->name,
                              {}});
        }
        checkBudget(*keep.budget);
    } else if (keep.exitThreshold) {
        RuntimeInput const* read = dense ? nullptr : manifest.policy->input(names::kExitThreshold);
        if (read == nullptr) {
            throw UsageError("an exit threshold needs a bundle with confidence-based exits",
                             {{}, dense ? "a dense model" : "policy " + manifest.policy->name,
                              "export the model with the policy calm"});
        }
        checkExitThreshold(*keep.exitThreshold, *read->least, *read->most);
    } else if (keep.loops) {
        if (dense || manifest.policy->input(names::kLoops) == nullptr) {
            throw UsageError("a number of loops needs a bundle whose keep rule reads it",
                             {{}, dense ? "a dense model" : "policy " + manifest.policy->name,
                              "export a looped model with the policy loops"});
        }
        int64_t const most = manifest.decoder.loops->most;
        if (*keep.loops < 1 || *keep.loops > most) {
            throw UsageError("the number of loops is out of range",
                             {"1 to " + std::to_string(most), std::to_string(*keep.loops), {}});
        }
    } else if (!given.empty() && (dense || manifest.policy->input(names::kLayerMask) == nullptr)) {
        throw UsageError("the setting '" + given[0] + "' needs a bundle whose keep rule reads a set of layers",
                         {{}, dense ? "a dense model" : "policy " + manifest.policy->name,
                          "export the model with the policy layers"});
    }
}

// Refuse different values for the sequences of a batch, where the input has no batch axis. `name` is for the message.
void checkShared(std::vector<Keep> const& keep, std::optional<double> Keep::*value, std::string const& name) {
    std::vector<std::string> found;
    for (Keep const& one : keep) {
        std::string const text = one.*value ? exactNumber(*(one.*value)) : "as exported";
        if (std::find(found.begin(), found.end(), text) == found.end()) found.push_back(text);
    }
    if (found.size() > 1) {
        throw UsageError("the sequences of a batch must share one " + name, {{}, joinedBy(", ", found), {}});
    }
}

// The rows of the thresholds of a budget, [L, 2].
std::vector<float> thresholdRows(Selection const& selection, double budget) {
    std::vector<float> rows;
    for (auto const& layer : selection.thresholdsFor(budget)) rows.insert(rows.end(), layer.begin(), layer.end());
    return rows;
}

// The value of `thresholds`, or of `budget` with selection by rank.
void select(Controls& controls, Manifest const& manifest, std::vector<Keep> const& keep) {
    Selection const& selection = *manifest.selection;
    RuntimeInput const* read = manifest.policy->input(names::kThresholds);
    bool const apart = read != nullptr && read->bySequence;
    if (!apart) checkShared(keep, &Keep::budget, "budget");
    if (selection.mode == SelectionMode::kRank) {
        double const budget = keep.front().budget.value_or(selection.budget);
        controls[names::kBudget] = Array<float>({}, {static_cast<float>(budget)});
        return;
    }
    Array<float> table({manifest.decoder.numLayers, kBranches}, {});
    if (apart) table.shape.insert(table.shape.begin(), static_cast<int64_t>(keep.size()));
    for (size_t i = 0; i < (apart ? keep.size() : 1); ++i) {
        std::vector<float> const rows = thresholdRows(selection, keep[i].budget.value_or(selection.budget));
        table.data.insert(table.data.end(), rows.begin(), rows.end());
    }
    controls[names::kThresholds] = std::move(table);
}

// Position from which the rule applies to a sequence: after its prompt and the warm-up, or 0.
int64_t fullUntil(Manifest const& manifest, Keep const& keep, int64_t promptSize) {
    if (keep.speedup) return promptSize;
    if (keep.layers || keep.exit || !manifest.policy->warmUp) return 0;
    return promptSize + *manifest.policy->warmUp;
}

}  // namespace

std::optional<std::vector<Place>> parsePlaces(std::string const& text) {
    std::vector<Place> places;
    std::istringstream parts(text + ",");
    for (std::string part; std::getline(parts, part, ',');) {
        if (!addPlaces(trimmed(part), places)) return std::nullopt;
    }
    return places;
}

void setBudget(Controls& controls, Selection const& selection, double budget) {
    std::vector<float> const rows = thresholdRows(selection, budget);
    std::vector<float>& data = std::get<Array<float>>(controls.at(names::kThresholds)).data;
    for (size_t at = 0; at < data.size(); at += rows.size()) std::copy(rows.begin(), rows.end(), data.begin() + at);
}

std::shared_ptr<Controls const> controlsFor(Manifest const& manifest, std::vector<Keep> keep, Counts const& promptSizes) {
    size_t const sequences = promptSizes.size();
    if (keep.size() < 2) keep.resize(sequences, keep.empty() ? Keep{} : keep.front());
    if (keep.size() != sequences) {
        throw UsageError("what to keep was given for a different number of prompts",
                         {"one choice for all, or " + std::to_string(sequences), std::to_string(keep.size()), {}});
    }
    for (Keep const& one : keep) checkRead(manifest, one);
    auto controls = std::make_shared<Controls>();
    if (!manifest.policy) return controls;
    Policy const& policy = *manifest.policy;
    auto const batch = static_cast<int64_t>(sequences);
    if (manifest.selection) select(*controls, manifest, keep);
    if (RuntimeInput const* read = policy.input(names::kLayerMask)) {
        Array<float> masks({batch, manifest.decoder.numLayers, kBranches}, {});
        for (Keep const& one : keep) {
            Mask const mask = layerMask(manifest, *read, one);
            masks.data.insert(masks.data.end(), mask.begin(), mask.end());
        }
        (*controls)[names::kLayerMask] = std::move(masks);
    }
    if (policy.input(names::kLoops) != nullptr) {
        Array<int64_t> loops({batch}, {});
        for (Keep const& one : keep) loops.data.push_back(one.loops.value_or(manifest.decoder.loops->usual));
        (*controls)[names::kLoops] = std::move(loops);
    }
    if (RuntimeInput const* read = policy.input(names::kExitThreshold)) {
        if (!read->bySequence) checkShared(keep, &Keep::exitThreshold, "exit threshold");
        Array<float> thresholds({}, {});
        if (read->bySequence) thresholds.shape = {batch};
        for (Keep const& one : keep) {
            thresholds.data.push_back(static_cast<float>(one.exitThreshold.value_or(*policy.exitThreshold)));
        }
        if (!read->bySequence) thresholds.data.resize(1);
        (*controls)[names::kExitThreshold] = std::move(thresholds);
    }
    if (policy.input(names::kFullUntil) != nullptr) {
        Array<int64_t> until({batch}, {});
        for (size_t i = 0; i < sequences; ++i) until.data.push_back(fullUntil(manifest, keep[i], promptSizes[i]));
        (*controls)[names::kFullUntil] = std::move(until);
    }
    return controls;
}

}  // namespace gsx
