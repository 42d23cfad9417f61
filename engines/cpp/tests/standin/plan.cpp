#include "plan.h"

#include <nlohmann/json.hpp>
#include <set>
#include <stdexcept>

#include "manifest_json.h"
#include "state.h"
#include "tensor_names.h"
#include "toy_engine.h"

namespace standin {
namespace {

namespace names = gsx::names;

// Inputs and outputs of type int64; the manifests of the vectors do not have types.
std::set<std::string> const kWhole = {names::kInputIds, names::kAttentionMask, names::kPositionIds, names::kWriteAt,
                                      names::kLogitsAt, names::kFullUntil,     names::kCount,       names::kKept,
                                      names::kLoops,    names::kKeptByToken, names::kLikelyIds};

}  // namespace

std::shared_ptr<Plan const> Plan::of(std::string const& bytes) {
    nlohmann::json const raw = nlohmann::json::parse(bytes, nullptr, false);
    if (!raw.is_object() || !raw.contains("manifest")) return nullptr;
    auto plan = std::shared_ptr<Plan>(new Plan);
    plan->mManifest = gsx::parseManifest(raw.at("manifest").dump(), "plan");
    plan->mGraph = raw.at("graph");
    plan->mNeedsPlugins = raw.at("plugins");
    auto const onHost = raw.at("on_host").get<std::set<std::string>>();
    gsx::EngineEntry const& entry = plan->mManifest.engines.at(raw.at("set").get<std::string>());
    plan->mProfiles = entry.profiles;
    gsx::EngineGraph const& graph = entry.graphs.at(plan->mGraph);
    auto const add = [&](gsx::TensorInfo const& tensor, bool isInput) {
        bool const isPresent = !isInput && names::isPresent(tensor.name);
        plan->mTensors[tensor.name] = {tensor.name,
                                       isInput,
                                       kWhole.count(tensor.name) == 0,
                                       onHost.count(tensor.name) != 0,
                                       tensor.shape,
                                       isPresent ? names::pastBefore(tensor.name) : ""};
    };
    for (gsx::TensorInfo const& input : graph.inputs) add(input, true);
    for (gsx::TensorInfo const& output : graph.outputs) add(output, false);
    return plan;
}

Range Plan::rangeOf(size_t profile, std::string const& axis) const {
    gsx::EngineProfile const& one = mProfiles.at(profile);
    if (axis == "batch") return {one.batch.least, one.batch.most};
    if (axis == "sequence") return {one.tokens.least, one.tokens.most};
    if (axis == "window") return {one.window.least, one.window.most};
    if (axis == "logits_columns") return {1, one.tokens.most};
    if (axis == "k") return {0, one.batch.most * one.tokens.most};
    throw std::logic_error("a profile has no " + axis);
}

gsx::Values Plan::run(size_t profile, gsx::Values const& inputs, std::map<std::string, gsx::Array<float>>& caches,
                      std::map<std::string, gsx::Shape> const& outputs) const {
    gsx::Buffers buffers;
    for (auto& [name, content] : caches) {
        auto const buffer = std::make_shared<ToyBuffer>(gsx::Shape());
        buffer->array = std::move(content);
        buffers[name] = {buffer, buffer->array.shape};
    }
    // Where the likeliest tokens are given, gsx leaves all logits on the device.
    std::map<std::string, gsx::Shape> results = outputs;
    auto const logits = std::make_shared<ToyBuffer>(gsx::Shape());
    if (outputs.count(names::kLikelyIds) != 0) {
        buffers[names::kLogits] = {logits, outputs.at(names::kLogits)};
        results.erase(names::kLogits);
    }
    gsx::Values found = ToyEngine(mManifest, mGraph, digest()).run(profile, inputs, std::make_shared<gsx::Buffers const>(buffers), results);
    if (results.size() < outputs.size()) found[names::kLogits] = std::move(logits->array);
    for (auto& [name, content] : caches) content = std::move(static_cast<ToyBuffer&>(*buffers.at(name).buffer).array);
    return found;
}

}  // namespace standin
