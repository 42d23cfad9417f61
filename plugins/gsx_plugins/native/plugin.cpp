// The plugin class, which works from an op's description, and the functions that TensorRT looks for in the library.

#include "native/plugin.h"

#include <cuda_runtime_api.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <new>
#include <vector>

using namespace nvinfer1;

namespace gsx {
namespace {

constexpr int32_t kFailed = -1;

ILoggerFinder* gLoggerFinder = nullptr;

__attribute__((format(printf, 1, 2))) void logError(char const* format, ...) noexcept {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    ILogger* logger = gLoggerFinder != nullptr ? gLoggerFinder->findLogger() : nullptr;
    if (logger != nullptr) {
        logger->log(ILogger::Severity::kERROR, text);
    } else {
        std::fprintf(stderr, "gsx: %s\n", text);
    }
}

char const* nameOf(DataType type) noexcept {
    switch (type) {
    case DataType::kFLOAT: return "float32";
    case DataType::kHALF: return "float16";
    case DataType::kBF16: return "bfloat16";
    case DataType::kINT8: return "int8";
    case DataType::kINT32: return "int32";
    case DataType::kINT64: return "int64";
    case DataType::kBOOL: return "bool";
    default: return "a type that the op does not support";
    }
}

bool isRowType(DataType type) noexcept {
    return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
}

// Whether a tensor may have this type if the rows have the type `rows`.
bool allowed(Element element, DataType type, DataType rows) noexcept {
    switch (element) {
    case Element::kRow: return isRowType(type) && type == rows;
    case Element::kScore: return type == DataType::kFLOAT;
    case Element::kPlace: return type == DataType::kINT64;
    case Element::kCodes: return type == DataType::kINT32;
    case Element::kFlag: return type == DataType::kBOOL;
    }
    return false;
}

// Sizes by letter.
class Sizes {
public:
    static constexpr int64_t kUnknown = -1;

    int64_t& of(char letter) noexcept { return mSizes[static_cast<unsigned char>(letter) % kLetters]; }
    Sizes() noexcept {
        for (int64_t& size : mSizes) size = kUnknown;
    }

private:
    static constexpr int kLetters = 128;
    int64_t mSizes[kLetters];
};

// Check the known sizes against each other; unknown ones are negative. `rankOf(input)` returns the number of dimensions,
// `sizeAt(input, axis)` a size.
template <typename RankOf, typename SizeAt>
bool sizesFit(Op const& op, RankOf rankOf, SizeAt sizeAt) noexcept {
    Sizes sizes;
    for (int32_t input = 0; input < op.inputs; ++input) {
        Tensor const& tensor = op.tensors[input];
        if (rankOf(input) == 0) continue;
        for (int32_t axis = 0; tensor.shape[axis] != '\0'; ++axis) {
            int64_t const found = sizeAt(input, axis);
            if (found < 0) continue;
            char const letter = tensor.shape[axis];
            if (letter == 'G') {
                if (found != 1 && sizes.of('H') >= 0 && found != sizes.of('H')) {
                    logError("%s: input %s: axis %d has size %lld, expected 1 or %lld", op.name, tensor.name, axis,
                             static_cast<long long>(found), static_cast<long long>(sizes.of('H')));
                    return false;
                }
                continue;
            }
            int64_t& known = sizes.of(letter);
            if (known == Sizes::kUnknown) known = letter == '1' ? 1 : found;
            if (known != found) {
                logError("%s: input %s: axis %d has size %lld, expected %lld", op.name, tensor.name, axis,
                         static_cast<long long>(found), static_cast<long long>(known));
                return false;
            }
        }
    }
    return true;
}

bool ranksFit(Op const& op, int32_t input, int32_t found) noexcept {
    auto const expected = static_cast<int32_t>(std::strlen(op.tensors[input].shape));
    if (found == expected || (found == 0 && op.tensors[input].orNumber)) return true;
    logError("%s: input %s has %d dimensions, expected %d", op.name, op.tensors[input].name, found, expected);
    return false;
}

bool countsFit(Op const& op, int32_t inputs, int32_t outputs) noexcept {
    if (inputs == op.inputs && outputs == op.outputs) return true;
    logError("%s: has %d inputs and %d outputs, expected %d and %d", op.name, inputs, outputs, op.inputs, op.outputs);
    return false;
}

int32_t countNumbers(Op const& op) noexcept {
    int32_t count = 0;
    while (op.numbers[count] != nullptr) ++count;
    return count;
}

// Counters in the GPU's memory. A context has its own, since its calls do not overlap. Without memory there are none, and
// the op clears some in its scratch memory in each call instead.
class Counters {
public:
    Counters() noexcept = default;
    Counters(Counters const&) = delete;
    Counters& operator=(Counters const&) = delete;
    ~Counters() { cudaFree(mAt); }

