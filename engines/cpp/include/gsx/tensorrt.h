// Opening a bundle on this machine's GPU, with the TensorRT that the library was built for.

#pragma once

#include <filesystem>
#include <functional>
#include <optional>
#include <string>

#include "gsx/model.h"

namespace gsx {

struct GpuOptions {
    // The plugin library that the engines were built with. Unset: the one that GSX_PLUGIN_LIBRARY names, else the one that
    // `gsx plugins build` made on this machine.
    std::optional<std::filesystem::path> pluginLibrary;
    // Record calls of the same shapes and replay them. Engines in which only the GPU knows how many rows a plugin keeps
    // cannot be recorded; they run without.
    bool cudaGraphs = true;
    // Receives a message where engines for steps (`gsx build --step`) cannot be used, and so the others do their work.
    std::function<void(std::string const&)> onWarning;
};

// "tensorrt" or "tensorrt-rtx": the backend whose engines this library runs (`gsx build --backend`).
char const* backendName() noexcept;

// Open a bundle's model on the first visible GPU.
// Throws BundleError: as openBundle does. Throws UsageError: the bundle cannot draft in this way.
// Throws EngineError: no GPU, no engines, or engines that do not fit this machine; it says what differs, both values, and
// how to fix it. Engines for steps that cannot be used are left out.
Model openModel(std::filesystem::path const& directory, Drafting const& drafting = {}, GpuOptions const& options = {});

}  // namespace gsx
