#include "onnxruntime/session.h"

#include <memory>

#include "gsx/error.h"
#include "gsx/onnxruntime.h"

namespace gsx {
namespace {

// Warnings of ONNX Runtime are about the defaults of our run-time inputs, which are intended.
constexpr int kErrorsOnly = 3;

OrtEnv& environment() {
    static OnnxRuntimeOwned<OrtEnv> const made = [] {
        OrtEnv* env = nullptr;
        checkOnnxRuntime(onnxRuntime().CreateEnv(ORT_LOGGING_LEVEL_ERROR, "gsx", &env), "starting ONNX Runtime");
        return OnnxRuntimeOwned<OrtEnv>(env);
    }();
    return *made;
}

// Type of a session's input or output.
ONNXTensorElementDataType typeOf(OrtTypeInfo const& info) {
    OrtTensorTypeAndShapeInfo const* tensor = nullptr;
    checkOnnxRuntime(onnxRuntime().CastTypeInfoToTensorInfo(&info, &tensor), "reading a graph's types");
    ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    if (tensor != nullptr) checkOnnxRuntime(onnxRuntime().GetTensorElementType(tensor, &type), "reading a graph's types");
    return type;
}

using CountOf = OrtStatus*(ORT_API_CALL*)(OrtSession const*, size_t*);
using NameOf = OrtStatus*(ORT_API_CALL*)(OrtSession const*, size_t, OrtAllocator*, char**);
using TypeOf = OrtStatus*(ORT_API_CALL*)(OrtSession const*, size_t, OrtTypeInfo**);

std::map<std::string, ONNXTensorElementDataType> typesOf(OrtSession const& session, CountOf countThem, NameOf nameOne,
                                                         TypeOf typeOne) {
    constexpr char const* kDoing = "reading a graph's inputs and outputs";
    OrtAllocator* allocator = nullptr;
    checkOnnxRuntime(onnxRuntime().GetAllocatorWithDefaultOptions(&allocator), kDoing);
    size_t count = 0;
    checkOnnxRuntime(countThem(&session, &count), kDoing);
    std::map<std::string, ONNXTensorElementDataType> types;
    for (size_t i = 0; i < count; ++i) {
        char* text = nullptr;
        checkOnnxRuntime(nameOne(&session, i, allocator, &text), kDoing);
        std::string const name = text;
        checkOnnxRuntime(onnxRuntime().AllocatorFree(allocator, text), kDoing);
        OrtTypeInfo* info = nullptr;
        checkOnnxRuntime(typeOne(&session, i, &info), kDoing);
        types[name] = typeOf(*OnnxRuntimeOwned<OrtTypeInfo>(info));
    }
    return types;
}

}  // namespace

char const* onnxRuntimeVersion() noexcept { return OrtGetApiBase()->GetVersionString(); }

OrtApi const& onnxRuntime() {
    static OrtApi const* const api = OrtGetApiBase()->GetApi(ORT_API_VERSION);
    if (api == nullptr) {
        throw EngineError("this ONNX Runtime is older than the headers that gsx was built with",
                          {"version 1." + std::to_string(ORT_API_VERSION) + " or later", onnxRuntimeVersion(),
                           "install a newer one, or build gsx with the headers of this one"});
    }
    return *api;
}

void checkOnnxRuntime(OrtStatus* status, std::string const& doing) {
    if (status == nullptr) return;
    std::string const message = onnxRuntime().GetErrorMessage(status);
    onnxRuntime().ReleaseStatus(status);
    throw EngineError("ONNX Runtime " + std::string(onnxRuntimeVersion()) + " failed at " + doing,
                      {{}, message.substr(0, message.find('\n')), {}});
}

size_t bytesOf(ONNXTensorElementDataType type) {
    switch (type) {
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: return sizeof(float);
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64: return sizeof(int64_t);
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return sizeof(uint16_t);
        default: throw EngineError("the graph has a tensor of an unknown type", {"float32, float16 or int64", std::to_string(type), {}});
    }
}

Tensor tensorOver(void* data, Shape const& shape, ONNXTensorElementDataType type) {
    static OnnxRuntimeOwned<OrtMemoryInfo> const host = [] {
        OrtMemoryInfo* info = nullptr;
        checkOnnxRuntime(onnxRuntime().CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &info), "describing memory");
        return OnnxRuntimeOwned<OrtMemoryInfo>(info);
    }();
    OrtValue* made = nullptr;
    checkOnnxRuntime(onnxRuntime().CreateTensorWithDataAsOrtValue(host.get(), data, countOf(shape) * bytesOf(type), shape.data(),
                                                                  shape.size(), type, &made),
                     "making a tensor");
    return Tensor(made);
}

