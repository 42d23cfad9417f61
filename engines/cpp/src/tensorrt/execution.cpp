#include "tensorrt/execution.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <tuple>
#include <utility>
#include <vector>

#include "gsx/error.h"
#include "gsx/tensorrt.h"
#include "kernel_cache.h"

namespace gsx {
namespace {

#ifdef TRT_MAJOR_RTX
constexpr int32_t kHeadersMajor = TRT_MAJOR_RTX;
#else
constexpr int32_t kHeadersMajor = NV_TENSORRT_MAJOR;
#endif
// A CUDA graph is recorded after this many identical calls: TensorRT allocates and initializes in the first ones.
constexpr int kCallsBeforeRecording = 2;
// Kinds of calls that are remembered, with a recording each: sets of layers that alternate, such as those of a draft and of
// its verification, and the last windows.
constexpr size_t kMostRecordings = 32;
constexpr size_t kLongestError = 600;
// What is larger crosses to the host seldom (a long prompt's exit state, the logits of all its tokens), and would pin memory
// for good.
constexpr size_t kMostPinned = size_t{4} << 20;

bool isRtx() { return std::string(backendName()) == "tensorrt-rtx"; }

// TensorRT's classes have no stable layout: with headers of another major version, calls end up in the wrong functions.
// TensorRT-RTX 1.7 has the layout of TensorRT 11's public headers (tried with 1.7.1 and 11.1; those of 10.16 crash).
void checkHeaders() {
    constexpr int32_t kRtxLayout = 11;
    int32_t const library = getInferLibMajorVersion();
    bool const fits = kHeadersMajor == library || (isRtx() && library == 1 && kHeadersMajor == kRtxLayout);
    if (fits) return;
    throw EngineError(std::string(backendName()) + ": the library is not the one that gsx was built for",
                      {"major version " + std::to_string(kHeadersMajor) + ", that of the headers", tensorrtVersion(),
                       "build gsx with the headers of the TensorRT that is installed (TENSORRT_ROOT)"});
}

size_t bytesOf(nvinfer1::DataType type, std::string const& name) {
    switch (type) {
    case nvinfer1::DataType::kINT64: return 8;
    case nvinfer1::DataType::kFLOAT:
    case nvinfer1::DataType::kINT32: return 4;
    case nvinfer1::DataType::kHALF:
    case nvinfer1::DataType::kBF16: return 2;
    case nvinfer1::DataType::kINT8:
    case nvinfer1::DataType::kFP8: return 1;
    default: throw EngineError("the engine's tensor " + name + " has an unknown type");
    }
}

nvinfer1::Dims dimsOf(Shape const& shape, std::string const& name) {
    nvinfer1::Dims dims{};
    if (shape.size() > nvinfer1::Dims::MAX_DIMS) throw EngineError("the engine's tensor " + name + " has too many axes");
    dims.nbDims = static_cast<int32_t>(shape.size());
    std::copy(shape.begin(), shape.end(), dims.d);
    return dims;
}

std::string spelled(Shape const& shape) {
    std::string text;
    for (int64_t const size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
    return "[" + text + "]";
}

size_t roundedUp(size_t size) {
    size_t power = 1;
    while (power < size) power *= 2;
    return power;
}

// TensorRT requires every address to be a multiple of this, on the host too (IExecutionContext::setTensorAddress).
constexpr std::align_val_t kAlignment{256};

struct FreeHost {
    void operator()(void* memory) const noexcept { ::operator delete(memory, kAlignment); }
};
using HostMemory = std::unique_ptr<void, FreeHost>;

HostMemory makeHostMemory(size_t size) { return HostMemory(::operator new(std::max<size_t>(size, 1), kAlignment)); }

// An array of either type: its bytes and its shape.
struct HostView {
    void const* data;
    size_t bytes;
    Shape const& shape;
    nvinfer1::DataType type;
};

HostView viewOf(Value const& value) {
    if (auto const* floats = std::get_if<Array<float>>(&value)) {
        return {floats->data.data(), floats->data.size() * sizeof(float), floats->shape, nvinfer1::DataType::kFLOAT};
    }
    auto const& ints = std::get<Array<int64_t>>(value);
    return {ints.data.data(), ints.data.size() * sizeof(int64_t), ints.shape, nvinfer1::DataType::kINT64};
}

// Whether an engine has an input on the host. It is read while a call is prepared, so a recording would keep its old value.
bool readsHost(nvinfer1::ICudaEngine const& engine) {
    for (int32_t i = 0; i < engine.getNbIOTensors(); ++i) {
        if (engine.getTensorLocation(engine.getIOTensorName(i)) == nvinfer1::TensorLocation::kHOST) return true;
    }
    return false;
}

}  // namespace

std::string tensorrtVersion() {
    return std::to_string(getInferLibMajorVersion()) + "." + std::to_string(getInferLibMinorVersion()) + "." +
           std::to_string(getInferLibPatchVersion()) + "." + std::to_string(getInferLibBuildVersion());
}

void Logger::log(Severity severity, char const* text) noexcept {
    if (severity != Severity::kERROR && severity != Severity::kINTERNAL_ERROR) return;
    try {
        std::lock_guard const lock(mMutex);
        mError.assign(text);
    } catch (std::exception const&) {
        // Out of memory: the failing call of TensorRT is then reported without its message.
    }
}

std::string Logger::takeError() {
    std::lock_guard const lock(mMutex);
    std::string text = std::exchange(mError, "").substr(0, kLongestError);
    std::replace(text.begin(), text.end(), '\n', ' ');
    return text.empty() ? "TensorRT gave no reason" : text;
}

TensorRT::TensorRT(std::optional<std::filesystem::path> const& plugins) {
    checkHeaders();
    mRuntime.reset(nvinfer1::createInferRuntime(mLogger));
    if (!mRuntime) {
        throw EngineError(std::string(backendName()) + " " + tensorrtVersion() + " does not start",
                          {{}, mLogger.takeError(), {}});
    }
    if (plugins && mRuntime->getPluginRegistry().loadLibrary(plugins->c_str()) == nullptr) {
        throw EngineError("the plugin library " + plugins->string() + " does not load",
                          {{}, mLogger.takeError(), "gsx plugins build makes one for this machine"});
    }
    mStream = makeStream();
}

std::unique_ptr<nvinfer1::ICudaEngine> TensorRT::deserialize(std::string const& plan) {
    std::unique_ptr<nvinfer1::ICudaEngine> engine(mRuntime->deserializeCudaEngine(plan.data(), plan.size()));
    if (!engine) {
        throw EngineError(std::string(backendName()) + " " + tensorrtVersion() + " cannot load the engine",
                          {{}, mLogger.takeError(), "gsx build builds it again for this machine"});
    }
    return engine;
}

void TensorRT::reserveScratch(size_t size) { mScratchSize = std::max(mScratchSize, size); }

std::shared_ptr<DeviceMemory> TensorRT::scratch() {
    if (!mScratch || mScratch->size() < mScratchSize) mScratch = std::make_shared<DeviceMemory>(mScratchSize);
    return mScratch;
}

#ifdef TRT_MAJOR_RTX

// The configuration of an engine's contexts: a cache for the kernels that TensorRT-RTX compiles, loaded from a file and
// saved to it, and TensorRT-RTX's own recording of calls, which starts once the kernels for their shapes are compiled.
// Engines with an input on the host are not recorded: it is read while a call is prepared, and a replay skips that.
class CudaEngine::ContextConfig {
public:
    ContextConfig(nvinfer1::ICudaEngine& engine, CallOptions const& options, Logger& logger)
        : mPath(options.kernels), mConfig(engine.createRuntimeConfig()) {
        if (mConfig) mCache.reset(mConfig->createRuntimeCache());
        if (!mCache) throw EngineError("TensorRT-RTX cannot create its kernel cache", {{}, logger.takeError(), {}});
        mKnown = loadKernels(
            mPath, [&](std::string const& content) { return mCache->deserialize(content.data(), content.size()); });
        if (!mConfig->setRuntimeCache(*mCache)) {
            throw EngineError("TensorRT-RTX does not accept its kernel cache", {{}, logger.takeError(), {}});
        }
        mConfig->setExecutionContextAllocationStrategy(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED);
        if (!options.fixedRows) {
            mConfig->setDynamicShapesKernelSpecializationStrategy(
                nvinfer1::DynamicShapesKernelSpecializationStrategy::kNONE);
        }
        if (options.cudaGraphs && !readsHost(engine) &&
            !mConfig->setCudaGraphStrategy(nvinfer1::CudaGraphStrategy::kWHOLE_GRAPH_CAPTURE)) {
            throw EngineError("TensorRT-RTX cannot record calls", {{}, logger.takeError(), {}});
        }
        logger.takeError();  // kernels of another driver, say, are refused with a message, and compiled again
    }

