// The GPU and its memory: what an engine needs from the CUDA runtime. Every resource is freed with its object.

#pragma once

#include <cuda_runtime_api.h>

#include <memory>
#include <string>

#include "gsx/engine.h"

namespace gsx {

// Throws EngineError with CUDA's message if a call failed, and LostGpuError if nothing works any more in this process;
// `doing` says what the call was for.
void checkCuda(cudaError_t code, std::string const& doing);

// Clear CUDA's last error after a failure that is ignored. Otherwise it would be taken for an error of the next kernel,
// whose launch is checked by CUDA's last error (CUB, plugins). Throws LostGpuError: it cannot be ignored.
void forgetError(cudaError_t code);

struct Device {
    std::string name;
    // Compute capability, "89" for 8.9.
    std::string capability;
};

// The GPU in use. Throws EngineError: there is none.
Device firstDevice();

// Device memory of a fixed size, at least one byte.
class DeviceMemory final : public Buffer {
public:
    explicit DeviceMemory(size_t size);
    ~DeviceMemory() override;

    void* address() const noexcept { return mAddress; }
    size_t size() const noexcept { return mSize; }

private:
    size_t mSize;
    void* mAddress = nullptr;
};

// Host memory of a fixed size, at least one byte, that the GPU copies from and to by itself. Copies of other memory wait for
// the stream before they begin, and copies to it until they are done.
class PinnedMemory {
public:
    explicit PinnedMemory(size_t size);
    ~PinnedMemory();
    PinnedMemory(PinnedMemory const&) = delete;
    PinnedMemory& operator=(PinnedMemory const&) = delete;

    void* address() const noexcept { return mAddress; }
    size_t size() const noexcept { return mSize; }

private:
    size_t mSize;
    void* mAddress = nullptr;
};

struct FreeGraph {
    void operator()(cudaGraphExec_t graph) const noexcept { cudaGraphExecDestroy(graph); }
};
using RecordedGraph = std::unique_ptr<CUgraphExec_st, FreeGraph>;

struct FreeStream {
    void operator()(cudaStream_t stream) const noexcept { cudaStreamDestroy(stream); }
};
using Stream = std::unique_ptr<CUstream_st, FreeStream>;

Stream makeStream();

}  // namespace gsx
