#include "tensorrt/cuda.h"

#include <algorithm>

#include "gsx/error.h"

namespace gsx {
namespace {

// Whether every later call of the process fails: as in gsx_engines/tensorrt/cuda.py. (By number: headers of several
// versions of CUDA do not name all of them.)
bool endsProcess(cudaError_t code) noexcept {
    switch (static_cast<int>(code)) {
    case 214: case 220: case 226:  // ECC and NVLink uncorrectable, contained
    case 700: case 702: case 710:  // illegal address, launch timeout, assert
    case 714: case 715: case 716:  // hardware stack, illegal instruction, misaligned address
    case 717: case 718: case 719:  // address space, program counter, launch failure
    case 721: case 810: case 911:  // tensor memory leak, the MPS client's end, external device
        return true;
    default: return false;
    }
}

}  // namespace

void checkCuda(cudaError_t code, std::string const& doing) {
    if (code == cudaSuccess) return;
    cudaGetLastError();  // see forgetError
    if (endsProcess(code)) {
        throw LostGpuError("CUDA failed while " + doing + ", and this process cannot use the GPU any more",
                           {{}, cudaGetErrorString(code),
                            "start the process again; if that happens again, look for the GPU's errors with dmesg and nvidia-smi"});
    }
    throw EngineError("CUDA failed while " + doing, {{}, cudaGetErrorString(code), {}});
}

void forgetError(cudaError_t code) {
    if (endsProcess(code)) checkCuda(code, "ending a failed call");
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

PinnedMemory::PinnedMemory(size_t size) : mSize(std::max<size_t>(size, 1)) {
    checkCuda(cudaMallocHost(&mAddress, mSize), "pinning " + std::to_string(mSize) + " bytes");
}

PinnedMemory::~PinnedMemory() { cudaFreeHost(mAddress); }

Stream makeStream() {
    cudaStream_t stream = nullptr;
    checkCuda(cudaStreamCreate(&stream), "making a stream");
    return Stream(stream);
}

}  // namespace gsx