    ~ContextConfig() {
        std::unique_ptr<nvinfer1::IHostMemory> const content(mCache->serialize());
        if (!content) return;
        try {
            saveKernels(mPath, std::string(static_cast<char const*>(content->data()), content->size()), mKnown);
        } catch (std::bad_alloc const&) {
            // The next start compiles again.
        }
    }

    ContextConfig(ContextConfig const&) = delete;
    ContextConfig& operator=(ContextConfig const&) = delete;

    nvinfer1::IExecutionContext* newContext(nvinfer1::ICudaEngine& engine) {
        return engine.createExecutionContext(mConfig.get());
    }

private:
    std::filesystem::path mPath;
    std::unique_ptr<nvinfer1::IRuntimeConfig> mConfig;
    std::unique_ptr<nvinfer1::IRuntimeCache> mCache;
    std::string mKnown;
};

#else

// TensorRT's engines contain their kernels, and its headers have neither a kernel cache nor recording by TensorRT.
class CudaEngine::ContextConfig {
public:
    ContextConfig(nvinfer1::ICudaEngine&, CallOptions const&, Logger&) {}

    nvinfer1::IExecutionContext* newContext(nvinfer1::ICudaEngine& engine) {
        return engine.createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED);
    }
};

#endif

// An execution context for one profile, with memory for its small inputs and its results.
class CudaEngine::Context {
public:
    Context(CudaEngine& owner, size_t profile)
        : mOwner(owner), mStream(owner.mTensorrt->stream()), mContext(owner.newContext()) {
        if (!mContext) {
            throw EngineError("there is not enough memory for an execution context",
                              {{}, logger().takeError(), "gsx build with a smaller --context"});
        }
        if (!mContext->setOptimizationProfileAsync(static_cast<int32_t>(profile), mStream)) {
            throw EngineError("the engine has no profile " + std::to_string(profile),
                              {{}, logger().takeError(), "build it again with gsx build"});
        }
        mScratch = owner.mTensorrt->scratch();
        mContext->setDeviceMemoryV2(mScratch->address(), static_cast<int64_t>(mScratch->size()));
        checkCuda(cudaStreamSynchronize(mStream), "choosing a profile");  // a context that fails here is not kept
    }

