// Files: size, content, and the folder for data that can be recreated.

#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>

namespace gsx {

// Size of a regular file in bytes; unset if there is no such file.
std::optional<int64_t> sizeOf(std::filesystem::path const& path);
// Content of a file; unset if it cannot be read.
std::optional<std::string> contentOf(std::filesystem::path const& path);

// The user's cache folder for gsx (XDG base directory specification), as in gsx_plugins/files.py.
std::filesystem::path cacheFolder();
// Value of an environment variable; empty if it is not set.
std::string variable(char const* name);

}  // namespace gsx
