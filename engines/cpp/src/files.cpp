#include "files.h"

#include <cstdlib>
#include <fstream>
#include <system_error>

namespace gsx {

std::optional<int64_t> sizeOf(std::filesystem::path const& path) {
    std::error_code error;
    if (!std::filesystem::is_regular_file(path, error)) return std::nullopt;
    auto const size = std::filesystem::file_size(path, error);
    if (error) return std::nullopt;
    return static_cast<int64_t>(size);
}

std::optional<std::string> contentOf(std::filesystem::path const& path) {
    std::optional<int64_t> const size = sizeOf(path);
    if (!size) return std::nullopt;
    std::string content(static_cast<size_t>(*size), '\0');
    std::ifstream file(path, std::ios::binary);
    file.read(content.data(), static_cast<std::streamsize>(content.size()));
    if (!file) return std::nullopt;
    return content;
}

std::filesystem::path cacheFolder() {
    std::filesystem::path const home = variable("XDG_CACHE_HOME");
    return (home.is_absolute() ? home : std::filesystem::path(variable("HOME")) / ".cache") / "gsx";
}

std::string variable(char const* name) {
    char const* value = std::getenv(name);
    return value != nullptr ? value : "";
}

}  // namespace gsx