    Values run(Values const& feeds, SharedBuffers const& buffers, std::map<std::string, Shape> const& results) {
        Values found;
        for (auto const& [name, shape] : results) {
            Value& value = found[name];
            if (typeOf(name) == nvinfer1::DataType::kFLOAT) {
                value = Array<float>(shape);
            } else {
                value = Array<int64_t>(shape);
            }
            checkType(name, viewOf(value));
        }
        call(feeds, buffers, found);
        return found;
    }

private:
    struct Binding {
        void* address;
        Shape shape;

        bool operator<(Binding const& other) const {
            return std::tie(address, shape) < std::tie(other.address, other.shape);
        }
    };

    // Calls with the same shapes and addresses: how many there were, their recording, and when one was last made.
    struct Kind {
        int calls = 0;
        RecordedGraph graph;
        uint64_t lastUse = 0;
    };

    Logger& logger() const { return mOwner.mTensorrt->logger(); }

    nvinfer1::DataType typeOf(std::string const& name) const { return mOwner.mEngine->getTensorDataType(name.c_str()); }

    void checkType(std::string const& name, HostView const& view) const {
        if (typeOf(name) != view.type) {
            throw EngineError("the type of the engine's tensor " + name + " differs from its record",
                              {{}, {}, "build it again with gsx build"});
        }
    }

