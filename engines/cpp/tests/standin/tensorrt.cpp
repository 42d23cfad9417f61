// The TensorRT functions that gsx calls: IRuntime, its plugin registry, ICudaEngine and IExecutionContext, with the rules
// documented in NvInferRuntime.h. A violated rule is reported as TensorRT does: an error in the log, and `false`.

#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <set>
#include <utility>

#include "device.h"
#include "plan.h"
#include "rest.h"
#include "state.h"

namespace standin {
namespace {

// What an engine computes in.
constexpr int64_t kScratchBytes = 1000;
// Required of every address that a context is given.
constexpr uintptr_t kAlignment = 256;

// Writes an error to the log. Returns false, so that functions can return its result.
bool refuse(ILogger& logger, std::string const& text) {
    logger.log(ILogger::Severity::kERROR, ("stand-in: " + text).c_str());
    return false;
}

// One call of an engine in the state in which it is enqueued; a recording keeps this state.
struct Call {
    struct Place {
        Tensor const* tensor;
        void* address;
        gsx::Shape shape;
    };

    std::shared_ptr<Plan const> plan;
    size_t profile;
    std::vector<Place> inputs;
    std::vector<Place> caches;
    std::vector<Place> outputs;
    // Values of inputs on the host, which are read when the call is enqueued.
    gsx::Values values;

    void run() const {
        gsx::Values given = values;
        for (auto const& [tensor, address, shape] : inputs) {
            given[tensor->name] = tensor->isFloat ? gsx::Value(read<float>(tensor->name, address, shape))
                                                  : gsx::Value(read<int64_t>(tensor->name, address, shape));
        }
        std::map<std::string, gsx::Array<float>> content;
        for (auto const& [tensor, address, shape] : caches) {
            content[tensor->name] = read<float>(tensor->name, address, shape);
        }
        std::map<std::string, gsx::Shape> wanted;
        for (Place const& output : outputs) wanted[output.tensor->name] = output.shape;
        gsx::Values found;
        try {
            found = plan->run(profile, given, content, wanted);
        } catch (std::exception const& error) {
            throw IllegalAccess(std::string("the engine cannot compute this: ") + error.what());
        }
        for (auto const& [tensor, address, shape] : caches) write(tensor->name, address, content.at(tensor->name));
        for (Place const& output : outputs) {
            std::visit([&](auto const& array) { write(output.tensor->name, output.address, array); },
                       found.at(output.tensor->name));
        }
    }

    template <typename T>
    static gsx::Array<T> read(std::string const& name, void const* address, gsx::Shape const& shape) {
        gsx::Array<T> array(shape);
        auto const bytes = readDevice(address, array.data.size() * sizeof(T), name);
        if (!bytes.empty()) std::memcpy(array.data.data(), bytes.data(), bytes.size());
        return array;
    }

    template <typename T>
    static void write(std::string const& name, void* address, gsx::Array<T> const& array) {
        writeDevice(address, array.data.data(), array.data.size() * sizeof(T), name);
    }
};

// Checks that the objects made by another object are destroyed before it.
class Owner {
public:
    using Share = std::shared_ptr<bool const>;

    Share share() const { return mShare; }
    void leave(char const* made) const {
        if (mShare.use_count() > 1) misuse(std::string(made) + " outlives the object that made it");
    }

private:
    Share mShare = std::make_shared<bool const>(true);
};

class Context final : public IExecutionContext, public RestOfContext, Counted {
public:
    Context(std::shared_ptr<Plan const> plan, ILogger& logger, Owner::Share engine)
        : mPlan(std::move(plan)), mLogger(logger), mEngine(std::move(engine)) {
        mImpl = this;
    }

    IExecutionContext* getPImpl() noexcept override { return this; }

    // The profile is set only once the stream has reached this point; calls on another stream must wait for that.
    bool setOptimizationProfileAsync(int32_t number, cudaStream_t stream) noexcept override {
        if (fails("setOptimizationProfileAsync")) return refuse(mLogger, "made to fail");
        if (number < 0 || static_cast<size_t>(number) >= mPlan->profiles()) {
            return refuse(mLogger, "no optimization profile " + std::to_string(number));
        }
        mProfile = static_cast<size_t>(number);
        mShapes.clear();
        mIsInitialized = false;
        mReady = std::make_shared<bool>(false);
        enqueue(stream, [ready = mReady] { *ready = true; });
        return true;
    }

