// ONNX Runtime's C API, as far as it is used here: a session of one graph, and tensors. Everything is released by itself, and
// every failure is an EngineError.

#pragma once

#include <onnxruntime_c_api.h>

#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "gsx/engine.h"

namespace gsx {

// The API; throws EngineError if the library is older than the headers.
OrtApi const& onnxRuntime();

// Throw an EngineError if a call failed; `doing` says what was tried.
void checkOnnxRuntime(OrtStatus* status, std::string const& doing);

struct ReleaseOnnxRuntime {
    void operator()(OrtEnv* made) const { onnxRuntime().ReleaseEnv(made); }
    void operator()(OrtSession* made) const { onnxRuntime().ReleaseSession(made); }
    void operator()(OrtSessionOptions* made) const { onnxRuntime().ReleaseSessionOptions(made); }
    void operator()(OrtTypeInfo* made) const { onnxRuntime().ReleaseTypeInfo(made); }
    void operator()(OrtTensorTypeAndShapeInfo* made) const { onnxRuntime().ReleaseTensorTypeAndShapeInfo(made); }
    void operator()(OrtMemoryInfo* made) const { onnxRuntime().ReleaseMemoryInfo(made); }
    void operator()(OrtValue* made) const { onnxRuntime().ReleaseValue(made); }
};
template <typename T>
using OnnxRuntimeOwned = std::unique_ptr<T, ReleaseOnnxRuntime>;
using Tensor = OnnxRuntimeOwned<OrtValue>;

// Bytes of an element. Throws EngineError for types that no graph of gsx has.
size_t bytesOf(ONNXTensorElementDataType type);

// A tensor over memory on the host, which must outlive it.
Tensor tensorOver(void* data, Shape const& shape, ONNXTensorElementDataType type);
// A tensor's memory and shape.
void* dataOf(OrtValue& tensor);
Shape shapeOf(OrtValue const& tensor);

// The settings that a session is opened with; `config` has entries of ONNX Runtime's configuration.
struct SessionSettings {
    std::optional<int> threads;
    std::map<std::string, std::string> config;
};

class Session {
public:
    // `model`: a serialized ONNX model. `directory`: where its weights file is.
    Session(std::string const& model, std::filesystem::path const& directory, SessionSettings const& settings);

    // Element types by name. (An output without a type in the graph has the type that ONNX Runtime infers.)
    std::map<std::string, ONNXTensorElementDataType> const& inputs() const { return mInputs; }
    std::map<std::string, ONNXTensorElementDataType> const& outputs() const { return mOutputs; }

    // One call. Returns the outputs that are wanted, in their order, in memory of ONNX Runtime.
    std::vector<Tensor> run(std::map<std::string, OrtValue const*> const& feeds, std::vector<std::string> const& wanted);

private:
    OnnxRuntimeOwned<OrtSession> mSession;
    std::map<std::string, ONNXTensorElementDataType> mInputs;
    std::map<std::string, ONNXTensorElementDataType> mOutputs;
};

}  // namespace gsx
