#include "manifest_json.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>

#include "gsx/error.h"
#include "json_schema.h"
#include "manifest_schema.h"
#include "tensor_names.h"
#include "text.h"

namespace gsx {
namespace {

using nlohmann::json;

constexpr int64_t kSchemaVersion = 1;
constexpr char const* kGateSkip = "gateskip";

Branch branchOf(json const& name) { return name == nameOf(Branch::kAttention) ? Branch::kAttention : Branch::kMlp; }

// An optional member of an object; null if it is missing.
json const& optionalMember(json const& object, char const* name) {
    static json const none;
    auto const found = object.find(name);
    return found == object.end() ? none : *found;
}

FileEntry fileOf(json const& entry) {
    FileEntry file{entry.at("file"), entry.at("sha256"), std::nullopt};
    if (entry.contains("size_bytes")) file.sizeBytes = entry["size_bytes"].get<int64_t>();
    return file;
}

std::optional<double> numberOf(json const& value) {
    return value.is_null() ? std::nullopt : std::optional(value.get<double>());
}

// null means minus infinity (keep everything): JSON has no infinities.
float thresholdOf(json const& value) {
    return value.is_null() ? -std::numeric_limits<float>::infinity() : static_cast<float>(value.get<double>());
}

Selection selectionOf(json const& entry) {
    Selection selection;
    selection.mode = entry.at("mode") == "rank" ? SelectionMode::kRank : SelectionMode::kThreshold;
    selection.budget = entry.at("budget");
    for (json const& point : entry.value("grid", json::array())) {
        GridPoint made{point.at("budget"), {}};
        for (json const& row : point.at("thresholds")) made.thresholds.push_back({thresholdOf(row[0]), thresholdOf(row[1])});
        selection.grid.push_back(std::move(made));
    }
    return selection;
}

std::vector<Branch> branchesOf(json const& list) {
    std::vector<Branch> branches;
    for (json const& branch : list) branches.push_back(branchOf(branch));
    return branches;
}

Policy policyOf(json const& entry) {
    Policy policy;
    policy.name = entry.at("name");
    policy.branches = branchesOf(entry.at("branches"));
    json const& layers = optionalMember(entry, "layers");
    if (!layers.is_null()) policy.layers = layers.get<std::vector<int64_t>>();
    for (json const& input : entry.at("inputs")) {
        RuntimeInput& read = policy.inputs.emplace_back();
        read.name = input.at("name");
        read.least = numberOf(input.at("least"));
        read.most = numberOf(input.at("most"));
        if (read.name != names::kLayerMask) continue;
        for (json const& row : input.at("default")) read.defaultMask.push_back({row.at(0), row.at(1)});
    }
    json const& warmUp = optionalMember(entry, "warm_up");
    if (!warmUp.is_null()) policy.warmUp = warmUp.get<int64_t>();
    json const& exits = optionalMember(entry, "exits");
    if (!exits.is_null()) policy.exits = exits.get<std::vector<int64_t>>();
    json const& confidence = optionalMember(entry, "confidence");
    if (!confidence.is_null()) {  // null means infinity (no token exits)
        policy.exitThreshold = numberOf(confidence.at("threshold")).value_or(std::numeric_limits<double>::infinity());
    }
    return policy;
}

// The first bundles had no section `policy`, since GateSkip was the only keep rule: in such a bundle a selection means
// GateSkip.
Policy gateskipPolicy(Selection const& selection, json const& gates) {
    Policy policy;
    policy.name = kGateSkip;
    RuntimeInput& read = policy.inputs.emplace_back();
    read.name = selection.mode == SelectionMode::kRank ? names::kBudget : names::kThresholds;
    read.least = 0;
    read.most = 1;
    if (!gates.is_null()) policy.branches = branchesOf(gates.at("branches"));
    return policy;
}

DraftKind draftOf(json const& entry) {
    if (entry.at("kind") == "exit") return ExitDraft{entry.at("layer")};
    if (entry.at("kind") == "budget") return BudgetDraft{entry.at("budget")};
    if (entry.at("kind") == "loops") return LoopsDraft{entry.at("loops")};
    LayersDraft draft;
    for (json const& place : entry.at("skip")) draft.skip.emplace_back(place[0].get<int64_t>(), branchOf(place[1]));
    return draft;
}

Sizes sizesOf(json const& sizes) { return {sizes[0], sizes[1], sizes[2]}; }

std::vector<TensorInfo> tensorsOf(json const& list) {
    std::vector<TensorInfo> tensors;
    for (json const& value : list) {
        TensorInfo& tensor = tensors.emplace_back();
        tensor.name = value.at("name");
        for (json const& axis : value.at("shape")) {
            if (axis.is_string()) {
                tensor.shape.emplace_back(axis.get<std::string>());
            } else {
                tensor.shape.emplace_back(axis.get<int64_t>());
            }
        }
    }
    return tensors;
}

// Names of the outputs of `draft` that are inputs of `verify`.
std::vector<std::string> exitStateOf(json const& graphs) {
    std::vector<std::string> passed;
    if (!graphs.contains("draft") || !graphs.contains("verify")) return passed;
    std::set<std::string> given;
    for (TensorInfo const& output : tensorsOf(graphs["draft"].at("outputs"))) given.insert(output.name);
    for (TensorInfo const& input : tensorsOf(graphs["verify"].at("inputs"))) {
        if (given.count(input.name) != 0) passed.push_back(input.name);
    }
    return passed;
}

// Mark the run-time inputs that have a value for each sequence in the graph.
void markBySequence(std::vector<RuntimeInput>& inputs, json const& graphs) {
    if (!graphs.contains("model")) return;
    std::set<std::string> found;
    for (TensorInfo const& input : tensorsOf(graphs["model"].at("inputs"))) {
        auto const* first = input.shape.empty() ? nullptr : std::get_if<std::string>(&input.shape.front());
        if (first != nullptr && *first == "batch") found.insert(input.name);
    }
    for (RuntimeInput& read : inputs) read.bySequence = found.count(read.name) != 0;
}

EngineEntry engineOf(json const& entry) {
    EngineEntry engine;
    engine.backend = entry.at("backend");
    engine.tensorrtVersion = entry.at("tensorrt_version");
    engine.targets = entry.at("targets").get<std::vector<std::string>>();
    engine.platform = entry.at("platform");
    if (!entry.at("gpu").is_null()) engine.gpu = entry["gpu"].get<std::string>();
    engine.kvLayout = entry.value("kv_layout", engine.kvLayout);
    engine.capacity = entry.at("capacity");
    for (json const& profile : entry.at("profiles")) {
        engine.profiles.push_back(
            {profile.at("name"), sizesOf(profile.at("batch")), sizesOf(profile.at("tokens")), sizesOf(profile.at("window"))});
    }
    json const& plugins = entry.at("plugins");
    if (!plugins.is_null()) engine.plugins = PluginRecord{plugins.at("sha256"), plugins.at("source_hash")};
    for (auto const& [name, graph] : entry.at("graphs").items()) {
        engine.graphs[name] = {fileOf(graph),
                               graph.at("graph_sha256"),
                               graph.at("weights_sha256"),
                               graph.at("forms").get<std::map<std::string, std::string>>(),
                               tensorsOf(graph.at("inputs")),
                               tensorsOf(graph.at("outputs"))};
    }
    engine.canonical = entry.dump();
    return engine;
}

Manifest manifestOf(json const& raw) {
    Manifest manifest;
    json const& decoder = raw.at("decoder");
    manifest.decoder = {decoder.at("vocab_size"), decoder.at("num_layers"), decoder.at("max_positions"),
                        decoder.at("eos_ids").get<std::vector<int64_t>>(), std::nullopt};
    json const& loops = optionalMember(decoder, "loops");
    if (!loops.is_null()) {
        manifest.decoder.loops = Loops{loops.at("before"), loops.at("looped"), loops.at("after"), loops.at("most"),
                                       loops.at("default"), loops.value("caches", "per_loop") == "last_loop" && loops.at("most") > 1};
    }
    if (!raw.at("selection").is_null()) manifest.selection = selectionOf(raw["selection"]);
    json const& policy = optionalMember(raw, "policy");
    if (!policy.is_null()) {
        manifest.policy = policyOf(policy);
    } else if (manifest.selection) {
        manifest.policy = gateskipPolicy(*manifest.selection, raw.at("gates"));
    }
    if (manifest.policy) markBySequence(manifest.policy->inputs, raw.at("graphs"));
    manifest.kvPolicy = raw.at("kv_policy");
    manifest.precision = raw.at("precision");
    if (json const& quantization = optionalMember(raw, "quantization"); !quantization.is_null()) {
        std::string const scheme = quantization.at("scheme");
        bool const weightsOnly = scheme == "int8-weights" || scheme == "int4";
        manifest.quantization = Quantization{scheme == "fp8", !weightsOnly};
    }
    manifest.hasKvCache = !optionalMember(raw, "kv_cache").is_null();
    manifest.exitState = exitStateOf(raw.at("graphs"));
    for (auto const& [name, graph] : raw.at("graphs").items()) {
        manifest.graphs[name] = {fileOf(graph), tensorsOf(graph.at("inputs")), tensorsOf(graph.at("outputs"))};
    }
    manifest.weights = fileOf(raw.at("weights"));
    if (json const& chat = optionalMember(raw, "chat_template"); !chat.is_null()) {
        manifest.chatTemplateSha256 = chat.at("sha256").get<std::string>();
    }
    json const& draft = optionalMember(raw, "draft");
    if (!draft.is_null()) {
        DraftEntry& entry = manifest.draft.emplace();
        entry.draft = draftOf(draft.at("draft"));
        json const& length = optionalMember(draft, "length");
        if (!length.is_null()) entry.length = length.get<int64_t>();
    }
    json const& engines = optionalMember(raw, "engines");
    if (!engines.is_null()) {
        for (auto const& [name, entry] : engines.items()) manifest.engines[name] = engineOf(entry);
    }
    return manifest;
}

// The first rule beyond the schema that a manifest violates; empty if there is none. The rules are those of the validators
// in gsx_engines/bundle (manifest.py and its sections).
std::string brokenRule(json const& raw, Manifest const& manifest) {
    DecoderShape const& shape = manifest.decoder;
    if (shape.vocabSize < 1 || shape.numLayers < 1 || shape.maxPositions < 1) return "decoder: sizes must be above 0";
    Policy const* policy = manifest.policy ? &*manifest.policy : nullptr;
    bool const selects = policy != nullptr && (policy->input(names::kThresholds) != nullptr ||
                                               policy->input(names::kBudget) != nullptr);
    if (manifest.selection.has_value() != selects) {
        return "a selection requires a policy that reads thresholds or a budget, and the other way round";
    }
    if (policy != nullptr && policy->name == kGateSkip && raw.at("gates").is_null()) {
        return "the policy gateskip needs gates";
    }
    if (shape.loops) {
        Loops const& loops = *shape.loops;
        if (loops.usual > loops.most) {
            return std::to_string(loops.usual) + " loops by default are more than the most, " + std::to_string(loops.most);
        }
        int64_t const visits = loops.before + loops.looped * loops.most + loops.after;
        if (visits != shape.numLayers) {
            return "its loops visit " + std::to_string(visits) + " layers, the model has " + std::to_string(shape.numLayers);
        }
    } else if (policy != nullptr && policy->input(names::kLoops) != nullptr) {
        return "the policy reads a number of loops, and the decoder has none";
    }
    RuntimeInput const* threshold = policy != nullptr ? policy->input(names::kExitThreshold) : nullptr;
    if (threshold != nullptr && !(policy->exitThreshold && threshold->least && threshold->most)) {
        return "a policy that reads an exit threshold needs its range and its exported value";
    }
    if (policy != nullptr && policy->layers) {
        for (int64_t const layer : *policy->layers) {
            if (layer < 0 || layer >= shape.numLayers) {
                return "the policy names layer " + std::to_string(layer) + ", the model has " +
                       std::to_string(shape.numLayers);
            }
        }
    }
    RuntimeInput const* mask = policy != nullptr ? policy->input(names::kLayerMask) : nullptr;
    if (mask != nullptr && static_cast<int64_t>(mask->defaultMask.size()) != shape.numLayers) {
        return "policy: the layer mask does not have one row for each layer";
    }
    if (manifest.selection) {
        std::vector<GridPoint> const& grid = manifest.selection->grid;
        bool ordered = manifest.selection->mode == SelectionMode::kRank || !grid.empty();
        for (size_t i = 1; i < grid.size(); ++i) ordered = ordered && grid[i].budget < grid[i - 1].budget;
        if (manifest.selection->mode == SelectionMode::kThreshold && !ordered) {
            return "selection: threshold selection needs a grid of distinct budgets in descending order";
        }
        for (GridPoint const& point : grid) {
            if (static_cast<int64_t>(point.thresholds.size()) != shape.numLayers) {
                return "thresholds are for " + std::to_string(point.thresholds.size()) + " layers, the model has " +
                       std::to_string(shape.numLayers);
            }
        }
    }
    std::set<std::string> wanted = {"model"};
    if (manifest.draft) {
        if (auto const* exit = std::get_if<ExitDraft>(&manifest.draft->draft)) {
            wanted.insert({"draft", "verify"});
            if (exit->layer < 1 || exit->layer >= shape.numLayers) {
                return "the draft exits after " + std::to_string(exit->layer) + " of " + std::to_string(shape.numLayers) +
                       " layers";
            }
        }
    }
    for (std::string const& graph : wanted) {
        if (manifest.graphs.count(graph) == 0) return "graphs lacks " + graph;
    }
    for (auto const& [name, engine] : manifest.engines) {
        for (EngineProfile const& profile : engine.profiles) {
            for (Sizes const& axis : {profile.batch, profile.tokens, profile.window}) {
                if (!(1 <= axis.least && axis.least <= axis.usual && axis.usual <= axis.most)) {
                    return "engines." + name + ": profile " + profile.name + ": sizes are not least <= usual <= most";
                }
            }
        }
    }
    return "";
}

}  // namespace

Manifest parseManifest(std::string const& text, std::filesystem::path const& path) {
    json raw;
    try {
        raw = json::parse(text);
    } catch (json::parse_error const& error) {
        throw BundleError(path.string() + ": is not readable JSON", {{}, error.what(), {}});
    }
    json const version = raw.is_object() ? raw.value("schema_version", json()) : json();
    if (version != kSchemaVersion) {
        throw BundleError(path.string() + ": was written in another format",
                          {"schema_version " + std::to_string(kSchemaVersion),
                           "schema_version " + (version.is_null() ? "None" : version.dump()),
                           "run `gsx export` again with this version of gsx"});
    }
    static json const schema = json::parse(kManifestSchema);
    std::string const todo = "the file was edited: restore it, or run `gsx export` again";
    std::vector<SchemaFault> const faults = faultsOf(raw, schema);
    if (!faults.empty()) {
        throw BundleError(path.string() + ": is not a valid manifest (" + std::to_string(faults.size()) + " errors)",
                          {{}, faults[0].place + ": " + faults[0].reason, todo});
    }
    Manifest manifest;
    try {
        manifest = manifestOf(raw);
    } catch (json::exception const& error) {  // a default whose form is not that of its input
        throw BundleError(path.string() + ": is not a valid manifest (1 errors)", {{}, error.what(), todo});
    }
    std::string const broken = brokenRule(raw, manifest);
    if (!broken.empty()) throw BundleError(path.string() + ": is not a valid manifest (1 errors)", {{}, broken, todo});
    return manifest;
}

std::optional<std::string> canonicalEntry(std::string const& text) {
    json const raw = json::parse(text, nullptr, false);
    if (!raw.is_object()) return std::nullopt;
    return raw.dump();
}

FieldDifference firstDifference(std::string const& expected, std::string const& found) {
    json const wanted = json::parse(expected).flatten();
    json const written = json::parse(found).flatten();
    auto const shown = [](json const& side, std::string const& field) {
        auto const value = side.find(field);
        return value == side.end() ? std::string("nothing") : value->dump();
    };
    std::set<std::string> fields;
    for (json const& side : {wanted, written}) {
        for (auto const& [field, value] : side.items()) fields.insert(field);
    }
    for (std::string const& field : fields) {
        FieldDifference difference{field.substr(1), shown(wanted, field), shown(written, field)};
        if (difference.expected == difference.found) continue;
        std::replace(difference.field.begin(), difference.field.end(), '/', '.');
        return difference;
    }
    return {"nothing", {}, {}};
}

}  // namespace gsx
