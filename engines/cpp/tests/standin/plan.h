// An engine of the stand-in: a graph of the toy model, from the bytes that tests write in place of a plan.
//
// The bytes are JSON: {"manifest": the model's, "graph": "model", "on_host": ["k"], "plugins": false}. The inputs and
// outputs are those of the manifest's engines, their ranges those of its profiles, as `gsx build` gives them to TensorRT.

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

namespace standin {

struct Tensor {
    std::string name;
    bool isInput;
    bool isFloat;
    bool onHost;
    // Sizes, and names of dynamic axes.
    std::vector<std::variant<int64_t, std::string>> axes;
    // Input that this output has to share its memory with; empty for none.
    std::string sharesWith;

    bool isCache() const { return name.rfind("past_key_values.", 0) == 0; }
    size_t elementSize() const { return isFloat ? sizeof(float) : sizeof(int64_t); }
};

struct Range {
    int64_t least;
    int64_t most;
};

class Plan {
public:
    // None where the bytes are no plan.
    static std::shared_ptr<Plan const> of(std::string const& bytes);

    std::map<std::string, Tensor> const& tensors() const { return mTensors; }
    size_t profiles() const { return mProfiles.size(); }
    bool needsPlugins() const { return mNeedsPlugins; }

    // What a dynamic axis of a profile may be; and the value of `k`.
    Range rangeOf(size_t profile, std::string const& axis) const;

    // One call. `caches`: content of K and V by input name, read and written. Returns all outputs but these.
    // Throws std::exception: the inputs do not fit together.
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
