// What a request asks of the keep rule, turned into run-time inputs of the graphs: as in gsx_engines/bundle/controls.py.

#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "gsx/generation.h"
#include "stage.h"

namespace gsx {

// The run-time inputs of a generation. `keep` is as in Options; `promptSizes` are the lengths of the prompts.
// Throws UsageError: a setting that the bundle's rule does not read, or a value that it does not accept.
std::shared_ptr<Controls const> controlsFor(Manifest const& manifest, std::vector<Keep> keep, Counts const& promptSizes);

// Put the thresholds of a budget in place of `thresholds`, for all sequences.
void setBudget(Controls& controls, Selection const& selection, double budget);

// Parse a set of branches, in the order of the text: `5` is both branches of layer 5 (counted from 0), `5.mlp` one of them,
// `0-7` a range. Unset: the text is not a set.
std::optional<std::vector<Place>> parsePlaces(std::string const& text);

}  // namespace gsx
