#include "gsx/bundle.h"

#include "files.h"
#include "manifest_json.h"
#include "sha256.h"

namespace gsx {
namespace {

constexpr char const* kManifest = "gsx.json";

void checkHash(std::filesystem::path const& directory, FileEntry const& entry) {
    std::string const what = "bundle " + directory.string() + ": " + entry.file;
    if (!sizeOf(directory / entry.file)) {
        throw BundleError(what + " is missing", {{}, {}, "restore it, or run `gsx export` again"});
    }
    std::string const found = sha256Of(directory / entry.file);
    if (found != entry.sha256) {
        throw BundleError(what + " does not match " + kManifest,
                          {"sha256 " + entry.sha256.substr(0, 12) + "...", found.substr(0, 12) + "...",
                           "the file changed after export: restore it, or run `gsx export` again"});
    }
}

void checkSize(std::filesystem::path const& directory, FileEntry const& entry) {
    std::optional<int64_t> const size = sizeOf(directory / entry.file);
    if (size != entry.sizeBytes) {
        throw BundleError("bundle " + directory.string() + ": " + entry.file + " does not match " + kManifest,
                          {std::to_string(entry.sizeBytes.value_or(0)) + " bytes",
                           size ? std::to_string(*size) + " bytes" : "no such file",
                           "the file is incomplete or was replaced: copy it again, or run `gsx export` again"});
    }
}

}  // namespace

Bundle openBundle(std::filesystem::path const& directory) {
    std::filesystem::path const path = directory / kManifest;
    std::error_code error;
    if (!sizeOf(path)) {
        bool const there = std::filesystem::is_directory(directory, error);
        throw BundleError(directory.string() + ": is not a bundle",
                          {kManifest, there ? "a directory without it" : "no such directory",
                           "gsx export MODEL -o OUT makes one"});
    }
    std::optional<std::string> const text = contentOf(path);
    if (!text) throw BundleError(path.string() + ": cannot be read");
    Bundle bundle{directory, parseManifest(*text, path)};
    for (auto const& [name, graph] : bundle.manifest.graphs) checkHash(directory, graph.file);
    checkSize(directory, bundle.manifest.weights);
    return bundle;
}

}  // namespace gsx