    void call(Values const& feeds, SharedBuffers const& buffers, Values& found) {
        for (auto const& [name, value] : feeds) give(name, viewOf(value));
        if (mLatest.lock() != buffers) {
            for (auto const& [name, bound] : *buffers) bind(name, rowsOf(name, bound), bound.shape);
            mLatest = buffers;
        }
        for (auto const& [name, value] : found) {
            HostView const view = viewOf(value);
            bind(name, room(name, view.bytes).address(), view.shape);
        }
        enqueue();
        std::vector<std::pair<void*, void const*>> staged;  // where results belong, and where they arrive
        std::vector<size_t> sizes;
        for (auto& [name, value] : found) {
            HostView const view = viewOf(value);
            void* const target = std::visit([](auto& array) -> void* { return array.data.data(); }, value);
            void* const arrives = view.bytes <= kMostPinned ? pinned(name, view.bytes) : target;
            checkCuda(cudaMemcpyAsync(arrives, room(name, 0).address(), view.bytes, cudaMemcpyDeviceToHost, mStream),
                      "copying " + name + " from the GPU");
            if (arrives == target || view.bytes == 0) continue;
            staged.emplace_back(target, arrives);
            sizes.push_back(view.bytes);
        }
        checkCuda(cudaStreamSynchronize(mStream), "running the engine");
        for (size_t i = 0; i < staged.size(); ++i) std::memcpy(staged[i].first, staged[i].second, sizes[i]);
    }

    // Pass an input to the engine.
    void give(std::string const& name, HostView const& view) {
        checkType(name, view);
        if (mOwner.mEngine->getTensorLocation(name.c_str()) == nvinfer1::TensorLocation::kHOST) {
            giveOnHost(name, view);
            return;
        }
        DeviceMemory& memory = room(name, view.bytes);
        bind(name, memory.address(), view.shape);
        void const* data = view.data;
        if (view.bytes > 0 && view.bytes <= kMostPinned) {
            data = std::memcpy(pinned(name, view.bytes), view.data, view.bytes);
        }
        checkCuda(cudaMemcpyAsync(memory.address(), data, view.bytes, cudaMemcpyHostToDevice, mStream),
                  "copying " + name + " to the GPU");
    }

    // An input on the host is read while the call is prepared.
    void giveOnHost(std::string const& name, HostView const& view) {
        HostMemory& memory = mHostMemory[name];
        memory = makeHostMemory(view.bytes);
        std::memcpy(memory.get(), view.data, view.bytes);
        if (!mContext->setInputTensorAddress(name.c_str(), memory.get())) refuseMemory(name);
    }

    // Memory for a tensor, kept across calls. It grows in powers of two, so that a growing window seldom moves it.
    DeviceMemory& room(std::string const& name, size_t size) {
        std::unique_ptr<DeviceMemory>& memory = mMemory[name];
        if (!memory || memory->size() < size) memory = std::make_unique<DeviceMemory>(roundedUp(size));
        return *memory;
    }