    void allocate() noexcept {
        constexpr size_t kBytes = sizeof(uint32_t) * kCounters;
        void* at = nullptr;
        if (cudaMalloc(&at, kBytes) != cudaSuccess) {
            cudaGetLastError();  // it is nobody else's
            return;
        }
        mAt = static_cast<uint32_t*>(at);
        // Another stream may use them next.
        if (cudaMemset(mAt, 0, kBytes) == cudaSuccess && cudaStreamSynchronize(nullptr) == cudaSuccess) return;
        cudaGetLastError();
        cudaFree(mAt);
        mAt = nullptr;
    }
    uint32_t* at() const noexcept { return mAt; }

private:
    uint32_t* mAt = nullptr;
};

class Plugin final : public IPluginV3,
                     public IPluginV3OneCore,
                     public IPluginV3OneBuild,
                     public IPluginV3OneRuntime {
public:
    // Args: numbers: as many as the op has; null if it has none.
    Plugin(Op const& op, float const* numbers) noexcept : mOp(op) {
        int32_t const count = countNumbers(op);
        for (int32_t i = 0; i < count; ++i) {
            mNumbers[i] = numbers[i];
            mFieldList[i] = PluginField(op.numbers[i], &mNumbers[i], PluginFieldType::kFLOAT32, 1);
        }
        mFields = {count, mFieldList};
    }

    // IPluginV3
    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
        switch (type) {
        case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
        case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
        case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }
    IPluginV3* clone() noexcept override { return new (std::nothrow) Plugin(mOp, mNumbers); }

    // IPluginV3OneCore
    AsciiChar const* getPluginName() const noexcept override { return mOp.name; }
    AsciiChar const* getPluginVersion() const noexcept override { return kVersion; }
    AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }

    // IPluginV3OneBuild
    int32_t getNbOutputs() const noexcept override { return mOp.outputs; }

    int32_t getOutputDataTypes(DataType* outputTypes, int32_t nbOutputs, DataType const* inputTypes,
                               int32_t nbInputs) const noexcept override {
        if (!countsFit(mOp, nbInputs, nbOutputs)) return kFailed;
        DataType const rows = inputTypes[0];
        for (int32_t input = 0; input < nbInputs; ++input) {
            Tensor const& tensor = mOp.tensors[input];
            if (allowed(tensor.element, inputTypes[input], rows)) continue;
            char const* expected = tensor.element == Element::kScore   ? "float32"
                                   : tensor.element == Element::kPlace ? "int64"
                                   : tensor.element == Element::kCodes ? "int32"
                                   : tensor.element == Element::kFlag  ? "bool"
                                   : input > 0 && isRowType(rows)      ? nameOf(rows)
                                                                       : "float32, float16 or bfloat16";
            logError("%s: input %s is %s, expected %s", mOp.name, tensor.name, nameOf(inputTypes[input]), expected);
            return kFailed;
        }
        for (int32_t output = 0; output < nbOutputs; ++output) {
            Element const element = mOp.tensors[nbInputs + output].element;
            outputTypes[output] = element == Element::kRow     ? rows
                                  : element == Element::kScore ? DataType::kFLOAT
                                                               : DataType::kINT64;
        }
        return 0;
    }

