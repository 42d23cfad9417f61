// Reading `gsx.json` and `engine.json`.

#pragma once

#include <filesystem>
#include <optional>
#include <string>

#include "gsx/manifest.h"

namespace gsx {

// Parse a manifest's text, and check it against the schema and the rules beyond it.
// `path` is named in errors. Throws BundleError: not JSON, another schema version, a violated rule.
Manifest parseManifest(std::string const& text, std::filesystem::path const& path);

// An `engine.json` in the form of `EngineEntry::canonical`; unset if it is not a JSON object.
std::optional<std::string> canonicalEntry(std::string const& text);

// A field, such as `profiles.0.name`, and its values in two JSON texts ("nothing" where a text does not have it).
struct FieldDifference {
    std::string field;
    std::string expected;
    std::string found;
};

// The first field in which two canonical entries differ. They must differ.
FieldDifference firstDifference(std::string const& expected, std::string const& found);

}  // namespace gsx
