// The decoding loop, plain or with a draft that the model verifies: the loop of gsx_engines/generation/decoding.py.

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
//   firstLength: how many tokens the first rounds draft if the options do not say; unset: the rule's own number.
// Throws what Model::generate does.
Generation generate(Runner& runner, Draft* draft, std::optional<int64_t> firstLength, std::vector<Tokens> const& prompts,
                    Options const& options);

}  // namespace gsx