    int32_t getOutputShapes(DimsExprs const* inputs, int32_t nbInputs, DimsExprs const*, int32_t, DimsExprs* outputs,
                            int32_t nbOutputs, IExprBuilder& builder) noexcept override {
        if (!countsFit(mOp, nbInputs, nbOutputs)) return kFailed;
        for (int32_t input = 0; input < nbInputs; ++input) {
            if (!ranksFit(mOp, input, inputs[input].nbDims)) return kFailed;
        }
        auto const rank = [&](int32_t input) { return inputs[input].nbDims; };
        auto const constant = [&](int32_t input, int32_t axis) {
            IDimensionExpr const* size = inputs[input].d[axis];
            return size->isConstant() ? size->getConstantValue() : Sizes::kUnknown;
        };
        if (!sizesFit(mOp, rank, constant)) return kFailed;
        IDimensionExpr const* kept = nullptr;  // the number of kept rows, if it depends on the data
        for (int32_t output = 0; output < nbOutputs; ++output) {
            char const* shape = mOp.tensors[nbInputs + output].shape;
            outputs[output].nbDims = static_cast<int32_t>(std::strlen(shape));
            for (int32_t axis = 0; shape[axis] != '\0'; ++axis) {
                IDimensionExpr const* size = find(inputs, shape[axis]);
                if (size == nullptr) {
                    if (kept == nullptr) kept = declareKept(inputs, builder);
                    size = kept;
                }
                if (size == nullptr) {
                    logError("%s: TensorRT could not create a size tensor", mOp.name);
                    return kFailed;
                }
                outputs[output].d[axis] = size;
            }
        }
        return 0;
    }

    bool supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const* tensors, int32_t nbInputs,
                                   int32_t nbOutputs) noexcept override {
        if (nbInputs != mOp.inputs || nbOutputs != mOp.outputs || position >= nbInputs + nbOutputs) return false;
        PluginTensorDesc const& candidate = tensors[position].desc;
        return candidate.format == TensorFormat::kLINEAR &&
               allowed(mOp.tensors[position].element, candidate.type, tensors[0].desc.type);
    }

    int32_t configurePlugin(DynamicPluginTensorDesc const* inputs, int32_t nbInputs, DynamicPluginTensorDesc const*,
                            int32_t nbOutputs) noexcept override {
        if (!countsFit(mOp, nbInputs, nbOutputs)) return kFailed;
        for (int32_t input = 0; input < nbInputs; ++input) {
            if (!ranksFit(mOp, input, inputs[input].desc.dims.nbDims)) return kFailed;
        }
        auto const rank = [&](int32_t input) { return inputs[input].desc.dims.nbDims; };
        auto const size = [&](int32_t input, int32_t axis) { return inputs[input].desc.dims.d[axis]; };
        return sizesFit(mOp, rank, size) ? 0 : kFailed;
    }

    size_t getWorkspaceSize(DynamicPluginTensorDesc const* inputs, int32_t, DynamicPluginTensorDesc const*,
                            int32_t) const noexcept override {
        return mOp.workspace({inputs});
    }

    char const* getTimingCacheID() noexcept override { return kVersion; }

    // IPluginV3OneRuntime
    int32_t onShapeChange(PluginTensorDesc const* inputs, int32_t nbInputs, PluginTensorDesc const*,
                          int32_t nbOutputs) noexcept override {
        if (!countsFit(mOp, nbInputs, nbOutputs)) return kFailed;
        for (int32_t input = 0; input < nbInputs; ++input) {
            if (!ranksFit(mOp, input, inputs[input].dims.nbDims)) return kFailed;
        }
        auto const rank = [&](int32_t input) { return inputs[input].dims.nbDims; };
        auto const size = [&](int32_t input, int32_t axis) { return inputs[input].dims.d[axis]; };
        return sizesFit(mOp, rank, size) ? 0 : kFailed;
    }

    int32_t enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const*, void const* const* inputs,
                    void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
        gsx_status const status = mOp.run({inputDesc, inputs, outputs, workspace, stream, mNumbers, mCounters.at()});
        if (status == GSX_OK) return 0;
        logError("%s: %s (status %d)", mOp.name, gsx_error_string(status), status);
        return kFailed;
    }

    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override {
        auto* const made = new (std::nothrow) Plugin(mOp, mNumbers);
        if (made != nullptr && mOp.counts) made->mCounters.allocate();
        return made;
    }
    PluginFieldCollection const* getFieldsToSerialize() noexcept override { return &mFields; }