void* dataOf(OrtValue& tensor) {
    void* data = nullptr;
    checkOnnxRuntime(onnxRuntime().GetTensorMutableData(&tensor, &data), "reading a tensor");
    return data;
}

Shape shapeOf(OrtValue const& tensor) {
    OrtTensorTypeAndShapeInfo* made = nullptr;
    checkOnnxRuntime(onnxRuntime().GetTensorTypeAndShape(&tensor, &made), "reading a tensor");
    OnnxRuntimeOwned<OrtTensorTypeAndShapeInfo> const info(made);
    size_t rank = 0;
    checkOnnxRuntime(onnxRuntime().GetDimensionsCount(info.get(), &rank), "reading a tensor");
    Shape shape(rank);
    checkOnnxRuntime(onnxRuntime().GetDimensions(info.get(), shape.data(), rank), "reading a tensor");
    return shape;
}

Session::Session(std::string const& model, std::filesystem::path const& directory, SessionSettings const& settings) {
    OrtApi const& api = onnxRuntime();
    OrtSessionOptions* made = nullptr;
    checkOnnxRuntime(api.CreateSessionOptions(&made), "making a session's options");
    OnnxRuntimeOwned<OrtSessionOptions> const options(made);
    auto const set = [&](OrtStatus* status) { checkOnnxRuntime(status, "setting a session's options"); };
    set(api.SetSessionLogSeverityLevel(options.get(), kErrorsOnly));
    if (settings.threads) set(api.SetIntraOpNumThreads(options.get(), *settings.threads));
    auto const entry = [&](char const* key, std::string const& value) {
        set(api.AddSessionConfigEntry(options.get(), key, value.c_str()));
    };
    // As in gsx_engines/runners/session.py, which says why.
    entry("session.force_spinning_stop", "1");
    entry("session.model_external_initializers_file_folder_path", directory.string());
    for (auto const& [key, value] : settings.config) entry(key.c_str(), value);
    OrtSession* session = nullptr;
    OrtStatus* const status = api.CreateSessionFromArray(&environment(), model.data(), model.size(), options.get(), &session);
    checkOnnxRuntime(status, "loading a graph of " + directory.string());
    mSession.reset(session);
    mInputs = typesOf(*session, api.SessionGetInputCount, api.SessionGetInputName, api.SessionGetInputTypeInfo);
    // Inputs with a default are initializers too, and are listed separately.
    mInputs.merge(typesOf(*session, api.SessionGetOverridableInitializerCount, api.SessionGetOverridableInitializerName,
                          api.SessionGetOverridableInitializerTypeInfo));
    mOutputs = typesOf(*session, api.SessionGetOutputCount, api.SessionGetOutputName, api.SessionGetOutputTypeInfo);
}

std::vector<Tensor> Session::run(std::map<std::string, OrtValue const*> const& feeds, std::vector<std::string> const& wanted) {
    std::vector<char const*> names;
    std::vector<OrtValue const*> values;
    for (auto const& [name, value] : feeds) {
        names.push_back(name.c_str());
        values.push_back(value);
    }
    std::vector<char const*> outputs;
    for (std::string const& name : wanted) outputs.push_back(name.c_str());
    std::vector<OrtValue*> raw(wanted.size(), nullptr);
    OrtStatus* const status = onnxRuntime().Run(mSession.get(), nullptr, names.data(), values.data(), values.size(),
                                                outputs.data(), outputs.size(), raw.data());
    std::vector<Tensor> found;
    for (OrtValue* const one : raw) found.emplace_back(one);
    checkOnnxRuntime(status, "running a graph");
    return found;
}

}  // namespace gsx
