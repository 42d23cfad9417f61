// Opening a bundle, checked against its manifest.

#pragma once

#include <filesystem>

#include "gsx/error.h"
#include "gsx/manifest.h"

namespace gsx {

// An opened bundle: its directory, and its checked `gsx.json`.
struct Bundle {
    std::filesystem::path directory;
    Manifest manifest;
};

// Open a bundle. Graphs are checked by hash; the weights file, which may be large, only by size.
// Throws BundleError: not a bundle, an unreadable or edited manifest, a missing or changed file.
Bundle openBundle(std::filesystem::path const& directory);

}  // namespace gsx