    // Pinned host memory for a copy of a tensor, kept across calls.
    void* pinned(std::string const& name, size_t size) {
        std::unique_ptr<PinnedMemory>& memory = mPinned[name];
        if (!memory || memory->size() < size) memory = std::make_unique<PinnedMemory>(roundedUp(size));
        return memory->address();
    }

    void bind(std::string const& name, void* address, Shape const& shape) {
        auto const bound = mBound.find(name);
        if (bound != mBound.end() && bound->second.address == address && bound->second.shape == shape) return;
        // First of all: if a part of this fails, the next call starts from scratch.
        mKind = nullptr;
        mLatest.reset();
        mBound.erase(name);
        bool const isInput = mOwner.mEngine->getTensorIOMode(name.c_str()) == nvinfer1::TensorIOMode::kINPUT;
        if (isInput && !mContext->setInputShape(name.c_str(), dimsOf(shape, name))) {
            throw EngineError("the engine does not accept " + name + " with shape " + spelled(shape),
                              {{}, logger().takeError(), "gsx build --profile"});
        }
        if (!mContext->setTensorAddress(name.c_str(), address)) refuseMemory(name);
        mBound[name] = {address, shape};
    }

    [[noreturn]] void refuseMemory(std::string const& name) const {
        throw EngineError("the engine does not accept the memory for " + name, {{}, logger().takeError(), {}});
    }

    // Where the rows of a buffer begin.
    void* rowsOf(std::string const& name, BoundBuffer const& bound) const {
        void* const address = static_cast<DeviceMemory&>(*bound.buffer).address();
        if (bound.row == 0) return address;
        Shape const inner(bound.shape.begin() + 1, bound.shape.end());
        size_t const bytes = countOf(inner) * bytesOf(typeOf(name), name);
        size_t const start = static_cast<size_t>(bound.row) * bytes;
        if (start % static_cast<size_t>(kAlignment) != 0) {
            throw EngineError("sequences of a batch do not begin at multiples of " + std::to_string(static_cast<size_t>(kAlignment)) + " bytes",
                              {"K/V buffers whose rows are multiples of it", std::to_string(bytes) + " bytes a row",
                               "gsx build --context with a multiple of 64"});
        }
        return static_cast<char*>(address) + start;
    }

    // What is known of calls with the current shapes and addresses. The kinds that were not used for longest are forgotten.
    Kind& kindOfCall() {
        Kind& kind = mKinds[mBound];
        kind.lastUse = ++mUses;
        if (mKinds.size() > kMostRecordings) {
            mKinds.erase(std::min_element(mKinds.begin(), mKinds.end(), [](auto const& one, auto const& other) {
                return one.second.lastUse < other.second.lastUse;
            }));
        }
        return kind;
    }

    // Run the call, or replay its recording. A recording is made just after a call of its kind was run: with new shapes,
    // TensorRT prepares things in the first call that a recording must not hold.
    void enqueue() {
        if (mKind == nullptr) mKind = &kindOfCall();
        Kind& kind = *mKind;
        if (kind.graph) {
            checkCuda(cudaGraphLaunch(kind.graph.get(), mStream), "replaying a CUDA graph");
            return;
        }
        if (!mContext->enqueueV3(mStream)) {
            throw EngineError("TensorRT could not run the engine", {{}, logger().takeError(), {}});
        }
        if (++kind.calls >= kCallsBeforeRecording && mOwner.mRecords) record(kind);
    }

    // Record the call, without running it. If that fails, recording is given up for good.
    void record(Kind& kind) {
        checkCuda(cudaStreamBeginCapture(mStream, cudaStreamCaptureModeThreadLocal), "recording a CUDA graph");
        bool const enqueued = mContext->enqueueV3(mStream);
        cudaGraph_t recording = nullptr;
        cudaError_t const ended = cudaStreamEndCapture(mStream, &recording);
        if (!enqueued || ended != cudaSuccess) {
            if (recording != nullptr) cudaGraphDestroy(recording);
            mOwner.mRecords = false;
            forgetError(ended);
            logger().takeError();  // the call itself was run before
            return;
        }
        cudaGraphExec_t made = nullptr;
        cudaError_t const instantiated = cudaGraphInstantiate(&made, recording, 0);
        cudaGraphDestroy(recording);
        checkCuda(instantiated, "making a CUDA graph");
        kind.graph.reset(made);
    }

