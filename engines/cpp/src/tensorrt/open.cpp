#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "gsx/error.h"
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
    std::vector<EngineSet> const steps = findSteps(bundle, engines, machine, options.pluginLibrary, options.onWarning);
    std::optional<std::filesystem::path> library = engines.library;
    for (EngineSet const& one : steps) {
        if (!library) library = one.library;
    }
    auto const tensorrt = std::make_shared<TensorRT>(library);
    auto const engineOf = [&](EngineSet const& set) {
        return [&, &set = set, tensorrt](std::string const& graph) -> std::unique_ptr<Engine> {
            std::string const plan = readEngine(set, graph, buildCommand(bundle, *set.entry));
            EngineGraph const& record = set.entry->graphs.at(graph);
            bool const fixedRows = recordable(record);
            return std::make_unique<CudaEngine>(
                tensorrt, plan,
                CallOptions{options.cudaGraphs && fixedRows, fixedRows,
                            kernelCachePath(record.file.sha256, device.capability)});
        };
    };
    auto const stepOf = [&](EngineSet const& set) {
        return [&options, make = engineOf(set)](std::string const& graph) -> std::unique_ptr<Engine> {
            try {
                return make(graph);
            } catch (LostGpuError const&) {
                throw;
            } catch (EngineError const& error) {  // a damaged file, or no memory for the weights once more
                leftOut(error, options.onWarning);
                return nullptr;
            }
        };
    };
    std::vector<Model::Engines> made;
    for (EngineSet const& one : steps) made.push_back({*one.entry, stepOf(one)});
    return Model(bundle, *engines.entry, engineOf(engines), drafting, made);
}

}  // namespace gsx
