#include "kernel_cache.h"

#include <unistd.h>

#include <exception>
#include <fstream>
#include <system_error>

#include "files.h"

namespace gsx {
namespace {

constexpr char const* kFolder = "tensorrt-rtx-kernels";

}  // namespace

std::filesystem::path kernelCachePath(std::string const& engineSha256, std::string const& capability) {
    return cacheFolder() / kFolder / (engineSha256 + "-sm" + capability + ".bin");
}

std::string loadKernels(std::filesystem::path const& path, std::function<bool(std::string const&)> const& take) {
    std::optional<std::string> content = contentOf(path);
    return content && !content->empty() && take(*content) ? *content : std::string();
}

void saveKernels(std::filesystem::path const& path, std::string const& content, std::string const& known) noexcept {
    if (content.empty() || content == known) return;
    try {
        std::filesystem::path fresh = path;
        fresh += "." + std::to_string(getpid());
        std::filesystem::create_directories(path.parent_path());
        std::ofstream file(fresh, std::ios::binary);
        file.write(content.data(), static_cast<std::streamsize>(content.size()));
        file.close();
        std::error_code error;
        if (file) std::filesystem::rename(fresh, path, error);
        if (!file || error) std::filesystem::remove(fresh, error);
    } catch (std::exception const&) {
        // No space, no permission or no memory is no reason to fail here.
    }
}

}  // namespace gsx
