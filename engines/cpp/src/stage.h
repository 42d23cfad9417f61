// One graph of a bundle on an engine: what a call feeds it, and what comes back. As gsx_engines/runners/tensorrt.py.

#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "gsx/engine.h"
#include "gsx/manifest.h"

namespace gsx {

using Counts = std::vector<int64_t>;

// Which logits a call gives: none; of each sequence's last token; of all tokens.
enum class Logits { kNone, kLast, kAll };

// Run-time inputs of the keep rule, by name (docs/design.md): `thresholds` [L, 2] or `budget` [], `layer_mask` [B, L, 2]
// and `exit_threshold` [] float32, `full_until` [B] int64. Empty for a dense model.
using Controls = Values;

// The tokens of one call.
struct Call {
    // [B, S]; behind a sequence's count, whatever.
    Array<int64_t> ids;
    // Tokens of each sequence, up to S; tokens of each before this call.
    Counts counts;
    Counts lengths;
    // Shared, since calls of a split runner wait for their second half.
    std::shared_ptr<Controls const> controls;

    int64_t batch() const { return ids.shape[0]; }
    int64_t size() const { return ids.shape[1]; }
};

// What leaves an exit layer and enters the next one, for the tokens of one call, by the graphs' names. The axis before the
// last one is the tokens.
using ExitState = std::map<std::string, Array<float>>;

// Rows kept by each (layer, branch) of the model in a call; empty where nobody counts.
using KeptTable = std::vector<std::array<int64_t, kBranches>>;

struct StageOutput {
    // [B, 1 or S, V], or [B, 0, V].
    Array<float> logits;
    ExitState state;
    KeptTable kept;
};

// K/V of a batch of sequences: each [B, kv heads, capacity, D].
struct StageMemory {
    Buffers buffers;
};

// Layers [first, last) of the model.
struct Layers {
    int64_t first;
    int64_t last;

    int64_t count() const { return last - first; }
};

class Stage {
public:
    // `graph` is `model`, `draft` or `verify`. The manifest and the entry outlive the stage.
    Stage(Manifest const& manifest, EngineEntry const& entry, std::string const& graph, std::unique_ptr<Engine> engine);

    Manifest const& manifest() const { return mManifest; }
    Layers layers() const { return mLayers; }
    // Branches of its layers that the keep rule may skip.
    std::vector<Place> const& skippable() const { return mSkippable; }

    // Room for sequences of up to `capacity` tokens; the buffers have the engine's own capacity, whatever is asked for.
    // Throws EngineError: the engine has no room for so many tokens or sequences.
    StageMemory newMemory(int64_t batch, int64_t capacity);

    // Run a call's tokens and append their K/V at `call.lengths`. More tokens than a profile takes go through in several
    // calls. `state` is what enters a second stage, else empty.
    // Throws EngineError: a call beyond the engine's profiles, or, with rank selection, one that had to be split.
    StageOutput run(StageMemory& memory, Call const& call, ExitState const& state, Logits logits);

private:
    StageOutput runOnce(StageMemory& memory, Call const& call, ExitState const& state, Logits logits);
    Values feedsOf(Call const& call, ExitState const& state, Logits logits, int64_t window) const;
    int64_t keptCountOf(Call const& call, double budget) const;
    KeptTable keptOf(Values const& found) const;

    Manifest const& mManifest;
    EngineEntry const& mEntry;
    EngineGraph const& mGraph;
    Layers mLayers;
    std::vector<Place> mSkippable;
    std::unique_ptr<Engine> mEngine;
};

// Number of the profile that takes a call: of those that fit, the one with the fewest tokens at most.
// Throws EngineError: none fits; it says which axis is out of which range.
size_t chooseProfile(std::vector<EngineProfile> const& profiles, int64_t batch, int64_t tokens, int64_t window);

// The most tokens of each sequence that one call takes; 0 where no profile takes so many sequences.
int64_t mostTokens(std::vector<EngineProfile> const& profiles, int64_t batch);

// Columns of the cache that a call reads: the filled ones, rounded up, so that shapes change seldom.
int64_t windowOf(int64_t filled, int64_t capacity);

// K of rank selection for n valid tokens that are not end-of-text (gsx_engines/bundle/counting.py).
int64_t keptCount(int64_t n, double budget);

}  // namespace gsx