    void setDeviceMemoryV2(void* memory, int64_t size) noexcept override {
        if (size < kScratchBytes || reinterpret_cast<uintptr_t>(memory) % kAlignment != 0) misuse("too little scratch memory");
        mScratch = memory;
    }

    bool setInputShape(char const* name, Dims const& dims) noexcept override {
        if (fails("setInputShape")) return refuse(mLogger, "made to fail");
        auto const found = mPlan->tensors().find(name);
        if (found == mPlan->tensors().end() || !found->second.isInput) {
            return refuse(mLogger, std::string(name) + " is not an input");
        }
        gsx::Shape const shape(dims.d, dims.d + dims.nbDims);
        auto const& axes = found->second.axes;
        if (axes.size() != shape.size()) return refuse(mLogger, std::string(name) + " has a wrong number of axes");
        for (size_t i = 0; i < shape.size(); ++i) {
            auto const* size = std::get_if<int64_t>(&axes[i]);
            Range const range = size != nullptr ? Range{*size, *size}
                                                : mPlan->rangeOf(mProfile, std::get<std::string>(axes[i]));
            if (shape[i] < range.least || shape[i] > range.most) {
                return refuse(mLogger, std::string(name) + ": axis " + std::to_string(i) + " is " +
                                           std::to_string(shape[i]) + ", profile " + std::to_string(mProfile) +
                                           " takes " + std::to_string(range.least) + " to " +
                                           std::to_string(range.most));
            }
        }
        mShapes[name] = shape;
        mIsInitialized = false;
        return true;
    }

    bool setTensorAddress(char const* name, void* address) noexcept override {
        if (fails("setTensorAddress")) return refuse(mLogger, "made to fail");
        if (mPlan->tensors().count(name) == 0) return refuse(mLogger, std::string(name) + " is not a tensor");
        if (reinterpret_cast<uintptr_t>(address) % kAlignment != 0) {
            return refuse(mLogger, std::string(name) + ": the address is not a multiple of 256");
        }
        mAddresses[name] = address;
        return true;
    }

    bool setInputTensorAddress(char const* name, void const* address) noexcept override {
        auto const found = mPlan->tensors().find(name);
        if (found == mPlan->tensors().end() || !found->second.isInput) {
            return refuse(mLogger, std::string(name) + " is not an input");
        }
        return setTensorAddress(name, const_cast<void*>(address));
    }

    bool enqueueV3(cudaStream_t stream) noexcept override {
        std::string const reason = prepare(stream);
        if (reason.empty()) return true;
        if (isRecording(stream)) breakRecording(stream);
        return refuse(mLogger, reason);
    }

private:
    // Enqueue the call. Returns the reason if that is not possible, else an empty text.
    std::string prepare(cudaStream_t stream) {
        if (fails("enqueueV3")) return "made to fail";
        // Kernel launches are checked by CUDA's last error, so an old error would be taken for theirs.
        if (lastError() != cudaSuccess) return std::string("CUDA's last error: ") + cudaGetErrorString(lastError());
        if (isRecording(stream)) {
            if (!machine().records || mPlan->needsPlugins()) return "the engine cannot be recorded";
            // TensorRT initializes for new shapes in the first call with them.
            if (!mIsInitialized) return "shapes or profile are new, so a call must be made before one can be recorded";
        }
        if (mScratch == nullptr) return "the context has no device memory";
        Call call{mPlan, mProfile, {}, {}, {}, {}};
        std::map<std::string, int64_t> sizes;
        std::set<void const*> addresses;
        for (bool const inputs : {true, false}) {  // the outputs' shapes follow from the inputs'
            for (auto const& [name, tensor] : mPlan->tensors()) {
                if (tensor.isInput != inputs) continue;
                std::string const reason = add(tensor, call, sizes, addresses);
                if (!reason.empty()) return name + ": " + reason;
            }
        }
        enqueue(stream, [call = std::move(call), ready = mReady, context = std::weak_ptr<bool>(mAlive), scratch = mScratch] {
            if (context.expired()) throw IllegalAccess("a recording of a context that is gone");
            std::vector<unsigned char> const rubbish(kScratchBytes, 0xFF);
            writeDevice(scratch, rubbish.data(), rubbish.size(), "scratch memory");
            noteScratch(scratch);
            if (!*ready) throw IllegalAccess("the stream did not wait for the optimization profile");
            call.run();
        });
        mIsInitialized = mIsInitialized || !isRecording(stream);
        return "";
    }

