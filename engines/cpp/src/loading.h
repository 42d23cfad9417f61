// Which engines of a bundle run on a machine: as in gsx_engines/tensorrt/loading.py, with the same messages.

#pragma once

#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "gsx/bundle.h"
#include "gsx/error.h"

namespace gsx {

// The properties of this machine that an engine depends on. `capability` is the compute capability, such as "89".
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

// Refuse a bundle that has no engines of a backend but for steps. Throws EngineError, which names those that the bundle has.
void requireEngines(Bundle const& bundle, std::string const& backend);

// Find the engines of a bundle for a machine, and check everything except the content of their files.
// `plugins` names the plugin library; unset: the one that GSX_PLUGIN_LIBRARY names, else the one that `gsx plugins build`
// made from the sources that the engines were built with.
// Throws EngineError: there are none (`requireEngines`), or none that runs here; it says what differs, both values, and how
// to fix it.
EngineSet findEngines(Bundle const& bundle, std::string const& backend, Machine const& machine,
                      std::optional<std::filesystem::path> const& plugins);

// Receives what is not as it could be, but is no error.
using Warn = std::function<void(std::string const&)>;

// The engines for steps of one size that run on this machine, share K/V buffers with those for all calls, and use the
// same plugin library. Where none of a size does, `warn` is told why: the others do its work, but slower.
std::vector<EngineSet> findSteps(Bundle const& bundle, EngineSet const& engines, Machine const& machine,
                                 std::optional<std::filesystem::path> const& plugins, Warn const& warn);

// Warn that engines for steps are not used.
void leftOut(EngineError const& problem, Warn const& warn);

// An engine's content, checked by size and hash. Throws EngineError: no such engine, a missing or changed file.
std::string readEngine(EngineSet const& engines, std::string const& graph, std::string const& command);

// The command that builds a bundle's engines: `gsx build BUNDLE --backend BACKEND`; and a set of them again.
std::string buildCommand(Bundle const& bundle, std::string const& backend);
std::string buildCommand(Bundle const& bundle, EngineEntry const& entry);

// Operating system and processor, which an engine is tied to, e.g. "linux-x86_64".
std::string platformName();

}  // namespace gsx