private:
    // The input dimension that a letter stands for, or null.
    IDimensionExpr const* find(DimsExprs const* inputs, char letter) const noexcept {
        for (int32_t input = 0; input < mOp.inputs; ++input) {
            char const* shape = mOp.tensors[input].shape;
            char const* at = std::strchr(shape, letter);
            if (at != nullptr) return inputs[input].d[at - shape];
        }
        return nullptr;
    }

    // The number of kept rows: stored in the last output, at most the number of tokens, tuned for half of them.
    IDimensionExpr const* declareKept(DimsExprs const* inputs, IExprBuilder& builder) const noexcept {
        IDimensionExpr const* tokens = inputs[0].d[0];
        IDimensionExpr const* two = builder.constant(2);
        if (two == nullptr) return nullptr;
        IDimensionExpr const* half = builder.operation(DimensionOperation::kCEIL_DIV, *tokens, *two);
        return half == nullptr ? nullptr : builder.declareSizeTensor(mOp.outputs - 1, *half, *tokens);
    }

    Op const& mOp;
    float mNumbers[kMaxNumbers] = {};
    PluginField mFieldList[kMaxNumbers];
    PluginFieldCollection mFields{};
    Counters mCounters;
};

constexpr int32_t kOwnOps = 3;

// All creators, which live as long as the library.
struct Creators {
    Creator own[kOwnOps] = {Creator(kTopKGather), Creator(kThresholdGather), Creator(kGatedScatterAdd)};
    std::vector<Creator> steps;
    std::vector<IPluginCreatorInterface*> all;

    Creators() {
        steps.reserve(std::size(kProductOps) + std::size(kAttentionOps));
        for (Op const& op : kProductOps) steps.emplace_back(op);
        for (Op const& op : kAttentionOps) steps.emplace_back(op);
        for (Creator& creator : own) all.push_back(&creator);
        for (Creator& creator : steps) all.push_back(&creator);
    }
};

Creators const gCreators;

}  // namespace

gsx_type rowType(DataType type) noexcept {
    return type == DataType::kHALF ? GSX_FLOAT16 : type == DataType::kBF16 ? GSX_BFLOAT16 : GSX_FLOAT32;
}

Creator::Creator(Op const& op) noexcept : mOp(op) {
    int32_t const count = countNumbers(op);
    for (int32_t i = 0; i < count; ++i) mNames[i] = PluginField(op.numbers[i], nullptr, PluginFieldType::kFLOAT32, 1);
    mFields = {count, mNames};
}

IPluginV3* Creator::createPlugin(AsciiChar const* name, PluginFieldCollection const* fields, TensorRTPhase) noexcept {
    char const* const node = name != nullptr ? name : "(without a name)";
    int32_t const count = countNumbers(mOp);
    float numbers[kMaxNumbers] = {};
    bool given[kMaxNumbers] = {};
    for (int32_t i = 0; fields != nullptr && i < fields->nbFields; ++i) {
        PluginField const& field = fields->fields[i];
        if (field.name == nullptr) continue;
        // These two only select the plugin.
        if (std::strcmp(field.name, "plugin_namespace") == 0 || std::strcmp(field.name, "plugin_version") == 0) continue;
        int32_t number = 0;
        while (number < count && std::strcmp(mOp.numbers[number], field.name) != 0) ++number;
        if (number == count) {
            logError("%s: node %s has a field '%s', expected %s", mOp.name, node, field.name,
                     count == 0 ? "no fields" : "one that the op has");
            return nullptr;
        }
        if (field.type != PluginFieldType::kFLOAT32 || field.length != 1 || field.data == nullptr) {
            logError("%s: node %s: the field '%s' is not one float32", mOp.name, node, field.name);
            return nullptr;
        }
        numbers[number] = *static_cast<float const*>(field.data);
        given[number] = true;
    }
    for (int32_t number = 0; number < count; ++number) {
        if (given[number]) continue;
        logError("%s: node %s has no field '%s'", mOp.name, node, mOp.numbers[number]);
        return nullptr;
    }
    IPluginV3* plugin = new (std::nothrow) Plugin(mOp, numbers);
    if (plugin == nullptr) logError("%s: out of memory", mOp.name);
    return plugin;
}

}  // namespace gsx

extern "C" GSX_API void setLoggerFinder(ILoggerFinder* finder) {
    if (finder != nullptr) gsx::gLoggerFinder = finder;
}

extern "C" GSX_API IPluginCreatorInterface* const* getCreators(int32_t& count) {
    count = static_cast<int32_t>(gsx::gCreators.all.size());
    return gsx::gCreators.all.data();
}
