// What a request asks of the keep rule, and the run-time inputs of the graphs that say so: as gsx_engines/bundle/controls.py.

#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "gsx/generation.h"
#include "stage.h"

namespace gsx {

// The run-time inputs of a generation. `keep` is as in Options; `promptSizes` are the prompts' tokens, one a sequence.
// Throws UsageError: what the bundle's rule does not read, or a value that it does not take.
std::shared_ptr<Controls const> controlsFor(Manifest const& manifest, std::vector<Keep> keep, Counts const& promptSizes);

// The run-time input of a budget: `thresholds`, or `budget` with selection by rank.
Controls selected(Selection const& selection, double budget);

// Read a set of branches, in the order of the text: `5` is both branches of layer 5 (counted from 0), `5.mlp` one, `0-7` a
// range. None: it is no set.
std::optional<std::vector<Place>> parsePlaces(std::string const& text);

}  // namespace gsx
