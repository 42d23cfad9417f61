// Files of a bundle: their size, their bytes.

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

}  // namespace gsx
