// The outputs of several calls of an engine as those of one. As in gsx_engines/runners/joining.py.

#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "stage.h"

namespace gsx {

// The outputs of calls on neighbouring tokens as one.
StageOutput joinedPieces(std::vector<StageOutput> const& pieces);

// The outputs of calls on parts of a batch, which begin at these rows, as one; rows of no part are zero.
StageOutput joinedRows(std::vector<std::pair<int64_t, StageOutput>> const& parts, Call const& call, Logits logits);

}  // namespace gsx
