// A graph of a bundle on ONNX Runtime, as the bundle has it: past in, present out, nothing lowered. As in
// gsx_engines/runners/portable.py.
//
// It looks like an engine that gsx built (`write_at`, `logits_at`, K and V in buffers), so that stages and the decoding loop
// are the same for every runtime. K and V of a batch are as long as they need to be: a call's present is the next call's past.

#pragma once

#include <memory>
#include <string>
#include <vector>

#include "gsx/engine.h"
#include "gsx/manifest.h"
#include "onnxruntime/session.h"

namespace gsx {

// The record of an engine for each graph of a bundle, which any call up to the model's context fits.
EngineEntry entryForOnnxRuntime(Manifest const& manifest);

class OnnxRuntimeEngine final : public Engine {
public:
    // `graph`: `model`, `draft` or `verify`. `content`: its ONNX file.
    OnnxRuntimeEngine(Manifest const& manifest, std::string const& graph, std::string const& content,
                      std::filesystem::path const& directory, SessionSettings const& settings);

    std::shared_ptr<Buffer> buffer(Shape const& shape, std::string const& name) override;
    bool runsSomeRows() const override { return false; }
    Values run(size_t profile, Values const& feeds, SharedBuffers const& bound,
               std::map<std::string, Shape> const& results) override;

private:
    // Values of the graph with the numbers of the rows that a branch kept.
    std::vector<std::string> mIndices;
    Session mSession;
};

}  // namespace gsx
