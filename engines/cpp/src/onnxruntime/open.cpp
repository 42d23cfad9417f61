#include <string>

#include "files.h"
#include "gsx/onnxruntime.h"
#include "onnxruntime/engine.h"

namespace gsx {
namespace {

// Whether ONNX Runtime's products of uint8 rows and int8 weights are wrong for large codes here: x86 with AVX2 and without
// VNNI (gsx_engines/lowering/for_onnxruntime/probe.py). Where this cannot be known, as if they were: it only costs time.
bool productsSaturate() {
#if defined(__x86_64__) && defined(__GNUC__)
    return !__builtin_cpu_supports("avx512vnni");
#else
    return true;
#endif
}

// As in gsx_engines/runners/session.py, which says why.
std::map<std::string, std::string> configOf(Manifest const& manifest) {
    std::map<std::string, std::string> config;
    if (!manifest.quantization) {
        if (manifest.decoder.loops && manifest.decoder.loops->most > 1) config["session.disable_prepacking"] = "1";
        return config;
    }
    if (manifest.quantization->isFloat8 || (manifest.quantization->quantizesActivations && productsSaturate())) {
        config["session.disable_quant_qdq"] = "1";
    } else {
        config["session.qdq_matmulnbits_block_size"] = "128";
    }
    return config;
}

// Refuse what needs the graph to be changed before it runs on a CPU: Python does that.
void checkRuns(Bundle const& bundle) {
    std::string const what = "bundle " + bundle.directory.string() + ": ";
    std::string const todo = "run it with gsx generate, or export again without ";
    if (bundle.manifest.precision == "bf16") {
        throw EngineError(what + "ONNX Runtime has no bfloat16 products on a CPU",
                          {"precision fp32 or fp16", "bf16", todo + "--precision bf16"});
    }
    if (bundle.manifest.hasKvCache) {
        throw EngineError(what + "K and V in 8 bits do not run here", {{}, {}, todo + "--kv-cache"});
    }
}

}  // namespace

Model openModelOnCpu(std::filesystem::path const& directory, Drafting const& drafting, CpuOptions const& options) {
    Bundle const bundle = openBundle(directory);
    checkRuns(bundle);
    SessionSettings const settings{options.threads, configOf(bundle.manifest)};
    auto const makeEngine = [&](std::string const& graph) -> std::unique_ptr<Engine> {
        auto const entry = bundle.manifest.graphs.find(graph);
        if (entry == bundle.manifest.graphs.end()) throw EngineError("bundle " + directory.string() + ": has no graph " + graph);
        std::filesystem::path const path = directory / entry->second.file.file;
        std::optional<std::string> const content = contentOf(path);
        if (!content) throw BundleError(path.string() + ": cannot be read");
        return std::make_unique<OnnxRuntimeEngine>(bundle.manifest, graph, *content, directory, settings);
    };
    return Model(bundle, entryForOnnxRuntime(bundle.manifest), makeEngine, drafting);
}

}  // namespace gsx
