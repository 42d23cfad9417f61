#include "loading.h"

#include <sys/utsname.h>

#include <algorithm>
#include <cctype>
#include <map>
#include <utility>
#include <vector>

#include "files.h"
#include "manifest_json.h"
#include "sha256.h"
#include "text.h"

namespace gsx {
namespace {

namespace fs = std::filesystem;

constexpr char const* kEngines = "engines";
constexpr char const* kEngineFile = "engine.json";
constexpr char const* kLibraryVariable = "GSX_PLUGIN_LIBRARY";
constexpr char const* kLibraryName = "libgsx_plugins.so";
// Digits of the hash of the plugins' sources in a folder's name (gsx_plugins/library.py), and of hashes in messages.
constexpr size_t kNameDigits = 16;
constexpr size_t kShownDigits = 12;

std::string shown(std::string const& hash) { return hash.substr(0, kShownDigits); }

// A compute capability as people write it: "89" -> "8.9".
std::string dotted(std::string const& target) {
    return target.size() > 1 ? target.substr(0, target.size() - 1) + "." + target.back() : target;
}

std::optional<fs::path> findLibrary(std::optional<fs::path> const& named, PluginRecord const& record) {
    if (named) {
        if (!sizeOf(*named)) {
            throw EngineError(named->string() + ": there is no such plugin library",
                              {std::string("a ") + kLibraryName, {}, "gsx plugins build makes one"});
        }
        return named;
    }
    std::string const set = variable(kLibraryVariable);
    if (!set.empty()) {
        if (!sizeOf(set)) {
            throw EngineError(std::string(kLibraryVariable) + " names a file that does not exist",
                              {std::string("a ") + kLibraryName, "nothing at " + set,
                               "run `gsx plugins build` and unset it, or correct it"});
        }
        return set;
    }
    fs::path const built = cacheFolder() / "plugins" / record.sourceHash.substr(0, kNameDigits) / kLibraryName;
    return sizeOf(built) ? std::optional(built) : std::nullopt;
}

struct Fact {
    std::string field;
    std::string expected;
    std::string found;
};

// The first property in which engines and machine differ; unset if they fit.
std::optional<EngineError> difference(Bundle const& bundle, std::string const& name, EngineEntry const& entry,
                                      Machine const& machine, std::optional<fs::path> const& library,
                                      std::string const& command, char const* kvLayout) {
    fs::path const directory = bundle.directory / kEngines / name;
    std::string const what = "engines " + directory.string();
    std::optional<std::string> const text = contentOf(directory / kEngineFile);
    std::optional<std::string> const recorded = text ? canonicalEntry(*text) : std::nullopt;
    if (!recorded) {
        return EngineError(what + ": " + kEngineFile + " does not match gsx.json",
                           {"the entry that `gsx build` wrote", "no readable file", command});
    }
    if (*recorded != entry.canonical) {
        FieldDifference const first = firstDifference(entry.canonical, *recorded);
        return EngineError(what + ": " + first.field + " in " + kEngineFile + " does not match gsx.json",
                           {first.expected, first.found, command});
    }
    std::vector<Fact> facts = {{"kv_layout", kvLayout, entry.kvLayout},
                               {"platform", entry.platform, machine.platform},
                               {"tensorrt_version", entry.tensorrtVersion, machine.tensorrtVersion}};
    if (entry.gpu) facts.push_back({"gpu", *entry.gpu, machine.gpu});
    for (auto const& [key, graph] : entry.graphs) {
        auto const own = bundle.manifest.graphs.find(key);
        if (own == bundle.manifest.graphs.end()) continue;
        facts.push_back({key + ".onnx sha256", shown(own->second.file.sha256) + "...", shown(graph.graphSha256) + "..."});
    }
    for (auto const& [key, graph] : entry.graphs) {
        facts.push_back({"weights of " + key, shown(bundle.manifest.weights.sha256), shown(graph.weightsSha256)});
    }
    for (auto const& [field, expected, found] : facts) {
        if (expected != found) return EngineError(what + ": " + field + " differs", {expected, found, command});
    }
    if (std::find(entry.targets.begin(), entry.targets.end(), machine.capability) == entry.targets.end()) {
        std::vector<std::string> targets;
        for (std::string const& target : entry.targets) targets.push_back(dotted(target));
        std::string const here = dotted(machine.capability);
        std::string const todo = command + " --target " + here + "; if TensorRT-RTX does not know this target, gsx build " +
                                 bundle.directory.string() + " --backend tensorrt";
        return EngineError(what + ": targets do not include this GPU (" + machine.gpu + ")",
                           {here, joinedBy(", ", targets), entry.backend == "tensorrt-rtx" ? todo : command});
    }
    if (entry.plugins) {
        std::optional<std::string> found;
        if (library) found = sha256Of(*library);
        if (found != entry.plugins->sha256) {
            return EngineError(
                what + ": the plugin library differs",
                {"sha256 " + shown(entry.plugins->sha256) + "...", found ? shown(*found) + "..." : "no plugin library",
                 found ? command + " builds engines for this library; " + kLibraryVariable + " names another one"
                       : std::string("gsx plugins build, or set ") + kLibraryVariable +
                             " to the library that they were built with"});
        }
    }
    return std::nullopt;
}

// Whether a set of engines is for a backend, and for calls of all sizes.
bool isFor(EngineEntry const& entry, std::string const& backend) {
    return entry.backend == backend && entry.kvLayout != kStepLayout;
}

}  // namespace

std::string buildCommand(Bundle const& bundle, std::string const& backend) {
    return "gsx build " + bundle.directory.string() + " --backend " + backend;
}

std::string buildCommand(Bundle const& bundle, EngineEntry const& entry) {
    std::string const command = buildCommand(bundle, entry.backend);
    if (entry.kvLayout != kStepLayout) return command;
    EngineProfile const& sizes = entry.profiles.front();
    return command + " --context " + std::to_string(entry.capacity) + " --batch " + std::to_string(sizes.batch.most) + " --step " + std::to_string(sizes.tokens.most);
}

void requireEngines(Bundle const& bundle, std::string const& backend) {
    std::vector<std::string> others;
    for (auto const& [name, entry] : bundle.manifest.engines) {
        if (isFor(entry, backend)) return;
        others.push_back(name);
    }
    throw EngineError("bundle " + bundle.directory.string() + ": has no engines for " + backend,
                      {{}, others.empty() ? "none" : joinedBy(", ", others), buildCommand(bundle, backend)});
}

EngineSet findEngines(Bundle const& bundle, std::string const& backend, Machine const& machine,
                      std::optional<fs::path> const& plugins) {
    requireEngines(bundle, backend);
    std::string const command = buildCommand(bundle, backend);
    std::optional<EngineError> nearest;
    std::pair<bool, bool> least;
    for (auto const& [name, entry] : bundle.manifest.engines) {
        if (!isFor(entry, backend)) continue;
        std::optional<fs::path> const library =
            entry.plugins ? findLibrary(plugins, *entry.plugins) : std::optional<fs::path>();
        std::optional<EngineError> problem = difference(bundle, name, entry, machine, library, command, kInPlaceLayout);
        if (!problem) return {bundle.directory / kEngines / name, &entry, library};
        // Report the engines for this GPU and this TensorRT, if there are any: their message says most.
        bool const here = std::find(entry.targets.begin(), entry.targets.end(), machine.capability) != entry.targets.end();
        std::pair const distance{!here, entry.tensorrtVersion != machine.tensorrtVersion};
        if (!nearest || distance < least) {
            nearest.emplace(*problem);
            least = distance;
        }
    }
    throw *nearest;
}

std::vector<EngineSet> findSteps(Bundle const& bundle, EngineSet const& engines, Machine const& machine,
                                 std::optional<fs::path> const& plugins, Warn const& warn) {
    EngineEntry const& general = *engines.entry;
    std::map<std::pair<int64_t, int64_t>, EngineSet> fitting;
    std::map<std::pair<int64_t, int64_t>, EngineError> problems;
    std::optional<fs::path> loaded = engines.library;
    for (auto const& [name, entry] : bundle.manifest.engines) {
        bool const shares = entry.backend == general.backend && entry.capacity == general.capacity;
        if (entry.kvLayout != kStepLayout || !shares) continue;
        std::pair const size(entry.profiles.front().batch.most, entry.profiles.front().tokens.most);
        std::string const command = buildCommand(bundle, entry);
        std::optional<fs::path> const library =
            entry.plugins ? findLibrary(plugins, *entry.plugins) : std::optional<fs::path>();
        std::optional<EngineError> problem = difference(bundle, name, entry, machine, library, command, kStepLayout);
        if (!problem && library && loaded && *library != *loaded) {
            // Plugins of two libraries have the same names, so a process loads one.
            problem = EngineError("engines " + (bundle.directory / kEngines / name).string() + ": the plugin library differs",
                                  {loaded->string(), library->string(), command});
        }
        if (problem) {
            problems.insert_or_assign(size, *problem);
            continue;
        }
        if (library) loaded = library;
        fitting.insert_or_assign(size, EngineSet{bundle.directory / kEngines / name, &entry, library});
    }
    for (auto const& [size, problem] : problems) {
        if (fitting.count(size) == 0) leftOut(problem, warn);
    }
    std::vector<EngineSet> found;
    for (auto& [size, set] : fitting) found.push_back(std::move(set));
    return found;
}

void leftOut(EngineError const& problem, Warn const& warn) {
    if (warn) warn(std::string("steps run on the engines for all calls, which are slower: ") + problem.what());
}

std::string readEngine(EngineSet const& engines, std::string const& graph, std::string const& command) {
    auto const made = engines.entry->graphs.find(graph);
    if (made == engines.entry->graphs.end()) {
        std::vector<std::string> others;
        for (auto const& [name, other] : engines.entry->graphs) others.push_back(name);
        throw EngineError("engines " + engines.directory.string() + ": there is no engine of " + graph,
                          {{}, joinedBy(", ", others), command});
    }
    FileEntry const& file = made->second.file;
    fs::path const path = engines.directory / file.file;
    std::optional<int64_t> const size = sizeOf(path);
    if (size != file.sizeBytes) {
        throw EngineError(path.string() + ": is incomplete",
                          {std::to_string(file.sizeBytes.value_or(0)) + " bytes",
                           size ? std::to_string(*size) + " bytes" : "no such file", "copy it again, or " + command});
    }
    std::optional<std::string> content = contentOf(path);
    if (!content) throw EngineError(path.string() + ": cannot be read");
    Sha256 hash;
    hash.update(content->data(), content->size());
    std::string const found = hash.finish();
    if (found != file.sha256) {
        throw EngineError(path.string() + ": sha256 differs", {shown(file.sha256) + "...", shown(found) + "...",
                                                               "the file changed after it was built: " + command});
    }
    return std::move(*content);
}

std::string platformName() {
    utsname system{};
    uname(&system);
    std::string name = std::string(system.sysname) + "-" + system.machine;
    std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return std::tolower(c); });
    return name;
}

}  // namespace gsx
