// Kernels compiled by TensorRT-RTX, kept across runs: as in gsx_engines/tensorrt/kernel_cache.py, in the same files.
//
// An engine of TensorRT-RTX contains no kernels: they are compiled for the GPU at hand when the engine first runs. Its
// runtime cache collects them and serializes them to bytes, and this file stores these bytes. TensorRT-RTX itself checks
// what it is given (version, GPU, driver) and refuses what does not fit; then it only has to compile again.

#pragma once

#include <filesystem>
#include <functional>
#include <string>

namespace gsx {

// Path of the kernels of an engine for GPUs of a compute capability, such as "89".
std::filesystem::path kernelCachePath(std::string const& engineSha256, std::string const& capability);

// Pass a file's content to a runtime cache by `take`, which returns whether it was accepted. Returns the accepted content;
// empty if it was refused, or if there is no file.
std::string loadKernels(std::filesystem::path const& path, std::function<bool(std::string const&)> const& take);

// Write the content of a runtime cache atomically, unless the file has it already. `known` is what `loadKernels` returned.
// Without space or permission nothing is written, and the next start compiles again.
void saveKernels(std::filesystem::path const& path, std::string const& content, std::string const& known) noexcept;

}  // namespace gsx