    // Add a tensor to a call. Returns what is wrong with it, or an empty text.
    std::string add(Tensor const& tensor, Call& call, std::map<std::string, int64_t>& sizes,
                    std::set<void const*>& addresses) const {
        auto const bound = mAddresses.find(tensor.name);
        if (bound == mAddresses.end() || bound->second == nullptr) return "has no address";
        auto const given = mShapes.find(tensor.name);
        gsx::Shape shape;
        for (size_t i = 0; i < tensor.axes.size(); ++i) {
            if (auto const* size = std::get_if<int64_t>(&tensor.axes[i])) {
                shape.push_back(*size);
                continue;
            }
            std::string const axis = std::get<std::string>(tensor.axes[i]);
            if (tensor.isInput && given == mShapes.end()) return "has no shape";
            if (tensor.isInput) sizes.try_emplace(axis, given->second[i]);
            shape.push_back(sizes.at(axis));
            if (tensor.isInput && shape[i] != given->second[i]) return "inputs differ in the axis " + axis;
        }
        if (tensor.onHost) return addHost(tensor, bound->second, shape, call);
        if (!tensor.sharesWith.empty()) {
            return bound->second == mAddresses.at(tensor.sharesWith) ? "" : "does not share memory with its input";
        }
        if (!addresses.insert(bound->second).second) return "uses the memory of another tensor";
        Call::Place place{&tensor, bound->second, std::move(shape)};
        (tensor.isCache() ? call.caches : tensor.isInput ? call.inputs : call.outputs).push_back(std::move(place));
        return "";
    }

    // Add an input on the host, which can only be `k`; the profile limits its value.
    std::string addHost(Tensor const& tensor, void const* address, gsx::Shape const& shape, Call& call) const {
        if (onDevice(address)) return "must be on the host";
        gsx::Array<int64_t> value(shape);
        std::memcpy(value.data.data(), address, value.data.size() * sizeof(int64_t));
        Range const range = mPlan->rangeOf(mProfile, tensor.name);
        for (int64_t const one : value.data) {
            if (one < range.least || one > range.most) return "has a value outside the profile";
        }
        call.values[tensor.name] = std::move(value);
        return "";
    }

    std::shared_ptr<Plan const> mPlan;
    ILogger& mLogger;
    Owner::Share mEngine;
    size_t mProfile = 0;
    std::map<std::string, gsx::Shape> mShapes;
    std::map<std::string, void*> mAddresses;
    void* mScratch = nullptr;
    bool mIsInitialized = false;
    std::shared_ptr<bool> mReady = std::make_shared<bool>(true);
    std::shared_ptr<bool> mAlive = std::make_shared<bool>(true);
};

class Engine final : public ICudaEngine, public RestOfEngine, Counted {
public:
    Engine(std::shared_ptr<Plan const> plan, ILogger& logger, Owner::Share runtime)
        : mPlan(std::move(plan)), mLogger(logger), mRuntime(std::move(runtime)) {
        mImpl = this;
    }
    ~Engine() noexcept override { mOwner.leave("a context"); }

    ICudaEngine* getPImpl() noexcept override { return this; }

    int64_t getDeviceMemorySizeV2() const noexcept override { return kScratchBytes; }

    IExecutionContext* createExecutionContext(ExecutionContextAllocationStrategy strategy) noexcept override {
        if (strategy != ExecutionContextAllocationStrategy::kUSER_MANAGED) misuse("a context with memory of its own");
        if (!fails("createExecutionContext")) return new Context(mPlan, mLogger, mOwner.share());
        refuse(mLogger, "no memory");
        return nullptr;
    }

    DataType getTensorDataType(char const* name) const noexcept override {
        Tensor const* const tensor = find(name);
        return tensor == nullptr || tensor->isFloat ? DataType::kFLOAT : DataType::kINT64;
    }

