// Which engines of a bundle run on a machine: as gsx_engines/tensorrt/loading.py, with its messages.

#pragma once

#include <filesystem>
#include <optional>
#include <string>

#include "gsx/bundle.h"

namespace gsx {

// What an engine depends on, as it is here. `capability` is as in "89".
struct Machine {
    std::string tensorrtVersion;
    std::string platform;
    std::string gpu;
    std::string capability;
};

// Engines of a bundle that may be loaded here, and the plugin library that they need.
struct EngineSet {
    std::filesystem::path directory;
    EngineEntry const* entry;
    std::optional<std::filesystem::path> library;
};

// Refuse a bundle that has no engines for a backend. Throws EngineError that names those that are there.
void requireEngines(Bundle const& bundle, std::string const& backend);

// The engines of a bundle for a machine, checked except for the bytes of their files.
// `plugins` names the plugin library; none for the one that GSX_PLUGIN_LIBRARY names, else the one that
// `gsx plugins build` made of the sources that the engines were built with.
// Throws EngineError: there are none (`requireEngines`), or none that runs here; it says what differs, both values, and what mends it.
EngineSet findEngines(Bundle const& bundle, std::string const& backend, Machine const& machine,
                      std::optional<std::filesystem::path> const& plugins);

// An engine's bytes, checked by size and hash. Throws EngineError: no such engine, a missing or changed file.
std::string readEngine(EngineSet const& engines, std::string const& graph, std::string const& command);

// What builds a bundle's engines: `gsx build BUNDLE --backend BACKEND`.
std::string buildCommand(Bundle const& bundle, std::string const& backend);

// Operating system and processor, which an engine is tied to, e.g. "linux-x86_64".
std::string platformName();

}  // namespace gsx
