// Files: their size, their bytes, and where what can be made again is kept.

#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>

namespace gsx {

// Bytes of a regular file; none where there is none.
std::optional<int64_t> sizeOf(std::filesystem::path const& path);
// A file's bytes; none where it cannot be read.
std::optional<std::string> contentOf(std::filesystem::path const& path);

// Where this user's gsx keeps what can be made again (XDG base directory specification), as gsx_plugins/files.py.
std::filesystem::path cacheFolder();
// A variable of the environment; empty where it is not set.
std::string variable(char const* name);

}  // namespace gsx
