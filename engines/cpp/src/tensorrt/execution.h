// TensorRT engines on a GPU: as in gsx_engines/tensorrt/execution.py. The stage knows what an engine computes.

#pragma once

#include <NvInferRuntime.h>

#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "gsx/engine.h"
#include "tensorrt/cuda.h"

namespace gsx {

// TensorRT's version as its Python package spells it, e.g. "10.16.0.72".
std::string tensorrtVersion();

// Keeps TensorRT's last error message for our own messages.
class Logger final : public nvinfer1::ILogger {
public:
    void log(Severity severity, char const* text) noexcept override;
    // Return the last error in one line, and forget it; or a text that says there was none.
    std::string takeError();

private:
    std::mutex mMutex;
    std::string mError;
};

// TensorRT's runtime with the plugins of a library registered, and a stream, shared by the engines of a model.
class TensorRT {
public:
    // Throws EngineError: this is not the TensorRT that the library was built for, it cannot load the plugins, or CUDA
    // gives no stream.
    explicit TensorRT(std::optional<std::filesystem::path> const& plugins);

    std::unique_ptr<nvinfer1::ICudaEngine> deserialize(std::string const& plan);
    Logger& logger() noexcept { return mLogger; }
    // Engines share K/V buffers, so the calls of all of them are in one order.
    cudaStream_t stream() const noexcept { return mStream.get(); }
    // Device memory in which contexts compute, one block for all, since their calls are in one order. By itself each context
    // has a block of its own, as large as the largest call of any profile needs. `reserveScratch` makes room for an engine;
    // contexts made before keep the block that they have.
    void reserveScratch(size_t size);
    std::shared_ptr<DeviceMemory> scratch();

private:
    Logger mLogger;
    std::unique_ptr<nvinfer1::IRuntime> mRuntime;
    Stream mStream;
    size_t mScratchSize = 0;
    std::shared_ptr<DeviceMemory> mScratch;
};

// What an engine's calls are like.
struct CallOptions {
    // Record calls of the same shapes and replay them. TensorRT-RTX records by itself if it was built with its own headers: a
    // recording of ours would keep its general kernels instead of those that it compiles for the shapes.
    bool cudaGraphs;
    // The host knows how many rows each branch runs on. Where the GPU counts them, nearly every prompt has new numbers in
    // every layer: compiling kernels for these would take the processor that waits for the GPU. (Only TensorRT-RTX compiles.)
    bool fixedRows;
    // File for the kernels that TensorRT-RTX compiles (kernel_cache.h); they are saved when the engine is destroyed. Ignored
    // with TensorRT, whose engines contain their kernels, and without TensorRT-RTX's own headers.
    std::filesystem::path kernels;
};

// A deserialized engine, and a context for each profile that has been used.
class CudaEngine final : public Engine {
public:
    CudaEngine(std::shared_ptr<TensorRT> tensorrt, std::string const& plan, CallOptions const& options);
    ~CudaEngine() override;

    std::shared_ptr<Buffer> buffer(Shape const& shape, std::string const& name) override;
    Array<float> read(BoundBuffer const& rows, std::string const& name) override;
    Values run(size_t profile, Values const& feeds, SharedBuffers const& buffers,
               std::map<std::string, Shape> const& results) override;

private:
    class Context;
    class ContextConfig;

    std::unique_ptr<nvinfer1::IExecutionContext> newContext();

    std::shared_ptr<TensorRT> mTensorrt;
    std::unique_ptr<nvinfer1::ICudaEngine> mEngine;
    std::unique_ptr<ContextConfig> mConfig;
    bool mRecords;
    std::map<size_t, std::unique_ptr<Context>> mContexts;
};

}  // namespace gsx
