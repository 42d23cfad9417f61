// TensorRT's engines on a GPU: as gsx_engines/tensorrt/execution.py. What an engine is for is the stage's business.

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

// Keeps TensorRT's last error, for messages.
class Logger final : public nvinfer1::ILogger {
public:
    void log(Severity severity, char const* text) noexcept override;
    // Its last error, in one line, and forgets it; or that it said nothing.
    std::string takeError();

private:
    std::mutex mMutex;
    std::string mError;
};

// TensorRT's runtime, with the plugins of a library registered. The engines of a model share it.
class TensorRT {
public:
    // Throws EngineError: another TensorRT than the library was built for, or one that does not load the plugins.
    explicit TensorRT(std::optional<std::filesystem::path> const& plugins);

    std::unique_ptr<nvinfer1::ICudaEngine> deserialize(std::string const& plan);
    Logger& logger() noexcept { return mLogger; }

private:
    Logger mLogger;
    std::unique_ptr<nvinfer1::IRuntime> mRuntime;
};

// A deserialised engine, with a stream, and a context for each profile that was used.
class CudaEngine final : public Engine {
public:
    // `cudaGraphs`: record calls of the same shapes, and replay them. TensorRT-RTX does so by itself, asked by its own headers:
    // recorded by hand, general kernels would stay in the place of those that it compiles for the shapes.
    // `kernels`: file for the kernels that TensorRT-RTX compiles (kernel_cache.h); they are saved when the engine goes.
    // Ignored with TensorRT, whose engines hold theirs, and without TensorRT-RTX's own headers, which alone can ask.
    CudaEngine(std::shared_ptr<TensorRT> tensorrt, std::string const& plan, bool cudaGraphs,
               std::filesystem::path const& kernels);
    ~CudaEngine() override;

    std::shared_ptr<Buffer> buffer(Shape const& shape, std::string const& name) override;
    Values run(size_t profile, Values const& feeds, Buffers const& buffers,
               std::map<std::string, Shape> const& results) override;

private:
    class Context;
    class ContextConfig;

    std::unique_ptr<nvinfer1::IExecutionContext> newContext();

    std::shared_ptr<TensorRT> mTensorrt;
    std::unique_ptr<nvinfer1::ICudaEngine> mEngine;
    std::unique_ptr<ContextConfig> mConfig;
    Stream mStream;
    bool mRecords;
    std::map<size_t, std::unique_ptr<Context>> mContexts;
};

}  // namespace gsx
