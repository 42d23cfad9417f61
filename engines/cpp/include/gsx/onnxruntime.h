// Opening a bundle on this machine's CPU: ONNX Runtime runs the bundle's own graphs, without `gsx build`.

#pragma once

#include <filesystem>
#include <optional>

#include "gsx/model.h"

namespace gsx {

struct CpuOptions {
    // Threads within an op. Unset: ONNX Runtime's own choice.
    std::optional<int> threads;
};

// ONNX Runtime's version, such as "1.32.0".
char const* onnxRuntimeVersion() noexcept;

// Open a bundle's model on the CPU.
// Throws BundleError: as openBundle does. Throws UsageError: the bundle cannot draft in this way.
// Throws EngineError: an ONNX Runtime that is older than the headers that gsx was built with, or a bundle that it does not run
// (bfloat16, K and V in 8 bits).
Model openModelOnCpu(std::filesystem::path const& directory, Drafting const& drafting = {}, CpuOptions const& options = {});

}  // namespace gsx
