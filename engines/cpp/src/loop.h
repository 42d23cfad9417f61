// The decoding loop, plain or with a draft that the model verifies: the loop of gsx_engines/generation.py.

#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "draft.h"
#include "gsx/generation.h"
#include "runner.h"

namespace gsx {

// Continue prompts.
//   runner: the model; with a draft, the draft's own runner.
//   draft: what guesses tokens ahead; null for plain decoding.
//   firstLength: how far the first rounds draft where the options do not say; none for the rule's own.
// Throws as Model::generate.
Generation generate(Runner& runner, Draft* draft, std::optional<int64_t> firstLength, std::vector<Tokens> const& prompts,
                    Options const& options);

}  // namespace gsx
