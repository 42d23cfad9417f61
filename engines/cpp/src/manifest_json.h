// `gsx.json` and `engine.json`, from text to what the runtime needs.

#pragma once

#include <filesystem>
#include <optional>
#include <string>

#include "gsx/manifest.h"

namespace gsx {

// Read a manifest's text, checked against the schema and beyond it.
// `path` is named in errors. Throws BundleError: no JSON, another schema version, a broken rule.
Manifest parseManifest(std::string const& text, std::filesystem::path const& path);

// An `engine.json` in the form of `EngineEntry::canonical`; none where it is no JSON object.
std::optional<std::string> canonicalEntry(std::string const& text);

// A field as in `profiles.0.name`, and its values in two JSON texts ("nothing" where one has none).
struct FieldDifference {
    std::string field;
    std::string expected;
    std::string found;
};

// The first field in which two canonical entries differ, which they do.
FieldDifference firstDifference(std::string const& expected, std::string const& found);

}  // namespace gsx
