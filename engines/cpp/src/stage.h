// One graph of a bundle on an engine: the inputs of a call, and its outputs. As in gsx_engines/runners/tensorrt.py.

#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "gsx/engine.h"
#include "gsx/manifest.h"
#include "picker.h"

namespace gsx {

using Counts = std::vector<int64_t>;

// Which logits a call returns: none, those of each sequence's last token, or those of all tokens.
enum class Logits { kNone, kLast, kAll };

// Run-time inputs of the keep rule by name (tensor_names.h). Empty for a dense model.
using Controls = Values;

// The tokens of one call.
struct Call {
    // [B, S]; arbitrary beyond a sequence's count.
    Array<int64_t> ids;
    // Tokens of each sequence in this call, up to S, and in the cache before it.
    Counts counts;
    Counts lengths;
    // Shared, since the calls of a split runner are kept until their second half runs.
    std::shared_ptr<Controls const> controls;

    int64_t batch() const { return ids.shape[0]; }
    int64_t size() const { return ids.shape[1]; }
};

// What leaves an exit layer and enters the next one, for the tokens of one call, by the graphs' names. The last axis but
// one is the tokens.
using ExitState = std::map<std::string, Array<float>>;

// Rows kept by each (layer, branch) of the model in a call; empty if they are not counted.
using KeptTable = std::vector<std::array<int64_t, kBranches>>;

// The likeliest tokens behind tokens [B, O] of a call, where an engine for steps gives them: ids and logits [B, O, C], and
// the sums of `Likeliest`, [B, O]. As in gsx_engines/likeliest.py.
struct LikelyLogits {
    Array<int64_t> ids;
    Array<float> logits;
    Array<float> totals;
    int64_t size;
    // Gives all logits [V] behind a token, by its place in [B, O]; until the engine's next call.
    std::function<std::vector<float>(int64_t, int64_t)> fetch;

    Likeliest of(int64_t row, int64_t token) const;
    // All logits, [B, O, V].
    Array<float> whole() const;
};

struct StageOutput {
    // [B, 1 or S, V], or [B, 0, V]; unset where `likely` is set.
    Array<float> logits;
    std::shared_ptr<LikelyLogits const> likely;
    ExitState state;
    KeptTable kept;
    // [B, S], how many branches kept each token; empty if the engine does not tell.
    Array<int64_t> keptByToken;
};

// K/V of a batch of sequences: each buffer is [B, K/V heads, capacity, D].
struct StageMemory {
    Buffers buffers;
    // Behind the inputs of which only the size is read; null if there are none.
    std::shared_ptr<Buffer> unread;
    // What calls bind, by kind of call: the engine's size, the first row, sequences and tokens, and the branches that run.
    // Making it takes longer than all else before a call.
    using Kind = std::tuple<std::pair<int64_t, int64_t>, int64_t, int64_t, int64_t, std::vector<bool>>;
    std::map<Kind, SharedBuffers> bound;
};

// Layers [first, last) of the model.
struct Layers {
    int64_t first;
    int64_t last;

    int64_t count() const { return last - first; }
};

// An engine for calls of one size, and the set that it belongs to. It uses the K/V buffers of the engine for all calls.
struct StepEngine {
    EngineEntry const& entry;
    std::unique_ptr<Engine> engine;
};

class Stage {
public:
    // `graph` is `model`, `draft` or `verify`; `steps` are engines of the same graph. The manifest and the entries must
    // outlive the stage.
    Stage(Manifest const& manifest, EngineEntry const& entry, std::string const& graph, std::unique_ptr<Engine> engine,
          std::vector<StepEngine> steps = {});

    Manifest const& manifest() const { return mManifest; }
    Layers layers() const { return mLayers; }
    // Whether it tells how many branches kept each token.
    bool countsTokens() const;
    // The branches of these layers that the keep rule may skip.
    std::vector<Place> const& skippable() const { return mSkippable; }

    // Memory for sequences of up to `capacity` tokens; the buffers always have the engine's own capacity.
    // Throws EngineError: the engine has no room for so many tokens or sequences.
    StageMemory newMemory(int64_t batch, int64_t capacity);

    // Run a call's tokens and append their K/V at `call.lengths`. More tokens than a profile takes are split over several
    // calls. `state` is the exit state that enters a second stage; empty otherwise.
    // Throws EngineError: a call beyond the engine's profiles or, with rank selection, one that would have to be split.
    StageOutput run(StageMemory& memory, Call const& call, ExitState const& state, Logits logits);

private:
    // An engine and its description.
    struct Plan {
        // Throws EngineError: gsx did not build it.
        Plan(EngineEntry const& ofEntry, std::string const& ofGraph, std::unique_ptr<Engine> ofEngine);

        bool tells(std::string const& output) const;

        EngineEntry const& entry;
        EngineGraph const& graph;
        std::unique_ptr<Engine> engine;
        // For calls of one size.
        bool isStep;
        // Where it gives the likeliest tokens, all logits stay in this memory. (Steps of gsx 0.1.0 give all.)
        std::optional<BoundBuffer> logits;
        int64_t calls = 0;
    };

    // Fetch all logits of an output that has only the likeliest tokens, since the next call may overwrite them.
    static void load(StageOutput& output);
    // The likeliest tokens of a step, behind tokens of each sequence.
    static std::shared_ptr<LikelyLogits const> likelyOf(Plan& plan, Values const& found, std::vector<Counts> tokens);

    // Run a call's sequences, those together that may be.
    StageOutput runParts(StageMemory& memory, Call const& call, ExitState const& state, Logits logits);
    // Run sequences together from row `start` on; in two calls if a single one has tokens that run every branch, and others.
    StageOutput runPart(StageMemory& memory, int64_t start, Call const& call, ExitState const& state, Logits logits);
    // One call of an engine. `start`: row of the first sequence in the memory.
    StageOutput runOnce(StageMemory& memory, int64_t start, Call const& call, ExitState const& state, Logits logits);
    // The memory of a call that stays on the device: the same object for the same rows, sizes and branches.
    SharedBuffers boundOf(StageMemory& memory, Plan const& plan, int64_t start, Call const& call,
                          std::vector<bool> const& chosen) const;
    // Rows that run together, as [start, stop): neighbours that have tokens, about as many, and run the same branches.
    std::vector<std::pair<int64_t, int64_t>> partsOf(Call const& call) const;
    // How many of a sequence's tokens run every branch.
    static int64_t fullOf(Call const& call, int64_t row);
    // Which of the branches in mRuns run for a sequence.
    std::vector<bool> chosenOf(Controls const& controls, int64_t row, bool full) const;
    Values feedsOf(Plan const& plan, Call const& call, ExitState const& state, Logits logits, int64_t window) const;
    int64_t keptCountOf(Call const& call, double budget) const;
    KeptTable keptOf(Values const& found) const;

    Manifest const& mManifest;
    EngineEntry const& mEntry;
    Layers mLayers;
    std::vector<Place> mSkippable;
    // Whether a call may run some of the rows of the memory.
    bool mSplits = true;
    // Where the host decides: the branches, in order, and their inputs.
    std::vector<std::pair<Place, std::string>> mRuns;
    Plan mPlan;
    // By their sequences, and tokens of each.
    std::map<std::pair<int64_t, int64_t>, Plan> mSteps;
};

// K of rank selection for n valid tokens that are not end-of-text (gsx_engines/bundle/counting.py).
int64_t keptCount(int64_t n, double budget);

}  // namespace gsx