    TensorLocation getTensorLocation(char const* name) const noexcept override {
        Tensor const* const tensor = find(name);
        return tensor != nullptr && tensor->onHost ? TensorLocation::kHOST : TensorLocation::kDEVICE;
    }

    int32_t getNbIOTensors() const noexcept override { return static_cast<int32_t>(mPlan->tensors().size()); }

    char const* getIOTensorName(int32_t number) const noexcept override {
        return std::next(mPlan->tensors().begin(), number)->first.c_str();
    }

    TensorIOMode getTensorIOMode(char const* name) const noexcept override {
        Tensor const* const tensor = find(name);
        if (tensor == nullptr) return TensorIOMode::kNONE;
        return tensor->isInput ? TensorIOMode::kINPUT : TensorIOMode::kOUTPUT;
    }

private:
    Tensor const* find(char const* name) const {
        auto const found = mPlan->tensors().find(name);
        return found == mPlan->tensors().end() ? nullptr : &found->second;
    }

    std::shared_ptr<Plan const> mPlan;
    ILogger& mLogger;
    Owner::Share mRuntime;
    Owner mOwner;
};

// A runtime's own registry: it accepts a library that exports plugins (`getCreators`).
class Registry final : public RestOfPluginRegistry {
public:
    explicit Registry(ILogger& logger) : mLogger(logger) {}
    ~Registry() noexcept override {
        if (mLibrary != nullptr) dlclose(mLibrary);
    }

    PluginLibraryHandle loadLibrary(AsciiChar const* path) noexcept override {
        mLibrary = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        auto const creators = mLibrary == nullptr ? nullptr : dlsym(mLibrary, "getCreators");
        if (creators == nullptr) {
            refuse(mLogger, dlerror());
            return nullptr;
        }
        reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(creators)(mCreators);
        return mLibrary;
    }

    bool hasPlugins() const { return mCreators > 0; }

private:
    ILogger& mLogger;
    void* mLibrary = nullptr;
    int32_t mCreators = 0;
};

class Runtime final : public IRuntime, public RestOfRuntime, Counted {
public:
    explicit Runtime(ILogger& logger) : mLogger(logger), mRegistry(logger) { mImpl = this; }
    ~Runtime() noexcept override { mOwner.leave("an engine"); }

    IRuntime* getPImpl() noexcept override { return this; }
    IPluginRegistry& getPluginRegistry() noexcept override { return mRegistry; }

    using RestOfRuntime::deserializeCudaEngine;
    ICudaEngine* deserializeCudaEngine(void const* bytes, size_t size) noexcept override {
        if (fails("deserializeCudaEngine")) {
            refuse(mLogger, "made to fail");
            return nullptr;
        }
        std::shared_ptr<Plan const> plan = Plan::of(std::string(static_cast<char const*>(bytes), size));
        if (!plan) refuse(mLogger, "the magic tag does not match");
        if (plan && plan->needsPlugins() && !mRegistry.hasPlugins()) {
            refuse(mLogger, "no plugin ThresholdGather");
            plan = nullptr;
        }
        return plan ? new Engine(std::move(plan), mLogger, mOwner.share()) : nullptr;
    }

private:
    ILogger& mLogger;
    Registry mRegistry;
    Owner mOwner;
};

}  // namespace
}  // namespace standin

extern "C" {

void* createInferRuntime_INTERNAL(void* logger, int32_t version) noexcept {
    if (version != NV_TENSORRT_VERSION) standin::misuse("the runtime was requested in another version");
    auto& log = *static_cast<nvinfer1::ILogger*>(logger);
    if (!standin::fails("createInferRuntime")) return static_cast<nvinfer1::IRuntime*>(new standin::Runtime(log));
    standin::refuse(log, "made to fail");
    return nullptr;
}

int32_t getInferLibMajorVersion() noexcept {
    return standin::machine().major != 0 ? standin::machine().major : NV_TENSORRT_MAJOR;
}
int32_t getInferLibMinorVersion() noexcept { return NV_TENSORRT_MINOR; }
int32_t getInferLibPatchVersion() noexcept { return NV_TENSORRT_PATCH; }
int32_t getInferLibBuildVersion() noexcept { return NV_TENSORRT_BUILD; }

}  // extern "C"
