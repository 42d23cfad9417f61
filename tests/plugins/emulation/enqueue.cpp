// TensorRT's part in running a plugin: create it, ask it about its tensors and its scratch memory, attach it, tell it the
// shapes, run it.

#include <NvInferRuntime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

using namespace nvinfer1;

extern "C" IPluginCreatorInterface* const* getCreators(int32_t& count);

namespace {

constexpr size_t kAlignment = 256;  // of TensorRT's scratch memory

// A plugin as an engine recreates it: made with the numbers of a node, then from what that one stores.
IPluginV3* create(char const* name, float const* numbers, int32_t given) {
    int32_t count = 0;
    IPluginCreatorInterface* const* creators = getCreators(count);
    for (int32_t i = 0; i < count; ++i) {
        auto* creator = static_cast<IPluginCreatorV3One*>(creators[i]);
        if (std::strcmp(creator->getPluginName(), name) != 0) continue;
        PluginFieldCollection const* const names = creator->getFieldNames();
        std::vector<PluginField> fields(names->fields, names->fields + names->nbFields);
        fields.resize(static_cast<size_t>(std::min(given, names->nbFields)));
        for (size_t field = 0; field < fields.size(); ++field) fields[field].data = numbers + field;
        PluginFieldCollection const all{static_cast<int32_t>(fields.size()), fields.data()};
        std::unique_ptr<IPluginV3> const made(creator->createPlugin("node", &all, TensorRTPhase::kBUILD));
        if (made == nullptr) return nullptr;
        auto* runtime = static_cast<IPluginV3OneRuntime*>(made->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
        return creator->createPlugin("node", runtime->getFieldsToSerialize(), TensorRTPhase::kRUNTIME);
    }
    return nullptr;
}

template <typename Part>
Part* part(IPluginV3& plugin, PluginCapabilityType type) {
    return static_cast<Part*>(plugin.getCapabilityInterface(type));
}

}  // namespace

// Tensors are inputs, then outputs: TensorRT's number of the type, and dimensions. `most`: the first dimension of a profile.
// numbers: attributes of the node, `given` of them. calls: how often it is run.
// Returns what the plugin's enqueue returns, or the negative number of the step that failed before it.
extern "C" int enqueue(char const* name, int32_t inputs, int32_t outputs, int32_t const* types, int32_t const* ranks,
                       int64_t const (*dims)[Dims::MAX_DIMS], void* const* buffers, int64_t most, float const* numbers,
                       int32_t given, int32_t calls) {
    std::unique_ptr<IPluginV3> const plugin(create(name, numbers, given));
    if (plugin == nullptr) return -10;
    std::vector<PluginTensorDesc> tensors(static_cast<size_t>(inputs + outputs));
    std::vector<DynamicPluginTensorDesc> dynamic(tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
        tensors[i] = PluginTensorDesc{};
        tensors[i].type = static_cast<DataType>(types[i]);
        tensors[i].format = TensorFormat::kLINEAR;
        tensors[i].dims.nbDims = ranks[i];
        for (int32_t axis = 0; axis < ranks[i]; ++axis) tensors[i].dims.d[axis] = dims[i][axis];
        dynamic[i] = DynamicPluginTensorDesc{tensors[i], tensors[i].dims, tensors[i].dims, tensors[i].dims};
    }
    dynamic[0].max.d[0] = most;
    auto* build = part<IPluginV3OneBuild>(*plugin, PluginCapabilityType::kBUILD);
    for (int32_t i = 0; i < inputs + outputs; ++i) {
        if (!build->supportsFormatCombination(i, dynamic.data(), inputs, outputs)) return -20 - i;
    }
    size_t const bytes = build->getWorkspaceSize(dynamic.data(), inputs, dynamic.data() + inputs, outputs);
    std::vector<char> memory(bytes + kAlignment, static_cast<char>(0xA5));
    void* workspace = memory.data();
    size_t space = memory.size();
    if (std::align(kAlignment, bytes, workspace, space) == nullptr) return -40;
    auto* runtime = part<IPluginV3OneRuntime>(*plugin, PluginCapabilityType::kRUNTIME);
    std::unique_ptr<IPluginV3> const attached(runtime->attachToContext(nullptr));
    runtime = part<IPluginV3OneRuntime>(*attached, PluginCapabilityType::kRUNTIME);
    if (runtime->onShapeChange(tensors.data(), inputs, tensors.data() + inputs, outputs) != 0) return -50;
    int status = 0;
    for (int32_t call = 0; call < calls && status == 0; ++call) {
        status = runtime->enqueue(tensors.data(), tensors.data() + inputs, buffers, buffers + inputs, workspace, nullptr);
    }
    return status;
}
