// Run-time values by sequence: those of some sequences of a batch, or one value repeated for all. As in
// gsx_engines/bundle/controls.py.

#pragma once

#include <cstdint>

#include "stage.h"

namespace gsx {

// The values of sequences [start, stop). A value that stands for all sequences stays as it is.
Controls valuesOfRows(Controls const& controls, int64_t start, int64_t stop);

// The values with one for each of `batch` sequences, where one stood for all.
Controls valuesOfEach(Controls const& controls, int64_t batch);

}  // namespace gsx
