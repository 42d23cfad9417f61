#include "tensorrt/cuda.h"

#include <algorithm>

#include "gsx/error.h"

namespace gsx {

void checkCuda(cudaError_t code, std::string const& doing) {
    if (code == cudaSuccess) return;
    forgetError(code);
    throw EngineError("CUDA failed while " + doing, {{}, cudaGetErrorString(code), {}});
}

void forgetError(cudaError_t code) noexcept {
    if (code != cudaSuccess) cudaGetLastError();
}

Device firstDevice() {
    int count = 0;
    cudaError_t const code = cudaGetDeviceCount(&count);
    if (code != cudaSuccess || count == 0) {
        forgetError(code);
        throw EngineError("no NVIDIA GPU can be used",
                          {"a GPU and its driver", code == cudaSuccess ? "no CUDA device" : cudaGetErrorString(code),
                           "without a GPU, `gsx generate` runs the bundle on ONNX Runtime"});
    }
    cudaDeviceProp found{};
    checkCuda(cudaGetDeviceProperties(&found, 0), "asking for the GPU's properties");
    return {found.name, std::to_string(found.major) + std::to_string(found.minor)};
}

DeviceMemory::DeviceMemory(size_t size) : mSize(std::max<size_t>(size, 1)) {
    checkCuda(cudaMalloc(&mAddress, mSize), "asking for " + std::to_string(mSize) + " bytes");
}

DeviceMemory::~DeviceMemory() { cudaFree(mAddress); }

Stream makeStream() {
    cudaStream_t stream = nullptr;
    checkCuda(cudaStreamCreate(&stream), "making a stream");
    return Stream(stream);
}

}  // namespace gsx
