// A model that generates: a bundle, and what runs its graphs.
//
// A model makes one generation at a time; threads that share one take turns outside of it.

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
    // False: plain decoding, whatever the bundle has.
    bool speculative = true;
    // In another way than the bundle's own: `exit:E`, `budget:B` or `layers:SET`.
    std::optional<std::string> draft;
};

class Model {
public:
    // Called with `model`, or with `draft` and `verify`: the engine of that graph.
    using MakeEngine = std::function<std::unique_ptr<Engine>(std::string const&)>;

    // `entry` describes the engines (gsx/tensorrt.h opens TensorRT's).
    // Throws UsageError: the bundle cannot draft in this way; and what `makeEngine` throws.
    Model(Bundle bundle, EngineEntry entry, MakeEngine const& makeEngine, Drafting const& drafting = {});
    Model(Model&&) noexcept;
    Model& operator=(Model&&) noexcept;
    ~Model();

    Bundle const& bundle() const;
    // What drafts; none for plain decoding.
    std::optional<DraftKind> draft() const;

    // Continue prompts, given as token ids, in one batch.
    // Throws UsageError: an empty prompt, one beyond the context, ids outside the vocabulary, an option that is none.
    // Throws EngineError: the engines have no room for so much, or fail.
    Generation generate(std::vector<Tokens> const& prompts, Options const& options = {});

private:
    struct Parts;
    std::unique_ptr<Parts> mParts;
};

}  // namespace gsx
