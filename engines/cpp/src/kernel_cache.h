// Kernels that TensorRT-RTX compiled, kept across runs: as gsx_engines/tensorrt/kernel_cache.py, in the same files.
//
// An engine of TensorRT-RTX holds no kernels: they are compiled for the GPU that it meets, when it first runs. Its runtime
// cache takes them up and gives them out as bytes; here are the files for these bytes. TensorRT itself checks what it is
// given (its version, GPU, driver) and refuses what does not fit, which costs a start no more than the compilation.

#pragma once

#include <filesystem>
#include <functional>
#include <string>

namespace gsx {

// Where the kernels of an engine are kept for GPUs of a compute capability, as in "89".
std::filesystem::path kernelCachePath(std::string const& engineSha256, std::string const& capability);

// Gives a runtime cache, by `take`, what a file holds. Returns what it took; nothing where it refused, or there is no file.
std::string loadKernels(std::filesystem::path const& path, std::function<bool(std::string const&)> const& take);

// Writes what a runtime cache holds, whole or not at all, unless the file has it already. `known` is what `loadKernels`
// returned. Where there is no room or permission nothing is written: the next start compiles again.
void saveKernels(std::filesystem::path const& path, std::string const& content, std::string const& known) noexcept;

}  // namespace gsx
