// An engine of the stand-in: a graph of the toy model, made from the bytes that tests write in place of a plan.
//
// The bytes are JSON: {"manifest": the model's, "set": "toy", "graph": "model", "on_host": ["k"], "plugins": false}. Inputs
// and outputs are those of the set of engines, with the ranges of its profiles, as `gsx build` passes them to TensorRT.

#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "gsx/engine.h"
#include "gsx/manifest.h"
#include "tensor_names.h"

namespace standin {

struct Tensor {
    std::string name;
    bool isInput;
    bool isFloat;
    bool onHost;
    // Sizes, or names of dynamic axes.
    std::vector<std::variant<int64_t, std::string>> axes;
    // The input that this output must share memory with; empty if there is none.
    std::string sharesWith;

    bool isCache() const { return gsx::names::isPast(name); }
    size_t elementSize() const { return isFloat ? sizeof(float) : sizeof(int64_t); }
};

struct Range {
    int64_t least;
    int64_t most;
};

class Plan {
public:
    // Null if the bytes are not a plan.
    static std::shared_ptr<Plan const> of(std::string const& bytes);

    std::map<std::string, Tensor> const& tensors() const { return mTensors; }
    size_t profiles() const { return mProfiles.size(); }
    bool needsPlugins() const { return mNeedsPlugins; }

    // The allowed sizes of a dynamic axis of a profile, and the allowed values of `k`.
    Range rangeOf(size_t profile, std::string const& axis) const;

    // One call. `caches`: content of K and V by input name, read and written. Returns all other outputs.
    // Throws std::exception: the inputs are inconsistent.
    gsx::Values run(size_t profile, gsx::Values const& inputs, std::map<std::string, gsx::Array<float>>& caches,
                    std::map<std::string, gsx::Shape> const& outputs) const;

private:
    Plan() = default;

    gsx::Manifest mManifest;
    std::string mGraph;
    std::map<std::string, Tensor> mTensors;
    std::vector<gsx::EngineProfile> mProfiles;
    bool mNeedsPlugins = false;
};

}  // namespace standin
