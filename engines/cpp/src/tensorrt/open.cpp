#include <algorithm>
#include <array>
#include <string>

#include "gsx/tensorrt.h"
#include "kernel_cache.h"
#include "loading.h"
#include "tensorrt/execution.h"

namespace gsx {
namespace {

// Ops that choose tokens (gsx_engines/lowering/regions.py). After the plugin of such an op only the GPU knows the number of
// rows, and the call cannot be recorded.
constexpr std::array<char const*, 2> kChoices = {"TopKGather", "ThresholdGather"};

bool recordable(EngineGraph const& graph) {
    return std::none_of(kChoices.begin(), kChoices.end(), [&](char const* op) {
        auto const form = graph.forms.find(op);
        return form != graph.forms.end() && form->second == "plugin";
    });
}

}  // namespace

char const* backendName() noexcept { return GSX_BACKEND; }

Model openModel(std::filesystem::path const& directory, Drafting const& drafting, GpuOptions const& options) {
    Bundle const bundle = openBundle(directory);
    requireEngines(bundle, backendName());
    Device const device = firstDevice();
    Machine const machine{tensorrtVersion(), platformName(), device.name, device.capability};
    EngineSet const engines = findEngines(bundle, backendName(), machine, options.pluginLibrary);
    std::string const command = buildCommand(bundle, backendName());
    auto const tensorrt = std::make_shared<TensorRT>(engines.library);
    auto const makeEngine = [&](std::string const& graph) {
        std::string const plan = readEngine(engines, graph, command);
        EngineGraph const& record = engines.entry->graphs.at(graph);
        return std::make_unique<CudaEngine>(tensorrt, plan, options.cudaGraphs && recordable(record),
                                            kernelCachePath(record.file.sha256, device.capability));
    };
    return Model(bundle, *engines.entry, makeEngine, drafting);
}

}  // namespace gsx
