// The part of `gsx.json` that the C++ runtime needs, read and checked by the same rules as in gsx_engines/bundle.

#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace gsx {

// The branches of a layer; in tables with a column for each branch, its column.
enum class Branch { kAttention, kMlp };
inline constexpr int kBranches = 2;
// "attn" or "mlp".
char const* nameOf(Branch branch) noexcept;

// A skippable branch: its layer, counted from 0, and which of the two branches.
using Place = std::pair<int64_t, Branch>;

// How the layers of a looped model run (gsx_engines/bundle/loops.py): visits of layers count as layers.
struct Loops {
    int64_t before = 0;
    int64_t looped = 1;
    int64_t after = 0;
    int64_t most = 1;
    int64_t usual = 1;
    // Whether all loops use one K/V cache (`caches` is `last_loop`, and there are several).
    bool shareCaches = false;

    // The loop that a visit belongs to, counted from 0; unset for layers that run once.
    std::optional<int64_t> loopOf(int64_t visit) const;
};

struct DecoderShape {
    int64_t vocabSize = 0;
    int64_t numLayers = 0;
    int64_t maxPositions = 0;
    std::vector<int64_t> eosIds;
    // Unset: each layer runs once.
    std::optional<Loops> loops;
};

// Thresholds of all layers, [L][attn, mlp].
using Thresholds = std::vector<std::array<float, kBranches>>;

struct GridPoint {
    double budget = 1;
    Thresholds thresholds;
};

enum class SelectionMode { kThreshold, kRank };

// How kept tokens are chosen. The grid is in descending order of budgets, and empty for rank selection.
struct Selection {
    SelectionMode mode = SelectionMode::kThreshold;
    double budget = 1;
    std::vector<GridPoint> grid;

    // Thresholds for a budget: the calibrated ones, or interpolated linearly between two calibrated budgets (float32).
    // Throws UsageError for a budget below the grid or not in (0, 1].
    Thresholds thresholdsFor(double wanted) const;
};

// A run-time input of the keep rule, with its exported value where no other section has it.
struct RuntimeInput {
    std::string name;
    // Bounds of its values; unset: no bound.
    std::optional<double> least;
    std::optional<double> most;
    // The default of `layer_mask`: 1 for a branch that runs.
    Thresholds defaultMask;
    // Whether it has a value for each sequence. Thresholds in bundles of 0.1.0 have one for all.
    bool bySequence = false;
};

// The policy: a keep rule, which decides which tokens run which branch, with its parameters.
struct Policy {
    std::string name;
    // Branches that it may skip, in every layer that it applies to.
    std::vector<Branch> branches;
    // Layers that it applies to; unset: all.
    std::optional<std::vector<int64_t>> layers;
    std::vector<RuntimeInput> inputs;
    // How many new tokens run every branch after a prompt that does so too; unset: the rule applies to every token.
    std::optional<int64_t> warmUp;
    // Depths at which the model was trained to exit; empty: any.
    std::vector<int64_t> exits;
    // The exported confidence at which a token exits, for rules that measure it; infinite: no token exits.
    std::optional<double> exitThreshold;

    // A run-time input by name; null if the rule does not read it.
    RuntimeInput const* input(std::string const& wanted) const;
};

struct ExitDraft {
    int64_t layer = 0;
};
struct BudgetDraft {
    double budget = 1;
};
struct LayersDraft {
    std::vector<Place> skip;
};
struct LoopsDraft {
    int64_t loops = 1;
};
using DraftKind = std::variant<ExitDraft, BudgetDraft, LayersDraft, LoopsDraft>;
bool operator==(DraftKind const& one, DraftKind const& other);
// As people write it: `exit:2`, `budget:0.5`, `layers:3.attn,5.mlp`, `loops:1`.
std::string toString(DraftKind const& draft);

struct DraftEntry {
    DraftKind draft;
    std::optional<int64_t> length;
};

// A file of the bundle; its name has no folders, so it cannot point outside the bundle.
struct FileEntry {
    std::string file;
    std::string sha256;
    std::optional<int64_t> sizeBytes;
};

// An input or output of a graph or an engine; a dynamic axis has a name in place of a size.
struct TensorInfo {
    std::string name;
    std::vector<std::variant<int64_t, std::string>> shape;
};

// A dynamic axis of an engine.
struct Sizes {
    int64_t least = 1;
    int64_t usual = 1;
    int64_t most = 1;
};

// A graph of the bundle: its ONNX file, with its inputs and outputs.
struct GraphEntry {
    FileEntry file;
    std::vector<TensorInfo> inputs;
    std::vector<TensorInfo> outputs;
};

// What runs in 8 or 4 bits: whether the codes are FP8, and whether activations are quantized too.
struct Quantization {
    bool isFloat8 = false;
    bool quantizesActivations = false;
};

// The calls that an engine accepts: number of sequences, tokens of each in the call, and cache columns that are read.
struct EngineProfile {
    std::string name;
    Sizes batch;
    Sizes tokens;
    Sizes window;
};

struct EngineGraph {
    FileEntry file;
    std::string graphSha256;
    std::string weightsSha256;
    // Op of domain gsx -> what the engine runs in its place.
    std::map<std::string, std::string> forms;
    std::vector<TensorInfo> inputs;
    std::vector<TensorInfo> outputs;
};

struct PluginRecord {
    std::string sha256;
    std::string sourceHash;
};

inline constexpr char const* kInPlaceLayout = "in-place";
inline constexpr char const* kStepLayout = "step";

// One set of engines, as in `gsx.json` and in `engines/<name>/engine.json`.
struct EngineEntry {
    std::string backend;
    std::string tensorrtVersion;
    std::vector<std::string> targets;
    std::string platform;
    std::optional<std::string> gpu;
    // `in-place`; `step`, for calls of one size beside those; or `growing`, which this library does not run.
    std::string kvLayout = kInPlaceLayout;
    int64_t capacity = 0;
    std::vector<EngineProfile> profiles;
    std::optional<PluginRecord> plugins;
    std::map<std::string, EngineGraph> graphs;
    // The entry in canonical form, for comparing it with engine.json.
    std::string canonical;
};

struct Manifest {
    DecoderShape decoder;
    std::optional<Selection> selection;
    std::optional<Policy> policy;
    // `compute`, `copy` or `none`.
    std::string kvPolicy;
    // `fp32`, `fp16` or `bf16`.
    std::string precision;
    std::optional<Quantization> quantization;
    // Whether the bundle says how K and V are stored in 8 bits.
    bool hasKvCache = false;
    std::map<std::string, GraphEntry> graphs;
    FileEntry weights;
    // Hash of the exported chat template; unset without one.
    std::optional<std::string> chatTemplateSha256;
    // What passes from `draft` to `verify`: the outputs of the one that are inputs of the other. Empty without an exit.
    std::vector<std::string> exitState;
    std::optional<DraftEntry> draft;
    std::map<std::string, EngineEntry> engines;

    // The layers [first, last) that a graph runs.
    std::pair<int64_t, int64_t> layersOf(std::string const& graph) const;
    // (layer, branch) of every branch of layers [first, last) that the keep rule may skip, in the graphs' order.
    std::vector<Place> skippablePlaces(int64_t first, int64_t last) const;
};

// Throws UsageError for a budget that is not in (0, 1].
void checkBudget(double budget);

}  // namespace gsx
