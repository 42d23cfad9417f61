// A model that generates: a bundle, and the engines that run its graphs.
//
// A model runs one generation at a time; threads that share one must synchronize themselves.

#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "gsx/bundle.h"
#include "gsx/engine.h"
#include "gsx/generation.h"

namespace gsx {

// How a model drafts.
struct Drafting {
    // False: plain decoding, even if the bundle has a draft.
    bool speculative = true;
    // A draft to use in place of the bundle's own: `exit:E`, `budget:B` or `layers:SET`.
    std::optional<std::string> draft;
};

class Model {
public:
    // Makes the engine of a graph; called with `model`, or with `draft` and with `verify`. That of a step may be null: then
    // the engine for all calls does its work.
    using MakeEngine = std::function<std::unique_ptr<Engine>(std::string const&)>;

    // A set of engines: its description, and what makes them.
    struct Engines {
        EngineEntry entry;
        MakeEngine make;
    };

    // `entry` describes the engines (gsx/tensorrt.h opens those of TensorRT). `steps` are sets for calls of one size each
    // (`gsx build --step`), which use the K/V buffers of the others.
    // Throws UsageError: the bundle cannot draft in this way. Passes on what `makeEngine` throws.
    Model(Bundle bundle, EngineEntry entry, MakeEngine const& makeEngine, Drafting const& drafting = {},
          std::vector<Engines> const& steps = {});
    Model(Model&&) noexcept;
    Model& operator=(Model&&) noexcept;
    ~Model();

    Bundle const& bundle() const;
    // The draft in use; unset for plain decoding.
    std::optional<DraftKind> draft() const;

    // Continue prompts, given as token ids, in one batch.
    // Throws UsageError: an empty prompt, one beyond the context, ids outside the vocabulary, an invalid option.
    // Throws EngineError: the request does not fit into the engines, or they fail.
    Generation generate(std::vector<Tokens> const& prompts, Options const& options = {});

private:
    struct Parts;
    std::unique_ptr<Parts> mParts;
};

}  // namespace gsx