    CudaEngine& mOwner;
    cudaStream_t mStream;
    std::shared_ptr<DeviceMemory> mScratch;  // outlives the context, which computes in it
    std::unique_ptr<nvinfer1::IExecutionContext> mContext;
    std::map<std::string, std::unique_ptr<DeviceMemory>> mMemory;
    std::map<std::string, std::unique_ptr<PinnedMemory>> mPinned;
    std::map<std::string, HostMemory> mHostMemory;
    std::map<std::string, Binding> mBound;
    // What the latest call bound. (Weakly: a context must not keep the memory of a cache that is gone.)
    std::weak_ptr<Buffers const> mLatest;
    // By shapes and addresses; and the one of the current bindings, once it is looked up.
    std::map<std::map<std::string, Binding>, Kind> mKinds;
    Kind* mKind = nullptr;
    uint64_t mUses = 0;
};

CudaEngine::CudaEngine(std::shared_ptr<TensorRT> tensorrt, std::string const& plan, CallOptions const& options)
    : mTensorrt(std::move(tensorrt)),
      mEngine(mTensorrt->deserialize(plan)),
      mConfig(std::make_unique<ContextConfig>(*mEngine, options, mTensorrt->logger())),
      mRecords(options.cudaGraphs && !isRtx() && !readsHost(*mEngine)) {
    mTensorrt->reserveScratch(static_cast<size_t>(mEngine->getDeviceMemorySizeV2()));
}

CudaEngine::~CudaEngine() = default;

std::unique_ptr<nvinfer1::IExecutionContext> CudaEngine::newContext() {
    return std::unique_ptr<nvinfer1::IExecutionContext>(mConfig->newContext(*mEngine));
}

std::shared_ptr<Buffer> CudaEngine::buffer(Shape const& shape, std::string const& name) {
    auto memory =
        std::make_shared<DeviceMemory>(countOf(shape) * bytesOf(mEngine->getTensorDataType(name.c_str()), name));
    checkCuda(cudaMemsetAsync(memory->address(), 0, memory->size(), mTensorrt->stream()), "clearing memory");
    return memory;
}

Array<float> CudaEngine::read(BoundBuffer const& rows, std::string const& name) {
    Array<float> found(rows.shape);
    size_t const bytes = found.data.size() * sizeof(float);
    Shape const row(rows.shape.begin() + 1, rows.shape.end());
    auto const* const start = static_cast<char const*>(static_cast<DeviceMemory&>(*rows.buffer).address());
    size_t const first = static_cast<size_t>(rows.row) * countOf(row) * sizeof(float);
    cudaStream_t const stream = mTensorrt->stream();
    checkCuda(cudaMemcpyAsync(found.data.data(), start + first, bytes, cudaMemcpyDeviceToHost, stream),
              "copying " + name + " from the GPU");
    checkCuda(cudaStreamSynchronize(stream), "copying " + name + " from the GPU");
    return found;
}

Values CudaEngine::run(size_t profile, Values const& feeds, SharedBuffers const& buffers,
                       std::map<std::string, Shape> const& results) {
    try {
        std::unique_ptr<Context>& context = mContexts[profile];
        if (!context) context = std::make_unique<Context>(*this, profile);
        return context->run(feeds, buffers, results);
    } catch (...) {
        // Copies that were queued before the failure may still read the feeds and write the results. And what TensorRT only
        // refused may be the end of the GPU.
        forgetError(cudaStreamSynchronize(mTensorrt->stream()));
        throw;
    }
}

}  // namespace gsx
